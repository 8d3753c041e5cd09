"""Integration of dz/dt = v(t, z) and of quantities that ride along."""

from .march import March as March
from .march import march as march
from .methods import METHODS as METHODS
from .odeint import odeint as odeint
from .odeint import odeint_adjoint as odeint_adjoint
from .solution import Solution as Solution
from .solution import Statistics as Statistics
from .solution import Status as Status
from .tableaus import EULER as EULER
from .tableaus import MIDPOINT as MIDPOINT
from .tableaus import RK4 as RK4
from .tableaus import Tableau as Tableau

__all__ = [
    "EULER",
    "METHODS",
    "MIDPOINT",
    "RK4",
    "March",
    "Solution",
    "Statistics",
    "Status",
    "Tableau",
    "march",
    "odeint",
    "odeint_adjoint",
]
