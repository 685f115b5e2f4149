"""Other machines trust the registry: real Docker daemons and containerds, reached over real SSH, in networks of their own."""

import os
import re
import shlex
import shutil
import signal
import subprocess
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import docker
import pytest

from lab.machines import USER, Machine, Network
from tests.engine.clients import ContainerdClient, DockerClient
from tests.engine.conftest import new_stack
from tests.engine.stack import ROOT, Stack
from toolchain.programs import CONTAINERD, build

SCRIPT = ROOT / "hosts/trust.sh"
VERSION_2 = 'version = 2\n[plugins."io.containerd.grpc.v1.cri".registry]\n  config_path = "/etc/containerd/certs.d"\n'
VERSION_3 = "version = 3\n[plugins.'io.containerd.cri.v1.images'.registry]\n  config_path = '/etc/containerd/certs.d'\n"
X509 = "x509: certificate signed by unknown authority"
RESTART = (
    "pid=$(cat /run/containerd/pid); kill $pid; while kill -0 $pid; do sleep 0.1; done; "
    f"setsid -f sh -c '{ContainerdClient.program}' >/dev/null 2>&1; until ctr plugins ls; do sleep 0.1; done; "
    "echo restarted >>/etc/containerd/restarts"
)


@pytest.fixture(scope="module")
def network(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Network]:
    with Network(tmp_path_factory.mktemp("network")) as made:
        yield made


@pytest.fixture(scope="module")
def registry(tmp_path_factory: pytest.TempPathFactory, daemon: docker.DockerClient, network: Network) -> Iterator["Registry"]:
    """A registry that the machines reach, and one machine that always trusts it."""
    with new_stack(tmp_path_factory.mktemp("registry"), daemon) as stack:
        made = Registry(stack, network)
        made.trusting(network.add())
        yield made


@pytest.fixture
def machine(network: Network) -> Machine:
    return network.add()


class Registry:
    """A stack, and who trusts it besides the machine that always does."""

    def __init__(self, stack: Stack, network: Network) -> None:
        self.stack = stack
        self.address = stack.address
        self.network = network
        self.always: list[dict[str, object]] = []
        stack.set("container", address=network.address)
        stack.set("trust", docker=False, hostsFile=False)

    def entry(self, machine: Machine, **more: object) -> dict[str, object]:
        return {**machine.ssh.settings, "runtime": "docker", "resolveTo": self.network.address, **more}

    def trusting(self, machine: Machine) -> None:
        self.always = [self.entry(machine)]
        self.stack.set_secret("sshPrivateKey", machine.ssh.private_key)
        self.up()
        outputs = self.stack.outputs()
        self.login = outputs["username"], outputs["password"]
        self.authority = outputs["authorityCertificate"]

    def up(
        self, *entries: dict[str, object], options: tuple[str, ...] = (), check: bool = True
    ) -> subprocess.CompletedProcess[str]:
        """Bring it up with these hosts, and no others."""
        self.stack.settings["trust"]["hosts"] = [*self.always, *entries]
        return self.stack.up(*options, check=check)

    @property
    def file(self) -> str:
        return f"/etc/docker/certs.d/{self.address}/ca.crt"

    def trusted_by(self, machine: Machine) -> bool:
        return machine.answers("test", "-e", self.file)

    def resolve_at(self, machine: Machine) -> None:
        """Let the name resolve there, as a company's DNS does."""
        machine.run("sh", "-c", f"echo {self.network.address} {self.stack.hostname} >>/etc/hosts")

    def script(self, machine: Machine, verb: str, text: str | None = None, **more: str) -> subprocess.CompletedProcess[str]:
        """Run the script on a machine as the stack does."""
        variables = {
            "AUTHORITIES": self.authority,
            "STACK": f"private-registry/{self.stack.name}",
            "REGISTRY": self.address,
            "ENTRY": "trust",
            "RUNTIME": "docker",
            "RESOLVE_TO": self.network.address,
            **more,
        }
        words = [f"{name}={value}" for name, value in variables.items()]
        return machine.attempt("env", *words, "sh", "-s", verb, stdin=text or SCRIPT.read_text())


