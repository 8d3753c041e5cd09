"""Optimal transport to a standard normal as a control problem."""

import math
from collections.abc import Callable

from torch import Tensor

from ..control import Problem
from ..nets import Derivatives


class Transport(Problem):
    """L = |u|^2 / 2, f = u, so u = -grad Phi and H = -|p|^2 / 2, on the time interval [0, 1].

    The terminal cost is the negative log-density of the reference N(0, I) at z(1). The negative
    log-likelihood C also sees the density, through the log-determinant: C = G(z(1)) - log det.

    Source: Onken et al., OT-Flow (arXiv 2006.00104), equations (4) to (8), with a_L = 1.
    """

    is_transport = True

    def __init__(self, dim: int) -> None:
        self.dim = dim

    def dynamics(self, t: Tensor, z: Tensor, u: Tensor) -> Tensor:
        return u

    def running_cost(self, t: Tensor, z: Tensor, u: Tensor) -> Tensor:
        return 0.5 * u.square().sum(1)

    def terminal_cost(self, z: Tensor) -> Tensor:
        return 0.5 * z.square().sum(1) + 0.5 * self.dim * math.log(2 * math.pi)

    def feedback(self, t: Tensor, z: Tensor, p: Tensor) -> Tensor:
        return -p

    def divergence(
        self, t: Tensor, z: Tensor, phi: Derivatives, velocity: Callable[[Tensor], Tensor]
    ) -> Tensor:
        assert phi.laplacian is not None
        return -phi.laplacian
