"""VQ-VAE with a WaveNet: the loss as printed, the bound by enumeration, sampling against the naive loop, conversion."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from dgm_core.contract import Clock, DataMismatch, DataSpec
from dgm_core.models.autoregressive.wavenet import WaveNet
from dgm_core.models.latent.vq_vae_wavenet import VQVAEWaveNet
from dgm_core.models.two_stage import TwoStage
from dgm_core.nn.incremental import draw_categorical
from dgm_core.nn.quantiser import nearest
from tests.support import Tensors, examples

CLIP = DataSpec("audio", (32,), 16, classes=3, class_shares=(0.2, 0.3, 0.5))
START = Clock(0, 10)


def build(data: DataSpec = CLIP, **config: Any) -> VQVAEWaveNet:
    """The tiny model in float64, with codes that differ and a decoder that hears them."""
    torch.manual_seed(0)
    model = VQVAEWaveNet(VQVAEWaveNet.tiny(data)[0].merged(config), data).double().eval()
    with torch.no_grad():
        model.quantiser("top").codebook.copy_(torch.randn(model.config.codes, model.config.code_features))
        model.network.bias.uniform_(-1, 1)  # zero at first: an error in it would not show
    return model


def clips(n: int, data: DataSpec = CLIP) -> Tensor:
    return torch.randint(data.levels or 0, (n, data.dims)).to(data.dtype)


def conditioned(model: VQVAEWaveNet, e: Tensor, y: Tensor | None) -> Tensor:
    """What the decoder hears: the codes at the samples' rate and, alike at all times, the label."""
    assert model.label is not None
    assert y is not None
    return model.upsample(model.to_condition(e[:, :, None])) + model.label(y)[:, :, None, None]


def test_reduction_is_the_papers():
    """Six convolutions of stride 2 and window 4: 64 × fewer codes than samples, 8 bits for 9."""
    data = DataSpec("audio", (6400,), 256, classes=109)
    with torch.device("meta"):
        model = VQVAEWaveNet(VQVAEWaveNet.defaults(data)[0], data)
    convs = [layer for layer in model.encoder if isinstance(layer, torch.nn.Conv1d)]
    assert [(c.stride, c.kernel_size) for c in convs] == [((2,), (4,))] * 6
    assert model.grids == {"top": (100,)}
    assert model.config.codes == 512
    assert model.reduction == pytest.approx(64 * 8 / 9)
    specs = model.code_specs()
    assert specs["top"] == DataSpec("codes", (100,), 512, 109)
    assert model.config.conditional
    assert not VQVAEWaveNet.defaults(DataSpec("audio", (6400,), 256))[0].conditional


@pytest.mark.parametrize("codebook", ["loss", "ema"])
def test_loss_is_equation_3(codebook):
    model = build(codebook=codebook, beta=0.7)
    batch = examples(CLIP, 6)
    loss = model.loss(batch, "model", START)
    z = model.to_code(model.encoder(2 * batch.x.double()[:, None] / 15 - 1))
    rows = z.movedim(1, -1).reshape(-1, model.config.code_features)
    table = model.quantiser("top").codebook
    e = table[nearest(rows, table)].view(6, 4, -1).movedim(-1, 1)
    gap = (z - e).square().mean()
    condition = conditioned(model, e, batch.y)
    logits = model.network(batch.x.long()[:, None, None], condition)
    nats = F.cross_entropy(logits.flatten(0, -2), batch.x.long().flatten())
    torch.testing.assert_close(loss.value, nats + (0.7 if codebook == "ema" else 1.7) * gap)
    torch.testing.assert_close(loss.metrics["bits_per_dim_given_codes"], nats.detach() / math.log(2))
    expected = -32 * nats - 4 * math.log(4)
    torch.testing.assert_close(model.log_prob(batch.x, batch.y).mean(), expected)


