"""Densities in the plane that are easy to look at, with the parameters of FFJORD's toy data.

name            class            parameters                             smallest feature
8gaussians      EightGaussians   radius 4, std 0.5, all / 1.414         std 0.354
checkerboard    Checkerboard     4 x 4 fields of side 2                 edges
swissroll       SwissRoll        noise 1, all / 5                       std 0.2
circles         Circles          factor 0.5, noise 0.08, all * 3        std 0.24
moons           Moons            noise 0.1, all * 2                     std 0.2
pinwheel        Pinwheel         5 arms, std 0.3 and 0.1, rate 0.25     std 0.2
2spirals        TwoSpirals       1.5 turns, box 0.5 / 3, noise 0.1      std 0.1

Source: Grathwohl, Chen, Bettencourt, Sutskever, Duvenaud, FFJORD, 2019, lib/toy_data.py. Its
samplers place some points at fixed angles; these draw independent points of the same density.
"""

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass

import numpy as np
import torch
from torch import Generator, Tensor

from ..errors import ShapeError

CHUNK = 512  # points; their quadrature stays in the cache


class Toy(ABC):
    """A density in the plane: exact samples, and its exact log-density."""

    def sample(
        self, n: int, generator: Generator | None = None, dtype: torch.dtype = torch.float64
    ) -> Tensor:
        """`n` independent points (n, 2), the same ones for the same state of `generator`."""
        return self._draw(n, generator).to(dtype)

    def log_prob(self, x: Tensor) -> Tensor:
        """The log-density in nats (n,), in double precision on the CPU, at the points `x` (n, 2).

        Raises:
            ShapeError: `x` is not (n, 2).
        """
        if x.ndim != 2 or x.shape[1] != 2:
            raise ShapeError(f"`x` must be points of the plane (n, 2), got {tuple(x.shape)}")
        parts = x.to("cpu", torch.float64).split(CHUNK)
        return torch.cat([self._log_prob(part) for part in parts])

    @property
    def entropy(self) -> float | None:
        """-E log p in nats, integrated on a grid; None if the parameters were changed."""
        return ENTROPIES.get(self)

    @abstractmethod
    def _draw(self, n: int, generator: Generator | None) -> Tensor: ...

    @abstractmethod
    def _log_prob(self, x: Tensor) -> Tensor: ...


@dataclass(frozen=True)
class EightGaussians(Toy):
    """Eight normal distributions around a circle."""

    radius: float = 4.0
    std: float = 0.5
    shrink: float = 1.414

    @property
    def centres(self) -> Tensor:
        """The means, (8, 2)."""
        angles = torch.arange(8, dtype=torch.float64) * math.pi / 4
        return self.radius / self.shrink * _polar(angles)

    def _draw(self, n: int, generator: Generator | None) -> Tensor:
        which = torch.randint(8, (n,), generator=generator)
        return self.centres[which] + self.std / self.shrink * _normal(n, generator)

    def _log_prob(self, x: Tensor) -> Tensor:
        log_each = _log_gaussian(x[:, None] - self.centres, self.std / self.shrink)
        return log_each.logsumexp(1) - math.log(8)


@dataclass(frozen=True)
class Checkerboard(Toy):
    """The uniform distribution on eight of the sixteen fields of the square [-4, 4)^2."""

    def _draw(self, n: int, generator: Generator | None) -> Tensor:
        x = 4 * _uniform(n, generator) - 2
        y = _uniform(n, generator) - 2 * torch.randint(2, (n,), generator=generator)
        return 2 * torch.stack((x, y + x.floor() % 2), 1)

    def _log_prob(self, x: Tensor) -> Tensor:
        inside = ((x >= -4) & (x < 4)).all(1) & ((x / 2).floor().sum(1) % 2 == 0)
        return torch.full_like(x[:, 0], -math.inf).masked_fill(inside, -math.log(32))


@dataclass(frozen=True)
class SwissRoll(Toy):
    """A spiral (t cos t, t sin t) with t uniform in 1.5 pi [1, 3], blurred by a normal."""

    noise: float = 1.0
    shrink: float = 5.0

    def _curve(self, t: Tensor) -> Tensor:
        return t[:, None] * _polar(t) / self.shrink

    def _draw(self, n: int, generator: Generator | None) -> Tensor:
        t = 1.5 * math.pi * (1 + 2 * _uniform(n, generator))
        return self._curve(t) + self.noise / self.shrink * _normal(n, generator)

    def _log_prob(self, x: Tensor) -> Tensor:
        t, weights = _quadrature(1.5 * math.pi, 4.5 * math.pi, panels=30)
        log_each = _log_gaussian(x[:, None] - self._curve(t), self.noise / self.shrink)
        return (log_each + (weights / (3 * math.pi)).log()).logsumexp(1)


