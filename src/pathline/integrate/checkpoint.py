"""The exact gradient in bounded memory: stored states, and steps computed again when needed.

The recomputation happens inside autograd's own graph: while the march runs, hooks replace every
tensor that a node would save by a number; when the backward pass asks for that number, its step is
run again from the nearest stored state. The graph, and with it the order in which gradients are
summed, is that of the direct solve, so the two gradients are equal bit for bit.

Source: Griewank and Walther, Algorithm 799: revolve, ACM TOMS 26, 2000 (binomial schedule).
"""

from bisect import bisect_right
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from math import ceil, comb
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from ..errors import ArgumentError, SolveError

UNITS = {"B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


def read_bytes(memory: str | float) -> int:
    """The number of bytes that "500MB", "2GiB" or a number mean.

    Raises:
        ArgumentError: it is neither, or not positive.
    """
    text = str(memory).strip().upper()
    number = text.rstrip("BKMGI ")
    try:
        size = float(number) * UNITS[text[len(number) :].strip() or "B"]
    except (ValueError, KeyError):
        size = 0.0
    if not 0 < size < float("inf"):
        raise ArgumentError(f"`memory` must be a size such as '500MB' or '2GiB', got {memory!r}")
    return int(size)


def repeats(length: int, slots: int) -> int:
    """The least r with C(slots + r, slots) >= length: how often a step has to be run again."""
    r = 0
    while comb(slots + r, slots) < length:
        r += 1
    return r


def binomial(length: int, slots: int) -> list[int]:
    """Where to store states, the first at 0, to reverse `length` steps with the fewest repeats."""
    places, start = [0], 0
    while slots > 1 and length > 1:
        stride = max(1, length - comb(slots - 1 + repeats(length, slots), slots - 1))
        start, length, slots = start + stride, length - stride, slots - 1
        places.append(start)
    return places


@dataclass(frozen=True)
class Plan:
    """How a checkpointed solve uses memory; `print(solution.plan)` shows it."""

    steps: int
    slots: int  # states that may be stored
    width: int  # steps recomputed at a time
    state_bytes: int
    step_bytes: int  # what autograd saves for one step

    @property
    def bytes(self) -> int:
        """What is kept for the backward pass at most."""
        stored = min(self.slots, ceil(self.steps / self.width))
        return stored * self.state_bytes + min(self.width, self.steps) * self.step_bytes

    def __str__(self) -> str:
        blocks = ceil(self.steps / self.width)
        again = repeats(blocks, self.slots) if blocks > 1 else 1
        return (
            f"checkpoint: {self.steps} steps, {min(self.slots, blocks)} stored states of "
            f"{self.state_bytes:,} bytes, {self.width} step(s) of {self.step_bytes:,} bytes "
            f"recomputed at a time; each step is run at most {max(again, 1)} time(s) more; "
            f"{self.bytes:,} bytes in place of {self.steps * self.step_bytes:,}"
        )


def _tensors(tree: Any) -> list[Tensor]:
    return [tree] if isinstance(tree, Tensor) else [x for part in tree for x in _tensors(part)]


def _leaves(tree: Any, graded: Iterator[bool]) -> Any:
    """The same state cut off from the graph, with gradients wanted where `graded` says."""
    if isinstance(tree, Tensor):
        return tree.detach().requires_grad_(next(graded))
    parts = [_leaves(part, graded) for part in tree]
    return type(tree)(*parts) if hasattr(tree, "_fields") else tuple(parts)


def _saved_bytes(tensors: list[Tensor]) -> int:
    """Bytes of distinct storages, without those of parameters, which exist anyway."""
    sizes = {}
    for x in tensors:
        origin = x if x._base is None else x._base
        if not (origin.is_leaf and origin.requires_grad):
            sizes[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
    return sum(sizes.values())


class Checkpoint:
    """Watches a march and keeps only some of its states.

    Args:
        steps: how many there will be, None where that shows only on the way.
        slots: states to store; or
        memory: bytes to stay within, from which slots and width follow after the first step.
        width: steps recomputed at a time.

    Raises:
        ArgumentError: one step alone needs more than `memory`.
    """

    def __init__(
        self,
        *,
        steps: int | None,
        slots: int | None = None,
        memory: int | None = None,
        width: int = 1,
        device: torch.device,
    ) -> None:
        self.steps = steps
        self.memory = memory
        self.slots = slots if slots is not None else steps or 2**62
        self.width = width
        self.stride = 1  # between stored blocks, where the number of steps is not known
        self.step_bytes = self.state_bytes = 0
        self.counter = 0
        self.starts: list[int] = []  # the first number of each step
        self.replays: list[Callable[[Any], Any]] = []
        self.graded: list[tuple[bool, ...]] = []  # by step: which tensors of its state need one
        self.states: dict[int, Any] = {}  # by step
        self.attempt: Any = None  # the state from which the step under way began
        self.live: dict[int, Tensor] = {}  # saved by the step under way
        self.again: dict[int, dict[int, Tensor]] = {}  # by step: saved by its recomputation
        self.hooks = saved_tensors_hooks(self._pack, self._unpack)
        self.autocast = autocast_now(device)
        self.random = Randomness(device)
        self.places: set[int] | None = None

    def __enter__(self) -> "Checkpoint":
        self.hooks.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self.hooks.__exit__(*error)
        self.live.clear()
        if error[0] is None:
            self.random.check()

    def call(self, step: Callable[[Any], Any], state: Any) -> Any:
        """Runs `step(state)` as one step of the march."""
        self.open(state)
        after = step(state)
        self.close(step)
        return after

    def open(self, state: Any) -> None:
        """A step, or an attempt at one, begins from `state`."""
        self.attempt = state
        self.first = self.counter

    def drop(self) -> None:
        """The attempt was rejected."""
        self.counter = self.first
        self.attempt = None
        self.live.clear()

    def close(self, replay: Callable[[Any], Any]) -> None:
        """The step is done; `replay(state)` would do the same again."""
        n = len(self.replays)
        tensors = _tensors(self.attempt)
        self.graded.append(tuple(x.requires_grad for x in tensors))
        if n < 3:  # the first ones may save less: their input needs no gradient
            self.state_bytes = max(self.state_bytes, sum(x.nbytes for x in tensors))
            self.step_bytes = max(self.step_bytes, _saved_bytes(list(self.live.values())))
        if self.memory is not None and n < 3:
            self._fit()
        self.starts.append(self.first)
        self.replays.append(replay)
        self._store(n, self.attempt)
        self.attempt = None
        self.live.clear()

    @contextmanager
    def aside(self) -> Iterator[None]:
        """What is computed within is no part of the step under way, and is not run again."""
        attempt, self.attempt = self.attempt, None
        yield
        self.attempt = attempt

    @property
    def plan(self) -> Plan:
        return Plan(len(self.replays), self.slots, self.width, self.state_bytes, self.step_bytes)

    def _fit(self) -> None:
        """Slots and width from the memory: half for each, unless all states fit beside one step."""
        assert self.memory is not None
        room = self.memory - self.step_bytes
        if room < self.state_bytes:
            raise ArgumentError(
                f"`memory` must hold one state and one step, {self.state_bytes:,} + "
                f"{self.step_bytes:,} bytes, got {self.memory:,}"
            )
        self.slots, self.width = room // self.state_bytes, 1
        if self.steps is not None and self.slots >= self.steps:
            left = self.memory - self.steps * self.state_bytes
            self.slots, self.width = self.steps, max(1, left // max(self.step_bytes, 1))
        elif self.steps is not None:
            width = self.memory // (2 * max(self.step_bytes, 1))
            slots = self.memory // (2 * self.state_bytes)
            if min(width, slots) >= 1 and width * slots >= self.steps:
                self.slots, self.width = slots, width
        self.places = None

    def _store(self, n: int, state: Any) -> None:
        block, inner = divmod(n, self.width)
        if inner:
            return
        if self.steps is not None:
            if self.places is None:
                self.places = set(binomial(ceil(self.steps / self.width), self.slots))
            if block not in self.places and n:
                return
        elif block % self.stride:
            return
        self.states[n] = self._cut(n, state)
        if self.steps is None and len(self.states) > self.slots:
            self.stride *= 2
            kept = [m for m in self.states if m % (self.stride * self.width) == 0]
            self.states = {m: self.states[m] for m in kept}

    def _cut(self, n: int, state: Any) -> Any:
        return _leaves(state, iter(self.graded[n]))

    def _pack(self, x: Tensor) -> int | Tensor:
        if self.attempt is None:  # between the steps, such as times that need a gradient
            return x.detach()
        self.live[self.counter] = x
        self.counter += 1
        return self.counter - 1

    def _unpack(self, number: int | Tensor) -> Tensor:
        if isinstance(number, Tensor):
            return number
        if number in self.live:  # the velocity differentiates inside
            return self.live[number]
        n = bisect_right(self.starts, number) - 1
        saved = self.again.get(n)
        index = number - self.starts[n]
        if saved is None or index not in saved:
            self._recompute(n)
            saved = self.again[n]
        x = saved.pop(index)
        if not saved:
            del self.again[n]
        return x

    def _recompute(self, n: int) -> None:
        """Runs step n again, and the others of its block, from the nearest stored state."""
        first = n - n % self.width
        near = max(m for m in self.states if m <= first)
        self.states = {m: state for m, state in self.states.items() if m <= near or m == 0}
        self.again.clear()
        state = self.states[near]
        blocks = (first - near) // self.width + 1
        free = max(self.slots - len(self.states) + 1, 1)
        store = {near + self.width * place for place in binomial(blocks, free)}
        with torch.no_grad(), self.autocast():
            for m in range(near, first):
                if m in store:
                    self.states[m] = self._cut(m, state)
                state = self.replays[m](state)[0]
        end = max(n + 1, min(first + self.width, len(self.replays)))
        with torch.enable_grad(), self.autocast():
            for m in range(first, end):
                expected = (*self.starts[m + 1 : m + 2], self.counter)[0] - self.starts[m]
                collector = _Collector(expected, stop=m + 1 == end)
                with collector:
                    state = self.replays[m](self._cut(m, state))[0]
                if len(collector.saved) != expected:
                    raise SolveError(
                        f"step {m} saved {len(collector.saved)} tensors for its gradient when run "
                        f"again, and {expected} before: the velocity must do the same at each call"
                    )
                self.again[m] = {i: x.detach() for i, x in enumerate(collector.saved)}
                collector.saved.clear()  # else it holds the graph whose hooks hold it


class _Complete(Exception):
    """Everything that a step saves was saved."""


class _Collector(saved_tensors_hooks):
    """Collects what a step saves; `stop` ends the step with the last of it."""

    def __init__(self, expected: int, *, stop: bool) -> None:
        self.saved: list[Tensor] = []
        self.expected = expected
        self.stop = stop
        super().__init__(self._pack, self.saved.__getitem__)

    def _pack(self, x: Tensor) -> int:
        self.saved.append(x)
        if self.stop and len(self.saved) == self.expected:
            raise _Complete
        return len(self.saved) - 1

    def __exit__(self, kind: Any, error: Any, trace: Any) -> bool:  # type: ignore[override]
        super().__exit__(kind, error, trace)
        return kind is _Complete


def autocast_now(device: torch.device) -> Callable[[], AbstractContextManager[Any]]:
    """A maker of the context of automatic casting that is in force now."""
    if not torch.is_autocast_enabled(device.type):
        return nullcontext
    dtype = torch.get_autocast_dtype(device.type)
    return lambda: torch.autocast(device.type, dtype=dtype)


class Randomness:
    """Notices whether random numbers were drawn, since steps that draw can't be run again."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.before = self._state()

    def _state(self) -> Tensor:
        if self.device.type == "cuda":
            return torch.cuda.get_rng_state(self.device)
        return torch.get_rng_state()

    def check(self) -> None:
        """Refuses a velocity that drew since.

        Raises:
            ArgumentError: it did.
        """
        if not torch.equal(self.before, self._state()):
            raise ArgumentError(
                "the velocity draws random numbers, so its steps can't be run again; draw them "
                'before the solve, or use gradient="discrete" without torch.autocast'
            )
