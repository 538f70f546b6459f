"""Ray over the nodes of a job: trainings, grids, neighbours, losses."""

import json
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from grids import grid_file
from machines import ROOT, Machines
from small import same_course

from cluster.files import whole_lines

pytestmark = pytest.mark.slurm
TEMPLATES = ROOT / "slurm"
FETCH = "import sys, urllib.request as r; print(r.urlopen(sys.argv[1]).read().decode())"
# Says where tasks run, what Ray has, and waits for a file to appear before it ends.
PROBE = """
import json, os, stat, sys, time
from pathlib import Path
from cluster.ray_session import cores, job_ray, ray_for

job, out = job_ray(), Path(sys.argv[1])
with ray_for(1) as folder:
    import ray

    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy as On

    @ray.remote(num_cpus=1)
    def where():
        (folder / f"seen-{os.uname().nodename}").touch()
        return os.uname().nodename

    nodes = [node["NodeID"] for node in ray.nodes() if node["Alive"]]
    here = [where.options(scheduling_strategy=On(node, soft=False)).remote() for node in nodes]
    names = sorted(ray.get(here))
    seen = sorted(path.name for path in folder.iterdir())
    told = {"names": names, "seen": seen, "cores": cores(), "nodes": job.nodes,
            "resources": ray.cluster_resources(),
            "folder": oct(stat.S_IMODE(folder.stat().st_mode)),
            "token": oct(stat.S_IMODE(os.stat(job.token).st_mode)), "address": job.address,
            "held": job.token, "user": os.getuid()}
    out.with_suffix(".tmp").write_text(json.dumps(told))
    out.with_suffix(".tmp").rename(out)
    while len(sys.argv) > 2 and not Path(sys.argv[2]).exists():
        time.sleep(0.2)
"""


def ray_job(
    slurm: Machines, place: Path, name: str, *words: str, nodes: int = 3, user: str = "root"
) -> str:
    """A job that runs `PROBE` with Ray on its nodes."""
    (place / "probe.py").write_text(PROBE)
    script = place / "ray.sbatch"
    run = f'python "{place}/probe.py" "$@"'
    script.write_text(f'#!/bin/bash\nexec python -m cluster.ray_cluster "$1" -- {run}\n')
    options = [f"--nodes={nodes}", "--ntasks-per-node=1", f"--output={place}/{name}.log"]
    call = ["sbatch", "--parsable", "--no-kill", "--time=5", *options, script, place / name, *words]
    done = slurm.run(*call) if user == "root" else slurm.as_user(user, "login", call)
    return str(done.stdout).strip()


def told(slurm: Machines, place: Path, name: str, seconds: float = 240) -> dict[str, object]:
    log = place / f"{name}.log"
    try:
        slurm.until((place / name).exists, f"{name} has said where it runs", seconds)
    except AssertionError as error:
        raise AssertionError(f"{error}\n{log.read_text() if log.exists() else ''}") from None
    found: dict[str, object] = json.loads((place / name).read_text())
    return found


def listeners(slurm: Machines, node: str) -> list[str]:
    """Lines of ss, one a TCP port that somebody listens on."""
    return slurm.on(node, ["ss", "-Hltn"]).stdout.splitlines()


def test_two_jobs_side_by_side_and_a_cancelled_one(slurm: Machines, place: Path) -> None:
    """On the same three nodes, a core of each; one is cancelled, one ends by itself."""
    first = ray_job(slurm, place, "a", str(place / "go"))
    second = ray_job(slurm, place, "b", str(place / "go"))
    a, b = (told(slurm, place, name) for name in "ab")
    for each in (a, b):
        assert each["names"] == slurm.nodes
        assert each["seen"] == [f"seen-{node}" for node in slurm.nodes]
        assert (each["cores"], each["nodes"]) == (3, 3)
        assert each["resources"]["CPU"] == 3  # type: ignore[index]  # SLURM's, not the host's
        assert (each["folder"], each["token"]) == ("0o700", "0o600")
    assert a["address"] != b["address"]
    # Of Ray's own fixed ports, at which the two would meet, none is open: the last two of these
    # answer without a token.
    heard = {line.split()[3].rpartition(":")[2] for line in listeners(slurm, "node1")}
    assert not heard & {"6379", "8265", "10001", "52365", "44217", "44227"}
    token = slurm.on("node1", ["sh", "-c", "cat /tmp/xtal-ray-*/token"]).stdout
    assert len(token) == 128  # one of each job
    for path in place.rglob("*"):
        if path.is_file():
            assert not any(t in path.read_text(errors="replace") for t in (token[:64], token[64:]))
    slurm.run("scancel", first)
    assert slurm.ended(first) == "CANCELLED"
    (place / "go").touch()
    assert slurm.ended(second) == "COMPLETED", (place / "b.log").read_text()
    assert not list((place / "b.jobs").glob("ray-*/"))  # of the one that ended in good order


