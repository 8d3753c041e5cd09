"""Figures of time series and their forecasts, from arrays."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from matplotlib.figure import Figure
from numpy.typing import ArrayLike

from .errors import ShapeError
from .plots import DATA, FAINT, GREY, INK, SAMPLES, _escape, _short, _ticks

MOST_ROWS, MOST_COLUMNS = 4, 3
NAME = 24  # letters


class Panel(NamedTuple):
    """One column of one series, and its forecast."""

    name: str
    t: ArrayLike  # (rows,), observed
    y: ArrayLike  # (rows,), NaN where missing
    at: ArrayLike  # (times,), of the forecast
    mean: ArrayLike  # (times,)
    lower: ArrayLike
    upper: ArrayLike
    begins: float  # where the forecast does


def forecasts(panels: Sequence[Sequence[Panel]], xlabel: str, level: float) -> Figure:
    """Observations, and what was forecast from one of them on, with intervals.

    Args:
        panels: rows of panels, at most four, of at most three each.
        xlabel: the name of time.
        level: of the intervals.

    Returns:
        A figure with an axes for each panel.
    """
    rows, columns = len(panels), max((len(row) for row in panels), default=0)
    if not 0 < rows <= MOST_ROWS or not 0 < columns <= MOST_COLUMNS:
        raise ShapeError(
            f"`panels` must be up to {MOST_ROWS} rows of up to {MOST_COLUMNS}, got {rows} of "
            f"{columns}"
        )
    figure = Figure(figsize=(3.6 * columns + 0.6, 1.9 * rows + 0.7), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False)
    for line, row in zip(axes, panels, strict=True):
        for ax in line[len(row) :]:
            ax.set_axis_off()
        for ax, panel in zip(line, row, strict=False):
            at = np.asarray(panel.at, dtype=float)
            ax.fill_between(
                at, panel.lower, panel.upper, color=SAMPLES, alpha=0.25, lw=0,
                label=f"interval of {level:.0%}",
            )  # fmt: skip
            ax.plot(at, panel.mean, color=SAMPLES, lw=1.3, label="forecast")
            ax.plot(panel.t, panel.y, ".", ms=3, color=DATA, label="observed")
            ax.axvline(panel.begins, color=GREY, lw=0.8, ls=":")
            ax.set_title(_escape(_short(panel.name, NAME)), fontsize=8, color=INK)
            _ticks(ax, size=8, count=4)
            ax.grid(color=FAINT, lw=0.5)
            ax.set_axisbelow(True)
    for ax in axes[-1]:
        ax.set_xlabel(_escape(xlabel), fontsize=9, color=INK)
    handles, labels = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=3, fontsize=8, frameon=False)
    figure.set_label("Observations of series, and forecasts with intervals")
    return figure
