"""Raster models: causality and reach by Jacobian, normalisation by enumeration, sampling against the naive loop."""

import itertools

import pytest
import torch
from torch import nn

from dgm_core.contract import Batch, Clock, DataMismatch, DataSpec
from dgm_core.models.autoregressive import base
from dgm_core.models.autoregressive.diagonal_bilstm import DiagonalBiLSTM
from dgm_core.models.autoregressive.gated_pixel_cnn import GatedPixelCNN
from dgm_core.models.autoregressive.made import MADE
from dgm_core.models.autoregressive.pixel_cnn import PixelCNN
from dgm_core.models.autoregressive.pixel_snail import PixelSnail
from dgm_core.models.autoregressive.row_lstm import RowLSTM
from dgm_core.nn.incremental import draw_categorical

GREY = DataSpec("image", (1, 4, 5), 4)
COLOUR = DataSpec("image", (3, 3, 4), 4, classes=3)
CODES = DataSpec("codes", (4, 4), 300, classes=2)
CONDITIONAL = DataSpec(
    "codes",
    (4, 6),
    7,
    classes=2,
    context={
        "top": DataSpec("codes", (2, 3), 5),
        "middle": DataSpec("codes", (4, 6), 6),
        "picture": DataSpec("image", (3, 2, 2), 256),
        "style": DataSpec("vector", (4,), None),
    },
)
DATA = {"grey": GREY, "colour": COLOUR, "codes": CODES, "conditional": CONDITIONAL}


def build(model, data, **config):
    torch.manual_seed(0)
    built = model(model.tiny(data)[0].merged(config), data).double().eval()
    for parameter in built.parameters():
        if parameter.ndim > 1 and not parameter.any():  # a last layer that starts at zero would hide all before it
            nn.init.normal_(parameter, std=0.3)
    return built


VARIANTS = {
    "made": (MADE, {}),
    "made_deep": (MADE, {"depth": 2, "degrees": "random", "direct": True}),
    "made_masks": (MADE, {"masks": 3}),
    "row_lstm": (RowLSTM, {}),
    "row_lstm_last_layer": (RowLSTM, {"skips": False}),
    "diagonal_bilstm": (DiagonalBiLSTM, {}),
    "gated_pixel_cnn": (GatedPixelCNN, {}),
    "pixel_cnn": (PixelCNN, {}),
    "pixel_cnn_last_block": (PixelCNN, {"skips": False}),
    "pixel_snail": (PixelSnail, {"attention": False}),
    "pixel_snail_attention": (PixelSnail, {"attention": True}),
}
variants = pytest.mark.parametrize("variant", VARIANTS)
blind = {"pixel_cnn", "pixel_cnn_last_block", "row_lstm", "row_lstm_last_layer"}  # their own tests say where
# A few ReLUs a coordinate are not enough for each path to be open; MADE has its own test, too.
of_grids = [v for v in VARIANTS if not v.startswith("made")]
without_blind_spot = pytest.mark.parametrize("variant", [v for v in of_grids if v not in blind])
data_kinds = pytest.mark.parametrize("kind", DATA)


def conditions(data, n):
    """Labels and contexts for n examples, drawn at random."""

    def draw(spec):
        if spec.levels is None:
            return torch.randn(n, *spec.shape)
        return torch.randint(spec.levels, (n, *spec.shape)).to(spec.dtype)

    y = torch.randint(data.classes, (n,)) if data.classes else None
    return y, {name: draw(spec) for name, spec in data.context.items()}


def grid_shape(data):
    return data.shape if len(data.shape) == 3 else (1, *data.shape)


def naive_sample(model, noise, y, context, **options):
    """The loop that runs the whole network for every coordinate."""
    n = noise.shape[0]
    canvas = torch.zeros(noise.shape, dtype=torch.int64)
    channels, height, width = noise.shape[1:]
    for r, c, k in itertools.product(range(height), range(width), range(channels)):
        logits = model.network(canvas, model.conditioner(n, y, context))[:, k, r, c]
        canvas[:, k, r, c] = draw_categorical(logits, noise[:, k, r, c], **options)
    return canvas.view(n, *model.data.shape).to(model.data.dtype)


