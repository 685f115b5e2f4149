"""A new environment: what sets it apart is asked, checked as it is answered, and written as a stack file."""

import json
import os
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from copy import deepcopy
from itertools import count
from pathlib import Path
from typing import Any, NamedTuple

import typer
import yaml

from ops import stack
from ops.stack import OpsError
from settings import DEFAULTS, PROJECT, SECRETS, Claim, Rbd, Settings, SettingsError, load

STACK_NAME = re.compile(r"[A-Za-z0-9_.-]{1,100}")
HEAD = "# yaml-language-server: $schema=settings.schema.json\n"
TWO_WRITERS = "two registries would write to it"
# What makes two environments one registry.
MUST_DIFFER = {
    "hostname": "clients could not tell the two registries apart",
    "kubernetes.namespace": "both stacks would own the same objects",
    "storage.claim": TWO_WRITERS,
    "storage.rbd.image": TWO_WRITERS,
    "storage.volume": TWO_WRITERS,
}


class Question(NamedTuple):
    """A setting by which environments differ."""

    path: str
    text: str
    default: Any
    """What is taken unless said otherwise, of the type that an answer has; nothing, or an empty list, where it has to be said."""

    @property
    def required(self) -> bool:
        return self.default is None or self.default == []

    @property
    def shown(self) -> str:
        """The default, as one would type it."""
        if isinstance(self.default, bool):
            return "yes" if self.default else "no"
        return ", ".join(self.default) if isinstance(self.default, list) else str(self.default)

    def ask(self) -> Any:
        """Return what is answered on the terminal."""
        if isinstance(self.default, bool):
            return typer.confirm(self.text, default=self.default)
        default = None if self.required else self.shown
        text: str = typer.prompt(self.text, default=default, show_default=bool(default))
        if isinstance(self.default, list):
            return [part.strip() for part in text.split(",")]
        return int(text) if isinstance(self.default, int) and text.isdecimal() else text


