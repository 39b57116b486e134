"""MADE: masks by Jacobian, mixtures over orders and masks by enumeration; more is in test_raster."""

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from dgm_core.contract import Batch, Clock, DataMismatch, DataSpec
from dgm_core.models.autoregressive.made import MADE
from dgm_core.nn import masked
from dgm_core.nn.agnostic import AgnosticMADE
from dgm_core.nn.incremental import draw_categorical

GREY = DataSpec("image", (1, 3, 4), 4)
COLOUR = DataSpec("image", (3, 2, 2), 2, classes=2)
CODES = DataSpec("codes", (2, 3), 5)
VECTOR = DataSpec("vector", (5,), 2)
SEQUENCE = DataSpec("codes", (6,), 3, context={"above": DataSpec("codes", (3,), 4)})
TINY = DataSpec("image", (2, 1, 2), 2)
# What each member of a mixture is: several orders, several masks, both, and one of each.
MEMBERS = {"orders": {"orders": 3}, "masks": {"masks": 3}, "both": {"orders": 2, "masks": 2}, "one": {}}
members = pytest.mark.parametrize("config", MEMBERS.values(), ids=MEMBERS)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def build(data, **config):
    """In double precision, of random parameters, as the last layer starts at zero."""
    model = MADE(MADE.tiny(data)[0].merged({"hidden": 40, **config}), data).double().eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.5)
    return model


class Features(nn.Module):
    """Lets real-valued inputs through in place of the embedding, so that there is something to differentiate by."""

    def forward(self, x, like):
        return x


def influence(model, order=0, mask=0):
    """Whether what is said of a coordinate depends on another, channels innermost: (D, D)."""
    network = model.network
    width = network.embed.width if model.data.kind == "codes" else None
    network.embed = Features()
    network.core.activate = network.core.activate_ = network.core.activation = F.softplus  # no unit is ever off
    channels, *grid = network.shape
    x = torch.randn(1, width or channels, *grid, dtype=torch.float64)

    def said(x):
        return network.conditionals(x, None, order, mask).sum(-1)[0]

    jacobian = torch.autograd.functional.jacobian(said, x)[:, 0].movedim(1, -1)
    each = jacobian.reshape(model.data.dims, model.data.dims, -1)
    return each.abs().sum(-1) != 0


@pytest.mark.parametrize("data", [GREY, COLOUR, CODES, VECTOR], ids=lambda d: d.kind)
@pytest.mark.parametrize(
    "config", [{}, {"depth": 3}, {"hidden": 3}, {"direct": True}, {"hidden": 3, "depth": 2}], ids=str
)
def test_every_coordinate_depends_on_all_that_precede_it_and_on_nothing_else(data, config):
    assert torch.equal(influence(build(data, **config)), torch.ones(data.dims, data.dims).tril(-1).bool())


@pytest.mark.parametrize("data", [GREY, COLOUR, CODES], ids=lambda d: d.kind)
@pytest.mark.parametrize("order", [0, 1, 2])
def test_in_a_drawn_order_all_that_comes_before_in_it_is_seen_and_nothing_else(data, order):
    model = build(data, orders=3, masks=2, direct=True)
    place = model.network.core.orders[order].argsort()
    assert place.sort().values.tolist() == list(range(data.dims))
    assert torch.equal(influence(model, order, mask=1), place[:, None] > place[None])


@pytest.mark.parametrize("mask", [0, 1])
@pytest.mark.parametrize("depth", [1, 2])
def test_drawn_degrees_connect_what_the_paper_says(depth, mask):
    model = build(VECTOR, hidden=5, depth=depth, masks=2, conditional=False)
    degrees = model.network.core.degrees[mask].tolist()
    assert all(min(below) <= m <= 4 for below, layer in itertools.pairwise([[1], *degrees]) for m in layer)
    seen = torch.zeros(5, 5).bool()
    for d, of in itertools.product(range(5), repeat=2):
        for path in itertools.product(
            *degrees
        ):  # one unit a layer, degrees not falling (eqs. 8, 9 and their deep form)
            seen[d, of] |= of + 1 <= path[0] and list(path) == sorted(path) and path[-1] < d + 1
    assert torch.equal(influence(model, mask=mask), seen)


