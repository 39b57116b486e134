"""Values that may be missing: a model either goes by what is there, or refuses to take gaps for zeros."""

from __future__ import annotations

import pytest

from dgm_core.contract import OBSERVED, DataMismatch, DataSpec
from dgm_core.models import CATALOG

D = 8
CONTEXT = {OBSERVED: DataSpec("vector", (D,), 2)}
TABLES = [DataSpec("vector", (D,), levels, context=CONTEXT) for levels in (None, 2)]


@pytest.mark.parametrize("name", [name for name, model in CATALOG.items() if not model.takes_missing])
def test_gaps_are_refused(name: str) -> None:
    model = CATALOG[name]
    for data in TABLES:
        with pytest.raises(DataMismatch):
            model(model.tiny(data)[0], data)


def test_gaps_are_refused_for_what_they_are() -> None:
    model = CATALOG["vae"]
    with pytest.raises(DataMismatch, match="values of this data may be missing, and VAE would take those for zeros"):
        model(model.tiny(TABLES[1])[0], TABLES[1])


def test_some_model_takes_them() -> None:
    model = CATALOG["ppca"]
    assert model.takes_missing
    model(model.tiny(TABLES[0])[0], TABLES[0])
