"""`rbd map` and `rbd unmap` for machines whose kernel has no client of Ceph, with rbd-fuse and a loop device.

`lab/rbd`, which stands before the real `rbd` in the PATH of a Ceph host (see `lab.ceph.Ceph.environment`), runs `main`.
`map`, `unmap` and the list of devices take the options of the real ones and end with their return codes; a `resize` is also
made known to the devices, as the kernel's client would; everything else is the real one's. In the folder that the variable
names is a folder of every image, `POOL/IMAGE`, with rbd-fuse's record and log and with `mount`, where the image is a file.
"""

import contextlib
import errno
import fcntl
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from lab.boxes import ENVIRONMENT, Recorded, last_lines, run, wait
from lab.debian import LabError

PROGRAM = Path(__file__).with_name("rbd")
FOLDER_VARIABLE = "RBD_SHIM_DIR"
REAL = "/usr/bin/rbd"
# The store holds a client that was killed for alive for half a minute, and another one waits for it.
START_SECONDS = 60
END_SECONDS = 60

COMMANDS = {"map": "map", "unmap": "unmap", "list": "list", "ls": "list"}
# Options without a value; every other one has one: also a setting of Ceph's, such as --client_mount_timeout.
FLAGS = {"--read-only", "--exclusive", "--quiesce", "--show-cookie", "--pretty-format", "--no-progress", "--help", "--version"}
LETTERS = {"-p": "--pool", "-o": "--options", "-t": "--device-type", "-h": "--help", "-v": "--version"}
# What is about mapping; every other option says how to reach the cluster.
MAPPING = {"--pool", "--namespace", "--image", "--snap", "--options", "--device-type", "--format", "--cookie", "--quiesce-hook"}


class RefusedError(Exception):
    """What the real `rbd` would refuse, with the return code that it would end with."""

    def __init__(self, code: int, text: str) -> None:
        super().__init__(text)
        self.code = code


@dataclass(frozen=True)
class Image:
    """An image, and the folder with all folders of images."""

    root: Path
    pool: str
    name: str

    @property
    def folder(self) -> Path:
        return self.root / self.pool / self.name

    @property
    def mount(self) -> Path:
        """Return where rbd-fuse shows the image."""
        return self.folder / "mount"

    @property
    def file(self) -> Path:
        """Return the image as a file."""
        return self.mount / self.name

    @property
    def server(self) -> Recorded:
        """Return the image's rbd-fuse."""
        return Recorded(self.folder / "pid")

    def devices(self) -> list[str]:
        """Return the devices that the image is mapped to."""
        return [device for device, file in _devices(self.root).items() if file == self.file]


