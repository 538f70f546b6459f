"""A trained model → predictions for any crystals, featurized exactly as those of its training.

| column                                 | meaning                                                |
|----------------------------------------|--------------------------------------------------------|
| `material_id`                          | the crystal's id in its source                         |
| `task`                                 | the question                                           |
| `prediction`                           | the more probable class, or most probable one          |
| `probability`                          | of the positive class, e.g. `stiff`                    |
| `probability_CLASS`                    | instead of it, where there are more than two classes   |
| `lower`, `upper`                       | that probability by the members of the ensemble        |
| `out_of_distribution`                  | unlike the training crystals, see `training.domain`    |
| `value`                                | for a number, log₁₀ of its unit: the median            |
| `reason`                               | why there is no prediction                             |

`lower` and `upper` are the lowest and the highest probability that a member of the ensemble gives;
with several classes, to the predicted one. Nothing need be assumed of how members scatter for this
to have a meaning: one more member, trained in the same way, would fall between them with
probability (M − 1)/(M + 1) of M members. A t interval of so few members would need them to be
normal, and would be as wide as [0, 1] for three. Without an ensemble both are empty.

A model of several questions answers the first of them, or those asked for: then a crystal has a row
for each, and its probabilities are in the columns that belong to the question.

Of a number (`log_bulk_modulus`), `prediction` is the value with its unit, and `lower` and `upper`
are, as `value`, log₁₀ of the unit: where the model expects nine in ten such crystals to lie.
"""

import hashlib
import json
import warnings
from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq
import torch
from numpy.typing import NDArray

from cluster.errors import UserError
from cluster.files import replacing
from featurization.config import FeaturizationConfig
from featurization.shards import Entry
from training import domain
from training.dataset import cloud_set
from training.ensemble import load_run
from training.features import Item, of_dataset, of_sources, of_structures
from training.identity import featurization_of
from training.numbers import quantiles
from training.tasks import Task

# What is predicted at a time: as many crystals, or stored points, at most.
_CRYSTALS, _POINTS = 512, 1 << 21
_SUFFIXES = (".csv", ".parquet", ".jsonl")


