#!/usr/bin/env bash
# The driver in a container: puts the image's code and parameters into the workspace and runs the graph there.
#
#   driver.sh [ARGUMENT OF dvc repro …]
#
# The workspace outlives the container: finished stages are not run again, an unfinished one goes on where it was.
set -euo pipefail

code=${DGM_CODE:-/opt/dgm}
workspace=${DGM_WORKSPACE:-/workspace}

cd "$workspace"
if [ -e .git ]; then
    echo "error: $workspace is a git clone, whose code this would replace; run python -m pipelines.repro there" >&2
    exit 2
fi

# The lock is inherited by all that runs below, and the kernel frees it with the last of them.
mkdir -p .dgm .dvc
exec 9>.dgm/driver.lock
if ! flock --nonblock 9; then
    echo "error: another driver is at work in $workspace; wait for it, or stop it" >&2
    exit 1
fi

# The image is the truth, but for what searches have written into the workspace's tuned/.
rm -rf dgm_core pipelines
cp -R "$code/dgm_core" "$code/pipelines" .
for part in dvc.yaml params.yaml .dvcignore tuning; do
    if [ -e "$code/$part" ]; then cp -R "$code/$part" .; fi
done
mkdir -p tuned
cp -R --no-clobber "$code/tuned/." tuned
cp "$code/.dvc/config" .dvc/config
printf '[core]\n    no_scm = true\n' >.dvc/config.local # the image has no git history

exec python -m pipelines.repro "$@"
