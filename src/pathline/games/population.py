"""The solution of a stochastic mean-field game."""

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import Generator, Tensor

from ..control import Policy, Rollout, Simulation
from ..control.rollout import brownian
from ..errors import ArgumentError, ShapeError
from .alternation import walk
from .stochastic import StochasticGame

PARTICLES = 4096
TIME_TOLERANCE = 0.02  # change of the cost on twice the time steps, relative
RESIDUAL_TOLERANCE = 0.2  # HJB residual and terminal error, over the cost
VALUE_TOLERANCE, ERRORS = 0.02, 4.0  # of the value, relative, and standard errors taken as chance


class Population(Policy):
    """The velocity -grad phi / transport of a stochastic game, and the particles that follow it.

    `solve_alternating` trains one. The arguments are those of `Policy`.
    """

    problem: StochasticGame

    def velocity(self, t: Tensor | float, z: Tensor) -> Tensor:
        """The drift of agents at time `t` and states `z` (batch, dim), (batch, dim)."""
        return self.control(t, z)

    def push(
        self, x: Tensor, t: float | None = None, *, steps: int | None = None, seed: int = 0
    ) -> Tensor:
        """Where particles that start at `x` (batch, dim) are at time `t`, the end by default,
        with the noise of `seed`.

        Raises:
            ShapeError: `x` has another shape.
            ArgumentError: `t` is not within the horizon.
        """
        horizon = self.problem.horizon
        t = horizon if t is None else float(t)
        if not 0 <= t <= horizon:
            raise ArgumentError(f"`t` must lie between 0 and {horizon:g}, got {t!r}")
        count = max(1, round((self.steps if steps is None else steps) * t / horizon))
        times = torch.linspace(0, t, count + 1, dtype=torch.float64)
        return self._walk(x, times, seed, integrals=False).z

    def sample(
        self, count: int, t: float | None = None, *, steps: int | None = None, seed: int = 0
    ) -> Tensor:
        """Particles of the population at time `t`, the end by default, (count, dim).

        Raises:
            ArgumentError: `t` is not within the horizon.
        """
        x = self.problem.initial(count, Generator().manual_seed(seed))
        return self.push(x, t, steps=steps, seed=seed)

    @torch.no_grad()
    def simulate(  # type: ignore[override]
        self, x0: Tensor | None = None, *, steps: int | None = None, noise_seed: int = 0
    ) -> Simulation:
        """Follow the population from `x0`; its particles are those that meet.

        Args:
            x0: starts, (batch, dim), at least two; 4,096 new ones by default.
            steps: in time.
            noise_seed: of the noise, and of new starts.

        Raises:
            ShapeError: `x0` has another shape.
        """
        if x0 is None:
            x0 = self.problem.initial(PARTICLES, Generator().manual_seed(noise_seed))
        if x0.ndim != 2 or len(x0) < 2:
            raise ShapeError(f"`x0` must be (batch, {self.problem.dim}), got {tuple(x0.shape)}")
        times = self.times(steps)
        path = self._walk(x0, times, noise_seed, trajectory=True)
        states = path.trajectory
        assert states is not None and path.running_cost is not None
        u = [self.control(t, z) for t, z in zip(times[:-1], states[:-1], strict=True)]
        ends, free = self.problem.terminal_cost(path.z), self.problem.clearance(path.z)
        return Simulation(times.to(states), states, torch.stack(u), path.running_cost, ends, free)

    @torch.no_grad()
    def _walk(self, x: Tensor, times: Tensor, seed: int, **wanted: bool) -> Rollout:
        _, x = self._at(0.0, x)
        increments = brownian(self.problem, times, len(x), np.random.default_rng(seed))
        return walk(self.problem, self.potential, x, times, increments, **wanted)

    def check(  # type: ignore[override]
        self, starts: Tensor | None = None, *, seed: int = 0
    ) -> "PopulationCheck":
        """Whether population and agent are in equilibrium, by new particles on finer time grids:
        residual of the HJB equation, terminal condition, and whether agents pay what they expect.

        Args:
            starts: (rows, dim); 4,096 new ones by default.
            seed: of all draws.
        """
        return check_population(self, starts, seed)


