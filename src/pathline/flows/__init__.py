"""Continuous normalizing flows."""

from .check import Check as Check
from .cnf import CNF as CNF
from .cnf import FAMILY as FAMILY
from .cnf import FFJORD as FFJORD
from .cnf import RNODE as RNODE
from .cnf import MongeAmpere as MongeAmpere
from .cnf import PotentialFlow as PotentialFlow
from .cnf_objective import CNFObjective as CNFObjective
from .conditional import ConditionalOTFlow as ConditionalOTFlow
from .distribution import FlowDistribution as FlowDistribution
from .distribution import FlowTransform as FlowTransform
from .flow import Flow as Flow
from .joint import JointMap as JointMap
from .map import TransportMap as TransportMap
from .matching import FlowMatching as FlowMatching
from .objective import FlowObjective as FlowObjective
from .otflow import OTFlow as OTFlow
from .pcp import PCPMap as PCPMap
from .pcp import PCPObjective as PCPObjective
from .standardize import Standardize as Standardize
from .transport import Transport as Transport

__all__ = [
    "CNF",
    "FAMILY",
    "FFJORD",
    "RNODE",
    "CNFObjective",
    "Check",
    "ConditionalOTFlow",
    "Flow",
    "FlowDistribution",
    "FlowMatching",
    "FlowObjective",
    "FlowTransform",
    "JointMap",
    "MongeAmpere",
    "OTFlow",
    "PCPMap",
    "PCPObjective",
    "PotentialFlow",
    "Standardize",
    "Transport",
    "TransportMap",
]
