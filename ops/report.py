"""`ops report`: what a preview will do, as a comment for a pull request. What would lose data comes first.

Source of the form of a preview in a file: https://github.com/pulumi/pulumi/blob/master/sdk/go/common/display/events.go
(PreviewDigest); it does not have what policies say.
"""

import json
import os
from collections.abc import Container, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from enum import Enum
from pathlib import Path
from typing import Any

from ops.engine import Run
from ops.stack import OpsError, options_of

MARK_OF_A_SECRET = "4dabf18193072939515e22adb298388d"  # noqa: S105, the key of a secret's mapping, in every state
LONGEST_VALUE = 60
FAILED = {"preview failed", "update failed"}  # the engine's last words, after it has said why
UNKNOWN = "04da6b54-80e4-46f7-96ec-b56ff0331ba9"  # what the engine writes for a value that is known only after the update
# Nothing changes, or a "replace" stands for it already.
IGNORED = {"same", "read", "refresh", "create-replacement", "delete-replaced"}
OPTIONS = ("protect", "retainOnDelete")
GAP = "the registry is away for two to three seconds"


class Verdict(Enum):
    """What a preview comes to: in words, as the command's exit code, and how bad it is among the others."""

    FINE = ("fine", 0, 0)
    NEEDS_APPROVAL = ("needs approval", 10, 1)
    REFUSED = ("refused by policies", 1, 2)
    LOSES_DATA = ("would lose data", 20, 3)
    FAILED = ("the preview failed", 1, 4)

    def __init__(self, words: str, code: int, rank: int) -> None:
        self.words = words
        self.code = code
        self.rank = rank


@dataclass(frozen=True)
class Change:
    """One resource that changes."""

    operation: str
    """create, update, replace, delete, or another of the engine's words."""
    urn: str
    before: Mapping[str, Any]
    """The state's inputs; empty for what is created."""
    after: Mapping[str, Any]
    """The program's inputs; empty for what is deleted."""
    paths: Sequence[str]
    """Where the two differ, such as spec.template."""
    kept: bool
    """Whether the thing itself stays when the state forgets it."""
    parent: str = ""
    """The URN of the component that it is of."""

    @property
    def name(self) -> str:
        return _name(self.urn)

    @property
    def kind(self) -> str:
        """The resource's type without the package's module: docker Volume, kubernetes Service."""
        package, _, rest = self.urn.split("::")[2].rpartition("$")[2].partition(":")
        return f"{package} {rest.rpartition(':')[2]}"

    @property
    def goes(self) -> bool:
        return self.operation in ("delete", "replace")


@dataclass(frozen=True)
class Preview:
    """What the engine would do, and what it says where it cannot."""

    changes: list[Change]
    unchanged: int
    """How many resources stay as they are."""
    errors: list[str]
    refusals: Sequence[str] = ()
    """What mandatory policies say against it."""
    drifted: Sequence[Change] = ()
    """What differs from the state, where the preview was told to look."""


def of_run(run: Run) -> Preview:
    """Return what a preview that runs says, when it has ended.

    Raises:
        OpsError: it failed before the engine did anything, or does not say all that it did.
    """
    digest: dict[str, Any] = {"steps": [], "diagnostics": []}
    refusals: list[str] = []
    drifted: list[Change] = []
    for kind, event in run.events():
        step = event.get("metadata") or {}
        if kind == "resourcePreEvent":
            digest["steps"].append(_as_in_a_digest(step))
        elif kind == "resOutputsEvent" and step["op"] == "refresh":
            drifted += _drifted(_as_in_a_digest(step))
        elif kind == "resOutputsEvent" and step["type"] == "pulumi:pulumi:Stack":
            digest["outputs"] = _as_in_a_digest(step)
        elif kind == "diagnosticEvent":
            digest["diagnostics"].append(event)
        elif kind == "errorEvent":
            digest["diagnostics"].append({"severity": "error", "message": event["error"]})
        elif (refusal := refusal_of(kind, event)) is not None:
            refusals.append(refusal)
        elif kind == "summaryEvent":
            digest["changeSummary"] = event["resourceChanges"]
    if "changeSummary" not in digest and not run.failed:
        raise OpsError("The preview does not say what it came to.", "Use the CLI that `make toolchain` finds.")
    return replace(read(digest, failed=run.failed and not refusals, said=run.said), refusals=refusals, drifted=drifted)


