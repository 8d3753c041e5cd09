"""Two moons: a posterior of two crescents, with structure at a large and at a small scale."""

import numpy as np

from .priors import Uniform
from .simulator import Simulator

RADIUS, WIDTH, OFFSET = 0.1, 0.01, 0.25


def place(theta: np.ndarray) -> np.ndarray:
    """Where the moon of each row of theta (n, 2) lies: (-|theta_1 + theta_2|, theta_2 - theta_1)
    over sqrt(2)."""
    total, difference = theta[:, 0] + theta[:, 1], theta[:, 1] - theta[:, 0]
    return np.stack((-np.abs(total), difference), 1) / np.sqrt(2)


def simulate(theta: np.ndarray, generator: np.random.Generator) -> np.ndarray:
    angle = generator.uniform(-np.pi / 2, np.pi / 2, len(theta))
    radius = RADIUS + WIDTH * generator.standard_normal(len(theta))
    moon = np.stack((radius * np.cos(angle) + OFFSET, radius * np.sin(angle)), 1)
    return moon + place(theta)


def log_likelihood(theta: np.ndarray, x: np.ndarray) -> np.ndarray:
    """In polar coordinates about (OFFSET, 0); the chance 1e-23 of a negative radius is left out."""
    right, up = (x - place(theta) - (OFFSET, 0.0)).T
    radius = np.hypot(right, up)
    log_prob = -0.5 * ((radius - RADIUS) / WIDTH) ** 2 - np.log(WIDTH * np.sqrt(2 * np.pi))
    with np.errstate(divide="ignore"):
        return np.where(right >= 0, log_prob - np.log(np.pi * radius), -np.inf)


TWO_MOONS = Simulator(
    name="two_moons",
    parameters=("theta_1", "theta_2"),
    context_dim=2,
    prior=Uniform(-1.0, 1.0, 2),
    model=simulate,
    likelihood=log_likelihood,
    source="Lueckmann et al., Benchmarking simulation-based inference, 2021, arXiv 2101.04653, T.8",
)
