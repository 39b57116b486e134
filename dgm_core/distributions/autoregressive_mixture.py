"""A base whose every conditional is a mixture of Gaussians: MADE MoG, and on top of a flow MAF MoG.

G. Papamakarios et al., 2017. arXiv:1705.07057, section 3 ("MAF MoG") and 4.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from dgm_core.capabilities import CausalNet
from dgm_core.distributions.latent_base import Base
from dgm_core.precision import promote

if TYPE_CHECKING:
    from jaxtyping import Float


class AutoregressiveMixture(Base):
    """log p(z) = Σ_t log Σ_c π_tc N(z_t; μ_tc, exp(2 α_tc)), where the network says all three of z_1 … z_{t−1}.

    Means are offsets from an even grid on [−2, 2], so that components differ from the start, where the network says
    zero; α is softly bounded, α = b tanh(α̂ / b). A draw carries no gradient to the network.

    Args:
        net: (B, D) -> (B, 3 · components · D): offsets, log-scales, logits of the shares.
    """

    grid: Tensor

    def __init__(self, net: CausalNet, components: int, bound: float = 7.0) -> None:
        super().__init__()
        self.net, self.components, self.bound = net, components, bound
        self.register_buffer("grid", torch.linspace(-2, 2, components)[:, None], persistent=False)

    def log_prob(self, z: Float[Tensor, " B D"], context: Tensor | None = None) -> Float[Tensor, " B"]:
        mean, log_scale, logits = self._split(self.net(z, context))
        deviation = (z[:, None] - mean) * (-log_scale).exp()
        joint = torch.addcmul(logits - log_scale, deviation, deviation, value=-0.5)
        return (joint.logsumexp(1) - logits.logsumexp(1)).sum(1) - z.shape[1] * 0.5 * math.log(2 * math.pi)

    @torch.no_grad()
    def sample(
        self, like: Float[Tensor, " B D"], context: Tensor | None = None, temperature: float = 1.0
    ) -> Float[Tensor, " B D"]:
        """`temperature` multiplies a component's deviations and divides the logits: at 0 the mode of the likeliest."""
        uniform = torch.rand(like.shape[0], self.components, like.shape[1], dtype=like.dtype, device=like.device)
        gumbel = -(-uniform.clamp_min(torch.finfo(like.dtype).tiny).log()).log()
        normal = torch.randn_like(like)
        unrolling = self.net.unroll(like.shape[0], context)
        for i in unrolling.order:
            mean, log_scale, logits = self._split(unrolling.step())
            chosen = (logits + temperature * gumbel[..., i : i + 1]).argmax(1, keepdim=True)
            mean, log_scale = mean.gather(1, chosen), log_scale.gather(1, chosen)
            drawn = torch.addcmul(mean[:, 0, 0], normal[:, i], log_scale[:, 0, 0].exp(), value=temperature)
            unrolling.put(drawn)
        return unrolling.told()

    def _split(self, said: Float[Tensor, " B 3*C*D"]) -> tuple[Tensor, Tensor, Tensor]:
        """Means, log-scales and logits, each (B, C, D)."""
        said = promote(said)
        offset, raw, logits = said.unflatten(1, (3, self.components, -1)).unbind(1)
        return offset + self.grid, self.bound * torch.tanh(raw / self.bound), logits
