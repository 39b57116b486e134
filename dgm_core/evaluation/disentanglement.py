"""Whether single latents stand for single factors of variation, on data whose factors are known.

    mutual information gap: R. T. Q. Chen et al., 2018. Isolating Sources of Disentanglement in VAEs. arXiv:1802.04942
    β-VAE metric: I. Higgins et al., 2017. openreview.net/forum?id=Sy2fzU9gl, section 3

Both are 1 at best; the gap of latents that say nothing is 0, the metric's floor is a guess among the factors. They
are measured on every combination of the factors, whatever split is scored.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dgm_core.capabilities import HasPosterior
from dgm_core.contract import Batch, GenerativeModel
from dgm_core.data.sprites import Sprites
from dgm_core.data.transforms import apply_all
from dgm_core.distributions.gaussian import log_normal
from dgm_core.evaluation.examples import chunks
from dgm_core.evaluation.record import Metric

if TYPE_CHECKING:
    from jaxtyping import Float, Int

    from dgm_core.evaluation.work import Work

AT_ONCE = 100_000  # pairs
MIXTURE = 5000  # examples whose posteriors are mixed, at most: the time grows with their square
TEST = 1000  # points of the β-VAE metric that are scored
RIDGE = 1e-6  # keeps the weights of classes that a line can separate finite


def step(work: Work) -> None:
    """Of a model with a Gaussian posterior, on pictures drawn from known factors."""
    model = work.model
    if not isinstance(model, HasPosterior) or "factors" not in work.info:
        return
    x, factors, counts = every_combination(work.info)
    examples = Batch(x, factors[:, 0] if work.spec.classes else None)
    try:
        mean, sd = _posterior(model, examples, work.options.batch_size)
    except NotImplementedError:
        work.warn("Disentanglement is not measured: the posterior has no mean and standard deviation in closed form.")
        return
    rows = torch.randperm(len(x))[:MIXTURE]
    moving = [count for count in counts if count > 1]
    about = {"latents": mean.shape[1], "factors": dict(work.info["factors"])}
    found = mutual_information_gap(mean[rows], sd[rows], factors[rows])
    work.add({"mutual_information_gap": Metric.of(found.gap, n=len(rows), of="every combination of factors", **about)})
    work.result.details["information_of_factors"] = found.information.tolist()
    if len(moving) > 1:
        share = beta_vae_metric(mean, counts, test=TEST)
        error = math.sqrt(share * (1 - share) / TEST)
        work.add({"beta_vae_metric": Metric.of(share, 1 / len(moving), error, n=TEST, **about)})


def every_combination(
    info: Mapping[str, Any],
) -> tuple[Float[Tensor, " N *shape"], Int[Tensor, " N K"], tuple[int, ...]]:
    """Pictures as this data set stores them, the numbers of their factors' values, and of how many each is one."""
    drawn = Sprites(*(info["config"][name] for name in ("size", "scales", "rotations", "positions")))
    index = np.arange(len(drawn))
    factors = drawn.factors(index)
    x = apply_all(drawn.draw(factors), info["transforms"], index, (info["seed"], 0))
    return torch.from_numpy(x), torch.from_numpy(factors), drawn.counts


def _posterior(model: GenerativeModel, examples: Batch, batch_size: int) -> tuple[Tensor, Tensor]:
    """Means and standard deviations, on the CPU."""
    assert isinstance(model, HasPosterior)
    found = [model.posterior(b.x, b.y, b.context) for b in chunks(examples, batch_size, model.device)]
    return torch.cat([q.mean.cpu() for q in found]), torch.cat([q.stddev.cpu() for q in found])


class Gap(NamedTuple):
    """The mutual information gap and what it was made of."""

    gap: float
    information: Float[Tensor, " K D"]  # I(z_j; v_k), nats
    entropy: Float[Tensor, " K"]  # H(v_k), nats: the most that a latent can hold of a factor


