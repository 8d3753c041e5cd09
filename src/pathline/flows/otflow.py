"""OT-Flow: a normalizing flow whose velocity is the gradient of a potential."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..control.rollout import Rollout, rollout
from ..errors import ArgumentError, require_nonnegative
from ..nets import Potential
from .flow import Flow
from .objective import FlowObjective
from .standardize import Bounds
from .transport import Transport

PROBE_GAIN = 5.0
ELEMENTWISE = 100  # multiplications in the time of what else a neuron costs, measured


class OTFlow(Flow):
    """An exact, invertible density model: dz/dt = -grad Phi(z, t) carries data to N(0, I).

    log p(x) = log N(z(1); 0, I) + int_0^1 -lap Phi dt + log |det d standardize/dx|, with the
    Laplacian in closed form. Transport cost and the Hamilton-Jacobi-Bellman equation regularise
    the training, so that trajectories are nearly straight and a few time steps resolve them.
    All inputs and outputs are in the user's units.

    Args:
        dim: number of columns.
        width: neurons of each layer of Phi; chosen from `dim` by default.
        depth: layers of Phi; by default 3 for up to three columns, else 2 as published.
        rank: rank of Phi's quadratic term.
        context_dim: number of columns of the context of a conditional density; 0 for none.
        embedding: of standardised contexts, for the potential: a number of features to be learned
            by a `nets.Embedding`, or a module (batch, context_dim) -> (batch, features).
        transport: weight w of the transport cost, against the likelihood.
        hjb: weight rho of the HJB residual, against the likelihood; training may raise it. By
            default 0.1, and 0.3 with probes, which need more of it.
        train_steps: time steps in training; training may raise it. By default 4, and 6 with
            probes.
        steps: time steps for densities and samples; `fit` chooses it.
        standardize: let `fit` set the affine coordinates in which the flow works.
        support: (lower, upper) of each column, None where free; None if all are free.
        trace: how training computes the Laplacian of the inner layers: "exact", "probe" (one
            random probe for each row and step, unbiased), or "auto", which turns to probes where
            exact steps cost several times as much. Densities are always exact.
        trace_dtype: "bfloat16" computes the matrix products of the inner layers' Laplacian in
            that precision, in training only; fast where the processor has them.
        generator: source of the initial weights; torch's global one by default.

    `train_trace` is the trace that training uses, "exact" or "probe".

    Raises:
        ArgumentError: an argument is out of range.

    Source: Onken, Wu Fung, Li, Ruthotto, OT-Flow, AAAI 2021 (arXiv 2006.00104).

    Example:
        >>> flow = OTFlow(dim=2)
        >>> flow.log_prob(flow.sample(5, seed=0)).shape
        torch.Size([5])
    """

    def __init__(
        self,
        dim: int,
        width: int | None = None,
        depth: int | None = None,
        *,
        rank: int = 10,
        context_dim: int = 0,
        embedding: int | nn.Module | None = None,
        transport: float = 0.003,
        hjb: float | None = None,
        train_steps: int | None = None,
        steps: int = 16,
        standardize: bool = True,
        support: Sequence[Bounds] | None = None,
        trace: str = "auto",
        trace_dtype: str | None = None,
        generator: torch.Generator | None = None,
    ) -> None:
        if width is None:
            width = 32 if dim <= 3 else 64 if dim <= 32 else 128
        if depth is None:
            depth = 3 if dim <= 3 else 2
        if trace not in ("auto", "exact", "probe"):
            raise ArgumentError(f"`trace` must be 'auto', 'exact' or 'probe', got {trace!r}")
        if trace_dtype not in (None, "bfloat16"):
            raise ArgumentError(f"`trace_dtype` must be None or 'bfloat16', got {trace_dtype!r}")
        train_trace = choose_trace(dim, width, depth) if trace == "auto" else trace
        # A probe's noise asks for a smoother solution.
        probes = train_trace == "probe"
        hjb = (0.3 if probes else 0.1) if hjb is None else hjb
        train_steps = (6 if probes else 4) if train_steps is None else train_steps
        super().__init__(
            dim,
            context_dim,
            steps=steps,
            train_steps=train_steps,
            standardize=standardize,
            support=support,
        )
        require_nonnegative(transport=transport, hjb=hjb)
        features = self._embed(embedding, generator)
        self.potential = Potential(dim, width, depth, rank, features, generator=generator)
        self.potential.hold_constant()
        self.train_trace = train_trace
        self.trace_dtype = None if trace_dtype is None else torch.bfloat16
        self.transport, self.hjb = float(transport), float(hjb)
        self.problem = Transport(dim)

    def config(self) -> dict[str, Any]:
        """The arguments that build this flow again, JSON-safe.

        Raises:
            ModelError: the embedding is a module of the user's own.
        """
        own = {
            "width": self.potential.width,
            "depth": self.potential.depth,
            "rank": self.potential.A.shape[0],
            "transport": self.transport,
            "hjb": self.hjb,
            "trace": self.train_trace,
            "trace_dtype": None if self.trace_dtype is None else "bfloat16",
        }
        return super().config() | self._embedding_config() | own

    def objective(self) -> FlowObjective:
        """What `fit` minimises: likelihood, transport cost and HJB residual."""
        return FlowObjective(self)

    def velocity(self, t: Tensor, z: Tensor, features: Tensor | None = None) -> Tensor:
        """dz/dt = -grad Phi(z, t) at time `t`, () or (batch,), and standardised points `z`."""
        gradient = self.potential.derivatives(
            z, t, features, value=False, dt=False, laplacian=False
        ).grad
        assert gradient is not None
        return -gradient

    def move(
        self,
        z: Tensor,
        features: Tensor | None,
        *,
        start: float = 0.0,
        stop: float = 1.0,
        log_det: bool = True,
    ) -> tuple[Tensor, Tensor | None]:
        path = self._rollout(z, features, start=start, stop=stop, integrals=log_det)
        return path.z, path.log_det

    def _rollout(self, z: Tensor, features: Tensor | None, **how: Any) -> Rollout:
        how = {"steps": self.steps} | how
        return rollout(self.problem, self.potential, z, context=features, **how)

    def trajectory(
        self, x: Tensor, steps: int | None = None, context: Tensor | None = None
    ) -> Tensor:
        y, features, _ = self.coordinates(self._input(x), self._context(context, len(x)))
        steps = self.steps if steps is None else steps
        path = self._rollout(y, features, steps=steps, integrals=False, trajectory=True)
        assert path.trajectory is not None
        return path.trajectory

    def costs(self, x: Tensor, context: Tensor | None = None) -> dict[str, float]:
        """Means over the rows of `x` of the transport cost L and the HJB residual R, in
        standardised units."""
        with torch.no_grad():
            y, features, _ = self.coordinates(self._input(x), self._context(context, len(x)))
            path = self._rollout(y, features)
        assert path.running_cost is not None and path.hjb is not None
        return {"transport": path.running_cost.mean().item(), "hjb": path.hjb.mean().item()}

    def initialise(self, inputs: Tensor, generator: torch.Generator) -> None:
        """Start Phi from random features of the data."""
        self.potential.random_features(inputs, feature_scale(inputs.shape[1]), generator)

    def chunk_rows(self) -> int:
        return min(max(2**17 // self.potential.width, 128), 8192)


def choose_trace(dim: int, width: int, depth: int) -> str:
    """ "probe" where an exact training step costs more than `PROBE_GAIN` times one with probes.

    Counted in multiplications of matrix products for each row and evaluation; two of five
    evaluations have a Laplacian, with one product for each of its columns.
    """
    inner = (depth - 1) * width**2
    rest = 2 * (inner + width * dim) + ELEMENTWISE * depth * width

    def step(columns: int) -> float:
        return rest + 0.4 * columns * inner

    return "probe" if step(min(dim, width)) > PROBE_GAIN * step(1) else "exact"


def feature_scale(dim: int) -> float:
    """Standard deviation of the random first layer."""
    return 0.7 * (3 / (dim + 1)) ** 0.5
