"""Scattering of single atoms: published values and the Mott–Bethe relation between two tables."""

from dataclasses import replace
from pathlib import Path

import gemmi
import h5py
import numpy as np
import pytest
from crystals import gemmi_scattering, perovskite, random_crystal

from cluster.config import build_config
from cluster.errors import UserError
from featurization.cells import symmetry_of
from featurization.cloud import diffraction_cloud
from featurization.config import FeaturizationConfig
from featurization.crystal import Reject
from featurization.radiation import UNITS, form_factors
from featurization.shards import Entry, read_shard, write_shard
from featurization.virtual import write_virtual

ELEMENTS = [gemmi.Element(z).name for z in range(1, 99)]


@pytest.mark.parametrize("radiation", ["xray", "electron"])
def test_every_element_agrees_with_gemmi(radiation: str) -> None:
    # gemmi evaluates in float32.
    q = np.linspace(0.0, 4.0, 21)
    expected = [gemmi_scattering(name, q * q / 4, radiation) for name in ELEMENTS]
    np.testing.assert_allclose(form_factors(ELEMENTS, q, radiation), expected, rtol=1e-5, atol=1e-5)


def test_x_rays_see_all_electrons_forwards() -> None:
    f0 = form_factors(ELEMENTS, np.zeros(1), "xray")[:, 0]
    # The fits of IT92 miss Z by up to 0.06 e (Tl).
    np.testing.assert_allclose(f0, np.arange(1, 99), atol=0.06)
    # The paper's parametrization has Z built in.
    paper = form_factors(ELEMENTS, np.zeros(1), "xray_pymatgen")[:, 0]
    np.testing.assert_array_equal(paper, np.arange(1, 99))


def test_neutron_lengths_are_those_of_sears() -> None:
    # Bound coherent scattering lengths in fm, V. F. Sears, Neutron News 3 (1992) 26.
    published = {
        "H": -3.7390,
        "D": 6.671,
        "Li": -1.90,
        "C": 6.6460,
        "N": 9.36,
        "O": 5.803,
        "Al": 3.449,
        "Si": 4.1491,
        "Ti": -3.438,
        "V": -0.3824,
        "Mn": -3.73,
        "Fe": 9.45,
        "Ni": 10.3,
        "U": 8.417,
    }
    b = form_factors(list(published), np.array([0.0, 0.7, 3.0]), "neutron")
    np.testing.assert_allclose(b, np.array(list(published.values()))[:, None].repeat(3, 1))


def test_electrons_and_x_rays_obey_mott_bethe() -> None:
    # f_e = (m e² / 8π ε₀ h²) (Z − f_x) / s², 0.0239337 Å⁻¹: two tables fitted apart. At small s
    # the difference Z − f_x amplifies the error of IT92's fit, so 0.25 ≤ s ≤ 1.5 1/Å; even there
    # the alkalis differ by 8 %, and IT92's hydrogen is the bonded one.
    q = np.linspace(0.5, 3.0, 26)
    z = np.arange(1, 99)[:, None]
    expected = 0.0239337 * (z - form_factors(ELEMENTS, q, "xray")) / (q * q / 4)
    ratio = form_factors(ELEMENTS, q, "electron") / expected
    assert np.abs(np.median(ratio) - 1.0) < 5e-4
    worst = np.abs(ratio - 1.0).max(axis=1)
    assert np.median(worst) < 0.01
    assert worst[1:].max() < 0.08
    assert worst[0] < 0.16
    # Teeth: |q| = 2s mistaken for s is far outside.
    mistaken = form_factors(ELEMENTS, q, "electron") / (expected / 4)
    assert np.abs(mistaken - 1.0).min() > 1.0


def test_the_two_x_ray_tables_are_of_the_same_atoms() -> None:
    q = np.linspace(0.0, 1.2, 25)
    difference = form_factors(ELEMENTS, q, "xray_pymatgen") - form_factors(ELEMENTS, q, "xray")
    z = np.arange(1, 99)
    assert np.abs(np.median(difference / z[:, None])) < 1e-3
    assert (np.abs(difference).max(axis=1) / z).max() < 0.1


