"""Minibatch discrimination and deviation: sums written out, equivariance, one rank as oracle for two."""

import torch
from torch import Tensor

from dgm_core import distributed
from dgm_core.nn.minibatch import MinibatchDeviation, MinibatchDiscrimination
from tests.support import TwoRanks

# The same sums in another order, in float64.
EXACT = {"rtol": 0, "atol": 1e-13}


def layer(features: int = 4, kernels: int = 3, dims: int = 2) -> MinibatchDiscrimination:
    torch.manual_seed(3)
    return MinibatchDiscrimination(features, kernels, dims).double()


def written_out(module: MinibatchDiscrimination, f: Tensor) -> Tensor:
    kernels, dims = module.shape
    out = torch.zeros(len(f), kernels, dtype=f.dtype)
    for i in range(len(f)):
        for b in range(kernels):
            block = module.projection[:, b * dims : (b + 1) * dims]
            for j in range(len(f)):
                if j != i:
                    out[i, b] = out[i, b] + (-((f[i] - f[j]) @ block).abs().sum()).exp()
    return out


def test_is_the_papers_sum_over_the_others() -> None:
    module, f = layer(), torch.randn(5, 4, dtype=torch.float64, requires_grad=True)
    expected = written_out(module, f)
    torch.testing.assert_close(module(f), expected, **EXACT)
    weights = torch.randn(5, 3, dtype=torch.float64)
    found = torch.autograd.grad((module(f) * weights).sum(), [f, module.projection])
    wanted = torch.autograd.grad((expected * weights).sum(), [f, module.projection])
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b, **EXACT)


def test_permuted_examples_give_permuted_outputs() -> None:
    module, f = layer(), torch.randn(6, 4, dtype=torch.float64)
    order = torch.randperm(6)
    torch.testing.assert_close(module(f[order]), module(f)[order], **EXACT)


def test_an_example_does_not_count_itself() -> None:
    """Alone, or far from all others, it is near to nothing; beside its double it is near to one."""
    module, f = layer(), torch.randn(3, 4, dtype=torch.float64)
    assert module(f[:1]).abs().max() == 0.0
    far = f * torch.tensor([[1.0], [1e4], [-1e4]])
    torch.testing.assert_close(module(far), torch.zeros(3, 3, dtype=torch.float64), **EXACT)
    doubles = module(torch.cat([far, far[:1]]))
    torch.testing.assert_close(doubles[[0, 3]], torch.ones(2, 3, dtype=torch.float64), **EXACT)


def test_a_collapsed_batch_stands_out() -> None:
    module, f = layer(), torch.randn(8, 4, dtype=torch.float64)
    collapsed = module(f[:1].expand(8, 4))
    torch.testing.assert_close(collapsed, torch.full((8, 3), 7.0, dtype=torch.float64), **EXACT)
    assert module(f).max() < 7


def share_of_outputs(module: MinibatchDiscrimination, f: Tensor, weights: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    mine = distributed.share(len(f))
    local = f[mine].clone().requires_grad_()
    out = module(local)
    (out * weights[mine]).sum().backward()
    gradient = module.projection.grad.clone()  # type: ignore[union-attr]
    distributed.sum_(gradient)
    return distributed.gather_rows(out.detach()), distributed.gather_rows(local.grad), gradient  # type: ignore[arg-type]


def test_two_ranks_see_each_other(two_ranks: TwoRanks) -> None:
    f, weights = torch.randn(7, 4, dtype=torch.float64), torch.randn(7, 3, dtype=torch.float64)
    expected = share_of_outputs(layer(), f, weights)
    for got in two_ranks.run(share_of_outputs, layer(), f, weights):
        for a, b in zip(got, expected, strict=True):
            torch.testing.assert_close(a, b, **EXACT)


def test_deviation_is_its_formula_in_one_channel() -> None:
    x = torch.randn(5, 3, 2, 4, dtype=torch.float64)
    out = MinibatchDeviation()(x)
    assert torch.equal(out[:, :3], x)
    sds = [((x[:, c, i, j] - x[:, c, i, j].mean()) ** 2).mean() for c in range(3) for i in range(2) for j in range(4)]
    wanted = torch.stack([(v + 1e-8).sqrt() for v in sds]).mean()
    torch.testing.assert_close(out[:, 3], wanted.expand(5, 2, 4), **EXACT)


def test_deviation_does_not_know_the_order_and_sees_a_collapse() -> None:
    layer, x = MinibatchDeviation(), torch.randn(6, 3, 2, 2, dtype=torch.float64)
    order = torch.randperm(6)
    torch.testing.assert_close(layer(x[order]), layer(x)[order], **EXACT)
    same = x[:1].expand(6, 3, 2, 2).clone().requires_grad_()
    out = layer(same)
    # Nothing but the root of ε = 10⁻⁸, whose derivative is finite.
    torch.testing.assert_close(out[:, 3], torch.full((6, 2, 2), 1e-4, dtype=torch.float64), **EXACT)
    out[:, 3].sum().backward()
    assert same.grad is not None
    assert same.grad.isfinite().all()


def test_deviation_differentiates_twice() -> None:
    """A gradient penalty needs it."""
    x = torch.randn(3, 2, 1, 1, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradgradcheck(MinibatchDeviation(), x)


def share_of_penalty(x: Tensor, weights: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Scores that depend on the spread, and the gradient of a penalty on their gradient."""
    mine = distributed.share(len(x))
    local = x[mine].clone().requires_grad_()
    score = (MinibatchDeviation()(local) * weights[mine]).sum((1, 2, 3)).square()
    (slope,) = torch.autograd.grad(score.sum(), local, create_graph=True)
    slope.square().sum().backward()
    assert local.grad is not None
    return tuple(distributed.gather_rows(t.detach()) for t in (score, slope, local.grad))  # type: ignore[return-value]


def test_deviation_spans_ranks_and_so_do_its_second_derivatives(two_ranks: TwoRanks) -> None:
    x, weights = torch.randn(7, 2, 2, 2, dtype=torch.float64), torch.randn(7, 3, 2, 2, dtype=torch.float64)
    expected = share_of_penalty(x, weights)
    for got in two_ranks.run(share_of_penalty, x, weights):
        for a, b in zip(got, expected, strict=True):
            # Gradients of order 10³, sums in another order.
            torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-10)
