"""The lab's Kubernetes clusters, for real: root on Debian, and a Docker daemon that has the registry's base image."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import pytest

from lab import dockerd
from lab.boxes import CGROUPS, ENVIRONMENT
from lab.debian import LabError, can_install
from lab.kubernetes import Cluster
from toolchain.programs import KUBERNETES_VERSION, ROOT

pytestmark = [
    pytest.mark.skipif(not can_install(), reason="the lab's Kubernetes needs root on Debian"),
    pytest.mark.timeout(300),
    pytest.mark.xdist_group("lab_kubernetes"),
]
WAIT_SECONDS = 60
REGISTRY_CONFIGURATION = json.dumps(
    {"version": "0.1", "storage": {"inmemory": {}}, "http": {"addr": ":5000"}, "log": {"level": "warn"}}
)
SERVE = f"echo '{REGISTRY_CONFIGURATION}' >/c.yml; exec registry serve /c.yml"


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """A cluster that is no other test run's and not the checkout's, in whatever state the test before left it."""
    cluster = Cluster(tmp_path_factory.mktemp("kubernetes") / "lab")
    try:
        yield cluster
    finally:
        cluster.down()


@pytest.fixture
def cluster(shared: Cluster, docker_host: str) -> Cluster:
    """A cluster of two nodes that has the registry's image."""
    shared.up(nodes=2)
    loaded = shared.folder / "loaded"  # `down` removes it with the images
    if not loaded.exists():
        shared.load_image(docker_host, dockerd.BASE_IMAGE)
        loaded.touch()
    return shared


@pytest.fixture
def api(cluster: Cluster) -> Iterator[httpx.Client]:
    with cluster.client() as client:
        yield client


def create(api: httpx.Client, kind: str, name: str, spec: dict[str, Any]) -> None:
    metadata = {"name": name, "labels": {"app": name}}
    api.post(f"/api/v1/namespaces/default/{kind}", json={"metadata": metadata, "spec": spec}).raise_for_status()


def read(api: httpx.Client, kind: str, name: str) -> Any:
    return api.get(f"/api/v1/namespaces/default/{kind}/{name}").raise_for_status().json()


def run_pod(api: httpx.Client, name: str, node: str, script: str, claim: str = "") -> None:
    container: dict[str, Any] = {"name": "main", "image": dockerd.BASE_IMAGE, "imagePullPolicy": "Never"}
    container["command"] = ["sh", "-c", script]
    spec = {"nodeName": node, "restartPolicy": "Never", "terminationGracePeriodSeconds": 0, "containers": [container]}
    if claim:
        container["volumeMounts"] = [{"name": "data", "mountPath": "/data"}]
        spec["volumes"] = [{"name": "data", "persistentVolumeClaim": {"claimName": claim}}]
    create(api, "pods", name, spec)


def expose(api: httpx.Client, name: str) -> tuple[str, int]:
    """Make a service for the pod of that name, and return its address and node port."""
    create(api, "services", name, {"type": "NodePort", "selector": {"app": name}, "ports": [{"port": 5000}]})
    spec = read(api, "services", name)["spec"]
    return spec["clusterIP"], spec["ports"][0]["nodePort"]


def asking(target: str) -> str:
    """Return the command that asks a registry, by nc: the wget of Debian's busybox crashes."""
    address, _, port = target.rpartition(":")
    return f"printf 'GET /v2/ HTTP/1.0\\r\\n\\r\\n' | nc -w 5 {address} {port}"


def eventually(what: str, value: Callable[[], Any], expected: Any) -> None:
    deadline = time.monotonic() + WAIT_SECONDS
    while (found := value()) != expected:
        assert time.monotonic() < deadline, f"{what}: {found!r}, not {expected!r}"
        time.sleep(0.05)


def phase(api: httpx.Client, name: str) -> Any:
    return read(api, "pods", name)["status"].get("phase")


