"""Particles under the feedback of a potential."""

from dataclasses import dataclass
from functools import partial
from typing import TypeGuard

import torch
from torch import Tensor

from .. import native
from ..integrate import march
from ..native import Adjoint
from ..nets import AutodiffPotential, Potential
from .problem import Problem

# Wider networks are for the matrix products of PyTorch, by benchmarks/flow_step.py.
KERNEL_WIDTH = {"avx512": 512, "avx2": 64, "baseline": 64}


@dataclass(frozen=True)
class Rollout:
    """Terminal states and what they accumulated; None for what was not integrated."""

    z: Tensor  # (batch, dim)
    running_cost: Tensor | None = None  # int L dt, (batch,)
    log_det: Tensor | None = None  # log |det dz(stop)/dz(start)|, (batch,)
    hjb: Tensor | None = None  # int |d_t Phi + H(t, z, grad Phi)| dt, (batch,)
    trajectory: Tensor | None = None  # (steps + 1, batch, dim)


def rollout(
    problem: Problem,
    potential: Potential | AutodiffPotential,
    x: Tensor,
    *,
    steps: int,
    context: Tensor | None = None,
    start: float = 0.0,
    stop: float | None = None,
    integrals: bool = True,
    trajectory: bool = False,
    adjoint: Adjoint | None = None,
    probe: Tensor | None = None,
    trace_dtype: torch.dtype | None = None,
) -> Rollout:
    """Move `x` along dz/dt = f(t, z, u), u = feedback(t, z, grad Phi), by classical RK4.

    Costs, log-determinant and HJB residual are integrated along the way; they are what makes a
    step expensive, so samplers switch them off. On a CPU a compiled kernel does the work where it
    knows the problem and is faster, with the same results to round-off.

    Args:
        problem: its dynamics, costs and feedback.
        potential: Phi.
        x: states at time `start`, (batch, dim).
        steps: number of equal time steps.
        context: passed on to the potential.
        start, stop: times; `stop` defaults to the problem's horizon and may lie before `start`.
        integrals: integrate running cost, log-determinant and HJB residual.
        trajectory: keep the states at all steps.
        adjoint: the gradient that the loss will have with respect to the results, where it is
            known up to a factor. The backward pass is cheaper then, raises an `ArgumentError` if
            the gradient is another one, and can't be differentiated.
        probe: random signs, (batch, dim), for an unbiased log-determinant where the problem takes
            it from the Laplacian; the same signs at all times.
        trace_dtype: precision of the products of the Laplacian's traces; see `Potential.bind`.

    Raises:
        ShapeError: a tensor is not shaped as above.
        ArgumentError: `steps` is less than one; in the backward pass, the gradient is not
            `adjoint`.
    """
    stop = problem.horizon if stop is None else stop
    plain = partial(
        _march, problem, steps=steps, start=start, stop=stop, integrals=integrals, probe=probe
    )
    if not trajectory and kernel_serves(potential, problem, x, context, trace_dtype):
        path = native.Path(potential, steps, start, stop, integrals, probe, adjoint)
        results = native.rollout(path, x, context, plain)
        return Rollout(*results)
    log_det_adjoint = None if adjoint is None else adjoint.log_det
    return plain(
        potential,
        x,
        context,
        trajectory=trajectory,
        log_det_adjoint=log_det_adjoint,
        trace_dtype=trace_dtype,
    )


def kernel_serves(
    potential: Potential | AutodiffPotential,
    problem: Problem,
    x: Tensor,
    context: Tensor | None = None,
    trace_dtype: torch.dtype | None = None,
) -> TypeGuard[Potential]:
    """Whether the compiled kernel is used: the one place where the engine is chosen."""
    return (
        problem.is_transport
        and trace_dtype is None
        and native.can_serve(potential, x, context)
        and potential.width <= KERNEL_WIDTH[native.instruction_set()]
    )


def _march(
    problem: Problem,
    potential: Potential | AutodiffPotential,
    x: Tensor,
    context: Tensor | None,
    *,
    steps: int,
    start: float,
    stop: float,
    integrals: bool,
    probe: Tensor | None,
    trajectory: bool = False,
    log_det_adjoint: Tensor | None = None,
    trace_dtype: torch.dtype | None = None,
) -> Rollout:
    derivatives = potential.bind(probe, trace_dtype)

    def field(t: Tensor, z: Tensor, weight: float | None) -> tuple[Tensor, dict[str, Tensor]]:
        node = weight is not None
        known = None if weight is None or log_det_adjoint is None else weight * log_det_adjoint
        phi = derivatives(
            z, t, context, value=False, dt=node, laplacian=node, laplacian_adjoint=known
        )
        assert phi.grad is not None
        u = problem.feedback(t, z, phi.grad)
        dz = problem.dynamics(t, z, u)
        if not node:
            return dz, {}
        assert phi.dt is not None
        running_cost = problem.running_cost(t, z, u)
        return dz, {
            "running_cost": running_cost,
            "log_det": problem.divergence(t, z, phi, lambda y: field(t, y, None)[0]),
            "hjb": (phi.dt + running_cost + (phi.grad * dz).sum(1)).abs(),
        }

    path = march(
        field,
        x,
        steps=steps,
        start=start,
        stop=stop,
        quadrature=integrals,
        trajectory=trajectory,
    )
    got = path.integrals
    return Rollout(path.z, got.get("running_cost"), got.get("log_det"), got.get("hjb"), path.zs)