class Features(nn.Module):
    """Lets real-valued inputs through in place of the embedding, so that there is something to differentiate by."""

    def forward(self, x, like):
        return x


@without_blind_spot
@pytest.mark.parametrize("kind", ["grey", "colour", "codes"])
def test_every_coordinate_depends_on_all_that_precede_it_and_on_nothing_else(variant, kind):
    model, config = VARIANTS[variant]
    data = DATA[kind]
    network = build(model, data, **config).network
    height, width = grid_shape(data)[1:]
    features = network.embed.width
    network.embed = Features()
    x = torch.randn(1, features, height, width, dtype=torch.float64)
    jacobian = torch.autograd.functional.jacobian(lambda t: network(t, None).sum(-1).pow(2), x)[0, ..., 0, :, :, :]
    if data.kind == "codes":  # all features are of the one code
        jacobian = jacobian.abs().sum(-3, keepdim=True)
    influence = jacobian.permute(1, 2, 0, 4, 5, 3).reshape(data.dims, data.dims) != 0
    assert torch.equal(influence, torch.ones(data.dims, data.dims).tril(-1).bool())


@variants
@pytest.mark.parametrize(
    "data",
    [
        DataSpec("image", (1, 2, 2), 2, classes=2),
        DataSpec("image", (3, 1, 2), 2),
        DataSpec("codes", (2, 2), 3, classes=2, context={"top": DataSpec("codes", (1, 1), 4)}),
    ],
    ids=["grey", "colour", "codes"],
)
def test_probabilities_of_all_images_sum_to_one(variant, data):
    model, config = VARIANTS[variant]
    model = build(model, data, **config)
    space = torch.tensor(list(itertools.product(range(data.levels), repeat=data.dims))).to(data.dtype)
    space = space.view(-1, *data.shape)
    seen = set()
    for i in range(2):
        _, context = conditions(data, 1)
        y = torch.full((space.shape[0],), i) if data.classes else None
        context = {name: c.expand(space.shape[0], *c.shape[1:]) for name, c in context.items()}
        log_prob = model.log_prob(space, y, context)
        assert abs(log_prob.exp().sum().item() - 1) <= 1e-12  # float64 sums of at most 81 terms
        seen.add(round(log_prob[1].item(), 12))
    assert len(seen) > 1 or not (data.classes or data.context), "labels and context have no influence"


OPTIONS = [{}, {"temperature": 0.7, "top_p": 0.8}]


@variants
@data_kinds
@pytest.mark.parametrize("options", OPTIONS, ids=["plain", "nucleus"])
def test_cached_sampling_equals_the_naive_loop_token_for_token(variant, kind, options):
    model, config = VARIANTS[variant]
    data = DATA[kind]
    model = build(model, data, **config)
    y, context = conditions(data, 3)
    torch.manual_seed(1)
    drawn = model.sample(3, y, context, **options)
    torch.manual_seed(1)
    noise = torch.rand(3, *grid_shape(data), dtype=torch.float64)
    with torch.no_grad():
        naive = naive_sample(model, noise, y, context, **options)
    assert drawn.dtype == data.dtype
    assert torch.equal(drawn, naive)
    assert len(naive.unique()) > 1


def stepped_log_prob(model, x, y, context):
    """Nats of (B, C, H, W) integers, coordinate by coordinate from the caches."""
    memory = model.network.start(x, model.conditioner(len(x), y, context))
    said = []
    channels, height, width = x.shape[1:]
    for r in range(height):
        model.network.row(memory, r)
        for c, k in itertools.product(range(width), range(channels)):
            logits = model.network.step(memory, r, c, k)
            said.append(logits.log_softmax(1).gather(1, x[:, k, r, c, None])[:, 0])
    return torch.stack(said).sum(0)


