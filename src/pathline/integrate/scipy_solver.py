"""The solvers of SciPy, without gradients."""

import warnings
from math import inf
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..errors import ArgumentError, SolveError, SolveWarning, unknown
from .field import Field, real_dtype

COMPLEX = ("RK45", "RK23", "DOP853", "BDF")  # those that integrate complex states
SOLVERS = (*COMPLEX, "Radau", "LSODA")


def solve_scipy(
    field: Field,
    z0: Tensor,
    t: Tensor,
    *,
    rtol: float | Tensor,
    atol: float | Tensor,
    solver: str = "LSODA",
    min_step: float = 0.0,
    max_step: float = inf,
) -> Tensor:
    """Integrate by `scipy.integrate.solve_ivp`: a second opinion, and solvers for stiff problems.

    All samples share the steps. SciPy computes on the CPU and in double precision; the velocity
    is evaluated in the dtype and on the device of `z0`. The result has no gradient.

    Args:
        field: the velocity.
        z0: the state at `t[0]`, real or complex, of any shape.
        t: increasing or decreasing times, (times,).
        rtol, atol: numbers, or tensors that broadcast against `z0`; Radau and BDF know one `rtol`
            only, and take the least.
        solver: "RK45", "RK23", "DOP853", "BDF", "Radau" or "LSODA". RK45 and DOP853 suit smooth
            problems, Radau and BDF stiff ones, and LSODA switches between the two kinds. Stiff
            ones want float64: the last three find Jacobians by small differences.
        min_step: a lower bound of the step, for LSODA only.
        max_step: an upper bound of the step.

    Returns:
        (times, ...) in the dtype and on the device of `z0`.

    Raises:
        ArgumentError: an unknown solver, a complex state or a `min_step` that it does not know.
        SolveError: the solver failed, or a state or velocity is not finite.

    Source: Virtanen et al., SciPy 1.0, Nature Methods 17, 2020.
    """
    if solver not in SOLVERS:
        raise ArgumentError(unknown("solver", solver, SOLVERS))
    if z0.is_complex() and solver not in COMPLEX and len(t) > 1:
        raise ArgumentError(
            f"the solver {solver!r} can't integrate complex states; use one of {', '.join(COMPLEX)}"
        )
    if min_step > 0.0 and solver != "LSODA":
        raise ArgumentError(f"`min_step` is an option of 'LSODA' only, the solver is {solver!r}")
    if torch.is_grad_enabled() and (z0.requires_grad or t.requires_grad):
        warnings.warn(
            "the solvers of SciPy give no gradient; the result is detached",
            SolveWarning,
            stacklevel=2,
        )
    start, shape = z0.detach(), z0.shape
    if len(t) == 1 or z0.numel() == 0:
        return start.expand(len(t), *shape).clone()

    from scipy.integrate import solve_ivp  # takes 0.3 s, too long for `import pathline`

    wide = torch.complex128 if z0.is_complex() else torch.float64
    times = t.detach().cpu().double().numpy()
    reached: float | None = None
    called = False

    def array(z: Tensor) -> Any:
        return z.to("cpu", wide, copy=True).resolve_conj().resolve_neg().reshape(-1).numpy()

    def tolerance(value: float | Tensor, *, single: bool = False) -> Any:
        if not isinstance(value, Tensor):
            return value
        if single or value.numel() == 1:
            return value.min().item()
        return value.detach().cpu().double().expand(shape).reshape(-1).numpy()

    def velocity(time: float, y: Any) -> Any:
        nonlocal called
        z = torch.from_numpy(y.copy()).to(z0.device, z0.dtype).view(shape)
        dz = array(field(torch.tensor(time, dtype=real_dtype(z0), device=z0.device), z))
        # The explicit ones may step back from such a point, but not from the very first.
        if (not called or solver in ("Radau", "BDF")) and not np.isfinite(dz).all():
            raise SolveError(f"{solver} failed at t = {time:.6g}: the velocity is not finite here")
        called = True
        return dz

    def watch(time: float, y: Any) -> float:
        """An event that never happens, to see each accepted step; LSODA fails silently."""
        nonlocal reached
        if not np.isfinite(y).all():
            raise SolveError(f"{solver} failed at t = {time:.6g}: the state is not finite here")
        if time == reached:
            raise SolveError(
                f"{solver} failed at t = {time:.6g}: its step fell below the resolution of time"
            )
        reached = float(time)
        return 1.0

    limits = {"min_step": min_step} if solver == "LSODA" else {}
    with torch.no_grad():
        result = solve_ivp(
            velocity,
            (times[0], times[-1]),
            array(start),
            method=solver,
            t_eval=times[1:],
            events=watch,
            rtol=tolerance(rtol, single=solver in ("Radau", "BDF")),
            atol=tolerance(atol),
            max_step=max_step,
            **limits,
        )
    if not result.success:
        raise SolveError(f"{solver} failed at t = {reached:.6g}: {result.message}")
    zs = torch.from_numpy(result.y.T.copy()).to(z0.device, z0.dtype)
    return torch.cat([start[None], zs.view(-1, *shape)])
