"""Fetching: whatever servers, disks and signals do, a file is whole and right, or not there."""

import gzip
import hashlib
import json
import os
import re
import signal
import ssl
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import databases
import numpy as np
import pytest
import requests
from databases import KEY, Answer, archive, entry, materials, materials_project, optimade, serving
from pymatgen.core import Lattice, Structure
from tiny import ROOT, command, document, forked, write_lines

from cluster.errors import RunFailed, UserError
from featurization import by_hand, download, published, web
from featurization import materials_project as mp
from featurization import optimade as om
from featurization.addresses import checked_url, next_url
from featurization.by_hand import convert, summaries
from featurization.crystal import Reject
from featurization.optimade_structures import document_of
from featurization.snapshot import record_of
from featurization.sources import open_source
from featurization.web import Web

QUIET: dict[str, Any] = {"say": lambda text: None, "progress": lambda done, total: None}


@pytest.fixture(autouse=True)
def hasty(monkeypatch: pytest.MonkeyPatch) -> None:
    """No pauses but those that a server asks for, small pages, no proxies, no key."""
    monkeypatch.setattr(web, "PAUSE", 0.0)
    monkeypatch.setattr(om, "PAGE", 5)
    monkeypatch.setattr(mp, "PAGE", 10)
    monkeypatch.setattr(mp, "CHUNK", 7)
    monkeypatch.setattr(by_hand, "CHUNK", 7)
    monkeypatch.setenv("NO_PROXY", "*")
    monkeypatch.setenv("COLUMNS", "80")
    for name in ("MP_API_KEY", "MP_API_ENDPOINT"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture(scope="session")
def fields() -> list[str]:
    """What summary documents have; the client works that out anew, for 40 ms, at each request."""
    from mp_api.client.routes.materials.summary import SummaryDoc

    return list(SummaryDoc.model_fields)


@pytest.fixture
def project(monkeypatch: pytest.MonkeyPatch, fields: list[str]):
    """Starts a Materials Project and gives the user its key."""
    monkeypatch.setattr(
        "mp_api.client.routes.materials.summary.SummaryRester.available_fields", fields
    )
    with serving(lambda server, request: server.project(server, request)) as server:
        server.project = materials_project(materials(25))
        monkeypatch.setenv("MP_API_ENDPOINT", server.url)
        monkeypatch.setenv("MP_API_KEY", KEY)
        yield server


def documents(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in gzip.decompress(path.read_bytes()).splitlines()]


def record(path: Path) -> dict[str, Any]:
    return json.loads(record_of(path).read_bytes())


def crystals(path: Path) -> list[Any]:
    source = open_source(str(path))
    return [source.parse(each) for each in source.records()]


def left(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


# --- the Materials Project -----------------------------------------------------------------------


def test_materials_project_comes_whole_through_all_failures(project, tmp_path, monkeypatch, capsys):
    project.faults = [databases.fine, databases.broken, databases.busy(), databases.garbage]
    project.faults += 4 * [databases.fine, databases.truncated]
    out = tmp_path / "mp.jsonl.gz"
    assert command(monkeypatch, "fetch", "mp", out) == 0
    assert not project.faults
    expected = {each["material_id"]: mp.trimmed(each) for each in materials(25)}
    assert documents(out) == [expected[id] for id in sorted(expected)]
    told = record(out)
    assert told["database_version"] == "2025.09.25"
    assert told["documents"] == 25
    assert told["labels"]["bulk_modulus"] == told["labels"]["shear_modulus"] == 8
    assert told["sha256"] == hashlib.sha256(out.read_bytes()).hexdigest()
    assert told["licence"] == "CC BY 4.0"
    assert left(tmp_path) == ["mp.jsonl.gz", "mp.jsonl.gz.snapshot.json"]
    found = {each.id: each.labels for each in crystals(out)}
    assert found["mp-3"] == {
        "band_gap": 0.3,
        "energy_above_hull": 0.0,
        "bulk_modulus": 20.0,
        "shear_modulus": 8.0,
    }
    assert "bulk_modulus" not in found["mp-4"]
    # Again: nothing to do, and nobody is asked.
    asked = len(project.asked)
    assert command(monkeypatch, "fetch", "mp", out, "--json") == 0
    assert len(project.asked) == asked
    assert json.loads(capsys.readouterr().out.split("DATASET\n")[1]) == told
    # Another question does not overwrite it.
    assert command(monkeypatch, "fetch", "mp", out, "--elastic") == 2
    assert "is there already, and is not this" in capsys.readouterr().err
    assert record(out) == told


def test_only_what_is_asked_for(project, tmp_path):
    project.project = materials_project(
        [
            *materials(25),
            *({**each, "material_id": "mp-99", "chemsys": "Si"} for each in materials(1)),
        ]
    )
    out = tmp_path / "elastic.jsonl.gz"
    mp.fetch(out, elastic=True, chemsys="Cl-Cs", **QUIET)
    assert {each["material_id"] for each in documents(out)} == {f"mp-{3 * n}" for n in range(1, 9)}
    with pytest.raises(UserError, match="no such materials"):
        mp.fetch(tmp_path / "none.jsonl.gz", chemsys="Xe", **QUIET)
    assert not (tmp_path / "none.jsonl.gz.partial").exists()


@pytest.mark.parametrize(
    ("key", "said"),
    [
        (None, "MP_API_KEY is not set"),
        ("", "MP_API_KEY is not set"),
        ("tooshort", "(not shown) has 8 characters; a key has 32"),
        ("wrong" * 6 + "12", "refuses the key in MP_API_KEY (HTTP 401)"),
        ("wrong\nheader: injected, 32 chars", "(not shown) has 32 characters; a key has 32"),
    ],
)
@pytest.mark.parametrize("debug", [[], ["--debug"]])
def test_a_bad_key_is_explained_and_never_shown(
    project, tmp_path, monkeypatch, capfd, caplog, key, said, debug
):
    monkeypatch.setenv("MP_API_KEY", key or "")
    if key is None:
        monkeypatch.delenv("MP_API_KEY")
    monkeypatch.setenv("PYTHONUNBUFFERED", "1")
    assert command(monkeypatch, "fetch", "mp", tmp_path / "a.jsonl.gz", *debug) == 2
    output = capfd.readouterr()
    text = output.out + output.err
    assert ("Traceback" in text) == bool(debug)
    assert said in " ".join(text.split())
    assert "materialsproject.org/api" in text
    assert not key or key not in text + caplog.text
    assert left(tmp_path) == []


def test_the_key_is_in_no_file_and_goes_nowhere_else(project, tmp_path, monkeypatch, capfd):
    assert command(monkeypatch, "fetch", "mp", tmp_path / "good.jsonl") == 0
    assert set(project.keys) == {None, KEY}  # the client's own heartbeats have none
    with serving(lambda server, request: Answer({"data": [], "meta": {"total_doc": 1}})) as thief:
        for status in (301, 302, 307, 308):
            project.project = lambda server, request, status=status: (
                materials_project([])(server, request)
                if "heartbeat" in request.path
                else Answer({}, status, location=thief.url + "/materials/summary/")
            )
            assert command(monkeypatch, "fetch", "mp", tmp_path / "stolen.jsonl") == 1
        assert thief.asked == []
    output = capfd.readouterr()
    assert "where the key must not go" in output.err
    assert KEY not in output.out + output.err
    assert not any(KEY.encode() in path.read_bytes() for path in tmp_path.rglob("*.*"))


@pytest.mark.parametrize("status", [301, 400, 404, 418, 422, 451])
@pytest.mark.parametrize("from_the_first", [True, False])
def test_a_refusal_that_echoes_the_key_is_redacted(
    project, tmp_path, monkeypatch, capfd, status, from_the_first
):
    good = materials_project(materials(3))
    project.project = lambda server, request: (
        good(server, request)
        if "heartbeat" in request.path and not from_the_first
        else Answer({"detail": f"bad {request.headers['x-api-key']}\x1b[2J"}, status)
    )
    assert command(monkeypatch, "fetch", "mp", tmp_path / "a.jsonl") == 1
    output = capfd.readouterr()
    if from_the_first:  # later, the client may have words of its own
        assert "bad (the key)" in " ".join(output.err.split())
    assert KEY not in output.out + output.err
    assert "\x1b[2J" not in output.err
    assert left(tmp_path) == []


def test_a_version_that_echoes_the_key_brings_it_into_no_file(project, tmp_path):
    def echoes(server, request):
        key = request.headers["x-api-key"]
        return materials_project(materials(3), [f"1 of {key}"])(server, request)

    project.project = echoes
    mp.fetch(tmp_path / "a.jsonl", **QUIET)
    assert record(tmp_path / "a.jsonl")["database_version"] == "1 of (the key)"
    assert not any(KEY.encode() in path.read_bytes() for path in tmp_path.rglob("*.*"))


def test_a_database_that_changes_is_no_snapshot(project, tmp_path):
    out = tmp_path / "a.jsonl.gz"
    # Ours and the client's two heartbeats before, ours after.
    project.project = materials_project(materials(25), 3 * ["2025.09.25"] + ["2025.11.01"])
    with pytest.raises(UserError, match=r"from 2025\.09\.25 to 2025\.11\.01 while"):
        mp.fetch(out, **QUIET)
    with pytest.raises(UserError, match=r"from 2025\.09\.25 to 2025\.11\.01 while"):
        mp.fetch(out, **QUIET)
    assert not out.exists()
    mp.fetch(out, restart=True, **QUIET)
    assert record(out)["database_version"] == "2025.11.01"


def test_pages_that_overlap_are_noticed(project, tmp_path):
    twice = materials(25)
    twice[11] = twice[3]
    project.project = materials_project(twice)
    with pytest.raises(RunFailed, match="announces 25 materials and lists 24"):
        mp.fetch(tmp_path / "a.jsonl.gz", **QUIET)


def test_the_client_does_not_wait_forever(project, tmp_path, monkeypatch):
    monkeypatch.setattr(web, "TIMEOUT", (0.1, 0.3))
    good, heartbeats = materials_project(materials(3)), []

    def stalls_at_the_second_heartbeat(server, request):
        heartbeats.extend(["heartbeat"] * ("heartbeat" in request.path))
        if len(heartbeats) == 2:
            heartbeats.append("stalled")
            time.sleep(1.5)
        return good(server, request)

    project.project = stalls_at_the_second_heartbeat
    mp.fetch(tmp_path / "a.jsonl.gz", **QUIET)
    assert "stalled" in heartbeats
    assert len(documents(tmp_path / "a.jsonl.gz")) == 3


def test_a_server_that_goes_away_is_told_in_words(project, tmp_path, monkeypatch):
    there = mp._Materials
    elsewhere = "http://127.0.0.1:1/"
    monkeypatch.setattr(mp, "_Materials", lambda _, *rest: there(elsewhere, *rest))
    with pytest.raises(RunFailed, match=r"^127\.0\.0\.1:1: no connection\n.*later, give the same"):
        mp.fetch(tmp_path / "a.jsonl.gz", **QUIET)


def test_without_the_client(project, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "mp_api.client", None)
    with pytest.raises(UserError, match=r"pip install 'crystal-genome\[mp\]'"):
        mp.fetch(tmp_path / "a.jsonl.gz", **QUIET)


# --- OPTIMADE ------------------------------------------------------------------------------------


def test_optimade_comes_whole_through_all_failures(tmp_path, monkeypatch, capsys):
    entries = [entry(n) for n in range(1, 24)]
    with serving(optimade(entries, request_delay=0.001)) as server:
        server.faults = [databases.busy(), databases.broken, databases.garbage]
        server.faults += 4 * [databases.fine, databases.truncated]
        out = tmp_path / "o.jsonl.gz"
        url = f"{server.url}/optimade"
        assert command(monkeypatch, "fetch", "optimade", url, "nelements=2", out) == 0
    assert not server.faults
    assert [each.id for each in crystals(out)] == [f"db/{n}" for n in range(1, 24)]
    assert crystals(out)[2].labels == {"band_gap": 0.3, "energy_above_hull": -0.01}
    told = record(out)
    assert told["provider"] == "OQMD"
    assert told["database_version"] == "1.7"
    assert told["licence"] == "CC-BY-4.0"
    assert told["documents"] == told["announced"] == 23
    assert "_oqmd_delta_e" not in "".join(server.asked)
    assert left(tmp_path) == ["o.jsonl.gz", "o.jsonl.gz.snapshot.json"]


@pytest.mark.parametrize("tail", ["", "/", "/v1", "/v1/", "/v1/structures", "/v1/structures?x=1"])
def test_any_form_of_the_address(tail):
    assert om.base_of("https://x.org/optimade" + tail) == "https://x.org/optimade/v1"


def test_small_pages_where_the_server_wants_them(tmp_path):
    with serving(optimade([entry(n) for n in range(1, 4)], largest=4)) as server:
        om.fetch(f"{server.url}/optimade", "", tmp_path / "a.jsonl.gz", **QUIET)
    assert len(documents(tmp_path / "a.jsonl.gz")) == 3


@pytest.mark.parametrize(
    ("filter", "entries", "meta", "error", "said"),
    [
        ("(", [entry(1)], {}, UserError, r"HTTP 400: cannot parse \[2J"),
        ("", [], {}, UserError, "has no structure for ''"),
        ("", [entry(1), entry(1)], {}, RunFailed, "one id twice"),
        ("", [entry(1) | {"id": None}], {}, RunFailed, "a structure without id"),
        ("", [entry(1)], {"more_data_available": True}, RunFailed, "does not say where"),
        ("", [entry(n % 6) for n in range(7)], {}, RunFailed, "one id twice"),
    ],
)
def test_a_database_that_breaks_its_word(tmp_path, filter, entries, meta, error, said):
    with serving(optimade(entries, **meta)) as server, pytest.raises(error, match=said):
        om.fetch(f"{server.url}/optimade", filter, tmp_path / "a.jsonl.gz", **QUIET)
    assert not (tmp_path / "a.jsonl.gz").exists()
    # What was wrong with the request leaves nothing that the next one would meet.
    assert error is RunFailed or left(tmp_path) == []


def test_a_database_that_gives_fewer_than_announced_says_so(tmp_path):
    told: list[str] = []
    with serving(optimade([entry(1), entry(2)], data_returned=3)) as server:
        quiet = QUIET | {"say": told.append}
        om.fetch(f"{server.url}/optimade", "", tmp_path / "a.jsonl.gz", **quiet)
    assert "announced 3 structures and gave 2" in told[0]
    assert record(tmp_path / "a.jsonl.gz")["announced"] == 3


@pytest.mark.parametrize("link", ["http://[::1", "https://a.org:99999/x", "https://a.org:b/x"])
def test_a_link_that_is_no_address_is_the_servers_fault(link):
    with pytest.raises(RunFailed, match=r"a\.org continues at .*, which is no address"):
        next_url("https://a.org/v1/structures", link)


def test_links_lead_to_the_same_server_only():
    base = "https://db.org/v1/structures?page_offset=0"
    for link in (
        "https://db.org/v1/structures?page_offset=5",
        "http://db.org/v1/structures?page_offset=5",  # behind a proxy that ends TLS
        "http://db.org:8080/v1/structures?page_offset=5",
        "/v1/structures?page_offset=5",
        "?page_offset=5",
    ):
        assert next_url(base, link) == "https://db.org/v1/structures?page_offset=5"
    for link in ("https://evil.org/v1", "https://db.org:8443/v1", "//evil.org/", "file:///etc/x"):
        with pytest.raises(RunFailed, match="another server"):
            next_url(base, link)


def test_structures_are_those_of_pymatgen():
    rng = np.random.default_rng(7)
    lattice = rng.normal(size=(3, 3)) + 5 * np.eye(3)
    places = rng.uniform(-9, 9, size=(4, 3))
    mixed = {
        "name": "M",
        "chemical_symbols": ["Fe", "Ni", "vacancy"],
        "concentration": [0.5, 0.2, 0.3],
    }
    plain = {"name": "O1", "chemical_symbols": ["O"], "concentration": [1.0]}
    empty = {"name": "V", "chemical_symbols": ["vacancy"], "concentration": [1.0]}
    found = document_of(
        entry(
            1,
            lattice_vectors=lattice.tolist(),
            cartesian_site_positions=places.tolist(),
            species_at_sites=["M", "O1", "V", "O1"],
            species=[mixed, plain, empty],
        )
    )
    expected = Structure(
        Lattice(lattice),
        [{"Fe": 0.5, "Ni": 0.2}, "O", "O"],
        places[[0, 1, 3]],
        coords_are_cartesian=True,
    )
    read = Structure.from_dict(found["structure"] | {"charge": 0})
    assert read.composition == expected.composition
    np.testing.assert_allclose(read.lattice.matrix, expected.lattice.matrix)
    np.testing.assert_allclose(read.cart_coords, expected.cart_coords, atol=1e-12)


@pytest.mark.parametrize(
    "wrong",
    [
        {"lattice_vectors": None},
        {"lattice_vectors": [[4, 0, 0], [0, 4, 0], [None, None, None]]},
        {"lattice_vectors": [[1, 0, 0], [1, 0, 0], [0, 0, 1]]},
        {"dimension_types": [1, 1, 0]},
        {"structure_features": ["implicit_atoms"]},
        {"structure_features": ["site_attachments"]},
        {"species_at_sites": ["Cs"]},
        {"species": [{"name": "Cs", "chemical_symbols": ["Cs"], "concentration": [1, 2]}]},
        {"cartesian_site_positions": "none"},
    ],
)
def test_what_is_no_crystal_is_rejected_by_name(tmp_path, wrong):
    path = write_lines(tmp_path / "a.jsonl", [document_of(entry(1, **wrong))])
    source = open_source(str(path))
    (one,) = source.records()
    assert one.id == "db/1"
    with pytest.raises(Reject, match=r"neither a `structure`|lattice component nan"):
        source.parse(one)


def test_jarvis_has_placeholders_and_the_materials_project_objects():
    found = document_of(
        entry(
            1,
            _oqmd_band_gap=None,
            _oqmd_stability=None,
            _jarvis_bulk_modulus_kv=-99999,
            _jarvis_optb88vdw_bandgap=1.5,
            _mp_stability={"gga_gga+u": {"energy_above_hull": 0.2}, "r2scan": None},
        )
    )
    assert found["band_gap"] == 1.5
    assert found["energy_above_hull"] == 0.2
    assert "bulk_modulus" not in found


# --- archives ------------------------------------------------------------------------------------

TABLE = gzip.compress(
    json.dumps(
        {
            "index": ["mb-1", "mb-2"],
            "columns": ["structure", "log10(K_VRH)"],
            "data": [[document("x")["structure"], 1.5], [document("y", 4.5)["structure"], 2.0]],
        }
    ).encode()
)


@pytest.fixture
def task(monkeypatch: pytest.MonkeyPatch) -> str:
    """A task of Matbench whose published checksum is that of `TABLE`."""
    import dataclasses

    known = published.MATBENCH["log_kvrh"]
    small = dataclasses.replace(known, sha256=hashlib.sha256(TABLE).hexdigest(), structures=2)
    monkeypatch.setitem(published.MATBENCH, "log_kvrh", small)
    return "log_kvrh"


@pytest.mark.parametrize("ranges", [True, False])
def test_an_archive_goes_on_where_it_was_cut(task, tmp_path, monkeypatch, capsys, ranges):
    with serving(archive(TABLE, ranges)) as server:
        url = f"{server.url}/files/1"
        server.faults = [databases.fine, databases.truncated, databases.busy(), databases.broken]
        if not ranges:  # or it would never end
            server.faults += [databases.fine]
        assert command(monkeypatch, "fetch", "matbench", task, tmp_path, "--url", url) == 0
    path = tmp_path / "matbench_log_kvrh.json.gz"
    said = capsys.readouterr()
    assert "broken: IncompleteRead" in said.err or "cut short; again in" in said.err
    assert f"of {len(TABLE):,} in " in said.err
    assert f"SHA-256: {hashlib.sha256(TABLE).hexdigest()}\n" in said.out
    assert path.read_bytes() == TABLE
    found = crystals(path)
    assert [round(each.labels["bulk_modulus"], 3) for each in found] == [31.623, 100.0]
    assert record(path)["url"] == url
    assert left(tmp_path) == [path.name, path.name + ".snapshot.json"]


@pytest.mark.parametrize("known", ["task", "dataset"])
def test_a_name_that_no_archive_has_is_told_what_there_is(known, monkeypatch, capsys):
    verb, what = {"task": ("matbench", "Matbench"), "dataset": ("jarvis", "JARVIS")}[known]
    assert command(monkeypatch, "fetch", verb, "steels") == 2
    said = capsys.readouterr().err
    assert f"'steels' is no {known} of {what} that has structures" in said
    assert next(iter({"task": published.MATBENCH, "dataset": published.JARVIS}[known])) in said


def test_a_finished_fetch_given_again_says_that_it_is_there(task, tmp_path, monkeypatch, capsys):
    given = tmp_path / "download.gz"
    given.write_bytes(TABLE)
    words = ("fetch", "matbench", task, tmp_path / "out", "--from", given)
    assert command(monkeypatch, *words) == 0
    assert "there already" not in capsys.readouterr().err
    assert command(monkeypatch, *words) == 0
    said = capsys.readouterr().err
    assert "matbench_log_kvrh.json.gz is there already" in said
    assert "0 in 0.0 min" not in said


def test_an_archive_that_is_another_file_is_not_kept(task, tmp_path, monkeypatch, capsys):
    with serving(archive(TABLE[:-1] + b"!")) as server:
        words = ("fetch", "matbench", task, tmp_path, "--url", f"{server.url}/files/1")
        assert command(monkeypatch, *words) == 1
    said = capsys.readouterr().err
    assert hashlib.sha256(TABLE).hexdigest() in said
    assert f"{len(TABLE)} bytes" in said
    assert left(tmp_path) == []


def test_a_firewall_in_place_of_an_archive(task, tmp_path, monkeypatch, capsys):
    with serving(lambda server, request: Answer(b"", 202)) as server:
        words = ("fetch", "matbench", task, tmp_path, "--url", f"{server.url}/files/1")
        assert command(monkeypatch, *words) == 1
    said = capsys.readouterr().err
    assert "answers HTTP 202 in place of the file" in said
    assert "--from FILE" in said
    assert left(tmp_path) == []


def test_an_archive_by_hand_is_checked(task, tmp_path, monkeypatch, capsys):
    given, out = tmp_path / "download (1).gz", tmp_path / "out"
    given.write_bytes(TABLE[:-1])
    assert command(monkeypatch, "fetch", "matbench", task, out, "--from", given) == 2
    assert "is not matbench_log_kvrh.json.gz as published" in capsys.readouterr().err
    assert not out.exists() or left(out) == []
    given.write_bytes(TABLE)
    assert command(monkeypatch, "fetch", "matbench", task, out, "--from", given) == 0
    assert (out / "matbench_log_kvrh.json.gz").read_bytes() == TABLE
    assert command(monkeypatch, "fetch", "matbench", task, out, "--from", tmp_path / "no") == 2


def half(content: bytes, task: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """What a command leaves that got half of a file and then nothing more."""
    with serving(archive(content)) as server:
        server.faults = [databases.fine, databases.truncated]
        server.faults += 2 * web.ATTEMPTS * [databases.broken]
        words = ("fetch", "matbench", task, folder, "--url", f"{server.url}/files/1")
        assert command(monkeypatch, *words) == 1
    part = folder / "matbench_log_kvrh.json.gz.partial" / "data"
    assert 0 < part.stat().st_size < len(content)
    return part


@pytest.mark.parametrize(
    ("span", "asked"),
    [
        (lambda start: f"bytes {start}-{len(TABLE) - 1}/*", 1),
        (lambda start: f"bytes {start - 1}-{len(TABLE) - 1}/{len(TABLE)}", 2),
        (lambda start: "", 2),
    ],
)
def test_a_server_with_its_own_way_of_ranges_gives_the_file(
    task, tmp_path, monkeypatch, span, asked
):
    half(TABLE, task, tmp_path, monkeypatch)

    def reply(server, request):
        if not request.headers["range"]:
            return Answer(TABLE)
        start = int(request.headers["range"].removeprefix("bytes=").removesuffix("-"))
        return Answer(TABLE[start:], 206, content_range=span(start))

    with serving(reply) as server:
        words = ("fetch", "matbench", task, tmp_path, "--url", f"{server.url}/files/1")
        assert command(monkeypatch, *words) == 0
        assert len(server.asked) == asked
    assert (tmp_path / "matbench_log_kvrh.json.gz").read_bytes() == TABLE


def test_a_server_that_always_cuts_and_never_goes_on_is_given_up(tmp_path):
    def reply(server, request):
        if request.headers["range"]:
            return Answer(TABLE, 206)
        answer = Answer(TABLE)
        databases.truncated(answer)
        return answer

    with serving(reply) as server, pytest.raises(RunFailed):
        download.download(Web(), server.url, tmp_path / "a", lambda done, total: None)


def test_wrong_bytes_in_a_part_are_begun_anew(task, tmp_path, monkeypatch, capsys):
    part = half(TABLE, task, tmp_path, monkeypatch)
    part.write_bytes(part.stat().st_size * b"x")
    capsys.readouterr()
    with serving(archive(TABLE)) as server:
        words = ("fetch", "matbench", task, tmp_path, "--url", f"{server.url}/files/1")
        assert command(monkeypatch, *words) == 0
    assert "what came in parts is another file; all of it again" in capsys.readouterr().err
    assert (tmp_path / "matbench_log_kvrh.json.gz").read_bytes() == TABLE


def test_the_remedy_for_another_file_is_not_the_address_just_used(
    task, tmp_path, monkeypatch, capsys
):
    import dataclasses

    with serving(archive(TABLE + b"!")) as server:
        there = dataclasses.replace(published.MATBENCH[task], url=f"{server.url}/files/1")
        monkeypatch.setitem(published.MATBENCH, task, there)
        assert command(monkeypatch, "fetch", "matbench", task, tmp_path) == 1
    said = " ".join(capsys.readouterr().err.split())
    assert f"take it from {there.url}" not in said
    assert "in a browser, and give what it saves with --from FILE; what came is not kept" in said


@pytest.mark.parametrize("by_hand", [True, False])
def test_an_archive_that_stands_in_its_place_gets_its_record(
    task, tmp_path, monkeypatch, capsys, by_hand
):
    path = tmp_path / "matbench_log_kvrh.json.gz"
    path.write_bytes(TABLE)
    words = ("fetch", "matbench", task, tmp_path, *(["--from", path] if by_hand else []))
    assert command(monkeypatch, *words) == 0
    assert "is there already, whole; only its record is written" in capsys.readouterr().err
    assert left(tmp_path) == [path.name, path.name + ".snapshot.json"]
    assert path.read_bytes() == TABLE
    told = record(path)
    assert (told["sha256"], told["bytes"]) == (hashlib.sha256(TABLE).hexdigest(), len(TABLE))
    assert told["url"] == str(path)
    assert command(monkeypatch, *words) == 0
    assert record(path) == told


@pytest.mark.parametrize("recorded", [True, False])
def test_another_file_in_the_place_of_an_archive_is_left_alone(
    task, tmp_path, monkeypatch, capsys, recorded
):
    given, path = tmp_path / "download.gz", tmp_path / "matbench_log_kvrh.json.gz"
    given.write_bytes(TABLE)
    path.write_bytes(b"mine")
    if recorded:
        record_of(path).write_text("{}")
    assert command(monkeypatch, "fetch", "matbench", task, tmp_path, "--from", given) == 2
    said = " ".join(capsys.readouterr().err.split())
    assert ("write into another folder" if recorded else "give another FOLDER") in said
    assert "another name" not in said
    assert path.read_bytes() == b"mine"


def test_a_download_and_a_mirror_are_not_taken_together(task, tmp_path, monkeypatch, capsys):
    given, out = tmp_path / "download.gz", tmp_path / "out"
    given.write_bytes(TABLE)
    words = ("fetch", "matbench", task, out, "--from", given, "--url", "https://mirror.example/a")
    assert command(monkeypatch, *words) == 2
    said = capsys.readouterr().err
    assert "with --url https://mirror.example/a: a file is taken from one place" in said
    assert "remedy: leave out --url" in said
    assert not out.exists() or left(out) == []


def test_published_checksums_are_checksums_of_https_files():
    for each in (*published.MATBENCH.values(), *published.JARVIS.values()):
        assert len(bytes.fromhex(each.sha256)) == 32
        assert checked_url(each.url).startswith("https://")
        assert "/" not in each.file
    assert len({each.sha256 for each in published.MATBENCH.values()}) == len(published.MATBENCH)


# --- by hand -------------------------------------------------------------------------------------


def test_documents_by_hand_become_the_same_file(project, tmp_path, monkeypatch):
    fetched, by_hand = tmp_path / "a.jsonl.gz", tmp_path / "b.jsonl.gz"
    mp.fetch(fetched, **QUIET)
    sorted_ = sorted(materials(25), key=lambda each: each["material_id"])
    first = write_lines(tmp_path / "1.jsonl", sorted_[:12])
    second = tmp_path / "2.json"
    second.write_text(json.dumps(sorted_[12:]))
    words = ("fetch", "mp", by_hand, "--from", first, "--from", second)
    assert command(monkeypatch, *words) == 0
    assert documents(by_hand) == documents(fetched)
    assert [each["file"] for each in record(by_hand)["from"]] == ["1.jsonl", "2.json"]
    third = tmp_path / "c.jsonl.gz"
    assert command(monkeypatch, "fetch", "mp", third, "--from", first, "--from", first) == 2
    broken = tmp_path / "3.json"
    broken.write_bytes(second.read_bytes()[:-9])
    assert command(monkeypatch, "fetch", "mp", third, "--from", broken) == 2
    assert not third.exists()


def test_by_hand_leaves_out_what_fetching_leaves_out(tmp_path, monkeypatch, capsys):
    given = materials(9)
    given[0]["deprecated"] = True
    given[1]["builder_meta"] = {"license": "BY-NC", "batch_id": None}
    given[2]["builder_meta"] = {"license": None, "batch_id": "gnome_r2scan_statics"}
    given[3]["batch_id"] = "gnome_r2scan_statics"
    given[4]["builder_meta"] = {"license": "BY-C", "batch_id": "another"}
    given[5]["builder_meta"] = "odd"
    out, first = tmp_path / "a.jsonl.gz", write_lines(tmp_path / "1.jsonl", given)
    assert command(monkeypatch, "fetch", "mp", out, "--from", first) == 0
    assert documents(out) == [mp.trimmed(each) for each in given[4:]]
    assert record(out)["left_out"] == {"deprecated": 1, "of GNoME (CC BY-NC)": 3}
    assert record(out)["documents"] == 5
    said = capsys.readouterr().out
    assert re.search(r"left out, deprecated\W+1\b", said)
    assert re.search(r"left out, of GNoME \(CC BY-NC\)\W+3\b", said)


@pytest.mark.parametrize("indent", [None, 2])
@pytest.mark.parametrize("turned", [False, True])
def test_answers_of_the_api_by_hand(tmp_path, monkeypatch, indent, turned):
    meta = {"api_version": "0.87.1", "total_doc": 4}
    answer = {"data": materials(4), "errors": None, "meta": meta}
    if turned:
        answer = dict(reversed(answer.items()))
    given = tmp_path / "api.json"
    given.write_text(json.dumps(answer, indent=indent))
    packed = tmp_path / "more.json.gz"
    packed.write_bytes(gzip.compress(json.dumps(answer | {"data": materials(6)[4:]}).encode()))
    out = tmp_path / "a.jsonl.gz"
    assert command(monkeypatch, "fetch", "mp", out, "--from", given, "--from", packed) == 0
    assert documents(out) == [mp.trimmed(each) for each in materials(6)]


def test_a_file_that_by_hand_cannot_be_is_told_what_can(tmp_path, monkeypatch, capsys):
    wrong = tmp_path / "grid.toml"
    wrong.write_text("seeds = [0]\n")
    assert command(monkeypatch, "fetch", "mp", tmp_path / "x.jsonl", "--from", wrong) == 2
    said = capsys.readouterr().err
    assert "grid.toml' is of no known format" in said
    assert "remedy: give .jsonl or .json files" in said
    assert "prototypes" not in said
    assert "CIF" not in said


def test_answers_by_hand_become_the_same_file(tmp_path, monkeypatch):
    with serving(optimade([entry(n) for n in range(1, 8)])) as server:
        url = f"{server.url}/optimade"
        om.fetch(url, "", tmp_path / "a.jsonl.gz", **QUIET)
        pages = []
        for offset in (0, 5):
            fields = ",".join(entry(1)["attributes"])
            page = tmp_path / f"page{offset}.json"
            asked = (
                f"{url}/v1/structures?page_limit=5&page_offset={offset}&response_fields={fields}"
            )
            page.write_bytes(requests.get(asked, timeout=9).content)
            pages += ["--from", page]
    out = tmp_path / "b.jsonl.gz"
    assert command(monkeypatch, "fetch", "optimade", "https://x.org", "", out, *pages) == 0
    assert documents(out) == documents(tmp_path / "a.jsonl.gz")
    header = [
        {"x-optimade": {"meta": {"api_version": "1.2.0"}}},
        {"type": "info", "id": "structures"},
    ]
    standard = write_lines(tmp_path / "all.jsonl", [*header, *(entry(n) for n in range(1, 8))])
    again = tmp_path / "c.jsonl.gz"
    words = ("fetch", "optimade", "https://x.org", "", again, "--from", standard)
    assert command(monkeypatch, *words) == 0
    assert documents(again) == documents(out)


# --- rules for all servers -----------------------------------------------------------------------


@pytest.mark.parametrize(
    "url",
    [
        "http://example.org/",
        "ftp://example.org/",
        "example.org",
        "file:///etc/passwd",
        "https://",
        "",
    ],
)
def test_only_https(url):
    with pytest.raises(UserError, match="is not https://"):
        checked_url(url)
    with pytest.raises(UserError, match="holds a password"):
        checked_url("https://me:secret@example.org/")


def test_a_redirect_to_plain_http_is_refused():
    away = Answer({}, 302, location="http://example.org/")
    with serving(lambda *_: away) as server, pytest.raises(UserError, match="is not https://"):
        Web().document(server.url)


def test_an_unknown_certificate_is_refused(tmp_path):
    from http.server import BaseHTTPRequestHandler, HTTPServer

    cert, key = tmp_path / "cert.pem", tmp_path / "key.pem"
    words = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "1"]
    words += ["-subj", "/CN=localhost", "-addext", "subjectAltName=IP:127.0.0.1"]
    subprocess.run([*words, "-keyout", key, "-out", cert], check=True, capture_output=True)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(cert, key)
    httpd = HTTPServer(("127.0.0.1", 0), BaseHTTPRequestHandler)
    httpd.socket = context.wrap_socket(httpd.socket, server_side=True)
    httpd.handle_error = lambda *words: None
    thread = threading.Thread(target=httpd.serve_forever, args=(0.01,))
    thread.start()
    try:
        with pytest.raises(RunFailed, match="its certificate is not accepted"):
            Web().document(f"https://127.0.0.1:{httpd.server_port}/")
    finally:
        httpd.shutdown()
        httpd.server_close()
        thread.join()


@pytest.mark.parametrize("packed", [False, True])
def test_an_answer_that_is_too_large_is_not_held(monkeypatch, packed):
    monkeypatch.setattr(web, "MAX_ANSWER", 1 << 20)
    body = b'{"a": "' + b"x" * (8 << 20) + b'"}'
    answer = Answer(gzip.compress(body, 1), content_encoding="gzip") if packed else Answer(body)
    with serving(lambda *_: answer) as server, pytest.raises(RunFailed, match="more than 1 MiB"):
        Web().document(server.url)


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        (databases.busy(), "HTTP 429"),
        (databases.busy(None), "HTTP 429"),
        (databases.busy("nonsense"), "HTTP 429"),
        (databases.broken, "HTTP 500"),
        (databases.truncated, "cut short"),
        (databases.garbage, "no JSON"),
    ],
)
def test_a_server_that_stays_broken_is_given_up(fault, said):
    told: list[str] = []
    with serving(lambda server, request: Answer({"a": 1})) as server:
        server.faults = [fault] * web.ATTEMPTS
        with pytest.raises(RunFailed, match=f"fails {web.ATTEMPTS} times: .*{said}"):
            Web(told.append).document(server.url)
        assert len(server.asked) == web.ATTEMPTS
    assert len(told) == web.ATTEMPTS - 1


