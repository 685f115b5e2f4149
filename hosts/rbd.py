"""Make, grow, look at and release a Ceph RBD image, on a host that has the programs `rbd` and `ceph` and an admin's key.

    python3 - ensure|release|status|user OPTIONS <rbd.py

Safe to run again after an interruption at any point, and safe under two runs at once. It never shrinks an image, never
formats what holds anything, and never changes an image that is open elsewhere or is not the stack's own. Each prints one
line of JSON, but for `user`, which prints the user's key alone. A refusal is one sentence on stderr with what to do, and an
exit code of its own (see EXIT_CODES). Python 3.6 or newer, without any package, as `ceph` itself needs it.

Return codes and traps of the programs: https://docs.ceph.com/en/latest/man/8/rbd/, and measured on Ceph 16.2.
"""

import argparse
import contextlib
import datetime
import errno
import fcntl
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from typing import Any, Dict, Iterator, List, NoReturn, Optional

EXIT_CODES = {
    "no-program": 10,
    "unreachable": 11,
    "not-allowed": 12,
    "no-pool": 13,
    "foreign": 14,
    "other-stack": 15,
    "shrink": 16,
    "in-use": 17,
    "in-trash": 18,
    "full": 19,
    "unsuitable": 20,
    "busy": 21,
    "has-snapshots": 22,
    "half-deleted": 23,
    "other-rights": 24,
    "failed": 25,
}
# exclusive-lock is what lets a node fence the one that had the image before; more than these is not in every node's kernel.
FEATURES = ("layering", "exclusive-lock")
OWNER = "private-registry.stack"
FILESYSTEM = "private-registry.filesystem"  # of an image that is formatted here: "formatting", then "ext4"
DELETING = "private-registry.deleting"
MIB = 1 << 20
CONNECT_SECONDS = 10
STORE_SECONDS = 60
COMMAND_SECONDS = 300
LOCK_SECONDS = 60
# Another host that creates the image right now has its name for an instant before there is anything to read.
CREATE_SECONDS = 5
# The kubelet lets go of the device a while after the pod is gone; a dead client's watch ends after 30 s.
RELEASE_SECONDS = 90
# Each object of a large image costs a millisecond or more; a store that is silent ends them too, after STORE_SECONDS.
LONG_COMMANDS = ("rm", "diff")
# What is open in every program that is started here: see `locked`.
kept_open = []  # type: List[int]


def refuse(kind: str, sentence: str) -> NoReturn:
    print(sentence, file=sys.stderr)
    sys.exit(EXIT_CODES[kind])


class FailedError(Exception):
    """A program failed: its return code and what it said."""

    def __init__(self, program: str, code: int, said: str) -> None:
        super().__init__("`%s` failed with code %d: %s" % (program, code, said))
        self.code = code
        self.said = said


def run(*command: str) -> str:
    """Run a program of Ceph's, and return what it prints.

    Raises:
        FailedError: it failed otherwise than by not reaching the cluster, or not being let in, which end the script.
    """
    program, rest = command[0], list(command[1:])
    if program == "rbd":
        rest += ["--rados_mon_op_timeout", str(CONNECT_SECONDS), "--client_mount_timeout", str(CONNECT_SECONDS)]
        rest += ["--rados_osd_op_timeout", str(STORE_SECONDS)]
    if program == "ceph":
        rest = ["--connect-timeout", str(CONNECT_SECONDS), *rest]
    name = " ".join(command[:3])
    try:
        done = subprocess.run(
            [program, *rest],
            check=False,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            universal_newlines=True,
            timeout=None if rest[0] in LONG_COMMANDS else COMMAND_SECONDS,
            pass_fds=kept_open,
        )
    except subprocess.TimeoutExpired:
        refuse("unreachable", "`%s` has had no answer for %d s: see `ceph -s` on this host." % (name, COMMAND_SECONDS))
    if done.returncode == 0:
        return done.stdout
    said = " / ".join(line for line in (done.stderr or done.stdout).strip().splitlines()[-3:])
    if program not in ("rbd", "ceph"):  # their codes mean something else
        raise FailedError(name, done.returncode, said)
    lower = said.lower()
    shut_out = "permission denied" in lower or "no keyring" in lower or "handle_auth_bad_method" in lower
    silent = done.returncode == errno.ETIMEDOUT or "timed out" in lower or "error connecting to the cluster" in lower
    if silent and not shut_out:
        refuse("unreachable", "Ceph does not answer this host (%s): see whether its monitors run, then `ceph -s`." % said)
    if shut_out or done.returncode in (errno.EACCES, errno.EPERM):
        refuse("not-allowed", "Ceph does not let this host in (%s): it needs /etc/ceph with an admin's key." % said)
    raise FailedError(name, done.returncode, said)


