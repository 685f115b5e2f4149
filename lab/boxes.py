"""Boxes: groups of processes with their own network, mounts and process numbers, which end together.

A box is what a container is, made by hand because the programs in it make containers themselves. The kernel does the
cleaning: when the first process of a box ends, every process in it is killed, shims and containers too, and the box's
mounts and network, with whatever iptables rules it had, are gone with the last of them.
"""

import contextlib
import os
import re
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from lab.debian import PATH, LabError

END_SECONDS = 20
FIRST_NETWORK, NETWORKS = 150, 90
LAST_LINES = 5
CGROUPS = Path("/sys/fs/cgroup")
ENVIRONMENT = {**os.environ, "PATH": PATH}

# A process writes its own record before it becomes the program, so that none runs that nobody knows of. Its start time
# is in there because a number alone may by now be another process.
_RECORDED = 'echo $$ $(cut -d" " -f22 /proc/$$/stat) >"$0"; exec "$@"'

# What the programs have at fixed paths is the box's own: in memory what is void without them, in its folder the rest.
# The kubelet would set the whole machine's memory and panic settings, so it is shown files with the values that it wants.
# The first process of a box has to reap the orphans in it, which the kernel does for one that ignores their ends.
_FIRST = """
set -e
mount --make-rshared /
for folder in /run/containerd /run/netns /var/lib/cni; do
  mkdir -p $folder
  mount -t tmpfs lab $folder
done
for folder in /var/lib/kubelet /var/log/pods /var/log/containers /etc/containerd/certs.d; do
  mkdir -p $folder "$2$folder"
  mount --bind "$2$folder" $folder
done
mount --bind "$2/hosts" /etc/hosts
mkdir /run/containerd/settings
for setting in vm/overcommit_memory=1 vm/panic_on_oom=0 kernel/panic=10 kernel/panic_on_oops=1 \\
  kernel/keys/root_maxkeys=1000000 kernel/keys/root_maxbytes=25000000; do
  file=$(mktemp -p /run/containerd/settings)
  echo ${setting#*=} >$file
  mount --bind $file /proc/sys/${setting%=*}
done
hostname "$1"
ip link set lo up
echo 1 >/proc/sys/net/ipv4/ip_forward
trap '' CHLD
exec sleep infinity
"""


@dataclass(frozen=True)
class Recorded:
    """A process that was started here, known by a file."""

    file: Path

    @property
    def pid(self) -> int | None:
        """Return its number, or None where it does not run."""
        try:
            pid, started = map(int, self.file.read_text().split())
            state, *fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
        except (OSError, ValueError):
            return None
        # A first thread that has ended says nothing while others still hold the process's ports and files.
        is_there = state != "Z" or int(fields[16]) > 1
        return pid if is_there and int(fields[18]) == started else None

    @property
    def child(self) -> int | None:
        """Return the number of its child: the program that runs in the box."""
        if (pid := self.pid) is None:
            return None
        try:
            children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
        except OSError:
            return None
        return int(children[0]) if children else None

    def start(self, command: list[str], log: Path) -> None:
        """Start a process that outlives this one."""
        for folder in (self.file.parent, log.parent):
            folder.mkdir(parents=True, exist_ok=True)
        self.file.unlink(missing_ok=True)
        with log.open("w") as output:
            process = subprocess.Popen(
                ["sh", "-c", _RECORDED, str(self.file), *command],
                env=ENVIRONMENT,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,
            )
        while self.pid is None and process.poll() is None:
            time.sleep(0.01)

    def ends(self, seconds: float) -> None:
        """Wait for its end.

        Raises:
            LabError: it is still there after that time.
        """
        if not wait(lambda: self.pid is None, seconds):
            raise LabError(f"process {self.pid} ({self.file}) does not end")
        self.file.unlink(missing_ok=True)


