"""Source and licence of crystals, from the record of a fetch to all that is made of them."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
from databases import entry, materials, optimade, serving
from tiny import command, document, run, write_lines

from featurization import materials_project as mp
from featurization.attribution import KEYS, attribution
from featurization.crystal import ATTRIBUTION
from featurization.inspection import inspect_dataset
from featurization.manifest import read_manifest
from featurization.snapshot import record_of

UNKNOWN = "has no record of xtal fetch: its licence is that of its source"


@pytest.fixture
def fetched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Crystals of another provider than the Materials Project, with their record."""
    monkeypatch.setenv("NO_PROXY", "*")
    monkeypatch.setenv("COLUMNS", "100")
    file = tmp_path / "o.jsonl.gz"
    with serving(optimade([entry(n) for n in range(1, 8)])) as server:
        url = f"{server.url}/optimade"
        assert command(monkeypatch, "fetch", "optimade", url, "nelements=2", file) == 0
    return file


def featurized(monkeypatch: pytest.MonkeyPatch, file: Path, *words: str) -> dict[str, Any]:
    out = file.parent / "data"
    assert command(monkeypatch, "featurize", file, out, "--selection", "miller:2", *words) == 0
    return read_manifest(out)


def test_the_licence_of_a_provider_goes_with_its_crystals(fetched, monkeypatch, capsys):
    manifest, record = featurized(monkeypatch, fetched), json.loads(record_of(fetched).read_bytes())
    noted = {key: manifest["sources"][0][key] for key in KEYS if key in manifest["sources"][0]}
    assert noted == {
        "source": "OPTIMADE",
        "provider": "OQMD",
        "database_version": "1.7",
        "fetched": record["fetched"],
        "licence": "CC-BY-4.0",
    }
    said = manifest["attribution"]
    assert said == (
        f"o.jsonl.gz (OPTIMADE, OQMD, version 1.7, fetched {record['fetched'][:10]}): "
        "licence CC-BY-4.0."
    )
    folder = fetched.parent / "data"
    capsys.readouterr()
    assert command(monkeypatch, "inspect", folder, "--json") == 0
    assert json.loads(capsys.readouterr().out)["attribution"] == said
    assert command(monkeypatch, "inspect", folder) == 0
    assert "licence CC-BY-4.0" in re.sub(r"[│\s]+", " ", capsys.readouterr().out)


def test_a_repair_keeps_the_licence_though_the_record_is_gone(fetched, monkeypatch):
    before = featurized(monkeypatch, fetched)
    folder = fetched.parent / "data"
    record_of(fetched).unlink()
    assert featurized(monkeypatch, fetched) == before  # the same source, and nothing to do
    (folder / before["shards"][0]["file"]).unlink()
    assert command(monkeypatch, "verify", folder, "--repair") == 0
    after = read_manifest(folder)
    assert after["sources"] == before["sources"]
    assert after["attribution"] == before["attribution"]


def test_each_source_is_told_of(fetched, tmp_path, monkeypatch):
    featurized(monkeypatch, fetched)
    project = tmp_path / "mp.jsonl"
    given = write_lines(tmp_path / "given.jsonl", materials(3))
    assert command(monkeypatch, "fetch", "mp", project, "--from", given) == 0
    shutil.copy(project, fetched.parent / "mine.jsonl")  # without its record
    mine = write_lines(tmp_path / "mine.jsonl", [document("mine", 4.7)])
    for each in (project, mine):
        words = ("--selection", "miller:2", "--append")
        assert command(monkeypatch, "featurize", each, tmp_path / "data", *words) == 0
    manifest = read_manifest(tmp_path / "data")
    one, two, three = (attribution([each]) for each in manifest["sources"])
    assert manifest["attribution"] == f"{one} {two} {three}"
    assert "OQMD" in one
    assert ATTRIBUTION not in one
    assert two.startswith("mp.jsonl (Materials Project, fetched ")
    assert two.endswith(f"): licence CC BY 4.0. {ATTRIBUTION}")
    assert three == f"mine.jsonl (SHA-256 {manifest['sources'][2]['sha256']}) {UNKNOWN}."


@pytest.mark.parametrize(
    "record",
    [
        lambda file: None,
        lambda file: "not JSON",
        lambda file: "[]",
        lambda file: json.dumps(mp.ABOUT | {"sha256": 64 * "0"}),  # of the file as it was once
        lambda file: json.dumps(mp.ABOUT),
    ],
)
def test_without_a_record_of_just_this_file_no_licence_is_claimed(tmp_path, record):
    file = write_lines(tmp_path / "a.jsonl", [document("a")])
    if (text := record(file)) is not None:
        record_of(file).write_text(text)
    manifest = run(file, tmp_path / "data")
    assert UNKNOWN in manifest["attribution"]
    assert manifest["sources"][0]["sha256"] in manifest["attribution"]
    assert "CC BY" not in manifest["attribution"]
    assert not manifest["sources"][0].keys() & set(KEYS)


def test_prototypes_are_those_of_aflow(tmp_path):
    said = run("prototypes:2", tmp_path / "data")["attribution"]
    assert said == "AFLOW prototypes: M. J. Mehl et al., Comput. Mater. Sci. 136, S1 (2017)."


def test_an_older_manifest_is_told_of_by_what_it_has(tmp_path):
    run(write_lines(tmp_path / "a.jsonl", [document("a")]), tmp_path / "data")
    path = tmp_path / "data" / "manifest.json"
    manifest = json.loads(path.read_text())
    path.write_text(json.dumps(manifest | {"attribution": ATTRIBUTION}))
    assert UNKNOWN in inspect_dataset(tmp_path / "data")["attribution"]
