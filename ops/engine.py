"""One run of the Pulumi CLI as the engine's events: what a preview or an update does, while it does it.

Source of their form: https://github.com/pulumi/pulumi/blob/master/sdk/go/common/apitype/events.go
"""

import json
import os
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Iterator
from typing import Any

from ops.stack import ROOT, OpsError

POLICIES = ROOT / "policy"


class Run:
    """A preview or an update of a stack, held against the policies, in a process group of its own."""

    def __init__(self, verb: str, stack: str, *arguments: str) -> None:
        """Start it.

        Raises:
            OpsError: there is no CLI.
        """
        if shutil.which("pulumi") is None:
            raise OpsError("There is no Pulumi CLI on PATH.", "Run `make toolchain`, then `. .toolchain/env`.")
        self._name = f"pulumi {verb} --stack {stack}"
        command = ["pulumi", "--non-interactive", "--color", "never", verb, "--json", "--stack", stack, *arguments]
        self._interrupted = False
        self.said = ""
        """The end of what the CLI printed besides its events, when it has ended."""
        self._standard_error = tempfile.TemporaryFile()  # noqa: SIM115, as long as the run
        # Out of the terminal's group: a Ctrl-C that the engine got twice would end it at once, in the middle of a change.
        self._process = subprocess.Popen(
            [*command, "--policy-pack", str(POLICIES)],
            cwd=ROOT,
            env={**os.environ, "PULUMI_ENABLE_STREAMING_JSON_PREVIEW": "true"},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=self._standard_error,
            start_new_session=True,
        )

    def interrupt(self) -> None:
        """Ask the engine to begin nothing more, and to end or give up what it has begun. Asked twice it would end at once."""
        if not self._interrupted:
            self._interrupted = True
            self._process.send_signal(signal.SIGINT)

    def events(self) -> Iterator[tuple[str, dict[str, Any]]]:
        """Yield the kind and the content of each event, until the run has ended.

        Raises:
            OpsError: it failed before the engine did anything.
        """
        any_event = False
        assert self._process.stdout is not None
        with self._process.stdout as lines, self._standard_error as standard_error:
            try:
                for line in lines:
                    for kind, content in _event(line).items():
                        any_event = True
                        yield kind, content
            except BaseException:  # whoever reads them goes no further
                self.interrupt()
                raise
            finally:
                for _ in lines:  # a full pipe would keep the engine from ending
                    pass
                self._process.wait()
            standard_error.seek(0)
            self.said = standard_error.read().decode(errors="replace").strip()[-2000:]
        if self.failed and not any_event:
            raise OpsError(f"`{self._name}` failed: {self.said}", _mend(self.said))

    @property
    def failed(self) -> bool:
        """Whether the run, which has ended, did not go well."""
        return self._process.returncode != 0


def _event(line: bytes) -> dict[str, dict[str, Any]]:
    """Return the content of a line's event by its kind; nothing where the line is no event."""
    try:
        event = json.loads(line)
    except ValueError:
        return {}
    return {kind: content for kind, content in event.items() if isinstance(content, dict)} if isinstance(event, dict) else {}


def _mend(text: str) -> str:
    if "currently locked" in text:
        return "Another update runs, or one was killed: `python -m ops recover` tells which."
    return "Mend that, and run this again."
