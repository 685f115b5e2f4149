"""`ops rollout`: a change walks through the environments of a project, and stops at the first thing that is wrong."""

import contextlib
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import docker
import pexpect
import pytest

from lab.kubernetes import Cluster
from tests.engine.conftest import new_stack
from tests.engine.given_cluster import GivenCluster
from tests.engine.kubernetes_stack import new_kubernetes_stack
from tests.engine.stack import Stack, killed_on_failure, wait_for

ENVIRONMENTS = ("dev", "staging", "prod")
MEGABYTES = (256, 384, 512)
ON_ROLLED_OUT = pytest.mark.xdist_group("rolled_out")  # so that only one of the workers brings them up
SECONDS = 200  # that a command may take to ask, or to end


class Environments:
    """Three stacks of one project; the last one is production."""

    def __init__(self, stacks: dict[str, Stack]) -> None:
        self.stacks = stacks
        self.dev, self.staging, self.prod = stacks.values()
        self.names = [stack.name for stack in stacks.values()]
        self.prod.set("environment", production=True)
        self.prod.set("storage", protect=True)

    def rollout(self, *options: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        """Roll out to all three."""
        self.write()
        return self.dev.ops("rollout", *self.names, *options, check=check)

    def approved(self, *options: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        return self.rollout("--yes-for", self.prod.name, *options, check=check)

    def write(self) -> None:
        for stack in self.stacks.values():
            stack.write()

    def is_up(self, stack: Stack) -> bool:
        return bool(stack.state()["deployment"].get("resources"))


@contextlib.contextmanager
def new_environments(folder: Path, daemon: docker.DockerClient) -> Iterator[Environments]:
    with contextlib.ExitStack() as stacks:
        yield Environments({name: stacks.enter_context(new_stack(folder, daemon)) for name in ENVIRONMENTS})


@pytest.fixture
def environments(tmp_path: Path, daemon: docker.DockerClient) -> Iterator[Environments]:
    with new_environments(tmp_path, daemon) as made:
        yield made


@pytest.fixture(scope="module")
def rolled_out(tmp_path_factory: pytest.TempPathFactory, daemon: docker.DockerClient) -> Iterator[Environments]:
    """Three environments that one command brought up; tests put back what they change."""
    with new_environments(tmp_path_factory.mktemp("environments"), daemon) as made:
        for megabytes, stack in zip(MEGABYTES, made.stacks.values(), strict=True):
            stack.set("container", memoryMiB=megabytes)
        made.approved()
        yield made


@ON_ROLLED_OUT
def test_one_command_rolls_out_to_environments_of_different_ports_and_sizes(
    rolled_out: Environments, daemon: docker.DockerClient
) -> None:
    for megabytes, stack in zip(MEGABYTES, rolled_out.stacks.values(), strict=True):
        assert daemon.containers.get(stack.name).attrs["HostConfig"]["Memory"] == megabytes << 20
        assert stack.push_image() == stack.pull_image()


@ON_ROLLED_OUT
def test_a_second_rollout_changes_nothing_and_verifies_all(rolled_out: Environments, daemon: docker.DockerClient) -> None:
    before = [daemon.containers.get(name).id for name in rolled_out.names]
    said = rolled_out.rollout().stdout
    assert [daemon.containers.get(name).id for name in rolled_out.names] == before
    for name in rolled_out.names:
        assert f"{name}: nothing to change" in said
        assert f"{name}: verifying" in said


def test_a_fault_in_staging_stops_before_production_and_the_same_command_goes_on_after_the_mend(
    environments: Environments,
) -> None:
    dev, staging, prod = environments.stacks.values()
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port, staging.settings["container"]["port"] = staging.port, taken.getsockname()[1]
        stopped = environments.approved(check=False)
    assert stopped.returncode == 1
    assert f"{staging.name}: `pulumi up` failed" in stopped.stdout
    assert "run the same command again" in stopped.stdout
    assert environments.is_up(dev)
    assert not environments.is_up(prod)
    staging.settings["container"]["port"] = port
    said = environments.approved().stdout
    assert f"{dev.name}: nothing to change" in said
    assert f"{prod.name}: create " in said
    assert prod.push_image() == prod.pull_image()


@ON_ROLLED_OUT
def test_production_is_not_changed_where_nobody_can_be_asked(rolled_out: Environments) -> None:
    with changed(rolled_out.prod, "container", memoryMiB=600):
        stopped = rolled_out.rollout(check=False)
    assert stopped.returncode == 10
    assert f"--yes-for {rolled_out.prod.name}" in stopped.stdout
    assert "replace `registry` (docker Container)" in stopped.stdout


@ON_ROLLED_OUT
@pytest.mark.parametrize(("answer", "code", "memory"), [("n\n", 10, MEGABYTES[2]), ("y\n", 0, 640)], ids=["no", "yes"])
def test_production_is_changed_after_a_question_only(
    rolled_out: Environments, daemon: docker.DockerClient, answer: str, code: int, memory: int
) -> None:
    prod = rolled_out.prod
    with changed(prod, "container", memoryMiB=640):
        said, returned = answered(prod, answer, "rollout", prod.name)
    assert returned == code
    assert "needs approval: replace `registry` (docker Container)" in said
    assert daemon.containers.get(prod.name).attrs["HostConfig"]["Memory"] == memory << 20


@ON_ROLLED_OUT
@pytest.mark.parametrize("end", ["\x03", "\x04"], ids=["interrupted", "ended"])
def test_a_question_that_is_not_answered_ends_the_rollout_as_an_interruption_does(rolled_out: Environments, end: str) -> None:
    prod = rolled_out.prod
    with changed(prod, "container", memoryMiB=650):
        said, returned = answered(prod, end, "rollout", prod.name)
    assert returned == 130
    assert "Run the same command again to go on" in said


def test_what_only_decides_the_fate_of_the_data_is_rolled_out_too(stack: Stack) -> None:
    stack.set("storage", onDestroy="delete")
    stack.up()
    stack.set("storage", onDestroy="keep")
    stack.write()
    assert "update `registry-images` (docker Volume): from then on its data are kept" in stack.ops("report").stdout
    stack.ops("rollout", stack.name)
    (volume,) = (one for one in stack.state()["deployment"]["resources"] if one["type"] == "docker:index/volume:Volume")
    assert volume["retainOnDelete"]
    stack.set("storage", onDestroy="delete")
    stack.write()
    assert stack.ops("report", check=False).returncode == 10


def test_what_would_delete_a_volume_is_refused_until_it_is_allowed_by_its_name(
    environments: Environments, daemon: docker.DockerClient
) -> None:
    dev = environments.dev
    dev.set("storage", onDestroy="delete")
    dev.up()
    dev.set("storage", volume=f"{dev.name}-other")
    dev.write()
    assert dev.ops("report", check=False).returncode == 20
    refused = environments.approved(check=False)
    assert refused.returncode == 20
    assert f"deletes the volume `{dev.name}` with all images" in refused.stdout
    assert not environments.is_up(environments.staging)
    assert daemon.volumes.get(dev.name)
    (allow,) = (line.split()[-1] for line in refused.stdout.splitlines() if "--allow-data-loss" in line)
    assert allow == f"{dev.name}/registry-images"
    dev.ops("rollout", dev.name, "--allow-data-loss", allow)
    assert [volume.name for volume in daemon.volumes.list(filters={"name": dev.name})] == [f"{dev.name}-other"]


def test_a_change_that_would_delete_a_volume_of_production_is_refused_by_report_policy_and_rollout(
    stack: Stack, daemon: docker.DockerClient
) -> None:
    stack.set("environment", production=True)
    stack.set("storage", onDestroy="delete")
    stack.up()
    stack.set("storage", volume=f"{stack.name}-other")
    policy = stack.preview("--policy-pack", "policy", check=False)
    assert policy.returncode != 0
    assert "protected-data" in policy.stdout
    report = stack.ops("report", check=False)
    assert report.returncode == 20
    rollout = stack.ops("rollout", stack.name, "--yes-for", stack.name, check=False)
    assert rollout.returncode == 20
    allowed = stack.ops("rollout", stack.name, "--allow-data-loss", f"{stack.name}/registry-images", check=False)
    assert allowed.returncode == 20
    for run in (report, rollout, allowed):
        assert f"deletes the volume `{stack.name}` with all images" in run.stdout
        assert "protected-data" in run.stdout
    assert daemon.volumes.get(stack.name)


def test_stacks_of_one_wave_go_at_once(environments: Environments) -> None:
    dev, staging = environments.dev, environments.staging
    for stack in (dev, staging):
        stack.set("environment", wave=1)
        stack.write()
    said = dev.ops("rollout", dev.name, staging.name).stdout.splitlines()
    last_begin = max(said.index(f"{stack.name}: bringing up") for stack in (dev, staging))
    first_end = min(said.index(f"{stack.name}: verifying") for stack in (dev, staging))
    assert last_begin < first_end


@pytest.mark.xdist_group("kubernetes")
def test_a_rollout_walks_from_a_docker_host_to_a_cluster(
    tmp_path: Path, daemon: docker.DockerClient, cluster: Cluster | GivenCluster, hub: str
) -> None:
    with new_stack(tmp_path, daemon) as dev, new_kubernetes_stack(tmp_path, cluster, hub) as prod:
        prod.set("environment", production=True)
        prod.set("storage", protect=True)
        dev.write()
        prod.write()
        prod.ops("rollout", dev.name, prod.name, "--yes-for", prod.name)
        for stack in (dev, prod):
            assert "push" in stack.ops("verify").stdout


def test_an_interrupted_rollout_begins_nothing_more_and_goes_on_when_run_again(environments: Environments) -> None:
    dev, staging = environments.dev, environments.staging
    environments.write()
    command = [sys.executable, "-m", "ops", "rollout", dev.name, staging.name]
    with killed_on_failure(
        subprocess.Popen(command, cwd=dev.folder, env=dev.environment, stdout=subprocess.PIPE, text=True)
    ) as running:
        assert running.stdout is not None
        for line in running.stdout:
            if line == f"{dev.name}: bringing up\n":
                wait_for(lambda: environments.is_up(dev))
                running.send_signal(signal.SIGTERM)
                break
        said = running.stdout.read()
    assert running.returncode == 130
    assert "run the same command again" in said.lower()
    assert not environments.is_up(staging)
    dev.ops("recover")  # a provider may have given up what it had begun
    dev.ops("rollout", dev.name, staging.name)
    assert environments.is_up(staging)


def test_faults_of_all_stacks_are_told_before_anything_changes(environments: Environments) -> None:
    environments.staging.set("container", port=0)
    environments.prod.set("container", memoryMiB=1)
    refused = environments.approved(check=False)
    assert refused.returncode == 1
    assert "container.port is 0" in refused.stdout
    assert "container.memoryMiB is 1" in refused.stdout
    assert not environments.is_up(environments.dev)


@contextlib.contextmanager
def changed(stack: Stack, section: str, **values: Any) -> Iterator[None]:
    """Let a stack say something else for a while, and bring back what it said."""
    kept = stack.settings
    stack.settings = {**kept}
    stack.set(section, **values)
    stack.write()
    try:
        yield
    finally:
        stack.settings = kept
        stack.write()


def answered(stack: Stack, answer: str, *command: str) -> tuple[str, int]:
    """Run a command of `ops` on a terminal of its own, and give one answer to its question; return what it said, and its code."""
    running = pexpect.spawn(
        sys.executable,
        ["-m", "ops", *command],
        cwd=stack.folder,
        env={**stack.environment, "TERM": "dumb"},
        encoding="utf-8",
        dimensions=(24, 200),
        timeout=SECONDS,
        preexec_fn=_heed_interrupts,
    )
    try:
        running.expect_exact("[y/N]")
        said = running.before or ""
        running.send(answer)
        running.expect(pexpect.EOF)
        return said + (running.before or ""), running.wait()
    finally:
        running.close(force=True)


def _heed_interrupts() -> None:
    """Let Ctrl-C be what it is on a terminal: a shell lets what it runs in the background ignore it, and all children of that."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
