"""Mean-field games: populations whose costs see their own density."""

from .check import GameCheck as GameCheck
from .density import Density as Density
from .equilibrium import Crowd as Crowd
from .equilibrium import Equilibrium as Equilibrium
from .game import MeanFieldGame as MeanFieldGame

__all__ = ["Crowd", "Density", "Equilibrium", "GameCheck", "MeanFieldGame"]
