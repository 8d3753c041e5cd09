"""`pathline sample`, `score`, `check` and `report`: what a trained model is for."""

import math
import warnings
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
from cyclopts import Parameter
from torch import Tensor

from ..classifier_report import KIND as CLASSIFIER
from ..classifier_report import write_classifier_report
from ..control_report import KIND, write_control_report
from ..data import Recipe, read_table, write_table
from ..dynamics_report import KIND as DYNAMICS
from ..dynamics_report import write_dynamics_report
from ..errors import ArgumentError, DataWarning
from ..flows import TransportMap
from ..games_report import KIND as GAME
from ..games_report import write_games_report
from ..models import POLICIES, load
from ..networks import ContinuousNet, TrajectoryNet
from ..posterior.outliers import find_outliers
from ..posterior_report import calibrate_flow, record_check, write_posterior_report
from ..report import write_density_report
from ..train.files import has_report, read_json, read_model, write_json
from .classifier import check_classifier, score_classifier
from .dynamics import check_dynamics, score_dynamics
from .options import Flag, Positive, Seed, answer, open_conditional, open_model

WARNED = 3  # observations
WRITERS = {  # of reports, but those of densities
    "posterior": write_posterior_report, KIND: write_control_report, GAME: write_games_report,
    DYNAMICS: write_dynamics_report, CLASSIFIER: write_classifier_report,
}  # fmt: skip
SERIES, NET = TrajectoryNet.__name__, ContinuousNet.__name__


def sample(
    model: Path,
    /,
    *,
    n: Annotated[Positive, Parameter(name=["-n", "--number"])] = 1000,
    observe: Path | None = None,
    out: Path,
    seed: Seed = 0,
    json: Flag = False,
) -> None:
    """Draw samples with the columns and units of the training table.

    Given observations, those of the posterior of each.

    Parameters
    ----------
    model
        A run folder, or the model inside it.
    n
        Number of samples; for each observation.
    observe
        Observations that a conditional model needs, one in each row: a table with the columns of
        the data, in any order, or without names by position. Several get a column observation.
    out
        File to write: .csv, .csv.gz, .npy, .npz or .parquet.
    seed
        The same seed gives the same samples.
    json
        Print one JSON object on standard output.
    """
    flow, recipe = _open_density(model, "sample")
    if flow.context_dim:
        return _sample_posterior(model, flow, recipe, n, observe, out, seed, json)
    if observe is not None:
        raise ArgumentError(f"--observe is for conditional models; {model} has no context")
    values = recipe.restore(flow.sample(n, seed=seed).double().numpy())
    write_table(out, values, recipe.columns)
    answer({"samples": n, "out": str(out), "seed": seed}, json, f"wrote {n} samples to {out}")


def _sample_posterior(
    model: Path,
    flow: TransportMap,
    recipe: Recipe,
    n: int,
    observe: Path | None,
    out: Path,
    seed: int,
    json: bool,
) -> None:
    pairs = open_conditional(model, flow)
    if observe is None:
        raise ArgumentError(
            f"{model} is a conditional model; give its {flow.context_dim} columns of data with "
            "--observe FILE"
        )
    observed = pairs.observations(observe)
    outside = find_outliers(model, observed, pairs.data_names)
    for i, text in list(outside.items())[:WARNED]:
        which = f", row {i + 1}" if len(observed) > 1 else ""
        warnings.warn(f"{observe}{which}: {text}", DataWarning, stacklevel=2)
    if len(outside) > WARNED:
        rest = f"{len(outside) - WARNED} more observations lie outside the simulations"
        warnings.warn(f"{observe}: {rest}", DataWarning, stacklevel=2)
    count = len(observed)
    # The first as if it were alone.
    seeds = [seed, *np.random.SeedSequence(seed).generate_state(count - 1).tolist()]
    context = torch.from_numpy(np.repeat(observed, n, axis=0))
    with torch.no_grad():
        z = torch.cat([flow.reference_sample(n, seed=own) for own in seeds])
        values = recipe.restore(flow.from_reference(z, context).double().numpy())
    columns = recipe.columns
    if count > 1:
        values = np.column_stack([np.repeat(np.arange(1, count + 1), n), values])
        columns = (_free("observation", columns), *columns)
    write_table(out, values, columns)
    content = {
        "samples": n,
        "observations": count,
        "outside": {str(i + 1): text for i, text in outside.items()},
        "out": str(out),
        "seed": seed,
    }
    each = f" for each of {count} observations" if count > 1 else ""
    answer(content, json, f"wrote {n} samples{each} to {out}")


def _free(name: str, taken: tuple[str, ...]) -> str:
    return _free(f"{name}_", taken) if name in taken else name


