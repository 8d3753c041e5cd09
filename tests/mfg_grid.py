"""Viscous mean-field games on a grid in two dimensions: an independent reference.

With phi = -2 nu transport log w, the Hamilton-Jacobi-Bellman equation of quadratic games given the
cost f of the crowd is linear, w_t + nu lap w = f w / (2 nu transport), and so is that of
rho / w (Hopf and Cole). Both are solved by exact heat kernels on the grid and Strang's splitting:
second order in time, and no numerical viscosity, which upwind differences would have as much of
as the games. Crowd and costs meet in a damped fixed point.

Source: Gueant, Mean field games equations with quadratic Hamiltonian: a specific approach, Math.
Models Methods Appl. Sci. 22, 2012 (arXiv 1106.3269).
"""

from dataclasses import dataclass

import numpy as np
from scipy.interpolate import RegularGridInterpolator
from scipy.signal import fftconvolve


@dataclass
class GridGame:
    """Solution at `times` (n,) on points `x` (nx,) and `y` (ny,)."""

    times: np.ndarray
    x: np.ndarray
    y: np.ndarray
    phi: np.ndarray  # (n, nx, ny)
    rho: np.ndarray  # (n, nx, ny)
    change: float  # of the cost f in the last iteration

    def value(self, n, points):
        """phi at the n-th time and `points` (batch, 2)."""
        return RegularGridInterpolator((self.x, self.y), self.phi[n], method="cubic")(points)

    def moments(self, n):
        """Mean (2,) and covariance (2, 2) of the density at the n-th time."""
        points = np.stack(np.meshgrid(self.x, self.y, indexing="ij"), -1)
        share = (self.rho[n] / self.rho[n].sum())[..., None]
        mean = (share * points).sum((0, 1))
        return mean, np.einsum("xyi,xyj->ij", share * (points - mean), points - mean)


def solve_grid(
    density, terminal_cost, preference, box, cells, steps, *,
    congestion=0.0, viscosity=0.1, transport=1.0, tolerance=1e-6,
):  # fmt: skip
    """Functions take points (n, 2) and return (n,); the congestion is that of `games`.

    Particles leave the box for good, so it must be wide.
    """
    x, y = (np.linspace(a, b, n) for (a, b), n in zip(box, cells, strict=True))
    points = np.stack(np.meshgrid(x, y, indexing="ij"), -1).reshape(-1, 2)
    area, dt = (x[1] - x[0]) * (y[1] - y[0]), 1 / steps
    scale = 2 * viscosity * transport
    heat_x, heat_y = (_heat(z, viscosity * dt) for z in (x, y))

    def on_grid(function):
        return np.asarray(function(points), float).reshape(cells)

    far = [np.arange(1 - n, n) * (z[1] - z[0]) for z, n in zip((x, y), cells, strict=True)]
    kernel = congestion * area / (1 + far[0][:, None] ** 2 + far[1] ** 2)
    rho_0, end, Q = on_grid(density), on_grid(terminal_cost), on_grid(preference)
    rho_0 = rho_0 / (rho_0.sum() * area)
    w, eta = np.empty((2, steps + 1, *cells))
    f = np.broadcast_to(Q, w.shape).copy()
    for _ in range(200):
        half = np.exp(-f * dt / (2 * scale))
        w[-1] = np.exp(-(end - end.min()) / scale)
        for n in reversed(range(steps)):
            w[n] = half[n] * (heat_x @ (half[n + 1] * w[n + 1]) @ heat_y.T)
        eta[0] = rho_0 / w[0]
        for n in range(steps):
            eta[n + 1] = half[n + 1] * (heat_x.T @ (half[n] * eta[n]) @ heat_y)
        rho = w * eta
        if not congestion:
            change = 0.0
            break
        new = np.stack([Q + fftconvolve(r, kernel, mode="valid") for r in rho])
        change = np.abs(new - f).max()
        if change < tolerance:
            break
        f = f + 0.7 * (new - f)
    phi = -scale * np.log(np.maximum(w, 1e-300)) + end.min()  # it underflows in far corners
    return GridGame(np.linspace(0, 1, steps + 1), x, y, phi, rho, change)


def _heat(x, variance_half):
    """Means over N(x_i, 2 variance_half) of functions on the grid, (nx, nx)."""
    kernel = np.exp(-((x[:, None] - x) ** 2) / (4 * variance_half))
    return kernel / (np.sqrt(4 * np.pi * variance_half) / (x[1] - x[0]))
