"""Figures of control problems, from arrays."""

import io
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.collections import LineCollection
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.patches import Circle
from mpl_toolkits.mplot3d.art3d import Line3DCollection
from numpy.typing import ArrayLike

from .errors import ShapeError
from .plots import DATA, FAINT, GREY, INK, REFERENCE, SAMPLES, _ticks, to_png

PANELS = 12  # of states or controls
FLATTEST = 0.6  # shortest side over the longest, of what is drawn of plane and space
SEEN = 5  # times at which agents are drawn in their size
TIMES = "viridis"
FRAMES = 60
FRAME = 50  # milliseconds
PALETTE = 256  # colours of an animation

Field = tuple[np.ndarray, np.ndarray, np.ndarray]


def paths(
    times: ArrayLike,
    positions: ArrayLike,
    targets: ArrayLike | None = None,
    *,
    others: ArrayLike | None = None,
    radius: float = 0.0,
    field: Field | None = None,
    boxes: ArrayLike | None = None,
    upto: int | None = None,
) -> Figure:
    """Ways of agents in the plane or in space; colours are times.

    Args:
        times: (n,).
        positions: (n, agents, 2 or 3).
        targets: (agents, 2 or 3), if each has one.
        others: positions to compare with, such as an open-loop solution's, (any, agents, 2 or 3).
        radius: of an agent, drawn at some times in the plane.
        field: x (nx,), y (ny,) and a cost (ny, nx) that is drawn as shades; of the plane only.
        boxes: lower and upper corners of obstacles, (boxes, 2, 3); of space only.
        upto: the index of time where a frame of an animation ends; all times by default.

    Returns:
        A figure with one axes, and one for the scale of times.
    """
    t, z = np.asarray(times, dtype=float), np.asarray(positions, dtype=float)
    goal = z[-1] if targets is None else np.asarray(targets, dtype=float)
    if z.ndim != 3 or z.shape[2] not in (2, 3) or len(z) != len(t) or goal.shape != z.shape[1:]:
        raise ShapeError(
            f"`positions` must be ({len(t)}, agents, 2 or 3) and `targets` alike, got {z.shape} "
            f"and {goal.shape}"
        )
    space = z.shape[2] == 3
    figure = Figure(figsize=(5.8, 5.0), layout="constrained")
    ax: Any = figure.add_subplot(projection="3d" if space else None)
    last = len(t) - 1 if upto is None else upto
    norm, colours = Normalize(t[0], t[-1]), ScalarMappable(Normalize(t[0], t[-1]), TIMES)
    if others is not None:
        for way in np.asarray(others, dtype=float).transpose(1, 0, 2):
            ax.plot(*way.T, "--", color=GREY, lw=0.9)
    seen = z[: last + 1]
    pieces = np.stack([seen[:-1], seen[1:]], 2).reshape(-1, 2, z.shape[2])
    at = np.repeat((t[: last + 1][1:] + t[: last + 1][:-1]) / 2, z.shape[1])
    collection = (Line3DCollection if space else LineCollection)(
        list(pieces), cmap=TIMES, norm=norm, linewidths=1.0 if z.shape[1] > 12 else 1.8
    )
    collection.set_array(at)
    (ax.add_collection3d if space else ax.add_collection)(collection)
    size = 12 if z.shape[1] > 12 else 30
    ax.scatter(*z[0].T, s=size, color=DATA, label="start")
    name = "target" if targets is not None else "end"
    ax.scatter(*goal.T, s=2 * size, color=REFERENCE, marker="x", label=name)
    if upto is not None:
        ax.scatter(*z[last].T, s=size, color=SAMPLES)
    _limits(ax, np.concatenate([z.reshape(-1, z.shape[2]), goal]), radius)
    if space:
        _space(ax, boxes)
    else:
        _plane(ax, field)
        drawn = [last] if upto is not None else np.linspace(0, last, SEEN).round().astype(int)
        for n in drawn if radius else ():
            for centre in z[n]:
                colour = colours.to_rgba(t[n])
                ax.add_patch(Circle(tuple(centre), radius, fill=False, color=colour, lw=1.1))
    bar = figure.colorbar(colours, ax=ax, shrink=0.8, pad=0.1 if space else 0.02)
    bar.set_label("time", fontsize=9, color=INK)
    bar.ax.tick_params(labelsize=8)
    if others is not None:
        ax.plot([], [], "--", color=GREY, lw=0.9, label="open loop")
    figure.legend(loc="outside upper center", ncols=3, fontsize=8, frameon=False)
    figure.set_label(f"Ways of {z.shape[1]} agents from start to {name}, coloured by time")
    return figure


