"""Potential mean-field games in two dimensions on a grid: a check of the Lagrangian solution.

    minimise  int_0^1 int a1 |m|^2 / (2 rho) + Q rho + lambda_E rho log rho dx dt
              + a3 KL(rho(1) | rho_1)
    subject to  d_t rho + div m = 0,  no flux through the walls,  rho(0) = rho_0

Finite volumes of second order: rho on cells at the time nodes k = 0..N, m on faces between the
nodes, |m|^2 over the mean of the four densities beside it, so the discrete problem is convex. It is
solved by the alternating direction method of multipliers on copies of densities and momenta: one
half step projects onto the continuity equation by fast cosine and sine transforms, the other
minimises the cost, with Q, entropy and KL, exactly in each face and cell. The multiplier of the
continuity equation is minus the value function, and any function in its place gives a lower bound
of the minimum.

Source: Ruthotto et al., A machine learning framework for solving high-dimensional mean field game
and mean field control problems (arXiv 1912.01825), section on the Eulerian comparison, for the
problem; Papadakis, Peyre, Oudet, Optimal transport with proximal splitting (arXiv 1304.5784).
"""

import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
from scipy.integrate import trapezoid
from scipy.interpolate import interpn
from scipy.special import logsumexp, xlogy

from ..errors import ArgumentError, SolveWarning
from .splitting import Continuity, Copies, face_minimum, node_minimum
from .staggered import AXES, Array, Box, Grid, gradient, mean, mesh, to_faces, to_nodes, upwind

Function = Callable[[Array], Array]  # of points (n, 2), (n,)
Velocity = Callable[[float, Array], Array]  # of t and points (n, 2), (n, 2)

FLOOR = 1e-7  # of the densities rho_0 and rho_1
COARSEST = 16  # cells of a side: below, a grid is no start for a finer one
RELAXATION = 1.8  # of the alternating directions, between 0 and 2
CHECK_EVERY = 20  # iterations between two looks at the gap and at the penalty
CFL = 0.5  # with it the limited upwind scheme keeps densities positive
SUBCELLS = 16  # points of a side with which a cell is counted inside an ellipse


@dataclass(frozen=True)
class Cost:
    """The terms of the objective, without their weights, and the weighted `total`.

    Args:
        transport: int int |v|^2 / 2 rho.
        preference: int int Q rho.
        entropy: int int rho log rho.
        terminal: KL(rho(1) | rho_1).
        total: a1 transport + preference + lambda_E entropy + a3 terminal.
    """

    transport: float
    preference: float
    entropy: float
    terminal: float
    total: float


@dataclass(frozen=True)
class Pushed:
    """Densities moved by a given velocity.

    Args:
        rho: on cells at the time nodes, (steps + 1, nx, ny).
        cost: its objective.
    """

    rho: Array
    cost: Cost


@dataclass(frozen=True)
class EulerianSolution:
    """The optimum of an `EulerianGame`.

    Args:
        game: what was solved.
        rho: densities on cells at the time nodes, (steps + 1, nx, ny). They fulfil the discrete
            continuity equation to round-off, and are positive up to `residual`.
        momentum: through x faces (steps, nx + 1, ny) and y faces (steps, nx, ny + 1).
        value: the value function Phi, on cells between the time nodes, (steps, nx, ny).
        cost: the terms of the objective, from the second, positive copy of the densities.
        bound: no densities on this grid cost less.
        gap: distance of `cost.total` from `bound`, plus what closing `residual` would cost, over
            the sum of the sizes of the weighted terms.
        residual: distance between the two copies of densities and momenta, over their norm.
        iterations: on this grid.
    """

    game: "EulerianGame"
    rho: Array
    momentum: tuple[Array, Array]
    value: Array
    cost: Cost
    bound: float
    gap: float
    residual: float
    iterations: int

    def velocity(self, t: float, points: Array) -> Array:
        """v = -grad Phi / a1 at time t and points (n, 2), (n, 2): linear between faces and times.

        At the centres of faces, halfway between time nodes, it is exactly that of the faces.
        """
        game = self.game
        at = np.column_stack([np.full(len(points), t), points])
        found = []
        for axis, h in zip(AXES, game.grid.spacing, strict=True):
            axes = game.grid.axes(axis)
            inside = np.clip(at, [a[0] for a in axes], [a[-1] for a in axes])
            found.append(interpn(axes, -gradient(self.value, axis, h) / game.transport, inside))
        return np.column_stack(found)


