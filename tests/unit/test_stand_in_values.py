"""The stand-ins' values are those of the SDK, which they do not import."""

import subprocess
import sys
from typing import Any

import pytest
from google.protobuf import struct_pb2
from pulumi.provider.experimental import property_value as sdk

from tests.engine.stack import ROOT
from toolchain.providers.values import SIGNATURE, UNKNOWN, UNKNOWN_TEXTS, PropertyValue, marked, plain, plain_map, unknown

VALUES: dict[str, Any] = {
    "none": None,
    "truth": True,
    "whole": 3,
    "fraction": 0.5,
    "text": "a",
    "list": ["a", 1, [], {}],
    "mapping": {"a": {"b": [None, False]}},
}


def of_the_sdk(value: Any, *, secret: bool = False) -> sdk.PropertyValue:
    if isinstance(value, dict):
        return sdk.PropertyValue({key: of_the_sdk(item) for key, item in value.items()}, is_secret=secret)
    if isinstance(value, list):
        return sdk.PropertyValue([of_the_sdk(item) for item in value], is_secret=secret)
    return sdk.PropertyValue(float(value) if type(value) is int else value, is_secret=secret)


@pytest.mark.parametrize("secret", [False, True])
@pytest.mark.parametrize("value", VALUES.values(), ids=VALUES)
def test_values_are_written_and_read_as_the_sdk_does(value: Any, *, secret: bool) -> None:
    message = of_the_sdk(value, secret=secret).marshal()
    assert marked(value, secret=secret).marshal() == message
    read = PropertyValue.unmarshal(message)
    assert (plain(read), read.is_secret) == (value, secret)
    assert type(plain(read)) is type(value)


def test_a_secret_inside_is_found() -> None:
    value = PropertyValue({"list": PropertyValue([PropertyValue("a", is_secret=True)])})
    assert PropertyValue.unmarshal(value.marshal()).contains_secret()
    assert not marked(VALUES).contains_secret()


@pytest.mark.parametrize("text", sorted(UNKNOWN_TEXTS))
def test_what_is_not_known_is_read_and_written(text: str) -> None:
    values = PropertyValue.unmarshal_map(struct_pb2.Struct(fields={"a": struct_pb2.Value(string_value=text)}))
    assert plain_map(values) == {"a": UNKNOWN}
    assert unknown([plain_map(values)])
    (written,) = PropertyValue.marshal_map(values).fields.values()
    assert written.string_value in UNKNOWN_TEXTS


def test_an_absent_value_is_left_out() -> None:
    assert plain_map({"a": marked(None), "b": marked(0)}) == {"b": 0}


def test_another_mark_is_refused() -> None:
    asset = {SIGNATURE: marked("c44067f5952c0a294b673a41bacd8c17"), "text": marked("a")}
    with pytest.raises(ValueError, match="official plugin"):
        PropertyValue.unmarshal(PropertyValue(asset).marshal())


@pytest.mark.parametrize(
    "module", ["language_host", "providers.tls", "providers.docker", "providers.command", "providers.kubernetes"]
)
def test_a_plugin_starts_without_the_sdk(module: str) -> None:
    script = f"import sys, toolchain.{module}; sys.exit('pulumi' in sys.modules or 'cryptography.x509' in sys.modules)"
    subprocess.run([sys.executable, "-c", script], cwd=ROOT, check=True)
