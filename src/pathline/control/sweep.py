"""Differential dynamic programming: a quadratic value function around its own closed loop."""

import torch
from torch import Tensor

from ..errors import SolveError
from .problem import Problem
from .riccati import QuadraticValue, riccati_value
from .rollout import rollout
from .transcription import OpenLoop

SWEEPS = 4
GAIN = 1e-3  # of the cost: a sweep that gains less is the last


def improve(problem: Problem, value: QuadraticValue, steps: int) -> QuadraticValue:
    """Expand again around the path that the feedback of `value` takes from the nominal start, and
    again, while that lowers its cost.

    Where dynamics are unstable a path is found by its feedback rather than by open-loop controls.

    Args:
        problem: the control problem, without its noise.
        value: to begin with; its closed loop must be stable.
        steps: in time, of the paths.

    Source: Jacobson and Mayne, Differential Dynamic Programming, 1970.
    """
    path = closed_loop(problem, value, steps)
    for _ in range(SWEEPS):
        try:
            other = riccati_value(problem, path)
        except SolveError:
            break
        after = closed_loop(problem, other, steps)
        if not after.cost < path.cost:
            break
        gain, value, path = 1 - after.cost / path.cost, other, after
        if gain < GAIN:
            break
    return value


@torch.no_grad()
def closed_loop(problem: Problem, value: QuadraticValue, steps: int) -> OpenLoop:
    """The path that the feedback of `value` takes from the nominal start, with its controls at the
    middles of the steps."""
    value = value.double()
    x = problem.nominal()[None]
    run = rollout(problem, value, x, steps=steps, density=False, trajectory=True)
    assert run.trajectory is not None and run.running_cost is not None
    states = run.trajectory[:, 0]
    times = torch.linspace(0, problem.horizon, steps + 1, dtype=torch.float64)
    derivatives = value.bind()

    def slope(t: Tensor, z: Tensor) -> Tensor:
        grad = derivatives(z[None], t, value=False, dt=False, laplacian=False).grad
        assert grad is not None
        return grad[0]

    costates = torch.stack([slope(t, z) for t, z in zip(times, states, strict=True)])
    controls = torch.cat(
        [
            problem.feedback(t, z[None], p[None])
            for t, z, p in zip(times, states, costates, strict=True)
        ]
    )
    terminal = problem.terminal_cost(run.z)
    return OpenLoop(
        (run.running_cost + terminal).item(),
        run.running_cost.item(),
        terminal.item(),
        times,
        states,
        costates,
        (controls[1:] + controls[:-1]) / 2,
        0,
        "closed loop",
    )
