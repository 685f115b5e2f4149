"""The lab's Ceph clusters and the `rbd` that maps their images, for real: root on Debian."""

import contextlib
import errno
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from lab.boxes import wait
from lab.ceph import MONITOR, STORE, Ceph
from lab.debian import LabError, can_install
from lab.kernel_client import REAL
from toolchain.programs import ROOT

pytestmark = [
    pytest.mark.skipif(not can_install(), reason="the lab's Ceph needs root on Debian"),
    pytest.mark.xdist_group("lab_ceph"),
]
WAIT_SECONDS = 30


@contextlib.contextmanager
def new_ceph(folder: Path, size_mib: int = 2048) -> Iterator[Ceph]:
    """A cluster that is up; nothing of it is left afterwards, whatever the test did."""
    made = Ceph(folder, size_mib=size_mib)
    try:
        made.up()
        yield made
    finally:
        made.down()


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ceph]:
    """A cluster that is no other test run's and not the checkout's."""
    with new_ceph(tmp_path_factory.mktemp("ceph") / "lab") as made:
        yield made


@pytest.fixture
def ceph(shared: Ceph) -> Ceph:
    """The cluster, up again if the test before has left it otherwise, without images."""
    shared.up()
    for image in json.loads(shared.rbd("ls", "--format", "json")):
        while on_host(shared, "rbd", "unmap", image).returncode == 0:
            pass
        shared.rbd("rm", image)
    return shared


def on_host(ceph: Ceph, *command: str) -> subprocess.CompletedProcess[str]:
    """Run a command as a program on the Ceph host does."""
    return subprocess.run(
        command, env={**os.environ, **ceph.environment}, capture_output=True, text=True, timeout=60, check=False
    )


def succeed(ceph: Ceph, *command: str) -> str:
    done = on_host(ceph, *command)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@contextlib.contextmanager
def mounted(ceph: Ceph, device: str, folder: Path) -> Iterator[Path]:
    folder.mkdir(exist_ok=True)
    succeed(ceph, "mount", device, str(folder))
    try:
        yield folder
    finally:
        succeed(ceph, "umount", str(folder))


def mapped(ceph: Ceph) -> list[tuple[str, str, str]]:
    listed = json.loads(succeed(ceph, "rbd", "device", "list", "--format", "json"))
    return [(image["pool"], image["name"], image["device"]) for image in listed]


def processes(ceph: Ceph) -> dict[str, int | None]:
    return {process.name: process.pid for process in ceph.status()}


def kill(ceph: Ceph, name: str) -> None:
    pid = processes(ceph)[name]
    assert pid is not None
    os.kill(pid, signal.SIGKILL)
    assert wait(lambda: processes(ceph)[name] is None, WAIT_SECONDS)


def assert_nothing_is_left(ceph: Ceph) -> None:
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            assert str(ceph.folder) not in (process / "cmdline").read_bytes().decode(errors="replace")
    assert str(ceph.folder) not in Path("/proc/self/mountinfo").read_text()
    for device in Path("/sys/block").glob("loop*/loop/backing_file"):
        with contextlib.suppress(OSError):
            assert str(ceph.folder) not in device.read_text()
    assert not ceph.folder.exists()


def test_an_image_is_made_and_what_is_imported_is_read_back(ceph: Ceph, tmp_path: Path) -> None:
    source, copy = tmp_path / "source", tmp_path / "copy"
    source.write_bytes(os.urandom(3 * 2**20))
    ceph.rbd("import", str(source), "rbd/kept")
    ceph.rbd("export", "rbd/kept", str(copy))
    assert copy.read_bytes() == source.read_bytes()
    assert json.loads(ceph.rbd("info", "kept", "--format", "json"))["size"] == 3 * 2**20


def test_only_who_has_a_key_is_let_in(ceph: Ceph, tmp_path: Path) -> None:
    foreign = tmp_path / "keyring"
    subprocess.run(
        ["ceph-authtool", "--create-keyring", foreign, "--gen-key", "-n", "client.admin"], check=True, capture_output=True
    )
    assert on_host(ceph, REAL, "ls", "--keyring", str(foreign)).returncode == errno.EACCES


