"""A training epoch of `vae` beside pythae's VAE of equal size: `python -m benchmarks.latent`.

Binary images of 28 × 28, batches of 100, Adam, float32, from the data as each library keeps it to the last step: ours
by the Trainer from Arrow shards of 8 bits, pythae's by its BaseTrainer from a tensor of floats in memory, spared its
progress bars, its copy of the best model and its writing. `mlp` is pythae's default network (512 units, 16 latents),
`conv` our convolutions handed to pythae. That both losses are the same function is checked first, in double precision,
as is what comes of resuming: the weights of a run that was interrupted half-way are those of one that was not. pythae
0.1.2 writes its optimiser's state and has nothing that reads it.

The peer is no dependency of this project: install `pythae==0.1.2` beside it, with what it imports. Without it ours
alone is measured. `--tiny` shows within a minute that all runs, and stores nothing.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import itertools
import logging
import math
import statistics
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.harness import RESULTS, Row, interleave, report
from dgm_core.config import Optimizer, Recipe
from dgm_core.contract import Batch, Clock, DataSpec
from dgm_core.data.shards import Dataset, write_dataset
from dgm_core.models.latent.vae import VAE
from dgm_core.training.trainer import Schedule, Trainer
from pipelines.training_job import Training

PEER = "pythae"
BATCH, LATENTS, EXAMPLES = 100, 16, {"mlp": 50_000, "conv": 10_000}
SPEC = DataSpec("image", (1, 28, 28), 2)
CONFIGS: dict[str, dict[str, Any]] = {
    "mlp": {"network": "mlp", "depth": 1, "features": 512},
    "conv": {"network": "conv", "channels": (32, 64)},
}


def build(network: str) -> VAE:
    torch.manual_seed(0)
    return VAE(VAE.Config(latents=LATENTS, observation="bernoulli", **CONFIGS[network]), SPEC)


def recipe(steps: int, precision: str = "fp32") -> Recipe:
    adam = {"model": Optimizer(lr=1e-3)}
    return Recipe.model_validate({"batch_size": BATCH, "steps": steps, "optimizers": adam, "precision": precision})


def binary(examples: int) -> Tensor:
    """Strokes and noise: what is in the pixels costs nothing, but a loss should have something to learn."""
    g = torch.Generator().manual_seed(0)
    shape = torch.rand(10, 1, 28, 28, generator=g) < 0.3
    flipped = torch.rand(examples, 1, 28, 28, generator=g) < 0.1
    return (shape[torch.randint(10, (examples,), generator=g)] ^ flipped).to(torch.uint8)


def stored(folder: Path, x: Tensor) -> Dataset:
    return write_dataset(folder, SPEC, {"train": [Batch(x)], "val": [Batch(x[:1])], "test": [Batch(x[:1])]}, {})


def epochs(network: str, data: Dataset, steps: int) -> Callable[[], None]:
    """Each call an epoch, on the weights that the last one left."""
    model, settings = build(network), recipe(steps)

    def epoch() -> None:
        Trainer(model, settings, Training(data, settings, 0), schedule=Schedule(checkpoint_seconds=None)).fit()

    return epoch


def peer_model(network: str) -> nn.Module:
    """pythae's default network, or ours in its clothes."""
    models = importlib.import_module("pythae.models")
    config = models.VAEConfig(input_dim=SPEC.shape, latent_dim=LATENTS, reconstruction_loss="bce")
    if network == "mlp":
        return models.VAE(config)
    parts = importlib.import_module("pythae.models.nn")
    output = importlib.import_module("pythae.models.base.base_utils").ModelOutput
    ours = build(network)

    class Encoder(parts.BaseEncoder):
        def __init__(self) -> None:
            super().__init__()
            self.net = ours.encoder

        def forward(self, x: Tensor) -> Any:
            mean, log_variance = self.net(2 * x - 1).chunk(2, 1)  # ours are told [−1, 1]
            return output(embedding=mean, log_covariance=log_variance)

    class Decoder(parts.BaseDecoder):
        def __init__(self) -> None:
            super().__init__()
            self.net = ours.decoder

        def forward(self, z: Tensor) -> Any:
            return output(reconstruction=torch.sigmoid(self.net(z)))

    return models.VAE(config, encoder=Encoder(), decoder=Decoder())


