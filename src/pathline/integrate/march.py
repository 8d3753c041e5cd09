"""Equal steps along dz/dt = v(t, z) for velocities that bring their running integrands along."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import ArgumentError
from .explicit import RungeKutta
from .fixed import FixedMarch
from .grid import Grid
from .quadrature import Quadrature
from .tableaus import RK4, Tableau

Rates = dict[str, Tensor]
RatedField = Callable[[Tensor, Tensor, float | None], tuple[Tensor, Rates]]


@dataclass(frozen=True)
class March:
    """Where the particles end, and what was integrated along their way."""

    z: Tensor  # (batch, dim)
    integrals: Rates  # each (batch,)
    zs: Tensor | None  # (steps + 1, batch, dim) if asked for


def march(
    field: RatedField,
    z0: Tensor,
    *,
    steps: int | Tensor,
    start: float = 0.0,
    stop: float = 1.0,
    method: Tableau = RK4,
    quadrature: bool = False,
    trajectory: bool = False,
) -> March:
    """Move `z0` from time `start` to `stop`, and integrate rates along the way.

    This is `odeint` for velocities whose integrands share their work with dz/dt; z does not
    depend on the integrals, so `Quadrature` needs few evaluations of the rates.

    Args:
        field: callable `(t, z, weight) -> (dz, rates)`; `t` is (), `z` and `dz` are (batch, dim).
            `rates` is a dict of (batch,) integrands at (t, z), which enter the integrals with
            the factor `weight`; where `weight` is None they are not used.
        z0: (batch, dim).
        steps: number of equal steps, at least one; or all times, (steps + 1,), such as `graded`
            gives.
        start, stop: times of equal steps; `stop` may lie before `start`.
        method: the Runge-Kutta method that moves z.
        quadrature: integrate the rates.
        trajectory: keep every z_n.

    Raises:
        ArgumentError: `steps` is less than one.
    """
    nodes = time_nodes(steps, start, stop)
    steps = len(nodes) - 1
    names: list[str] = []

    def at(t: Tensor, z: Tensor, _: Tensor | None) -> tuple[Tensor, tuple[Tensor, ...]]:
        dz, rates = field(t, z, next(weights))
        names[:] = rates
        return dz, tuple(rates.values())

    rule = Quadrature(at, method, 4)
    weights = rule.evaluation_weights(nodes.diff().tolist())
    path = FixedMarch(
        RungeKutta(method),
        lambda t, z: field(t, z, None)[0],
        Grid(nodes, method.c, z0),
        [()] * steps,
        quadrature=rule if quadrature else None,
    )
    state, zs = path.begin(z0), [z0]
    for n in range(steps):
        state, _ = path.step(n, state)
        if trajectory:
            zs.append(state.z)
    integrals = dict(zip(names, state.sums, strict=True))
    return March(state.z, integrals, torch.stack(zs) if trajectory else None)


def time_nodes(steps: int | Tensor, start: float, stop: float) -> Tensor:
    """The times of so many equal steps, or `steps` itself, in double precision.

    Raises:
        ArgumentError: there is not one step.
    """
    if isinstance(steps, Tensor):
        if steps.ndim != 1 or len(steps) < 2:
            raise ArgumentError(f"`steps` must be times (steps + 1,), got {tuple(steps.shape)}")
        return steps.double().cpu()
    if steps < 1:
        raise ArgumentError(f"`steps` must be at least 1, got {steps}")
    return graded(steps, start, stop)


def graded(steps: int, start: float, stop: float, grading: float = 1.0) -> Tensor:
    """Times from `start` to `stop`, (steps + 1,), in double precision.

    Step n ends at the share 1 - (1 - n / steps)^grading of the way: all are equal with 1, and with
    a larger number they shorten towards the end.
    """
    shares = torch.arange(steps + 1, dtype=torch.float64) / steps
    return start + (stop - start) * (shares if grading == 1 else 1 - (1 - shares) ** grading)
