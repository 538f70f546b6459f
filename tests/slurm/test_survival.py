"""Jobs that are stopped, requeued, preempted, or get nowhere; trainings as an array."""

import json
import shlex
import time
from pathlib import Path

import pytest
import torch
from grids import SIX, grid_file, rows_of
from machines import ROOT, Machines
from small import same_course
from test_featurize_jobs import content

from cluster.files import whole_lines
from cluster.slurm import record, seconds_of
from training.checkpoint import read

pytestmark = pytest.mark.slurm
TEMPLATES = ROOT / "slurm"
SOURCE = "prototypes:3000"
OPTIONS = ["--selection", "miller:4"]


@pytest.fixture(scope="module")
def undisturbed(slurm: Machines) -> tuple[int, str]:
    slurm.on("node1", ["xtal", "featurize", SOURCE, slurm.shared / "undisturbed", *OPTIONS])
    return content(slurm.shared / "undisturbed")


TRAINING = ["--task", "crystal_system", "--epochs", "80"]


@pytest.fixture(scope="module")
def trained(slurm: Machines, small: Path) -> Path:
    """A training that nothing happens to."""
    slurm.run("xtal", "train", small, slurm.shared / "trained", *TRAINING)
    return slurm.shared / "trained"


def same_bits(one: Path, other: Path) -> bool:
    """But for the commit, which changes where somebody edits the checkout meanwhile."""
    (tensors, state), (theirs, said) = (read(run / "model.safetensors") for run in (one, other))
    del state["provenance"], said["provenance"]
    assert state == said
    differing = [name for name in tensors if not torch.equal(tensors[name], theirs.pop(name))]
    assert not differing
    assert not theirs
    return (one / "history.csv").read_bytes() == (other / "history.csv").read_bytes()


def begun(slurm: Machines, out: Path) -> None:
    """Wait until blocks of a featurization are at work."""
    slurm.until(lambda: any(out.glob("journal/at-*")), f"{out.name} has begun", 180)


def featurizing(slurm: Machines, out: Path, *options: str) -> str:
    words = ["--ntasks-per-node=2", f"--output={out}.log", "--time=5", *options]
    words += [str(TEMPLATES / "featurize.sbatch"), SOURCE, str(out), *OPTIONS]
    return slurm.sbatch(*words)


def test_warned_before_the_limit_it_is_requeued_and_goes_on(
    slurm: Machines, place: Path, undisturbed: tuple[int, str]
) -> None:
    """SIGUSR1 to the batch step alone, as --signal=B:USR1@… sends it."""
    out = place / "data"
    job = featurizing(slurm, out, "--nodes=2")
    begun(slurm, out)
    slurm.run("scancel", "--batch", "--signal=USR1", job)
    slurm.requeued(job)
    assert slurm.ended(job) == "COMPLETED", (place / "data.log").read_text()
    assert content(out) == undisturbed
    attempts = list(whole_lines(place / "data.jobs" / "attempts.jsonl"))
    assert len({json.loads(line)["mark"] for line in attempts}) == len(attempts) == 2


def test_a_lost_node_requeues_the_job(
    slurm: Machines, place: Path, undisturbed: tuple[int, str]
) -> None:
    out = place / "data"
    job = featurizing(slurm, out, "--nodes=2")
    begun(slurm, out)
    slurm.kill("node2")
    try:
        slurm.requeued(job)
    finally:
        slurm.revive("node2")
    assert slurm.ended(job) == "COMPLETED", (place / "data.log").read_text()
    assert content(out) == undisturbed


def test_preempted_by_a_higher_partition_it_saves_and_ends_the_same(
    slurm: Machines, place: Path, small: Path, trained: Path
) -> None:
    """A training in the low partition, then a job of the higher one that wants all nodes."""
    out, log = place / "run", place / "run.log"
    options = ["--partition=low", "--nodes=1", "--cpus-per-task=2", "--time=5", f"--output={log}"]
    job = slurm.sbatch(*options, TEMPLATES / "train.sbatch", small, out, *TRAINING)
    slurm.until((out / "history.csv").exists, "the training has begun", 60)
    urgent = slurm.sbatch("--partition=batch", "--nodes=3", "--exclusive", "--wrap=sleep 1")
    slurm.requeued(job)
    assert not (out / "model.safetensors").exists()
    saved = read(out / "checkpoint.safetensors")[1]["position"]
    assert slurm.ended(urgent) == "COMPLETED"
    assert slurm.ended(job) == "COMPLETED", log.read_text()
    assert "all steps so far are saved" in log.read_text()
    assert (saved["epoch"], saved["step"]) > (0, 0)
    assert same_bits(out, trained)