@dataclass(frozen=True, kw_only=True)
class EulerianGame:
    """A potential mean-field game on [0, 1] and on the cells of a box.

    Args:
        initial: log rho_0, callable of points (n, 2) -> (n,). The density is floored at 1e-7 and
            normalised to mass 1 in the box, as is rho_1.
        terminal: log rho_1, likewise.
        box: ((x_low, x_high), (y_low, y_high)).
        cells: (nx, ny).
        steps: of time.
        transport: a1.
        terminal_weight: a3.
        preference: Q, callable of points (n, 2) -> (n,), or None for Q = 0.
        entropy: lambda_E.

    Raises:
        ArgumentError: a weight, the box or a number of cells or steps makes no sense, or a callable
            returns nan or inf (a log-density may be -inf).
        ShapeError: a callable does not return (n,).
    """

    initial: Function
    terminal: Function
    box: Box
    cells: tuple[int, int] = (64, 64)
    steps: int = 32
    transport: float = 1.0
    terminal_weight: float = 5.0
    preference: Function | None = None
    entropy: float = 0.0

    def __post_init__(self) -> None:
        for name in ("transport", "terminal_weight"):
            weight = getattr(self, name)
            if not 0 < weight < np.inf:
                raise ArgumentError(f"`{name}` must be positive, got {weight}")
        if not 0 <= self.entropy < np.inf:
            raise ArgumentError(f"`entropy` must not be negative, got {self.entropy}")
        _ = self.rho_0, self.rho_1, self.Q  # what they return is checked now

    @cached_property
    def grid(self) -> Grid:
        """Where densities and velocities live."""
        return Grid(self.box, self.cells, self.steps)

    @cached_property
    def rho_0(self) -> Array:
        """The initial density, (nx, ny)."""
        return self._density("initial", self.initial)

    @cached_property
    def rho_1(self) -> Array:
        """The density to end at, (nx, ny)."""
        return self._density("terminal", self.terminal)

    @cached_property
    def Q(self) -> Array:
        """The preference, (nx, ny)."""
        if self.preference is None:
            return np.zeros(self.cells)
        return self.grid.sample("preference", self.preference)

    def solve(self, *, tolerance: float = 5e-4, max_iterations: int = 4000) -> EulerianSolution:
        """The optimal densities, momenta and value function of the discrete problem.

        Starts from the solution on half as many cells and steps where these are even.

        Args:
            tolerance: of `EulerianSolution.gap`.
            max_iterations: on each grid; a `SolveWarning` says when they do not suffice.
        """
        (nx, ny), steps = (n // 2 for n in self.cells), self.steps // 2
        even = (2 * nx, 2 * ny) == self.cells and 2 * steps == self.steps
        start = None
        if even and min(nx, ny) >= COARSEST and steps > 1:
            coarse = replace(self, cells=(nx, ny), steps=steps)
            start = coarse.solve(tolerance=tolerance, max_iterations=max_iterations)
        solution = self._alternate(start, tolerance, max_iterations)
        if solution.gap > tolerance:
            warnings.warn(
                f"gap {solution.gap:.1e} after {max_iterations} iterations on {self.cells} cells: "
                f"`tolerance` {tolerance:.1e} needs a larger `max_iterations`",
                SolveWarning,
                stacklevel=2,
            )
        return solution

    def push(self, velocity: Velocity) -> Pushed:
        """rho_0 moved by `velocity`, and its objective, by a conservative scheme of second order.

        The velocity is taken at face centres halfway between time nodes.

        Args:
            velocity: callable of t and points (n, 2) -> (n, 2); an `EulerianSolution` has one.

        Raises:
            ShapeError, ArgumentError: `velocity` returns another shape, or what is not finite.
        """
        rho, densities, transport = self.rho_0, [self.rho_0], 0.0
        for k in range(self.steps):
            v = [self.grid.face_velocity(velocity, (k + 0.5) * self.grid.dt, axis) for axis in AXES]
            courant = sum(
                np.abs(u).max() / h for u, h in zip(v, self.grid.spacing, strict=True) if u.size
            )
            substeps = max(1, int(np.ceil(self.grid.dt * courant / CFL)))
            tau = self.grid.dt / substeps
            for _ in range(substeps):
                new = upwind(rho, v, self.grid.spacing, tau)
                power = sum(
                    np.sum(u**2 * mean((rho + new) / 2, a)) for u, a in zip(v, AXES, strict=True)
                )
                transport += tau * self.grid.volume * float(power) / 2
                rho = new
            densities.append(rho)
        full = np.stack(densities)
        return Pushed(full, self._cost(transport, full))

    def mean_preference(self, rho: Array) -> float:
        """int Q rho of a density on the cells, (nx, ny)."""
        return float(np.sum(self.Q * rho)) * self.grid.volume

    def share_inside(self, rho: Array, semi_axes: tuple[float, float]) -> float:
        """The mass of a density (nx, ny) where (x / a)^2 + (y / b)^2 < 1, (a, b) = `semi_axes`."""
        (nx, ny), n = self.cells, SUBCELLS
        fine = [
            np.linspace(start, end, 2 * n * m + 1)[1::2]
            for (start, end), m in zip(self.box, self.cells, strict=True)
        ]
        x, y = ((z / a) ** 2 for z, a in zip(fine, semi_axes, strict=True))
        fraction = (x[:, None] + y < 1).reshape(nx, n, ny, n).mean((1, 3))
        return float(np.sum(fraction * rho)) * self.grid.volume

    def lower_bound(self, value: Array) -> float:
        """What no densities cost less than, for any value function (steps, nx, ny).

        It is the minimum of the Lagrangian over m and over rho >= 0 of mass 1.
        """
        phi = -value
        x_faces, y_faces, nodes, *_ = self._multipliers(phi)
        alpha, beta = self._node_cost[0].ravel(), self._node_cost[1]
        slope = (beta - nodes).reshape(self.steps, -1)
        lowest = slope.min(1)
        for k in np.flatnonzero(alpha):
            lowest[k] = -alpha[k] * (logsumexp(-slope[k] / alpha[k]) + np.log(self.grid.volume))
        lowest[-1] /= 2
        first = mean(x_faces[0], -2) + mean(y_faces[0], -1) + self.Q
        first = self.rho_0 * (first / 2 - phi[0] / self.grid.dt)
        first += self.entropy * xlogy(self.rho_0, self.rho_0) / 2
        return self.grid.dt * float(lowest.sum() + first.sum() * self.grid.volume)

    def _alternate(
        self, start: EulerianSolution | None, tolerance: float, max_iterations: int
    ) -> EulerianSolution:
        speed2 = self._random_pairing()  # the units of m^2 / rho^2
        weights = (speed2, speed2, speed2, 1.0, 1.0)
        project = Continuity(self.rho_0, self.grid.spacing, self.steps, speed2)
        # The penalty, in units of a1 / rho; Y are the multipliers over penalty and weights.
        kappa = self.transport / np.sqrt(self._squared(self.rho_0) * self._squared(self.rho_1))
        rho, momentum, phi = self._start(start)
        V = [*(to_faces(mean(self._full(rho), -3), a) for a in AXES), rho, *momentum]
        Y = [y / (kappa * w) for y, w in zip(self._multipliers(phi), weights, strict=True)]
        for iteration in range(1, max_iterations + 1):
            U, phi = project([v - y for v, y in zip(V, Y, strict=True)])
            Z = [RELAXATION * (u - v) + v + y for u, v, y in zip(U, V, Y, strict=True)]
            before, V = V, self._minimise(Z, kappa, speed2)
            Y = [z - v for z, v in zip(Z, V, strict=True)]
            if iteration % CHECK_EVERY and iteration < max_iterations:
                continue
            cost = self._cost(self._action(V[:2], U[3:]), self._full(V[2]))
            phi = kappa * phi
            bound = self.lower_bound(-phi)
            apart = [u - v for u, v in zip(U, V, strict=True)]
            closing = kappa * self._product(Y, apart, weights)
            gap = (abs(cost.total - bound) + abs(closing)) / self._size(cost)
            size = self._product(V, V, weights)
            residual = np.sqrt(self._product(apart, apart, weights) / size)
            if gap <= tolerance:
                break
            # Balances the two errors of the objective, and the relative residuals of the two
            # halves (Wohlberg, arXiv 1704.06209); either alone may run away.
            moved = [v - b for v, b in zip(V, before, strict=True)]
            pull = self._product(moved, moved, weights) / self._product(Y, Y, weights)
            errors = abs(closing / (cost.total + closing - bound))
            factor = np.clip((errors * residual / np.sqrt(pull)) ** 0.25, 1 / 1.5, 1.5)
            kappa, Y = kappa * factor, [y / factor for y in Y]
        return EulerianSolution(
            game=self,
            rho=self._full(U[2]),
            momentum=(U[3], U[4]),
            value=-phi,
            cost=cost,
            bound=bound,
            gap=gap,
            residual=float(residual),
            iterations=iteration,
        )

    def _start(self, start: EulerianSolution | None) -> tuple[Array, list[Array], Array]:
        """Densities at the nodes 1..N, momenta and phi: at rest, or those of a coarser grid."""
        if start is None:
            rho = np.repeat(self.rho_0[None], self.steps, 0)
            momentum = [np.zeros([len(a) for a in self.grid.axes(axis)]) for axis in AXES]
            return rho, momentum, np.zeros_like(rho)
        old = start.game.grid
        rho = _resample(np.maximum(start.rho, 0), old.nodes, self.grid.nodes)[1:]
        momentum = [
            _resample(m, old.axes(a), self.grid.axes(a))
            for m, a in zip(start.momentum, AXES, strict=True)
        ]
        return rho, momentum, -_resample(start.value, old.axes(), self.grid.axes())

    def _minimise(self, Z: Copies, kappa: float, speed2: float) -> Copies:
        """The minimiser of cost plus penalised distance to Z: face by face, cell by cell."""
        ratio, penalty, (alpha, beta) = self.transport / kappa, kappa * speed2, self._node_cost
        x, m_x = face_minimum(Z[0], Z[3], ratio, speed2)
        y, m_y = face_minimum(Z[1], Z[4], ratio, speed2)
        if self.entropy > 0:
            rho = node_minimum(Z[2], alpha, beta, penalty)
        else:
            rho = np.maximum(Z[2] - beta / penalty, 0)
            rho[-1] = node_minimum(Z[2][-1], alpha[-1], beta[-1], penalty)
        return [x, y, rho, m_x, m_y]

    def _multipliers(self, phi: Array) -> Copies:
        """The multipliers of the copies that go with phi: of rho at the faces, rho, and m."""
        slopes = [gradient(phi, a, h) for a, h in zip(AXES, self.grid.spacing, strict=True)]
        kinetic = [g**2 / (2 * self.transport) for g in slopes]
        after = np.concatenate([phi[1:], -phi[-1:]])
        x, y = (mean(e, a) for e, a in zip(kinetic, AXES, strict=True))
        nodes = to_nodes(x + y) + (after - phi) / self.grid.dt
        return [-kinetic[0], -kinetic[1], nodes, *slopes]

    def _action(self, rho: list[Array], momentum: list[Array]) -> float:
        """int int |m|^2 / (2 rho) from densities and momenta at the faces."""
        total = 0.0
        for r, m in zip(rho, momentum, strict=True):
            total += float(np.sum(np.divide(m**2, 2 * r, out=np.zeros_like(m), where=r > 0)))
        return total * self.grid.volume * self.grid.dt

    def _cost(self, transport: float, rho: Array) -> Cost:
        """The terms; `rho` is (steps + 1, nx, ny), and integrals in time are trapezoidal."""
        rho = np.maximum(rho, 0)
        preference = self.grid.volume * float(
            trapezoid((rho * self.Q).sum((1, 2)), dx=self.grid.dt)
        )
        entropy = self.grid.volume * float(trapezoid(xlogy(rho, rho).sum((1, 2)), dx=self.grid.dt))
        terminal = self.grid.volume * float(np.sum(xlogy(rho[-1], rho[-1] / self.rho_1)))
        running = self.transport * transport + preference + self.entropy * entropy
        total = running + self.terminal_weight * terminal
        return Cost(transport, preference, entropy, terminal, total)

    def _size(self, cost: Cost) -> float:
        """The sum of the sizes of the weighted terms: the total itself may be zero."""
        running = self.transport * cost.transport + abs(cost.preference)
        return (
            running + self.entropy * abs(cost.entropy) + self.terminal_weight * abs(cost.terminal)
        )

    def _product(self, a: Copies, b: Copies, weights: tuple[float, ...]) -> float:
        """The scalar product of copies; the last node weighs half."""
        products = [w * np.sum(x * y) for w, x, y in zip(weights, a, b, strict=True)]
        last = weights[2] * np.sum(a[2][-1] * b[2][-1]) / 2
        return self.grid.dt * self.grid.volume * float(sum(products) - last)

    def _squared(self, rho: Array) -> float:
        """int rho^2, the density where a particle is on average."""
        return self.grid.volume * float(np.sum(rho**2))

    def _full(self, rho: Array) -> Array:
        """All nodes from the nodes 1..N."""
        return np.concatenate([self.rho_0[None], rho])

    @cached_property
    def _node_cost(self) -> tuple[Array, Array]:
        """alpha, beta: node k costs alpha rho log rho + beta rho, times its weight: 1, or 1/2."""
        alpha = np.full((self.steps, 1, 1), float(self.entropy))
        beta = np.repeat(self.Q[None], self.steps, 0)
        last = 2 * self.terminal_weight * self.steps
        alpha[-1] += last
        beta[-1] -= last * np.log(self.rho_1)
        return alpha, beta

    def _random_pairing(self) -> float:
        """The mean squared distance of a point of rho_0 from an independent one of rho_1."""
        points = mesh(*self.grid.centres)
        weights = [r.ravel() * self.grid.volume for r in (self.rho_0, self.rho_1)]
        means = [w @ points for w in weights]
        return float(sum((w @ points**2).sum() for w in weights) - 2 * means[0] @ means[1])

    def _density(self, name: str, log_density: Callable[[Array], Array]) -> Array:
        rho = np.maximum(np.exp(self.grid.sample(name, log_density)), FLOOR)
        return rho / (rho.sum() * self.grid.volume)


def _resample(values: Array, old: list[Array], new: list[Array]) -> Array:
    """Linear interpolation; beyond the ends, the end."""
    inside = [np.clip(n, o[0], o[-1]) for n, o in zip(new, old, strict=True)]
    points = np.stack(np.meshgrid(*inside, indexing="ij"), -1)
    return interpn(old, values, points)