def test_deuterium_is_hydrogen_except_to_neutrons() -> None:
    q = np.linspace(0.0, 2.0, 9)
    for radiation in UNITS:
        hydrogen, deuterium = form_factors(["H", "D"], q, radiation)
        assert (hydrogen == deuterium).all() == (radiation != "neutron")


def test_x_ray_scattering_falls_and_keeps_the_order_of_species() -> None:
    q = np.linspace(0.0, 1.5, 16)
    f = form_factors(["O", "Ti", "O"], q, "xray")
    assert f.shape == (3, 16)
    assert (np.diff(f, axis=1) < 0).all()
    np.testing.assert_array_equal(f[0], f[2])
    assert (f[1] > f[0]).all()


@pytest.mark.parametrize("radiation", list(UNITS))
@pytest.mark.parametrize("name", ["X", "Qq", "Es"])
def test_what_no_table_knows_is_rejected(name: str, radiation: str) -> None:
    with pytest.raises(Reject, match=name) as caught:
        form_factors(["O", name], np.zeros(1), radiation)
    assert caught.value.stage == "diffraction"


def test_an_element_without_neutron_data_is_rejected() -> None:
    with pytest.raises(Reject, match="no neutron scattering length for Po"):
        form_factors(["Po"], np.zeros(1), "neutron")


@pytest.mark.parametrize("also", [["xray"], ["neutron", "electron", "neutron"]])
def test_a_radiation_given_twice_is_an_error(also: list[str]) -> None:
    with pytest.raises(UserError, match=f"also_radiation: {also[0]} given twice") as caught:
        build_config(FeaturizationConfig, {"also_radiation": also}, where="flags")
    assert "also_radiation lists others, each once" in caught.value.problem
    one = build_config(FeaturizationConfig, {"also_radiation": ["neutron"]}, where="flags")
    assert one.also_radiation == ("neutron",)


def test_all_radiations_reach_the_shard_and_the_virtual_file(tmp_path: Path) -> None:
    config = FeaturizationConfig(
        selection="miller:2", radiation="electron", also_radiation=("xray", "neutron")
    )
    entries = [
        Entry(
            id=str(number),
            group="",
            formula="",
            source_index=number,
            cloud=diffraction_cloud(crystal, config),
            lattice=crystal.lattice,
            symmetry=symmetry_of(1),
            labels={},
        )
        for number, crystal in enumerate((perovskite(), random_crystal(3)))
    ]
    rows = [write_shard(tmp_path / "shards" / f"{e.id}.h5", [e], config) for e in entries]
    write_virtual(tmp_path, rows, config)
    with h5py.File(tmp_path / "dataset.h5") as file:
        for row, name in enumerate(("xray", "neutron")):
            column = file[f"intensity_{name}"]
            assert column.dtype == np.float32
            assert column.attrs["units"] == f"({UNITS[name]}/Å³)²"
            stored = np.concatenate([e.cloud.also[row] for e in entries])
            np.testing.assert_array_equal(column[:], stored)
        assert file["intensity"].attrs["units"] == "(Å/Å³)²"
        assert "intensity_electron" not in file
    for row, entry in zip(rows, entries, strict=True):
        (read,) = read_shard(tmp_path / row["file"])
        np.testing.assert_array_equal(read.cloud.also, entry.cloud.also)
        assert read.digest() == entry.digest() == int(row["content_hash"], 16)
        louder = replace(entry.cloud, also=entry.cloud.also * np.float32(1.001))
        assert replace(entry, cloud=louder).digest() != entry.digest()


def test_a_shard_of_one_radiation_has_one_column(tmp_path: Path) -> None:
    config = FeaturizationConfig(selection="miller:1")
    cloud = diffraction_cloud(perovskite(), config)
    entry = Entry("a", "", "", 0, cloud, perovskite().lattice, symmetry_of(221), {})
    write_shard(tmp_path / "a.h5", [entry], config)
    with h5py.File(tmp_path / "a.h5") as file:
        assert [name for name in file if name.startswith("intensity")] == ["intensity"]
    (read,) = read_shard(tmp_path / "a.h5")
    assert read.cloud.also.shape == (0, 14)
    assert read.digest() == entry.digest()
