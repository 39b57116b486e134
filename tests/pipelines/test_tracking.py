"""MLflow runs: one an entry, no step twice, no NaN, FINISHED or FAILED at the end, whatever dies; on real servers."""

from __future__ import annotations

import http.server
import io
import json
import os
import pickle
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from pipelines import tracking, tracking_store
from pipelines.command import Usage
from pipelines.params import Tracking
from pipelines.tracking import Tracker
from pipelines.writer import Writer
from tests.servers import (
    PASSWORD,
    Mlflow,
    ObjectStore,
    Postgres,
    mlflow_server,
    object_store,
    postgres,
    postgres_programs,
)
from tests.support import ROOT


@pytest.fixture(scope="module")
def empty_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """MLflow takes a second or two to make its tables: once for this file."""
    path = tmp_path_factory.mktemp("store") / "mlflow.db"
    tracking_store.connect(Tracking(uri=f"sqlite:///{path}"))
    return path


@pytest.fixture
def make(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, empty_store: Path) -> Callable[[], Tracker]:
    monkeypatch.chdir(tmp_path)
    for name in ("MLFLOW_TRACKING_URI", "DGM_SPOOL"):
        monkeypatch.delenv(name, raising=False)
    shutil.copyfile(empty_store, tmp_path / "mlflow.db")
    return lambda: Tracker(Tracking(system_metrics=False), "vae", tmp_path / "state")


def rows(*steps: int, **values: float) -> dict[str, Any]:
    return {"rows": [json.dumps({"step": s, "train/loss": 1.0 / s, **values}) for s in steps]}


def wait_until(true: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not true():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.05)


def test_a_run_is_continued_and_no_step_is_logged_twice(make: Callable[[], Tracker]) -> None:
    first = make()
    with pytest.raises(KeyboardInterrupt), first.running(None, stage="train"):
        first.writer()(rows(50, 100))
        raise KeyboardInterrupt
    assert first.client.get_run(first.run_id).info.status == "FAILED"
    again = make()
    with again.running(first.run_id, stage="train"):
        assert again.run_id == first.run_id
        assert again.client.get_run(first.run_id).info.status == "RUNNING"
        pickle.loads(pickle.dumps(again.writer()))(rows(100, 150))
    history = again.client.get_metric_history(first.run_id, "train/loss")
    assert [m.step for m in history] == [50, 100, 150]
    assert again.client.get_run(first.run_id).info.status == "FINISHED"
    assert make().remembered() == first.run_id


def test_what_is_not_finite_is_kept_out_and_said(make: Callable[[], Tracker]) -> None:
    tracker = make()
    with tracker.running(None):
        tracker.writer()(rows(1, bad=float("nan"), worse=float("inf")))
    run = tracker.client.get_run(tracker.run_id)
    assert set(run.data.metrics) == {"round", "train/loss"}
    assert run.data.tags["dgm.not_finite"] == "bad, worse"


def test_an_id_that_the_server_does_not_know_starts_a_new_run_tagged(make: Callable[[], Tracker]) -> None:
    tracker = make()
    with tracker.running("0" * 32):
        pass
    assert tracker.run_id != "0" * 32
    assert tracker.client.get_run(tracker.run_id).data.tags["dgm.continues"] == "0" * 32


def test_sample_grids_stand_on_a_step_slider(make: Callable[[], Tracker]) -> None:
    buffer = io.BytesIO()
    Image.new("L", (8, 8)).save(buffer, "PNG")
    tracker = make()
    with tracker.running(None):
        tracker.writer()({"images": {10: buffer.getvalue(), 20: buffer.getvalue()}})
    names = [f.path for f in tracker.client.list_artifacts(tracker.run_id, "images")]
    assert sum("+step+10+" in n or "+step+20+" in n for n in names) >= 2


def test_configuration_is_logged_flat_and_survives_a_second_attempt(make: Callable[[], Tracker]) -> None:
    tracker = make()
    with tracker.running(None):
        tracker.log_config({"recipe": {"steps": 3, "optimizers": {"model": {"lr": 0.1}}}})
    with tracker.running(tracker.run_id):
        tracker.log_config({"recipe": {"steps": 3, "optimizers": {"model": {"lr": 0.1}}}})
    params = tracker.client.get_run(tracker.run_id).data.params
    assert params == {"recipe.steps": "3", "recipe.optimizers.model.lr": "0.1"}


