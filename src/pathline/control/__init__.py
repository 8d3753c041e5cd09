"""The engine: control problems, and particles under the feedback of a potential."""

from ..native import Adjoint as Adjoint
from .problem import Problem as Problem
from .rollout import Rollout as Rollout
from .rollout import rollout as rollout

__all__ = ["Adjoint", "Problem", "Rollout", "rollout"]
