"""Figures from arrays. Nothing here touches pyplot, a backend or matplotlib's settings."""

import io
import math
import warnings
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection
from matplotlib.colors import LinearSegmentedColormap, Normalize
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import Formatter, FuncFormatter, LogLocator, MaxNLocator, NullFormatter
from numpy.typing import ArrayLike
from scipy.ndimage import gaussian_filter
from scipy.special import bdtrik

from .errors import ShapeError

# Three colours of Okabe and Ito, distinct in every common form of colour blindness.
DATA, SAMPLES, REFERENCE = "#0072B2", "#D55E00", "#009E73"
INK, GREY, FAINT = "#222222", "#888888", "#DDDDDD"
DATA_SHADES = LinearSegmentedColormap.from_list("data", ["#FFFFFF", "#9CCBE6", DATA, "#00304F"])
MASSES = (0.5, 0.8, 0.95)  # of the samples, inside their contours
MOST_COLUMNS = 8
MOST_PANELS = 24
MINUS = "\N{MINUS SIGN}"
FEW = 300  # below this many, points say more than bins


def corner(data: ArrayLike, samples: ArrayLike, columns: Sequence[str]) -> Figure:
    """Every column, and every pair of columns, of data against samples of a model.

    Args:
        data, samples: (rows, dim) in the same units; rows that are not finite are left out.
        columns: dim names. Beyond 8 columns the first 8 are drawn, and the title says so.

    Returns:
        A figure with k (k + 1) / 2 axes for k = min(dim, 8): on the diagonal both histograms;
        below it the data as a shaded 2-D histogram and the samples as contours that hold 50,
        80 and 95 % of them. The limits follow the data, from their 0.5 to their 99.5 % quantile.
    """
    x, y = _rows(data, "data"), _rows(samples, "samples")
    dim = x.shape[1]
    if y.shape[1] != dim or len(columns) != dim:
        raise ShapeError(
            f"`data`, `samples` and `columns` must have the same number of columns, got {dim}, "
            f"{y.shape[1]} and {len(columns)}"
        )
    figure = _triangle(
        x,
        y,
        columns,
        [limits(x[:, i], y[:, i]) for i in range(dim)],
        [
            Patch(facecolor=DATA, label=f"data ({len(x):,} rows)"),
            Line2D([], [], color=SAMPLES, lw=1.4, label=f"samples of the model{_inside(dim)}"),
        ],
    )
    figure.set_label("Corner plot: histograms of each column and pair of columns, data and samples")
    return figure


def pairs(
    samples: ArrayLike,
    columns: Sequence[str],
    *,
    truth: ArrayLike | None = None,
    reference: ArrayLike | None = None,
) -> Figure:
    """Every parameter, and every pair of parameters, of posterior samples.

    Args:
        samples: (rows, dim); rows that are not finite are left out.
        columns: dim names. Beyond 8 the first 8 are drawn, and the title says so.
        truth: (dim,), marked by lines, and inside the limits wherever it is.
        reference: samples of a posterior to compare with, (rows, dim).

    Returns:
        A figure as of `corner`: samples as histograms and shades. The contours hold 50, 80 and
        95 % of the reference's samples, or without these of the posterior's own.
    """
    x = _rows(samples, "samples")
    dim = x.shape[1]
    y = None if reference is None else _rows(reference, "reference")
    point = None if truth is None else np.asarray(truth, dtype=float)
    shapes = [(len(columns),), (dim,) if point is None else point.shape]
    if y is not None:
        shapes.append(y.shape[1:])
    if set(shapes) != {(dim,)}:
        raise ShapeError(
            f"`columns`, `truth` and `reference` must have {dim} columns, as `samples`, got "
            f"{', '.join(map(str, shapes))}"
        )
    ranges = [limits(x[:, i], () if y is None else y[:, i]) for i in range(dim)]
    handles: list[Any] = [Patch(facecolor=DATA, label=f"posterior ({len(x):,} samples)")]
    if y is not None:
        held = _inside(dim) if len(y) >= FEW else ""
        handles.append(Line2D([], [], color=SAMPLES, lw=1.4, label=f"reference{held}"))
    elif dim > 1 and len(x) >= FEW:
        handles.append(Line2D([], [], color=INK, lw=0.9, label=_inside(dim).strip()))
    if point is not None:
        ranges = [
            (min(low, at - 0.06 * (high - low)), max(high, at + 0.06 * (high - low)))
            for (low, high), at in zip(ranges, point, strict=True)
        ]
        handles.append(Line2D([], [], color=REFERENCE, lw=1.4, label="true parameters"))
    figure = _triangle(x, y, columns, ranges, handles, point)
    figure.set_label("Pair plot: histograms of each parameter and pair of parameters")
    return figure


