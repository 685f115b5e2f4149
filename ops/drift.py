"""`ops drift`: what differs from what a stack says, and what will soon: it changes nothing, the state included."""

import contextlib
import json
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from enum import Enum
from typing import Any

from ops.engine import Run
from ops.report import Change, of_run
from ops.stack import OpsError, Registry, pulumi, registry_of, settings_of
from settings import Settings

CHECKS = ("volume", "pod", "resolve", "connect", "trust")


class Kind(Enum):
    """What a finding comes to: in words, and as the command's exit code."""

    CLEAN = ("clean", 0)
    DRIFT = ("drift", 10)
    FAILURE = ("failure", 1)

    def __init__(self, words: str, code: int) -> None:
        self.words = words
        self.code = code


@dataclass(frozen=True)
class Finding:
    """One sentence about a stack."""

    kind: Kind
    said: str


def findings_of(stack: str) -> list[Finding]:
    """Look at a stack and all that it made; what goes wrong is a finding, too."""
    try:
        (settings, secrets), registry = settings_of(stack), registry_of(stack)
    except OpsError as error:
        return [_of_error(Kind.FAILURE, error)]
    parts: dict[str, Callable[[], Iterator[Finding]]] = {
        "resources": lambda: _resources(stack),
        "registry": lambda: _registry(registry),
        "hosts": lambda: _hosts(stack, settings),
        "space": lambda: _space(settings, registry),
        "base": lambda: _base(stack, secrets),
    }
    with ThreadPoolExecutor(len(parts)) as pool:
        return [finding for found in pool.map(lambda name: [*_caught(name, parts[name])], parts) for finding in found]


def worst(findings: list[Finding]) -> Kind:
    """Return what several findings come to."""
    kinds = [finding.kind for finding in findings]
    return next((kind for kind in (Kind.FAILURE, Kind.DRIFT) if kind in kinds), Kind.CLEAN)


def _of_error(kind: Kind, error: OpsError) -> Finding:
    return Finding(kind, f"{error.what}\n    {error.mend}")


def _caught(name: str, part: Callable[[], Iterator[Finding]]) -> Iterator[Finding]:
    try:
        yield from part()
    except OpsError as error:
        yield _of_error(Kind.FAILURE, error)
    except Exception as error:  # noqa: BLE001, one part that fails must not hide what the others found
        yield Finding(Kind.FAILURE, f"{name}: {type(error).__name__}: {error}")


def _resources(stack: str) -> Iterator[Finding]:
    """Ask the providers what there is, and the program what there should be."""
    preview = of_run(Run("preview", stack, "--refresh"))
    yield from (Finding(Kind.FAILURE, error) for error in preview.errors)
    yield from (Finding(Kind.DRIFT, f"refused by policies: {refusal}") for refusal in preview.refusals)
    yield from (Finding(Kind.DRIFT, _drift(change)) for change in preview.drifted)
    drifted = {change.urn for change in preview.drifted}
    for change in preview.changes:
        if change.urn not in drifted:
            yield Finding(Kind.DRIFT, f"not rolled out: {change.operation} {change.name} ({change.kind})")


def _drift(change: Change) -> str:
    if change.operation == "delete":
        return f"{change.name} ({change.kind}) is gone"
    return f"{change.name} ({change.kind}) was changed: {', '.join(change.paths)}"


def _registry(registry: Registry) -> Iterator[Finding]:
    """Take the steps of `ops verify` that write nothing into the registry."""
    from ops.verify import Verification

    try:
        for name, take in Verification(registry).steps():
            if name in CHECKS:
                result = take()
                yield Finding(Kind.DRIFT if result.warning else Kind.CLEAN, f"{name}: {result.said}")
    except OpsError as error:  # it was looked at, and does not serve
        yield _of_error(Kind.DRIFT, error)


