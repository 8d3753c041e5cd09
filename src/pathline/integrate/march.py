"""Fixed steps along dz/dt = v(t, z), with running integrals that do not feed back into z."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import ArgumentError
from .methods import RK4, Tableau

Rates = dict[str, Tensor]
Field = Callable[[Tensor, Tensor, bool], tuple[Tensor, Rates]]


@dataclass(frozen=True)
class March:
    """Where the particles end, and what was integrated along their way."""

    z: Tensor  # (batch, dim)
    integrals: Rates  # each (batch,)
    zs: Tensor | None  # (steps + 1, batch, dim) if asked for


def march(
    field: Field,
    z0: Tensor,
    *,
    steps: int,
    start: float = 0.0,
    stop: float = 1.0,
    method: Tableau = RK4,
    quadrature: bool = False,
    trajectory: bool = False,
) -> March:
    """Move `z0` from time `start` to `stop` in equal steps, and integrate rates along the way.

    z does not depend on the integrals, so their quadrature need not use the Runge-Kutta stages:
    Simpson's rule on z_n, the Hermite midpoint (z_n + z_{n+1})/2 + dt/8 (v_n - v_{n+1}) and
    z_{n+1} has order four with 2 steps + 1 evaluations of the rates instead of 4 steps.

    Args:
        field: callable `(t, z, node) -> (dz, rates)`; `t` is (), `z` and `dz` are (batch, dim).
            `rates` is used where `node` is true: a dict of (batch,) integrands at (t, z).
        z0: (batch, dim).
        steps: number of steps, at least one.
        start, stop: times; `stop` may lie before `start`.
        method: the Runge-Kutta method that moves z.
        quadrature: integrate the rates.
        trajectory: keep every z_n.

    Raises:
        ArgumentError: `steps` is less than one.
    """
    if steps < 1:
        raise ArgumentError(f"`steps` must be at least 1, got {steps}")
    dt = (stop - start) / steps
    # Times come from the index of the step: sums of dt would drift in single precision.
    offsets = torch.tensor([*method.c, 0.5], dtype=torch.float64)
    shares = (torch.arange(steps + 1, dtype=torch.float64)[:, None] + offsets) / steps
    times = [row.unbind() for row in (start + (stop - start) * shares).to(z0)]

    z, zs = z0, [z0]
    dz, rates = field(times[0][0], z, quadrature)
    integrals = {name: rate * (dt / 6) for name, rate in rates.items()} if quadrature else {}
    for n in range(steps):
        slopes = [dz]
        for row, t in zip(method.a[1:], times[n][1:-1], strict=True):
            slopes.append(field(t, _combine(z, row, slopes, dt), False)[0])
        z_next = _combine(z, method.b, slopes, dt)
        last = n + 1 == steps
        if quadrature:
            dz_next, rates = field(times[n + 1][0], z_next, True)
            midpoint = 0.5 * (z + z_next) + (dt / 8) * (dz - dz_next)
            _, middle = field(times[n][-1], midpoint, True)
            weight = dt / 6 if last else dt / 3
            for name in integrals:
                integrals[name] = (
                    integrals[name] + (2 * dt / 3) * middle[name] + weight * rates[name]
                )
            dz = dz_next
        elif not last:
            dz, _ = field(times[n + 1][0], z_next, False)
        z = z_next
        if trajectory:
            zs.append(z)
    return March(z, integrals, torch.stack(zs) if trajectory else None)


def _combine(z: Tensor, row: tuple[float, ...], slopes: list[Tensor], dt: float) -> Tensor:
    for weight, slope in zip(row, slopes, strict=True):
        if weight != 0.0:
            z = torch.add(z, slope, alpha=weight * dt)
    return z
