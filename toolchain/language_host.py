"""Stand-in for pulumi-language-python: runs the program, policy packs and component packages with this interpreter.

The program runs inside the host, on the SDK's own server for inline programs: no second interpreter has to start. The SDK is
imported with the program, as the engine starts a host for each command that only answers questions, too.
Source: pulumi/proto/pulumi/language.proto of the Pulumi SDK.
"""

import json
import os
import runpy
import select
import subprocess
import sys
import sysconfig
import threading
import traceback
from collections.abc import Iterator
from importlib.metadata import distributions
from pathlib import Path
from typing import Any

import grpc

from toolchain import plugin
from toolchain.protocol import language_pb2, language_pb2_grpc, plugin_pb2


def _packages() -> Iterator[plugin_pb2.PackageDependency]:
    """Every installed package that says in its pulumi-plugin.json that it needs a plugin."""
    for file in Path(sysconfig.get_path("purelib")).glob("*/pulumi-plugin.json"):
        needed = json.loads(file.read_text())
        if needed.get("resource"):
            yield plugin_pb2.PackageDependency(name=needed["name"], kind="resource", version=needed["version"])


class LanguageHost(language_pb2_grpc.LanguageRuntimeServicer):
    def __init__(self, engine_address: str) -> None:
        self._engine_address = engine_address

    def Handshake(self, request: Any, context: Any) -> Any:
        return language_pb2.LanguageHandshakeResponse()

    def GetPluginInfo(self, request: Any, context: Any) -> Any:
        return plugin_pb2.PluginInfo()

    def GetRequiredPackages(self, request: Any, context: Any) -> Any:
        return language_pb2.GetRequiredPackagesResponse(packages=list(_packages()))

    def GetProgramDependencies(self, request: Any, context: Any) -> Any:
        found = [language_pb2.DependencyInfo(name=d.name, version=d.version) for d in distributions()]
        return language_pb2.GetProgramDependenciesResponse(dependencies=found)

    def InstallDependencies(self, request: Any, context: Any) -> Iterator[Any]:
        requirements = Path(request.info.program_directory) / "requirements.txt"
        if not requirements.exists():
            return
        command = [sys.executable, "-m", "pip", "install", "--quiet", "-r", str(requirements)]
        run = subprocess.run(command, capture_output=True, check=False)
        yield language_pb2.InstallDependenciesResponse(stdout=run.stdout, stderr=run.stderr)
        if run.returncode:
            context.abort(grpc.StatusCode.UNKNOWN, f"pip install -r {requirements} failed, see above")

    def Run(self, request: Any, context: Any) -> Any:
        import pulumi
        from pulumi.automation._server import LanguageServer

        directory = request.info.program_directory
        os.chdir(directory)
        sys.path.insert(0, directory)
        entry = Path(directory, request.info.entry_point, "__main__.py")

        def program() -> None:
            try:
                runpy.run_path(str(entry), run_name="__main__")
            except pulumi.RunError:
                raise
            except Exception as error:
                raise pulumi.RunError(f"the program failed: {error}\n{traceback.format_exc()}") from error

        request.args[:] = [self._engine_address]
        return LanguageServer(program).Run(request, context)  # type: ignore[no-untyped-call]

    def RunPlugin(self, request: Any, context: Any) -> Iterator[Any]:
        command = [sys.executable, "-u", request.info.program_directory, *request.args]
        environment = dict(entry.split("=", 1) for entry in request.env)
        process = subprocess.Popen(command, cwd=request.pwd, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        context.add_callback(process.terminate)
        open_streams = [stream for stream in (process.stdout, process.stderr) if stream is not None]
        while open_streams:
            for stream in select.select(open_streams, [], [])[0]:
                if not (chunk := os.read(stream.fileno(), 65536)):
                    open_streams.remove(stream)
                elif stream is process.stdout:
                    yield language_pb2.RunPluginResponse(stdout=chunk)
                else:
                    yield language_pb2.RunPluginResponse(stderr=chunk)
        yield language_pb2.RunPluginResponse(exitcode=process.wait())


def main() -> None:
    """Serve until the engine is gone."""
    host = LanguageHost(next((word for word in reversed(sys.argv[1:]) if not word.startswith("-")), ""))
    plugin.serve(lambda server: language_pb2_grpc.add_LanguageRuntimeServicer_to_server(host, server), threading.Event())


if __name__ == "__main__":
    main()