def test_a_busy_server_gets_the_pause_that_it_asks_for(monkeypatch):
    pauses: list[float] = []
    monkeypatch.setattr(web, "time", SimpleNamespace(sleep=pauses.append))
    with serving(lambda server, request: Answer({"a": 1})) as server:
        server.faults = [databases.busy("7")]
        assert Web().document(server.url) == {"a": 1}
        assert pauses == [7.0]
        server.faults = [databases.busy("7200")]
        with pytest.raises(RunFailed, match="asks to wait 120 min"):
            Web().document(server.url)


def test_a_server_that_stalls_is_asked_again(monkeypatch):
    monkeypatch.setattr(web, "TIMEOUT", (1.0, 0.2))
    stalls = [0.6, 0.0]

    def slow(server, request):
        time.sleep(stalls.pop(0))
        return Answer({"a": 1})

    with serving(slow) as server:
        assert Web().document(server.url) == {"a": 1}
        assert len(server.asked) == 2


@pytest.mark.parametrize(
    "begun",
    [
        "HTTP/1.",
        "HTTP/1.1 200 OK\r\nx-slow: ",
        "HTTP/1.1 200 OK\r\n\r\n",
        "HTTP/1.1 200 OK\r\ncontent-length: 1000\r\n\r\n",
    ],
)
def test_a_server_that_drips_for_ever_is_given_up(monkeypatch, begun):
    """A byte of the head or the body now and then, so that no single read takes too long."""
    monkeypatch.setattr(web, "LONGEST", 0.4)
    ends: list[str] = []

    def drips(server, request):
        try:
            request.wfile.write(begun.encode())
            for _ in range(1000):
                request.wfile.write(b" ")
                time.sleep(0.02)
            ends.append("all of it was taken")
        except ConnectionError:
            ends.append("the client has hung up")
            raise

    with serving(drips) as server, pytest.raises(RunFailed, match=f"fails {web.ATTEMPTS} times"):
        Web().document(server.url)
    assert set(ends) == {"the client has hung up"}


