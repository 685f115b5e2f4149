"""Image archives made out of files, for `docker load` and `ctr images import`: without a daemon, and without a pull."""

import hashlib
import io
import json
import tarfile
from pathlib import Path


def _add(archive: tarfile.TarFile, name: str, data: bytes, mode: int) -> None:
    entry = tarfile.TarInfo(name)
    entry.size, entry.mode = len(data), mode
    archive.addfile(entry, io.BytesIO(data))


def write_image(out: Path, reference: str, entrypoint: list[str], files: dict[str, Path]) -> None:
    """Write an image of one layer, with the files as programs at the root of its file system."""
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w") as archive:
        for name, file in files.items():
            _add(archive, name, file.read_bytes(), 0o755)
    layer = packed.getvalue()
    digest = f"sha256:{hashlib.sha256(layer).hexdigest()}"
    config = json.dumps(
        {
            "architecture": "amd64",
            "os": "linux",
            "config": {"Entrypoint": entrypoint},
            "rootfs": {"type": "layers", "diff_ids": [digest]},
        }
    ).encode()
    manifest = json.dumps([{"Config": "config.json", "RepoTags": [reference], "Layers": ["layer.tar"]}]).encode()
    with tarfile.open(out, "w") as archive:
        for name, data in (("config.json", config), ("layer.tar", layer), ("manifest.json", manifest)):
            _add(archive, name, data, 0o644)
