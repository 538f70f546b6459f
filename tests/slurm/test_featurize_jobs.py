"""Featurization under srun and MPI on real nodes."""

import json
import os
import shlex
import shutil
from pathlib import Path

import pytest
from machines import ROOT, Machines
from tiny import document, run, write_lines

pytestmark = pytest.mark.slurm

# Space, quotes, newline, a command, a backslash, SLURM's own pattern, and what a URL would read.
HOSTILE = "a b'c\"d\n$(touch owned);\\e\\\\%j#?&"


def content(folder: Path) -> tuple[int, str]:
    manifest = json.loads((folder / "manifest.json").read_text())
    return manifest["structures"], manifest["content_hash"]


def test_template_on_two_nodes_with_hostile_names(slurm: Machines, place: Path) -> None:
    source = write_lines(
        place / f"{HOSTILE}.jsonl", [document(f"m{i}", 4 + i / 90) for i in range(300)]
    )
    out = place / HOSTILE
    words: list[str | Path] = [
        "--nodes=2",
        "--ntasks-per-node=2",
        f"--output={place}/log",
        "--time=5",
    ]
    job = slurm.sbatch(
        *words, ROOT / "slurm" / "featurize.sbatch", source, out, "--selection", "miller:2"
    )
    assert slurm.ended(job) == "COMPLETED", (place / "log").read_text()
    run(source, place / "alone")
    assert content(out) == content(place / "alone")
    logs = sorted(path.name for path in (out / "logs").iterdir())
    assert logs == [f"rank-{rank:05d}.log" for rank in range(4)]
    assert not list(place.rglob("owned"))
    assert not (slurm.shared / "owned").exists()


def test_a_probe_finds_an_mpi_that_does_not_meet(slurm: Machines, place: Path) -> None:
    for mpi, code in (("pmi2", 0), ("none", 1)):
        site = place / f"{mpi}.toml"
        site.write_text(f'cores_per_node = 2\nmpi = "{mpi}"\n')
        words = ["xtal", "submit", "featurize", "prototypes:14", place / "data", "--site", site]
        # As within another job, and in a loop that reads lines.
        script = 'export SLURM_JOB_ID=99999; "$@"; echo "$?"; cat'
        words = ["sh", "-c", script, "-", *words, "--dry-run", "--probe"]
        done = slurm.run(*words, input="next line")
        assert done.stdout.endswith(f"{code}\nnext line"), done.stderr
    assert "the launcher started 2 processes, the MPI library sees 1" in done.stderr
    assert "srun --mpi=list" in done.stderr


def test_a_chain_uses_all_nodes_and_is_checked_before_it_begins(
    slurm: Machines, place: Path
) -> None:
    words = ["xtal", "submit", "all", "prototypes:14", place / "run"]
    words += ["--site", slurm.shared / "site.toml", "--dry-run", "--json"]
    told = json.loads(slurm.run(*words, "--nodes", "2").stdout)
    assert [each["verb"] for each in told] == ["featurize", "train", "ablate"]
    assert told[1]["words"][-2:] == ["--workers", "0"]
    assert told[0]["expected"]["expected"]["records"] == 14
    assert "expected" not in told[1]  # which needs the dataset
    assert "what it takes is known once there is data" in slurm.run(*words[:-1]).stdout
    for more, said in (("--time=abc", "give minutes"), ("--after=x", "the number of a job")):
        done = slurm.run(*words, more, check=False)
        assert done.returncode == 2
        assert said in done.stderr


def test_a_chain_whose_data_is_there_says_what_each_part_takes(
    slurm: Machines, place: Path, small: Path
) -> None:
    shutil.copytree(small, place / "run" / "dataset")
    words = ["xtal", "submit", "all", "prototypes:140", place / "run", "--task", "crystal_system"]
    (place / "features.toml").write_text('selection = "miller:2"\nshard_structures = 50\n')
    words += ["--features", place / "features.toml", "--site", slurm.shared / "site.toml"]
    told = json.loads(slurm.run(*words, "--dry-run", "--json").stdout)
    assert all(each["job_seconds"] > 0 for each in told[1:])
    assert told[2]["words"][0] == str(place / "run" / "grid.toml")
    assert sum(told[2]["expected"]["counts"]["arm"].values()) == 18  # six arms, three seeds
    assert told[2]["expected"]["counts"]["task"] == {"crystal_system": 18}
    assert [path.name for path in (place / "run").iterdir()] == ["dataset"]
    assert not (place / "run" / "grid.toml").exists()


