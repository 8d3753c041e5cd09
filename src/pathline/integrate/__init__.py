"""Integration of dz/dt = v(t, z), and of quantities and noise that ride along."""

from .checkpoint import Plan as Plan
from .imex import Split as Split
from .march import March as March
from .march import graded as graded
from .march import march as march
from .march import time_nodes as time_nodes
from .methods import METHODS as METHODS
from .odeint import odeint as odeint
from .odeint import odeint_adjoint as odeint_adjoint
from .sde import SDE_METHODS as SDE_METHODS
from .sde import BrownianPath as BrownianPath
from .sde import sdeint as sdeint
from .solution import Solution as Solution
from .solution import Statistics as Statistics
from .solution import Status as Status
from .structured import Separable as Separable
from .tableaus import EULER as EULER
from .tableaus import MIDPOINT as MIDPOINT
from .tableaus import RK4 as RK4
from .tableaus import Tableau as Tableau
from .undo import undo as undo

__all__ = [
    "EULER",
    "METHODS",
    "MIDPOINT",
    "RK4",
    "SDE_METHODS",
    "BrownianPath",
    "March",
    "Plan",
    "Separable",
    "Solution",
    "Split",
    "Statistics",
    "Status",
    "Tableau",
    "graded",
    "march",
    "odeint",
    "odeint_adjoint",
    "sdeint",
    "time_nodes",
    "undo",
]
