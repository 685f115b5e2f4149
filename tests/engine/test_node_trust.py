"""Nodes that trust the registry by a pod on each: their kubelets pull from it with that pod, and not without it."""

import json

import pytest

from lab.kubernetes import Cluster
from tests.engine.kubernetes_stack import KubernetesStack
from tests.engine.stack import wait_for

pytestmark = pytest.mark.xdist_group("kubernetes")
X509 = "certificate signed by unknown authority"


def pull(stack: KubernetesStack, name: str, node: str) -> str:
    """Start a pod on a node with an image of the registry, and return what becomes of it: Running, or why it waits."""
    container = {"name": "app", "image": f"{stack.address}/app:1", "command": ["sleep", "600"], "imagePullPolicy": "Always"}
    spec = {
        "containers": [container],
        "nodeName": node,
        "terminationGracePeriodSeconds": 0,
        "imagePullSecrets": [{"name": "registry-pull"}],
    }
    body = {"metadata": {"name": name}, "spec": spec}
    stack.api.post(f"{stack.namespace}/pods", json=body).raise_for_status()

    def state() -> str:
        status = stack.get(f"pods/{name}")["status"]
        if status["phase"] == "Running":
            return "Running"
        waiting = status.get("containerStatuses", [{}])[0].get("state", {}).get("waiting", {})
        return json.dumps(waiting) if waiting.get("message") else ""

    found = ""

    def became() -> bool:
        nonlocal found
        found = state()
        return found != ""

    wait_for(became)
    return found


def trust_pods(stack: KubernetesStack) -> list[str]:
    """Return the names of the trust's pods that are ready and not on their way out."""
    pods = stack.get("pods?labelSelector=k8s-app%3Dregistry-trust")["items"]
    return [
        pod["metadata"]["name"]
        for pod in pods
        if "deletionTimestamp" not in pod["metadata"]
        and any(one["type"] == "Ready" and one["status"] == "True" for one in pod["status"].get("conditions", []))
    ]


def test_nodes_pull_with_the_daemon_set_and_not_without_it(in_cluster: KubernetesStack, lab_cluster: Cluster) -> None:
    in_cluster.set("kubernetes", pullSecretNamespaces=[in_cluster.name])
    in_cluster.up()
    in_cluster.push_image("app")
    hosts = lab_cluster.folder / "node1/hosts"
    before = hosts.read_text()
    in_cluster.set("trust", daemonSet={"resolveTo": lab_cluster.node_address(1)})
    in_cluster.up()
    wait_for(lambda: len(trust_pods(in_cluster)) == 2)
    assert [pull(in_cluster, f"with-{node}", node) for node in ("node1", "node2")] == ["Running", "Running"]
    assert in_cluster.hostname in hosts.read_text()
    del in_cluster.settings["trust"]["daemonSet"]
    in_cluster.up()
    wait_for(lambda: hosts.read_text().split() == before.split())
    wait_for(lambda: not any((folder / in_cluster.address).exists() for folder in lab_cluster.registries()))
    with hosts.open("a") as lines:
        lines.write(f"{lab_cluster.node_address(1)} {in_cluster.hostname}\n")
    assert X509 in pull(in_cluster, "without", "node1")


def test_a_changed_authority_reaches_the_nodes_with_no_moment_without_trust(
    in_cluster: KubernetesStack, lab_cluster: Cluster
) -> None:
    in_cluster.set("trust", daemonSet={})
    in_cluster.up()
    wait_for(lambda: len(trust_pods(in_cluster)) == 2)
    file = lab_cluster.registries()[0] / in_cluster.address / "ca.crt"
    first = trust_pods(in_cluster)
    in_cluster.set("certificate", authority={"generation": 1, "trusted": [1, 2]})
    in_cluster.up()

    def rolled() -> bool:
        assert "BEGIN CERTIFICATE" in file.read_text()
        return len(trust_pods(in_cluster)) == 2 and not set(trust_pods(in_cluster)) & set(first)

    wait_for(rolled)
    wait_for(lambda: len(in_cluster.get("pods?labelSelector=k8s-app%3Dregistry-trust")["items"]) == 2)
    assert file.read_text().count("BEGIN CERTIFICATE") == 2


def test_a_file_of_another_is_told_by_the_pod_of_that_node_alone(in_cluster: KubernetesStack, lab_cluster: Cluster) -> None:
    folder = lab_cluster.registries()[1] / in_cluster.address
    folder.mkdir()
    (folder / "hosts.toml").write_text("# of another\n")
    in_cluster.set("trust", daemonSet={})
    in_cluster.up()
    wait_for(lambda: len(trust_pods(in_cluster)) == 1)

    def said() -> str:
        pods = in_cluster.get("pods?labelSelector=k8s-app%3Dregistry-trust")["items"]
        return json.dumps([pod["status"] for pod in pods if pod["spec"].get("nodeName") == "node2"])

    wait_for(lambda: "is there already and is not of this registry's stack" in said())
    assert (folder / "hosts.toml").read_text() == "# of another\n"
