"""The march with steps chosen by an estimate of their error, one step size for the whole state."""

from collections.abc import Callable, Sequence
from copy import copy
from dataclasses import dataclass, field
from functools import partial
from math import inf, isfinite, nan, ulp
from typing import Any

import torch
from torch import Tensor

from .dense import Scalar
from .explicit import Step
from .field import Field, real_dtype
from .fixed import State
from .grid import nudged, time_dtype
from .quadrature import Quadrature, Rates
from .solution import Halt, NotConverged, Piece, Statistics, Status, first_not_finite
from .tableaus import Tableau

Norm = Callable[[Any], Tensor]


@dataclass(frozen=True)
class Control:
    """How the next step follows from the last error; names and defaults as in torchdiffeq.

    `beta` is the weight of the error before the last (a PI controller; 0 switches it off).

    Source: Hairer, Norsett, Wanner, Solving Ordinary Differential Equations I, 1993, II.4, and
    Hairer, Wanner, II, IV.2 (PI control).
    """

    rtol: float | Tensor
    atol: float | Tensor
    norm: Norm
    first_step: float | None = None
    min_step: float = 0.0
    max_step: float = inf
    max_num_steps: float = 100_000
    safety: float = 0.9
    ifactor: float = 10.0
    dfactor: float = 0.2
    beta: float = 0.04
    limit_per_output: bool = False  # `max_num_steps` counts from one output to the next
    step_t: Sequence[float] = field(default=())
    jump_t: Sequence[float] = field(default=())

    def ratio(self, error: Tensor, z: Tensor, z_next: Tensor) -> float:
        """The error in units of the tolerance; NaN where it is not finite."""
        scale = torch.maximum(z.abs(), z_next.abs()).mul_(self.rtol).add_(self.atol)
        return float(self.norm(error / scale))

    def factor(self, ratio: float, before: float, order: int) -> float:
        """By how much the step changes after an error of `ratio`, `before` the one before it."""
        if not isfinite(ratio):
            return self.dfactor
        if ratio == 0.0:
            return self.ifactor
        wish = self.safety * ratio ** (0.75 * self.beta - 1 / order) * before**self.beta
        return min(self.ifactor, max(wish, 1.0 if ratio < 1 and not self.beta else self.dfactor))


def rms(z: Tensor) -> Tensor:
    """The root mean square of the entries."""
    return z.abs().square().mean().sqrt()


def first_step(
    march_field: Field, t: float, z: Tensor, f0: Tensor, order: int, control: Control, sign: float
) -> float:
    """A step length to start with, from two slopes.

    Source: Hairer, Norsett, Wanner, Solving Ordinary Differential Equations I, 1993, II.4.
    """
    scale = control.atol + z.abs() * control.rtol
    d0, d1 = float(control.norm(z / scale)), float(control.norm(f0 / scale))
    h0 = 1e-6 if d0 < 1e-5 or d1 < 1e-5 or not isfinite(d1) else 0.01 * d0 / d1
    z1 = torch.add(z, f0, alpha=sign * h0)
    f1 = march_field(torch.as_tensor(t + sign * h0, dtype=real_dtype(z), device=z.device), z1)
    d2 = float(control.norm((f1 - f0) / scale)) / h0
    if not isfinite(d2):
        return h0
    h1 = max(1e-6, h0 * 1e-3) if max(d1, d2) <= 1e-15 else (0.01 / max(d1, d2)) ** (1 / order)
    return min(100 * h0, h1)


def interpolates(tableau: Tableau) -> bool:
    """Whether the interpolant is as good as the method; else steps end where output is wanted."""
    return tableau.order <= (4 if tableau.b_mid is None else 5)


