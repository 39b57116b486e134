"""A finished run is a folder: `config.json recipe.json spec.json weights.safetensors metrics.json`."""

from __future__ import annotations

import difflib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from dgm_core.capabilities import HasCodes
from dgm_core.config import Recipe
from dgm_core.contract import DataSpec, GenerativeModel
from dgm_core.models import CATALOG
from dgm_core.models.two_stage import TwoStage

TWO_STAGE = "two_stage"


class RunError(ValueError):
    """The folder does not hold a finished run."""


@contextmanager
def replaced_folder(folder: Path) -> Iterator[Path]:
    """A temporary folder beside `folder` that takes its place when the block ends well, and vanishes otherwise."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    aside = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}."))
    os.chmod(aside, 0o755)
    try:
        yield aside
        old = aside.with_name(aside.name + ".old")
        if folder.exists():
            os.replace(folder, old)
        os.replace(aside, folder)
        shutil.rmtree(old, ignore_errors=True)
    except BaseException:
        shutil.rmtree(aside, ignore_errors=True)
        raise


def write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2, sort_keys=True) + "\n")


def save_run(
    folder: Path,
    name: str,
    model: GenerativeModel,
    recipe: Recipe,
    state: Mapping[str, Tensor],
    metrics: Mapping[str, float],
) -> None:
    """Write the five files into an existing folder.

    Args:
        name: the model's name in CATALOG.
        state: the tensors to save (the best checkpoint's, averaged), as `checkpoint.model_state` gives them.
        metrics: plain numbers that do not depend on the machine's speed.
    """
    write_json(folder / "config.json", {"model": name, "config": model.config.model_dump(mode="json")})
    write_json(folder / "recipe.json", recipe.model_dump(mode="json"))
    write_json(folder / "spec.json", model.data.to_dict())
    write_json(folder / "metrics.json", dict(metrics))
    save_file({k: v.detach().cpu().contiguous() for k, v in state.items()}, folder / "weights.safetensors")


def load(folder: str | Path, device: torch.device | str = "cpu") -> GenerativeModel:
    """The trained model of a run's folder, in eval mode; of a two-stage folder, its code model with the priors.

    Raises:
        RunError: the folder is missing or not whole.
    """
    folder = Path(folder)
    described = _read(folder, "config.json")
    if described["model"] == TWO_STAGE:
        codes = load(folder / described["codes"], device)
        if not isinstance(codes, HasCodes):
            raise RunError(f"{folder} names {described['codes']} as its code model, which has no codes")
        priors = {level: load(folder / prior, device) for level, prior in described["priors"].items()}
        return TwoStage(codes, priors).eval()
    model_class = find_model(described["model"])
    config = model_class.Config.model_validate(described["config"])
    model = model_class(config, DataSpec.from_dict(_read(folder, "spec.json")))
    state = load_file(folder / "weights.safetensors", device=str(device))
    if any(t.dtype == torch.float64 for n, t in state.items() if n in dict(model.named_parameters())):
        model = model.double()
    model.to(device).load_state_dict(state)
    return model.eval()


def find_model(name: str) -> type[GenerativeModel]:
    """The class in CATALOG, or a `RunError` that names the nearest."""
    if name not in CATALOG:
        near = difflib.get_close_matches(name, CATALOG, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise RunError(f"there is no model {name!r}{hint} Known models: {', '.join(CATALOG)}")
    return CATALOG[name]


def _read(folder: Path, name: str) -> Any:
    path = folder / name
    if not path.is_file():
        raise RunError(f"{folder} is not a finished run: it has no {name}. Train it, or give the folder of one that is")
    return read_json(path)


def read_json(path: Path) -> Any:
    """Parse a JSON file."""
    return json.loads(path.read_text())
