"""Dynamics with diffusion that is stepped implicitly: every pixel sees every other in one step.

Source: Haber, Lensink, Treister, Ruthotto, IMEXnet: a forward stable deep neural network, ICML
2019, arXiv 1903.02639.
"""

from collections.abc import Callable
from math import pi

import torch
from torch import Tensor, nn

from ..errors import ArgumentError, ShapeError
from ..integrate import Split
from ..native import filters
from ..nets import TimeWeights
from .dynamics import Dynamics

FORMS = ("imex", "diffusion-reaction")
BOUNDARIES = ("periodic", "reflecting")


class SemiImplicit(Dynamics):
    """z' = v(t, z) + L z - L z or z' = v(t, z) - L z with L = B(t)^T B(t), the last L implicit.

    B is a 3x3 kernel of each channel by itself, 9 weights for each. By "imex_euler" a step is

        z_{j+1} = (I + h L)^-1 (z_j + h L z_j + h v(t_j, z_j))     "imex"
        z_{j+1} = (I + h L)^-1 (z_j + h v(t_j, z_j))               "diffusion-reaction"

    The first solves the equation without L, more stably: where v is linear with eigenvalues
    lambda <= 0 and L is alpha, it grows by (1 + h alpha + h lambda) / (1 + h alpha), which is
    bounded by 1 for all h if alpha >= |lambda| / 2. The solve is exact, by Fourier or cosine
    transform.

    Args:
        dynamics: v, of a single image-like state, such as `Parabolic`.
        channels: of its state.
        form: "imex" or "diffusion-reaction".
        boundary: "periodic" (Fourier; what leaves at one side enters at the other) or "reflecting"
            (cosines; B is made symmetric).
        generator: source of the first kernels, uniform in (0, 1/9).

    Raises:
        ArgumentError: a word is not known.
    """

    method = "imex_euler"

    def __init__(
        self,
        dynamics: Dynamics,
        channels: int,
        *,
        form: str = "imex",
        boundary: str = "periodic",
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__(dynamics.time)
        for name, word, known in (("form", form, FORMS), ("boundary", boundary, BOUNDARIES)):
            if word not in known:
                raise ArgumentError(f"`{name}` must be one of {known}, got {word!r}")
        self.dynamics, self.form, self.boundary = dynamics, form, boundary
        self.layer = TimeWeights(Diffusion(channels, boundary, generator), dynamics.time)

    def forward(self, t: Tensor, z: Tensor) -> Tensor:
        dz = self.dynamics(t, z)
        return dz if self.form == "imex" else dz + self.at(t)(z)

    @property
    def field(self) -> Split:
        """The explicit part, and -L."""
        return Split(self.explicit, self, self if self.form == "imex" else None)

    def explicit(self, t: Tensor, z: Tensor) -> Tensor:
        """What is left beside -L z."""
        dz = self.dynamics(t, z)
        return dz - self.at(t)(z) if self.form == "imex" else dz

    def at(self, t: Tensor) -> "MinusL":
        """-L at time t."""
        return MinusL(lambda h, w: self.layer(t, h, w), self.boundary)


class Diffusion(nn.Module):
    """The eigenvalues of L = B^T B, for 3x3 kernels B of single channels.

    Args:
        channels: of the features.
        boundary: as in `SemiImplicit`.
        generator: source of the kernels.
    """

    def __init__(
        self, channels: int, boundary: str, generator: torch.Generator | None = None
    ) -> None:
        super().__init__()
        kernel = torch.rand(channels, 1, 3, 3, generator=generator) / 9
        self.kernel, self.boundary = nn.Parameter(kernel), boundary

    def forward(self, height: int, width: int) -> Tensor:
        """|symbol of B|^2, (channels, height, width // 2 + 1), or (channels, height, width)."""
        kernel = self.kernel[:, 0]
        rows, columns = (self._angles(size, kernel) for size in (height, width))
        if self.boundary == "reflecting":
            return torch.einsum("ai,cij,bj->cab", rows.cos(), kernel, columns.cos()).square()
        columns = 2 * columns[: width // 2 + 1]
        angles = (2 * rows[:, None, :, None] + columns[:, None, :]).view(-1, 9)
        real, imaginary = (kernel.flatten(1) @ part.mT for part in (angles.cos(), angles.sin()))
        return (real.square() + imaginary.square()).view(len(kernel), height, -1)

    def _angles(self, size: int, like: Tensor) -> Tensor:
        """Of half waves at -1, 0, 1 pixels, (size, 3); the kernel's middle is 0."""
        index = torch.arange(size, dtype=like.dtype, device=like.device)
        shift = torch.arange(-1, 2, dtype=like.dtype, device=like.device)
        return pi / size * index[:, None] * shift


class MinusL:
    """z -> -L z, and the solution of x + scale L x = z, by eigenvalues that a call gives."""

    def __init__(self, eigenvalues: Callable[[int, int], Tensor], boundary: str) -> None:
        self.eigenvalues, self.boundary = eigenvalues, boundary
        self.known: tuple[tuple[int, int], Tensor] | None = None

    def __call__(self, z: Tensor) -> Tensor:
        return self._filtered(z, -self._of(z))

    def solve(self, z: Tensor, scale: float | Tensor) -> Tensor:
        """x with x + scale L x = z."""
        return self._filtered(z, 1 / (1 + scale * self._of(z)))

    def solve_slope(self, z: Tensor, scale: float | Tensor) -> Tensor:
        """-L x of that x, by one transform in place of two."""
        eigenvalues = self._of(z)
        return self._filtered(z, -eigenvalues / (1 + scale * eigenvalues))

    def _of(self, z: Tensor) -> Tensor:
        if z.ndim != 4:
            raise ShapeError(
                "semi-implicit dynamics need features (batch, channels, height, width), got "
                f"{tuple(z.shape)}"
            )
        size = (z.shape[2], z.shape[3])
        if self.known is None or self.known[0] != size:
            self.known = (size, self.eigenvalues(*size))
        found = self.known[1]
        if len(found) != z.shape[1]:
            raise ShapeError(f"the diffusion has {len(found)} channels, the features {z.shape[1]}")
        return found

    def _filtered(self, z: Tensor, factors: Tensor) -> Tensor:
        """z with its waves multiplied."""
        height, width = z.shape[2:]
        if self.boundary == "reflecting":
            rows, columns = cosines(height, z), cosines(width, z)
            return rows.mT @ (factors * (rows @ z @ columns.mT)) @ columns
        if filters.can_serve(z, factors):
            return filters.filtered(z, factors)
        # One axis after the other, for small images; and it is the factors that are scaled.
        waves = torch.fft.fft(torch.fft.rfft(z), dim=2)
        waves = waves * (factors / (height * width))
        return torch.fft.irfft2(waves, s=(height, width), norm="forward")


def cosines(size: int, like: Tensor) -> Tensor:
    """The orthogonal matrix of the cosine transform (DCT-II), (size, size)."""
    k = torch.arange(size, dtype=torch.float64)
    matrix = torch.cos(pi / size * k[:, None] * (k + 0.5)) * (2 / size) ** 0.5
    matrix[0] /= 2**0.5
    return matrix.to(like)
