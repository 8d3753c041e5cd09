"""Implicit Runge-Kutta steps, for stiff velocities."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import ArgumentError
from .dense import Scalar, combine
from .explicit import EmbeddedMethod, Step
from .field import Field
from .linear import Rows, System
from .newton import SOLVERS, Accuracy, Stages, attach, solve_stages
from .tableaus import Tableau


@dataclass(frozen=True)
class ImplicitRungeKutta(EmbeddedMethod):
    """An implicit Runge-Kutta method. It carries the slope at the start of the step.

    Diagonally implicit tableaus solve one stage after the other, full ones all at once, by
    Newton's method (see `newton`). Gradients are those of the exact solution of these equations,
    by the implicit function theorem: exact for the discrete step as far as Newton's method is,
    that is to round-off in fixed steps and to a share of the tolerance in adaptive ones.

    Error estimates are not filtered by (I - dt gamma J)^-1. Slopes come from Newton's method, not
    from evaluations, so the estimates stay bounded for stiff components; on ROBER and Van der Pol's
    equation the filter saved up to half of the steps, and lost as much accuracy.

    Args:
        tableau: diagonally or fully implicit.
        rtol, atol: the tolerances of an adaptive march; without them stages are solved to
            round-off.
        linear: "dense" solves Newton's linear systems by LU factors, in one block for each sample
            if samples don't depend on each other (for a state with more than one axis), else in
            one for the whole state. "krylov" uses GMRES, without a preconditioner, and forms no
            matrix. "auto" is dense up to 256 unknowns a block.
        derivatives: how often the solution can be differentiated; higher derivatives are wrong. A
            solve that builds a graph evaluates the velocity so many times more at every stage, so
            1 saves time and memory where a loss is differentiated once.

    Raises:
        ArgumentError: the tableau is explicit, or an argument is none of the above.

    Source: Hairer, Wanner, Solving Ordinary Differential Equations II, 1996, section IV.8.
    """

    tableau: Tableau
    rtol: float | Tensor | None = None
    atol: float | Tensor | None = None
    linear: str = "auto"
    derivatives: int = 2

    def __post_init__(self) -> None:
        if self.tableau.explicit:
            raise ArgumentError(f"the tableau {self.tableau.name!r} is explicit: use `RungeKutta`")
        if self.linear not in SOLVERS:
            raise ArgumentError(f"`linear` must be one of {SOLVERS}, got {self.linear!r}")
        if self.derivatives not in (1, 2, 3, 4):
            raise ArgumentError(f"`derivatives` must be 1, 2, 3 or 4, got {self.derivatives!r}")

    @property
    def offsets(self) -> tuple[float, ...]:
        """The times of the stages, after that of the step's start."""
        c = self.tableau.c
        return c if c[0] == 0.0 else (0.0, *c)

    def step(
        self, field: Field, ts: Sequence[Tensor], dt: Scalar, z: Tensor, carry: tuple[Tensor, ...]
    ) -> Step:
        """From (ts[0], z) over dt; `ts` are the times at `offsets`.

        Raises:
            NotConverged: Newton's method failed.
        """
        tableau = self.tableau
        slope = carry[0] if carry else field(ts[0], z)
        ts = ts[-tableau.stages :]
        if tableau.diagonal:
            slopes = self._one_by_one(field, ts, dt, z, slope)
        else:
            slopes = self._at_once(field, ts, dt, z, slope)
        z_next = combine(z, tableau.b, slopes, dt)
        passes_on = tableau.fsal and not any(tableau.a[0])
        return Step(z_next, (slopes[-1],) if passes_on else (), slopes)

    def _one_by_one(
        self, field: Field, ts: Sequence[Tensor], dt: Scalar, z: Tensor, slope: Tensor
    ) -> list[Tensor]:
        rows = Rows(z)
        slopes: list[Tensor] = []
        system: System | None = None
        factor = 0.0  # on the diagonal, of the system at hand
        for i, (row, t) in enumerate(zip(self.tableau.a, ts, strict=True)):
            base = combine(z, row[:i], slopes, dt)
            if row[i] == 0.0:
                slopes.append(slope if i == 0 else field(t, base))
                continue
            stages = self._stages(field, rows, ((row[i],),), (t,), (base,), dt)
            if row[i] != factor:
                system, factor = None, row[i]
            guess = rows.rows((slopes[-1] if slopes else slope).detach())[:, None]
            ks, system = solve_stages(stages, guess, system, self._accuracy)
            slopes.append(rows.state(self._attached(stages, ks)[:, 0]))
        return slopes

    def _at_once(
        self, field: Field, ts: Sequence[Tensor], dt: Scalar, z: Tensor, slope: Tensor
    ) -> list[Tensor]:
        rows, count = Rows(z), self.tableau.stages
        stages = self._stages(field, rows, self.tableau.a, ts, (z,) * count, dt)
        guess = rows.rows(slope.detach())[:, None].expand(-1, count, -1)
        ks, _ = solve_stages(stages, guess, None, self._accuracy)
        return [rows.state(k) for k in self._attached(stages, ks).unbind(1)]

    @property
    def _accuracy(self) -> Accuracy:
        return Accuracy(self.rtol, self.atol)

    def _stages(
        self,
        field: Field,
        rows: Rows,
        a: tuple[tuple[float, ...], ...],
        ts: Sequence[Tensor],
        bases: Sequence[Tensor],
        dt: Scalar,
    ) -> Stages:
        if isinstance(dt, Tensor) and dt.ndim:
            dt = rows.spread(dt)
        base = tuple(rows.rows(y) for y in bases)
        noise = 0.0
        if getattr(field, "cast", False):
            low = torch.get_autocast_dtype(bases[0].device.type)
            noise = 2 * torch.finfo(low).eps
        return Stages(field, rows, a, tuple(ts), base, dt, self.linear, noise)

    def _attached(self, stages: Stages, ks: Tensor) -> Tensor:
        return attach(stages, ks, self.derivatives) if torch.is_grad_enabled() else ks