class Predictor:
    """A trained model that takes crystals.

    Args:
        run: the folder of a finished training run.
        task: a question of the model, by default its first, or `all`.
        warn: called with what is missing of the run, though not needed to predict.

    Raises:
        UserError: no such run, one that has not finished or is damaged, or one that was not asked
            the question.
    """

    def __init__(
        self,
        run: Path | str,
        task: str | None = None,
        *,
        warn: Callable[[str], None] = warnings.warn,
    ) -> None:
        run = Path(run)
        self._trained, recorded = load_run(run)
        self.featurization = featurization_of(run, recorded)
        self._domain = domain.read(run, recorded["identity"])
        if self._domain is None:
            warn(
                f"{run} has no {domain.FILE}, so that nobody knows which crystals are unlike those "
                "of the training: out_of_distribution stays empty"
            )
        asked = {question.name: question for question in self._trained.config.questions}
        if task not in (None, "all", *asked):
            raise UserError(
                f"{run} was not asked about {task}", remedy=f"ask {', '.join(asked)} or all"
            )
        chosen = [next(iter(asked))] if task is None else asked if task == "all" else [task]
        self.tasks = [asked[name] for name in chosen]
        names = dict.fromkeys(name for each in self.tasks for name in _columns(each))
        self.schema = pa.schema(
            [(name, pa.string()) for name in ("material_id", "task", "prediction")]
            + [(name, pa.float64()) for name in (*names, "lower", "upper")]
            + [("out_of_distribution", pa.bool_()), ("reason", pa.string())]
        )

    def __call__(self, structures: Iterable[Any]) -> list[dict[str, Any]]:
        """One row a crystal, as a dict of the columns of `xtal predict`; what is empty is None.

        Args:
            structures: pymatgen `Structure`s, their dicts, documents, `Crystal`s, and paths of
                files or folders of crystals, in any mixture; or one of these alone.
        """
        items = of_structures(structures, self.featurization)
        return [row for table in self.tables(items) for row in table.to_pylist()]

    def tables(self, items: Iterable[Item]) -> Iterator[pa.Table]:
        """Tables of `self.schema` with one row an item in their order, some hundreds at a time."""
        block: list[Item] = []
        points = 0
        for item in items:
            block.append(item)
            points += len(item[1].cloud.hkl) if isinstance(item[1], Entry) else 0
            if len(block) == _CRYSTALS or points >= _POINTS:
                yield self._table(block)
                block, points = [], 0
        if block:
            yield self._table(block)

    def _table(self, items: list[Item]) -> pa.Table:
        entries = [found for _, found in items if isinstance(found, Entry)]
        answers = zip(*self._answers(entries), strict=True) if entries else iter(())
        rows = [
            {"material_id": _utf8(id), "task": task.name} | answer
            for id, found in items
            for task, answer in zip(
                self.tasks,
                next(answers)
                if isinstance(found, Entry)
                else [{"reason": _utf8(found)}] * len(self.tasks),
                strict=True,
            )
        ]
        return pa.Table.from_pylist(rows, schema=self.schema)

    def _answers(self, entries: list[Entry]) -> list[Iterator[dict[str, Any]]]:
        """Of each question, what is answered of each crystal."""
        data = cloud_set(entries, self.featurization, self._trained.config.radiation)
        logits_MNC = self._trained.logits(data, torch.arange(len(data)))
        strange = None if self._domain is None else domain.flags(data, self._domain)
        shares = [self._trained.shares(logits_MNC, task.name) for task in self.tasks]
        return [
            _answers(task, members_MNC, strange)
            for task, members_MNC in zip(self.tasks, shares, strict=True)
        ]


def _answers(
    task: Task, members_MNC: NDArray[np.float64], strange: NDArray[np.bool_] | None
) -> Iterator[dict[str, Any]]:
    mean_NC = members_MNC.mean(axis=0)
    predicted_N = mean_NC.argmax(axis=1)
    binary = len(task.classes) == 2
    meant_N = np.ones_like(predicted_N) if binary else predicted_N
    meant_MN = np.take_along_axis(members_MNC, meant_N[None, :, None], axis=2)[..., 0]
    numbers_N3 = quantiles(task.edges, mean_NC) if task.edges else None
    finite_N = np.isfinite(mean_NC).all(axis=1)
    for row, predicted in enumerate(predicted_N):
        if not finite_N[row]:
            yield {"reason": "model: its answer is not a finite number"}
            continue
        answer: dict[str, Any] = {"prediction": task.classes[predicted]}
        if numbers_N3 is not None:
            lower, value, upper = numbers_N3[row].tolist()
            answer["prediction"] = f"{10**value:.3g} {task.unit}"
            answer |= {"value": value, "lower": lower, "upper": upper}
        else:
            shown = mean_NC[row, 1:] if binary else mean_NC[row]
            answer |= dict(zip(_columns(task), shown.tolist(), strict=True))
            if len(members_MNC) > 1:
                answer |= {"lower": meant_MN[:, row].min(), "upper": meant_MN[:, row].max()}
        if strange is not None:
            answer["out_of_distribution"] = bool(strange[row])
        yield answer


def _columns(task: Task) -> list[str]:
    """The columns of a question's probabilities, or of its number."""
    if task.edges:
        return ["value"]
    binary = len(task.classes) == 2
    return ["probability"] if binary else [f"probability_{name}" for name in task.classes]


