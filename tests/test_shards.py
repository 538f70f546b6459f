"""Shards keep what they are given, the virtual file shows it, and files are whole or absent."""

import json
import os
import shutil
import signal
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tiny import document, process, run, write_lines

from cluster.errors import UserError
from cluster.files import replacing, sha256_of, write_text
from featurization.cells import symmetry_of
from featurization.cloud import Cloud
from featurization.config import FeaturizationConfig
from featurization.manifest import read_manifest
from featurization.shards import Entry, content_hash, read_shard, write_shard
from featurization.virtual import write_virtual

CONFIG = FeaturizationConfig()


@st.composite
def entries(draw: st.DrawFn, id: str) -> Entry:
    """Any content at all: a shard does not ask for physics."""
    seed, points = draw(st.integers(0, 2**32)), draw(st.integers(1, 5))
    rng = np.random.default_rng(seed)
    names = st.sampled_from(["band_gap", "bulk_modulus", "own_label"])
    return Entry(
        id=id,
        group=draw(st.text(st.characters(exclude_categories=["Cs", "Cc"]), max_size=3)),
        formula="NaCl",
        source_index=draw(st.integers(0, 2**40)),
        cloud=Cloud(
            hkl=rng.integers(-30000, 30000, (points, 3)).astype(np.int16),
            q=rng.normal(size=(points, 3)).astype(np.float32),
            intensity=rng.random(points).astype(np.float32),
            multiplicity=rng.integers(1, 3, points).astype(np.uint8),
        ),
        lattice=rng.normal(size=(3, 3)),
        symmetry=symmetry_of(draw(st.integers(1, 230))),
        labels=draw(st.dictionaries(names, st.floats(allow_nan=False, allow_infinity=False))),
    )


IDS = st.lists(
    st.text(st.characters(exclude_categories=["Cs", "Cc"]), min_size=1, max_size=6),
    min_size=1,
    max_size=7,
    unique=True,
)
CRYSTALS = IDS.flatmap(lambda ids: st.tuples(*(entries(id) for id in ids))).map(list)


def example(id: str = "é漢🧊", **changes: Any) -> Entry:
    cloud = Cloud(
        hkl=np.array([[0, 0, 0], [0, 0, 1], [-3, 2, 1]], dtype=np.int16),
        q=np.array([[0, 0, 0], [0, 0, 0.2], [-0.6, 0.4, 0.2]], dtype=np.float32),
        intensity=np.array([4.0, 1.0, 0.25], dtype=np.float32),
        multiplicity=np.array([1, 2, 2], dtype=np.uint8),
    )
    made = Entry(
        id, "group", "ClNa", 5, cloud, 5.0 * np.eye(3), symmetry_of(225), {"bulk_modulus": 24.5}
    )
    return replace(made, **changes)


def same(one: Entry, other: Entry) -> bool:
    arrays = [(one.lattice, other.lattice)]
    for name in ("hkl", "q", "intensity", "multiplicity"):
        arrays.append((getattr(one.cloud, name), getattr(other.cloud, name)))
    rest = [
        (e.id, e.group, e.formula, e.source_index, e.symmetry, dict(e.labels)) for e in (one, other)
    ]
    return rest[0] == rest[1] and all(
        a.dtype == b.dtype and np.array_equal(a, b) for a, b in arrays
    )


@settings(max_examples=20, deadline=None, suppress_health_check=list(HealthCheck))
@given(crystals=CRYSTALS, cut=st.integers(1, 7))
def test_round_trip_and_hash(
    tmp_path_factory: pytest.TempPathFactory, crystals: list[Entry], cut: int
) -> None:
    folder = tmp_path_factory.mktemp("shards")
    rows = []
    for start in range(0, len(crystals), cut):
        part = crystals[start : start + cut]
        rows.append(write_shard(folder / "shards" / f"{start}.h5", part, CONFIG))
        read = read_shard(folder / "shards" / f"{start}.h5")
        assert len(read) == len(part)
        assert all(same(one, other) for one, other in zip(read, part, strict=True))
        assert rows[-1]["structures"] == len(part)
        assert rows[-1]["points"] == sum(len(e.cloud.hkl) for e in part)
        assert rows[-1]["sha256"] == sha256_of(folder / rows[-1]["file"])
    # The hash of the set knows neither order nor cuts.
    total = content_hash(int(row["content_hash"], 16) for row in rows)
    assert total == content_hash(entry.digest() for entry in reversed(crystals))
    write_virtual(folder, rows, CONFIG)
    check_virtual(folder / "dataset.h5", crystals)
    with h5py.File(folder / "dataset.h5") as file:
        assert file.attrs["content_hash"] == total
    shutil.rmtree(folder)


