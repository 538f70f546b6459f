"""What jobs were, told by a real slurmdbd after the controller has forgotten them."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from machines import Machines, obstacle

pytestmark = pytest.mark.slurm

_SITE = 'account = "physics"\ncores_per_node = 2\nwarning_seconds = 30\n'


@pytest.fixture(scope="module")
def accounted() -> Iterator[Machines]:
    """One node whose jobs are kept in a database, and forgotten by the controller after 10 s."""
    missing = [name for name in ("slurmdbd", "mariadbd") if shutil.which(name) is None]
    reason = (
        obstacle() or f"{', '.join(missing)} not installed (apt install slurmdbd mariadb-server)"
    )
    if obstacle() or missing:
        pytest.skip(reason)
    machines = Machines(nodes=1, accounting=True)
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
    wrong = xtal(accounted, "submit", "featurize", "prototypes:no", bad, *site)["job"]
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
