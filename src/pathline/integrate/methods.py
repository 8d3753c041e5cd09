"""Every method by its name. Adding one: its object here, and nothing else."""

from typing import Any

from . import tableaus
from .explicit import RungeKutta
from .imex import ImexRungeKutta
from .implicit import ImplicitRungeKutta
from .multistep import Adams
from .structured import AsynchronousLeapfrog, Leapfrog, ReversibleMidpoint, Verlet

EXPLICIT = (
    *(tableaus.EULER, tableaus.MIDPOINT, tableaus.HEUN2, tableaus.HEUN3),
    *(tableaus.RK4, tableaus.RK4_38),
    *(tableaus.ADAPTIVE_HEUN, tableaus.FEHLBERG2, tableaus.BOSH3, tableaus.TSIT5),
    *(tableaus.DOPRI5, tableaus.DOPRI8),
)
IMPLICIT = (
    *(tableaus.IMPLICIT_EULER, tableaus.IMPLICIT_MIDPOINT, tableaus.TRAPEZOID),
    *(tableaus.RADAU_IIA3, tableaus.RADAU_IIA5, tableaus.GL4, tableaus.GL6),
    *(tableaus.SDIRK2, tableaus.TRBDF2),
    *(tableaus.ESDIRK3, tableaus.ESDIRK4, tableaus.ESDIRK5),
)
IMEX = (
    *(tableaus.IMEX_EULER, tableaus.ARS222, tableaus.ARS443),
    *(tableaus.IMEX_ARK3, tableaus.IMEX_ARK4, tableaus.IMEX_ARK5),
)
_OBJECTS: tuple[Any, ...] = (
    *map(RungeKutta, EXPLICIT),
    *map(ImplicitRungeKutta, IMPLICIT),
    *map(ImexRungeKutta, IMEX),
    Adams(implicit=False),
    Adams(implicit=True),
    AsynchronousLeapfrog(),
    ReversibleMidpoint(),
    Leapfrog(),
    Verlet(),
)
METHODS: dict[str, Any] = {method.name: method for method in _OBJECTS}
METHODS["fixed_adams"] = METHODS["implicit_adams"]
