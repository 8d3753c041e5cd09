"""The continuous adjoint: differentiate the equation, then discretise (optimize-discretize).

With p(t) = dL/dz(t), the backward solve integrates (z, p, dL/dtheta) from the last time to the
first; p jumps by the gradient of the loss at each output. Memory does not grow with the steps, but
the gradient is exact only as the tolerances go to zero.

Source: Pontryagin's adjoint; Chen et al., Neural Ordinary Differential Equations, 2018; Onken and
Ruthotto, 2020, arXiv 2005.13420 (why to discretise first).
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..errors import ArgumentError, SolveError
from .adaptive import rms
from .captured import Captured, sequence_number
from .checkpoint import autocast_now
from .field import Field, real_dtype

ONCE = (
    'gradient="{}" can be differentiated once, and not by torch.func; '
    'use gradient="discrete" or "checkpoint"'
)


@dataclass(frozen=True)
class AdjointSpec:
    """How the adjoint equation is solved; None means as the equation itself."""

    rtol: Any = None
    atol: Any = None
    method: str | None = None
    options: Mapping[str, Any] | None = None
    params: Iterable[Tensor] | None = None


def mixed_norm(tensors: Iterable[Tensor]) -> Tensor:
    """The largest root mean square of several tensors."""
    norms = [rms(tensor) for tensor in tensors if tensor.numel()]
    return torch.stack(norms).max() if norms else torch.zeros(())


def adjoint_norm(
    wanted: Any, state_norm: Callable[[Tensor], Tensor], split: Callable[[Tensor], Any] | None
) -> Callable[[tuple[Tensor, ...]], Tensor]:
    """The norm of (dL/dt, y, p, dL/dtheta...) that the adjoint solve controls.

    `wanted` is None for all of them, "seminorm" to leave out dL/dtheta, which does not feed back
    (Kidger, Chen, Lyons 2021, arXiv 2009.09457), or the user's own, who sees leaves of y and p.
    """
    if callable(wanted):
        if split is None:
            return wanted

        def leaves(parts: tuple[Tensor, ...]) -> Tensor:
            t, y, p, *params = parts
            return wanted((t, *split(y), *split(p), *params))

        return leaves
    if wanted not in (None, "seminorm"):
        raise ArgumentError(
            f"option 'norm' of the adjoint must be a callable or 'seminorm', got {wanted!r}"
        )

    def norm(parts: tuple[Tensor, ...]) -> Tensor:
        t, y, p, *params = parts
        norms = [t.abs(), state_norm(y), state_norm(p)]
        if wanted is None:
            norms.append(mixed_norm(params).to(norms[0]))
        return torch.stack([norm.reshape(()) for norm in norms]).max()

    return norm


@dataclass
class AdjointSolve:
    """What the backward pass needs to know of the forward solve."""

    forward: Callable[[], Tensor]  # the solution (times, ...)
    backward: Callable[..., Any]  # odeint with method and tolerances of the adjoint
    field: Field
    captured: Captured
    options: dict[str, Any]
    callbacks: dict[str, Callable[..., Any]]


def solve_adjoint(solve: AdjointSolve, z0: Tensor, t: Tensor) -> Tensor:
    """The solution (times, ...) whose gradient is that of the continuous adjoint.

    Raises:
        SolveError: under a transform of torch.func.
    """
    try:
        return Adjoint.apply(solve, z0, t, *solve.captured.tensors)
    except RuntimeError as error:
        if "functorch" in str(error):
            raise SolveError(ONCE.format("adjoint")) from None
        raise


class Adjoint(torch.autograd.Function):
    """The solve, and its adjoint equation as its gradient."""

    @staticmethod
    def forward(ctx: Any, solve: AdjointSolve, z0: Tensor, t: Tensor, *params: Tensor) -> Tensor:
        with torch.no_grad():
            zs = solve.forward()
        ctx.solve = solve
        ctx.adjoint_options = solve.options
        ctx.autocast = autocast_now(z0.device)
        ctx.save_for_backward(t, zs, *params)
        return zs

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        if torch.is_grad_enabled():
            raise SolveError(ONCE.format("adjoint"))
        with ctx.autocast():
            return Adjoint._backward(ctx, grads[0])

    @staticmethod
    def _backward(ctx: Any, grad: Tensor) -> Any:
        solve: AdjointSolve = ctx.solve
        t, zs, *params = ctx.saved_tensors
        timed = ctx.needs_input_grad[2]
        dynamics = _Augmented(solve.field, solve.captured, params, timed)
        for name, callback in solve.callbacks.items():
            setattr(dynamics, name, callback)
        zero = torch.zeros((), dtype=zs.dtype, device=zs.device)
        p = grad[-1].clone()
        grad_t = torch.zeros_like(t) if timed else None
        state = (zero, zs[-1], p, *[torch.zeros_like(param) for param in params])
        real = real_dtype(zs)
        for i in range(len(t) - 1, 0, -1):
            if grad_t is not None:
                # Moving an output time moves the output along the velocity.
                dz = solve.field(t[i].to(real), zs[i])
                along = torch.sum(dz.conj() * grad[i])
                grad_t[i] = along.real.to(grad_t)
                state = (state[0] - along, *state[1:])
            after = solve.backward(dynamics, state, t[i - 1 : i + 1].flip(0), ctx.adjoint_options)
            state = tuple(part[1] for part in after)
            # The stored output is better than the one integrated backward.
            state = (state[0], zs[i - 1], state[2] + grad[i - 1], *state[3:])
        if grad_t is not None:
            grad_t[0] = grad_t[0] + state[0].real.to(grad_t)
        pairs = zip(state[3:], params, strict=True)
        grads = [g.to(q.dtype) if q.is_complex() else g.real.to(q.dtype) for g, q in pairs]
        return (None, state[2], grad_t, *grads)


class _Augmented:
    """d/dt of (dL/dt, z, p, dL/dtheta...)."""

    def __init__(self, field: Field, captured: Captured, params: list[Tensor], timed: bool) -> None:
        self.field = field
        self.captured = captured
        self.params = tuple(params)
        self.timed = timed

    def __call__(self, t: Tensor, state: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        _, z, p, *_ = state
        torch.clear_autocast_cache()  # which holds casts of parameters made before
        with torch.enable_grad():
            t = t.detach().requires_grad_(self.timed)
            z = z.detach().requires_grad_()
            since = 0 if self.captured.closed else sequence_number()
            dz = self.field(t, z)
            self.captured.check(dz, since, (t, z))
            inputs = (*((t,) if self.timed else ()), z, *self.params)
            grads: tuple[Tensor | None, ...] = (None,) * len(inputs)
            if dz.requires_grad:
                grads = torch.autograd.grad(dz, inputs, -p, allow_unused=True)
        filled = [
            torch.zeros_like(x) if g is None else g for g, x in zip(grads, inputs, strict=True)
        ]
        grad_t = filled.pop(0) if self.timed else torch.zeros_like(state[0])
        return (grad_t.to(dz.dtype), dz.detach(), *filled)
