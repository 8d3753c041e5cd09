"""Densities, classification, regression and time series with the interface of scikit-learn."""

from .densities import ConditionalFlowDensity as ConditionalFlowDensity
from .densities import FlowDensity as FlowDensity
from .networks import ContinuousClassifier as ContinuousClassifier
from .networks import ContinuousRegressor as ContinuousRegressor
from .trajectories import Forecast as Forecast
from .trajectories import TrajectoryRegressor as TrajectoryRegressor

__all__ = [
    "ConditionalFlowDensity",
    "ContinuousClassifier",
    "ContinuousRegressor",
    "FlowDensity",
    "Forecast",
    "TrajectoryRegressor",
]
