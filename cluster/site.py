"""What a cluster is like: the site file, and the options that it gives to sbatch."""

import re
import shlex
from pathlib import Path
from typing import Any

from pydantic import Field, field_validator

from cluster.config import Config, build_config, read_toml
from cluster.errors import UserError
from cluster.files import write_text
from cluster.slurm import gpus_of

VERBS = ("featurize", "train", "ablate")
_TIME = re.compile(r"(\d+-)?\d+(:\d{2}){0,2}")
# What is xtal submit's to say to sbatch, and where to say it.
_OWN = {
    "nodes": "--nodes to xtal submit",
    "time": "--time to xtal submit",
    "array": "--array to xtal submit",
    "dependency": "--after to xtal submit",
    **{name: name for name in ("account", "partition", "qos", "constraint", "reservation")},
    "ntasks-per-node": "cores_per_node",
    "cpus-per-task": "cores_per_node",
    "gpus-per-node": "gpus_per_node",
    "mem": "memory_per_node",
    "signal": "warning_seconds",
    "output": "",
    "export": "",
    "parsable": "",
    "test-only": "",
    "wrap": "",
    "no-requeue": "",
    "kill-on-invalid-dep": "",
    # With which sbatch does not answer with the number of a job of this cluster, at once.
    **dict.fromkeys(("wait", "clusters", "help", "usage", "version"), ""),
}


class Site(Config):
    """A site file; a table [featurize], [train] or [ablate] in it changes keys for that verb."""

    account: str | None = None
    """Who pays."""
    partition: str | None = None
    """Queue, or several with commas; None takes the site's own."""
    qos: str | None = None
    """Quality of service."""
    constraint: str | None = None
    """Kind of node, such as gpu or cpu."""
    reservation: str | None = None
    """Nodes that are set aside for you."""
    cores_per_node: int = Field(default=1, ge=1)
    """Cores a node: as many MPI ranks of featurization, as many CPUs for Ray."""
    gpus_per_node: int = Field(default=0, ge=0)
    """GPUs a node."""
    gres: str | None = None
    """GPUs in the older spelling, such as gpu:a100:4, instead of --gpus-per-node."""
    memory_per_node: str | None = Field(default=None, pattern=r"^\d+[KMGT]?$")
    """Memory a node, such as 240G; 0 is all of it."""
    mpi: str = Field(default="pmi2", pattern=r"^[a-z0-9_]+$")
    """srun --mpi, such as pmix: what mpi4py's MPI speaks; that of pip install mpich speaks pmi2."""
    setup: tuple[str, ...] = ()
    """Shell lines before the work: module load, source …/bin/activate."""
    container: tuple[str, ...] = ()
    """Words that run what follows them in a container, such as apptainer exec IMAGE."""
    scratch: str | None = Field(default=None, pattern="^/")
    """Folder of each node for temporary files, instead of /tmp."""
    options: tuple[str, ...] = ()
    """Further options of sbatch, a word each, such as --exclusive."""
    warning_seconds: int = Field(default=120, ge=10, le=3600)
    """As long before the time limit the work is asked to stop."""
    interface: str | None = None
    """Network interface for Ray and torch, such as hsn0; None: the one that leads to the head."""
    metrics: bool = False
    """Prometheus may read numbers of the work from the nodes; so may anybody who reaches them."""
    login: str | None = None
    """user@host of the login node as seen from your desk, for ssh tunnels."""

    @field_validator("*")
    @classmethod
    def _printable(cls, value: Any) -> Any:
        for each in value if isinstance(value, tuple) else (value,):
            if isinstance(each, str) and not each.replace("\t", " ").isprintable():
                raise ValueError(f"{each!r}: line breaks and other control characters do not work")
        return value

    @field_validator("account", "partition", "qos", "constraint", "reservation")
    @classmethod
    def _given(cls, value: str | None) -> str | None:
        return value or None

    @field_validator("options")
    @classmethod
    def _options(cls, options: tuple[str, ...]) -> tuple[str, ...]:
        for option in options:
            name = option.partition("=")[0]
            if not name.startswith("--"):
                raise ValueError(f"{option!r}: write the long form, --name=value, as one word")
            # SLURM reads the beginning of a name, too.
            if own := next((own for own in _OWN if f"--{own}".startswith(name)), None):
                said = f"--{own} is not for a site file: leave it out"
                instead = f", and give {_OWN[own]}" if _OWN[own] else ""
                raise ValueError(f"{option!r}: {said}{instead}")
        return options

    @field_validator("container")
    @classmethod
    def _container(cls, words: tuple[str, ...]) -> tuple[str, ...]:
        if len(words) == 1 and " " in words[0]:
            raise ValueError(f"give a list of words: {shlex.split(words[0])}")
        return words

    @property
    def gpus(self) -> int:
        """GPUs a node, however the site spells them."""
        return self.gpus_per_node if self.gres is None else gpus_of(self.gres)

    @property
    def memory(self) -> int:
        """Memory a node in MiB; 0: all of it, or what the partition gives."""
        text = self.memory_per_node or "0"
        scale = {"K": 2**-10, "M": 1, "G": 2**10, "T": 2**20}.get(text[-1], 1)
        return int(int(text.rstrip("KMGT")) * scale)

    def where(self) -> list[str]:
        """Words for sbatch and srun that choose the nodes."""
        names = ("account", "partition", "qos", "constraint", "reservation")
        values = ((name, getattr(self, name)) for name in names)
        return [f"--{name}={value}" for name, value in values if value is not None]

    def sbatch_options(self, verb: str) -> list[str]:
        """Words for sbatch. Each value is part of one word, which no shell reads."""
        words = self.where()
        if verb == "featurize":
            words += [f"--ntasks-per-node={self.cores_per_node}", "--cpus-per-task=1"]
        else:
            words += ["--ntasks-per-node=1", f"--cpus-per-task={self.cores_per_node}"]
            if self.gres is not None:
                words.append(f"--gres={self.gres}")
            elif self.gpus_per_node:
                words.append(f"--gpus-per-node={self.gpus_per_node}")
        if self.memory_per_node is not None:
            words.append(f"--mem={self.memory_per_node}")
        return [*words, f"--signal=B:USR1@{self.warning_seconds}", *self.options]

    def environment(self) -> dict[str, str]:
        """Variables that the templates, and programs on the nodes, read."""
        found: dict[str, str] = {"XTAL_MPI": self.mpi}
        found |= {"XTAL_RAY_METRICS": "1"} if self.metrics else {}
        found |= {"TMPDIR": self.scratch} if self.scratch else {}
        return found | ({"XTAL_RAY_INTERFACE": self.interface} if self.interface else {})


