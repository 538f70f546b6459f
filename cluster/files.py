"""Files that are either whole or absent: temporary name, fsync, rename."""

import errno
import fcntl
import hashlib
import os
import secrets
import time
import zlib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from cluster.errors import DiskFailed, UserError

_NO_ROOM = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_OUT_OF_REACH = {errno.EIO, errno.ESTALE, errno.ENOTCONN, errno.ESHUTDOWN}


def disk_failed(error: BaseException | None) -> bool:
    """Whether it is the disk's fault: full, over quota, out of reach."""
    return isinstance(error, OSError) and error.errno in _NO_ROOM | _OUT_OF_REACH


@contextmanager
def disk_explained(folder: Path | None = None) -> Iterator[None]:
    """Turn what is the disk's fault into a `DiskFailed`.

    Args:
        folder: what to name if the error names no file.
    """
    try:
        yield
    except OSError as error:
        if not disk_failed(error):
            raise
        place = error.filename or folder or "the disk"
        mend = "make room" if error.errno in _NO_ROOM else "see to the file system"
        raise DiskFailed(
            f"cannot read or write {place}: {error.strerror}",
            remedy=f"{mend} and give the same command again; what is committed is kept",
        ) from error


def temporary_folder() -> Path:
    """TMPDIR where it can be made and used, however full it is, else /tmp."""
    wanted = Path(os.environ.get("TMPDIR") or "/tmp")
    try:
        wanted.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        return wanted if disk_failed(error) else Path("/tmp")
    return wanted if wanted.is_absolute() and os.access(wanted, os.W_OK) else Path("/tmp")


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`; on success fsync it and rename it to `path`.

    On any exception the temporary file is removed and `path` is untouched, so that a reader
    never meets half a file.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    # Processes of one number on two nodes may write the same file.
    temporary = path.with_name(f".{path.name}.{os.getpid()}-{secrets.token_hex(4)}.tmp")
    try:
        yield temporary
        sync(temporary)
        os.replace(temporary, path)
        sync(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def exclusive(folder: Path) -> Iterator[None]:
    """Hold a folder for one job, where the file system has locks; make it if it is not there.

    The lock leaves no file and ends with the process. A folder that stays empty is removed again.

    Raises:
        UserError: another job holds it.
        OSError: it cannot be made.
    """
    new = not folder.exists()
    folder.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        _lock(descriptor, folder)
        yield
    finally:
        os.close(descriptor)
        if new:
            with suppress(OSError):
                folder.rmdir()


def _lock(descriptor: int, folder: Path) -> None:
    # The last process of a job that was killed can outlive its mpiexec by a moment.
    for _ in range(100):
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except BlockingIOError:
            time.sleep(0.1)
        except OSError:
            return  # a file system without locks
    raise UserError(f"another job is at work in {folder}", remedy="wait until it ends, or end it")


def write_text(path: Path, text: str) -> None:
    """Atomically write UTF-8 text to `path`."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def sha256_of(path: Path) -> str:
    """Hex SHA-256 of a file's bytes, read in blocks."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def append_line(path: Path, text: str) -> None:
    """Append a line with its CRC-32 and fsync it; one that a crash cut short is ended first."""
    line = text.encode()
    with path.open("a+b") as stream:
        stream.seek(max(0, stream.tell() - 1))
        ending = b"" if stream.read() in (b"", b"\n") else b"\n"
        stream.write(ending + b"%08x %s\n" % (zlib.crc32(line), line))
        stream.flush()
        os.fsync(stream.fileno())


def whole_lines(path: Path) -> Iterator[str]:
    """The lines of `append_line`; those that a crash cut short or that are damaged are left out."""
    with path.open("rb") as stream:
        for line in stream:
            if line.endswith(b"\n") and line[:9] == b"%08x " % zlib.crc32(line[9:-1]):
                yield line[9:-1].decode()


def sync(path: Path) -> None:
    """Wait until a file's bytes, or a folder's names, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
