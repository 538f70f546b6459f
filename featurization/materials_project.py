"""Crystals of the Materials Project, by its own client. The only import of mp_api.

First the ids are listed, then their documents fetched some hundred at a time, so that nothing can
be missed or come twice, whatever order the server gives. The key goes to the server alone.
"""

import json
import os
import threading
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from cluster.errors import RunFailed, UserError
from cluster.files import write_text
from featurization import web
from featurization.addresses import checked_url, host_of, plain
from featurization.crystal import ATTRIBUTION
from featurization.documents import document_id
from featurization.snapshot import Snapshot, checked_name, fetched
from featurization.web import AGAIN, CUT, KeyRefused, Progress, Say, Web, reason_of

ENDPOINT = "https://api.materialsproject.org/"
# What `documents.crystal_from_document` and the tasks read.
FIELDS = (
    "material_id",
    "structure",
    "symmetry",
    "band_gap",
    "energy_above_hull",
    "bulk_modulus",
    "shear_modulus",
)
ABOUT = {
    "source": "Materials Project",
    "fields": list(FIELDS),
    "licence": "CC BY 4.0",
    "cite": ATTRIBUTION,
}
# Ids a page: the server's limit. Documents a request: an address of 3 kB, an answer of a few MB.
PAGE = 1000
CHUNK = 250
# Attempts to list: the server sorts by nothing, so that two of its pages may overlap.
_LISTINGS = 3
_KEY_LENGTH = 32
_GNOME = "gnome_r2scan_statics"  # the batch of materials that are under CC BY-NC
_WHERE = "your key stands at https://next-gen.materialsproject.org/api when you are logged in"


def fetch(
    path: Path,
    *,
    elastic: bool = False,
    chemsys: str | None = None,
    restart: bool = False,
    say: Say,
    progress: Progress,
) -> dict[str, Any]:
    """Write the documents of all materials, or of some, to `path`; returns its record.

    Deprecated materials are left out, and those of GNoME, whose licence (CC BY-NC) is another.

    Args:
        elastic: only materials with elastic moduli.
        chemsys: only those of this chemical system, such as `Li-Fe-O` or `Si-*`.

    Raises:
        UserError: no good key in MP_API_KEY, no mp-api, or `path` is something else.
        RunFailed: the server fails.
    """
    endpoint = checked_url(os.environ.get("MP_API_ENDPOINT") or ENDPOINT, "MP_API_ENDPOINT")
    endpoint = endpoint.rstrip("/") + "/"
    query = {"elastic": elastic, "chemsys": chemsys}
    request = {"source": "Materials Project", "endpoint": endpoint, "query": query}

    def work(snapshot: Snapshot) -> dict[str, Any]:
        key = _key()
        try:
            return _fetch(snapshot, endpoint, key, query, say, progress)
        except KeyRefused as error:
            raise UserError(
                f"{host_of(endpoint)} refuses the key in MP_API_KEY ({error})",
                remedy=f"{_WHERE}; if it is the same, your network may be blocked",
            ) from None

    return fetched(checked_name(path), request, work, restart=restart, say=say)


def _fetch(
    snapshot: Snapshot,
    endpoint: str,
    key: str,
    query: dict[str, Any],
    say: Say,
    progress: Progress,
) -> dict[str, Any]:
    session = Web(say, key)
    version = _version(session, endpoint)
    materials = _Materials(endpoint, key, session, query)
    listed = snapshot.folder / "ids.json"
    if listed.exists():
        known = json.loads(listed.read_bytes())
        _check_version(snapshot, known["version"], version)
        ids = known["ids"]
    else:
        ids = materials.ids()
        write_text(listed, json.dumps({"version": version, "ids": ids}))
    for start in range(snapshot.documents, len(ids), CHUNK):
        progress(start, len(ids))
        snapshot.append(materials.documents(ids[start : start + CHUNK]))
    progress(len(ids), len(ids))
    _check_version(snapshot, version, _version(session, endpoint))
    return ABOUT | {"database_version": version, "endpoint": endpoint}


def _key() -> str:
    key = os.environ.get("MP_API_KEY", "").strip()
    if not key:
        raise UserError(
            "MP_API_KEY is not set: the Materials Project answers to a key only",
            remedy=f"{_WHERE}; then export MP_API_KEY=… before the command",
        )
    if len(key) != _KEY_LENGTH or not (key.isascii() and key.isalnum()):
        raise UserError(
            f"MP_API_KEY (not shown) has {len(key)} characters; a key has {_KEY_LENGTH} letters "
            "and digits",
            remedy=f"{_WHERE}; one of the old API does not work",
        )
    return key


def _version(session: Web, endpoint: str) -> str:
    """The version of the database, a date."""
    version = session.document(f"{endpoint}heartbeat").get("db_version")
    if not isinstance(version, str) or not version:
        raise RunFailed(
            f"{host_of(endpoint)} does not name its database version",
            remedy="check MP_API_ENDPOINT; https://status.materialsproject.org says if it is up",
        )
    return plain(version, 40)


def _check_version(snapshot: Snapshot, begun: str, now: str) -> None:
    if begun != now:
        raise UserError(
            f"the database went from {begun} to {now} while {snapshot.path} was fetched: parts of "
            "two versions are no snapshot",
            remedy="give --restart to begin again",
        )


