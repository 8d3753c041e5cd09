"""Adams methods: the slopes of earlier steps in place of stages."""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache, reduce
from operator import mul

import numpy as np
import torch
from torch import Tensor

from ..errors import ArgumentError, SolveWarning
from .dense import Scalar
from .explicit import RungeKutta, Step
from .field import Field
from .tableaus import DOPRI8, RK4

MAX_ORDER = 12  # the weights grow and the region of stability shrinks with the order

# Points in (-1, 1) and weights, by their number n; exact for polynomials of degree 2 n - 1.
GAUSS_LEGENDRE = {
    n: tuple(column.tolist() for column in np.polynomial.legendre.leggauss(n))
    for n in range(1, MAX_ORDER // 2 + 1)
}


def lagrange_integrals(nodes: Tensor, dt: Tensor) -> Tensor:
    """The integrals from 0 to dt of the Lagrange polynomials of `nodes`, differentiable.

    Gauss-Legendre quadrature of the products is exact here, and stable where the nodes are many
    or lie close together; expanded polynomials are not.

    Args:
        nodes: distinct, (nodes, ...), relative to the start of the step.
        dt: (...).

    Returns:
        (nodes, ...), in the dtype and on the device of `dt`.
    """
    count = len(nodes)
    ones = (1,) * dt.ndim
    points, gauss = (dt.new_tensor(column) for column in GAUSS_LEGENDRE[(count + 1) // 2])
    shares = ((1 + points) / 2).view(-1, 1, 1, *ones)
    own = torch.eye(count, dtype=torch.bool, device=dt.device).view(count, count, *ones)
    above = torch.where(own, 1.0, shares * dt - nodes)  # (points, nodes, nodes, ...)
    below = torch.where(own, 1.0, nodes[:, None] - nodes)
    basis = reduce(mul, (above / below).unbind(2))  # (points, nodes, ...)
    return dt / 2 * (gauss.view(-1, 1, *ones) * basis).sum(0)


@lru_cache(maxsize=4096)
def adams_weights(ratios: tuple[float, ...]) -> tuple[float, ...]:
    """The weights of the slopes at `ratios`, nodes in units of the step.

    Example:
        >>> [round(24 * weight, 9) for weight in adams_weights((0.0, -1.0, -2.0, -3.0))]
        [55.0, -59.0, 37.0, -9.0]
    """
    nodes = torch.tensor(ratios, dtype=torch.float64, device="cpu")
    return tuple(lagrange_integrals(nodes, nodes.new_ones(())).tolist())


def _weights(nodes: Sequence[Scalar], dt: Scalar) -> Sequence[Scalar]:
    """What the slopes at `nodes` are multiplied with."""
    if isinstance(dt, Tensor):
        tensors = [node for node in nodes if isinstance(node, Tensor)]
        return lagrange_integrals(torch.stack(tensors), dt).unbind(0)
    ratios = tuple(float(node) / dt for node in nodes)
    # Equal steps differ by rounding; without it their weights are found in the cache.
    equal = tuple(float(round(ratios[0]) - j) for j in range(len(ratios)))
    if max(abs(x - n) for x, n in zip(ratios, equal, strict=True)) < 1e-12:
        ratios = equal
    return [weight * dt for weight in adams_weights(ratios)]


def _add(z: Tensor, weights: Sequence[Scalar], slopes: Sequence[Tensor]) -> Tensor:
    """z + sum_j weights_j slopes_j."""
    for weight, slope in zip(weights, slopes, strict=True):
        if isinstance(weight, Tensor):
            z = torch.addcmul(z, slope, weight)
        else:
            z = torch.add(z, slope, alpha=weight)
    return z


@dataclass(frozen=True)
class Adams:
    """An Adams method: one or two evaluations a step, whatever the order.

    The slopes at earlier nodes are interpolated, through the nodes as they lie, and the
    polynomial is integrated over the step. `explicit_adams` (Adams-Bashforth) stops there.
    `implicit_adams` (Adams-Bashforth-Moulton) takes that as a prediction, and interpolates again
    with the slope it finds at the end of the step until the change is within the tolerances:
    more accurate and more stable, for at least one evaluation more. Prefer these methods where
    the velocity is costly and smooth, and steps are small for other reasons; neither suits
    stiff problems, nor velocities that jump.

    The first `max_order` - 1 steps are made by rk4, or by dopri8 if `max_order` is above 4. Those
    few steps have errors of order nine, and this is the order of all methods above it. They are
    stable for very short steps only, the explicit ones above all. Gradients are those of the
    steps as they were made, the times included.

    Args:
        implicit: Adams-Bashforth-Moulton.
        max_order: of the method, 1 to 12.
        max_iters: evaluations at the end of a step, at most (implicit only).
        rtol, atol: the corrector stops once it changes each element of z by no more than
            atol + rtol |z| (implicit only).

    Raises:
        ArgumentError: `max_order` or `max_iters` are out of range.

    Source: Hairer, Norsett, Wanner, Solving Ordinary Differential Equations I, 1993, sections
    III.1 and III.5 (variable steps).
    """

    implicit: bool
    max_order: int = 4
    max_iters: int = 4
    rtol: float | Tensor = 1e-7
    atol: float | Tensor = 1e-9
    offsets = (0.0, 1.0)
    adaptive = False
    carries_slope = False

    def __post_init__(self) -> None:
        if not 1 <= self.max_order <= MAX_ORDER:
            raise ArgumentError(f"`max_order` must be 1 to {MAX_ORDER}, got {self.max_order}")
        if self.max_iters < 1:
            raise ArgumentError(f"`max_iters` must be at least 1, got {self.max_iters}")

    @property
    def name(self) -> str:
        return "implicit_adams" if self.implicit else "explicit_adams"

    @property
    def order(self) -> int:
        return min(self.max_order, self._starter.order + 1)  # few steps: their local error counts

    @property
    def _starter(self) -> RungeKutta:
        return RungeKutta(RK4 if self.max_order <= 4 else DOPRI8)

    def start(self, field: Field, t: Tensor, z: Tensor) -> tuple[Tensor, ...]:
        return ()

    def step(
        self, field: Field, ts: Sequence[Tensor], dt: Scalar, z: Tensor, carry: tuple[Tensor, ...]
    ) -> Step:
        """From (ts[0], z) over dt to ts[1].

        `carry` holds the slopes at earlier nodes, the latest first, and then how far these nodes
        lie from this one, in one tensor (on the CPU and in double precision if `dt` is a float).
        """
        slopes = (field(ts[0], z), *carry[:-1])
        nodes: list[Scalar] = [torch.zeros_like(dt) if isinstance(dt, Tensor) else 0.0]
        if carry:
            nodes += carry[-1].unbind(0) if isinstance(dt, Tensor) else carry[-1].tolist()
        if len(slopes) < self.max_order:
            starter = self._starter
            inside = [
                ts[0] if c == 0.0 else ts[1] if c == 1.0 else torch.lerp(ts[0], ts[1], c)
                for c in starter.offsets
            ]
            y = starter.step(field, inside, dt, z, slopes[:1]).z
        else:
            y = _add(z, _weights(nodes, dt), slopes)
            if self.implicit:
                y = self._correct(field, ts[1], dt, z, y, slopes[:-1], nodes[:-1])
        kept = self.max_order - 1
        return Step(y, _history(slopes[:kept], nodes[:kept], dt), slopes[:1])

    def _correct(
        self,
        field: Field,
        t: Tensor,
        dt: Scalar,
        z: Tensor,
        y: Tensor,
        slopes: Sequence[Tensor],
        nodes: Sequence[Scalar],
    ) -> Tensor:
        """Functional iteration of y = z + (its own slope at t, and `slopes`), from a prediction."""
        first, *rest = _weights([dt, *nodes], dt)
        known = _add(z, rest, slopes)
        for _ in range(self.max_iters):
            before, y = y, _add(known, [first], [field(t, y)])
            if self._settled(before.detach(), y.detach()):
                return y
        warnings.warn(
            f"the corrector of {self.name} did not converge within max_iters = {self.max_iters} "
            "iterations; take smaller steps, loosen `rtol` and `atol`, or raise `max_iters`",
            SolveWarning,
            stacklevel=3,
        )
        return y

    def _settled(self, before: Tensor, y: Tensor) -> bool:
        scale = torch.maximum(before.abs(), y.abs())
        return bool(((y - before).abs() <= self.atol + self.rtol * scale).all())


def _history(slopes: tuple[Tensor, ...], nodes: Sequence[Scalar], dt: Scalar) -> tuple[Tensor, ...]:
    """What the next step needs of this one and those before; nothing if there are no slopes."""
    if not slopes:
        return ()
    lags = [node - dt for node in nodes]
    tensors = [lag for lag in lags if isinstance(lag, Tensor)]
    if tensors:
        return *slopes, torch.stack(tensors)
    return *slopes, torch.tensor(lags, dtype=torch.float64, device="cpu")
