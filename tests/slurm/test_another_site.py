"""A site with accounting, GPUs, and nodes that are not alike."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from machines import ROOT, Machines, obstacle

pytestmark = pytest.mark.slurm

_SITE = 'account = "physics"\ncores_per_node = 1\nwarning_seconds = 30\n'


@pytest.fixture(scope="module")
def accounted() -> Iterator[Machines]:
    """Two nodes whose jobs are in a database, and forgotten by the controller after 10 s."""
    missing = [name for name in ("slurmdbd", "mariadbd") if shutil.which(name) is None]
    reason = (
        obstacle() or f"{', '.join(missing)} not installed (apt install slurmdbd mariadb-server)"
    )
    if obstacle() or missing:
        pytest.skip(reason)
    machines = Machines(nodes=2, richer=True)
    (machines.shared / "site.toml").write_text(_SITE)
    yield machines
    machines.close()


def xtal(machines: Machines, *words: str | Path, check: bool = True) -> Any:
    done = machines.run("xtal", *words, "--json", check=check)
    return json.loads(done.stdout) if check else done


def forgotten(machines: Machines, job: str) -> bool:
    return machines.run("scontrol", "show", "job", job, check=False).returncode != 0


def test_accounting_remembers(accounted: Machines) -> None:
    site = ("--site", accounted.shared / "site.toml")
    whole, bad, waiting = (accounted.shared / name for name in ("whole", "bad", "waiting"))
    first = xtal(accounted, "submit", "featurize", "prototypes:14", whole, *site)["job"]
    # Of what comes after another job it is not known before whether there is a source.
    words = ["submit", "featurize", "prototypes:no", bad, *site, "--after", first]
    wrong = xtal(accounted, *words)["job"]
    assert accounted.ended(first) == "COMPLETED"
    assert accounted.ended(wrong) == "FAILED"
    # Each link alone would be let in: only the third of them is refused.
    accounted.run("sacctmgr", "-i", "modify", "user", "root", "set", "MaxSubmitJobs=2")
    done = xtal(accounted, "submit", "all", "prototypes:14", waiting, *site, check=False)
    assert done.returncode == 2
    assert "SLURM refuses the job: AssocMaxSubmitJobLimit" in done.stderr
    accounted.run("sacctmgr", "-i", "modify", "user", "root", "set", "MaxSubmitJobs=-1")
    accounted.until(lambda: forgotten(accounted, wrong), "the controller forgets", 120)
    (row,) = xtal(accounted, "jobs", whole)
    assert (row["job"], row["state"], row["nodes"]) == (first, "COMPLETED", "node1")
    assert row["elapsed"] != "00:00:00"
    (row,) = xtal(accounted, "jobs", bad)
    assert (row["job"], row["state"], row["exit_code"]) == (wrong, "FAILED", "2:0")
    rows = xtal(accounted, "jobs", waiting)
    assert [row["verb"] for row in rows] == ["featurize", "train"]
    assert {row["state"] for row in rows} == {"CANCELLED"}
    assert xtal(accounted, "cancel", whole) == {"cancelled": []}


def test_an_account_that_there_is_not_is_found_before(accounted: Machines) -> None:
    site = accounted.shared / "other.toml"
    site.write_text('account = "chemistry"\ncores_per_node = 2\n')
    words = ["submit", "all", "prototypes:14", accounted.shared / "none", "--site", site]
    done = xtal(accounted, *words, "--dry-run", check=False)
    assert done.returncode == 1
    assert "Invalid account or account/partition combination" in done.stderr


def test_more_gpus_than_cores_on_nodes_that_differ(accounted: Machines) -> None:
    """One core and two, two GPUs each: as many workers as find both; no core is forgotten."""
    site, data = accounted.shared / "gpus.toml", accounted.shared / "data"
    run, log = accounted.shared / "run", accounted.shared / "log"
    accounted.on("node2", ["xtal", "featurize", "prototypes:140", data, "--selection", "miller:1"])
    words = ["submit", "train", data, run, "--site", site, "--task", "crystal_system"]
    for cores, gpus, nodes, said in (
        (2, 2, 2, "1 of the nodes of batch have cores_per_node = 2; the most is 2"),
        (1, 4, 1, "0 of the nodes of batch have gpus_per_node = 4; the most is 2"),
        (2, 2, 1, ""),
    ):
        lines = f"cores_per_node = {cores}\ngpus_per_node = {gpus}\nwarning_seconds = 30\n"
        site.write_text(f'account = "physics"\npartition = "batch"\n{lines}')
        done = xtal(accounted, *words, "--nodes", str(nodes), "--dry-run", check=False)
        assert done.returncode == (1 if said else 0), done.stderr
        assert said in done.stderr
    whole = ["--nodes=2", "--exclusive", "--gpus-per-node=2", f"--output={log}", "--time=5"]
    whole += ["--account=physics", ROOT / "slurm" / "train.sbatch", data, run]
    more = ["--task", "crystal_system", "--epochs", "3", "--workers", "0"]
    assert accounted.ended(accounted.sbatch(*whole, *more)) == "COMPLETED", log.read_text()
    assert "Ray on 2 of 2 nodes: 3 cores, 4 GPUs" in log.read_text()
    assert (run / "metrics.json").exists()
