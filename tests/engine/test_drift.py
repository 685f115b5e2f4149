"""`ops drift`: what differs from a stack is told, and nothing is changed by the telling."""

import io
import tarfile
from collections.abc import Iterator
from pathlib import Path

import docker
import pytest

from tests.engine.kubernetes_stack import Hub, KubernetesStack
from tests.engine.stack import Stack


def files_of_state(stack: Stack) -> dict[Path, bytes]:
    return {file: file.read_bytes() for file in (stack.folder / "state").rglob("*.json")}


def drift(stack: Stack, code: int) -> str:
    """Look for drift, and return what is told."""
    stack.write()
    before = files_of_state(stack)
    run = stack.ops("drift", stack.name, check=False)
    assert run.returncode == code, run.stdout + run.stderr
    assert files_of_state(stack) == before
    return run.stdout


def test_a_stack_as_it_was_brought_up_is_clean(running: Stack) -> None:
    said = drift(running, 0)
    assert f"{running.name}: clean" in said
    assert "signed by the stack's authority, valid until" in said
    assert "space: " in said


def test_a_container_that_is_gone_is_drift(stack: Stack, daemon: docker.DockerClient) -> None:
    stack.up()
    daemon.containers.get(stack.name).stop()
    said = drift(stack, 10)
    assert f"Nothing listens on {stack.address}" in said
    assert "\n\n" not in said
    daemon.containers.get(stack.name).remove()
    said = drift(stack, 10)
    assert "registry (docker Container) is gone" in said
    assert not daemon.containers.list(all=True, filters={"name": f"^{stack.name}$"})


def test_a_container_that_was_changed_is_drift_until_the_stack_is_brought_up(stack: Stack, daemon: docker.DockerClient) -> None:
    stack.up()
    daemon.containers.get(stack.name).update(mem_limit="300m", memswap_limit="300m")
    assert "registry (docker Container) was changed: memory" in drift(stack, 10)
    stack.up("--refresh")
    assert "clean" in drift(stack, 0)


def test_a_change_that_was_not_rolled_out_is_told_as_such(running: Stack) -> None:
    kept = running.settings
    running.settings = {**kept, "container": {**kept["container"], "memoryMiB": 512}}
    try:
        said = drift(running, 10)
    finally:
        running.settings = kept
    assert "not rolled out: replace registry (docker Container)" in said


def test_a_certificate_with_few_days_left_is_drift(stack: Stack) -> None:
    stack.set("certificate", validityDays=20, renewBeforeDays=5)
    stack.up()
    assert "trust: warning: valid until" in drift(stack, 10)


def test_a_stack_that_is_not_up_is_a_failure(stack: Stack) -> None:
    assert f"The stack {stack.name} has no outputs: it is not up." in drift(stack, 1)


def test_an_image_whose_base_has_moved_on_is_drift(stack: Stack, daemon: docker.DockerClient, plain_registry: str) -> None:
    base = f"{plain_registry}/base"
    daemon.images.get("registry:3.1.2").tag(base, "1")
    daemon.images.push(base, "1")
    stack.set("image", base=f"{base}:1")
    stack.up()
    assert f"base: built on the current {base}:1" in drift(stack, 0)
    daemon.api.import_image_from_data(an_archive(), repository=base, tag="1")
    daemon.images.push(base, "1")
    assert f"the image is behind {base}:1" in drift(stack, 10)


@pytest.mark.xdist_group("kubernetes")
def test_a_scaled_controller_and_a_service_that_is_gone_are_drift(in_cluster: KubernetesStack) -> None:
    in_cluster.up()
    assert "clean" in drift(in_cluster, 0)
    patch = {"Content-Type": "application/merge-patch+json"}
    controller = f"{in_cluster.namespace}/replicationcontrollers/registry"
    in_cluster.api.patch(controller, json={"spec": {"replicas": 0}}, headers=patch).raise_for_status()
    in_cluster.api.delete(f"{in_cluster.namespace}/services/registry").raise_for_status()
    said = drift(in_cluster, 10)
    assert "registry (kubernetes ReplicationController) was changed: spec.replicas" in said
    assert "registry-service (kubernetes Service) is gone" in said
    assert in_cluster.get("replicationcontrollers/registry")["spec"]["replicas"] == 0


@pytest.fixture
def plain_registry(daemon: docker.DockerClient) -> Iterator[str]:
    made = Hub(daemon)
    yield made.address
    made.close()


def an_archive() -> bytes:
    """A filesystem of one file, as an image is imported."""
    archive = io.BytesIO()
    with tarfile.open(fileobj=archive, mode="w") as tar:
        tar.addfile(tarfile.TarInfo("file"))
    return archive.getvalue()
