"""Training from coarse to fine discretisations of one model, with its cost in work units."""

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from math import inf
from pathlib import Path
from typing import Any, TypeAlias

from ..errors import ArgumentError
from . import files
from .fit import Array, fit
from .objective import Objective
from .trainer import Run

Data: TypeAlias = Array | tuple[Array, Array]


@dataclass(frozen=True)
class Level:
    """One discretisation, and how long to train on it.

    Args:
        steps: of training.
        cost: of a step, in work units, such as the number of layers times that of pixels over
            those of the finest level, whose cost is one.
        data, validation: rows of this level, where they are not those of all, such as images of
            another resolution.

    Raises:
        ArgumentError: a number is not positive.
    """

    steps: int
    cost: float = 1.0
    data: Data | None = None
    validation: Data | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.steps, int) or self.steps < 1:
            raise ArgumentError(f"`steps` must be a positive integer, got {self.steps!r}")
        if not 0 < self.cost < inf:
            raise ArgumentError(f"`cost` must be positive and finite, got {self.cost!r}")


@dataclass
class MultilevelRun:
    """What `multilevel` did."""

    objective: Objective  # of the last level; its model has the best weights
    runs: list[Run]  # of each level
    work: list[float]  # of each level, in work units
    history: list[dict[str, float]]  # of all levels: as in `Run`, with `level` and `work` so far

    @property
    def total_work(self) -> float:
        """In work units."""
        return sum(self.work)


def multilevel(
    objective: Objective,
    levels: Sequence[Level],
    prolong: Callable[[Objective], Objective],
    data: Data,
    *,
    validation: Data | None = None,
    out: str | Path | None = None,
    resume: bool = False,
    overwrite: bool = False,
    **options: Any,
) -> MultilevelRun:
    """Train on each level in turn, from the coarsest, beginning with the weights of the one before.

    Args:
        objective: of the first level.
        levels: from coarse to fine.
        prolong: makes the objective of the next level of that of a trained one, such as
            `lambda o: o.of(networks.deepened(o.model))`.
        data, validation: as in `fit`, of all levels that have none of their own.
        out: run folder: the finest model, metrics.json, and the log of all levels, with work units;
            the levels' own folders are under checkpoint/.
        resume, overwrite: as in `fit`; finished levels are not trained again.
        options: of `fit`, for all levels, such as `batch_size` and `seed`.

    Returns:
        A `MultilevelRun`. Validations are not counted as work.

    Raises:
        ArgumentError: there are no levels, or others than `Level`s, or `resume` comes without
            `out`; else as in `fit`.

    Source: Haber, Ruthotto, Holtham, Learning across scales, AAAI 2018, arXiv 1703.02009; Chang et
    al., Multi-level residual networks from dynamical systems view, ICLR 2018, arXiv 1710.10348.
    """
    if not levels:
        raise ArgumentError("`levels` must be at least one, got none")
    if not all(isinstance(level, Level) for level in levels):
        raise ArgumentError(f"`levels` must be `Level`s, got {levels!r}")
    if "max_steps" in options or "budget" in options:
        raise ArgumentError("`max_steps` and `budget` are those of the levels: use `Level(steps=)`")
    if resume and out is None:
        raise ArgumentError("`resume` needs `out`, the run folder to go on from")
    folder = None if out is None else Path(out)
    if folder:
        files.open_run(folder, resume=resume, overwrite=overwrite)
        plan = [{"steps": level.steps, "cost": level.cost} for level in levels]
        _same_plan(folder, plan, resume)
    runs: list[Run] = []
    work: list[float] = []
    history: list[dict[str, float]] = []
    for k, level in enumerate(levels):
        if k:
            objective = prolong(objective)
        run = fit(
            objective,
            data if level.data is None else level.data,
            validation=validation if level.validation is None else level.validation,
            out=folder and folder / "checkpoint" / f"level-{k}",
            max_steps=level.steps,
            resume=folder is not None,
            **options,
        )
        before, steps = sum(work), sum(run.steps for run in runs)
        for entry in run.history:
            done = entry["step"]
            history.append(
                {**entry, "level": k, "step": steps + done, "work": before + level.cost * done}
            )
        runs.append(run)
        work.append(level.cost * run.steps)
    if folder:
        _write(folder, objective, runs, work, history)
    return MultilevelRun(objective, runs, work, history)


def _same_plan(folder: Path, plan: list[dict[str, Any]], resume: bool) -> None:
    path = folder / "config.json"
    if resume and path.exists() and files.read_json(path).get("levels") != plan:
        raise ArgumentError(
            f"the run in {folder} was started with other levels; `overwrite` starts again"
        )
    files.write_json(path, {"levels": plan})


def _write(
    folder: Path,
    objective: Objective,
    runs: Sequence[Run],
    work: Sequence[float],
    history: Sequence[dict[str, float]],
) -> None:
    lines = "".join(json.dumps(files.finite(entry)) + "\n" for entry in history)
    files.write_atomically(folder / "log.jsonl", lambda path: path.write_text(lines))
    files.save(objective.model, folder / "model")
    levels = [
        {key: value for key, value in asdict(run).items() if key not in ("history", "out")}
        for run in runs
    ]
    metrics = runs[-1].metrics | {"work": list(work), "total_work": sum(work), "levels": levels}
    files.write_json(folder / "metrics.json", metrics)
