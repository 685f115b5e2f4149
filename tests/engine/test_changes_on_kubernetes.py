"""What a change to a stack, to the cluster or behind Pulumi's back does to a registry in the cluster."""

import json
import time
from typing import Any

import pytest

from lab.kubernetes import Cluster
from tests.engine.kubernetes_stack import KubernetesStack
from tests.engine.stack import kill, killed_on_failure, wait_for

pytestmark = pytest.mark.xdist_group("kubernetes")


@pytest.fixture(scope="module")
def registry(running_in_cluster: KubernetesStack) -> KubernetesStack:
    """A registry with an image, which each test leaves with that image and as its stack says."""
    running_in_cluster.digest = running_in_cluster.push_image()  # type: ignore[attr-defined]
    return running_in_cluster


def converged(registry: KubernetesStack) -> None:
    assert registry.preview("--expect-no-changes").returncode == 0
    assert registry.is_ready()
    assert registry.pull_image() == registry.digest  # type: ignore[attr-defined]


def replaced(registry: KubernetesStack) -> None:
    """Bring a change up that has to replace the pod, and nothing else but what it is about."""
    before = registry.pod_name()
    registry.up()
    assert registry.pod_name() != before
    converged(registry)


def test_a_changed_configuration_replaces_the_pod(registry: KubernetesStack) -> None:
    registry.change_configuration()
    replaced(registry)
    assert "level: warn" in registry.get("configmaps/registry")["data"]["config.yml"]


def test_another_tag_of_the_image_replaces_the_pod_when_the_image_is_on_its_node(registry: KubernetesStack) -> None:
    registry.set("image", tag="3.1.2-a")
    steps = registry.steps()
    assert steps["registry"] == "replace"
    replaced(registry)
    assert registry.pod()["metadata"]["labels"]["version"] == "3.1.2-a"


def test_a_renewed_certificate_replaces_the_pod_and_clients_stay_as_they_are(registry: KubernetesStack) -> None:
    authority = registry.outputs()["authorityCertificate"]
    registry.set("certificate", validityDays=100)
    assert "certificate-authority" not in registry.steps()
    replaced(registry)
    assert registry.outputs()["authorityCertificate"] == authority


def test_a_changed_password_holds_when_up_returns(registry: KubernetesStack) -> None:
    registry.set_secret("users.alice", "correct horse")
    replaced(registry)
    registry.set_secret("users.alice", "battery staple")
    replaced(registry)
    with registry.client(anonymous=True) as client:
        assert client.get("/v2/", auth=("alice", "correct horse")).status_code == 401
        assert client.get("/v2/", auth=("alice", "battery staple")).status_code == 200


def test_more_memory_replaces_the_pod(registry: KubernetesStack) -> None:
    registry.set("kubernetes", memory="160Mi")
    replaced(registry)
    assert registry.pod()["spec"]["containers"][0]["resources"]["limits"]["memory"] == "160Mi"


def test_another_node_port_leaves_the_pod_alone(registry: KubernetesStack) -> None:
    before = registry.pod_name()
    registry.port += 50
    registry.set("kubernetes", nodePort=registry.port)
    registry.up()
    assert registry.pod_name() == before
    converged(registry)


def test_a_pod_that_dies_comes_back_with_its_images(registry: KubernetesStack) -> None:
    before = registry.pod_name()
    registry.api.delete(f"{registry.namespace}/pods/{before}").raise_for_status()
    wait_for(lambda: registry.pod_name() not in ("", before) and registry.is_ready())
    converged(registry)


def test_a_controller_that_was_edited_is_put_back(registry: KubernetesStack) -> None:
    patch = {"spec": {"replicas": 0}}
    headers = {"Content-Type": "application/merge-patch+json"}
    path = f"{registry.namespace}/replicationcontrollers/registry"
    registry.api.patch(path, json=patch, headers=headers, params={"fieldManager": "somebody"}).raise_for_status()
    wait_for(lambda: not registry.get("pods?labelSelector=k8s-app%3Dregistry")["items"])
    registry.up("--refresh")
    wait_for(registry.is_ready)
    converged(registry)


def test_a_controller_that_was_deleted_is_made_again(registry: KubernetesStack) -> None:
    path = f"{registry.namespace}/replicationcontrollers/registry"
    registry.api.delete(path, params={"propagationPolicy": "Background"}).raise_for_status()
    wait_for(lambda: not registry.get("pods?labelSelector=k8s-app%3Dregistry")["items"])
    registry.up("--refresh")
    converged(registry)


