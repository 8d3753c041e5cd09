"""Densities, classification and regression with the interface of scikit-learn."""

from .densities import ConditionalFlowDensity as ConditionalFlowDensity
from .densities import FlowDensity as FlowDensity
from .networks import ContinuousClassifier as ContinuousClassifier
from .networks import ContinuousRegressor as ContinuousRegressor

__all__ = [
    "ConditionalFlowDensity",
    "ContinuousClassifier",
    "ContinuousRegressor",
    "FlowDensity",
]
