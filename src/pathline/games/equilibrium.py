"""The solution of a mean-field game."""

from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from ..control import Policy
from ..control.rollout import rollout
from ..errors import ArgumentError
from .game import MeanFieldGame

if TYPE_CHECKING:
    from .check import GameCheck

PARTICLES = 4096
CHUNK = 8192  # rows moved at once


def fresh(game: MeanFieldGame, seed: int) -> Tensor:
    """Particles from the initial density, (4096, dim), others than training with this seed has."""
    seed = int(np.random.default_rng((seed, 2)).integers(2**62))
    return game.initial(PARTICLES, torch.Generator().manual_seed(seed))


@dataclass(frozen=True)
class Crowd:
    """Particles of a population over time, with the exact log-density at each."""

    times: Tensor  # (steps + 1,)
    states: Tensor  # (steps + 1, batch, dim)
    velocities: Tensor  # (steps + 1, batch, dim)
    log_density: Tensor  # (steps + 1, batch)


class Equilibrium(Policy):
    """The velocity -grad Phi / transport of a mean-field game, and the density that it carries.

    `control.solve` trains one for a `MeanFieldGame`. The arguments are those of `Policy`.
    """

    problem: MeanFieldGame

    def velocity(self, t: Tensor | float, z: Tensor) -> Tensor:
        """dz/dt at time `t` and states `z` (batch, dim), (batch, dim)."""
        return self.control(t, z)

    def crowd(self, x: Tensor, *, steps: int | None = None) -> Crowd:
        """Where particles that start at `x` (batch, dim) are at each time, and the density there.

        Raises:
            ShapeError: `x` has another shape.
        """
        _, x = self._at(0.0, x)
        times = self.times(steps)
        parts = [self._crowd(rows, times) for rows in x.split(CHUNK)]
        states, velocities, log_density = (torch.cat(part, 1) for part in zip(*parts, strict=True))
        return Crowd(times.to(x), states, velocities, log_density)

    @torch.no_grad()
    def _crowd(self, x: Tensor, times: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        log_density = self.problem.source.log_prob(x)
        states, densities = [x], [log_density]
        for first, last in pairwise(range(len(times))):
            leg = self._move(states[-1], times[first : last + 1])
            assert leg.log_det is not None
            log_density = log_density - leg.log_det
            states.append(leg.z)
            densities.append(log_density)
        velocities = [self.control(t, z) for t, z in zip(times, states, strict=True)]
        return torch.stack(states), torch.stack(velocities), torch.stack(densities)

    def _move(self, x: Tensor, times: Tensor) -> Any:
        """Particles and log-determinants without what they pay."""
        free = self.problem.without_interaction()
        return rollout(free, self.potential, x, steps=times)

    @torch.no_grad()
    def push(self, x: Tensor, t: float | None = None, *, steps: int | None = None) -> Tensor:
        """Where particles that start at `x` (batch, dim) are at time `t`, the end by default.

        Raises:
            ShapeError: `x` has another shape.
            ArgumentError: `t` is not within the horizon.
        """
        _, x = self._at(0.0, x)
        times = self._until(t, steps)
        moved = [
            rollout(self.problem, self.potential, rows, steps=times, integrals=False).z
            for rows in x.split(CHUNK)
        ]
        return torch.cat(moved)

    @torch.no_grad()
    def log_density(self, x: Tensor, t: float | None = None, *, steps: int | None = None) -> Tensor:
        """log rho at `x` (batch, dim) and time `t`, the end by default, (batch,): exact up to the
        time steps, by following the particles back to where they started.

        Raises:
            ShapeError: `x` has another shape.
            ArgumentError: `t` is not within the horizon.
        """
        _, x = self._at(0.0, x)
        times = self._until(t, steps)
        found = []
        for rows in x.split(CHUNK):
            path = self._move(rows, times.flip(0))
            assert path.log_det is not None
            found.append(self.problem.source.log_prob(path.z) + path.log_det)
        return torch.cat(found)

    def density(self, x: Tensor, t: float | None = None) -> Tensor:
        """rho at `x` (batch, dim) and time `t`, the end by default, (batch,); see `log_density`."""
        return self.log_density(x, t).exp()

    def _until(self, t: float | None, steps: int | None) -> Tensor:
        """Times from 0 to `t`, at least as close as those of simulations."""
        horizon = self.problem.horizon
        t = horizon if t is None else float(t)
        if not 0 <= t <= horizon:
            raise ArgumentError(f"`t` must lie between 0 and {horizon:g}, got {t!r}")
        count = max(1, round((self.steps if steps is None else steps) * t / horizon))
        return torch.linspace(0, t, count + 1, dtype=torch.float64)

    def cost(self, x: Tensor | None = None, *, steps: int = 32, seed: int = 0) -> dict[str, float]:
        """What the population pays on average, by term, each with its weight, and in total.

        Args:
            x: particles at time 0, (batch, dim); by default 4,096 drawn from the initial density,
                others than in training.
            steps: in time, even.
            seed: of the draw.

        Returns:
            `transport`, `preference`, `entropy`, `congestion`, `terminal` and their sum, `total`.

        Raises:
            ArgumentError: `steps` is not even or not positive.
        """
        if steps < 2 or steps % 2:
            raise ArgumentError(f"`steps` must be even and at least 2, got {steps}")
        game = self.problem
        if x is None:
            x = fresh(game, seed)
        crowd = self.crowd(x, steps=steps)
        terms = game.terms(crowd.states, crowd.velocities, crowd.log_density)
        # Simpson's rule.
        weights = torch.full((steps + 1,), 2.0, dtype=torch.float64)
        weights[1::2], weights[0], weights[-1] = 4, 1, 1
        weights *= game.horizon / (3 * steps)
        found = {name: float(weights @ rate.double().cpu()) for name, rate in terms.items()}
        _, ends = crowd.times, crowd.states[-1]
        gap = crowd.log_density[-1] - game.target.log_prob(ends)
        found["terminal"] = game.terminal_weight * gap.double().mean().item()
        return found | {"total": sum(found.values())}

    def check(  # type: ignore[override]
        self, starts: Tensor | None = None, *, seed: int = 0
    ) -> "GameCheck":
        """Whether the equilibrium can be trusted: costs on held-out particles and finer time
        grids, residual of the HJB equation, terminal condition, and mass.

        Args:
            starts: (rows, dim); new ones of the initial density by default.
            seed: of all draws.
        """
        from .check import check_game  # which follows an equilibrium

        return check_game(self, starts, seed)
