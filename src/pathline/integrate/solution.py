"""What a solve hands back, and how it says that it failed."""

from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from enum import IntEnum
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from ..errors import SolveError
from .dense import as_float


class Status(IntEnum):
    """How a solve, or that of one sample, ended."""

    SUCCESS = 0
    STEP_LIMIT = 1
    STEP_TOO_SMALL = 2
    NOT_FINITE = 3
    TOLERANCE = 4
    STIFF = 5
    NO_EVENT = 6
    NOT_CONVERGED = 7


ADVICE = {
    Status.SUCCESS: "reached the end",
    Status.STEP_LIMIT: "the step limit was reached; raise `max_num_steps` or loosen `rtol`, `atol`",
    Status.STEP_TOO_SMALL: (
        "the step fell below the resolution of time; the solution may blow up here, or the "
        "velocity jump (name such times in `jump_t`)"
    ),
    Status.NOT_FINITE: "the velocity is not finite here",
    Status.TOLERANCE: (
        "`rtol` and `atol` ask for more than the precision of the state can hold; loosen them or "
        "use float64"
    ),
    Status.STIFF: 'the problem looks stiff here; try method="kencarp4"',
    Status.NO_EVENT: "no event happened before the step limit",
    Status.NOT_CONVERGED: (
        "Newton's method for an implicit step did not converge; take smaller steps, or an "
        'adaptive method such as "kencarp4"'
    ),
}


@dataclass
class Statistics:
    """Counts of one solve; tensors (batch,) for steps where each sample has its own."""

    evaluations: int = 0
    accepted: int | Tensor = 0
    rejected: int | Tensor = 0
    last_step: float | Tensor = 0.0


@dataclass
class Piece:
    """The solution on one step, for dense output."""

    start: Tensor | float
    dt: Any
    at: Callable[[Any], Tensor]


@dataclass
class Solution:
    """The result of a solve.

    `values` has the times in front, as `odeint` returns it; entries not reached are NaN.
    `status` is (batch,) where each sample has its own step size, else (); `reason` says it in
    words. `last` is the last good time and state. `integrals` holds the running quantities of
    `quadrature`, each (times, batch). `plan` describes a checkpointed solve.
    """

    ts: Tensor
    values: Any
    status: Tensor
    reasons: list[str]
    statistics: Statistics
    last: tuple[Tensor, Any]
    integrals: Any = None
    plan: Any = None
    event: Tensor | None = None
    pieces: list[Piece] = field(default_factory=list, repr=False)
    split: Callable[[Tensor], Any] = field(default_factory=lambda: _same, repr=False)
    joined: Any = field(default=None, repr=False)  # the values in one tensor

    @property
    def success(self) -> bool:
        """Every sample reached its end."""
        return bool((self.status == Status.SUCCESS).all())

    @property
    def reason(self) -> str:
        """The words for every sample that failed, or for the success."""
        return "; ".join(self.reasons) if self.reasons else ADVICE[Status.SUCCESS]

    def or_raise(self) -> "Solution":
        """This solution, if it reached its end.

        Raises:
            SolveError: it did not; the text is `reason`.
        """
        if self.reasons:
            raise SolveError(self.reason)
        return self

    def hand_out(self, whole: bool, integrals: bool) -> Any:
        """What the caller of `odeint` asked for."""
        if whole:
            return self
        self.or_raise()
        if self.event is not None:
            return self.event, self.values
        return (self.values, self.integrals) if integrals else self.values

    @cached_property
    def _ends(self) -> list[float]:
        """The ends of the steps, with the sign that makes them increase."""
        ends = [as_float(piece.start) for piece in self.pieces]
        ends.append(ends[-1] + as_float(self.pieces[-1].dt))
        return ends if ends[-1] > ends[0] else [-end for end in ends]

    def dense(self, t: float | Tensor) -> Any:
        """The state at time `t`, a number within the solved span, by the method's interpolant.

        Raises:
            SolveError: `t` was not reached or lies outside of the span, or samples have times or
                steps of their own, of which no interpolant is kept.
        """
        if not self.pieces:
            raise SolveError(
                "there is no dense output: no step was made, or samples have their own"
            )
        ends = self._ends
        sign = 1.0 if as_float(self.pieces[0].dt) > 0 else -1.0
        slack = 1e-12 * (ends[-1] - ends[0])
        if not ends[0] - slack <= sign * float(t) <= ends[-1] + slack:
            span = sorted((sign * ends[0], sign * ends[-1]))
            raise SolveError(f"`t` = {float(t):g} lies outside of what was solved, {span}")
        n = min(max(bisect_right(ends, sign * float(t)) - 1, 0), len(self.pieces) - 1)
        share = (sign * float(t) - ends[n]) / (ends[n + 1] - ends[n])
        return self.split(self.pieces[n].at(min(max(share, 0.0), 1.0)))


def _same(z: Tensor) -> Tensor:
    return z


class NotConverged(Exception):
    """Newton's method gave up on a step; an adaptive march rejects the step."""


@dataclass
class Halt:
    """Why a march stopped before its end."""

    status: Status
    t: float
    z: Tensor
    sample: int | None = None

    @property
    def words(self) -> str:
        where = "" if self.sample is None else f", sample {self.sample}"
        return f"at t = {self.t:.6g}{where}: {ADVICE[self.status]}"


def first_not_finite(leaves: Sequence[Tensor]) -> int | None:
    """The first sample, along the first axis of the leaves, that is not finite; or None."""
    found = []
    for leaf in leaves:
        if leaf.ndim:
            found += (~torch.isfinite(leaf).reshape(len(leaf), -1).all(1)).nonzero()[:1].tolist()
    return min(index for (index,) in found) if found else None
