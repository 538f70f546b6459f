"""The site file, what sbatch is told, and what SLURM answers."""

import json
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from tiny import ROOT, command

from cluster.errors import RunFailed, UserError
from cluster.ray_cluster import cpus_of
from cluster.ray_node import resources
from cluster.site import VERBS, Site, check_time, read_site, write_setup
from cluster.slurm import (
    Job,
    Kind,
    look,
    parse_kind,
    parse_sacct,
    parse_show_job,
    seconds_of,
    submit,
)
from cluster.submit import Plan, clean_environment
from cluster.submit_asked import Estimate

# What a dry run of 24 trainings of an hour says.
HOURS = {
    "expected": {},
    "seconds": {"alone": 0.0, "shared": 24 * 3600.0, "shares": 24},
    "memory": 1 << 30,
}
SITES = [ROOT / "slurm" / "site.toml.example", *sorted((ROOT / "slurm" / "profiles").glob("*"))]


@pytest.mark.parametrize("path", SITES, ids=lambda path: path.name)
def test_sites_that_we_ship_are_valid(path: Path) -> None:
    sites = read_site(path)
    assert set(sites) == set(VERBS)
    assert sites["featurize"].cores_per_node > 1


def test_a_table_changes_one_verb(tmp_path: Path) -> None:
    path = tmp_path / "site.toml"
    path.write_text('partition = "cpu"\ncores_per_node = 8\n[train]\ngpus_per_node = 2\n')
    sites = read_site(path)
    assert [sites[verb].gpus_per_node for verb in VERBS] == [0, 2, 0]
    assert "--gpus-per-node=2" in sites["train"].sbatch_options("train")
    assert "--ntasks-per-node=8" in sites["featurize"].sbatch_options("featurize")
    assert "--cpus-per-task=8" in sites["ablate"].sbatch_options("ablate")
    assert "--partition=cpu" in sites["ablate"].sbatch_options("ablate")
    options = 'options = ["--exclude=x", "--time-min=3", "--wait-all-nodes=1"]'
    path.write_text(f'partition = ""\nmpi = "pmix_v4"\n{options}\n')
    site = read_site(path)["ablate"]
    assert not [word for word in site.sbatch_options("ablate") if "--partition" in word]
    assert site.environment() == {"XTAL_MPI": "pmix_v4"}
    path.write_text('interface = "hsn0"\n[ablate]\nmetrics = true\n')
    sites = read_site(path)
    own = {"XTAL_MPI": "pmi2", "XTAL_RAY_INTERFACE": "hsn0"}
    assert sites["train"].environment() == own
    assert sites["ablate"].environment() == own | {"XTAL_RAY_METRICS": "1"}


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("cores = 3", "cores: unknown key"),
        ("[train]\ncores = 3", r"\[train\]: cores: unknown key"),
        ("train = 3", "write a table"),
        ("cores_per_node = 0", "cores_per_node = 0: must be ≥ 1"),
        ('mpi = "pmix v3"', "mpi = 'pmix v3'"),
        ('options = ["exclusive"]', "write the long form"),
        ('options = ["-Cnvme"]', "write the long form"),
        (
            'options = ["--nodes=3"]',
            "--nodes is not for a site file: leave it out, and give --nodes",
        ),
        ('options = ["--array=0-1"]', "--array is not for a site file"),
        ('options = ["--time=3"]', "--time is not for a site file"),
        ('options = ["--no-requeue"]', "--no-requeue is not for a site file: leave it out"),
        ('options = ["--expo=NONE"]', "'--expo=NONE': --export is not for a site file"),
        ('options = ["--mem=3G"]', "--mem is not for a site file: leave it out, and give mem"),
        ('options = ["--wait"]', "--wait is not for a site file: leave it out"),
        ('setup = ["a\\nb"]', r"'a\\nb': line breaks"),
        ('account = "a\\n#SBATCH --x"', "line breaks and other control characters"),
        ('memory_per_node = "many"', "memory_per_node"),
        ('container = ["apptainer exec x"]', r"a list of words: \['apptainer', 'exec', 'x'\]"),
        ('scratch = "here"', "scratch"),
    ],
)
def test_wrong_sites_are_refused(tmp_path: Path, text: str, said: str) -> None:
    path = tmp_path / "site.toml"
    path.write_text(text)
    with pytest.raises(UserError, match=said):
        read_site(path)


@pytest.mark.parametrize(
    ("time", "seconds"),
    [
        ("5", 300),
        ("5:30", 330),
        ("2:00:00", 7200),
        ("1-00:00:00", 86400),
        ("1-12", 129600),
        ("UNLIMITED", float("inf")),
    ],
)
def test_times(time: str, seconds: float) -> None:
    assert seconds_of(time) == seconds