class Clock:
    """The times of a march whose steps are found on the way.

    Decisions use floats; where the times are differentiated, tensors follow them.
    """

    def __init__(self, t: Tensor, z: Tensor) -> None:
        self.device, self.dtype = z.device, real_dtype(z)
        self.t = t
        self.times: list[float] = t.tolist()
        self.now = self.times[0]
        self.sign = -1.0 if self.times[-1] < self.now else 1.0
        self.moving = t[0] if t.requires_grad else None
        self.wanted = 1  # the next output

    def tensor(self, t: float | Tensor) -> Tensor:
        """The time in the dtype of the state."""
        return torch.as_tensor(t, dtype=self.dtype, device=self.device)

    def leg(
        self, end: float, offsets: Sequence[float], *, landing: bool, jumped: bool, jump: bool
    ) -> "Leg":
        """The step from now to `end`; after a jump, and before one, just inside its ends."""
        if self.moving is None:
            dt: Scalar = end - self.now
            times = [end if c == 1.0 else self.now + c * dt for c in offsets]
            ts = torch.tensor(times, dtype=self.dtype, device=self.device).unbind()
            stop: Tensor | None = None
        else:
            if landing:
                known = end in self.times
                stop = self.t[self.times.index(end)] if known else self.t.new_tensor(end)
            else:
                stop = self.moving + (end - self.now)
            length = stop - self.moving
            ts = (self.moving + length * self.t.new_tensor(offsets)).to(self.dtype).unbind()
            dt = length.to(self.dtype)
        if jumped or jump:
            inward = {0.0: self.sign * jumped, 1.0: -self.sign * jump}
            pairs = zip(offsets, ts, strict=True)
            ts = tuple(nudged(t, inward[c] * inf) if inward.get(c) else t for c, t in pairs)
        last_t = self.tensor(end if stop is None else stop)
        origin = self.now if self.moving is None else self.moving
        return Leg(self.now, origin, end, dt, ts, stop, last_t, jump, self._shares(end, stop))

    def _shares(self, end: float, stop: Tensor | None) -> list[Scalar | None]:
        """The shares of the step to `end` at which output is wanted, None for its end."""
        shares: list[Scalar | None] = []
        for j in range(self.wanted, len(self.times)):
            t = self.times[j]
            if self.sign * (t - end) > 0:
                break
            if t == end:
                shares.append(None)
            elif stop is None or self.moving is None:
                shares.append((t - self.now) / (end - self.now))
            else:
                share = (self.t[j] - self.moving) / (stop - self.moving)
                shares.append(share.to(self.dtype))
        return shares

    def advance(self, leg: "Leg") -> None:
        """Goes to the end of the leg."""
        self.wanted += len(leg.shares)
        self.now, self.moving = leg.end, leg.stop


@dataclass(frozen=True)
class Leg:
    """One step in time."""

    start: float
    origin: Scalar  # the start, a tensor where times are differentiated
    end: float
    dt: Scalar
    ts: Sequence[Tensor]  # of the stages
    stop: Tensor | None  # the end in double precision, where times are differentiated
    last: Tensor  # the end in the dtype of the state
    jump: bool  # the velocity jumps at the end
    shares: Sequence[Scalar | None]  # where in it output is wanted; None is its end


