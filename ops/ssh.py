"""Commands on other machines over SSH, with the stack's own key and the host keys that it names."""

import asyncio
from dataclasses import dataclass
from typing import Any

import asyncssh

from ops.stack import OpsError
from settings import RemoteHost, SshHost

LOGIN_SECONDS = 15


@dataclass(frozen=True)
class Finished:
    """A command that has ended."""

    code: int
    stdout: str
    stderr: str


def run(host: SshHost, private_key: str, command: str, *, stdin: str = "") -> Finished:
    """Run a command on a host, through its jump host where it has one. The key is written nowhere.

    Raises:
        OpsError: the host cannot be reached, is another one, or does not take the key.
    """
    try:
        return asyncio.run(_run(host, private_key, command, stdin))
    except asyncssh.HostKeyNotVerifiable:
        raise OpsError(
            f"{host.address} shows another host key than the stack names.",
            "See whether it was set up anew; then correct hostKey.",
        ) from None
    except asyncssh.PermissionDenied:
        raise OpsError(
            f"{host.address} does not let {host.user} in with the stack's sshPrivateKey.", "Add its public key there."
        ) from None
    except (OSError, asyncssh.Error, TimeoutError) as error:
        said = str(error) or type(error).__name__
        raise OpsError(f"{host.address}:{host.port} cannot be reached over SSH: {said}.", "See whether it runs.") from None


async def _run(host: SshHost, private_key: str, command: str, stdin: str) -> Finished:
    key = asyncssh.import_private_key(private_key.rstrip() + "\n")
    jump = host.jump if isinstance(host, RemoteHost) else None
    if jump is None:
        return await _run_through(None, host, key, command, stdin)
    async with _connection(None, jump, key) as tunnel:
        return await _run_through(tunnel, host, key, command, stdin)


async def _run_through(
    tunnel: asyncssh.SSHClientConnection | None, host: SshHost, key: asyncssh.SSHKey, command: str, stdin: str
) -> Finished:
    async with _connection(tunnel, host, key) as connection:
        done = await connection.run(command, input=stdin)
        code = done.returncode if done.returncode is not None else 255
        return Finished(code, str(done.stdout), str(done.stderr))


def _connection(tunnel: asyncssh.SSHClientConnection | None, host: SshHost, key: asyncssh.SSHKey) -> Any:
    """Return what opens a connection, as a context manager."""
    return asyncssh.connect(
        host.address,
        host.port,
        tunnel=tunnel,
        username=host.user,
        client_keys=[key],
        agent_path=None,
        known_hosts=([asyncssh.import_public_key(host.host_key)], [], []),
        config=None,
        login_timeout=LOGIN_SECONDS,
        connect_timeout=LOGIN_SECONDS,
    )
