"""The two costly pieces of a potential's Laplacian, with hand-written backward passes."""

import math
from typing import Any

import torch
from torch import Tensor

LOG2 = math.log(2)
TILE = 2**20  # entries of the product of one tile: 4 MB in single precision stay in the cache
TILE_ROWS = 512  # at least, since every tile streams the whole weight


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


class _ResidualTrace(torch.autograd.Function):
    """The products of all k are one matrix product with B[(k, i), j] = K[i, j] K0[j, k], tiled
    over the batch so that the (batch, dim, width) array is never stored."""

    @staticmethod
    def forward(ctx: Any, T: Tensor, slope: Tensor, B: Tensor) -> Tensor:
        width = T.shape[1]
        squares = torch.empty_like(slope)
        for rows in _tiles(T, B):
            P = (T[rows] @ B.mT).view(-1, B.shape[0] // width, width)
            torch.sum(P.square_(), dim=1, out=squares[rows])
        ctx.save_for_backward(T, slope, B, squares)
        return (slope * squares).sum(1)

    @staticmethod
    def backward(ctx: Any, d_trace: Tensor) -> tuple[Tensor, ...]:
        T, slope, B, squares = ctx.saved_tensors
        width = T.shape[1]
        if torch.is_grad_enabled():  # this will be differentiated, so autograd does it, untiled
            P = (T @ B.mT).view(len(T), -1, width)
            trace = (slope * P.square().sum(1)).sum(1)
            return torch.autograd.grad(trace, (T, slope, B), d_trace, create_graph=True)
        d_squares = d_trace[:, None] * slope
        d_T, d_B = torch.empty_like(T), torch.zeros_like(B)
        for rows in _tiles(T, B):
            P = T[rows] @ B.mT
            P.view(-1, B.shape[0] // width, width).mul_(2 * d_squares[rows, None, :])
            torch.mm(P, B, out=d_T[rows])
            d_B.addmm_(P.mT, T[rows])
        return d_T, d_trace[:, None] * squares, d_B


def _tiles(T: Tensor, B: Tensor) -> list[slice]:
    rows = max(TILE_ROWS, TILE // B.shape[0])
    return [slice(i, i + rows) for i in range(0, T.shape[0], rows)]


def residual_weight(K: Tensor, K0: Tensor) -> Tensor:
    """B[(k, i), j] = K[i, j] K0[j, k], (dim * width, width), of K (width, width) and K0
    (width, dim)."""
    return (K0.mT[:, None, :] * K).reshape(-1, K.shape[1])


def residual_trace(T: Tensor, slope: Tensor, B: Tensor) -> Tensor:
    """sum_i slope_i sum_k (K diag(T) K0)_ik^2 for each row of T and slope.

    Args:
        T, slope: (batch, width).
        B: `residual_weight(K, K0)`.

    Returns:
        (batch,).
    """
    return _ResidualTrace.apply(T, slope, B)
