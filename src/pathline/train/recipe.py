"""The optimisers: Muon for square hidden matrices, Adam for the rest, one cosine for both; or
L-BFGS."""

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from .muon import Muon

MUON_RATE = 1.0  # of Adam's; Muon itself steps 0.2 sqrt(width) times its rate
FINAL_RATE = 0.01  # of the first
ITERATIONS = 50  # of L-BFGS on the same rows
OPTIMIZERS = ("adam", "lbfgs")


def optimizers(module: nn.Module, inner: list[Tensor]) -> list[Optimizer]:
    """Adam for the parameters of `module`, and Muon for `inner`, if there are any.

    Muon (Jordan et al. 2024) orthogonalises the momentum of a matrix, so that all its directions
    learn at one rate: a flow needs a fraction of Adam's steps.
    """
    ids = {id(parameter) for parameter in inner}
    rest = [p for p in module.parameters() if p.requires_grad and id(p) not in ids]
    found: list[Optimizer] = []
    if rest:
        found.append(torch.optim.Adam(rest, betas=(0.9, 0.99), fused=True))
    if inner:
        found.append(Muon(inner))
    return found


def quasi_newton(
    parameters: Sequence[Tensor], loss: Callable[[], Tensor], rate: float = 1.0
) -> None:
    """Some iterations of L-BFGS with a line search by the strong Wolfe conditions, from no
    curvature: pairs of other rows would be of another function.

    Args:
        parameters: what moves.
        loss: with the same rows and the same randomness at each call.
        rate: length of the first trial of a line search.
    """
    optimizer = torch.optim.LBFGS(
        parameters, lr=rate, max_iter=ITERATIONS, max_eval=2 * ITERATIONS,
        history_size=ITERATIONS, line_search_fn="strong_wolfe", tolerance_grad=1e-12,
        tolerance_change=1e-14,
    )  # fmt: skip

    def closure() -> Tensor:
        optimizer.zero_grad()
        value = loss()
        value.backward()
        return value

    optimizer.step(closure)


def set_rate(optimizers: list[Optimizer], rate: float) -> None:
    """Set Adam's learning rate to `rate`, and Muon's in proportion."""
    for optimizer in optimizers:
        factor = MUON_RATE if isinstance(optimizer, Muon) else 1.0
        for group in optimizer.param_groups:
            group["lr"] = factor * rate


def cosine(progress: float) -> float:
    """From 1 at progress 0 to `FINAL_RATE` at progress 1."""
    return FINAL_RATE + (1 - FINAL_RATE) * 0.5 * (1 + math.cos(math.pi * min(progress, 1)))