def test_means_over_samples_and_features_are_the_papers_sum_a_code():
    """Eq. 3 sums over a code's 64 samples and D = 64 features; the loss is that sum's mean over codes, over 64."""
    data = DataSpec("audio", (128,), 8)
    model = build(data, downsample=64, code_features=64)
    batch = examples(data, 3)
    state, levels = model._encode(2 * batch.x.double() / 7 - 1)
    z = model.to_code(model.encoder(2 * batch.x.double()[:, None] / 7 - 1))
    nats = -model._log_likelihood(batch.x, state, None).sum()
    squares = (z - model.quantiser("top").look_up(levels["top"].codes)).square().sum()
    codes = 3 * 2
    torch.testing.assert_close(model.loss(batch, "model", START).value, (nats + 1.25 * squares) / codes / 64)


def test_gradients_reach_every_parameter():
    model = build()
    model.train().loss(examples(CLIP, 8), "model", START).value.backward()
    missed = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    # Of a label that does not occur nothing is learnt, but its embedding's rows are one parameter.
    assert missed == []


def test_the_bound_is_below_what_enumeration_gives():
    """log p(x | y) = log Σ_z p(x | z, y) K^−n over every sequence of codes; and p(x | y) sums to one over x."""
    data = DataSpec("audio", (4,), 3, classes=2)
    model = build(data, downsample=2, codes=3)
    space = torch.tensor(list(itertools.product(range(3), repeat=4))).to(torch.uint8)
    y = torch.ones(len(space), dtype=torch.int64)
    table = model.quantiser("top")
    with torch.no_grad():
        every = [
            model._log_likelihood(space, table.look_up(torch.tensor([pair])).expand(len(space), -1, -1), y)
            for pair in itertools.product(range(3), repeat=2)
        ]
        exact = torch.stack(every).logsumexp(0) - 2 * math.log(3)
        bound = model.log_prob(space, y)
    # Rounding in float64 of sums of 81 × 9 numbers.
    assert exact.exp().sum().item() == pytest.approx(1, abs=1e-12)
    assert (bound < exact).all()
    assert 0 < bound.exp().sum().item() < 1


def naive(model: VQVAEWaveNet, noise: Tensor, condition: Tensor, temperature: float, top_p: float) -> Tensor:
    """The loop that runs the whole decoder for every sample."""
    canvas = torch.zeros(noise.shape[0], 1, 1, model.data.dims, dtype=torch.int64)
    for t in range(model.data.dims):
        logits = model.network(canvas, condition)[:, 0, 0, t]
        canvas[:, 0, 0, t] = draw_categorical(logits, noise[:, 0, 0, t], temperature, top_p)
    return canvas[:, 0, 0]


@torch.no_grad()
@pytest.mark.parametrize("upsampling", ["transposed", "repeat"])
@pytest.mark.parametrize(("temperature", "top_p"), [(1.0, 1.0), (0.7, 0.8)])
def test_decoding_equals_the_naive_loop_token_for_token(upsampling, temperature, top_p):
    model = build(upsampling=upsampling)
    codes = {"top": torch.randint(4, (3, 4))}
    y = torch.tensor([0, 1, 2])
    torch.manual_seed(1)
    drawn = model.decode_codes(codes, y, temperature=temperature, top_p=top_p)
    torch.manual_seed(1)
    noise = torch.rand(3, 1, 1, 32, dtype=torch.float64)
    condition = conditioned(model, model.quantiser("top").codebook[codes["top"]].movedim(-1, 1), y)
    assert torch.equal(drawn.long(), naive(model, noise, condition, temperature, top_p))
    assert drawn.dtype == torch.float64
    assert len(drawn.unique()) > 2


@torch.no_grad()
def test_swapping_the_condition_changes_the_voice_and_keeps_the_codes():
    """The encoder does not hear the label: what is said and who says it are chosen apart."""
    model = build()
    x = clips(3)
    y, other = torch.tensor([0, 1, 2]), torch.tensor([2, 0, 1])
    codes = model.codes(x)
    assert torch.equal(codes["top"], model.codes(x, other)["top"])
    said = []
    for label in (y, y, other):
        torch.manual_seed(1)
        said.append(model.decode_codes(codes, label))
    assert torch.equal(said[0], said[1])
    assert not torch.equal(said[0], said[2])
    assert not torch.allclose(model.log_prob(x, y), model.log_prob(x, other))
    with pytest.raises(DataMismatch, match="give y"):
        model.decode_codes(codes)


