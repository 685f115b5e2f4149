"""The engine's protocol, as the SDK's generated modules have it, without the rest of the SDK.

To import anything below `pulumi` runs `pulumi/__init__.py`, which imports all of the SDK: most of what a plugin costs. The
generated modules need only each other, so this module is a package whose folder is theirs.
"""

from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pulumi.runtime.proto import (
        analyzer_pb2,
        language_pb2,
        language_pb2_grpc,
        plugin_pb2,
        provider_pb2,
        provider_pb2_grpc,
        status_pb2,
    )
else:
    __path__ = [str(Path(find_spec("pulumi").origin).parent / "runtime/proto")]

    from toolchain.protocol import (
        analyzer_pb2,
        language_pb2,
        language_pb2_grpc,
        plugin_pb2,
        provider_pb2,
        provider_pb2_grpc,
        status_pb2,
    )

__all__ = ["analyzer_pb2", "language_pb2", "language_pb2_grpc", "plugin_pb2", "provider_pb2", "provider_pb2_grpc", "status_pb2"]