@dataclass(frozen=True)
class Circles(Toy):
    """Two rings about the origin, blurred by a normal."""

    factor: float = 0.5
    noise: float = 0.08
    scale: float = 3.0

    def _draw(self, n: int, generator: Generator | None) -> Tensor:
        radius = torch.tensor([1.0, self.factor], dtype=torch.float64)
        ring = radius[torch.randint(2, (n,), generator=generator)]
        points = ring[:, None] * _polar(2 * math.pi * _uniform(n, generator))
        return self.scale * (points + self.noise * _normal(n, generator))

    def _log_prob(self, x: Tensor) -> Tensor:
        # The mean over the angle a of exp(k cos a) is the Bessel function I0(k) = e^k i0e(k).
        rings = self.scale * torch.tensor([1.0, self.factor], dtype=x.dtype)
        r, variance = x.norm(dim=1)[:, None], (self.scale * self.noise) ** 2
        log_each = (
            -((r - rings) ** 2) / (2 * variance) + torch.special.i0e(r * rings / variance).log()
        )
        return log_each.logsumexp(1) - math.log(2 * 2 * math.pi * variance)


@dataclass(frozen=True)
class Moons(Toy):
    """Two interleaving half circles, blurred by a normal."""

    noise: float = 0.1
    scale: float = 2.0
    shift: tuple[float, float] = (-1.0, -0.2)

    def curves(self, angle: Tensor) -> Tensor:
        """Points at the angles (n,) of the upper and the lower half circle, (2, n, 2)."""
        upper = _polar(angle)
        halves = torch.stack((upper, torch.tensor([1.0, 0.5]).to(upper) - upper))
        return self.scale * halves + torch.tensor(self.shift).to(upper)

    def _draw(self, n: int, generator: Generator | None) -> Tensor:
        halves = self.curves(math.pi * _uniform(n, generator))
        which = torch.randint(2, (n,), generator=generator)
        noise = self.scale * self.noise * _normal(n, generator)
        return halves[which, torch.arange(n)] + noise

    def _log_prob(self, x: Tensor) -> Tensor:
        angle, weights = _quadrature(0, math.pi, panels=12)
        log_weights = (weights / (2 * math.pi)).log()
        log_halves = [
            (_log_gaussian(x[:, None] - half, self.scale * self.noise) + log_weights).logsumexp(1)
            for half in self.curves(angle)
        ]
        return torch.logaddexp(*log_halves)


