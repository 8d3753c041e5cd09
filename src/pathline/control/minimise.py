"""The control that minimises a Hamiltonian, where no formula is known."""

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..calculus import gradient

if TYPE_CHECKING:
    from .problem import Problem

MOST = 50  # iterations
HALVINGS = 20
Cost = Callable[[Tensor, Tensor, Tensor], Tensor]  # of u, z and p
SUFFICIENT = 1e-4  # of the decrease that the gradient promises (Armijo)


def minimise_controls(problem: "Problem", t: Tensor, z: Tensor, p: Tensor) -> Tensor:
    """The u that minimises L(t, z, u) + p.f(t, z, u) within `problem.control_bounds`,
    (batch, control_dim), for all rows at once.

    A projected Newton method: coordinates at a bound that the gradient pushes on rest there, and
    the others take a Newton step (with a shift where the Hessian is not positive), shortened until
    the cost falls. The minimum is global where L + p.f is convex in u. One more Newton step, with
    its gradients, gives the derivative of u with respect to z, p and the problem's parameters by
    the implicit function theorem (first derivatives only).

    Source: Bertsekas, Projected Newton methods for optimization problems with simple constraints,
    SIAM J. Control Optim. 20, 1982.
    """
    limits = problem.limits(z)

    def clip(u: Tensor) -> Tensor:
        return u if limits is None else torch.minimum(torch.maximum(u, limits[0]), limits[1])

    def cost(u: Tensor, z: Tensor, p: Tensor) -> Tensor:
        return problem.running_cost(t, z, u) + (p * problem.dynamics(t, z, u)).sum(1)

    still_z, still_p = z.detach(), p.detach()
    u = clip(z.new_zeros(len(z), problem.control_dim))
    tolerance = torch.finfo(z.dtype).eps ** 0.75
    for _ in range(MOST):
        value, slope, hessian = _expand(cost, u, still_z, still_p)
        free = _free(u, slope, limits)
        step = _newton(u, slope, hessian, free)
        if bool((step.abs() <= tolerance * (1 + u.abs())).all()):
            break
        last, u = u, _search(lambda u: cost(u, still_z, still_p), clip, u, value, slope, step)
        if torch.equal(last, u):
            break
    if not torch.is_grad_enabled() or not cost(u, z, p).requires_grad:
        return u
    _, _, hessian = _expand(cost, u, still_z, still_p)
    variable = u.detach().requires_grad_(True)
    slope = gradient(cost(variable, z, p), variable)
    free = _free(u, slope.detach(), limits)
    return u + _newton(u, slope, hessian, free)


def _expand(cost: Cost, u: Tensor, z: Tensor, p: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Value (batch,), gradient (batch, k) and Hessian (batch, k, k) in u."""
    with torch.enable_grad():
        u = u.detach().requires_grad_(True)
        value = cost(u, z, p)
        slope = gradient(value, u)
        rows = [
            gradient(slope[:, i], u) if slope.requires_grad else torch.zeros_like(u)
            for i in range(u.shape[1])
        ]
    return value.detach(), slope.detach(), torch.stack(rows, 1).detach()


def _free(u: Tensor, slope: Tensor, limits: tuple[Tensor, Tensor] | None) -> Tensor:
    """Which coordinates do not rest at a bound."""
    if limits is None:
        return torch.ones_like(u, dtype=torch.bool)
    lower, upper = limits
    return ~(((u <= lower) & (slope > 0)) | ((u >= upper) & (slope < 0)))


def _newton(u: Tensor, slope: Tensor, hessian: Tensor, free: Tensor) -> Tensor:
    """The Newton step of the free coordinates, (batch, k); along -slope where the curvature is
    not positive."""
    slope = torch.where(free, slope, 0)
    both = free[:, :, None] & free[:, None, :]
    eye = torch.eye(slope.shape[1], dtype=slope.dtype, device=slope.device)
    H = torch.where(both, hessian, 0) + torch.where(free, 0, 1)[:, :, None] * eye
    low = torch.linalg.eigvalsh(H)[:, :1, None]
    scale = H.abs().amax((1, 2), keepdim=True)
    # A linear or concave cost has no Newton step: then one about as long as 1 + |u| is tried.
    steep = slope.detach().norm(dim=1)[:, None, None]
    wanted = torch.maximum(steep / (1 + u.norm(dim=1)[:, None, None]), 1e-6 * scale)
    shift = torch.where(low > 1e-8 * scale, 0, torch.where(steep > 0, wanted, 1) - low)
    return -torch.linalg.solve(H + shift * eye, slope)


def _search(
    cost: Callable[[Tensor], Tensor],
    clip: Callable[[Tensor], Tensor],
    u: Tensor,
    value: Tensor,
    slope: Tensor,
    step: Tensor,
) -> Tensor:
    """The longest of the halved projected steps that lower the cost, or are tiny, for each row."""
    found, length = u, torch.ones_like(value)
    # Near the minimum the decrease is less than the round-off of the cost.
    eps = torch.finfo(value.dtype).eps
    slack, tiny = 8 * eps * value.abs(), (step.abs() <= eps**0.5 * (1 + u.abs())).all(1)
    open_rows = torch.ones_like(value, dtype=torch.bool)
    with torch.no_grad():
        for _ in range(HALVINGS):
            trial = clip(u + length[:, None] * step)
            promised = ((trial - u) * slope).sum(1)
            fell = cost(trial) <= value + SUFFICIENT * promised + slack
            good = open_rows & (fell | tiny)
            found = torch.where(good[:, None], trial, found)
            open_rows = open_rows & ~good
            if not bool(open_rows.any()):
                break
            length = torch.where(open_rows, length / 2, length)
    return found
