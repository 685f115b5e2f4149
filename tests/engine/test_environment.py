"""An environment that `ops environment new` made goes up, serves, and goes down."""

import docker
import pytest
import yaml

from tests.engine.stack import Stack


def test_a_new_environment_on_docker_goes_up_is_verified_and_goes_down(stack: Stack, daemon: docker.DockerClient) -> None:
    stack.pulumi("stack", "rm", "--yes", stack.name)
    assert not stack.file.exists()
    answers = {
        "hostname": stack.hostname,
        "container.port": stack.port,
        "image.repository": f"test/{stack.name}",
        "trust.docker": "true",
        "trust.hostsFile": "true",
    }
    stack.ops("environment", "new", stack.name, "--yes", *[f"--set={path}={value}" for path, value in answers.items()])
    written = stack.file.read_text()
    stack.pulumi("stack", "init", stack.name)
    assert stack.file.read_text().startswith(written), "the engine keeps the file as it was written"
    assert yaml.safe_load(stack.file.read_text())["encryptionsalt"]

    stack.pulumi("up", "--yes", "--skip-preview", "--stack", stack.name)
    assert "✓ docker" in stack.ops("verify", "--docker").stdout
    name = f"registry-{stack.name}"
    assert daemon.containers.get(name).status == "running"

    stack.pulumi("destroy", "--yes", "--skip-preview", "--stack", stack.name)
    with pytest.raises(docker.errors.NotFound):
        daemon.containers.get(name)
    assert daemon.volumes.get(name), "the images outlive the stack"
