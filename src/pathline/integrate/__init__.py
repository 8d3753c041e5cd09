"""Integration of dz/dt = v(t, z) and of quantities that ride along."""

from .march import March as March
from .march import march as march
from .methods import EULER as EULER
from .methods import METHODS as METHODS
from .methods import MIDPOINT as MIDPOINT
from .methods import RK4 as RK4
from .methods import Tableau as Tableau

__all__ = ["EULER", "METHODS", "MIDPOINT", "RK4", "March", "Tableau", "march"]
