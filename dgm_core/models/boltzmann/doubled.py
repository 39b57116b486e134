"""The RBMs that pre-train a deep Boltzmann machine. R. Salakhutdinov, G. Hinton, 2009, section 3.1.

In the whole machine a unit between two layers gets input from both; an RBM of the stack knows one of them, and makes up
for the other. With `below` copies of the lower units, `above` of the upper ones, all with the same weights, and weights
`weight` times those of the machine, the energy is a sum over pairs of copies, so that only the sums of the copies
matter: with s of the lower units and t of the upper ones

    E(s, t) = −s·b − t·c − weight · sᵀ W t.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.nn.functional as F

from dgm_core.nn.rbm import BernoulliLayer, draw_bernoulli
from dgm_core.precision import promote

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor


class DoubledRBM(NamedTuple):
    """One layer of the stack, of which it holds no parameters of its own."""

    layer: BernoulliLayer
    below: int
    above: int
    weight: float

    @classmethod
    def of(cls, layer: BernoulliLayer, level: int, layers: int) -> DoubledRBM:
        """The lowest has its visible units twice, the highest its hidden units, the others their weights."""
        if level == 0:
            return cls(layer, 2, 1, 1.0)
        return cls(layer, 1, 2, 1.0) if level == layers - 1 else cls(layer, 1, 1, 2.0)

    def upward(self, s: Float[Tensor, " B n"]) -> Float[Tensor, " B m"]:
        """Input of an upper unit, whose copies all get the same."""
        return torch.addmm(self.layer.hidden_bias, s, self.layer.weight, alpha=self.weight)

    def downward(self, t: Float[Tensor, " B m"]) -> Float[Tensor, " B n"]:
        """Input of a lower unit."""
        return torch.addmm(self.layer.visible_bias, t, self.layer.weight.T, alpha=self.weight)

    def recognise(self, h: Float[Tensor, " B n"]) -> Float[Tensor, " B m"]:
        """Input of an upper unit where every copy of the lower ones is `h`."""
        return self.upward(self.below * h)

    def free_energy(self, s: Float[Tensor, " B n"]) -> Float[Tensor, " B"]:
        """−log Σ_t exp(−E(s, t)) over all copies' states."""
        return -promote(s @ self.layer.visible_bias) - self.above * F.softplus(promote(self.upward(s))).sum(1)

    @torch.no_grad()
    def gibbs(self, s: Float[Tensor, " B n"]) -> Float[Tensor, " B n"]:
        """One step, every copy a draw of its own."""
        z = self.upward(s)
        d = self.downward(torch.stack([draw_bernoulli(z) for _ in range(self.above)]).sum(0))
        return torch.stack([draw_bernoulli(d) for _ in range(self.below)]).sum(0)
