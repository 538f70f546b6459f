"""Twenty times one rank of a real `mpiexec` is killed at a random amount of progress: no trace.

A kill strikes while nothing is written yet, in the midst of a shard, or at the end among the
duplicates, as it comes. Every job but the first resumes what a kill left, mostly on another number
of ranks, the last on one. `python -m benchmarks.faults` does this, and more, to real crystals.
"""

import random
import shutil
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
from test_mpi import needs_mpi
from test_resume import wait_until_gone
from tiny import SMALL, broken, document, run, write_lines

from benchmarks.faults import STRIKES, Target
from featurization import finish, journal
from featurization.verify import verify

CONFIG = SMALL.model_copy(update={"shard_structures": 8})
ONE = STRIKES["SIGKILL to one rank"]
SIZES = (2, 4, 2, 2)  # ranks of the jobs that are killed, one after another in a folder


def line(i: int) -> Any:
    """A crystal; now and then none, or another one of an id that an earlier shard has."""
    if i % 40 == 7:
        return broken(f"b{i}")
    return document(f"m{i - 30}" if i % 50 == 33 else f"m{i}", 4 + i / 900, band_gap=i / 10)


@dataclass(frozen=True)
class Case:
    """A dataset to disturb, and what one undisturbed rank makes of its source."""

    target: Target
    expected: dict[str, Any]
    bytes: int

    def kill(self, size: int, part: float, choose: random.Random) -> bool:
        """One rank, once `part` of what the folder lacks is there; False if the job was faster."""
        now = self.target.progress()
        return self.target.strike(size, now + part * (self.bytes - now), ONE, choose)

    def end(self) -> None:
        """Resume on one rank, and compare."""
        wait_until_gone(self.target.out)
        run(self.target.source, self.target.out, CONFIG)
        assert self.target.outcome() == self.expected
        assert verify(self.target.out, [self.target.source], sample=2)["problems"] == []


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Case:
    folder = tmp_path_factory.mktemp("kills")
    source = write_lines(folder / "s.jsonl", map(line, range(240)))
    target = Target(str(source), folder / "out", folder / "config.toml")
    target.config.write_text('selection = "miller:2"\nshard_structures = 8\n')
    run(source, target.out, CONFIG)
    return Case(target, target.outcome(), target.progress())


@pytest.fixture
def case(undisturbed: Case) -> Case:
    shutil.rmtree(undisturbed.target.out, ignore_errors=True)
    return undisturbed


@needs_mpi
@pytest.mark.slow
@pytest.mark.parametrize("seed", range(5))
def test_kills_leave_no_trace(case: Case, seed: int) -> None:
    choose = random.Random(seed)
    struck = 0
    for left, size in zip(range(len(SIZES), 0, -1), SIZES, strict=True):
        if not case.kill(size, choose.random() / left, choose):
            break
        struck += 1
    assert struck >= 3
    case.end()


@needs_mpi
def test_that_test_finds_a_run_that_forgets_what_is_committed(
    case: Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert case.kill(2, 0.5, random.Random(0))
    done = journal.done_blocks
    monkeypatch.setattr(journal, "done_blocks", lambda *asked: np.zeros_like(done(*asked)))
    # Were the run itself not to notice.
    monkeypatch.setattr(finish, "unaccounted", lambda *_: [])
    with pytest.raises(AssertionError):
        case.end()