def check_virtual(path: Path, crystals: list[Entry]) -> None:
    """What `dataset.h5` shows is what the crystals are, in their order."""
    with h5py.File(path, "r") as file:
        offsets = file["offsets"][:]
        assert offsets[0] == 0
        assert file["id"].asstr()[:].tolist() == [e.id for e in crystals]
        assert file["group"].asstr()[:].tolist() == [e.group for e in crystals]
        assert file["symmetry/number"][:].tolist() == [e.symmetry.number for e in crystals]
        assert set(file["labels"]) == {name for e in crystals for name in e.labels}
        for i, entry in enumerate(crystals):
            part = slice(offsets[i], offsets[i + 1])
            for name in ("hkl", "q", "intensity", "multiplicity"):
                assert np.array_equal(file[name][part], getattr(entry.cloud, name))
            assert np.array_equal(file["lattice"][i], entry.lattice)
            for name in file["labels"]:
                expected = entry.labels.get(name, np.nan)
                assert np.array_equal(file["labels"][name][i], expected, equal_nan=True)
        assert offsets[-1] == len(file["q"])


CONTRACT = {
    "id": (("N",), "text", None),
    "group": (("N",), "text", None),
    "formula": (("N",), "text", None),
    "source_index": (("N",), "int64", None),
    "offsets": (("N+1",), "int64", None),
    "hkl": (("P", 3), "int16", None),
    "q": (("P", 3), "float32", "1/Å"),
    "intensity": (("P",), "float32", "(e/Å³)²"),
    "multiplicity": (("P",), "uint8", None),
    "lattice": (("N", 3, 3), "float64", "Å"),
    "symmetry/number": (("N",), "int16", None),
    "symmetry/crystal_system": (("N",), "text", None),
    "symmetry/point_group": (("N",), "text", None),
    "symmetry/bravais": (("N",), "text", None),
    "labels/bulk_modulus": (("N",), "float64", "GPa"),
    "labels/shear_modulus": (("N",), "float64", "GPa"),
    "labels/band_gap": (("N",), "float64", "eV"),
    "labels/energy_above_hull": (("N",), "float64", "eV/atom"),
}
# A virtual dataset of a label is not in each shard.
LABELS = {"bulk_modulus": 24.0, "shear_modulus": 15.0, "band_gap": 5.0, "energy_above_hull": 0.0}


def test_layout_of_shards_and_virtual_file(tmp_path: Path) -> None:
    lines = [document("a", **LABELS), document("b", 4.1, band_gap=None), document("c", 4.2)]
    source = write_lines(tmp_path / "s.jsonl", lines)
    config = FeaturizationConfig(selection="miller:1", shard_structures=2)
    manifest = run(source, tmp_path / "out", config)
    assert [shard["structures"] for shard in manifest["shards"]] == [2, 1]
    for path, count in (
        (tmp_path / "out" / "dataset.h5", 3),
        (tmp_path / "out" / manifest["shards"][0]["file"], 2),
    ):
        sizes = {"N": count, "N+1": count + 1, "P": 14 * count}
        with h5py.File(path, "r") as file:
            found: list[str] = []
            file.visititems(
                lambda name, item, found=found: (
                    found.append(name) if isinstance(item, h5py.Dataset) else None
                )
            )
            assert set(found) == set(CONTRACT)
            for name, (shape, kind, unit) in CONTRACT.items():
                data = file[name]
                assert data.shape == tuple(sizes.get(n, n) for n in shape), name
                if kind == "text":
                    assert h5py.check_string_dtype(data.dtype).encoding == "utf-8"
                else:
                    assert data.dtype == np.dtype(kind), name
                assert data.attrs.get("units") == unit, name
            assert file.attrs["format_version"] == manifest["format_version"]
            assert json.loads(file.attrs["config"]) == manifest["config"]
            assert file["symmetry/crystal_system"].asstr()[:].tolist() == ["cubic"] * count
            assert file["symmetry/number"][:].tolist() == [221] * count
            for name, value in LABELS.items():
                known = file["labels"][name][:]
                assert known[0] == value
                assert np.isnan(known[1:]).all()
            q = file["hkl"][:14] @ np.linalg.inv(file["lattice"][0]).T
            np.testing.assert_allclose(file["q"][:14], q, atol=1e-7)
    with h5py.File(tmp_path / "out" / "dataset.h5", "r") as file:
        assert file.attrs["content_hash"] == manifest["content_hash"]


@pytest.mark.parametrize(
    ("radiation", "unit"), [("xray_pymatgen", "e"), ("neutron", "fm"), ("electron", "Å")]
)
def test_unit_of_intensity(tmp_path: Path, radiation: Any, unit: str) -> None:
    config = FeaturizationConfig(radiation=radiation)
    rows = [write_shard(tmp_path / "shards" / "a.h5", [example()], config)]
    write_virtual(tmp_path, rows, config)
    for name in ("shards/a.h5", "dataset.h5"):
        with h5py.File(tmp_path / name) as file:
            assert file["intensity"].attrs["units"] == f"({unit}/Å³)²"


