"""Every bijection: the inverse inverts, and log |det| is that of the Jacobian which autograd finds."""

import math

import pytest
import torch
from torch import Tensor, nn

from dgm_core.bijections import (
    BatchNormalization,
    Bijection,
    BoundedAffine,
    Chain,
    ChannelCoupling,
    FactorOut,
    Flatten,
    MaskedCoupling,
    ScaledLogit,
    Squeeze,
    Standardize,
    alternating_mask,
    checkerboard_mask,
    half_mask,
)
from dgm_core.nn.flow_nets import CouplingMLP, CouplingResNet
from dgm_core.nn.norm import Moments, settle

# Exact algebra in float64: rounding of some hundred operations leaves three orders of magnitude to spare.
EXACT = {"rtol": 0, "atol": 1e-8}


def perturbed(bijection: Bijection) -> Bijection:
    """Away from the identity that everything starts at, in evaluation mode and float64."""
    bijection.double().eval()
    with torch.no_grad():
        for p in bijection.parameters():
            p.add_(0.3 * torch.randn_like(p))
        for part in bijection.modules():
            if isinstance(part, Moments):
                part.running_mean.normal_()
                part.running_var.uniform_(0.5, 2.0)
    return bijection


def chequered(parity: int, channels: int, height: int, width: int) -> Bijection:
    mask = checkerboard_mask(height, width, parity)
    net = CouplingResNet(channels, 2 * channels, 5, 1, batch_norm=True, mask=mask)
    return MaskedCoupling(mask, net, BoundedAffine())


def channelwise(channels: int, swap: bool) -> Bijection:
    half = channels // 2
    return ChannelCoupling(CouplingResNet(half, 2 * half, 5, 1, batch_norm=False), BoundedAffine(), swap=swap)


def standardize(channels: int) -> Bijection:
    bijection = Standardize(channels)
    bijection.set(torch.randn(channels), torch.rand(channels) + 0.5)
    return bijection


def two_scales() -> Bijection:
    rest = Chain(chequered(0, 2, 2, 3), Flatten((2, 2, 3)))
    return Chain(chequered(1, 1, 4, 6), Squeeze(), channelwise(4, True), FactorOut(rest, (4, 2, 3)))


CASES = {
    "logit": (lambda: ScaledLogit(7, 0.05), (3,)),
    "standardize": (lambda: standardize(2), (2, 3, 2)),
    "batch_norm": (lambda: BatchNormalization(Moments(2), lag=0.9), (2, 2, 3)),
    "alternating": (lambda: MaskedCoupling(alternating_mask(5, 0), CouplingMLP(5, 10, 8, 2), BoundedAffine()), (5,)),
    "half": (lambda: MaskedCoupling(half_mask(5, 1), CouplingMLP(5, 10, 8, 2), BoundedAffine()), (5,)),
    "checkerboard": (lambda: chequered(0, 2, 4, 3), (2, 4, 3)),
    "channelwise": (lambda: channelwise(4, False), (4, 2, 3)),
    "channelwise_swapped": (lambda: channelwise(4, True), (4, 2, 3)),
    "squeeze": (Squeeze, (2, 4, 6)),
    "flatten": (lambda: Flatten((2, 3)), (2, 3)),
    "factor_out": (lambda: FactorOut(Chain(chequered(1, 2, 2, 3), Flatten((2, 2, 3))), (4, 2, 3)), (4, 2, 3)),
    "two_scales": (two_scales, (1, 4, 6)),
}


@pytest.mark.parametrize("name", CASES)
def test_inverse_and_log_det(name: str) -> None:
    torch.manual_seed(0)
    build, shape = CASES[name]
    bijection = perturbed(build())
    x = torch.rand(3, *shape, dtype=torch.float64) * 6.9  # inside every domain: the logit's is [0, 7]

    z, log_det = bijection(x)
    back, log_det_back = bijection.inverse(z)
    torch.testing.assert_close(back, x, **EXACT)
    torch.testing.assert_close(log_det_back, -log_det, **EXACT)
    assert log_det.shape == (3,)
    for i in range(3):
        torch.testing.assert_close(log_det[i], log_abs_det(bijection, x[i]), **EXACT)


def log_abs_det(bijection: Bijection, x: Tensor) -> Tensor:
    jacobian = torch.autograd.functional.jacobian(
        lambda flat: bijection(flat.reshape(1, *x.shape))[0].flatten(), x.flatten()
    )
    return torch.linalg.slogdet(jacobian)[1]


