"""`ops trust`: what every host of the stack trusts, and until when; and the install on one host now."""

import datetime
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass

from cryptography import x509
from cryptography.hazmat.primitives.hashes import SHA256

from ops.ssh import Finished, run
from ops.stack import OpsError, registry_of, settings_of
from ops.verify import AUTHORITY_WARNING_DAYS
from settings import PROJECT, TrustHost

AT_ONCE = 32
INSTALL = "Run `python -m ops trust --fix {host}`."


@dataclass(frozen=True)
class Trust:
    """What was found on one host."""

    host: str
    runtime: str
    said: str
    """What it trusts, in words."""
    until: datetime.date | None
    """The day on which the last of the authorities that it trusts ends."""
    mend: str | None
    """What to do; None where all is well."""


class Hosts:
    """The hosts of a stack's `trust.hosts`, asked over SSH with the stack's own key."""

    def __init__(self, stack: str) -> None:
        """Ask the stack.

        Raises:
            OpsError: it is not up, or its settings have faults.
        """
        self._stack = stack
        self._settings, self._secrets = settings_of(stack)
        self._registry = registry_of(stack)
        if self._settings.address != self._registry.address:
            raise OpsError(
                f"The stack's file says {self._settings.address}, but the registry is at {self._registry.address}.",
                f"Run `pulumi up --stack {stack}` first.",
            )

    def __len__(self) -> int:
        return len(self._settings.trust.hosts)

    def trusts(self) -> Iterator[Trust]:
        """Ask all hosts at once, and yield what was found as they answer."""
        with ThreadPoolExecutor(AT_ONCE) as pool:
            for answer in as_completed(pool.submit(self._trust, host) for host in self._settings.trust.hosts):
                yield answer.result()

    def fix(self, address: str) -> str:
        """Run the install on one host, and return what it said.

        Raises:
            OpsError: the stack does not list the host, it cannot be reached, or the install failed.
        """
        hosts = {host.address: host for host in self._settings.trust.hosts}
        if address not in hosts:
            raise OpsError(
                f"The stack {self._stack} does not list {address}.", f"It has {', '.join(hosts) or 'no hosts'}: trust.hosts."
            )
        done = self._run(hosts[address], "install")
        if done.code:
            raise OpsError(f"{address}: {done.stderr.strip()}", "Mend that, and run this again.")
        return done.stdout.strip()

    def _run(self, host: TrustHost, verb: str) -> Finished:
        # Only here, as it imports Pulumi's SDK.
        from components.trust import host_command, host_script

        # The engine takes an organization before the name, too.
        owner = f"{PROJECT}/{self._stack.rpartition('/')[2]}"
        script = host_script(self._settings, owner, host, self._registry.authority)
        return run(host, self._secrets["sshPrivateKey"], host_command(host, verb), stdin=script)

    def _trust(self, host: TrustHost) -> Trust:
        try:
            done = self._run(host, "status")
        except OpsError as error:
            return Trust(host.address, host.runtime, error.what, None, error.mend)
        if done.code:
            return Trust(host.address, host.runtime, done.stderr.strip(), None, "Mend that on the host.")
        said, until, mend = judged(done.stdout, self._registry.authority)
        return Trust(host.address, host.runtime, said, until, None if mend is None else mend.format(host=host.address))


def judged(status: str, authority: str) -> tuple[str, datetime.date | None, str | None]:
    """Return in words what a host's status says, the day until which it trusts, and what to do about it.

    Args:
        status: what `hosts/trust.sh status` printed.
        authority: the authorities that the stack wants trusted, in PEM.
    """
    facts = dict(line.partition(" ")[::2] for line in status.partition("-----BEGIN")[0].splitlines())
    if facts["trust"] == "absent":
        return "not all that it needs for this registry", None, INSTALL
    if facts["trust"] == "foreign":
        return f"what another has put into {facts['folder']}", None, "Move that away, then run `pulumi up`."
    try:
        there, wanted = _certificates(status), _certificates(authority)
    except ValueError:
        return "a file that cannot be read", None, INSTALL
    names = ", ".join(sorted(one.subject.rfc4514_string().removeprefix("CN=") for one in there.values()))
    until = max(one.not_valid_after_utc for one in there.values()).date()
    handshake, _, why = facts["handshake"].partition(" ")
    but, mend = "", None
    if there.keys() != wanted.keys():
        but, mend = "which is not what the stack says", INSTALL
    elif "config_path" in facts:
        but = f"but containerd's config_path is {facts['config_path']}"
        mend = "Set config_path there and restart containerd, or write restart for the host and run `pulumi up`."
    elif handshake == "failed":
        but, mend = f"but cannot use the registry: {why}", "See that the name resolves there and nothing is in the way."
    elif (until - datetime.datetime.now(datetime.UTC).date()).days < AUTHORITY_WARNING_DAYS:
        but, mend = "which ends soon", "Begin the change to a new authority: docs/trust.md."
    elif handshake == "untried":
        but = why
    return ", ".join(filter(None, (names, but))), until, mend


def _certificates(pem: str) -> dict[bytes, x509.Certificate]:
    """Return certificates by their fingerprints."""
    return {one.fingerprint(SHA256()): one for one in x509.load_pem_x509_certificates(pem.encode())}
