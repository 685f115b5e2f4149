"""A new environment: what sets it apart is asked, checked as it is answered, and written as a stack file."""

import json
import os
import re
import sys
from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from typing import Any, NamedTuple

import typer
import yaml

from ops import stack
from ops.stack import OpsError
from settings import DEFAULTS, PROJECT, SECRETS, Claim, Rbd, Settings, SettingsError, load

STACK_NAME = re.compile(r"[A-Za-z0-9_.-]{1,100}")
HEAD = "# yaml-language-server: $schema=settings.schema.json\n"

Keys = tuple[str, ...]
TARGET: Keys = ("target",)
PRODUCTION: Keys = ("environment", "production")
RBD: Keys = ("storage", "rbd")
YES_OR_NO = {"yes": "true", "y": "true", "no": "false", "n": "false"}


class Question(NamedTuple):
    """A setting by which environments differ."""

    keys: Keys
    text: str
    default: Any
    required: bool = False
    """Nothing in the project tells what the default could be."""

    @property
    def path(self) -> str:
        return ".".join(self.keys)

    @property
    def yes_or_no(self) -> bool:
        return self.keys in (PRODUCTION, RBD)

    @property
    def shown(self) -> str:
        """The default, as one would type it."""
        if self.yes_or_no:
            return "no" if self.default in (None, False) else "yes"
        if isinstance(self.default, list):
            return ", ".join(self.default)
        return "" if self.default is None else str(self.default)


class Clashes(NamedTuple):
    """What a stack has in common with others and must not have."""

    faults: list[str]
    """It makes two environments one registry."""
    warnings: list[str]
    """It cannot work on one machine or in one cluster, and no stack file says whether it is one."""


