"""hosts/rbd.py by itself, on a real Ceph whose host maps images without the kernel's client (`lab/rbd`)."""

import contextlib
import hashlib
import json
import os
import shutil
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from hosts.rbd import EXIT_CODES
from lab.ceph import Ceph
from tests.engine.stack import killed_on_failure, wait_for

FILE = Path(__file__).parent.parent.parent / "hosts/rbd.py"
SCRIPT = FILE.read_text()
OWNER = "private-registry/test"
# Runs the script on standard input, and ends it at the Nth moment: before and after each command that changes something, or,
# for EVERY_LINE, at each line that is reached for the first time. Its children end too, or not. With a number that is never
# reached it says how many moments there are.
KILLED = """
import os, signal, sys
at, group, every_line, text = int(sys.argv.pop(1)), sys.argv.pop(1) == "group", sys.argv.pop(1) == "True", sys.stdin.read()
CHANGES = {"create", "set", "resize", "map", "unmap", "-q", "move", "rm"}
moments, seen = 0, set()
def moment():
    global moments
    moments += 1
    if moments == at:
        os.killpg(0, signal.SIGKILL) if group else os.kill(os.getpid(), signal.SIGKILL)
def trace(frame, event, argument):
    if frame.f_code.co_filename != "script":
        return None
    name = frame.f_code.co_name
    if every_line:
        if event == "line" and frame.f_lineno not in seen and name not in ("<module>", "main"):
            seen.add(frame.f_lineno)
            moment()
    elif name == "run" and event in ("call", "return") and CHANGES & set(frame.f_locals["command"][1:3]):
        moment()
    return trace
sys.settrace(trace)
try:
    exec(compile(text, "script", "exec"), {"__name__": "__main__"})
finally:
    print("moments", moments, file=sys.stderr)
"""
EVERY_LINE = os.environ.get("EVERY_LINE") == "yes"  # half an hour; `make lab-test` sets it


