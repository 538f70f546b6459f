"""Every format gives its crystals, and whatever is broken becomes a reject that says so."""

import csv
import gzip
import hashlib
import io
import itertools
import json
import os
import random
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st
from pymatgen.core import Lattice, Structure
from pymatgen.io.cif import CifWriter
from pymatgen.io.vasp import Poscar
from test_mpi import core, mpi, needs_mpi
from tiny import SMALL, run

from cluster.errors import RunFailed, UserError
from featurization import worker
from featurization.account import read_rejects
from featurization.crystal import Crystal, Reject
from featurization.index import Index, Records, build_index
from featurization.sources import Source, open_source
from featurization.streams import StreamBroken, json_elements, lines, read_pieces
from featurization.verify import verify

DATA = Path(__file__).parents[2] / "shared" / "data"
HALITE = Structure.from_spacegroup(
    "Fm-3m", Lattice.cubic(5.64), ["Na", "Cl"], [[0, 0, 0], [0.5, 0.5, 0.5]]
)
CESIUM = Structure(Lattice.cubic(4.12), ["Cs", "Cl"], [[0, 0, 0], [0.5, 0.5, 0.5]])


def everything(source: Source) -> tuple[dict[str, Crystal], dict[int, Reject]]:
    """Crystals by id and rejects by index; anything but a `Reject` propagates."""
    crystals, rejects = {}, {}
    for position, record in enumerate(source.records()):
        assert record.index == position
        try:
            crystal = source.parse(record)
            crystals[crystal.id] = crystal
        except Reject as error:
            rejects[record.index] = error
    return crystals, rejects


def read(path: Path, **options: Any) -> tuple[dict[str, Crystal], dict[int, Reject]]:
    return everything(open_source(str(path), **options))


def packed(data: bytes, suffix: str) -> bytes:
    if suffix == ".gz":
        return gzip.compress(data)
    if suffix == ".zst":
        return zstandard.compress(data)
    if suffix == ".zip":
        stream = io.BytesIO()
        with zipfile.ZipFile(stream, "w", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr("inside.json", data)
        return stream.getvalue()
    return data


def mp_document(id: Any = "mp-22862", **labels: Any) -> dict[str, Any]:
    """The shape of a Materials Project summary document."""
    return {
        "builder_meta": {"emmet_version": "0.84", "license": "BY-C"},
        "nsites": 8,
        "material_id": id,
        "structure": HALITE.as_dict(),
        "band_gap": 5.0,
        "energy_above_hull": 0,
        "formation_energy_per_atom": None,
        "bulk_modulus": {"voigt": 24.0, "reuss": 23.0, "vrh": 23.5},
        "shear_modulus": None,
        "is_metal": False,
    } | labels


def jarvis_document(jid: str = "JVASP-23862", **changes: Any) -> dict[str, Any]:
    """The shape of an entry of JARVIS-DFT as published on figshare."""
    return {
        "jid": jid,
        "spg_number": 225,
        "formula": "NaCl",
        "formation_energy_peratom": -1.9,
        "func": "OptB88vdW",
        "optb88vdw_bandgap": 5.1,
        "mbj_bandgap": "na",
        "bulk_modulus_kv": 27.0,
        "shear_modulus_gv": "na",
        "ehull": 0.0,
        "atoms": {
            "lattice_mat": HALITE.lattice.matrix.tolist(),
            "coords": HALITE.frac_coords.tolist(),
            "elements": [site.specie.symbol for site in HALITE],
            "abc": [5.64, 5.64, 5.64],
            "angles": [90.0, 90.0, 90.0],
            "cartesian": False,
            "props": [""] * 8,
        },
    } | changes


def matbench_document(column: str, values: list[Any], index: list[Any]) -> dict[str, Any]:
    """The shape of a Matbench task: DataFrame.to_dict(orient="split")."""
    return {
        "index": index,
        "columns": ["structure", column],
        "data": [[CESIUM.as_dict(), value] for value in values],
    }


# --- JSON Lines ------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["a.jsonl", "a.ndjson", "a.json", "a.jsonl.gz", "a.jsonl.zst"])
def test_json_lines(tmp_path: Path, name: str) -> None:
    text = "\n".join(json.dumps(d) for d in (mp_document("mp-1"), mp_document("mp-2")))
    path = tmp_path / name
    path.write_bytes(packed(text.encode(), path.suffix))
    crystals, rejects = read(path)
    assert list(crystals) == ["mp-1", "mp-2"]
    assert not rejects
    crystal = crystals["mp-1"]
    assert crystal.reduced_formula == "ClNa"
    assert crystal.labels == {
        "band_gap": 5.0,
        "energy_above_hull": 0.0,
        "bulk_modulus": 23.5,
        "is_metal": 0.0,
    }
    description = open_source(str(path)).describe()
    assert (description["kind"], description["path"]) == ("jsonl", name)
    assert str(tmp_path) not in str(description)


@pytest.mark.parametrize(
    ("given", "wanted"),
    [
        ("mp-149", "mp-149"),
        ({"@module": "emmet.core.mpid", "@class": "MPID", "string": "mp-149"}, "mp-149"),
        ("MPID(mp-149)", "mp-149"),
        (149, "149"),
        (None, "a-0"),
        ("", "a-0"),
        ([1], "a-0"),
    ],
)
def test_ids_however_they_were_dumped(tmp_path: Path, given: Any, wanted: str) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps(mp_document(given)))
    assert list(read(path)[0]) == [wanted]


