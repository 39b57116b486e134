"""Planar and radial maps: both directions, their determinants and gradients, up to the limit of invertibility."""

import math

import pytest
import torch
from torch import Tensor

from dgm_core.bijections import (
    Bijection,
    Invert,
    Planar,
    Radial,
    planar,
    planar_inverse,
    radial,
    radial_inverse,
)
from dgm_core.bijections.planar import SHIFT, _root, constrained

# float64 through at most eight maps: rounding leaves orders of magnitude to spare.
EXACT = {"rtol": 0, "atol": 1e-8}
MAPS = {"planar": (planar, planar_inverse), "radial": (radial, radial_inverse)}
LAYERS = {"planar": Planar, "radial": Radial}


def normal(*shape: int, scale: float = 1.0) -> Tensor:
    return scale * torch.randn(*shape, dtype=torch.float64)


def parameters_of(name: str, *lead: int, dims: int, depth: int) -> tuple[Tensor, ...]:
    """Far from the identity: slopes from 0.1 to 4."""
    first, second = normal(*lead, depth, dims), normal(*lead, depth, dims if name == "planar" else 1, scale=2)
    return first, second if name == "planar" else second[..., 0], normal(*lead, depth, scale=2)


@pytest.mark.parametrize("each", [False, True], ids=["whole_batch", "each_example"])
@pytest.mark.parametrize(("dims", "depth"), [(2, 8), (5, 3), (1, 2)])
@pytest.mark.parametrize("name", MAPS)
def test_inverse_and_log_det(name: str, dims: int, depth: int, each: bool) -> None:
    torch.manual_seed(0)
    there, back = MAPS[name]
    batch = 20
    steering = parameters_of(name, *([batch] if each else []), dims=dims, depth=depth)
    z = normal(batch, dims, scale=3)

    y, log_det = there(z, *steering)
    again, log_det_back = back(y, *steering)
    assert (y - z).abs().max() > 0.5
    torch.testing.assert_close(again, z, **EXACT)
    torch.testing.assert_close(log_det_back, -log_det, **EXACT)
    assert log_det.shape == (batch,)
    for i in range(batch):
        mine = tuple(p[i] for p in steering) if each else steering
        for direction, point, expected in ((there, z[i], log_det[i]), (back, y[i], log_det_back[i])):
            torch.testing.assert_close(_log_abs_det(direction, point, mine), expected, **EXACT)


def _log_abs_det(direction, point: Tensor, steering: tuple[Tensor, ...]) -> Tensor:
    jacobian = torch.autograd.functional.jacobian(lambda v: direction(v[None], *steering)[0][0], point)
    return torch.linalg.slogdet(jacobian)[1]


def test_planar_inverts_next_to_the_limit() -> None:
    """wᵀû = −1 + 1.4e-6, on both sides of the line where the map all but folds."""
    torch.manual_seed(1)
    w, b = normal(1, 3), normal(1)
    u = -14 * w / w.square().sum() + torch.linalg.cross(w, normal(1, 3))
    _, slope = constrained(w, u)
    assert 1e-6 < slope.item() < 2e-6
    across = torch.cat([torch.zeros(1), torch.logspace(-6, 1, 40)]).double()
    across = torch.cat([-across, across])[:, None]
    z = (across - b) * w / w.square().sum() + torch.linalg.cross(w.expand(82, 3), normal(82, 3))
    y, log_det = planar(z, w, u, b)
    back, log_det_back = planar_inverse(y, w, u, b)
    # Rounding, 1e-15 here, is divided by the slope: 1e-9 on the line itself.
    torch.testing.assert_close(back, z, **EXACT)
    torch.testing.assert_close(log_det_back, -log_det, rtol=0, atol=1e-6)  # moves with z by up to 1 / √slope
    assert log_det[0].item() == pytest.approx(math.log(slope.item()), abs=1e-6)
    torch.testing.assert_close(_log_abs_det(planar, z[0], (w, u, b)), log_det[0], rtol=0, atol=1e-6)


