"""`python -m toolchain`: a Pulumi CLI and its plugins, by the first of three ways that works.

What a shell needs to use them is in `.toolchain/env`, to be read with `. .toolchain/env`.
"""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Annotated

import httpx
import typer
from rich.console import Console

from toolchain.programs import CACHE, KUBERNETES_PLUGIN, PULUMI, ROOT, ToolchainError, build

BIN = ROOT / ".toolchain/bin"
HOME = ROOT / ".toolchain/home"
ENVIRONMENT = ROOT / ".toolchain/env"
OFFICIAL = ROOT / ".toolchain/official"
OLDEST = (3, 214, 0)  # the first that knows replacement_trigger; older ones would leave pods with old certificates
DOWNLOADS = "https://get.pulumi.com/releases/sdk/latest-version"

app = typer.Typer(add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False)


def _plugin_versions() -> dict[str, str]:
    pins = (ROOT / "requirements.txt").read_text()
    return dict(re.findall(r"^pulumi-(?!policy)(\w+)==(\S+)", pins, re.MULTILINE))  # policies need no plugin


def _cli_on_path() -> Path | None:
    """Return a CLI that the user installed, new enough for the SDK."""
    path = os.pathsep.join(entry for entry in os.get_exec_path() if Path(entry) != BIN)
    if (found := shutil.which("pulumi", path=path)) is None:
        return None
    run = subprocess.run([found, "version"], capture_output=True, text=True, check=False)
    match = re.match(r"v?(\d+)\.(\d+)\.(\d+)", run.stdout)
    return Path(found) if match and tuple(map(int, match.groups())) >= OLDEST else None


def _downloads_reachable() -> bool:
    try:
        return httpx.get(DOWNLOADS, timeout=5).is_success
    except httpx.HTTPError:
        return False


def _plugins_installed(cli: Path, *, install: bool) -> bool:
    """Tell whether the CLI has every plugin, after it was asked to install those that are missing."""
    # In a shell that has read .toolchain/env the stand-ins' home would be asked.
    environment = {key: value for key, value in os.environ.items() if (key, value) != ("PULUMI_HOME", str(HOME))}
    listed = subprocess.run([cli, "plugin", "ls", "--json"], env=environment, capture_output=True, text=True, check=False)
    have = {(plugin["name"], plugin["version"]) for plugin in json.loads(listed.stdout or "[]")}
    for name, version in _plugin_versions().items():
        if (name, version) in have:
            continue
        command = [str(cli), "plugin", "install", "resource", name, version]
        if not install or subprocess.run(command, env=environment, capture_output=True, check=False).returncode:
            return False
    return True


def _official() -> Path:
    from pulumi.automation import PulumiCommand

    return Path(PulumiCommand.install(root=str(OFFICIAL)).command)


def _stand_ins(*, official_kubernetes: bool) -> Path:
    """Build the CLI, and put launchers for the stand-ins where the engine looks for its plugins."""
    cli = build(PULUMI)
    # PYTHONPATH is for the plugin alone: the program finds its own modules by its own folder.
    stand_in = f'PYTHONPATH="{ROOT}" exec "{sys.executable}" -m toolchain'
    _launcher(BIN / "pulumi-language-python", f"{stand_in}.language_host")
    for name, version in _plugin_versions().items():
        folder = HOME / f"plugins/resource-{name}-v{version}"
        folder.mkdir(parents=True, exist_ok=True)
        official = official_kubernetes and name == "kubernetes"
        command = f'exec "{build(KUBERNETES_PLUGIN)}"' if official else f"{stand_in}.providers.{name}"
        _launcher(folder / f"pulumi-resource-{name}", command)
    return cli


def _launcher(file: Path, command: str) -> None:
    script = f'#!/bin/sh\n{command} "$@"\n'
    if not file.exists() or file.read_text() != script:
        file.write_text(script)
        file.chmod(0o755)


def _link(cli: Path, *, stand_ins: bool) -> None:
    """Put the CLI into `.toolchain/bin`.

    By a hard link where it can be one: the engine looks for its plugins beside the file that a symbolic link leads to.
    """
    link = BIN / "pulumi"
    if link.exists() and link.samefile(cli):
        return
    link.unlink(missing_ok=True)
    if stand_ins:
        try:
            link.hardlink_to(cli)
        except OSError:
            link.symlink_to(cli)
    else:  # its language host is beside it
        link.symlink_to(cli)


def _environment(cli: Path, *, stand_ins: bool) -> str:
    docker = ROOT / ".lab/env"  # where the lab has a Docker daemon of its own
    lines = [
        f'export PATH="{BIN}:{"" if stand_ins else f"{cli.parent}:"}{Path(sys.executable).parent}:$PATH"',
        "export PULUMI_SKIP_UPDATE_CHECK=true",
        f'if [ -e "{docker}" ]; then . "{docker}"; fi',
    ]
    if stand_ins:  # they must not be found by the user's other projects
        lines.append(f'export PULUMI_HOME="{HOME}"')
    return "".join(f"{line}\n" for line in lines)


@app.command()
def main(
    official_kubernetes: Annotated[
        bool,
        typer.Option(
            "--official-kubernetes",
            help="Take the official kubernetes plugin of January 2026 for the stand-in: builds 7 minutes.",
        ),
    ] = False,
) -> None:
    """Make the toolchain ready, and say in one line where it comes from."""
    BIN.mkdir(parents=True, exist_ok=True)
    console = Console(highlight=False, soft_wrap=True)
    reachable = _downloads_reachable()
    try:
        if (cli := _cli_on_path()) and _plugins_installed(cli, install=reachable):
            way = f"the Pulumi CLI on PATH, {cli}, with the official plugins"
        elif reachable and (cli := _official()) and _plugins_installed(cli, install=True):
            way = "the official Pulumi CLI and plugins, downloaded into .toolchain/"
        else:
            cli = _stand_ins(official_kubernetes=official_kubernetes)
            way = (
                "Pulumi's downloads cannot be reached: the CLI is built from its Go module, and stand-ins serve for the "
                "plugins (for tests and the demo)"
            )
    except ToolchainError as error:
        console.print(f"[red]error[/red] {error}")
        raise typer.Exit(1) from None
    stand_ins = cli.is_relative_to(CACHE)
    if not stand_ins:  # one of an earlier run must not go before the official one
        (BIN / "pulumi-language-python").unlink(missing_ok=True)
    _link(cli, stand_ins=stand_ins)
    ENVIRONMENT.write_text(_environment(cli, stand_ins=stand_ins))
    console.print(f"toolchain: {way}")


if __name__ == "__main__":
    app()
