"""`python -m bench.rollout`: what it costs to roll out to ten environments at once, over rolling out to one."""

import contextlib
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Annotated

import docker
import psutil
import typer
from rich.console import Console
from rich.table import Table

from bench.__main__ import sub_folder, use_lab_docker
from tests.engine.conftest import new_stack
from tests.engine.stack import Stack

ENVIRONMENTS = (1, 10)
SAMPLE_SECONDS = 3
console = Console()


def _rolled_out(stacks: list[Stack]) -> tuple[float, int]:
    """Roll out, and return the seconds and the most memory in bytes that all its processes had at a time.

    What they share is counted once (the kernel's proportional set size).
    """
    for stack in stacks:
        stack.write()
    command = [sys.executable, "-m", "ops", "rollout", *(stack.name for stack in stacks)]
    begin, most = time.monotonic(), 0
    with subprocess.Popen(command, cwd=stacks[0].folder, env=stacks[0].environment, stdout=subprocess.PIPE) as running:
        top = psutil.Process(running.pid)
        while running.poll() is None:
            with contextlib.suppress(psutil.Error):
                most = max(most, sum(_bytes(process) for process in [top, *top.children(recursive=True)]))
            with contextlib.suppress(subprocess.TimeoutExpired):
                running.wait(SAMPLE_SECONDS)
        took = time.monotonic() - begin
    assert running.returncode == 0
    return took, most


def _bytes(process: psutil.Process) -> int:
    try:
        return int(process.memory_full_info().pss)
    except psutil.Error:  # it has ended
        return 0


def _measure(folder: Path, count: int) -> dict[str, tuple[float, int]]:
    with contextlib.ExitStack() as ending:
        stacks = [ending.enter_context(new_stack(folder, docker.from_env())) for _ in range(count)]
        for stack in stacks:
            stack.set("environment", wave=1)
        measured = {"first": _rolled_out(stacks), "nothing": _rolled_out(stacks)}
        for stack in stacks:
            stack.set("container", memoryMiB=512)
        return {**measured, "change": _rolled_out(stacks)}


def main(runs: Annotated[int, typer.Option(help="Runs of each kind.")] = 3) -> None:
    """Measure, and print a table with the ratios."""
    use_lab_docker()
    table = Table("rollout", "1", "10 at once", "ratio", "1", "10 at once", "ratio", title="medians: seconds, then memory in MiB")
    found: dict[int, list[dict[str, tuple[float, int]]]] = {count: [] for count in ENVIRONMENTS}
    with tempfile.TemporaryDirectory() as folder:
        for run in range(runs):
            for count in ENVIRONMENTS:
                found[count].append(_measure(sub_folder(folder, f"{run}-{count}"), count))
    for kind in ("first", "nothing", "change"):
        cells = []
        for index, unit in ((0, 1), (1, 1 << 20)):
            one, ten = (statistics.median(measured[kind][index] for measured in found[count]) / unit for count in ENVIRONMENTS)
            cells += [f"{one:.1f}", f"{ten:.1f}", f"{ten / one:.1f}"]
        table.add_row(kind, *cells)
    console.print(table)


if __name__ == "__main__":
    typer.run(main)
