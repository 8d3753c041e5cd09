"""Fixed steps under `torch.autocast`: velocities of low precision, a state that keeps its own.

The velocity, the stages and the increment dz = sum_i b_i k_i are computed in float16 or bfloat16,
and so are the states stored for the backward pass; z += dt dz, the adjoint and the gradients of
the parameters are accumulated in the precision of the initial state. A velocity with a round-off
of eps then costs an error of O(T eps), whatever the number of steps; a state of low precision
would lose O(N eps), or stand still where dt |v| < eps |z| / 2.

In float16 the cotangent of a step is multiplied by a power of two before it is rounded, so that
small adjoints do not vanish, and the gradients are divided by it. That is exact.

Source: Celledoni, Owren, Ruthotto, Yang, Mixed precision training of neural ODEs, 2025, arXiv
2510.23498. Unlike there, the power of two follows the largest entry of the adjoint at each step.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from math import inf, isfinite, log2, sqrt
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils import get_total_norm

from ..errors import ArgumentError, SolveError
from .captured import Captured, sequence_number
from .checkpoint import Randomness
from .dense import Scalar, at_end, combine, linear
from .explicit import RungeKutta
from .fixed import FixedMarch
from .quadrature import Rates
from .tableaus import Tableau

ONCE = (
    "a solve under torch.autocast can be differentiated once, and not by torch.func; use "
    'gradient="checkpoint", or solve under torch.autocast(enabled=False)'
)


def solve_low_precision(
    march: FixedMarch, z0: Tensor, captured: Captured, *, scaling: bool = True, shift: int = 0
) -> list[tuple[Tensor, Rates]]:
    """The outputs of `march`, its velocity evaluated in the precision that autocast asks for.

    Worth it where the velocity is made of large products of matrices; the memory for the backward
    pass is that of the states alone, half of it or less. The gradient can be taken once.

    Args:
        march: of an explicit Runge-Kutta method, whose velocity may return any floating dtype.
        z0: (batch, ...), float32 or float64; the dtype of the outputs.
        captured: the parameters.
        scaling: in float16, scale the adjoint. Without it gradients may vanish, and where they
            overflow all of them are infinite, which is what `torch.amp.GradScaler` looks for.
        shift: added to the exponents of the scales; where nothing over- or underflows, the
            gradient does not depend on it.

    Returns:
        (z, ()) at the first node and at each of `march.inside`.

    Raises:
        ArgumentError: a method, quadrature or interpolation that needs more than explicit steps.
        SolveError: under a transform of torch.func.
    """
    if not isinstance(march.method, RungeKutta) or not march.method.tableau.explicit:
        raise _refused(f"explicit Runge-Kutta methods, not {march.method.name!r}")
    if march.quadrature is not None:
        raise _refused("the state alone, without `quadrature`")
    if march.sloped:
        raise _refused("outputs at the steps or linear between them, without dense or cubic ones")
    if z0.dtype not in (torch.float32, torch.float64):
        raise _refused(f"a state in float32 or float64, not {z0.dtype}")
    nodes = march.grid.nodes
    timed = torch.is_grad_enabled() and nodes.requires_grad
    inputs = (z0, *_times(march, timed), *captured.tensors)
    keep = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in inputs)
    steps = LowPrecision(march, z0, captured, scaling=scaling, shift=shift, keep=keep)
    if len(march.grid) == 0:
        return [(z0, ())]
    try:
        zs = dict(zip(steps.wanted, LowPrecisionGradient.apply(steps, *inputs), strict=True))
    except RuntimeError as error:
        if "functorch" in str(error):
            raise SolveError(ONCE) from None
        raise
    zs[0] = z0
    outputs: list[tuple[Tensor, Rates]] = [(z0, ())]
    for n, shares in enumerate(march.inside):
        for x in shares:
            outputs.append((zs[n + 1] if at_end(x) else linear(x, zs[n], zs[n + 1]), ()))
    return outputs


def _refused(what: str) -> ArgumentError:
    return ArgumentError(
        f'under torch.autocast, gradient="discrete" handles {what}; use gradient="checkpoint", or '
        "solve under torch.autocast(enabled=False)"
    )


def _times(march: FixedMarch, timed: bool) -> tuple[Tensor | None, Tensor | None]:
    """The lengths and the stages' times of all steps, where they are differentiated."""
    if not timed:
        return None, None
    lengths = [torch.as_tensor(length) for length in march.grid.lengths]
    return torch.stack(lengths), torch.stack(list(march.grid.stages))


