"""Parametrised functions."""

from .autodiff import AutodiffPotential as AutodiffPotential
from .conjugate import conjugate as conjugate
from .convex import ConvexDerivatives as ConvexDerivatives
from .convex import ConvexPotential as ConvexPotential
from .convex import Gates as Gates
from .embedding import Embedding as Embedding
from .kernels import prolong_kernels as prolong_kernels
from .kernels import restrict_kernels as restrict_kernels
from .layers import ACTIVATIONS as ACTIVATIONS
from .layers import AntisymmetricLayer as AntisymmetricLayer
from .layers import ChannelNorm as ChannelNorm
from .layers import Layer as Layer
from .layers import ResidualLayer as ResidualLayer
from .layers import SymmetricLayer as SymmetricLayer
from .operators import CirculantConv as CirculantConv
from .operators import Conv as Conv
from .operators import Dense as Dense
from .operators import LeanConv as LeanConv
from .operators import Operator as Operator
from .operators import ShiftConv as ShiftConv
from .operators import operator_norm as operator_norm
from .potential import Derivatives as Derivatives
from .potential import Potential as Potential
from .time_weights import TimeBasis as TimeBasis
from .time_weights import TimeWeights as TimeWeights
from .trace import row_space as row_space
from .velocity import FreeVelocity as FreeVelocity
from .velocity import GradientVelocity as GradientVelocity
from .velocity import hutch_plus_plus as hutch_plus_plus
from .velocity import hutchinson as hutchinson
from .velocity import products as products
from .wavelet import Haar as Haar

__all__ = [
    "ACTIVATIONS",
    "AntisymmetricLayer",
    "AutodiffPotential",
    "ChannelNorm",
    "CirculantConv",
    "Conv",
    "ConvexDerivatives",
    "ConvexPotential",
    "Dense",
    "Derivatives",
    "Embedding",
    "FreeVelocity",
    "Gates",
    "GradientVelocity",
    "Haar",
    "Layer",
    "LeanConv",
    "Operator",
    "Potential",
    "ResidualLayer",
    "ShiftConv",
    "SymmetricLayer",
    "TimeBasis",
    "TimeWeights",
    "conjugate",
    "hutch_plus_plus",
    "hutchinson",
    "operator_norm",
    "products",
    "prolong_kernels",
    "restrict_kernels",
    "row_space",
]
