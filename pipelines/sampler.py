"""The model that MLflow serves: a finished run as a `pyfunc` whose `predict` samples (models from code)."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from mlflow.models import set_model
from mlflow.pyfunc.model import PythonModel


class Sampler(PythonModel):
    """Input: rows of `n` and, for conditional models, `class` (negative: drawn). Params: `seed` and the model's own."""

    def load_context(self, context: Any) -> None:
        import dgm_core

        self.model = dgm_core.load(context.artifacts["run"])

    # Without type hints: MLflow would take them for the input's schema, which the signature has.
    def predict(self, context, model_input, params=None):  # type: ignore[no-untyped-def]
        """(N, *shape) in data units, the rows' samples one after another; the same seed gives the same samples."""
        options = dict(params or {})
        seed = int(options.pop("seed", 0))
        samples = []
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            torch.manual_seed(seed)
            for row in model_input.to_dict("records"):
                n, label = int(row["n"]), row.get("class")
                y = torch.full((n,), int(label)) if label is not None and label >= 0 else None  # NaN: not given
                samples.append(self.model.sample(n, y, **options).cpu().numpy())
        return np.concatenate(samples)


set_model(Sampler())
