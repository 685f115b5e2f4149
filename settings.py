"""The stack's configuration as one frozen object. Every rule about it is here, and checked before any resource is registered.

Secrets (``users``, ``providedCertificate``, ``pushCredentials``) are checked here too, but never enter the object: the
program reads them as secret outputs. No message shows their values.
"""

import datetime
import ipaddress
import json
import re
from collections.abc import Callable, Mapping
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, model_validator
from pydantic.alias_generators import to_camel
from pydantic_core import PydanticCustomError

PROJECT = "private-registry"

HOSTNAME = re.compile(r"(?=.{1,253}$)[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?(\.[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?)*")
# https://github.com/distribution/reference/blob/main/reference.go
PATH_COMPONENT = r"[a-z0-9]+(?:(?:\.|_|__|-+)[a-z0-9]+)*"
DOMAIN = r"(?:[a-zA-Z0-9](?:[a-zA-Z0-9-]*[a-zA-Z0-9])?\.?)+(?::[0-9]{1,5})?"
REPOSITORY = re.compile(rf"{PATH_COMPONENT}(?:/{PATH_COMPONENT})*")
TAG = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,127}")
REFERENCE = re.compile(
    rf"(?:{DOMAIN}/)?{PATH_COMPONENT}(?:/{PATH_COMPONENT})*"
    rf"(?::(?P<tag>{TAG.pattern}))?(?:@(?P<digest>sha256:[a-f0-9]{{64}}))?"
)
DOCKER_NAME = re.compile(r"[a-zA-Z0-9][a-zA-Z0-9_.-]{1,127}")
USER_NAME = re.compile(r"[A-Za-z0-9._@-]{1,64}")
LONGEST_PASSWORD = 72  # bytes: bcrypt ignores what comes after them
SHORTEST_PASSWORD = 8


def _rule(holds: Callable[[Any], bool], rule: str, mend: str) -> AfterValidator:
    """A rule on one value: what must hold, in words, and what to write instead."""

    def check(value: Any) -> Any:
        if not holds(value):
            raise PydanticCustomError("rule", "{rule}; {mend}", {"rule": rule, "mend": mend})
        return value

    return AfterValidator(check)


def _is_address(text: str) -> bool:
    try:
        ipaddress.ip_address(text)
    except ValueError:
        return False
    return True


def _is_pinned(reference: str) -> bool:
    match = REFERENCE.fullmatch(reference)
    return match is not None and bool(match["digest"] or (match["tag"] and match["tag"] != "latest"))


def _is_hostname(text: str) -> bool:
    return bool(HOSTNAME.fullmatch(text)) and not _is_address(text)


def _is_endpoint(text: str) -> bool:
    host, _, port = text.rpartition(":") if ":" in text else (text, "", "443")
    return (_is_hostname(host) or _is_address(host)) and port.isdigit() and 1 <= int(port) <= 65535


Hostname = Annotated[str, _rule(_is_hostname, "must be a DNS name in lower case", "write one such as registry.example.com")]
IpAddress = Annotated[str, _rule(_is_address, "must be an IP address", "write one such as 10.0.0.5")]
Port = Annotated[int, _rule(lambda port: 1 <= port <= 65535, "must be a port from 1 to 65535", "write one such as 5000")]
PinnedImage = Annotated[
    str,
    _rule(
        _is_pinned,
        "must be an image reference pinned by a tag other than latest, or by a digest",
        "write one such as registry:3.1.2",
    ),
]
Repository = Annotated[
    str,
    _rule(
        lambda text: bool(REPOSITORY.fullmatch(text)),
        "must be a repository in lower case, without host, tag or digest",
        "write one such as yeepay/registry",
    ),
]
Tag = Annotated[
    str,
    _rule(
        lambda text: bool(TAG.fullmatch(text)),
        "must be an image tag: at most 128 letters, digits, dots, dashes or underscores",
        "write one such as 3.1.2",
    ),
]
Endpoint = Annotated[
    str,
    _rule(_is_endpoint, "must be a registry's host, with a port where it is not 443", "write one such as hub.example.com"),
]
DockerName = Annotated[
    str,
    _rule(
        lambda text: bool(DOCKER_NAME.fullmatch(text)),
        "must be a Docker name: 2 to 128 letters, digits, dots, dashes or underscores",
        "write one such as registry",
    ),
]
ValidityDays = Annotated[
    int,
    _rule(lambda days: 1 <= days <= 7300, "must be a number of days from 1 to 7300", "write one such as 365"),
]
RenewalDays = Annotated[
    int,
    _rule(lambda days: 0 <= days <= 7300, "must be a number of days from 0 to 7300", "write one such as 30"),
]
MemoryMiB = Annotated[
    int,
    _rule(lambda size: 64 <= size <= 1 << 20, "must be a number of MiB from 64 to 1048576", "write one such as 512"),
]


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, alias_generator=to_camel)