def density2d(
    x: ArrayLike,
    y: ArrayLike,
    log_density_grid: ArrayLike,
    data: ArrayLike,
    samples: ArrayLike | None = None,
    columns: Sequence[str] = ("x1", "x2"),
) -> Figure:
    """Data, density and samples of a model in the plane, side by side.

    Args:
        x, y: (nx,) and (ny,), the axes of the grid; they are also the limits of all panels.
        log_density_grid: (ny, nx), in nats; -inf where there is no mass.
        data, samples: (rows, 2). Without samples there are two panels.
        columns: the two names.

    Returns:
        A figure with an axes for each panel and one for the scale of colours, which they share:
        equal colours mean equal densities.
    """
    xs, ys = np.asarray(x, dtype=float), np.asarray(y, dtype=float)
    grid = np.asarray(log_density_grid, dtype=float)
    if grid.shape != (len(ys), len(xs)):
        raise ShapeError(
            f"`log_density_grid` must be (len(y), len(x)) = ({len(ys)}, {len(xs)}), got "
            f"{grid.shape}"
        )
    panels = [("data", _rows(data, "data")), ("model", None)]
    if samples is not None:
        panels.append(("samples of the model", _rows(samples, "samples")))
    x_range, y_range = (xs[0], xs[-1]), (ys[0], ys[-1])
    density = np.exp(np.nan_to_num(grid, nan=-np.inf, posinf=np.inf))
    finite = density[np.isfinite(density)]
    counts = {
        name: _bins(rows, x_range, y_range, _bin_count(len(rows)))
        for name, rows in panels
        if rows is not None
    }
    # A spike of the model or of a bin must not darken all the rest.
    dense = [np.quantile(h[h > 0], 0.98) if (h > 0).any() else 0.0 for h, _, _ in counts.values()]
    norm = Normalize(0, max([*dense, np.quantile(finite, 0.995) if finite.size else 0.0]) or 1.0)

    ratio = (y_range[1] - y_range[0]) / (x_range[1] - x_range[0])
    if not 1 / 3 < ratio < 3:  # columns in quite different units
        ratio = 1.0
    wide, tall = (2.9, 2.9 * ratio) if ratio < 1 else (2.9 / ratio, 2.9)
    figure = Figure(figsize=(1.3 + (wide + 0.1) * len(panels), 0.8 + tall), layout="constrained")
    axes = np.atleast_1d(figure.subplots(1, len(panels), sharex=True, sharey=True))
    for ax, (name, rows) in zip(axes, panels, strict=True):
        if rows is None:
            image = ax.pcolormesh(xs, ys, density, cmap=DATA_SHADES, norm=norm, shading="gouraud")
        else:
            h, x_edges, y_edges = counts[name]
            ax.pcolormesh(x_edges, y_edges, h.T, cmap=DATA_SHADES, norm=norm)
        ax.set_title(name, fontsize=9, color=INK)
        ax.set_xlim(*x_range)
        ax.set_ylim(*y_range)
        ax.set_box_aspect(ratio)  # equal aspect, where the units are comparable
        _ticks(ax, size=8, count=5)
        ax.set_xlabel(_short(columns[0], 36), fontsize=9, color=INK)
    axes[0].set_ylabel(_short(columns[1], 36), fontsize=9, color=INK)
    bar = figure.colorbar(image, ax=list(axes), aspect=25, pad=0.01)
    bar.set_label("density", fontsize=8, color=INK)
    bar.ax.yaxis.set_major_formatter(Plain())
    bar.ax.tick_params(labelsize=7, colors=GREY, labelcolor=INK)
    bar.outline.set_visible(False)
    names = ", ".join(name for name, _ in panels)
    figure.set_label(f"Densities in the plane, side by side: {names}")
    return figure


def trajectories(paths: ArrayLike, columns: Sequence[str] | None = None) -> Figure:
    """How a flow carries data to its reference.

    Args:
        paths: (times, n, dim) from data (first) to reference (last), in standardised units.
        columns: dim names for the axes.

    Returns:
        A figure with one axes: in the plane of the two dimensions in which the points move most;
        against time where there is only one dimension.
    """
    z = np.asarray(paths, dtype=float)
    if z.ndim != 3 or z.shape[2] < 1:
        raise ShapeError(f"`paths` must be (times, n, dim), got {z.shape}")
    z = z[:, np.isfinite(z).all((0, 2))]
    dim = z.shape[2]
    names = [f"column {i + 1}" for i in range(dim)] if columns is None else list(columns)
    figure = Figure(figsize=(4.6, 4.6) if dim > 1 else (5.6, 3.6), layout="constrained")
    ax = figure.subplots()
    if dim == 1:
        time = np.broadcast_to(np.linspace(0, 1, len(z))[:, None], z.shape[:2])
        first, second = time, z[:, :, 0]
        ax.set_xlabel("time, from data (0) to reference (1)", fontsize=9, color=INK)
        ax.set_ylabel(_standardised(names[0]), fontsize=9, color=INK)
    else:
        moved = np.square(z[-1] - z[0]).mean(0) if z.shape[1] else np.zeros(dim)
        i, j = sorted(np.argsort(-moved, kind="stable")[:2]) if dim > 2 else (0, 1)
        first, second = z[:, :, i], z[:, :, j]
        ax.set_xlabel(_standardised(names[i]), fontsize=9, color=INK)
        ax.set_ylabel(_standardised(names[j]), fontsize=9, color=INK)
        ax.set_aspect("equal", adjustable="datalim")
    lines = np.stack([first, second], -1).transpose(1, 0, 2)  # (n, times, 2)
    ax.add_collection(LineCollection(list(lines), colors=GREY, linewidths=0.6, alpha=0.55))
    for at, colour, name in ((0, DATA, "data (start)"), (-1, REFERENCE, "reference (end)")):
        ax.scatter(first[at], second[at], s=9, color=colour, linewidths=0, label=name, zorder=3)
    ax.autoscale_view()
    _ticks(ax, size=8, count=6)
    figure.legend(loc="outside upper center", ncols=2, fontsize=8, frameon=False)
    figure.set_label(f"Trajectories of {z.shape[1]} points from the data to the reference")
    return figure


