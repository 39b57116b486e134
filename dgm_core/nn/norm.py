"""Normalisation whose batch statistics span every rank, and the running averages that stand in for them afterwards.

In training a batch's mean and variance are taken over the global batch, through differentiable collectives, so that W
ranks of B/W examples compute what one rank of B does. `forward` only notes the moments it used; `settle`, called once
a play from a model's `after`, moves the running averages: microbatches count as one batch, and activations that are
computed twice count once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dgm_core import distributed
from dgm_core.precision import promote

if TYPE_CHECKING:
    from jaxtyping import Float


def batch_moments(x: Float[Tensor, " B C *grid"]) -> tuple[Float[Tensor, " C"], Float[Tensor, " C"], Float[Tensor, ""]]:
    """Mean, biased variance and count of each channel over all ranks' batches, differentiable.

    Two passes: deviations are taken from the mean that is already known, so that nothing cancels.
    """
    axes = [0, *range(2, x.ndim)]
    x = promote(x)
    count = x.new_full((1,), x.numel() // x.shape[1])
    sums = distributed.all_reduce(torch.cat([x.sum(axes), count]))
    mean, total = sums[:-1] / sums[-1], sums[-1]
    deviation = x - mean.reshape(-1, *(1,) * (x.ndim - 2))
    return mean, distributed.all_reduce(deviation.square().sum(axes)) / total, total.detach()


class Moments(nn.Module):
    """Mean and biased variance of each channel: the global batch's in training, running averages in evaluation.

    As in `torch.nn.BatchNorm2d` the running variance is the unbiased one.
    """

    running_mean: Tensor
    running_var: Tensor

    def __init__(self, channels: int, momentum: float = 0.1) -> None:
        super().__init__()
        self.momentum = momentum
        self.register_buffer("running_mean", torch.zeros(channels))
        self.register_buffer("running_var", torch.ones(channels))
        self.noted: list[tuple[Tensor, Tensor]] = []  # means and unbiased variances since the last play

    def forward(self, x: Float[Tensor, " B C *grid"]) -> tuple[Float[Tensor, " C"], Float[Tensor, " C"]]:
        if not self.training:
            return self.running_mean, self.running_var
        mean, var, count = batch_moments(x)
        self.note(mean, var * (count / (count - 1).clamp_min(1)))
        return mean, var

    def note(self, mean: Float[Tensor, " C"], unbiased: Float[Tensor, " C"]) -> None:
        """Remember one batch's moments until `settle`."""
        self.noted.append((mean.detach(), unbiased.detach()))

    @torch.no_grad()
    def settle(self, momentum: float | None = None) -> None:
        """Move the running averages towards the mean of what was noted since the last time, if anything was."""
        if not self.noted:
            return
        means, variances = zip(*self.noted, strict=True)
        rate = self.momentum if momentum is None else momentum
        for running, noted in ((self.running_mean, means), (self.running_var, variances)):
            running.lerp_((noted[0] if len(noted) == 1 else torch.stack(noted).mean(0)).to(running), rate)
        self.noted.clear()


class BatchNorm(nn.Module):
    """Batch normalisation of axis 1 of (B, C), (B, C, T) or (B, C, H, W), over all ranks.

    S. Ioffe, C. Szegedy, 2015. arXiv:1502.03167. On one rank equal to `torch.nn.BatchNorm1d` / `2d`, buffers included.
    """

    def __init__(
        self, channels: int, *, eps: float = 1e-5, momentum: float = 0.1, scale: bool = True, shift: bool = True
    ) -> None:
        super().__init__()
        self.eps = eps
        self.moments = Moments(channels, momentum)
        self.weight = nn.Parameter(torch.ones(channels)) if scale else None
        self.bias = nn.Parameter(torch.zeros(channels)) if shift else None

    def forward(self, x: Float[Tensor, " B C *grid"]) -> Float[Tensor, " B C *grid"]:
        m = self.moments
        if not self.training:
            return F.batch_norm(x, m.running_mean, m.running_var, self.weight, self.bias, False, 0.0, self.eps)
        if distributed.world_size() == 1 and x.numel() > x.shape[1]:
            # torch's fused kernel; with momentum 1 its running buffers are this batch's moments.
            mean, var = torch.zeros_like(m.running_mean), torch.ones_like(m.running_var)
            y = F.batch_norm(x, mean, var, self.weight, self.bias, True, 1.0, self.eps)
            m.note(mean, var)
            return y
        mean, var = m(x)
        rate = (var + self.eps).rsqrt()
        if self.weight is not None:
            rate = rate * self.weight
        axes = (-1, *(1,) * (x.ndim - 2))
        y = (x - mean.reshape(axes)) * rate.reshape(axes)
        return (y if self.bias is None else y + self.bias.reshape(axes)).to(x.dtype)


class LayerNorm(nn.GroupNorm):
    """Layer normalisation of (B, C, *grid) over all axes but the batch, with a gain and a bias for each channel.

    J. L. Ba, J. R. Kiros, G. E. Hinton, 2016. arXiv:1607.06450. What a WGAN-GP critic may use: it leaves the examples
    of a batch independent, as the gradient penalty of each one needs.
    """

    def __init__(self, channels: int, *, eps: float = 1e-5) -> None:
        super().__init__(1, channels, eps=eps)


def settle(module: nn.Module) -> None:
    """Move the running averages of every `Moments` within; call it from `after`."""
    for part in module.modules():
        if isinstance(part, Moments):
            part.settle()


@torch.no_grad()
def standing_statistics(module: nn.Module, forward: Callable[[], object], passes: int) -> None:
    """Replace running averages by plain averages over `passes` calls of `forward` at the present parameters.

    For the copy that will sample, whose parameters (an average, say) the running averages never saw. `module` is left
    in the mode it was in. To be called where one process works alone, or on every rank.
    """
    training = module.training
    module.train()
    for _ in range(passes):
        forward()
    for part in module.modules():
        if isinstance(part, Moments):
            part.settle(momentum=1.0)
    module.train(training)


def channel_moments(batches: Iterable[Float[Tensor, " B C *grid"]], like: Float[Tensor, " C"]) -> tuple[Tensor, Tensor]:
    """Mean and biased variance (C,) of each channel over one pass of all ranks' batches, in float64.

    Batches are merged by their deviations (Chan et al. 1979), so that nothing cancels. A rank may have none.
    """
    count = torch.zeros((), dtype=torch.float64, device=like.device)
    mean = torch.zeros(like.shape[0], dtype=torch.float64, device=like.device)
    deviation = torch.zeros_like(mean)
    for batch in batches:
        x = batch.to(like.device, torch.float64).transpose(0, 1).flatten(1)
        n, gap = x.shape[1], x.mean(1) - mean
        deviation += (x - x.mean(1, keepdim=True)).square().sum(1) + gap.square() * count * n / (count + n)
        mean += gap * n / (count + n)
        count += n
    total, overall = count.clone(), mean * count
    distributed.sum_(total, overall)
    overall /= total
    deviation += count * (mean - overall).square()
    distributed.sum_(deviation)
    return overall, deviation / total
