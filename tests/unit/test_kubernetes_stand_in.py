"""The pure rules of the stand-in for the kubernetes plugin."""

import base64
import re
import threading
from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

import grpc
import pytest

from toolchain.protocol import provider_pb2, status_pb2
from toolchain.providers import kubernetes
from toolchain.providers.base import InitializationError, ProviderError, Reported
from toolchain.providers.values import PropertyValue, marked, plain_map

CONTROLLER: dict[str, Any] = {
    "apiVersion": "v1",
    "kind": "ReplicationController",
    "metadata": {"name": "registry"},
    "spec": {
        "replicas": 1,
        "template": {"spec": {"containers": [{"name": "registry", "image": "registry:2", "ports": [{"hostPort": 1}]}]}},
    },
}


def manifest(kind: str, api_version: str = "v1", **fields: Any) -> dict[str, Any]:
    return {"apiVersion": api_version, "kind": kind, "metadata": {"name": "x"}, **fields}


def replaced(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    found = kubernetes.object_changes(old, new)
    return [change.path for change in found if change.replaces(kubernetes.kind_of(new))]


def diff(old: dict[str, Any], new: dict[str, Any]) -> Any:
    servicer = kubernetes.KubernetesServicer("kubernetes", {}, threading.Event())
    request = provider_pb2.DiffRequest(
        urn=f"urn:pulumi:s::p::kubernetes:core/v1:{new['kind']}::x",
        old_inputs=PropertyValue.marshal_map({key: marked(value) for key, value in old.items()}),
        news=PropertyValue.marshal_map({key: marked(value) for key, value in new.items()}),
    )
    return servicer.Diff(request, None)


# --- Changes ---------------------------------------------------------------------------------------------------------


def test_equal_inputs_are_no_change() -> None:
    answer = diff(CONTROLLER, CONTROLLER)
    assert answer.changes == provider_pb2.DiffResponse.DIFF_NONE
    assert not answer.detailedDiff


def test_a_change_is_named_by_its_path_as_the_engine_spells_it() -> None:
    new = manifest("Pod", spec={"containers": [{"image": "b"}]})
    new["metadata"]["annotations"] = {"pulumi.com/skipAwait": "true"}
    old = manifest("Pod", spec={"containers": [{"image": "a"}]})
    old["metadata"]["annotations"] = {}
    assert [change.path for change in kubernetes.object_changes(old, new)] == [
        'metadata.annotations["pulumi.com/skipAwait"]',
        "spec.containers[0].image",
    ]


def test_items_at_the_end_of_a_list_are_added_and_deleted_each() -> None:
    (added,) = kubernetes.changes([1], [1, 2])
    (deleted,) = kubernetes.changes([1, 2], [1])
    assert (added.operation, added.path, deleted.operation) == ("ADD", "[1]", "DELETE")


def test_what_is_not_known_yet_is_a_change() -> None:
    (change,) = kubernetes.changes({"a": "x"}, plain_map({"a": PropertyValue.computed()}))
    assert (change.operation, change.path) == ("UPDATE", "a")


def test_to_name_the_default_namespace_is_no_change() -> None:
    new = manifest("Service", metadata={"name": "x", "namespace": "default"})
    assert kubernetes.object_changes(manifest("Service"), new) == []


# --- What replaces ---------------------------------------------------------------------------------------------------


def test_another_pod_template_updates_a_replication_controller_in_place() -> None:
    new = {**CONTROLLER, "spec": {"replicas": 1, "template": {"spec": {"containers": [{"image": "registry:3"}]}}}}
    assert replaced(CONTROLLER, new) == []


@pytest.mark.parametrize("key", ["name", "namespace"])
def test_another_name_or_namespace_replaces_any_kind(key: str) -> None:
    new = manifest("Foo", "example.com/v1", metadata={"name": "x", key: "y"})
    assert replaced(manifest("Foo", "example.com/v1"), new) == [f"metadata.{key}"]


@pytest.mark.parametrize("kind", ["ConfigMap", "Secret"])
@pytest.mark.parametrize("key", ["data", "binaryData", "immutable"])
def test_other_data_replace_a_config_map_and_a_secret(kind: str, key: str) -> None:
    new = manifest(kind) | {key: True if key == "immutable" else {"a": "1"}}
    assert replaced(manifest(kind), new) == [key]


def test_one_key_of_the_data_replaces_by_its_own_path() -> None:
    assert replaced(manifest("ConfigMap", data={"a": "1"}), manifest("ConfigMap", data={"a": "2"})) == ["data.a"]


def test_labels_update_a_config_map_in_place() -> None:
    assert replaced(manifest("ConfigMap"), manifest("ConfigMap", metadata={"name": "x", "labels": {"a": "b"}})) == []


def test_another_type_replaces_a_secret() -> None:
    assert replaced(manifest("Secret", type="Opaque"), manifest("Secret", type="kubernetes.io/tls")) == ["type"]


def test_a_service_is_replaced_for_its_address_only() -> None:
    old = manifest("Service", spec={"clusterIP": "10.0.0.1", "type": "ClusterIP", "ports": [{"port": 1}]})
    ports = manifest("Service", spec={"clusterIP": "10.0.0.1", "type": "NodePort", "ports": [{"port": 2}]})
    address = manifest("Service", spec={"clusterIP": "10.0.0.2", "type": "ClusterIP", "ports": [{"port": 1}]})
    assert replaced(old, ports) == []
    assert replaced(old, address) == ["spec.clusterIP"]


@pytest.mark.parametrize("source", ["rbd", "csi", "hostPath", "local", "nfs"])
def test_another_source_replaces_a_volume(source: str) -> None:
    old = manifest("PersistentVolume", spec={source: {"image": "a"}, "capacity": {"storage": "1Gi"}})
    new = manifest("PersistentVolume", spec={source: {"image": "b"}, "capacity": {"storage": "2Gi"}})
    assert replaced(old, new) == [f"spec.{source}.image"]


def test_a_claim_grows_in_place_and_is_replaced_for_its_volume() -> None:
    old = manifest("PersistentVolumeClaim", spec={"volumeName": "a", "resources": {"requests": {"storage": "1Gi"}}})
    new = manifest("PersistentVolumeClaim", spec={"volumeName": "b", "resources": {"requests": {"storage": "2Gi"}}})
    assert replaced(old, new) == ["spec.volumeName"]


def test_a_whole_field_that_holds_a_replacing_one_replaces_when_it_is_added() -> None:
    assert replaced(manifest("Service"), manifest("Service", spec={"clusterIP": "None"})) == ["spec"]
    assert replaced(manifest("Service"), manifest("Service", spec={"ports": []})) == []


def test_rules_are_those_of_the_kind_in_its_group() -> None:
    assert replaced(manifest("Service"), manifest("Service", spec={"clusterIP": "None"}))
    serving = {"api_version": "serving.knative.dev/v1"}
    assert not replaced(manifest("Service", **serving), manifest("Service", **serving, spec={"clusterIP": "None"}))


def test_the_old_object_goes_first_when_the_user_gave_it_its_name() -> None:
    old, new = manifest("ConfigMap", data={"a": "1"}), manifest("ConfigMap", data={"a": "2"})
    assert diff(old, new).deleteBeforeReplace
    mark = {"annotations": {kubernetes.AUTONAMED: "true"}}
    old["metadata"] |= mark
    new["metadata"] = {"name": "x", **mark}
    assert not diff(old, new).deleteBeforeReplace


def test_under_another_name_the_new_object_comes_first() -> None:
    answer = diff(manifest("ConfigMap"), manifest("ConfigMap", metadata={"name": "y"}))
    assert list(answer.replaces) == ["metadata.name"]
    assert not answer.deleteBeforeReplace


def test_an_update_in_place_deletes_nothing() -> None:
    answer = diff(CONTROLLER, {**CONTROLLER, "spec": {"replicas": 2}})
    assert not answer.replaces
    assert not answer.deleteBeforeReplace
    assert list(answer.diffs) == ["spec"]


# --- Names -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("metadata", "identifier"),
    [({"name": "a", "namespace": "n"}, "n/a"), ({"name": "a"}, "a")],
)
def test_an_identifier_is_the_namespace_and_the_name(metadata: dict[str, str], identifier: str) -> None:
    assert kubernetes.identifier_of({"metadata": metadata}) == identifier
    assert kubernetes.split_identifier(identifier) == (metadata.get("namespace"), "a")


