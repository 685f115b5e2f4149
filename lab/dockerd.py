"""A Docker daemon: the one that answers, else one of the project's own under `.lab/docker`, for root on Debian."""

import json
import os
import select
import shutil
import signal
import subprocess
import tempfile
import time
from pathlib import Path

import docker
import docker.errors

from lab.debian import LabError, can_install, install
from toolchain.programs import REGISTRY, ROOT, build

DEFAULT_HOST = "unix:///var/run/docker.sock"
FOLDER = ROOT / ".lab/docker"
SOCKET = FOLDER / "docker.sock"
ENVIRONMENT = ROOT / ".lab/env"
LONGEST_SOCKET_PATH = 107  # bytes, unix(7)
BASE_IMAGE = "registry:3.1.2"
PACKAGES = ("docker.io", "iptables", "busybox-static")
START_SECONDS = 60
STOP_SECONDS = 60


def _answers(host: str) -> bool:
    try:
        client = docker.DockerClient(base_url=host, timeout=5)
        try:
            return bool(client.ping())
        finally:
            client.close()
    except (docker.errors.DockerException, OSError):
        return False


def address() -> str | None:
    """Return the address of the daemon that answers: the user's own first, then the lab's."""
    for host in (os.environ.get("DOCKER_HOST") or DEFAULT_HOST, f"unix://{SOCKET}"):
        if _answers(host):
            return host
    return None


def running_pid() -> int | None:
    """Return the process of the lab's own daemon, or None where it does not run."""
    try:
        pid = int((FOLDER / "docker.pid").read_text())
        name = Path(f"/proc/{pid}/comm").read_text().strip()
    except (OSError, ValueError):
        return None
    return pid if name == "dockerd" else None


def _install() -> None:
    if not can_install():
        raise LabError(
            "No Docker daemon answers. Start Docker, or set DOCKER_HOST to a daemon that you may use; "
            "the project starts one of its own only for root on Debian."
        )
    install(PACKAGES, FOLDER / "apt.log")


def start() -> str:
    """Return the address of a daemon, started if none answers.

    Raises:
        LabError: none answers and none can be started.
    """
    host = address() or _start_own()
    if host == f"unix://{SOCKET}":
        ENVIRONMENT.write_text(f'export DOCKER_HOST="${{DOCKER_HOST:-{host}}}"\n')
    else:
        ENVIRONMENT.unlink(missing_ok=True)
    return host


def _start_own() -> str:
    if len(os.fsencode(SOCKET)) > LONGEST_SOCKET_PATH:
        raise LabError(f"{SOCKET} is too long for a socket: move the checkout to a shorter path.")
    FOLDER.mkdir(parents=True, exist_ok=True)
    if shutil.which("dockerd") is None:
        _install()
        if _answers(DEFAULT_HOST):  # where there is systemd, the package has started it
            return DEFAULT_HOST
    with (FOLDER / "log").open("w") as log:
        daemon = subprocess.Popen(
            [
                "dockerd",
                f"--data-root={FOLDER / 'data'}",
                f"--exec-root={FOLDER / 'exec'}",
                f"--pidfile={FOLDER / 'docker.pid'}",
                f"--host=unix://{SOCKET}",
            ],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
    deadline = time.monotonic() + START_SECONDS
    while not _answers(f"unix://{SOCKET}"):
        if daemon.poll() is not None or time.monotonic() > deadline:
            last = (FOLDER / "log").read_text().splitlines()[-3:]
            raise LabError("dockerd did not start:\n" + "\n".join(last))
        time.sleep(0.1)
    return f"unix://{SOCKET}"


def stop() -> bool:
    """End the lab's own daemon, and return whether one ran. Its images and volumes stay."""
    ENVIRONMENT.unlink(missing_ok=True)
    if (pid := running_pid()) is None:
        return False
    process = os.pidfd_open(pid)
    try:
        signal.pidfd_send_signal(process, signal.SIGTERM)
        if not select.select([process], [], [], STOP_SECONDS)[0]:
            raise LabError(f"dockerd, process {pid}, did not end within {STOP_SECONDS} s: see {FOLDER / 'log'}")
    finally:
        os.close(process)
    return True


def ensure_base_image(host: str) -> str:
    """Make sure that the daemon has the registry's base image; return in words where it came from."""
    client = docker.DockerClient(base_url=host, timeout=600)
    try:
        client.images.get(BASE_IMAGE)
    except docker.errors.ImageNotFound:
        pass
    else:
        return "there already"
    try:
        client.images.pull(BASE_IMAGE)
    except docker.errors.APIError:
        pass
    else:
        return "pulled"
    registry = build(REGISTRY)
    if shutil.which("busybox") is None:
        _install()
    busybox = shutil.which("busybox")
    if busybox is None:
        raise LabError("There is no busybox for the base image: install the package busybox-static.")
    with tempfile.TemporaryDirectory() as context:
        for program in (str(registry), busybox, str(ROOT / "lab/base-image/Dockerfile")):
            shutil.copy(program, context)
        for step in client.api.build(path=context, tag=BASE_IMAGE, rm=True):
            for line in step.splitlines():
                if "error" in (said := json.loads(line)):
                    raise LabError(f"{BASE_IMAGE} could not be built: {said['error']}")
    return "built from its Go module"