def test_radial_inverts_next_to_the_limit() -> None:
    """β̂ = −α + 8.3e-7, from far away down to the centre."""
    torch.manual_seed(1)
    z0, a, b = normal(1, 3), torch.zeros(1, dtype=torch.float64), torch.full((1,), -14.0, dtype=torch.float64)
    away = torch.cat([torch.zeros(1), torch.logspace(-9, 2, 40)]).double()[:, None]
    z = z0 + away * torch.nn.functional.normalize(normal(41, 3))
    y, log_det = radial(z, z0, a, b)
    back, log_det_back = radial_inverse(y, z0, a, b)
    # Rounding of 1e-16 is divided by (α + β̂) / α = 1.2e-6.
    torch.testing.assert_close(back, z, **EXACT)
    # Near the centre log |det| moves with z by up to 2 D / (α + β̂) = 7e6.
    torch.testing.assert_close(log_det_back, -log_det, rtol=0, atol=1e-3)
    assert log_det[0].item() == pytest.approx(3 * math.log(math.log1p(math.exp(-14)) / math.log(2)), abs=1e-6)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_newton_solves_every_equation(dtype: torch.dtype) -> None:
    """s + (slope − 1) tanh s = d from slopes of 1e-14 to 1e5, to rounding of the terms."""
    d = torch.cat([torch.zeros(1), torch.logspace(-12, 4, 300)]).to(dtype)
    d = torch.cat([-d, d])[:, None]
    slope = torch.logspace(-14, 5, 150, dtype=torch.float64).to(dtype)
    s = _root(d, slope)
    rounding = torch.finfo(dtype).eps * (s.abs() + slope * s.tanh().abs() + d.abs())
    assert s.isfinite().all()
    assert ((s - s.tanh() + slope * s.tanh() - d).abs() <= 4 * rounding).all()


def test_radius_before_is_exact_at_every_scale() -> None:
    after = torch.logspace(-12, 8, 200, dtype=torch.float64)
    for a, b in ((0.0, 0.0), (3.0, -20.0), (-20.0, 3.0), (5.0, 5.0), (-3.0, 40.0)):
        steering = (torch.zeros(1, 2, dtype=torch.float64), torch.tensor([a]).double(), torch.tensor([b]).double())
        before = torch.stack([after, torch.zeros_like(after)], 1)
        y, _ = radial(before, *steering)
        # Relative to the radius: a difference of large numbers would lose the small ones.
        torch.testing.assert_close(radial_inverse(y, *steering)[0], before, rtol=1e-9, atol=1e-14)


@pytest.mark.parametrize("direction", [planar, planar_inverse, radial, radial_inverse], ids=lambda f: f.__name__)
def test_gradients_are_those_of_finite_differences(direction) -> None:
    """In z and in all parameters; of the numeric inverse too, whose gradient is the implicit function's."""
    torch.manual_seed(2)
    name = direction.__name__.removesuffix("_inverse")
    inputs = (normal(3, 2), *parameters_of(name, 3, dims=2, depth=2))
    assert torch.autograd.gradcheck(direction, tuple(t.requires_grad_() for t in inputs))


@pytest.mark.parametrize("name", MAPS)
def test_maps_follow_one_another(name: str) -> None:
    torch.manual_seed(3)
    there, back = MAPS[name]
    steering = parameters_of(name, dims=3, depth=2)
    z = normal(4, 3)
    first, log_det_first = there(z, *(p[:1] for p in steering))
    second, log_det_second = there(first, *(p[1:] for p in steering))
    y, log_det = there(z, *steering)
    torch.testing.assert_close(y, second, **EXACT)
    torch.testing.assert_close(log_det, log_det_first + log_det_second, **EXACT)
    torch.testing.assert_close(back(y, *(p[1:] for p in steering))[0], first, **EXACT)


def test_planar_is_the_papers_under_other_parameters() -> None:
    """û of appendix A.1 at u + log(e − 1) w / ‖w‖² is ours at u."""
    torch.manual_seed(4)
    w, u = normal(50, 4), normal(50, 4, scale=3)
    square = w.square().sum(1, keepdim=True)
    theirs = u + SHIFT * w / square
    along = (w * theirs).sum(1, keepdim=True)
    theirs = theirs + (-1 + torch.log1p(along.exp()) - along) * w / square
    ours, slope = constrained(w, u)
    torch.testing.assert_close(ours, theirs, **EXACT)
    torch.testing.assert_close(slope, 1 + (w * ours).sum(1), **EXACT)
    assert (slope > 0).all()


