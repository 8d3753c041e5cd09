"""What all continuous flows share: densities and samples by moving points in time."""

import copy
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..errors import ArgumentError, ShapeError
from ..train import Objective, Rows
from .check import Check, check
from .distribution import FlowDistribution
from .standardize import Bounds, Standardize

INVERSE_TOLERANCE = 1e-4  # standard deviations, in double precision


class Flow(nn.Module):
    """An invertible density model: dz/dt = v(t, z) carries data at t = 0 to N(0, I) at t = 1.

    log p(x) = log N(z(1); 0, I) + log |det dz(1)/dz(0)| + log |det dz(0)/dx|, where z(0) is x
    standardised. A subclass has `velocity`, `move`, `objective` and `config`. All inputs and
    outputs are in the user's units.

    A conditional flow (`context_dim` > 0) takes a `context`, of shape (context_dim,) or
    (batch, context_dim), wherever it takes points.
    """

    prepared: Tensor
    hjb: float  # weight of the HJB residual in training; 0 where there is none

    def __init__(
        self,
        dim: int,
        context_dim: int,
        *,
        steps: int,
        train_steps: int,
        standardize: bool,
        support: Sequence[Bounds] | None,
    ) -> None:
        super().__init__()
        for name, count in (("dim", dim), ("train_steps", train_steps), ("steps", steps)):
            if not isinstance(count, int) or count < 1:
                raise ArgumentError(f"`{name}` must be a positive integer, got {count!r}")
        if not isinstance(context_dim, int) or context_dim < 0:
            raise ArgumentError(f"`context_dim` must be an integer >= 0, got {context_dim!r}")
        self.dim, self.context_dim = dim, context_dim
        self.steps, self.train_steps = steps, train_steps
        self.standardizes = bool(standardize)
        self.standardize = Standardize(dim, support)
        self.register_buffer("prepared", torch.tensor(False))

    def velocity(self, t: Tensor, z: Tensor, context: Tensor | None = None) -> Tensor:
        """dz/dt at time `t`, () or (batch,), and standardised points `z`, (batch, dim)."""
        raise NotImplementedError

    def move(
        self,
        z: Tensor,
        context: Tensor | None,
        *,
        start: float = 0.0,
        stop: float = 1.0,
        log_det: bool = True,
    ) -> tuple[Tensor, Tensor | None]:
        """Where standardised points `z` (batch, dim) go between two times, and the exact
        log |det| of this map, (batch,), or None."""
        raise NotImplementedError

    def trajectory(
        self, x: Tensor, steps: int | None = None, context: Tensor | None = None
    ) -> Tensor:
        """States from data to reference, in standardised units: (steps + 1, batch, dim)."""
        raise NotImplementedError

    def costs(self, x: Tensor, context: Tensor | None = None) -> dict[str, float]:
        """Means over the rows of `x` of what regularises the training, in standardised units."""
        raise NotImplementedError

    def objective(self) -> Objective:
        """What `fit` minimises."""
        raise NotImplementedError

    def config(self) -> dict[str, Any]:
        """The arguments that build this flow again, JSON-safe."""
        return {
            "dim": self.dim,
            "context_dim": self.context_dim,
            "train_steps": self.train_steps,
            "steps": self.steps,
            "standardize": self.standardizes,
            "support": self.standardize.bounds(),
        }

    def forward(self, context: Tensor | None = None) -> FlowDistribution:
        """The flow as a `torch.distributions.Distribution` over vectors (dim,), with the batch
        shape of `context` (..., context_dim)."""
        return FlowDistribution(self, context)

    def log_prob(
        self, x: Tensor, context: Tensor | None = None, *, return_error: bool = False
    ) -> Any:
        """Log-density in nats of the rows of `x` (batch, dim), as (batch,); -inf off the support.

        Differentiable; evaluated in chunks, so memory does not grow with the batch.

        With `return_error` the result is a pair, the log-densities and an estimate of their
        error by the time grid, (batch,), at three times the price: Richardson's, from twice the
        time steps or a hundredth of the tolerance. It knows nothing of round-off.
        """
        x = self._input(x)
        inside = (self.standardize.inside(x) | x.isnan()).all(1)
        # Points off the support are replaced, lest their infinities spoil the gradients of others.
        centre = self.standardize.inverse(torch.zeros(1, self.dim)).to(x)
        safe = torch.where(inside[:, None], x, centre)
        log_prob = self._chunked(self._log_prob, safe, context)[0]
        result = torch.where(inside, log_prob, -math.inf)
        if not return_error:
            return result
        with self.refined(2), torch.no_grad():
            finer = self._chunked(self._log_prob, safe, context)[0]
        error = (finer - log_prob.detach()).abs() * self.richardson
        return result, torch.where(inside, error, 0.0)

    richardson = 16 / 15  # of order four: what is left of the error at twice the steps counts in

    def _log_prob(self, x: Tensor, context: Tensor | None) -> tuple[Tensor]:
        z, log_det = self._forward(x, context)
        return (self.reference_log_prob(z) + log_det,)

    def _forward(self, x: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        y, log_slope = self.standardize(x)
        z, log_det = self.move(self.cast(y), context)
        assert log_det is not None
        return z, log_det + log_slope

    def _backward(self, z: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        y, log_det = self.move(self.cast(z), context, start=1.0, stop=0.0)
        assert log_det is not None
        x = self.standardize.inverse(y)
        return x, self.reference_log_prob(self.cast(z)) - log_det + self.standardize(x)[1]

    def reference_log_prob(self, z: Tensor) -> Tensor:
        """Log-density of N(0, I), (batch,)."""
        return -0.5 * z.square().sum(1) - 0.5 * self.dim * math.log(2 * math.pi)

    def to_reference(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        """The points z(1) to which the rows of `x` flow, (batch, dim)."""

        def move(part: Tensor, context: Tensor | None) -> tuple[Tensor]:
            y, _ = self.standardize(part)
            return (self.move(self.cast(y), context, log_det=False)[0],)

        return self._chunked(move, self._input(x), context)[0]

    def to_reference_with_log_det(
        self, x: Tensor, context: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """As `to_reference`, and log |det dz(1)/dx| of each row, (batch,), in one solve."""
        z, log_det = self._chunked(self._forward, self._input(x), context)
        return z, log_det

    def from_reference(self, z: Tensor, context: Tensor | None = None) -> Tensor:
        """The points x that flow to the rows of `z`, (batch, dim)."""

        def move(part: Tensor, context: Tensor | None) -> tuple[Tensor]:
            y, _ = self.move(self.cast(part), context, start=1.0, stop=0.0, log_det=False)
            return (self.standardize.inverse(y),)

        return self._chunked(move, self._input(z, "z"), context)[0]

    def from_reference_with_log_prob(
        self, z: Tensor, context: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """As `from_reference`, and the log-densities of the points, (batch,), in one solve."""
        x, log_prob = self._chunked(self._backward, self._input(z, "z"), context)
        return x, log_prob

    def sample(
        self, n: int = 1, context: Tensor | None = None, *, seed: int | None = None
    ) -> Tensor:
        """Draw (n, dim) points; the same `seed` gives the same points.

        Without a seed torch's global generator is used. `context` is one for all points, or one
        for each; `flow(context).sample((n,))` draws n for each of several.
        """
        with torch.no_grad():
            return self.from_reference(self.reference_sample(n, seed=seed), context)

    def sample_with_log_prob(
        self, n: int = 1, context: Tensor | None = None, *, seed: int | None = None
    ) -> tuple[Tensor, Tensor]:
        """Points (n, dim) and their log-densities (n,), in one solve."""
        with torch.no_grad():
            z = self.reference_sample(n, seed=seed)
            return self.from_reference_with_log_prob(z, context)

    def reference_sample(self, n: int, *, seed: int | None = None) -> Tensor:
        """n points of N(0, I), in the flow's precision and on its device."""
        if not isinstance(n, int) or n < 0:
            raise ArgumentError(f"`n` must be an integer >= 0, got {n!r}")
        generator = None if seed is None else torch.Generator().manual_seed(seed)
        return self.cast(torch.randn(n, self.dim, generator=generator, dtype=torch.float64))

    def check(self, x: Tensor, context: Tensor | None = None, *, seed: int = 0) -> Check:
        """Can this flow be trusted? Inverse error, refinement in time, and total mass.

        Args:
            x: rows of data, (batch, dim); up to 10,000 are used.
            context: of the rows; the mass is that of the density at the first.
            seed: of the importance sample.
        """
        x = self._input(x)
        return check(self, x, self._context(context, len(x)), seed=seed)

    def check_rows(self, rows: Rows) -> None:
        """Raise where the flow can't have a density at these rows: a `ShapeError` for another
        number of columns, a `DataError` for a value on or outside its bounds."""
        if self.context_dim:
            raise ArgumentError(
                "`fit` trains a density of rows, and this flow has a context; minimise "
                "`-flow(context).log_prob(x).mean()` in a loop of your own"
            )
        if rows.columns != self.dim:
            raise ShapeError(
                f"`{rows.name}` must have {self.dim} columns like the flow, got {rows.columns}"
            )
        self.standardize.check_rows(rows)

    @torch.no_grad()
    def prepare(self, rows: Rows, generator: torch.Generator) -> None:
        """Fit the standardisation and start from weights that suit the data.

        Does nothing on a flow that was prepared before: training goes on from where it is.
        """
        if self.prepared:
            return
        if self.standardizes:
            self.standardize.fit(rows)
        index = torch.randint(len(rows), (1024,), generator=generator)
        y, _ = self.standardize(rows.take(index)[0].to(self.standardize.mean.device))
        self.initialise(y, generator)
        self.prepared.fill_(True)

    def initialise(self, y: Tensor, generator: torch.Generator) -> None:
        """Set weights by standardised rows of the data, (batch, dim)."""

    @property
    def grid(self) -> str:
        """The time grid of densities and samples, in words."""
        return f"{self.steps} steps"

    @contextmanager
    def refined(self, factor: int) -> Iterator[str]:
        """Within, the flow has `factor` times its time steps; gives what changed, in words."""
        before = self.steps
        self.steps = factor * before
        try:
            yield f"{self.steps} instead of {before} steps"
        finally:
            self.steps = before

    @torch.no_grad()
    def choose_steps(
        self,
        x: Tensor,
        context: Tensor | None = None,
        *,
        tolerance: float = 1e-3,
        most: int = 128,
    ) -> float:
        """Set `steps` to the fewest, of those of training doubled again and again, with which the
        log-densities of the rows of `x` are right to `tolerance` nats on average, and points are
        found again to 1e-4 standard deviations, in double precision.

        Returns:
            The estimated error, the mean over rows of Richardson's; above `tolerance` where
            `most` steps do not suffice.
        """
        if not tolerance > 0:
            raise ArgumentError(f"`tolerance` must be positive, got {tolerance!r}")
        exact = copy.deepcopy(self).double()
        exact.steps = self.train_steps
        log_prob = exact.log_prob(x, context)
        while True:
            with exact.refined(2):
                finer = exact.log_prob(x, context)
            error = ((finer - log_prob).abs().mean() * self.richardson).item()
            right = error <= tolerance and exact.inverse_error(x, context) < INVERSE_TOLERANCE
            if right or 2 * exact.steps > most:
                break
            exact.steps, log_prob = 2 * exact.steps, finer
        self.steps = exact.steps
        return error

    @torch.no_grad()
    def inverse_error(self, x: Tensor, context: Tensor | None = None) -> float:
        """The largest |x - f^-1(f(x))| of the rows of `x`, in standard deviations."""
        y, _ = self.standardize(x)
        back = self.from_reference(self.to_reference(x, context), context)
        return (self.standardize(back)[0] - y).abs().max().item()

    def cast(self, y: Tensor) -> Tensor:
        """`y` in the precision and on the device of the parameters."""
        return y.to(next(self.parameters()))

    def chunk_rows(self) -> int:
        """Rows evaluated at once: as many as keep the activations in the cache."""
        raise NotImplementedError

    def _chunked(
        self,
        function: Callable[[Tensor, Tensor | None], tuple[Tensor, ...]],
        x: Tensor,
        context: Tensor | None,
    ) -> tuple[Tensor, ...]:
        """`function` on chunks of rows, in the precision of `x`.

        Where gradients are wanted from several chunks, each is computed again in the backward
        pass instead of being kept.
        """
        size = self.chunk_rows()
        parts = x.split(size) if len(x) else (x,)
        context = self._context(context, len(x))
        contexts = [None] * len(parts) if context is None else context.split(size) or (context,)
        pairs = list(zip(parts, contexts, strict=True))
        if torch.is_grad_enabled() and len(parts) > 1:
            results = [checkpoint(function, *pair, use_reentrant=False) for pair in pairs]
        else:
            results = [function(*pair) for pair in pairs]
        return tuple(torch.cat(column).to(x.dtype) for column in zip(*results, strict=True))

    def _input(self, x: Tensor, name: str = "x") -> Tensor:
        x = torch.as_tensor(x)
        if x.ndim != 2 or x.shape[1] != self.dim:
            raise ShapeError(f"`{name}` must be (batch, {self.dim}), got {tuple(x.shape)}")
        if not x.is_floating_point():
            x = x.to(torch.get_default_dtype())
        return x

    def _context(self, context: Tensor | None, rows: int) -> Tensor | None:
        """One context for each row, (rows, context_dim), in the precision of the flow."""
        if context is None and not self.context_dim:
            return None
        want = f"`context` must be ({self.context_dim},) or ({rows}, {self.context_dim})"
        if not self.context_dim:
            raise ShapeError("`context` must be None: this flow has `context_dim` 0")
        if context is None:
            raise ShapeError(f"{want}, got None")
        context = self.cast(torch.as_tensor(context))
        shapes = ((self.context_dim,), (rows, self.context_dim))
        if context.shape not in shapes:
            raise ShapeError(f"{want}, got {tuple(context.shape)}")
        return context.expand(rows, -1)