@pytest.mark.parametrize(
    ("site", "said"),
    [
        ("cores_per_node = 3", "0 of the nodes of batch have cores_per_node = 3; the most is 2"),
        ('memory_per_node = "9G"', "have memory_per_node = 9216; the most is 8000"),
        ("[train]\ngpus_per_node = 1", "have gpus_per_node = 1; the most is 0"),
        ('constraint = "fast"', "0 of the nodes of batch have constraint = fast"),
        ("warning_seconds = 3600", "--time 60 is over before warning_seconds = 3600"),
    ],
)
def test_what_no_node_has_is_refused_before_the_queue(
    slurm: Machines, place: Path, site: str, said: str
) -> None:
    (place / "site.toml").write_text(f'partition = "batch"\n{site}\n')
    words = ["xtal", "submit", "all", "prototypes:14", place / "run", "--site", place / "site.toml"]
    done = slurm.run(*words, "--dry-run", check=False)
    assert done.returncode == 1
    assert said in done.stderr
    # Another partition than the default may be the site's choice: but then SLURM itself is asked.
    (place / "site.toml").write_text(site)
    done = slurm.run(*words, "--dry-run", check=False)
    assert done.returncode == 1
    assert "warning_seconds" in site or "sbatch: SLURM refuses the job" in done.stderr
    assert said.replace("of batch", "of the default partition") in done.stderr


def test_what_slurm_itself_would_refuse_is_never_begun(
    slurm: Machines, place: Path, small: Path
) -> None:
    site = place / "site.toml"
    site.write_text('[train]\noptions = ["--licenses=nobody-has-it:1"]\n')
    for words in (["all", "prototypes:14"], ["train", small, "--array", "2"]):
        words = ["xtal", "submit", *words[:2], place / "run", "--site", site, *words[2:]]
        done = slurm.run(*words, check=False)
        assert done.returncode == 1
        assert "SLURM refuses the job: Invalid license specification" in done.stderr
        assert not (place / "run.jobs" / "jobs.jsonl").exists()
    site.write_text('partition = "batch,low"')
    done = slurm.run(*words, "--task", "crystal_system", "--dry-run")
    assert "train: SLURM would start it at 2" in done.stdout
    assert "partition" not in done.stderr


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["featurize", "nowhere.jsonl"], "'nowhere.jsonl' is no file"),
        (["all", "nowhere.jsonl"], "'nowhere.jsonl' is no file"),
        (["train", "SMALL"], "has no label bulk_modulus"),
        (["ablate", "grid.toml"], "nowhere"),
    ],
)
def test_what_is_not_there_is_told_before_the_queue(
    slurm: Machines, place: Path, small: Path, words: list[str], said: str
) -> None:
    """Unless another job may make it."""
    grid = 'dataset = "nowhere"\narms = ["none", "basis_only"]\n[training]\n'
    (place / "grid.toml").write_text(grid + 'task = "bulk_modulus"\n')
    first = place / words[1] if words[1] == "grid.toml" else small
    words = [words[0], words[1] if words[1] == "nowhere.jsonl" else str(first), str(place / "out")]
    words = ["xtal", "submit", *words, "--site", str(slurm.shared / "site.toml"), "--json"]
    before = slurm.sbatch("--hold", "--wrap=true")
    done = slurm.run(*words, check=False)
    assert done.returncode == 2
    assert said in done.stderr
    assert [path.name for path in place.rglob("*") if path.is_file()] == ["grid.toml"]
    told = json.loads(slurm.run(*words, "--after", before).stdout)
    jobs = told if isinstance(told, list) else [told]
    assert slurm.job(jobs[0]["job"])["Dependency"].startswith(f"afterok:{before}")


