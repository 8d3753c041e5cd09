"""The adaptive march in which each sample has its own times and its own steps."""

from contextlib import nullcontext
from functools import partial
from math import isfinite
from typing import Any

import torch
from torch import Tensor

from .adaptive import Control, interpolates
from .dense import Scalar
from .explicit import Step
from .field import Field, real_dtype
from .grid import beside, time_dtype
from .quadrature import Quadrature, Rates
from .solution import Halt, NotConverged, Statistics, Status

Candidate = tuple[int, Tensor, Tensor, Rates]  # output, samples that are there, z, integrals


def sample_rms(z: Tensor) -> Tensor:
    """The root mean square of each sample's entries, (batch,)."""
    squares = z.abs().square()
    return (squares.flatten(1).mean(1) if z.ndim > 1 else squares).sqrt()


class Clocks:
    """The times of all samples, and where output is wanted from each.

    Args:
        t: (batch, times); the times may be differentiated.
        lands: steps end at every output, and not only at the last time.
    """

    def __init__(self, t: Tensor, *, lands: bool) -> None:
        self.t, self.times, self.lands = t, t.detach(), lands
        self.node, self.now = t[:, 0], self.times[:, 0]  # with and without a graph
        self.ends = self.times[:, -1]
        self.sign = torch.where(self.ends < self.now, -1.0, 1.0).to(self.times)
        self.stop, self.stop_t = self.ends, t[:, -1]

    def propose(self, h: Tensor, active: Tensor) -> tuple[Tensor, Tensor]:
        """Signed step lengths, and which of them land; a sample that rests stays where it is."""
        if self.lands:
            ahead = ((self.times - self.now[:, None]) * self.sign[:, None] > 0).to(torch.uint8)
            following = ahead.argmax(1, keepdim=True)
            self.stop = self.times.gather(1, following)[:, 0]
            self.stop_t = self.t.gather(1, following)[:, 0]
        landing = h >= (self.stop - self.now).abs() * (1 - 1e-10)
        length = torch.where(landing, self.stop_t - self.node, self.sign * h)
        return torch.where(active, length, 0.0), landing

    def advance(
        self, length: Tensor, landing: Tensor, h: Tensor, good: Tensor
    ) -> list[tuple[int, Tensor, Tensor]]:
        """Moves the good samples on; the outputs passed, by which samples, at which shares."""
        arrived = torch.where(landing, self.stop, self.now + self.sign * h)
        passed = (self.times - self.now[:, None]) * self.sign[:, None] > 0
        reached = (arrived[:, None] - self.times) * self.sign[:, None] >= 0
        hits = passed & reached & good[:, None]
        shares = []
        for j in hits.any(0).nonzero().flatten().tolist():
            there = hits[:, j]
            gone = (self.t[:, j] - self.node) / torch.where(there, length, 1.0)
            shares.append((j, there, torch.where(there, gone, 0.0)))
        ahead = torch.where(landing, self.stop_t, self.node + self.sign * h)
        self.node = torch.where(good, ahead, self.node)
        self.now = torch.where(good, arrived, self.now)
        return shares

    def stuck(self, h: Tensor) -> Tensor:
        """Which steps are below the resolution of time."""
        return h <= 8 * torch.finfo(h.dtype).eps * self.now.abs().clamp_min(1e-300)


