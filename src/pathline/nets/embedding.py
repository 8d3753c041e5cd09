"""Learned summaries of contexts."""

from itertools import pairwise

import torch
from torch import Tensor, nn

from ..errors import ArgumentError


class Embedding(nn.Module):
    """Features of a context by two hidden layers with tanh.

    (batch, context_dim) to (batch, features).

    Args:
        context_dim: number of columns of the context.
        features: number of columns of the result.
        width: neurons of both hidden layers.
        generator: source of the initial weights; torch's global one by default.

    Source: Wang et al., arXiv 2310.16975, whose embedding of shallow-water data this is.
    """

    def __init__(
        self,
        context_dim: int,
        features: int,
        width: int = 128,
        *,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        for name, size in (("context_dim", context_dim), ("features", features), ("width", width)):
            if not isinstance(size, int) or size < 1:
                raise ArgumentError(f"`{name}` must be a positive integer, got {size!r}")
        self.features = features
        sizes = (context_dim, width, width, features)
        self.layers = nn.Sequential()
        for a, b in pairwise(sizes):
            layer = nn.Linear(a, b)
            nn.init.normal_(layer.weight, std=a**-0.5, generator=generator)
            nn.init.zeros_(layer.bias)
            self.layers.append(layer)

    def forward(self, context: Tensor) -> Tensor:
        """Features of standardised contexts."""
        first, second, last = self.layers
        return last(torch.tanh(second(torch.tanh(first(context)))))
