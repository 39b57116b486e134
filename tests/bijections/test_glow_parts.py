"""What Glow is made of: activation normalisation, 1 × 1 convolutions, its couplings and splits."""

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from dgm_core import distributed
from dgm_core.bijections import (
    ActNorm,
    ActNormConv2d,
    Additive,
    Bijection,
    Chain,
    ChannelCoupling,
    Flatten,
    LUConvolution,
    NormalizedConvolution,
    PlainConvolution,
    Rescale,
    SigmoidAffine,
    SplitPrior,
    Squeeze,
    Transformer,
    starting,
)
from dgm_core.nn.norm import batch_moments
from tests.support import TwoRanks

# Exact algebra in float64: rounding of some hundred operations leaves three orders of magnitude to spare.
EXACT = {"rtol": 0, "atol": 1e-8}


def coupling(channels: int, transformer: Transformer) -> Bijection:
    half = channels // 2
    net = nn.Sequential(ActNormConv2d(half, 5, 3), nn.ReLU(), nn.Conv2d(5, transformer.outputs * half, 1))
    return ChannelCoupling(net, transformer, swap=False)


def split(channels: int, rest: Bijection) -> Bijection:
    prior = nn.Conv2d(channels // 2, channels, 3, padding=1)
    return SplitPrior(rest, prior, (channels, 2, 3))


def level() -> Bijection:
    rest = Chain(ActNorm(2), PlainConvolution(2), Flatten((2, 2, 3)))
    mix = NormalizedConvolution(ActNorm(4), LUConvolution(4))
    return Chain(Squeeze(), mix, coupling(4, SigmoidAffine()), split(4, rest))


CASES: dict[str, tuple[Callable[[], Bijection], tuple[int, ...]]] = {
    "act_norm": (lambda: ActNorm(3), (3, 2, 2)),
    "act_norm_of_vectors": (lambda: ActNorm(4), (4,)),
    "lu": (lambda: LUConvolution(5), (5, 2, 2)),
    "plain": (lambda: PlainConvolution(5), (5, 2, 2)),
    "normalized_lu": (lambda: NormalizedConvolution(ActNorm(3), LUConvolution(3)), (3, 2, 4)),
    "normalized_plain": (lambda: NormalizedConvolution(ActNorm(3), PlainConvolution(3)), (3, 2, 4)),
    "additive": (lambda: coupling(4, Additive()), (4, 2, 3)),
    "affine": (lambda: coupling(4, SigmoidAffine()), (4, 2, 3)),
    "rescale": (lambda: Rescale(-0.5, -1 / 7), (2, 3)),
    "split_prior": (lambda: split(4, Flatten((2, 2, 3))), (4, 2, 3)),
    "level": (level, (1, 4, 6)),
}


def perturbed(bijection: Bijection) -> Bijection:
    """Away from the start, in float64."""
    bijection.double().eval()
    with torch.no_grad():
        for p in bijection.parameters():
            p.add_(0.3 * torch.randn_like(p))
    return bijection


@pytest.mark.parametrize("name", CASES)
def test_inverse_and_log_det(name: str) -> None:
    torch.manual_seed(0)
    build, shape = CASES[name]
    bijection = perturbed(build())
    x = torch.randn(3, *shape, dtype=torch.float64)
    z, log_det = bijection(x)
    back, log_det_back = bijection.inverse(z)
    torch.testing.assert_close(back, x, **EXACT)
    torch.testing.assert_close(log_det_back, -log_det, **EXACT)
    assert log_det.shape == (3,)
    for i in range(3):
        jacobian = torch.autograd.functional.jacobian(
            lambda flat: bijection(flat.reshape(1, *shape))[0].flatten(), x[i].flatten()
        )
        torch.testing.assert_close(log_det[i], torch.linalg.slogdet(jacobian)[1], **EXACT)


def moments_of(x: Tensor) -> tuple[Tensor, Tensor]:
    axes = [0, *range(2, x.ndim)]
    return x.mean(axes), x.var(axes, correction=0)


def uneven(rows: int, *shape: int) -> Tensor:
    """Channels of different means and scales."""
    x = torch.randn(rows, *shape, dtype=torch.float64)
    scale = torch.linspace(0.1, 5, shape[0], dtype=torch.float64).reshape(-1, *(1,) * (len(shape) - 1))
    return x * scale + 3 * scale


def test_start_whitens_every_layer_in_one_pass() -> None:
    """Each activation normalisation puts out mean 0 and variance 1, those folded into a convolution too."""
    torch.manual_seed(0)
    flow = level().double()
    inputs: dict[str, Tensor] = {}
    layers = {n: m for n, m in flow.named_modules() if isinstance(m, ActNorm | ActNormConv2d | NormalizedConvolution)}
    reached = {n: m for n, m in layers.items() if not n.endswith("norm")}
    assert len(reached) == 3
    for name, layer in reached.items():
        layer.register_forward_hook(lambda _, x, __, name=name: inputs.update({name: x[0]}))
    x = uneven(20, 1, 4, 6)
    with torch.no_grad(), starting(flow, batch_moments):
        flow(x)
    assert set(inputs) == set(reached)
    for name, layer in reached.items():
        out = inputs[name]
        if isinstance(layer, ActNormConv2d):
            out = layer(out)
        else:
            out, _ = (layer.norm if isinstance(layer, NormalizedConvolution) else layer)(out)
        mean, variance = moments_of(out)
        torch.testing.assert_close(mean, torch.zeros_like(mean), **EXACT, msg=name)
        torch.testing.assert_close(variance, torch.ones_like(variance), **EXACT, msg=name)
    assert all(v.item() for k, v in flow.state_dict().items() if k.endswith("started"))


def test_starts_once_and_only_when_asked() -> None:
    torch.manual_seed(0)
    layer = ActNorm(3).double()
    x = uneven(10, 3, 2)
    assert torch.equal(layer(x)[0], x)  # not started: the identity, whatever comes in
    with starting(layer, batch_moments):
        layer(x)
    first = {k: v.clone() for k, v in layer.state_dict().items()}
    with starting(layer, batch_moments):
        layer(5 * x + 1)
    again = ActNorm(3).double()
    again.load_state_dict(first)
    with starting(again, batch_moments):
        again(5 * x + 1)
    for state in (layer.state_dict(), again.state_dict()):
        assert all(torch.equal(state[k], v) for k, v in first.items())


def test_a_constant_channel_keeps_its_scale() -> None:
    layer = ActNorm(2).double()
    x = uneven(8, 2)
    x[:, 1] = 4.0
    with starting(layer, batch_moments):
        z, _ = layer(x)
    assert torch.equal(z[:, 1], torch.zeros(8, dtype=torch.float64))
    assert layer.log_scale[1] == 0


def start_on_a_share(rows: int) -> dict[str, Tensor]:
    """A level started by this rank's share of the first batch: rank 1 of 2 has `rows` of 10."""
    torch.manual_seed(0)
    flow = level().double()
    x = uneven(10, 1, 4, 6)
    if distributed.world_size() == 2:
        x = x[10 - rows :] if distributed.rank() else x[: 10 - rows]
    with torch.no_grad(), starting(flow, batch_moments):
        flow(x)
    return flow.state_dict()


@pytest.mark.parametrize("rows", [5, 3, 0])
def test_start_spans_all_ranks(rows: int, two_ranks: TwoRanks) -> None:
    """Two ranks start from the global batch, also where the second has fewer rows, or none."""
    one = start_on_a_share(0)
    for two in two_ranks.run(start_on_a_share, rows):
        for name, value in one.items():
            torch.testing.assert_close(two[name], value, **EXACT)


def test_folded_convolution_is_convolution_then_normalisation() -> None:
    torch.manual_seed(0)
    layer = ActNormConv2d(2, 4, 3).double()
    with torch.no_grad():
        layer.norm.shift.normal_()
        layer.norm.log_scale.normal_()
    x = torch.randn(3, 2, 4, 5, dtype=torch.float64)
    plain = nn.functional.conv2d(x, layer.weight, padding=1)
    expected = (plain + layer.norm.shift[:, None, None]) * (3 * layer.norm.log_scale).exp()[:, None, None]
    torch.testing.assert_close(layer(x), expected, **EXACT)
    torch.testing.assert_close(layer(x), layer.norm(plain)[0], **EXACT)


@pytest.mark.parametrize("build", [LUConvolution, PlainConvolution])
def test_normalized_convolution_is_the_two_in_turn(build: type[LUConvolution] | type[PlainConvolution]) -> None:
    torch.manual_seed(0)
    norm, mix = ActNorm(4), build(4)
    folded, chain = perturbed(NormalizedConvolution(norm, mix)), Chain(norm, mix)
    x = torch.randn(2, 4, 3, 2, dtype=torch.float64)
    for mine, theirs in zip((*folded(x), *folded.inverse(x)), (*chain(x), *chain.inverse(x)), strict=True):
        torch.testing.assert_close(mine, theirs, **EXACT)


@pytest.mark.parametrize("channels", [1, 2, 6])
def test_convolutions_start_as_rotations(channels: int) -> None:
    torch.manual_seed(channels)
    for layer in (LUConvolution(channels), PlainConvolution(channels)):
        W, log_det = layer.matrix()
        # The rotation is drawn in float32, some hundred operations deep.
        torch.testing.assert_close(W @ W.mT, torch.eye(channels), rtol=0, atol=1e-5)
        assert torch.linalg.det(W).item() == pytest.approx(1, abs=1e-5)
        assert log_det.item() == pytest.approx(0, abs=1e-5)


def test_lu_is_the_plain_convolution_of_its_product() -> None:
    """W = P L (U + diag(s)) by hand, and the same map, log-determinant and inverse as W's own."""
    torch.manual_seed(0)
    lu = LUConvolution(5).double()
    with torch.no_grad():
        lu.factors.add_(0.3 * torch.randn(5, 5))
    a = lu.factors.detach()
    s = lu.sign * a.diagonal().exp()
    lower, upper = a.tril(-1) + torch.eye(5, dtype=torch.float64), a.triu(1) + s.diag()
    plain = PlainConvolution(5).double()
    with torch.no_grad():
        plain.weight.copy_(lu.permutation @ lower @ upper)

    x = torch.randn(2, 5, 3, 4, dtype=torch.float64)
    for mine, theirs in zip(lu(x), plain(x), strict=True):
        torch.testing.assert_close(mine, theirs, **EXACT)
    for mine, theirs in zip(lu.inverse(x), plain.inverse(x), strict=True):
        torch.testing.assert_close(mine, theirs, **EXACT)
    torch.testing.assert_close(lu(x)[0], torch.einsum("ij,bjhw->bihw", plain.weight, x), **EXACT)
    assert lu(x)[1][0].item() == pytest.approx(12 * a.diagonal().sum().item(), abs=1e-8)
    assert sum(p.numel() for p in lu.parameters()) == 25


@pytest.mark.parametrize("build", [LUConvolution, PlainConvolution])
def test_every_entry_of_the_matrix_is_learnt(build: type[LUConvolution] | type[PlainConvolution]) -> None:
    torch.manual_seed(0)
    layer = build(4).double()
    x = torch.randn(2, 4, 2, 2, dtype=torch.float64)
    z, log_det = layer(x)
    (z.pow(3).sum() + log_det.sum()).backward()
    (parameter,) = layer.parameters()
    assert parameter.grad is not None
    assert (parameter.grad.abs() > 1e-9).all()


@pytest.mark.parametrize("build", [LUConvolution, PlainConvolution])
def test_autocasting_does_not_reach_the_map(build: type[LUConvolution] | type[PlainConvolution]) -> None:
    torch.manual_seed(0)
    layer = NormalizedConvolution(ActNorm(6), build(6))
    x = torch.randn(2, 6, 3, 3)
    plain, _ = layer(x)
    with torch.autocast("cpu", torch.bfloat16):
        z, _ = layer(x)
        back, _ = layer.inverse(z)
    assert z.dtype == torch.float32
    assert torch.equal(z, plain)
    # float32 through a rotation and back; bfloat16 would be off by 1e-2.
    torch.testing.assert_close(back, x, rtol=0, atol=1e-5)


def test_affine_scale_is_a_sigmoid_between_its_bounds() -> None:
    x, h = torch.full((1, 1), 2.0, dtype=torch.float64), torch.tensor([[0.7, 0.0]], dtype=torch.float64)
    z, log_slope = SigmoidAffine()(x, h)
    scale = 0.01 + 0.99 / (1 + math.exp(-2))
    assert z.item() == pytest.approx(2 * scale + 0.7, abs=1e-12)
    assert log_slope.item() == pytest.approx(math.log(scale), abs=1e-12)
    for raw, bound in ((-1e6, 0.01), (1e6, 1.0)):
        _, log_slope = SigmoidAffine()(x, torch.tensor([[0.0, raw]], dtype=torch.float64))
        assert log_slope.item() == pytest.approx(math.log(bound), abs=1e-12)


def test_transformers_leave_what_does_not_move() -> None:
    x, h = torch.randn(2, 4, dtype=torch.float64), torch.randn(2, 8, dtype=torch.float64)
    moves = torch.tensor([1.0, 0.0, 0.0, 1.0], dtype=torch.float64)
    for transformer in (SigmoidAffine(), Additive()):
        steered = h[:, : 4 * transformer.outputs]
        z, log_slope = transformer(x, steered, moves)
        everywhere, slope_everywhere = transformer(x, steered)
        assert torch.equal(z[:, 1:3], x[:, 1:3])
        assert torch.equal(log_slope[:, 1:3], torch.zeros(2, 2, dtype=torch.float64))
        assert torch.equal(z[:, ::3], everywhere[:, ::3])
        assert torch.equal(log_slope[:, ::3], slope_everywhere[:, ::3])
        back, _ = transformer.inverse(z, steered, moves)
        torch.testing.assert_close(back, x, **EXACT)


def test_split_prior_is_a_gaussian_given_what_goes_on() -> None:
    """log N(z; 0, I) + log |det| = log N(x₁; 0, I) + log N(x₂; μ(x₁), σ(x₁)²), and z₂ = 0 is the mean."""
    torch.manual_seed(0)
    bijection = perturbed(split(4, Flatten((2, 2, 3))))
    assert isinstance(bijection, SplitPrior)
    x = torch.randn(3, 4, 2, 3, dtype=torch.float64)
    z, log_det = bijection(x)
    standard = torch.distributions.Normal(0.0, 1.0)
    goes_on, done = x.chunk(2, 1)
    mean, log_scale = bijection.prior(goes_on).chunk(2, 1)
    given = torch.distributions.Normal(mean, log_scale.exp())
    expected = standard.log_prob(goes_on).flatten(1).sum(1) + given.log_prob(done).flatten(1).sum(1)
    torch.testing.assert_close(standard.log_prob(z).sum(1) + log_det, expected, **EXACT)

    coarse = z[:, :12]
    torch.testing.assert_close(coarse, goes_on.flatten(1), **EXACT)
    mode, _ = bijection.inverse(torch.cat([coarse, torch.zeros_like(coarse)], 1))
    torch.testing.assert_close(mode, torch.cat([goes_on, mean], 1), **EXACT)