@variants
@data_kinds
@torch.no_grad()
def test_stepped_log_probabilities_equal_the_forward_pass(variant, kind):
    model, config = VARIANTS[variant]
    data = DATA[kind]
    model = build(model, data, **config)
    y, context = conditions(data, 2)
    x = torch.randint(data.levels, (2, *grid_shape(data)))
    log_prob = stepped_log_prob(model, x, y, context)
    # 1e-5 is the promise in single precision; float64 rounding over some 100 coordinates stays far below 1e-10.
    torch.testing.assert_close(log_prob, model.log_prob(x.view(2, *data.shape), y, context), rtol=0, atol=1e-10)


@variants
@pytest.mark.parametrize("kind", ["colour", "conditional"])
@torch.no_grad()
def test_stepped_log_probabilities_in_single_precision(variant, kind):
    model, config = VARIANTS[variant]
    data = DATA[kind]
    model = build(model, data, **config).float()
    y, context = conditions(data, 2)
    x = torch.randint(data.levels, (2, *grid_shape(data)))
    stepped = stepped_log_prob(model, x, y, context)
    whole = model.log_prob(x.view(2, *data.shape), y, context)
    # Nats a coordinate, the promise's unit.
    torch.testing.assert_close(stepped / data.dims, whole / data.dims, rtol=0, atol=1e-5)


@variants
def test_samples_follow_the_exact_probabilities(variant):
    model, config = VARIANTS[variant]
    data = DataSpec("image", (1, 2, 2), 2)
    model = build(model, data, **config)
    n = 5_000
    drawn = model.sample(n).flatten(1).long()
    counts = torch.bincount(drawn @ torch.tensor([8, 4, 2, 1]), minlength=16)
    space = torch.tensor(list(itertools.product(range(2), repeat=4))).view(-1, *data.shape)
    probs = model.log_prob(space).exp()
    statistic = ((counts - n * probs).square() / (n * probs)).sum().item()
    assert statistic < 44.3  # chi-square, 15 degrees of freedom: exceeded once in 10,000 seeds


