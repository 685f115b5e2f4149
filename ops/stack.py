"""What the stack says: asked of the Pulumi CLI, with the backend and passphrase of the environment."""

import json
import shlex
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from settings import PROJECT, SECRETS, Settings, SettingsError, load

ROOT = Path(__file__).parent.parent


class OpsError(Exception):
    """Something is wrong; the text says what, and what to do; ``code`` is the command's exit code."""

    def __init__(self, what: str, mend: str, code: int = 1) -> None:
        super().__init__(f"{what}\n{mend}")
        self.what = what
        self.mend = mend
        self.code = code


@dataclass(frozen=True)
class Registry:
    """A registry as its stack describes it."""

    address: str
    """Host and port."""
    authority: str
    """The authority's certificate in PEM."""
    username: str | None
    password: str | None
    stack: str = ""
    workload: dict[str, str] | None = None
    """Namespace and name in the cluster; none for a registry on one Docker host."""
    volume: str | None = None
    """The RBD image that holds the registry's images, as POOL/IMAGE; none where they are elsewhere."""

    @property
    def host(self) -> str:
        return self.address.rpartition(":")[0]

    @property
    def port(self) -> int:
        return int(self.address.rpartition(":")[2])


def pulumi(*arguments: str, stdin: str | None = None) -> str:
    """Run the CLI in the project's folder and return what it prints.

    Raises:
        OpsError: there is no CLI, or it failed; the text has its last lines.
    """
    if shutil.which("pulumi") is None:
        raise OpsError("There is no Pulumi CLI on PATH.", "Run `make toolchain`, then `. .toolchain/env`.")
    command = ["pulumi", "--non-interactive", "--color", "never", *arguments]
    run = subprocess.run(command, cwd=ROOT, input=stdin, capture_output=True, text=True, check=False)
    if run.returncode:
        # What was printed before it failed may be secrets.
        said = (run.stderr.strip() or ("" if "--show-secrets" in arguments else run.stdout.strip()))[-2000:]
        raise OpsError(f"`pulumi {' '.join(arguments)}` failed: {said}", "Mend that, and run this again.")
    return run.stdout


def options_of(line: str) -> dict[str, str]:
    """Return the options of a command line that the program gave to one of its scripts, such as ``--size-mib``."""
    words = shlex.split(line)
    return {word: words[index + 1] for index, word in enumerate(words[:-1]) if word.startswith("--")}


def settings_of(stack: str) -> tuple[Settings, dict[str, str]]:
    """Return what a stack's file says, and its secrets by their names.

    Raises:
        OpsError: there is no such stack, or its settings have faults.
    """
    shown: dict[str, Any] = json.loads(pulumi("config", "--json", "--show-secrets", "--stack", stack))
    texts = {key: entry["value"] for key, entry in shown.items() if "value" in entry}
    try:
        settings = load(texts, {key for key, entry in shown.items() if entry["secret"]}, stack)
    except SettingsError as error:
        raise OpsError(str(error), "Correct the stack's file, and run this again.") from None
    return settings, {name: texts[f"{PROJECT}:{name}"] for name in SECRETS if f"{PROJECT}:{name}" in texts}


def registry_of(stack: str) -> Registry:
    """Return the registry that a stack's outputs describe.

    Raises:
        OpsError: the stack does not exist or was not brought up.
    """
    outputs: dict[str, Any] = json.loads(pulumi("stack", "output", "--json", "--show-secrets", "--stack", stack))
    if "address" not in outputs or "authorityCertificate" not in outputs:
        raise OpsError(f"The stack {stack} has no outputs: it is not up.", f"Run `pulumi up --stack {stack}` first.")
    return Registry(
        address=outputs["address"],
        authority=outputs["authorityCertificate"],
        username=outputs.get("username"),
        password=outputs.get("password"),
        stack=stack,
        workload=outputs.get("workload"),
        volume=outputs.get("volume"),
    )
