"""PixelCNN++: reach by Jacobian, the start from data, cached sampling through the coarser grids against the loop."""

import itertools

import pytest
import torch
from torch import nn

from dgm_core.contract import Batch, Clock, DataMismatch, DataSpec
from dgm_core.models.autoregressive.pixel_cnn_pp import PixelCNNPP
from dgm_core.nn.incremental import draw_categorical
from dgm_core.nn.weight_norm import WeightNormed
from dgm_core.training.optimisers import lr_factor

CONTEXT = {"map": DataSpec("image", (1, 7, 9), 4), "style": DataSpec("vector", (4,), None)}
# Sizes that the two halvings divide and sizes that they do not; one to three channels; two levels to 256.
DATA = {
    "grey": DataSpec("image", (1, 8, 8), 4),
    "binary": DataSpec("image", (1, 5, 6), 2, classes=2),
    "colour": DataSpec("image", (3, 4, 8), 256, classes=3),
    "odd": DataSpec("image", (2, 7, 9), 5, classes=2, context=CONTEXT),
    "row": DataSpec("image", (3, 1, 5), 6),
}
data_kinds = pytest.mark.parametrize("kind", DATA)


def build(data, **config):
    torch.manual_seed(0)
    sizes = {"depth": 1, "resolutions": 3, "features": 5}
    model = PixelCNNPP(PixelCNNPP.tiny(data)[0].merged({**sizes, **config}), data).double().eval()
    with torch.no_grad():
        for name, parameter in model.network.named_parameters():
            if name.endswith(("bias", "gain")):  # zero and a tenth at first: an error in them would not show
                parameter.uniform_(-1, 1)
    return model


def conditions(data, n):
    """Labels and contexts for n examples, drawn at random."""
    y = torch.randint(data.classes, (n,)) if data.classes else None
    return y, {
        name: torch.randn(n, *s.shape) if s.levels is None else torch.randint(s.levels, (n, *s.shape))
        for name, s in data.context.items()
    }


def images(data, n):
    return torch.randint(data.levels, (n, *data.shape)).to(data.dtype)


def pixels(height, width):
    return list(itertools.product(range(height), range(width)))


class Features(nn.Module):
    """Lets real-valued inputs through in place of the embedding, so that there is something to differentiate by."""

    def forward(self, x, like):
        return x


@pytest.mark.parametrize(
    ("resolutions", "depth", "size"), [(3, 1, (8, 7)), (3, 2, (7, 9)), (2, 2, (5, 6)), (1, 2, (4, 5))]
)
def test_every_pixel_depends_on_all_that_precede_it_and_on_nothing_else(resolutions, depth, size):
    network = build(DataSpec("image", (2, *size), 4), resolutions=resolutions, depth=depth).network
    network.embed = Features()
    x = torch.randn(1, 2, *size, dtype=torch.float64)
    jacobian = torch.autograd.functional.jacobian(lambda t: network(t, None).pow(2).sum(1), x)[0, :, :, 0]
    for (r, c), (i, j) in itertools.product(pixels(*size), repeat=2):
        assert jacobian[r, c, :, i, j].bool().tolist() == [(i, j) < (r, c)] * 2, f"{(r, c)} and {(i, j)}"


@pytest.mark.parametrize("depth", [1, 2])
def test_of_the_row_right_above_an_odd_one_the_finest_grid_alone_tells_as_far_as_its_blocks_reach(depth):
    network = build(DataSpec("image", (1, 4, 16), 4), depth=depth).network
    network.embed = Features()
    x = torch.randn(1, 1, 4, 16, dtype=torch.float64)
    seen = [
        torch.autograd.functional.jacobian(lambda t, r=r: network(t, None).sum(1)[0, r, 0], x)[0, 0].bool()
        for r in (1, 2, 3)
    ]
    reach = 4 * depth + 2  # as the docstring says
    for row, found in ((1, seen[0]), (3, seen[2])):
        assert found[row - 1].tolist() == [c <= reach for c in range(16)]
    assert seen[1][1].sum() > reach + 1  # an even row is told by the coarser grids too