class Certificate(_Section):
    """The server's certificate, and the authority that clients trust."""

    mode: Literal["authority", "self-signed", "provided"] = Field(
        "authority",
        description="authority: an authority of its own signs the server's certificate; self-signed: the certificate is "
        "its own authority; provided: both come from the secret providedCertificate",
    )
    validity_days: ValidityDays = Field(365, description="days that the server's certificate is valid")
    authority_validity_days: ValidityDays = Field(3650, description="days that the authority is valid")
    renew_before_days: RenewalDays = Field(30, description="days before the end from which on `pulumi up` renews it")
    names: tuple[Hostname, ...] = Field((), description="further DNS names of the server")
    addresses: tuple[IpAddress, ...] = Field((), description="IP addresses of the server")

    @model_validator(mode="after")
    def _renewal_comes_after_issue(self) -> Self:
        if self.renew_before_days >= self.validity_days:
            raise PydanticCustomError(
                "rule",
                "renewBeforeDays {before} must be less than validityDays {validity}, or every preview would renew the "
                "certificate; lower renewBeforeDays",
                {"before": self.renew_before_days, "validity": self.validity_days},
            )
        if self.mode == "authority" and self.authority_validity_days < self.validity_days:
            raise PydanticCustomError(
                "rule",
                "authorityValidityDays {authority} must be at least validityDays {validity}, or the authority would end "
                "before the certificate; raise authorityValidityDays",
                {"authority": self.authority_validity_days, "validity": self.validity_days},
            )
        return self


class Image(_Section):
    """The registry's own image."""

    base: PinnedImage = Field("registry:3.1.2", description="Distribution image that it is built on")
    repository: Repository = Field("yeepay/registry", description="repository of the built image")
    tag: Tag = Field("3.1.2", description="tag of the built image")
    platform: Literal["linux/amd64", "linux/arm64"] = Field("linux/amd64", description="platform to build for")
    push_to: Endpoint | None = Field(None, description="another registry to push the built image to")

    @property
    def name(self) -> str:
        """The image's full name: host of the registry it is pushed to, repository and tag."""
        return f"{self.push_to}/{self.repository}:{self.tag}" if self.push_to else f"{self.repository}:{self.tag}"


class Access(_Section):
    """Who may use the registry."""

    anonymous: bool = Field(False, description="true: anyone who reaches the registry may push, pull and delete")


class Container(_Section):
    """The registry as a container on one Docker host."""

    name: DockerName = Field("registry", description="name of the container")
    address: IpAddress = Field("127.0.0.1", description="address of the Docker host that the port is published on")
    port: Port = Field(5000, description="port of the Docker host that the registry is published on")
    memory_mib: MemoryMiB | None = Field(None, alias="memoryMiB", description="limit of memory in MiB; none if left out")


class Storage(_Section):
    """Where the images are kept."""

    volume: DockerName = Field("registry", description="name of the Docker volume with all images")
    on_destroy: Literal["keep", "delete"] = Field(
        "keep", description="what `pulumi destroy` does with the volume: keep it, or delete it with all images"
    )
    protect: bool = Field(False, description="true: Pulumi refuses every change that would delete the volume")

    @model_validator(mode="after")
    def _protected_data_is_kept(self) -> Self:
        if self.protect and self.on_destroy == "delete":
            raise PydanticCustomError(
                "rule", "protect: true and onDestroy: delete contradict each other; leave one of them out", {}
            )
        return self


class Trust(_Section):
    """Clients on the machine that runs Pulumi. Writing their files needs root."""

    docker: bool = Field(False, description="true: the local Docker daemon trusts the registry's authority")
    hosts_file: bool = Field(
        False, description="true: the machine's hosts file gets a line that resolves hostname to container.address"
    )


