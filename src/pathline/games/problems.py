"""Games that commands know by their names."""

import math
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.distributions import Categorical, Independent, MixtureSameFamily, Normal

from ..control import Weights
from ..control.problems import Named
from ..control.problems import make as make_problem
from ..control.problems import settings as settings_of
from ..errors import ArgumentError
from .game import MeanFieldGame
from .stochastic import StochasticGame

VARIANCE = 0.3
OBSTACLE = (1.0, 0.5)  # variances of the obstacle of crowd motion


def transport(dim: int = 2) -> MeanFieldGame:
    """Eight Gaussians on a circle of radius 4 move to one in the middle; all other coordinates
    are alike at both times. The optimum costs 10.67 in every dimension: transport 10.04, terminal
    0.63, by a semi-relaxed Sinkhorn solution on a grid."""
    _demand_plane(dim)
    angles = torch.arange(8, dtype=torch.float64) * math.pi / 4
    centres = torch.zeros(8, dim, dtype=torch.float64)
    centres[:, 0], centres[:, 1] = 4 * angles.cos(), 4 * angles.sin()
    parts = Independent(Normal(centres, math.sqrt(VARIANCE)), 1)
    ring = MixtureSameFamily(Categorical(logits=torch.zeros(8, dtype=torch.float64)), parts)
    return MeanFieldGame(
        ring, _ball(dim, 0.0), transport=2.0, terminal_weight=5.0, name="transport"
    )


def crowd_motion(dim: int = 2, strength: float = 1.0) -> MeanFieldGame:
    """A crowd passes an obstacle, 50 times a Gaussian density in the first two coordinates, times
    `strength`."""
    _demand_plane(dim)
    return MeanFieldGame(
        _ball(dim, 3.0), _ball(dim, -3.0), preference=partial(_obstacle, strength), entropy=0.01,
        name="crowd-motion",
    )  # fmt: skip


def shift(dim: int = 2) -> MeanFieldGame:
    """A Gaussian moves by 6; the value function is a quadratic. With a relaxed end it moves by 6
    less 0.3396: transport 16.02, terminal 0.961."""
    _demand_plane(dim)
    return MeanFieldGame(_ball(dim, 3.0), _ball(dim, -3.0), name="shift")


def stochastic_crowd(
    dim: int = 2, viscosity: float = 0.1, congestion: float = 10.0
) -> StochasticGame:
    """Agents in noise pass the same obstacle and avoid each other, drawn to the other side by
    1.5 |z - (0, -3)|^2 in the plane."""
    _demand_plane(dim)
    return StochasticGame(
        _ball(dim, 3.0), _far, preference=partial(_obstacle, 1.0), congestion=congestion,
        viscosity=viscosity, name="stochastic-crowd",
    )  # fmt: skip


def _far(z: Tensor) -> Tensor:
    return 1.5 * (z[:, 0].square() + (z[:, 1] + 3).square())


def _obstacle(strength: float, z: Tensor) -> Tensor:
    a, b = OBSTACLE
    height = 50 * strength / (2 * math.pi * math.sqrt(a * b))
    return height * torch.exp(-0.5 * (z[:, 0].square() / a + z[:, 1].square() / b))


def _ball(dim: int, height: float) -> Independent:
    """N((0, height, 0, ...), VARIANCE I)."""
    centre = torch.zeros(dim, dtype=torch.float64)
    centre[1] = height
    return Independent(Normal(centre, torch.full_like(centre, math.sqrt(VARIANCE))), 1)


def _demand_plane(dim: int) -> None:
    if dim < 2:
        raise ArgumentError(f"`dim` must be at least 2, got {dim}")


LEARNING = {"width": 32, "steps": 4, "batch_size": 1024, "max_steps": 1500}


def _strong(game: MeanFieldGame) -> dict[str, Any]:
    """For an obstacle round which the crowd has to go on both sides."""
    assert game.made is not None
    if game.made["options"].get("strength", 1.0) <= 1:
        return {}
    weights = Weights(hjb=1.0, terminal=1.0, terminal_gradient=0.0)
    return {"weights": weights, "steps": 8, "learning_rate": 0.03}


GAMES: dict[str, Named] = {
    "transport": Named(
        transport,
        "eight Gaussians move to one, in any dimension",
        frozenset({"dim"}),
        LEARNING
        | {"weights": Weights(hjb=3.0, terminal=3.0, terminal_gradient=0.0), "learning_rate": 0.03},
    ),
    "crowd-motion": Named(
        crowd_motion,
        "a crowd passes an obstacle, in any dimension",
        frozenset({"dim", "strength"}),
        LEARNING
        | {
            "weights": Weights(hjb=20.0, terminal=1.0, terminal_gradient=0.0),
            "learning_rate": 0.05,
        },
        _strong,
    ),
    "shift": Named(
        shift,
        "a Gaussian moves to another place; its value function is a quadratic",
        frozenset({"dim"}),
        LEARNING
        | {
            "weights": Weights(hjb=3.0, terminal=3.0, terminal_gradient=0.0),
            "learning_rate": 0.1,
            "max_steps": 600,
        },
    ),
}


def make(name: str, **options: Any) -> MeanFieldGame:
    """The game of that name; None stands for the default of an option.

    Raises:
        ArgumentError: there is no such game, or it has no such option.
    """
    game = make_problem(name, GAMES, **options)
    assert isinstance(game, MeanFieldGame)
    return game


def settings(game: MeanFieldGame) -> dict[str, Any]:
    """Arguments of `control.solve` that suit a game which `make` built."""
    return settings_of(game, GAMES)
