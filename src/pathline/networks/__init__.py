"""Deep networks as differential equations."""

from .architectures import dense_net as dense_net
from .architectures import imexnet as imexnet
from .architectures import pde_cnn as pde_cnn
from .architectures import wavelet_net as wavelet_net
from .attacks import fgsm as fgsm
from .attacks import pgd as pgd
from .dynamics import Antisymmetric as Antisymmetric
from .dynamics import Augmented as Augmented
from .dynamics import Dynamics as Dynamics
from .dynamics import Parabolic as Parabolic
from .dynamics import Residual as Residual
from .invertible import InvertibleBlock as InvertibleBlock
from .levels import deepened as deepened
from .levels import prolonged as prolonged
from .levels import restricted as restricted
from .multigrid import Multigrid as Multigrid
from .multigrid import MultigridBlock as MultigridBlock
from .net import ContinuousNet as ContinuousNet
from .net import Evolution as Evolution
from .objectives import Classification as Classification
from .objectives import Regression as Regression
from .objectives import Supervised as Supervised
from .pairs import Hamiltonian as Hamiltonian
from .pairs import Pair as Pair
from .pairs import SecondOrder as SecondOrder
from .pairs import TwoLayerHamiltonian as TwoLayerHamiltonian
from .semi_implicit import SemiImplicit as SemiImplicit
from .stability import EvolutionReport as EvolutionReport
from .stability import StabilityReport as StabilityReport
from .stability import stability_report as stability_report
from .transport import TransportView as TransportView
from .transport import transport_view as transport_view
from .viscous import viscous_scores as viscous_scores

__all__ = [
    "Antisymmetric",
    "Augmented",
    "Classification",
    "ContinuousNet",
    "Dynamics",
    "Evolution",
    "EvolutionReport",
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
    "StabilityReport",
    "Supervised",
    "TransportView",
    "TwoLayerHamiltonian",
    "deepened",
    "dense_net",
    "fgsm",
    "imexnet",
    "pde_cnn",
    "pgd",
    "prolonged",
    "restricted",
    "stability_report",
    "transport_view",
    "viscous_scores",
    "wavelet_net",
]
