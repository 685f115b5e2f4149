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
    yield from _restore_checkpoint(stack)
    yield from _clear_lock(stack, force=force)
    exported = json.loads(pulumi("stack", "export", "--stack", stack))
    deployment = exported["deployment"]
    resources: list[dict[str, Any]] = deployment.get("resources") or []
    pending: list[dict[str, Any]] = deployment.get("pending_operations") or []
    gone: set[str] = set()
    for operation in pending:
        urn = operation["resource"]["urn"]
        yield f"{operation['type']} {_label(urn)} was cut off: {_undo(operation, resources)}"
        if operation["type"] == "deleting":
            gone.add(urn)
    with_docker = any(entry["type"] == CONTAINER for entry in [*resources, *(operation["resource"] for operation in pending)])
    containers = _containers(stack) if with_docker else {}
    recorded = {entry["id"]: entry["urn"] for entry in resources if entry["type"] == CONTAINER and "id" in entry}
    for identifier, urn in recorded.items():
        if identifier not in containers and urn not in gone:
            yield f"{_label(urn)} is in the state, but no longer there: taken out of the state"
            gone.add(urn)
    gone |= _dependent_containers(resources, gone)
    # Only what this state was about to make, or no longer has: another checkout may have a stack of the same name.
    cut_off = {operation["resource"]["inputs"].get("name") for operation in pending if operation["resource"]["type"] == CONTAINER}
    forgotten = {identifier for identifier, urn in recorded.items() if urn in gone}
    kept = recorded.keys() - forgotten
    for identifier, container in containers.items():
        if identifier in forgotten or (container.name in cut_off and identifier not in kept):
            container.remove(force=True, v=True)
            yield f"the container {container.name} was there, but not in the state: removed"
    if pending or gone:
        deployment["resources"] = [entry for entry in resources if entry["urn"] not in gone]
        deployment["pending_operations"] = []
        pulumi("stack", "import", "--stack", stack, stdin=json.dumps(exported))


def _label(urn: str) -> str:
    kind, name = urn.split("::")[2:4]
    return f"{kind.split('$')[-1].split(':')[-1]} {name}"


def _clear_lock(stack: str, *, force: bool) -> Iterator[str]:
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
    if locks or (locks is None and force):
        pulumi("cancel", "--yes", "--stack", stack)
        yield "the lock of the interrupted run is cleared"


def _state_folder() -> Path | None:
    """Return the folder of a state that is kept in files, or None where the backend is another."""
    url = urlparse(os.environ.get("PULUMI_BACKEND_URL", ""))
    return Path(url.path or url.netloc) / ".pulumi" if url.scheme == "file" else None


def _restore_checkpoint(stack: str) -> Iterator[str]:
    """Put the engine's own backup in the place of a state that was cut off while it was written.

    The backup is the state before that write, and the engine begins nothing that it has not written down.
    """
    if (folder := _state_folder()) is None:
        return
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
    """Undo what a cut-off operation may have done on this machine, and say so."""
    resource, kind = operation["resource"], operation["type"]
    if kind == "updating":
        if resource["type"] != COMMAND:
            return "the next `pulumi up` does it again"
        before = next(entry for entry in resources if entry["urn"] == resource["urn"])
        _run(before["inputs"], before["inputs"].get("update", before["inputs"]["create"]))
        return "put back to what the state says; the next `pulumi up` does it again"
    if resource["type"] == COMMAND and "delete" in resource["inputs"]:
        _run(resource["inputs"], resource["inputs"]["delete"])
        return "removed" if kind == "deleting" else "removed, and made again by the next `pulumi up`"
    if kind == "deleting":
        return "taken out of the state"
    # A claim that is there already is taken for the stack's own by the next `pulumi up`: it may have images.
    if resource["type"].startswith("kubernetes:") and not resource["type"].endswith(":PersistentVolumeClaim"):
        from ops.workload import remove_unrecorded

        if remove_unrecorded(resource["inputs"]):
            return "removed, and made again by the next `pulumi up`"
    return "the next `pulumi up` makes it again"


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


def _dependent_containers(resources: list[dict[str, Any]], gone: set[str]) -> set[str]:
    """Return the containers that cannot stay, as they need one that is gone."""
    return {entry["urn"] for entry in resources if entry["type"] == CONTAINER and gone & set(entry.get("dependencies", []))}