def test_a_docker_host_pushes_and_pulls_as_long_as_it_trusts(registry: Registry, machine: Machine) -> None:
    registry.resolve_at(machine)
    client = DockerClient(machine)
    reference = f"{registry.address}/by/docker:1"
    assert X509 in client.log_in(registry.address, *registry.login)
    assert X509 in client.push(reference)
    registry.up(registry.entry(machine, resolveTo=None))
    assert client.log_in(registry.address, *registry.login) == "Login Succeeded"
    assert client.push(reference) == reference
    assert client.pull(reference) == reference
    registry.up()
    assert X509 in client.pull(reference)


@pytest.mark.parametrize(("version", "configuration"), [("1.6", VERSION_2), ("2", VERSION_2), ("2", VERSION_3)])
def test_a_containerd_host_pulls_as_long_as_it_trusts(
    registry: Registry, machine: Machine, version: str, configuration: str
) -> None:
    if version == "2":
        machine.run("mount", "--bind", str(build(CONTAINERD)), "/usr/bin/containerd")
    assert f" {version}." in machine.run("containerd", "--version")
    machine.run("tee", "/etc/containerd/config.toml", stdin=configuration)
    registry.resolve_at(machine)
    client = ContainerdClient(machine)
    reference = pushed(registry)
    assert X509 in client.pull(reference, *registry.login)
    registry.up(registry.entry(machine, runtime="containerd", resolveTo=None))
    assert client.pull(reference, *registry.login).startswith("sha256:")
    missing = client.pull(f"{registry.address}/for/nobody:1", *registry.login)
    assert "not found" in missing, "and nothing about certificates"
    assert "x509" not in missing
    registry.up()
    assert X509 in client.pull(reference, *registry.login)


def pushed(registry: Registry) -> str:
    """Return the reference of an image that is in the registry."""
    reference = f"{registry.address}/for/containerd:1"
    machine = registry.network.machines[0]
    client = DockerClient(machine)
    client.log_in(registry.address, *registry.login)
    assert client.push(reference) == reference
    return reference


def test_an_up_that_changes_nothing_and_a_preview_log_in_nowhere(registry: Registry, machine: Machine) -> None:
    registry.up(registry.entry(machine))
    written = machine.run("stat", "-c", "%Y %i", registry.file)
    logins = machine.ssh.logins
    assert "unchanged" in registry.up(registry.entry(machine)).stdout
    registry.stack.preview()
    assert machine.ssh.logins == logins
    assert machine.run("stat", "-c", "%Y %i", registry.file) == written


def test_a_second_install_writes_nothing(registry: Registry, machine: Machine) -> None:
    assert registry.script(machine, "install").returncode == 0
    written = machine.run("stat", "-c", "%Y %i", registry.file)
    assert registry.script(machine, "install").returncode == 0
    assert machine.run("stat", "-c", "%Y %i", registry.file) == written


def test_a_host_that_goes_from_the_stack_has_nothing_of_it_left(registry: Registry, machine: Machine) -> None:
    before = machine.run("cat", "/etc/hosts")
    registry.up(registry.entry(machine))
    assert registry.stack.hostname in machine.run("cat", "/etc/hosts")
    registry.up()
    assert machine.run("find", "/etc/docker").split() == ["/etc/docker"]
    assert machine.run("cat", "/etc/hosts") == before.rstrip("\n") + "\n"


def test_an_ordinary_user_becomes_root(registry: Registry, machine: Machine) -> None:
    registry.up(registry.entry(machine, user=USER))
    assert machine.run("stat", "-c", "%U", registry.file).strip() == "root"


