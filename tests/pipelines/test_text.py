"""Numbers as a person reads them."""

from __future__ import annotations

import pytest

from pipelines.text import number, words


@pytest.mark.parametrize(
    ("value", "spread", "text"),
    [
        (None, None, "–"), (float("nan"), None, "nan"), (0.0, None, "0"), (3.14159, None, "3.142"),
        (0.00012, None, "0.00012"), (0.000012, None, "1.20e-05"), (123456.7, None, "123457"), (2.5e7, None, "2.50e+07"),
        (2.5, 0.0131, "2.500 ± 0.013"), (104.2, 1.26, "104.2 ± 1.3"), (12345.6, 234.5, "12346 ± 234"),
        (6e-4, 3.2e-5, "(6.00 ± 0.32)e-4"), (0.0, 3.2e-5, "(0.0 ± 3.2)e-5"), (5.0, 0.0, "5"), (-5.0, None, "-5"),
    ],
)  # fmt: skip
def test_numbers(value: float | None, spread: float | None, text: str) -> None:
    assert number(value, spread) == text


def test_nested_values_in_one_line() -> None:
    given = {"split": "test", "n": 360, "ema": False, "options": {}, "labels": [1, 2], "at": 0.123456789, "none": None}
    assert words(given) == "split test, n 360, ema no, labels 1 2, at 0.123457"
