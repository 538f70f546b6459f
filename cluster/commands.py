"""Verbs of `xtal` that speak to a cluster: submit, jobs, cancel, dashboard."""

import json
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from cluster.attempt import jobs_folder
from cluster.errors import RunFailed, UserError
from cluster.ray_cluster import ADDRESS, GRAFANA, OF_JOB, PROMETHEUS
from cluster.slurm import Job, ask, cancel, look, recorded
from cluster.submit_commands import submitting
from cluster.terminal import AsJson, OptionsFile, out, show_json

DASHBOARD = GRAFANA / "crystal-genome.json"
_NOT_LAUNCHED = "JobLaunchFailure"
Result = Annotated[Path, typer.Argument(metavar="RUN", help="What was submitted: OUT or RUN.")]


def jobs(result: Result, config: OptionsFile = None, as_json: AsJson = False) -> None:
    """Show the jobs of a result: state, time, nodes, reason, and the end of the newest log."""
    rows = [(row, look(row["job"])) for row in _rows(result)]
    if as_json:
        show_json([_as_dict(row, job) for row, job in rows])
        return
    table = Table()
    for name in ("job", "verb", "state", "elapsed", "nodes", "restarts", "reason"):
        table.add_column(name, overflow="fold")
    for row, job in rows:
        cells = (job.state, job.elapsed, job.nodes, job.restarts, job.reason)
        table.add_row(row["job"], row["verb"], *cells)
    out.print(table)
    for row, job in rows:
        if job.reason == _NOT_LAUNCHED and not Path(row["log"]).exists():
            what = f"job {job.id}: no log was written, a node could not begin the job"
            place = Path(row["log"]).parent
            out.print(f"{what}; do compute nodes see {place}?", soft_wrap=True, highlight=False)
    begun = [row for row, _ in rows if Path(row["log"]).exists()]
    if begun:
        log = Path(begun[-1]["log"])
        if log.parent.name.endswith("_0"):  # of an array: the element that wrote last
            those = log.parent.parent.glob(f"{begun[-1]['job']}_*/*_log.out")
            log = max(those, key=lambda path: path.stat().st_mtime)
        out.print(f"{log} ends:", soft_wrap=True, highlight=False)
        for line in log.read_text(errors="replace").splitlines()[-8:]:
            out.print(f"  {line}", soft_wrap=True, highlight=False)


def cancel_jobs(result: Result, config: OptionsFile = None, as_json: AsJson = False) -> None:
    """Cancel the jobs of a result that have not ended; what is done is safe."""
    alive = [row["job"] for row in _rows(result) if not look(row["job"]).over]
    cancel(alive)
    if as_json:
        show_json({"cancelled": alive})
    else:
        out.print(f"cancelled: {', '.join(alive) or 'none, all have ended'}", highlight=False)