def mutual_information_gap(
    mean: Float[Tensor, " N D"], sd: Float[Tensor, " N D"], factors: Int[Tensor, " N K"], *, chunk: int = 64
) -> Gap:
    """Mean over factors of how much more its best latent knows of it than the next, as a share of H(v_k) (eq. 6).

    q(z_j | v_k) and q(z_j) are the mixtures of the examples' Gaussian posteriors: give every combination of factors, or
    so many examples that the mixtures are smooth. I(z_j; v_k) = E log q(z_j | v_k) − E log q(z_j), one draw an example.
    """
    mean, sd = mean.double(), sd.double()
    N, D = mean.shape
    z = mean + sd * torch.randn_like(mean)
    log_variance = 2 * sd.log()
    values = [F.one_hot(column, int(column.max()) + 1).double() for column in factors.long().unbind(1)]
    information = mean.new_zeros(len(values), D)
    for start in range(0, N, chunk):
        rows = slice(start, min(start + chunk, N))
        table = log_normal(z[rows, None], mean, log_variance)  # [n, m, j] = log q(z_nj | x_m)
        top = table.amax(1, keepdim=True)
        table = (table - top).exp()
        marginal = table.mean(1).log()
        for k, value in enumerate(values):
            # The row's own example is among those that share its value, so that no sum is zero.
            conditional = (
                torch.einsum("nmj,nm->nj", table, value[rows] @ value.T) / (value[rows] @ value.sum(0))[:, None]
            )
            information[k] += (conditional.log() - marginal).sum(0) / N
    shares = [value.mean(0) for value in values]
    entropy = torch.stack([-(p[p > 0] * p[p > 0].log()).sum() for p in shares])
    best = information.topk(2, dim=1).values if D > 1 else F.pad(information, (0, 1))
    return Gap(((best[:, 0] - best[:, 1]) / entropy).mean().item(), information, entropy)


def beta_vae_metric(
    mean: Float[Tensor, " N D"], counts: Sequence[int], *, train: int = 2000, test: int = 1000, pairs: int = 200
) -> float:
    """Share of test points whose fixed factor a linear classifier names (Higgins et al., algorithm in section 3).

    A point is E |z − z'| over pairs of examples that share one factor and differ in the others at random; z is the
    posterior's mean. Latents that stand for the shared factor alone do not differ.

    Args:
        mean: the posterior's, of every combination of the factors' values, the last factor changing fastest.
        counts: of values that each factor takes. Factors of one value are none.
        train: points that the classifier learns from.
        pairs: L, that a point is averaged over.
    """
    moving = [k for k, count in enumerate(counts) if count > 1]
    if len(moving) < 2:
        raise ValueError(f"the metric tells factors apart; of counts {tuple(counts)} fewer than two take two values")
    if len(mean) != math.prod(counts):
        raise ValueError(f"{len(mean)} means are given; counts {tuple(counts)} have {math.prod(counts)} combinations")
    points, fixed = _points(mean.double().cpu(), counts, moving, train + test, pairs)
    scale = points[:train].abs().mean().clamp_min(1e-30)  # one for all latents: those that hardly move stay so
    classifier = nn.Linear(points.shape[1], len(moving), dtype=torch.float64)
    nn.init.zeros_(classifier.weight)
    nn.init.zeros_(classifier.bias)
    x, y = points[:train] / scale, fixed[:train]
    optimizer = torch.optim.LBFGS(classifier.parameters(), max_iter=200, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(classifier(x), y) + RIDGE * classifier.weight.square().sum()
        loss.backward()
        return loss

    with torch.enable_grad():
        optimizer.step(closure)
    with torch.no_grad():
        named = classifier(points[train:] / scale).argmax(1)
    return (named == fixed[train:]).double().mean().item()


@torch.no_grad()
def _points(
    mean: Float[Tensor, " N D"], counts: Sequence[int], moving: Sequence[int], n: int, pairs: int
) -> tuple[Float[Tensor, " n D"], Int[Tensor, " n"]]:
    """Mean absolute differences, and which of the moving factors was fixed."""
    table = mean.reshape(*counts, -1)
    fixed = torch.randint(len(moving), (n,))
    points = []
    for part in fixed.split(max(1, AT_ONCE // pairs)):
        size = (len(part), pairs)
        first, second = (torch.stack([torch.randint(c, size) for c in counts]) for _ in range(2))
        shared = F.one_hot(torch.tensor(moving)[part], len(counts)).bool().T[:, :, None]
        second = torch.where(shared, first, second)
        points.append((table[tuple(first)] - table[tuple(second)]).abs().mean(1))
    return torch.cat(points), fixed
