"""What `ops rollout` shows: a bar for each stack, or lines where there is no terminal, and a table at the end."""

import threading
from collections.abc import Sequence
from types import TracebackType
from typing import Self

import typer
from rich import progress as rich_progress
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from ops.rollout import Progress

PARTS = ("preview", "up", "verify")


class RolloutProgress:
    """The stacks of a rollout on a console."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._lock = threading.Lock()
        columns = "{task.description}", rich_progress.BarColumn(), "{task.fields[phase]}", rich_progress.TimeElapsedColumn()
        self._bars = rich_progress.Progress(*columns, console=console, transient=True, disable=not console.is_terminal)
        self._tasks: dict[str, rich_progress.TaskID] = {}
        self._stacks: dict[str, Progress] = {}
        self._phases: dict[str, str] = {}

    def __enter__(self) -> Self:
        self._bars.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._stop()

    def _stop(self) -> None:
        if self._console.is_terminal:  # elsewhere the library would print an empty line
            self._bars.stop()

    def tell(self, progress: Progress) -> None:
        """Show how far a stack is."""
        with self._lock:
            stack = progress.stack
            self._stacks[stack] = progress
            if stack not in self._tasks:
                self._tasks[stack] = self._bars.add_task(escape(stack), phase="", total=None)
            self._bars.update(
                self._tasks[stack], completed=progress.done, total=progress.total or None, phase=escape(progress.phase)
            )
            phase = progress.phase.partition(":")[0]
            if not self._console.is_terminal and phase != self._phases.get(stack):
                self._console.print(f"{stack}: {phase}", markup=False)
            self._phases[stack] = phase

    def ask(self, stack: str, sentences: list[str]) -> bool:
        """Show what will be done, and ask whether it may.

        Raises:
            KeyboardInterrupt: the question was not answered.
        """
        self._stop()
        for sentence in sentences:
            self._console.print(f"  {sentence}", markup=False)
        try:
            answer = typer.confirm(f"{stack} is production: bring it up?")
        except typer.Abort:
            raise KeyboardInterrupt from None
        self._bars.start()
        return answer

    def show_table(self, stacks: Sequence[str]) -> None:
        """Show what became of each stack, if anything was begun."""
        if not self._stacks:
            return
        table = Table("", "stack", "changes", *(f"{part} (s)" for part in PARTS), "came to")
        for progress in (self._stacks.get(stack, Progress(stack)) for stack in stacks):
            mark = {"done": "[green]✓[/green]", "stopped": "[red]✗[/red]"}.get(progress.phase, "")
            seconds = (f"{progress.seconds[part]:.1f}" if part in progress.seconds else "" for part in PARTS)
            table.add_row(mark, escape(progress.stack), progress.changes, *seconds, escape(progress.phase))
        self._console.print(table)
