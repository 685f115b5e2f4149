"""A registry in the lab's cluster, and a client that pushes all the time and remembers what was acknowledged."""

import contextlib
import hashlib
import json
import os
import ssl
import subprocess
import threading
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import httpx

from lab.debian import LabError
from lab.nodes import CEPH_HOST, NODES, NodeLab
from tests.engine.stack import ROOT, Stack

MANIFEST = "application/vnd.oci.image.manifest.v1+json"
LAYER_BYTES = 64 << 10
PUSH_SECONDS = 10
NODE_PORT = 32500
READY_SECONDS = 300


@dataclass(frozen=True)
class Report:
    """A row of the table at the end: seconds or a count, and the most that it should be."""

    what: str
    value: float
    aim: float | None = None
    unit: str = "s"

    @property
    def measured(self) -> str:
        return f"{self.value:.0f} {self.unit}"

    @property
    def aimed(self) -> str:
        return "" if self.aim is None else f"{self.aim:.0f} {self.unit} at most"

    @property
    def verdict(self) -> str:
        return "" if self.aim is None else "ok" if self.value <= self.aim else "missed"


def wait_for(holds: Callable[[], Any], seconds: float = READY_SECONDS) -> float:
    """Wait until something is so, and return the seconds that it took."""
    begin = time.monotonic()
    while not holds():
        assert time.monotonic() < begin + seconds, f"not within {seconds} s"
        time.sleep(0.5)
    return time.monotonic() - begin


