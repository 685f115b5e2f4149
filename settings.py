"""The stack's configuration as one frozen object. Every rule about it is here, and checked before any resource is registered.

Secrets (``users``, ``providedCertificate``, ``pushCredentials``) are checked here too, but never enter the object: the
program reads them as secret outputs. No message shows their values.
"""

import datetime
import ipaddress
import json
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Self, TypeGuard, get_args

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, model_validator
from pydantic.alias_generators import to_camel
from pydantic_core import PydanticCustomError

PROJECT = "private-registry"

HOSTNAME = re.compile(r"(?=.{1,253}$)[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?(\.[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?)*")
# https://github.com/distribution/reference/blob/main/reference.go
PATH_COMPONENT = r"[a-z0-9]+(?:(?:\.|_|__|-+)[a-z0-9]+)*"
DOMAIN = r"(?:[a-zA-Z0-9](?:[a-zA-Z0-9-]*[a-zA-Z0-9])?\.?)+(?::[0-9]{1,5})?"
REPOSITORY = re.compile(rf"{PATH_COMPONENT}(?:/{PATH_COMPONENT})*")
TAG = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,127}")
REFERENCE = re.compile(
    rf"(?:{DOMAIN}/)?{PATH_COMPONENT}(?:/{PATH_COMPONENT})*"
    rf"(?::(?P<tag>{TAG.pattern}))?(?:@(?P<digest>sha256:[a-f0-9]{{64}}))?"
)
DNS_LABEL = re.compile(r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?")
# https://kubernetes.io/docs/reference/kubernetes-api/common-definitions/quantity/, the forms that mean something here
CPU_QUANTITY = re.compile(r"[1-9][0-9]*m?|0\.[0-9]{0,2}[1-9]")
MEMORY_QUANTITY = re.compile(r"[1-9][0-9]*(Mi|Gi|Ti)")
DOCKER_NAME = re.compile(r"[a-zA-Z0-9][a-zA-Z0-9_.-]{1,127}")
ABSOLUTE_PATH = re.compile(r"(/[A-Za-z0-9._-]+)+")
LOGIN_NAME = re.compile(r"[a-z_][a-z0-9_-]{0,31}")
# RSA is left out: with an RSA host key the SSH library of the official command plugin fails against today's servers.
HOST_KEY = re.compile(r"(ssh-ed25519|ecdsa-sha2-nistp(256|384|521)) [A-Za-z0-9+/]+={0,2}")
USER_NAME = re.compile(r"[A-Za-z0-9._@-]{1,64}")
# Narrower than what Ceph takes: nothing that a shell, a path or `rbd` reads as anything else.
CEPH_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,95}")
CEPH_KEY = re.compile(r"[A-Za-z0-9+/]{38,}={0,2}")
LONGEST_PASSWORD = 72  # bytes: bcrypt ignores what comes after them
SHORTEST_PASSWORD = 8


def _rule(holds: Callable[[Any], bool], rule: str, mend: str) -> AfterValidator:
    """A rule on one value: what must hold, in words, and what to write instead."""

    def check(value: Any) -> Any:
        if not holds(value):
            raise PydanticCustomError("rule", "{rule}; {mend}", {"rule": rule, "mend": mend})
        return value

    return AfterValidator(check)


def _is_address(text: str) -> bool:
    try:
        ipaddress.ip_address(text)
    except ValueError:
        return False
    return "%" not in text  # a zone means something on one machine only


def _is_pinned(reference: str) -> bool:
    match = REFERENCE.fullmatch(reference)
    return match is not None and bool(match["digest"] or (match["tag"] and match["tag"] != "latest"))


def _is_hostname(text: str) -> bool:
    return bool(HOSTNAME.fullmatch(text)) and not _is_address(text)


def _is_endpoint(text: str) -> bool:
    host, _, port = text.rpartition(":") if ":" in text else (text, "", "443")
    # Docker takes a bare word for a repository of Docker Hub.
    is_host = _is_address(host) or (_is_hostname(host) and ("." in host or ":" in text or host == "localhost"))
    return is_host and port.isdigit() and 1 <= int(port) <= 65535


def _is_monitor(text: str) -> bool:
    host, _, port = text.rpartition(":")
    in_brackets = host.startswith("[") and host.endswith("]") and ":" in host
    is_host = (_is_address(host[1:-1]) if in_brackets else _is_address(host) and ":" not in host) or _is_hostname(host)
    return is_host and port.isdigit() and 1 <= int(port) <= 65535


