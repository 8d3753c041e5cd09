"""What all continuous flows share: the map is made by moving points in time."""

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from ..errors import ArgumentError
from .map import TransportMap
from .standardize import Bounds

INVERSE_TOLERANCE = 1e-5  # standard deviations, in double precision; other rows may be worse


class Flow(TransportMap):
    """A transport map by time: dz/dt = v(t, z) carries data at t = 0 to N(0, I) at t = 1.

    A subclass has `velocity`, `move`, `objective` and `config`.
    """

    hjb: float  # weight of the HJB residual in training; 0 where there is none
    richardson = 16 / 15  # of order four: what is left of the error at twice the steps counts in

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
        super().__init__(dim, context_dim, standardize=standardize, support=support)
        for name, count in (("train_steps", train_steps), ("steps", steps)):
            if not isinstance(count, int) or count < 1:
                raise ArgumentError(f"`{name}` must be a positive integer, got {count!r}")
        self.steps, self.train_steps = steps, train_steps

    def velocity(self, t: Tensor, z: Tensor, features: Tensor | None = None) -> Tensor:
        """dz/dt at time `t`, () or (batch,), and standardised points `z`, (batch, dim)."""
        raise NotImplementedError

    def move(
        self,
        z: Tensor,
        features: Tensor | None,
        *,
        start: float = 0.0,
        stop: float = 1.0,
        log_det: bool = True,
    ) -> tuple[Tensor, Tensor | None]:
        """Where standardised points `z` (batch, dim) go between two times, and the exact
        log |det| of this map, (batch,), or None."""
        raise NotImplementedError

    def carry(
        self, y: Tensor, features: Tensor | None, *, log_det: bool = True
    ) -> tuple[Tensor, Tensor | None]:
        return self.move(y, features, log_det=log_det)

    def carry_back(
        self, z: Tensor, features: Tensor | None, *, log_det: bool = True
    ) -> tuple[Tensor, Tensor | None]:
        return self.move(z, features, start=1.0, stop=0.0, log_det=log_det)

    def trajectory(
        self, x: Tensor, steps: int | None = None, context: Tensor | None = None
    ) -> Tensor:
        """States from data to reference, in standardised units: (steps + 1, batch, dim)."""
        raise NotImplementedError

    def costs(self, x: Tensor, context: Tensor | None = None) -> dict[str, float]:
        """Means over the rows of `x` of what regularises the training, in standardised units."""
        raise NotImplementedError

    def config(self) -> dict[str, Any]:
        return super().config() | {"train_steps": self.train_steps, "steps": self.steps}

    def log_prob(
        self, x: Tensor, context: Tensor | None = None, *, return_error: bool = False
    ) -> Any:
        """Log-density in nats of the rows of `x` (batch, dim), as (batch,); -inf off the support.

        Differentiable; evaluated in chunks, so memory does not grow with the batch.

        With `return_error` the result is a pair, the log-densities and an estimate of their
        error by the time grid, (batch,), at three times the price: Richardson's, from twice the
        time steps or a hundredth of the tolerance. It knows nothing of round-off.
        """
        log_prob = super().log_prob(x, context)
        if not return_error:
            return log_prob
        with self.refined(2), torch.no_grad():
            finer = super().log_prob(x, context)
        error = (finer - log_prob.detach()).abs() * self.richardson
        return log_prob, torch.where(log_prob.isneginf(), 0.0, error)

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
        found again to 1e-5 standard deviations, in double precision.

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
