"""`params.yaml`, typed and validated; unknown keys are refused, with the nearest known one."""

from __future__ import annotations

import difflib
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import Field, ValidationError, field_validator, model_validator
from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from dgm_core.config import Recipe, Strict, merge
from dgm_core.contract import DataMismatch, DataSpec, GenerativeModel
from dgm_core.data import sources
from dgm_core.data.sources.base import Source
from dgm_core.evaluation.record import EvaluationConfig
from dgm_core.models import CATALOG
from dgm_core.runs import find_model
from dgm_core.training.trainer import Schedule
from pipelines.command import Usage
from pipelines.space import Search
from pipelines.storage import check_uri

EMBEDDED = "dgm_core/data/sources"  # where data that comes with the code comes from: DVC needs a path to watch


def home() -> Path:
    """The project's folder; also from a copy that DVC makes for a queued experiment, and deletes afterwards."""
    here = Path.cwd()
    for copy in here.parents:
        if copy.parts[-3:] == (".dvc", "tmp", "exps"):
            return Path(*copy.parts[:-3])
    return here


class Run(Strict):
    """One entry of `runs:`."""

    model: str
    family: str
    data: str = Field(description="a data set of `datasets:`, or codes/<run>/<level>")
    judge: str = Field(description="the data set of `datasets:` whose judge scores this run's samples")
    config: dict[str, Any] = Field(default_factory=dict, description="overrides of the model's default Config")
    recipe: dict[str, Any] = Field(default_factory=dict, description="overrides of the model's default Recipe")
    preset: Literal["paper", "tiny"] = "paper"
    seed: int = Field(0, ge=0)
    seeds: int = Field(1, ge=1, description="train with seed, seed + 1, …; figures are mean ± sd")
    init_from: str | None = Field(default=None, description="start from this run's weights")

    @model_validator(mode="after")
    def _family_is_the_models(self) -> Self:
        family = find_model(self.model).__module__.split(".")[-2]
        if self.family != family:
            raise ValueError(f"{self.model} belongs to family {family!r}, but {self.family!r} was given")
        return self


class TwoStageRun(Strict):
    """One entry of `two_stage:`: a code model and a prior for each of its levels."""

    codes: str
    priors: dict[str, str]
    data: str
    seed: int = Field(0, ge=0)
    sample: dict[str, Any] = Field(default_factory=dict, description="options of the priors' `sample`")


class Encode(Strict):
    """One entry of `encode:`: a run whose codes become data sets, one a level."""

    data: str


class Cluster(Strict):
    """Where jobs run. Not tracked by DVC: moving to a cluster reruns nothing."""

    workers: int | tuple[int, int] = Field(
        default=1, description="0: in this process, without Ray; [least, most]: as many as there is room for"
    )
    cpus_per_worker: int | None = Field(default=None, ge=1, description="None: the cluster's CPUs shared out")
    gpus_per_worker: float = Field(default=0, ge=0)
    max_failures: int = Field(default=3, ge=0, description="restarts of a job from its last checkpoint")
    start_timeout_s: float = Field(default=60, gt=0)
    resize_seconds: float = Field(default=60, gt=0, description="how often a job of [least, most] looks for room")
    ship_code: bool = Field(default=False, description="send this project's code with every job: it is in no image")
    storage: str = Field(default=".dgm", description="relative: on this machine; else a path all see, or s3://…")
    storage_patience_s: float = Field(default=300, gt=0, description="how long a failing store is tried again")
    cache: str = Field(default="", description="each node's own folder for copies of data; '': under its /tmp")
    cache_gib: float = Field(default=50, gt=0, description="the least recently used copies beyond this are removed")
    report_seconds: float = Field(default=10, gt=0, description="least time between reports of a job's metrics")
    log_every: int = Field(default=50, ge=1)
    checkpoint_every: int | None = Field(default=None, ge=1)
    checkpoint_seconds: float | None = Field(default=120, gt=0)
    keep_state_days: float = Field(default=14, gt=0, description="abandoned state older than this is swept")

    @field_validator("workers")
    @classmethod
    def _is_a_number_or_a_range(cls, given: int | tuple[int, int]) -> int | tuple[int, int]:
        if isinstance(given, int):
            if given < 0:
                raise ValueError(f"{given} workers are not accepted: 0 (this process), 1, 2, …, or [least, most]")
        elif not 1 <= given[0] <= given[1]:
            raise ValueError(f"[{given[0]}, {given[1]}] is not accepted: give [least, most] with 1 <= least <= most")
        return given

    @field_validator("storage")
    @classmethod
    def _is_a_place(cls, given: str) -> str:
        return check_uri(given)

    @property
    def least(self) -> int:
        return self.workers if isinstance(self.workers, int) else self.workers[0]

    @property
    def most(self) -> int:
        return self.workers if isinstance(self.workers, int) else self.workers[1]

    @property
    def shared(self) -> bool:
        """Whether the storage is one that other machines see too."""
        return "://" in self.storage or Path(self.storage).is_absolute()

    @property
    def local(self) -> Path:
        """This machine's folder for locks, and for the state of jobs where the storage is not shared."""
        return home() / (".dgm" if self.shared else self.storage)

    @property
    def schedule(self) -> Schedule:
        return Schedule(self.log_every, self.checkpoint_every, self.checkpoint_seconds)


