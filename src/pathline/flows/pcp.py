"""PCP-Map: the gradient of a partially input-convex potential, as a conditional density."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..nets import ConvexPotential, conjugate
from ..train import Loss, Objective, Rows
from .map import TransportMap
from .standardize import Bounds

ROWS = 2048


class PCPMap(TransportMap):
    """A density whose map to N(0, I) is monotone: z = grad_x G(x, y), with G convex in x.

    log p(x | y) = log N(z; 0, I) + log det of the Hessian of G, both exact and in closed form.
    There is no time to integrate over, so log-densities are cheap; a sample is the minimiser of
    G(v, y) - z.v, by Newton's method. The Hessian costs O(dim width^2) for each row: for up to
    about a hundred columns.

    Args:
        dim: number of columns of x, such as the parameters of a simulator.
        context_dim: number of columns of the context y, such as simulated data; 0 for none.
        width: neurons of each layer of the potential.
        depth: layers of the potential.
        embedding: number of features that a `nets.Embedding` learns from the context; or a module
            of your own, (batch, context_dim) -> (batch, features), of standardised contexts.
        standardize: let `fit` set the affine coordinates in which the map works.
        support: (lower, upper) of each column, None where free; None if all are free.
        generator: source of the initial weights; torch's global one by default.

    Raises:
        ArgumentError: an argument is out of range.

    Source: Wang, Baptista, Marzouk, Ruthotto, Verma, Efficient neural network approaches for
    conditional optimal transport with applications in Bayesian inference (arXiv 2310.16975).

    Example:
        >>> import torch
        >>> flow = PCPMap(dim=2, context_dim=3)
        >>> flow(torch.zeros(4, 3)).sample((10,)).shape
        torch.Size([10, 4, 2])
    """

    def __init__(
        self,
        dim: int,
        context_dim: int = 0,
        *,
        width: int = 64,
        depth: int = 3,
        embedding: int | nn.Module | None = None,
        standardize: bool = True,
        support: Sequence[Bounds] | None = None,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__(dim, context_dim, standardize=standardize, support=support)
        features = self._embed(embedding, generator)
        self.potential = ConvexPotential(
            dim, features, width=width, depth=depth, generator=generator
        )

    def config(self) -> dict[str, Any]:
        """The arguments that build this map again, JSON-safe.

        Raises:
            ModelError: the embedding is a module of the user's own.
        """
        sizes = {"width": self.potential.width, "depth": self.potential.depth}
        return super().config() | self._embedding_config() | sizes

    def objective(self) -> "PCPObjective":
        """What `fit` minimises: the negative log-likelihood."""
        return PCPObjective(self)

    def carry(
        self, y: Tensor, features: Tensor | None, *, log_det: bool = True
    ) -> tuple[Tensor, Tensor | None]:
        at = self.potential.derivatives(y, features, hessian=log_det)
        return at.grad, None if at.hessian is None else log_determinant(at.hessian)

    def carry_back(
        self, z: Tensor, features: Tensor | None, *, log_det: bool = True
    ) -> tuple[Tensor, Tensor | None]:
        y = conjugate(self.potential, z.double(), features)
        if not log_det:
            return y, None
        _, forward = self.carry(self.cast(y), features)
        assert forward is not None
        return y, -forward

    def smallest_curvature(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        """The smallest eigenvalue of the map's Jacobian at each row of `x`, (batch,), in
        standardised units: the map is monotone where all are positive."""
        y, features, _ = self.coordinates(self._input(x), self._context(context, len(x)))
        return self.potential.smallest_curvature(y, features)

    def chunk_rows(self) -> int:
        return ROWS


class PCPObjective(Objective):
    """J = E[|T|^2 / 2 - log det grad T + n/2 log 2 pi]: the negative log-likelihood in
    standardised units.

    Source: Wang et al. (arXiv 2310.16975), equation (8); after each step the weights W_k of the
    potential are projected onto W_k >= 0.
    """

    model: PCPMap

    def __init__(self, flow: PCPMap) -> None:
        super().__init__()
        self.model = flow

    def forward(self, batch: Tensor, weights: Tensor | None = None) -> Loss:
        nll = self._nll(batch)
        mean = nll.mean() if weights is None else (nll * weights.to(nll)).mean()
        return Loss(mean, {"nll": mean.detach()})

    def _nll(self, batch: Tensor) -> Tensor:
        flow = self.model
        y, features, _ = flow.coordinates(*flow.split(batch))
        z, log_det = flow.carry(y, features)
        assert log_det is not None
        return -flow.reference_log_prob(z) - log_det

    @torch.no_grad()
    def validate(self, batch: Tensor) -> Tensor:
        return torch.cat([self._nll(part) for part in batch.split(self.model.chunk_rows())])

    def check(self, rows: Rows) -> None:
        self.model.check_rows(rows)

    def prepare(self, rows: Rows, generator: torch.Generator) -> None:
        self.model.prepare(rows, generator)

    def constrain(self) -> None:
        self.model.potential.project()

    def default_steps(self, rows: int) -> int:
        return int(min(max(20 * rows**0.5, 200), 3000))

    def default_rate(self, steps: int) -> float:
        return 0.03 * min(1.0, (2000 / steps) ** 0.5)


def log_determinant(hessian: Tensor) -> Tensor:
    """log det of positive definite matrices (batch, dim, dim), as (batch,); NaN, from which
    training goes back, where rounding has turned the sign."""
    sign, log_det = torch.linalg.slogdet(hessian)
    return log_det.masked_fill(sign <= 0, torch.nan)
