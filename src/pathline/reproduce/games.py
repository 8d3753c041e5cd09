"""Mean-field games: costs beside exact ones, and what the HJB penalties are for.

Source: Ruthotto, Osher, Li, Nurbekyan, Wu Fung, A machine learning framework for solving
high-dimensional mean field game and mean field control problems, PNAS 2020 (arXiv 1912.01825).
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..control.problems import settings
from ..games import Equilibrium, EulerianGame
from ..games.problems import OBSTACLE, make
from ..games_report import finish_game
from ..models import NAMED
from ..report import Section
from .control import solve_named
from .experiment import Outcome, RunArguments
from .race import RunFolder, columns

PAPER = "Ruthotto et al. (arXiv 1912.01825)"
DIMS = (10, 50, 100)
FRESH = 30_000  # particles on which costs are judged
BOX, CELLS = ((-3.0, 3.0), (-5.625, 5.625)), (64, 120)  # of the crowd on a grid
FEW = 2  # time steps of the ablation
WITH, WITHOUT = "with HJB penalties", "without"


@dataclass(frozen=True)
class Figure:
    """What the total cost is compared with; smaller is better."""

    label: str
    published: float | None
    source: str
    dims: tuple[int, ...] = ()  # beside two


FIGURES = {
    "transport": Figure(
        "total cost, in every dimension 10.67",
        10.67,
        f"the problem of {PAPER}; the optimum by semi-relaxed Sinkhorn on a grid: transport "
        "10.04, terminal 0.63",
        DIMS,
    ),
    "crowd-motion": Figure("total cost", None, f"the problem of {PAPER}", DIMS),
    "shift": Figure(
        "total cost, 16.98 at the optimum",
        16.98,
        "the optimum in closed form: transport 16.02, terminal 0.961",
    ),
}


def run(name: str, dim: int | None, arguments: RunArguments, size: str) -> Outcome:
    """Solve the game `name`; size full trains five times as long."""
    figure = FIGURES[name]
    found, metrics = solve_named(name, arguments, size, {"dim": dim}, finish=finish_game)
    assert isinstance(found, Equilibrium)
    particles = found.problem.initial(FRESH, torch.Generator().manual_seed(FRESH))
    cost = found.cost(particles)
    rows = [[term, f"{value:.4f}"] for term, value in cost.items() if value]
    text = f"{columns(rows)}\nof {FRESH:,} fresh particles\n{metrics['check']['verdict']}"
    more = {"fresh": cost}
    if name == "crowd-motion" and found.problem.dim == 2:
        table, more["eulerian"] = eulerian(found)
        text += f"\n{columns(table)}"
    return Outcome(cost["total"], figure.published, figure.source, text, dict(metrics) | more)


def eulerian(found: Equilibrium) -> tuple[list[list[str]], dict[str, Any]]:
    """A crowd in the plane beside the solution of the same game on a grid. Both velocities also
    move the same density by the same scheme."""
    game = found.problem

    def on_points(function: Callable[[Tensor], Tensor]) -> Callable[[np.ndarray], np.ndarray]:
        return lambda points: function(torch.from_numpy(points)).numpy()

    grid = EulerianGame(
        initial=on_points(game.source.log_prob), terminal=on_points(game.target.log_prob),
        box=BOX, cells=CELLS, steps=CELLS[0] // 2, transport=game.transport,
        terminal_weight=game.terminal_weight, entropy=game.entropy,
        preference=None if game.preference is None else on_points(game.preference),
    )  # fmt: skip

    def ours(t: float, points: np.ndarray) -> np.ndarray:
        return found.velocity(t, torch.from_numpy(points)).detach().double().numpy()

    solved = grid.solve()
    ways = {"grid": solved.velocity, "equilibrium": ours}
    axes = tuple(variance**0.5 for variance in OBSTACLE)
    pushed = {name: grid.push(velocity) for name, velocity in ways.items()}
    middle = len(pushed["grid"].rho) // 2
    rows = {
        "total of the solution": {"grid": solved.cost.total, "equilibrium": found.cost()["total"]},
        "total, pushed": {name: p.cost.total for name, p in pushed.items()},
        "mean preference, pushed": {name: p.cost.preference for name, p in pushed.items()},
        "in the obstacle at half-time": {
            name: grid.share_inside(p.rho[middle], axes) for name, p in pushed.items()
        },
    }
    table = [["", *ways]]
    table += [[row, *(f"{value[name]:.4f}" for name in ways)] for row, value in rows.items()]
    return table, rows


def run_ablation(arguments: RunArguments, size: str) -> Outcome:
    """Two equilibria trained with two time steps, one with the penalties of the HJB equation, are
    followed in more; the measured figure is how much that changes the cost of the first."""
    from ..games_plots import refinement

    folder = RunFolder.open("mfg-hjb-ablation", arguments, size)
    if folder.done:
        return folder.done
    usual = settings(make("transport"), NAMED)["weights"]
    weights = {WITH: usual, WITHOUT: replace(usual, hjb=0.0, terminal=0.0)}
    totals: dict[str, list[float]] = {}
    steps: list[int] = []
    for label, chosen in weights.items():
        own = arguments.part(label)
        changed = {"steps": FEW, "weights": chosen}
        _, metrics = solve_named("transport", own, size, changed=changed, finish=finish_game)
        found = metrics["refinement"]
        totals[label], steps = found["total"], found["steps"]
    changes = {name: abs(total[0] / total[-1] - 1) for name, total in totals.items()}
    table: list[list[str]] = [["time steps", *totals]]
    table += [[str(n), *(f"{t[i]:.4f}" for t in totals.values())] for i, n in enumerate(steps)]
    table.append(["change", *(f"{100 * change:.2f} %" for change in changes.values())])
    told = (
        "Total cost of eight Gaussians that move to one, in two dimensions. Both were trained "
        f"with {FEW} time steps, and their particles are followed in more; the last row is how far "
        "the first figure is from the last."
    )
    sections = [
        Section("Refinement of time steps", told, table=table, figure=refinement(steps, totals))
    ]
    details = {"steps": steps, "totals": totals, "changes": changes}
    text = f"{columns(table)}\n{told}"
    outcome = Outcome(changes[WITH], None, PAPER, text, details)
    return folder.write(outcome, "Penalties of the HJB equation", sections)