@pytest.mark.parametrize("value", [None, "na", "", float("nan"), float("inf"), {}, [1], 10**400])
def test_a_label_that_is_no_finite_number_is_absent(tmp_path: Path, value: Any) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps(mp_document("x", band_gap=value, bulk_modulus=12.5)))
    labels = read(path)[0]["x"].labels
    assert "band_gap" not in labels
    assert labels["bulk_modulus"] == 12.5


def test_broken_lines_are_rejects_and_the_rest_goes_on(tmp_path: Path) -> None:
    good = json.dumps(mp_document("mp-1")).encode()
    again = good.replace(b"mp-1", b"mp-9")
    bad = [b"{", b"\xff\xfe\x00", b"[]", b"7", b'{"a": 1}', b'{"structure": []}', b"[" * 100_000]
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"\n".join([good, *bad, b"", again]))
    crystals, rejects = read(path)
    assert list(crystals) == ["mp-1", "mp-9"]
    assert list(rejects) == list(range(1, 8))
    assert {e.stage for e in rejects.values()} == {"source"}
    assert "not JSON" in rejects[1].reason


def test_windows_line_ends_and_a_byte_order_mark(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    line = json.dumps(mp_document("mp-1")).encode()
    path.write_bytes(b"\xef\xbb\xbf" + line + b"\r\n\r\n" + line + b"\r\n")
    crystals, rejects = read(path)
    assert list(crystals) == ["mp-1"]
    assert not rejects


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.json.zst"])
def test_an_empty_file_has_no_records(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    path.write_bytes(packed(b"", path.suffix))
    assert list(open_source(str(path)).records()) == []


# --- broken streams --------------------------------------------------------------------------


def many(count: int, seed: int = 0) -> bytes:
    """JSON lines that do not compress away: their coordinates differ."""
    rng = np.random.default_rng(seed)
    documents = []
    for i in range(count):
        document = mp_document(f"mp-{i}")
        document["noise"] = rng.random(50).tolist()
        documents.append(json.dumps(document))
    return "\n".join(documents).encode()


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
@pytest.mark.parametrize("part", [0.3, 0.8, 0.999])
def test_truncated_compression_gives_what_was_whole(
    tmp_path: Path, suffix: str, part: float
) -> None:
    whole = packed(many(200), suffix)
    path = tmp_path / f"a.jsonl{suffix}"
    path.write_bytes(whole[: int(part * len(whole))])
    crystals, rejects = read(path)
    assert list(crystals) == [f"mp-{i}" for i in range(len(crystals))]
    assert abs(len(crystals) - 200 * part) < 60
    assert list(rejects) == [len(crystals)]
    assert rejects[len(crystals)].stage == "source"
    assert rejects[len(crystals)].reason.startswith("stream ends early")


@pytest.mark.parametrize("suffix", [".gz", ".zst", ".zip"])
def test_damage_in_the_middle_is_never_silent(tmp_path: Path, suffix: str) -> None:
    whole = bytearray(packed(many(100), suffix))
    middle = len(whole) // 2
    whole[middle : middle + 20] = b"\x00" * 20
    name = "a.json.zip" if suffix == ".zip" else f"a.jsonl{suffix}"
    path = tmp_path / name
    path.write_bytes(bytes(whole))
    _, rejects = read(path)
    assert rejects


def test_several_gzip_members_and_zstd_frames_are_one_stream(tmp_path: Path) -> None:
    line = json.dumps(mp_document("mp-1")).encode() + b"\n"
    for suffix in (".gz", ".zst"):
        path = tmp_path / f"a.jsonl{suffix}"
        path.write_bytes(packed(line, suffix) + packed(line.replace(b"mp-1", b"mp-2"), suffix))
        assert list(read(path)[0]) == ["mp-1", "mp-2"]


def test_a_cut_between_frames_is_told_from_a_cut_within(tmp_path: Path) -> None:
    path = tmp_path / "a.gz"
    path.write_bytes(gzip.compress(b"abc") + b"\0" * 512)
    assert b"".join(read_pieces(path)) == b"abc"
    path.write_bytes(gzip.compress(b"abc")[:-4])
    with pytest.raises(StreamBroken, match="cut off"):
        b"".join(read_pieces(path))


def test_a_line_without_end_does_not_fill_the_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("featurization.streams.MAX_ELEMENT", 100)
    with pytest.raises(StreamBroken, match="longer"):
        list(lines(b"x" * 30 for _ in range(10)))
    with pytest.raises(StreamBroken, match="longer"):
        list(json_elements(b'["' + b"x" * 30 for _ in range(10)))


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=6) | st.just('\\"[{,]}\\'),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=3), inner),
    max_leaves=12,
)


