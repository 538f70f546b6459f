"""The commands of docs/cluster.md, as they stand there."""

import re
from pathlib import Path

import pytest
from machines import ROOT, Machines
from tiny import document, write_lines

pytestmark = pytest.mark.slurm
# What is not run here: other tests install, start Ray's dashboard, and ask Prometheus.
ELSEWHERE = ("python3 -m venv", "source ", "xtal dashboard", "prometheus ")
# What is larger on a real cluster, and the look that would wait for the end of the work.
SMALLER = {
    "--nodes 4": "--nodes 3",
    "--time 4:00:00": "--time 0:40:00",
    "--time 8:00:00": "--time 0:50:00",
    "--ntasks-per-node=64": "--ntasks-per-node=2",
    "xtal watch study": "xtal watch study --once",
}
SITE = "cores_per_node = 2\n"
GRID = 'dataset = "data"\narms = ["none", "basis_only"]\n[training]\ntask = "bulk_modulus"\n'


def commands() -> list[str]:
    text = (ROOT / "docs" / "cluster.md").read_text(encoding="utf-8")
    blocks = re.findall(r"^```sh\n(.+?)^```", text, re.DOTALL | re.MULTILINE)
    return [line.partition("   #")[0].strip() for block in blocks for line in block.splitlines()]


def test_each_command_of_the_page(slurm: Machines, place: Path) -> None:
    """Submitted while nothing is free, so that none costs the time of the work itself."""
    (place / "slurm").symlink_to(ROOT / "slurm")
    write_lines(place / "crystals.jsonl", [document(f"m{i}", 4 + i / 90) for i in range(64)])
    slurm.run("gzip", place / "crystals.jsonl")
    (place / "grid.toml").write_text(GRID)
    slurm.sbatch("--nodes=3", "--exclusive", "--wrap=sleep 600")
    number, ran = "", 0
    for line in commands():
        if line.startswith(ELSEWHERE):
            continue
        for large, small in SMALLER.items():
            line = line.replace(large, small)
        line = re.sub(r"--after \d+", f"--after {number}", line)
        done = slurm.run("bash", "-c", f"cd {place} && {line}", check=False)
        assert done.returncode == 0, f"{line}\n{done.stdout}{done.stderr}"
        if found := re.search(r"job (\d+)", done.stdout):
            number = found[1]
        if line.startswith("cp slurm/site.toml.example"):
            (place / "site.toml").write_text(SITE)  # edited, as the page says
        ran += 1
    assert ran >= 12
    queued = slurm.run("squeue", "-h", "-o", "%j").stdout.split()
    assert {"xtal-featurize", "xtal-train", "xtal-ablate", "xtal-demo"} <= set(queued)
