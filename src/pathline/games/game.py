"""Potential mean-field games: what a population pays."""

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..control import Interaction, Policy
from ..control.check import ProblemCheck
from ..errors import ArgumentError, DataError, require_nonnegative
from ..nets import Derivatives
from .costs import Field, closeness, try_cost
from .density import Density, Given
from .kinetic import Kinetic

PROBED = 256  # states at which a density or a preference is tried


class MeanFieldGame(Kinetic):
    """Minimise over velocities u and the density rho that they carry from `initial`

        transport E int |u|^2 / 2 dt + E int preference(z) dt + entropy int int rho log rho dx dt
        + congestion / 2 int E E' k(z - z') dt + terminal_weight KL(rho(1) || terminal),

    k(y) = 1 / (1 + |y|^2) in the first two coordinates, E and E' over independent particles. At
    the optimum each particle minimises its own cost given the density: u = -grad Phi / transport
    with -d_t Phi + |grad Phi|^2 / (2 transport) = dF / drho and Phi(1) = dG / drho.

    Args:
        initial: density at time 0: a `torch.distributions` distribution of vectors, a trained flow
            without context, or samples (rows, dim), from which a Gaussian kernel density is made
            (in more than a few dimensions train a flow instead).
        terminal: the density to end at, likewise.
        preference: cost of being at states (batch, dim), (batch,); none if None.
        entropy: weight of the entropy, which spreads the population.
        congestion: weight of the cost of being close to others.
        transport: weight of the kinetic energy.
        terminal_weight: of the Kullback-Leibler divergence at the end.
        name: of the game, in reports.

    Raises:
        ArgumentError: a weight is negative or not finite, or the densities are not of vectors of
            the same dimension.
        DataError: the terminal log-density is not finite where particles start.
        ShapeError: the preference is not (batch,).

    Source: Ruthotto, Osher, Li, Nurbekyan, Wu Fung, A machine learning framework for solving
    high-dimensional mean field game and mean field control problems, PNAS 2020 (arXiv 1912.01825),
    equations (1) to (6); the congestion of Lin et al., APAC-Net (arXiv 2002.10113).
    """

    def __init__(
        self,
        initial: Given,
        terminal: Given,
        preference: Field | None = None,
        entropy: float = 0.0,
        transport: float = 1.0,
        terminal_weight: float = 5.0,
        congestion: float = 0.0,
        name: str = "mean-field game",
    ) -> None:
        require_nonnegative(
            entropy=entropy, transport=transport, terminal_weight=terminal_weight,
            congestion=congestion,
        )  # fmt: skip
        if transport == 0:
            raise ArgumentError("`transport` must be positive, got 0: velocities would be free")
        self.source, self.target = Density(initial, "initial"), Density(terminal, "terminal")
        self.dim = self.source.dim
        if self.target.dim != self.dim:
            raise ArgumentError(
                f"`initial` and `terminal` must have the same dimension, got {self.dim} and "
                f"{self.target.dim}"
            )
        self.preference, self.name = preference, name
        self.entropy, self.transport = entropy, transport
        self.terminal_weight, self.congestion = terminal_weight, congestion
        self.interaction = Crowding(self)
        x = self.initial(PROBED, torch.Generator().manual_seed(0))
        self.start, self.spread = x.mean(0), x.std(0)
        self._probe(x)

    def _probe(self, x: Tensor) -> None:
        """Try densities and preference where particles start."""
        with torch.no_grad():
            for key, part in (("initial", self.source), ("terminal", self.target)):
                bad = ~torch.isfinite(part.log_prob(x))
                if bool(bad.any()):
                    raise DataError(
                        f"the log-density of `{key}` must be finite where particles start, it is "
                        f"not at {int(bad.sum())} of {len(x)} samples, such as "
                        f"{x[bad][0].tolist()[:4]}"
                    )
        if self.preference is not None:
            try_cost("preference", self.preference, x)

    def terminal_cost(self, z: Tensor) -> Tensor:
        """What of the divergence does not depend on the density: -log of the terminal one,
        weighted, (batch,)."""
        return -self.terminal_weight * self.target.log_prob(z)

    def divergence(
        self, t: Tensor, z: Tensor, phi: Derivatives, velocity: Callable[[Tensor], Tensor]
    ) -> Tensor:
        """Of the velocity -grad Phi / transport, (batch,)."""
        assert phi.laplacian is not None
        return -phi.laplacian / self.transport

    def without_interaction(self) -> "MeanFieldGame":
        """The same game without the costs that see the density, for following particles."""
        free = copy.copy(self)
        free.interaction = None
        return free

    def terms(self, z: Tensor, u: Tensor, log_density: Tensor) -> dict[str, Tensor]:
        """Mean rates of cost of each kind at several times, weighted, (times,) each.

        Args:
            z, u: states and velocities, (times, batch, dim).
            log_density: of the population there, (times, batch).
        """
        zero = log_density.new_zeros(len(z))
        wanted, crowded = self.preference, self.congestion
        return {
            "transport": 0.5 * self.transport * u.square().sum(2).mean(1),
            "preference": zero if wanted is None else torch.stack([wanted(y).mean() for y in z]),
            "entropy": self.entropy * log_density.mean(1),
            "congestion": torch.stack([congestion(y).mean() for y in z]) * crowded / 2
            if crowded
            else zero,
        }

    def check(self, *, seed: int = 0) -> ProblemCheck:
        """See `Problem.check`."""
        self._probe(self.initial(PROBED, torch.Generator().manual_seed(seed)))
        return super().check(seed=seed)

    def policy(self, width: int = 32, depth: int = 2, **arguments: Any) -> Policy:
        """A new `Equilibrium`, as `control.solve` trains it."""
        from .equilibrium import Equilibrium  # which follows a game

        return Equilibrium(self, width, depth, **arguments)


class Crowding(Interaction):
    """Entropy and congestion on the way, and the entropy in the divergence at the end."""

    def __init__(self, game: MeanFieldGame) -> None:
        self.game = game

    def initial_log_density(self, x: Tensor) -> Tensor:
        return self.game.source.log_prob(x)

    def running(self, z: Tensor, log_density: Tensor) -> tuple[Tensor, Tensor]:
        game = self.game
        share, variation = game.entropy * log_density, game.entropy * (log_density + 1)
        if game.congestion:
            crowd = game.congestion * congestion(z)
            share, variation = share + crowd / 2, variation + crowd
        return share, variation

    def terminal(self, z: Tensor, log_density: Tensor) -> tuple[Tensor, Tensor]:
        weight = self.game.terminal_weight
        return weight * log_density, weight * (log_density + 1)


def congestion(z: Tensor) -> Tensor:
    """Mean over the other rows y of 1 / (1 + |z - y|^2) in the first two coordinates, (batch,)."""
    return (len(z) * closeness(z, z) - 1) / max(len(z) - 1, 1)
