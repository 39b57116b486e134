"""What tests of several flows hold them against: their own inverse, and the density that autograd's Jacobian says."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.distributions import Normal

from dgm_core.contract import DataSpec
from dgm_core.models.flow.base import FlowModel

# Exact algebra in float64, through a logit whose slope at the ends is 1 / (α (1 − α)) ≈ 21 for each level.
EXACT = {"rtol": 0, "atol": 1e-8}


def data(spec: DataSpec, n: int) -> Tensor:
    """Real values off the centre and wide, or any integers."""
    if spec.levels is None:
        return 1 + 2 * torch.randn(n, *spec.shape, dtype=torch.float64)
    return torch.randint(0, spec.levels, (n, *spec.shape)).to(spec.dtype)


def standard_normal(z: Tensor) -> Tensor:
    return Normal(0.0, 1.0).log_prob(z).sum()


def inverts(model: FlowModel) -> None:
    """Both ways round."""
    with torch.no_grad():
        assert model.inverse_error(data(model.data, 4)).max() < EXACT["atol"]
        z = model.draw_latent(4)
        torch.testing.assert_close(model._normalize(model._invert(z))[0], z, **EXACT)


def has_the_density_of_its_jacobian(
    model: FlowModel, x: Tensor, log_base: Callable[[Tensor], Tensor] = standard_normal
) -> None:
    """log p(f(x)) + log |det ∂f/∂x|, with the whole way from data units to the latent in f."""
    torch.manual_seed(3)
    found = model.log_prob(x)
    torch.manual_seed(3)
    stored = x.double() if model.exact else x + torch.rand(x.shape, dtype=torch.float64)
    for i in range(len(x)):
        jacobian = torch.autograd.functional.jacobian(
            lambda flat: model._normalize(flat.reshape(1, *model.data.shape))[0][0], stored[i].flatten()
        )
        expected = log_base(model._normalize(stored[i : i + 1])[0]) + torch.linalg.slogdet(jacobian)[1]
        torch.testing.assert_close(found[i], expected, **EXACT)
