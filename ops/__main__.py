"""`python -m ops`: the commands, each in a module of its own that is imported when it is needed."""

import signal
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, TypeVar

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import track
from rich.table import Table

from ops.stack import OpsError, registry_of

if TYPE_CHECKING:
    from ops.trust import Hosts

# The library would show the values of all variables with a traceback, and passwords are among them.
app = typer.Typer(add_completion=False, rich_markup_mode=None, no_args_is_help=True, pretty_exceptions_enable=False)
console = Console(highlight=False, soft_wrap=True)
T = TypeVar("T")
INTERRUPTED = 130  # a shell's code for what Ctrl-C ended
Stack = Annotated[str, typer.Option(help="The stack.", envvar="STACK")]


@app.callback()
def main() -> None:
    """Operate a private registry that Pulumi brought up."""


def _failed(error: OpsError) -> typer.Exit:
    console.print(f"[red]✗[/red] {escape(error.what)}")
    console.print(f"  {error.mend}", markup=False)
    return typer.Exit(error.code)


def _tracked(found: Iterable[T], what: str, total: int) -> Iterable[T]:
    # Where there is no terminal, the library would print an empty line.
    return track(found, what, total, console=console, transient=True) if console.is_terminal else found


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
def trust(
    stack: Stack = "local",
    fix: Annotated[str | None, typer.Option("--fix", metavar="HOST", help="Install on this host of the stack now.")] = None,
) -> None:
    """Show what each host of the stack trusts, and until when; exit 1 where one lacks something."""
    from ops.trust import Hosts

    try:
        with console.status(f"asking the stack {stack}"):
            hosts = Hosts(stack)
        if fix is not None:
            with console.status(f"installing on {fix}"):
                said = hosts.fix(fix)
            console.print(f"[green]✓[/green] {escape(fix)}: {escape(said)}")
            return
        _show_trust(stack, hosts)
    except OpsError as error:
        raise _failed(error) from None


def _show_trust(stack: str, hosts: "Hosts") -> None:
    if not len(hosts):
        console.print(f"The stack {stack} lists no hosts: trust.hosts.")
        return
    found = list(_tracked(hosts.trusts(), "asking the hosts", len(hosts)))
    table = Table("", "host", "runtime", "trusts", "until")
    for one in sorted(found, key=lambda one: one.host):
        mark = "[green]✓[/green]" if one.mend is None else "[red]✗[/red]"
        table.add_row(mark, one.host, one.runtime, escape(one.said), str(one.until or ""))
    console.print(table)
    lacking = [one for one in found if one.mend is not None]
    for one in sorted(lacking, key=lambda one: one.host):
        console.print(f"{one.host}: {one.mend}", markup=False)
    if lacking:
        raise typer.Exit(1)


@app.command()
def report(
    stack: Stack = "local",
    file: Annotated[Path | None, typer.Option("--file", help="What `pulumi preview --json` printed; else it is run.")] = None,
    html: Annotated[Path | None, typer.Option("--html", help="Also write a page with the resources to this file.")] = None,
) -> None:
    """Write what a preview will do as a comment in Markdown; exit 10: needs approval, 20: would lose data, 1: failed."""
    from ops.engine import Run
    from ops.report import Preview, markdown, of_file, of_run, verdict_of

    try:
        preview = of_run(Run("preview", stack)) if file is None else of_file(file)
    except OpsError as error:
        if file is not None:
            raise _failed(error) from None
        # A report, too: on a pull request it has to take the place of an older one.
        preview = Preview([], 0, [f"{error.what}\n{error.mend}"])
    typer.echo(markdown(stack, preview), nl=False)
    if html is not None:
        from ops.page import page

        try:
            html.write_text(page(stack, preview))
        except OSError as error:
            raise _failed(OpsError(f"{html} cannot be written: {error.strerror}.", "Name another file.")) from None
    raise typer.Exit(verdict_of(preview).code)


