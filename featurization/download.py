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
from featurization.snapshot import Snapshot, clear, fetched, record_of
from featurization.web import AGAIN, CUT, Progress, Refused, Say, Web, reason_of, too_large

# Larger than any published archive, B.
MAX_FILE = 4 << 30
_PIECE = 1 << 20
_ELSEWHERE = "give another FOLDER, or move it away"
_BY_HAND = "open the address in a browser, and give what it saves with --from FILE"


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
    without_record = path.is_file() and not record_of(path).exists()
    if without_record:
        _check(archive, path, f"{path}, which is there already,", UserError, _ELSEWHERE)
        say(f"{path} is there already, whole; only its record is written")

    def work(snapshot: Snapshot) -> dict[str, Any]:
        taken = path if without_record else by_hand
        if without_record:
            snapshot.data.unlink(missing_ok=True)
        elif by_hand is not None:
            again = f"download {archive.url} again"
            _check(archive, by_hand, f"--from {by_hand}", UserError, again)
            shutil.copyfile(by_hand, snapshot.data)
        else:
            _downloaded(archive, address, snapshot, say, progress)
        return {
            "source": archive.source,
            "url": str(taken.absolute()) if taken else address,
            "structures": archive.structures,
            "licence": archive.licence,
            "cite": archive.cite,
        }

    record = fetched(path, request, work, restart=restart, unrecorded=without_record, say=say)
    return path, record


def _downloaded(
    archive: Archive, address: str, snapshot: Snapshot, say: Say, progress: Progress
) -> None:
    """Put the archive into the snapshot, begun anew once if the parts of it do not fit."""
    in_parts = download(Web(say), address, snapshot.data, progress)
    if in_parts and sha256_of(snapshot.data) != archive.sha256:
        say(f"{host_of(address)}: what came in parts is another file; all of it again")
        snapshot.data.unlink()
        download(Web(say), address, snapshot.data, progress)
    try:
        other = f"take it from {archive.url}" if address != archive.url else _BY_HAND
        _check(archive, snapshot.data, address, RunFailed, f"{other}; what came is not kept")
    except RunFailed:
        clear(snapshot.folder)
        raise


def download(session: Web, url: str, path: Path, progress: Progress) -> bool:
    """The bytes at an address, after those that `path` has of them already.

    Progress is told as (bytes there, bytes in all or 0). What `path` then holds must be checked:
    the server may have changed the file meanwhile.

    Returns:
        Whether they came in more than one part.

    Raises:
        RunFailed: the server does not give them, after several attempts without any progress.
    """
    failures, most = 0, path.stat().st_size if path.exists() else 0
    while True:
        before = path.stat().st_size if path.exists() else 0
        try:
            reason = _some(session, url, path, before, progress)
            if not reason:
                return before > 0
        except CUT as error:
            reason = reason_of(error)
        there = path.stat().st_size if path.exists() else 0
        failures = 1 if there > most else failures + 1
        most = max(most, there)
        if failures == web.ATTEMPTS:
            raise RunFailed(f"{host_of(url)}: {reason}", remedy=AGAIN)
        pause = web.PAUSE * 2 ** (failures - 1)
        session.say(f"{host_of(url)}: {reason}; again in {pause:.0f} s")
        time.sleep(pause)


def _some(session: Web, url: str, path: Path, before: int, progress: Progress) -> str:
    """Get what is missing of a file; why it is still not whole, or nothing."""
    headers = {"accept-encoding": "identity"}
    if before:
        headers["range"] = f"bytes={before}-"
    with session.get(url, stream=True, headers=headers) as response:
        spoken = response.headers.get("content-range", "")
        given = re.fullmatch(r"bytes (\d+)-\d+/(\d+|\*)", spoken)
        if response.status_code == 416 and spoken == f"bytes */{before}":
            return ""
        if response.status_code == 206 and given and int(given[1]) == before:
            total = 0 if given[2] == "*" else int(given[2])
        elif response.status_code == 200:
            before, total = 0, int(response.headers.get("content-length") or 0)
        elif before and response.status_code in (206, 416):
            path.unlink()
            return "it does not go on where it was cut; all of it again"
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
    return "the answer was cut short" if total and done != total else ""


def _check(
    archive: Archive, path: Path, what: str, failure: type[UserError] | type[RunFailed], remedy: str
) -> None:
    found = sha256_of(path)
    if found != archive.sha256:
        raise failure(
            f"{what} is not {archive.file} as published: {path.stat().st_size:,} bytes with "
            f"SHA-256 {found}, not {archive.sha256}",
            remedy=remedy,
        )
