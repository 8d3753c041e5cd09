"""Open-loop solutions from one start, to measure how far from optimal a policy is."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from scipy.optimize import OptimizeResult, minimize
from torch import Tensor

from ..calculus import gradient
from ..errors import ArgumentError, ShapeError
from .problem import Problem

WAVES = 4  # of a perturbation
LEAST_STEPS = 10  # of the coarse grid


@dataclass(frozen=True)
class OpenLoop:
    """A local minimum of the cost from one start, on equal time steps."""

    cost: float
    running_cost: float
    terminal_cost: float
    times: Tensor  # (steps + 1,)
    states: Tensor  # (steps + 1, dim)
    costates: Tensor  # (steps + 1, dim), the gradient of the cost to go with respect to the state
    controls: Tensor  # (steps, control_dim), constant on each step
    iterations: int
    message: str  # of the optimiser


def transcribe(
    problem: Problem,
    x: Tensor | Sequence[float] | None = None,
    *,
    steps: int = 50,
    guesses: int = 3,
    controls: Tensor | None = None,
    seed: int = 0,
    max_iterations: int = 2000,
) -> OpenLoop:
    """The best of several local minima over controls that are constant on each time step.

    Direct single shooting: classical RK4 for the state, Simpson's rule for the running cost, both
    in double precision; gradients by automatic differentiation, SciPy's L-BFGS-B for the minimum,
    within `control_bounds`. Noise is left out.

    Args:
        problem: what to solve.
        x: the start, (dim,); the nominal one by default.
        steps: of equal length.
        guesses: descents on a coarse grid from the best controls so far, perturbed by smooth
            functions of time, after one from zero; the best of all is refined. Where the problem
            has a `guess`, one descent from there takes their place.
        controls: a first guess of your own, (steps, control_dim), such as those of a policy.
        seed: of the random guesses.
        max_iterations: of each descent.

    Raises:
        ShapeError: `x`, `controls` or the problem's `guess` has another shape.
        ArgumentError: `steps` is less than one.
    """
    if steps < 1:
        raise ArgumentError(f"`steps` must be at least 1, got {steps}")
    start = problem.nominal() if x is None else torch.as_tensor(x, dtype=torch.float64)
    if start.shape != (problem.dim,):
        raise ShapeError(f"`x` must be ({problem.dim},), got {tuple(start.shape)}")
    shape = (steps, problem.control_dim)
    guess = problem.guess(steps)
    for name, given in (("controls", controls), (f"{type(problem).__name__}.guess", guess)):
        if given is not None and tuple(given.shape) != shape:
            raise ShapeError(f"`{name}` must be {shape}, got {tuple(given.shape)}")
    if guess is None:
        first = _search(problem, start, steps, guesses, seed, max_iterations)
    else:
        first = guess.double().cpu().numpy()
    best = _descend(problem, start, first, max_iterations)
    if controls is not None:
        other = _descend(problem, start, controls.double().cpu().numpy(), max_iterations)
        best = min(best, other, key=_value)
    u = torch.from_numpy(best.x.reshape(shape))
    with torch.no_grad():
        states, running, terminal = shoot(problem, start, u)
    times = torch.linspace(0, problem.horizon, steps + 1, dtype=torch.float64)
    return OpenLoop(
        (running + terminal).item(), running.item(), terminal.item(), times,
        torch.cat(states), _costates(problem, states, u), u, int(best.nit),
        str(best.message),
    )  # fmt: skip


def _search(
    problem: Problem, start: Tensor, steps: int, guesses: int, seed: int, max_iterations: int
) -> np.ndarray:
    """The best of several descents on a coarse grid, as controls (steps, control_dim)."""
    coarse, k = max(LEAST_STEPS, steps // 3), problem.control_dim
    rng = np.random.default_rng(seed)
    waves = np.cos(np.pi * np.outer(np.linspace(0, 1, coarse), np.arange(WAVES)))
    best = _descend(problem, start, np.zeros((coarse, k)), max_iterations)
    for _ in range(guesses):
        size = np.sqrt(np.mean(best.x**2)) * waves @ rng.standard_normal((WAVES, k))
        other = _descend(problem, start, best.x.reshape(-1, k) + size, max_iterations)
        best = min(best, other, key=_value)
    return best.x.reshape(-1, k)[np.arange(steps) * coarse // steps]


def _descend(
    problem: Problem, start: Tensor, first: np.ndarray, max_iterations: int
) -> OptimizeResult:
    """From the controls `first`, (steps, control_dim), to a local minimum."""
    limits = problem.limits(start)
    bounds = None
    if limits is not None:
        bounds = list(zip(*(np.tile(limit.numpy(), len(first)) for limit in limits), strict=True))

    def cost(flat: np.ndarray) -> tuple[float, np.ndarray]:
        u = torch.from_numpy(flat.reshape(first.shape)).requires_grad_(True)
        _, running, terminal = shoot(problem, start, u)
        (slope,) = torch.autograd.grad(running + terminal, u)
        return (running + terminal).item(), slope.numpy().ravel()

    options = {"maxiter": max_iterations, "maxfun": 4 * max_iterations, "maxcor": 30}
    return minimize(
        cost, first.ravel(), jac=True, method="L-BFGS-B", bounds=bounds, options=options
    )


def shoot(problem: Problem, x: Tensor, controls: Tensor) -> tuple[list[Tensor], Tensor, Tensor]:
    """States, each (1, dim), running and terminal cost under piecewise constant controls."""
    steps = len(controls)
    h = problem.horizon / steps
    z = x[None]
    states, total = [z], x.new_zeros(())
    for n, u in enumerate(controls[:, None]):
        z, L = advance(problem, n * h, h, z, u)
        total = total + L[0]
        states.append(z)
    return states, total, problem.terminal_cost(z)[0]


@torch.enable_grad()
def _costates(problem: Problem, states: list[Tensor], controls: Tensor) -> Tensor:
    """Of the cost from each state on: a state also counts in the cost of the step before."""
    h = problem.horizon / len(controls)
    end = states[-1].clone().requires_grad_(True)
    found = [gradient(problem.terminal_cost(end), end).detach()]
    for n in reversed(range(len(controls))):
        z = states[n].clone().requires_grad_(True)
        after, L = advance(problem, n * h, h, z, controls[n : n + 1])
        (slope,) = torch.autograd.grad(L.sum() + (found[0] * after).sum(), z)
        found.insert(0, slope)
    return torch.cat(found)


def advance(problem: Problem, time: float, h: float, z: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
    """States (batch, dim) after a step under the constant controls `u`, (batch, control_dim), by
    RK4, and the running cost of the step by Simpson's rule, (batch,)."""
    t = [z.new_tensor(time + part * h) for part in (0.0, 0.5, 1.0)]
    k1 = problem.dynamics(t[0], z, u)
    k2 = problem.dynamics(t[1], z + h / 2 * k1, u)
    k3 = problem.dynamics(t[1], z + h / 2 * k2, u)
    k4 = problem.dynamics(t[2], z + h * k3, u)
    after = z + h / 6 * (k1 + 2 * k2 + 2 * k3 + k4)
    # The midpoint of the cubic through both ends, of third order.
    middle = (z + after) / 2 + h / 8 * (k1 - problem.dynamics(t[2], after, u))
    L = [problem.running_cost(s, y, u) for s, y in zip(t, (z, middle, after), strict=True)]
    return after, h / 6 * (L[0] + 4 * L[1] + L[2])


def _value(result: OptimizeResult) -> float:
    return float(result.fun) if np.isfinite(result.fun) else np.inf
