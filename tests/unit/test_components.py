"""What the program registers, recorded by the SDK's mocks: a contract over all resources."""

import asyncio
import json
import runpy
from pathlib import Path
from typing import Any

import pulumi
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from pulumi.runtime import mocks
from pulumi.runtime.stack import wait_for_rpcs

import settings

ROOT = Path(__file__).parent.parent.parent
SECRET_OUTPUTS = {"tls:index/privateKey:PrivateKey": {"privateKeyPem": "a private key"}}
OUTPUTS = {
    "tls:index/selfSignedCert:SelfSignedCert": {"certPem": "an authority"},
    "tls:index/certRequest:CertRequest": {"certRequestPem": "a request"},
    "tls:index/locallySignedCert:LocallySignedCert": {"certPem": "a certificate"},
    "docker:index/image:Image": {"repoDigest": "sha256:0123"},
}


class Recorder(mocks.Mocks):
    def __init__(self) -> None:
        self.resources: dict[str, mocks.MockResourceArgs] = {}

    def call(self, args: mocks.MockCallArgs) -> Any:
        raise AssertionError(f"the program calls {args.token}")

    def new_resource(self, args: mocks.MockResourceArgs) -> tuple[str, dict[Any, Any]]:
        self.resources[f"{args.typ}/{args.name}"] = args
        outputs = {key: pulumi.Output.secret(value) for key, value in SECRET_OUTPUTS.get(args.typ, {}).items()}
        return f"{args.name}-id", {**args.inputs, **OUTPUTS.get(args.typ, {}), **outputs}


def ssh_private_key() -> str:
    """Return a key that no host knows."""
    return Ed25519PrivateKey.generate().private_bytes(Encoding.PEM, PrivateFormat.OpenSSH, NoEncryption()).decode()


def program(**config: str) -> Recorder:
    """Run the program on mocks and return what it registered."""
    recorder = Recorder()
    loop = asyncio.new_event_loop()
    asyncio.set_event_loop(loop)
    pulumi.runtime.set_mocks(recorder, project="private-registry", stack="test", preview=False)
    keys = {f"private-registry:{key}": value for key, value in config.items()}
    pulumi.runtime.set_all_config(keys, [f"private-registry:{key}" for key in settings.SECRETS if key in config])

    async def run() -> None:
        runpy.run_path(str(ROOT / "__main__.py"))
        await wait_for_rpcs()

    loop.run_until_complete(run())
    return recorder


@pytest.fixture(scope="module")
def recorded() -> Recorder:
    return program(trust='{"docker": true}')


def test_only_packages_with_a_stand_in_are_used(recorded: Recorder) -> None:
    packages = {args.typ.partition(":")[0] for args in recorded.resources.values()}
    assert packages == {"private-registry", "tls", "docker", "command"}


@pytest.mark.parametrize(
    "name", ["container:Container/registry", "container:Container/registry-files", "volume:Volume/registry-images"]
)
def test_containers_and_volume_carry_the_stacks_label(recorded: Recorder, name: str) -> None:
    (key,) = [key for key in recorded.resources if key.endswith(name)]
    labels = recorded.resources[key].inputs["labels"]
    assert labels == [{"label": "private-registry.stack", "value": "private-registry/test"}]


def test_the_containers_run_the_image_by_its_content(recorded: Recorder) -> None:
    for name in ("registry", "registry-files"):
        args = recorded.resources[f"docker:index/container:Container/{name}"]
        assert args.inputs["image"] == "sha256:0123"


def test_the_private_key_is_in_no_input_of_the_running_container_or_the_image(recorded: Recorder) -> None:
    for key in ("docker:index/container:Container/registry", "docker:index/image:Image/image"):
        assert "a private key" not in str(recorded.resources[key].inputs)


def test_the_uploaded_secrets_are_secret_and_for_the_registrys_user_alone(recorded: Recorder) -> None:
    marked = recorded.resources["docker:index/container:Container/registry-files"].inputs["uploads"]
    assert pulumi.runtime.rpc._special_sig_key in marked
    uploads = marked["value"]
    assert {upload["permissions"] for upload in uploads} == {"0400"}
    assert {upload["owner"] for upload in uploads} == {"1000"}


def test_trust_gets_the_authority_of_the_stack(recorded: Recorder) -> None:
    args = recorded.resources["command:local:Command/trust"].inputs
    assert args["environment"]["AUTHORITIES"] == "an authority"
    assert args["update"] == args["create"], "without an update any edit would run the create again"
    assert args["addPreviousOutputInEnv"] is False


def test_each_host_is_a_resource_with_the_script_on_standard_input_and_no_word_of_it_in_the_command() -> None:
    host = {"address": "10.0.0.7", "hostKey": "ssh-ed25519 AAAA", "runtime": "containerd", "user": "operator"}
    resources = program(trust=json.dumps({"hosts": [host]}), container='{"address": "10.0.0.5"}', sshPrivateKey=ssh_private_key())
    args = resources.resources["command:remote:Command/trust-10.0.0.7"].inputs
    assert (args["create"], args["update"], args["delete"]) == (
        "sudo -n sh -s install",
        "sudo -n sh -s install",
        "sudo -n sh -s remove",
    )
    assert "AUTHORITIES='an authority'" in args["stdin"]
    assert args["stdin"].endswith((ROOT / "hosts/trust.sh").read_text())
    assert args["triggers"] == ["registry.docker:5000", "containerd", None]


