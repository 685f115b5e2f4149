"""The policy pack on the real engine: what each rule refuses, in its own words, and what it lets through."""

import os
import re
from typing import Any

import docker
import pytest

from tests.engine.conftest import new_stack
from tests.engine.stack import Stack

PACK = ("--policy-pack", "policy")
# What the programs below have in common: a pod in a controller, and its parts.
HEAD = """
import pulumi
import pulumi_command as command
import pulumi_docker as docker
import pulumi_kubernetes as kubernetes
import pulumi_tls as tls

KEY = "-----BEGIN RSA PRIVATE KEY-----\\nMIIB\\n-----END RSA PRIVATE KEY-----\\n"
CERTIFICATE = "-----BEGIN CERTIFICATE-----\\nMIIB\\n-----END CERTIFICATE-----\\n"
HASH = "alice:$2b$10$" + "a" * 53
PROTECTED = pulumi.ResourceOptions(protect=True)
EQUAL = {"requests": {"cpu": "1", "memory": "1Gi"}, "limits": {"cpu": "1", "memory": "1Gi"}}


def controller(name, container=None, pod=None, spec=None, kind=kubernetes.core.v1.ReplicationController, opts=None):
    first = {"name": "main", "image": "registry:3.1.2", "resources": EQUAL, **(container or {})}
    template = {"metadata": {"labels": {"app": name}}, "spec": {"containers": [first], **(pod or {})}}
    selector = {"app": name} if kind is kubernetes.core.v1.ReplicationController else {"match_labels": {"app": name}}
    kind(name, metadata={"name": name}, spec={"selector": selector, "template": template, **(spec or {})}, opts=opts)


def claim(name, mode, **spec):
    spec = {"access_modes": [mode], "resources": {"requests": {"storage": "1Gi"}}, **spec}
    kubernetes.core.v1.PersistentVolumeClaim(name, metadata={"name": name}, spec=spec, opts=PROTECTED)


def on_claim(name):
    return {"volumes": [{"name": "images", "persistent_volume_claim": {"claim_name": name}}]}


def volume(name, policy, **source):
    spec = {"capacity": {"storage": "1Gi"}, "access_modes": ["ReadWriteMany"], "persistent_volume_reclaim_policy": policy}
    kubernetes.core.v1.PersistentVolume(name, metadata={"name": name}, spec={**spec, **source})


def image(name, context, **arguments):
    build = {"context": context, "dockerfile": f"{context}/Dockerfile", "args": arguments, "platform": "linux/amd64"}
    docker.Image(name, image_name=f"test/{name}:1", build=build, skip_push=True)


def rbd_image(owner, delete, protect):
    parent = pulumi.ComponentResource("private-registry:index:RbdVolume", owner)
    opts = pulumi.ResourceOptions(parent=parent, protect=protect)
    command.local.Command("volume", create="true", update="true", delete=delete, opts=opts)


RBD = {"monitors": ["10.149.149.2:6789"], "image": "registry", "pool": "rbd"}
READER = {"node_stage_secret_ref": {"name": "ceph", "namespace": "default"}}
CSI = {"driver": "rook-ceph.rbd.csi.ceph.com", "volume_handle": "registry", **READER}
SERVER = {"allowed_uses": ["server_auth"], "private_key_pem": pulumi.Output.secret(KEY), "subject": {"common_name": "x.test"}}
"""
REFUSED = """
controller("env-password", {"env": [{"name": "ADMIN_PASSWORD", "value": "correct horse"}]})
controller("clear-key-in-arguments", {"args": ["--key", KEY]})
kubernetes.core.v1.ConfigMap("clear-configuration", metadata={"name": "c"}, data={"config.yml": "http:\\n  secret: abcdef\\n"})
docker.Container("clear-env", name="e", image="registry:3.1.2", envs=["REGISTRY_TOKEN=abcdef"])
docker.Container("clear-upload", name="u", image="registry:3.1.2", uploads=[{"file": "/auth/htpasswd", "content": HASH}])
command.local.Command("clear-command", create="curl --password hunter22 https://x.test")
command.local.Command("clear-url", create="curl https://alice:hunter22@x.test")
command.local.Command("clear-environment", create="true", environment={"API_KEY": "abcdef"})
command.local.Command("clear-ceph-key", create="true", stdin="AQ" + "a" * 36 + "==")

image("key-in-context", "with-key")
image("key-in-arguments", "without-key", PASSWORD="hunter22", KEY=pulumi.Output.secret(KEY))

claim("once", "ReadWriteOnce")
claim("many-on-rbd", "ReadWriteMany", volume_name="on-rbd")
volume("on-rbd", "Retain", csi=CSI)
controller("two-on-one-claim", pod=on_claim("once"), spec={"replicas": 2})
controller("two-on-one-image", pod={"volumes": [{"name": "images", "rbd": RBD}]}, spec={"replicas": 2})
controller("two-on-rbd-claim", pod=on_claim("many-on-rbd"), spec={"replicas": 3}, kind=kubernetes.apps.v1.Deployment)

controller("burstable", {"resources": {"requests": {"cpu": "1", "memory": "1Gi"}, "limits": {"memory": "2Gi"}}})
controller("best-effort", {"resources": {}}, kind=kubernetes.apps.v1.Deployment)

controller("latest", {"image": "registry:latest"})
controller("untagged-init", pod={"init_containers": [{"name": "first", "image": "hub.test:5000/busybox", "resources": EQUAL}]})
docker.Container("untagged", name="t", image="registry")

tls.PrivateKey("short-rsa", algorithm="RSA", rsa_bits=2048)
tls.PrivateKey("default-rsa", algorithm="RSA")
tls.PrivateKey("default-curve", algorithm="ECDSA")
tls.SelfSignedCert("long-server", validity_period_hours=826 * 24, **SERVER)
tls.SelfSignedCert("long-authority", validity_period_hours=7301 * 24, is_ca_certificate=True, **SERVER)

docker.Volume("unprotected-volume", name="v")
kubernetes.core.v1.PersistentVolumeClaim("unprotected-claim", metadata={"name": "p"}, spec={"access_modes": ["ReadWriteOnce"]})
volume("deleted-with-claim", "Delete", nfs={"server": "10.0.0.1", "path": "/images"})
rbd_image("rbd", "python3 - release --pool rbd --image registry --policy trash --trash-days 30", protect=None)

controller("privileged", {"security_context": {"privileged": True}})
controller("capable", {"security_context": {"capabilities": {"add": ["SYS_ADMIN"]}}})
controller("root", {"security_context": {"run_as_user": 0}})
controller("root-pod", pod={"security_context": {"run_as_user": 0}})
controller("on-the-host", pod={"host_network": True, "host_pid": True})
controller("hosts-path", pod={"volumes": [{"name": "node", "host_path": {"path": "/etc"}}]}, kind=kubernetes.apps.v1.DaemonSet)
docker.Container("capable-container", name="p", image="registry:3.1.2", capabilities={"adds": ["NET_ADMIN"]})
docker.Container(
    "socket", name="s", image="registry:3.1.2",
    volumes=[{"container_path": "/var/run/docker.sock", "host_path": "/var/run/docker.sock"}],
)
docker.Container("root-container", name="r", image="registry:3.1.2", user="0:0")

kubernetes.core.v1.Service("low-port", metadata={"name": "l"}, spec={"ports": [{"port": 5000, "node_port": 5000}]})
"""
ACCEPTED = """
config = pulumi.Config()
reference = {"secret_key_ref": {"name": "registry", "key": "http.secret"}}
environment = [
    {"name": "REGISTRY_HTTP_SECRET", "value_from": reference},
    {"name": "ADMIN_PASSWORD", "value": pulumi.Output.secret("correct horse")},
    {"name": "REGISTRY_HTTP_TLS_KEY", "value": "/certs/domain.key"},
    {"name": "TOKEN_FILE", "value": "token"},
]
controller("secret-env", {"env": environment})
data = {"tls.crt": "LS0tLS1CRUdJTiBDRVJUSUZJQ0FURS0tLS0t", "http.secret": pulumi.Output.secret("YWJj"), "userID": "cmVnaXN0cnk="}
kubernetes.core.v1.Secret("secret", metadata={"name": "secret"}, data=data)
kubernetes.core.v1.Secret("secret-key", metadata={"name": "key"}, string_data={"tls.key": pulumi.Output.secret(KEY)})
text = "secretName: registry\\ntoken:\\n  realm: x\\npassword: $PASSWORD\\n"
kubernetes.core.v1.ConfigMap("configuration", metadata={"name": "c"}, data={"config.yml": text})
docker.Container(
    "files", name="f", image="registry@sha256:" + "a" * 64,
    envs=["REGISTRY_TOKEN_FILE=/run/token"],
    uploads=[{"file": "/certs/domain.crt", "content": CERTIFICATE}, {"file": "/key", "content": pulumi.Output.secret(KEY)}],
    capabilities={"drops": ["ALL"]}, user="1000:1000",
)
key = tls.PrivateKey("rsa", algorithm="RSA", rsa_bits=3072)
line = 'curl --password "$PASSWORD" --password-stdin https://x.test:5000; TOKEN=$(cat /run/token)'
command.local.Command("command", create=line, stdin=key.private_key_pem, environment={"API_KEY": pulumi.Output.secret("abc")})

image("image", "without-key", BASE="registry:3.1.2")

claim("many", "ReadWriteMany")
claim("once", "ReadWriteOnce")
claim("pointer", "ReadWriteOnce", volume_name="kept")
volume("kept", "Retain", rbd={**RBD, "monitors": ["10.149.149.2:6789"]})
controller("two-on-shared-claim", pod=on_claim("many"), spec={"replicas": 2})
controller("one-on-one-claim", pod=on_claim("once"), spec={"replicas": 1})
templates = [{"metadata": {"name": "own"}, "spec": {"access_modes": ["ReadWriteOnce"]}}]
own = {"replicas": 2, "service_name": "s", "volume_claim_templates": templates}
controller("each-its-own-claim", spec=own, kind=kubernetes.apps.v1.StatefulSet)
controller("a-job", {"resources": {}}, pod={"restart_policy": "Never"}, kind=kubernetes.batch.v1.Job, spec={"selector": None})

built = docker.Image("built", image_name="test/built:1", build={"context": "without-key"}, skip_push=True)
controller("unknown-image", {"image": built.repo_digest})
docker.Container("image-id", name="i", image="sha256:" + "a" * 64)
unknown = {"limits": {"cpu": key.id, "memory": key.id}}
controller("unknown-parts", {"resources": unknown, "env": [{"name": "TOKEN", "value": key.id}]})
kubernetes.core.v1.Service("unknown-port", metadata={"name": "u"}, spec={"ports": [{"port": 1, "node_port": key.id.apply(len)}]})

tls.PrivateKey("p256", algorithm="ECDSA", ecdsa_curve="P256")
tls.PrivateKey("ed25519", algorithm="ED25519")
tls.SelfSignedCert("server", validity_period_hours=825 * 24, **SERVER)
tls.SelfSignedCert("authority", validity_period_hours=7300 * 24, is_ca_certificate=True, **SERVER)

docker.Volume("protected-volume", name="v", opts=PROTECTED)
rbd_image("kept-rbd", None, protect=True)

kubernetes.core.v1.Service("port", metadata={"name": "p"}, spec={"ports": [{"port": 5000, "node_port": 32767}]})
trust = pulumi.ComponentResource("private-registry:index:NodeTrust", "trust")
controller(
    "documented", {"security_context": {"run_as_user": 0}}, kind=kubernetes.apps.v1.DaemonSet,
    pod={"volumes": [{"name": "node", "host_path": {"path": "/etc/containerd/certs.d"}}]},
    opts=pulumi.ResourceOptions(parent=trust),
)
"""
Violations = dict[tuple[str, str], str]
# The rule and the resource, and what the message must have: the value or its place, the rule, the mend.
REFUSALS: dict[tuple[str, str], tuple[str, ...]] = {
    ("no-secrets-in-clear", "env-password"): ("env[0].value has the value of ADMIN_PASSWORD in clear", "Output.secret"),
    ("no-secrets-in-clear", "clear-key-in-arguments"): ("spec.template.spec.containers[0].args[1] has a private key",),
    ("no-secrets-in-clear", "clear-configuration"): ("data.config.yml has a password or a key in a configuration",),
    ("no-secrets-in-clear", "clear-env"): ("envs[0] has the value of REGISTRY_TOKEN in clear",),
    ("no-secrets-in-clear", "clear-upload"): ("uploads[0].content has a user's password hash in clear",),
    ("no-secrets-in-clear", "clear-command"): ("create has a password or a key on a command line in clear",),
    ("no-secrets-in-clear", "clear-url"): ("create has a password in a URL in clear",),
    ("no-secrets-in-clear", "clear-environment"): ("environment.API_KEY has the value of API_KEY in clear",),
    ("no-secrets-in-clear", "clear-ceph-key"): ("stdin has a Ceph key in clear",),
    ("no-secrets-in-clear", "key-in-arguments"): ("build.args.PASSWORD has the value of PASSWORD in clear",),
    ("no-keys-in-images", "key-in-context"): ("with-key has a private key in deep/server.pem", "take it out"),
    ("no-keys-in-images", "key-in-arguments"): ("build.args.KEY is a secret", "build.args.PASSWORD is a secret", "take it out"),
    ("one-writer", "two-on-one-claim"): ("spec.replicas is 2", "the claim 'once' is ReadWriteOnce", "one writer", "replicas: 1"),
    ("one-writer", "two-on-one-image"): ("spec.replicas is 2", "the volume 'images' is an RBD image", "replicas: 1"),
    ("one-writer", "two-on-rbd-claim"): ("spec.replicas is 3", "'many-on-rbd' is bound to an RBD image", "replicas: 1"),
    ("guaranteed-pods", "burstable"): ("requests cpu 1 with a limit of none", "memory 1Gi with a limit of 2Gi", "write the same"),
    ("guaranteed-pods", "best-effort"): ("'main' requests cpu none with a limit of none", "must be there and equal"),
    ("pinned-images", "latest"): ("'main' runs 'registry:latest'", "must be pinned", "such as registry:3.1.2"),
    ("pinned-images", "untagged-init"): ("'first' runs 'hub.test:5000/busybox'", "must be pinned"),
    ("pinned-images", "untagged"): ("'t' runs 'registry'", "must be pinned"),
    ("strong-keys", "short-rsa"): ("rsaBits is 2048", "3072 bits or more", "rsa_bits=4096"),
    ("strong-keys", "default-rsa"): ("rsaBits is 2048",),
    ("strong-keys", "default-curve"): ("ecdsaCurve is P224", "P256, P384, P521", "ecdsa_curve='P256'"),
    ("certificates-end", "long-server"): ("826 days", "within 825 days", "lower certificate.validityDays"),
    ("certificates-end", "long-authority"): ("7301 days", "20 years", "lower certificate.authorityValidityDays"),
    ("protected-data", "unprotected-volume"): ("protect is false", "must be true", "storage.protect: true"),
    ("protected-data", "unprotected-claim"): ("protect is false", "must be true", "storage.protect: true"),
    ("protected-data", "deleted-with-claim"): ("protect is false", "must be true", "storage.protect: true"),
    ("protected-data", "volume"): ("protect is false", "--policy trash", "must be kept", "storage.onDestroy: keep"),
    ("no-privileges", "privileged"): ("securityContext.privileged is true", "must not", "leave it out"),
    ("no-privileges", "capable"): ("securityContext.capabilities.add is SYS_ADMIN", "must not", "leave it out"),
    ("no-privileges", "root"): ("runAsUser is 0", "must not", "such as 1000"),
    ("no-privileges", "root-pod"): ("runAsUser is 0", "must not", "such as 1000"),
    ("no-privileges", "on-the-host"): ("spec.hostNetwork is true", "spec.hostPID is true", "leave it out"),
    ("no-privileges", "hosts-path"): ("the volume 'node' is the node's /etc", "must not", "emptyDir"),
    ("no-privileges", "capable-container"): ("capabilities.adds is NET_ADMIN", "leave it out"),
    ("no-privileges", "socket"): ("volumes has /var/run/docker.sock", "must not", "leave it out"),
    ("no-privileges", "root-container"): ("user is 0:0", "must not", "such as 1000:1000"),
    ("node-ports", "low-port"): ("nodePort is 5000", "30000 to 32767", "such as 32500"),
}
ONLY_IN_PRODUCTION = {"guaranteed-pods", "protected-data"}