def parsed(*command: str) -> Any:
    return json.loads(run(*command, "--format", "json") or "null")


class Image:
    """One image, as it is now."""

    def __init__(self, pool: str, name: str) -> None:
        self.pool = pool
        self.name = name
        self.spec = "%s/%s" % (pool, name)
        self.info = None  # type: Any
        self.read()

    def read(self) -> None:
        try:
            self.info = parsed("rbd", "info", self.spec)
        except FailedError as error:
            if error.code != errno.ENOENT:
                raise
            self.info = None

    @property
    def size(self) -> int:
        """Its size in bytes."""
        assert self.info is not None
        return int(self.info["size"])

    @property
    def features(self) -> List[str]:
        assert self.info is not None
        return list(self.info["features"])

    def marks(self) -> Dict[str, str]:
        """Return its metadata, where this script keeps what it knows of it."""
        return dict(parsed("rbd", "image-meta", "list", self.spec) or {})

    def mark(self, key: str, value: str) -> None:
        run("rbd", "image-meta", "set", self.spec, key, value)

    def watchers(self) -> List[str]:
        """Return the addresses of the clients that have it open."""
        found = parsed("rbd", "status", self.spec)["watchers"]
        return sorted({watcher["address"] for watcher in found})

    def snapshots(self) -> List[str]:
        return [snapshot["name"] for snapshot in parsed("rbd", "snap", "ls", self.spec) or []]

    def is_blank(self) -> bool:
        """Tell whether nothing was ever written to it: then it has no objects."""
        return not parsed("rbd", "diff", self.spec)

    def devices(self) -> List[str]:
        """Return the devices as which this host has it mapped."""
        found = parsed("rbd", "device", "list") or []
        found = found.values() if isinstance(found, dict) else found  # a mapping in older releases
        return [
            device["device"]
            for device in found
            if device["pool"] == self.pool
            and device.get("name", device.get("image")) == self.name
            and not device.get("namespace")
            and device.get("snap", "-") in ("", "-")
        ]


def check_pool(pool: str) -> bool:
    """Return whether the pool is full.

    What writes to a full pool does not fail; it waits for room, and nothing would say so. To open an image is such a write.
    """
    pools = {entry["pool_name"]: entry for entry in parsed("ceph", "osd", "pool", "ls", "detail")}
    if pool not in pools:
        refuse(
            "no-pool", "Ceph has no pool %s, only %s: correct storage.rbd.pool, or make it." % (pool, ", ".join(sorted(pools)))
        )
    return "full" in pools[pool]["flags_names"].split(",")  # among them is nearfull or backfillfull before that


@contextlib.contextmanager
def locked(pool: str, image: str) -> Iterator[None]:
    """Let one run at a time work at an image from this host.

    The lock ends with the process, however it ends, and with the programs that it has started: what outlives a run that was
    killed would otherwise map the image, or write to it, behind the next one's back.
    """
    folder = "/run/lock" if os.access("/run/lock", os.W_OK) else tempfile.gettempdir()
    path = "%s/private-registry-%s-%s.lock" % (folder, pool, image)
    with open(path, "a") as lock:
        deadline = time.monotonic() + LOCK_SECONDS
        while True:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > deadline:
                    refuse("busy", "Another run has worked at %s/%s for %d s: wait for it." % (pool, image, LOCK_SECONDS))
                time.sleep(0.2)
        kept_open.append(lock.fileno())
        try:
            yield
        finally:
            kept_open.clear()


