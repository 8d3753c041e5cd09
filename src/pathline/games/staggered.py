"""A staggered grid in two dimensions: its places, means, differences and upwind transport.

Arrays on cells are (..., nx, ny); on the faces of an axis they have one more entry along it.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from ..errors import ArgumentError, ShapeError

Array = np.ndarray
Box = tuple[tuple[float, float], tuple[float, float]]

AXES = (-2, -1)  # x and y: an array may have time in front


@dataclass(frozen=True)
class Grid:
    """Cells of a box and steps of the time from 0 to 1.

    Args:
        box: ((x_low, x_high), (y_low, y_high)).
        cells: (nx, ny).
        steps: of time.

    Raises:
        ArgumentError: one of them makes no sense.
    """

    box: Box
    cells: tuple[int, int]
    steps: int

    def __post_init__(self) -> None:
        if np.shape(self.box) != (2, 2) or not all(a < b for a, b in self.box):
            raise ArgumentError(f"`box` must be ((x_low, x_high), (y_low, y_high)), got {self.box}")
        if np.shape(self.cells) != (2,) or min(self.cells) < 2:
            raise ArgumentError(f"`cells` must be two numbers of at least 2, got {self.cells}")
        if self.steps < 2:
            raise ArgumentError(f"`steps` must be at least 2, got {self.steps}")

    @property
    def dt(self) -> float:
        return 1 / self.steps

    @property
    def spacing(self) -> tuple[float, float]:
        """Of the cells, in x and y."""
        (x, y), (nx, ny) = self.box, self.cells
        return (x[1] - x[0]) / nx, (y[1] - y[0]) / ny

    @property
    def volume(self) -> float:
        """Of a cell."""
        return self.spacing[0] * self.spacing[1]

    @cached_property
    def faces(self) -> list[Array]:
        """Places in x and in y, (nx + 1,) and (ny + 1,)."""
        return [np.linspace(a, b, n + 1) for (a, b), n in zip(self.box, self.cells, strict=True)]

    @cached_property
    def centres(self) -> list[Array]:
        """Of the cells, (nx,) and (ny,)."""
        return [(f[1:] + f[:-1]) / 2 for f in self.faces]

    @property
    def nodes(self) -> list[Array]:
        """Times of the nodes, and centres."""
        return [np.arange(self.steps + 1) * self.dt, *self.centres]

    def axes(self, face: int | None = None) -> list[Array]:
        """Times between the nodes, and centres, or the places of the faces of one axis."""
        axes = [(np.arange(self.steps) + 0.5) * self.dt, *self.centres]
        if face is not None:
            axes[face] = self.faces[face]
        return axes

    def sample(self, name: str, function: Callable[[Array], Array]) -> Array:
        """Values (nx, ny) of a function of points (n, 2) at the centres; they may be -inf."""
        points = mesh(*self.centres)
        values = np.asarray(function(points), float)
        if values.shape != (len(points),):
            raise ShapeError(f"`{name}` must return {(len(points),)}, got {values.shape}")
        if np.isnan(values).any() or values.max() == np.inf:
            raise ArgumentError(f"`{name}` must be finite in the box, got nan or inf")
        return values.reshape(self.cells)

    def face_velocity(
        self, velocity: Callable[[float, Array], Array], t: float, axis: int
    ) -> Array:
        """The normal component through the inner faces of an axis."""
        places = list(self.centres)
        places[axis] = self.faces[axis][1:-1]
        points = mesh(*places)
        v = np.asarray(velocity(t, points), float)
        if v.shape != points.shape:
            raise ShapeError(f"`velocity` must return {points.shape}, got {v.shape}")
        if not np.isfinite(v).all():
            raise ArgumentError("`velocity` must be finite in the box, got nan or inf")
        return v[:, axis].reshape([len(p) for p in places])


def mesh(x: Array, y: Array) -> Array:
    """Points (len(x) len(y), 2), y fastest."""
    return np.stack(np.meshgrid(x, y, indexing="ij"), -1).reshape(-1, 2)


def _slices(axis: int, part: slice) -> tuple:
    return (..., part, *[slice(None)] * (-1 - axis))


def low(values: Array, axis: int) -> Array:
    """All but the last along the axis, from -3 to -1."""
    return values[_slices(axis, slice(None, -1))]


def high(values: Array, axis: int) -> Array:
    """All but the first."""
    return values[_slices(axis, slice(1, None))]


def mean(values: Array, axis: int) -> Array:
    """Means of neighbours."""
    return (low(values, axis) + high(values, axis)) / 2


def walled(inner: Array, axis: int) -> Array:
    """Values at all faces from those at inner ones: zero at the walls."""
    widths = [(0, 0)] * inner.ndim
    widths[axis] = (1, 1)
    return np.pad(inner, widths)


def gradient(phi: Array, axis: int, spacing: float) -> Array:
    """Differences of neighbouring cells at all faces of the axis."""
    return walled(np.diff(phi, axis=axis) / spacing, axis)


def to_faces(rho: Array, axis: int) -> Array:
    """Means of neighbouring cells; at a wall, the cell's own density."""
    ends = [rho[_slices(axis, part)] for part in (slice(None, 1), slice(-1, None))]
    return mean(np.concatenate([ends[0], rho, ends[1]], axis), axis)


def to_nodes(values: Array) -> Array:
    """Means of neighbouring time intervals at the nodes 1..N; at the last, its own interval's."""
    return (values + np.concatenate([values[1:], values[-1:]])) / 2


def upwind(rho: Array, normal: list[Array], spacing: tuple[float, float], tau: float) -> Array:
    """rho (nx, ny) after a time tau with the velocities `normal` through the inner faces.

    Two-stage (Heun) conservative steps; upwind values at the faces, linear in the cells with the
    monotonised central limiter. Mass is kept, and so is rho >= 0 where tau |v| / spacing, summed
    over x and y, is at most 1/2.

    Source: van Leer, Towards the ultimate conservative difference scheme IV, 1977.
    """
    stage = rho + tau * _inflow(rho, normal, spacing)
    return (rho + stage + tau * _inflow(stage, normal, spacing)) / 2


def _inflow(rho: Array, normal: list[Array], spacing: tuple[float, float]) -> Array:
    total = np.zeros_like(rho)
    for axis, v, h in zip(AXES, normal, spacing, strict=True):
        jump = walled(np.diff(rho, axis=axis), axis)
        a, b = low(jump, axis), high(jump, axis)
        half = np.minimum(np.minimum(np.abs(a), np.abs(b)), np.abs(a + b) / 4)  # half the slope
        half = np.where(a * b > 0, np.copysign(half, a), 0)
        value = np.where(v > 0, low(rho + half, axis), high(rho - half, axis))
        total -= np.diff(walled(v * value, axis), axis=axis) / h
    return total
