"""`ops environment new`: what it asks, what it refuses, and the stack file that it writes."""

import json
import os
import pty
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner, Result

from ops import environment, stack
from ops.__main__ import app
from ops.environment import clashes, other_stacks
from ops.stack import OpsError
from settings import PROJECT, Settings, load

ROOT = Path(__file__).parent.parent.parent
FILES = sorted(file.name for file in ROOT.glob("Pulumi*.yaml"))
STACKS = sorted(file.name.removeprefix("Pulumi.").removesuffix(".yaml") for file in ROOT.glob("Pulumi.*.yaml"))


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A project with the stack files that this one has."""
    for name in FILES:
        (tmp_path / name).write_text((ROOT / name).read_text())
    monkeypatch.setattr(stack, "ROOT", tmp_path)
    return tmp_path


@pytest.fixture
def empty(project: Path) -> Path:
    """A project without stack files, and without defaults."""
    for name in STACKS:
        (project / f"Pulumi.{name}.yaml").unlink()
    (project / "Pulumi.yaml").write_text("name: private-registry\nruntime: python\n")
    return project


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(environment, "on_terminal", lambda: True)


def run(name: str, *arguments: str, answers: str = "") -> Result:
    return CliRunner().invoke(app, ["environment", "new", name, *arguments], input=answers)


def settings(*said: str) -> list[str]:
    return [part for one in said for part in ("--set", one)]


def said(result: Result) -> str:
    """All that was printed, in one line."""
    return " ".join(result.output.split())


def config(project: Path, name: str) -> dict[str, Any]:
    content = yaml.safe_load((project / f"Pulumi.{name}.yaml").read_text())["config"]
    return {key.removeprefix(f"{PROJECT}:"): value for key, value in content.items()}


def assert_nothing_was_written(project: Path) -> None:
    assert sorted(file.name for file in project.iterdir()) == FILES


def test_the_defaults_make_an_environment_of_its_own_beside_the_others(project: Path) -> None:
    result = run("qa", "--yes")
    assert result.exit_code == 0
    assert (project / "Pulumi.qa.yaml").read_text() == (
        "# yaml-language-server: $schema=settings.schema.json\n"
        "config:\n"
        "  private-registry:target: kubernetes\n"
        "  private-registry:hostname: registry-qa.docker\n"
        "  private-registry:kubernetes: {namespace: registry-qa, nodePort: 32503, cpu: '1', memory: 2Gi}\n"
        "  private-registry:storage:\n"
        "    rbd: {image: registry-qa, user: registry-qa, sizeMiB: 102400}\n"
        "  private-registry:environment: {wave: 1}\n"
    )
    assert sorted(file.name for file in project.iterdir()) == sorted([*FILES, "Pulumi.qa.yaml"])


def test_the_defaults_on_docker_have_the_next_free_port(project: Path) -> None:
    assert run("qa", "--yes", "--set", "target=docker").exit_code == 0
    assert config(project, "qa") == {
        "hostname": "registry-qa.docker",
        "environment": {"wave": 1},
        "container": {"port": 5001, "name": "registry-qa"},
        "storage": {"volume": "registry-qa"},
    }


def test_production_is_protected_and_comes_after_the_others(project: Path) -> None:
    assert run("live", "--yes", "--set", "environment.production=true").exit_code == 0
    written = config(project, "live")
    assert written["environment"] == {"production": True, "wave": 3}
    assert written["storage"] == {"protect": True, "rbd": {"image": "registry-live", "user": "registry-live"}}


def test_a_number_where_a_text_must_be_is_refused_with_the_mend(project: Path) -> None:
    result = run("qa", "--yes", *settings("kubernetes.cpu=2"))
    assert result.exit_code == 1
    assert "kubernetes.cpu is 2: it must be a text; write it in quotes" in said(result)


def test_a_claim_takes_the_defaults_image_back(project: Path) -> None:
    assert run("qa", "--yes", *settings("storage.claim.sizeGiB=5")).exit_code == 0
    assert config(project, "qa")["storage"] == {"rbd": None, "claim": {"sizeGiB": 5}}


def test_any_setting_can_be_set(project: Path) -> None:
    more = settings(
        "certificate.names=[a.test, b.test]",
        "kubernetes.nodeSelector={kubernetes.io/os: linux}",
        'kubernetes.cpu="2"',
        "image.pushTo=null",
        "image.nodes=[{address: node1, hostKey: ssh-ed25519 AAAA}]",
        "storage.rbd.adopt=yes",
    )
    assert run("qa", "--yes", *more).exit_code == 0
    written = config(project, "qa")
    assert written["certificate"] == {"names": ["a.test", "b.test"]}
    assert written["kubernetes"]["nodeSelector"] == {"kubernetes.io/os": "linux"}
    assert written["kubernetes"]["cpu"] == "2"
    assert written["image"] == {"pushTo": None, "nodes": [{"address": "node1", "hostKey": "ssh-ed25519 AAAA"}]}
    assert written["storage"]["rbd"]["adopt"] is True


@pytest.mark.parametrize(
    "more",
    [
        [],
        ["environment.production=true", "storage.rbd.host={address: ceph1, hostKey: ssh-ed25519 AAAA}"],
        ["storage.rbd=no", "storage.claim.className=fast"],
        ["target=docker", "container.address=0.0.0.0"],
        ["image.pushTo=null", "image.nodes=[{address: node1, hostKey: ssh-ed25519 AAAA}]"],
    ],
    ids=["defaults", "production", "claim", "docker", "nodes"],
)
def test_what_is_written_is_valid_by_the_schema_of_stack_files(more: list[str], project: Path) -> None:
    assert run("qa", "--yes", *settings(*more)).exit_code == 0
    checker = Path(sys.executable).with_name("check-jsonschema")
    command = [str(checker), "--schemafile", str(ROOT / "settings.schema.json")]
    checked = subprocess.run([*command, str(project / "Pulumi.qa.yaml")], capture_output=True, text=True, check=False)
    assert checked.returncode == 0, checked.stdout


def test_what_is_asked_on_a_terminal_is_written(project: Path, terminal: None) -> None:
    answers = "kubernetes\nhub.qa.test\nno\n2\nqa\n32600\n2\n4Gi\nyes\nqa\nqa-user\n2048\n"
    assert run("qa", answers=answers).exit_code == 0
    assert config(project, "qa") == {
        "target": "kubernetes",
        "hostname": "hub.qa.test",
        "environment": {"wave": 2},
        "kubernetes": {"namespace": "qa", "nodePort": 32600, "cpu": "2", "memory": "4Gi"},
        "storage": {"rbd": {"image": "qa", "user": "qa-user", "sizeMiB": 2048}},
    }


def test_a_real_terminal_is_asked_on(project: Path) -> None:
    for entry in ("ops", "settings.py"):
        (project / entry).symlink_to(ROOT / entry)
    mine, its = pty.openpty()
    try:
        os.write(mine, b"docker\n" + b"\n" * 7)
        command = [sys.executable, "-m", "ops", "environment", "new", "qa"]
        asked = subprocess.run(command, cwd=project, stdin=its, capture_output=True, text=True, check=False, timeout=60)
    finally:
        os.close(mine)
        os.close(its)
    assert asked.returncode == 0, asked.stdout + asked.stderr
    assert config(project, "qa")["container"] == {"port": 5001, "name": "registry-qa"}


def test_a_wrong_answer_is_told_in_the_settings_words_and_asked_again(project: Path, terminal: None) -> None:
    result = run("qa", *settings("target=kubernetes"), answers="A_B\nqa.test\nmaybe\nno\n\n\n40000\n32510\n0\n" + "\n" * 8)
    assert result.exit_code == 0
    assert 'hostname is "A_B": it must be a DNS name in lower case' in said(result)
    assert "nodePort is 40000: it must be a node port from 30000 to 32767; write one such as 32500" in said(result)
    assert 'cpu is "0": it must be a number of CPUs' in said(result)
    assert config(project, "qa")["kubernetes"]["nodePort"] == 32510


def test_an_answer_that_clashes_with_another_environment_is_asked_again(project: Path, terminal: None) -> None:
    said_already = settings("target=kubernetes", "environment.production=no", "environment.wave=1", "kubernetes.nodePort=32500")
    result = run("qa", *said_already, answers="registry.docker\nqa.test\n" + "\n" * 8)
    assert result.exit_code == 0
    assert "hostname makes registry.docker:32500, as Pulumi.prod.yaml does: it must be of one stack only" in said(result)
    assert config(project, "qa")["hostname"] == "qa.test"


def test_no_image_on_ceph_leads_to_the_questions_of_a_claim(project: Path, terminal: None) -> None:
    result = run("qa", answers="\n" * 8 + "no\n50\nfast\n")
    assert result.exit_code == 0
    assert config(project, "qa")["storage"] == {"rbd": None, "claim": {"sizeGiB": 50, "className": "fast"}}


def test_what_is_set_is_not_asked(project: Path, terminal: None) -> None:
    every = ["target=docker", "hostname=qa.test", "environment.production=no", "environment.wave=1", "container.address=::1"]
    result = run("qa", *settings(*every, "container.port=5009", "container.name=qa", "storage.volume=qa"))
    assert result.exit_code == 0
    assert result.output.startswith("✓ Pulumi.qa.yaml is written.")


def test_registry_and_monitors_are_asked_where_there_are_no_defaults(empty: Path, terminal: None) -> None:
    answers = "\n" * 7 + "hub.example.com\n10.0.0.1:6789, 10.0.0.2\n10.0.0.1:6789, 10.0.0.2:6789\n" + "\n" * 3
    result = run("qa", *settings("target=kubernetes", "storage.rbd=yes"), answers=answers)
    assert result.exit_code == 0, result.output
    assert "must be a monitor's address and port" in said(result)
    written = config(empty, "qa")
    assert written["image"] == {"pushTo": "hub.example.com"}
    assert written["storage"]["rbd"]["monitors"] == ["10.0.0.1:6789", "10.0.0.2:6789"]


def test_what_has_no_default_is_named(empty: Path) -> None:
    result = run("qa", "--yes", *settings("target=kubernetes", "storage.rbd=yes"))
    assert result.exit_code == 1
    assert "storage.rbd.monitors is" in said(result)
    assert "image.pushTo is missing: it must name a registry that the nodes can pull from" in said(result)
    assert not (empty / "Pulumi.qa.yaml").exists()


def test_without_a_terminal_what_is_not_set_is_named(project: Path) -> None:
    result = run("qa", *settings("target=docker", "hostname=qa.test"))
    assert result.exit_code == 1
    assert (
        "these are not set: environment.production (no), environment.wave (1), container.address (127.0.0.1), "
        "container.port (5001), container.name (registry-qa), storage.volume (registry-qa)." in said(result)
    )
    assert "with --yes" in said(result)
    assert_nothing_was_written(project)


@pytest.mark.parametrize("name", STACKS)
def test_a_stack_file_is_never_overwritten(name: str, project: Path) -> None:
    result = run(name, "--yes")
    assert result.exit_code == 1
    assert f"There is a Pulumi.{name}.yaml already" in said(result)
    assert (project / f"Pulumi.{name}.yaml").read_text() == (ROOT / f"Pulumi.{name}.yaml").read_text()


def test_a_file_that_comes_to_be_in_the_meantime_is_not_overwritten(project: Path) -> None:
    made = environment.NewEnvironment("qa", ["target=docker"])
    made.take_defaults()
    (project / "Pulumi.qa.yaml").write_text("of another")
    with pytest.raises(OpsError, match="not overwritten"):
        made.write()
    assert (project / "Pulumi.qa.yaml").read_text() == "of another"
    assert sorted(file.name for file in project.iterdir()) == sorted([*FILES, "Pulumi.qa.yaml"])


@pytest.mark.parametrize("name", ["a b", "a/b", "ü", "", "a" * 101], ids=["space", "slash", "umlaut", "empty", "long"])
def test_a_name_that_pulumi_does_not_take_is_refused(name: str, project: Path) -> None:
    result = run(name, "--yes")
    assert result.exit_code == 1
    assert "it must be 1 to 100 letters, digits, dots, dashes or underscores" in said(result)
    assert_nothing_was_written(project)


def test_a_folder_that_cannot_be_written_to_is_told(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(os, "link", refuse)
    result = run("qa", "--yes")
    assert result.exit_code == 1
    assert "Pulumi.qa.yaml cannot be written: Read-only file system." in said(result)
    assert_nothing_was_written(project)


@pytest.mark.parametrize("name", ["v1.2_B", "..", "_", "a" * 100], ids=["all", "dots", "underscore", "long"])
def test_a_name_that_pulumi_takes_has_valid_defaults(name: str, project: Path) -> None:
    assert run(name, "--yes").exit_code == 0
    assert (project / f"Pulumi.{name}.yaml").exists()


def test_defaults_that_clash_are_named_with_what_they_clash_with(project: Path) -> None:
    assert run("a.b", "--yes").exit_code == 0
    result = run("a_b", "--yes")
    assert result.exit_code == 1
    assert "kubernetes.namespace makes registry-a-b/registry, as Pulumi.a.b.yaml does" in said(result)
    mended = settings("kubernetes.namespace=ab2", "storage.rbd.image=ab2")
    assert run("a_b", "--yes", *mended).exit_code == 0
    assert config(project, "a_b")["kubernetes"]["nodePort"] == 32504


def test_all_faults_of_what_is_set_are_told_at_once(project: Path) -> None:
    wrong = ["hostname=A_B", "kubernetes.nodePort=x", "swarm.x=1", "kubernetes.nodeprt=1", "users.alice=a password", "wave"]
    result = run("qa", "--yes", *settings(*wrong, "certificate.names=["))
    assert result.exit_code == 1
    for part in (
        "has 7 faults; nothing was changed",
        'hostname is "A_B"',
        'kubernetes.nodePort is "x": it must be a whole number',
        "swarm is not a setting",
        "kubernetes.nodeprt is not a setting",
        "users is in plain text: it must be encrypted",
        "--set wave: it must be PATH=VALUE",
        "certificate.names cannot be read: it must be YAML",
    ):
        assert part in said(result)
    assert "a password" not in said(result)
    assert_nothing_was_written(project)


def test_what_is_set_later_is_taken(project: Path) -> None:
    assert (
        run(
            "qa",
            "--yes",
            *settings("kubernetes.ingress=null", "kubernetes.nodePort=32600", "kubernetes=null", "kubernetes.nodePort=32601"),
        ).exit_code
        == 0
    )
    assert config(project, "qa")["kubernetes"]["nodePort"] == 32601


PATHS = [field.alias or name for name, field in Settings.model_fields.items()]
PATHS += ["storage.rbd", "storage.rbd.image", "storage.claim", "storage.claim.sizeGiB", "kubernetes.nodePort", "image.nodes"]
PATHS += ["environment.production", "container.port", "target.x", "users", "defaults", "x.y", "kubernetes.nodeSelector.a.b"]
VALUES = [
    "",
    "null",
    "yes",
    "1",
    "0.5",
    "{}",
    "[]",
    "{a: 1}",
    "[{a: 1}]",
    "docker",
    "kubernetes",
    "2026-01-01",
    "{1: 2}",
    "[",
    "? x",
]


@given(said_=st.lists(st.tuples(st.sampled_from(PATHS), st.sampled_from(VALUES) | st.text()), max_size=4))
def test_whatever_is_set_is_taken_or_refused_by_sentences(said_: list[tuple[str, str]]) -> None:
    try:
        environment.NewEnvironment("qa", [f"{path}={value}" for path, value in said_]).take_defaults()
    except OpsError as error:
        assert error.what.startswith("the configuration of the stack 'qa' has")


def test_what_is_set_is_refused_before_anything_is_asked(project: Path, terminal: None) -> None:
    result = run("qa", *settings("storage.onDestroy=trash", "storage.protect=true"))
    assert result.exit_code == 1
    assert result.output.startswith("✗")
    assert "protect: true and onDestroy: trash contradict each other" in said(result)


def test_another_stack_file_with_faults_is_named(project: Path) -> None:
    (project / "Pulumi.dev.yaml").write_text("config: {private-registry:hostname: A_B}")
    result = run("qa", "--yes")
    assert result.exit_code == 1
    assert "the configuration of the stack 'dev' has 1 fault" in said(result)
    assert "Correct Pulumi.dev.yaml, which a new environment is compared with." in said(result)


@pytest.mark.parametrize("text", ["config: [", "config: 7", "[1]"])
@pytest.mark.parametrize("file", ["Pulumi.dev.yaml", "Pulumi.yaml"])
def test_a_file_that_cannot_be_read_is_named(file: str, text: str, project: Path) -> None:
    (project / file).write_text(text)
    result = run("qa", "--yes")
    assert result.exit_code == 1
    assert result.output.startswith(f"✗ {file} ")
    assert "Correct it, and run this again." in said(result)


def test_secrets_of_another_stack_file_are_passed_over(project: Path) -> None:
    with (project / "Pulumi.dev.yaml").open("a") as file:
        file.write("  private-registry:users: {alice: {secure: v1:abc}}\nencryptionsalt: v1:abc\n")
    assert run("qa", "--yes").exit_code == 0


def test_keys_of_other_projects_in_the_projects_file_are_passed_over(project: Path) -> None:
    with (project / "Pulumi.yaml").open("a") as file:
        file.write("  kubernetes:context: {value: qa}\n  docker:host: {default: unix:///docker.sock}\n")
    assert run("qa", "--yes").exit_code == 0


def test_the_next_commands_are_told(project: Path) -> None:
    result = run("qa", "--yes", *settings("storage.rbd.host={address: ceph1, hostKey: ssh-ed25519 AAAA}"))
    first, *_, last = [line.strip() for line in result.output.splitlines()[1:]]
    assert first == "pulumi stack init qa"
    assert "pulumi config set --secret private-registry:sshPrivateKey --stack qa <FILE" in said(result)
    assert "private-registry:pushCredentials.password --stack qa # if hub.example.com wants a login" in said(result)
    assert "kubectl create namespace registry-qa" in said(result)
    assert last == "python -m ops report --stack qa"


def test_a_certificate_of_ones_own_is_among_the_secrets_to_be_set(project: Path) -> None:
    result = run("qa", "--yes", *settings("certificate.mode=provided"))
    assert result.exit_code == 0
    for part in ("certificate", "privateKey", "authority"):
        assert f"--path private-registry:providedCertificate.{part} --stack qa <FILE" in said(result)


def test_no_secret_is_asked_for_that_is_not_needed(project: Path) -> None:
    result = run("qa", "--yes", *settings("target=docker"))
    assert "--secret" not in result.output


@pytest.mark.parametrize("name", STACKS)
def test_the_projects_own_stacks_do_not_clash(name: str) -> None:
    every = other_stacks()
    assert clashes(every.pop(name), every) == ([], [])


IN_CLUSTER = {"target": "kubernetes", "image": {"pushTo": "hub.example.com"}}
MONITORS = ["10.0.0.1:6789", "10.0.0.2:6789"]


def kubernetes(hostname: str, port: int, namespace: str, **sections: Any) -> Settings:
    own = {"hostname": hostname, "kubernetes": {"namespace": namespace, "nodePort": port, **sections.pop("kubernetes", {})}}
    return loaded({**IN_CLUSTER, **own, **sections})


def on_docker(hostname: str, port: int, name: str, volume: str, address: str = "127.0.0.1") -> Settings:
    container = {"name": name, "port": port, "address": address}
    return loaded({"hostname": hostname, "container": container, "storage": {"volume": volume}})


def loaded(sections: dict[str, Any]) -> Settings:
    texts = {key: value if isinstance(value, str) else json.dumps(value) for key, value in sections.items()}
    return load({f"{PROJECT}:{key}": text for key, text in texts.items()}, set(), "test")


def rbd(image: str, monitors: list[str], pool: str = "rbd") -> dict[str, Any]:
    return {"rbd": {"image": image, "monitors": monitors, "pool": pool}}


@pytest.mark.parametrize(
    ("one", "other", "fault"),
    [
        (kubernetes("a.test", 32500, "a"), kubernetes("a.test", 32500, "b"), "hostname makes a.test:32500"),
        (kubernetes("a.test", 32000, "a"), on_docker("a.test", 32000, "aa", "aa"), "hostname makes a.test:32000"),
        (
            kubernetes("a.test", 32500, "a", kubernetes={"ingress": {"host": "in.test", "tlsSecret": "in"}}),
            kubernetes("b.test", 32501, "b", kubernetes={"ingress": {"host": "in.test", "tlsSecret": "in"}}),
            "hostname makes in.test:443",
        ),
        (kubernetes("a.test", 32500, "a"), kubernetes("b.test", 32501, "a"), "kubernetes.namespace makes a/registry"),
        (
            kubernetes("a.test", 32500, "a", storage=rbd("images", MONITORS)),
            kubernetes("b.test", 32501, "b", storage=rbd("images", MONITORS[1:])),
            "storage.rbd.image makes rbd/images at 10.0.0.2:6789",
        ),
        (
            kubernetes("a.test", 32500, "a", storage={"claim": {"existing": "old-images"}}),
            kubernetes("b.test", 32501, "a", kubernetes={"name": "old"}),
            "storage.claim makes a/old-images",
        ),
        (on_docker("a.test", 5000, "aa", "images"), on_docker("b.test", 5001, "bb", "images"), "storage.volume makes images"),
    ],
    ids=["address", "targets", "ingress", "namespace", "rbd", "claim", "volume"],
)
def test_what_makes_two_environments_one_registry_is_refused(one: Settings, other: Settings, fault: str) -> None:
    for settings_, its in ((one, other), (other, one)):
        told, _ = clashes(settings_, {"other": its})
        assert [one for one in told if f"{PROJECT}:{fault}, as Pulumi.other.yaml does" in one]


@pytest.mark.parametrize(
    ("one", "other", "warning"),
    [
        (kubernetes("a.test", 32500, "a"), kubernetes("b.test", 32500, "b"), "nodePort makes 32500"),
        (on_docker("a.test", 5000, "same", "aa"), on_docker("b.test", 5001, "same", "bb"), "container.name makes same"),
        (on_docker("a.test", 5000, "aa", "aa"), on_docker("b.test", 5000, "bb", "bb"), "container.port makes 127.0.0.1:5000"),
    ],
    ids=["node port", "container", "port"],
)
def test_what_fails_by_itself_on_one_machine_is_only_warned_of(one: Settings, other: Settings, warning: str) -> None:
    faults, warnings = clashes(one, {"other": other})
    assert faults == []
    assert [told for told in warnings if warning in told] == warnings != []


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (
            kubernetes("a.test", 32500, "a", storage=rbd("images", MONITORS)),
            kubernetes("b.test", 32501, "b", storage=rbd("images", ["10.9.9.9:6789"])),
        ),
        (
            kubernetes("a.test", 32500, "a", storage=rbd("images", MONITORS)),
            kubernetes("b.test", 32501, "b", storage=rbd("images", MONITORS, "other")),
        ),
        (kubernetes("a.test", 32500, "a"), kubernetes("b.test", 32501, "a", kubernetes={"name": "second"})),
        (kubernetes("a.test", 32500, "a"), kubernetes("a.test", 32501, "b")),
        (on_docker("a.test", 5000, "aa", "aa", "10.0.0.1"), on_docker("b.test", 5000, "bb", "bb", "10.0.0.2")),
    ],
    ids=["other Ceph", "other pool", "other name", "other port", "other address"],
)
def test_what_two_environments_may_share_is_no_clash(one: Settings, other: Settings) -> None:
    assert clashes(one, {"other": other}) == ([], [])


def test_a_warning_does_not_keep_the_file_from_being_written(project: Path) -> None:
    result = run("qa", "--yes", *settings("kubernetes.nodePort=32500"))
    assert result.exit_code == 0
    assert "! private-registry:kubernetes.nodePort makes 32500, as Pulumi.prod.yaml does" in said(result)
    assert (project / "Pulumi.qa.yaml").exists()
