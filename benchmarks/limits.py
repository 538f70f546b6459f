"""What saturates first at 1,000 nodes, 10⁵ trials, 10⁸ crystals: constants measured, sums done.

`python -m benchmarks.limits > DATE-limits.md`. The constants of featurization are those of
`benchmarks/results/2026-11-22-scaling.md`. As root with SLURM installed, steps are measured, too.
"""

import json
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import psutil

from ablation.grid import GridConfig
from ablation.plan import plan
from ablation.worker import Shared, Worker
from cluster.attempt import mark
from cluster.files import append_line, whole_lines, write_text
from cluster.mpi import OneProcess
from cluster.provenance import provenance
from cluster.ray_session import process_token, ray_for
from featurization.config import FeaturizationConfig
from featurization.featurize import featurize
from training.dataset import load

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests" / "slurm"))
from machines import Machines, obstacle

NODES, CORES, TRIALS, CRYSTALS = 1_000, 64, 10**5, 10**8
TRIAL_SECONDS = 600.0  # of a core: assumed
# From 2026-11-22-scaling.md, µs.
WORK, WALK, HASH, CLAIM, FINISH_RECORD, FINISH_SHARD = 2133.6, 5.0, 2.3, 1016.8, 1.4, 2873.8
BLOCK, SHARD = 64, 16_384  # records of a claim, structures of a shard

ROW = json.dumps(
    {"trial": "0" * 16, "status": "done"} | {f"metric{k}": 0.123456 for k in range(12)}
)


def records(folder: Path) -> tuple[float, float]:
    """Seconds to append and fsync a line, and to read one."""
    path = folder / "record.jsonl"
    count = 300
    begun = time.perf_counter()
    for _ in range(count):
        append_line(path, ROW)
    wrote = (time.perf_counter() - begun) / count
    path.write_bytes(path.read_bytes() * 100)
    begun = time.perf_counter()
    for line in whole_lines(path):
        json.loads(line)
    return wrote, (time.perf_counter() - begun) / (100 * count)


def marks(folder: Path) -> float:
    """Seconds a file for the digest that tells progress."""
    for trial in range(200):
        own = folder / "trials" / f"{trial:016x}"
        own.mkdir(parents=True)
        for name in ("history.csv", "predictions.parquet"):
            (own / name).write_text("x")
    begun = time.perf_counter()
    mark(folder / "trials")
    return (time.perf_counter() - begun) / 400


def dispatch(outstanding: int) -> tuple[float, float]:
    """Seconds of the driver a call that ends, of which ray.wait, with so many not yet ended."""
    import ray

    @ray.remote(num_cpus=0)
    class Trainer:
        def run(self) -> None:
            pass

        def wait(self) -> None:
            time.sleep(3600)

    busy, free = Trainer.remote(), Trainer.remote()
    ray.get(free.run.remote())
    waiting = [busy.wait.remote() for _ in range(outstanding)]
    count, spent = 100, 0.0
    begun = time.perf_counter()
    for _ in range(count):
        reference = free.run.remote()
        looked = time.perf_counter()
        done, _ = ray.wait([*waiting, reference], timeout=10)
        spent += time.perf_counter() - looked
        assert done == [reference]
    whole = (time.perf_counter() - begun) / count
    ray.kill(busy)
    ray.kill(free)
    return whole, spent / count


def control(nodes: int = 8, actors: int = 60) -> tuple[float, float]:
    """Processor seconds of Ray's control plane (GCS) a second and node, and an actor.

    By that many further nodes on this machine, each without a core of its own.
    """
    import ray
    from ray.cluster_utils import Cluster

    os.environ["RAY_AUTH_TOKEN"] = process_token()  # as in a job
    quiet = {"include_dashboard": False, "object_store_memory": 1 << 27}
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0} | quiet)
    try:
        (gcs,) = [p for p in psutil.process_iter() if p.name() == "gcs_server"]

        def busy(seconds: float) -> float:
            before = sum(gcs.cpu_times()[:2])
            time.sleep(seconds)
            return (sum(gcs.cpu_times()[:2]) - before) / seconds

        time.sleep(5)
        alone = busy(20)
        for _ in range(nodes):
            cluster.add_node(num_cpus=0, object_store_memory=1 << 27)
        time.sleep(5)
        a_node = (busy(20) - alone) / nodes
        ray.init(address=cluster.address, logging_level="error")

        @ray.remote(num_cpus=0)
        class Empty:
            def run(self) -> None:
                pass

        before, begun = sum(gcs.cpu_times()[:2]), time.monotonic()
        hired = [Empty.remote() for _ in range(actors)]
        ray.get([each.run.remote() for each in hired])
        idle = (alone + nodes * a_node) * (time.monotonic() - begun)
        return a_node, max(0.0, sum(gcs.cpu_times()[:2]) - before - idle) / actors
    finally:
        ray.shutdown()
        cluster.shutdown()


