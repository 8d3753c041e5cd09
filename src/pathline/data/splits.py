"""A data set in three parts."""

from dataclasses import dataclass
from importlib.resources import files
from importlib.resources.abc import Traversable

import numpy as np


@dataclass(frozen=True, eq=False)
class Splits:
    """Rows to train, to choose and to test with, each (rows, columns) in double precision.

    `source` has citation and licence.
    """

    name: str
    train: np.ndarray
    validation: np.ndarray
    test: np.ndarray
    columns: tuple[str, ...]
    source: str


def shuffle_split(values: np.ndarray, seed: int = 42) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Shuffled rows (rows, columns) in parts of 80, 10 and 10 %."""
    shuffled = values[np.random.default_rng(seed).permutation(len(values))]
    tenth = len(values) // 10
    train, validation, test = np.split(shuffled, [len(values) - 2 * tenth, len(values) - tenth])
    return train, validation, test


def shipped(name: str) -> Traversable:
    """A data file inside the package."""
    return files(__package__) / "files" / name
