"""How the command plugin reaches the hosts that a stack names."""

from typing import Any

import pulumi
import pulumi_command as command

from settings import RemoteHost, SshHost

DIAL_ATTEMPTS = 2
DIAL_SECONDS = 30


def connection(host: RemoteHost, private_key: pulumi.Output[str]) -> command.remote.ConnectionArgs:
    """Return the connection to a host, through its jump host where it has one."""
    # A stack's configuration strips the end of the key's last line, without which it is not read.
    key = private_key.apply(lambda text: text.rstrip() + "\n")
    proxy = None
    if host.jump is not None:
        proxy = command.remote.ProxyConnectionArgs(**_dial(host.jump), private_key=key)
    return command.remote.ConnectionArgs(**_dial(host), private_key=key, proxy=proxy)


def _dial(host: SshHost) -> dict[str, Any]:
    return {
        "host": host.address,
        "port": host.port,
        "user": host.user,
        "host_key": host.host_key,
        "dial_error_limit": DIAL_ATTEMPTS,
        "per_dial_timeout": DIAL_SECONDS,
    }
