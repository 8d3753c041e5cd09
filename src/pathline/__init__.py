"""Pathline: continuous-time deep learning in PyTorch."""

__version__ = "0.1.0"

from . import control as control
from . import flows as flows
from . import games as games
from . import integrate as integrate
from . import nets as nets
from . import networks as networks
from .errors import PathlineError as PathlineError
from .integrate import odeint as odeint
from .integrate import odeint_adjoint as odeint_adjoint
from .models import load as load
from .models import save as save
from .train import fit as fit

__all__ = [
    "PathlineError",
    "control",
    "fit",
    "flows",
    "games",
    "integrate",
    "load",
    "nets",
    "networks",
    "odeint",
    "odeint_adjoint",
    "save",
]
