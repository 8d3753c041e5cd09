"""Muon: momentum with orthogonalised updates, for the hidden matrices of a network."""

import math
from collections.abc import Iterable

import torch
from torch import Tensor
from torch.optim import Optimizer

from ..errors import ArgumentError

MOMENTUM = 0.95
NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)  # coefficients of x, x^3, x^5
ITERATIONS = 5


class Muon(Optimizer):
    """Steps of 0.2 sqrt(max(rows, columns)) lr along the orthogonalised Nesterov momentum.

    The scale gives the update the root mean square of Adam's, so both take the same rate.
    torch.optim.Muon iterates in bfloat16, which a CPU has to emulate; this one works in the
    precision of the weights, and takes matrices of one shape together.

    Args:
        matrices: parameters (rows, columns).

    Raises:
        ArgumentError: a parameter is no matrix.

    Source: K. Jordan et al., Muon: An optimizer for hidden layers in neural networks, 2024; the
    scale is that of Liu et al., Muon is scalable for LLM training (arXiv 2502.16982).
    """

    def __init__(self, matrices: Iterable[Tensor]) -> None:
        super().__init__(matrices, {"lr": 0.0})
        for parameter in self._parameters():
            if parameter.ndim != 2:
                raise ArgumentError(
                    f"`matrices` must be (rows, columns), got {tuple(parameter.shape)}"
                )

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Update every matrix that has a gradient."""
        alike: dict[torch.Size, list[Tensor]] = {}
        for parameter in self._parameters():
            if parameter.grad is not None:
                alike.setdefault(parameter.shape, []).append(parameter)
        for shape, parameters in alike.items():
            directions = orthogonalize(torch.stack([self._momentum(p) for p in parameters]))
            size = 0.2 * math.sqrt(max(shape)) * self.param_groups[0]["lr"]
            for parameter, direction in zip(parameters, directions, strict=True):
                parameter.add_(direction, alpha=-size)

    def _parameters(self) -> list[Tensor]:
        return self.param_groups[0]["params"]

    def _momentum(self, parameter: Tensor) -> Tensor:
        """The running mean of gradients, one step ahead (Nesterov)."""
        state, grad = self.state[parameter], parameter.grad
        assert grad is not None
        if not state:
            state["momentum_buffer"] = torch.zeros_like(parameter)
        mean = state["momentum_buffer"].lerp_(grad, 1 - MOMENTUM)
        return grad.lerp(mean, MOMENTUM)


def orthogonalize(matrices: Tensor) -> Tensor:
    """Nearly U V^T of each matrix U S V^T, (batch, rows, columns); singular values within 0.3 of 1.

    Five Newton-Schulz steps x -> a x + b x^3 + c x^5 act on the singular values alone. These
    coefficients raise small ones fastest, at the price of not settling at exactly 1.
    """
    a, b, c = NEWTON_SCHULZ
    tall = matrices.shape[1] > matrices.shape[2]
    x = matrices.mT if tall else matrices
    x = x / torch.linalg.matrix_norm(x, keepdim=True).clamp_min(1e-7)  # so that all lie in (0, 1]
    for _ in range(ITERATIONS):
        square = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(square, square, square, beta=b, alpha=c), x, beta=a)
    return x.mT if tall else x
