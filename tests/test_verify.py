"""`verify` finds every kind of damage, and says of a good dataset that it is good."""

import csv
import gzip
import hashlib
import json
import random
import shutil
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import zstandard
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tiny import SMALL, broken, command, document, run, write_lines

from cluster.errors import UserError
from cluster.files import sha256_of
from featurization import recompute, worker
from featurization.account import read_rejects
from featurization.origin import state_of
from featurization.shards import content_hash, read_shard
from featurization.sources import open_source
from featurization.verify import verify

FIRST, LAST = "shards/shard-000-0001-00000-00000.h5", "shards/shard-000-0001-00000-00002.h5"
KEYS = ["ok", "structures", "rejected", "points", "content_hash", "recomputed", "sources", "note"]
KEYS += ["damaged", "problems"]


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`s.jsonl` of 12 records and `out`, its dataset of 10 crystals in 3 shards."""
    folder = tmp_path_factory.mktemp("original")
    lines = [document(f"m{i}", 4 + i / 10, band_gap=float(i)) for i in range(10)]
    lines = [*lines[:5], broken("b0"), *lines[5:], document("m1")]
    write_lines(folder / "s.jsonl", lines)
    run(folder / "s.jsonl", folder / "out", SMALL.model_copy(update={"shard_structures": 4}))
    return folder


@pytest.fixture
def dataset(original: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(original / "out", tmp_path / "out"))


@pytest.fixture
def source(original: Path) -> str:
    return str(original / "s.jsonl")


def edit_manifest(folder: Path, change: Callable[[Any], Any]) -> None:
    path = folder / "manifest.json"
    manifest = json.loads(path.read_text())
    change(manifest)
    path.write_text(json.dumps(manifest))


def seal(folder: Path) -> None:
    """Make checksums and content hashes of the manifest those of the files: a thorough forger."""

    def change(manifest: Any) -> None:
        for row in manifest["shards"]:
            row["sha256"] = sha256_of(folder / row["file"])
            row["content_hash"] = content_hash(e.digest() for e in read_shard(folder / row["file"]))
        parts = (int(row["content_hash"], 16) for row in manifest["shards"])
        manifest["content_hash"] = content_hash(parts)
        manifest["checksums"] = {name: sha256_of(folder / name) for name in manifest["checksums"]}

    edit_manifest(folder, change)


def edit_shard(folder: Path, change: Callable[[h5py.File], None]) -> None:
    with h5py.File(folder / FIRST, "r+") as file:
        change(file)


def test_good(dataset: Path, source: str) -> None:
    manifest = json.loads((dataset / "manifest.json").read_text())
    answer = verify(dataset, [source], sample=100)
    assert list(answer) == KEYS
    assert answer["ok"] is True
    assert answer["problems"] == []
    assert answer["recomputed"] == answer["structures"] == 10
    for key in ("structures", "rejected", "points", "content_hash"):
        assert answer[key] == manifest[key]
    for sample, expected in ((3, 3), (0, 0), (-1, 0)):
        assert verify(dataset, [source], sample)["recomputed"] == expected
    assert verify(dataset)["recomputed"] == 0


def test_sealing_alone_breaks_nothing(dataset: Path, source: str) -> None:
    before = (dataset / "manifest.json").read_text()
    seal(dataset)
    assert json.loads((dataset / "manifest.json").read_text()) == json.loads(before)
    assert verify(dataset, [source])["ok"]


def flip(name: str) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        data = bytearray((folder / name).read_bytes())
        data[len(data) // 2] ^= 1
        (folder / name).write_bytes(data)

    return damage


def truncate(folder: Path) -> None:
    data = (folder / LAST).read_bytes()
    (folder / LAST).write_bytes(data[: len(data) // 2])


def count_one_more(key: str) -> Callable[[Path], None]:
    def change(manifest: Any) -> None:
        manifest[key] += 1

    return lambda folder: edit_manifest(folder, change)


def move_a_count_between_shards(folder: Path) -> None:
    def change(manifest: Any) -> None:
        manifest["shards"][0]["points"] += 1
        manifest["shards"][1]["points"] -= 1

    edit_manifest(folder, change)


def wrong_rejects(folder: Path) -> None:
    with (folder / "rejects.csv").open("w", newline="") as stream:
        csv.writer(stream).writerow(["id", "stage", "reason", "source_index"])


def other_reject(folder: Path) -> None:
    path = folder / "rejects.csv"
    path.write_text(path.read_text().replace("b0", "b1"))


def foreign_virtual_file(folder: Path) -> None:
    # The same counts, but other crystals.
    with h5py.File(folder / "dataset.h5", "r+") as file:
        file["offsets"][1] += 1


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (flip(FIRST), f"{FIRST} has another checksum"),
        (flip("dataset.h5"), "dataset.h5 has another checksum"),
        (truncate, f"{LAST} has another checksum"),
        (lambda d: (d / LAST).unlink(), f"{LAST} is missing"),
        (lambda d: shutil.rmtree(d / "shards"), f"{FIRST} is missing"),
        (lambda d: shutil.copy(d / LAST, d / "shards/new.h5"), "shards/new.h5 is not in the"),
        (count_one_more("structures"), "10 structures found, the manifest says 11"),
        (count_one_more("points"), "points found, the manifest says"),
        (count_one_more("rejected"), "rejects.csv has 2 rows, the manifest 3"),
        (move_a_count_between_shards, "not as listed"),
        (lambda d: edit_manifest(d, lambda m: m["shards"].pop()), f"{LAST} is not in the manifest"),
        (lambda d: edit_manifest(d, lambda m: m["shards"].append(m["shards"][0])), "id m0 is in"),
        (lambda d: edit_manifest(d, lambda m: m.update(content_hash="0" * 64)), "content hash of"),
        (lambda d: edit_manifest(d, lambda m: m.pop("checksums")), "rejects.csv has another"),
        (wrong_rejects, "rejects.csv has another checksum"),
        (other_reject, "rejects.csv has another checksum"),
        (lambda d: (d / "rejects.csv").write_bytes(b"\xff\n\0"), "rejects.csv has another"),
        (lambda d: (d / "rejects.csv").unlink(), "rejects.csv is missing"),
        (lambda d: (d / "dataset.h5").unlink(), "dataset.h5 is missing"),
        (foreign_virtual_file, "dataset.h5 has another checksum"),
    ],
)
def test_damage_is_found(
    dataset: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    damage: Callable[[Path], Any],
    said: str,
) -> None:
    damage(dataset)
    answer = verify(dataset)
    assert answer["ok"] is False
    assert [p for p in answer["problems"] if said in p], answer["problems"]
    assert command(monkeypatch, "verify", dataset, "--json") == 1
    printed = json.loads(capsys.readouterr().out)
    assert list(printed) == KEYS
    assert printed["ok"] is False


def swap(name: str) -> Callable[[h5py.File], None]:
    def change(file: h5py.File) -> None:
        file[name][:] = file[name][:][[1, 0, 2, 3]]

    return change


def put(name: str, value: float) -> Callable[[h5py.File], None]:
    def change(file: h5py.File) -> None:
        file[name][(20, *[0] * (file[name].ndim - 1))] = value

    return change


def retype(name: str, kind: str) -> Callable[[h5py.File], None]:
    def change(file: h5py.File) -> None:
        data = file[name][:].astype(kind)
        del file[name]
        file[name] = data

    return change


def set_all(name: str, value: Any) -> Callable[[h5py.File], None]:
    def change(file: h5py.File) -> None:
        file[name][:] = value

    return change


# Seen although all checksums and hashes are in order, without the source.
@pytest.mark.parametrize(
    ("change", "said"),
    [
        (put("q", np.nan), "not finite"),
        (put("intensity", np.inf), "not finite"),
        (put("intensity", -1.0), "negative intensity"),
        (put("q", 0.5), "off its reciprocal lattice"),
        (put("hkl", 9), "off its reciprocal lattice"),
        (set_all("lattice", 1.0), "without volume"),
        (set_all("lattice", np.nan), "off its reciprocal lattice"),
    ],
)
def test_content_that_is_no_cloud(dataset: Path, change: Any, said: str) -> None:
    edit_shard(dataset, change)
    seal(dataset)
    answer = verify(dataset)
    assert answer["ok"] is False
    assert [p for p in answer["problems"] if said in p], answer["problems"]


# In order by themselves, but not what the source gives. The place in the source is no content:
# only the source itself tells.
@pytest.mark.parametrize(
    ("change", "hashed"),
    [
        (swap("id"), True),
        (swap("source_index"), False),
        (swap("labels/band_gap"), True),
        (put("intensity", 3.0), True),
        (set_all("symmetry/number", 225), True),
        (set_all("symmetry/crystal_system", "trigonal"), False),
        (set_all("group", "x"), True),
    ],
)
def test_forgery_is_found_by_hash_and_by_recomputation(
    dataset: Path, source: str, change: Any, hashed: bool
) -> None:
    edit_shard(dataset, change)
    edit_manifest(dataset, lambda m: m["shards"][0].update(sha256=sha256_of(dataset / FIRST)))
    assert verify(dataset)["ok"] is not hashed
    seal(dataset)
    assert verify(dataset)["ok"]
    answer = verify(dataset, [source], sample=10)
    assert answer["ok"] is False
    assert any("what its source gives" in p for p in answer["problems"]), answer["problems"]


def test_unreadable_content_with_its_checksum(dataset: Path) -> None:
    good = (dataset / FIRST).read_bytes()
    for change in (
        retype("lattice", "longdouble"),
        lambda file: file.__delitem__("hkl"),
        lambda file: file.__delitem__("labels"),
        lambda file: file["labels"].create_group("deep"),
        set_all("offsets", [0, 9, 5, 1, 2]),
    ):
        (dataset / FIRST).write_bytes(good)
        edit_shard(dataset, change)
        edit_manifest(dataset, lambda m: m["shards"][0].update(sha256=sha256_of(dataset / FIRST)))
        answer = verify(dataset)
        assert answer["ok"] is False
        assert any(FIRST in problem for problem in answer["problems"])


def test_source_that_changed(original: Path, dataset: Path, tmp_path: Path) -> None:
    lines = (original / "s.jsonl").read_text().splitlines(keepends=True)
    for name, text in (
        ("value", "".join(lines).replace("4.9", "4.8")),
        ("label", "".join(lines).replace('"band_gap": 7.0', '"band_gap": 7.5')),
        ("order", "".join(reversed(lines))),
        ("end", "".join(lines[:-2])),
        ("reject", "".join(lines).replace('"Cl"', '"Qq"')),
        ("nothing", ""),
    ):
        for file, word in (("s.jsonl", "changed"), ("t.jsonl", "another")):
            (tmp_path / file).write_text(text)
            answer = verify(dataset, [str(tmp_path / file)], sample=10)
            assert answer["ok"] is False, name
            # What is another source cannot testify against the dataset.
            assert answer["recomputed"] == 0
            assert answer["damaged"] == []
            [problem] = answer["problems"]
            assert f"source 0, {tmp_path / file}, is not what" in problem
            [state] = [each["state"] for each in answer["sources"]]
            assert state.startswith(f"{word}: ")
            assert "sha256 was '" in state
            assert verify(dataset, [str(tmp_path / file)], sample=0)["ok"]


def test_state_of_the_source(
    original: Path, dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def state(spec: str | Path, **more: Any) -> str:
        answer = verify(dataset, [str(spec)], **more)
        assert answer["ok"]
        assert bool(answer["note"]) == (answer["recomputed"] == 0 and more.get("sample") != 0)
        return str(answer["sources"][0]["state"])

    assert state(original / "s.jsonl") == "as it was"
    assert state(shutil.copy(original / "s.jsonl", tmp_path / "moved.jsonl")) == "as it was"
    assert state(original / "s.jsonl", sample=0) == "not compared"
    assert state(tmp_path / "gone.jsonl") == "absent"
    (tmp_path / "s.txt").write_text("")
    assert "is of no known format" in state(tmp_path / "s.txt")
    # One byte more, which no crystal shows.
    longer = tmp_path / "s.jsonl"
    longer.write_text("\n" + (original / "s.jsonl").read_text())
    assert not verify(dataset, [str(longer)])["ok"]
    monkeypatch.setattr(recompute, "state_of", lambda *_: "as it was")
    assert verify(dataset, [str(longer)])["recomputed"] == 10


@pytest.mark.parametrize("kind", ["gz", "zst", "json"])
def test_only_what_is_read_in_place_can_have_grown(
    original: Path, tmp_path: Path, kind: str
) -> None:
    """What follows in another file is not simply one more record."""
    documents = (original / "s.jsonl").read_bytes()
    pack = {"gz": gzip.compress, "zst": zstandard.compress, "json": bytes}[kind]
    data = pack(documents if kind != "json" else b"[%s]" % b",".join(documents.splitlines()))
    source = tmp_path / ("s.json" if kind == "json" else f"s.jsonl.{kind}")
    source.write_bytes(data)
    run(source, tmp_path / "out")
    source.write_bytes(data + pack(b"\n"))
    [state] = [each["state"] for each in verify(tmp_path / "out", [str(source)])["sources"]]
    assert state.startswith("changed: ")


@given(lines=st.lists(st.binary(max_size=8)), at=st.integers(0, 60), more=st.binary(max_size=8))
def test_growth_is_a_beginning_of_whole_lines(
    tmp_path_factory: pytest.TempPathFactory, lines: list[bytes], at: int, more: bytes
) -> None:
    path = tmp_path_factory.getbasetemp() / "any.jsonl"
    before = b"\n".join(lines)
    listed = {"kind": "jsonl", "path": path.name, "sha256": hashlib.sha256(before).hexdigest()}
    path.write_bytes(before + more)
    expected = "as it was" if not more else "grown since"
    if more and before and not before.endswith(b"\n") and not more.startswith(b"\n"):
        expected = "changed: "
    source = open_source(str(path))
    if not source.in_place:  # it looks like an archive
        expected = "changed: " if more else "as it was"
    if before or not more:
        assert state_of(source, listed).startswith(expected)
    data = bytearray(before + more)
    if at < len(before):
        data[at] ^= 1
        path.write_bytes(data)
        assert state_of(open_source(str(path)), listed).startswith("changed: ")


@pytest.mark.parametrize("size", [1000, 1 << 17, 1 << 20])
def test_rejects_of_any_length(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, size: int) -> None:
    """As they were written before there was a limit, which other tables still have."""
    monkeypatch.setattr(worker, "_writable", lambda text: text)
    source = write_lines(tmp_path / "s.jsonl", [document("a"), broken("Q" * size), broken("x, y")])
    run(source, tmp_path / "out")
    limit = csv.field_size_limit()
    rows = list(read_rejects(tmp_path / "out" / "rejects.csv"))
    assert [row[0] for row in rows] == ["Q" * size, "x, y"]
    assert csv.field_size_limit() == limit
    assert verify(tmp_path / "out", [str(source)])["problems"] == []


@pytest.mark.parametrize(
    "text", ["a,b,c\n", "a,b,c,d\n", 'a,b,"c,4\n', "a,b,c,-1\n", "\n", "a,b,c,4\n\xff"]
)
def test_rejects_that_are_no_table(tmp_path: Path, text: str) -> None:
    path = tmp_path / "rejects.csv"
    path.write_text("id,stage,reason,source_index\n" + text, encoding="latin-1")
    with pytest.raises(UserError, match=r"rejects\.csv cannot be read.*\n.*--repair"):
        list(read_rejects(path))


def test_each_crystal_is_sampled_some_time(
    dataset: Path, source: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    generator = random.Random(1)
    monkeypatch.setattr(random, "SystemRandom", lambda: generator)
    monkeypatch.setattr(recompute, "_compare", lambda *words: f"{words[2].id} is chosen")
    seen: dict[str, int] = {}
    for _ in range(40):
        problems = verify(dataset, [source], sample=3)["problems"]
        assert len(problems) == 3
        for problem in problems:
            seen[problem] = seen.get(problem, 0) + 1
    # 12 expected, standard deviation 2.9.
    assert len(seen) == 10
    assert all(2 < n < 24 for n in seen.values()), seen


def test_command(
    original: Path,
    dataset: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def answer(*words: str | Path) -> Any:
        assert command(monkeypatch, "verify", dataset, "--json", *words) == 0
        return json.loads(capsys.readouterr().out)

    assert answer()["recomputed"] == 10
    assert answer("--sample", "4")["recomputed"] == 4
    # The source has moved: the dataset is still good, and the answer says that none was checked.
    edit_manifest(dataset, lambda m: m["sources"][0].update(spec=str(tmp_path / "gone.jsonl")))
    moved = answer()
    assert moved["ok"] is True
    assert moved["recomputed"] == 0
    gone = {"spec": str(tmp_path / "gone.jsonl"), "state": "absent"}
    assert moved["sources"] == [gone]
    assert command(monkeypatch, "verify", dataset) == 0
    assert f"\nsource {tmp_path / 'gone.jsonl'}: absent\n" in capsys.readouterr().out
    assert answer("--source", original / "s.jsonl")["recomputed"] == 10
    assert command(monkeypatch, "verify", dataset, "--source", tmp_path / "gone.jsonl") == 2
    assert "gone.jsonl" in capsys.readouterr().err
    assert command(monkeypatch, "verify", tmp_path / "nothing") == 2
    assert "no finished dataset" in capsys.readouterr().err
    (dataset / LAST).unlink()
    assert command(monkeypatch, "verify", dataset) == 1
    assert f"{LAST} is missing" in capsys.readouterr().err


def leaves(value: Any) -> list[tuple[Any, ...]]:
    """Paths to all parts of a JSON value, itself excluded."""
    found: list[tuple[Any, ...]] = []
    if isinstance(value, dict | list):
        for key in value if isinstance(value, dict) else range(len(value)):
            found += [(key,), *((key, *rest) for rest in leaves(value[key]))]
    return found


ODD = st.sampled_from(
    [None, True, -1, 10**30, 0.5, "", "x", "../x", "\ud800", [], {}, [[]], {"": 1}]
)


@settings(
    max_examples=80,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(data=st.data())
def test_any_odd_manifest(original: Path, data: st.DataObject) -> None:
    folder = original / "out"
    text = (folder / "manifest.json").read_text()
    manifest = json.loads(text)
    # What verify relies on; the rest is for people.
    manifest = {
        k: v for k, v in manifest.items() if k not in ("attribution", "provenance", "reject_stages")
    }
    path = data.draw(st.sampled_from(leaves(manifest)))
    changed = deepcopy(manifest)
    holder = changed
    for key in path[:-1]:
        holder = holder[key]
    before = holder[path[-1]]
    holder[path[-1]] = data.draw(ODD)
    (folder / "manifest.json").write_text(json.dumps(changed))
    try:
        answer = verify(folder)
    except UserError:
        return
    finally:
        (folder / "manifest.json").write_text(text)
    if path[0] not in ("sources", "config") and holder[path[-1]] != before:
        assert answer["ok"] is False
