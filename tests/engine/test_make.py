"""The README's verbs, in a copy of the checkout, with a local stack that has names of its own."""

import os
import subprocess
import uuid
from collections.abc import Iterator
from pathlib import Path

import docker
import pytest
import yaml

from lab.ports import free_port
from tests.engine.stack import copy_checkout


class Checkout:
    def __init__(self, folder: Path, name: str) -> None:
        self.folder = folder
        self.name = name
        copy_checkout(folder)
        config = {
            "hostname": f"{name}.test",
            "container": {"name": name, "port": free_port()},
            "storage": {"volume": name},
            "image": {"repository": f"test/{name}"},
            "trust": {"docker": True, "hostsFile": True},
        }
        content = {"config": {f"private-registry:{key}": value for key, value in config.items()}}
        (folder / "Pulumi.local.yaml").write_text(yaml.safe_dump(content))
        subprocess.run("git init -q && git add -A", shell=True, cwd=folder, check=True)

    def make(self, *arguments: str, check: bool = True) -> str:
        environment = {key: value for key, value in os.environ.items() if not key.startswith(("PULUMI", "MAKE"))}
        run = subprocess.run(
            ["make", *arguments],
            cwd=self.folder,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
        )
        assert not check or run.returncode == 0, run.stdout
        return run.stdout

    def changed(self) -> str:
        command = ["git", "status", "--porcelain"]
        lines = subprocess.run(command, cwd=self.folder, capture_output=True, text=True, check=True).stdout.splitlines()
        return "\n".join(line for line in lines if not line.startswith("A  "))


@pytest.fixture
def checkout(tmp_path: Path, daemon: docker.DockerClient) -> Iterator[Checkout]:
    made = Checkout(tmp_path, f"m{uuid.uuid4().hex[:10]}")
    try:
        yield made
    finally:
        made.make("rm", check=False)
        for volume in daemon.volumes.list(filters={"name": made.name}):  # none where it did not come so far
            volume.remove()


@pytest.mark.timeout(600)
def test_up_ends_with_a_verified_push_and_pull_and_rm_leaves_only_the_images(
    checkout: Checkout, daemon: docker.DockerClient
) -> None:
    assert "✓ docker" in checkout.make("up")
    assert "15 unchanged" in checkout.make("run")
    assert "✓ delete" in checkout.make("verify")
    assert "Nothing to mend." in checkout.make("recover")
    assert "unchanged" in checkout.make("build")
    assert checkout.changed() == ""
    checkout.make("rm")
    assert [one for one in daemon.containers.list(all=True) if str(one.name).startswith(checkout.name)] == []
    assert f"{checkout.name}.test" not in Path("/etc/hosts").read_text()
    assert not list(Path("/etc/docker").glob(f"certs.d/{checkout.name}*"))
    assert daemon.volumes.get(checkout.name)
    assert "✓ docker" in checkout.make("up")
    assert checkout.changed() == ""


@pytest.mark.timeout(600)
def test_a_salt_that_a_command_wrote_into_the_tracked_file_does_no_harm(checkout: Checkout) -> None:
    checkout.make("run")
    enter = ". .toolchain/env && . .local/env && "
    subprocess.run(["bash", "-c", f"{enter}pulumi preview --stack local"], cwd=checkout.folder, check=True)
    assert "encryptionsalt" in (checkout.folder / "Pulumi.local.yaml").read_text()
    assert "15 unchanged" in checkout.make("run")


def test_make_alone_lists_the_verbs(checkout: Checkout, daemon: docker.DockerClient) -> None:
    daemon.volumes.create(checkout.name)
    said = checkout.make()
    for verb in ("up", "test", "toolchain", "build", "push", "run", "rm", "clean", "deploy", "clear", "verify", "lint"):
        assert f"make {verb} " in said
