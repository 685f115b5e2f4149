"""`python -m tests.record_previews`: previews of real changes by the real engine, for the tests of the report.

Each is written to tests/unit/previews, without what is of this machine alone. To be run again when the program's resources
change.
"""

import contextlib
import json
import os
import tempfile
from pathlib import Path
from typing import Any

import docker

from lab import dockerd
from lab.ceph import Ceph
from lab.kubernetes import Cluster
from lab.sshd import SshServer
from tests.engine.conftest import new_stack
from tests.engine.kubernetes_stack import Hub, KubernetesStack, new_kubernetes_stack
from tests.engine.stack import ROOT, Stack
from tests.engine.test_rbd_on_kubernetes import rbd_stack

FOLDER = ROOT / "tests/unit/previews"
# Of the machine and the moment.
LEFT_OUT = {
    *("stackTrace", "sourcePosition", "created", "modified", "mountpoint", "kubeconfig"),
    *("propertyDependencies", "duration", "outputs"),
}


def trimmed(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: trimmed(item) for key, item in value.items() if key not in LEFT_OUT}
    return [trimmed(item) for item in value] if isinstance(value, list) else value


class Recorder:
    def __init__(self, stack: Stack) -> None:
        self._stack = stack

    def record(self, name: str, *command: str) -> None:
        """Preview the stack as it is written now."""
        run = self._stack.pulumi(*command, check=False) if command else self._stack.preview("--json", check=False)
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
    recorder.record("destroy that keeps the volume", *_destroy(stack))
    stack.set("storage", onDestroy="delete")
    stack.up()
    recorder.changed("another volume, the old one deleted", "storage", volume=f"{stack.name}-other")
    recorder.record("destroy that deletes the volume", *_destroy(stack))


def in_cluster(stack: KubernetesStack) -> None:
    recorder = Recorder(stack)
    recorder.record("first up in a cluster")
    stack.up()
    recorder.changed("more CPU in a cluster", "kubernetes", cpu="600m")
    recorder.changed("another node port", "kubernetes", nodePort=stack.port + 1)
    recorder.changed("larger claim", "storage", claim={**stack.settings["storage"]["claim"], "sizeGiB": 2})
    recorder.changed("nodes trust it by pods", "trust", daemonSet={})
    recorder.record("destroy that keeps the claim", *_destroy(stack))
    stack.set("storage", onDestroy="delete")
    stack.up()
    recorder.record("destroy that deletes the claim", *_destroy(stack))


def on_rbd(stack: KubernetesStack) -> None:
    """The pod never starts here, as the nodes have no kernel client: the image and its volume are in the state all the same."""
    recorder = Recorder(stack)
    image = stack.settings["storage"]["rbd"]
    image["sizeMiB"] = 128
    recorder.record("first up on an RBD image")
    stack.up(check=False)
    recorder.changed("grown RBD image", "storage", rbd={**image, "sizeMiB": 256})
    recorder.changed("shrunk RBD image", "storage", rbd={**image, "sizeMiB": 64})
    recorder.changed("another RBD image", "storage", rbd={**image, "image": f"{stack.name}-other"})
    recorder.record("destroy that keeps the RBD image", *_destroy(stack))
    for policy in ("trash", "delete"):
        stack.set("storage", onDestroy=policy)
        stack.up(check=False)
        recorder.record(f"destroy with the policy {policy} of the RBD image", *_destroy(stack))


def _destroy(stack: Stack) -> tuple[str, ...]:
    return ("destroy", "--preview-only", "--json", "--stack", stack.name)


def main() -> None:
    FOLDER.mkdir(exist_ok=True)
    host = dockerd.start()
    dockerd.ensure_base_image(host)
    os.environ["DOCKER_HOST"] = host
    daemon = docker.DockerClient(base_url=host)
    with contextlib.ExitStack() as ending:
        top = Path(ending.enter_context(tempfile.TemporaryDirectory()))

        def folder(name: str) -> Path:
            (top / name).mkdir()
            return top / name

        on_docker(ending.enter_context(new_stack(folder("docker"), daemon)))
        cluster = Cluster(top / "cluster")
        ending.callback(cluster.down)
        cluster.up(nodes=2)
        hub = Hub(daemon, cluster)
        ending.callback(hub.close)
        in_cluster(ending.enter_context(new_kubernetes_stack(folder("kubernetes"), cluster, hub.address)))
        ceph = Ceph(top / "ceph")
        ending.callback(ceph.down)
        ceph.up()
        ceph_host = ending.enter_context(SshServer(folder("host"), environment=ceph.environment))
        on_rbd(ending.enter_context(rbd_stack(folder("rbd"), cluster, hub.address, ceph, ceph_host)))


if __name__ == "__main__":
    main()