def test_a_node_that_does_not_join_is_named(slurm: Machines, place: Path) -> None:
    slurm.on("node3", ["mount", "-t", "tmpfs", "-o", "size=4k", "tmpfs", "/dev/shm"])
    try:
        job = ray_job(slurm, place, "a")
        assert told(slurm, place, "a")["nodes"] == 2
        assert slurm.ended(job) == "COMPLETED"
    finally:
        slurm.on("node3", ["umount", "/dev/shm"])
    assert "node node3 did not join;" in (place / "a.log").read_text()


# A container, of the kernel's own making: what is at /mnt in it nobody sees outside.
CONTAINER = 'mount --bind "$0" /mnt; export PATH=/mnt:$PATH; exec "$@"'
WRAPPER = """#!/bin/sh
touch {place}/contained-{name}-$(hostname)
exec {real} "$@"
"""


def test_a_chain_in_a_container_one_of_whose_nodes_is_lost(
    slurm: Machines, place: Path, small: Path
) -> None:
    image = place / "image"
    image.mkdir()
    for name in ("xtal", "python"):
        real = shutil.which(name, path=slurm.environment()["PATH"])
        (image / name).write_text(WRAPPER.format(place=place, name=name, real=real))
        (image / name).chmod(0o755)
    words = ["unshare", "--mount", "sh", "-c", CONTAINER, str(image)]
    site = place / "site.toml"
    more = f'metrics = true\nscratch = "/dev/shm/s"\ncontainer = {json.dumps(words)}\n'
    site.write_text((slurm.shared / "site.toml").read_text() + more)
    (place / "features.toml").write_text('selection = "miller:2"\nshard_structures = 50\n')
    (place / "training.toml").write_text("epochs = 2\nbatch_size = 30\n")
    # An arm whose clouds are featurized anew, by ranks that stay on the node of the grid's driver.
    arms = ("none", "point_atoms", "directions_random")
    dataset = place / "study" / "dataset"
    grid = grid_file(place / "grid.toml", dataset, arms=arms, seeds=8, epochs=4, width=16)
    submit = ["xtal", "submit", "all", "prototypes:140", place / "study", "--site", site]
    submit += ["--task", "crystal_system", "--nodes", "3", "--grid", grid, "--json"]
    for name in ("features", "training"):
        submit += [f"--{name}", place / f"{name}.toml"]
    chain = json.loads(slurm.run(*submit, "--probe").stdout)
    _, train, job = (each["job"] for each in chain)
    assert slurm.job(job)["Dependency"].startswith(f"afterok:{train}")
    assert slurm.ended(train, 240) == "COMPLETED", newest(place / "study" / "train.jobs")
    run, out = place / "study" / "train", place / "study" / "ablation"
    slurm.run("xtal", "train", small, place / "alone", "--config", place / "training.toml",
              "--task", "crystal_system")  # fmt: skip
    assert same_course(run, place / "alone")
    said = {f"contained-xtal-{node}" for node in slurm.nodes}
    said |= {f"contained-python-{node}" for node in slurm.nodes}
    assert {path.name for path in place.glob("contained-*")} == said
    record = out / "record.jsonl"
    slurm.until(
        lambda: record.exists() and len(list(whole_lines(record))) > 1, "trials are done", 180
    )
    told = slurm.run("xtal", "dashboard", out).stdout
    assert "answers: HTTP/1.0 200 OK" in told
    jobs = place / "study" / "ablation.jobs"
    assert f"--config.file={jobs}/prometheus.yml" in told
    (group,) = json.loads((jobs / f"targets-{job}.json").read_text())
    assert slurm.on("node2", ["sh", "-c", "ls /dev/shm/s"]).stdout.startswith("xtal-ray-")
    assert group["labels"] == {"run": "ablation", "slurm_job": job}
    assert len(group["targets"]) == 3
    for address in group["targets"]:  # as Prometheus on the login node does
        page = slurm.run("python3", "-c", FETCH, f"http://{address}/metrics").stdout
        assert "ray_node_cpu_count" in page
        assert "ray_xtal_trials_done{" in page or address != group["targets"][0]
    slurm.kill("node3")
    try:
        assert slurm.ended(job, 240) == "COMPLETED", newest(jobs)
    finally:
        slurm.revive("node3")
    results = pq.read_table(out / "results.parquet").to_pylist()
    assert [row["status"] for row in results] == ["done"] * 24
    assert len({row["trial"] for row in results}) == 24
    assert (out / "report.html").exists()
    assert not (jobs / f"targets-{job}.json").exists()
    for node in slurm.nodes[:2]:
        slurm.on(node, ["rmdir", "/dev/shm/s"])  # which is empty


