"""docs/changes.md, row by row, asked of a preview by the real engine."""

import copy
import re
from pathlib import Path
from typing import Any

import pytest

from tests.engine.kubernetes_stack import KubernetesStack
from tests.engine.stack import Stack

TABLES = (Path(__file__).parent.parent.parent / "docs/changes.md").read_text()
CONTAINER = {"registry": "replace", "registry-files": "replace"}
CERTIFICATE = {"certificate-server": "replace"}
AUTHORITY = {**CERTIFICATE, "certificate-authority": "replace"}
POD = {"registry": "replace"}
# Setting, its new value, and what the preview does to which resources.
DOCKER: dict[str, tuple[Any, dict[str, str]]] = {
    "certificate.validityDays": (100, {**CERTIFICATE, **CONTAINER}),
    "certificate.authorityValidityDays": (4000, {**AUTHORITY, **CONTAINER, "trust": "update"}),
    "certificate.authority.trusted": (
        [1, 2],
        {"certificate-authority-2-key": "create", "certificate-authority-2": "create", "trust": "update"},
    ),
    "certificate.names": (["other.test"], {**CERTIFICATE, **CONTAINER}),
    "certificate.addresses": (["10.0.0.1"], {**CERTIFICATE, **CONTAINER}),
    "certificate.renewBeforeDays": (20, {"certificate-server": "update"}),
    "hostname": ("other.test", {**CERTIFICATE, **CONTAINER, "trust": "replace"}),
    "image.base": ("registry:3.1.1", {"image": "update", **CONTAINER}),
    "image.tag": ("other", {"image": "update", **CONTAINER}),
    "access.anonymous": (True, CONTAINER),
    "container.port": (1, {"registry": "replace", "trust": "replace"}),
    "container.address": ("127.0.0.2", {"registry": "replace", "trust": "replace"}),
    "container.name": ("other", CONTAINER),
    "container.memoryMiB": (512, {"registry": "replace"}),
    "storage.volume": ("other", {"registry-images": "replace", "registry": "replace"}),
    "storage.onDestroy": ("delete", {}),
    "storage.protect": (True, {}),
    "trust.docker": (False, {"trust": "replace"}),
    "trust.hostsFile": (False, {"trust": "replace"}),
}
KUBERNETES: dict[str, tuple[Any, dict[str, str]]] = {
    "certificate.validityDays": (100, {**CERTIFICATE, **POD, "registry-files": "replace"}),
    "hostname": ("other.test", {**CERTIFICATE, **POD, "registry-files": "replace", "trust": "replace"}),
    "image.tag": ("other", {"image": "update", "registry-image": "replace", **POD}),
    "access.anonymous": (True, {**POD, "registry-files": "replace", "registry-configuration": "replace"}),
    "kubernetes.cpu": ("1", POD),
    "kubernetes.memory": ("1Gi", POD),
    "kubernetes.tolerationSeconds": (60, POD),
    "kubernetes.nodeSelector": ({"a": "b"}, {**POD, "registry-image": "replace"}),
    "kubernetes.affinity": ({"nodeAffinity": {}}, POD),
    "kubernetes.priorityClass": ("system-node-critical", {**POD, "registry-image": "replace"}),
    "kubernetes.readyTimeoutSeconds": (99, {"registry": "update", "registry-image": "update"}),
    "kubernetes.nodePort": (32499, {"registry-service": "update", "trust": "replace"}),
    "kubernetes.pullSecretNamespaces": (["default"], {"registry-pull-default": "create"}),
    "kubernetes.ingress": ({"host": "a.test", "tlsSecret": "a"}, {"registry-ingress": "create"}),
    "kubernetes.monitoring": (
        {"namespace": "monitoring"},
        {
            **POD,
            "registry-configuration": "replace",
            "registry-network": "update",
            "registry-metrics": "create",
            "registry-monitor": "create",
            "registry-alerts": "create",
        },
    ),
    "trust.daemonSet": ({}, {"node-trust": "create"}),
    "storage.claim.sizeGiB": (2, {"registry-images": "update"}),
    "storage.claim.className": ("other", {}),
    "storage.onDestroy": ("delete", {}),
    "storage.protect": (True, {}),
}


def changed(stack: Stack, setting: str, value: Any) -> dict[str, str]:
    """Preview one changed setting, and put it back."""
    kept = copy.deepcopy(stack.settings)
    try:
        section = stack.settings
        *path, last = setting.split(".")
        for step in path:
            section = section.setdefault(step, {})
        section[last] = value
        steps = stack.steps()
    finally:
        stack.settings = kept
    return {name: step for name, step in steps.items() if not name.startswith("private-registry-")}


@pytest.fixture(scope="module")
def on_docker(running: Stack) -> Stack:
    return running


@pytest.mark.parametrize("setting", DOCKER)
def test_a_change_on_docker_does_what_the_table_says(setting: str, on_docker: Stack) -> None:
    value, expected = DOCKER[setting]
    if setting == "container.port":
        value = on_docker.port - 1
    assert changed(on_docker, setting, value) == expected


@pytest.mark.xdist_group("kubernetes")
@pytest.mark.parametrize("setting", KUBERNETES)
def test_a_change_in_the_cluster_does_what_the_table_says(setting: str, running_in_cluster: KubernetesStack) -> None:
    value, expected = KUBERNETES[setting]
    assert changed(running_in_cluster, setting, value) == expected


@pytest.mark.xdist_group("kubernetes")
@pytest.mark.parametrize(("setting", "value"), [("kubernetes.name", "other"), ("kubernetes.namespace", "default")])
def test_another_name_or_namespace_is_refused_while_the_node_port_is_taken(
    setting: str, value: str, running_in_cluster: KubernetesStack
) -> None:
    with pytest.raises(AssertionError, match="provided port is already allocated"):
        changed(running_in_cluster, setting, value)
    section, _, key = setting.partition(".")
    kept = copy.deepcopy(running_in_cluster.settings)
    running_in_cluster.set(section, **{key: value, "nodePort": running_in_cluster.port + 1})
    try:
        steps = running_in_cluster.steps()
    finally:
        running_in_cluster.settings = kept
    for resource in ("registry", "registry-images", "registry-service", "registry-files"):
        assert steps[resource] == "replace"


@pytest.mark.parametrize(
    ("table", "rows"), [("On one Docker host", DOCKER), ("In Kubernetes", KUBERNETES)], ids=["docker", "kubernetes"]
)
def test_every_row_of_the_table_is_asked(table: str, rows: dict[str, Any]) -> None:
    section = TABLES.split(f"## {table}")[1].split("\n## ")[0]
    named = {
        setting for row in section.splitlines() if row.startswith("| `") for setting in re.findall("`(.+?)`", row.split("|")[1])
    }
    # These are asked by tests of their own, as they need secrets, other machines, or two changes at once.
    elsewhere = {
        "users",
        "image.nodes",
        "kubernetes.name",
        "kubernetes.namespace",
        "trust.hosts",
        "certificate.authority.generation",
    }
    assert named - elsewhere == set(rows)
