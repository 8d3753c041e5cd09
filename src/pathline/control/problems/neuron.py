"""Deep brain stimulation: a pathological neuron is steered to what a healthy one does."""

import math
from functools import cache

import numpy as np
import torch
from scipy.integrate import solve_ivp
from torch import Tensor

from ...errors import ArgumentError
from ..problem import Problem

DURATION = 30.0  # of the reference, ms
HEALTHY, PATHOLOGICAL = 120.0, 380.0  # sodium conductance, mS/cm^2
NODES = 3001  # of the reference, 0.01 ms apart
SMALL = 0.02  # below it x / expm1(x) is a series, with an error of 2e-15


class Neuron(Problem):
    """The Hodgkin-Huxley neuron, z = (V, m, n, h), under an injected current u in uA/cm^2.

    V is the potential in mV above rest, m, n and h are the gates of the channels, t is in ms. Too
    much sodium passes the membrane (380 in place of 120 mS/cm^2), so that the cell fires twice in
    30 ms; z*(t) is the healthy cell, which starts at zero and fires once:
    L = u^2 / 2 + 100 |z - z*(t)|^2, G = |z - z*(horizon)|^2 / 2. Starts are (xi, 0, 0, 0) with
    xi ~ N(0, 10^2). By forward Euler with 1500 steps the local optimum costs 44 728 from zero,
    50 535 from xi = -20 and 46 188 from xi = 20.

    The upstroke is stiff and unstable. Under a feedback that tracks z*, classical RK4 needs 600
    steps: costs from xi in [-40, 40] are within 1.2 % of their limit then, and within 0.4 % with
    800; without control it needs 1200. Currents that are functions of time alone do not hold the
    neuron near z*, so that single shooting, as in `transcribe`, overflows or is ill-conditioned;
    `riccati_value` along z* is the way to begin.

    Args:
        limit: of |u|; none by default.

    Raises:
        ArgumentError: `limit` is not positive.

    Source: Madondo, Verma, Ruthotto, Au Yong, Learning control policies of Hodgkin-Huxley neuronal
    dynamics, ML4H 2023 (arXiv 2311.07563); Hodgkin, Huxley, J. Physiol. 117, 1952, for the rates.
    """

    name = "neuron"
    dim, horizon = 4, DURATION
    spread = (10.0, 0.0, 0.0, 0.0)
    effort, tracking, terminal = 0.5, 200.0, 1.0

    def __init__(self, limit: float | None = None) -> None:
        if limit is not None and not 0 < limit < math.inf:
            raise ArgumentError(f"`limit` must be positive and finite, got {limit!r}")
        self.control_bounds = None if limit is None else (-float(limit), float(limit))

    @property
    def control_dim(self) -> int:
        return 1

    def dynamics(self, t: Tensor, z: Tensor, u: Tensor) -> Tensor:
        return membrane(z, u, PATHOLOGICAL)

    def running_cost(self, t: Tensor, z: Tensor, u: Tensor) -> Tensor:
        away = (z - self.reference(t).to(z)).square().sum(1)
        return self.effort * u.square().sum(1) + 0.5 * self.tracking * away

    def terminal_cost(self, z: Tensor) -> Tensor:
        end = self.reference(torch.tensor(self.horizon, dtype=torch.float64))
        return 0.5 * self.terminal * (z - end.to(z)).square().sum(1)

    def feedback(self, t: Tensor, z: Tensor, p: Tensor) -> Tensor:
        u = -p[:, :1] / (2 * self.effort)
        limits = self.limits(u)
        return u if limits is None else u.clamp(*limits)

    def reference(self, t: Tensor) -> Tensor:
        """z*(t), (4,), by cubics through the values and velocities at nodes; error below 1e-6."""
        values, slopes = healthy()
        step = DURATION / (NODES - 1)
        share = (t.detach().double().cpu() / step).clamp(0, NODES - 1)
        i = share.floor().clamp_max(NODES - 2).long()
        a, b = share - i, 1 - share + i
        return (
            b**2 * ((1 + 2 * a) * values[i] + a * step * slopes[i])
            + a**2 * ((1 + 2 * b) * values[i + 1] - b * step * slopes[i + 1])
        )  # fmt: skip


def membrane(z: Tensor, u: Tensor | float, sodium: float) -> Tensor:
    """dz/dt for states (batch, 4), currents (batch, 1) and a sodium conductance in mS/cm^2."""
    V, gates = z[:, :1], z[:, 1:]
    m, n, h = gates.split(1, 1)
    opening, closing = rates(V)
    current = sodium * m**3 * h * (V - 115) + 36 * n**4 * (V + 12) + 0.3 * (V - 10.613)
    return torch.cat([u - current, opening * (1 - gates) - closing * gates], 1)


def rates(V: Tensor) -> tuple[Tensor, Tensor]:
    """alpha and beta of the gates m, n, h at potentials V (batch, 1), each (batch, 3), per ms."""
    opening = torch.cat(
        [_ratio((25 - V) / 10), 0.1 * _ratio((10 - V) / 10), 0.07 * torch.exp(-V / 20)], 1
    )
    closing = torch.cat(
        [4 * torch.exp(-V / 18), 0.125 * torch.exp(-V / 80), torch.sigmoid((V - 30) / 10)], 1
    )
    return opening, closing


def _ratio(x: Tensor) -> Tensor:
    """x / (exp(x) - 1), with its derivatives at zero."""
    near = x.abs() < SMALL
    series = 1 - x / 2 + x.square() / 12 - x**4 / 720
    far = torch.where(near, 1.0, x)
    return torch.where(near, series, far / torch.expm1(far))


@cache
def healthy() -> tuple[Tensor, Tensor]:
    """Values and velocities of z* at equally spaced nodes in time, each (nodes, 4)."""

    def velocity(t: float, z: np.ndarray) -> np.ndarray:
        return membrane(torch.from_numpy(z)[None], 0.0, HEALTHY)[0].numpy()

    times = torch.linspace(0, DURATION, NODES, dtype=torch.float64).numpy()
    solved = solve_ivp(
        velocity, (0, DURATION), [0.0] * 4, "LSODA", times, rtol=1e-10, atol=1e-12, max_step=0.5
    )
    values = torch.from_numpy(solved.y.T.copy())
    return values, membrane(values, 0.0, HEALTHY)
