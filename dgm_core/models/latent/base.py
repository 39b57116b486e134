"""Autoencoders with discrete latents: the algorithm that VQ-VAE and VQ-VAE-2 share.

An image is encoded into one grid of codes a level, coarsest first; each level sees the codes of the coarser ones.
Algorithm 1 of Razavi et al. 2019 with any number of levels; one level is van den Oord et al. 2017. The loss is

    MSE(x, x̂) + Σ_levels [ β mean (z − sg[e])²  +  mean (sg[z] − e)² ]     (2017: eq. 3; 2019: eq. 2)

with the last term where the codebook is not learnt by moving averages. The papers' log p(x | z) of images is a Gaussian
of fixed variance, hence the MSE. Each term is a mean over coordinates, not a sum, as in the authors' code: pixels in
units in which the levels span [−1, 1] (real-valued data as it is), features in the codebook's own units. It is not in
nats. A concrete model may have another p(x | z), and sequences for images.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from dgm_core import distributed
from dgm_core.capabilities import HasCodes
from dgm_core.config import Strict
from dgm_core.contract import Batch, Clock, DataMismatch, DataSpec, GenerativeModel, Loss
from dgm_core.distributions.observation import from_network, to_network, to_stored
from dgm_core.nn.quantiser import CANDIDATES, Estimator, Quantised, VectorQuantiser, pick_rows
from dgm_core.precision import promote

if TYPE_CHECKING:
    from jaxtyping import Float, Int

ROWS_PER_CODE = 64  # that the k-means start looks at


class CodebookConfig(Strict):
    """What the papers let one choose of the codes."""

    codes: int = Field(default=512, ge=2, description="K, the size of each level's codebook")
    code_features: int = Field(default=64, ge=1, description="D, the length of a code's vector")
    codebook: Literal["ema", "loss"] = Field(default="ema", description="learnt by moving averages, or by its loss")
    decay: float = Field(default=0.99, ge=0, lt=1, description="γ of the moving averages")
    beta: float = Field(default=0.25, ge=0, description="weight of the commitment loss")
    estimator: Estimator = Field(default="straight_through", description="how the gradient passes the quantiser")
    start: Literal["kmeans", "uniform"] = Field(default="kmeans", description="where the codes start")
    revive_below: float = Field(
        default=0.1,
        ge=0,
        lt=1,
        description="a code used less than this multiple of its fair share 1/K starts anew; 0: never",
    )
    hidden: int = Field(default=128, ge=2, description="channels of the convolutions")
    downsample: int = Field(
        default=4, ge=2, description="how much smaller than the data the finest grid is, a power of two"
    )
    conditional: bool = Field(default=False, description="tell the decoder the class")


class ResidualConfig(CodebookConfig):
    """What the papers on images let one choose besides."""

    residual: int = Field(default=64, ge=1, description="channels within a residual block")
    depth: int = Field(default=2, ge=0, description="residual blocks in each stack")


def halvings(downsample: int) -> int:
    """How many convolutions of stride 2 that is."""
    return downsample.bit_length() - 1


def level_names(count: int) -> tuple[str, ...]:
    """Coarsest first: top; top, bottom; top, middle, bottom; top, middle1, …, bottom."""
    if count == 1:
        return ("top",)
    middles = ["middle"] if count == 3 else [f"middle{i}" for i in range(1, count - 1)]
    return ("top", *middles, "bottom")


class QuantisedModel(GenerativeModel, HasCodes):
    """Abstract: all but the networks and p(x | z).

    `features`, `project` and `merge` make codes of the data and a state of the codes, `misfit` and `decode_state` say
    what the state makes of the data. `label_features` is the size of what `labelled` adds the label to.
    """

    config: CodebookConfig
    kind: ClassVar[Literal["image", "audio"]]  # of the data that it models

    def __init__(self, config: CodebookConfig, data: DataSpec, levels: int, label_features: int) -> None:
        super().__init__(config, data)
        self.names = level_names(levels)
        self.grids = self._fit_grids(levels)
        if config.conditional and not data.classes:
            raise DataMismatch("conditional: true needs classes, and the data has none; set conditional: false")
        self.label = nn.Embedding(data.classes, label_features) if config.conditional else None
        self.quantisers = nn.ModuleDict(
            {
                name: VectorQuantiser(
                    config.codes,
                    config.code_features,
                    learn=config.codebook,
                    decay=config.decay,
                    estimator=config.estimator,
                    revive_below=config.revive_below,
                )
                for name in self.names
            }
        )

    def _fit_grids(self, levels: int) -> dict[str, tuple[int, ...]]:
        """Level -> (H, W) of its codes, or (T,)."""
        name, down = type(self).__name__, self.config.downsample
        what = {"image": "images", "audio": "audio clips"}[self.kind]
        if self.data.kind != self.kind:
            raise DataMismatch(f"{name} models {what}; this is of kind {self.data.kind!r} and shape {self.data.shape}")
        if down & (down - 1):
            raise DataMismatch(f"downsample {down} is not accepted: a power of two, from 2 on")
        factor = down * 2 ** (levels - 1)
        size = self.data.shape[-2:] if self.kind == "image" else self.data.shape
        if any(n % factor for n in size):
            below = " × ".join(str(max(1, n // factor) * factor) for n in size)
            above = " × ".join(str(-(-n // factor) * factor) for n in size)
            raise DataMismatch(
                f"{what} of {' × '.join(map(str, size))} do not divide by {factor} (downsample {down}, {levels} "
                f"level{'s' * (levels > 1)}); the nearest sizes that do are {below} and {above}. Pad the data set to "
                f"one of them ({'variant `pad`' if self.kind == 'image' else 'its `length`'}), or choose another "
                "downsample or number of levels."
            )
        steps = {level: down * 2 ** (levels - 1 - i) for i, level in enumerate(self.names)}
        return {level: tuple(n // step for n in size) for level, step in steps.items()}

    @abstractmethod
    def features(self, x: Float[Tensor, " B *shape"]) -> Sequence[Float[Tensor, " B hidden *grid"]]:
        """What the encoder makes of the data (levels spread over [−1, 1]), a level each, coarsest first."""

    @abstractmethod
    def project(
        self, level: int, features: Float[Tensor, " B hidden *grid"], state: Tensor | None
    ) -> Float[Tensor, " B D *grid"]:
        """The vectors to quantise, given the coarser levels' state."""

    @abstractmethod
    def merge(self, level: int, state: Tensor | None, e: Float[Tensor, " B D *grid"]) -> Float[Tensor, " B S *grid"]:
        """The state at this level's size: the coarser levels' and this level's codes."""

    @abstractmethod
    def misfit(
        self, batch: Batch, x: Float[Tensor, " B *shape"], state: Float[Tensor, " B S *grid"]
    ) -> tuple[Float[Tensor, ""], dict[str, Tensor]]:
        """−log p(x | z), a mean over coordinates, in whatever units; and what to record. `x` is as the encoder's."""

    @abstractmethod
    def decode_state(self, state: Float[Tensor, " B S *grid"], y: Tensor | None) -> Float[Tensor, " B *shape"]:
        """The data, float, in data units."""

    def loss(self, batch: Batch, turn: str, clock: Clock) -> Loss:
        x = to_network(batch.x, self.data, self.dtype)
        state, levels = self._encode(x, observe=self.training)
        misfit, metrics = self.misfit(batch, x, state)
        commitment = torch.stack([q.commitment for q in levels.values()]).sum()
        value = misfit + self.config.beta * commitment
        if self.config.codebook == "loss":
            value = value + torch.stack([q.codebook for q in levels.values()]).sum()
        metrics = {**metrics, "commitment": commitment.detach()}
        for name in self.names:  # of the last play's whole batch, all ranks and microbatches
            metrics[f"perplexity/{name}"] = self.quantiser(name).perplexity.clone()
            metrics[f"usage/{name}"] = self.quantiser(name).used.clone()
        return Loss(value, metrics)

    def after(self, turn: str, clock: Clock) -> None:
        for name in self.names:
            self.quantiser(name).settle()

    @torch.no_grad()
    def enter(self, turn: str, batches: Iterator[Batch]) -> None:
        """Start the codebooks by k-means, a level at a time: a level is seen through the coarser ones' new codes."""
        if self.config.start != "kmeans":
            return
        per_example = min(CANDIDATES, *(math.prod(grid) for grid in self.grids.values()))
        kept = spread(batches, -(-ROWS_PER_CODE * self.config.codes // per_example))
        if not kept:
            raise DataMismatch("no example reached this rank: give at least one training example a worker")
        for i, name in enumerate(self.names):
            rows = []
            for batch in kept:
                z = self._project_level(to_network(batch.x.to(self.device), self.data, self.dtype), i)
                rows.append(distributed.gather_rows(pick_rows(promote(z).movedim(1, -1), CANDIDATES)))
            self.quantiser(name).start_from(torch.cat(rows))

    def code_specs(self) -> dict[str, DataSpec]:
        """Level -> its codes; a finer level's spec has the coarser ones as context, and all have the data's classes."""
        K = self.config.codes
        plain = {name: DataSpec("codes", grid, K) for name, grid in self.grids.items()}
        return {
            name: DataSpec(
                "codes",
                self.grids[name],
                K,
                self.data.classes,
                self.data.class_shares,
                {coarser: plain[coarser] for coarser in self.names[:i]},
            )
            for i, name in enumerate(self.names)
        }

    def codes(self, x: Tensor, y: Tensor | None = None) -> dict[str, Int[Tensor, " B *grid"]]:
        """Level -> codes, stored as their specs say. The label is not needed."""
        _, levels = self._encode(to_network(x, self.data, self.dtype))
        specs = self.code_specs()
        return {name: q.codes.to(specs[name].dtype) for name, q in levels.items()}

    def decode_codes(
        self, codes: Mapping[str, Tensor], y: Tensor | None = None, context: Mapping[str, Tensor] = {}
    ) -> Float[Tensor, " B *shape"]:
        """What `decode_state` makes of all levels' codes, float, in data units."""
        return self.decode_state(self._merged(codes), y)

    def sample(self, n: int, y: Tensor | None = None, context: Mapping[str, Tensor] = {}) -> Tensor:
        """Decode codes drawn independently from each level's recent use: the baseline that a prior has to beat."""
        y = self.labels_for(n, y) if self.config.conditional else None
        return to_stored(self.decode_codes(self.draw_codes(n), y), self.data)

    def draw_codes(self, n: int) -> dict[str, Int[Tensor, " n *grid"]]:
        """Level -> codes drawn independently from its recent use."""
        return {
            name: torch.multinomial(self.quantiser(name).usage, n * math.prod(grid), replacement=True).view(n, *grid)
            for name, grid in self.grids.items()
        }

    @property
    def reduction(self) -> float:
        """Bits of an example over bits of its codes (a real number counting 32)."""
        bits = 32.0 if self.data.levels is None else math.log2(self.data.levels)
        positions = sum(math.prod(grid) for grid in self.grids.values())
        return self.data.dims * bits / (positions * math.log2(self.config.codes))

    @property
    def dtype(self) -> torch.dtype:
        return next(self.parameters()).dtype

    def quantiser(self, name: str) -> VectorQuantiser:
        quantiser = self.quantisers[name]
        assert isinstance(quantiser, VectorQuantiser)
        return quantiser

    def labelled(self, h: Float[Tensor, " B features *grid"], y: Tensor | None) -> Float[Tensor, " B features *grid"]:
        """`h` with the label's features added everywhere, if the model is conditional."""
        if self.label is None:
            return h
        if y is None:
            raise DataMismatch(f"{type(self).__name__} is class-conditional: give y, one label an example")
        return h + self.label(y.to(h.device).long()).unflatten(1, (-1, *(1,) * (h.ndim - 2)))

    def _merged(self, codes: Mapping[str, Tensor]) -> Float[Tensor, " B S *grid"]:
        state: Tensor | None = None
        for i, name in enumerate(self.names):
            state = self.merge(i, state, self.quantiser(name).look_up(codes[name]))
        assert state is not None
        return state

    def _encode(self, x: Float[Tensor, " B *shape"], observe: bool = False) -> tuple[Tensor, dict[str, Quantised]]:
        state: Tensor | None = None
        levels = {}
        for i, (name, h) in enumerate(zip(self.names, self.features(x), strict=True)):
            levels[name] = self.quantiser(name)(self.project(i, h, state), observe)
            state = self.merge(i, state, levels[name].value)
        assert state is not None
        return state, levels

    def _project_level(self, x: Float[Tensor, " B *shape"], level: int) -> Float[Tensor, " B D *grid"]:
        state: Tensor | None = None
        h = self.features(x)
        for i, name in enumerate(self.names[:level]):
            state = self.merge(i, state, self.quantiser(name)(self.project(i, h[i], state)).value)
        return self.project(level, h[level], state)


class QuantisedAutoencoder(QuantisedModel):
    """Abstract, of images: a Gaussian of fixed variance around what `render` makes of the state, S = `label_features`.

    A concrete model builds its networks and fills in `features`, `project`, `merge` and `render`.
    """

    kind = "image"

    @abstractmethod
    def render(self, state: Float[Tensor, " B S h w"]) -> Float[Tensor, " B C H W"]:
        """The image, in the encoder's units."""

    def misfit(
        self, batch: Batch, x: Float[Tensor, " B C H W"], state: Float[Tensor, " B S h w"]
    ) -> tuple[Float[Tensor, ""], dict[str, Tensor]]:
        mse = F.mse_loss(promote(self.render(self.labelled(state, batch.y))), promote(x))
        return mse, {"mse": mse.detach()}

    def decode_state(self, state: Float[Tensor, " B S h w"], y: Tensor | None) -> Float[Tensor, " B C H W"]:
        """The mean."""
        return from_network(self.render(self.labelled(state, y)), self.data)


def spread(batches: Iterator[Batch], examples: int) -> list[Batch]:
    """At least `examples` of the global pass (or all there are), spread evenly over it, because it may be sorted.

    Every second batch is dropped whenever twice as many as needed are held, so that the pass is walked once, in
    bounded memory, and all ranks keep the same batches.
    """
    kept: list[Batch] = []
    sizes: list[int] = []
    stride = 1
    for i, batch in enumerate(batches):
        if i % stride:
            continue
        kept.append(batch)
        sizes.append(sum(distributed.row_counts(batch.x.shape[0], batch.x.device)))
        if sum(sizes[::2]) >= examples:
            kept, sizes, stride = kept[::2], sizes[::2], 2 * stride
    return kept
