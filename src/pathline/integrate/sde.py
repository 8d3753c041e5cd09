"""Stochastic differential equations dz = f(t, z) dt + g(t, z) dW with diagonal noise.

Component i of z is driven by its own Brownian motion with strength g_i, so g has the shape of z or
broadcasts to it. Adding a method: a step function, and its name in `SDE_METHODS`.
"""

import math
import operator
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from numbers import Real
from typing import Any, Literal

import numpy as np
import torch
from torch import Generator, Tensor
from torch.autograd import forward_ad

from ..errors import ArgumentError, ShapeError, SolveError, unknown

Term = Callable[[Tensor, Tensor], Tensor]
Increments = Callable[[float, float], Tensor]
Step = Callable[[Term, Term, Tensor, Tensor, float, Tensor, Tensor], Tensor]

DEPTH = 30  # levels of a `BrownianPath` below its two ends
TICKS = 2**40  # parts of its span that it tells apart
RECENT = 64  # values it keeps: more than the ancestors of two times


def sdeint(
    drift: Callable[[Tensor, Tensor], Any],
    diffusion: Callable[[Tensor, Tensor], Any],
    z0: Tensor,
    t: Tensor | Sequence[float],
    *,
    method: str = "euler_maruyama",
    dt: float | None = None,
    brownian: Increments | None = None,
    seed: int | None = None,
    generator: Generator | None = None,
) -> Tensor:
    """Sample dz = f(t, z) dt + g(t, z) dW at the times `t`, by fixed steps.

    Write the equation in the sense of the method: "euler_maruyama" and "milstein" read it as Ito's,
    "heun" as Stratonovich's, whose drift is Ito's minus (g_i dg_i/dz_i) / 2. They agree where g
    does not depend on z. The error along a path falls as dt for "milstein" and "heun", and as
    sqrt(dt) for "euler_maruyama", which is the cheapest and does as well where g does not depend
    on z. Those orders of "milstein" and "heun" hold where g_i depends on z_i only; "milstein"
    would go wrong elsewhere and refuses.

    Gradients with respect to `z0` and to the parameters of both callables are exact for the
    discrete path: they go back through every step, and memory grows with the number of steps. No
    gradient goes to `t`.

    Args:
        drift: callable `(t, z) -> f`; `t` is (), `z` and `f` are (batch, dim).
        diffusion: callable `(t, z) -> g`; `g` is (batch, dim) or broadcasts to it, such as (dim,)
            or a number. "milstein" differentiates it in forward mode, also under `no_grad`.
        z0: states at time `t[0]`, (batch, dim); further axes are welcome.
        t: increasing times, (times,).
        method: a name in `SDE_METHODS`.
        dt: largest step. Each interval of `t` is cut into as few equal steps as that allows; by
            default it is one step.
        brownian: callable `(s, t) -> W(t) - W(s)` of the shape of `z0`, such as a `BrownianPath`,
            to solve along the same path again with other steps.
        seed: integer from which the increments are drawn, on the device of `z0`.
        generator: source of the increments, on the device of `z0`.

    Returns:
        The states (times, batch, dim) in the dtype and on the device of `z0`, which comes first.

    Raises:
        ArgumentError: the method is unknown; not exactly one of `brownian`, `seed` and `generator`
            is given; `t`, `dt` or `z0` can't be used; a callable returns another dtype; or the
            method is "milstein" and g_i depends on more than z_i.
        ShapeError: `t`, `z0`, or what a callable returns, has the wrong shape.
        SolveError: a state is no longer finite.

    Source: Kloeden and Platen, Numerical Solution of Stochastic Differential Equations, 1992,
    sections 10.2 (Euler) and 10.3 (Milstein); Rumelin, Numerical treatment of stochastic
    differential equations, SIAM J. Numer. Anal. 19, 1982 (Heun).

    Example:
        >>> z0 = torch.zeros(1000, 2)
        >>> zs = sdeint(lambda t, z: -z, lambda t, z: 0.5, z0, [0.0, 1.0, 2.0], dt=0.05, seed=0)
        >>> zs.shape
        torch.Size([3, 1000, 2])
    """
    if method not in SDE_METHODS:
        raise ArgumentError(unknown("method", str(method), SDE_METHODS))
    scheme = SDE_METHODS[method]
    if not isinstance(z0, Tensor) or not z0.is_floating_point():
        raise ArgumentError(
            f"`z0` must be a tensor of real floating-point numbers, got {_kind(z0)}"
        )
    if z0.ndim == 0:
        raise ShapeError("`z0` must be (batch, dim), got ()")
    if not z0.isfinite().all():
        raise ArgumentError("`z0` must be finite")
    times, slack = _times(t, dt)
    increments = _increments(z0, times, brownian, seed, generator)
    f, g = _checked("drift", drift, z0), _checked("diffusion", diffusion, z0)
    if scheme.differentiates and len(times) > 1:
        _check_diagonal(g, z0.new_tensor(times[0]), z0)

    z, zs = z0, [z0]
    for start, stop in pairwise(times):
        nodes, h = _nodes(start, stop, dt, slack)
        ts = torch.tensor(nodes, dtype=torch.float64).to(z0).unbind()
        for (a, b), (t_n, t_next) in zip(pairwise(nodes), pairwise(ts), strict=True):
            z = scheme.step(f, g, t_n, t_next, h, z, increments(a, b))
        _check_finite(z, start, stop)
        zs.append(z)
    return torch.stack(zs)


