"""Figures as text, and the sentences of docs/scaling.md that are chosen by them."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks.scale import cost
from benchmarks.scale.account import BACKWARD, GRADIENTS, Account
from benchmarks.scale.cost import WORLDS, Core, Round

STORAGE = """\
All ranks wait at a barrier while rank 0 writes `last.pt` to its node's disk; the upload follows in the background and
only the newest version is sent, so that a slow store delays nothing but makes the copy there older. Every node
fetches the whole data set before it starts, and reads from its own disk then, in the training thread: reading is not
hidden behind compute. Validation and the grid of samples are rank 0's alone; "in rounds" is for how many rounds of
training the others wait. Below, every {chosen} rounds are assumed. A log costs {log} small messages every {rounds}
rounds, {least} on 512 GPUs. Every worker reports to the one controller at most every {every} s: {reports} reports a
second from 512 workers."""

BREAKS = """\
For each model, GPUs are doubled from one until a single cause takes a fifth of the round (strong scaling), or there
are more workers than examples. Causes: kernels that take longer to launch than to run; summing gradients, the part
that is latency and the part that is bandwidth; other sums; reading; logging; writing the checkpoint; validation.
First the shares of a round on the most of 8, 64, 512 GPUs that the batch allows."""

CHECK = """\
Two processes of one thread on one machine of {cores} cores (load average {load}), gloo over loopback, runs of
`params.yaml` on the digits. Predicted: the slower of two halves of the batch without messages (both processes at
once, the same code: a group whose other rank does not exist) plus a ring for every message, from a hop and a
bandwidth measured beside it. Medians of at least {pairs} interleaved repetitions, and the range of their ratios;
goal: 0.7 … 1.4. {slower} What it can show is that messages are counted rightly and add up as the formula has it; of
NVLink, networks and object stores it shows nothing."""

CAUSES = {
    "launching": "launching kernels takes {share} of the round ({kernels} kernels, {launch}; arithmetic: {arithmetic})",
    "statistics": "sums other than gradients take {share} of the round ({statistics}, {latent} of it latency)",
    "latency": "the latency of summing gradients takes {share} of the round (the sums take {gradients} in all)",
    "bandwidth": "the bandwidth of summing gradients takes {share} of the round (the sums take {gradients} in all)",
    "reading": "reading in the training thread takes {share} of the round ({reading})",
    "logging": "the messages of logs take {share} of the round",
    "checkpoint": "writing `last.pt` ({saving}) takes {share} of the time",
    "validation": "validation ({validation} on rank 0, every {chosen} rounds) takes {share} of the time",
}
ADVICE = {
    "launching": "More GPUs do not help: use fewer, for several runs side by side; `compile: true`, or more examples a "
    "GPU.",
    "layers": "Each layer waits for its own sums, so that they can be neither merged nor hidden: stay within a node, "
    "where a hop is {hop}; beyond it, sums within the node only (a process group in `nn/norm.py`, which is not built), "
    "or a configuration without batch statistics.",
    "after": "They are made one after another when the play is over: in one message with the gradients they would cost "
    "next to nothing (which is not built).",
    "latency": "Fewer, larger messages: more examples a GPU.",
    "bandwidth": "Sum buckets while backward goes on ({overlapped} efficiency instead of {efficiency} on as many "
    "GPUs), send them in bf16 (half the bytes), or have more examples a GPU.",
    "reading": "Read the next batch in a thread.",
    "logging": "Raise `cluster.log_every`.",
    "checkpoint": "Raise `cluster.checkpoint_seconds`; then let each node write a share.",
    "validation": "Raise `recipe.evaluate_every`; then let every rank score and draw a share.",
}
FETCH = 600.0  # seconds after which waiting for the data is worth a word


def sentence(a: Account, core: Core, validation: float, data_bytes: float) -> str:
    """What breaks first, what to do, and what comes next."""
    if not a.gradient_bytes():
        sums = sum(m.count * m.bytes(a.batch) for m in a.once)
        taken = sum(m.count * cost.all_reduce(m.bytes(a.batch), WORLDS[-1]) for m in a.once)
        return (
            "Nothing is summed in a round: one pass over the data when training begins settles it, and sums of "
            f"{nbytes(sums)}, {seconds(taken)} on {WORLDS[-1]} GPUs. Reading the data is all there is to spread; one "
            "core does."
        )
    first = cost.first_broken(a, core, validation)
    parts = []
    if first["cause"] in CAUSES:
        r = cost.round_on(first["world"], a.batch, a, core, validation)
        text = _filled(CAUSES[first["cause"]], a, r, validation, first["share"])
        advice = _filled(ADVICE[_kind(a, first["cause"])], a, r, validation, first["share"])
        parts.append(f"On {first['world']} GPU{'s' * (first['world'] > 1)}, {text}. {advice}")
    elif first["cause"] == "none":
        parts.append(f"Nothing takes a fifth of the round up to {WORLDS[-1]} GPUs.")
    if a.most_workers < WORLDS[-1]:
        parts.append(
            f"More than {a.most_workers} workers are refused ({a.limited_by}): beyond that a larger batch, with its "
            "learning rate chosen anew, or independent runs (`seeds`, a search)."
        )
    parts += _also(a, core, validation, first["cause"])
    if (fetch := cost.fetching(data_bytes, cost.NODE)) > FETCH:
        parts.append(
            f"Training waits {seconds(fetch)} until a node has fetched its {nbytes(data_bytes)} of data: fetch shards "
            "in parallel streams, or keep nodes (and their caches) between runs."
        )
    return " ".join(parts)


def _kind(a: Account, cause: str) -> str:
    """Sums within layers need other advice than sums that a model makes after a play."""
    if cause != "statistics":
        return cause
    other = [m for m in a.messages if m.place != GRADIENTS]
    within = sum(m.count for m in other if m.place == BACKWARD or "norm.py" in m.place)
    return "layers" if 2 * within > sum(m.count for m in other) else "after"


def _also(a: Account, core: Core, validation: float, said: str) -> list[str]:
    """Other causes that are a fifth of the round on the most of 8, 64, 512 GPUs that the batch allows."""
    world = max((w for w in WORLDS if w <= a.most_workers), default=1)
    r = cost.round_on(world, a.batch, a, core, validation)
    also = [
        _filled(CAUSES[cause], a, r, validation, lost / r.total)
        for cause, lost in r.causes.items()
        if lost >= 0.2 * r.total and cause != said
    ]
    lines = [f"On {world} GPUs, {'; '.join(also)}."] if also else []
    upload = a.checkpoint_bytes / cost.value("STORE_STREAM")
    interval = cost.value("CHECKPOINT_SECONDS")
    if upload > 0.5 * interval:
        lines.append(
            f"Uploading `last.pt` takes {seconds(upload)} of the {interval:g} s between checkpoints on one stream: "
            "send its parts in parallel, or checkpoint less often."
        )
    return lines


def _filled(text: str, a: Account, r: Round, validation: float, share: float) -> str:
    return text.format(
        share=percent(share),
        kernels=count(a.kernels if r.world > 1 else a.kernels_alone),
        launch=seconds(r.compute),
        arithmetic=seconds(r.arithmetic),
        statistics=seconds(r.statistics),
        latent=percent(r.statistics_latency / r.statistics if r.statistics else 0.0),
        gradients=seconds(r.gradients),
        reading=seconds(r.reading),
        saving=seconds(a.checkpoint_bytes / cost.value("DISK")),
        validation=seconds(validation),
        chosen=f"{cost.value('EVALUATE_EVERY'):g}",
        hop=seconds(cost.value("HOP_NODE")),
        overlapped=percent(r.overlapped),
        efficiency=percent(r.efficiency),
    )


def _scaled(value: float, units: Sequence[tuple[float, str]]) -> str:
    """Three digits and the largest unit that leaves at least one before the point."""
    if value == 0:
        return "0"
    size, unit = next(((s, u) for s, u in units if abs(value) >= 0.9995 * s), units[-1])
    scaled = value / size
    digits = max(0, 2 - math.floor(math.log10(abs(scaled)))) if abs(scaled) < 100 else 0
    return f"{scaled:.{min(digits, 2)}f}{unit}"


def seconds(value: float) -> str:
    return _scaled(value, [(1, " s"), (1e-3, " ms"), (1e-6, " µs")]) if value else "–"


def nbytes(value: float) -> str:
    return _scaled(value, [(1e9, " GB"), (1e6, " MB"), (1e3, " kB"), (1, " B")])


def count(value: float) -> str:
    """1234 as it is, larger ones with a letter; whatever unit follows is the caller's."""
    if 1 <= abs(value) < 1e4:
        return f"{value:.0f}"
    return _scaled(value, [(1e12, " T"), (1e9, " G"), (1e6, " M"), (1e3, " k"), (1, "")])


def percent(value: float) -> str:
    return f"{100 * value:.0f} %" if value < 0.995 or value == 1 else f"{100 * value:.1f} %"


def paragraph(text: str) -> str:
    return textwrap.fill(text, 120, break_long_words=False, break_on_hyphens=False)


def item(text: str) -> str:
    return textwrap.fill(f"- {text}", 120, subsequent_indent="  ", break_long_words=False, break_on_hyphens=False)


def messages(number: float) -> str:
    return f"{number:g} message{'s' * (number != 1)}"


def table(head: Sequence[str], rows: Sequence[Sequence[str]], drop_empty: bool = False) -> str:
    """In Markdown, with a blank line after it; `drop_empty`: leave out columns that have no cell."""
    keep = [i for i in range(len(head)) if not drop_empty or any(row[i] for row in rows)]
    lines = [[row[i] for i in keep] for row in (head, ["---"] * len(head), *rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def slower_than_one(checked: Sequence[Mapping[str, Any]]) -> str:
    """Which runs were to be slower on two workers than on one, and which were."""

    def names(key: str) -> str:
        return ", ".join(f"`{c['run']}`" for c in checked if c[key] > c["one"]) or "none"

    return f"To be slower on two workers than on one: {names('predicted')}; slower: {names('two')}."
