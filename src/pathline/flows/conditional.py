"""COT-Flow: OT-Flow with a context, for posteriors and other conditional densities."""

from typing import Any

from torch import nn

from ..errors import ArgumentError
from .otflow import OTFlow


class ConditionalOTFlow(OTFlow):
    """COT-Flow, an exact conditional density: dz/dt = -grad_z Phi(z, t, y) carries x given y to
    N(0, I), and the context y stays as it is.

    It is an `OTFlow` with a context, which `fit` trains on pairs (x, context). Both are in the
    user's units: the flow standardises contexts, and works on what the linear regression of x on
    them leaves. For jointly Gaussian data that is the conditional optimal-transport map already.

    Args:
        dim: number of columns of x, such as the parameters of a simulator.
        context_dim: number of columns of the context, such as simulated data.
        width, depth: of the potential; by default 32, and 3 for up to three columns, else 2. With
            many simulations of a sharp posterior wider ones are better.
        embedding: number of features that a `nets.Embedding` learns from the context; or a module
            of your own, (batch, context_dim) -> (batch, features), of standardised contexts.
        options: those of `OTFlow`.

    Raises:
        ArgumentError: an argument is out of range.

    Source: Wang, Baptista, Marzouk, Ruthotto, Verma, Efficient neural network approaches for
    conditional optimal transport with applications in Bayesian inference (arXiv 2310.16975).

    Example:
        >>> import torch
        >>> flow = ConditionalOTFlow(dim=2, context_dim=3)
        >>> flow(torch.zeros(4, 3)).sample((10,)).shape
        torch.Size([10, 4, 2])
    """

    def __init__(
        self,
        dim: int,
        context_dim: int,
        width: int = 32,
        depth: int | None = None,
        *,
        embedding: int | nn.Module | None = None,
        **options: Any,
    ) -> None:
        if not isinstance(context_dim, int) or context_dim < 1:
            raise ArgumentError(f"`context_dim` must be a positive integer, got {context_dim!r}")
        depth = (3 if dim <= 3 else 2) if depth is None else depth
        super().__init__(dim, width, depth, context_dim=context_dim, embedding=embedding, **options)
