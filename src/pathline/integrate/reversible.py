"""The gradient of a reversible method in constant memory: its steps are undone backwards.

The backward pass takes each step back to the state before it, runs that one step again with a
graph, and multiplies with its Jacobian. It is the gradient of the discrete solution as far as the
states are recovered: to round-off where the inverse is stable, and not at all where solutions
decay fast, since errors grow backwards as they shrink forwards. So the pass ends by comparing the
recovered first state with the true one.

Source: Zhuang et al., MALI: a memory efficient and reverse accurate integrator for neural ODEs,
ICLR 2021; Chang et al., Reversible architectures for arbitrarily deep residual neural networks,
AAAI 2018.
"""

import warnings
from collections.abc import Sequence
from typing import Any, NamedTuple, TypeGuard, cast

import torch
from torch import Tensor

from ..errors import ArgumentError, SolveError, SolveWarning
from .adjoint import ONCE
from .captured import Captured, sequence_number
from .checkpoint import autocast_now
from .field import Field
from .fixed import FixedMarch, State
from .grid import Grid
from .options import transformed
from .quadrature import Rates
from .structured import Carry, Reversible


def solve_reversible(
    march: FixedMarch, z0: Tensor, captured: Captured
) -> list[tuple[Tensor, Rates]]:
    """The outputs of the march, at node 0 and at the shares in `march.inside`.

    What is kept for the backward pass is the last state, its carry and the first state, whatever
    the number of steps; beside it there is the table of times, a few numbers for each step. (A
    dense march keeps all its states for its pieces, which have no gradient.)

    Args:
        march: of a method that has `invert`, without quadrature.
        z0: the state at node 0.
        captured: the tensors beyond z0 and the times that get a gradient.

    Raises:
        ArgumentError: the march has no inverse, integrates rates, or looks beside its nodes.
        SolveError: under a transform of torch.func; or when the gradient is differentiated again.
    """
    method = march.method
    if not getattr(method, "reversible", False):
        raise ArgumentError(
            f'gradient="reversible" needs a method whose steps can be undone, such as '
            f'"asynchronous_leapfrog", got {method.name!r}; use gradient="checkpoint"'
        )
    if march.quadrature is not None:
        raise ArgumentError(
            '`quadrature` does not go with gradient="reversible", which undoes the steps of the '
            'state only; use gradient="discrete" or "checkpoint"'
        )
    if march.grid.perturb:
        raise ArgumentError(
            'option "perturb" does not go with gradient="reversible", whose steps share the slope '
            'at a node; use gradient="discrete" or "checkpoint"'
        )
    if transformed():
        raise SolveError(ONCE.format("reversible"))
    outputs: list[tuple[Tensor, Rates]] = [(z0, ())]
    if any(len(shares) for shares in march.inside):
        solve = _Solve(march, captured, z0.device)
        zs = ReversibleSolve.apply(solve, z0, *solve.times, *solve.shares, *captured.tensors)
        outputs += [(z, ()) for z in zs]
    return outputs


class _Part(Grid):
    """One step of a grid; `timed`, with times of its own to differentiate for."""

    def __init__(self, grid: Grid, n: int, *, timed: bool) -> None:
        times = grid.lengths[n], grid.stages[n], grid.ends[n : n + 2]
        self.times = tuple(_leaf(time) for time in cast(Carry, times)) if timed else ()
        length, stages, self.ends = self.times or times
        self.lengths, self.stages = [length], (stages,)


class _Step(NamedTuple):
    """A step with its graph."""

    state: Carry  # z and the carry it starts from; z alone for the first step
    times: tuple[Tensor, ...]  # length, stages, ends; nothing where times have no gradient
    shares: tuple[Tensor, ...]
    outputs: Carry  # z and the carry at its end, then the solution at its shares


class _Solve:
    """A march, what gets a gradient from it, and its steps one by one."""

    def __init__(self, march: FixedMarch, captured: Captured, device: torch.device) -> None:
        self.march = march
        self.method = cast(Reversible, march.method)
        self.captured = captured
        self.autocast = autocast_now(device)
        grid = march.grid
        self.timed = grid.nodes.requires_grad
        self.times: tuple[Tensor, ...] = ()
        if self.timed:
            lengths = cast(Sequence[Tensor], grid.lengths)
            self.times = (torch.stack(tuple(lengths)), torch.stack(grid.stages), grid.ends)
        self.shares = [x for shares in march.inside for x in shares if _differentiable(x)]

    def forward(self, z0: Tensor) -> tuple[State, list[Tensor]]:
        """The last state and the outputs after node 0, without a graph."""
        with torch.enable_grad():  # for velocities that call autograd
            state = _cut(self.march.begin(_leaf(z0)))
            outputs = []
            for n in range(len(self.march.grid)):
                after, outs = self.march.step(n, state)
                after = _cut(after)
                if self.march.dense:
                    before = state._replace(z=state.z.detach())
                    last = after._replace(z=after.z.detach())
                    self.march.pieces.append(self.march.piece(n, before, last))
                state = after
                outputs += [z.detach() for z, _ in outs]
        return state, outputs

    def invert(self, n: int, z: Tensor, carry: Carry) -> tuple[Tensor, Carry]:
        """The state before step n from the one after it."""
        grid, field = self.march.grid, cast(Field, self.march.field)
        ts, dt = grid.stages[n].detach().unbind(0), grid.lengths[n]
        if isinstance(dt, Tensor):
            dt = dt.detach()
        with torch.enable_grad(), self.autocast():
            z, carry = self.method.invert(field, ts, dt, _leaf(z), carry)
        return z.detach(), tuple(part.detach() for part in carry)

    def run(self, n: int, z: Tensor, carry: Carry) -> _Step:
        """Step n from (z, carry) with its graph; the first one starts its carry by itself."""
        part = _Part(self.march.grid, n, timed=self.timed)
        shares = [_leaf(x) if _differentiable(x) else x for x in self.march.inside[n]]
        march = FixedMarch(
            self.march.method,
            self.march.field,
            part,
            [shares],
            interpolation="cubic" if self.march.cubic else "linear",
        )
        with torch.enable_grad(), self.autocast():
            torch.clear_autocast_cache()  # casts of parameters in there belong to other graphs
            since = sequence_number()
            z, carry = _leaf(z), tuple(_leaf(x) for x in carry)
            if n == 0:
                state = march.begin(z)
            else:
                slope = (march.field(part.ends[0], z),) if march.sloped else ()
                state = State(z, carry, slope, (), ())
            state, outs = march.step(0, state)
        moving = tuple(x for x in shares if _differentiable(x))
        step = _Step(
            state=(z, *carry),
            times=part.times,
            shares=moving,
            outputs=(state.z, *state.carry, *(z for z, _ in outs)),
        )
        for output in step.outputs:
            self.captured.check(output, since, (*step.state, *step.times, *moving))
        return step


