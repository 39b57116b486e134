"""Logs a finished run with MLflow as a model that samples: `mlflow models serve -m models:/m-…` answers with data."""

from __future__ import annotations

import logging
import warnings
from importlib.metadata import version
from pathlib import Path

import dgm_core
from dgm_core.runs import load
from pipelines.tracking import Tracker

_NEEDS = ("torch", "numpy", "pandas", "pyarrow", "pydantic", "safetensors", "mlflow")
_TYPES = {bool: "boolean", int: "long", float: "double", str: "string"}


def log_model(tracker: Tracker, run: Path) -> None:
    """Log the folder of a finished run under the tracker's MLflow run."""
    import mlflow.pyfunc
    from mlflow.models import ModelSignature
    from mlflow.types import ColSpec, DataType, ParamSchema, ParamSpec, Schema

    options = load(run).sample_options()
    params = [ParamSpec("seed", DataType.long, 0)]
    params += [ParamSpec(k, DataType[_TYPES[type(v)]], v) for k, v in options.items() if type(v) in _TYPES]
    signature = ModelSignature(
        inputs=Schema([ColSpec(DataType.long, "n"), ColSpec(DataType.long, "class", required=False)]),
        params=ParamSchema(params),
    )
    for name in ("mlflow.pyfunc", "mlflow.models", "mlflow.utils"):
        logging.getLogger(name).setLevel(logging.ERROR)
    folder = tracker.model_folder()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # about schemas to infer: the signature says it all
        mlflow.pyfunc.save_model(
            str(folder),
            python_model=str(Path(__file__).with_name("sampler.py")),
            artifacts={"run": str(run.resolve())},
            code_paths=[str(Path(dgm_core.__file__).parent)],
            signature=signature,
            pip_requirements=[f"{name}=={version(name)}" for name in _NEEDS],
        )
    tracker.log_model(folder)
