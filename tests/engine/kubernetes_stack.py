"""A stack with the registry in a cluster: a namespace and a node port of its own, and a hub to be pushed to."""

import contextlib
import json
import os
import subprocess
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import docker
import httpx

from lab.kubernetes import Cluster
from lab.ports import free_port
from tests.engine.given_cluster import GivenCluster
from tests.engine.stack import ROOT, Stack, wait_for


class Hub:
    """A plain registry on the Docker host, from which the nodes of a cluster pull the registry's own image."""

    def __init__(self, daemon: docker.DockerClient, cluster: Cluster | None = None) -> None:
        # Docker takes a registry on 127.0.0.1 without TLS; the nodes reach it by the host's address in their network.
        self.port = free_port()
        self.address = f"127.0.0.1:{self.port}"
        hosts = ["127.0.0.1", *([] if cluster is None else [cluster.host_address])]
        ports: Any = {"5000/tcp": [(host, self.port) for host in hosts]}
        command = ["-c", f"echo '{self._configuration()}' >/c.yml; exec registry serve /c.yml"]
        self._container = daemon.containers.run("registry:3.1.2", command, entrypoint="sh", detach=True, ports=ports)
        try:
            wait_for(self._answers)
        except BaseException:
            self.close()
            raise
        if cluster is None:
            return
        for folder in cluster.registries():
            (folder / self.address).mkdir(parents=True)
            server = f"http://{cluster.host_address}:{self.port}"
            entry = f'server = "{server}"\n[host."{server}"]\ncapabilities = ["pull", "resolve"]\n'
            (folder / self.address / "hosts.toml").write_text(entry)

    def _answers(self) -> bool:
        try:
            return httpx.get(f"http://{self.address}/v2/", trust_env=False).is_success
        except httpx.HTTPError:
            return False

    @staticmethod
    def _configuration() -> str:
        return json.dumps({"version": "0.1", "storage": {"inmemory": {}}, "http": {"addr": ":5000"}})

    def close(self) -> None:
        self._container.remove(force=True, v=True)


class KubernetesStack(Stack):
    def __init__(self, name: str, folder: Path, cluster: Cluster | GivenCluster, hub: str, *, node_port: int) -> None:
        super().__init__(name, folder, port=node_port)
        self.cluster = cluster
        self.settings = {
            "target": "kubernetes",
            "hostname": self.hostname,
            "kubernetes": {
                "namespace": name,
                "nodePort": node_port,
                "cpu": "500m",
                "memory": "128Mi",
                "readyTimeoutSeconds": 60,
                "tolerationSeconds": 5,
            },
            "storage": {"claim": {"sizeGiB": 1}},
            "image": {"repository": f"test/{name}", "pushTo": hub},
            "trust": {"docker": True},
        }
        self.environment["KUBECONFIG"] = str(cluster.kubeconfig)
        self.api = cluster.client()
        self.namespace = f"/api/v1/namespaces/{name}"
        body = {"metadata": {"name": name}}
        self.api.post("/api/v1/namespaces", json=body).raise_for_status()
        if isinstance(cluster, Cluster):
            self.settings["storage"]["claim"]["className"] = name
            self._make_volume(name, cluster.folder / "volumes" / name)
        self._trust_script("install", RESOLVE_TO=self.node_addresses()[0])

    def _make_volume(self, name: str, folder: Path) -> None:
        """Make a volume for the stack's claim: a folder that both nodes see, for the registry's user."""
        folder.mkdir(parents=True)
        os.chown(folder, 1000, 1000)
        spec = {
            "storageClassName": name,
            "capacity": {"storage": "1Gi"},
            "accessModes": ["ReadWriteOnce"],
            "persistentVolumeReclaimPolicy": "Retain",
            "hostPath": {"path": str(folder)},
        }
        self.api.post("/api/v1/persistentvolumes", json={"metadata": {"name": name}, "spec": spec}).raise_for_status()

    def _trust_script(self, verb: str, **environment: str) -> None:
        subprocess.run(
            [str(ROOT / "hosts/trust.sh"), verb],
            env={
                **os.environ,
                "STACK": f"tests/{self.name}",
                "REGISTRY": f"{self.hostname}:0",
                "ENTRY": "tests",
                "RUNTIME": "none",
                **environment,
            },
            stdin=subprocess.DEVNULL,
            check=True,
        )

    def get(self, path: str) -> Any:
        """Return an object of the stack's namespace, such as ``pods`` or ``services/registry``."""
        return self.api.get(f"{self.namespace}/{path}").raise_for_status().json()

    def node_addresses(self) -> list[str]:
        """Return the addresses of all nodes of the cluster."""
        nodes = self.api.get("/api/v1/nodes").raise_for_status().json()["items"]
        found = [entry for node in nodes for entry in node["status"]["addresses"]]
        return [entry["address"] for entry in found if entry["type"] == "InternalIP"]

    def pods(self) -> list[Any]:
        """Return the registry's pods that are not on their way out."""
        pods = self.get("pods?labelSelector=k8s-app%3Dregistry")["items"]
        return [pod for pod in pods if "deletionTimestamp" not in pod["metadata"]]

    def pod(self) -> Any:
        (found,) = self.pods()
        return found

    def pod_name(self) -> str:
        """Return the name of the registry's pod; empty while there is none."""
        return next((str(pod["metadata"]["name"]) for pod in self.pods()), "")

    def is_ready(self) -> bool:
        return any(
            condition == {**condition, "type": "Ready", "status": "True"}
            for pod in self.pods()
            for condition in pod["status"].get("conditions", [])
        )

    def remove(self) -> None:
        """Ask for the end of all that the stack has; the cluster does the rest in its own time."""
        with contextlib.suppress(httpx.HTTPError):
            self.api.delete(self.namespace)
            if isinstance(self.cluster, Cluster):
                self.api.delete(f"/api/v1/persistentvolumes/{self.name}")
        self.api.close()
        self._trust_script("remove")


_ports = iter(range(30100 + os.getpid() % 20 * 100, 32500))


@contextlib.contextmanager
def new_kubernetes_stack(folder: Path, cluster: Cluster | GivenCluster, hub: str) -> Iterator[KubernetesStack]:
    stack = KubernetesStack(f"k{uuid.uuid4().hex[:10]}", folder, cluster, hub, node_port=next(_ports))
    try:
        yield stack
    finally:
        stack.remove()
        stack.remove_trust()