def test_masks_and_orders_differ_and_are_saved():
    model = build(GREY, orders=3, masks=3)
    core = model.network.core
    assert len({tuple(order) for order in core.orders.tolist()}) == 3
    assert len({tuple(layer) for layer in core.degrees[:, 0].tolist()}) == 3
    torch.manual_seed(1)
    other = build(GREY, orders=3, masks=3)
    x = torch.randint(4, (5, *GREY.shape), dtype=torch.uint8)
    assert not torch.equal(other.log_prob(x), model.log_prob(x))
    other.load_state_dict(model.state_dict())
    assert torch.equal(other.log_prob(x), model.log_prob(x))


@pytest.mark.parametrize("context", [0, 2])
@pytest.mark.parametrize("features", [4, 20])
def test_both_networks_say_the_same_of_the_same_weights(features, context):
    """`nn.masked.MADE` is this one with one order and degrees that ascend evenly."""
    shape = {"features": features, "hidden": 2, "context": context}
    ours = AgnosticMADE(6, 3, direct=features < 6, **shape).double()
    theirs = masked.MADE(6, 3, **shape).double()
    for parameter in theirs.parameters():
        nn.init.normal_(parameter)
    with torch.no_grad():
        for linear, from_ in [*zip(ours.layers, theirs.layers, strict=True), (ours.last, theirs.last)]:
            weight, bias = from_.dense()
            linear.weight.copy_(weight.flatten(0, 1))
            linear.bias.copy_(bias.flatten())
        if ours.direct is not None:
            weight, bias = theirs.direct.dense()
            ours.direct.weight.copy_(weight.flatten(0, 1))
            ours.last.bias.add_(bias.flatten())
        if context:
            ours.context.weight.copy_(theirs.contexts[0].weight)
    x, given = torch.randn(7, 6, dtype=torch.float64), torch.randn(7, 2, dtype=torch.float64) if context else None
    expected = theirs(x, given).unflatten(1, (3, 6)).transpose(1, 2)
    torch.testing.assert_close(ours(x, given), expected, rtol=0, atol=1e-12)  # float64 sums of 20 terms


@torch.no_grad()
@pytest.mark.parametrize("config", [{}, {"hidden": 3}, {"width": 3, "direct": True}, {"context": 2}], ids=str)
def test_unrolled_steps_equal_the_forward_pass(config):
    net = AgnosticMADE(5, 2, **{"features": 12, "orders": 2, "masks": 2, **config}).double()
    for parameter in net.parameters():
        nn.init.normal_(parameter)
    x = torch.randn(3, 5, net.width, dtype=torch.float64)
    given = torch.randn(3, 2, dtype=torch.float64) if "context" in config else None
    for order, mask in itertools.product(range(2), repeat=2):
        expected = net(x.flatten(1), given, order=order, mask=mask)
        unrolled = net.unroll(3, given, order=order, mask=mask)
        for coordinate in net.orders[order].tolist():
            torch.testing.assert_close(unrolled.step(), expected[:, coordinate], rtol=0, atol=1e-12)
            unrolled.put(x[:, coordinate])


def space(data):
    rows = torch.tensor(list(itertools.product(range(data.levels), repeat=data.dims)))
    return rows.view(-1, *data.shape).to(data.dtype)


@members
def test_the_likelihood_is_the_average_over_members_and_sums_to_one(config):
    model = build(TINY, **config)
    x, grid = space(TINY), space(TINY).long()
    each = [
        model.log_likelihood(grid, model.network.one_of_many(grid, None, order, mask))
        for order in range(model.config.orders)
        for mask in range(model.config.masks)
    ]
    for log_prob in each:
        assert abs(log_prob.exp().sum().item() - 1) <= 1e-12  # float64 sums of 16 terms
    log_prob = model.log_prob(x)
    assert abs(log_prob.exp().sum().item() - 1) <= 1e-12
    expected = torch.stack(each).logsumexp(0) - math.log(len(each))
    torch.testing.assert_close(log_prob, expected, rtol=0, atol=1e-12)
    assert len(each) == 1 or (each[0] - each[1]).abs().max() > 0.1


@members
def test_samples_follow_the_exact_probabilities(config):
    model = build(TINY, **config)
    n = 5_000
    drawn = model.sample(n)
    assert drawn.dtype == TINY.dtype
    counts = torch.bincount(drawn.flatten(1).long() @ torch.tensor([8, 4, 2, 1]), minlength=16)
    probs = model.log_prob(space(TINY)).exp()
    statistic = ((counts - n * probs).square() / (n * probs)).sum().item()
    assert statistic < 44.3  # chi-square, 15 degrees of freedom: exceeded once in 10,000 seeds


