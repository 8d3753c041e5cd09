"""From the user's units to the coordinates in which a flow works, and back."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import ArgumentError, DataError
from ..train import Rows

Bounds = tuple[float | None, float | None]


class Standardize(nn.Module):
    """A fixed bijection y = scale^-1 (g(x) - mean - slope c); g sends each bounded column to the
    line, and c = (context - context_mean) / context_scale of a conditional density.

    `scale` = D R^(1/2) from standard deviations D and correlations R, so that y has mean zero
    and covariance one: for Gaussian data this is the optimal-transport map in the coordinates
    D^-1 x, and a flow has only the rest to learn. g is log(x - lower) or log(upper - x) for
    columns bounded on one side, the logit for columns bounded on both, else the identity.

    With a context, `slope` is the linear regression of g(x) on c, and D and R are those of its
    residuals: for jointly Gaussian data, y is N(0, I) whatever the context, by the conditional
    optimal-transport map.

    Buffers, in double precision: `mean` (dim,), `scale` (dim, dim), `lower` and `upper` (dim,);
    with a context `context_mean` and `context_scale` (context_dim,), `slope` (dim, context_dim).
    """

    mean: Tensor
    scale: Tensor
    lower: Tensor
    upper: Tensor
    context_mean: Tensor
    context_scale: Tensor
    slope: Tensor

    def __init__(
        self, dim: int, bounds: Sequence[Bounds] | None = None, context_dim: int = 0
    ) -> None:
        super().__init__()
        self.context_dim = context_dim
        bounds = [(None, None)] * dim if bounds is None else bounds
        ends = [
            (-math.inf if a is None else float(a), math.inf if b is None else float(b))
            for a, b in bounds
        ]
        if len(ends) != dim or any(not a < b for a, b in ends):
            raise ArgumentError(
                f"`support` must hold {dim} pairs (lower, upper) with lower < upper, got {bounds}"
            )
        lower, upper = torch.tensor(ends, dtype=torch.float64).reshape(dim, 2).unbind(1)
        self.register_buffer("mean", torch.zeros_like(lower))
        self.register_buffer("scale", torch.eye(dim, dtype=torch.float64))
        self.register_buffer("lower", lower.clone())
        self.register_buffer("upper", upper.clone())
        if context_dim:
            zeros = torch.zeros(context_dim, dtype=torch.float64)
            self.register_buffer("context_mean", zeros)
            self.register_buffer("context_scale", torch.ones_like(zeros))
            self.register_buffer("slope", zeros.new_zeros(dim, context_dim))
        self.bounded = bool((lower.isfinite() | upper.isfinite()).any())
        self._solved: tuple[Tensor, int, Tensor, Tensor] | None = None

    def bounds(self) -> list[list[float | None]] | None:
        """(lower, upper) of each column, None where free; None if all columns are free."""
        if not self.bounded:
            return None
        pairs = zip(self.lower.tolist(), self.upper.tolist(), strict=True)
        return [[end if math.isfinite(end) else None for end in pair] for pair in pairs]

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Coordinates y of the rows of `x` (batch, dim), and log |det dy/dx| (batch,)."""
        x, log_slope = self.unbound(x.to(self.mean))
        inverse, log_det = self._inverse()
        return (x - self.centre(context)) @ inverse.mT, log_slope - log_det

    def context(self, context: Tensor) -> Tensor:
        """c, the standardised `context` (batch, context_dim)."""
        return (context.to(self.mean) - self.context_mean) / self.context_scale

    def centre(self, context: Tensor | None) -> Tensor:
        """mean + slope c: (dim,), or (batch, dim) with a context."""
        if context is None:
            return self.mean
        return self.mean + self.context(context) @ self.slope.mT

    def __getstate__(self) -> dict[str, Any]:
        return super().__getstate__() | {"_solved": None}  # copies count their versions anew

    def _inverse(self) -> tuple[Tensor, Tensor]:
        """scale^-1 and log |det scale|, computed again when `scale` has changed."""
        scale, kept = self.scale, self._solved
        if kept is None or kept[0] is not scale or kept[1] != scale._version:
            log_det = torch.linalg.slogdet(scale).logabsdet
            kept = self._solved = scale, scale._version, torch.linalg.inv(scale), log_det
        return kept[2], kept[3]

    def inverse(self, y: Tensor, context: Tensor | None = None) -> Tensor:
        """The rows x of the coordinates `y`, (batch, dim)."""
        y = y.to(self.mean) @ self.scale.mT + self.centre(context)
        if not self.bounded:
            return y
        below, above = self.lower.isfinite(), self.upper.isfinite()
        lower, upper = torch.where(below, self.lower, 0.0), torch.where(above, self.upper, 0.0)
        one_sided = torch.where(below, lower + y.exp(), upper - y.exp())
        two_sided = lower + (upper - lower) * torch.sigmoid(y)
        return torch.where(below & above, two_sided, torch.where(below | above, one_sided, y))

    def unbound(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """g(x) (batch, dim), and log |det dg/dx| (batch,); NaN and -inf off the support."""
        if not self.bounded:
            return x, x.new_zeros(x.shape[0])
        below, above = self.lower.isfinite(), self.upper.isfinite()
        one = torch.ones_like(x)
        from_lower = torch.where(below, x - self.lower, one).log()
        from_upper = torch.where(above, self.upper - x, one).log()
        width = torch.where(below & above, self.upper - self.lower, 1.0).log()
        g = torch.where(above & ~below, from_upper, from_lower - from_upper)
        log_slope = (width - from_lower - from_upper).sum(1)  # d logit = width / ((x-l)(u-x))
        return torch.where(below | above, g, x), log_slope

    def inside(self, x: Tensor) -> Tensor:
        """Whether each value lies strictly within its bounds, (batch, dim)."""
        return (x > self.lower) & (x < self.upper)

    def replaced(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Which rows of `x` lie on the support or hold NaN, (batch,), and `x` with the others
        replaced, lest their infinities spoil the gradients of these."""
        inside = (self.inside(x) | x.isnan()).all(1)
        centre = self.inverse(torch.zeros(1, len(self.mean))).to(x)
        return inside, torch.where(inside[:, None], x, centre)

    def check_rows(self, rows: Rows) -> None:
        """Raise a `DataError` if a value lies on or outside its bounds."""
        if not self.bounded:
            return
        for x, _ in rows.blocks():
            outside = ~self.inside(x[:, : len(self.mean)].to(self.lower))
            if outside.any():
                row, column = torch.nonzero(outside)[0].tolist()
                raise DataError(
                    f"`{rows.name}` has a value on or outside the bounds of column {column}: "
                    f"{x[row, column].item()} is not in "
                    f"({self.lower[column].item()}, {self.upper[column].item()})"
                )

    @torch.no_grad()
    def fit(self, rows: Rows) -> None:
        """Set mean, scale and slope from the training rows (x, context).

        With few rows the correlations shrink towards none by exp(-rows/dim), and the slope by a
        ridge of context_dim/rows. A constant column of the context says nothing: its slope is 0.

        Raises:
            DataError: a constant column of x, or columns that are linearly dependent on each
                other or on the context: no density exists then.
        """
        dim = len(self.mean)
        mean, covariance, size = self._moments(rows)
        std = covariance.diagonal().clamp_min(0).sqrt()
        flat = std <= 1e-12 * (size + std)
        if flat[:dim].any():
            names = torch.nonzero(flat[:dim]).flatten().tolist()
            raise DataError(
                f"constant columns have no density, and so are the columns {names} in the "
                f"{len(rows)} training rows of `{rows.name}`"
            )
        given = ""
        if self.context_dim:
            self.context_mean.copy_(mean[dim:])
            self.context_scale.copy_(std[dim:].where(~flat[dim:], 1.0))
            slope, covariance = self._regress(covariance, len(rows))
            self.slope.copy_(slope)
            std, given = covariance.diagonal().clamp_min(0).sqrt(), ", given their context"
        correlation = covariance / (std[:, None] * std)
        values, vectors = torch.linalg.eigh(torch.nan_to_num(correlation))
        if len(rows) > dim and values[0] < 1e-12:
            names = torch.nonzero(vectors[:, 0].abs() > 0.1).flatten().tolist()
            raise DataError(
                f"`{rows.name}` has linearly dependent columns{given}, which have no joint "
                f"density: {names}; drop one of them"
            )
        shrink = math.exp(-len(rows) / dim)
        values = (1 - shrink) * values + shrink
        root = (vectors * values.sqrt()) @ vectors.mT
        self.mean.copy_(mean[:dim])
        self.scale.copy_(std[:, None] * root)

    def _moments(self, rows: Rows) -> tuple[Tensor, Tensor, Tensor]:
        """Mean and covariance of (g(x), context), and the size of their numbers."""
        dim, columns = len(self.mean), rows.columns
        mean, square = torch.zeros(columns).double(), torch.zeros(columns, columns).double()
        first = None
        for x, w in rows.blocks():
            x = x.to(self.mean)
            g = torch.cat([self.unbound(x[:, :dim])[0], x[:, dim:]], 1).cpu()
            first = g[0] if first is None else first  # a pilot mean, against cancellation
            weighted = (g - first) if w is None else (g - first) * w.cpu()[:, None]
            mean += weighted.sum(0) / len(rows)
            square += weighted.mT @ (g - first) / len(rows)
        assert first is not None
        return first + mean, square - mean[:, None] * mean, first.abs() + mean.abs()

    def _regress(self, covariance: Tensor, rows: int) -> tuple[Tensor, Tensor]:
        """Slope of g(x) on c by ridge regression, and the covariance of what it leaves."""
        dim = len(self.mean)
        scale = torch.cat([torch.ones(dim).double(), self.context_scale.cpu()])
        covariance = covariance / (scale[:, None] * scale)
        own, shared, other = covariance[:dim, :dim], covariance[:dim, dim:], covariance[dim:, dim:]
        # A column that is all but constant would get a slope of rounding errors.
        ridge = max(self.context_dim / rows, 1e-10) * torch.eye(self.context_dim).double()
        slope = torch.linalg.solve(other + ridge, shared.mT).mT
        return slope, own - slope @ shared.mT - shared @ slope.mT + slope @ other @ slope.mT
