"""Neural Variational Inference and Learning in Belief Networks. A. Mnih, K. Gregor, 2014. arXiv:1402.0030.

A sigmoid belief net p(x, h) and a recognition net q(h | x), both moved by one forward pass up the variational bound
E_q[log p(x, h) − log q(h | x)]. `objective` chooses the estimator of the recognition net's gradient:

    nvil             the score function with its learning signal l centred by an input-dependent baseline C_ψ and a
                     running mean, divided by max(1, its running deviation), and local to each layer (Algorithm 1):
                     `baseline`, `centring`, `variance_normalisation`, `local_signals` switch each off
    vimco            the bound of K draws, each draw's signal compared with the others' (A. Mnih, D. J. Rezende, 2016.
                     arXiv:1602.06725)
    control_variate  closed-form entropies, and a first-order expansion of the rest about q's means as the control
                     variate (J. Paisley, D. Blei, M. Jordan, 2012. arXiv:1206.6430): the plain baseline

The generative net ascends log p(x, h) at the drawn h, in vimco weighted by w̃_k. C_ψ is a network of 100 tanh units a
layer, a player of its own. The likelihood is the importance-weighted bound with q as the proposal.

Departures: Adam on 100 examples, its rate falling to a twentieth, for plain gradient steps on 20. Algorithm 1 centres a
    batch with statistics that the batch has moved already; here they move after the play, which keeps the estimate
    unbiased and a batch spread over workers whole, and start from the first batch. Weights start as Glorot's, visible
    biases from the data's mean. With `local_signals: false` one baseline sees x only. The control variate's coefficient
    comes from running moments; the expansion is to first order where Paisley et al. go to the second.
Expected: 104.4 nats a test example on fixed binarised MNIST with 200 hidden units and 92.9 with 200–200, both with
    single samples, 101.9 and 91.7 by vimco with 5 (Maddison et al. 2017; the paper has bounds, 113.1 and 99.8):
    `make results ROW=belief_mnist_200`, `make results ROW=belief_mnist_200_200`.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from dgm_core.config import Optimizer, Recipe
from dgm_core.contract import Batch, Clock, DataSpec, Loss, Turn
from dgm_core.models.belief.base import Layered, RecognisedBeliefNet
from dgm_core.nn.belief import log_bernoulli
from dgm_core.nn.running import RunningMoments
from dgm_core.objectives.control_variate import coefficient, control_variate
from dgm_core.objectives.iwae import iwae
from dgm_core.objectives.nvil import nvil
from dgm_core.objectives.score_function import learning_signals, with_value
from dgm_core.objectives.vimco import vimco
from dgm_core.precision import promote

if TYPE_CHECKING:
    from jaxtyping import Float


class NVIL(RecognisedBeliefNet):
    """A belief net and its recognition net, moved together by a score-function estimator."""

    class Config(Layered):
        objective: Literal["nvil", "vimco", "control_variate"] = "nvil"
        samples: int = Field(default=1, ge=1, description="K, draws of h an example: averaged, or one bound in vimco")
        baseline: bool = Field(default=True, description="input-dependent baselines (nvil)")
        centring: bool = Field(default=True, description="take the running mean off the signal (nvil)")
        variance_normalisation: bool = Field(default=True, description="divide by the running deviation (nvil)")
        local_signals: bool = Field(default=True, description="a signal a layer, of the terms it has a part in (nvil)")
        baseline_features: int = Field(default=100, ge=1, description="tanh units of a baseline")
        decay: float = Field(default=0.8, ge=0, lt=1, description="α, what running statistics keep at each play")

        @model_validator(mode="after")
        def _vimco_compares_samples(self) -> Self:
            if self.objective == "vimco" and self.samples == 1:
                raise ValueError("objective: vimco compares draws with each other: set samples to 2 or more")
            return self

    config: Config

    @classmethod
    def defaults(cls, data: DataSpec) -> tuple[Config, Recipe]:
        hidden = (200, 200) if data.dims >= 784 else (50, 50)
        return cls.Config(hidden=hidden), _recipe(2e-3, 100, 125_000, final=0.05)  # 250 epochs of 50,000 examples

    @classmethod
    def tiny(cls, data: DataSpec) -> tuple[Config, Recipe]:
        return cls.Config(hidden=(6, 3), baseline_features=16), _recipe(0.01, 32, 300)

    def __init__(self, config: Config, data: DataSpec) -> None:
        super().__init__(config, data)
        signals = len(config.hidden) if config.local_signals or config.objective != "nvil" else 1
        below = self.sizes[:signals] if config.objective == "nvil" and config.baseline else ()
        self.baselines = nn.ModuleList(_baseline(features, config.baseline_features) for features in below)
        if config.objective != "vimco":
            self.moments = RunningMoments(signals, 1 if config.objective == "nvil" else 2)

    def players(self) -> Mapping[str, Sequence[nn.Parameter]]:
        parts = {"generative": self.generative, "recognition": self.recognition, "baseline": self.baselines}
        return {name: list(part.parameters()) for name, part in parts.items()}

    def turns(self) -> Sequence[Turn]:
        return [Turn("bound", tuple(name for name, owned in self.players().items() if owned))]

    @torch.no_grad()
    def enter(self, turn: str, batches: Iterator[Batch]) -> None:
        first = list(itertools.islice(batches, 1))
        super().enter(turn, itertools.chain(first, batches))
        if self.config.objective == "vimco":
            return
        for batch in first:
            self._ascent(self.visible(batch.x), note=True)
        self.moments.settle(1.0)

    def loss(self, batch: Batch, turn: str, clock: Clock) -> Loss:
        bound, ascent = self._ascent(self.visible(batch.x), note=self.training)
        return Loss(-with_value(bound.mean(), ascent.mean()))

    @torch.no_grad()
    def after(self, turn: str, clock: Clock) -> None:
        if self.training and self.config.objective != "vimco":
            self.moments.settle(1 - self.config.decay)

    def _ascent(self, x: Float[Tensor, " B v"], *, note: bool) -> tuple[Float[Tensor, " B"], Float[Tensor, " B"]]:
        """The bound, and the surrogate whose gradient is the update."""
        hidden, log_q = self.recognition(x, self.config.samples)
        states = [x[:, None], *hidden]
        log_p = self.generative.log_terms(states)
        if self.config.objective == "vimco":
            whole_p, whole_q = log_p.sum(-1), log_q.sum(-1)
            return iwae(whole_p - whole_q), vimco(whole_p, whole_q)
        signals = learning_signals(log_p, log_q).detach()
        estimate = self._nvil if self.config.objective == "nvil" else self._control_variate
        return signals[..., 0].mean(1), estimate(states, log_p, log_q, signals, note).mean(1)

    def _nvil(
        self, states: Sequence[Tensor], log_p: Tensor, log_q: Tensor, signals: Tensor, note: bool
    ) -> Float[Tensor, " B samples"]:
        signals = signals if self.config.local_signals else signals[..., :1]
        baselines = torch.zeros_like(signals)
        if self.config.baseline:
            inputs = [states[0] - self.recognition.mean, *states[1:]]
            values = [promote(net(h.to(self.dtype))) for net, h in zip(self.baselines, inputs, strict=False)]
            baselines = torch.cat(torch.broadcast_tensors(*values, signals[..., :1])[:-1], -1)
        residuals = signals - baselines.detach()
        mean, variance = self.moments.mean[:, 0], self.moments.covariance[:, 0, 0]
        centre = mean if self.config.centring else torch.zeros_like(mean)
        scale = variance if self.config.variance_normalisation else torch.ones_like(variance)
        ascent = nvil(log_p, log_q, residuals, baselines, centre, scale)
        if note:
            self.moments.add(residuals[..., None])
        return ascent

    def _control_variate(
        self, states: Sequence[Tensor], log_p: Tensor, log_q: Tensor, signals: Tensor, note: bool
    ) -> Float[Tensor, " B samples"]:
        parts = [self._expansion(level, states) for level in range(1, len(states))]
        g, mean_g, entropies = (torch.stack(torch.broadcast_tensors(*p), -1) for p in zip(*parts, strict=True))
        f = signals + log_q.detach()
        a = coefficient(self.moments.covariance)
        if note:
            self.moments.add(torch.stack([f, g.expand_as(f)], -1))
        return control_variate(log_p, log_q, f, g, mean_g, entropies, a)

    def _expansion(self, level: int, states: Sequence[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """g of layer `level`, its mean and the layer's entropy given the layer below; layers above stand at their
        means."""
        z = self.recognition.inputs(level - 1, states[level - 1])
        p = torch.sigmoid(z)
        with torch.enable_grad():
            means = [states[level - 1], p.detach().requires_grad_()]
            for i in range(level, len(states) - 1):
                means.append(torch.sigmoid(self.recognition.inputs(i, means[-1])))
            f = self.generative.log_terms(means, level - 1).sum(-1)
            if level < len(states) - 1:
                f = f - self.recognition.log_terms(means[1:], level).sum(-1)
            (slope,) = torch.autograd.grad(f.sum(), means[1])
        g = f.detach() + ((states[level] - means[1].detach()) * slope).sum(-1)
        return g, (slope * p).sum(-1), -log_bernoulli(p, z)


def _baseline(inputs: int, features: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(inputs, features), nn.Tanh(), nn.Linear(features, 1))


def _recipe(lr: float, batch_size: int, steps: int, final: float = 1.0) -> Recipe:
    # fp32: the products are too small for bf16 to pay.
    adam = Optimizer(algorithm="adam", lr=lr, schedule="linear", final=final)
    players = {"generative": adam, "recognition": adam, "baseline": adam}
    return Recipe(batch_size=batch_size, steps=steps, optimizers=players, precision="fp32")
