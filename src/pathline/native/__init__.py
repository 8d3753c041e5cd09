"""Parts of the library as a compiled kernel: how to reach it, and when it can serve.

`rollouts` are those of potentials under optimal transport, `norms` those of channels, and `filters`
those of periodic images. Who uses them decides when; their results are those of the PyTorch path
to round-off.
"""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from importlib import import_module
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from ..errors import KernelWarning

_kernel: Any
try:
    _kernel = import_module("pathline.native._kernel")
except ImportError:  # installed where no C++ compiler was at hand
    _kernel = None

__all__ = ["instruction_sets", "threads", "using"]

_off = False  # inside `using(None)`
_threads: int | None = None  # inside `threads`


def instruction_set() -> str:
    """The one that the kernel works with, if it is there."""
    return _kernel.isa()


def instruction_sets() -> list[str]:
    """Those that the kernel was compiled for and this processor has, the best one first."""
    return [] if _kernel is None else list(_kernel.isas())


@contextmanager
def using(instruction_set: str | None) -> Iterator[None]:
    """Work with another of the `instruction_sets`, or with PyTorch in place of the kernel.

    For tests and measurements; it holds for all threads.
    """
    global _off
    before = _off, None if _kernel is None else _kernel.isa()
    try:
        _off = instruction_set is None
        if instruction_set is not None:
            _kernel.use(instruction_set)
        yield
    finally:
        _off = before[0]
        if before[1] is not None:
            _kernel.use(before[1])


@contextmanager
def threads(count: int | None) -> Iterator[None]:
    """Let the kernel use so many threads, whatever torch uses; None changes nothing."""
    global _threads
    before, _threads = _threads, count or _threads
    try:
        yield
    finally:
        _threads = before


def thread_count() -> int:
    """Of the kernel's threads, now."""
    return _threads or torch.get_num_threads()


def knows(*tensors: Tensor) -> bool:
    """Whether the kernel can read these tensors, in a computation that is one of numbers alone."""
    dtype = tensors[0].dtype
    return (
        dtype in (torch.float32, torch.float64)
        and all(t.dtype == dtype and t.is_cpu and _numbers(t) for t in tensors)
        and not torch.is_autocast_enabled("cpu")
        and not torch.compiler.is_compiling()
        and not torch._C._are_functorch_transforms_active()
        and forward_ad._current_level < 0
    )


def ready() -> bool:
    """Whether the kernel is there and not switched off; asked last, since it says what is missing.

    Warns:
        KernelWarning: it is not installed; once.
    """
    if _kernel is None and not _off:
        _say_so()
    return _kernel is not None and not _off


def _numbers(t: Tensor) -> bool:
    """Whether its numbers lie in memory as they are: not those of a subclass or a batch of many."""
    plain = type(t) is Tensor or type(t) is nn.Parameter
    return plain and torch._C._has_storage(t) and not t.is_neg()


@cache
def _say_so() -> None:
    warnings.warn(
        "the compiled kernel of Pathline is not installed, so PyTorch does its work, some times "
        "slower; with a C++ compiler at hand, `pip install --force-reinstall --no-deps "
        "--no-cache-dir pathline` builds it",
        KernelWarning,
        stacklevel=5,
    )
