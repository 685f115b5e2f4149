"""The rules of the policy pack. Each looks at a resource's inputs, and yields a sentence for whatever breaks it.

What is not known yet in a preview leaves its part of a resource undecided: the same rule runs again in `pulumi up`.
"""

import base64
import binascii
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar

import pulumi
from pulumi_policy import (
    EnforcementLevel,
    Policy,
    ReportViolation,
    ResourceValidationArgs,
    ResourceValidationPolicy,
    Secret,
    StackValidationArgs,
    StackValidationPolicy,
)
from pulumi_policy import proxy as values
from pulumi_policy.proxy import UnknownValueError

Inputs = Mapping[str, Any]
Part = TypeVar("Part")

UNKNOWN_VALUES = {value for name, value in vars(values).items() if name.startswith("UNKNOWN_")}

PRIVATE_KEY = re.compile(r"-----BEGIN ([A-Z]+ )*PRIVATE KEY-----")
PEM_IN_BASE64 = re.compile(r"LS0tLS1CRUdJTi[A-Za-z0-9+/]+={0,2}")  # -----BEGIN
SECRET_TEXTS = {
    "a private key": PRIVATE_KEY,
    # bcrypt, Apache's own MD5, and crypt's SHA-2
    "a user's password hash": re.compile(r"(?m)^[^\s:]+:(\$2[abxy]\$\d\d\$|\$apr1\$|\$[56]\$)\S+$"),
    "a Ceph key": re.compile(r"(?<![A-Za-z0-9+/])AQ[A-Za-z0-9+/]{36}==(?![A-Za-z0-9+/=])"),
    "a password in a URL": re.compile(r"\b[a-z][a-z0-9+.-]*://[^\s/:@]+:[^\s/@$]+@"),
    "a login of a registry": re.compile(r'"(auth|password)"\s*:\s*"[^"$/{<\s]+"'),
}
# Names whose values are secrets, spelled without anything but letters: an adminPassword, an ADMIN_PASSWORD.
SECRET_NAME = re.compile(
    r"(password|passwd|passphrase|htpasswd|token|secret|credentials?|(private|secret|access|api|ceph)key(pem|openssh)?)$"
)
SECRET_WORD = r"[\w.-]*(?:password|passwd|passphrase|secret|token|(?:private|secret|access|api)[_-]?key)"  # noqa: S105
# What is put in from elsewhere begins with $, a path with /, and neither is the secret.
CLEAR_VALUE = r"""["']?[^\s"'$/{(<>|&;]"""
COMMAND_LINE = re.compile(rf"(?i)(?:^|[\s;&|])(?:{SECRET_WORD}=|--?{SECRET_WORD}[ =]){CLEAR_VALUE}")
BLOCK = r"(?:[|>][-+]?[ \t]*\n[ \t]+)?"  # where YAML has a text below its key
CONFIGURATION_LINE = re.compile(rf"(?im)^[ \t]*[\"']?{SECRET_WORD}[\"']?[ \t]*[:=][ \t]*{BLOCK}{CLEAR_VALUE}")
# The inputs that are command lines, of whatever resource; in a list, one word or one script an item.
COMMAND_LINES = {"create", "update", "delete", "command", "args", "entrypoints", "tests"}

KINDS_WITH_A_POD = {"ReplicationController", "ReplicaSet", "Deployment", "StatefulSet", "DaemonSet", "Job", "PodTemplate"}
# A Job ends, and of a DaemonSet each node has its own: those are evicted without anything being away.
KINDS_THAT_SERVE = {"Pod", "ReplicationController", "ReplicaSet", "Deployment", "StatefulSet"}
REPLICATED_KINDS = KINDS_THAT_SERVE - {"Pod"}
IMAGE_ID = re.compile(r"(sha256:)?[0-9a-f]{64}")
LARGEST_KEY_FILE = 1 << 20
# From 2031 on no fewer: https://nvlpubs.nist.gov/nistpubs/SpecialPublications/NIST.SP.800-57pt1r5.pdf, tables 2 and 4
SHORTEST_RSA = 3072
CURVES = {"P256", "P384", "P521"}
# Also of private authorities: https://support.apple.com/103769
LONGEST_SERVER_DAYS = 825
LONGEST_AUTHORITY_DAYS = 7300
NODE_PORTS = range(30000, 32768)
NOT_IN_IMAGE = "whoever pulls it would have it; take it out, and mount it into the container"
UNPRIVILEGED = "a container must not have its host's rights"
NODE_TRUST = "private-registry:index:NodeTrust$kubernetes:apps/v1:DaemonSet::"