@pytest.mark.parametrize(
    ("keys", "gpus"),
    [
        ({}, 0),
        ({"gpus_per_node": 2}, 2),
        ({"gres": "gpu:a100:4"}, 4),
        ({"gres": "gpu:3"}, 3),
        ({"gres": "gpu"}, 1),
    ],
)
def test_gpus_are_counted_in_either_spelling(keys: dict[str, Any], gpus: int) -> None:
    assert Site(**keys).gpus == gpus


@pytest.mark.parametrize(
    ("row", "kind"),
    [
        ("3 2 8000 (null) (null)", Kind(3, 2, 8000, 0, frozenset({"(null)"}))),
        (
            "1 128 512000+ gpu:a100:4(S:0-3) gpu,a100",
            Kind(1, 128, 512000, 4, frozenset({"gpu", "a100"})),
        ),
        ("5 64 1 gpu:a:1,gpu:b:3,shard:8 x", Kind(5, 64, 1, 4, frozenset({"x"}))),
        ("2 8 1 gpu:2 x", Kind(2, 8, 1, 2, frozenset({"x"}))),
    ],
)
def test_what_sinfo_says_of_nodes(row: str, kind: Kind) -> None:
    assert parse_kind(row) == kind


@pytest.mark.parametrize(
    ("text", "mebibytes"), [(None, 0), ("0", 0), ("240G", 245760), ("512", 512), ("1T", 1 << 20)]
)
def test_memory_in_any_unit(text: str | None, mebibytes: int) -> None:
    assert Site(memory_per_node=text).memory == mebibytes


def test_a_container_runs_any_words(tmp_path: Path) -> None:
    site = Site(container=("env", "A=it's $HOME", "sh", "-c", 'echo "$A $*"', "x"), scratch="/s p")
    variables = write_setup(site, tmp_path) | site.environment()
    assert variables["TMPDIR"] == "/s p"
    done = subprocess.run(
        [variables["XTAL_CONTAINER"], "a  b", "$(c)"], capture_output=True, text=True, check=True
    )
    assert done.stdout == "it's $HOME a  b $(c)\n"


@pytest.mark.parametrize("time", ["", "an hour", "1h", "5:3", "; rm -rf /", "--x"])
def test_wrong_times(time: str) -> None:
    with pytest.raises(UserError, match="give minutes"):
        check_time(time)


def test_words_for_sbatch_are_data(tmp_path: Path) -> None:
    path = tmp_path / "site.toml"
    path.write_text('account = "a b; $(touch owned)"\n')
    site = read_site(path)["featurize"]
    out = tmp_path / "50% of\nit"
    plan = Plan("featurize", out, ("s $(x)", str(out)), site, 2, "5", "17")
    words = plan.sbatch()
    assert "--account=a b; $(touch owned)" in words
    assert words[-2:] == ["s $(x)", str(out)]
    assert "--dependency=afterok:17" in words
    assert "--kill-on-invalid-dep=yes" in words
    assert any(f"--output={tmp_path}/50%% of\nit.jobs/featurize-" in word for word in words)
    assert Path(words[-3]) == ROOT / "slurm" / "featurize.sbatch"
    (log,) = (word for word in replace(plan, result=out / "\\").sbatch() if "--output" in word)
    assert log.startswith(f"--output={out}/\\\\.jobs/featurize-")


def test_what_scontrol_says() -> None:
    one = (
        "JobId=7 JobName=x JobState=RUNNING Reason=None Restarts=1 RunTime=00:01:02 "
        "NodeList=n[1-2] ExitCode=0:0 Command=/a/JobState=FAILED b\n\n"
    )
    job = parse_show_job(one)
    assert (job.id, job.state, job.elapsed, job.nodes) == ("7", "RUNNING", "00:01:02", "n[1-2]")
    assert (job.reason, job.restarts, job.over) == ("", "1", False)
    array = "".join(
        f"JobId={8 + at} ArrayJobId=8 ArrayTaskId={at} JobState={state} NodeList=(null)\n"
        for at, state in enumerate(["COMPLETED", "RUNNING", "FAILED"])
    )
    assert (parse_show_job(array).id, parse_show_job(array).state) == ("8", "RUNNING")
    assert parse_show_job(array.replace("RUNNING", "COMPLETED")).state == "FAILED"


