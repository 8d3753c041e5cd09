"""The equations of implicit stages: solved by Newton's method, differentiated implicitly.

The unknowns are the slopes: k_i = v(t_i, y_i) with y_i = base + dt sum_j a_ij k_j over the stages j
of one system. One Newton step adds M^-1 (v(y) - k), where M = I - dt a_ij J_i. In exact arithmetic
this is Newton's method for the stage values y; in the slopes, it never divides by dt, and what the
last step adds has passed through M^-1, so that the slopes of a stiff velocity are as accurate as
the stage values (v(y) would be worse by the factor dt |J|). A complex state is seen as pairs of
real numbers, so the velocity need not be holomorphic.

Source: Hairer, Wanner, Solving Ordinary Differential Equations II, 1996, section IV.8.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import inf
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .dense import Scalar, combine
from .linear import (
    LARGE,
    DenseSystem,
    KrylovSystem,
    Rows,
    System,
    Tangent,
    VectorField,
)
from .solution import NotConverged

SOLVERS = ("auto", "dense", "krylov")


@dataclass(frozen=True)
class Accuracy:
    """When the stages are solved: in shares of a step's tolerance, or to round-off.

    An error of the stages enters the estimate of the step's error, so it should be a small
    `share` of the tolerance. Without tolerances, stage values are right to ten units in their last
    place.
    """

    rtol: float | Tensor | None = None
    atol: float | Tensor | None = None
    share: float = 0.01

    @property
    def adaptive(self) -> bool:
        """A march follows that can take a smaller step."""
        return self.rtol is not None


@dataclass(frozen=True)
class Stages:
    """The equations of one or more stages, for slopes (blocks, stages, unknowns).

    Args:
        field: the velocity.
        rows: how states lie in rows.
        a: the weights of these stages on each other.
        ts: their times.
        base: what their values are without their own slopes, (blocks, unknowns) each.
        dt: a number, a tensor (), or (blocks, unknowns).
        linear: how to solve linear systems, of `SOLVERS`.
        noise: the relative error of a velocity of lower precision than the state.
    """

    field: VectorField
    rows: Rows
    a: tuple[tuple[float, ...], ...]
    ts: tuple[Tensor, ...]
    base: tuple[Tensor, ...]
    dt: Scalar
    linear: str
    noise: float = 0.0

    def tensors(self) -> tuple[Tensor, ...]:
        """All that `restored` needs, without their graphs."""
        own = (*self.ts, *self.base, *((self.dt,) if isinstance(self.dt, Tensor) else ()))
        return tuple(x.detach() for x in own)

    def restored(self, tensors: Sequence[Tensor]) -> "Stages":
        """These equations with other tensors; `Stages` without any is a recipe."""
        n = len(self.a)
        dt = tensors[2 * n] if len(tensors) > 2 * n else self.dt
        return replace(self, ts=tuple(tensors[:n]), base=tuple(tensors[n : 2 * n]), dt=dt)

    def values(self, ks: Tensor) -> list[Tensor]:
        """The stages' states, in rows."""
        slopes = ks.unbind(1)
        pairs = zip(self.base, self.a, strict=True)
        return [combine(base, row, slopes, self.dt) for base, row in pairs]

    def slopes(self, ks: Tensor) -> Tensor:
        """v at the stages."""
        rows = self.rows
        return torch.stack(
            [
                rows.rows(self.field(t, rows.state(y)))
                for t, y in zip(self.ts, self.values(ks), strict=True)
            ],
            1,
        )

    def linearized(self, ks: Tensor) -> tuple[Tensor, System]:
        """v at the stages, and the system there."""
        tangents = [
            Tangent(self.field, self.rows, t, y)
            for t, y in zip(self.ts, self.values(ks), strict=True)
        ]
        return torch.stack([tangent.value for tangent in tangents], 1), self._system(tangents)

    def _system(self, tangents: Sequence[Tangent]) -> System:
        blocks, n = self.rows.blocks, self.rows.unknowns
        if self.linear == "dense" or (self.linear == "auto" and n <= LARGE):
            jacobians = []
            for tangent in tangents:
                jacobian = tangent.jacobians()
                if jacobian is None:
                    break
                jacobians.append(jacobian)
            else:
                return DenseSystem(jacobians, self.a, self.dt)
            if self.linear == "dense" or blocks * n <= LARGE:
                whole = [tangent.jacobian() for tangent in tangents]
                return DenseSystem(whole, self.a, self.dt)
        return KrylovSystem(tangents, self.a, self.dt)

    def units(self, accuracy: Accuracy) -> Tensor:
        """How far a Newton step may still move the stages' values, (blocks, 1 or unknowns)."""
        base = torch.stack([x.detach() for x in self.base], 1)
        real = torch.finfo(base.dtype)
        floor = 10 * real.eps * base.abs().amax((1, 2))[:, None] + real.tiny
        if accuracy.rtol is None:
            return floor
        assert accuracy.atol is not None
        size = self.rows.state(base[:, -1]).abs()
        wish = accuracy.atol + accuracy.rtol * size
        return torch.maximum(self.rows.spread(accuracy.share * wish), floor)

    def moves(self, ks: Tensor) -> Tensor:
        """What slopes add to the stages' values."""
        slopes, zero = ks.unbind(1), torch.zeros_like(ks[:, 0])
        return torch.stack([combine(zero, row, slopes, self.dt) for row in self.a], 1)

    def sizes(self, change: Tensor, ks: Tensor, units: Tensor, mean: bool) -> Tensor:
        """The change of each block's stages in `units`, as mean square or maximum, (blocks,)."""
        if self.noise:
            units = units + self.noise * self.moves(ks).abs().amax((1, 2))[:, None]
        moved = self.moves(change) / units[:, None]
        return moved.square().mean((1, 2)).sqrt() if mean else moved.abs().amax((1, 2))


