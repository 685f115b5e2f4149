"""ClientTrust: the machines that trust the registry's authority, and resolve its name."""

import functools
import shlex
from pathlib import Path

import pulumi
import pulumi_command as command

from components.connection import connection
from settings import Settings, TrustHost

SCRIPT = Path("hosts/trust.sh")


class ClientTrust(pulumi.ComponentResource):
    """The authority where Docker or containerd looks for it, and a line in the hosts file: there as long as the stack.

    Every other host is a resource of its own: one that does not answer fails alone, and a preview names those that come and go.
    """

    def __init__(
        self,
        name: str,
        settings: Settings,
        authority_pem: pulumi.Input[str],
        *,
        registry: pulumi.Resource,
        ssh_private_key: pulumi.Output[str] | None = None,
        opts: pulumi.ResourceOptions | None = None,
    ) -> None:
        super().__init__("private-registry:index:ClientTrust", name, None, opts)
        owner = f"{pulumi.get_project()}/{pulumi.get_stack()}"
        trust = settings.trust
        if trust.docker or trust.hosts_file:
            place = {
                "STACK": owner,
                "REGISTRY": settings.address,
                "ENTRY": name,
                "RUNTIME": "docker" if trust.docker else "none",
                "RESOLVE_TO": settings.container.address if trust.hosts_file else "",
            }
            command.local.Command(
                name,
                create=f"{SCRIPT} install",
                update=f"{SCRIPT} install",
                delete=f"{SCRIPT} remove",
                environment={**place, "AUTHORITIES": authority_pem},
                add_previous_output_in_env=False,
                # Another address is another place: what was written for the old one has to go first, by the old values.
                triggers=[place],
                opts=pulumi.ResourceOptions(parent=self, delete_before_replace=True),
            )
        for host in trust.hosts:
            assert ssh_private_key is not None
            command.remote.Command(
                host_name(host),
                connection=connection(host, ssh_private_key),
                create=host_command(host, "install"),
                update=host_command(host, "install"),
                delete=host_command(host, "remove"),
                stdin=pulumi.Output.from_input(authority_pem).apply(functools.partial(host_script, settings, owner, host)),
                logging=command.remote.Logging.NONE,
                add_previous_output_in_env=False,
                triggers=[settings.address, host.runtime, host.resolve_to],
                opts=pulumi.ResourceOptions(
                    parent=self,
                    delete_before_replace=True,
                    # It ends with a connection to the registry.
                    depends_on=[registry],
                ),
            )
        self.register_outputs({})


def host_name(host: TrustHost) -> str:
    """Return the name of a host's resource."""
    return f"trust-{host.address.replace(':', '-')}"


def host_script(settings: Settings, owner: str, host: TrustHost, authorities: str) -> str:
    """Return `hosts/trust.sh` with what it has to know on a host, to be given to a shell: no file of it is left there."""
    variables = {
        "AUTHORITIES": authorities,
        "STACK": owner,
        "REGISTRY": settings.address,
        "ENTRY": host_name(host),
        "RUNTIME": host.runtime,
        "RESOLVE_TO": host.resolve_to or "",
        "RESTART": host.restart or "",
        "HANDSHAKE": "yes",
    }
    return "".join(f"{name}={shlex.quote(value)}\n" for name, value in variables.items()) + SCRIPT.read_text()


def host_command(host: TrustHost, verb: str) -> str:
    """Return the command line that takes the script from standard input and runs it as root."""
    return shlex.join(host.as_root(["sh", "-s", verb]))
