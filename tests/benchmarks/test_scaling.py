"""The cost model against cases by hand, counts against real ranks and real files, the page against its figures."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from benchmarks import scaling
from benchmarks.harness import RESULTS
from benchmarks.scale import cost, page, words
from benchmarks.scale.account import (
    CPU_RANDOM_STATE,
    GRADIENTS,
    Account,
    Message,
    Recorder,
    account,
    pretend,
    tensor_bytes,
)
from benchmarks.scale.measure import Timed
from benchmarks.scale.settings import SETTINGS, Examples
from dgm_core import distributed
from dgm_core.config import Optimizer, Recipe, RecipeError, Strict
from dgm_core.contract import Batch, Clock, DataSpec, GenerativeModel, Loss, Turn
from dgm_core.models import CATALOG
from dgm_core.models.adversarial.wgan_gp import WGANGP
from dgm_core.training import checkpoint
from dgm_core.training.trainer import Trainer
from tests.support import SPECS, TwoRanks

VECTOR = DataSpec("vector", (3,), None)


class Linear(GenerativeModel):
    """Two players with 12 and 5 weights; "a" plays 3 times every second round, and gathers its batch."""

    class Config(Strict):
        pass

    def __init__(self, config: Strict, data: DataSpec) -> None:
        super().__init__(config, data)
        self.a = nn.Linear(3, 4, bias=False)
        self.b = nn.Parameter(torch.ones(5))
        self.register_buffer("seen", torch.zeros(3))

    @classmethod
    def defaults(cls, data: DataSpec) -> tuple[Strict, Recipe]:
        adam = Optimizer(lr=1e-3, ema=0.9)
        return cls.Config(), Recipe(batch_size=6, steps=4, optimizers={"a": adam, "b": Optimizer(lr=1.0)})

    tiny = defaults

    def players(self) -> Mapping[str, Sequence[nn.Parameter]]:
        return {"a": list(self.a.parameters()), "b": [self.b]}

    def turns(self) -> Sequence[Turn]:
        return [Turn("a", ("a",), every=2, repeat=3), Turn("b", ("b",))]

    def loss(self, batch: Batch, turn: str, clock: Clock) -> Loss:
        if turn == "b":
            return Loss(self.b.square().sum())
        distributed.all_reduce(batch.x)
        return Loss(self.a(batch.x).square().mean())

    def sample(self, n: int, y: Any = None, context: Any = {}) -> torch.Tensor:
        return torch.zeros(n, 3)


def linear() -> Account:
    config, recipe = Linear.defaults(VECTOR)
    return account(lambda: Linear(config, VECTOR), recipe, VECTOR)


def test_the_ring_by_hand() -> None:
    # 4 ranks: 3 + 3 steps, each a hop of 1 ms and a quarter of 8 MB at 1 GB/s.
    assert cost.ring(8e6, 4, 1e-3, 1e9) == pytest.approx(6 * (1e-3 + 2e6 / 1e9))
    assert cost.ring(8e6, 2, 0.0, 1e9) == pytest.approx(8e-3)
    assert cost.ring(8e6, 1, 1e-3, 1e9) == cost.tree(8e6, 1, 1e-3, 1e9) == 0


def test_the_tree_by_hand_and_the_lesser_counts() -> None:
    assert cost.tree(8e6, 6, 1e-3, 1e9) == pytest.approx(2 * 3 * 1e-3 + 16e-3)  # 6 ranks: a tree of depth 3
    hop, bandwidth = cost.value("HOP_NETWORK"), cost.value("NETWORK")
    assert cost.all_reduce(8, 512) == pytest.approx(2 * 9 * hop + 16 / bandwidth)  # short: the tree
    long = 1e12
    assert cost.all_reduce(long, 512) == pytest.approx(2 * 511 * hop + 2 * 511 / 512 * long / bandwidth)
    assert cost.all_reduce(long, 8) == pytest.approx(14 * cost.value("HOP_NODE") + 14 / 8 * long / cost.value("NVLINK"))


def test_bytes_and_operations_of_a_small_model_by_hand() -> None:
    a = linear()
    assert a.parameters == 12 + 5
    assert a.plays == {"a": 1.5, "b": 1.0}
    assert a.gradient_bytes() == 4 * (1.5 * 12 + 1.0 * 5)
    gathered = [m for m in a.messages if m.place != GRADIENTS]
    assert [(m.count, m.bytes(6)) for m in gathered] == [(1.5, 0.5 * 6 * 3 * 4)]  # a rank's half of the batch
    assert gathered[0].place == "Trainer._play (training/trainer.py)"  # the nearest of the library: this file is none
    # 3 × 4 products, forward and for the weight's gradient; the data needs none; 2 FLOP each.
    assert a.flops_per_example == 1.5 * 2 * (2 * 12)
    assert a.flops_fixed == 0
    assert a.model_bytes == 4 * (12 + 5 + 3)
    assert a.optimiser_bytes == 2 * 4 * (12 + 5) + 2 * 4  # Adam's two moments, and a step of each player
    assert a.average_bytes == 4 * 12


@pytest.mark.parametrize("critic_steps", [1, 5])
def test_a_critic_is_sent_as_often_as_it_plays(critic_steps: int) -> None:
    spec = DataSpec("vector", (2,), None)
    config = WGANGP.Config(latents=2, features=3, depth=1, critic_steps=critic_steps)
    recipe = WGANGP.tiny(spec)[1]
    a = account(lambda: WGANGP(config, spec), recipe, spec)
    critic, generator = (2 * 3 + 3) + (3 * 1 + 1), (2 * 3 + 3) + (3 * 2 + 2)
    assert a.gradient_bytes() == 4 * (critic_steps * critic + generator)
    assert {m.place for m in a.messages} == {GRADIENTS}


def test_gradients_travel_in_buckets_of_25_mib() -> None:
    class Wide(Linear):
        def __init__(self, config: Strict, data: DataSpec) -> None:
            super().__init__(config, data)
            self.b = nn.Parameter(torch.ones(5 * 2**20))  # 20 MiB
            self.c = nn.Parameter(torch.ones(5 * 2**20))

        def players(self) -> Mapping[str, Sequence[nn.Parameter]]:
            return {"a": list(self.a.parameters()), "b": [self.b, self.c]}

        def loss(self, batch: Batch, turn: str, clock: Clock) -> Loss:
            value = super().loss(batch, turn, clock).value
            return Loss(value + self.c.sum() if turn == "b" else value)

    config, recipe = Wide.defaults(VECTOR)
    found = account(lambda: Wide(config, VECTOR), recipe, VECTOR).messages
    assert [(m.count, m.fixed) for m in found if m.fixed > 2**20] == [(2.0, 20 * 2**20)]


def calls_of_a_round(name: str, spec: DataSpec) -> list[tuple[str, int]]:
    config, recipe = CATALOG[name].tiny(spec)
    torch.manual_seed(0)
    model = CATALOG[name](config, spec)
    trainer = Trainer(model, recipe.merged({"batch_size": 4}), Examples(spec, 64))
    trainer.model.train()
    trainer._open_window()
    with Recorder(pretended=False) as recorder:
        for turn in trainer.turns:
            for _ in range(turn.repeat):
                trainer._play(turn, Clock(0, recipe.steps))
    return recorder.calls


@pytest.mark.parametrize("name", ["wgan_gp", "vq_vae2", "real_nvp", "rbm"])
def test_what_is_pretended_is_what_two_ranks_send(name: str, two_ranks: TwoRanks) -> None:
    spec = SPECS["binary_image" if name == "rbm" else "grey_image"]
    config, recipe = CATALOG[name].tiny(spec)
    a = account(lambda: CATALOG[name](config, spec), recipe, spec, "cpu")
    first, second = two_ranks.run(calls_of_a_round, name, spec)
    assert first == second
    counted = {(m.place, m.bytes(4)): 0.0 for m in a.messages}
    for m in a.messages:
        counted[m.place, m.bytes(4)] += m.count
    sent: dict[tuple[str, float], float] = {}
    for call in first:
        sent[call] = sent.get(call, 0.0) + 1
    assert counted == sent


@pytest.mark.parametrize("build", [lambda: ("vae", SPECS["binary_image"]), lambda: ("rbm", SPECS["binary_image"])])
def test_a_checkpoint_has_as_many_bytes_as_counted(build: Callable[[], tuple[str, DataSpec]], tmp_path: Path) -> None:
    name, spec = build()
    config, recipe = CATALOG[name].tiny(spec)
    optimizers = {player: {"ema": 0.9} for player in recipe.optimizers}
    recipe = recipe.merged({"steps": 1, "batch_size": 4, "optimizers": optimizers})
    a = account(lambda: CATALOG[name](config, spec), recipe, spec, "cpu")
    Trainer(CATALOG[name](config, spec), recipe, Examples(spec, 16), folder=tmp_path).fit()
    state = checkpoint.load(tmp_path / "last.pt")
    assert tensor_bytes(state) == a.checkpoint_bytes + CPU_RANDOM_STATE
    assert tensor_bytes(state["model"]) == a.model_bytes
    assert a.average_bytes == 4 * a.parameters


def test_workers_are_refused_where_the_trainer_refuses_them() -> None:
    a, core = linear(), cost.Core(1e9, 1e-9, 0.0)
    found = cost.rounds(a, core, 0.0)
    assert a.most_workers == 6
    assert found["strong"] == [None, None, None]
    assert [r.examples for r in found["weak"] if r is not None] == [1, 1, 1]
    config, recipe = Linear.defaults(VECTOR)
    with pretend(6):
        Trainer(Linear(config, VECTOR), recipe, Examples(VECTOR, 16))
    with pretend(7), pytest.raises(RecipeError, match="at least one example"):
        Trainer(Linear(config, VECTOR), recipe, Examples(VECTOR, 16))


def test_a_round_by_hand() -> None:
    a = Account(
        parameters=10**6, batch=64, precision="bf16", plays={"model": 1.0}, once=(), flops_per_example=1e12,
        messages=(Message(GRADIENTS, 4e6, 0.0, 1.0), Message("norm", 0.0, 10.0, 2.0)), flops_fixed=0.0,
        kernels=100.0, kernels_alone=100.0, model_bytes=10**9, optimiser_bytes=10**9, average_bytes=0, most_workers=64,
        limited_by="examples of the batch",
    )  # fmt: skip
    core = cost.Core(matmul=2e10, seconds_per_flop=1e-10, read_seconds=1e-3)  # half of the product's rate
    r = cost.round_on(8, 64, a, core, 0.0)
    assert r.arithmetic == pytest.approx(8 * 1e12 * 1e-10 * 2e10 / cost.value("GPU_BF16"))
    assert r.launching == 0
    assert r.gradients == pytest.approx(cost.all_reduce(4e6, 8))
    assert r.statistics == pytest.approx(2 * cost.all_reduce(640, 8))
    assert r.reading == pytest.approx(8e-3)
    assert r.efficiency == pytest.approx(r.compute / (r.compute + r.gradients + r.statistics))
    assert r.overlapped > r.efficiency
    assert sum(r.causes.values()) + r.arithmetic == pytest.approx(r.total)
    saving = 2e9 / cost.value("DISK") / cost.value("CHECKPOINT_SECONDS")
    assert r.checkpoint == pytest.approx(saving * (r.compute + r.communication + r.reading + r.logging))


def test_two_workers_by_hand() -> None:
    # A message of 1000 B ten times, one of 2 MB: each two hops of 1 ms and its bytes once at 1 GB/s.
    assert cost.two_workers(0.5, [(1e3, 10), (2e6, 1)], 1e-3, 1e9) == pytest.approx(0.5 + 11 * 2e-3 + 1e-5 + 2e-3)


def test_rounds_are_timed_from_play_to_play() -> None:
    ticks = iter([0.0, 1.0, 10.0, 12.0, 30.0, 33.0])  # three rounds of two plays
    source = Timed(Examples(VECTOR, 8), lambda: next(ticks))
    for i in range(6):
        source.at(i, 1)
    assert source.rounds(2) == [20.0]  # the first is not counted, the last has no end
    assert source.rounds(2, skip=0) == [10.0, 20.0]


def test_figures_as_text() -> None:
    assert [words.seconds(s) for s in (0.0, 1e-7, 5.8e-4, 0.9999, 102.4)] == [
        "–",
        "0.10 µs",
        "580 µs",
        "1.00 s",
        "102 s",
    ]
    assert [words.nbytes(n) for n in (8, 5056, 22_131_980, 5e9)] == ["8.00 B", "5.06 kB", "22.1 MB", "5.00 GB"]
    assert [words.count(n) for n in (1, 1024, 15680, 1.26e9)] == ["1", "1024", "15.7 k", "1.26 G"]
    assert [words.percent(p) for p in (0.0, 0.504, 0.997, 1.0)] == ["0 %", "50 %", "99.7 %", "100 %"]


def test_settings_can_be_built() -> None:
    assert SETTINGS.keys() <= CATALOG.keys()
    for setting in SETTINGS.values():
        with torch.device("meta"):
            assert setting.build().data == setting.spec


def test_the_page_is_what_is_stored() -> None:
    stored = json.loads((RESULTS / "scaling.json").read_text(encoding="utf-8"))
    assert scaling.PAGE.read_text(encoding="utf-8") == page.document(stored)
    assert stored["models"].keys() == SETTINGS.keys()
    for name in CATALOG:  # a sentence about each, or the last one about those that are not counted
        assert f"`{name}`" in scaling.PAGE.read_text(encoding="utf-8")
