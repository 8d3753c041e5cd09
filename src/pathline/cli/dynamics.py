"""`pathline fit dynamics` and `forecast`: neural ODEs of time series in tables."""

from dataclasses import dataclass
from hashlib import sha256
from math import floor, log10
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from cyclopts import Parameter, validators

from ..data import Series, Table, column_index, read_labelled, read_table, write_labelled
from ..data.tables import write_table
from ..dynamics_report import finish_dynamics, record_check
from ..errors import ArgumentError, DataError
from ..models import load, metadata
from ..networks import TrajectoryNet, check_trajectories, fit_trajectories
from ..networks.forecasts import keep_series, kept_series, log_densities, quantile, solutions
from ..train.files import has_report, read_json
from .options import Columns, Flag, Positive, RunOptions, Seconds, answer, names

Share = Annotated[float, Parameter(validator=validators.Number(gt=0, lt=1))]
Count = Annotated[int, Parameter(validator=validators.Number(gte=0))]
DIGITS = 6  # of times, after the first one of the gap between them; more would be rounding errors


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class NetOptions:
    """The network of `fit dynamics`."""

    window: Positive = 10
    "Observations after its first that a window of training has; more for slow or noisy series."
    extra: Count = 0
    "Components of the state that are not observed."
    history: Count = 0
    "Observations before the first of a window that choose its first state."
    width: Positive = 64
    "Neurons of each layer of the networks."
    depth: Positive = 2
    "Hidden layers of the networks."
    members: Positive = 5
    "Networks of the ensemble."
    steps: Positive | None = None
    "Runge-Kutta steps of a usual window; as many as it has observations by default."


def dynamics(
    file: Path,
    /,
    *,
    time: str,
    run: RunOptions,
    group: str | None = None,
    drop: Columns = None,
    period: list[float] | None = None,
    net: NetOptions | None = None,
    batch_size: Positive = 64,
    learning_rate: Seconds | None = None,
    patience: Positive = 15,
) -> None:
    """Learn an ordinary differential equation from time series, to forecast them.

    Series may be irregular, of different lengths, and have missing values.

    Parameters
    ----------
    file
        The table: .csv, .csv.gz, .npy, .npz or .parquet; one row for each time of a series.
    time
        Column of the times.
    run
        What every command that trains takes.
    group
        Column that says which series a row belongs to, numbers or text; one series by default. If
        all are numbers, 007 and 7 are the same.
    drop
        Columns to leave out.
    period
        A known period of the motion, such as a day, in the units of time; may be repeated.
    net
        The network.
    batch_size
        Windows of a training step.
    learning_rate
        The first of a cosine schedule; 0.01 by default.
    patience
        Stop after this many validations without improvement, of about fifty.
    """
    table, ids = _read(file, group, "--group")
    series = _series(table.drop(names(drop, table.columns)), ids, time)
    options = vars(net or NetOptions())
    found = TrajectoryNet(
        len(series.columns), periods=tuple(period or ()), seed=run.seed, **options
    )
    digest = sha256(series.t.tobytes() + series.y.tobytes()).hexdigest()
    _check_same_series(run, digest)
    kept: dict[str, Any] = {
        "file": str(file),
        "time": time,
        "group": group,
        "columns": list(series.columns),
    }
    kept |= {"series_sha256": digest, "seed": run.seed}
    try:
        fit_trajectories(
            found,
            series,
            batch_size=batch_size,
            learning_rate=learning_rate,
            patience=patience,
            metadata=kept,
            **run.training(),
        )
    finally:  # an interrupted run has a model, too
        if (run.out / "model" / "model.json").exists():
            keep_series(run.out / "model", series)
    metrics = finish_dynamics(run.out, title=f"Dynamics of {file.name}", time=time, seed=run.seed)
    text = (
        f"{metrics['check']['verdict']}\n"
        f"wrote {run.out}: model, report.html, metrics.json, log.jsonl"
    )
    answer(metrics, run.json, text)


