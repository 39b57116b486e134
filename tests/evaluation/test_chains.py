"""Chains over time: the right steps, and the model's own distribution in the long run."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice

import pytest
import torch
from torch import Tensor

from dgm_core.capabilities import HasGibbs
from dgm_core.contract import DataSpec
from dgm_core.evaluation import chains
from dgm_core.models.boltzmann.base import DeepMachine
from dgm_core.models.boltzmann.dbm import DBM
from dgm_core.models.boltzmann.dbn import DBN
from dgm_core.models.boltzmann.rbm import RBM
from dgm_core.nn.rbm import all_states
from tests.evaluation.handmade import Blank

BITS = DataSpec("image", (1, 2, 2), 2)


class Counter(Blank, HasGibbs):
    def chain(self, x: Tensor) -> Iterator[Tensor]:
        while True:
            x = x + 1
            yield x


def test_states_are_those_after_so_many_steps():
    x = torch.tensor([[[[0, 5], [0, 0]]]])
    found = chains.over_time(Counter(BITS), x)
    assert found.shape == (1, len(chains.STEPS), 1, 2, 2)
    assert found[0, :, 0, 0, 0].tolist() == list(chains.STEPS)
    assert found[0, :, 0, 0, 1].tolist() == [5 + k for k in chains.STEPS]


def test_noise_keeps_each_coordinates_values_and_nothing_else():
    x = torch.arange(4)[None].expand(100, 4) + 10 * torch.arange(100)[:, None]  # a coordinate's last digit is its own
    noise = chains.independent(x.view(100, 1, 2, 2), 50)
    assert noise.shape == (50, 1, 2, 2)
    assert (noise.flatten(1) % 10 == torch.arange(4)).all()
    assert (noise.flatten(1) // 10).double().std(1).min() > 0  # of different examples


def long_run(model: HasGibbs, n: int = 4000) -> Tensor:
    """Means of the data after 60 steps from all ones."""
    x = torch.ones(n, 1, 2, 2, dtype=torch.uint8)
    last = next(islice(model.chain(x), 59, None))
    assert last.dtype == torch.uint8
    assert last.shape == x.shape
    return last.double().mean(0).flatten()


def scattered(model: torch.nn.Module) -> None:
    torch.manual_seed(1)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(0.7 * torch.randn_like(p))


# Four standard errors of a mean of 4000 coins are at most 0.032.


def test_an_rbms_chain_ends_in_its_distribution():
    model = RBM(RBM.Config(hidden=3, centred=False), BITS).double()
    scattered(model)
    states = torch.cat(list(all_states(4, torch.device("cpu")))).double()
    p = model.log_prob(states.view(-1, 1, 2, 2)).exp()
    assert p.sum().item() == pytest.approx(1)
    assert (long_run(model) - p @ states).abs().max() < 0.032


@pytest.mark.parametrize("kind", [DBM, DBN])
def test_a_deep_machines_chain_ends_in_its_distribution(kind: type[DeepMachine]):
    """Marginals of the machine's visible side by enumeration; a DBN's are passed down, unit by unit in expectation."""
    model = kind(kind.Config(hidden=(3, 2)), BITS).double()
    scattered(model)
    if isinstance(model, DBN):
        model.depth.fill_(2)
    machine = model.machine
    states = torch.cat(list(all_states(machine.weight.shape[0], torch.device("cpu")))).double()
    p = torch.softmax(-machine.free_energy(states), 0)
    if isinstance(model, DBN):
        below = model.layer(0)
        expected = p @ torch.sigmoid(below.visible_bias + states @ below.weight.T)
    else:
        expected = p @ states[:, :4]
    assert (long_run(model) - expected).abs().max() < 0.032