class NewEnvironment:
    """The stack file of an environment, as it is answered so far.

    Raises:
        OpsError: the name cannot be a stack's or is taken, or what is set has faults; all of them are listed.
    """

    def __init__(self, name: str, said: Sequence[str]) -> None:
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
        self._answers, faults = _parsed(said)
        faults += self._faults_so_far(self._answers)
        if faults:
            raise self._refused(faults)

    def questions(self) -> list[Question]:
        """Return what is not answered yet; answers may raise further questions."""
        return self._unanswered(self._answers)

    def answer(self, question: Question, text: str) -> None:
        """Take an answer as it is typed.

        Raises:
            typer.BadParameter: it breaks rules; the text has their words.
        """
        if question.yes_or_no and text.lower() not in YES_OR_NO:
            raise typer.BadParameter(f'"{text}" is no answer: it must be yes or no; write one of them')
        value = _value(question.keys, YES_OR_NO[text.lower()] if question.yes_or_no else text)
        answers = {**self._answers, question.keys: value}
        if faults := self._faults_so_far(answers):
            raise typer.BadParameter("\n".join(faults))
        self._answers = answers

    def ask(self) -> None:
        """Ask on the terminal until all is answered; a faulty answer is told and asked again."""
        while questions := self.questions():
            question = questions[0]

            def take(text: str, question: Question = question) -> None:
                self.answer(question, text)

            default = None if question.required else question.shown
            typer.prompt(question.text, default=default, show_default=bool(default), value_proc=take)

    def take_defaults(self) -> None:
        """Take the default of all that is not answered.

        Raises:
            OpsError: something has none.
        """
        while questions := [question for question in self.questions() if not question.required]:
            self._answers[questions[0].keys] = questions[0].default
        if questions := self.questions():
            raise OpsError(
                f"There is no default for {', '.join(question.path for question in questions)}.",
                "Set it with --set PATH=VALUE.",
            )

    def require_answers(self) -> None:
        """Raise where something would have to be asked.

        Raises:
            OpsError: there are questions; all of them are listed with their defaults.
        """
        if questions := self.questions():
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
        if faults := self._faults(self._answers):
            raise self._refused(faults)
        leaves = self._leaves(self._answers)
        settings = self._load(leaves)
        for keys in list(leaves):
            fewer = {key: value for key, value in leaves.items() if key != keys}
            try:
                same = self._load(fewer) == settings
            except SettingsError:
                same = False
            leaves = fewer if same else leaves
        new = self.file.with_name(f".{self.file.name}.{os.getpid()}")
        try:
            new.write_text(_text(_nested(leaves)))
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
        return OpsError(str(SettingsError(self.name, faults)), "Correct what is set, and run this again.")

    def _load(self, leaves: Mapping[Keys, Any]) -> Settings:
        return load({**self._shared, **_config(_nested(leaves))}, set(), self.name, secrets_follow=True)

    def _faults(self, answers: Mapping[Keys, Any]) -> list[str]:
        """Return what is wrong with answers, where all that is not answered has its default."""
        leaves = self._leaves(answers)
        faults = []
        if any(keys[0] == DEFAULTS for keys in answers):
            faults = [f"{PROJECT}:{DEFAULTS} is set: it must be in Pulumi.yaml, which all stacks share; write it there"]
            leaves = {keys: value for keys, value in leaves.items() if keys[0] != DEFAULTS}
        try:
            return faults + clashes(self._load(leaves), self.others).faults
        except SettingsError as error:
            return faults + error.faults

    def _faults_so_far(self, answers: Mapping[Keys, Any]) -> list[str]:
        """Return the same, but that something is missing which is still to be asked for."""
        missing = tuple(f"{PROJECT}:{one.path} " for one in self._unanswered(answers) if one.required)
        return [fault for fault in self._faults(answers) if not fault.startswith(missing)]

    def _leaves(self, answers: Mapping[Keys, Any]) -> dict[Keys, Any]:
        """Return all that the stack file would say."""
        suggested = {one.keys: one.default for one in self._questions(answers) if not one.required}
        said = {**suggested, **answers}
        if said.get(PRODUCTION) is True:
            suggested["storage", "protect"] = True
        sections = {keys[:2] for keys in answers}
        if said.get(TARGET) == "kubernetes" and ("storage", "claim") in sections and RBD not in sections:
            suggested[RBD] = None  # in place of one that the defaults have
        for keys, value in list(suggested.items()):
            if any(_contradict(answered, whole, keys, value) for answered, whole in answers.items()):
                del suggested[keys]  # such as a key of a section that is set to a number
        return {**suggested, **answers}

    def _unanswered(self, answers: Mapping[Keys, Any]) -> list[Question]:
        return [question for question in self._questions(answers) if question.keys not in answers]

    def _questions(self, answers: Mapping[Keys, Any]) -> list[Question]:
        """Return all that sets this environment apart, in the order in which it is asked."""
        defaults = json.loads(self._shared.get(f"{PROJECT}:{DEFAULTS}", "{}"))
        target = answers.get(TARGET, "docker" if _at(defaults, "kubernetes") is None else "kubernetes")
        production = answers.get(PRODUCTION, False) is True
        first, _, domain = self._shared.get(f"{PROJECT}:hostname", Settings().hostname).partition(".")
        suffix = self._suffix(first)
        own = f"registry{suffix}"
        waves = [one.environment.wave or 0 for one in self.others.values() if not one.environment.production]
        common = [
            Question(TARGET, "Where it runs, kubernetes or docker", target),
            Question(("hostname",), "Name that clients use", f"{first}{suffix}.{domain}".strip(".")),
            Question(PRODUCTION, "Is it production", default=False),
            Question(("environment", "wave"), "Wave of `ops rollout`", max(waves, default=0) + 1 if production else 1),
        ]
        shared = _at(defaults, target)
        if target == "kubernetes":
            return common + self._questions_of_kubernetes(answers, shared, own, production=production)
        return common + self._questions_of_docker(own) if target == "docker" else common

    def _suffix(self, host: str) -> str:
        """Return what the suggested names end with: the stack's name as DNS has it, and a number where another stack has that."""
        label = re.sub(r"[^a-z0-9]+", "-", self.name.lower()).strip("-")[:30].strip("-")
        used = set()
        for one in self.others.values():
            used |= {one.hostname.partition(".")[0], one.kubernetes.namespace, one.container.name, one.storage.volume}
            used |= {one.storage.rbd.image} if one.storage.rbd else set()
        first = suffix = f"-{label}" if label else ""
        number = 1
        while {f"registry{suffix}", f"{host}{suffix}"} & used:
            number += 1
            suffix = f"{first}-{number}"
        return suffix

    def _questions_of_docker(self, own: str) -> list[Question]:
        taken = [one.container.port for one in self.others.values() if one.target == "docker"]
        return [
            Question(("container", "address"), "Address of the Docker host to publish on", Settings().container.address),
            Question(("container", "port"), "Port of the Docker host", _free(Settings().container.port, taken)),
            Question(("container", "name"), "Name of the container", own),
            Question(("storage", "volume"), "Docker volume with all images", own),
        ]

    def _questions_of_kubernetes(self, answers: Mapping[Keys, Any], shared: Any, own: str, *, production: bool) -> list[Question]:
        others = [one for one in self.others.values() if one.target == "kubernetes"]
        system = Settings().kubernetes
        port = _free(system.node_port, [one.kubernetes.node_port for one in others])
        asked = [
            Question(("kubernetes", "namespace"), "Namespace, which has to exist", own),
            Question(("kubernetes", "nodePort"), "Port of each node", port),
            Question(("kubernetes", "cpu"), "CPUs of the pod", system.cpu if production else "1"),
            Question(("kubernetes", "memory"), "Memory of the pod", system.memory if production else "2Gi"),
        ]
        if not _at(shared, "image", "pushTo") and not answers.get(("image", "nodes")):
            used = next((one.image.push_to for one in others if one.image.push_to), None)
            text = "Registry to push the image to, from which the nodes pull it"
            asked.append(Question(("image", "pushTo"), text, used, required=used is None))
        kinds = {keys[1] for keys in answers if keys[0] == "storage" and len(keys) > 1}
        in_rbd = "rbd" in kinds or ("claim" not in kinds and _at(shared, *RBD) is not None)
        in_rbd = in_rbd and answers.get(RBD, {}) is not None
        if RBD in answers or not kinds & {"rbd", "claim"}:
            asked.append(Question(RBD, "Keep the images on a Ceph RBD image, not in a claim", {} if in_rbd else None))
        if not in_rbd:
            if ("storage", "claim", "existing") in answers:
                return asked
            size = Claim().size_gib if production else 100
            return [
                *asked,
                Question(("storage", "claim", "sizeGiB"), "Size of the claim in GiB", size),
                Question(("storage", "claim", "className"), "Storage class of the claim (empty: the cluster's default)", None),
            ]
        if not _at(shared, *RBD, "monitors"):
            monitors = next((list(one.storage.rbd.monitors) for one in others if one.storage.rbd), None)
            text = "Ceph monitors with their ports, separated by commas"
            asked.append(Question((*RBD, "monitors"), text, monitors, required=monitors is None))
        size = Rbd.model_fields["size_mib"].default if production else 102400
        return [
            *asked,
            Question((*RBD, "image"), "Name of the RBD image", own),
            Question((*RBD, "user"), "Ceph user that nodes mount it as", own),
            Question((*RBD, "sizeMiB"), "Size of the RBD image in MiB", size),
        ]


