"""The report of an equilibrium: how the population moves, what it pays, and how sure that is."""

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .control_report import (
    array,
    percent,
    read_run,
    training_section,
    write_animation,
)
from .games import Crowd, Equilibrium, MeanFieldGame
from .models import load
from .report import Section, configuration_section, write_report
from .train.files import read_json, write_json

KIND = "game"
STEPS = (2, 4, 8, 16, 32)  # of time, to which costs are refined
PARTICLES = 8192
WAYS, DOTS = 40, 500  # particles drawn with their ways, and in the animation
FRAMES = 32  # of the animation
SHOWN = (0.0, 0.25, 0.5, 0.75, 1.0)  # of the horizon
SLICES = (0.0, 0.5, 1.0)
GRID = 100  # points a side of pictures of the plane
ARROWS = 11  # a side
SMOOTH = 0.25  # width of the kernel, over the standard deviation, of densities from samples
ROOM = 0.08  # beside the particles


def finish_game(equilibrium: Equilibrium, out: Path, seed: int = 0) -> dict[str, Any]:
    """Judge the equilibrium of a finished run, and add what is found to its folder.

    Adds check and refinement to metrics.json, and writes report.html and animation.gif.

    Args:
        equilibrium: what `control.solve` returned.
        out: the folder that it wrote.
        seed: of particles.

    Returns:
        The metrics.
    """
    game = equilibrium.problem
    metrics = read_json(out / "metrics.json")
    metrics |= {
        "problem": game.name,
        "check": equilibrium.check(seed=seed).to_dict(),
        "refinement": refine(equilibrium, seed),
        "report": {"kind": KIND, "title": f"Mean-field game {game.name}", "seed": seed},
    }
    write_json(out / "metrics.json", metrics)
    write_games_report(out, equilibrium)
    return metrics


def refine(equilibrium: Equilibrium, seed: int = 0) -> dict[str, Any]:
    """`steps`, and the cost by term and in total when the same particles, which training did not
    see, are followed in so many time steps."""
    x = _particles(equilibrium.problem, seed)
    costs = [equilibrium.cost(x, steps=n) for n in STEPS]
    return {"steps": list(STEPS)} | {name: [cost[name] for cost in costs] for name in costs[0]}


def write_games_report(run: Path, equilibrium: Equilibrium | None = None) -> None:
    """Write report.html, and the animation, from what is in the folder of a run.

    Args:
        run: the folder.
        equilibrium: the one in it; read from there by default.

    Raises:
        ModelError: the folder holds no finished run of a mean-field game.
    """
    metrics, history = read_run(run, KIND, "mean-field game")
    head = metrics["report"]
    equilibrium = load(run) if equilibrium is None else equilibrium
    assert equilibrium is not None
    x = _particles(equilibrium.problem, head["seed"])
    crowd = equilibrium.crowd(x, steps=FRAMES)
    ends = equilibrium.problem.target.sample(PARTICLES, torch.Generator().manual_seed(0))
    axes = _axes(crowd, ends)
    field = _field(equilibrium.problem, axes)
    sections = [
        _summary(equilibrium, metrics),
        _costs(equilibrium.problem, metrics["check"]),
        _densities(equilibrium, crowd, ends, axes, field),
        _ways(crowd, field, run),
        _value(equilibrium, axes),
        _refinement(metrics["refinement"]),
        training_section(history, metrics),
        configuration_section(read_json(run / "config.json")),
    ]
    write_report(run / "report.html", head["title"], sections)


def _particles(game: MeanFieldGame, seed: int) -> Tensor:
    """Of the initial density, others than in training and in the check."""
    own = int(np.random.default_rng((seed, 3)).integers(2**62))
    return game.initial(PARTICLES, torch.Generator().manual_seed(own))


