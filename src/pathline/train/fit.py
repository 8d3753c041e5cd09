"""Train any objective: reproducible, resumable, interruptible."""

import math
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..errors import ArgumentError, ShapeError
from . import files
from .objective import Objective
from .recipe import OPTIMIZERS
from .rows import Rows
from .trainer import Run, Settings, Trainer

Array = np.ndarray | Tensor


def fit(
    model: nn.Module,
    data: Array | tuple[Array, Array],
    *,
    validation: Array | tuple[Array, Array] | None = None,
    sample_weight: Array | None = None,
    out: str | Path | None = None,
    seed: int = 0,
    max_steps: int | None = None,
    budget: float | None = None,
    resume: bool = False,
    overwrite: bool = False,
    batch_size: int = 512,
    learning_rate: float | None = None,
    patience: int = 15,
    optimizer: str | None = None,
    devices: int = 1,
    nodes: int = 1,
    strategy: str = "auto",
    progress: bool = True,
    tensorboard: bool = False,
    metadata: dict[str, Any] | None = None,
) -> Run:
    """Train `model` on `data`; it ends with the weights that were best on the validation rows.

    Args:
        model: an `Objective`, or a model whose `objective()` gives one.
        data: (rows, columns); a memory-mapped NumPy array is never loaded whole. For a
            conditional model a pair (x, context) of such, in the same order.
        validation: rows like `data` that pick the best model; a random tenth of `data` if None.
        sample_weight: (rows,), not negative; weights of the rows of `data`.
        out: run folder for config.json, model/, checkpoint/, log.jsonl and metrics.json.
        seed: of everything random; the same seed on the same machine gives the same weights.
        max_steps: training steps; by default the objective's choice for the number of rows.
        budget: seconds for the whole call, once the data are checked. A timed warm-up turns them,
            once, into a number of steps, and where time is short into fewer validations on fewer
            rows; config.json and the checkpoint keep what was decided. Where the objective makes
            its steps more expensive, each counts for more than one.
        resume: go on from the last checkpoint in `out`, bit for bit; start where there is none.
        overwrite: replace a run in `out`.
        batch_size: rows of a step, over all processes.
        learning_rate: the first of a cosine schedule; by default the objective's choice for the
            number of steps.
        patience: stop after this many validations without improvement, of about fifty.
        optimizer: "adam" (the default, with Muon for square hidden matrices) or "lbfgs", of which a
            step is 50 iterations on one batch: for smooth losses, large batches and double
            precision. It has a line search, no learning rate.
        devices, nodes, strategy: processes for each machine, machines, and the strategy of
            Lightning Fabric, such as "ddp"; under torchrun they come from its environment.
        progress: show a bar, or lines where standard error is not a terminal.
        tensorboard: also write TensorBoard events into `out`.
        metadata: kept in the saved model, such as column names.

    Returns:
        A `Run`: history, events in words, and metrics.

    Raises:
        ArgumentError, DataError, ShapeError: bad input, before anything is trained or written.
        TrainingError: training diverged again and again; the best model is kept.
        KeyboardInterrupt: on Ctrl-C, after best model and checkpoint are safe.

    The loss that is shown is in the units of the objective (standardised units for flows).
    """
    settings = Settings(seed, max_steps, budget, batch_size, learning_rate, patience, optimizer)
    _check(asdict(settings) | {"devices": devices, "nodes": nodes})
    if resume and out is None:
        raise ArgumentError("`resume` needs `out`, the run folder to go on from")
    objective = model if isinstance(model, Objective) else _objective(model)
    rows, held = _split(data, validation, sample_weight, seed)
    objective.check(rows)
    objective.check(held)
    trainer = Trainer(
        objective, rows, held, settings, devices=devices, nodes=nodes, strategy=strategy
    )
    folder = None if out is None else Path(out)
    if folder and trainer.leader:
        files.open_run(folder, resume=resume, overwrite=overwrite)
    trainer.fabric.barrier()
    return trainer.run(
        folder, resume=resume, shown=progress, tensorboard=tensorboard, metadata=metadata or {}
    )


def _objective(model: nn.Module) -> Objective:
    make: Callable[[], Objective] | None = getattr(model, "objective", None)
    if make is None:
        raise ArgumentError(
            "`model` must be an Objective or have a method `objective()` that returns one, got "
            f"{type(model).__name__}"
        )
    return make()


def _check(values: dict[str, Any]) -> None:
    for name in ("max_steps", "batch_size", "patience", "devices", "nodes"):
        value = values[name]
        if value is not None and (not isinstance(value, int) or value < 1):
            raise ArgumentError(f"`{name}` must be a positive integer, got {value!r}")
    for name in ("budget", "learning_rate"):
        value = values[name]
        if value is not None and not (math.isfinite(value) and value > 0):
            raise ArgumentError(f"`{name}` must be positive and finite, got {value!r}")
    chosen = values["optimizer"]
    if chosen not in (None, *OPTIMIZERS):
        raise ArgumentError(f"`optimizer` must be one of {', '.join(OPTIMIZERS)}, got {chosen!r}")
    if chosen == "lbfgs" and (values["devices"] > 1 or values["nodes"] > 1):
        raise ArgumentError("`optimizer` 'lbfgs' works in one process")
    if not isinstance(values["seed"], int) or values["seed"] < 0:
        raise ArgumentError(f"`seed` must be an integer >= 0, got {values['seed']!r}")


def _split(
    data: Array | tuple[Array, Array],
    validation: Array | tuple[Array, Array] | None,
    sample_weight: Array | None,
    seed: int,
) -> tuple[Rows, Rows]:
    rows = Rows(_joined(data, "data"), sample_weight)
    if rows.weights is not None and bool((rows.weights == 0).any()):
        rows = rows.subset(torch.nonzero(rows.weights).flatten())
    if len(rows) < 2:
        raise ArgumentError(f"`data` must have at least two rows, got {len(rows)}")
    if validation is not None:
        held = Rows(_joined(validation, "validation"), name="validation")
        if held.columns != rows.columns:
            raise ShapeError(
                f"`validation` must have {rows.columns} columns like `data`, got {held.columns}"
            )
        return rows, held
    kept, held_out = hold_out(len(rows), seed)
    return rows.subset(kept), rows.subset(held_out)


def _joined(data: Array | tuple[Array, Array], name: str) -> Array:
    """A pair (x, context) as one array, side by side."""
    if not isinstance(data, tuple):
        return data
    parts = [Rows(part, name=f"{name}[{i}]") for i, part in enumerate(data)]
    if len(parts) != 2 or len(parts[0]) != len(parts[1]):
        shapes = ", ".join(str((len(part), part.columns)) for part in parts)
        raise ShapeError(f"`{name}` must be a pair (x, context) of as many rows, got {shapes}")
    return torch.cat([part.take(slice(None))[0].cpu() for part in parts], 1)


def hold_out(rows: int, seed: int) -> tuple[Tensor, Tensor]:
    """Indices of the rows that `fit` trains on, and of the random tenth that it holds out."""
    order = torch.randperm(rows, generator=torch.Generator().manual_seed(seed))
    count = max(1, rows // 10)
    return order[count:].sort().values, order[:count]