def refusal_of(kind: str, event: Mapping[str, Any]) -> str | None:
    """Return what an event says against a change, where it is of a mandatory policy."""
    if kind != "policyEvent" or event["enforcementLevel"] != "mandatory":
        return None
    return f"`{event['policyName']}` {_name(event.get('resourceUrn', ''))}: {' '.join(event['message'].split())}"


def _as_in_a_digest(step: Mapping[str, Any]) -> dict[str, Any]:
    return {**step, "oldState": step.get("old"), "newState": step.get("new"), "diffReasons": step.get("diffs")}


def _drifted(step: Mapping[str, Any]) -> list[Change]:
    """Return what was done to a resource behind the state's back, if anything was."""
    if _is_group(step):
        return []
    if not step["newState"]:
        return [_change({**step, "op": "delete"})]
    changed = step.get("detailedDiff") or step["diffReasons"]
    return [_change({**step, "op": "update"})] if changed else []


def _name(urn: str) -> str:
    return urn.rpartition("::")[2]


def of_file(file: Path) -> Preview:
    """Return what a preview printed into a file.

    Raises:
        OpsError: it is no preview.
    """
    try:
        digest = json.loads(file.read_text())
        return read(digest, failed="steps" not in digest, said="it has no steps")
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        raise OpsError(f"{file} cannot be read as a preview: {error}.", "Give what `pulumi preview --json` printed.") from None


def read(digest: Mapping[str, Any], *, failed: bool = False, said: str = "") -> Preview:
    """Return what `pulumi preview --json` printed."""
    said_wrong = [entry["message"].strip() for entry in digest.get("diagnostics") or [] if entry.get("severity") == "error"]
    errors = [error for error in said_wrong if error not in FAILED]
    if failed and not errors:
        errors = [said.strip() or "it did not say why"]
    steps = [step for step in digest.get("steps") or [] if step["op"] and not _is_group(step)]
    replaced = {_of_state(step) for step in steps if step["op"] == "replace"}
    changes = [change for step in steps if (change := _change_of(step, replaced)) is not None]
    if not changes and not errors and (outputs := digest.get("outputs")) is not None:
        changes += _changed_outputs(outputs)
    return Preview(changes, int((digest.get("changeSummary") or {}).get("same", 0)), errors)


def _of_state(step: Mapping[str, Any]) -> tuple[str, str]:
    """Return which thing of the state a step is about: of a resource there may be an old one that is still to be deleted."""
    return step["urn"], (step.get("oldState") or {}).get("id", "")


def _change_of(step: Mapping[str, Any], replaced: Container[tuple[str, str]]) -> Change | None:
    if step["op"] == "delete-replaced" and _of_state(step) not in replaced:
        return _change({**step, "op": "delete"})  # left by an update that was cut off after it had made the new one
    if step["op"] in ("same", "update") and step.get("newState"):
        # The engine counts a change of these for nothing, and yet they decide what is deleted later.
        old, new = ({key: bool((step.get(state) or {}).get(key)) for key in OPTIONS} for state in ("oldState", "newState"))
        if paths := [key for key in OPTIONS if old[key] != new[key]]:
            change = _change({**step, "op": "update"})
            before, after = {**change.before, **old}, {**change.after, **new}
            return replace(change, before=before, after=after, paths=[*change.paths, *paths])
    return None if step["op"] in IGNORED else _change(step)


