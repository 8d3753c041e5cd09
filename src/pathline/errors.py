"""The error types: each is a `PathlineError` and the builtin that callers already catch."""

import difflib
import math
from collections.abc import Iterable


class PathlineError(Exception):
    """Base of every error that Pathline raises on purpose; its text is for the user."""


class ShapeError(PathlineError, ValueError):
    """A tensor has the wrong shape."""


class DataError(PathlineError, ValueError):
    """A file or an array of data can't be used as it is."""


class ArgumentError(PathlineError, ValueError):
    """An argument or a combination of arguments makes no sense."""


class ModelError(PathlineError, ValueError):
    """A saved model or run can't be read."""


class TrainingError(PathlineError, RuntimeError):
    """Training failed, and what was saved is kept."""


class SolveError(PathlineError, RuntimeError):
    """A solve failed; `solution=True` returns the last good state and the reason instead."""


class DataWarning(UserWarning):
    """The data can be used, but the user should know something about them."""


class KernelWarning(UserWarning):
    """The compiled kernel isn't there; PyTorch does its work."""


class SolveWarning(UserWarning):
    """A solve or its gradient works, but the user should know something about it."""


def require_nonnegative(**numbers: float) -> None:
    """Raise an ArgumentError unless each of the arguments `numbers` is finite and >= 0."""
    for name, number in numbers.items():
        if not (math.isfinite(number) and number >= 0):
            raise ArgumentError(f"`{name}` must be finite and >= 0, got {number!r}")


def unknown(kind: str, name: str, known: Iterable[str]) -> str:
    """The text of an error for a name that is not known, with the nearest one that is."""
    known = list(known)
    return f"unknown {kind} {name!r}{did_you_mean(name, known)} (known: {', '.join(known)})"


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """The words "; did you mean ...?" with the name of `known` that is nearest, or nothing."""
    near = difflib.get_close_matches(name, list(known), n=1)
    return f"; did you mean {near[0]!r}?" if near else ""