@dataclass(frozen=True)
class PopulationCheck:
    """What `population.check` found, with its verdict in words.

    Means over particles that training did not see, given the population. `value` is that of
    phi(0, .), `hjb` that of int |d_t phi + nu lap phi - H + preference + crowding| dt, and
    `terminal_error` that of |phi(T) - terminal_cost|, both over the size of the cost.
    """

    problem: str
    particles: int
    cost: float  # of an agent
    coarse: float  # on half the time steps
    value: float
    value_error: float  # standard error of its difference to the cost
    hjb: float
    terminal_error: float
    passed: bool
    verdict: str

    def to_dict(self) -> dict[str, Any]:
        """The fields, JSON-safe."""
        return asdict(self)


@torch.no_grad()
def check_population(
    population: Population, starts: Tensor | None = None, seed: int = 0
) -> PopulationCheck:
    """See `Population.check`."""
    game = population.problem
    fresh = int(np.random.default_rng((seed, 2)).integers(2**62))
    x = game.initial(PARTICLES, Generator().manual_seed(fresh)) if starts is None else starts
    if x.ndim != 2 or x.shape[1] != game.dim or len(x) < 2:
        raise ShapeError(f"`starts` must be (batch, {game.dim}), got {tuple(x.shape)}")
    x = x.to(population.like)
    fine, coarse = (population._walk(x, population.times(n), fresh) for n in _grids(population))
    assert fine.running_cost is not None and coarse.running_cost is not None
    assert fine.hjb is not None
    G = game.terminal_cost(fine.z)
    cost, phi = fine.running_cost + G, population.value(0.0, x)
    size = max(cost.abs().mean().item(), 1e-12)
    off = (population.value(game.horizon, fine.z) - G).abs().mean().item()
    found: dict[str, Any] = {
        "problem": game.name,
        "particles": len(x),
        "cost": cost.mean().item(),
        "coarse": (coarse.running_cost + game.terminal_cost(coarse.z)).mean().item(),
        "value": phi.mean().item(),
        "value_error": ((phi - cost).std() / len(x) ** 0.5).item(),
        "hjb": fine.hjb.mean().item() / size,
        "terminal_error": off / size,
    }
    findings = _findings(found, size)
    passed = all(good for good, _ in findings)
    told = "; ".join(text for _, text in findings)
    verdict = f"{game.name}: {'passed' if passed else 'NOT passed'}: {told}"
    return PopulationCheck(**found, passed=passed, verdict=verdict)


def _grids(population: Population) -> tuple[int, int]:
    return 2 * population.steps, population.steps


def _findings(found: dict[str, Any], size: float) -> list[tuple[bool, str]]:
    """Each with whether it is good."""
    if not np.isfinite([found["cost"], found["coarse"], found["value"]]).all():
        return [(False, "a cost is NOT finite")]
    change = abs(found["coarse"] - found["cost"]) / size
    good = change <= TIME_TOLERANCE
    findings = [(
        good,
        f"{'resolved' if good else 'NOT resolved'} in time (half the steps change the cost by "
        f"{100 * change:.3g} %)",
    )]  # fmt: skip
    gap = abs(found["value"] - found["cost"])
    good = gap <= max(VALUE_TOLERANCE * size, ERRORS * found["value_error"])
    findings.append((
        good,
        f"agents {'pay' if good else 'do NOT pay'} what they expect ({found['cost']:.5g} and "
        f"{found['value']:.5g})",
    ))  # fmt: skip
    for key, what in (("hjb", "HJB residual"), ("terminal_error", "terminal error of phi")):
        good = found[key] <= RESIDUAL_TOLERANCE
        note = "" if good else "TOO LARGE, "
        findings.append((good, f"{what} {note}{100 * found[key]:.3g} % of the cost"))
    return findings