def files(folder: Path) -> tuple[float, float]:
    """Seconds to write a file whole or not at all, and file operations of a trial of 10 epochs."""
    begun = time.perf_counter()
    for number in range(100):
        write_text(folder / f"{number}.json", ROW)
    seconds = (time.perf_counter() - begun) / 100
    dataset = folder / "dataset"
    featurize("prototypes:140", dataset, FeaturizationConfig(selection="miller:2"), OneProcess())
    training = {"task": "crystal_system", "epochs": 10, "width": 16}
    grid = GridConfig(dataset=str(dataset), arms=("none",), seeds=(0,), training=training)
    (trial,) = plan(grid, "")
    base, count = Shared.of("base", load(dataset)), 0
    names = {"open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.scandir", "os.listdir"}
    fits = str(folder / "fits")

    def hear(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal count
        count += event in names and str(arguments[0]).startswith(fits)

    sys.addaudithook(hear)
    Worker(folder, 1, 0).train(trial.fit, [trial], base, base)
    return seconds, count


def steps() -> tuple[float, float]:
    """Seconds to start a step of one node, and MiB of its srun."""
    slurm = Machines()
    try:
        script = "for i in 1 2 3 4 5 6 7 8 9 10; do srun -N1 -n1 --overlap true; done"
        begun = time.perf_counter()
        slurm.run("salloc", "--quiet", "--nodes=1", "bash", "-c", script)
        seconds = (time.perf_counter() - begun) / 10
        job = slurm.sbatch("--nodes=1", "--wrap=srun -n1 sleep 60", "--output=/dev/null")
        slurm.until(lambda: any("srun" in p for p in slurm.processes("node1")), "srun runs", 60)
        sizes = [p.memory_full_info().uss for p in psutil.process_iter() if p.name() == "srun"]
        slurm.run("scancel", job)
        return seconds, max(sizes) / 2**20
    finally:
        slurm.close()


def main() -> None:
    about = provenance()
    load = os.getloadavg()[0]
    print(f"# Limits, {about['created']}\n")
    print(f"Commit {about['commit']}; {about['hardware']}, load {load:.1f}.")
    with tempfile.TemporaryDirectory() as name:
        wrote, read = records(Path(name))
        seen = marks(Path(name))
        whole_file, operations = files(Path(name))
    with ray_for(2):
        few, many = dispatch(100), dispatch(3000)
    a_node, an_actor = control()
    print("\n## Measured\n\n| what | value |\n| --- | --- |")
    print(f"| append and fsync a result | {1e3 * wrote:.2f} ms |")
    print(f"| read a result | {1e6 * read:.0f} µs |")
    print(f"| write a file, fsync and rename it | {1e3 * whole_file:.2f} ms |")
    print(f"| file operations of a trial of 10 epochs | {operations} |")
    print(f"| processor time of Ray's GCS, a node and second | {1e3 * a_node:.2f} ms |")
    print(f"| the same, an actor that starts | {1e3 * an_actor:.1f} ms |")
    print(f"| look at a file for the mark of an attempt | {1e6 * seen:.0f} µs |")
    for count, (whole, waited) in ((100, few), (3000, many)):
        print(f"| a call to an actor and its end, {count} others at work | {1e3 * whole:.2f} ms |")
        print(f"| of which ray.wait | {1e3 * waited:.2f} ms |")
    step = (0.0, 0.0)
    if obstacle() is None:
        step = steps()
        print(f"| start and end of a step of one node | {1e3 * step[0]:.0f} ms |")
        print(f"| private memory of its srun | {step[1]:.1f} MiB |")
    slope = (many[1] - few[1]) / 2900
    cores = NODES * CORES
    at_work = min(cores, TRIALS)
    each = few[0] + slope * at_work + wrote
    rows = [
        ("10⁸ crystals: work of the ranks", WORK * CRYSTALS / cores / 1e6, "all ranks"),
        ("hash and walk through the source", (HASH + WALK) * CRYSTALS / 1e6, "rank 0"),
        ("claims between nodes", CLAIM * CRYSTALS / BLOCK / 1e6, "rank 0, as others work"),
        ("end of the run, records", FINISH_RECORD * CRYSTALS / 1e6, "rank 0"),
        ("end of the run, shards", FINISH_SHARD * max(cores, CRYSTALS / SHARD) / 1e6, "rank 0"),
        ("10⁵ trials: work of the cores", TRIALS * TRIAL_SECONDS / cores, "all cores"),
        (f"driver, with {at_work:,} trials at work", each * TRIALS, "one process"),
        ("of that, appending results", wrote * TRIALS, "one process"),
        ("hiring a worker a core", an_actor * at_work, "GCS, each start"),
        ("reading the results", read * TRIALS, "each start"),
        ("mark of an attempt", seen * 2 * TRIALS, "each start"),
        ("1,000 steps, one after the other", step[0] * NODES, "controller, each start"),
    ]
    print(f"\n## {NODES:,} nodes of {CORES} cores, {TRIAL_SECONDS:.0f} s a trial (assumed)\n")
    print("| term | seconds | who |\n| --- | --- | --- |")
    for what, seconds, who in rows:
        print(f"| {what} | {seconds:,.0f} | {who} |")
    print(f"\nGCS at rest, {NODES:,} nodes: {100 * a_node * NODES:.0f} % of a core.")
    rate = at_work / TRIAL_SECONDS * operations
    print(f"File operations of {at_work:,} trials at work: {rate:,.0f} a second.")
    print(f"1,000 sruns on the first node: {step[1] * NODES / 1024:.1f} GiB.")


if __name__ == "__main__":
    main()
