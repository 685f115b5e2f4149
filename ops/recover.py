"""`ops recover`: after an interrupted run, make the state and what is there agree, so that the next `pulumi up` converges.

The engine writes an operation down before it begins and strikes it when it ends. What a run left between the two is undone
or taken out of the state here, and made again by the next `pulumi up`. Images are never touched: their volume is only ever
forgotten, and found again.
"""

import json
import os
import shutil
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

from ops.stack import ROOT, OpsError, pulumi

PROJECT = "private-registry"
LABEL = "private-registry.stack"
COMMAND = "command:local:Command"
CONTAINER = "docker:index/container:Container"


def recover(stack: str, *, force: bool) -> Iterator[str]:
    """Mend a stack, and yield a sentence for each thing done.

    Args:
        force: clear a lock whose holder cannot be checked, as no update runs.

    Raises:
        OpsError: an update runs, or the state or the Docker daemon cannot be reached.
    """
    name = stack.rpartition("/")[2]
    locks = _checked_locks(name, force=force)
    yield from _restore_checkpoint(name)
    if locks or (locks is None and force):
        pulumi("cancel", "--yes", "--stack", stack)
        yield "the lock of the interrupted run is cleared"
    exported = json.loads(pulumi("stack", "export", "--stack", stack))
    deployment = exported["deployment"]
    resources: list[dict[str, Any]] = deployment.get("resources") or []
    pending: list[dict[str, Any]] = deployment.get("pending_operations") or []
    gone: list[dict[str, Any]] = []
    for operation in pending:
        yield f"{operation['type']} {_label(operation['resource']['urn'])} was cut off: {_undo(operation, resources)}"
        if operation["type"] == "deleting":
            gone += _half_that_goes(operation["resource"]["urn"], resources)
    recorded = [entry for entry in resources if entry["type"] == CONTAINER and entry.get("id")]
    with_docker = recorded or any(operation["resource"]["type"] == CONTAINER for operation in pending)
    containers = _containers(name) if with_docker else {}
    missing = [entry for entry in recorded if entry["id"] not in containers and entry not in gone]
    if missing and not containers and len(missing) == len(recorded) and not force:
        raise OpsError(
            f"None of the containers of {stack} is on the Docker daemon that answers here.",
            "See whether DOCKER_HOST names the stack's own. If they were removed, run this again with --force.",
        )
    for entry in missing:
        yield f"{_label(entry['urn'])} is in the state, but no longer there: taken out of the state"
        gone.append(entry)
    gone += _dependent_containers(recorded, gone)
    forgotten = {entry["id"] for entry in gone if entry["type"] == CONTAINER}
    # Only what this state was about to make, or no longer has: another checkout may have a stack of the same name.
    cut_off = {operation["resource"]["inputs"].get("name") for operation in pending if operation["resource"]["type"] == CONTAINER}
    kept = {entry["id"] for entry in recorded} - forgotten
    for identifier, container in containers.items():
        if identifier in forgotten or (container.name in cut_off and identifier not in kept):
            container.remove(force=True, v=True)
            yield f"the container {container.name} was there, but not in the state: removed"
    if pending or gone:
        deployment["resources"] = [entry for entry in resources if entry not in gone]
        _drop_references({entry["urn"] for entry in gone} - {entry["urn"] for entry in deployment["resources"]}, deployment)
        deployment["pending_operations"] = []
        pulumi("stack", "import", "--stack", stack, stdin=json.dumps(exported))


