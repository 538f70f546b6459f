"""How much memory this process may still take, and how much it has."""

import os
import resource
from pathlib import Path

_CGROUPS = Path("/sys/fs/cgroup")


def available() -> int:
    """Bytes that this process may still take: the least of what machine, job and limits leave.

    The machine's is `MemAvailable`; a job's that of its cgroups, of version 1 or 2, where pages of
    files count as free because the kernel can drop them; limits are `ulimit -d` and `ulimit -v`.
    """
    room = [_of_machine(), *_of_cgroups()]
    status = _table(Path("/proc/self/status"))
    for limit, used in ((resource.RLIMIT_DATA, "VmData"), (resource.RLIMIT_AS, "VmSize")):
        most = resource.getrlimit(limit)[0]
        if most != resource.RLIM_INFINITY:
            room.append(most - status.get(used, 0))
    return max(0, min(room))


def resident() -> int:
    """Bytes of memory that this process has now; on systems without /proc, the most it ever had."""
    status = _table(Path("/proc/self/status"))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return status.get("VmRSS", peak if os.uname().sysname == "Darwin" else 1024 * peak)


def _of_machine() -> int:
    table = _table(Path("/proc/meminfo"))
    whole = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return table.get("MemAvailable", whole // 2)


def _of_cgroups() -> list[int]:
    """What each cgroup of this process, and each above it, leaves."""
    room = []
    try:
        lines = Path("/proc/self/cgroup").read_text().splitlines()
    except OSError:
        return []
    for line in lines:
        _, kinds, path = line.split(":", 2)
        if not kinds:
            top, names = _CGROUPS, ("memory.max", "memory.current", "file")
        elif "memory" in kinds.split(","):
            top = _CGROUPS / "memory"
            names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_cache")
        else:
            continue
        own = top / path.lstrip("/")
        for place in (own, *(p for p in own.parents if p.is_relative_to(top))):
            try:
                most, used = (int((place / name).read_text()) for name in names[:2])
            except (OSError, ValueError):  # none here, or "max"
                continue
            cached = _table(place / "memory.stat", unit=1).get(names[2], 0)
            room.append(most - used + cached)
    return room


def _table(path: Path, unit: int = 1024) -> dict[str, int]:
    """Name → bytes of a file of lines `name: number kB`."""
    answer = {}
    try:
        lines = path.read_text().splitlines()
    except OSError:
        return {}
    for line in lines:
        words = line.replace(":", " ").split()
        if len(words) > 1 and words[1].isdecimal():
            answer[words[0]] = int(words[1]) * unit
    return answer
