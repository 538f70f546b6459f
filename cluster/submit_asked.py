"""What the parts of `xtal submit` are asked, and what is looked at before anything is submitted."""

import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, Any

import typer

from cluster.errors import RunFailed, UserError
from cluster.preflight import preflight, probe_node
from cluster.site import Site, check_time, read_site, write_setup
from cluster.submit import Plan
from cluster.terminal import complain, err

_UsageError: Any = typer.BadParameter.__base__  # typer does not name it

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


@dataclass(frozen=True, slots=True)
class Asked:
    """Options that all parts of `xtal submit` have."""

    sites: dict[str, Site]
    nodes: int
    time: str
    after: str | None
    dry_run: bool
    probe: bool
    array: int | None
    as_json: bool

    @classmethod
    def of(cls, context: typer.Context) -> "Asked":
        """The options of a call.

        Raises:
            UserError: a wrong site file, time or job.
        """
        given: dict[str, Any] = {f.name: context.params.get(f.name) for f in fields(cls)}
        given["sites"] = read_site(context.params["site"])
        asked = cls(**given)
        check_time(asked.time)
        if asked.after is not None and not asked.after.replace("_", "").isdigit():
            raise UserError(f"--after {asked.after}", remedy="give the number of a job")
        return asked

    def allows(self, plan: Plan, *, again: bool = False) -> bool:
        """Print what the preflight finds; False if the job would fail.

        Args:
            again: the same nodes have been asked already.
        """
        found = list(preflight(plan.site, plan.verb, plan.jobs, plan.nodes, plan.time))
        if self.probe and not again and not any(each.fatal for each in found):
            found.append(probe_node(plan.site, plan.jobs, write_setup(plan.site, plan.jobs)))
        for each in found:
            if each.remedy:
                complain("error" if each.fatal else "warning", f"{each.what}: {each.said}")
                err.print(f"  remedy: {each.remedy}", soft_wrap=True)
        return not any(each.fatal for each in found)


def workers(words: Sequence[str]) -> list[str]:
    """Words that make a training use the whole job, unless `words` say how many workers it has."""
    said = any(word.partition("=")[0] == "--workers" for word in words)
    return [] if said else ["--workers", "0"]


def check_words(context: typer.Context, verb: str, words: Sequence[str]) -> None:
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


def estimate(plan: Plan, as_json: bool) -> str:
    """What the verb itself says that it expects, on one core."""
    command = [sys.executable, "-m", "xtal", plan.verb, *plan.words, "--dry-run"]
    command += ["--json"] if as_json else []
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RunFailed(
            f"xtal {plan.verb} --dry-run: {done.stderr.strip()}", remedy="mend this first"
        )
    return done.stdout