def _half_that_goes(urn: str, resources: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return what a cut-off deletion was about: of a resource that is being replaced, only the old half."""
    halves = [entry for entry in resources if entry["urn"] == urn]
    return [entry for entry in halves if entry.get("delete")] or halves


def _drop_references(urns: set[str], deployment: dict[str, Any]) -> None:
    """Take references to resources that are gone out of the others; the engine refuses a state that has them."""
    for entry in deployment["resources"]:
        entry["dependencies"] = [urn for urn in entry.get("dependencies") or [] if urn not in urns]
        by_property = entry.get("propertyDependencies") or {}
        entry["propertyDependencies"] = {
            key: [urn for urn in found or [] if urn not in urns] for key, found in by_property.items()
        }


def _label(urn: str) -> str:
    kind, name = urn.split("::")[2:4]
    return f"{kind.split('$')[-1].split(':')[-1]} {name}"


def _checked_locks(stack: str, *, force: bool) -> list[dict[str, Any]] | None:
    """Return the locks of runs that have ended, or None where the backend does not let one look.

    Raises:
        OpsError: a run goes on, or may go on elsewhere.
    """
    locks = _locks(stack)
    for lock in locks or []:
        here = lock.get("hostname") == socket.gethostname()
        if here and Path(f"/proc/{lock['pid']}").exists() and not force:
            raise OpsError(
                f"An update of {stack} runs: process {lock['pid']} of {lock['username']} since {lock['timestamp']}.",
                "Wait for it, or end it; then run this again. With --force the lock goes although that process lives.",
            )
        if not here and not force:
            raise OpsError(
                f"{lock['username']} on {lock['hostname']} holds the lock of {stack} since {lock['timestamp']}.",
                "Ask whether that update runs. If it does not, run this again with --force.",
            )
    return locks


def _state_folder() -> Path | None:
    """Return the folder of a state that is kept in files, or None where the backend is another."""
    url = urlparse(os.environ.get("PULUMI_BACKEND_URL", ""))
    return Path(url.path or url.netloc) / ".pulumi" if url.scheme == "file" else None


def _restore_checkpoint(stack: str) -> Iterator[str]:
    """Put the engine's own backup in the place of a state that was cut off while it was written.

    The backup is the state before that write, and the engine begins nothing that it has not written down. Beside each file
    is one with its attributes, which the engine does without where there is none, but not where it is torn.
    """
    if (folder := _state_folder()) is None:
        return
    for part in (f"stacks/{PROJECT}/{stack}.json*.attrs", f"locks/organization/{PROJECT}/{stack}/*.attrs"):
        for attributes in folder.glob(part):
            if not _is_json(attributes):
                attributes.unlink()
                yield f"{attributes.name} was cut off while it was written: removed"
    file = folder / f"stacks/{PROJECT}/{stack}.json"
    backup = file.with_name(f"{file.name}.bak")
    if not _is_json(file) and _is_json(backup):
        shutil.copyfile(backup, file)
        yield "the state was cut off while it was written: its backup has taken its place"


def _is_json(file: Path) -> bool:
    try:
        json.loads(file.read_text())
    except (OSError, ValueError):
        return False
    return True


def _locks(stack: str) -> list[dict[str, Any]] | None:
    """Return the locks of a state in a folder, or None where the backend is another: its locks cannot be looked at."""
    if (folder := _state_folder()) is None:
        return None
    return [json.loads(file.read_text()) for file in (folder / f"locks/organization/{PROJECT}/{stack}").glob("*.json")]


def _undo(operation: dict[str, Any], resources: list[dict[str, Any]]) -> str:
    """Undo what a cut-off operation may have done, and say so."""
    resource, kind = operation["resource"], operation["type"]
    if kind not in ("creating", "updating", "deleting"):
        return "it changes nothing"
    again = "the next `pulumi up` does it again"
    # What was asked of an RBD image is never undone: all images are in it. The script ends what it began when it runs again.
    if resource["type"] == COMMAND and "RbdVolume$" not in resource["urn"]:
        before = next((entry for entry in resources if entry["urn"] == resource["urn"]), resource)
        inputs = before["inputs"] if kind == "updating" else resource["inputs"]
        command = inputs.get("update", inputs.get("create")) if kind == "updating" else inputs.get("delete")
        if command is None or not isinstance(inputs.get("stdin", ""), str):  # an encrypted one
            return again
        _run(inputs, command)
        done = "put back to what the state says" if kind == "updating" else "removed"
        return done if kind == "deleting" else f"{done}; {again}"
    # A claim that is there already is taken for the stack's own by the next `pulumi up`: it may have images.
    if resource["type"].startswith("kubernetes:") and not resource["type"].endswith(":PersistentVolumeClaim"):
        from ops.workload import remove_unrecorded

        if kind != "updating" and remove_unrecorded(resource["inputs"]):
            return "removed" if kind == "deleting" else f"removed; {again}"
    return "taken out of the state" if kind == "deleting" else again


def _run(inputs: dict[str, Any], command: str) -> None:
    run = subprocess.run(
        [*inputs.get("interpreter", ["/bin/sh", "-c"]), command],
        cwd=ROOT,
        env={**os.environ, **inputs.get("environment", {})},
        input=inputs.get("stdin", ""),
        capture_output=True,
        text=True,
        check=False,
    )
    if run.returncode:
        raise OpsError(f"`{command}` failed: {run.stderr.strip()}", "Mend that, and run this again.")


def _containers(stack: str) -> dict[str, Any]:
    """Return the stack's containers on the Docker daemon by their identifiers."""
    import docker
    import docker.errors

    try:
        client = docker.from_env()
        found = client.containers.list(all=True, filters={"label": f"{LABEL}={PROJECT}/{stack}"})
    except (docker.errors.DockerException, OSError) as error:
        raise OpsError(f"The Docker daemon does not answer: {error}.", "Start it, or set DOCKER_HOST.") from None
    return {str(container.id): container for container in found}


def _dependent_containers(recorded: list[dict[str, Any]], gone: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the containers that cannot stay, as they need one that is gone."""
    lost = {entry["urn"] for entry in gone if entry["type"] == CONTAINER}
    return [entry for entry in recorded if entry not in gone and lost & set(entry.get("dependencies") or [])]