def shared_config() -> dict[str, str]:
    """Return what Pulumi.yaml says for all stacks, as the engine passes it."""
    said = yaml.safe_load((stack.ROOT / "Pulumi.yaml").read_text()).get("config") or {}
    # A key with a colon is another project's.
    own = {key: entry for key, entry in said.items() if ":" not in key and isinstance(entry, dict)}
    return _config({key: entry["default"] for key, entry in own.items() if "default" in entry})


def other_stacks() -> dict[str, Settings]:
    """Return what the project's stack files say, by the stacks' names.

    Raises:
        OpsError: one has faults, so that it cannot be compared with.
    """
    shared = shared_config()
    found = {}
    for file in sorted(stack.ROOT.glob("Pulumi.*.yaml")):
        other = file.name.removeprefix("Pulumi.").removesuffix(".yaml")
        own = (yaml.safe_load(file.read_text()) or {}).get("config") or {}
        sections = {key.partition(":")[2]: value for key, value in own.items() if key.startswith(f"{PROJECT}:")}
        plain = {key: value for key, value in sections.items() if key not in SECRETS}
        try:
            found[other] = load({**shared, **_config(plain)}, set(), other, secrets_follow=True)
        except SettingsError as error:
            raise OpsError(str(error), f"Correct {file.name}, which a new environment is compared with.") from None
    return found


