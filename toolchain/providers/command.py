"""Stand-in for the command plugin: local:Command and remote:Command.

Source of the rules: pulumi-command 1.2 (provider/pkg/provider/local and remote): any change, one of the connection too, runs
``update``, or ``create`` where there is none; changed triggers replace; a failed create leaves no state; ``delete`` runs with
what the state says; previews run nothing.
"""

import os
import subprocess
import uuid
from collections.abc import Mapping
from typing import Any

from toolchain.providers.base import ProviderError, ResourceType, serve

INPUTS = frozenset({"create", "update", "delete", "stdin", "environment", "triggers", "logging", "addPreviousOutputInEnv"})


class Command(ResourceType):
    """What local and remote commands have in common: when they run."""

    replace_on = frozenset({"triggers"})
    defaults = {"addPreviousOutputInEnv": True}

    def create(self, name: str, inputs: dict[str, Any]) -> tuple[str, dict[str, Any]]:
        outputs = self._run(inputs["create"], inputs, {}) if "create" in inputs else {"stdout": "", "stderr": ""}
        return uuid.uuid4().hex, outputs

    def update(self, identifier: str, state: dict[str, Any], inputs: dict[str, Any]) -> dict[str, Any]:
        command = inputs.get("update", inputs.get("create"))
        return self._run(command, inputs, self._previous(inputs, state)) if command else {"stdout": "", "stderr": ""}

    def delete(self, identifier: str, state: dict[str, Any]) -> None:
        if "delete" in state:
            self._run(state["delete"], state, self._previous(state, state))

    @staticmethod
    def _previous(inputs: Mapping[str, Any], state: Mapping[str, Any]) -> dict[str, str]:
        """Return the variables with what the last run wrote."""
        if not inputs["addPreviousOutputInEnv"]:
            return {}
        return {f"PULUMI_COMMAND_{key.upper()}": state.get(key, "") for key in ("stdout", "stderr")}

    def _run(self, command: str, inputs: Mapping[str, Any], previous: Mapping[str, str]) -> dict[str, Any]:
        raise NotImplementedError


class LocalCommand(Command):
    inputs = INPUTS | {"dir", "interpreter"}

    def _run(self, command: str, inputs: Mapping[str, Any], previous: Mapping[str, str]) -> dict[str, Any]:
        run = subprocess.run(
            [*inputs.get("interpreter", ["/bin/sh", "-c"]), command],
            input=inputs.get("stdin", ""),
            env={**os.environ, **inputs.get("environment", {}), **previous},
            cwd=inputs.get("dir"),
            capture_output=True,
            text=True,
            check=False,
        )
        if run.returncode:
            raise ProviderError(f"exit status {run.returncode}: running {command!r}:\n{run.stdout}{run.stderr}")
        return {"stdout": run.stdout.removesuffix("\n"), "stderr": run.stderr.removesuffix("\n")}


class RemoteCommand(Command):
    inputs = INPUTS | {"connection"}
    # Not agentSocketPath: the stand-in asks no SSH agent.
    connection_inputs = frozenset(
        {
            "host",
            "port",
            "user",
            "password",
            "privateKey",
            "privateKeyPassword",
            "hostKey",
            "perDialTimeout",
            "dialErrorLimit",
            "proxy",
        }
    )

    def check(self, inputs: Mapping[str, Any]) -> list[tuple[str, str]]:
        connection = inputs.get("connection", {})
        keys = {*connection, *connection.get("proxy", {})} - self.connection_inputs
        return [("connection", f"the stand-in plugin does not know {key!r} of a connection") for key in sorted(keys)]

    def _run(self, command: str, inputs: Mapping[str, Any], previous: Mapping[str, str]) -> dict[str, Any]:
        from toolchain.providers import ssh

        stdout, stderr = ssh.run(
            inputs["connection"],
            command,
            stdin=inputs.get("stdin", ""),
            environment=inputs.get("environment", {}),
            optional_environment={name: value for name, value in previous.items() if value},
        )
        return {"stdout": stdout, "stderr": stderr}


if __name__ == "__main__":
    serve("command", {"command:local:Command": LocalCommand(), "command:remote:Command": RemoteCommand()})
