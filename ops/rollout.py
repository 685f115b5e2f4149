"""`ops rollout`: a change walks from environment to environment, and stops at the first thing that is wrong.

It keeps no record of its own: run again, it passes over what is up to date, and so goes on where it stopped.
"""

import contextlib
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from itertools import groupby, pairwise
from typing import Any, TypeVar

from ops.engine import Run
from ops.report import FAILED, IGNORED, Change, Preview, Verdict, judged, of_run, refusal_of, sentences, title, verdict_of
from ops.stack import OpsError, registry_of, settings_of

AGAIN = "Mend that, then run the same command again: it passes over what is up to date."
AT_ONCE = 10  # each takes about 200 MiB of memory: `python -m bench.rollout`
T = TypeVar("T")


@dataclass
class Progress:
    """How far the rollout of one stack is."""

    stack: str
    phase: str = "not begun"
    done: int = 0
    total: int = 0
    """How many resources change."""
    changes: str = ""
    """What changes, in words."""
    seconds: dict[str, float] = field(default_factory=dict)
    """How long each part took: preview, up, verify."""


class Rollout:
    """Stacks, brought up one after the other in the order given, or at once where their files say so."""

    def __init__(
        self,
        stacks: Sequence[str],
        *,
        approved: Sequence[str],
        losses: Sequence[str],
        ask: Callable[[str, list[str]], bool] | None,
        tell: Callable[[Progress], None],
    ) -> None:
        """Read the settings of all stacks.

        Args:
            stacks: their names.
            approved: stacks of production that may be changed without a question.
            losses: resources that may be deleted with their data, each as STACK/RESOURCE.
            ask: shows the sentences about a stack and returns whether it may be changed; None where nobody can be asked.
            tell: is told of each step of a stack's progress, by any thread.

        Raises:
            OpsError: a name is wrong, or the settings of a stack have faults.
        """
        _check(stacks, approved, losses)
        self._approved, self._losses, self._ask, self._tell = approved, losses, ask, tell
        self._running: set[Run] = set()
        self._interrupted = False
        self.progress = {stack: Progress(stack) for stack in stacks}
        environments = self._each(stacks, lambda stack: settings_of(stack)[0].environment)
        self._production = [stack for stack in stacks if environments[stack].production]
        self._agreed: dict[str, list[Change]] = {}
        self.waves = _waves({stack: environments[stack].wave for stack in stacks})

    def run(self) -> None:
        """Bring up one wave after the other.

        Raises:
            OpsError: something is wrong; what comes after it was not begun.
            KeyboardInterrupt: it was interrupted; the engines have ended.
        """
        for wave in self.waves:
            previews = self._each(wave, self._preview)
            # An answer may have taken hours: what was approved is what is done.
            while self._ask_for(previews):
                previews = self._each(wave, self._preview)
            self._each(wave, lambda stack, previews=previews: self._bring_up(stack, previews[stack]))  # type: ignore[misc]

    def _each(self, stacks: Sequence[str], take: Callable[[str], T]) -> dict[str, T]:
        """Do the same for several stacks at once; what went wrong is raised when all have ended."""
        with ThreadPoolExecutor(AT_ONCE) as pool:
            futures = [pool.submit(take, stack) for stack in stacks]
            while any(not future.done() for future in futures):
                try:
                    wait(futures)
                except KeyboardInterrupt:
                    self._interrupted = True
                    for run in list(self._running):
                        run.interrupt()
        if self._interrupted:
            raise KeyboardInterrupt
        errors = [error for future in futures if isinstance(error := future.exception(), OpsError)]
        if len(errors) > 1 and len(errors) == sum(future.exception() is not None for future in futures):
            mends = "\n  ".join(dict.fromkeys(error.mend for error in errors))
            raise OpsError("\n".join(error.what for error in errors), mends)
        return {stack: future.result() for stack, future in zip(stacks, futures, strict=True)}

    @contextlib.contextmanager
    def _part(self, stack: str, part: str) -> Iterator[None]:
        """Tell how long a part takes, and what is wrong with it."""
        begin = time.monotonic()
        try:
            yield
        except OpsError as error:
            raise self._stopped(stack, error.what, error.mend, error.code) from None
        finally:
            self.progress[stack].seconds[part] = time.monotonic() - begin

    @contextlib.contextmanager
    def _run(self, verb: str, stack: str, *arguments: str) -> Iterator[Run]:
        self._go_on()
        run = Run(verb, stack, *arguments)
        self._running.add(run)
        if self._interrupted:  # in the meantime
            run.interrupt()
        try:
            yield run
        finally:
            self._running.discard(run)

    def _go_on(self) -> None:
        if self._interrupted:
            raise OpsError("interrupted", AGAIN)

    def _say(self, stack: str, phase: str, *, done: int = 0, total: int = 0) -> None:
        progress = self.progress[stack]
        progress.phase, progress.done, progress.total = phase, done, total
        self._tell(progress)

    def _stopped(self, stack: str, what: str, mend: str = AGAIN, code: int = 1) -> OpsError:
        self._say(stack, "stopped")
        return OpsError(f"{stack}: {what}", mend, code)

    def _preview(self, stack: str) -> Preview:
        self._say(stack, "previewing")
        with self._part(stack, "preview"), self._run("preview", stack) as run:
            preview = of_run(run)
        self.progress[stack].changes = _counted(preview)
        # Only production is asked about: of other stacks "needs approval" would be untrue.
        passes = preview.changes and verdict_of(preview) in (Verdict.FINE, Verdict.NEEDS_APPROVAL)
        self._say(stack, self.progress[stack].changes if passes else title(stack, preview).removeprefix(f"{stack}: "))
        return preview

    def _ask_for(self, previews: Mapping[str, Preview]) -> bool:
        """Let the previews of a wave pass, or stop; return whether anybody was asked."""
        for stack, preview in previews.items():
            self._gate(stack, preview)
        to_ask = [stack for stack in previews if stack in self._production and stack not in self._approved]
        to_ask = [stack for stack in to_ask if previews[stack].changes and self._agreed.get(stack) != _sorted(previews[stack])]
        for stack in to_ask:
            said, code = [*sentences(previews[stack])], Verdict.NEEDS_APPROVAL.code
            if self._ask is None:
                said.insert(0, "it is production, and nobody can be asked")
                raise self._stopped(stack, "\n".join(said), f"Approve it: --yes-for {stack}", code)
            self._say(stack, "waiting for approval")
            if not self._ask(stack, said):
                raise self._stopped(stack, "it was not approved", "Run the same command again when it may be changed.", code)
            self._agreed[stack] = _sorted(previews[stack])
        return bool(to_ask)

    def _gate(self, stack: str, preview: Preview) -> None:
        """Stop where a preview failed, is refused by policies, or would lose data that nobody gave up."""
        verdict, said = verdict_of(preview), "\n".join([title(stack, preview).removeprefix(f"{stack}: "), *sentences(preview)])
        if preview.errors or preview.refusals:
            raise self._stopped(stack, said, code=verdict.code)
        losses = [f"{stack}/{change.name}" for change in preview.changes if judged(change)[0] == Verdict.LOSES_DATA]
        if refused := [loss for loss in losses if loss not in self._losses]:
            allow = " ".join(f"--allow-data-loss {loss}" for loss in refused)
            raise self._stopped(stack, said, f"Take the change back. If all that may be lost: {allow}", verdict.code)

    def _bring_up(self, stack: str, preview: Preview) -> None:
        if preview.changes:
            with self._part(stack, "up"):
                self._up(stack, len(preview.changes))
        with self._part(stack, "verify"):
            self._verify(stack)
        self._say(stack, "done")

    def _up(self, stack: str, total: int) -> None:
        done = 0
        errors: list[str] = []
        self._say(stack, "bringing up", total=total)
        with self._run("up", stack, "--yes", "--skip-preview") as run:
            for kind, event in run.events():
                if kind == "resOutputsEvent" and _is_change(event["metadata"]):
                    done += 1
                    self._say(stack, "bringing up", done=min(done, total), total=total)
                elif kind == "diagnosticEvent" and event["severity"] == "error" and event["message"].strip() not in FAILED:
                    errors.append(event["message"].strip())
                elif kind == "errorEvent":
                    errors.append(event["error"])
                elif (refusal := refusal_of(kind, event)) is not None:
                    errors.append(f"refused by policies: {refusal}")
        if run.failed:
            said = "\n".join(["`pulumi up` failed", *(errors or [run.said])])
            mend = f"{AGAIN} If it was cut off: `python -m ops recover --stack {stack}` first."
            raise OpsError(said, f"{mend} Why a pod is not ready: `python -m ops verify --stack {stack}`.")

    def _verify(self, stack: str) -> None:
        from ops.verify import Verification

        for name, take in Verification(registry_of(stack)).steps():
            self._go_on()
            self._say(stack, f"verifying: {name}")
            take()


