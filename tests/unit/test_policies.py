"""Rules of the policy pack on inputs that the stand-ins' engine tests do not reach."""

from typing import Any

import pytest
from pulumi_policy import PolicyResourceOptions, ResourceValidationArgs
from pulumi_policy.policy import PolicyCustomTimeouts
from pulumi_policy.proxy import UNKNOWN_STRING_VALUE, unknown_checking_proxy

from policy import rules


def resource(kind: str, **inputs: Any) -> ResourceValidationArgs:
    options = PolicyResourceOptions(False, [], None, [], PolicyCustomTimeouts(0, 0, 0), [], None)
    urn = f"urn:pulumi:stack::project::{kind}::name"
    return ResourceValidationArgs(kind, unknown_checking_proxy(inputs), urn, "name", options, None)


def container(**inputs: Any) -> ResourceValidationArgs:
    return resource("docker:index/container:Container", name="registry", image="registry:3.1.2", **inputs)


@pytest.mark.parametrize(
    ("inputs", "words"),
    [
        ({"privileged": True}, "privileged is true"),
        ({"networkMode": "host"}, "networkMode is host"),
        ({"pidMode": "host"}, "pidMode is host"),
        ({"mounts": [{"type": "bind", "source": "/run/docker.sock", "target": "/x"}]}, "mounts has /run/docker.sock"),
        ({"user": "root"}, "user is root"),
    ],
)
def test_a_container_with_its_hosts_rights_is_refused(inputs: dict[str, Any], words: str) -> None:
    (found,) = rules.no_privileges(container(**inputs))
    assert words in found


def test_an_unknown_value_does_not_hide_a_violation_beside_it() -> None:
    found = list(rules.no_privileges(container(privileged=UNKNOWN_STRING_VALUE, capabilities={"adds": ["SYS_ADMIN"]})))
    assert len(found) == 1
    images = [{"name": "a", "image": UNKNOWN_STRING_VALUE}, {"name": "b", "image": "registry"}]
    (found_image,) = rules.pinned_images(resource("kubernetes:core/v1:Pod", spec={"containers": images}))
    assert "'b' runs 'registry'" in found_image


@pytest.mark.parametrize(
    ("image", "pinned"),
    [
        ("registry:3.1.2", True),
        ("hub.test:5000/registry:3.1.2", True),
        ("registry@sha256:" + "a" * 64, True),
        ("sha256:" + "a" * 64, True),
        ("a" * 64, True),
        ("registry", False),
        ("registry:latest", False),
        ("hub.test:5000/registry", False),
    ],
)
def test_an_image_is_pinned_by_its_tag_its_digest_or_its_id(image: str, pinned: bool) -> None:
    assert (list(rules.image_without_pin({"name": "registry", "image": image})) == []) is pinned


@pytest.mark.parametrize(
    "inputs",
    [
        {"create": "python3 - ensure --pool rbd --image registry --format mount"},
        {"create": "docker login --password-stdin hub.test"},
        {"create": 'PASSWORD="$(cat /run/password)" ./install'},
        {"environment": {"REGISTRY_HTTP_TLS_KEY": "/certs/domain.key", "NODES": "root 10.0.0.1 22 ssh-ed25519 AAAA"}},
        {"stdin": "-----BEGIN CERTIFICATE-----\nMIIB\n"},
    ],
)
def test_what_only_looks_like_a_secret_is_none(inputs: dict[str, Any]) -> None:
    assert list(rules.clear_secrets("command:local:Command", inputs)) == []


def test_a_private_key_inside_base64_is_found() -> None:
    kubeconfig = "client-key-data: LS0tLS1CRUdJTiBQUklWQVRFIEtFWS0tLS0tCg==\n"
    (found,) = rules.clear_secrets("pulumi:providers:kubernetes", {"kubeconfig": kubeconfig})
    assert "kubeconfig has a private key" in found


@pytest.mark.parametrize(
    ("kind", "inputs", "words"),
    [
        ("docker:index/container:Container", {"command": ["serve", "--password=hunter22"]}, "command[1] has a password or a key"),
        (
            "docker:index/container:Container",
            {"command": ["serve", "--token", "hunter22"]},
            "command[2] has the value of --token",
        ),
        (
            "kubernetes:core/v1:Pod",
            {"spec": {"containers": [{"args": ["-c", "x --password hunter22"]}]}},
            "args[1] has a password",
        ),
        ("kubernetes:core/v1:ConfigMap", {"data": {"c": "password: |\n  hunter22\n"}}, "data.c has a password or a key"),
        ("pulumi:providers:kubernetes", {"kubeconfig": "user:\n  token: hunter22\n"}, "kubeconfig has a password or a key"),
        ("docker:index/image:Image", {"x": '{"auths": {"hub.test": {"password": "hunter22"}}}'}, "x has a login of a registry"),
    ],
    ids=["option", "option and word", "script", "block", "kubeconfig", "login"],
)
def test_a_secret_in_clear_is_found(kind: str, inputs: dict[str, Any], words: str) -> None:
    (found,) = rules.clear_secrets(kind, inputs)
    assert words in found
    assert "hunter22" not in found


@pytest.mark.parametrize(
    ("kind", "inputs"),
    [
        ("kubernetes:networking.k8s.io/v1:Ingress", {"metadata": {"annotations": {"ingress.test/auth-secret": "users"}}}),
        ("kubernetes:core/v1:Pod", {"spec": {"containers": [{"env": [{"name": "PASSWORD", "value": "$(OTHER)"}]}]}}),
        ("docker:index/container:Container", {"command": ["login", "--password-file", "users", "--token", "/run/token"]}),
        ("kubernetes:core/v1:ConfigMap", {"data": {"c": "password: >-\n  $PASSWORD\n"}}),
    ],
    ids=["annotation", "variable", "file", "block"],
)
def test_a_reference_to_a_secret_is_none(kind: str, inputs: dict[str, Any]) -> None:
    assert list(rules.clear_secrets(kind, inputs)) == []


def test_an_unknown_context_of_a_container_does_not_hide_the_next_one() -> None:
    containers = [{"securityContext": UNKNOWN_STRING_VALUE}, {"securityContext": {"privileged": True}}]
    (found,) = rules.no_privileges(resource("kubernetes:core/v1:Pod", spec={"containers": containers}))
    assert "securityContext.privileged is true" in found
