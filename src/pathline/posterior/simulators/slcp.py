"""SLCP, simple likelihood and complex posterior: four points of a bivariate normal whose mean and
covariance are the parameters. Squares in the covariance make four symmetric modes."""

import numpy as np

from .gaussian import SOURCE, names
from .priors import Uniform
from .simulator import Simulator

POINTS = 4
JITTER = 1e-6  # on the variances, as in the benchmark's code


def factor(theta: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The Cholesky factor (a, 0; b, c) of the covariance, three times (n,)."""
    first, second = theta[:, 2] ** 2, theta[:, 3] ** 2
    a = np.sqrt(first**2 + JITTER)
    b = np.tanh(theta[:, 4]) * first * second / a
    c = np.sqrt(second**2 + JITTER - b**2)
    return a, b, c


def simulate(theta: np.ndarray, generator: np.random.Generator) -> np.ndarray:
    """The points one after the other, (n, 8)."""
    a, b, c = (entry[:, None] for entry in factor(theta))
    z = generator.standard_normal((2, len(theta), POINTS))
    points = np.stack((theta[:, :1] + a * z[0], theta[:, 1:2] + b * z[0] + c * z[1]), 2)
    return points.reshape(len(theta), 2 * POINTS)


def log_likelihood(theta: np.ndarray, x: np.ndarray) -> np.ndarray:
    a, b, c = (entry[:, None] for entry in factor(theta))
    points = x.reshape(POINTS, 2)
    first = (points[:, 0] - theta[:, :1]) / a  # (n, points)
    second = (points[:, 1] - theta[:, 1:2] - b * first) / c
    norm = POINTS * np.log(2 * np.pi * a * c)[:, 0]
    return -0.5 * (first**2 + second**2).sum(1) - norm


SLCP = Simulator(
    name="slcp",
    parameters=names(5),
    context_dim=2 * POINTS,
    prior=Uniform(-3.0, 3.0, 5),
    model=simulate,
    likelihood=log_likelihood,
    source=f"{SOURCE}, T.3",
)
