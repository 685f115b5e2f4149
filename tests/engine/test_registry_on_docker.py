"""The registry on one Docker host: what a user sees from the first `pulumi up` to the last `pulumi destroy`."""

import ssl
import subprocess
from pathlib import Path

import docker
import httpx
import pytest

from tests.engine.stack import Stack, wait_for

pytestmark = pytest.mark.xdist_group("registry_on_docker")  # so that only one of the workers brings the stack up


def test_a_second_up_changes_nothing(running: Stack) -> None:
    assert running.preview("--expect-no-changes").returncode == 0
    assert "15 unchanged" in running.up().stdout


def test_docker_logs_in_pushes_and_pulls_by_name_over_the_private_authority(running: Stack) -> None:
    assert running.push_image("round-trip") == running.pull_image("round-trip")


def test_a_wrong_password_is_refused_with_401(running: Stack) -> None:
    with running.client(anonymous=True) as client:
        assert client.get("/v2/", auth=("admin", "wrong")).status_code == 401
    refused = running.docker("login", "-u", "admin", "--password-stdin", running.address, stdin="wrong", check=False)
    assert refused.returncode != 0
    assert "401" in refused.stderr or "unauthorized" in refused.stderr


def test_without_a_password_nothing_is_given(running: Stack) -> None:
    with running.client(anonymous=True) as client:
        assert client.get("/v2/_catalog").status_code == 401


def test_a_client_without_the_authority_refuses_the_registry(running: Stack) -> None:
    with pytest.raises(httpx.ConnectError, match="CERTIFICATE_VERIFY_FAILED"):
        httpx.get(f"https://{running.address}/v2/", verify=ssl.create_default_context(), trust_env=False)


def test_tls_1_1_is_refused(running: Stack) -> None:
    command = ["openssl", "s_client", "-tls1_1", "-connect", f"127.0.0.1:{running.port}"]
    handshake = subprocess.run(command, input="", capture_output=True, text=True, check=False)
    assert handshake.returncode != 0
    assert "Cipher is (NONE)" in handshake.stdout


def test_the_certificate_is_rsa_4096_with_sha_256_for_a_year_and_names_the_host(running: Stack) -> None:
    command = ["openssl", "s_client", "-connect", f"127.0.0.1:{running.port}", "-servername", running.hostname]
    shown = subprocess.run(command, input="", capture_output=True, text=True, check=True).stdout
    text = subprocess.run(
        ["openssl", "x509", "-noout", "-text", "-checkend", str(364 * 86400)],
        input=shown,
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    assert "Public-Key: (4096 bit)" in text
    assert "Signature Algorithm: sha256WithRSAEncryption" in text
    assert f"Subject: CN = {running.hostname}" in text
    assert f"DNS:{running.hostname}" in text
    assert "Certificate will not expire" in text


def test_the_container_has_no_capabilities_a_read_only_root_and_an_ordinary_user(
    running: Stack, daemon: docker.DockerClient
) -> None:
    attributes = daemon.containers.get(running.name).attrs
    assert attributes["HostConfig"]["CapDrop"] == ["ALL"]
    assert attributes["HostConfig"]["ReadonlyRootfs"] is True
    assert attributes["Config"]["User"] == "1000:1000"
    assert "no-new-privileges" in attributes["HostConfig"]["SecurityOpt"]
    assert attributes["State"]["Health"]["Status"] == "healthy"
    status, output = daemon.containers.get(running.name).exec_run(["touch", "/x"])
    assert status != 0
    assert b"Read-only" in output


def test_the_debug_port_is_only_inside(running: Stack, daemon: docker.DockerClient) -> None:
    network = daemon.containers.get(running.name).attrs["NetworkSettings"]
    assert [port for port, bound in network["Ports"].items() if bound] == ["5000/tcp"]
    with pytest.raises(httpx.ConnectError):
        httpx.get(f"http://{network['IPAddress']}:5001/debug/health", trust_env=False)


def test_the_registry_comes_back_by_itself_when_its_process_dies(running: Stack, daemon: docker.DockerClient) -> None:
    container = daemon.containers.get(running.name)
    before = container.attrs["State"]["Pid"]
    subprocess.run(["kill", "-KILL", str(before)], check=True)

    def is_back() -> bool:
        state = daemon.containers.get(running.name).attrs["State"]
        return state["Pid"] not in (0, before) and state["Health"]["Status"] == "healthy"

    wait_for(is_back)
    assert running.ops("verify").returncode == 0


def test_destroy_leaves_the_images_and_nothing_else_and_up_serves_them_again(stack: Stack, daemon: docker.DockerClient) -> None:
    stack.up()
    pushed = stack.push_image()
    volumes = {volume.name for volume in daemon.volumes.list()}
    stack.destroy()
    label = {"label": f"private-registry.stack=private-registry/{stack.name}"}
    assert daemon.containers.list(all=True, filters=label) == []
    assert not stack.trust_file.parent.exists()
    assert stack.hostname not in Path("/etc/hosts").read_text()
    left = {volume.name for volume in daemon.volumes.list()}
    assert stack.name in left
    assert len(volumes - left) >= 3, "the volumes with key, users and configuration have to go"
    stack.up()
    assert stack.pull_image() == pushed


def test_destroy_deletes_the_images_where_the_stack_says_so(stack: Stack, daemon: docker.DockerClient) -> None:
    stack.set("storage", onDestroy="delete")
    stack.up()
    stack.destroy()
    with pytest.raises(docker.errors.NotFound):
        daemon.volumes.get(stack.name)


def test_protected_images_are_not_deleted(stack: Stack, daemon: docker.DockerClient) -> None:
    stack.set("storage", protect=True)
    stack.up()
    pushed = stack.push_image()
    refused = stack.destroy(check=False)
    assert refused.returncode != 0
    assert "protect" in refused.stdout + refused.stderr
    stack.up()
    assert stack.pull_image() == pushed
    stack.set("storage", protect=False)
    stack.up()
    stack.destroy()