def violations(output: str) -> Violations:
    """Return what the engine says of the policies, by rule and resource."""
    said = output.partition("\nPolicies:\n")[2].partition("\n\n")[0]
    found: Violations = {}
    key = ("", "")
    for line in said.splitlines():
        if match := re.match(r" +- \[mandatory\] +(\S+) +\(.*: (\S+)\)", line):
            key = (match[1], match[2])
        found[key] = found.get(key, "") + line
    return found


def of_program(stack: Stack, program: str, *, production: bool) -> str:
    """Preview a program in place of the stack's own, with the pack."""
    main = stack.folder / "__main__.py"
    main.unlink()
    main.write_text(HEAD + program)
    for folder in ("with-key/deep", "without-key"):
        (stack.folder / folder).mkdir(parents=True, exist_ok=True)
        (stack.folder / folder.partition("/")[0] / "Dockerfile").write_text("ARG BASE\nFROM ${BASE}\n")
    (stack.folder / "with-key/deep/server.pem").write_text("-----BEGIN EC PRIVATE KEY-----\n")
    stack.environment["KUBECONFIG"] = os.devnull
    stack.settings = {"environment": {"production": production}}
    run = stack.preview(*PACK, check=False)
    return run.stdout + run.stderr


@pytest.fixture(scope="module")
def refused(tmp_path_factory: pytest.TempPathFactory, daemon: docker.DockerClient) -> Violations:
    with new_stack(tmp_path_factory.mktemp("refused"), daemon) as stack:
        return violations(of_program(stack, REFUSED, production=True))


