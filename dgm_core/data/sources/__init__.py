"""Where data comes from: one small file a source; adding one is a file and a line here."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import Field, TypeAdapter

from dgm_core.contract import DataMismatch
from dgm_core.data.sources.base import Source
from dgm_core.data.sources.density import DensitySource
from dgm_core.data.sources.digits import Digits
from dgm_core.data.sources.idx import Idx
from dgm_core.data.sources.images import Images
from dgm_core.data.sources.npz import Npz
from dgm_core.data.sources.parquet import Parquet
from dgm_core.data.sources.sprites import SpriteSource
from dgm_core.data.sources.table import Csv
from dgm_core.data.sources.wav import Wav

SOURCES: dict[str, type[Source]] = {
    "digits": Digits,
    "idx": Idx,
    "images": Images,
    "parquet": Parquet,
    "npz": Npz,
    "wav": Wav,
    "csv": Csv,
    "density": DensitySource,
    "sprites": SpriteSource,
}

AnySource = Annotated[
    Digits | Idx | Images | Parquet | Npz | Wav | Csv | DensitySource | SpriteSource, Field(discriminator="source")
]


def parse(given: Mapping[str, Any]) -> Source:
    """A source's configuration from plain data; `source` says which."""
    name = given.get("source")
    if name not in SOURCES:
        near = difflib.get_close_matches(str(name), SOURCES, n=1)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise DataMismatch(f"source {name!r} is not known; {hint}accepted: {', '.join(SOURCES)}")
    return TypeAdapter(AnySource).validate_python(dict(given))