def ensure(arguments: argparse.Namespace) -> None:
    """Make the image where it is missing, make it the stack's own, grow it, and format it if this is asked for."""
    if check_pool(arguments.pool):
        refuse("full", "The pool %s is full: make room or raise its quota, see `ceph df`." % arguments.pool)
    with locked(arguments.pool, arguments.image):
        image = Image(arguments.pool, arguments.image)
        done = []  # type: List[str]
        blank = False
        if image.info is None:
            blank = create(image, arguments.size_mib)
            done.append("created")
        check_suitable(image, arguments.size_mib)
        marks = take(image, arguments.owner, adopt=arguments.adopt, blank=blank)
        enable_lock(image)
        if grow(image, arguments.size_mib):
            done.append("grown")
        if arguments.format == "host":
            if format_on_host(image, marks.get(FILESYSTEM), blank=blank):
                done.append("formatted")
        elif marks.get(FILESYSTEM) == "formatting":
            # The node that mounts it formats it now. With the mark, what that node writes would be formatted here one day.
            run("rbd", "image-meta", "remove", image.spec, FILESYSTEM)
        assert image.info is not None
        print(
            json.dumps(
                {
                    "id": image.info["id"],
                    "sizeMiB": image.size // MIB,
                    "features": image.features,
                    "done": done,
                }
            )
        )


def create(image: Image, size_mib: int) -> bool:
    """Create the image, and return whether it was this run that did."""
    trashed = [entry for entry in parsed("rbd", "trash", "list", image.pool) or [] if entry["name"] == image.name]
    if trashed:
        refuse(
            "in-trash",
            "%s is in the trash: restore it with `rbd trash restore %s/%s`, or remove it for good with `rbd trash rm --force "
            "%s/%s`." % (image.spec, image.pool, trashed[0]["id"], image.pool, trashed[0]["id"]),
        )
    try:
        run("rbd", "create", image.spec, "--size", "%dM" % size_mib, "--image-feature", ",".join(FEATURES))
    except FailedError as error:
        if error.code != errno.EEXIST:
            raise
        deadline = time.monotonic() + CREATE_SECONDS
        image.read()  # another host was faster
        while image.info is None:
            if time.monotonic() > deadline:
                refuse_remnant(image)
            time.sleep(0.2)
            image.read()
        return False
    image.read()
    return True


def refuse_remnant(image: Image) -> NoReturn:
    # Not removed by itself: an image whose header alone was lost looks the same, and its name leads to its data.
    refuse(
        "half-deleted",
        "%s is a name without an image, as its creation or deletion was cut off: end that with `rbd rm %s`, then run this again."
        % (image.spec, image.spec),
    )


