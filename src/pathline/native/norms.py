"""Norms of channels, with the ReLU behind them, by the compiled kernel: one pass over memory each.

`nets.ChannelNorm` decides when it serves; its results are those of the PyTorch path to round-off.
"""

from typing import Any

import torch
from torch import Tensor

from .. import native


def can_serve(z: Tensor, scale: Tensor, bias: Tensor) -> bool:
    """Whether the kernel can work on these: the channels must be next to each other in memory."""
    return (
        native.knows(z, scale, bias)
        and z.ndim in (2, 4)
        and z.is_contiguous(memory_format=_format(z))
        and scale.shape == bias.shape == z.shape[1:2]
        and scale.is_contiguous()
        and bias.is_contiguous()
        and native.ready()
    )


def channel_norm(z: Tensor, scale: Tensor, bias: Tensor, *, small: float, relu: bool) -> Tensor:
    """scale z / sqrt(sum over channels of z^2 + small) + bias, and its maximum with 0 if `relu`.

    Args:
        z: (rows, channels), or (batch, channels, height, width) with channels last in memory.
        scale, bias: (channels,).
        small: what is added to the squares.
        relu: have a ReLU behind it.
    """
    if torch.is_grad_enabled() and (z.requires_grad or scale.requires_grad or bias.requires_grad):
        return _ChannelNorm.apply(z, scale, bias, small, relu)
    return _value(z, scale, bias, small, relu)


class _ChannelNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, z: Tensor, scale: Tensor, bias: Tensor, small: float, relu: bool
    ) -> Tensor:
        ctx.save_for_backward(z, scale, bias)
        ctx.small, ctx.relu = small, relu
        return _value(z, scale, bias, small, relu)

    @staticmethod
    def backward(ctx: Any, d_y: Tensor) -> tuple[Tensor | None, ...]:
        z, scale, bias = ctx.saved_tensors
        if torch.is_grad_enabled() or not native.knows(d_y, z, scale, bias):
            return *_gradient(z, scale, bias, d_y, ctx.small, ctx.relu), None, None
        d_y = d_y.contiguous(memory_format=_format(z))
        d_z, d_scale, d_bias = (torch.empty_like(t) for t in (z, scale, bias))
        _call(
            z,
            scale,
            bias,
            ctx.small,
            ctx.relu,
            d_y=d_y.data_ptr(),
            d_z=d_z.data_ptr(),
            d_scale=d_scale.data_ptr(),
            d_bias=d_bias.data_ptr(),
        )
        return d_z, d_scale, d_bias, None, None


def _format(z: Tensor) -> torch.memory_format:
    return torch.channels_last if z.ndim == 4 else torch.contiguous_format


def _value(z: Tensor, scale: Tensor, bias: Tensor, small: float, relu: bool) -> Tensor:
    y = torch.empty_like(z)
    _call(z, scale, bias, small, relu, y=y.data_ptr())
    return y


def _call(z: Tensor, scale: Tensor, bias: Tensor, small: float, relu: bool, **others: int) -> None:
    single = z.dtype == torch.float32
    kernel = native._kernel
    (kernel.channel_norm_single if single else kernel.channel_norm_twofold)(
        z.numel() // max(len(scale), 1),
        len(scale),
        small,
        relu,
        native.thread_count(),
        z.data_ptr(),
        scale.data_ptr(),
        bias.data_ptr(),
        **others,
    )


def _gradient(
    z: Tensor, scale: Tensor, bias: Tensor, d_y: Tensor, small: float, relu: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradient by PyTorch, for those who differentiate it again or ask for many at once."""
    shape = (-1, *(1,) * (z.ndim - 2))
    pixels = (0, *range(2, z.ndim))
    inverse = (z.square().sum(1, keepdim=True) + small).rsqrt()
    u, factor = z * inverse, scale.view(shape)
    if relu:
        d_y = torch.where(u * factor + bias.view(shape) <= 0, 0, d_y)
    d_u = d_y * factor
    d_z = (d_u - u * (d_u * u).sum(1, keepdim=True)) * inverse
    return d_z, (d_y * u).sum(pixels), d_y.sum(pixels)
