"""Residual blocks that can be inverted because they move features by less than their distance.

Source: Behrmann, Grathwohl, Chen, Duvenaud, Jacobsen, Invertible residual networks, ICML 2019,
arXiv 1811.00995.
"""

import torch
from torch import Tensor, nn

from ..errors import ArgumentError, SolveError, unknown
from ..nets import ACTIVATIONS, Operator
from ..nets.layers import per_channel


class InvertibleBlock(nn.Module):
    """y = x + g(x), g(x) = s K2 sigma(K1 x + b), with s <= 1 such that g has Lipschitz constant c.

    s = min(1, c / (|K1| |K2|)) with bounds of the norms that hold for every image size, see
    `Operator.bound`; so the inverse exists, and the fixed-point iteration x = y - g(x) gains a
    factor c at least each time.

    Args:
        first, second: K1 and K2.
        bound: c, above 0 and below 1.
        activation: a name in "tanh", "relu", "identity".

    Raises:
        ArgumentError: the operators don't fit, `bound` is out of range, or the name is not known.
    """

    def __init__(
        self, first: Operator, second: Operator, *, bound: float = 0.9, activation: str = "tanh"
    ) -> None:
        super().__init__()
        if not 0 < bound < 1:
            raise ArgumentError(f"`bound` must be above 0 and below 1, got {bound!r}")
        if activation not in ACTIVATIONS:
            raise ArgumentError(unknown("`activation`", str(activation), ACTIVATIONS))
        if (first.outputs, first.inputs) != (second.inputs, second.outputs):
            raise ArgumentError(
                "`second` must lead back from the outputs of `first` to its inputs, got "
                f"{first.inputs} -> {first.outputs} and {second.inputs} -> {second.outputs}"
            )
        self.operators = nn.ModuleList([first, second])
        self.bias = nn.Parameter(torch.zeros(first.outputs))
        self.bound, self.activation = bound, activation

    def forward(self, x: Tensor) -> Tensor:
        """y, like x (batch, channels, ...)."""
        return x + self.scale() * self.change(x)

    def scale(self) -> Tensor:
        """s, ()."""
        first, second = (part.bound() for part in self.operators)  # type: ignore[operator]
        return (self.bound / (first * second)).clamp(max=1.0)

    def change(self, x: Tensor) -> Tensor:
        """K2 sigma(K1 x + b)."""
        first, second = self.operators
        y = first(x)
        return second(ACTIVATIONS[self.activation].value(y + per_channel(self.bias, y)))

    @torch.no_grad()
    def inverse(self, y: Tensor, *, tolerance: float | None = None) -> Tensor:
        """x with y = x + g(x), without gradients.

        Args:
            y: (batch, channels, ...).
            tolerance: largest last change, relative to y; four times the round-off if None.

        Raises:
            SolveError: it was not reached, so the weights or y are not finite.
        """
        if not y.numel():
            return y
        eps = torch.finfo(y.dtype).eps
        scale, x = self.scale(), y
        tolerance = 4 * eps if tolerance is None else tolerance
        limit = tolerance * float(y.abs().max().clamp(min=eps))
        most = 10 + int(torch.tensor(eps).log() / torch.tensor(self.bound).log())
        for _ in range(2 * most):
            before, x = x, y - scale * self.change(x)
            if float((x - before).abs().max()) <= limit:
                return x
        raise SolveError(
            f"the inverse did not converge in {2 * most} iterations; are all weights finite?"
        )
