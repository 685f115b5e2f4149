"""`make bench`: what the local stack costs over the engine's own floor, and the container over the bare registry.

Medians of several runs, taken in turns so that a noisy machine troubles both sides alike. The ratios count, not the seconds.
"""

import contextlib
import hashlib
import json
import os
import shutil
import ssl
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated

import docker
import httpx
import typer
import yaml
from rich.console import Console
from rich.progress import track
from rich.table import Table

from lab import dockerd
from lab.ports import free_port
from tests.engine.conftest import new_stack
from tests.engine.stack import ROOT, Stack
from toolchain.programs import REGISTRY, build

LAYER_BYTES = 500 << 20
CHUNK = 1 << 20
console = Console()


def seconds(action: Callable[[], object]) -> float:
    start = time.monotonic()
    action()
    return time.monotonic() - start


def empty_program(folder: Path, stack: Stack) -> Callable[..., object]:
    """Make a program without resources on the same engine, and return what runs a Pulumi command on it."""
    (folder / "state").mkdir()
    (folder / "Pulumi.yaml").write_text("name: empty\nruntime: {name: python}\n")
    (folder / "__main__.py").write_text("")
    environment = {**stack.environment, "PULUMI_BACKEND_URL": f"file://{folder}/state"}

    def pulumi(*arguments: str) -> None:
        command = ["pulumi", "--non-interactive", *arguments]
        subprocess.run(command, cwd=folder, env=environment, capture_output=True, check=True)

    pulumi("stack", "init", "empty")
    return pulumi


def _engine(stack: Stack, folder: Path, runs: int) -> Iterator[tuple[str, float, float]]:
    """Yield what was measured, the stack's median in seconds, and the empty program's."""
    empty = empty_program(folder, stack)
    update = "--yes", "--skip-preview"
    measured: dict[str, tuple[list[float], list[float]]] = {
        name: ([], []) for name in ("first up", "preview, nothing to change", "up, nothing to change")
    }
    for _ in track(range(runs), "engine", console=console, transient=True):
        stack.destroy()
        ours, floor = measured["first up"]
        ours.append(seconds(stack.up))
        empty("destroy", *update)
        floor.append(seconds(lambda: empty("up", *update)))
        ours, floor = measured["preview, nothing to change"]
        ours.append(seconds(stack.preview))
        floor.append(seconds(lambda: empty("preview")))
        ours, floor = measured["up, nothing to change"]
        ours.append(seconds(stack.up))
        floor.append(seconds(lambda: empty("up", *update)))
    for name, (ours, floor) in measured.items():
        yield name, statistics.median(ours), statistics.median(floor)


@contextlib.contextmanager
def _bare_registry(folder: Path, stack: Stack) -> Iterator[int]:
    """Run the registry's binary as it is, with the stack's certificate, and yield its port."""
    for file in ("certs/domain.crt", "certs/domain.key"):
        copy = ["docker", "cp", f"{stack.name}-files:/{file}", str(folder / Path(file).name)]
        subprocess.run(copy, env=stack.environment, capture_output=True, check=True)
    port = free_port()
    configuration = yaml.safe_load((ROOT / "image/config.yml").read_text())
    configuration["storage"]["filesystem"]["rootdirectory"] = str(folder / "data")
    configuration["http"].update(addr=f"127.0.0.1:{port}", secret="bench")
    configuration["http"]["tls"].update(certificate=str(folder / "domain.crt"), key=str(folder / "domain.key"))
    configuration["http"]["debug"]["addr"] = f"127.0.0.1:{free_port()}"
    (folder / "config.yml").write_text(yaml.safe_dump(configuration))
    environment = {**os.environ, "OTEL_TRACES_EXPORTER": "none"}
    with subprocess.Popen(
        [str(build(REGISTRY)), "serve", str(folder / "config.yml")],
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    ) as registry:
        try:
            assert registry.stderr is not None
            for line in registry.stderr:
                if "listening on" in line:
                    break
            yield port
        finally:
            registry.terminate()


