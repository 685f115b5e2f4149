"""RbdVolume: the Ceph RBD image that holds the registry's images, and the Ceph user that nodes mount it as."""

import shlex
from collections.abc import Sequence
from pathlib import Path

import pulumi
import pulumi_command as command

from components.connection import connection
from settings import CephHost, Storage

SCRIPT = Path("hosts/rbd.py")


class RbdVolume(pulumi.ComponentResource):
    """One image, made and grown by `hosts/rbd.py` on the Ceph host, over SSH or on this machine.

    A preview says what will happen to it, and refuses what would lose data: the script itself runs in no preview.
    """

    key: pulumi.Output[str]
    """The key of the Ceph user, a secret; there once the image has its size."""

    def __init__(
        self,
        name: str,
        storage: Storage,
        *,
        ssh_private_key: pulumi.Output[str] | None,
        ceph_key: pulumi.Output[str] | None,
        opts: pulumi.ResourceOptions | None = None,
    ) -> None:
        super().__init__("private-registry:index:RbdVolume", name, None, opts)
        assert storage.rbd is not None
        self._host = storage.rbd.host
        self._ssh_private_key = ssh_private_key
        rbd = storage.rbd
        owner = f"{pulumi.get_project()}/{pulumi.get_stack()}"
        which = ["--pool", rbd.pool, "--image", rbd.image, "--owner", owner]
        ensure = ["ensure", *which, "--size-mib", str(rbd.size_mib), "--format", rbd.format]
        release = ["release", *which, "--policy", storage.on_destroy, "--trash-days", str(storage.trash_days)]
        image = self._command(
            name,
            [*ensure, "--adopt"] if rbd.adopt else ensure,
            # Kept, it is found again by the next `pulumi up` of a stack of this name.
            delete=None if storage.on_destroy == "keep" else release,
            opts=pulumi.ResourceOptions(
                parent=self,
                # All images are in it. A replacement would make what is there already, and then release it.
                protect=storage.protect or None,
                hooks=pulumi.ResourceHookBinding(
                    before_create=[_hook(f"{name}-is-made", _announce)],
                    before_update=[_hook(f"{name}-changes", _check_change)],
                ),
            ),
        )
        if ceph_key is None:
            arguments = ["user", "--pool", rbd.pool, "--user", rbd.user]
            ceph_key = self._command(f"{name}-user", arguments, opts=pulumi.ResourceOptions(parent=self)).stdout
        # What needs the key comes after the image, too.
        self.key = pulumi.Output.secret(pulumi.Output.all(ceph_key, image.id).apply(lambda both: str(both[0])))
        self.register_outputs({})

    def _command(
        self, name: str, arguments: Sequence[str], *, delete: Sequence[str] | None = None, opts: pulumi.ResourceOptions
    ) -> command.local.Command | command.remote.Command:
        """Run the script now, again whenever anything of it changes, and another time when the resource goes."""
        opts = pulumi.ResourceOptions.merge(opts, pulumi.ResourceOptions(additional_secret_outputs=["stdout", "stderr"]))
        text = SCRIPT.read_text()
        ensure = _line(self._host, arguments)
        release = None if delete is None else _line(self._host, delete)
        if self._host is None:
            return command.local.Command(
                name,
                create=ensure,
                update=ensure,
                delete=release,
                stdin=text,
                logging=command.local.Logging.NONE,
                add_previous_output_in_env=False,
                opts=opts,
            )
        assert self._ssh_private_key is not None
        return command.remote.Command(
            name,
            connection=connection(self._host, self._ssh_private_key),
            create=ensure,
            update=ensure,
            delete=release,
            stdin=text,
            logging=command.remote.Logging.NONE,
            # What sshd does not accept by its own settings is an error, and the script needs nothing of it.
            add_previous_output_in_env=False,
            opts=opts,
        )


def _line(host: CephHost | None, arguments: Sequence[str]) -> str:
    words = ["python3", "-", *arguments]
    return shlex.join(words if host is None else host.as_root(words))


def _hook(name: str, callback: pulumi.ResourceHookFunction) -> pulumi.ResourceHook:
    return pulumi.ResourceHook(name, callback, opts=pulumi.ResourceHookOptions(on_dry_run=True))


def _options(line: str) -> dict[str, str]:
    """Return the options of one of the script's command lines."""
    words = shlex.split(line)
    return {word: words[index + 1] for index, word in enumerate(words[:-1]) if word.startswith("--")}


def _announce(arguments: pulumi.ResourceHookArgs) -> None:
    new = _options((arguments.new_inputs or {})["create"])
    pulumi.info(
        f"the RBD image {new['--pool']}/{new['--image']} is created with {new['--size-mib']} MiB, or found as this stack left it"
    )


def _check_change(arguments: pulumi.ResourceHookArgs) -> None:
    """Say what the change means for the image, and refuse what would take data away.

    Raises:
        ValueError: the image would shrink, or be another one.
    """
    old, new = _options((arguments.old_inputs or {})["create"]), _options((arguments.new_inputs or {})["create"])
    before, after = f"{old['--pool']}/{old['--image']}", f"{new['--pool']}/{new['--image']}"
    if before != after:
        raise ValueError(
            f"private-registry:storage.rbd changes from the RBD image {before} to {after}: nothing would move the registry's "
            f"images; write pool and image as they were, or move them as docs/volume.md says"
        )
    size, wanted = int(old["--size-mib"]), int(new["--size-mib"])
    if wanted < size:
        raise ValueError(
            f"private-registry:storage.rbd.sizeMiB is {wanted}: it must be {size} or more, as {after} has that size, and what is "
            f"cut off is lost; write {size}"
        )
    if wanted > size:
        pulumi.info(f"the RBD image {after} grows from {size} MiB to {wanted} MiB, in use")
