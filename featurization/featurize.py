"""The driver: a source → verified shards, on one process or on many MPI ranks.

Ranks claim blocks of records from a shared counter, read only those, and commit each shard they
close to their own journal. Nobody waits for anybody until all blocks are claimed. What a dead run
committed stays; the same command does the rest, with any number of ranks.
"""

from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from cluster.errors import RunFailed, Stopped, UserError
from cluster.files import disk_explained, exclusive
from cluster.mpi import Ranks, agree, on_rank_0
from featurization.config import FeaturizationConfig
from featurization.duplicates import duplicates
from featurization.finish import finish
from featurization.guard import StopSignals
from featurization.journal import committed_shards
from featurization.logs import RankLog
from featurization.resume import begin
from featurization.sources import open_source
from featurization.worker import WIDTH, Progress, Worker


def featurize(
    spec: str | Path,
    out: str | Path,
    config: FeaturizationConfig,
    ranks: Ranks,
    progress: Callable[[Progress], None] = lambda at: None,
    *,
    append: bool = False,
) -> dict[str, Any]:
    """Featurize a source into the folder `out`; every rank of the job calls this.

    Args:
        spec: names the source, see `featurization.sources.open_source`.
        progress: called on rank 0, a few times a second.
        append: add to the finished dataset in `out` what the source has of new ids; its shards
            are not touched.

    Returns:
        The manifest. A finished `out` of the same source and config is left as it is.

    Raises:
        UserError: no such source, `out` holds something else, or no crystal could be featurized.
        Stopped: a signal came; the same command goes on.
        RunFailed: a full disk, or a source that changed; the same command goes on if it can.
    """
    folder = Path(out)
    with ExitStack() as held:
        on_rank_0(ranks, lambda: hold(folder, held))
        return featurize_held(str(spec), folder, config, ranks, progress, append=append)


def featurize_held(
    spec: str,
    out: Path,
    config: FeaturizationConfig,
    ranks: Ranks,
    progress: Callable[[Progress], None],
    *,
    append: bool,
) -> dict[str, Any]:
    """As `featurize`, for a job that holds the folder already."""
    source = agree(ranks, lambda: open_source(spec, id_prop_label=config.id_prop_label))
    with StopSignals() as signals:
        start = begin(spec, source, out, config, ranks, append=append)
        if isinstance(start, dict):
            return start
        board = ranks.board(WIDTH)
        with RankLog(out, ranks, start.attempt) as log:
            worker = Worker(source, out, config, ranks, board, start, signals, log)
            failure = None
            try:
                worker.work(progress)
            except RunFailed as error:
                failure = error
                board.stop()
            worker.wait_for_all(progress)
            board.close()
            agree(ranks, lambda: _raise(failure, signals.received))
            log.say("all ranks are done")

            rows = on_rank_0(ranks, lambda: committed_shards(out))
            doubles = duplicates(out, rows, ranks)

            def end() -> dict[str, Any]:
                with disk_explained(out):
                    return finish(source, out, config, start, doubles)

            return on_rank_0(ranks, end)


def hold(out: Path, held: ExitStack) -> None:
    """Keep other jobs out of the folder until `held` is closed.

    Raises:
        UserError: another job is at work there, or it cannot be written.
    """
    if out.exists() and not out.is_dir():
        raise UserError(f"{out} is a file", remedy="give the path of a new folder")
    try:
        with disk_explained(out):
            held.enter_context(exclusive(out))
    except OSError as error:
        reason = f"cannot write to {out}: {error.strerror}"
        raise UserError(reason, remedy="give another folder, or make room") from None


def _raise(failure: RunFailed | None, signal: str) -> None:
    if failure is not None:
        raise failure
    if signal:
        raise Stopped(
            f"stopped by {signal}; what is done is committed",
            remedy="give the same command again, with any number of ranks",
        )
