"""Mean-field games: populations whose costs see their own density."""

from .check import GameCheck as GameCheck
from .density import Density as Density
from .equilibrium import Crowd as Crowd
from .equilibrium import Equilibrium as Equilibrium
from .eulerian import Cost as Cost
from .eulerian import EulerianGame as EulerianGame
from .eulerian import EulerianSolution as EulerianSolution
from .eulerian import Pushed as Pushed
from .game import MeanFieldGame as MeanFieldGame

__all__ = [
    "Cost",
    "Crowd",
    "Density",
    "Equilibrium",
    "EulerianGame",
    "EulerianSolution",
    "GameCheck",
    "MeanFieldGame",
    "Pushed",
]
