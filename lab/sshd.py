"""An SSH server as a machine has one, for tests: OpenSSH's own, with keys of its own, for the user who runs it."""

import contextlib
import getpass
import os
import select
import shutil
import signal
import socket
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Self

from lab.boxes import ENVIRONMENT, last_lines, wait
from lab.debian import LabError, can_install, install_missing
from lab.ports import free_port

START_SECONDS = 20
END_SECONDS = 10


class SshServer:
    """A server that runs; to be closed, or used as a context manager.

    Servers of one folder let in the same client key.
    """

    def __init__(
        self,
        folder: Path,
        *,
        address: str = "127.0.0.1",
        port: int | None = None,
        environment: Mapping[str, str] | None = None,
        inside: Sequence[str] = (),
    ) -> None:
        """Start it, and wait until it answers.

        Args:
            folder: for keys and the log.
            port: a free one unless given.
            environment: variables that commands find, over those of sshd, such as PATH. HOME is the folder unless given.
            inside: the start of a command line that runs a program in another network, such as that of a box.

        Raises:
            LabError: it cannot be installed, or does not answer in time.
        """
        self.address = address
        self.port = port or free_port(address)
        self._name = f"sshd-{address}-{self.port}"
        self._folder = folder
        program = _program(folder)
        self._client = _key(folder / "client")
        host_key = _key(folder / self._name)
        self.private_key = self._client.read_text()
        self.host_key = _public(host_key)
        # `-f /dev/null`: nothing of the machine's own configuration. Of several directives SetEnv only the first counts.
        options = [
            f"HostKey={host_key}",
            # By a command, as the file is not to be read by every user who logs in.
            f"AuthorizedKeysCommand=/bin/cat {self._client}.pub",
            f"AuthorizedKeysCommandUser={getpass.getuser()}",
            "AuthorizedKeysFile=none",
            f"ListenAddress={address}",
            f"Port={self.port}",
            "AuthenticationMethods=publickey",
            "StrictModes=no",
            "UsePAM=no",
            "PidFile=none",
            "LogLevel=INFO",
        ]
        # A shell that sshd starts reads the user's .bashrc, which may set another PATH: it is not to find one.
        variables = {"HOME": str(folder), **(environment or {})}
        options.append("SetEnv=" + " ".join(_quoted(f"{name}={value}") for name, value in variables.items()))
        # sshd wants this folder, and to be called by its full path.
        command = [*inside, "sh", "-c", 'mkdir -p /run/sshd && exec "$@"', "sh", program, "-D", "-e", "-f", "/dev/null"]
        with self.log.open("w") as log:
            self._process = subprocess.Popen(
                [*command, *(f"-o{option}" for option in options)],
                env=ENVIRONMENT,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        started = wait(lambda: self._answers() or self._process.poll() is not None, START_SECONDS)
        if not started or self._process.poll() is not None:
            self.close()
            raise LabError(f"sshd on {address}:{self.port} does not answer: {last_lines(self.log)}")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def log(self) -> Path:
        """Return the file with what the server says."""
        return self._folder / f"{self._name}.log"

    @property
    def settings(self) -> dict[str, Any]:
        """Return what a client has to know, but for its private key."""
        return {"address": self.address, "port": self.port, "hostKey": self.host_key, "user": getpass.getuser()}

    @property
    def logins(self) -> int:
        """Return how many times somebody has logged in so far."""
        return self.log.read_text(errors="replace").count("Accepted publickey")

    def close(self) -> None:
        """End it with its sessions and the commands in them.

        Raises:
            LabError: one of its processes does not end.
        """
        handles = _stopped(self._process.pid)
        for handle in handles:
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(handle, signal.SIGKILL)
        remaining = [handle for handle in handles if not select.select([handle], [], [], END_SECONDS)[0]]
        for handle in handles:
            os.close(handle)
        if remaining:
            raise LabError(f"sshd on {self.address}:{self.port} does not end")
        self._process.wait()

    def _answers(self) -> bool:
        try:
            with socket.create_connection((self.address, self.port), timeout=1):
                return True
        except OSError:
            return False


def _program(folder: Path) -> str:
    """Return the path of sshd, which is installed where it is missing.

    Raises:
        LabError: it is missing, and cannot be installed.
    """
    if shutil.which("sshd", path=ENVIRONMENT["PATH"]) is None:
        if not can_install():
            raise LabError("there is no sshd: install your system's package of the OpenSSH server")
        install_missing({"sshd": "openssh-server"}, folder / "apt.log")
    if (found := shutil.which("sshd", path=ENVIRONMENT["PATH"])) is None:
        raise LabError("there is no sshd, although openssh-server was installed")
    return found


def _key(file: Path) -> Path:
    """Return a private key's file, made where it is missing, with the public one beside it."""
    if not file.exists():
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", "", "-f", str(file)], check=True)
    return file


def _public(key: Path) -> str:
    """Return the type and the key, without the comment."""
    return " ".join(Path(f"{key}.pub").read_text().split()[:2])


def _quoted(word: str) -> str:
    """Return a word for sshd's configuration, in which it may have blanks."""
    escaped = word.replace("\\", "\\\\").replace('"', '\\"')
    return f'"{escaped}"'


def _stopped(pid: int) -> list[int]:
    """Stop a process and all that come from it, and return handles of them.

    A process is stopped before its children are looked for, so that it cannot start more.
    """
    try:
        handle = os.pidfd_open(pid)
        signal.pidfd_send_signal(handle, signal.SIGSTOP)
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    except OSError:  # it has ended
        return []
    return [handle, *(found for child in children for found in _stopped(int(child)))]
