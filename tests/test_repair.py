"""`xtal verify --repair` makes what is damaged again, and the dataset is what it was."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from test_mpi import Threads
from test_resume import (
    DAMAGES,
    FEW,
    LINES,
    MORE,
    Case,
    core,
    cut,
    die,
    empty,
    faulty,
    flip,
    in_child,
    interrupted,
    whole,
)
from tiny import broken, command, contents, document, run, write_lines

from cluster.errors import UserError
from cluster.mpi import OneProcess, Ranks, agree
from featurization import finish, journal, resume, worker
from featurization.featurize import featurize
from featurization.journal import AGAIN, read_plan
from featurization.manifest import COPY, read_manifest
from featurization.repair import repair
from featurization.restore import restore
from featurization.verify import check_specs, verify


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resume, "BLOCK", 2)
    monkeypatch.setattr(finish, "provenance", dict)
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Case:
    """A dataset of two sources."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(resume, "BLOCK", 2)
        patch.setattr(finish, "provenance", dict)
        return Case(tmp_path_factory.mktemp("finished"), append=True)


@pytest.fixture
def out(finished: Case, tmp_path: Path) -> Path:
    shutil.copytree(finished.out, tmp_path / "out")
    return tmp_path / "out"


def cut_at_a_row(path: Path) -> None:
    """What is left of a table is whole; of another file, half."""
    data = path.read_bytes()
    ends = [i + 1 for i in range(len(data) - 1) if data[i : i + 1] == b"\n"]
    path.write_bytes(data[: ends[-1] if path.suffix == ".csv" else len(data) // 2])


def mend(out: Path, case: Case) -> None:
    answer = verify(out, case.specs, sample=2)
    assert not answer["ok"]
    assert answer["damaged"]
    repair(out, answer["damaged"], case.specs, OneProcess())


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("number", [0, -1])
def test_a_damaged_shard(
    finished: Case, out: Path, damage: Callable[[Path], None], number: int
) -> None:
    shards = sorted((out / "shards").glob("*.h5"))
    before = {path: path.read_bytes() for path in shards}
    victim = shards[number]
    damage(victim)
    mend(out, finished)
    assert whole(out, finished.specs) == finished.expected
    assert (out / "damaged" / victim.name).exists() == (damage is not Path.unlink)
    # Shards of the other source are as they were.
    others = [path for path in shards if path.name[:9] != victim.name[:9]]
    assert others
    assert all(path.read_bytes() == before[path] for path in others)


@pytest.mark.parametrize("damage", [flip, cut, empty])
@pytest.mark.parametrize("name", ["rejects.csv", "dataset.h5"])
def test_a_damaged_table(
    finished: Case, out: Path, name: str, damage: Callable[[Path], None]
) -> None:
    damage(out / name)
    mend(out, finished)
    assert whole(out, finished.specs) == finished.expected


def test_everything_is_damaged(finished: Case, out: Path) -> None:
    for path in out.rglob("*.*"):
        if path.suffix in (".h5", ".csv"):
            flip(path)
    mend(out, finished)
    assert whole(out, finished.specs) == finished.expected


def test_death_during_a_repair(finished: Case, out: Path) -> None:
    fresh = out.with_name("fresh")
    flip(min((out / "shards").glob("*.h5")))
    flip(out / "rejects.csv")
    at, code = 3, 9
    while code == 9:
        shutil.rmtree(fresh, ignore_errors=True)
        shutil.copytree(out, fresh)

        def doomed(at: int = at) -> None:
            with faulty(at, die):
                mend(fresh, finished)

        code = in_child(doomed)
        answer = verify(fresh, finished.specs, sample=1)
        if not answer["ok"]:
            repair(fresh, answer["damaged"], finished.specs, OneProcess())
        assert verify(fresh, finished.specs, sample=1)["problems"] == [], at
        assert core(fresh) == finished.expected, at
        at += 37
    assert code == 0
    assert at > 100


def test_the_source_is_gone_or_another(finished: Case, out: Path, tmp_path: Path) -> None:
    flip(min((out / "shards").glob("*.h5")))
    damaged = verify(out, finished.specs, sample=0)["damaged"]
    with pytest.raises(UserError, match="is not what source 0"):
        repair(out, damaged, finished.specs[::-1], OneProcess())
    with pytest.raises(UserError, match="is no file"):
        repair(out, damaged, [str(tmp_path / "gone"), finished.specs[1]], OneProcess())
    with pytest.raises(UserError, match="1 sources are given"):
        check_specs(out, finished.specs[:1])
    # Neither attempt made it worse.
    mend_again = verify(out, finished.specs, sample=0)
    repair(out, mend_again["damaged"], finished.specs, OneProcess())
    assert whole(out, finished.specs) == finished.expected


def test_a_repair_of_what_is_well_changes_no_shard(finished: Case, out: Path) -> None:
    before = {path: path.read_bytes() for path in (out / "shards").iterdir()}
    repair(out, [], finished.specs, OneProcess())
    assert {path: path.read_bytes() for path in (out / "shards").iterdir()} == before
    assert whole(out, finished.specs) == finished.expected
    assert json.loads((out / "manifest.json").read_text())["config"] == FEW.model_dump(mode="json")


# A lost manifest.


def lose(out: Path, text: str | None) -> None:
    if text is None:
        (out / "manifest.json").unlink()
    else:
        (out / "manifest.json").write_text(text)


def mend_lost(out: Path, specs: list[str]) -> None:
    """As the command does."""
    assert restore(out, specs, OneProcess())
    assert not restore(out, specs, OneProcess())
    specs = check_specs(out, specs)
    answer = verify(out, specs, sample=2)
    if not answer["ok"]:
        repair(out, answer["damaged"], specs, OneProcess())


@pytest.mark.parametrize("text", [None, "", "{}", '{"format_version": 2}', "[1]"])
def test_a_lost_manifest(finished: Case, out: Path, text: str | None) -> None:
    lose(out, text)
    with pytest.raises(UserError, match=r"xtal verify .* --repair makes it again"):
        read_manifest(out)
    with pytest.raises(UserError, match=r"--repair makes"):
        run(finished.specs[0], out, FEW)
    before = {path: path.read_bytes() for path in (out / "shards").iterdir()}
    mend_lost(out, finished.specs)
    assert {path: path.read_bytes() for path in (out / "shards").iterdir()} == before
    if text is not None:
        assert (out / "damaged" / "manifest.json").read_text() == text
    assert whole(out, finished.specs) == finished.expected


def test_a_lost_manifest_without_the_sources(finished: Case, out: Path) -> None:
    gone = [f"{out}/gone.jsonl"] * 2
    text = (out / "manifest.json").read_text()
    lose(out, None)
    assert restore(out, [], OneProcess())
    assert (out / "manifest.json").read_text() == text
    answer = verify(out, gone)
    assert answer["problems"] == []
    assert [each["state"] for each in answer["sources"]] == ["absent"] * 2
    assert core(out) == finished.expected


@pytest.mark.parametrize("names", [["rejects.csv"], ["dataset.h5"], ["rejects.csv", "dataset.h5"]])
@pytest.mark.parametrize("damage", [Path.unlink, flip, cut, empty, cut_at_a_row])
def test_a_lost_manifest_and_a_table(
    finished: Case, out: Path, names: list[str], damage: Callable[[Path], None]
) -> None:
    for name in names:
        damage(out / name)
    lose(out, None)
    mend_lost(out, finished.specs)
    assert whole(out, finished.specs) == finished.expected


def test_rejects_are_not_lost_with_the_manifest(finished: Case, out: Path, tmp_path: Path) -> None:
    """What took `rejects.csv` at its word forgot those of a table that was cut."""
    for damage in (cut_at_a_row, lambda path: path.write_bytes(b"\0\xff")):
        damage(out / "rejects.csv")
        lose(out, None)
        assert restore(out, [], OneProcess())
        gone = [finished.specs[0], str(tmp_path / "gone")]
        answer = verify(out, gone)
        assert answer["damaged"] == ["rejects.csv"]
        before = contents(out)
        with pytest.raises(UserError, match="is no file"):
            repair(out, answer["damaged"], gone, OneProcess())
        assert contents(out) == before
        repair(out, answer["damaged"], finished.specs, OneProcess())
        assert whole(out, finished.specs) == finished.expected


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("number", [0, -1])
def test_a_lost_manifest_and_a_shard(
    finished: Case, out: Path, number: int, damage: Callable[[Path], None]
) -> None:
    damage(sorted((out / "shards").glob("*.h5"))[number])
    lose(out, None)
    mend_lost(out, finished.specs)
    assert whole(out, finished.specs) == finished.expected


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_lost_manifest_and_its_copy(
    finished: Case, out: Path, damage: Callable[[Path], None]
) -> None:
    damage(out / COPY)
    assert whole(out, finished.specs)["content_hash"] == finished.expected["content_hash"]
    lose(out, None)
    before = contents(out)
    assert not restore(out, finished.specs, OneProcess())
    with pytest.raises(UserError, match=r"copy .* is lost, too: featurize again into a new"):
        check_specs(out, finished.specs)
    assert contents(out) == before


def test_another_source_is_not_taken_for_a_lost_manifests(
    finished: Case, out: Path, tmp_path: Path
) -> None:
    """One crystal more, a label changed, or the sources in another order."""
    lose(out, None)
    longer = write_lines(tmp_path / "longer.jsonl", [document("new", 6), *LINES])
    label = write_lines(tmp_path / "label.jsonl", [LINES[0] | {"band_gap": 1}, *LINES[1:]])
    assert restore(out, [str(longer), finished.specs[1]], OneProcess())
    for source in (longer, label, finished.specs[1]):
        specs = [str(source), finished.specs[0]]
        answer = verify(out, specs)
        assert answer["content_hash"] == finished.expected["content_hash"]
        assert len(answer["problems"]) == 2
        flip(out / "rejects.csv")
        before = contents(out)
        with pytest.raises(UserError, match="is not what source 0"):
            repair(out, ["rejects.csv"], specs, OneProcess())
        assert contents(out) == before
        flip(out / "rejects.csv")  # back
    assert whole(out, finished.specs) == finished.expected


def test_many_ranks_make_a_manifest_again(finished: Case, out: Path) -> None:
    lose(out, None)
    flip(max((out / "shards").glob("*.h5")))

    def job(ranks: Ranks) -> None:
        assert restore(out, finished.specs, ranks)
        answer = verify(out, finished.specs, 2, ranks)
        repair(out, answer["damaged"], finished.specs, ranks)

    assert Threads(3).run(job) == [None] * 3
    assert whole(out, finished.specs) == finished.expected

    def refused(ranks: Ranks) -> None:
        assert not restore(out, finished.specs, ranks)
        agree(ranks, lambda: check_specs(out, finished.specs))

    lose(out, None)
    (out / COPY).unlink()
    assert all(isinstance(each, UserError) for each in Threads(3).run(refused))


def test_death_while_a_manifest_is_made_again(finished: Case, out: Path) -> None:
    lose(out, "")
    flip(min((out / "shards").glob("*.h5")))
    fresh = out.with_name("fresh")
    at, code = 1, 9
    while code == 9:
        shutil.rmtree(fresh, ignore_errors=True)
        shutil.copytree(out, fresh)

        def doomed(at: int = at) -> None:
            with faulty(at, die):
                mend_lost(fresh, finished.specs)

        code = in_child(doomed)
        restore(fresh, finished.specs, OneProcess())
        answer = verify(fresh, finished.specs, sample=1)
        if not answer["ok"]:
            repair(fresh, answer["damaged"], finished.specs, OneProcess())
        run(finished.specs[0], fresh, FEW)  # removes what is left of a journal without a plan
        assert whole(fresh, finished.specs, sample=1) == finished.expected, at
        at += 53
    assert code == 0
    assert at > 60


# An unfinished append.


def unfinished(case: Case, at: int = 60) -> None:
    """Its folder with a part of the second source committed."""
    case.begin()

    def doomed() -> None:
        with faulty(at, die):
            case.go()

    assert in_child(doomed) == 9
    assert read_plan(case.out) is not None
    assert list((case.out / "shards").glob("shard-001-*"))


def test_an_unfinished_append_whose_source_moved(tmp_path: Path) -> None:
    case = Case(tmp_path, append=True)
    unfinished(case)
    (case.out / "dataset.h5").unlink()
    old, new = case.specs
    now = str(Path(new).rename(tmp_path / "now.jsonl"))
    answer = verify(case.out, check_specs(case.out, []), sample=0)
    assert [p for p in answer["problems"] if f"an append of {new} is unfinished" in p]
    with pytest.raises(UserError, match=r"an unfinished run in .* reads .* not there") as refused:
        repair(case.out, answer["damaged"], check_specs(case.out, []), OneProcess())
    assert f"--repair --source {old} --source NEW" in refused.value.remedy
    assert "remove" in refused.value.remedy
    # What needs no new source is repaired, and nothing of the append is lost.
    answer = verify(case.out, check_specs(case.out, []), sample=0)
    assert answer["damaged"] == []
    assert len(answer["problems"]) == 1
    given_up = Path(shutil.copytree(case.out, tmp_path / "given up"))
    with pytest.raises(UserError, match="3 sources are given"):
        check_specs(case.out, [old, now, now])
    specs = check_specs(case.out, [old, now])
    repair(case.out, verify(case.out, specs)["damaged"], specs, OneProcess())
    assert whole(case.out, specs)["content_hash"] == case.expected["content_hash"]
    assert [s["spec"] for s in read_manifest(case.out)["sources"]] == specs
    # The other way that the message names.
    shutil.rmtree(given_up / "journal")
    specs = check_specs(given_up, [])
    with pytest.raises(UserError, match="shards of a source that its manifest does not know"):
        repair(given_up, verify(given_up, specs)["damaged"], specs, OneProcess())
    for path in given_up.glob("shards/shard-001-*.h5"):
        path.unlink()
    assert whole(given_up, specs) == core(case.start)


def test_a_manifest_older_than_the_dataset_moves_nothing(tmp_path: Path) -> None:
    case = Case(tmp_path, append=True)
    out = case.out
    for name in ("manifest.json", COPY):
        shutil.copy(case.start / name, out / name)
    before = contents(out)
    specs = check_specs(out, [])
    answer = verify(out, specs, sample=0)
    assert not answer["ok"]
    with pytest.raises(UserError, match="the manifest is older than they are"):
        repair(out, answer["damaged"], specs, OneProcess())
    assert contents(out) == before


def test_an_unfinished_append_and_a_lost_manifest(tmp_path: Path) -> None:
    case = Case(tmp_path, append=True)
    unfinished(case)
    lose(case.out, None)
    with pytest.raises(UserError, match=r"no manifest\.json"):  # it would forget the first source
        case.go()
    copy = Path(shutil.copytree(case.out, tmp_path / "copy"))
    mend_lost(case.out, case.specs)
    assert whole(case.out, case.specs) == case.expected
    mend_lost(copy, [])
    assert core(copy)["content_hash"] == case.expected["content_hash"]
    assert core(copy)["csv"] == case.expected["csv"]


def test_an_unfinished_first_run_is_finished(tmp_path: Path) -> None:
    case = Case(tmp_path, append=False)
    interrupted(case)
    mend_lost(case.out, [])
    assert whole(case.out, case.specs) == case.expected


def test_a_plan_that_is_none(tmp_path: Path) -> None:
    case = Case(tmp_path, append=False)
    interrupted(case)
    (case.out / "journal" / "plan.json").write_text("{")
    with pytest.raises(UserError, match=r"(?s)is not the plan.*again into a new folder"):
        restore(case.out, case.specs, OneProcess())
    shutil.rmtree(case.out / "journal")
    with pytest.raises(UserError, match="holds shards, but neither"):
        case.go()


# A crystal that was rejected for what may have been the machine's fault.


def test_a_crystal_is_tried_again(
    finished: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    poisoned = {0: f"its process died 3 times{AGAIN}"}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(journal, "deaths", lambda _: (poisoned, []))
        run(finished.specs[0], out, FEW)
    assert "a,guard,its process died 3 times; to try it again: xtal verify OUT --retry,0" in (
        (out / "rejects.csv").read_text()
    )
    specs = check_specs(out, [])
    assert verify(out, specs)["ok"]
    before = contents(out / "shards")
    repair(out, [], specs, OneProcess())
    assert contents(out / "shards") == before
    words = " ".join(["verify", "OUT", "--retry"])
    assert words in AGAIN
    assert command(monkeypatch, "verify", out, "--retry", "--json") == 0
    assert "guard" not in (out / "rejects.csv").read_text()
    run(finished.specs[0], tmp_path / "expected", FEW)
    assert whole(out, specs) == core(tmp_path / "expected")
    # No shard but that with the second `a` was touched.
    after = contents(out / "shards")
    assert sum(after.get(name) != before[name] for name in before) <= 1


@pytest.fixture(scope="module")
def poisoned(tmp_path_factory: pytest.TempPathFactory) -> Case:
    """A dataset of two sources; of `g` in the first a process died, the second has one, too."""
    folder = tmp_path_factory.mktemp("poisoned")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(resume, "BLOCK", 2)
        patch.setattr(finish, "provenance", dict)
        lines = [document("a"), document("g", 4.1), broken("x"), document("c", 4.3)]
        case = Case(folder, append=False, lines=lines)
        more = write_lines(folder / "more.jsonl", [document("g", 5), *MORE])
        case.specs.append(str(more))
        case.start.parent.mkdir(exist_ok=True)
        for out, deaths in ((case.out, {}), (case.start, {1: f"its process died 3 times{AGAIN}"})):
            shutil.rmtree(out, ignore_errors=True)
            with pytest.MonkeyPatch.context() as deadly:
                deadly.setattr(journal, "deaths", lambda _, deaths=deaths: (deaths, []))
                run(case.specs[0], out, FEW)
            featurize(case.specs[1], out, FEW, OneProcess(), append=True)
            assert verify(out, case.specs)["problems"] == []
        case.expected = core(case.out)
    assert "g,guard," in (case.start / "rejects.csv").read_text()
    assert core(case.start)["content_hash"] != case.expected["content_hash"]
    return case


def test_a_retry_gives_what_a_run_without_deaths_gives(poisoned: Case, tmp_path: Path) -> None:
    out = Path(shutil.copytree(poisoned.start, tmp_path / "out"))
    repair(out, [], poisoned.specs, OneProcess(), retry=True)
    assert whole(out, poisoned.specs) == poisoned.expected


@pytest.mark.parametrize("number", [0, 1])
@pytest.mark.parametrize("state", ["gone", "changed"])
def test_a_retry_without_its_source_changes_nothing(
    poisoned: Case, tmp_path: Path, number: int, state: str
) -> None:
    out = Path(shutil.copytree(poisoned.start, tmp_path / "out"))
    specs = list(poisoned.specs)
    specs[number] = str(tmp_path / "s.jsonl")
    if state == "changed":
        write_lines(tmp_path / "s.jsonl", [document("n"), *LINES])
    before = contents(out)
    with pytest.raises(UserError, match=r"is no file|is not what source"):
        repair(out, [], specs, OneProcess(), retry=True)
    assert contents(out) == before


def test_death_during_a_retry(poisoned: Case, tmp_path: Path) -> None:
    fresh = tmp_path / "fresh"
    at, code = 2, 9
    while code == 9:
        shutil.rmtree(fresh, ignore_errors=True)
        shutil.copytree(poisoned.start, fresh)

        def again() -> None:
            answer = verify(fresh, poisoned.specs, sample=0)
            repair(fresh, answer["damaged"], poisoned.specs, OneProcess(), retry=True)

        def doomed(at: int = at) -> None:
            with faulty(at, die):
                again()

        code = in_child(doomed)
        again()
        run(poisoned.specs[0], fresh, FEW)  # removes what is left of a journal without a plan
        assert whole(fresh, poisoned.specs, sample=1) == poisoned.expected, at
        at += 31
    assert code == 0
    assert at > 60


# A source that has grown.

CIF = """data_
_cell_length_a {0}
_cell_length_b {0}
_cell_length_c {0}
_cell_angle_alpha 90
_cell_angle_beta 90
_cell_angle_gamma 90
loop_
_atom_site_label
_atom_site_fract_x
_atom_site_fract_y
_atom_site_fract_z
Cu 0 0 0
"""


@pytest.mark.parametrize("ended", [True, False])
@pytest.mark.parametrize("kind", ["jsonl", "csv"])
def test_a_source_that_has_grown(tmp_path: Path, kind: str, ended: bool) -> None:
    source = tmp_path / f"s.{kind}"
    if kind == "csv":
        texts = ["id,cif", *(f'a{i},"{CIF.format(4 + i / 10)}"' for i in range(8))]
    else:
        texts = [json.dumps(each) for each in LINES]
    source.write_text("\n".join(texts[:-2]) + "\n" * ended)
    out, spec = tmp_path / "out", str(source)
    run(spec, out, FEW)
    expected = whole(out, [spec])
    with source.open("a") as stream:
        stream.write("\n" * (not ended) + "\n".join(texts[-2:]) + "\n")
    answer = verify(out, [spec])
    assert answer["problems"] == []
    assert answer["recomputed"] == answer["structures"] > 2
    assert answer["sources"] == [{"spec": spec, "state": "grown since"}]
    assert f"xtal featurize SOURCE {out} --append" in answer["note"]
    more = Path(shutil.copytree(out, tmp_path / "more"))
    featurize(spec, more, FEW, OneProcess(), append=True)
    answer = verify(more, [spec, spec])
    assert answer["problems"] == []
    assert answer["sources"][0]["state"] == "grown since"
    assert answer["note"] == ""  # what was new is in the second part
    # Its damage is mended, also after a death.
    flip(min((out / "shards").glob("*.h5")))
    flip(out / "rejects.csv")
    damaged = verify(out, [spec])["damaged"]

    def doomed() -> None:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(worker, "write_shard", lambda *_: os._exit(9))
            repair(out, damaged, [spec], OneProcess())

    assert in_child(doomed) == 9
    assert read_plan(out) is not None
    (out / "journal" / "places.bin").unlink()
    repair(out, verify(out, [spec])["damaged"], [spec], OneProcess())
    assert whole(out, [spec]) == expected
    # One byte of what it was is another source.
    data = bytearray(source.read_bytes())
    data[len(data) // 3] ^= 1
    source.write_bytes(data)
    [changed] = verify(out, [spec])["problems"]
    assert "is not what the dataset was made of: changed: sha256" in changed
