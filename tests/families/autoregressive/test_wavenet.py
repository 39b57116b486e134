"""WaveNet: causality and reach by Jacobian, normalisation by enumeration, sampling against the naive loop."""

import itertools

import pytest
import torch
from torch import nn

from dgm_core.contract import Batch, Clock, DataMismatch, DataSpec
from dgm_core.models.autoregressive import base
from dgm_core.models.autoregressive.wavenet import WaveNet

CONTEXT = {
    "pitch": DataSpec("codes", (8,), 6),
    "guide": DataSpec("audio", (24,), 16),
    "envelope": DataSpec("audio", (3,), None),
    "speaker": DataSpec("vector", (4,), None),
}
DATA = {
    "audio": DataSpec("audio", (24,), 16),
    "classes": DataSpec("audio", (24,), 16, classes=3),
    "conditional": DataSpec("audio", (24,), 16, classes=2, context=CONTEXT),
    "codes": DataSpec("codes", (13,), 300, classes=2),
    "mu-law": DataSpec("audio", (24,), 256, classes=2, context={"pitch": DataSpec("codes", (8,), 6)}),
    "16 bits": DataSpec("audio", (24,), 65_536, classes=2, context={"pitch": DataSpec("codes", (8,), 6)}),
}
SOFTMAX, MIXTURE = {"output": "softmax"}, {"output": "logistic_mixture"}
SIZES = {"channels": 6, "hidden": 7, "skip": 8, "head": 9, "mixtures": 3, "condition": 5}
CASES = {
    "softmax": ("audio", SOFTMAX),
    "softmax of a class": ("classes", SOFTMAX),
    "softmax of everything": ("conditional", SOFTMAX),
    "softmax of repeated conditions": ("conditional", {**SOFTMAX, "upsampling": "repeat"}),
    "three taps": ("conditional", {**SOFTMAX, "kernel": 3, "depth": 2, "stacks": 2}),
    "codes": ("codes", SOFTMAX),
    "mixture": ("audio", MIXTURE),
    "mixture of everything": ("conditional", MIXTURE),
    "softmax of 256 levels": ("mu-law", SOFTMAX),
    "mixture over 256 levels": ("mu-law", MIXTURE),
    "mixture over 16 bits": ("16 bits", MIXTURE),
}
cases = pytest.mark.parametrize("case", CASES)


def build(data, **config):
    torch.manual_seed(0)
    sizes = {"stacks": 1, "depth": 3, **SIZES}
    model = WaveNet(WaveNet.tiny(data)[0].merged({**sizes, **config}), data).double().eval()
    with torch.no_grad():
        model.network.bias.uniform_(-1, 1)  # zero at first: an error in it would not show
    return model


def built(case):
    name, config = CASES[case]
    return build(DATA[name], **config), DATA[name]


def conditions(data, n):
    """Labels and contexts for n examples, drawn at random."""

    def draw(spec):
        if spec.levels is None:
            return torch.randn(n, *spec.shape)
        return torch.randint(spec.levels, (n, *spec.shape)).to(spec.dtype)

    y = torch.randint(data.classes, (n,)) if data.classes else None
    return y, {name: draw(spec) for name, spec in data.context.items()}


def naive_sample(model, noise, y, context, temperature=1.0, top_p=1.0):
    """The loop that runs the whole network for every sample."""
    n, length = noise.shape
    canvas = torch.zeros(n, 1, 1, length, dtype=torch.int64)
    for t in range(length):
        said = model.network(canvas, model.conditioner(n, y, context))[:, 0, 0, t]
        canvas[:, 0, 0, t] = model.draw(said, noise[:, t], temperature, top_p)
    return canvas[:, 0, 0].to(model.data.dtype)


class Features(nn.Module):
    """Lets real-valued inputs through in place of the embedding, so that there is something to differentiate by."""

    def forward(self, x, like):
        return x


