"""Adversarial inputs: the nearest ones that a classifier takes for something else."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..errors import ArgumentError, DataError, ShapeError


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
    if not isinstance(steps, int) or steps < 1:
        raise ArgumentError(f"`steps` must be a positive integer, got {steps!r}")
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
        outputs = net(x)
        check_labels(outputs, labels)
        (slope,) = torch.autograd.grad(F.cross_entropy(outputs, labels, reduction="sum"), x)
    return slope.sign()


def check_labels(outputs: Tensor, labels: Tensor) -> None:
    """Raise unless `labels` (batch,) are classes of logits (batch, classes).

    Raises:
        ShapeError: they are not one for each of the samples.
        DataError: they are no integers, or one is none of the classes.
    """
    if outputs.ndim != 2:
        raise ShapeError(
            f"`labels` are for networks with logits (batch, classes), got {tuple(outputs.shape)}"
        )
    rows, classes = outputs.shape
    if labels.shape != (rows,):
        raise ShapeError(f"`labels` must be ({rows},), got {tuple(labels.shape)}")
    if labels.dtype != torch.int64:
        raise DataError(f"`labels` must be integers, of dtype torch.int64, got {labels.dtype}")
    if bool(((labels < 0) | (labels >= classes)).any()):
        raise DataError(
            f"`labels` must be whole numbers from 0 to {classes - 1}, got {int(labels.min())} to "
            f"{int(labels.max())}"
        )