def policy(name: str, rule: str, check: Callable[[ResourceValidationArgs], Iterator[str]]) -> ResourceValidationPolicy:
    """Return the policy of a rule that is about one resource at a time."""

    def validate(resource: ResourceValidationArgs, report: ReportViolation) -> None:
        with suppress(UnknownValueError):
            for violation in check(resource):
                report(violation, resource.urn)

    return ResourceValidationPolicy(name, rule, validate)


def each(parts: Iterable[Part], check: Callable[[Part], Iterator[str]]) -> Iterator[str]:
    """Check part by part, so that one with an unknown value leaves only itself undecided."""
    for part in parts:
        with suppress(UnknownValueError):
            yield from check(part)


def kind_of(resource_type: str) -> str:
    return resource_type.rpartition(":")[2]


def in_production() -> bool:
    """Tell whether the stack, or what it shares with others, says so; settings.py would double what the pack needs to start."""
    config = pulumi.Config("private-registry")
    target = config.get("target") or "docker"
    shared = (config.get_object("defaults") or {}).get(target) or {}
    said = {**(shared.get("environment") or {}), **(config.get_object("environment") or {})}
    return said.get("production") is True


def pod_of(resource: ResourceValidationArgs) -> Inputs:
    """Return the specification of the pods that a Kubernetes resource makes; empty where it makes none."""
    if not resource.resource_type.startswith("kubernetes:"):
        return {}
    kind, inputs = kind_of(resource.resource_type), resource.props
    if kind == "Pod":
        return inputs.get("spec") or {}
    if kind == "PodTemplate":
        return (inputs.get("template") or {}).get("spec") or {}
    controller: Inputs = inputs.get("spec") or {}
    if kind == "CronJob":
        controller = (controller.get("jobTemplate") or {}).get("spec") or {}
    elif kind not in KINDS_WITH_A_POD:
        return {}
    return (controller.get("template") or {}).get("spec") or {}


def containers_of(pod: Inputs) -> Iterator[Inputs]:
    for key in ("initContainers", "containers"):
        yield from pod.get(key) or []


def is_docker_container(resource: ResourceValidationArgs) -> bool:
    return resource.resource_type == "docker:index/container:Container"


# --- Secrets ---------------------------------------------------------------------------------------------------------

# Only a remediation is told what is secret: for a validation the SDK takes the mark off. It comes first, and notes what it sees.
_in_clear: dict[str, list[str]] = {}


def note_clear_secrets(resource: ResourceValidationArgs) -> None:
    """Note what the resource's validation, which comes next, has to refuse; change nothing."""
    _in_clear[resource.urn] = list(clear_secrets(resource.resource_type, resource.props))


def report_clear_secrets(resource: ResourceValidationArgs, report: ReportViolation) -> None:
    for violation in _in_clear.pop(resource.urn, []):
        report(violation, resource.urn)


