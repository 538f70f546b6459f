"""`xtal fetch`: crystals from databases, with a record of what they are and where from."""

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from cluster.errors import UserError
from cluster.terminal import AsJson, OptionsFile, bar, completed, err, out, show_json, summary
from featurization.addresses import checked_url
from featurization.published import JARVIS, MATBENCH, Archive

fetching = typer.Typer(
    help="Get crystals from a database, as a file for xtal featurize and a record beside it "
    "(FILE.snapshot.json: source, date, database version, query, counts, SHA-256, licence). "
    "Whatever ends the command, the same command goes on. A login node is enough.",
    no_args_is_help=True,
)

File = Annotated[
    Path, typer.Argument(metavar="FILE", help="To write: .jsonl.gz, .jsonl.zst or .jsonl.")
]
Folder = Annotated[Path, typer.Argument(metavar="FOLDER", help="Where to put the file.")]
ByHand = Annotated[
    list[Path] | None,
    typer.Option(
        "--from", metavar="FILE", help="Downloaded by hand; several are one after another."
    ),
]
OneByHand = Annotated[
    Path | None,
    typer.Option("--from", metavar="FILE", help="The archive, downloaded by hand; it is checked."),
]
Mirror = Annotated[
    str | None,
    typer.Option(metavar="URL", help="Another address of the archive; its checksum decides."),
]
Restart = Annotated[
    bool, typer.Option("--restart", help="Give up what an unfinished command has fetched.")
]


@fetching.command("mp")
def fetch_mp(
    file: File,
    elastic: Annotated[
        bool, typer.Option("--elastic", help="Only materials with elastic moduli.")
    ] = False,
    chemsys: Annotated[
        str | None, typer.Option(help="Only this chemical system: Li-Fe-O, or Si-* with a star.")
    ] = None,
    by_hand: ByHand = None,
    restart: Restart = False,
    config: OptionsFile = None,
    as_json: AsJson = False,
) -> None:
    """The Materials Project, by its API: needs mp-api and your key in MP_API_KEY.

    Of each material that is neither deprecated nor of GNoME: structure, symmetry, band gap, energy
    above the hull, bulk and shear modulus. --from takes files of summary documents instead, lines
    or lists of them or answers of the API, and leaves out the same.
    """
    from featurization import by_hand as files
    from featurization import materials_project as source

    if by_hand:
        if elastic or chemsys:
            raise UserError("--from takes all of a file", remedy="leave --elastic, --chemsys out")
        left_out = Counter[str]()
        record = files.convert(
            by_hand,
            file,
            source.ABOUT | {"left_out": left_out},
            lambda each: source.kept(files.summaries(each), left_out),
            restart=restart,
            say=_say,
        )
    else:
        with bar("materials", None, shown=not as_json) as update:
            record = source.fetch(
                file,
                elastic=elastic,
                chemsys=chemsys,
                restart=restart,
                say=_say,
                progress=_progress(update),
            )
    _show(file, record, as_json)


@fetching.command("optimade")
def fetch_optimade(
    url: Annotated[
        str,
        typer.Argument(
            metavar="URL",
            help="Base address of a database, such as https://optimade.materialsproject.org.",
        ),
    ],
    filter: Annotated[
        str,
        typer.Argument(
            metavar="FILTER",
            help="""Which structures: 'elements HAS ALL "Si","O" AND nelements=2'; '' for all.""",
        ),
    ],
    file: File,
    by_hand: ByHand = None,
    restart: Restart = False,
    config: OptionsFile = None,
    as_json: AsJson = False,
) -> None:
    """Any database that speaks OPTIMADE; the list of them is at optimade.org.

    Labels are taken where the database has them: OQMD, Alexandria, GNoME, JARVIS, hulls of the
    Materials Project. --from takes answers of a server or OPTIMADE JSON Lines instead; URL and
    FILTER are then noted only.
    """
    from featurization import by_hand as files
    from featurization import optimade as source
    from featurization.optimade_structures import document_of

    if by_hand:
        record = files.convert(
            by_hand,
            file,
            {"source": "OPTIMADE", "url": checked_url(url), "filter": filter}
            | {"licence": "ask the provider"},
            lambda each: map(document_of, files.structures(each)),
            restart=restart,
            say=_say,
        )
    else:
        with bar("structures", None, shown=not as_json) as update:
            record = source.fetch(
                url, filter, file, restart=restart, say=_say, progress=_progress(update)
            )
    _show(file, record, as_json)


@fetching.command("matbench")
def fetch_matbench(
    task: Annotated[
        str,
        typer.Argument(
            metavar="TASK",
            help=f"One of {', '.join(MATBENCH)}.",
            autocompletion=completed(MATBENCH),
        ),
    ],
    folder: Folder = Path("."),
    by_hand: OneByHand = None,
    url: Mirror = None,
    restart: Restart = False,
    config: OptionsFile = None,
    as_json: AsJson = False,
) -> None:
    """A task of Matbench v0.1 as published, FOLDER/matbench_TASK.json.gz, checked by SHA-256."""
    _archive(
        "task of Matbench",
        MATBENCH,
        task.removeprefix("matbench_"),
        folder,
        by_hand,
        url,
        restart,
        as_json,
    )


@fetching.command("jarvis")
def fetch_jarvis(
    dataset: Annotated[
        str,
        typer.Argument(
            metavar="DATASET", help=f"One of {', '.join(JARVIS)}.", autocompletion=completed(JARVIS)
        ),
    ] = "dft_3d",
    folder: Folder = Path("."),
    by_hand: OneByHand = None,
    url: Mirror = None,
    restart: Restart = False,
    config: OptionsFile = None,
    as_json: AsJson = False,
) -> None:
    """JARVIS-DFT as published, FOLDER/jdft_3d-12-12-2022.json.zip, checked by SHA-256."""
    _archive("dataset of JARVIS", JARVIS, dataset, folder, by_hand, url, restart, as_json)


def _archive(
    what: str,
    known: dict[str, Archive],
    name: str,
    folder: Path,
    by_hand: Path | None,
    url: str | None,
    restart: bool,
    as_json: bool,
) -> None:
    from featurization.download import fetch

    if name not in known:
        raise UserError(
            f"{name!r} is no {what} that has structures", remedy=f"give one of {', '.join(known)}"
        )
    with bar(known[name].file, None, shown=not as_json) as update:
        path, record = fetch(
            known[name],
            folder,
            url=url,
            by_hand=by_hand,
            restart=restart,
            say=_say,
            progress=_progress(update),
        )
    _show(path, record, as_json)


def _say(text: str) -> None:
    err.print(text, soft_wrap=True, highlight=False)


def _progress(update: Callable[..., None]) -> Callable[[int, int], None]:
    return lambda done, total: update(done, total=total or None)


def _show(path: Path, record: dict[str, Any], as_json: bool) -> None:
    if as_json:
        show_json(record)
        return
    names = ("source", "provider", "database_version", "documents", "structures", "bytes")
    rows = {name.replace("_", " "): record[name] for name in names if name in record}
    rows |= {f"with {name}": count for name, count in record.get("labels", {}).items()}
    rows |= {f"left out, {why}": count for why, count in record.get("left_out", {}).items()}
    summary(str(path), rows | {"licence": record["licence"]})
    out.print(f"SHA-256: {record['sha256']}", soft_wrap=True, highlight=False)
    if "cite" in record:
        out.print(f"cite: {record['cite']}", soft_wrap=True, highlight=False)
    out.print(f"next: xtal featurize {path} DATASET", soft_wrap=True, highlight=False)
