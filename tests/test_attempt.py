"""Attempts of a batch job, without SLURM: signals, full disks, no progress."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from tiny import ROOT, process

from ablation.parts import Part
from cluster import attempt
from cluster.attempt import Attempt, jobs_folder, trouble
from cluster.errors import RunFailed
from cluster.files import append_line, whole_lines
from cluster.marks import ATTEMPTS, mark, note_attempt
from cluster.site import Site
from cluster.submit import Plan


def tried(result: Path, script: str, **variables: str) -> "subprocess.CompletedProcess[str]":
    words = [sys.executable, "-m", "cluster.attempt", result, "--", sys.executable, "-c", script]
    return process(words, timeout=40, **variables)


@pytest.mark.parametrize("code", [0, 1, 2, 7])
def test_exit_code_is_the_commands(tmp_path: Path, code: int) -> None:
    assert tried(tmp_path / "out", f"raise SystemExit({code})").returncode == code


def test_a_signal_death_is_told(tmp_path: Path) -> None:
    script = "import os, signal; os.kill(os.getpid(), signal.SIGKILL)"
    assert tried(tmp_path / "out", script).returncode == 137


def test_what_a_killed_command_started_ends_with_it(tmp_path: Path) -> None:
    """As Ray's processes, whose driver the kernel ends when memory runs out."""
    script = (
        "import os, signal, subprocess\n"
        "from cluster.ray_session import private_folder\n"
        "with private_folder('secret') as folder:\n"
        "    sleep = '(setsid sleep 300 & echo $!; exec sleep 300) &'\n"
        "    started = subprocess.Popen(\n"
        "        ['sh', '-c', sleep], start_new_session=True, stdout=subprocess.PIPE, text=True\n"
        "    )\n"
        "    print(started.stdout.readline().strip(), folder, flush=True)\n"
        "    os.kill(os.getpid(), signal.SIGKILL)"
    )
    done = tried(tmp_path / "out", script)
    assert done.returncode == 137
    pid, folder = done.stdout.split()
    assert not Path(f"/proc/{pid}").exists()
    assert not Path(folder).exists()


def test_mark_sees_work_and_nothing_else(tmp_path: Path) -> None:
    assert mark(tmp_path / "not there") == mark(tmp_path)
    (tmp_path / "logs").mkdir()
    empty = mark(tmp_path)
    (tmp_path / "logs" / "rank-0.jsonl").write_text("busy")
    (tmp_path / "driver.json").write_text("at work")
    (tmp_path / "done-1-0.jsonl").touch()  # of a line that found no room
    (tmp_path / "owner").write_text("me")
    assert mark(tmp_path) == empty
    seen = {empty}
    for name, text in (("a.h5", "x"), ("results.jsonl", "1"), ("results.jsonl", "12")):
        (tmp_path / name).write_text(text)
        seen.add(mark(tmp_path))
    checkpoint = tmp_path / "fit" / "checkpoint.safetensors"
    checkpoint.parent.mkdir()
    for at in (1, 2):  # rewritten with the same size
        checkpoint.write_text("weights")
        os.utime(checkpoint, ns=(at, at))
        seen.add(mark(tmp_path))
    assert len(seen) == 6


def test_two_attempts_without_progress_are_the_last(tmp_path: Path) -> None:
    note_attempt(tmp_path, "5", "a")
    note_attempt(tmp_path, "5", "a")
    note_attempt(tmp_path, "6", "a")  # another job has its own chance
    note_attempt(tmp_path, "5", "b")  # the second made some
    note_attempt(tmp_path, "5", "b")
    with pytest.raises(RunFailed, match=r"job 5 made no progress in its last two attempts"):
        note_attempt(tmp_path, "5", "b")
    with (tmp_path / ATTEMPTS).open("a") as stream:
        stream.write("torn")
    assert len(list(whole_lines(tmp_path / ATTEMPTS))) == 6
    note_attempt(tmp_path, "6", "b")
    *_, last = whole_lines(tmp_path / ATTEMPTS)
    assert json.loads(last)["job"] == "6"


