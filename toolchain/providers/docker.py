"""Stand-in for the docker plugin: Image, Volume and Container.

Source of the rules: the schema of pulumi-docker 5 and terraform-provider-docker (resource_docker_container.go): a changed
container is replaced but for a few limits; an image is rebuilt in place; with ``skipPush`` the digest is the local image id.
Images are built by the daemon's classic builder, whichever ``builderVersion`` asks for: BuildKit needs a client of its own.
"""

import base64
import hashlib
import io
import tarfile
import time
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from toolchain.providers.base import ProviderError, ResourceType, serve

if TYPE_CHECKING:
    import docker

SECOND = 1_000_000_000  # nanoseconds, the unit of durations in Docker's interface
UNITS = {"ms": SECOND // 1000, "s": SECOND, "m": 60 * SECOND, "h": 3600 * SECOND}


@cache
def daemon() -> "docker.DockerClient":
    """Connect to the daemon that DOCKER_HOST names, or to the default one.

    The library is imported with the first call: where nothing changes none is made, and it takes longer than all else.
    """
    import docker
    import docker.errors

    try:
        client = docker.from_env(timeout=600)
        client.ping()
    except (docker.errors.DockerException, OSError) as error:
        raise ProviderError(f"failed to connect to any docker daemon: {error}") from None
    return client


class Image(ResourceType):
    inputs = frozenset({"build", "imageName", "registry", "skipPush", "buildOnPreview", "contextDigest"})
    defaults = {"skipPush": False, "buildOnPreview": False}

    def computed_inputs(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
        """The digest of the build context: a changed file is a changed image."""
        context = Path(inputs.get("build", {}).get("context", "."))
        digest = hashlib.sha256()
        for file in sorted(path for path in context.rglob("*") if path.is_file()):
            mode = file.stat().st_mode & 0o777
            content = hashlib.sha256(file.read_bytes()).hexdigest()
            digest.update(f"{file.relative_to(context)}\0{mode:o}\0{content}\n".encode())
        return {"contextDigest": digest.hexdigest()}

    def create(self, name: str, inputs: dict[str, Any]) -> tuple[str, dict[str, Any]]:
        return inputs["imageName"], self._build(inputs)

    def update(self, identifier: str, state: dict[str, Any], inputs: dict[str, Any]) -> dict[str, Any]:
        return self._build(inputs)

    def delete(self, identifier: str, state: dict[str, Any]) -> None:
        """The official plugin leaves built images where they are, too."""

    def kept(self, state: Mapping[str, Any], changed: frozenset[str]) -> frozenset[str]:
        return frozenset({"registryServer"} if changed else {"registryServer", "repoDigest"})

    def _build(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
        build, reference = inputs["build"], inputs["imageName"]
        context = Path(build.get("context", ".")).resolve()
        dockerfile = Path(build["dockerfile"]).resolve() if "dockerfile" in build else context / "Dockerfile"
        image = None
        lines: list[str] = []
        for step in daemon().api.build(
            path=str(context),
            dockerfile=str(dockerfile),
            tag=reference,
            buildargs=build.get("args"),
            platform=build.get("platform"),
            rm=True,
            decode=True,
        ):
            lines.append(step.get("stream", ""))
            if "error" in step:
                raise ProviderError(f"building {reference} failed: {step['error'].strip()}\n{''.join(lines[-20:])}")
            image = step.get("aux", {}).get("ID", image)
        if image is None:
            raise ProviderError(f"building {reference} ended without an image:\n{''.join(lines[-20:])}")
        digest = image if inputs.get("skipPush") else self._push(reference, inputs.get("registry"))
        server = (inputs.get("registry") or {}).get("server", "")
        return {"repoDigest": digest, "baseImageName": reference, "registryServer": server}

    def _push(self, reference: str, registry: Mapping[str, Any] | None) -> str:
        repository, _, tag = reference.rpartition(":")
        credentials = None
        if registry and registry.get("username"):
            credentials = {"username": registry["username"], "password": registry["password"]}
        digest = None
        for step in daemon().api.push(repository, tag, auth_config=credentials, stream=True, decode=True):
            if "error" in step:
                raise ProviderError(f"pushing {reference} failed: {step['error'].strip()}")
            digest = step.get("aux", {}).get("Digest", digest)
        return f"{repository}@{digest}"


class Volume(ResourceType):
    inputs = frozenset({"name", "driver", "driverOpts", "labels"})
    replace_on = inputs

    def create(self, name: str, inputs: dict[str, Any]) -> tuple[str, dict[str, Any]]:
        labels = {item["label"]: item["value"] for item in inputs.get("labels", [])}
        volume = daemon().volumes.create(
            inputs.get("name", name), driver=inputs.get("driver"), driver_opts=inputs.get("driverOpts"), labels=labels
        )
        return volume.name, {"name": volume.name, "mountpoint": volume.attrs["Mountpoint"]}

    def read(self, identifier: str, state: dict[str, Any]) -> dict[str, Any] | None:
        import docker

        try:
            return {"mountpoint": daemon().volumes.get(identifier).attrs["Mountpoint"]}
        except docker.errors.NotFound:
            return None

    def delete(self, identifier: str, state: dict[str, Any]) -> None:
        import docker

        try:
            daemon().volumes.get(identifier).remove()
        except docker.errors.NotFound:
            return


def _duration(text: str | None) -> int | None:
    if text is None:
        return None
    number = text.rstrip("hms")
    return int(float(number) * UNITS[text[len(number) :]])


def _archive(upload: Mapping[str, Any]) -> bytes:
    content = upload.get("content", "").encode()
    if "contentBase64" in upload:
        content = base64.b64decode(upload["contentBase64"])
    info = tarfile.TarInfo(upload["file"].lstrip("/"))
    info.size, info.mtime = len(content), int(time.time())
    info.mode = int(upload.get("permissions") or ("0744" if upload.get("executable") else "0644"), 8)
    info.uid, info.gid = int(upload.get("owner") or 0), int(upload.get("group") or 0)
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        archive.addfile(info, io.BytesIO(content))
    return buffer.getvalue()


class Container(ResourceType):
    in_place = frozenset({"restart", "memory", "destroyGraceSeconds", "wait", "waitTimeout", "removeVolumes", "start", "mustRun"})
    inputs = in_place | {
        "image",
        "name",
        "hostname",
        "ports",
        "uploads",
        "volumes",
        "healthcheck",
        "readOnly",
        "user",
        "capabilities",
        "securityOpts",
        "labels",
        "envs",
        "command",
        "logDriver",
        "logOpts",
    }
    replace_on = inputs - in_place
    defaults = {
        "restart": "no",
        "removeVolumes": True,
        "wait": False,
        "waitTimeout": 60,
        "start": True,
        "mustRun": True,
    }

    def create(self, name: str, inputs: dict[str, Any]) -> tuple[str, dict[str, Any]]:
        import docker

        api = daemon().api
        name = inputs.get("name", name)
        ports = inputs.get("ports", [])
        bindings = {f"{port['internal']}/tcp": (port.get("ip", "0.0.0.0"), port.get("external")) for port in ports}
        volumes = inputs.get("volumes", [])
        capabilities = inputs.get("capabilities", {})
        log = docker.types.LogConfig(type=inputs.get("logDriver", "json-file"), config=inputs.get("logOpts", {}))
        host = api.create_host_config(
            port_bindings=bindings,
            binds=[f"{v['volumeName']}:{v['containerPath']}" for v in volumes if "volumeName" in v],
            volumes_from=[v["fromContainer"] for v in volumes if "fromContainer" in v],
            restart_policy={"Name": inputs["restart"]},
            mem_limit=inputs.get("memory", 0) << 20,
            read_only=inputs.get("readOnly", False),
            cap_add=[name.removeprefix("CAP_") for name in capabilities.get("adds", [])],
            cap_drop=[name.removeprefix("CAP_") for name in capabilities.get("drops", [])],
            security_opt=inputs.get("securityOpts"),
            log_config=log,
        )
        health = inputs.get("healthcheck")
        try:
            identifier = api.create_container(
                image=inputs["image"],
                name=name,
                hostname=inputs.get("hostname"),
                command=inputs.get("command"),
                environment=inputs.get("envs"),
                user=inputs.get("user"),
                labels={item["label"]: item["value"] for item in inputs.get("labels", [])},
                ports=[port["internal"] for port in ports],
                volumes=[v["containerPath"] for v in volumes if "containerPath" in v],
                host_config=host,
                healthcheck=health
                and {
                    "test": health["tests"],
                    "interval": _duration(health.get("interval")),
                    "timeout": _duration(health.get("timeout")),
                    "start_period": _duration(health.get("startPeriod")),
                    "retries": health.get("retries"),
                },
            )["Id"]
        except docker.errors.APIError as error:
            raise ProviderError(f"creating the container {name} failed: {error.explanation}") from None
        container = daemon().containers.get(identifier)
        try:
            for upload in inputs.get("uploads", []):
                container.put_archive("/", _archive(upload))
            if inputs["start"]:
                container.start()
            if inputs["wait"]:
                self._wait(container, inputs["waitTimeout"])
        except (docker.errors.APIError, ProviderError) as error:
            container.remove(force=True, v=True)
            reason = error.explanation if isinstance(error, docker.errors.APIError) else error
            raise ProviderError(f"the container {name} did not start: {reason}") from None
        return identifier, {"name": name}

    def _wait(self, container: Any, seconds: int) -> None:
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            container.reload()
            if container.attrs["State"]["Status"] != "running" or container.attrs["RestartCount"]:
                break
            if container.attrs["State"].get("Health", {}).get("Status") == "healthy":
                return
            time.sleep(0.1)
        log = container.logs(tail=20).decode(errors="replace")
        raise ProviderError(f"it was not healthy within {seconds} s. Its last lines:\n{log}")

    def read(self, identifier: str, state: dict[str, Any]) -> dict[str, Any] | None:
        import docker

        try:
            container = daemon().containers.get(identifier)
        except docker.errors.NotFound:
            return None
        settings = container.attrs["HostConfig"]
        found = {"restart": settings["RestartPolicy"]["Name"]}
        if "memory" in state or settings["Memory"]:
            found["memory"] = settings["Memory"] >> 20
        return found

    def update(self, identifier: str, state: dict[str, Any], inputs: dict[str, Any]) -> dict[str, Any]:
        container = daemon().containers.get(identifier)
        limit = inputs.get("memory", 0) << 20
        swap = 2 * limit or -1  # Docker refuses a limit above the limit with swap that the container had
        container.update(restart_policy={"Name": inputs["restart"]}, mem_limit=limit, memswap_limit=swap)
        return {"name": state["name"]}

    def kept(self, state: Mapping[str, Any], changed: frozenset[str]) -> frozenset[str]:
        return frozenset({"name"})

    def delete(self, identifier: str, state: dict[str, Any]) -> None:
        import docker

        try:
            container = daemon().containers.get(identifier)
            container.stop(timeout=state.get("destroyGraceSeconds", 0))
            container.remove(v=state.get("removeVolumes", True), force=True)
        except docker.errors.NotFound:
            return


if __name__ == "__main__":
    serve(
        "docker",
        {
            "docker:index/image:Image": Image(),
            "docker:index/volume:Volume": Volume(),
            "docker:index/container:Container": Container(),
        },
    )