def test_a_channel_depends_on_the_earlier_ones_of_its_pixel_and_on_no_later_one():
    data = DATA["colour"]
    model = build(data)
    y, _ = conditions(data, 1)
    x = images(data, 1).long()
    said = {}
    for changed in (None, 0, 1, 2):
        other = x.clone()
        if changed is not None:
            other[:, changed, 2, 3] = (x[:, changed, 2, 3] + 100) % 256
        theta = model.network(other, model.conditioner(1, y, {}))[:, :, 2, 3]
        said[changed] = [model.network.mixture.log_masses(theta, other[:, :, 2, 3], k) for k in range(3)]
    for changed, k in itertools.product(range(3), range(3)):
        assert torch.equal(said[changed][k], said[None][k]) == (k <= changed)


def naive_sample(model, noise, y, context, **options):
    """The loop that runs the whole network for every coordinate."""
    canvas = torch.zeros(noise.shape, dtype=torch.int64)
    for (r, c), k in itertools.product(pixels(*noise.shape[2:]), range(noise.shape[1])):
        theta = model.network(canvas, model.conditioner(len(canvas), y, context))[:, :, r, c]
        masses = model.network.mixture.log_masses(theta, canvas[:, :, r, c], k)
        canvas[:, k, r, c] = draw_categorical(masses, noise[:, k, r, c], **options)
    return canvas.to(model.data.dtype)


NUCLEUS = {"temperature": 0.7, "top_p": 0.8}
SAMPLED = [(kind, {}, options) for kind in DATA for options in ({}, NUCLEUS)]
SAMPLED += [
    (kind, {"resolutions": n, "depth": d}, {}) for kind in ("colour", "odd") for n, d in ((1, 1), (2, 2), (4, 1))
]


@pytest.mark.parametrize(("kind", "shape", "options"), SAMPLED)
@torch.no_grad()
def test_cached_sampling_equals_the_naive_loop_token_for_token(kind, shape, options):
    data = DATA[kind]
    model = build(data, **shape)
    y, context = conditions(data, 3)
    torch.manual_seed(1)
    drawn = model.sample(3, y, context, **options)
    torch.manual_seed(1)
    naive = naive_sample(model, torch.rand(3, *data.shape, dtype=torch.float64), y, context, **options)
    assert drawn.dtype == data.dtype
    assert torch.equal(drawn, naive)
    assert len(naive.unique()) > 1


@data_kinds
@torch.no_grad()
def test_stepped_log_probabilities_equal_the_forward_pass(kind):
    data = DATA[kind]
    model = build(data)
    y, context = conditions(data, 2)
    x = images(data, 2)
    memory = model.network.start(x.long(), model.conditioner(2, y, context))
    log_prob = torch.zeros(2, dtype=torch.float64)
    for r in range(data.shape[1]):
        model.network.row(memory, r)
        for c, k in itertools.product(range(data.shape[2]), range(data.shape[0])):
            masses = model.network.step(memory, r, c, k)
            # Masses, not just logits: they sum to one up to float64 rounding of 256 terms.
            torch.testing.assert_close(masses.exp().sum(1), torch.ones(2, dtype=torch.float64), rtol=0, atol=1e-12)
            log_prob += masses.gather(1, x[:, k, r, c, None].long())[:, 0]
    # 1e-5 is the promise in single precision; float64 rounding over some 100 coordinates stays far below 1e-9, even
    # though single coordinates may cost hundreds of nats here.
    torch.testing.assert_close(log_prob, model.log_prob(x, y, context), rtol=1e-12, atol=1e-9)


@torch.no_grad()
@data_kinds
def test_stepped_log_probabilities_in_single_precision(kind):
    data = DATA[kind]
    model = build(data).float()
    y, context = conditions(data, 2)
    x = images(data, 2).long()
    memory = model.network.start(x, model.conditioner(2, y, context))
    stepped = torch.zeros(2)
    for r in range(data.shape[1]):
        model.network.row(memory, r)
        for c, k in itertools.product(range(data.shape[2]), range(data.shape[0])):
            stepped += model.network.step(memory, r, c, k).gather(1, x[:, k, r, c, None])[:, 0]
    # Nats a coordinate, the promise's unit.
    torch.testing.assert_close(stepped / data.dims, model.log_prob(x, y, context) / data.dims, rtol=0, atol=1e-5)


