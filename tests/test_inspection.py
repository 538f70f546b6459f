"""What a dataset holds, and the reflections of a crystal, against gemmi's groups and by hand."""

import gzip
import json
import math
import shutil
from collections import Counter
from pathlib import Path

import gemmi
import h5py
import moyopy
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tiny import broken, command, document, run, write_lines

from cluster.errors import UserError
from featurization import inspection, inspection_figure, reflections
from featurization.config import FeaturizationConfig
from featurization.inspection import inspect_crystal, inspect_dataset, read_diffraction
from featurization.manifest import read_manifest
from featurization.shards import read_shard

DATA = Path(__file__).parents[2] / "shared" / "data"
CONVENTIONAL = FeaturizationConfig(cell="conventional", selection="sphere:0.8")


def pyrite():
    """FeS2, Pa-3: Laue class m-3, so that 321 and 231 are not equivalent."""
    u, a = 0.385, 5.418
    ops = gemmi.find_spacegroup_by_number(205).operations()
    places = {"Fe": [0.0, 0.0, 0.0], "S": [u, u, u]}
    sites = []
    for name, place in places.items():
        images = {tuple(round(x % 1, 6) % 1 for x in op.apply_to_xyz(place)) for op in ops}
        sites += [{"species": [{"element": name, "occu": 1}], "abc": xyz} for xyz in images]
    assert len(sites) == 12
    lattice = {"matrix": (np.eye(3) * a).tolist()}
    return {"material_id": "pyrite", "structure": {"lattice": lattice, "sites": sites}}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Two cesium chlorides, a pyrite with one label, and a reject, in conventional cells."""
    place = tmp_path_factory.mktemp("inspection")
    lines = [
        document("mp-12345", band_gap=5.0),
        document("mp-12346", 3.9, ("Cs", "Br"), band_gap=4.0),
        pyrite() | {"band_gap": 0.9, "energy_above_hull": 0.01},
        broken("empty"),
    ]
    run(write_lines(place / "source.jsonl", lines), place / "out", CONVENTIONAL)
    return place / "out"


@pytest.fixture(scope="module")
def prototypes(tmp_path_factory):
    """Two prototypes of each crystal system, in conventional and in Niggli cells."""
    place = tmp_path_factory.mktemp("prototypes")
    for cell in ("conventional", "niggli"):
        chosen = CONVENTIONAL.model_copy(update={"cell": cell})
        run("prototypes:14", place / cell, chosen)
    return place


def ids_of(folder):
    with h5py.File(folder / "dataset.h5") as file:
        return list(file["id"].asstr()[:])


def rotations_of(number):
    """Rotations of a space group in its standard conventional cell, from gemmi's tables."""
    ops = gemmi.find_spacegroup_by_number(number).operations()
    matrices = {tuple(np.array(op.rot).ravel() // op.DEN) for op in ops.sym_ops}
    matrices |= {tuple(-x for x in matrix) for matrix in matrices}  # Friedel's law
    return np.array(sorted(matrices)).reshape(-1, 3, 3)


def bare_operations(one):
    cell = moyopy.Cell(one.lattice.tolist(), [[0.0, 0.0, 0.0]], [1])
    return np.array(moyopy.MoyoDataset(cell, symprec=1e-4).operations.rotations)


def check_against_tables(one):
    """Multiplicities of all reflections, and nothing listed twice."""
    group = rotations_of(one.symmetry.number)
    assert len(reflections.laue_operations(one)) == len(group)
    seen = Counter()
    for row in reflections.reflections(one):
        orbit = {tuple(np.array(row["hkl"]) @ matrix) for matrix in group}
        assert row["multiplicity"] == len(orbit), row
        seen[max(orbit)] += 1
    assert set(seen.values()) == {1}


# --- reflections ---------------------------------------------------------------------------------


def test_equivalents_are_those_of_the_tables(prototypes):
    folder = prototypes / "conventional"
    classes = set()
    for id_ in ids_of(folder):
        one = read_diffraction(folder, id_)
        classes.add(one.symmetry.point_group)
        check_against_tables(one)
    assert len(classes) > 7


def test_equivalents_of_real_crystals(tmp_path):
    source = DATA / "mp_elastic.jsonl.gz"
    if not source.is_file():
        pytest.skip("../shared/data is not there")
    with gzip.open(source, "rt") as stream:
        lines = [next(stream) for _ in range(30)]
    (tmp_path / "some.jsonl").write_text("".join(lines))
    run(tmp_path / "some.jsonl", tmp_path / "out", CONVENTIONAL)
    for id_ in ids_of(tmp_path / "out"):
        check_against_tables(read_diffraction(tmp_path / "out", id_))


def test_the_cell_does_not_matter(prototypes):
    """|q|, intensity and multiplicity are physics, indices are not."""
    for id_ in ids_of(prototypes / "niggli"):
        lists = []
        for cell in ("conventional", "niggli"):
            rows = reflections.reflections(read_diffraction(prototypes / cell, id_))
            lists.append(sorted((round(r["q"], 6), r["multiplicity"]) for r in rows))
        assert lists[0] == lists[1], id_


def test_pyrite_keeps_321_and_231_apart(folder, monkeypatch):
    """312 is what 231 becomes by a cyclic permutation."""
    one = read_diffraction(folder, "pyrite")
    rows = {tuple(row["hkl"]): row for row in reflections.reflections(one)}
    assert rows[3, 2, 1]["multiplicity"] == rows[3, 1, 2]["multiplicity"] == 24
    assert rows[3, 2, 1]["q"] == pytest.approx(rows[3, 1, 2]["q"])
    assert rows[3, 2, 1]["intensity"] != pytest.approx(rows[3, 1, 2]["intensity"], rel=0.1)
    assert rows[1, 1, 1]["multiplicity"] == 8
    # Without a look at the intensities they would be one.
    monkeypatch.setattr(reflections, "laue_operations", bare_operations)
    merged = {tuple(row["hkl"]): row for row in reflections.reflections(one)}
    assert merged[3, 2, 1]["multiplicity"] == 48
    assert (3, 1, 2) not in merged


def test_cesium_chloride_by_hand(folder):
    """a = 4 Å; the strongest reflection of CsCl's powder pattern is 110."""
    answer = inspect_crystal(read_diffraction(folder, "mp-12345"))
    assert answer["formula"] == "ClCs"
    assert answer["space_group"]["symbol"] == "Pm-3m"
    assert answer["cell"] == pytest.approx(
        {"a": 4, "b": 4, "c": 4, "alpha": 90, "beta": 90, "gamma": 90, "volume": 64}
    )
    assert answer["labels"] == {"band_gap": {"value": 5.0, "unit": "eV"}}
    assert answer["origin"] == pytest.approx((72 / 64) ** 2, rel=1e-3)  # Z: 55 + 17
    row = next(row for row in answer["reflections"] if row["hkl"] == [1, 1, 0])
    assert row["multiplicity"] == 12
    assert row["q"] == pytest.approx(math.sqrt(2) / 4)
    assert row["d"] == pytest.approx(4 / math.sqrt(2))
    # 300 and 221 share one line.
    line = next(each for each in answer["powder"] if each["q"] == pytest.approx(0.75))
    both = [row for row in answer["reflections"] if row["q"] == pytest.approx(0.75)]
    assert sorted(row["multiplicity"] for row in both) == [6, 24]
    total = sum(row["intensity"] * row["multiplicity"] for row in both)
    assert line["intensity"] == pytest.approx(total)


def test_nothing_is_lost_on_the_way_to_the_powder_pattern(prototypes):
    folder = prototypes / "niggli"
    entries = [e for r in read_manifest(folder)["shards"] for e in read_shard(folder / r["file"])]
    for entry in entries:
        stored = entry.cloud.intensity.astype(np.float64) * entry.cloud.multiplicity
        total = stored[entry.cloud.hkl.any(axis=1)].sum()
        answer = inspect_crystal(read_diffraction(folder, entry.id))
        assert sum(line["intensity"] for line in answer["powder"]) == pytest.approx(total)
        rows = answer["reflections"]
        strengths = [row["intensity"] * row["multiplicity"] for row in rows]
        assert sum(strengths) == pytest.approx(total, rel=1e-3)
        assert strengths == sorted(strengths, reverse=True)
        assert sum(row["multiplicity"] for row in rows) == 2 * (answer["points"] - 1)
        lengths = [line["q"] for line in answer["powder"]]
        assert (np.diff(lengths) > 1e-7).all()  # equal |q| are one line, whatever their rounding


def test_a_crystal_with_the_origin_only(tmp_path):
    few = CONVENTIONAL.model_copy(update={"selection": "sphere:0.1"})
    run(write_lines(tmp_path / "a.jsonl", [document("a")]), tmp_path / "out", few)
    answer = inspect_crystal(read_diffraction(tmp_path / "out", "a"))
    assert (answer["points"], answer["reflections"], answer["powder"]) == (1, [], [])
    inspection_figure.write_picture(read_diffraction(tmp_path / "out", "a"), tmp_path / "a.png")


numbers = st.floats(-6, 6).map(lambda x: round(x, 3))


@settings(max_examples=30, deadline=None)
@given(st.lists(numbers, min_size=9, max_size=9), st.integers(1, 4), st.data())
@example([0.0] * 9, 2, None)
def test_a_miller_cube_is_complete_as_far_as_it_is_said_to_be(folder, entries, limit, data):
    lattice = np.array(entries).reshape(3, 3) + 5 * np.eye(3)
    if abs(np.linalg.det(lattice)) < 1:
        return
    one = read_diffraction(folder, "pyrite")
    config = FeaturizationConfig(selection=f"miller:{limit}")
    one = reflections.Diffraction(
        **{name: getattr(one, name) for name in one.__slots__}
        | {"config": config, "lattice": lattice}
    )
    indices = st.lists(st.integers(-9, 9), min_size=3, max_size=3)
    outside = data.draw(indices) if data else [limit + 1, 0, 0]
    if max(map(abs, outside)) > limit:
        assert np.linalg.norm(outside @ one.reciprocal) >= one.complete_to * (1 - 1e-12)
    if (lattice == np.diag(np.diag(lattice))).all():
        assert one.complete_to == pytest.approx((limit + 1) / np.abs(lattice).max())


# --- the dataset ---------------------------------------------------------------------------------


def test_a_dataset_is_summed_up(folder):
    answer = inspect_dataset(folder)
    assert (answer["structures"], answer["rejected"]) == (3, 1)
    assert sum(answer["reject_stages"].values()) == 1
    assert {k: n for k, n in answer["crystal_systems"].items() if n} == {"cubic": 3}
    assert answer["space_groups"] == [
        {"number": 221, "symbol": "Pm-3m", "structures": 2},
        {"number": 205, "symbol": "Pa-3", "structures": 1},
    ]
    assert answer["labels"] == {
        "band_gap": {"known": 3, "min": 0.9, "median": 4.0, "max": 5.0, "unit": "eV"},
        "energy_above_hull": {
            "known": 1,
            "min": 0.01,
            "median": 0.01,
            "max": 0.01,
            "unit": "eV/atom",
        },
    }
    shards = [folder / row["file"] for row in read_manifest(folder)["shards"]]
    counts = [len(entry.cloud.hkl) for path in shards for entry in read_shard(path)]
    assert answer["points_a_crystal"] == {
        "known": 3,
        "min": min(counts),
        "median": sorted(counts)[1],
        "max": max(counts),
    }
    assert answer["points"] == sum(counts)
    assert answer["bytes"] == sum(p.stat().st_size for p in folder.rglob("*") if p.is_file())


@pytest.mark.parametrize("block", [1, 2, 100])
def test_each_id_is_found_in_whatever_block(folder, monkeypatch, block):
    monkeypatch.setattr(inspection, "_BLOCK", block)
    for id_, formula in (("mp-12345", "ClCs"), ("mp-12346", "BrCs"), ("pyrite", "FeS2")):
        assert read_diffraction(folder, id_).formula == formula


@pytest.mark.parametrize(
    ("typed", "remedy"),
    [
        ("mp-12354", "mp-12345"),
        ("pyrit", "nearest ids are pyrite"),
        ("qyrite", "nearest ids are pyrite"),
        ("mp-1234", "mp-12345, mp-12346"),
        ("?", "an id is mp-12345"),
        ("", "an id is mp-12345"),
    ],
)
def test_an_unknown_id_names_the_nearest(folder, typed, remedy):
    with pytest.raises(UserError, match="has no crystal") as caught:
        read_diffraction(folder, typed)
    assert repr(typed) in caught.value.problem
    assert remedy in caught.value.remedy.replace("mp-12346, mp-12345", "mp-12345, mp-12346")


def no_shard(folder):
    next((folder / "shards").iterdir()).unlink()


def no_virtual(folder):
    (folder / "dataset.h5").unlink()


def cut_short(folder):
    (folder / "dataset.h5").write_bytes((folder / "dataset.h5").read_bytes()[:700])


def no_column(folder):
    with h5py.File(folder / "dataset.h5", "r+") as file:
        del file["symmetry/number"]


@pytest.mark.parametrize("damage", [no_shard, no_virtual, cut_short, no_column])
def test_a_damaged_dataset_is_named_and_the_remedy_mends_it(folder, tmp_path, damage, monkeypatch):
    shutil.copytree(folder, tmp_path / "out")
    damage(tmp_path / "out")
    for look in (inspect_dataset, lambda out: read_diffraction(out, "pyrite")):
        with pytest.raises(UserError, match=r"is missing|cannot be read") as caught:
            look(tmp_path / "out")
        assert caught.value.remedy.startswith(f"xtal verify {tmp_path / 'out'} --repair makes")
    assert command(monkeypatch, "verify", tmp_path / "out", "--repair") == 0
    assert inspect_dataset(tmp_path / "out")["structures"] == 3


# --- the command ---------------------------------------------------------------------------------


@pytest.fixture
def shown(monkeypatch, capsys):
    """`xtal inspect WORDS` → exit code, stdout, stderr; on a terminal of 80 columns."""
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setenv("NO_COLOR", "1")

    def inspect(*words):
        capsys.readouterr()
        code = command(monkeypatch, "inspect", *words)
        return code, *capsys.readouterr()

    return inspect


def strict_json(text):
    def refuse(name):
        raise AssertionError(f"{name} is no JSON")

    return json.loads(text, parse_constant=refuse)


def test_tables_fit_80_columns(folder, prototypes, shown):
    for words in ([folder], [folder, "pyrite"], [prototypes / "niggli", "aflow-000000"]):
        code, out, err = shown(*words)
        assert (code, err) == (0, "")
        assert "\x1b" not in out
        assert "…" not in out  # nothing is cut off
        lines = [line for line in out.splitlines() if str(folder.parent) not in line]
        assert max(map(len, lines)) <= 80
    code, out, _ = shown(folder)
    for part in ("cubic 3", "Pm-3m 2, Pa-3 1", "band_gap", "0.9", "sphere:0.8", "xray", "jsonl"):
        assert part in out
    code, out, _ = shown(folder, "pyrite", "--top", "3")
    assert "Pa-3 (205), cubic, point group m-3" in out
    assert "5.4180, 5.4180, 5.4180" in out
    assert "3 of " in out


def test_json_has_everything(folder, shown):
    code, out, _ = shown(folder, "--json")
    assert code == 0
    assert strict_json(out) == strict_json(json.dumps(inspect_dataset(folder)))
    code, out, _ = shown(folder, "pyrite", "--json", "--top", "1")
    assert code == 0
    assert strict_json(out) == inspect_crystal(read_diffraction(folder, "pyrite"))


def test_other_radiations_are_more_columns(folder, tmp_path, shown):
    shutil.copytree(folder, tmp_path / "out")
    with h5py.File(tmp_path / "out" / "dataset.h5", "r+") as file:
        file["intensity_neutron"] = 7 + np.float32(2) * file["intensity"][:]
        file["intensity_electron"] = file["intensity"][:] * 12345
    one = read_diffraction(tmp_path / "out", "mp-12345")
    np.testing.assert_allclose(one.others["neutron"], 7 + 2 * one.intensity, rtol=1e-6)
    row = reflections.reflections(one)[0]
    point = (one.hkl == row["hkl"]).all(axis=1)
    assert row["intensity_neutron"] == one.others["neutron"][point][0]
    code, out, _ = shown(tmp_path / "out", "mp-12345")
    assert code == 0
    assert "neutron" in out
    assert "electron" in out
    assert "…" not in out
    assert max(map(len, out.splitlines())) <= 80


@pytest.mark.parametrize(
    ("name", "start"), [("a.png", b"\x89PNG"), ("b.svg", b"<?xml"), ("new/c.PDF", b"%PDF")]
)
def test_a_picture_is_written_where_it_was_asked_for(folder, tmp_path, shown, name, start):
    code, out, err = shown(folder, "pyrite", "--picture", tmp_path / name)
    assert code == 0, err
    assert f"picture: {tmp_path / name}" in out
    assert (tmp_path / name).read_bytes().startswith(start)
    assert [p for p in tmp_path.rglob("*") if p.is_file()] == [tmp_path / name]


def test_the_picture_shows_both_mates_and_the_basis(folder):
    one = read_diffraction(folder, "pyrite")
    figure = inspection_figure.crystal_figure(one)
    cloud, pattern = (axes for axes in figure.axes if axes.get_xlabel())
    x, y, z = cloud.collections[0]._offsets3d
    drawn = np.column_stack([x, y, z])
    assert len(drawn) == 2 * (one.intensity > 0).sum()
    np.testing.assert_allclose(drawn.sum(axis=0), 0, atol=1e-9)
    names = {text.get_text() for text in cloud.texts}
    assert names == {"a*", "b*", "c*"}
    assert cloud.get_xlim() == cloud.get_ylim() == cloud.get_zlim()
    q, height = pattern.lines[0].get_data()
    strongest = max(inspect_crystal(one)["powder"], key=lambda line: line["intensity"])
    assert q[np.argmax(height)] == pytest.approx(strongest["q"], abs=1e-3)
    assert height.max() == pytest.approx(100)
    assert "no Lorentz" in pattern.get_title()


def test_every_point_of_the_picture_can_be_seen(folder):
    def luminance(colour):
        parts = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in colour]
        return np.dot(parts, (0.2126, 0.7152, 0.0722))

    figure = inspection_figure.crystal_figure(read_diffraction(folder, "pyrite"))
    points = figure.axes[0].collections[0]
    assert points.get_sizes().min() >= 3
    palest = np.array(points.cmap(0.0)[:3])
    shown = 1 - points.get_alpha() * (1 - palest)  # on white
    assert 1.05 / (luminance(shown) + 0.05) > 1.6  # the contrast of WCAG


def test_a_failed_picture_leaves_the_old_one(folder, tmp_path, monkeypatch, shown):
    (tmp_path / "a.png").write_text("old")

    def fails(one):
        raise RuntimeError("no ink")

    monkeypatch.setattr(inspection_figure, "crystal_figure", fails)
    assert shown(folder, "pyrite", "--picture", tmp_path / "a.png")[0] == 1
    assert [p.read_text() for p in tmp_path.iterdir()] == ["old"]


@pytest.mark.parametrize(
    ("words", "problem"),
    [
        (["pyrite", "--picture", "a.gif"], "a.gif: no picture is written as '.gif'"),
        (["pyrite", "--picture", "noend"], "no picture is written as ''"),
        (["--picture", "a.png"], "--picture needs a crystal"),
        (["nobody"], "has no crystal 'nobody'"),
        (["pyrite", "--top", "0"], "--top"),
    ],
)
def test_bad_requests_write_nothing(folder, tmp_path, monkeypatch, shown, words, problem):
    monkeypatch.chdir(tmp_path)
    code, out, err = shown(folder, *words)
    assert (code, out) == (2, "")
    assert problem in err
    assert list(tmp_path.iterdir()) == []