def check_suitable(image: Image, size_mib: int) -> None:
    """Refuse, before anything changes, what cannot be mounted or would lose data."""
    if "journaling" in image.features:
        refuse(
            "unsuitable",
            "%s has the feature journaling, with which no kernel maps it: disable it with `rbd feature disable %s journaling`."
            % (image.spec, image.spec),
        )
    if image.size > size_mib * MIB:
        size = -(-image.size // MIB)
        refuse(
            "shrink",
            "%s has %d MiB: an image is never shrunk to %d MiB, as that cuts off data; set storage.rbd.sizeMiB to %d or more."
            % (image.spec, size, size_mib, size),
        )


def take(image: Image, owner: str, *, adopt: bool, blank: bool) -> Dict[str, str]:
    """Make sure that the image is the stack's own, or make it so where that takes nothing from anybody; return its marks."""
    marks = image.marks()
    if DELETING in marks:
        refuse(
            "half-deleted",
            "The deletion of %s was cut off, and a part of it is gone: end it with `rbd rm %s`, then run this again."
            % (image.spec, image.spec),
        )
    if marks.get(OWNER) == owner:
        return marks
    if OWNER in marks:
        refuse(
            "other-stack",
            "%s belongs to the stack %s: choose another storage.rbd.image. If that stack is no more, free it with `rbd "
            "image-meta remove %s %s`, and set storage.rbd.adopt: true." % (image.spec, marks[OWNER], image.spec, OWNER),
        )
    watchers = [] if blank else image.watchers()
    if watchers:
        refuse_in_use(image, watchers, "it is not this stack's yet")
    # A run that was cut off between creating and marking leaves an image that was never written to.
    if not (blank or adopt or (not image.snapshots() and image.is_blank())):
        refuse(
            "foreign",
            "%s is there and holds data that is not of this stack: choose another storage.rbd.image, or take it over as it is "
            "with storage.rbd.adopt: true." % image.spec,
        )
    image.mark(OWNER, owner)
    marks = image.marks()
    if marks.get(OWNER) != owner:
        refuse("other-stack", "%s was taken by another stack just now: choose another storage.rbd.image." % image.spec)
    return marks


def enable_lock(image: Image) -> None:
    """Make sure of the feature without which a failover is not safe."""
    if "exclusive-lock" not in image.features:
        watchers = image.watchers()
        if watchers:
            refuse_in_use(image, watchers, "its feature exclusive-lock has to be enabled first")
        run("rbd", "feature", "enable", image.spec, "exclusive-lock")
        image.read()


def grow(image: Image, size_mib: int) -> bool:
    """Grow the image, which may be in use; return whether it had to be."""
    if image.size == size_mib * MIB:
        return False
    run("rbd", "resize", image.spec, "--size", "%dM" % size_mib, "--no-progress")
    image.read()
    return True


def format_on_host(image: Image, state: Optional[str], *, blank: bool) -> bool:
    """Put a filesystem on an image that holds nothing; return whether that was done."""
    if state == "ext4":
        return False
    for program in ("mkfs.ext4", "blkid", "blockdev", "e2fsck"):
        if shutil.which(program) is None:
            refuse(
                "no-program",
                "%s is not on this host: install e2fsprogs and util-linux, or set storage.rbd.format: mount." % program,
            )
    for device in image.devices():  # of a run that was cut off
        unmap(image, device)
    watchers = image.watchers()
    if watchers:
        refuse_in_use(image, watchers, "it has to be formatted first")
    blank = blank or (state is None and image.is_blank())
    if blank:
        image.mark(FILESYSTEM, "formatting")
        state = "formatting"
    device = map_image(image)
    try:
        if not has_whole_filesystem(device):
            if state != "formatting":
                refuse(
                    "foreign",
                    "%s holds something that is not a clean ext4: it is not formatted; look at it by hand." % image.spec,
                )
            run("mkfs.ext4", "-q", "-F", "-m", "0", device)
    finally:
        unmap(image, device)
    image.mark(FILESYSTEM, "ext4")
    return True


def map_image(image: Image) -> str:
    try:
        # Without udevd, as in a container, it would wait for it for ever.
        device = run("rbd", "device", "map", image.spec, "--options", "noudev").strip()
    except FailedError as error:
        refuse(
            "unsuitable",
            "This host cannot map %s (%s): load its module rbd, or set storage.rbd.format: mount, and the node that mounts it "
            "first formats it." % (image.spec, error.said),
        )
    if int(run("blockdev", "--getsize64", device)) != image.size:
        unmap(image, device)
        refuse("failed", "%s, as which %s is mapped, has another size than the image." % (device, image.spec))
    return device


def unmap(image: Image, device: str) -> None:
    try:
        run("rbd", "device", "unmap", device)
    except FailedError as error:
        refuse("in-use", "%s is mapped on this host as %s, and in use (%s): unmount it." % (image.spec, device, error.said))


def has_whole_filesystem(device: str) -> bool:
    """Tell whether the device has an ext4 without faults. It is known to be there, so that no answer means no filesystem."""
    try:
        kind = run("blkid", "--probe", "--match-tag", "TYPE", "--output", "value", device).strip()
    except FailedError as error:
        if error.code != 2:
            raise
        return False
    if kind != "ext4":
        return False
    try:
        run("e2fsck", "-f", "-n", device)
    except FailedError:
        return False
    return True


def refuse_in_use(image: Image, watchers: List[str], why: str) -> NoReturn:
    refuse(
        "in-use",
        "%s is open at %s, and %s: stop what uses it there. The watch of a machine that is dead ends after 30 s."
        % (image.spec, ", ".join(watchers), why),
    )


def release(arguments: argparse.Namespace) -> None:
    """Move the stack's image to the trash, or delete it."""
    is_full = check_pool(arguments.pool)
    with locked(arguments.pool, arguments.image):
        image = Image(arguments.pool, arguments.image)
        if image.info is None and image.name in parsed("rbd", "ls", image.pool):
            image.read()  # another host may have made it just now
            if image.info is None:
                refuse_remnant(image)
        if image.info is None:
            print(json.dumps({"done": [], "said": "%s is not there" % image.spec}))
            return
        if is_full:
            refuse(
                "full",
                "The pool %s is full, so that %s cannot even be removed: raise its quota or, for a moment, `ceph osd "
                "set-full-ratio`, then run this again." % (image.pool, image.spec),
            )
        owner = image.marks().get(OWNER)
        if owner != arguments.owner:
            print(json.dumps({"done": [], "said": "%s is left alone: it belongs to %s" % (image.spec, owner or "no stack")}))
            return
        # `rbd trash mv` takes an image that is in use without a word.
        deadline = time.monotonic() + RELEASE_SECONDS
        watchers = image.watchers()
        while watchers:
            if time.monotonic() > deadline:
                refuse_in_use(image, watchers, "has been for %d s" % RELEASE_SECONDS)
            time.sleep(1)
            watchers = image.watchers()
        if arguments.policy == "trash":
            end = datetime.datetime.utcnow() + datetime.timedelta(days=arguments.trash_days)
            run("rbd", "trash", "move", image.spec, "--expires-at", end.strftime("%Y-%m-%d %H:%M:%S"))
            print(json.dumps({"done": ["trashed"], "until": end.strftime("%Y-%m-%d")}))
            return
        snapshots = image.snapshots()
        if snapshots:
            refuse(
                "has-snapshots",
                "%s has the snapshots %s: it is not deleted with them; remove them, or set storage.onDestroy: trash."
                % (image.spec, ", ".join(snapshots)),
            )
        image.mark(DELETING, "yes")
        run("rbd", "rm", image.spec, "--no-progress")
        print(json.dumps({"done": ["deleted"]}))


def status(arguments: argparse.Namespace) -> None:
    """Print what there is to know of the image, and change nothing."""
    is_full = check_pool(arguments.pool)
    image = Image(arguments.pool, arguments.image)
    if image.info is None:
        print(json.dumps({"exists": False, "poolIsFull": is_full}))
        return
    if is_full:
        print(json.dumps({"exists": True, "poolIsFull": True}))
        return
    marks = image.marks()
    locks = parsed("rbd", "lock", "list", image.spec) or []
    locks = list(locks.values()) if isinstance(locks, dict) else locks
    print(
        json.dumps(
            {
                "exists": True,
                "sizeMiB": image.size // MIB,
                "features": image.features,
                "owner": marks.get(OWNER),
                "watchers": image.watchers(),
                "lockOwners": [lock["address"] for lock in locks],
                "blocklisted": blocklisted(),
                "poolIsFull": False,
            }
        )
    )


def blocklisted() -> List[str]:
    """Return the addresses of the clients that Ceph has shut out, such as a dead node's."""
    return re.findall(r"^(\S+/\d+) ", run("ceph", "osd", "blocklist", "ls"), re.MULTILINE)


def user(arguments: argparse.Namespace) -> None:
    """Make the Ceph user with no more rights than a client of the pool needs, and print its key.

    Source of the rights: https://docs.ceph.com/en/latest/rbd/rbd-exclusive-locks/
    """
    check_pool(arguments.pool)
    name = "client.%s" % arguments.user
    rights = ["mon", "profile rbd", "osd", "profile rbd pool=%s" % arguments.pool]
    try:
        print(run("ceph", "auth", "get-or-create-key", name, *rights).strip())
    except FailedError as error:
        if error.code != errno.EINVAL:
            raise
        refuse(
            "other-rights",
            "Ceph has %s already, with other rights than those of a client of the pool %s: choose another storage.rbd.user, or "
            "set the secret cephKey to its key." % (name, arguments.pool),
        )


def main() -> None:
    parser = argparse.ArgumentParser(prog="rbd.py")
    commands = parser.add_subparsers(dest="command")
    commands.required = True
    for name, work in (("ensure", ensure), ("release", release), ("status", status), ("user", user)):
        command = commands.add_parser(name, description=work.__doc__)
        command.set_defaults(work=work)
        command.add_argument("--pool", required=True)
        if name == "user":
            command.add_argument("--user", required=True)
        else:
            command.add_argument("--image", required=True)
        if name in ("ensure", "release"):
            command.add_argument("--owner", required=True, help="project and stack")
        if name == "ensure":
            command.add_argument("--size-mib", type=int, required=True)
            command.add_argument("--format", choices=("mount", "host"), required=True)
            command.add_argument("--adopt", action="store_true")
        if name == "release":
            command.add_argument("--policy", choices=("trash", "delete"), required=True)
            command.add_argument("--trash-days", type=int, default=30)
    arguments = parser.parse_args()
    for program in ("rbd", "ceph"):
        if shutil.which(program) is None:
            refuse("no-program", "%s is not on this host: install ceph-common, or name another storage.rbd.host." % program)
    try:
        arguments.work(arguments)
    except FailedError as error:
        refuse("failed", "%s." % error)


if __name__ == "__main__":
    main()
