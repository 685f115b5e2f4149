"""A Ceph cluster under `.lab/ceph`, without systemd, cephadm or a kernel module, for root on Debian.

It has one monitor and one store (OSD), both on 127.0.0.1 and with Ceph's own authentication on. The store is in memory:
a cluster is there within seconds, and its images go when the store's process ends. No manager runs: images need none, and
all that misses it is `ceph status`, which warns of it. The folder's path decides where the search for free ports begins,
so that two clusters are two, and one that is made anew has its old address.
"""

import contextlib
import fcntl
import hashlib
import os
import shutil
import signal
import socket
import subprocess
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from lab import kernel_client
from lab.boxes import ENVIRONMENT, Recorded, last_lines, megabytes, run, wait
from lab.debian import LabError, can_install, install_missing
from toolchain.programs import ROOT

NO_CEPH = "There is no Ceph: python -m lab up ceph"

# What has to be there, and the Debian package that has it.
PACKAGES = {
    "ceph-mon": "ceph-mon",
    "ceph-osd": "ceph-osd",
    "ceph": "ceph-common",
    "rbd-fuse": "rbd-fuse",
    "mkfs.ext4": "e2fsprogs",
}
MONITOR, STORE = "monitor", "store"
# Below the ports that the kernel gives to connections: a stopped monitor's would be another's before it is back.
FIRST_PORT, PORTS = 20000, 10000
MONITOR_SECONDS = 30
STORE_SECONDS = 60
COMMAND_SECONDS = 60
END_SECONDS = 20

# What a cluster of the lab says whatever it is made of; to be formatted with its folder.
COMMON = """auth cluster required = cephx
auth service required = cephx
auth client required = cephx
auth allow insecure global id reclaim = false
keyring = {folder}/keyring
# Their default places are the machine's, and a socket in the folder could have too long a path.
admin socket =
run dir = {folder}
crash dir = {folder}
osd pool default size = 1
osd pool default min size = 1
osd pool default pg num = 8
osd pool default pg autoscale mode = off
osd crush chooseleaf type = 0
mon allow pool size one = true
mon allow pool delete = true
mon warn on pool no redundancy = false
# This machine's disk is not the cluster's to watch.
mon data avail warn = 1
mon data avail crit = 0
# Making a cluster is a dozen proposals; each would wait for a second.
paxos propose interval = 0.05
paxos min wait = 0.01
"""
_CONFIGURATION = """[global]
fsid = {fsid}
mon initial members = a
mon host = [v2:127.0.0.1:{v2},v1:127.0.0.1:{v1}]
public addr = 127.0.0.1
cluster addr = 127.0.0.1
{common}
[mon]
mon data = {folder}/{MONITOR}
mon cluster log to file = false
log to file = false
log to stderr = true

[osd]
osd data = {folder}/{STORE}
keyring = {folder}/{STORE}/keyring
osd objectstore = memstore
memstore device bytes = {size}
osd crush initial weight = 1
osd class update on start = false
log to file = false
log to stderr = true
"""


@dataclass(frozen=True)
class Status:
    """A process of the lab's Ceph: what it is, and its number and memory if it runs."""

    name: str
    pid: int | None
    megabytes: int


