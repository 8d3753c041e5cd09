"""Solutions of an ODE for many parameters at once."""

from collections.abc import Callable, Sequence
from functools import partial

import numpy as np
import torch
from torch import Tensor

from ...integrate import odeint

ROWS = 4000  # solved at a time: few enough for the cache, enough to make each operation worth it
TOLERANCE = 1e-7  # of a step, absolute, in the variables that are solved for
MAX_STEPS = 10_000  # of one row; the priors of the tasks need some hundreds

Velocity = Callable[[Tensor, Tensor], Tensor]  # (z (n, states), theta (n, dim)) -> (n, states)


def trajectories(
    velocity: Velocity,
    start: Sequence[float],
    times: np.ndarray,
    theta: np.ndarray,
) -> np.ndarray:
    """Solve dz/dt = velocity(z, theta), z(times[0]) = start, for each row of theta.

    Each row takes steps of its own, so its solution does not depend on the other rows; where it
    can't be solved it is NaN.

    Args:
        velocity: `(z (n, states), theta (n, dim)) -> (n, states)`; it does not depend on time.
        start: (states,), the same for all rows.
        times: (times,), increasing.
        theta: (n, dim).

    Returns:
        (n, times, states).
    """
    t, z0 = torch.as_tensor(times), torch.tensor(start, dtype=torch.float64)
    solved = np.empty((len(theta), len(times), len(start)))
    for first in range(0, len(theta), ROWS):
        rows = torch.as_tensor(theta[first : first + ROWS])
        with torch.no_grad():
            solution = odeint(
                partial(_autonomous, velocity, rows),
                z0.repeat(len(rows), 1),
                t,
                method="dopri8",
                rtol=0.0,
                atol=TOLERANCE,
                options={"max_num_steps": MAX_STEPS},
                batch="independent",
                solution=True,
            )
        solved[first : first + ROWS] = solution.values.transpose(0, 1).numpy()
    return solved


def _autonomous(velocity: Velocity, theta: Tensor, t: Tensor, z: Tensor) -> Tensor:
    return velocity(z, theta)
