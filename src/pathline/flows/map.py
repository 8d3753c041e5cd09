"""What all invertible density models share: standardisation, contexts, densities, samples."""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..errors import ArgumentError, ModelError, ShapeError
from ..nets import Embedding
from ..train import Objective, Rows
from . import regions
from .check import Check, check
from .distribution import FlowDistribution
from .standardize import Bounds, Standardize


class TransportMap(nn.Module):
    """An invertible density model: a map carries data to N(0, I).

    log p(x) = log N(z; 0, I) + log |det dz/dy| + log |det dy/dx|, where y is x standardised and z
    where the map carries it. A subclass has `carry`, `carry_back`, `objective`, `chunk_rows` and
    `config`. All inputs and outputs are in the user's units.

    A conditional model (`context_dim` > 0) takes a `context`, of shape (context_dim,) or
    (batch, context_dim), wherever it takes points, and `fit` takes a pair (x, context) as data.
    """

    prepared: Tensor
    steps: int = 0  # in time; a map in closed form has none
    embedding: nn.Module | None  # of standardised contexts, (batch, context_dim)

    def __init__(
        self,
        dim: int,
        context_dim: int,
        *,
        standardize: bool,
        support: Sequence[Bounds] | None,
    ) -> None:
        super().__init__()
        if not isinstance(dim, int) or dim < 1:
            raise ArgumentError(f"`dim` must be a positive integer, got {dim!r}")
        if not isinstance(context_dim, int) or context_dim < 0:
            raise ArgumentError(f"`context_dim` must be an integer >= 0, got {context_dim!r}")
        self.dim, self.context_dim = dim, context_dim
        self.standardizes = bool(standardize)
        self.standardize = Standardize(dim, support, context_dim)
        self.embedding = None
        self.register_buffer("prepared", torch.tensor(False))

    def _embed(self, embedding: int | nn.Module | None, generator: torch.Generator | None) -> int:
        """Set the embedding; returns how many columns the map sees of a context."""
        if embedding is None:
            return self.context_dim
        if not self.context_dim:
            raise ArgumentError("`embedding` needs a context, and `context_dim` is 0")
        if not isinstance(embedding, nn.Module):
            embedding = Embedding(self.context_dim, embedding, generator=generator)
        self.embedding = embedding
        with torch.no_grad():
            return embedding(torch.zeros(2, self.context_dim)).shape[1]

    def _embedding_config(self) -> dict[str, int | None]:
        """The argument `embedding`, for `config`."""
        if not isinstance(self.embedding, Embedding | None):
            raise ModelError(
                "a flow with an `embedding` of your own can't be described in a file; save its "
                "`state_dict()` and build it again"
            )
        return {"embedding": None if self.embedding is None else self.embedding.features}

    def carry(
        self, y: Tensor, features: Tensor | None, *, log_det: bool = True
    ) -> tuple[Tensor, Tensor | None]:
        """Where standardised points `y` (batch, dim) are carried, and the exact log |det dz/dy|,
        (batch,), or None; `features` are those of the context, or None."""
        raise NotImplementedError

    def carry_back(
        self, z: Tensor, features: Tensor | None, *, log_det: bool = True
    ) -> tuple[Tensor, Tensor | None]:
        """The points y that are carried to `z` (batch, dim), and log |det dy/dz|, or None."""
        raise NotImplementedError

    def objective(self) -> Objective:
        """What `fit` minimises."""
        raise NotImplementedError

    def config(self) -> dict[str, Any]:
        """The arguments that build this model again, JSON-safe."""
        return {
            "dim": self.dim,
            "context_dim": self.context_dim,
            "standardize": self.standardizes,
            "support": self.standardize.bounds(),
        }

    def features(self, context: Tensor | None) -> Tensor | None:
        """What the map sees of contexts in the user's units, (batch, context_dim): these
        standardised, and embedded where there is an embedding."""
        if context is None:
            return None
        features = self.cast(self.standardize.context(context))
        return features if self.embedding is None else self.embedding(features)

    def split(self, batch: Tensor) -> tuple[Tensor, Tensor | None]:
        """Rows of training data as x (batch, dim) and context, (batch, context_dim) or None."""
        if not self.context_dim:
            return batch, None
        return batch[:, : self.dim], batch[:, self.dim :]

    def coordinates(
        self, x: Tensor, context: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None, Tensor]:
        """Standardised points y in the precision of the model, features of their context or None,
        and log |det dy/dx|."""
        y, log_slope = self.standardize(x, context)
        return self.cast(y), self.features(context), log_slope

    def forward(self, context: Tensor | None = None) -> FlowDistribution:
        """The flow as a `torch.distributions.Distribution` over vectors (dim,), with the batch
        shape of `context` (..., context_dim)."""
        return FlowDistribution(self, context)

    def log_prob(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        """Log-density in nats of the rows of `x` (batch, dim), as (batch,); -inf off the support.

        Differentiable; evaluated in chunks, so memory does not grow with the batch.
        """
        x = self._input(x)
        inside, safe = self.standardize.replaced(x)
        log_prob = self._chunked(self._log_prob, safe, context)[0]
        return torch.where(inside, log_prob, -math.inf)

    def _log_prob(self, x: Tensor, context: Tensor | None) -> tuple[Tensor]:
        z, log_det = self._forward(x, context)
        return (self.reference_log_prob(z) + log_det,)

    def _forward(self, x: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        y, features, log_slope = self.coordinates(x, context)
        z, log_det = self.carry(y, features)
        assert log_det is not None
        return z, log_det + log_slope

    def _backward(self, z: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        z = self.cast(z)
        y, log_det = self.carry_back(z, self.features(context))
        assert log_det is not None
        x = self.standardize.inverse(y, context)
        return x, self.reference_log_prob(z) - log_det + self.standardize(x, context)[1]

    def reference_log_prob(self, z: Tensor) -> Tensor:
        """Log-density of N(0, I), (batch,)."""
        return -0.5 * z.square().sum(1) - 0.5 * self.dim * math.log(2 * math.pi)

    def to_reference(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        """The points z to which the rows of `x` are carried, (batch, dim)."""

        def carry(part: Tensor, context: Tensor | None) -> tuple[Tensor]:
            y, features, _ = self.coordinates(part, context)
            return (self.carry(y, features, log_det=False)[0],)

        return self._chunked(carry, self._input(x), context)[0]

    def to_reference_with_log_det(
        self, x: Tensor, context: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """As `to_reference`, and log |det dz/dx| of each row, (batch,), in one solve."""
        z, log_det = self._chunked(self._forward, self._input(x), context)
        return z, log_det

    def from_reference(self, z: Tensor, context: Tensor | None = None) -> Tensor:
        """The points x that are carried to the rows of `z`, (batch, dim)."""

        def carry(part: Tensor, context: Tensor | None) -> tuple[Tensor]:
            y, _ = self.carry_back(self.cast(part), self.features(context), log_det=False)
            return (self.standardize.inverse(y, context),)

        return self._chunked(carry, self._input(z, "z"), context)[0]

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
        """n points of N(0, I), in the precision of the model and on its device."""
        if not isinstance(n, int) or n < 0:
            raise ArgumentError(f"`n` must be an integer >= 0, got {n!r}")
        generator = None if seed is None else torch.Generator().manual_seed(seed)
        return self.cast(torch.randn(n, self.dim, generator=generator, dtype=torch.float64))

    def rank(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        """How far out the rows of `x` (batch, dim) lie, from 0 to 1, (batch,): uniform on data of
        the density; the region of a level is where the rank is at most that. See `regions`."""
        return regions.rank(self, self._input(x), context)

    def contour(
        self, level: float, context: Tensor | None = None, *, n: int = 200, seed: int = 0
    ) -> Tensor:
        """n points (n, dim) of rank `level`, the boundary of the region of that probability,
        given one `context` (context_dim,): in order around it in two dimensions, the two ends in
        turn in one, in random directions otherwise. See `regions`."""
        return regions.contour(self, level, context, n=n, seed=seed)

    def quantile(self, levels: Tensor | float, context: Tensor | None = None) -> Tensor:
        """The values of one column (`dim` 1) below which its shares `levels` lie, (levels,) or ()
        given one context or none, (batch, levels) or (batch,) given several."""
        return regions.quantile(self, levels, context)

    @torch.no_grad()
    def inverse_error(self, x: Tensor, context: Tensor | None = None) -> float:
        """The largest |x - f^-1(f(x))| of the rows of `x`, in standard deviations."""
        y, _ = self.standardize(x, context)
        back = self.from_reference(self.to_reference(x, context), context)
        return (self.standardize(back, context)[0] - y).abs().max().item()

    def check(self, x: Tensor, context: Tensor | None = None, *, seed: int = 0) -> Check:
        """Can this model be trusted? Inverse error, refinement, and total mass.

        Args:
            x: rows of data, (batch, dim); up to 10,000 are used.
            context: of the rows; the mass is that of the density at the first.
            seed: of the importance sample.
        """
        x = self._input(x)
        return check(self, x, self._context(context, len(x)), seed=seed)

    def check_rows(self, rows: Rows) -> None:
        """Raise where the model can't have a density at these rows: a `ShapeError` for another
        number of columns, a `DataError` for a value on or outside its bounds."""
        want = self.dim + self.context_dim
        if rows.columns != want:
            must = f"have {want} columns like the flow"
            if self.context_dim:
                must = f"be a pair (x, context) with {self.dim} and {self.context_dim} columns"
            raise ShapeError(f"`{rows.name}` must {must}, got {rows.columns}")
        self.standardize.check_rows(rows)

    @torch.no_grad()
    def prepare(self, rows: Rows, generator: torch.Generator) -> None:
        """Fit the standardisation and start from weights that suit the data.

        Does nothing on a model that was prepared before: training goes on from where it is.
        """
        if self.prepared:
            return
        if self.standardizes:
            self.standardize.fit(rows)
        index = torch.randint(len(rows), (1024,), generator=generator)
        x = rows.take(index)[0].to(self.standardize.mean.device)
        y, features, _ = self.coordinates(*self.split(x))
        self.initialise(y if features is None else torch.cat([y, features], 1), generator)
        self.prepared.fill_(True)

    def initialise(self, inputs: Tensor, generator: torch.Generator) -> None:
        """Set weights by rows of the data, standardised and with their features."""

    @property
    def grid(self) -> str:
        """What the accuracy of densities and samples depends on, in words."""
        return "none: the map is in closed form"

    @contextmanager
    def refined(self, factor: int) -> Iterator[str]:
        """Within, the map is computed `factor` times as finely, where it has time steps; gives
        what changed, in words."""
        yield ""

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
        """One context for each row, (rows, context_dim), in double precision."""
        if context is None and not self.context_dim:
            return None
        want = f"`context` must be ({self.context_dim},) or ({rows}, {self.context_dim})"
        if not self.context_dim:
            raise ShapeError("`context` must be None: this flow has `context_dim` 0")
        if context is None:
            raise ShapeError(f"{want}, got None")
        context = torch.as_tensor(context).to(self.standardize.mean)
        shapes = ((self.context_dim,), (rows, self.context_dim))
        if context.shape not in shapes:
            raise ShapeError(f"{want}, got {tuple(context.shape)}")
        return context.expand(rows, -1)
