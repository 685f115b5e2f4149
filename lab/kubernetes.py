"""A Kubernetes cluster under `.lab/kubernetes`, without systemd, a virtual machine or a pull, for root on Debian.

The control plane is one box (see `lab.boxes`), every node another one with its own containerd, kubelet and kube-proxy.
A bridge in the control plane's box joins them. This machine has an end of it and reaches nodes and pods through it; they
reach this machine, and nothing beyond. Addresses and names come from the folder's path, so that two checkouts have two
clusters:

    10.N.0.1     this machine           10.N.0.11, .12, ...  node1, node2, ...      10.N.64.0/20      services
    10.N.0.2     the control plane      10.N.129.0/24, ...   the pods of node1, ...
"""

import contextlib
import datetime
import fcntl
import hashlib
import json
import os
import shutil
import ssl
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import docker
import docker.errors
import httpx
from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from lab.archive import write_image
from lab.authority import Authority
from lab.boxes import CGROUPS, ENVIRONMENT, Box, free_network, megabytes, run, wait
from lab.debian import LabError, can_install, install_missing
from toolchain.programs import KUBERNETES, ROOT, build

BRIDGE_ADDRESS = "02:00:00:00:00:02"
MOST_NODES = 100

NO_CLUSTER = "There is no cluster: python -m lab up kubernetes"
PAUSE_IMAGE = "docker.io/lab/pause:1"
STORAGE_CLASS = "lab"
VOLUME_COUNT = 5
VOLUME_SIZE = "10Gi"

# What has to be there, and the Debian package that has it.
PACKAGES = {
    "etcd": "etcd-server",
    "containerd": "containerd",
    "runc": "runc",
    "iptables": "iptables",
    "ip": "iproute2",
    "busybox": "busybox-static",
    "/usr/lib/cni/bridge": "containernetworking-plugins",
}
SERVER_SECONDS = 90
CONTAINERD_SECONDS = 30
NODE_SECONDS = 120
END_SECONDS = 20


@dataclass(frozen=True)
class Status:
    """A process of the lab: where it is, what it is, and its number and memory if it runs."""

    box: str
    name: str
    pid: int | None
    megabytes: int


