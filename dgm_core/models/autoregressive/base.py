"""Models of integers in raster order: likelihood, cached sampling and completion, written once.

log p(x | y, context) = Σ_i log p(x_i | x_<i, y, context) over rows, within a row columns, within a pixel channels
(R → G → B); a sequence or a vector is a grid of one row. Every coordinate has a softmax over its levels, computed in
single precision or better, unless a model overrides `log_terms` and `draw`. Images enter a network as intensities
scaled to [−1, 1], codes as learnt embeddings (a one-hot code followed by a 1×1 convolution).

A concrete model sets `network` and `conditioner`; the network maps a grid of integers to logits in one pass
(`forward`) and coordinate by coordinate (`nn.incremental`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dgm_core.capabilities import HasCompletion, HasConditionals, HasLikelihood
from dgm_core.config import Strict
from dgm_core.contract import Batch, Clock, DataMismatch, DataSpec, GenerativeModel, Loss
from dgm_core.nn.causal import Pointwise
from dgm_core.nn.gated import GatedResidual, plain_conv
from dgm_core.nn.incremental import draw_categorical, draw_noise, fill
from dgm_core.nn.stack import Stack
from dgm_core.nn.tokens import TokenInput, grid_shape
from dgm_core.precision import promote

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Int


class ContextMap(nn.Module):
    """One spatial context: embedded, refined by `depth` residual blocks on its own grid, upsampled by deconvolution."""

    def __init__(self, name: str, context: DataSpec, data: DataSpec, features: int, depth: int) -> None:
        super().__init__()
        _, height, width = grid_shape(data)
        if len(context.shape) not in (2, 3):
            raise DataMismatch(
                f"context {name!r} is a sequence of shape {context.shape}; accepted: codes (H, W), images (C, H, W), "
                "vectors (D,)"
            )
        _, context_height, context_width = grid_shape(context)
        ratio = (height // context_height, width // context_width)
        if (ratio[0] * context_height, ratio[1] * context_width) != (height, width):
            raise DataMismatch(
                f"context {name!r} has grid {(context_height, context_width)}, which does not divide the data's "
                f"{(height, width)}; give a context whose height and width divide them"
            )
        self.embed = TokenInput(context, features)
        self.enter = Pointwise(self.embed.width, features)
        self.blocks = Stack(GatedResidual(features, features, plain_conv) for _ in range(depth))
        self.upsample = nn.ConvTranspose2d(features, features, ratio, stride=ratio)

    def forward(self, x: Tensor) -> Float[Tensor, " B features H W"]:
        h = self.enter(self.embed(x if x.ndim == 4 else x[:, None], self.enter.weight))
        for block in self.blocks:
            h = block(h)
        return self.upsample(h)


class Conditioner(nn.Module):
    """Labels, vectors and spatial contexts, summed: (B, features, H, W), or (B, features, 1, 1) if none is spatial.

    `spatial` makes the map of a context that is no vector, from its name and spec; `ContextMap` by default.
    """

    def __init__(
        self,
        data: DataSpec,
        features: int,
        depth: int,
        *,
        labels: bool,
        spatial: Callable[[str, DataSpec], nn.Module] | None = None,
    ) -> None:
        super().__init__()
        self.label = nn.Embedding(data.classes, features) if labels and data.classes else None
        maps, vectors = {}, {}
        for name, context in data.context.items():
            if context.kind == "vector":
                vectors[name] = Pointwise(context.dims, features)
            else:
                maps[name] = spatial(name, context) if spatial else ContextMap(name, context, data, features, depth)
        self.shapes = {name: context.shape for name, context in data.context.items()}
        self.maps = nn.ModuleDict(maps)
        self.vectors = nn.ModuleDict(vectors)
        self.width = features if self.label is not None or maps or vectors else 0

    def forward(self, n: int, y: Tensor | None, context: Mapping[str, Tensor]) -> Tensor | None:
        parts: list[Tensor] = []
        if self.label is not None:
            if y is None:
                raise DataMismatch("this model is conditional on labels: give y, one label an example")
            parts.append(self.label(y.long())[:, :, None, None])
        missing = [name for name in self.shapes if name not in context]
        if missing:
            given = ", ".join(context) or "none"
            raise DataMismatch(f"this model is conditional on context {', '.join(missing)}; given: {given}")
        for name, shape in self.shapes.items():
            if context[name].shape != (n, *shape):
                raise DataMismatch(
                    f"{n} examples need context {name!r} of shape {(n, *shape)}; given: {tuple(context[name].shape)}"
                )
        for name, vector in self.vectors.items():
            parts.append(vector(context[name].to(vector.weight.dtype))[:, :, None, None])  # type: ignore[union-attr]
        parts.extend(map_(context[name]) for name, map_ in self.maps.items())
        return sum(parts[1:], parts[0]) if parts else None


FORMS = {"grid": "images (C, H, W) and codes (H, W)", "sequence": "audio and codes (T,)", "vector": "vectors (D,)"}


class RasterModel(GenerativeModel, HasLikelihood, HasConditionals, HasCompletion):
    """The algorithms that follow from a network of conditionals in raster order."""

    exact = True
    accepts: ClassVar[tuple[str, ...]] = ("grid",)  # of FORMS
    most_levels: ClassVar[int] = 256  # of a coordinate that is not a code
    network: Any  # maps (x, condition) to logits (B, C, H, W, levels), and is `nn.incremental.Incremental`
    conditioner: Conditioner

    def __init__(self, config: Strict, data: DataSpec) -> None:
        super().__init__(config, data)
        name = type(self).__name__
        form = data.kind if data.kind == "vector" else "sequence" if len(data.shape) == 1 else "grid"
        if form not in self.accepts:
            hint = " A sequence of codes can be stored as a grid of one row, (1, T)." if data.kind == "codes" else ""
            raise DataMismatch(
                f"{name} models integers: {', '.join(FORMS[f] for f in self.accepts)}; given: {data.kind} of shape "
                f"{data.shape}.{hint}"
            )
        if data.levels is None or (data.kind != "codes" and data.levels > self.most_levels):
            raise DataMismatch(
                f"{name} accepts 2 to {self.most_levels} levels; this has {data.levels}. Prepare an integer variant of "
                "the data set (no dequantisation; mu_law for audio)."
            )

    def loss(self, batch: Batch, turn: str, clock: Clock) -> Loss:
        nll = -self.log_prob(batch.x, batch.y, batch.context).mean()
        return Loss(nll, {"bits_per_dim": nll.detach() / (self.data.dims * math.log(2))})

    def log_prob(
        self, x: Tensor, y: Tensor | None = None, context: Mapping[str, Tensor] = {}, *, samples: int = 1
    ) -> Float[Tensor, " B"]:
        """Nats, exact, given the labels if conditional; `samples` is not needed."""
        grid = self._grid(x)
        return self.log_likelihood(grid, self.network(grid, self.conditioner(grid.shape[0], y, context)))

    def log_conditionals(
        self, x: Tensor, y: Tensor | None = None, context: Mapping[str, Tensor] = {}
    ) -> Float[Tensor, " B C H W"]:
        grid = self._grid(x)
        return self.log_terms(grid, self.network(grid, self.conditioner(grid.shape[0], y, context)))

    def log_likelihood(self, grid: Int[Tensor, " B C H W"], logits: Tensor) -> Float[Tensor, " B"]:
        """Nats of the grid, from what the network says of it."""
        return self.log_terms(grid, logits).flatten(1).sum(1)

    def log_terms(self, grid: Int[Tensor, " B C H W"], logits: Tensor) -> Float[Tensor, " B C H W"]:
        """Nats of each coordinate; the channels may be taken together."""
        return -F.cross_entropy(promote(logits).movedim(-1, 1), grid, reduction="none")

    def draw(
        self, logits: Float[Tensor, " n levels"], uniform: Float[Tensor, " n"], temperature: float, top_p: float
    ) -> Int[Tensor, " n"]:
        """Values of one coordinate, from what the network's `step` says of it and a uniform number each."""
        return draw_categorical(logits, uniform, temperature, top_p)

    def sample(
        self,
        n: int,
        y: Tensor | None = None,
        context: Mapping[str, Tensor] = {},
        *,
        temperature: float = 1.0,
        top_p: float = 1.0,
    ) -> Int[Tensor, " n *shape"]:
        """Draw coordinate by coordinate from the conditionals, each at the cost of one column of the network.

        `temperature` divides the logits; `top_p` keeps the nucleus of that mass. Dropout is never applied.
        """
        canvas = torch.zeros((n, *grid_shape(self.data)), dtype=torch.int64, device=self.device)
        return self._draw(canvas, None, y, context, temperature, top_p)

    def complete(
        self,
        x: Tensor,
        observed: Bool[Tensor, " B *shape"],
        y: Tensor | None = None,
        context: Mapping[str, Tensor] = {},
        *,
        given_preceding: bool = False,
        temperature: float = 1.0,
        top_p: float = 1.0,
    ) -> Int[Tensor, " B *shape"]:
        """`x` with what is not observed drawn, in order, given all that precedes it.

        This is a draw from p(unobserved | observed) where every example's observed coordinates come first in raster
        order (they may stop at any coordinate). Other masks are refused, unless `given_preceding`: then each
        coordinate is drawn given those before it, and what is observed after it is kept but has no influence on it.
        """
        if observed.shape != x.shape:
            raise DataMismatch(f"observed has shape {tuple(observed.shape)}; one flag a coordinate: {tuple(x.shape)}")
        grid, known = self._grid(x), self._grid(observed.bool())
        order = known.movedim(1, -1).flatten(1)
        if not given_preceding and bool((order[:, 1:] & ~order[:, :-1]).any()):
            raise DataMismatch(
                "the observed coordinates are not the first in raster order, so an exact draw given all of them is not "
                "to be had from this model; observe a prefix (whole rows from the top, then columns from the left), or "
                "accept draws given only the preceding coordinates with given_preceding=True"
            )
        return self._draw(grid.masked_fill(~known, 0), known, y, context, temperature, top_p)

    def _draw(
        self,
        canvas: Int[Tensor, " n C H W"],
        observed: Tensor | None,
        y: Tensor | None,
        context: Mapping[str, Tensor],
        temperature: float,
        top_p: float,
        network: Any = None,
    ) -> Int[Tensor, " n *shape"]:
        """Fill the canvas; `network` stands in for the model's own if that is to be read in another way."""
        if not (temperature > 0 and 0 < top_p <= 1):
            raise ValueError(f"temperature > 0 and 0 < top_p <= 1 are accepted; given: {temperature} and {top_p}")
        if self.conditioner.label is not None:
            y = self.labels_for(canvas.shape[0], y)
        training = self.training
        self.eval()
        try:
            with torch.no_grad():
                context = {name: c.to(self.device) for name, c in context.items()}
                condition = self.conditioner(canvas.shape[0], y, context)
                noise = draw_noise(canvas, next(self.parameters()).dtype)
                options = {"temperature": temperature, "top_p": top_p, "draw": self.draw}
                fill(self.network if network is None else network, canvas, noise, condition, observed, **options)
        finally:
            self.train(training)
        return canvas.view(canvas.shape[0], *self.data.shape).to(self.data.dtype)

    def _grid(self, x: Tensor) -> Tensor:
        """(B, C, H, W) on the model's device; integers as int64."""
        x = x.to(self.device).reshape(x.shape[0], *grid_shape(self.data))
        return x if x.dtype == torch.bool else x.long()
