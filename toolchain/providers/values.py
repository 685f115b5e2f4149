"""The engine's values, and their way to plain Python values and back.

Source: sdk/go/common/resource/plugin/rpc.go of Pulumi. The SDK has the same as pulumi.provider.experimental.property_value,
but that takes all of the SDK with it, which a plugin would pay at each start. Assets, resource references and outputs are left
out: the stand-ins have no input of the first kind, and do not accept the others, so that the engine sends plain values for
them.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from google.protobuf import struct_pb2

SIGNATURE = "4dabf18193072939515e22adb298388d"
SECRET = "1b47061264138c4ac30d75fd1eb44270"  # noqa: S105
# What the engine writes for a value of each type that is not known before the update, as one of them has no spelling of
# its own.
UNKNOWN_TEXT = "04da6b54-80e4-46f7-96ec-b56ff0331ba9"
UNKNOWN_TEXTS = frozenset(
    {
        UNKNOWN_TEXT,
        "1c4a061d-8072-4f0a-a4cb-0ff528b18fe7",
        "3eeb2bf0-c639-47a8-9e75-3b44932eb421",
        "6a19a0b0-7e62-4c92-b797-7f8e31da9cc2",
        "030794c1-ac77-496b-92df-f27374a8bd58",
        "e48ece36-62e2-4504-bad9-02848725956a",
        "dd056dcd-154b-4c76-9bd3-c8f88648b5ff",
    }
)


class _Unknown:
    """A value that is not known before the update; it is equal to nothing but itself."""


UNKNOWN = _Unknown()


@dataclass(frozen=True)
class PropertyValue:
    """A value, and whether it is secret. What is in a list or a mapping is a ``PropertyValue`` again."""

    value: Any
    is_secret: bool = False

    @staticmethod
    def computed() -> "PropertyValue":
        """Return one that is not known before the update."""
        return PropertyValue(UNKNOWN)

    def contains_secret(self) -> bool:
        """Tell whether it, or anything inside it, is secret."""
        inside: Any = ()
        if isinstance(self.value, Mapping):
            inside = self.value.values()
        elif isinstance(self.value, list):
            inside = self.value
        return self.is_secret or any(item.contains_secret() for item in inside)

    def marshal(self) -> struct_pb2.Value:
        """Return what the engine reads."""
        value = self.value
        if value is UNKNOWN:
            message = struct_pb2.Value(string_value=UNKNOWN_TEXT)
        elif value is None:
            message = struct_pb2.Value(null_value=struct_pb2.NULL_VALUE)
        elif isinstance(value, bool):
            message = struct_pb2.Value(bool_value=value)
        elif isinstance(value, (int, float)):
            message = struct_pb2.Value(number_value=value)
        elif isinstance(value, str):
            message = struct_pb2.Value(string_value=value)
        elif isinstance(value, Mapping):
            message = struct_pb2.Value(struct_value=self.marshal_map(value))
        elif isinstance(value, list):
            message = struct_pb2.Value(list_value=struct_pb2.ListValue(values=[item.marshal() for item in value]))
        else:
            raise TypeError(f"{type(value).__name__} is no value of the engine")
        if not self.is_secret:
            return message
        fields = {SIGNATURE: struct_pb2.Value(string_value=SECRET), "value": message}
        return struct_pb2.Value(struct_value=struct_pb2.Struct(fields=fields))

    @staticmethod
    def marshal_map(values: "Mapping[str, PropertyValue]") -> struct_pb2.Struct:
        """Return a resource's properties as the engine reads them."""
        return struct_pb2.Struct(fields={key: value.marshal() for key, value in values.items()})

    @classmethod
    def unmarshal(cls, message: struct_pb2.Value) -> "PropertyValue":
        """Return what the engine wrote.

        Raises:
            ValueError: it is of a kind that the stand-ins do not have, such as an asset.
        """
        kind = message.WhichOneof("kind")
        if kind == "struct_value":
            fields = message.struct_value.fields
            if SIGNATURE not in fields:
                return cls(cls.unmarshal_map(message.struct_value))
            if fields[SIGNATURE].string_value != SECRET:
                raise ValueError("the stand-in plugins take no assets or archives: use the official plugin")
            return cls(cls.unmarshal(fields["value"]).value, is_secret=True)
        if kind == "list_value":
            return cls([cls.unmarshal(item) for item in message.list_value.values])
        if kind == "string_value" and message.string_value in UNKNOWN_TEXTS:
            return cls.computed()
        return cls(None if kind is None or kind == "null_value" else getattr(message, kind))

    @classmethod
    def unmarshal_map(cls, message: struct_pb2.Struct) -> "dict[str, PropertyValue]":
        """Return a resource's properties as the engine wrote them."""
        return {key: cls.unmarshal(value) for key, value in message.fields.items()}


def plain(value: PropertyValue) -> Any:
    """Return the Python value without its marks. What is not known is ``UNKNOWN``."""
    inner = value.value
    if isinstance(inner, Mapping):
        return {key: plain(item) for key, item in inner.items()}
    if isinstance(inner, list):
        return [plain(item) for item in inner]
    if isinstance(inner, float) and inner.is_integer():
        return int(inner)
    return inner


def plain_map(values: Mapping[str, PropertyValue]) -> dict[str, Any]:
    """Return the values that are there; the protocol spells an absent one as null."""
    return {key: item for key, value in values.items() if (item := plain(value)) is not None}


def marked(value: Any, *, secret: bool = False) -> PropertyValue:
    """Return a Python value as the engine's."""
    if isinstance(value, Mapping):
        return PropertyValue({key: marked(item) for key, item in value.items()}, is_secret=secret)
    if isinstance(value, (list, tuple)):
        return PropertyValue([marked(item) for item in value], is_secret=secret)
    return PropertyValue(value, is_secret=secret)


def unknown(value: Any) -> bool:
    """Tell whether a plain value, or anything inside it, is not known before the update."""
    if isinstance(value, Mapping):
        return any(unknown(item) for item in value.values())
    if isinstance(value, list):
        return any(unknown(item) for item in value)
    return value is UNKNOWN
