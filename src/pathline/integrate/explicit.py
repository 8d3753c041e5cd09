"""Explicit Runge-Kutta steps."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from .dense import Scalar, combine, cubic, quartic
from .field import Field
from .tableaus import Tableau


class Step(NamedTuple):
    """What a method hands back after one step."""

    z: Tensor  # the state at the end
    carry: tuple[Tensor, ...]  # what the next step goes on from
    slopes: Sequence[Tensor]  # the stages, for the error estimate and between the ends


class EmbeddedMethod(ABC):
    """What the methods with a tableau share. They carry the slope at the start of the step."""

    tableau: Tableau
    carries_slope = True

    @property
    def name(self) -> str:
        return self.tableau.name

    @property
    def order(self) -> int:
        return self.tableau.order

    @property
    def offsets(self) -> tuple[float, ...]:
        """The times of the stages as shares of a step."""
        return self.tableau.c

    @property
    def adaptive(self) -> bool:
        return self.tableau.b_err is not None

    def start(self, field: Field, t: Tensor, z: Tensor) -> tuple[Tensor, ...]:
        return (field(t, z),)

    @abstractmethod
    def step(
        self, field: Field, ts: Sequence[Tensor], dt: Scalar, z: Tensor, carry: tuple[Tensor, ...]
    ) -> Step:
        """From (ts[0], z) over dt; `ts` are the times at `offsets`."""

    def error(self, z: Tensor, step: Step, dt: Scalar) -> Tensor:
        """The difference to the embedded method."""
        assert self.tableau.b_err is not None
        return combine(z.new_zeros(()), self.tableau.b_err, step.slopes, dt)

    def between(self, x: Scalar, z: Tensor, step: Step, dt: Scalar) -> Tensor:
        """The solution at the share x of the step; needs the slope at its end as carry."""
        f0, f1 = step.slopes[0], step.carry[0]
        if self.tableau.b_mid is None:
            return cubic(x, z, step.z, f0, f1, dt)
        middle = combine(z, self.tableau.b_mid, step.slopes, dt)
        return quartic(x, z, middle, step.z, f0, f1, dt)


@dataclass(frozen=True)
class RungeKutta(EmbeddedMethod):
    """An explicit Runge-Kutta method."""

    tableau: Tableau

    def step(
        self, field: Field, ts: Sequence[Tensor], dt: Scalar, z: Tensor, carry: tuple[Tensor, ...]
    ) -> Step:
        tableau = self.tableau
        slopes = [carry[0] if carry else field(ts[0], z)]
        y, rows = z, tableau.a
        for i in range(1, len(rows)):
            y = combine(z, rows[i], slopes, dt)
            slopes.append(field(ts[i], y))
        if tableau.fsal:
            return Step(y, (slopes[-1],), slopes)
        return Step(combine(z, tableau.b, slopes, dt), (), slopes)

    def last_stages(self, z: Tensor, step: Step, dt: Scalar) -> tuple[Tensor, Tensor]:
        """How far the last two stages are apart, and their slopes; entry by entry."""
        rows = self.tableau.a
        with torch.no_grad():
            one, other = (combine(z, row, step.slopes[: len(row)], dt) for row in rows[-2:])
            return (one - other).abs(), (step.slopes[-1] - step.slopes[-2]).abs()
