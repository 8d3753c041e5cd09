"""Does a posterior fit what was observed, and is the observation like the simulations at all?"""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike
from scipy.special import ndtri
from torch import Tensor

from ..errors import ArgumentError, DataError, ShapeError
from .calibration import LEVEL, holm
from .comparison import as_table

LEAST_PREDICTIONS = 100
MOST_ROWS = 10_000  # of the simulations that `outlier` looks at together
MOST_COLUMNS = 500
FAR = 0.5  # robust standard deviations beyond every simulation
SHOWN = 3


@dataclass(frozen=True)
class Predictive:
    """What `posterior_predictive` found, with its verdict in words.

    `tails` (features,) are two-sided probabilities of data as far out as the observed ones, in the
    order of `names`; `distance` is the Mahalanobis distance of the observation from the
    predictions, and `distance_p` the share of data that are as far from all the others.
    `simulated` of the predictions were finite, and `lost` were not. It has passed if, corrected for
    their number by Holm, no probability is below `level`.
    """

    names: tuple[str, ...]
    simulated: int
    lost: int
    tails: tuple[float, ...]
    distance: float
    distance_p: float
    level: float
    passed: bool
    verdict: str

    def to_dict(self) -> dict[str, Any]:
        """The fields, JSON-safe."""
        return asdict(self)


def posterior_predictive(
    simulate: Callable[[np.ndarray, np.random.Generator], np.ndarray],
    samples: Tensor | ArrayLike,
    observation: Tensor | ArrayLike,
    *,
    seed: int = 0,
    names: Sequence[str] | None = None,
    level: float = LEVEL,
) -> Predictive:
    """Simulate data from posterior samples and compare them with the observation.

    The observation was used once already, for the posterior, so these probabilities are larger
    than those of fresh data: a failure is a strong sign, a pass a weak one.

    Args:
        simulate: maps parameters (n, dim) and a generator to data (n, features); NaN in runs that
            failed, which are counted and left out.
        samples: posterior samples given the observation, (n, dim). At least 100 usable
            predictions are needed, and 200 for each feature to see one that is far out by itself.
        observation: (features,) or (1, features).
        seed: of the generator.
        names: of the features.
        level: how often, at most, data that fit fail.

    Raises:
        ArgumentError: `names` has another length.
        DataError: the observation is not finite, or fewer than 100 predictions are.
        ShapeError: the arrays do not fit together.

    Source: Gelman, Meng, Stern, Posterior predictive assessment of model fitness via realized
    discrepancies, Statistica Sinica 6, 1996.
    """
    observed = _observation(observation)
    theta = as_table(samples)
    if theta.ndim != 2:
        raise ShapeError(f"`samples` must be (n, dim), got {theta.shape}")
    data = as_table(simulate(theta, np.random.default_rng(seed)))
    if data.shape != (len(theta), len(observed)):
        raise ShapeError(
            f"`simulate(samples, generator)` must be {(len(theta), len(observed))}, with "
            f"the columns of `observation`, got {data.shape}"
        )
    labels = _labels(names, len(observed))
    usable = data[np.isfinite(data).all(1)]
    n = len(usable)
    if n < LEAST_PREDICTIONS:
        raise DataError(
            f"a predictive check needs at least {LEAST_PREDICTIONS} finite simulations, got {n} of "
            f"{len(theta)}"
        )
    below, above = (
        (1 + side.sum(0)) / (n + 1) for side in (usable <= observed, usable >= observed)
    )
    tails = np.minimum(1, 2 * np.minimum(below, above))
    # The observation among the predictions: alike, its rank is uniform whatever the distribution.
    distances = _distances(np.vstack([usable, observed]))
    p = float((distances >= distances[-1]).mean())
    adjusted = holm(np.append(tails, p))
    far = [
        f"{labels[i]} (p {tails[i]:.2g}, {'above' if above[i] < below[i] else 'below'} the "
        "predictions)"
        for i in np.argsort(tails, kind="stable")
        if adjusted[i] <= level
    ]
    joint = adjusted[-1] <= level
    passed = not far and not joint
    if passed:
        verdict = (
            f"The observation looks like {n:,} predictions of the posterior (smallest tail "
            f"probability {tails.min():.2g}, all features together {p:.2g})."
        )
    else:
        parts = [f"far out in {_listed(far)}"] if far else []
        parts += [f"far from them in all features together (p {p:.2g})"] if joint else []
        verdict = f"The posterior does NOT predict the observation: it is {' and '.join(parts)}."
    lost = len(theta) - n
    if lost:
        verdict += f" {lost:,} of {len(theta):,} simulations were not finite and left out."
    return Predictive(
        labels, n, lost, tuple(tails.tolist()), float(distances[-1]), p, level, passed, verdict
    )