def _limits(ax: Any, points: np.ndarray, radius: float) -> None:
    low, high = points.min(0), points.max(0)
    most = max((high - low).max(), 1e-9)
    lack = np.maximum(FLATTEST * most - (high - low), 0) / 2
    low, high, pad = low - lack, high + lack, 0.06 * most + radius
    ax.set_xlim(low[0] - pad, high[0] + pad)
    ax.set_ylim(low[1] - pad, high[1] + pad)
    if points.shape[1] == 3:
        ax.set_zlim(low[2] - pad, high[2] + pad)


def _plane(ax: Axes, field: Field | None) -> None:
    if field is not None:
        x, y, cost = field
        ax.set_autoscale_on(False)
        extent = (x[0], x[-1], y[0], y[-1])
        ax.imshow(cost, extent=extent, origin="lower", cmap="Greys", alpha=0.55, zorder=0)
    ax.set_aspect("equal", adjustable="box")
    ax.set_xlabel("x", fontsize=9, color=INK)
    ax.set_ylabel("y", fontsize=9, color=INK)
    _ticks(ax, size=8, count=6)


def _space(ax: Any, boxes: ArrayLike | None) -> None:
    floor = ax.get_zlim()[0]
    edges = []
    for low, high in np.asarray([] if boxes is None else boxes, dtype=float):
        ends = np.array([np.where(np.isfinite(low), low, floor), high])
        corners = np.array(
            [[ends[i, 0], ends[j, 1], ends[k, 2]] for i, j, k in np.ndindex(2, 2, 2)]
        )
        edges += [corners[[a, a | bit]] for a in range(8) for bit in (1, 2, 4) if not a & bit]
    if edges:
        ax.add_collection3d(Line3DCollection(edges, colors=INK, linewidths=0.9))
    for axis, name in ((ax.xaxis, "x"), (ax.yaxis, "y"), (ax.zaxis, "z")):
        axis.set_label_text(name, fontsize=9, color=INK)
    ax.tick_params(labelsize=7)
    ax.set_box_aspect([np.ptp(span()) for span in (ax.get_xlim, ax.get_ylim, ax.get_zlim)])