@pytest.mark.parametrize("config", [SOFTMAX, MIXTURE, {**SOFTMAX, "kernel": 3}], ids=["softmax", "mixture", "3 taps"])
def test_a_sample_depends_on_its_whole_receptive_field_and_on_nothing_else(config):
    network = build(DATA["audio"], stacks=2, depth=2, **config).network
    features = network.embed.width
    network.embed = Features()
    taps = config.get("kernel", 2) - 1
    field = taps + taps * 2 * (1 + 2) + 1  # the first convolution's taps, two stacks of dilations 1 and 2, and itself
    x = torch.randn(1, features, 1, 24, dtype=torch.float64)
    jacobian = torch.autograd.functional.jacobian(lambda x: network(x, None)[0, 0, 0].pow(2).sum(-1), x)
    influence = jacobian.abs().sum((1, 2, 3)) != 0
    seen = torch.ones(24, 24).tril(-1).triu(-field)
    assert torch.equal(influence, seen.bool())


def test_the_receptive_field_of_the_paper():
    """Three stacks of dilations 1 … 512 (§2.1: each stack alone reaches 1024 samples)."""
    config = WaveNet.Config(**SIZES)
    network = WaveNet(config, DATA["audio"]).network
    assert network.stack.past == 3 * 1023
    assert [layer.conv.dilation for layer in network.stack.layers] == [2**i for i in range(10)] * 3
    one = WaveNet(config.merged({"stacks": 1}), DATA["audio"]).network
    assert one.stack.past + 1 == 1024


def test_gradients_reach_every_parameter():
    for name, config in (("conditional", SOFTMAX), ("conditional", MIXTURE), ("codes", SOFTMAX)):
        data = DATA[name]
        model = build(data, **config)
        y, context = conditions(data, 16)
        x = torch.randint(data.levels, (16, *data.shape))
        model.log_prob(x, y, context).sum().backward()
        assert not [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()]


@pytest.mark.parametrize(
    ("data", "config"),
    [
        (DataSpec("audio", (4,), 3, classes=2), SOFTMAX),
        (DataSpec("audio", (4,), 3, classes=2), MIXTURE),
        (DataSpec("codes", (4,), 3, context={"top": DataSpec("codes", (2,), 4)}), SOFTMAX),
        (DataSpec("audio", (4,), 3, context={"top": DataSpec("codes", (2,), 4)}), MIXTURE),
    ],
    ids=["softmax", "mixture", "codes of a context", "mixture of a context"],
)
def test_probabilities_of_all_sequences_sum_to_one(data, config):
    model = build(data, **config)
    space = torch.tensor(list(itertools.product(range(data.levels), repeat=data.dims))).to(data.dtype)
    seen = set()
    for i in range(2):
        _, context = conditions(data, 1)
        y = torch.full((len(space),), i) if data.classes else None
        context = {name: c.expand(len(space), *c.shape[1:]) for name, c in context.items()}
        log_prob = model.log_prob(space, y, context)
        assert abs(log_prob.exp().sum().item() - 1) <= 1e-12  # float64 sums of 81 terms
        seen.add(round(log_prob[1].item(), 12))
    assert len(seen) > 1, "labels and context have no influence"


@cases
@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_cached_sampling_equals_the_naive_loop_token_for_token(case, temperature):
    model, data = built(case)
    y, context = conditions(data, 3)
    torch.manual_seed(1)
    drawn = model.sample(3, y, context, temperature=temperature)
    torch.manual_seed(1)
    noise = torch.rand(3, 1, 1, data.dims, dtype=torch.float64)[:, 0, 0]
    with torch.no_grad():
        naive = naive_sample(model, noise, y, context, temperature)
    assert drawn.dtype == data.dtype
    assert torch.equal(drawn, naive)
    assert len(naive.unique()) > 2


def test_the_nucleus_is_cut_by_cached_and_naive_alike():
    model, data = built("softmax of a class")
    y, _ = conditions(data, 3)
    torch.manual_seed(1)
    drawn = model.sample(3, y, top_p=0.5)
    torch.manual_seed(1)
    noise = torch.rand(3, 1, 1, data.dims, dtype=torch.float64)[:, 0, 0]
    with torch.no_grad():
        assert torch.equal(drawn, naive_sample(model, noise, y, {}, top_p=0.5))
        assert not torch.equal(drawn, naive_sample(model, noise, y, {}))


