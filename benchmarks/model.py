"""A model of the time that featurization takes on many ranks, from constants of benchmarks.scaling.

One rank prepares (hash of the source, walk through its records), all work on claimed blocks, one
rank finishes (duplicates, virtual file, manifest). What all do at once is divided by their number;
what one does is not, and that is where scaling stops.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from featurization.config import FeaturizationConfig
from featurization.resume import BLOCK, claim_step

# Of a parallel file system, which is not here to be measured: what its metadata server does in a
# second for all ranks together. A rank makes and removes its `at-` file and makes a log, a journal
# and a shard under another name.
METADATA_RATE, METADATA_WORK = 20_000, 8
METADATA = "metadata server (assumed)"
RECORDS = {"10⁶": 10**6, "10⁷": 10**7}
SIZES = {f"{n} on {r:,}": (RECORDS[n], r) for n in RECORDS for r in (1_000, 10_000)}
WHILE_AT_WORK = (
    "work",
    "uneven ends: blocks are whole",
    "claims wait for rank 0",
    "board is busy",
    "commits",
)


@dataclass(frozen=True)
class Constants:
    """Seconds of wall time."""

    record: float  # at work
    start: float  # of all processes, and their end
    hash: float  # a record
    walk: float  # a record
    claim: float
    post: float
    wait: float  # of a claim for a rank 0 on another node
    commit: float  # without what grows with the crystals
    finish: float  # once
    finish_shard: float
    finish_record: float
    shard: int = FeaturizationConfig().shard_structures

    def terms(self, records: int, ranks: int) -> dict[str, float]:
        """What follows each other on the rank that is last."""
        blocks = -(-records // BLOCK)
        step = claim_step(blocks, ranks)
        claims = -(-blocks // step)
        most = -(-claims // ranks)  # claims of one rank
        active = min(ranks, claims)
        shards = active * -(-records // (active * self.shard))
        work = records * self.record / ranks
        board = claims * self.claim + blocks * self.post
        alone = ranks == 1
        return {
            "start and end of processes": self.start,
            "hash of the source": records * self.hash,
            "walk through the source": records * self.walk,
            "work": work,
            "uneven ends: blocks are whole": max(0.0, most * step * BLOCK * self.record - work),
            "claims wait for rank 0": 0.0 if alone else most * self.wait,
            "board is busy": 0.0 if alone else max(0.0, board - work),
            "commits": shards / active * self.commit,
            METADATA: 0.0 if alone else active * METADATA_WORK / METADATA_RATE,
            "finish, of records": records * self.finish_record,
            "finish, of shards": self.finish + shards * self.finish_shard,
        }

    def total(self, records: int, ranks: int) -> float:
        return sum(self.terms(records, ranks).values())

    def efficiency(self, records: int, ranks: int) -> float:
        """Part of all ranks' time that is work."""
        return records * self.record / (ranks * self.total(records, ranks))

    def most_ranks(self, records: int, efficiency: float) -> int:
        """About how many ranks still have this efficiency."""
        few, many = 1, 10**7
        while many - few > 1:
            middle = (few + many) // 2
            if self.efficiency(records, middle) >= efficiency:
                few = middle
            else:
                many = middle
        return few

    def fastest(self, records: int) -> int:
        """About how many ranks are done first."""
        return min((round(1.1**n) for n in range(125)), key=lambda r: self.total(records, r))


def print_table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """In Markdown."""
    for row in (heads, ["---"] * len(heads), *rows):
        print("| " + " | ".join(row) + " |")


