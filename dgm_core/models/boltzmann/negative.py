"""Where an RBM's negative samples come from: chains that start at the data, that persist, or that are tempered."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Literal

import torch
from pydantic import Field
from torch import Tensor

from dgm_core import distributed
from dgm_core.config import Strict
from dgm_core.contract import DataSpec, GenerativeModel
from dgm_core.models.boltzmann.base import chains_held
from dgm_core.nn.rbm import BipartiteLayer
from dgm_core.nn.tempering import TemperedLayer, ladder
from dgm_core.objectives.contrastive import run_chain

if TYPE_CHECKING:
    from jaxtyping import Float

_FORGOTTEN = 0.05  # of the running rates at which temperatures change places, a play


class Sampled(Strict):
    """What `Config` says of it."""

    negative: Literal["pcd", "cd", "tempering", "exact"] = Field(
        default="pcd",
        description="chains that persist, or that start at the data, or tempered ones that persist; or log Z by "
        "enumeration",
    )
    gibbs: int = Field(default=1, ge=1, description="k, Gibbs steps a play")
    chains: int = Field(default=100, ge=1, description="chains, over all workers")
    temperatures: int = Field(default=10, ge=2, description="of a tempered chain: β evenly from the model's 1 to 0")


class NegativePhase(GenerativeModel):
    """Holds the chains; `layer` and `base_mean` are the model's, and there before `start_chains`."""

    chains = frozenset({"particles"})
    layer: BipartiteLayer
    base_mean: Tensor
    particles: Tensor  # (chains, visible), or (chains, temperatures, visible) with the model's own first
    swap_rates: Tensor

    def __init__(self, config: Sampled, data: DataSpec) -> None:
        super().__init__(config, data)
        self.sampled = config
        self.tempered = config.negative == "tempering"
        self._half = False
        self._inputs: Tensor | None = None  # hidden inputs that the play found for the standing chains

    def start_chains(self) -> None:
        """Once the layer is whole."""
        if self.tempered:
            self.register_buffer("swap_rates", torch.zeros(self.sampled.temperatures - 1))
        self.register_buffer("particles", self._draw_chains(chains_held(self.sampled.chains)))

    def restart_chains(self) -> None:
        """From the base rates as they are now."""
        self.particles.copy_(self._draw_chains(len(self.particles)))
        self._inputs = None
        self.step_chains(first=True)

    def with_negative(self, v: Float[Tensor, " B v"]) -> tuple[Float[Tensor, " BM v"], Float[Tensor, " BM h"]]:
        """The data above the samples, and the hidden inputs of both.

        Data and standing chains share a product, whose gradient is rounded once where it is in half precision; CD
        cannot: its chain starts from the data's part.
        """
        kind = v.device.type
        self._half = torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)
        if self.sampled.negative != "cd":
            both = torch.cat([v, self.standing()])
            a = self.layer.hidden_input(both)
            self._inputs = a[len(v) :].detach() if self.training else None
            return both, a
        a = self.layer.hidden_input(v)
        with torch.no_grad():
            negative = run_chain(self.layer.gibbs, self.layer.gibbs(v, a.detach()), self.sampled.gibbs - 1)
        return torch.cat([v, negative]), torch.cat([a, self.layer.hidden_input(negative)])

    def step_chains(self, *, first: bool = False) -> None:
        """Between plays, not in `loss`: once a play however many microbatches it has, at the parameters of the next.

        The hidden units of a chain's first step are drawn at the parameters that its visible ones were drawn with, for
        which the play has found their inputs.
        """
        known, self._inputs = self._inputs, None
        # The trainer's autocast covers the play alone; the chains' products are as those of the play.
        with torch.autocast(self.device.type, torch.bfloat16) if self._half else contextlib.nullcontext():
            if self.sampled.negative == "pcd":
                moved = self.layer.gibbs(self.particles, known)
                self.particles.copy_(run_chain(self.layer.gibbs, moved, self.sampled.gibbs - 1))
            elif self.tempered:
                self._step_tempered(1.0 if first else _FORGOTTEN)

    def standing(self) -> Float[Tensor, " M v"]:
        """The chains' states at the model's own temperature."""
        return self.particles[:, 0] if self.tempered else self.particles

    def swap_metrics(self) -> dict[str, Tensor]:
        """Running shares of neighbouring temperatures that change places: of all pairs, and the least pair's."""
        if not self.tempered:
            return {}
        return {"swap_rate": self.swap_rates.mean(), "swap_rate_least": self.swap_rates.min()}

    def _step_tempered(self, forget: float) -> None:
        betas = ladder(self.sampled.temperatures, self.base_mean)
        chain = TemperedLayer(self.layer, self.layer.bias_for(self.base_mean), betas)
        moved, swapped = chain.swap(run_chain(chain.gibbs, self.particles, self.sampled.gibbs))
        self.particles.copy_(moved)
        rates = torch.cat([swapped.to(betas).sum(0), betas.new_full((1,), len(swapped))])
        distributed.sum_(rates)
        self.swap_rates.lerp_(rates[:-1] / rates[-1], forget)

    def _draw_chains(self, n: int) -> Float[Tensor, " n *v"]:
        """Base-rate draws, one for each temperature where there are several."""
        bias = self.layer.bias_for(self.base_mean)
        return self.layer.draw_visible(bias.expand((n, self.sampled.temperatures, -1) if self.tempered else (n, -1)))
