"""Can an equilibrium be trusted?"""

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from ..control.rollout import rollout
from ..errors import ShapeError
from .equilibrium import fresh

if TYPE_CHECKING:
    from .equilibrium import Equilibrium

COARSE, FINE = 16, 32  # time steps of the costs
TIME_TOLERANCE = 0.02  # change of the total from COARSE to FINE steps, relative
RESIDUAL_TOLERANCE = 0.2  # HJB residual and terminal error, over the total
MASS_TOLERANCE, ERRORS = 0.02, 4.0  # of the mass, and standard errors taken as chance


@dataclass(frozen=True)
class GameCheck:
    """What `equilibrium.check` found, with its verdict in words.

    Costs are means over particles that training did not see. `hjb` is the mean of
    int |d_t Phi - |grad Phi|^2 / (2 transport) + dF / drho| dt, `terminal_error` that of
    |Phi - dG / drho| at the end, both over the total. `mass` is the integral of the density at the
    end, by following particles of the terminal density back, with its standard error.
    """

    problem: str
    particles: int
    cost: dict[str, float]  # by term, on 32 time steps
    total_error: float  # standard error of the total
    coarse: float  # the total on 16 time steps
    few: float  # the total on two
    hjb: float
    terminal_error: float
    mass: float
    mass_error: float
    passed: bool
    verdict: str

    def to_dict(self) -> dict[str, Any]:
        """The fields, JSON-safe."""
        return asdict(self)


@torch.no_grad()
def check_game(
    equilibrium: "Equilibrium", starts: Tensor | None = None, seed: int = 0
) -> GameCheck:
    """See `Equilibrium.check`.

    Args:
        equilibrium: what to judge.
        starts: (batch, dim); 4,096 drawn from the initial density, other than in training, by
            default.
        seed: of all draws.

    Raises:
        ShapeError: `starts` has another shape.
    """
    game = equilibrium.problem
    starts = fresh(game, seed) if starts is None else starts
    if starts.ndim != 2 or starts.shape[1] != game.dim or len(starts) < 2:
        raise ShapeError(f"`starts` must be (batch, {game.dim}), got {tuple(starts.shape)}")
    x = starts.to(equilibrium.like)
    cost, coarse, few = (equilibrium.cost(x, steps=n) for n in (FINE, COARSE, 2))
    path = rollout(game, equilibrium.potential, x, steps=FINE)
    assert (
        game.interaction is not None
        and path.hjb is not None
        and path.log_det is not None
        and path.running_cost is not None
    )
    log_density = game.source.log_prob(x) - path.log_det
    share, variation = game.interaction.terminal(path.z, log_density)
    G = game.terminal_cost(path.z)
    size = max(abs(cost["total"]), 1e-12)
    gap = (equilibrium.value(game.horizon, path.z) - G - variation).abs().mean().item()
    each = path.running_cost + G + share
    back = game.target.sample(len(x), torch.Generator().manual_seed(seed)).to(x)
    ratio = (equilibrium.log_density(back, steps=FINE) - game.target.log_prob(back)).exp().double()
    found: dict[str, Any] = {
        "problem": game.name,
        "particles": len(x),
        "cost": cost,
        "total_error": (each.std() / len(x) ** 0.5).item(),
        "coarse": coarse["total"],
        "few": few["total"],
        "hjb": path.hjb.mean().item() / size,
        "terminal_error": gap / size,
        "mass": ratio.mean().item(),
        "mass_error": (ratio.std() / len(x) ** 0.5).item(),
    }
    findings = _findings(found)
    passed = all(good for good, _ in findings)
    told = "; ".join(text for _, text in findings)
    verdict = f"{game.name}: {'passed' if passed else 'NOT passed'}: {told}"
    return GameCheck(**found, passed=passed, verdict=verdict)


def _findings(found: dict[str, Any]) -> list[tuple[bool, str]]:
    """Each with whether it is good."""
    total = found["cost"]["total"]
    if not np.isfinite([total, found["coarse"]]).all():
        return [(False, "a cost is NOT finite")]
    change = abs(found["coarse"] - total) / max(abs(total), 1e-12)
    good = change <= TIME_TOLERANCE
    findings = [(
        good,
        f"{'resolved' if good else 'NOT resolved'} in time ({COARSE} steps instead of {FINE} "
        f"change the cost by {100 * change:.3g} %)",
    )]  # fmt: skip
    for key, what in (("hjb", "HJB residual"), ("terminal_error", "terminal error of Phi")):
        good = found[key] <= RESIDUAL_TOLERANCE
        size = "" if good else "TOO LARGE, "
        findings.append((good, f"{what} {size}{100 * found[key]:.3g} % of the cost"))
    off = abs(found["mass"] - 1)
    good = off <= max(MASS_TOLERANCE, ERRORS * found["mass_error"])
    findings.append((
        good,
        f"the density at the end {'integrates' if good else 'does NOT integrate'} to "
        f"{found['mass']:.3f} +- {found['mass_error']:.2g}",
    ))  # fmt: skip
    return findings
