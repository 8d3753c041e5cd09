"""The same network with more layers, or for images of another resolution, to go on training.

Source: Haber, Ruthotto, Holtham, Learning across scales, AAAI 2018, arXiv 1703.02009; Chang et al.,
Multi-level residual networks from dynamical systems view, ICLR 2018, arXiv 1710.10348.
"""

import copy
from collections.abc import Callable

import torch
from torch import Tensor, nn

from ..errors import ArgumentError
from ..nets import CirculantConv, Conv, LeanConv, ShiftConv, prolong_kernels, restrict_kernels
from .net import ContinuousNet
from .semi_implicit import Diffusion


def deepened(net: ContinuousNet, factor: int = 2) -> ContinuousNet:
    """A network of `factor` times as many steps over the same horizon, with weights of its own.

    The weights are the same functions of time, pieces in parts, so that outputs change by the error
    of the time steps alone.

    Raises:
        ArgumentError: the factor is no positive integer, or steps are adaptive.
    """
    if not isinstance(factor, int) or factor < 1:
        raise ArgumentError(f"`factor` must be a positive integer, got {factor!r}")
    finer = copy.deepcopy(net)
    for evolution in finer.evolutions():
        if evolution.steps is None:
            raise ArgumentError("`net` must take fixed steps, got an adaptive method")
        evolution.steps *= factor
        time = evolution.dynamics.time
        if not time.polynomial:
            evolution.dynamics = evolution.dynamics.refined(factor * time.order)
    if finer.made is not None:
        options = dict(finer.made["options"])
        options["steps"] *= factor
        if "h" in options:
            options["h"] /= factor
        else:
            time = next(finer.evolutions()).dynamics.time
            options["time"] = {"name": time.name, "order": time.order, "horizon": time.horizon}
        finer.made = {**finer.made, "options": options}
    return finer


def prolonged(net: ContinuousNet, how: str = "galerkin") -> ContinuousNet:
    """A network for images of twice the resolution, with kernels by `nets.prolong_kernels`.

    Raises:
        ArgumentError: the way is not known, or a layer has no full 3x3 or 1x1 kernels.
    """
    return _transferred(net, lambda kernels: prolong_kernels(kernels, how))


def restricted(net: ContinuousNet, how: str = "galerkin") -> ContinuousNet:
    """A network for images of half the resolution: the inverse of `prolonged`."""
    return _transferred(net, lambda kernels: restrict_kernels(kernels, how))


@torch.no_grad()
def _transferred(net: ContinuousNet, transfer: Callable[[Tensor], Tensor]) -> ContinuousNet:
    other = copy.deepcopy(net)
    for part in other.modules():
        if isinstance(part, LeanConv | CirculantConv | ShiftConv):
            raise ArgumentError(
                "`net` must have full kernels to change its resolution, got a "
                f"{type(part).__name__}"
            )
        if isinstance(part, Conv | nn.Conv2d | Diffusion):
            kernel = part.kernel if isinstance(part, Diffusion) else part.weight
            size = tuple(kernel.shape[-2:])
            if size == (3, 3):
                kernel.copy_(transfer(kernel))
            elif size != (1, 1):
                raise ArgumentError(f"`net` must have kernels of 3x3 or 1x1, got {size}")
    return other
