"""Two trainings of one model side by side, and the folder and the page of what came out.

Source: Onken, Ruthotto, Discretize-Optimize vs. Optimize-Discretize, 2020 (arXiv 2005.13420).
"""

import json
import math
import platform
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from .. import __version__
from ..errors import ArgumentError, TrainingError
from ..report import Section, configuration_section, write_report
from ..train import files
from ..train.progress import Reporter
from ..train.recipe import cosine, set_rate
from .experiment import Outcome, RunArguments

SOURCE = (
    "Onken, Ruthotto, Discretize-Optimize vs. Optimize-Discretize (arXiv 2005.13420): in six of "
    "seven problems training cost 39 % to 97 % less with DO; figures of each problem are not known"
)
REDUCTION = (0.39, 0.97)  # of the cost of training by DO, in six of their seven problems
COSTS = {
    "forward": "evaluations forward, a step",
    "backward": "evaluations backward, a step",
    "seconds": "seconds of training",
    "processor_seconds": "seconds of the processor",
}
DO, OD = "discretize-optimize", "optimize-discretize"

BLOCKS = 50  # of a training, in which it takes turns


@dataclass
class Training:
    """One model in training, and what that cost.

    A backward pass of DO has one product with the transposed Jacobian for each evaluation of the
    forward pass; one of OD has evaluations of its own, each with its product. Both are counted.

    Args:
        loss: gives the loss of the next batch.
        optimisers: of the parameters.
        evaluated: the module whose calls are counted.
        rate: the first of a cosine schedule; without it the optimisers keep theirs.
    """

    loss: Callable[[], Tensor]
    optimisers: Sequence[torch.optim.Optimizer]
    evaluated: nn.Module
    rate: float | None = None
    forward: int = 0
    backward: int = 0
    seconds: float = 0.0
    processor_seconds: float = 0.0
    history: list[dict[str, float]] = field(default_factory=list)

    @property
    def evaluations(self) -> int:
        """Forward and backward."""
        return self.forward + self.backward

    def costs(self) -> dict[str, float]:
        """For metrics.json; evaluations are means over the steps."""
        steps = self.history[-1]["step"]
        return {
            "forward": self.forward / steps,
            "backward": self.backward / steps,
            "seconds": self.seconds,
            "processor_seconds": self.processor_seconds,
        }

    def run(self, steps: range, total: int) -> float:
        """Make these of `total` steps, and return their mean loss."""
        calls = 0

        def count(*_: Any) -> None:
            nonlocal calls
            calls += 1

        began, processor = time.perf_counter(), time.process_time()
        losses = []
        with self.evaluated.register_forward_hook(count):
            for step in steps:
                if self.rate is not None:
                    set_rate(list(self.optimisers), self.rate * cosine(step / total))
                for optimiser in self.optimisers:
                    optimiser.zero_grad()
                calls = 0
                loss = self.loss()
                forward = calls
                loss.backward()
                self.forward += forward
                self.backward += calls - forward or forward
                for optimiser in self.optimisers:
                    optimiser.step()
                losses.append(loss.item())
        self.seconds += time.perf_counter() - began
        self.processor_seconds += time.process_time() - processor
        mean = sum(losses) / len(losses)
        seconds = round(self.seconds, 3)
        self.history.append({"step": steps.stop, "seconds": seconds, "loss": mean})
        return mean


