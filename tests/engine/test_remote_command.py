"""The stand-in for remote commands on the real engine, against a real SSH server."""

import contextlib
import json
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from lab.ports import free_port
from lab.sshd import SshServer
from tests.engine.stack import environment_of_toolchain, killed_on_failure

PROJECT = """
name: remote
runtime: python
"""
PROGRAM = """
import json, os
import pulumi
from pulumi_command import remote

arguments = json.loads(os.environ["ARGUMENTS"])
if arguments is not None:
    connection = remote.ConnectionArgs(**arguments.pop("connection"))
    command = remote.Command("command", connection=connection, **arguments)
    pulumi.export("stdout", command.stdout)
"""


@pytest.fixture(scope="module")
def docker_host() -> None:
    """No Docker daemon is started for these tests, as one is for the others of this folder."""


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of servers that let the same client in."""
    return tmp_path_factory.mktemp("ssh")


@pytest.fixture(scope="module")
def server(keys: Path) -> Iterator[SshServer]:
    with SshServer(keys, environment={"GREETING": "good morning", "OTHER": "other"}) as made:
        yield made


class Program:
    """A program with one remote command, whose arguments are to be set."""

    def __init__(self, folder: Path, server: SshServer) -> None:
        self.folder = folder
        self.connection = connection_to(server)
        self.arguments: dict[str, Any] = {}
        (folder / "state").mkdir()
        (folder / "Pulumi.yaml").write_text(PROJECT)
        (folder / "__main__.py").write_text(PROGRAM)
        self._environment = {
            **environment_of_toolchain(),
            "PULUMI_BACKEND_URL": f"file://{folder}/state",
            "PULUMI_CONFIG_PASSPHRASE": "a passphrase for tests",
        }
        self.pulumi("stack", "init", "test")

    def start(self, *arguments: str) -> subprocess.Popen[str]:
        described = {"connection": self.connection, **self.arguments}
        return subprocess.Popen(
            ["pulumi", "--non-interactive", "--color", "never", *arguments],
            cwd=self.folder,
            # In the environment, as there the private key is on no disk but for what is tested.
            env={**self._environment, "ARGUMENTS": json.dumps(described)},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def pulumi(self, *arguments: str, check: bool = True) -> str:
        process = self.start(*arguments)
        said, _ = process.communicate()
        assert not check or process.returncode == 0, said
        return said

    def up(self, **arguments: Any) -> str:
        """Bring it up with these arguments, and return the command's stdout."""
        self.arguments = arguments
        self.pulumi("up", "--yes", "--skip-preview")
        return self.output()

    def output(self) -> str:
        return str(json.loads(self.pulumi("stack", "output", "--json"))["stdout"])

    def failing_up(self, **arguments: Any) -> str:
        """Bring it up in vain, and return what was said."""
        self.arguments = arguments
        process = self.start("up", "--yes", "--skip-preview")
        said, _ = process.communicate()
        assert process.returncode != 0, said
        return said

    def destroy(self) -> None:
        self.pulumi("destroy", "--yes", "--skip-preview")

    def resources(self) -> set[str]:
        deployment = json.loads(self.pulumi("stack", "export"))["deployment"]
        return {resource["urn"].split("::")[-1] for resource in deployment.get("resources", [])}


@pytest.fixture
def program(tmp_path: Path, server: SshServer) -> Program:
    return Program(tmp_path, server)


def connection_to(server: SshServer, **more: Any) -> dict[str, Any]:
    settings = server.settings
    return {
        "host": settings["address"],
        "port": settings["port"],
        "user": settings["user"],
        "host_key": settings["hostKey"],
        "private_key": server.private_key,
        "dial_error_limit": 1,
        **more,
    }


def test_create_runs_and_its_stdout_is_an_output(program: Program) -> None:
    assert program.up(create="echo one; echo two >&2; echo three") == "one\nthree"


def test_the_servers_own_variables_are_there(program: Program) -> None:
    assert program.up(create='echo "$GREETING, $OTHER"') == "good morning, other"


