"""Stochastic mean-field games: what noise and dimension change."""

from pathlib import Path

import torch

from ..games import Population, solve_alternating
from ..games.problems import stochastic_crowd
from ..report import Section
from .experiment import Outcome, RunArguments
from .race import RunFolder, columns

APAC = "the problem of Lin et al. (arXiv 2002.10113)"
VISCOSITIES, DIMS = (0.0, 0.1, 0.4), (2, 50, 100)
USUAL = 0.1  # viscosity where the dimension changes
TIMES = (0.25, 0.5, 0.75, 1.0)
PARTICLES, STEPS = 8192, 32
TURNS = {"small": 1500, "full": 6000}


def run_stochastic(arguments: RunArguments, size: str) -> Outcome:
    """A crowd in noise: means and variances of its place over time, for several viscosities and
    dimensions; the measured figure is the largest distance of mean places between dimensions."""
    from ..plots import curves

    folder = RunFolder.open("mfg-stochastic", arguments, size)
    if folder.done:
        return folder.done
    cases = [(2, nu) for nu in VISCOSITIES] + [(dim, USUAL) for dim in DIMS[1:]]
    table: list[list[str]] = [["dim", "viscosity", "time", "mean", "variances", "verdict"]]
    moments: dict[tuple[int, float], list[tuple[torch.Tensor, torch.Tensor]]] = {}
    for dim, nu in cases:
        part = arguments.out / "checkpoint" / f"{dim}-{nu:g}"
        population = _solve(dim, nu, part, arguments, size)
        verdict = "passed" if population.check().passed else "NOT passed"
        moments[dim, nu] = []
        for t in TIMES:
            z = population.sample(PARTICLES, t, steps=STEPS, seed=arguments.seed + 1)[:, :2]
            mean, variance = z.mean(0), z.var(0)
            moments[dim, nu].append((mean, variance))
            shown = [" ".join(f"{v:.3f}" for v in part) for part in (mean, variance)]
            table.append([str(dim), f"{nu:g}", f"{t:g}", *shown, verdict])
    widths = {
        f"viscosity {nu:g}": (TIMES, [v.sum().item() for _, v in moments[2, nu]])
        for nu in VISCOSITIES
    }
    ways = {f"d = {dim}": (TIMES, [m[1].item() for m, _ in moments[dim, USUAL]]) for dim in DIMS}
    apart = max(
        (a[0] - b[0]).norm().item()
        for dim in DIMS[1:]
        for a, b in zip(moments[dim, USUAL], moments[2, USUAL], strict=True)
    )
    told = (
        f"Means and variances of the first two coordinates of {PARTICLES:,} particles. Agents pass "
        "an obstacle and pay for being close to others; the other coordinates only diffuse."
    )
    sections = [
        Section("Moments", told, table=table),
        Section("Noise widens the crowd", figure=curves(
            widths, "time", "sum of both variances", "Two dimensions")),
        Section("The dimension changes nothing", figure=curves(
            ways, "time", "mean of y", f"Viscosity {USUAL:g}")),
    ]  # fmt: skip
    details = {
        f"{dim}, {nu:g}": [(m.tolist(), v.tolist()) for m, v in found]
        for (dim, nu), found in moments.items()
    }
    text = f"{columns(table)}\n{told}\nmeans between dimensions differ by at most {apart:.4f}"
    return folder.write(Outcome(apart, None, APAC, text, details), "A crowd in noise", sections)


def _solve(dim: int, nu: float, part: Path, arguments: RunArguments, size: str) -> Population:
    steps = arguments.max_steps or TURNS[size]
    game = stochastic_crowd(dim, nu)
    return solve_alternating(game, out=part, seed=arguments.seed, resume=True, max_steps=steps)
