"""WaveNet's cached sampling beside the naive loop, and beside another library's: `python -m benchmarks.wavenet`.

All draw 16 sequences in single precision from layers of 64 features (residual, gated, skip and head), dilations
1, 2, 4 …, a softmax over 256 levels. The naive loop runs the network over its receptive field at every sample; as each
pass costs the same, it is timed on `PASSES` of them and scaled. That both draw the same tokens is checked at samples
that lie beyond one receptive field, in double precision, where rounding does not decide a draw.

That a sample's cost does not grow with the receptive field is measured twice: 30 layers that reach far against 30 that
reach near, and three stacks of ten layers against one, by layer.

wavenet_vocoder 0.1.1 is no dependency of this project (`pip install --no-deps wavenet_vocoder==0.1.1`): without it its
rows are left out. Its incremental generation is given a network of the same size, without weight normalisation and
dropout. It draws its samples for a batch of one only; at a batch of 16 it can but feed back the probabilities, without
drawing, so that there it does less work than ours.
"""

from __future__ import annotations

import importlib
import importlib.util
import statistics
import sys
from collections.abc import Callable

import torch
from torch import Tensor

from benchmarks.harness import Row, interleave, report
from dgm_core.contract import DataSpec
from dgm_core.models.autoregressive.wavenet import WaveNet

BATCH, LEVELS, WIDTH, PASSES = 16, 256, 64, 2
SAMPLES = 512  # drawn in a timed run
CHECKED = 32  # samples whose tokens are compared
NAIVE_GOAL, PEER_GOAL, GROWTH = 50.0, 1.0, 1.1
PEER, PEER_VERSION = "wavenet_vocoder", "0.1.1"


def model(length: int, stacks: int = 3, depth: int = 10) -> WaveNet:
    widths = dict.fromkeys(("channels", "hidden", "skip", "head"), WIDTH)
    return WaveNet(WaveNet.Config(stacks=stacks, depth=depth, **widths), DataSpec("audio", (length,), LEVELS)).eval()


def reach(of: WaveNet) -> int:
    """Samples that one sample depends on."""
    return of.network.stack.past + of.network.enter.past + 1


@torch.no_grad()
def naive_draws(of: WaveNet, x: Tensor, noise: Tensor, at: list[int]) -> Tensor:
    """What the naive loop draws at each place, from one pass over the receptive field before it."""
    drawn = []
    for t in at:
        seen = torch.cat([x[..., t - reach(of) : t], torch.zeros_like(x[..., :1])], 3)
        drawn.append(of.draw(of.network(seen, None)[:, 0, 0, -1], noise[:, 0, 0, t], 1.0, 1.0))
    return torch.stack(drawn, 1)


def agreement() -> float:
    """Share of the checked tokens on which both agree, in double precision and with the same random numbers.

    A pass over the receptive field alone sees zeros before it where the loop has features of earlier samples: these
    reach no further than it, so nothing is lost.
    """
    of = model(1)
    length = reach(of) + CHECKED + 1
    of = model(length).double()
    torch.manual_seed(0)
    x = of.sample(BATCH)
    torch.manual_seed(0)
    noise = torch.rand(BATCH, 1, 1, length, dtype=torch.float64)
    at = list(range(length - CHECKED, length, CHECKED // PASSES))
    return (naive_draws(of, x[:, None, None].long(), noise, at) == x[:, at]).double().mean().item()


def peer(batch: int) -> Callable[[], Tensor] | None:
    """Draws `SAMPLES` samples by the peer's incremental generation; None where it is not importable."""
    if importlib.util.find_spec(PEER) is None:
        return None
    network = importlib.import_module(PEER).WaveNet(
        out_channels=LEVELS,
        layers=30,
        stacks=3,
        residual_channels=WIDTH,
        gate_channels=2 * WIDTH,
        skip_out_channels=WIDTH,
        kernel_size=2,
        dropout=0.0,
    )
    network.make_generation_fast_()
    network.eval()
    first = torch.zeros(batch, LEVELS, 1)
    first[:, LEVELS // 2] = 1  # tells it the batch

    @torch.no_grad()
    def generate() -> Tensor:
        return network.incremental_forward(test_inputs=first, T=SAMPLES, softmax=True, quantize=batch == 1)

    return generate


def beside_peer(of: WaveNet) -> list[Row]:
    """At a batch of one, both draw; at the batch of the other rows, the peer feeds back its probabilities."""
    rows = []
    for batch, what in ((1, "drawing"), (BATCH, "feeding back probabilities")):
        generate = peer(batch)
        if generate is None:
            print(f"{PEER} is not importable, so its rows are left out: pip install --no-deps {PEER}=={PEER_VERSION}")
            return []
        ratio = interleave(lambda b=batch: of.sample(b), generate).ratio
        setting = f"batch {batch}, 3 × 10 layers of {WIDTH}, float32"
        rows.append(Row(f"{PEER}'s incremental generation, {what}, over ours ({setting})", ratio, PEER_GOAL))
    return rows


def main() -> int:
    torch.manual_seed(0)
    setting = f"batch {BATCH}, 3 × 10 layers of {WIDTH}, float32"
    far, near, one = model(SAMPLES), model(SAMPLES, stacks=6, depth=5), model(SAMPLES, stacks=1)
    length = reach(far) + PASSES
    x, noise = torch.randint(LEVELS, (BATCH, 1, 1, length)), torch.rand(BATCH, 1, 1, length)
    at = list(range(length - PASSES, length))
    naive = interleave(lambda: far.sample(BATCH), lambda: naive_draws(far, x, noise, at))
    growth = interleave(lambda: near.sample(BATCH), lambda: far.sample(BATCH))
    layers = interleave(lambda: one.sample(BATCH), lambda: far.sample(BATCH))
    rows = [
        Row(f"cached over naive ({setting})", SAMPLES / PASSES * naive.ratio, NAIVE_GOAL),
        Row("tokens equal to the naive loop's (float64)", 100 * agreement(), 100.0, unit="%"),
        Row("milliseconds a sample, cached", 1000 * statistics.median(naive.ours) / SAMPLES, None, unit="ms"),
        Row(
            f"milliseconds a sample, naive ({PASSES} passes over {reach(far)} samples)",
            1000 * statistics.median(naive.peer) / PASSES,
            None,
            unit="ms",
        ),
        Row(
            f"a sample of 30 layers that reach {reach(far)} samples over 30 that reach {reach(near)}",
            growth.ratio,
            GROWTH,
            at_least=False,
        ),
        Row("a layer and sample of 3 stacks over one of 1 stack", layers.ratio / 3, GROWTH, at_least=False),
    ]
    return report("wavenet", rows + beside_peer(far))


if __name__ == "__main__":
    sys.exit(main())
