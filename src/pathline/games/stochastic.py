"""Stochastic mean-field games: what agents in noise pay."""

import math
from typing import TYPE_CHECKING, Any

import torch
from torch import Generator, Tensor

from ..errors import ArgumentError, require_nonnegative
from .costs import Field, closeness, try_cost
from .density import Density, Given
from .kinetic import Kinetic

if TYPE_CHECKING:
    from .population import Population

PROBED = 256  # states at which costs are tried


class StochasticGame(Kinetic):
    """Each agent minimises, given the density rho of all of them,

        E int transport |u|^2 / 2 + preference(z) + crowding(z, rho) dt + E terminal_cost(z(T))

    subject to dz = u dt + sqrt(2 viscosity) dW, z(0) ~ initial, and rho is the density of agents
    who do so: u = -grad phi / transport with

        -d_t phi - viscosity lap phi + |grad phi|^2 / (2 transport) = preference + crowding,
        d_t rho - viscosity lap rho - div(rho grad phi / transport) = 0,
        phi(T) = terminal_cost, rho(0) = initial.

    Args:
        initial: density at time 0; see `MeanFieldGame`.
        terminal_cost: of states (batch, dim) at the end, (batch,).
        preference: cost of being at states (batch, dim), (batch,); none if None.
        congestion: weight of the mean over others y of 1 / (1 + |z - y|^2) in the first two
            coordinates.
        viscosity: nu; without noise if 0.
        transport: weight of the kinetic energy.
        horizon: T.
        name: of the game, in reports.

    Raises:
        ArgumentError: a number is out of range, or `initial` is not a density.
        ShapeError: a cost is not (batch,).
        DataError: a cost is not finite where particles start.

    Source: Lin et al. (arXiv 2002.10113), equations (1) to (3), with a quadratic Hamiltonian.
    """

    solver = "games.solve_alternating"

    def __init__(
        self,
        initial: Given,
        terminal_cost: Field,
        preference: Field | None = None,
        congestion: float = 0.0,
        viscosity: float = 0.1,
        transport: float = 1.0,
        horizon: float = 1.0,
        name: str = "stochastic game",
    ) -> None:
        positive = {"transport": transport, "horizon": horizon}
        require_nonnegative(congestion=congestion, viscosity=viscosity, **positive)
        for key, value in positive.items():
            if value == 0:
                raise ArgumentError(f"`{key}` must be positive, got 0")
        self.source = Density(initial, "initial")
        self.dim, self.name = self.source.dim, name
        self.final, self.preference = terminal_cost, preference
        self.congestion, self.viscosity = congestion, viscosity
        self.transport, self.horizon = transport, horizon
        if viscosity:
            self.noise = math.sqrt(2 * viscosity) * torch.eye(self.dim, dtype=torch.float64)
        x = self.initial(PROBED, Generator().manual_seed(0))
        self.start, self.spread = x.mean(0), x.std(0)
        for key, cost in (("terminal_cost", terminal_cost), ("preference", preference)):
            if cost is not None:
                try_cost(key, cost, x)

    def terminal_cost(self, z: Tensor) -> Tensor:
        """As given, (batch,)."""
        return self.final(z)

    def crowding(self, z: Tensor, others: Tensor) -> Tensor:
        """What agents at `z` (batch, dim) pay for a population with particles at `others`
        (particles, dim), (batch,). A subclass may have another one.
        """
        if not self.congestion:
            return z.new_zeros(len(z))
        return self.congestion * closeness(z, others)

    def policy(self, width: int = 64, depth: int = 2, **arguments: Any) -> "Population":
        """A new `Population`, as `solve_alternating` trains it."""
        from .population import Population  # which follows a game

        return Population(self, width, depth, **arguments)
