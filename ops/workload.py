"""What the cluster says of the registry: its pod, its Service, and why it does not serve."""

import contextlib
import json
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from ops.stack import OpsError

WARNINGS = 3
GONE_SECONDS = 60


def check(namespace: str, name: str) -> str:
    """Return in words that one pod is ready and that its Service leads to it.

    Raises:
        OpsError: it is not so; the text has the pod's own events.
    """
    with _core() as core:
        return _check(core, namespace, name)


@dataclass(frozen=True)
class Placement:
    """Where the registry's pod is, and how full its volume is."""

    pod: str | None
    node: str | None
    node_of: dict[str, str]
    """Names of nodes by their addresses."""
    used_bytes: int = 0
    capacity_bytes: int = 0
    """0 where the kubelet has not measured it, or may not be asked."""


def placement(namespace: str, name: str) -> Placement:
    """Return where the registry's pod is, with what the node's kubelet says of its volume.

    Raises:
        OpsError: the cluster cannot be asked.
    """
    with _core() as core:
        nodes = {
            address.address: node.metadata.name for node in core.list_node().items for address in node.status.addresses or []
        }
        pods = core.list_namespaced_pod(namespace, label_selector=f"k8s-app={name}").items
        current = [pod for pod in pods if pod.metadata.deletion_timestamp is None]
        if not current:
            return Placement(None, None, nodes)
        pod, node = current[0].metadata.name, current[0].spec.node_name
        return Placement(pod, node, nodes, *_measured(core, node, pod))


def _measured(core: Any, node: str | None, pod: str) -> tuple[int, int]:
    """Return the used and all bytes of the pod's volume.

    Source: https://kubernetes.io/docs/reference/instrumentation/node-metrics/
    """
    import kubernetes

    if node is None:
        return 0, 0
    try:
        summary = core.connect_get_node_proxy_with_path(node, "stats/summary", _preload_content=False)
    except kubernetes.client.ApiException:  # a right of its own, which not everyone has who may read pods
        return 0, 0
    for entry in json.loads(summary.data).get("pods") or []:
        for volume in entry.get("volume") or []:
            if entry["podRef"]["name"] == pod and volume["name"] == "images":
                return volume.get("usedBytes", 0), volume.get("capacityBytes", 0)
    return 0, 0


@contextlib.contextmanager
def _core() -> Iterator[Any]:
    """The cluster's API; what goes wrong with it is told in words."""
    import kubernetes
    import urllib3

    try:
        kubernetes.config.load_kube_config()
        yield kubernetes.client.CoreV1Api()
    except kubernetes.config.ConfigException as error:
        raise OpsError(f"There is no kubeconfig for the cluster: {error}.", "Set KUBECONFIG.") from None
    except urllib3.exceptions.HTTPError as error:
        host = kubernetes.client.Configuration.get_default_copy().host
        raise OpsError(f"The cluster at {host} cannot be reached: {error}.", "See whether KUBECONFIG is right.") from None
    except kubernetes.client.ApiException as error:
        raise OpsError(f"The cluster refused: {error.status} {error.reason}.", "Ask for the right to read it.") from None


def remove_unrecorded(inputs: dict[str, Any]) -> bool:
    """Delete an object whose creation was cut off, and wait until it is gone; return whether it was there.

    An object of that name with other labels is somebody else's, and is left alone.
    """
    import kubernetes

    kubernetes.config.load_kube_config()
    client = kubernetes.dynamic.DynamicClient(kubernetes.client.ApiClient())
    kind = client.resources.get(api_version=inputs["apiVersion"], kind=inputs["kind"])
    name, namespace = inputs["metadata"]["name"], inputs["metadata"].get("namespace")
    if (live := _live(kind, name, namespace)) is None:
        return False
    ours = inputs["metadata"].get("labels", {})
    if not ours or not ours.items() <= live["metadata"].get("labels", {}).items():
        return False
    kind.delete(name=name, namespace=namespace, body={"propagationPolicy": "Foreground"})
    deadline = time.monotonic() + GONE_SECONDS
    while _live(kind, name, namespace) is not None:
        if time.monotonic() > deadline:
            raise OpsError(f"{inputs['kind']} {name} does not go away.", "See what holds it, then run this again.")
        time.sleep(0.2)
    return True


def _live(kind: Any, name: str, namespace: str | None) -> dict[str, Any] | None:
    import kubernetes

    try:
        found: dict[str, Any] = kind.get(name=name, namespace=namespace).to_dict()
    except kubernetes.dynamic.exceptions.NotFoundError:
        return None
    return found


def _check(core: Any, namespace: str, name: str) -> str:
    import kubernetes

    try:
        controller = core.read_namespaced_replication_controller(name, namespace)
        service = core.read_namespaced_service(name, namespace)
    except kubernetes.client.ApiException as error:
        if error.status != 404:
            raise
        raise OpsError(f"{namespace} has no registry {name}: it is gone.", "Run `pulumi up --refresh`.") from None
    selector = ",".join(f"{key}={value}" for key, value in controller.spec.selector.items())
    pods = core.list_namespaced_pod(namespace, label_selector=selector).items
    ready = [pod for pod in pods if _is_ready(pod)]
    if controller.spec.replicas == 0:
        raise OpsError(f"{name} is scaled to 0.", "Run `pulumi up --refresh`.")
    if not ready:
        said = "\n".join(line for pod in pods for line in _explained(core, pod)) or "There is no pod."
        raise OpsError(f"{name} has no ready pod in {namespace}.\n{said}", _mend(said))
    endpoints = core.read_namespaced_endpoints(name, namespace)
    if not any(subset.addresses for subset in endpoints.subsets or []):
        raise OpsError(f"The Service {name} leads to no pod.", "Its selector was changed: run `pulumi up --refresh`.")
    pod, port = ready[0], service.spec.ports[0].node_port
    restarts = pod.status.container_statuses[0].restart_count
    return f"{pod.metadata.name} is ready on {pod.spec.node_name}, {restarts} restarts, node port {port}"


def _is_ready(pod: Any) -> bool:
    conditions = pod.status.conditions or []
    return pod.metadata.deletion_timestamp is None and any(
        condition.type == "Ready" and condition.status == "True" for condition in conditions
    )


def _explained(core: Any, pod: Any) -> list[str]:
    """Return a pod's phase, what its container waits for, and its last warnings, a line each."""
    own = pod.metadata.name
    ending = ", on its way out" if pod.metadata.deletion_timestamp else ""
    lines = [f"{own}: {pod.status.phase}{ending}"]
    for status in pod.status.container_statuses or []:
        if (waiting := status.state.waiting) is not None:
            lines.append(f"{own}: {waiting.reason}: {waiting.message or ''}".rstrip(": "))
        if (last := status.last_state.terminated) is not None:
            lines.append(f"{own}: ended with exit code {last.exit_code} ({last.reason})")
    fields = f"involvedObject.name={own},type=Warning"
    warnings = core.list_namespaced_event(pod.metadata.namespace, field_selector=fields).items
    return lines + [f"{own}: {event.reason}: {event.message}" for event in warnings[-WARNINGS:]]


def _mend(said: str) -> str:
    if "ImagePull" in said or "ErrImage" in said:
        return "The node cannot pull the image: see whether it reaches and trusts image.pushTo, and may pull from it."
    if "FailedScheduling" in said:
        return "No node takes the pod: lower kubernetes.cpu or memory, or see kubernetes.nodeSelector."
    if "FailedMount" in said or "FailedAttach" in said:
        return "The volume cannot be mounted: see the claim and whether another node still holds it."
    return "See what the registry says: `kubectl logs`."
