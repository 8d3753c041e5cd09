"""Derivatives by automatic differentiation: slow, general, and the oracle of the closed forms."""

from collections.abc import Callable

import torch
from torch import Tensor


def gradient(values: Tensor, x: Tensor) -> Tensor:
    """Gradient of the per-sample `values` (batch,) with respect to `x`, in the shape of `x`.

    Differentiable once more; zero where `values` does not depend on `x`.
    """
    if not values.requires_grad:
        return torch.zeros_like(x)
    (grad,) = torch.autograd.grad(
        values.sum(), x, create_graph=True, allow_unused=True, materialize_grads=True
    )
    return grad


def divergence(velocity: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """Trace of the Jacobian of `velocity` at each row of `x` (batch, dim), as (batch,).

    Exact, by one vector-Jacobian product for each of the dim columns.
    """
    with torch.enable_grad():
        x = x if x.requires_grad else x.detach().requires_grad_(True)
        v = velocity(x)
        columns = [gradient(v[:, k], x)[:, k] for k in range(x.shape[1])]
        return torch.stack(columns).sum(0)


def jacobian(mapping: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """Jacobian of a row-wise `mapping` at each row of `x` (batch, dim), as (batch, out, dim)."""
    with torch.enable_grad():
        x = x if x.requires_grad else x.detach().requires_grad_(True)
        y = mapping(x)
        return torch.stack([gradient(y[:, k], x) for k in range(y.shape[1])], dim=1)
