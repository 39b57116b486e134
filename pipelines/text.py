"""Numbers and nested values as a person reads them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any


def number(value: float | None, spread: float | None = None, digits: int = 4) -> str:
    """Significant digits, no exponent where it can be avoided; "–" for none.

    With a spread (± sd), two digits of that, and as many decimals of the value.
    """
    if value is None:
        return "–"
    if not math.isfinite(value):
        return str(value)
    if spread and math.isfinite(spread):
        decimals = 1 - math.floor(math.log10(abs(spread)))
        if decimals <= 5:
            return f"{value:.{max(decimals, 0)}f} ± {spread:.{max(decimals, 0)}f}"
        power = math.floor(math.log10(max(abs(value), abs(spread))))
        return f"({value / 10**power:.{decimals + power}f} ± {spread / 10**power:.{decimals + power}f})e{power}"
    if value == 0 or 1e-4 <= abs(value) < 1e6:
        return f"{value:.{digits}g}" if abs(value) < 10**digits else f"{value:.0f}"
    return f"{value:.{max(digits - 2, 1)}e}"


def words(given: Any) -> str:
    """Nested values in one line; what is empty is left out."""
    if isinstance(given, Mapping):
        return ", ".join(f"{key} {words(value)}" for key, value in given.items() if value not in (None, "", {}, []))
    if isinstance(given, list | tuple):
        return " ".join(words(value) for value in given)
    if isinstance(given, bool):
        return "yes" if given else "no"
    if isinstance(given, float):
        return number(given, digits=6)
    return "" if given is None else str(given)
