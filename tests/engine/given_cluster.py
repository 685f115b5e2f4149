"""A cluster and a registry of the developer's own, in place of the lab's.

The variables are not KUBECONFIG, so that no test ever comes to a cluster that a shell happens to be about.
"""

import os
import ssl
from pathlib import Path

import httpx
import pytest
from kubernetes import client, config

KUBECONFIG = "PRIVATE_REGISTRY_TEST_KUBECONFIG"
REGISTRY = "PRIVATE_REGISTRY_TEST_REGISTRY"


class GivenCluster:
    """What the tests need of any cluster: its kubeconfig and its API. This machine has to reach its nodes."""

    def __init__(self, kubeconfig: Path) -> None:
        if not kubeconfig.is_file():
            raise pytest.UsageError(f"{KUBECONFIG} is {kubeconfig}: there is no such file")
        self.kubeconfig = kubeconfig.resolve()
        self._configuration = client.Configuration()
        config.load_kube_config(str(self.kubeconfig), client_configuration=self._configuration)
        self.server = str(self._configuration.host)
        with self.client() as api:
            classes = api.get("/apis/storage.k8s.io/v1/storageclasses").raise_for_status().json()["items"]
        if not any(_is_default(item["metadata"].get("annotations", {})) for item in classes):
            raise pytest.UsageError(f"The cluster of {KUBECONFIG} has no default storage class for the registries' claims")

    def client(self) -> httpx.Client:
        """Return a client of the cluster's API, as the kubeconfig's user."""
        given = self._configuration
        context = ssl.create_default_context(cafile=given.ssl_ca_cert)
        if given.cert_file:
            context.load_cert_chain(given.cert_file, given.key_file)
        headers = {entry["key"]: entry["value"] for entry in given.auth_settings().values()}
        return httpx.Client(base_url=self.server, verify=context, headers=headers, timeout=10, trust_env=False)


def _is_default(annotations: dict[str, str]) -> bool:
    return annotations.get("storageclass.kubernetes.io/is-default-class") == "true"


def given_cluster() -> GivenCluster | None:
    """Return the cluster that the developer wants to be used, if any."""
    return GivenCluster(Path(file)) if (file := os.environ.get(KUBECONFIG)) else None


def given_registry() -> str:
    """Return the registry from which the nodes of such a cluster pull.

    Raises:
        UsageError: none was named.
    """
    if not (address := os.environ.get(REGISTRY)):
        raise pytest.UsageError(
            f"{KUBECONFIG} is set, and {REGISTRY} is not: it must name a registry, such as hub.example.com:5000, that this "
            "machine's Docker daemon pushes to and the cluster's nodes pull from, both without a login"
        )
    return address