def test_the_monitor_answers_clients_of_both_protocols_on_the_machine_itself_only(ceph: Ceph) -> None:
    monitors = json.loads(ceph.ceph("mon", "dump", "--format", "json"))["mons"]
    addresses = {address["type"]: address["addr"] for monitor in monitors for address in monitor["public_addrs"]["addrvec"]}
    assert addresses.keys() == {"v1", "v2"}
    assert addresses["v1"] == ceph.monitor
    assert all(address.startswith("127.0.0.1:") for address in addresses.values())
    assert ceph.rbd("-m", ceph.monitor, "ls") == ""


def test_up_a_second_time_is_the_same_cluster(ceph: Ceph) -> None:
    ceph.rbd("create", "--size", "8", "kept")
    before, fsid = processes(ceph), ceph.ceph("fsid")
    assert ceph.up() == ceph.conf
    assert processes(ceph) == before
    assert before.keys() == {MONITOR, STORE}
    assert all(before.values())
    assert (ceph.ceph("fsid"), ceph.rbd("ls")) == (fsid, "kept\n")
    assert ceph.address() == ceph.conf


def test_up_with_another_size_is_refused_and_leaves_the_cluster(ceph: Ceph) -> None:
    before = processes(ceph)
    with pytest.raises(LabError, match="has a Ceph with the pool rbd and 2048 MiB, not the pool rbd and 64 MiB"):
        Ceph(ceph.folder, size_mib=64).up()
    assert processes(ceph) == before


def test_two_clusters_run_beside_each_other_and_share_nothing(ceph: Ceph, tmp_path: Path) -> None:
    with new_ceph(tmp_path / "other") as other:
        assert other.monitor != ceph.monitor
        ceph.rbd("create", "--size", "8", "one")
        other.rbd("create", "--size", "8", "another")
        devices = succeed(ceph, "rbd", "map", "one"), succeed(other, "rbd", "map", "another")
        assert (mapped(ceph), mapped(other)) == ([("rbd", "one", devices[0])], [("rbd", "another", devices[1])])
        assert (ceph.rbd("ls"), other.rbd("ls")) == ("one\n", "another\n")
        assert other.down()
        assert mapped(ceph) == [("rbd", "one", devices[0])]
        assert ceph.rbd("ls") == "one\n"
    assert_nothing_is_left(other)


def test_a_monitor_that_is_stopped_and_started_has_kept_the_image_at_the_same_address(ceph: Ceph, tmp_path: Path) -> None:
    (tmp_path / "source").write_text("kept")
    ceph.rbd("import", str(tmp_path / "source"), "kept")
    monitor, store = ceph.monitor, processes(ceph)[STORE]
    ceph.stop_monitor()
    assert processes(ceph) == {STORE: store}
    assert ceph.address() is None
    # What the one that is down does to scripts with a deadline of their own.
    asked = on_host(ceph, "rbd", "--client_mount_timeout", "1", "--rados_mon_op_timeout", "1", "info", "kept")
    assert asked.returncode == errno.ETIMEDOUT
    ceph.start_monitor()
    assert (ceph.monitor, processes(ceph)[STORE]) == (monitor, store)
    assert ceph.rbd("export", "kept", "-").startswith("kept")


def test_up_starts_a_monitor_that_was_killed_and_nothing_is_lost(ceph: Ceph) -> None:
    ceph.rbd("create", "--size", "8", "kept")
    kill(ceph, MONITOR)
    ceph.up()
    assert ceph.rbd("ls") == "kept\n"


def test_up_after_the_store_was_killed_is_a_new_cluster_at_the_same_address_and_what_was_mapped_is_gone(
    ceph: Ceph, tmp_path: Path
) -> None:
    ceph.rbd("create", "--size", "32", "lost")
    device = succeed(ceph, "rbd", "map", "lost")
    fsid, monitor = ceph.ceph("fsid"), ceph.monitor
    kill(ceph, STORE)
    assert ceph.address() is None
    ceph.up()
    assert ceph.ceph("fsid") != fsid
    assert (ceph.monitor, ceph.rbd("ls"), mapped(ceph)) == (monitor, "", [])
    assert on_host(ceph, "rbd", "unmap", device).returncode == errno.EINVAL


