"""All tables of a grid's folder, made from its trials: Parquet and CSV.

| table       | where                                   | content                            |
|-------------|-----------------------------------------|------------------------------------|
| `metrics`   | `metrics.parquet`, `tables/metrics.csv` | `ablation.stats.metric_table`      |
| `effects`   | `effects.parquet`, `tables/effects.csv` | `ablation.stats.effect_table`      |
| `contrasts` | `tables/`, .parquet and .csv            | `ablation.contrast.contrast_table` |
| `crystals`  | `tables/`, .parquet and .csv            | `ablation.crystals.crystal_table`  |
| `losses`    | `tables/`, .parquet and .csv            | `ablation.crystals.loss_table`     |

The first two have the column `task` in front. A number that is not defined is null.
"""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv
import pyarrow.parquet as pq

from ablation.catalogue import Catalogue, DatasetPlace, find_dataset
from ablation.contrast import contrast, contrast_table
from ablation.crystals import crystal_table, loss_table
from ablation.grid_folder import FILES, GridFolder, predictions_name, read_grid_folder
from ablation.stats import EFFECT_SCHEMA, METRIC_SCHEMA, Samples, effect_table, metric_table
from ablation.trials import REFERENCE
from cluster.files import replacing, sha256_of

AT_TOP = ("metrics", "effects")
_FORMAT = 1  # of the tables; raised when their making changes
_STAMP = b"made_from"


@dataclass(frozen=True, slots=True)
class Tables:
    """The tables of a grid by name, and the trials that they were made from."""

    grid: GridFolder
    by_name: dict[str, pa.Table]
    place: DatasetPlace


def write_statistics(folder: Path, *, dataset: Path | None = None) -> Tables:
    """Make the tables of what is finished of a grid and write them into its folder.

    Tables that were made from the same files are read, not made again.

    Args:
        folder: of a grid, see `ablation.grid_folder`.
        dataset: where the dataset is now; by default where the grid says. Without it, crystals
            have no formula and no symmetry.

    Raises:
        UserError: as `read_grid_folder`.
    """
    grid = read_grid_folder(folder)
    document = grid.document
    place = find_dataset(folder, document.dataset, document.dataset_summary, dataset)
    stamp = _stamp(folder, grid, place.catalogue)
    known = _known(folder, stamp)
    if known is None:
        known = _made(grid, place.catalogue)
        for name, table in known.items():
            write_table(folder, name, table.replace_schema_metadata({_STAMP: stamp}))
    return Tables(grid, known, place)


def write_table(folder: Path, name: str, table: pa.Table) -> None:
    """One table as Parquet and CSV, where the module says."""
    write_pair(_path(folder, name), folder / "tables" / f"{name}.csv", table)


def write_pair(parquet: Path, csv: Path, table: pa.Table) -> None:
    """One table as Parquet and CSV; a number that is not defined is null."""
    table = _without_nan(table)
    with replacing(parquet) as temporary:
        pq.write_table(table, temporary)
    with replacing(csv) as temporary:
        pyarrow.csv.write_csv(table, temporary)


def _path(folder: Path, name: str) -> Path:
    return (folder if name in AT_TOP else folder / "tables") / f"{name}.parquet"


def _made(grid: GridFolder, catalogue: Catalogue | None) -> dict[str, pa.Table]:
    document = grid.document
    model = document.models[0]
    resamples = int(document.training.get("resamples", 1000))
    metrics, effects, crystals = [], [], []
    contrasts = {}
    for task, trials in grid.trials.items():
        samples = Samples(trials, resamples=resamples)
        metrics.append(_of_task(task, metric_table(samples)))
        if any(condition.arm == REFERENCE for condition in trials.probabilities):
            effects.append(_of_task(task, effect_table(samples)))
        contrasts[task] = contrast(samples, model, document.primary_metric)
        classes = document.tasks[task].classes
        crystals.append(crystal_table(trials, model, task, classes, catalogue))
    tables = {
        "metrics": _joined(metrics, METRIC_SCHEMA),
        "effects": _joined(effects, EFFECT_SCHEMA),
        "contrasts": contrast_table(contrasts),
        "crystals": pa.concat_tables(crystals),
    }
    tables["losses"] = loss_table(tables["crystals"])
    return {name: _without_nan(table) for name, table in tables.items()}


def _of_task(task: str, table: pa.Table) -> pa.Table:
    return table.add_column(0, "task", pa.array([task] * len(table), pa.string()))


def _joined(tables: list[pa.Table], schema: pa.Schema) -> pa.Table:
    whole = schema.insert(0, pa.field("task", pa.string()))
    return pa.concat_tables(tables) if tables else whole.empty_table()


def _without_nan(table: pa.Table) -> pa.Table:
    for index, field in enumerate(table.schema):
        if pa.types.is_floating(field.type):
            column = table.column(index)
            known = pc.if_else(pc.is_nan(column), pa.scalar(None, field.type), column)
            table = table.set_column(index, field, known)
    return table


def _stamp(folder: Path, grid: GridFolder, catalogue: Catalogue | None) -> bytes:
    """What the tables depend on."""
    names = [*FILES, *(predictions_name(task) for task in grid.trials)]
    parts = [_FORMAT, [sha256_of(folder / name) for name in names], catalogue is not None]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest().encode()


def _known(folder: Path, stamp: bytes) -> dict[str, pa.Table] | None:
    """The tables as they are in the folder; None when one is missing or of other trials."""
    found = {}
    for name in ("metrics", "effects", "contrasts", "crystals", "losses"):
        try:
            table = pq.read_table(_path(folder, name))
        except (OSError, pa.ArrowException):
            return None
        if (table.schema.metadata or {}).get(_STAMP) != stamp:
            return None
        if not (folder / "tables" / f"{name}.csv").is_file():
            return None
        found[name] = table
    return found