Hostname = Annotated[str, _rule(_is_hostname, "must be a DNS name in lower case", "write one such as registry.example.com")]
IpAddress = Annotated[str, _rule(_is_address, "must be an IP address", "write one such as 10.0.0.5")]
RegistryAddress = Annotated[
    IpAddress,
    _rule(
        lambda text: not ipaddress.ip_address(text).is_unspecified,
        "must be an address that clients reach",
        "write one of the registry's, such as 10.0.0.5",
    ),
]
Port = Annotated[int, _rule(lambda port: 1 <= port <= 65535, "must be a port from 1 to 65535", "write one such as 5000")]
PinnedImage = Annotated[
    str,
    _rule(
        _is_pinned,
        "must be an image reference pinned by a tag other than latest, or by a digest",
        "write one such as registry:3.1.2",
    ),
]
Repository = Annotated[
    str,
    _rule(
        lambda text: bool(REPOSITORY.fullmatch(text)),
        "must be a repository in lower case, without host, tag or digest",
        "write one such as yeepay/registry",
    ),
]
Tag = Annotated[
    str,
    _rule(
        # Short enough to be a label's value, and to have the content's digest after it.
        lambda text: bool(TAG.fullmatch(text)) and len(text) <= 50 and text[0].isalnum() and text[-1].isalnum(),
        "must be an image tag: at most 50 letters, digits, dots, dashes or underscores between letters or digits",
        "write one such as 3.1.2",
    ),
]
Endpoint = Annotated[
    str,
    _rule(_is_endpoint, "must be a registry's host, with a port where it is not 443", "write one such as hub.example.com"),
]
DockerName = Annotated[
    str,
    _rule(
        lambda text: bool(DOCKER_NAME.fullmatch(text)),
        "must be a Docker name: 2 to 128 letters, digits, dots, dashes or underscores",
        "write one such as registry",
    ),
]
DnsLabel = Annotated[
    str,
    _rule(
        lambda text: bool(DNS_LABEL.fullmatch(text)),
        "must be a DNS label: at most 63 small letters, digits or dashes",
        "write one such as registry",
    ),
]
DnsSubdomain = Annotated[
    str,
    _rule(
        lambda text: bool(HOSTNAME.fullmatch(text)),
        "must be a Kubernetes name: small letters, digits, dashes and dots",
        "write one such as registry",
    ),
]
WorkloadName = Annotated[
    str,
    _rule(
        lambda text: bool(DNS_LABEL.fullmatch(text)) and text[0].isalpha() and len(text) <= 40,
        "must be a Service's name: at most 40 small letters, digits or dashes, beginning with a letter",
        "write one such as registry",
    ),
]
RegistryHostname = Annotated[
    str,
    _rule(
        lambda text: _is_hostname(text) and len(text) <= 63,
        "must be a DNS name in lower case, of at most 63 characters",
        "write one such as registry.example.com",
    ),
]
NodePort = Annotated[
    int,
    _rule(lambda port: 30000 <= port <= 32767, "must be a node port from 30000 to 32767", "write one such as 32500"),
]
Cpu = Annotated[
    str,
    _rule(lambda text: bool(CPU_QUANTITY.fullmatch(text)), "must be a number of CPUs", 'write one such as "4" or "500m"'),
]
Memory = Annotated[
    str,
    _rule(
        lambda text: bool(MEMORY_QUANTITY.fullmatch(text)),
        "must be a size with the unit Mi, Gi or Ti",
        "write one such as 10Gi",
    ),
]
Seconds = Annotated[
    int,
    _rule(lambda seconds: 0 <= seconds <= 3600, "must be a number of seconds from 0 to 3600", "write one such as 300"),
]
ReadySeconds = Annotated[
    int,
    _rule(lambda seconds: 10 <= seconds <= 3600, "must be a number of seconds from 10 to 3600", "write one such as 300"),
]
SizeGiB = Annotated[
    int, _rule(lambda size: 1 <= size <= 1 << 20, "must be a number of GiB from 1 to 1048576", "write one such as 1000")
]
SizeMiB = Annotated[
    int,
    _rule(
        lambda size: 64 <= size <= 1 << 30,
        "must be a number of MiB from 64 to 1073741824",
        "write one such as 1024000, which is 1000 GiB",
    ),
]
TrashDays = Annotated[
    int, _rule(lambda days: 1 <= days <= 3650, "must be a number of days from 1 to 3650", "write one such as 30")
]
Monitor = Annotated[
    str,
    _rule(_is_monitor, "must be a monitor's address and port", "write one such as 10.149.149.2:6789, or [2001:db8::2]:6789"),
]
Monitors = Annotated[
    tuple[Monitor, ...],
    _rule(
        lambda monitors: len(monitors) > 0 and len(set(monitors)) == len(monitors),
        "must list one monitor or more, each once",
        "write all of the Ceph cluster's, such as [10.149.149.2:6789, 10.149.149.3:6789, 10.149.149.4:6789]",
    ),
]
CephName = Annotated[
    str,
    _rule(
        lambda text: bool(CEPH_NAME.fullmatch(text)),
        "must be 1 to 96 letters, digits, dots, dashes or underscores, beginning with a letter or a digit",
        "write one such as registry",
    ),
]
CephUser = Annotated[
    str,
    _rule(
        lambda text: bool(CEPH_NAME.fullmatch(text)) and text != "admin" and not text.startswith("client."),
        'must be a Ceph user without "client.", and not admin, who may do everything',
        "write one such as registry",
    ),
]
Host = Annotated[
    str,
    _rule(
        lambda text: _is_hostname(text) or _is_address(text),
        "must be a DNS name or an IP address",
        "write one such as node1.example.com",
    ),
]
AbsolutePath = Annotated[
    str,
    _rule(
        lambda text: bool(ABSOLUTE_PATH.fullmatch(text)) and ".." not in text.split("/"),
        "must be an absolute path of letters, digits, dots, dashes and underscores",
        "write one such as /etc/containerd/certs.d",
    ),
]
LoginName = Annotated[str, _rule(lambda text: bool(LOGIN_NAME.fullmatch(text)), "must be a user name", "write one such as root")]
HostKey = Annotated[
    str,
    _rule(
        lambda text: bool(HOST_KEY.fullmatch(text)),
        "must be an ed25519 or ecdsa host key",
        "write the two words that `ssh-keyscan -t ed25519 HOST` prints after the name",
    ),
]
ValidityDays = Annotated[
    int,
    _rule(lambda days: 1 <= days <= 7300, "must be a number of days from 1 to 7300", "write one such as 365"),
]
RenewalDays = Annotated[
    int,
    _rule(lambda days: 0 <= days <= 7300, "must be a number of days from 0 to 7300", "write one such as 30"),
]
Generation = Annotated[
    int,
    _rule(lambda number: 1 <= number <= 1000, "must be a number from 1 to 1000", "write 1, and the next one for a new authority"),
]
Wave = Annotated[
    int, _rule(lambda number: 1 <= number <= 1000, "must be a number from 1 to 1000", "write 1 for the stacks that come first")
]
MemoryMiB = Annotated[
    int,
    _rule(lambda size: 64 <= size <= 1 << 20, "must be a number of MiB from 64 to 1048576", "write one such as 512"),
]


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, alias_generator=to_camel)