def test_a_host_that_is_listed_by_another_name_keeps_its_trust(registry: Registry, machine: Machine) -> None:
    registry.up(registry.entry(machine))
    registry.up(registry.entry(machine, address=f"::ffff:{machine.address}"))
    assert registry.trusted_by(machine)
    registry.up()
    assert not registry.trusted_by(machine)


def test_a_host_through_a_jump_host(registry: Registry, machine: Machine) -> None:
    registry.up(registry.entry(machine, jump=registry.network.machines[0].ssh.settings))
    assert registry.trusted_by(machine)


def test_two_of_twenty_hosts_are_down_and_the_others_trust(registry: Registry, network: Network) -> None:
    machines = [network.add() for _ in range(18)]
    down = [network.add() for _ in range(2)]
    for machine in down:
        machine.close()
    entries = [registry.entry(machine) for machine in (*down, *machines)]
    run = registry.up(*entries, options=("--continue-on-error",), check=False)
    assert run.returncode != 0
    assert all(registry.trusted_by(machine) for machine in machines)
    for machine in down:
        assert f"(trust-{machine.address}):\n    error: {machine.address}:22: after " in run.stdout
    # Without the two it is up.
    registry.up(*entries[2:])
    assert registry.stack.steps() == {}


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"hostKey": "another"}, "host key mismatch"),
        ({"user": "stranger"}, "unable to authenticate"),
        ({"port": 23}, "connection refused"),
    ],
)
def test_what_is_wrong_with_a_host_is_told(registry: Registry, machine: Machine, wrong: dict[str, object], said: str) -> None:
    if "hostKey" in wrong:
        wrong = {"hostKey": registry.network.machines[0].ssh.settings["hostKey"]}
    run = registry.up(registry.entry(machine, **wrong), check=False)
    assert run.returncode != 0
    assert f"trust-{machine.address}" in run.stdout
    assert said in run.stdout
    assert not registry.trusted_by(machine)
    registry.up()


def test_files_of_others_are_kept_and_named(registry: Registry, machine: Machine) -> None:
    file = registry.file
    machine.run("sh", "-c", f"mkdir -p {shlex.quote(str(Path(file).parent))} && echo other >{shlex.quote(file)}")
    run = registry.up(registry.entry(machine), check=False)
    assert f"{file} is there already and is not of this registry's stack" in run.stdout
    assert machine.run("cat", file) == "other\n"
    registry.up()
    assert machine.run("cat", file) == "other\n"


def test_a_hosts_toml_of_another_is_kept_and_named(registry: Registry, machine: Machine) -> None:
    folder = f"/etc/containerd/certs.d/{registry.address}"
    machine.run("sh", "-c", f"mkdir -p {folder} && echo '# other' >{folder}/hosts.toml")
    refused = registry.script(machine, "install", RUNTIME="containerd", CERTS_FOLDER="/etc/containerd/certs.d")
    assert refused.returncode == 3
    assert machine.run("find", folder, "-type", "f").split() == [f"{folder}/hosts.toml"]


def test_an_install_without_a_registry_that_answers_is_undone(registry: Registry, machine: Machine) -> None:
    before = machine.run("cat", "/etc/hosts")
    run = registry.script(machine, "install", RESOLVE_TO="", HANDSHAKE="yes")
    assert run.returncode == 6
    assert "Could not resolve host" in run.stderr
    assert machine.run("find", "/etc/docker").split() == ["/etc/docker"]
    assert machine.run("cat", "/etc/hosts") == before


def test_another_authority_is_told_from_the_registrys(registry: Registry, machine: Machine) -> None:
    command = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-subj", "/CN=other", "-keyout", "/dev/null"]
    other = machine.run(*command)
    run = registry.script(machine, "install", AUTHORITIES=other, HANDSHAKE="yes")
    assert run.returncode == 6
    assert "SSL certificate problem" in run.stderr


