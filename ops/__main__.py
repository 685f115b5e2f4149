"""`python -m ops`: the commands, each in a module of its own that is imported when it is needed."""

from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape

from ops.stack import OpsError, registry_of

# The library would show the values of all variables with a traceback, and passwords are among them.
app = typer.Typer(add_completion=False, rich_markup_mode=None, no_args_is_help=True, pretty_exceptions_enable=False)
console = Console(highlight=False, soft_wrap=True)
Stack = Annotated[str, typer.Option(help="The stack.", envvar="STACK")]


@app.callback()
def main() -> None:
    """Operate a private registry that Pulumi brought up."""


def _failed(error: OpsError) -> typer.Exit:
    console.print(f"[red]✗[/red] {escape(error.what)}")
    console.print(f"  {error.mend}", markup=False)
    return typer.Exit(1)


@app.command()
def verify(
    stack: Stack = "local",
    docker: Annotated[bool, typer.Option("--docker", help="Also push and pull with the Docker daemon.")] = False,
) -> None:
    """Check the registry as a client: name, port, trust, login, push, pull, delete."""
    from ops.verify import Verification

    try:
        with console.status(f"asking the stack {stack}"):
            verification = Verification(registry_of(stack))
        for name, take in verification.steps(docker=docker):
            with console.status(name):
                result = take()
            mark = "[yellow]![/yellow]" if result.warning else "[green]✓[/green]"
            console.print(f"{mark} {result.step:8} {escape(result.said)} [dim]({result.seconds:.2f} s)[/dim]")
    except OpsError as error:
        raise _failed(error) from None


@app.command()
def recover(
    stack: Stack = "local",
    force: Annotated[bool, typer.Option("--force", help="No update runs: clear a lock that cannot be checked.")] = False,
) -> None:
    """Mend the state after an interrupted run; then run `pulumi up`."""
    from ops.recover import recover as mend

    try:
        done = False
        for sentence in mend(stack, force=force):
            done = True
            console.print(f"[green]✓[/green] {escape(sentence)}")
        console.print("Now run `pulumi up`." if done else "Nothing to mend.")
    except OpsError as error:
        raise _failed(error) from None


if __name__ == "__main__":
    app()
