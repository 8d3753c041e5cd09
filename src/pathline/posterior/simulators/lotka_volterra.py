"""Lotka-Volterra: prey and predators, observed ten times each with 10 % of log-normal noise.

dX/dt = alpha X - beta X Y, dY/dt = -gamma Y + delta X Y. It is solved for the logarithms, so that
small populations keep their relative accuracy and stay positive.
"""

import numpy as np
import torch
from torch import Tensor

from .gaussian import SOURCE
from .priors import LogNormal
from .simulator import Simulator
from .trajectories import trajectories

START = (30.0, 1.0)
NOISE = 0.1
TIMES = 2.1 * np.arange(10)  # every 21st of the benchmark's steps of 0.1 up to time 20


def velocity(z: Tensor, theta: Tensor) -> Tensor:
    (prey, predators), (alpha, beta, gamma, delta) = z.exp().unbind(1), theta.unbind(1)
    return torch.stack((alpha - beta * predators, delta * prey - gamma), 1)


def log_populations(theta: np.ndarray) -> np.ndarray:
    """Logarithms of the prey's ten numbers, then of the predators', (n, 20), within the
    benchmark's bounds."""
    z = trajectories(velocity, tuple(np.log(START)), TIMES, theta)
    return np.concatenate((z[:, :, 0], z[:, :, 1]), 1).clip(np.log(1e-10), np.log(1e4))


def simulate(theta: np.ndarray, generator: np.random.Generator) -> np.ndarray:
    mean = log_populations(theta)
    return np.exp(mean + NOISE * generator.standard_normal(mean.shape))


def log_likelihood(theta: np.ndarray, x: np.ndarray) -> np.ndarray:
    """Log-normal, without the term of the Jacobian, which is a function of x."""
    z = (np.log(x) - log_populations(theta)) / NOISE
    return -0.5 * np.square(z).sum(1) - z.shape[1] * np.log(NOISE * np.sqrt(2 * np.pi))


LOTKA_VOLTERRA = Simulator(
    name="lotka_volterra",
    parameters=("alpha", "beta", "gamma", "delta"),
    context_dim=2 * len(TIMES),
    prior=LogNormal((-0.125, -3.0, -0.125, -3.0), (0.5,) * 4),
    model=simulate,
    likelihood=log_likelihood,
    source=f"{SOURCE}, T.10",
)
