"""The grid as its TOML file states it: tasks × models × arms × strengths × modes × seeds.

`ablation.plan` makes trials of it. The grids that come with the program lie in `grids/`.
"""

from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from pydantic import Field, GetPydanticSchema, field_validator, model_validator

from ablation.perturbations import ARMS, strength_of
from ablation.trials import REFERENCE
from cluster.config import Config, build_config, names, read_toml
from cluster.errors import UserError
from training.config import ModelName, TrainingConfig
from training.tasks import TASKS, TaskName

Mode = Literal["retrain", "test_only", "train_only"]
GRIDS = Path(__file__).parent / "grids"
_SIX = (
    REFERENCE,
    "intensity_binary",
    "intensity_shuffled",
    "intensity_scaled",
    "directions_random",
    "basis_only",
)
# Settings of a training that the grid itself decides, and what to write instead.
_DECIDED = {
    "seed": "seeds = [0, 1, 2]",
    "workers": "processes = 2",
    "restarts": "retries = 2",
    "metrics_port": "metrics_port = 8080",
}


def _distinct(values: tuple[Any, ...]) -> tuple[Any, ...]:
    if len(set(values)) < len(values):
        raise ValueError(f"{values} names something twice")
    return values


class ArmChoice(Config):
    """An arm with the strengths to apply it at."""

    name: str
    """A perturbation."""
    strengths: tuple[float, ...] | Literal["ladder"] | None = None
    """Doses in the arm's unit; "ladder" takes the arm's own series, none given its default."""

    @model_validator(mode="after")
    def _known(self) -> "ArmChoice":
        if self.name not in ARMS:
            raise ValueError(f"unknown arm {self.name}; arms are {', '.join(ARMS)}")
        if self.strengths == "ladder" and ARMS[self.name].strength is None:
            raise ValueError(f"arm {self.name} has no strength, hence no ladder")
        if self.strengths == ():
            raise ValueError(f"arm {self.name}: no strength given; leave the key out")
        _distinct(self.doses)
        for dose in self.doses:
            strength_of(self.name, dose)
        return self

    @property
    def doses(self) -> tuple[float | None, ...]:
        """Strengths, resolved; (None,) of an arm without."""
        known = ARMS[self.name].strength
        if self.strengths == "ladder" and known is not None:
            return tuple(map(float, known.ladder))
        if isinstance(self.strengths, tuple):
            return self.strengths
        return (None,) if known is None else (float(known.default),)


# Typed as what may be given; a validator makes choices of the names.
_Arm = Annotated[ArmChoice | str, GetPydanticSchema(lambda _, handler: handler(ArmChoice))]


class Exclusion(Config):
    """Trials to leave out: all whose values are among those given here."""

    task: tuple[TaskName, ...] = ()
    """Tasks; none given: all. The other keys likewise."""
    model: tuple[ModelName, ...] = ()
    """Models."""
    arm: tuple[str, ...] = ()
    """Arms."""
    mode: tuple[Mode, ...] = ()
    """Modes."""
    strength: tuple[float, ...] = ()
    """Strengths."""
    seed: tuple[int, ...] = ()
    """Seeds."""

    @field_validator("*", mode="before")
    @classmethod
    def _several(cls, value: Any) -> Any:
        return value if isinstance(value, list | tuple) else (value,)

    def covers(self, **trial: Any) -> bool:
        """Whether a trial of these values is left out."""
        given = {name: values for name, values in self.model_dump().items() if values}
        return all(trial[name] in values for name, values in given.items())


