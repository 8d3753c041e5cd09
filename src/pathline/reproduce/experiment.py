"""What an experiment takes and gives."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class RunArguments:
    """The arguments of `pathline.fit` that every experiment passes on."""

    out: Path
    seed: int = 0
    max_steps: int | None = None
    budget: float | None = None
    resume: bool = False
    overwrite: bool = False

    def part(self, label: str) -> "RunArguments":
        """Those of one of several runs of an experiment; an interrupted one goes on."""
        folder = self.out / "checkpoint" / label.replace(" ", "-")
        return RunArguments(folder, self.seed, self.max_steps, resume=True)


@dataclass(frozen=True)
class Outcome:
    """The measured figure beside the published one, lower is better, and all details."""

    measured: float
    published: float | None
    source: str
    text: str  # the table that is printed
    details: dict[str, Any]


@dataclass(frozen=True)
class Experiment:
    """A summary for `--list`, and the function that runs it."""

    summary: str
    run: Callable[[RunArguments, str], Outcome]