class Scaling:
    """The powers of two S for which S max|a| is near 1 / eps, a the adjoint.

    Gradients of parameters and times may be larger than the adjoint. Where they overflow, S is
    halved for this step and those that follow; after some steps without, larger ones are tried.
    """

    attempts = 50
    patience = 16

    def __init__(self, low: torch.dtype, z: Tensor, shift: int = 0) -> None:
        size = max(z.shape[1:].numel(), 1)
        self.target = 2.0**shift / (torch.finfo(low).eps * sqrt(size))
        self.lowered = self.calm = 0

    def scale(self, peak: float) -> float:
        """S for an adjoint whose largest entry is `peak`."""
        exponent = round(log2(self.target / peak)) - self.lowered
        return 2.0 ** min(exponent, 100)  # S and 1 / S are normal numbers in float32, too

    def overflowed(self) -> None:
        self.lowered += 1
        self.calm = 0

    def accepted(self) -> None:
        self.calm += 1
        if self.lowered and self.calm >= self.patience:
            self.lowered -= 1
            self.calm = 0


class LowPrecision:
    """The steps of a march in low precision, forward and backward."""

    def __init__(
        self,
        march: FixedMarch,
        z0: Tensor,
        captured: Captured,
        *,
        scaling: bool,
        shift: int,
        keep: bool,
    ) -> None:
        assert isinstance(march.method, RungeKutta)
        self.march = march
        self.captured = captured
        self.tableau: Tableau = march.method.tableau
        self.device = z0.device
        self.low = torch.get_autocast_dtype(z0.device.type)
        self.scaled = scaling and self.low == torch.float16
        self.shift = shift
        self.keep = keep  # states for the backward pass
        nodes = {len(march.grid)}
        for n, shares in enumerate(march.inside):
            if shares:
                nodes |= {n + 1} if all(map(at_end, shares)) else {n, n + 1}
        self.wanted = sorted(nodes - {0})

    @contextmanager
    def high(self) -> Iterator[None]:
        """Without autocast, but such that weights cast in `increment` are cast once for all steps.

        The casts are dropped on both sides: those made before belong to another graph, and those
        made here without one would hide the weights from it (so in torch before 2.11).
        """
        torch.clear_autocast_cache()
        try:
            with torch.autocast(self.device.type, enabled=False):
                yield
        finally:
            torch.clear_autocast_cache()

    def increment(self, z: Tensor, ts: Sequence[Tensor], dt: Scalar) -> Tensor:
        """sum_i b_i k_i from the state `z` of low precision."""
        if isinstance(dt, Tensor) and dt.ndim:  # would lift the stages, () does not
            dt = dt.to(self.low)
        a, b = self.tableau.a, self.tableau.b
        used = max(i for i, weight in enumerate(b) if weight != 0.0) + 1
        slopes: list[Tensor] = []
        with torch.autocast(self.device.type, dtype=self.low):
            for row, t in zip(a[:used], ts, strict=False):
                y = combine(z, row, slopes, dt)
                slopes.append(self.march.field(t, y).to(self.low))
        return combine(z.new_zeros(()), b[:used], slopes, 1.0)

    def forward(self, z: Tensor) -> tuple[list[Tensor], Tensor | None]:
        """The states at the wanted nodes, and those stored for the backward pass."""
        grid, watch = self.march.grid, self.march.watch
        random = Randomness(z.device) if self.keep else None
        stored = z.new_empty((len(grid), *z.shape), dtype=self.low) if self.keep else None
        zs, wanted = [], set(self.wanted)
        for n in range(len(grid)):
            dt, ts = grid.lengths[n], grid.stages[n].unbind(0)
            if watch is not None:
                watch(grid.ends[n], z, dt)
            y = z.to(self.low) if stored is None else stored[n].copy_(z)
            z = combine(z, (1.0,), (self.increment(y, ts, dt).to(z.dtype),), dt)
            if n + 1 in wanted:
                zs.append(z)
        if random is not None:
            random.check()
        return zs, stored

    def backward(
        self, stored: Tensor, cotangents: dict[int, Tensor], timed: bool
    ) -> list[Tensor | None]:
        """The gradients for the initial state, lengths, stages' times, and parameters."""
        lengths, stages = (
            None if x is None else torch.zeros_like(x) for x in _times(self.march, timed)
        )
        params = [torch.zeros_like(p) for p in self.captured.tensors]
        since = sequence_number()
        scaling = Scaling(self.low, stored[0], self.shift) if self.scaled else None
        a: Tensor | None = None
        for n in reversed(range(len(self.march.grid))):
            if (at := cotangents.get(n + 1)) is not None:
                a = at if a is None else a + at
            if a is None:
                continue
            pull = Pull(self, n, stored[n], a, timed=timed, since=since)
            grads, weight = pull(scaling)
            into = [None, None, *params]
            if lengths is not None and stages is not None:
                into = [lengths[n], stages[n], *params]
                lengths[n] += (a * pull.dz).sum_to_size(lengths[n].shape)
            for total, g in zip(into, grads[1:], strict=True):
                if total is not None and g is not None:
                    total += weight * g
            if grads[0] is not None:
                a = a + weight * grads[0].to(a.dtype)
        return _finite_or_infinite([a, lengths, stages, *params])


