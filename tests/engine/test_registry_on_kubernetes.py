"""The registry in a real cluster: what a user sees from the first `pulumi up` to the last `pulumi destroy`."""

import base64
import json

import httpx
import pytest

from lab.kubernetes import Cluster
from tests.engine.kubernetes_stack import KubernetesStack
from tests.engine.stack import wait_for

pytestmark = pytest.mark.xdist_group("kubernetes")


def test_the_pod_is_ready_guaranteed_and_hardened(running_in_cluster: KubernetesStack) -> None:
    pod = running_in_cluster.pod()
    assert pod["status"]["qosClass"] == "Guaranteed"
    assert pod["metadata"]["labels"] == {"k8s-app": "registry", "version": "3.1.2"}
    spec = pod["spec"]
    assert spec["securityContext"]["runAsUser"] == 1000
    assert spec["securityContext"]["fsGroupChangePolicy"] == "OnRootMismatch"
    assert spec["containers"][0]["securityContext"]["readOnlyRootFilesystem"] is True
    assert spec["containers"][0]["securityContext"]["capabilities"] == {"drop": ["ALL"]}
    assert spec["automountServiceAccountToken"] is False
    assert running_in_cluster.is_ready()


def test_a_second_up_changes_nothing(running_in_cluster: KubernetesStack) -> None:
    assert running_in_cluster.preview("--expect-no-changes").returncode == 0
    before = running_in_cluster.pod_name()
    assert "unchanged" in running_in_cluster.up("--refresh").stdout
    assert running_in_cluster.pod_name() == before


def test_a_push_and_a_pull_go_through_every_nodes_port(running_in_cluster: KubernetesStack) -> None:
    assert running_in_cluster.push_image("hello") == running_in_cluster.pull_image("hello")
    with running_in_cluster.client() as client:
        for node in running_in_cluster.node_addresses():
            url = f"https://{node}:{running_in_cluster.port}/v2/hello/tags/list"
            answer = client.get(url, extensions={"sni_hostname": running_in_cluster.hostname})
            assert answer.json()["tags"] == ["1"]


def test_verify_goes_through_with_the_daemon_too(running_in_cluster: KubernetesStack) -> None:
    said = running_in_cluster.ops("verify", "--docker").stdout
    assert "✓ pod" in said
    assert "✓ docker" in said


def test_a_kubelet_pulls_from_the_registry_over_verified_tls_with_the_pull_secret(
    in_cluster: KubernetesStack, lab_cluster: Cluster
) -> None:
    in_cluster.set("kubernetes", pullSecretNamespaces=[in_cluster.name])
    in_cluster.up()
    in_cluster.push_image("app")
    authority = in_cluster.outputs()["authorityCertificate"]
    for hosts_file in lab_cluster.folder.glob("node*/hosts"):
        with hosts_file.open("a") as lines:
            lines.write(f"{lab_cluster.node_address(1)} {in_cluster.hostname}\n")
    for folder in lab_cluster.registries():
        (folder / in_cluster.address).mkdir()
        (folder / in_cluster.address / "ca.crt").write_text(authority)
        server = f"https://{in_cluster.address}"
        hosts = f'server = "{server}"\n[host."{server}"]\nca = "/etc/containerd/certs.d/{in_cluster.address}/ca.crt"\n'
        (folder / in_cluster.address / "hosts.toml").write_text(hosts)

    def run(name: str, **more: object) -> None:
        container = {
            "name": "app",
            "image": f"{in_cluster.address}/app:1",
            "command": ["sleep", "600"],
            "imagePullPolicy": "Always",
        }
        spec = {"containers": [container], "terminationGracePeriodSeconds": 0, **more}
        body = {"metadata": {"name": name}, "spec": spec}
        in_cluster.api.post(f"{in_cluster.namespace}/pods", json=body).raise_for_status()

    run("with-secret", imagePullSecrets=[{"name": "registry-pull"}])
    wait_for(lambda: in_cluster.get("pods/with-secret")["status"]["phase"] == "Running")
    run("without-secret")

    def reason() -> str:
        status = in_cluster.get("pods/without-secret")["status"].get("containerStatuses", [{}])[0]
        return json.dumps(status.get("state", {}).get("waiting", {}))

    wait_for(lambda: "401" in reason() or "authorization" in reason())


def test_destroy_leaves_the_claim_alone_and_up_serves_the_images_again(in_cluster: KubernetesStack) -> None:
    in_cluster.up()
    pushed = in_cluster.push_image()
    in_cluster.destroy()
    for kind in ("pods", "replicationcontrollers", "services", "secrets"):
        assert in_cluster.get(kind)["items"] == []
    maps = [item["metadata"]["name"] for item in in_cluster.get("configmaps")["items"]]
    assert maps == ["kube-root-ca.crt"]
    (claim,) = in_cluster.get("persistentvolumeclaims")["items"]
    assert claim["status"]["phase"] == "Bound"
    in_cluster.up()
    assert in_cluster.pull_image() == pushed


def test_the_http_secret_and_the_key_are_in_the_secret_and_nowhere_else(running_in_cluster: KubernetesStack) -> None:
    data = running_in_cluster.get("secrets/registry")["data"]
    secrets = [base64.b64decode(data["http.secret"]).decode(), base64.b64decode(data["domain.key"]).decode().split("\n")[3]]
    for kind in ("pods", "replicationcontrollers", "services", "configmaps", "events"):
        text = json.dumps(running_in_cluster.get(kind))
        assert not [secret for secret in secrets if secret in text]


