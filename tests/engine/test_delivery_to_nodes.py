"""A company's first registry: its image is copied to the nodes over SSH, as there is no registry to pull it from."""

import contextlib
from collections.abc import Iterator
from typing import Any

import pytest

from lab.kubernetes import Cluster
from lab.sshd import SshServer
from tests.engine.kubernetes_stack import KubernetesStack

pytestmark = pytest.mark.xdist_group("kubernetes")


@pytest.fixture(scope="module")
def servers(lab_cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[SshServer]]:
    """An SSH server in each node, as a user's nodes have one, with one key that may log in."""
    folder = tmp_path_factory.mktemp("ssh")
    with contextlib.ExitStack() as opened:
        yield [
            opened.enter_context(
                SshServer(folder, address=lab_cluster.node_address(number), port=2222, inside=lab_cluster.node(number).inside())
            )
            for number in (1, 2)
        ]


@pytest.fixture
def nodes(servers: list[SshServer]) -> list[dict[str, Any]]:
    return [server.settings for server in servers]


@pytest.fixture
def delivered(in_cluster: KubernetesStack, servers: list[SshServer], nodes: list[dict[str, Any]]) -> KubernetesStack:
    del in_cluster.settings["image"]["pushTo"]
    in_cluster.settings["image"]["nodes"] = nodes
    in_cluster.set_secret("sshPrivateKey", servers[0].private_key)
    return in_cluster


def test_a_node_more_gets_the_image_and_the_pod_stays(delivered: KubernetesStack, nodes: list[dict[str, Any]]) -> None:
    delivered.settings["image"]["nodes"] = nodes[:1]
    delivered.set("kubernetes", nodeSelector={"kubernetes.io/hostname": "node1"})
    delivered.up()
    before = delivered.pod_name()
    delivered.settings["image"]["nodes"] = nodes
    assert delivered.steps() == {"image-delivery": "update"}
    delivered.up()
    assert delivered.pod_name() == before


def test_the_image_is_on_every_node_and_the_registry_runs_from_it(delivered: KubernetesStack) -> None:
    delivered.up()
    image = delivered.pod()["spec"]["containers"][0]["image"]
    assert image.startswith(f"delivered.invalid/test/{delivered.name}:3.1.2-")
    assert delivered.preview("--expect-no-changes").returncode == 0
    assert delivered.push_image() == delivered.pull_image()
    delivered.change_configuration()
    delivered.up()
    assert delivered.pod()["spec"]["containers"][0]["image"] != image


def test_a_node_that_is_not_the_one_it_should_be_is_named_and_gets_nothing(
    delivered: KubernetesStack, nodes: list[dict[str, Any]]
) -> None:
    first, second = nodes
    delivered.settings["image"]["nodes"] = [first, {**second, "hostKey": first["hostKey"]}]
    failed = delivered.up(check=False)
    assert failed.returncode != 0
    assert f"{second['address']}: the image was not delivered: " in failed.stdout
    assert "Host key verification failed" in failed.stdout
    assert f"{first['address']}: the image was not delivered" not in failed.stdout
    delivered.settings["image"]["nodes"] = nodes
    delivered.up()
    assert delivered.is_ready()


def test_the_private_key_is_in_nothing_that_is_printed_or_kept(delivered: KubernetesStack, servers: list[SshServer]) -> None:
    said = delivered.up().stdout
    secret = servers[0].private_key.splitlines()[2]
    assert secret not in said
    for file in (delivered.folder / "state").rglob("*.json"):
        assert secret not in file.read_text()