def test_a_full_disk_is_told_and_leaves_nothing(registry: Registry, machine: Machine) -> None:
    machine.run("mount", "-t", "tmpfs", "-o", "size=4k", "full", "/etc/docker")
    machine.run("sh", "-c", "head -c 4096 /dev/zero >/etc/docker/full")
    run = registry.script(machine, "install", RESOLVE_TO="")
    assert run.returncode == 7
    assert "see whether its disk is full" in run.stderr
    assert machine.run("find", "/etc/docker", "-type", "f").split() == ["/etc/docker/full"]


# Before and after what these do, something is there or not; between others, nothing changes. EVERY_LINE=yes: all lines.
CHANGES = re.compile(r"\b(mv|rm|rmdir|cp|mkdir|write|write_hosts|truncate|printf|chmod|restart|clear_\w+|first|trap)\b")


def statements(script: str) -> list[int]:
    """Return the numbers of the lines before which a script may be cut and is still one."""
    lines = script.splitlines(keepends=True)
    found = []
    for number, line in enumerate(lines):
        last = lines[number - 1] if number else ""
        if not line.startswith("  ") or not (os.environ.get("EVERY_LINE") or CHANGES.search(line) or CHANGES.search(last)):
            continue
        cut = "".join([*lines[:number], "kill -9 $$\n", *lines[number:]])
        if subprocess.run(["sh", "-n"], input=cut, text=True, capture_output=True, check=False).returncode == 0:
            found.append(number)
    return found


def everything(machine: Machine) -> str:
    files = "find /etc/docker /etc/containerd -type f ! -name restarts -exec sha256sum {} +; cat /etc/hosts"
    return machine.run("sh", "-c", files)


@pytest.mark.parametrize(
    "more",
    [
        {"RUNTIME": "docker"},
        {"RUNTIME": "containerd", "CERTS_FOLDER": "/etc/containerd/certs.d"},
        {"RUNTIME": "containerd", "RESTART": "echo restarted >>/etc/containerd/restarts"},
    ],
    ids=["docker", "containerd", "containerd without config_path"],
)
def test_killed_at_each_line_it_is_whole_after_the_next_run(registry: Registry, machine: Machine, more: dict[str, str]) -> None:
    text = SCRIPT.read_text()
    # What was there before stays: the machine's configuration of containerd, but for what is set in it.
    reset = "rm -f /etc/containerd/restarts; printf 'version = 2\\n' >/etc/containerd/config.toml"
    machine.run("sh", "-c", reset)
    nothing = everything(machine)
    assert registry.script(machine, "install", **more).returncode == 0
    installed = everything(machine)
    assert registry.script(machine, "remove", **more).returncode == 0
    removed = everything(machine)
    if "RESTART" not in more:
        assert removed == nothing
    lines, killed = text.splitlines(keepends=True), 0
    for number in statements(text):
        cut = "".join([*lines[:number], "kill -9 $$\n", *lines[number:]])
        machine.run("sh", "-c", reset)
        for verb, then in (("install", installed), ("remove", removed)):
            where = f"{verb}, killed before line {number + 1}: {lines[number]}"
            killed += registry.script(machine, verb, cut, **more).returncode == -signal.SIGKILL
            run = registry.script(machine, verb, **more)
            assert run.returncode == 0, where + run.stderr
            assert everything(machine) == then, where
        if "RESTART" in more:
            assert "restarted" in machine.run("cat", "/etc/containerd/restarts"), where
    assert killed > 30


def test_a_program_that_is_killed_within_the_script_takes_nothing_from_the_hosts_file(
    registry: Registry, machine: Machine
) -> None:
    assert registry.script(machine, "install").returncode == 0
    before = machine.run("cat", "/etc/hosts")
    machine.run(
        "sh",
        "-c",
        "mkdir /etc/docker/bin && printf '#!/bin/sh\\nkill -9 $$\\n' >/etc/docker/bin/awk && chmod +x /etc/docker/bin/awk",
    )
    cut = SCRIPT.read_text().replace("PATH=$PATH:", "PATH=/etc/docker/bin:$PATH:")
    for verb in ("install", "remove"):
        assert registry.script(machine, verb, cut, RESOLVE_TO="10.9.9.9").returncode != 0
        assert machine.run("cat", "/etc/hosts") == before


