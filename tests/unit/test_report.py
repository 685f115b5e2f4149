"""`ops report` on previews of real changes, which `python -m tests.record_previews` had the engine make."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast
from xml.etree import ElementTree

import pytest
from typer.testing import CliRunner

from ops.__main__ import app
from ops.engine import Run
from ops.page import COLOURS, page
from ops.report import Preview, Verdict, judged, markdown, of_file, of_run, read, verdict_of
from ops.stack import OpsError

PREVIEWS = Path(__file__).parent / "previews"
GAP = "replace `registry` (docker Container): the registry is away for two to three seconds"
POD_GAP = "replace `registry` (kubernetes ReplicationController): the registry is away for two to three seconds"
# What the preview comes to, and what the report has to say of it.
JUDGED: dict[str, tuple[Verdict, tuple[str, ...]]] = {
    "first up": (Verdict.FINE, ("create `registry-images` (docker Volume)", "create `registry` (docker Container)")),
    "nothing to change": (Verdict.FINE, ("### dev: nothing to change", "15 unchanged")),
    "another tag": (Verdict.NEEDS_APPROVAL, (GAP, "update `image` (docker Image)")),
    "renewed certificate": (
        Verdict.NEEDS_APPROVAL,
        (GAP, "a new certificate of an authority that clients trust already", "| `validityPeriodHours` | `8760` | `2400` |"),
    ),
    "another name of the server": (Verdict.NEEDS_APPROVAL, (GAP, "other.test")),
    "more memory": (Verdict.NEEDS_APPROVAL, (GAP, "| `registry` | `memory` |  | `512` |")),
    "anonymous access": (Verdict.NEEDS_APPROVAL, (GAP,)),
    "trust of the local Docker daemon ends": (
        Verdict.NEEDS_APPROVAL,
        ("delete `trust` (command Command): this machine trusts the registry no more",),
    ),
    "another volume, the old one kept": (
        Verdict.NEEDS_APPROVAL,
        (GAP, "the empty volume `recorded-other` takes the place of `recorded`, whose images stay in it, unserved"),
    ),
    "another volume, the old one deleted": (
        Verdict.LOSES_DATA,
        (GAP, "deletes the volume `recorded` with all images; `recorded-other` begins empty"),
    ),
    "second authority trusted": (Verdict.FINE, ("create `certificate-authority-2`", "update `trust` (command Command)")),
    "authority replaced at once": (
        Verdict.NEEDS_APPROVAL,
        (
            "delete `certificate-authority` (tls SelfSignedCert): clients that trust this authority alone",
            "a certificate of another authority, which clients have to trust first",
        ),
    ),
    "self-signed certificate": (Verdict.NEEDS_APPROVAL, (GAP, "delete `certificate-authority` (tls SelfSignedCert)")),
    "destroy that keeps the volume": (
        Verdict.NEEDS_APPROVAL,
        ("the registry is taken down", "the volume `recorded` stays with its images, but is no more the stack's"),
    ),
    "destroy that deletes the volume": (
        Verdict.LOSES_DATA,
        ("the registry is taken down", "deletes the volume `recorded` with all images"),
    ),
}
JUDGED |= {
    "first up in a cluster": (Verdict.FINE, ("create `registry` (kubernetes ReplicationController)",)),
    "more CPU in a cluster": (Verdict.NEEDS_APPROVAL, (POD_GAP,)),
    "another node port": (Verdict.FINE, ("update `registry-service` (kubernetes Service)",)),
    "larger claim": (Verdict.FINE, ("update `registry-images` (kubernetes PersistentVolumeClaim)",)),
    "nodes trust it by pods": (Verdict.FINE, ("create `node-trust` (kubernetes DaemonSet)",)),
    "destroy that keeps the claim": (
        Verdict.NEEDS_APPROVAL,
        ("the claim `registry-images` stays with its images (1Gi), but is no more the stack's",),
    ),
    "destroy that deletes the claim": (Verdict.LOSES_DATA, ("deletes the claim `registry-images`: 1Gi of images",)),
    "first up on an RBD image": (Verdict.FINE, ("the RBD image `rbd/recorded` is made, or found as the stack left it",)),
    "grown RBD image": (Verdict.FINE, ("the RBD image `rbd/recorded` grows from 128 MiB to 256 MiB, in use",)),
    "shrunk RBD image": (
        Verdict.FAILED,
        ("it must be 128 or more", "would cut the RBD image `rbd/recorded` from 128 MiB to 64 MiB"),
    ),
    "another RBD image": (Verdict.FAILED, ("changes from the RBD image rbd/recorded to rbd/recorded-other",)),
    "destroy that keeps the RBD image": (
        Verdict.NEEDS_APPROVAL,
        ("the RBD image `rbd/recorded` stays, but is no more the stack's", "the RBD image that it is bound to stays"),
    ),
    "destroy with the policy trash of the RBD image": (
        Verdict.NEEDS_APPROVAL,
        ("moves the RBD image `rbd/recorded` to the trash, for 30 days",),
    ),
    "destroy with the policy delete of the RBD image": (
        Verdict.LOSES_DATA,
        ("deletes the RBD image `rbd/recorded`: 128 MiB of images",),
    ),
}


def file_of(name: str) -> Path:
    return PREVIEWS / f"{name}.json"


@pytest.mark.parametrize("name", JUDGED)
def test_a_real_preview_is_judged_and_put_in_words(name: str) -> None:
    verdict, sentences = JUDGED[name]
    preview = of_file(file_of(name))
    assert verdict_of(preview) is verdict
    said = markdown("dev", preview)
    for sentence in sentences:
        assert sentence in said


def test_every_recorded_preview_is_judged() -> None:
    assert {file.stem for file in PREVIEWS.glob("*.json")} == set(JUDGED)


@pytest.mark.parametrize("name", JUDGED)
def test_what_would_lose_data_comes_first_and_the_table_is_one(name: str) -> None:
    said = markdown("dev", of_file(file_of(name)))
    titles = [title for title in ("**Would lose data**", "**Needs approval**", "**Further**") if title in said]
    assert titles == sorted(titles, key=said.index)
    rows = [line for line in said.splitlines() if line.startswith("|")]
    assert {len(re.findall(r"(?<!\\)\|", row)) for row in rows} <= {5}


@pytest.mark.parametrize("name", JUDGED)
def test_no_secret_is_shown(name: str) -> None:
    text = file_of(name).read_text()
    assert "PRIVATE KEY" not in text, "the engine masks secrets, and what was recorded has none"
    assert "PRIVATE KEY" not in markdown("dev", of_file(file_of(name)))


def test_the_comment_begins_with_a_mark_by_which_it_is_found_again() -> None:
    assert markdown("prod", of_file(file_of("first up"))).splitlines()[0] == "<!-- private-registry report prod -->"


def step(kind: str, operation: str, before: dict[str, Any] | None = None, after: dict[str, Any] | None = None) -> dict[str, Any]:
    urn = f"urn:pulumi:dev::private-registry::{kind}::thing"
    made: dict[str, Any] = {"op": operation, "urn": urn, "detailedDiff": {}}
    if before is not None:
        made["oldState"] = {"custom": True, "inputs": before}
    if after is not None:
        made["newState"] = {"custom": True, "inputs": after}
    return made


def test_a_secret_in_a_preview_that_was_made_with_them_is_masked() -> None:
    secret = {"4dabf18193072939515e22adb298388d": "1b47061264138c4ac30d75fd1eb44270", "plaintext": "geheim"}
    changed = step("a:b:C", "update", {"key": {"deep": secret}}, {"key": {"deep": "x"}})
    changed["detailedDiff"] = {"key": {}, "key.deep": {}}
    said = markdown("dev", read({"steps": [changed]}))
    assert "geheim" not in said
    assert said.count("[secret]") == 2


def test_what_differs_in_a_long_text_is_shown_and_not_its_beginning() -> None:
    changed = step("a:b:C", "update", {"text": "a" * 200 + "before"}, {"text": "a" * 200 + "after"})
    changed["detailedDiff"] = {"text": {}}
    said = markdown("dev", read({"steps": [changed]}))
    assert "before`" in said
    assert "after`" in said


def test_a_pipe_and_the_end_of_a_line_stay_in_their_cell() -> None:
    changed = step("a:b:C", "update", {"text": "a|b\nc"}, {"text": "x"})
    changed["detailedDiff"] = {"text": {}}
    assert "| `thing` | `text` | `a\\|b c` | `x` |" in markdown("dev", read({"steps": [changed]}))


def test_a_preview_that_failed_says_why() -> None:
    digest = {"steps": [], "diagnostics": [{"severity": "error", "message": "hostname is wrong\n"}]}
    preview = read(digest, failed=True)
    assert verdict_of(preview) is Verdict.FAILED
    assert "### dev: the preview failed\n\n```\nhostname is wrong\n```" in markdown("dev", preview)


@pytest.mark.parametrize(
    ("name", "code"),
    [("nothing to change", 0), ("another tag", 10), ("another volume, the old one deleted", 20)],
)
def test_the_exit_code_is_what_it_comes_to(name: str, code: int) -> None:
    run = CliRunner().invoke(app, ["report", "--stack", "dev", "--file", str(file_of(name))])
    assert run.exit_code == code


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"steps": [{}]}', '{"steps": 5}', "null"])
def test_a_file_that_is_no_preview_is_named_and_fails(tmp_path: Path, text: str) -> None:
    file = tmp_path / "preview.json"
    file.write_text(text)
    run = CliRunner().invoke(app, ["report", "--stack", "dev", "--file", str(file)])
    assert run.exit_code == 1


def test_a_page_that_cannot_be_written_is_named_after_the_report(tmp_path: Path) -> None:
    page_file = tmp_path / "missing" / "page.html"
    run = CliRunner().invoke(app, ["report", "--file", str(file_of("first up")), "--html", str(page_file)])
    assert run.exit_code == 1
    assert run.output.startswith("<!-- private-registry report")
    assert f"{page_file} cannot be written" in run.output
    assert "Traceback" not in run.output


def test_recorded_previews_have_nothing_of_the_machine_that_made_them() -> None:
    for file in PREVIEWS.glob("*.json"):
        assert not re.search(r'"/(tmp|root|home|work)', json.dumps(json.loads(file.read_text())))


@pytest.mark.parametrize("name", JUDGED)
def test_the_page_draws_every_change_and_loads_nothing(name: str) -> None:
    preview = of_file(file_of(name))
    text = page("dev", preview)
    assert "<script" not in text
    assert set(re.findall(r"https?://[^\"']+", text)) <= {"http://www.w3.org/2000/svg"}
    assert "PRIVATE KEY" not in text
    picture = re.search("<svg.*</svg>", text, re.DOTALL)
    assert (picture is None) == (not preview.changes)
    if picture is None:
        return
    drawn = ElementTree.fromstring(picture[0])
    names = [node.text for node in drawn.iter("{http://www.w3.org/2000/svg}text")]
    assert all(change.name in names for change in preview.changes)
    colours = {node.get("fill") for node in drawn.iter("{http://www.w3.org/2000/svg}rect")}
    loses = any(judged(change)[0] is Verdict.LOSES_DATA for change in preview.changes)
    assert (COLOURS["would lose data"] in colours) == loses


def test_the_page_shows_a_name_as_it_is_written() -> None:
    changed = step("a:b:C", "create", None, {})
    changed["urn"] = "urn:pulumi:dev::p::a:b:C::<b>&"
    assert "&lt;b&gt;&amp;" in page("<dev>", read({"steps": [changed]}))


def with_steps(*steps: dict[str, Any]) -> Preview:
    """A preview of a volume's steps, which are hard to have from an engine: they come of an update that was cut off."""
    urn = "urn:pulumi:dev::private-registry::private-registry:index:RegistryContainer$docker:index/volume:Volume::registry-images"
    return read({"steps": [{"urn": urn, **step} for step in steps]})