class Settings(_Section):
    """All that a stack says about the registry, but for its secrets."""

    hostname: Hostname = Field("registry.docker", description="name that clients use, and the certificate's common name")
    certificate: Certificate = Certificate()
    image: Image = Image()
    access: Access = Access()
    container: Container = Container()
    storage: Storage = Storage()
    trust: Trust = Trust()

    @property
    def address(self) -> str:
        """What clients write before a repository: host and port."""
        return f"{self.hostname}:{self.container.port}"


SECRETS: Mapping[str, str] = {
    "users": "user names and passwords; without them there is one user, admin, whose password is generated",
    "providedCertificate": "PEM texts certificate (with its chain), privateKey and authority, for certificate.mode: provided",
    "pushCredentials": "username and password for image.pushTo",
}
_TYPE_RULES = {
    "int_type": ("must be a whole number", "write it without quotes and without a fraction"),
    "bool_type": ("must be true or false", "write it without quotes"),
    "string_type": ("must be a text", "write it in quotes"),
    "tuple_type": ("must be a list", "write its items in brackets"),
    "model_type": ("must be a mapping", "write its keys below it"),
    "model_attributes_type": ("must be a mapping", "write its keys below it"),
}


class SettingsError(ValueError):
    """The configuration breaks rules; ``faults`` has a sentence for each."""

    def __init__(self, stack: str, faults: list[str]) -> None:
        self.faults = faults
        count = "1 fault" if len(faults) == 1 else f"{len(faults)} faults"
        lines = "".join(f"\n  - {fault}" for fault in faults)
        super().__init__(f"the configuration of the stack {stack!r} has {count}; nothing was changed:{lines}")


def load(config: Mapping[str, str], secret_keys: set[str], stack: str) -> Settings:
    """Return the settings that a stack's configuration makes.

    Args:
        config: every key of the stack's configuration with its value, structured ones as JSON, as the engine passes them.
        secret_keys: the keys whose values are encrypted.
        stack: the stack's name, for messages.

    Raises:
        SettingsError: rules are broken; all of them are listed.
    """
    faults: list[str] = []
    sections: dict[str, Any] = {}
    secrets: dict[str, Any] = {}
    known = {field.alias or name: field for name, field in Settings.model_fields.items()}
    for full_key, text in sorted(config.items()):
        namespace, _, key = full_key.partition(":")
        if namespace != PROJECT:
            continue
        value = _parsed(text)
        if key in SECRETS:
            if full_key not in secret_keys:
                faults.append(
                    f"{full_key} is in plain text: it must be encrypted; take it out of the file and set it with "
                    f"`pulumi config set --secret --path {full_key}.NAME`"
                )
            else:
                secrets[key] = value
        elif key not in known:
            names = ", ".join(sorted([*known, *SECRETS]))
            faults.append(f"{full_key} is not a setting: it must be one of {names}; correct or remove it")
        elif full_key in secret_keys:
            faults.append(f"{full_key} is encrypted: only {', '.join(SECRETS)} may be; set it without --secret")
        else:
            # A text that reads as a number or a truth value is still the text that the user wrote.
            sections[key] = text if known[key].annotation is str and not isinstance(value, (dict, list)) else value
    settings = Settings()
    valid: dict[str, Any] = {}
    for key, value in sections.items():
        try:
            one = Settings.model_validate_json(json.dumps({key: value}))
        except ValidationError as error:
            faults += [_sentence(detail) for detail in error.errors()]
        else:
            valid[key] = getattr(one, key)
    settings = settings.model_copy(update=valid)
    faults += _contradictions(settings, secrets, sections.keys() - valid.keys())
    faults += _secret_faults(settings, secrets)
    if faults:
        raise SettingsError(stack, faults)
    return settings


def of_stack() -> Settings:
    """Return the settings of the stack that the engine runs now.

    Raises:
        SettingsError: rules are broken; all of them are listed.
    """
    import pulumi
    from pulumi.runtime import config

    # pulumi.Config answers for one key only; unknown keys are found in the whole map.
    everything = config.CONFIG.get()
    secret_keys = {key for key in everything if config.is_config_secret(key)}
    return load(everything, secret_keys, pulumi.get_stack())