def solve_stages(
    stages: Stages, guess: Tensor, system: System | None, accuracy: Accuracy
) -> tuple[Tensor, System | None]:
    """The slopes of the stages, without a graph, and the system for equations like these.

    Newton's method is the simplified one, with the system at hand, as long as it converges fast;
    else the system is made anew at the last iterate. Where nobody could take a smaller step, a
    failure is followed by full Newton steps from rest. Where samples choose their own steps, the
    slopes of those that fail are NaN, so that the others need not wait for them.

    Raises:
        NotConverged: the iterates diverge, or are not finite.
    """
    with torch.no_grad():
        units = stages.units(accuracy)
        try:
            return _newton(stages, guess, system, accuracy, units, 10 if accuracy.adaptive else 25)
        except NotConverged:
            if accuracy.adaptive:
                raise
        return _newton(stages, torch.zeros_like(guess), None, accuracy, units, 60, full=True)


def _newton(
    stages: Stages,
    ks: Tensor,
    system: System | None,
    accuracy: Accuracy,
    units: Tensor,
    limit: int,
    full: bool = False,
) -> tuple[Tensor, System | None]:
    alone = accuracy.adaptive and isinstance(stages.dt, Tensor) and stages.dt.ndim > 0
    slack = 0.1 * torch.finfo(units.dtype).eps ** -0.25
    last: Any = np.nan
    lost: Any = np.zeros(len(ks), dtype=bool)
    for n in range(limit):
        fresh = system is None
        if system is None:
            slopes, system = stages.linearized(ks)
        else:
            slopes = stages.slopes(ks)
        change = system.solve(slopes - ks)
        ks_next = ks + change
        sizes = stages.sizes(change, ks_next, units, accuracy.adaptive).cpu().numpy()
        with np.errstate(all="ignore"):
            rates = sizes / last
            steps = np.where(rates < 1, np.log(sizes) / -np.log(rates), inf)  # at this rate
        done = (sizes <= 1) | ((rates < 1) & (sizes * rates <= 1 - rates))
        lost = lost | ~np.isfinite(sizes)
        if fresh and accuracy.adaptive:
            lost = lost | ((rates >= 1) & ~done)
        elif fresh:
            done = done | ((rates > 0.5) & (sizes <= slack))  # round-off of the velocity
        if not lost.any():
            ks = ks_next
        elif alone and not lost.all():
            ks = _replaced(ks_next, lost, ks)
        else:
            break
        if (done | lost).all():
            return _replaced(ks, lost, torch.nan), None if system.exact else system
        if full or system.exact or (n > 0 and (steps[~(done | lost)] > 3).any()):
            system = None
        last = sizes
    lost = lost | ~done
    if alone and not lost.all():
        return _replaced(ks, lost, torch.nan), None
    raise NotConverged("Newton's method did not find the stages of an implicit step")


