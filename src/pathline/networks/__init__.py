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
from .trajectory import Members as Members
from .trajectory import Observations as Observations
from .trajectory import TrajectoryNet as TrajectoryNet
from .trajectory import windows as windows
from .trajectory_check import TrajectoryCheck as TrajectoryCheck
from .trajectory_check import check_trajectories as check_trajectories
from .trajectory_fit import TrajectoryFit as TrajectoryFit
from .trajectory_fit import fit_trajectories as fit_trajectories
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
    "Members",
    "Multigrid",
    "MultigridBlock",
    "Observations",
    "Pair",
    "Parabolic",
    "Regression",
    "Residual",
    "SecondOrder",
    "SemiImplicit",
    "StabilityReport",
    "Supervised",
    "TrajectoryCheck",
    "TrajectoryFit",
    "TrajectoryNet",
    "TransportView",
    "TwoLayerHamiltonian",
    "check_trajectories",
    "deepened",
    "dense_net",
    "fgsm",
    "fit_trajectories",
    "imexnet",
    "pde_cnn",
    "pgd",
    "prolonged",
    "restricted",
    "stability_report",
    "transport_view",
    "viscous_scores",
    "wavelet_net",
    "windows",
]