class GridConfig(Config):
    """A grid; its reference arm none is trained with every task, model and seed."""

    dataset: str
    """Folder that `xtal featurize` wrote; relative paths start at the grid's file."""
    tasks: tuple[TaskName, ...] = ()
    """Questions; by default the one of [training]."""
    models: tuple[ModelName, ...] = ()
    """Networks and trees; by default the one of [training]."""
    arms: tuple[_Arm, ...] = tuple(ArmChoice(name=name) for name in _SIX)
    """Perturbations to compare, by name or as {name = "…", strengths = […]}; none is the
    reference and must be there."""
    modes: tuple[Mode, ...] = ("retrain",)
    """retrain: train and test perturbed; test_only: the model of none meets perturbed clouds;
    train_only: a model of perturbed clouds meets those of none."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Each condition is trained once a seed; differences are paired by seed."""
    exclude: tuple[Exclusion, ...] = ()
    """Trials to leave out, such as {model = "boosted", arm = "pose_fixed"}."""
    processes: int = Field(default=0, ge=0)
    """Trials that run side by side; 0 takes one a processor core."""
    retries: int = Field(default=2, ge=0, le=100)
    """How often a failed trial is tried again before it is listed as failed."""
    metrics_port: int | None = Field(default=None, ge=1024, le=65535)
    """Port of the loopback network where Prometheus finds numbers of the grid; a batch job's Ray
    has ports of its own."""
    training: TrainingConfig = TrainingConfig()
    """Everything else of a training; its seed is set by the grid."""
    overrides: dict[str, dict[str, Any]] = Field(default_factory=dict)
    """Model or task → its own settings: [training.NAME] in the file."""

    @field_validator("arms", mode="before")
    @classmethod
    def _names(cls, arms: Any) -> Any:
        if not isinstance(arms, list | tuple):
            return arms
        return tuple({"name": arm} if isinstance(arm, str) else arm for arm in arms)

    @field_validator("arms")
    @classmethod
    def _arms(cls, arms: tuple[ArmChoice, ...]) -> tuple[ArmChoice, ...]:
        _distinct(tuple(arm.name for arm in arms))
        if REFERENCE not in [arm.name for arm in arms]:
            raise ValueError("the reference arm none is missing")
        return arms

    @field_validator("tasks", "models", "modes")
    @classmethod
    def _once(cls, values: tuple[Any, ...]) -> tuple[Any, ...]:
        return _distinct(values)

    @field_validator("seeds")
    @classmethod
    def _seeds(cls, seeds: tuple[int, ...]) -> tuple[int, ...]:
        if not seeds or min(seeds) < 0 or max(seeds) >= 2**63:
            raise ValueError("at least one seed is needed, none below 0, each less than 2⁶³")
        return _distinct(seeds)

    @model_validator(mode="after")
    def _whole(self) -> "GridConfig":
        if not self.modes:
            raise ValueError(f"modes = []: give some of {', '.join(get_args(Mode))}")
        there: dict[str, set[Any]] = {
            "task": set(self.all_tasks),
            "model": set(self.all_models),
            "arm": {arm.name for arm in self.choices},
            "mode": set(self.modes),
            "strength": {dose for arm in self.choices for dose in arm.doses},
            "seed": set(self.seeds),
        }
        for number, exclusion in enumerate(self.exclude):
            given = {name: values for name, values in exclusion.model_dump().items() if values}
            if not given:
                raise ValueError(f"exclude.{number} says nothing, which would leave out all")
            for name, values in given.items():
                if strange := sorted(map(str, set(values) - there[name])):
                    raise ValueError(
                        f"exclude.{number}: the grid has no {name} {', '.join(strange)}"
                    )
        if strange := sorted(set(self.overrides) - there["task"] - there["model"]):
            raise ValueError(
                f"[training.{strange[0]}]: the grid has no such task or model; it has "
                f"{', '.join((*self.all_tasks, *self.all_models))}"
            )
        if len(self.all_tasks) > 1 and self.training.threshold is not None:
            raise ValueError(
                f"threshold = {self.training.threshold:g} of several tasks; give it under "
                f"[training.{self.all_tasks[0]}]"
            )
        return self

    @property
    def choices(self) -> tuple[ArmChoice, ...]:
        """The arms."""
        return tuple(arm for arm in self.arms if isinstance(arm, ArmChoice))

    @property
    def all_tasks(self) -> tuple[TaskName, ...]:
        """The questions."""
        return self.tasks or (self.training.task,)

    @property
    def all_models(self) -> tuple[ModelName, ...]:
        """The models."""
        return self.models or (self.training.model,)

    def training_of(self, task: TaskName, model: ModelName, seed: int) -> TrainingConfig:
        """The whole configuration of one training.

        Raises:
            UserError: the settings of this task and this model do not go together.
        """
        own = self.overrides.get(task, {}) | self.overrides.get(model, {})
        values = self.training.model_dump() | own | {"task": task, "model": model, "seed": seed}
        return build_config(
            TrainingConfig, values, where=f"[training] of task {task} and model {model}"
        )


def read_grid(path: str | Path, **overrides: Any) -> GridConfig:
    """Parse and validate a grid file; `overrides` that are not None replace its keys.

    Args:
        path: a file, or the name of one in `grids/`, such as paper.

    Raises:
        UserError: naming each wrong key or value, or that no dataset is given.
    """
    path = Path(path)
    shipped = GRIDS / f"{path.name}.toml"
    if not path.exists() and path.parent == Path() and shipped.exists():
        path = shipped
    elif not path.exists():
        names = ", ".join(sorted(each.stem for each in GRIDS.glob("*.toml")))
        raise UserError(f"{path}: no such file", remedy=f"give a TOML file, or one of {names}")
    values = read_toml(path)
    training = values.pop("training", {})
    if not isinstance(training, dict):
        raise UserError(f"{path}: training = {training!r}", remedy="write a table: [training]")
    tables = {key: value for key, value in training.items() if isinstance(value, dict)}
    own = {name: table for name, table in tables.items() if _is_name(name)}
    shared = {key: value for key, value in training.items() if key not in own}
    for key, several in (("task", "tasks"), ("model", "models")):
        if key in shared and several in values:
            raise UserError(
                f"{path}: both {several} = {values[several]!r} and training.{key} = "
                f"{shared[key]!r}",
                remedy=f"keep {several}",
            )
    for name, table in (("", shared), *own.items()):
        for key, instead in _DECIDED.items():
            if key in table:
                dotted = ".".join(filter(None, ("training", name, key)))
                raise UserError(
                    f"{path}: {dotted} = {table[key]!r} has no place in a grid",
                    remedy=f"use {instead} at the top of the file",
                )
        if name:
            build_config(TrainingConfig, _without(table, path, name), where=f"{path} [{name}]")
    values["training"] = build_config(TrainingConfig, shared, where=f"{path} [training]")
    values["overrides"] = own
    given = {key: value for key, value in overrides.items() if value is not None}
    if "dataset" in values and "dataset" not in given:
        values["dataset"] = str((path.parent / str(values["dataset"])).resolve())
    grid = build_config(GridConfig, {"dataset": "DATA"} | values | given, where=str(path))
    if "dataset" not in values | given:
        remedy = "give --dataset DATA"
        if path != shipped:
            remedy += ', or write dataset = "DATA" into the file'
        raise UserError(f"{path}: dataset: not given", remedy=remedy)
    return grid


def _is_name(name: str) -> bool:
    """Whether it names a task or a model."""
    return name in TASKS or name in names(ModelName)


def _without(table: dict[str, Any], path: Path, name: str) -> dict[str, Any]:
    """A model's or task's own settings, in a form that can be checked alone."""
    for key in ("task", "model"):
        if key in table:
            raise UserError(
                f"{path}: training.{name}.{key} = {table[key]!r}", remedy=f"leave {key} out"
            )
    return {"task": name, **table} if name in TASKS else {"model": name, **table}
