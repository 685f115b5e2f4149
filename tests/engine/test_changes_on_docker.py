"""What a change to a stack does to a running registry on one Docker host."""

import json

import docker

from tests.engine.stack import Stack


def test_the_stacks_own_users_replace_admin_and_a_changed_password_replaces_the_container_only(stack: Stack) -> None:
    stack.set_secret("users.alice", "correct horse")
    stack.set_secret("users.bob", "battery staple")
    stack.up()
    with stack.client(anonymous=True) as client:
        assert client.get("/v2/", auth=("alice", "correct horse")).status_code == 200
        assert client.get("/v2/", auth=("bob", "battery staple")).status_code == 200
        assert client.get("/v2/", auth=("admin", "correct horse")).status_code == 401
    stack.set_secret("users.bob", "another staple")
    assert set(stack.steps()) == {"registry", "registry-files"}
    stack.up()
    with stack.client(anonymous=True) as client:
        assert client.get("/v2/", auth=("bob", "battery staple")).status_code == 401
        assert client.get("/v2/", auth=("bob", "another staple")).status_code == 200
        assert client.get("/v2/", auth=("alice", "correct horse")).status_code == 200
    assert stack.preview("--expect-no-changes").returncode == 0


def test_anonymous_access_is_open_and_says_so(stack: Stack) -> None:
    stack.set("access", anonymous=True)
    stack.up()
    with stack.client(anonymous=True) as client:
        assert client.get("/v2/_catalog").json() == {"repositories": []}
    assert "not needed: access is anonymous" in stack.ops("verify").stdout
    assert stack.outputs().get("password") is None


def test_a_self_signed_certificate_is_its_own_authority(stack: Stack) -> None:
    stack.set("certificate", mode="self-signed")
    stack.up()
    assert "signed by the stack's authority" in stack.ops("verify", "--docker").stdout
    assert stack.preview("--expect-no-changes").returncode == 0


def test_another_port_moves_the_registry_and_its_trust(stack: Stack) -> None:
    stack.up()
    pushed = stack.push_image()
    before = stack.trust_file
    stack.port += 1 if stack.port < 65000 else -1
    stack.set("container", port=stack.port)
    assert set(stack.steps()) == {"registry", "trust"}
    stack.up()
    assert not before.exists()
    assert stack.trust_file.exists()
    assert stack.pull_image() == pushed


def test_a_limit_of_memory_holds_and_goes_again(stack: Stack, daemon: docker.DockerClient) -> None:
    stack.set("container", memoryMiB=256)
    stack.up()
    assert daemon.containers.get(stack.name).attrs["HostConfig"]["Memory"] == 256 << 20
    del stack.settings["container"]["memoryMiB"]
    stack.up()
    assert daemon.containers.get(stack.name).attrs["HostConfig"]["Memory"] == 0


def test_a_certificate_inside_its_renewal_window_is_renewed_and_clients_stay_as_they_are(stack: Stack) -> None:
    stack.set("certificate", validityDays=40, renewBeforeDays=30)
    stack.up()
    authority, trust = stack.outputs()["authorityCertificate"], stack.trust_file.read_text()
    password = stack.outputs()["password"]
    stack.set("certificate", validityDays=50)
    steps = stack.steps()
    assert steps.pop("certificate-server") == "replace"
    assert set(steps) == {"registry", "registry-files"}
    stack.up()
    assert stack.outputs()["authorityCertificate"] == authority
    assert stack.trust_file.read_text() == trust
    assert stack.outputs()["password"] == password
    assert stack.ops("verify", "--docker").returncode == 0


def test_a_container_that_was_removed_by_hand_is_made_again_after_a_refresh(stack: Stack, daemon: docker.DockerClient) -> None:
    stack.up()
    pushed = stack.push_image()
    daemon.containers.get(stack.name).remove(force=True)
    stack.up("--refresh")
    assert stack.pull_image() == pushed


def test_a_changed_configuration_file_replaces_image_and_container(stack: Stack, daemon: docker.DockerClient) -> None:
    stack.up()
    before = daemon.containers.get(stack.name).attrs["Image"]
    pushed = stack.push_image()
    stack.change_configuration()
    stack.up()
    assert daemon.containers.get(stack.name).attrs["Image"] != before
    assert stack.pull_image() == pushed


def test_a_foreign_container_of_that_name_is_left_alone(stack: Stack, daemon: docker.DockerClient) -> None:
    foreign = daemon.containers.create("registry:3.1.2", name=stack.name)
    try:
        failed = stack.up(check=False)
        assert failed.returncode != 0
        assert f'The container name "/{stack.name}" is already in use' in failed.stdout
        assert daemon.containers.get(str(foreign.id)).status == "created"
    finally:
        foreign.remove(force=True)
    stack.up()


def test_a_preview_names_what_changes_without_changing_it(stack: Stack, daemon: docker.DockerClient) -> None:
    stack.up()
    before = daemon.containers.get(stack.name).id
    stack.set("container", address="127.0.0.2")
    shown = json.loads(stack.preview("--json").stdout)
    assert {step["op"] for step in shown["steps"]} == {"same", "replace"}
    assert daemon.containers.get(stack.name).id == before
