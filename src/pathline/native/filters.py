"""Filters of periodic images by the compiled kernel: both Fourier transforms in one call.

`networks.SemiImplicit` decides when it serves; its results are those of the PyTorch path to
round-off. Its transforms are sums, which suits images of some tens of pixels a side, with channels
last in memory.
"""

from typing import Any

import torch
from torch import Tensor

from .. import native

LARGEST = 64  # pixels a side; beyond, the fast transforms of PyTorch overtake


def can_serve(z: Tensor, factors: Tensor) -> bool:
    """Whether the kernel can work on these: small images with channels last, one factor a wave."""
    return (
        native.knows(z, factors)
        and z.ndim == 4
        and z.is_contiguous(memory_format=torch.channels_last)
        and 0 < min(z.shape) <= max(z.shape[2:]) <= LARGEST
        and factors.shape == (z.shape[1], z.shape[2], z.shape[3] // 2 + 1)
        and native.ready()
    )


def filtered(z: Tensor, factors: Tensor) -> Tensor:
    """Images whose waves, of the real Fourier transform, are multiplied; channels last in memory.

    Args:
        z: (batch, channels, height, width), channels last in memory.
        factors: (channels, height, width // 2 + 1), where those of a wave and its mirror image
            are the same.
    """
    if torch.is_grad_enabled() and (z.requires_grad or factors.requires_grad):
        return _Filter.apply(z, factors)
    return _call(z, factors)[0]


class _Filter(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, z: Tensor, factors: Tensor) -> Tensor:
        ctx.save_for_backward(z, factors)
        return _call(z, factors)[0]

    @staticmethod
    def backward(ctx: Any, d_y: Tensor) -> tuple[Tensor | None, ...]:
        z, factors = ctx.saved_tensors
        if torch.is_grad_enabled() or not native.knows(d_y, z, factors):
            return _gradient(z, factors, d_y)
        d_y = d_y.contiguous(memory_format=torch.channels_last)
        d_z, products = _call(d_y, factors, z if ctx.needs_input_grad[1] else None)
        return d_z, None if products is None else products * _counts(z)


def _counts(z: Tensor) -> Tensor:
    """How often a wave of the real transform is in the whole one, over the number of pixels."""
    height, width = z.shape[2:]
    times = [1 if 2 * k in (0, width) else 2 for k in range(width // 2 + 1)]
    return z.new_tensor(times) / (height * width)


def _call(z: Tensor, factors: Tensor, other: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
    """The filtered z, and products of its waves with those of another, summed over the batch."""
    batch, channels, height, width = z.shape
    scaled = (factors.movedim(0, -1) / (height * width)).contiguous()
    y = torch.empty_like(z)
    products = None if other is None else torch.empty_like(scaled)
    kernel = native._kernel
    (kernel.filter_single if z.dtype == torch.float32 else kernel.filter_twofold)(
        batch,
        height,
        width,
        channels,
        native.thread_count(),
        z.data_ptr(),
        scaled.data_ptr(),
        y.data_ptr(),
        0 if other is None else other.data_ptr(),
        0 if products is None else products.data_ptr(),
    )
    return y, None if products is None else products.movedim(-1, 0)


def _gradient(z: Tensor, factors: Tensor, d_y: Tensor) -> tuple[Tensor, Tensor]:
    """The gradient by PyTorch, for those who differentiate it again or ask for many at once."""
    waves, d_waves = torch.fft.rfft2(z), torch.fft.rfft2(d_y)
    products = (waves.real * d_waves.real + waves.imag * d_waves.imag).sum(0)
    return torch.fft.irfft2(d_waves * factors, s=z.shape[2:]), products * _counts(z)