def score(model: Path, file: Path, /, *, out: Path | None = None, json: Flag = False) -> None:
    """Log-density of each row of a table, in nats and in the table's units.

    For a conditional model, that of the parameters given the data in the same row; for a model of
    time series, that of each observation given those before it; for a classifier, the
    log-probability of the class in the same row.

    Parameters
    ----------
    model
        A run folder, or the model inside it.
    file
        Table with the columns of the training table, or pairs as those it was trained on.
    out
        File to write, with one column log_prob; only the mean is shown without it.
    json
        Print one JSON object on standard output.
    """
    if _kind(model) == SERIES:
        return score_dynamics(model, file, out, json)
    if _kind(model) == NET:
        return score_classifier(model, file, out, json)
    flow, recipe = _open_density(model, "score")
    rows = _rows(model, flow, recipe, file)
    with torch.no_grad():
        log_prob = flow.double().log_prob(*rows).numpy()
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


def check(model: Path, file: Path | None = None, /, *, seed: Seed = 0, json: Flag = False) -> int:
    """Can the model be trusted on the rows of a table? Exit code 1 where it can't.

    A conditional model is also tested for calibration: ranks, expected coverage and TARP of up to
    1000 pairs that were not used in training. Of a model of time series, forecasts and their
    intervals are compared with what was observed; of a classifier, accuracy and stability are
    tested. A policy or an equilibrium is tested on starts of its
    own problem, without a table. Pictures and report in a run folder are renewed.

    Parameters
    ----------
    model
        A run folder, or the model inside it.
    file
        Table with the columns of the training table, or pairs as those it was trained on; none
        for a policy or an equilibrium.
    seed
        Of everything random.
    json
        Print one JSON object on standard output.
    """
    if _is_policy(model):
        return _check_policy(model, file, seed, json)
    if _kind(model) == SERIES:
        return check_dynamics(model, file, json)
    if _kind(model) == NET:
        return check_classifier(model, file, seed, json)
    if file is None:
        raise ArgumentError(f"check needs a FILE with rows to judge {model} on")
    flow, recipe = open_model(model)
    rows = [part[:10_000] for part in _rows(model, flow, recipe, file)]
    if flow.context_dim:
        return _check_posterior(model, flow, file, rows, seed, json)
    found = flow.double().check(*rows, seed=seed)
    answer(found.to_dict(), json, found.verdict)
    return 0 if found.passed else 1


def _kind(model: Path) -> str:
    return str(read_model(model)[0]["kind"])


def _is_policy(model: Path) -> bool:
    return _kind(model) in {kind.__name__ for kind in POLICIES}


def _open_density(model: Path, command: str) -> tuple[TransportMap, Recipe]:
    if _is_policy(model):
        raise ArgumentError(
            f"{command} is for densities; {model} holds a policy, which `pathline check` judges "
            "and `pathline.load` opens in Python"
        )
    others = {SERIES: ("model of time series", "forecast"), NET: ("classifier", "predict")}
    if _kind(model) in others:
        what, use = others[_kind(model)]
        raise ArgumentError(
            f"{command} is for densities; {model} holds a {what}, for `pathline {use}`, `score` "
            "and `check`"
        )
    return open_model(model)


def _check_policy(model: Path, file: Path | None, seed: int, json: bool) -> int:
    if file is not None:
        raise ArgumentError(f"{model} holds a policy, which is checked without a table, got {file}")
    found = load(model).check(seed=seed)
    if has_report(model):
        metrics = read_json(model / "metrics.json")
        write_json(model / "metrics.json", metrics | {"check": found.to_dict()})
        _write_report(model)
    answer(found.to_dict(), json, found.verdict)
    return 0 if found.passed else 1


def _check_posterior(
    model: Path, flow: TransportMap, file: Path, rows: list[Tensor], seed: int, json: bool
) -> int:
    theta, context = rows
    names = open_conditional(model, flow).names
    calibration = calibrate_flow(flow, theta, context, names, seed=seed)
    found = flow.double().check(theta, context, seed=seed)
    if has_report(model):
        record_check(model, file, found, calibration)
    passed = found.passed and calibration.passed
    verdict = f"{calibration.verdict}\n{found.verdict}"
    content = {**found.to_dict(), "calibration": calibration.to_dict()}
    answer(content | {"passed": passed, "verdict": verdict}, json, verdict)
    return 0 if passed else 1


def _rows(model: Path, flow: TransportMap, recipe: Recipe, file: Path) -> tuple[Tensor, ...]:
    """The rows of a file, or its parameters and data where the model is conditional."""
    if flow.context_dim:
        return tuple(map(torch.from_numpy, open_conditional(model, flow).pairs(file)))
    table = recipe.apply(read_table(file))
    return (torch.from_numpy(np.array(table.values)),)


def report(run: Path, /) -> None:
    """Write report.html of a run again.

    Parameters
    ----------
    run
        A run folder.
    """
    _write_report(run)
    print(f"wrote {run / 'report.html'}")


def _write_report(run: Path) -> None:
    kind = read_json(run / "metrics.json").get("report", {}).get("kind")
    WRITERS.get(kind, write_density_report)(run)
