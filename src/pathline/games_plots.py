"""Figures of populations, from arrays."""

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection
from matplotlib.figure import Figure
from numpy.typing import ArrayLike

from .control_plots import Field, _plane
from .errors import ShapeError
from .plots import (
    DATA,
    DATA_SHADES,
    FAINT,
    GREY,
    INK,
    REFERENCE,
    SAMPLES,
    Plain,
    _escape,
    _ticks,
)

COLUMNS = 3  # of panels
TAIL = 6  # times that a particle's tail is long
LEVELS = 14  # of a value function
OBSTACLE = (0.1, 0.3, 0.6, 0.9)  # levels of its contours, over its top


def densities(
    x: ArrayLike,
    y: ArrayLike,
    panels: ArrayLike,
    names: Sequence[str],
    *,
    field: Field | None = None,
) -> Figure:
    """Densities in the plane, a panel for each; equal colours are equal densities.

    Args:
        x, y: (nx,) and (ny,), the axes of the grid.
        panels: densities, (panels, ny, nx).
        names: of the panels, such as times.
        field: x, y and a cost (ny, nx) that is drawn as contours, such as an obstacle.

    Returns:
        A figure with an axes for each panel and one for the scale of colours.
    """
    xs, ys, values = (np.asarray(part, dtype=float) for part in (x, y, panels))
    _demand(values, "panels", (len(names), len(ys), len(xs)))
    figure, axes = _panels(len(names), xs, ys)
    for ax, name, density in zip(axes, names, values, strict=True):
        image = ax.pcolormesh(
            xs, ys, density, cmap=DATA_SHADES, vmin=0, vmax=values.max() or 1.0, shading="gouraud"
        )
        _obstacle(ax, field)
        ax.set_title(name, fontsize=9, color=INK, pad=3)
    bar = figure.colorbar(image, ax=list(axes), aspect=30, pad=0.01)
    bar.set_label("density", fontsize=8, color=INK)
    bar.ax.yaxis.set_major_formatter(Plain())
    bar.ax.tick_params(labelsize=7, colors=GREY, labelcolor=INK)
    bar.outline.set_visible(False)
    figure.set_label(f"Densities over time: {', '.join(names)}")
    return figure


def values(
    x: ArrayLike,
    y: ArrayLike,
    panels: ArrayLike,
    names: Sequence[str],
    *,
    velocities: tuple[ArrayLike, ArrayLike] | None = None,
) -> Figure:
    """A value function in the plane, a panel for each time, with its own shades.

    Args:
        x, y: (nx,) and (ny,), the axes of the grid.
        panels: values, (panels, ny, nx).
        names: of the panels.
        velocities: points (n, 2) and velocities there (panels, n, 2), drawn as arrows.

    Returns:
        A figure with an axes for each panel and one for each scale of shades.
    """
    xs, ys, phi = (np.asarray(part, dtype=float) for part in (x, y, panels))
    _demand(phi, "panels", (len(names), len(ys), len(xs)))
    figure, axes = _panels(len(names), xs, ys, room=0.6)
    for i, (ax, name) in enumerate(zip(axes, names, strict=True)):
        shades = ax.contourf(xs, ys, phi[i], levels=LEVELS, cmap="Greys_r", alpha=0.7)
        ax.contour(xs, ys, phi[i], levels=shades.levels, colors=GREY, linewidths=0.5)
        if velocities is not None:
            at, arrows = (np.asarray(part, dtype=float) for part in velocities)
            ax.quiver(*at.T, *arrows[i].T, color=DATA, width=0.006)
        ax.set_title(name, fontsize=9, color=INK, pad=3)
        bar = figure.colorbar(shades, ax=ax, pad=0.02, shrink=0.85)
        bar.ax.yaxis.set_major_formatter(Plain())
        bar.ax.tick_params(labelsize=6, colors=GREY, labelcolor=INK)
        bar.outline.set_visible(False)
    figure.set_label(f"Value function in the plane: {', '.join(names)}")
    return figure


