"""Learning factorial codes by predictability minimization. J. Schmidhuber, 1992. Neural Computation 4(6), 863-879.
doi:10.1162/neco.1992.4.6.863; with J. Schmidhuber, M. Eldracher, B. Foltin, 1996. Semilinear predictability
minimization produces well-known feature detectors. Neural Computation 8(4), 773-786. doi:10.1162/neco.1996.8.4.773.

Code units y = f(x) ∈ [0, 1]ⁿ, and for each a predictor Pᵢ that sees the others. Predictors minimise what units maximise
(eqs. 1, 5 and 6; δ = 1, γ = 0 is the author's preferred form),

    T = δ V_C + α V − β I − γ H,   V_C = ½ E Σᵢ (Pᵢ − yᵢ)²,   V = ½ E Σᵢ (ȳᵢ − yᵢ)²,
    H = ½ E Σᵢ (Pᵢ − ȳᵢ)²,   I = ½ E ‖D(y) − x‖²,

so that a unit escapes prediction only by saying what no other says: at the fixed point the code is binary and its units
are independent. With δ = 0 this is section 4's objective (eq. 4). A decoder D (eq. 3's reconstructor) learns to undo
the code; samples are decoded from independent draws of the code's marginals, right where the code is factorial. Units
and predictors have hidden units (section 7); predictors learn ten times as fast as units, with five plays for one.

`networks: semilinear` is the paper of 1996: neither units nor predictors have hidden units, no error passes through a
predictor's inputs to the other units, and both learn in one play; on images a unit may see a disc of pixels only.

Departures: Adam; the papers' plain gradient descent is given without rates, initialisation or batches. Section 7 has
either the tenfold rate (on-line) or the five plays (off-line). Hidden units are tanh. Means instead of sums over
patterns. Neither paper samples: D's hidden layer, its tanh for integers, and the histograms that stand for the
marginals are ours. The first paper's modification against local minima, told elsewhere, is left out. 1996's rotated
photographs and averaged pixels are the data's business; its discs' places are a figure's, here on a spiral.
Expected: four units on eight mixtures of four independent fair bits, three seeds: mutual information of any two units
at most 0.0012 nats, total correlation at most 0.0041; without the game (δ = 0, α = 1) ln 2 and 2.08:
`make results ROW=predictability_factors`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from dgm_core.config import Optimizer, Recipe, Strict
from dgm_core.contract import Batch, Clock, DataSpec, Loss, Turn
from dgm_core.models.adversarial.base import ImplicitModel
from dgm_core.nn.code_units import Marginals, Predictors, Units
from dgm_core.objectives import factorial
from dgm_core.precision import promote

if TYPE_CHECKING:
    from jaxtyping import Float


class Predictability(ImplicitModel):
    """Code units that escape their predictors, and a decoder to sample through."""

    class Config(Strict):
        networks: Literal["hidden", "semilinear"] = Field(default="hidden", description="semilinear: the form of 1996")
        codes: int = Field(default=16, ge=2, description="code units")
        hidden: int = Field(default=128, ge=1, description="hidden units that code units share, and of the decoder")
        predictor_hidden: int = Field(default=16, ge=1, description="hidden units of each predictor")
        predictor_steps: int = Field(default=5, ge=1, description="plays of the predictors for each of the units")
        receptive_field: float | None = Field(
            default=None, ge=2, description="diameter in pixels of the disc that a semilinear unit sees; None: all"
        )
        conditioned_variance: float = Field(default=1.0, ge=0, description="δ, of V_C; 0 leaves the game out")
        variance: float = Field(default=0.0, ge=0, description="α, of V")
        invertibility: float = Field(default=0.0, ge=0, description="β, of I")
        predictability: float = Field(default=0.0, ge=0, description="γ, of H")

        @model_validator(mode="after")
        def _is_whole(self) -> Self:
            if not (self.conditioned_variance or self.variance or self.invertibility):
                raise ValueError("the units need an objective: conditioned_variance, variance or invertibility above 0")
            if self.networks == "semilinear" and self.predictability:
                raise ValueError("predictability needs networks: hidden; no error passes through semilinear predictors")
            if self.networks == "hidden" and self.receptive_field is not None:
                raise ValueError("receptive_field needs networks: semilinear; hidden units see the whole image")
            return self

    config: Config

    @classmethod
    def defaults(cls, data: DataSpec) -> tuple[Config, Recipe]:
        units = Optimizer(lr=1e-3, schedule="linear")
        players = {"predictors": units.merged({"lr": 1e-2}), "units": units, "decoder": units}
        codes = 32 if data.kind == "image" else min(32, max(2, data.dims))
        return cls.Config(codes=codes), Recipe(batch_size=128, steps=10_000, optimizers=players)

    @classmethod
    def tiny(cls, data: DataSpec) -> tuple[Config, Recipe]:
        units = Optimizer(lr=1e-2, schedule="linear")
        players = {"predictors": units.merged({"lr": 2e-2}), "units": units, "decoder": units}
        config = cls.Config(codes=3, hidden=16, predictor_hidden=4, predictor_steps=2, invertibility=1.0)
        return config, Recipe(batch_size=64, steps=150, optimizers=players)

    def __init__(self, config: Config, data: DataSpec) -> None:
        super().__init__(config, data, latents=config.codes)
        c = config
        self.semilinear = c.networks == "semilinear"
        self.units = Units(data.shape, c.codes, 0 if self.semilinear else c.hidden, c.receptive_field)
        self.predictors = Predictors(c.codes, 0 if self.semilinear else c.predictor_hidden)
        bound = [] if data.levels is None else [nn.Tanh()]
        self.decoder = nn.Sequential(nn.Linear(c.codes, c.hidden), nn.Tanh(), nn.Linear(c.hidden, data.dims), *bound)
        self.marginals = Marginals(c.codes)

    def players(self) -> Mapping[str, Sequence[nn.Parameter]]:
        return {name: list(self.get_submodule(name).parameters()) for name in ("predictors", "units", "decoder")}

    def turns(self) -> Sequence[Turn]:
        decoder = Turn("decoder", ("decoder",))
        if self.semilinear:
            return [Turn("game", ("predictors", "units")), decoder]
        predictors = Turn("predictors", ("predictors",), repeat=self.config.predictor_steps)
        return [predictors, Turn("units", ("units",)), decoder]

    def enter(self, turn: str, batches: Iterator[Batch]) -> None:
        if turn == self.turns()[0].name:
            self.measure_units(batches)

    def to_network(self, x: Tensor) -> Float[Tensor, " B *shape"]:
        """Integers are the middles of their intervals: a code of noise would be none of the data."""
        x = x.to(self._dtype) + (0.0 if self.data.levels is None else 0.5)
        return (x - self._lift(self.shift)) / self._lift(self.scale)

    def encode(self, x: Tensor) -> Float[Tensor, " B codes"]:
        """The code of data as stored."""
        return self.units(self.to_network(x))

    def loss(self, batch: Batch, turn: str, clock: Clock) -> Loss:
        x = self.to_network(batch.x)
        if turn == "game":
            return self._game(x)
        if turn == "units":
            y = self.units(x)
            return self._units_loss(x, y, self.predictors(y))
        with torch.no_grad():
            y = self.units(x)
        if turn == "predictors":
            return Loss(factorial.conditioned_variance(y, self.predictors(y)))
        if self.training:
            self.marginals.add(y)
        return Loss(self._reconstruction(x, y))

    def _game(self, x: Float[Tensor, " B *shape"]) -> Loss:
        """Both sides at once: of what either says, the other sees the value alone."""
        y = self.units(x)
        predicted = self.predictors(y.detach())
        units = self._units_loss(x, y, predicted.detach())
        return Loss(units.value + factorial.conditioned_variance(y.detach(), predicted), units.metrics)

    def _units_loss(
        self, x: Float[Tensor, " B *shape"], y: Float[Tensor, " B codes"], predicted: Float[Tensor, " B codes"]
    ) -> Loss:
        """−T."""
        c = self.config
        terms = {
            "conditioned_variance": (-c.conditioned_variance, factorial.conditioned_variance(y, predicted)),
            "variance": (-c.variance, factorial.variance(y)),
            "predictability": (c.predictability, factorial.predictability(y, predicted)),
            "reconstruction": (c.invertibility, self._reconstruction(x, y)),
        }
        value = torch.stack([weight * term for weight, term in terms.values() if weight]).sum()
        between = factorial.pairwise_information(y.detach() > 0.5)
        metrics = {name: term.detach() for name, (_, term) in terms.items()}
        metrics["largest_information"] = (between - between.diag().diag()).max()
        return Loss(value, metrics)

    def _reconstruction(self, x: Float[Tensor, " B *shape"], y: Float[Tensor, " B codes"]) -> Float[Tensor, ""]:
        """I = ½ E ‖D(y) − x‖² (eq. 3)."""
        return 0.5 * (promote(self.decoder(y)) - x.flatten(1)).square().sum(1).mean()

    def after(self, turn: str, clock: Clock) -> None:
        if turn == "decoder":
            self.marginals.settle()

    @torch.no_grad()
    def calibrate(self, batches: Iterator[Batch]) -> None:
        """The marginals of the units as they are now, over one pass."""
        for batch in batches:
            self.marginals.add(self.encode(batch.x.to(self.device)))
        self.marginals.settle(afresh=True)

    def draw_latent(self, n: int) -> Float[Tensor, " n codes"]:
        return self.marginals.draw(n)

    def generate(self, z: Float[Tensor, " B codes"], y: Tensor | None = None) -> Float[Tensor, " B *shape"]:
        return self.decoder(z).to(self._dtype).unflatten(1, self.data.shape)

    @torch.no_grad()
    def measures(self, x: Tensor) -> dict[str, Tensor]:
        """How factorial the code of these examples is, in nats (`dgm_core/objectives/factorial.py`)."""
        y = self.encode(x)
        bits = y > 0.5
        return {
            "entropy": factorial.entropy(bits),
            "pairwise_information": factorial.pairwise_information(bits),
            "predictors_information": factorial.predictors_information(bits, self.predictors(y)),
            "total_correlation": factorial.total_correlation(bits),
        }