@pytest.mark.parametrize(("rule", "resource"), REFUSALS)
def test_a_rule_names_the_value_the_rule_and_the_mend(refused: Violations, rule: str, resource: str) -> None:
    assert (rule, resource) in refused
    assert [words for words in REFUSALS[rule, resource] if words not in refused[rule, resource]] == []


def test_nothing_else_is_refused(refused: Violations) -> None:
    assert set(refused) - {("", "")} == set(REFUSALS)


def test_no_message_shows_a_secret(refused: Violations) -> None:
    said = "".join(refused.values())
    assert [secret for secret in ("correct horse", "hunter22", "abcdef", "MIIB", "$2b$") if secret in said] == []


def test_what_keeps_the_rules_passes(stack: Stack) -> None:
    output = of_program(stack, ACCEPTED, production=True)
    assert violations(output) == {("", ""): "    ✅ private-registry@v1.0.0 (local: policy)"}, output


def test_some_rules_hold_in_production_only(stack: Stack) -> None:
    rules = {rule for rule, _ in violations(of_program(stack, REFUSED, production=False))}
    assert rules - {""} == {rule for rule, _ in REFUSALS} - ONLY_IN_PRODUCTION


def test_what_stacks_share_can_say_that_they_are_of_production(stack: Stack) -> None:
    stack.settings["defaults"] = {"docker": {"environment": {"production": True}}}
    assert ("protected-data", "registry-images") in violations(stack.preview(*PACK, check=False).stdout)


