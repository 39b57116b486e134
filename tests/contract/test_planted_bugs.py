"""For each contract check, the bug that it is there to catch: planted in a model that is otherwise right."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import pytest
import torch
from torch import Tensor, nn

from dgm_core import distributed
from dgm_core.capabilities import HasLikelihood
from dgm_core.config import Optimizer, Recipe, Strict
from dgm_core.contract import Batch, Clock, DataSpec, GenerativeModel, Loss, Turn
from tests.contract import checks
from tests.support import SPECS, TwoRanks


class Right(GenerativeModel, HasLikelihood):
    """A mixture of two Bernoulli products with noise on its inputs, a running mean, and a second player beside it."""

    class Config(Strict):
        noise: float = 0.02

    config: Config
    exact = True
    count: Tensor
    total: Tensor
    mean: Tensor

    @classmethod
    def defaults(cls, data: DataSpec) -> tuple[Config, Recipe]:
        players = {name: Optimizer(lr=0.05, ema=0.9) for name in ("mixture", "scale")}
        return cls.Config(), Recipe(steps=300, batch_size=32, optimizers=players)

    tiny = defaults

    def __init__(self, config: Config, data: DataSpec) -> None:
        super().__init__(config, data)
        self.logits = nn.Parameter(torch.randn(2, data.dims))
        self.share = nn.Parameter(torch.zeros(2))
        self.scale = nn.Parameter(torch.ones(data.dims))
        self.register_buffer("count", torch.zeros(()))
        self.register_buffer("total", torch.zeros(data.dims))
        self.register_buffer("mean", torch.zeros(data.dims))

    def players(self) -> Mapping[str, Sequence[nn.Parameter]]:
        return {"mixture": [self.logits, self.share], "scale": [self.scale]}

    def loss(self, batch: Batch, turn: str, clock: Clock) -> Loss:
        x = batch.x.flatten(1).to(self.scale.dtype)
        if self.training:
            self.count += x.shape[0]
            self.total += x.sum(0)
        if turn == "scale":
            noisy = x + self.config.noise * torch.randn(x.shape[0], x.shape[1], dtype=x.dtype, device=self.device)
            return Loss((noisy * self.scale - x).square().sum(1).mean())
        return Loss(-self._log_prob(x).mean())

    def after(self, turn: str, clock: Clock) -> None:
        distributed.sum_(self.count, self.total)
        self.mean.lerp_(self.total / self.count, 0.1)
        self.count.zero_()
        self.total.zero_()

    def _log_prob(self, x: Tensor) -> Tensor:
        each = -nn.functional.binary_cross_entropy_with_logits(
            self.logits.expand(x.shape[0], -1, -1), x[:, None].expand(-1, 2, -1), reduction="none"
        )
        return (each.sum(-1) + self.share.log_softmax(0)).logsumexp(1)

    def log_prob(
        self, x: Tensor, y: Tensor | None = None, context: Mapping[str, Tensor] = {}, *, samples: int = 1
    ) -> Tensor:
        return self._log_prob(x.flatten(1).to(self.scale.dtype))

    def sample(self, n: int, y: Tensor | None = None, context: Mapping[str, Tensor] = {}) -> Tensor:
        which = torch.multinomial(self.share.softmax(0), n, replacement=True)
        x = torch.bernoulli(self.logits[which].sigmoid())
        return x.reshape(n, *self.data.shape).to(self.data.dtype)


class KeyIsDropped(Right):
    class Config(Right.Config):  # type: ignore[misc]
        noise: float = 0.02
        model_config = {"extra": "ignore"}

        @classmethod
        def model_validate(cls, given, **_):  # type: ignore[no-untyped-def, override]
            return super().model_validate({k: v for k, v in given.items() if k in cls.model_fields})


class ParameterWithoutOwner(Right):
    def players(self) -> Mapping[str, Sequence[nn.Parameter]]:
        return {"mixture": [self.logits], "scale": [self.scale]}


class MovesAnothersParameters(Right):
    def after(self, turn: str, clock: Clock) -> None:
        super().after(turn, clock)
        self.scale.mul_(0.99)
        self.logits.mul_(0.99)


class LossOverflows(Right):
    def loss(self, batch: Batch, turn: str, clock: Clock) -> Loss:
        return Loss(super().loss(batch, turn, clock).value / 0.0)


class MovesInEval(Right):
    def loss(self, batch: Batch, turn: str, clock: Clock) -> Loss:
        self.count += 1
        return super().loss(batch, turn, clock)


class WrongDtype(Right):
    def sample(self, n: int, y: Tensor | None = None, context: Mapping[str, Tensor] = {}) -> Tensor:
        return super().sample(n).float()


class SwallowsOptions(Right):
    def sample(self, n: int, y: Tensor | None = None, context: Mapping[str, Tensor] = {}, **options: object) -> Tensor:
        return super().sample(n)


class NotNormalised(Right):
    def _log_prob(self, x: Tensor) -> Tensor:
        return super()._log_prob(x) + 0.01


class TensorOnTheWrongDevice(Right):
    def loss(self, batch: Batch, turn: str, clock: Clock) -> Loss:
        loss = super().loss(batch, turn, clock).value
        return Loss(loss + torch.ones(self.data.dims, dtype=loss.dtype) @ self.scale)


class HiddenState(Right):
    """State that no checkpoint holds."""

    def __init__(self, config: Right.Config, data: DataSpec) -> None:
        super().__init__(config, data)
        self.seen = 0

    def loss(self, batch: Batch, turn: str, clock: Clock) -> Loss:
        self.seen += 1
        return Loss(super().loss(batch, turn, clock).value * (1 + 0.1 * self.seen))


class StatisticsOfOneRank(Right):
    def after(self, turn: str, clock: Clock) -> None:
        self.mean.lerp_(self.total / self.count, 0.1)
        self.count.zero_()
        self.total.zero_()


class LossIsASum(Right):
    def loss(self, batch: Batch, turn: str, clock: Clock) -> Loss:
        return Loss(super().loss(batch, turn, clock).value * batch.x.shape[0])


class SettlesInLoss(Right):
    def loss(self, batch: Batch, turn: str, clock: Clock) -> Loss:
        loss = super().loss(batch, turn, clock)
        self.mean.lerp_(batch.x.flatten(1).to(self.mean.dtype).mean(0), 0.1)
        return loss


class DoesNotLearn(Right):
    def loss(self, batch: Batch, turn: str, clock: Clock) -> Loss:
        return Loss(0 * super().loss(batch, turn, clock).value)


class EntersAgain(Right):
    """Its start depends on the data, and is forgotten by the checkpoint."""

    def __init__(self, config: Right.Config, data: DataSpec) -> None:
        super().__init__(config, data)
        self.register_buffer("start", torch.ones(()), persistent=False)

    def enter(self, turn: str, batches: Iterator[Batch]) -> None:
        self.start += sum(1.0 for _ in batches)

    def turns(self) -> Sequence[Turn]:
        return [Turn("mixture", ("mixture",)), Turn("scale", ("scale",))]

    def loss(self, batch: Batch, turn: str, clock: Clock) -> Loss:
        return Loss(super().loss(batch, turn, clock).value * self.start)


PLANTED = [
    (checks.config_round_trips, KeyIsDropped),
    (checks.every_parameter_has_one_owner, ParameterWithoutOwner),
    (checks.a_play_moves_only_its_players, MovesAnothersParameters),
    (checks.loss_is_finite, LossOverflows),
    (checks.evaluation_changes_no_state, MovesInEval),
    (checks.samples_look_like_data, WrongDtype),
    (checks.samples_look_like_data, SwallowsOptions),
    (checks.probabilities_sum_to_one, NotNormalised),
    (checks.runs_on_meta, TensorOnTheWrongDevice),
    (checks.resume_is_bitwise, HiddenState),
    (checks.resume_is_bitwise, EntersAgain),
    (checks.microbatches_equal_one_batch, LossIsASum),
    (checks.microbatches_equal_one_batch, SettlesInLoss),
    (checks.learns_its_tiny_problem, DoesNotLearn),
]
SPEC = SPECS["binary_vector"]


@pytest.mark.parametrize(("check", "bugged"), PLANTED, ids=lambda f: f.__name__)
def test_the_check_fails_on_its_bug_and_passes_without(check, bugged) -> None:
    check(Right, SPEC)
    with pytest.raises((Exception, pytest.fail.Exception)):
        check(bugged, SPEC)


@pytest.mark.parametrize("bugged", [StatisticsOfOneRank, LossIsASum])
def test_two_ranks_fail_on_their_bugs_and_pass_without(bugged, two_ranks: TwoRanks) -> None:
    checks.two_ranks_equal_one(Right, SPEC, two_ranks)
    with pytest.raises(AssertionError):
        checks.two_ranks_equal_one(bugged, SPEC, two_ranks)


def test_an_incomplete_docstring_is_caught() -> None:
    with pytest.raises(AssertionError, match=r"Departures|year|reference"):
        checks.docstring_is_complete(Right)


def test_every_check_has_a_planted_bug() -> None:
    bugs = {check for check, _ in PLANTED}
    everything = {*checks.PER_SPEC, checks.probabilities_sum_to_one, checks.microbatches_equal_one_batch}
    assert everything | {checks.learns_its_tiny_problem} == bugs
