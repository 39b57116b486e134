"""Weight normalisation whose start is taken from the data, and the shifted convolutions of PixelCNN++ that use it.

T. Salimans, D. P. Kingma, 2016. arXiv:1602.07868. w = g v / ‖v‖ for each output (eq. 2). Within `starting`, one pass of
a first batch, over all ranks, sets each layer in turn so that what it puts out has mean zero and the layer's standard
deviation: g = scale / σ, b = −μ scale / σ, with μ and σ² the moments of v·x / ‖v‖ (eqs. 5, 6). A buffer remembers that
it was done; where it was not, ‖w‖ is the layer's scale.
"""

from __future__ import annotations

import contextlib
from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dgm_core.nn.causal import RasterMemory, RowsMemory
from dgm_core.nn.norm import batch_moments

if TYPE_CHECKING:
    from jaxtyping import Float

EPS = 1e-8  # added to the variance; of the authors' code


class WeightNormed(nn.Module, ABC):
    """A linear map of channels, (B, inputs, *grid) -> (B, outputs, *grid'), with normalised weights and a bias."""

    started: Tensor

    def __init__(self, shape: tuple[int, ...], *, axis: int = 0, scale: float = 1.0) -> None:
        """`axis` of the weight's `shape` is the outputs'."""
        super().__init__()
        self.axis, self.scale = axis, scale
        self.direction = nn.Parameter(0.05 * torch.randn(shape))
        self.gain = nn.Parameter(torch.full((shape[axis],), scale))
        self.bias = nn.Parameter(torch.zeros(shape[axis]))
        self.register_buffer("started", torch.zeros((), dtype=torch.bool))

    @abstractmethod
    def apply_weight(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """What the layer does, with the weight as it is."""

    def forward(self, x: Float[Tensor, " B inputs *grid"]) -> Float[Tensor, " B outputs *out"]:
        return self.apply_weight(x, self.weight(), self.bias)

    def weight(self) -> Tensor:
        return self._scaled(self.gain)

    @torch.no_grad()
    def start(self, x: Float[Tensor, " B inputs *grid"]) -> None:
        """Set gain and bias by the batch that is about to come in, if this was not done before."""
        if self.started:
            return
        mean, variance, _ = batch_moments(self.apply_weight(x, self._scaled(torch.ones_like(self.gain)), None))
        gain = self.scale / (variance + EPS).sqrt()
        self.gain.copy_(gain)
        self.bias.copy_(-mean * gain)
        self.started.fill_(True)

    def _scaled(self, gain: Tensor) -> Tensor:
        others = [i for i in range(self.direction.ndim) if i != self.axis]
        norm = self.direction.square().sum(others, keepdim=True).sqrt()
        return self.direction * (gain.reshape(norm.shape) / norm)


class WeightNormPointwise(WeightNormed):
    """A 1×1 convolution of a grid (B, inputs, H, W) or a column (B, inputs)."""

    def __init__(self, inputs: int, outputs: int, *, scale: float = 1.0) -> None:
        super().__init__((outputs, inputs), scale=scale)

    def apply_weight(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return F.linear(x, weight, bias) if x.ndim == 2 else F.conv2d(x, weight[:, :, None, None], bias)


class ShiftedConv(WeightNormed):
    """Rows r − rows + 1 … r; `columns` columns, `right` of them to the right of the pixel and one its own.

    With a stride s, output (i, j) is that of the pixel (s i, s j).
    """

    def __init__(
        self,
        inputs: int,
        outputs: int,
        *,
        rows: int = 2,
        columns: int,
        right: int,
        stride: int = 1,
        scale: float = 1.0,
    ) -> None:
        super().__init__((outputs, inputs, rows, columns), scale=scale)
        self.left, self.right, self.above, self.stride = columns - 1 - right, right, rows - 1, stride

    def apply_weight(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        both = min(self.left, self.right)  # what is alike on both sides the convolution pads itself, without a copy
        x = F.pad(x, (self.left - both, self.right - both, self.above, 0))
        return F.conv2d(x, weight, bias, stride=self.stride, padding=(0, both))

    def start_rows(self, n: int, width: int) -> RowsMemory:
        """For rows that are known over their whole width."""
        return RowsMemory(self.weight(), self.bias, n, width, pads=(self.left, self.right), stride=self.stride)

    def start_columns(self, n: int, width: int) -> RasterMemory:
        """For one column at a time; there must be none to the right."""
        return RasterMemory(self.weight(), self.bias, n, width, left=self.left, stride=self.stride)


class ShiftedDeconv(WeightNormed):
    """A pixel becomes 2×2 pixels; with `columns` 3 it also reaches the one to the left of them.

    A transposed convolution of stride 2, cut to the grid twice as wide and twice as high.
    """

    def __init__(self, inputs: int, outputs: int, *, columns: int) -> None:
        super().__init__((inputs, outputs, 2, columns), axis=1)
        self.left = (columns - 1) // 2

    def apply_weight(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return F.conv_transpose2d(x, weight, bias, stride=2)[..., self.left : self.left + 2 * x.shape[3]]


@contextlib.contextmanager
def starting(module: nn.Module) -> Iterator[None]:
    """Within, each layer sets itself by what first reaches it, before it acts, unless it was set before."""

    def first_start(layer: nn.Module, inputs: tuple[Any, ...]) -> None:
        assert isinstance(layer, WeightNormed)
        layer.start(inputs[0])

    hooks = [m.register_forward_pre_hook(first_start) for m in module.modules() if isinstance(m, WeightNormed)]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
