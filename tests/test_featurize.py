"""The driver: nothing is lost, nothing of others is touched, and half a folder is no dataset."""

import csv
import gzip
import json
import os
import shutil
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tiny import SMALL, broken, command, contents, document, process, run, write_lines

from cluster.errors import RunFailed, UserError
from cluster.files import append_line, whole_lines
from cluster.mpi import OneProcess
from featurization import finish, journal, worker
from featurization.config import CellName, FeaturizationConfig, RadiationName
from featurization.crystal import Reject
from featurization.featurize import featurize
from featurization.manifest import read_manifest
from featurization.shards import read_shard
from featurization.sources import open_source
from featurization.worker import Progress, featurize_one


def rejects(out: Path) -> list[dict[str, str]]:
    with (out / "rejects.csv").open(newline="", encoding="utf-8") as stream:
        return list(csv.DictReader(stream))


def kept(out: Path) -> dict[str, int]:
    """Id → source index, of every shard that is there."""
    entries = [e for path in (out / "shards").glob("*.h5") for e in read_shard(path)]
    assert len({e.id for e in entries}) == len(entries)
    return {e.id: e.source_index for e in entries}


def test_every_record_is_a_crystal_or_a_reject(tmp_path: Path) -> None:
    lines = [document("a"), broken("b"), document("c", 4.1), document("d", elements=("Cs", "Qq"))]
    source = write_lines(tmp_path / "s.jsonl", [*lines, document("e", 1e-3)])
    manifest = run(source, tmp_path / "out")
    with (tmp_path / "out" / "rejects.csv").open(newline="") as stream:
        assert next(csv.reader(stream)) == ["id", "stage", "reason", "source_index"]
    rows = rejects(tmp_path / "out")
    assert [(row["id"], row["source_index"]) for row in rows] == [
        ("b", "1"),
        ("d", "3"),
        ("e", "4"),
    ]
    assert {row["stage"] for row in rows} == {"structure"}
    assert "Qq" in rows[1]["reason"]
    assert kept(tmp_path / "out") == {"a": 0, "c": 2}
    assert (manifest["structures"], manifest["rejected"]) == (2, 3)
    assert manifest["reject_stages"] == {"structure": 3}
    assert manifest == json.loads((tmp_path / "out" / "manifest.json").read_text())


def test_manifest_says_what_made_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("A_TOKEN", "not to be told")
    source = write_lines(tmp_path / "s.jsonl", [document("a")])
    manifest = run(source, tmp_path / "out")
    assert FeaturizationConfig(**manifest["config"]) == SMALL
    assert manifest["sources"][0]["spec"] == str(source)
    assert manifest["sources"][0]["path"] == "s.jsonl"
    assert set(manifest["provenance"]) == {"commit", "versions", "hardware", "created"}
    assert manifest["provenance"]["versions"]["numpy"] == np.__version__
    assert "not to be told" not in json.dumps(manifest)


@pytest.mark.parametrize("size", [1, 3, 100])
def test_of_equal_ids_the_first_is_kept(tmp_path: Path, size: int) -> None:
    # With shards of 3, the second shard holds nothing but duplicates.
    ids = ["a", "b", "c", "a", "b", "a", "d", "c", "e"]
    lines = [document(id, 4 + 0.1 * i) for i, id in enumerate(ids)]
    source = write_lines(tmp_path / "s.jsonl", lines)
    config = SMALL.model_copy(update={"shard_structures": size})
    manifest = run(source, tmp_path / "out", config)
    assert kept(tmp_path / "out") == {"a": 0, "b": 1, "c": 2, "d": 6, "e": 8}
    rows = rejects(tmp_path / "out")
    assert [(row["id"], row["source_index"]) for row in rows] == [
        ("a", "3"),
        ("b", "4"),
        ("a", "5"),
        ("c", "7"),
    ]
    assert all("duplicate" in row["reason"] for row in rows)
    listed = {shard["file"] for shard in manifest["shards"]}
    assert listed == {f"shards/{p.name}" for p in (tmp_path / "out" / "shards").iterdir()}
    unique = [each for i, each in enumerate(lines) if i in (0, 1, 2, 6, 8)]
    alone = run(write_lines(tmp_path / "u.jsonl", unique), tmp_path / "unique")
    assert alone["content_hash"] == manifest["content_hash"]