def test_nothing_changes_where_the_pack_refuses(stack: Stack, daemon: docker.DockerClient) -> None:
    stack.set("environment", production=True)
    stack.write()
    run = stack.pulumi("up", "--yes", "--stack", stack.name, *PACK, check=False)
    assert run.returncode != 0
    assert "set private-registry:storage.protect: true" in violations(run.stdout)["protected-data", "registry-images"]
    assert "resources" not in stack.state()["deployment"]
    assert daemon.volumes.list(filters={"name": stack.name}) == []


def test_a_stack_on_docker_passes_up_and_again(stack: Stack) -> None:
    stack.up(*PACK)
    assert "❌" not in stack.preview(*PACK, "--expect-no-changes").stdout


LATE = """
first = command.local.Command("first", create="printf hunter22")
command.local.Command("second", create="true", environment={"API_KEY": first.stdout})
"""


def test_what_a_preview_cannot_know_is_refused_in_up_before_the_resource_is_made(stack: Stack) -> None:
    assert "✅" in of_program(stack, LATE, production=False)
    run = stack.up(*PACK, check=False)
    assert run.returncode != 0
    assert set(violations(run.stdout)) == {("", ""), ("no-secrets-in-clear", "second")}
    made = {entry["urn"].rpartition("::")[2] for entry in stack.state()["deployment"]["resources"]}
    assert "first" in made
    assert "second" not in made