class Host:
    """The Ceph host, and one image on it that a test calls its own."""

    def __init__(self, ceph: Ceph, pool: str = "rbd") -> None:
        self.ceph = ceph
        self.pool = pool
        self.image = f"i{uuid.uuid4().hex[:10]}"
        self.spec = f"{pool}/{self.image}"
        self.environment = {**os.environ, **ceph.environment}

    def run(self, verb: str, *arguments: str, script: str = SCRIPT, owner: str = OWNER) -> subprocess.CompletedProcess[str]:
        return self._run([sys.executable, "-", *self._words(verb, arguments, owner)], script)

    def start(self, verb: str, *arguments: str, owner: str = OWNER) -> subprocess.Popen[str]:
        words = self._words(verb, arguments, owner)
        with FILE.open() as script:
            return subprocess.Popen(
                [sys.executable, "-", *words], stdin=script, stdout=subprocess.PIPE, env=self.environment, text=True
            )

    def killed(self, at: int, verb: str, *arguments: str, group: bool) -> subprocess.CompletedProcess[str]:
        how = "group" if group else "alone"
        command = [sys.executable, "-c", KILLED, str(at), how, str(EVERY_LINE), *self._words(verb, arguments, OWNER)]
        return self._run(command, SCRIPT, start_new_session=True)

    def _run(self, command: list[str], script: str, **options: Any) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            command, input=script, env=self.environment, capture_output=True, text=True, check=False, timeout=200, **options
        )

    def _words(self, verb: str, arguments: tuple[str, ...], owner: str) -> list[str]:
        own = ["--owner", owner] if verb in ("ensure", "release") else []
        return [verb, "--pool", self.pool, "--image", self.image, *own, *arguments]

    def ensure(self, size_mib: int = 64, *more: str, form: str = "mount", owner: str = OWNER) -> Any:
        done = self.run("ensure", "--size-mib", str(size_mib), "--format", form, *more, owner=owner)
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    def refused(self, kind: str, verb: str, *arguments: str, script: str = SCRIPT, owner: str = OWNER) -> str:
        """Run the script, expect this refusal, and return its sentence."""
        done = self.run(verb, *arguments, script=script, owner=owner)
        assert done.returncode == EXIT_CODES[kind], (done.returncode, done.stderr)
        assert done.stdout == ""
        assert len(done.stderr.strip().splitlines()) == 1
        return done.stderr.strip()

    def rbd(self, *arguments: str) -> str:
        """Run `rbd` as on the host, which maps and unmaps too."""
        done = subprocess.run(["rbd", *arguments], env=self.environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()

    def info(self) -> Any:
        return json.loads(self.rbd("info", self.spec, "--format", "json"))

    def exists(self) -> bool:
        return self.image in json.loads(self.rbd("ls", self.pool, "--format", "json"))

    def marks(self) -> Any:
        return json.loads(self.rbd("image-meta", "list", self.spec, "--format", "json") or "{}")

    def rados(self, *arguments: str) -> None:
        """Change the objects of which images are made, as a command that was cut off leaves them."""
        subprocess.run(["rados", "-p", self.pool, *arguments], env=self.environment, check=True, capture_output=True)

    def put_before(self, folder: Path, program: str, script: str) -> None:
        """Let a shell script be a program of the host's; in it, REAL is the program that it stands before."""
        real = shutil.which(program, path=self.environment["PATH"])
        assert real is not None
        folder.mkdir(exist_ok=True)
        (folder / program).write_text(f"#!/bin/sh\n{script.replace('REAL', real)}\n")
        (folder / program).chmod(0o755)
        self.environment["PATH"] = f"{folder}:{self.environment['PATH']}"

    def devices(self) -> list[Any]:
        return [entry for entry in json.loads(self.rbd("device", "list", "--format", "json")) if entry["name"] == self.image]

    def write(self, content: bytes, folder: Path) -> None:
        """Put a file on the image's filesystem."""
        with self._mounted(folder) as mount:
            (mount / "file").write_bytes(content)

    def read(self, folder: Path) -> bytes:
        with self._mounted(folder) as mount:
            return (mount / "file").read_bytes()

    def discard(self) -> None:
        """Make room for the images of further moments, as all are in memory; one that a killed run still has open stays."""
        for entry in json.loads(self.rbd("trash", "ls", self.pool, "--format", "json")):
            if entry["name"] == self.image:
                self.rbd("trash", "rm", "--force", "--no-progress", f"{self.pool}/{entry['id']}")
        subprocess.run(["rbd", "rm", "--no-progress", self.spec], env=self.environment, capture_output=True, check=False)

    def _mounted(self, folder: Path) -> "Mounted":
        return Mounted(self, folder)

    def check_filesystem(self) -> None:
        device = self.rbd("map", self.spec)
        try:
            subprocess.run(["/sbin/e2fsck", "-f", "-n", device], check=True, capture_output=True)
        finally:
            self.rbd("unmap", device)


class Mounted:
    def __init__(self, host: Host, folder: Path) -> None:
        self.host = host
        self.mount = folder / "mount"

    def __enter__(self) -> Path:
        self.mount.mkdir(exist_ok=True)
        self.device = self.host.rbd("map", self.host.spec)
        subprocess.run(["mount", self.device, str(self.mount)], check=True)
        return self.mount

    def __exit__(self, *error: object) -> None:
        subprocess.run(["umount", str(self.mount)], check=True)
        self.host.rbd("unmap", self.device)


@pytest.fixture
def host(ceph: Ceph) -> Host:
    return Host(ceph)


@pytest.fixture
def opened(host: Host) -> Iterator[Host]:
    """A host whose image is open, as a node has it."""
    host.ensure()
    device = host.rbd("map", host.spec)
    yield host
    host.rbd("unmap", device)


def test_a_new_image_has_the_size_the_lock_and_the_stacks_mark(host: Host) -> None:
    made = host.ensure(100)
    assert made == {"id": host.info()["id"], "sizeMiB": 100, "features": ["layering", "exclusive-lock"], "done": ["created"]}
    assert host.info()["size"] == 100 << 20
    assert host.marks() == {"private-registry.stack": OWNER}


def test_a_second_run_changes_nothing(host: Host) -> None:
    host.ensure()
    before = (host.info(), host.marks())
    assert host.ensure()["done"] == []
    assert (host.info(), host.marks()) == before


def test_it_grows_while_it_is_open(opened: Host) -> None:
    assert opened.ensure(128)["done"] == ["grown"]
    assert opened.info()["size"] == 128 << 20


def test_it_never_shrinks(host: Host) -> None:
    host.ensure(128)
    said = host.refused("shrink", "ensure", "--size-mib", "64", "--format", "mount")
    assert f"{host.spec} has 128 MiB" in said
    assert "set storage.rbd.sizeMiB to 128 or more" in said
    assert host.info()["size"] == 128 << 20


def test_a_filesystem_made_here_outlives_growth_and_further_runs(host: Host, tmp_path: Path) -> None:
    assert host.ensure(form="host")["done"] == ["created", "formatted"]
    content = os.urandom(1 << 20)
    host.write(content, tmp_path)
    host.ensure(128, form="host")
    host.ensure(128, form="host")
    host.check_filesystem()
    assert host.read(tmp_path) == content
    assert host.devices() == []


def test_what_the_kubelet_formatted_is_not_formatted_again(host: Host, tmp_path: Path) -> None:
    host.ensure()
    device = host.rbd("map", host.spec)
    subprocess.run(["/sbin/mkfs.ext4", "-q", device], check=True)
    host.rbd("unmap", device)
    host.write(b"an image", tmp_path)
    host.ensure(form="host")
    assert host.read(tmp_path) == b"an image"


def test_what_holds_something_unknown_is_never_formatted(host: Host) -> None:
    host.ensure()
    device = host.rbd("map", host.spec)
    content = os.urandom(4096)
    with Path(device).open("r+b") as opened:
        opened.seek(32 << 20)
        opened.write(content)
    host.rbd("unmap", device)
    host.refused("foreign", "ensure", "--size-mib", "64", "--format", "host")
    device = host.rbd("map", host.spec)
    with Path(device).open("rb") as opened:
        opened.seek(32 << 20)
        assert opened.read(4096) == content
    host.rbd("unmap", device)
    assert host.devices() == []


def test_what_is_not_ext4_is_left_as_it_is(host: Host, tmp_path: Path) -> None:
    host.ensure()
    (tmp_path / "data").write_bytes(b"XFSB" + os.urandom((8 << 20) - 4))
    host.rbd("rm", host.spec, "--no-progress")
    host.rbd("import", str(tmp_path / "data"), host.spec)
    said = host.refused("foreign", "ensure", "--size-mib", "8", "--format", "host", "--adopt")
    assert "holds something that is not a clean ext4" in said
    host.rbd("export", host.spec, str(tmp_path / "found"))
    assert (tmp_path / "found").read_bytes() == (tmp_path / "data").read_bytes()
    assert host.devices() == []


def test_a_foreign_ext4_keeps_its_files_when_it_is_adopted_to_be_formatted(host: Host, tmp_path: Path) -> None:
    host.ensure(form="host")
    host.write(b"an image", tmp_path)
    for mark in host.marks():
        host.rbd("image-meta", "remove", host.spec, mark)
    host.refused("foreign", "ensure", "--size-mib", "64", "--format", "host")
    host.ensure(64, "--adopt", form="host")
    assert host.read(tmp_path) == b"an image"


def test_what_a_node_wrote_after_a_cut_off_formatting_is_never_formatted(host: Host, tmp_path: Path) -> None:
    host.ensure()
    host.rbd("image-meta", "set", host.spec, "private-registry.filesystem", "formatting")
    host.ensure()
    assert host.marks() == {"private-registry.stack": OWNER}
    device = host.rbd("map", host.spec)
    subprocess.run(["/sbin/mkfs.ext4", "-q", device], check=True)
    host.rbd("unmap", device)
    host.write(b"an image", tmp_path)
    device = host.rbd("map", host.spec)
    subprocess.run(["/sbin/debugfs", "-w", "-R", "clri <11>", device], check=True, capture_output=True)  # as after a crash
    host.rbd("unmap", device)
    host.refused("foreign", "ensure", "--size-mib", "64", "--format", "host")
    assert host.read(tmp_path) == b"an image"


def test_a_mkfs_that_fails_is_not_taken_for_a_refusal_of_ceph(host: Host, tmp_path: Path) -> None:
    host.put_before(tmp_path / "bin", "mkfs.ext4", "echo no room >&2; exit 1")
    said = host.refused("failed", "ensure", "--size-mib", "64", "--format", "host")
    assert "`mkfs.ext4 -q -F` failed with code 1: no room" in said
    assert host.devices() == []


def test_an_image_with_data_of_someone_else_is_refused_and_adopted_on_request(host: Host, tmp_path: Path) -> None:
    content = os.urandom(64 << 20)
    (tmp_path / "data").write_bytes(content)
    host.rbd("import", str(tmp_path / "data"), host.spec)
    said = host.refused("foreign", "ensure", "--size-mib", "64", "--format", "mount")
    assert "storage.rbd.adopt: true" in said
    assert host.marks() == {}
    host.ensure(64, "--adopt")
    host.rbd("export", host.spec, str(tmp_path / "found"))
    assert hashlib.sha256((tmp_path / "found").read_bytes()).digest() == hashlib.sha256(content).digest()


def test_an_image_that_was_never_written_to_is_taken(host: Host) -> None:
    host.rbd("create", host.spec, "--size", "64M")
    assert host.ensure()["done"] == []
    assert host.marks()["private-registry.stack"] == OWNER


def test_another_stacks_image_is_refused_even_to_adopt(host: Host) -> None:
    host.ensure(owner="private-registry/other")
    said = host.refused("other-stack", "ensure", "--size-mib", "64", "--format", "mount", "--adopt")
    assert "belongs to the stack private-registry/other" in said
    assert host.marks()["private-registry.stack"] == "private-registry/other"


def test_an_image_of_nobody_that_is_open_is_left_alone(opened: Host) -> None:
    opened.rbd("image-meta", "remove", opened.spec, "private-registry.stack")
    said = opened.refused("in-use", "ensure", "--size-mib", "64", "--format", "mount", "--adopt")
    assert "is open at 127.0.0.1" in said
    assert opened.marks() == {}


def test_a_missing_lock_is_enabled_but_not_while_the_image_is_open(host: Host) -> None:
    host.rbd("create", host.spec, "--size", "64M", "--image-feature", "layering")
    host.rbd("image-meta", "set", host.spec, "private-registry.stack", OWNER)
    device = host.rbd("map", host.spec)
    host.refused("in-use", "ensure", "--size-mib", "64", "--format", "mount")
    host.rbd("unmap", device)
    assert "exclusive-lock" in host.ensure()["features"]


def test_journaling_is_refused(host: Host) -> None:
    host.rbd("create", host.spec, "--size", "64M", "--image-feature", "layering,exclusive-lock,journaling")
    said = host.refused("unsuitable", "ensure", "--size-mib", "64", "--format", "mount")
    assert f"rbd feature disable {host.spec} journaling" in said


def test_a_missing_pool_is_named(ceph: Ceph) -> None:
    said = Host(ceph, pool="nowhere").refused("no-pool", "ensure", "--size-mib", "64", "--format", "mount")
    assert "Ceph has no pool nowhere, only rbd" in said


@pytest.mark.parametrize("program", ["rbd", "ceph"])
def test_a_host_without_the_programs_is_told_what_to_install(host: Host, tmp_path: Path, program: str) -> None:
    other = "ceph" if program == "rbd" else "rbd"
    (tmp_path / other).symlink_to(f"/usr/bin/{other}")
    host.environment["PATH"] = str(tmp_path)
    said = host.refused("no-program", "status")
    assert said == f"{program} is not on this host: install ceph-common, or name another storage.rbd.host."


def test_a_host_whose_key_ceph_does_not_know_is_told_so(host: Host, tmp_path: Path) -> None:
    keyring = tmp_path / "keyring"
    keyring.write_text("[client.admin]\n\tkey = AQCpPwprpSfWMhAAHD456IoPDGdUoQof0lI0KA==\n")
    host.environment["CEPH_ARGS"] = f"--keyring={keyring}"
    assert "it needs /etc/ceph with an admin's key" in host.refused(
        "not-allowed", "ensure", "--size-mib", "64", "--format", "mount"
    )


def test_a_host_without_a_key_is_told_so(host: Host, tmp_path: Path) -> None:
    host.environment["CEPH_ARGS"] = f"--keyring={tmp_path}/none"
    assert "admin's key" in host.refused("not-allowed", "ensure", "--size-mib", "64", "--format", "mount")


def test_an_image_in_the_trash_is_not_made_anew_and_the_sentence_restores_it(host: Host, tmp_path: Path) -> None:
    host.ensure(form="host")
    host.write(b"an image", tmp_path)
    assert json.loads(host.run("release", "--policy", "trash", "--trash-days", "3").stdout)["done"] == ["trashed"]
    said = host.refused("in-trash", "ensure", "--size-mib", "64", "--format", "host")
    host.rbd(*said.split("`rbd ")[1].split("`")[0].split())
    assert host.ensure(form="host")["done"] == []
    assert host.read(tmp_path) == b"an image"


def test_release_deletes_and_may_be_run_again(host: Host) -> None:
    host.ensure()
    assert json.loads(host.run("release", "--policy", "delete").stdout)["done"] == ["deleted"]
    assert not host.exists()
    assert json.loads(host.run("release", "--policy", "delete").stdout)["done"] == []


@pytest.mark.parametrize("policy", ["trash", "delete"])
def test_release_leaves_another_stacks_image_alone(host: Host, policy: str) -> None:
    host.ensure(owner="private-registry/other")
    assert "belongs to private-registry/other" in host.run("release", "--policy", policy).stdout
    assert host.exists()


@pytest.mark.parametrize("policy", ["trash", "delete"])
def test_release_takes_no_image_that_is_open(opened: Host, policy: str) -> None:
    script = SCRIPT.replace("RELEASE_SECONDS = 90", "RELEASE_SECONDS = 1")
    said = opened.refused("in-use", "release", "--policy", policy, script=script)
    assert "is open at 127.0.0.1" in said
    assert opened.exists()


def test_release_waits_for_one_that_is_being_closed(host: Host) -> None:
    host.ensure()
    device = host.rbd("map", host.spec)
    with killed_on_failure(host.start("release", "--policy", "delete")) as release:
        time.sleep(1)  # whether the release began before or after it, it ends well
        assert release.poll() is None
        host.rbd("unmap", device)
        assert release.wait(timeout=60) == 0
    assert not host.exists()


def test_release_deletes_no_image_with_snapshots(host: Host) -> None:
    host.ensure()
    host.rbd("snap", "create", f"{host.spec}@kept")
    assert "has the snapshots kept" in host.refused("has-snapshots", "release", "--policy", "delete")
    assert host.exists()


def test_what_is_left_of_a_deletion_is_not_served(host: Host) -> None:
    host.ensure()
    host.rbd("image-meta", "set", host.spec, "private-registry.deleting", "yes")
    assert f"end it with `rbd rm {host.spec}`" in host.refused("half-deleted", "ensure", "--size-mib", "64", "--format", "mount")


def test_a_release_ends_a_deletion_that_was_cut_off(host: Host) -> None:
    host.ensure()
    host.rbd("image-meta", "set", host.spec, "private-registry.deleting", "yes")
    assert json.loads(host.run("release", "--policy", "delete").stdout)["done"] == ["deleted"]
    assert not host.exists()


@pytest.mark.parametrize("command", ["ensure --size-mib 64 --format mount", "release --policy delete", "release --policy trash"])
def test_a_name_without_an_image_is_refused_and_the_sentence_removes_it(host: Host, command: str) -> None:
    host.ensure()
    host.rados("rm", f"rbd_header.{host.info()['id']}")
    said = host.refused("half-deleted", *command.split())
    host.rbd(*said.split("`rbd ")[1].split("`")[0].split())
    assert not host.exists()
    assert host.ensure()["done"] == ["created"]


def test_an_image_that_another_host_is_just_creating_is_waited_for(host: Host, tmp_path: Path) -> None:
    host.rados("create", f"rbd_id.{host.image}")
    refused = tmp_path / "refused"
    host.put_before(tmp_path / "bin", "rbd", f'REAL "$@"; code=$?; [ "$1" != create ] || touch {refused}; exit $code')
    with killed_on_failure(host.start("ensure", "--size-mib", "64", "--format", "mount")) as run:
        wait_for(refused.exists, 60)
        # Now it waits; before that it would make the image itself as soon as the name is gone.
        host.rados("rm", f"rbd_id.{host.image}")
        host.rbd("create", host.spec, "--size", "64M", "--image-feature", "layering,exclusive-lock")
        assert run.wait(timeout=60) == 0
    assert host.marks() == {"private-registry.stack": OWNER}


def test_a_map_that_outlives_its_killed_run_leaves_nothing_mapped(host: Host, tmp_path: Path) -> None:
    begun, ended = tmp_path / "begun", tmp_path / "ended"
    first = f'touch {begun}; sleep 15; REAL "$@"; touch {ended}; exit'  # longer than a second run needs to end
    slow = f'if [ "$2" = map ] && [ ! -e {begun} ]; then {first}; fi; exec REAL "$@"'
    host.put_before(tmp_path / "bin", "rbd", slow)
    deadline = time.monotonic() + 60
    with killed_on_failure(host.start("ensure", "--size-mib", "64", "--format", "host")) as run:
        while not begun.exists():
            assert time.monotonic() < deadline
            time.sleep(0.05)
        run.kill()
    settled(host, "ensure", "--size-mib", "64", "--format", "host")
    while not ended.exists():
        assert time.monotonic() < deadline
        time.sleep(0.2)
    assert host.devices() == []
    host.check_filesystem()


def test_two_runs_at_once_make_one_image(host: Host) -> None:
    runs = [host.start("ensure", "--size-mib", "64", "--format", "host") for _ in range(2)]
    done = [json.loads(run.communicate(timeout=120)[0])["done"] for run in runs]
    assert sorted(done) == [[], ["created", "formatted"]]
    host.check_filesystem()


def test_of_two_stacks_at_once_one_gets_it(host: Host) -> None:
    owners = ["private-registry/a", "private-registry/b"]
    runs = [host.start("ensure", "--size-mib", "64", "--format", "mount", owner=owner) for owner in owners]
    codes = [run.wait(timeout=120) for run in runs]
    assert sorted(codes) == [0, EXIT_CODES["other-stack"]]
    assert host.marks()["private-registry.stack"] == owners[codes.index(0)]


def test_status_says_who_has_it_open(opened: Host) -> None:
    state = json.loads(opened.run("status").stdout)
    assert state == {**state, "exists": True, "sizeMiB": 64, "owner": OWNER, "poolIsFull": False}
    assert [address.partition(":")[0] for address in state["watchers"]] == ["127.0.0.1"]


def test_status_of_an_image_that_is_not_there(host: Host) -> None:
    assert json.loads(host.run("status").stdout) == {"exists": False, "poolIsFull": False}


def test_the_user_may_do_no_more_than_a_client_of_the_pool(ceph: Ceph) -> None:
    name = f"u{uuid.uuid4().hex[:10]}"
    environment = {**os.environ, **ceph.environment}

    def user() -> str:
        command = [sys.executable, "-", "user", "--pool", "rbd", "--user", name]
        return subprocess.run(command, input=SCRIPT, env=environment, capture_output=True, text=True, check=True).stdout

    key = user()
    assert user() == key
    (found,) = json.loads(ceph.ceph("auth", "get", f"client.{name}", "--format", "json"))
    assert found["key"] == key.strip()
    assert found["caps"] == {"mon": "profile rbd", "osd": "profile rbd pool=rbd"}


def test_the_user_makes_no_image_in_another_pool(ceph: Ceph, tmp_path: Path) -> None:
    name, pool = (f"u{uuid.uuid4().hex[:10]}" for _ in range(2))
    environment = {**os.environ, **ceph.environment}
    command = [sys.executable, "-", "user", "--pool", "rbd", "--user", name]
    made = subprocess.run(command, input=SCRIPT, env=environment, capture_output=True, text=True, check=True)
    (tmp_path / "keyring").write_text(f"[client.{name}]\n\tkey = {made.stdout.strip()}\n")

    def create(spec: str) -> int:
        rbd = ["rbd", "create", spec, "--size", "8M", "--id", name, "--keyring", str(tmp_path / "keyring")]
        return subprocess.run(rbd, env=environment, capture_output=True, check=False).returncode

    ceph.ceph("osd", "pool", "create", pool)
    try:
        assert create(f"rbd/{name}") == 0
        assert create(f"{pool}/{name}") != 0
        assert ceph.rbd("ls", pool) == ""
    finally:
        ceph.ceph("osd", "pool", "delete", pool, pool, "--yes-i-really-really-mean-it")


def test_a_user_with_other_rights_is_left_as_it_is(ceph: Ceph) -> None:
    command = [sys.executable, "-", "user", "--pool", "rbd", "--user", "admin"]
    done = subprocess.run(
        command, input=SCRIPT, env={**os.environ, **ceph.environment}, capture_output=True, text=True, check=False
    )
    assert done.returncode == EXIT_CODES["other-rights"]
    assert "choose another storage.rbd.user" in done.stderr


def test_a_monitor_that_is_down_is_said_within_a_quarter_minute(tmp_path: Path) -> None:
    own = Ceph(tmp_path / "ceph")
    try:
        own.up()
        host = Host(own)
        host.ensure()
        own.stop_monitor()
        assert "Ceph does not answer this host" in host.refused("unreachable", "ensure", "--size-mib", "64", "--format", "mount")
        own.start_monitor()
        assert host.ensure()["done"] == []
    finally:
        own.down()


def test_a_pool_that_is_only_too_full_to_be_backfilled_takes_images(tmp_path: Path) -> None:
    own = Ceph(tmp_path / "ceph", size_mib=64)
    try:
        own.up()
        own.ceph("osd", "set-nearfull-ratio", "0.02")
        own.ceph("osd", "set-backfillfull-ratio", "0.03")
        (tmp_path / "data").write_bytes(os.urandom(8 << 20))
        own.rbd("import", str(tmp_path / "data"), "rbd/filler")
        wait_for(lambda: "backfillfull" in own.ceph("osd", "pool", "ls", "detail"), 60)
        assert Host(own).ensure()["done"] == ["created"]
    finally:
        own.down()


def test_a_full_pool_takes_no_new_image_and_grows_none(tmp_path: Path) -> None:
    own = Ceph(tmp_path / "ceph", size_mib=64)
    with contextlib.ExitStack() as ending:
        ending.callback(own.down)
        own.up()
        host = Host(own)
        host.ensure()
        own.rbd("create", "rbd/filler", "--size", "1024M")
        bench = ["rbd", "bench", "--io-type", "write", "--io-size", "4M", "--io-total", "300M", "rbd/filler"]
        writer = ending.enter_context(
            subprocess.Popen(bench, env=host.environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        )
        ending.callback(writer.kill)
        wait_for(lambda: "full" in own.ceph("health"), 60)
        assert json.loads(host.run("status").stdout)["poolIsFull"] is True
        assert "is full" in host.refused("full", "ensure", "--size-mib", "128", "--format", "mount")
        assert "is full" in Host(own).refused("full", "ensure", "--size-mib", "64", "--format", "mount")
        for policy in ("trash", "delete"):
            assert "cannot even be removed" in host.refused("full", "release", "--policy", policy)
            assert json.loads(Host(own).run("release", "--policy", policy).stdout)["done"] == []


def moments(ceph: Ceph, verb: str, *arguments: str, prepare: bool = False) -> int:
    """Return how many moments there are to kill such a run at."""
    host = Host(ceph)
    if prepare:
        host.ensure(form="host")
    done = host.killed(10_000, verb, *arguments, group=False)
    assert done.returncode == 0, done.stderr
    return int(done.stderr.split("moments ")[1])


def settled(host: Host, verb: str, *arguments: str) -> None:
    """Run again after a kill. What the killed run had open is open until its processes end, and 30 s at most."""
    done = host.run(verb, *arguments)
    if done.returncode == EXIT_CODES["in-use"]:
        deadline = time.monotonic() + 40
        while done.returncode == EXIT_CODES["in-use"] and time.monotonic() < deadline:
            time.sleep(1)
            done = host.run(verb, *arguments)
    assert done.returncode == 0, done.stderr
    assert host.devices() == []
    if verb == "ensure":
        assert json.loads(host.rbd("lock", "ls", host.spec, "--format", "json") or "[]") == []


@pytest.mark.timeout(3600 if EVERY_LINE else 300)
def test_killed_at_any_moment_of_a_creation_the_next_run_ends_it(ceph: Ceph) -> None:
    arguments = ("--size-mib", "64", "--format", "host")
    for at in range(1, moments(ceph, "ensure", *arguments) + 1):
        host = Host(ceph)
        assert host.killed(at, "ensure", *arguments, group=at % 2 == 0).returncode < 0, at
        settled(host, "ensure", *arguments)
        assert host.info()["size"] == 64 << 20, at
        assert host.marks() == {"private-registry.stack": OWNER, "private-registry.filesystem": "ext4"}, at
        assert host.devices() == [], at
        host.check_filesystem()
        host.discard()


@pytest.mark.timeout(3600 if EVERY_LINE else 300)
def test_killed_at_any_moment_of_a_growth_nothing_is_lost(ceph: Ceph, tmp_path: Path) -> None:
    arguments = ("--size-mib", "128", "--format", "host")
    content = os.urandom(1 << 20)
    for at in range(1, moments(ceph, "ensure", *arguments, prepare=True) + 1):
        host = Host(ceph)
        host.ensure(form="host")
        host.write(content, tmp_path)
        assert host.killed(at, "ensure", *arguments, group=at % 2 == 0).returncode < 0, at
        settled(host, "ensure", *arguments)
        assert host.info()["size"] == 128 << 20, at
        host.check_filesystem()
        assert host.read(tmp_path) == content, at
        host.discard()


@pytest.mark.timeout(3600 if EVERY_LINE else 300)
@pytest.mark.parametrize("policy", ["trash", "delete"])
def test_killed_at_any_moment_of_a_release_the_next_run_ends_it(ceph: Ceph, policy: str) -> None:
    arguments = ("--policy", policy)
    for at in range(1, moments(ceph, "release", *arguments, prepare=True) + 1):
        host = Host(ceph)
        host.ensure()
        assert host.killed(at, "release", *arguments, group=at % 2 == 0).returncode < 0, at
        settled(host, "release", *arguments)
        assert not host.exists(), at
        trashed = [entry["name"] for entry in json.loads(host.rbd("trash", "ls", "--format", "json"))]
        assert (host.image in trashed) == (policy == "trash"), at
        host.discard()
