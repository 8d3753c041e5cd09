"""Mean-field games: populations whose costs see their own density."""

from .alternation import solve_alternating as solve_alternating
from .check import GameCheck as GameCheck
from .density import Density as Density
from .equilibrium import Crowd as Crowd
from .equilibrium import Equilibrium as Equilibrium
from .eulerian import Cost as Cost
from .eulerian import EulerianGame as EulerianGame
from .eulerian import EulerianSolution as EulerianSolution
from .eulerian import Pushed as Pushed
from .game import MeanFieldGame as MeanFieldGame
from .population import Population as Population
from .population import PopulationCheck as PopulationCheck
from .stochastic import StochasticGame as StochasticGame

__all__ = [
    "Cost",
    "Crowd",
    "Density",
    "Equilibrium",
    "EulerianGame",
    "EulerianSolution",
    "GameCheck",
    "MeanFieldGame",
    "Population",
    "PopulationCheck",
    "Pushed",
    "StochasticGame",
    "solve_alternating",
]
