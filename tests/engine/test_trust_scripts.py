"""hosts/trust.sh on this machine's own files, with names that nobody else has."""

import fcntl
import os
import subprocess
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent
SCRIPT = str(ROOT / "hosts/trust.sh")
HOSTS = Path("/etc/hosts")
PEM = "-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----"


def edit_hosts(change: Callable[[str], str]) -> None:
    """Change the hosts file while no script does: other tests' stacks are in it, too, and whoever reads it finds them."""
    with HOSTS.open("r+") as hosts:
        fcntl.flock(hosts, fcntl.LOCK_EX)
        before = hosts.read()
        text = change(before)
        hosts.seek(0)
        hosts.write(text.ljust(len(before)))
        hosts.flush()
        hosts.truncate(len(text.encode()))


class Script:
    def __init__(self) -> None:
        self.host = f"h{uuid.uuid4().hex[:10]}.test"
        self.address = f"{self.host}:5000"
        self.file = Path(f"/etc/docker/certs.d/{self.address}/ca.crt")

    @property
    def environment(self) -> dict[str, str]:
        return {**os.environ, "STACK": "project/test", "REGISTRY": self.address, "ENTRY": "trust"}

    def run(
        self, verb: str, *, authority: str = PEM, runtime: str = "docker", resolve: str = "127.0.0.9", **more: str
    ) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [SCRIPT, verb],
            env=self.environment | {"AUTHORITIES": authority, "RUNTIME": runtime, "RESOLVE_TO": resolve} | more,
            capture_output=True,
            text=True,
            check=False,
        )

    def lines(self) -> list[str]:
        return [line for line in HOSTS.read_text().splitlines() if self.host in line]


@pytest.fixture
def script() -> Iterator[Script]:
    made = Script()
    yield made
    if made.file.parent.exists():
        for file in made.file.parent.iterdir():
            file.unlink()
        made.file.parent.rmdir()
    edit_hosts(lambda text: "".join(line for line in text.splitlines(keepends=True) if made.host not in line))


def test_install_writes_the_authority_and_one_line(script: Script) -> None:
    for _ in range(2):
        assert script.run("install").returncode == 0
    assert PEM in script.file.read_text()
    assert script.file.stat().st_mode & 0o777 == 0o644
    assert script.lines() == [f"127.0.0.9 {script.host} # private-registry project/test {script.address} trust"]


def test_another_authority_takes_the_place_of_the_first(script: Script) -> None:
    script.run("install")
    script.run("install", authority=PEM.replace("AAAA", "BBBB"))
    assert "BBBB" in script.file.read_text()
    assert "AAAA" not in script.file.read_text()


def test_remove_takes_both_away_and_can_run_again(script: Script) -> None:
    script.run("install")
    for _ in range(2):
        assert script.run("remove").returncode == 0
    assert not script.file.parent.exists()
    assert script.lines() == []


def test_a_foreign_authority_is_left_alone_by_both(script: Script) -> None:
    script.file.parent.mkdir(parents=True)
    script.file.write_text("of somebody else")
    refused = script.run("install")
    assert refused.returncode == 3
    assert "is not of this registry's stack" in refused.stderr
    assert script.lines() == []
    script.run("remove")
    assert script.file.read_text() == "of somebody else"


def test_other_files_in_the_folder_are_left_alone(script: Script) -> None:
    script.run("install")
    other = script.file.parent / "client.cert"
    other.write_text("of somebody else")
    script.run("remove")
    assert other.read_text() == "of somebody else"
    assert not script.file.exists()


def test_a_foreign_line_for_the_name_is_refused_and_kept(script: Script) -> None:
    edit_hosts(lambda text: f"{text}10.1.2.3 {script.host}\n")
    refused = script.run("install", runtime="none")
    assert refused.returncode == 3
    assert f"has {script.host} at 10.1.2.3 already" in refused.stderr
    script.run("remove")
    assert script.lines() == [f"10.1.2.3 {script.host}"]


def test_another_stacks_authority_for_the_same_address_is_left_alone(script: Script) -> None:
    script.run("install")
    refused = script.run("install", STACK="project/other")
    assert refused.returncode == 3
    script.run("remove", STACK="project/other")
    assert PEM in script.file.read_text()
    assert len(script.lines()) == 1


def test_a_hosts_file_without_an_end_to_its_last_line_keeps_that_line(script: Script) -> None:
    other = f"10.1.2.4 other-{script.host}"
    edit_hosts(lambda text: text + other)
    script.run("install", runtime="none")
    script.run("remove")
    assert other in HOSTS.read_text().splitlines()


def test_the_line_of_a_longer_port_is_left_alone(script: Script) -> None:
    script.run("install", runtime="none")
    short = script.address
    script.address = f"{short}0"
    script.run("install", runtime="none")
    script.address = short
    script.run("remove")
    assert script.lines() == [f"127.0.0.9 {script.host} # private-registry project/test {short}0 trust"]


def test_an_install_that_was_cut_off_leaves_no_half_file_after_the_next(script: Script) -> None:
    script.file.parent.mkdir(parents=True)
    (script.file.parent / "ca.crt.new").write_text("half")
    script.run("install")
    script.run("remove")
    assert not script.file.parent.exists()


def test_twenty_stacks_at_once_lose_no_line(script: Script) -> None:
    scripts = [Script() for _ in range(20)]
    try:
        running = [
            subprocess.Popen(
                [SCRIPT, "install"],
                env=one.environment | {"RUNTIME": "none", "RESOLVE_TO": "127.0.0.9"},
                stdin=subprocess.DEVNULL,
            )
            for one in scripts
        ]
        assert [process.wait() for process in running] == [0] * 20
        assert all(len(one.lines()) == 1 for one in scripts)
    finally:
        for one in scripts:
            one.run("remove")
    assert not any(one.lines() for one in scripts)


def test_without_permission_it_says_what_to_do(script: Script) -> None:
    # The checkout may be out of an ordinary user's reach: the script comes as a command.
    command = [
        "setpriv",
        "--reuid=65534",
        "--regid=65534",
        "--clear-groups",
        "sh",
        "-c",
        Path(SCRIPT).read_text(),
        "sh",
        "install",
    ]
    environment = script.environment | {"RUNTIME": "docker"}
    refused = subprocess.run(command, env=environment, cwd="/", capture_output=True, text=True, check=False)
    assert refused.returncode == 4
    assert "run this as root, or copy the stack output authorityCertificate there yourself" in refused.stderr