# --- kills ---------------------------------------------------------------------------------------


def fetchers(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Kind → its server's answers, the file's name, what fetches it from an address."""
    monkeypatch.setenv("MP_API_KEY", KEY)

    def from_project(url: str, out: Path) -> None:
        monkeypatch.setenv("MP_API_ENDPOINT", url)
        mp.fetch(out / "a.jsonl.gz", **QUIET)

    def from_optimade(url: str, out: Path) -> None:
        om.fetch(f"{url}/optimade", "", out / "a.jsonl.gz", **QUIET)

    def from_archive(url: str, out: Path) -> None:
        known = published.MATBENCH["log_kvrh"]
        download.fetch(known, out, url=f"{url}/files/1", **QUIET)

    def from_files(url: str, out: Path) -> None:
        files = [out.parent / "given.jsonl"]
        write_lines(files[0], materials(19))
        convert(files, out / "a.jsonl.gz", mp.ABOUT, lambda file: map(mp.trimmed, summaries(file)))

    return {
        "mp": (materials_project(materials(19)), "a.jsonl.gz", from_project),
        "optimade": (optimade([entry(n) for n in range(1, 19)]), "a.jsonl.gz", from_optimade),
        "archive": (archive(TABLE), "matbench_log_kvrh.json.gz", from_archive),
        "by hand": (archive(b""), "a.jsonl.gz", from_files),
    }


@pytest.mark.parametrize(
    ("kind", "every"), [("mp", 11), ("optimade", 1), ("archive", 2), ("by hand", 3)]
)
def test_killed_at_any_step_nothing_is_lost_or_doubled(
    project, kind, every, task, tmp_path, monkeypatch
):
    """Death at each operation on a file, one after another, then the same command again."""
    reply, name, work = fetchers(monkeypatch)[kind]
    with serving(reply) as server:
        work(server.url, tmp_path / "whole")
        expected = (tmp_path / "whole" / name).read_bytes()
        step = 0
        while True:
            out = tmp_path / f"killed-{step}"

            def die_at_the_step(url: str, out: Path = out, step: int = step) -> None:
                seen = 0

                def hook(event: str, words: tuple[Any, ...]) -> None:
                    nonlocal seen
                    if event in ("open", "os.rename", "os.remove", "os.truncate", "os.mkdir"):
                        seen += any(f"{out}/" in str(word) for word in words)
                    if seen > step:
                        seen = 0  # killing is an event, too
                        os.kill(os.getpid(), signal.SIGKILL)

                sys.addaudithook(hook)
                work(url, out)

            child = forked(lambda: die_at_the_step(server.url))
            _, status = os.waitpid(child, 0)
            if os.WIFEXITED(status):
                assert os.WEXITSTATUS(status) == 0
                break
            if (out / name).exists():
                assert (out / name).read_bytes() == expected
            work(server.url, out)
            assert (out / name).read_bytes() == expected
            assert left(out) == [name, name + ".snapshot.json"]
            same = ("documents", "labels", "sha256", "bytes", "database_version", "licence")
            whole = record(tmp_path / "whole" / name)
            assert {k: record(out / name).get(k) for k in same} == {k: whole.get(k) for k in same}
            step += every
    assert step > 10


@pytest.mark.parametrize("kind", ["mp", "optimade"])
def test_a_later_command_asks_only_for_what_is_missing(project, kind, tmp_path, monkeypatch):
    reply, name, work = fetchers(monkeypatch)[kind]
    with serving(reply) as server:
        work(server.url, tmp_path / "whole")
        asked = len(server.asked)
        journal = tmp_path / "out" / f"{name}.partial" / "journal"
        server.pause = 0.05
        child = forked(lambda: work(server.url, tmp_path / "out"))
        while not journal.exists() or journal.read_bytes().count(b"\n") < 4:  # three chunks
            time.sleep(0.01)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        server.pause = 0.0
        before = len(server.asked)
        work(server.url, tmp_path / "out")
        assert len(server.asked) - before <= asked - 2
    assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_what_a_crash_left_unfinished_is_taken_back(tmp_path, monkeypatch):
    monkeypatch.setattr(om, "PAGE", 3)
    reply, name, work = fetchers(monkeypatch)["optimade"]
    with serving(reply) as server:
        work(server.url, tmp_path / "whole")
        for _ in range(2):  # two pages each
            server.faults = 4 * [databases.fine] + web.ATTEMPTS * [databases.broken]
            with pytest.raises(RunFailed, match="HTTP 500"):
                work(server.url, tmp_path)
            for file, text in (("data", 9999 * b"x"), ("journal", b"12345678 {")):
                with (tmp_path / f"{name}.partial" / file).open("ab") as stream:
                    stream.write(text)
        work(server.url, tmp_path)
    assert (tmp_path / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_the_command_killed_and_given_again(tmp_path):
    out = tmp_path / "o.jsonl.gz"
    entries = [entry(n) for n in range(1, 351)]
    with serving(optimade(entries)) as server:
        server.pause = 0.2
        words = [
            sys.executable,
            "-m",
            "xtal",
            "fetch",
            "optimade",
            f"{server.url}/optimade",
            "",
            out,
        ]
        environment = os.environ | {"PYTHONPATH": str(ROOT)}
        first = subprocess.Popen(words, env=environment, stderr=subprocess.DEVNULL)
        while len(server.asked) < 5:  # info, info/structures, two pages, and the third is asked for
            time.sleep(0.01)
        first.kill()
        first.wait()
        assert not out.exists()
        server.pause = 0.0
        asked = len(server.asked)
        done = subprocess.run(words, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        assert len(server.asked) == asked + 4
    assert [each["material_id"] for each in documents(out)] == [each["id"] for each in entries]


def test_a_full_disk_keeps_what_came(tmp_path, monkeypatch, capsys):
    out = tmp_path / "o.jsonl.gz"
    with serving(optimade([entry(n) for n in range(1, 24)])) as server:
        words = ("fetch", "optimade", f"{server.url}/optimade", "", out)
        real, calls = os.fsync, []

        def full(descriptor: int) -> None:
            calls.append(descriptor)
            if len(calls) == 6:
                raise OSError(28, "No space left on device")
            real(descriptor)

        monkeypatch.setattr(os, "fsync", full)
        assert command(monkeypatch, *words) == 74
        monkeypatch.undo()
        assert "No space left on device" in capsys.readouterr().err
        assert not out.exists()
        monkeypatch.setenv("NO_PROXY", "*")
        asked = len(server.asked)
        assert command(monkeypatch, *words) == 0
        assert len(server.asked) - asked < 7
    assert len(documents(out)) == 23


def test_a_damaged_part_is_not_gone_on_with(tmp_path, monkeypatch):
    reply, name, work = fetchers(monkeypatch)["optimade"]
    with serving(reply) as server:
        server.faults = 4 * [databases.fine] + web.ATTEMPTS * [databases.broken]
        with pytest.raises(RunFailed, match="HTTP 500"):
            work(server.url, tmp_path)
        data = tmp_path / f"{name}.partial" / "data"
        text = bytearray(data.read_bytes())
        text[30] ^= 1
        data.write_bytes(text)
        with pytest.raises(RunFailed, match="damaged"):
            work(server.url, tmp_path)
        data.write_bytes(text[:-5])
        with pytest.raises(RunFailed, match="damaged"):
            work(server.url, tmp_path)
        with pytest.raises(UserError, match="holds a part of something else"):
            om.fetch(f"{server.url}/optimade", "other", tmp_path / name, **QUIET)
        om.fetch(f"{server.url}/optimade", "", tmp_path / name, restart=True, **QUIET)
    assert len(documents(tmp_path / name)) == 18
