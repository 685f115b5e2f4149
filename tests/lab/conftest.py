"""Virtual nodes with the kernel's RBD client and a real Ceph; what was measured is printed as one table at the end."""

import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from rich.console import Console
from rich.table import Table

from lab import dockerd
from lab.nodes import NodeLab
from tests.lab.registry import LabRegistry, Report

REPORT: list[Report] = []


@pytest.fixture(scope="session", autouse=True)
def docker_host() -> str:
    host = dockerd.start()
    dockerd.ensure_base_image(host)
    return host


@pytest.fixture(scope="session")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[NodeLab]:
    made = NodeLab(tmp_path_factory.mktemp("nodes") / "lab")
    begin = time.monotonic()
    try:
        made.up()
        REPORT.append(Report("both nodes Ready", time.monotonic() - begin))
        yield made
    finally:
        made.down()


@pytest.fixture
def report() -> list[Report]:
    return REPORT


@pytest.fixture
def registry(tmp_path: Path, lab: NodeLab, docker_host: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[LabRegistry]:
    """A registry's stack on an image of its own, not yet up; both nodes are there when it ends."""
    monkeypatch.setenv("DOCKER_HOST", docker_host)
    made = LabRegistry(tmp_path, lab)
    try:
        yield made
    finally:
        made.remove()


def pytest_terminal_summary() -> None:
    table = Table("what", "measured", "aim", "verdict", title="Registry on RBD, by nodes with the kernel's client")
    for row in REPORT:
        table.add_row(row.what, row.measured, row.aimed, row.verdict)
    if REPORT:
        Console(width=130).print(table)
