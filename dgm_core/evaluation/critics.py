"""What a game's opponent knows: how well it tells data from samples, and training from held-out examples.

    critic/accuracy_train, critic/accuracy_held_out    share of real examples that it takes for data
    critic/accuracy_samples                            share of samples that it takes for samples
    critic/data_from_samples                           how often it scores a held-out example above a sample
    critic/train_from_held_out                         how often it scores a training example above a held-out one

The last two need no threshold, so that critics without one have them too; a half says that it cannot tell.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from dgm_core.capabilities import HasCritic
from dgm_core.contract import Batch, GenerativeModel
from dgm_core.evaluation.examples import chunks, take
from dgm_core.evaluation.record import Metric

if TYPE_CHECKING:
    from jaxtyping import Float

    from dgm_core.evaluation.work import Work

EXAMPLES = 1000  # of each kind, at most
OVERFITTED = 0.6  # of pairs, where by chance it is a half
SURE = 4.0  # standard errors
WON = 0.99


def step(work: Work) -> None:
    model = work.model
    if not isinstance(model, HasCritic):
        return
    n = min(EXAMPLES, len(work.train.x), len(work.test.x))
    size = work.options.batch_size
    train, held_out = (data_scores(model, take(iter([split]), n), size) for split in (work.train, work.test))
    samples = torch.cat([model.sample_scores(min(size, n - start)).double().cpu() for start in range(0, n, size)])
    won, spread = above(held_out, samples)
    known, error = above(train, held_out)
    work.add({"critic/data_from_samples": Metric.of(won, 0.5, spread, n=n)})
    work.add({"critic/train_from_held_out": Metric.of(known, 0.5, error, n=n)})
    if model.threshold is not None:
        right = {"train": train > model.threshold, "held_out": held_out > model.threshold}
        right["samples"] = samples <= model.threshold
        shares = {name: yes.double().mean().item() for name, yes in right.items()}
        work.add({f"critic/accuracy_{name}": Metric.of(share, n=n) for name, share in shares.items()})
    if known > OVERFITTED and known - 0.5 > SURE * error:
        work.warn(
            f"The opponent tells training from held-out examples: of one of each it prefers the training example in "
            f"{known:.0%} of cases. It over-fits: give it more data or augmentation, fewer features, or a penalty."
        )
    if won > WON and model.threshold is not None:
        work.warn(
            f"The discriminator wins outright: it scores held-out examples above samples in {won:.1%} of cases, which "
            "leaves the generator little to learn from. Slow it down, regularise it, or give it noise."
        )


def data_scores(model: GenerativeModel, examples: Batch, batch_size: int) -> Float[Tensor, " B"]:
    """In mixed order: an opponent may look at a whole batch, and in training none is of one class."""
    assert isinstance(model, HasCritic)
    mixed = examples.rows(torch.randperm(len(examples.x)))
    return torch.cat([model.data_scores(b.x, b.y).double().cpu() for b in chunks(mixed, batch_size, model.device)])


def above(a: Float[Tensor, " n"], b: Float[Tensor, " m"]) -> tuple[float, float]:
    """Share of pairs in which a's is the greater (ties count half), and its standard error: Mann and Whitney's U."""
    wins = (a[:, None] > b).double() + 0.5 * (a[:, None] == b).double()
    variance = wins.mean(1).var() / len(a) + wins.mean(0).var() / len(b)
    return wins.mean().item(), math.sqrt(variance.item())
