"""Optimal control: problems, particles under the feedback of a value function, and policies."""

from ..native.rollouts import Adjoint as Adjoint
from .check import ProblemCheck as ProblemCheck
from .interaction import Interaction as Interaction
from .judge import PolicyCheck as PolicyCheck
from .minimise import minimise_controls as minimise_controls
from .objective import ValueObjective as ValueObjective
from .objective import Weights as Weights
from .policy import Policy as Policy
from .policy import Simulation as Simulation
from .problem import Problem as Problem
from .riccati import QuadraticValue as QuadraticValue
from .riccati import riccati_value as riccati_value
from .rollout import Rollout as Rollout
from .rollout import rollout as rollout
from .solve import solve as solve
from .transcription import OpenLoop as OpenLoop
from .transcription import transcribe as transcribe
from .value import ValueFunction as ValueFunction

__all__ = [
    "Adjoint",
    "Interaction",
    "OpenLoop",
    "Policy",
    "PolicyCheck",
    "Problem",
    "ProblemCheck",
    "QuadraticValue",
    "Rollout",
    "Simulation",
    "ValueFunction",
    "ValueObjective",
    "Weights",
    "minimise_controls",
    "riccati_value",
    "rollout",
    "solve",
    "transcribe",
]
