"""Real stacks on the real engine and a real Docker daemon, each with a backend, names and a port of its own."""

import contextlib
import fcntl
import os
import tempfile
import uuid
from collections.abc import Iterator
from pathlib import Path

import docker
import pytest

from lab import dockerd
from lab.ceph import Ceph
from lab.kubernetes import Cluster
from lab.ports import free_port
from lab.sshd import SshServer
from tests.engine.given_cluster import KUBECONFIG, GivenCluster, given_cluster, given_registry
from tests.engine.kubernetes_stack import Hub, KubernetesStack, new_kubernetes_stack
from tests.engine.stack import Stack


@pytest.fixture(scope="session", autouse=True)
def docker_host() -> Iterator[str]:
    """The daemon that all tests share; started by `make lab`, or here."""
    with (Path(tempfile.gettempdir()) / "private-registry-tests.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # both workers come here at once
        host = dockerd.start()
        dockerd.ensure_base_image(host)
    before = os.environ.get("DOCKER_HOST")
    os.environ["DOCKER_HOST"] = host
    yield host
    if before is None:
        del os.environ["DOCKER_HOST"]
    else:
        os.environ["DOCKER_HOST"] = before


@pytest.fixture(scope="session")
def daemon(docker_host: str) -> Iterator[docker.DockerClient]:
    client = docker.DockerClient(base_url=docker_host, timeout=120)
    yield client
    client.close()


def remove_from_daemon(name: str, daemon: docker.DockerClient) -> None:
    """Remove a stack's containers and volumes, whatever its state says."""
    label = {"label": f"private-registry.stack=private-registry/{name}"}
    for container in daemon.containers.list(all=True, filters=label):
        container.remove(force=True, v=True)
    for volume in daemon.volumes.list(filters=label):
        volume.remove()


@contextlib.contextmanager
def new_stack(folder: Path, daemon: docker.DockerClient) -> Iterator[Stack]:
    """A stack of its own on the daemon; nothing of it is left afterwards, whatever the test did."""
    name = f"t{uuid.uuid4().hex[:10]}"
    stack = Stack(name, folder, port=free_port())
    try:
        yield stack
    finally:
        remove_from_daemon(name, daemon)
        stack.remove_trust()


@pytest.fixture
def stack(tmp_path: Path, daemon: docker.DockerClient) -> Iterator[Stack]:
    with new_stack(tmp_path, daemon) as made:
        yield made


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory, daemon: docker.DockerClient) -> Iterator[Stack]:
    """A stack that is up, shared by the tests of a file that do not change it."""
    with new_stack(tmp_path_factory.mktemp("running"), daemon) as made:
        made.up()
        yield made


@pytest.fixture(scope="session")
def cluster(tmp_path_factory: pytest.TempPathFactory, docker_host: str) -> Iterator[Cluster | GivenCluster]:
    """The lab's Kubernetes with two nodes, of the tests' own; or a cluster that the developer gave."""
    if given := given_cluster():
        yield given
        return
    made = Cluster(tmp_path_factory.mktemp("cluster") / "lab")
    try:
        made.up(nodes=2)
        yield made
    finally:
        made.down()


@pytest.fixture(scope="session")
def ceph(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ceph]:
    """A Ceph cluster in memory."""
    made = Ceph(tmp_path_factory.mktemp("ceph") / "ceph")
    try:
        made.up()
        yield made
    finally:
        made.down()


@pytest.fixture(scope="session")
def ceph_host(ceph: Ceph, tmp_path_factory: pytest.TempPathFactory) -> Iterator[SshServer]:
    """The Ceph host, as a stack reaches it."""
    with SshServer(tmp_path_factory.mktemp("host"), environment=ceph.environment) as server:
        yield server


@pytest.fixture(scope="session")
def lab_cluster(cluster: Cluster | GivenCluster) -> Cluster:
    """The cluster of a test that needs more of it than its API, so that it must be the lab's."""
    if not isinstance(cluster, Cluster):
        pytest.skip(f"changes files on the nodes or kinds of the whole cluster, which must be the lab's: unset {KUBECONFIG}")
    return cluster


@pytest.fixture(scope="session")
def hub(daemon: docker.DockerClient, cluster: Cluster | GivenCluster) -> Iterator[str]:
    """The address of a registry from which the nodes pull the registry's own image."""
    if not isinstance(cluster, Cluster):
        yield given_registry()
        return
    made = Hub(daemon, cluster)
    yield made.address
    made.close()


@pytest.fixture
def in_cluster(tmp_path: Path, cluster: Cluster | GivenCluster, hub: str) -> Iterator[KubernetesStack]:
    with new_kubernetes_stack(tmp_path, cluster, hub) as made:
        yield made


@pytest.fixture(scope="module")
def running_in_cluster(
    tmp_path_factory: pytest.TempPathFactory, cluster: Cluster | GivenCluster, hub: str
) -> Iterator[KubernetesStack]:
    """A registry that is up in the cluster, shared by the tests of a file that do not change it."""
    with new_kubernetes_stack(tmp_path_factory.mktemp("running"), cluster, hub) as made:
        made.up()
        yield made
