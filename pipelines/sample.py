"""Sample from a finished run.

python -m pipelines.sample RUN --n 64 --out grid.png          a grid
python -m pipelines.sample RUN --n 64 --out samples.npz       arrays `x` in data units and `y` (empty if drawn)
python -m pipelines.sample RUN --n 64 --out folder/           one PNG a sample, or of audio one WAV
python -m pipelines.sample RUN --n 8 --out samples.wav        audio, one after the other
python -m pipelines.sample RUN --n 64 --keep 0.5 --out …      of twice as many, those that look most like their class
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from dgm_core import runs
from dgm_core.contract import Batch, DataSpec, GenerativeModel
from dgm_core.data.display import display_of
from dgm_core.evaluation import drawing
from dgm_core.evaluation.judge import Judge
from dgm_core.evaluation.sampling import goes_by_labels
from dgm_core.evaluation.sounds import wav
from dgm_core.models.rejection import sample_trusted
from pipelines.command import Usage, run_main
from pipelines.params import yaml_load
from pipelines.worker import device

PAUSE = 0.25  # seconds between recordings in one file


def draw(model: GenerativeModel, n: int, y: Tensor | None, batch: int, **options: Any) -> Tensor:
    """(n, *shape) in data units, a batch at a time, with progress on a terminal."""
    parts = []
    with torch.no_grad(), tqdm(total=n, desc="sampling", disable=None, unit="sample") as bar:
        for start in range(0, n, batch):
            size = min(batch, n - start)
            part = model.sample(size, None if y is None else y[start : start + size], **options)
            parts.append(part.cpu())
            bar.update(size)
    return torch.cat(parts)


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m pipelines.sample", description="Sample from a finished run.")
    parser.add_argument("run", metavar="RUN", help="a run of params.yaml, or a run's folder")
    parser.add_argument("--n", type=int, default=64)
    parser.add_argument("--out", type=Path, required=True, help="FILE.png, FILE.npz, FILE.wav or a folder")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--class", type=int, dest="label", metavar="K", help="of conditional models; drawn if not given"
    )
    parser.add_argument("--batch", type=int, default=64, help="samples at a time")
    parser.add_argument(
        "--keep", type=float, metavar="SHARE", help="of each class drawn, the share that a classifier trusts most"
    )
    parser.add_argument("--judge", metavar="DATASET", help="whose judge is that classifier, or its folder; the data's")
    parser.add_argument("--set", action="append", default=[], metavar="OPTION=VALUE", help="the model's own options")
    given = parser.parse_args(argv)
    folder = Path(given.run) if Path(given.run).is_dir() else Path("models", given.run)
    try:
        model = runs.load(folder, device())
    except runs.RunError as error:
        raise Usage(str(error)) from None
    options = _options(model, given.set)
    if given.n < 1:
        raise Usage(f"--n {given.n} is not accepted: at least 1")
    torch.manual_seed(given.seed)
    y = None
    if given.label is not None:
        y = model.labels_for(given.n, torch.full((given.n,), given.label))
    info, of = about_data(folder), ""
    if given.keep is not None:
        judge = find_judge(given.judge, info, model, given.keep, options)
        x, y, _, drawn = sample_trusted(
            model, given.n, y, classifier=judge.logits, keep=given.keep,
            draw=lambda labels: draw(model, len(labels), labels, given.batch, **options),
        )  # fmt: skip
        of = f" (the most trusted of {drawn})"
    elif given.judge is not None:
        raise Usage(f"--judge {given.judge} needs --keep SHARE: it says whose judge chooses")
    else:
        x = draw(model, given.n, y, given.batch, **options)
    write(x, y, model, info, given.out)
    sys.stdout.write(f"{given.n} samples of {folder.name}{of}: {given.out}\n")
    return 0


def about_data(folder: Path) -> Mapping[str, Any]:
    """What the run's folder says of its data; of a two-stage model, its code model's."""
    described = runs.read_json(folder / "config.json")
    two_stage = described["model"] == runs.TWO_STAGE
    return runs.read_json((folder / described["codes"] if two_stage else folder) / "data.json")


def find_judge(
    named: str | None, info: Mapping[str, Any], model: GenerativeModel, keep: float, options: Mapping[str, Any]
) -> Judge:
    """The classifier to keep samples by: that of the data set named, else of the run's own.

    Raises:
        Usage: there is none, or nothing for it to go by.
    """
    if not 0 < keep <= 1:
        raise Usage(f"--keep {keep} is not accepted: a share above 0, up to 1")
    if model.data.classes < 2:
        raise Usage("--keep goes by the probability of the class asked for, and this run's data has no classes")
    if info.get("source") == "codes" and named is None:
        raise Usage(
            f"--keep needs a classifier of what is drawn, and this run draws codes ({info['name']}): sample the "
            "two-stage model that decodes them"
        )
    folder = Path(named) if named is not None and Path(named).is_dir() else Path("judges", named or info["name"])
    if not (folder / "judge.json").is_file():
        raise Usage(
            f"--keep needs a judge, and there is none in {folder}: fit it with python -m pipelines.judge "
            f"{named or info['name']}, or name another with --judge"
        )
    judge = Judge.load(folder).to(device())
    judge.check(model.data)
    if not goes_by_labels(model, Batch(torch.empty(0)), options, seed=0):
        raise Usage("--keep goes by the class asked for, and this model draws alike whatever the class")
    return judge


def _options(model: GenerativeModel, given: Sequence[str]) -> dict[str, Any]:
    known = model.sample_options()
    options = {}
    for item in given:
        name, sign, value = item.partition("=")
        if not sign or name not in known:
            listed = ", ".join(f"{k} (default {v})" for k, v in known.items()) or "none"
            raise Usage(f"--set {item} is not accepted; this model's options: {listed}")
        options[name] = yaml_load(value)
    return options


def write(x: Tensor, y: Tensor | None, model: GenerativeModel, info: Mapping[str, Any], out: Path) -> None:
    """By the name's ending: a grid, an array, recordings in a row, or a folder of pictures or of recordings."""
    out.parent.mkdir(parents=True, exist_ok=True)
    if out.suffix == ".npz":
        np.savez_compressed(out, x=x.numpy(), y=np.empty(0, np.int64) if y is None else y.cpu().numpy())
        return
    if model.data.kind == "vector":
        raise Usage("samples are vectors, no pictures: give --out FILE.npz")
    if out.suffix == ".wav" or (out.suffix == "" and model.data.kind == "audio"):
        _write_sounds(x, model.data, info, out)
        return
    pictures = drawing.pictures(x, model.data, display_of(info))
    if out.suffix == ".png":
        out.write_bytes(drawing.grid(pictures, math.ceil(math.sqrt(len(pictures)))))
    elif out.suffix == "":
        out.mkdir(exist_ok=True)
        for i, picture in enumerate(pictures):
            (out / f"{i:05d}.png").write_bytes(drawing.png(picture.movedim(0, 2).numpy()))
    else:
        raise Usage(f"--out {out} is not accepted: FILE.png, FILE.npz, FILE.wav of audio, or a folder")


def _write_sounds(x: Tensor, data: DataSpec, info: Mapping[str, Any], out: Path) -> None:
    if data.kind != "audio":
        raise Usage(f"samples are {data.kind}, no recordings: give --out FILE.png, FILE.npz or a folder")
    if "sample_rate" not in info:
        raise Usage("the data set's sampling rate is not known, so nothing can be played: give --out FILE.npz")
    rate, waves = int(info["sample_rate"]), drawing.waveforms(x, data, display_of(info))
    if out.suffix == ".wav":
        pause = torch.zeros(len(waves), int(PAUSE * rate))
        out.write_bytes(wav(torch.cat([waves, pause], 1).flatten()[: -pause.shape[1]], rate))
        return
    out.mkdir(exist_ok=True)
    for i, wave in enumerate(waves):
        (out / f"{i:05d}.wav").write_bytes(wav(wave, rate))


if __name__ == "__main__":
    run_main(main)
