"""The report of a neural ODE of time series: its forecasts, their errors and their intervals."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from .control_report import read_run
from .data.series import Series
from .models import load
from .networks import TrajectoryNet, check_trajectories, windows
from .networks.forecasts import kept_series, quantile
from .networks.trajectory_check import LEVEL
from .networks.trajectory_fit import FAR
from .report import Section, configuration_section, write_report
from .train.files import read_json, write_json

KIND = "dynamics"
SERIES, COLUMNS = 4, 3  # drawn
POINTS = 300  # of a curve
BEFORE = 3.0  # times the forecast that is drawn of what was before it
EVENTS = "Adjustments during training"


def finish_dynamics(run: Path, *, title: str, time: str, seed: int) -> dict[str, Any]:
    """Judge the model of a finished run on the windows that were held out, and add what is found
    to its folder: check in metrics.json, and report.html.

    Args:
        run: the folder, with the series kept in it.
        title: of the report.
        time: name of the column of times.
        seed: by which windows were held out.

    Returns:
        The metrics.
    """
    net, series = load(run), kept_series(run)
    check = check_trajectories(net, series, windows(series, seed)[1])
    metrics = read_json(run / "metrics.json")
    metrics |= {
        "check": check.to_dict(),
        "checked": "held-out windows",
        "report": {"kind": KIND, "title": title, "time": time, "seed": seed},
    }
    write_json(run / "metrics.json", metrics)
    write_dynamics_report(run)
    return metrics


def write_dynamics_report(run: Path) -> None:
    """Write report.html from what is in the folder of a run.

    Raises:
        ModelError: the folder holds no finished run of `fit dynamics`.
    """
    metrics, history = read_run(run, KIND, "model of time series")
    head = metrics["report"]
    net, series = load(run).double(), kept_series(run)
    sections = [
        _summary(net, series, metrics),
        _pictures(net, series, head),
        _errors(metrics["check"], head["time"]),
        _columns(metrics["check"]),
        _training(history, metrics),
        configuration_section(read_json(run / "config.json")),
    ]
    write_report(run / "report.html", head["title"], sections)


def record_check(run: Path, file: Path, check: Mapping[str, Any]) -> None:
    """Put what was found on other series into the metrics of a run, and renew its report."""
    found = read_json(run / "metrics.json") | {"check": dict(check), "checked": str(file)}
    write_json(run / "metrics.json", found)
    write_dynamics_report(run)


def _summary(net: TrajectoryNet, series: Series, metrics: Mapping[str, Any]) -> Section:
    check, seconds = metrics["check"], metrics.get("seconds")
    verdict = check["verdict"]
    rows: list[tuple[str, object]] = [
        ("Checked on", metrics["checked"]),
        ("Windows, and values in them", f"{check['windows']:,}, {check['observations']:,}"),
        ("Longest lead", check["longest_lead"]),
        ("Error, standard deviations", check["rmse"]),
        ("The same of the last value", check["persistence"]),
        (f"Observations in intervals of {LEVEL:.0%}", f"{check['coverage']:.1%}"),
        ("Mean log-density of a value, nats", check["log_prob"]),
        ("Series, and their observations", f"{len(series):,}, {len(series.t):,}"),
        ("Members of the ensemble", net.members),
        ("Components of the state, observed and not", f"{net.dim}, {net.extra}"),
        ("Training steps", metrics.get("steps")),
        ("Training time", None if seconds is None else f"{seconds:,.1f} s"),
    ]
    table = [("Quantity", "Value"), *(row for row in rows if row[1] is not None)]
    return Section("Summary", f"{verdict[:1].upper()}{verdict[1:]}.", table=table)


def _pictures(net: TrajectoryNet, series: Series, head: Mapping[str, Any]) -> Section:
    """From where windows were held out to the end, and as far again beyond it."""
    from . import dynamics_plots

    held = windows(series, head["seed"])[1].astype(int)
    first = {int(last): int(start) for start, last in held[::-1]}  # the earliest start of a series
    panels = []
    for last, start in sorted(first.items())[:SERIES]:
        which = int(np.searchsorted(series.starts, start, "right") - 1)
        part = slice(int(series.starts[which]), int(series.starts[which + 1]))
        end = series.t[last] + (series.t[last] - series.t[start])
        far = series.t[start] + FAR * float(net.unit)
        at = np.linspace(series.t[start], min(end, max(far, series.t[last])), POINTS)
        lead = torch.tensor(at - at[0])[None]
        mean, sd = net.forecast(net.observe(series), torch.tensor([start]), lead)
        low = series.t[start] - BEFORE * (at[-1] - at[0])
        shown = slice(max(part.start, int(np.searchsorted(series.t[part], low)) + part.start), None)
        rows = slice(shown.start, part.stop)
        z, name = quantile(LEVEL), f"{series.ids[which]}: " if len(series) > 1 else ""
        panels.append(
            [
                dynamics_plots.Panel(
                    name + column,
                    series.t[rows],
                    series.y[rows, i],
                    at,
                    mean[0, :, i].numpy(),
                    (mean - z * sd)[0, :, i].numpy(),
                    (mean + z * sd)[0, :, i].numpy(),
                    float(series.t[start]),
                )
                for i, column in enumerate(series.columns[:COLUMNS])
            ]
        )
    told = (
        "Forecasts from the dotted line on; the observations after it were held out of training. "
        "They go on beyond the last one."
    )
    return Section("Forecasts", told, figure=dynamics_plots.forecasts(panels, head["time"], LEVEL))


def _errors(check: Mapping[str, Any], time: str) -> Section:
    from . import plots

    leads = check["leads"]
    table: list[tuple[object, ...]] = [("Lead", "Error", "Of the last value", "Coverage")]
    table += [
        (lead, rmse, still, f"{share:.0%}")
        for lead, rmse, still, share in zip(
            leads,
            check["rmse_by_lead"],
            check["persistence_by_lead"],
            check["coverage_by_lead"],
            strict=True,
        )
    ]
    lines = {
        "forecast": (leads, check["rmse_by_lead"]),
        "last value": (leads, check["persistence_by_lead"]),
    }
    return Section(
        "Errors by lead",
        "Root mean squares over all columns, in their standard deviations, by the time ahead; and "
        f"the share of observations in the intervals of {LEVEL:.0%}.",
        table=table,
        figure=plots.curves(lines, f"{time} ahead", "error", "Errors by lead"),
    )


def _columns(check: Mapping[str, Any]) -> Section:
    table: list[tuple[object, ...]] = [("Column", "Error", "Of the last value", "Coverage")]
    for name, found in check["columns"].items():
        share = found["coverage"]
        shown = "-" if share is None else f"{share:.1%}"
        table.append((name, found["rmse"], found["persistence"], shown))
    return Section("Errors by column", "Root mean squares, in the units of the table.", table=table)


def _training(history: list[dict[str, float]], metrics: Mapping[str, Any]) -> Section:
    from . import plots

    early = metrics.get("stopped") == "early"
    told = (
        f"Training made {metrics.get('steps', 0):,} steps and "
        + ("stopped when validation no longer improved" if early else "used them all")
        + f"; the best model is that of step {metrics.get('best_step', 0):,}. The loss is the mean "
        "square of standardised errors."
    )
    figure = None
    if history:
        steps = [entry["step"] for entry in history]
        lines = {
            name: (steps, [entry.get(name) or np.nan for entry in history])
            for name in ("loss", "validation")
        }
        figure = plots.curves(lines, "training step", "loss", "Course of training", log_y=True)
    events = [(event,) for event in metrics.get("events", ())]
    table = [(EVENTS,), *events] if events else None
    return Section("Training", told, table=table, figure=figure)
