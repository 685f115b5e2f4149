"""Which driver mounts an RBD image, by what the cluster has."""

from typing import Any

import pytest

from components.cluster import DriverError, choose
from settings import Rbd

OLD, NEW = "v1.30.14", "v1.31.0-gke.1"
CSI = {"clusterId": "ceph1"}


def rbd(**values: Any) -> Rbd:
    return Rbd.model_validate({"monitors": ("10.0.0.2:6789",), **values})


@pytest.mark.parametrize("driver", ["auto", "in-tree"])
def test_the_in_tree_driver_is_taken_up_to_kubernetes_1_30(driver: str) -> None:
    assert choose(rbd(driver=driver), [OLD, "v1.29.1"], []) == "in-tree"


@pytest.mark.parametrize("versions", [[NEW, OLD], [OLD, NEW], ["v1.100.0"]])
@pytest.mark.parametrize("driver", ["auto", "in-tree"])
def test_it_is_refused_where_the_server_or_one_node_is_newer(driver: str, versions: list[str]) -> None:
    with pytest.raises(DriverError, match=r"must be older than Kubernetes 1.31.*install ceph-csi"):
        choose(rbd(driver=driver), versions, ["rbd.csi.ceph.com"])


@pytest.mark.parametrize("driver", ["auto", "csi"])
def test_ceph_csi_is_taken_where_the_stack_knows_its_cluster(driver: str) -> None:
    assert choose(rbd(driver=driver, csi=CSI), [NEW], ["rbd.csi.ceph.com"]) == "csi"


def test_ceph_csi_is_refused_where_it_is_not_installed() -> None:
    with pytest.raises(DriverError, match=r"'rbd.csi.ceph.com'.*has other.csi.*install ceph-csi"):
        choose(rbd(driver="csi", csi=CSI), [NEW], ["other.csi"])
