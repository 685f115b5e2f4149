"""`python -m lab`: the real servers that tests and the demo need."""

import typer
from rich.console import Console

from lab import dockerd
from toolchain.programs import ToolchainError

app = typer.Typer(add_completion=False, rich_markup_mode=None, no_args_is_help=True)
console = Console(highlight=False, soft_wrap=True)


@app.command()
def up() -> None:
    """Make sure that a Docker daemon answers and has the registry's base image."""
    try:
        host = dockerd.start()
        own = ": the project's own, ended by `make rm`" if host.endswith(str(dockerd.SOCKET)) else ""
        console.print(f"docker: {host}{own}")
        console.print(f"base image: {dockerd.BASE_IMAGE}, {dockerd.ensure_base_image(host)}")
    except (dockerd.LabError, ToolchainError) as error:
        console.print(f"[red]error[/red] {error}")
        raise typer.Exit(1) from None


@app.command()
def down() -> None:
    """End the project's own Docker daemon; its images and volumes stay."""
    try:
        console.print("docker: ended" if dockerd.stop() else "docker: none of the project's own runs")
    except dockerd.LabError as error:
        console.print(f"[red]error[/red] {error}")
        raise typer.Exit(1) from None


@app.command()
def address() -> None:
    """Print the address of the Docker daemon that answers, or nothing."""
    if host := dockerd.address():
        typer.echo(host)


if __name__ == "__main__":
    app()