def _euler_maruyama(
    f: Term, g: Term, t: Tensor, t_next: Tensor, h: float, z: Tensor, dw: Tensor
) -> Tensor:
    """z + f h + g dW."""
    return z + h * f(t, z) + g(t, z) * dw


def _heun(f: Term, g: Term, t: Tensor, t_next: Tensor, h: float, z: Tensor, dw: Tensor) -> Tensor:
    """The trapezoidal rule in f and g, with z_{n+1} predicted by z + f h + g dW."""
    drift, noise = f(t, z), g(t, z)
    ahead = z + h * drift + noise * dw
    return z + (0.5 * h) * (drift + f(t_next, ahead)) + 0.5 * (noise + g(t_next, ahead)) * dw


def _milstein(
    f: Term, g: Term, t: Tensor, t_next: Tensor, h: float, z: Tensor, dw: Tensor
) -> Tensor:
    """z + f h + g dW + g dg/dz (dW^2 - h) / 2."""
    noise, slope = _derivative(g, t, z, torch.ones_like(z))
    z = z + h * f(t, z) + noise * dw
    return z if slope is None else z + 0.5 * noise * slope * (dw**2 - h)


@dataclass(frozen=True)
class SDEMethod:
    """A fixed-step method for dz = f dt + g dW; it moves z by `step(f, g, t, t_next, h, z, dW)`."""

    name: str
    sense: Literal["ito", "stratonovich"]
    order: float  # strong order for diagonal noise; 1 for all of them if g does not depend on z
    step: Step
    differentiates: bool = False  # whether it uses dg_i/dz_i


EULER_MARUYAMA = SDEMethod("euler_maruyama", "ito", 0.5, _euler_maruyama)
HEUN = SDEMethod("heun", "stratonovich", 1.0, _heun)
MILSTEIN = SDEMethod("milstein", "ito", 1.0, _milstein, differentiates=True)

SDE_METHODS = {method.name: method for method in (EULER_MARUYAMA, HEUN, MILSTEIN)}


