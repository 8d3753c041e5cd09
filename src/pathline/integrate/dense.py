"""The solution between two steps."""

from collections.abc import Sequence

import torch
from torch import Tensor

Scalar = float | Tensor


def as_float(x: Scalar) -> float:
    """The number, without its graph."""
    return float(x.detach()) if isinstance(x, Tensor) else x


def at_end(x: Scalar) -> bool:
    """Whether the share x of a step is its end, and not a time whose gradient is wanted."""
    return not isinstance(x, Tensor) and x == 1.0


Plan = tuple[int, float, tuple[tuple[int, float], ...]]
_PLANS: dict[tuple[float, ...], Plan] = {}  # by weights, of which there are few


def _around_largest(weights: tuple[float, ...]) -> Plan:
    """The largest weight with its index, and the others that are not zero relative to it."""
    pivot = max(range(len(weights)), key=lambda i: abs(weights[i]), default=0)
    largest = weights[pivot] if weights else 0.0
    others = enumerate(weights)
    return pivot, largest, tuple((i, w / largest) for i, w in others if w != 0.0 and i != pivot)


def combine(z: Tensor, weights: tuple[float, ...], slopes: Sequence[Tensor], dt: Scalar) -> Tensor:
    """z + dt sum_i weights_i slopes_i, with one fused operation for each nonzero weight.

    The slopes are summed first, so that z is rounded once.
    """
    plan = _PLANS.get(weights)
    if plan is None:
        plan = _PLANS[weights] = _around_largest(weights)
    pivot, largest, others = plan
    if largest == 0.0:
        return z
    slope = slopes[pivot]
    for i, ratio in others:
        slope = torch.add(slope, slopes[i], alpha=ratio)
    if type(dt) is float:
        return torch.add(z, slope, alpha=largest * dt)
    return torch.addcmul(z, slope, torch.as_tensor(dt), value=largest)


def linear(x: Scalar, z0: Tensor, z1: Tensor) -> Tensor:
    """The straight line between the ends of a step, at the share x of the step."""
    return z0 + x * (z1 - z0)


def cubic(x: Scalar, z0: Tensor, z1: Tensor, f0: Tensor, f1: Tensor, dt: Scalar) -> Tensor:
    """The Hermite interpolant through both ends and their slopes; local error O(dt^4)."""
    shift = x * x * (3 - 2 * x)
    return z0 + shift * (z1 - z0) + (dt * x * (1 - x)) * ((1 - x) * f0 - x * f1)


def quartic(
    x: Scalar, z0: Tensor, middle: Tensor, z1: Tensor, f0: Tensor, f1: Tensor, dt: Scalar
) -> Tensor:
    """The polynomial through both ends, their slopes and the middle; local error O(dt^5)."""
    bump = 16 * (x * (1 - x)) ** 2
    correction = middle - cubic(0.5, z0, z1, f0, f1, dt)
    return cubic(x, z0, z1, f0, f1, dt) + bump * correction
