"""`xtal submit`: verbs of the command line as jobs of SLURM."""

import json
import shlex
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer

from cluster.attempt import jobs_folder
from cluster.errors import RunFailed, UserError
from cluster.files import write_text
from cluster.preflight import preflight, probe_node
from cluster.site import Site, check_time, read_site, write_setup
from cluster.slurm import cancel
from cluster.submit import Plan, resolved
from cluster.terminal import AsJson, OptionsFile, complain, err, out, show_json

submitting = typer.Typer(
    help="Submit a verb to SLURM. What follows the two arguments goes to the verb as it is.",
    no_args_is_help=True,
)
_UsageError: Any = typer.BadParameter.__base__  # typer does not name it
_PASS_ON = {"allow_extra_args": True, "ignore_unknown_options": True}

SiteFile = Annotated[Path, typer.Option("--site", help="Site file; see slurm/site.toml.example.")]
Nodes = Annotated[int, typer.Option(help="Nodes.", min=1)]
Time = Annotated[str, typer.Option(help="Time limit: minutes, HH:MM:SS or D-HH:MM:SS.")]
After = Annotated[str | None, typer.Option(help="Start after this job, if it succeeds.")]
DryRun = Annotated[
    bool, typer.Option("--dry-run", help="Check, print what would be submitted, and stop.")
]
Probe = Annotated[
    bool, typer.Option("--probe", help="Try the site's Python and MPI on a compute node first.")
]


