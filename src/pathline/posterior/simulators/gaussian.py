"""Gaussian tasks: the mean of a normal under a normal or a uniform prior, and the common mean of
two normals of different widths. Their posteriors are known in closed form."""

import numpy as np

from .priors import Normal, Uniform
from .simulator import Simulator

SOURCE = "Lueckmann et al., Benchmarking simulation-based inference, 2021, arXiv 2101.04653"
VARIANCE = 0.1  # of the data of the linear tasks
MIXTURE = (1.0, 0.1)  # the two deviations of the mixture, equally likely


def linear(theta: np.ndarray, generator: np.random.Generator) -> np.ndarray:
    return theta + np.sqrt(VARIANCE) * generator.standard_normal(theta.shape)


def linear_log_likelihood(theta: np.ndarray, x: np.ndarray) -> np.ndarray:
    return isotropic(x - theta, np.sqrt(VARIANCE))


def mixture(theta: np.ndarray, generator: np.random.Generator) -> np.ndarray:
    """One width for both data of a run."""
    deviation = generator.choice(MIXTURE, (len(theta), 1))
    return theta + deviation * generator.standard_normal(theta.shape)


def mixture_log_likelihood(theta: np.ndarray, x: np.ndarray) -> np.ndarray:
    wide, narrow = (isotropic(x - theta, deviation) for deviation in MIXTURE)
    return np.logaddexp(wide, narrow) - np.log(2)


def isotropic(z: np.ndarray, deviation: float) -> np.ndarray:
    """Log-density (n,) of the rows of `z` (n, dim) under N(0, deviation^2 I)."""
    norm = z.shape[1] * np.log(deviation * np.sqrt(2 * np.pi))
    return -0.5 * np.square(z / deviation).sum(1) - norm


def names(dim: int) -> tuple[str, ...]:
    return tuple(f"theta_{i + 1}" for i in range(dim))


GAUSSIAN_LINEAR = Simulator(
    name="gaussian_linear",
    parameters=names(10),
    context_dim=10,
    prior=Normal(np.zeros(10), 0.1 * np.eye(10)),
    model=linear,
    likelihood=linear_log_likelihood,
    source=f"{SOURCE}, T.1",
)
GAUSSIAN_LINEAR_UNIFORM = Simulator(
    name="gaussian_linear_uniform",
    parameters=names(10),
    context_dim=10,
    prior=Uniform(-1.0, 1.0, 10),
    model=linear,
    likelihood=linear_log_likelihood,
    source=f"{SOURCE}, T.2",
)
GAUSSIAN_MIXTURE = Simulator(
    name="gaussian_mixture",
    parameters=names(2),
    context_dim=2,
    prior=Uniform(-10.0, 10.0, 2),
    model=mixture,
    likelihood=mixture_log_likelihood,
    source=f"{SOURCE}, T.7",
)
