"""A stack's RBD image, made by the engine over SSH on a real Ceph, which has no kernel client here."""

import json
import os
import uuid
from pathlib import Path
from typing import Any

import pytest

from lab.ceph import Ceph
from lab.sshd import SshServer
from tests.engine.stack import Stack

TARGET = ("--target", "**RbdVolume**")


class VolumeStack(Stack):
    """A stack of which only the RBD image is brought up here: no cluster is needed for that."""

    def __init__(self, folder: Path, ceph: Ceph, host: SshServer) -> None:
        super().__init__(f"v{uuid.uuid4().hex[:10]}", folder, port=32500)
        self.ceph = ceph
        self.host = host
        self.environment["KUBECONFIG"] = str(folder / "none")
        rbd = {"monitors": [ceph.monitor], "image": self.name, "sizeMiB": 64, "user": self.name, "host": host.settings}
        self.settings = {
            "target": "kubernetes",
            "hostname": self.hostname,
            "image": {"pushTo": "hub.example.com"},
            "storage": {"rbd": rbd},
        }
        self.set_secret("sshPrivateKey", host.private_key)

    def set_rbd(self, **values: Any) -> None:
        self.settings["storage"]["rbd"].update(values)

    def image(self) -> Any:
        return json.loads(self.ceph.rbd("info", f"rbd/{self.name}", "--format", "json"))

    def images(self) -> list[str]:
        return [name for name in json.loads(self.ceph.rbd("ls", "--format", "json")) if name == self.name]


@pytest.fixture
def stack(tmp_path: Path, ceph: Ceph, ceph_host: SshServer) -> VolumeStack:
    return VolumeStack(tmp_path, ceph, ceph_host)


def test_up_makes_the_image_with_the_lock_that_fences_and_a_user_with_least_rights(stack: VolumeStack) -> None:
    preview = stack.preview(*TARGET).stdout
    assert f"the RBD image rbd/{stack.name} is created with 64 MiB" in preview
    assert stack.images() == []
    stack.up(*TARGET)
    image = stack.image()
    assert image["size"] == 64 << 20
    assert sorted(image["features"]) == ["exclusive-lock", "layering"]
    (user,) = json.loads(stack.ceph.ceph("auth", "get", f"client.{stack.name}", "--format", "json"))
    assert user["caps"] == {"mon": "profile rbd", "osd": "profile rbd pool=rbd"}


def test_what_has_not_changed_takes_no_login(stack: VolumeStack) -> None:
    stack.up(*TARGET)
    before = stack.host.logins
    said = stack.up(*TARGET).stdout
    assert "created" not in said
    assert "updated" not in said
    stack.preview(*TARGET)
    assert stack.host.logins == before


def test_a_larger_size_is_said_by_the_preview_and_grows_the_image(stack: VolumeStack) -> None:
    stack.up(*TARGET)
    identifier = stack.image()["id"]
    stack.set_rbd(sizeMiB=128)
    assert "grows from 64 MiB to 128 MiB" in stack.preview(*TARGET).stdout
    assert stack.image()["size"] == 64 << 20
    stack.up(*TARGET)
    assert (stack.image()["size"], stack.image()["id"]) == (128 << 20, identifier)


@pytest.mark.parametrize("verb", ["preview", "up"])
def test_a_smaller_size_is_refused_before_anything_changes(stack: VolumeStack, verb: str) -> None:
    stack.set_rbd(sizeMiB=128)
    stack.up(*TARGET)
    stack.set_rbd(sizeMiB=64)
    before = stack.host.logins
    run = getattr(stack, verb)(*TARGET, check=False)
    assert run.returncode != 0
    assert "storage.rbd.sizeMiB is 64: it must be 128 or more" in run.stdout + run.stderr
    assert stack.host.logins == before
    assert stack.image()["size"] == 128 << 20


def test_another_image_in_the_same_stack_is_refused_by_the_preview(stack: VolumeStack) -> None:
    stack.up(*TARGET)
    stack.set_rbd(image=f"{stack.name}-other")
    run = stack.preview(*TARGET, check=False)
    assert run.returncode != 0
    assert "nothing would move the registry's images" in run.stdout + run.stderr


def test_destroy_keeps_the_image_and_the_next_up_finds_it(stack: VolumeStack) -> None:
    stack.up(*TARGET)
    identifier = stack.image()["id"]
    stack.destroy()
    assert stack.image()["id"] == identifier
    stack.up(*TARGET)
    assert stack.image()["id"] == identifier


def test_destroy_moves_the_image_to_the_trash_where_the_stack_says_so(stack: VolumeStack) -> None:
    stack.settings["storage"]["onDestroy"] = "trash"
    stack.up(*TARGET)
    identifier = stack.image()["id"]
    stack.destroy()
    trash = json.loads(stack.ceph.rbd("trash", "ls", "--format", "json"))
    assert [entry["name"] for entry in trash if entry["id"] == identifier] == [stack.name]
    refused = stack.up(*TARGET, check=False)
    assert f"`rbd trash restore rbd/{identifier}`" in refused.stdout
    stack.ceph.rbd("trash", "restore", f"rbd/{identifier}")
    stack.up(*TARGET)
    assert stack.image()["id"] == identifier


def test_destroy_deletes_the_image_where_the_stack_says_so(stack: VolumeStack) -> None:
    stack.settings["storage"]["onDestroy"] = "delete"
    stack.up(*TARGET)
    stack.destroy()
    assert stack.images() == []


