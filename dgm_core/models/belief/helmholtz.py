"""The Helmholtz Machine. P. Dayan, G. Hinton, R. Neal, R. Zemel, 1995. doi:10.1162/neco.1995.7.5.889.
The wake–sleep algorithm: G. Hinton, P. Dayan, B. Frey, R. Neal, 1995. doi:10.1126/science.7761831.
Reweighted wake–sleep: J. Bornschein, Y. Bengio, 2015. arXiv:1406.2751.

A generative net p(x, h) from the top down and a recognition net q(h | x) from the bottom up, both of sigmoid units.

    wake    x from the data, h ~ q(h | x): the generative net ascends log p(x, h)
    sleep   (x, h) ~ p, a dream: the recognition net ascends log q(h | x)

Wake ascends the variational bound in θ; sleep descends KL(p(h | x) ‖ q(h | x)) over dreams, the other KL than the
bound's. `objective: rws` draws h¹, …, h^K and weighs them by w̃_k ∝ p(x, h^k) / q(h^k | x):

    wake θ  Σ_k w̃_k ∂ log p(x, h^k) / ∂θ, an estimate of the likelihood's gradient whose bias falls as 1 / K
    wake φ  Σ_k w̃_k ∂ log q(h^k | x) / ∂φ, the same descent as sleep, over data instead of dreams

and `recognition_turn` says where the recognition net learns: in sleep, in the wake turn from its draws, or in both. A
likelihood is reported by importance sampling with q as the proposal.

Departures: Adam, its rate falling to a twentieth, where the papers have gradient steps, in the last with momentum. With
    `both`, the two recognition updates are steps of their own. Weights start as Glorot's, visible biases from the
    data's mean, which is also taken from the recognition net's input. The recognition net is a sigmoid belief net; the
    last paper's best results have autoregressive layers. A sleep turn has as many dreams as its batch has examples.
Expected: wake–sleep 116.3 nats a test example on fixed binarised MNIST with 200 hidden units and 106.9 with 200–200,
    reweighted 103.1 and 93.4 (Bornschein & Bengio): `make results ROW=belief_mnist_200`, `make results
    ROW=belief_mnist_200_200`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Literal, Self

import torch
from pydantic import Field, model_validator
from torch import nn

from dgm_core.config import Optimizer, Recipe
from dgm_core.contract import Batch, Clock, DataSpec, Loss, Turn
from dgm_core.models.belief.base import Layered, RecognisedBeliefNet
from dgm_core.objectives.iwae import iwae
from dgm_core.objectives.score_function import with_value

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor


class Helmholtz(RecognisedBeliefNet):
    """Two players: the generative net learns awake, the recognition net asleep."""

    class Config(Layered):
        objective: Literal["wake_sleep", "rws"] = "wake_sleep"
        samples: int = Field(default=1, ge=1, description="K, draws of h an example: averaged, or weighed in rws")
        recognition_turn: Literal["sleep", "wake", "both"] = Field(
            default="sleep", description="where the recognition net learns; wake and both are of rws"
        )

        @model_validator(mode="after")
        def _weights_need_rws(self) -> Self:
            if self.objective == "wake_sleep" and self.recognition_turn != "sleep":
                raise ValueError(
                    f"recognition_turn: {self.recognition_turn} weighs draws by importance, which wake_sleep does not: "
                    "set objective: rws, or recognition_turn: sleep"
                )
            if self.objective == "rws" and self.samples == 1:
                raise ValueError(
                    "objective: rws weighs several draws: set samples to 2 or more (the paper trains with 5)"
                )
            return self

    config: Config

    @classmethod
    def defaults(cls, data: DataSpec) -> tuple[Config, Recipe]:
        hidden = (200, 200) if data.dims >= 784 else (50, 50)
        return cls.Config(hidden=hidden), _recipe(2e-3, 100, 125_000, final=0.05)  # 250 epochs of 50,000 examples

    @classmethod
    def tiny(cls, data: DataSpec) -> tuple[Config, Recipe]:
        return cls.Config(hidden=(6, 3)), _recipe(0.02, 32, 300)

    def players(self) -> Mapping[str, Sequence[nn.Parameter]]:
        return {name: list(getattr(self, name).parameters()) for name in ("generative", "recognition")}

    def turns(self) -> Sequence[Turn]:
        where = self.config.recognition_turn
        wake = Turn("wake", ("generative",) if where == "sleep" else ("generative", "recognition"))
        return [wake] if where == "wake" else [wake, Turn("sleep", ("recognition",))]

    def loss(self, batch: Batch, turn: str, clock: Clock) -> Loss:
        return self._sleep(len(batch.x)) if turn == "sleep" else self._wake(self.visible(batch.x))

    def _wake(self, x: Float[Tensor, " B v"]) -> Loss:
        learns = self.config.recognition_turn != "sleep"
        with torch.set_grad_enabled(learns and torch.is_grad_enabled()):
            hidden, log_q = self.recognition(x, self.config.samples)
        log_q = log_q.sum(-1)
        log_p = self.generative.log_terms([x[:, None], *hidden]).sum(-1)
        log_weights = (log_p - log_q).detach()
        metrics = {"bound": log_weights.mean()}
        if self.config.objective == "wake_sleep":
            return Loss(-with_value(log_weights.mean(), log_p.mean()), metrics)
        weights = torch.softmax(log_weights, 1)
        ascent = (weights * (log_p + log_q if learns else log_p)).sum(1).mean()
        return Loss(-with_value(iwae(log_weights).mean(), ascent), metrics)

    def _sleep(self, n: int) -> Loss:
        """The batch's examples are not looked at."""
        return Loss(-self.recognition.log_terms(self.generative.draw(n)).sum(-1).mean())


def _recipe(lr: float, batch_size: int, steps: int, final: float = 1.0) -> Recipe:
    # fp32: the products are too small for bf16 to pay.
    adam = Optimizer(algorithm="adam", lr=lr, schedule="linear", final=final)
    players = {"generative": adam, "recognition": adam}
    return Recipe(batch_size=batch_size, steps=steps, optimizers=players, precision="fp32")