class BrownianPath:
    """One Brownian path W, to be asked for its increments in any order and as finely as wanted.

    The path is a function of the seed: the same times give the same values bit for bit, whatever
    was asked before, so that a solve with half the steps sees the same path.

    The tree: W at the end is normal; W at the middle of an interval, given W at its ends, is their
    mean plus an independent normal of variance a quarter of the interval's length; and so on for
    30 halvings. Between two neighbouring times of the last level lies one more such bridge, whose
    normal belongs to the interval. So the joint law is exact for any times of which no two lie
    within the same 2^-30 of the span; each single value has the exact law everywhere. Times are
    rounded to 2^-40 of the span, where those that differ by round-off meet. Every normal comes
    from a counter-based generator, keyed by the seed, whose counter is the place in the tree.

    An increment costs one array of normals at dyadic times asked in turn, and up to 31 elsewhere:
    steps that halve the span again and again are cheapest. It is drawn on the CPU in double
    precision, and up to 64 arrays of that are kept. A seed stands for the same path as long as
    NumPy keeps its stream of normals.

    Args:
        shape: shape of the increments, such as (batch, dim): independent paths.
        start, stop: the span, `start` before `stop`.
        seed: integer from 0 to 2^64 - 1.
        dtype, device: of the increments.

    Raises:
        ArgumentError: the span, the seed or the dtype can't be used.
        ShapeError: a size in `shape` is negative.

    Source: Levy, Processus stochastiques et mouvement brownien, 1948; Li, Wong, Chen, Duvenaud,
    Scalable gradients for stochastic differential equations, 2020, section 4 (the tree); Salmon,
    Moraes, Dror, Shaw, Parallel random numbers: as easy as 1, 2, 3, 2011 (Philox).

    Example:
        >>> path = BrownianPath((1, 1), start=0.0, stop=1.0, seed=0, dtype=torch.float64)
        >>> torch.allclose(path(0.0, 0.25) + path(0.25, 1.0), path(0.0, 1.0))
        True
    """

    def __init__(
        self,
        shape: Sequence[int],
        *,
        start: float,
        stop: float,
        seed: int,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
    ) -> None:
        self.shape = tuple(operator.index(size) for size in shape)
        if min(self.shape, default=0) < 0:
            raise ShapeError(f"`shape` must hold no negative size, got {self.shape}")
        self.start, self.stop = float(start), float(stop)
        self.span = self.stop - self.start
        if not 0 < self.span < math.inf:
            raise ArgumentError(f"`start` must lie before `stop`, got {start} and {stop}")
        if not dtype.is_floating_point:
            raise ArgumentError(f"`dtype` must be a floating-point type, got {dtype}")
        self.seed, self.dtype, self.device = _seed(seed), dtype, torch.device(device or "cpu")
        last = math.sqrt(self.span) * self._normal(0, 0)
        self._ends = np.zeros(self.shape), last
        self._recent: OrderedDict[int, np.ndarray] = OrderedDict()

    def __call__(self, s: float, t: float) -> Tensor:
        """W(t) - W(s), of the shape of the path.

        Raises:
            ArgumentError: a time is not between `start` and `stop`.
        """
        change = self._value(self._tick("t", t)) - self._value(self._tick("s", s))
        return torch.from_numpy(np.asarray(change)).to(self.device, self.dtype)

    def _tick(self, name: str, time: float) -> int:
        """The time as a whole number of parts of the span."""
        share = (float(time) - self.start) / self.span * TICKS
        if not -0.5 <= share <= TICKS + 0.5:
            raise ArgumentError(
                f"`{name}` must lie between {self.start} and {self.stop}, the span of this path, "
                f"got {time}"
            )
        return round(share)

    def _value(self, tick: int) -> np.ndarray:
        """W, found by halving the span until the tick is met."""
        if tick in self._recent:
            self._recent.move_to_end(tick)
            return self._recent[tick]
        left, right = 0, TICKS
        w_left, w_right = self._ends
        if tick in (left, right):
            return w_right if tick else w_left
        for level in range(1, DEPTH + 1):
            middle = (left + right) // 2
            w = self._bridge(level, middle, left, right, w_left, w_right)
            if tick == middle:
                return w
            if tick < middle:
                right, w_right = middle, w
            else:
                left, w_left = middle, w
        return self._bridge(DEPTH + 1, tick, left, right, w_left, w_right)

    def _bridge(
        self, level: int, tick: int, left: int, right: int, w_left: np.ndarray, w_right: np.ndarray
    ) -> np.ndarray:
        """W between two neighbours, given W at both; a function of the place and the seed."""
        w = self._recent.get(tick)
        if w is None:
            share = (tick - left) / (right - left)
            std = math.sqrt(share * (1 - share) * (right - left) / TICKS * self.span)
            w = w_left + share * (w_right - w_left) + std * self._normal(level, left)
            self._recent[tick] = w
            if len(self._recent) > RECENT:
                self._recent.popitem(last=False)
        else:
            self._recent.move_to_end(tick)
        return w

    def _normal(self, level: int, left: int) -> np.ndarray:
        """The normals of the interval that begins at the tick `left`."""
        # The lower two words of the counter count within the array: no two intervals overlap.
        bits = np.random.Philox(key=self.seed, counter=[0, 0, left, level])
        return np.random.Generator(bits).standard_normal(self.shape)


