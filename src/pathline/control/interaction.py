"""Costs of a population: what each particle pays depends on the density of all of them."""

from dataclasses import dataclass

from torch import Tensor

SMOOTH = 0.1


class Interaction:
    """Costs F(rho) along the way and G(rho) at the end beside those of a `Problem`.

    Each is given by its share for a particle, whose mean over the population is the cost, and by
    its first variation dF/drho at the particles, which is what the Hamilton-Jacobi-Bellman
    equation sees. Batches stand for the population: `z` is (batch, dim), `log_density` the
    logarithm of rho at these particles, (batch,).
    """

    def initial_log_density(self, x: Tensor) -> Tensor:
        """log rho at time 0 and states `x` (batch, dim), (batch,)."""
        raise NotImplementedError

    def running(self, z: Tensor, log_density: Tensor) -> tuple[Tensor, Tensor]:
        """Shares and first variations of F, (batch,) each."""
        raise NotImplementedError

    def terminal(self, z: Tensor, log_density: Tensor) -> tuple[Tensor, Tensor]:
        """Shares and first variations of G, (batch,) each."""
        raise NotImplementedError


@dataclass(frozen=True)
class _Node:
    z: Tensor
    weight: float  # in integrals over all steps
    residual: Tensor  # of the HJB equation without the population, with its sign
    rate: Tensor  # of the log-determinant


class Tally:
    """What a population pays along its way.

    The density at a node follows from the log-determinant, which is known when the nodes before
    are; so nodes are noted while particles move, and costs are counted afterwards. Nodes come as
    those of `integrate.march`: the start, then of each step its end and its middle.
    """

    def __init__(self, interaction: Interaction, log_density: Tensor, lengths: list[float]) -> None:
        self.interaction, self.log_density, self.lengths = interaction, log_density, lengths
        self.nodes: list[_Node] = []

    def note(self, z: Tensor, weight: float, residual: Tensor, rate: Tensor) -> None:
        """Keep a node."""
        self.nodes.append(_Node(z, weight, residual, rate))

    def count(self) -> tuple[Tensor, Tensor]:
        """The integrals of the shares and of |HJB residual|, (batch,) each."""
        first = self.nodes[0]
        cost, off = self._at(first, self.log_density)
        log_density, before = self.log_density, first.rate
        for n, h in enumerate(self.lengths):
            end, middle = self.nodes[2 * n + 1 : 2 * n + 3]
            # The parabola through the three rates, up to the middle and up to the end.
            half = h / 24 * (5 * before + 8 * middle.rate - end.rate)
            whole = h / 6 * (before + 4 * middle.rate + end.rate)
            for node, log_det in ((middle, half), (end, whole)):
                more, residual = self._at(node, log_density - log_det)
                cost, off = cost + more, off + residual
            log_density, before = log_density - whole, end.rate
        return cost, off

    def _at(self, node: _Node, log_density: Tensor) -> tuple[Tensor, Tensor]:
        share, variation = self.interaction.running(node.z, log_density)
        return node.weight * share, node.weight * size(node.residual + variation)


def size(residual: Tensor) -> Tensor:
    """|residual|, rounded within about `SMOOTH` of zero: a quasi-Newton method does not see a
    kink."""
    return (residual.square() + SMOOTH**2).sqrt() - SMOOTH
