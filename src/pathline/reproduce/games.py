"""Mean-field games: costs beside exact ones, and what the HJB penalties are for.

Source: Ruthotto, Osher, Li, Nurbekyan, Wu Fung, A machine learning framework for solving
high-dimensional mean field game and mean field control problems, PNAS 2020 (arXiv 1912.01825).
"""

from dataclasses import dataclass, replace

from ..control.problems import settings
from ..games.problems import make
from ..games_report import finish_game
from ..models import NAMED
from ..report import Section
from .control import solve_named
from .experiment import Outcome, RunArguments
from .race import RunFolder, columns

PAPER = "Ruthotto et al. (arXiv 1912.01825)"
DIMS = (10, 50, 100)
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
    _, metrics = solve_named(name, arguments, size, {"dim": dim}, finish=finish_game)
    check = metrics["check"]
    cost = check["cost"]
    rows = [[term, f"{value:.4f}"] for term, value in cost.items() if value]
    text = (
        f"{columns(rows)}\nstandard error of the total: {check['total_error']:.3f}\n"
        f"{check['verdict']}"
    )
    return Outcome(cost["total"], figure.published, figure.source, text, dict(metrics))


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
        part = arguments.out / "checkpoint" / label.replace(" ", "-")
        own = RunArguments(part, arguments.seed, arguments.max_steps, None, True)
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
