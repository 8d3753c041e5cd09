"""A stand-in for torchdiffeq: `import pathline.compat.torchdiffeq as torchdiffeq`.

Where the two differ by name only, torchdiffeq's meaning holds here: `rk4` is the 3/8 rule, the
next step follows from the last error alone, there is no limit to the number of steps, an option
that a method does not have is a warning, a fixed-step solve may return what is not finite, and a
failure is an `AssertionError` too.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..errors import SolveError
from ..integrate import METHODS, Solution
from ..integrate.adjoint import AdjointSpec
from ..integrate.setup import Request
from ..integrate.solve import solve

__version__ = "0.2.5"  # the release whose calls and results are followed

_request = partial(
    Request,
    methods={"rk4": METHODS["rk4_38"]},
    defaults={"beta": 0.0, "max_num_steps": 2**31 - 1, "limit_per_output": True},
    lenient=True,
)


class SolveAssertion(SolveError, AssertionError):
    """A failed solve, for programs that catch torchdiffeq's assertions."""


def _solve(request: Request) -> Solution:
    try:
        return solve(request).or_raise()
    except SolveError as error:
        raise SolveAssertion(str(error)) from None


def odeint(
    func: Callable[[Tensor, Any], Any],
    y0: Any,
    t: Tensor,
    *,
    rtol: Any = 1e-7,
    atol: Any = 1e-9,
    method: str | None = None,
    options: dict[str, Any] | None = None,
    event_fn: Callable[[Tensor, Any], Tensor] | None = None,
) -> Any:
    """`torchdiffeq.odeint`; see `pathline.odeint`."""
    return _solve(
        _request(
            func,
            y0,
            t,
            rtol=rtol,
            atol=atol,
            method=method,
            options=options,
            event_fn=event_fn,
        )
    ).hand_out(False, False)


def odeint_adjoint(
    func: Callable[[Tensor, Any], Any],
    y0: Any,
    t: Tensor,
    *,
    rtol: Any = 1e-7,
    atol: Any = 1e-9,
    method: str | None = None,
    options: dict[str, Any] | None = None,
    event_fn: Callable[[Tensor, Any], Tensor] | None = None,
    adjoint_rtol: Any = None,
    adjoint_atol: Any = None,
    adjoint_method: str | None = None,
    adjoint_options: dict[str, Any] | None = None,
    adjoint_params: Any = None,
) -> Any:
    """`torchdiffeq.odeint_adjoint`; see `pathline.odeint_adjoint`."""
    return _solve(
        _request(
            func,
            y0,
            t,
            rtol=rtol,
            atol=atol,
            method=method,
            options=options,
            event_fn=event_fn,
            gradient="adjoint",
            adjoint=AdjointSpec(
                adjoint_rtol, adjoint_atol, adjoint_method, adjoint_options, adjoint_params
            ),
        )
    ).hand_out(False, False)


def odeint_event(
    func: Callable[[Tensor, Any], Any],
    y0: Any,
    t0: Tensor,
    *,
    event_fn: Callable[[Tensor, Any], Tensor],
    reverse_time: bool = False,
    odeint_interface: Callable[..., Any] = odeint,
    **kwargs: Any,
) -> tuple[Tensor, Any]:
    """`torchdiffeq.odeint_event`: the event's time and the states at t0 and at the event.

    Both carry the gradient of the event, as they do from `odeint(..., event_fn=...)` here.
    """
    start = t0.reshape(-1)
    end = start.detach() + (-1.0 if reverse_time else 1.0)
    return odeint_interface(func, y0, torch.cat([start, end]), event_fn=event_fn, **kwargs)


def odeint_dense(
    func: Callable[[Tensor, Any], Any],
    y0: Any,
    t0: Any,
    t1: Any,
    *,
    rtol: Any = 1e-7,
    atol: Any = 1e-9,
    method: str | None = None,
    options: dict[str, Any] | None = None,
) -> Callable[[Any], Any]:
    """`torchdiffeq.odeint_dense`: a function of time, between t0 and t1."""
    times = torch.stack([torch.as_tensor(t0), torch.as_tensor(t1)])
    request = _request(
        func,
        y0,
        times,
        rtol=rtol,
        atol=atol,
        method=method,
        options=options,
        solution=True,
    )
    return _solve(request).dense