class NewEnvironment:
    """The stack file of an environment, as it is answered so far.

    Raises:
        OpsError: the name cannot be a stack's or is taken, or what is set has faults; all of them are listed.
    """

    def __init__(self, name: str, assignments: Sequence[str]) -> None:
        self.name = name
        if not STACK_NAME.fullmatch(name):
            raise OpsError(
                f'"{name}" cannot be a stack\'s name: it must be 1 to 100 letters, digits, dots, dashes or underscores.',
                "Choose one such as staging.",
            )
        self.file = stack.ROOT / f"Pulumi.{name}.yaml"
        if os.path.lexists(self.file):
            raise self._taken()
        self._shared = shared_config()
        self.others = other_stacks()
        self._said, faults = _assigned(assignments)
        if faults := faults + self._faults_so_far(self._said):
            raise self._refused(faults)

    def ask(self) -> None:
        """Ask on the terminal until all is answered; a faulty answer is told and asked again."""
        for question in self._open_questions(self._said):
            while True:
                said = deepcopy(self._said)
                _put(said, question.path, question.ask())
                if not (faults := self._faults_so_far(said)):
                    break
                typer.echo("\n".join(faults))
            self._said.update(said)

    def take_defaults(self) -> None:
        """Take the default of all that is not answered."""
        self._said, _ = self._completed(self._said)

    def require_answers(self) -> None:
        """Raise where something would have to be asked.

        Raises:
            OpsError: there are questions; all of them are listed with their defaults.
        """
        _, questions = self._completed(self._said)
        if questions:
            listed = [f"{one.path} ({'no default' if one.required else one.shown or 'none'})" for one in questions]
            raise OpsError(
                f"There is no terminal to ask on, and these are not set: {', '.join(listed)}.",
                "Set each with --set PATH=VALUE, or take the defaults, which are in parentheses, with --yes.",
            )

    def write(self) -> Settings:
        """Write the stack file, with no more than what differs from the defaults, and return what it says.

        Raises:
            OpsError: rules are broken, the file has come to be in the meantime, or it cannot be written.
        """
        if faults := self._faults(self._said):
            raise self._refused(faults)
        settings, sections = self._load(self._said), self._said
        for keys in list(_leaves(sections)):
            fewer = _without(sections, keys)
            try:
                sections = fewer if self._load(fewer) == settings else sections
            except SettingsError:
                continue
        config = {f"{PROJECT}:{key}": sections[key] for key in [*Settings.model_fields, DEFAULTS] if key in sections}
        text = HEAD + yaml.safe_dump({"config": config}, sort_keys=False, width=130, default_flow_style=None)
        new = self.file.with_name(f".{self.file.name}.{os.getpid()}")
        try:
            new.write_text(text)
            os.link(new, self.file)  # unlike a rename, it never replaces a file
        except FileExistsError:
            raise self._taken() from None
        except OSError as error:
            raise OpsError(f"{self.file} cannot be written: {error.strerror}.", "Mend that, and run this again.") from None
        finally:
            new.unlink(missing_ok=True)
        return settings

    def _taken(self) -> OpsError:
        return OpsError(
            f"There is a {self.file.name} already, and it is not overwritten.", "Choose another name, or edit that file."
        )

    def _refused(self, faults: list[str]) -> OpsError:
        return OpsError(str(SettingsError(self.name, faults)), "Correct it with --set PATH=VALUE, and run this again.")

    def _load(self, sections: Mapping[str, Any]) -> Settings:
        return load({**self._shared, **_config(sections)}, set(), self.name, secrets_follow=True)

    def _faults(self, sections: Mapping[str, Any]) -> list[str]:
        try:
            return clashes(self._load(sections), self.others)[0]
        except SettingsError as error:
            return error.faults

    def _faults_so_far(self, said: Mapping[str, Any]) -> list[str]:
        """Return what is wrong with what is said, but not that something is missing which is still to be asked for."""
        sections, questions = self._completed(said)
        missing = tuple(f"{PROJECT}:{one.path} " for one in questions if one.required)
        return [fault for fault in self._faults(sections) if not fault.startswith(missing)]

    def _completed(self, said: Mapping[str, Any]) -> tuple[dict[str, Any], list[Question]]:
        """Return what is said with the defaults of what is not, and the questions that are open."""
        sections, questions = deepcopy(dict(said)), []
        for question in self._open_questions(sections):
            questions.append(question)
            if not question.required:
                _put(sections, question.path, question.default)
        return sections, questions

    def _open_questions(self, said: Mapping[str, Any]) -> Iterator[Question]:
        """Return what is not said; what is said until the next one is asked for decides which that is."""
        return (question for question in self._questions(said) if not _is_said(said, question.path))

    def _questions(self, said: Mapping[str, Any]) -> Iterator[Question]:
        label = re.sub(r"[^a-z0-9]+", "-", self.name.lower())[:30].strip("-") or "new"
        own = f"registry-{label}"
        defaults = json.loads(self._shared.get(f"{PROJECT}:{DEFAULTS}", "{}"))
        yield Question("target", "Where it runs, kubernetes or docker", "kubernetes" if "kubernetes" in defaults else "docker")
        first, _, domain = self._shared.get(f"{PROJECT}:hostname", Settings().hostname).partition(".")
        yield Question("hostname", "Name that clients use", f"{first}-{label}.{domain}".strip("."))
        yield Question("environment.production", "Is it production", default=False)
        production = _at(said, "environment.production") is True
        if production:
            yield Question("storage.protect", "Should Pulumi refuse whatever would delete its images", default=True)
        waves = [one.environment.wave or 0 for one in self.others.values() if not one.environment.production]
        yield Question("environment.wave", "Wave of `ops rollout`", max(waves, default=0) + 1 if production else 1)
        if said.get("target") == "kubernetes":
            yield from self._questions_of_kubernetes(said, defaults.get("kubernetes"), own, production=production)
        elif said.get("target") == "docker":
            used = [one.container.port for one in self.others.values() if one.target == "docker"]
            system = Settings().container
            yield Question("container.address", "Address of the Docker host to publish on", system.address)
            yield Question("container.port", "Port of the Docker host", _first_free(system.port, used))
            yield Question("container.name", "Name of the container", own)
            yield Question("storage.volume", "Docker volume with all images", own)

    def _questions_of_kubernetes(self, said: Mapping[str, Any], shared: Any, own: str, *, production: bool) -> Iterator[Question]:
        others = [one for one in self.others.values() if one.target == "kubernetes"]
        system = Settings().kubernetes
        yield Question("kubernetes.namespace", "Namespace, which has to exist", own)
        port = _first_free(system.node_port, [one.kubernetes.node_port for one in others])
        yield Question("kubernetes.nodePort", "Port of each node", port)
        yield Question("kubernetes.cpu", "CPUs of the pod", system.cpu if production else "1")
        yield Question("kubernetes.memory", "Memory of the pod", system.memory if production else "2Gi")
        if not _at(shared, "image.pushTo") and not _at(said, "image.nodes"):
            used = next((one.image.push_to for one in others if one.image.push_to), None)
            yield Question("image.pushTo", "Registry to push the image to, from which the nodes pull it", used)
        in_rbd = _at(shared, "storage.rbd") is not None and _at(said, "storage.claim") is None
        yield Question("storage.rbd", "Keep the images on a Ceph RBD image, not in a claim", in_rbd)
        if _at(said, "storage.rbd") is not None:
            if not _at(shared, "storage.rbd.monitors"):
                monitors = next((list(one.storage.rbd.monitors) for one in others if one.storage.rbd), [])
                yield Question("storage.rbd.monitors", "Ceph monitors with their ports, separated by commas", monitors)
            size = Rbd.model_fields["size_mib"].default if production else 102400
            yield Question("storage.rbd.image", "Name of the RBD image", own)
            yield Question("storage.rbd.user", "Ceph user that nodes mount it as", own)
            yield Question("storage.rbd.sizeMiB", "Size of the RBD image in MiB", size)
        elif not _at(said, "storage.claim.existing"):
            yield Question("storage.claim.sizeGiB", "Size of the claim in GiB", Claim().size_gib if production else 100)
            yield Question("storage.claim.className", "Storage class of the claim (empty: the cluster's default)", "")