class Tracking(Strict):
    """MLflow. `MLFLOW_TRACKING_URI` wins over `uri`. Not tracked by DVC."""

    uri: str = "sqlite:///mlflow.db"
    experiment: str = "dgm"
    artifacts: str = "mlartifacts"
    log_model: bool = True
    system_metrics: bool = True
    flush_seconds: float = Field(default=20, ge=0, description="a finished stage waits so long for a dead server")


class JudgeConfig(Strict):
    """The classifier that scores samples (`dgm_core.evaluation.judge.fit_judge`)."""

    seed: int = Field(default=0, ge=0)
    steps: int = Field(default=600, ge=1)
    batch_size: int = Field(default=128, ge=1)
    features: int = Field(default=64, ge=1)
    lr: float = Field(default=2e-3, gt=0)


def parse_source(given: Mapping[str, Any]) -> Source:
    """An entry of `datasets:` as a source's configuration."""
    return sources.parse({**given, "path": "" if given.get("path") == EMBEDDED else given.get("path", "")})


class Params(Strict):
    """The whole file."""

    datasets: dict[str, dict[str, Any]]
    runs: dict[str, Run]
    encode: dict[str, Encode] = Field(default_factory=dict)
    two_stage: dict[str, TwoStageRun] = Field(default_factory=dict)
    tune: dict[str, Search] = Field(default_factory=dict)
    judge: JudgeConfig = JudgeConfig()
    evaluate: EvaluationConfig = EvaluationConfig()
    cluster: Cluster = Cluster()
    tracking: Tracking = Tracking()

    @model_validator(mode="after")
    def _names_fit(self) -> Self:
        for name, given in self.datasets.items():
            try:
                parse_source(given)
            except ValidationError as error:
                raise ValueError(f"datasets.{name}: {_plain(error)}") from None
            except DataMismatch as error:
                raise ValueError(f"datasets.{name}: {error}") from None
        for name, run in self.runs.items():
            _known(run.judge, self.datasets, f"runs.{name}.judge", "a data set")
            self._check_data(run.data, f"runs.{name}.data")
            if run.init_from is not None:
                _known(run.init_from, self.runs, f"runs.{name}.init_from", "a run")
        for name, entry in self.encode.items():
            _known(name, self.runs, f"encode.{name}", "a run")
            if entry.data != self.runs[name].data:
                raise ValueError(
                    f"encode.{name}.data is {entry.data!r}, but the run's data is {self.runs[name].data!r}"
                )
        for name, two in self.two_stage.items():
            if name in self.runs:
                raise ValueError(f"two_stage.{name}: a run has this name already")
            _known(two.codes, self.runs, f"two_stage.{name}.codes", "a run")
            _known(two.data, self.datasets, f"two_stage.{name}.data", "a data set")
            for level, prior in two.priors.items():
                _known(prior, self.runs, f"two_stage.{name}.priors.{level}", "a run")
        for name, search in self.tune.items():
            _known(name, self.runs, f"tune.{name}", "a run")
            for key in ("family", "data", "judge"):
                given, own = getattr(search, key), getattr(self.runs[name], key)
                if given != own:
                    raise ValueError(f"tune.{name}.{key} is {given!r}, but the run's is {own!r}")
        return self

    def _check_data(self, data: str, where: str) -> None:
        parts = data.split("/")
        if len(parts) == 3 and parts[0] == "codes":
            _known(parts[1], self.encode, where, "an entry of encode")
        else:
            _known(data, self.datasets, where, "a data set")

    def run(self, name: str) -> Run:
        if name not in self.runs:
            raise Usage(_unknown(name, self.runs, "runs", "a run"))
        return self.runs[name]