@dataclass(frozen=True)
class Ceph:
    """A cluster in a folder, which is what tells it from another, with a pool for images.

    Its store takes as many MiB; they are memory only once something is written. A full one says so within ten seconds, and
    from then on what writes waits, as with every Ceph.
    """

    folder: Path
    pool: str = "rbd"
    size_mib: int = 2048

    @property
    def conf(self) -> Path:
        """Return the file with which a client is the cluster's administrator."""
        return self.folder / "ceph.conf"

    @property
    def monitor(self) -> str:
        """Return the monitor's address for clients of the first protocol, such as those in kernels.

        Raises:
            LabError: there is no cluster.
        """
        return f"127.0.0.1:{self._ports()[0]}"

    @property
    def environment(self) -> dict[str, str]:
        """Return the variables that make a program's machine a Ceph host, to be added to those that it has.

        `rbd` in its PATH is the lab's, which maps images without the kernel's client (see `lab.kernel_client`).
        """
        return {
            "CEPH_CONF": str(self.conf),
            kernel_client.FOLDER_VARIABLE: str(self._mapped),
            "PATH": os.pathsep.join((str(kernel_client.PROGRAM.parent), ENVIRONMENT["PATH"])),
        }

    def up(self) -> Path:
        """Start what is missing of the cluster, and return its ceph.conf once images can be made.

        A monitor that has ended is started again and nothing is lost. With the store's process all images are lost, and
        the rest is void without them: then everything of the cluster is removed, what is mapped from it too, and a new one
        is made, with other keys, at the same address if it is free.

        Raises:
            LabError: it cannot be had, or one runs there with another pool or size; the text ends with the last lines of
                the log of what failed.
        """
        if not can_install():
            raise LabError("The lab's Ceph runs only for root on Debian.")
        with self._locked(), _progress() as progress:
            task = progress.add_task("")
            progress.update(task, description="installing what is missing")
            prepare()
            if self._made.exists() and self._process(STORE).pid is not None:
                if (settings := self._made.read_text()) != self._settings:
                    raise LabError(f"{self.folder} has a Ceph with {settings}, not {self._settings}: end that one first.")
                progress.update(task, description="waiting for the cluster")
                self._start_monitor()
            else:
                self._remove()
                progress.update(task, description="making a cluster")
                self._make()
        return self.conf

    def down(self) -> bool:
        """End the cluster and forget it, and return whether there was one. Nothing of it stays, nor of what is mapped.

        What is mounted from it is unmounted as it is: what was not yet written goes with the rest.

        Raises:
            LabError: something does not go away.
        """
        with self._locked():
            return self._remove()

    def stop_monitor(self) -> None:
        """End the monitor and leave the store, which keeps the images until `start_monitor` or `up`.

        Raises:
            LabError: it does not end.
        """
        with self._locked():
            self._end(MONITOR, signal.SIGTERM)

    def start_monitor(self) -> None:
        """Start the monitor if it does not run, and return once the cluster works.

        Raises:
            LabError: there is no cluster, or it does not work; the text ends with the last lines of its logs.
        """
        with self._locked():
            self._start_monitor()

    def address(self) -> Path | None:
        """Return the path of the ceph.conf of the cluster that answers."""
        runs = self._made.exists() and self._process(STORE).pid is not None and self._listens()
        return self.conf if runs else None

    def status(self) -> list[Status]:
        """Return the processes of the cluster and of what is mapped from it; none where there is no cluster."""
        found = {file.name: Recorded(file) for file in sorted((self.folder / "pid").glob("*"))}
        found |= {f"rbd-fuse {image}": process for image, process in kernel_client.processes(self._mapped).items()}
        return [Status(name, process.pid, megabytes(process.pid)) for name, process in found.items()]

    def rbd(self, *arguments: str) -> str:
        """Run `rbd` as the cluster's administrator and return its output.

        Raises:
            LabError: it failed, or took more than a minute.
        """
        return self._command("/usr/bin/rbd", *arguments)

    def ceph(self, *arguments: str) -> str:
        """Run `ceph` as the cluster's administrator and return its output.

        Raises:
            LabError: it failed, or took more than a minute.
        """
        return self._command("ceph", *arguments)

    def _command(self, *command: str) -> str:
        if not self.conf.exists():
            raise LabError(NO_CEPH)
        said = " ".join(command)
        environment = {**ENVIRONMENT, "CEPH_CONF": str(self.conf)}
        try:
            done = subprocess.run(
                command,
                env=environment,
                stdin=subprocess.DEVNULL,
                capture_output=True,
                text=True,
                timeout=COMMAND_SECONDS,
                check=False,
            )
        except subprocess.TimeoutExpired:
            raise LabError(f"{said}: no end within {COMMAND_SECONDS} s: does the monitor run, and is space left?") from None
        if done.returncode:
            raise LabError(f"{said}: {done.stderr.strip() or done.returncode}")
        return done.stdout

    @property
    def _mapped(self) -> Path:
        return self.folder / "mapped"

    @property
    def _made(self) -> Path:
        """Return the file that says that the cluster was once complete, and how it was made."""
        return self.folder / "made"

    @property
    def _settings(self) -> str:
        return f"the pool {self.pool} and {self.size_mib} MiB"

    def _process(self, name: str) -> Recorded:
        return Recorded(self.folder / "pid" / name)

    def _log(self, name: str) -> Path:
        return self.folder / "log" / name

    def _ports(self) -> list[int]:
        """Return the monitor's ports: of the first protocol, and of the second."""
        try:
            return [int(port) for port in (self.folder / "ports").read_text().split()]
        except FileNotFoundError:
            raise LabError(NO_CEPH) from None

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        self.folder.parent.mkdir(parents=True, exist_ok=True)
        # The file is not in the folder, which `down` removes.
        with self.folder.with_name(f"{self.folder.name}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield

    def _choose_ports(self) -> tuple[int, int]:
        first = int(hashlib.sha256(os.fsencode(self.folder)).hexdigest()[:8], 16)
        for number in range(0, PORTS, 2):
            port = FIRST_PORT + (first * 2 + number) % PORTS
            if _is_free(port) and _is_free(port + 1):
                return port, port + 1
        raise LabError(f"Every port from {FIRST_PORT} to {FIRST_PORT + PORTS - 1} is another program's.")

    def _make(self) -> None:
        """Make a cluster in a folder that is not there."""
        fsid, store = str(uuid.uuid4()), str(uuid.uuid4())
        v1, v2 = self._choose_ports()
        (self.folder / STORE).mkdir(mode=0o700, parents=True)
        (self.folder / "ports").write_text(f"{v1} {v2}")
        size = self.size_mib * 2**20
        names = {"MONITOR": MONITOR, "STORE": STORE}
        common = COMMON.format(folder=self.folder)
        self.conf.write_text(
            _CONFIGURATION.format(folder=self.folder, common=common, fsid=fsid, v1=v1, v2=v2, size=size, **names)
        )
        make_keyrings(self.folder)
        monitors = str(self.folder / "monitors")
        addresses = f"[v2:127.0.0.1:{v2},v1:127.0.0.1:{v1}]"
        run(["monmaptool", "--create", "--fsid", fsid, "--addv", "a", addresses, monitors])
        keys = str(self.folder / "first-keyring")
        run(["ceph-mon", "-c", str(self.conf), "--mkfs", "-i", "a", "--monmap", monitors, "--keyring", keys])
        self._start(MONITOR, "ceph-mon", "-i", "a")
        self._wait("no answer", self._listens, MONITOR_SECONDS, MONITOR)
        # The first one gets the number 0; what it may do, the monitor has read from the keyring.
        self.ceph("osd", "new", store)
        run(["ceph-osd", "-c", str(self.conf), "--mkfs", "-i", "0", "--osd-uuid", store])
        self._start(STORE, "ceph-osd", "-i", "0")
        self.ceph("osd", "pool", "create", self.pool)
        self._await_store()
        self.rbd("pool", "init", self.pool)
        self._made.write_text(self._settings)

    def _start(self, name: str, *command: str) -> None:
        self._process(name).start([*command, "-f", "-c", str(self.conf)], self._log(name))

    def _start_monitor(self) -> None:
        if not self._made.exists():
            raise LabError(NO_CEPH)
        if self._process(MONITOR).pid is None:
            self._start(MONITOR, "ceph-mon", "-i", "a")
        self._wait("no answer", self._listens, MONITOR_SECONDS, MONITOR)
        self._await_store()

    def _await_store(self) -> None:
        self._wait("the store is not up", lambda: " 1 up" in self.ceph("osd", "stat"), STORE_SECONDS, MONITOR, STORE)

    def _listens(self) -> bool:
        """Tell whether the monitor takes connections."""
        with socket.socket() as client:
            client.settimeout(1)
            return client.connect_ex(("127.0.0.1", self._ports()[0])) == 0

    def _wait(self, what: str, condition: Callable[[], bool], seconds: float, *names: str) -> None:
        """Wait until something is so while the processes run."""

        def ended() -> list[str]:
            return [name for name in names if self._process(name).pid is None]

        if wait(lambda: bool(ended()) or condition(), seconds) and not ended():
            return
        said = "".join(f"\n{name}: {last_lines(self._log(name))}" for name in ended() or names)
        why = f"{', '.join(ended())} ended" if ended() else f"not within {seconds:g} s"
        raise LabError(f"ceph: {what}: {why}{said}")

    def _end(self, name: str, how: signal.Signals) -> None:
        process = self._process(name)
        if (pid := process.pid) is not None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, how)
        process.ends(END_SECONDS)

    def _remove(self) -> bool:
        there = self.folder.exists()
        # First, and as it is: without the store, to write the rest would have no end.
        kernel_client.release(self._mapped)
        for name in (STORE, MONITOR):
            self._end(name, signal.SIGKILL)
        if there:
            shutil.rmtree(self.folder)
        return there


