"""The value function of the noisy particle that passes a hill, by finite differences.

The problem: dz = u dt + S dW in the plane, L = |u|^2 / 2 + Q(z), G = 50 |z - a|^2, for which
d_t Phi - |grad Phi|^2 / 2 + Q + tr(S S^T Hessian Phi) / 2 = 0. Nothing here is of Pathline.
"""

import numpy as np
from scipy.interpolate import RectBivariateSpline

NOISE = np.array([[0.2, -0.4], [-0.4, 0.2]])
TARGET = np.array([1.5, 1.5])
TERMINAL = 50.0
LOW, HIGH = -4.5, 3.5  # sides of the square; what is wrong at its edge moves outwards
COURANT = 1.5  # of the time steps; RK4 is stable to 2.7


def hill(x, y):
    """Q: 50 times the density of N(0, 0.4 I)."""
    return 50 / (2 * np.pi * 0.4) * np.exp(-(x**2 + y**2) / 0.8)


def hill_value(times, spacing=0.1):
    """Phi(t, .) at each of `times`, decreasing from below 1, as a list of
    `scipy.interpolate.RectBivariateSpline`.

    Without Q the value is W = 50 / s |z - a|^2 + tr(S S^T) / 2 log s, s = 1 + 100 (1 - t), so that
    Psi = Phi - W starts at zero, is smooth, and solves, in the time theta = log s,
    d_theta Psi = -(z - a).grad Psi + s / 100 (Q - |grad Psi|^2 / 2 + tr(S S^T Hessian Psi) / 2).
    That flow leaves the square on all sides: derivatives there are one-sided, by extrapolation.
    Central differences of fourth order, and RK4 in theta.
    """
    count = round((HIGH - LOW) / spacing) + 1
    axis = np.linspace(LOW, HIGH, count)
    x, y = np.meshgrid(axis, axis, indexing="ij")
    dx, dy = x - TARGET[0], y - TARGET[1]
    covariance, Q = NOISE @ NOISE.T, hill(x, y)

    def rate(theta, psi):
        p, q = slope(psi, 0, spacing), slope(psi, 1, spacing)
        second = (
            covariance[0, 0] * curvature(psi, 0, spacing)
            + covariance[1, 1] * curvature(psi, 1, spacing)
            + 2 * covariance[0, 1] * slope(p, 1, spacing)
        )
        inner = Q - (p**2 + q**2) / 2 + second / 2
        return -(dx * p + dy * q) + np.exp(theta) / (2 * TERMINAL) * inner

    fastest = np.abs(LOW - TARGET).sum() * 1.4 / spacing
    diffusion = 2.7 * np.trace(covariance) / spacing**2
    theta, psi, found = 0.0, np.zeros_like(x), []
    for t in times:
        end = np.log1p(2 * TERMINAL * (1 - t))
        rates = max(fastest, diffusion * (1.01 - t))
        steps = int(np.ceil((end - theta) * rates / COURANT))
        h = (end - theta) / steps
        for _ in range(steps):
            k1 = rate(theta, psi)
            k2 = rate(theta + h / 2, psi + h / 2 * k1)
            k3 = rate(theta + h / 2, psi + h / 2 * k2)
            k4 = rate(theta + h, psi + h * k3)
            psi, theta = psi + h / 6 * (k1 + 2 * k2 + 2 * k3 + k4), theta + h
        s = np.exp(end)
        W = TERMINAL / s * (dx**2 + dy**2) + np.trace(covariance) / 2 * end
        found.append(RectBivariateSpline(axis, axis, W + psi))
    return found


def slope(f, axis, h):
    f = pad(f, axis)
    return (shift(f, -2) - 8 * shift(f, -1) + 8 * shift(f, 1) - shift(f, 2)).swapaxes(0, axis) / (
        12 * h
    )


def curvature(f, axis, h):
    f = pad(f, axis)
    outer, inner = shift(f, -2) + shift(f, 2), shift(f, -1) + shift(f, 1)
    return (16 * inner - outer - 30 * shift(f, 0)).swapaxes(0, axis) / (12 * h**2)


def pad(f, axis):
    """The values with `axis` first, and two more rows on both sides that continue the parabolas
    through the last three."""
    f = f.swapaxes(0, axis)

    def beyond(a, b, c):
        return 3 * a - 3 * b + c, 6 * a - 8 * b + 3 * c

    near, far = beyond(f[0], f[1], f[2])
    close, distant = beyond(f[-1], f[-2], f[-3])
    return np.concatenate([[far, near], f, [close, distant]])


def shift(f, by):
    return f[2 + by : len(f) - 2 + by]