def _known(name: str, known: Iterable[str], where: str, what: str) -> None:
    if name not in (names := list(known)):
        raise ValueError(_unknown(name, names, where, what))


def _unknown(name: str, known: Iterable[str], where: str, what: str) -> str:
    names = list(known)
    near = difflib.get_close_matches(name, names, n=1)
    hint = f"; did you mean {near[0]!r}?" if near else "."
    return f"{where}: {name!r} is not {what}{hint} Known: {', '.join(names) or 'none'}"


def _plain(error: ValidationError) -> str:
    """pydantic's errors as `where: what`, without its decoration."""
    lines = []
    for e in error.errors():
        where = ".".join(str(part) for part in e["loc"])
        lines.append(f"{where}: {e['msg'].removeprefix('Value error, ')}" if where else e["msg"])
    return "; ".join(dict.fromkeys(line.removeprefix("Value error, ") for line in lines))


def load_params(path: Path = Path("params.yaml"), overrides: Sequence[str] = ()) -> Params:
    """Read and validate the file, with `a.b.c=value` overrides merged in first (values are YAML).

    `DGM_CLUSTER` names a YAML file whose keys override those of `cluster:`: where jobs run differs between machines.

    Raises:
        Usage: the file is missing, is not YAML, or says something that is not accepted.
    """
    try:
        given = yaml_load(path.read_text())
    except FileNotFoundError:
        raise Usage(f"{path} is not here: run from the repository's root") from None
    except YAMLError as error:
        raise Usage(f"{path} is not YAML: {error}") from None
    for override in overrides:
        given = merge(given, _as_tree(override))
    if overlay := os.environ.get("DGM_CLUSTER"):
        given = merge(given, {"cluster": _overlay(Path(overlay))})
    try:
        return Params.model_validate(given)
    except ValidationError as error:
        raise Usage(f"{path}: {_plain(error)}") from None


def _overlay(path: Path) -> Mapping[str, Any]:
    try:
        given = yaml_load(path.read_text())
    except (OSError, YAMLError) as error:
        raise Usage(f"DGM_CLUSTER={path}: {error}") from None
    if not isinstance(given, Mapping):
        raise Usage(f"DGM_CLUSTER={path} is not accepted: it must hold keys of `cluster:`")
    return given


def _as_tree(override: str) -> dict[str, Any]:
    key, sign, value = override.partition("=")
    if not sign or not key:
        raise Usage(f"{override!r} is not an override: write key.of.it=value")
    tree: Any = yaml_load(value)
    for part in reversed(key.split(".")):
        tree = {part: tree}
    return tree


def yaml_load(text: str) -> Any:
    """YAML 1.2, as DVC reads it: `1e-4` is a number, `no` is a word."""
    return YAML(typ="safe", pure=True).load(text)


def resolve(
    name: str, run: Run, spec: DataSpec, tuned: Path = Path("tuned")
) -> tuple[type[GenerativeModel], Any, Recipe]:
    """The run's model class, Config and Recipe: paper (or tiny) < tuned/<run>.yaml < params.

    Raises:
        Usage: an override is not accepted, or the model cannot model this data.
    """
    model = CATALOG[run.model]
    best: Mapping[str, Any] = {}
    if (path := tuned / f"{name}.yaml").is_file():
        best = yaml_load(path.read_text()) or {}
    try:
        config, recipe = model.tiny(spec) if run.preset == "tiny" else model.defaults(spec)
        config = config.merged(merge(best.get("config", {}), run.config))
        recipe = recipe.merged(merge(best.get("recipe", {}), run.recipe))
    except ValidationError as error:
        raise Usage(f"runs.{name}: {_plain(error)}") from None
    except DataMismatch as error:
        raise Usage(f"runs.{name}: {error}") from None
    return model, config, recipe