def test_dvc_and_git_are_tagged(make: Callable[[], Tracker], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DVC_STAGE", "train@vae")
    monkeypatch.setenv("DVC_EXP_NAME", "muted-crow")
    tracker = make()
    with tracker.running(None):
        pass
    tags = tracker.client.get_run(tracker.run_id).data.tags
    assert tags["dvc.stage"] == "train@vae"
    assert tags["dvc.exp_name"] == "muted-crow"


def test_an_experiment_continues_its_own_run_only(make: Callable[[], Tracker], monkeypatch: pytest.MonkeyPatch) -> None:
    """Queued experiments train at once and share the project's state: an evaluation must not end in another's run."""
    runs = {}
    for experiment in ("", "muted-crow", "tidy-newt"):
        monkeypatch.setenv("DVC_EXP_NAME", experiment)
        tracker = make()
        assert tracker.remembered() is None
        with tracker.running(None):
            runs[experiment] = tracker.run_id
    assert len(set(runs.values())) == 3
    for experiment, run_id in runs.items():
        monkeypatch.setenv("DVC_EXP_NAME", experiment)
        assert make().remembered() == run_id


@pytest.mark.parametrize("uri", ["file:./mlruns", "ftp://x", "mlruns"])
def test_a_store_that_mlflow_does_not_have_is_refused(uri: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    with pytest.raises(Usage, match="sqlite:///FILE"):
        Tracker(Tracking(uri=uri), "vae", Path())


def test_a_writer_pickles_without_its_connection() -> None:
    writer = Writer("folder", "seed1/")
    copy = pickle.loads(pickle.dumps(writer))
    assert (copy.folder, copy.prefix) == ("folder", "seed1/")


def test_a_run_can_be_nested_and_end_as_killed(make: Callable[[], Tracker]) -> None:
    outer, inner = make(), make()
    with outer.running(None), inner.running(None, parent=outer.run_id):
        inner.status = "KILLED"
    run = outer.client.get_run(inner.run_id)
    assert run.data.tags["mlflow.parentRunId"] == outer.run_id
    assert run.info.status == "KILLED"
    assert outer.client.get_run(outer.run_id).info.status == "FINISHED"


OPENS = """
import os, signal, sys
from pathlib import Path
from pipelines import tracking
from pipelines.params import Tracking
from pipelines.tracking import Tracker

tracker = Tracker(Tracking(system_metrics=False), "vae", Path("state"))
create = tracker.client.create_run
def create_and_die(*args, **kwargs):
    create(*args, **kwargs)
    os.kill(os.getpid(), signal.SIGKILL)
if sys.argv[1] == "opening":
    tracker.client.create_run = create_and_die
with tracker.running(None, memo=Path("memo.json"), stage="train"):
    tracker.writer()({"rows": ['{"step": 1, "train/loss": 1.0}']})
    os.kill(os.getpid(), signal.SIGKILL)
"""


def die(while_: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", OPENS, while_], env={**os.environ, "PYTHONPATH": str(ROOT)}, check=False
    )
    assert done.returncode == -signal.SIGKILL


def the_runs(tracker: Tracker) -> list[Any]:
    return list(tracker.client.search_runs([tracker.experiment]))


@pytest.mark.slow
@pytest.mark.parametrize("while_", ["opening", "running"])
def test_killed_at_any_point_the_same_run_goes_on(make: Callable[[], Tracker], while_: str) -> None:
    """Also between MLflow's creating the run and our noting its id."""
    die(while_)
    tracker = make()
    assert [r.info.status for r in the_runs(tracker)] == ["RUNNING"]
    with tracker.running(None, memo=Path("memo.json"), stage="train"):
        tracker.writer()(rows(1, 2))
    (run,) = the_runs(tracker)
    assert run.info.status == "FINISHED"
    assert [m.step for m in tracker.client.get_metric_history(run.info.run_id, "train/loss")] == [1, 2]


@pytest.mark.slow
def test_a_stage_that_starts_settles_what_a_killed_one_left(make: Callable[[], Tracker], tmp_path: Path) -> None:
    die("running")
    other = Tracker(Tracking(system_metrics=False), "flow", tmp_path / "state")
    with other.running(None):
        (killed,) = [r.info.run_id for r in the_runs(other) if r.info.run_name == "vae"]
        wait_until(lambda: other.client.get_run(killed).info.status == "FAILED")
    assert other.client.get_run(killed).data.metrics["round"] == 1
    assert not list((tmp_path / ".dgm/spool").iterdir())


def test_the_same_results_logged_twice_are_there_once(make: Callable[[], Tracker], tmp_path: Path) -> None:
    (tmp_path / "figures").mkdir()
    (tmp_path / "figures" / "a.txt").write_text("a")
    tracker, run_id = make(), None
    for frechet in (2.0, 2.0, 3.0):  # evaluated, killed after logging and evaluated again, changed
        with tracker.running(run_id):
            tracker.log_results({"frechet": frechet}, tmp_path / "figures")
        run_id = tracker.run_id
    assert [m.value for m in tracker.client.get_metric_history(tracker.run_id, "frechet")] == [2.0, 3.0]
    assert [f.path for f in tracker.client.list_artifacts(tracker.run_id, "evaluation")] == ["evaluation/a.txt"]


def test_system_metrics_go_the_same_way(
    make: Callable[[], Tracker], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_SYSTEM_METRICS_SAMPLING_INTERVAL", "0.05")
    tracker = Tracker(Tracking(), "vae", tmp_path / "state")
    with tracker.running(None):
        wait_until(lambda: "system/cpu_utilization_percentage" in tracker.client.get_run(tracker.run_id).data.metrics)


class Refusing(http.server.BaseHTTPRequestHandler):
    """A server with a login, or no MLflow at all."""

    status, body = 401, b"You are not authenticated"

    def do_GET(self) -> None:
        self.send_response(self.status)
        self.end_headers()
        self.wfile.write(self.body)

    def log_message(self, *_: Any) -> None:
        """Quiet."""


@contextmanager
def answering(status: int, body: bytes) -> Iterator[int]:
    handler = type("Handler", (Refusing,), {"status": status, "body": body})
    server = http.server.HTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield server.server_port
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def refusal(uri: str, monkeypatch: pytest.MonkeyPatch) -> str:
    for name in ("MLFLOW_TRACKING_USERNAME", "MLFLOW_TRACKING_PASSWORD"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    with pytest.raises(Usage) as caught:
        Tracker(Tracking(), "vae", Path("state"))
    assert PASSWORD not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    ("status", "body", "message"),
    [
        (401, b"You are not authenticated", "it refuses the user name or the password"),
        (403, b"Invalid Host header - possible DNS rebinding attack detected", "--allowed-hosts"),
        (403, b"Permission denied", "does not let this user see"),
        (200, b"<html>a router's login page</html>", "is it an MLflow server?"),
        (404, b"nothing here", "it answers 404 nothing here"),
        (503, b"no healthy upstream", "it answers 503 no healthy upstream"),
    ],
)
def test_a_server_that_does_not_serve_us_is_refused_at_the_start(
    status: int, body: bytes, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with answering(status, body) as port:
        said = refusal(f"http://me:{PASSWORD}@127.0.0.1:{port}", monkeypatch)
    assert message in said
    assert f"http://127.0.0.1:{port} " in said


@pytest.mark.parametrize(
    ("uri", "message"),
    [
        (f"http://me:{PASSWORD}@127.0.0.1:1", "connection refused"),
        (f"http://me:{PASSWORD}@no-such-host.invalid:5000", "its host name is not known"),
        (
            f"postgresql+psycopg2://me:{PASSWORD}@127.0.0.1:1/mlflow",
            "me:***@127.0.0.1:1/mlflow cannot be used: connection",
        ),
        (f"postgresql://me:{PASSWORD}@127.0.0.1:1/mlflow", "give postgresql+psycopg2://"),
        ("sqlite:///text.db", "file is not a database"),
        ("sqlite:////proc/x/mlflow.db", "No such file or directory"),
        (f"ftp://me:{PASSWORD}@host/x", "tracking uri 'ftp://me:***@host/x' is not accepted"),
    ],
)
def test_a_store_that_is_not_there_is_refused_at_the_start(
    uri: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("text.db").write_text("this is no database" * 100)
    assert message in refusal(uri, monkeypatch)


def test_a_server_that_never_answers_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tracking_store, "ANSWER_SECONDS", (0.2, 0.2))
    monkeypatch.setattr(tracking_store, "PATIENCE", 5.0)
    with socket.socket() as hole:
        hole.bind(("127.0.0.1", 0))
        hole.listen(5)
        port = hole.getsockname()[1]
        assert "no answer in time" in refusal(f"http://127.0.0.1:{port}", monkeypatch)
        monkeypatch.setattr(tracking_store, "PATIENCE", 0.5)
        assert "no answer within 0.5 s" in refusal(f"postgresql+psycopg2://me@127.0.0.1:{port}/x", monkeypatch)


def test_credentials_leave_the_uri(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("MLFLOW_TRACKING_USERNAME", "MLFLOW_TRACKING_PASSWORD"):
        monkeypatch.setenv(name, "")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "https://me:p%40ss@host:5000/")
    assert tracking_store.store_uri(Tracking()) == "https://host:5000"
    assert (os.environ["MLFLOW_TRACKING_USERNAME"], os.environ["MLFLOW_TRACKING_PASSWORD"]) == ("me", "p@ss")
    assert os.environ["MLFLOW_TRACKING_URI"] == "https://host:5000"
    assert tracking_store.masked("mysql://me:p@s:s@host/x") == "mysql://me:***@host/x"
    assert tracking_store.masked("http://host:5000/a@b") == "http://host:5000/a@b"


@pytest.fixture(scope="module")
def bucket() -> Iterator[ObjectStore]:
    if postgres_programs() is None:
        pytest.skip("PostgreSQL is not installed: apt-get install postgresql")
    with object_store() as store:
        yield store


@pytest.fixture(scope="module")
def database(bucket: ObjectStore) -> Iterator[Postgres]:
    with postgres() as started:
        yield started


@pytest.fixture(scope="module")
def server(database: Postgres, bucket: ObjectStore) -> Iterator[Mlflow]:
    """MLflow as a team runs it: PostgreSQL behind it, artefacts through it to S3."""
    with mlflow_server(database.uri, f"s3://{bucket.bucket}", bucket.env) as started:
        yield started


@pytest.fixture
def remote(server: Mlflow, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Tracker]:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", server.uri)
    (tmp_path / "params.yaml").write_text((ROOT / "params.yaml").read_text())

    def make(**settings: Any) -> Tracker:
        return Tracker(Tracking(**{"system_metrics": False, **settings}), "vae", tmp_path / "state")

    return make


def steps(tracker: Tracker) -> list[int]:
    return [m.step for m in tracker.client.get_metric_history(tracker.run_id, "train/loss")]


def saved_model(tracker: Tracker) -> None:
    """A flavour's folder, without the seconds that a real one takes."""
    import mlflow.pyfunc

    folder = tracker.model_folder()
    code = folder.parent / "model.py"
    code.write_text("import mlflow\nmlflow.models.set_model(lambda model_input: model_input)\n")
    mlflow.pyfunc.save_model(str(folder), python_model=str(code), pip_requirements=["mlflow"])
    tracker.log_model(folder)


@pytest.mark.slow
@pytest.mark.parametrize("dies", ["server", "database"])
def test_an_outage_loses_nothing_and_nothing_comes_twice(
    remote: Callable[..., Tracker], server: Mlflow, database: Postgres, bucket: ObjectStore, dies: str
) -> None:
    """A database that dies under a living server makes it answer, but with errors: no word of it is a refusal."""
    tracker, buffer = remote(flush_seconds=120), io.BytesIO()
    victim = {"server": server, "database": database}[dies]
    Image.new("L", (8, 8)).save(buffer, "PNG")
    with tracker.running(None):
        write = tracker.writer()
        write(rows(1, 2))
        victim.kill()
        write({**rows(3), "images": {3: buffer.getvalue()}})
        write(rows(4, bad=float("inf")))
        tracker.log_config({"recipe": {"steps": 4}})
        saved_model(tracker)
        wait_until(lambda: tracker._sender.failing != "")
        time.sleep(5)  # time for several attempts
        victim.restart()
        write(rows(3, 4, 5))
    run = tracker.client.get_run(tracker.run_id)
    assert run.info.status == "FINISHED"
    assert steps(tracker) == [1, 2, 3, 4, 5]
    assert run.data.params == {"recipe.steps": "4"}
    assert run.data.tags["dgm.not_finite"] == "bad"
    (output,) = run.outputs.model_outputs
    model = tracker.client.get_logged_model(output.model_id)
    assert str(model.status) == "READY"
    keys = bucket.keys()
    assert any(f"{output.model_id}/artifacts/MLmodel" in key for key in keys)
    assert len([key for key in keys if tracker.run_id in key and key.endswith(".png")]) == 1
    assert not list(Path(".dgm/spool").iterdir())


@pytest.mark.slow
def test_a_server_that_is_away_at_the_end_is_told_later(
    remote: Callable[..., Tracker], server: Mlflow, capsys: pytest.CaptureFixture[str]
) -> None:
    tracker = remote(flush_seconds=0.5)
    with tracker.running(None):
        write = tracker.writer()
        write(rows(1))
        server.kill()
        write(rows(2))
        saved_model(tracker)
    assert "python -m pipelines.tracking flush" in capsys.readouterr().err
    with pytest.raises(Usage, match="connection refused"):
        tracking.main(["flush"])
    server.restart()
    assert tracker.client.get_run(tracker.run_id).info.status == "RUNNING"  # it knows no better yet
    assert tracking.main(["flush"]) == 0
    assert "everything is in MLflow" in capsys.readouterr().out
    run = tracker.client.get_run(tracker.run_id)
    assert run.info.status == "FINISHED"
    assert steps(tracker) == [1, 2]
    assert len(run.outputs.model_outputs) == 1
    assert tracking.main(["flush"]) == 0
    assert "nothing waits" in capsys.readouterr().out


@pytest.mark.slow
def test_every_node_reports_its_use(
    remote: Callable[..., Tracker], server: Mlflow, monkeypatch: pytest.MonkeyPatch
) -> None:
    from pipelines.node_metrics import node_metrics

    monkeypatch.setenv("MLFLOW_SYSTEM_METRICS_SAMPLING_INTERVAL", "0.1")
    tracker = remote()
    with tracker.running(None):
        wanted = {f"system/{node}/cpu_utilization_percentage" for node in ("a", "b-c")}
        with node_metrics(server.uri, tracker.run_id, "a"), node_metrics(server.uri, tracker.run_id, "b c"):
            wait_until(lambda: wanted <= set(tracker.client.get_run(tracker.run_id).data.metrics))


@pytest.mark.slow
def test_a_stage_on_postgresql_and_an_object_store(
    remote: Callable[..., Tracker], server: Mlflow, bucket: ObjectStore, tmp_path: Path
) -> None:
    """`train`, as its command: metrics, pictures and the model in one FINISHED run; `evaluate` goes on with it."""
    from ruamel.yaml import YAML

    from pipelines import judge, prepare

    yaml = YAML()
    params = yaml.load(tmp_path / "params.yaml")
    tiny = {"preset": "tiny", "config": {}, "recipe": {"steps": 20, "evaluate_every": 10}}
    params["runs"] = {"vae": {**params["runs"]["vae"], **tiny}}
    params |= {"encode": {}, "two_stage": {}, "judge": {"steps": 20}, "tune": {}}
    params["cluster"] = {"workers": 0, "log_every": 5}
    params["evaluate"] = {"samples": 32, "examples": 32, "importance_samples": 0, "tiles": 2}
    yaml.dump(params, tmp_path / "params.yaml")
    assert prepare.main(["digits_binary"]) == 0
    assert judge.main(["digits_binary"]) == 0
    for stage in ("train", "evaluate"):
        done = subprocess.run(
            [sys.executable, "-m", f"pipelines.{stage}", "vae"], capture_output=True, text=True, check=False,
            env={**os.environ, "PYTHONPATH": str(ROOT), "MLFLOW_SYSTEM_METRICS_SAMPLING_INTERVAL": "0.2"},
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
    tracker = Tracker(Tracking(system_metrics=False), "vae", Path(".dgm"))
    run = tracker.client.get_run(tracker.remembered() or "")
    assert run.info.status == "FINISHED"
    history = tracker.client.get_metric_history(run.info.run_id, "round")
    assert [m.step for m in history] == [5, 10, 15, 20]
    assert run.data.metrics["frechet"] == json.loads(Path("metrics/vae.json").read_text())["frechet"]
    assert "system/cpu_utilization_percentage" in run.data.metrics
    assert run.data.params["recipe.steps"] == "20"
    (output,) = run.outputs.model_outputs
    keys = bucket.keys()
    assert any(f"{output.model_id}/artifacts/artifacts/" in key and key.endswith("weights.safetensors") for key in keys)
    pictures = [key for key in keys if f"{run.info.run_id}/artifacts/images/samples+step+" in key]
    assert {int(key.split("+step+")[1].split("+")[0]) for key in pictures} == {10, 20}
    assert any(f"{run.info.run_id}/artifacts/evaluation/evaluation.json" in key for key in keys)


@pytest.mark.slow
def test_a_wrong_database_password_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if postgres_programs() is None:
        pytest.skip("PostgreSQL is not installed: apt-get install postgresql")
    with postgres() as database:
        said = refusal(database.uri.replace(PASSWORD, "wrong"), monkeypatch)
    assert "refuses the user name or the password" in said
