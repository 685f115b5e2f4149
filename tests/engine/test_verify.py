"""`ops verify` says what is wrong, and what to do, for each thing that can be wrong."""

import datetime
import json
import socket
import subprocess
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import docker
import pytest
from docker.models.containers import Container

from lab.ports import free_port
from ops.stack import OpsError, Registry
from ops.verify import Verification
from tests.engine.conftest import new_stack
from tests.engine.stack import Stack

pytestmark = pytest.mark.xdist_group("verify")  # so that only one of the workers brings the stack up


def fails(registry: Registry) -> OpsError:
    """Run the steps until one fails, and return what it says."""
    for _, take in Verification(registry).steps():
        try:
            take()
        except OpsError as error:
            return error
    raise AssertionError("no step failed")


@pytest.fixture(scope="module")
def registry(running: Stack) -> Registry:
    outputs = running.outputs()
    return Registry(running.address, outputs["authorityCertificate"], outputs["username"], outputs["password"])


def test_each_step_is_reported_with_its_time(running: Stack) -> None:
    said = running.ops("verify", "--docker").stdout
    for step in ("resolve", "connect", "trust", "log in", "push", "pull", "delete", "docker"):
        assert f"✓ {step}" in said
    assert said.count(" s)") == 8


def test_what_was_pushed_for_the_check_is_deleted(running: Stack) -> None:
    running.ops("verify")
    with running.client() as client:
        for repository in client.get("/v2/_catalog").json()["repositories"]:
            if repository.startswith("private-registry-verify/"):
                assert client.get(f"/v2/{repository}/tags/list").json()["tags"] in (None, [])


def test_a_name_that_does_not_resolve(registry: Registry) -> None:
    error = fails(Registry("no-such-host.invalid:5000", registry.authority, None, None))
    assert "no-such-host.invalid does not resolve" in error.what
    assert "trust.hostsFile" in error.mend


def test_a_closed_port(registry: Registry) -> None:
    error = fails(Registry(f"{registry.host}:{free_port()}", registry.authority, None, None))
    assert "Nothing listens on" in error.what
    assert "pulumi up" in error.mend


def test_a_node_port_that_opens_a_moment_later_is_waited_for(registry: Registry) -> None:
    port = free_port()
    in_cluster = Registry(f"127.0.0.1:{port}", registry.authority, None, None, workload={"namespace": "any", "name": "any"})
    connect = dict(Verification(in_cluster).steps())["connect"]
    with ThreadPoolExecutor() as pool:
        connected = pool.submit(connect)
        with pytest.raises(TimeoutError):
            connected.result(timeout=0.5)
        with socket.create_server(("127.0.0.1", port)):
            assert "is open" in connected.result().said


def test_a_port_that_does_not_speak_tls(registry: Registry, tmp_path: Path) -> None:
    import http.server
    import threading

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), http.server.SimpleHTTPRequestHandler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        error = fails(Registry(f"{registry.host}:{server.server_port}", registry.authority, None, None))
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
    assert "does not speak TLS" in error.what


def test_a_certificate_of_another_authority(registry: Registry, tmp_path: Path) -> None:
    other, _ = self_signed(tmp_path, "other.test", days=10)
    error = fails(Registry(registry.address, other, None, None))
    assert "is not of this stack's authority" in error.what


def test_a_certificate_that_does_not_name_the_host(registry: Registry) -> None:
    error = fails(Registry(f"localhost:{registry.port}", registry.authority, None, None))
    assert "The certificate is not for localhost" in error.what
    assert "certificate.names" in error.mend


def test_a_wrong_password(registry: Registry) -> None:
    error = fails(Registry(registry.address, registry.authority, registry.username, "wrong"))
    assert "The user name or the password is wrong" in error.what


def self_signed(folder: Path, name: str, *, days: int) -> tuple[str, str]:
    """Make a certificate and its key with openssl; a negative number of days makes an expired one."""
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    key = ec.generate_private_key(ec.SECP256R1())
    now = datetime.datetime.now(datetime.UTC)
    subject = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, name)])
    certificate = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(days=20))
        .not_valid_after(now + datetime.timedelta(days=days, hours=1))
        .add_extension(x509.SubjectAlternativeName([x509.DNSName(name)]), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .add_extension(
            x509.AuthorityKeyIdentifier.from_issuer_public_key(key.public_key()),
            critical=False,
        )
        .add_extension(
            x509.KeyUsage(
                digital_signature=True,
                key_cert_sign=True,
                crl_sign=True,
                content_commitment=False,
                key_encipherment=False,
                data_encipherment=False,
                key_agreement=False,
                encipher_only=False,
                decipher_only=False,
            ),
            critical=True,
        )
        .sign(key, hashes.SHA256())
    )
    pem = certificate.public_bytes(serialization.Encoding.PEM).decode()
    key_pem = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    ).decode()
    (folder / "domain.crt").write_text(pem)
    (folder / "domain.key").write_text(key_pem)
    return pem, key_pem


