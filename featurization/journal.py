"""What an unfinished dataset knows of itself, so that the same command goes on after any death.

| file in OUT/journal     | written by      | what                                               |
|-------------------------|-----------------|----------------------------------------------------|
| plan.json               | rank 0, once    | what was asked, and how many records there are     |
| places.bin, records.bin | rank 0, once    | see `featurization.index`                          |
| known.bin               | rank 0, once    | ids of earlier parts, see `featurization.resume`   |
| owner                   | rank 0          | the job that may commit                            |
| done-ATTEMPT-RANK.jsonl | that rank alone | a line a commit: a shard, its records, its rejects |
| at-ATTEMPT-RANK         | that rank alone | the record that it is busy with; gone if it ended  |

A commit is a shard that was renamed into place and then a line, fsynced. A shard without its line,
or a line whose shard is gone or damaged, is done again under another name. Records are numbered
within one part: the first source of a dataset is part 0, each appended one the next.
"""

import json
import re
import secrets
import shutil
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cluster.errors import RunFailed, UserError
from cluster.files import append_line, whole_lines, write_text
from featurization.config import completed
from featurization.index import Index

FOLDER = "journal"
# As often may a process die while at one record, until the record is taken to be the reason.
_DEATHS = 3
# What a reject says that may not be the crystal's fault.
AGAIN = "; to try it again: xtal verify OUT --retry"
OURS = re.compile(r"\.?(plan|places|records|known|owner|done-|at-)")
_ATTEMPT = re.compile(r"(?:^done|^at|shard-\d+)-(\d+)-")


@dataclass(frozen=True, slots=True)
class Commit:
    """Records that are done, with the shard that their crystals are in."""

    shard: dict[str, Any] | None  # its row of the manifest; None if all records are rejects
    ranges: list[tuple[int, int]]  # (first, beyond the last) of the records
    rejects: list[tuple[int, str, str, str]]  # (record, id, stage, reason)
    present: int  # records left out because the dataset has their ids since earlier parts


@dataclass(frozen=True, slots=True)
class Plan:
    """What an unfinished part of a dataset will be."""

    part: int
    first_record: int  # `source_index` of record 0
    spec: str
    source: dict[str, Any]
    config: dict[str, Any]
    index: Index
    block: int  # records that are claimed at a time
    recorded: dict[str, str] = field(default_factory=dict)  # see `featurization.attribution`


def write_plan(out: Path, plan: Plan) -> None:
    """Atomically; from now on the run can be resumed."""
    write_text(out / FOLDER / "plan.json", json.dumps(asdict(plan), indent=1))


def read_plan(out: Path) -> Plan | None:
    """None if there is none.

    Raises:
        UserError: it is no plan of this version.
    """
    path = out / FOLDER / "plan.json"
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        whole = {"index": Index(**values["index"]), "config": completed(values["config"])}
        return Plan(**values | whole)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{path} is not the plan of this version's run: {type(error).__name__}: {error}",
            remedy=f"remove {out / FOLDER}, then xtal verify {out} --repair does what is missing; "
            "of a first run that did not end: featurize again into a new folder",
        ) from None


def remove_journal(out: Path) -> None:
    """The plan first: with part of the rest gone, there must be nothing to resume."""
    (out / FOLDER / "plan.json").unlink(missing_ok=True)
    shutil.rmtree(out / FOLDER, ignore_errors=True)


def write_commit(out: Path, attempt: int, rank: int | None, commit: Commit) -> None:
    """Append and fsync; the shard must be in place. The rank is None once all ranks are done."""
    who = "finish" if rank is None else f"{rank:05d}"  # letters sort after digits: read last
    append_line(out / FOLDER / f"done-{attempt:04d}-{who}.jsonl", json.dumps(asdict(commit)))


def commits(out: Path) -> Iterator[Commit]:
    """All commits of all attempts whose shard is there; of several lines of a shard the last
    has its row."""
    for path in sorted((out / FOLDER).glob("done-*.jsonl")):
        for line in whole_lines(path):
            values = json.loads(line)
            commit = Commit(**values | {"ranges": [tuple(pair) for pair in values["ranges"]]})
            if commit.shard is None or (out / commit.shard["file"]).is_file():
                yield commit


def committed(out: Path) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Manifest rows of the committed shards, by file name; and of the commits without a crystal."""
    rows, ranges, present = {}, [], 0
    for commit in commits(out):
        if commit.shard is not None:
            rows[commit.shard["file"]] = commit.shard
        else:
            ranges += commit.ranges
            present += commit.present
    records = [list(span) for span in joined(ranges)]
    return [rows[name] for name in sorted(rows)], {"records": records, "present": present}


def committed_shards(out: Path) -> list[dict[str, Any]]:
    """Manifest rows of the committed shards, by file name."""
    return committed(out)[0]


def joined(ranges: Iterable[tuple[int, int]]) -> list[tuple[int, int]]:
    """Ranges in ascending order, those that touch made one."""
    answer: list[tuple[int, int]] = []
    for start, stop in sorted(ranges):
        if answer and answer[-1][1] == start:
            answer[-1] = answer[-1][0], stop
        else:
            answer.append((start, stop))
    return answer


def done_blocks(out: Path, plan: Plan) -> NDArray[np.bool_]:
    """Whether each block of records is in a commit, which holds whole blocks only."""
    done = np.zeros(-(-plan.index.count // plan.block), dtype=bool)
    for commit in commits(out):
        for start, stop in commit.ranges:
            done[start // plan.block : -(-stop // plan.block)] = True
    return done


def next_attempt(out: Path, part: int) -> int:
    """One more than any that left a trace, so that the name of a shard is never used again."""
    names = [path.name for path in (out / FOLDER).iterdir()]
    names += [path.name for path in (out / "shards").glob(f"*shard-{part:03d}-*")]
    found = (_ATTEMPT.search(name) for name in names)
    return max((int(match[1]) for match in found if match), default=0) + 1


def take_over(out: Path) -> str:
    """From now on only the job with this token may commit."""
    token = secrets.token_hex(8)
    write_text(out / FOLDER / "owner", token)
    return token


def check_owner(out: Path, token: str) -> None:
    """That no other job took over; locks are not everywhere.

    Raises:
        RunFailed: one did.
    """
    path = out / FOLDER / "owner"
    if not path.exists() or path.read_text(encoding="utf-8") != token:
        raise RunFailed(
            f"another job has taken over {out}", remedy="let one job at a time work in a folder"
        )


def deaths(out: Path) -> tuple[dict[int, str], list[int]]:
    """Records that ended their process again and again → the reason to reject them; and records
    that will be among them after one more death.

    With one process, all others die, whatever they are at: only who dies alone is to blame.
    """
    counts: Counter[int] = Counter()
    reasons = {}
    for path in (out / FOLDER).glob("at-*"):
        text = path.read_bytes()
        number = text[:20].strip()
        if not number.isdigit():
            continue
        counts[int(number)] += 1
        if text[20:]:
            reasons[int(number)] = f"hung in native code, which ended its process{AGAIN}"
    for record, count in counts.items():
        if count >= _DEATHS:
            reasons.setdefault(
                record, f"its process died {count} times while at this crystal{AGAIN}"
            )
    suspects = [r for r, count in counts.items() if count == _DEATHS - 1 and r not in reasons]
    return reasons, suspects
