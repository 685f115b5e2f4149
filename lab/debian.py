"""Debian packages that the lab's servers come from."""

import fcntl
import os
import shutil
import subprocess
import tempfile
from collections.abc import Mapping
from pathlib import Path

# Some of the programs are where only root's PATH looks.
PATH = os.pathsep.join((*os.get_exec_path(), "/usr/sbin", "/sbin"))


class LabError(Exception):
    """A server could not be had; the text says why and what to do."""


def can_install() -> bool:
    """Tell whether this is root on Debian, for whom packages are installed without asking."""
    return os.geteuid() == 0 and shutil.which("apt-get") is not None


def install_missing(packages: Mapping[str, str], log: Path) -> None:
    """Install what is missing of programs, given with the package that has each, with apt-get's output in the log.

    Raises:
        LabError: apt-get failed.
    """
    if missing := {package for program, package in packages.items() if shutil.which(program, path=PATH) is None}:
        install(tuple(sorted(missing)), log)


def install(packages: tuple[str, ...], log: Path) -> None:
    """Install the packages, with apt-get's output in the log.

    Raises:
        LabError: apt-get failed.
    """
    environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    log.parent.mkdir(parents=True, exist_ok=True)
    # Several tests may come here at once, and a second apt-get does not wait for the first.
    with log.open("w") as output, (Path(tempfile.gettempdir()) / "private-registry-apt.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        for command in (["update"], ["install", "--yes", "--no-install-recommends", *packages]):
            run = subprocess.run(["apt-get", "-q", *command], env=environment, stdout=output, stderr=output, check=False)
            if run.returncode:
                raise LabError(f"apt-get {command[0]} failed: see {log}")
