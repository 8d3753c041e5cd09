"""Any scalar network as a potential."""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from ..calculus import divergence, gradient
from ..errors import ShapeError
from .potential import Derivatives


class AutodiffPotential(nn.Module):
    """Wraps a `network(x, t, context) -> (batch,)` whose derivatives come from autograd.

    It offers what `Potential` does, for any network that is twice differentiable, at the price
    of dim extra backward passes for the Laplacian.
    """

    def __init__(self, network: nn.Module, dim: int) -> None:
        super().__init__()
        self.network, self.dim = network, dim

    def forward(self, x: Tensor, t: Tensor, context: Tensor | None = None) -> Tensor:
        """The network's value, (batch,)."""
        value = self.network(x, t, context)
        if value.shape != x.shape[:1]:
            raise ShapeError(
                f"`network(x, t, context)` must return ({x.shape[0]},), got {tuple(value.shape)}"
            )
        return value

    def bind(
        self,
        probe: Tensor | None = None,
        trace_dtype: torch.dtype | None = None,
        noise: Tensor | None = None,
    ) -> Callable[..., Derivatives]:
        """`derivatives` with this probe and noise, in the network's own precision."""
        return partial(self.derivatives, probe=probe, noise=noise)

    def derivatives(
        self,
        x: Tensor,
        t: Tensor,
        context: Tensor | None = None,
        *,
        value: bool = True,
        grad: bool = True,
        dt: bool = True,
        laplacian: bool = True,
        laplacian_adjoint: Tensor | None = None,
        probe: Tensor | None = None,
        noise: Tensor | None = None,
    ) -> Derivatives:
        """As `Potential.derivatives`, by automatic differentiation.

        With a probe e the Laplacian is e.(H e), H the Hessian; with noise sigma, (dim, columns),
        it is tr(sigma sigma^T H), and a probe is (batch, columns). `laplacian_adjoint` saves
        nothing here and is not used.
        """
        keep = torch.is_grad_enabled()
        with torch.enable_grad():
            x = x if x.requires_grad else x.detach().requires_grad_(True)
            times = t.expand(x.shape[0])
            times = times if times.requires_grad else times.detach().requires_grad_(True)
            phi = self(x, times, context)

            def slope(y: Tensor) -> Tensor:
                return gradient(self(y, times, context), y)

            def trace() -> Tensor:
                if probe is not None:
                    e = probe if noise is None else probe @ noise.mT
                    return (gradient((slope(x) * e).sum(1), x) * e).sum(1)
                if noise is None:
                    return divergence(slope, x)
                products = [
                    (gradient((slope(x) * column).sum(1), x) * column).sum(1) for column in noise.mT
                ]
                return torch.stack(products).sum(0)

            result = Derivatives(
                value=phi if value else None,
                grad=gradient(phi, x) if grad else None,
                dt=gradient(phi, times) if dt else None,
                laplacian=trace() if laplacian else None,
            )
        if keep:
            return result
        return Derivatives(**{k: v if v is None else v.detach() for k, v in vars(result).items()})
