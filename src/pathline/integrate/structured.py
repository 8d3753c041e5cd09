"""Methods that keep a structure of the flow: their steps can be taken back exactly.

All are explicit and of order 2, and `invert` undoes `step` up to round-off. That lets
gradient="reversible" compute the states again backwards. A step that can be undone damps nothing:
these methods suit velocities that turn or exchange, such as Hamiltonian and antisymmetric ones.
Where solutions decay, errors grow, forwards or backwards.

Adding a method: a class like those below, and its object in `METHODS`.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from ..errors import ArgumentError, ShapeError
from .dense import Scalar, combine
from .explicit import Step
from .field import Field
from .fixed import Method

Carry = tuple[Tensor, ...]
PAIRS = [pytree.tree_flatten(pair)[1] for pair in ((0, 0), [0, 0])]


class Reversible(Method, Protocol):
    """A one-step method whose steps can be undone."""

    def invert(
        self, field: Field, ts: Sequence[Tensor], dt: Scalar, z_next: Tensor, carry_next: Carry
    ) -> tuple[Tensor, Carry]:
        """(z, carry) from which `step` with the same `ts` and `dt` gave (z_next, carry_next)."""
        ...


class Separable(nn.Module):
    """The velocity dy/dt = f(t, z), dz/dt = g(t, y) of a pair (y, z), of which halves are asked.

    "leapfrog" and "verlet" evaluate f and g one at a time, and each counts as an evaluation;
    other methods call both. A callable `(t, (y, z)) -> (dy, dz)` serves them too, but it is
    evaluated as a whole and half of its work is lost; its dy must not depend on y, nor dz on z.

    Args:
        f: callable `(t, z) -> dy/dt` of the shape of y; a module's parameters are found.
        g: callable `(t, y) -> dz/dt` of the shape of z; likewise.

    Example:
        >>> pendulum = Separable(lambda t, p: p, lambda t, q: -torch.sin(q))
        >>> pendulum(torch.tensor(0.0), (torch.zeros(1), torch.ones(1)))
        (tensor([1.]), tensor([-0.]))
    """

    f: Callable[[Tensor, Tensor], Tensor]
    g: Callable[[Tensor, Tensor], Tensor]

    def __init__(
        self,
        f: Callable[[Tensor, Tensor], Tensor],
        g: Callable[[Tensor, Tensor], Tensor],
    ) -> None:
        super().__init__()
        self.f = f
        self.g = g

    def forward(self, t: Tensor, state: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        y, z = state
        return self.f(t, z), self.g(t, y)


@dataclass(frozen=True)
class AsynchronousLeapfrog:
    """The midpoint of a step reached by a velocity w that is carried along; any velocity.

    w starts as v(t0, z0). A step drifts to the middle by w, sets w to its mirror image at the
    velocity found there, and drifts on:

        k = z + w dt/2,   w' = 2 v(t + dt/2, k) - w,   z' = k + w' dt/2.

    One evaluation for a step, of order 2 on any grid. On dz/dt = i omega z it is stable for
    |dt omega| <= 1, and for no decaying z: w then drifts off from v in growing alternations.

    Source: Mutze, An asynchronous leapfrog method II, arXiv 1311.6602, 2013; Zhuang et al., MALI:
    a memory efficient and reverse accurate integrator for neural ODEs, ICLR 2021.
    """

    name = "asynchronous_leapfrog"
    order = 2
    offsets = (0.5,)
    adaptive = False
    carries_slope = False  # w is near the slope at a node, not equal to it
    reversible = True

    def start(self, field: Field, t: Tensor, z: Tensor) -> Carry:
        return (field(t, z),)

    def step(self, field: Field, ts: Sequence[Tensor], dt: Scalar, z: Tensor, carry: Carry) -> Step:
        (w,) = carry
        k = combine(z, (0.5,), (w,), dt)
        u = field(ts[0], k)
        w = 2 * u - w
        return Step(combine(k, (0.5,), (w,), dt), (w,), (u,))

    def invert(
        self, field: Field, ts: Sequence[Tensor], dt: Scalar, z_next: Tensor, carry_next: Carry
    ) -> tuple[Tensor, Carry]:
        (w,) = carry_next
        k = combine(z_next, (-0.5,), (w,), dt)
        w = 2 * field(ts[0], k) - w
        return combine(k, (-0.5,), (w,), dt), (w,)


@dataclass(frozen=True)
class ReversibleMidpoint:
    """The two-step midpoint rule z_{n+1} = z_{n-1} + 2 dt v(t_n, z_n); any velocity.

    Written with b = (v_n - (z_n - z_{n-1}) / dt_{n-1}) / dt_{n-1}, nearly half of z'', as a step
    that needs no earlier length:

        z' = z + dt v + dt^2 b,   v' = v(t', z'),   b' = (v' - v) / dt - b.

    So it is of order 2 on unequal steps as well, where with r = dt_n / dt_{n-1} it reads
    z_{n+1} = (1 - r^2) z_n + r^2 z_{n-1} + (1 + r) dt_n v_n. The carry is (v, b); the first step
    starts from (v,) alone and takes b such that it is a step of the explicit midpoint method.

    One evaluation for a step, two for the first. Stability as for "asynchronous_leapfrog", which
    is this rule for the midpoints of its steps. Two steps share the slope at a node: where a
    velocity jumps there, it is seen from before the jump.

    Source: Chang et al., Reversible architectures for arbitrarily deep residual neural networks,
    AAAI 2018 (their first step is Euler's, and steps are equal).
    """

    name = "reversible_midpoint"
    order = 2
    offsets = (0.0, 0.5, 1.0)
    adaptive = False
    carries_slope = False  # b comes along too
    reversible = True

    def start(self, field: Field, t: Tensor, z: Tensor) -> Carry:
        return (field(t, z),)

    def step(self, field: Field, ts: Sequence[Tensor], dt: Scalar, z: Tensor, carry: Carry) -> Step:
        v = carry[0]
        if len(carry) == 1:
            middle = field(ts[1], combine(z, (0.5,), (v,), dt))
            b = _divided(middle - v, dt)
        else:
            b = carry[1]
        z_next = combine(z, (1.0,), (v + dt * b,), dt)
        v_next = field(ts[2], z_next)
        return Step(z_next, (v_next, _divided(v_next - v, dt) - b), (v, v_next))

    def invert(
        self, field: Field, ts: Sequence[Tensor], dt: Scalar, z_next: Tensor, carry_next: Carry
    ) -> tuple[Tensor, Carry]:
        v_next, b_next = carry_next
        z = combine(z_next, (-1.0,), (v_next - dt * b_next,), dt)
        v = field(ts[0], z)
        return z, (v, _divided(v_next - v, dt) - b_next)


@dataclass(frozen=True)
class Leapfrog:
    """Kick, drift, kick: dq/dt = f(t, p), dp/dt = g(t, q) for a pair (q, p), both at the nodes.

        p* = p + g(t, q) dt/2,   q' = q + f(t + dt/2, p*) dt,   p' = p* + g(t + dt, q') dt/2.

    Symplectic where f and g come from a Hamiltonian T(p) + V(q), of determinant 1 in any case,
    its own inverse with -dt, and of order 2 on any grid. Stable on an oscillation of frequency
    omega for dt omega < 2. One evaluation of f and one of g for a step: the last kick is kept
    for the next step, and is that from before where g jumps at a node.

    Source: Hairer, Lubich, Wanner, Geometric Numerical Integration, 2006, section I.1.4
    (Stormer-Verlet).
    """

    name = "leapfrog"
    order = 2
    offsets = (0.0, 0.5, 1.0)
    adaptive = False
    carries_slope = False
    reversible = True
    memoryless = True  # what a step needs follows from the state

    def start(self, field: Field, t: Tensor, z: Tensor) -> Carry:
        return (_slope(field, 1, t, *_halves(field, z, self.name)),)

    def step(self, field: Field, ts: Sequence[Tensor], dt: Scalar, z: Tensor, carry: Carry) -> Step:
        (kick,) = carry
        q, p = _halves(field, z, self.name)
        p = combine(p, (0.5,), (kick,), dt)
        drift = _slope(field, 0, ts[1], q, p)
        q = combine(q, (1.0,), (drift,), dt)
        kick = _slope(field, 1, ts[2], q, p)
        p = combine(p, (0.5,), (kick,), dt)
        return Step(torch.cat([q, p], -1), (kick,), (drift, kick))

    def invert(
        self, field: Field, ts: Sequence[Tensor], dt: Scalar, z_next: Tensor, carry_next: Carry
    ) -> tuple[Tensor, Carry]:
        (kick,) = carry_next
        q, p = _halves(field, z_next, self.name)
        p = combine(p, (-0.5,), (kick,), dt)
        q = combine(q, (-1.0,), (_slope(field, 0, ts[1], q, p),), dt)
        kick = _slope(field, 1, ts[0], q, p)
        p = combine(p, (-0.5,), (kick,), dt)
        return torch.cat([q, p], -1), (kick,)


@dataclass(frozen=True)
class Verlet:
    """The staggered scheme of Hamiltonian networks for a pair (y, z); z lives half a step behind.

        z_{j+1/2} = z_{j-1/2} + h g(t_j, y_j),   y_{j+1} = y_j + h f(t_j + h/2, z_{j+1/2}).

    Give y0 = (y at t_0, z at t_0 - h/2), and get (y at t_j, z at t_j - h/2) for each time t_j. So
    it is of order 2 on equal steps. With z at t_0 in place of t_0 - h/2, and where the length of
    the steps changes, it is of order 1; "leapfrog" keeps both halves at the nodes. Networks often
    start from z_{-1/2} = 0, which doubles the features.

    One evaluation of f and one of g for a step. Symplectic where f and g come from a Hamiltonian,
    of determinant 1 in any case; on dy/dt = z, dz/dt = -y it conserves y^2 + z^2 - h y z, and
    an oscillation of frequency omega is bounded for h omega < 2.

    Source: Haber and Ruthotto, Stable architectures for deep neural networks, Inverse Problems
    34, 2017, section 3.2.
    """

    name = "verlet"
    order = 2
    offsets = (0.0, 0.5)
    adaptive = False
    carries_slope = False
    reversible = True
    memoryless = True  # what a step needs follows from the state

    def start(self, field: Field, t: Tensor, z: Tensor) -> Carry:
        _halves(field, z, self.name)
        return ()

    def step(self, field: Field, ts: Sequence[Tensor], dt: Scalar, z: Tensor, carry: Carry) -> Step:
        y, x = _halves(field, z, self.name)
        kick = _slope(field, 1, ts[0], y, x)
        x = combine(x, (1.0,), (kick,), dt)
        drift = _slope(field, 0, ts[1], y, x)
        y = combine(y, (1.0,), (drift,), dt)
        return Step(torch.cat([y, x], -1), (), (kick, drift))

    def invert(
        self, field: Field, ts: Sequence[Tensor], dt: Scalar, z_next: Tensor, carry_next: Carry
    ) -> tuple[Tensor, Carry]:
        y, x = _halves(field, z_next, self.name)
        y = combine(y, (-1.0,), (_slope(field, 0, ts[1], y, x),), dt)
        x = combine(x, (-1.0,), (_slope(field, 1, ts[0], y, x),), dt)
        return torch.cat([y, x], -1), ()


def _divided(x: Tensor, dt: Scalar) -> Tensor:
    """x / dt, and 0 for samples that rest in this step."""
    if not isinstance(dt, Tensor) or dt.ndim == 0:
        return x / dt
    rests = dt == 0
    return torch.where(rests, 0.0, x / torch.where(rests, 1.0, dt))


def _halves(field: Field, z: Tensor, name: str) -> tuple[Tensor, Tensor]:
    """The two parts of the joined state, each still flat.

    Raises:
        ArgumentError: the state is not a pair.
    """
    layout = field.layout
    if layout.spec not in PAIRS:
        raise ArgumentError(
            f'method="{name}" needs a pair: give `y0` as a tuple (y, z) of two tensors, and the '
            "velocity as Separable(f, g) with dy/dt = f(t, z) and dz/dt = g(t, y), or as a "
            "callable (t, (y, z)) -> (dy, dz)"
        )
    first, second = layout.sizes
    y, x = z.split((first, second), -1)  # whose gradients are joined at once
    return y, x


def _slope(field: Field, which: int, t: Tensor, *halves: Tensor) -> Tensor:
    """The time derivative of one half, flat as the halves are.

    Raises:
        ShapeError: the half of a `Separable` does not return the shape of its part.
        ArgumentError: it returns another dtype or device.
    """
    func, layout = field.func, field.layout
    if not isinstance(func, Separable):
        size = halves[0].shape[-1]
        dz = field(t, torch.cat(halves, -1))
        return dz.narrow(-1, 0, size) if which == 0 else dz.narrow(-1, size, halves[1].shape[-1])
    field.evaluations += 1
    name, half = ("fg"[which], (func.f, func.g)[which])
    other, like = halves[1 - which], halves[which]
    lead = other.shape[:-1]
    slope: Any = half(t, layout.leaf(other, 1 - which))
    if not isinstance(slope, Tensor):
        raise ArgumentError(
            f"`{name}` of Separable must return a tensor, got {type(slope).__name__}"
        )
    if field.cast:
        slope = slope.to(like.dtype)
    shape = (*lead, *layout.shapes[which])
    if tuple(slope.shape) != shape:
        raise ShapeError(
            f"`{name}` of Separable must return the shape of its half of the state, {shape}, got "
            f"{tuple(slope.shape)}; dy/dt = f(t, z) and dz/dt = g(t, y)"
        )
    if slope.dtype != like.dtype or slope.device != like.device:
        raise ArgumentError(
            f"`{name}` of Separable must return the dtype and device of the state, {like.dtype} "
            f"on {like.device}, got {slope.dtype} on {slope.device}"
        )
    return layout.flat(slope, which)