def shared_config() -> dict[str, str]:
    """Return what Pulumi.yaml says for all stacks, as the engine passes it."""
    said = _config_in(stack.ROOT / "Pulumi.yaml")
    # A key with a colon is another project's.
    own = {key: entry for key, entry in said.items() if ":" not in key and isinstance(entry, dict)}
    return _config({key: entry["default"] for key, entry in own.items() if "default" in entry})


def _config_in(file: Path) -> dict[str, Any]:
    try:
        said = yaml.safe_load(file.read_text()) or {}
    except yaml.YAMLError as error:
        raise OpsError(f"{file.name} is no YAML: {error}", "Correct it, and run this again.") from None
    config = (said.get("config") or {}) if isinstance(said, dict) else said
    if not isinstance(config, dict):
        raise OpsError(f"{file.name} has no settings: config must be a mapping.", "Correct it, and run this again.")
    return config


def other_stacks() -> dict[str, Settings]:
    """Return what the project's stack files say, by the stacks' names.

    Raises:
        OpsError: one has faults, so that it cannot be compared with.
    """
    shared = shared_config()
    found = {}
    for file in sorted(stack.ROOT.glob("Pulumi.*.yaml")):
        other = file.name.removeprefix("Pulumi.").removesuffix(".yaml")
        sections = {key.partition(":")[2]: value for key, value in _config_in(file).items() if key.startswith(f"{PROJECT}:")}
        plain = {key: value for key, value in sections.items() if key not in SECRETS}
        try:
            found[other] = load({**shared, **_config(plain)}, set(), other, secrets_follow=True)
        except SettingsError as error:
            raise OpsError(str(error), f"Correct {file.name}, which a new environment is compared with.") from None
    return found


def clashes(settings: Settings, others: Mapping[str, Settings]) -> tuple[list[str], list[str]]:
    """Return what a stack must not share with the others, whose names are the keys: faults and warnings.

    A warning is of what cannot work on one machine or in one cluster: no stack file says whether it is one.
    """
    faults, warnings = [], []
    for name, other in others.items():
        its = _own_places(other)
        for path, values in _own_places(settings).items():
            for value in sorted(values & its.get(path, set()))[:1]:
                said = f"{PROJECT}:{path} makes {value}, as Pulumi.{name}.yaml does"
                if path in MUST_DIFFER:
                    faults.append(f"{said}: it must be of one stack only, or {MUST_DIFFER[path]}; choose another")
                else:
                    warnings.append(f"{said}: in one place `pulumi up` fails; choose another")
    return faults, warnings


