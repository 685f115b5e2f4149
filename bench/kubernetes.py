"""`python -m bench.kubernetes`: what the stack in a cluster costs over the floors of Kubernetes and of the engine."""

import json
import statistics
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import docker
import httpx
import typer
from rich.console import Console
from rich.table import Table

from bench.__main__ import empty_program, seconds, sub_folder, use_lab_docker
from lab.kubernetes import Cluster
from tests.engine.kubernetes_stack import Hub, KubernetesStack, new_kubernetes_stack
from tests.engine.stack import wait_for

REQUEST_SECONDS = 0.05
console = Console()


class Requests:
    """A request every 50 ms, and the longest time in which none was answered."""

    def __init__(self, stack: KubernetesStack) -> None:
        self._url = f"https://{stack.node_addresses()[0]}:{stack.port}/"
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run)
        self.gap = 0.0

    def _answers(self) -> bool:
        try:
            # Whether it serves is asked here; who it is, `ops verify` asks.
            return httpx.get(self._url, verify=False, timeout=1, trust_env=False).is_success  # noqa: S501
        except httpx.HTTPError:
            return False

    def _run(self) -> None:
        answered = time.monotonic()
        while not self._stop.wait(REQUEST_SECONDS):
            if self._answers():
                self.gap = max(self.gap, time.monotonic() - answered)
                answered = time.monotonic()

    def __enter__(self) -> "Requests":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        try:
            wait_for(self._answers)
            time.sleep(1)  # so that the thread has seen the end of the gap
        finally:
            self._stop.set()
            self._thread.join()


def _gaps(stack: KubernetesStack, runs: int) -> Iterator[tuple[str, float]]:
    changes: dict[str, list[dict[str, Any]]] = {
        "image": [{"tag": f"3.1.2-{run}"} for run in range(runs)],
        "certificate": [{"validityDays": 100 + run} for run in range(runs)],
    }
    for section, values in changes.items():
        gaps = []
        for value in values:
            stack.set(section, **value)
            with Requests(stack) as requests:
                stack.up()
            gaps.append(requests.gap)
        yield section, statistics.median(gaps)


def _objects(stack: KubernetesStack) -> list[dict[str, Any]]:
    """Return the objects that the stack made, as it asked for them, in the order in which it made them."""
    exported = json.loads(stack.pulumi("stack", "export", "--show-secrets", "--stack", stack.name).stdout)
    inputs = [entry["inputs"] for entry in exported["deployment"]["resources"] if entry["type"].startswith("kubernetes:")]
    return [_plain(item) for item in inputs]


def _plain(value: Any) -> Any:
    """Take the state's marks of secrets away."""
    if isinstance(value, dict):
        if "plaintext" in value:
            return json.loads(value["plaintext"])
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, list) else value


def _apply(stack: KubernetesStack, objects: list[dict[str, Any]]) -> None:
    """Do what `kubectl apply --server-side` does with the same objects, and wait for the pod to be ready."""
    paths = {
        "Secret": "api/v1/{}/secrets",
        "ConfigMap": "api/v1/{}/configmaps",
        "Service": "api/v1/{}/services",
        "PersistentVolumeClaim": "api/v1/{}/persistentvolumeclaims",
        "ReplicationController": "api/v1/{}/replicationcontrollers",
        "Job": "apis/batch/v1/{}/jobs",
        "NetworkPolicy": "apis/networking.k8s.io/v1/{}/networkpolicies",
    }
    for item in objects:
        path = paths[item["kind"]].format(f"namespaces/{stack.name}") + f"/{item['metadata']['name']}"
        parameters = {"fieldManager": "bench", "force": "true"}
        headers = {"Content-Type": "application/apply-patch+yaml"}
        stack.api.patch(f"/{path}", content=json.dumps(item), params=parameters, headers=headers).raise_for_status()
    wait_for(stack.is_ready)


def main(runs: Annotated[int, typer.Option(help="Runs of each kind.")] = 5) -> None:
    """Measure, and print a table with the ratios."""
    use_lab_docker()
    table = Table("measured", "ours", "floor", "ratio", title="medians in one run")
    with tempfile.TemporaryDirectory() as folder:
        cluster = Cluster(Path(folder) / "lab")
        try:
            cluster.up(nodes=2)
            hub = Hub(docker.from_env(), cluster)
            try:
                with new_kubernetes_stack(sub_folder(folder, "stack"), cluster, hub.address) as stack:
                    _measure(stack, folder, runs, table)
            finally:
                hub.close()
        finally:
            cluster.down()
    console.print(table)


def _measure(stack: KubernetesStack, folder: str, runs: int, table: Table) -> None:
    stack.up()
    objects = _objects(stack)
    empty = empty_program(sub_folder(folder, "empty"), stack)
    ups, applies, previews, floors = [], [], [], []
    for _ in range(runs):
        stack.destroy()
        ups.append(seconds(stack.up))
        previews.append(seconds(stack.preview))
        floors.append(seconds(lambda: empty("preview")))
        stack.destroy()
        applies.append(seconds(lambda: _apply(stack, objects)))
        _delete(stack)
    for name, ours, floor in (
        ("first up, against apply of the same objects", ups, applies),
        ("preview, against an empty program's", previews, floors),
    ):
        one, other = statistics.median(ours), statistics.median(floor)
        table.add_row(name, f"{one:.2f} s", f"{other:.2f} s", f"{one / other:.2f}")
    stack.up()
    for name, gap in _gaps(stack, runs):
        table.add_row(f"gap in service, change of the {name}", f"{gap:.2f} s", "", "")


def _delete(stack: KubernetesStack) -> None:
    for group, kind in (
        ("api/v1", "replicationcontrollers"),
        ("apis/batch/v1", "jobs"),
        ("api/v1", "secrets"),
        ("api/v1", "configmaps"),
        ("apis/networking.k8s.io/v1", "networkpolicies"),
    ):
        parameters = {"propagationPolicy": "Foreground"}
        stack.api.delete(f"/{group}/namespaces/{stack.name}/{kind}", params=parameters).raise_for_status()
    stack.api.delete(f"{stack.namespace}/services/registry").raise_for_status()
    wait_for(lambda: not stack.get("pods")["items"] and not stack.get("secrets")["items"])


if __name__ == "__main__":
    typer.run(main)
