"""Figures of networks, from arrays."""

from collections.abc import Mapping
from itertools import cycle
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from numpy.typing import ArrayLike

from .errors import ShapeError
from .plots import DATA, FAINT, GREY, INK, REFERENCE, SAMPLES, _escape, _ticks

COLOURS = (DATA, SAMPLES, REFERENCE, GREY)
CLASSES = (DATA, SAMPLES, REFERENCE, "#CC79A7", GREY)
MARGINS = (1.0, 3.0, 10.0)  # of the scores, drawn as lines
Line = tuple[ArrayLike, ArrayLike]


def stability(
    gains: Mapping[str, Line],
    spectra: Mapping[str, ArrayLike],
    energies: Mapping[str, Line],
    attacks: Mapping[str, Line],
) -> Figure:
    """What tells whether a network is stable, in up to four panels; empty ones are left out.

    Args:
        gains: depth and growth of perturbations, each (n,), by name; on a logarithmic scale.
        spectra: complex eigenvalues, (n,), by name.
        energies: times and energies, each (n,), by name; drawn relative to the first.
        attacks: sizes of attacks and the accuracy under them, each (n,), by name.

    Returns:
        A figure with one axes for each of them that is not empty.
    """
    panels: list[Any] = [
        (_gains, gains), (_spectra, spectra), (_energies, energies), (_attacks, attacks),
    ]  # fmt: skip
    panels = [(draw, content) for draw, content in panels if content]
    if not panels:
        raise ShapeError("there is nothing to draw: all four are empty")
    figure = Figure(figsize=(3.4 * len(panels), 3.2), layout="constrained")
    for ax, (draw, content) in zip(
        np.atleast_1d(figure.subplots(1, len(panels))), panels, strict=True
    ):
        draw(ax, content)
        ax.grid(color=FAINT, lw=0.5)
        ax.set_axisbelow(True)
        ax.legend(fontsize=7, frameon=False)
    figure.set_label("Stability: growth along depth, spectrum, energy, accuracy under attacks")
    return figure


def _gains(ax: Axes, lines: Mapping[str, Line]) -> None:
    _draw(ax, lines)
    ax.set_yscale("log")
    _ticks(ax, size=8, count=5, logarithmic=True)
    _labels(ax, "steps", "growth of perturbations")


def _spectra(ax: Axes, spectra: Mapping[str, ArrayLike]) -> None:
    widest = 0.0
    for (name, values), colour in zip(spectra.items(), cycle(COLOURS), strict=False):
        points = np.asarray(values)
        ax.plot(points.real, points.imag, ".", ms=4, color=colour, label=_escape(name))
        widest = max(widest, float(np.abs(points).max(initial=0.0)))
    ax.axvline(0, color=INK, lw=0.7)
    low, high = ax.get_xlim()  # round-off is no width
    ax.set_xlim(min(low, -0.2 * widest), max(high, 0.2 * widest))
    _ticks(ax, size=8, count=5)
    _labels(ax, "real part", "imaginary part")


def _energies(ax: Axes, lines: Mapping[str, Line]) -> None:
    relative = {}
    for name, (t, energy) in lines.items():
        values = np.asarray(energy, dtype=float)
        relative[name] = (t, values / values[0] if values[0] else values)
    _draw(ax, relative)
    _ticks(ax, size=8, count=5)
    _labels(ax, "time", "energy, relative to the first")


def _attacks(ax: Axes, lines: Mapping[str, Line]) -> None:
    _draw(ax, lines, marker="o")
    ax.set_ylim(0, 1.02)
    _ticks(ax, size=8, count=5)
    _labels(ax, "largest change of an entry", "accuracy")


def _draw(ax: Axes, lines: Mapping[str, Line], marker: str | None = None) -> None:
    styles = zip(cycle(COLOURS), cycle(("-", "--")), strict=False)
    for (name, (x, y)), (colour, dash) in zip(lines.items(), styles, strict=False):
        xs, ys = np.asarray(x, dtype=float), np.asarray(y, dtype=float)
        if xs.ndim != 1 or xs.shape != ys.shape:
            raise ShapeError(f"line {name!r} must be two arrays (n,), got {xs.shape}, {ys.shape}")
        ax.plot(xs, ys, dash, color=colour, lw=1.3, marker=marker, ms=3, label=_escape(name))


def _labels(ax: Axes, x: str, y: str) -> None:
    ax.set_xlabel(x, fontsize=9, color=INK)
    ax.set_ylabel(y, fontsize=9, color=INK)