def test_a_job_waits_for_a_node_that_is_out_and_others_for_the_job(
    slurm: Machines, place: Path
) -> None:
    words = ["xtal", "submit", "featurize", "prototypes:14", place / "data", "--nodes", "3"]
    words += ["--site", slurm.shared / "site.toml", "--selection", "miller:2"]
    slurm.run("scontrol", "update", "nodename=node3", "state=drain", "reason=test")
    try:
        done = slurm.run(*words, "--json")
        job = json.loads(done.stdout)["job"]
        assert json.loads(done.stdout)["expected"]["expected"]["records"] == 14
        assert "it pends until a node is back; down or drained: node3" in done.stderr
        assert "which looks like one machine's disk" in done.stderr  # as this one is
        assert slurm.job(job)["JobState"] == "PENDING"
        done = slurm.run(*words, check=False)
        assert done.returncode == 1
        assert f"job {job} of {place / 'data'} waits or runs" in done.stderr
        assert f"give --after {job}" in done.stderr
        second = json.loads(slurm.run(*words, "--json", "--after", job).stdout)["job"]
        assert slurm.job(second)["Dependency"].startswith(f"afterok:{job}")
        assert slurm.run(*words, "--after", job, check=False).returncode == 1
        slurm.run("xtal", "cancel", place / "data")
        assert slurm.ended(job) == "CANCELLED"
    finally:
        slurm.run("scontrol", "update", "nodename=node3", "state=resume")
    for after, said in ((job, f"job {job} has ended as CANCELLED"), ("99999", "does not know")):
        done = slurm.run(*words, "--after", after, check=False)
        assert done.returncode == 2
        assert said in done.stderr


def test_a_folder_that_compute_nodes_cannot_see(slurm: Machines, place: Path) -> None:
    words = ["xtal", "submit", "featurize", "prototypes:14", "/tmp/data", "--dry-run"]
    done = slurm.run(*words, "--site", slurm.shared / "site.toml", check=False)
    assert done.returncode == 1
    assert "/tmp/data.jobs is on tmpfs, which compute nodes do not see" in done.stderr


def test_submit_records_shows_and_cancels(slurm: Machines, place: Path) -> None:
    source = write_lines(
        place / f"{HOSTILE}.jsonl", [document(f"m{i}", 4 + i / 90) for i in range(64)]
    )
    out = place / f"{HOSTILE} out"
    site = place / "site.toml"
    site.write_text('cores_per_node = 2\nsetup = ["export TELL=\'it is set\'", "echo $TELL"]\n')
    words = ["xtal", "submit", "featurize", source, out, "--site", site, "--nodes", "2"]
    words += ["--selection", "miller:2"]
    dry = slurm.run(*words, "--dry-run").stdout
    line = next(each for each in dry.split("XTAL_MPI=pmi2 ", 1)[1:])
    assert shlex.split(line.partition("\nbefore the work")[0])[-4:] == [
        str(source),
        str(out),
        "--selection",
        "miller:2",
    ]
    assert not out.exists()
    expected = json.loads(slurm.run(*words, "--dry-run", "--json").stdout)
    assert [path.name for path in place.iterdir() if path not in (source, site)] == []
    assert (expected["job"], expected["expected"]["expected"]["records"]) == (None, 64)
    # What would make it an array, and of a surrounding job.
    told = ["SBATCH_ARRAY_INX=0-1", "SBATCH_NO_REQUEUE=1", "SLURM_MEM_PER_CPU=100"]
    done = slurm.run("env", *told, *words, "--json")
    job = json.loads(done.stdout)["job"]
    assert slurm.ended(job) == "COMPLETED", done.stdout
    assert (slurm.job(job)["JobId"], slurm.job(job)["Requeue"]) == (job, "1")
    run(source, place / "alone")
    assert content(out) == content(place / "alone")
    (row,) = json.loads(slurm.run("xtal", "jobs", out, "--json").stdout)
    assert (row["job"], row["state"], row["verb"]) == (job, "COMPLETED", "featurize")
    assert "it is set" in Path(row["log"]).read_text()
    assert "none, all have ended" in slurm.run("xtal", "cancel", out).stdout
    assert json.loads(slurm.run("xtal", "cancel", out, "--json").stdout) == {"cancelled": []}
    assert not list(slurm.shared.rglob("owned"))
    recorded = (out.with_name(out.name + ".jobs") / "jobs.jsonl").read_text()
    assert "provenance" in recorded
    assert os.environ["PATH"] not in recorded
