"""Parametrised functions."""

from .autodiff import AutodiffPotential as AutodiffPotential
from .potential import Derivatives as Derivatives
from .potential import Potential as Potential
from .trace import row_space as row_space

__all__ = ["AutodiffPotential", "Derivatives", "Potential", "row_space"]