def losses(history: Sequence[Mapping[str, float]]) -> Figure:
    """The course of training.

    Args:
        history: entries with `step` and `loss`, and where they have them `nll`, `validation`,
            `transport` and `hjb`.

    Returns:
        A figure with one axes for loss and likelihood, and a second one, logarithmic, for
        transport cost and HJB residual, if the history has these.
    """
    steps = np.array([entry["step"] for entry in history], dtype=float)
    curves = {
        name: np.array([entry.get(name, np.nan) for entry in history], dtype=float)
        for name in ("loss", "nll", "validation", "transport", "hjb")
    }
    upper = {
        "loss": ("loss", INK, "-"),
        "nll": ("negative log-likelihood", DATA, "-"),
        "validation": ("validation, finer time grid", SAMPLES, "-"),
    }
    lower = {"transport": ("transport cost", REFERENCE, "-"), "hjb": ("HJB residual", SAMPLES, "-")}
    parts = [upper]
    if any(np.isfinite(curves[name]).any() for name in lower):
        parts.append(lower)
    figure = Figure(figsize=(7.2, 1.0 + 2.2 * len(parts)), layout="constrained")
    axes = np.atleast_1d(figure.subplots(len(parts), 1, sharex=True))
    for ax, part in zip(axes, parts, strict=True):
        shown = {name: curves[name] for name in part if np.isfinite(curves[name]).any()}
        for name, values in shown.items():
            label, colour, style = part[name]
            # A single point has no line.
            marker = "o" if np.isfinite(values).sum() == 1 else None
            ax.plot(steps, values, style, color=colour, lw=1.2, label=label, marker=marker, ms=3)
        pool = np.concatenate([v[np.isfinite(v)] for v in shown.values()] or [np.empty(0)])
        logarithmic = part is lower and bool((pool > 0).any())
        if logarithmic:
            ax.set_yscale("log", nonpositive="mask")
            positive = pool[pool > 0]
            near = positive.max() < 50 * positive.min()
            ax.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if near else (1,)))
            ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
            ax.yaxis.set_minor_formatter(NullFormatter())
        elif pool.size > 20:  # the fall of the first steps would hide all that follows
            low, high = pool.min(), np.quantile(pool, 0.97)
            pad = 0.06 * (high - low) or 0.5
            ax.set_ylim(low - pad, high + pad)
        _ticks(ax, size=8, count=5, logarithmic=logarithmic)
        ax.grid(color=FAINT, lw=0.5)
        ax.set_axisbelow(True)
        if shown:
            ax.legend(loc="upper right", fontsize=8, frameon=True, framealpha=0.9, edgecolor="none")
    axes[0].set_ylabel("nats, standardised units", fontsize=9, color=INK)
    if len(parts) > 1:
        axes[1].set_ylabel("cost of the paths", fontsize=9, color=INK)
    axes[-1].set_xlabel("training step", fontsize=9, color=INK)
    figure.align_ylabels(list(axes))
    figure.set_label("Course of training: loss and its terms against the training step")
    return figure