def clashes(settings: Settings, others: Mapping[str, Settings]) -> Clashes:
    """Return what a stack must not share with the others; their names are the keys."""
    found = Clashes([], [])
    for name, other in others.items():
        file = f"Pulumi.{name}.yaml"
        for key, value in sorted(_ways_in(settings).items()):
            if value in _ways_in(other).values():
                found.faults.append(
                    f'{PROJECT}:{key} makes the address "{value}": it must not be that of {file}, or clients could not tell '
                    "the two registries apart; choose another name or port"
                )
        if settings.target == other.target:
            of_target = _clashes_in_kubernetes if settings.target == "kubernetes" else _clashes_on_docker
            faults, warnings = of_target(settings, other, file)
            found.faults.extend(faults)
            found.warnings.extend(warnings)
    return found


def _clashes_in_kubernetes(settings: Settings, other: Settings, file: str) -> Clashes:
    found = Clashes([], [])
    own, its = settings.kubernetes, other.kubernetes
    if (own.namespace, own.name) == (its.namespace, its.name):
        found.faults.append(
            f'{PROJECT}:kubernetes.namespace is "{own.namespace}": with kubernetes.name "{own.name}" it must not be that of '
            f"{file}, or both stacks would own the same objects; choose another namespace or name"
        )
    elif settings.storage.rbd is None and other.storage.rbd is None and _claim(settings) == _claim(other):
        found.faults.append(
            f'{PROJECT}:storage.claim is "{_claim(settings)[1]}" in the namespace "{own.namespace}": it must not be that of '
            f"{file}, or two registries would write to it; choose another"
        )
    rbd, its_rbd = settings.storage.rbd, other.storage.rbd
    if rbd is not None and its_rbd is not None:
        same_cluster = bool(set(rbd.monitors) & set(its_rbd.monitors))
        if same_cluster and (rbd.pool, rbd.image) == (its_rbd.pool, its_rbd.image):
            found.faults.append(
                f'{PROJECT}:storage.rbd.image is "{rbd.image}": in the pool "{rbd.pool}" it must not be that of {file}, or two '
                "registries would write to it; choose another"
            )
    if own.node_port == its.node_port:
        found.warnings.append(
            f"{PROJECT}:kubernetes.nodePort is {own.node_port}, as in {file}: in one cluster `pulumi up` fails; choose another"
        )
    return found


def _clashes_on_docker(settings: Settings, other: Settings, file: str) -> Clashes:
    found = Clashes([], [])
    # On one host Docker takes up a volume that exists without a word; on two, another name costs nothing.
    if settings.storage.volume == other.storage.volume:
        found.faults.append(
            f'{PROJECT}:storage.volume is "{settings.storage.volume}": it must not be that of {file}, or on one Docker host two '
            "registries would write to it; choose another"
        )
    own, its = settings.container, other.container
    addresses = {own.address, its.address}
    on_one_address = len(addresses) == 1 or bool(addresses & {"0.0.0.0", "::"})
    same = [f'name is "{own.name}"'] if own.name == its.name else []
    same += [f"port is {own.port}"] if own.port == its.port and on_one_address else []
    for one in same:
        found.warnings.append(f"{PROJECT}:container.{one}, as in {file}: on one Docker host `pulumi up` fails; choose another")
    return found


def _ways_in(settings: Settings) -> dict[str, str]:
    """Return what clients write before a repository, by the key that makes it."""
    ways = {"hostname": settings.address}
    if settings.target == "kubernetes" and settings.kubernetes.ingress is not None:
        ways["kubernetes.ingress.host"] = f"{settings.kubernetes.ingress.host}:443"
    return ways


def _claim(settings: Settings) -> tuple[str, str]:
    """Return the namespace and the name of the claim with the images."""
    existing = settings.storage.claim.existing
    return settings.kubernetes.namespace, existing or f"{settings.kubernetes.name}-images"


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


def _free(first: int, taken: Iterable[int]) -> int:
    """Return the first port that no other stack has."""
    ports = set(taken)
    return next(port for port in range(first, first + len(ports) + 1) if port not in ports)


def _at(sections: Any, *keys: str) -> Any:
    for key in keys:
        sections = sections.get(key) if isinstance(sections, dict) else None
    return sections


