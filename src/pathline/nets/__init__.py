"""Parametrised functions."""

from .autodiff import AutodiffPotential as AutodiffPotential
from .potential import Derivatives as Derivatives
from .potential import Potential as Potential

__all__ = ["AutodiffPotential", "Derivatives", "Potential"]
