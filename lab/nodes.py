"""A Kubernetes cluster under `.lab/nodes` whose two nodes are virtual machines, with a real Ceph: for root on Debian.

The nodes' kernel has the RBD client, which this machine's may not have. They run under qemu's emulation (no KVM), each on a
disk that is thrown away; node2 is the Ceph host as well. The control plane, three monitors, the store and the virtual machines
are programs of one box (see `lab.boxes`): whatever happens, all of it ends with the box. Addresses as in `lab.kubernetes`, and

    10.N.0.21 to .23   the monitors         10.N.0.24   the store
"""

import contextlib
import hashlib
import io
import json
import os
import shutil
import signal
import subprocess
import tarfile
import tempfile
import uuid
from dataclasses import dataclass
from pathlib import Path

import httpx

from lab.archive import write_image
from lab.authority import Authority
from lab.boxes import ENVIRONMENT, Box, run
from lab.ceph import COMMON, make_keyrings
from lab.debian import LabError, install_missing
from lab.kubernetes import PAUSE_IMAGE, SERVER_SECONDS, Cluster, answers, prepare, progress_bar
from toolchain.programs import CACHE, ROOT

GUEST = Path(__file__).parent / "guest"
PACKAGES = {
    "qemu-system-x86_64": "qemu-system-x86",
    "qemu-img": "qemu-utils",
    "mmdebstrap": "mmdebstrap",
    "cpio": "cpio",
    "ceph-mon": "ceph-mon",
    "ceph-osd": "ceph-osd",
    "ceph": "ceph-common",
    "ssh": "openssh-client",
}
NODES = (1, 2)
CEPH_HOST = 2
MONITORS = {"a": 21, "b": 22, "c": 23}
STORE_ADDRESS = 24
MEMORY_MB = 1200
# Room for translated code; qemu's own choice takes a gigabyte and more for each guest.
TRANSLATION_MB = 256
STORE_MIB = 4096
GUEST_SECONDS = 240
CEPH_SECONDS = 60
COMMAND_SECONDS = 120

_CEPH = """[global]
fsid = {fsid}
mon initial members = a b c
mon host = {monitors}
public network = {network}.0.0/24
{common}
[mon]
mon data = {folder}/mon-$id
mon cluster log to file = false
log to file = false
log to stderr = true

[osd]
public addr = {network}.0.{store}
osd data = {folder}/store
keyring = {folder}/store/keyring
osd objectstore = memstore
memstore device bytes = {size}
osd crush initial weight = 1
osd class update on start = false
log to file = false
log to stderr = true
"""
_CONTAINERD = """version = 2
[plugins."io.containerd.grpc.v1.cri"]
  sandbox_image = "{pause}"
  [plugins."io.containerd.grpc.v1.cri".cni]
    bin_dir = "/usr/lib/cni"
    conf_dir = "/etc/cni/net.d"
  [plugins."io.containerd.grpc.v1.cri".registry]
    config_path = "/etc/containerd/certs.d"
"""


