"""Density estimation with the interface of scikit-learn."""

import numbers
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from sklearn.base import BaseEstimator, DensityMixin
from sklearn.utils import check_array, check_random_state
from sklearn.utils.validation import check_is_fitted, validate_data

from .errors import ArgumentError, DataError, ShapeError
from .flows import OTFlow
from .flows.standardize import Bounds
from .train import fit

__all__ = ["FlowDensity"]

FEWEST_ROWS = 3  # two to train on, one to validate


class FlowDensity(DensityMixin, BaseEstimator):
    """Density estimation with an OT-Flow: exact log-densities, and samples in one solve.

    Suits continuous columns, hundreds of rows or more; with fewer, it stays close to the Gaussian
    of the data's mean and covariance. For data that do not fit in memory, training on several
    devices, run folders and checkpoints, use `pathline.fit` with a `pathline.flows.OTFlow`.

    Rows that occur several times count as one row with their weights summed, and rows of weight
    zero are left out. So integer weights are the same as repeated rows, exactly; the order of the
    rows does not matter; and no row is both trained on and held out for validation.

    Args:
        width: neurons of each layer of the potential; chosen from the number of columns if None.
        depth: layers of the potential; chosen from the number of columns if None.
        transport: weight of the transport cost, against the likelihood.
        hjb: weight of the Hamilton-Jacobi-Bellman residual, against the likelihood; chosen by
            `OTFlow` if None.
        trace: how training computes the Laplacian: "exact", "probe" or "auto"; see `OTFlow`.
        standardize: work in coordinates of mean zero and covariance one.
        support: pairs (lower, upper), one for each column, infinite where free; None if all are.
        max_steps: training steps; chosen from the number of rows if None.
        batch_size: rows of a training step.
        learning_rate: the first of a cosine schedule; chosen from the number of steps if None.
        patience: stop after this many validations without improvement, of about fifty.
        random_state: int, RandomState or None, as in scikit-learn; decides the rows held out for
            validation (a tenth), the initial weights and the batches.
        verbose: show the progress of training on standard error.

    Attributes:
        flow_: the trained `OTFlow`, in double precision.
        n_iter_: training steps taken.
        n_features_in_: number of columns seen in `fit`.
        feature_names_in_: names of the columns seen in `fit`, if they were all strings.

    Source: Onken, Wu Fung, Li, Ruthotto, OT-Flow, AAAI 2021 (arXiv 2006.00104).

    Example:
        >>> import numpy as np
        >>> X = np.random.default_rng(0).normal(size=(200, 2))
        >>> model = FlowDensity(max_steps=20, random_state=0).fit(X)
        >>> model.score_samples(X).shape
        (200,)
    """

    flow_: OTFlow
    n_iter_: int
    n_features_in_: int

    def __init__(
        self,
        *,
        width: int | None = None,
        depth: int | None = None,
        transport: float = 0.003,
        hjb: float | None = None,
        trace: str = "auto",
        standardize: bool = True,
        support: Sequence[Bounds] | None = None,
        max_steps: int | None = None,
        batch_size: int = 512,
        learning_rate: float | None = None,
        patience: int = 10,
        random_state: int | np.random.RandomState | None = None,
        verbose: bool = False,
    ) -> None:
        self.width = width
        self.depth = depth
        self.transport = transport
        self.hjb = hjb
        self.trace = trace
        self.standardize = standardize
        self.support = support
        self.max_steps = max_steps
        self.batch_size = batch_size
        self.learning_rate = learning_rate
        self.patience = patience
        self.random_state = random_state
        self.verbose = verbose

    def fit(self, X: Any, y: None = None, sample_weight: Any = None) -> "FlowDensity":
        """Estimate the density of the rows of `X`.

        Args:
            X: data, (n_samples, n_features), at least three different rows.
            y: ignored.
            sample_weight: not negative, (n_samples,); only their proportions matter.

        Returns:
            The estimator itself.

        Raises:
            ValueError: `X` is not a finite 2-D array, has too few rows, constant or linearly
                dependent columns, or values off the `support`; or an argument is out of range.
            TrainingError: training diverged again and again.
        """
        X = validate_data(self, X, dtype=np.float64, ensure_min_samples=FEWEST_ROWS)
        rows, weights = _distinct(X, sample_weight)
        seed = _seed(self.random_state)
        flow = OTFlow(
            rows.shape[1],
            _plain(self.width),
            _plain(self.depth),
            transport=self.transport,
            hjb=self.hjb,
            trace=self.trace,
            standardize=self.standardize,
            support=self.support,
            generator=torch.Generator().manual_seed(seed),
        )
        run = fit(
            flow,
            rows,
            sample_weight=weights,
            seed=seed,
            max_steps=_plain(self.max_steps),
            batch_size=_plain(self.batch_size),
            learning_rate=self.learning_rate,
            patience=_plain(self.patience),
            progress=bool(self.verbose),
        )
        self.flow_ = flow.double()
        self.n_iter_ = run.steps
        return self

    def score_samples(self, X: Any) -> np.ndarray:
        """Log-density in nats of each row of `X`, (n_samples,), in double precision.

        Off the `support` it is -inf.
        """
        check_is_fitted(self)
        X = validate_data(self, X, dtype=np.float64, reset=False)
        with torch.no_grad():
            return self.flow_.log_prob(torch.tensor(X)).numpy()

    def score(self, X: Any, y: None = None) -> float:
        """Mean log-density in nats of the rows of `X`; `y` is ignored.

        The mean, as in `GaussianMixture`, and not the sum, as in `KernelDensity`: so scores on
        folds of different sizes compare.
        """
        return float(self.score_samples(X).mean())

    def sample(
        self, n_samples: int = 1, random_state: int | np.random.RandomState | None = None
    ) -> np.ndarray:
        """Draw rows from the estimated density.

        Args:
            n_samples: how many, at least one.
            random_state: int, RandomState or None, as in scikit-learn.

        Returns:
            (n_samples, n_features), in double precision.
        """
        check_is_fitted(self)
        n_samples = _plain(n_samples)
        if not isinstance(n_samples, int) or n_samples < 1:
            raise ArgumentError(f"`n_samples` must be a positive integer, got {n_samples!r}")
        return self.flow_.sample(n_samples, seed=_seed(random_state)).numpy()


