"""Ranks, regions and quantiles of a density, from its map to N(0, I).

Where z = T(x; y) is N(0, I) given y, the rank P(|Z| <= |z|) of x is uniform on [0, 1], so the set
of the points of rank at most p holds a share p of the density. These sets are nested, connected,
and the boundary of one is the image of a sphere. They are not those of highest density.

If the map is monotone, the gradient of a convex function (as of a `PCPMap`, in standardised
coordinates), these are the Monge-Kantorovich ranks and contours, with N(0, I) as reference, and
T^-1 is the conditional vector quantile function; in one dimension, the quantile function.

Sources: Chernozhukov, Galichon, Hallin, Henry, Monge-Kantorovich depth, quantiles, ranks and
signs, Annals of Statistics 2017 (arXiv 1412.8434); Carlier, Chernozhukov, Galichon, Vector
quantile regression, Annals of Statistics 2016 (arXiv 1406.4643).
"""

import math
from typing import TYPE_CHECKING

import torch
from scipy.special import gammaincinv
from torch import Tensor
from torch.nn.functional import normalize

from ..errors import ArgumentError, ShapeError

if TYPE_CHECKING:
    from .map import TransportMap


def rank(flow: "TransportMap", x: Tensor, context: Tensor | None) -> Tensor:
    """P(|Z| <= |z|) of the z to which the rows of `x` (batch, dim) are carried, (batch,).

    One off the support, NaN where x is.
    """
    inside, safe = flow.standardize.replaced(x)
    z = flow.to_reference(safe, context)
    half = torch.full_like(z[:, 0], flow.dim / 2)
    return torch.where(inside, torch.special.gammainc(half, z.square().sum(1) / 2), 1.0)


@torch.no_grad()
def contour(
    flow: "TransportMap", level: float, context: Tensor | None, *, n: int, seed: int
) -> Tensor:
    """n points (n, dim) of rank `level`, given one context (context_dim,).

    Raises:
        ArgumentError: the level is not between 0 and 1.
        ShapeError: there is not one context.
    """
    if not 0 < level < 1:
        raise ArgumentError(f"`level` must lie between 0 and 1, got {level!r}")
    if context is not None and torch.as_tensor(context).ndim != 1:
        shape = tuple(torch.as_tensor(context).shape)
        raise ShapeError(f"`context` must be ({flow.context_dim},), got {shape}")
    directions = flow.reference_sample(n, seed=seed).double()
    if flow.dim == 1:
        directions = 2.0 * (torch.arange(n) % 2)[:, None].to(directions) - 1
    elif flow.dim == 2:
        angle = torch.arange(n).to(directions) * (2 * math.pi / max(n, 1))
        directions = torch.stack([angle.cos(), angle.sin()], 1)
    radius = math.sqrt(2 * gammaincinv(flow.dim / 2, level))
    return flow.from_reference(radius * normalize(directions), context)


def quantile(flow: "TransportMap", levels: Tensor | float, context: Tensor | None) -> Tensor:
    """The conditional quantile function of a density of one column, increasing in the level.

    Returns:
        The shape of the contexts, () or (batch,), and then of the levels, () or (levels,).

    Raises:
        ArgumentError: the density has several columns, or a level is not between 0 and 1.
        ShapeError: the levels are no list.
    """
    if flow.dim != 1:
        raise ArgumentError(
            f"`quantile` is for densities of one column, got {flow.dim}; see `contour`"
        )
    levels = torch.as_tensor(levels, dtype=torch.float64, device=flow.standardize.mean.device)
    if levels.ndim > 1:
        raise ShapeError(f"`levels` must be () or (levels,), got {tuple(levels.shape)}")
    if not ((levels > 0) & (levels < 1)).all():
        raise ArgumentError(f"`levels` must lie between 0 and 1, got {levels.tolist()}")
    # log(upper - x), the coordinate of a column that is only bounded above, decreases
    below, above = flow.standardize.lower.isfinite(), flow.standardize.upper.isfinite()
    z = torch.special.ndtri(levels) * torch.where(above & ~below, -1, 1)
    if context is None or torch.as_tensor(context).ndim < 2:
        return flow.from_reference(z.reshape(-1, 1), context).reshape(levels.shape)
    rows, each = len(context), levels.numel()
    context = torch.as_tensor(context).repeat_interleave(each, 0)
    x = flow.from_reference(z.reshape(-1, 1).repeat(rows, 1), context)
    return x.reshape(rows, *levels.shape)
