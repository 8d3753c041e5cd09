"""The block-triangular form: a joint density from a marginal and a conditional one."""

from typing import Any

import torch
from torch import Tensor, nn

from ..errors import ArgumentError
from .map import TransportMap


class JointMap(nn.Module):
    """The joint density p(x, y) = p(y) p(x | y) of x and its context y.

    The map (x, y) -> (T(x; y), S(y)) carries it to N(0, I). Its Jacobian is block-triangular, so
    the log-densities of the two maps add up, and so do their losses: each is trained by itself,
    the conditional map with `fit` on pairs (x, y), the marginal one on y alone.

    Args:
        marginal: the density of contexts y, without a context of its own.
        conditional: the density of x given y.

    Raises:
        ArgumentError: the maps do not fit together.

    Source: Wang, Baptista, Marzouk, Ruthotto, Verma (arXiv 2310.16975), section 2.

    Example:
        >>> from pathline.flows import OTFlow, PCPMap
        >>> joint = JointMap(OTFlow(3), PCPMap(2, 3))
        >>> x, context = joint.sample(5, seed=0)
        >>> x.shape, context.shape
        (torch.Size([5, 2]), torch.Size([5, 3]))
    """

    def __init__(self, marginal: TransportMap, conditional: TransportMap) -> None:
        super().__init__()
        if marginal.context_dim or marginal.dim != conditional.context_dim:
            raise ArgumentError(
                "`marginal` must be a density of the context of `conditional`, of `dim` "
                f"{conditional.context_dim} without a context, got `dim` {marginal.dim} and "
                f"`context_dim` {marginal.context_dim}"
            )
        self.marginal, self.conditional = marginal, conditional

    @property
    def dim(self) -> int:
        """Columns of x."""
        return self.conditional.dim

    @property
    def context_dim(self) -> int:
        """Columns of the context."""
        return self.conditional.context_dim

    def log_prob(self, x: Tensor, context: Tensor) -> Tensor:
        """Joint log-density in nats of the rows of `x` (batch, dim) and `context` (batch,
        context_dim), as (batch,)."""
        return self.conditional.log_prob(x, context) + self.marginal.log_prob(context)

    def sample(self, n: int = 1, *, seed: int | None = None) -> tuple[Tensor, Tensor]:
        """Pairs x (n, dim) and context (n, context_dim); the same `seed` gives the same pairs."""
        generator = None
        if seed is not None:  # one stream for both: the same seed would make them depend
            generator = torch.Generator().manual_seed(seed)
        size = self.dim + self.context_dim
        z = torch.randn(n, size, generator=generator, dtype=torch.float64)
        first, second = z.split([self.dim, self.context_dim], 1)
        with torch.no_grad():
            return self.from_reference(self.conditional.cast(first), self.marginal.cast(second))

    def to_reference(self, x: Tensor, context: Tensor) -> tuple[Tensor, Tensor]:
        """Where pairs are carried: (batch, dim) and (batch, context_dim)."""
        return self.conditional.to_reference(x, context), self.marginal.to_reference(context)

    def from_reference(self, z: Tensor, z_context: Tensor) -> tuple[Tensor, Tensor]:
        """The pairs that are carried to the rows of `z` (batch, dim) and `z_context` (batch,
        context_dim)."""
        context = self.marginal.from_reference(z_context)
        return self.conditional.from_reference(z, context), context

    def config(self) -> dict[str, Any]:
        """Kinds and arguments of the two maps, JSON-safe."""
        parts = {"marginal": self.marginal, "conditional": self.conditional}
        return {
            name: {"kind": type(part).__name__, "config": part.config()}
            for name, part in parts.items()
        }
