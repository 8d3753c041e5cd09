"""Particles that choose their velocity."""

from torch import Generator, Tensor

from ..control import Problem
from .costs import Field
from .density import Density


class Kinetic(Problem):
    """f = u and L = transport |u|^2 / 2 + preference(z), from samples of a density.

    A subclass sets `source`, `preference` and `transport`.
    """

    source: Density
    preference: Field | None
    transport: float

    def initial(self, count: int, generator: Generator) -> Tensor:
        """Samples of the initial density, (count, dim) in double precision."""
        return self.source.sample(count, generator).double()

    def dynamics(self, t: Tensor, z: Tensor, u: Tensor) -> Tensor:
        """u."""
        return u

    def running_cost(self, t: Tensor, z: Tensor, u: Tensor) -> Tensor:
        """Kinetic energy, weighted, and preference, (batch,)."""
        kinetic = 0.5 * self.transport * u.square().sum(1)
        return kinetic if self.preference is None else kinetic + self.preference(z)

    def feedback(self, t: Tensor, z: Tensor, p: Tensor) -> Tensor:
        """-p / transport."""
        return -p / self.transport