def test_a_training_on_two_nodes_loses_one_and_then_the_first(
    slurm: Machines, place: Path, small: Path
) -> None:
    """The first has the batch step and Ray's head; all ends with an undisturbed one's bits."""
    words = ["--task", "crystal_system", "--epochs", "60", "--workers", "2"]
    out, log = place / "run", place / "log"
    options = ["--partition=low", "--nodes=2", "--cpus-per-task=1", "--time=10", f"--output={log}"]
    job = slurm.sbatch(*options, TEMPLATES / "train.sbatch", small, out, *words)

    def epochs() -> int:
        path = out / "history.csv"
        return path.read_text().count("\n") if path.exists() else 0

    counts = [0]
    for times, lost in ((1, slurm.nodes[1]), (2, slurm.nodes[0])):
        slurm.until(lambda: epochs() > counts[-1] + 1, f"epochs after {counts} are done", 120)
        assert lost in slurm.nodes_of(job)
        slurm.kill(lost)
        try:
            # As a health check does, before the controller misses it and Ray goes on without it.
            slurm.run("scontrol", "update", f"nodename={lost}", "state=down", "reason=power")
            slurm.requeued(job, times)
        finally:
            slurm.start(lost)
        counts.append(epochs())
    assert counts[-1] < 61, "all was done before the last fault"
    assert slurm.ended(job) == "COMPLETED", log.read_text()
    slurm.run("xtal", "train", small, place / "undisturbed", *words)
    assert same_bits(out, place / "undisturbed")


def test_a_training_goes_on_when_nobody_tells_the_controller_of_a_lost_node(
    slurm: Machines, place: Path, small: Path
) -> None:
    """SlurmdTimeout alone makes it miss the node; Ray may have begun again without it by then."""
    words = ["--task", "crystal_system", "--epochs", "40", "--workers", "2"]
    out, log = place / "run", place / "log"
    options = ["--nodes=2", "--cpus-per-task=1", "--time=10", f"--output={log}"]
    job = slurm.sbatch(*options, TEMPLATES / "train.sbatch", small, out, *words)
    history = out / "history.csv"
    slurm.until(lambda: history.exists() and history.read_text().count("\n") > 3, "epochs", 120)
    lost = slurm.nodes_of(job)[1]
    slurm.kill(lost)
    try:
        slurm.requeued(job)
        assert not (out / "model.safetensors").exists(), "all was done before the fault"
    finally:
        slurm.revive(lost)
    assert slurm.ended(job) == "COMPLETED", log.read_text()
    attempts = list(whole_lines(place / "run.jobs" / "attempts.jsonl"))
    assert len({json.loads(line)["mark"] for line in attempts}) == len(attempts) == 2
    slurm.run("xtal", "train", small, place / "undisturbed", *words)
    assert same_course(out, place / "undisturbed")


def test_a_grid_of_24_trials_survives_a_bad_night(
    slurm: Machines, place: Path, small: Path
) -> None:
    """Its time limit, a preemption, a requeue, then cancelled and submitted on more nodes."""
    grid_file(place / "grid.toml", small, arms=SIX, seeds=4, epochs=36, width=32)
    out, log = place / "out", place / "log"
    record = out / "record.jsonl"

    def submit(*options: str) -> str:
        words = ["--partition=low", "--cpus-per-task=1", f"--output={log}", *options]
        return slurm.sbatch(*words, TEMPLATES / "ablate.sbatch", place / "grid.toml", out)

    def done() -> int:
        return len(list(whole_lines(record))) if record.exists() else 0

    def more(before: int) -> None:
        slurm.until(lambda: done() > before, f"more than {before} trials are done", 180)

    job = submit("--nodes=2", "--time=1", "--signal=B:USR1@35")
    slurm.requeued(job)
    counts = [done()]
    slurm.run("scontrol", "update", f"jobid={job}", "timelimit=20")
    more(counts[-1])
    urgent = slurm.sbatch("--partition=batch", "--nodes=3", "--exclusive", "--wrap=sleep 1")
    slurm.requeued(job, 2)
    assert slurm.ended(urgent) == "COMPLETED"
    counts.append(done())
    more(counts[-1])
    slurm.run("scontrol", "requeue", job)
    slurm.requeued(job, 3)
    counts.append(done())
    more(counts[-1])
    slurm.run("scancel", job)
    assert slurm.ended(job) == "CANCELLED"
    counts.append(done())
    assert counts[-1] < 24, "all was done before the last fault"
    assert slurm.ended(submit("--nodes=3", "--time=20")) == "COMPLETED", log.read_text()
    assert (out / "report.html").exists()
    assert not list((out / "fits").glob("*"))
    slurm.run("xtal", "ablate", place / "grid.toml", place / "undisturbed")
    assert rows_of(out) == rows_of(place / "undisturbed")
    assert [row["status"] for row in rows_of(out)] == ["done"] * 24


