"""Stand-in for the kubernetes plugin: objects of any kind that the API server knows, by their apiVersion and kind.

Source of the rules: pulumi-kubernetes 4.32 to 4.34, provider/pkg/provider/diff.go (what replaces an object),
provider/pkg/await (what is waited for) and provider/pkg/metadata (names and annotations); the API server's own rules:
https://kubernetes.io/docs/reference/using-api/server-side-apply/ and https://kubernetes.io/docs/reference/using-api/api-concepts/.

Helm, Kustomize, YAML files and the Patch kinds are not here. Inputs are not checked against the server's schema: the
server does that itself, in the dry run of a preview too.
"""

import base64
import copy
import hashlib
import json
import os
import re
import secrets
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import quote

import grpc
import yaml
from google.protobuf import empty_pb2

from toolchain.protocol import provider_pb2
from toolchain.providers.base import InitializationError, ProviderError, Reported, ResourceType, Servicer, serve, type_token
from toolchain.providers.values import UNKNOWN, PropertyValue, marked, plain_map, unknown

Object = dict[str, Any]
Steps = tuple[str | int, ...]

MANAGER = "pulumi-kubernetes"
"""The owner of the fields that we set, as the server records it."""
AUTONAMED = "pulumi.com/autonamed"
POLL = 0.5  # seconds between two looks at an object that is waited for
SETTLE = 10  # seconds without a change after which the endpoints of a Service are final
WAIT = 600.0  # seconds, where neither the kind, an annotation nor the resource's options say otherwise
NAMESPACE = "default"

ABSENT = object()

# --- What replaces an object -----------------------------------------------------------------------------------------

VOLUME_SOURCES = (
    "awsElasticBlockStore azureDisk azureFile cephfs cinder csi fc flexVolume flocker gcePersistentDisk glusterfs "
    "hostPath iscsi local nfs photonPersistentDisk portworxVolume quobyte rbd scaleIO storageos vsphereVolume"
)
CONTAINER = (
    "args command env image imagePullPolicy lifecycle livenessProbe ports readinessProbe resources securityContext "
    "stdin stdinOnce terminationMessagePath terminationMessagePolicy tty volumeDevices volumeMounts workingDir"
)
POD = (
    "affinity automountServiceAccountToken dnsConfig dnsPolicy enableServiceLinks hostAliases hostIPC hostNetwork "
    "hostPID hostname imagePullSecrets nodeName nodeSelector overhead preemptionPolicy priority priorityClassName "
    "readinessGates restartPolicy runtimeClassName schedulerName securityContext serviceAccount serviceAccountName "
    "shareProcessNamespace subdomain terminationGracePeriodSeconds volumes"
)


def _rules(prefix: str, names: str) -> frozenset[tuple[str, ...]]:
    return frozenset((*prefix.split(), name) for name in names.split())


FORCE_NEW: Mapping[str, frozenset[tuple[str, ...]]] = {
    # `immutable` cannot be taken back, and the server then refuses new data: only a new object gets through.
    "ConfigMap": _rules("", "data binaryData immutable"),
    "Secret": _rules("", "data stringData binaryData immutable type"),
    "Service": _rules("spec", "clusterIP"),
    "PersistentVolume": _rules("spec", VOLUME_SOURCES),
    "PersistentVolumeClaim": _rules("spec", "accessModes selector storageClassName volumeName"),
    "Pod": _rules("spec", POD) | _rules("spec containers", CONTAINER) | _rules("spec initContainers", CONTAINER),
    "ResourceQuota": _rules("spec", "scopes"),
    "apps/DaemonSet": _rules("spec", "selector"),
    "apps/Deployment": _rules("spec", "selector"),
    "apps/StatefulSet": _rules("spec", "podManagementPolicy revisionHistoryLimit selector serviceName volumeClaimTemplates"),
    "batch/Job": _rules("spec", "completions parallelism selector template"),
    "rbac.authorization.k8s.io/ClusterRoleBinding": _rules("", "roleRef"),
    "rbac.authorization.k8s.io/RoleBinding": _rules("", "roleRef"),
    "storage.k8s.io/StorageClass": _rules("", "parameters provisioner"),
}
"""Fields by kind whose change needs a new object; those of the core group have no group in their name."""
FORCE_NEW_EVERYWHERE = _rules("metadata", "name namespace") | {("kind",)}

CLUSTER_SCOPED = frozenset(
    {
        "Namespace",
        "Node",
        "PersistentVolume",
        "admissionregistration.k8s.io/MutatingWebhookConfiguration",
        "admissionregistration.k8s.io/ValidatingAdmissionPolicy",
        "admissionregistration.k8s.io/ValidatingAdmissionPolicyBinding",
        "admissionregistration.k8s.io/ValidatingWebhookConfiguration",
        "apiextensions.k8s.io/CustomResourceDefinition",
        "apiregistration.k8s.io/APIService",
        "certificates.k8s.io/CertificateSigningRequest",
        "flowcontrol.apiserver.k8s.io/FlowSchema",
        "flowcontrol.apiserver.k8s.io/PriorityLevelConfiguration",
        "networking.k8s.io/IngressClass",
        "node.k8s.io/RuntimeClass",
        "rbac.authorization.k8s.io/ClusterRole",
        "rbac.authorization.k8s.io/ClusterRoleBinding",
        "scheduling.k8s.io/PriorityClass",
        "storage.k8s.io/CSIDriver",
        "storage.k8s.io/CSINode",
        "storage.k8s.io/StorageClass",
        "storage.k8s.io/VolumeAttachment",
    }
)
"""Kinds without a namespace, for a check that must do without a server."""


@dataclass(frozen=True)
class Change:
    """One place where new inputs differ from old ones."""

    steps: Steps
    operation: str
    value: Any
    """What was added or deleted."""

    @property
    def path(self) -> str:
        """Spell the place as the engine does, such as ``spec.containers[0].image``."""
        text = ""
        for step in self.steps:
            if isinstance(step, int):
                text += f"[{step}]"
            elif re.fullmatch(r"\w+", step):
                text += f".{step}" if text else step
            else:
                text += f"[{json.dumps(step)}]"
        return text

    def replaces(self, kind: str) -> bool:
        """Tell whether this change needs a new object of the kind (``Service``, ``batch/Job``)."""
        names = tuple(step for step in self.steps if isinstance(step, str))
        for rule in FORCE_NEW_EVERYWHERE | FORCE_NEW.get(kind, frozenset()):
            if names[: len(rule)] == rule:
                return True
            above = rule[: len(names)] == names and self.operation != "UPDATE"
            if above and _holds(self.value, rule[len(names) :]):
                return True
        return False