class Authority(_Section):
    """Which of the stack's authorities is used: a new one is trusted by all clients before it signs."""

    generation: Generation = Field(1, description="the authority that signs the server's certificate")
    trusted: tuple[Generation, ...] = Field((), description="the authorities that clients trust; generation alone if left out")

    @model_validator(mode="after")
    def _the_one_that_signs_is_trusted(self) -> Self:
        if self.trusted and self.generation not in self.trusted:
            raise PydanticCustomError(
                "rule",
                "trusted must list generation {generation}, which signs the server's certificate; add it",
                {"generation": self.generation},
            )
        return self

    @property
    def generations(self) -> list[int]:
        """The authorities that there are, in their order."""
        return sorted({self.generation, *self.trusted})


class Certificate(_Section):
    """The server's certificate, and the authority that clients trust."""

    mode: Literal["authority", "self-signed", "provided"] = Field(
        "authority",
        description="authority: an authority of its own signs the server's certificate; self-signed: the certificate is "
        "its own authority; provided: both come from the secret providedCertificate",
    )
    validity_days: ValidityDays = Field(365, description="days that the server's certificate is valid")
    authority: Authority = Authority()
    authority_validity_days: ValidityDays = Field(3650, description="days that the authority is valid")
    renew_before_days: RenewalDays = Field(30, description="days before the end from which on `pulumi up` renews it")
    names: tuple[Hostname, ...] = Field((), description="further DNS names of the server")
    addresses: tuple[IpAddress, ...] = Field((), description="IP addresses of the server")

    @model_validator(mode="after")
    def _renewal_comes_after_issue(self) -> Self:
        if self.renew_before_days >= self.validity_days:
            raise PydanticCustomError(
                "rule",
                "renewBeforeDays {before} must be less than validityDays {validity}, or every preview would renew the "
                "certificate; lower renewBeforeDays",
                {"before": self.renew_before_days, "validity": self.validity_days},
            )
        if self.mode == "authority" and self.authority_validity_days < 2 * self.validity_days:
            raise PydanticCustomError(
                "rule",
                "authorityValidityDays {authority} must be at least twice validityDays {validity}, or the authority would end "
                "before a renewed certificate; raise authorityValidityDays",
                {"authority": self.authority_validity_days, "validity": self.validity_days},
            )
        return self

    @model_validator(mode="after")
    def _only_an_authority_has_generations(self) -> Self:
        if self.mode != "authority" and "authority" in self.model_fields_set:
            raise PydanticCustomError("rule", "authority must come with mode: authority; leave one of them out", {})
        return self


class SshHost(_Section):
    """A machine that is reached over SSH."""

    address: Host = Field(description="name or address of the machine")
    port: Port = Field(22, description="port of its SSH server")
    user: LoginName = Field("root", description="user to log in as; others than root need sudo without a password")
    host_key: HostKey = Field(description="its host key: without it anyone could answer in its place")

    def as_root(self, arguments: Sequence[str]) -> list[str]:
        """Return the command that runs a command there as root."""
        return [*arguments] if self.user == "root" else ["sudo", "-n", *arguments]


class RemoteHost(SshHost):
    """A machine that is reached over SSH, directly or through another one."""

    jump: SshHost | None = Field(None, description="machine to reach it through")


class Image(_Section):
    """The registry's own image."""

    base: PinnedImage = Field("registry:3.1.2", description="Distribution image that it is built on")
    repository: Repository = Field("yeepay/registry", description="repository of the built image")
    tag: Tag = Field("3.1.2", description="tag of the built image")
    platform: Literal["linux/amd64", "linux/arm64"] = Field("linux/amd64", description="platform to build for")
    push_to: Endpoint | None = Field(None, description="another registry to push the built image to")
    nodes: tuple[SshHost, ...] = Field(
        (), description="nodes of the cluster to copy the built image to over SSH, where there is no other registry"
    )

    @property
    def name(self) -> str:
        """The image's full name: host of the registry it is pushed to, repository and tag."""
        return f"{self.push_to}/{self.repository}:{self.tag}" if self.push_to else f"{self.repository}:{self.tag}"


class Access(_Section):
    """Who may use the registry."""

    anonymous: bool = Field(False, description="true: anyone who reaches the registry may push, pull and delete")


class Container(_Section):
    """The registry as a container on one Docker host."""

    name: DockerName = Field("registry", description="name of the container")
    address: IpAddress = Field("127.0.0.1", description="address of the Docker host that the port is published on")
    port: Port = Field(5000, description="port of the Docker host that the registry is published on")
    memory_mib: MemoryMiB | None = Field(None, alias="memoryMiB", description="limit of memory in MiB; none if left out")


class Ingress(_Section):
    """A way in by the cluster's ingress controller, with a certificate of its own."""

    host: Hostname = Field(description="name that clients use for this way in")
    class_name: DnsSubdomain | None = Field(None, description="ingress class; the cluster's default if left out")
    tls_secret: DnsSubdomain = Field(description="secret of type kubernetes.io/tls with the ingress's certificate")


class Monitoring(_Section):
    """Metrics and alerts for the Prometheus operator."""

    namespace: DnsLabel = Field(description="namespace that may read the metrics on port 5001")


class Kubernetes(_Section):
    """The registry as a ReplicationController in a cluster."""

    name: WorkloadName = Field("registry", description="name of the ReplicationController, the Service and all that they need")
    namespace: DnsLabel = Field("default", description="namespace of the registry; it has to exist")
    node_port: NodePort = Field(32500, description="port of each node on which the registry is reached")
    cpu: Cpu = Field("4", description="CPUs of the pod, requested and at most")
    memory: Memory = Field("10Gi", description="memory of the pod, requested and at most")
    toleration_seconds: Seconds | None = Field(
        None,
        description="seconds after which the pod leaves a node that does not answer; if left out 0 with storage.rbd, where the "
        "lock of the image keeps the old node out, else 30",
    )
    ready_timeout_seconds: ReadySeconds = Field(300, description="seconds that `pulumi up` waits for the pod to be ready")
    node_selector: dict[str, str] = Field({}, description="labels that the pod's node must have")
    affinity: dict[str, Any] = Field({}, description="the pod's affinity, as Kubernetes has it")
    priority_class: DnsSubdomain | None = Field(None, description="priority class of the pod")
    pull_secret_namespaces: tuple[DnsLabel, ...] = Field(
        (), description="namespaces that get a pull secret for this registry, named NAME-pull"
    )
    ingress: Ingress | None = Field(None, description="a way in by the cluster's ingress controller")
    monitoring: Monitoring | None = Field(None, description="metrics and alerts for the Prometheus operator")


