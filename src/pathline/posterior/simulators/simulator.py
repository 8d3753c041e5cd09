"""What a simulator is: a prior over parameters, and data drawn given the parameters."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from ...errors import ArgumentError, DataError, ShapeError
from .priors import Bounds, Prior


@dataclass(frozen=True, eq=False)
class Simulator:
    """A task of simulation-based inference: draw theta from the prior, then x given theta.

    Args:
        name: as in `SIMULATORS`.
        parameters: the names of the entries of theta.
        context_dim: the number of data, the entries of x.
        prior: the distribution of theta.
        model: `(theta (n, dim), generator) -> x (n, context_dim)`, one run for each row; a run
            that did not end is a row of NaN.
        source: citation.
        likelihood: `(theta (n, dim), x (context_dim,)) -> (n,)`, the log-likelihood up to a
            function of x, where it is known.

    All arrays are NumPy, in double precision.
    """

    name: str
    parameters: tuple[str, ...]
    context_dim: int
    prior: Prior
    model: Callable[[np.ndarray, np.random.Generator], np.ndarray]
    source: str
    likelihood: Callable[[np.ndarray, np.ndarray], np.ndarray] | None = None

    @property
    def dim(self) -> int:
        """The number of parameters."""
        return self.prior.dim

    @property
    def support(self) -> list[Bounds]:
        """(lower, upper) of each parameter under the prior, or None where it is unbounded."""
        return self.prior.support

    def sample_prior(self, n: int, generator: np.random.Generator) -> np.ndarray:
        """Draws of the parameters, (n, dim)."""
        return self.prior.sample(n, generator)

    def prior_log_prob(self, theta: np.ndarray) -> np.ndarray:
        """Log-density of the prior, (n,); -inf outside its support."""
        return self.prior.log_prob(self._checked(theta))

    def simulate(self, theta: np.ndarray, generator: np.random.Generator) -> np.ndarray:
        """Data (n, context_dim) given `theta` (n, dim); NaN in the rows that did not end.

        Raises:
            ShapeError: `theta` is not (n, dim).
        """
        return self.model(self._checked(theta), generator)

    def log_likelihood(self, theta: np.ndarray, x: np.ndarray) -> np.ndarray:
        """Log-likelihood (n,) of the data `x` (context_dim,), up to a function of x.

        Raises:
            ShapeError: a shape is wrong.
            ArgumentError: the likelihood of this simulator is not known.
        """
        if self.likelihood is None:
            raise ArgumentError(f"the likelihood of the simulator {self.name!r} is not known")
        theta, x = self._checked(theta), np.asarray(x, dtype=np.float64)
        if x.shape != (self.context_dim,):
            raise ShapeError(f"`x` must be ({self.context_dim},), got {x.shape}")
        return self.likelihood(theta, x)

    def draw(self, n: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
        """`n` independent draws of (theta (n, dim), x (n, context_dim)), all of them finite."""
        theta, x, _ = self.draw_counted(n, seed)
        return theta, x

    def draw_counted(self, n: int, seed: int) -> tuple[np.ndarray, np.ndarray, int]:
        """`draw`, and the number of runs that did not end and were replaced by others.

        Where there are such runs, the draws are from the joint distribution given that a run ends.

        Raises:
            ArgumentError: `n` is not positive.
            DataError: hardly any run ends.
        """
        if n < 1:
            raise ArgumentError(f"`n` must be a positive number of simulations, got {n}")
        generator = np.random.default_rng(seed)
        thetas, xs, kept, runs = [], [], 0, 0
        while kept < n:
            share = (kept + 1) / (runs + 1)  # of the runs that ended, so far
            if share < 1e-4:
                raise DataError(f"only {kept} of {runs} runs of the simulator {self.name!r} ended")
            rows = int(np.ceil((n - kept) / share))
            theta = self.sample_prior(rows, generator)
            x = self.simulate(theta, generator)
            ended = np.isfinite(x).all(1)
            if not ended.all():
                theta, x = theta[ended], x[ended]
            thetas.append(theta)
            xs.append(x)
            kept, runs = kept + len(x), runs + rows
        if len(xs) > 1:  # a copy only where it is needed: x may be large
            theta, x = np.concatenate(thetas), np.concatenate(xs)
        return theta[:n], x[:n], runs - kept

    def _checked(self, theta: np.ndarray) -> np.ndarray:
        theta = np.asarray(theta, dtype=np.float64)
        if theta.ndim != 2 or theta.shape[1] != self.dim:
            raise ShapeError(
                f"`theta` must be (n, {self.dim}), the parameters {', '.join(self.parameters)}; "
                f"got {theta.shape}"
            )
        return theta