class IndependentMarch:
    """Moves all samples at once, each by steps of its own, so that none depends on the others.

    All arithmetic is elementwise in the sample; a sample that is done, or whose step was
    rejected, rests while the others go on.

    Args:
        method: an embedded method, with `step`, `error` and `between`.
        field: the velocity; gets times of shape (batch, 1, ..., 1).
        control: the step size control, without `step_t` and `jump_t`.
        quadrature: integrates rates along the way.
    """

    def __init__(
        self, method: Any, field: Field, control: Control, quadrature: Quadrature | None = None
    ) -> None:
        self.method = method
        self.field = field
        self.control = control
        self.quadrature = quadrature
        self.statistics = Statistics()
        self.halts: list[Halt] = []

    def run(self, z: Tensor, t: Tensor, recorder: Any = None) -> list[tuple[Tensor, Rates]]:
        """The solution and integrals at each column of the times `t`, (batch, times).

        A row ends where its time stays the same. Entries that a sample did not reach are NaN.
        """
        times = t.detach()
        candidates = self._march(z, t, times, recorder)
        outputs = [(z, self._zeros)]
        for j in range(1, t.shape[1]):
            rest = times[:, j] == times[:, 0]
            out = torch.where(beside(rest, z), z, torch.nan)
            sums = tuple(torch.where(rest, total, torch.nan) for total in self._zeros)
            outputs.append((out, sums))
        for j, there, value, sums in candidates:
            out, before = outputs[j]
            columns = zip(sums, before, strict=True)
            outputs[j] = (
                torch.where(beside(there, z), value, out),
                tuple(torch.where(there, new, old) for new, old in columns),
            )
        return outputs

    def _march(self, z: Tensor, t: Tensor, times: Tensor, recorder: Any) -> list[Candidate]:
        control, method, real = self.control, self.method, real_dtype(z)
        # What a recorder keeps must not hold the states of this march, or none is ever freed.
        again = IndependentMarch(method, self.field, control, self.quadrature)
        begin = partial(again._begin, beside(t[:, 0].to(real), z))
        state = (begin((z,)) if recorder is None else recorder.call(begin, (z,)))[0]
        self._zeros = state[2]
        clocks = Clocks(t, lands=not interpolates(method.tableau))
        h = self._first_steps(clocks.now, clocks.sign, state[0].detach(), state[1].detach())
        before = torch.ones_like(h)
        accepted = torch.zeros_like(h, dtype=torch.long)
        rejected, status = accepted.clone(), torch.full_like(accepted, Status.SUCCESS)
        last_step = torch.zeros_like(h)
        candidates: list[Candidate] = []
        active = clocks.now != clocks.ends
        while bool(active.any()):
            h = h.clamp(control.min_step, control.max_step)
            least = h <= control.min_step
            length, landing = clocks.propose(h, active)
            tried, start = length.detach().abs(), state[0]
            ts, dt = self._stages(clocks.node, length, z), beside(length.to(real), z)
            if recorder is not None:
                recorder.open(state)
            step, ratio = self._attempt(ts, dt, state)
            finite = torch.isfinite(ratio)
            good = active & finite & ((ratio <= 1) | least)
            if step is None or not bool(good.any()):
                if recorder is not None:
                    recorder.drop()
            else:
                if not bool(finite[active].all()):
                    # What is not finite must not enter the graph, not even behind a mask.
                    if recorder is not None:
                        recorder.drop()
                    length = torch.where(good, length, 0.0)
                    ts, dt = self._stages(clocks.node, length, z), beside(length.to(real), z)
                    if recorder is not None:
                        recorder.open(state)
                    step = method.step(self.field, ts, dt, state[0], (state[1],))
                # Times that are differentiated are no part of what a recorder runs again.
                with nullcontext() if recorder is None else recorder.aside():
                    shares = clocks.advance(length, landing, h, good)
                    end = beside(clocks.node.to(real), z)
                finish = partial(again._finish, ts, dt, end, good, shares)
                state, outs = finish(state, step)
                if recorder is not None:
                    recorder.close(partial(again._replay, ts, dt, finish))
                candidates += outs
                last_step = torch.where(good, length.detach(), last_step)
            accepted += good
            rejected += active & ~good
            wish = tried * self._factor(ratio, before)
            # The last step, cut short at a time to land on, says nothing of the next.
            wish = torch.where(landing & good, torch.maximum(wish, h), wish)
            h = torch.where(active, wish, h)
            before = torch.where(good, ratio.clamp_min(1e-4), before)
            active = active & (clocks.now != clocks.ends)
            stuck = active & clocks.stuck(h) | active & ~good & least
            spent = active & (accepted + rejected >= control.max_num_steps)
            for kind, which in ((Status.STEP_TOO_SMALL, stuck), (Status.STEP_LIMIT, spent)):
                if bool(which.any()):
                    kinds = self._kinds(kind, finite, start, step, length)
                    status = torch.where(which, kinds, status)
                    for i in which.nonzero().flatten().tolist():
                        why = Status(int(status[i]))
                        self.halts.append(Halt(why, float(clocks.now[i]), state[0][i], sample=i))
                    active = active & ~which
        self.status = status
        self.last = (clocks.now, state[0])
        self.statistics.accepted, self.statistics.rejected = accepted, rejected
        self.statistics.last_step = last_step
        return candidates

    def _attempt(
        self, ts: tuple[Tensor, ...], dt: Tensor, state: Any
    ) -> tuple[Step | None, Tensor]:
        """One step of every sample, and its errors in units of the tolerance, (batch,)."""
        z, slope = state[:2]
        try:
            step = self.method.step(self.field, ts, dt, z, (slope,))
        except NotConverged:
            return None, dt.new_full((len(z),), torch.nan, dtype=time_dtype(z.device))
        with torch.no_grad():
            error = self.method.error(z, step, dt)
            scale = torch.maximum(z.abs(), step.z.abs())
            scale = scale.mul_(self.control.rtol).add_(self.control.atol)
            return step, sample_rms(error / scale).to(time_dtype(z.device))

    def _kinds(
        self, kind: Status, finite: Tensor, z: Tensor, step: Step | None, length: Tensor
    ) -> Tensor:
        """Why each sample would stop here, if it does."""
        kinds = torch.full_like(finite, int(kind), dtype=torch.long)
        if kind is Status.STEP_LIMIT and step is not None:
            dt = beside(length.detach().to(real_dtype(z)), z)
            kinds = torch.where(self._stiffness(z, step, dt) > 2.0, int(Status.STIFF), kinds)
        if float(torch.as_tensor(self.control.rtol).min()) < 10 * torch.finfo(z.dtype).eps:
            kinds = torch.full_like(kinds, int(Status.TOLERANCE))
        return torch.where(finite, kinds, int(Status.NOT_FINITE))

    def _stiffness(self, z: Tensor, step: Step, dt: Tensor) -> Tensor:
        """As `AdaptiveMarch.stiffness`, of each sample."""
        if not self.method.tableau.explicit:
            return torch.zeros(len(z), device=z.device)
        apart, change = self.method.last_stages(z, step, dt)
        apart, change = (x.reshape(len(z), -1).amax(1) for x in (apart, change))
        return dt.abs().flatten() * change / apart.clamp_min(1e-300)

    def _begin(self, t: Tensor, state: tuple[Tensor]) -> tuple[Any, None]:
        (z,) = state
        slope, rates = self._slope(t, z, None)
        return (z, slope, tuple(torch.zeros_like(rate) for rate in rates), rates), None

    def _slope(self, t: Tensor, z: Tensor, known: Tensor | None) -> tuple[Tensor, Rates]:
        if self.quadrature is not None:
            return self.quadrature.at(t, z, known)
        return (self.field(t, z) if known is None else known), ()

    def _stages(self, node: Tensor, length: Tensor, z: Tensor) -> tuple[Tensor, ...]:
        offsets, real = self.method.offsets, real_dtype(z)
        return tuple(beside((node + c * length).to(real), z) for c in offsets)

    def _finish(
        self,
        ts: tuple[Tensor, ...],
        dt: Tensor,
        end: Tensor,
        good: Tensor,
        shares: list[tuple[int, Tensor, Tensor]],
        state: Any,
        step: Step,
    ) -> tuple[Any, list[Candidate]]:
        """What follows a step that some samples accept; the others stay where they are."""
        z, slope, sums, rates = state
        here = beside(good, z)
        z_next = torch.where(here, step.z, z)
        known = None
        if step.carry:
            known = torch.where(here, step.carry[0], slope)
        slope_next, rates_next = self._slope(end, z_next, known)
        if not step.carry:
            step = step._replace(carry=(slope_next,))

        def inside(x: Scalar) -> tuple[Tensor, Tensor]:
            x = beside(x, z) if isinstance(x, Tensor) else x
            return ts[0] + x * dt, self.method.between(x, z, step, dt)

        sums_next = sums
        if self.quadrature is not None:
            if self.quadrature.staged:
                moved = self.quadrature.advance_staged(sums, rates, ts, z, step.slopes, dt)
            else:
                moved = self.quadrature.advance(sums, rates, rates_next, inside, dt)
            columns = zip(moved, sums, strict=True)
            sums_next = tuple(torch.where(good, new, old) for new, old in columns)
        outs = []
        for j, there, share in shares:
            x = share.to(real_dtype(z))
            value = self.method.between(beside(x, z), z, step, dt)
            totals = sums
            if self.quadrature is not None:
                totals = self.quadrature.until(x, sums, rates, inside, dt.flatten())
            outs.append((j, there, value, totals))
        return (z_next, slope_next, sums_next, rates_next), outs

    def _replay(self, ts: tuple[Tensor, ...], dt: Tensor, finish: Any, state: Any) -> Any:
        return finish(state, self.method.step(self.field, ts, dt, state[0], (state[1],)))

    def _factor(self, ratio: Tensor, before: Tensor) -> Tensor:
        control = self.control
        wish = control.safety * ratio ** (0.75 * control.beta - 1 / self.method.order)
        wish = wish * torch.where(ratio <= 1, before, 1.0) ** control.beta
        wish = torch.where(ratio == 0, control.ifactor, wish)
        return torch.nan_to_num(wish, nan=control.dfactor).clamp(control.dfactor, control.ifactor)

    def _first_steps(self, now: Tensor, sign: Tensor, z: Tensor, f0: Tensor) -> Tensor:
        """As `adaptive.first_step`, for each sample."""
        control = self.control
        if control.first_step is not None and isfinite(control.first_step):
            return torch.full_like(now, control.first_step)
        with torch.no_grad():
            scale = z.abs() * control.rtol + control.atol
            d0, d1 = sample_rms(z / scale), sample_rms(f0 / scale)
            small = ~((d0 >= 1e-5) & (d1 >= 1e-5) & torch.isfinite(d0 + d1))
            h0 = torch.where(small, 1e-6, 0.01 * d0 / d1).to(now)
            real = real_dtype(z)
            z1 = torch.addcmul(z, f0, beside((sign * h0).to(real), z))
            f1 = self.field(beside((now + sign * h0).to(real), z), z1)
            d2 = sample_rms((f1 - f0) / scale).to(now) / h0
            top = torch.maximum(d1.to(now), d2)
            h1 = torch.where(
                top <= 1e-15,
                (h0 * 1e-3).clamp_min(1e-6),
                (0.01 / top) ** (1 / self.method.order),
            )
            return torch.where(torch.isfinite(top), torch.minimum(100 * h0, h1), h0)