@app.command()
def rollout(
    stacks: Annotated[list[str], typer.Argument(metavar="STACK", help="The stacks, in their order.")],
    yes_for: Annotated[
        list[str] | None, typer.Option("--yes-for", metavar="STACK", help="Change this stack of production without asking.")
    ] = None,
    allow_data_loss: Annotated[
        list[str] | None,
        typer.Option("--allow-data-loss", metavar="STACK/RESOURCE", help="Delete this resource of this stack with its data."),
    ] = None,
) -> None:
    """Bring stacks up one after the other: preview, policies, approval, up, push and pull; stop at the first thing wrong.

    Stacks next to each other with the same environment.wave go at once. Run again, it goes on where it stopped. Exit 10:
    production was not approved, 20: data would be lost, 1: something failed.
    """
    from ops.progress import RolloutProgress
    from ops.rollout import Rollout

    for number in (signal.SIGTERM, signal.SIGHUP):  # a pipeline that is cancelled, a terminal that is gone
        if signal.getsignal(number) != signal.SIG_IGN:  # as nohup has it
            signal.signal(number, signal.default_int_handler)
    stopped = None
    with RolloutProgress(console) as shown:
        try:
            ask = shown.ask if sys.stdin.isatty() else None
            Rollout(stacks, approved=yes_for or [], losses=allow_data_loss or [], ask=ask, tell=shown.tell).run()
        except OpsError as error:
            stopped = error
        except KeyboardInterrupt:
            words = "Interrupted: what was begun was ended or given up, and nothing more was begun."
            mend = "Run the same command again to go on. Where it fails, `python -m ops recover --stack NAME` first."
            stopped = OpsError(words, mend, INTERRUPTED)
    shown.show_table(stacks)
    if stopped is not None:
        raise _failed(stopped)


@app.command()
def drift(stacks: Annotated[list[str], typer.Argument(metavar="STACK", help="The stacks.")]) -> None:
    """Tell what differs from the stacks, without changing anything; exit 10: something does, 1: something failed.

    Resources, hosts, the days that certificates have left, the room for images, and the image's base.
    """
    from concurrent.futures import ThreadPoolExecutor

    from ops.drift import Kind, findings_of, worst

    marks = {Kind.CLEAN: "[green]✓[/green]", Kind.DRIFT: "[yellow]![/yellow]", Kind.FAILURE: "[red]✗[/red]"}
    everything = []
    with ThreadPoolExecutor(len(stacks)) as pool:
        all_findings = _tracked(pool.map(findings_of, stacks), "looking", len(stacks))
        for stack, findings in zip(stacks, all_findings, strict=True):
            console.print(f"{marks[worst(findings)]} {escape(stack)}: {worst(findings).words}")
            for finding in findings:
                console.print(f"  {marks[finding.kind]} {escape(finding.said)}")
            everything += findings
    raise typer.Exit(worst(everything).code)


@app.command()
def comment(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="What `ops report` printed.")],
    pull_request: Annotated[int, typer.Option("--pull-request", help="The number of the pull or merge request.")],
) -> None:
    """Keep a report as one comment on a pull request, in a job of GitHub or GitLab."""
    from ops.comment import keep

    try:
        console.print(f"[green]✓[/green] {escape(keep(file, pull_request))}")
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


environment = typer.Typer(rich_markup_mode=None, no_args_is_help=True, help="Add an environment to the project.")
app.add_typer(environment, name="environment")


@environment.command()
def new(
    name: Annotated[str, typer.Argument(metavar="NAME", help="Its name, which is the stack's.")],
    said: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="PATH=VALUE", help="Answer, or any other setting: kubernetes.nodePort=32510."),
    ] = None,
    yes: Annotated[bool, typer.Option("--yes", help="Ask nothing: take the default of what is not set.")] = False,
) -> None:
    """Write the stack file of a new environment.

    What is not set is asked. Nothing is written before all of it is right, and none of it clashes with another environment.
    """
    from ops.environment import NewEnvironment, clashes, next_commands, on_terminal

    try:
        made = NewEnvironment(name, said or [])
        if yes:
            made.take_defaults()
        elif on_terminal():
            made.ask()
        else:
            made.require_answers()
        settings = made.write()
    except OpsError as error:
        raise _failed(error) from None
    _, warnings = clashes(settings, made.others)
    for warning in warnings:
        console.print(f"[yellow]![/yellow] {escape(warning)}")
    console.print(f"[green]✓[/green] {escape(made.file.name)} is written. Next:")
    for command in next_commands(name, settings):
        console.print(f"  {command}", markup=False)


if __name__ == "__main__":
    app()
