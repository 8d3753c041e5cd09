"""The inverse of a solve by a reversible method: its steps are taken back."""

from typing import Any, cast

from ..errors import ArgumentError
from .field import Velocity
from .methods import METHODS
from .setup import Request, Setup
from .solve import fixed_march
from .structured import Reversible


def undo(
    func: Velocity, y1: Any, t: Any, *, method: str = "verlet", step_size: float | None = None
) -> Any:
    """The state y0 from which `odeint(func, y0, t)` gave its last state `y1`, to round-off.

    It inverts the discrete solution, and not only the flow that it approximates: a solve from t[-1]
    to t[0] returns to y0 up to its error, this one exactly. It can be differentiated as any
    function, at the price of its graph.

    Args:
        func, t: as they were given to `odeint`.
        y1: the last state that it returned.
        method: "leapfrog" or "verlet", whose steps follow from the state alone.
        step_size: as in the `options` of `odeint`; one step between neighbouring times if None.

    Raises:
        ArgumentError: the method has no such steps, or as by `odeint`.

    Example:
        >>> import torch
        >>> from pathline.integrate import Separable, odeint
        >>> pendulum = Separable(lambda t, p: p, lambda t, q: -torch.sin(q))
        >>> state, t = (torch.ones(1), torch.zeros(1)), torch.linspace(0, 9, 91)
        >>> last = tuple(y[-1] for y in odeint(pendulum, state, t, method="verlet"))
        >>> [round(y.item(), 4) + 0.0 for y in undo(pendulum, last, t)]
        [1.0, 0.0]
    """
    able = [name for name, each in METHODS.items() if getattr(each, "memoryless", False)]
    if method not in able:
        raise ArgumentError(
            f"`method` must be one whose steps follow from the state alone ({', '.join(able)}), "
            f"got {method!r}"
        )
    options = {} if step_size is None else {"step_size": step_size}
    given = Setup(Request(func, y1, t, method=method, options=options))
    march = fixed_march(given)
    grid, step = march.grid, cast(Reversible, march.method)
    z = given.z0
    carry = step.start(given.velocity, grid.ends[-1], z)
    for n in reversed(range(len(grid))):
        ts = grid.stages[n].unbind(0)
        z, carry = step.invert(given.velocity, ts, grid.lengths[n], z, carry)
    return given.layout.split(z)
