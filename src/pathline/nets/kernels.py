"""3x3 kernels between resolutions, so that an operator stays nearly the same on other pixels.

A kernel k becomes T k T^T for a 3x3 matrix T of the way of transfer, and the inverse of T goes the
other way, so restricting a prolonged kernel gives it back.

Source: Haber, Ruthotto, Holtham, Learning across scales: multiscale methods for convolution neural
networks, AAAI 2018, arXiv 1703.02009.
"""

import torch
from torch import Tensor

from ..errors import ArgumentError, ShapeError, unknown

# One axis of R K P, with R the mean of two pixels and P = 2 R^T, which repeats them.
_GALERKIN = torch.tensor([[0.5, 0, 0], [0.5, 1, 0.5], [0, 0, 0.5]], dtype=torch.float64)
# Columns: the kernels of 1, d/dx and -d^2/dx^2 for pixels of width one.
_BASIS = torch.tensor([[0.25, -0.5, -1], [0.5, 0, 2], [0.25, 0.5, -1]], dtype=torch.float64)
_REDISCRETISE = _BASIS @ torch.diag(torch.tensor([1.0, 0.5, 0.25]).double()) @ _BASIS.inverse()
TRANSFERS = {"galerkin": _GALERKIN, "rediscretise": _REDISCRETISE}


def restrict_kernels(kernels: Tensor, how: str = "galerkin") -> Tensor:
    """Kernels (..., 3, 3) for images of half the resolution.

    Args:
        kernels: in the order of rows and columns of `conv2d`.
        how: "galerkin" takes K to R K P, with R the mean of 2x2 pixels and P their repetition,
            which halves second derivatives where their scale is a quarter; "rediscretise" keeps the
            differential operator of which the kernel is the discretisation.

    Raises:
        ArgumentError: the way is not known.
        ShapeError: the kernels are not 3x3.
    """
    return _transferred(kernels, _matrix(how))


def prolong_kernels(kernels: Tensor, how: str = "galerkin") -> Tensor:
    """Kernels (..., 3, 3) for images of twice the resolution: the inverse of `restrict_kernels`."""
    return _transferred(kernels, _matrix(how).inverse())


def _matrix(how: str) -> Tensor:
    if how not in TRANSFERS:
        raise ArgumentError(unknown("`how`", str(how), TRANSFERS))
    return TRANSFERS[how]


def _transferred(kernels: Tensor, matrix: Tensor) -> Tensor:
    if kernels.ndim < 2 or kernels.shape[-2:] != (3, 3):
        raise ShapeError(f"`kernels` must be (..., 3, 3), got {tuple(kernels.shape)}")
    T = matrix.to(kernels)
    return T @ kernels @ T.mT