@dataclass(frozen=True)
class NodeLab(Cluster):
    """A cluster in a folder with two virtual nodes and a Ceph."""

    def up(self, nodes: int = len(NODES)) -> Path:
        """Start what is missing, and return the kubeconfig once both nodes are Ready and the pool `rbd` is there.

        Raises:
            LabError: it cannot be had; the text ends with the last lines of the log of what failed.
        """
        if nodes != len(NODES):
            raise LabError(f"This lab has {len(NODES)} nodes, not {nodes}.")
        binaries = prepare()
        install_missing(PACKAGES, ROOT / ".lab/nodes-apt.log")
        with self._locked(), progress_bar() as progress:
            task = progress.add_task("the guests' image, once")
            guest = _guest_image(binaries)
            progress.update(task, description="starting the control plane")
            self._choose_network()
            authority = Authority(self.folder / "pki")
            self._start_control(authority, binaries)
            progress.update(task, description="starting Ceph")
            self._start_ceph()
            progress.update(task, description="starting the guests")
            self._make_ssh_keys()
            for number in NODES:
                self._seed(number, authority)
                self._start_guest(number, guest)
            progress.update(task, description="waiting for the nodes")
            with self.client() as api:
                for number in NODES:
                    self._await_node(api, number)
        return self.kubeconfig

    # The nodes of the other kind of cluster are boxes, and these are none.
    def _nodes(self) -> list[Box]:
        return []

    def _guest(self, number: int) -> Path:
        return self.folder / f"guests/{number}"

    def kill(self, number: int) -> None:
        """Cut a node's power."""
        process = self.control().program(f"node{number}")
        self._signal(number, signal.SIGKILL)
        process.ends(20)

    def start(self, number: int) -> None:
        """Start a node that was killed, on a fresh disk: the same machine by name, address and keys."""
        self._start_guest(number, _guest_image(prepare()))

    def freeze(self, number: int) -> None:
        """Stop a node in the middle of whatever it does, until it is thawed."""
        self._signal(number, signal.SIGSTOP)

    def thaw(self, number: int) -> None:
        """Let a node that was frozen go on."""
        # What entered the box for it has stopped with it.
        if (pid := self.control().program(f"node{number}").pid) is not None:
            os.kill(pid, signal.SIGCONT)
        self._signal(number, signal.SIGCONT)

    def reboot(self, number: int) -> None:
        """Restart a node's kernel at once, without a word to what runs; its disk stays."""
        self.ssh(number, "echo 1 >/proc/sys/kernel/sysrq; (sleep 0.2; echo b >/proc/sysrq-trigger) >/dev/null 2>&1 &")

    def cut(self, number: int) -> None:
        """Take from a node its way to the cluster's API, and nothing else: it lives, serves and has Ceph."""
        # Both ways: what the API sends on connections that are open would reach the node without its answers, too.
        server = f"{self.control().address} -p tcp"
        rules = f"OUTPUT -d {server} --dport 6443", f"INPUT -s {server} --sport 6443"
        self.ssh(number, " && ".join(f"iptables -I {rule} -j DROP" for rule in rules))

    def _signal(self, number: int, how: signal.Signals) -> None:
        if (pid := self.control().program(f"node{number}").child) is None:
            raise LabError(f"node{number} does not run")
        os.kill(pid, how)

    def ssh(self, number: int, command: str, *, check: bool = True, seconds: float = COMMAND_SECONDS) -> str:
        """Run a command in a node's shell, and return what it prints.

        Raises:
            LabError: it failed, and this is checked.
        """
        known = self.folder / "ssh/known_hosts"
        options = [
            f"UserKnownHostsFile={known}",
            "StrictHostKeyChecking=yes",
            "BatchMode=yes",
            "ConnectTimeout=10",
            "LogLevel=ERROR",
        ]
        words = [word for option in options for word in ("-o", option)]
        line = ["ssh", "-i", str(self.folder / "ssh/client"), *words, f"root@{self.node_address(number)}", command]
        done = subprocess.run(line, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=seconds, check=False)
        if check and done.returncode:
            raise LabError(f"node{number}: {command}: {done.stderr.strip() or done.returncode}")
        return done.stdout

    @property
    def private_key(self) -> str:
        """Return the key that may log in to every node as root."""
        return (self.folder / "ssh/client").read_text()

    def host_key(self, number: int) -> str:
        """Return a node's public host key, in two words."""
        return " ".join((self.folder / f"ssh/node{number}.pub").read_text().split()[:2])

    @property
    def monitors(self) -> list[str]:
        """Return the monitors' addresses for clients in kernels."""
        return [f"{self.network}.0.{last}:6789" for last in MONITORS.values()]

    def ceph(self, *arguments: str) -> str:
        """Run `ceph` as the administrator, and return what it prints."""
        return self._client("ceph", *arguments)

    def rbd(self, *arguments: str) -> str:
        """Run `rbd` as the administrator, and return what it prints."""
        return self._client("rbd", *arguments)

    def _client(self, program: str, *arguments: str) -> str:
        command = [program, "-c", str(self._ceph_folder / "ceph.conf"), *arguments]
        done = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, timeout=COMMAND_SECONDS, check=False)
        if done.returncode:
            raise LabError(f"{program} {' '.join(arguments)}: {done.stderr.strip()}")
        return done.stdout

    def stop_monitor(self, name: str) -> None:
        """End one of the monitors a, b and c."""
        process = self.control().program(f"ceph-mon-{name}")
        if (pid := process.child) is not None:
            os.kill(pid, signal.SIGTERM)
        process.ends(20)

    def start_monitor(self, name: str) -> None:
        """Start a monitor that was stopped."""
        box = self.control()
        address = f"{self.network}.0.{MONITORS[name]}"
        command = ["ceph-mon", "-f", "-i", name, "-c", str(self._ceph_folder / "ceph.conf"), "--public-addr", address]
        box.start(f"ceph-mon-{name}", *command)

    @property
    def _ceph_folder(self) -> Path:
        return self.folder / "ceph"

    def _start_ceph(self) -> None:
        folder, box = self._ceph_folder, self.control()
        for last in (*MONITORS.values(), STORE_ADDRESS):
            run(box.inside("ip", "address", "replace", f"{self.network}.0.{last}/24", "dev", "nodes"))
        if box.program("ceph-osd").pid is not None:
            return
        for name in MONITORS:
            self.stop_monitor(name)
        shutil.rmtree(folder, ignore_errors=True)  # the store was in memory, and is gone
        (folder / "store").mkdir(parents=True)
        fsid, store = str(uuid.uuid4()), str(uuid.uuid4())
        addresses = {
            name: f"[v2:{self.network}.0.{last}:3300,v1:{self.network}.0.{last}:6789]" for name, last in MONITORS.items()
        }
        conf = folder / "ceph.conf"
        conf.write_text(
            _CEPH.format(
                fsid=fsid,
                monitors=" ".join(addresses.values()),
                network=self.network,
                folder=folder,
                common=COMMON.format(folder=folder),
                store=STORE_ADDRESS,
                size=STORE_MIB << 20,
            )
        )
        make_keyrings(folder)
        first = str(folder / "first-keyring")
        added = [word for name, address in addresses.items() for word in ("--addv", name, address)]
        run(["monmaptool", "--create", "--fsid", fsid, *added, str(folder / "monitors")])
        for name in MONITORS:
            make = ["--mkfs", "-i", name, "--monmap", str(folder / "monitors"), "--keyring", first]
            run(["ceph-mon", "-c", str(conf), *make])
            self.start_monitor(name)
        names = [f"ceph-mon-{name}" for name in MONITORS]
        box.wait("the monitors do not agree", self._monitors_agree, CEPH_SECONDS, *names)
        self.ceph("osd", "new", store)
        run(["ceph-osd", "-c", str(conf), "--mkfs", "-i", "0", "--osd-uuid", store])
        box.start("ceph-osd", "ceph-osd", "-f", "-i", "0", "-c", str(conf))
        self.ceph("osd", "pool", "create", "rbd")
        box.wait("the store is not up", lambda: " 1 up" in self.ceph("osd", "stat"), CEPH_SECONDS, "ceph-osd")
        self.rbd("pool", "init", "rbd")

    def _monitors_agree(self) -> bool:
        try:
            return len(json.loads(self.ceph("--connect-timeout", "3", "quorum_status"))["quorum"]) == len(MONITORS)
        except LabError:
            return False

    def _make_ssh_keys(self) -> None:
        folder = self.folder / "ssh"
        if folder.exists():
            return
        folder.mkdir(mode=0o700)
        for name in ("client", *(f"node{number}" for number in NODES)):
            run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(folder / name)])
        (folder / "known_hosts").write_text("".join(f"{self.node_address(number)} {self.host_key(number)}\n" for number in NODES))

    def _seed(self, number: int, authority: Authority) -> None:
        """Write the files that make a guest this node, as a tar that is its second disk."""
        name = f"node{number}"
        hosts = "".join(f"{self.node_address(other)} node{other}\n" for other in NODES)
        self._kubeconfig(authority, name, f"system:node:{name}", "system:nodes")
        self._kubeconfig(authority, "kube-proxy", "system:kube-proxy")
        kubelet = {
            "apiVersion": "kubelet.config.k8s.io/v1beta1",
            "kind": "KubeletConfiguration",
            "authentication": {"anonymous": {"enabled": False}, "x509": {"clientCAFile": "/etc/lab/ca.crt"}},
            "containerRuntimeEndpoint": "unix:///run/containerd/containerd.sock",
            "cgroupDriver": "cgroupfs",
            "failSwapOn": False,
            "resolvConf": "/etc/resolv.conf",
            "evictionHard": {"memory.available": "20Mi", "nodefs.available": "1%", "imagefs.available": "1%"},
            "imageGCHighThresholdPercent": 100,
            "imageGCLowThresholdPercent": 99,
        }
        files = {
            "etc/hosts": f"127.0.0.1 localhost\n{hosts}",
            "etc/lab/ca.crt": authority.certificate.read_text(),
            "etc/lab/kubelet.json": json.dumps(kubelet),
            "etc/lab/kubelet.kubeconfig": (authority.folder / f"{name}.kubeconfig").read_text(),
            "etc/lab/kube-proxy.kubeconfig": (authority.folder / "kube-proxy.kubeconfig").read_text(),
            "etc/lab/pods": f"{self.network}.128.0/17",
            "etc/cni/net.d/lab.conflist": self._pod_network(number),
            "etc/containerd/config.toml": _CONTAINERD.format(pause=PAUSE_IMAGE),
            "etc/ssh/ssh_host_ed25519_key": (self.folder / f"ssh/{name}").read_text(),
            "root/.ssh/authorized_keys": (self.folder / "ssh/client.pub").read_text(),
        }
        if number == CEPH_HOST:
            keep = ("[global]", "fsid", "mon host")
            lines = (self._ceph_folder / "ceph.conf").read_text().splitlines()
            files["etc/ceph/ceph.conf"] = "\n".join(line for line in lines if line.startswith(keep)) + "\n"
            files["etc/ceph/ceph.client.admin.keyring"] = (self._ceph_folder / "keyring").read_text()
        folder = self._guest(number)
        folder.mkdir(parents=True, exist_ok=True)
        with tarfile.open(folder / "seed.tar", "w") as seed:
            for path, text in files.items():
                entry = tarfile.TarInfo(path)
                entry.mode, entry.size = 0o600, len(text.encode())
                seed.addfile(entry, io.BytesIO(text.encode()))

    def _start_guest(self, number: int, image: Path) -> None:
        box, name, folder = self.control(), f"node{number}", self._guest(number)
        if box.program(name).pid is not None:
            return
        disk = folder / "disk.qcow2"
        disk.unlink(missing_ok=True)
        run(["qemu-img", "create", "-q", "-f", "qcow2", "-F", "raw", "-b", str(image / "root.img"), str(disk)])
        with contextlib.suppress(LabError):  # it is there after the first start
            run(box.inside("ip", "tuntap", "add", name, "mode", "tap"))
        run(box.inside("ip", "link", "set", name, "master", "nodes", "up"))
        run(box.inside("ip", "route", "replace", self._pods(number), "via", self.node_address(number)))
        words = [f"lab.name={name}", f"lab.address={self.node_address(number)}", f"lab.router={box.address}"]
        quiet = ["console=ttyS0", "panic=-1", "net.ifnames=0", "apparmor=0", "mitigations=off", "quiet"]
        box.start(
            name,
            *("qemu-system-x86_64", "-name", name, "-accel", f"tcg,thread=multi,tb-size={TRANSLATION_MB}", "-cpu", "max"),
            *("-smp", "2", "-m", str(MEMORY_MB), "-nographic", "-monitor", "none", "-serial", "stdio"),
            *("-kernel", str(image / "vmlinuz"), "-initrd", str(image / "initrd"), "-append", " ".join([*quiet, *words])),
            *("-drive", f"file={disk},if=virtio,format=qcow2,cache=unsafe"),
            *("-drive", f"file={folder}/seed.tar,if=virtio,format=raw,readonly=on"),
            *("-netdev", f"tap,id=n0,ifname={name},script=no,downscript=no"),
            *("-device", f"virtio-net-pci,netdev=n0,mac=52:54:00:00:00:{10 + number:02x}", "-device", "virtio-rng-pci"),
        )

    def _await_node(self, api: httpx.Client, number: int) -> None:
        name = f"node{number}"
        self.control().wait("not Ready", lambda: self.is_ready(api, number), GUEST_SECONDS, name)
        account = "/api/v1/namespaces/default/serviceaccounts/default"
        self.control().wait("no service account", lambda: answers(api, account), SERVER_SECONDS, "kube-controller-manager")

    @staticmethod
    def is_ready(api: httpx.Client, number: int) -> bool:
        """Tell whether the API server takes a node for Ready."""
        try:
            answer = api.get(f"/api/v1/nodes/node{number}")
        except httpx.HTTPError:
            return False
        conditions = answer.json()["status"].get("conditions", []) if answer.is_success else []
        return any(condition["type"] == "Ready" and condition["status"] == "True" for condition in conditions)