def test_all_of_it_in_one_job(slurm: Machines, place: Path) -> None:
    out = place / "demo"
    words = ["--nodes=2", "--ntasks-per-node=2", f"--output={place}/log", TEMPLATES / "demo.sbatch"]
    for template in TEMPLATES.glob("*.sbatch"):
        assert "\n#SBATCH --signal=B:USR1@120\n#SBATCH --requeue\n" in template.read_text()
    job = slurm.sbatch(*words, out)
    journal = out / "dataset" / "journal"
    slurm.until(lambda: any(journal.glob("at-*")), "featurization has begun", 180)
    slurm.run("scancel", "--batch", "--signal=USR1", job)
    slurm.requeued(job)
    assert slurm.ended(job, 360) == "COMPLETED", (place / "log").read_text()
    results = pq.read_table(out / "ablation" / "results.parquet").to_pylist()
    assert [row["status"] for row in results] == ["done"] * 6
    assert (out / "ablation" / "report.html").exists()


@pytest.fixture
def ssh(slurm: Machines, place: Path) -> Iterator[Path]:
    """A folder with an `ssh` by which the login node reaches node1, as of a user with a key."""
    if shutil.which("sshd") is None:
        pytest.skip("sshd is not installed (apt install openssh-server openssh-client)")
    for name in ("host", "mine"):
        subprocess.run(
            ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", place / name], check=True
        )
    (place / "sshd_config").write_text(
        f"HostKey {place}/host\nAuthorizedKeysFile {place}/mine.pub\nPermitRootLogin yes\n"
        f"PasswordAuthentication no\nStrictModes no\nUsePAM no\nPidFile {place}/sshd.pid\n"
    )
    (place / "ssh_config").write_text(
        f"Host *\nIdentityFile {place}/mine\nUserKnownHostsFile {place}/known\n"
        "StrictHostKeyChecking accept-new\n"
    )
    Path("/run/sshd").mkdir(exist_ok=True)
    (place / "bin").mkdir()
    (place / "bin" / "ssh").write_text(
        f'#!/bin/sh\nexec {shutil.which("ssh")} -F {place}/ssh_config "$@"\n'
    )
    (place / "bin" / "ssh").chmod(0o755)
    slurm.on("node1", [str(shutil.which("sshd")), "-f", place / "sshd_config"])
    yield place / "bin"
    slurm.on("node1", ["pkill", "-F", place / "sshd.pid"])


def test_the_dashboard_is_brought_to_this_machine(slurm: Machines, place: Path, ssh: Path) -> None:
    job = ray_job(slurm, place, "a", str(place / "go"), nodes=2)
    told(slurm, place, "a")
    words = f"PATH={ssh}:$PATH timeout 60 xtal dashboard {place}/a --login me@there --open"
    fetch = f"until python3 -c '{FETCH}' http://127.0.0.1:8265; do sleep 1; done"
    script = f'{words} >{place}/said 2>&1 & timeout 50 sh -c "{fetch}"; kill -INT %1; wait'
    page = slurm.run("bash", "-mc", script, check=False).stdout
    assert "<title>Ray Dashboard</title>" in page, (place / "said").read_text()
    refused = slurm.run(
        "xtal", "dashboard", place / "a", "--login", "me@there", "--open", check=False
    )
    assert refused.returncode == 1
    assert "use the line for your desk" in refused.stderr
    loop = f"while read line; do echo $line; xtal dashboard {place}/a --login me@there; done"
    asked = slurm.run("bash", "-c", f"printf 'first\nsecond\n' | ({loop})").stdout
    assert "second" in asked.split()  # srun leaves the loop its input
    (place / "go").touch()
    assert slurm.ended(job) == "COMPLETED", (place / "a.log").read_text()


def test_a_grid_in_parts_as_an_array(slurm: Machines, place: Path, small: Path) -> None:
    arms = ("none", "intensity_binary", "directions_random")
    grid = grid_file(place / "grid.toml", small, arms=arms, seeds=2, epochs=2, width=16)
    out = place / "ablation"
    submit = ["xtal", "submit", "ablate", grid, out, "--site", slurm.shared / "site.toml"]
    told = json.loads(slurm.run(*submit, "--array", "2", "--json").stdout)
    assert slurm.job(told["job"])["Dependency"].startswith(f"afterany:{told['array']}")
    assert slurm.ended(told["job"]) == "COMPLETED", newest(place / "ablation.jobs")
    for part in ("1-of-2", "2-of-2"):
        assert len(list(whole_lines(out / "parts" / part / "record.jsonl"))) == 3
    results = pq.read_table(out / "results.parquet").to_pylist()
    assert len(results) == len(list(whole_lines(out / "record.jsonl"))) == 6
    assert (out / "report.html").exists()
    rows = json.loads(slurm.run("xtal", "jobs", out, "--json").stdout)
    assert [row["state"] for row in rows] == ["COMPLETED", "COMPLETED"]


def newest(jobs: Path) -> str:
    logs = sorted(jobs.glob("*.log"), key=lambda path: path.stat().st_mtime)
    return "\n".join(f"{log.name}: {log.read_text()[-3000:]}" for log in logs)