def _distinct(X: np.ndarray, sample_weight: Any) -> tuple[np.ndarray, np.ndarray | None]:
    """The different rows of `X` of positive weight, sorted, and their summed weights; None for
    weights that are all equal."""
    weights = np.ones(len(X))
    if sample_weight is not None:
        weights = check_array(
            sample_weight, ensure_2d=False, dtype=np.float64, input_name="sample_weight"
        )
        if weights.shape != (len(X),):
            raise ShapeError(f"`sample_weight` must be ({len(X)},), got {weights.shape}")
        if (weights < 0).any() or not weights.any():
            raise DataError("`sample_weight` must not be negative, and must not be all zero")
    kept = weights > 0
    rows, inverse = np.unique(X[kept], axis=0, return_inverse=True)
    if len(rows) < FEWEST_ROWS:
        raise DataError(
            f"`X` must have at least {FEWEST_ROWS} different rows of positive weight, got "
            f"{len(rows)} in n_samples={len(X)}"
        )
    totals = np.bincount(inverse.ravel(), weights[kept])
    return rows, None if (totals == totals[0]).all() else totals


def _seed(random_state: int | np.random.RandomState | None) -> int:
    return int(check_random_state(random_state).randint(np.iinfo(np.int32).max))


def _plain(value: Any) -> Any:
    """NumPy integers, as parameter grids hold them, as Python's."""
    return int(value) if isinstance(value, numbers.Integral) else value