def _check(stacks: Sequence[str], approved: Sequence[str], losses: Sequence[str]) -> None:
    if twice := [stack for stack, count in Counter(stacks).items() if count > 1]:
        raise OpsError(f"{twice[0]} is there twice.", "Name each stack once.")
    if others := [name for name in approved if name not in stacks]:
        raise OpsError(f"--yes-for names {others[0]}, which is none of {', '.join(stacks)}.", "Name one of them.")
    # A stack that is not among these is no mistake: a pipeline says the same to each of its jobs.
    if wrong := [loss for loss in losses if not all(loss.rpartition("/")[::2])]:
        raise OpsError(f"--allow-data-loss has {wrong[0]}: it must be STACK/RESOURCE.", "Write it as in dev/volume.")


def _waves(waves: Mapping[str, int | None]) -> list[list[str]]:
    """Return the stacks that go at once, in their order; one without a number goes alone.

    Raises:
        OpsError: the order contradicts the numbers.
    """
    numbered = [(stack, wave) for stack, wave in waves.items() if wave is not None]
    for (earlier, first), (later, second) in pairwise(numbered):
        if first > second:
            raise OpsError(
                f"{later} is of wave {second}, but comes after {earlier}, which is of wave {first}.",
                "Name the stacks in the order of environment.wave.",
            )
    grouped = groupby(waves, key=lambda stack: waves[stack] or stack)
    return [list(stacks) for _, stacks in grouped]


def _sorted(preview: Preview) -> list[Change]:
    """Return the changes in an order that is the same each time: the engine begins what it can."""
    return sorted(preview.changes, key=lambda change: (change.urn, change.operation))


def _is_change(step: Mapping[str, Any]) -> bool:
    return step["op"] not in IGNORED and bool((step.get("new") or step.get("old") or {}).get("custom"))


def _counted(preview: Preview) -> str:
    counts = Counter(change.operation for change in preview.changes)
    return ", ".join(f"{operation} {count}" for operation, count in counts.items()) or "none"
