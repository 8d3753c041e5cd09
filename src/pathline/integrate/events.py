"""Solving until something happens."""

from collections.abc import Callable
from math import ceil, log2
from typing import Any

import torch
from torch import Tensor

from .dense import as_float
from .field import Field, real_dtype
from .grid import time_dtype
from .solution import Piece

EventFn = Callable[[Tensor, Any], Tensor]


class Event:
    """The first time at which an event function changes its sign (any of its entries does).

    Args:
        function: `(t, state) -> tensor`.
        field: the velocity, for the gradient of the time.
        t, z: where the solve begins, for the signs at the start.
        tolerance: of the time.
    """

    def __init__(
        self, function: EventFn, field: Field, t: Tensor, z: Tensor, tolerance: float
    ) -> None:
        self.function = function
        self.field = field
        self.tolerance = max(tolerance, 1e-15)
        with torch.no_grad():
            self.signs = torch.sign(function(t, field.layout.split(z)))
            self.now = bool((self.signs == 0).any())
        self.found: tuple[Tensor, Tensor] | None = None

    def value(self, t: Tensor, z: Tensor) -> Tensor:
        """Positive before the event, negative after it: the least of all entries."""
        return (self.function(t, self.field.layout.split(z)) * self.signs).min()

    def watch(self, piece: Piece, z: Tensor) -> bool:
        """Whether the event lies in the step; then it is found by bisection."""
        real, double = real_dtype(z), time_dtype(z.device)

        def time(x: float) -> Tensor:
            return torch.as_tensor(piece.start + x * piece.dt, dtype=double, device=z.device)

        with torch.no_grad():
            end = time(1.0).to(real)
            if float(self.value(end, z)) > 0:
                return False
            low, high = 0.0, 1.0
            length = abs(as_float(piece.dt))
            halvings = max(1, ceil(log2(max(length / self.tolerance, 2.0))))
            for _ in range(min(halvings, 60)):
                x = 0.5 * (low + high)
                if float(self.value(time(x).to(real), piece.at(x))) > 0:
                    low = x
                else:
                    high = x
        x = 0.5 * (low + high)
        self.found = (time(x), piece.at(x))
        return True

    def attach(self, t: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
        """The event's time and state with the gradient of the implicit function g(t, z(t)) = 0.

        d t = - d g / (dg/dt + dg/dz v), and the state moves along v with the time.
        """
        real = real_dtype(z)
        if not torch.is_grad_enabled():
            return t.to(real), z
        with torch.enable_grad():
            at = t.detach().to(real).requires_grad_()
            point = z.detach().requires_grad_()
            value = self.value(at, point)
            slopes = torch.autograd.grad(value, (at, point), allow_unused=True)
        with torch.no_grad():
            dz = self.field(at, point).detach()
            rate = torch.zeros((), dtype=real, device=z.device)
            if slopes[0] is not None:
                rate = rate + slopes[0]
            if slopes[1] is not None:
                rate = rate + torch.sum(slopes[1].conj() * dz).real
        value = self.value(t.to(real), z)
        shift = -(value - value.detach()) / rate
        return t.to(real) + shift, z + dz * (shift - shift.detach())
