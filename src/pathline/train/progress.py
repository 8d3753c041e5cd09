"""What a person sees while training runs: a bar on a terminal, else a line now and then."""

import sys
import time
from types import TracebackType

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TextColumn,
    TimeRemainingColumn,
)

REFRESH = 0.1  # seconds; drawing takes longer than a small step of training


class Reporter:
    """Shows step, loss terms, steps per second and time left on standard error."""

    def __init__(self, total: int, *, shown: bool, done: int = 0, lines: int = 10) -> None:
        self.total, self.shown = total, shown
        self.started, self.start = time.perf_counter(), done
        self.every = max(1, total // lines)
        self.next_line = done - done % self.every + self.every
        console = Console(stderr=True)
        self.bar: Progress | None = None
        self.shown_at = -1.0
        if shown and console.is_terminal:
            self.bar = Progress(
                SpinnerColumn(),
                BarColumn(bar_width=24),
                MofNCompleteColumn(),
                TextColumn("{task.description}"),
                TimeRemainingColumn(),
                console=console,
                transient=False,
            )
            self.task = self.bar.add_task("", total=total, completed=done)

    def __enter__(self) -> "Reporter":
        if self.bar:
            self.bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: object, trace: TracebackType | None
    ) -> None:
        if self.bar:
            self.bar.stop()

    def update(self, step: int, entry: dict[str, float]) -> None:
        """Step `step` is done; `entry` holds the loss and its terms as last logged."""
        if not self.shown:
            return
        if self.bar:
            now = time.perf_counter()
            if now < self.shown_at + REFRESH and step < self.total:
                return
            self.shown_at = now
            rate = (step - self.start) / max(now - self.started, 1e-9)
            text = f"{_terms(entry)}  {rate:.1f} steps/s"
            self.bar.update(self.task, completed=step, description=text)
        elif step >= self.next_line or step == self.total:
            self.next_line += self.every
            elapsed = time.perf_counter() - self.started
            rate = (step - self.start) / max(elapsed, 1e-9)
            left = (self.total - step) / max(rate, 1e-9)
            line = (
                f"step {step}/{self.total}  {_terms(entry)}  {rate:.1f} steps/s  {left:.0f} s left"
            )
            print(line, file=sys.stderr, flush=True)

    def say(self, text: str) -> None:
        """A line of its own."""
        if self.bar:
            self.bar.console.print(text, highlight=False)
        elif self.shown:
            print(text, file=sys.stderr, flush=True)


def _terms(entry: dict[str, float]) -> str:
    names = [n for n in entry if n not in ("step", "seconds", "learning_rate", "rate")]
    return "  ".join(f"{name} {entry[name]:.4g}" for name in names)
