"""Agents that go to their targets without touching each other or an obstacle.

Source: Onken et al., A neural network approach for high-dimensional optimal control, IEEE TCST
2022 (arXiv 2104.03270), section IV; starts, targets and weights as in its code, NeuralOC.
"""

import copy
import math
from collections.abc import Sequence

import torch
from scipy.optimize import linear_sum_assignment
from torch import Generator, Tensor

from .particle import Particle


class Agents(Particle):
    """dz/dt = u for agents in the plane or in space: L = |u|^2 / 2 + Q(z) + W(z), G = weight
    |z - target|^2 / 2.

    W = sum over pairs of agents that touch, D < 2 radius, of `repulsion`
    exp(-D^2 / (2 radius^2)). In training radii are larger by `margin`, which keeps agents further
    apart than they must be, and W begins at zero, as a descent does not see a jump; `evaluation`
    is without both.

    Args:
        start, target: positions of all agents, (agents, space).
        radius: of an agent.
        terminal, repulsion: weights.
        spread: standard deviation of starts.
        margin: of the radii in training; NeuralOC has 1.1.
    """

    def __init__(
        self,
        start: Sequence[Sequence[float]],
        target: Sequence[Sequence[float]],
        radius: float,
        *,
        terminal: float,
        repulsion: float,
        spread: float = 1.0,
        margin: float = 1.1,
    ) -> None:
        self.count, self.space = len(start), len(start[0])
        self.dim = self.count * self.space
        self.start = torch.tensor(start, dtype=torch.float64).flatten()
        self.target = torch.tensor(target, dtype=torch.float64).flatten()
        self.radius, self.terminal, self.repulsion = radius, terminal, repulsion
        self.spread, self.margin = spread, margin
        self.pairs = torch.triu_indices(self.count, self.count, 1)

    def initial(self, count: int, generator: Generator) -> Tensor:
        """Starts around `start` at which no agents touch: what these would cost can't be helped,
        and would hide the rest."""
        found = [super().initial(0, generator)]
        while sum(map(len, found)) < count:
            z = super().initial(count, generator)
            found.append(z[self.evaluation().clearance(z) > 0])
        return torch.cat(found)[:count]

    def running_cost(self, t: Tensor, z: Tensor, u: Tensor) -> Tensor:
        scaled = self.squared_distances(z) / (2 * self.radius**2)
        W = self.bump(scaled, 2 * self.margin**2).sum(1)
        return 0.5 * u.square().sum(1) + self.obstacle_cost(self.positions(z)) + self.repulsion * W

    def terminal_cost(self, z: Tensor) -> Tensor:
        return 0.5 * self.terminal * (z - self.target.to(z)).square().sum(1)

    def bump(self, x: Tensor, edge: float) -> Tensor:
        """e^-x for x below the edge; in training less its value there."""
        height = torch.exp(-x) - (math.exp(-edge) if self.margin > 1 else 0.0)
        return torch.where(x < edge, height, 0)

    def obstacle_cost(self, a: Tensor) -> Tensor:
        """Q of positions `a` (batch, agents, space), (batch,)."""
        return a.new_zeros(len(a))

    def obstacle_clearance(self, a: Tensor) -> Tensor:
        """Distance of each position to the nearest obstacle, (batch, agents)."""
        return a.new_full(a.shape[:2], math.inf)

    def positions(self, z: Tensor) -> Tensor:
        """States (batch, dim) as (batch, agents, space)."""
        return z.view(len(z), self.count, self.space)

    def squared_distances(self, z: Tensor) -> Tensor:
        """Between the agents of each pair, (batch, pairs)."""
        a = self.positions(z)
        i, j = self.pairs
        return (a[:, i] - a[:, j]).square().sum(2)

    def clearance(self, z: Tensor) -> Tensor:
        """How far the agents are from touching another one or an obstacle; negative where they
        do, (batch,)."""
        a = self.positions(z)
        apart = self.squared_distances(z).sqrt() - 2 * self.radius
        return torch.cat([apart, self.obstacle_clearance(a)], 1).amin(1)

    def evaluation(self) -> "Agents":
        """The same problem without the margins of training."""
        exact = copy.copy(self)
        exact.margin = 1.0
        return exact


class Corridor(Agents):
    """Two agents pass between hills, Q = 10^4 times four Gaussian densities. The local optimum
    from the nominal start costs 61.33."""

    name = "corridor"
    hills = ((-2.5, 0.0), (-1.5, 0.0), (1.5, 0.0), (2.5, 0.0))
    variance, height = 0.2, 1e4

    def __init__(self) -> None:
        start, target = [(-2.0, -2.0), (2.0, -2.0)], [(2.0, 2.0), (-2.0, 2.0)]
        super().__init__(start, target, 0.5, terminal=100.0, repulsion=300.0, margin=1.2)

    def obstacle_cost(self, a: Tensor) -> Tensor:
        squared = (a[:, :, None] - a.new_tensor(self.hills)).square().sum(3)
        peak = self.height / (2 * math.pi * self.variance)
        return peak * torch.exp(-squared / (2 * self.variance)).sum((1, 2))


