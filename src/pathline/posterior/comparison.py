"""Two sets of samples: are they of one distribution?"""

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor

from ..errors import DataError, ShapeError


def c2st(x: Tensor | ArrayLike, y: Tensor | ArrayLike, *, seed: int = 1, folds: int = 5) -> float:
    """The accuracy with which a network tells two samples apart: 0.5 if it can't, at most 1.

    The classifier two-sample test of the sbi benchmark: both samples in the units of the first
    one's mean and standard deviation, two hidden layers of 10 dim units, accuracy averaged over
    folds. An under-trained classifier looks like a good posterior, so compare numbers only for
    equally many samples, 10 000 in the benchmark (which takes about a minute).

    Args:
        x: reference samples, (rows, dim).
        y: samples to judge, of the same shape.
        seed: of the folds and of the network.
        folds: of the cross-validation.

    Raises:
        ShapeError: the samples are not two tables of the same shape.
        DataError: values that are not finite.

    Source: Lueckmann et al., Benchmarking simulation-based inference, arXiv 2101.04653, and its
    code, sbibm/metrics/c2st.py.
    """
    from sklearn.model_selection import KFold, cross_val_score
    from sklearn.neural_network import MLPClassifier

    a, b = as_table(x), as_table(y)
    if a.ndim != 2 or a.shape != b.shape or len(a) < folds:
        raise ShapeError(
            f"`x` and `y` must both be (rows, dim) with at least {folds} rows, got {a.shape} and "
            f"{b.shape}"
        )
    for name, values in (("x", a), ("y", b)):
        if not np.isfinite(values).all():
            raise DataError(f"`{name}` has values that are not finite")
    mean, std = a.mean(0), a.std(0, ddof=1)
    std = np.where(std > 0, std, 1)
    data = np.concatenate([(a - mean) / std, (b - mean) / std]).astype(np.float32)
    target = np.repeat([0.0, 1.0], len(a))
    width = 10 * a.shape[1]
    network = MLPClassifier(
        (width, width), activation="relu", solver="adam", max_iter=10_000, random_state=seed
    )
    split = KFold(folds, shuffle=True, random_state=seed)
    return float(cross_val_score(network, data, target, cv=split, scoring="accuracy").mean())


def as_table(values: Tensor | ArrayLike) -> np.ndarray:
    """Values as an array of doubles."""
    if isinstance(values, Tensor):
        values = values.detach().to("cpu", torch.float64).numpy()
    return np.asarray(values, dtype=float)