class ReversibleSolve(torch.autograd.Function):
    """The outputs of a march; its backward pass undoes the steps."""

    @staticmethod
    def forward(ctx: Any, solve: _Solve, z0: Tensor, *tensors: Tensor) -> tuple[Tensor, ...]:
        last, outputs = solve.forward(z0)
        ctx.solve = solve
        ctx.carried = len(last.carry)
        # The parameters come along so that changing them before the backward pass is noticed.
        ctx.save_for_backward(z0, last.z.detach(), *last.carry, *solve.captured.tensors)
        ctx.set_materialize_grads(False)
        return tuple(outputs)

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Any:
        raise SolveError(ONCE.format("reversible"))

    @staticmethod
    def backward(ctx: Any, *cotangents: Any) -> Any:
        if torch.is_grad_enabled():
            raise SolveError(ONCE.format("reversible"))
        solve: _Solve = ctx.solve
        grid, params = solve.march.grid, solve.captured.tensors
        z0, z, *saved = ctx.saved_tensors
        carry: Carry = tuple(saved[: ctx.carried])
        needed = ctx.needs_input_grad[len(ctx.needs_input_grad) - len(params) :]
        wanted = [param for param, need in zip(params, needed, strict=True) if need]
        sums: list[Tensor | None] = [None] * len(wanted)
        times = [torch.zeros_like(time) for time in solve.times]
        shares: list[Tensor | None] = []
        above: Sequence[Tensor | None] = [None] * (1 + ctx.carried)
        for n in reversed(range(len(grid))):
            z, carry = solve.invert(n, z, carry)
            if n == 0:
                _warn(z, z0)
                z, carry = z0, ()
            first = len(cotangents) - len(solve.march.inside[n])
            weights = (*above, *cotangents[first:])
            cotangents = cotangents[:first]
            if all(weight is None for weight in weights):
                moving = sum(_differentiable(x) for x in solve.march.inside[n])
                shares[:0] = [None] * moving
                continue
            step = solve.run(n, z, carry)
            grads = iter(_pull((*step.state, *step.times, *step.shares, *wanted), step, weights))
            above = [next(grads) for _ in step.state]
            places: tuple[int | slice, ...] = (n, n, slice(n, n + 2))
            for total, place in zip(times, places, strict=False):
                if (grad := next(grads)) is not None:
                    total[place] += grad
            shares[:0] = [next(grads) for _ in step.shares]
            sums = [
                total if grad is None else grad if total is None else total + grad
                for total, grad in zip(sums, grads, strict=True)
            ]
        found = iter(sums)
        return (
            None,
            above[0],
            *times,
            *shares,
            *(next(found) if need else None for need in needed),
        )


def _pull(
    inputs: Sequence[Tensor], step: _Step, weights: Sequence[Tensor | None]
) -> Sequence[Tensor | None]:
    """The vector-Jacobian product of a step; None where an input has no influence."""
    pairs = [
        (output, weight)
        for output, weight in zip(step.outputs, weights, strict=True)
        if weight is not None and output.requires_grad
    ]
    if not pairs:
        return [None] * len(inputs)
    outputs, weights = zip(*pairs, strict=True)
    return torch.autograd.grad(outputs, inputs, weights, allow_unused=True)


def _warn(z: Tensor, z0: Tensor) -> None:
    """Says so if the recovered first state has lost half of its digits."""
    eps = torch.finfo(z.dtype).eps
    scale = z0.norm().item() or 1.0
    error = (z - z0).norm().item() / scale
    if not error <= eps**0.5:
        warnings.warn(
            f"undoing the steps recovered the first state with a relative error of {error:.1e}, "
            f"{error / eps:.0e} times the round-off: that is unstable for this velocity, and "
            'gradient="reversible" is inaccurate; use gradient="checkpoint"',
            SolveWarning,
            stacklevel=2,
        )


def _differentiable(x: Any) -> TypeGuard[Tensor]:
    return isinstance(x, Tensor) and x.requires_grad


def _leaf(x: Tensor) -> Tensor:
    return x.detach().requires_grad_()


def _cut(state: State) -> State:
    """The state without its graph; z starts a new one."""
    carry, slope = (tuple(x.detach() for x in part) for part in (state.carry, state.slope))
    return State(_leaf(state.z), carry, slope, (), ())
