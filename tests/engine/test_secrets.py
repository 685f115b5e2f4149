"""Private keys and passwords are searched for wherever a stack leaves traces, and are found only where they belong."""

import io
import os
import subprocess
import tarfile
import threading
from collections.abc import Iterator
from pathlib import Path

import docker
import pytest

from tests.engine.conftest import new_stack
from tests.engine.stack import Stack

pytestmark = pytest.mark.xdist_group("secrets")
PASSWORD = "correct horse battery staple"


class Traces:
    """A stack that was brought up and changed, all that its commands printed, and every argv seen in the meantime."""

    def __init__(self, stack: Stack) -> None:
        self.stack = stack
        self.arguments: set[str] = set()
        self._stop = threading.Event()
        watcher = threading.Thread(target=self._watch)
        watcher.start()
        try:
            stack.set_secret("users.alice", PASSWORD)
            self.printed = self._commands()
        finally:
            self._stop.set()
            watcher.join()
        shown = stack.pulumi("stack", "export", "--show-secrets", "--stack", stack.name).stdout
        # What may be nowhere: the password, and the heart of each private key, as text and as JSON has it.
        self.secrets = [PASSWORD]
        for block in shown.split("-----BEGIN RSA PRIVATE KEY-----")[1:]:
            self.secrets.append(block.split("-----END")[0].replace("\\n", "\n").replace("\\", "").strip().split("\n")[3])
        assert len(self.secrets) >= 3

    def _watch(self) -> None:
        while not self._stop.is_set():
            for process in Path("/proc").glob("[0-9]*"):
                try:
                    command = (process / "cmdline").read_bytes().decode(errors="replace")
                except OSError:
                    continue
                # The test itself gives the password to `pulumi config set`, as no user has to.
                if "\0config\0set\0" not in command:
                    self.arguments.add(command)

    def _commands(self) -> str:
        stack = self.stack
        runs = [stack.preview("--diff"), stack.up("--diff"), stack.preview("--json")]
        stack.set("container", memoryMiB=256)
        runs += [stack.preview("--diff"), stack.up(), stack.ops("verify", "--docker"), stack.ops("recover")]
        return "".join(run.stdout + run.stderr for run in runs)

    def found_in(self, text: str | bytes) -> list[str]:
        data = text.encode() if isinstance(text, str) else text
        return [secret for secret in self.secrets if secret.encode() in data]


@pytest.fixture(scope="module")
def traces(tmp_path_factory: pytest.TempPathFactory, daemon: docker.DockerClient) -> Iterator[Traces]:
    with new_stack(tmp_path_factory.mktemp("secrets"), daemon) as stack:
        yield Traces(stack)


def test_no_secret_is_in_what_commands_print(traces: Traces) -> None:
    assert traces.found_in(traces.printed) == []


def test_no_secret_was_in_any_argv(traces: Traces) -> None:
    assert len(traces.arguments) > 10
    assert traces.found_in("\n".join(traces.arguments)) == []


def test_no_secret_is_in_the_state_history_or_stack_file(traces: Traces) -> None:
    files = [file for file in traces.stack.folder.rglob("*") if file.is_file() and "docker" not in file.parts]
    assert len(files) > 5
    assert {str(file): traces.found_in(file.read_bytes()) for file in files if traces.found_in(file.read_bytes())} == {}


def test_no_secret_is_in_the_outputs_as_shown(traces: Traces) -> None:
    shown = traces.stack.pulumi("stack", "output", "--stack", traces.stack.name).stdout
    assert "[secret]" in shown
    assert traces.found_in(shown) == []


def test_no_secret_is_in_the_image(traces: Traces, daemon: docker.DockerClient) -> None:
    image = daemon.containers.get(traces.stack.name).image
    assert image is not None
    saved = io.BytesIO(b"".join(image.save()))
    searched = 0
    with tarfile.open(fileobj=saved) as archive:
        for member in archive:
            if (file := archive.extractfile(member)) is not None:
                searched += 1
                assert traces.found_in(file.read()) == []
    assert searched > 3


def test_no_secret_is_in_the_containers_description_environment_or_log(traces: Traces, daemon: docker.DockerClient) -> None:
    for name in (traces.stack.name, f"{traces.stack.name}-files"):
        container = daemon.containers.get(name)
        inspected = subprocess.run(["docker", "inspect", name], capture_output=True, check=True).stdout
        assert traces.found_in(inspected) == []
        assert traces.found_in(container.logs()) == []
    container = daemon.containers.get(traces.stack.name)
    environment = Path(f"/proc/{container.attrs['State']['Pid']}/environ").read_bytes()
    assert b"REGISTRY_HTTP_TLS_KEY" in environment
    assert traces.found_in(environment) == []


def test_the_private_key_can_be_read_by_the_registrys_user_alone(traces: Traces, daemon: docker.DockerClient) -> None:
    container = daemon.containers.get(traces.stack.name)
    for file in ("/certs/domain.key", "/auth/htpasswd", "/etc/distribution/config.yml"):
        status, output = container.exec_run(["stat", "-c", "%a %u", file])
        assert (status, output) == (0, b"400 1000\n")


def test_htpasswd_has_bcrypt_hashes_only(traces: Traces, daemon: docker.DockerClient) -> None:
    _, output = daemon.containers.get(traces.stack.name).exec_run(["cat", "/auth/htpasswd"])
    assert output.startswith(b"alice:$2b$10$")
    assert traces.found_in(output) == []


def test_the_local_passphrase_file_is_for_its_owner_alone(tmp_path: Path, traces: Traces) -> None:
    for entry in ("toolchain", ".toolchain", "Pulumi.yaml", "Pulumi.local.yaml", "__main__.py"):
        (tmp_path / entry).symlink_to(Path(__file__).parent.parent.parent / entry)
    environment = {key: value for key, value in os.environ.items() if not key.startswith("PULUMI")}
    subprocess.run(["toolchain/local-stack.sh"], cwd=tmp_path, env=environment, capture_output=True, check=True)
    first = (tmp_path / ".local/passphrase").read_text()
    assert (tmp_path / ".local/passphrase").stat().st_mode & 0o777 == 0o600
    subprocess.run(["toolchain/local-stack.sh"], cwd=tmp_path, env=environment, capture_output=True, check=True)
    assert (tmp_path / ".local/passphrase").read_text() == first
    assert len(first) >= 40
