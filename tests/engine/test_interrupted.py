"""The CLI is killed in the middle; `ops recover` and `pulumi up` converge, and no image is lost."""

import json
import random
import time
from pathlib import Path

import docker
import pytest

from tests.engine.stack import Stack, kill, killed_on_failure

LABEL = "private-registry.stack=private-registry/{}"
RUNS = 20


def _checkpoints(stack: Stack) -> int:
    """How often the engine has written the state: a measure of how far it is that no clock decides."""
    file = stack.folder / f"state/.pulumi/stacks/private-registry/{stack.name}.json"
    try:
        content = json.loads(file.read_text())["checkpoint"]["latest"]
    except (OSError, ValueError):
        return -1
    pending = content.get("pending_operations") or []
    return len(content.get("resources") or []) * 2 + len(pending)


def _kill_after(stack: Stack, verb: str, changes: int) -> None:
    """Run an update, and kill it when the state has changed so many times; it may have ended before."""
    with killed_on_failure(stack.start(verb)) as process:
        seen, before = 0, _checkpoints(stack)
        while process.poll() is None and seen < changes:
            now = _checkpoints(stack)
            if now not in (before, -1):
                seen, before = seen + 1, now
            time.sleep(0.002)  # leaves the core to the update, and still sees nearly every change
        if process.poll() is None:
            kill(process)


def _converges(stack: Stack, daemon: docker.DockerClient, pushed: str) -> None:
    stack.ops("recover")
    stack.up()
    assert stack.preview("--expect-no-changes").returncode == 0
    containers = daemon.containers.list(all=True, filters={"label": LABEL.format(stack.name)})
    assert sorted(container.name for container in containers) == [stack.name, f"{stack.name}-files"]
    assert stack.state()["deployment"].get("pending_operations") in (None, [])
    assert Path("/etc/hosts").read_text().count(f" {stack.hostname} ") == 1
    assert stack.ops("verify").returncode == 0
    assert stack.pull_image() == pushed


@pytest.mark.parametrize("half", [0, 1])
@pytest.mark.timeout(900)
def test_a_killed_up_or_destroy_converges_and_the_images_are_there(half: int, stack: Stack, daemon: docker.DockerClient) -> None:
    choose = random.Random(half)
    stack.up()
    pushed = stack.push_image()
    for run in range(RUNS // 2):
        if run % 2:
            _kill_after(stack, "destroy", choose.randrange(1, 16))
        else:
            stack.destroy()
            _kill_after(stack, "up", choose.randrange(1, 25))
        _converges(stack, daemon, pushed)


@pytest.mark.timeout(600)
def test_a_destroy_after_a_killed_up_leaves_nothing_either(stack: Stack, daemon: docker.DockerClient) -> None:
    for changes in (9, 16, 22):
        _kill_after(stack, "up", changes)
        stack.ops("recover")
        stack.destroy()
        assert daemon.containers.list(all=True, filters={"label": LABEL.format(stack.name)}) == []
        assert not stack.trust_file.exists()
        assert stack.hostname not in Path("/etc/hosts").read_text()


def test_recover_refuses_while_an_update_runs(stack: Stack) -> None:
    locks = stack.folder / f"state/.pulumi/locks/organization/private-registry/{stack.name}"
    with killed_on_failure(stack.start("up")) as process:
        while not list(locks.glob("*.json")):
            assert process.poll() is None, "the update ended before it was seen"
            time.sleep(0.002)
        refused = stack.ops("recover", check=False)
        assert refused.returncode == 1
        assert f"An update of {stack.name} runs: process {process.pid}" in refused.stdout
        assert process.wait() == 0
    assert "Nothing to mend." in stack.ops("recover").stdout


def test_recover_removes_the_container_that_a_cut_off_creation_left(stack: Stack) -> None:
    stack.up()
    file = stack.folder / f"state/.pulumi/stacks/private-registry/{stack.name}.json"
    state = json.loads(file.read_text())
    deployment = state["checkpoint"]["latest"]
    (made,) = [
        entry
        for entry in deployment["resources"]
        if entry.get("inputs", {}).get("name") == stack.name and "image" in entry["inputs"]
    ]
    deployment["resources"].remove(made)
    deployment["pending_operations"] = [{"type": "creating", "resource": {**made, "id": "", "outputs": {}}}]
    file.write_text(json.dumps(state))  # `stack import` would drop what is pending
    said = stack.ops("recover").stdout
    assert "creating Container registry was cut off" in said
    assert f"the container {stack.name} was there, but not in the state: removed" in said
    stack.up()
    assert stack.ops("verify").returncode == 0


def test_recover_leaves_a_stack_of_the_same_name_in_another_checkout_alone(stack: Stack, daemon: docker.DockerClient) -> None:
    label = {"private-registry.stack": f"private-registry/{stack.name}"}
    other = daemon.containers.create("registry:3.1.2", name=f"{stack.name}-other", labels=label)
    stack.up()
    assert "Nothing to mend." in stack.ops("recover").stdout
    assert daemon.containers.get(str(other.id)).status == "created"


def test_recover_removes_attributes_of_the_state_that_were_cut_off_while_they_were_written(stack: Stack) -> None:
    stack.up()
    attributes = stack.folder / f"state/.pulumi/stacks/private-registry/{stack.name}.json.attrs"
    assert attributes.exists()
    attributes.write_text("")
    assert stack.preview(check=False).returncode != 0, "the engine does not mind: what is mended here is no fault"
    assert "was cut off while it was written: removed" in stack.ops("recover").stdout
    assert stack.preview("--expect-no-changes").returncode == 0


@pytest.mark.parametrize("left", ["", '{"version": 3, "checkpoint'])
def test_recover_restores_a_state_that_was_cut_off_while_it_was_written(stack: Stack, left: str) -> None:
    stack.up()
    (stack.folder / f"state/.pulumi/stacks/private-registry/{stack.name}.json").write_text(left)
    assert "its backup has taken its place" in stack.ops("recover").stdout
    stack.up()
    assert stack.preview("--expect-no-changes").returncode == 0
    assert stack.ops("verify").returncode == 0