def bars(names: Sequence[str], values: Sequence[float], title: str) -> Figure:
    """Held-out negative log-likelihoods of several methods, best (lowest) on top.

    A log-likelihood has no zero of its own (it moves with the units of the data), so each
    method is a mark on a common scale rather than a bar whose length would suggest one. Values
    that are not finite are written out at the right edge.

    Returns:
        A figure with one axes.
    """
    if len(names) != len(values):
        raise ShapeError(f"`names` and `values` differ in length: {len(names)} and {len(values)}")
    pairs = sorted(zip(names, map(float, values), strict=True), key=lambda p: _rank(p[1]))
    finite = [value for _, value in pairs if math.isfinite(value)]
    low, high = (min(finite), max(finite)) if finite else (0.0, 1.0)
    span = high - low or max(1e-3, 0.1 * abs(high))
    figure = Figure(figsize=(7.2, 1.0 + 0.34 * max(1, len(pairs))), layout="constrained")
    ax = figure.subplots()
    decimals = max(2, min(6, 1 - math.floor(math.log10(span))))
    for row, (_, value) in enumerate(pairs):
        best = bool(finite) and value == low
        at = value if math.isfinite(value) else high + 0.08 * span
        ax.axhline(row, color=FAINT, lw=0.8, zorder=0)
        if math.isfinite(value):
            ax.plot(at, row, "o", color=DATA if best else GREY, ms=8)
        text = f"{value:.{decimals}f}".replace("-", MINUS)
        ax.annotate(
            text, (at, row), (9, 0), textcoords="offset points", va="center", fontsize=8.5,
            color=DATA if best else INK, fontweight="bold" if best else "normal",
            bbox={"facecolor": "white", "edgecolor": "none", "pad": 1.5},
        )  # fmt: skip
    ax.set_xlim(low - 0.08 * span, high + 0.25 * span)
    ax.set_ylim(len(pairs) - 0.4, -0.6)
    _ticks(ax, size=8, count=6)
    ax.set_yticks(range(len(pairs)), [_short(name, 28) for name, _ in pairs], fontsize=9)
    ax.tick_params(axis="y", length=0, labelcolor=INK)
    for side in ("left", "top", "right"):
        ax.spines[side].set_visible(False)
    ax.set_title(_escape(title), fontsize=10, color=INK, loc="left")
    ax.set_xlabel("negative log-likelihood, nats (lower is better)", fontsize=9, color=INK)
    listed = ", ".join(f"{name} {value:.{decimals}f}" for name, value in pairs)
    figure.set_label(f"{title}: {listed}")
    return figure


def images(pictures: ArrayLike, title: str) -> Figure:
    """Small images side by side.

    Args:
        pictures: grey levels in [0, 1], (rows, columns, height, width); 1 is ink.
        title: what they show, for those who can't see them.

    Returns:
        A figure with one axes.
    """
    x = np.asarray(pictures, dtype=float)
    if x.ndim != 4 or 0 in x.shape:
        raise ShapeError(f"`pictures` must be (rows, columns, height, width), got {x.shape}")
    rows, columns, height, width = x.shape
    padded = np.zeros((rows, columns, height + 2, width + 2))  # one pixel of paper around each
    padded[:, :, 1:-1, 1:-1] = x
    sheet = padded.transpose(0, 2, 1, 3).reshape(rows * (height + 2), columns * (width + 2))
    inches = 7.2 / sheet.shape[1]
    figure = Figure(figsize=(7.2, inches * sheet.shape[0]))
    ax = figure.add_axes((0, 0, 1, 1))
    ax.imshow(sheet, cmap="gray_r", vmin=0, vmax=1, interpolation="nearest", aspect="auto")
    ax.set_axis_off()
    figure.set_label(title)
    return figure


def curves(
    lines: Mapping[str, tuple[ArrayLike, ArrayLike]],
    xlabel: str,
    ylabel: str,
    title: str,
    *,
    log: bool = False,
    log_y: bool = False,
    equal: bool = False,
) -> Figure:
    """Lines in one axes, such as what several methods reach over time.

    Args:
        lines: x and y, each (n,), by name; up to six.
        title: what they show, for those who can't see them.
        log, log_y: logarithmic scales of both axes, or of y alone.
        equal: the same scale on both axes, for paths in the plane.

    Returns:
        A figure with one axes.
    """
    # The third is dashed, so that one sees two lines where it lies on the second.
    styles = list(
        zip(2 * (DATA, SAMPLES, REFERENCE), ("-", "-", "--", "--", ":", ":"), strict=True)
    )
    if len(lines) > len(styles):
        raise ShapeError(f"`lines` must be at most {len(styles)}, got {len(lines)}")
    figure = Figure(figsize=(4.6, 4.6) if equal else (7.2, 3.4), layout="constrained")
    ax = figure.subplots()
    for (name, (x, y)), (colour, dash) in zip(lines.items(), styles, strict=False):
        xs, ys = np.asarray(x, dtype=float), np.asarray(y, dtype=float)
        if xs.ndim != 1 or xs.shape != ys.shape:
            raise ShapeError(f"line {name!r} must be two arrays (n,), got {xs.shape}, {ys.shape}")
        marker = "o" if len(xs) <= 20 else None
        ax.plot(xs, ys, dash, color=colour, lw=1.2, label=_escape(name), marker=marker, ms=3)
    if equal:
        ax.set_aspect("equal", adjustable="datalim")
    if log:
        ax.set_xscale("log")
    if log or log_y:
        ax.set_yscale("log", nonpositive="mask")
    if log:
        _frame(ax, 8)
    else:
        _ticks(ax, size=8, count=6, logarithmic=log_y)
    ax.grid(color=FAINT, lw=0.5)
    ax.set_axisbelow(True)
    ax.set_xlabel(_escape(xlabel), fontsize=9, color=INK)
    ax.set_ylabel(_escape(ylabel), fontsize=9, color=INK)
    # About 16 letters to the inch, and room for 8 beside each name.
    rows = math.ceil(sum(len(name) + 8 for name in lines) / (16 * figure.get_figwidth()))
    columns = math.ceil(len(lines) / rows)
    figure.legend(loc="outside upper center", ncols=columns, fontsize=8, frameon=False)
    figure.set_label(title)
    return figure


