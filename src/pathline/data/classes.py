"""Labelled data by formula: points of the plane in classes, and images whose pixels have labels.

Source: Haber and Ruthotto, Stable architectures for deep neural networks, Inverse Problems 34,
2017, arXiv 1705.03341, and the authors' Meganet (setupCircle, setupSwissRoll, setupPeaks); Haber,
Lensink, Treister, Ruthotto, IMEXnet, ICML 2019, arXiv 1903.02639, and the authors'
SynthSegGenerator.
"""

import math

import torch
from torch import Generator, Tensor

from ..errors import ArgumentError
from .toys import Moons

TURNS = 2  # of the spirals
BANDS = 5  # classes of the peaks
PEAKS = (-6.5512, 8.1063)  # extremes of the function on [-3, 3]^2, rounded outwards
GREY, BAR, WHITE, BLACK = 112 / 255, 128 / 255, 1.0, 1 / 255
WIDTH = 2  # of a Q-tip, in pixels


def ellipses(count: int, generator: Generator | None = None) -> tuple[Tensor, Tensor]:
    """Points within an ellipse of half axes 1 and 0.4, and between it and one twice as large.

    Args:
        count: of each of the two classes.
        generator: source of the points.

    Returns:
        Points (2 count, 2) and labels (2 count, 1), in double precision.
    """
    angle = 2 * math.pi * _uniform(2 * count, generator)
    labels = torch.arange(2).repeat_interleave(count).double()
    radius = _uniform(2 * count, generator) + labels
    x = torch.stack([radius * angle.cos(), 0.4 * radius * angle.sin()], 1)
    return x, labels[:, None]


def moons(count: int, generator: Generator | None = None) -> tuple[Tensor, Tensor]:
    """Two interleaving half circles of radius 2, blurred by a normal of 0.2, as in `Moons`.

    Args:
        count: of each of the two classes.
        generator: source of the points.

    Returns:
        Points (2 count, 2) and labels (2 count, 1), in double precision.
    """
    toy = Moons()
    x = toy.curves(math.pi * _uniform(count, generator)).flatten(0, 1)
    noise = torch.randn(x.shape, generator=generator, dtype=torch.float64)
    labels = torch.arange(2).repeat_interleave(count).double()
    return x + toy.scale * toy.noise * noise, labels[:, None]


def spirals(count: int = 513) -> tuple[Tensor, Tensor]:
    """Two spirals, one within the other: the Swiss roll of stable networks, which has no noise.

    Args:
        count: points of each; those with even and with odd index are for training and validation.

    Returns:
        Points (2 count, 2) and labels (2 count, 1), in double precision; the spirals alternate.
    """
    angle = torch.linspace(0, 2 * TURNS * math.pi, count, dtype=torch.float64)
    circle = torch.stack([angle.cos(), angle.sin()], 1)
    share = torch.linspace(0, 1, count, dtype=torch.float64)[:, None]
    x = torch.stack([share * circle, (share + 0.2) * circle], 1)
    labels = torch.arange(2).double().repeat(count)
    return x.flatten(0, 1), labels[:, None]


def peaks_function(x: Tensor) -> Tensor:
    """MATLAB's function peaks, of Gaussians times polynomials, (n,) at points (n, 2)."""
    a, b = x[:, 0], x[:, 1]
    return (
        3 * (1 - a) ** 2 * torch.exp(-(a**2) - (b + 1) ** 2)
        - 10 * (a / 5 - a**3 - b**5) * torch.exp(-(a**2) - b**2)
        - torch.exp(-((a + 1) ** 2) - b**2) / 3
    )


def peaks(count: int, generator: Generator | None = None) -> tuple[Tensor, Tensor]:
    """Points of [-3, 3]^2 by which of five bands of equal height their `peaks_function` lies in.

    Args:
        count: of each class, in which points are uniform.
        generator: source of the points.

    Returns:
        Points (5 count, 2) and labels (5 count, 1), in double precision.
    """
    low, high = PEAKS
    found: list[list[Tensor]] = [[] for _ in range(BANDS)]
    while min(sum(map(len, parts)) for parts in found) < count:
        x = 6 * torch.rand(20 * count, 2, generator=generator, dtype=torch.float64) - 3
        band = ((peaks_function(x) - low) / (high - low) * BANDS).long()
        for k, parts in enumerate(found):
            parts.append(x[band == k])
    x = torch.cat([torch.cat(parts)[:count] for parts in found])
    return x, torch.arange(BANDS).repeat_interleave(count).double()[:, None]


def q_tips(
    count: int, generator: Generator | None = None, *, size: int = 64
) -> tuple[Tensor, Tensor]:
    """Images of one bar each, whose class is told by the colours of its two far ends.

    The bar is 2 pixels wide, centred, turned by any angle, and as long as half of the image to 0.92
    of it. Its ends are squares: both white are class 1, one white and one black class 2, both black
    class 3. All its pixels, ends too, have that label, and the background has 0.

    Args:
        count: of images.
        generator: source of lengths, angles and classes.
        size: height and width in pixels, at least 16.

    Returns:
        Images (count, 1, size, size), grey levels in [0, 1], and labels (count, size, size), whole
        numbers; in double precision.

    Raises:
        ArgumentError: the images are too small.
    """
    if size < 16:
        raise ArgumentError(f"`size` must be at least 16, got {size!r}")
    length = torch.randint(size // 2, 59 * size // 64 + 1, (count,), generator=generator)
    angle = 2 * math.pi * _uniform(count, generator)
    label = torch.randint(1, 4, (count,), generator=generator)
    centre = torch.arange(size, dtype=torch.float64) - (size - 1) / 2
    down, right = centre[:, None], centre
    cosine, sine = angle.cos()[:, None, None], angle.sin()[:, None, None]
    along, across = cosine * right + sine * down, cosine * down - sine * right
    half = length[:, None, None] / 2
    bar = (along.abs() <= half) & (across.abs() <= WIDTH / 2)
    end = bar & (along.abs() >= half - WIDTH)
    kind = label[:, None, None]
    white = (kind == 1) | ((kind == 2) & (along > 0))
    image = torch.where(bar, BAR, torch.full_like(along, GREY))
    image = torch.where(end & white, WHITE, torch.where(end, BLACK, image))
    return image[:, None], (bar * kind).double()


def _uniform(count: int, generator: Generator | None) -> Tensor:
    return torch.rand(count, generator=generator, dtype=torch.float64)
