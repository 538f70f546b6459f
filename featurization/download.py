"""A published archive → a file, of which what is there already is kept."""

import re
import shutil
import time
from pathlib import Path
from typing import Any

from cluster.errors import RunFailed, UserError
from cluster.files import sha256_of
from featurization import web
from featurization.addresses import checked_url, host_of
from featurization.published import Archive
from featurization.snapshot import Snapshot, clear, fetched
from featurization.web import AGAIN, CUT, Progress, Refused, Say, Web, reason_of, too_large

# Larger than any published archive, B.
MAX_FILE = 4 << 30
_PIECE = 1 << 20


def fetch(
    archive: Archive,
    folder: Path,
    *,
    url: str | None = None,
    by_hand: Path | None = None,
    restart: bool = False,
    say: Say,
    progress: Progress,
) -> tuple[Path, dict[str, Any]]:
    """Put an archive into a folder, under its published name; returns its path and record.

    Args:
        url: a mirror to take it from; the checksum decides.
        by_hand: the file, downloaded already.

    Raises:
        UserError: `by_hand` is another file or comes with `url`, or one of the name is there.
        RunFailed: the server fails, or what it gives is another file.
    """
    path = folder / archive.file
    if by_hand is not None and not by_hand.is_file():
        raise UserError(f"--from {by_hand}: no such file", remedy="give the path of the download")
    if by_hand is not None and url is not None:
        raise UserError(
            f"--from {by_hand} with --url {url}: a file is taken from one place",
            remedy="leave out --url to take the download, or --from to fetch",
        )
    address = checked_url(url or archive.url, "--url")
    request = {"source": archive.source, "sha256": archive.sha256}

    def work(snapshot: Snapshot) -> dict[str, Any]:
        if by_hand is not None:
            _check(archive, by_hand, f"--from {by_hand}", UserError)
            shutil.copyfile(by_hand, snapshot.data)
        else:
            download(Web(say), address, snapshot.data, progress)
        try:
            _check(archive, snapshot.data, address, RunFailed)
        except RunFailed:
            clear(snapshot.folder)
            raise
        return {
            "source": archive.source,
            "url": str(by_hand.absolute()) if by_hand else address,
            "structures": archive.structures,
            "licence": archive.licence,
            "cite": archive.cite,
        }

    return path, fetched(path, request, work, restart=restart, say=say)


def download(session: Web, url: str, path: Path, progress: Progress) -> None:
    """The bytes at an address, after those that `path` has of them already.

    Progress is told as (bytes there, bytes in all or 0). What `path` then holds must be checked:
    the server may have changed the file meanwhile.

    Raises:
        RunFailed: the server does not give them, after several attempts without any progress.
    """
    failures = 0
    while True:
        before = path.stat().st_size if path.exists() else 0
        try:
            if _some(session, url, path, before, progress):
                return
            reason = "the answer was cut short"
        except CUT as error:
            reason = reason_of(error)
        more = path.exists() and path.stat().st_size > before
        failures = 1 if more else failures + 1
        if failures == web.ATTEMPTS:
            raise RunFailed(f"{host_of(url)}: {reason}", remedy=AGAIN)
        pause = web.PAUSE * 2 ** (failures - 1)
        session.say(f"{host_of(url)}: {reason}; again in {pause:.0f} s")
        time.sleep(pause)


def _some(session: Web, url: str, path: Path, before: int, progress: Progress) -> bool:
    """Get what is missing of a file; False if it is still not whole."""
    headers = {"accept-encoding": "identity"}
    if before:
        headers["range"] = f"bytes={before}-"
    with session.get(url, stream=True, headers=headers) as response:
        spoken = response.headers.get("content-range", "")
        given = re.fullmatch(r"bytes (\d+)-\d+/(\d+)", spoken)
        if response.status_code == 416:  # nothing is missing, or the file is another one now
            whole = spoken == f"bytes */{before}"
            if not whole:
                path.unlink()
            return whole
        if response.status_code == 206 and given and int(given[1]) == before:
            total = int(given[2])
        elif response.status_code == 200:
            before, total = 0, int(response.headers.get("content-length") or 0)
        else:
            raise Refused(
                f"{host_of(str(response.url))} answers HTTP {response.status_code} in place of the "
                "file",
                remedy=f"open {url} in a browser, and give what it saves with --from FILE",
            )
        done = before
        with path.open("ab" if before else "wb") as file:
            for piece in response.raw.stream(_PIECE, decode_content=False):
                done += file.write(piece)
                progress(done, total)
                if done > MAX_FILE:
                    raise too_large(url, MAX_FILE)
    return not total or done == total


def _check(
    archive: Archive, path: Path, what: str, failure: type[UserError] | type[RunFailed]
) -> None:
    found = sha256_of(path)
    if found != archive.sha256:
        raise failure(
            f"{what} is not {archive.file} as published: {path.stat().st_size:,} bytes with "
            f"SHA-256 {found}, not {archive.sha256}",
            remedy=f"take it from {archive.url}; what came is not kept"
            if failure is RunFailed
            else f"download {archive.url} again",
        )