def _layer(seed: int) -> Iterator[bytes]:
    block = hashlib.sha256(str(seed).encode()).digest() * (CHUNK // 32)
    for _ in range(LAYER_BYTES // CHUNK):
        yield block


def _throughput(client: httpx.Client, seed: int) -> tuple[float, float]:
    """Push a layer and pull it; return MB/s of both."""
    digest = hashlib.sha256()
    for block in _layer(seed):
        digest.update(block)
    location = client.post("/v2/bench/blobs/uploads/").raise_for_status().headers["Location"]
    parameters = httpx.URL(location).params.set("digest", f"sha256:{digest.hexdigest()}")
    headers = {"Content-Length": str(LAYER_BYTES)}

    def push() -> None:
        client.put(location, params=parameters, content=_layer(seed), headers=headers).raise_for_status()

    def pull() -> None:
        with client.stream("GET", f"/v2/bench/blobs/sha256:{digest.hexdigest()}") as answer:
            answer.raise_for_status()
            assert sum(len(block) for block in answer.iter_raw(CHUNK)) == LAYER_BYTES

    pushed, pulled = seconds(push), seconds(pull)
    client.delete(f"/v2/bench/blobs/sha256:{digest.hexdigest()}").raise_for_status()
    return LAYER_BYTES / pushed / 1e6, LAYER_BYTES / pulled / 1e6


def _registry(stack: Stack, folder: Path, runs: int) -> Iterator[tuple[str, float, float]]:
    """Yield what was measured, the container's median in MB/s, and the bare binary's."""
    outputs = stack.outputs()
    with _bare_registry(folder, stack) as port, contextlib.ExitStack() as clients:
        context = ssl.create_default_context(cadata=outputs["authorityCertificate"])
        ours, bare = (
            clients.enter_context(
                httpx.Client(
                    base_url=f"https://{stack.hostname}:{at}",
                    auth=(outputs["username"], outputs["password"]),
                    verify=context,
                    timeout=300,
                    trust_env=False,
                )
            )
            for at in (stack.port, port)
        )
        progress = track(range(runs), "registry", console=console, transient=True)
        rates = [(*_throughput(ours, run), *_throughput(bare, run)) for run in progress]
    medians = [statistics.median(column) for column in zip(*rates, strict=True)]
    yield "push of 500 MiB", medians[0], medians[2]
    yield "pull of 500 MiB", medians[1], medians[3]


def _parts(stack: Stack) -> Iterator[tuple[str, float]]:
    """Yield where the time of an up without changes goes, in seconds: each part by itself."""
    bare = seconds(lambda: subprocess.run([sys.executable, "-c", "pass"], check=True))

    def imported(modules: str) -> float:
        command = [sys.executable, "-c", f"import {modules}"]
        return seconds(lambda: subprocess.run(command, cwd=ROOT, check=True)) - bare

    yield "the CLI alone: pulumi version", seconds(lambda: stack.pulumi("version"))
    yield "Python alone", bare
    core = imported("pulumi")
    yield "import pulumi", core
    yield (
        "import pulumi_tls, pulumi_docker, pulumi_command",
        imported("pulumi, pulumi_tls, pulumi_docker, pulumi_command") - core,
    )
    yield "import settings", imported("settings")


def main(
    runs: Annotated[int, typer.Option(help="Runs of each kind.")] = 5,
    json_file: Annotated[Path | None, typer.Option("--json", help="Also write the figures to this file.")] = None,
) -> None:
    """Measure, and print a table with the ratios."""
    use_lab_docker()
    table = Table("measured", "ours", "floor", "ratio", title="medians in one run")
    figures: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as folder, new_stack(sub_folder(folder, "stack"), docker.from_env()) as stack:
        stack.up()
        for name, ours, floor in _engine(stack, sub_folder(folder, "empty"), runs):
            figures[name] = ours / floor
            table.add_row(name, f"{ours:.2f} s", f"{floor:.2f} s", f"{ours / floor:.2f}")
        for name, ours, floor in _registry(stack, sub_folder(folder, "bare"), runs):
            figures[name] = ours / floor
            table.add_row(name, f"{ours:.0f} MB/s", f"{floor:.0f} MB/s", f"{ours / floor:.2f}")
        parts = Table("where the time goes", "seconds")
        for name, seconds in _parts(stack):
            parts.add_row(name, f"{seconds:.2f}")
        shutil.rmtree(Path(folder) / "bare")
    console.print(table)
    console.print(parts)
    if json_file is not None:
        json_file.write_text(json.dumps(figures, indent=2) + "\n")


def use_lab_docker() -> None:
    host = dockerd.start()
    dockerd.ensure_base_image(host)
    os.environ["DOCKER_HOST"] = host


def sub_folder(folder: str, name: str) -> Path:
    made = Path(folder) / name
    made.mkdir()
    return made


if __name__ == "__main__":
    typer.run(main)
