"""Whether attempts of a job get on: a line each, with a digest of the work that they found."""

import hashlib
import json
import os
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path

from cluster.errors import RunFailed
from cluster.files import append_line, whole_lines

ATTEMPTS = "attempts.jsonl"
_TELLING = {"driver.json"}  # who is at work, not what was done
# What work leaves behind; all else (logs, locks, plans) changes without progress.
_WORK = {".h5", ".safetensors", ".parquet", ".jsonl", ".csv", ".json", ".html"}


def mark(result: Path) -> str:
    """A digest of what work has left in `result`: equal if nothing was done in between."""
    digest = hashlib.sha256()
    for path in sorted(result.rglob("*")):
        if path.name in _TELLING or "logs" in path.relative_to(result).parts:
            continue
        if path.suffix in _WORK:
            with suppress(FileNotFoundError):
                if not (about := path.stat()).st_size:
                    continue
                rewritten = about.st_mtime_ns if path.suffix == ".safetensors" else 0
                digest.update(f"{path}\0{about.st_size}\0{rewritten}\n".encode("utf-8", "replace"))
    return digest.hexdigest()[:16]


def note_attempt(jobs: Path, job: str, found: str) -> None:
    """Record that an attempt of `job` begins with a result whose mark is `found`.

    Raises:
        RunFailed: the two attempts before it made no progress.
    """
    path = jobs / ATTEMPTS
    before = [json.loads(line) for line in whole_lines(path)] if path.exists() else []
    same = [row["mark"] for row in before if row["job"] == job]
    row = {
        "job": job,
        "mark": found,
        "nodes": os.environ.get("SLURM_JOB_NODELIST", ""),
        "begun": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    append_line(path, json.dumps(row))
    if same[-2:] == [found, found]:
        raise RunFailed(
            f"job {job} made no progress in its last two attempts and is not run again",
            remedy=f"read its log in {jobs}, mend the reason, and submit it again",
        )
