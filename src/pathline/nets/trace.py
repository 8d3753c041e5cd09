"""The costly pieces of a potential's Laplacian, with hand-written backward passes."""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..errors import ArgumentError

LOG2 = math.log(2)
TILE_ROWS = 2048  # of the batch; their products with a few columns stay in the cache
TILE = {"cpu": 2**18, "cuda": 2**26}  # entries of the products of a tile with several columns


class _LogCosh(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> tuple[Tensor, Tensor]:
        T = torch.tanh(x)
        # log(2 cosh x) = |x| + log(1 + exp(-2|x|)) = |x| + log 2 - log(1 + |tanh x|)
        value = x.abs().add_(LOG2).sub_(T.abs().log1p_())
        ctx.save_for_backward(T)
        return value, T

    @staticmethod
    def backward(ctx: Any, d_value: Tensor, d_T: Tensor) -> Tensor:
        (T,) = ctx.saved_tensors  # an output of this function, so this can be differentiated too
        return torch.addcmul(d_T, T, d_value - T * d_T)  # value' = T, T' = 1 - T^2


def log_cosh(x: Tensor) -> tuple[Tensor, Tensor]:
    """log(2 cosh x) and its derivative tanh x, computed once and without overflow."""
    return _LogCosh.apply(x)


@dataclass
class _Gradients:
    """Of K and columns, summed over evaluations."""

    K: Tensor
    columns: Tensor
    evaluations: int = 0


def _sweep(
    T: Tensor,
    K: Tensor,
    columns: Tensor,
    dtype: torch.dtype | None,
    scale: Tensor | None = None,
    gradients: _Gradients | None = None,
) -> tuple[Tensor, Tensor | None]:
    """sum_k P_k^2, P_k = T (K diag(columns_k))^T, and gradients of sum(scale sum_k P_k^2).

    Tile by tile, so that the (batch, columns, width) array is never stored: the three products
    of a tile follow each other while it is in the cache.

    Args:
        T, scale: (batch, width).
        K: (width, width).
        columns: (columns, width).
        dtype: precision of the products, if not that of T.
        gradients: where those of K and columns are added, if `scale` is given.

    Returns:
        The sum, (batch, width), and its gradient with respect to T.
    """
    rows, width = min(len(T), TILE_ROWS), T.shape[1]
    count = max(1, min(len(columns), TILE.get(T.device.type, TILE["cpu"]) // max(1, rows * width)))
    low = dtype or T.dtype
    B_all, D_all = torch.empty(2, count, width, width, dtype=low, device=T.device)
    P_all = torch.empty(rows * count * width, dtype=low, device=T.device)
    squares = torch.zeros_like(T)
    d_T = None if scale is None else torch.zeros_like(T)
    for r in range(0, len(T), TILE_ROWS):
        tile = slice(r, r + TILE_ROWS)
        t = T[tile].to(low)
        factor = None if scale is None else 2 * scale[tile, None, :]
        for k in range(0, len(columns), count):
            c = columns[k : k + count, None, :]
            B = torch.mul(K, c, out=B_all[: len(c)]).view(-1, width)
            P = torch.mm(t, B.mT, out=P_all[: len(t) * len(B)].view(len(t), len(B)))
            P_k = P.view(len(t), len(c), width)
            for i in range(len(c)):
                squares[tile].addcmul_(P_k[:, i], P_k[:, i])
            if factor is None or d_T is None or gradients is None:
                continue
            P_k.mul_(factor)  # now the gradient with respect to P
            if low == T.dtype:
                d_T[tile].addmm_(P, B)
            else:
                d_T[tile] += P @ B
            D = torch.mm(P.mT, t, out=D_all[: len(c)].view(-1, width)).view(-1, width, width)
            for i in range(len(c)):
                gradients.K.addcmul_(D[i], c[i])
            gradients.columns[k : k + count] += D.mul_(K).sum(1, dtype=K.dtype)
    return squares, d_T


class _ResidualTrace(torch.autograd.Function):
    """sum_i slope_i squares_i; the backward pass computes the products again."""

    @staticmethod
    def forward(
        ctx: Any, T: Tensor, slope: Tensor, K: Tensor, columns: Tensor, dtype: torch.dtype | None
    ) -> Tensor:
        squares, _ = _sweep(T, K, columns, dtype)
        ctx.save_for_backward(T, slope, K, columns, squares)
        ctx.dtype = dtype
        return (slope * squares).sum(1)

    @staticmethod
    def backward(ctx: Any, d_trace: Tensor) -> tuple[Tensor | None, ...]:
        T, slope, K, columns, squares = ctx.saved_tensors
        if torch.is_grad_enabled():  # this will be differentiated, so autograd does it, untiled
            P = (T[:, None, :] * columns) @ K.mT
            trace = (slope * P.square().sum(1)).sum(1)
            inputs = (T, slope, K, columns)
            return *torch.autograd.grad(trace, inputs, d_trace, create_graph=True), None
        gradients = _Gradients(torch.zeros_like(K), torch.zeros_like(columns))
        d_squares = d_trace[:, None] * slope
        _, d_T = _sweep(T, K, columns, ctx.dtype, d_squares, gradients)
        return d_T, d_trace[:, None] * squares, gradients.K, gradients.columns, None


class _KnownTrace(torch.autograd.Function):
    """As `_ResidualTrace` where the gradient of the trace is known up to a factor: all products
    are done in the forward pass, and the backward pass finds the factor."""

    @staticmethod
    def forward(
        ctx: Any,
        T: Tensor,
        slope: Tensor,
        token: Tensor,
        K: Tensor,
        columns: Tensor,
        dtype: torch.dtype | None,
        adjoint: Tensor,
        gradients: _Gradients,
    ) -> Tensor:
        d_squares = adjoint[:, None] * slope
        squares, d_T = _sweep(T, K, columns, dtype, d_squares, gradients)
        gradients.evaluations += 1
        assert d_T is not None
        ctx.save_for_backward(d_T, squares, adjoint)
        ctx.token = token.dtype
        return (slope * squares).sum(1)

    @staticmethod
    def backward(ctx: Any, d_trace: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():  # the products of this gradient are gone
            raise ArgumentError(
                "with `laplacian_adjoint` (`adjoint` of a rollout) a gradient can't be "
                "differentiated again, so `create_graph` must be False; leave it out"
            )
        d_T, squares, adjoint = ctx.saved_tensors
        tiny = torch.finfo(adjoint.dtype).tiny
        factor = (d_trace @ adjoint) / (adjoint @ adjoint).clamp_min(tiny)
        rest = (d_trace - factor * adjoint).norm()
        _require(rest, _tolerance(rest) * d_trace.norm())
        d_slope = d_trace[:, None] * squares
        seen = factor.to(ctx.token) ** torch.arange(3, device=factor.device)
        return factor * d_T, d_slope, seen, None, None, None, None, None


class _Token(torch.autograd.Function):
    """Stands for K and columns in `_KnownTrace`. Its gradient is the sum over the evaluations of
    (1, factor, factor^2), which tells whether all took part, and with the same factor."""

    @staticmethod
    def forward(ctx: Any, K: Tensor, columns: Tensor, gradients: _Gradients) -> Tensor:
        ctx.gradients = gradients
        double = K.device.type != "mps"  # which has single precision only
        return K.new_zeros(3, dtype=torch.float64 if double else K.dtype)

    @staticmethod
    def backward(ctx: Any, seen: Tensor) -> tuple[Tensor | None, ...]:
        gradients, (count, total, squared) = ctx.gradients, seen.unbind()
        factor = total / gradients.evaluations
        spread = gradients.evaluations * squared - total.square()
        # This is the square of relative differences, hence the square of their tolerance.
        tolerance = max(1e2 * torch.finfo(seen.dtype).eps, _tolerance(gradients.K) ** 2)
        _require(spread, tolerance * total.square())
        _require((count - gradients.evaluations).abs(), torch.full_like(count, 0.5))
        factor = factor.to(gradients.K.dtype)
        return factor * gradients.K, factor * gradients.columns, None


def _tolerance(like: Tensor) -> float:
    """The rounding of a gradient on its way from the loss."""
    return 1e3 * torch.finfo(like.dtype).eps


def _require(error: Tensor, tolerance: Tensor) -> None:
    """The error is within the tolerance; a loss that is not a number is the caller's business."""
    text = (
        "`laplacian_adjoint` (`adjoint` of a rollout) must be the gradient of the loss "
        "with respect to the Laplacians (the log-determinant), up to one factor for all of them; "
        "this backward pass came with another gradient. Leave it out where it is not known"
    )
    wrong = error > tolerance
    if wrong.is_cuda:
        torch._assert_async(~wrong, text)  # without waiting for the device
    elif wrong:
        raise ArgumentError(text)


def row_space(K0: Tensor) -> Tensor:
    """An orthonormal basis of the rows of K0 (width, dim) with dim > width: (dim, width)."""
    return torch.linalg.qr(K0.mT).Q


class InnerTraces:
    """sum_{i > 0} h slope_i . |row of K_i J_{i-1}|^2 for many evaluations with the same weights.

    J_i is the Jacobian of u_i in x, times a frame E with E E^T = I: the sum depends on J only
    through J J^T. E is I, or where dim > width an orthonormal basis Q of the row space of K_0;
    or, in expectation, it is one probe for each row of the batch.

    Args:
        weights: K_1 ... K_M, each (width, width).
        K0: the columns of K_0 that belong to x, (width, dim).
        h: length of the residual steps.
        probe: (batch, dim) with independent entries +1 and -1, in place of the exact frame.
        dtype: precision of the products, if not that of the weights.
    """

    def __init__(
        self,
        weights: list[Tensor],
        K0: Tensor,
        h: float,
        probe: Tensor | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        self.weights, self.K0, self.h, self.probe, self.dtype = weights, K0, h, probe, dtype
        self._columns: Tensor | None = None
        self._known: tuple[Tensor, _Gradients] | None = None

    def columns(self) -> Tensor:
        """(K_0 E)^T, (dim or width, width) or (batch, 1, width)."""
        if self._columns is None:
            with torch.enable_grad():  # evaluations with and without gradients share it
                K0 = self.K0
                if self.probe is not None:
                    self._columns = (self.probe @ K0.mT)[:, None, :]
                elif K0.shape[1] > K0.shape[0]:
                    # The gradient G C Q^T with respect to K_0, G symmetric and C = K_0 Q, is the
                    # exact G K_0, since Q Q^T leaves the rows of K_0 as they are. (A second
                    # derivative with respect to K_0 alone would need that of Q.)
                    self._columns = (K0 @ row_space(K0.detach())).mT.contiguous()
                else:
                    self._columns = K0.mT.contiguous()
        return self._columns

    def __call__(
        self, tanhs: list[Tensor], slopes: list[Tensor], adjoint: Tensor | None = None
    ) -> Tensor | float:
        """The sum, (batch,).

        Args:
            tanhs, slopes: of all layers and of the inner layers, each (batch, width).
            adjoint: gradient of the loss with respect to the sum, (batch,), up to one factor for
                all evaluations, where it is known.
        """
        if not self.weights:
            return 0.0
        columns = self.columns()
        if len(self.weights) == 1 and self.probe is None:
            return self.h * self._residual(tanhs[0], slopes[0], adjoint)
        J = tanhs[0][:, None, :] * columns  # (batch, columns, width)
        total: Tensor | float = 0.0
        for i, K in enumerate(self.weights):
            P = J @ K.mT if self.dtype is None else _low_product(J, K, self.dtype)
            total = total + self.h * (slopes[i] * P.square().sum(1)).sum(1)
            if i + 1 < len(self.weights):
                J = J + self.h * tanhs[i + 1][:, None, :] * P
        return total

    def _residual(self, T: Tensor, slope: Tensor, adjoint: Tensor | None) -> Tensor:
        K, columns = self.weights[0], self.columns()
        if adjoint is None or not torch.is_grad_enabled():
            return _ResidualTrace.apply(T, slope, K, columns, self.dtype)
        if self._known is None:
            gradients = _Gradients(torch.zeros_like(K), torch.zeros_like(columns))
            self._known = _Token.apply(K, columns, gradients), gradients
        token, gradients = self._known
        weights = K.detach(), columns.detach()
        return _KnownTrace.apply(T, slope, token, *weights, self.dtype, adjoint, gradients)


def _low_product(J: Tensor, K: Tensor, dtype: torch.dtype) -> Tensor:
    return (J.to(dtype) @ K.mT.to(dtype)).to(J.dtype)