def race(trainings: Mapping[str, Training], iterations: int) -> None:
    """Make so many steps of each training.

    They take turns in short blocks, so that other work on the machine slows all of them alike.

    Raises:
        TrainingError: a loss is not finite.
    """
    block = max(1, iterations // BLOCKS)
    with Reporter(iterations, shown=True) as reporter:
        for start in range(0, iterations, block):
            steps = range(start, min(start + block, iterations))
            losses = {name: t.run(steps, iterations) for name, t in trainings.items()}
            for name, loss in losses.items():
                if not math.isfinite(loss):
                    raise TrainingError(f"{name}: the loss is {loss} before step {steps.stop}")
            reporter.update(steps.stop, losses)


@dataclass(frozen=True)
class RunFolder:
    """The folder of an experiment, and its outcome if it was there already."""

    arguments: RunArguments
    config: Mapping[str, Any]
    done: Outcome | None = None

    @classmethod
    def open(
        cls, experiment: str, arguments: RunArguments, size: str, **settings: Any
    ) -> "RunFolder":
        """Make the folder ready; with `resume` a finished run is left as it is.

        An interrupted one starts again, since the seconds of one training are compared with those
        of another.

        Raises:
            ArgumentError: there is a budget, the folder is not empty, or its run is another.
        """
        if arguments.budget is not None:
            raise ArgumentError(
                f"{experiment} compares trainings of equally many steps and has no --budget; "
                "use --max-steps"
            )
        out = files.open_run(arguments.out, resume=arguments.resume, overwrite=arguments.overwrite)
        config = {"experiment": experiment, "size": size, "seed": arguments.seed, **settings}
        done = None
        if arguments.resume and (out / "config.json").exists():
            before = files.read_json(out / "config.json")
            for name, value in config.items():
                if before.get(name) != value:
                    raise ArgumentError(
                        f"the run in {out} was started with another {name}: "
                        f"{before.get(name)!r}, now {value!r}; --overwrite starts again"
                    )
            if (out / "metrics.json").exists():
                found = files.read_json(out / "metrics.json")
                parts = {key: found.pop(key) for key in ("measured", "published", "source", "text")}
                done = Outcome(**parts, details=found)
        versions = {
            "pathline": __version__,
            "torch": torch.__version__,
            "python": platform.python_version(),
        }
        files.write_json(out / "config.json", config | {"versions": versions})
        return cls(arguments, config, done)

    def finish(
        self, outcome: Outcome, title: str, sections: Sequence[Section], log: Iterable[Any] = ()
    ) -> Outcome:
        """Write log, report and metrics, which come last: who has them has all."""
        out = self.arguments.out
        lines = "".join(json.dumps(entry) + "\n" for entry in log)
        files.write_atomically(out / "log.jsonl", lambda path: path.write_text(lines))
        return self.write(outcome, title, sections)

    def write(self, outcome: Outcome, title: str, sections: Sequence[Section]) -> Outcome:
        """Write report and metrics beside a log that is there."""
        out = self.arguments.out
        last = configuration_section(self.config)
        write_report(out / "report.html", title, [*sections, last], subtitle=outcome.source)
        entries = {key: value for key, value in asdict(outcome).items() if key != "details"}
        files.write_json(out / "metrics.json", outcome.details | entries)
        return outcome

    def compare(
        self,
        title: str,
        trainings: Mapping[str, Training],
        figures: Mapping[str, Mapping[str, float]],
        labels: Mapping[str, str],
        told: str,
        pictures: Sequence[Section],
        *,
        logarithmic: bool = False,
        details: Mapping[str, Any] | None = None,
    ) -> Outcome:
        """The outcome of two trainings; the measured figure is DO's part of OD's seconds.

        Args:
            figures: of the models, by training.
            labels: of the figures.
            told: what the figures are.
            logarithmic: draw the loss so.
            details: more of them.
        """
        from ..plots import curves

        do, od = trainings[DO], trainings[OD]
        costs = {name: training.costs() for name, training in trainings.items()}
        table: list[tuple[object, ...]] = [("", *trainings)]
        table += [
            (label, *(f"{cost[key]:.1f}" for cost in costs.values()))
            for key, label in COSTS.items()
        ]
        table += [
            (label, *(_figure(figures[name][key]) for name in trainings))
            for key, label in labels.items()
        ]
        faster, fewer = od.seconds / do.seconds, od.evaluations / do.evaluations
        summary = (
            f"DO is {faster:.1f} times as fast; OD makes {fewer:.1f} times as many evaluations"
        )
        found = {
            "speed_up": faster,
            "evaluations_ratio": fewer,
            "published_reduction": REDUCTION,
            "iterations": self.config["iterations"],
            **{name: cost | dict(figures[name]) for name, cost in costs.items()},
        }
        lines = {
            name: (
                [entry["seconds"] for entry in t.history],
                [entry["loss"] for entry in t.history],
            )
            for name, t in trainings.items()
        }
        label = "Training loss against seconds"
        figure = curves(lines, "seconds", "loss", label, log_y=logarithmic)
        sections = [
            Section(
                "Comparison",
                f"{summary}, in {self.config['iterations']:,} steps each from the same weights on "
                "the same batches. An evaluation backward is a product with the transposed "
                f"Jacobian, with OD after an evaluation of its own.\n\n{told}",
                table=table,
            ),
            Section("Training", figure=figure),
            *pictures,
        ]
        log = [{"training": name, **entry} for name, t in trainings.items() for entry in t.history]
        text = f"{columns(table)}\n{summary}\npublished: {SOURCE}"
        found |= details or {}
        outcome = Outcome(do.seconds / od.seconds, None, SOURCE, text, found)
        return self.finish(outcome, title, sections, log)


def _figure(value: float) -> str:
    return f"{value:.4f}" if abs(value) >= 0.01 else f"{value:.1e}"


def columns(table: Sequence[Sequence[object]]) -> str:
    """A table as lines of text, the first column to the left."""
    rows = [[str(cell) for cell in row] for row in table]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for first, *rest in rows:
        cells = [cell.rjust(width) for cell, width in zip(rest, widths[1:], strict=True)]
        lines.append("  ".join([first.ljust(widths[0]), *cells]))
    return "\n".join(lines)


def open_folder(experiment: str, arguments: RunArguments, size: str, **settings: Any) -> RunFolder:
    """The folder of an experiment of several trainings, each in its part of `checkpoint/`."""
    limits = {"max_steps": arguments.max_steps, "budget": arguments.budget}
    return RunFolder.open(experiment, replace(arguments, budget=None), size, **limits, **settings)