def _parsed(said: Sequence[str]) -> tuple[dict[Keys, Any], list[str]]:
    """Return what PATH=VALUE say, and the faults of those that say nothing."""
    answers: dict[Keys, Any] = {}
    faults = []
    for one in said:
        path, equals, text = one.partition("=")
        keys = tuple(path.removeprefix(f"{PROJECT}:").split("."))
        if not equals or not all(keys):
            faults.append(f"--set {path}: it must be PATH=VALUE; write one such as kubernetes.nodePort=32510")
            continue
        try:
            value = _value(keys, text)
        except typer.BadParameter as error:
            faults.append(error.message)
            continue
        for leaf, part in _leaves_of(keys, value).items():
            if other := next((set_ for set_ in answers if _contradict(set_, answers[set_], leaf, part)), None):
                faults.append(f"--set {path}: it must not come with --set {'.'.join(other)}; leave one of them out")
            else:
                answers[leaf] = part
    return answers, faults


def _contradict(keys: Keys, value: Any, other: Keys, part: Any) -> bool:
    """Whether one is said of a whole, and the other of a part of it."""
    if len(keys) > len(other):
        keys, value, other = other, part, keys
    return keys != other and other[: len(keys)] == keys and value != {}


def _leaves_of(keys: Keys, value: Any) -> dict[Keys, Any]:
    if not isinstance(value, dict) or not value:
        return {keys: value}
    return {leaf: part for key, inner in value.items() for leaf, part in _leaves_of((*keys, str(key)), inner).items()}


def _nested(leaves: Mapping[Keys, Any]) -> dict[str, Any]:
    sections: dict[str, Any] = {}
    for keys, value in sorted(leaves.items(), key=lambda leaf: len(leaf[0])):
        section = sections
        for key in keys[:-1]:
            section = section.setdefault(key, {})
        section[keys[-1]] = {} if value == {} else value  # a mapping of its own, which more may come into
    return sections


def _config(sections: Mapping[str, Any]) -> dict[str, str]:
    """Return settings as the engine passes them."""
    return {
        f"{PROJECT}:{key}": value if isinstance(value, str) else json.dumps(value, default=str) for key, value in sections.items()
    }


@cache
def _schema() -> dict[str, Any]:
    return Settings.model_json_schema()


def _kind(keys: Keys) -> str:
    """Return the JSON type of a setting, with "or null" where it may be left out; nothing where there is no such setting."""
    node: dict[str, Any] = _schema()
    nullable = False
    for key in (*keys, None):
        nullable = {"type": "null"} in node.get("anyOf", [])
        node = next((one for one in node.get("anyOf", []) if one != {"type": "null"}), node)
        node = _schema()["$defs"][node["$ref"].rpartition("/")[2]] if "$ref" in node else node
        if key is not None:
            more = node.get("additionalProperties")
            node = node.get("properties", {}).get(key, more if isinstance(more, dict) else {})
    return str(node.get("type", "")) + (" or null" if nullable else "")


def _value(keys: Keys, text: str) -> Any:
    """Return what a text says of a setting: itself where the setting is a text, else what it is in YAML.

    Raises:
        typer.BadParameter: it is no YAML.
    """
    kind = _kind(keys)
    if kind.endswith("or null") and text in ("", "null"):
        return None
    try:
        value = yaml.safe_load(f"[{text}]" if kind.startswith("array") and not text.startswith("[") else text)
    except yaml.YAMLError:
        value = None
        if not kind.startswith("string"):
            raise typer.BadParameter(f"{PROJECT}:{'.'.join(keys)} cannot be read: it must be YAML; quote it") from None
    if kind.startswith("string") and not isinstance(value, str):
        return text
    if keys == RBD and isinstance(value, bool):
        return {} if value else None
    return value


class _Dumper(yaml.SafeDumper):
    """Writes a stack file as people do: a line for each section, with double quotes where there must be some."""

    def choose_scalar_style(self) -> str:
        style: str = super().choose_scalar_style()
        return '"' if style == "'" else style


class _Flow(dict[str, Any]):
    """A mapping in braces."""


_Dumper.add_representer(_Flow, lambda dumper, value: dumper.represent_mapping("tag:yaml.org,2002:map", value, flow_style=True))


def _text(sections: Mapping[str, Any]) -> str:
    order = ["target", "hostname", "environment", *(field.alias or name for name, field in Settings.model_fields.items())]
    config = {
        f"{PROJECT}:{key}": _Flow(value) if isinstance(value, dict) else value
        for key, value in sorted(sections.items(), key=lambda section: order.index(section[0]))
    }
    return HEAD + yaml.dump({"config": config}, Dumper=_Dumper, sort_keys=False, width=130, default_flow_style=False)