def _replaced(ks: Tensor, lost: Any, other: Tensor | float) -> Tensor:
    """The slopes, and `other` ones in the blocks that are lost."""
    if not lost.any():
        return ks
    return torch.where(torch.from_numpy(lost).to(ks.device)[:, None, None], other, ks)


def attach(stages: Stages, ks: Tensor, derivatives: int) -> Tensor:
    """The slopes `ks` as a differentiable function of all that the stages depend on.

    With M the exact system at the solution, held constant, a Newton step k + M^-1 (v(y) - k)
    changes no value, and has the derivatives of the solution: those up to the n-th after n steps.
    For if k follows the solution up to an error e of order n in a perturbation, the step leaves
    (I - M^-1 M') e with the perturbed M', of one order more. A backward pass that is not itself
    differentiated goes through the first step alone. M is formed in the backward pass.
    """
    tensors = stages.tensors()
    recipe = _Recipe(replace(stages, ts=(), base=()))
    known, first = ks, None
    for _ in range(derivatives):
        residual = stages.slopes(known) - known
        if not residual.requires_grad:
            return ks
        known = _NewtonStep.apply(known, residual, recipe, ks, *tensors)
        first = known if first is None else first
    return known if derivatives == 1 else _Either.apply(first, known)


class _Recipe:
    """How to make the exact system in a backward pass; kept for the next one only there, where
    a graph of the backward pass needs it in each of its nodes."""

    def __init__(self, stages: Stages) -> None:
        self.stages = stages
        self.kept: System | None = None

    def system(self, ks: Tensor, tensors: Sequence[Tensor]) -> System:
        system = self.kept
        if system is None:
            _, system = self.stages.restored(tensors).linearized(ks)
        self.kept = system if torch.is_grad_enabled() else None
        return system


class _NewtonStep(torch.autograd.Function):
    """k + M^-1 residual, which has the value k."""

    @staticmethod
    def forward(known: Tensor, residual: Tensor, recipe: _Recipe, *tensors: Tensor) -> Tensor:
        return tensors[0].clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.recipe = inputs[2]
        ctx.save_for_backward(*inputs[3:])

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        ks, *tensors = ctx.saved_tensors
        system = ctx.recipe.system(ks, tensors)
        back = _Solved.apply(gradient, system, True)
        return (gradient, back, None, *(None for _ in ctx.saved_tensors))


class _Solved(torch.autograd.Function):
    """M^-1 rhs, or M^-T rhs, with a constant M."""

    @staticmethod
    def forward(rhs: Tensor, system: System, transposed: bool) -> Tensor:
        return system.solve(rhs, transposed=transposed, last=True)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        _, ctx.system, ctx.transposed = inputs

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        return _Solved.apply(gradient, ctx.system, not ctx.transposed), None, None


class _Either(torch.autograd.Function):
    """Two tensors of equal values: the gradient goes to the first, its graph to the last."""

    @staticmethod
    def forward(first: Tensor, last: Tensor) -> Tensor:
        return last.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        return (None, gradient) if torch.is_grad_enabled() else (gradient, None)
