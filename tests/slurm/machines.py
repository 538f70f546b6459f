"""A real SLURM of several hosts on one machine: each has namespaces of its own.

Every host has its own network (joined by a bridge that leads nowhere else), name, /tmp, /dev/shm
and processes, so that to kill its first process is to pull its plug. One folder is shared by all,
as a cluster's parallel file system is.
"""

import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
_PROGRAMS = ("slurmctld", "slurmd", "sbatch", "srun", "munged", "unshare", "nsenter", "ip")
_NETWORK = "10.77.0."  # within the namespaces only
USERS = {"alice": 7001, "bob": 7002}  # who the hosts know besides root and the like
_LOGIN = "login"

_HOST = """
set -e
hostname "$1"
mount --bind "$2/hosts" /etc/hosts
mount --bind "$2/passwd" /etc/passwd
mount --bind "$3" "$2/checkout"
mount -t tmpfs -o size=6g,mode=1777 tmpfs /tmp
mkdir -p "$3"
mount --bind "$2/checkout" "$3"
mount -t tmpfs -o size=2g,mode=1777 tmpfs /dev/shm
ip link set lo up
touch "$2/run/ready-$1"
exec {python} -c 'import os, signal
signal.signal(signal.SIGCHLD, signal.SIG_IGN)
while True: signal.pause()'
"""

# A folder of root's alone becomes an empty one for all, with the same places within.
_OPEN = """
set -e
closed=$0 hold=$1; shift
at=0
for place; do at=$((at + 1)); mkdir -p "$hold/$at"; mount --bind "$place" "$hold/$at"; done
mount -t tmpfs -o size=1m,mode=755 tmpfs "$closed"
at=0
for place; do at=$((at + 1)); mkdir -p "$place"; mount --bind "$hold/$at" "$place"; done
"""

_CONF = """
ClusterName=tiny
SlurmctldHost=login
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/run/munge.socket,cred_expire=6
CredType=cred/munge
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool/%n
SlurmctldPidFile={folder}/run/slurmctld.pid
SlurmdPidFile={folder}/run/slurmd-%n.pid
SlurmctldLogFile={folder}/log/slurmctld.log
SlurmdLogFile={folder}/log/slurmd-%n.log
SlurmdParameters=config_overrides
SlurmctldParameters=preempt_send_user_signal
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
JobCompType=jobcomp/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
SchedulerParameters=bf_interval=1,sched_interval=1,sched_min_interval=100000
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
ReturnToService=2
SlurmdTimeout=6
SlurmctldTimeout=6
KillWait=4
MinJobAge=300
UnkillableStepTimeout=20
DefMemPerCPU=500
NodeName=node[1-{nodes}] CPUs={cpus} RealMemory={memory} State=UNKNOWN
PartitionName=batch Nodes=node[1-{nodes}] Default=YES MaxTime=1:00:00 DefaultTime=10 PriorityTier=10
PartitionName=low Nodes=node[1-{nodes}] MaxTime=1:00:00 DefaultTime=10 PriorityTier=1 GraceTime=20
"""

_ACCOUNTED = """AccountingStorageType=accounting_storage/slurmdbd
AccountingStorageHost=login
AccountingStoragePass={folder}/run/munge.socket
AccountingStorageEnforce=associations,limits"""

_GPUS = "Name=gpu File=/dev/tty[1-2] Flags=nvidia_gpu_env"
_DBD = """
AuthType=auth/munge
AuthInfo=socket={folder}/run/munge.socket
DbdHost=login
SlurmUser=root
PidFile={folder}/run/slurmdbd.pid
LogFile={folder}/log/slurmdbd.log
StorageType=accounting_storage/mysql
StorageHost=localhost
StorageUser=root
"""


def obstacle() -> str | None:
    """Why this machine cannot run the cluster; None if it can."""
    if sys.platform != "linux" or os.getuid() != 0:
        return "a SLURM of namespaces needs root on Linux"
    os.environ["PATH"] += ":/usr/sbin:/sbin"
    missing = [name for name in _PROGRAMS if shutil.which(name) is None]
    if missing:
        return f"{', '.join(missing)} not installed (apt install slurm-wlm munge iproute2)"
    words = ["unshare", "--net", "--mount", "--pid", "--fork", "ip", "link", "set", "lo", "up"]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    return f"no namespaces here: {done.stderr.strip()}" if done.returncode else None