def _changed_outputs(step: Mapping[str, Any]) -> list[Change]:
    """Return the change of the stack's outputs, which the engine counts for nothing, but writes in an update alone."""
    old, new = ((step[state] or {}).get("outputs") or {} for state in ("oldState", "newState"))
    paths = sorted(key for key in {*old, *new} if old.get(key) != new.get(key))
    return [replace(_change({**step, "op": "update"}), before=old, after=new, paths=paths)] if paths and old else []


def _is_group(step: Mapping[str, Any]) -> bool:
    """Tell whether a step is of the stack itself or of a component: its resources have steps of their own."""
    return not (step.get("newState") or step.get("oldState") or {}).get("custom", False)


def _change(step: Mapping[str, Any]) -> Change:
    old, new = step.get("oldState") or {}, step.get("newState") or {}
    deletes = step["op"] == "delete"
    return Change(
        operation=step["op"],
        urn=step["urn"],
        before=old.get("inputs") or {},
        after={} if deletes else new.get("inputs") or {},
        paths=sorted(step.get("detailedDiff") or step.get("diffReasons") or []),
        kept=bool(old.get("retainOnDelete")),
        parent=(new or old).get("parent", ""),
    )


def judged(change: Change) -> tuple[Verdict, str]:
    """Return what a change comes to, with the words for somebody who does not know the resource."""
    rules = {
        "docker Volume": _volume,
        "kubernetes PersistentVolumeClaim": _claim,
        "docker Container": _server,
        "kubernetes ReplicationController": _server,
        "tls SelfSignedCert": _authority,
        "tls PrivateKey": _private_key,
        "tls LocallySignedCert": _certificate,
        "command Command": _command,
    }
    rule = rules.get(change.kind)
    found = (rule and rule(change)) or (Verdict.NEEDS_APPROVAL if change.operation == "delete" else Verdict.FINE, "")
    options = _options(change) or found
    return found if found[0].rank > options[0].rank else options


def _options(change: Change) -> tuple[Verdict, str] | None:
    options = [path for path in change.paths if path in OPTIONS]
    if change.operation != "update" or not options:
        return None
    if any(change.before[option] and not change.after[option] for option in options):
        return Verdict.NEEDS_APPROVAL, "its data are not safe any more: from then on it may be deleted"
    return Verdict.FINE, "from then on its data are kept"


def _volume(change: Change) -> tuple[Verdict, str] | None:
    name, other = change.before.get("name"), change.after.get("name")
    if not change.goes:
        return None
    if change.operation == "delete":
        if change.kept:
            return Verdict.NEEDS_APPROVAL, f"the volume `{name}` stays with its images, but is no more the stack's"
        return Verdict.LOSES_DATA, f"deletes the volume `{name}` with all images"
    if change.kept:
        return (
            Verdict.NEEDS_APPROVAL,
            f"the empty volume `{other}` takes the place of `{name}`, whose images stay in it, unserved",
        )
    return Verdict.LOSES_DATA, f"deletes the volume `{name}` with all images; `{other}` begins empty"


def _claim(change: Change) -> tuple[Verdict, str] | None:
    if not change.goes:
        return None
    specification = change.before.get("spec") or {}
    name = (change.before.get("metadata") or {}).get("name", change.name)
    size = ((specification.get("resources") or {}).get("requests") or {}).get("storage", "all")
    if specification.get("volumeName"):
        return Verdict.FINE, "the claim goes, the RBD image that it is bound to stays"
    if change.kept:
        return Verdict.NEEDS_APPROVAL, f"the claim `{name}` stays with its images ({size}), but is no more the stack's"
    return Verdict.LOSES_DATA, f"deletes the claim `{name}`: {size} of images"


def _server(change: Change) -> tuple[Verdict, str] | None:
    if change.name.endswith("-files") or not change.goes:
        return None
    return Verdict.NEEDS_APPROVAL, GAP if change.operation == "replace" else "the registry is taken down"


