"""Particles whose velocity is the control."""

from torch import Tensor

from ..problem import Problem


class Particle(Problem):
    """f = u and L = |u|^2 / 2 + a cost of t and z alone, so u = -grad Phi."""

    def dynamics(self, t: Tensor, z: Tensor, u: Tensor) -> Tensor:
        return u

    def feedback(self, t: Tensor, z: Tensor, p: Tensor) -> Tensor:
        return -p
