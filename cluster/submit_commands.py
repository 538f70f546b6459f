"""`xtal submit`: verbs of the command line as jobs of SLURM."""

import json
import shlex
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer

from cluster.errors import UserError
from cluster.files import write_text
from cluster.slurm import cancel
from cluster.submit import Plan
from cluster.submit_asked import (
    After,
    Asked,
    DryRun,
    Estimate,
    Nodes,
    Probe,
    SiteFile,
    Time,
)
from cluster.submit_verbs import SubmitsChain, SubmitsVerb, check_words, grids, workers
from cluster.terminal import AsJson, OptionsFile, out, show_json

submitting = typer.Typer(
    help="Submit a verb to SLURM. What follows the two arguments goes to the verb as it is.",
    no_args_is_help=True,
)
Source = Annotated[str, typer.Argument(metavar="SOURCE", help="As for xtal featurize.")]
_PASS_ON = {"allow_extra_args": True, "ignore_unknown_options": True}


@submitting.command("featurize", cls=SubmitsVerb, context_settings=_PASS_ON)
def submit_featurize(
    context: typer.Context,
    source: Source,
    dataset: Annotated[Path, typer.Argument(metavar="OUT", help="Folder for the dataset.")],
    site: SiteFile,
    nodes: Nodes = 1,
    time: Time = "60",
    after: After = None,
    dry_run: DryRun = False,
    probe: Probe = False,
    as_json: AsJson = False,
) -> None:
    """Featurize on all cores of the nodes, under srun and MPI."""
    words = [source, str(dataset.absolute()), *context.args]
    _submit(context, "featurize", dataset, words)