def print_model(
    constants: Constants, walk: dict[str, float], measured: dict[int, tuple[int, float]]
) -> None:
    """What the constants are and what follows from them.

    Args:
        walk: seconds a record of walking through a source, by suffix of the file.
        measured: ranks → (records, seconds in all), to compare the model with.
    """
    micro = {name: 1e6 * value for name, value in vars(constants).items()}
    print("\n## Constants\n")
    rows = [
        ("work of a rank, a record", micro["record"]),
        ("SHA-256 of the source, a record", micro["hash"]),
        *((f"walk through .jsonl{suffix}, a record", 1e6 * s) for suffix, s in walk.items()),
        ("a claim, within a node", micro["claim"]),
        ("a post of progress, within a node", micro["post"]),
        ("a claim, no shared memory, rank 0 at crystals of 1 ms", micro["wait"]),
        ("commit of one small shard: make, fsync, rename, journal", micro["commit"]),
        ("finish, a shard", micro["finish_shard"]),
        ("finish, a record", micro["finish_record"]),
        ("finish, once", micro["finish"]),
        ("start of processes, once", micro["start"]),
    ]
    print_table(("what", "µs"), [(name, f"{value:,.1f}") for name, value in rows])
    print(f"\nAssumed, not measured: a metadata server that does {METADATA_RATE:,} operations a")
    print(f"second, {METADATA_WORK} a rank; processes that start on a cluster as fast as here.\n")
    for ranks, (records, seconds) in measured.items():
        told = constants.total(records, ranks)
        print(f"{ranks} ranks: {told:.1f} s by the model, {seconds:.1f} s measured.")
    print("\n## Terms, s\n")
    print_terms(constants)
    print("\n## The most ranks at which efficiency is still 0.9 and 0.5, and the shortest run\n")
    print_limits(
        {
            "plain .jsonl": constants,
            ".jsonl.gz": replace(constants, walk=walk[".gz"]),
            ".jsonl.zst": replace(constants, walk=walk[".zst"]),
            "plain, 65,536 crystals a shard": replace(constants, shard=65_536),
            "plain, ten times the work a crystal": replace(constants, record=10 * constants.record),
            "if hash, walk and duplicates were shared by all ranks": replace(
                constants, hash=0.0, walk=0.0, finish_record=0.0
            ),
            "if nothing but the start were serial": replace(
                constants, hash=0.0, walk=0.0, finish=0.0, finish_shard=0.0, finish_record=0.0
            ),
        }
    )
    print("\nA plain source cut in parts, each a job and a dataset of its own, side by side:\n")
    table = []
    for name, (n, r) in SIZES.items():
        cells = [name]
        for parts in (1, 10, 100):
            terms = constants.terms(n // parts, r // parts)
            seconds = sum(terms.values()) + (parts - 1) * terms[METADATA]  # one server for all
            cells.append(f"{seconds:,.1f} s ({n * constants.record / r / seconds:.2f})")
        table.append(cells)
    print_table(("records on ranks (efficiency)", "one job", "10 jobs", "100 jobs"), table)


def print_terms(constants: Constants) -> None:
    """All terms of all `SIZES`, and which is to blame."""
    columns = [constants.terms(*size) for size in SIZES.values()]
    table = [[name, *(f"{column[name]:,.2f}" for column in columns)] for name in columns[0]]
    table.append(["in all", *(f"{sum(column.values()):,.1f}" for column in columns)])
    table.append(["efficiency", *(f"{constants.efficiency(*s):.4f}" for s in SIZES.values())])
    phase = [c["work"] / sum(c[name] for name in WHILE_AT_WORK) for c in columns]
    table.append(["efficiency while at work", *(f"{each:.2f}" for each in phase)])
    blame = []
    for column in columns:
        del column["work"]
        blame.append(max(column, key=column.__getitem__))
    table.append(["to blame first", *blame])
    print_table(["records on ranks", *SIZES], table)


def print_limits(ways: dict[str, Constants]) -> None:
    table = []
    for name, constants in ways.items():
        cells = [name]
        for records in RECORDS.values():
            ranks = constants.fastest(records)
            cells += [f"{constants.most_ranks(records, e):,}" for e in (0.9, 0.5)]
            cells.append(f"{constants.total(records, ranks):,.0f} s on {ranks:,}")
        table.append(cells)
    heads = [f"{n}: {what}" for n in RECORDS for what in ("0.9", "0.5", "shortest")]
    print_table(["source", *heads], table)
