"""Who made a result: versions, commit, hardware, time. Never a token, a key or an environment."""

import os
import platform
import subprocess
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

_PACKAGES = (
    "crystal-genome",
    "numpy",
    "torch",
    "numba",
    "h5py",
    "gemmi",
    "moyopy",
    "pymatgen",
    "ray",
)


def provenance() -> dict[str, str | int | dict[str, str]]:
    """Versions of what computes, the commit of this code, the machine and the time (UTC)."""
    versions = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = "not installed"
    return {
        "commit": commit(),
        "versions": versions,
        "hardware": f"{_processor()}, {os.cpu_count()} cores",
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def commit() -> str:
    """Commit of the checkout that this code runs from, `-dirty` if changed; else the version."""
    root = Path(__file__).resolve().parent.parent
    if (root / ".git").exists():
        command = ["git", "-C", str(root), "describe", "--always", "--dirty", "--exclude=*"]
        try:
            done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=10)
            return done.stdout.strip()
        except (OSError, subprocess.SubprocessError):
            pass
    try:
        return "v" + version("crystal-genome")
    except PackageNotFoundError:
        return "unknown"


def _processor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()
