"""What the stand-in providers share: the engine's protocol, so that a resource type is only its rules and its work.

Source: pulumi/proto/pulumi/provider.proto of the Pulumi SDK.
"""

import json
import threading
from collections.abc import Callable, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, ClassVar

import grpc
from google.protobuf import empty_pb2

from toolchain import plugin
from toolchain.protocol import plugin_pb2, provider_pb2, provider_pb2_grpc, status_pb2
from toolchain.providers.values import PropertyValue, marked, plain, plain_map, unknown


class ProviderError(Exception):
    """An operation failed; its text is what the user reads under the resource's name."""


class InitializationError(ProviderError):
    """It was made or changed, but did not become what it should be.

    The engine keeps such a resource in the state, marked as failed, and updates it at the next run.
    """

    def __init__(self, identifier: str, properties: Mapping[str, Any], reasons: Sequence[str]) -> None:
        """Take the outputs, which a resource type gives as plain values, and the sentences that the user reads."""
        super().__init__("\n".join(reasons))
        self.identifier = identifier
        self.properties = properties
        self.reasons = reasons


class ResourceType:
    """One resource type: its rules as class attributes, its work as methods on plain Python values."""

    inputs: ClassVar[frozenset[str]]
    """Every input that the stand-in honours. Another one is refused, so that nothing is left out in silence."""
    defaults: ClassVar[Mapping[str, Any]] = {}
    replace_on: ClassVar[frozenset[str]] = frozenset()
    """Inputs whose change replaces the resource; every other one updates it in place."""
    secret_outputs: ClassVar[frozenset[str]] = frozenset()

    def check(self, inputs: Mapping[str, Any]) -> list[tuple[str, str]]:
        """Return faults as pairs of input and reason. Values that are not known yet are absent."""
        return []

    def computed_inputs(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
        """Return inputs that the plugin itself adds, such as the digest of files that others name."""
        return {}

    def stale(self, state: Mapping[str, Any]) -> list[str]:
        """Return outputs that ask for a replacement by themselves, such as a certificate that is due for renewal."""
        return []

    def kept(self, state: Mapping[str, Any], changed: frozenset[str]) -> frozenset[str]:
        """Return the outputs that an update of these inputs leaves as they are, for the preview of that update."""
        return frozenset()

    def create(self, name: str, inputs: dict[str, Any]) -> tuple[str, dict[str, Any]]:
        """Make it; return its identifier and the outputs that are not inputs."""
        raise NotImplementedError

    def read(self, identifier: str, state: dict[str, Any]) -> dict[str, Any] | None:
        """Return properties that differ from the state, or None where it is gone."""
        return {}

    def update(self, identifier: str, state: dict[str, Any], inputs: dict[str, Any]) -> dict[str, Any]:
        """Change it in place; return the outputs that are not inputs."""
        raise NotImplementedError

    def delete(self, identifier: str, state: dict[str, Any]) -> None:
        """Remove it. It is no error that it is gone already."""


def type_token(urn: str) -> str:
    return urn.split("::")[2].split("$")[-1]


class Servicer(provider_pb2_grpc.ResourceProviderServicer):
    def __init__(self, package: str, types: Mapping[str, ResourceType], stop: threading.Event) -> None:
        self._package = package
        self._types = types
        self._stop = stop

    def _type(self, urn: str, context: grpc.ServicerContext) -> ResourceType:
        token = type_token(urn)
        if token not in self._types:
            context.abort(
                grpc.StatusCode.UNIMPLEMENTED,
                f"the stand-in for the {self._package} plugin has no {token}; it has {', '.join(sorted(self._types))}. "
                "Install the official plugin for the others.",
            )
        return self._types[token]

    def _outputs(
        self, kind: ResourceType, inputs: Mapping[str, PropertyValue], outputs: Mapping[str, Any]
    ) -> dict[str, PropertyValue]:
        made = {key: marked(value, secret=key in kind.secret_outputs) for key, value in outputs.items()}
        return {**inputs, **made}

    def Handshake(self, request: Any, context: Any) -> Any:
        return provider_pb2.ProviderHandshakeResponse(accept_secrets=True)

    def GetPluginInfo(self, request: Any, context: Any) -> Any:
        package = find_spec(f"pulumi_{self._package}")  # found, not imported
        assert package is not None
        assert package.origin is not None
        described = json.loads((Path(package.origin).parent / "pulumi-plugin.json").read_text())
        return plugin_pb2.PluginInfo(version=described["version"])

    def CheckConfig(self, request: Any, context: Any) -> Any:
        return provider_pb2.CheckResponse(inputs=request.news)

    def DiffConfig(self, request: Any, context: Any) -> Any:
        return provider_pb2.DiffResponse(changes=provider_pb2.DiffResponse.DIFF_NONE)

    def Configure(self, request: Any, context: Any) -> Any:
        return provider_pb2.ConfigureResponse(acceptSecrets=True, supportsPreview=True)

    def Check(self, request: Any, context: Any) -> Any:
        kind = self._type(request.urn, context)
        news = PropertyValue.unmarshal_map(request.news)
        for key, default in kind.defaults.items():
            if key not in news or news[key].value is None:
                news[key] = marked(default)
        inputs = plain_map(news)
        known = {key: value for key, value in inputs.items() if not unknown(value)}
        news.update({key: marked(value) for key, value in kind.computed_inputs(known).items()})
        faults = [
            (key, f"the stand-in plugin does not know the input {key!r} of {type_token(request.urn)}")
            for key in inputs
            if key not in kind.inputs
        ]
        faults += kind.check(known)
        return provider_pb2.CheckResponse(
            inputs=PropertyValue.marshal_map({key: value for key, value in news.items() if value.value is not None}),
            failures=[provider_pb2.CheckFailure(property=key, reason=reason) for key, reason in faults],
        )

    def Diff(self, request: Any, context: Any) -> Any:
        kind = self._type(request.urn, context)
        olds = plain_map(PropertyValue.unmarshal_map(request.old_inputs))
        news = plain_map(PropertyValue.unmarshal_map(request.news))
        ignored = {path.split(".")[0].split("[")[0] for path in request.ignoreChanges}
        changed = sorted(
            key
            for key in olds.keys() | news.keys()
            if key not in ignored and (unknown(news.get(key)) or olds.get(key) != news.get(key))
        )
        replaces = [key for key in changed if key in kind.replace_on]
        stale = kind.stale(plain_map(PropertyValue.unmarshal_map(request.olds)))
        detailed = {}
        for key in changed:
            change = "ADD" if key not in olds else "DELETE" if key not in news else "UPDATE"
            change += "_REPLACE" if key in kind.replace_on else ""
            detailed[key] = provider_pb2.PropertyDiff(kind=provider_pb2.PropertyDiff.Kind.Value(change), inputDiff=True)
        for key in stale:
            detailed[key] = provider_pb2.PropertyDiff(kind=provider_pb2.PropertyDiff.UPDATE_REPLACE)
        return provider_pb2.DiffResponse(
            changes=provider_pb2.DiffResponse.DIFF_SOME if detailed else provider_pb2.DiffResponse.DIFF_NONE,
            replaces=[*replaces, *stale],
            diffs=[*changed, *stale],
            detailedDiff=detailed,
            hasDetailedDiff=True,
        )

    def Create(self, request: Any, context: Any) -> Any:
        kind = self._type(request.urn, context)
        inputs = PropertyValue.unmarshal_map(request.properties)
        if request.preview:  # an output that is left out is unknown to the program
            known = {key: value for key, value in inputs.items() if not unknown(plain(value))}
            return provider_pb2.CreateResponse(properties=PropertyValue.marshal_map(known))
        name = request.urn.split("::")[-1]
        with Reported(context, inputs, lambda outputs: self._outputs(kind, inputs, outputs)):
            identifier, outputs = kind.create(name, plain_map(inputs))
        properties = self._outputs(kind, inputs, outputs)
        return provider_pb2.CreateResponse(id=identifier, properties=PropertyValue.marshal_map(properties))

    def Read(self, request: Any, context: Any) -> Any:
        kind = self._type(request.urn, context)
        state = PropertyValue.unmarshal_map(request.properties)
        inputs = PropertyValue.unmarshal_map(request.inputs)
        with Reported(context):
            found = kind.read(request.id, plain_map(state))
        if found is None:
            return provider_pb2.ReadResponse()
        now = {key: marked(value, secret=key in kind.secret_outputs) for key, value in found.items()}
        inputs.update({key: value for key, value in now.items() if key in kind.inputs})
        return provider_pb2.ReadResponse(
            id=request.id,
            properties=PropertyValue.marshal_map({**state, **now}),
            inputs=PropertyValue.marshal_map(inputs),
        )

    def Update(self, request: Any, context: Any) -> Any:
        kind = self._type(request.urn, context)
        state = PropertyValue.unmarshal_map(request.olds)
        inputs = PropertyValue.unmarshal_map(request.news)
        if request.preview:
            before, now = plain_map(state), plain_map(inputs)
            changed = frozenset(key for key in kind.inputs if before.get(key) != now.get(key))
            kept = {key: state[key] for key in kind.kept(before, changed) if key in state}
            known = {key: value for key, value in inputs.items() if not unknown(plain(value))}
            return provider_pb2.UpdateResponse(properties=PropertyValue.marshal_map({**kept, **known}))
        with Reported(context, inputs, lambda outputs: self._outputs(kind, inputs, outputs)):
            outputs = kind.update(request.id, plain_map(state), plain_map(inputs))
        return provider_pb2.UpdateResponse(properties=PropertyValue.marshal_map(self._outputs(kind, inputs, outputs)))

    def Delete(self, request: Any, context: Any) -> Any:
        kind = self._type(request.urn, context)
        with Reported(context):
            kind.delete(request.id, plain_map(PropertyValue.unmarshal_map(request.properties)))
        return empty_pb2.Empty()

    def Cancel(self, request: Any, context: Any) -> Any:
        self._stop.set()
        return empty_pb2.Empty()


class Reported:
    """Turn an error into the one sentence that the engine prints, without a traceback where we foresaw it."""

    def __init__(
        self,
        context: grpc.ServicerContext,
        inputs: Mapping[str, PropertyValue] | None = None,
        complete: Callable[[Mapping[str, Any]], Mapping[str, PropertyValue]] | None = None,
    ) -> None:
        """Take what the state of a resource that failed its initialization needs: inputs, and a maker of outputs."""
        self._context = context
        self._inputs = inputs or {}
        self._complete = complete

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: Any, error: BaseException | None, traceback: Any) -> None:
        if isinstance(error, InitializationError) and self._complete:
            detail = provider_pb2.ErrorResourceInitFailed(
                id=error.identifier,
                properties=PropertyValue.marshal_map(dict(self._complete(error.properties))),
                inputs=PropertyValue.marshal_map(dict(self._inputs)),
                reasons=error.reasons,
            )
            status = status_pb2.Status(code=grpc.StatusCode.UNKNOWN.value[0], message=str(error))
            status.details.add().Pack(detail)
            # How gRPC carries details beside the text: https://grpc.io/docs/guides/error/#richer-error-model
            self._context.set_trailing_metadata((("grpc-status-details-bin", status.SerializeToString()),))
        if isinstance(error, ProviderError):
            self._context.abort(grpc.StatusCode.UNKNOWN, str(error))
        if isinstance(error, Exception):
            self._context.abort(grpc.StatusCode.UNKNOWN, f"{type(error).__name__}: {error}")


def serve(package: str, types: Mapping[str, ResourceType], servicer: type[Servicer] = Servicer) -> None:
    """Serve one plugin until the engine cancels it or ends."""
    stop = threading.Event()
    served = servicer(package, types, stop)
    plugin.serve(lambda server: provider_pb2_grpc.add_ResourceProviderServicer_to_server(served, server), stop)
