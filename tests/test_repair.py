"""`xtal verify --repair` makes what is damaged again, and the dataset is what it was."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from test_resume import DAMAGES, FEW, Case, core, cut, die, empty, faulty, flip, in_child, whole

from cluster.errors import UserError
from cluster.mpi import OneProcess
from featurization import finish, resume
from featurization.repair import repair
from featurization.verify import check_specs, verify


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resume, "BLOCK", 2)
    monkeypatch.setattr(finish, "provenance", dict)


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
        at += 23
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
