"""NodeTrust: a pod on each node that makes the node's containerd trust the registry, for nodes that are not reached over SSH."""

from pathlib import Path

import pulumi
import pulumi_kubernetes as kubernetes
from pulumi_kubernetes.core.v1 import EnvVarArgsDict, VolumeArgsDict, VolumeMountArgsDict

from settings import Settings

SCRIPT = Path("hosts/trust.sh")
STOP_SECONDS = 10


class NodeTrust(pulumi.ComponentResource):
    """A DaemonSet that runs `hosts/trust.sh` on every node: what it writes is there as long as its pod.

    A new pod takes over from the old one before that ends, so that a change leaves no moment without trust. Nodes that are
    not ready are not waited for: theirs comes when they do.
    """

    def __init__(
        self,
        name: str,
        settings: Settings,
        authority_pem: pulumi.Input[str],
        *,
        image: pulumi.Input[str],
        with_pull_secret: bool,
        opts: pulumi.ResourceOptions | None = None,
    ) -> None:
        super().__init__("private-registry:index:NodeTrust", name, None, opts)
        assert settings.trust.daemon_set is not None
        folder, address = settings.trust.daemon_set.folder, settings.trust.daemon_set.resolve_to
        pull_secret = f"{settings.kubernetes.name}-own-pull"
        own = f"{settings.kubernetes.name}-trust"
        labels = {"k8s-app": own, "private-registry.stack": f"{pulumi.get_project()}.{pulumi.get_stack()}"}
        namespace = settings.kubernetes.namespace
        # Named by the engine: a changed script has another name, and thereby another pod.
        files = kubernetes.core.v1.ConfigMap(
            name,
            metadata={"namespace": namespace, "labels": labels},
            data={SCRIPT.name: SCRIPT.read_text()},
            opts=pulumi.ResourceOptions(parent=self),
        )
        environment: list[EnvVarArgsDict] = [
            {"name": "AUTHORITIES", "value": authority_pem},
            {"name": "STACK", "value": f"{pulumi.get_project()}/{pulumi.get_stack()}"},
            {"name": "REGISTRY", "value": settings.address},
            {"name": "ENTRY", "value_from": {"field_ref": {"field_path": "metadata.name"}}},
            {"name": "RUNTIME", "value": "containerd"},
            {"name": "CERTS_FOLDER", "value": folder},
            {"name": "RESOLVE_TO", "value": address or ""},
        ]
        mounts: list[VolumeMountArgsDict] = [
            {"name": "files", "mount_path": "/trust", "read_only": True},
            {"name": "folder", "mount_path": folder},
        ]
        volumes: list[VolumeArgsDict] = [
            {"name": "files", "config_map": {"name": files.metadata.name}},
            {"name": "folder", "host_path": {"path": folder, "type": "DirectoryOrCreate"}},
        ]
        if address is not None:
            mounts.append({"name": "hosts", "mount_path": "/etc/hosts"})
            volumes.append({"name": "hosts", "host_path": {"path": "/etc/hosts", "type": "File"}})
        kubernetes.apps.v1.DaemonSet(
            name,
            metadata={
                "name": own,
                "namespace": namespace,
                "labels": labels,
                "annotations": {"pulumi.com/skipAwait": "true"},
            },
            spec={
                "selector": {"match_labels": {"k8s-app": own}},
                "update_strategy": {"type": "RollingUpdate", "rolling_update": {"max_surge": 1, "max_unavailable": 0}},
                "template": {
                    "metadata": {"labels": labels},
                    "spec": {
                        "containers": [
                            {
                                "name": "trust",
                                "image": image,
                                "command": ["sh", f"/trust/{SCRIPT.name}", "hold"],
                                "env": environment,
                                "resources": {"requests": {"cpu": "10m", "memory": "16Mi"}, "limits": {"memory": "64Mi"}},
                                "volume_mounts": mounts,
                                # By its own mark: what the pod before it wrote may be there, too.
                                "readiness_probe": {
                                    "exec": {
                                        "command": ["sh", "-c", f'grep -q " $ENTRY\\$" {folder}/{settings.address}/hosts.toml']
                                    },
                                    "period_seconds": 2,
                                },
                                # What it refuses is seen in the pod's status.
                                "termination_message_policy": "FallbackToLogsOnError",
                                "security_context": {
                                    # The node's folder is root's.
                                    "run_as_user": 0,
                                    "read_only_root_filesystem": True,
                                    "allow_privilege_escalation": False,
                                    "capabilities": {"drop": ["ALL"]},
                                    "seccomp_profile": {"type": "RuntimeDefault"},
                                },
                            }
                        ],
                        "volumes": volumes,
                        "image_pull_secrets": [{"name": pull_secret}] if with_pull_secret else [],
                        "node_selector": {"kubernetes.io/os": "linux"},
                        # Every node pulls, whatever else it is kept free of.
                        "tolerations": [{"operator": "Exists"}],
                        "automount_service_account_token": False,
                        "enable_service_links": False,
                        "termination_grace_period_seconds": STOP_SECONDS,
                    },
                },
            },
            opts=pulumi.ResourceOptions(parent=self),
        )
        self.register_outputs({})
