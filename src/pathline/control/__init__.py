"""The engine: control problems, and particles under the feedback of a potential."""

from .problem import Problem as Problem
from .rollout import Rollout as Rollout
from .rollout import rollout as rollout

__all__ = ["Problem", "Rollout", "rollout"]
