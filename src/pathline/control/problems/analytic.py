"""Problems whose value function is known, or can be computed by quadrature."""

import math
from typing import Any

import numpy as np
import torch
from scipy import integrate, special
from torch import Tensor

from ...errors import ArgumentError
from ..problem import Problem
from .particle import Particle


class LinearQuadratic(Particle):
    """f = u, L = |u|^2 / 2, G = 50 |z|^2.

    Phi = 50 / s |z|^2 + noise^2 dim / 2 log s with s = 1 + 100 (horizon - t), from the Riccati
    equation. With noise 0.4 in two dimensions it is 9.6493 at (0, (-3, -3)).

    Args:
        dim: of the state.
        noise: standard deviation of the Brownian motion; none if zero.
    """

    name = "lqr"
    terminal, grading = 50.0, 2.0

    def __init__(self, dim: int = 2, noise: float = 0.0) -> None:
        self.dim = dim
        self.noise = noise * torch.eye(dim, dtype=torch.float64) if noise else None
        self.variance = noise**2
        self.start = (-3.0,) * dim

    def running_cost(self, t: Tensor, z: Tensor, u: Tensor) -> Tensor:
        return 0.5 * u.square().sum(1)

    def terminal_cost(self, z: Tensor) -> Tensor:
        return self.terminal * z.square().sum(1)

    def exact_value(self, t: Tensor, z: Tensor) -> Tensor:
        """Phi(t, z), (batch,), by the Riccati equation."""
        s = 1 + 2 * self.terminal * (self.horizon - t)
        constant = self.variance * self.dim / 2 * torch.as_tensor(s).log()
        return self.terminal / s * z.square().sum(1) + constant


class LogBenchmark(Problem):
    """f = 2 u, L = |u|^2, G = weight log((1 + |z - target|^2) / 2), z(0) = 0, noise sigma I.

    By the Cole-Hopf transform Phi = -kappa log E exp(-G(z + sigma W) / kappa), kappa = sigma^2 / 2.
    The benchmark has weight 1, target 0 and sigma = sqrt(2): 4.590162 at zero in 100 dimensions;
    the modified one has weight 1000, target (3, ..., 3) and sigma = 0.4 sqrt(2): -401.88.

    Args:
        dim: of the state.
        modified: the modified form.

    Raises:
        ArgumentError: `dim` is less than two.

    Source: E, Han, Jentzen, 2017 (arXiv 1706.04702); Li, Verma, Ruthotto (arXiv 2209.13104).
    """

    def __init__(self, dim: int = 100, modified: bool = False) -> None:
        if dim < 2:
            raise ArgumentError(f"`dim` must be at least 2, got {dim}")
        self.name = "modified-benchmark" if modified else "benchmark"
        self.dim = dim
        self.weight, self.target = (1000.0, 3.0) if modified else (1.0, 0.0)
        self.sigma = (0.4 if modified else 1.0) * math.sqrt(2)
        self.noise = self.sigma * torch.eye(dim, dtype=torch.float64)
        self.spread, self.grading = 0.0, 4.0 if modified else 1.0

    def dynamics(self, t: Tensor, z: Tensor, u: Tensor) -> Tensor:
        return 2 * u

    def running_cost(self, t: Tensor, z: Tensor, u: Tensor) -> Tensor:
        return u.square().sum(1)

    def terminal_cost(self, z: Tensor) -> Tensor:
        squared = (z - self.target).square().sum(1)
        return self.weight * (torch.log1p(squared) - math.log(2))

    def feedback(self, t: Tensor, z: Tensor, p: Tensor) -> Tensor:
        return -p

    def exact_value(self, t: Tensor, z: Tensor) -> Tensor:
        """Phi(t, z), (batch,), by quadrature."""
        rest = self.horizon - float(t)
        distances = (z - self.target).norm(dim=1).double().tolist()
        values = [self._at_distance(rest, distance) for distance in distances]
        return z.new_tensor(values)

    def _at_distance(self, rest: float, distance: float) -> float:
        """Phi by quadrature. |z + sigma W - target|^2 is the square of one normal coordinate along
        the way to the target, plus chi-squared times the variance of the others."""
        kappa, variance = self.sigma**2 / 2, self.sigma**2 * rest
        if variance == 0:
            return self.weight * math.log((1 + distance**2) / 2)
        power = self.weight / kappa  # exp(-G / kappa) = ((1 + r^2) / 2)^-power
        root = math.sqrt(variance)

        def log_density(w: np.ndarray, a: np.ndarray) -> np.ndarray:
            """Of w = (distance of the dim - 1 other coordinates) / root, and of the coordinate `a`
            along the way."""
            k = self.dim - 1
            chi = math.log(2) + (k - 1) * np.log(w) - w**2 / 2
            chi = chi - k / 2 * math.log(2) - special.gammaln(k / 2)
            normal = -0.5 * ((a - distance) / root) ** 2 - math.log(root * math.sqrt(2 * math.pi))
            return chi + normal - power * np.log((1 + a**2 + variance * w**2) / 2)

        return -kappa * _log_integral(log_density, self.dim - 1, distance, root)


def _log_integral(log_f: Any, k: int, distance: float, root: float, points: int = 4001) -> float:
    """log of the integral of exp(log_f(w, a)) over w > 0 and all a, by the trapezoidal rule on a
    grid that is refined around the mode."""
    w_low, w_high = 1e-9, math.sqrt(4 * k + 200.0)
    a_low, a_high = min(0.0, distance) - 12 * root, distance + 12 * root
    for _ in range(6):
        w = np.linspace(w_low, w_high, points)[:, None]
        a = np.linspace(a_low, a_high, 801)[None]
        values = log_f(w, a)
        top = values.max()
        seen = values > top - 40
        rows, columns = np.nonzero(seen.any(1))[0], np.nonzero(seen.any(0))[0]
        new = (
            w[max(rows[0] - 1, 0), 0], w[min(rows[-1] + 1, points - 1), 0],
            a[0, max(columns[0] - 1, 0)], a[0, min(columns[-1] + 1, 800)],
        )  # fmt: skip
        if new == (w_low, w_high, a_low, a_high):
            break
        w_low, w_high, a_low, a_high = (float(end) for end in new)
    w = np.linspace(w_low, w_high, points)[:, None]
    a = np.linspace(a_low, a_high, 801)[None]
    values = log_f(w, a)
    top = values.max()
    inner = integrate.trapezoid(np.exp(values - top), a[0], axis=1)
    return float(top + math.log(integrate.trapezoid(inner, w[:, 0])))