@pytest.mark.parametrize("lines", [[broken("a"), broken("b")], []])
def test_no_crystal_at_all(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    lines: list[Any],
) -> None:
    source = write_lines(tmp_path / "s.jsonl", lines)
    assert command(monkeypatch, "featurize", source, tmp_path / "out") == 2
    assert ("could be featurized" if lines else "has no records") in capsys.readouterr().err
    assert [row["id"] for row in rejects(tmp_path / "out")] == [
        each["material_id"] for each in lines
    ]
    assert not (tmp_path / "out" / "manifest.json").exists()
    # The same folder can be used once there are crystals.
    write_lines(source, [document("a")])
    assert command(monkeypatch, "featurize", source, tmp_path / "out") == 0
    assert rejects(tmp_path / "out") == []


def test_same_command_again_rewrites_nothing(tmp_path: Path) -> None:
    source = write_lines(tmp_path / "s.jsonl", [document("a"), broken("b")])
    first = run(source, tmp_path / "out")
    before = contents(tmp_path / "out")
    assert run(source, tmp_path / "out") == first
    assert contents(tmp_path / "out") == before


def test_another_question_to_the_same_folder_is_refused(tmp_path: Path) -> None:
    source = write_lines(tmp_path / "s.jsonl", [document("a")])
    run(source, tmp_path / "out")
    before = contents(tmp_path / "out")
    for changed in ({"radiation": "neutron"}, {"symprec": 0.05}, {"shard_structures": 7}):
        with pytest.raises(UserError) as error:
            run(source, tmp_path / "out", SMALL.model_copy(update=changed))
        [(name, value)] = changed.items()
        assert f"config.{name}" in error.value.problem
        assert f"{value!r} asked for" in error.value.problem
    write_lines(source, [document("a", 4.2)])
    with pytest.raises(UserError, match=r"source\.sha256"):
        run(source, tmp_path / "out")
    with pytest.raises(UserError, match=r"source\.kind"):
        run("prototypes:3", tmp_path / "out")
    assert contents(tmp_path / "out") == before


@pytest.mark.parametrize(
    "stranger", ["notes.txt", "shards/photo.h5", "shards/deep/er.txt", "shards/shard-1.h5.bak"]
)
def test_a_folder_with_strangers_is_refused_and_untouched(tmp_path: Path, stranger: str) -> None:
    source = write_lines(tmp_path / "s.jsonl", [document("a")])
    path = tmp_path / "out" / stranger
    path.parent.mkdir(parents=True)
    path.write_text("mine")
    before = contents(tmp_path / "out")
    with pytest.raises(UserError, match="holds no dataset"):
        run(source, tmp_path / "out")
    assert contents(tmp_path / "out") == before


def test_foreign_manifest_and_file_in_place_of_the_folder(tmp_path: Path) -> None:
    source = write_lines(tmp_path / "s.jsonl", [document("a")])
    (tmp_path / "out").mkdir()
    for text in ("", "[]", "{}", '{"format_version": 1}', '{"format_version": 99}', "\0"):
        (tmp_path / "out" / "manifest.json").write_text(text)
        with pytest.raises(UserError, match=r"manifest|format version"):
            run(source, tmp_path / "out")
        assert (tmp_path / "out" / "manifest.json").read_text() == text
    (tmp_path / "file").write_text("x")
    for out in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(UserError, match=r"is a file|cannot write"):
            run(source, out)


def test_equal_runs_give_equal_files(tmp_path: Path) -> None:
    source = write_lines(tmp_path / "s.jsonl", [document(f"m{i}", 4 + i / 10) for i in range(5)])
    config = SMALL.model_copy(update={"shard_structures": 2})
    first = run(source, tmp_path / "one", config)
    time.sleep(1.1)  # a time in a file would now be another one
    again = run(source, tmp_path / "two", config)
    for volatile in (first, again):
        del volatile["provenance"]["created"]
    assert again == first
    assert len(first["shards"]) == 3