def test_a_grid_is_killed_at_its_limit_and_then_loses_its_head(
    slurm: Machines, place: Path, small: Path
) -> None:
    """Trials that hang hear no warning; then the node with batch step and Ray's head is gone."""
    grid = grid_file(place / "grid.toml", small, arms=SIX[:2], seeds=3, epochs=120, width=32)
    out, log = place / "out", place / "log"

    def submit(*options: str) -> str:
        words = ["--partition=low", "--cpus-per-task=1", f"--output={log}", "--time=20", *options]
        return slurm.sbatch(*words, TEMPLATES / "ablate.sbatch", grid, out)

    job = submit("--nodes=2", "--signal=B:URG@10")
    slurm.until(lambda: any(out.glob("fits/*")), "trials are at work", 180)
    for node in slurm.nodes_of(job):
        slurm.on(node, ["pkill", "-STOP", "-f", "^ray::"])
    slurm.until(lambda: seconds_of(slurm.job(job)["RunTime"]) >= 60, "a minute is over", 90)
    slurm.run("scontrol", "update", f"jobid={job}", "timelimit=1")
    assert slurm.ended(job) == "TIMEOUT"
    for node in slurm.nodes:
        slurm.until(lambda n=node: slurm.processes(n) == [], f"no process is left on {node}", 20)
        assert slurm.left_in_tmp(node) == []
    assert any(out.glob("fits/*"))
    job = submit("--nodes=2")
    slurm.until((place / "out.jobs" / f"dashboard-{job}.json").exists, "Ray is at work", 60)
    head = slurm.nodes_of(job)[0]
    slurm.kill(head)
    try:
        slurm.requeued(job)
        assert slurm.ended(job) == "COMPLETED", log.read_text()
    finally:
        slurm.revive(head)
    told = (place / "out.jobs" / f"ray-{job}-{head}.log").read_text()
    assert f"{head}, where job {job} began, is lost" in told
    assert not list((out / "fits").glob("*"))
    slurm.run("xtal", "ablate", grid, place / "undisturbed")
    assert rows_of(out) == rows_of(place / "undisturbed")
    assert [row["status"] for row in rows_of(out)] == ["done"] * 6


def test_a_grid_on_one_node_is_killed_for_its_memory_and_then_cancelled(
    slurm: Machines, place: Path, small: Path
) -> None:
    """Ray's processes end with their driver, however that ends; so does the folder of the token."""
    grid = grid_file(place / "grid.toml", small, arms=SIX, seeds=4, epochs=200, width=32)
    out = place / "out"
    submit = ["xtal", "submit", "ablate", grid, out, "--site", slurm.shared / "site.toml"]
    job = json.loads(slurm.run(*submit, "--json").stdout)["job"]

    def at_work(node: str) -> bool:
        return any(line.startswith("ray::") for line in slurm.processes(node))

    slurm.until(lambda: any(out.glob("fits/*")), "trials are at work", 180)
    (node,) = slurm.nodes_of(job)
    slurm.on(node, ["pkill", "-KILL", "-f", "bin/xtal ablate"])
    slurm.until(lambda: not at_work(node), "Ray is gone", 5)
    slurm.requeued(job)
    assert slurm.left_in_tmp(node) == []
    slurm.until(lambda: (out / "driver.json").exists() and any(map(at_work, slurm.nodes)),
                "it is at work again", 120)  # fmt: skip
    assert slurm.run("xtal", "cancel", out).stdout == f"cancelled: {job}\n"
    slurm.until(lambda: slurm.job(job)["JobState"] == "CANCELLED", "it has ended", 30)
    for each in slurm.nodes:
        slurm.until(lambda n=each: slurm.processes(n) == [], f"no process is left on {each}", 10)
        assert slurm.left_in_tmp(each) == []


