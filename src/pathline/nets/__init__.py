"""Parametrised functions."""

from .autodiff import AutodiffPotential as AutodiffPotential
from .conjugate import conjugate as conjugate
from .convex import ConvexDerivatives as ConvexDerivatives
from .convex import ConvexPotential as ConvexPotential
from .convex import Gates as Gates
from .embedding import Embedding as Embedding
from .potential import Derivatives as Derivatives
from .potential import Potential as Potential
from .trace import row_space as row_space
from .velocity import FreeVelocity as FreeVelocity
from .velocity import GradientVelocity as GradientVelocity
from .velocity import hutch_plus_plus as hutch_plus_plus
from .velocity import hutchinson as hutchinson
from .velocity import products as products

__all__ = [
    "AutodiffPotential",
    "ConvexDerivatives",
    "ConvexPotential",
    "Derivatives",
    "Embedding",
    "FreeVelocity",
    "Gates",
    "GradientVelocity",
    "Potential",
    "conjugate",
    "hutch_plus_plus",
    "hutchinson",
    "products",
    "row_space",
]
