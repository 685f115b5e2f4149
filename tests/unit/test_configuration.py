"""What the registry reads when it starts is the same at each `pulumi up`, and differs where it must."""

import bcrypt
import yaml

from components.configuration import admin_password, htpasswd, http_secret, registry_configuration

KEY = "a private key in PEM"


def test_the_same_key_makes_the_same_password_hashes_and_configuration() -> None:
    users = {"alice": "correct horse"}
    assert admin_password(KEY) == admin_password(KEY)
    assert htpasswd(users, KEY) == htpasswd(users, KEY)
    assert http_secret(KEY) == http_secret(KEY)


def test_another_key_makes_others() -> None:
    assert admin_password(KEY) != admin_password("another")
    assert htpasswd({"a": "b"}, KEY) != htpasswd({"a": "b"}, "another")


def test_the_password_has_24_characters_that_need_no_quotes() -> None:
    assert len(admin_password(KEY)) == 24
    assert admin_password(KEY).replace("-", "").replace("_", "").isalnum()


def test_the_hashes_are_bcrypt_of_the_passwords() -> None:
    (line,) = htpasswd({"alice": "correct horse"}, KEY).splitlines()
    name, _, digest = line.partition(":")
    assert name == "alice"
    assert bcrypt.checkpw(b"correct horse", digest.encode())
    assert not bcrypt.checkpw(b"wrong", digest.encode())


def test_two_users_with_one_password_have_two_hashes() -> None:
    first, second = htpasswd({"alice": "same", "bob": "same"}, KEY).splitlines()
    assert first.split(":")[1] != second.split(":")[1]


def test_a_changed_password_changes_the_salt_too() -> None:
    first = htpasswd({"alice": "one"}, KEY)
    second = htpasswd({"alice": "two"}, KEY)
    assert first[: len("alice:$2b$10$") + 22] != second[: len("alice:$2b$10$") + 22]


def test_the_order_of_the_users_does_not_matter() -> None:
    assert htpasswd({"a": "1", "b": "2"}, KEY) == htpasswd({"b": "2", "a": "1"}, KEY)


def test_users_are_asked_for_unless_access_is_anonymous() -> None:
    assert yaml.safe_load(registry_configuration(anonymous=False))["auth"]["htpasswd"]["path"] == "/auth/htpasswd"
    assert "auth" not in yaml.safe_load(registry_configuration(anonymous=True))


def test_the_drain_time_is_below_the_grace_period() -> None:
    from components.container import STOP_SECONDS

    drain = yaml.safe_load(registry_configuration(anonymous=True))["http"]["draintimeout"]
    assert int(drain.removesuffix("s")) < STOP_SECONDS