class Claim(_Section):
    """The claim that holds all images in a cluster: one that exists, or one that the stack makes."""

    existing: DnsSubdomain | None = Field(None, description="name of a claim that exists")
    class_name: DnsSubdomain | None = Field(None, description="storage class of the claim; the cluster's default if left out")
    size_gib: SizeGiB = Field(1000, alias="sizeGiB", description="size of the claim in GiB")

    @model_validator(mode="after")
    def _existing_is_taken_as_it_is(self) -> Self:
        if self.existing is not None and self.model_fields_set & {"class_name", "size_gib"}:
            raise PydanticCustomError("rule", "existing contradicts className and sizeGiB; leave existing or the others out", {})
        return self


class CephHost(RemoteHost):
    """A machine with `rbd`, `ceph`, Python 3 and an admin's key in /etc/ceph."""


class Csi(_Section):
    """What ceph-csi needs to know beyond the image."""

    cluster_id: CephName = Field(description="the cluster's clusterID in the driver's own configuration")
    driver: DnsSubdomain = Field("rbd.csi.ceph.com", description="name of the driver; rook-ceph.rbd.csi.ceph.com with Rook")


class Rbd(_Section):
    """The Ceph RBD image that holds all images of the registry, made on a Ceph host and mounted in the pod."""

    monitors: Monitors = Field(description="the Ceph cluster's monitors, with their ports of messenger 1")
    pool: CephName = Field("rbd", description="pool of the image; it has to exist")
    image: CephName = Field("registry", description="name of the image")
    size_mib: SizeMiB = Field(1024000, alias="sizeMiB", description="size of the image in MiB; a larger one grows it in use")
    user: CephUser = Field(
        "registry", description="Ceph user that nodes mount it as; made with least rights, unless the secret cephKey is its key"
    )
    host: CephHost | None = Field(None, description="the Ceph host; the machine that runs Pulumi if left out")
    driver: Literal["auto", "in-tree", "csi"] = Field(
        "auto",
        description="what mounts it: in-tree up to Kubernetes 1.30, csi (ceph-csi) from 1.31 on; auto asks the cluster",
    )
    csi: Csi | None = Field(None, description="what ceph-csi needs to know")
    mount: Literal["claim", "inline"] = Field(
        "claim", description="claim: a PersistentVolume, whose filesystem grows by itself; inline: in the pod, in-tree only"
    )
    format: Literal["mount", "host"] = Field(
        "mount", description="mount: the node that first mounts it formats it; host: the Ceph host does, which has to map it"
    )
    adopt: bool = Field(False, description="true: take over an image that exists and is no stack's, with what it holds")

    @model_validator(mode="after")
    def _driver_has_what_it_needs(self) -> Self:
        if self.driver == "csi" and self.csi is None:
            raise PydanticCustomError("rule", "driver: csi must come with csi.clusterId; write it", {})
        if self.driver == "in-tree" and self.csi is not None:
            raise PydanticCustomError("rule", "driver: in-tree contradicts csi; leave one of them out", {})
        if self.mount == "inline" and (self.driver == "csi" or self.csi is not None):
            raise PydanticCustomError("rule", "mount: inline is of the in-tree driver only; leave mount or csi out", {})
        return self


class Storage(_Section):
    """Where the images are kept."""

    volume: DockerName = Field("registry", description="name of the Docker volume with all images")
    claim: Claim = Field(Claim(), description="the claim that holds all images in a cluster")
    rbd: Rbd | None = Field(None, description="a Ceph RBD image that holds all images in a cluster, in place of a claim")
    on_destroy: Literal["keep", "trash", "delete"] = Field(
        "keep",
        description="what `pulumi destroy` does with the volume, claim or RBD image: keep it, delete it with all images, or "
        "(RBD only) move it to the trash, from which it can be restored",
    )
    trash_days: TrashDays = Field(30, description="days that an RBD image stays in the trash before it may be purged")
    protect: bool = Field(False, description="true: Pulumi refuses every change that would delete the volume")

    @model_validator(mode="after")
    def _protected_data_is_kept(self) -> Self:
        if self.protect and self.on_destroy != "keep":
            raise PydanticCustomError(
                "rule",
                "protect: true and onDestroy: {policy} contradict each other; leave one of them out",
                {"policy": self.on_destroy},
            )
        return self

    @model_validator(mode="after")
    def _only_an_rbd_image_has_a_trash(self) -> Self:
        if self.rbd is None and self.on_destroy == "trash":
            raise PydanticCustomError("rule", "onDestroy: trash must come with rbd; write keep or delete", {})
        if self.on_destroy != "trash" and "trash_days" in self.model_fields_set:
            raise PydanticCustomError("rule", "trashDays must come with onDestroy: trash; leave it out", {})
        return self

    @model_validator(mode="after")
    def _images_are_in_one_place(self) -> Self:
        if self.rbd is not None and "claim" in self.model_fields_set:
            raise PydanticCustomError("rule", "rbd contradicts claim; leave one of them out", {})
        return self


class TrustHost(RemoteHost):
    """A client: a machine whose Docker or containerd trusts the registry."""

    runtime: Literal["docker", "containerd"] = Field(description="what pulls and pushes there")
    resolve_to: RegistryAddress | None = Field(
        None, description="an address of the registry: the hosts file gets a line that resolves hostname to it"
    )
    restart: str | None = Field(
        None,
        description="command that restarts containerd, such as `systemctl restart containerd`: only with it, its config_path is "
        "set where it is empty",
    )

    @model_validator(mode="after")
    def _docker_needs_no_restart(self) -> Self:
        if self.restart is not None and self.runtime == "docker":
            raise PydanticCustomError("rule", "restart must come with runtime: containerd; leave it out", {})
        return self


