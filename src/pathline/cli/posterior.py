"""`pathline fit posterior` and `fit conditional`: densities given something else."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from cyclopts import Parameter

from ..data import Table, check_support, parse_support
from ..data.pairs import check_pairs, choose_columns, read_pairs
from ..errors import ArgumentError
from ..posterior.outliers import keep_contexts
from ..posterior.pilots import build, remaining_budget, run_pilots
from ..posterior_report import finish_posterior
from ..train import fit, hold_out
from ..train.files import open_run, read_json
from .options import Columns, Flag, Positive, RunOptions, Seconds, Weight, answer, names, say

CHECKED = 10_000  # held-out pairs that the final figures use


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class PairOptions:
    """What `fit posterior` and `fit conditional` share."""

    method: Literal["cot", "pcp"] = "cot"
    "The kind of map: COT-Flow, along straight paths in time, or PCP-Map, a convex gradient."
    pilots: int = 0
    "Short runs that choose width, depth, transport weight, learning rate and batch size."
    validation: Path | None = None
    "A file of other pairs that picks the best model; a tenth of FILE by default."
    drop: Columns = None
    "Columns to leave out."
    dequantize: Columns = None
    "Discrete parameters: uniform noise of their resolution is added."
    missing: Literal["refuse", "drop"] = "refuse"
    "Refuse values that are NaN or infinite, as of failed simulations, or drop the rows with some."
    support: Columns = None
    'Bounds of a parameter, as the prior has them: "col=positive", "col=[0,1]", "col=[2,inf)".'
    width: Positive | None = None
    "Neurons of each layer of the network; chosen from the number of parameters by default."
    depth: Positive | None = None
    "Layers of the network; chosen from the number of parameters by default."
    embedding: Positive | None = None
    "Features that a network learns from the data, where these have many columns."
    transport: Weight | None = None
    "Weight of the transport cost, against the likelihood; of cot only."
    hjb: Weight | None = None
    "Weight of the HJB residual, against the likelihood; of cot only, training may raise it."
    batch_size: Positive | None = None
    "Rows of a training step; 512 by default."
    learning_rate: Seconds | None = None
    "The first of a cosine schedule; chosen from the number of steps by default."
    patience: Positive = 15
    "Stop after this many validations without improvement, of about fifty."
    tensorboard: Flag = False
    "Also write TensorBoard events."

    def flow(self) -> dict[str, Any]:
        """Options of the flow; None for its default."""
        kept = ("width", "depth", "embedding", "transport", "hjb")
        return {name: getattr(self, name) for name in kept}

    def training(self) -> dict[str, Any]:
        """Arguments of `fit` that pilot runs may choose."""
        return {"batch_size": self.batch_size, "learning_rate": self.learning_rate}


def posterior(
    file: Path,
    /,
    *,
    run: RunOptions,
    options: PairOptions | None = None,
    parameters: Columns = None,
    data: Columns = None,
) -> None:
    """Learn the posterior of a simulator's parameters from pairs of parameters and data.

    The report says whether the posterior is calibrated, on pairs that were held out.

    Parameters
    ----------
    file
        The simulations: .npz with arrays theta and x, .nc with such variables, or a table
        (.csv, .csv.gz, .npy, .npz, .parquet) with --parameters.
    run
        What every command that trains takes.
    options
        What both of these commands take.
    parameters
        Columns of a table that are parameters.
    data
        Columns of a table that are data; all others by default.
    """
    flags = ("--parameters", "--data")
    _fit(file, run, options or PairOptions(), parameters, data, flags, "Posterior of")


def conditional(
    file: Path,
    /,
    *,
    target: Columns,
    run: RunOptions,
    options: PairOptions | None = None,
    given: Columns = None,
) -> None:
    """Learn the density of some columns of a table, given the others.

    Parameters
    ----------
    file
        The table: .csv, .csv.gz, .npy, .npz or .parquet; one row for each observation.
    target
        Columns whose density is learned.
    run
        What every command that trains takes.
    options
        What both of these commands take.
    given
        Columns that it is conditional on; all others by default.
    """
    flags = ("--target", "--given")
    _fit(file, run, options or PairOptions(), target, given, flags, "Conditional density of")


def _fit(
    file: Path,
    run: RunOptions,
    options: PairOptions,
    parameters: list[str] | None,
    data: list[str] | None,
    flags: tuple[str, str],
    title: str,
) -> None:
    if options.pilots < 0:
        raise ArgumentError(f"--pilots must be at least 0, got {options.pilots}")
    table, told = read_pairs(file)
    chosen = choose_columns(
        table, told, names(parameters, table.columns), names(data, table.columns), flags
    )
    table, recipe = check_pairs(
        table,
        *chosen,
        dequantize=names(options.dequantize, table.columns),
        drop=names(options.drop, table.columns),
        missing=options.missing,
        seed=run.seed,
    )
    for note in recipe.recipe.notes:
        say(note)
    dim = len(recipe.names)
    bounds = parse_support(options.support or [], recipe.names)
    theta, context = table.values[:, :dim], table.values[:, dim:]
    check_support(Table(theta, recipe.names, name=table.name), bounds)
    held = None
    if options.validation is not None:
        held = recipe.pairs(options.validation, seed=run.seed + 1)
        check_support(Table(held[0], recipe.names, name=str(options.validation)), bounds)
    pairs = torch.from_numpy(theta), torch.from_numpy(context)
    fixed: dict[str, Any] = {"support": bounds if options.support else None, "seed": run.seed}
    flow_options, training, pilots = options.flow(), options.training(), []
    build(options.method, dim, context.shape[1], flow_options, **fixed)  # or say what is wrong
    if options.pilots:
        pilots = _recorded_pilots(run, options.pilots) or _pilots(run, options, pairs, held, fixed)
        best = {name: value for name, value in pilots[0].items() if name != "nll"}
        flow_options = {name: best.get(name) for name in flow_options}
        training = {name: best.get(name) for name in training}
    flow = build(options.method, dim, context.shape[1], flow_options, **fixed)
    metadata = {
        **recipe.metadata(),
        "file": str(file),
        "validation": None if options.validation is None else str(options.validation),
        "pilots": pilots,
    }
    budget = remaining_budget(run.budget, options.pilots)
    try:
        fit(
            flow,
            pairs,
            validation=held,
            batch_size=training["batch_size"] or 512,
            learning_rate=training["learning_rate"],
            patience=options.patience,
            tensorboard=options.tensorboard,
            metadata=metadata,
            **run.training() | {"budget": budget},
        )
    finally:  # an interrupted run has a model, too
        if (run.out / "model" / "model.json").exists():
            keep_contexts(run.out / "model", context, seed=run.seed)
    if held is None:
        index = hold_out(len(table), run.seed)[1].numpy()
        held = theta[index], context[index]
    metrics = finish_posterior(
        run.out,
        held[0][:CHECKED],
        held[1][:CHECKED],
        recipe,
        title=f"{title} {file.name}",
        seed=run.seed,
    )
    answer(metrics, run.json, _summary(run.out, metrics))


def _pilots(
    run: RunOptions,
    options: PairOptions,
    pairs: tuple[torch.Tensor, torch.Tensor],
    held: Sequence[Any] | None,
    fixed: dict[str, Any],
) -> list[dict[str, Any]]:
    open_run(run.out, resume=run.resume, overwrite=run.overwrite)  # before any work is lost
    found = run_pilots(
        options.pilots,
        options.method,
        *pairs,
        options=options.flow(),
        training=options.training(),
        validation=None if held is None else tuple(map(torch.from_numpy, held)),  # type: ignore[arg-type]
        max_steps=run.max_steps,
        budget=run.budget,
        tell=say,
        **fixed,
    )
    return [pilot.to_dict() for pilot in found]


def _recorded_pilots(run: RunOptions, count: int) -> list[dict[str, Any]] | None:
    """The pilot runs of a run that goes on."""
    config = run.out / "config.json"
    if not run.resume or not config.exists():
        return None
    pilots: list[dict[str, Any]] = read_json(config).get("metadata", {}).get("pilots", [])
    if len(pilots) != count:
        raise ArgumentError(
            f"the run in {run.out} was started with --pilots {len(pilots)}, now {count}; "
            "--overwrite starts again"
        )
    return pilots


def _summary(folder: Path, metrics: dict[str, Any]) -> str:
    (name, baseline), *_ = metrics["classical"].items()
    calibration = metrics["calibration"]
    verdict = metrics["calibration_skipped"] if calibration is None else calibration["verdict"]
    return (
        f"held-out negative log-likelihood {metrics['nll']:.4f} nats ({metrics['nll_rows']} rows; "
        f"{name} {baseline:.4f})\n{verdict}\n{metrics['check']['verdict']}\n"
        f"wrote {folder}: model, report.html, metrics.json, log.jsonl, pictures"
    )