def test_probabilities_of_all_images_sum_to_one_and_depend_on_label_and_context():
    context = {"map": DataSpec("image", (1, 1, 2), 4)}
    data = DataSpec("image", (2, 2, 2), 2, classes=2, context=context)
    model = build(data)
    space = torch.tensor(list(itertools.product(range(2), repeat=8)), dtype=torch.uint8).view(-1, 2, 2, 2)
    seen = set()
    for label, grey in itertools.product(range(2), range(2)):
        given = {"map": torch.full((256, 1, 1, 2), grey)}
        log_prob = model.log_prob(space, torch.full((256,), label), given)
        assert abs(log_prob.exp().sum().item() - 1) <= 1e-12  # float64 sums of 256 terms
        seen.add(round(log_prob[1].item(), 12))
    assert len(seen) == 4


def test_samples_follow_the_exact_probabilities():
    data = DataSpec("image", (2, 1, 2), 2)
    model = build(data)
    n = 5_000
    drawn = model.sample(n).flatten(1).long()
    counts = torch.bincount(drawn @ torch.tensor([8, 4, 2, 1]), minlength=16)
    space = torch.tensor(list(itertools.product(range(2), repeat=4))).view(-1, *data.shape)
    probs = model.log_prob(space).exp()
    assert probs.min() > 1e-3  # five draws at least are expected of each, as the chi-square law wants
    statistic = ((counts - n * probs).square() / (n * probs)).sum().item()
    assert statistic < 44.3  # chi-square, 15 degrees of freedom: exceeded once in 10,000 seeds


