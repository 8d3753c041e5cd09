"""The march through a fixed grid of times."""

from collections.abc import Callable, Sequence
from copy import copy
from functools import partial
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from .dense import Scalar, at_end, cubic, linear
from .explicit import RungeKutta, Step
from .field import Field
from .grid import Grid
from .quadrature import Quadrature, Rates
from .solution import Halt, NotConverged, Piece, Status


class Method(Protocol):
    """What a march needs of a one-step method."""

    @property
    def name(self) -> str: ...
    @property
    def order(self) -> int: ...
    @property
    def offsets(self) -> tuple[float, ...]: ...
    def start(self, field: Field, t: Tensor, z: Tensor) -> tuple[Tensor, ...]: ...
    def step(
        self, field: Field, ts: Sequence[Tensor], dt: Scalar, z: Tensor, carry: tuple[Tensor, ...]
    ) -> Step: ...


class State(NamedTuple):
    """All that one step hands to the next."""

    z: Tensor
    carry: tuple[Tensor, ...]
    slope: tuple[Tensor, ...]  # dz/dt at the node, where someone asks for it
    sums: Rates  # the running integrals
    rates: Rates  # their integrands at the node


class FixedMarch:
    """Steps through `grid`, one after the other.

    Args:
        method: moves the state.
        field: the velocity.
        grid: the times.
        inside: for each step, the shares (0 to 1) at which the solution is wanted.
        interpolation: "linear" or "cubic", for shares below 1.
        quadrature: integrates rates along the way.
        watch: called as `watch(t, z, dt)` before each step.
    """

    def __init__(
        self,
        method: Method,
        field: Any,
        grid: Grid,
        inside: Sequence[Sequence[Scalar]],
        *,
        interpolation: str = "linear",
        quadrature: Quadrature | None = None,
        watch: Callable[[Tensor, Tensor, Scalar], None] | None = None,
        dense: bool = False,
    ) -> None:
        self.method = method
        self.field = field
        self.grid = grid
        self.inside = inside
        self.cubic = interpolation == "cubic"
        self.quadrature = quadrature
        self.watch = watch
        self.carries_slope = getattr(method, "carries_slope", False)
        self.between: Callable[..., Tensor] | None = None
        if isinstance(method, RungeKutta) and method.tableau.b_mid is not None:
            self.between = method.between
        self.dense = dense
        self.pieces: list[Piece] = []
        self.halt: Halt | None = None
        self.sloped = (
            dense
            or quadrature is not None
            or (self.cubic and not all(at_end(x) for shares in inside for x in shares))
        )

    def begin(self, z: Tensor) -> State:
        t = self.grid.ends[0]
        slope, rates = self._slope(t, z, ())
        sums = tuple(torch.zeros_like(rate) for rate in rates)
        if self.carries_slope:
            return State(z, slope, slope, sums, rates)
        return State(z, self.method.start(self.field, t, z), slope, sums, rates)

    def step(self, n: int, state: State) -> tuple[State, list[tuple[Tensor, Rates]]]:
        """From node n to the next, and the solution and integrals at the shares asked for."""
        z, carry, slope, sums, rates = state
        dt = self.grid.lengths[n]
        ts = self.grid.stages[n].unbind(0)
        if self.watch is not None:
            self.watch(self.grid.ends[n], z, dt)
        step = self.method.step(self.field, ts, dt, z, carry)
        if not self.sloped:
            after = State(step.z, step.carry, (), (), ())
            return after, [
                (step.z if at_end(x) else linear(x, z, step.z), ()) for x in self.inside[n]
            ]
        t = self.grid.ends[n + 1]
        slope_next, rates_next = self._slope(t, step.z, step.carry)
        carry_next = slope_next if self.carries_slope else step.carry

        def at(x: Scalar) -> Tensor:
            if self.between is not None:
                ended = step if step.carry else step._replace(carry=slope_next)
                return self.between(x, z, ended, dt)
            return cubic(x, z, step.z, slope[0], slope_next[0], dt)

        def within(x: Scalar) -> tuple[Tensor, Tensor]:
            return self.grid.ends[n] + x * dt, at(x)

        sums_next = sums
        if self.quadrature is not None and self.quadrature.staged:
            sums_next = self.quadrature.advance_staged(sums, rates, ts, z, step.slopes, dt)
        elif self.quadrature is not None:
            sums_next = self.quadrature.advance(sums, rates, rates_next, within, dt)
        outs: list[tuple[Tensor, Rates]] = []
        for x in self.inside[n]:
            if at_end(x):
                outs.append((step.z, sums_next))
                continue
            part: Rates = ()
            if self.quadrature is not None:
                part = self.quadrature.until(x, sums, rates, within, dt)
            outs.append((at(x) if self.cubic else linear(x, z, step.z), part))
        return State(step.z, carry_next, slope_next, sums_next, rates_next), outs

    def run(self, z: Tensor, recorder: Any = None) -> list[tuple[Tensor, Rates]]:
        """The solution and the integrals at the start and wherever they are wanted."""
        outputs: list[tuple[Tensor, Rates]] = []
        again = copy(self)  # for the recorder: without pieces, whose graph holds the recorder
        again.pieces = []
        if recorder is None:
            state = self.begin(z)
        else:
            state, _ = recorder.call(lambda start: (again.begin(start[0]), None), (z,))
        outputs.append((z, state.sums))
        for n in range(len(self.grid)):
            try:
                if recorder is None:
                    after, outs = self.step(n, state)
                else:
                    after, outs = recorder.call(partial(again.step, n), state)
            except NotConverged:
                t = float(self.grid.nodes[n].detach().min())
                self.halt = Halt(Status.NOT_CONVERGED, t, state.z)
                break
            if self.dense:
                self.pieces.append(self.piece(n, state, after))
            state = after
            outputs += outs
        return outputs

    def piece(self, n: int, state: State, after: State) -> Piece:
        """The solution on step n, which led from `state` to `after`."""
        dt = self.grid.lengths[n]
        if not self.sloped:
            return Piece(self.grid.nodes[n], dt, lambda x: linear(x, state.z, after.z))
        f0, f1 = state.slope[0], after.slope[0]
        return Piece(self.grid.nodes[n], dt, lambda x: cubic(x, state.z, after.z, f0, f1, dt))

    def _slope(
        self, t: Tensor, z: Tensor, carry: tuple[Tensor, ...]
    ) -> tuple[tuple[Tensor, ...], Rates]:
        """The slope at a node and the rates there, as far as someone asks for them."""
        if not self.sloped:
            return (), ()
        known = carry[0] if carry and self.carries_slope else None
        if self.quadrature is not None:
            dz, rates = self.quadrature.at(t, z, known)
            return (dz,), rates
        return (self.field(t, z) if known is None else known,), ()
