"""A certificate is renewed, and an authority is followed by another one, while a client pulls all the time."""

from collections.abc import Iterator
from dataclasses import dataclass

import docker
import pytest
from cryptography import x509

from lab.machines import Machine, Network
from tests.engine.clients import DockerClient, Pulling
from tests.engine.conftest import new_stack
from tests.engine.stack import Stack

LONGEST_GAP = 15  # seconds in which the container is replaced


@dataclass
class Client:
    stack: Stack
    machine: Machine
    docker: DockerClient
    reference: str

    def up(self, **authority: object) -> None:
        self.stack.set("certificate", authority=authority)
        self.stack.up()

    def trusted(self) -> list[str]:
        """Return the names of the authorities that the machine's file has."""
        text = self.machine.run("cat", f"/etc/docker/certs.d/{self.stack.address}/ca.crt")
        return [one.subject.rfc4514_string() for one in x509.load_pem_x509_certificates(text.encode())]

    def issuer(self) -> str:
        """Return the authority that signed what the registry shows."""
        show = f"openssl s_client -connect {self.stack.address} </dev/null 2>/dev/null | openssl x509 -noout -issuer"
        return self.machine.run("sh", "-c", show).strip().removeprefix("issuer=").replace(" ", "")


FIRST, SECOND = "CN=Authority of a private registry", r"CN=Authority of a private registry\, generation 2"


@pytest.fixture
def client(tmp_path_factory: pytest.TempPathFactory, daemon: docker.DockerClient) -> Iterator[Client]:
    with (
        Network(tmp_path_factory.mktemp("network")) as network,
        new_stack(tmp_path_factory.mktemp("stack"), daemon) as stack,
    ):
        machine = network.add()
        stack.set("container", address=network.address)
        entry = {**machine.ssh.settings, "runtime": "docker", "resolveTo": network.address}
        stack.set("trust", docker=False, hostsFile=False, hosts=[entry])
        stack.set_secret("sshPrivateKey", machine.ssh.private_key)
        stack.up()
        outputs = stack.outputs()
        made = Client(stack, machine, DockerClient(machine), f"{stack.address}/kept:1")
        made.docker.log_in(stack.address, outputs["username"], outputs["password"])
        assert made.docker.push(made.reference) == made.reference
        yield made


def seconds_of(failures: list[tuple[float, str]]) -> float:
    return failures[-1][0] - failures[0][0] if failures else 0


def test_a_renewed_certificate_costs_the_replacement_of_the_container_and_no_trust(client: Client) -> None:
    logins = client.machine.ssh.logins
    with Pulling(client.docker, client.reference) as pulling:
        client.stack.set("certificate", validityDays=100)
        client.stack.up()
        assert client.docker.pull(client.reference) == client.reference
    assert pulling.pulls > 5
    assert not [said for _, said in pulling.failures if "x509" in said]
    assert seconds_of(pulling.failures) < LONGEST_GAP
    assert client.machine.ssh.logins == logins, "no host is told of it"


def test_an_authority_is_followed_by_another_one_in_three_steps(client: Client) -> None:
    with Pulling(client.docker, client.reference) as pulling:
        client.up(generation=1, trusted=[1, 2])
        assert client.trusted() == [FIRST, SECOND]
    assert pulling.failures == []
    logins = client.machine.ssh.logins
    with Pulling(client.docker, client.reference) as pulling:
        client.up(generation=2, trusted=[1, 2])
        assert client.docker.pull(client.reference) == client.reference
    assert not [said for _, said in pulling.failures if "x509" in said]
    assert seconds_of(pulling.failures) < LONGEST_GAP
    assert "generation2" in client.issuer()
    assert client.machine.ssh.logins == logins, "the hosts trust both already"
    with Pulling(client.docker, client.reference) as pulling:
        client.up(generation=2)
        assert client.trusted() == [SECOND]
    assert pulling.failures == []


def test_verify_tells_the_end_of_the_authority_that_signs(client: Client) -> None:
    client.stack.set("trust", hostsFile=True)
    client.up(generation=1, trusted=[1, 2])
    assert "signed by the stack's authority" in client.stack.ops("verify", check=False).stdout