@dataclass(frozen=True)
class Pinwheel(Toy):
    """Arms of a normal distribution, swirled by an angle that grows with the first coordinate.

    A point is scale * (f0 + i f1) exp(-i theta), theta = arm + rate * exp(f0), as a complex
    number, with f0 normal around 1 and f1 around 0. The density sums over the f that lead to x:
    the roots in f0 of f0 = Re(w), where w = x / scale * exp(i theta(f0)) and f1 = Im(w), at which
    the determinant is scale^2 (1 + rate exp(f0) f1). All roots are found where |x| < 8, beyond
    which there are less than 1e-20 of the points; further out some may be missed.
    """

    arms: int = 5
    radial_std: float = 0.3
    tangential_std: float = 0.1
    rate: float = 0.25
    scale: float = 2.0

    def _draw(self, n: int, generator: Generator | None) -> Tensor:
        std = torch.tensor([self.radial_std, self.tangential_std], dtype=torch.float64)
        f0, f1 = (std * _normal(n, generator)).unbind(1)
        f0 = f0 + 1
        arm = torch.randint(self.arms, (n,), generator=generator) * (2 * math.pi / self.arms)
        turned = torch.complex(f0, f1) * torch.exp(-1j * (arm + self.rate * f0.exp()))
        return self.scale * torch.view_as_real(turned)

    def _log_prob(self, x: Tensor) -> Tensor:
        arms = torch.arange(self.arms, dtype=x.dtype) * (2 * math.pi / self.arms)
        y = torch.view_as_complex(x / self.scale)[:, None] * torch.exp(1j * arms)  # (n, arms)
        y = y.flatten()

        def turned(f0: Tensor, index: Tensor) -> Tensor:
            return y[index] * torch.exp(1j * self.rate * f0.exp())

        # |f0| <= |y|: a grid shows the cells where f0 - Re(w) changes sign, bisection the roots.
        every = torch.arange(len(y))[:, None]
        radius = y.abs() + 1e-9
        grid = radius[:, None] * torch.linspace(-1, 1, 193, dtype=x.dtype)
        positive = grid > turned(grid, every).real
        index, cell = torch.nonzero(positive[:, 1:] != positive[:, :-1], as_tuple=True)
        low, high, rising = grid[index, cell], grid[index, cell + 1], positive[index, cell + 1]
        for _ in range(52):
            middle = (low + high) / 2
            left = (middle > turned(middle, index).real) != rising
            low, high = torch.where(left, middle, low), torch.where(left, high, middle)
        f0 = (low + high) / 2
        f1 = turned(f0, index).imag
        log_p = -(((f0 - 1) / self.radial_std) ** 2 + (f1 / self.tangential_std) ** 2) / 2
        log_p = log_p - (1 + self.rate * f0.exp() * f1).abs().log()
        constant = 2 * math.pi * self.radial_std * self.tangential_std * self.arms * self.scale**2
        return _segment_logsumexp(log_p, index // self.arms, len(x)) - math.log(constant)


@dataclass(frozen=True)
class TwoSpirals(Toy):
    """Two spiral arms of 1.5 turns, widened by a small box and blurred by a normal."""

    turns: float = 1.5
    box: float = 0.5
    shrink: float = 3.0
    noise: float = 0.1

    def _curve(self, t: Tensor) -> Tensor:
        """One arm without its box and noise, (n, 2)."""
        return t[:, None] * torch.stack((-t.cos(), t.sin()), 1) / self.shrink

    def _draw(self, n: int, generator: Generator | None) -> Tensor:
        t = 2 * math.pi * self.turns * _uniform(n, generator).sqrt()
        box = self.box / self.shrink * torch.rand(n, 2, generator=generator, dtype=t.dtype)
        sign = 2 * torch.randint(2, (n, 1), generator=generator) - 1
        return sign * (self._curve(t) + box) + self.noise * _normal(n, generator)

    def _log_prob(self, x: Tensor) -> Tensor:
        end = 2 * math.pi * self.turns
        t, weights = _quadrature(0, end, panels=48)
        log_weights = (t * weights / end**2).log()  # half of the density 2 t / end^2 of t
        width = self.box / self.shrink
        log_arms = []
        for sign in (1, -1):
            from_corner = (sign * x[:, None] - self._curve(t)) / self.noise
            log_box = _log_box(from_corner, width / self.noise)
            log_arms.append((log_box + log_weights).logsumexp(1))
        return torch.logaddexp(*log_arms) - 2 * math.log(width)


def _uniform(n: int, generator: Generator | None) -> Tensor:
    return torch.rand(n, generator=generator, dtype=torch.float64)


def _normal(n: int, generator: Generator | None) -> Tensor:
    return torch.randn(n, 2, generator=generator, dtype=torch.float64)


def _polar(angle: Tensor) -> Tensor:
    """Points of the unit circle at the angles (n,), (n, 2)."""
    return torch.stack((angle.cos(), angle.sin()), 1)


def _log_gaussian(offset: Tensor, std: float) -> Tensor:
    """Log-density of N(0, std^2 I) at `offset` (..., 2)."""
    return -(offset**2).sum(-1) / (2 * std**2) - math.log(2 * math.pi * std**2)


def _log_box(x: Tensor, width: float) -> Tensor:
    """log prod_i (Phi(x_i) - Phi(x_i - width)) over the last axis of `x` (..., 2).

    With Phi(-z) = exp(-z^2 / 2) erfcx(z / sqrt 2) / 2, and z > 0 by symmetry, the difference
    neither cancels nor underflows.
    """
    near = (x - width / 2).abs() - width / 2  # from the nearer face of the box
    far = near + width
    decay = torch.exp((near**2 - far**2) / 2)
    root = math.sqrt(0.5)
    tails = torch.special.erfcx(near * root) - torch.special.erfcx(far * root) * decay
    return (tails.prod(-1) / 4).log() - (near**2).sum(-1) / 2


def _quadrature(a: float, b: float, panels: int, nodes: int = 16) -> tuple[Tensor, Tensor]:
    """Nodes and weights of Gauss-Legendre quadrature on equal panels of [a, b]."""
    node, weight = np.polynomial.legendre.leggauss(nodes)
    half = (b - a) / panels / 2
    centres = a + half * (2 * np.arange(panels) + 1)
    points = (centres[:, None] + half * node).ravel()
    return torch.from_numpy(points), torch.from_numpy(np.tile(half * weight, panels))


def _segment_logsumexp(values: Tensor, segment: Tensor, count: int) -> Tensor:
    """The logsumexp of the values (m,) of each of `count` segments."""
    top = values.new_full((count,), -math.inf).scatter_reduce(0, segment, values, "amax")
    total = values.new_zeros(count).index_add(0, segment, (values - top[segment]).exp())
    return top + total.log()


TOYS: dict[str, Toy] = {
    "8gaussians": EightGaussians(),
    "checkerboard": Checkerboard(),
    "swissroll": SwissRoll(),
    "circles": Circles(),
    "moons": Moons(),
    "pinwheel": Pinwheel(),
    "2spirals": TwoSpirals(),
}
ENTROPIES: dict[Toy, float] = {
    EightGaussians(): 2.8318804,
    Checkerboard(): math.log(32),
    SwissRoll(): 2.6696462,
    Circles(): 3.2681357,
    Moons(): 2.3938792,
    Pinwheel(): 2.3177880,
    TwoSpirals(): 2.6454503,
}
