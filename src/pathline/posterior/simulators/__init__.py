"""Simulators with known posteriors, likelihoods or references: tasks to measure methods by."""

from .bernoulli_glm import BERNOULLI_GLM
from .components import PrincipalComponents
from .gaussian import GAUSSIAN_LINEAR, GAUSSIAN_LINEAR_UNIFORM, GAUSSIAN_MIXTURE
from .lotka_volterra import LOTKA_VOLTERRA
from .priors import LogNormal, Normal, Uniform
from .shallow_water import SHALLOW_WATER
from .simulator import Simulator
from .sir import SIR
from .slcp import SLCP
from .stochastic_lotka_volterra import STOCHASTIC_LOTKA_VOLTERRA
from .two_moons import TWO_MOONS

SIMULATORS = {
    simulator.name: simulator
    for simulator in (
        TWO_MOONS,
        GAUSSIAN_LINEAR,
        GAUSSIAN_LINEAR_UNIFORM,
        GAUSSIAN_MIXTURE,
        SLCP,
        BERNOULLI_GLM,
        SIR,
        LOTKA_VOLTERRA,
        STOCHASTIC_LOTKA_VOLTERRA,
        SHALLOW_WATER,
    )
}

__all__ = [
    "SIMULATORS",
    "LogNormal",
    "Normal",
    "PrincipalComponents",
    "Simulator",
    "Uniform",
]
