"""How far a preparation is: a bar where somebody watches a terminal, else a line now and then for a log."""

from __future__ import annotations

import sys
import time
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TaskID, TextColumn, TimeElapsedColumn
from rich.progress import Progress as Bars

LINE_EVERY_S = 5.0


class Progress:
    """`stage(text, total)` begins a stage, `advance()` moves it; `with` draws it on stderr."""

    def __init__(self, name: str) -> None:
        self._name = name
        console = Console(stderr=True)
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        self._bars = Bars(*columns, console=console) if console.is_terminal else None
        self._task: TaskID | None = None
        self._text, self._total, self._done = "", None, 0  # type: str, int | None, int
        self._told_at = 0.0

    def __enter__(self) -> Self:
        if self._bars is not None:
            self._bars.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bars is not None:
            self._bars.stop()

    def stage(self, text: str, total: int | None = None, done: int = 0) -> None:
        """Begins a stage of `total` steps (None: not known), or moves it when it is the one at work."""
        if text != self._text:
            self._finish()
            self._text, self._told_at = text, 0.0
            if self._bars is not None:
                self._task = self._bars.add_task(f"{self._name}: {text}", total=total)
        self._total, self._done = total, done
        self._show()

    def advance(self, steps: int = 1) -> None:
        self._done += steps
        self._show()

    def say(self, line: str) -> None:
        """A line that stays."""
        if self._bars is not None:
            self._bars.console.print(f"{self._name}: {line}", highlight=False, markup=False)
        else:
            print(f"{self._name}: {line}", file=sys.stderr, flush=True)

    def _show(self) -> None:
        if self._bars is not None and self._task is not None:
            self._bars.update(self._task, completed=self._done, total=self._total)
        elif self._bars is None and time.monotonic() - self._told_at > LINE_EVERY_S:
            self._told_at = time.monotonic()
            of = f" {self._done} of {self._total}" if self._total else ""
            self.say(f"{self._text}{of}")

    def _finish(self) -> None:
        """A stage whose steps were not all counted is done all the same when the next begins."""
        if self._bars is not None and self._task is not None:
            total = self._total or max(1, self._done)
            self._bars.update(self._task, completed=total, total=total)
