"""RegistryWorkload: the registry as a ReplicationController in Kubernetes, its Service, and all that they need."""

import base64
import datetime
import hashlib
import json
from collections.abc import Mapping
from typing import Any

import pulumi
import pulumi_kubernetes as kubernetes
from pulumi_kubernetes.core.v1 import PodSpecArgsDict, RBDVolumeSourceArgsDict, VolumeArgsDict
from pulumi_kubernetes.meta.v1 import ObjectMetaArgsDict

from components.cluster import Driver
from components.configuration import first_user, htpasswd, http_secret, registry_configuration
from settings import Ingress, Rbd, Settings

USER = 1000
PORT = 5000
METRICS_PORT = 5001
STOP_SECONDS = 30  # above the registry's own drain timeout of 20 s
EXPIRY_ALERT_DAYS = 14
FULL_ALERT_PERCENT = 85


class RegistryWorkload(pulumi.ComponentResource):
    """One pod, as a volume has one writer; replaced as a whole whenever anything that it reads changes.

    A ReplicationController does not roll its pods when its template changes, so the whole template and all that the pod
    mounts are its replacement trigger. The old pod goes only when the new image is on its node.
    """

    def __init__(
        self,
        name: str,
        settings: Settings,
        *,
        image: pulumi.Input[str],
        certificate_pem: pulumi.Input[str],
        private_key_pem: pulumi.Input[str],
        users: pulumi.Output[dict[str, str]],
        pull_credentials: pulumi.Output[dict[str, str]] | None = None,
        ceph_key: pulumi.Output[str] | None = None,
        driver: Driver | None = None,
        opts: pulumi.ResourceOptions | None = None,
    ) -> None:
        super().__init__("private-registry:index:RegistryWorkload", name, None, opts)
        self._name = name
        self._settings = settings
        self._kubernetes = settings.kubernetes
        self._selector = {"k8s-app": self._kubernetes.name}
        self._labels = {**self._selector, "version": settings.image.tag}
        self._child = pulumi.ResourceOptions(parent=self)

        files = self._files(certificate_pem, pulumi.Output.secret(private_key_pem), users)
        configuration = self._configuration()
        pull_secret = None
        if settings.image.push_to is not None and pull_credentials is not None:
            pull_secret = self._pull_secret(
                f"{name}-own-pull", self._kubernetes.namespace, "-own-pull", settings.image.push_to, pull_credentials
            )
        pod = self._pod(with_pull_secret=pull_secret is not None)
        pulled = self._pulled_image(image, pod)
        images = self._images(ceph_key, driver)
        self._controller(image, pod, images, after=[files, configuration, pulled], read=[files.data, configuration.data])
        self._service()
        self._network_policy()
        for namespace in self._kubernetes.pull_secret_namespaces:
            self._pull_secret(f"{name}-pull-{namespace}", namespace, "-pull", settings.address, first_user(users))
        if self._kubernetes.ingress is not None:
            self._ingress(self._kubernetes.ingress)
        if self._kubernetes.monitoring is not None:
            self._service_monitor()
            self._alerts(certificate_pem, images)
        self.register_outputs({})

    def _metadata(
        self, suffix: str = "", *, namespace: str | None = None, annotations: Mapping[str, str] | None = None
    ) -> ObjectMetaArgsDict:
        metadata: ObjectMetaArgsDict = {
            "name": f"{self._kubernetes.name}{suffix}",
            "namespace": namespace or self._kubernetes.namespace,
            # By these `ops recover` tells the stack's own objects from others of the same name.
            "labels": {**self._selector, "private-registry.stack": f"{pulumi.get_project()}.{pulumi.get_stack()}"},
        }
        if annotations:
            metadata["annotations"] = annotations
        return metadata

    def _files(
        self, certificate_pem: pulumi.Input[str], key: pulumi.Output[str], users: pulumi.Output[dict[str, str]]
    ) -> kubernetes.core.v1.Secret:
        data: dict[str, pulumi.Input[str]] = {
            "domain.crt": certificate_pem,
            "domain.key": key,
            "http.secret": key.apply(http_secret),
        }
        if not self._settings.access.anonymous:
            data["htpasswd"] = pulumi.Output.all(users, key).apply(lambda both: htpasswd(both[0], both[1]))
        encoded = {file: pulumi.Output.from_input(value).apply(_base64) for file, value in data.items()}
        return kubernetes.core.v1.Secret(
            f"{self._name}-files", metadata=self._metadata(), type="Opaque", data=encoded, opts=self._child
        )

    def _configuration(self) -> kubernetes.core.v1.ConfigMap:
        text = registry_configuration(
            anonymous=self._settings.access.anonymous,
            debug_address=f":{METRICS_PORT}" if self._kubernetes.monitoring else None,
        )
        return kubernetes.core.v1.ConfigMap(
            f"{self._name}-configuration", metadata=self._metadata(), data={"config.yml": text}, opts=self._child
        )

    def _images(self, ceph_key: pulumi.Output[str] | None, driver: Driver | None) -> VolumeArgsDict:
        """Return the pod's volume with the images."""
        rbd = self._settings.storage.rbd
        if rbd is None:
            return {"name": "images", "persistent_volume_claim": {"claim_name": self._claim()}}
        assert ceph_key is not None
        secret = self._ceph_secret(rbd, ceph_key, driver)
        if rbd.mount == "inline":
            return {"name": "images", "rbd": self._in_tree(rbd, {"name": secret.metadata.name})}
        return {"name": "images", "persistent_volume_claim": {"claim_name": self._rbd_claim(rbd, secret, driver)}}

    def _ceph_secret(self, rbd: Rbd, key: pulumi.Output[str], driver: Driver | None) -> kubernetes.core.v1.Secret:
        """The Ceph user's key, as each driver reads it."""
        encoded = key.apply(_base64)
        in_tree = driver == "in-tree"  # it takes any entry for the key: there may be one only
        data: dict[str, pulumi.Input[str]] = {"key": encoded} if in_tree else {"userID": _base64(rbd.user), "userKey": encoded}
        return kubernetes.core.v1.Secret(
            f"{self._name}-ceph",
            metadata=self._metadata("-ceph"),
            type="kubernetes.io/rbd" if in_tree else "Opaque",
            data=data,
            opts=self._child,
        )

    @staticmethod
    def _in_tree(rbd: Rbd, secret: Any) -> RBDVolumeSourceArgsDict:
        return {
            "monitors": list(rbd.monitors),
            "pool": rbd.pool,
            "image": rbd.image,
            "user": rbd.user,
            "secret_ref": secret,
            "fs_type": "ext4",
        }

    def _rbd_claim(self, rbd: Rbd, secret: kubernetes.core.v1.Secret, driver: Driver | None) -> pulumi.Output[str]:
        """Make the volume of an RBD image and its claim, and return the claim's name.

        Both have names of the provider's choice: of another source, such as other monitors, there are a new volume and a new
        claim before the old ones go. They are only pointers; the image is not theirs, and outlives them.
        """
        reference = {"name": secret.metadata.name, "namespace": self._kubernetes.namespace}
        # A class that no other claim asks for, so that none takes the volume; no object of that name is needed.
        class_name = f"{self._kubernetes.namespace}-{self._kubernetes.name}-rbd"
        source: Any
        if driver == "in-tree":
            source = {"rbd": self._in_tree(rbd, reference)}
        else:
            assert rbd.csi is not None
            # https://github.com/ceph/ceph-csi/blob/devel/docs/static-pvc.md
            attributes = {
                "clusterID": rbd.csi.cluster_id,
                "pool": rbd.pool,
                "staticVolume": "true",
                "imageFeatures": "layering,exclusive-lock",
            }
            source = {
                "csi": {
                    "driver": rbd.csi.driver,
                    "volume_handle": rbd.image,
                    "fs_type": "ext4",
                    "node_stage_secret_ref": reference,
                    "volume_attributes": attributes,
                }
            }
        metadata = self._metadata("-images")
        del metadata["name"]
        persistent = kubernetes.core.v1.PersistentVolume(
            f"{self._name}-rbd",
            # Bound is what counts, and the controller is waited for.
            metadata={"labels": metadata["labels"], "annotations": {"pulumi.com/skipAwait": "true"}},
            spec={
                # The kubelet grows the mounted filesystem to this, in use.
                "capacity": {"storage": f"{rbd.size_mib}Mi"},
                # With ReadWriteOnce alone the attach controller would never let another node have it after a node's death.
                # What keeps a second writer out is the image: its watch and its exclusive lock.
                "access_modes": ["ReadWriteOnce", "ReadOnlyMany"],
                "persistent_volume_reclaim_policy": "Retain",
                "storage_class_name": class_name,
                **source,
            },
            opts=self._child,
        )
        claim = kubernetes.core.v1.PersistentVolumeClaim(
            f"{self._name}-rbd",
            metadata={**metadata, "annotations": {"pulumi.com/skipAwait": "true"}},
            spec={
                "access_modes": ["ReadWriteOnce"],
                "storage_class_name": class_name,
                "volume_name": persistent.metadata.name,
                "resources": {"requests": {"storage": f"{rbd.size_mib}Mi"}},
            },
            # What a claim asks for cannot change without a class that allows it: growth is the volume's alone.
            opts=pulumi.ResourceOptions(parent=self, ignore_changes=["spec.resources"]),
        )
        name: pulumi.Output[str] = claim.metadata.name
        return name

    def _claim(self) -> str:
        """Return the name of the claim that holds the images, made here unless it exists."""
        claim = self._settings.storage.claim
        if claim.existing is not None:
            return claim.existing
        kubernetes.core.v1.PersistentVolumeClaim(
            f"{self._name}-images",
            metadata=self._metadata("-images"),
            spec={
                "access_modes": ["ReadWriteOnce"],
                "resources": {"requests": {"storage": f"{claim.size_gib}Gi"}},
                # Left out, not null: null would take the default class away from a claim that is taken up again.
                **({} if claim.class_name is None else {"storage_class_name": claim.class_name}),
            },
            opts=pulumi.ResourceOptions(
                parent=self,
                provider=self._keeper(),
                # A claim's class cannot change: the replacement that it would be is another, empty claim.
                ignore_changes=["spec.storageClassName"],
                # All images are in it: it outlives the stack unless the stack says otherwise.
                retain_on_delete=self._settings.storage.on_destroy == "keep",
                protect=self._settings.storage.protect or None,
            ),
        )
        return f"{self._kubernetes.name}-images"

    def _keeper(self) -> kubernetes.Provider:
        """A provider that takes a claim which an earlier stack kept for its own; everything else has to be new."""
        config = pulumi.Config("kubernetes")
        return kubernetes.Provider(
            f"{self._name}-keeper",
            kubeconfig=config.get_secret("kubeconfig"),
            context=config.get("context"),
            upsert_existing_objects=True,
            # Another address of the same cluster must not replace the provider, and with it the claim.
            cluster_identifier=f"{pulumi.get_project()}/{pulumi.get_stack()}",
            opts=self._child,
        )

    def _pull_secret(
        self, name: str, namespace: str, suffix: str, address: str, credentials: pulumi.Output[dict[str, str]]
    ) -> kubernetes.core.v1.Secret:
        login = credentials.apply(lambda both: _base64(_docker_login(address, both)))
        return kubernetes.core.v1.Secret(
            name,
            metadata=self._metadata(suffix, namespace=namespace),
            type="kubernetes.io/dockerconfigjson",
            data={".dockerconfigjson": login},
            opts=self._child,
        )

    def _pod(self, *, with_pull_secret: bool) -> PodSpecArgsDict:
        """The pod without its image and its images' volume: it is plain data, so that a change of any of it can be seen."""
        own = self._kubernetes.name
        resources = {"cpu": self._kubernetes.cpu, "memory": self._kubernetes.memory}
        # Short is safe where another writer is fenced; the default of five minutes is five minutes of no service.
        seconds = self._settings.toleration_seconds
        pod: PodSpecArgsDict = {
            "containers": [
                {
                    "name": "registry",
                    "image_pull_policy": "Never" if self._settings.image.nodes else "IfNotPresent",
                    "args": ["serve", "/etc/distribution/config.yml"],
                    "ports": [{"name": "registry", "container_port": PORT, "protocol": "TCP"}],
                    "env": [
                        {
                            "name": "REGISTRY_HTTP_SECRET",
                            "value_from": {"secret_key_ref": {"name": own, "key": "http.secret"}},
                        }
                    ],
                    # Equal, so that the pod is Guaranteed: the last to be evicted.
                    "resources": {"requests": resources, "limits": resources},
                    "volume_mounts": [
                        {"name": "images", "mount_path": "/var/lib/registry"},
                        {"name": "certificate", "mount_path": "/certs", "read_only": True},
                        {"name": "users", "mount_path": "/auth", "read_only": True},
                        {"name": "configuration", "mount_path": "/etc/distribution", "read_only": True},
                    ],
                    "security_context": {
                        "read_only_root_filesystem": True,
                        "allow_privilege_escalation": False,
                        "capabilities": {"drop": ["ALL"]},
                    },
                    # TCP only: storage that stalls must not restart the registry, which would not mend it.
                    # Patient, as a node that is busy answers late: a restart would only add to its work.
                    "liveness_probe": {
                        "tcp_socket": {"port": PORT},
                        "period_seconds": 10,
                        "timeout_seconds": 5,
                        "failure_threshold": 6,
                    },
                    "readiness_probe": {
                        "http_get": {"path": "/", "port": PORT, "scheme": "HTTPS"},
                        "period_seconds": 1,
                        "timeout_seconds": 5,
                    },
                }
            ],
            "volumes": [
                self._secret_volume("certificate", "domain.crt", "domain.key"),
                self._secret_volume("users", *([] if self._settings.access.anonymous else ["htpasswd"])),
                {"name": "configuration", "config_map": {"name": own}},
            ],
            "security_context": {
                "run_as_user": USER,
                "run_as_group": USER,
                "run_as_non_root": True,
                "fs_group": USER,
                # Else a volume with many images takes minutes to change its owner at each start.
                "fs_group_change_policy": "OnRootMismatch",
                "seccomp_profile": {"type": "RuntimeDefault"},
            },
            "automount_service_account_token": False,
            "enable_service_links": False,
            "termination_grace_period_seconds": STOP_SECONDS,
            "tolerations": [
                {
                    "key": f"node.kubernetes.io/{condition}",
                    "operator": "Exists",
                    "effect": "NoExecute",
                    "toleration_seconds": seconds,
                }
                for condition in ("not-ready", "unreachable")
            ],
        }
        if with_pull_secret:
            pod["image_pull_secrets"] = [{"name": f"{own}-own-pull"}]
        if self._kubernetes.node_selector:
            pod["node_selector"] = self._kubernetes.node_selector
        if self._kubernetes.affinity:
            pod["affinity"] = self._kubernetes.affinity
        if self._kubernetes.priority_class is not None:
            pod["priority_class_name"] = self._kubernetes.priority_class
        return pod

    def _secret_volume(self, name: str, *files: str) -> VolumeArgsDict:
        if not files:
            return {"name": name, "empty_dir": {"medium": "Memory", "size_limit": "1Mi"}}
        items = [{"key": file, "path": file} for file in files]
        return {"name": name, "secret": {"secret_name": self._kubernetes.name, "items": items, "default_mode": 0o440}}

    def _pulled_image(self, image: pulumi.Input[str], pod: PodSpecArgsDict) -> pulumi.Resource:
        """Have the image on the pod's node before the old pod goes: a Job runs it there once, and does nothing."""
        digest = pulumi.Output.from_input(image).apply(lambda text: hashlib.sha256(text.encode()).hexdigest()[:10])
        spec: dict[str, Any] = {
            "containers": [
                {
                    "name": "image",
                    "image": image,
                    "image_pull_policy": pod["containers"][0]["image_pull_policy"],
                    "args": ["--version"],
                    "resources": {"requests": {"cpu": "10m", "memory": "32Mi"}, "limits": {"memory": "128Mi"}},
                    "security_context": pod["containers"][0]["security_context"],
                }
            ],
            "restart_policy": "Never",
            "automount_service_account_token": False,
            "security_context": {"run_as_user": USER, "run_as_non_root": True, "seccomp_profile": {"type": "RuntimeDefault"}},
            "affinity": {
                "pod_affinity": {
                    "preferred_during_scheduling_ignored_during_execution": [
                        {
                            "weight": 100,
                            "pod_affinity_term": {
                                "label_selector": {"match_labels": self._selector},
                                "topology_key": "kubernetes.io/hostname",
                            },
                        }
                    ]
                }
            },
        }
        for key in ("image_pull_secrets", "node_selector", "priority_class_name"):
            if key in pod:
                spec[key] = pod[key]
        metadata = self._metadata(annotations=self._deadline())
        metadata["name"] = pulumi.Output.concat(self._kubernetes.name, "-image-", digest)
        metadata["labels"] = {**metadata["labels"], "k8s-app": f"{self._kubernetes.name}-image"}
        job: pulumi.Resource = kubernetes.batch.v1.Job(
            f"{self._name}-image",
            metadata=metadata,
            spec={"backoff_limit": 3, "template": {"metadata": {"labels": metadata["labels"]}, "spec": spec}},
            # Its name is the image's: where only the rest changes, the old one has to go first.
            opts=pulumi.ResourceOptions(parent=self, delete_before_replace=True),
        )
        return job

    def _deadline(self) -> dict[str, str]:
        return {"pulumi.com/timeoutSeconds": str(self._kubernetes.ready_timeout_seconds)}

    def _controller(
        self,
        image: pulumi.Input[str],
        pod: PodSpecArgsDict,
        images: VolumeArgsDict,
        *,
        after: list[pulumi.Resource],
        read: list[pulumi.Output[Any]],
    ) -> None:
        # Written out before the image and the volume are put in: the trigger takes plain text.
        template = json.dumps([self._labels, pod], sort_keys=True)
        pod["containers"][0]["image"] = image
        pod["volumes"] = [images, *pod["volumes"]]
        # The built-in wait ends after a fixed ten minutes, and does not listen to the timeout.
        wait = {"pulumi.com/waitFor": "jsonpath={.status.readyReplicas}=1", **self._deadline()}
        # What others changed, such as the number of replicas, is put back and not fought over.
        wait["pulumi.com/patchForce"] = "true"
        trigger = pulumi.Output.all(image, template, images, *read).apply(
            lambda parts: hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()
        )
        metadata = self._metadata(annotations=wait)
        metadata["labels"] = {**metadata["labels"], **self._labels}
        kubernetes.core.v1.ReplicationController(
            self._name,
            metadata=metadata,
            spec={
                "replicas": 1,
                "selector": self._selector,
                "template": {"metadata": {"labels": self._labels}, "spec": pod},
            },
            opts=pulumi.ResourceOptions(
                parent=self,
                depends_on=after,
                # Two pods of one volume, and of one name, cannot be: the old one goes first.
                delete_before_replace=True,
                replacement_trigger=pulumi.Output.unsecret(trigger),
            ),
        )

    def _service(self) -> None:
        ports: list[Any] = [{"name": "registry", "port": PORT, "target_port": PORT, "node_port": self._kubernetes.node_port}]
        kubernetes.core.v1.Service(
            f"{self._name}-service",
            # Ready is what the controller is waited for; the Service's own wait would add ten seconds.
            metadata=self._metadata(annotations={"pulumi.com/skipAwait": "true"}),
            spec={"type": "NodePort", "selector": self._selector, "ports": ports},
            opts=self._child,
        )

    def _network_policy(self) -> None:
        ingress: list[Any] = [{"ports": [{"port": PORT, "protocol": "TCP"}]}]
        if self._kubernetes.monitoring is not None:
            namespace = {"match_labels": {"kubernetes.io/metadata.name": self._kubernetes.monitoring.namespace}}
            ingress.append({"from_": [{"namespace_selector": namespace}], "ports": [{"port": METRICS_PORT, "protocol": "TCP"}]})
        kubernetes.networking.v1.NetworkPolicy(
            f"{self._name}-network",
            metadata=self._metadata(),
            spec={
                "pod_selector": {"match_labels": self._selector},
                "policy_types": ["Ingress"],
                "ingress": ingress,
            },
            opts=self._child,
        )

    def _ingress(self, ingress: Ingress) -> None:
        annotations = {
            # The layers of an image are as large as they are, and the registry itself speaks TLS.
            "nginx.ingress.kubernetes.io/proxy-body-size": "0",
            "nginx.ingress.kubernetes.io/proxy-read-timeout": "900",
            "nginx.ingress.kubernetes.io/backend-protocol": "HTTPS",
            "pulumi.com/skipAwait": "true",
        }
        backend: Any = {"service": {"name": self._kubernetes.name, "port": {"number": PORT}}}
        kubernetes.networking.v1.Ingress(
            f"{self._name}-ingress",
            metadata=self._metadata(annotations=annotations),
            spec={
                **({} if ingress.class_name is None else {"ingress_class_name": ingress.class_name}),
                "tls": [{"hosts": [ingress.host], "secret_name": ingress.tls_secret}],
                "rules": [{"host": ingress.host, "http": {"paths": [{"path": "/", "path_type": "Prefix", "backend": backend}]}}],
            },
            opts=self._child,
        )

    def _service_monitor(self) -> None:
        kubernetes.core.v1.Service(
            f"{self._name}-metrics",
            metadata=self._metadata("-metrics", annotations={"pulumi.com/skipAwait": "true"}),
            spec={"selector": self._selector, "ports": [{"name": "metrics", "port": METRICS_PORT}]},
            opts=self._child,
        )
        kubernetes.apiextensions.CustomResource(
            f"{self._name}-monitor",
            api_version="monitoring.coreos.com/v1",
            kind="ServiceMonitor",
            metadata=self._metadata(),
            spec={
                "selector": {"matchLabels": self._selector},
                "endpoints": [{"port": "metrics", "path": "/metrics", "interval": "30s"}],
            },
            opts=self._child,
        )

    def _alerts(self, certificate_pem: pulumi.Input[str], images: VolumeArgsDict) -> None:
        """Alerts on what ends badly in silence: the certificate's end, a full volume, and no pod that is ready."""
        own, namespace = self._kubernetes.name, self._kubernetes.namespace
        rules: list[dict[str, Any]] = [
            _alert(
                "RegistryCertificateExpires",
                pulumi.Output.concat(
                    "time() > ", pulumi.Output.from_input(certificate_pem).apply(_end), f" - {EXPIRY_ALERT_DAYS} * 86400"
                ),
                "0m",
                f"The registry's certificate ends in less than {EXPIRY_ALERT_DAYS} days: run pulumi up",
            ),
            _alert(
                "RegistryNotReady",
                f'kube_replicationcontroller_status_ready_replicas{{namespace="{namespace}",replicationcontroller="{own}"}} < 1',
                "5m",
                "The registry has had no ready pod for five minutes: run python -m ops verify",
            ),
        ]
        if "persistent_volume_claim" in images:  # the kubelet measures no others
            claim = images["persistent_volume_claim"]["claim_name"]
            volume = pulumi.Output.concat(f'{{namespace="{namespace}",persistentvolumeclaim="', claim, '"}')
            full = pulumi.Output.concat(
                *("kubelet_volume_stats_used_bytes", volume, " / kubelet_volume_stats_capacity_bytes", volume),
                f" > {FULL_ALERT_PERCENT / 100}",
            )
            summary = f"The registry's volume is more than {FULL_ALERT_PERCENT} % full: grow it or collect garbage"
            rules.append(_alert("RegistryVolumeFills", full, "15m", summary))
        kubernetes.apiextensions.CustomResource(
            f"{self._name}-alerts",
            api_version="monitoring.coreos.com/v1",
            kind="PrometheusRule",
            metadata=self._metadata(),
            spec={"groups": [{"name": "private-registry", "rules": rules}]},
            opts=self._child,
        )


def _base64(text: str) -> str:
    return base64.b64encode(text.encode()).decode()


def _docker_login(address: str, credentials: Mapping[str, str]) -> str:
    """Source: https://kubernetes.io/docs/tasks/configure-pod-container/pull-image-private-registry/"""
    pair = {key: credentials[key] for key in ("username", "password")}
    return json.dumps({"auths": {address: {**pair, "auth": _base64(f"{pair['username']}:{pair['password']}")}}})


def _end(certificate_pem: str) -> str:
    """Return the end of a certificate in seconds since 1970."""
    from cryptography import x509

    end: datetime.datetime = x509.load_pem_x509_certificate(certificate_pem.encode()).not_valid_after_utc
    return str(int(end.timestamp()))


def _alert(name: str, expression: pulumi.Input[str], lasting: str, summary: str) -> dict[str, Any]:
    return {
        "alert": name,
        "expr": expression,
        "for": lasting,
        "labels": {"severity": "warning"},
        "annotations": {"summary": summary},
    }