def test_an_element_of_an_array_saves_and_is_taken_up_again(
    slurm: Machines, place: Path, small: Path, trained: Path
) -> None:
    """SIGUSR2, as submitit has SLURM send it before the time limit."""
    runs = place / "a b $(touch owned)&"
    submit = ["xtal", "submit", "train", small, runs, "--array", "2"]
    submit += ["--site", slurm.shared / "site.toml", *TRAINING]
    shown = slurm.run(*submit, "--dry-run").stdout.partition("\nby submitit")[0]
    # As within another job.
    outside = ["env", "SLURM_JOB_ID=99999", "SLURM_MEM_PER_CPU=100", "SBATCH_NO_REQUEUE=1"]
    job = json.loads(slurm.run(*outside, *submit, "--json").stdout)["job"]
    (script,) = place.glob("*.jobs/*/*_submission.sh")
    told = set(script.read_text().splitlines())
    asked = shlex.split(shown.partition("sbatch ")[2])
    assert {f"#SBATCH {word}" for word in asked} <= told
    slurm.until((runs / "seed-0" / "history.csv").exists, "a training has begun", 60)
    slurm.run("scancel", "--signal=USR2", f"{job}_0")
    slurm.until(lambda: slurm.job(f"{job}_0")["Restarts"] == "1", "it is requeued", 60)
    saved = read(runs / "seed-0" / "checkpoint.safetensors")[1]["position"]
    assert (saved["epoch"], saved["step"]) > (0, 0)
    assert not (runs / "seed-0" / "model.safetensors").exists()
    slurm.until(lambda: slurm.run("squeue", "-h", "-j", job).stdout == "", "the array is done", 120)
    assert same_bits(runs / "seed-0", trained)
    assert (runs / "seed-1" / "metrics.json").exists()
    attempts = [path.read_text().count("\n") for path in sorted(runs.glob("*.jobs/attempts.jsonl"))]
    assert attempts == [2, 1]
    logs = [path.read_text() for path in place.glob("*.jobs/*/*_0_log.out")]
    assert sum("all steps so far are saved" in text for text in logs) == 1, logs
    assert not list(slurm.shared.rglob("owned"))


def test_what_slurm_would_expand_in_a_name_is_refused_for_arrays(
    slurm: Machines, place: Path, small: Path
) -> None:
    for name in ("50%a", "a\nb", "it's"):
        words = ["xtal", "submit", "train", small, place / name, "--array", "2", *TRAINING]
        done = slurm.run(*words, "--site", slurm.shared / "site.toml", check=False)
        assert done.returncode == 2
        assert "an array cannot work below a folder" in done.stderr
    assert slurm.run("squeue", "-h").stdout == ""


def test_no_progress_twice_is_the_end(slurm: Machines, place: Path) -> None:
    script = place / "stuck.sbatch"
    script.write_text(
        '#!/bin/bash\nexec python -m cluster.attempt "$1" -- bash -c "echo it ran; exit 75"\n'
    )
    words = ["--requeue", "--open-mode=append", f"--output={place}/log", "--time=5"]
    job = slurm.sbatch(*words, script, place / "out")
    assert slurm.ended(job) == "FAILED"
    log = (place / "log").read_text()
    assert log.count("it ran") == 2
    assert f"job {job} made no progress in its last two attempts" in log
    assert slurm.job(job)["Restarts"] == "2"


def test_cancelled_is_not_requeued_and_goes_on_with_other_nodes(
    slurm: Machines, place: Path, undisturbed: tuple[int, str]
) -> None:
    out = place / "data"
    job = featurizing(slurm, out, "--nodes=2")
    begun(slurm, out)
    before = slurm.job(job)["Restarts"]
    slurm.run("scancel", job)
    assert slurm.ended(job) == "CANCELLED"
    time.sleep(1)
    assert slurm.job(job)["Restarts"] == before, (place / "data.log").read_text()
    assert slurm.ended(featurizing(slurm, out, "--nodes=3")) == "COMPLETED"
    assert content(out) == undisturbed