def test_a_small_store_fills_and_then_what_writes_waits(tmp_path: Path) -> None:
    with new_ceph(tmp_path / "small", size_mib=64) as small:
        small.rbd("create", "--size", "100", "big")
        write = ["bench", "--io-type", "write", "--io-size", "1M", "--io-total", "70M", "big"]
        small.rbd(*write)
        assert wait(lambda: "full" in small.ceph("health"), WAIT_SECONDS)
        assert on_host(small, "timeout", "3", "rbd", *write).returncode == 124


def test_a_command_that_fails_is_named_with_what_it_said(ceph: Ceph, tmp_path: Path) -> None:
    with pytest.raises(LabError, match=r"rbd info none: .*No such file or directory"):
        ceph.rbd("info", "none")
    with pytest.raises(LabError, match="There is no Ceph: python -m lab up ceph"):
        Ceph(tmp_path / "none").ceph("status")


def test_a_file_is_kept_by_map_mkfs_mount_and_unmap(ceph: Ceph, tmp_path: Path) -> None:
    ceph.rbd("create", "--size", "64", "kept")
    content = os.urandom(20 * 2**20)
    device = succeed(ceph, "rbd", "map", "kept")
    succeed(ceph, "mkfs.ext4", "-q", device)
    with mounted(ceph, device, tmp_path / "mount") as folder:
        (folder / "file").write_bytes(content)
    succeed(ceph, "rbd", "unmap", "kept")
    assert ceph.rbd("status", "kept") == "Watchers: none\n"
    assert processes(ceph).keys() == {MONITOR, STORE}
    device = succeed(ceph, "rbd", "map", "kept", "--read-only")
    with mounted(ceph, device, tmp_path / "mount") as folder:
        assert (folder / "file").read_bytes() == content
    succeed(ceph, "rbd", "unmap", device)


@pytest.mark.parametrize(
    ("command", "name"),
    [
        (["map"], ["--pool", "rbd", "--image", "one", "-o", "noudev"]),
        (["map"], ["--pool=rbd", "--image=one", "--options=noudev", "--exclusive"]),
        (["device", "map"], ["-p", "rbd", "one", "--client_mount_timeout", "5", "-t", "krbd"]),
        (["--no-progress", "device", "map"], ["rbd/one", "-onoudev"]),
    ],
)
def test_map_and_unmap_take_the_options_of_the_real_ones_as_a_user_who_may_only_use_the_pool(
    ceph: Ceph, tmp_path: Path, command: list[str], name: list[str]
) -> None:
    ceph.rbd("create", "--size", "8", "one")
    keyring = tmp_path / "keyring"
    keyring.write_text(ceph.ceph("auth", "get-or-create", "client.mapper", "mon", "profile rbd", "osd", "profile rbd pool=rbd"))
    reach = ["--id", "mapper", "--keyring", str(keyring), "--conf", str(ceph.conf)]
    device = succeed(ceph, "rbd", *command, *name, *reach)
    assert mapped(ceph) == [("rbd", "one", device)]
    assert device in succeed(ceph, "rbd", "showmapped")
    assert "watcher=127.0.0.1" in ceph.rbd("status", "one")
    unmap = ["unmap" if word == "map" else word for word in command]
    succeed(ceph, "rbd", *unmap, *(part for part in name if part != "--exclusive"), *reach)
    assert mapped(ceph) == []
    keyring.write_text(f"[client.mapper]\nkey = {ceph.ceph('auth', 'print-key', 'client.admin')}\n")
    refused = on_host(ceph, "rbd", *command, *name, *reach)
    assert (refused.returncode, refused.stdout) == (errno.EACCES, "")


def test_unmap_ends_with_22_for_what_is_not_mapped_and_with_16_for_what_is_mounted(ceph: Ceph, tmp_path: Path) -> None:
    ceph.rbd("create", "--size", "32", "one")
    for name in ("one", "rbd/one", "/dev/loop7777", "none"):
        unmapped = on_host(ceph, "rbd", "unmap", name)
        assert (unmapped.returncode, "unmap failed: (22)" in unmapped.stderr) == (errno.EINVAL, True)
    device = succeed(ceph, "rbd", "map", "one")
    succeed(ceph, "mkfs.ext4", "-q", device)
    with mounted(ceph, device, tmp_path / "mount") as folder:
        for name in ("one", device):
            busy = on_host(ceph, "rbd", "device", "unmap", name)
            assert (busy.returncode, "(16) Device or resource busy" in busy.stderr) == (errno.EBUSY, True)
        (folder / "file").write_text("still there")
    succeed(ceph, "rbd", "unmap", "one")