def test_metrics_cannot_be_read_from_outside_unless_monitoring_is_asked_for(
    running_in_cluster: KubernetesStack,
) -> None:
    address = running_in_cluster.pod()["status"]["podIP"]
    with pytest.raises(httpx.HTTPError):
        httpx.get(f"http://{address}:5001/metrics", trust_env=False, timeout=3)


def test_verify_explains_a_pod_that_cannot_pull_its_image(in_cluster: KubernetesStack) -> None:
    in_cluster.up()
    patch = {"spec": {"template": {"spec": {"containers": [{"name": "registry", "image": "127.0.0.1:1/nothing:1"}]}}}}
    headers = {"Content-Type": "application/strategic-merge-patch+json"}
    path = f"{in_cluster.namespace}/replicationcontrollers/registry"
    in_cluster.api.patch(path, json=patch, headers=headers).raise_for_status()
    in_cluster.api.delete(f"{in_cluster.namespace}/pods/{in_cluster.pod_name()}").raise_for_status()
    wait_for(lambda: "ErrImagePull" in json.dumps(in_cluster.get("pods?labelSelector=k8s-app%3Dregistry")))
    failed = in_cluster.ops("verify", check=False)
    assert failed.returncode == 1
    assert "has no ready pod" in failed.stdout
    assert "The node cannot pull the image" in failed.stdout


def test_verify_names_a_cluster_that_cannot_be_reached(running_in_cluster: KubernetesStack) -> None:
    kubeconfig = running_in_cluster.folder / "closed"
    text = running_in_cluster.cluster.kubeconfig.read_text()
    kubeconfig.write_text(text.replace(running_in_cluster.cluster.server, "https://127.0.0.1:1"))
    kept = running_in_cluster.environment["KUBECONFIG"]
    running_in_cluster.environment["KUBECONFIG"] = str(kubeconfig)
    failed = running_in_cluster.ops("verify", check=False)
    running_in_cluster.environment["KUBECONFIG"] = kept
    assert failed.returncode == 1
    assert "The cluster at https://127.0.0.1:1 cannot be reached" in failed.stdout


def test_an_ingress_takes_bodies_of_any_size_with_its_own_certificate(in_cluster: KubernetesStack) -> None:
    in_cluster.set("kubernetes", ingress={"host": "hub.test", "tlsSecret": "hub-tls", "className": "nginx"})
    in_cluster.up()
    path = f"/apis/networking.k8s.io/v1/namespaces/{in_cluster.name}/ingresses/registry"
    ingress = in_cluster.api.get(path).raise_for_status().json()
    assert ingress["metadata"]["annotations"]["nginx.ingress.kubernetes.io/proxy-body-size"] == "0"
    assert ingress["spec"]["tls"] == [{"hosts": ["hub.test"], "secretName": "hub-tls"}]
    assert in_cluster.preview("--expect-no-changes").returncode == 0


def test_monitoring_without_the_operator_is_told_and_with_it_has_metrics_and_alerts(
    in_cluster: KubernetesStack, lab_cluster: Cluster
) -> None:
    in_cluster.set("kubernetes", monitoring={"namespace": "monitoring"})
    failed = in_cluster.up(check=False)
    assert failed.returncode != 0
    assert "ServiceMonitor" in failed.stdout
    assert "monitoring.coreos.com/v1" in failed.stdout
    crds = "/apis/apiextensions.k8s.io/v1/customresourcedefinitions"
    for kind in ("ServiceMonitor", "PrometheusRule"):
        schema = {"type": "object", "x-kubernetes-preserve-unknown-fields": True}
        plural = f"{kind.lower()}s"
        body = {
            "metadata": {"name": f"{plural}.monitoring.coreos.com"},
            "spec": {
                "group": "monitoring.coreos.com",
                "scope": "Namespaced",
                "names": {"kind": kind, "plural": plural},
                "versions": [{"name": "v1", "served": True, "storage": True, "schema": {"openAPIV3Schema": schema}}],
            },
        }
        in_cluster.api.post(crds, json=body).raise_for_status()
    objects = f"/apis/monitoring.coreos.com/v1/namespaces/{in_cluster.name}"
    try:
        wait_for(
            lambda: all(in_cluster.api.get(f"{objects}/{kind}").is_success for kind in ("servicemonitors", "prometheusrules"))
        )
        in_cluster.up()
        groups = in_cluster.api.get(f"{objects}/prometheusrules/registry").json()["spec"]["groups"]
        alerts = {rule["alert"]: rule["expr"] for rule in groups[0]["rules"]}
        assert set(alerts) == {"RegistryCertificateExpires", "RegistryVolumeFills", "RegistryNotReady"}
        address = in_cluster.pod()["status"]["podIP"]
        metrics = httpx.get(f"http://{address}:5001/metrics", trust_env=False, timeout=10).text
        assert "registry_" in metrics
        in_cluster.destroy()
    finally:
        for plural in ("servicemonitors", "prometheusrules"):
            in_cluster.api.delete(f"{crds}/{plural}.monitoring.coreos.com")