def _own_places(settings: Settings) -> dict[str, set[str]]:
    """Return what is a registry's alone, by the setting that makes it."""
    if settings.target == "docker":
        container = settings.container
        return {
            "hostname": {settings.address},
            # On one host Docker takes up a volume that exists without a word; on two, another name costs nothing.
            "storage.volume": {settings.storage.volume},
            "container.name": {container.name},
            "container.port": {f"{container.address}:{container.port}"},
        }
    kubernetes, rbd = settings.kubernetes, settings.storage.rbd
    name = f"{kubernetes.namespace}/{kubernetes.name}"
    places = {
        "hostname": {settings.address},
        "kubernetes.namespace": {name},
        "kubernetes.nodePort": {str(kubernetes.node_port)},
    }
    if kubernetes.ingress is not None:
        places["hostname"].add(f"{kubernetes.ingress.host}:443")
    if rbd is not None:
        places["storage.rbd.image"] = {f"{rbd.pool}/{rbd.image} at {monitor}" for monitor in rbd.monitors}
    else:
        existing = settings.storage.claim.existing
        places["storage.claim"] = {f"{kubernetes.namespace}/{existing}" if existing else f"{name}-images"}
    return places


def next_commands(name: str, settings: Settings) -> list[str]:
    """Return what is to be run until the environment can be brought up."""
    encrypt = "pulumi config set --secret"
    commands = [f"pulumi stack init {name}"]
    if "sshPrivateKey" in settings.needed_secrets:
        commands.append(f"{encrypt} {PROJECT}:sshPrivateKey --stack {name} <FILE")
    if "providedCertificate" in settings.needed_secrets:
        commands += [
            f"{encrypt} --path {PROJECT}:providedCertificate.{part} --stack {name} <FILE"
            for part in ("certificate", "privateKey", "authority")
        ]
    if settings.image.push_to is not None:
        commands += [
            f"{encrypt} --path {PROJECT}:pushCredentials.{part} --stack {name}  # if {settings.image.push_to} wants a login"
            for part in ("username", "password")
        ]
    if settings.target == "kubernetes" and settings.kubernetes.namespace != "default":
        commands.append(f"kubectl create namespace {settings.kubernetes.namespace}  # if it does not exist")
    return [*commands, f"python -m ops report --stack {name}"]


def on_terminal() -> bool:
    return sys.stdin.isatty()


def _first_free(first: int, used: Sequence[int]) -> int:
    return next(port for port in count(first) if port not in used)


def _assigned(assignments: Sequence[str]) -> tuple[dict[str, Any], list[str]]:
    """Return what PATH=VALUE say, the later before the earlier, and the faults of those that say nothing."""
    sections: dict[str, Any] = {}
    faults = []
    for one in assignments:
        path, equals, text = one.partition("=")
        path = path.removeprefix(f"{PROJECT}:")
        if not equals or not all(path.split(".")):
            faults.append(f"--set {path}: it must be PATH=VALUE; write one such as kubernetes.nodePort=32510")
            continue
        try:
            # As the engine passes it: a date is a text.
            value = json.loads(json.dumps(yaml.safe_load(text) if text else "", default=str))
        except (yaml.YAMLError, TypeError, ValueError):
            faults.append(f"{PROJECT}:{path} cannot be read: it must be YAML; quote it")
        else:
            _put(sections, path, value)
    return sections, faults


def _put(sections: dict[str, Any], path: str, value: Any) -> None:
    """Set a value at a path, in the form of a stack file."""
    *parents, last = path.split(".")
    for key in parents:
        if not isinstance(sections.get(key), dict):
            sections[key] = {}
        sections = sections[key]
    if path == "storage.rbd" and isinstance(value, bool):
        value = {} if value else None
    if path == "storage.claim.className" and value == "":
        value = None
    sections[last] = value


def _at(sections: Any, path: str) -> Any:
    for key in path.split("."):
        sections = sections.get(key) if isinstance(sections, dict) else None
    return sections


def _is_said(sections: Any, path: str) -> bool:
    """Whether something is said of a setting, or of the whole that it is a part of, such as null."""
    for key in path.split("."):
        if not isinstance(sections, dict):
            return True
        if key not in sections:
            return False
        sections = sections[key]
    return True


def _leaves(sections: Mapping[str, Any], above: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    for key, value in sections.items():
        if isinstance(value, dict) and value:
            yield from _leaves(value, (*above, key))
        else:
            yield *above, key


def _without(sections: Mapping[str, Any], keys: tuple[str, ...]) -> dict[str, Any]:
    """Return sections without a leaf, and without what is empty then."""
    first, *below = keys
    rest = _without(sections[first], tuple(below)) if below else {}
    return {key: rest if key == first else value for key, value in sections.items() if key != first or rest}


def _config(sections: Mapping[str, Any]) -> dict[str, str]:
    """Return settings as the engine passes them."""
    return {
        f"{PROJECT}:{key}": value if isinstance(value, str) else json.dumps(value, default=str) for key, value in sections.items()
    }