def test_what_is_not_ours_is_left_alone(tmp_path: Path) -> None:
    source = write_lines(tmp_path / "s.jsonl", [document("a")])
    for name in ("journal/diary.txt", "dataset.h5", "rejects.csv", "shards/shard-1.h5"):
        out = tmp_path / name.replace("/", "-")
        (out / name).parent.mkdir(parents=True)
        (out / name).write_text("mine")
        with pytest.raises(UserError, match=r"not empty|neither a manifest"):
            run(source, out)
        assert (out / name).read_text() == "mine"
    # A dataset whose manifest was lost is no place for another one.
    run(source, tmp_path / "lost")
    (tmp_path / "lost" / "manifest.json").unlink()
    before = contents(tmp_path / "lost")
    with pytest.raises(UserError, match=r"--repair makes it again from its copy"):
        run(source, tmp_path / "lost")
    assert contents(tmp_path / "lost") == before


def test_crash_on_the_way_leaves_no_manifest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = write_lines(tmp_path / "s.jsonl", [document(f"m{i}", 4 + i / 10) for i in range(4)])
    config = SMALL.model_copy(update={"shard_structures": 1})
    for module, broken_step in (
        (worker, "write_shard"),
        (finish, "_drop_duplicates"),
        (finish, "write_virtual"),
        (finish, "provenance"),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(module, broken_step, lambda *_: 1 / 0)
            with pytest.raises(ZeroDivisionError):
                run(source, tmp_path / "out", config)
        assert not (tmp_path / "out" / "manifest.json").exists()
        with pytest.raises(UserError, match="no finished dataset"):
            read_manifest(tmp_path / "out")
    assert run(source, tmp_path / "out", config)["structures"] == 4


HOSTILE = [
    "a\nb",
    "a\0b",
    "\ud800",
    "x" * 256,
    "x" * 257,
    "../x",
    "/",
    "",
    " ",
    "=1+1",
    '"',
    "é漢🧊",
    "\u202e",
]


def check_ids(folder: Path, ids: list[str]) -> None:
    """Featurize crystals of these ids next to one of a plain id; each is kept or rejected."""
    lines = [document("plain"), *(document(id, 4 + i / 100) for i, id in enumerate(ids))]
    before = set(folder.parent.iterdir())
    manifest = run(write_lines(folder / "s.jsonl", lines), folder / "out")
    assert manifest["structures"] + manifest["rejected"] == len(lines)
    found = kept(folder / "out")
    rows = rejects(folder / "out")
    assert sorted([*found.values(), *(int(row["source_index"]) for row in rows)]) == list(
        range(len(lines))
    )
    for id, index in found.items():
        assert id == lines[index]["material_id"].strip() or id == f"s-{index}"
        assert id.isprintable()
    assert all("\n" not in row["id"] + row["reason"] for row in rows)
    assert set(folder.parent.iterdir()) == before


def test_hostile_ids(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    check_ids(tmp_path / "in", HOSTILE)
    assert {"x" * 256, "../x", "é漢🧊"} < set(kept(tmp_path / "in" / "out"))


@settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.lists(st.text(st.characters(), max_size=8), max_size=6))
def test_any_ids(tmp_path_factory: pytest.TempPathFactory, ids: list[str]) -> None:
    folder = tmp_path_factory.mktemp("ids") / "in"
    folder.mkdir()
    check_ids(folder, ids)
    shutil.rmtree(folder.parent)


@pytest.fixture(scope="module")
def prototypes() -> Any:
    source = open_source("prototypes:20")
    return source, list(source.records())


@pytest.mark.parametrize("radiation", get_args(RadiationName))
def test_every_combination_of_options(prototypes: Any, radiation: RadiationName) -> None:
    source, records = prototypes
    for selection in ("miller:2", "sphere:0.6"):
        sums = {}
        for cell in get_args(CellName):
            config = FeaturizationConfig(radiation=radiation, cell=cell, selection=selection)
            entries = [featurize_one(source, record, config) for record in records]
            clouds = [entry.cloud for entry in entries]
            assert all(len(c.hkl) and np.isfinite(c.intensity).all() for c in clouds)
            assert Counter(e.symmetry.crystal_system for e in entries).most_common(1)[0][1] <= 3
            sums[cell] = np.array([c.intensity @ c.multiplicity.astype(float) for c in clouds])
            if selection == "miller:2":
                assert {len(c.hkl) for c in clouds} == {(5**3 + 1) // 2}
            else:
                assert all(np.linalg.norm(c.q, axis=1).max() <= 0.6 + 1e-6 for c in clouds)
        if selection.startswith("sphere"):
            # A sphere holds the same points whatever the cell; Miller boxes do not.
            for cell in ("conventional", "niggli"):
                np.testing.assert_allclose(sums[cell], sums["primitive"], rtol=1e-4)
        else:
            assert not np.allclose(sums["conventional"], sums["primitive"], rtol=1e-2)


def test_an_element_that_the_radiation_does_not_know(tmp_path: Path) -> None:
    lines = [document("a"), document("po", 3.4, elements=("Po", "Po"))]
    source = write_lines(tmp_path / "s.jsonl", lines)
    for radiation, count in (("xray", 2), ("neutron", 1)):
        config = FeaturizationConfig(radiation=radiation, selection="miller:1")
        assert run(source, tmp_path / radiation, config)["structures"] == count
    [row] = rejects(tmp_path / "neutron")
    assert (row["id"], row["stage"]) == ("po", "diffraction")
    assert "Po" in row["reason"]


def test_unforeseen_failure_of_one_crystal_is_a_reject(
    prototypes: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, records = prototypes
    for error in (ZeroDivisionError("x"), KeyError("x"), np.linalg.LinAlgError("x")):

        def fail(*_: Any, error: Exception = error) -> None:
            raise error

        monkeypatch.setattr(worker, "diffraction_cloud", fail)
        with pytest.raises(Reject) as caught:
            featurize_one(source, records[0], SMALL)
        assert caught.value.stage == "internal"
        assert type(error).__name__ in caught.value.reason


def test_progress_counts_all_records(tmp_path: Path) -> None:
    source = write_lines(tmp_path / "s.jsonl", [document("a"), broken("b"), document("c", 5)])
    seen: list[Progress] = []
    featurize(str(source), tmp_path / "out", SMALL, OneProcess(), progress=seen.append)
    assert [(at.done, at.total, at.rejected) for at in seen] == [(0, 3, 0), (3, 3, 1)]


def test_prototypes_are_a_word_even_beside_such_a_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "prototypes:2").mkdir()
    monkeypatch.chdir(tmp_path)
    assert run("prototypes:2", tmp_path / "out")["sources"][0]["spec"] == "prototypes:2"
    write_lines(tmp_path / "s.jsonl", [document("a")])
    assert run("s.jsonl", tmp_path / "o")["sources"][0]["spec"] == str(tmp_path / "s.jsonl")


def test_names_that_are_no_text_or_look_like_markup(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    source = write_lines(tmp_path / os.fsdecode(b"\xff.jsonl"), [document("[/red] :smile:")])
    out = tmp_path / "[" / "red] :smile: [bold]"  # the text of a closing tag
    assert command(monkeypatch, "featurize", source, out) == 0
    assert "[/red]:smile:[bold]" in "".join(capsys.readouterr().out.split())
    assert command(monkeypatch, "verify", out, "--sample", "1") == 0
    assert command(monkeypatch, "featurize", "[/nowhere]", tmp_path / "new") == 2
    assert "'[/nowhere]' is no file" in capsys.readouterr().err


def test_full_disk(tmp_path: Path) -> None:
    source = write_lines(tmp_path / "s.jsonl", [document(f"m{i}", 4 + i / 99) for i in range(90)])
    script = (
        "import resource, sys, xtal; resource.setrlimit(resource.RLIMIT_FSIZE, (9000, 9000));"
        f"sys.argv = ['xtal', 'featurize', {str(source)!r}, {str(tmp_path / 'out')!r}, "
        "'--selection', 'miller:2']; xtal.main()"
    )
    done = process([sys.executable, "-c", script])
    assert done.returncode == 74, done.stderr
    assert "failed:" in done.stderr
    assert "large" in done.stderr  # EFBIG, as ENOSPC would be
    assert "Traceback" not in done.stderr
    assert not list((tmp_path / "out").rglob("*.h5"))
    assert not list((tmp_path / "out").rglob("*.tmp"))
    assert run(source, tmp_path / "out")["structures"] == 90


def test_place_that_cannot_be_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    source = write_lines(tmp_path / "s.jsonl", [document("a")])
    assert command(monkeypatch, "featurize", source, "/dev/null/out") == 2
    assert "cannot write to /dev/null/out" in capsys.readouterr().err


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write to read-only folders")
def test_read_only_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    source = write_lines(tmp_path / "s.jsonl", [document("a")])
    (tmp_path / "ro").mkdir(mode=0o500)
    for out in (tmp_path / "ro", tmp_path / "ro" / "new"):
        assert command(monkeypatch, "featurize", source, out) == 2
        assert "cannot write" in capsys.readouterr().err


def test_bad_requests_end_with_2(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    source = write_lines(tmp_path / "s.jsonl", [document("a")])
    (tmp_path / "c.toml").write_text('colour = "red"\n')
    for words, said in (
        ([source, "--config", tmp_path / "c.toml"], "colour: unknown key"),
        ([source, "--config", tmp_path / "none.toml"], "no such file"),
        ([source, "--radiation", "gamma"], "--radiation gamma: must be"),
        ([source, "--selection", "miller:0"], "miller:0"),
        ([source, "--symprec", "0"], "symprec"),
        ([tmp_path / "none.jsonl"], "none.jsonl"),
        ([source, "--label"], "label"),
    ):
        out = tmp_path / "out"
        assert command(monkeypatch, "featurize", words[0], out, *words[1:]) == 2
        assert said in capsys.readouterr().err.replace("\n", "")
        assert not out.exists()


def test_a_run_that_lacks_records_is_not_finished(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = write_lines(tmp_path / "s.jsonl", [document(f"m{i}", 4 + i / 10) for i in range(6)])
    config = SMALL.model_copy(update={"shard_structures": 1})
    with monkeypatch.context() as patch:
        patch.setattr(journal, "done_blocks", lambda *_: np.arange(6) % 2 == 0)
        with pytest.raises(RunFailed, match="does not account for all records"):
            run(source, tmp_path / "out", config)
    assert not (tmp_path / "out" / "manifest.json").exists()
    assert run(source, tmp_path / "out", config)["structures"] == 6


def test_a_damaged_line_of_the_journal_is_no_line(tmp_path: Path) -> None:
    path = tmp_path / "j"
    for text in ("one", "two", "three"):
        append_line(path, text)
    whole = path.read_bytes()
    for at in range(len(whole)):
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
        assert set(whole_lines(path)) < {"one", "two", "three"}
    path.write_bytes(whole[:-1])
    assert list(whole_lines(path)) == ["one", "two"]


def test_the_older_of_two_jobs_stops(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = write_lines(tmp_path / "s.jsonl", [document("a"), document("b", 5)])
    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr(worker, "warm_up", lambda _: journal.take_over(out))
        with pytest.raises(RunFailed, match="another job has taken over"):
            run(source, out)
    assert not list((out / "shards").iterdir())
    assert run(source, out)["structures"] == 2


def test_a_source_that_ends_early_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = "".join(json.dumps(document(f"m{i}", 4 + i / 50)) + "\n" for i in range(60))
    packed = gzip.compress(lines.encode())
    (tmp_path / "s.jsonl.gz").write_bytes(packed[: len(packed) * 3 // 4])
    assert command(monkeypatch, "featurize", tmp_path / "s.jsonl.gz", tmp_path / "out") == 0
    assert "ends early: " in capsys.readouterr().err
    assert rejects(tmp_path / "out")[-1]["reason"].startswith("stream ends early")
