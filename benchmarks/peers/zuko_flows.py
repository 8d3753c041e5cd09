"""Zuko's spline, affine autoregressive and continuous flows, with the package's defaults."""

import zuko
from torch import Tensor

from .peer import Counted, Peer


class NSF(Peer):
    """Neural spline flow of three autoregressive transforms with 8 bins (arXiv 1906.04032)."""

    cosine = True
    rates = (1e-3, 3e-3, 1e-2, 2e-2)
    raw = ("moons", "checkerboard", "8gaussians", "swissroll")  # which fill the splines' [-5, 5]

    def __init__(self, dim: int, width: int = 64) -> None:
        super().__init__()
        self.flow = zuko.flows.NSF(dim, hidden_features=(width, width))

    def loss(self, y: Tensor) -> Tensor:
        return self.validate(y).mean()

    def validate(self, y: Tensor) -> Tensor:
        return -self.flow().log_prob(y)

    exact = validate


class MAF(Peer):
    """Masked autoregressive flow of three affine transforms (arXiv 1705.07057)."""

    cosine = True

    def __init__(self, dim: int, width: int = 64) -> None:
        super().__init__()
        self.flow = zuko.flows.MAF(dim, hidden_features=(width, width))

    def loss(self, y: Tensor) -> Tensor:
        return self.validate(y).mean()

    def validate(self, y: Tensor) -> Tensor:
        return -self.flow().log_prob(y)

    exact = validate


class CNF(Peer):
    """Continuous flow with a free network, adaptive steps and a one-probe trace (1810.01367)."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.flow = zuko.flows.CNF(dim, hidden_features=(64, 64), exact=False)
        self.count = Counted()
        self.flow.transform.ode.register_forward_pre_hook(self.count)
        self.few_columns = dim <= 30

    def _nll(self, y: Tensor, exact: bool) -> Tensor:
        self.count.calls = 0
        self.flow.transform.exact = exact
        return -self.flow().log_prob(y)

    def loss(self, y: Tensor) -> Tensor:
        return self._nll(y, exact=False).mean()

    def validate(self, y: Tensor) -> Tensor:
        return self._nll(y, exact=self.few_columns)

    def exact(self, y: Tensor, tolerance: float = 1e-6) -> Tensor:
        self.flow.transform.atol = self.flow.transform.rtol = tolerance
        return self._nll(y, exact=True)