def cut(text: bytes, step: int) -> list[bytes]:
    return [text[i : i + step] for i in range(0, len(text), step)]


@settings(max_examples=50, deadline=None)
@given(st.lists(json_values), st.integers(1, 9), st.sampled_from([None, 1]), st.booleans())
def test_json_elements_against_the_parser(
    values: list[Any], step: int, indent: int | None, plain: bool
) -> None:
    text = json.dumps(values, indent=indent, ensure_ascii=plain).encode()
    found = [(key, json.loads(element)) for key, element in json_elements(cut(text, step))]
    assert found == [("", value) for value in values]


@settings(max_examples=50, deadline=None)
@given(st.dictionaries(st.sampled_from("abcd"), json_values), st.integers(1, 9))
def test_json_elements_of_an_object(document: dict[str, Any], step: int) -> None:
    text = json.dumps(document).encode()
    found = [(key, json.loads(element)) for key, element in json_elements(cut(text, step))]
    arrays = {key: value for key, value in document.items() if isinstance(value, list)}
    assert found == [(key, item) for key, value in arrays.items() for item in value]


@settings(max_examples=50, deadline=None)
@given(st.lists(json_values, min_size=1), st.data())
def test_a_cut_json_document_is_noticed(values: list[Any], data: st.DataObject) -> None:
    text = json.dumps(values).encode()
    end = data.draw(st.integers(1, len(text) - 1))
    found = []

    def consume() -> None:
        found.extend(json.loads(element) for _, element in json_elements([text[:end]]))

    with pytest.raises(StreamBroken, match="cut off"):
        consume()
    assert found == values[: len(found)]


# --- archives --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["jdft.json", "jdft.json.gz", "jdft.json.zip", "jdft.zip"])
@pytest.mark.parametrize("indent", [None, 2])
def test_jarvis(tmp_path: Path, name: str, indent: int | None) -> None:
    cartesian = jarvis_document("JVASP-2")
    cartesian["atoms"] |= {"coords": HALITE.cart_coords.tolist(), "cartesian": True}
    path = tmp_path / name
    text = json.dumps([jarvis_document("JVASP-1"), cartesian, {"jid": "JVASP-3"}], indent=indent)
    path.write_bytes(packed(text.encode(), path.suffix))
    crystals, rejects = read(path)
    assert list(crystals) == ["JVASP-1", "JVASP-2"]
    assert list(rejects) == [2]
    first, second = crystals.values()
    assert np.allclose(first.positions, second.positions)
    assert first.volume == pytest.approx(HALITE.volume)
    assert first.labels == {
        "band_gap": 5.1,
        "bulk_modulus": 27.0,
        "energy_above_hull": 0.0,
        "formation_energy_per_atom": -1.9,
    }


def test_a_list_of_materials_project_documents(tmp_path: Path) -> None:
    path = tmp_path / "dump.json"
    path.write_text(json.dumps([mp_document("mp-1"), 5, mp_document("mp-2")]))
    crystals, rejects = read(path)
    assert list(crystals) == ["mp-1", "mp-2"]
    assert list(rejects) == [1]


@pytest.mark.parametrize(
    ("column", "value", "wanted"),
    [
        ("log10(K_VRH)", 2.0, {"bulk_modulus": 100.0}),
        ("log10(G_VRH)", 1.0, {"shear_modulus": 10.0}),
        ("log10(G_VRH)", 1e9, {}),
        ("gap pbe", 1.5, {"band_gap": 1.5}),
        ("e_form", -1.0, {"formation_energy_per_atom": -1.0}),
        ("is_metal", True, {"is_metal": 1.0}),
        ("is_metal", False, {"is_metal": 0.0}),
        ("last phdos peak", 300.0, {"last_phdos_peak": 300.0}),
        ("n", None, {}),
    ],
)
def test_matbench_targets(tmp_path: Path, column: str, value: Any, wanted: dict[str, Any]) -> None:
    path = tmp_path / "matbench_x.json.gz"
    document = matbench_document(column, [value], [7])
    path.write_bytes(gzip.compress(json.dumps(document).encode()))
    crystals, rejects = read(path)
    assert not rejects
    assert crystals["mb-7"].labels == pytest.approx(wanted)
    assert crystals["mb-7"].reduced_formula == "ClCs"