def _holds(value: Any, names: Sequence[str]) -> bool:
    if not names:
        return True
    if isinstance(value, list):
        return any(_holds(item, names) for item in value)
    return isinstance(value, Mapping) and names[0] in value and _holds(value[names[0]], names[1:])


def changes(old: Any, new: Any, steps: Steps = ()) -> Iterator[Change]:
    """Yield where two plain values differ. What is not known yet differs from everything."""
    if isinstance(old, Mapping) and isinstance(new, Mapping):
        for key in sorted(old.keys() | new.keys()):
            yield from changes(old.get(key, ABSENT), new.get(key, ABSENT), (*steps, key))
    elif isinstance(old, list) and isinstance(new, list):
        for index in range(max(len(old), len(new))):
            before = old[index] if index < len(old) else ABSENT
            after = new[index] if index < len(new) else ABSENT
            yield from changes(before, after, (*steps, index))
    elif old is ABSENT:
        yield Change(steps, "ADD", new)
    elif new is ABSENT:
        yield Change(steps, "DELETE", old)
    elif unknown(new) or old != new:
        yield Change(steps, "UPDATE", new)


def object_changes(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[Change]:
    """Return the changes of an object's inputs. To name the default namespace is no change."""
    found = list(changes(old, new))
    if namespace_of(old) == namespace_of(new):
        found = [change for change in found if change.steps != ("metadata", "namespace")]
    return found


# --- Names -----------------------------------------------------------------------------------------------------------


def kind_of(inputs: Mapping[str, Any]) -> str:
    """Return the kind with its group, without the version, such as ``batch/Job``; the core group has no name."""
    group, _, _ = inputs["apiVersion"].rpartition("/")
    return f"{group}/{inputs['kind']}" if group else str(inputs["kind"])


def known_metadata(inputs: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the metadata, or nothing while they are not known."""
    metadata = inputs.get("metadata")
    return metadata if isinstance(metadata, Mapping) else {}


def namespace_of(inputs: Mapping[str, Any]) -> Any:
    """Return the namespace, which may be not known yet."""
    return known_metadata(inputs).get("namespace") or NAMESPACE


def annotation(inputs: Mapping[str, Any], name: str) -> str | None:
    """Return the value of one of Pulumi's own annotations."""
    annotations = known_metadata(inputs).get("annotations")
    value = annotations.get(f"pulumi.com/{name}") if isinstance(annotations, Mapping) else None
    return value if isinstance(value, str) else None


def identifier_of(live: Mapping[str, Any]) -> str:
    """Return the resource's identifier: ``namespace/name``, or ``name``."""
    metadata = live["metadata"]
    return f"{metadata['namespace']}/{metadata['name']}" if metadata.get("namespace") else str(metadata["name"])


def split_identifier(identifier: str) -> tuple[str | None, str]:
    """Return the namespace, if any, and the name."""
    namespace, _, name = identifier.rpartition("/")
    return namespace or None, name


def described(live: Mapping[str, Any]) -> str:
    """Name an object in a sentence."""
    return f"{live['kind']} {identifier_of(live)}"


def kind_of_token(token: str) -> tuple[str, str]:
    """Return the apiVersion and the kind that a type token stands for; ``core`` is the group without a name."""
    _, api_version, kind = token.split(":", 2)
    return api_version.removeprefix("core/"), kind


def autonamed(
    logical_name: str, old: Mapping[str, PropertyValue], new: Mapping[str, PropertyValue], seed: bytes
) -> dict[str, PropertyValue]:
    """Give an object without a name one of its own, or the one that it got at an earlier check."""
    metadata = new.get("metadata", PropertyValue({}))
    fields = _mapping(metadata)
    named = fields is not None and ("name" in fields or "generateName" in fields)
    if fields is None or named:
        return dict(new)
    before = plain_map(old)
    name = known_metadata(before).get("name") if annotation(before, "autonamed") == "true" else None
    if not isinstance(name, str):
        digits = hashlib.sha256(seed).hexdigest()[:8] if seed else secrets.token_hex(4)
        name = f"{logical_name}-{digits}"
    named_fields = {**fields, "name": PropertyValue(name)}
    annotations = fields.get("annotations", PropertyValue({}))
    if (marks := _mapping(annotations)) is not None:
        named_fields["annotations"] = _with(annotations, {**marks, AUTONAMED: PropertyValue("true")})
    return {**new, "metadata": _with(metadata, named_fields)}


def _mapping(value: PropertyValue) -> Mapping[str, PropertyValue] | None:
    inner = value.value
    if inner is None:
        return {}
    return inner if isinstance(inner, Mapping) else None


def _with(original: PropertyValue, fields: Mapping[str, PropertyValue]) -> PropertyValue:
    return PropertyValue(dict(fields), is_secret=original.is_secret)


# --- Values ----------------------------------------------------------------------------------------------------------


def with_secrets(value: Any, pattern: PropertyValue | None) -> PropertyValue:
    """Return a plain value as the engine's, secret wherever the input at the same place is."""
    if pattern is None or not pattern.contains_secret():
        return marked(value)
    inner = pattern.value
    if not pattern.is_secret and isinstance(inner, Mapping) and isinstance(value, Mapping):
        return PropertyValue({key: with_secrets(item, inner.get(key)) for key, item in value.items()})
    same = isinstance(inner, list) and isinstance(value, list) and len(inner) == len(value)
    if not pattern.is_secret and same:
        return PropertyValue([with_secrets(item, part) for item, part in zip(value, inner, strict=True)])
    return marked(value, secret=True)  # a list that the server has changed: one of its items may be the secret one


def outputs_of(live: Mapping[str, Any], inputs: Mapping[str, PropertyValue]) -> dict[str, PropertyValue]:
    """Return a live object as outputs. The data of a Secret are secret, whoever wrote them."""
    made = {key: with_secrets(value, inputs.get(key)) for key, value in live.items()}
    if live.get("kind") == "Secret":
        made.update({key: marked(live[key], secret=True) for key in ("data", "stringData") if key in live})
    return made


def only_inputs(live: Any, inputs: Any) -> Any:
    """Return what a live object has at the places that are inputs, so that what others add is no drift."""
    if isinstance(inputs, Mapping) and isinstance(live, Mapping):
        kept = {}
        for key, value in inputs.items():
            if key in live:
                kept[key] = only_inputs(live[key], value)
            elif not value:  # the server leaves fields out that are empty, zero or false
                kept[key] = value
        return kept
    if isinstance(inputs, list) and isinstance(live, list) and len(inputs) == len(live):
        return [only_inputs(item, value) for item, value in zip(live, inputs, strict=True)]
    return live


def refreshed_inputs(live: Mapping[str, Any], inputs: Mapping[str, Any]) -> Object:
    """Return the inputs as the live object has them; for an import, which has none yet, all that a user may set."""
    if not inputs:
        made = {"creationTimestamp", "generation", "managedFields", "resourceVersion", "selfLink", "uid"}
        metadata = {key: value for key, value in live["metadata"].items() if key not in made}
        return {**{key: value for key, value in live.items() if key != "status"}, "metadata": metadata}
    found = dict(live)
    if live.get("kind") == "Secret" and isinstance(inputs.get("stringData"), Mapping):
        # The server keeps stringData as part of data only.
        data = live.get("data") or {}
        found["stringData"] = {key: base64.b64decode(data[key]).decode() for key in inputs["stringData"] if key in data}
    result: Object = only_inputs(found, inputs)
    return result


def merge_patch(old: Any, new: Any) -> Any:
    """Return the JSON merge patch (RFC 7386) from old inputs to new ones."""
    if not (isinstance(old, Mapping) and isinstance(new, Mapping)):
        return new
    removed = {key: None for key in old if key not in new}
    return removed | {key: merge_patch(old.get(key), value) for key, value in new.items() if old.get(key) != value}


# --- Conditions ------------------------------------------------------------------------------------------------------

STEP = re.compile(
    r"""\.(?P<name>(?:\\.|[^.\[\]\\])+)
    |\[(?P<index>-?\d+)\]
    |\[(?P<every>\*)\]
    |\[(?P<quote>['"])(?P<key>.+?)(?P=quote)\]
    |\[\?\(@(?P<field>(?:\.[\w-]+)+)\s*==\s*['"](?P<value>[^'"]*)['"]\)\]""",
    re.VERBOSE,
)
"""One step of a JSONPath as kubectl spells it: https://kubernetes.io/docs/reference/kubectl/jsonpath/."""


def jsonpath(path: str) -> Callable[[Any], list[Any]]:
    """Return a function that finds what a JSONPath such as ``.status.conditions[?(@.type=="Ready")].status`` names."""
    steps = []
    position = 0
    while position < len(path):
        match = STEP.match(path, position)
        if match is None:
            raise ValueError(f"{path[position:]!r} is no JSONPath step that the stand-in plugin knows")
        steps.append(match)
        position = match.end()

    def find(value: Any) -> list[Any]:
        found = [value]
        for step in steps:
            found = [item for parent in found for item in _children(parent, step)]
        return found

    return find


def _children(parent: Any, step: re.Match[str]) -> list[Any]:
    if step["every"] or step["name"] == "*":
        return list(parent.values()) if isinstance(parent, Mapping) else list(parent) if isinstance(parent, list) else []
    if step["field"]:
        wanted = jsonpath(step["field"])
        items = parent if isinstance(parent, list) else []
        return [item for item in items if step["value"] in [_text(value) for value in wanted(item)]]
    if step["index"]:
        index = int(step["index"])
        return parent[index:][:1] if isinstance(parent, list) and -len(parent) <= index < len(parent) else []
    key = step["key"] or re.sub(r"\\(.)", r"\1", step["name"])
    return [parent[key]] if isinstance(parent, Mapping) and key in parent else []


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def _status(live: Mapping[str, Any], key: str) -> Any:
    return (live.get("status") or {}).get(key)  # the server spells what is not there yet as null, too


def condition(text: str) -> Callable[[Mapping[str, Any]], str | None]:
    """Return a function that says what an object still misses for one ``pulumi.com/waitFor`` expression, or None."""
    if match := re.fullmatch(r"condition=([^=]+)(?:=(.+))?", text):
        kind, wanted = match[1].lower(), match[2] or "True"

        def state(live: Mapping[str, Any]) -> list[Any]:
            conditions = _status(live, "conditions") or []
            return [item.get("status") for item in conditions if str(item.get("type")).lower() == kind]

        def unmet_condition(live: Mapping[str, Any]) -> str | None:
            now = state(live)
            return None if [str(item).lower() for item in now] == [wanted.lower()] else _missing(text, now)

        return unmet_condition
    if match := re.fullmatch(r"jsonpath=\{(.+)\}(?:=(.*))?", text):
        find, value = jsonpath(match[1]), match[2]

        def unmet_path(live: Mapping[str, Any]) -> str | None:
            now = find(live)
            met = bool(now) if value is None else [_text(item) for item in now] == [value.strip("'\"")]
            return None if met else _missing(text, now)

        return unmet_path
    raise ValueError(f"expected jsonpath={{.path}}=value or condition=Type, got {text!r}")


def _missing(text: str, now: Sequence[Any]) -> str:
    return f"{text} (now {', '.join(map(_text, now)) or 'absent'})"


def conditions(text: str) -> Callable[[Mapping[str, Any]], str | None]:
    """Return the same for the whole annotation: one expression, or a JSON list of which all must hold."""
    expressions = json.loads(text) if text.lstrip().startswith("[") else [text]
    if not expressions or not all(isinstance(expression, str) for expression in expressions):
        raise ValueError(f"expected one condition or a JSON list of conditions, got {text!r}")
    parts = [condition(expression) for expression in expressions]
    return lambda live: next((unmet for part in parts if (unmet := part(live))), None)


# --- The API server --------------------------------------------------------------------------------------------------


class ApiError(ProviderError):
    """The server's answer to a request that it did not carry out."""

    def __init__(self, status: int, reason: str, message: str) -> None:
        super().__init__(message)
        self.status = status
        self.reason = reason


class UnreachableError(ProviderError):
    """No server answered, or none is known."""


@dataclass
class Cluster:
    """The API server that the provider's configuration names, and what one asks of it."""

    kubeconfig: Any = None
    """A path or the contents; without it KUBECONFIG or ~/.kube/config counts."""
    context: str | None = None
    namespace: str | None = None
    server_side_apply: bool = True
    upsert: bool = False
    """Take an object that exists already for the one that is to be created."""
    _client: Any = None
    _kinds: dict[str, dict[str, tuple[str, bool]]] = field(default_factory=dict)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    @classmethod
    def configured(cls, arguments: Mapping[str, Any]) -> "Cluster":
        """Return the cluster for a provider's inputs, whose booleans may be spelled as strings."""
        apply = str(arguments.get("enableServerSideApply", True)).lower() != "false"
        upsert = str(arguments.get("upsertExistingObjects", False)).lower() == "true"
        return cls(arguments.get("kubeconfig"), arguments.get("context"), arguments.get("namespace"), apply, upsert)

    def default_namespace(self) -> str:
        """Return the namespace of the provider, of the kubeconfig's context, or ``default``."""
        if isinstance(self.namespace, str):
            return self.namespace
        return str(self._active("contexts", "context").get("namespace") or NAMESPACE)

    def address(self) -> str | None:
        """Return the server's address as the kubeconfig has it."""
        server = self._active("clusters", "cluster").get("server")
        return str(server) if server else None

    def _active(self, section: str, key: str) -> Mapping[str, Any]:
        """Return what the current context names in a section of the kubeconfig; nothing where there is none."""
        with suppress(OSError, yaml.YAMLError, AttributeError, TypeError, KeyError, StopIteration):
            files = [file for file in self._configurations() if file]
            name = self.context or next(file["current-context"] for file in files if file.get("current-context"))

            def entry(section: str, key: str, name: str) -> Mapping[str, Any]:
                entries = (item for file in files for item in file.get(section) or [])
                found: Mapping[str, Any] = next(item[key] for item in entries if item["name"] == name) or {}
                return found

            context = entry("contexts", "context", name)
            return context if section == "contexts" else entry(section, key, context[key])
        return {}

    def _configurations(self) -> Iterator[Any]:
        if self._contents() is not None:
            yield self._contents()
            return
        default = os.environ.get("KUBECONFIG") or "~/.kube/config"
        for name in (self.kubeconfig or default).split(os.pathsep):
            if (path := Path(name).expanduser()).is_file():
                yield yaml.safe_load(path.read_text())

    def _contents(self) -> Any:
        """Return the kubeconfig where the provider has its contents: no path has a line break or a brace."""
        text = self.kubeconfig
        return yaml.safe_load(text) if isinstance(text, str) and ("\n" in text or text.startswith("{")) else None

    def client(self) -> Any:
        """Return the client, connected to nothing yet."""
        with self._lock:
            if self._client is None:
                self._client = self._connect()
        return self._client

    def _connect(self) -> Any:
        if self.kubeconfig is UNKNOWN:
            raise UnreachableError("the provider's kubeconfig is not known yet")
        # An import of half a second, which checks and diffs do without.
        import urllib3
        from kubernetes import client, config

        configuration = client.Configuration()
        configuration.retries = urllib3.Retry(total=3, connect=1, backoff_factor=0.2)
        configuration.connection_pool_maxsize = 32  # as many as the plugin has threads
        try:
            if (contents := self._contents()) is not None:
                config.load_kube_config_from_dict(contents, self.context, configuration, persist_config=False)
            else:
                file = self.kubeconfig and str(Path(self.kubeconfig).expanduser())
                config.load_kube_config(file, self.context, configuration, persist_config=False)
        except (config.ConfigException, OSError, yaml.YAMLError) as error:
            raise UnreachableError(f"no Kubernetes API server is known: {error}") from None
        return client.ApiClient(configuration)

    def request(
        self,
        method: str,
        path: str,
        body: Any = None,
        query: Mapping[str, str] | None = None,
        content_type: str = "application/json",
    ) -> Any:
        """Carry out one request, and return its answer."""
        api = self.client()
        import urllib3
        from kubernetes.client import ApiException

        try:
            return api.call_api(
                path,
                method,
                query_params=list((query or {}).items()),
                header_params={"Accept": "application/json", "Content-Type": content_type},
                body=body,
                auth_settings=["BearerToken"],
                response_type="object",
                _return_http_data_only=True,
                _request_timeout=(5, 60),
            )
        except ApiException as error:
            if not error.status:  # the library's name for a failed TLS handshake
                raise self._unreachable(error.reason) from None
            raise _api_error(error.status, error.reason, error.body) from None
        except (urllib3.exceptions.HTTPError, OSError) as error:
            raise self._unreachable(getattr(error, "reason", None) or error) from None

    def _unreachable(self, cause: Any) -> UnreachableError:
        reason = str(cause).rsplit(">: ", 1)[-1].removeprefix("Failed to establish a new connection: ")
        return UnreachableError(f"the Kubernetes API server at {self.client().configuration.host} does not answer: {reason}")

    def path(self, api_version: str, kind: str, namespace: str | None, name: str | None = None) -> str:
        """Return the path of an object, or of its collection."""
        root = f"/apis/{api_version}" if "/" in api_version else f"/api/{api_version}"
        plural, namespaced = self._lookup(root, api_version, kind)
        if namespaced:
            root += f"/namespaces/{quote(namespace or NAMESPACE, safe='')}"
        return f"{root}/{plural}/{quote(name, safe='')}" if name else f"{root}/{plural}"

    def _lookup(self, root: str, api_version: str, kind: str) -> tuple[str, bool]:
        known = self._kinds.get(root, {})
        if kind not in known:  # also where a definition came later
            with suppress(_NotFound):
                resources = self.request("GET", root)["resources"]
                known = {item["kind"]: (item["name"], item["namespaced"]) for item in resources if "/" not in item["name"]}
                self._kinds[root] = known
        if kind not in known:
            raise _NotFound(404, "NotFound", f"the Kubernetes API server knows no kind {kind} in {api_version}")
        return known[kind]

    def get(self, inputs: Mapping[str, Any], identifier: str) -> Object:
        """Return a live object of the kind that inputs or outputs tell."""
        path = self.path(inputs["apiVersion"], inputs["kind"], *split_identifier(identifier))
        live: Object = self.request("GET", path)
        return live

    def items(self, kind: str, namespace: str, **query: str) -> list[Object]:
        """Return objects of the core group."""
        found = self.request("GET", self.path("v1", kind, namespace), query=query)["items"]
        return [{"apiVersion": "v1", "kind": kind, **item} for item in found]


class _NotFound(ApiError):  # noqa: N818
    """The object, its kind or its namespace is not there."""


def _api_error(status: int, reason: str, body: Any) -> ApiError:
    try:
        answer = json.loads(body)
        reason, message = answer.get("reason", reason), answer["message"]
    except (ValueError, TypeError, KeyError, AttributeError):
        message = f"{status} {reason}"
    return (_NotFound if status == 404 else ApiError)(status, reason, message)


# --- Waiting ---------------------------------------------------------------------------------------------------------


class FailedError(Exception):
    """What was waited for cannot happen any more."""


def _equal(one: str, other: str) -> Callable[[Mapping[str, Any]], str | None]:
    find_one, find_other = jsonpath(one), jsonpath(other)

    def unmet(live: Mapping[str, Any]) -> str | None:
        left, right = find_one(live), find_other(live)
        return None if left and left == right else f"{one[1:]} = {other[1:]} ({_now(left)} of {_now(right)})"

    return unmet


def _now(found: Sequence[Any]) -> str:
    return _text(found[0]) if found else "none"


def _rolled_out(total: str, parts: Sequence[str]) -> Callable[[Mapping[str, Any]], str | None]:
    wanted = [_equal(".status.observedGeneration", ".metadata.generation"), *(_equal(part, total) for part in parts)]
    return lambda live: next((unmet for part in wanted if (unmet := part(live))), None)


def _job(live: Mapping[str, Any]) -> str | None:
    for item in _status(live, "conditions") or []:
        if item["type"] == "Failed" and item["status"] == "True":
            raise FailedError(f"the Job failed: {item.get('reason')}: {item.get('message')}")
    return condition("condition=Complete")(live)


def _pod(live: Mapping[str, Any]) -> str | None:
    return None if _status(live, "phase") == "Succeeded" else condition("condition=Ready")(live)


def _volume(live: Mapping[str, Any]) -> str | None:
    phase = _status(live, "phase")
    return None if phase in {"Available", "Bound"} else f"phase Available or Bound (now {phase})"


BUILT_IN: Mapping[str, tuple[Callable[[Mapping[str, Any]], str | None], float | None]] = {
    "ReplicationController": (_equal(".status.availableReplicas", ".spec.replicas"), 600.0),
    "PersistentVolume": (_volume, 300.0),
    "Pod": (_pod, None),
    "batch/Job": (_job, None),
    "apps/Deployment": (
        _rolled_out(".spec.replicas", [".status.replicas", ".status.updatedReplicas", ".status.availableReplicas"]),
        None,
    ),
    "apps/StatefulSet": (_rolled_out(".spec.replicas", [".status.updatedReplicas", ".status.readyReplicas"]), None),
    "apps/DaemonSet": (
        _rolled_out(".status.desiredNumberScheduled", [".status.updatedNumberScheduled", ".status.numberReady"]),
        None,
    ),
    # So that objects of the new kind can follow.
    "apiextensions.k8s.io/CustomResourceDefinition": (condition("condition=Established"), None),
}
"""What is waited for without ``pulumi.com/waitFor``, and its own limit in seconds, which nothing changes."""


@dataclass
class Waiting:
    """One wait for an object; the engine's cancellation ends it."""

    cluster: Cluster
    stop: threading.Event
    inputs: Mapping[str, Any]
    timeout: float
    """The resource's own option in seconds, 0 without one."""

    def limit(self) -> float:
        """Return the seconds that the options, the annotation or the default give."""
        text = annotation(self.inputs, "timeoutSeconds") or ""
        return self.timeout or (float(text) if text.isdecimal() else WAIT)

    def ready(self, live: Object) -> Object:
        """Return the object once it is ready. Where it does not get there the object stays in the state."""
        if annotation(self.inputs, "skipAwait") == "true":
            return live
        unmet, seconds = self._condition(live)
        if unmet is None:
            return live
        seconds = self.limit() if seconds is None else seconds
        identifier, deadline = identifier_of(live), time.monotonic() + seconds
        try:
            while missing := unmet(live):
                self._pause(missing, deadline, seconds)
                with suppress(UnreachableError):  # a server that restarts is back before the limit
                    live = self.cluster.get(live, identifier)
        except Exception as error:  # noqa: BLE001  (the object exists: no error may keep it out of the state)
            gone = f"it was deleted meanwhile ({error})" if isinstance(error, _NotFound) else str(error)
            reason = f"{described(live)} was written, but did not become ready: {gone}"
            # Of what an annotation waits for, the official plugin says no more than that it did not come.
            diagnosis = [] if annotation(self.inputs, "waitFor") else self._diagnosis(live)
            raise InitializationError(identifier, live, ["\n".join([reason, *diagnosis])]) from None
        return live

    def _pause(self, missing: str, deadline: float, seconds: float) -> None:
        if time.monotonic() > deadline:
            raise FailedError(f"{missing} was not met within {seconds:g} s")
        if self.stop.wait(POLL):
            raise FailedError(f"the wait for {missing} was cancelled")

    def _condition(self, live: Object) -> tuple[Callable[[Mapping[str, Any]], str | None] | None, float | None]:
        if text := annotation(self.inputs, "waitFor"):
            return conditions(text), None
        kind = kind_of(live)
        if kind == "Service":
            return self._service(live), None
        if kind == "PersistentVolumeClaim":
            return self._claim, 300.0
        return BUILT_IN.get(kind, (None, None))

    def _claim(self, live: Mapping[str, Any]) -> str | None:
        phase = _status(live, "phase")
        wanted = "Pending" if self._binds_late(live) else "Bound"
        return None if phase in {wanted, "Bound"} else f"phase {wanted} (now {phase})"

    def _binds_late(self, live: Mapping[str, Any]) -> bool:
        name = live["spec"].get("storageClassName")
        if not name:
            return False
        try:
            found = self.cluster.get({"apiVersion": "storage.k8s.io/v1", "kind": "StorageClass"}, name)
        except (ApiError, UnreachableError):  # a class need not exist, and not everyone may read it
            return False
        return bool(found.get("volumeBindingMode") == "WaitForFirstConsumer")

    def _service(self, live: Object) -> Callable[[Mapping[str, Any]], str | None] | None:
        """Wait until the endpoints rest. None at all are fine, since the pods may come after their Service."""
        spec = live["spec"]
        if spec.get("clusterIP") == "None" or spec.get("type") == "ExternalName" or not spec.get("selector"):
            return None
        rest = min(SETTLE, self.limit())  # at the limit ready endpoints count, however new they are
        seen: Any = None
        since = time.monotonic()

        def unmet(now: Mapping[str, Any]) -> str | None:
            nonlocal seen, since
            if spec.get("type") == "LoadBalancer" and not (_status(now, "loadBalancer") or {}).get("ingress"):
                return "an address of the load balancer"
            try:
                subsets = self.cluster.get({"apiVersion": "v1", "kind": "Endpoints"}, identifier_of(now)).get("subsets")
            except (_NotFound, UnreachableError):
                subsets = None
            if (subsets or []) != seen:
                seen, since = subsets or [], time.monotonic()
            waiting = sum(len(subset.get("notReadyAddresses") or []) for subset in seen)
            if waiting:
                return f"readiness of all its pods ({waiting} not ready)"
            return None if time.monotonic() - since >= rest else f"{rest:g} s without a change of its endpoints"

        return unmet

    def gone(self, live: Object, identifier: str) -> None:
        """Return once the object is gone."""
        seconds, deleted = self.limit(), live["metadata"].get("uid")
        deadline = time.monotonic() + seconds
        while True:
            with suppress(UnreachableError):
                try:
                    live = self.cluster.get(live, identifier)
                except _NotFound:
                    return
                if live["metadata"].get("uid") != deleted:  # another one has taken the name
                    return
            holders = ", ".join(live["metadata"].get("finalizers", [])) or "none"
            if time.monotonic() > deadline:
                raise ProviderError(f"{described(live)} is still there after {seconds:g} s; its finalizers: {holders}")
            if self.stop.wait(POLL):
                raise ProviderError(f"{described(live)}: the wait for its end was cancelled; its finalizers: {holders}")

    def _diagnosis(self, live: Object) -> list[str]:
        """Return a line for each of the object's pods, for what its containers wait for, and for each last warning."""
        namespace = live["metadata"].get("namespace")
        if not namespace:
            return []
        lines = []
        with suppress(ProviderError):
            pods = [live] if live["kind"] == "Pod" else self._pods(live, namespace)
            for pod in pods:
                lines += _pod_lines(pod)
            for owner in [live, *(pod for pod in pods if pod is not live)]:
                lines += self._warnings(owner, namespace)
        return lines

    def _pods(self, live: Object, namespace: str) -> list[Object]:
        selector = live.get("spec", {}).get("selector") or {}
        labels = selector.get("matchLabels", selector)
        text = ",".join(f"{key}={value}" for key, value in labels.items() if isinstance(value, str))
        return self.cluster.items("Pod", namespace, labelSelector=text) if text else []

    def _warnings(self, live: Object, namespace: str) -> list[str]:
        uid = live["metadata"].get("uid", "")
        events = self.cluster.items("Event", namespace, fieldSelector=f"involvedObject.uid={uid},type=Warning")
        events.sort(key=lambda event: event.get("lastTimestamp") or event.get("eventTime") or "")
        lines = [
            f"{described(live)}: {event.get('reason')} (x{event.get('count') or 1}): {event.get('message', '').strip()}"
            for event in events[-5:]
        ]
        return list(dict.fromkeys(lines))


def _pod_lines(pod: Object) -> list[str]:
    status = pod.get("status") or {}
    lines = [f"{described(pod)}: {status.get('phase', 'no phase yet')}"]
    for container in [*status.get("initContainerStatuses", []), *status.get("containerStatuses", [])]:
        for name in ("waiting", "terminated"):
            if state := container.get("state", {}).get(name):
                message = f": {state['message'].strip()}" if state.get("message") else ""
                reason = state.get("reason") or f"exit code {state.get('exitCode')}"
                lines.append(f"{described(pod)}: container {container['name']} {name}: {reason}{message}")
    return lines


# --- Operations ------------------------------------------------------------------------------------------------------


def post(cluster: Cluster, inputs: Object, *, dry: bool = False) -> Object:
    """Create an object, or rehearse it."""
    namespace = known_metadata(inputs).get("namespace")
    query = {"fieldManager": MANAGER} | ({"dryRun": "All"} if dry else {})
    if cluster.upsert:
        path = cluster.path(inputs["apiVersion"], inputs["kind"], namespace, known_metadata(inputs)["name"])
        upserted: Object = cluster.request("PATCH", path, inputs, query, "application/apply-patch+yaml")
        return upserted
    try:
        path = cluster.path(inputs["apiVersion"], inputs["kind"], namespace)
        live: Object = cluster.request("POST", path, inputs, query)
    except ApiError as error:
        name = known_metadata(inputs).get("name") or known_metadata(inputs).get("generateName")
        full = f"{namespace}/{name}" if namespace else name
        text = f'resource "{full}" was not successfully created by the Kubernetes API server: {error}'
        raise type(error)(error.status, error.reason, text) from None
    if cluster.server_side_apply and not dry:
        # It exists now: an error here would lose it. An update does this again.
        with suppress(ProviderError):
            return hand_over(cluster, live)
    return live


def _plain_entry(live: Object) -> int | None:
    """Return the index of the record that the fields are ours by a plain write."""
    for index, entry in enumerate(live["metadata"].get("managedFields", [])):
        if entry.get("manager") == MANAGER and entry.get("operation") == "Update" and not entry.get("subresource"):
            return index
    return None


def hand_over(cluster: Cluster, live: Object) -> Object:
    """Turn our ownership by a plain write into one by server-side apply.

    The server takes the two for different owners: without this the first update would conflict with our own creation.
    Source: https://kubernetes.io/docs/reference/using-api/server-side-apply/#migration-between-client-side-and-server-side-apply
    """
    index = _plain_entry(live)
    if index is None:
        return live
    where = f"/metadata/managedFields/{index}"
    patch = [
        {"op": "test", "path": f"{where}/manager", "value": MANAGER},  # others may have written in between
        {"op": "test", "path": f"{where}/operation", "value": "Update"},
        {"op": "replace", "path": f"{where}/operation", "value": "Apply"},
    ]
    path = cluster.path(live["apiVersion"], live["kind"], *split_identifier(identifier_of(live)))
    changed: Object = cluster.request("PATCH", path, patch, {"fieldManager": MANAGER}, "application/json-patch+json")
    return changed


def patch(cluster: Cluster, identifier: str, old: Object, inputs: Object, *, dry: bool = False) -> Object:
    """Change an object in place, or rehearse it: by server-side apply, else by a merge patch of the changed inputs."""
    live = cluster.get(inputs, identifier)  # an apply would create what is gone
    namespace, name = split_identifier(identifier)
    path = cluster.path(inputs["apiVersion"], inputs["kind"], namespace, name)
    query = {"fieldManager": MANAGER} | ({"dryRun": "All"} if dry else {})
    try:
        if not cluster.server_side_apply:
            content = "application/merge-patch+json"
            changed: Object = cluster.request("PATCH", path, merge_patch(old, inputs), query, content)
            return changed
        if not dry:
            live = hand_over(cluster, live)
        force = annotation(inputs, "patchForce") == "true" or (dry and _plain_entry(live) is not None)
        body = copy.deepcopy(inputs)
        body.setdefault("metadata", {})["name"] = name  # where the server chose it
        query["force"] = str(force).lower()
        applied: Object = cluster.request("PATCH", path, body, query, "application/apply-patch+yaml")
    except ApiError as error:
        text = f'resource "{identifier}" was not successfully updated by the Kubernetes API server: {error}'
        if error.reason == "Conflict":
            text += '\nThe annotation pulumi.com/patchForce: "true" takes these fields from their owners.'
        raise type(error)(error.status, error.reason, text) from None
    return applied


def delete(cluster: Cluster, inputs: Object, identifier: str) -> Object | None:
    """Ask for an object's deletion; return it, or None where it is gone already."""
    policies = {"orphan": "Orphan", "background": "Background"}
    policy = policies.get((annotation(inputs, "deletionPropagationPolicy") or "").lower(), "Foreground")
    try:
        live = cluster.get(inputs, identifier)
        path = cluster.path(inputs["apiVersion"], inputs["kind"], *split_identifier(identifier))
        cluster.request("DELETE", path, {"propagationPolicy": policy, "preconditions": {"uid": live["metadata"]["uid"]}})
    except _NotFound:
        return None
    return live


def rehearsed(attempt: Callable[[], Object], inputs: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return what a dry run gives, or the inputs where it cannot tell.

    That is where no server answers or it forbids it, and where a kind, a namespace or the room for a name comes about
    earlier in the same update only.
    """
    if any(unknown(value) for value in inputs.values()):
        return inputs
    try:
        return attempt()
    except UnreachableError:
        return inputs
    except ApiError as error:
        excused = error.status in {401, 403, 404} or error.reason == "AlreadyExists"
        if excused or "does not support dry run" in str(error):  # an admission webhook with side effects
            return inputs
        raise


SKIPPING_KINDS = frozenset(
    {"Namespace", "Pod", "ReplicationController", "apps/DaemonSet", "apps/Deployment", "apps/StatefulSet", "batch/Job"}
)
"""Kinds whose ``pulumi.com/skipAwait`` skips the wait for their end, too (provider/pkg/metadata/overrides.go)."""


class KubernetesServicer(Servicer):
    """The engine's protocol for objects of any kind, whose rules go by paths inside the inputs."""

    def __init__(self, package: str, types: Mapping[str, ResourceType], stop: threading.Event) -> None:
        super().__init__(package, types, stop)
        self._cluster = Cluster()

    def _served(self, urn: str, context: grpc.ServicerContext) -> tuple[str, str]:
        """Return the apiVersion and the kind of a resource, or refuse it."""
        token = type_token(urn)
        api_version, kind = kind_of_token(token)
        if api_version.split("/")[0] in {"helm.sh", "kustomize", "yaml", "kubernetes"} or kind.endswith("Patch"):
            context.abort(
                grpc.StatusCode.UNIMPLEMENTED,
                f"the stand-in for the kubernetes plugin has no {token}; it has objects of the API server's own kinds. "
                "Install the official plugin for the others.",
            )
        return api_version, kind

    def _waiting(self, inputs: Mapping[str, Any], timeout: float) -> Waiting:
        return Waiting(self._cluster, self._stop, inputs, timeout)

    def DiffConfig(self, request: Any, context: Any) -> Any:
        """Replace the provider, and so its objects, where it goes to another server; else just use the new inputs."""
        olds = plain_map(PropertyValue.unmarshal_map(request.old_inputs))
        news = plain_map(PropertyValue.unmarshal_map(request.news))
        changed = sorted(key for key in olds.keys() | news.keys() if olds.get(key) != news.get(key))
        addresses = {Cluster.configured(olds).address(), Cluster.configured(news).address()}
        moved = len(addresses - {None}) > 1  # a kubeconfig that is gone, or not made yet, tells nothing
        if "clusterIdentifier" in olds or "clusterIdentifier" in news:
            moved = "clusterIdentifier" in changed
        return provider_pb2.DiffResponse(
            changes=provider_pb2.DiffResponse.DIFF_SOME if changed else provider_pb2.DiffResponse.DIFF_NONE,
            replaces=changed if moved else [],
            diffs=changed,
        )

    def Configure(self, request: Any, context: Any) -> Any:
        self._cluster = Cluster.configured(plain_map(PropertyValue.unmarshal_map(request.args)))
        return super().Configure(request, context)

    def Check(self, request: Any, context: Any) -> Any:
        api_version, kind = self._served(request.urn, context)
        news = PropertyValue.unmarshal_map(request.news)
        news = {"apiVersion": PropertyValue(api_version), "kind": PropertyValue(kind), **news}
        olds = PropertyValue.unmarshal_map(request.olds)
        news = autonamed(request.urn.split("::")[-1], olds, news, request.randomSeed)
        inputs = plain_map(news)
        namespace = self._cluster.default_namespace()
        fields = _mapping(news["metadata"]) if "metadata" in news else {}
        if namespace != NAMESPACE and fields is not None and "namespace" not in fields and self._namespaced(inputs):
            news["metadata"] = _with(news["metadata"], {**fields, "namespace": PropertyValue(namespace)})
        failures = []
        try:
            if text := annotation(inputs, "waitFor"):
                conditions(text)
        except ValueError as error:
            failures.append(provider_pb2.CheckFailure(property="metadata", reason=f"pulumi.com/waitFor: {error}"))
        return provider_pb2.CheckResponse(
            inputs=PropertyValue.marshal_map({key: value for key, value in news.items() if value.value is not None}),
            failures=failures,
        )

    def _namespaced(self, inputs: Mapping[str, Any]) -> bool:
        if kind_of(inputs) in CLUSTER_SCOPED:
            return False
        if "." not in inputs["apiVersion"] or inputs["apiVersion"].split("/")[0].endswith(".k8s.io"):
            return True
        try:  # a custom kind: its definition tells
            return "/namespaces/" in self._cluster.path(inputs["apiVersion"], inputs["kind"], None)
        except ProviderError:
            return True

    def Diff(self, request: Any, context: Any) -> Any:
        self._served(request.urn, context)
        olds = plain_map(PropertyValue.unmarshal_map(request.old_inputs))
        news = plain_map(PropertyValue.unmarshal_map(request.news))
        found = object_changes(olds, news)
        kind = kind_of(news)
        replaces = [change.path for change in found if change.replaces(kind)]
        detailed = {}
        for change in found:
            operation = f"{change.operation}{'_REPLACE' if change.path in replaces else ''}"
            value = provider_pb2.PropertyDiff.Kind.Value(operation)
            detailed[change.path] = provider_pb2.PropertyDiff(kind=value, inputDiff=True)
        before, after = known_metadata(olds), known_metadata(news)
        # Two objects cannot have one name: the old one must go first, unless the name is ours to choose.
        same_name = before.get("name") == after.get("name") and namespace_of(olds) == namespace_of(news)
        return provider_pb2.DiffResponse(
            changes=provider_pb2.DiffResponse.DIFF_SOME if found else provider_pb2.DiffResponse.DIFF_NONE,
            replaces=replaces,
            diffs=sorted({str(change.steps[0]) for change in found}),
            detailedDiff=detailed,
            hasDetailedDiff=True,
            deleteBeforeReplace=bool(replaces) and same_name and annotation(news, "autonamed") != "true",
        )

    def Create(self, request: Any, context: Any) -> Any:
        self._served(request.urn, context)
        inputs = PropertyValue.unmarshal_map(request.properties)
        wanted = plain_map(inputs)
        with Reported(context, inputs, lambda live: outputs_of(live, inputs)):
            if request.preview:
                live = dict(rehearsed(lambda: post(self._cluster, wanted, dry=True), wanted))
                return provider_pb2.CreateResponse(properties=_previewed(live, inputs, new=True))
            live = post(self._cluster, wanted)
            live = self._waiting(wanted, request.timeout).ready(live)
        return provider_pb2.CreateResponse(id=identifier_of(live), properties=PropertyValue.marshal_map(outputs_of(live, inputs)))

    def Read(self, request: Any, context: Any) -> Any:
        api_version, kind = self._served(request.urn, context)
        inputs = PropertyValue.unmarshal_map(request.inputs)
        state = plain_map(PropertyValue.unmarshal_map(request.properties))
        known = {"apiVersion": api_version, "kind": kind, **state}
        with Reported(context):
            try:
                live = self._cluster.get(known, request.id)
            except _NotFound:
                return provider_pb2.ReadResponse()
            found = refreshed_inputs(live, plain_map(inputs))
        return provider_pb2.ReadResponse(
            id=identifier_of(live),
            properties=PropertyValue.marshal_map(outputs_of(live, inputs)),
            inputs=PropertyValue.marshal_map(outputs_of(found, inputs)),
        )

    def Update(self, request: Any, context: Any) -> Any:
        self._served(request.urn, context)
        inputs = PropertyValue.unmarshal_map(request.news)
        wanted, olds = plain_map(inputs), plain_map(PropertyValue.unmarshal_map(request.old_inputs))
        with Reported(context, inputs, lambda live: outputs_of(live, inputs)):
            if request.preview:
                live = dict(rehearsed(lambda: patch(self._cluster, request.id, olds, wanted, dry=True), wanted))
                return provider_pb2.UpdateResponse(properties=_previewed(live, inputs, new=False))
            live = patch(self._cluster, request.id, olds, wanted)
            live = self._waiting(wanted, request.timeout).ready(live)
        return provider_pb2.UpdateResponse(properties=PropertyValue.marshal_map(outputs_of(live, inputs)))

    def Delete(self, request: Any, context: Any) -> Any:
        self._served(request.urn, context)
        inputs = plain_map(PropertyValue.unmarshal_map(request.old_inputs))
        inputs = inputs or plain_map(PropertyValue.unmarshal_map(request.properties))
        with Reported(context):
            live = delete(self._cluster, inputs, request.id)
            skipped = annotation(inputs, "skipAwait") == "true" and kind_of(inputs) in SKIPPING_KINDS
            if live is not None and not skipped:
                self._waiting(inputs, request.timeout).gone(live, request.id)
        return empty_pb2.Empty()


def _previewed(live: Object, inputs: Mapping[str, PropertyValue], *, new: bool) -> Any:
    """Return the outputs of a rehearsal, without what the real run makes anew: the program sees it as not known."""
    if isinstance(live.get("metadata"), Mapping):
        made = {"managedFields", "resourceVersion", "generation"} | ({"uid", "creationTimestamp"} if new else set())
        live = {**live, "metadata": {key: value for key, value in live["metadata"].items() if key not in made}}
    if new:
        live.pop("status", None)
    known = {key: value for key, value in live.items() if not unknown(value)}
    return PropertyValue.marshal_map(outputs_of(known, inputs))


if __name__ == "__main__":
    serve("kubernetes", {}, KubernetesServicer)
