"""The priors of the simulators: sampling, log-density and bounds, in double precision."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import numpy as np

Bounds = tuple[float, float] | None  # None where a parameter is unbounded


class Prior(Protocol):
    """What a simulator asks of a prior."""

    @property
    def dim(self) -> int:
        """The number of parameters."""

    @property
    def support(self) -> list[Bounds]:
        """The bounds of each parameter, or None."""

    def sample(self, n: int, generator: np.random.Generator) -> np.ndarray:
        """Independent draws (n, dim)."""

    def log_prob(self, theta: np.ndarray) -> np.ndarray:
        """Log-density (n,) of the rows of `theta` (n, dim); -inf outside the support."""


@dataclass(frozen=True)
class Uniform:
    """All parameters uniform on the same interval."""

    lower: float
    upper: float
    dim: int

    @property
    def support(self) -> list[Bounds]:
        return [(self.lower, self.upper)] * self.dim

    def sample(self, n: int, generator: np.random.Generator) -> np.ndarray:
        return generator.uniform(self.lower, self.upper, (n, self.dim))

    def log_prob(self, theta: np.ndarray) -> np.ndarray:
        inside = ((theta >= self.lower) & (theta <= self.upper)).all(1)
        return np.where(inside, -self.dim * np.log(self.upper - self.lower), -np.inf)


@dataclass(frozen=True, eq=False)
class Normal:
    """A multivariate normal, by its mean (dim,) and its covariance (dim, dim)."""

    mean: np.ndarray
    covariance: np.ndarray

    @property
    def dim(self) -> int:
        return len(self.mean)

    @property
    def support(self) -> list[Bounds]:
        return [None] * self.dim

    @cached_property
    def axes(self) -> tuple[np.ndarray, np.ndarray]:
        """Standard deviations (dim,) along the principal axes, the columns of (dim, dim).

        Covariances of smooth functions are singular to round-off, so a variance counts as at
        least 1e-12 of the largest.
        """
        variances, vectors = np.linalg.eigh(self.covariance)
        return np.sqrt(np.maximum(variances, 1e-12 * variances[-1])), vectors

    def sample(self, n: int, generator: np.random.Generator) -> np.ndarray:
        deviations, vectors = self.axes
        return self.mean + generator.standard_normal((n, self.dim)) * deviations @ vectors.T

    def log_prob(self, theta: np.ndarray) -> np.ndarray:
        deviations, vectors = self.axes
        z = (theta - self.mean) @ vectors / deviations  # (n, dim)
        norm = 0.5 * self.dim * np.log(2 * np.pi) + np.log(deviations).sum()
        return -0.5 * np.square(z).sum(1) - norm


@dataclass(frozen=True)
class LogNormal:
    """Independent parameters whose logarithms are normal with means `loc` and deviations `scale`,
    (dim,) each."""

    loc: Sequence[float]
    scale: Sequence[float]

    @property
    def dim(self) -> int:
        return len(self.loc)

    @property
    def support(self) -> list[Bounds]:
        return [(0.0, np.inf)] * self.dim

    def sample(self, n: int, generator: np.random.Generator) -> np.ndarray:
        z = generator.standard_normal((n, self.dim))
        return np.exp(np.asarray(self.loc) + np.asarray(self.scale) * z)

    def log_prob(self, theta: np.ndarray) -> np.ndarray:
        positive = np.all(theta > 0, axis=1)
        log_theta = np.log(np.where(theta > 0, theta, 1.0))
        z = (log_theta - self.loc) / self.scale
        log_prob = -0.5 * np.square(z) - log_theta - np.log(self.scale) - 0.5 * np.log(2 * np.pi)
        return np.where(positive, log_prob.sum(1), -np.inf)
