"""What a search looks through: entries of `tune:` in `params.yaml`."""

from __future__ import annotations

from typing import Any, Literal, Self

from pydantic import Field, model_validator

from dgm_core.config import Strict


class Distribution(Strict):
    """Where a key's values come from, by Ray Tune's name for it; exactly one is given."""

    uniform: tuple[float, float] | None = None
    loguniform: tuple[float, float] | None = None
    quniform: tuple[float, float, float] | None = Field(default=None, description="low, high, step")
    randint: tuple[int, int] | None = Field(default=None, description="low, and high, which is left out")
    choice: tuple[Any, ...] | None = Field(default=None, min_length=1)

    @model_validator(mode="after")
    def _is_one(self) -> Self:
        if len(self.model_fields_set) != 1 or None in (getattr(self, name) for name in self.model_fields_set):
            raise ValueError(f"give exactly one of {', '.join(type(self).model_fields)}")
        name, given = self.given
        if name != "choice" and not given[0] < given[1]:
            raise ValueError(f"{name}: [{given[0]}, {given[1]}] is empty: give low < high")
        if name == "loguniform" and given[0] <= 0:
            raise ValueError(f"loguniform starts above 0; {given[0]} was given")
        if name == "quniform" and given[2] <= 0:
            raise ValueError(f"quniform's step is above 0; {given[2]} was given")
        return self

    @property
    def given(self) -> tuple[str, tuple[Any, ...]]:
        """The name and its arguments."""
        (name,) = self.model_fields_set
        return name, getattr(self, name)

    def near(self, value: Any) -> Any:
        """The value, brought into the range."""
        name, given = self.given
        if name == "choice":
            return value
        if name == "randint":
            return min(max(round(value), given[0]), given[1] - 1)
        return float(f"{min(max(value, given[0]), given[1]):.6g}")


class Search(Strict):
    """One entry of `tune:`: a search for better settings of the run of this name."""

    family: str = Field(description="the run's; DVC cannot look it up there")
    data: str = Field(description="the run's")
    judge: str = Field(description="the run's")
    space: dict[str, Distribution] = Field(min_length=1, description="config.… or recipe.… -> where values come from")
    trials: int = Field(default=8, ge=2, description="the first of them is the default configuration")
    search: Literal["random", "optuna"] = "random"
    scheduler: Literal["asha", "none", "pbt"] = "asha"
    monitor: tuple[str, Literal["min", "max"]] | None = Field(default=None, description="None: the recipe's")
    steps: int | None = Field(default=None, gt=0, description="rounds of a whole trial; None: the run's")
    grace: int | None = Field(default=None, gt=0, description="rounds before the first decision; None: steps / 9")
    reduction: float = Field(default=3.0, gt=1, description="of the trials that meet at a rung, one in so many goes on")
    seed: int = Field(0, ge=0)
    minutes: float | None = Field(default=None, gt=0, description="of wall clock, after which trials are stopped")

    @model_validator(mode="after")
    def _keys_are_of_a_run(self) -> Self:
        for key in self.space:
            if key.split(".")[0] not in ("config", "recipe") or key.count(".") == 0:
                raise ValueError(f"space.{key}: a key starts with config. or recipe., as in recipe.batch_size")
        if self.scheduler == "pbt" and self.search == "optuna":
            raise ValueError("search: optuna proposes trials, scheduler: pbt changes them as they run: choose one")
        return self
