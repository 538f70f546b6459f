"""What the parts of `xtal submit` are asked, and what is looked at before anything is submitted."""

import json
import subprocess
import sys
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, Any

import typer

from cluster.errors import RunFailed, UserError
from cluster.preflight import Finding, living_job, preflight, probe_node
from cluster.site import Site, check_time, read_site, write_setup
from cluster.slurm import Job, ask, look, seconds_of
from cluster.submit import Plan, clean_environment
from cluster.terminal import complain, duration, err, out, summary

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
_UNAVAILABLE = "Requested node configuration is not available"


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
            UserError: a wrong site file or time, or a job that cannot succeed any more.
        """
        given: dict[str, Any] = {f.name: context.params.get(f.name) for f in fields(cls)}
        given["sites"] = read_site(context.params["site"])
        asked = cls(**given)
        check_time(asked.time)
        if asked.after is not None:
            _check_after(asked.after)
        return asked

    def allows(self, *plans: Plan) -> bool:
        """Print what the preflight of these jobs finds; False if one would fail."""
        # Not only the first: a chain must not end where nobody looks.
        sites = [plan.site for plan in plans]
        said = [self._allows(plan, plan.site in sites[:at]) for at, plan in enumerate(plans)]
        if all(said) and (held := living_job([plan.jobs for plan in plans], self.after)):
            _show([held])
            return False
        return all(said)

    def _allows(self, plan: Plan, again: bool) -> bool:
        """As `allows`, of one; `again`: the same nodes have been asked already."""
        found = list(preflight(plan.site, plan.verb, plan.jobs, plan.nodes, plan.time))
        if self.probe and not again and not any(each.fatal for each in found):
            found.append(probe_node(plan.site, plan.jobs, write_setup(plan.site, plan.jobs)))
        if not any(each.fatal for each in found):
            found.append(_asked_slurm(plan, self.array, any(each.lack for each in found)))
            if self.dry_run and not self.as_json and not found[-1].remedy:
                out.print(found[-1].said, soft_wrap=True, highlight=False)
        _show(found)
        with suppress(OSError):  # it has been there, with something in it
            plan.jobs.rmdir()  # which was made to try it
        return not any(each.fatal for each in found)


def _show(found: Sequence[Finding]) -> None:
    for each in found:
        if each.remedy:
            complain("error" if each.fatal else "warning", f"{each.what}: {each.said}")
            err.print(f"  remedy: {each.remedy}", soft_wrap=True)


def _check_after(job: str) -> None:
    """
    Raises:
        UserError: it is no job, or has not succeeded and never will.
    """
    if not job.replace("_", "").isdigit():
        raise UserError(f"--after {job}", remedy="give the number of a job")
    state = look(job).state
    if state == "UNKNOWN":
        said = f"--after {job}: SLURM does not know job {job}, or has forgotten how it ended"
        remedy = "if its work is done, as xtal jobs RUN and its log say, leave out --after"
        raise UserError(said, remedy=remedy)
    if Job(job, state).over and state != "COMPLETED":
        said = f"--after {job}: job {job} has ended as {state}, and what waits for it never starts"
        raise UserError(said, remedy="submit its work again, and give the number of that job")


def _asked_slurm(plan: Plan, array: int | None, lacking: bool) -> Finding:
    """
    Args:
        lacking: too few nodes are as the site file says, in whatever state.
    """
    try:
        start = plan.start(array)
    except UserError as error:
        # SLURM says so of nodes that are out, too, for which it lets a real submission wait.
        if lacking or _UNAVAILABLE not in error.problem or not (out_now := _nodes_out(plan.site)):
            return Finding("sbatch", error.problem, error.remedy, True)
        said = f"{plan.verb}: it pends until a node is back; down or drained: {out_now}"
        return Finding("sbatch", said, "see sinfo -R, or ask for fewer nodes")
    return Finding("sbatch", f"{plan.verb}: SLURM would start it at {start or 'an unknown time'}")


def _nodes_out(site: Site) -> str:
    words = ["sinfo", "--noheader", "--list-reasons", "--format=%N"]
    words += [f"--partition={site.partition}"] if site.partition is not None else []
    return ",".join(ask(words).split())


@dataclass(frozen=True, slots=True)
class Estimate:
    """What the verb itself says that it takes on this machine."""

    content: dict[str, Any]
    seconds: float  # of the job, as if its cores were like those here
    memory: int  # bytes of the processes that a node has

    @classmethod
    def of(cls, plan: Plan, elements: int | None = None) -> "Estimate":
        """From its --dry-run.

        Args:
            elements: jobs of an array, each of one node: parts of a grid, or a training each.

        Raises:
            UserError: it refuses.
            RunFailed: this machine cannot tell.
        """
        command = [sys.executable, "-m", "xtal", plan.verb, *plan.words, "--dry-run", "--json"]
        done = subprocess.run(
            command,
            env=clean_environment(),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode:
            said = f"xtal {plan.verb} --dry-run: {done.stderr.strip() or done.returncode}"
            kind = UserError if done.returncode == UserError.exit_code else RunFailed
            raise kind(said, remedy="mend this first")
        content = json.loads(done.stdout)
        takes = content["seconds"]
        # A worker of a training has a node, and its threads all cores of it, as here.
        nodes = plan.nodes if elements is None or plan.verb == "train" else elements
        share = nodes * (1 if plan.verb == "train" else plan.site.cores_per_node)
        most = takes.get("shares", share)
        seconds = takes["alone"] + takes["shared"] / min(share, most)
        each = max(1, plan.site.gpus) if plan.verb == "train" else plan.site.cores_per_node
        return cls(content, seconds, min(each, most) * content["memory"])

    @classmethod
    def told(cls, plan: Plan, elements: int | None = None, *, silent: bool) -> dict[str, Any]:
        """Show what a job takes, unless `silent`; the same for JSON, empty if it cannot be told.

        Raises:
            UserError: the verb refuses.
        """
        try:
            found = cls.of(plan, elements)
        except RunFailed as error:  # a login node may allow less than the work needs
            complain("warning", error.problem)
            return {}
        if not silent:
            found.show(plan)
        return found.as_dict()

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "expected": self.content,
            "job_seconds": self.seconds,
            "node_memory": self.memory,
        }

    def show(self, plan: Plan) -> None:
        """Print it, and whether the time limit is enough."""
        rows = dict(self.content["expected"])
        needs = f"{self.memory / 2**30:.1f} GiB a node"
        rows["this job"] = f"about {duration(self.seconds)}, --time is {plan.time}; {needs}"
        summary("what to expect", rows)
        for each in self.content.get("warnings", ()):
            complain("warning", each)
        if 0 < plan.site.memory << 20 < self.memory:
            said = (
                f"memory_per_node = {plan.site.memory_per_node} is less than the {needs} it takes"
            )
            complain("warning", f"{said}: raise it, or lower cores_per_node, in the site file")
        limit = max(1.0, seconds_of(plan.time) - plan.site.warning_seconds)
        if (again := int(self.seconds // limit)) > 0:
            said = f"--time {plan.time} is not enough: the job is requeued about {again} times"
            complain("warning", f"{said}, and goes on each time where it stopped")