class _Materials:
    """The summary documents that a query finds."""

    def __init__(self, endpoint: str, key: str, session: Web, query: dict[str, Any]) -> None:
        try:
            from mp_api.client import MPRester
        except ImportError:
            raise UserError(
                "mp-api, the client of the Materials Project, is not installed",
                remedy="pip install 'crystal-genome[mp]'",
            ) from None
        self._key = key
        self._host = host_of(endpoint)

        def connect() -> Any:
            return MPRester(
                api_key=key,
                endpoint=endpoint,
                session=session,
                use_document_model=False,
                mute_progress_bars=True,
            ).materials.summary

        summaries = self._connected(connect)
        self._search, self._count = summaries.search, summaries.count
        # The names of the client's `search`, and of the server's own query.
        self._query: dict[str, Any] = {"deprecated": False, "include_gnome": False}
        self._criteria = {"deprecated": False, "batch_id_not_eq": _GNOME}
        if query["elastic"]:
            self._query["has_props"] = ["elasticity"]
            self._criteria["has_props"] = "elasticity"
        if query["chemsys"]:
            self._query["chemsys"] = self._criteria["chemsys"] = query["chemsys"]

    def _connected(self, connect: Callable[[], Any]) -> Any:
        """What `connect` returns: the client's first requests know no time limit and no retry."""
        for attempt in range(web.ATTEMPTS):
            made: list[Any] = []

            def run(made: list[Any] = made) -> None:
                try:
                    made.append(connect())
                except Exception as error:
                    made.append(error)

            thread = threading.Thread(target=run, daemon=True)
            with self._explained():
                thread.start()
                thread.join(sum(web.TIMEOUT))
            if made and not isinstance(made[0], Exception):
                return made[0]
            if attempt < web.ATTEMPTS - 1:
                time.sleep(web.PAUSE * 2**attempt)
        with self._explained():
            raise made[0] if made else TimeoutError("timed out")

    def ids(self) -> list[str]:
        """All ids, each once."""
        for _ in range(_LISTINGS):
            with self._explained():
                total = int(self._count(dict(self._criteria)))
            if not total:
                raise UserError(
                    f"{self._host} has no such materials", remedy="check --chemsys and --elastic"
                )
            found: list[str] = []
            for page in range(1, -(-total // PAGE) + 1):
                words: dict[str, Any] = {"fields": ["material_id"], "_page": page}
                found += [document_id(each) for each in self._asked(**words, **self._query)]
            if len(set(found)) == len(found) == total and "" not in found:
                return sorted(found)
        raise RunFailed(
            f"{self._host} announces {total:,} materials and lists {len(set(found)):,}",
            remedy="give the same command again later",
        )

    def documents(self, ids: list[str]) -> list[dict[str, Any]]:
        """The documents of some ids, in their order, with what we need of them."""
        answers = self._asked(fields=list(FIELDS), material_ids=ids, deprecated=False)
        found = {document_id(each): each for each in answers}
        if found.keys() != set(ids) or len(answers) != len(ids):
            missing = sorted(set(ids) - found.keys())
            raise RunFailed(
                f"{self._host} gives {len(answers)} documents for {len(ids)} ids"
                + (f", without {plain(missing[0], 40)}" if missing else ""),
                remedy="if it stays so, the database has changed: give --restart",
            )
        return [trimmed(found[each]) for each in ids]

    def _asked(self, **words: Any) -> list[dict[str, Any]]:
        with self._explained():
            answer = self._search(num_chunks=1, chunk_size=PAGE, all_fields=False, **words)
        if not isinstance(answer, list) or not all(isinstance(each, dict) for each in answer):
            raise RunFailed(f"{self._host} gives no documents", remedy="check MP_API_ENDPOINT")
        return answer

    @contextmanager
    def _explained(self) -> Iterator[None]:
        """What the client complains of, without its warnings, and without the key."""
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                yield
        except (UserError, RunFailed, KeyRefused):
            raise
        except (*CUT, TimeoutError) as error:
            raise RunFailed(f"{self._host}: {reason_of(error)}", remedy=f"later, {AGAIN}") from None
        except Exception as error:  # it lets those of its parsers through
            said = plain(str(error).replace(self._key, "(the key)"))
            raise RunFailed(
                f"{self._host}, as its client says: {said or type(error).__name__}",
                remedy="give the same command again; a newer mp-api may know a newer server",
            ) from None


def kept(documents: Iterable[dict[str, Any]], left_out: Counter[str]) -> Iterator[dict[str, Any]]:
    """What we need of the documents that `fetch` would take; the others are counted."""
    for document in documents:
        made = document.get("builder_meta")
        made = made if isinstance(made, dict) else {}
        if document.get("deprecated") is True:
            left_out["deprecated"] += 1
        elif made.get("license") == "BY-NC" or _GNOME in [
            e.get("batch_id") for e in (made, document)
        ]:
            left_out["of GNoME (CC BY-NC)"] += 1
        else:
            yield trimmed(document)


def trimmed(document: dict[str, Any]) -> dict[str, Any]:
    """What we need of a summary document; what is not known is left out."""
    return {name: document[name] for name in FIELDS if document.get(name) is not None}