@torch.no_grad()
def test_a_code_acts_on_its_own_stretch_and_on_what_follows_it_alone():
    """Repeated, code i is heard from sample 8 i on; a transposed convolution also reaches half a stretch before."""
    x = clips(1).long()[:, None, None]
    for upsampling, first in (("repeat", 16), ("transposed", 12)):
        model = build(upsampling=upsampling)
        y = torch.tensor([0])
        said = [
            model.network(x, model._condition(model.quantiser("top").look_up(torch.tensor([[1, 1, k, 2]])), y))
            for k in (0, 3)
        ]
        differs = (said[0] != said[1])[0, 0, 0].any(1).nonzero().flatten()
        assert differs.min().item() == first


@torch.no_grad()
def test_a_code_hears_its_own_stretch_and_its_neighbours():
    """Three convolutions of window 4 and stride 2 see 22 samples: 8 of the code's own and 7 to either side."""
    model = build()
    x = torch.full((32, 32), 7.0, dtype=torch.float64)
    x[torch.arange(32), torch.arange(32)] = 9.0
    base = model.to_code(model.encoder(torch.full((1, 1, 32), 7.0, dtype=torch.float64)))
    heard = (model.to_code(model.encoder(x[:, None])) != base).any(1)  # [sample, code]
    expected = torch.zeros(32, 4, dtype=torch.bool)
    for i in range(4):
        expected[max(0, 8 * i - 7) : 8 * i + 15, i] = True
    assert not (heard & ~expected).any()
    assert heard.sum() > 0.9 * expected.sum()  # a rectifier may hide a sample from every channel


@torch.no_grad()
def test_samples_draw_codes_by_their_use():
    model = build()
    model.quantiser("top").usage.copy_(F.one_hot(torch.tensor(2), 4))
    assert all((codes == 2).all() for codes in model.draw_codes(5).values())
    x = model.sample(5)
    assert x.shape == (5, 32)
    assert x.dtype == torch.uint8
    with pytest.raises(DataMismatch, match="labels lie in"):
        model.sample(1, torch.tensor([3]))
    with pytest.raises(ValueError, match="temperature"):
        model.sample(1, temperature=0.0)


def test_k_means_starts_the_codebook_on_what_the_encoder_says():
    model = build()
    before = model.quantiser("top").codebook.detach().clone()
    model.enter("model", Tensors(examples(CLIP, 60)).one_pass(10))
    after = model.quantiser("top").codebook.detach()
    z = model.to_code(model.encoder(2 * examples(CLIP, 60).x.double()[:, None] / 15 - 1))
    rows = z.movedim(1, -1).reshape(-1, 8).detach()
    left = [(rows - table[nearest(rows, table)]).square().sum() for table in (before, after)]
    assert left[1] < 0.5 * (rows - rows.mean(0)).square().sum()
    assert left[1] < left[0]


@torch.no_grad()
def test_a_wavenet_is_a_prior_of_its_codes():
    model = build()
    spec = model.code_specs()["top"]
    prior = WaveNet(WaveNet.tiny(spec)[0], spec).double().eval()
    both = TwoStage(model, {"top": prior})
    x = both.sample(2, torch.tensor([0, 1]), temperature=0.9)
    assert x.shape == (2, 32)
    assert x.dtype == torch.uint8
    assert both.code_log_prob(clips(2), torch.tensor([0, 1]))["top"].shape == (2,)


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (DataSpec("audio", (32,), None), "mu_law"),
        (DataSpec("audio", (32,), 65536), "mu_law"),
        (DataSpec("codes", (32,), 16), "models audio"),
        (DataSpec("image", (1, 8, 8), 16), "models audio"),
        (DataSpec("audio", (100,), 16), "64 and 128.*length"),
    ],
)
def test_data_that_cannot_be_modelled_is_refused_in_words(data, said):
    config = VQVAEWaveNet.tiny(data)[0].merged({"downsample": 64 if data.dims == 100 else 8})
    with pytest.raises(DataMismatch, match=said):
        VQVAEWaveNet(config, data)
