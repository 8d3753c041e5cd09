"""`pathline sample`, `score`, `check` and `report`: what a trained model is for."""

import math
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
from cyclopts import Parameter

from ..data import read_table, write_table
from ..report import write_density_report
from .options import Flag, Positive, Seed, answer, open_model


def sample(
    model: Path,
    /,
    *,
    n: Annotated[Positive, Parameter(name=["-n", "--number"])] = 1000,
    out: Path,
    seed: Seed = 0,
    json: Flag = False,
) -> None:
    """Draw samples with the columns and units of the training table.

    Parameters
    ----------
    model
        A run folder, or the model inside it.
    n
        Number of samples.
    out
        File to write: .csv, .csv.gz, .npy, .npz or .parquet.
    seed
        The same seed gives the same samples.
    json
        Print one JSON object on standard output.
    """
    flow, recipe = open_model(model)
    values = recipe.restore(flow.sample(n, seed=seed).double().numpy())
    write_table(out, values, recipe.columns)
    answer({"samples": n, "out": str(out), "seed": seed}, json, f"wrote {n} samples to {out}")


def score(model: Path, file: Path, /, *, out: Path | None = None, json: Flag = False) -> None:
    """Log-density of each row of a table, in nats and in the table's units.

    Parameters
    ----------
    model
        A run folder, or the model inside it.
    file
        Table with the columns of the training table.
    out
        File to write, with one column log_prob; only the mean is shown without it.
    json
        Print one JSON object on standard output.
    """
    flow, recipe = open_model(model)
    table = recipe.apply(read_table(file))
    with torch.no_grad():
        log_prob = flow.double().log_prob(torch.from_numpy(np.array(table.values))).numpy()
    if out is not None:
        write_table(out, log_prob[:, None], ("log_prob",))
    mean = float(log_prob.mean())
    outside = int(np.isneginf(log_prob).sum())
    text = f"mean log-density {mean:.6g} nats over {len(log_prob)} rows"
    if outside:
        text += f"; {outside} rows lie outside the support"
    content = {
        "rows": len(log_prob),
        "mean_log_prob": mean if math.isfinite(mean) else None,
        "outside": outside,
    }
    answer(content | ({"out": str(out)} if out else {}), json, text)


def check(model: Path, file: Path, /, *, seed: Seed = 0, json: Flag = False) -> int:
    """Can the model be trusted on the rows of a table? Exit code 1 where it can't.

    Parameters
    ----------
    model
        A run folder, or the model inside it.
    file
        Table with the columns of the training table.
    seed
        Of the importance sample that integrates the density.
    json
        Print one JSON object on standard output.
    """
    flow, recipe = open_model(model)
    table = recipe.apply(read_table(file))
    found = flow.double().check(torch.from_numpy(np.array(table.values[:10_000])), seed=seed)
    answer(found.to_dict(), json, found.verdict)
    return 0 if found.passed else 1


def report(run: Path, /) -> None:
    """Write report.html of a run again.

    Parameters
    ----------
    run
        A run folder.
    """
    write_density_report(run)
    print(f"wrote {run / 'report.html'}")