def rank_histograms(counts: ArrayLike, expected: ArrayLike, names: Sequence[str]) -> Figure:
    """Ranks of true parameters among posterior samples, a panel for each.

    Args:
        counts: of test rows in each bin of ranks, (panels, bins).
        expected: their means where the ranks are uniform, (bins,).
        names: of the panels. Beyond 24 the first 24 are drawn, and the title says so.

    Returns:
        A figure with an axes for each panel: bars, and a band in which 99 % of the bars of uniform
        ranks lie.
    """
    bars, mean = np.asarray(counts, dtype=float), np.asarray(expected, dtype=float)
    if bars.ndim != 2 or mean.shape != bars.shape[1:] or len(names) != len(bars):
        raise ShapeError(
            f"`counts`, `expected` and `names` must be (panels, bins), (bins,) and (panels,), got "
            f"{bars.shape}, {mean.shape} and ({len(names)},)"
        )
    shown, bins = min(len(bars), MOST_PANELS), len(mean)
    total = mean.sum()
    low, high = (bdtrik(tail, total, mean / total) for tail in (0.005, 0.995))
    low, high = np.floor(np.maximum(low, 0)), np.ceil(high)
    wide = min(shown, 4)
    tall = -(-shown // wide)
    figure = Figure(figsize=(max(3.4, 0.5 + 1.95 * wide), 0.75 + 1.5 * tall), layout="constrained")
    axes = figure.subplots(tall, wide, sharex=True, sharey=True, squeeze=False).ravel()
    edges = np.linspace(0, 1, bins + 1)
    top = 1.15 * max(bars[:shown].max(), high.max())
    for ax, heights, name in zip(axes, bars, names, strict=False):
        ax.stairs(high, edges, baseline=low, color=GREY, fill=True, alpha=0.3)
        ax.stairs(mean, edges, color=INK, lw=0.8, baseline=None)
        ax.stairs(heights, edges, color=DATA, fill=True, alpha=0.3)
        ax.stairs(heights, edges, color=DATA, lw=1.2)
        outside = (heights < low) | (heights > high)
        ax.plot(edges[:-1][outside] + 0.5 / bins, heights[outside], "o", color=SAMPLES, ms=3.5)
        ax.set_title(_short(name, 26), fontsize=8, color=INK)
        ax.set_xlim(0, 1)
        ax.set_ylim(0, top)
        _frame(ax, 7)
        ax.set_xticks([0, 0.5, 1], ["0", "0.5", "1"])
        ax.yaxis.set_major_locator(MaxNLocator(nbins=3, integer=True, steps=[1, 2, 5, 10]))
    for ax in axes[shown:]:
        ax.set_axis_off()
    for ax in axes[max(0, shown - wide) : shown]:  # the lowest panel of each column
        ax.tick_params(labelbottom=True)
    figure.supxlabel("rank of the true value among posterior samples", fontsize=8, color=INK)
    figure.supylabel("test rows", fontsize=8, color=INK)
    figure.legend(
        handles=[
            Patch(facecolor=DATA, alpha=0.5, label="ranks"),
            Line2D([], [], marker="o", color=SAMPLES, lw=0, ms=3.5, label="outside"),
            Patch(facecolor=GREY, alpha=0.3, label="99 % of the bars, if calibrated"),
        ],
        loc="outside upper center", ncols=3, fontsize=8, frameon=False, columnspacing=1.2,
        title=f"The first {shown} of {len(bars)}" if len(bars) > shown else None,
        title_fontsize=8,
    )  # fmt: skip
    figure.set_label("Histograms of the ranks of true parameters among posterior samples")
    return figure


def coverage(
    curves: Mapping[str, tuple[ArrayLike, ArrayLike, ArrayLike, ArrayLike]],
) -> Figure:
    """How often regions of a posterior hold the truth, against how often they should.

    Args:
        curves: by name, the levels, how often those regions hold the truth, and the lower and
            upper ends of the band of a calibrated posterior; each (points,), from 0 to 1.

    Returns:
        A figure with an axes for each curve.
    """
    figure = Figure(figsize=(0.6 + 3.0 * max(1, len(curves)), 3.7), layout="constrained")
    axes = figure.subplots(1, max(1, len(curves)), sharey=True, squeeze=False)[0]
    for ax, (name, arrays) in zip(axes, curves.items(), strict=False):
        levels, covered, low, high = (np.asarray(values, dtype=float) for values in arrays)
        if levels.ndim != 1 or {covered.shape, low.shape, high.shape} != {levels.shape}:
            raise ShapeError(f"curve {name!r} must be four arrays (points,) of the same length")
        ax.fill_between(levels, low, high, color=GREY, alpha=0.35, linewidth=0)
        ax.plot([0, 1], [0, 1], color=INK, lw=0.8)
        ax.plot(levels, covered, "o-", color=DATA, lw=1.2, ms=3)
        outside = (covered < low) | (covered > high)
        ax.plot(levels[outside], covered[outside], "o", color=SAMPLES, ms=4)
        ax.set_title(_short(name, 40), fontsize=9, color=INK)
        ax.set_xlabel("share of the posterior in the region", fontsize=8, color=INK)
        ax.set_xlim(0, 1)
        ax.set_ylim(0, 1)
        ax.set_box_aspect(1)
        _ticks(ax, size=7, count=6)
        ax.grid(color=FAINT, lw=0.5)
        ax.set_axisbelow(True)
    axes[0].set_ylabel("how often it holds the truth", fontsize=8, color=INK)
    figure.legend(
        handles=[
            Line2D([], [], marker="o", color=DATA, lw=1.2, ms=3, label="posterior"),
            Line2D([], [], marker="o", color=SAMPLES, lw=0, ms=4, label="outside the band"),
            Patch(facecolor=GREY, alpha=0.35, label="curves, if calibrated"),
        ],
        loc="outside upper center", ncols=3, fontsize=8, frameon=False,
    )  # fmt: skip
    figure.set_label(f"Coverage of the regions of a posterior: {', '.join(curves)}")
    return figure


def to_png(figure: Figure, dpi: float = 110) -> bytes:
    """The figure as a PNG on white."""
    buffer = io.BytesIO()
    with warnings.catch_warnings():
        # A column name in a script that the font lacks is drawn as boxes.
        warnings.filterwarnings("ignore", message="Glyph .* missing", category=UserWarning)
        figure.savefig(
            buffer, format="png", dpi=dpi, facecolor="white", metadata={"Software": None}
        )
    return buffer.getvalue()


def limits(data: ArrayLike, other: ArrayLike = ()) -> tuple[float, float]:
    """Where to cut an axis: the 0.5 and 99.5 % quantiles of `data`, and a margin.

    A constant column takes its width from `other`, or else from its own size.
    """
    x, y = (np.asarray(values, dtype=float).ravel() for values in (data, other))
    x, y = x[np.isfinite(x)], y[np.isfinite(y)]
    if not x.size:
        x = y if y.size else np.zeros(1)
    low, high = np.quantile(x, [0.005, 0.995])
    if not _apart(low, high):
        low, high = x.min(), x.max()
    if not _apart(low, high) and y.size:
        half = np.quantile(np.abs(y - low), 0.99)
        low, high = low - half, high + half
    if not _apart(low, high):
        half = 0.05 * abs(low) or 0.5
        low, high = low - half, high + half
    margin = 0.12 * (high - low)
    return float(low - margin), float(high + margin)


class Plain(Formatter):
    """Short tick labels, each complete in itself: no offset or factor in a corner of the axes."""

    def __call__(self, value: float, pos: int | None = None) -> str:
        return self.format_ticks([value])[0]

    def format_ticks(self, values: Sequence[float]) -> list[str]:
        ticks = np.asarray(values, dtype=float)
        largest = np.abs(ticks).max(initial=0.0)
        gaps = np.diff(np.unique(ticks))
        gap = gaps.min() if gaps.size else largest
        if largest == 0 or gap == 0:
            return ["0"] * len(ticks)
        place = math.floor(math.log10(gap) + 1e-9)  # of the last digit that matters
        if 1e-3 <= largest < 1e5:
            texts = [f"{tick:.{max(0, -place)}f}" for tick in ticks]
        else:
            digits = min(12, max(0, math.floor(math.log10(largest)) - place))
            texts = [_scientific(tick, digits) if abs(tick) > 1e-6 * gap else "0" for tick in ticks]
        texts = [text.lstrip("-") if not text.strip("-0.") else text for text in texts]  # no -0.0
        return [text.replace("-", MINUS) for text in texts]


def _scientific(value: float, digits: int) -> str:
    mantissa, exponent = f"{value:.{digits}e}".split("e")
    return f"{mantissa}e{int(exponent)}"


def _apart(low: float, high: float) -> bool:
    """Whether two ends of an axis can be told apart in double precision, with room for ticks."""
    return bool(high - low > 1e-10 * max(abs(low), abs(high), 1e-290))


def _rank(value: float) -> float:
    return math.inf if math.isnan(value) else value


def _inside(dim: int) -> str:
    """What the contours hold, for a legend; nothing where there are no pairs."""
    percents = ", ".join(f"{100 * mass:g}" for mass in MASSES)
    return "" if dim == 1 else f"\n{percents} % of them inside"


def _rows(values: ArrayLike, name: str) -> np.ndarray:
    """Finite rows of a (rows, dim) array, as doubles."""
    rows = np.asarray(values, dtype=float)
    if rows.ndim != 2 or rows.shape[1] < 1:
        raise ShapeError(f"`{name}` must be (rows, dim), got {rows.shape}")
    return rows[np.isfinite(rows).all(1)]


def _triangle(
    x: np.ndarray,
    y: np.ndarray | None,
    columns: Sequence[str],
    ranges: Sequence[tuple[float, float]],
    handles: list[Any],
    truth: np.ndarray | None = None,
) -> Figure:
    """Panels for each column and pair of columns: `x` shaded, `y` (or else x) as contours."""
    dim = x.shape[1]
    k = min(dim, MOST_COLUMNS)
    side = {1: 3.6, 2: 2.3, 3: 1.8, 4: 1.5, 5: 1.28, 6: 1.12, 7: 1.0}.get(k, 0.92)  # inches
    left, right, bottom, top = 0.95, 0.15, 0.68, 0.4 if dim > k or k == 1 else 0.12
    width, height = left + k * side + right, bottom + k * side + top
    letters = int(side * 72 / (0.7 * 8))
    names = [_short(name, letters) for name in columns[:k]]
    if len(set(names)) < k:  # what told them apart was left out
        names = [_short(f"{i + 1}: {name}", letters) for i, name in enumerate(columns[:k])]
    figure = Figure(figsize=(width, height))
    for row in range(k):
        for column in range(row + 1):
            ax = figure.add_axes(
                (
                    (left + (column + 0.04) * side) / width,
                    (bottom + (k - 1 - row + 0.04) * side) / height,
                    0.92 * side / width,
                    0.92 * side / height,
                )
            )
            pair = [column, row]
            if row == column:
                _histograms(ax, x[:, row], None if y is None else y[:, row], ranges[row])
            else:
                other = None if y is None else y[:, pair]
                _pair(ax, x[:, pair], other, ranges[column], ranges[row])
            if truth is not None:
                ax.axvline(truth[column], color=REFERENCE, lw=1.1)
                if row != column:
                    ax.axhline(truth[row], color=REFERENCE, lw=1.1)
                    ax.plot(truth[column], truth[row], "o", color=REFERENCE, ms=3.5)
            size = 7 if k < 6 else 6
            _frame(ax, size)
            ax.set_xticks(*_few_ticks(ranges[column], side * 72 / size))
            if row != column:
                ax.set_yticks(*_few_ticks(ranges[row], side * 72 / size, upright=True))
            if row == k - 1:
                ax.set_xlabel(names[column], fontsize=8, color=INK)
                ax.xaxis.set_label_coords(0.5, -0.26 / side)
            else:
                ax.tick_params(labelbottom=False)
            if column == 0 and row > 0:
                ax.set_ylabel(names[row], fontsize=8, color=INK)
                ax.yaxis.set_label_coords(-0.46 / side, 0.5)
            elif row != column:
                ax.tick_params(labelleft=False)
    figure.legend(
        handles=handles,
        # The triangle's free corner; a single panel has none.
        loc="upper left" if k == 1 else "upper right",
        bbox_to_anchor=(left / width, 1.0) if k == 1 else (1 - right / width, 1 - top / height),
        ncols=len(handles) if k == 1 else 1,
        fontsize=8,
        frameon=False,
    )
    if dim > k:
        figure.suptitle(
            f"The first {k} of {dim} columns", fontsize=10, color=INK, x=left / width, ha="left",
            y=1 - 0.15 / height, va="top",
        )  # fmt: skip
    return figure


def _histograms(ax: Axes, x: np.ndarray, y: np.ndarray | None, span: tuple[float, float]) -> None:
    """As densities over all their rows, so that what lies outside the limits counts."""
    edges = np.linspace(*span, 1 + min(40, max(12, int(len(x) ** 0.5))))
    steps = [
        np.histogram(values, edges)[0] / max(1, len(values)) / (edges[1] - edges[0])
        for values in (x, y)
        if values is not None
    ]
    ax.stairs(steps[0], edges, color=DATA, fill=True, alpha=0.25)
    for heights, colour in zip(steps, (DATA, SAMPLES), strict=False):
        ax.stairs(heights, edges, color=colour, lw=1.2)
    ax.set_xlim(*span)
    ax.set_ylim(0, 1.12 * max(*(heights.max() for heights in steps), 1e-300))
    ax.set_yticks([])


def _pair(
    ax: Axes,
    x: np.ndarray,
    y: np.ndarray | None,
    x_range: tuple[float, float],
    y_range: tuple[float, float],
) -> None:
    if len(x) < FEW:
        ax.scatter(x[:, 0], x[:, 1], s=4, color=DATA, alpha=0.6, linewidths=0)
    else:
        h, x_edges, y_edges = _bins(x, x_range, y_range, _bin_count(len(x)))
        top = np.quantile(h[h > 0], 0.98) if (h > 0).any() else 1.0
        ax.pcolormesh(x_edges, y_edges, h.T, cmap=DATA_SHADES, vmin=0, vmax=top, rasterized=True)
    if y is None:
        if len(x) >= FEW:
            _contours(ax, x, x_range, y_range, INK)
    elif len(y) < FEW or not _contours(ax, y, x_range, y_range, SAMPLES):
        ax.scatter(y[:, 0], y[:, 1], s=3, color=SAMPLES, alpha=0.4, linewidths=0)
    ax.set_xlim(*x_range)
    ax.set_ylim(*y_range)


def _contours(
    ax: Axes,
    y: np.ndarray,
    x_range: tuple[float, float],
    y_range: tuple[float, float],
    colour: str,
) -> bool:
    """Draw the curves that hold `MASSES` of the samples; false where there are none to draw."""
    bins = 60
    h, x_edges, y_edges = _bins(y, x_range, y_range, bins)
    h = gaussian_filter(h, sigma=0.11 * bins * len(y) ** (-1 / 6), mode="constant")
    heights = np.sort(h.ravel())[::-1]
    area = (x_edges[1] - x_edges[0]) * (y_edges[1] - y_edges[0])
    mass = np.cumsum(heights) * area
    edge = heights[np.minimum(np.searchsorted(mass, MASSES), heights.size - 1)]
    levels = sorted({level for level in edge.tolist() if 1e-9 * heights[0] < level < heights[0]})
    if not levels:
        return False
    centres = [(edges[1:] + edges[:-1]) / 2 for edges in (x_edges, y_edges)]
    width = 1.0 if colour == SAMPLES else 0.7
    ax.contour(*centres, h.T, levels=levels, colors=colour, linewidths=width)
    return True


def _bin_count(rows: int) -> int:
    return int(min(60, max(12, 2.2 * rows ** (1 / 3))))


def _bins(
    rows: np.ndarray, x_range: tuple[float, float], y_range: tuple[float, float], count: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """A density (x bins, y bins) over all the rows, and the edges."""
    edges = [np.linspace(*x_range, count + 1), np.linspace(*y_range, count + 1)]
    h, x_edges, y_edges = np.histogram2d(rows[:, 0], rows[:, 1], bins=edges)
    area = (x_edges[1] - x_edges[0]) * (y_edges[1] - y_edges[0])
    return h / max(1, len(rows)) / area, x_edges, y_edges


def _ticks(ax: Axes, *, size: float, count: int, logarithmic: bool = False) -> None:
    """Round ticks on both axes, but for a logarithmic y axis."""
    for axis in [ax.xaxis] if logarithmic else [ax.xaxis, ax.yaxis]:
        axis.set_major_locator(MaxNLocator(nbins=count, steps=[1, 2, 5, 10], min_n_ticks=2))
        axis.set_major_formatter(Plain())
    _frame(ax, size)


def _few_ticks(
    span: tuple[float, float], letters: float, *, upright: bool = False
) -> tuple[list[float], list[str]]:
    """As many round ticks with their labels as fit beside each other and inside the axis.

    `letters` is the length of the axis over the size of the font; the labels of an `upright`
    axis are stacked.
    """
    low, high = span
    for count in (5, 4, 3, 2, 1):
        locator = MaxNLocator(nbins=count, steps=[1, 2, 5, 10], min_n_ticks=1)
        ticks = np.asarray(locator.tick_values(low, high))
        ticks = ticks[(ticks >= low) & (ticks <= high)]
        texts = Plain().format_ticks(ticks.tolist())
        need = [1.4 if upright else 0.64 * len(text) + 0.7 for text in texts]
        at = (ticks - low) / (high - low) * letters
        # Labels that would stick out are dropped, their ticks with them.
        kept = [
            n for n in range(len(at)) if need[n] / 2 - 0.7 < at[n] < letters - need[n] / 2 + 0.7
        ]
        if len(kept) > 1 and all(
            at[m] - at[n] > (need[n] + need[m]) / 2 for n, m in pairwise(kept)
        ):
            return [float(ticks[n]) for n in kept], [texts[n] for n in kept]
    middle = [float(ticks[n]) for n in kept[:1]]
    return middle, Plain().format_ticks(middle)


def _frame(ax: Axes, size: float) -> None:
    """Small ticks and a thin frame."""
    ax.tick_params(labelsize=size, length=2.5, width=0.6, colors=GREY, labelcolor=INK, which="both")
    for spine in ax.spines.values():
        spine.set_linewidth(0.6)
        spine.set_color(GREY)


def _standardised(name: str) -> str:
    name = " ".join(str(name).split())
    if len(name) > 44:
        name = f"{name[:28]}…{name[-15:]}"
    return _escape(f"{name}{' ' if len(name) <= 28 else chr(10)}(standardised)")


def _short(name: str, width: int) -> str:
    """A name in at most two lines of `width` letters, its middle left out where it is longer."""
    name = " ".join(str(name).split())
    if len(name) <= width:
        return _escape(name)
    breaks = [i for i in range(len(name) - width, width + 1) if name[i - 1] in " _-./"]
    if breaks:
        cut = min(breaks, key=lambda i: abs(i - len(name) / 2))
        return _escape(f"{name[:cut].rstrip()}\n{name[cut:].lstrip()}")
    return _escape(f"{name[: width - 1].rstrip()}…\n{name[1 - width :].lstrip()}")


def _escape(text: str) -> str:
    """Dollar signs as such, not as mathematics."""
    return text.replace("$", r"\$")