def _authority(change: Change) -> tuple[Verdict, str] | None:
    if not change.goes:
        return None
    if change.before.get("isCaCertificate"):
        return Verdict.NEEDS_APPROVAL, "clients that trust this authority alone trust the registry no more (docs/trust.md)"
    return Verdict.NEEDS_APPROVAL, "the certificate is its own authority: every client has to be given the new one"


def _private_key(change: Change) -> tuple[Verdict, str] | None:
    if change.goes and change.name.endswith("-server-key"):
        return Verdict.NEEDS_APPROVAL, "the generated password of `admin`, if there is one, changes with the key"
    return None


def _certificate(change: Change) -> tuple[Verdict, str] | None:
    if change.operation != "replace":
        return None
    if "caCertPem" in change.paths:
        return Verdict.NEEDS_APPROVAL, "a certificate of another authority, which clients have to trust first (docs/trust.md)"
    return Verdict.FINE, "a new certificate of an authority that clients trust already"


def _command(change: Change) -> tuple[Verdict, str] | None:
    if "RbdVolume$" in change.urn and change.name == "volume":
        return _rbd_image(change)
    if "ClientTrust$" in change.urn and change.operation == "delete":
        host = change.name.removeprefix("trust-")  # its connection is a secret
        return Verdict.NEEDS_APPROVAL, f"{'this machine' if host == 'trust' else host} trusts the registry no more"
    return None


def _rbd_image(change: Change) -> tuple[Verdict, str] | None:
    old, new = (options_of(str(inputs.get("create", ""))) for inputs in (change.before, change.after))
    image = f"{old.get('--pool')}/{old.get('--image')}"
    if change.operation == "create":
        return Verdict.FINE, f"the RBD image `{new.get('--pool')}/{new.get('--image')}` is made, or found as the stack left it"
    size, wanted = int(old.get("--size-mib", 0)), int(new.get("--size-mib", 0))
    if change.goes:
        policy = options_of(str(change.before.get("delete", "")))
        return _released(image, size, policy.get("--policy"), policy.get("--trash-days"))
    if wanted > size:
        return Verdict.FINE, f"the RBD image `{image}` grows from {size} MiB to {wanted} MiB, in use"
    return (Verdict.LOSES_DATA, f"would cut the RBD image `{image}` from {size} MiB to {wanted} MiB") if wanted < size else None


def _released(image: str, size: int, policy: str | None, days: str | None) -> tuple[Verdict, str]:
    if policy == "delete":
        return Verdict.LOSES_DATA, f"deletes the RBD image `{image}`: {size} MiB of images"
    if policy == "trash":
        return Verdict.NEEDS_APPROVAL, f"moves the RBD image `{image}` to the trash, for {days} days"
    return Verdict.NEEDS_APPROVAL, f"the RBD image `{image}` stays, but is no more the stack's"


def verdict_of(preview: Preview) -> Verdict:
    """Return the worst of all changes."""
    found = [judged(change)[0] for change in preview.changes]
    found += [Verdict.FAILED] if preview.errors else []
    found += [Verdict.REFUSED] if preview.refusals else []
    return max(found, key=lambda one: one.rank, default=Verdict.FINE)


def title(stack: str, preview: Preview) -> str:
    """Return what a preview comes to, in one line."""
    verdict = verdict_of(preview)
    return f"{stack}: {verdict.words if preview.changes or verdict != Verdict.FINE else 'nothing to change'}"


def by_verdict(preview: Preview) -> dict[str, list[tuple[Change, str]]]:
    """Return the changes with their words below the titles of what they come to, the worst first; no title is empty."""
    titles = {Verdict.LOSES_DATA: "Would lose data", Verdict.NEEDS_APPROVAL: "Needs approval", Verdict.FINE: "Further"}
    found: dict[str, list[tuple[Change, str]]] = {words: [] for words in titles.values()}
    for change in preview.changes:
        verdict, words = judged(change)
        found[titles[verdict]].append((change, words))
    return {words: changes for words, changes in found.items() if changes}


