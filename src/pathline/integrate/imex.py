"""Implicit-explicit Runge-Kutta steps, for velocities with a stiff linear part."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol, cast

import torch
from torch import Tensor

from ..errors import ArgumentError, ShapeError
from .dense import Scalar, combine
from .explicit import EmbeddedMethod, Step
from .field import Field, Velocity
from .tableaus import ImexTableau, Tableau


class LinearPart(Protocol):
    """A linear map A of states that can solve (I - scale A) x = z, as by a Fourier transform."""

    def __call__(self, z: Tensor) -> Tensor: ...
    def solve(self, z: Tensor, scale: Scalar) -> Tensor: ...


class MovingPart(Protocol):
    """A linear map of states that changes in time."""

    def at(self, t: Tensor) -> LinearPart: ...


@dataclass(frozen=True)
class Split:
    """The velocity explicit(t, z) + A z, with a stiff part A for an implicit-explicit method.

    It is a velocity like any other, so every method takes it; those named "imex_..." and "ars..."
    treat A implicitly and need no Newton iterations. A is constant in time, or has a method
    `at(t)`: then a step takes it as it is where the step begins, and leaves what changes to the
    explicit part.

    Args:
        explicit: callable `(t, z) -> dz`, what is left of the velocity; not stiff.
        linear: A, as a (dim, dim) matrix for the last axis of z, as its (dim,) diagonal, or as an
            object with `A(z)` and `A.solve(z, scale)`, the solution x of x - scale A x = z. There,
            `scale` is a number or a tensor that broadcasts against z. It may have
            `A.solve_slope(z, scale)`, A x of that x, where this is cheaper at once. An object with
            `at(t)`, which gives such a map, stands for an A that changes in time, and needs none.
        whole: callable `(t, z) -> explicit(t, z) + A z`, where that is known without A. Then a
            step of "imex_euler" is one solve, z' = z + dt (I - dt A)^-1 whole(t, z).

    Raises:
        ArgumentError: `explicit` can't be called, or `linear` is neither a tensor nor such an
            object.
        ShapeError: `linear` is a tensor of another shape.

    Example:
        >>> heat = Split(lambda t, z: torch.sin(z), torch.tensor([-1.0, -1e4]))
        >>> heat(torch.tensor(0.0), torch.zeros(5, 2)).shape
        torch.Size([5, 2])
    """

    explicit: Velocity
    linear: Tensor | LinearPart | MovingPart
    whole: Velocity | None = None

    def __post_init__(self) -> None:
        if not callable(self.explicit):
            raise ArgumentError(
                f"`explicit` must be callable as (t, z), got {type(self.explicit).__name__}"
            )
        if isinstance(self.linear, Tensor):
            shape = tuple(self.linear.shape)
            if len(shape) not in (1, 2) or len(set(shape)) > 1:
                raise ShapeError(
                    f"`linear` must be a (dim, dim) matrix or its (dim,) diagonal, got {shape}"
                )
        elif not hasattr(self.linear, "at") and not (
            callable(self.linear) and callable(getattr(self.linear, "solve", None))
        ):
            raise ArgumentError(
                "`linear` must be a tensor or an object with `__call__(z)` and "
                f"`solve(z, scale)`, got {type(self.linear).__name__}"
            )

    def __call__(self, t: Tensor, z: Tensor) -> Tensor:
        if self.whole is not None:
            return self.whole(t, z)
        return self.explicit(t, z) + self.frozen(t).apply(z)

    def frozen(self, t: Tensor) -> "Split":
        """The same velocity, with A as it is at time `t` and its change in the explicit part."""
        at = getattr(self.linear, "at", None)
        if at is None:
            return self
        linear = at(t)

        def explicit(time: Tensor, z: Tensor) -> Tensor:
            dz = self.explicit(time, z)
            return dz if time is t else dz + (at(time)(z) - linear(z))

        return Split(explicit, linear, self.whole)

    def apply(self, z: Tensor) -> Tensor:
        """A z.

        Raises:
            ShapeError: the last axis of z is not that of the matrix.
        """
        a = self.linear
        if not isinstance(a, Tensor):
            return cast(LinearPart, a)(z)
        if z.ndim == 0 or z.shape[-1] != len(a):
            raise ShapeError(
                f"`linear` of shape {tuple(a.shape)} needs states of shape (..., {len(a)}), got "
                f"{tuple(z.shape)}"
            )
        a = a.to(z.dtype)
        return a * z if a.ndim == 1 else z @ a.mT

    def solver(self, scale: Scalar, dtype: torch.dtype) -> Callable[[Tensor], Tensor]:
        """z -> (I - scale A)^-1 z for states of a `dtype`; a matrix is factored once."""
        if not isinstance(self.linear, Tensor):
            part = cast(LinearPart, self.linear)
            return lambda z: part.solve(z, scale)
        a = self.linear.to(dtype)
        if a.ndim == 1:
            return lambda z: z / (1 - scale * a)
        return _Factored(a, scale)

    def slopes(self, scale: Scalar, dtype: torch.dtype) -> Callable[[Tensor], Tensor]:
        """z -> (I - scale A)^-1 A z; by `A.solve_slope(z, scale)` where the object has that."""
        at_once = getattr(self.linear, "solve_slope", None)
        if at_once is not None:
            return lambda z: at_once(z, scale)
        solve = self.solver(scale, dtype)
        return lambda z: solve(self.apply(z))


class _Factored:
    """The solver of a matrix; `scale` is a number, (), or (batch, 1, ...) beside states."""

    def __init__(self, a: Tensor, scale: Scalar) -> None:
        self.rows = isinstance(scale, Tensor) and scale.ndim > 0
        if isinstance(scale, Tensor) and self.rows:
            scale = scale.unsqueeze(-1)  # (batch, 1, ..., 1, 1)
        eye = torch.eye(len(a), dtype=a.dtype, device=a.device)
        self.lu, self.pivots = torch.linalg.lu_factor(eye - scale * a)

    def __call__(self, z: Tensor) -> Tensor:
        if self.rows:
            *lead, dim = z.shape
            lu, pivots = self.lu.expand(*lead, dim, dim), self.pivots.expand(*lead, dim)
            return torch.linalg.lu_solve(lu, pivots, z.unsqueeze(-1)).squeeze(-1)
        flat = z.reshape(-1, z.shape[-1])
        return torch.linalg.lu_solve(self.lu, self.pivots, flat.mT).mT.reshape(z.shape)


@dataclass(frozen=True)
class ImexRungeKutta(EmbeddedMethod):
    """An implicit-explicit Runge-Kutta method for a `Split` velocity.

    The stiff linear part costs one linear solve a stage, whatever the step; the other part is
    evaluated as by an explicit method, and bounds the step as there. It carries the slope, of both
    parts together, at the start of the step.

    Slopes of the linear part are (I - dt a_ii A)^-1 A y: an error of A y, large where A is, passes
    through the solve that makes it harmless.

    Source: Kennedy, Carpenter, Additive Runge-Kutta schemes for convection-diffusion-reaction
    equations, Applied Numerical Mathematics 44, 2003.
    """

    pair: ImexTableau

    @property
    def name(self) -> str:
        return self.pair.name

    @property
    def order(self) -> int:
        return self.pair.order

    @property
    def tableau(self) -> Tableau:  # type: ignore[override]
        """The implicit half, which has the times of the stages and the weights of the error."""
        return self.pair.implicit

    def start(self, field: Field, t: Tensor, z: Tensor) -> tuple[Tensor, ...]:
        self._parts(field, t)
        return (field(t, z),)

    def step(
        self, field: Field, ts: Sequence[Tensor], dt: Scalar, z: Tensor, carry: tuple[Tensor, ...]
    ) -> Step:
        """From (ts[0], z) over dt; `ts` are the times of the stages.

        Raises:
            ArgumentError: the velocity is not a `Split` of a single tensor.
        """
        split, explicit = self._parts(field, ts[0])
        if split.whole is not None and self.name == "imex_euler":
            slope = split.solver(dt, z.dtype)(field(ts[0], z))
            return Step(combine(z, (1.0,), (slope,), dt), (), ())
        tables = self.pair.explicit, self.pair.implicit
        solvers: dict[float, Callable[[Tensor], Tensor]] = {}
        ks: list[Tensor] = []  # slopes of the explicit part
        ls: list[Tensor] = []  # of the linear part
        last = len(ts) - 1
        for i, t in enumerate(ts):
            y = combine(combine(z, tables[0].a[i], ks, dt), tables[1].a[i][:i], ls, dt)
            weight = tables[1].a[i][i]
            if weight != 0.0:
                if weight not in solvers:
                    solvers[weight] = split.slopes(weight * dt, z.dtype)
                slope = solvers[weight](y)
                y = combine(y, (weight,), (slope,), dt)
            else:
                slope = split.apply(y) if self._uses(i) else y
            ls.append(slope)
            # The difference is rounded as A z is; it must pass through a solve, or come with A z.
            known = i == 0 and bool(carry) and self.adaptive
            if i == last and tables[0].b[i] == 0.0 and not self.adaptive:
                continue  # nobody asks for this slope
            ks.append(carry[0] - slope if known else explicit(t, y))
        z_next = combine(combine(z, tables[0].b, ks, dt), tables[1].b, ls, dt)
        if not self.adaptive:
            return Step(z_next, (), ())
        return Step(z_next, (), [k + slope for k, slope in zip(ks, ls, strict=True)])

    def _uses(self, i: int) -> bool:
        """Somebody asks for the slope of the linear part at stage i."""
        rows = (*self.pair.implicit.a[i + 1 :], self.pair.implicit.b)
        return self.adaptive or any(row[i] != 0.0 for row in rows)

    @staticmethod
    def _parts(field: Field, t: Tensor) -> tuple[Split, Velocity]:
        """The user's split as it is at `t`, and its explicit part checked and counted."""
        split = getattr(field, "func", None)
        if not isinstance(split, Split):
            raise ArgumentError(
                "an implicit-explicit method needs a velocity in two parts: pass "
                "`Split(explicit, linear)` for dz/dt = explicit(t, z) + A z, with `linear` the "
                f"matrix A, its diagonal, or an object with A(z) and A.solve(z, scale), got "
                f"{type(split).__name__}"
            )
        if not field.layout.plain:
            raise ArgumentError(
                "an implicit-explicit method needs a single tensor as state, got a pytree"
            )
        split = split.frozen(t)
        part = Field(split.explicit, field.layout, cast=field.cast)

        def explicit(t: Tensor, z: Tensor) -> Tensor:
            field.evaluations += 1
            return part(t, z)

        return split, explicit