def clear_secrets(resource_type: str, inputs: Any) -> Iterator[str]:
    """Return a sentence for each secret that stands in clear; its value is in none of them."""
    for path, name, text in clear_texts(inputs):
        what = next((what for what, form in SECRET_TEXTS.items() if any(form.search(one) for one in (text, *decoded(text)))), "")
        # An annotation names a Secret at most, such as an ingress's auth-secret.
        named = names_a_secret(name) and not path.startswith("metadata.annotations.")
        if not what and named and not text.startswith(("/", "$")):
            what = f"the value of {name}"
        if not what and name in COMMAND_LINES and COMMAND_LINE.search(text):
            what = "a password or a key on a command line"
        is_configuration = kind_of(resource_type) == "ConfigMap" or path.startswith("uploads[") or name == "kubeconfig"
        if not what and is_configuration and CONFIGURATION_LINE.search(text):
            what = "a password or a key in a configuration"
        if what:
            yield (
                f"{path} has {what} in clear: it must be a secret, or it is readable in the state and in each preview; give it "
                "as pulumi.Output.secret(...), or take it from config.require_secret(...)"
            )


def names_a_secret(name: str) -> bool:
    return SECRET_NAME.search(re.sub(r"[^a-z]", "", name.lower())) is not None


def clear_texts(value: Any, path: str = "", name: str = "") -> Iterator[tuple[str, str, str]]:
    """Return every text that is not secret, with its path and the name that says what it is."""
    with suppress(TypeError, KeyError, AttributeError):
        value = value["__target"]  # below what takes off the mark of a secret
    if isinstance(value, pulumi.StringAsset):
        value = value.text
    if isinstance(value, Secret):
        return
    if isinstance(value, Mapping):
        said = value.get("name")
        named = said if isinstance(said, str) else name
        for key, item in value.items():
            # {"name": "PASSWORD", "value": "..."}, as a container's environment has it
            yield from clear_texts(item, f"{path}.{key}" if path else key, named if key == "value" else key)
    elif isinstance(value, Sequence) and not isinstance(value, str):
        for index, item in enumerate(value):
            # ["PASSWORD=...", ...]
            assigned = re.match(r"(\w+)=(?=.)", item) if isinstance(item, str) and name == "envs" else None
            text = item[assigned.end() :] if assigned else item
            # ["--password", "..."]
            option = value[index - 1] if index and name in COMMAND_LINES else None
            said_of = option if isinstance(option, str) and names_a_secret(option) else name
            yield from clear_texts(text, f"{path}[{index}]", assigned[1] if assigned else said_of)
    elif isinstance(value, str) and value and value not in UNKNOWN_VALUES:
        yield path, name, value


def decoded(text: str) -> Iterator[str]:
    """Return what a text holds in base64: PEM anywhere in it, or all of it."""
    for encoded in (*PEM_IN_BASE64.findall(text), text):
        with suppress(binascii.Error, UnicodeDecodeError, ValueError):
            yield base64.b64decode(encoded, validate=True).decode()


def keys_in_image(resource: ResourceValidationArgs) -> Iterator[str]:
    if resource.resource_type != "docker:index/image:Image":
        return
    build = resource.props.get("build") or {}
    with suppress(UnknownValueError):
        yield from keys_in_folder(Path(build.get("context") or "."))
    with suppress(UnknownValueError):
        dockerfile = build.get("dockerfile")
        if dockerfile and has_private_key(Path(dockerfile)):
            yield f"build.dockerfile {dockerfile} has a private key: {NOT_IN_IMAGE}"
    for name, value in each_item(build.get("args") or {}):
        if PRIVATE_KEY.search(str(value)) or names_a_secret(name):
            yield f"build.args.{name} is a secret, which the image's history would show: {NOT_IN_IMAGE}"


def keys_in_folder(folder: Path) -> Iterator[str]:
    for file in sorted(folder.rglob("*")):
        if has_private_key(file):
            yield f"build.context {folder} has a private key in {file.relative_to(folder)}: {NOT_IN_IMAGE}"


def has_private_key(file: Path) -> bool:
    if not file.is_file() or file.stat().st_size > LARGEST_KEY_FILE:
        return False
    return PRIVATE_KEY.search(file.read_bytes().decode(errors="replace")) is not None


def each_item(mapping: Inputs) -> Iterator[tuple[str, Any]]:
    """Return the items of a mapping whose values are known."""
    for key in mapping:
        with suppress(UnknownValueError):
            yield key, mapping[key]


