"""Adversarial inputs: the nearest ones that a classifier takes for something else."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..errors import ArgumentError


def fgsm(net: nn.Module, x: Tensor, labels: Tensor, epsilon: float) -> Tensor:
    """x + epsilon sign(gradient of the cross entropy): one step of greatest increase.

    Args:
        net: inputs to logits (batch, classes), in evaluation mode.
        x: (batch, ...).
        labels: (batch,).
        epsilon: the largest change of an entry of x.

    Source: Goodfellow, Shlens, Szegedy, Explaining and harnessing adversarial examples, ICLR 2015,
    arXiv 1412.6572.
    """
    return x + epsilon * _ascent(net, x, labels, epsilon)


def pgd(
    net: nn.Module, x: Tensor, labels: Tensor, epsilon: float, *, steps: int = 10, seed: int = 0
) -> Tensor:
    """Many steps of `fgsm`, each of 2.5 epsilon / steps, from a random start.

    No entry ends further than epsilon from that of x.

    Args:
        net, x, labels, epsilon: as in `fgsm`.
        steps: how many.
        seed: of the start.

    Source: Madry et al., Towards deep learning models resistant to adversarial attacks, ICLR 2018,
    arXiv 1706.06083.
    """
    generator = torch.Generator().manual_seed(seed)
    start = torch.rand(x.shape, generator=generator, dtype=torch.float64).to(x)
    moved = x + epsilon * (2 * start - 1)
    for _ in range(steps):
        moved = moved + 2.5 * epsilon / steps * _ascent(net, moved, labels, epsilon)
        moved = torch.minimum(torch.maximum(moved, x - epsilon), x + epsilon)
    return moved


def _ascent(net: nn.Module, x: Tensor, labels: Tensor, epsilon: float) -> Tensor:
    if not epsilon >= 0:
        raise ArgumentError(f"`epsilon` must be at least 0, got {epsilon!r}")
    with torch.enable_grad():
        x = x.detach().requires_grad_()
        (slope,) = torch.autograd.grad(F.cross_entropy(net(x), labels, reduction="sum"), x)
    return slope.sign()
