"""Do the sources of a dataset still give its crystals? Some of them are computed again."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from cluster.errors import UserError
from featurization.config import FeaturizationConfig
from featurization.crystal import Reject
from featurization.origin import GROWN, SAME, state_of
from featurization.records import Source
from featurization.shards import Entry
from featurization.sources import open_source
from featurization.worker import featurize_one


@dataclass
class Recomputed:
    """What became of a sample."""

    count: int = 0  # crystals computed again
    sources: list[dict[str, str]] = field(default_factory=list)  # `spec` and `state` of each
    problems: list[str] = field(default_factory=list)


def recompute(
    specs: Sequence[str],
    manifest: dict[str, Any],
    chosen: Iterable[Entry],
    config: FeaturizationConfig,
) -> Recomputed:
    """Compute chosen crystals again, of each source that is what it was or has only grown.

    Args:
        specs: where each source is now; of those beyond, nothing is computed.
        chosen: without any, no source is read.
    """
    answer, first, entries = Recomputed(), 0, list(chosen)
    for number, part in enumerate(manifest["sources"]):
        beyond = first + part["records"]
        own = {e.source_index - first: e for e in entries if first <= e.source_index < beyond}
        first = beyond
        spec = specs[number] if number < len(specs) else part["spec"]
        shown = spec.encode("utf-8", "backslashreplace").decode()  # a name can be no UTF-8
        source, state = None, "not compared"
        if own and number < len(specs):
            source, state = _now(spec, part, config)
        answer.sources.append({"spec": shown, "state": state})
        if source is None:
            continue
        if state not in (SAME, GROWN):
            answer.problems.append(
                f"source {number}, {shown}, is not what the dataset was made of: {state}; its "
                "crystals were not computed again (--source: where it is; --sample 0: never mind)"
            )
            continue
        for record in islice(source.records(), max(own) + 1):
            if entry := own.pop(record.index, None):
                answer.count += 1
                if problem := _compare(source, record, entry, config):
                    answer.problems.append(problem)
        answer.problems += [f"{entry.id} is not in the source any more" for entry in own.values()]
    return answer


def _now(spec: str, part: dict[str, Any], config: FeaturizationConfig) -> tuple[Source | None, str]:
    """The source, if it is there, and what became of it."""
    try:
        source = open_source(spec, id_prop_label=config.id_prop_label)
        return source, state_of(source, part)
    except UserError as error:
        return None, "absent" if not Path(spec).exists() else f"cannot be read: {error.problem}"
    except OSError as error:
        return None, f"cannot be read: {error.strerror}"


def _compare(source: Source, record: Any, entry: Entry, config: FeaturizationConfig) -> str:
    try:
        again = featurize_one(source, record, config)
    except (Reject, UserError) as error:
        return f"{entry.id} cannot be computed again: {error}"
    same = (
        again.id == entry.id
        and np.array_equal(again.cloud.hkl, entry.cloud.hkl)
        and np.allclose(again.cloud.q, entry.cloud.q, rtol=1e-6, atol=1e-9)
        and np.allclose(again.cloud.intensity, entry.cloud.intensity, rtol=1e-4, atol=1e-12)
        and np.allclose(again.cloud.also, entry.cloud.also, rtol=1e-4, atol=1e-12)
        and (again.group, again.formula) == (entry.group, entry.formula)
        and np.allclose(again.lattice, entry.lattice, rtol=1e-6, atol=1e-9)
        and again.symmetry == entry.symmetry
        and dict(again.labels) == dict(entry.labels)
    )
    return "" if same else f"{entry.id} differs from what its source gives"
