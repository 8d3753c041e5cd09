"""Rows, weights and seeds as scikit-learn hands them over."""

import numbers
from typing import Any

import numpy as np
from sklearn.utils import check_array, check_random_state

from ..errors import DataError, ShapeError

FEWEST_ROWS = 3  # two to train on, one to validate


def distinct(X: np.ndarray, sample_weight: Any) -> tuple[np.ndarray, np.ndarray | None]:
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


def seed_of(random_state: int | np.random.RandomState | None) -> int:
    """The seed of a training or of samples that scikit-learn's argument stands for."""
    return int(check_random_state(random_state).randint(np.iinfo(np.int32).max))


def plain(value: Any) -> Any:
    """NumPy integers, as parameter grids hold them, as Python's."""
    return int(value) if isinstance(value, numbers.Integral) else value