def test_map_of_a_missing_image_or_pool_ends_with_2_and_starts_nothing(ceph: Ceph) -> None:
    for name in ("none", "none/none"):
        missing = on_host(ceph, "rbd", "map", name)
        assert (missing.returncode, missing.stdout) == (errno.ENOENT, "")
        assert "error opening" in missing.stderr
    assert mapped(ceph) == []
    assert processes(ceph).keys() == {MONITOR, STORE}


def test_an_image_mapped_twice_has_two_devices_and_both_see_its_new_size(ceph: Ceph) -> None:
    ceph.rbd("create", "--size", "8", "one")
    first = succeed(ceph, "rbd", "map", "one")
    again = on_host(ceph, "rbd", "map", "one")
    second = again.stdout.strip()
    assert (again.returncode, first == second, "already mapped" in again.stderr) == (0, False, True)
    succeed(ceph, "rbd", "resize", "--size", "16", "one", "--no-progress")
    assert [int(succeed(ceph, "blockdev", "--getsize64", device)) for device in (first, second)] == [16 * 2**20] * 2
    succeed(ceph, "rbd", "unmap", first)
    assert mapped(ceph) == [("rbd", "one", second)]


def test_an_image_whose_rbd_fuse_was_killed_can_be_unmapped_and_mapped_again(tmp_path: Path) -> None:
    # A cluster of its own: for half a minute the store takes the killed one for a user of the image, which cannot go.
    with new_ceph(tmp_path / "lab") as ceph:
        ceph.rbd("create", "--size", "8", "one")
        succeed(ceph, "rbd", "map", "one")
        kill(ceph, "rbd-fuse rbd/one")
        succeed(ceph, "rbd", "unmap", "one")
        device = succeed(ceph, "rbd", "map", "one")
        assert mapped(ceph) == [("rbd", "one", device)]


def test_all_else_is_the_real_rbd_s(ceph: Ceph) -> None:
    succeed(ceph, "rbd", "create", "--size", "8", "map")
    assert succeed(ceph, "rbd", "--pool", "rbd", "ls") == "map"
    assert succeed(ceph, "rbd", "help", "map") == succeed(ceph, REAL, "help", "map")
    assert on_host(ceph, "rbd", "create", "--size", "8", "map").returncode == errno.EEXIST


def test_down_leaves_no_process_no_mount_no_loop_device_and_no_file(tmp_path: Path) -> None:
    with new_ceph(tmp_path / "lab") as ceph:
        for name in ("mounted", "mapped"):
            ceph.rbd("create", "--size", "32", name)
        device = succeed(ceph, "rbd", "map", "mounted")
        succeed(ceph, "rbd", "map", "mapped")
        succeed(ceph, "mkfs.ext4", "-q", device)
        folder = tmp_path / "mount"
        folder.mkdir()
        succeed(ceph, "mount", device, str(folder))
        (folder / "file").write_text("not yet written")
        # Also where nothing can be written any more.
        kill(ceph, STORE)
        assert ceph.down()
        assert_nothing_is_left(ceph)
        assert not folder.is_mount()
        assert not ceph.down()


@pytest.mark.parametrize("last", ["ceph.conf", "pid/monitor", "pid/store"])
def test_down_leaves_nothing_of_an_up_that_was_killed_half_way_and_up_begins_anew(tmp_path: Path, last: str) -> None:
    ceph = Ceph(tmp_path / "lab")
    script = "import sys, pathlib, lab.ceph; lab.ceph.Ceph(pathlib.Path(sys.argv[1])).up()"
    half = subprocess.Popen([sys.executable, "-c", script, str(ceph.folder)], cwd=ROOT, stderr=subprocess.DEVNULL)
    try:
        assert wait((ceph.folder / last).exists, WAIT_SECONDS)
        half.kill()
        half.wait()
        ceph.up()
        assert ceph.rbd("ls") == ""
    finally:
        half.kill()
        assert ceph.down()
    assert_nothing_is_left(ceph)
