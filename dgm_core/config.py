"""Configuration base class, and the recipe: how a model is stepped.

*Config* (one per model, beside it) is what changes the network or the loss; *Recipe* is how it is stepped. Both are
frozen, both refuse unknown keys, and both say which known key was probably meant.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator


class RecipeError(ValueError):
    """A recipe asks for what the model or the run does not have; the message says what is there."""


class Strict(BaseModel):
    """Frozen pydantic model that refuses unknown keys and names the nearest known one."""

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=(), allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _name_the_nearest_key(cls, given: Any) -> Any:
        if isinstance(given, Mapping):
            known = set(cls.model_fields) | {f.alias for f in cls.model_fields.values() if f.alias}
            for key in given:
                if key not in known:
                    near = difflib.get_close_matches(str(key), sorted(known), n=1, cutoff=0.5)
                    hint = f"; did you mean {near[0]!r}?" if near else ""
                    raise ValueError(f"{cls.__name__} has no key {key!r}{hint} Known keys: {', '.join(sorted(known))}.")
        return given

    def merged(self, overrides: Mapping[str, Any]) -> Self:
        """A validated copy with `overrides` merged in; nested mappings are merged key by key.

        `model_copy(update=)` would skip validation, so the merge happens on plain data.
        """
        return type(self).model_validate(merge(self.model_dump(), overrides))


def merge(base: Mapping[str, Any], overrides: Mapping[str, Any]) -> dict[str, Any]:
    """Merge nested mappings; the right-hand side wins, scalars and lists are replaced whole."""
    result = dict(base)
    for key, value in overrides.items():
        known = result.get(key)
        result[key] = merge(known, value) if isinstance(known, Mapping) and isinstance(value, Mapping) else value
    return result


def _as_floats(value: Any) -> Any:
    # torch's Adam refuses betas that mix ints and floats, which is what YAML makes of `[0, 0.9]`.
    return tuple(float(v) for v in value) if isinstance(value, list | tuple) else value


Betas = Annotated[tuple[float, float], BeforeValidator(_as_floats)]


class ParameterGroup(Strict):
    """What differs for the parameters whose names match a pattern."""

    lr_scale: float = Field(default=1.0, ge=0)
    weight_decay: float | None = Field(default=None, ge=0)


class Optimizer(Strict):
    """One player's optimiser.

    `lr` at round t is `lr * warm-up * schedule(t / total)`. The schedule is a function of the clock alone, so a
    resumed run needs no scheduler state.
    """

    algorithm: Literal["adam", "adamw", "adamax", "sgd", "rmsprop", "adagrad"] = "adam"
    lr: float = Field(gt=0)
    betas: Betas = (0.9, 0.999)
    alpha: float = Field(default=0.99, ge=0, lt=1, description="RMSprop's decay of the squared gradient")
    momentum: float = Field(default=0.0, ge=0, lt=1)
    eps: float = Field(default=1e-8, ge=0)
    weight_decay: float = Field(default=0.0, ge=0)
    schedule: Literal["constant", "linear", "cosine", "exponential"] = "constant"
    final: float = Field(default=0.0, ge=0, description="multiple of lr that the schedule ends at")
    warmup: int = Field(default=0, ge=0, description="rounds of linear warm-up")
    groups: dict[str, ParameterGroup] = Field(default_factory=dict, description="name pattern (fnmatch) -> group")
    clip_norm: float | None = Field(default=None, gt=0)
    clip_value: float | None = Field(default=None, gt=0)
    ema: float | None = Field(default=None, ge=0, lt=1, description="decay of the averaged copy of the parameters")

    @model_validator(mode="after")
    def _schedule_is_whole(self) -> Self:
        if self.schedule == "exponential" and self.final <= 0:
            raise ValueError("schedule 'exponential' decays lr to `final` times itself: give 0 < final, e.g. 0.01")
        return self


class Recipe(Strict):
    """How a model is stepped: batches, rounds, one optimiser a player, precision, and what is watched.

    `batch_size` is global: W ranks hold B/W examples each. It may be a list of `[progress, size]` pairs: from that
    share of training on, this size. `microbatch` splits a rank's share for memory. `monitor` names the validation
    metric that decides the best checkpoint, early stopping and a search.
    """

    batch_size: int | tuple[tuple[float, int], ...] = 128
    microbatch: int | None = Field(default=None, gt=0, description="examples a rank puts through the model at once")
    steps: int = Field(gt=0, description="rounds")
    optimizers: dict[str, Optimizer] = Field(default_factory=dict, description="player -> optimiser")
    augment: tuple[Literal["hflip"], ...] = ()
    monitor: tuple[str, Literal["min", "max"]] | None = None
    evaluate_every: int | None = Field(
        default=None, gt=0, description="rounds between validations; None: at the end only"
    )
    patience: int | None = Field(default=None, gt=0, description="validations without a better monitor before stopping")
    precision: Literal["auto", "fp32", "bf16", "fp64"] = "auto"
    compile: bool = False

    @model_validator(mode="after")
    def _batch_size_is_positive(self) -> Self:
        if isinstance(self.batch_size, int):
            sizes: tuple[tuple[float, int], ...] = ((0.0, self.batch_size),)
        else:
            sizes = self.batch_size
        if not sizes or sizes[0][0] != 0.0 or any(size < 1 for _, size in sizes):
            raise ValueError("batch_size is a positive number, or pairs [progress, size] that start at progress 0")
        if list(sizes) != sorted(sizes) or any(not 0 <= p < 1 for p, _ in sizes):
            raise ValueError("batch_size's pairs [progress, size] are in order of progress, each in [0, 1)")
        if self.patience is not None and (self.monitor is None or self.evaluate_every is None):
            raise ValueError("patience needs monitor (what to watch) and evaluate_every (how often)")
        return self

    def batch_size_at(self, progress: float) -> int:
        """The global batch size at this share of training."""
        if isinstance(self.batch_size, int):
            return self.batch_size
        return next(size for start, size in reversed(self.batch_size) if progress >= start)
