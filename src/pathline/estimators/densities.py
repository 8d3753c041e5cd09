"""Densities, and densities of targets given features."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from sklearn.base import BaseEstimator, DensityMixin
from sklearn.utils import check_array
from sklearn.utils.validation import check_is_fitted, validate_data
from torch import Tensor
from torch.quasirandom import SobolEngine

from ..errors import ArgumentError, ShapeError
from ..flows import OTFlow, TransportMap
from ..flows.standardize import Bounds
from ..posterior.pilots import build
from ..train import fit
from .rows import FEWEST_ROWS, distinct, plain, seed_of

PREDICTED, RANKED = 128, 1024  # samples of a mean, and of quantiles


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
        rows, weights = distinct(X, sample_weight)
        seed = seed_of(self.random_state)
        flow = OTFlow(
            rows.shape[1],
            plain(self.width),
            plain(self.depth),
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
            max_steps=plain(self.max_steps),
            batch_size=plain(self.batch_size),
            learning_rate=self.learning_rate,
            patience=plain(self.patience),
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
        n_samples = plain(n_samples)
        if not isinstance(n_samples, int) or n_samples < 1:
            raise ArgumentError(f"`n_samples` must be a positive integer, got {n_samples!r}")
        return self.flow_.sample(n_samples, seed=seed_of(random_state)).numpy()


class ConditionalFlowDensity(DensityMixin, BaseEstimator):
    """The density of targets given features, by a conditional flow: probabilistic regression.

    Unlike a regression it gives exact log-densities, samples and quantiles of any shape: skewed,
    of several modes, with a width that depends on the features. Suits continuous targets and
    hundreds of rows or more; it starts from the linear-Gaussian regression, and with fewer rows
    stays close to it. Rows and weights are treated as in `FlowDensity`.

    Args:
        method: a name in `pathline.posterior.pilots.METHODS`: "cot" moves samples along straight
            paths in time, "pcp" is the gradient of a convex potential.
        width, depth: of the network; the flow's own choice if None.
        embedding: features that a network learns from `X`, where it has many columns.
        transport: weight of the transport cost, against the likelihood; the flow's own if None.
        hjb: weight of the Hamilton-Jacobi-Bellman residual; the flow's own if None. These two are
            of "cot" only.
        support: pairs (lower, upper), one for each column of `y`, infinite where free; None if all
            are.
        max_steps: training steps; chosen from the number of rows if None.
        batch_size: rows of a training step.
        learning_rate: the first of a cosine schedule; chosen from the number of steps if None.
        patience: stop after this many validations without improvement, of about fifty.
        random_state: int, RandomState or None, as in scikit-learn; decides the rows held out for
            validation (a tenth), the initial weights and the batches.
        verbose: show the progress of training on standard error.

    Attributes:
        flow_: the trained flow, in double precision; its context are the features.
        n_iter_: training steps taken.
        n_features_in_: number of columns of `X` seen in `fit`.
        feature_names_in_: names of the columns of `X` seen in `fit`, if they were all strings.

    Source: Wang et al., arXiv 2310.16975.

    Example:
        >>> import numpy as np
        >>> X = np.random.default_rng(0).normal(size=(200, 2))
        >>> y = X[:, 0] + np.random.default_rng(1).normal(size=200)
        >>> model = ConditionalFlowDensity(max_steps=20, random_state=0).fit(X, y)
        >>> model.sample(X[:3], 5, random_state=0).shape
        (3, 5)
        >>> model.quantiles(X[:3], [0.1, 0.9]).shape
        (3, 2)
    """

    flow_: TransportMap
    n_iter_: int
    n_features_in_: int

    def __init__(
        self,
        *,
        method: str = "cot",
        width: int | None = None,
        depth: int | None = None,
        embedding: int | None = None,
        transport: float | None = None,
        hjb: float | None = None,
        support: Sequence[Bounds] | None = None,
        max_steps: int | None = None,
        batch_size: int = 512,
        learning_rate: float | None = None,
        patience: int = 10,
        random_state: int | np.random.RandomState | None = None,
        verbose: bool = False,
    ) -> None:
        self.method = method
        self.width = width
        self.depth = depth
        self.embedding = embedding
        self.transport = transport
        self.hjb = hjb
        self.support = support
        self.max_steps = max_steps
        self.batch_size = batch_size
        self.learning_rate = learning_rate
        self.patience = patience
        self.random_state = random_state
        self.verbose = verbose

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.target_tags.required = True
        tags.target_tags.multi_output = True
        return tags

    def fit(self, X: Any, y: Any, sample_weight: Any = None) -> "ConditionalFlowDensity":
        """Estimate the density of the rows of `y` given those of `X`.

        Args:
            X: features, (n_samples, n_features).
            y: targets, (n_samples,) or (n_samples, n_targets), at least three different rows.
            sample_weight: not negative, (n_samples,); only their proportions matter.

        Returns:
            The estimator itself.

        Raises:
            ValueError: an array is not finite, or the shapes don't fit; there are too few rows,
                constant or linearly dependent targets, or targets off the `support`; or an
                argument is out of range.
            TrainingError: training diverged again and again.
        """
        X, y = validate_data(
            self, X, y, dtype=np.float64, multi_output=True, y_numeric=True,
            ensure_min_samples=FEWEST_ROWS,
        )  # fmt: skip
        targets = np.asarray(y, dtype=np.float64)
        self._is_vector = targets.ndim == 2
        targets = targets if self._is_vector else targets[:, None]
        rows, weights = distinct(np.column_stack([targets, X]), sample_weight)
        dim, seed = targets.shape[1], seed_of(self.random_state)
        options = {
            name: plain(getattr(self, name))
            for name in ("width", "depth", "embedding", "transport", "hjb")
        }
        flow = build(self.method, dim, X.shape[1], options, support=self.support, seed=seed)
        run = fit(
            flow,
            (rows[:, :dim], rows[:, dim:]),
            sample_weight=weights,
            seed=seed,
            max_steps=plain(self.max_steps),
            batch_size=plain(self.batch_size),
            learning_rate=self.learning_rate,
            patience=plain(self.patience),
            progress=bool(self.verbose),
        )
        self.flow_ = flow.double()
        self.n_iter_ = run.steps
        return self

    def score_samples(self, X: Any, y: Any) -> np.ndarray:
        """Log-density in nats of each row of `y` given that of `X`, (n_samples,).

        Off the `support` it is -inf.
        """
        context = self._context(X)
        targets = check_array(y, ensure_2d=False, dtype=np.float64, input_name="y")
        targets = targets[:, None] if targets.ndim == 1 else targets
        if targets.shape != (len(context), self.flow_.dim):
            raise ShapeError(
                f"`y` must have {len(context)} rows like `X` and the {self.flow_.dim} targets seen "
                f"in fit, got {targets.shape}"
            )
        with torch.no_grad():
            return self.flow_.log_prob(torch.tensor(targets), context).numpy()

    def score(self, X: Any, y: Any) -> float:
        """Mean log-density in nats of the rows of `y` given those of `X`."""
        return float(self.score_samples(X, y).mean())

    def sample(
        self, X: Any, n_samples: int = 1, random_state: int | np.random.RandomState | None = None
    ) -> np.ndarray:
        """Draw targets given each row of `X`.

        Args:
            X: features, (n, n_features).
            n_samples: how many for each row, at least one.
            random_state: int, RandomState or None, as in scikit-learn.

        Returns:
            (n, n_samples) where `fit` saw a 1-D `y`, else (n, n_samples, n_targets).
        """
        context = self._context(X)
        n_samples = plain(n_samples)
        if not isinstance(n_samples, int) or n_samples < 1:
            raise ArgumentError(f"`n_samples` must be a positive integer, got {n_samples!r}")
        z = self.flow_.reference_sample(len(context) * n_samples, seed=seed_of(random_state))
        return self._targets(z, context, n_samples)

    def predict(self, X: Any) -> np.ndarray:
        """The mean of the targets given each row of `X`, shaped like `y` in `fit`.

        It is that of 128 samples from points that fill the reference evenly (scrambled Sobol), the
        same for each row.
        """
        return self._even(self._context(X), PREDICTED).mean(1)

    def quantiles(self, X: Any, levels: Sequence[float]) -> np.ndarray:
        """Quantiles of each target given each row of `X`, from 1024 samples as in `predict`.

        Args:
            X: features, (n, n_features).
            levels: strictly between 0 and 1.

        Returns:
            (n, levels) where `fit` saw a 1-D `y`, else (n, levels, n_targets).
        """
        at = np.atleast_1d(np.asarray(levels, dtype=float))
        if at.ndim != 1 or not ((at > 0) & (at < 1)).all():
            raise ArgumentError(f"`levels` must lie strictly between 0 and 1, got {levels!r}")
        return np.moveaxis(np.quantile(self._even(self._context(X), RANKED), at, axis=1), 0, 1)

    def _context(self, X: Any) -> Tensor:
        check_is_fitted(self)
        return torch.tensor(validate_data(self, X, dtype=np.float64, reset=False))

    def _even(self, context: Tensor, count: int) -> np.ndarray:
        """`count` samples given each context, from the same points of the reference."""
        u = SobolEngine(self.flow_.dim, scramble=True, seed=0).draw(count, dtype=torch.float64)
        z = torch.special.ndtri(u.clamp(1e-6, 1 - 1e-6))  # (count, dim)
        return self._targets(z.repeat(len(context), 1), context, count)

    def _targets(self, z: Tensor, context: Tensor, count: int) -> np.ndarray:
        """Where `count` points for each context are carried, of the shape of `y` in `fit`."""
        with torch.no_grad():
            y = self.flow_.from_reference(z, context.repeat_interleave(count, 0)).numpy()
        shape = (len(context), count)
        return y.reshape(*shape, -1) if self._is_vector else y.reshape(shape)