def test_coupling_starts_as_the_identity_and_its_scale_is_bounded() -> None:
    torch.manual_seed(0)
    net = CouplingMLP(4, 8, 16, 2)
    coupling = MaskedCoupling(alternating_mask(4, 0), net, BoundedAffine()).double()
    x = torch.randn(5, 4, dtype=torch.float64)
    z, log_det = coupling(x)
    assert torch.equal(z, x)
    assert torch.equal(log_det, torch.zeros(5, dtype=torch.float64))

    last = net[-1]
    assert isinstance(last, nn.Linear)
    nn.init.constant_(last.bias, 1e6)
    _, log_det = coupling(x)
    # Two coordinates move, each by at most the bound, one.
    torch.testing.assert_close(log_det, torch.full((5,), 2.0, dtype=torch.float64), **EXACT)


@pytest.mark.parametrize("parity", [0, 1])
def test_masked_coordinates_pass_and_steer(parity: int) -> None:
    """z_passed = x_passed, and every moving coordinate depends on every passing one but on no other moving one."""
    torch.manual_seed(parity)
    mask = half_mask(5, parity)
    coupling = perturbed(MaskedCoupling(mask, CouplingMLP(5, 10, 16, 2), BoundedAffine()))
    x = torch.randn(5, dtype=torch.float64)
    jacobian = torch.autograd.functional.jacobian(lambda v: coupling(v[None])[0][0], x)
    passes = mask.bool()
    assert torch.equal(jacobian[passes], torch.eye(5, dtype=torch.float64)[passes])
    assert (jacobian[~passes][:, passes].abs() > 1e-6).all()
    moving = jacobian[~passes][:, ~passes]
    assert torch.equal(moving, moving.diag().diag())


def test_masks_are_complements() -> None:
    for first, second in [
        (alternating_mask(5, 0), alternating_mask(5, 1)),
        (half_mask(5, 0), half_mask(5, 1)),
        (checkerboard_mask(3, 4, 0), checkerboard_mask(3, 4, 1)),
    ]:
        assert torch.equal(first + second, torch.ones_like(first))
    assert checkerboard_mask(2, 2, 0).tolist() == [[[0, 1], [1, 0]]]


def test_squeeze_halves_split_rows_and_factor_out_keeps_the_diagonal() -> None:
    image = torch.arange(4.0).reshape(1, 1, 2, 2)  # upper left 0, upper right 1, lower left 2, lower right 3
    squeezed, _ = Squeeze()(image)
    assert squeezed.flatten().tolist() == [0, 1, 2, 3]
    latent, _ = FactorOut(Flatten((2, 1, 1)), (4, 1, 1))(squeezed)
    assert latent.flatten().tolist() == [0, 3, 1, 2]


@pytest.mark.parametrize("lag", [0.0, 0.9])
def test_batch_normalization_in_training(lag: float) -> None:
    """Appendix E: normalise by ρ times the running moments plus 1 − ρ times the batch's; the log-determinant says so;
    the gradient flows through the batch's moments; `settle` then moves the running ones."""
    torch.manual_seed(0)
    layer = BatchNormalization(Moments(2, momentum=0.1), lag=lag, eps=1e-4).double().train()
    moments = layer.moments
    assert isinstance(moments, Moments)
    moments.running_mean.normal_()
    moments.running_var.uniform_(0.5, 2.0)
    old_mean, old_var = moments.running_mean.clone(), moments.running_var.clone()
    x = torch.randn(6, 2, 3, 4, dtype=torch.float64, requires_grad=True)
    z, log_det = layer(x)

    mean, var = x.mean((0, 2, 3)), x.var((0, 2, 3), correction=0)
    used_mean, used_var = lag * old_mean + (1 - lag) * mean, lag * old_var + (1 - lag) * var
    expected = (x - used_mean[:, None, None]) / (used_var + 1e-4).sqrt()[:, None, None]
    torch.testing.assert_close(z, expected, **EXACT)
    torch.testing.assert_close(log_det, (-6 * (used_var + 1e-4).log().sum()).expand(6), **EXACT)  # ½ · 12 places

    weights = torch.randn_like(z)
    (gradient,) = torch.autograd.grad((weights * z).sum() + log_det.sum(), x, retain_graph=True)
    (wanted,) = torch.autograd.grad((weights * expected).sum() - 36 * (used_var + 1e-4).log().sum(), x)
    torch.testing.assert_close(gradient, wanted, **EXACT)

    assert torch.equal(moments.running_mean, old_mean)
    settle(layer)
    torch.testing.assert_close(moments.running_mean, 0.9 * old_mean + 0.1 * mean, **EXACT)


def test_standardize_leaves_a_constant_coordinate_at_its_scale() -> None:
    bijection = Standardize(2).double()
    bijection.set(torch.tensor([1.0, 5.0]), torch.tensor([4.0, 0.0]))
    z, log_det = bijection(torch.tensor([[3.0, 5.0]], dtype=torch.float64))
    assert z.tolist() == [[1.0, 0.0]]
    assert log_det.item() == pytest.approx(-math.log(2), abs=1e-12)