class LabRegistry(Stack):
    def __init__(self, folder: Path, lab: NodeLab) -> None:
        name = f"l{uuid.uuid4().hex[:10]}"
        super().__init__(name, folder, port=NODE_PORT)
        self.lab = lab
        self.environment["KUBECONFIG"] = str(lab.kubeconfig)
        nodes = [{"address": lab.node_address(number), "hostKey": lab.host_key(number)} for number in NODES]
        # It begins on node1, so that the Ceph host survives, and may go to the other.
        on_node1 = {"matchExpressions": [{"key": "kubernetes.io/hostname", "operator": "In", "values": ["node1"]}]}
        preferred = {"preferredDuringSchedulingIgnoredDuringExecution": [{"weight": 1, "preference": on_node1}]}
        self.settings = {
            "target": "kubernetes",
            "hostname": "registry.test",
            "image": {"repository": "test/lab", "nodes": nodes},
            "kubernetes": {"cpu": "1", "memory": "128Mi", "readyTimeoutSeconds": 600, "affinity": {"nodeAffinity": preferred}},
            "storage": {
                "rbd": {"monitors": lab.monitors, "image": name, "sizeMiB": 256, "host": nodes[CEPH_HOST - 1]},
            },
        }
        self.set_secret("sshPrivateKey", lab.private_key)
        self.api = lab.client()

    @property
    def rbd(self) -> dict[str, Any]:
        section: dict[str, Any] = self.settings["storage"]["rbd"]
        return section

    def up(self, *arguments: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        """Bring it up, and wait until every node's port leads to it: kube-proxy hears of a pod after `pulumi up` does."""
        run = super().up(*arguments, check=check)
        if run.returncode == 0:
            for node in NODES:
                with contextlib.closing(self.client_at(node)) as client:
                    wait_for(client.answers, 60)
        return run

    def pods(self) -> list[Any]:
        with contextlib.suppress(httpx.HTTPError):
            items = self.api.get("/api/v1/namespaces/default/pods?labelSelector=k8s-app%3Dregistry").json()["items"]
            return [pod for pod in items if "deletionTimestamp" not in pod["metadata"]]
        return []

    def is_ready(self, other_than: str = "") -> bool:
        """Tell whether a pod is ready, on a node other than the one given."""
        return any(
            condition["type"] == "Ready" and condition["status"] == "True"
            for pod in self.pods()
            for condition in pod["status"].get("conditions", [])
            if pod["spec"].get("nodeName") != other_than
        )

    def warnings(self, pod: str) -> str:
        items = self.api.get(f"/api/v1/namespaces/default/events?fieldSelector=involvedObject.name%3D{pod}").json()["items"]
        return " ".join(str(event["message"]) for event in items)

    def node(self) -> int:
        (pod,) = self.pods()
        return int(pod["spec"]["nodeName"].removeprefix("node"))

    def client_at(self, node: int) -> "Client":
        return Client(self, self.lab.node_address(node))

    def watchers(self) -> list[str]:
        """Return the addresses of the machines that have the image open."""
        found = json.loads(self.lab.rbd("status", f"rbd/{self.name}", "--format", "json"))["watchers"]
        return [str(watcher["address"]) for watcher in found]

    def filesystem_mib(self, node: int) -> int:
        """Return the size of the mounted filesystem."""
        device = self.lab.ssh(node, f"rbd device list | awk '/{self.name}/ {{print $NF}}'").strip()
        line = f"df -BM --output=size $(findmnt -rno TARGET --source {device} | head -n 1)"
        return int(self.lab.ssh(node, line).split()[-1].rstrip("M"))

    def check_filesystem(self, folder: Path) -> None:
        """Check the filesystem as it is left, by another client, after everybody has let go of it."""
        wait_for(lambda: not self.watchers(), 120)
        environment = {
            **os.environ,
            "PATH": f"{ROOT / 'lab'}:{os.environ['PATH']}",
            "CEPH_CONF": str(self.lab.folder / "ceph/ceph.conf"),
            "RBD_SHIM_DIR": str(folder / "mapped"),
        }

        def rbd(*arguments: str) -> str:
            command = ["rbd", *arguments]
            return subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout.strip()

        device = rbd("map", f"rbd/{self.name}")
        try:
            # The journal of a machine that died is played first, as the next mount would; then nothing may be wrong.
            subprocess.run(["/sbin/e2fsck", "-p", device], capture_output=True, check=False)
            done = subprocess.run(["/sbin/e2fsck", "-f", "-n", device], capture_output=True, text=True, check=False)
        finally:
            rbd("unmap", device)
        assert done.returncode == 0, done.stdout

    def remove(self) -> None:
        self.destroy(check=False)
        self.api.close()
        with contextlib.suppress(LabError):
            wait_for(lambda: not self.watchers(), 120)
            self.lab.rbd("rm", f"rbd/{self.name}", "--no-progress")


class Client:
    """A client of one node's port: it trusts the stack's authority, and asks for the registry by its name."""

    def __init__(self, registry: LabRegistry, address: str) -> None:
        outputs = registry.outputs()
        self._http = httpx.Client(
            base_url=f"https://{address}:{NODE_PORT}",
            verify=ssl.create_default_context(cadata=outputs["authorityCertificate"]),
            auth=(outputs["username"], outputs["password"]),
            headers={"Host": registry.address},
            timeout=PUSH_SECONDS,
            trust_env=False,
        )

    def _send(self, method: str, url: str, **options: Any) -> httpx.Response:
        request = self._http.build_request(method, url, extensions={"sni_hostname": "registry.test"}, **options)
        return self._http.send(request).raise_for_status()

    def _upload(self, content: bytes) -> str:
        digest = f"sha256:{hashlib.sha256(content).hexdigest()}"
        place = httpx.URL(self._send("POST", "/v2/lab/blobs/uploads/").headers["Location"])
        path = f"{place.raw_path.decode()}{'&' if place.query else '?'}digest={digest}"
        self._send("PUT", path, content=content, headers={"Content-Type": "application/octet-stream"})
        return digest

    def push(self, tag: str) -> str:
        """Push an image of one layer that nobody has, and return the manifest's digest once it is acknowledged."""
        content = os.urandom(LAYER_BYTES)
        config = json.dumps({"architecture": "amd64", "os": "linux", "rootfs": {"type": "layers", "diff_ids": []}}).encode()
        layer = {
            "mediaType": "application/vnd.oci.image.layer.v1.tar",
            "size": len(content),
            "digest": self._upload(content),
        }
        described = {
            "mediaType": "application/vnd.oci.image.config.v1+json",
            "size": len(config),
            "digest": self._upload(config),
        }
        manifest = json.dumps({"schemaVersion": 2, "mediaType": MANIFEST, "config": described, "layers": [layer]}).encode()
        self._send("PUT", f"/v2/lab/manifests/{tag}", content=manifest, headers={"Content-Type": MANIFEST})
        return f"sha256:{hashlib.sha256(manifest).hexdigest()}"

    def pull(self, digest: str) -> None:
        """Pull an image, and compare every byte with its digest."""
        manifest = self._send("GET", f"/v2/lab/manifests/{digest}", headers={"Accept": MANIFEST})
        assert f"sha256:{hashlib.sha256(manifest.content).hexdigest()}" == digest
        for part in (manifest.json()["config"], *manifest.json()["layers"]):
            content = self._send("GET", f"/v2/lab/blobs/{part['digest']}").content
            assert f"sha256:{hashlib.sha256(content).hexdigest()}" == part["digest"]

    def answers(self) -> bool:
        try:
            self._send("GET", "/v2/")
        except httpx.HTTPError:
            return False
        return True

    def serves(self, digest: str) -> bool:
        try:
            self.pull(digest)
        except httpx.HTTPError:
            return False
        return True

    def close(self) -> None:
        self._http.close()


class Pushing:
    """Pushes all the time through one node, in a thread of its own, and remembers what was acknowledged and what failed."""

    def __init__(self, client: Client) -> None:
        self._client = client
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run)
        self.acknowledged: list[str] = []
        self.failed: list[str] = []

    def _run(self) -> None:
        number = 0
        while not self._ended.is_set():
            number += 1
            try:
                self.acknowledged.append(self._client.push(f"t{number}"))
            except httpx.HTTPError as error:
                self.failed.append(repr(error))
                self._ended.wait(0.5)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._ended.set()
        self._thread.join()

    def lost(self, client: Client) -> list[str]:
        """Return what was acknowledged and is not there."""
        return [digest for digest in self.acknowledged if not client.serves(digest)]