@pytest.mark.parametrize("data", [COLOUR, CODES, SEQUENCE, VECTOR], ids=["colour", "codes", "sequence", "vector"])
def test_sampling_in_several_orders_equals_the_naive_loop_token_for_token(data):
    n, model = 9, build(data, orders=3, masks=2)
    y = torch.randint(2, (n,)) if data.classes else None
    context = {name: torch.randint(c.levels, (n, *c.shape)) for name, c in data.context.items()}
    torch.manual_seed(1)
    drawn = model.sample(n, y, context, temperature=0.8)

    torch.manual_seed(1)
    channels, height, width = model.network.shape
    taken = torch.randint(3, (n,))
    canvas = torch.zeros(n, channels, height, width, dtype=torch.int64)
    places = [(k, r, c) for r, c, k in itertools.product(range(height), range(width), range(channels))]
    condition = model.conditioner(n, y, context)
    assert len(taken.unique()) == 3
    for order in range(3):
        rows = (taken == order).nonzero()[:, 0]
        noise = torch.rand(len(rows), channels, height, width, dtype=torch.float64)
        for t, coordinate in enumerate(model.network.core.orders[order].tolist()):
            (k, r, c), (q, i, j) = places[coordinate], places[t]
            logits = model.network(canvas, condition, order)[rows, k, r, c]
            canvas[rows, k, r, c] = draw_categorical(logits, noise[:, q, i, j], temperature=0.8)
    assert torch.equal(drawn, canvas.view(n, *data.shape).to(data.dtype))
    assert len(drawn.unique()) > 1


def test_training_takes_one_member_after_the_other():
    model = build(GREY, orders=2, masks=3)
    x = torch.randint(4, (4, *GREY.shape), dtype=torch.uint8)
    losses = [model.loss(Batch(x), "model", Clock(step, 100)).value.item() for step in range(12)]
    assert losses[:6] == losses[6:]
    assert len(set(losses)) == 6
    expected = -model.log_likelihood(x.long(), model.network.one_of_many(x.long(), None, 1, 2)).mean().item()
    assert losses[5] == expected
    metrics = model.loss(Batch(x), "model", Clock(5, 100)).metrics
    assert metrics["bits_per_dim"].item() == pytest.approx(expected / 12 / math.log(2))


def test_completion_is_refused_where_there_are_several_orders():
    model = build(GREY, orders=2)
    x = torch.zeros(1, *GREY.shape, dtype=torch.uint8)
    with pytest.raises(DataMismatch, match="orders=1"):
        model.complete(x, x.bool())


@pytest.mark.parametrize("data", [VECTOR, SEQUENCE], ids=["vector", "sequence"])
def test_vectors_and_sequences_are_stepped_as_they_are_run(data):
    model = build(data, masks=2)
    x = torch.randint(data.levels, (4, *data.shape)).to(data.dtype)
    context = {name: torch.randint(c.levels, (4, *c.shape)) for name, c in data.context.items()}
    grid = x.long().view(4, 1, 1, -1)
    memory = model.network.start(grid, model.conditioner(4, None, context))
    steps = [model.network.step(memory, 0, c, 0).log_softmax(1) for c in range(data.dims)]
    log_prob = torch.stack(steps, 1).gather(2, grid.view(4, -1, 1)).sum((1, 2))
    torch.testing.assert_close(log_prob, model.log_prob(x, None, context), rtol=0, atol=1e-12)


def test_a_context_that_is_a_sequence_has_influence():
    model = build(SEQUENCE)
    x = torch.zeros(2, 6, dtype=torch.uint8)
    a, b = model.log_prob(x, None, {"above": torch.tensor([[0, 1, 2], [0, 1, 3]])})
    assert a != b


def test_one_coordinate_is_a_histogram():
    data = DataSpec("vector", (1,), 3)
    assert abs(build(data).log_prob(space(data)).exp().sum().item() - 1) <= 1e-12


def test_the_default_skips_what_its_masks_leave_out():
    """Even degrees in one order are `nn.masked`'s, which neither stores nor multiplies most of what is masked."""
    data = DataSpec("image", (1, 28, 28), 2)
    default = MADE(MADE.defaults(data)[0], data)
    assert sum(p.numel() for p in default.parameters()) < 0.65 * 2 * 784 * 8000
    assert isinstance(MADE(MADE.Config(hidden=8, masks=2), data).network.core, AgnosticMADE)


def test_data_that_cannot_be_modelled_is_refused_in_words():
    for data, said in [
        (DataSpec("vector", (4,), None), "integer variant"),
        (DataSpec("audio", (9,), 1024), "2 to 256"),
    ]:
        with pytest.raises(DataMismatch, match=said):
            build(data)
