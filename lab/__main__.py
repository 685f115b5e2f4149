"""`python -m lab`: the real servers that tests and the demo need."""

import contextlib
from collections.abc import Iterator
from enum import StrEnum
from typing import Annotated

import typer
from rich.console import Console

from lab import ceph, dockerd, kubernetes
from lab import nodes as virtual
from lab.debian import LabError
from toolchain.programs import CONTAINERD, ToolchainError, build

app = typer.Typer(add_completion=False, rich_markup_mode=None, no_args_is_help=True, pretty_exceptions_enable=False)
console = Console(highlight=False, soft_wrap=True)


class Server(StrEnum):
    """What the lab has."""

    DOCKER = "docker"
    KUBERNETES = "kubernetes"
    CEPH = "ceph"
    NODES = "nodes"


Which = Annotated[Server, typer.Argument(help="Which of the lab's servers.")]


@contextlib.contextmanager
def _reported() -> Iterator[None]:
    try:
        yield
    except (LabError, ToolchainError) as error:
        console.print(f"[red]error[/red] {error}")
        raise typer.Exit(1) from None


@app.command()
def up(
    server: Which = Server.DOCKER,
    nodes: Annotated[int, typer.Option(help="How many nodes the Kubernetes cluster has.")] = 1,
) -> None:
    """Make sure that a Docker daemon answers and has the registry's base image, or that Kubernetes, Ceph or virtual nodes do."""
    with _reported():
        if server is Server.CEPH:
            console.print(f"ceph: {ceph.up()}")
            return
        if server is Server.KUBERNETES:
            console.print(f"kubernetes: {kubernetes.up(nodes)}")
            return
        if server is Server.NODES:
            console.print(f"nodes: {virtual.LAB.up()}")
            return
        host = dockerd.start()
        own = ": the project's own, ended by `make rm`" if host.endswith(str(dockerd.SOCKET)) else ""
        console.print(f"docker: {host}{own}")
        console.print(f"base image: {dockerd.BASE_IMAGE}, {dockerd.ensure_base_image(host)}")


@app.command()
def prepare() -> None:
    """Install and build what the tests' servers need, without starting them: minutes, once."""
    with _reported():
        kubernetes.prepare()
        ceph.prepare()
        build(CONTAINERD)


@app.command()
def down(server: Which = Server.DOCKER) -> None:
    """End the project's own Docker daemon, whose images and volumes stay; or its Kubernetes or Ceph: nothing of it stays."""
    with _reported():
        if server is Server.CEPH:
            console.print("ceph: ended" if ceph.down() else "ceph: there is none")
        elif server is Server.NODES:
            console.print("nodes: ended" if virtual.LAB.down() else "nodes: there are none")
        elif server is Server.KUBERNETES:
            console.print("kubernetes: ended" if kubernetes.down() else "kubernetes: there is none")
        else:
            console.print("docker: ended" if dockerd.stop() else "docker: none of the project's own runs")


@app.command()
def status() -> None:
    """Say what runs."""
    console.print(f"docker: {dockerd.address() or 'none answers'}")
    if not (processes := kubernetes.status()):
        console.print("kubernetes: there is none")
    for process in processes:
        console.print(f"kubernetes: {process.box} {process.name}: {_state(process)}")
    for process in virtual.LAB.status():
        console.print(f"nodes: {process.box} {process.name}: {_state(process)}")
    if not (servers := ceph.status()):
        console.print("ceph: there is none")
    for process_of_ceph in servers:
        console.print(f"ceph: {process_of_ceph.name}: {_state(process_of_ceph)}")


def _state(process: kubernetes.Status | ceph.Status) -> str:
    return f"process {process.pid}, {process.megabytes} MB" if process.pid else "[red]ended[/red]"


@app.command()
def address(server: Which = Server.DOCKER) -> None:
    """Print the address of the Docker daemon that answers, or the path of the kubeconfig or the ceph.conf; or nothing."""
    addresses = {
        Server.DOCKER: dockerd.address,
        Server.KUBERNETES: kubernetes.address,
        Server.CEPH: ceph.address,
        Server.NODES: virtual.LAB.address,
    }
    found = addresses[server]()
    if found:
        typer.echo(found)


if __name__ == "__main__":
    app()