def regions(
    x: ArrayLike, y: ArrayLike, maps: Mapping[str, ArrayLike], points: ArrayLike, labels: ArrayLike
) -> Figure:
    """Which class classifiers see where in the plane, with labelled points.

    Args:
        x, y: coordinates, (nx,) and (ny,).
        maps: classes (ny, nx), whole numbers from 0, by name of the classifier.
        points: (n, 2).
        labels: their classes, (n,).

    Returns:
        A figure with one axes for each classifier.
    """
    xs, ys = np.asarray(x, dtype=float), np.asarray(y, dtype=float)
    z, classes = np.asarray(points, dtype=float), np.asarray(labels)
    if z.ndim != 2 or z.shape[1] != 2 or classes.shape != (len(z),):
        raise ShapeError(
            f"`points` must be (n, 2) with labels (n,), got {z.shape}, {classes.shape}"
        )
    grids = {name: np.asarray(grid) for name, grid in maps.items()}
    for name, grid in grids.items():
        if grid.shape != (len(ys), len(xs)):
            raise ShapeError(f"`maps[{name!r}]` must be ({len(ys)}, {len(xs)}), got {grid.shape}")
    colours = ListedColormap(CLASSES)
    figure = Figure(figsize=(3.2 * len(grids), 3.2), layout="constrained")
    for ax, (name, grid) in zip(
        np.atleast_1d(figure.subplots(1, len(grids))), grids.items(), strict=True
    ):
        shared: Any = {"cmap": colours, "vmin": -0.5, "vmax": len(CLASSES) - 0.5}
        ax.pcolormesh(xs, ys, grid, alpha=0.35, linewidth=0, rasterized=True, **shared)
        ax.scatter(z[:, 0], z[:, 1], c=classes, s=4, linewidths=0, **shared)
        ax.set_title(_escape(name), fontsize=9, color=INK, loc="left")
        _ticks(ax, size=8, count=5)
        ax.set_aspect("equal")
    figure.set_label(f"Classes in the plane as seen by {', '.join(grids)}")
    return figure


def advected(
    times: ArrayLike,
    features: ArrayLike,
    labels: ArrayLike,
    x: ArrayLike,
    y: ArrayLike,
    scores: ArrayLike,
    *,
    upto: int | None = None,
) -> Figure:
    """Features that flow in the plane, and which class the carried classifier sees where.

    Args:
        times: (n,).
        features: (n, points, 2).
        labels: of the points, (points,), whole numbers from 0.
        x, y: coordinates, (nx,) and (ny,).
        scores: (n, ny, nx, classes).
        upto: the index of the time; the last by default.

    Returns:
        A figure with one axes: classes, level sets of the difference between the two best, points.
    """
    t, z, u = np.asarray(times), np.asarray(features), np.asarray(scores)
    xs, ys, classes = np.asarray(x), np.asarray(y), np.asarray(labels)
    if z.ndim != 3 or z.shape[::2] != (len(t), 2) or classes.shape != (z.shape[1],):
        raise ShapeError(
            f"`features` must be ({len(t)}, points, 2) with labels (points,), got {z.shape}, "
            f"{classes.shape}"
        )
    if u.ndim != 4 or u.shape[:3] != (len(t), len(ys), len(xs)) or u.shape[3] < 2:
        raise ShapeError(
            f"`scores` must be ({len(t)}, {len(ys)}, {len(xs)}, classes), got {u.shape}"
        )
    last = len(t) - 1 if upto is None else upto
    levels: tuple[float, ...] = MARGINS
    if u.shape[3] == 2:  # signed, so that there is no kink where the classes meet
        margins = u[last, ..., 1] - u[last, ..., 0]
        levels = (*(-level for level in reversed(MARGINS)), *MARGINS)
    else:
        best = np.sort(u[last], -1)
        margins = best[..., -1] - best[..., -2]
    figure = Figure(figsize=(4.6, 4.6), layout="constrained")
    ax = figure.subplots()
    shared: Any = {
        "cmap": ListedColormap(CLASSES), "vmin": -0.5, "vmax": len(CLASSES) - 0.5
    }  # fmt: skip
    ax.pcolormesh(xs, ys, u[last].argmax(-1), alpha=0.3, linewidth=0, rasterized=True, **shared)
    lines: Any = {"colors": INK, "linewidths": 0.5, "linestyles": "solid", "alpha": 0.6}
    ax.contour(xs, ys, margins, levels=levels, **lines)
    ax.scatter(z[last, :, 0], z[last, :, 1], c=classes, s=5, linewidths=0, zorder=3, **shared)
    ax.set_aspect("equal")
    _ticks(ax, size=8, count=5)
    ax.set_title(f"time {t[last]:.2f}", fontsize=9, color=INK, loc="left", family="monospace")
    figure.set_label(f"Features and the carried classifier at time {t[last]:.2f}")
    return figure
