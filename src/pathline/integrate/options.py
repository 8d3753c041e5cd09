"""What users pass to `odeint`, checked before the first evaluation."""

from collections.abc import Iterable, Mapping, Sequence
from math import inf, isfinite
from numbers import Real
from typing import Any

import torch
from torch import Tensor

from ..errors import ArgumentError, ShapeError, did_you_mean
from .field import Layout, real_dtype
from .grid import time_dtype

FIXED = {"step_size", "grid_constructor", "perturb", "interp", "norm"}
ADAPTIVE = {
    *("norm", "first_step", "min_step", "max_step", "max_num_steps", "safety", "ifactor"),
    *("dfactor", "beta", "step_t", "jump_t", "dtype"),
}


def check_names(options: Mapping[str, Any], known: Iterable[str], method: str) -> None:
    """Refuses options that the method does not have.

    Raises:
        ArgumentError: naming the option and the nearest that exists.
    """
    known = sorted(known)
    for name in options:
        if name not in known:
            raise ArgumentError(
                f"unknown option {name!r} of method {method!r}{did_you_mean(name, known)} "
                f"(known: {', '.join(known)})"
            )


def traced(z: Tensor) -> bool:
    """The solve is being compiled or captured, so no value can be looked at."""
    if torch.compiler.is_compiling():
        return True
    return z.is_cuda and torch.cuda.is_current_stream_capturing()


def finite(z: Tensor) -> bool:
    """All entries are, which a finite sum of them says at once."""
    z = z.detach()
    return bool(torch.isfinite(z.sum())) or bool(torch.isfinite(z).all())


def transformed() -> bool:
    """A transform of torch.func is at work."""
    try:
        torch.zeros(()).requires_grad_()
    except RuntimeError:
        return True
    return False


def check_times(t: Any, z: Tensor, *, values: bool = True) -> Tensor:
    """The times as a tensor in double precision, (times,) or (batch, times).

    Raises:
        ArgumentError: not floating point, empty, not finite, or not strictly monotonic.
        ShapeError: neither (times,) nor (batch, times).
    """
    if not isinstance(t, Tensor):
        try:
            t = torch.tensor(t, dtype=time_dtype(z.device), device=z.device)
        except (TypeError, ValueError, RuntimeError) as error:
            raise ArgumentError(
                f"`t` must be a tensor or a sequence of times, got {type(t).__name__}"
            ) from error
    if not t.is_floating_point():
        raise ArgumentError(f"`t` must be of a floating point type, got {t.dtype}")
    if t.ndim not in (1, 2) or t.numel() == 0:
        raise ShapeError(
            f"`t` must be (times,) or (batch, times) with at least one time, got {tuple(t.shape)}"
        )
    if t.ndim == 2 and (z.ndim == 0 or t.shape[0] != z.shape[0]):
        raise ShapeError(
            f"`t` of shape (batch, times) must have a row for each sample of `y0`, "
            f"{tuple(z.shape)}, got {tuple(t.shape)}"
        )
    t = t.to(z.device, time_dtype(z.device))
    if values and t.ndim == 1:
        check_monotonic(t.tolist())
    return t


def check_monotonic(times: Sequence[float], what: str = "`t`") -> None:
    """Refuses times that do not go strictly one way.

    Raises:
        ArgumentError: naming the first place where they do not.
    """
    for i, time in enumerate(times):
        if not isfinite(time):
            raise ArgumentError(f"{what} must be finite, got {time} at index {i}")
    if len(times) < 2:
        return
    sign = 1 if times[-1] > times[0] else -1
    for i in range(1, len(times)):
        if not sign * (times[i] - times[i - 1]) > 0:
            raise ArgumentError(
                f"{what} must be strictly increasing or decreasing, got {times[i - 1]:g} and "
                f"{times[i]:g} at indices {i - 1} and {i}"
            )


