"""Verbs of `xtal` that make datasets and look into them: featurize, inspect, verify."""

import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

from cluster.config import names
from cluster.errors import RunFailed, UserError
from cluster.mpi import agree
from cluster.mpi import ranks as mpi_ranks
from cluster.submit_verbs import SETTINGS
from cluster.terminal import (
    AsJson,
    ConfigFile,
    OptionsFile,
    complain,
    completed,
    configured,
    out,
    show_json,
    summary,
    throughput,
)
from featurization.config import CellName, FeaturizationConfig, RadiationName

_DEFAULTS = FeaturizationConfig()
# Flags that are not named as what they set.
_SPELLED = {"id_prop_label": "--label", "also_radiation": "--radiation"}


def featurize(
    source: Annotated[
        str,
        typer.Argument(
            metavar="SOURCE",
            help="A .jsonl[.gz|.zst] of Materials Project documents, a folder of CIF/POSCAR files "
            "with id_prop.csv, a .csv with a cif column, a Matbench or JARVIS .json[.gz|.zip], a "
            "CIF or POSCAR file, or prototypes[:COUNT[:SEED]].",
        ),
    ],
    dataset: Annotated[Path, typer.Argument(metavar="OUT", help="Folder for the dataset.")],
    config: ConfigFile = None,
    radiation: Annotated[
        str | None,
        typer.Option(
            help=f"{', '.join(names(RadiationName))}; several with commas, such as "
            f"xray,neutron, give one intensity column each. Default: {_DEFAULTS.radiation}.",
            autocompletion=completed(names(RadiationName)),
        ),
    ] = None,
    cell: Annotated[
        str | None,
        typer.Option(
            help=f"{', '.join(names(CellName))}; default: {_DEFAULTS.cell}.",
            autocompletion=completed(names(CellName)),
        ),
    ] = None,
    selection: Annotated[
        str | None,
        typer.Option(
            help="miller:3 (|h|,|k|,|l| ≤ 3) or sphere:1.2 (|q| ≤ 1.2 1/Å); "
            f"default: {_DEFAULTS.selection}."
        ),
    ] = None,
    symprec: Annotated[
        float | None,
        typer.Option(help=f"Symmetry tolerance in Å; default: {_DEFAULTS.symprec}."),
    ] = None,
    b_iso: Annotated[
        float | None, typer.Option(help=f"Debye–Waller B in Å²; default: {_DEFAULTS.b_iso:g}.")
    ] = None,
    occupancy: Annotated[
        str | None,
        typer.Option(
            help=f"Partly occupied sites: average or reject; default: {_DEFAULTS.occupancy}."
        ),
    ] = None,
    label: Annotated[
        str | None,
        typer.Option(
            help="Name of the values in an id_prop.csv without header row; default: "
            f"{_DEFAULTS.id_prop_label}."
        ),
    ] = None,
    append: Annotated[
        bool, typer.Option("--append", help="Add the new ids of SOURCE to the dataset in OUT.")
    ] = False,
    dry_run: Annotated[
        bool,
        typer.Option(
            "--dry-run", help="Say what is to do in OUT and what it takes; write nothing."
        ),
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Turn crystals into diffraction clouds: OUT/shards, manifest.json, rejects.csv, dataset.h5.

    Runs on one core as it is, on many under `mpiexec -n 8` or srun.
    After any interruption the same command goes on, with any number of ranks.
    """
    from featurization.featurize import featurize as run
    from featurization.forecast import forecast

    ranks = mpi_ranks()
    with _fatal_for_all(ranks):
        given = {
            "config": config,
            "radiation": radiation,
            "cell": cell,
            "selection": selection,
            "symprec": symprec,
            "b_iso": b_iso,
            "occupancy": occupancy,
            "label": label,
        }
        settings = agree(ranks, lambda: _settings(given))
        if dry_run:
            expected = agree(
                ranks, lambda: forecast(source, dataset, settings, ranks, append=append)
            )
            if ranks.rank == 0 and as_json:
                named = {"out" if k == str(dataset) else k: v for k, v in expected.rows.items()}
                needs = {
                    "seconds": {"alone": expected.alone, "shared": expected.shared},
                    "memory": expected.memory,
                }
                show_json({"expected": named, "warnings": expected.warnings} | needs)
            elif ranks.rank == 0:
                summary(f"{source}: what to expect; nothing was written", expected.rows)
            for warning in expected.warnings:
                complain("warning", warning)
            return
        with throughput(ranks.rank == 0, ranks.size) as update:
            manifest = run(source, dataset, settings, ranks, progress=update, append=append)
    if ranks.rank == 0:
        counts = {
            "structures": manifest["structures"],
            "rejected": manifest["rejected"],
            "points stored": manifest["points"],
            "shards": len(manifest["shards"]),
            "content hash": manifest["content_hash"],
        }
        if as_json:
            show_json({"dataset": dataset} | {k.replace(" ", "_"): v for k, v in counts.items()})
        else:
            summary(
                f"dataset {dataset}",
                counts
                | {
                    "rejected": f"{manifest['rejected']} (see rejects.csv)",
                    "content hash": manifest["content_hash"][:16],
                },
            )
        for each in manifest["sources"]:
            if each["damage"]:
                complain("warning", f"{each['spec']} ends early: {each['damage']}")


def _settings(given: Mapping[str, Any]) -> FeaturizationConfig:
    """The configuration that options give."""
    several = given["radiation"]
    radiation = [None] if several is None else [each.strip() for each in several.split(",")]
    flags = {name: given[name] for name in ("cell", "selection", "symprec", "b_iso", "occupancy")}
    flags |= {"radiation": radiation[0], "also_radiation": radiation[1:] or None}
    return configured(
        FeaturizationConfig, given["config"], flags | {"id_prop_label": given["label"]}, _SPELLED
    )


def inspect(
    dataset: Annotated[Path, typer.Argument(metavar="OUT", help="A dataset folder.")],
    id: Annotated[
        str | None, typer.Argument(metavar="ID", help="A crystal: its reflections.")
    ] = None,
    top: Annotated[int, typer.Option(help="Reflections to list; --json has all.", min=1)] = 20,
    picture: Annotated[
        Path | None,
        typer.Option(help="Draw cloud and powder pattern into this .png, .svg or .pdf."),
    ] = None,
    config: OptionsFile = None,
    as_json: AsJson = False,
) -> None:
    """Show what is inside a dataset, or one crystal's reflections and powder pattern."""
    from featurization.inspection import inspect_crystal, inspect_dataset, read_diffraction
    from featurization.inspection_tables import show_crystal, show_dataset

    if id is None:
        if picture is not None:
            raise UserError("--picture needs a crystal", remedy=f"xtal inspect {dataset} ID")
        answer = inspect_dataset(dataset)
    else:
        one = read_diffraction(dataset, id)
        if picture is not None:
            from featurization.inspection_figure import write_picture

            write_picture(one, picture)
        answer = inspect_crystal(one)
    if as_json:
        show_json(answer)
    elif id is None:
        show_dataset(answer)
    else:
        show_crystal(answer, top)
        if picture is not None:
            out.print(f"picture: {picture}", soft_wrap=True)


def verify(
    dataset: Annotated[Path, typer.Argument(metavar="OUT", help="A dataset folder.")],
    source: Annotated[
        list[str] | None,
        typer.Option(
            help="Where the crystals are now, to recompute a sample; one for each source, in order."
        ),
    ] = None,
    repair: Annotated[
        bool, typer.Option("--repair", help="Set what is damaged aside and do its crystals again.")
    ] = False,
    retry: Annotated[
        bool,
        typer.Option(
            "--retry", help="Do again what was rejected for its time or its process's death."
        ),
    ] = False,
    sample: Annotated[int, typer.Option(help="Crystals to compute again.", min=0)] = 16,
    config: OptionsFile = None,
    as_json: AsJson = False,
) -> None:
    """Check a dataset: checksums, an account of every record, and a recomputed random sample.

    Runs under mpiexec and srun as featurize does.
    """
    from featurization.repair import repair as mend
    from featurization.restore import restore
    from featurization.verify import check_specs
    from featurization.verify import verify as run

    ranks = mpi_ranks()
    with _fatal_for_all(ranks):
        repaired: list[str] = []
        if repair:
            with throughput(ranks.rank == 0, ranks.size) as update:
                repaired += ["manifest.json"] * restore(dataset, source or [], ranks, update)
        specs = agree(ranks, lambda: check_specs(dataset, source or []))
        answer = run(dataset, specs, sample, ranks)
        if retry or (repair and not answer["ok"]):
            repaired += answer["damaged"]
            with throughput(ranks.rank == 0, ranks.size) as update:
                mend(dataset, answer["damaged"], specs, ranks, update, retry=retry)
            specs = agree(ranks, lambda: check_specs(dataset, source or []))
            answer = run(dataset, specs, sample, ranks)
        answer |= {"repaired": repaired} if repair or retry else {}
    if ranks.rank != 0:
        raise typer.Exit(0 if answer["ok"] else 1)
    if as_json:
        show_json(answer)
    else:
        listed = ("sources", "problems")
        shown = {k.replace("_", " "): v for k, v in answer.items() if v not in ("", [])}
        summary(f"dataset {dataset}", {k: shown[k] for k in shown if k not in listed})
        for each in answer["sources"]:
            out.print(f"source {each['spec']}: {each['state']}", soft_wrap=True)
        for problem in answer["problems"]:
            complain("problem", problem)
    if not answer["ok"]:
        raise typer.Exit(1)


def register(app: typer.Typer) -> None:
    """Add these verbs to the command line."""
    app.command(context_settings={"obj": {SETTINGS: _settings}})(featurize)
    app.command()(inspect)
    app.command()(verify)


@contextmanager
def _fatal_for_all(ranks: Any) -> Iterator[None]:
    """End all ranks when one fails; what is the same on all of them only rank 0 prints."""
    try:
        yield
    except (UserError, RunFailed) as error:
        if ranks.rank != 0:
            sys.exit(error.exit_code)
        raise
    except BaseException:  # a Rust panic is no Exception
        ranks.abort()
        raise