def dashboard(
    result: Result,
    login: Annotated[
        str | None, typer.Option(help="user@host of the login node, as seen from your desk.")
    ] = None,
    port: Annotated[int, typer.Option(help="Port at your desk.", min=1024, max=65535)] = 8265,
    tunnel: Annotated[
        bool, typer.Option("--open", help="Bring it to that port of this machine, until Ctrl-C.")
    ] = False,
    config: OptionsFile = None,
    as_json: AsJson = False,
) -> None:
    """Say how to reach the Ray dashboard of a running job from your desk, and whether it answers.

    It listens on the loopback network of the job's first node, and asks for the job's token. With
    --open this command holds an ssh tunnel to it, where compute nodes let you in: at your desk, if
    SLURM's commands are there, or on the login node.
    """
    found = [path for each in _folders(result) for path in each.glob(ADDRESS.format("*"))]
    found.sort(key=lambda path: path.stat().st_mtime)
    read = ((path.parent, json.loads(path.read_text(encoding="utf-8"))) for path in found[::-1])
    # That of another job is what its first node, which was lost, could not remove.
    running = (each for each in read if look(each[1]["job"]).state == "RUNNING")
    if (newest := next(running, None)) is None:
        raise UserError(f"no job of {result} has a Ray now", remedy="see xtal jobs RUN")
    jobs, seen = newest
    rows = [row for row in recorded(jobs) if row["job"] == seen["job"]]
    login = login or next((row["site"].get("login") for row in rows), None) or "LOGIN"
    forward = ["-L", f"127.0.0.1:{port}:127.0.0.1:{seen['port']}", seen["node"]]
    step = ["srun", f"--jobid={seen['job']}", "--overlap", "--quiet", "--nodes=1", "--ntasks=1"]
    step += [f"--nodelist={seen['node']}"]
    check = [sys.executable, "-m", "cluster.ray_node", "--answers", str(seen["port"])]
    told = {
        "node": seen["node"],
        "answers": ask([*step, *check, "--token", seen["token"]]).strip(),
        "url": f"http://localhost:{port}",
        "tunnel": shlex.join(["ssh", "-N", "-J", login, *forward]),
        "print_token": shlex.join([*step, "cat", seen["token"]]),
    }
    if (jobs / OF_JOB.format(seen["job"])).exists():
        words = ["prometheus", f"--config.file={jobs / PROMETHEUS}"]
        # Not ./data, its own choice, nor a shared file system, which it does not support.
        words += [f"--storage.tsdb.path={tempfile.gettempdir()}/prometheus-{seen['job']}"]
        told["prometheus"] = shlex.join([*words, "--web.listen-address=127.0.0.1:9090"])
        told["grafana"] = str(DASHBOARD)
    if as_json:
        show_json(told)
    else:
        _show_dashboard(told)
    if tunnel:
        _hold(["ssh", "-N", "-o", "BatchMode=yes", "-o", "ExitOnForwardFailure=yes", *forward])


def _show_dashboard(told: Mapping[str, str]) -> None:
    lines = [
        f"the dashboard on {told['node']} answers: {told['answers']}",
        "at your desk:",
        f"  {told['tunnel']}",
        f"  then open {told['url']}; it asks for the token, which",
        f"  {told['print_token']}",
        "  prints here",
    ]
    if "prometheus" in told:
        lines += [
            "numbers of the work, here or wherever the nodes can be reached:",
            f"  {told['prometheus']}",
            f"  the dashboard for Grafana is {told['grafana']}",
        ]
    for line in lines:
        out.print(line, soft_wrap=True, highlight=False)


def _hold(ssh: Sequence[str]) -> None:
    """Run ssh until it ends, or somebody ends it.

    Raises:
        UserError: there is none here.
        RunFailed: it ends by itself.
    """
    if shutil.which("ssh") is None:
        raise UserError("there is no ssh here", remedy="install OpenSSH's client")
    with suppress(KeyboardInterrupt):
        code = subprocess.run(ssh, check=False).returncode
        raise RunFailed(
            f"{shlex.join(ssh)} ended with {code}",
            remedy="give another --port, or, where nodes let nobody in, use the line for your desk",
        )


def register(app: typer.Typer) -> None:
    """Add these verbs to the command line."""
    app.add_typer(submitting, name="submit")
    app.command()(jobs)
    app.command("cancel")(cancel_jobs)
    app.command()(dashboard)


def _folders(result: Path) -> list[Path]:
    """Folders of jobs of a result and of those within it."""
    own = jobs_folder(result)
    return [each for each in (own, *sorted(result.glob("*.jobs"))) if each.is_dir()]


def _rows(result: Path) -> list[dict[str, Any]]:
    """Jobs that were submitted for a result and those within it, oldest first."""
    found = [row for each in _folders(result) for row in recorded(each)]
    if not found:
        raise UserError(
            f"no job was submitted for {result}",
            remedy="give the result that xtal submit names, such as its OUT or RUN",
        )
    return sorted(found, key=lambda row: int(row["job"]))


def _as_dict(row: dict[str, Any], job: Job) -> dict[str, Any]:
    names = ("state", "elapsed", "nodes", "reason", "exit_code", "restarts")
    return {"verb": row["verb"], "log": row["log"], "job": row["job"]} | {
        name: getattr(job, name) for name in names
    }