def test_a_change_runs_update_with_stdin(program: Program) -> None:
    arguments = {"create": "echo created by; cat", "update": "echo updated by; cat"}
    assert program.up(**arguments, stdin="the first") == "created by\nthe first"
    assert program.up(**arguments, stdin="the second") == "updated by\nthe second"


def test_without_update_a_change_runs_create(program: Program) -> None:
    program.up(create="cat", stdin="first")
    assert program.up(create="cat", stdin="second") == "second"


def test_a_changed_connection_alone_is_an_update(program: Program) -> None:
    program.up(create="echo created", update="echo updated")
    program.connection["per_dial_timeout"] = 7
    assert program.up(create="echo created", update="echo updated") == "updated"


def test_a_changed_trigger_replaces(program: Program, tmp_path: Path) -> None:
    arguments = {"create": "echo created", "update": "echo updated", "delete": f"echo gone >>{tmp_path}/deleted"}
    program.up(**arguments, triggers=[1])
    assert program.up(**arguments, triggers=[2]) == "created"
    assert (tmp_path / "deleted").read_text() == "gone\n"


def test_delete_runs_when_it_is_destroyed(program: Program, tmp_path: Path) -> None:
    program.up(create=f"touch {tmp_path}/made", delete=f"rm {tmp_path}/made")
    assert (tmp_path / "made").exists()
    program.destroy()
    assert not (tmp_path / "made").exists()


def test_previews_and_an_up_that_changes_nothing_do_not_log_in(program: Program, server: SshServer) -> None:
    before = server.logins
    program.arguments = {"create": "true"}
    program.pulumi("preview")
    assert server.logins == before
    program.up(create="true")
    assert server.logins == before + 1
    program.up(create="true")
    program.arguments = {"create": "true", "stdin": "changed"}
    program.pulumi("preview")
    assert server.logins == before + 1


def test_a_host_with_another_key_is_refused(program: Program, server: SshServer, tmp_path: Path) -> None:
    with SshServer(tmp_path) as other:
        program.connection["host_key"] = other.host_key
        before = server.logins
        said = program.failing_up(create=f"touch {tmp_path}/made")
    assert f"127.0.0.1:{server.port}: after 1 failed attempts: host key mismatch: " in said
    assert server.logins == before
    assert not (tmp_path / "made").exists()


def test_another_client_key_is_refused(program: Program, server: SshServer, tmp_path: Path) -> None:
    with SshServer(tmp_path) as other:
        program.connection["private_key"] = other.private_key
        said = program.failing_up(create="true")
    assert f"127.0.0.1:{server.port}: after 1 failed attempts: unable to authenticate: " in said


def test_a_port_where_nobody_listens_is_named(program: Program) -> None:
    with socket.socket() as listener:  # it is bound, so that nobody else comes to listen there
        listener.bind(("127.0.0.1", 0))
        program.connection["port"] = listener.getsockname()[1]
        said = program.failing_up(create="true")
    assert f"127.0.0.1:{program.connection['port']}: after 1 failed attempts: connection refused" in said


def test_a_server_that_says_nothing_is_given_up_in_time(program: Program) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        program.connection |= {"port": listener.getsockname()[1], "per_dial_timeout": 1, "dial_error_limit": 0}
        said = program.failing_up(create="true")
    assert f"127.0.0.1:{program.connection['port']}: after 0 failed attempts: timed out after 1 s" in said


def test_a_server_that_comes_later_is_waited_for(program: Program, keys: Path) -> None:
    port = free_port()
    with socket.create_server(("127.0.0.1", port)) as listener:
        program.connection |= {"port": port, "dial_error_limit": 10}
        del program.connection["host_key"]
        program.arguments = {"create": "echo at last"}
        with killed_on_failure(program.start("up", "--yes", "--skip-preview")) as process:
            first, _ = listener.accept()
            first.close()
            listener.close()
            with SshServer(keys, port=port) as late:
                said, _ = process.communicate()
                assert process.returncode == 0, said
                assert late.logins == 1
    assert program.output() == "at last"