# --- Workloads -------------------------------------------------------------------------------------------------------


def one_writer(stack: StackValidationArgs, report: ReportViolation) -> None:
    """Refuse several replicas on one block device. The claims of a stack are other resources, so this is about the whole."""
    claims: dict[tuple[Any, Any], Inputs] = {}
    volumes: dict[Any, Inputs] = {}
    for resource in stack.resources:
        with suppress(UnknownValueError):
            metadata, kind = resource.props.get("metadata") or {}, kind_of(resource.resource_type)
            if kind == "PersistentVolumeClaim":
                claims[namespace_of(metadata), metadata.get("name")] = resource.props.get("spec") or {}
            elif kind == "PersistentVolume":
                volumes[metadata.get("name")] = resource.props.get("spec") or {}

    def devices(resource: Any) -> Iterator[str]:
        controller = resource.props.get("spec") or {}
        if (controller.get("replicas", 1) or 0) <= 1:
            return
        namespace = namespace_of(resource.props.get("metadata") or {})
        pod = (controller.get("template") or {}).get("spec") or {}
        yield from each(pod.get("volumes") or [], lambda volume: device(volume, namespace))

    def device(volume: Inputs, namespace: Any) -> Iterator[str]:
        if is_rbd(volume):
            yield f"the volume {volume.get('name')!r} is an RBD image"
        if "persistentVolumeClaim" not in volume:
            return
        name = volume["persistentVolumeClaim"].get("claimName")
        # What is said of a claim that exists already is not the stack's to know.
        claim = claims.get((namespace, name), {})
        modes = list(claim.get("accessModes") or [])
        if modes and not {"ReadWriteMany", "ReadOnlyMany"} & set(modes):
            yield f"the claim {name!r} is {', '.join(modes)}"
        elif is_rbd(volumes.get(claim.get("volumeName"), {})):
            yield f"the claim {name!r} is bound to an RBD image"

    for resource in stack.resources:
        if resource.resource_type.startswith("kubernetes:") and kind_of(resource.resource_type) in REPLICATED_KINDS:
            with suppress(UnknownValueError):
                for found in devices(resource):
                    report(
                        f"spec.replicas is {resource.props['spec']['replicas']:g}, and {found}: a block device must have one "
                        "writer; write replicas: 1, or give the pods a claim that is ReadWriteMany",
                        resource.urn,
                    )


def namespace_of(metadata: Inputs) -> Any:
    return metadata.get("namespace") or "default"


def is_rbd(source: Inputs) -> bool:
    return "rbd" in source or "rbd.csi" in str((source.get("csi") or {}).get("driver"))


def guaranteed_pods(resource: ResourceValidationArgs) -> Iterator[str]:
    if kind_of(resource.resource_type) in KINDS_THAT_SERVE and in_production():
        yield from each(containers_of(pod_of(resource)), unequal_resources)


def unequal_resources(container: Inputs) -> Iterator[str]:
    resources = container.get("resources") or {}
    limits = resources.get("limits") or {}
    requests = resources.get("requests") or {}
    for what in ("cpu", "memory"):
        limit = limits.get(what)
        request = requests.get(what, limit)
        if limit is None or str(request) != str(limit):
            yield (
                f"the container {container.get('name')!r} requests {what} {request or 'none'} with a limit of {limit or 'none'}: "
                "in production both must be there and equal, so that the pod is Guaranteed, the last to be evicted; write the "
                "same in resources.requests and resources.limits"
            )


def pinned_images(resource: ResourceValidationArgs) -> Iterator[str]:
    parts: Iterable[Inputs] = [resource.props] if is_docker_container(resource) else containers_of(pod_of(resource))
    yield from each(parts, image_without_pin)