def _axes(crowd: Crowd, ends: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Of the plane of the first two coordinates, around nearly all particles at all times, and
    where they should end."""
    points = np.concatenate([array(crowd.states[:, :, :2]).reshape(-1, 2), array(ends[:, :2])])
    points = points[np.isfinite(points).all(1)]
    low, high = np.quantile(points, (0.001, 0.999), axis=0)
    pad = ROOM * (high - low).max()
    x, y = (np.linspace(low[i] - pad, high[i] + pad, GRID) for i in (0, 1))
    return x, y


def _plane(game: MeanFieldGame, points: np.ndarray) -> Tensor:
    """States (n, dim) of which `points` (n, 2) are the first two coordinates; the others are means
    of the initial density."""
    states = game.nominal().repeat(len(points), 1)
    states[:, :2] = torch.from_numpy(points)
    return states


def _mesh(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Points (len(y) len(x), 2), x fastest."""
    return np.stack(np.meshgrid(x, y), -1).reshape(-1, 2)


@torch.no_grad()
def _field(game: MeanFieldGame, axes: tuple[np.ndarray, np.ndarray]) -> Any:
    """x, y and the preference on a grid wider than `axes`, or None where there is none."""
    if game.preference is None:
        return None
    room = 0.5 * max(a[-1] - a[0] for a in axes)
    x, y = (np.linspace(a[0] - room, a[-1] + room, 2 * GRID) for a in axes)
    cost = array(game.preference(_plane(game, _mesh(x, y)))).reshape(len(y), len(x))
    return (x, y, cost) if np.ptp(cost) > 0 else None


def _summary(equilibrium: Equilibrium, metrics: Mapping[str, Any]) -> Section:
    check, game = metrics["check"], equilibrium.problem
    verdict = check["verdict"]
    seconds = metrics.get("seconds")
    rows: list[tuple[str, object]] = [
        ("Cost, on 32 time steps", check["cost"]["total"]),
        ("Its standard error", check["total_error"]),
        ("The same on 16 time steps", check["coarse"]),
        ("Particles, which training did not see", check["particles"]),
        ("HJB residual, over the cost", percent(check["hjb"])),
        ("Terminal error of the value, over the cost", percent(check["terminal_error"])),
        ("Mass at the end", f"{check['mass']:.3f} +- {check['mass_error']:.2g}"),
        ("Dimensions", game.dim),
        ("Training steps", metrics.get("steps")),
        ("Training time", None if seconds is None else f"{seconds:,.1f} s"),
        ("Weights of the network", sum(p.numel() for p in equilibrium.parameters())),
    ]
    table = [("Quantity", "Value"), *(row for row in rows if row[1] is not None)]
    return Section("Summary", f"{verdict[:1].upper()}{verdict[1:]}.", table=table)


def _costs(game: MeanFieldGame, check: Mapping[str, Any]) -> Section:
    terms = {
        "transport": ("E int |u|^2 / 2 dt", game.transport),
        "preference": ("E int preference(z) dt", 1.0 if game.preference is not None else 0.0),
        "entropy": ("int int rho log rho dx dt", game.entropy),
        "congestion": ("E int (how near others are) dt / 2", game.congestion),
        "terminal": ("KL(density at the end || terminal density)", game.terminal_weight),
    }
    table: list[tuple[object, ...]] = [("Term", "Formula", "Weight", "Weighted cost")]
    table += [
        (name, formula, weight, check["cost"][name])
        for name, (formula, weight) in terms.items()
        if weight
    ]
    table.append(("total", "", "", check["cost"]["total"]))
    told = "What the population pays on average, with the weights, on 32 time steps."
    return Section("Costs by term", told, table=table)


def _densities(
    equilibrium: Equilibrium,
    crowd: Crowd,
    ends: Tensor,
    axes: tuple[np.ndarray, np.ndarray],
    field: Any,
) -> Section:
    from . import games_plots

    game, last = equilibrium.problem, len(crowd.times) - 1
    if game.dim == 2:
        grid = torch.from_numpy(_mesh(*axes))
        told = "exact, by following points back to the start"
        found = [game.source.log_prob(grid)]
        found += [equilibrium.log_density(grid, t * game.horizon) for t in SHOWN[1:]]
        found.append(game.target.log_prob(grid))
        panels = [array(log_rho.exp()).reshape(GRID, GRID) for log_rho in found]
    else:
        told = f"of the first two of {game.dim} coordinates, from {PARTICLES:,} particles"
        clouds = [*(crowd.states[round(t * last)] for t in SHOWN), ends]
        panels = [_smoothed(array(cloud[:, :2]), *axes) for cloud in clouds]
    names = [*(f"time {t * game.horizon:g}" for t in SHOWN), "terminal density"]
    lines = " Lines are the obstacle." if field is not None else ""
    return Section(
        "Densities over time",
        f"Densities, {told}. The last panel is the one to end at.{lines}",
        figure=games_plots.densities(*axes, panels, names, field=field),
    )


def _smoothed(points: np.ndarray, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """A kernel density of points (n, 2) on the grid, (len(y), len(x))."""
    from scipy.ndimage import gaussian_filter

    steps = [a[1] - a[0] for a in (x, y)]
    edges = [np.append(a - h / 2, a[-1] + h / 2) for a, h in zip((x, y), steps, strict=True)]
    counts = np.histogram2d(points[:, 0], points[:, 1], bins=edges)[0]
    widths = SMOOTH * points.std(0) / steps
    return gaussian_filter(counts, widths, mode="constant").T / (len(points) * np.prod(steps))


def _ways(crowd: Crowd, field: Any, run: Path) -> Section:
    """Trajectories and animation."""
    from . import control_plots, games_plots

    times, z = array(crowd.times), array(crowd.states[:, :DOTS, :2])
    gif = write_animation(run, partial(games_plots.crowd, times, z, field=field), len(times))
    plane = ", in the first two coordinates" if crowd.states.shape[2] > 2 else ""
    shades = " Shades are the obstacle." if field is not None else ""
    return Section(
        "Trajectories",
        f"The ways of {WAYS} particles{plane}; colours are times.{shades} Below, {DOTS} of them in "
        "motion, as in animation.gif beside this file.",
        figure=control_plots.paths(times, z[:, :WAYS], field=field),
        animation=gif,
    )


@torch.no_grad()
def _value(equilibrium: Equilibrium, axes: tuple[np.ndarray, np.ndarray]) -> Section:
    """Slices of Phi, and the velocities that follow from it."""
    from . import games_plots

    game = equilibrium.problem
    grid = _plane(game, _mesh(*axes))
    at = _mesh(*(np.linspace(a[0], a[-1], ARROWS + 2)[1:-1] for a in axes))
    times = [t * game.horizon for t in SLICES]
    phi = [array(equilibrium.value(t, grid)).reshape(GRID, GRID) for t in times]
    arrows = [array(equilibrium.velocity(t, _plane(game, at))[:, :2]) for t in times]
    rest = " All other coordinates are at their initial means." if game.dim > 2 else ""
    return Section(
        "Value function",
        f"The cost to go of one particle, from bright (much) to dark, and the velocities that "
        f"follow from it.{rest} Away from the particles it was never learned.",
        figure=games_plots.values(
            *axes, phi, [f"time {t:g}" for t in times], velocities=(at, arrows)
        ),
    )


def _refinement(found: Mapping[str, list[float]]) -> Section:
    from . import games_plots

    steps = [int(n) for n in found["steps"]]
    terms = [name for name in found if name != "steps" and (name == "total" or any(found[name]))]
    table: list[tuple[object, ...]] = [("Time steps", *terms)]
    table += [(n, *(found[name][i] for name in terms)) for i, n in enumerate(steps)]
    return Section(
        "Refinement of time steps",
        "The same particles, followed in more and more steps of time. Where the cost changes, the "
        "paths were learned for few steps, and are not straight.",
        table=table,
        figure=games_plots.refinement(steps, {"total": found["total"]}),
    )