@variants
@pytest.mark.parametrize("kind", ["colour", "conditional"])
def test_completing_a_prefix_of_a_sample_with_its_own_noise_gives_it_back(variant, kind):
    model, config = VARIANTS[variant]
    data = DATA[kind]
    model = build(model, data, **config)
    y, context = conditions(data, 3)
    torch.manual_seed(1)
    drawn = model.sample(3, y, context)
    order = torch.arange(data.dims).view(*grid_shape(data)[1:], -1).movedim(-1, 0).reshape(data.shape)
    observed = order < torch.tensor([0, data.dims // 2, data.dims]).view(3, *([1] * len(data.shape)))
    erased = drawn.masked_fill(~observed, data.levels - 1)
    torch.manual_seed(1)
    assert torch.equal(model.complete(erased, observed, y, context), drawn)


@variants
def test_completion_keeps_what_is_observed_and_refuses_masks_it_cannot_condition_on(variant):
    model, config = VARIANTS[variant]
    model = build(model, GREY, **config)
    x = torch.randint(4, (8, 1, 4, 5), dtype=torch.uint8)
    observed = torch.rand(x.shape) < 0.5
    with pytest.raises(DataMismatch, match="given_preceding"):
        model.complete(x, observed)
    completed = model.complete(x, observed, given_preceding=True)
    assert torch.equal(completed[observed], x[observed])
    assert not torch.equal(completed, x)
    assert completed.dtype == x.dtype
    with pytest.raises(DataMismatch, match="one flag a coordinate"):
        model.complete(x, observed[:, 0])


@variants
def test_ranks_that_share_the_noise_draw_the_shares_of_one_batch(variant, monkeypatch):
    model, config = VARIANTS[variant]
    model = build(model, CONDITIONAL, **config)
    y, context = conditions(CONDITIONAL, 4)
    noise = torch.rand(4, 1, 4, 6, dtype=torch.float64)
    monkeypatch.setattr(base, "draw_noise", lambda canvas, dtype: noise)
    whole = model.sample(4, y, context)
    for rows in (slice(0, 1), slice(1, 4)):
        monkeypatch.setattr(base, "draw_noise", lambda canvas, dtype, rows=rows: noise[rows])
        part = model.sample(rows.stop - rows.start, y[rows], {name: c[rows] for name, c in context.items()})
        assert torch.equal(part, whole[rows])


def test_sampling_applies_no_dropout_and_leaves_the_mode_alone():
    model = build(PixelSnail, CODES, dropout=0.5)
    y, _ = conditions(CODES, 2)
    torch.manual_seed(1)
    still = model.sample(2, y)
    torch.manual_seed(1)
    assert torch.equal(model.train().sample(2, y), still)
    assert model.training
    assert not torch.equal(model.log_prob(still, y), model.log_prob(still, y)), "no dropout while training"


@variants
def test_labels_are_drawn_when_none_are_given_and_unused_when_not_wanted(variant):
    model, config = VARIANTS[variant]
    assert build(model, COLOUR, **config).sample(2).shape == (2, 3, 3, 4)
    plain = build(model, COLOUR, conditional=False, **config)
    x = torch.randint(4, (2, 3, 3, 4), dtype=torch.uint8)
    assert torch.equal(plain.log_prob(x, torch.tensor([0, 1])), plain.log_prob(x))


def test_loss_is_the_mean_of_the_negative_log_likelihood():
    model = build(GatedPixelCNN, COLOUR)
    y, _ = conditions(COLOUR, 3)
    x = torch.randint(4, (3, 3, 3, 4), dtype=torch.uint8)
    loss = model.loss(Batch(x, y), "model", Clock(0, 1))
    torch.testing.assert_close(loss.value, -model.log_prob(x, y).mean())
    torch.testing.assert_close(loss.metrics["bits_per_dim"], loss.value.detach() / 36 / torch.tensor(2.0).log())


def test_default_priors_attend_at_the_top_and_not_below():
    top, bottom = (PixelSnail.defaults(data)[0] for data in (CODES, CONDITIONAL))
    assert top.attention
    assert not bottom.attention


@pytest.mark.parametrize("variant", of_grids)
@pytest.mark.parametrize(
    ("data", "said"),
    [
        (DataSpec("image", (1, 4, 4), None), "integer variant"),
        (DataSpec("image", (1, 4, 4), 1024), "2 to 256"),
        (DataSpec("vector", (4,), 2), "images"),
        (DataSpec("audio", (16,), 256), "codes"),
        (DataSpec("codes", (16,), 8), "one row"),
        (DataSpec("codes", (4, 4), 8, context={"top": DataSpec("codes", (3, 4), 8)}), "divide"),
        (DataSpec("codes", (4, 4), 8, context={"top": DataSpec("codes", (4,), 8)}), "sequence"),
    ],
)
def test_data_that_cannot_be_modelled_is_refused_in_words(variant, data, said):
    model, config = VARIANTS[variant]
    with pytest.raises(DataMismatch, match=said):
        build(model, data, **config)


@variants
def test_missing_conditions_and_wrong_options_are_refused(variant):
    model, config = VARIANTS[variant]
    model = build(model, CONDITIONAL, **config)
    y, context = conditions(CONDITIONAL, 2)
    x = torch.zeros(2, 4, 6, dtype=torch.uint8)
    with pytest.raises(DataMismatch, match="conditional on labels"):
        model.log_prob(x, None, context)
    with pytest.raises(DataMismatch, match="middle"):
        model.log_prob(x, y, {"top": context["top"]})
    with pytest.raises(DataMismatch, match="2 examples need"):
        model.sample(2, y, {name: c[:1] for name, c in context.items()})
    for options in ({"temperature": 0.0}, {"top_p": 0.0}, {"top_p": 1.5}):
        with pytest.raises(ValueError, match="accepted"):
            model.sample(2, y, context, **options)


def test_configurations_that_cannot_be_built_are_refused():
    with pytest.raises(ValueError, match="odd"):
        GatedPixelCNN.Config(kernel=4)
    with pytest.raises(ValueError, match="heads"):
        PixelSnail.Config(channels=20, heads=4)