def check_rows(t: Tensor, mask: Tensor | None) -> Tensor:
    """Times (batch, times), in which the last time that counts is repeated to the end of a row.

    Raises:
        ArgumentError: a row is not finite or not strictly monotonic, or the mask has a wrong
            shape or type, or does not begin with its times that count.
    """
    if mask is None:
        mask = torch.ones_like(t, dtype=torch.bool)
    if not isinstance(mask, Tensor) or mask.shape != t.shape or mask.dtype != torch.bool:
        got = f"{mask.dtype} of {tuple(mask.shape)}" if isinstance(mask, Tensor) else type(mask)
        raise ArgumentError(
            f"`mask` must be a bool tensor of the shape of `t`, {tuple(t.shape)}, got {got}"
        )
    mask = mask.to(t.device)
    if not bool(mask[:, 0].all()) or bool((mask[:, 1:] & ~mask[:, :-1]).any()):
        raise ArgumentError("`mask` must be True from the first time of each row up to its last")
    last = mask.sum(1, keepdim=True) - 1
    t = torch.where(mask, t, t.gather(1, last))
    steps = t.detach().diff(dim=1)
    way = torch.sign(steps[:, :1])
    wrong = ~torch.isfinite(t).all(1) | (mask[:, 1:] & ~(steps * way > 0)).any(1)
    if bool(wrong.any()):
        row = int(wrong.nonzero()[0])
        raise ArgumentError(
            f"`t` must be finite and strictly increasing or decreasing in each row, row {row} is "
            f"not: {t[row].tolist()}"
        )
    return t


def check_tolerance(name: str, tolerance: Any, layout: Layout, z: Tensor) -> float | Tensor:
    """A tolerance as a float, or as a tensor that broadcasts against the joined state.

    Raises:
        ArgumentError: negative, not finite, differentiable, or of a wrong length.
    """
    if isinstance(tolerance, tuple | list):
        if layout.plain or len(tolerance) != len(layout.sizes):
            count = 1 if layout.plain else len(layout.sizes)
            raise ArgumentError(
                f"`{name}` must have one entry for each of the {count} tensors of `y0`, "
                f"got {len(tolerance)}"
            )
        parts = [
            layout.flat(_spread(name, torch.as_tensor(part, dtype=torch.float64), shape), i)
            for i, (part, shape) in enumerate(zip(tolerance, layout.shapes, strict=True))
        ]
        tolerance = torch.cat(parts)
    if isinstance(tolerance, Tensor):
        if tolerance.requires_grad:
            raise ArgumentError(f"`{name}` must not require a gradient")
        if tolerance.ndim == 0:
            tolerance = float(tolerance)
    if isinstance(tolerance, Tensor):
        if not bool((torch.isfinite(tolerance) & (tolerance >= 0)).all()):
            raise ArgumentError(f"`{name}` must be finite and not negative")
        _spread(name, tolerance, z.shape)
        return tolerance.to(z.device, real_dtype(z))
    if not (isinstance(tolerance, Real) and 0 <= float(tolerance) < inf):
        raise ArgumentError(f"`{name}` must be finite and not negative, got {tolerance!r}")
    return float(tolerance)


def _spread(name: str, tolerance: Tensor, shape: torch.Size) -> Tensor:
    """The tolerance in the shape of what it belongs to.

    Raises:
        ArgumentError: it does not broadcast to that.
    """
    try:
        return tolerance.expand(shape)
    except RuntimeError:
        raise ArgumentError(
            f"`{name}` must broadcast to the shape of `y0`, {tuple(shape)}, got "
            f"{tuple(tolerance.shape)}"
        ) from None


def floats(name: str, times: Any) -> list[float]:
    """A list of times given as a tensor or a sequence, in order.

    Raises:
        ArgumentError: not finite, or a time twice.
    """
    if times is None:
        return []
    listed = sorted(torch.as_tensor(times, dtype=torch.float64).reshape(-1).tolist())
    if any(not isfinite(time) for time in listed) or len(set(listed)) < len(listed):
        raise ArgumentError(f"`{name}` must be finite and without repetitions, got {listed}")
    return listed


def number(name: str, value: Any, low: float = 0.0) -> float:
    """A number of at least `low` (infinity is allowed).

    Raises:
        ArgumentError: it is none.
    """
    try:
        got = float(value)
    except (TypeError, ValueError):
        got = float("nan")
    if not got >= low:
        raise ArgumentError(f"option {name!r} must be a number of at least {low:g}, got {value!r}")
    return got


def positive(name: str, value: Any) -> float:
    """A finite number above zero.

    Raises:
        ArgumentError: it is none.
    """
    got = number(name, value)
    if not 0.0 < got < inf:
        raise ArgumentError(f"option {name!r} must be finite and above zero, got {value!r}")
    return got