@pytest.mark.parametrize(
    ("token", "expected"),
    [
        ("kubernetes:core/v1:Service", ("v1", "Service")),
        ("kubernetes:networking.k8s.io/v1:Ingress", ("networking.k8s.io/v1", "Ingress")),
        ("kubernetes:example.com/v1:Foo", ("example.com/v1", "Foo")),
    ],
)
def test_a_token_tells_api_version_and_kind(token: str, expected: tuple[str, str]) -> None:
    assert kubernetes.kind_of_token(token) == expected


def test_an_object_without_a_name_gets_the_logical_one_with_eight_digits() -> None:
    new = plain_map(kubernetes.autonamed("config", {}, {}, b""))
    assert re.fullmatch(r"config-[0-9a-f]{8}", new["metadata"]["name"])
    assert new["metadata"]["annotations"] == {kubernetes.AUTONAMED: "true"}


def test_the_engines_seed_makes_the_name_repeatable() -> None:
    names = {str(kubernetes.autonamed("config", {}, {}, b"seed")["metadata"]) for _ in range(2)}
    assert len(names) == 1


def test_a_later_check_keeps_the_made_name() -> None:
    old = kubernetes.autonamed("config", {}, {}, b"one")
    new = kubernetes.autonamed("config", old, {"metadata": marked({"labels": {"a": "b"}})}, b"two")
    assert plain_map(new)["metadata"]["name"] == plain_map(old)["metadata"]["name"]