def test_an_attempt_without_progress_ends_before_its_command(tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    jobs_folder(out).mkdir()
    for _ in range(2):
        row = {"job": "7", "mark": mark(out)}
        append_line(jobs_folder(out) / ATTEMPTS, json.dumps(row))
    done = tried(out, "print('it ran')", SLURM_JOB_ID="7")
    assert done.returncode == 1
    assert "no progress" in done.stderr
    assert "remedy" in done.stderr
    assert "it ran" not in done.stdout


def test_what_submitit_requeues_ends_without_progress_too(tmp_path: Path) -> None:
    """Parts of a grid share a result, but one may get on and another not."""
    grid = tmp_path / "grid"
    parts = [Part(n, 2).folder(grid) for n in (1, 2)]
    plan = Plan("ablate", grid, ("grid.toml", str(grid)), Site(), nodes=1, time="1")
    assert [plan.place_of(words) for words in plan.elements(2)] == [str(part) for part in parts]

    def tried_part(part: Path, number: str, script: str) -> "subprocess.CompletedProcess[str]":
        words = [sys.executable, "-m", "cluster.attempt", "--no-requeue", grid, part, "--"]
        words += [sys.executable, "-c", f"{script}; print('it ran'); raise SystemExit(75)"]
        element = {"SLURM_ARRAY_JOB_ID": "7", "SLURM_ARRAY_TASK_ID": number, "SLURM_JOB_ID": "8"}
        return process(words, timeout=40, **element)

    parts[0].mkdir(parents=True)
    works = f"open({str(parts[0] / 'record.jsonl')!r}, 'a').write('1')"
    done = []
    for _ in range(3):
        assert "it ran" in tried_part(parts[0], "1", works).stdout
        done.append(tried_part(parts[1], "2", "pass"))
    assert [each.returncode for each in done] == [75, 75, 1]
    assert ["it ran" in each.stdout for each in done] == [True, True, False]
    assert "job 7_2 made no progress" in done[-1].stderr


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGTERM])
def test_signals_reach_the_command(tmp_path: Path, number: signal.Signals) -> None:
    script = (
        "import signal, sys, time\n"
        "def stop(number, frame):\n    print('got', number, flush=True); sys.exit(75)\n"
        "signal.signal(signal.SIGUSR1, stop); signal.signal(signal.SIGTERM, stop)\n"
        "print('ready', flush=True); time.sleep(60)"
    )
    words = [sys.executable, "-m", "cluster.attempt", str(tmp_path / "out"), "--"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    environment.pop("SLURM_JOB_ID", None)
    with subprocess.Popen(
        [*words, sys.executable, "-c", script], stdout=subprocess.PIPE, text=True, env=environment
    ) as running:
        assert running.stdout is not None
        assert running.stdout.readline() == "ready\n"
        running.send_signal(number)
        assert running.stdout.readline() == f"got {signal.SIGUSR1.value}\n"
        assert running.wait(20) == 75


def test_trouble(tmp_path: Path) -> None:
    assert trouble(tmp_path / "new" / "folder") is None
    assert list((tmp_path / "new" / "folder").iterdir()) == []
    (tmp_path / "file").touch()
    assert "cannot write" in str(trouble(tmp_path / "file"))


def test_a_file_system_that_hangs_is_trouble(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    go = threading.Event()
    monkeypatch.setattr(os, "fsync", lambda descriptor: go.wait(20))
    assert "does not answer" in str(trouble(tmp_path, patience=0.2))
    go.set()


class Disk:
    """A small file system of its own, that can be filled and emptied."""

    def __init__(self, place: Path) -> None:
        self.place = place
        place.mkdir()
        words = ["mount", "-t", "tmpfs", "-o", "size=6m", "tmpfs", str(place)]
        done = subprocess.run(words, capture_output=True, text=True, check=False)
        if done.returncode:
            pytest.skip(f"no file system can be mounted here: {done.stderr.strip()}")

    def fill(self) -> None:
        (self.place / "filling").write_bytes(b"\0" * (4 << 20))

    def close(self) -> None:
        subprocess.run(["umount", str(self.place)], check=True)


def test_work_waits_for_a_full_disk_and_goes_on(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    disk = Disk(tmp_path / "disk")
    try:
        runs, result = tmp_path / "runs", disk.place / "result"
        # The first run fills the disk and fails for it, the second finds room.
        script = (
            f"from pathlib import Path; runs, result = Path({str(runs)!r}), Path({str(result)!r})\n"
            "first = not runs.exists(); runs.open('a').write('x')\n"
            "if first: result.with_name('filling').write_bytes(bytes(4 << 20))\n"
            "result.write_bytes(bytes(3 << 20))"
        )

        def free() -> None:
            while not result.exists():
                time.sleep(0.05)
            time.sleep(2)
            disk.place.joinpath("filling").unlink()
            result.unlink()

        helper = threading.Thread(target=free, daemon=True)
        helper.start()
        assert Attempt([disk.place], [sys.executable, "-c", script]).run() == 0
        helper.join(20)
        assert runs.read_text() == "xx"
        assert "No space left on device; waiting up to 600 s" in capfd.readouterr().err
    finally:
        disk.close()


def test_work_stops_whole_if_the_disk_stays_full(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    disk = Disk(tmp_path / "disk")
    monkeypatch.setattr(attempt, "WAIT", 2.0)
    try:
        disk.fill()
        with pytest.raises(RunFailed, match="No space left on device, for 2 s now"):
            Attempt([disk.place], [sys.executable, "-c", "raise SystemExit('it ran')"]).run()
        assert [path.name for path in disk.place.iterdir()] == ["filling"]
    finally:
        disk.close()


def test_a_log_on_the_full_disk_is_no_obstacle(tmp_path: Path) -> None:
    script = f"import sys; p = {str(tmp_path / 'runs')!r}; open(p, 'a').write('x'); "
    script += "sys.exit(74 if open(p).read() == 'x' else 0)"
    words = [sys.executable, "-m", "cluster.attempt", tmp_path / "out", "--"]
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [*words, sys.executable, "-c", script],
            stderr=full,
            env={k: v for k, v in os.environ.items() if k != "SLURM_JOB_ID"}
            | {"PYTHONPATH": str(ROOT)},
            check=False,
        )
    assert done.returncode == 0
    assert (tmp_path / "runs").read_text() == "xx"


def test_a_temporary_folder_that_cannot_be_is_passed_over(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    done = tried(tmp_path / "out", "print('it ran')", TMPDIR=str(tmp_path / "file" / "no"))
    assert done.stdout == "it ran\n"
    assert "waiting" not in done.stderr


def test_an_element_of_an_array_is_not_the_array(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "12")
    assert attempt.this_job() == "12"
    monkeypatch.setenv("SLURM_ARRAY_JOB_ID", "12")
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "3")
    assert attempt.this_job() == "12_3"
    monkeypatch.delenv("SLURM_JOB_ID")
    assert attempt.this_job() == ""


@pytest.fixture
def btrfs(tmp_path: Path) -> Iterator[Path]:
    """A file system with quotas, that can be frozen as an unreachable one is."""
    image, place = tmp_path / "image", tmp_path / "btrfs"
    place.mkdir()
    with image.open("wb") as stream:
        stream.truncate(150 << 20)
    for words in (["mkfs.btrfs", "-q", "-M", image], ["mount", "-o", "loop", image, place]):
        try:
            done = subprocess.run(words, capture_output=True, text=True, check=False)
        except FileNotFoundError:
            pytest.skip("btrfs-progs is not installed (apt install btrfs-progs)")
        if done.returncode:
            pytest.skip(f"no btrfs can be mounted here: {done.stderr.strip()}")
    yield place
    subprocess.run(["umount", place], check=True)


def test_work_over_quota_goes_on_once_there_is_more(
    tmp_path: Path, btrfs: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """EDQUOT. What fails gives back its room: nothing else shows that there was too little."""
    home = btrfs / "home"
    for words in (["quota", "enable", btrfs], ["subvolume", "create", home]):
        subprocess.run(["btrfs", *words], check=True, capture_output=True)
    limit = ["btrfs", "qgroup", "limit"]
    subprocess.run([*limit, "9M", home], check=True)
    words = ["prototypes:1500", "--selection", "miller:4"]
    (tmp_path / "one.toml").write_text("shard_structures = 5000\n")
    run = [sys.executable, "-m", "xtal", "featurize", words[0]]
    more = [*words[1:], "--config", str(tmp_path / "one.toml")]
    said: list[str] = []

    def lift() -> None:
        while "Disk quota exceeded" not in (text := "".join(said)) or "again in" not in text:
            said.extend(capfd.readouterr())
            time.sleep(0.1)
        subprocess.run([*limit, "none", home], check=True)

    helper = threading.Thread(target=lift, daemon=True)
    helper.start()
    assert Attempt([home], [*run, str(home / "data"), *more]).run() == 0
    helper.join(20)
    assert "failed for its disk (exit code 74)" in "".join(said)
    subprocess.run([*run, str(tmp_path / "usual"), *more], check=True, capture_output=True)
    found = [
        json.loads((folder / "manifest.json").read_text())["content_hash"]
        for folder in (home / "data", tmp_path / "usual")
    ]
    assert found[0] == found[1]


def test_what_fails_for_its_disk_without_progress_is_given_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attempt, "WAIT", 2.5)
    script = f"open({str(tmp_path / 'runs')!r}, 'a').write('x'); raise SystemExit(74)"
    assert Attempt([tmp_path], [sys.executable, "-c", script]).run() == 74
    assert (tmp_path / "runs").read_text() == "xx"


def test_work_waits_for_a_file_system_that_does_not_answer(
    btrfs: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(attempt, "trouble", lambda folder: trouble(folder, patience=1.0))
    result = btrfs / "result"
    subprocess.run(["fsfreeze", "-f", btrfs], check=True)
    thaw = threading.Timer(4.0, lambda: subprocess.run(["fsfreeze", "-u", btrfs], check=True))
    thaw.start()
    try:
        command = [sys.executable, "-c", f"open({str(result)!r}, 'w').write('done')"]
        assert Attempt([btrfs], command).run() == 0
    finally:
        thaw.join()
    assert result.read_text() == "done"
    assert "does not answer for 1 s; waiting up to 600 s" in capfd.readouterr().err


def test_work_waits_for_room_for_temporary_files(tmp_path: Path) -> None:
    disk = Disk(tmp_path / "tmp")
    try:
        disk.fill()
        words = [
            sys.executable,
            "-m",
            "cluster.attempt",
            str(tmp_path / "out"),
            "--",
            "echo",
            "ran",
        ]
        environment = os.environ | {"PYTHONPATH": str(ROOT), "TMPDIR": str(disk.place)}
        environment.pop("SLURM_JOB_ID", None)
        pipe = subprocess.PIPE
        with subprocess.Popen(words, env=environment, stdout=pipe, stderr=pipe, text=True) as work:
            assert work.stderr is not None
            assert f"cannot write to {disk.place}: No space left" in work.stderr.readline()
            (disk.place / "filling").unlink()
            assert work.communicate(timeout=30)[0] == "ran\n"
    finally:
        disk.close()


@pytest.fixture(autouse=True)
def own_signals() -> "object":
    """`Attempt.run` sets handlers for the life of its process."""
    numbers = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
    before = [signal.getsignal(number) for number in numbers]
    yield
    for number, handler in zip(numbers, before, strict=True):
        signal.signal(number, handler)