def sentences(preview: Preview) -> Iterator[str]:
    """Yield what a preview comes to, a line each: why it cannot be, what policies say, and the changes, the worst first."""
    yield from preview.errors
    yield from (f"refused by policies: {refusal}" for refusal in preview.refusals)
    for heading, changes in by_verdict(preview).items():
        for change, words in changes:
            yield f"{heading.lower()}: {_line(change, words)[2:]}"
            yield from (f"  {path}: {now} → {then}" for path, now, then in _differences(change))


def markdown(stack: str, preview: Preview) -> str:
    """Return the report as one comment, which begins with a mark by which it is found again."""
    return "\n".join([f"<!-- private-registry report {stack} -->", *_lines(stack, preview)]) + "\n"


def _lines(stack: str, preview: Preview) -> Iterator[str]:
    yield f"### {title(stack, preview)}"
    for error in preview.errors:
        yield from ("", "```", error.replace("```", "'''"), "```")
    if preview.refusals:
        yield from ("", "**Refused by policies**", "")
        yield from (f"- {refusal}" for refusal in preview.refusals)
    for heading, changes in by_verdict(preview).items():
        yield from ("", f"**{heading}**", "")
        yield from (_line(change, words) for change, words in changes)
    yield from _fields([change for change in preview.changes if any(_differences(change))])
    if preview.unchanged:
        yield from ("", f"{preview.unchanged} unchanged")


def _line(change: Change, words: str) -> str:
    return f"- {change.operation} `{change.name}` ({change.kind})" + (f": {words}" if words else "")


def _fields(changes: Sequence[Change]) -> Iterator[str]:
    if not changes:
        return
    yield from ("", "<details><summary>What differs</summary>", "", "| resource | field | now | then |", "|---|---|---|---|")
    for change in changes:
        for path, now, then in _differences(change):
            yield f"| `{change.name}` | `{path}` | {now} | {then} |"
    yield from ("", "</details>")


def _differences(change: Change) -> Iterator[tuple[str, str, str]]:
    """Yield where an updated or replaced resource differs, with what is there now and then."""
    if change.operation in ("update", "replace"):
        for path in change.paths:
            yield path, *_cells(_at(change.before, path), _at(change.after, path))


def _at(inputs: Mapping[str, Any], path: str) -> str:
    """Return the value at a path in text, on one line, and never a secret; nothing where there is none."""
    value: Any = inputs
    for step in path.replace("[", ".[").split("."):
        key: Any = int(step[1:-1]) if step.startswith("[") and step[1:-1].isdigit() else step.strip('["]')
        try:
            value = value[key]
        except (KeyError, IndexError, TypeError):
            return ""
        if isinstance(value, Mapping) and MARK_OF_A_SECRET in value:
            return "[secret]"
    text = value if isinstance(value, str) else json.dumps(_masked(value), sort_keys=True)
    return " ".join(text.replace(UNKNOWN, "(known after the update)").split())


def _cells(now: str, then: str) -> tuple[str, str]:
    """Return two texts as cells of a table; of long ones what is around the first difference."""
    start = 0
    if max(len(now), len(then)) > LONGEST_VALUE:
        start = max(0, len(os.path.commonprefix([now, then])) - LONGEST_VALUE // 3)
    return _cell(now, start), _cell(then, start)


def _cell(text: str, start: int) -> str:
    part = text[start : start + LONGEST_VALUE]
    shown = f"{'…' if start and text else ''}{part}{'…' if start + LONGEST_VALUE < len(text) else ''}"
    return f"`{shown}`".replace("|", "\\|").replace("``", "` `") if shown else ""


def _masked(value: Any) -> Any:
    if isinstance(value, Mapping):
        return "[secret]" if MARK_OF_A_SECRET in value else {key: _masked(item) for key, item in value.items()}
    return [_masked(item) for item in value] if isinstance(value, list) else value
