"""Velocities dz/dt = v(t, z), products with their Jacobians, and estimates of their traces."""

from collections.abc import Callable
from itertools import pairwise

import torch
from torch import Tensor, nn

from ..calculus import gradient
from ..errors import ArgumentError
from .potential import Potential


class ConcatSquash(nn.Module):
    """h = (W z + b) sigmoid(C s + c) + U s, for s = (t, context)."""

    def __init__(self, inputs: int, outputs: int, conditions: int) -> None:
        super().__init__()
        self.linear = nn.Linear(inputs, outputs)
        self.gate = nn.Linear(conditions, outputs)
        self.shift = nn.Linear(conditions, outputs, bias=False)

    def forward(self, s: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
        """h, (batch, outputs), and the gate, which is the slope of h in W z."""
        gate = torch.sigmoid(self.gate(s))
        return self.linear(z) * gate + self.shift(s), gate


class FreeVelocity(nn.Module):
    """v(t, z), the network of FFJORD: concatsquash layers with tanh between them.

    Args:
        dim: number of columns of z.
        width: neurons of each hidden layer.
        depth: hidden layers.
        context_dim: number of columns of the context, which the layers see as they see t.
        generator: source of the initial weights; torch's global one by default.

    Source: Grathwohl et al., FFJORD, ICLR 2019 (arXiv 1810.01367), and the authors' code.
    """

    def __init__(
        self,
        dim: int,
        width: int = 64,
        depth: int = 3,
        context_dim: int = 0,
        *,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        for name, size in (("dim", dim), ("width", width), ("depth", depth)):
            if not isinstance(size, int) or size < 1:
                raise ArgumentError(f"`{name}` must be a positive integer, got {size!r}")
        self.dim, self.width, self.depth = dim, width, depth
        sizes = [dim, *[width] * depth, dim]
        self.layers = nn.ModuleList(
            ConcatSquash(inputs, outputs, 1 + context_dim) for inputs, outputs in pairwise(sizes)
        )
        self.reset_parameters(generator)

    @torch.no_grad()
    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """As in `nn.Linear`, and the last layer a tenth of it, so that points hardly move."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                bound = module.in_features**-0.5
                for parameter in module.parameters():
                    parameter.uniform_(-bound, bound, generator=generator)
        last = self._layers()[-1]
        for parameter in (*last.linear.parameters(), *last.shift.parameters()):
            parameter.mul_(0.1)

    def forward(self, t: Tensor, z: Tensor, context: Tensor | None = None) -> Tensor:
        """dz/dt at `t`, () or (batch,), and `z` (batch, dim)."""
        s = self._conditions(t, context)
        for i, layer in enumerate(self._layers()):
            z = torch.tanh(layer(s, z)[0]) if i < self.depth else layer(s, z)[0]
        return z

    def products(
        self, t: Tensor, z: Tensor, vectors: Tensor | None, context: Tensor | None = None
    ) -> Tensor:
        """J e for each e of `vectors` (k, batch, dim), J = dv/dz, forward through the layers.

        Without vectors those of the standard basis, that is all columns of J, and k = dim.
        """
        s = self._conditions(t, context)
        tangents = vectors
        for i, layer in enumerate(self._layers()):
            z, gate = layer(s, z)
            W = layer.linear.weight
            # The first layer's columns are the same for all rows but for the gate.
            tangents = (W.mT[:, None] if tangents is None else tangents @ W.mT) * gate
            if i < self.depth:
                z = torch.tanh(z)
                tangents = tangents * (1 - z * z)
        assert tangents is not None
        return tangents

    def _conditions(self, t: Tensor, context: Tensor | None) -> Tensor:
        """s = (t, context), (batch, 1 + context_dim) or (1, 1)."""
        t = t.reshape(-1, 1)
        if context is None:
            return t
        return torch.cat([t.expand(context.shape[0], 1), context], 1)

    def inner_weights(self) -> list[Tensor]:
        """The hidden-to-hidden matrices."""
        return [layer.linear.weight for layer in self._layers()[1:-1]]

    def _layers(self) -> list[ConcatSquash]:
        return list(self.layers)  # type: ignore[arg-type]


class GradientVelocity(nn.Module):
    """v(t, z) = -grad Phi(z, t) of a potential.

    Args:
        potential: Phi.
        static: let Phi not depend on time, as in Monge-Ampere flows.
    """

    def __init__(self, potential: Potential, *, static: bool = False) -> None:
        super().__init__()
        self.potential, self.static = potential, static

    def forward(self, t: Tensor, z: Tensor, context: Tensor | None = None) -> Tensor:
        """dz/dt at `t`, () or (batch,), and `z` (batch, dim)."""
        grad = self.potential.derivatives(
            z, self.clock(t), context, value=False, dt=False, laplacian=False
        ).grad
        assert grad is not None
        return -grad

    def clock(self, t: Tensor) -> Tensor:
        """The time that Phi sees."""
        return torch.zeros_like(t) if self.static else t

    def inner_weights(self) -> list[Tensor]:
        """The hidden-to-hidden matrices."""
        return self.potential.inner_weights()


def products(
    velocity: nn.Module,
    t: Tensor,
    z: Tensor,
    vectors: Tensor | None,
    context: Tensor | None = None,
) -> Tensor:
    """Products of the Jacobian J = dv/dz at each row of `z` with vectors, (k, batch, dim).

    By the velocity's own `products` where it has them: J e. Otherwise by automatic
    differentiation: J^T e. Traces and Frobenius norms are the same for both.

    Args:
        velocity: `(t, z, context) -> (batch, dim)`, without context where that is None.
        t: (), or (batch,).
        z: (batch, dim).
        vectors: (k, batch, dim); those of the standard basis if None.
    """
    if isinstance(velocity, FreeVelocity):
        return velocity.products(t, z, vectors, context)
    with torch.enable_grad():
        z = z if z.requires_grad else z.detach().requires_grad_(True)
        v = velocity(t, z) if context is None else velocity(t, z, context)
        if vectors is None:
            rows = [gradient(column, z) for column in v.unbind(1)]
        else:
            rows = [gradient((v * e).sum(1), z) for e in vectors]
        return torch.stack(rows)


def hutchinson(products: Tensor, probes: Tensor) -> Tensor:
    """Unbiased traces (batch,) from products J e with k probes e, both (k, batch, dim), with
    E[e e^T] = I.

    Source: Hutchinson, Communications in Statistics 19, 1990.
    """
    return (products * probes).sum(2).mean(0)


def hutch_plus_plus(apply: Callable[[Tensor], Tensor], sketch: Tensor, probes: Tensor) -> Tensor:
    """Unbiased traces (batch,), exact on the range of J `sketch`, and by probes on what is left.

    Args:
        apply: vectors (k, batch, dim) to products with J.
        sketch, probes: independent random signs, (k, batch, dim), k <= dim.

    Source: Meyer, Musco, Musco, Woodruff, Hutch++, SOSA 2021 (arXiv 2010.09649), algorithm 1.
    """
    with torch.no_grad():  # any basis gives an unbiased trace, so it needs no gradient
        basis = torch.linalg.qr(apply(sketch).permute(1, 2, 0)).Q.permute(2, 0, 1)
    overlap = torch.einsum("kbd,lbd->bkl", basis, probes)
    rest = probes - torch.einsum("kbd,bkl->lbd", basis, overlap)
    return (apply(basis) * basis).sum((0, 2)) + hutchinson(apply(rest), rest)
