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
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from importlib.metadata import distributions
from pathlib import Path
from typing import Any

import grpc

from toolchain import plugin
from toolchain.protocol import analyzer_pb2, language_pb2, language_pb2_grpc, plugin_pb2


def _packages() -> Iterator[plugin_pb2.PackageDependency]:
    """Every installed package that says in its pulumi-plugin.json that it needs a plugin."""
    for file in Path(sysconfig.get_path("purelib")).glob("*/pulumi-plugin.json"):
        needed = json.loads(file.read_text())
        if needed.get("resource"):
            yield plugin_pb2.PackageDependency(name=needed["name"], kind="resource", version=needed["version"])


class PolicyPack(grpc.GenericRpcHandler):
    """Stands between the engine and a policy pack, which reads the stack's configuration from its environment.

    So the pack can start only when the engine has said that configuration. From then on every call is handed on as it is.
    Source: sdk/policy_proxy.go of Pulumi.
    """

    def __init__(self) -> None:
        self._configuration: Future[Any] = Future()
        self._pack: Future[grpc.Channel] = Future()
        self._options = [("grpc.max_receive_message_length", plugin.MESSAGE_LIMIT)]
        self._server = grpc.server(ThreadPoolExecutor(), handlers=[self], options=self._options)
        self.port = self._server.add_insecure_port("127.0.0.1:0")
        self._server.start()

    def service(self, handler_call_details: grpc.HandlerCallDetails) -> Any:
        """Answer any method; without functions that read and write messages, they are bytes."""
        method = handler_call_details.method

        def answer(request: bytes, context: grpc.ServicerContext) -> bytes:
            if method.endswith("/Handshake"):
                return b""
            if method.endswith("/ConfigureStack"):
                self._configuration.set_result(analyzer_pb2.AnalyzerStackConfigureRequest.FromString(request))
                return b""
            try:
                return _call(self._pack.result(), method, request)
            except grpc.RpcError as error:
                context.abort(error.code(), error.details() or "")

        return grpc.unary_unary_rpc_method_handler(answer)

    def environment(self) -> dict[str, str]:
        """Wait for the stack's configuration, and return it as the pack reads it."""
        stack = self._configuration.result()
        return {
            "PULUMI_ORGANIZATION": stack.organization,
            "PULUMI_PROJECT": stack.project,
            "PULUMI_STACK": stack.stack,
            "PULUMI_DRY_RUN": "true" if stack.dry_run else "false",
            "PULUMI_CONFIG": json.dumps(dict(stack.config)),
        }

    def attach(self, port: bytes) -> None:
        """Hand the engine's calls to the pack that serves on a port; without one it has ended, and has said why."""
        if not port:
            self._pack.set_exception(RuntimeError("the policy pack ended before it served; see what it said"))
            return
        channel = grpc.insecure_channel(f"127.0.0.1:{int(port)}", self._options)
        _call(channel, "/pulumirpc.Analyzer/ConfigureStack", self._configuration.result().SerializeToString())
        self._pack.set_result(channel)

    def close(self) -> None:
        self._server.stop(None)


def _call(channel: grpc.Channel, method: str, request: bytes) -> bytes:
    call: Any = channel.unary_unary(method)
    answer: bytes = call(request)
    return answer


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
        response = LanguageServer(program).Run(request, context)  # type: ignore[no-untyped-call]
        # It has told the engine why already, which would say it a second time.
        return language_pb2.RunResponse(bail=True) if response.error else response

    def RunPlugin(self, request: Any, context: Any) -> Iterator[Any]:
        environment = dict(entry.split("=", 1) for entry in request.env)
        if request.kind == "analyzer":
            pack = PolicyPack()
            context.add_callback(pack.close)
            yield language_pb2.RunPluginResponse(stdout=b"%d\n" % pack.port)
            command = [sys.executable, "-u", "-m", "pulumi.policy", *request.args, request.info.program_directory]
            process = _start(command, request.pwd, {**environment, **pack.environment()}, context)
            assert process.stdout is not None
            assert process.stderr is not None
            if not (port := process.stdout.readline()):
                # First, as the engine no longer listens when it has heard of the failure.
                yield language_pb2.RunPluginResponse(stderr=process.stderr.read())
            pack.attach(port)
        else:
            command = [sys.executable, "-u", request.info.program_directory, *request.args]
            process = _start(command, request.pwd, environment, context)
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


def _start(command: Sequence[str], folder: str, environment: Mapping[str, str], context: Any) -> subprocess.Popen[bytes]:
    # Without a buffer, what follows the first line is not read with it.
    process = subprocess.Popen(command, cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, bufsize=0)
    context.add_callback(process.terminate)
    return process


def main() -> None:
    """Serve until the engine is gone."""
    host = LanguageHost(next((word for word in reversed(sys.argv[1:]) if not word.startswith("-")), ""))
    plugin.serve(lambda server: language_pb2_grpc.add_LanguageRuntimeServicer_to_server(host, server), threading.Event())


if __name__ == "__main__":
    main()