def main(arguments: list[str]) -> int:
    """Do what `rbd` with these arguments does, and return its code."""
    words, options = _parse(arguments)
    kind = options.get("--device-type", "krbd")
    command = ""
    if not {"--help", "--version"} & options.keys() and kind == "krbd":
        if words[:1] == ["device"] and len(words) > 1:
            command, words = COMMANDS.get(words[1], ""), words[2:]
        elif words[:1] == ["showmapped"] or words[:1] in (["map"], ["unmap"]):
            command, words = COMMANDS.get(words[0], "list"), words[1:]
    if not command and "resize" not in words[:1]:
        os.execv(REAL, [REAL, *arguments])  # noqa: S606
    if not (folder := os.environ.get(FOLDER_VARIABLE)):
        sys.stderr.write(f"rbd: {FOLDER_VARIABLE} is not set: run this with the environment of lab.ceph.Ceph\n")
        return errno.EINVAL
    root = Path(folder)
    root.mkdir(parents=True, exist_ok=True)
    try:
        with (root / "lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if command == "map":
                sys.stdout.write(f"{_map(_image(root, words, options), options)}\n")
            elif command == "unmap":
                _unmap(root, _device(root, words, options))
            elif command == "list":
                sys.stdout.write(_list(root, options))
            else:
                return _resize(root, arguments)
    except RefusedError as refused:
        sys.stderr.write(f"{refused}\n" if str(refused) else "")
        return refused.code
    except LabError as error:
        sys.stderr.write(f"rbd: {error}\n")
        return errno.EIO
    return 0


def processes(root: Path) -> dict[str, Recorded]:
    """Return every rbd-fuse that was started, by its image."""
    return {str(file.parent.relative_to(root)): Recorded(file) for file in sorted(root.glob("*/*/pid"))}


def release(root: Path) -> None:
    """End everything that is mapped, and mounted from it, without writing anything.

    Raises:
        LabError: something is still in use.
    """
    # Without its server everything that waits for the image goes on with an error, also where there is no cluster any more.
    for server in processes(root).values():
        if (pid := server.pid) is not None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        server.ends(END_SECONDS)
    for device in _devices(root):
        number = Path(f"/sys/block/{Path(device).name}/dev").read_text().strip()
        for mounted, place in reversed(_mounts()):
            if mounted == number:
                run(["umount", "--lazy", place])
        subprocess.run(["losetup", "--detach", device], env=ENVIRONMENT, capture_output=True, check=False)
    if not wait(lambda: not _devices(root), END_SECONDS):
        used = ", ".join(_devices(root))
        raise LabError(f"{used} of {root} is in use: end what has it open or mounted, then try again.")
    for _, place in reversed(_mounts()):
        if Path(place).is_relative_to(root):
            run(["umount", "--lazy", place])


def _parse(arguments: list[str]) -> tuple[list[str], dict[str, str]]:
    """Tell words from options."""
    words, options = [], {}
    rest = iter(arguments)
    for argument in rest:
        if not argument.startswith("-") or argument == "-":
            words.append(argument)
            continue
        name, is_whole, value = argument.partition("=")
        if not argument.startswith("--"):
            name, value = argument[:2], argument[2:]
            name, is_whole = LETTERS.get(name, name), value
        options[name] = value if is_whole or name in FLAGS else next(rest, "")
    return words, options


def _image(root: Path, words: list[str], options: dict[str, str]) -> Image:
    """Return the image that the words or the options name.

    Raises:
        RefusedError: they name none, or something that rbd-fuse cannot show.
    """
    name = options.get("--image") or next(iter(words), "")
    if not name:
        raise RefusedError(errno.EINVAL, "rbd: image name was not specified")
    pool, _, name = name.rpartition("/")
    if "/" in pool or "@" in name or {"--namespace", "--snap"} & options.keys():
        raise RefusedError(errno.EINVAL, "rbd: here only a whole image that is in no namespace can be mapped")
    return Image(root, pool or options.get("--pool", "rbd"), name)


def _device(root: Path, words: list[str], options: dict[str, str]) -> str:
    """Return the mapped device that the words or the options name.

    Raises:
        RefusedError: it is not one, or the image is not mapped.
    """
    if words and words[0].startswith("/dev/"):
        if (device := os.path.realpath(words[0])) in _devices(root):
            return device
        raise RefusedError(errno.EINVAL, f"rbd: '{words[0]}' is not an rbd device\nrbd: unmap failed: (22) Invalid argument")
    if not words and "--image" not in options:
        raise RefusedError(errno.EINVAL, "rbd: unmap requires either image name or device path")
    image = _image(root, words, options)
    if not (devices := image.devices()):
        text = f"rbd: {image.pool}/{image.name}: not a mapped image or snapshot\nrbd: unmap failed: (22) Invalid argument"
        raise RefusedError(errno.EINVAL, text)
    if len(devices) > 1:
        sys.stderr.write(f"rbd: {image.pool}/{image.name}: mapped more than once, unmapping {devices[0]} only\n")
    return devices[0]


def _map(image: Image, options: dict[str, str]) -> str:
    """Map an image and return its device: another one each time, as the kernel does.

    Raises:
        RefusedError: the real `rbd` cannot open the image, for the reason that it has given.
        LabError: rbd-fuse does not show it, or there is no loop device for it.
    """
    # The same options reach the same cluster as the same user; the real one says what is wrong with them.
    reach = [part for name, value in options.items() if name not in MAPPING | FLAGS for part in (name, value)]
    asked = subprocess.run([REAL, *reach, "info", f"{image.pool}/{image.name}"], stdout=subprocess.DEVNULL, check=False)
    if asked.returncode:
        raise RefusedError(asked.returncode, "")
    if image.devices():
        sys.stderr.write(f"rbd: warning: image already mapped as {image.devices()[0]}\n")
    if image.server.pid is None:
        _serve(image, reach)
    read_only = "--read-only" in options or "ro" in options.get("--options", "").split(",")
    command = ["losetup", "--find", "--show", *(["--read-only"] if read_only else []), str(image.file)]
    return run(command).strip()


def _serve(image: Image, reach: list[str]) -> None:
    image.mount.parent.mkdir(parents=True, exist_ok=True)
    if any(place == str(image.mount) for _, place in _mounts()):  # what a killed one has left
        run(["umount", "--lazy", str(image.mount)])
    image.mount.mkdir(exist_ok=True)
    log = image.folder / "log"
    # A size that the kernel remembers would be the one before a `resize`.
    command = ["rbd-fuse", "-f", *reach, "-p", image.pool, "-r", image.name, str(image.mount), "-o", "attr_timeout=0"]
    image.server.start(command, log)
    wait(lambda: image.file.exists() or image.server.pid is None, START_SECONDS)
    if image.server.pid is None or not image.file.exists():
        raise LabError(f"rbd-fuse does not show {image.pool}/{image.name}\n{last_lines(log)}")


def _unmap(root: Path, device: str) -> None:
    """Unmap a device once everything that was written to it is in the image.

    Raises:
        RefusedError: it is in use.
        LabError: it cannot be written, or something does not end.
    """
    image = Image(root, *_devices(root)[device].relative_to(root).parts[:2])
    try:
        # Exclusive is what a mount is, in whatever namespace it is.
        opened = os.open(device, os.O_RDONLY | os.O_EXCL)
    except OSError as error:
        raise RefusedError(errno.EBUSY, "rbd: sysfs write failed\nrbd: unmap failed: (16) Device or resource busy") from error
    try:
        if image.server.pid is not None:  # without it there is nowhere to write, and no reason to stay mapped
            os.fsync(opened)
    except OSError as error:
        raise LabError(f"{device} stays mapped, as what was written to it cannot be kept: {error}") from error
    finally:
        os.close(opened)
    run(["losetup", "--detach", device])
    if not wait(lambda: device not in _devices(root), END_SECONDS):
        raise LabError(f"{device} does not go away: end what has it open.")
    if image.devices():
        return
    run(["umount", str(image.mount)])
    # It closes the image at its end, and only then has written everything.
    image.server.ends(END_SECONDS)
    shutil.rmtree(image.folder)


def _list(root: Path, options: dict[str, str]) -> str:
    """Return what the real one prints of what is mapped."""
    rows = []
    for device, file in _devices(root).items():
        pool, name = file.relative_to(root).parts[:2]
        number = device.removeprefix("/dev/loop")
        rows.append({"id": number, "pool": pool, "namespace": "", "name": name, "snap": "-", "device": device})
    if options.get("--format") == "json":
        return json.dumps(rows, separators=(",", ":")) + "\n"
    if not rows:
        return ""
    table = [["id", "pool", "namespace", "image", "snap", "device"], *(list(row.values()) for row in rows)]
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    return "".join("  ".join(map(str.ljust, row, widths)) + "\n" for row in table)


def _resize(root: Path, arguments: list[str]) -> int:
    """Run the real `resize`, and make the new size known to what is mapped."""
    done = subprocess.run([REAL, *arguments], check=False)
    for device, file in _devices(root).items():
        file.stat()  # the loop device believes the size that the kernel was last told
        run(["losetup", "--set-capacity", device])
    return done.returncode


def _devices(root: Path) -> dict[str, Path]:
    """Return the loop devices of images in the folder, and the images' files."""
    found = {}
    for state in sorted(Path("/sys/block").glob("loop*/loop/backing_file")):
        with contextlib.suppress(OSError):  # it has just been detached
            file = Path(state.read_text().removesuffix("\n"))
            if file.is_relative_to(root):
                found[f"/dev/{state.parts[3]}"] = file
    return found


def _mounts() -> list[tuple[str, str]]:
    """Return what is mounted, in its order: the device's number and the place."""
    found = []
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        fields = line.split()
        found.append((fields[2], re.sub(r"\\(\d{3})", lambda code: chr(int(code[1], 8)), fields[4])))
    return found