def test_planar_has_no_pole_where_w_is_small() -> None:
    torch.manual_seed(5)
    u = normal(6, 2)
    for length in (1e-3, 1e-9, 0.0):
        u_hat, slope = constrained(length * normal(6, 2), u)
        assert (u_hat.norm(dim=1) <= 2 * u.norm(dim=1)).all()
        assert ((slope - 1).abs() <= 10 * length).all()
    z = normal(6, 2)
    assert torch.equal(planar(z, normal(3, 2), torch.zeros(3, 2, dtype=torch.float64), normal(3))[0], z)


def test_radial_pushes_along_the_radius_alone() -> None:
    """Eq. 14: β̂ > 0 moves away from the centre, β̂ < 0 towards it but never through it; a = b stays."""
    torch.manual_seed(6)
    z0, a = normal(1, 3), normal(1)
    z = z0 + normal(50, 3)
    before = z - z0
    for b, sign in ((a + 1, 1), (a - 1, -1), (a, 0), (a - 30, -1)):
        after = radial(z, z0, a, b)[0] - z0
        ratio = (after * before).sum(1) / before.square().sum(1)
        torch.testing.assert_close(after, ratio[:, None] * before, **EXACT)
        assert (ratio > 0).all()
        assert torch.equal((ratio - 1).round(decimals=12).sign(), torch.full((50,), sign, dtype=torch.float64))


@pytest.mark.parametrize("name", LAYERS)
def test_layer_with_its_own_parameters(name: str) -> None:
    torch.manual_seed(7)
    layer: Bijection = LAYERS[name](3, 4).double()
    z = normal(5, 3)
    y, log_det = layer(z)
    # At first planar maps are slight bends, of 0.01 each, and radial ones pushes and pulls of up to about |z|.
    assert 0 < (y - z).abs().max() < (0.3 if name == "planar" else 3)
    back, log_det_back = layer.inverse(y)
    torch.testing.assert_close(back, z, **EXACT)
    torch.testing.assert_close(log_det_back, -log_det, **EXACT)
    sampler = Invert(layer)
    assert torch.equal(sampler.inverse(z)[0], y)
    for direction in (layer, layer.inverse):
        layer.zero_grad()
        value, log_det = direction(z)
        (value.square().sum() + log_det.sum()).backward()
        for parameter_name, p in layer.named_parameters():
            assert p.grad is not None, parameter_name
            assert p.grad.abs().amax(-1).min() > 0, parameter_name  # of each of the maps


@pytest.mark.parametrize("name", LAYERS)
def test_amortised_layer_reads_its_parameters_from_the_context(name: str) -> None:
    torch.manual_seed(8)
    own = LAYERS[name](3, 4).double()
    amortised = LAYERS[name](3, 4, amortised=True)
    assert not list(amortised.parameters())
    assert own.size == amortised.size == sum(p.numel() for p in own.parameters())
    context = torch.cat([p.flatten() for p in own.parameters()]).expand(5, -1)
    z = normal(5, 3)
    for expected, found in ((own(z), amortised(z, context)), (own.inverse(z), amortised.inverse(z, context))):
        torch.testing.assert_close(found, expected, **EXACT)
    # What comes out of a network in half precision is not what the map computes in.
    y, log_det = amortised(z.bfloat16(), context.bfloat16())
    assert y.dtype == log_det.dtype == torch.float32


@pytest.mark.parametrize("name", LAYERS)
def test_layers_run_on_meta(name: str) -> None:
    layer = LAYERS[name](2, 3).to("meta")
    z = torch.empty(4, 2, device="meta")
    for direction in (layer, layer.inverse):
        y, log_det = direction(z)
        assert y.device.type == "meta"
        (y.sum() + log_det.sum()).backward()