def outlier(
    observation: Tensor | ArrayLike,
    contexts: Tensor | ArrayLike,
    names: Sequence[str] | None = None,
) -> str | None:
    """Say how far an observation lies outside the simulations, or None where it lies inside.

    A column is outside where it exceeds every simulation by half a robust standard deviation (the
    distance between quartiles over 1.35). If all are inside, their combination is judged by the
    Mahalanobis distance of normal scores, which neither heavy tails nor units influence; it is
    outside where it is a tenth farther than that of every simulation. A learned posterior
    extrapolates at such an observation, and its answer means little.

    Args:
        observation: (columns,) or (1, columns).
        contexts: what the posterior was trained on, (rows, columns); rows that are not finite are
            left out. Up to 10 000 of them are compared in combination, of up to 500 columns.
        names: of the columns.

    Raises:
        ArgumentError: `names` has another length.
        DataError: the observation is not finite, or there are fewer than 2 usable rows.
        ShapeError: the arrays do not fit together.
    """
    observed, rows = _observation(observation), as_table(contexts)
    if rows.ndim != 2 or rows.shape[1] != len(observed):
        raise ShapeError(
            f"`observation` must have the columns of `contexts`, {rows.shape}, got {len(observed)}"
        )
    labels = _labels(names, len(observed))
    rows = rows[np.isfinite(rows).all(1)]
    if len(rows) < 2:
        raise DataError(f"`contexts` must have at least 2 finite rows, got {len(rows)}")
    low, high = rows.min(0), rows.max(0)
    first, middle, third = np.quantile(rows, [0.25, 0.5, 0.75], axis=0)
    std = (third - first) / (2 * ndtri(0.75))
    # Columns of mostly one value have no distance between quartiles.
    std = np.where(std > 0, std, rows.std(0))
    excess = np.maximum(np.maximum(low - observed, observed - high), 0)
    # A constant has no scale: any other value is outside by more than all the others.
    beyond = np.divide(excess, std, out=np.where(excess > 0, np.inf, 0.0), where=std > 0)
    worst = [i for i in np.argsort(-beyond, kind="stable") if beyond[i] > FAR]
    if worst:
        parts = []
        for i in worst[:SHOWN]:
            if not np.isfinite(beyond[i]):
                parts.append(f"{labels[i]} is {observed[i]:.4g}, always {low[i]:.4g} in them")
                continue
            away = abs(observed[i] - middle[i]) / std[i]
            parts.append(
                f"{labels[i]} is {observed[i]:.4g}, simulated {low[i]:.4g} to {high[i]:.4g} "
                f"({away:.3g} robust standard deviations from their median)"
            )
        rest = f" and {len(worst) - SHOWN} more columns" if len(worst) > SHOWN else ""
        return (
            f"the observation lies outside the {len(rows):,} simulations: {'; '.join(parts)}{rest}"
        )
    if not 1 < len(observed) <= MOST_COLUMNS or len(rows) < 10 * len(observed):
        return None
    from scipy.stats import rankdata

    # Equally spaced rows, since simulations may come in order.
    rows = rows[np.linspace(0, len(rows) - 1, min(len(rows), MOST_ROWS)).astype(int)]
    table = np.vstack([rows, observed])
    distances = _distances(ndtri((rankdata(table, axis=0) - 0.5) / len(table)))
    farthest = distances[:-1].max()
    if distances[-1] <= 1.1 * farthest:
        return None
    return (
        f"the observation lies outside the {len(rows):,} simulations: each column is inside their "
        f"range, but the combination is not (Mahalanobis distance of normal scores "
        f"{distances[-1]:.3g}, at most {farthest:.3g} in the simulations)"
    )


def _distances(rows: np.ndarray) -> np.ndarray:
    """Mahalanobis distance of each row from the mean of all.

    The correlation matrix is shrunk towards the identity by the number of columns over that of
    rows, so that it has an inverse.
    """
    centred = rows - rows.mean(0)
    std = centred.std(0)
    y = centred / np.where(std > 0, std, 1)
    share = min(1.0, y.shape[1] / len(y))
    correlation = (1 - share) * (y.T @ y) / len(y) + share * np.eye(y.shape[1])
    return np.sqrt(np.einsum("ij,ij->i", y, np.linalg.solve(correlation, y.T).T))


def _observation(values: Tensor | ArrayLike) -> np.ndarray:
    observed = as_table(values)
    if observed.ndim == 2 and len(observed) == 1:
        observed = observed[0]
    if observed.ndim != 1 or not observed.size:
        raise ShapeError(f"`observation` must be one row, (columns,), got {observed.shape}")
    if not np.isfinite(observed).all():
        raise DataError("`observation` has values that are not finite")
    return observed


def _labels(names: Sequence[str] | None, count: int) -> tuple[str, ...]:
    if names is None:
        return tuple(f"x{i + 1}" for i in range(count))
    if len(names) != count:
        raise ArgumentError(f"`names` must be {count} names, got {len(names)}")
    return tuple(map(str, names))


def _listed(items: list[str]) -> str:
    rest = f" and {len(items) - SHOWN} more" if len(items) > SHOWN else ""
    return ", ".join(items[:SHOWN]) + rest