def test_a_failing_script_shows_its_status_and_all_that_it_wrote(program: Program, server: SshServer) -> None:
    said = program.failing_up(create="echo it began; echo it broke >&2; exit 7")
    assert f"127.0.0.1:{server.port}: Process exited with status 7: running " in said
    assert "it began\n" in said
    assert "it broke\n" in said


def test_a_script_that_is_killed_shows_the_signal(program: Program) -> None:
    assert "Process exited with status 137 from signal KILL: running " in program.failing_up(create="kill -KILL $$")


def test_a_failed_create_leaves_nothing_in_the_state(program: Program) -> None:
    program.failing_up(create="false")
    assert "command" not in program.resources()


def test_a_failed_update_leaves_the_state_as_it_was(program: Program) -> None:
    program.up(create="echo made", update="exit 1")
    program.failing_up(create="echo made", update="exit 1", stdin="changed")
    assert program.output() == "made"
    assert program.up(create="echo made", update="echo mended", stdin="changed") == "mended"


def test_a_variable_that_the_server_does_not_accept_is_named_and_nothing_runs(program: Program, tmp_path: Path) -> None:
    said = program.failing_up(create=f"touch {tmp_path}/made", environment={"COLOUR": "green"})
    assert "could not set environment variable 'COLOUR'" in said
    assert "AcceptEnv" in said
    assert not (tmp_path / "made").exists()


def test_a_command_runs_through_a_jump_host(program: Program, server: SshServer, tmp_path: Path) -> None:
    with SshServer(tmp_path) as jump:
        program.connection["proxy"] = connection_to(jump)
        before = server.logins
        assert program.up(create="echo arrived") == "arrived"
        assert (jump.logins, server.logins) == (1, before + 1)


def test_a_jump_host_with_another_key_is_refused(program: Program, server: SshServer, tmp_path: Path) -> None:
    with SshServer(tmp_path) as jump:
        program.connection["proxy"] = connection_to(jump, host_key=server.host_key)
        said = program.failing_up(create="true")
    assert f"proxy 127.0.0.1:{jump.port}: after 1 failed attempts: host key mismatch: " in said


def test_the_private_key_is_in_no_command_line_no_file_and_nothing_that_is_said(program: Program, server: SshServer) -> None:
    secret = server.private_key.splitlines()[1][-40:]
    command_lines = program.up(create="cat /proc/[0-9]*/cmdline 2>&- | tr '\\0' ' '")
    assert "toolchain.providers.command" in command_lines
    assert secret not in command_lines
    said = program.pulumi("preview", "--diff", "--show-sames") + program.pulumi("stack", "export")
    said += program.failing_up(create="exit 1")
    assert secret not in said
    files = [file for file in program.folder.rglob("*") if file.is_file()]
    assert any("command:remote:Command" in file.read_text(errors="replace") for file in files)
    assert [file for file in files if secret in file.read_text(errors="replace")] == []


def test_a_close_ends_the_commands_that_still_run(tmp_path: Path) -> None:
    with SshServer(tmp_path) as server:
        key = tmp_path / "client"
        options = ["-F", "none", "-i", str(key), "-o", "StrictHostKeyChecking=no", "-o", "UserKnownHostsFile=/dev/null"]
        command = ["ssh", *options, "-p", str(server.port), f"{server.settings['user']}@127.0.0.1", "echo $$; exec sleep 600"]
        with killed_on_failure(subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)) as client:
            assert client.stdout is not None
            pid = int(client.stdout.readline())
            server.close()
            assert client.wait(20) == 255
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):
        assert " Z " in Path(f"/proc/{pid}/stat").read_text()


def test_the_plugin_loads_no_ssh_library_before_a_command_runs() -> None:
    check = "import sys, toolchain.providers.command; sys.exit('asyncssh' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", check], env=os.environ, check=False).returncode == 0
