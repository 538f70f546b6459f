"""A grid in parts: a job drives each; the driver of the grid itself takes up what they did.

Part 2/8 works in `OUT/parts/2-of-8`, with a record of its own, so that drivers on many nodes need
nothing of each other. A trial goes to the part of its training.
"""

import re
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from ablation.claim import driving, read_claim
from ablation.plan import Trial, fits_of
from ablation.record import Record
from cluster.errors import UserError

PARTS = "parts"


@dataclass(frozen=True, slots=True)
class Part:
    """The `number`-th of `count` parts, from 1."""

    number: int
    count: int

    @classmethod
    def parse(cls, text: str) -> "Part":
        """A part as the command line has it: 2/8.

        Raises:
            UserError: it is none.
        """
        found = re.fullmatch(r"(\d+)/(\d+)", text)
        if found is None or not 1 <= int(found[1]) <= int(found[2]):
            raise UserError(f"--part {text}", remedy="write the second of eight parts as 2/8")
        return cls(int(found[1]), int(found[2]))

    def folder(self, out: Path) -> Path:
        """Where its driver works."""
        return out / PARTS / f"{self.number}-of-{self.count}"

    def of(self, planned: Sequence[Trial]) -> list[Trial]:
        """Its trials: those of some trainings, of the same arms where that can be."""
        fits = sorted(fits_of(planned).values(), key=lambda fit: (fit.arm, fit.strength or 0.0))
        first, last = (len(fits) * n // self.count for n in (self.number - 1, self.number))
        own = {fit.id for fit in fits[first:last]}
        return [trial for trial in planned if trial.fit.id in own]


def folders(out: Path) -> list[Path]:
    """Where drivers of parts have worked, or are at work."""
    return sorted(path for path in out.glob(f"{PARTS}/*") if path.is_dir())


def take_up(record: Record, out: Path, planned: Sequence[Trial]) -> None:
    """Add to the grid's record the trials that are done in its parts alone.

    Raises:
        UserError: a driver is at work in one of them.
    """
    known = {trial.id for trial in planned}
    for folder in folders(out):
        with ExitStack() as held:
            if read_claim(folder) is not None:
                held.enter_context(driving(folder))
            theirs = Record(folder)
            for trial, row in theirs.rows.items():
                probability_NC = theirs.probabilities(trial)
                if trial in known and probability_NC is not None and not record.is_done(trial):
                    record.add(row, probability_NC)