RBD = {"monitors": ["10.149.149.2:6789"], "csi": {"clusterId": "ceph"}}
IN_CLUSTER: dict[str, dict[str, Any]] = {
    "claim": {"storage": {"protect": True, "claim": {"sizeGiB": 1}}, "trust": {"daemonSet": {"resolveTo": "10.0.0.5"}}},
    "RBD image": {"storage": {"protect": True, "rbd": RBD}},
}


@pytest.mark.parametrize("storage", IN_CLUSTER)
def test_a_stack_of_production_in_a_cluster_passes(stack: Stack, storage: str) -> None:
    shared = {"target": "kubernetes", "hostname": stack.hostname, "environment": {"production": True}}
    kubernetes = {"monitoring": {"namespace": "monitoring"}, "pullSecretNamespaces": ["team"]}
    stack.settings = {**shared, "image": {"pushTo": "hub.example.com"}, "kubernetes": kubernetes, **IN_CLUSTER[storage]}
    stack.environment["KUBECONFIG"] = os.devnull
    assert "✅" in stack.preview(*PACK).stdout


def test_a_pack_that_does_not_start_stops_the_preview(stack: Stack) -> None:
    (stack.folder / "policy").unlink()
    (stack.folder / "policy").mkdir()
    (stack.folder / "policy/PulumiPolicy.yaml").write_text("runtime: python\nversion: 1.0.0\n")
    (stack.folder / "policy/__main__.py").write_text("import a_package_that_is_not_there\n")
    run = stack.preview(*PACK, check=False)
    assert run.returncode != 0
    assert "No module named 'a_package_that_is_not_there'" in run.stdout + run.stderr