class AdaptiveMarch:
    """Steps from the first to the last of the times, and interpolates at those between.

    Args:
        method: an embedded method, with `step`, `error` and `between`.
        field: the velocity.
        control: the step size control.
        quadrature: integrates rates along the way.
        callbacks: called as `callback(t, z, dt)` before, and on acceptance or rejection of, a step.
        dense: keep the interpolant of every step.
        watch: called as `watch(piece, state)` after each accepted step; True ends the march.
    """

    def __init__(
        self,
        method: Any,
        field: Field,
        control: Control,
        *,
        quadrature: Quadrature | None = None,
        callbacks: dict[str, Callable[[Tensor, Tensor, Tensor], Any]] | None = None,
        dense: bool = False,
        watch: Callable[[Piece, Tensor], bool] | None = None,
    ) -> None:
        self.method = method
        self.field = field
        self.control = control
        self.quadrature = quadrature
        self.callbacks = callbacks or {}
        self.dense = dense
        self.watch = watch
        self.statistics = Statistics()
        self.pieces: list[Piece] = []
        self.halt: Halt | None = None
        self.last: tuple[float, Tensor]
        self.trial: tuple[Leg, State, Step] | None = None  # the last accepted step

    def begin(self, t: Tensor, state: tuple[Tensor]) -> tuple[State, None]:
        (z,) = state
        slope, rates = self._slope(t, z, None)
        return State(z, (slope,), (), tuple(torch.zeros_like(rate) for rate in rates), rates), None

    def run(self, z: Tensor, t: Tensor, recorder: Any = None) -> list[tuple[Tensor, Rates]]:
        """The solution and the integrals at each of the times `t` (times,) that was reached."""
        control, method, counts = self.control, self.method, self.statistics
        clock = Clock(t.to(time_dtype(t.device)), z)
        again = copy(self)  # for the recorder: without results, whose graph holds the recorder
        again.pieces = []
        begin = partial(again.begin, clock.tensor(clock.t[0]))
        state: State = (begin((z,)) if recorder is None else recorder.call(begin, (z,)))[0]
        outputs: list[tuple[Tensor, Rates]] = [(z, state.sums)]
        self.last = (clock.now, z)
        stops, jumps = self._stops(clock), set(control.jump_t)
        h = self._first_step(clock, state) if stops else 0.0
        before, jumped, spent = 1.0, False, 0
        while stops:
            h = min(max(h, control.min_step), control.max_step)
            gap = abs(stops[0] - clock.now)
            landing = h >= gap * (1 - 1e-10)
            length = gap if landing else h
            end = stops[0] if landing else clock.now + clock.sign * length
            if end == clock.now:
                self._stop(Status.STEP_TOO_SMALL, clock.now, state, None)
                break
            if spent >= control.max_num_steps:
                self._stop(Status.STEP_LIMIT, clock.now, state, None)
                break
            spent += 1
            jump = landing and end in jumps
            leg = clock.leg(end, method.offsets, landing=landing, jumped=jumped, jump=jump)
            self._tell("callback_step", leg, state)
            if recorder is not None:
                recorder.open(state)
            try:
                step = method.step(self.field, leg.ts, leg.dt, state.z, state.carry)
                with torch.no_grad():
                    ratio = control.ratio(method.error(state.z, step, leg.dt), state.z, step.z)
            except NotConverged:
                step, ratio = None, nan
            least = min(h, length) <= control.min_step
            if step is not None and isfinite(ratio) and (ratio <= 1 or least):
                self.trial = (leg, state, step)
                self._tell("callback_accept_step", leg, state)
                clock.advance(leg)
                if leg.shares and control.limit_per_output:
                    spent = 0
                state, outs, at = self._finish(state, step, leg)
                if recorder is not None:
                    recorder.close(partial(again._replay, leg))
                outputs += outs
                counts.accepted += 1
                counts.last_step = end - leg.start
                self.last = (end, state.z)
                if self.dense or self.watch is not None:
                    piece = Piece(leg.origin, leg.dt, at)
                    if self.dense:
                        self.pieces.append(piece)
                    if self.watch is not None and self.watch(piece, state.z):
                        break
                if landing:
                    stops.pop(0)
                wish = length * control.factor(ratio, before, method.order)
                h = max(h, wish) if landing else wish
                before, jumped = max(ratio, 1e-4), jump
            else:
                if recorder is not None:
                    recorder.drop()
                self._tell("callback_reject_step", leg, state)
                counts.rejected += 1
                h = length * control.factor(ratio, 1.0, method.order)
                if h < 8 * ulp(clock.now) or least:
                    self._stop(self._kind(step, ratio, leg, state), clock.now, state, (leg, step))
                    break
        return outputs

    def _slope(self, t: Tensor, z: Tensor, known: Tensor | None) -> tuple[Tensor, Rates]:
        if self.quadrature is not None:
            return self.quadrature.at(t, z, known)
        return (self.field(t, z) if known is None else known), ()

    def _stops(self, clock: Clock) -> list[float]:
        """The times to land on, in order."""
        if len(clock.times) == 1:
            return []
        outputs = [] if interpolates(self.method.tableau) else clock.times
        ahead = {
            t
            for t in (*self.control.step_t, *self.control.jump_t, *outputs)
            if clock.sign * (t - clock.now) > 0 and clock.sign * (clock.times[-1] - t) > 0
        }
        return [*sorted(ahead, reverse=clock.sign < 0), clock.times[-1]]

    def _first_step(self, clock: Clock, state: State) -> float:
        if self.control.first_step is not None:
            return float(self.control.first_step)
        slope, order = state.carry[0].detach(), self.method.order
        with torch.no_grad():
            return first_step(
                self.field, clock.now, state.z.detach(), slope, order, self.control, clock.sign
            )

    def _finish(
        self, state: State, step: Step, leg: Leg
    ) -> tuple[State, list[tuple[Tensor, Rates]], Callable[[Scalar], Tensor]]:
        """What follows an accepted step: the slope at its end, the integrals, the outputs."""
        dt, end = leg.dt, leg.last
        if leg.jump:
            beyond = nudged(end, inf if leg.end > leg.start else -inf)
            slope, rates = self._slope(beyond, step.z, None)
        else:
            slope, rates = self._slope(end, step.z, step.carry[0] if step.carry else None)
        ended = step if step.carry else step._replace(carry=(slope,))

        def at(x: Scalar) -> Tensor:
            return self.method.between(x, state.z, ended, dt)

        def inside(x: Scalar) -> tuple[Tensor, Tensor]:
            return end - (1 - x) * dt, at(x)

        sums = state.sums
        if self.quadrature is not None and self.quadrature.staged:
            sums = self.quadrature.advance_staged(
                sums, state.rates, leg.ts, state.z, step.slopes, dt
            )
        elif self.quadrature is not None:
            sums = self.quadrature.advance(sums, state.rates, rates, inside, dt)
        outs = []
        for x in leg.shares:
            if x is None:
                outs.append((step.z, sums))
            else:
                until = self.quadrature.until if self.quadrature is not None else None
                part = until(x, state.sums, state.rates, inside, dt) if until else ()
                outs.append((at(x), part))
        return State(step.z, (slope,), (), sums, rates), outs, at

    def _replay(self, leg: Leg, state: State) -> Any:
        """An accepted step once more."""
        step = self.method.step(self.field, leg.ts, leg.dt, state.z, state.carry)
        return self._finish(state, step, leg)

    def _tell(self, name: str, leg: Leg, state: State) -> None:
        callback = self.callbacks.get(name)
        if callback is not None:
            t, dt = state.z.new_tensor(leg.start), state.z.new_tensor(leg.end - leg.start)
            callback(t, state.z, dt)

    def _kind(self, step: Step | None, ratio: float, leg: Leg, state: State) -> Status:
        """What made the last steps fail."""
        if step is not None:
            return Status.STEP_TOO_SMALL if isfinite(ratio) else Status.NOT_FINITE
        finite = torch.isfinite(self.field(leg.last, state.z)).all()
        return Status.STEP_TOO_SMALL if finite else Status.NOT_FINITE

    def stiffness(self) -> float:
        """dt times the Lipschitz constant seen by the last accepted step's last two stages.

        Beyond the stability region of the method, about 3, the problem is stiff for it.
        Source: Hairer, Wanner, Solving Ordinary Differential Equations II, 1996, IV.2.
        """
        if self.trial is None or not self.method.tableau.explicit:
            return 0.0
        leg, state, step = self.trial
        apart, change = self.method.last_stages(state.z, step, leg.dt)
        length = abs(leg.end - leg.start)
        return float(length * change.max() / apart.max().clamp_min(1e-300))

    def _stop(self, status: Status, t: float, state: State, trial: Any) -> None:
        """Notes why the march ends here."""
        sample = None
        if trial is not None and status is Status.NOT_FINITE:
            leg, step = trial
            ends = [(leg.last, self.field(leg.last, state.z))]
            pairs = ends if step is None else zip(leg.ts, step.slopes, strict=False)
            for time, slope in pairs:
                if not torch.isfinite(slope).all():
                    t = float(time.detach())
                    sample = first_not_finite(self.field.layout.leaves(slope))
                    break
        self.halt = Halt(status, t, state.z, sample)
