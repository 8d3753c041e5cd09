"""Optimal control problems."""

from collections.abc import Callable
from typing import Any

from torch import Tensor

from .. import calculus
from ..nets import Derivatives


class Problem:
    """Minimise E[ int_0^horizon L(t, z, u) dt + G(z(horizon)) ] subject to dz/dt = f(t, z, u).

    A problem is a subclass with `dim` and the methods `dynamics` (f), `running_cost` (L),
    `terminal_cost` (G) and `feedback`, each on a batch. The value function Phi of the problem
    solves d_t Phi + H(t, z, grad Phi) = 0 with H(t, z, p) = min_u L(t, z, u) + p.f(t, z, u).

    Shapes: `t` is (), `z` and `p` are (batch, dim), `u` is (batch, dim_u), costs are (batch,).
    """

    dim: int
    horizon: float = 1.0
    is_transport = False  # f = u, L = |u|^2 / 2 and G = |z|^2 / 2 + constant; not inherited

    def __init_subclass__(cls, **arguments: Any) -> None:
        super().__init_subclass__(**arguments)
        cls.is_transport = cls.__dict__.get("is_transport", False)

    def dynamics(self, t: Tensor, z: Tensor, u: Tensor) -> Tensor:
        """f(t, z, u), (batch, dim)."""
        raise NotImplementedError(f"{type(self).__name__} must define `dynamics(t, z, u)`")

    def running_cost(self, t: Tensor, z: Tensor, u: Tensor) -> Tensor:
        """L(t, z, u), (batch,)."""
        raise NotImplementedError(f"{type(self).__name__} must define `running_cost(t, z, u)`")

    def terminal_cost(self, z: Tensor) -> Tensor:
        """G(z), (batch,)."""
        raise NotImplementedError(f"{type(self).__name__} must define `terminal_cost(z)`")

    def feedback(self, t: Tensor, z: Tensor, p: Tensor) -> Tensor:
        """The control that minimises L(t, z, u) + p.f(t, z, u), (batch, dim_u)."""
        raise NotImplementedError(f"{type(self).__name__} must define `feedback(t, z, p)`")

    def hamiltonian(self, t: Tensor, z: Tensor, p: Tensor) -> Tensor:
        """H(t, z, p) = min_u L(t, z, u) + p.f(t, z, u), (batch,)."""
        u = self.feedback(t, z, p)
        return self.running_cost(t, z, u) + (p * self.dynamics(t, z, u)).sum(1)

    def divergence(
        self, t: Tensor, z: Tensor, phi: Derivatives, velocity: Callable[[Tensor], Tensor]
    ) -> Tensor:
        """Divergence of the closed-loop `velocity(z)` at time t, (batch,).

        By automatic differentiation; override it where `phi` (with its Laplacian) gives it.
        """
        return calculus.divergence(velocity, z)
