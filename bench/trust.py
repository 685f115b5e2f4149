"""`python -m bench.trust`: what it costs to have 1, 10 and 50 hosts trust the registry, over as many plain SSH logins at once."""

import functools
import statistics
import subprocess
import tempfile
from pathlib import Path
from typing import Annotated, Any

import docker
import typer
from rich.console import Console
from rich.table import Table

from bench.__main__ import seconds, sub_folder, use_lab_docker
from lab.machines import Machine, Network
from tests.engine.conftest import new_stack
from tests.engine.stack import Stack

HOSTS = (1, 10, 50)
console = Console()


class Logins:
    """The floor: OpenSSH's client runs `true` on all machines at once."""

    def __init__(self, folder: Path, machines: list[Machine]) -> None:
        self._key = folder / "key"
        self._key.touch(mode=0o600)
        self._key.write_text(machines[0].ssh.private_key)
        self._known = folder / "known_hosts"
        self._known.write_text("".join(f"{one.address} {one.ssh.host_key}\n" for one in machines))

    def __call__(self, machines: list[Machine]) -> None:
        options = [f"-oUserKnownHostsFile={self._known}", f"-oIdentityFile={self._key}", "-oBatchMode=yes", "-F/dev/null"]
        running = [subprocess.Popen(["ssh", *options, f"root@{one.address}", "true"]) for one in machines]
        assert [process.wait() for process in running] == [0] * len(machines)


def _entry(network: Network, machine: Machine) -> dict[str, Any]:
    return {**machine.ssh.settings, "runtime": "docker", "resolveTo": network.address}


def _measure(network: Network, stack: Stack, folder: Path, runs: int, table: Table) -> None:
    # One machine is always listed, as a stack without hosts has no SSH key.
    always, *machines = [network.add() for _ in range(1 + max(HOSTS))]
    logins = Logins(folder, machines)
    stack.set("container", address=network.address)
    stack.set_secret("sshPrivateKey", always.ssh.private_key)

    def list_hosts(count: int) -> None:
        entries = [_entry(network, machine) for machine in [always, *machines[:count]]]
        stack.set("trust", docker=False, hostsFile=False, hosts=entries)

    for count in HOSTS:
        added, unchanged, floor = [], [], []
        for _ in range(runs):
            list_hosts(0)
            stack.up()
            list_hosts(count)
            added.append(seconds(stack.up))
            before = sum(machine.ssh.logins for machine in machines)
            unchanged.append(seconds(stack.up))
            assert sum(machine.ssh.logins for machine in machines) == before, "an up without changes logged in"
            floor.append(seconds(functools.partial(logins, machines[:count])))
        first, nothing, plain = map(statistics.median, (added, unchanged, floor))
        ours = first - nothing
        row = f"{first:.2f} s", f"{nothing:.2f} s", f"{ours:.2f} s", f"{plain:.2f} s", f"{ours / plain:.1f}"
        table.add_row(str(count), *row)


def main(runs: Annotated[int, typer.Option(help="Runs of each kind.")] = 3) -> None:
    """Measure, and print a table with the ratios."""
    use_lab_docker()
    columns = "hosts", "up that adds them", "up without changes", "the hosts' share", "logins alone", "ratio"
    table = Table(*columns, title="medians in one run")
    with tempfile.TemporaryDirectory() as folder:
        with (
            Network(sub_folder(folder, "network")) as network,
            new_stack(sub_folder(folder, "stack"), docker.from_env()) as stack,
        ):
            _measure(network, stack, Path(folder), runs, table)
    console.print(table)


if __name__ == "__main__":
    typer.run(main)
