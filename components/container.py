"""RegistryContainer: the registry as a container on one Docker host."""

import pulumi
import pulumi_docker as docker

from components.configuration import htpasswd, http_secret, registry_configuration
from settings import Settings

USER = "1000"
STOP_SECONDS = 30  # above the registry's own drain timeout of 20 s


class RegistryContainer(pulumi.ComponentResource):
    """A container without capabilities, on a read-only root, as an ordinary user; its images are in a named volume.

    Key, certificate, users and configuration are in the volumes of a second container that never runs: Docker writes no
    file into a read-only root, but it does into a volume, and these volumes go when that container goes.
    """

    def __init__(
        self,
        name: str,
        settings: Settings,
        *,
        image: pulumi.Input[str],
        certificate_pem: pulumi.Input[str],
        private_key_pem: pulumi.Input[str],
        users: pulumi.Output[dict[str, str]],
        opts: pulumi.ResourceOptions | None = None,
    ) -> None:
        super().__init__("private-registry:index:RegistryContainer", name, None, opts)
        labels = [("private-registry.stack", f"{pulumi.get_project()}/{pulumi.get_stack()}")]
        volume = docker.Volume(
            f"{name}-images",
            name=settings.storage.volume,
            labels=[docker.VolumeLabelArgs(label=label, value=value) for label, value in labels],
            opts=pulumi.ResourceOptions(
                parent=self,
                # All images are in it: it outlives the stack unless the stack says otherwise.
                retain_on_delete=settings.storage.on_destroy == "keep",
                protect=settings.storage.protect or None,
            ),
        )
        key = pulumi.Output.secret(private_key_pem)
        anonymous = settings.access.anonymous
        files: dict[str, pulumi.Input[str]] = {
            "/certs/domain.crt": certificate_pem,
            "/certs/domain.key": key,
            "/etc/distribution/config.yml": key.apply(
                lambda pem: registry_configuration(anonymous=anonymous, secret=http_secret(pem))
            ),
        }
        if not anonymous:
            files["/auth/htpasswd"] = pulumi.Output.all(users, key).apply(lambda both: htpasswd(both[0], both[1]))
        folders = sorted({file.rsplit("/", 1)[0] for file in files})
        # The name and the port are taken until the old container is gone.
        in_place_of_the_old = pulumi.ResourceOptions(parent=self, delete_before_replace=True)
        file_container = docker.Container(
            f"{name}-files",
            name=f"{settings.container.name}-files",
            image=image,
            start=False,
            must_run=False,
            uploads=[
                docker.ContainerUploadArgs(file=file, content=content, owner=USER, group=USER, permissions="0400")
                for file, content in files.items()
            ],
            volumes=[docker.ContainerVolumeArgs(container_path=folder) for folder in folders],
            labels=[docker.ContainerLabelArgs(label=label, value=value) for label, value in labels],
            opts=in_place_of_the_old,
        )
        docker.Container(
            name,
            name=settings.container.name,
            hostname=settings.hostname,
            image=image,
            ports=[
                docker.ContainerPortArgs(
                    internal=5000, external=settings.container.port, ip=settings.container.address, protocol="tcp"
                )
            ],
            volumes=[
                docker.ContainerVolumeArgs(container_path="/var/lib/registry", volume_name=volume.name),
                docker.ContainerVolumeArgs(from_container=file_container.id),
            ],
            user=f"{USER}:{USER}",
            read_only=True,
            capabilities=docker.ContainerCapabilitiesArgs(drops=["ALL"]),
            security_opts=["no-new-privileges"],
            memory=settings.container.memory_mib,
            restart="unless-stopped",
            log_driver="json-file",
            log_opts={"max-size": "10m", "max-file": "3"},
            healthcheck=docker.ContainerHealthcheckArgs(
                tests=["CMD", "wget", "-q", "-O", "/dev/null", "http://127.0.0.1:5001/debug/health"],
                interval="2s",
                timeout="5s",
                retries=5,
            ),
            wait=True,
            wait_timeout=60,
            destroy_grace_seconds=STOP_SECONDS,
            labels=[docker.ContainerLabelArgs(label=label, value=value) for label, value in labels],
            # Docker takes a limit back only from a new container.
            opts=pulumi.ResourceOptions(parent=self, delete_before_replace=True, replace_on_changes=["memory"]),
        )
        self.register_outputs({})