def test_a_disk_that_is_full_for_a_while_delays_the_work(
    slurm: Machines, place: Path, undisturbed: tuple[int, str]
) -> None:
    disk, log = place / "disk", place / "log"
    disk.mkdir()
    slurm.on("node1", ["mount", "-t", "tmpfs", "-o", "size=12m", "tmpfs", disk])
    try:
        words = ["--ntasks-per-node=2", "--time=5", "--nodelist=node1", f"--output={log}"]
        words += [str(TEMPLATES / "featurize.sbatch"), SOURCE, str(disk / "data"), *OPTIONS]
        job = slurm.sbatch(*words)
        # Which of the two depends on how much the last shards have given back.
        said = ("No space left on device; waiting up to 600 s", "for its disk (exit code 74)")
        slurm.until(
            lambda: log.exists() and any(each in log.read_text() for each in said),
            "the disk is full",
            180,
        )
        assert slurm.job(job)["JobState"] == "RUNNING"
        slurm.on("node1", ["mount", "-o", "remount,size=200m", disk])
        assert slurm.ended(job) == "COMPLETED", log.read_text()
        assert slurm.job(job)["Restarts"] == "0"
        slurm.on("node1", ["cp", "-r", disk / "data", place / "copy"])
    finally:
        slurm.on("node1", ["umount", disk])
    assert content(place / "copy") == undisturbed


def test_a_failed_link_ends_the_chain(slurm: Machines, place: Path) -> None:
    (place / "empty.jsonl").write_text("{}\n")
    words = ["xtal", "submit", "all", place / "empty.jsonl", place / "run"]
    done = slurm.run(*words, "--site", slurm.shared / "site.toml")
    jobs = [line.rpartition(" ")[2] for line in done.stdout.splitlines() if ": job " in line]
    assert len(jobs) == 3
    assert slurm.ended(jobs[0]) == "FAILED"
    assert [slurm.ended(job) for job in jobs[1:]] == ["CANCELLED", "CANCELLED"]
    rows = json.loads(slurm.run("xtal", "jobs", place / "run", "--json").stdout)
    assert [row["verb"] for row in rows] == ["featurize", "train", "ablate"]
    assert [row["state"] for row in rows] == ["FAILED", "CANCELLED", "CANCELLED"]
    assert "-" not in "".join(row["elapsed"] for row in rows)  # not days since 1970
    told = slurm.run("xtal", "jobs", place / "run").stdout
    assert "…" not in told  # at 80 columns
    told = slurm.run("xtal", "watch", place / "run", "--once").stdout
    assert f"waiting for {place}/run/train: no file yet" in told
    # As a lost node leaves it.
    seen = {"job": jobs[0], "node": "node1", "port": 9, "token": "/tmp/gone"}
    (place / "run" / "dataset.jobs" / f"dashboard-{jobs[0]}.json").write_text(json.dumps(seen))
    done = slurm.run("xtal", "dashboard", place / "run", check=False)
    assert done.returncode == 2
    assert "has a Ray now" in done.stderr


def test_a_job_that_no_node_could_begin_has_no_log(slurm: Machines, place: Path) -> None:
    log = Path("/proc/no/log")  # as a folder that the login node alone has
    job = slurm.sbatch(f"--output={log}", "--wrap=true")
    record(place / "run.jobs", {"job": job, "verb": "train", "log": str(log)})
    slurm.until(
        lambda: slurm.job(job)["Reason"] not in ("None", "Resources", "Priority"), "it is told", 60
    )
    told = slurm.run("xtal", "jobs", place / "run").stdout
    assert f"job {job}: no log was written" in told


def test_array_of_trainings(slurm: Machines, place: Path, small: Path) -> None:
    words = ["--task", "crystal_system", "--model", "majority"]
    options = ["--array=0-1", f"--output={place}/log-%a", "--time=5"]
    script = TEMPLATES / "train-array.sbatch"
    job = slurm.sbatch(*options, script, small, place / "runs", *words)
    slurm.until(lambda: slurm.run("squeue", "-h", "-j", job).stdout == "", "the array is done", 120)
    for seed in range(2):
        config = json.loads((place / "runs" / f"seed-{seed}" / "config.json").read_text())
        assert config["training"]["seed"] == seed
        assert (place / "runs" / f"seed-{seed}" / "metrics.json").exists()
