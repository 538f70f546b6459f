"""Make a lost `manifest.json` again, from its copy.

The copy says what the files and the sources were, so `featurization.verify` finds what else is
damaged, and `featurization.repair` does it again from sources that are what they were.
"""

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path

from cluster.config import build_config
from cluster.errors import UserError
from cluster.files import disk_explained
from cluster.mpi import Ranks, on_rank_0
from featurization.config import FeaturizationConfig
from featurization.featurize import featurize_held, hold
from featurization.journal import read_plan
from featurization.manifest import is_first_run, read_copy, read_manifest, write_manifest
from featurization.resume import set_aside
from featurization.worker import Progress


def restore(
    folder: Path,
    specs: Sequence[str],
    ranks: Ranks,
    progress: Callable[[Progress], None] = lambda at: None,
) -> bool:
    """Make `manifest.json` again if it is lost or no manifest; every rank of the job calls this.

    A first run that did not end, and has none yet, is brought to its end.

    Args:
        specs: where the source of that run is now, or nothing.

    Returns:
        Whether that was done; where it cannot be, `read_manifest` says why.

    Raises:
        UserError: another job is at work in the folder, or the run cannot go on.
    """
    if on_rank_0(ranks, lambda: _is_whole(folder)):
        return False
    with ExitStack() as held, disk_explained(folder):
        on_rank_0(ranks, lambda: hold(folder, held))
        if on_rank_0(ranks, lambda: _from_copy(folder)):
            return True
        plan = on_rank_0(ranks, lambda: read_plan(folder) if is_first_run(folder) else None)
        if plan is None:
            return False
        config = build_config(FeaturizationConfig, plan.config, where="config of the run")
        spec = specs[0] if specs else plan.spec
        on_rank_0(ranks, lambda: set_aside(folder, ["manifest.json"]))  # that is none
        featurize_held(spec, folder, config, ranks, progress, append=False)
        return True


def _is_whole(folder: Path) -> bool:
    """Also where there is nothing at all to make a manifest of."""
    try:
        read_manifest(folder)
    except UserError:
        return not folder.is_dir()
    return True


def _from_copy(folder: Path) -> bool:
    manifest = read_copy(folder)
    if manifest is None:
        return False
    set_aside(folder, ["manifest.json"])
    write_manifest(folder, manifest)
    return True