def test_matbench_perovskite_energies_are_not_per_atom(tmp_path: Path) -> None:
    path = tmp_path / "matbench_perovskites.json"
    path.write_text(json.dumps(matbench_document("e_form", [2.5], [0])))
    assert read(path)[0]["mb-0"].labels == {"e_form": 2.5}


@pytest.mark.parametrize(
    "order",
    [["index", "columns", "data"], ["columns", "index", "data"], ["data", "columns", "index"]],
)
def test_matbench_keys_in_any_order(tmp_path: Path, order: list[str]) -> None:
    document = matbench_document("gap pbe", [1.0, 2.0, 3.0], ["mb-a", "mb-b", "mb-c"])
    path = tmp_path / "m.json"
    path.write_text(json.dumps({key: document[key] for key in order}))
    crystals, rejects = read(path)
    assert {k: c.labels["band_gap"] for k, c in crystals.items()} == {
        "mb-a": 1.0,
        "mb-b": 2.0,
        "mb-c": 3.0,
    }
    assert not rejects


def test_matbench_truncated(tmp_path: Path) -> None:
    text = json.dumps(matbench_document("gap pbe", [1.0] * 50, list(range(50))))
    path = tmp_path / "m.json"
    path.write_text(text[: len(text) // 2])
    crystals, rejects = read(path)
    assert 20 <= len(crystals) <= 25
    assert list(rejects) == [len(crystals)]
    assert "stream ends early" in rejects[len(crystals)].reason


def test_matbench_of_compositions_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "m.json"
    path.write_text('{"index": [0], "columns": ["composition", "gap expt"], "data": [["Si", 1]]}')
    with pytest.raises(UserError, match="structure"):
        open_source(str(path))


# --- folders and tables ----------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "structures"
    folder.mkdir()
    (folder / "halite.cif").write_text(str(CifWriter(HALITE, symprec=0.01)))
    (folder / "cesium.vasp").write_text(Poscar(CESIUM).get_str())
    (folder / "POSCAR_b").write_text(Poscar(HALITE).get_str())
    (folder / "README").write_text("not a structure")
    return folder


def test_a_folder_without_a_table(folder: Path) -> None:
    crystals, rejects = read(folder)
    assert list(crystals) == ["POSCAR_b", "cesium", "halite"]
    assert not rejects
    assert crystals["halite"].composition == {"Na": 4.0, "Cl": 4.0}
    assert not crystals["halite"].labels


def test_a_folder_with_a_table_without_header(folder: Path) -> None:
    (folder / "id_prop.csv").write_text(
        "halite,1.5\ncesium.vasp,na\nmissing,2\n../x,1\n\nPOSCAR_b\n"
    )
    crystals, rejects = read(folder, id_prop_label="band_gap")
    assert crystals["halite"].labels == {"band_gap": 1.5}
    assert crystals["cesium.vasp"].labels == {}
    assert [rejects[i].reason.split()[0] for i in (2, 3, 4)] == ["listed", "listed", "its"]
    assert read(folder)[0]["halite"].labels == {"target": 1.5}


def test_a_folder_with_a_table_with_header(folder: Path) -> None:
    table = "\ufeffid,K_VRH,Cost (USD)\nhalite,23.5,7\nPOSCAR_b,,x\n"
    (folder / "id_prop.csv").write_text(table, encoding="utf-8")
    crystals, rejects = read(folder)
    assert crystals["halite"].labels == {"bulk_modulus": 23.5, "cost_usd": 7.0}
    assert crystals["POSCAR_b"].labels == {}
    assert [e.reason for e in rejects.values()] == ["not listed in id_prop.csv"]


def test_which_of_several_files_a_row_means(folder: Path) -> None:
    for name in ("halite.poscar", "halite.vasp", "halite.cif.gz"):
        (folder / name).write_bytes((folder / "cesium.vasp").read_bytes())
    files = {}
    for id in ("halite", "halite.vasp", "halite.cif", "halite.cif.gz"):
        (folder / "id_prop.csv").write_text(f"{id},1\n")
        files[id] = next(open_source(str(folder)).records()).payload.path.name
    assert files.pop("halite") == "halite.cif"
    assert all(id == name for id, name in files.items())


def test_the_hash_of_a_folder_sees_names_and_contents(folder: Path) -> None:
    hashes = {open_source(str(folder)).describe()["sha256"]}
    assert open_source(str(folder)).describe()["sha256"] in hashes
    for change in (
        lambda: (folder / "cesium.vasp").write_text(Poscar(HALITE).get_str()),
        lambda: (folder / "cesium.vasp").rename(folder / "cesium2.vasp"),
        lambda: (folder / "id_prop.csv").write_text("halite,1\n"),
    ):
        change()
        hashes.add(open_source(str(folder)).describe()["sha256"])
    assert len(hashes) == 4


def test_the_hash_of_a_folder_is_over_names_sizes_and_contents(folder: Path) -> None:
    """As it was in every dataset made so far, whose unfinished runs it must let go on."""
    (folder / "id_prop.csv").write_text("halite,1\n")
    digest = hashlib.sha256()
    for name in ("POSCAR_b", "cesium.vasp", "halite.cif", "id_prop.csv"):
        data = (folder / name).read_bytes()
        digest.update(f"{name}\0{len(data)}\0{hashlib.sha256(data).hexdigest()}\n".encode())
    description = open_source(str(folder)).describe()
    assert description["sha256"] == digest.hexdigest()
    assert description["files"] == 3


@pytest.mark.parametrize("suffix", [".gz", ".zst", ".zip", ".GZ"])
def test_compressed_files_of_a_folder_are_read(folder: Path, suffix: str) -> None:
    plain = read(folder)[0]
    for path in sorted(folder.iterdir()):
        (folder / f"{path.name}{suffix}").write_bytes(packed(path.read_bytes(), suffix.lower()))
        path.unlink()
    crystals, rejects = read(folder)
    assert not rejects
    assert list(crystals) == list(plain) == ["POSCAR_b", "cesium", "halite"]
    for id, crystal in crystals.items():
        assert crystal.composition == plain[id].composition
        assert np.array_equal(crystal.positions, plain[id].positions)
    (folder / "id_prop.csv").write_text(f"halite.cif,1\ncesium,2\nPOSCAR_b{suffix},3\n")
    crystals, rejects = read(folder)
    assert [crystal.labels for crystal in crystals.values()] == [{"target": i} for i in (1, 2, 3)]
    assert not rejects
    single = everything(open_source(str(folder / f"halite.cif{suffix}")))[0]
    assert np.array_equal(single["halite"].positions, plain["halite"].positions)


def test_a_poscar_is_not_unpacked_for_how_it_begins(tmp_path: Path) -> None:
    """A zip file begins with PK, and so does a comment on potassium phosphide."""
    (tmp_path / "POSCAR").write_text(Poscar(CESIUM, comment="PK3").get_str())
    assert list(read(tmp_path)[0]) == ["POSCAR"]


def odd(folder: Path) -> dict[str, str]:
    """Put into a folder what cannot be read; id → how its reason begins."""
    (folder / "gone.cif").symlink_to(folder / "nowhere.cif")
    os.mkfifo(folder / "pipe.cif")
    (folder / "folder.cif").mkdir()
    (folder / "old.cif.bz2").write_bytes(b"BZh9")
    (folder / "cut.vasp.gz").write_bytes(gzip.compress(bytes(999))[:-9])
    (folder / "bomb.cif.gz").write_bytes(gzip.compress(bytes((64 << 20) + 1)))
    (folder / "more" / "deep").mkdir(parents=True)
    for name in ("a.cif", "b.vasp.gz", "README"):
        (folder / "more" / "deep" / name).touch()
    (folder / "link").symlink_to(folder / "more" / "deep")
    (folder / "more" / "round").symlink_to(folder)
    (folder / "self").symlink_to(".")
    (folder / "empty").mkdir()
    reasons = {
        "bomb": "file is larger than 8 MiB",
        "cut": "cannot be unpacked: the gzip data is cut off",
        "folder": "is no file",
        "gone": "is no file, or a link to nothing",
        "old": ".bz2 is not read",
        "pipe": "is no file",
        "more/deep/": "2 structure files in a sub-folder",
    }
    if Path("/proc/self/mem").exists():  # not even the superuser can read its beginning
        (folder / "locked.cif").symlink_to("/proc/self/mem")
        reasons["locked"] = "cannot be read: Input/output error"
    return reasons


def test_what_cannot_be_read_of_a_folder_is_a_reject(folder: Path) -> None:
    reasons = odd(folder)
    crystals, _ = read(folder)
    assert list(crystals) == ["POSCAR_b", "cesium", "halite"]
    found = {}
    for record in (source := open_source(str(folder))).records():
        if record.id not in crystals:
            with pytest.raises(Reject) as caught:
                source.parse(record)
            found[record.id] = caught.value.reason
    assert found.keys() == reasons.keys()
    assert all(found[id].startswith(reasons[id]) for id in reasons), found
    assert list(found)[-1] == "more/deep/"


def test_what_cannot_be_read_is_a_reject_with_a_table_too(folder: Path) -> None:
    odd(folder)
    (folder / "id_prop.csv").write_text("halite,1\ngone,2\n")
    records = list((source := open_source(str(folder))).records())
    assert [record.id for record in records[:2]] == ["halite", "gone"]
    rejects = everything(source)[1]
    assert "link to nothing" in rejects[1].reason
    reasons = [rejects[record.index].reason for record in records[2:]]
    nothing = {"README", "empty", "id_prop.csv", "link", "self"}
    assert len(reasons) == len(set(os.listdir(folder)) - nothing) - 2
    assert set(reasons[:-1]) == {"not listed in id_prop.csv"}
    assert "sub-folder" in reasons[-1]


def test_the_hash_of_a_folder_sees_what_cannot_be_read(folder: Path) -> None:
    hashes = []
    for change in (
        lambda: None,
        lambda: (folder / "gone.cif").symlink_to("nowhere"),
        lambda: (folder / "more").mkdir(),
        lambda: (folder / "more" / "a.cif").touch(),
        lambda: (folder / "more" / "b.cif").touch(),
    ):
        change()
        hashes.append(open_source(str(folder)).describe()["sha256"])
    assert hashes[2] == hashes[1]  # an empty folder is nothing
    assert len(set(hashes)) == 4


def test_a_table_that_is_broken_further_down(folder: Path) -> None:
    rows = "halite,1\n" + "".join(f"no-{i},0\n" for i in range(5000))
    (folder / "id_prop.csv").write_bytes(rows.encode() + b"caf\xe9,1\n")
    source = open_source(str(folder))
    with pytest.raises(UserError, match="UTF-8"):
        source.describe()
    assert "id_prop.csv cannot be read" in list(everything(source)[1].values())[-1].reason
    (folder / "id_prop.csv").unlink()
    (folder / "id_prop.csv").symlink_to("nowhere")
    with pytest.raises(UserError, match=r"id_prop\.csv cannot be read"):
        open_source(str(folder))
    (folder / "id_prop.csv").unlink()
    os.mkfifo(folder / "id_prop.csv")  # opened, it would wait for a writer
    with pytest.raises(UserError, match=r"id_prop\.csv cannot be read: is no file"):
        open_source(str(folder))


def test_the_index_of_a_folder_gives_its_records(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    odd(folder)
    os.close(os.open(os.fsencode(folder) + b"/odd-\xff.cif", os.O_CREAT))
    table = "id,band_gap\nhalite,0.1\ncesium,1e-17\nnothing,2\nPOSCAR_b\n"
    for name in ("README", "id_prop.csv"):  # without a table, and with one
        (folder / name).write_text(table)
        source = open_source(str(folder))
        index = build_index(source, tmp_path)
        assert index == Index(len(list(source.records())), None)
        with monkeypatch.context() as others:
            others.setattr(os, "walk", None)
            other = open_source(str(folder))
            others.setattr(os, "scandir", None)  # it is not listed again
            found = list(Records(other, tmp_path, index).read(0, 99))
        assert found == list(source.records())
        assert [record.index for record in found] == list(range(index.count))


@pytest.mark.parametrize("change", ["grow", "vanish", "edit"])
def test_a_folder_that_changes_meanwhile(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: str
) -> None:
    """A new file belongs to another source; one that is not what it was ends the run."""
    expected = run(folder, tmp_path / "expected")["content_hash"]
    original = worker.standardize

    def standardize(crystal: Crystal, *arguments: Any) -> Any:
        if crystal.id == "POSCAR_b" and change == "grow":
            (folder / "late.vasp").write_text(Poscar(CESIUM).get_str())
        elif crystal.id == "POSCAR_b" and change == "vanish":
            (folder / "halite.cif").unlink()
        elif crystal.id == "POSCAR_b":
            (folder / "POSCAR_b").write_text(Poscar(CESIUM).get_str())
        return original(crystal, *arguments)

    monkeypatch.setattr(worker, "standardize", standardize)
    if change != "grow":
        with pytest.raises(RunFailed, match="files of the source changed"):
            run(folder, tmp_path / "out")
        return
    assert run(folder, tmp_path / "out")["content_hash"] == expected
    with pytest.raises(UserError, match=r"source\.files: 3 there, 4 asked for"):
        run(folder, tmp_path / "out")


# Ranks other than 0 fail if they list the source; its first entry tells that there is something.
LISTED_ONCE = """
import os, sys
import xtal
from cluster.mpi import ranks

source, scandir, listdir = sys.argv[2], os.scandir, os.listdir

class First:
    def __init__(self, entries):
        self.entries, self.left = entries, 1

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.entries.close()

    def __iter__(self):
        return self

    def __next__(self):
        self.left -= 1
        if self.left < 0:
            raise RuntimeError("listed again")
        return next(self.entries)

if ranks().rank:
    os.scandir = lambda path=".": First(scandir(path)) if str(path) == source else scandir(path)
    os.listdir = lambda path=".": listdir(None if str(path) == source else path)
xtal.main()
"""


@needs_mpi
def test_a_folder_on_many_ranks_is_listed_by_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Begun by one process, finished by three, within the source: what one process gives."""
    source, out = tmp_path / "in", tmp_path / "in" / "many"
    source.mkdir()
    reasons = odd(source)
    for i in range(24):
        cell = Structure(Lattice.cubic(4 + i / 50), ["Cs", "Cl"], [[0, 0, 0], [0.5, 0.5, 0.5]])
        name = f"c{i % 20}.{'poscar' if i < 20 else 'vasp'}"
        (source / name).write_text(Poscar(cell).get_str())
    config = SMALL.model_copy(update={"shard_structures": 2})
    settings = tmp_path / "c.toml"
    settings.write_text('selection = "miller:2"\nshard_structures = 2\n')

    def killed(crystal: Crystal, *_: Any) -> Any:
        if crystal.id == "c5":
            raise KeyboardInterrupt
        return standardize(crystal, *_)

    standardize = worker.standardize
    with monkeypatch.context() as first:
        first.setattr(worker, "standardize", killed)
        with pytest.raises(KeyboardInterrupt):
            run(source, out, config)
    assert list((out / "shards").iterdir())
    done = mpi(3, "-c", LISTED_ONCE, "featurize", source, out, "--config", settings)
    assert done.returncode == 0, done.stderr
    run(source, tmp_path / "one", config)
    assert core(out) == core(tmp_path / "one")
    assert core(out)["structures"] == 20
    rows = {row[0]: row[2] for row in read_rejects(out / "rejects.csv")}
    doubles = {id for id, reason in rows.items() if reason.startswith("duplicate id")}
    assert doubles == {"c0", "c1", "c2", "c3"}
    assert rows.keys() - doubles == reasons.keys()
    assert verify(out, [str(source)])["problems"] == []


def test_one_file_is_a_source(folder: Path) -> None:
    assert list(read(folder / "halite.cif")[0]) == ["halite"]
    assert list(read(folder / "POSCAR_b")[0]) == ["POSCAR_b"]
    (folder / "latin.cif").write_bytes((folder / "halite.cif").read_bytes() + b"# G\xf6ttingen\n")
    assert list(read(folder / "latin.cif")[0]) == ["latin"]


def mp20(rows: list[list[str]]) -> bytes:
    stream = io.StringIO()
    writer = csv.writer(stream)
    writer.writerows(rows)
    header = (
        ",material_id,formation_energy_per_atom,band_gap,pretty_formula,e_above_hull,elements,"
        "cif,spacegroup.number\r\n"
    )
    return (header + stream.getvalue()).encode()


def mp20_row(id: str = "mp-1") -> list[str]:
    cif = str(CifWriter(CESIUM))
    return ["0", id, "-2.0", "5.5", "CsCl", "0.01", "['Cs', 'Cl']", cif, "221"]


@pytest.mark.parametrize("suffix", ["", ".gz", ".zst"])
def test_mp20_table(tmp_path: Path, suffix: str) -> None:
    rows = [mp20_row("mp-1"), ["short"], mp20_row("mp-2")]
    rows[2][7] = rows[2][7].replace("Cs", "Zz")
    path = tmp_path / f"train.csv{suffix}"
    path.write_bytes(packed(mp20([*rows, mp20_row("mp-4")]), suffix))
    crystals, rejects = read(path)
    assert list(crystals) == ["mp-1", "mp-4"]
    assert crystals["mp-4"].labels == {
        "formation_energy_per_atom": -2.0,
        "band_gap": 5.5,
        "energy_above_hull": 0.01,
    }
    assert list(rejects) == [1, 2]
    assert "row of 1 fields" in rejects[1].reason
    assert "unknown element" in rejects[2].reason


def test_a_row_that_is_not_utf8_is_a_reject(tmp_path: Path) -> None:
    data = mp20([mp20_row("mp-1"), mp20_row("mp-2"), mp20_row("mp-3")])
    half = data.index(b"_cell_length_a", data.index(b"mp-2"))
    path = tmp_path / "a.csv"
    path.write_bytes(data[:half] + b"\xff" + data[half:])
    crystals, rejects = read(path)
    assert list(crystals) == ["mp-1", "mp-3"]
    assert "UTF-8" in rejects[1].reason


def test_an_open_quote_is_not_silent(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_bytes(mp20([mp20_row("mp-1")]) + b'1,mp-2,"')
    crystals, rejects = read(path)
    assert list(crystals) == ["mp-1"]
    assert "CSV" in rejects[1].reason


# --- what is refused -------------------------------------------------------------------------


def test_unknown_sources_are_explained(tmp_path: Path) -> None:
    (tmp_path / "a.xyz").write_text("1")
    (tmp_path / "a.csv").write_text("id,value\n1,2\n")
    (tmp_path / "a.json").write_text('{\n "structure": 1\n}')
    (tmp_path / "a.zip").write_bytes(b"PK no zip")
    with zipfile.ZipFile(tmp_path / "two.zip", "w") as archive:
        archive.writestr("a.json", "[]")
        archive.writestr("b.json", "[]")
    (tmp_path / "empty").mkdir()
    for name in ("a.xyz", "a.csv", "a.json", "a.zip", "two.zip", "empty", "nothing.jsonl"):
        with pytest.raises(UserError, match=name) as caught:
            open_source(str(tmp_path / name))
        assert caught.value.remedy
    (tmp_path / "empty" / "a.cif").write_text("x")
    (tmp_path / "empty" / "id_prop.csv").write_text("a,1,2\n")
    with pytest.raises(UserError, match="no header"):
        open_source(str(tmp_path / "empty"))


# --- fuzz and real data ----------------------------------------------------------------------


def formats() -> dict[str, Callable[[], bytes]]:
    documents = [mp_document("mp-1"), mp_document("mp-2")]
    return {
        "f.jsonl": lambda: "\n".join(map(json.dumps, documents)).encode(),
        "f.jsonl.gz": lambda: gzip.compress("\n".join(map(json.dumps, documents)).encode()),
        "f.jsonl.zst": lambda: zstandard.compress(many(3)),
        "list.json": lambda: json.dumps([jarvis_document("a"), jarvis_document("b")]).encode(),
        "m.json": lambda: json.dumps(matbench_document("e_form", [1, 2], [0, 1])).encode(),
        "m.json.zip": lambda: packed(json.dumps([jarvis_document()]).encode(), ".zip"),
        "f.csv": lambda: mp20([mp20_row("mp-1"), mp20_row("mp-2")]),
        "f.cif": lambda: str(CifWriter(HALITE, symprec=0.01)).encode(),
        "POSCAR": lambda: Poscar(HALITE).get_str().encode(),
    }


@pytest.mark.parametrize("name", formats())
def test_mutated_bytes_give_crystals_or_rejects(tmp_path: Path, name: str) -> None:
    original = formats()[name]()
    path = tmp_path / name
    generator = random.Random(name)
    outcomes = {"crystals": 0, "rejects": 0, "refused": 0}
    for _ in range(100):
        data = bytearray(original)
        for _ in range(generator.choice([1, 1, 2, 5, 30])):
            start = generator.randrange(len(data))
            match generator.randrange(5):
                case 0:
                    data[start] = generator.randrange(256)
                case 1:
                    data[start] = ord(generator.choice("0123456789-.eE \n\"',[]{}xNa"))
                case 2:
                    del data[start : start + generator.randrange(1, 20)]
                case 3:
                    data[start:start] = data[start // 2 : start // 2 + generator.randrange(1, 40)]
                case 4:
                    data[start:start] = generator.choice([b"nan", b"1e999", b"-", b"\0", b"9" * 30])
            data = data or bytearray(b" ")
        path.write_bytes(bytes(data))
        try:
            source = open_source(str(path))
        except UserError:
            outcomes["refused"] += 1
            continue
        crystals, rejects = everything(source)
        outcomes["crystals"] += len(crystals)
        outcomes["rejects"] += len(rejects)
        for crystal in crystals.values():
            assert np.isfinite(crystal.positions).all()
            assert np.isfinite(list(crystal.labels.values())).all()
            assert len(crystal.species) == len(crystal.site) == len(crystal.occupancy)
    assert outcomes["rejects"] + outcomes["refused"] > 10


@pytest.mark.skipif(not DATA.exists(), reason="real data (../shared/data) is not there")
@pytest.mark.parametrize(("name", "count"), [("mp_elastic", 7869), ("mp_other", 4000)])
def test_real_documents(name: str, count: int) -> None:
    source = open_source(str(DATA / f"{name}.jsonl.gz"))
    total = 0
    for record in itertools.islice(source.records(), 2 * count if name == "mp_elastic" else count):
        total += 1
        if record.index % 20 == 0:
            crystal = source.parse(record)
            assert crystal.id == record.id != ""
            document = json.loads(record.payload)
            assert len(crystal.species) == document["nsites"]
            for label in ("band_gap", "energy_above_hull", "formation_energy_per_atom"):
                assert crystal.labels.get(label) == document.get(label)
            moduli = document.get("bulk_modulus", {}), document.get("shear_modulus", {})
            assert crystal.labels.get("bulk_modulus") == moduli[0].get("vrh")
            assert crystal.labels.get("shear_modulus") == moduli[1].get("vrh")
    assert total == count
