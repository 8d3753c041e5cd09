"""Continuous normalizing flows."""

from .check import Check as Check
from .distribution import FlowDistribution as FlowDistribution
from .objective import FlowObjective as FlowObjective
from .otflow import OTFlow as OTFlow
from .standardize import Standardize as Standardize
from .transport import Transport as Transport

__all__ = ["Check", "FlowDistribution", "FlowObjective", "OTFlow", "Standardize", "Transport"]
