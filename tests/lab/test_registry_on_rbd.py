"""The registry on an RBD image that nodes mount by their kernel: growth in use, and the deaths of nodes."""

import time
from pathlib import Path

import pytest

from lab.nodes import NodeLab
from tests.lab.registry import LabRegistry, Pushing, Report, wait_for

FAILOVER_AIM, GROWTH_AIM = 70, 60
FAILOVER_RUNS = 5
MOUNTS = pytest.mark.parametrize("mount", ["claim", "inline"])


def failed_over(registry: LabRegistry, kept: str, begin: float) -> float:
    """Wait until the other node serves what was pushed before, and return the seconds since the beginning."""
    client = registry.client_at(2)
    wait_for(lambda: client.serves(kept))
    client.close()
    return time.monotonic() - begin


@MOUNTS
def test_the_image_is_mounted_by_the_nodes_kernel_and_outlives_the_pod(registry: LabRegistry, lab: NodeLab, mount: str) -> None:
    registry.rbd["mount"] = mount
    registry.up()
    assert "unchanged" in registry.up().stdout
    assert registry.steps() == {}
    node = registry.node()
    assert registry.name in lab.ssh(node, "rbd device list")
    device = lab.ssh(node, f"rbd device list | awk '/{registry.name}/ {{print $NF}}'").strip()
    assert "ext4" in lab.ssh(node, f"findmnt -rno FSTYPE --source {device}")
    client = registry.client_at(1)
    digest = client.push("kept")
    (pod,) = registry.pods()
    registry.api.delete(f"/api/v1/namespaces/default/pods/{pod['metadata']['name']}")
    wait_for(lambda: registry.pods() and registry.pods()[0]["metadata"]["uid"] != pod["metadata"]["uid"] and registry.is_ready())
    wait_for(lambda: client.serves(digest), 60)
    said = registry.ops("verify", check=False).stdout
    assert f"rbd/{registry.name} has 256 MiB, open at node{registry.node()}, locked by it" in said


def test_it_grows_while_it_is_pushed_to(registry: LabRegistry, report: list[Report]) -> None:
    registry.up()
    node = registry.node()
    before = registry.filesystem_mib(node)
    (pod,) = registry.pods()
    with Pushing(registry.client_at(node)) as pushing:
        wait_for(lambda: pushing.acknowledged, 60)
        registry.rbd["sizeMiB"] = 512
        registry.up()
        seconds = wait_for(lambda: registry.filesystem_mib(node) > 1.5 * before)
    report += [
        Report("growth: filesystem larger after `pulumi up`", seconds, GROWTH_AIM),
        Report(f"growth: failed of {len(pushing.acknowledged)} pushes", len(pushing.failed), 0, "pushes"),
    ]
    assert pushing.failed == []
    assert registry.pods()[0]["metadata"]["uid"] == pod["metadata"]["uid"]
    assert pushing.lost(registry.client_at(node)) == []


@pytest.mark.parametrize(("mount", "run"), [("inline", 1), *(("claim", run) for run in range(1, FAILOVER_RUNS + 1))])
def test_a_node_dies_and_the_other_one_serves_all_that_was_acknowledged(
    registry: LabRegistry, lab: NodeLab, report: list[Report], mount: str, run: int, tmp_path: Path
) -> None:
    registry.rbd["mount"] = mount
    registry.up()
    assert registry.node() == 1
    with Pushing(registry.client_at(2)) as pushing:
        wait_for(lambda: len(pushing.acknowledged) > 3, 60)
        kept = pushing.acknowledged[0]
        begin = time.monotonic()
        lab.kill(1)
        seconds = failed_over(registry, kept, begin)
        count = len(pushing.acknowledged)
        wait_for(lambda: len(pushing.acknowledged) > count, 60)
    try:
        lost = pushing.lost(registry.client_at(2))
        report += [
            Report(f"node death {run}, {mount}: served from the other node", seconds, FAILOVER_AIM),
            Report(f"node death {run}, {mount}: lost of {len(pushing.acknowledged)} acknowledged", len(lost), 0, "pushes"),
        ]
        assert lost == []
        assert lab.node_address(1) in lab.ceph("osd", "blocklist", "ls"), "the dead node is shut out"
        assert {address.partition(":")[0] for address in registry.watchers()} == {lab.node_address(2)}
    finally:
        lab.start(1)
        wait_for(lambda: lab.is_ready(registry.api, 1))
    registry.destroy()
    registry.check_filesystem(tmp_path)