def wait(condition: Callable[[], bool], seconds: float) -> bool:
    """Wait until something is so, and return whether it became so in time."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.1)
    return True


@dataclass(frozen=True)
class Box:
    """A box: its name, its address and its folder in the lab's."""

    name: str
    address: str
    folder: Path

    @property
    def first(self) -> Recorded:
        """Return the process that holds the box; its child is the first one within."""
        return Recorded(self.folder / "pid/box")

    def open(self) -> None:
        """Start the box if it is not there.

        Raises:
            LabError: the kernel refuses it.
        """
        if self._complete():
            return
        self.close()
        self.folder.mkdir(parents=True, exist_ok=True)
        (self.folder / "hosts").write_text(f"{Path('/etc/hosts').read_text()}\n{self.address} {self.name}\n")
        # What the machine unmounts must go from the box too, and nothing that the box mounts may come to the machine.
        namespaces = ["--mount", "--propagation", "slave", "--uts", "--ipc", "--net", "--pid", "--mount-proc"]
        command = ["unshare", *namespaces, "--fork", "--kill-child", "sh", "-c", _FIRST, "sh", self.name]
        log = self.folder / "log/box"
        self.first.start([*command, str(self.folder)], log)
        if not wait(lambda: self._complete() or self.first.pid is None, END_SECONDS) or not self._complete():
            raise LabError(f"{self.name}: no namespaces of its own\n{last_lines(log)}")

    def _complete(self) -> bool:
        if (child := self.first.child) is None:
            return False
        try:
            return Path(f"/proc/{child}/comm").read_text().strip() == "sleep"
        except OSError:
            return False

    def close(self) -> None:
        """End the box and everything in it, as a power cut does: what a signal asks for is void once the lab is gone.

        Raises:
            LabError: something of it is still there after a deadline.
        """
        if (pid := self.first.child or self.first.pid) is not None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        for recorded in (self.first, *self.programs()):
            recorded.ends(END_SECONDS)

    def inside(self, *command: str) -> list[str]:
        """Return the command that runs a command in the box."""
        if (child := self.first.child) is None:
            raise LabError(f"{self.name} does not run")
        return ["nsenter", "--target", str(child), "--mount", "--uts", "--ipc", "--net", "--pid", "--", *command]

    def program(self, name: str) -> Recorded:
        """Return the program of that name in the box."""
        return Recorded(self.folder / "pid" / name)

    def programs(self) -> Iterator[Recorded]:
        """Yield what was started in the box."""
        for file in sorted((self.folder / "pid").glob("*")):
            if file.name != "box":
                yield Recorded(file)

    def log(self, name: str) -> Path:
        """Return the file with what a program says."""
        return self.folder / "log" / name

    def start(self, name: str, *command: str) -> None:
        """Start a program in the box if it does not run."""
        if self.program(name).pid is None:
            self.program(name).start(self.inside(*command), self.log(name))

    def wait(self, what: str, condition: Callable[[], bool], seconds: float, *names: str) -> None:
        """Wait until something is so while the programs run.

        Raises:
            LabError: it took too long, or one of the programs ended.
        """

        def ended() -> list[str]:
            return [name for name in names if self.program(name).pid is None]

        so = wait(lambda: bool(ended()) or condition(), seconds)
        if so and not ended():
            return
        said = "".join(f"\n{name}: {last_lines(self.log(name))}" for name in ended() or names)
        why = f"{', '.join(ended())} ended" if ended() else f"not within {seconds:g} s"
        raise LabError(f"{self.name}: {what}: {why}{said}")


def free_network(first: int) -> str:
    """Return the first two numbers of addresses that nothing on this machine has, looked for from a place on.

    Raises:
        LabError: there are none.
    """
    for number in range(NETWORKS):
        network = f"10.{FIRST_NETWORK + (first + number) % NETWORKS}"
        if not run(["ip", "-4", "route", "show", "root", f"{network}.0.0/16"]).strip():
            return network
    raise LabError(f"Every network from 10.{FIRST_NETWORK}.0.0/16 on is another one's on this machine.")


def run(command: list[str]) -> str:
    """Run a command and return its output.

    Raises:
        LabError: it failed.
    """
    run = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, check=False)
    if run.returncode:
        raise LabError(f"{' '.join(command)}: {run.stderr.strip() or run.returncode}")
    return run.stdout


def megabytes(pid: int | None) -> int:
    """Return the memory of a process; 0 where it does not run or is about to end."""
    try:
        found = re.search(r"^VmRSS:\s+(\d+)", Path(f"/proc/{pid}/status").read_text(), re.MULTILINE)
    except OSError:
        return 0
    return int(found[1]) // 1024 if found else 0


def last_lines(log: Path) -> str:
    """Return the end of a log."""
    try:
        return "\n".join(log.read_text(errors="replace").splitlines()[-LAST_LINES:])
    except OSError as error:
        return str(error)
