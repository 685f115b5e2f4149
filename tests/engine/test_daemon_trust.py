"""The Docker daemon trusts the registry because of the stack, and only as long as it is up.

On ::1, as Docker verifies no certificate at all on 127.0.0.0/8: https://docs.docker.com/reference/cli/dockerd/
"""

import docker
import pytest

from tests.engine.stack import Stack


@pytest.fixture
def verified(stack: Stack) -> Stack:
    stack.set("container", address="::1")
    stack.up()
    return stack


def test_without_the_authority_the_daemon_refuses_and_verify_says_why(verified: Stack) -> None:
    assert verified.ops("verify", "--docker").returncode == 0
    kept = verified.trust_file.read_text()
    verified.trust_file.unlink()
    failed = verified.ops("verify", "--docker", check=False)
    assert failed.returncode == 1
    assert "✓ delete" in failed.stdout
    assert "x509: certificate signed by unknown authority" in failed.stdout
    assert f"/etc/docker/certs.d/{verified.address}/ca.crt" in failed.stdout
    verified.trust_file.write_text(kept)
    assert verified.ops("verify", "--docker").returncode == 0


def test_a_new_authority_is_trusted_after_the_up_that_made_it(verified: Stack, daemon: docker.DockerClient) -> None:
    before = verified.outputs()["authorityCertificate"]
    verified.set("certificate", authorityValidityDays=4000)
    verified.up()
    assert verified.outputs()["authorityCertificate"] != before
    assert verified.ops("verify", "--docker").returncode == 0