def test_a_name_that_the_user_took_away_is_not_kept() -> None:
    old = {"metadata": marked({"name": "chosen"})}
    assert plain_map(kubernetes.autonamed("config", old, {}, b""))["metadata"]["name"] != "chosen"


@pytest.mark.parametrize("metadata", [{"name": "chosen"}, {"generateName": "chosen-"}])
def test_a_chosen_name_stays(metadata: dict[str, str]) -> None:
    new = {"metadata": marked(metadata)}
    assert kubernetes.autonamed("config", {}, new, b"") == new


def test_metadata_that_are_not_known_yet_get_no_name() -> None:
    new = {"metadata": PropertyValue.computed()}
    assert kubernetes.autonamed("config", {}, new, b"") == new


# --- Values ----------------------------------------------------------------------------------------------------------


def test_a_secret_input_is_secret_in_the_live_object() -> None:
    inputs = PropertyValue({"user": PropertyValue("a"), "password": PropertyValue("b", is_secret=True)})
    value = kubernetes.with_secrets({"user": "a", "password": "b", "added": "c"}, inputs).value
    assert isinstance(value, Mapping)
    assert {key: item.is_secret for key, item in value.items()} == {"user": False, "password": True, "added": False}


def test_a_list_with_a_secret_item_that_the_server_changed_is_secret_as_a_whole() -> None:
    inputs = PropertyValue([PropertyValue("a", is_secret=True)])
    assert kubernetes.with_secrets(["b", "a"], inputs).is_secret


def test_the_data_of_a_secret_are_secret() -> None:
    outputs = kubernetes.outputs_of(manifest("Secret", data={"a": "YQ=="}), {})
    assert outputs["data"].is_secret
    assert not outputs["metadata"].contains_secret()


def test_a_refresh_keeps_the_keys_that_are_inputs_with_live_values() -> None:
    live = manifest("ConfigMap", data={"a": "2", "foreign": "3"})
    live["metadata"] |= {"uid": "u", "namespace": "default"}
    inputs = manifest("ConfigMap", data={"a": "1", "deleted": "1"})
    assert kubernetes.refreshed_inputs(live, inputs) == manifest("ConfigMap", data={"a": "2"})


def test_a_refresh_sees_no_drift_in_empty_fields_that_the_server_leaves_out() -> None:
    inputs = manifest("PersistentVolumeClaim", spec={"storageClassName": "", "selector": {}, "accessModes": ["RWO"]})
    live = manifest("PersistentVolumeClaim", spec={"accessModes": ["RWO"], "volumeMode": "Filesystem"})
    assert kubernetes.refreshed_inputs(live, inputs) == inputs


