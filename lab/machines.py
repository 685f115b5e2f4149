"""Machines for tests: boxes with files of their own where Docker and containerd look, each reached over SSH.

A bridge in a box of its own, where no rules of this machine's filter apply, joins them with this machine. They reach each
other and whatever listens here, and nothing beyond.
"""

import contextlib
import hashlib
import os
import subprocess
from pathlib import Path
from typing import Self

from lab.boxes import ENVIRONMENT, Box, free_network, run
from lab.debian import LabError, install_missing
from lab.sshd import SshServer
from toolchain.programs import ROOT

PACKAGES = {
    "ip": "iproute2",
    "sudo": "sudo",
    "curl": "curl",
    "openssl": "openssl",
    "docker": "docker.io",
    "containerd": "containerd",
}
START_SECONDS = 60
USER, USER_ID = "operator", 4711
"""An ordinary user on every machine, who may become root without a password where there is sudo."""
# Its own, beyond what a box has: what tests change, and what containerd keeps at a fixed place.
_FILES = """
set -e
for folder in /etc/docker /etc/containerd /etc/sudoers.d; do
  mkdir -p $folder
  mount -t tmpfs -o mode=755 machine $folder
done
mkdir -p /var/lib/containerd "$1/containerd"
mount --bind "$1/containerd" /var/lib/containerd
for file in passwd shadow; do
  mount --bind "$1/$file" /etc/$file
done
echo "$2 ALL=(ALL) NOPASSWD: ALL" >/etc/sudoers.d/machine
"""


class Network:
    """A bridge on this machine, and the machines at it; to be closed, or used as a context manager."""

    def __init__(self, folder: Path) -> None:
        """Make it; it is named after the folder, which is for keys, logs and what the machines keep.

        Raises:
            LabError: the kernel refuses it.
        """
        install_missing(PACKAGES, ROOT / ".lab/machines-apt.log")
        self.folder = folder
        name = hashlib.sha256(os.fsencode(folder)).hexdigest()[:8]
        self.link = f"lab-{name}"
        self._network = free_network(int(name, 16))
        self.address = f"{self._network}.0.1"
        """This machine's address at the bridge."""
        self.machines: list[Machine] = []
        self._hub = Box("hub", f"{self._network}.0.2", folder / "hub")
        try:
            self._hub.open()
            run(self._hub.inside("ip", "link", "add", "machines", "type", "bridge"))
            run(self._hub.inside("ip", "link", "set", "machines", "up"))
            run(["ip", "link", "add", self.link, "type", "veth", "peer", "name", "host", "netns", str(self._hub.first.child)])
            run(self._hub.inside("ip", "link", "set", "host", "master", "machines", "up"))
            run(["ip", "address", "add", f"{self.address}/24", "dev", self.link])
            run(["ip", "link", "set", self.link, "up"])
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def add(self) -> "Machine":
        """Return a new machine, whose SSH server answers. All machines let in the same client key."""
        number = len(self.machines) + 10
        machine = Machine(Box(f"machine{number}", f"{self._network}.0.{number}", self.folder / f"{number}"))
        self.machines.append(machine)
        machine.start(self)
        return machine

    def join(self, box: Box) -> None:
        """Link a box to the bridge."""
        enter = ["nsenter", "--target", str(self._hub.first.child), "--net", "ip"]
        run([*enter, "link", "add", box.name, "type", "veth", "peer", "name", "eth0", "netns", str(box.first.child)])
        run(self._hub.inside("ip", "link", "set", box.name, "master", "machines", "up"))
        run(box.inside("ip", "address", "add", f"{box.address}/24", "dev", "eth0"))
        run(box.inside("ip", "link", "set", "eth0", "up"))

    def close(self) -> None:
        """End all machines, and remove the bridge."""
        for machine in self.machines:
            machine.close()
        with contextlib.suppress(LabError):
            run(["ip", "link", "delete", self.link])
        self._hub.close()


class Machine:
    """A machine: its files, its programs, and the SSH server by which it is reached."""

    ssh: SshServer

    def __init__(self, box: Box) -> None:
        self.box = box
        self.address = box.address
        self.folder = box.folder

    def start(self, network: Network) -> None:
        """Start it at a network.

        Raises:
            LabError: the kernel refuses it, or its SSH server does not answer.
        """
        self.box.open()
        network.join(self.box)
        for file, user in (
            ("passwd", f"{USER}:x:{USER_ID}:{USER_ID}::/:/bin/sh\n"),
            ("shadow", f"{USER}:*:19000:0:99999:7:::\n"),
        ):
            (self.folder / file).write_text(Path("/etc", file).read_text() + user)
        self.run("sh", "-c", _FILES, "sh", str(self.folder), USER)
        self.ssh = SshServer(network.folder, address=self.address, port=22, inside=self.box.inside())

    def close(self) -> None:
        """End it with everything in it."""
        self.box.close()

    def run(self, *command: str, stdin: str = "") -> str:
        """Run a command in it, and return its output.

        Raises:
            LabError: it failed.
        """
        done = self.attempt(*command, stdin=stdin)
        if done.returncode:
            raise LabError(f"{' '.join(command)}: {done.stderr.strip() or done.returncode}")
        return done.stdout

    def attempt(self, *command: str, stdin: str = "") -> subprocess.CompletedProcess[str]:
        """Run a command in it, and return how it ended."""
        inside = self.box.inside(*command)
        return subprocess.run(inside, env=ENVIRONMENT, input=stdin, capture_output=True, text=True, check=False)

    def answers(self, *command: str) -> bool:
        """Tell whether a command succeeds in it."""
        return self.attempt(*command).returncode == 0

    def start_program(self, name: str, *command: str, until: list[str]) -> None:
        """Start a program in it, and wait until a command succeeds.

        Raises:
            LabError: the program ends, or the command does not succeed in time.
        """
        self.box.start(name, *command)
        self.box.wait("no answer", lambda: self.answers(*until), START_SECONDS, name)
