"""Neural ODEs of irregular, ragged time series with the conventions of scikit-learn."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple, Self

import numpy as np
from sklearn.base import BaseEstimator
from sklearn.utils.validation import check_is_fitted

from ..data.series import Series
from ..networks import TrajectoryNet, fit_trajectories
from ..networks.forecasts import keep_series, kept_series, log_densities, quantile, solutions
from .files import Saved
from .rows import plain, seed_of


class Forecast(NamedTuple):
    """What is expected at some times, each shaped like `y` in `fit`."""

    mean: np.ndarray
    lower: np.ndarray  # of the interval
    upper: np.ndarray
    sd: np.ndarray


class TrajectoryRegressor(Saved, BaseEstimator):
    """Series in time as the solutions of an ordinary differential equation that is learned.

    An ensemble of networks is the velocity z' = v(z); it learns to pass the observations in windows
    of the series, each from its first one. Series may be irregular, of different lengths and times,
    and have missing values. Values are brought to mean 0 and variance 1, and times to the length of
    a usual window. Forecasts have intervals: from how far the members are apart, and from the
    errors on held-out windows at the same time ahead. Held out are of ten series or more a random
    tenth of them, and of fewer the last tenth of each.

    Args:
        window: observations after its first that a window has; more for slow or noisy series.
        extra: components of the state that are not observed, for series whose next value does not
            follow from the last one alone; they begin at zero, or by `history`.
        history: observations before the first of a window that choose its first state.
        periods: known periods of the velocity, such as a day, in the units of `t`.
        width, depth: neurons and hidden layers of each network.
        members: networks of the ensemble.
        steps: Runge-Kutta steps of a usual window; `window` if None.
        max_steps: training steps; 1000 if None.
        batch_size: windows of a training step.
        learning_rate: the first of a cosine schedule; 0.01 if None.
        patience: stop after this many validations without improvement, of about fifty.
        random_state: int, RandomState or None, as in scikit-learn; decides what is held out, the
            first weights and the batches.
        verbose: show the progress of training on standard error.

    Attributes:
        net_: the trained `TrajectoryNet`, in double precision.
        series_: the series seen in `fit`.
        n_iter_: training steps taken.

    Source: Chen, Rubanova, Bettencourt, Duvenaud, Neural ordinary differential equations, NeurIPS
    2018, arXiv 1806.07366; Onken and Ruthotto, arXiv 2005.13420 (training of windows).

    Example:
        >>> import numpy as np
        >>> t = np.sort(np.random.default_rng(0).uniform(0, 10, 60))
        >>> model = TrajectoryRegressor(members=2, max_steps=20, random_state=0)
        >>> model.fit(t, np.column_stack([np.cos(t), np.sin(t)])).forecast([10.5, 11.0]).mean.shape
        (2, 2)
    """

    net_: TrajectoryNet
    series_: Series
    n_iter_: int

    def __init__(
        self,
        *,
        window: int = 10,
        extra: int = 0,
        history: int = 0,
        periods: Sequence[float] = (),
        width: int = 64,
        depth: int = 2,
        members: int = 5,
        steps: int | None = None,
        max_steps: int | None = None,
        batch_size: int = 64,
        learning_rate: float | None = None,
        patience: int = 15,
        random_state: int | np.random.RandomState | None = None,
        verbose: bool = False,
    ) -> None:
        self.window = window
        self.extra = extra
        self.history = history
        self.periods = periods
        self.width = width
        self.depth = depth
        self.members = members
        self.steps = steps
        self.max_steps = max_steps
        self.batch_size = batch_size
        self.learning_rate = learning_rate
        self.patience = patience
        self.random_state = random_state
        self.verbose = verbose

    def fit(self, t: Any, y: Any, groups: Any = None) -> "TrajectoryRegressor":
        """Learn the velocity from series.

        Args:
            t: times, (rows,), increasing within each group.
            y: observations, (rows,) or (rows, columns); NaN where missing.
            groups: to which series each row belongs, (rows,), text or numbers, all of one kind;
                None if to one.

        Returns:
            The estimator itself.

        Raises:
            ShapeError: the shapes don't fit.
            DataError: times are not finite, not sorted or twice in a group, values are infinite, a
                group has a single observation, or there are too few in all; groups are neither text
                nor numbers.
            ArgumentError: an argument is out of range.
            TrainingError: training diverged again and again.
        """
        series = Series.of(t, y, groups)
        seed = seed_of(self.random_state)
        names = ("window", "extra", "history", "width", "depth", "members", "steps")
        options = {name: plain(getattr(self, name)) for name in names}
        net = TrajectoryNet(series.y.shape[1], periods=self.periods, seed=seed, **options)
        run = fit_trajectories(
            net,
            series,
            seed=seed,
            max_steps=plain(self.max_steps),
            batch_size=plain(self.batch_size),
            learning_rate=self.learning_rate,
            patience=plain(self.patience),
            progress=bool(self.verbose),
        )
        self._is_vector = np.ndim(y) == 2
        self.net_, self.series_, self.n_iter_ = net.double().eval(), series, run.steps
        return self

    def predict(self, t: Any, groups: Any = None) -> np.ndarray:
        """The solution from the first observation of each series, shaped like `y` in `fit`.

        Args:
            t: times, (rows,), not before that; in any order.
            groups: which series of `fit` each belongs to, (rows,); None if there is one.

        Raises:
            DataError: there is no such series, or a time lies before its first observation, or
                more than 100,000 steps after it.
        """
        check_is_fitted(self)
        return self._shaped(solutions(self.net_, self.series_, t, groups, last=False)[0])

    def forecast(
        self, t: Any, groups: Any = None, *, level: float = 0.9, observed: Any = None
    ) -> Forecast:
        """What follows the last observation of each series, with intervals.

        Args:
            t: times, (rows,), not before that; in any order.
            groups: which series each belongs to, (rows,); None if there is one.
            level: share of observations that should lie in the intervals.
            observed: other series (t, y) or (t, y, groups) to forecast from, in place of those of
                `fit`.

        Raises:
            ArgumentError: `level` does not lie between 0 and 1.
            ShapeError, DataError: as in `fit` and `predict`.
        """
        check_is_fitted(self)
        z = quantile(level)
        series = self.series_ if observed is None else Series.of(*observed, fewest=1)
        mean, sd = solutions(self.net_, series, t, groups, last=True)
        return Forecast(*map(self._shaped, (mean, mean - z * sd, mean + z * sd, sd)))

    def score(self, t: Any, y: Any, groups: Any = None) -> float:
        """Mean log-density in nats of each row given those before it, as `pathline score` has it.

        The first row of a series has none. Searches over parameters need folds that keep the order
        of the times, such as those of scikit-learn's `TimeSeriesSplit`, or whole groups.

        Args:
            t, y, groups: series as in `fit`, with two observations or more each.

        Raises:
            ShapeError, DataError: as in `fit`.
        """
        check_is_fitted(self)
        return float(np.nanmean(log_densities(self.net_, Series.of(t, y, groups))))

    def save(self, folder: str | Path) -> None:
        """Write the estimator and its series into a folder, as safetensors and JSON; `random_state`
        is not kept. `pathline.load` reads its network from there."""
        super().save(folder)
        keep_series(Path(folder), self.series_)

    @classmethod
    def load(cls, folder: str | Path) -> Self:
        """What `save` wrote; nothing in the files is executed.

        Raises:
            ModelError: the folder holds none, a damaged one, or something else.
        """
        found = super().load(folder)
        found.series_ = kept_series(folder)
        return found

    def _fitted(self) -> dict[str, Any]:
        return {"vector": self._is_vector}

    def _restore(self, fitted: dict[str, Any]) -> None:
        self._is_vector = bool(fitted["vector"])

    def _shaped(self, values: np.ndarray) -> np.ndarray:
        return values if self._is_vector else values[:, 0]