def _derivative(g: Term, t: Tensor, z: Tensor, direction: Tensor) -> tuple[Tensor, Tensor | None]:
    """g(t, z) and its derivative with respect to z in a direction; None if it is constant.

    If g_i depends on z_i only, the direction of ones gives dg_i/dz_i. Forward mode needs no graph,
    leaves one exactly if g does, and sees through a callable that switches gradients off.
    """
    if torch.is_inference_mode_enabled():  # where derivatives are switched off altogether
        with torch.inference_mode(False), torch.no_grad():
            return _derivative(g, t.clone(), z.clone(), direction.clone())
    with forward_ad.dual_level():
        dual = forward_ad.unpack_dual(g(t, forward_ad.make_dual(z, direction)))
    return dual.primal, dual.tangent


def _check_diagonal(g: Term, t: Tensor, z: Tensor) -> None:
    """Compares the derivative along a vector with the vector times the derivative along ones."""
    vector = torch.linspace(1, 2, max(z.numel(), 1)).to(z)[: z.numel()].view(z.shape)
    with torch.no_grad():
        _, along = _derivative(g, t, z, vector)
        _, slope = _derivative(g, t, z, torch.ones_like(z))
    if along is None or slope is None or z.numel() == 0:
        return
    error, size = (along - vector * slope).abs(), along.abs().max() + slope.abs().max()
    if (error > math.sqrt(torch.finfo(z.dtype).eps) * size).any():
        raise ArgumentError(
            "each component of `diffusion(t, z)` must depend on the same component of z only for "
            "method='milstein'; use 'euler_maruyama'"
        )


def _checked(name: str, term: Callable[[Tensor, Tensor], Any], z0: Tensor) -> Term:
    """The callable with its result checked; `diffusion` may return what broadcasts to z."""
    if not callable(term):
        raise ArgumentError(f"`{name}` must be a callable (t, z), got {_kind(term)}")
    shape, dtype, exact = z0.shape, z0.dtype, name == "drift"
    wanted = "return the shape of z" if exact else "return the shape of z or broadcast to it"

    def checked(t: Tensor, z: Tensor) -> Tensor:
        got = term(t, z)
        if isinstance(got, Real):
            got = torch.as_tensor(got, dtype=dtype, device=z.device)
        if not isinstance(got, Tensor):
            raise ArgumentError(f"`{name}(t, z)` must return a tensor, got {_kind(got)}")
        if got.shape != shape and (exact or not _broadcasts(got.shape, shape)):
            raise ShapeError(
                f"`{name}(t, z)` must {wanted}, {tuple(shape)}, got {tuple(got.shape)}"
            )
        if got.dtype != dtype:
            raise ArgumentError(
                f"`{name}(t, z)` must return the dtype of z, {dtype}, got {got.dtype}"
            )
        return got

    return checked


def _broadcasts(shape: torch.Size, to: torch.Size) -> bool:
    same = all(a in (1, b) for a, b in zip(reversed(shape), reversed(to), strict=False))
    return same and len(shape) <= len(to)


def _increments(
    z0: Tensor,
    times: list[float],
    brownian: Increments | None,
    seed: int | None,
    generator: Generator | None,
) -> Increments:
    """The source of W(t) - W(s), each of the shape, dtype and device of z0."""
    given = {"brownian": brownian, "seed": seed, "generator": generator}
    names = [f"`{name}`" for name, value in given.items() if value is not None]
    if len(names) != 1:
        raise ArgumentError(
            "randomness must be explicit: give exactly one of `brownian`, `seed` and `generator`, "
            f"got {' and '.join(names) or 'none'}"
        )
    if brownian is not None:
        return _read(brownian, z0, times)
    if generator is None:
        generator = Generator(z0.device).manual_seed(_seed(seed))
    if generator.device.type != z0.device.type:
        raise ArgumentError(
            f"`generator` must be on the device of `z0`, {z0.device}, got {generator.device}"
        )
    return lambda s, t: (
        math.sqrt(t - s)
        * torch.randn(z0.shape, generator=generator, dtype=z0.dtype, device=z0.device)
    )


