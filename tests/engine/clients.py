"""Docker and containerd on machines of their own, which pull from a registry as clients do."""

import io
import subprocess
import tarfile
import threading
import time
from typing import Any, Self

import grpc

from lab.machines import Machine

PULL_SECONDS = 60


class DockerClient:
    """A Docker daemon on a machine, and its client."""

    def __init__(self, machine: Machine) -> None:
        self._machine = machine
        folder = machine.folder
        self._socket = f"unix://{folder}/docker.sock"
        machine.start_program(
            "dockerd",
            "dockerd",
            *(f"--data-root={folder}/docker", f"--exec-root={folder}/exec", f"--pidfile={folder}/docker.pid"),
            *(f"--host={self._socket}", "--bridge=none", "--iptables=false", "--ip-forward=false"),
            until=["docker", "--host", self._socket, "info"],
        )

    def run(self, *arguments: str, stdin: bytes = b"") -> str:
        """Run the client, and return what it says, or the error that it ends with."""
        options = ["--config", f"{self._machine.folder}/login", "--host", self._socket]
        # No test's timeout ends a thread that waits for a client.
        command = self._machine.box.inside("timeout", str(PULL_SECONDS), "docker", *options, *arguments)
        done = subprocess.run(command, input=stdin, capture_output=True, check=False)
        return (done.stdout if done.returncode == 0 else done.stderr).decode().strip()

    def log_in(self, address: str, username: str, password: str) -> str:
        return self.run("login", "--username", username, "--password-stdin", address, stdin=password.encode())

    def push(self, reference: str) -> str:
        """Push a small image that the daemon makes itself, and forget it."""
        self.run("import", "-", reference, stdin=_archive())
        said = self.run("push", "--quiet", reference)
        self.run("rmi", reference)
        return said

    def pull(self, reference: str) -> str:
        said = self.run("pull", "--quiet", reference)
        self.run("rmi", "--force", reference)
        return said


class ContainerdClient:
    """A containerd on a machine, asked to pull as the kubelet asks it: by the CRI, with its own configuration."""

    # Its number among the machine's own processes is kept, so that it can be ended by it.
    program = "echo $$ >/run/containerd/pid && exec containerd"

    def __init__(self, machine: Machine) -> None:
        self._machine = machine
        machine.start_program("containerd", "sh", "-c", self.program, until=["ctr", "plugins", "ls"])
        self.connect()

    def connect(self) -> None:
        """Connect to the process that runs now."""
        # A socket in the machine's own /run is reached through a process that is there.
        self._channel = grpc.insecure_channel(f"unix:///proc/{self._machine.box.first.child}/root/run/containerd/containerd.sock")

    def pull(self, reference: str, username: str, password: str) -> str:
        """Pull an image, and return its id, or the error."""
        image = _field(1, reference)
        request = _field(1, image) + _field(2, _field(1, username) + _field(2, password))
        # Without functions that read and write messages, both are bytes.
        call: Any = self._channel.unary_unary("/runtime.v1.ImageService/PullImage")
        try:
            answer: bytes = call(request, timeout=PULL_SECONDS, wait_for_ready=True)
        except grpc.RpcError as error:
            return str(error.details())
        remove: Any = self._channel.unary_unary("/runtime.v1.ImageService/RemoveImage")
        remove(_field(1, image), timeout=PULL_SECONDS)
        return answer[2:].decode()


def _field(number: int, value: str | bytes) -> bytes:
    """Return a text or a message as a field of a message: https://protobuf.dev/programming-guides/encoding/

    The fields of https://github.com/kubernetes/cri-api/blob/master/pkg/apis/runtime/v1/api.proto that are used here have
    short values: a length of one or two bytes.
    """
    data = value.encode() if isinstance(value, str) else value
    length = bytes([len(data)]) if len(data) < 128 else bytes([len(data) & 127 | 128, len(data) >> 7])
    return bytes([number << 3 | 2]) + length + data


def _archive() -> bytes:
    """Return an archive of one small file that is another one each time."""
    content = str(time.time_ns()).encode()
    archive = io.BytesIO()
    with tarfile.open(fileobj=archive, mode="w") as tar:
        info = tarfile.TarInfo("file")
        info.size = len(content)
        tar.addfile(info, io.BytesIO(content))
    return archive.getvalue()


class Pulling:
    """A Docker client that pulls all the time, in a thread of its own, and remembers when and how it failed."""

    def __init__(self, client: DockerClient, reference: str) -> None:
        self._client = client
        self._reference = reference
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run)
        self.pulls = 0
        self.failures: list[tuple[float, str]] = []

    def _run(self) -> None:
        while not self._ended.is_set():
            begin = time.monotonic()
            said = self._client.pull(self._reference)
            self.pulls += 1
            if said != self._reference:
                self.failures.append((begin, said))

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()
