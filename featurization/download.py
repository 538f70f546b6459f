"""A file from an address, after what is there of it already."""

import re
import time
from pathlib import Path

from cluster.errors import RunFailed
from featurization import web
from featurization.addresses import host_of
from featurization.web import AGAIN, CUT, Progress, Refused, Web, reason_of, too_large

# Larger than any published archive, B.
MAX_FILE = 4 << 30
_PIECE = 1 << 20


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
        time.sleep(web.PAUSE * 2 ** (failures - 1))


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