def test_generations_of_authorities_are_trusted_together_and_one_signs() -> None:
    resources = program(certificate='{"authority": {"generation": 2, "trusted": [1, 2]}}', trust='{"docker": true}').resources
    names = [args.name for key, args in resources.items() if key.startswith("tls:index/selfSignedCert")]
    assert sorted(names) == ["certificate-authority", "certificate-authority-2"]
    assert resources["command:local:Command/trust"].inputs["environment"]["AUTHORITIES"] == "an authority" * 2


def test_without_trust_nothing_is_run_on_this_machine() -> None:
    assert not [key for key in program().resources if key.startswith("command:")]


def test_the_image_is_built_for_a_pinned_platform_and_not_pushed(recorded: Recorder) -> None:
    args = recorded.resources["docker:index/image:Image/image"].inputs
    assert args["build"]["platform"] == settings.Image().platform
    assert args["skipPush"] is True


def test_the_image_is_pushed_where_the_stack_says() -> None:
    args = program(image='{"pushTo": "hub.example.com"}').resources["docker:index/image:Image/image"].inputs
    assert args["imageName"] == "hub.example.com/yeepay/registry:3.1.2"
    assert args["skipPush"] is False
    assert args["registry"]["server"] == "hub.example.com"


RBD = {"monitors": ["10.149.149.2:6789"], "sizeMiB": 1024, "driver": "in-tree"}


def workload(**rbd: Any) -> Recorder:
    """Run the program with an RBD image and no cluster that answers."""
    return program(
        target="kubernetes",
        image='{"pushTo": "hub.example.com"}',
        storage=json.dumps({"rbd": {**RBD, **rbd}, "onDestroy": "keep"}),
    )


@pytest.fixture(autouse=True)
def no_cluster(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("KUBECONFIG", str(tmp_path / "none"))


def test_the_image_is_made_by_the_script_on_standard_input_and_no_destroy_takes_it() -> None:
    args = workload().resources["command:local:Command/volume"].inputs
    assert args["stdin"] == (ROOT / "hosts/rbd.py").read_text()
    assert args["update"] == args["create"]
    assert "ensure --pool rbd --image registry --owner private-registry/test --size-mib 1024 --format mount" in args["create"]
    assert "delete" not in args
    assert "triggers" not in args, "a replacement would release the image"


def test_an_rbd_image_is_mounted_by_a_volume_that_another_node_can_attach() -> None:
    recorded = workload()
    spec = recorded.resources["kubernetes:core/v1:PersistentVolume/registry-rbd"].inputs["spec"]
    assert spec["accessModes"] == ["ReadWriteOnce", "ReadOnlyMany"]
    assert spec["persistentVolumeReclaimPolicy"] == "Retain"
    assert spec["capacity"] == {"storage": "1024Mi"}
    assert spec["rbd"] == {
        "monitors": ["10.149.149.2:6789"],
        "pool": "rbd",
        "image": "registry",
        "user": "registry",
        "secretRef": {"name": "registry-ceph", "namespace": "default"},
        "fsType": "ext4",
    }
    claim = recorded.resources["kubernetes:core/v1:PersistentVolumeClaim/registry-rbd"].inputs["spec"]
    assert claim["accessModes"] == ["ReadWriteOnce"]
    assert claim["storageClassName"] == spec["storageClassName"] != ""


def test_an_inline_rbd_volume_is_in_the_pod_itself() -> None:
    recorded = workload(mount="inline")
    controller = recorded.resources["kubernetes:core/v1:ReplicationController/registry"].inputs["spec"]
    (volume,) = [volume for volume in controller["template"]["spec"]["volumes"] if volume["name"] == "images"]
    assert volume["rbd"]["secretRef"] == {"name": "registry-ceph"}
    assert not [key for key in recorded.resources if "PersistentVolume" in key]


def test_with_ceph_csi_the_volume_is_a_static_one() -> None:
    recorded = workload(driver="csi", csi={"clusterId": "ceph1"})
    spec = recorded.resources["kubernetes:core/v1:PersistentVolume/registry-rbd"].inputs["spec"]
    assert "rbd" not in spec
    assert spec["csi"]["driver"] == "rbd.csi.ceph.com"
    assert spec["csi"]["volumeHandle"] == "registry"
    assert spec["csi"]["nodeStageSecretRef"] == {"name": "registry-ceph", "namespace": "default"}
    assert spec["csi"]["volumeAttributes"] == {
        "clusterID": "ceph1",
        "pool": "rbd",
        "staticVolume": "true",
        "imageFeatures": "layering,exclusive-lock",
    }


def test_a_pod_on_an_rbd_image_leaves_a_dead_node_at_once() -> None:
    controller = workload().resources["kubernetes:core/v1:ReplicationController/registry"].inputs["spec"]
    seconds = {toleration["tolerationSeconds"] for toleration in controller["template"]["spec"]["tolerations"]}
    assert seconds == {0}


def test_main_has_no_logic_and_under_70_lines() -> None:
    assert len((ROOT / "__main__.py").read_text().splitlines()) < 70


def test_no_component_imports_another() -> None:
    for file in (ROOT / "components").glob("*.py"):
        imported = [line for line in file.read_text().splitlines() if line.startswith(("import comp", "from comp"))]
        assert all(
            line.split()[1] in ("components.configuration", "components.cluster", "components.connection") for line in imported
        ), file
