"""Images with labels: small digits, MNIST, and a part of CIFAR-10."""

import os
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from ..errors import ArgumentError, DataError, unknown
from .published import MNIST_SOURCE, Parts, load_array, mnist_file, read_parts

HELD_OUT = {"mnist": 5000, "cifar10-subset": 500}  # the last images of those to train with
CIFAR_FILE = "cifar10_subset/cifar10_subset.npz"
CIFAR_SOURCE = (
    "Krizhevsky, Learning multiple layers of features from tiny images, 2009; 5,000 and 1,000 "
    "images that were compressed as JPEG, so figures are not those of CIFAR-10"
)


DIGITS = (1097, 200)  # to train and to choose with; the other 500 of 1797 are for testing
DIGITS_SOURCE = (
    "Alpaydin, Kaynak, Optical recognition of handwritten digits, UCI, 1998, as in scikit-learn; "
    "CC BY 4.0"
)


@dataclass(frozen=True, eq=False)
class Images:
    """Images to train, to choose and to test with: rows of pixels and, in the last column, labels.

    `shape` is (channels, height, width) of a row of pixels, grey levels in [0, 1] and in single
    precision; `source` has citation and licence.
    """

    name: str
    shape: tuple[int, int, int]
    classes: int
    train: np.ndarray
    validation: np.ndarray
    test: np.ndarray
    source: str


def load_images(name: str, *, fetch: bool = False) -> Images:
    """The images "digits", "mnist" or "cifar10-subset" with their labels.

    The digits, 1797 of 8 x 8 pixels, come with scikit-learn; their order here is shuffled, always
    alike. MNIST's file is found or fetched as in `load_mnist`. The last is
    `cifar10_subset/cifar10_subset.npz` in the folder that the environment variable PATHLINE_DATA
    names: `x_train`, `x_test` (rows, 32, 32, 3) and `y_train`, `y_test` (rows,). 200 digits, the
    last tenth of its images to train with, or 5,000 of MNIST's, are for validation.

    Raises:
        ArgumentError: the name is not known.
        DataError: the images are neither on file nor to be fetched, or damaged.
    """
    if name == "digits":
        return _digits()
    if name not in HELD_OUT:
        raise ArgumentError(unknown("images", name, ("digits", *HELD_OUT)))
    path = mnist_file(fetch) if name == "mnist" else _cifar_file()
    train, validation, test = read_parts(partial(_rows, HELD_OUT[name]), path)
    shape = (1, 28, 28) if name == "mnist" else (3, 32, 32)
    source = MNIST_SOURCE if name == "mnist" else CIFAR_SOURCE
    return Images(name, shape, 10, train, validation, test, source)


def _digits() -> Images:
    from sklearn.datasets import load_digits

    x, y = load_digits(return_X_y=True)
    order = np.random.default_rng(0).permutation(len(x))
    rows = np.concatenate([x / 16, y[:, None]], 1, dtype=np.float32)[order]
    train, validation, test = np.split(rows, np.cumsum(DIGITS))
    return Images("digits", (1, 8, 8), 10, train, validation, test, DIGITS_SOURCE)


def _rows(held: int, path: Path) -> Parts:
    """Pixels and labels of a file; `held` images to train with are for validation."""
    parts = []
    for part in ("train", "test"):
        x, y = load_array(path, f"x_{part}"), load_array(path, f"y_{part}")
        pixels = np.moveaxis(x.reshape(*x.shape[:3], -1), 3, 1) / np.float32(255)
        rows = [pixels.reshape(len(x), -1), y[:, None]]
        parts.append(np.concatenate(rows, 1, dtype=np.float32))
    train, test = parts
    return train[:-held], train[-held:], test


def _cifar_file() -> Path:
    folder = os.environ.get("PATHLINE_DATA")
    path = Path(folder or ".") / CIFAR_FILE
    if not (folder and path.is_file()):
        raise DataError(
            "the part of CIFAR-10 is not on file: set the environment variable PATHLINE_DATA to a "
            f"folder that holds {CIFAR_FILE}"
        )
    return path
