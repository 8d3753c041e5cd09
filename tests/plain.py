"""The potential once more, in plain torch and without any of the library's arithmetic."""

import torch
from torch import Tensor, nn
from torch.func import grad, hessian, vmap

from pathline.nets import Potential


def sig(a: Tensor) -> Tensor:
    return torch.log(torch.exp(a) + torch.exp(-a))


class PlainPotential(nn.Module):
    """Phi(s) = w.N(s) + 1/2 s.(A^T A) s + b.s + c by its definition, on a Potential's parameters.

    Overflows for large inputs, and can be differentiated any number of times.
    """

    def __init__(self, potential: Potential) -> None:
        super().__init__()
        self.potential = potential

    def at(self, s: Tensor) -> Tensor:
        """Phi at one point s = (x, t, context)."""
        p = self.potential
        first, *rest = p.layers
        u = sig(first.weight @ s + first.bias)
        for layer in rest:
            u = u + sig(layer.weight @ u + layer.bias) / len(rest)
        return p.w @ u + 0.5 * s @ (p.A.T @ p.A) @ s + p.b @ s + p.c

    def forward(self, x: Tensor, t: Tensor, context: Tensor | None = None) -> Tensor:
        return vmap(self.at)(stack(x, t, context))

    def derivatives(
        self, x: Tensor, t: Tensor, context: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Value, gradient, time derivative and Laplacian, from full gradients and Hessians."""
        s, d = stack(x, t, context), x.shape[1]
        g = vmap(grad(self.at))(s)
        H = vmap(hessian(self.at))(s)
        trace = H[:, :d, :d].diagonal(dim1=1, dim2=2).sum(1)
        return self(x, t, context), g[:, :d], g[:, d], trace


def stack(x: Tensor, t: Tensor, context: Tensor | None) -> Tensor:
    columns = [x, t.expand(len(x))[:, None]]
    return torch.cat(columns if context is None else [*columns, context], dim=1)


def random_potential(
    dim: int, width: int, depth: int = 2, *, scale: float = 1.0, seed: int = 0, **kwargs: int
) -> Potential:
    """A double-precision potential whose every parameter is random; derivatives are of `scale`."""
    potential = Potential(dim, width, depth, **kwargs).double()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in potential.parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            fan = parameter.shape[1] if parameter.ndim == 2 else 1
            parameter.copy_(noise / fan**0.5)
        potential.w.mul_(scale / width**0.5)
        potential.A.mul_(scale**0.5)
        potential.b.mul_(scale)
    return potential
