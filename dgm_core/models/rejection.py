"""Generating Diverse High-Fidelity Images with VQ-VAE-2. A. Razavi et al., 2019. arXiv:1906.00446, "Trading off
Diversity with Classifier Based Rejection Sampling": of the samples of a class, keep those that look most like it.

A model of high likelihood covers all of the data, its rare and odd examples too. A classifier scores every sample by
the probability p(y | x) of the class y that was asked for; of each class the share `keep` with the highest scores
stays. It is for any model that goes by labels; the paper's is a `TwoStage`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from dgm_core.contract import DataMismatch, GenerativeModel

if TYPE_CHECKING:
    from jaxtyping import Float, Int

    Draw = Callable[[Int[Tensor, " m"]], Tensor]
    Classifier = Callable[[Tensor], Float[Tensor, " m classes"]]


class Trusted(NamedTuple):
    """What was kept: (n, *shape), the class of each, the classifier's log p(class | sample), and of how many."""

    x: Tensor
    y: Tensor
    log_prob: Tensor
    drawn: int


@torch.no_grad()
def sample_trusted(
    model: GenerativeModel,
    n: int,
    y: Int[Tensor, " n"] | None = None,
    *,
    classifier: Classifier,
    keep: float,
    draw: Draw | None = None,
    **options: Any,
) -> Trusted:
    """`n` samples: of each class, the share `keep` of those drawn that the classifier trusts most.

    Args:
        y: a label a sample; drawn from the training marginals if not given.
        classifier: samples as stored -> logits of the classes.
        keep: in (0, 1]; a class asked for k times is drawn k / keep times, rounded up.
        draw: how labels become samples (a batch at a time, say); `model.sample` with the options, if not given.

    Raises:
        DataMismatch: the data has no classes, or the classifier has others.
    """
    if not 0 < keep <= 1:
        raise ValueError(f"keep {keep} is not accepted: a share above 0, up to 1, which keeps all")
    if model.data.classes < 2:
        raise DataMismatch(
            "samples are kept by the probability of the class asked for, and this model's data has no classes"
        )
    y = model.labels_for(n, y).cpu()
    asked = candidates(y, keep)
    x = draw(asked) if draw is not None else model.sample(len(asked), asked.to(model.device), **options)
    logits = classifier(x).cpu()
    if logits.shape != (len(asked), model.data.classes):
        raise DataMismatch(
            f"the classifier's logits have shape {tuple(logits.shape)}; {len(asked)} samples of {model.data.classes} "
            f"classes need {(len(asked), model.data.classes)}"
        )
    log_prob = logits.log_softmax(1).gather(1, asked[:, None])[:, 0]
    rows = most_trusted(asked, log_prob, y)
    return Trusted(x[rows.to(x.device)], y, log_prob[rows], len(asked))


def candidates(y: Int[Tensor, " n"], keep: float) -> Int[Tensor, " m"]:
    """The labels to draw so that the share `keep` of each class's, rounded down, is at least those of `y`."""
    classes, counts = y.unique(return_counts=True)
    # A quotient that is whole but for rounding must not be rounded up.
    return classes.repeat_interleave(torch.tensor([math.ceil(k / keep - 1e-9) for k in counts.tolist()]))


def most_trusted(asked: Int[Tensor, " m"], log_prob: Float[Tensor, " m"], y: Int[Tensor, " n"]) -> Int[Tensor, " n"]:
    """Which of those drawn to keep: at each place of `y` one of its class, a class's in the order they were drawn."""
    scores = log_prob.nan_to_num(nan=-torch.inf)  # a sample that is no number is trusted least
    rows = torch.empty_like(y)
    for label in y.unique():
        places, drawn = (y == label).nonzero()[:, 0], (asked == label).nonzero()[:, 0]
        rows[places] = drawn[scores[drawn].topk(len(places)).indices].sort().values
    return rows
