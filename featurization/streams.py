"""Bytes, lines and JSON elements out of files that may be compressed, huge or broken.

Everything here runs in bounded memory and has one failure: `StreamBroken`, raised after all that
could be read has been yielded.
"""

import re
import zipfile
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import BinaryIO

import numpy as np
import zstandard
from numpy.typing import NDArray

from cluster.errors import UserError

# Compressed bytes decoded at a time: at most this much before a damaged place is lost.
_BLOCK = 1 << 12
_PIECE = 1 << 20
# A longer line or JSON element is no crystal, but a missing newline or quote.
MAX_ELEMENT = 64 << 20

_ESCAPE = re.compile(rb"\\.", re.DOTALL)
_KEY = re.compile(rb'"((?:[^"\\]|\\.)*)"\s*:\s*\Z', re.DOTALL)
# What a byte does to the depth of nesting, and whether it can bound an element at all.
_STEP = np.zeros(256, dtype=np.int8)
_STEP[list(b"[{")], _STEP[list(b"]}")] = 1, -1
_MARK = _STEP != 0
_MARK[ord(",")] = True


class StreamBroken(Exception):
    """The stream cannot go on; the message says why."""


def read_pieces(path: Path) -> Iterator[bytes]:
    """Decompressed contents of a plain, `.gz`, `.zst` or `.zip` file, in pieces.

    Compression is told by the file's first bytes, not its name. A zip file must hold one file.

    Raises:
        StreamBroken: truncated, damaged or unreadable; what came before has been yielded.
    """
    try:
        with path.open("rb") as stream:
            magic = stream.read(4)
            stream.seek(0)
            if magic[:2] == b"\x1f\x8b":
                yield from _decompressed(stream, "gzip")
            elif magic == b"\x28\xb5\x2f\xfd":
                yield from _decompressed(stream, "zstd")
            elif magic[:2] == b"PK":
                with zipfile.ZipFile(stream) as archive, archive.open(zip_member(path)) as member:
                    yield from iter(lambda: member.read(_BLOCK), b"")
            else:
                yield from iter(lambda: stream.read(_PIECE), b"")
    except StreamBroken:
        raise
    except Exception as error:  # the unpackers raise a dozen kinds, struct.error among them
        raise StreamBroken(f"{type(error).__name__}: {error}") from None


def is_compressed(path: Path) -> bool:
    """Whether `read_pieces` would unpack the file; False for one that cannot be read."""
    try:
        with path.open("rb") as stream:
            return stream.read(4).startswith((b"\x1f\x8b", b"\x28\xb5\x2f\xfd", b"PK"))
    except OSError:
        return False


def zip_member(path: Path) -> str:
    """Name of the one file in a zip archive.

    Raises:
        UserError: not a zip archive, or not exactly one file in it.
    """
    remedy = "give an archive that holds one JSON file, as published, or unpack it"
    try:
        with zipfile.ZipFile(path) as archive:
            names = [name for name in archive.namelist() if not name.endswith("/")]
    except Exception as error:  # zipfile raises many kinds on a damaged directory
        raise UserError(f"{path} is not a readable zip archive: {error}", remedy=remedy) from None
    names = [name for name in names if not name.startswith("__MACOSX/")]
    if len(names) != 1:
        raise UserError(f"{path} holds {len(names)} files, not one", remedy=remedy)
    return names[0]


def _decompressed(stream: BinaryIO, kind: str) -> Iterator[bytes]:
    """Every member or frame of a gzip or zstd file; an unfinished last one breaks the stream."""
    decoder = _decoder(kind)
    started = False
    while block := stream.read(_BLOCK):
        while block:
            if decoder.eof:
                if kind == "gzip" and not block.strip(b"\0"):  # padding of tapes and disks
                    break
                decoder = _decoder(kind)
            started = True
            if piece := decoder.decompress(block):
                yield piece
            block = decoder.unused_data if decoder.eof else b""
    if started and not decoder.eof:
        raise StreamBroken(f"the {kind} data is cut off")


def _decoder(kind: str) -> "zlib._Decompress | zstandard.ZstdDecompressionObj":
    if kind == "gzip":
        return zlib.decompressobj(wbits=31)
    return zstandard.ZstdDecompressor(max_window_size=1 << 30).decompressobj()