def _parsed(text: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return text


def _sentence(detail: Any) -> str:
    """Put one of pydantic's faults as value, rule and mend."""
    *path, last = detail["loc"]
    key = f"{PROJECT}:" + ".".join(str(step) for step in detail["loc"])
    value = json.dumps(detail["input"], default=str)
    value = value if len(value) <= 80 else value[:77] + "..."
    kind = detail["type"]
    if kind == "extra_forbidden":
        section = Settings.model_fields[path[0]].annotation
        assert isinstance(section, type)
        assert issubclass(section, BaseModel)
        names = ", ".join(field.alias or name for name, field in section.model_fields.items())
        return f"{key} is not a setting: {path[0]} has {names}; correct or remove {last}"
    if kind == "literal_error":
        return f"{key} is {value}: it must be {detail['ctx']['expected']}; write one of them"
    if kind == "rule" and isinstance(detail["input"], dict):
        return f"{key}: {detail['msg']}"
    if kind in _TYPE_RULES:
        rule, mend = _TYPE_RULES[kind]
        return f"{key} is {value}: it {rule}; {mend}"
    return f"{key} is {value}: it {detail['msg']}"


def _contradictions(settings: Settings, secrets: Mapping[str, Any], faulty: set[str]) -> list[str]:
    """Return what does not go together. Sections that are faulty by themselves have their defaults here and are left out."""
    faults = []
    target = settings.image.push_to
    if target and not faulty & {"image", "hostname", "container"}:
        own = {settings.address, f"{settings.container.address}:{settings.container.port}"}
        own |= {f"{name}:{settings.container.port}" for name in (*settings.certificate.names, "localhost")}
        own |= {f"{address}:{settings.container.port}" for address in settings.certificate.addresses}
        if target in own or (settings.container.port == 443 and f"{target}:443" in own):
            faults.append(
                f'{PROJECT}:image.pushTo is "{target}": it must be another registry, as a registry\'s own image never '
                "comes from itself; name another one, or leave pushTo out"
            )
    if "image" not in faulty and settings.image.name == settings.image.base:
        faults.append(
            f'{PROJECT}:image.repository is "{settings.image.repository}": with its tag it must differ from image.base, or '
            "the build would overwrite its own base; choose another repository or tag"
        )
    if "access" not in faulty and settings.access.anonymous and "users" in secrets:
        faults.append(f"{PROJECT}:access.anonymous is true: it must be false where there are users; remove users or anonymous")
    if "certificate" not in faulty:
        provided = settings.certificate.mode == "provided"
        if provided and "providedCertificate" not in secrets:
            faults.append(
                f'{PROJECT}:certificate.mode is "provided": it must come with the secret providedCertificate; set it with '
                f"`pulumi config set --secret --path {PROJECT}:providedCertificate.certificate`, .privateKey and .authority"
            )
        if not provided and "providedCertificate" in secrets:
            faults.append(
                f"{PROJECT}:providedCertificate is set: it must come with certificate.mode: provided; set the mode, or remove it"
            )
    if "image" not in faulty and "pushCredentials" in secrets and target is None:
        faults.append(f"{PROJECT}:pushCredentials is set: it must come with image.pushTo; set pushTo, or remove it")
    everywhere = ipaddress.ip_address(settings.container.address).is_unspecified
    if not faulty & {"trust", "container"} and settings.trust.hosts_file and everywhere:
        faults.append(
            f'{PROJECT}:trust.hostsFile is true: container.address must then be one address, not "'
            f'{settings.container.address}", as the line names it; write the address, or leave hostsFile out'
        )
    return faults


def _secret_faults(settings: Settings, secrets: Mapping[str, Any]) -> list[str]:
    faults = []
    if "users" in secrets:
        faults += _user_faults(secrets["users"])
    if "pushCredentials" in secrets:
        faults += _text_faults("pushCredentials", secrets["pushCredentials"], ("username", "password"))
    if "providedCertificate" in secrets:
        parts = ("certificate", "privateKey", "authority")
        shape = _text_faults("providedCertificate", secrets["providedCertificate"], parts)
        faults += shape or _certificate_faults(settings, secrets["providedCertificate"])
    return faults


def _user_faults(users: Any) -> list[str]:
    key = f"{PROJECT}:users"
    if not isinstance(users, dict) or not users:
        return [f"{key} is not a mapping of names to passwords: it must have one or more; set it with --path {key}.NAME"]
    faults = []
    for name, password in users.items():
        if not USER_NAME.fullmatch(name):
            faults.append(
                f"{key} has the name {name!r}: it must be 1 to 64 letters, digits, dots, dashes, underscores or @; rename it"
            )
        size = len(password.encode()) if isinstance(password, str) else 0
        if not SHORTEST_PASSWORD <= size <= LONGEST_PASSWORD:
            faults.append(
                f"{key}.{name} has a password of {size} bytes: it must be a text of {SHORTEST_PASSWORD} to "
                f"{LONGEST_PASSWORD} bytes, as bcrypt takes no more; set another"
            )
    return faults


def _text_faults(key: str, value: Any, parts: tuple[str, ...]) -> list[str]:
    """Return faults of a secret that must be a mapping of exactly these parts to texts."""
    if not isinstance(value, dict):
        return [f"{PROJECT}:{key} is not a mapping: it must have {', '.join(parts)}; set each with --path"]
    wrong = [part for part in parts if not isinstance(value.get(part), str) or not value[part].strip()]
    faults = [f"{PROJECT}:{key}.{part} is missing: it must be a text; set it with --secret --path" for part in wrong]
    more = sorted(value.keys() - set(parts))
    return faults + [f"{PROJECT}:{key}.{part} is not a setting: {key} has {', '.join(parts)}; remove it" for part in more]


def _certificate_faults(settings: Settings, provided: Mapping[str, str]) -> list[str]:
    """Return what a client would refuse in a certificate that the user provides."""
    from cryptography import x509
    from cryptography.hazmat.primitives.serialization import load_pem_private_key
    from cryptography.x509 import verification

    key = f"{PROJECT}:providedCertificate"
    parsed: dict[str, Any] = {}
    faults = []
    for part, read in (
        ("certificate", lambda pem: x509.load_pem_x509_certificates(pem)),
        ("authority", lambda pem: x509.load_pem_x509_certificates(pem)),
        ("privateKey", lambda pem: load_pem_private_key(pem, None)),
    ):
        try:
            parsed[part] = read(provided[part].encode())
        except (ValueError, TypeError):
            what = "an unencrypted private key" if part == "privateKey" else "one or more certificates"
            faults.append(f"{key}.{part} cannot be read: it must be {what} in PEM; set the file's whole text")
    if faults:
        return faults
    leaf, *chain = parsed["certificate"]
    if leaf.public_key() != parsed["privateKey"].public_key():
        faults.append(f"{key}.privateKey is of another certificate: it must belong to it; set the key it was made with")
    now = datetime.datetime.now(datetime.UTC)
    if not leaf.not_valid_before_utc <= now <= leaf.not_valid_after_utc:
        faults.append(
            f"{key}.certificate is valid from {leaf.not_valid_before_utc:%Y-%m-%d} to {leaf.not_valid_after_utc:%Y-%m-%d}: "
            "it must be valid today; set a new one"
        )
        return faults
    names = [settings.hostname, *settings.certificate.names, *settings.certificate.addresses]
    for name in names:
        general = x509.IPAddress(ipaddress.ip_address(name)) if _is_address(name) else x509.DNSName(name)
        builder = verification.PolicyBuilder().store(verification.Store(parsed["authority"])).time(now)
        try:
            builder.build_server_verifier(general).verify(leaf, chain)
        except verification.VerificationError as error:
            faults.append(
                f"{key}.certificate is refused for {name}: it must name {name} among its alternative names and lead to the "
                f"authority ({error}); set one that does, with its chain"
            )
    return faults


def stack_file_schema() -> dict[str, Any]:
    """Return the JSON Schema of a stack's file, for editors and for checks without Pulumi."""
    model = Settings.model_json_schema()
    properties = {f"{PROJECT}:{key}": value for key, value in model["properties"].items()}
    for key, description in SECRETS.items():
        properties[f"{PROJECT}:{key}"] = {"type": "object", "description": f"secret: {description}"}
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "Stack of the private registry",
        "type": "object",
        "properties": {
            "config": {
                "type": "object",
                "properties": properties,
                "propertyNames": {"pattern": f"^(?!{PROJECT}:)|^{PROJECT}:({'|'.join([*model['properties'], *SECRETS])})$"},
            },
        },
        "$defs": model["$defs"],
    }


if __name__ == "__main__":
    print(json.dumps(stack_file_schema(), indent=2))