class Machines:
    """The cluster; `close` ends everything that it started.

    Args:
        richer: with slurmdbd, GPUs that are device files alone, and one core on the first node.
    """

    def __init__(
        self, nodes: int = 3, cpus: int = 2, memory: int = 8000, *, richer: bool = False
    ) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="xtal-slurm-", dir="/var/tmp"))
        self.shared = self.folder / "shared"
        for name in ("run", "log", "state", "spool", "checkout", "shared"):
            (self.folder / name).mkdir()
        self.nodes = [f"node{number}" for number in range(1, nodes + 1)]
        self._inits: dict[str, int] = {}
        self._ends: list[subprocess.Popen[bytes]] = []
        addresses = {_LOGIN: 1} | {name: 10 + at for at, name in enumerate(self.nodes, 1)}
        self.addresses = {name: f"{_NETWORK}{last}" for name, last in addresses.items()}
        lines = ["127.0.0.1 localhost", *(f"{a} {name}" for name, a in self.addresses.items())]
        (self.folder / "hosts").write_text("\n".join(lines) + "\n")
        known = Path("/etc/passwd").read_text().splitlines()
        for name, uid in USERS.items():
            known.append(f"{name}:x:{uid}:{uid}::{self.shared}/home-{name}:/bin/sh")
        (self.folder / "passwd").write_text("\n".join(known) + "\n")
        key = self.folder / "munge.key"
        key.touch(mode=0o600)
        key.write_bytes(os.urandom(128))
        conf = _CONF.format(folder=self.folder, nodes=nodes, cpus=cpus, memory=memory)
        if richer:
            conf = re.sub("AccountingStorageType=.*", _ACCOUNTED.format(folder=self.folder), conf)
            conf = conf.replace("MinJobAge=300", "MinJobAge=10")
            gpus = f"RealMemory={memory} Gres=gpu:2 State=UNKNOWN"
            first = f"GresTypes=gpu\nNodeName=node1 CPUs=1 {gpus}\n"
            conf = re.sub(
                "NodeName=.*", f"{first}NodeName=node[2-{nodes}] CPUs={cpus} {gpus}", conf
            )
            (self.folder / "gres.conf").write_text(f"NodeName=node[1-{nodes}] {_GPUS}\n")
        (self.folder / "slurm.conf").write_text(conf)
        try:
            self._start_login(richer)
            for name in self.nodes:
                self.start(name)
            self.until(lambda: len(self.idle()) == nodes, "all nodes are idle")
        except BaseException:
            self.close()
            raise

    def _start_login(self, accounting: bool) -> None:
        self._namespace(_LOGIN)
        for words in ("link add br0 type bridge", f"addr add {self.addresses[_LOGIN]}/24 dev br0"):
            self.on(_LOGIN, ["ip", *words.split()])
        self.on(_LOGIN, ["ip", "link", "set", "br0", "up"])
        run, log = self.folder / "run", self.folder / "log"
        self.on(
            _LOGIN,
            [
                "munged",
                "--force",
                f"--key-file={self.folder}/munge.key",
                f"--socket={run}/munge.socket",
                f"--pid-file={run}/munged.pid",
                f"--log-file={log}/munged.log",
                f"--seed-file={run}/munged.seed",
            ],
        )
        if accounting:
            self._start_accounting()
        self.on(_LOGIN, ["slurmctld"])

    def _start_accounting(self) -> None:
        """slurmdbd and its MariaDB, which listen to this host alone; one account for root."""
        data, socket = self.folder / "mysql", self.folder / "run" / "mysql.sock"
        words = ["--no-defaults", "--user=root", f"--datadir={data}"]
        self.on(_LOGIN, ["mariadb-install-db", *words, "--skip-test-db"])
        words += [f"--socket={socket}", "--skip-networking", f"--log-error={data}/log"]
        self.on(_LOGIN, ["setsid", "--fork", "mariadbd", *words])
        _wait(socket.exists, "MariaDB listens", 60)
        place = self.folder / "slurmdbd.conf"
        place.touch(mode=0o600)
        place.write_text(_DBD.format(folder=self.folder))
        self.on(_LOGIN, ["env", f"MYSQL_UNIX_PORT={socket}", "slurmdbd"])
        words = ["sacctmgr", "-i", "add", "cluster", "tiny"]
        _wait(lambda: self.run(*words, check=False).returncode == 0, "slurmdbd answers", 60)
        self.run("sacctmgr", "-i", "add", "account", "physics", "cluster=tiny")
        self.run("sacctmgr", "-i", "add", "user", "root", "account=physics")

    def start(self, node: str) -> None:
        """Put a node in: a new host of that name, with an empty /tmp."""
        self._namespace(node)
        login, here = self._inits[_LOGIN], self._inits[node]
        outside = f"v-{node}"
        words = f"ip link add {outside} type veth peer name eth0 netns {here}"
        subprocess.run(["nsenter", "-t", str(login), "-n", *words.split()], check=True)
        for words in (f"set {outside} master br0", f"set {outside} up"):
            self.on(_LOGIN, ["ip", "link", *words.split()])
        self.on(node, ["ip", "addr", "add", f"{self.addresses[node]}/24", "dev", "eth0"])
        self.on(node, ["ip", "link", "set", "eth0", "up"])
        (self.folder / "spool" / node).mkdir(exist_ok=True)
        self.on(node, ["slurmd", "-N", node])

    def kill(self, node: str) -> None:
        """Pull the plug: all of the node's processes are gone at once, SLURM does not know yet."""
        os.kill(self._inits.pop(node), signal.SIGKILL)
        self.until(lambda: not self._is_up(node), f"{node} is gone", 10)

    def _is_up(self, node: str) -> bool:
        done = self.run("ip", "link", "show", f"v-{node}", check=False)
        return done.returncode == 0

    def revive(self, node: str) -> None:
        """Put a killed node in again and wait until SLURM uses it."""
        self.start(node)
        self.until(lambda: node in self.idle(), f"{node} is idle", 60)

    def _namespace(self, name: str) -> None:
        ready = self.folder / "run" / f"ready-{name}"
        ready.unlink(missing_ok=True)
        words = ["unshare", "--fork", "--kill-child", "--mount-proc"]
        script = _HOST.replace("{python}", sys.executable)
        words += ["--net", "--uts", "--ipc", "--mount", "--pid", "--propagation", "private"]
        words += ["bash", "-c", script]
        words += ["-", name, str(self.folder), str(ROOT)]
        with (self.folder / "log" / f"host-{name}.log").open("ab") as log:
            process = subprocess.Popen(
                words,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
                env={**os.environ, "SLURM_CONF": f"{self.folder}/slurm.conf"},
            )
        self._ends.append(process)
        _wait(ready.exists, f"host {name}: {log.name}", 20)
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text()
        self._inits[name] = int(children.split()[0])

    def on(
        self, host: str, words: Sequence[str | Path], *, check: bool = True, **more: Any
    ) -> subprocess.CompletedProcess[str]:
        """Run a command on a host, in the shared folder."""
        enter = ["nsenter", "-t", str(self._inits[host]), "-n", "-u", "-i", "-m", "-p"]
        enter += [f"--wd={self.shared}", "--", *(str(word) for word in words)]
        more.setdefault("timeout", 300)
        done = subprocess.run(
            enter, capture_output=True, text=True, check=False, env=self.environment(), **more
        )
        assert not check or done.returncode == 0, f"{words}: {done.stdout}\n{done.stderr}"
        return done

    def run(
        self, *words: str | Path, check: bool = True, **more: Any
    ) -> subprocess.CompletedProcess[str]:
        """Run a command on the login node."""
        return self.on(_LOGIN, words, check=check, **more)

    def open_to_all(self, host: str) -> None:
        """Let any user reach Python and the checkout, which may lie in a folder of root's alone."""
        places = [Path(sys.base_prefix), Path(sys.prefix), ROOT]
        self.folder.chmod(0o755)
        above = {each for place in places for each in place.parents}
        closed = [each for each in sorted(above) if not each.stat().st_mode & 0o001]
        for top in [each for each in closed if not set(each.parents) & set(closed)]:
            inside = [place for place in places if place.is_relative_to(top)]
            hold = self.folder / "run" / f"held-{host}"
            self.on(host, ["sh", "-c", _OPEN, top, hold, *inside])

    def as_user(self, name: str, host: str, words: Sequence[str | Path], **more: Any) -> Any:
        """Run a command on a host as one of `USERS`, who has a home in the shared folder."""
        home = self.shared / f"home-{name}"
        if not home.exists():
            home.mkdir(mode=0o700)
            os.chown(home, USERS[name], USERS[name])
        who = [f"--reuid={name}", f"--regid={USERS[name]}", "--clear-groups"]
        return self.on(host, ["setpriv", *who, "env", f"HOME={home}", *words], **more)

    def environment(self) -> dict[str, str]:
        """As of a user who has activated the virtual environment."""
        kept = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM", "RAY_", "XTAL"))}
        path = f"{Path(sys.executable).parent}:{kept['PATH']}"
        return kept | {"PATH": path, "SLURM_CONF": f"{self.folder}/slurm.conf"}

    def idle(self) -> list[str]:
        done = self.run("sinfo", "-h", "-N", "-p", "batch", "-t", "idle", "-o", "%N", check=False)
        return sorted(set(done.stdout.split()))

    def sbatch(self, *words: str | Path, **more: Any) -> str:
        """Submit; the job's number."""
        return self.run("sbatch", "--parsable", *words, **more).stdout.strip()

    def job(self, job: str) -> dict[str, Any]:
        """What the controller says of a job."""
        done = self.run("scontrol", "show", "job", job, "--oneliner")
        pairs = (word.partition("=") for word in done.stdout.split())
        return {key: value for key, _, value in pairs}

    def nodes_of(self, job: str) -> list[str]:
        """The nodes that a job has now."""
        return self.run("scontrol", "show", "hostnames", self.job(job)["NodeList"]).stdout.split()

    def requeued(self, job: str, times: int = 1) -> None:
        """Wait until a job has been put back into the queue; it may run again by then."""
        again = f"job {job} is requeued, {times} times"
        self.until(lambda: self.job(job)["Restarts"] == str(times), again, 120)

    def ended(self, job: str, seconds: float = 300) -> str:
        """Wait for the end of a job; its state."""
        over = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "PREEMPTED", "DEADLINE")
        self.until(lambda: self.job(job)["JobState"] in over, f"job {job} has ended", seconds)
        return str(self.job(job)["JobState"])

    def processes(self, node: str) -> list[str]:
        """Command lines of all processes of a node, but for its first and its slurmd."""
        inside = os.readlink(f"/proc/{self._inits[node]}/ns/pid")
        found = []
        for place in Path("/proc").glob("[0-9]*"):
            try:
                if os.readlink(place / "ns" / "pid") != inside:
                    continue
                words = (place / "cmdline").read_bytes().split(b"\0")
                state = (place / "stat").read_text().rpartition(")")[2].split()[0]
            except OSError:
                continue
            line = b" ".join(words).decode(errors="replace").strip()
            if state != "Z" and int(place.name) != self._inits[node]:
                found.append(line)
        return [line for line in found if not line.startswith(("slurmd", "/usr/sbin/slurmd"))]

    def left_in_tmp(self, node: str) -> list[str]:
        """What lies in a node's own /tmp, other than the checkout and torch's empty cache."""
        top = ROOT.relative_to("/tmp").parts[0] if ROOT.is_relative_to("/tmp") else ""
        found = self.on(node, ["ls", "-A", "/tmp"]).stdout.split()
        return [name for name in found if name not in (top, "torchinductor_root")]

    def until(self, true: Callable[[], bool], what: str, seconds: float = 60) -> None:
        try:
            _wait(true, what, seconds)
        except AssertionError as error:
            queue = self.run("squeue", check=False).stdout + self.run("sinfo", check=False).stdout
            raise AssertionError(f"{error}\n{queue}") from None

    def close(self) -> None:
        for pid in self._inits.values():
            os.kill(pid, signal.SIGKILL)
        for process in self._ends:
            process.wait(20)
        shutil.rmtree(self.folder, ignore_errors=True)


def _wait(true: Callable[[], bool], what: str, seconds: float) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, f"waited {seconds} s in vain: {what}"
        time.sleep(0.1)