def _hosts(stack: str, settings: Settings) -> Iterator[Finding]:
    if not settings.trust.hosts:
        return
    from ops.trust import Hosts

    for host in Hosts(stack).trusts():
        kind = Kind.CLEAN if host.mend is None else Kind.DRIFT
        yield Finding(kind, f"{host.host} trusts {host.said}{'' if host.mend is None else f': {host.mend}'}")


def _space(settings: Settings, registry: Registry) -> Iterator[Finding]:
    """Tell how full the filesystem of the images is; that of an RBD image is one of the steps of `ops verify`."""
    from ops.volume import FULL_PERCENT

    if registry.volume is not None:
        return
    if registry.workload is None:
        used, capacity = _docker_space(settings.container.name)
    else:
        from ops.workload import placement

        placed = placement(registry.workload["namespace"], registry.workload["name"])
        used, capacity = placed.used_bytes, placed.capacity_bytes
    if capacity:
        percent = 100 * used // capacity
        kind, mend = (Kind.CLEAN, "") if percent < FULL_PERCENT else (Kind.DRIFT, ": grow it, or delete images")
        yield Finding(kind, f"space: {percent} % of {capacity >> 30} GiB used{mend}")


def _docker_space(container: str) -> tuple[int, int]:
    """Return the used and all bytes of the images' filesystem, by `df` in the registry's container; 0 where it does not run."""
    with _docker() as client:
        import docker.errors

        try:
            said = client.containers.get(container).exec_run(["df", "-P", "-k", "/var/lib/registry"]).output.decode()
        except docker.errors.APIError:
            return 0, 0
    used, free = (int(word) for word in said.splitlines()[-1].split()[2:4])
    return used << 10, used + free << 10


def _base(stack: str, secrets: Mapping[str, str]) -> Iterator[Finding]:
    """Tell whether the base of the image has moved on: an image is built on another if it begins with its layers."""
    resources = json.loads(pulumi("stack", "export", "--stack", stack))["deployment"].get("resources") or []
    image = next((entry for entry in resources if entry["type"] == "docker:index/image:Image"), None)
    if image is None:
        return
    build = image["inputs"]["build"]
    base = build["args"]["BASE"]
    name = base.partition("@")[0]
    name = name.rpartition(":")[0] if ":" in name.rpartition("/")[2] else name
    login = json.loads(secrets["pushCredentials"]) if "pushCredentials" in secrets else None
    with _docker() as client:
        import docker.errors
        import requests

        try:
            digest = client.images.get_registry_data(base).id
            current = _layers(client, f"{name}@{digest}", build["platform"])
            built = _layers(client, image["outputs"]["repoDigest"], build["platform"], login)
        except (docker.errors.APIError, requests.RequestException) as error:
            yield Finding(
                Kind.CLEAN, f"base: not compared with {base} in its registry: {getattr(error, 'explanation', None) or error}"
            )
            return
    if built[: len(current)] == current:
        yield Finding(Kind.CLEAN, f"base: built on the current {base}")
    else:
        mend = f"`docker pull {base}`, raise image.tag, and roll out"
        yield Finding(Kind.DRIFT, f"base: the image is behind {base}, which is {digest} now: {mend}")


def _layers(client: Any, reference: str, platform: str, login: Mapping[str, str] | None = None) -> list[str]:
    """Return the layers of an image, which is pulled for it where the daemon does not have it."""
    import docker.errors

    try:
        image = client.images.get(reference)
    except docker.errors.ImageNotFound:
        image = client.images.pull(reference, platform=platform, auth_config=login)
    layers: list[str] = image.attrs["RootFS"]["Layers"]
    return layers


@contextlib.contextmanager
def _docker() -> Iterator[Any]:
    import docker
    import docker.errors

    try:
        client = docker.from_env()
    except docker.errors.DockerException as error:
        raise OpsError(f"Docker: {error}.", "See whether the daemon that DOCKER_HOST names answers.") from None
    with contextlib.closing(client):
        yield client
