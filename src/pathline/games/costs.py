"""What the costs of games share."""

from collections.abc import Callable

import torch
from torch import Tensor

from ..errors import DataError, ShapeError

Field = Callable[[Tensor], Tensor]

ROWS = 1024  # of pairs at once


def closeness(z: Tensor, others: Tensor) -> Tensor:
    """Mean over particles y of 1 / (1 + |z - y|^2) in the first two coordinates.

    Args:
        z: (batch, dim).
        others: (particles, dim).

    Returns:
        (batch,).

    Source: the congestion of Lin et al., APAC-Net (arXiv 2002.10113).
    """
    theirs, found = others[:, :2], []
    for ours in z[:, :2].split(ROWS):
        squares = ours.square().sum(1)[:, None] + theirs.square().sum(1)
        apart = torch.addmm(squares, ours, theirs.mT, alpha=-2)  # |z - y|^2
        found.append((1 + apart).reciprocal().mean(1))
    return torch.cat(found)


@torch.no_grad()
def try_cost(name: str, cost: Field, x: Tensor) -> None:
    """See whether a user's cost of states `x` (batch, dim) is what it must be.

    Raises:
        ShapeError: it is not (batch,).
        DataError: it is not finite.
    """
    found = cost(x)
    if not isinstance(found, Tensor) or tuple(found.shape) != (len(x),):
        shape = tuple(found.shape) if isinstance(found, Tensor) else type(found).__name__
        raise ShapeError(f"`{name}` must return ({len(x)},) for {len(x)} rows, got {shape}")
    if not bool(torch.isfinite(found).all()):
        raise DataError(f"`{name}` must be finite where particles start")