def _guest_image(binaries: dict[str, str]) -> Path:
    """Return the folder of the guests' image, built where there is none, outside the checkout.

    Raises:
        LabError: it cannot be built; the text has the end of the log.
    """
    parts = [*sorted(GUEST.iterdir()), Path(__file__)]
    made_of = b"".join(part.read_bytes() for part in parts[:-1]) + binaries["kubelet"].encode()
    folder = CACHE / f"guest-{hashlib.sha256(made_of).hexdigest()[:12]}"
    if (folder / "root.img").exists():
        return folder
    CACHE.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=CACHE, prefix="guest-unfinished-") as unfinished:
        out = Path(unfinished) / "out"
        out.mkdir()
        pause, log = Path(unfinished) / "pause.tar", Path(unfinished) / "log"
        busybox = Path(str(shutil.which("busybox")))
        write_image(pause, PAUSE_IMAGE, ["/busybox", "sleep", "infinity"], {"busybox": busybox})
        command = [str(GUEST / "build.sh"), str(out), str(pause), binaries["kubelet"], binaries["kube-proxy"]]
        with log.open("w") as said:
            code = subprocess.run(
                command, env=ENVIRONMENT, stdin=subprocess.DEVNULL, stdout=said, stderr=said, check=False
            ).returncode
        if code:
            raise LabError(f"The guests' image cannot be built: {log.read_text()[-1000:]}")
        out.rename(folder)
    return folder


LAB = NodeLab(ROOT / ".lab/nodes")
