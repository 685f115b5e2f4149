"""`python -m tests.record_previews`: previews of real changes by the real engine, for the tests of the report.

Each is written to tests/unit/previews, without what is of this machine alone. To be run again when the program's resources
change.
"""

import json
import tempfile
from pathlib import Path
from typing import Any

import docker

from lab import dockerd
from tests.engine.conftest import new_stack
from tests.engine.stack import ROOT, Stack

FOLDER = ROOT / "tests/unit/previews"
# Of the machine and the moment.
LEFT_OUT = {"stackTrace", "sourcePosition", "created", "modified", "mountpoint", "propertyDependencies", "duration", "outputs"}


def trimmed(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: trimmed(item) for key, item in value.items() if key not in LEFT_OUT}
    return [trimmed(item) for item in value] if isinstance(value, list) else value


class Recorder:
    def __init__(self, stack: Stack) -> None:
        self._stack = stack

    def record(self, name: str, *command: str) -> None:
        """Preview the stack as it is written now."""
        run = self._stack.preview("--json") if not command else self._stack.pulumi(*command, check=False)
        said = run.stdout.replace(self._stack.name, "recorded").replace(str(self._stack.port), "5000")
        (FOLDER / f"{name}.json").write_text(json.dumps(trimmed(json.loads(said)), indent=1, sort_keys=True) + "\n")

    def changed(self, name: str, section: str, **values: Any) -> None:
        """Preview a change of one section, and put it back."""
        kept = dict(self._stack.settings)
        self._stack.set(section, **values)
        self.record(name)
        self._stack.settings = kept


def on_docker(stack: Stack) -> None:
    recorder = Recorder(stack)
    recorder.record("first up")
    stack.up()
    recorder.record("nothing to change")
    recorder.changed("another tag", "image", tag="3.1.2-1")
    recorder.changed("renewed certificate", "certificate", validityDays=100)
    recorder.changed("another name of the server", "certificate", names=["other.test"])
    recorder.changed("more memory", "container", memoryMiB=512)
    recorder.changed("anonymous access", "access", anonymous=True)
    recorder.changed("trust of the local Docker daemon ends", "trust", docker=False, hostsFile=False)
    recorder.changed("another volume, the old one kept", "storage", volume=f"{stack.name}-other")
    recorder.changed("second authority trusted", "certificate", authority={"generation": 1, "trusted": [1, 2]})
    recorder.changed("authority replaced at once", "certificate", authority={"generation": 2})
    recorder.changed("self-signed certificate", "certificate", mode="self-signed")
    recorder.record("destroy that keeps the volume", "destroy", "--preview-only", "--json", "--stack", stack.name)
    stack.set("storage", onDestroy="delete")
    stack.up()
    recorder.changed("another volume, the old one deleted", "storage", volume=f"{stack.name}-other")
    recorder.record("destroy that deletes the volume", "destroy", "--preview-only", "--json", "--stack", stack.name)


def main() -> None:
    FOLDER.mkdir(exist_ok=True)
    host = dockerd.start()
    dockerd.ensure_base_image(host)
    with tempfile.TemporaryDirectory() as folder, new_stack(Path(folder), docker.DockerClient(base_url=host)) as stack:
        on_docker(stack)


if __name__ == "__main__":
    main()
