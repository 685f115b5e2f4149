"""What the cluster can mount an RBD image with. Asked before anything is made: with a wrong driver the pod never starts."""

import re
from collections.abc import Sequence
from typing import Any, Literal

import pulumi

from settings import Rbd

Driver = Literal["in-tree", "csi"]
ANSWER_SECONDS = 5
# The API still takes the field from then on: https://github.com/kubernetes/kubernetes/pull/124546
WITHOUT_IN_TREE = (1, 31)


class DriverError(ValueError):
    """The stack's driver does not fit the cluster."""


def rbd_driver(rbd: Rbd | None) -> Driver | None:
    """Return the driver that mounts the image; none where there is no image.

    Where the cluster cannot be reached, as from a pull request's runner, what the stack says is taken, with a warning.

    Raises:
        DriverError: the cluster does not have the driver.
    """
    if rbd is None:
        return None
    import kubernetes
    import urllib3

    try:
        versions, drivers = _ask(kubernetes)
    except (urllib3.exceptions.HTTPError, kubernetes.client.ApiException, kubernetes.config.ConfigException) as error:
        assumed: Driver = "csi" if rbd.csi is not None else "in-tree"
        lines = str(error).strip().splitlines() or [type(error).__name__]
        pulumi.warn(f"the cluster does not say whether it has the RBD driver ({lines[0]}): {assumed} is assumed")
        return assumed
    return choose(rbd, versions, drivers)


def choose(rbd: Rbd, versions: Sequence[str], drivers: Sequence[str]) -> Driver:
    """Return the driver, by the versions of the server and all kubelets, and the names of the cluster's CSI drivers.

    Raises:
        DriverError: the cluster does not have it; the text says what to do.
    """
    newest = max(versions, key=_number)
    if rbd.csi is not None and rbd.driver != "in-tree":
        if rbd.csi.driver in drivers:
            return "csi"
        raise DriverError(
            f"private-registry:storage.rbd.csi.driver is {rbd.csi.driver!r}: the cluster must have a CSIDriver of that name, and "
            f"has {', '.join(drivers) or 'none'}; install ceph-csi, or correct the name"
        )
    if _number(newest) < WITHOUT_IN_TREE:
        return "in-tree"
    raise DriverError(
        f"private-registry:storage.rbd.driver is {rbd.driver!r}: the server and all nodes must be older than Kubernetes 1.31, "
        f"and one is {newest}, whose in-tree driver mounts nothing; install ceph-csi and set storage.rbd.csi.clusterId"
    )


def _number(version: str) -> tuple[int, ...]:
    match = re.match(r"v?(\d+)\.(\d+)", version)
    return tuple(map(int, match.groups())) if match else WITHOUT_IN_TREE


def _ask(kubernetes: Any) -> tuple[list[str], list[str]]:
    configuration = kubernetes.client.Configuration()
    config = pulumi.Config("kubernetes")
    kubeconfig, context = config.get("kubeconfig"), config.get("context")
    if kubeconfig is not None and ("\n" in kubeconfig or kubeconfig.startswith("{")):  # the text itself, not a path
        import yaml

        load, source = kubernetes.config.load_kube_config_from_dict, yaml.safe_load(kubeconfig)
    else:
        load, source = kubernetes.config.load_kube_config, kubeconfig
    load(source, context=context, client_configuration=configuration)
    configuration.retries = False
    with kubernetes.client.ApiClient(configuration) as client:
        server = kubernetes.client.VersionApi(client).get_code(_request_timeout=ANSWER_SECONDS)
        nodes = kubernetes.client.CoreV1Api(client).list_node(_request_timeout=ANSWER_SECONDS)
        drivers = kubernetes.client.StorageV1Api(client).list_csi_driver(_request_timeout=ANSWER_SECONDS)
    kubelets = [node.status.node_info.kubelet_version for node in nodes.items]
    return [server.git_version, *kubelets], [driver.metadata.name for driver in drivers.items]
