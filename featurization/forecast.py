"""What a featurization will take, from a timed sample: `xtal featurize --dry-run`."""

import random
import tempfile
import time
from pathlib import Path
from statistics import fmean

from cluster.errors import UserError
from cluster.mpi import Ranks
from featurization.config import FeaturizationConfig
from featurization.crystal import Reject
from featurization.records import Listing, Record, Source
from featurization.shards import Entry, write_shard
from featurization.sources import open_source
from featurization.worker import featurize_one

_SAMPLE = 256


def forecast(spec: str, config: FeaturizationConfig, ranks: Ranks) -> dict[str, str | int]:
    """Expectations for a source on this job's ranks; each rank may call it, rank 0 alone works.

    Returns:
        Names → values to show; empty on other ranks. Times are of this machine as it is now.

    Raises:
        UserError: no such source, or it has no records.
    """
    if ranks.rank != 0:
        return {}
    source = open_source(spec, id_prop_label=config.id_prop_label)
    begun = time.perf_counter()
    count, sample = _sample(source)
    walk = time.perf_counter() - begun
    if not sample:
        raise UserError(f"{spec} has no records", remedy="give a source with crystals")
    entries = _featurized(source, sample[:8], config)  # loads tables and compiles kernels
    begun = time.perf_counter()
    entries = _featurized(source, sample, config)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "shard.h5"
        if entries:
            write_shard(path, entries, config)
        seconds = (time.perf_counter() - begun) / len(sample)
        size = path.stat().st_size / len(sample) if entries else 0.0
    points = fmean(len(e.cloud.hkl) for e in entries) if entries else 0.0
    structures = round(count * len(entries) / len(sample))
    full = config.shard_structures
    if size:
        full = min(full, max(1, round((config.shard_mib << 20) / size)))
    shards = max(min(ranks.size, structures), -(-structures // full))
    return {
        "records": count,
        "sample": f"{len(sample)} records, {len(sample) - len(entries)} rejected",
        "structures": f"about {structures:,}",
        "points": f"about {points * structures:,.0f} ({points:,.0f} a structure)",
        "size": f"about {size * count / 2**30:.2g} GiB in {shards:,} shards",
        "reading the source": f"{walk:.1f} s, once, on one rank",
        "featurizing": f"{1e3 * seconds:.2f} ms a record and rank",
        "ranks": ranks.size,
        "minutes": f"about {(walk + seconds * count / ranks.size) / 60:.2g}",
    }


def _sample(source: Source) -> tuple[int, list[Record]]:
    """How many records there are, and some at random, the same each time."""
    chosen = random.Random(0)
    if isinstance(source, Listing):
        places = sorted(chosen.sample(range(len(source)), min(_SAMPLE, len(source))))
        return len(source), [source.record(place) for place in places]
    count = 0
    sample: list[Record] = []
    for count, record in enumerate(source.records(), start=1):
        if len(sample) < _SAMPLE:
            sample.append(record)
        elif (place := chosen.randrange(count)) < _SAMPLE:
            sample[place] = record
    return count, sample


def _featurized(source: Source, records: list[Record], config: FeaturizationConfig) -> list[Entry]:
    entries = []
    for record in records:
        try:
            entries.append(featurize_one(source, record, config))
        except Reject:
            continue
    return entries
