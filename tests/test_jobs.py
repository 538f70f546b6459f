"""What SLURM says of jobs, and what is asked of it."""

import sys

import pytest
from tiny import process

from cluster.slurm import parse_sacct, parse_show_job

ELEMENT = "JobId={} ArrayJobId=8 JobState={} Reason={} RunTime={} StartTime={} NodeList={}\n"
WAITING = ("PENDING", "Resources", "00:00:00", "Unknown", "(null)")
AT_WORK = ("RUNNING", "None", "00:03:00", "2026-01-01T00:00:00", "n2")


@pytest.mark.parametrize("rows", [(WAITING, AT_WORK), (AT_WORK, WAITING)])
def test_an_array_is_shown_by_the_element_that_runs(rows: tuple[tuple[str, ...], ...]) -> None:
    job = parse_show_job("".join(ELEMENT.format(9 + at, *row) for at, row in enumerate(rows)))
    found = (job.id, job.state, job.elapsed, job.nodes, job.reason)
    assert found == ("8", "RUNNING", "00:03:00", "n2", "")
    lines = [f"8_{at}|{row[0]}|{row[2]}|{row[4]}|{row[1]}|0:0" for at, row in enumerate(rows)]
    job = parse_sacct("\n".join(lines), "8")
    assert (job.state, job.elapsed, job.nodes, job.reason) == ("RUNNING", "00:03:00", "n2", "")


def test_a_job_that_never_began_has_no_time() -> None:
    never = ("CANCELLED", "Dependency", "20783-23:43:24", "Unknown", "(null)")
    assert parse_show_job(ELEMENT.format(9, *never)).elapsed == ""


def test_what_is_asked_leaves_a_loop_its_input() -> None:
    script = "from cluster.slurm import ask; print(repr(ask(['cat'])), input())"
    words = ["sh", "-c", 'echo kept | "$0" -c "$1"', sys.executable, script]
    assert process(words).stdout == "'' kept\n"