def crowd(
    times: ArrayLike,
    positions: ArrayLike,
    *,
    field: Field | None = None,
    upto: int | None = None,
) -> Figure:
    """Particles in the plane at a time, with tails of where they come from.

    Args:
        times: (n,).
        positions: (n, particles, 2); all of them decide the limits of the axes.
        field: x, y and a cost (ny, nx) that is drawn as shades, such as an obstacle.
        upto: the index of the time; the last by default.

    Returns:
        A figure with one axes.
    """
    t, z = np.asarray(times, dtype=float), np.asarray(positions, dtype=float)
    if z.ndim != 3 or z.shape[2] != 2 or len(z) != len(t):
        raise ShapeError(f"`positions` must be ({len(t)}, particles, 2), got {z.shape}")
    last = len(t) - 1 if upto is None else upto
    low, high = z.min((0, 1)), z.max((0, 1))
    pad = 0.05 * (high - low).max() or 1.0
    low, high = low - pad, high + pad
    figure = Figure(figsize=_size(high - low, 4.6), layout="constrained")
    ax = figure.subplots()
    ax.set_xlim(low[0], high[0])
    ax.set_ylim(low[1], high[1])
    tails = z[max(0, last - TAIL) : last + 1].transpose(1, 0, 2)
    ax.add_collection(LineCollection(list(tails), colors=GREY, linewidths=0.5, alpha=0.5))
    ax.scatter(z[last, :, 0], z[last, :, 1], s=5, color=DATA, linewidths=0, zorder=3)
    _plane(ax, field)
    ax.set_title(f"time {t[last]:.2f}", fontsize=9, color=INK, loc="left", family="monospace")
    figure.set_label(f"{z.shape[1]} particles of the population at time {t[last]:.2f}")
    return figure


def refinement(steps: Sequence[int], costs: Mapping[str, ArrayLike]) -> Figure:
    """Costs of policies when their paths are followed in more and more time steps.

    Args:
        steps: numbers of time steps.
        costs: of each policy, (len(steps),), by name; up to three.

    Returns:
        A figure with one axes.
    """
    if len(costs) > 3:
        raise ShapeError(f"`costs` must be of at most 3 policies, got {len(costs)}")
    figure = Figure(figsize=(5.6, 3.4), layout="constrained")
    ax = figure.subplots()
    for (name, given), colour in zip(costs.items(), (DATA, SAMPLES, REFERENCE), strict=False):
        cost = np.asarray(given, dtype=float)
        _demand(cost, f"costs[{name!r}]", (len(steps),))
        ax.plot(steps, cost, "o-", color=colour, lw=1.4, ms=4, label=_escape(name))
    _ticks(ax, size=8, count=6)
    ax.set_xscale("log", base=2)
    ax.set_xticks(list(steps), [str(n) for n in steps])
    ax.minorticks_off()
    ax.grid(color=FAINT, lw=0.5)
    ax.set_axisbelow(True)
    ax.set_xlabel("time steps", fontsize=9, color=INK)
    ax.set_ylabel("cost", fontsize=9, color=INK)
    if len(costs) > 1:
        ax.legend(fontsize=8, frameon=False)
    figure.set_label(f"Cost against the number of time steps: {', '.join(costs)}")
    return figure


def _demand(values: np.ndarray, name: str, shape: tuple[int, ...]) -> None:
    if values.shape != shape:
        raise ShapeError(f"`{name}` must be {shape}, got {values.shape}")


def _size(span: np.ndarray, longest: float) -> tuple[float, float]:
    """Inches of a picture of the plane with equal units, and room for its labels."""
    wide, tall = longest * np.maximum(span / span.max(), 0.4)
    return float(wide) + 0.5, float(tall) + 0.5


def _panels(
    count: int, x: np.ndarray, y: np.ndarray, room: float = 0.0
) -> tuple[Figure, np.ndarray]:
    """A figure with `count` axes with equal units, which have `room` beside them."""
    columns = min(count, COLUMNS)
    rows = -(-count // columns)
    wide, tall = _size(np.array([np.ptp(x), np.ptp(y)]), 2.2)
    size = ((wide + room) * columns + 0.8, tall * rows)
    figure = Figure(figsize=size, layout="compressed")
    axes = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False).ravel()
    for ax in axes[count:]:
        ax.set_visible(False)
    for i, ax in enumerate(axes[:count]):
        _plane(ax, None)
        ax.set_xlim(x[0], x[-1])
        ax.set_ylim(y[0], y[-1])
        ax.label_outer() if i + columns < count else ax.tick_params(labelbottom=True)
        if i % columns:
            ax.set_ylabel("")
    return figure, axes[:count]


def _obstacle(ax: Axes, field: Field | None) -> None:
    """Contours of a cost."""
    if field is None:
        return
    x, y, cost = field
    levels = cost.min() + np.array(OBSTACLE) * np.ptp(cost)
    ax.contour(x, y, cost, levels=levels, colors=SAMPLES, linewidths=0.7)
