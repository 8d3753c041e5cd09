"""Where fixed steps begin and end, and where in them output is wanted."""

from math import ceil

import torch
from torch import Tensor

from ..errors import ArgumentError
from .dense import Scalar
from .options import check_monotonic, positive
from .setup import Setup


def fixed_nodes(given: Setup) -> tuple[Tensor, list[list[Scalar]]]:
    """The nodes of the fixed steps, and where in each step output is wanted.

    Raises:
        ArgumentError: the options contradict each other, or the times.
    """
    step_size, make = given.options.get("step_size"), given.options.get("grid_constructor")
    if step_size is not None and make is not None:
        raise ArgumentError("give option `step_size` or `grid_constructor`, not both")
    t = given.t
    if step_size is None and make is None:
        return t.T if t.ndim == 2 else t, [[1.0]] * (t.shape[-1] - 1)
    if given.traced:
        raise ArgumentError(
            "a compiled solve takes one step between neighbouring times: list all times in "
            "`t` in place of option `step_size` or `grid_constructor`"
        )
    if t.shape[-1] == 1:
        return t.T if t.ndim == 2 else t, []
    if t.ndim == 2:
        if make is not None:
            raise ArgumentError("option `grid_constructor` needs times of shape (times,)")
        return _cut(t, positive("step_size", step_size))
    if make is not None:
        nodes = make(given.request.func, given.request.y0, given.request.t).to(t)
        check_monotonic(nodes.tolist(), "the times of option `grid_constructor`")
        if nodes[0] != t[0] or nodes[-1] != t[-1]:
            raise ArgumentError(
                "the times of option `grid_constructor` must begin at t[0] and end at t[-1]"
            )
    else:
        nodes = _equal_steps(t, positive("step_size", step_size))
    return nodes, _inside(nodes, t)


def _equal_steps(t: Tensor, h: float) -> Tensor:
    """Steps of length h from t[0], the last one shorter if need be."""
    start, end = float(t[0].detach()), float(t[-1].detach())
    count = max(1, ceil(abs(end - start) / h * (1 - 1e-9)))
    sign = 1.0 if end > start else -1.0
    nodes = t[0] + sign * h * torch.arange(count, dtype=t.dtype, device=t.device)
    return torch.cat([nodes, t[-1:]])


def _cut(t: Tensor, h: float) -> tuple[Tensor, list[list[Scalar]]]:
    """Each sample's intervals cut into equally many steps, none longer than h."""
    nodes = [t[:, 0]]
    inside: list[list[Scalar]] = []
    for a, b in zip(t.T[:-1], t.T[1:], strict=True):
        count = max(1, ceil(float((b - a).detach().abs().max()) / h * (1 - 1e-9)))
        nodes += [a + (b - a) * (i / count) for i in range(1, count)]
        nodes.append(b)
        inside += [[]] * (count - 1) + [[1.0]]
    return torch.stack(nodes), inside


def _inside(nodes: Tensor, t: Tensor) -> list[list[Scalar]]:
    """For each step, where in it (0 to 1) the times t[1:] lie; a time at its end is 1.0."""
    times, ends = t.tolist(), nodes.tolist()
    sign = 1.0 if ends[-1] > ends[0] else -1.0
    inside: list[list[Scalar]] = [[] for _ in ends[1:]]
    n = 0
    for j in range(1, len(times)):
        while n < len(inside) - 1 and sign * (times[j] - ends[n + 1]) > 1e-6 * abs(
            ends[n + 1] - ends[n]
        ):
            n += 1
        length = ends[n + 1] - ends[n]
        if t.requires_grad and j < len(times) - 1:
            inside[n].append((t[j] - nodes[n]) / (nodes[n + 1] - nodes[n]))
        elif abs(times[j] - ends[n + 1]) <= 1e-6 * abs(length):
            inside[n].append(1.0)
        else:
            inside[n].append((times[j] - ends[n]) / length)
    return inside