@dataclass(frozen=True)
class Cluster:
    """A cluster in a folder, which is what tells it from another: its names and addresses come from the folder's path."""

    folder: Path

    @property
    def name(self) -> str:
        """Return the cluster's name for what is the machine's: the network link and the control groups."""
        return f"lab-{hashlib.sha256(os.fsencode(self.folder)).hexdigest()[:8]}"

    @property
    def network(self) -> str:
        """Return the first two numbers of the cluster's addresses.

        Raises:
            LabError: there is no cluster.
        """
        try:
            return self._network.read_text()
        except FileNotFoundError:
            raise LabError(NO_CLUSTER) from None

    @property
    def host_address(self) -> str:
        """Return this machine's address for nodes and pods."""
        return f"{self.network}.0.1"

    @property
    def server(self) -> str:
        """Return the address of the cluster's API."""
        return f"https://{self.control().address}:6443"

    @property
    def kubeconfig(self) -> Path:
        """Return the file with which a client is the cluster's administrator."""
        return self.folder / "kubeconfig"

    def control(self) -> Box:
        """Return the control plane's box."""
        return Box("control", f"{self.network}.0.2", self.folder / "control")

    def node(self, number: int) -> Box:
        """Return a node's box."""
        return Box(f"node{number}", self.node_address(number), self.folder / f"node{number}")

    def node_address(self, number: int) -> str:
        """Return a node's address, which is also the one of its node ports."""
        return f"{self.network}.0.{10 + number}"

    def registries(self) -> list[Path]:
        """Return the nodes' folders in which containerd looks for what it has to know of registries."""
        return [box.folder / "etc/containerd/certs.d" for box in self._nodes()]

    def client(self) -> httpx.Client:
        """Return a client of the cluster's API, as its administrator."""
        pki = self.folder / "pki"
        context = ssl.create_default_context(cafile=pki / "ca.crt")
        context.load_cert_chain(pki / "admin.crt", pki / "admin.key")
        return httpx.Client(base_url=self.server, verify=context, timeout=10, trust_env=False)

    def up(self, nodes: int = 1) -> Path:
        """Start what is missing of a cluster with that many nodes, and return its kubeconfig once every node is Ready.

        Raises:
            LabError: it cannot be had; the text ends with the last lines of the log of what failed.
        """
        if not 1 <= nodes <= MOST_NODES:
            raise LabError(f"The lab has 1 to {MOST_NODES} nodes, not {nodes}.")
        binaries = prepare()
        with self._locked(), progress_bar() as progress:
            task = progress.add_task("")
            progress.update(task, description="starting the control plane")
            self._choose_network()
            authority = Authority(self.folder / "pki")
            self._start_control(authority, binaries)
            progress.update(task, description="starting the nodes")
            boxes = {number: self.node(number) for number in range(1, nodes + 1)}
            for number, box in boxes.items():
                self._start_node(number, box, authority, binaries)
            with self.client() as api:
                self._make_storage(api)
                for box in boxes.values():
                    progress.update(task, description=f"waiting for {box.name}")
                    self._await_ready(api, box)
        return self.kubeconfig

    def down(self) -> bool:
        """End the cluster and forget it, and return whether there was one. Nothing of it stays.

        Raises:
            LabError: something does not go away.
        """
        with self._locked():
            there = self.folder.exists()
            for box in self._boxes():
                box.close()
            # The network of the last box takes this machine's end of the link with it, but not while the kernel still tries to
            # end connections to a node that no longer answers, which is minutes.
            if self._linked():
                with contextlib.suppress(LabError):
                    run(["ip", "link", "delete", self.name])
            if not wait(lambda: not self._linked(), END_SECONDS):
                raise LabError(f"The network link {self.name} does not go away.")
            for top in self._control_groups():
                for group in sorted(top.rglob("*/"), reverse=True):
                    group.rmdir()
                top.rmdir()
            if there:
                shutil.rmtree(self.folder)
        return there

    def address(self) -> Path | None:
        """Return the path of the kubeconfig of the cluster that answers."""
        if not self.kubeconfig.exists():
            return None
        with self.client() as api:
            return self.kubeconfig if answers(api) else None

    def status(self) -> list[Status]:
        """Return the processes of the cluster; none where there is no cluster."""
        found = [(box, recorded) for box in self._boxes() for recorded in box.programs()]
        return [Status(box.name, recorded.file.name, recorded.child, megabytes(recorded.child)) for box, recorded in found]

    def load_image(self, docker_host: str, reference: str) -> None:
        """Copy an image from a Docker daemon to every node, where pods find it under the same reference.

        Raises:
            LabError: the daemon does not have it, or a node does not take it.
        """
        if not (nodes := self._nodes()):
            raise LabError(NO_CLUSTER)
        with tempfile.TemporaryFile(dir=self.folder) as archive:
            try:
                with contextlib.closing(docker.DockerClient(base_url=docker_host, timeout=600)) as daemon:
                    for chunk in daemon.images.get(reference).save(named=reference):
                        archive.write(chunk)
            except docker.errors.DockerException as error:
                raise LabError(f"{reference} cannot be had from {docker_host}: {error}") from error
            for box in nodes:
                archive.seek(0)
                _import(box, archive.fileno())

    def _nodes(self) -> list[Box]:
        """Return the nodes that there are, running or not."""
        numbers = sorted(int(folder.name.removeprefix("node")) for folder in self.folder.glob("node*"))
        return [self.node(number) for number in numbers]

    def _boxes(self) -> list[Box]:
        return [self.control(), *self._nodes()] if self._network.exists() else []

    @property
    def _network(self) -> Path:
        return self.folder / "network"

    def _choose_network(self) -> None:
        """Choose addresses that nothing on this machine has, beginning at a place that the name decides."""
        if self._network.exists():
            return
        first = int(self.name.removeprefix("lab-"), 16)
        _write_private(self._network, free_network(first))

    def _pods(self, number: int) -> str:
        return f"{self.network}.{128 + number}.0/24"

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        self.folder.parent.mkdir(exist_ok=True)
        # The file is not in the folder, which `down` removes.
        with self.folder.with_name(f"{self.folder.name}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield

    def _start_control(self, authority: Authority, binaries: dict[str, str]) -> None:
        box = self.control()
        # Without it a pod that asks a service for another pod of its node gets the answer from an address it does not know.
        if modprobe := shutil.which("modprobe", path=ENVIRONMENT["PATH"]):
            subprocess.run([modprobe, "--quiet", "br_netfilter"], check=False)
        box.open()
        self._join_host(box)
        addresses = (box.address, "127.0.0.1", f"{self.network}.64.1", "kubernetes.default.svc")
        serving = authority.issue("kube-apiserver", "kube-apiserver", names=addresses)
        admin = authority.issue("admin", "admin", "system:masters")
        service_accounts = str(authority.key("service-accounts"))
        box.start(
            "etcd",
            *("etcd", f"--data-dir={box.folder}/etcd", "--listen-peer-urls=http://127.0.0.1:2380", "--unsafe-no-fsync"),
            *("--listen-client-urls=http://127.0.0.1:2379", "--advertise-client-urls=http://127.0.0.1:2379"),
        )
        box.start(
            "kube-apiserver",
            *(binaries["kube-apiserver"], "--etcd-servers=http://127.0.0.1:2379", f"--cert-dir={box.folder}/generated"),
            *(f"--advertise-address={box.address}", f"--service-cluster-ip-range={self.network}.64.0/20", "--allow-privileged"),
            *("--authorization-mode=Node,RBAC", "--enable-admission-plugins=NodeRestriction"),
            "--kubelet-preferred-address-types=InternalIP",  # a node's name is known only on the node
            *(f"--client-ca-file={authority.certificate}", "--service-account-issuer=https://kubernetes.default.svc"),
            *(f"--tls-cert-file={serving}", f"--tls-private-key-file={authority.key('kube-apiserver')}"),
            *(f"--kubelet-client-certificate={admin}", f"--kubelet-client-key={authority.key('admin')}"),
            *(f"--service-account-key-file={service_accounts}", f"--service-account-signing-key-file={service_accounts}"),
        )
        _write_private(self.kubeconfig, authority.kubeconfig("admin", self.server))
        with self.client() as api:
            box.wait("no answer", lambda: answers(api), SERVER_SECONDS, "etcd", "kube-apiserver")
        # Both end where they find no server, so they come after it.
        manager = self._kubeconfig(authority, "kube-controller-manager", "system:kube-controller-manager")
        box.start(
            "kube-controller-manager",
            *(binaries["kube-controller-manager"], f"--kubeconfig={manager}", "--leader-elect=false"),
            *(f"--service-account-private-key-file={service_accounts}", f"--root-ca-file={authority.certificate}"),
            "--use-service-account-credentials",
        )
        scheduler = self._kubeconfig(authority, "kube-scheduler", "system:kube-scheduler")
        box.start("kube-scheduler", binaries["kube-scheduler"], f"--kubeconfig={scheduler}", "--leader-elect=false")

    def _start_node(self, number: int, box: Box, authority: Authority, binaries: dict[str, str]) -> None:
        box.open()
        self._join_node(number, box)
        for group in self._make_control_groups(box.name):
            group.mkdir(parents=True, exist_ok=True)
        self._write_configuration(number, box, authority)
        box.start("containerd", "containerd", "--config", f"{box.folder}/containerd.toml")
        answers = box.inside("ctr", "--namespace", "k8s.io", "images", "ls", "--quiet", f"name=={PAUSE_IMAGE}")

        def serves() -> bool:
            return subprocess.run(answers, env=ENVIRONMENT, capture_output=True, check=False).returncode == 0

        box.wait("no answer", serves, CONTAINERD_SECONDS, "containerd")
        if PAUSE_IMAGE not in run(answers):
            with tempfile.NamedTemporaryFile(dir=self.folder) as archive:
                busybox = Path(str(shutil.which("busybox")))
                write_image(Path(archive.name), PAUSE_IMAGE, ["/busybox", "sleep", "infinity"], {"busybox": busybox})
                _import(box, archive.fileno())
        kubelet = self._kubeconfig(authority, box.name, f"system:node:{box.name}", "system:nodes")
        box.start(
            "kubelet",
            *(binaries["kubelet"], f"--config={box.folder}/kubelet.json", f"--kubeconfig={kubelet}"),
            *(f"--hostname-override={box.name}", f"--node-ip={box.address}"),
        )
        proxy = self._kubeconfig(authority, "kube-proxy", "system:kube-proxy")
        box.start(
            "kube-proxy",
            *(binaries["kube-proxy"], f"--kubeconfig={proxy}", f"--hostname-override={box.name}"),
            # The table of connections is the machine's, and its size not a node's to set.
            *("--proxy-mode=iptables", f"--cluster-cidr={self.network}.128.0/17", "--conntrack-max-per-core=0"),
        )

    def _kubeconfig(self, authority: Authority, name: str, user: str, group: str = "") -> Path:
        authority.issue(name, user, group)
        file = authority.folder / f"{name}.kubeconfig"
        _write_private(file, authority.kubeconfig(name, self.server))
        return file

    def _pod_network(self, number: int) -> str:
        """Return what a node's containerd is told of its pods' network."""
        ranges = {"type": "host-local", "ranges": [[{"subnet": self._pods(number)}]], "routes": [{"dst": "0.0.0.0/0"}]}
        bridge = {"type": "bridge", "bridge": "pods", "isGateway": True, "hairpinMode": True, "ipam": ranges}
        port_map = {"type": "portmap", "capabilities": {"portMappings": True}}
        return json.dumps({"cniVersion": "0.4.0", "name": "lab", "plugins": [bridge, port_map]})

    def _write_configuration(self, number: int, box: Box, authority: Authority) -> None:
        (box.folder / "cni").mkdir(exist_ok=True)
        # The score is one that this root need not have the right to lower.
        (box.folder / "containerd.toml").write_text(f"""version = 2
    root = "{box.folder}/containerd"
    state = "/run/containerd"
    [plugins."io.containerd.internal.v1.opt"]
      path = "{box.folder}/opt"
    [plugins."io.containerd.grpc.v1.cri"]
      sandbox_image = "{PAUSE_IMAGE}"
      restrict_oom_score_adj = true
      [plugins."io.containerd.grpc.v1.cri".cni]
        bin_dir = "/usr/lib/cni"
        conf_dir = "{box.folder}/cni"
      [plugins."io.containerd.grpc.v1.cri".registry]
        config_path = "/etc/containerd/certs.d"
    """)
        (box.folder / "cni/lab.conflist").write_text(self._pod_network(number))
        kubelet = {
            "apiVersion": "kubelet.config.k8s.io/v1beta1",
            "kind": "KubeletConfiguration",
            "authentication": {"anonymous": {"enabled": False}, "x509": {"clientCAFile": str(authority.certificate)}},
            "containerRuntimeEndpoint": "unix:///run/containerd/containerd.sock",
            "cgroupDriver": "cgroupfs",
            # A kubelet kills what it finds beneath its root and does not know: two nodes must not have the same one.
            "cgroupRoot": f"/{self.name}/{box.name}",
            "enforceNodeAllocatable": [],
            "failSwapOn": False,
            "localStorageCapacityIsolation": False,
            # The machine's disk and memory are not the lab's to free, and an image that was collected cannot be pulled.
            "evictionHard": {"memory.available": "1Mi", "nodefs.available": "1%", "imagefs.available": "1%"},
            "imageGCHighThresholdPercent": 100,
            "imageGCLowThresholdPercent": 99,
        }
        (box.folder / "kubelet.json").write_text(json.dumps(kubelet))

    def _linked(self) -> bool:
        return Path("/sys/class/net", self.name).exists()

    def _join_host(self, box: Box) -> None:
        """Make the bridge in the control plane's box, and this machine's link to it."""
        if not self._linked():
            run(["ip", "link", "add", self.name, "type", "veth", "peer", "name", "host", "netns", str(box.first.child)])
        run(["ip", "address", "replace", f"{self.host_address}/24", "dev", self.name])
        run(["ip", "link", "set", self.name, "up"])
        run(["ip", "route", "replace", f"{self.network}.0.0/16", "via", box.address])
        if not _has_link(box, "nodes"):
            # A bridge whose address is not set changes it when a node joins, and the others lose it for most of a minute.
            run(box.inside("ip", "link", "add", "nodes", "address", BRIDGE_ADDRESS, "type", "bridge"))
        run(box.inside("ip", "address", "replace", f"{box.address}/24", "dev", "nodes"))
        run(box.inside("ip", "link", "set", "nodes", "up"))
        run(box.inside("ip", "link", "set", "host", "master", "nodes", "up"))
        # What is beyond is refused at once; without this a look-up of an unknown name would hang.
        run(box.inside("ip", "route", "replace", "unreachable", "default"))

    def _join_node(self, number: int, box: Box) -> None:
        """Link the node to the bridge, and tell everyone the way to its pods."""
        hub = self.control()
        if not _has_link(box, "eth0"):
            # Not from within: the number of the node's process is this machine's. The link's address is one that stays, as
            # the others remember it when a node comes back.
            end = ["name", "eth0", "address", f"02:00:00:00:01:{number:02x}", "netns", str(box.first.child)]
            enter = ["nsenter", "--target", str(hub.first.child), "--net", "ip"]
            run([*enter, "link", "add", box.name, "type", "veth", "peer", *end])
        run(hub.inside("ip", "link", "set", box.name, "master", "nodes", "up"))
        run(box.inside("ip", "address", "replace", f"{box.address}/24", "dev", "eth0"))
        run(box.inside("ip", "link", "set", "eth0", "up"))
        # A node knows the way to its own pods only; the control plane's box routes between nodes, and to this machine.
        run(box.inside("ip", "route", "replace", "default", "via", hub.address))
        run(hub.inside("ip", "route", "replace", self._pods(number), "via", box.address))

    def _control_groups(self) -> list[Path]:
        """Return the lab's control groups: one in each hierarchy that the machine has."""
        return sorted({path.resolve() for path in (*CGROUPS.glob(self.name), *CGROUPS.glob(f"*/{self.name}"))})

    def _make_control_groups(self, name: str) -> list[Path]:
        """Return the places for a node's control groups."""
        if (CGROUPS / "cgroup.controllers").exists():
            return [CGROUPS / self.name / name]
        return sorted({hierarchy.resolve() / self.name / name for hierarchy in CGROUPS.iterdir() if hierarchy.is_dir()})

    def _await_ready(self, api: httpx.Client, box: Box) -> None:
        """Wait until the node is Ready and can be given pods."""
        box.wait("not Ready", lambda: _ready(api, box), NODE_SECONDS, "containerd", "kubelet", "kube-proxy")
        # The controllers make it, and without it the server refuses every pod.
        account = "/api/v1/namespaces/default/serviceaccounts/default"
        names = "kube-controller-manager", "kube-scheduler"
        self.control().wait("no service account", lambda: answers(api, account), SERVER_SECONDS, *names)

    def _make_storage(self, api: httpx.Client) -> None:
        """Make the default storage class and volumes for its claims: folders here, which every node sees."""
        _make(
            api,
            "/apis/storage.k8s.io/v1/storageclasses",
            {
                "metadata": {
                    "name": STORAGE_CLASS,
                    "annotations": {"storageclass.kubernetes.io/is-default-class": "true"},
                },
                "provisioner": "kubernetes.io/no-provisioner",
                "volumeBindingMode": "Immediate",
            },
        )
        for number in range(1, VOLUME_COUNT + 1):
            name = f"{STORAGE_CLASS}-{number}"
            _make(
                api,
                "/api/v1/persistentvolumes",
                {
                    "metadata": {"name": name},
                    "spec": {
                        "storageClassName": STORAGE_CLASS,
                        "capacity": {"storage": VOLUME_SIZE},
                        "accessModes": ["ReadWriteOnce", "ReadOnlyMany", "ReadWriteMany"],
                        "persistentVolumeReclaimPolicy": "Retain",
                        "hostPath": {"path": str(self.folder / "volumes" / name), "type": "DirectoryOrCreate"},
                    },
                },
            )


def prepare() -> dict[str, str]:
    """Install and build what a cluster needs, and return the programs' paths by their names.

    Raises:
        LabError: this is not root on Debian, or something cannot be had.
    """
    if not can_install():
        raise LabError("The lab's Kubernetes runs only for root on Debian.")
    install_missing(PACKAGES, ROOT / ".lab/kubernetes-apt.log")
    return {program.name: str(build(program)) for program in KUBERNETES}


def _write_private(file: Path, text: str) -> None:
    """Write a file that is whole at any time, and its owner's only."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile("w", dir=file.parent, delete=False) as unfinished:
        unfinished.write(text)
    Path(unfinished.name).rename(file)


def _import(box: Box, archive: int) -> None:
    command = box.inside("ctr", "--namespace", "k8s.io", "images", "import", "-")
    done = subprocess.run(command, env=ENVIRONMENT, stdin=archive, capture_output=True, text=True, check=False)
    if done.returncode:
        raise LabError(f"{box.name} does not take the image: {done.stderr.strip()}")


def progress_bar() -> Progress:
    """Return what shows how far a cluster's start is, while it starts."""
    columns = SpinnerColumn(), TextColumn("kubernetes: {task.description}"), TimeElapsedColumn()
    return Progress(*columns, console=Console(stderr=True), transient=True)


def _has_link(box: Box, name: str) -> bool:
    command = box.inside("ip", "link", "show", name)
    return subprocess.run(command, env=ENVIRONMENT, capture_output=True, check=False).returncode == 0


def answers(api: httpx.Client, path: str = "/readyz") -> bool:
    """Tell whether an API server answers with what is at a path."""
    try:
        return api.get(path).is_success
    except httpx.HTTPError:
        return False


def _ready(api: httpx.Client, box: Box) -> bool:
    """Tell whether the node is Ready by the word of the kubelet that runs now: its predecessor's stays for a while."""
    try:
        answer = api.get(f"/api/v1/nodes/{box.name}")
    except httpx.HTTPError:
        return False
    since = int(box.program("kubelet").file.stat().st_mtime)
    conditions = answer.json()["status"].get("conditions", []) if answer.is_success else []
    return any(
        condition["type"] == "Ready"
        and condition["status"] == "True"
        and datetime.datetime.fromisoformat(condition["lastHeartbeatTime"]).timestamp() >= since
        for condition in conditions
    )


def _make(api: httpx.Client, path: str, thing: dict[str, Any]) -> None:
    answer = api.post(path, json=thing)
    if answer.status_code not in (httpx.codes.CREATED, httpx.codes.CONFLICT):
        raise LabError(f"The cluster refuses {thing['metadata']['name']}: {answer.text}")


LAB = Cluster(ROOT / ".lab/kubernetes")
"""This checkout's cluster, which the functions of this module are about."""
up, down, address, status, load_image = LAB.up, LAB.down, LAB.address, LAB.status, LAB.load_image
