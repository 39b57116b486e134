"""A model of codes and its priors, as one generative model.

p(x) = Σ_codes p(x | codes) Π_levels p(codes_level | coarser codes): train the code model, write its codes down, train a
prior on each level's, and put them together:

    TwoStage(vq_vae2, {"top": top_prior, "bottom": bottom_prior})

Each prior models exactly what `code_specs()` says of its level. The whole is sampled and evaluated like any model;
there is nothing left to train in it. `models/rejection.py` keeps those of its samples that a classifier trusts most.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from dgm_core.capabilities import HasCodes, HasLikelihood
from dgm_core.config import Recipe, Strict
from dgm_core.contract import Batch, Clock, DataMismatch, DataSpec, GenerativeModel, Loss, Turn
from dgm_core.distributions.observation import to_stored

if TYPE_CHECKING:
    from jaxtyping import Float


class TwoStage(GenerativeModel, HasCodes):
    """Samples coarsest to finest through the priors, then decodes.

    Args:
        code_model: any trained model with codes.
        priors: level -> a trained model of that level's codes, for every level of the code model.
    """

    class Config(Strict):
        pass

    @classmethod
    def defaults(cls, data: DataSpec) -> tuple[Config, Recipe]:
        """Nothing to choose: the parts have configurations of their own."""
        return cls.Config(), Recipe(steps=1)

    @classmethod
    def tiny(cls, data: DataSpec) -> tuple[Config, Recipe]:
        return cls.defaults(data)

    def __init__(self, code_model: GenerativeModel, priors: Mapping[str, GenerativeModel]) -> None:
        super().__init__(self.Config(), code_model.data)
        if not isinstance(code_model, HasCodes):
            raise DataMismatch(f"{type(code_model).__name__} has no codes; a code model is a VQ-VAE or a VQ-VAE-2")
        self.specs = dict(code_model.code_specs())
        if set(priors) != set(self.specs):
            raise DataMismatch(
                f"one prior for each of the levels {', '.join(self.specs)} is needed; "
                f"given: {', '.join(priors) or 'none'}"
            )
        for level, spec in self.specs.items():
            _require_same(level, priors[level], spec)
        self.code_model = code_model
        self.priors = nn.ModuleDict({level: priors[level] for level in self.specs})

    def players(self) -> Mapping[str, Sequence[nn.Parameter]]:
        return {}

    def turns(self) -> Sequence[Turn]:
        return ()

    def loss(self, batch: Batch, turn: str, clock: Clock) -> Loss:
        raise RuntimeError("a TwoStage has no turns: its code model and its priors are trained one by one")

    def sample(
        self, n: int, y: Tensor | None = None, context: Mapping[str, Tensor] = {}, **options: Any
    ) -> Float[Tensor, " n *shape"]:
        """Options go to the priors that know them, as they are or, as {level: value}, to those levels alone.

        Where the data has classes, labels are drawn once and shared by all stages.
        """
        given = self._options_by_level(options)
        if self.data.classes:
            y = self.labels_for(n, y)
        codes: dict[str, Tensor] = {}
        for level, spec in self.specs.items():
            coarser = {name: codes[name] for name in spec.context}
            codes[level] = self.prior(level).sample(n, y, coarser, **given[level])
        return to_stored(self.decode_codes(codes, y), self.data)

    def sample_options(self) -> dict[str, Any]:  # of the instance: it depends on the priors
        """Names and defaults of the options that any of the priors takes."""
        return {name: default for level in self.specs for name, default in self.prior(level).sample_options().items()}

    def code_log_prob(self, x: Tensor, y: Tensor | None = None) -> dict[str, Float[Tensor, " B"]]:
        """Level -> log p(codes | coarser codes, y), nats, where that level's prior has a likelihood."""
        codes = self.codes(x, y)
        found = {}
        for level, spec in self.specs.items():
            prior = self.prior(level)
            if isinstance(prior, HasLikelihood):
                found[level] = prior.log_prob(codes[level], y, {name: codes[name] for name in spec.context})
        return found

    def bits_per_code(self, x: Tensor, y: Tensor | None = None) -> dict[str, Float[Tensor, " B"]]:
        """Level -> bits that the prior needs for a code: log2 K would be no prior at all."""
        return {
            level: -nats / (self.specs[level].dims * math.log(2)) for level, nats in self.code_log_prob(x, y).items()
        }

    def code_specs(self) -> Mapping[str, DataSpec]:
        return self._code_model.code_specs()

    def codes(self, x: Tensor, y: Tensor | None = None) -> Mapping[str, Tensor]:
        return self._code_model.codes(x, y)

    def decode_codes(
        self, codes: Mapping[str, Tensor], y: Tensor | None = None, context: Mapping[str, Tensor] = {}
    ) -> Float[Tensor, " B *shape"]:
        return self._code_model.decode_codes(codes, y, context)

    def prior(self, level: str) -> GenerativeModel:
        prior = self.priors[level]
        assert isinstance(prior, GenerativeModel)
        return prior

    def _options_by_level(self, options: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
        takers = {level: self.prior(level).sample_options() for level in self.specs}
        chosen: dict[str, dict[str, Any]] = {level: {} for level in self.specs}
        for name, value in options.items():
            levels = [level for level in self.specs if name in takers[level]]
            wanted = value if isinstance(value, Mapping) else dict.fromkeys(levels, value)
            if not levels or set(wanted) - set(levels):
                raise TypeError(
                    f"sampling option {name!r} is not known at the levels asked for; levels and what each takes: "
                    + "; ".join(f"{level}: {', '.join(takes) or 'nothing'}" for level, takes in takers.items())
                )
            for level, own in wanted.items():
                chosen[level][name] = own
        return chosen

    @property
    def _code_model(self) -> HasCodes:
        assert isinstance(self.code_model, HasCodes)
        return self.code_model


def _require_same(level: str, prior: GenerativeModel, spec: DataSpec) -> None:
    for f in fields(DataSpec):
        given, needed = getattr(prior.data, f.name), getattr(spec, f.name)
        if given != needed:
            raise DataMismatch(
                f"the prior of level {level!r} was built for data of {f.name} {given}, and this model's codes have "
                f"{f.name} {needed}; train it on codes that this very model wrote"
            )