def _read(brownian: Increments, z0: Tensor, times: list[float]) -> Increments:
    if not callable(brownian):
        raise ArgumentError(f"`brownian` must be a callable (s, t), got {_kind(brownian)}")
    if isinstance(brownian, BrownianPath):
        _check_increment(brownian.shape, brownian.dtype, z0)
        if not brownian.start <= times[0] <= times[-1] <= brownian.stop:
            raise ArgumentError(
                f"`t` must lie within the span of `brownian`, {brownian.start} to "
                f"{brownian.stop}, got {times[0]} to {times[-1]}"
            )

    def increments(s: float, t: float) -> Tensor:
        dw = brownian(s, t)
        _check_increment(dw.shape, dw.dtype, z0)
        return dw.to(z0.device)

    return increments


def _check_increment(shape: tuple[int, ...], dtype: torch.dtype, z0: Tensor) -> None:
    if tuple(shape) != tuple(z0.shape):
        raise ShapeError(
            f"`brownian` must have the shape of `z0`, {tuple(z0.shape)}, got {tuple(shape)}"
        )
    if dtype != z0.dtype:
        raise ArgumentError(f"`brownian` must have the dtype of `z0`, {z0.dtype}, got {dtype}")


def _times(t: Tensor | Sequence[float], dt: float | None) -> tuple[list[float], float]:
    """The times, and the round-off of their differences; `dt` is checked against them."""
    ts = t.detach() if isinstance(t, Tensor) else torch.as_tensor(np.asarray(t))
    if ts.ndim != 1:
        raise ShapeError(f"`t` must be a vector of times, got {tuple(ts.shape)}")
    if len(ts) == 0:
        raise ArgumentError("`t` must hold at least one time")
    if not ts.isfinite().all():
        raise ArgumentError("`t` must be finite")
    times = ts.double().tolist()
    if not all(a < b for a, b in pairwise(times)):
        raise ArgumentError("`t` must be increasing")
    largest = max(abs(times[0]), abs(times[-1]))
    if dt is not None and not (isinstance(dt, Real) and 0 < dt < math.inf):
        raise ArgumentError(f"`dt` must be a positive number, got {dt!r}")
    if dt is not None and dt < math.ulp(largest):
        raise ArgumentError(f"`dt` must be above the round-off of the times, got {dt}")
    precision = torch.finfo(ts.dtype if ts.is_floating_point() else torch.float64).eps
    return times, 4 * precision * largest


def _nodes(start: float, stop: float, dt: float | None, slack: float) -> tuple[list[float], float]:
    """Equally spaced times from `start` to `stop`, and the step."""
    # An interval that is longer than n dt by round-off alone is not cut once more.
    steps = 1 if dt is None else max(1, math.ceil((stop - start - slack) / dt))
    h = (stop - start) / steps
    return [start + n * h for n in range(steps)] + [stop], h


def _check_finite(z: Tensor, start: float, stop: float) -> None:
    finite = z.isfinite()
    if not finite.all():
        lost = int((~finite.reshape(len(z), -1).all(1)).sum())
        raise SolveError(
            f"the state is not finite at t={stop:g} in {lost} of {len(z)} samples (all were at "
            f"t={start:g}): take a smaller `dt`, or see whether the equation has a solution there"
        )


def _seed(seed: Any) -> int:
    if isinstance(seed, bool) or not hasattr(seed, "__index__"):
        raise ArgumentError(f"`seed` must be an integer, got {_kind(seed)}")
    if not 0 <= operator.index(seed) < 2**64:
        raise ArgumentError(f"`seed` must lie between 0 and 2^64 - 1, got {seed}")
    return operator.index(seed)


def _kind(value: object) -> str:
    return str(value.dtype) if isinstance(value, Tensor) else type(value).__name__
