"""Clouds that an arm needs featurized anew: once for all its trials, into `OUT/datasets/HASH`."""

import hashlib
import json
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from shutil import which
from types import FrameType
from typing import Any

from ablation.perturbations import featurization_of
from cluster.config import build_config
from cluster.errors import DiskFailed, RunFailed, Stopped, UserError
from cluster.mpi import OneProcess
from cluster.submit import clean_environment
from featurization.config import FeaturizationConfig, RadiationName
from featurization.featurize import featurize
from featurization.manifest import read_manifest
from featurization.origin import GROWN, SAME, state_of
from featurization.sources import open_source


@dataclass(frozen=True, slots=True)
class CloudSource:
    """Which clouds a trial starts from."""

    folder: Path
    radiation: RadiationName | None
    config: FeaturizationConfig

    @property
    def name(self) -> str:
        """Of like clouds the same."""
        return f"{self.folder}, {self.radiation or self.config.radiation}"


class Variants:
    """The datasets of a grid: its own, and those that its arms are featurized into.

    Args:
        dataset: folder of the grid's own.
        out: the grid's folder.
    """

    def __init__(self, dataset: Path, out: Path) -> None:
        self._dataset, self._out = dataset.resolve(), out.resolve()
        self._manifest = read_manifest(dataset)
        self._config = build_config(
            FeaturizationConfig, self._manifest["config"], where=f"{dataset}/manifest.json"
        )

    def base(self, radiation: RadiationName | None) -> CloudSource:
        """The grid's own clouds."""
        return CloudSource(self._dataset, radiation, self._config)

    def of(self, arm: str, strength: float | None, radiation: RadiationName | None) -> CloudSource:
        """The clouds that an arm starts from.

        Args:
            radiation: the training's; an arm that changes it goes before.
        """
        ours, asked = self._config, featurization_of(arm, strength, self._config)
        if asked == ours:
            return self.base(radiation)
        there = asked.radiation in (ours.radiation, *ours.also_radiation)
        columns = {"radiation": ours.radiation, "also_radiation": ours.also_radiation}
        if there and asked.model_copy(update=columns) == ours:
            return self.base(asked.radiation)
        if asked.radiation != ours.radiation:
            radiation = asked.radiation
        decides = [self._manifest["content_hash"], asked.model_dump()]
        digest = hashlib.sha256(json.dumps(decides, sort_keys=True).encode()).hexdigest()
        return CloudSource(self._out / "datasets" / digest[:16], radiation, asked)

    def featurize(self, source: CloudSource, ranks: int) -> None:
        """Make a dataset if it is not there; what is there of it is gone on with.

        Raises:
            UserError: a source of the grid's dataset is gone, or is not what it was.
            RunFailed: featurization failed.
        """
        if source.folder == self._dataset:
            return
        listed, there = self._manifest["sources"], 0
        if (source.folder / "manifest.json").exists():
            there = len(read_manifest(source.folder)["sources"])
        for each in listed[there:]:
            self._check(each)
        for number, each in enumerate(listed[there:], start=there):
            on_ranks(each["spec"], source.folder, source.config, ranks, append=number > 0)

    def _check(self, listed: dict[str, Any]) -> None:
        opened = open_source(listed["spec"], id_prop_label=self._config.id_prop_label)
        state = state_of(opened, listed)
        if state not in (SAME, GROWN):
            raise UserError(
                f"the source {listed['spec']} of {self._dataset} is {state}",
                remedy="bring it back, or leave out the arms that are featurized anew",
            )


def on_ranks(
    spec: str, out: Path, config: FeaturizationConfig, ranks: int, *, append: bool = False
) -> None:
    """`featurize` on MPI ranks of this machine where there is an mpiexec, else in this process.

    Raises:
        UserError, RunFailed: as the verb's exit code says.
    """
    mpiexec = which("mpiexec", path=str(Path(sys.executable).parent)) or which("mpiexec")
    if mpiexec is None or ranks == 1:
        featurize(spec, out, config, OneProcess(), append=append)
        return
    with tempfile.TemporaryDirectory() as folder:
        settings = Path(folder) / "featurization.toml"
        settings.write_text(_toml(config.model_dump()), encoding="utf-8")
        command: Sequence[str] = (
            *(mpiexec, "-n", str(ranks), sys.executable, "-m", "xtal", "featurize"),
            *(spec, str(out), "--config", str(settings), *(["--append"] if append else [])),
        )
        code, said = _here(command)
    if code:
        known = {kind.exit_code: kind for kind in (UserError, DiskFailed, Stopped)}
        raise known.get(code, RunFailed)(
            f"xtal featurize {spec} {out} ended with {code}:\n{said.strip()}",
            remedy="see above; the same command goes on",
        )


def _here(command: Sequence[str]) -> tuple[int, str]:
    """Run mpiexec on this machine, told to stop when this is; its exit code, and what it says."""
    # In a job of SLURM mpiexec would start the ranks by srun, on other nodes.
    environment = clean_environment() | {"OMP_NUM_THREADS": "1"}
    with subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, env=environment
    ) as running:
        before: dict[int, Any] = {}

        def forward(number: int, frame: FrameType | None) -> None:
            running.send_signal(signal.SIGUSR1)
            if callable(noted := before[number]):
                noted(number, frame)

        if threading.current_thread() is threading.main_thread():
            for each in (signal.SIGTERM, signal.SIGUSR1):
                before[each] = signal.signal(each, forward)
        try:
            said = running.communicate()[1]
        finally:
            for own, handler in before.items():
                signal.signal(own, handler)
    return running.returncode, said


def _toml(values: dict[str, Any]) -> str:
    """Numbers, texts and lists of them are written as in JSON."""
    return "".join(f"{name} = {json.dumps(value)}\n" for name, value in values.items())