def lines(pieces: Iterable[bytes]) -> Iterator[bytes]:
    """Lines with their line ends; an unfinished line before a break is not yielded.

    Raises:
        StreamBroken: from `pieces`, or a line is longer than 64 MiB.
    """
    rest = b""
    for piece in pieces:
        *whole, rest_of_piece = piece.split(b"\n")
        for line in whole:
            yield rest + line + b"\n"
            rest = b""
        rest += rest_of_piece
        if len(rest) > MAX_ELEMENT:
            raise StreamBroken(f"a line is longer than {MAX_ELEMENT >> 20} MiB")
    if rest:
        yield rest


def json_elements(pieces: Iterable[bytes]) -> Iterator[tuple[str, bytes]]:
    """Elements of the arrays of one large JSON document, unparsed, without holding it.

    The document is either an array, whose elements come with the key "", or an object, of whose
    array values the elements come with the key of the array. Other values are passed over.
    Brackets and strings are located, nothing else is checked: an element can be malformed.

    Raises:
        StreamBroken: from `pieces`, brackets do not match, the document is cut off or neither an
            array nor an object, or an element is longer than 64 MiB.
    """
    depth, in_string = 0, False
    wanted = 0  # elements lie at this depth: 1 in an array, 2 in an object of arrays
    key: str | None = None
    text = b""  # since the last bracket or comma that bounds an element
    for piece in _with_whole_escapes(pieces):
        if not wanted:
            piece = (text + piece).removeprefix(b"\xef\xbb\xbf").lstrip()
            text = piece
            if not piece:
                continue
            if piece[:1] not in (b"[", b"{"):
                raise StreamBroken("the document is neither a JSON array nor an object")
            wanted, text = (1 if piece[:1] == b"[" else 2), b""
        positions, depths, in_string = _marks(piece, depth, in_string)
        step = _STEP[np.frombuffer(piece, np.uint8)[positions]]
        bounds = (depths < wanted) | ((depths == wanted) & (step >= 0))
        start = 0
        for position, level in zip(
            positions[bounds].tolist(), depths[bounds].tolist(), strict=True
        ):
            text += piece[start:position]
            start = position + 1
            mark = piece[position : position + 1]
            if mark in (b"[", b"{"):
                key = _key(text) if mark == b"[" and level == wanted else None
            elif key is not None and (mark == b"," or text.strip()):
                yield key, text.strip()
            if mark in (b"]", b"}"):
                key = None
                if level <= 0:
                    return
            text = b""
        text += piece[start:]
        depth = int(depths[-1]) if len(depths) else depth
        if len(text) > MAX_ELEMENT:
            raise StreamBroken(f"an element is longer than {MAX_ELEMENT >> 20} MiB")
    if wanted:
        raise StreamBroken("the JSON document is cut off")


def _marks(
    piece: bytes, depth: int, in_string: bool
) -> tuple[NDArray[np.int64], NDArray[np.int64], bool]:
    """Positions of brackets and commas outside strings, the depth after each, string state."""
    plain = _ESCAPE.sub(b"__", piece) if b"\\" in piece else piece
    codes = np.frombuffer(plain, np.uint8)
    quotes = np.flatnonzero(codes == ord('"'))
    positions = np.flatnonzero(_MARK[codes])
    outside = (np.searchsorted(quotes, positions) + in_string) % 2 == 0
    positions = positions[outside]
    depths = depth + np.cumsum(_STEP[codes[positions]], dtype=np.int64)
    return positions, depths, bool((len(quotes) + in_string) % 2)


def _with_whole_escapes(pieces: Iterable[bytes]) -> Iterator[bytes]:
    """The same bytes, cut so that no piece ends within a backslash escape."""
    rest = b""
    for piece in pieces:
        piece = rest + piece
        odd = (len(piece) - len(piece.rstrip(b"\\"))) % 2
        rest = piece[len(piece) - odd :]
        yield piece[: len(piece) - odd]


def _key(text: bytes) -> str:
    """The key that ends `text`; "" where an array has none."""
    match = _KEY.search(text)
    return match[1].decode("utf-8", "replace") if match else ""
