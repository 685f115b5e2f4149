"""Stand-in for the command plugin: local:Command.

Source of the rules: pulumi-command 1.2 (provider/pkg/provider/local): any change runs ``update``, or ``create`` where there
is none; changed triggers replace; a failed create leaves no state.
"""

import os
import subprocess
import uuid
from collections.abc import Mapping
from typing import Any

from toolchain.providers.base import ProviderError, ResourceType, serve


class LocalCommand(ResourceType):
    inputs = frozenset(
        {
            "create",
            "update",
            "delete",
            "stdin",
            "environment",
            "dir",
            "interpreter",
            "triggers",
            "logging",
            "addPreviousOutputInEnv",
        }
    )
    replace_on = frozenset({"triggers"})
    defaults = {"addPreviousOutputInEnv": True}

    def create(self, name: str, inputs: dict[str, Any]) -> tuple[str, dict[str, Any]]:
        outputs = self._run(inputs["create"], inputs) if "create" in inputs else {"stdout": "", "stderr": ""}
        return uuid.uuid4().hex, outputs

    def update(self, identifier: str, state: dict[str, Any], inputs: dict[str, Any]) -> dict[str, Any]:
        command = inputs.get("update", inputs.get("create"))
        return self._run(command, inputs, state) if command else {"stdout": "", "stderr": ""}

    def delete(self, identifier: str, state: dict[str, Any]) -> None:
        if "delete" in state:
            self._run(state["delete"], state, state)

    def _run(self, command: str, inputs: Mapping[str, Any], state: Mapping[str, Any] | None = None) -> dict[str, Any]:
        environment = {**os.environ, **inputs.get("environment", {})}
        if inputs["addPreviousOutputInEnv"] and state is not None:
            environment["PULUMI_COMMAND_STDOUT"] = state.get("stdout", "")
            environment["PULUMI_COMMAND_STDERR"] = state.get("stderr", "")
        run = subprocess.run(
            [*inputs.get("interpreter", ["/bin/sh", "-c"]), command],
            input=inputs.get("stdin", ""),
            env=environment,
            cwd=inputs.get("dir"),
            capture_output=True,
            text=True,
            check=False,
        )
        if run.returncode:
            raise ProviderError(f"exit status {run.returncode}: running {command!r}:\n{run.stdout}{run.stderr}")
        return {"stdout": run.stdout.removesuffix("\n"), "stderr": run.stderr.removesuffix("\n")}


if __name__ == "__main__":
    serve("command", {"command:local:Command": LocalCommand()})