def test_virtual_file_from_elsewhere_and_after_a_move(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    crystals = [example("a"), example("b", labels={}), example("c", labels={"own": 1.0})]
    folder = tmp_path / "first"
    rows = [write_shard(folder / "shards" / f"{e.id}.h5", [e], CONFIG) for e in crystals]
    write_virtual(folder, rows, CONFIG)
    (tmp_path / "cwd").mkdir()
    monkeypatch.chdir(tmp_path / "cwd")
    check_virtual(folder / "dataset.h5", crystals)
    check_virtual(Path("..") / "first" / "dataset.h5", crystals)
    (tmp_path / "deep").mkdir()
    folder = folder.rename(tmp_path / "deep" / "moved é")
    check_virtual(folder / "dataset.h5", crystals)
    monkeypatch.chdir(folder)
    check_virtual(Path("dataset.h5"), crystals)


def flipped(array: Any, position: int) -> Any:
    """A copy whose bit number `position` (modulo its length) is the other one."""
    changed = np.array(array)
    raw = changed.reshape(-1).view(np.uint8)
    raw[position // 8 % len(raw)] ^= 1 << (position % 8)
    return changed


def variants(entry: Entry, position: int) -> dict[str, Entry]:
    """Entries that differ in one thing each."""
    cloud = entry.cloud
    made = {
        name: replace(
            entry, cloud=replace(cloud, **{name: flipped(getattr(cloud, name), position)})
        )
        for name in ("hkl", "q", "intensity", "multiplicity")
    }
    number = entry.symmetry.number % 230 + 1
    return made | {
        "id": replace(entry, id=entry.id + "\u0301"),
        "group": replace(entry, group=entry.group + "x"),
        "symmetry": replace(entry, symmetry=symmetry_of(number)),
        "lattice": replace(entry, lattice=flipped(entry.lattice, position)),
        "label": replace(entry, labels={"bulk_modulus": np.nextafter(24.5, 25)}),
        "name of the label": replace(entry, labels={"shear_modulus": 24.5}),
        "no label": replace(entry, labels={}),
        "fewer points": replace(
            entry,
            cloud=Cloud(cloud.hkl[1:], cloud.q[1:], cloud.intensity[1:], cloud.multiplicity[1:]),
        ),
    }


def unnoticed(digest: Callable[[Entry], int], position: int) -> set[str]:
    entry = example()
    return {n for n, v in variants(entry, position).items() if digest(v) == digest(entry)}


@given(st.integers(0, 10**6))
def test_any_bit_changes_the_hash(position: int) -> None:
    assert unnoticed(Entry.digest, position) == set()


def test_that_test_finds_a_hash_that_overlooks_the_lattice() -> None:
    cube = np.eye(3)
    assert unnoticed(lambda e: replace(e, lattice=cube).digest(), 7) == {"lattice"}


def test_unknown_labels_and_place_in_the_source_do_not_count() -> None:
    entry = example()
    for other in (
        replace(entry, labels={**entry.labels, "band_gap": float("nan")}),
        replace(entry, source_index=99),
    ):
        assert other.digest() == entry.digest()


def test_equal_crystals_do_not_cancel() -> None:
    digest = example().digest()
    assert len({content_hash([digest] * n) for n in range(5)}) == 5


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (None, "no manifest.json"),
        ("", "not a manifest"),
        ("\0\udcff", "not a manifest"),
        ("[]", "not a manifest"),
        ("{}", "not a manifest"),
        ('{"format_version": 2}', "not a manifest"),
        ('{"format_version": 3}', "format version 3"),
        ('{"format_version": null}', "format version None"),
    ],
)
def test_manifests_that_are_none(tmp_path: Path, text: str | None, said: str) -> None:
    if text is not None:
        (tmp_path / "manifest.json").write_text(text, errors="surrogateescape")
    with pytest.raises(UserError, match=said):
        read_manifest(tmp_path)


def test_replacing_is_all_or_nothing(tmp_path: Path) -> None:
    path = tmp_path / "new" / "file.txt"
    write_text(path, "old")

    def fail() -> None:
        with replacing(path) as temporary:
            temporary.write_text("half")
            assert temporary.parent == path.parent  # else the rename is a copy
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert path.read_text() == "old"
    with pytest.raises(FileNotFoundError), replacing(path):
        pass  # wrote nothing: not an empty file
    assert path.read_text() == "old"
    with path.open() as reader:  # of the old file, which is replaced, not written over
        write_text(path, "né")
        assert reader.read() == "old"
    assert path.read_bytes() == "né".encode()
    assert list(path.parent.iterdir()) == [path]


def test_kill_inside_replacing(tmp_path: Path) -> None:
    rows = [write_shard(tmp_path / "shards" / "shard-0-0.h5", [example()], CONFIG)]
    path = tmp_path / rows[0]["file"]
    script = (
        "import os, sys\nfrom pathlib import Path\nfrom cluster.files import replacing\n"
        "with replacing(Path(sys.argv[1])) as temporary:\n"
        "    temporary.write_bytes(b'half')\n    os.kill(os.getpid(), 9)\n"
    )
    done = process([sys.executable, "-c", script, path])
    assert done.returncode == -signal.SIGKILL
    assert sha256_of(path) == rows[0]["sha256"]
    [left] = set(path.parent.iterdir()) - {path}
    # What is left is hidden and has another suffix: nobody takes it for a shard.
    assert left.name.startswith(".")
    assert left not in set(path.parent.glob("*.h5"))
    assert os.path.getsize(left) == 4