class TrustDaemonSet(_Section):
    """A pod on each node that makes its containerd trust the registry, for nodes that are not reached over SSH."""

    folder: AbsolutePath = Field("/etc/containerd/certs.d", description="the folder that containerd's config_path names")
    resolve_to: RegistryAddress | None = Field(
        None, description="an address of the registry: the nodes' hosts files get a line that resolves hostname to it"
    )


class Trust(_Section):
    """The clients that trust the registry's authority: this machine, which runs Pulumi, and others."""

    docker: bool = Field(False, description="true: the local Docker daemon trusts the registry's authority; needs root")
    hosts_file: bool = Field(
        False,
        description="true: the machine's hosts file gets a line that resolves hostname to container.address; needs root",
    )
    hosts: tuple[TrustHost, ...] = Field((), description="other machines whose Docker or containerd trusts it, over SSH")
    daemon_set: TrustDaemonSet | None = Field(None, description="a pod on each node that makes its containerd trust it")

    @model_validator(mode="after")
    def _each_host_is_listed_once(self) -> Self:
        addresses = [host.address for host in self.hosts]
        if twice := next((address for address in addresses if addresses.count(address) > 1), None):
            raise PydanticCustomError(
                "rule", "hosts must list each address once, but has {address} twice; remove one", {"address": twice}
            )
        return self


class Environment(_Section):
    """What the stack is among the others: `ops rollout` and the policy pack go by it."""

    production: bool = Field(
        False, description="true: `ops rollout` asks before it changes the stack, and the policies of production hold"
    )
    wave: Wave | None = Field(
        None, description="stacks next to each other in `ops rollout` with the same number are brought up at the same time"
    )


class Settings(_Section):
    """All that a stack says about the registry, but for its secrets."""

    target: Literal["docker", "kubernetes"] = Field("docker", description="where the registry runs")
    hostname: RegistryHostname = Field("registry.docker", description="name that clients use, and the certificate's common name")
    certificate: Certificate = Certificate()
    image: Image = Image()
    access: Access = Access()
    container: Container = Container()
    kubernetes: Kubernetes = Kubernetes()
    storage: Storage = Storage()
    trust: Trust = Trust()
    environment: Environment = Environment()

    @property
    def address(self) -> str:
        """What clients write before a repository: host and port."""
        port = self.container.port if self.target == "docker" else self.kubernetes.node_port
        return f"{self.hostname}:{port}"

    @property
    def toleration_seconds(self) -> int:
        """Seconds after which the pod leaves a node that does not answer."""
        if self.kubernetes.toleration_seconds is not None:
            return self.kubernetes.toleration_seconds
        return 30 if self.storage.rbd is None else 0

    @property
    def needed_secrets(self) -> list[str]:
        """The secrets that the stack cannot do without."""
        rbd = self.storage.rbd
        with_hosts = bool(self.image.nodes or self.trust.hosts) or (rbd is not None and rbd.host is not None)
        needed = ["sshPrivateKey"] if with_hosts else []
        return needed + (["providedCertificate"] if self.certificate.mode == "provided" else [])


SECRETS: Mapping[str, str] = {
    "users": "user names and passwords; without them there is one user, admin, whose password is generated",
    "providedCertificate": "PEM texts certificate (with its chain), privateKey and authority, for certificate.mode: provided",
    "pushCredentials": "username and password for image.pushTo",
    "sshPrivateKey": "private key in PEM or OpenSSH form for image.nodes, storage.rbd.host and trust.hosts",
    "cephKey": "key of the Ceph user storage.rbd.user, where the stack is not to make that user",
}
DEFAULTS = "defaults"  # the key of what Pulumi.yaml says for all stacks of a target
_TYPE_RULES = {
    "missing": ("must be there", "write it"),
    "int_type": ("must be a whole number", "write it without quotes and without a fraction"),
    "bool_type": ("must be true or false", "write it without quotes"),
    "string_type": ("must be a text", "write it in quotes"),
    "tuple_type": ("must be a list", "write its items in brackets"),
    "model_type": ("must be a mapping", "write its keys below it"),
    "model_attributes_type": ("must be a mapping", "write its keys below it"),
}


class SettingsError(ValueError):
    """The configuration breaks rules; ``faults`` has a sentence for each."""

    def __init__(self, stack: str, faults: list[str]) -> None:
        self.faults = faults
        count = "1 fault" if len(faults) == 1 else f"{len(faults)} faults"
        lines = "".join(f"\n  - {fault}" for fault in faults)
        super().__init__(f"the configuration of the stack {stack!r} has {count}; nothing was changed:{lines}")


def load(config: Mapping[str, str], secret_keys: set[str], stack: str, *, secrets_follow: bool = False) -> Settings:
    """Return the settings that a stack's configuration makes.

    Args:
        config: every key of the stack's configuration with its value, structured ones as JSON, as the engine passes them.
        secret_keys: the keys whose values are encrypted.
        stack: the stack's name, for messages.
        secrets_follow: the stack is new and its secrets are set later; one that is needed and not there is no fault yet.

    Raises:
        SettingsError: rules are broken; all of them are listed.
    """
    faults: list[str] = []
    sections: dict[str, Any] = {}
    secrets: dict[str, Any] = {}
    defaults: dict[str, Any] = {}
    known = {field.alias or name: field for name, field in Settings.model_fields.items()}
    for full_key, text in sorted(config.items()):
        namespace, _, key = full_key.partition(":")
        if namespace != PROJECT:
            continue
        value = _parsed(text)
        if key in SECRETS:
            if full_key not in secret_keys:
                faults.append(
                    f"{full_key} is in plain text: it must be encrypted; take it out of the file and set it with "
                    f"`pulumi config set --secret --path {full_key}.NAME`"
                )
            else:
                secrets[key] = value
        elif key not in known and key != DEFAULTS:
            names = ", ".join(sorted([*known, *SECRETS, DEFAULTS]))
            faults.append(f"{json.dumps(full_key)[1:-1]} is not a setting: it must be one of {names}; correct or remove it")
        elif full_key in secret_keys:
            faults.append(f"{full_key} is encrypted: only {', '.join(SECRETS)} may be; set it without --secret")
        elif key == DEFAULTS:
            wrong = _default_faults(value)
            faults += wrong
            defaults = {} if wrong else value
        else:
            # A text that reads as a number or a truth value is still the text that the user wrote.
            sections[key] = text if known[key].annotation is str and not isinstance(value, (dict, list)) else value
    sections = _merged(defaults.get(str(sections.get("target", Settings().target)), {}), sections)
    valid, wrong = _validated(sections)
    faults += wrong
    settings = Settings().model_copy(update=valid)
    to_come = dict.fromkeys(settings.needed_secrets if secrets_follow else ())
    faults += _contradictions(settings, {**to_come, **secrets}, sections.keys() - valid.keys())
    faults += _of_the_other_target(settings, sections)
    faults += _secret_faults(settings, secrets)
    if faults:
        raise SettingsError(stack, faults)
    return settings