def test_completing_a_prefix_of_a_sample_with_its_own_noise_gives_it_back():
    data = DATA["odd"]
    model = build(data)
    y, context = conditions(data, 3)
    torch.manual_seed(1)
    drawn = model.sample(3, y, context)
    order = torch.arange(data.dims).view(7, 9, 2).movedim(-1, 0)
    observed = order < torch.tensor([0, data.dims // 2, data.dims]).view(3, 1, 1, 1)  # the second within a pixel
    torch.manual_seed(1)
    assert torch.equal(model.complete(drawn.masked_fill(~observed, 4), observed, y, context), drawn)


def test_loss_is_the_mean_of_the_negative_log_likelihood_of_whole_pixels():
    data = DATA["colour"]
    model = build(data)
    y, x = conditions(data, 3)[0], images(data, 3)
    loss = model.loss(Batch(x, y), "model", Clock(0, 1)).value
    theta = model.network(x.long(), model.conditioner(3, y, {}))
    nats = [model.network.mixture.log_prob(x[:, :, r, c].long(), theta[:, :, r, c]) for r, c in pixels(4, 8)]
    torch.testing.assert_close(loss, -sum(nats).mean())


@pytest.mark.parametrize("resolutions", [1, 2, 3])
def test_gradients_reach_every_parameter(resolutions):
    data = DATA["odd"]
    model = build(data, resolutions=resolutions)
    y, context = conditions(data, 4)
    model.log_prob(images(data, 4), y, context).sum().backward()
    missed = [name for name, p in model.named_parameters() if p.grad is None or not (p.grad != 0).any()]
    assert not missed


def started(rank, world, data, x, y):
    """The model's state after `enter` on this rank's share of one batch; the second of two ranks has none."""
    torch.manual_seed(0)
    config = PixelCNNPP.tiny(data)[0].merged({"dropout": 0.0, "resolutions": 3})
    model = PixelCNNPP(config, data).double()
    model.enter("model", iter([Batch(x, y)] if rank == 0 else []))
    return model


def started_state(data, x, y):
    from dgm_core import distributed

    return started(distributed.rank(), distributed.world_size(), data, x, y).state_dict()


def test_the_first_batch_gives_every_layer_mean_zero_and_its_deviation():
    data = DATA["colour"]
    x, y = images(data, 20), conditions(data, 20)[0]
    model = started(0, 1, data, x, y)
    put_out = {}
    layers = {name: m for name, m in model.named_modules() if isinstance(m, WeightNormed)}
    for name, layer in layers.items():
        layer.register_forward_hook(lambda m, i, out, name=name: put_out.update({name: out}))
    model.log_prob(x, y)
    assert put_out.keys() == layers.keys()
    for name, layer in layers.items():
        assert layer.started
        mean, variance = put_out[name].mean((0, 2, 3)), put_out[name].var((0, 2, 3), correction=0)
        torch.testing.assert_close(mean, torch.zeros_like(mean), rtol=0, atol=1e-10, msg=name)  # float64 rounding
        # 1e-8 is added to the variance of what comes before the gain, which is 1e-3 at least here.
        torch.testing.assert_close(variance, torch.full_like(variance, layer.scale**2), rtol=1e-4, atol=0, msg=name)
    before = {name: p.clone() for name, p in model.state_dict().items()}
    model.enter("model", iter([Batch(images(data, 20), y)]))  # a warm start enters again, and keeps what it has
    assert all(torch.equal(p, before[name]) for name, p in model.state_dict().items())


def test_a_rank_without_a_share_of_the_first_batch_starts_alike(two_ranks):
    data = DATA["colour"]
    x, y = images(data, 6), conditions(data, 6)[0]
    alone = started(0, 1, data, x, y).state_dict()
    for state in two_ranks.run(started_state, data, x, y):
        for name, expected in alone.items():
            torch.testing.assert_close(state[name], expected, rtol=1e-10, atol=1e-12)  # sums in another order


def test_dropout_falls_in_training_only():
    data = DATA["grey"]
    model = build(data, dropout=0.5)
    x = images(data, 2)
    assert torch.equal(model.log_prob(x), model.log_prob(x))
    torch.manual_seed(1)
    still = model.sample(2)
    torch.manual_seed(1)
    assert torch.equal(model.train().sample(2), still)
    assert not torch.equal(model.log_prob(x), model.log_prob(x))


def test_the_default_rate_decays_as_in_the_authors_code():
    recipe = PixelCNNPP.defaults(DATA["colour"])[1]
    for step in (0, 1, 1000, recipe.steps - 1):
        factor = lr_factor(recipe.optimizers["model"], Clock(step, recipe.steps))
        assert factor == pytest.approx(0.999995**step, rel=1e-9)


def test_the_default_network_has_the_size_of_the_authors():
    data = DataSpec("image", (3, 32, 32), 256)
    with torch.device("meta"):
        model = PixelCNNPP(PixelCNNPP.defaults(data)[0], data)

    def layer(inputs, outputs, taps=1):  # a direction, a gain and a bias
        return inputs * outputs * taps + 2 * outputs

    F = 160
    blocks = {
        (taps, shortcuts): layer(2 * F, F, taps)
        + layer(2 * F, 2 * F, taps)
        + (layer(2 * F * shortcuts, F) if shortcuts else 0)
        for taps, shortcuts in ((6, 0), (4, 1), (6, 1), (4, 2))
    }
    expected = 15 * (blocks[6, 0] + blocks[4, 1])  # down: five blocks of each stream at each resolution
    expected += 17 * (blocks[6, 1] + blocks[4, 2])  # back: one more where it came up to
    expected += layer(4, F, 6) + layer(4, F, 3) + layer(4, F, 2)
    expected += 2 * 2 * (layer(F, F, 6) + layer(F, F, 4))  # two halvings and two doublings
    expected += layer(F, 100)
    assert expected == 53_659_080
    assert sum(p.numel() for p in model.parameters()) == expected


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (DataSpec("codes", (4, 4), 8), "no order"),
        (DataSpec("image", (1, 4, 4), None), "integer variant"),
        (DataSpec("image", (1, 4, 4), 1024), "2 to 256"),
        (DataSpec("vector", (4,), 2), "images"),
        (DataSpec("audio", (16,), 256), "images"),
    ],
)
def test_data_that_cannot_be_modelled_is_refused_in_words(data, said):
    with pytest.raises(DataMismatch, match=said):
        build(data)


def test_missing_conditions_are_refused():
    data = DATA["odd"]
    model = build(data)
    y, context = conditions(data, 2)
    with pytest.raises(DataMismatch, match="conditional on labels"):
        model.log_prob(images(data, 2), None, context)
    with pytest.raises(DataMismatch, match="style"):
        model.log_prob(images(data, 2), y, {"map": context["map"]})
    assert build(data, conditional=False).log_prob(images(data, 2), None, context).shape == (2,)
