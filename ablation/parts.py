"""A grid in parts: a job drives each; the driver of the grid itself takes up what they did.

Part 2/8 works in `OUT/parts/2-of-8`, with a record of its own, so that drivers on many nodes need
nothing of each other. A trial goes to the part of its training.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ablation.claim import driving
from ablation.plan import Trial, fits_of
from ablation.record import Record
from ablation.trials import REFERENCE
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
        """Its trials: those of a share of the reference's trainings, and of a run of the others.

        Most tests need the former; the latter start from like clouds.
        """
        fits = sorted(fits_of(planned).values(), key=lambda fit: (fit.arm, fit.strength or 0.0))
        references = [fit for fit in fits if fit.arm == REFERENCE]
        others = [fit for fit in fits if fit.arm != REFERENCE]
        first, last = (len(others) * n // self.count for n in (self.number - 1, self.number))
        own = {f.id for f in (*references[self.number - 1 :: self.count], *others[first:last])}
        return [trial for trial in planned if trial.fit.id in own]


def folders(out: Path) -> list[Path]:
    """Where drivers of parts have worked, or are at work."""
    return sorted(path for path in out.glob(f"{PARTS}/*") if path.is_dir())


def rows_of(out: Path) -> dict[str, dict[str, Any]]:
    """Trial → what a grid and its parts say of it: that it is done, else the newest."""
    found: dict[str, dict[str, Any]] = {}
    for place in (out, *folders(out)):
        for trial, row in Record(place).rows.items():
            rank = row["status"] == "done", row["at"]
            if trial not in found or rank >= (found[trial]["status"] == "done", found[trial]["at"]):
                found[trial] = row
    return found


def not_done(out: Path, trials: Sequence[Trial]) -> list[Trial]:
    """Those that neither the grid nor a part of it has done."""
    records = [Record(place) for place in (out, *folders(out))]
    return [trial for trial in trials if not any(record.is_done(trial.id) for record in records)]


def take_up(record: Record, out: Path, planned: Sequence[Trial]) -> None:
    """Add to the grid's record the trials that its parts alone have done; take their trainings.

    Raises:
        UserError: a driver is at work in one of them.
    """
    known = {trial.id for trial in planned}
    fits = fits_of(planned)
    for folder in folders(out):
        with driving(folder):
            theirs = Record(folder)
            for trial, row in theirs.rows.items():
                probability_NC = theirs.probabilities(trial)
                if trial in known and probability_NC is not None and not record.is_done(trial):
                    record.add(row, probability_NC)
            for begun in (folder / "fits").glob("*"):
                here = out / "fits" / begun.name
                if begun.name in fits and not here.exists():
                    here.parent.mkdir(exist_ok=True)
                    begun.rename(here)
