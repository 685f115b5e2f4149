"""ClientTrust: the machine's own Docker daemon trusts the registry, and resolves its name."""

import pulumi
import pulumi_command as command

from settings import Settings


class ClientTrust(pulumi.ComponentResource):
    """The authority where Docker looks for it, and a line in the hosts file: written with the stack, removed with it."""

    def __init__(
        self,
        name: str,
        settings: Settings,
        *,
        authority_pem: pulumi.Input[str],
        opts: pulumi.ResourceOptions | None = None,
    ) -> None:
        super().__init__("private-registry:index:ClientTrust", name, None, opts)
        environment = {
            "STACK": f"{pulumi.get_project()}/{pulumi.get_stack()}",
            "REGISTRY": settings.address,
            "TRUST_DOCKER": "yes" if settings.trust.docker else "no",
            "RESOLVE_TO": settings.container.address if settings.trust.hosts_file else "",
        }
        command.local.Command(
            name,
            create="hosts/trust-install.sh",
            update="hosts/trust-install.sh",
            delete="hosts/trust-remove.sh",
            stdin=authority_pem,
            environment=environment,
            add_previous_output_in_env=False,
            # Another address is another place: what was written for the old one has to go first, by the old values.
            triggers=[environment],
            opts=pulumi.ResourceOptions(parent=self, delete_before_replace=True),
        )
        self.register_outputs({})
