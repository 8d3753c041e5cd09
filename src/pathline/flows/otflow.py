"""OT-Flow: a normalizing flow whose velocity is the gradient of a potential."""

import copy
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..control import Rollout, rollout
from ..errors import ArgumentError, ShapeError
from ..nets import Potential
from ..train import Rows
from .check import Check, check
from .distribution import FlowDistribution
from .objective import FlowObjective
from .standardize import Bounds, Standardize
from .transport import Transport

PROBE_GAIN = 5.0
ELEMENTWISE = 100  # multiplications in the time of what else a neuron costs, measured


class OTFlow(nn.Module):
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

    prepared: Tensor

    def __init__(
        self,
        dim: int,
        width: int | None = None,
        depth: int | None = None,
        *,
        rank: int = 10,
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
        super().__init__()
        if width is None:
            width = 32 if dim <= 3 else 64 if dim <= 32 else 128
        if depth is None:
            depth = 3 if dim <= 3 else 2
        self.potential = Potential(dim, width, depth, rank, generator=generator)
        self.potential.hold_constant()
        if trace not in ("auto", "exact", "probe"):
            raise ArgumentError(f"`trace` must be 'auto', 'exact' or 'probe', got {trace!r}")
        if trace_dtype not in (None, "bfloat16"):
            raise ArgumentError(f"`trace_dtype` must be None or 'bfloat16', got {trace_dtype!r}")
        self.train_trace = choose_trace(dim, width, depth) if trace == "auto" else trace
        self.trace_dtype = None if trace_dtype is None else torch.bfloat16
        # A probe's noise asks for a smoother solution.
        probes = self.train_trace == "probe"
        hjb = (0.3 if probes else 0.1) if hjb is None else hjb
        train_steps = (6 if probes else 4) if train_steps is None else train_steps
        for name, count in (("train_steps", train_steps), ("steps", steps)):
            if not isinstance(count, int) or count < 1:
                raise ArgumentError(f"`{name}` must be a positive integer, got {count!r}")
        for name, weight in (("transport", transport), ("hjb", hjb)):
            if not (math.isfinite(weight) and weight >= 0):
                raise ArgumentError(f"`{name}` must be finite and >= 0, got {weight!r}")
        self.dim = dim
        self.transport, self.hjb, self.train_steps = float(transport), float(hjb), train_steps
        self.steps = steps
        self.standardizes = bool(standardize)
        self.standardize = Standardize(dim, support)
        self.register_buffer("prepared", torch.tensor(False))
        self.problem = Transport(dim)

    def config(self) -> dict[str, Any]:
        """The arguments that build this flow again, JSON-safe."""
        return {
            "dim": self.dim,
            "width": self.potential.width,
            "depth": self.potential.depth,
            "rank": self.potential.A.shape[0],
            "transport": self.transport,
            "hjb": self.hjb,
            "train_steps": self.train_steps,
            "steps": self.steps,
            "standardize": self.standardizes,
            "support": self.standardize.bounds(),
            "trace": self.train_trace,
            "trace_dtype": None if self.trace_dtype is None else "bfloat16",
        }

    def forward(self) -> FlowDistribution:
        """The flow as a `torch.distributions.Distribution` over vectors (dim,)."""
        return FlowDistribution(self)

    def objective(self) -> FlowObjective:
        """What `fit` minimises: likelihood, transport cost and HJB residual."""
        return FlowObjective(self)

    def log_prob(self, x: Tensor) -> Tensor:
        """Log-density in nats of the rows of `x` (batch, dim), as (batch,); -inf off the support.

        Differentiable; evaluated in chunks, so memory does not grow with the batch.
        """
        x = self._input(x)

        def evaluate(part: Tensor) -> tuple[Tensor]:
            y, log_slope = self.standardize(part)
            path = rollout(self.problem, self.potential, self.cast(y), steps=self.steps)
            assert path.log_det is not None
            return (path.log_det - self.problem.terminal_cost(path.z) + log_slope,)

        inside = (self.standardize.inside(x) | x.isnan()).all(1)
        # Points off the support are replaced, lest their infinities spoil the gradients of others.
        centre = self.standardize.inverse(torch.zeros(1, self.dim)).to(x)
        log_prob = self._chunked(evaluate, torch.where(inside[:, None], x, centre))[0]
        return torch.where(inside, log_prob, -math.inf)

    def to_reference(self, x: Tensor) -> Tensor:
        """The points z(1) to which the rows of `x` flow, (batch, dim)."""
        x = self._input(x)
        return self._chunked(lambda part: (self._forward(part, integrals=False).z,), x)[0]

    def from_reference(self, z: Tensor) -> Tensor:
        """The points x that flow to the rows of `z`, (batch, dim)."""
        z = self._input(z, "z")
        return self._chunked(lambda part: (self._backward(part, integrals=False)[0],), z)[0]

    def sample(self, n: int = 1, *, seed: int | None = None) -> Tensor:
        """Draw (n, dim) points; the same `seed` gives the same points.

        Without a seed torch's global generator is used.
        """
        with torch.no_grad():
            return self.from_reference(self.reference_sample(n, seed=seed))

    def sample_with_log_prob(self, n: int = 1, *, seed: int | None = None) -> tuple[Tensor, Tensor]:
        """Points (n, dim) and their log-densities (n,), in one solve."""
        with torch.no_grad():
            return self.from_reference_with_log_prob(self.reference_sample(n, seed=seed))

    def from_reference_with_log_prob(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """As `from_reference`, and the log-densities of the points, (batch,), in one solve."""
        x, log_prob = self._chunked(self._backward, self._input(z, "z"))
        return x, log_prob

    def reference_sample(self, n: int, *, seed: int | None = None) -> Tensor:
        """n points of N(0, I), in the flow's precision and on its device."""
        if not isinstance(n, int) or n < 0:
            raise ArgumentError(f"`n` must be an integer >= 0, got {n!r}")
        generator = None if seed is None else torch.Generator().manual_seed(seed)
        return self.cast(torch.randn(n, self.dim, generator=generator, dtype=torch.float64))

    def trajectory(self, x: Tensor, steps: int | None = None) -> Tensor:
        """States from data to reference, in standardised units: (steps + 1, batch, dim)."""
        y, _ = self.standardize(self._input(x))
        steps = self.steps if steps is None else steps
        path = rollout(
            self.problem,
            self.potential,
            self.cast(y),
            steps=steps,
            integrals=False,
            trajectory=True,
        )
        assert path.trajectory is not None
        return path.trajectory

    def costs(self, x: Tensor) -> dict[str, float]:
        """Means over the rows of `x` of the transport cost L and the HJB residual R, in
        standardised units."""
        with torch.no_grad():
            path = self._forward(self._input(x))
        assert path.running_cost is not None and path.hjb is not None
        return {"transport": path.running_cost.mean().item(), "hjb": path.hjb.mean().item()}

    def check(self, x: Tensor, *, seed: int = 0) -> Check:
        """Can this flow be trusted? Inverse error, refinement in time, and total mass.

        Args:
            x: rows of data, (batch, dim); up to 10,000 are used.
            seed: of the importance sample.
        """
        return check(self, self._input(x), seed=seed)

    def check_rows(self, rows: Rows) -> None:
        """Raise where the flow can't have a density at these rows: a `ShapeError` for another
        number of columns, a `DataError` for a value on or outside its bounds."""
        if rows.columns != self.dim:
            raise ShapeError(
                f"`{rows.name}` must have {self.dim} columns like the flow, got {rows.columns}"
            )
        self.standardize.check_rows(rows)

    @torch.no_grad()
    def prepare(self, rows: Rows, generator: torch.Generator) -> None:
        """Fit the standardisation, and start Phi from random features of the data.

        Does nothing on a flow that was prepared before: training goes on from where it is.
        """
        if self.prepared:
            return
        if self.standardizes:
            self.standardize.fit(rows)
        index = torch.randint(len(rows), (1024,), generator=generator)
        y, _ = self.standardize(rows.take(index)[0].to(self.standardize.mean.device))
        self.potential.random_features(y, feature_scale(self.dim), generator)
        self.prepared.fill_(True)

    @torch.no_grad()
    def choose_steps(self, x: Tensor, most: int = 128) -> None:
        """Set `steps`: double it until the negative log-likelihood changes by less than 1e-3 and
        the inverse is right to 1e-4 standard deviations in every row of `x`, in double precision.
        """
        exact = copy.deepcopy(self).double()
        exact.steps, last = self.train_steps, math.inf
        y, _ = self.standardize(x)
        while exact.steps < most:
            nll = -exact.log_prob(x).mean().item()
            back, _ = self.standardize(exact.from_reference(exact.to_reference(x)))
            if abs(nll - last) < 1e-3 and (back - y).abs().max() < 1e-4:
                break
            exact.steps, last = 2 * exact.steps, nll
        self.steps = exact.steps

    def cast(self, y: Tensor) -> Tensor:
        """`y` in the precision and on the device of the potential."""
        return y.to(self.potential.w)

    def chunk_rows(self) -> int:
        """Rows evaluated at once: as many as keep the activations in the cache."""
        return min(max(2**17 // self.potential.width, 128), 8192)

    def _forward(self, x: Tensor, *, integrals: bool = True) -> Rollout:
        y, _ = self.standardize(x)
        return rollout(
            self.problem, self.potential, self.cast(y), steps=self.steps, integrals=integrals
        )

    def _backward(self, z: Tensor, integrals: bool = True) -> tuple[Tensor, ...]:
        path = rollout(
            self.problem,
            self.potential,
            self.cast(z),
            steps=self.steps,
            start=1.0,
            stop=0.0,
            integrals=integrals,
        )
        x = self.standardize.inverse(path.z)
        if not integrals:
            return (x,)
        assert path.log_det is not None
        log_slope = self.standardize(x)[1]
        return x, log_slope - path.log_det - self.problem.terminal_cost(self.cast(z))

    def _chunked(
        self, function: Callable[[Tensor], tuple[Tensor, ...]], x: Tensor
    ) -> tuple[Tensor, ...]:
        """`function` on chunks of rows, in the precision of `x`.

        Where gradients are wanted from several chunks, each is computed again in the backward
        pass instead of being kept.
        """
        parts = x.split(self.chunk_rows()) if len(x) else (x,)
        if torch.is_grad_enabled() and len(parts) > 1:
            results = [checkpoint(function, part, use_reentrant=False) for part in parts]
        else:
            results = [function(part) for part in parts]
        return tuple(torch.cat(column).to(x.dtype) for column in zip(*results, strict=True))

    def _input(self, x: Tensor, name: str = "x") -> Tensor:
        x = torch.as_tensor(x)
        if x.ndim != 2 or x.shape[1] != self.dim:
            raise ShapeError(f"`{name}` must be (batch, {self.dim}), got {tuple(x.shape)}")
        if not x.is_floating_point():
            x = x.to(torch.get_default_dtype())
        return x


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