def test_two_stacks_at_once_on_one_containerd_restart_it_and_spoil_nothing(registry: Registry, machine: Machine) -> None:
    machine.run("tee", "/etc/containerd/config.toml", stdin="version = 2\n[debug]\n  level = 'info'\n")
    machine.run("chmod", "600", "/etc/containerd/config.toml")

    def install(stack: str) -> int:
        more = {"RUNTIME": "containerd", "RESTART": "sleep 0.3; echo restarted >>/etc/containerd/restarts"}
        address = f"{stack}.test:5000"
        return registry.script(machine, "install", STACK=stack, REGISTRY=address, **more).returncode

    with ThreadPoolExecutor() as pool:
        assert list(pool.map(install, [f"stack-{number}" for number in range(6)])) == [0] * 6
    assert machine.run("cat", "/etc/containerd/restarts") == "restarted\n"
    assert len(machine.run("find", "/etc/containerd/certs.d", "-name", "hosts.toml").split()) == 6
    assert machine.run("stat", "-c", "%a", "/etc/containerd/config.toml").strip() == "600"
    assert machine.run("find", "/etc/containerd", "-maxdepth", "1", "-name", "config.*").split() == [
        "/etc/containerd/config.toml"
    ]


def test_a_host_without_containerd_any_more_is_let_go(registry: Registry, machine: Machine) -> None:
    more = {"RUNTIME": "containerd"}
    machine.run("tee", "/etc/containerd/config.toml", stdin=VERSION_2)
    assert registry.script(machine, "install", **more).returncode == 0
    machine.run("tee", "/etc/containerd/config.toml", stdin="no configuration")
    refused = registry.script(machine, "install", **more)
    assert refused.returncode == 5
    assert "cannot read its configuration" in refused.stderr
    assert registry.script(machine, "remove", **more).returncode == 0
    assert machine.run("find", "/etc/containerd", "-type", "f").split() == ["/etc/containerd/config.toml"]


def test_a_stack_of_before_is_taken_down_by_what_its_state_calls(machine: Machine, registry: Registry) -> None:
    folder = machine.folder / "hosts-of-the-project"
    shutil.copytree(ROOT / "hosts", folder)
    file = registry.file
    mark = f"# private-registry private-registry/old {registry.address}"
    machine.run("sh", "-c", f"mkdir -p {Path(file).parent} && printf '%s\\n' '{mark}' >{file}")
    variables = ["STACK=private-registry/old", f"REGISTRY={registry.address}", "TRUST_DOCKER=yes", "RESOLVE_TO="]
    machine.run("env", *variables, f"{folder}/trust-remove.sh")
    assert machine.run("find", "/etc/docker").split() == ["/etc/docker"]


def test_containerd_that_looks_for_no_authority_is_told_and_left_alone(registry: Registry, machine: Machine) -> None:
    run = registry.up(registry.entry(machine, runtime="containerd"), check=False)
    assert "containerd's config_path is empty" in run.stdout
    assert 'Set config_path = "/etc/containerd/certs.d"' in run.stdout
    assert machine.run("find", "/etc/containerd").split() == ["/etc/containerd"]
    registry.up()


REGISTRY_TABLE = """version = 2
[plugins."io.containerd.grpc.v1.cri".registry]
  config_path = ""
  [plugins."io.containerd.grpc.v1.cri".registry.headers]
    X = ["y"]
"""


