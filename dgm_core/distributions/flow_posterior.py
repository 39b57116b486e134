"""Posteriors q(z | x) that start as a diagonal Gaussian and may go on through invertible maps that x steers.

    z₀ ~ N(μ, diag σ²),  z = f(z₀; c),  log q(z) = log N(z₀; μ, diag σ²) − log |det ∂f/∂z₀|

A draw knows its density; the density elsewhere takes the inverse of f. The KL to N(0, I) is that of the Gaussian, in
closed form, and what the maps add to it, by the draws given: nothing where they do nothing, so that little of what the
draws scatter by reaches the gradients of maps near the identity.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor
from torch.distributions import Distribution, Independent, Normal, constraints

from dgm_core.distributions.gaussian import LOG_TAU, kl_to_standard_normal, log_normal

if TYPE_CHECKING:
    from jaxtyping import Float

# (N, D), (N, C) -> (N, D) and log |det|: of `maps` a coordinate's share of it (N, D), of `inverse` the whole (N,).
Map = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]

PAIRS = 32  # of draws that stand for the mean
ELEMENTS = 2**22  # of the steering that are repeated at once where the density is looked up


class Draws(NamedTuple):
    """Of each example's posterior, with all that is needed to weigh them."""

    start: Float[Tensor, " B count D"]  # z₀
    z: Float[Tensor, " B count D"]
    log_det: Float[Tensor, " B count D"]  # log |det ∂z/∂z₀|, a coordinate's share of it


class FlowPosterior(Distribution):
    """One distribution an example: batch (B,), event (D,).

    Args:
        context: c, what steers the maps, (B, C).
        maps: f; None is the Gaussian itself.
        inverse: f⁻¹.
    """

    has_rsample = True

    def __init__(
        self,
        mean: Float[Tensor, " B D"],
        log_variance: Float[Tensor, " B D"],
        context: Float[Tensor, " B C"] | None = None,
        maps: Map | None = None,
        inverse: Map | None = None,
    ) -> None:
        super().__init__(mean.shape[:1], mean.shape[1:], validate_args=False)
        self.start_mean, self.log_variance, self.context = mean, log_variance, context
        self.maps, self.inverse = maps, inverse

    @property
    def arg_constraints(self) -> dict[str, constraints.Constraint]:
        return {}

    @property
    def support(self) -> constraints.Constraint:
        return constraints.real_vector

    def gaussian(self) -> Distribution | None:
        """The same distribution with everything in closed form, where there are no maps."""
        if self.maps is not None:
            return None
        return Independent(Normal(self.start_mean, (0.5 * self.log_variance).exp()), 1)

    def draw(self, count: int) -> Draws:
        B, D = self.start_mean.shape
        mean = self.start_mean
        return self._carry(torch.randn(B, count, D, device=mean.device, dtype=mean.dtype))

    def log_prob_of(self, draws: Draws) -> Float[Tensor, " B count"]:
        """log q(z | x) of its own draws, without an inverse."""
        return (log_normal(draws.start, self.start_mean[:, None], self.log_variance[:, None]) - draws.log_det).sum(2)

    def kl(self, draws: Draws) -> Float[Tensor, " B D"]:
        """KL(q ‖ N(0, I)) a coordinate, estimated without bias: the sum over coordinates is the divergence."""
        closed = kl_to_standard_normal(self.start_mean, self.log_variance)
        if self.maps is None:
            return closed
        return closed + (0.5 * (draws.z.square() - draws.start.square()) - draws.log_det).mean(1)

    def log_prior(self, draws: Draws) -> Float[Tensor, " B"]:
        """E_q log N(z; 0, I), in closed form for z₀ and by the draws for what the maps change."""
        closed = -0.5 * (LOG_TAU + self.start_mean.square() + self.log_variance.exp())
        return (closed + 0.5 * (draws.start.square() - draws.z.square()).mean(1)).sum(1)

    def rsample(self, sample_shape: Sequence[int] = ()) -> Tensor:
        z = self.draw(math.prod(sample_shape)).z
        return z.movedim(1, 0).reshape(*sample_shape, *self.batch_shape, *self.event_shape)

    def log_prob(self, value: Float[Tensor, " *shape B D"]) -> Float[Tensor, " *shape B"]:
        """By change of variables, anywhere: `value` and the batch broadcast against each other."""
        shape = torch.broadcast_shapes(value.shape[:-1], self.batch_shape)
        points = value.expand(*shape, *self.event_shape).reshape(-1, *self.batch_shape, *self.event_shape)
        wide = 1 if self.context is None else self.context.shape[1]
        parts = points.split(max(1, ELEMENTS // (self.batch_shape[0] * wide)))
        return torch.cat([self._look_up(part) for part in parts]).reshape(shape)

    @property
    def mean(self) -> Float[Tensor, " B D"]:
        """E_q z: of the Gaussian exactly, else of pairs of draws z(ε), z(−ε), whose odd parts cancel."""
        if self.maps is None:
            return self.start_mean
        B, D = self.start_mean.shape
        noise = torch.randn(B, PAIRS, D, device=self.start_mean.device, dtype=self.start_mean.dtype)
        return self._carry(torch.cat([noise, -noise], 1)).z.mean(1)

    def _carry(self, noise: Float[Tensor, " B count D"]) -> Draws:
        start = self.start_mean[:, None] + (0.5 * self.log_variance).exp()[:, None] * noise
        if self.maps is None:
            return Draws(start, start, torch.zeros_like(start))
        assert self.context is not None
        B, count = start.shape[:2]
        steering = self.context if count == 1 else self.context.repeat_interleave(count, 0)
        z, log_det = self.maps(start.flatten(0, 1), steering)
        return Draws(start, z.unflatten(0, (B, count)), log_det.unflatten(0, (B, count)))

    def _look_up(self, points: Float[Tensor, " n B D"]) -> Float[Tensor, " n B"]:
        if self.maps is None:
            return log_normal(points, self.start_mean, self.log_variance).sum(2)
        assert self.context is not None
        assert self.inverse is not None
        n, B = points.shape[:2]
        start, log_det = self.inverse(points.flatten(0, 1), self.context.repeat(n, 1))
        density = log_normal(start.unflatten(0, (n, B)), self.start_mean, self.log_variance).sum(2)
        return density + log_det.unflatten(0, (n, B))
