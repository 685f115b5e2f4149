"""A registry on an RBD image in a cluster whose nodes have no kernel client: what the API server, the engine and verify say.

That nodes mount it is in `tests/lab`, on nodes that have one.
"""

import contextlib
import copy
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from lab.ceph import Ceph
from lab.kubernetes import Cluster
from lab.sshd import SshServer
from tests.engine.kubernetes_stack import KubernetesStack, new_kubernetes_stack
from tests.engine.stack import wait_for

pytestmark = pytest.mark.xdist_group("kubernetes")
TABLE = (Path(__file__).parent.parent.parent / "docs/changes.md").read_text().split("## On a Ceph RBD image")[1]
# The pod never starts here, and the engine updates what failed at the next run.
WAITING = {"registry": "update"}
POINTERS = {"registry-rbd": "replace", "registry": "replace"}
CHANGES: dict[str, tuple[Any, dict[str, str]]] = {
    "storage.rbd.sizeMiB": (128, {**WAITING, "volume": "update", "registry-rbd": "update"}),
    "storage.rbd.monitors": (["10.149.149.2:6789"], POINTERS),
    "storage.rbd.user": ("other", {**POINTERS, "volume-user": "update", "registry-ceph": "replace"}),
    "storage.rbd.mount": ("inline", {"registry-rbd": "delete", "registry": "replace"}),
    "storage.rbd.format": ("host", {**WAITING, "volume": "update"}),
    "storage.rbd.adopt": (True, {**WAITING, "volume": "update"}),
    "storage.onDestroy": ("trash", {**WAITING, "volume": "update"}),
}
ELSEWHERE = {
    "storage.rbd.pool",
    "storage.rbd.image",
    "storage.rbd.host",
    "storage.rbd.driver",
    "storage.rbd.csi",
    "storage.trashDays",
}


@contextlib.contextmanager
def rbd_stack(folder: Path, lab_cluster: Cluster, hub: str, ceph: Ceph, ceph_host: SshServer) -> Iterator[KubernetesStack]:
    with new_kubernetes_stack(folder, lab_cluster, hub) as made:
        image = {"monitors": [ceph.monitor], "image": made.name, "sizeMiB": 64, "user": made.name, "host": ceph_host.settings}
        made.settings["storage"] = {"rbd": image}
        made.set("kubernetes", readyTimeoutSeconds=15)
        made.set_secret("sshPrivateKey", ceph_host.private_key)
        yield made


@pytest.fixture(scope="module")
def waiting(
    tmp_path_factory: pytest.TempPathFactory, lab_cluster: Cluster, hub: str, ceph: Ceph, ceph_host: SshServer
) -> Iterator[KubernetesStack]:
    """A stack whose pod waits for its volume, shared by the tests that do not change it."""
    with rbd_stack(tmp_path_factory.mktemp("waiting"), lab_cluster, hub, ceph, ceph_host) as made:
        run = made.up(check=False)
        assert run.returncode != 0
        yield made


def persistent_volume(stack: KubernetesStack) -> Any:
    volumes = stack.api.get("/api/v1/persistentvolumes").json()["items"]
    (volume,) = [found for found in volumes if found["spec"].get("rbd", {}).get("image") == stack.name]
    return volume


def test_the_claim_is_bound_to_the_volume_of_the_image(waiting: KubernetesStack) -> None:
    (claim,) = waiting.get("persistentvolumeclaims")["items"]
    volume = persistent_volume(waiting)
    assert claim["status"] == {**claim["status"], "phase": "Bound", "capacity": {"storage": "64Mi"}}
    assert volume["spec"]["claimRef"]["name"] == claim["metadata"]["name"]
    (mounted,) = [entry for entry in waiting.pod()["spec"]["volumes"] if entry["name"] == "images"]
    assert mounted["persistentVolumeClaim"]["claimName"] == claim["metadata"]["name"]


def test_the_ceph_users_key_is_a_secret_that_the_driver_reads(waiting: KubernetesStack) -> None:
    secret = waiting.get("secrets/registry-ceph")
    assert secret["type"] == "kubernetes.io/rbd"
    assert list(secret["data"]) == ["key"]


def steps_after(stack: KubernetesStack, setting: str, value: Any) -> dict[str, str]:
    kept = copy.deepcopy(stack.settings)
    *path, last = setting.split(".")
    section = stack.settings
    for step in path:
        section = section[step]
    section[last] = value
    try:
        return stack.steps()
    finally:
        stack.settings = kept


@pytest.mark.parametrize("setting", CHANGES)
def test_a_change_does_what_the_table_says(setting: str, waiting: KubernetesStack) -> None:
    value, expected = CHANGES[setting]
    assert steps_after(waiting, setting, value) == expected


def test_every_row_of_the_table_is_asked() -> None:
    rows = [row.split("|")[1] for row in TABLE.splitlines() if row.startswith("| `")]
    named = {setting for row in rows for setting in re.findall("`(.+?)`", row)}
    assert named - ELSEWHERE == set(CHANGES)


def test_the_driver_that_the_cluster_does_not_have_is_refused_by_the_preview(waiting: KubernetesStack) -> None:
    with pytest.raises(AssertionError, match="must have a CSIDriver of that name"):
        steps_after(waiting, "storage.rbd.csi", {"clusterId": "a"})


def test_verify_says_which_machine_a_waiting_pod_waits_for(waiting: KubernetesStack, ceph: Ceph) -> None:
    waiting.environment.update(ceph.environment)
    device = waiting.run("rbd", "map", f"rbd/{waiting.name}").stdout.strip()
    try:
        said = waiting.ops("verify", check=False).stdout
    finally:
        waiting.run("rbd", "unmap", device)
    assert f"waits for rbd/{waiting.name}, which is open at 127.0.0.1" in said
    assert "ceph osd blocklist add 127.0.0.1:0/" in said


def test_verify_says_that_an_image_is_gone(
    tmp_path: Path, lab_cluster: Cluster, hub: str, ceph: Ceph, ceph_host: SshServer
) -> None:
    with rbd_stack(tmp_path, lab_cluster, hub, ceph, ceph_host) as stack:
        stack.up(check=False)
        ceph.rbd("rm", f"rbd/{stack.name}")
        said = stack.ops("verify", check=False).stdout
    assert f"The RBD image rbd/{stack.name} is gone" in said
    assert "rbd trash ls rbd" in said


def test_growing_is_the_image_and_the_volumes_capacity(
    tmp_path: Path, lab_cluster: Cluster, hub: str, ceph: Ceph, ceph_host: SshServer
) -> None:
    with rbd_stack(tmp_path, lab_cluster, hub, ceph, ceph_host) as stack:
        stack.up(check=False)
        before = persistent_volume(stack)["metadata"]["uid"]
        stack.settings["storage"]["rbd"]["sizeMiB"] = 128
        stack.up(check=False)
        volume = persistent_volume(stack)
        assert (volume["spec"]["capacity"]["storage"], volume["metadata"]["uid"]) == ("128Mi", before)
        stack.destroy()
        wait_for(lambda: not stack.get("persistentvolumeclaims")["items"])
