"""The value function to second order around a path, by Riccati equations."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from scipy.integrate import solve_ivp
from scipy.interpolate import CubicSpline, PchipInterpolator, interp1d
from scipy.optimize import minimize
from torch import Tensor, nn

from ..calculus import gradient, jacobian
from ..errors import SolveError
from ..nets import Derivatives
from .problem import Problem
from .transcription import OpenLoop

NODES = 200  # of both kinds
LAYER = 0.002  # of the horizon, at its end, where the coefficients rest: they may be stiff there
TOLERANCE = 1e-8


class QuadraticValue(nn.Module):
    """Phi(t, z) = y.P(t) y / 2 + s(t).y + c(t) with y = z - r(t), by cubics between nodes in time.

    Before the first node and after the last the coefficients rest. Like `Potential` it takes
    (x, t), in this order.

    Args:
        dim: of the state.
        nodes: in time.
    """

    times: Tensor
    values: Tensor
    slopes: Tensor

    def __init__(self, dim: int, nodes: int) -> None:
        super().__init__()
        self.dim, size = dim, dim * dim + 2 * dim + 1
        self.register_buffer("times", torch.linspace(0, 1, nodes))
        self.register_buffer("values", torch.zeros(nodes, size))
        self.register_buffer("slopes", torch.zeros(nodes, size))

    @property
    def nodes(self) -> int:
        """Nodes in time."""
        return len(self.times)

    def path(self) -> Tensor:
        """r at the nodes, (nodes, dim)."""
        return self._parts(self.values)[3]

    def bind(
        self,
        probe: Tensor | None = None,
        trace_dtype: torch.dtype | None = None,
        noise: Tensor | None = None,
    ) -> Callable[..., Derivatives]:
        """Value and derivatives at (x, t), as those of `Potential.bind`."""

        def evaluate(
            x: Tensor,
            t: Tensor,
            context: Tensor | None = None,
            *,
            value: bool = True,
            grad: bool = True,
            dt: bool = True,
            laplacian: bool = True,
            laplacian_adjoint: Tensor | None = None,
        ) -> Derivatives:
            now, rate = self._at(t)
            P, s, c, r = self._parts(now)
            y = x - r
            Py = (P @ y[:, :, None])[:, :, 0]
            slope = Py + s
            found: dict[str, Tensor] = {}
            if value:
                found["value"] = 0.5 * (y * Py).sum(1) + (s * y).sum(1) + c
            if grad:
                found["grad"] = slope
            if dt:
                dP, ds, dc, dr = self._parts(rate)
                dPy = (dP @ y[:, :, None])[:, :, 0]
                found["dt"] = 0.5 * (y * dPy).sum(1) + (ds * y).sum(1) + dc - (slope * dr).sum(1)
            if laplacian:
                inner = P if noise is None else noise.mT @ P @ noise
                found["laplacian"] = inner.diagonal(dim1=-2, dim2=-1).sum(-1).expand(len(x))
            return Derivatives(**found)

        return evaluate

    def _at(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """All coefficients and their derivatives in time, (1 or batch, coefficients)."""
        t = t.reshape(-1).clamp(self.times[0], self.times[-1])
        i = torch.searchsorted(self.times, t.contiguous()).clamp(1, len(self.times) - 1) - 1
        h = (self.times[i + 1] - self.times[i])[:, None]
        a = (t[:, None] - self.times[i][:, None]) / h
        v0, v1, d0, d1 = self.values[i], self.values[i + 1], self.slopes[i], self.slopes[i + 1]
        chord = (v1 - v0) / h
        # The cubic v0 + a h (d0 + a (q + a k)) with these ends and slopes.
        q, k = 3 * chord - 2 * d0 - d1, d0 + d1 - 2 * chord
        return v0 + a * h * (d0 + a * (q + a * k)), d0 + a * (2 * q + 3 * a * k)

    def _parts(self, packed: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """P, s, c and r of packed coefficients (batch, ...)."""
        d = self.dim
        P, s, c, r = packed.split([d * d, d, 1, d], 1)
        return P.view(-1, d, d), s, c[:, 0], r


@dataclass(frozen=True)
class _Expansion:
    """dz = f + A y + B v and L = L + l_z.y + l_u.v + (y.Q y + 2 y.N v + v.R v) / 2."""

    f: np.ndarray  # less the velocity of the reference
    A: np.ndarray
    B: np.ndarray
    L: float
    l_z: np.ndarray
    l_u: np.ndarray
    Q: np.ndarray
    N: np.ndarray
    R: np.ndarray


@torch.enable_grad()
def resting_point(problem: Problem) -> Tensor:
    """Where a descent from the nominal start minimises the terminal cost, (dim,)."""

    def cost(z: np.ndarray) -> tuple[float, np.ndarray]:
        at = torch.from_numpy(z)[None].requires_grad_(True)
        G = problem.terminal_cost(at)
        return G.item(), gradient(G, at)[0].detach().numpy()

    found = minimize(cost, problem.nominal().numpy(), jac=True, method="L-BFGS-B")
    return torch.from_numpy(found.x)


def riccati_value(
    problem: Problem, path: OpenLoop | None = None, *, follow: bool = False
) -> QuadraticValue:
    """The value function to second order around a path.

    Costs and dynamics are expanded around the states and controls of `path`; P, s and c solve the
    Riccati equations of the linear-quadratic problem that results, backward in time. Around an
    optimal path that is the feedback of neighbouring extremals, and for a linear-quadratic problem
    the value function itself. Concave directions of the Hamiltonian are taken as flat.

    Args:
        problem: the control problem.
        path: an open-loop solution; by default the path that `problem.reference` gives, with no
            control.
        follow: take value and slope on the path from its costs and controls rather than from the
            equations. The feedback then follows the path whatever it is, also where forces on it
            are so short that the expansions miss them.

    Returns:
        The value function, in double precision.

    Raises:
        SolveError: the Hamiltonian is not convex in the control along the path, or the equations
            have no solution.

    Source: Bryson and Ho, Applied Optimal Control, 1975, chapter 6; as a part of a network
    Nakamura-Zimmerer, Gong, Kang, QRnet, 2021 (arXiv 2009.05686).
    """
    T, d, follow = problem.horizon, problem.dim, follow and path is not None
    count = NODES if d <= 50 else NODES // 4
    back = np.union1d(np.linspace(LAYER, 1, count), np.geomspace(LAYER, 1, count))
    times = T * (1 - back[::-1])
    knots = np.append(times, T)
    r, dr, u, p = _along(problem, knots, path)
    expansions = [_expand(problem, *at) for at in zip(knots.tolist(), r, dr, u, p, strict=True)]
    noise = None if problem.noise is None else problem.noise.double().numpy()

    def rates(t: float, packed: np.ndarray) -> np.ndarray:
        """Derivatives of (P, s, c) in time."""
        P, s = packed[: d * d].reshape(d, d), packed[d * d : -1]
        e = _between(expansions, knots, t)
        S, q = P @ e.B + e.N, e.B.T @ s + e.l_u
        gain, shift = np.linalg.solve(e.R, S.T), np.linalg.solve(e.R, q)
        dP = -(e.Q + e.A.T @ P + P @ e.A - S @ gain)
        ds = -(e.l_z + e.A.T @ s + P @ e.f - S @ shift)
        dc = -e.L if follow else -(e.L + s @ e.f - 0.5 * q @ shift)
        if noise is not None:
            dc -= 0.5 * np.sum(noise * (P @ noise))
        return np.concatenate([(dP + dP.T).ravel() / 2, ds, [dc]])

    end = torch.from_numpy(r[-1])[None].requires_grad_(True)
    G = problem.terminal_cost(end)
    slope = gradient(G, end)
    curvature = jacobian(lambda z: gradient(problem.terminal_cost(z), z), end)[0]
    last = np.concatenate(
        [curvature.detach().numpy().ravel(), slope[0].detach().numpy(), G.detach().numpy()]
    )
    solved = solve_ivp(
        rates, (T, times[0]), last, t_eval=np.append(T, times[::-1]), rtol=TOLERANCE,
        atol=TOLERANCE,
    )  # fmt: skip
    if not solved.success or not np.isfinite(solved.y).all():
        raise SolveError(f"the Riccati equations have no solution to time 0: {solved.message}")
    values = solved.y.T[:0:-1]
    slopes = np.stack([rates(t, v) for t, v in zip(times, values, strict=True)])
    if follow:
        s = np.stack([_explain(e, slope) for e, slope in zip(expansions, p, strict=True)])
        part, slope_in_time = slice(d * d, d * d + d), PchipInterpolator(knots, s).derivative()
        values[:, part], slopes[:, part] = s[:-1], slope_in_time(times)
    found = QuadraticValue(d, len(times)).double()
    found.times.copy_(torch.from_numpy(times))
    found.values.copy_(torch.from_numpy(np.concatenate([values, r[:-1]], 1)))
    found.slopes.copy_(torch.from_numpy(np.concatenate([slopes, dr[:-1]], 1)))
    return found


def _explain(e: _Expansion, p: np.ndarray) -> np.ndarray:
    """The costate nearest to `p` with which the control of the path minimises the Hamiltonian."""
    return p - np.linalg.pinv(e.B.T) @ (e.l_u + e.B.T @ p)


def _along(problem: Problem, times: np.ndarray, path: OpenLoop | None) -> tuple[np.ndarray, ...]:
    """States, their velocities, controls and costates at `times`."""
    if path is not None:
        nodes = path.times.numpy()
        states, costates = (CubicSpline(nodes, v.numpy()) for v in (path.states, path.costates))
        middles = (nodes[1:] + nodes[:-1]) / 2
        controls = interp1d(middles, path.controls.numpy(), axis=0, fill_value="extrapolate")
        return states(times), states(times, 1), controls(times), costates(times)
    found = (problem.reference(torch.tensor(t, dtype=torch.float64)) for t in times)
    references = [state for state in found if state is not None]
    if len(references) < len(times):
        raise SolveError(f"{type(problem).__name__} has no `reference`, and no path is given")
    r = torch.stack(references).numpy()
    none = np.zeros((len(times), problem.control_dim))
    return r, CubicSpline(times, r)(times, 1), none, np.zeros_like(r)


def _between(expansions: list[_Expansion], times: np.ndarray, t: float) -> _Expansion:
    """The expansion at time t, linear between two of the list."""
    i = int(np.clip(np.searchsorted(times, t), 1, len(times) - 1))
    w = min((t - times[i - 1]) / (times[i] - times[i - 1]), 1.0)
    a, b = vars(expansions[i - 1]), vars(expansions[i])
    return _Expansion(**{name: (1 - w) * a[name] + w * b[name] for name in a})


def _expand(
    problem: Problem, time: float, r: np.ndarray, dr: np.ndarray, u: np.ndarray, p: np.ndarray
) -> _Expansion:
    """Around the reference and its control; the dynamics' curvature counts with costate p."""
    t, velocity = torch.tensor(time, dtype=torch.float64), torch.from_numpy(dr)
    k, d = problem.control_dim, problem.dim
    both = torch.from_numpy(np.concatenate([r, u]))[None].requires_grad_(True)
    costate = torch.from_numpy(p)

    def dynamics(zu: Tensor) -> Tensor:
        return problem.dynamics(t, *zu.split([d, k], 1))

    def cost(zu: Tensor) -> Tensor:
        return problem.running_cost(t, *zu.split([d, k], 1))

    F = jacobian(dynamics, both)[0].detach().numpy()
    H = jacobian(lambda y: gradient(cost(y) + dynamics(y) @ costate, y), both)[0].detach().numpy()
    slope = gradient(cost(both), both)[0].detach().numpy()
    Q, N, R = H[:d, :d], H[:d, d:], H[d:, d:]
    if np.linalg.eigvalsh(R)[0] <= 0:
        raise SolveError("the Hamiltonian is not convex in the control along the reference")
    # A concave direction could end the solution early: it is taken as flat.
    coupled = N @ np.linalg.solve(R, N.T)
    curvature, directions = np.linalg.eigh(Q - coupled)
    Q = (directions * curvature.clip(0)) @ directions.T + coupled
    f = (dynamics(both)[0] - velocity).detach().numpy()
    return _Expansion(f, F[:, :d], F[:, d:], cost(both).item(), slope[:d], slope[d:], Q, N, R)
