"""Particles under the feedback of a potential."""

from dataclasses import dataclass
from functools import partial
from typing import TypeGuard

import numpy as np
import torch
from torch import Tensor

from .. import native
from ..errors import ArgumentError, ShapeError
from ..integrate import march, time_nodes
from ..native import rollouts
from ..native.rollouts import Adjoint
from ..nets import AutodiffPotential, Derivatives, Potential
from .interaction import Tally
from .problem import Problem
from .riccati import QuadraticValue
from .value import ValueFunction

Value = Potential | ValueFunction | QuadraticValue | AutodiffPotential

# Wider networks are for the matrix products of PyTorch, by benchmarks/flow_step.py.
KERNEL_WIDTH = {"avx512": 512, "avx2": 64, "baseline": 64}


@dataclass(frozen=True)
class Rollout:
    """Terminal states and what they accumulated; None for what was not integrated."""

    z: Tensor  # (batch, dim)
    running_cost: Tensor | None = None  # int L dt, (batch,)
    log_det: Tensor | None = None  # log |det dz(stop)/dz(start)|, (batch,)
    hjb: Tensor | None = None  # int |d_t Phi + H + tr(sigma sigma^T Hessian Phi) / 2| dt, (batch,)
    bsde: Tensor | None = None  # of dPhi + L dt - grad Phi . sigma dW along the path, (batch,)
    trajectory: Tensor | None = None  # (steps + 1, batch, dim)