def image_without_pin(container: Inputs) -> Iterator[str]:
    image = container.get("image") or ""
    name, _, digest = image.partition("@")
    tag = name.rpartition("/")[2].partition(":")[2]
    if not digest and tag in ("", "latest") and not IMAGE_ID.fullmatch(image):
        yield (
            f"the container {container.get('name')!r} runs {image!r}: it must be pinned by a tag other than latest, or by a "
            "digest; write one such as registry:3.1.2"
        )


def no_privileges(resource: ResourceValidationArgs) -> Iterator[str]:
    if is_docker_container(resource):
        broken = [privileged_container, mounted_from_the_host, added_capabilities]
        yield from each(broken, lambda check: check(resource.props))
        return
    documented = NODE_TRUST in resource.urn  # docs/trust.md says what it is root for
    pod = pod_of(resource)
    for key in ("hostNetwork", "hostPID", "hostIPC"):
        yield from each([key], lambda key: said_true(pod, key, f"spec.{key}"))
    if not documented:
        yield from each(pod.get("volumes") or [], path_of_the_node)
        yield from each([pod], root_user)
    yield from each(containers_of(pod), added_rights)
    if not documented:
        yield from each(containers_of(pod), root_user)


def added_rights(container: Inputs) -> Iterator[str]:
    context = container.get("securityContext") or {}
    yield from each([context], lambda context: said_true(context, "privileged", "securityContext.privileged"))
    yield from added((context.get("capabilities") or {}).get("add"), "securityContext.capabilities.add")


def said_true(inputs: Inputs, key: str, path: str) -> Iterator[str]:
    if inputs.get(key) is True:
        yield f"{path} is true: {UNPRIVILEGED}; leave it out"


def added(capabilities: Sequence[str] | None, path: str) -> Iterator[str]:
    if capabilities:
        yield f"{path} is {', '.join(capabilities)}: {UNPRIVILEGED}; leave it out"


def path_of_the_node(volume: Inputs) -> Iterator[str]:
    if "hostPath" in volume:
        path = volume["hostPath"].get("path")
        yield f"the volume {volume.get('name')!r} is the node's {path}: {UNPRIVILEGED}; use a claim or an emptyDir"


def root_user(inputs: Inputs) -> Iterator[str]:
    if (inputs.get("securityContext") or {}).get("runAsUser") == 0:
        yield f"securityContext.runAsUser is 0, which is root: {UNPRIVILEGED}; write another user, such as 1000"


def privileged_container(inputs: Inputs) -> Iterator[str]:
    yield from said_true(inputs, "privileged", "privileged")
    for key in ("networkMode", "pidMode", "ipcMode"):
        if inputs.get(key) == "host":
            yield f"{key} is host: {UNPRIVILEGED}; leave it out"
    user = inputs.get("user") or ""
    if user.partition(":")[0] in ("0", "root"):
        yield f"user is {user}, which is root: {UNPRIVILEGED}; write another user, such as 1000:1000"


def mounted_from_the_host(inputs: Inputs) -> Iterator[str]:
    for key, source in (("mounts", "source"), ("volumes", "hostPath")):
        for mount in inputs.get(key) or []:
            if str(mount.get(source)).endswith("/docker.sock"):
                yield f"{key} has {mount[source]}, by which the container is root of the host: {UNPRIVILEGED}; leave it out"


def added_capabilities(inputs: Inputs) -> Iterator[str]:
    yield from added((inputs.get("capabilities") or {}).get("adds"), "capabilities.adds")


def node_ports(resource: ResourceValidationArgs) -> Iterator[str]:
    if resource.resource_type == "kubernetes:core/v1:Service":
        yield from each((resource.props.get("spec") or {}).get("ports") or [], node_port_out_of_range)


def node_port_out_of_range(port: Inputs) -> Iterator[str]:
    number = port.get("nodePort")
    if number is not None and number not in NODE_PORTS:
        yield f"nodePort is {number:g}: it must be from 30000 to 32767, the range that clusters have; write one such as 32500"


# --- Certificates ----------------------------------------------------------------------------------------------------