def peer_epochs(network: str, x: Tensor, folder: Path) -> Callable[[], None]:
    trainers = importlib.import_module("pythae.trainers")
    datasets = importlib.import_module("pythae.data.datasets")
    callbacks = importlib.import_module("pythae.trainers.training_callbacks")
    settings = trainers.BaseTrainerConfig(
        output_dir=str(folder), per_device_train_batch_size=BATCH, learning_rate=1e-3, num_epochs=1, no_cuda=True
    )
    data = datasets.BaseDataset(x.float(), torch.zeros(len(x)))
    trainer = trainers.BaseTrainer(peer_model(network), data, training_config=settings)
    trainer.prepare_training()
    trainer.callback_handler = callbacks.CallbackHandler([callbacks.TrainingCallback()], trainer.model)
    return lambda: trainer.train_step(1)


def disagreement(network: str, x: Tensor) -> float:
    """Of both losses with the same weights and the same noise, in double precision, over the greater."""
    ours, peer = build(network).double(), peer_model(network).double()
    if network == "mlp":
        encoder, decoder = (list(m.parameters()) for m in (ours.encoder, ours.decoder))
        theirs = dict(peer.named_parameters())
        rows = encoder[2].shape[0] // 2
        given = {
            # Its encoder is told 0 and 1 where ours is told −1 and 1.
            "encoder.layers.0.0": [2 * encoder[0], encoder[1] - encoder[0].sum(1)],
            "encoder.embedding": [p[:rows] for p in encoder[2:]],
            "encoder.log_var": [p[rows:] for p in encoder[2:]],
            "decoder.layers.0.0": decoder[:2],
            "decoder.layers.1.0": decoder[2:],
        }
        with torch.no_grad():
            for name, (weight, bias) in given.items():
                theirs[f"{name}.weight"].copy_(weight)
                theirs[f"{name}.bias"].copy_(bias)
    sizes = [sum(p.numel() for p in m.parameters()) for m in (ours, peer)]
    if sizes[0] != sizes[1]:
        raise SystemExit(f"{network}: the models differ in size: ours {sizes[0]:,} parameters, the peer's {sizes[1]:,}")
    torch.manual_seed(1)
    mine = ours.loss(Batch(x), "model", Clock(0, 1)).value.item()
    torch.manual_seed(1)
    other = peer({"data": x.double()}).loss.item()
    return abs(mine - other) / max(abs(mine), abs(other))


def resumed(folder: Path, data: Dataset, steps: int) -> float:
    """Greatest difference of the weights of a run that was interrupted half-way from those of one that was not."""

    def run(name: str, ends: Sequence[float]) -> dict[str, Tensor]:
        settings, model = recipe(steps), build("mlp")
        for end in ends:
            model = build("mlp")  # a fresh one: what the last one learnt comes from the checkpoint
            stop = partial(reached, itertools.count(1), end)
            outcome = Trainer(model, settings, Training(data, settings, 0), folder=folder / name, stop=stop).fit()
            assert outcome.step == min(end, steps), outcome
        return model.state_dict()

    whole, halves = run("whole", [math.inf]), run("halves", [steps // 2, math.inf])
    return max((whole[name] - halves[name]).abs().max().item() for name in whole)


def reached(calls: Iterator[int], end: float) -> bool:
    """Asked after every round, whether it was that one."""
    return next(calls) >= end


def measure(network: str, x: Tensor, folder: Path, pairs: int, peer: bool) -> list[Row]:
    data = stored(folder / network, x)
    steps = len(x) // BATCH
    mine = epochs(network, data, steps)
    size = f"{network}, {len(x):,} images, batch {BATCH}, float32"
    if not peer:
        return [
            Row(f"seconds an epoch ({size})", statistics.median(interleave(mine, mine, pairs).ours), None, unit="s")
        ]
    difference = disagreement(network, x[:200])
    timed = interleave(mine, peer_epochs(network, x, folder / "pythae"), pairs=pairs)
    return [
        Row(f"training epoch: rate over pythae's ({size})", timed.ratio, 1.0),
        Row(f"training epoch, ours ({network})", statistics.median(timed.ours), None, unit="s"),
        Row(f"relative difference of both losses ({network}, float64)", difference, 1e-9, False, unit=""),
    ]


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true", help="few examples, one pair; stores nothing")
    given = parser.parse_args(argv)
    logging.disable(logging.INFO)  # its loggers set their own levels
    peer = importlib.util.find_spec(PEER) is not None
    if not peer:
        print("pythae is not installed: ours alone is measured")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        rows = []
        for network, examples in EXAMPLES.items():
            x = binary(1000 if given.tiny else examples)
            rows += measure(network, x, folder, 1 if given.tiny else 7, peer)
        difference = resumed(folder, stored(folder / "resume", binary(1000)), 20)
        rows.append(
            Row("ours, interrupted and resumed: greatest difference of a weight", difference, 0, False, unit="")
        )
        return report("latent", rows, folder if given.tiny else RESULTS)


if __name__ == "__main__":
    sys.exit(main())