def forecast(
    model: Path,
    /,
    *,
    n: Annotated[Positive, Parameter(name=["-n", "--number"])] = 20,
    at: Path | None = None,
    observe: Path | None = None,
    level: Share = 0.9,
    out: Path,
    json: Flag = False,
) -> None:
    """Forecast time series from their last observations, with intervals.

    Parameters
    ----------
    model
        A run folder of `fit dynamics`, or the model inside it.
    n
        Number of times after the last of each series, as far apart as its observations usually are.
    at
        Table of the times, and of the groups they belong to, in place of these.
    observe
        Table of other series to forecast; by default those that the model was fitted to.
    level
        Share of observations that should lie in the intervals.
    out
        File to write: .csv, .csv.gz, .npy, .npz or .parquet. It has the columns of the group, the
        time, and each column with its name, name_lower and name_upper.
    json
        Print one JSON object on standard output.
    """
    net, kept = _open(model)
    series = kept_series(model) if observe is None else _observed(observe, kept, fewest=1)
    if at is None:
        ends = series.t[series.starts[1:] - 1]
        gap = float(net.unit) / net.window
        digits = max(0, DIGITS - floor(log10(gap)))
        after = (ends[:, None] + gap * np.arange(1, n + 1)).ravel()
        times = np.array([round(t, digits) for t in after.tolist()])
        ids = np.repeat(series.ids, n)
    else:
        table, labels = _read(at, kept["group"])
        times = table.fitted([kept["time"]]).values[:, 0]
        ids = np.repeat(series.ids, len(times)) if labels is None else labels
    mean, sd = solutions(net, series, times, ids if kept["group"] else None, last=True)
    reach = quantile(level) * sd
    values = np.stack([mean, mean - reach, mean + reach], 2).reshape(len(mean), -1)
    columns = [f"{name}{end}" for name in series.columns for end in ("", "_lower", "_upper")]
    rows, head = np.column_stack([times, values]), (kept["time"], *columns)
    if kept["group"]:
        write_labelled(out, kept["group"], np.asarray(ids), rows, head)
    else:
        write_table(out, rows, head)
    content = {"rows": len(rows), "series": len(series), "level": level, "out": str(out)}
    answer(content, json, f"wrote {len(rows)} forecasts to {out}")


def check_dynamics(model: Path, file: Path | None, as_json: bool) -> int:
    """`pathline check` of a model of time series."""
    net, kept = _open(model)
    if file is None:
        raise ArgumentError(f"check needs a FILE with series to judge {model} on")
    found = check_trajectories(net, _observed(file, kept))
    if has_report(model):
        record_check(model, file, found.to_dict())
    answer(found.to_dict(), as_json, found.verdict)
    return 0 if found.passed else 1


def score_dynamics(model: Path, file: Path, out: Path | None, as_json: bool) -> None:
    """`pathline score` of a model of time series: each row given the rows before it."""
    net, kept = _open(model)
    table, ids = _read(file, kept["group"])
    series = _series(table.fitted((kept["time"], *kept["columns"])), ids, kept["time"])
    log_prob = log_densities(net, series)
    if out is not None:
        ids = np.repeat(series.ids, np.diff(series.starts))
        head = (kept["time"], "log_prob")
        rows = np.column_stack([series.t, log_prob])
        if kept["group"]:
            write_labelled(out, kept["group"], ids, rows, head)
        else:
            write_table(out, rows, head)
    count, mean = int(np.isfinite(log_prob).sum()), float(np.nanmean(log_prob))
    content = {"rows": count, "mean_log_prob": mean} | ({"out": str(out)} if out else {})
    answer(content, as_json, f"mean log-density {mean:.6g} nats over {count} rows, each given the "
           "one before it")  # fmt: skip


def _open(model: Path) -> tuple[TrajectoryNet, dict[str, Any]]:
    """The model in double precision, and the names of its columns."""
    net = load(model)
    if not isinstance(net, TrajectoryNet):
        raise ArgumentError(f"{model} holds no model of time series, but a {type(net).__name__}")
    kept = metadata(model)
    if "columns" not in kept:
        plain = {"time": "t", "group": None, "columns": [f"x{i}" for i in range(net.dim)]}
        kept = kept | plain
    return net.double(), kept


def _read(
    file: Path, group: str | None, flag: str | None = None
) -> tuple[Table, np.ndarray | None]:
    """A table, and its column of groups; `flag` named it if not the model does."""
    if group is None:
        return read_table(file), None
    return read_labelled(file, group, flag or str(file))


def _series(table: Table, ids: np.ndarray | None, time: str, fewest: int = 2) -> Series:
    t = table.values[:, column_index(table.columns, time, "--time")]
    rest = table.drop([time])
    if not rest.columns:
        raise DataError(f"{table.name} has no columns of values beside those of time and group")
    try:
        return Series.of(t, rest.values, ids, columns=rest.columns, fewest=fewest)
    except DataError as error:
        raise DataError(f"{table.name}: {error}") from None


def _observed(file: Path, kept: dict[str, Any], fewest: int = 2) -> Series:
    table, ids = _read(file, kept["group"])
    return _series(table.fitted((kept["time"], *kept["columns"])), ids, kept["time"], fewest)


def _check_same_series(run: RunOptions, digest: str) -> None:
    """Raise if a run that goes on was started with other series."""
    config = run.out / "config.json"
    if run.resume and config.exists():
        before = read_json(config).get("metadata", {}).get("series_sha256")
        if before != digest:
            raise ArgumentError(
                f"the run in {run.out} was started with other series; --overwrite starts again"
            )
