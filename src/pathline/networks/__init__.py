"""Deep networks as differential equations."""

from .architectures import dense_net as dense_net
from .architectures import imexnet as imexnet
from .architectures import pde_cnn as pde_cnn
from .dynamics import Antisymmetric as Antisymmetric
from .dynamics import Augmented as Augmented
from .dynamics import Dynamics as Dynamics
from .dynamics import Hamiltonian as Hamiltonian
from .dynamics import Pair as Pair
from .dynamics import Parabolic as Parabolic
from .dynamics import Residual as Residual
from .dynamics import SecondOrder as SecondOrder
from .dynamics import TwoLayerHamiltonian as TwoLayerHamiltonian
from .invertible import InvertibleBlock as InvertibleBlock
from .multigrid import Multigrid as Multigrid
from .multigrid import MultigridBlock as MultigridBlock
from .net import ContinuousNet as ContinuousNet
from .net import Evolution as Evolution
from .objectives import Classification as Classification
from .objectives import Regression as Regression
from .objectives import Supervised as Supervised
from .semi_implicit import SemiImplicit as SemiImplicit

__all__ = [
    "Antisymmetric",
    "Augmented",
    "Classification",
    "ContinuousNet",
    "Dynamics",
    "Evolution",
    "Hamiltonian",
    "InvertibleBlock",
    "Multigrid",
    "MultigridBlock",
    "Pair",
    "Parabolic",
    "Regression",
    "Residual",
    "SecondOrder",
    "SemiImplicit",
    "Supervised",
    "TwoLayerHamiltonian",
    "dense_net",
    "imexnet",
    "pde_cnn",
]
