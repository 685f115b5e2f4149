"""How the stand-in for the command plugin runs a command over SSH. To be imported where one runs: asyncssh takes time.

Source of the rules: pulumi-command 1.2, provider/pkg/provider/remote: ``connection.go`` (who is dialled, how often, with
which keys) and ``commandOutputs.go`` (environment, stdin, the texts of errors); the waits are those of ``retry/until.go`` in
the Pulumi SDK. A limit of N errors is N + 1 dials there and here, and whatever fails in a dial is tried again, a wrong host
key or login too.

Different here: errors name host and port; ``perDialTimeout`` is for the login, too, not for the TCP connection alone;
connections are closed when the command has ended; no SSH agent is asked; and output is not logged while the command runs.
"""

import asyncio
import contextlib
import os
import signal
from collections.abc import Mapping
from typing import Any

import asyncssh

from toolchain.providers.base import ProviderError

FIRST_WAIT_SECONDS = 0.1
WAIT_FACTOR = 1.5
LONGEST_WAIT_SECONDS = 5.0
UNLIMITED = -1


def run(
    connection: Mapping[str, Any],
    command: str,
    *,
    stdin: str,
    environment: Mapping[str, str],
    optional_environment: Mapping[str, str],
) -> tuple[str, str]:
    """Run the command in the user's shell there, and return what it wrote to stdout and to stderr.

    Args:
        connection: the inputs of a ConnectionArgs.
        environment: variables that the server has to accept.
        optional_environment: variables that are left out where the server does not accept them.

    Raises:
        ProviderError: no connection, a variable was refused, or the command failed.
    """
    return asyncio.run(_run(connection, command, stdin, environment, optional_environment))


async def _run(
    settings: Mapping[str, Any],
    command: str,
    stdin: str,
    environment: Mapping[str, str],
    optional_environment: Mapping[str, str],
) -> tuple[str, str]:
    async with contextlib.AsyncExitStack() as opened:
        proxy = None
        if (proxy_settings := settings.get("proxy")) is not None:
            proxy = await opened.enter_async_context(await _dial(proxy_settings, None, f"proxy {_address(proxy_settings)}"))
        where = _address(settings) + (f" through proxy {_address(proxy_settings)}" if proxy_settings else "")
        connection = await opened.enter_async_context(await _dial(settings, proxy, where))
        session = _Session(environment, optional_environment)
        try:
            # Bytes: characters may come in pieces, and what is no text must not end the connection.
            channel, _ = await connection.create_session(lambda: session, command, encoding=None)
            channel.write(stdin.encode())
            channel.write_eof()
        except (OSError, asyncssh.Error) as error:
            # A server that ends in the middle is told from the exit status that is missing, below.
            if not session.started:
                raise ProviderError(f"{where}: the command could not be started: {error}") from error
        await session.ended.wait()
    if (ending := session.ending()) is not None:
        output = b"".join(text for _, text in session.output).decode(errors="replace")
        raise ProviderError(f"{where}: {ending}: running {command!r}:\n{output}")
    return session.text(None), session.text(asyncssh.EXTENDED_DATA_STDERR)


def _address(settings: Mapping[str, Any]) -> str:
    return f"{settings['host']}:{settings.get('port', 22)}"


async def _dial(
    settings: Mapping[str, Any], proxy: asyncssh.SSHClientConnection | None, where: str
) -> asyncssh.SSHClientConnection:
    """Connect and log in, again and again until it works or there were too many errors.

    Raises:
        ProviderError: that many dials failed, or a key of the settings cannot be read.
    """
    options = _options(settings, where)
    limit = settings.get("dialErrorLimit", 10)
    wait = FIRST_WAIT_SECONDS
    errors = 0
    while True:
        try:
            return await asyncssh.connect(settings["host"], settings.get("port", 22), tunnel=proxy, **options)
        except (OSError, asyncssh.Error) as error:
            if UNLIMITED < limit <= errors:
                raise ProviderError(f"{where}: after {errors} failed attempts: {_reason(error, settings)}") from error
        await asyncio.sleep(wait)
        wait = min(wait * WAIT_FACTOR, LONGEST_WAIT_SECONDS)
        errors += 1