def make_keyrings(folder: Path) -> None:
    """Make the keys of a cluster in its folder: the administrator's, the store's, and all of them for the first monitor."""
    everything = [part for service in ("mon", "osd", "mgr") for part in ("--cap", service, "allow *")]
    administrator, store = str(folder / "keyring"), str(folder / STORE / "keyring")
    run(["ceph-authtool", "--create-keyring", administrator, "--gen-key", "-n", "client.admin", *everything])
    may = ["--cap", "mon", "allow profile osd", "--cap", "osd", "allow *"]
    run(["ceph-authtool", "--create-keyring", store, "--gen-key", "-n", "osd.0", *may])
    # What the monitor begins with: its own key, and the others'.
    first = str(folder / "first-keyring")
    run(["ceph-authtool", "--create-keyring", first, "--gen-key", "-n", "mon.", "--cap", "mon", "allow *"])
    for keyring in (administrator, store):
        run(["ceph-authtool", first, "--import-keyring", keyring])


def prepare() -> None:
    """Install what a cluster needs.

    Raises:
        LabError: it cannot be installed.
    """
    install_missing(PACKAGES, ROOT / ".lab/ceph-apt.log")


def _is_free(port: int) -> bool:
    with socket.socket() as listener:
        # As the monitor does: connections of one that has just ended are no reason to avoid its port.
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True


def _progress() -> Progress:
    columns = SpinnerColumn(), TextColumn("ceph: {task.description}"), TimeElapsedColumn()
    return Progress(*columns, console=Console(stderr=True), transient=True)


LAB = Ceph(ROOT / ".lab/ceph")
"""This checkout's cluster, which the functions of this module are about."""
up, down, address, status = LAB.up, LAB.down, LAB.address, LAB.status
