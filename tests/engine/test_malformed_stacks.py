"""Malformed stacks: each is refused at preview by one message that names the value, the rule and the mend."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.engine.stack import Stack

# What the stack says, and what the message must have: the value, the rule, the mend.


def rbd(**values: Any) -> dict[str, Any]:
    """Return a stack in a cluster with an RBD image that has these settings."""
    image = {"monitors": ["10.149.149.2:6789"], "driver": "in-tree", **values}
    return {"target": "kubernetes", "image": {"pushTo": "hub.example.com"}, "storage": {"rbd": image}}


MALFORMED: dict[str, tuple[dict[str, Any], tuple[str, str, str]]] = {
    "hostname in capitals": (
        {"hostname": "Registry.docker"},
        ('"Registry.docker"', "DNS name in lower case", "such as"),
    ),
    "hostname with an underscore": ({"hostname": "my_registry"}, ('"my_registry"', "DNS name", "such as")),
    "hostname that is an address": ({"hostname": "10.0.0.1"}, ('"10.0.0.1"', "DNS name", "such as")),
    "hostname with a port": ({"hostname": "registry.docker:5000"}, ('"registry.docker:5000"', "DNS name", "such as")),
    "hostname of one endless label": ({"hostname": "a" * 64}, ('"aaaa', "DNS name", "such as")),
    "hostname as a mapping": ({"hostname": {"name": "x"}}, ('{"name": "x"}', "must be a text", "in quotes")),
    "empty hostname": ({"hostname": ""}, ('""', "DNS name", "such as")),
    "port as a text": ({"container": {"port": "5000"}}, ('"5000"', "whole number", "without quotes")),
    "port zero": ({"container": {"port": 0}}, ("port is 0", "from 1 to 65535", "such as 5000")),
    "port too large": ({"container": {"port": 65536}}, ("65536", "from 1 to 65535", "such as 5000")),
    "negative port": ({"container": {"port": -1}}, ("-1", "from 1 to 65535", "such as 5000")),
    "port with a fraction": ({"container": {"port": 5000.5}}, ("5000.5", "whole number", "a fraction")),
    "container as a text": ({"container": "registry"}, ('"registry"', "must be a mapping", "keys below it")),
    "container as a number": ({"container": 5}, ("container is 5", "must be a mapping", "keys below it")),
    "container as a list": ({"container": [1]}, ("[1]", "must be a mapping", "keys below it")),
    "container with a space in its name": (
        {"container": {"name": "my registry"}},
        ('"my registry"', "Docker name", "such as"),
    ),
    "container with a name of one letter": ({"container": {"name": "r"}}, ('"r"', "Docker name", "such as")),
    "published on a host name": ({"container": {"address": "localhost"}}, ('"localhost"', "IP address", "such as")),
    "published on half an address": ({"container": {"address": "10.0.0"}}, ('"10.0.0"', "IP address", "such as")),
    "memory of one MiB": ({"container": {"memoryMiB": 1}}, ("memoryMiB is 1", "from 64", "such as 512")),
    "memory beyond all machines": ({"container": {"memoryMiB": 1 << 30}}, ("1073741824", "to 1048576", "such as 512")),
    "memory with a unit": ({"container": {"memoryMiB": "512Mi"}}, ('"512Mi"', "whole number", "without quotes")),
    "unknown section": ({"swarm": {}}, ("swarm is not a setting", "must be one of", "correct or remove")),
    "misspelt key": ({"container": {"prot": 5000}}, ("container.prot", "container has name", "correct or remove prot")),
    "key in the wrong style": (
        {"container": {"memory_mib": 512}},
        ("memory_mib", "container has", "correct or remove"),
    ),
    "base without a tag": (
        {"image": {"base": "registry"}},
        ('"registry"', "pinned by a tag", "such as registry:3.1.2"),
    ),
    "base at latest": ({"image": {"base": "registry:latest"}}, ('"registry:latest"', "other than latest", "such as")),
    "base with half a digest": ({"image": {"base": "registry@sha256:abc"}}, ("sha256:abc", "pinned", "such as")),
    "base in capitals": ({"image": {"base": "Registry:3"}}, ('"Registry:3"', "image reference", "such as")),
    "repository with a tag": (
        {"image": {"repository": "a/b:1"}},
        ('"a/b:1"', "without host, tag or digest", "such as"),
    ),
    "repository with a slash at its end": ({"image": {"repository": "a/"}}, ('"a/"', "repository", "such as")),
    "tag with a slash": ({"image": {"tag": "a/b"}}, ('"a/b"', "image tag", "such as 3.1.2")),
    "unknown platform": (
        {"image": {"platform": "windows"}},
        ('"windows"', "'linux/amd64' or 'linux/arm64'", "write one"),
    ),
    "push to a URL": ({"image": {"pushTo": "https://hub"}}, ('"https://hub"', "registry's host", "such as hub")),
    "push to an impossible port": ({"image": {"pushTo": "hub:99999"}}, ('"hub:99999"', "registry's host", "such as")),
    "push to itself": (
        {"image": {"pushTo": "registry.docker:5000"}},
        ("registry.docker:5000", "comes from itself", "leave"),
    ),
    "push to itself by address": (
        {"image": {"pushTo": "127.0.0.1:5000"}},
        ("127.0.0.1:5000", "comes from itself", "leave"),
    ),
    "image that overwrites its base": (
        {"image": {"repository": "registry", "tag": "3.1.2"}},
        ('"registry"', "differ from image.base", "choose another"),
    ),
    "unknown mode of certificate": (
        {"certificate": {"mode": "letsencrypt"}},
        ("letsencrypt", "'authority'", "write one"),
    ),
    "certificate for no day": (
        {"certificate": {"validityDays": 0}},
        ("validityDays is 0", "from 1 to 7300", "such as 365"),
    ),
    "certificate for ever": ({"certificate": {"validityDays": 99999}}, ("99999", "from 1 to 7300", "such as 365")),
    "renewal before issue": (
        {"certificate": {"validityDays": 30, "renewBeforeDays": 30}},
        ("renewBeforeDays 30", "less than validityDays 30", "lower renewBeforeDays"),
    ),
    "authority that ends first": (
        {"certificate": {"authorityValidityDays": 100}},
        ("authorityValidityDays 100", "at least twice validityDays 365", "raise"),
    ),
    "authority that signs and is not trusted": (
        {"certificate": {"authority": {"generation": 2, "trusted": [1]}}},
        ("certificate.authority", "trusted must list generation 2", "add it"),
    ),
    "authority number zero": (
        {"certificate": {"authority": {"generation": 0}}},
        ("generation is 0", "a number from 1 to 1000", "write 1"),
    ),
    "authorities of a self-signed certificate": (
        {"certificate": {"mode": "self-signed", "authority": {"generation": 1}}},
        ("certificate: authority", "must come with mode: authority", "leave one of them out"),
    ),
    "host without its runtime": (
        {"trust": {"hosts": [{"address": "a.b", "hostKey": "ssh-ed25519 AAAA"}]}},
        ("trust.hosts.0.runtime", "must be there", "write it"),
    ),
    "host with an unknown runtime": (
        {"trust": {"hosts": [{"address": "a.b", "hostKey": "ssh-ed25519 AAAA", "runtime": "podman"}]}},
        ('"podman"', "'docker' or 'containerd'", "write one of them"),
    ),
    "host listed twice": (
        {"trust": {"hosts": [{"address": "a.b", "hostKey": "ssh-ed25519 AAAA", "runtime": "docker"}] * 2}},
        ("has a.b twice", "must list each address once", "remove one"),
    ),
    "restart of Docker": (
        {"trust": {"hosts": [{"address": "a.b", "hostKey": "ssh-ed25519 AAAA", "runtime": "docker", "restart": "x"}]}},
        ("trust.hosts.0", "restart must come with runtime: containerd", "leave it out"),
    ),
    "name that resolves to everywhere": (
        {"trust": {"hosts": [{"address": "a.b", "hostKey": "ssh-ed25519 AAAA", "runtime": "docker", "resolveTo": "0.0.0.0"}]}},
        ('"0.0.0.0"', "must be an address that clients reach", "such as 10.0.0.5"),
    ),
    "daemon set on one Docker host": (
        {"trust": {"daemonSet": {}}},
        ("trust.daemonSet is set", "must come with target: kubernetes", "or remove it"),
    ),
    "daemon set in a folder above": (
        {"target": "kubernetes", "image": {"pushTo": "hub.example.com"}, "trust": {"daemonSet": {"folder": "/etc/../x"}}},
        ('"/etc/../x"', "must be an absolute path", "such as /etc/containerd/certs.d"),
    ),
    "name that is none": ({"certificate": {"names": ["*.x y"]}}, ('"*.x y"', "DNS name", "such as")),
    "names as a text": ({"certificate": {"names": "a.b"}}, ('"a.b"', "must be a list", "in brackets")),
    "address that is none": ({"certificate": {"addresses": ["1.2.3.400"]}}, ("1.2.3.400", "IP address", "such as")),
    "provided, but not given": (
        {"certificate": {"mode": "provided"}},
        ('"provided"', "secret providedCertificate", "set it"),
    ),
    "anonymous as a text": ({"access": {"anonymous": "yes"}}, ('"yes"', "true or false", "without quotes")),
    "unknown fate of the images": ({"storage": {"onDestroy": "maybe"}}, ('"maybe"', "'keep', 'trash' or 'delete'", "write one")),
    "protected and deleted": (
        {"storage": {"protect": True, "onDestroy": "delete"}},
        ("protect: true", "contradict each other", "leave one"),
    ),
    "volume with a slash": ({"storage": {"volume": "/data"}}, ('"/data"', "Docker name", "such as")),
    "hosts line for all addresses": (
        {"trust": {"hostsFile": True}, "container": {"address": "0.0.0.0"}},
        ("0.0.0.0", "must then be one address", "write the address"),
    ),
    "a bare word to push to": ({"image": {"pushTo": "hub"}}, ('"hub"', "registry's host", "such as hub.example.com")),
    "tag that is no label": ({"image": {"tag": "a" * 51}}, ("aaa", "at most 50", "such as 3.1.2")),
    "no CPU at all": (
        {"target": "kubernetes", "image": {"pushTo": "hub.example.com"}, "kubernetes": {"cpu": "0.000"}},
        ('"0.000"', "number of CPUs", "such as"),
    ),
    "memory without a unit": (
        {"target": "kubernetes", "image": {"pushTo": "hub.example.com"}, "kubernetes": {"memory": "10"}},
        ('"10"', "with the unit", "such as 10Gi"),
    ),
    "node port out of range": (
        {"target": "kubernetes", "image": {"pushTo": "hub.example.com"}, "kubernetes": {"nodePort": 80}},
        ("nodePort is 80", "from 30000 to 32767", "such as 32500"),
    ),
    "cluster without a registry for the image": ({"target": "kubernetes"}, ("pushTo is missing", "pull from", "image.nodes")),
    "container settings in a cluster": (
        {"target": "kubernetes", "image": {"pushTo": "hub.example.com"}, "container": {"port": 5000}},
        ("container is set", "target: docker", "remove it"),
    ),
    "cluster settings on Docker": ({"kubernetes": {"cpu": "1"}}, ("kubernetes is set", "target: kubernetes", "remove it")),
    "push to its own ingress": (
        {
            "target": "kubernetes",
            "image": {"pushTo": "hub.test"},
            "kubernetes": {"ingress": {"host": "hub.test", "tlsSecret": "a"}},
        },
        ("hub.test", "comes from itself", "leave pushTo out"),
    ),
    "claim that the stack makes": (
        {
            "target": "kubernetes",
            "image": {"pushTo": "hub.test"},
            "storage": {"claim": {"existing": "registry-images"}},
        },
        ('"registry-images"', "must not be the claim", "leave existing out"),
    ),
    "claim that exists and is made": (
        {
            "target": "kubernetes",
            "image": {"pushTo": "hub.test"},
            "storage": {"claim": {"existing": "a", "sizeGiB": 5}},
        },
        ("storage.claim", "contradicts className and sizeGiB", "leave existing"),
    ),
    "node without its host key": (
        {"target": "kubernetes", "image": {"nodes": [{"address": "node1"}]}},
        ("hostKey", "must be there", "write it"),
    ),
    "RBD image without a monitor": (rbd(monitors=[]), ("monitors is []", "one monitor or more", "write all")),
    "monitor without its port": (rbd(monitors=["10.0.0.2"]), ("10.0.0.2", "a monitor's address and port", "10.149.149.2:6789")),
    "monitor named twice": (rbd(monitors=["a:6789", "a:6789"]), ("monitors is", "each once", "write all")),
    "RBD image of no size": (rbd(sizeMiB=0), ("sizeMiB is 0", "MiB from 64", "write one such as 1024000")),
    "RBD size with a unit": (rbd(sizeMiB="1000G"), ("sizeMiB", "must be a whole number", "without quotes")),
    "pool in the image's name": (rbd(image="rbd/registry"), ("rbd/registry", "letters, digits", "write one such as")),
    "admin as the Ceph user": (rbd(user="admin"), ("admin", "may do everything", "write one such as registry")),
    "Ceph user with its prefix": (rbd(user="client.registry"), ("client.registry", "a Ceph user without", "write one such as")),
    "Ceph host without its host key": (rbd(host={"address": "ceph1"}), ("host.hostKey", "must be there", "write it")),
    "Ceph host without a key to log in": (
        rbd(host={"address": "ceph1", "hostKey": "ssh-ed25519 AAAA"}),
        ("sshPrivateKey must be set exactly where", "storage.rbd.host", "set it with"),
    ),
    "csi without its cluster": (rbd(driver="csi"), ("storage.rbd", "must come with csi.clusterId", "write it")),
    "in-tree with csi": (rbd(driver="in-tree", csi={"clusterId": "a"}), ("storage.rbd", "contradicts csi", "leave one")),
    "inline with csi": (
        rbd(driver="auto", mount="inline", csi={"clusterId": "a"}),
        ("mount: inline", "in-tree driver only", "leave mount or csi"),
    ),
    "RBD image and claim": (
        {**rbd(), "storage": {**rbd()["storage"], "claim": {"sizeGiB": 5}}},
        ("storage", "rbd contradicts claim", "leave one"),
    ),
    "trash without an RBD image": (
        {"storage": {"onDestroy": "trash"}},
        ("onDestroy: trash", "must come with rbd", "write keep or delete"),
    ),
    "RBD image on Docker": (
        {"storage": rbd()["storage"]},
        ("storage.rbd is set", "target: kubernetes", "remove it"),
    ),
    "misspelled RBD setting": (rbd(sizeMib=5), ("sizeMib is not a setting", "rbd has monitors", "correct or remove sizeMib")),
    "users in plain text": (
        {"users": {"alice": "secret-password"}},
        ("users is in plain text", "must be encrypted", "--secret"),
    ),
    "push credentials in plain text": (
        {"pushCredentials": {"username": "a", "password": "secret-password"}},
        ("pushCredentials is in plain text", "must be encrypted", "--secret"),
    ),
    "private key in plain text": (
        {"providedCertificate": {"privateKey": "secret-password"}},
        ("providedCertificate is in plain text", "must be encrypted", "--secret"),
    ),
}
SECRETS: dict[str, tuple[dict[str, str], dict[str, Any], tuple[str, str, str]]] = {
    "short password": ({"users.alice": "short"}, {}, ("users.alice", "8 to 72 bytes", "set another")),
    "password beyond bcrypt": ({"users.alice": "x" * 73}, {}, ("73 bytes", "8 to 72 bytes", "set another")),
    "user name with a colon": ({'users["a:b"]': "long enough"}, {}, ("'a:b'", "letters, digits", "rename it")),
    "key that is none": ({"sshPrivateKey": "x"}, {}, ("sshPrivateKey cannot be read", "without a passphrase", "whole text")),
    "key for no node": ({"sshPrivateKey": "x"}, {}, ("sshPrivateKey must be set exactly where", "image.nodes", "remove it")),
    "Ceph key with the end of a line's worth of more": (
        {"cephKey": "key = AQCpPwprpSfWMhAAHD456IoPDGdUoQof0lI0KA=="},
        rbd(),
        ("cephKey cannot be read", "key alone", "print-key"),
    ),
    "Ceph key without an RBD image": (
        {"cephKey": "AQCpPwprpSfWMhAAHD456IoPDGdUoQof0lI0KA=="},
        {},
        ("cephKey is set", "must come with storage.rbd", "remove it"),
    ),
    "users where all are let in": (
        {"users.alice": "long enough"},
        {"access": {"anonymous": True}},
        ("access.anonymous is true", "must be false", "remove users or anonymous"),
    ),
    "push credentials for nowhere": (
        {"pushCredentials.username": "a", "pushCredentials.password": "b"},
        {},
        ("pushCredentials is set", "must come with image.pushTo", "set pushTo"),
    ),
    "half of the push credentials": (
        {"pushCredentials.username": "a"},
        {"image": {"pushTo": "hub.example.com"}},
        ("pushCredentials.password is missing", "must be a text", "set it"),
    ),
    "provided, but not asked for": (
        {"providedCertificate.certificate": "x"},
        {},
        ("providedCertificate is set", "must come with certificate.mode: provided", "set the mode"),
    ),
    "provided, but no PEM": (
        {f"providedCertificate.{part}": "x" for part in ("certificate", "privateKey", "authority")},
        {"certificate": {"mode": "provided"}},
        ("providedCertificate.privateKey cannot be read", "in PEM", "set the file's whole text"),
    ),
    "a secret that is no secret": (
        {"hostname": "a.b"},
        {},
        ("hostname is encrypted", "only users", "without --secret"),
    ),
}


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory, docker_host: str) -> Stack:
    stack = Stack("malformed", tmp_path_factory.mktemp("malformed"), port=5000)
    salt = yaml.safe_load(stack.file.read_text())["encryptionsalt"]
    stack.salt = salt  # type: ignore[attr-defined]
    return stack


def _refusal(stack: Stack) -> str:
    refused = stack.preview(check=False)
    assert refused.returncode != 0
    assert "RegistryCertificate" not in refused.stdout, "a resource was registered before the fault was found"
    return refused.stdout


@pytest.mark.parametrize("case", MALFORMED)
def test_a_malformed_stack_is_refused_with_value_rule_and_mend(case: str, project: Stack) -> None:
    settings, parts = MALFORMED[case]
    project.file.write_text(yaml.safe_dump({"encryptionsalt": project.salt}))  # type: ignore[attr-defined]
    project.settings = settings
    said = _refusal(project)
    for part in (*parts, "1 fault; nothing was changed"):
        assert part in said
    assert "unhandled" not in said
    assert "secret-password" not in said
    assert "Traceback" not in said


@pytest.mark.parametrize("case", SECRETS)
def test_a_malformed_secret_is_refused_without_showing_it(case: str, project: Stack) -> None:
    secrets, settings, parts = SECRETS[case]
    project.file.write_text(yaml.safe_dump({"encryptionsalt": project.salt}))  # type: ignore[attr-defined]
    project.settings = {}
    for path, value in secrets.items():
        project.set_secret(path, value)
    project.settings = settings
    said = _refusal(project)
    for part in parts:
        assert part in said
    for value in secrets.values():
        assert len(value) < 5 or value not in said
    assert "Traceback" not in said


def test_all_faults_of_a_stack_are_reported_at_once(project: Stack, tmp_path: Path) -> None:
    project.file.write_text(yaml.safe_dump({"encryptionsalt": project.salt}))  # type: ignore[attr-defined]
    project.settings = {
        "hostname": "A_B",
        "container": {"port": 0, "nmae": "x"},
        "image": {"base": "registry"},
        "users": {"a": "b"},
        "other": 1,
    }
    assert "6 faults; nothing was changed" in _refusal(project)