@submitting.command("featurize", context_settings=_PASS_ON)
def submit_featurize(
    context: typer.Context,
    source: Annotated[str, typer.Argument(help="As for xtal featurize.")],
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
    words = [resolved(source), str(dataset.absolute()), *context.args]
    _submit(context, "featurize", dataset, words, site, nodes, time, after, dry_run, probe, as_json)


@submitting.command("train", context_settings=_PASS_ON)
def submit_train(
    context: typer.Context,
    dataset: Annotated[Path, typer.Argument(metavar="OUT", help="A dataset folder.")],
    run: Annotated[Path, typer.Argument(help="Folder for the training run.")],
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
    """Train on the nodes; on several, --workers of the training are spread over them."""
    words = [str(dataset.absolute()), str(run.absolute()), *context.args]
    _submit(context, "train", run, words, site, nodes, time, after, dry_run, probe, as_json, array)


@submitting.command("ablate", context_settings=_PASS_ON)
def submit_ablate(
    context: typer.Context,
    grid: Annotated[Path, typer.Argument(metavar="GRID.toml", help="Which arms and seeds.")],
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
    if not grid.is_file():
        raise UserError(f"{grid}: no such file", remedy="give the path of a grid file")
    words = [str(grid.absolute()), str(folder.absolute()), *context.args]
    _submit(
        context, "ablate", folder, words, site, nodes, time, after, dry_run, probe, as_json, array
    )


@submitting.command("all")
def submit_all(
    source: Annotated[str, typer.Argument(help="As for xtal featurize.")],
    run: Annotated[Path, typer.Argument(help="Folder for dataset/, train/ and ablation/.")],
    site: SiteFile,
    nodes: Nodes = 1,
    time: Time = "60",
    after: After = None,
    dry_run: DryRun = False,
    task: Annotated[str, typer.Option(help="The question.")] = "bulk_modulus",
    grid: Annotated[Path | None, typer.Option(help="Grid file; default: all arms.")] = None,
    features: Annotated[Path | None, typer.Option(help="Configuration of featurize.")] = None,
    training: Annotated[Path | None, typer.Option(help="Configuration of train.")] = None,
    config: OptionsFile = None,
    as_json: AsJson = False,
) -> None:
    """Featurize, then train, then ablate: each starts when the one before has succeeded.

    If one fails, those after it are cancelled; mend the reason and give the same command again.
    """
    sites = read_site(site)
    _check_call(time, after)
    run = run.absolute()
    parts = [run / name for name in ("dataset", "train", "ablation")]
    dataset = str(parts[0])
    plan = run / "grid.toml" if grid is None else grid.absolute()
    calls = {
        "featurize": [resolved(source), dataset, *_config(features)],
        "train": [dataset, str(parts[1]), "--task", task, *_config(training)],
        "ablate": [str(plan), str(parts[2]), "--dataset", dataset],
    }
    calls["train"] += _workers(sites["train"], nodes, calls["train"])
    # Not only the first: a chain must not end where nobody looks.
    checks = [
        _check(sites[verb], part, nodes, time) for verb, part in zip(calls, parts, strict=True)
    ]
    if not all(checks):
        raise typer.Exit(1)
    if grid is None and not dry_run:
        write_text(plan, f'dataset = "dataset"\n\n[training]\ntask = {json.dumps(task)}\n')
    told = []
    for result, (verb, words) in zip(parts, calls.items(), strict=True):
        found = Plan(verb, result, tuple(words), sites[verb], nodes, time, after)
        if not as_json:
            out.print(found.shown(), soft_wrap=True, highlight=False)
        after = f"JOB-OF-{verb}" if dry_run else found.submit()
        told.append(_as_dict(found, None if dry_run else after))
        if not as_json and not dry_run:
            out.print(f"{verb}: job {after}", highlight=False)
    if as_json:
        show_json(told)
        return
    out.print(f"xtal jobs {shlex.quote(str(run))} shows them", soft_wrap=True, highlight=False)


def _submit(
    context: typer.Context,
    verb: str,
    result: Path,
    words: Sequence[str],
    site_file: Path,
    nodes: int,
    time: str,
    after: str | None,
    dry_run: bool,
    probe: bool,
    as_json: bool,
    array: int | None = None,
) -> None:
    own = read_site(site_file)[verb]
    _check_call(time, after)
    result = result.absolute()
    if array is not None and any(word.partition("=")[0] == "--part" for word in words):
        raise UserError(
            "--array with --part: an array has all parts", remedy="leave out one of them"
        )
    if verb == "train" and array is not None and nodes > 1:
        raise UserError(
            f"--array with --nodes {nodes}: an element has one node",
            remedy="leave out one of the two",
        )
    words = list(words)
    if verb == "train":
        words += _workers(own, nodes, words)
    _check_words(context, verb, words)
    plan = Plan(verb, result, tuple(words), own, nodes, time, after)
    if not _check(own, result, nodes, time, probe):
        raise typer.Exit(1)
    shown = []
    if array is not None:
        first = shlex.join([verb, *plan.elements(array)[0]])
        shown = [f"{array} elements by submitit, the first: xtal {first}"]
    if array is None or verb == "ablate":
        shown += ["then:"] if shown else []
        shown += [plan.shown()]
    if not as_json:
        out.print("\n".join(shown), soft_wrap=True, highlight=False)
    if dry_run:
        expected = _estimate(verb, words, as_json) if after is None else ""
        if as_json:
            more = {"expected": json.loads(expected)} if expected else {}
            show_json(_as_dict(plan, None) | more)
        elif expected:
            out.print(expected, soft_wrap=True, highlight=False)
        return
    told = {}
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


def _check_call(time: str, after: str | None) -> None:
    check_time(time)
    if after is not None and not after.replace("_", "").isdigit():
        raise UserError(f"--after {after}", remedy="give the number of a job")


def _workers(site: Site, nodes: int, words: Sequence[str]) -> list[str]:
    """Words that make a training use all nodes, unless `words` say how many workers it has."""
    if nodes == 1 or any(word.partition("=")[0] == "--workers" for word in words):
        return []
    return ["--workers", str(nodes * max(1, site.gpus))]


def _submit_gathering(plan: Plan, array: str) -> str:
    """The job that follows the parts of a grid; its number. Without it, there are no parts."""
    try:
        return replace(plan, gathers=array).submit()
    except UserError:
        cancel([array])
        raise


def _check(site: Site, result: Path, nodes: int, time: str, probe: bool = False) -> bool:
    """Print what the preflight finds; False if the job would fail."""
    folder = jobs_folder(result)
    found = list(preflight(site, folder, nodes, time))
    if probe and not any(each.fatal for each in found):
        found.append(probe_node(site, folder, write_setup(site, folder)))
    for each in found:
        if each.remedy:
            complain("error" if each.fatal else "warning", f"{each.what}: {each.said}")
            err.print(f"  remedy: {each.remedy}", soft_wrap=True)
    return not any(each.fatal for each in found)


def _check_words(context: typer.Context, verb: str, words: Sequence[str]) -> None:
    """Let the verb itself look at its words: a wrong one is found now, not in the queue.

    Raises:
        UserError: it would refuse them.
    """
    root: Any = context.find_root().command
    command: Any = root.get_command(context, verb)
    command = getattr(command, "commands", {}).get("run", command)  # of ablate
    try:
        command.make_context(verb, list(words))
    except _UsageError as error:
        remedy = f"see xtal {verb} --help; paths go first"
        raise UserError(f"xtal {verb}: {error}", remedy=remedy) from None


def _estimate(verb: str, words: Sequence[str], as_json: bool) -> str:
    """What the verb itself says that it expects, on one core."""
    command = [sys.executable, "-m", "xtal", verb, *words, "--dry-run"]
    command += ["--json"] if as_json else []
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RunFailed(f"xtal {verb} --dry-run: {done.stderr.strip()}", remedy="mend this first")
    return done.stdout


def _as_dict(plan: Plan, job: str | None) -> dict[str, Any]:
    """What was submitted; `job` is None if it was not."""
    return {"verb": plan.verb, "result": plan.result, "job": job, "words": plan.words}


def _config(path: Path | None) -> list[str]:
    return [] if path is None else ["--config", str(path.absolute())]