def rollout(
    problem: Problem,
    potential: Value,
    x: Tensor,
    *,
    steps: int | Tensor,
    context: Tensor | None = None,
    start: float = 0.0,
    stop: float | None = None,
    integrals: bool = True,
    density: bool = True,
    residual: bool = True,
    trajectory: bool = False,
    increments: Tensor | None = None,
    log_density: Tensor | None = None,
    adjoint: Adjoint | None = None,
    probe: Tensor | None = None,
    trace_dtype: torch.dtype | None = None,
) -> Rollout:
    """Move `x` along dz/dt = f(t, z, u), u = feedback(t, z, grad Phi), by classical RK4; with
    `increments` along dz = f dt + sigma dW, by the Euler-Maruyama method.

    Costs, log-determinant and HJB residual are integrated along the way; they are what makes a
    step expensive, so samplers switch them off. On a CPU a compiled kernel does the work where it
    knows the problem and is faster, with the same results to round-off.

    Args:
        problem: its dynamics, costs and feedback.
        potential: Phi.
        x: states at time `start`, (batch, dim).
        steps: number of equal time steps, or all times, (steps + 1,), in double precision.
        context: passed on to the potential.
        start, stop: times of equal steps; `stop` defaults to the problem's horizon and may lie
            before `start`.
        integrals: integrate running cost, log-determinant and HJB residual.
        density: integrate the log-determinant, too.
        residual: with increments, integrate the HJB residual, for which the Laplacian is needed.
        trajectory: keep the states at all steps.
        increments: of the Brownian motion of a problem with noise, (steps, batch, noise_dim). A
            log-determinant is not to be had then; the BSDE residual is.
        log_density: of the population at `x`, (batch,), for a problem with `interaction`; by
            default that of its start. Running costs then contain the shares of the interaction,
            and the HJB residual its first variation.
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
    if increments is not None:
        return diffuse(
            problem, potential, x, increments, time_nodes(steps, start, stop),
            integrals=integrals, residual=residual, trajectory=trajectory,
        )  # fmt: skip
    plain = partial(
        _march,
        problem,
        steps=steps,
        start=start,
        stop=stop,
        integrals=integrals,
        density=density,
        probe=probe,
    )
    if problem.interaction is not None and integrals:
        if log_density is None:
            log_density = problem.interaction.initial_log_density(x)
        return plain(
            potential, x, context, density=True, trajectory=trajectory, log_density=log_density
        )
    if (
        density
        and isinstance(steps, int)
        and not trajectory
        and kernel_serves(potential, problem, x, context, trace_dtype)
    ):
        path = rollouts.Path(potential, steps, start, stop, integrals, probe, adjoint)
        results = rollouts.rollout(path, x, context, plain)
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
    potential: Value,
    problem: Problem,
    x: Tensor,
    context: Tensor | None = None,
    trace_dtype: torch.dtype | None = None,
) -> TypeGuard[Potential]:
    """Whether the compiled kernel is used: the one place where the engine is chosen."""
    return (
        problem.is_transport
        and trace_dtype is None
        and rollouts.can_serve(potential, x, context)
        and potential.width <= KERNEL_WIDTH[native.instruction_set()]
    )


def _march(
    problem: Problem,
    potential: Value,
    x: Tensor,
    context: Tensor | None,
    *,
    steps: int | Tensor,
    start: float,
    stop: float,
    integrals: bool,
    density: bool,
    probe: Tensor | None,
    trajectory: bool = False,
    log_det_adjoint: Tensor | None = None,
    trace_dtype: torch.dtype | None = None,
    log_density: Tensor | None = None,
) -> Rollout:
    noise = None if problem.noise is None else problem.noise.to(x)
    derivatives = potential.bind(probe, trace_dtype, noise)
    trace = density or noise is not None
    tally = None
    if log_density is not None and problem.interaction is not None:
        lengths = time_nodes(steps, start, stop).diff().tolist()
        tally = Tally(problem.interaction, log_density, lengths)

    def field(t: Tensor, z: Tensor, weight: float | None) -> tuple[Tensor, dict[str, Tensor]]:
        node = weight is not None
        known = None if weight is None or log_det_adjoint is None else weight * log_det_adjoint
        phi = derivatives(
            z, t, context, value=False, dt=node, laplacian=trace and node, laplacian_adjoint=known
        )
        assert phi.grad is not None
        u = problem.feedback(t, z, phi.grad)
        dz = problem.dynamics(t, z, u)
        if not node:
            return dz, {}
        running_cost = problem.running_cost(t, z, u)
        residual = hjb_residual(phi, running_cost, dz, noisy=noise is not None)
        rates = {"running_cost": running_cost, "hjb": residual.abs()}
        if density:
            rates["log_det"] = problem.divergence(t, z, phi, lambda y: field(t, y, None)[0])
        if tally is not None and weight is not None:
            tally.note(z, weight, residual, rates["log_det"])
        return dz, rates

    path = march(
        field,
        x,
        steps=steps,
        start=start,
        stop=stop,
        quadrature=integrals,
        trajectory=trajectory,
    )
    if tally is not None:
        shares, residuals = tally.count()
        path.integrals["running_cost"] = path.integrals["running_cost"] + shares
        path.integrals["hjb"] = residuals
    return Rollout(path.z, **path.integrals, trajectory=path.zs)


def brownian(
    problem: Problem, times: Tensor, batch: int, draws: np.random.Generator
) -> Tensor | None:
    """Increments between `times` of the Brownian motion of a problem, (steps, batch, noise_dim), in
    double precision; None without noise."""
    if problem.noise is None:
        return None
    normal = draws.standard_normal((len(times) - 1, batch, problem.noise.shape[1]))
    return torch.from_numpy(normal) * times.diff().sqrt()[:, None, None]


def hjb_residual(phi: Derivatives, running_cost: Tensor, dz: Tensor, *, noisy: bool) -> Tensor:
    """d_t Phi + L + grad Phi . f of each row, (batch,); with noise plus half the Laplacian of
    `phi`, which is tr(sigma sigma^T Hessian Phi) then."""
    assert phi.dt is not None and phi.grad is not None
    residual = phi.dt + running_cost + (phi.grad * dz).sum(1)
    if not noisy:
        return residual
    assert phi.laplacian is not None
    return residual + 0.5 * phi.laplacian


def diffuse(
    problem: Problem,
    potential: Value,
    x: Tensor,
    increments: Tensor,
    times: Tensor,
    *,
    integrals: bool,
    residual: bool,
    trajectory: bool,
) -> Rollout:
    """`rollout` with noise. Sums take the left end of each step, as Ito's integral does.

    Source: Li, Verma, Ruthotto, Neural network approach for stochastic optimal control, SIAM J.
    Sci. Comput. 2024 (arXiv 2209.13104), section 4.
    """
    if problem.noise is None:
        raise ArgumentError(f"{type(problem).__name__} has no `noise` for the increments")
    noise = problem.noise.to(x)
    want = (len(times) - 1, len(x), noise.shape[1])
    if tuple(increments.shape) != want:
        raise ShapeError(f"`increments` must be {want}, got {tuple(increments.shape)}")
    steps, nodes, lengths = want[0], times.to(x), times.diff().tolist()
    derivatives, wanted = potential.bind(noise=noise), integrals and residual
    z, zs = x, [x]
    sums = {name: x.new_zeros(len(x)) for name in ("running_cost", "bsde", "hjb")}
    if not residual:
        del sums["hjb"]
    last: Tensor | None = None  # Phi - (Phi + dPhi - L dt) as predicted by the step before
    for n in range(steps + 1):
        t = nodes[n]
        phi = derivatives(
            z, t, value=integrals, dt=wanted and n < steps, laplacian=wanted and n < steps
        )
        assert phi.grad is not None
        if last is not None and phi.value is not None:
            sums["bsde"] = sums["bsde"] + (phi.value - last).square()
        if n == steps:
            break
        u, h = problem.feedback(t, z, phi.grad), lengths[n]
        dz, kick = problem.dynamics(t, z, u), increments[n].to(x) @ noise.mT
        if integrals:
            running_cost = problem.running_cost(t, z, u)
            sums["running_cost"] = sums["running_cost"] + h * running_cost
            if residual:
                off = hjb_residual(phi, running_cost, dz, noisy=True).abs()
                sums["hjb"] = sums["hjb"] + abs(h) * off
            assert phi.value is not None
            last = phi.value - h * running_cost + (phi.grad * kick).sum(1)
        z = z + h * dz + kick
        if trajectory:
            zs.append(z)
    path = torch.stack(zs) if trajectory else None
    return Rollout(z, **(sums if integrals else {}), trajectory=path)