def _options(settings: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Return what asyncssh has to know, so that it reads no file of the user who runs this."""
    options: dict[str, Any] = {
        "config": None,
        "username": settings.get("user", "root"),
        "password": settings.get("password"),
        "client_keys": None,
        "known_hosts": None,  # it takes every host key
        "connect_timeout": settings.get("perDialTimeout", 15) or None,
    }
    try:
        if "privateKey" in settings:
            key = asyncssh.import_private_key(settings["privateKey"], settings.get("privateKeyPassword"))
            options |= {"client_keys": [key], "agent_path": None}
    except (asyncssh.KeyImportError, asyncssh.KeyEncryptionError) as error:
        raise ProviderError(f"{where}: privateKey cannot be read: {error}") from None
    if "hostKey" in settings:
        try:
            host_key = asyncssh.import_public_key(settings["hostKey"])
        except asyncssh.KeyImportError as error:
            raise ProviderError(f"{where}: hostKey cannot be read: {error}") from None
        # The official plugin asks for exactly the type of the key. For RSA that is the old ssh-rsa, which servers refuse.
        options |= {"known_hosts": ([host_key], [], []), "server_host_key_algs": [host_key.get_algorithm()]}
    return options


def _reason(error: OSError | asyncssh.Error, settings: Mapping[str, Any]) -> str:
    """Return what happened to a dial, in words."""
    if isinstance(error, asyncssh.HostKeyNotVerifiable):
        return "host key mismatch: the server shows another key than the connection's hostKey"
    if isinstance(error, asyncssh.PermissionDenied):
        return f"unable to authenticate: the server refuses the key or password of user {settings.get('user', 'root')!r}"
    if isinstance(error, asyncssh.Error):
        return str(error)
    if isinstance(error, TimeoutError) and error.errno is None:
        return f"timed out after {settings.get('perDialTimeout', 15)} s"
    if error.errno is not None and error.errno > 0:
        return os.strerror(error.errno).lower()  # asyncio's own text is "Connect call failed"
    return str(error)  # a name that is not known has a negative number; several addresses together have none


class _Session(asyncssh.SSHClientSession[bytes]):
    """What comes back from one command."""

    def __init__(self, environment: Mapping[str, str], optional_environment: Mapping[str, str]) -> None:
        self.output: list[tuple[int | None, bytes]] = []
        self.started = False
        self.ended = asyncio.Event()
        self._environment = environment
        self._optional_environment = optional_environment
        self._channel: Any = None
        self._request: Any = None

    def connection_made(self, chan: Any) -> None:
        # asyncssh sends variables without asking whether the server took them, and has no public way to ask. All its
        # other requests go through this method of the channel, and the first is the one that starts the command.
        self._channel = chan
        self._request = chan._make_request
        chan._make_request = self._request_with_environment

    async def _request_with_environment(self, request: bytes, *arguments: bytes) -> Any:
        for name, value in self._environment.items():
            if not await self._request(b"env", _packed(name), _packed(value)):
                raise ProviderError(
                    f"could not set environment variable {name!r}: ssh: setenv failed: this only works if the SSH server "
                    "is configured to accept it by AcceptEnv"
                )
        for name, value in self._optional_environment.items():
            await self._request(b"env", _packed(name), _packed(value))
        return await self._request(request, *arguments)

    def session_started(self) -> None:
        self.started = True

    def data_received(self, data: bytes, datatype: int | None) -> None:
        self.output.append((datatype, data))

    def connection_lost(self, exc: Exception | None) -> None:
        self.ended.set()

    def text(self, datatype: int | None) -> str:
        """Return one stream as an output of the resource."""
        return b"".join(data for kind, data in self.output if kind == datatype).decode(errors="replace").removesuffix("\n")

    def ending(self) -> str | None:
        """Return how the command failed in the words of Go's SSH library, or None where it did not."""
        status = self._channel.get_exit_status()
        if (by_signal := self._channel.get_exit_signal()) is not None:
            name = by_signal[0]
            number = signal.Signals[f"SIG{name}"] if f"SIG{name}" in signal.Signals.__members__ else 0
            return f"Process exited with status {128 + number} from signal {name}"
        if status is None:
            return "wait: remote command exited without exit status or exit signal"
        return f"Process exited with status {status}" if status else None


def _packed(text: str) -> bytes:
    """Return a string as SSH writes it: RFC 4251, section 5."""
    data = text.encode()
    return len(data).to_bytes(4, "big") + data