class Swap2(Agents):
    """Two agents change places through a gap between two discs."""

    name = "swap2"
    discs = ((0.0, 4.0), (0.0, -3.5))
    disc_radius, height = 2.0, 1e6

    def __init__(self) -> None:
        start, target = [(-10.0, 0.0), (10.0, 0.0)], [(10.0, 0.0), (-10.0, 0.0)]
        super().__init__(start, target, 1.0, terminal=300.0, repulsion=1e5)

    def obstacle_cost(self, a: Tensor) -> Tensor:
        # In training an agent has its radius, in evaluation it is a point, as in NeuralOC.
        reach = self.disc_radius + (self.radius if self.margin > 1 else 0.0)
        return (
            self.height / (2 * math.pi) * self.bump(self._to_discs(a) / 2, reach**2 / 2).sum((1, 2))
        )

    def obstacle_clearance(self, a: Tensor) -> Tensor:
        return self._to_discs(a).amin(2).sqrt() - self.disc_radius

    def _to_discs(self, a: Tensor) -> Tensor:
        return (a[:, :, None] - a.new_tensor(self.discs)).square().sum(3)


class Swap12(Agents):
    """Six pairs of agents change places, 24 dimensions."""

    name = "swap12"

    def __init__(self) -> None:
        start = [
            (0, 0), (2, 2), (-10, 0), (10, 0), (-5, -5), (5, 5),
            (-6, -1), (-4, 2), (-5, 5), (5, -5), (-2, -2), (2, -2),
        ]  # fmt: skip
        target = [start[i + 1 if i % 2 == 0 else i - 1] for i in range(12)]
        super().__init__(start, target, 0.5, terminal=300.0, repulsion=1e5)


class Swarm50(Agents):
    """Fifty agents in space fly past two blocks, 150 dimensions.

    Margins are wide, so that agents stay apart from all starts.
    """

    name = "swarm50"
    # Lower and upper corners; NeuralOC has no lower end in height.
    blocks = (((-2.0, -0.5, -math.inf), (2.0, 0.5, 7.0)), ((2.0, -1.0, -math.inf), (4.0, 1.0, 4.0)))
    height = 1e4

    def __init__(self) -> None:
        upper = [
            *((x, 2, 6) for x in (-2, -1, 0, 1, 2, 3, 4)),
            *((x, 3, 7) for x in (-2.5, -1.5, -0.5, 0.5, 1.5, 2.5, 3.5)),
            *((x, 4, 8) for x in (-2, -1, 0, 1, 2, 3, 4)),
            *((x, 3, 5) for x in (-2, -1, 1, 2)),
        ]
        target = [*upper, *((x, y - 0.5, z - 3) for x, y, z in upper)]
        start = [(x, -y, 10 - z) for x, y, z in target]
        super().__init__(
            start, target, 0.1, terminal=900.0, repulsion=25_000.0, spread=0.1, margin=2.5
        )

    def guess(self, steps: int) -> Tensor:
        """Each agent flies straight to a gate between or above the blocks, and on to its target.

        The gates are those points of a grid at which the sum of squared lengths is least.
        """
        apart = 2 * self.radius * self.margin
        x, z = torch.arange(-4, 6, apart), torch.arange(0, 11, apart)
        gates = torch.cartesian_prod(x, torch.zeros(1), z).double()
        gates = gates[self.obstacle_clearance(gates[None])[0] > apart]
        start, target = self.nominal().view(-1, 3), self.target.view(-1, 3)
        lengths = torch.cdist(start, gates) + torch.cdist(target, gates)
        _, chosen = linear_sum_assignment(lengths.square().numpy())
        via = gates[chosen]
        t = torch.linspace(0, 2, steps + 1, dtype=torch.float64)[:, None, None]
        path = torch.where(t < 1, start.lerp(via, t), via.lerp(target, t - 1))
        return steps * path.diff(dim=0).flatten(1)

    def obstacle_cost(self, a: Tensor) -> Tensor:
        depth = (self.margin - 1) * 2 * self.radius - self.obstacle_clearance(a)
        return self.height * depth.clamp_min(0).sum(1)

    def obstacle_clearance(self, a: Tensor) -> Tensor:
        low, high = a.new_tensor(self.blocks).unbind(1)  # (blocks, 3)
        beyond = torch.maximum(low - a[:, :, None], a[:, :, None] - high)  # by each side
        inside = beyond.amax(3)
        outside = beyond.clamp_min(0).norm(dim=3)
        return torch.where(inside > 0, outside, inside).amin(2)