@submitting.command("train", cls=SubmitsVerb, context_settings=_PASS_ON)
def submit_train(
    context: typer.Context,
    dataset: Annotated[Path, typer.Argument(metavar="OUT", help="A dataset folder.")],
    run: Annotated[Path, typer.Argument(metavar="RUN", help="Folder for the training run.")],
    site: SiteFile,
    nodes: Nodes = 1,
    time: Time = "60",
    after: After = None,
    dry_run: DryRun = False,
    probe: Probe = False,
    array: Annotated[
        int | None, typer.Option(help="Train this often instead, into RUN/seed-0, -1, …", min=2)
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Train on all GPUs, or all nodes, unless --workers or its configuration say otherwise."""
    words = [str(dataset.absolute()), str(run.absolute()), *context.args]
    _submit(context, "train", run, words)


@submitting.command("ablate", cls=SubmitsVerb, context_settings=_PASS_ON)
def submit_ablate(
    context: typer.Context,
    grid: Annotated[
        Path, typer.Argument(metavar="GRID", help="As for xtal ablate.", autocompletion=grids)
    ],
    folder: Annotated[Path, typer.Argument(metavar="OUT", help="Folder for the results.")],
    site: SiteFile,
    nodes: Nodes = 1,
    time: Time = "60",
    after: After = None,
    dry_run: DryRun = False,
    probe: Probe = False,
    array: Annotated[
        int | None,
        typer.Option(help="Run so many parts of it first, each a job of one node.", min=2),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Run a grid on all cores of the nodes, by Ray.

    With --array its parts are jobs of their own, which start wherever a node is free; the last job
    gathers what they did, does what they did not, and writes the report.
    """
    words = [str(_found(grid)), str(folder.absolute()), *context.args]
    _submit(context, "ablate", folder, words)


@submitting.command("all", cls=SubmitsChain)
def submit_all(
    context: typer.Context,
    source: Source,
    run: Annotated[
        Path, typer.Argument(metavar="RUN", help="Folder for dataset/, train/ and ablation/.")
    ],
    site: SiteFile,
    nodes: Nodes = 1,
    time: Time = "60",
    after: After = None,
    dry_run: DryRun = False,
    probe: Probe = False,
    task: Annotated[str, typer.Option(help="As of xtal train.")] = "bulk_modulus",
    grid: Annotated[
        Path | None,
        typer.Option(help="As for xtal ablate; default: six arms.", autocompletion=grids),
    ] = None,
    features: Annotated[Path | None, typer.Option(help="Configuration of featurize.")] = None,
    training: Annotated[Path | None, typer.Option(help="Configuration of train.")] = None,
    config: OptionsFile = None,
    as_json: AsJson = False,
) -> None:
    """Featurize, then train, then ablate: each starts when the one before has succeeded.

    If one fails, those after it are cancelled; mend the reason and give the same command again.
    """
    asked = Asked.of(context)
    run = run.absolute()
    parts = [run / name for name in ("dataset", "train", "ablation")]
    dataset = str(parts[0])
    plan = run / "grid.toml" if grid is None else _found(grid)
    calls = {
        "featurize": [source, dataset, *_config(features)],
        "train": [dataset, str(parts[1]), "--task", task, *_config(training)],
        "ablate": [str(plan), str(parts[2]), "--dataset", dataset],
    }
    calls["train"] += workers(calls["train"])
    if grid is None and task == "all":
        remedy = "name one of them, or give a --grid with tasks"
        raise UserError("--task all: the default grid asks one question", remedy=remedy)
    text = f'dataset = "dataset"\n\n[training]\ntask = {json.dumps(task)}\n'
    if grid is None and plan.exists() and plan.read_text(encoding="utf-8") != text:
        remedy = f"run it by --grid {shlex.quote(str(plan))}, or remove it"
        raise UserError(f"{plan} is another grid than that of --task {task}", remedy=remedy)
    with _readable(grid, text) as draft:
        for verb, words in calls.items():
            check_words(context, verb, [str(draft), *words[1:]] if verb == "ablate" else words)
    plans = [
        Plan(verb, part, tuple(words), asked.sites[verb], nodes, time)
        for part, (verb, words) in zip(parts, calls.items(), strict=True)
    ]
    if not asked.allows(*plans):
        raise typer.Exit(1)
    if dry_run:
        with _readable(grid, text) as draft:
            _show_chain(asked, plans, draft)
        return
    expected = {} if after else Estimate.told(plans[0], silent=as_json)
    if grid is None:
        write_text(plan, text)
    told: list[dict[str, Any]] = []
    for each in plans:
        each = replace(each, after=told[-1]["job"] if told else after)
        try:
            job = each.submit()
        except Exception:
            cancel([row["job"] for row in told])  # a chain is whole or is not there
            raise
        told.append(_as_dict(each, job) | ({} if told else expected))
        if not as_json:
            out.print(f"{each.shown()}\n{each.verb}: job {job}", soft_wrap=True, highlight=False)
    if as_json:
        show_json(told)
        return
    out.print(f"xtal jobs {shlex.quote(str(run))} shows them", soft_wrap=True, highlight=False)


def _found(grid: Path) -> Path:
    """Where a grid is, from anywhere; one that is built in has a name alone."""
    return grid.absolute() if grid.exists() else grid


@contextmanager
def _readable(grid: Path | None, text: str) -> Iterator[Path]:
    """The grid, or a file of this text, which is gone afterwards: a look writes nothing."""
    if grid is not None:
        yield _found(grid)
        return
    with tempfile.TemporaryDirectory() as folder:
        write_text(draft := Path(folder) / "grid.toml", text)
        yield draft


def _show_chain(asked: Asked, plans: Sequence[Plan], grid: Path) -> None:
    """What would be submitted, and what each part takes as far as it can be known.

    Args:
        grid: where it can be read now.
    """
    told, after = [], asked.after
    for plan in plans:
        planned = replace(plan, after=after)
        after = f"JOB-OF-{plan.verb}"
        # The others need the dataset.
        first = plan.verb == "featurize" and asked.after is None
        ready = first or (plans[0].result / "manifest.json").exists()
        if plan.verb == "ablate":
            plan = replace(plan, words=(str(grid), *plan.words[1:]))
        if not asked.as_json:
            out.print(planned.shown(), soft_wrap=True, highlight=False)
            if not ready:
                out.print("what it takes is known once there is data")
        expected = Estimate.told(plan, silent=asked.as_json) if ready else {}
        told.append(_as_dict(planned, None) | expected)
    if asked.as_json:
        show_json(told)
    else:
        out.print("nothing was submitted")


def _submit(context: typer.Context, verb: str, result: Path, words: Sequence[str]) -> None:
    asked = Asked.of(context)
    array, as_json = asked.array, asked.as_json
    given = {word.partition("=")[0] for word in words}
    for option, has in (("--part", "all parts"), ("--seed", "the seeds 0 to N − 1")):
        if array is not None and option in given:
            problem = f"--array N with {option}: an array of N has {has}"
            raise UserError(problem, remedy="leave out one of the two")
    if verb == "train" and array is not None and asked.nodes > 1:
        raise UserError(
            f"--array with --nodes {asked.nodes}: an element has one node",
            remedy="leave out one of the two",
        )
    site, result, words = asked.sites[verb], result.absolute(), list(words)
    if verb == "train":
        words += workers(words)
    check_words(context, verb, words)
    if verb == "train" and asked.after is None and not (Path(words[0]) / "manifest.json").exists():
        raise UserError(
            f"{words[0]} is no finished dataset: it has no manifest.json",
            remedy="give --after and the job that makes it, or the OUT of xtal featurize",
        )
    plan = Plan(verb, result, tuple(words), site, asked.nodes, asked.time, asked.after)
    if not asked.allows(plan):
        raise typer.Exit(1)
    shown = []
    if array is not None:
        shown += [plan.shown(array)]
    if array is None or verb == "ablate":
        shown += ["then:"] if shown else []
        shown += [plan.shown()]
    if not as_json:
        out.print("\n".join(shown), soft_wrap=True, highlight=False)
    # What comes --after another job may need what that one makes.
    told = Estimate.told(plan, array, silent=as_json) if asked.after is None else {}
    if asked.dry_run:
        if as_json:
            show_json(_as_dict(plan, None) | told)
        else:
            out.print("nothing was submitted")
        return
    if array is None:
        job = plan.submit()
    else:
        job = told["array"] = plan.submit_array(array)
        if verb == "ablate":
            job = _submit_gathering(plan, job)
            if not as_json:
                out.print(f"parts: job {told['array']}", highlight=False)
    if as_json:
        show_json(_as_dict(plan, job) | told)
        return
    out.print(f"{verb}: job {job}; xtal jobs {shlex.quote(str(result))} shows it", soft_wrap=True)


def _submit_gathering(plan: Plan, array: str) -> str:
    """The job that follows the parts of a grid; its number. Without it, there are no parts."""
    try:
        return replace(plan, gathers=array).submit()
    except Exception:
        cancel([array])
        raise


def _as_dict(plan: Plan, job: str | None) -> dict[str, Any]:
    """What was submitted; `job` is None if it was not."""
    return {"verb": plan.verb, "result": plan.result, "job": job, "words": plan.words}


def _config(path: Path | None) -> list[str]:
    return [] if path is None else ["--config", str(path.absolute())]
