"""The door of the solvers: one call, its checks, and the way to the march that it asks for."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor

from .adjoint import AdjointSpec
from .field import Velocity
from .setup import Request
from .solve import solve
from .tableaus import Tableau


def odeint(
    func: Velocity,
    y0: Any,
    t: Any,
    *,
    rtol: float | Tensor | Sequence[Any] = 1e-7,
    atol: float | Tensor | Sequence[Any] = 1e-9,
    method: str | Tableau | None = "dopri5",
    options: Mapping[str, Any] | None = None,
    event_fn: Callable[[Tensor, Any], Tensor] | None = None,
    gradient: str = "discrete",
    memory: str | float | None = None,
    segments: int | None = None,
    quadrature: Callable[[Tensor, Any, Any], Any] | None = None,
    batch: str = "shared",
    mask: Tensor | None = None,
    solution: bool = False,
    scaling: bool = True,
    adjoint_params: Iterable[Tensor] | None = None,
    adjoint_rtol: Any = None,
    adjoint_atol: Any = None,
    adjoint_method: str | None = None,
    adjoint_options: Mapping[str, Any] | None = None,
) -> Any:
    """Solve dy/dt = func(t, y), y(t[0]) = y0, and return y at the times `t`.

    The call is torchdiffeq's; what is new comes by keyword. The page "Which gradient?" compares
    the strategies, "Coming from torchdiffeq" lists the differences.

    Args:
        func: the velocity, `(t, y) -> dy/dt`; `t` is (), `y` and the result are like `y0`.
        y0: a tensor of any shape or a pytree of tensors.
        t: (times,) increasing or decreasing, or (batch, times) for times of each sample's own;
            then `func` gets `t` of shape (batch, 1, ..., 1), which broadcasts against y.
        rtol, atol: bounds of the error of one step; numbers, tensors like `y0`, or one for each
            leaf of a tuple.
        method: a name in `METHODS`, a `Tableau`, or "scipy_solver".
        options: of the method, by torchdiffeq's names. Fixed steps: `step_size`,
            `grid_constructor`, `perturb`, `interp`. Adaptive: `norm`, `first_step`, `min_step`,
            `max_step`, `max_num_steps`, `safety`, `ifactor`, `dfactor`, `beta` (weight of the
            error before the last), `step_t`, `jump_t`. Adaptive methods take fixed steps where
            `step_size` or `grid_constructor` is given.
        event_fn: solve from t[0] in the direction of t[1] until `event_fn(t, y)` changes its sign
            (any of its entries does); returns `(event time, y at t[0] and at the event)`, both
            differentiable once.
        gradient: "discrete", the exact gradient of the discrete solution; "checkpoint", the same
            bit for bit in bounded memory; "reversible", the same to round-off in constant memory,
            for reversible methods; "adjoint", the continuous adjoint.
        memory: for "checkpoint": what to keep for the backward pass, such as "500MB".
        segments: for "checkpoint": how many states to keep. Default: the state of every step.
        quadrature: `(t, y, dy) -> pytree of (batch,)` rates, integrated along the solution without
            feeding back; the result is then `(y, integrals)`, with the times in front.
        batch: "shared", one step size for all, or "independent": each sample (along the first
            axis of y0) has its own steps, so that its result does not depend on the others (in
            implicit methods, whose Newton iteration ends for all at once, within the tolerance).
        mask: (batch, times), True where a time of a ragged `t` counts; after its last time a
            sample rests.
        solution: return a `Solution` with statistics, status and dense output. A failure is then
            a status, and otherwise a `SolveError`.
        scaling: under `torch.autocast` in float16, scale the adjoint by powers of two.
        adjoint_params: tensors that the gradient has to reach, for "reversible" and "adjoint";
            found by themselves where None.
        adjoint_rtol, adjoint_atol, adjoint_method, adjoint_options: of the adjoint solve; by
            default those of the solve itself.

    Returns:
        (times, *y0.shape), or a pytree of such tensors, in the dtype of `y0`.

    Raises:
        ArgumentError, ShapeError: an argument makes no sense; before the first step.
        SolveError: the solve failed; its text says where, why, and what to try.

    Source: Hairer, Norsett, Wanner, Solving Ordinary Differential Equations I, 1993; Onken and
    Ruthotto, Discretize-Optimize vs. Optimize-Discretize, 2020, arXiv 2005.13420 (gradients).

    Example:
        >>> import torch
        >>> y = odeint(lambda t, y: -y, torch.ones(2), torch.tensor([0.0, 1.0]))
        >>> [round(value, 4) for value in y[-1].tolist()]
        [0.3679, 0.3679]
    """
    request = Request(
        func,
        y0,
        t,
        rtol=rtol,
        atol=atol,
        method=method,
        options=options,
        event_fn=event_fn,
        gradient=gradient,
        memory=memory,
        segments=segments,
        quadrature=quadrature,
        batch=batch,
        mask=mask,
        solution=solution,
        scaling=scaling,
        adjoint=AdjointSpec(
            adjoint_rtol, adjoint_atol, adjoint_method, adjoint_options, adjoint_params
        ),
    )
    return solve(request).hand_out(solution, quadrature is not None)


def odeint_adjoint(
    func: Velocity,
    y0: Any,
    t: Any,
    *,
    rtol: float | Tensor | Sequence[Any] = 1e-7,
    atol: float | Tensor | Sequence[Any] = 1e-9,
    method: str | None = "dopri5",
    options: Mapping[str, Any] | None = None,
    event_fn: Callable[[Tensor, Any], Tensor] | None = None,
    adjoint_rtol: Any = None,
    adjoint_atol: Any = None,
    adjoint_method: str | None = None,
    adjoint_options: Mapping[str, Any] | None = None,
    adjoint_params: Iterable[Tensor] | None = None,
) -> Any:
    """`odeint` with the gradient of the continuous adjoint, in constant memory.

    Its gradient is exact only as the tolerances go to zero; `odeint(..., gradient="checkpoint")`
    is exact at any tolerance and usually cheaper.
    """
    return odeint(
        func,
        y0,
        t,
        rtol=rtol,
        atol=atol,
        method=method,
        options=options,
        event_fn=event_fn,
        gradient="adjoint",
        adjoint_rtol=adjoint_rtol,
        adjoint_atol=adjoint_atol,
        adjoint_method=adjoint_method,
        adjoint_options=adjoint_options,
        adjoint_params=adjoint_params,
    )
