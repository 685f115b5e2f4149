"""RegistryImage: the registry's own image, built from `image/`, and pushed to another registry if the stack names one."""

import pulumi
import pulumi_docker as docker

from settings import Image


class RegistryImage(pulumi.ComponentResource):
    """The image holds Distribution and its configuration, but no key, certificate or user: those come when it starts."""

    reference: pulumi.Output[str]
    """The image by its content: the repository's digest where it is pushed, else the Docker host's image id."""

    def __init__(
        self,
        name: str,
        settings: Image,
        *,
        credentials: pulumi.Output[dict[str, str]] | None = None,
        ssh_private_key: pulumi.Output[str] | None = None,
        opts: pulumi.ResourceOptions | None = None,
    ) -> None:
        super().__init__("private-registry:index:RegistryImage", name, None, opts)
        registry = None
        if settings.push_to is not None:
            registry = docker.RegistryArgs(
                server=settings.push_to,
                username=None if credentials is None else credentials["username"],
                password=None if credentials is None else credentials["password"],
            )
        image = docker.Image(
            name,
            image_name=settings.name,
            build=docker.DockerBuildArgs(
                context="image",
                dockerfile="image/Dockerfile",
                args={"BASE": settings.base},
                # Else the platform of the machine that runs Pulumi would be a difference between machines.
                platform=settings.platform,
            ),
            registry=registry,
            skip_push=settings.push_to is None,
            opts=pulumi.ResourceOptions(parent=self),
        )
        self.reference = image.repo_digest
        if settings.nodes:
            assert ssh_private_key is not None
            self.reference = self._delivered(name, settings, image.repo_digest, ssh_private_key)
        self.register_outputs({"reference": self.reference})

    def _delivered(
        self, name: str, settings: Image, image_id: pulumi.Output[str], ssh_private_key: pulumi.Output[str]
    ) -> pulumi.Output[str]:
        """Copy the image to the nodes under a name that changes with its content, and return that name once it is there.

        The name's host is reserved (RFC 2606): nothing can be pulled by it, whatever a node has lost.
        """
        import pulumi_command as command

        content = image_id.apply(lambda digest: digest.removeprefix("sha256:")[:12])
        reference = pulumi.Output.concat("delivered.invalid/", settings.name, "-", content)
        nodes = [f"{node.user} {node.address} {node.port} {node.host_key}" for node in settings.nodes]
        delivery = command.local.Command(
            f"{name}-delivery",
            create="hosts/image-deliver.sh",
            update="hosts/image-deliver.sh",
            stdin=ssh_private_key,
            environment={"IMAGE": image_id, "REFERENCE": reference, "NODES": "\n".join(nodes)},
            add_previous_output_in_env=False,
            opts=pulumi.ResourceOptions(parent=self),
        )
        return pulumi.Output.all(reference, delivery.id).apply(lambda both: str(both[0]))
