"""Named control problems.

Adding one: its class, and its entry in `PROBLEMS`.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from ...errors import ArgumentError, unknown
from ..objective import Weights
from ..problem import Problem
from .agents import Agents as Agents
from .agents import Corridor as Corridor
from .agents import Swap2 as Swap2
from .agents import Swap12 as Swap12
from .agents import Swarm50 as Swarm50
from .analytic import LinearQuadratic as LinearQuadratic
from .analytic import LogBenchmark as LogBenchmark
from .hill import Hill as Hill
from .neuron import Neuron as Neuron
from .quadcopter import Quadcopter as Quadcopter

__all__ = [
    "PROBLEMS",
    "Agents",
    "Corridor",
    "Hill",
    "LinearQuadratic",
    "LogBenchmark",
    "Named",
    "Neuron",
    "Quadcopter",
    "Swap2",
    "Swap12",
    "Swarm50",
    "make",
    "settings",
]


@dataclass(frozen=True)
class Named:
    """A problem that commands know by its name.

    `make(**options)` builds it; `settings` are arguments of `control.solve` that suit it on two
    CPU cores, and `special` gives those that depend on the options.
    """

    make: Callable[..., Problem]
    summary: str
    options: frozenset[str] = frozenset()
    settings: dict[str, Any] = field(default_factory=dict)
    special: Callable[[Any], dict[str, Any]] | None = None


STOCHASTIC = Weights(hjb=1.0, terminal=1.0)
# In many dimensions the Laplacian takes long, and a sum over them is near its mean.
MANY = Weights(hjb=0.0, terminal=1.0, terminal_gradient=0.0, bsde=20.0)
FEW = Weights(hjb=5.0, terminal=5.0)
COLE_HOPF = {"width": 64, "base": "none", "learning_rate": 0.02}
# Where noise makes explicit steps of a stiff feedback diverge, what counts is the cost.
NOISY_FLIGHT = {
    "base": "path",
    "steps": 200,
    "max_steps": 150,
    "learning_rate": 0.01,
    "weights": Weights(hjb=0.0, terminal=0.0, terminal_gradient=0.0),
}


def _flight(problem: Quadcopter) -> dict[str, Any]:
    return {} if problem.noise is None else NOISY_FLIGHT


def _benchmark(problem: LogBenchmark) -> dict[str, Any]:
    many = problem.dim > 32
    return {"weights": MANY, "steps": 20} if many else {"weights": FEW, "steps": 10}


PROBLEMS: dict[str, Named] = {
    "lqr": Named(
        LinearQuadratic,
        "linear dynamics, quadratic costs, with noise if asked for; solved by Riccati's equation",
        frozenset({"dim", "noise"}),
        {"max_steps": 300},
    ),
    "corridor": Named(
        Corridor, "two agents pass between hills and avoid each other", settings={"max_steps": 1500}
    ),
    # Agents that touch pay much at once: short time steps, and small rates from an open-loop path.
    "swap2": Named(
        Swap2,
        "two agents change places through a gap",
        settings={"max_steps": 600, "steps": 40, "batch_size": 128, "learning_rate": 0.003},
    ),
    "swap12": Named(
        Swap12,
        "six pairs of agents change places, 24 dimensions",
        settings={"max_steps": 400, "steps": 40, "batch_size": 128, "learning_rate": 0.002},
    ),
    "swarm50": Named(
        Swarm50,
        "fifty agents fly past two blocks, 150 dimensions",
        settings={"max_steps": 100, "steps": 40, "batch_size": 64, "learning_rate": 0.001},
    ),
    "quadcopter": Named(
        Quadcopter,
        "a quadcopter flies to a point and stops, 12 dimensions, with noise if asked for",
        frozenset({"noise"}),
        # The quadratic part is within 0.2 % of the optimum; at high rates a network would learn
        # to cheat the time steps instead.
        {"width": 64, "steps": 40, "max_steps": 100, "batch_size": 128, "learning_rate": 0.001},
        _flight,
    ),
    "neuron": Named(
        Neuron,
        "a pathological neuron is steered to what a healthy one does, by deep brain stimulation",
        frozenset({"limit"}),
        {"base": "path", "steps": 600, "batch_size": 16, "max_steps": 20, "learning_rate": 0.001},
    ),
    "hill": Named(
        Hill,
        "a noisy particle passes a hill",
        settings={
            "base": "none",
            "weights": STOCHASTIC,
            "learning_rate": 0.03,
            "max_steps": 2000,
        },
    ),
    "benchmark": Named(
        LogBenchmark,
        "the 100-dimensional benchmark of stochastic control, solved by the Cole-Hopf transform",
        frozenset({"dim"}),
        COLE_HOPF | {"max_steps": 1000},
        _benchmark,
    ),
    "modified-benchmark": Named(
        partial(LogBenchmark, modified=True),
        "the same with a steep terminal cost far from the start",
        frozenset({"dim"}),
        # The terminal cost is so steep that the way to second order around the open-loop path is
        # nearly the value function; explicit steps must be short at the end.
        {"base": "path", "steps": 40, "max_steps": 100, "learning_rate": 0.0005, "weights": MANY},
    ),
}


def make(name: str, problems: Mapping[str, Named] = PROBLEMS, /, **options: Any) -> Problem:
    """The problem of that name; None stands for the default of an option.

    Raises:
        ArgumentError: there is no such problem, or it has no such option.
    """
    if name not in problems:
        raise ArgumentError(unknown("problem", name, problems))
    given = {key: value for key, value in options.items() if value is not None}
    foreign = sorted(given.keys() - problems[name].options)
    if foreign:
        raise ArgumentError(f"the problem {name!r} has no option {', '.join(foreign)}")
    problem = problems[name].make(**given)
    problem.made = {"name": name, "options": given}
    return problem


def settings(problem: Problem, problems: Mapping[str, Named] = PROBLEMS, /) -> dict[str, Any]:
    """Arguments of `control.solve` that suit a problem which `make` built."""
    assert problem.made is not None
    named = problems[problem.made["name"]]
    return named.settings | (named.special(problem) if named.special else {})
