"""What Ceph and the cluster say of the RBD image: whether it is there, who has it open, and what a mount waits for."""

import json
import os
import shlex
import subprocess
from dataclasses import dataclass
from typing import Any

from ops.ssh import Finished, run
from ops.stack import ROOT, OpsError, Registry, options_of, pulumi
from settings import CephHost, SshHost

SCRIPT = ROOT / "hosts/rbd.py"
FULL_PERCENT = 85
# ext4's own tables take a part of the image, the more the smaller it is.
FILESYSTEM_PART = 0.85


@dataclass(frozen=True)
class Deployed:
    """The volume as the stack's last update left it."""

    options: dict[str, str]
    """The options that the script was run with: ``--pool``, ``--image``, ``--size-mib`` and others."""
    host: CephHost | None
    private_key: str
    inline: bool

    @property
    def image(self) -> str:
        return f"{self.options['--pool']}/{self.options['--image']}"


def check(registry: Registry) -> str:
    """Return in words that the image is there, has its size, and is open where the pod is.

    Raises:
        OpsError: it is not so.
    """
    assert registry.workload is not None
    deployed = _deployed(registry.stack)
    image, state = deployed.image, _state(deployed)
    _check_image(deployed, state)
    from ops.workload import placement

    placed = placement(registry.workload["namespace"], registry.workload["name"])
    openers = {address: placed.node_of.get(_host(address), _host(address)) for address in state["watchers"]}
    _check_openers(image, openers, placed.node, placed.pod)
    words = [f"{image} has {state['sizeMiB']} MiB", f"open at {', '.join(openers.values()) or 'no node'}"]
    if state["lockOwners"]:
        words.append("locked by it")
    warning = ""
    if placed.capacity_bytes:
        percent = 100 * placed.used_bytes // placed.capacity_bytes
        words.append(f"filesystem of {placed.capacity_bytes >> 20} MiB, {percent} % used")
        if percent >= FULL_PERCENT:
            warning = "warning: raise storage.rbd.sizeMiB or collect garbage: "
        elif placed.capacity_bytes >> 20 < FILESYSTEM_PART * state["sizeMiB"]:
            warning = f"warning: the filesystem has not grown with the image, {_growth(inline=deployed.inline)}: "
    return warning + ", ".join(words)


def _growth(*, inline: bool) -> str:
    if inline:
        return "run `resize2fs` on its device on the pod's node, see docs/volume.md"
    return "which the kubelet does within two minutes of `pulumi up`"


def _deployed(stack: str) -> Deployed:
    """Return the volume by the state, which has what the image was made with, also where the stack's file has changed since."""
    exported = json.loads(pulumi("stack", "export", "--show-secrets", "--stack", stack))
    resources = exported["deployment"].get("resources") or []
    made = next((entry for entry in resources if _is_image(entry["urn"])), None)
    if made is None:
        raise OpsError(f"The stack {stack} has no RBD image in its state.", f"Run `pulumi up --stack {stack}`.")
    inputs = made["inputs"]
    options = options_of(_plain(inputs["create"]))
    inline = not any(entry["type"] == "kubernetes:core/v1:PersistentVolume" for entry in resources)
    if "connection" not in inputs:
        return Deployed(options, None, "", inline)
    connection = _plain(inputs["connection"])
    jump = connection.get("proxy")
    host = CephHost(**_address(connection), jump=None if jump is None else SshHost(**_address(jump)))
    return Deployed(options, host, connection["privateKey"], inline)


def _is_image(urn: str) -> bool:
    return "RbdVolume$command:" in urn and urn.endswith("::volume")


def _plain(value: Any) -> Any:
    """Return a value of a state that was exported with its secrets, without the marks around them."""
    if isinstance(value, dict):
        if "plaintext" in value:
            return _plain(json.loads(value["plaintext"]))
        return {key: _plain(item) for key, item in value.items()}
    return value


def _address(connection: dict[str, Any]) -> dict[str, Any]:
    keys = {"address": "host", "user": "user", "hostKey": "hostKey"}
    return {**{ours: connection[theirs] for ours, theirs in keys.items()}, "port": int(connection["port"])}


def _state(deployed: Deployed) -> dict[str, Any]:
    options = deployed.options
    arguments = ["python3", "-", "status", "--pool", options["--pool"], "--image", options["--image"]]
    script = SCRIPT.read_text()
    if deployed.host is None:
        done = subprocess.run(arguments, input=script, env=os.environ, capture_output=True, text=True, check=False)
        finished = Finished(done.returncode, done.stdout, done.stderr)
    else:
        line = shlex.join(deployed.host.as_root(arguments))
        finished = run(deployed.host, deployed.private_key, line, stdin=script)
    if finished.code:
        raise OpsError(finished.stderr.strip() or f"hosts/rbd.py ended with {finished.code}.", "Mend that on the Ceph host.")
    state: dict[str, Any] = json.loads(finished.stdout)
    return state


def _check_image(deployed: Deployed, state: dict[str, Any]) -> None:
    image, pool, size = deployed.image, deployed.options["--pool"], int(deployed.options["--size-mib"])
    if state["poolIsFull"]:
        raise OpsError(f"The pool {pool} is full: every push waits.", "Make room or raise its quota: `ceph df`.")
    if not state["exists"]:
        raise OpsError(f"The RBD image {image} is gone.", f"Look for it in the trash: `rbd trash ls {pool}`.")
    if state["owner"] != deployed.options["--owner"]:
        raise OpsError(
            f"The RBD image {image} belongs to {state['owner'] or 'no stack'}.", "See docs/volume.md, then `pulumi up`."
        )
    if state["sizeMiB"] < size:
        raise OpsError(f"{image} has {state['sizeMiB']} MiB, the stack says {size}.", "Run `pulumi up --refresh`.")


def _check_openers(image: str, openers: dict[str, str], node: str | None, pod: str | None) -> None:
    others = {address: name for address, name in openers.items() if name != node}
    if not others or node is None:
        return
    address, name = next(iter(others.items()))
    raise OpsError(
        f"{pod} on {node} waits for {image}, which is open at {name} ({address}).",
        "The watch of a dead machine ends after 30 s. If that one lives but is cut off, stop the registry there, or shut it "
        f"out of Ceph: `ceph osd blocklist add {address}`.",
    )


def _host(address: str) -> str:
    """Return the host of one of Ceph's addresses, such as 10.0.0.11:0/123456 or [2001:db8::1]:0/1."""
    return address.rpartition(":")[0].strip("[]")
