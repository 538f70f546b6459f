"""Databases on the loopback network, as real HTTP servers: what they answer, and how they fail.

Shapes are those of the documentation: of the Materials Project, emmet-api's resources and
mp-api's client; of OPTIMADE, its specification 1.2; figshare redirects a download to a storage
host that knows ranges.
"""

import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, urlencode, urlsplit

from tiny import document

KEY = "abcdefghijklmnopqrstuvwxyz012345"


class Answer:
    """A status, a body (JSON unless it is bytes), headers."""

    def __init__(self, body: Any = None, status: int = 200, **headers: str) -> None:
        self.status = status
        self.body = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.headers = {name.replace("_", "-"): value for name, value in headers.items()}


class Server:
    """A server of one database; `faults` happen to its next answers, in order."""

    def __init__(self, reply: Callable[["Server", Any], Answer]) -> None:
        self.faults: list[Callable[[Answer], Any]] = []
        self.asked: list[str] = []
        self.keys: list[str | None] = []
        self.url = ""
        self.reply = reply
        self.pause = 0.0  # before each answer, s


def truncated(answer: Answer) -> None:
    """Half a body under the length of the whole."""
    answer.headers["content-length"] = str(len(answer.body))
    answer.body = answer.body[: len(answer.body) // 2]


def busy(after: str | None = "0") -> Callable[[Answer], None]:
    def fault(answer: Answer) -> None:
        answer.status, answer.body = 429, b"slow down"
        if after is not None:
            answer.headers["retry-after"] = after

    return fault


def broken(answer: Answer) -> None:
    answer.status, answer.body = 500, b"<html>Internal Server Error</html>"


def garbage(answer: Answer) -> None:
    answer.body = b"<html>maintenance \x1b[31m</html>"


def fine(answer: Answer) -> None:
    """No fault."""


@contextmanager
def serving(reply: Callable[[Server, Any], Answer]) -> Iterator[Server]:
    server = Server(reply)

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        disable_nagle_algorithm = True  # or each answer takes 40 ms

        def do_GET(self) -> None:
            server.asked.append(self.path)
            server.keys.append(self.headers["x-api-key"])
            time.sleep(server.pause)
            answer = server.reply(server, self)
            if server.faults:
                server.faults.pop(0)(answer)
            self.send_response(answer.status)
            for name, value in ({"content-length": str(len(answer.body))} | answer.headers).items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(answer.body)
            if int(answer.headers.get("content-length", 0)) > len(answer.body):
                self.close_connection = True

        def log_message(self, *words: Any) -> None:
            pass

    class Quiet(ThreadingHTTPServer):
        daemon_threads = True

        def handle_error(self, request: Any, client_address: Any) -> None:
            """Clients that are killed."""

    httpd = Quiet(("127.0.0.1", 0), Handler)
    server.url = f"http://127.0.0.1:{httpd.server_port}"
    thread = threading.Thread(target=httpd.serve_forever, args=(0.01,))
    thread.start()
    try:
        yield server
    finally:
        httpd.shutdown()
        httpd.server_close()
        thread.join()


def materials(count: int) -> list[dict[str, Any]]:
    """Summary documents, of which every third has elastic moduli; with fields nobody needs."""
    return [
        document(
            f"mp-{number}",
            4.0 + number / 100,
            formula_pretty="CsCl",
            chemsys="Cl-Cs",
            symmetry={"crystal_system": "Cubic", "symbol": "Pm-3m", "number": 221},
            band_gap=number / 10,
            energy_above_hull=0.0,
            bulk_modulus={"voigt": 20.0, "reuss": 20.0, "vrh": 20.0} if number % 3 == 0 else None,
            shear_modulus={"voigt": 9.0, "reuss": 7.0, "vrh": 8.0} if number % 3 == 0 else None,
            deprecated=False,
            last_updated="2025-09-25T00:00:00",
        )
        for number in range(1, count + 1)
    ]


def materials_project(
    documents: list[dict[str, Any]], versions: list[str] | None = None
) -> Callable[[Server, Any], Answer]:
    """The API of the Materials Project; each heartbeat tells the next version, then the last."""
    told = versions or ["2025.09.25"]

    def reply(server: Server, request: Any) -> Answer:
        parts = urlsplit(request.path)
        query = {name: values[0] for name, values in parse_qs(parts.query).items()}
        if parts.path == "/heartbeat":
            version = told.pop(0) if len(told) > 1 else told[0]
            return Answer(
                {
                    "status": "OK",
                    "time": "2025-11-25T09:00:00.000000",
                    "version": "0.87.1",
                    "pymatgen": "2025.10.7",
                    "db_version": version,
                    "suffix": version.replace(".", "_"),
                    "access_controlled_batch_ids": ["gnome_r2scan_statics"],
                }
            )
        if parts.path != "/materials/summary/":
            return Answer({"detail": "Not Found"}, 404)
        key = request.headers["x-api-key"]
        if key != KEY:
            # An echo of the key, which must not come out at the other end.
            return Answer({"message": f"Invalid authentication credentials: {key}"}, 401)
        assert query["deprecated"] == "False"
        found = documents
        if "material_ids" in query:
            wanted = query["material_ids"].split(",")
            found = [each for each in documents if each["material_id"] in wanted]
        else:
            assert query["batch_id_not_eq"] == "gnome_r2scan_statics"
        if query.get("has_props") == "elasticity":
            found = [each for each in found if each["bulk_modulus"]]
        if "chemsys" in query:
            found = [each for each in found if each["chemsys"] == query["chemsys"]]
        limit = int(query.get("_limit", 100))
        skip = int(query.get("_skip", 0))
        if "_page" in query:
            limit = int(query.get("_per_page", 100))
            skip = (int(query["_page"]) - 1) * limit
        fields = query.get("_fields", "material_id").split(",")
        data = [{name: each.get(name) for name in fields} for each in found[skip : skip + limit]]
        meta = {"api_version": "0.87.1", "total_doc": len(found), "max_limit": 1000}
        return Answer({"data": data, "meta": meta})

    return reply


def entry(number: int, **attributes: Any) -> dict[str, Any]:
    """An OPTIMADE structure of cesium chloride."""
    a = 4.0 + number / 100
    return {
        "type": "structures",
        "id": f"db/{number}",
        "attributes": {
            "lattice_vectors": [[a, 0, 0], [0, a, 0], [0, 0, a]],
            "cartesian_site_positions": [[0, 0, 0], [a / 2, a / 2, a / 2]],
            "species_at_sites": ["Cs", "Cl"],
            "species": [
                {"name": name, "chemical_symbols": [name], "concentration": [1.0]}
                for name in ("Cs", "Cl")
            ],
            "structure_features": [],
            "dimension_types": [1, 1, 1],
            "_oqmd_band_gap": number / 10,
            "_oqmd_stability": -0.01,
        }
        | attributes,
    }


def optimade(
    entries: list[dict[str, Any]], largest: int = 500, **meta: Any
) -> Callable[[Server, Any], Answer]:
    """A database that speaks OPTIMADE, with pages by offset; `meta` is added to that of pages."""

    def reply(server: Server, request: Any) -> Answer:
        parts = urlsplit(request.path)
        query = {name: values[0] for name, values in parse_qs(parts.query).items()}
        about = {
            "api_version": "1.2.0",
            "provider": {"name": "OQMD", "description": "…", "prefix": "oqmd"},
        }
        if parts.path == "/optimade/v1/info":
            attributes = {"api_version": "1.2.0", "available_licenses": ["CC-BY-4.0"]}
            link = {"href": server.url, "meta": {"_oqmd_db_version": "1.7"}}
            return Answer(
                {
                    "data": {"type": "info", "id": "/", "attributes": attributes},
                    "meta": about,
                    "links": {"base_url": link},
                }
            )
        if parts.path == "/optimade/v1/info/structures":
            names = [*entries[0]["attributes"], "_oqmd_delta_e"] if entries else []
            return Answer({"data": {"properties": {name: {} for name in names}}, "meta": about})
        if parts.path != "/optimade/v1/structures":
            return Answer({"errors": [{"detail": "Not Found"}], "meta": about}, 404)
        limit, offset = (
            int(query.get("page_limit", min(10, largest))),
            int(query.get("page_offset", 0)),
        )
        if limit > largest:
            return Answer({"errors": [{"detail": f"Max allowed page_limit is {largest}"}]}, 403)
        if "(" in query.get("filter", ""):
            said = [{"status": "400", "title": "Bad Request", "detail": "cannot parse \x1b[2J"}]
            return Answer({"errors": said, "meta": about}, 400)
        fields = query["response_fields"].split(",")
        data = [
            each | {"attributes": {k: v for k, v in each["attributes"].items() if k in fields}}
            for each in entries[offset : offset + limit]
        ]
        more = offset + limit < len(entries)
        again = urlencode(query | {"page_offset": offset + limit, "page_limit": limit})
        link = {"href": f"{server.url}/optimade/v1/structures?{again}"} if more else None
        counts = {"data_returned": len(entries), "more_data_available": more}
        return Answer({"data": data, "links": {"next": link}, "meta": about | counts | meta})

    return reply


def archive(content: bytes, ranges: bool = True) -> Callable[[Server, Any], Answer]:
    """A file behind a redirect, as figshare gives it; with or without ranges."""

    def reply(server: Server, request: Any) -> Answer:
        if request.path == "/files/1":
            return Answer(b"", 302, location=f"{server.url}/storage/1?signature=x")
        wanted = request.headers["range"]
        if wanted and ranges:
            start = int(wanted.removeprefix("bytes=").removesuffix("-"))
            if start >= len(content):
                return Answer(b"", 416, content_range=f"bytes */{len(content)}")
            span = f"bytes {start}-{len(content) - 1}/{len(content)}"
            return Answer(content[start:], 206, content_range=span)
        return Answer(content)

    return reply
