"""`pathline fit density`."""

from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from ..data import check_support, check_table, parse_support, read_table
from ..errors import DataError
from ..flows import FAMILY
from ..report import finish_density
from ..train import fit, hold_out
from ..train.trainer import is_leader
from .options import Columns, Flag, Positive, RunOptions, Seconds, Weight, answer, names, say

CHECKED = 10_000  # held-out rows that the final figures use


def density(
    file: Path,
    /,
    *,
    run: RunOptions,
    validation: Path | None = None,
    drop: Columns = None,
    dequantize: Columns = None,
    missing: Literal["refuse", "drop"] = "refuse",
    support: Columns = None,
    weights: str | None = None,
    model: Literal["ot-flow", "potential-flow", "monge-ampere", "rnode", "ffjord"] = "ot-flow",
    width: Positive | None = None,
    depth: Positive | None = None,
    transport: Weight | None = None,
    hjb: Weight | None = None,
    trace: Literal["auto", "exact", "probe", "hutch++"] | None = None,
    standardize: bool = True,
    batch_size: Positive = 512,
    learning_rate: Seconds | None = None,
    patience: Positive = 15,
    devices: Positive = 1,
    nodes: Positive = 1,
    strategy: str = "auto",
    tensorboard: Flag = False,
) -> None:
    """Fit an exact, invertible density model to a table of numbers.

    Parameters
    ----------
    file
        The table: .csv, .csv.gz, .npy, .npz or .parquet; one row for each observation.
    run
        What every command that trains takes.
    validation
        A table of the same columns that picks the best model; a tenth of FILE by default.
    drop
        Columns to leave out.
    dequantize
        Columns of discrete values: uniform noise of their resolution is added.
    missing
        Refuse missing values, or drop the rows that have some.
    support
        Bounds of a column: "col=positive", "col=[0,1]", "col=[2,inf)".
    weights
        Column of row weights.
    model
        The continuous flow. The first two have the fast training; the others are for comparison.
    width
        Neurons of each layer of the network; chosen from the number of columns by default.
    depth
        Layers of the network; chosen from the number of columns by default.
    transport
        Weight of the transport cost, against the likelihood.
    hjb
        Weight of the HJB residual, against the likelihood; training may raise it.
    trace
        How training computes the divergence: exactly, by random probes (hutch++ is for the last
        three models), or as is faster (auto, of the first two).
    standardize
        Work in coordinates of mean zero and covariance one.
    batch_size
        Rows of a training step, over all processes.
    learning_rate
        The first of a cosine schedule; chosen from the number of steps by default.
    patience
        Stop after this many validations without improvement, of about fifty.
    devices
        Processes on each machine.
    nodes
        Machines.
    strategy
        Lightning Fabric's strategy for several processes, such as ddp.
    tensorboard
        Also write TensorBoard events.
    """
    table = read_table(file)
    columns, row_weights = table.columns, None
    if weights is not None:
        row_weights = table.select([weights]).values[:, 0]
        table = table.drop([weights])
        if np.isnan(row_weights).any():
            raise DataError(f"{file.name}: the weights in column {weights!r} have missing values")
        weighty = row_weights != 0
        table, row_weights = replace(table, values=table.values[weighty]), row_weights[weighty]
        if missing == "drop":
            whole = ~np.isnan(table.drop(names(drop, table.columns)).values).any(1)
            if not whole.all():
                lost = len(whole) - whole.sum()
                say(f"{lost} of {len(whole)} rows have missing values and were dropped")
            table, row_weights = replace(table, values=table.values[whole]), row_weights[whole]
    table, recipe = check_table(
        table,
        dequantize=names(dequantize, table.columns),
        drop=names(drop, table.columns),
        missing=missing,
        seed=run.seed,
    )
    recipe = replace(recipe, original=columns)
    for note in recipe.notes:
        say(note)
    bounds = parse_support(support or [], table.columns)
    check_support(table, bounds)
    held = None
    if validation is not None:
        held = recipe.apply(read_table(validation), seed=run.seed + 1).values
        check_support(replace(table, values=held), bounds)
    given = {
        "width": width,
        "depth": depth,
        "transport": transport,
        "hjb": hjb,
        "trace": trace,
        "support": bounds if support else None,
    }
    flow = FAMILY[model](
        len(table.columns),
        standardize=standardize,
        generator=torch.Generator().manual_seed(run.seed),
        **{name: value for name, value in given.items() if value is not None},
    )
    metadata = {
        "recipe": recipe.to_dict(),
        "file": str(file),
        "validation": None if validation is None else str(validation),
        "weights": weights,
    }
    fit(
        flow,
        table.values,
        validation=held,
        sample_weight=row_weights,
        batch_size=batch_size,
        learning_rate=learning_rate,
        patience=patience,
        devices=devices,
        nodes=nodes,
        strategy=strategy,
        tensorboard=tensorboard,
        metadata=metadata,
        **run.training(),
    )
    if not is_leader():
        return
    if held is None:
        held = table.values[hold_out(len(table), run.seed)[1].numpy()]
    metrics = finish_density(
        run.out, held[:CHECKED], table.columns, title=f"Density of {file.name}"
    )
    answer(metrics, run.json, _summary(run.out, metrics))


def _summary(folder: Path, metrics: dict[str, Any]) -> str:
    return (
        f"held-out negative log-likelihood {metrics['nll']:.4f} nats "
        f"({metrics['nll_rows']} rows)\n{metrics['check']['verdict']}\n"
        f"wrote {folder}: model, report.html, metrics.json, log.jsonl"
    )
