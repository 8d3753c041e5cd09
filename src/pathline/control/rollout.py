"""Particles under the feedback of a potential."""

from dataclasses import dataclass

from torch import Tensor

from ..integrate import march
from ..nets import AutodiffPotential, Potential
from .problem import Problem


@dataclass(frozen=True)
class Rollout:
    """Terminal states and what they accumulated; None for what was not integrated."""

    z: Tensor  # (batch, dim)
    running_cost: Tensor | None  # int L dt, (batch,)
    log_det: Tensor | None  # log |det dz(stop)/dz(start)|, (batch,)
    hjb: Tensor | None  # int |d_t Phi + H(t, z, grad Phi)| dt, (batch,)
    trajectory: Tensor | None  # (steps + 1, batch, dim)


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
) -> Rollout:
    """Move `x` along dz/dt = f(t, z, u), u = feedback(t, z, grad Phi), by classical RK4.

    Costs, log-determinant and HJB residual are integrated along the way; they are what makes a
    step expensive, so samplers switch them off.

    Args:
        problem: its dynamics, costs and feedback.
        potential: Phi.
        x: states at time `start`, (batch, dim).
        steps: number of equal time steps.
        context: passed on to the potential.
        start, stop: times; `stop` defaults to the problem's horizon and may lie before `start`.
        integrals: integrate running cost, log-determinant and HJB residual.
        trajectory: keep the states at all steps.
    """

    derivatives = potential.bind()

    def field(t: Tensor, z: Tensor, node: bool) -> tuple[Tensor, dict[str, Tensor]]:
        phi = derivatives(z, t, context, value=False, dt=node, laplacian=node)
        assert phi.grad is not None
        u = problem.feedback(t, z, phi.grad)
        dz = problem.dynamics(t, z, u)
        if not node:
            return dz, {}
        assert phi.dt is not None
        running_cost = problem.running_cost(t, z, u)
        return dz, {
            "running_cost": running_cost,
            "log_det": problem.divergence(t, z, phi, lambda y: field(t, y, False)[0]),
            "hjb": (phi.dt + running_cost + (phi.grad * dz).sum(1)).abs(),
        }

    stop = problem.horizon if stop is None else stop
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