@pytest.mark.parametrize("version", ["1.6", "2"])
@pytest.mark.parametrize("configuration", ["", "version = 2\n[debug]\n  level = 'info'\n", REGISTRY_TABLE])
def test_containerd_is_restarted_once_where_the_stack_allows_it(
    registry: Registry, machine: Machine, version: str, configuration: str
) -> None:
    if version == "2":
        machine.run("mount", "--bind", str(build(CONTAINERD)), "/usr/bin/containerd")
        # From version 2.2 on it looks there by itself.
        configuration = configuration or "version = 3\n[plugins.'io.containerd.cri.v1.images'.registry]\n  config_path = ''\n"
    if configuration:
        machine.run("tee", "/etc/containerd/config.toml", stdin=configuration)
    client = ContainerdClient(machine)
    entry = registry.entry(machine, runtime="containerd", restart=RESTART)
    registry.up(entry)
    again = registry.script(machine, "install", RUNTIME="containerd", RESTART=RESTART, ENTRY=f"trust-{machine.address}")
    assert again.returncode == 0
    assert machine.run("cat", "/etc/containerd/restarts") == "restarted\n"
    client.connect()
    assert client.pull(pushed(registry), *registry.login).startswith("sha256:")
    if "headers" in configuration:
        assert '"y"' in machine.run("containerd", "config", "dump").replace("'", '"')
    registry.up()


def test_a_restart_that_fails_leaves_containerd_as_it_was(registry: Registry, machine: Machine) -> None:
    machine.run("tee", "/etc/containerd/config.toml", stdin="version = 2\n")
    run = registry.script(machine, "install", RUNTIME="containerd", RESTART="false")
    assert run.returncode == 5
    assert "`false` failed, so that containerd has its old configuration again" in run.stderr
    assert machine.run("cat", "/etc/containerd/config.toml") == "version = 2\n"
    assert machine.run("find", "/etc/containerd", "-type", "f").split() == ["/etc/containerd/config.toml"]


def test_mirrors_in_containerds_configuration_are_not_overridden(registry: Registry, machine: Machine) -> None:
    mirrors = 'version = 2\n[plugins."io.containerd.grpc.v1.cri".registry.mirrors."docker.io"]\n  endpoint = ["https://mirror"]\n'
    machine.run("tee", "/etc/containerd/config.toml", stdin=mirrors)
    run = registry.script(machine, "install", RUNTIME="containerd", RESTART="true")
    assert run.returncode == 5
    assert "registry.mirrors" in run.stderr
    assert machine.run("cat", "/etc/containerd/config.toml") == mirrors


def test_ops_trust_shows_what_each_host_trusts_and_fixes_one(registry: Registry, network: Network) -> None:
    well, lacking, away = (network.add() for _ in range(3))
    entries = [registry.entry(machine) for machine in (well, lacking, away)]
    registry.up(*entries)
    assert registry.stack.ops("trust").stdout.count("✓") == 4
    lacking.run("rm", registry.file)
    away.close()
    run = registry.stack.ops("trust", check=False)
    assert run.returncode == 1
    assert f"✓ │ {well.address} " in run.stdout
    assert f"✗ │ {lacking.address} " in run.stdout
    assert f"{lacking.address}: Run `python -m ops trust --fix {lacking.address}`" in run.stdout
    assert f"{away.address}: See whether it runs." in run.stdout
    assert "✓" in registry.stack.ops("trust", "--fix", lacking.address).stdout
    assert registry.trusted_by(lacking)
    registry.up(*entries[:2], options=("--continue-on-error",), check=False)
    registry.stack.pulumi("state", "delete", "--yes", "--stack", registry.stack.name, away_urn(registry, away))
    registry.up()


def away_urn(registry: Registry, machine: Machine) -> str:
    resources = registry.stack.state()["deployment"]["resources"]
    return next(str(one["urn"]) for one in resources if one["urn"].endswith(f"::trust-{machine.address}"))


def test_ops_trust_names_a_host_that_the_stack_does_not_list(registry: Registry) -> None:
    run = registry.stack.ops("trust", "--fix", "192.0.2.1", check=False)
    assert run.returncode == 1
    assert "does not list 192.0.2.1" in run.stdout
