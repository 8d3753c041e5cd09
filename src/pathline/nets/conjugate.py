"""The inverse of the gradient of a convex potential, for every row of a batch at once.

Sources: Wang et al. (arXiv 2310.16975), section 3, where L-BFGS minimises the sum over all rows;
Nocedal, Wright, Numerical Optimization, 2006, section 3.1 (Armijo's rule) and 3.3 (Newton).
"""

import copy
import warnings
from collections.abc import Sequence

import torch
from torch import Tensor

from ..errors import ArgumentError, ShapeError, SolveWarning
from .convex import ConvexPotential, Gates

TILE = 256  # rows of a Hessian at once: their Jacobians stay in the cache


def conjugate(
    potential: ConvexPotential,
    z: Tensor,
    context: Tensor | None = None,
    *,
    tolerance: float = 1e-6,
    max_iter: int = 200,
) -> Tensor:
    """The v where grad_x G(v, y) = z: the minimiser of G(v, y) - z.v, unique by convexity.

    It is the gradient of the convex conjugate of G at z. Newton's method with the exact Hessian
    and Armijo's rule, in double precision; each row has its own step length and leaves the batch
    when it is done, so that no row depends on the others.

    Args:
        potential: the convex potential G; its weights must be as `project` leaves them.
        z: (batch, dim).
        context: (batch, context_dim), or None if the potential has none.
        tolerance: largest |grad_x G(v, y) - z| of any coordinate, in units of z.
        max_iter: trial points; a row of a trained potential needs 5 to 50.

    Returns:
        v (batch, dim) in the dtype of z; it can be differentiated once with respect to z, the
        context and the parameters (by the implicit function theorem).

    Raises:
        ShapeError: `z` or `context` is not shaped as above.
        ArgumentError: `tolerance` or `max_iter` is not positive.

    Warns:
        SolveWarning: rows did not reach the tolerance; they hold the best point found, NaN where
            z or the context is not finite.
    """
    if z.ndim != 2 or z.shape[1] != potential.dim:
        raise ShapeError(f"`z` must be (batch, {potential.dim}), got {tuple(z.shape)}")
    if not tolerance > 0 or not max_iter > 0:
        raise ArgumentError(
            f"`tolerance` and `max_iter` must be positive, got {tolerance} and {max_iter}"
        )
    v, residual = _newton(potential, z, context, tolerance, max_iter)
    missed = ~(residual <= tolerance)
    if missed.any():
        worst = residual[missed].nan_to_num(torch.inf).max().item()
        warnings.warn(
            f"{int(missed.sum())} of {len(z)} rows were not inverted to {tolerance:g} within "
            f"{max_iter} steps; the largest residual is {worst:.2g}. Is the potential convex "
            "(`project` after each optimizer step), and are its inputs finite?",
            SolveWarning,
            stacklevel=2,
        )
    v = v.to(z.dtype)
    inputs = (z, context, *potential.parameters())
    if torch.is_grad_enabled() and any(a is not None and a.requires_grad for a in inputs):
        return _differentiable(potential, v, z, context)
    return v


@torch.no_grad()
def _newton(
    potential: ConvexPotential, z: Tensor, context: Tensor | None, tolerance: float, max_iter: int
) -> tuple[Tensor, Tensor]:
    """The last points (batch, dim), and the largest entry of each one's residual (batch,)."""
    if potential.g.dtype != torch.float64:
        potential = copy.deepcopy(potential).double()
    z = z.double()
    gates = potential.condition(None if context is None else context.double(), len(z))
    last, remaining = torch.full_like(z, torch.nan), z.new_full((len(z),), torch.inf)

    rows = torch.arange(len(z), device=z.device)  # those that are not done; all below is theirs
    v, trial, step = z, z, torch.zeros_like(z)
    value = z.new_full((len(z),), torch.inf)  # F(v) = G(v, y) - z.v
    length, descent = torch.ones_like(value), torch.zeros_like(value)  # -F'(v) along the step
    for _ in range(max_iter):
        at = potential.evaluate(trial, gates, hessian=False)
        new, residual = at.value - (trial * z).sum(1), z - at.grad
        slack = 1e-13 * (1 + new.abs())  # the round-off of F: at this height any step will do
        accept = new < value - 1e-4 * length * descent + slack
        v, value = torch.where(accept[:, None], trial, v), torch.where(accept, new, value)
        # F' increases along the step; a rejected one is cut where the secant of F' is zero
        cut = descent / (descent - (residual * step).sum(1))
        length = torch.where(accept, 1.0, cut.nan_to_num(0.0).clamp(0.1, 0.5) * length)
        largest = residual.abs().amax(dim=1)
        last[rows[accept]], remaining[rows[accept]] = v[accept], largest[accept]

        going = value.isfinite() & (length > 1e-8) & ~(accept & (largest <= tolerance))
        if not going.any():
            break
        if not going.all():
            state = (rows, z, v, value, step, length, descent, residual, accept)
            rows, z, v, value, step, length, descent, residual, accept = (a[going] for a in state)
            gates = _rows(gates, going)
        accepted = accept.nonzero()[:, 0]
        for tile in accepted.split(TILE) if len(accepted) else ():
            hessian = potential.evaluate(v[tile], _rows(gates, tile)).hessian
            factor, failed = torch.linalg.cholesky_ex(hessian)
            newton = torch.cholesky_solve(residual[tile, :, None], factor)[:, :, 0]
            step[tile] = newton.masked_fill(failed[:, None] > 0, torch.nan)  # gives the row up
            descent[tile] = (residual[tile] * newton).sum(1)
        trial = v + length[:, None] * step
    return last, remaining


def _rows(gates: Sequence[Gates], rows: Tensor) -> list[Gates]:
    return [Gates(*(gate[rows] for gate in layer)) for layer in gates]


def _differentiable(
    potential: ConvexPotential, v: Tensor, z: Tensor, context: Tensor | None
) -> Tensor:
    """`v` with its derivatives: those of a Newton step v - H^-1 (grad_x G(v, y) - z) from it."""
    dtype = potential.g.dtype
    point, context = v.to(dtype), None if context is None else context.to(dtype)
    with torch.no_grad():
        hessian = potential.derivatives(point, context).hessian
    assert hessian is not None
    residual = z.to(dtype) - potential.derivatives(point, context, hessian=False).grad
    step = torch.linalg.solve(hessian, residual - residual.detach())  # zero, but for the slope
    return v + step.to(v.dtype)