def read_site(path: Path) -> dict[str, Site]:
    """The site as each verb finds it.

    Raises:
        UserError: naming each wrong key or value.
    """
    values = read_toml(path)
    own = {verb: values.pop(verb, {}) for verb in VERBS}
    for verb, table in own.items():
        if not isinstance(table, dict):
            raise UserError(f"{path}: {verb} = {table!r}", remedy=f"write a table: [{verb}]")
    build_config(Site, values, where=str(path))
    return {
        verb: build_config(Site, values | table, where=f"{path} [{verb}]")
        for verb, table in own.items()
    }


def check_time(time: str) -> str:
    """A time limit as SLURM reads it: minutes, HH:MM:SS or D-HH:MM:SS.

    Raises:
        UserError: it is none.
    """
    if not _TIME.fullmatch(time):
        raise UserError(f"--time {time}", remedy="give minutes, HH:MM:SS or D-HH:MM:SS")
    return time


def write_setup(site: Site, folder: Path) -> dict[str, str]:
    """Write the site's setup lines and its container where jobs find them; variables that say so.

    `container.sh` runs its arguments in the container, so that a template needs no words of it.
    """
    found = {}
    if site.setup:
        write_text(folder / "setup.sh", "\n".join([*site.setup, ""]))
        found["XTAL_SETUP"] = str(folder / "setup.sh")
    if site.container:
        path = folder / "container.sh"
        write_text(path, f'#!/bin/sh\nexec {shlex.join(site.container)} "$@"\n')
        path.chmod(0o755)
        found["XTAL_CONTAINER"] = str(path)
    return found


def describe(site: Site) -> dict[str, Any]:
    """For the record of a job: what of the site decided it."""
    return site.model_dump(exclude_defaults=True)