@cases
@torch.no_grad()
def test_stepped_log_probabilities_equal_the_forward_pass(case):
    model, data = built(case)
    y, context = conditions(data, 2)
    x = torch.randint(data.levels, (2, 1, 1, data.dims))
    memory = model.network.start(x, model.conditioner(2, y, context))
    said = [model.network.step(memory, 0, t, 0) for t in range(data.dims)]
    stepped = model.log_likelihood(x, torch.stack(said, 1)[:, None, None])
    # 1e-5 is the promise in single precision; float64 rounding over 24 samples stays far below 1e-10.
    torch.testing.assert_close(stepped, model.log_prob(x.view(2, -1), y, context), rtol=0, atol=1e-10)


@torch.no_grad()
def test_stepped_log_probabilities_in_single_precision():
    for case in CASES:
        model, data = built(case)
        model.float()
        y, context = conditions(data, 2)
        x = torch.randint(data.levels, (2, 1, 1, data.dims))
        memory = model.network.start(x, model.conditioner(2, y, context))
        said = torch.stack([model.network.step(memory, 0, t, 0) for t in range(data.dims)], 1)[:, None, None]
        stepped = model.log_likelihood(x, said) / data.dims  # nats a sample, the promise's unit
        whole = model.log_prob(x.view(2, -1), y, context) / data.dims
        torch.testing.assert_close(stepped, whole, rtol=0, atol=1e-5)


@cases
def test_completing_any_prefix_of_a_sample_with_its_own_noise_gives_it_back(case):
    model, data = built(case)
    y, context = conditions(data, 2)
    torch.manual_seed(1)
    drawn = model.sample(2, y, context)
    for known in range(data.dims + 1):
        observed = (torch.arange(data.dims) < known).expand(2, -1)
        torch.manual_seed(1)
        assert torch.equal(model.complete(drawn.masked_fill(~observed, 0), observed, y, context), drawn)


def test_prefixes_of_different_lengths_complete_in_one_batch():
    model, data = built("softmax of everything")
    y, context = conditions(data, 3)
    torch.manual_seed(1)
    drawn = model.sample(3, y, context)
    observed = torch.arange(data.dims) < torch.tensor([[5], [24], [11]])
    torch.manual_seed(1)
    assert torch.equal(model.complete(drawn.masked_fill(~observed, 0), observed, y, context), drawn)


def test_a_known_prefix_is_taken_in_at_once(monkeypatch):
    model, data = built("softmax")
    stepped = []
    step = model.network.step
    monkeypatch.setattr(model.network, "step", lambda memory, r, c, k: (stepped.append(c), step(memory, r, c, k))[1])
    observed = (torch.arange(data.dims) < 20).expand(2, -1)
    model.complete(torch.zeros(2, data.dims, dtype=torch.uint8), observed)
    assert stepped == [20, 21, 22, 23]
    with pytest.raises(DataMismatch, match="given_preceding"):
        model.complete(torch.zeros(2, data.dims, dtype=torch.uint8), ~observed)


def test_samples_follow_the_exact_probabilities():
    for config in (SOFTMAX, MIXTURE):
        data = DataSpec("audio", (3,), 3)
        model = build(data, **config)
        n = 5_000
        counts = torch.bincount(model.sample(n).long() @ torch.tensor([9, 3, 1]), minlength=27)
        space = torch.tensor(list(itertools.product(range(3), repeat=3)))
        probs = model.log_prob(space).exp()
        statistic = ((counts - n * probs).square() / (n * probs)).sum().item()
        assert statistic < 61.7  # chi-square, 26 degrees of freedom: exceeded once in 10,000 seeds


def test_ranks_that_share_the_noise_draw_the_shares_of_one_batch(monkeypatch):
    model, data = built("softmax of everything")
    y, context = conditions(data, 4)
    noise = torch.rand(4, 1, 1, data.dims, dtype=torch.float64)
    monkeypatch.setattr(base, "draw_noise", lambda canvas, dtype: noise)
    whole = model.sample(4, y, context)
    for rows in (slice(0, 1), slice(1, 4)):
        monkeypatch.setattr(base, "draw_noise", lambda canvas, dtype, rows=rows: noise[rows])
        part = model.sample(rows.stop - rows.start, y[rows], {name: c[rows] for name, c in context.items()})
        assert torch.equal(part, whole[rows])


