"""`ops rollout` to three environments on Ceph, each with its monitors, size and node port, on nodes that mount the images."""

import contextlib
import json
import os
import subprocess
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from lab.debian import LabError
from lab.nodes import CEPH_HOST, NODES, NodeLab
from tests.engine.stack import ROOT, Stack
from tests.lab.registry import wait_for

UNREACHABLE = "10.149.149.2:6789"
ENVIRONMENTS = (("dev", 32502, 256), ("staging", 32501, 320), ("prod", 32500, 384))


class Environment(Stack):
    """A registry in a namespace of its own, with one of the three monitors."""

    def __init__(self, folder: Path, lab: NodeLab, name: str, node_port: int, size_mib: int, monitor: str) -> None:
        super().__init__(f"{name}-{uuid.uuid4().hex[:8]}", folder, port=node_port)
        self.lab = lab
        self.environment["KUBECONFIG"] = str(lab.kubeconfig)
        nodes = [{"address": lab.node_address(number), "hostKey": lab.host_key(number)} for number in NODES]
        rbd = {
            "monitors": [monitor],
            "image": self.name,
            "user": self.name,
            "sizeMiB": size_mib,
            "host": nodes[CEPH_HOST - 1],
        }
        self.settings: dict[str, Any] = {
            "target": "kubernetes",
            "hostname": self.hostname,
            "image": {"repository": f"test/{self.name}", "nodes": nodes},
            "kubernetes": {
                "namespace": self.name,
                "nodePort": node_port,
                "cpu": "300m",
                "memory": "128Mi",
                "readyTimeoutSeconds": 600,
            },
            "storage": {"rbd": rbd},
        }
        self.set_secret("sshPrivateKey", lab.private_key)
        self.api = lab.client()
        self.api.post("/api/v1/namespaces", json={"metadata": {"name": self.name}}).raise_for_status()
        self._resolve("install")

    def _resolve(self, verb: str) -> None:
        """Let the name be that of a node, or no more."""
        of_this = {"STACK": f"tests/{self.name}", "REGISTRY": f"{self.hostname}:0", "ENTRY": "tests", "RUNTIME": "none"}
        resolved = {"RESOLVE_TO": self.lab.node_address(1)} if verb == "install" else {}
        subprocess.run([str(ROOT / "hosts/trust.sh"), verb], env={**os.environ, **of_this, **resolved}, check=True)

    def get(self, path: str) -> Any:
        return self.api.get(f"/api/v1/namespaces/{self.name}/{path}").raise_for_status().json()

    def is_there(self) -> bool:
        return bool(self.get("replicationcontrollers")["items"])

    def volume(self) -> Any:
        """Return where the volume's image is, as the nodes mount it."""
        name = self.get("persistentvolumeclaims")["items"][0]["spec"]["volumeName"]
        return self.api.get(f"/api/v1/persistentvolumes/{name}").raise_for_status().json()["spec"]

    def remove(self) -> None:
        self.destroy(check=False)
        self.api.delete(f"/api/v1/namespaces/{self.name}")
        self.api.close()
        self._resolve("remove")

        def without_watchers() -> bool:
            return not json.loads(self.lab.rbd("status", f"rbd/{self.name}", "--format", "json"))["watchers"]

        with contextlib.suppress(LabError):
            wait_for(without_watchers, 120)
            self.lab.rbd("rm", f"rbd/{self.name}", "--no-progress")


@pytest.fixture
def environments(
    tmp_path: Path, lab: NodeLab, docker_host: str, monkeypatch: pytest.MonkeyPatch
) -> Iterator[tuple[Environment, Environment, Environment]]:
    monkeypatch.setenv("DOCKER_HOST", docker_host)
    with contextlib.ExitStack() as ending:
        made = []
        for (name, node_port, size_mib), monitor in zip(ENVIRONMENTS, lab.monitors, strict=True):
            made.append(Environment(tmp_path, lab, name, node_port, size_mib, monitor))
            ending.callback(made[-1].remove)
        dev, staging, prod = made
        prod.set("environment", production=True)
        prod.set("storage", protect=True)
        yield dev, staging, prod
        prod.set("storage", protect=False)
        prod.up("--continue-on-error", check=False)  # a protected image cannot be destroyed


def test_a_rollout_stops_at_stagings_fault_and_after_the_mend_all_three_serve_from_their_own_images(
    environments: tuple[Environment, Environment, Environment],
) -> None:
    dev, staging, prod = environments
    command = ("rollout", *(stack.name for stack in environments), "--yes-for", prod.name)
    monitors = staging.settings["storage"]["rbd"]["monitors"]
    staging.settings["storage"]["rbd"]["monitors"] = [UNREACHABLE]
    staging.set("kubernetes", readyTimeoutSeconds=60)
    for stack in environments:
        stack.write()
    stopped = dev.ops(*command, check=False)
    assert stopped.returncode == 1
    assert f"{staging.name}: `pulumi up` failed" in stopped.stdout
    assert not prod.is_there()
    staging.settings["storage"]["rbd"]["monitors"] = monitors
    staging.set("kubernetes", readyTimeoutSeconds=600)
    staging.write()
    said = dev.ops(*command).stdout
    assert f"{dev.name}: nothing to change" in said
    for stack, (_, node_port, size_mib) in zip(environments, ENVIRONMENTS, strict=True):
        volume = stack.volume()
        assert volume["rbd"]["monitors"] == stack.settings["storage"]["rbd"]["monitors"]
        assert volume["capacity"]["storage"] == f"{size_mib}Mi"
        assert stack.get("services/registry")["spec"]["ports"][0]["nodePort"] == node_port
        assert f"rbd/{stack.name} has {size_mib} MiB" in stack.ops("verify").stdout
