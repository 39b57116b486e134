"""The picture of a search: each key's values against the metric, and how much each key mattered."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.ticker import MaxNLocator, NullFormatter

from dgm_core.evaluation.drawing import plot
from pipelines.search import Trial, Values
from pipelines.space import Distribution

ACROSS = 3  # panels
BLUE, ORANGE, GREY = "#0b5cad", "#c2410c", "#6b7280"


def draw(
    space: Mapping[str, Distribution],
    trials: Sequence[Trial],
    default: Values,
    best: int | None,
    importance: tuple[Mapping[str, float], str],
    metric: str,
) -> bytes:
    """PNG: one panel a key and a last one of importance; trained to the end filled, stopped hollow."""
    shown = [t for t in trials if t.score is not None and math.isfinite(t.score)]
    panels = len(space) + 1
    across = min(ACROSS, panels)
    down = -(-panels // across)

    def fill(canvas: Any) -> None:
        axes = canvas.subplots(down, across, squeeze=False).flatten()
        for panel, (key, distribution) in zip(axes, space.items(), strict=False):
            _values(panel, key, distribution, shown, default, best)
        for panel in axes[0:panels:across]:
            panel.set_ylabel(metric)
        _importance(axes[panels - 1], *importance)
        for panel in axes[panels:]:
            panel.set_visible(False)
        looks = {
            text: handle for panel in axes for handle, text in zip(*panel.get_legend_handles_labels(), strict=True)
        }
        canvas.legend(looks.values(), looks.keys(), loc="outside upper center", ncols=4, frameon=False)

    return plot(fill, width=4.0 * across, height=3.2 * down + 0.4)


def _values(
    axes: Any, key: str, distribution: Distribution, trials: Sequence[Trial], default: Values, best: int | None
) -> None:
    kind, given = distribution.given
    options = [_text(option) for option in given] if kind == "choice" else []

    def at(trial: Trial) -> float | None:
        value = (trial.values or default).get(key)
        if kind != "choice":
            return value
        return options.index(_text(value)) if _text(value) in options else None

    looks: dict[str, tuple[list[Trial], dict[str, Any]]] = {
        "trained to the end": (
            [t for t in trials if t.state == "finished" and t.values and t.number != best],
            {"color": BLUE, "s": 42},
        ),
        "stopped": ([t for t in trials if t.state == "stopped"], {"facecolors": "none", "edgecolors": GREY, "s": 42}),
        "default": ([t for t in trials if not t.values], {"color": "black", "marker": "D", "s": 46}),
        "best": ([t for t in trials if t.number == best and t.values], {"color": ORANGE, "marker": "*", "s": 190}),
    }
    for label, (which, look) in looks.items():
        points = [(at(t), t.score) for t in which if at(t) is not None]
        if points:
            axes.scatter([x for x, _ in points], [y for _, y in points], label=label, zorder=3, **look)
    axes.set_title(short(key), fontsize=10)
    axes.grid(color="#e5e7eb", linewidth=0.8)
    if options:
        axes.set_xticks(range(len(options)), options)
        axes.set_xlim(-0.5, len(options) - 0.5)
    elif kind == "loguniform":
        axes.set_xscale("log")
        axes.set_xlim(given[0] / 1.15, given[1] * 1.15)
        if given[1] >= 10 * given[0]:
            axes.xaxis.set_minor_formatter(NullFormatter())
    elif kind == "randint":
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))


def short(key: str) -> str:
    """A key without what all of its kind begin with."""
    return key.removeprefix("recipe.").removeprefix("optimizers.").removeprefix("config.")


def _text(value: Any) -> str:
    return ", ".join(map(_text, value)) if isinstance(value, list | tuple) else f"{value}".removesuffix(".0")


def _importance(axes: Any, shares: Mapping[str, float], how: str) -> None:
    names = list(shares)[::-1]
    axes.barh(range(len(names)), [shares[name] for name in names], color=BLUE, height=0.6)
    axes.set_yticks(range(len(names)), [short(name) for name in names])
    axes.set_xlim(0, 1)
    axes.set_title(f"importance ({how})", fontsize=10)