@pytest.fixture
def odd(tmp_path: Path, daemon: docker.DockerClient) -> Iterator["OddRegistry"]:
    made = OddRegistry(tmp_path, daemon)
    try:
        yield made
    finally:
        made.remove()


class OddRegistry:
    """A real Distribution in a container of its own, set up to have something wrong with it."""

    def __init__(self, folder: Path, daemon: docker.DockerClient) -> None:
        self.folder = folder
        self.daemon = daemon
        self.port = free_port()
        self.container: Container | None = None

    def start(self, *, days: int = 100, configuration: str = "", **options: Any) -> Registry:
        authority, _ = self_signed(self.folder, "localhost", days=days)
        (self.folder / "config.yml").write_text(
            "version: 0.1\nstorage:\n  filesystem: {rootdirectory: /data}\n  delete: {enabled: true}\n"
            f"{configuration}"
            "http:\n  addr: :5000\n  tls: {certificate: /odd/domain.crt, key: /odd/domain.key}\n"
        )
        container = self.daemon.containers.run(
            "registry:3.1.2",
            ["serve", "/odd/config.yml"],
            detach=True,
            ports={"5000/tcp": ("127.0.0.1", self.port)},
            volumes={str(self.folder): {"bind": "/odd", "mode": "ro"}},
            **options,
        )
        self.container = container
        for line in container.logs(stream=True, follow=True):
            if b"listening on" in line:
                break
        return Registry(f"localhost:{self.port}", authority, None, None)

    def remove(self) -> None:
        if self.container is not None:
            self.container.remove(force=True, v=True)


def test_an_expired_certificate(odd: OddRegistry) -> None:
    error = fails(odd.start(days=-2))
    assert "has expired" in error.what
    assert "pulumi up" in error.mend


def test_a_certificate_that_ends_soon_is_a_warning(odd: OddRegistry) -> None:
    results = [take() for _, take in Verification(odd.start(days=12)).steps()]
    (warned,) = [result for result in results if result.warning]
    assert "12 days; run `pulumi up` to renew it, from" in warned.said


def test_a_registry_in_read_only_mode(odd: OddRegistry) -> None:
    error = fails(odd.start(configuration="  maintenance: {readonly: {enabled: true}}\n"))
    assert "It is read-only" in error.what


def test_a_full_disk(odd: OddRegistry) -> None:
    registry = odd.start(tmpfs={"/data": "size=64k"})
    assert odd.container is not None
    odd.container.exec_run(["sh", "-c", "dd if=/dev/zero of=/data/fill bs=1k count=100"])
    error = fails(registry)
    assert "Its disk is full" in error.what


def test_a_read_only_disk(odd: OddRegistry) -> None:
    error = fails(odd.start(read_only=True))
    assert "Its filesystem is read-only" in error.what


def test_a_stack_that_is_not_up(tmp_path: Path, daemon: docker.DockerClient) -> None:
    with new_stack(tmp_path, daemon) as stack:
        failed = stack.ops("verify", check=False)
        assert failed.returncode == 1
        assert "it is not up" in failed.stdout
        assert "pulumi up" in failed.stdout


def test_a_stack_that_does_not_exist(running: Stack) -> None:
    failed = running.ops("verify", "--stack", "nowhere", check=False)
    assert failed.returncode == 1
    assert "no stack named 'nowhere' found" in failed.stdout


def test_the_login_of_the_docker_client_stays_as_it_was(running: Stack) -> None:
    running.ops("verify", "--docker")
    file = Path.home() / ".docker/config.json"
    logins = json.loads(file.read_text()).get("auths", {}) if file.exists() else {}
    assert running.address not in logins


def test_help_lists_the_commands(running: Stack) -> None:
    said = running.ops("--help").stdout
    assert "verify" in said
    assert "recover" in said


def test_without_a_cli_the_way_to_one_is_said(running: Stack) -> None:
    environment = {**running.environment, "PATH": "/usr/bin:/bin"}
    root = Path(__file__).parent.parent.parent
    command = [str(root / ".venv/bin/python"), "-m", "ops", "verify"]
    failed = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, check=False)
    assert failed.returncode == 1
    assert "make toolchain" in failed.stdout