def test_a_frozen_node_that_comes_back_writes_nothing(
    registry: LabRegistry, lab: NodeLab, report: list[Report], tmp_path: Path
) -> None:
    registry.up()
    assert registry.node() == 1
    with Pushing(registry.client_at(1)) as pushing:
        wait_for(lambda: len(pushing.acknowledged) > 3, 60)
        begin = time.monotonic()
        lab.freeze(1)
        try:
            seconds = failed_over(registry, pushing.acknowledged[0], begin)
            before = len(pushing.acknowledged)
        finally:
            lab.thaw(1)
    client = registry.client_at(2)
    further = [client.push(f"after-{number}") for number in range(3)]
    wait_for(lambda: lab.is_ready(registry.api, 1))
    lost = pushing.lost(client) + [digest for digest in further if not client.serves(digest)]
    report += [
        Report("frozen node: served from the other node", seconds, FAILOVER_AIM),
        Report(f"frozen node that came back: lost of {before + len(further)} acknowledged", len(lost), 0, "pushes"),
    ]
    assert lost == []
    # Its mount is broken for good, as Ceph takes nothing from it: it is restarted, as docs/volume.md says.
    lab.kill(1)
    lab.start(1)
    wait_for(lambda: lab.is_ready(registry.api, 1))
    registry.destroy()
    registry.check_filesystem(tmp_path)


def test_a_node_that_is_cut_off_but_alive_serves_on_until_it_is_shut_out(
    registry: LabRegistry, lab: NodeLab, report: list[Report], tmp_path: Path
) -> None:
    registry.up()
    assert registry.node() == 1
    client = registry.client_at(1)
    first = client.push("first")
    lab.cut(1)
    try:
        wait_for(lambda: any(pod["spec"].get("nodeName") == "node2" for pod in registry.pods()))
        (waiting,) = [pod["metadata"]["name"] for pod in registry.pods() if pod["spec"].get("nodeName") == "node2"]
        wait_for(lambda: "still being used" in registry.warnings(waiting))
        second = client.push("second")
        said = registry.ops("verify", check=False).stdout
        assert f"{waiting} on node2 waits for rbd/{registry.name}, which is open at node1" in said
        (address,) = registry.watchers()
        assert f"ceph osd blocklist add {address}" in said
        begin = time.monotonic()
        lab.ceph("osd", "blocklist", "add", address)
        seconds = failed_over(registry, first, begin)
        lost = [digest for digest in (first, second) if not registry.client_at(2).serves(digest)]
        report += [
            Report("cut off but alive: served from the other node after it was shut out", seconds),
            Report("cut off but alive: lost of 2 acknowledged", len(lost), 0, "pushes"),
        ]
        assert lost == []
    finally:
        lab.kill(1)
        lab.start(1)
        wait_for(lambda: lab.is_ready(registry.api, 1))
    registry.destroy()
    registry.check_filesystem(tmp_path)


def test_a_node_that_reboots_loses_nothing(registry: LabRegistry, lab: NodeLab, report: list[Report], tmp_path: Path) -> None:
    registry.up()
    with Pushing(registry.client_at(2)) as pushing:
        wait_for(lambda: len(pushing.acknowledged) > 3, 60)
        count, begin = len(pushing.acknowledged), time.monotonic()
        lab.reboot(1)
        wait_for(lambda: pushing.failed, 60)
        wait_for(lambda: len(pushing.acknowledged) > count)
        seconds = time.monotonic() - begin
        wait_for(lambda: lab.is_ready(registry.api, 1) and registry.is_ready())
    lost = pushing.lost(registry.client_at(2))
    report += [
        Report("reboot: served again", seconds),
        Report(f"reboot: lost of {len(pushing.acknowledged)} acknowledged", len(lost), 0, "pushes"),
    ]
    assert lost == []
    registry.destroy()
    registry.check_filesystem(tmp_path)


def test_a_second_registry_on_the_same_image_is_refused(registry: LabRegistry, lab: NodeLab, tmp_path: Path) -> None:
    registry.up()
    (tmp_path / "second").mkdir()
    second = LabRegistry(tmp_path / "second", lab)
    second.rbd["image"] = registry.name
    second.set("kubernetes", name="second", nodePort=32501)
    run = second.up(check=False)
    assert run.returncode != 0
    assert f"belongs to the stack private-registry/{registry.name}" in run.stdout
    second.remove()