def test_an_image_of_someone_else_is_refused_and_taken_over_on_request(stack: VolumeStack, tmp_path: Path) -> None:
    data = tmp_path / "data"
    data.write_bytes(os.urandom(64 << 20))
    stack.ceph.rbd("import", str(data), f"rbd/{stack.name}")
    run = stack.up(*TARGET, check=False)
    assert run.returncode != 0
    assert "holds data that is not of this stack" in run.stdout
    assert "adopt: true" in run.stdout
    stack.set_rbd(adopt=True)
    stack.up(*TARGET)
    stack.ceph.rbd("export", f"rbd/{stack.name}", str(tmp_path / "found"))
    assert (tmp_path / "found").read_bytes() == data.read_bytes()


def test_a_given_key_makes_no_user(stack: VolumeStack) -> None:
    stack.set_secret("cephKey", "AQCpPwprpSfWMhAAHD456IoPDGdUoQof0lI0KA==")
    stack.up(*TARGET)
    users = json.loads(stack.ceph.ceph("auth", "ls", "--format", "json"))["auth_dump"]
    assert f"client.{stack.name}" not in [user["entity"] for user in users]


def test_the_key_of_the_ceph_user_is_in_no_plain_text(stack: VolumeStack) -> None:
    said = stack.up(*TARGET).stdout
    (user,) = json.loads(stack.ceph.ceph("auth", "get", f"client.{stack.name}", "--format", "json"))
    assert user["key"] not in said + json.dumps(stack.state())


def test_a_missing_pool_is_named(stack: VolumeStack) -> None:
    stack.set_rbd(pool="nowhere")
    run = stack.up(*TARGET, check=False)
    assert "Ceph has no pool nowhere, only rbd: correct storage.rbd.pool" in run.stdout


def test_a_host_with_another_key_is_refused(stack: VolumeStack, tmp_path: Path) -> None:
    with SshServer(tmp_path) as other:
        stack.set_rbd(host={**stack.host.settings, "hostKey": other.host_key})
        run = stack.up(*TARGET, check=False)
    assert run.returncode != 0
    assert "host key mismatch" in run.stdout
    assert stack.images() == []


def test_a_host_that_is_away_is_named(stack: VolumeStack, tmp_path: Path) -> None:
    with SshServer(tmp_path) as other:
        gone = other.port
    stack.set_rbd(host={**stack.host.settings, "port": gone})
    run = stack.up(*TARGET, check=False)
    assert run.returncode != 0
    assert f"127.0.0.1:{gone}: after" in run.stdout
    assert "connection refused" in run.stdout


def test_a_client_key_that_the_host_does_not_know_is_refused(stack: VolumeStack, tmp_path: Path) -> None:
    with SshServer(tmp_path) as other:
        stack.set_secret("sshPrivateKey", other.private_key)
    run = stack.up(*TARGET, check=False)
    assert run.returncode != 0
    assert "unable to authenticate" in run.stdout


def test_the_host_is_reached_through_a_jump_host(stack: VolumeStack, ceph_host: SshServer) -> None:
    stack.set_rbd(host={**ceph_host.settings, "jump": ceph_host.settings})
    before = ceph_host.logins
    stack.up(*TARGET)
    assert ceph_host.logins >= before + 4  # two commands, two logins each
    assert stack.images() == [stack.name]


def test_without_a_host_the_machine_that_runs_pulumi_is_the_ceph_host(tmp_path: Path, ceph: Ceph, ceph_host: SshServer) -> None:
    stack = VolumeStack(tmp_path, ceph, ceph_host)
    stack.set_rbd(host=None)
    stack.pulumi("config", "rm", "private-registry:sshPrivateKey", "--stack", stack.name)
    stack.environment.update(ceph.environment)
    before = ceph_host.logins
    stack.up(*TARGET)
    assert stack.images() == [stack.name]
    assert ceph_host.logins == before


@pytest.mark.parametrize("kind", ["creating", "updating", "deleting"])
def test_recover_never_undoes_what_was_asked_of_the_image(stack: VolumeStack, ceph: Ceph, kind: str) -> None:
    stack.settings["storage"]["onDestroy"] = "delete"
    stack.set_rbd(host=None)
    stack.pulumi("config", "rm", "private-registry:sshPrivateKey", "--stack", stack.name)
    stack.environment.update(ceph.environment)
    stack.up(*TARGET)
    identifier = stack.image()["id"]
    # As a run leaves the state that was killed while the command ran.
    file = stack.folder / f"state/.pulumi/stacks/private-registry/{stack.name}.json"
    state = json.loads(file.read_text())
    resources = state["checkpoint"]["latest"]["resources"]
    (volume,) = [entry for entry in resources if entry["urn"].endswith("command:local:Command::volume")]
    state["checkpoint"]["latest"]["pending_operations"] = [{"resource": volume, "type": kind}]
    file.write_text(json.dumps(state))
    said = stack.ops("recover").stdout
    assert "Command volume was cut off" in said
    assert stack.image()["id"] == identifier
    stack.up(*TARGET)
    assert stack.image()["id"] == identifier


def test_the_image_is_formatted_on_the_host_on_request(stack: VolumeStack) -> None:
    stack.set_rbd(format="host")
    stack.up(*TARGET)
    assert stack.ceph.rbd("image-meta", "get", f"rbd/{stack.name}", "private-registry.filesystem").strip() == "ext4"
    assert json.loads(stack.ceph.rbd("status", f"rbd/{stack.name}", "--format", "json"))["watchers"] == []
