"""Crystals of any database that speaks OPTIMADE, page after page."""

import re
import time
from pathlib import Path
from typing import Any

from cluster.errors import RunFailed, UserError
from featurization.addresses import checked_url, host_of, next_url, plain
from featurization.optimade_structures import LABELS, STRUCTURE, document_of
from featurization.snapshot import Snapshot, checked_name, clear, fetched
from featurization.web import Progress, Refused, Say, Web

# Entries a page that we ask for; servers that allow fewer refuse with 403.
PAGE = 100
# The longest pause between pages, s, that a server can suggest.
_MAX_DELAY = 60.0
_LANGUAGE = 'filters read like elements HAS ALL "Si","O" AND nelements=2; see optimade.org'


def fetch(
    url: str,
    filter: str,
    path: Path,
    *,
    restart: bool = False,
    say: Say,
    progress: Progress,
) -> dict[str, Any]:
    """Write the structures that a filter finds to `path`; returns its record.

    Args:
        url: a database's base address, such as `https://optimade.materialsproject.org`.
        filter: in OPTIMADE's language; empty for all.

    Raises:
        UserError: not such an address, a filter that the server does not take, or `path` is
            something else.
        RunFailed: the server fails, or breaks the standard.
    """
    base = base_of(checked_url(url))
    request = {"source": "OPTIMADE", "url": base, "filter": filter}
    return fetched(
        checked_name(path),
        request,
        lambda snapshot: _pages(Web(say), snapshot, base, filter, say, progress),
        restart=restart,
        say=say,
    )


def base_of(url: str) -> str:
    """The versioned base address that an address belongs to."""
    base = re.sub(r"(/structures)?/*(\?.*)?$", "", url)
    return base if re.search(r"/v\d+(\.\d+)*$", base) else f"{base}/v1"


def _pages(
    web: Web, snapshot: Snapshot, base: str, filter: str, say: Say, progress: Progress
) -> dict[str, Any]:
    about = _about(web, base)
    url: str | None = f"{base}/structures"
    fields = [*STRUCTURE, *_labels_of(web, base)]
    parameters = {"response_fields": ",".join(fields), "page_limit": str(PAGE)}
    parameters |= {"filter": filter} if filter else {}
    announced = None
    if snapshot.chunks:
        url, parameters = snapshot.chunks[-1]["next"], {}
        announced = snapshot.chunks[-1]["announced"]
    seen = {id for chunk in snapshot.chunks for id in chunk["ids"]}
    asked = {chunk["next"] for chunk in snapshot.chunks}
    while url is not None:
        answer = _page(web, url, parameters)
        meta = _object(answer, "meta")
        entries = answer.get("data")
        if not isinstance(entries, list) or not all(isinstance(each, dict) for each in entries):
            raise RunFailed(f"{host_of(base)} gives no list of structures", remedy=_CHECK)
        documents = [document_of(each) for each in entries]
        ids = [each["material_id"] for each in documents]
        if "" in ids or len(set(ids)) < len(ids) or seen.intersection(ids):
            raise RunFailed(
                f"{host_of(base)} gives a structure without id, or one id twice: its pages have "
                "changed while they were read",
                remedy="give --restart to begin again",
            )
        seen.update(ids)
        total = meta.get("data_returned")
        announced = total if isinstance(total, int) else announced
        url, parameters = _next(answer, meta, url), {}
        if url in asked:
            raise RunFailed(f"{host_of(base)} leads back to a page that was read", remedy=_CHECK)
        asked.add(url)
        snapshot.append(documents, next=url, ids=ids, announced=announced)
        progress(snapshot.documents, announced or 0)
        if url is not None:
            time.sleep(_delay(meta))
    if not seen:
        clear(snapshot.folder)
        raise UserError(f"{host_of(base)} has no structure for {filter!r}", remedy=_LANGUAGE)
    if announced is not None and announced != len(seen):
        say(f"{host_of(base)} announced {announced:,} structures and gave {len(seen):,}")
    return {"source": "OPTIMADE", **about, "url": base, "filter": filter, "announced": announced}


_CHECK = "check the address: it is the base of an OPTIMADE API of version 1"


def _page(web: Web, url: str, parameters: dict[str, str]) -> dict[str, Any]:
    try:
        return web.document(url, **parameters)
    except Refused as error:
        if "HTTP 403" in error.problem and "page_limit" in parameters:
            del parameters["page_limit"]
            return _page(web, url, parameters)
        raise UserError(
            error.problem, remedy=_LANGUAGE if "filter" in parameters else _CHECK
        ) from None


def _next(answer: dict[str, Any], meta: dict[str, Any], url: str) -> str | None:
    """The address of the next page; None on the last one."""
    link = _object(answer, "links").get("next")
    if isinstance(link, dict):
        link = link.get("href")
    if not isinstance(link, str) or not link:
        if meta.get("more_data_available") is True:
            raise RunFailed(f"{host_of(url)} has more, and does not say where", remedy=_CHECK)
        return None
    return next_url(url, link)


def _about(web: Web, base: str) -> dict[str, Any]:
    """What a database says of itself: provider, licence, versions."""
    answer = web.document(f"{base}/info")
    attributes = _object(_object(answer, "data"), "attributes")
    provider = _object(_object(answer, "meta"), "provider")
    api = plain(attributes.get("api_version", ""), 20)
    if not api.startswith("1."):
        raise UserError(f"{base}/info names no OPTIMADE version 1", remedy=_CHECK)
    licence = attributes.get("available_licenses") or attributes.get("license")
    if isinstance(licence, dict):
        licence = licence.get("href")
    if isinstance(licence, list):
        licence = " or ".join(map(str, licence))
    versions = _object(_object(_object(answer, "links"), "base_url"), "meta")
    return {
        "provider": plain(provider.get("name") or host_of(base)),
        "licence": plain(licence or "not stated: ask the provider"),
        "api_version": api,
        "database_version": plain(next(iter(versions.values()), "not stated")),
    }


def _labels_of(web: Web, base: str) -> list[str]:
    """Those properties of our labels that a database has."""
    try:
        answer = web.document(f"{base}/info/structures")
    except Refused:
        return []
    there = _object(_object(answer, "data"), "properties")
    return [name for name in dict.fromkeys(words[0] for words in LABELS) if name in there]


def _delay(meta: dict[str, Any]) -> float:
    delay = meta.get("request_delay")
    return min(_MAX_DELAY, max(0.0, delay)) if isinstance(delay, int | float) else 0.0


def _object(answer: dict[str, Any], name: str) -> dict[str, Any]:
    value = answer.get(name)
    return value if isinstance(value, dict) else {}