def test_the_accounting_remembers_what_the_controller_has_forgotten() -> None:
    text = (
        "1|COMPLETED|00:00:02|node1|None|0:0\n"
        "12|CANCELLED by 1000|00:01:02|n[1-2]|Dependency|0:15\n"
        "7_0|COMPLETED|00:00:05|n1|None|0:0\n7_1|TIMEOUT|00:10:00|n2|None|0:0\n"
    )
    job = parse_sacct(text, "1")
    assert (job.state, job.elapsed, job.nodes, job.reason, job.exit_code) == (
        "COMPLETED", "00:00:02", "node1", "", "0:0",
    )  # fmt: skip
    assert (parse_sacct(text, "12").state, parse_sacct(text, "12").reason) == (
        "CANCELLED",
        "Dependency",
    )
    assert parse_sacct(text, "7").state == "TIMEOUT"
    assert parse_sacct(text.replace("TIMEOUT", "RUNNING"), "7").state == "RUNNING"
    assert parse_sacct(text, "2").state == "UNKNOWN"
    assert parse_sacct(text, "7_0").state == "COMPLETED"


def test_resources_are_slurms_not_the_hosts() -> None:
    told = {"SLURM_MEM_PER_NODE": "4000", "CUDA_VISIBLE_DEVICES": "0,2"}
    found = resources(told)
    assert (found["memory"], found["cards"]) == (4000 << 20, 2)
    assert resources(told | {"SLURM_GPUS_ON_NODE": "1"})["cards"] == 1
    per_cpu = resources({"SLURM_MEM_PER_CPU": "500"})
    assert per_cpu["memory"] == (500 << 20) * per_cpu["cores"]
    assert per_cpu["cards"] == 0


def test_the_number_of_a_job_is_what_a_site_says_last(tmp_path: Path) -> None:
    """As one of which sbatch greets, or is another program that gives none."""
    program = tmp_path / "sbatch"
    program.write_text('#!/bin/sh\nprintf "$1"\n')
    program.chmod(0o755)
    assert submit([str(program), "Welcome!\\n--> fine\\n17;tiny\\n"], {}) == "17"
    for said in ("", "slurm 22.05"):
        with pytest.raises(RunFailed, match="no number of a job"):
            submit([str(program), said], {})


def test_without_slurm_the_remedy_is_said(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    site = str(SITES[0])
    words = ["submit", "featurize", "prototypes:9", tmp_path / "out", "--site", site]
    assert command(monkeypatch, *words) == 1
    said = capsys.readouterr().err
    assert "there is no scontrol here" in said
    assert "login node" in said
    for grid in (["ablate", "quick", tmp_path / "g", "--dataset", "d"],
                 ["all", "prototypes:9", tmp_path / "a", "--grid", "quick"]):  # fmt: skip
        assert command(monkeypatch, "submit", *grid, "--site", site) == 1
        assert "there is no scontrol here" in capsys.readouterr().err
    assert command(monkeypatch, *words, "--bogus") == 2
    assert "No such option: --bogus" in capsys.readouterr().err
    assert command(monkeypatch, "jobs", tmp_path / "out") == 2
    assert "no job was submitted" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("all prototypes:9 RUN --task colour", "--task colour: must be 'crystal_system'"),
        ("all prototypes:9 RUN --task all", "the default grid asks one question"),
        ("all prototypes:9 RUN --grid none.toml", "none.toml: no such file"),
        ("all prototypes:9 RUN --grid wrong.toml", "retries = 'many'"),
        ("all prototypes:9 RUN --training wrong.toml", "retries: unknown key"),
        ("all prototypes:9 RUN --features wrong.toml", "retries: unknown key"),
        ("train data RUN --task colour", "--task colour: must be 'crystal_system', 'bulk_modulus'"),
        ("train data RUN --array 2 --model magic", "--model magic: must be 'pointnet'"),
        ("train data RUN --task all --epochs 0", "--epochs 0: must be"),
        ("featurize prototypes:9 RUN --radiation light", "--radiation light: must be"),
        ("ablate wrong.toml RUN", "retries = 'many'"),
        ("ablate quik RUN --dataset data", "quik: no such file"),
        ("ablate quick RUN", "quick.toml: dataset: not given"),
        ("train data RUN --task bulk_modulus", "data is no finished dataset"),
        ("train data RUN --array 2 --seed=5", "an array of N has the seeds 0 to N − 1"),
    ],
)
def test_what_a_verb_would_refuse_is_refused_before_it_waits_in_a_queue(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    words: str,
    said: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "wrong.toml").write_text('retries = "many"\n')
    assert command(monkeypatch, "submit", *words.split(), "--site", str(SITES[0])) == 2
    assert said in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["wrong.toml"]


def test_a_grid_that_was_edited_is_not_written_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "grid.toml").write_text("seeds = [7]\n")
    words = ["submit", "all", "prototypes:9", tmp_path / "run", "--site", str(SITES[0])]
    assert command(monkeypatch, *words) == 2
    assert "grid.toml is another grid than that of --task bulk_modulus" in capsys.readouterr().err
    assert (tmp_path / "run" / "grid.toml").read_text() == "seeds = [7]\n"