def test_a_refresh_finds_string_data_in_the_data_of_a_secret() -> None:
    live = manifest("Secret", data={"a": base64.b64encode(b"new").decode()})
    inputs = manifest("Secret", stringData={"a": "old"})
    assert kubernetes.refreshed_inputs(live, inputs) == manifest("Secret", stringData={"a": "new"})


def test_an_import_takes_what_a_user_may_set() -> None:
    live = manifest("ConfigMap", data={"a": "1"}, status={})
    live["metadata"] |= {"uid": "u", "resourceVersion": "1"}
    assert kubernetes.refreshed_inputs(live, {}) == manifest("ConfigMap", data={"a": "1"})


def test_a_merge_patch_has_the_changes_and_nulls_for_what_went() -> None:
    old = {"a": 1, "b": {"c": 1, "d": 2}, "e": [1, 2]}
    assert kubernetes.merge_patch(old, {"b": {"c": 3, "d": 2}, "e": [1]}) == {"a": None, "b": {"c": 3}, "e": [1]}


# --- Conditions ------------------------------------------------------------------------------------------------------

LIVE: dict[str, Any] = {
    "metadata": {"annotations": {"example.com/phase": "done"}},
    "status": {
        "readyReplicas": 1,
        "ready": True,
        "phase": "Running",
        "conditions": [{"type": "Ready", "status": "True"}, {"type": "Stalled", "status": "False"}],
    },
}


@pytest.mark.parametrize(
    "text",
    [
        "jsonpath={.status.readyReplicas}=1",
        "jsonpath={.status.ready}=true",
        "jsonpath={.status.phase}",
        "jsonpath={.status['phase']}=Running",
        'jsonpath={.status.conditions[?(@.type=="Ready")].status}=True',
        "jsonpath={.status.conditions[0].type}=Ready",
        "jsonpath={.status.conditions[-1].type}=Stalled",
        r"jsonpath={.metadata.annotations.example\.com/phase}=done",
        "condition=Ready",
        "condition=ready=true",
        "condition=Stalled=False",
        '["condition=Ready", "jsonpath={.status.phase}=Running"]',
    ],
)
def test_a_condition_holds(text: str) -> None:
    assert kubernetes.conditions(text)(LIVE) is None


@pytest.mark.parametrize(
    ("text", "now"),
    [
        ("jsonpath={.status.readyReplicas}=2", "(now 1)"),
        ("jsonpath={.status.absent}", "(now absent)"),
        ("jsonpath={.status.conditions[*].status}=True", "(now True, False)"),
        ("condition=Stalled", "(now False)"),
        ("condition=Absent", "(now absent)"),
        ('["condition=Ready", "jsonpath={.status.phase}=Failed"]', "(now Running)"),
    ],
)
def test_a_condition_that_does_not_hold_says_what_is_now(text: str, now: str) -> None:
    unmet = kubernetes.conditions(text)(LIVE)
    assert unmet is not None
    assert unmet.endswith(now)


@pytest.mark.parametrize("text", ["status=1", "jsonpath=.a", "jsonpath={a}=1", "jsonpath={.a[x]}=1", "[]", "[1]", "["])
def test_a_condition_that_cannot_be_read_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"."):
        kubernetes.conditions(text)


def test_no_status_yet_is_unmet() -> None:
    assert kubernetes.conditions("condition=Ready")({"status": None})
    assert kubernetes.BUILT_IN["ReplicationController"][0]({"spec": {"replicas": 1}})


def test_a_replication_controller_is_ready_with_all_its_replicas() -> None:
    unmet, limit = kubernetes.BUILT_IN["ReplicationController"]
    assert limit == 600
    assert unmet({"spec": {"replicas": 2}, "status": {"availableReplicas": 2}}) is None
    assert unmet({"spec": {"replicas": 2}, "status": {"availableReplicas": 1}}) == (
        "status.availableReplicas = spec.replicas (1 of 2)"
    )