def predict(
    run: Path,
    source: str | Sequence[str],
    out: Path,
    *,
    task: str | None = None,
    processes: int = 1,
    progress: Callable[[int], None] = lambda done: None,
    warn: Callable[[str], None] = warnings.warn,
) -> dict[str, int]:
    """Predict all that sources hold into a table; of a crystal, memory keeps 8 bytes of its id.

    Args:
        run: the folder of a finished training run.
        source: as for `xtal featurize`, or the folder of a finished dataset; or several.
        out: `.csv`, `.parquet` or `.jsonl`, written whole or not at all, in the sources' order.
        task: a question of the model, by default its first, or `all`.
        processes: that featurize beside this one.
        progress: called with the number of crystals done.
        warn: called with what to beware of in the table.

    Returns:
        How many crystals there were, and of how many rows there is a prediction, there is none, and
        the crystal is out of distribution; and how many crystals have the id of an earlier one.

    Raises:
        UserError: no such run or source, a folder or another ending as `out`, a dataset that is
            damaged or featurized otherwise.
    """
    sources = [source] if isinstance(source, str) else list(source)
    if out.suffix not in _SUFFIXES:
        raise UserError(
            f"{out} ends in none of {', '.join(_SUFFIXES)}", remedy="name the table's format so"
        )
    if out.exists() and any(Path(each).exists() and out.samefile(each) for each in sources):
        raise UserError(f"{out} is the source itself", remedy="write to another file")
    if out.is_dir():  # hours later, renaming the table to it would fail
        raise UserError(f"{out} is a folder", remedy="name a file in it")
    predictor = Predictor(run, task, warn=warn)
    counts = {"crystals": 0, "predicted": 0, "not predicted": 0, "out of distribution": 0}
    ids = array("Q")
    items = _noted(_items(sources, predictor.featurization, processes), ids)
    with _writing(out, predictor.schema) as write:
        for table in predictor.tables(items):
            write(table)
            counts["crystals"] += len(table) // len(predictor.tasks)
            counts["predicted"] += len(table) - table["prediction"].null_count
            counts["not predicted"] += table["prediction"].null_count
            counts["out of distribution"] += sum(
                filter(None, table["out_of_distribution"].to_pylist())
            )
            progress(counts["crystals"])
    counts["with the id of another"] = again = len(ids) - len(np.unique(np.asarray(ids)))
    if again:
        warn(
            f"{again:,} crystals have a material_id that another one before them has; the rows are "
            "in the order of the source"
        )
    return counts


def _items(sources: Sequence[str], config: FeaturizationConfig, processes: int) -> Iterator[Item]:
    """Of datasets, and of other sources, which share the processes."""
    kinds = groupby(sources, lambda each: (Path(each) / "manifest.json").is_file())
    for finished, some in kinds:
        if finished:
            for each in some:
                yield from of_dataset(Path(each), config)
        else:
            yield from of_sources(list(some), config, processes)


def _noted(items: Iterable[Item], ids: "array[int]") -> Iterator[Item]:
    """The items; of each id, where there is one, a hash of 64 bits goes into `ids`."""
    for id, found in items:
        if id:
            digest = hashlib.blake2b(id.encode("utf-8", "surrogatepass"), digest_size=8).digest()
            ids.append(int.from_bytes(digest, "little"))
        yield id, found


@contextmanager
def _writing(path: Path, schema: pa.Schema) -> Iterator[Callable[[pa.Table], None]]:
    # Opened here: an error of pyarrow's own names no file.
    with replacing(path) as temporary, temporary.open("wb") as stream:
        if path.suffix == ".parquet":
            with pq.ParquetWriter(stream, schema) as parquet:
                yield parquet.write_table
        elif path.suffix == ".csv":
            with pyarrow.csv.CSVWriter(stream, schema) as table:
                yield table.write
        else:
            yield lambda table: stream.writelines(
                json.dumps(row, ensure_ascii=False).encode() + b"\n" for row in table.to_pylist()
            )


def _utf8(text: str) -> str:
    """Names of files and broken texts can hold what no UTF-8 spells."""
    return text.encode("utf-8", "backslashreplace").decode()
