"""Flows on vectors beside zuko, nflows and normflows, of equal size: `python -m benchmarks.flows`.

Single precision, five layers, perceptrons with two hidden layers and ReLU. A training step is the mean negative
log-likelihood of a batch, its gradient and a step of fused Adam; `log_prob` is without gradients. What counts is ours
against the fastest peer of each line. Drawing from a MAF is timed on one layer, as every layer costs the same.

Widths, depths and batches are equal; ours does not store the weights of a MADE that its mask hides. The peers are no
dependency of this project: install `zuko`, `nflows` and `normflows` beside it.
"""

from __future__ import annotations

import importlib
import importlib.util
import statistics
import sys
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.harness import Row, interleave, report
from dgm_core.contract import Batch, Clock, DataSpec
from dgm_core.models.flow.base import FlowModel
from dgm_core.models.flow.maf import MAF
from dgm_core.models.flow.real_nvp import RealNVP

PEERS = {"zuko": "1.6", "nflows": "0.14", "normflows": "1.7.3"}
DEPTH = 5
SIZES = {"D = 63, 512 units, batch 100": (63, 512, 100), "D = 784, 1,024 units, batch 100": (784, 1024, 100)}
AT_LEAST, SAMPLING = 0.95, 10.0


def ours(kind: str, dims: int, features: int, depth: int = DEPTH) -> FlowModel:
    data = DataSpec("vector", (dims,), None)
    if kind == "maf":
        return MAF(MAF.Config(depth=depth, features=features, hidden=2, batch_norm=False), data)
    config = RealNVP.Config(depth=depth, features=features, blocks=2, batch_norm="none", scale_penalty=0)
    return RealNVP(config, data)


def zuko(kind: str, dims: int, features: int, depth: int = DEPTH) -> nn.Module:
    flows = importlib.import_module("zuko.flows")
    build = flows.MAF if kind == "maf" else flows.RealNVP
    flow = build(dims, transforms=depth, hidden_features=(features, features))

    class Flow(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.flow = flow

        def log_prob(self, x: Tensor) -> Tensor:
            return self.flow().log_prob(x)

        def sample(self, n: int) -> Tensor:
            return self.flow().sample((n,))

    return Flow()


def nflows(kind: str, dims: int, features: int, depth: int = DEPTH) -> nn.Module:
    transforms = importlib.import_module("nflows.transforms")
    nets = importlib.import_module("nflows.nn.nets")
    normal = importlib.import_module("nflows.distributions.normal").StandardNormal([dims])

    class Unconditional(nets.MLP):
        def forward(self, x: Tensor, context: None = None) -> Tensor:
            return super().forward(x)

    def perceptron(inputs: int, outputs: int) -> nn.Module:
        return Unconditional((inputs,), (outputs,), [features, features])

    parts: list[nn.Module] = []
    for i in range(depth):
        if kind == "maf":
            parts += [transforms.ReversePermutation(dims)] if i else []
            parts.append(
                transforms.MaskedAffineAutoregressiveTransform(
                    dims, features, num_blocks=1, use_residual_blocks=False, random_mask=False
                )
            )
        else:
            mask = torch.ones(dims)
            mask[i % 2 :: 2] = -1

            parts.append(transforms.AffineCouplingTransform(mask, perceptron))
    return importlib.import_module("nflows.flows.base").Flow(transforms.CompositeTransform(parts), normal)


def normflows(kind: str, dims: int, features: int, depth: int = DEPTH) -> nn.Module:
    library = importlib.import_module("normflows")
    parts: list[nn.Module] = []
    for _ in range(depth):
        if kind == "maf":
            # Its one pass is from noise to data; reversed it is a MAF.
            parts.append(
                library.flows.Reverse(
                    library.flows.MaskedAffineAutoregressive(
                        dims, features, num_blocks=1, use_residual_blocks=False, random_mask=False
                    )
                )
            )
        else:
            net = library.nets.MLP([dims - dims // 2, features, features, 2 * (dims // 2)])
            parts += [library.flows.AffineCouplingBlock(net), library.flows.Permute(dims, mode="swap")]
    flow = library.NormalizingFlow(library.distributions.DiagGaussian(dims, trainable=False), parts)
    draw = flow.sample
    flow.sample = lambda n: draw(n)[0]
    return flow


BUILDERS: Mapping[str, Callable[..., nn.Module]] = {"zuko": zuko, "nflows": nflows, "normflows": normflows}


def training_step(model: Any, x: Tensor) -> Callable[[], None]:
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-4, fused=True)

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        if isinstance(model, FlowModel):
            model.loss(Batch(x), "model", Clock(0, 1)).value.backward()
        else:
            (-model.log_prob(x).mean()).backward()
        optimizer.step()

    return step


def log_prob(model: Any, x: Tensor) -> Callable[[], None]:
    @torch.no_grad()
    def run() -> None:
        model.log_prob(x)

    return run


def several(run: Callable[[], None], times: int) -> Callable[[], None]:
    def runs() -> None:
        for _ in range(times):
            run()

    return runs


def speed(kind: str, what: str, size: str, act: Callable[[Any, Tensor], Callable[[], None]], times: int) -> list[Row]:
    dims, features, batch = SIZES[size]
    x = torch.randn(batch, dims)
    ratios, seconds = {}, []
    mine = several(act(ours(kind, dims, features).train(), x), times)
    for name, build in BUILDERS.items():
        pairs = interleave(mine, several(act(build(kind, dims, features).train(), x), times), pairs=9, warmup=2)
        ratios[name] = pairs.ratio
        seconds += pairs.ours
    fastest = min(ratios, key=ratios.__getitem__)
    told = ", ".join(f"{name} {ratio:.2f}" for name, ratio in ratios.items())
    return [
        Row(f"{kind}, {what} ({size}): against the fastest peer, {fastest} [{told}]", ratios[fastest], AT_LEAST),
        Row(f"{kind}, {what} ({size}): ours", 1e3 * statistics.median(seconds) / times, None, unit="ms"),
    ]


def drawing() -> list[Row]:
    dims, features, batch = 784, 1024, 16
    size = f"D = {dims}, one layer of {features:,} units, batch {batch}"
    mine = ours("maf", dims, features, depth=1).eval()
    ratios, seconds = {}, []
    for name in ("zuko", "nflows"):
        theirs = BUILDERS[name]("maf", dims, features, depth=1).eval()
        with torch.no_grad():
            pairs = interleave(lambda: mine.sample(batch), lambda m=theirs: m.sample(batch), pairs=7)  # type: ignore[misc]
        ratios[name] = pairs.ratio
        seconds += pairs.ours
    return [
        *(Row(f"maf, drawing ({size}): against {name}", ratio, SAMPLING) for name, ratio in ratios.items()),
        Row(f"maf, drawing ({size}): ours", 1e3 * statistics.median(seconds), None, unit="ms"),
    ]


def main() -> int:
    missing = [name for name in PEERS if importlib.util.find_spec(name) is None]
    if missing:
        wanted = " ".join(f"{name}=={version}" for name, version in PEERS.items())
        raise SystemExit(f"the peers are missing: {', '.join(missing)}. Install them beside this project: {wanted}")
    torch.manual_seed(0)
    rows: list[Row] = []
    for kind in ("maf", "real_nvp"):
        for size, (dims, _, _) in SIZES.items():
            times = 4 if dims > 100 else 8
            rows += speed(kind, "training step", size, training_step, times)
            rows += speed(kind, "log_prob", size, log_prob, 3 * times)
    return report("flows", rows + drawing())


if __name__ == "__main__":
    sys.exit(main())