class Pull:
    """One step run again, with a graph, and what it adds to the gradients.

    Args:
        y: the stored state.
        a: the adjoint at the end of the step.
        timed: gradients of times are wanted.
        since: the number of autograd's nodes before the backward pass.
    """

    def __init__(
        self, steps: LowPrecision, n: int, y: Tensor, a: Tensor, *, timed: bool, since: int
    ) -> None:
        grid = steps.march.grid
        dt = grid.lengths[n]
        ts = grid.stages[n].detach()
        if isinstance(dt, Tensor):
            dt = dt.detach()
        # dt makes gradients small, so it comes after them, unless samples have their own.
        self.a, self.weight = (a * dt, 1.0) if isinstance(dt, Tensor) and dt.ndim else (a, dt)
        with torch.enable_grad():
            y = y.detach().requires_grad_()
            if timed and isinstance(dt, Tensor):
                dt, ts = dt.clone().requires_grad_(), ts.requires_grad_()
            self.leaves = (y, dt, ts, *steps.captured.tensors)
            self.asked = [x for x in self.leaves if isinstance(x, Tensor) and _asks(x)]
            self.graph = steps.increment(y, ts.unbind(0), dt)
            steps.captured.check(self.graph, since, self.asked)
        self.dz = self.graph.detach().to(a.dtype)

    def __call__(self, scaling: Scaling | None) -> tuple[list[Tensor | None], Scalar]:
        """The gradients of <a, dz> for y, dt, ts and parameters over a weight, and that weight."""
        if scaling is None:
            return self._grads(self.a), self.weight
        peak = float(self.a.abs().max()) if self.a.numel() else 0.0
        if peak == 0.0:
            return [None] * len(self.leaves), self.weight
        for _ in range(scaling.attempts if isfinite(peak) else 0):
            scale = scaling.scale(peak)
            grads = self._grads(scale * self.a, retain=True)
            if isfinite(_largest(grads)):
                scaling.accepted()
                return grads, self.weight / scale
            scaling.overflowed()
        return [torch.full_like(self.a, inf), *[None] * (len(self.leaves) - 1)], 1.0

    def _grads(self, v: Tensor, *, retain: bool = False) -> list[Tensor | None]:
        if not self.graph.requires_grad:
            return [None] * len(self.leaves)
        v = v.to(self.graph.dtype)
        found = torch.autograd.grad(
            self.graph, self.asked, v, retain_graph=retain, allow_unused=True
        )
        grads = iter(found)
        return [next(grads) if _asks(x) else None for x in self.leaves]


def _asks(x: Any) -> bool:
    return isinstance(x, Tensor) and x.requires_grad


def _largest(grads: Sequence[Tensor | None]) -> Tensor:
    """The largest absolute value; not finite if any entry is not."""
    return get_total_norm([g for g in grads if g is not None and g.numel()], inf)


def _finite_or_infinite(grads: Sequence[Tensor | None]) -> list[Tensor | None]:
    """The gradients, all of them infinite if any entry is not finite."""
    finite = torch.isfinite(_largest(grads))
    return [None if g is None else torch.where(finite.to(g.device), g, inf) for g in grads]


class LowPrecisionGradient(torch.autograd.Function):
    """The states at the wanted nodes, and the gradient of the steps between them."""

    @staticmethod
    def forward(
        ctx: Any,
        steps: LowPrecision,
        z0: Tensor,
        lengths: Tensor | None,
        stages: Tensor | None,
        *params: Tensor,
    ) -> tuple[Tensor, ...]:
        with torch.no_grad(), steps.high():
            zs, stored = steps.forward(z0.detach())
        ctx.steps, ctx.timed = steps, lengths is not None
        ctx.set_materialize_grads(False)
        # Autograd compares the versions of what it saves: no parameter may change until then.
        ctx.save_for_backward(stored, *params)
        return tuple(zs)

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor | None) -> Any:
        if torch.is_grad_enabled():
            raise SolveError(ONCE)
        steps: LowPrecision = ctx.steps
        stored = ctx.saved_tensors[0]
        at = {n: g for n, g in zip(steps.wanted, cotangents, strict=True) if g is not None}
        with steps.high():
            return None, *steps.backward(stored, at, ctx.timed)