def test_what_another_job_was_told_does_not_reach_the_next(monkeypatch: pytest.MonkeyPatch) -> None:
    told = ("SLURM_JOB_ID", "XTAL_SETUP", "XTAL_RAY_JOB", "SBATCH_NO_REQUEUE")
    for name in (*told, "SLURM_CONF"):
        monkeypatch.setenv(name, "/somewhere")
    found = clean_environment()
    assert found["SLURM_CONF"] == "/somewhere"
    assert not set(told) & set(found)


@pytest.mark.parametrize(
    ("gres", "count"),
    [
        ("gpu:a100:4,nvme:1", 4),
        ("nvme:2,gpu:2", 2),
        ("gpu", 1),
        ("gpu:a100", 1),
        ("gpu:a100:2,gpu:h100:1", 3),
        ("gpu:4(S:0-1)", 4),
        ("nvme:1", 0),
    ],
)
def test_gpus_of_a_gres(gres: str, count: int) -> None:
    assert Site(gres=gres).gpus == count


def test_states_that_are_not_over() -> None:
    for state in ("CONFIGURING", "REQUEUE_HOLD", "SIGNALING", "STAGE_OUT", "RUNNING", "PENDING"):
        assert not Job("1", state).over
    for state in ("COMPLETED", "NODE_FAIL", "OUT_OF_MEMORY", "UNKNOWN"):
        assert Job("1", state).over


def test_a_controller_that_does_not_answer_is_no_job_that_has_ended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    for said, known in (("Invalid job id specified", True), ("Unable to contact", False)):
        (tmp_path / "scontrol").write_text(
            f"#!/bin/sh\necho 'slurm_load_jobs error: {said}' >&2\nexit 1\n"
        )
        (tmp_path / "scontrol").chmod(0o755)
        if known:
            assert look("7") == Job("7", "UNKNOWN")
        else:
            with pytest.raises(RunFailed, match="Unable to contact"):
                look("7")


def test_cpus_of_the_nodes_of_a_job() -> None:
    assert cpus_of("128(x2),64") == [128, 128, 64]
    assert cpus_of("8") == [8]


def test_an_estimate_is_compared_with_the_time(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a real one of a real source: on 4 cores a quarter of what one takes."""
    for cores in (1, 4):
        site = Site(cores_per_node=cores, warning_seconds=59)
        words = ("prototypes:560", str(tmp_path / "out"), "--selection", "sphere:1.5")
        plan = Plan("featurize", tmp_path / "out", words, site, nodes=1, time="1")
        found = Estimate.of(plan)
        takes = found.content["seconds"]
        assert found.seconds == pytest.approx(takes["alone"] + takes["shared"] / cores)
        assert found.content["expected"]["records"] == 560
        assert found.memory == cores * found.content["memory"] > cores * 50 << 20
    assert takes["shared"] > 0.1
    with pytest.raises(UserError, match=r"xtal featurize --dry-run: .*'nowhere' is no file"):
        Estimate.told(replace(plan, words=("nowhere", *words[1:])), silent=False)
    # No more processes than trainings, and elements of an array have one node each.
    (tmp_path / "xtal.py").write_text(f"print({json.dumps(json.dumps(HOURS))})")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    grid = replace(plan, verb="ablate", nodes=4, site=Site(cores_per_node=64))
    assert [Estimate.of(grid, n).seconds for n in (None, 2)] == [3600, 3600]
    assert Estimate.of(grid).memory == 24 << 30
    assert Estimate.of(replace(grid, site=Site(cores_per_node=2)), 4).seconds == 10800
    (tmp_path / "xtal.py").write_text("raise MemoryError\n")
    assert Estimate.told(grid, silent=False) == {}  # the login node is no reason to refuse
    assert "MemoryError" in capsys.readouterr().err
    for seconds, times in ((0.9, None), (7.5, 7)):
        Estimate(found.content, seconds, 3 << 30).show(plan)
        said = capsys.readouterr()
        assert f"about {seconds:.0f} s, --time is 1" in said.out
        assert (f"is requeued about {times} times" in said.err) == (times is not None)
    for memory, enough in (("2G", False), ("3072", True), ("0", True), (None, True)):
        small = replace(plan, site=Site(cores_per_node=4, memory_per_node=memory))
        Estimate(found.content, 1.0, 3 << 30).show(small)
        said = capsys.readouterr()
        assert ("memory_per_node = 2G is less than the 3.0 GiB" not in said.err) == enough
