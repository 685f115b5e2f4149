"""The stack's settings: what they take, and that nothing malformed gets through or breaks the reader."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from settings import DEFAULTS, PROJECT, SECRETS, Settings, SettingsError, load, stack_file_schema

ROOT = Path(__file__).parent.parent.parent
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)
SECTIONS = [field.alias or name for name, field in Settings.model_fields.items()]


def loaded(secret: set[str] | None = None, **sections: Any) -> Settings:
    config = {f"{PROJECT}:{key}": value if isinstance(value, str) else json.dumps(value) for key, value in sections.items()}
    return load(config, {f"{PROJECT}:{key}" for key in secret or ()}, "test")


def faults(secret: set[str] | None = None, **sections: Any) -> list[str]:
    with pytest.raises(SettingsError) as caught:
        loaded(secret, **sections)
    return caught.value.faults


def test_an_empty_stack_has_the_systems_defaults() -> None:
    settings = loaded()
    assert settings.address == "registry.docker:5000"
    assert settings.image.name == "yeepay/registry:3.1.2"
    assert settings.certificate.validity_days == 365
    assert settings.storage.on_destroy == "keep"
    assert settings.container.address == "127.0.0.1"


def test_a_pushed_image_is_named_by_its_registry() -> None:
    assert loaded(image={"pushTo": "hub.example.com:5000"}).image.name == "hub.example.com:5000/yeepay/registry:3.1.2"


def test_another_projects_keys_are_none_of_ours() -> None:
    assert load({"pulumi:disable-default-providers": "[]", "aws:region": "x"}, set(), "test") == Settings()


def test_a_text_that_reads_as_a_number_is_still_a_text() -> None:
    assert loaded(hostname="123").hostname == "123"


def test_settings_cannot_be_changed() -> None:
    with pytest.raises(ValueError, match="frozen"):
        loaded().hostname = "x"  # type: ignore[misc]


def test_a_fault_in_one_section_does_not_hide_one_in_another() -> None:
    said = faults(hostname="A", container={"port": 0, "name": "-"}, image={"tag": "/"})
    assert len(said) == 4


def test_a_contradiction_is_told_beside_an_unrelated_fault() -> None:
    said = faults(image={"pushTo": "registry.docker:5000"}, storage={"onDestroy": "x"})
    assert len(said) == 2


def test_the_value_of_a_secret_in_plain_text_is_not_shown() -> None:
    (said,) = faults(users={"alice": "a password"})
    assert "a password" not in said


def test_a_long_value_is_shortened() -> None:
    (said,) = faults(hostname="A" * 5000)
    assert len(said) < 300


@given(section=st.sampled_from(SECTIONS), value=JSON)
def test_any_value_is_either_taken_or_refused_by_sentences(section: str, value: Any) -> None:
    try:
        settings = loaded(**{section: value})
    except SettingsError as error:
        assert error.faults
        for fault in error.faults:
            assert fault.startswith(f"{PROJECT}:{section}")
            assert ";" in fault
            assert "\n" not in fault.replace("\\n", "")
    else:
        assert isinstance(settings, Settings)


@given(key=st.text(min_size=1), value=JSON)
def test_an_unknown_key_is_always_refused(key: str, value: Any) -> None:
    if key in SECTIONS or key in SECRETS:
        return
    with pytest.raises(SettingsError):
        load({f"{PROJECT}:{key}": json.dumps(value)}, set(), "test")


@given(secret=st.sampled_from(sorted(SECRETS)), value=JSON)
def test_any_value_of_a_secret_is_taken_or_refused_by_sentences(secret: str, value: Any) -> None:
    try:
        loaded({secret}, **{secret: value})
    except SettingsError as error:
        assert all(fault.startswith(f"{PROJECT}:") for fault in error.faults)


@given(port=st.integers())
def test_a_port_is_taken_exactly_from_1_to_65535(port: int) -> None:
    try:
        assert loaded(container={"port": port}).container.port == port
        assert 1 <= port <= 65535
    except SettingsError:
        assert not 1 <= port <= 65535


@given(names=st.lists(st.from_regex(r"\A[a-z0-9]([a-z0-9-]{0,10}[a-z0-9])?(\.[a-z]{1,5}){1,3}\Z"), max_size=4))
def test_every_dns_name_is_taken(names: list[str]) -> None:
    assert loaded(certificate={"names": names}).certificate.names == tuple(names)


def test_the_schema_is_made_from_the_settings() -> None:
    written = json.loads((ROOT / "settings.schema.json").read_text())
    assert written == json.loads(json.dumps(stack_file_schema())), "run `make schema`"


@pytest.mark.parametrize("file", sorted(ROOT.glob("Pulumi.*.yaml")), ids=lambda file: file.name)
def test_every_stack_file_of_the_project_is_valid(file: Path) -> None:
    config = yaml.safe_load(file.read_text())["config"]
    config[f"{PROJECT}:{DEFAULTS}"] = yaml.safe_load((ROOT / "Pulumi.yaml").read_text())["config"][DEFAULTS]["default"]
    load({key: value if isinstance(value, str) else json.dumps(value) for key, value in config.items()}, set(), file.stem)


def test_the_schema_lets_a_stack_leave_to_the_defaults_what_a_mapping_must_have() -> None:
    sections = stack_file_schema()["$defs"]
    assert "required" not in sections["Rbd"]
    assert sections["TrustHost"]["required"] == ["address", "hostKey", "runtime"]


def test_a_new_stack_may_lack_the_secrets_that_it_needs() -> None:
    host = {"address": "node1", "hostKey": "ssh-ed25519 AAAA", "runtime": "docker"}
    sections = {"certificate": {"mode": "provided"}, "trust": {"hosts": [host]}, "container": {"address": "0.0.0.0"}}
    config = {f"{PROJECT}:{key}": json.dumps(value) for key, value in sections.items()}
    assert load(config, set(), "test", secrets_follow=True).needed_secrets == ["sshPrivateKey", "providedCertificate"]
    with pytest.raises(SettingsError, match="2 faults"):
        load(config, set(), "test")


def test_a_stack_has_the_defaults_of_its_target_where_it_says_nothing_itself() -> None:
    defaults = {"docker": {"image": {"tag": "1"}, "container": {"port": 1}}, "kubernetes": {"image": {"tag": "2"}}}
    settings = loaded(defaults=defaults, container={"name": "mine"})
    assert (settings.image.tag, settings.container.port, settings.container.name) == ("1", 1, "mine")


def test_a_list_of_a_stack_replaces_the_list_of_the_defaults() -> None:
    defaults = {"docker": {"certificate": {"names": ["a.test", "b.test"]}}}
    assert loaded(defaults=defaults, certificate={"names": ["c.test"]}).certificate.names == ("c.test",)


def test_a_stack_takes_a_default_back_with_null() -> None:
    rbd = {"monitors": ["10.0.0.1:6789"]}
    defaults = {"kubernetes": {"image": {"pushTo": "hub.example.com"}, "storage": {"rbd": rbd}}}
    settings = loaded(defaults=defaults, target="kubernetes", storage={"rbd": None, "claim": {"sizeGiB": 5}})
    assert settings.storage.claim.size_gib == 5


@pytest.mark.parametrize(
    "defaults", [[], {"docker": 1}, {"other": {}}, {"docker": {"users": {}}}, {"docker": {"target": "docker"}}], ids=str
)
def test_defaults_of_another_shape_are_refused(defaults: Any) -> None:
    (said,) = faults(defaults=defaults)
    assert said.startswith(f"{PROJECT}:defaults")


def test_a_faulty_default_is_told_by_the_setting_that_it_is_of() -> None:
    (said,) = faults(defaults={"docker": {"container": {"port": 0}}})
    assert said.startswith(f"{PROJECT}:container.port is 0")


def test_every_setting_is_in_the_readme() -> None:
    readme = (ROOT / "README.md").read_text()
    for section, field in Settings.model_fields.items():
        model = field.annotation
        for name, inner in getattr(model, "model_fields", {}).items():
            assert f"`{section}.{inner.alias or name}`" in readme
    for secret in SECRETS:
        assert f"`{secret}`" in readme