def test_an_image_that_cannot_be_pulled_is_told_by_the_pods_events_and_the_old_pod_serves_on(
    registry: KubernetesStack, lab_cluster: Cluster
) -> None:
    before = registry.pod_name()
    kept = dict(registry.settings["image"])
    hosts = [folder / kept["pushTo"] / "hosts.toml" for folder in lab_cluster.registries()]
    contents = {file: file.read_text() for file in hosts}
    for file in hosts:
        file.write_text('server = "http://127.0.0.1:1"\n')
    registry.set("image", tag="3.1.2-b")
    registry.own_image()
    (registry.folder / "image/blobs/note").write_text("another content")
    registry.set("kubernetes", readyTimeoutSeconds=30)
    try:
        failed = registry.up(check=False)
        assert failed.returncode != 0
        assert "ErrImagePull" in failed.stdout or "ImagePullBackOff" in failed.stdout or "Failed to pull" in failed.stdout
        assert registry.pod_name() == before
        assert registry.is_ready()
    finally:
        for file, content in contents.items():
            file.write_text(content)
        registry.settings["image"] = kept
        (registry.folder / "image/blobs/note").unlink()
        registry.set("kubernetes", readyTimeoutSeconds=60)
    registry.up()
    converged(registry)


def test_a_pod_that_cannot_be_scheduled_is_told_within_the_stacks_timeout(in_cluster: KubernetesStack) -> None:
    in_cluster.set("kubernetes", cpu="500", readyTimeoutSeconds=15)
    failed = in_cluster.up(check=False)
    assert failed.returncode != 0
    assert "Insufficient cpu" in in_cluster.ops("verify", check=False).stdout
    in_cluster.set("kubernetes", cpu="500m", readyTimeoutSeconds=60)
    in_cluster.up()
    assert in_cluster.preview("--expect-no-changes").returncode == 0


def test_a_name_that_is_taken_is_told_and_left_alone(in_cluster: KubernetesStack) -> None:
    body: dict[str, Any] = {"metadata": {"name": "registry"}, "data": {"owner": "somebody"}}
    in_cluster.api.post(f"{in_cluster.namespace}/configmaps", json=body).raise_for_status()
    failed = in_cluster.up(check=False)
    assert failed.returncode != 0
    assert 'configmaps "registry" already exists' in failed.stdout
    assert in_cluster.get("configmaps/registry")["data"] == {"owner": "somebody"}
    in_cluster.api.delete(f"{in_cluster.namespace}/configmaps/registry").raise_for_status()
    in_cluster.up()
    assert in_cluster.is_ready()


def test_without_a_cluster_a_preview_goes_through_and_an_up_names_the_server(in_cluster: KubernetesStack) -> None:
    kubeconfig = in_cluster.folder / "closed"
    text = in_cluster.cluster.kubeconfig.read_text()
    server = in_cluster.cluster.server
    kubeconfig.write_text(text.replace(server, "https://127.0.0.1:1"))
    in_cluster.environment["KUBECONFIG"] = str(kubeconfig)
    assert in_cluster.preview().returncode == 0
    failed = in_cluster.up(check=False)
    assert failed.returncode != 0
    assert "https://127.0.0.1:1" in failed.stdout
    in_cluster.environment["KUBECONFIG"] = str(in_cluster.cluster.kubeconfig)
    in_cluster.up()
    assert in_cluster.is_ready()


def test_without_a_docker_daemon_a_preview_goes_through(in_cluster: KubernetesStack) -> None:
    in_cluster.environment["DOCKER_HOST"] = "unix:///nowhere.sock"
    assert json.loads(in_cluster.preview("--json").stdout)["changeSummary"]["create"] > 10


@pytest.mark.parametrize("objects", [2, 8, 12, 17])
def test_an_up_that_was_killed_converges(in_cluster: KubernetesStack, objects: int) -> None:
    file = in_cluster.folder / f"state/.pulumi/stacks/private-registry/{in_cluster.name}.json"

    def resources() -> int:
        try:
            return len(json.loads(file.read_text())["checkpoint"]["latest"].get("resources") or [])
        except (OSError, ValueError):
            return 0

    with killed_on_failure(in_cluster.start("up")) as process:
        while process.poll() is None and resources() < objects:
            time.sleep(0.005)
        if process.poll() is None:
            kill(process)
    in_cluster.ops("recover")
    in_cluster.up()
    assert in_cluster.is_ready()
    assert in_cluster.preview("--expect-no-changes").returncode == 0


def test_a_replacement_that_was_killed_converges_with_its_images(registry: KubernetesStack) -> None:
    registry.set("kubernetes", memory="192Mi")
    before = registry.pod_name()

    def controller_is_gone() -> bool:
        names = [item["metadata"]["name"] for item in registry.get("replicationcontrollers")["items"]]
        return "registry" not in names or registry.pod_name() != before

    with killed_on_failure(registry.start("up")) as process:
        while process.poll() is None and not controller_is_gone():
            pass
        if process.poll() is None:
            kill(process)
    registry.ops("recover")
    registry.up()
    converged(registry)
