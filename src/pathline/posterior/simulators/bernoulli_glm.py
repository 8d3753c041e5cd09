"""Bernoulli GLM: the spikes of a neuron in 100 bins, given a filtered stimulus.

The offset and the nine taps of the filter are the parameters; the data are the sufficient
statistics: the number of spikes, and the stimulus averaged before the spikes.
"""

import numpy as np

from .gaussian import SOURCE
from .priors import Normal
from .simulator import Simulator

BINS, TAPS = 100, 9


def stimulus() -> np.ndarray:
    """White noise (bins,) of the benchmark's seed, in its single precision.

    NumPy keeps the stream of `RandomState` as it is for ever, so this needs no file.
    """
    return np.random.RandomState(42).randn(BINS).astype(np.float32).astype(np.float64)


def design_matrix() -> np.ndarray:
    """(bins, 1 + taps): ones, then the stimulus, each column one bin later than that before."""
    design = np.ones((BINS, 1 + TAPS))
    signal = stimulus()
    for lag in range(TAPS):
        design[:, 1 + lag] = np.concatenate((np.zeros(lag), signal[: BINS - lag]))
    return design


def prior() -> Normal:
    """Variance 2 for the offset; for the filter (F^T F)^-1, where F = D^2 + diag(sqrt(i / 9)) and
    D takes first differences, so that smooth filters are likely."""
    differences = np.eye(TAPS) - np.eye(TAPS, k=-1)
    F = differences @ differences + np.diag(np.sqrt(np.arange(TAPS) / TAPS))
    covariance = np.zeros((1 + TAPS, 1 + TAPS))
    covariance[0, 0] = 2.0
    covariance[1:, 1:] = np.linalg.inv(F.T @ F)
    return Normal(np.zeros(1 + TAPS), covariance)


DESIGN = design_matrix()


def spikes(theta: np.ndarray, generator: np.random.Generator) -> np.ndarray:
    """Which bins have a spike, (n, bins) of 0 and 1: each with probability
    1 / (1 + exp(-design theta))."""
    psi = theta @ DESIGN.T
    return (generator.random(psi.shape) * (1 + np.exp(-psi)) < 1).astype(np.float64)


def simulate(theta: np.ndarray, generator: np.random.Generator) -> np.ndarray:
    return spikes(theta, generator) @ DESIGN


def log_likelihood(theta: np.ndarray, x: np.ndarray) -> np.ndarray:
    """Of the spikes, given their statistics `x`: an exponential family."""
    return theta @ x - np.logaddexp(0.0, theta @ DESIGN.T).sum(1)


BERNOULLI_GLM = Simulator(
    name="bernoulli_glm",
    parameters=("offset", *(f"filter_{i + 1}" for i in range(TAPS))),
    context_dim=1 + TAPS,
    prior=prior(),
    model=simulate,
    likelihood=log_likelihood,
    source=f"{SOURCE}, T.5",
)
