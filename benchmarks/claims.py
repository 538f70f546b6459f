"""How ranks should claim chunks of work: a counter in a window of rank 0, or a server there.

    mpiexec -n 4 python -m mpi4py -m benchmarks.claims [SECONDS] > benchmarks/results/DATE-claims.md

With MPIR_CVAR_NOLOCAL=1 in the environment, MPICH acts as if every rank were on a node of its own.
"""

import os
import sys
import time
from collections.abc import Callable
from typing import Any

import numpy as np
from mpi4py import MPI

from cluster.provenance import provenance

WORLD = MPI.COMM_WORLD
STRUCTURE = 1e-3  # s of CPU
CHUNK = 5  # structures that a rank computes between two claims
MECHANISMS = ("counter, Win.Allocate", "counter, Win.Create", "server, messages")
ROOT_DOES = {
    "never": "computes, never enters MPI",
    "polls": "computes, enters MPI every 1 ms",
    "idle": "nothing but MPI",
}
ASK, ANSWER = 1, 2  # tags


def compute(structures: int) -> None:
    """Keep the core busy, by CPU time: ranks may be more than cores."""
    for _ in range(structures):
        end = time.thread_time() + STRUCTURE
        while time.thread_time() < end:
            pass


def claim_until(end: float, claim: Callable[[], int], structures: int) -> tuple[Any, list[int]]:
    """Seconds that each claim took, and the numbers claimed."""
    seconds, numbers = [], []
    while time.monotonic() < end:
        start = time.perf_counter()
        number = claim()
        seconds.append(time.perf_counter() - start)
        numbers.append(number)
        compute(structures)
    return np.array(seconds), numbers


def window(mechanism: str) -> tuple[Any, Callable[[], int]]:
    """A counter on rank 0 and the function that claims its next number."""
    size = 8 if WORLD.rank == 0 else 0
    win: Any
    if mechanism.endswith("Allocate"):
        win = MPI.Win.Allocate(size, disp_unit=8, comm=WORLD)
    else:
        win = MPI.Win.Create(np.zeros(size, np.uint8) if size else None, disp_unit=8, comm=WORLD)
    if WORLD.rank == 0:
        np.frombuffer(win.tomemory(), np.int64)[0] = 0
    one, before = np.ones(1, np.int64), np.zeros(1, np.int64)
    WORLD.Barrier()
    win.Lock_all()

    def claim() -> int:
        win.Fetch_and_op(one, before, 0, 0, MPI.SUM)
        win.Flush(0)
        return int(before[0])

    return win, claim


def ask() -> int:
    """The next number of the server on rank 0."""
    number = np.zeros(1, np.int64)
    WORLD.Send([number, MPI.INT64_T], 0, ASK)
    WORLD.Recv([number, MPI.INT64_T], 0, ANSWER)
    return int(number[0])


def serve(following: int) -> int:
    """Answer all requests that are there; returns the next number.

    The first of two calls of Iprobe often only fetches what the second one sees. MPICH 5.0.2 over
    UCX hangs if a probed message is received from any source instead of from its own.
    """
    status, number = MPI.Status(), np.zeros(1, np.int64)
    while any(WORLD.Iprobe(MPI.ANY_SOURCE, ASK, status) for _ in range(2)):
        WORLD.Recv([number, MPI.INT64_T], status.Get_source(), ASK)
        number[0] = following
        WORLD.Send([number, MPI.INT64_T], status.Get_source(), ANSWER)
        following += 1
    return following


def root(does: str, end: float) -> int:
    """Work of rank 0 until `end`, then service until the others are done; structures computed."""
    structures = following = 0
    while does != "idle" and time.monotonic() < end:
        compute(1)
        structures += 1
        if does == "polls":  # enters MPI, which also drives the counter
            following = serve(following)
    done = WORLD.Ibarrier()  # the others enter it after their last claim
    while not done.Test():
        following = serve(following)
    return structures


def measure(mechanism: str, does: str, chunk: int, seconds: float) -> list[str] | None:
    """A row of the table on rank 0."""
    server = mechanism.startswith("server")
    win, claim = (None, ask) if server else window(mechanism)
    if win and WORLD.rank:
        claim()  # connect
    WORLD.Barrier()
    end = time.monotonic() + seconds  # one clock for all ranks of a machine
    structures, took, numbers = 0, np.zeros(0), list[int]()
    if WORLD.rank == 0:
        structures = root(does, end)
    else:
        took, numbers = claim_until(end, claim, chunk)
        WORLD.Ibarrier().Wait()
    if win:
        win.Unlock_all()
        win.Free()
    gathered = WORLD.gather((took, numbers))
    if gathered is None:
        return None
    first = 0 if server else WORLD.size - 1
    claimed = sorted(number for _, part in gathered for number in part)
    assert claimed == list(range(first, first + len(claimed))), "a number is lost or given twice"
    micro = 1e6 * np.concatenate([part for part, _ in gathered])
    times = [np.median(micro), np.percentile(micro, 99), micro.max()]
    rate = f"{len(micro) / seconds:,.0f}"
    return [rate, *(f"{t:,.1f}" for t in times), f"{structures / seconds:,.0f}"]


def main() -> None:
    seconds = float(sys.argv[1]) if len(sys.argv) > 1 else 2.0
    made = provenance()
    load = os.getloadavg()[0]  # before these ranks add to it
    rows = []
    for chunk in (CHUNK, 0):
        for mechanism in MECHANISMS:
            for does, words in ROOT_DOES.items():
                if mechanism.startswith("server") and does == "never":
                    continue  # no answer would ever come
                row = measure(mechanism, does, chunk, seconds)
                rows.append((chunk, [mechanism, words, *(row or [])]))
    if WORLD.rank:
        return
    print(f"# Claiming work, {made['created']}\n")
    nolocal = os.environ.get("MPIR_CVAR_NOLOCAL", "0") != "0"
    print(
        f"Commit {made['commit']}; {made['hardware']} (load {load:.1f}); {WORLD.size} ranks; ",
        end="",
    )
    print(" ".join(MPI.Get_library_version().splitlines()[0].split()), end="")
    print("; MPIR_CVAR_NOLOCAL=1, no shared memory between ranks." if nolocal else ".")
    for chunk, title in ((CHUNK, f"{CHUNK} ms of work between claims"), (0, "nothing but claims")):
        print(f"\nRanks 1 … {WORLD.size - 1}: {title}; {seconds:g} s a row.\n")
        print("| claims | rank 0 | claims/s | median µs | p99 µs | max µs | its structures/s |")
        print("|---|---|---|---|---|---|---|")
        for _, row in (r for r in rows if r[0] == chunk):
            print("| " + " | ".join(row) + " |")


if __name__ == "__main__":
    main()