# --- Previews and errors ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "error",
    [
        kubernetes.UnreachableError("no answer"),
        kubernetes.ApiError(403, "Forbidden", "not you"),
        kubernetes.ApiError(404, "NotFound", "no such namespace"),
        kubernetes.ApiError(409, "AlreadyExists", "there already"),
    ],
)
def test_a_preview_gives_the_inputs_where_a_dry_run_cannot_tell(error: ProviderError) -> None:
    def attempt() -> dict[str, Any]:
        raise error

    assert kubernetes.rehearsed(attempt, CONTROLLER) == CONTROLLER


@pytest.mark.parametrize(
    "error", [kubernetes.ApiError(422, "Invalid", "bad"), kubernetes.ApiError(409, "Conflict", "owned by another")]
)
def test_a_preview_fails_where_the_update_would(error: ProviderError) -> None:
    def attempt() -> dict[str, Any]:
        raise error

    with pytest.raises(kubernetes.ApiError):
        kubernetes.rehearsed(attempt, CONTROLLER)


def test_a_preview_asks_no_server_while_an_input_is_not_known() -> None:
    inputs = plain_map({"data": PropertyValue.computed()})
    assert kubernetes.rehearsed(lambda: pytest.fail("asked"), inputs) == inputs


def test_a_failed_initialization_reaches_the_engine_with_what_is_in_the_cluster() -> None:
    seen: dict[str, Any] = {}

    def abort(code: grpc.StatusCode, text: str) -> None:
        seen.update(code=code, text=text)
        raise RuntimeError  # as gRPC's own does

    context: Any = SimpleNamespace(set_trailing_metadata=lambda pairs: seen.update(dict(pairs)), abort=abort)
    inputs = {"kind": PropertyValue("Pod")}
    with (
        pytest.raises(RuntimeError),
        Reported(context, inputs, lambda live: kubernetes.outputs_of(live, inputs)),
    ):
        raise InitializationError("default/x", {"kind": "Pod", "spec": {}}, ["not ready"])
    detail = provider_pb2.ErrorResourceInitFailed()
    status_pb2.Status.FromString(seen["grpc-status-details-bin"]).details[0].Unpack(detail)
    assert (detail.id, list(detail.reasons), seen["text"]) == ("default/x", ["not ready"], "not ready")
    assert set(detail.properties) == {"kind", "spec"}


# --- The provider's own configuration --------------------------------------------------------------------------------

KUBECONFIG = """
apiVersion: v1
clusters: [{name: one, cluster: {server: "https://one.example.com"}}]
contexts: [{name: a, context: {cluster: one, namespace: images}}, {name: b, context: {cluster: one}}]
current-context: a
"""


def test_the_default_namespace_is_that_of_the_context() -> None:
    assert kubernetes.Cluster(KUBECONFIG).default_namespace() == "images"
    assert kubernetes.Cluster(KUBECONFIG, context="b").default_namespace() == "default"
    assert kubernetes.Cluster(KUBECONFIG, namespace="mine").default_namespace() == "mine"


def test_a_kubeconfig_that_is_not_there_tells_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KUBECONFIG", "/nowhere/kubeconfig")
    assert kubernetes.Cluster().default_namespace() == "default"
    assert kubernetes.Cluster().address() is None


@pytest.mark.parametrize(
    ("new", "replaces"),
    [
        ({"kubeconfig": KUBECONFIG, "context": "b"}, False),
        ({"kubeconfig": KUBECONFIG.replace("one.example.com", "two.example.com")}, True),
    ],
)
def test_another_server_replaces_the_provider(new: dict[str, str], replaces: bool) -> None:
    request = provider_pb2.DiffRequest(
        old_inputs=PropertyValue.marshal_map({"kubeconfig": PropertyValue(KUBECONFIG)}),
        news=PropertyValue.marshal_map({key: PropertyValue(value) for key, value in new.items()}),
    )
    answer = kubernetes.KubernetesServicer("kubernetes", {}, threading.Event()).DiffConfig(request, None)
    assert answer.changes == provider_pb2.DiffResponse.DIFF_SOME
    assert bool(answer.replaces) == replaces
