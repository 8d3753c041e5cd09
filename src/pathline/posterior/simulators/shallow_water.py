"""Shallow water in one dimension: the depth of the sea from the waves on its surface.

The surface elevation zeta in the cells and the velocity u at the faces between them follow

    du/dt = -g dzeta/dx - drag u |u| / h,    dzeta/dt = -d(h u)/dx,    h = depth + zeta,

semi-implicit in time: half of the new and half of the old level, with h and the friction of the
old one. The parameters are the depths, the data the noisy Fourier transform of the surface.
"""

import numpy as np
from scipy.linalg.lapack import dptsv

from .priors import Normal
from .simulator import Simulator

CELLS, HOURS = 100, 101
DX, DT = 10e3, 300.0  # m, s
STEPS = 12  # an hour
GRAVITY, DRAG = 9.81, 1e-3  # m/s^2, 1
BUMP = 0.1  # m, in the second cell at the start
SHORE = 0.1  # m, a cell that is less deep is dry; the first and the last always are
NOISE = 0.25  # of each feature
ROWS = 128  # simulated at a time, so that a step stays in the cache


def first_surface(rows: int) -> np.ndarray:
    """At rest but for the bump, (rows, cells)."""
    zeta = np.zeros((rows, CELLS))
    zeta[:, 1] = BUMP
    return zeta


def surfaces(
    depth: np.ndarray,
    zeta: np.ndarray,
    *,
    dx: float = DX,
    dt: float = DT,
    steps: int = STEPS,
    times: int = HOURS,
    drag: float = DRAG,
) -> np.ndarray:
    """The surface elevation (n, times, cells) in m, every `steps` steps from the first on.

    Args:
        depth: (n, cells) in m; the first and the last cell count as dry.
        zeta: (n, cells) in m, at the start; the water is at rest.
        dx: width of the cells in m.
        dt: time step in s.
        steps: time steps from one output to the next.
        times: outputs.
        drag: coefficient of the friction at the ground.

    Source: K. Logemann's solver, in Ramesh et al., GATSBI, 2022, arXiv 2203.06481, appendix D.3;
    here the linear systems are solved exactly and the outputs not rounded to 0.1 mm.
    """
    output = np.empty((len(depth), times, depth.shape[1]))
    for first in range(0, len(depth), ROWS):
        rows = slice(first, first + ROWS)
        _fill(output[rows], depth[rows], zeta[rows], dx, dt, steps, drag)
    return output


def _fill(
    output: np.ndarray,
    depth: np.ndarray,
    zeta: np.ndarray,
    dx: float,
    dt: float,
    steps: int,
    drag: float,
) -> None:
    wet = depth > SHORE
    wet[:, [0, -1]] = False
    ways = (wet[:, :-1] & wet[:, 1:]).astype(np.float64)  # (n, cells - 1), 1 where water passes
    # The mean depth at the faces; any positive number where no water passes.
    still = np.where(ways > 0, 0.5 * (depth[:, :-1] + depth[:, 1:]), 1.0)
    u = np.zeros_like(ways)
    output[:, 0] = zeta
    zeta = zeta * wet
    half = 0.5 * dt  # the weight of each of the two time levels
    slope = half * GRAVITY / dx * ways
    # The systems of all rows as one: the last cell of a row does not touch the first of the next.
    diagonal, beside = np.empty_like(zeta), np.zeros_like(zeta)
    right = np.empty_like(zeta)
    for i in range((output.shape[1] - 1) * steps):
        h = still + 0.5 * ways * (zeta[:, :-1] + zeta[:, 1:])
        between = u - (dt * drag) * u * np.abs(u) / h - slope * np.diff(zeta, axis=1)
        flux = (half / dx) * h * (u + between)
        right[:] = zeta
        right[:, :-1] -= flux
        right[:, 1:] += flux
        coupling = (half / dx) * slope * h
        diagonal[:] = 1.0
        diagonal[:, :-1] += coupling
        diagonal[:, 1:] += coupling
        np.negative(coupling, out=beside[:, :-1])
        *_, solved, info = dptsv(diagonal.ravel(), beside.ravel()[:-1], right.ravel())
        assert info == 0  # diagonally dominant
        zeta = solved.reshape(zeta.shape)
        u = between - slope * np.diff(zeta, axis=1)
        if (i + 1) % steps == 0:
            output[:, (i + 1) // steps] = zeta


def features(surface: np.ndarray) -> np.ndarray:
    """Real, then imaginary parts of the transform over time and space, without the mean over
    time: (n, times, cells) -> (n, 2 (times - 1) cells)."""
    transform = np.fft.fft2(surface)[:, 1:]
    return np.stack((transform.real, transform.imag), 1).reshape(len(surface), -1)


def simulate(theta: np.ndarray, generator: np.random.Generator) -> np.ndarray:
    data = np.empty((len(theta), 2 * (HOURS - 1) * CELLS))
    for first in range(0, len(theta), ROWS):  # the surfaces of all rows would double the memory
        rows = slice(first, first + ROWS)
        depth = theta[rows]
        data[rows] = features(surfaces(depth, first_surface(len(depth))))
        data[rows] += NOISE * generator.standard_normal(data[rows].shape)
    return data


def prior() -> Normal:
    """Depths of 10 m on average, with covariance 15 exp(-(i - j)^2 / 200) between cells."""
    i = np.arange(CELLS)
    return Normal(np.full(CELLS, 10.0), 15 * np.exp(-((i[:, None] - i) ** 2) / 200))


SHALLOW_WATER = Simulator(
    name="shallow_water",
    parameters=tuple(f"depth_{i + 1}" for i in range(CELLS)),
    context_dim=2 * (HOURS - 1) * CELLS,
    prior=prior(),
    model=simulate,
    source="Ramesh et al., GATSBI: generative adversarial training for simulation-based "
    "inference, 2022, arXiv 2203.06481; Wang et al., 2023, arXiv 2310.16975",
)
