"""A stack as a user has it: a project folder, a stack file, a backend, and the CLI."""

import contextlib
import json
import os
import shutil
import signal
import ssl
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, AnyStr

import httpx
import yaml

ROOT = Path(__file__).parent.parent.parent
HOSTS_FILE_SECONDS = 30  # the daemon, a Go program, reads the hosts file again after five; under load an attempt takes some too
PROGRAM = ("__main__.py", "settings.py", "components", "hosts", "image", "ops", "policy")


def environment_of_toolchain() -> dict[str, str]:
    """What `. .toolchain/env` sets."""
    command = [". .toolchain/env && env -0"]
    run = subprocess.run(["sh", "-c", *command], cwd=ROOT, capture_output=True, text=True, check=True)
    return dict(entry.split("=", 1) for entry in run.stdout.split("\0") if entry)


def copy_checkout(folder: Path) -> None:
    """Copy what git tracks into a folder, with this checkout's virtual environment."""
    tracked = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for file in filter(None, tracked.split("\0")):
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / file, folder / file)
    (folder / ".venv").symlink_to(ROOT / ".venv")


class Stack:
    """One stack. What it says of the registry is in ``settings``, written to its file before each command."""

    def __init__(self, name: str, folder: Path, *, port: int) -> None:
        self.name = name
        self.folder = folder
        self.hostname = f"{name}.test"
        self.port = port
        self.settings: dict[str, Any] = {
            "hostname": self.hostname,
            "container": {"name": name, "port": port},
            "storage": {"volume": name},
            "image": {"repository": f"test/{name}"},
            "trust": {"docker": True, "hostsFile": True},
        }
        self._salt = ""
        self.environment = {
            **environment_of_toolchain(),
            "DOCKER_HOST": os.environ["DOCKER_HOST"],
            "PULUMI_BACKEND_URL": f"file://{folder}/state",
            "PULUMI_CONFIG_PASSPHRASE": "a passphrase for tests",
            "STACK": name,
        }
        if not (folder / "state").exists():
            self._make_project()
        self.write()
        self.pulumi("stack", "init", name)

    def _make_project(self) -> None:
        """Make the folder that all stacks of a project share."""
        (self.folder / "state").mkdir()
        project = yaml.safe_load((ROOT / "Pulumi.yaml").read_text())
        del project["config"]["defaults"]  # they are of the environments that the project has as examples
        (self.folder / "Pulumi.yaml").write_text(yaml.safe_dump(project))
        for entry in PROGRAM:
            (self.folder / entry).symlink_to(ROOT / entry)

    @property
    def address(self) -> str:
        return f"{self.hostname}:{self.port}"

    @property
    def file(self) -> Path:
        return self.folder / f"Pulumi.{self.name}.yaml"

    @property
    def trust_file(self) -> Path:
        return Path(f"/etc/docker/certs.d/{self.address}/ca.crt")

    def set(self, section: str, **values: Any) -> None:
        self.settings[section] = {**self.settings.get(section, {}), **values}

    def set_secret(self, path: str, value: str) -> None:
        """Set an encrypted value; it stays in the file."""
        self.write()
        self.pulumi("config", "set", "--secret", "--path", f"private-registry:{path}", "--", value)

    def write(self) -> None:
        """Write the settings over what the file says of them; encrypted values and the salt stay."""
        content = yaml.safe_load(self.file.read_text()) if self.file.exists() else {}
        config = content.setdefault("config", {})
        secret = {key: value for key, value in config.items() if "secure" in json.dumps(value)}
        content["config"] = {**{f"private-registry:{key}": value for key, value in self.settings.items()}, **secret}
        self.file.write_text(yaml.safe_dump(content))

    def run(self, *command: str, check: bool = True, **environment: str) -> subprocess.CompletedProcess[str]:
        """Run a command with the stack's environment, in its folder."""
        run = subprocess.run(
            command,
            cwd=self.folder,
            env={**self.environment, **environment},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            check=False,
        )
        if check and run.returncode:
            raise AssertionError(f"{' '.join(command)} exited {run.returncode}:\n{run.stdout}{run.stderr}")
        return run

    def pulumi(self, *arguments: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        return self.run("pulumi", "--non-interactive", "--color", "never", *arguments, check=check)

    def _update(self, verb: str, *arguments: str, check: bool) -> subprocess.CompletedProcess[str]:
        self.write()
        return self.pulumi(verb, "--stack", self.name, *arguments, check=check)

    def up(self, *arguments: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        return self._update("up", "--yes", "--skip-preview", *arguments, check=check)

    def preview(self, *arguments: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        return self._update("preview", *arguments, check=check)

    def destroy(self, *arguments: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        return self._update("destroy", "--yes", "--skip-preview", *arguments, check=check)

    def steps(self) -> dict[str, str]:
        """What a preview would do, by the resources' names; what stays the same is left out."""
        steps = json.loads(self.preview("--json").stdout)["steps"]
        return {step["urn"].split("::")[-1]: step["op"] for step in steps if step["op"] != "same"}

    def start(self, verb: str) -> subprocess.Popen[bytes]:
        """Begin an update in a process group of its own, to be killed in the middle."""
        self.write()
        command = ["pulumi", "--non-interactive", verb, "--yes", "--skip-preview", "--stack", self.name]
        return subprocess.Popen(
            command,
            cwd=self.folder,
            env=self.environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )

    def ops(self, *arguments: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        return self.run(sys.executable, "-m", "ops", *arguments, check=check, COLUMNS="200")

    def outputs(self) -> dict[str, Any]:
        shown = self.pulumi("stack", "output", "--json", "--show-secrets", "--stack", self.name).stdout
        outputs: dict[str, Any] = json.loads(shown)
        return outputs

    def state(self) -> dict[str, Any]:
        state: dict[str, Any] = json.loads(self.pulumi("stack", "export", "--stack", self.name).stdout)
        return state

    def client(self, *, anonymous: bool = False) -> httpx.Client:
        """An HTTP client that trusts the stack's authority alone, logged in as the stack's user."""
        outputs = self.outputs()
        return httpx.Client(
            base_url=f"https://{self.address}",
            verify=ssl.create_default_context(cadata=outputs["authorityCertificate"]),
            auth=None if anonymous else (outputs["username"], outputs["password"]),
            trust_env=False,
        )

    def docker(self, *arguments: str, check: bool = True, stdin: str = "") -> subprocess.CompletedProcess[str]:
        """Run the Docker client with logins of the stack's own."""
        deadline = time.monotonic() + HOSTS_FILE_SECONDS
        while True:
            run = subprocess.run(
                ["docker", *arguments],
                env={**self.environment, "DOCKER_CONFIG": str(self.folder / "docker")},
                input=stdin,
                capture_output=True,
                text=True,
                check=False,
            )
            # A node port is open when kube-proxy has heard of the pod that is ready.
            is_too_early = "no such host" in run.stderr or "connection refused" in run.stderr
            if not is_too_early or time.monotonic() > deadline:
                break
            time.sleep(0.5)
        if check and run.returncode:
            raise AssertionError(f"docker {' '.join(arguments)} exited {run.returncode}: {run.stderr}")
        return run

    def log_in(self) -> None:
        outputs = self.outputs()
        self.docker("login", "--username", outputs["username"], "--password-stdin", self.address, stdin=outputs["password"])

    def push_image(self, name: str = "kept") -> str:
        """Push the registry's base image under a name, and return its digest."""
        reference = f"{self.address}/{name}:1"
        self.log_in()
        self.docker("tag", "registry:3.1.2", reference)
        self.docker("push", "--quiet", reference)
        digest = self.docker("image", "inspect", "--format", "{{index .RepoDigests 0}}", reference).stdout.strip()
        self.docker("rmi", reference)
        return digest.rpartition("@")[2]

    def pull_image(self, name: str = "kept") -> str:
        """Pull what was pushed under a name, and return its digest."""
        reference = f"{self.address}/{name}:1"
        self.log_in()
        self.docker("pull", "--quiet", reference)
        digests = self.docker("image", "inspect", "--format", "{{json .RepoDigests}}", reference).stdout
        self.docker("rmi", reference)
        found = [entry for entry in json.loads(digests) if entry.startswith(f"{self.address}/")]
        return str(found[0].rpartition("@")[2])

    def own_image(self) -> Path:
        """Let the project's image be made of files of its own, to be changed, and return their folder."""
        image = self.folder / "image"
        if image.is_symlink():
            original = image.resolve()
            image.unlink()
            shutil.copytree(original, image)
        return image

    def change_configuration(self) -> None:
        """Give the project a registry configuration of its own, which is another image."""
        image = self.own_image()
        (image / "config.yml").write_text((image / "config.yml").read_text().replace("level: info", "level: warn"))

    def remove_trust(self) -> None:
        remove_trust(self.name, self.address)


def remove_trust(name: str, address: str) -> None:
    """Take away what a stack wrote for this machine's Docker daemon."""
    subprocess.run(
        [str(ROOT / "hosts/trust.sh"), "remove"],
        env={
            **os.environ,
            "STACK": f"private-registry/{name}",
            "REGISTRY": address,
            "ENTRY": "trust",
            "RUNTIME": "docker",
        },
        check=True,
    )


def wait_for(holds: Callable[[], bool], seconds: float = 120) -> None:
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline, f"not within {seconds} s"
        time.sleep(0.2)


@contextlib.contextmanager
def killed_on_failure(process: subprocess.Popen[AnyStr]) -> Iterator[subprocess.Popen[AnyStr]]:
    """Wait for a process at the end, as its own with statement does, which would wait for ever for one that hangs."""
    with process:
        try:
            yield process
        except BaseException:
            process.kill()
            raise


def kill(process: subprocess.Popen[bytes]) -> None:
    """End the CLI at once, as a crash or the kernel would, and wait for its plugins to see that it is gone."""
    plugins = children(process.pid)
    process.send_signal(signal.SIGKILL)
    process.wait()
    for pid in plugins:
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # it has ended
            if Path(f"/proc/{pid}/exe").readlink() != Path(sys.executable).resolve():
                os.kill(pid, signal.SIGKILL)  # an official one, which looks every five minutes only
    deadline = time.monotonic() + 30
    while any(Path(f"/proc/{pid}").exists() for pid in plugins):
        assert time.monotonic() < deadline, "a plugin outlived its engine"
        time.sleep(0.02)


def children(pid: int) -> list[int]:
    found = []
    for task in Path(f"/proc/{pid}/task").glob("*/children"):
        found += [int(child) for child in task.read_text().split()]
    return found