def courses(
    times: ArrayLike,
    values: ArrayLike,
    names: Sequence[str],
    *,
    others: tuple[ArrayLike, ArrayLike] | None = None,
    title: str,
) -> Figure:
    """Values over time, a panel for each.

    Args:
        times: (n,).
        values: (n, count), or of several paths (n, paths, count).
        names: of the values; beyond 12 the first 12 are drawn.
        others: times and values (m, count) to compare with, such as an open-loop solution's.
        title: what they are, such as "States".
    """
    t, y = np.asarray(times, dtype=float), np.asarray(values, dtype=float)
    y = y[:, None] if y.ndim == 2 else y
    if y.ndim != 3 or len(y) != len(t) or y.shape[2] != len(names):
        raise ShapeError(f"`values` must be ({len(t)}, paths, {len(names)}), got {y.shape}")
    count = min(len(names), PANELS)
    columns = 2 if count == 4 else min(count, 3)
    rows = -(-count // columns)
    figure = Figure(figsize=(2.6 * columns + 0.4, 1.7 * rows + 0.5), layout="constrained")
    axes = figure.subplots(rows, columns, sharex=True, squeeze=False).ravel()
    for i, ax in enumerate(axes):
        if i >= count:
            ax.set_visible(False)
            continue
        ax.plot(t, y[:, 1:, i], color=DATA, lw=0.5, alpha=0.25)
        ax.plot(t, y[:, 0, i], color=DATA, lw=1.5, label="policy")
        if others is not None:
            when, what = (np.asarray(part, dtype=float) for part in others)
            ax.plot(when, what[:, i], "--", color=SAMPLES, lw=1.2, label="open loop")
        ax.set_title(names[i], fontsize=9, color=INK, pad=3)
        _ticks(ax, size=8, count=4)
        ax.grid(color=FAINT, lw=0.5)
        ax.set_axisbelow(True)
        if i >= count - columns:
            ax.set_xlabel("time", fontsize=9, color=INK)
            ax.tick_params(labelbottom=True)
    if others is not None:
        handles, labels = axes[0].get_legend_handles_labels()
        figure.legend(
            handles, labels, loc="outside upper center", ncols=2, fontsize=8, frameon=False
        )
    more = f" (the first {count} of {len(names)})" if count < len(names) else ""
    figure.set_label(f"{title} over time{more}")
    return figure


def shocks(sizes: ArrayLike, mean: ArrayLike, worst: ArrayLike) -> Figure:
    """Cost against the size of a shock: mean and worst, (sizes,) each; the first size is zero."""
    size = np.asarray(sizes, dtype=float)
    figure = Figure(figsize=(5.6, 3.4), layout="constrained")
    ax = figure.subplots()
    worst_, mean_ = np.asarray(worst, dtype=float), np.asarray(mean, dtype=float)
    unshocked = mean_[0]
    ax.axhline(unshocked, color=GREY, lw=1.0, ls=":", label="without a shock")
    ax.plot(size, mean_, "o-", color=DATA, lw=1.4, ms=4, label="mean")
    ax.plot(size, worst_, "o-", color=SAMPLES, lw=1.4, ms=4, label="worst")
    finite = worst_[np.isfinite(worst_)]
    if finite.size and unshocked > 0 and finite.max() > 20 * unshocked:
        ax.set_yscale("log")
    _ticks(ax, size=8, count=6, logarithmic=ax.get_yscale() == "log")
    ax.grid(color=FAINT, lw=0.5)
    ax.set_axisbelow(True)
    ax.set_xlabel("size of the shock, over the scale of the states", fontsize=9, color=INK)
    ax.set_ylabel("cost", fontsize=9, color=INK)
    ax.legend(fontsize=8, frameon=False)
    figure.set_label("Cost under shocks of growing size")
    return figure


def training(history: Sequence[Mapping[str, float]]) -> Figure:
    """The course of training: cost and validation above, penalties below.

    Args:
        history: entries as of log.jsonl, with `step`, `loss`, `cost`, `validation` and penalties.
    """
    steps = [entry["step"] for entry in history]
    figure = Figure(figsize=(7.2, 5.2), layout="constrained")
    parts = figure.subplots(2, 1, sharex=True)
    upper = {"cost": INK, "validation": SAMPLES}
    lower = {"hjb": DATA, "terminal": SAMPLES, "terminal_gradient": REFERENCE, "bsde": INK}
    labels = {"hjb": "HJB residual", "terminal_gradient": "terminal gradient", "bsde": "BSDE"}
    marker = "o" if len(steps) == 1 else None
    for ax, shown in zip(parts, (upper, lower), strict=True):
        for name, colour in shown.items():
            values = np.array([entry.get(name, np.nan) for entry in history], dtype=float)
            if not np.isfinite(values).any():
                continue
            label = labels.get(name, name)
            ax.plot(steps, values, color=colour, lw=1.1, label=label, marker=marker, ms=3)
        ax.set_yscale("log", nonpositive="mask") if shown is lower else None
        _ticks(ax, size=8, count=5, logarithmic=shown is lower)
        ax.grid(color=FAINT, lw=0.5)
        ax.set_axisbelow(True)
        ax.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0), fontsize=8, frameon=False)
    _above_the_start(parts[0], history)
    parts[0].set_ylabel("cost", fontsize=9, color=INK)
    parts[1].set_ylabel("penalties, without weights", fontsize=9, color=INK)
    parts[1].set_xlabel("training step", fontsize=9, color=INK)
    figure.align_ylabels(list(parts))
    figure.set_label("Course of training: cost and penalties against the training step")
    return figure


def _above_the_start(ax: Axes, history: Sequence[Mapping[str, float]]) -> None:
    """The first costs would hide all that follows."""
    if len(history) < 20:
        return
    later = history[len(history) // 4 :]
    pool = [entry[key] for entry in later for key in ("cost", "validation") if key in entry]
    values = np.array(pool, dtype=float)
    values = values[np.isfinite(values)]
    if values.size:
        low, high = values.min(), np.quantile(values, 0.98)
        pad = 0.06 * (high - low) or 0.5
        ax.set_ylim(low - pad, high + pad)


def animation(figures: Iterable[Figure], dpi: float = 80) -> bytes:
    """The figures as an endless GIF, all of the same size."""
    from PIL import Image

    frames = []
    for figure in figures:
        frame = Image.open(io.BytesIO(to_png(figure, dpi=dpi))).convert("RGB")
        frames.append(frame.quantize(PALETTE))
    buffer = io.BytesIO()
    durations = [FRAME] * (len(frames) - 1) + [20 * FRAME]
    frames[0].save(
        buffer, format="GIF", save_all=True, append_images=frames[1:], duration=durations, loop=0
    )
    return buffer.getvalue()
