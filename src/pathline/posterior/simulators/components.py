"""Principal components, to make fewer parameters and data of the many of a field."""

from dataclasses import dataclass

import numpy as np

from ...errors import ArgumentError, ShapeError


@dataclass(frozen=True, eq=False)
class PrincipalComponents:
    """The directions in which rows vary most.

    `mean` is (dim,), `axes` (dim, count) orthonormal, `variances` (count,) of the rows along the
    axes, falling; `share` is their part of the whole variance.
    """

    mean: np.ndarray
    axes: np.ndarray
    variances: np.ndarray
    share: float

    @classmethod
    def of(cls, rows: np.ndarray, count: int) -> "PrincipalComponents":
        """The first `count` components of `rows` (n, dim).

        Raises:
            ShapeError: `rows` is not a matrix.
            ArgumentError: there are not as many components: at most min(n - 1, dim).
        """
        if rows.ndim != 2:
            raise ShapeError(f"`rows` must be (n, dim), got {rows.shape}")
        n, dim = rows.shape
        if not 1 <= count <= min(n - 1, dim):
            raise ArgumentError(
                f"`count` must be from 1 to {min(n - 1, dim)}, the number of components of {n} "
                f"rows with {dim} entries; got {count}"
            )
        mean = rows.mean(0)
        centred = rows - mean
        # The eigenproblem of the smaller of covariance (dim, dim) and Gram matrix (n, n).
        wide = dim > n
        squares = (centred @ centred.T if wide else centred.T @ centred) / (n - 1)
        variances, vectors = np.linalg.eigh(squares)
        variances, vectors = variances[::-1][:count], vectors[:, ::-1][:, :count]
        if wide:
            vectors = centred.T @ vectors
            vectors /= np.linalg.norm(vectors, axis=0)
        return cls(mean, vectors, variances, float(variances.sum() / np.trace(squares)))

    def project(self, rows: np.ndarray) -> np.ndarray:
        """Coordinates (n, count) of `rows` (n, dim)."""
        return (rows - self.mean) @ self.axes

    def restore(self, coordinates: np.ndarray) -> np.ndarray:
        """The rows (n, dim) that have these coordinates (n, count) and lie in the components."""
        return self.mean + coordinates @ self.axes.T