def _validated(sections: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """Return the sections that keep all rules on themselves, and the faults of the others."""
    valid: dict[str, Any] = {}
    faults: list[str] = []
    for key, value in sections.items():
        try:
            one = Settings.model_validate_json(json.dumps({key: value}))
        except ValidationError as error:
            faults += [_sentence(detail) for detail in error.errors()]
        else:
            valid[key] = getattr(one, key)
    return valid, faults


def _default_faults(value: Any) -> list[str]:
    """Return what is wrong with the shape of the defaults; their values are checked as each stack's own."""
    key = f"{PROJECT}:{DEFAULTS}"
    targets = get_args(Settings.model_fields["target"].annotation)
    if not isinstance(value, dict) or not all(isinstance(sections, dict) for sections in value.values()):
        return [f"{key} is not a mapping of {' and '.join(targets)} to settings: it must be one; write the settings below them"]
    faults = [
        f"{key}.{json.dumps(target)[1:-1]} is not a target: {DEFAULTS} has {', '.join(targets)}; correct or remove it"
        for target in value.keys() - set(targets)
    ]
    names = {field.alias or name for name, field in Settings.model_fields.items()} - {"target"}
    return faults + [
        f"{key}.{target}.{json.dumps(name)[1:-1]} is not a setting that can be shared: it must be one of "
        f"{', '.join(sorted(names))}; correct or remove it"
        for target, sections in value.items()
        for name in sorted(sections.keys() - names)
    ]


def _merged(defaults: Any, said: Any) -> Any:
    """Return what a stack says over the defaults, mapping by mapping; a list is taken as a whole."""
    if not isinstance(defaults, dict) or not isinstance(said, dict):
        return said
    return {**defaults, **{key: _merged(defaults.get(key), value) for key, value in said.items()}}


def of_stack() -> Settings:
    """Return the settings of the stack that the engine runs now.

    Raises:
        SettingsError: rules are broken; all of them are listed.
    """
    import pulumi
    from pulumi.runtime import config

    # pulumi.Config answers for one key only; unknown keys are found in the whole map.
    everything = config.CONFIG.get()
    stack = pulumi.get_stack()
    # The engine takes a whole key for encrypted if one part of it is.
    in_plain_text = _keys_in_plain_text(Path(f"Pulumi.{stack}.yaml"))
    secret_keys = {key for key in everything if config.is_config_secret(key) and key not in in_plain_text}
    return load(everything, secret_keys, stack)


def _keys_in_plain_text(file: Path) -> set[str]:
    """Return the keys of a stack's file with a part that is not encrypted."""
    import yaml

    def plain(value: Any) -> bool:
        if isinstance(value, dict):
            return set(value) != {"secure"} and any(plain(part) for part in value.values())
        return True

    if not file.exists():
        return set()
    found = (yaml.safe_load(file.read_text()) or {}).get("config") or {}
    return {key for key, value in found.items() if key.partition(":")[2] in SECRETS and plain(value)}


def _parsed(text: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return text


def _section_at(path: list[str | int]) -> type[BaseModel]:
    """Return the section that a path of keys leads to; steps into a list are numbers."""
    section: type[BaseModel] = Settings
    for step in path:
        if isinstance(step, str):
            fields = {field.alias or name: field for name, field in section.model_fields.items()}
            annotation = fields[step].annotation
            section = next(kind for kind in (annotation, *get_args(annotation)) if _is_section(kind))
    return section


def _is_section(kind: Any) -> TypeGuard[type[BaseModel]]:
    return isinstance(kind, type) and issubclass(kind, BaseModel)


def _sentence(detail: Any) -> str:
    """Put one of pydantic's faults as value, rule and mend."""
    *path, last = detail["loc"]
    last = json.dumps(str(last))[1:-1]  # a key may have anything in it, such as the end of a line
    key = f"{PROJECT}:" + ".".join(json.dumps(str(step))[1:-1] for step in detail["loc"])
    value = json.dumps(detail["input"], default=str)
    value = value if len(value) <= 80 else value[:77] + "..."
    kind = detail["type"]
    if kind == "extra_forbidden":
        section = _section_at(path)
        names = ", ".join(field.alias or name for name, field in section.model_fields.items())
        owner = next(step for step in reversed(path) if isinstance(step, str))
        return f"{key} is not a setting: {owner} has {names}; correct or remove {last}"
    if kind == "literal_error":
        return f"{key} is {value}: it must be {detail['ctx']['expected']}; write one of them"
    if kind == "rule" and isinstance(detail["input"], dict):
        return f"{key}: {detail['msg']}"
    if kind in _TYPE_RULES:
        rule, mend = _TYPE_RULES[kind]
        return f"{key} is {value}: it {rule}; {mend}"
    return f"{key} is {value}: it {detail['msg']}"


def _of_the_other_target(settings: Settings, sections: Mapping[str, Any]) -> list[str]:
    """Return what a stack says of the target that it does not have, or does not say of the one that it has."""
    faults = []

    def says(section: str, key: str) -> bool:
        return isinstance(sections.get(section), dict) and key in sections[section]

    if settings.target == "docker":
        given = ["kubernetes"] if "kubernetes" in sections else []
        given += ["image.nodes"] if settings.image.nodes else []
        given += ["storage.claim"] if says("storage", "claim") else []
        given += ["storage.rbd"] if says("storage", "rbd") else []
        given += ["trust.daemonSet"] if says("trust", "daemonSet") else []
        mend = "set target: kubernetes, or remove it"
    else:
        given = ["container"] if "container" in sections else []
        given += ["storage.volume"] if says("storage", "volume") else []
        given += ["trust.hostsFile"] if says("trust", "hostsFile") else []
        mend = "set target: docker, or remove it"
        if settings.image.push_to is None and not (says("image", "pushTo") or says("image", "nodes")):
            faults.append(
                f"{PROJECT}:image.pushTo is missing: it must name a registry that the nodes can pull from; write one such as "
                "hub.example.com, or list image.nodes"
            )
    other = "kubernetes" if settings.target == "docker" else "docker"
    return faults + [f"{PROJECT}:{key} is set: it must come with target: {other}; {mend}" for key in given]


def _image_contradictions(settings: Settings, secrets: Mapping[str, Any], faulty: set[str]) -> list[str]:
    faults = []
    target = settings.image.push_to
    if target and not faulty & {"image", "hostname", "container"}:
        port = settings.address.rpartition(":")[2]
        names = {settings.hostname, settings.container.address, "localhost"}
        names |= {*settings.certificate.names, *settings.certificate.addresses}
        own = {f"{name}:{port}" for name in names}
        if settings.kubernetes.ingress is not None:
            own.add(f"{settings.kubernetes.ingress.host}:443")
        if target in own or f"{target}:443" in own:
            faults.append(
                f'{PROJECT}:image.pushTo is "{target}": it must be another registry, as a registry\'s own image never '
                "comes from itself; name another one, or leave pushTo out"
            )
    if "image" not in faulty and settings.image.name == settings.image.base:
        faults.append(
            f'{PROJECT}:image.repository is "{settings.image.repository}": with its tag it must differ from image.base, or '
            "the build would overwrite its own base; choose another repository or tag"
        )
    if target and settings.image.nodes:
        faults.append(f"{PROJECT}:image.nodes is set: it must not come with image.pushTo; leave one of them out")
    if "image" not in faulty and "pushCredentials" in secrets and target is None:
        faults.append(f"{PROJECT}:pushCredentials is set: it must come with image.pushTo; set pushTo, or remove it")
    return faults


def _contradictions(settings: Settings, secrets: Mapping[str, Any], faulty: set[str]) -> list[str]:
    """Return what does not go together. Sections that are faulty by themselves have their defaults here and are left out."""
    faults = _image_contradictions(settings, secrets, faulty)
    rbd = settings.storage.rbd
    needed = settings.needed_secrets
    if not faulty & {"image", "storage", "trust"} and ("sshPrivateKey" in needed) != ("sshPrivateKey" in secrets):
        faults.append(
            f"{PROJECT}:sshPrivateKey must be set exactly where image.nodes, storage.rbd.host or trust.hosts is; set it with "
            f"`pulumi config set --secret {PROJECT}:sshPrivateKey <FILE`, or remove it"
        )
    if "storage" not in faulty and "cephKey" in secrets and rbd is None:
        faults.append(f"{PROJECT}:cephKey is set: it must come with storage.rbd; write storage.rbd, or remove it")
    made = f"{settings.kubernetes.name}-images"
    if not faulty & {"storage", "kubernetes"} and settings.storage.claim.existing == made:
        faults.append(
            f'{PROJECT}:storage.claim.existing is "{made}": it must not be the claim that a stack of this name makes, which is '
            "taken up by itself; leave existing out"
        )
    if "access" not in faulty and settings.access.anonymous and "users" in secrets:
        faults.append(f"{PROJECT}:access.anonymous is true: it must be false where there are users; remove users or anonymous")
    if "certificate" not in faulty:
        provided = "providedCertificate" in needed
        if provided and "providedCertificate" not in secrets:
            faults.append(
                f'{PROJECT}:certificate.mode is "provided": it must come with the secret providedCertificate; set it with '
                f"`pulumi config set --secret --path {PROJECT}:providedCertificate.certificate`, .privateKey and .authority"
            )
        if not provided and "providedCertificate" in secrets:
            faults.append(
                f"{PROJECT}:providedCertificate is set: it must come with certificate.mode: provided; set the mode, or remove it"
            )
    if (
        not faulty & {"image", "trust"}
        and settings.trust.daemon_set is not None
        and not (settings.image.push_to or settings.target == "docker")
    ):
        faults.append(
            f"{PROJECT}:trust.daemonSet is set: it must come with image.pushTo, as every node runs the registry's image; set "
            "pushTo, or list the nodes in trust.hosts"
        )
    published = ipaddress.ip_address(settings.container.address)
    if not faulty & {"trust", "container"} and settings.trust.hosts and settings.target == "docker" and published.is_loopback:
        faults.append(
            f'{PROJECT}:trust.hosts is set: container.address must then be one that they reach, not "'
            f"{settings.container.address}\"; write one of the Docker host's, or 0.0.0.0"
        )
    if not faulty & {"trust", "container"} and settings.trust.hosts_file and published.is_unspecified:
        faults.append(
            f'{PROJECT}:trust.hostsFile is true: container.address must then be one address, not "'
            f'{settings.container.address}", as the line names it; write the address, or leave hostsFile out'
        )
    return faults


def _secret_faults(settings: Settings, secrets: Mapping[str, Any]) -> list[str]:
    faults = []
    if "sshPrivateKey" in secrets and not _is_ssh_key(str(secrets["sshPrivateKey"])):
        faults.append(
            f"{PROJECT}:sshPrivateKey cannot be read: it must be a private key without a passphrase; set the file's whole text"
        )
    if "cephKey" in secrets and not CEPH_KEY.fullmatch(str(secrets["cephKey"])):
        faults.append(
            f"{PROJECT}:cephKey cannot be read: it must be a Ceph user's key alone, without the end of a line; set what "
            "`ceph auth print-key client.NAME` prints"
        )
    if "users" in secrets:
        faults += _user_faults(secrets["users"])
    if "pushCredentials" in secrets:
        faults += _text_faults("pushCredentials", secrets["pushCredentials"], ("username", "password"))
    if "providedCertificate" in secrets:
        parts = ("certificate", "privateKey", "authority")
        shape = _text_faults("providedCertificate", secrets["providedCertificate"], parts)
        faults += shape or _certificate_faults(settings, secrets["providedCertificate"])
    return faults


def _is_ssh_key(text: str) -> bool:
    from cryptography.exceptions import UnsupportedAlgorithm
    from cryptography.hazmat.primitives.serialization import load_pem_private_key, load_ssh_private_key

    data = text.strip().encode() + b"\n"
    try:
        (load_ssh_private_key if b"OPENSSH" in data else load_pem_private_key)(data, None)
    except (ValueError, TypeError, UnsupportedAlgorithm):
        return False
    return True


def _user_faults(users: Any) -> list[str]:
    key = f"{PROJECT}:users"
    if not isinstance(users, dict) or not users:
        return [f"{key} is not a mapping of names to passwords: it must have one or more; set it with --path {key}.NAME"]
    faults = []
    for name, password in users.items():
        if not USER_NAME.fullmatch(name):
            faults.append(
                f"{key} has the name {name!r}: it must be 1 to 64 letters, digits, dots, dashes, underscores or @; rename it"
            )
        size = len(password.encode()) if isinstance(password, str) else 0
        if not SHORTEST_PASSWORD <= size <= LONGEST_PASSWORD:
            faults.append(
                f"{key}.{name} has a password of {size} bytes: it must be a text of {SHORTEST_PASSWORD} to "
                f"{LONGEST_PASSWORD} bytes, as bcrypt takes no more; set another"
            )
    return faults


def _text_faults(key: str, value: Any, parts: tuple[str, ...]) -> list[str]:
    """Return faults of a secret that must be a mapping of exactly these parts to texts."""
    if not isinstance(value, dict):
        return [f"{PROJECT}:{key} is not a mapping: it must have {', '.join(parts)}; set each with --path"]
    wrong = [part for part in parts if not isinstance(value.get(part), str) or not value[part].strip()]
    faults = [f"{PROJECT}:{key}.{part} is missing: it must be a text; set it with --secret --path" for part in wrong]
    more = sorted(value.keys() - set(parts))
    return faults + [f"{PROJECT}:{key}.{part} is not a setting: {key} has {', '.join(parts)}; remove it" for part in more]


def _certificate_faults(settings: Settings, provided: Mapping[str, str]) -> list[str]:
    """Return what a client would refuse in a certificate that the user provides."""
    from cryptography import x509
    from cryptography.hazmat.primitives.serialization import load_pem_private_key
    from cryptography.x509 import verification

    key = f"{PROJECT}:providedCertificate"
    parsed: dict[str, Any] = {}
    faults = []
    for part, read in (
        ("certificate", lambda pem: x509.load_pem_x509_certificates(pem)),
        ("authority", lambda pem: x509.load_pem_x509_certificates(pem)),
        ("privateKey", lambda pem: load_pem_private_key(pem, None)),
    ):
        try:
            parsed[part] = read(provided[part].encode())
        except (ValueError, TypeError):
            what = "an unencrypted private key" if part == "privateKey" else "one or more certificates"
            faults.append(f"{key}.{part} cannot be read: it must be {what} in PEM; set the file's whole text")
    if faults:
        return faults
    leaf, *chain = parsed["certificate"]
    if leaf.public_key() != parsed["privateKey"].public_key():
        faults.append(f"{key}.privateKey is of another certificate: it must belong to it; set the key it was made with")
    now = datetime.datetime.now(datetime.UTC)
    if not leaf.not_valid_before_utc <= now <= leaf.not_valid_after_utc:
        faults.append(
            f"{key}.certificate is valid from {leaf.not_valid_before_utc:%Y-%m-%d} to {leaf.not_valid_after_utc:%Y-%m-%d}: "
            "it must be valid today; set a new one"
        )
        return faults
    names = [settings.hostname, *settings.certificate.names, *settings.certificate.addresses]
    for name in names:
        general = x509.IPAddress(ipaddress.ip_address(name)) if _is_address(name) else x509.DNSName(name)
        builder = verification.PolicyBuilder().store(verification.Store(parsed["authority"])).time(now)
        try:
            builder.build_server_verifier(general).verify(leaf, chain)
        except verification.VerificationError as error:
            faults.append(
                f"{key}.certificate is refused for {name}: it must name {name} among its alternative names and lead to the "
                f"authority ({error}); set one that does, with its chain"
            )
    return faults


def stack_file_schema() -> dict[str, Any]:
    """Return the JSON Schema of a stack's file, for editors and for checks without Pulumi."""
    model = Settings.model_json_schema()
    properties = {f"{PROJECT}:{key}": value for key, value in model["properties"].items()}
    for key, description in SECRETS.items():
        properties[f"{PROJECT}:{key}"] = {"description": f"secret: {description}"}
    as_items = json.dumps(model)
    for name, section in model["$defs"].items():
        # What a mapping must have may be in the defaults; a list is taken as a whole.
        if f'"items": {{"$ref": "#/$defs/{name}"}}' not in as_items:
            section.pop("required", None)
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "Stack of the private registry",
        "type": "object",
        "properties": {
            "config": {
                "type": "object",
                "properties": properties,
                "propertyNames": {"pattern": f"^(?!{PROJECT}:)|^{PROJECT}:({'|'.join([*model['properties'], *SECRETS])})$"},
            },
        },
        "$defs": model["$defs"],
    }


if __name__ == "__main__":
    print(json.dumps(stack_file_schema(), indent=2))