def test_a_volume_that_an_interrupted_update_left_to_be_deleted_would_lose_data() -> None:
    old = {"custom": True, "id": "old", "inputs": {"name": "old"}, "delete": True}
    preview = with_steps({"op": "delete-replaced", "oldState": old})
    assert verdict_of(preview) is Verdict.LOSES_DATA
    assert "deletes the volume `old` with all images" in markdown("dev", preview)


def test_a_change_that_also_takes_protection_away_needs_approval() -> None:
    old = {"custom": True, "id": "a", "inputs": {"name": "a", "labels": []}, "protect": True}
    new = {"custom": True, "inputs": {"name": "a", "labels": ["b"]}}
    preview = with_steps({"op": "update", "oldState": old, "newState": new, "detailedDiff": {"labels": {}}})
    assert verdict_of(preview) is Verdict.NEEDS_APPROVAL
    assert "| `registry-images` | `protect` | `true` | `false` |" in markdown("dev", preview)


def test_the_deletion_within_a_replacement_is_told_once() -> None:
    old = {"custom": True, "id": "old", "inputs": {"name": "old"}}
    new = {"custom": True, "inputs": {"name": "new"}}
    steps = [{"op": "delete-replaced", "oldState": old}, {"op": "replace", "oldState": old, "newState": new}]
    assert len(with_steps(*steps).changes) == 1


class Ended:
    """A run of the CLI that is over, with what it printed."""

    failed = False
    said = ""

    def __init__(self, *events: tuple[str, dict[str, Any]]) -> None:
        self._events = events

    def events(self) -> Iterator[tuple[str, dict[str, Any]]]:
        yield from self._events


def test_a_preview_that_does_not_say_what_it_came_to_is_not_taken_for_one_without_changes() -> None:
    with pytest.raises(OpsError, match="does not say what it came to"):
        of_run(cast("Run", Ended(("preludeEvent", {}))))


def test_outputs_alone_are_a_change() -> None:
    stack = {"op": "same", "type": "pulumi:pulumi:Stack", "urn": "urn:pulumi:dev::private-registry::pulumi:pulumi:Stack::p-dev"}
    states = {"old": {"outputs": {"address": "a"}}, "new": {"outputs": {"address": "b"}}}
    summary = ("summaryEvent", {"resourceChanges": {"same": 1}})
    preview = of_run(cast("Run", Ended(("resOutputsEvent", {"metadata": {**stack, **states}}), summary)))
    assert "| `p-dev` | `address` | `a` | `b` |" in markdown("dev", preview)