def test_local_conditions_act_at_their_own_time():
    """Repeated, a context's element acts on the samples of its own stretch, and through those on none before."""
    data = DataSpec("audio", (12,), 4, context={"pitch": DataSpec("codes", (3,), 5)})
    x = torch.randint(4, (1, 1, 1, 12))
    for upsampling, first in (("repeat", 4), ("transposed", 2)):  # a transposed one also sees half a stretch before it
        model = build(data, upsampling=upsampling)
        said = [model.network(x, model.conditioner(1, None, {"pitch": torch.tensor([[1, k, 2]])})) for k in (0, 3)]
        differs = (said[0] != said[1])[0, 0, 0].any(1).nonzero().flatten()
        assert differs.min().item() == first


@torch.no_grad()
@pytest.mark.parametrize("config", [SOFTMAX, MIXTURE], ids=["softmax", "mixture"])
def test_a_class_and_a_speaker_act_on_every_sample_from_the_first(config):
    data = DataSpec("audio", (24,), 16, classes=2, context={"speaker": DataSpec("vector", (4,), None)})
    model = build(data, **config)
    x, speaker = torch.randint(16, (1, 24)), torch.randn(1, 4, dtype=torch.float64)
    terms = [
        model.log_conditionals(x, torch.tensor([y]), {"speaker": s})[0, 0, 0]
        for y, s in ((0, speaker), (1, speaker), (0, -speaker))
    ]
    assert (terms[0] != terms[1]).all(), "the class"
    assert (terms[0] != terms[2]).all(), "the speaker"


def test_labels_are_drawn_when_none_are_given_and_unused_when_not_wanted():
    data = DATA["classes"]
    assert build(data).sample(2).shape == (2, 24)
    plain = build(data, conditional=False)
    x = torch.randint(16, (2, 24), dtype=torch.uint8)
    assert torch.equal(plain.log_prob(x, torch.tensor([0, 1])), plain.log_prob(x))


def test_loss_is_the_mean_of_the_negative_log_likelihood():
    for case in ("softmax of a class", "mixture"):
        model, data = built(case)
        y, _ = conditions(data, 3)
        x = torch.randint(16, (3, 24), dtype=torch.uint8)
        loss = model.loss(Batch(x, y), "model", Clock(0, 1))
        torch.testing.assert_close(loss.value, -model.log_prob(x, y).mean())
        bits = loss.value.detach() / 24 / torch.tensor(2.0).log()
        torch.testing.assert_close(loss.metrics["bits_per_dim"], bits)


def test_the_output_goes_by_the_data():
    assert WaveNet.defaults(DataSpec("audio", (8,), 256))[0].output == "softmax"
    assert WaveNet.defaults(DataSpec("audio", (8,), 65536))[0].output == "logistic_mixture"
    assert WaveNet.defaults(DataSpec("codes", (8,), 512))[0].output == "softmax"


@pytest.mark.parametrize(
    ("data", "config", "said"),
    [
        (DataSpec("audio", (8,), None), SOFTMAX, "mu_law"),
        (DataSpec("audio", (8,), 1024), SOFTMAX, "logistic_mixture"),
        (DataSpec("codes", (8,), 16), MIXTURE, "no order"),
        (DataSpec("codes", (2, 4), 16), SOFTMAX, r"audio and codes \(T,\)"),
        (DataSpec("image", (1, 4, 4), 2), SOFTMAX, r"audio and codes \(T,\)"),
        (DataSpec("audio", (8,), 16, context={"pitch": DataSpec("codes", (3,), 5)}), SOFTMAX, "divide"),
        (DataSpec("audio", (8,), 16, context={"pitch": DataSpec("codes", (16,), 5)}), SOFTMAX, "divide"),
        (DataSpec("audio", (8,), 16, context={"top": DataSpec("codes", (2, 2), 5)}), SOFTMAX, "vectors"),
    ],
)
def test_data_that_cannot_be_modelled_is_refused_in_words(data, config, said):
    with pytest.raises(DataMismatch, match=said):
        build(data, **config)


def test_a_nucleus_of_a_mixture_is_refused():
    model, _ = built("mixture")
    with pytest.raises(ValueError, match="needs output softmax"):
        model.sample(1, top_p=0.9)
