"""The record of a grid: what its trials gave, append-only, in two files however many they are.

`record.jsonl` has a line with its checksum for every trial that ended, the last of a trial counts.
`predictions.f32` holds the probabilities (float32, little-endian) that the lines point to; they are
on the disk before the line that says so. What a crash cut short is there for no reader.
"""

import json
import os
import time
import zlib
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cluster.files import append_line, whole_lines

RECORD = "record.jsonl"
PREDICTIONS = "predictions.f32"


class Record:
    """The record of the grid in a folder; only one process at a time may add to it."""

    def __init__(self, out: Path) -> None:
        self._lines, self._values = out / RECORD, out / PREDICTIONS
        self.rows: dict[str, dict[str, Any]] = {}
        """Trial → its last line."""
        if self._lines.exists():
            for line in whole_lines(self._lines):
                row = json.loads(line)
                self.rows[row["trial"]] = row

    @classmethod
    def mended(cls, out: Path) -> "Record":
        """The record, to be added to: a line that a crash has torn is ended before."""
        path = out / RECORD
        if path.exists() and path.stat().st_size:
            with path.open("r+b") as stream:
                stream.seek(-1, os.SEEK_END)
                if stream.read(1) != b"\n":
                    stream.write(b"\n")
        return cls(out)

    def add(self, row: dict[str, Any], probability_NC: NDArray[np.float32] | None = None) -> None:
        """Append a trial's line, with the probabilities of its test crystals if it has some."""
        if probability_NC is not None:
            content = probability_NC.astype("<f4").tobytes()
            with self._values.open("ab") as stream:
                offset = stream.tell()
                stream.write(content)
                stream.flush()
                os.fsync(stream.fileno())
            place = [offset, *probability_NC.shape, zlib.crc32(content)]
            row = row | {"predictions": place}
        row = row | {"at": round(time.time(), 3)}
        append_line(self._lines, json.dumps(row))
        self.rows[row["trial"]] = row

    def is_done(self, trial: str) -> bool:
        """Whether a trial has a result and its predictions are whole."""
        return self.probabilities(trial) is not None

    def probabilities(self, trial: str) -> NDArray[np.float32] | None:
        """(N, C) of the test crystals; None of a trial that is not done, or damaged."""
        row = self.rows.get(trial, {})
        if row.get("status") != "done":
            return None
        offset, crystals, classes, checksum = row["predictions"]
        try:
            with self._values.open("rb") as stream:
                stream.seek(offset)
                content = stream.read(4 * crystals * classes)
        except FileNotFoundError:
            return None
        if zlib.crc32(content) != checksum:
            return None
        return np.frombuffer(content, "<f4").reshape(crystals, classes)