def succeeds(api: httpx.Client, name: str) -> str:
    """Wait for the end of a pod, and return what it said."""
    eventually(f"the end of {name}", lambda: phase(api, name) in ("Succeeded", "Failed"), True)
    log = api.get(f"/api/v1/namespaces/default/pods/{name}/log").text
    assert phase(api, name) == "Succeeded", log
    return log


def answer(url: str) -> int | str:
    try:
        return httpx.get(url, timeout=5, trust_env=False).status_code
    except httpx.HTTPError as error:
        return repr(error)


def processes(cluster: Cluster) -> dict[tuple[str, str], int | None]:
    return {(process.box, process.name): process.pid for process in cluster.status()}


def network_namespaces() -> dict[str, str]:
    """Return the network namespace of every process that has not just ended."""
    found = {}
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            found[process.name] = str((process / "ns/net").readlink())
    return found


def assert_nothing_is_left(cluster: Cluster) -> None:
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            command = (process / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
            assert str(cluster.folder) not in command
            assert cluster.name not in (process / "cgroup").read_text()
    assert str(cluster.folder) not in Path("/proc/self/mountinfo").read_text()
    for state in (["ip", "link"], ["ip", "route"], ["ip", "netns"], ["iptables-save"]):
        said = subprocess.run(state, env=ENVIRONMENT, capture_output=True, text=True, check=True).stdout
        assert cluster.name not in said
    assert not list(CGROUPS.rglob(cluster.name))
    assert not cluster.folder.exists()


def test_both_nodes_are_ready_and_say_the_version_that_the_module_pins(api: httpx.Client) -> None:
    nodes = api.get("/api/v1/nodes").raise_for_status().json()["items"]
    ready = {
        node["metadata"]["name"]: condition["status"]
        for node in nodes
        for condition in node["status"]["conditions"]
        if condition["type"] == "Ready"
    }
    assert ready == {"node1": "True", "node2": "True"}
    assert {node["status"]["nodeInfo"]["kubeletVersion"] for node in nodes} == {f"v{KUBERNETES_VERSION}"}


def test_a_pod_runs_from_a_loaded_image_without_a_pull_and_its_log_can_be_read(api: httpx.Client) -> None:
    run_pod(api, "speaks", "node1", "echo it runs")
    assert succeeds(api, "speaks") == "it runs\n"


def test_a_node_port_of_a_pod_on_node_2_answers_through_node_1_and_through_node_2(cluster: Cluster, api: httpx.Client) -> None:
    run_pod(api, "web", "node2", SERVE)
    _, port = expose(api, "web")
    for number in (1, 2):
        url = f"http://{cluster.node_address(number)}:{port}/v2/"
        eventually(url, partial(answer, url), httpx.codes.OK)


def test_a_pod_reaches_a_pod_of_the_other_node_by_its_address_its_service_and_every_node_port(
    cluster: Cluster, api: httpx.Client
) -> None:
    run_pod(api, "asked", "node2", SERVE)
    service, port = expose(api, "asked")
    eventually("asked", lambda: answer(f"http://{cluster.node_address(1)}:{port}/v2/"), httpx.codes.OK)
    pod = read(api, "pods", "asked")["status"]["podIP"]
    targets = [f"{pod}:5000", f"{service}:5000", *(f"{cluster.node_address(number)}:{port}" for number in (1, 2))]
    run_pod(api, "asks", "node1", "; ".join(asking(target) for target in targets))
    assert succeeds(api, "asks").count("200 OK") == len(targets)


def test_a_pod_reaches_itself_through_its_own_service(api: httpx.Client) -> None:
    service, _ = expose(api, "itself")
    ask = f"until {asking(f'{service}:5000')} | grep '200 OK'; do sleep 1; done"
    run_pod(api, "itself", "node2", f"({SERVE}) & {ask}")
    succeeds(api, "itself")


def test_what_a_pod_writes_to_a_claim_of_the_default_class_a_pod_on_the_other_node_reads(api: httpx.Client) -> None:
    wanted = {"accessModes": ["ReadWriteOnce"], "resources": {"requests": {"storage": "1Gi"}}}
    create(api, "persistentvolumeclaims", "kept", wanted)
    run_pod(api, "writes", "node1", "echo kept >/data/file", claim="kept")
    succeeds(api, "writes")
    run_pod(api, "reads", "node2", "cat /data/file", claim="kept")
    assert succeeds(api, "reads") == "kept\n"


def test_up_a_second_time_starts_nothing_twice(cluster: Cluster) -> None:
    before = processes(cluster)
    cluster.up(nodes=2)
    assert processes(cluster) == before
    assert all(before.values())


def test_up_starts_again_what_has_ended_and_a_node_that_has_died(cluster: Cluster, api: httpx.Client) -> None:
    before = processes(cluster)
    scheduler = before["control", "kube-scheduler"]
    assert scheduler is not None
    os.kill(scheduler, signal.SIGKILL)
    cluster.node(2).close()
    cluster.up(nodes=2)
    after = processes(cluster)
    assert after.keys() == before.keys()
    assert all(after.values())
    changed = {key for key, pid in after.items() if pid != before[key]}
    assert changed == {("control", "kube-scheduler")} | {key for key in after if key[0] == "node2"}
    run_pod(api, "again", "node2", "true")
    succeeds(api, "again")


def test_an_image_that_the_docker_daemon_does_not_have_is_named(cluster: Cluster, docker_host: str) -> None:
    with pytest.raises(LabError, match="no-such-image:1 cannot be had from"):
        cluster.load_image(docker_host, "no-such-image:1")


def test_a_program_that_ends_at_once_is_named_with_what_it_said_last(cluster: Cluster) -> None:
    box = cluster.control()
    box.start("ends", "sh", "-c", "echo the reason; exit 1")
    with pytest.raises(LabError, match=r"control: nothing: ends ended\nends: the reason"):
        box.wait("nothing", lambda: False, WAIT_SECONDS, "ends")
    box.program("ends").file.unlink()


def test_down_leaves_no_process_mount_link_route_iptables_rule_namespace_control_group_or_file(
    cluster: Cluster, api: httpx.Client
) -> None:
    run_pod(api, "stays", "node1", "sleep 3600")
    eventually("phase", lambda: phase(api, "stays"), "Running")
    with contextlib.ExitStack() as kept:
        # While they are open no other namespace gets their numbers, such as that of a container which just starts.
        boxes = (cluster.control(), cluster.node(1), cluster.node(2))
        opened = [kept.enter_context(Path(f"/proc/{box.first.child}/ns/net").open("rb")) for box in boxes]
        namespaces = {f"net:[{os.fstat(file.fileno()).st_ino}]" for file in opened}
        assert namespaces < set(network_namespaces().values())
        assert cluster.down()
        assert namespaces.isdisjoint(network_namespaces().values())
    assert_nothing_is_left(cluster)
    assert not cluster.down()


@pytest.mark.parametrize("last", ["network", "control/pid/box", "control/pid/kube-apiserver", "node1/pid/kubelet"])
def test_down_leaves_nothing_of_an_up_that_was_killed_half_way(tmp_path: Path, last: str) -> None:
    cluster = Cluster(tmp_path / "lab")
    script = "import sys, pathlib, lab.kubernetes; lab.kubernetes.Cluster(pathlib.Path(sys.argv[1])).up()"
    half = subprocess.Popen([sys.executable, "-c", script, str(cluster.folder)], cwd=ROOT, stderr=subprocess.DEVNULL)
    try:
        eventually(last, (cluster.folder / last).exists, True)
    finally:
        half.kill()
        half.wait()
        assert cluster.down()
    assert_nothing_is_left(cluster)