def strong_keys(resource: ResourceValidationArgs) -> Iterator[str]:
    if resource.resource_type != "tls:index/privateKey:PrivateKey":
        return
    algorithm = resource.props.get("algorithm")
    bits = resource.props.get("rsaBits") or 2048  # the provider's default
    curve = resource.props.get("ecdsaCurve") or "P224"
    if algorithm == "RSA" and bits < SHORTEST_RSA:
        yield f"rsaBits is {bits:g}: an RSA key must have {SHORTEST_RSA} bits or more; write rsa_bits=4096"
    if algorithm == "ECDSA" and curve not in CURVES:
        yield f"ecdsaCurve is {curve}: the curve must be one of {', '.join(sorted(CURVES))}; write ecdsa_curve='P256'"


def certificates_that_end(resource: ResourceValidationArgs) -> Iterator[str]:
    if kind_of(resource.resource_type) not in ("SelfSignedCert", "LocallySignedCert"):
        return
    days = resource.props["validityPeriodHours"] / 24
    if resource.props.get("isCaCertificate"):
        if days > LONGEST_AUTHORITY_DAYS:
            yield (
                f"validityPeriodHours is {days:g} days: an authority must end within {LONGEST_AUTHORITY_DAYS} days, which is 20 "
                "years; lower certificate.authorityValidityDays"
            )
    elif "server_auth" in resource.props["allowedUses"] and days > LONGEST_SERVER_DAYS:
        yield (
            f"validityPeriodHours is {days:g} days: a server's certificate must end within {LONGEST_SERVER_DAYS} days, or "
            "Apple's clients refuse it, whoever signed it; lower certificate.validityDays"
        )


# --- Data ------------------------------------------------------------------------------------------------------------


def protected_data(resource: ResourceValidationArgs) -> Iterator[str]:
    if not in_production():
        return
    if holds_data(resource) and not resource.opts.protect:
        yield (
            "protect is false, and the registry's images are in it: in production it must be true, so that nothing deletes them "
            "by mistake; set private-registry:storage.protect: true"
        )
    released = resource.props.get("delete") if is_rbd_image(resource) else None
    if released and "--policy keep" not in released:
        yield (
            f"delete is {released!r}: in production the RBD image must be kept when the stack goes; set "
            "private-registry:storage.onDestroy: keep"
        )


def holds_data(resource: ResourceValidationArgs) -> bool:
    specification = resource.props.get("spec") or {}
    if resource.resource_type == "kubernetes:core/v1:PersistentVolumeClaim":
        return not specification.get("volumeName")  # else the volume has them
    if resource.resource_type == "kubernetes:core/v1:PersistentVolume":
        return specification.get("persistentVolumeReclaimPolicy") == "Delete"
    return resource.resource_type == "docker:index/volume:Volume" or is_rbd_image(resource)


def is_rbd_image(resource: ResourceValidationArgs) -> bool:
    parents = resource.urn.split("::")[2]
    return "private-registry:index:RbdVolume$command:" in parents and resource.name == "volume"


POLICIES: list[Policy] = [
    ResourceValidationPolicy(
        "no-secrets-in-clear",
        "Secrets are given as secrets: no private key, password or token stands in a resource's inputs in clear.",
        report_clear_secrets,
        EnforcementLevel.REMEDIATE,
        remediate=note_clear_secrets,
    ),
    policy("no-keys-in-images", "An image has no private key and no secret in it.", keys_in_image),
    StackValidationPolicy("one-writer", "A block device has one writer.", one_writer),
    policy("guaranteed-pods", "In production pods that serve are Guaranteed.", guaranteed_pods),
    policy("pinned-images", "Containers run pinned images.", pinned_images),
    policy("strong-keys", "Private keys are of today's strength.", strong_keys),
    policy("certificates-end", "Certificates end in time.", certificates_that_end),
    policy("protected-data", "In production what holds the images is protected and kept.", protected_data),
    policy("no-privileges", "Containers have no more rights on their host than an ordinary user.", no_privileges),
    policy("node-ports", "Node ports are in the range that clusters have.", node_ports),
]
