"""SIR: an epidemic in a million people, of whom a thousand are tested every 17 days.

ds/dt = -beta s i, di/dt = beta s i - gamma i for the shares s of susceptible and i of infected
people. It is solved for (s, log i), so that i keeps its relative accuracy from one person on.
"""

import numpy as np
import torch
from torch import Tensor

from .gaussian import SOURCE
from .priors import LogNormal
from .simulator import Simulator
from .trajectories import trajectories

POPULATION, TESTED = 1_000_000, 1000
TIMES = 17.0 * np.arange(10)  # days


def velocity(z: Tensor, theta: Tensor) -> Tensor:
    (s, log_i), (beta, gamma) = z.unbind(1), theta.unbind(1)
    return torch.stack((-beta * s * log_i.exp(), beta * s - gamma), 1)


def infected(theta: np.ndarray) -> np.ndarray:
    """Share of infected people (n, 10) on the days of the tests."""
    first = 1 / POPULATION
    z = trajectories(velocity, (1 - first, np.log(first)), TIMES, theta)
    return np.exp(z[:, :, 1]).clip(0.0, 1.0)


def simulate(theta: np.ndarray, generator: np.random.Generator) -> np.ndarray:
    """The number of positive tests on each day, (n, 10)."""
    share = infected(theta)
    solved = np.isfinite(share)
    return np.where(solved, generator.binomial(TESTED, np.where(solved, share, 0.0)), np.nan)


def log_likelihood(theta: np.ndarray, x: np.ndarray) -> np.ndarray:
    """Binomial, without its coefficient."""
    share = infected(theta)
    with np.errstate(divide="ignore", invalid="ignore"):
        positive = np.where(x > 0, x * np.log(share), 0.0)
        negative = np.where(x < TESTED, (TESTED - x) * np.log1p(-share), 0.0)
    return (positive + negative).sum(1)


SIR = Simulator(
    name="sir",
    parameters=("beta", "gamma"),
    context_dim=len(TIMES),
    prior=LogNormal((np.log(0.4), np.log(0.125)), (0.5, 0.2)),
    model=simulate,
    likelihood=log_likelihood,
    source=f"{SOURCE}, T.9",
)
