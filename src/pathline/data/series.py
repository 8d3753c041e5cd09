"""Series of observations at irregular times: checked, and one after the other."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from numbers import Real
from typing import Any

import numpy as np

from ..errors import DataError, ShapeError
from .tables import default_columns, listed

NUMBERS = "fiub"  # kinds of dtype
FEWEST = 2  # observations of a series
ONE_KIND = "`groups` must be text or numbers, all of one kind"


@dataclass(frozen=True, eq=False)
class Series:
    """Ragged series, each a run of rows of increasing times; see `Series.of`.

    Args:
        t: (rows,), in the user's units.
        y: (rows, columns), NaN where a value is missing.
        starts: (series + 1,), the first row of each, and the number of rows.
        ids: (series,), what they are called.
        columns: names of the columns of y.
    """

    t: np.ndarray
    y: np.ndarray
    starts: np.ndarray
    ids: np.ndarray
    columns: tuple[str, ...]

    @classmethod
    def of(
        cls,
        t: Any,
        y: Any,
        groups: Any = None,
        *,
        columns: Sequence[str] | None = None,
        fewest: int = FEWEST,
    ) -> "Series":
        """Series from rows of a table.

        Args:
            t: times, (rows,), increasing within each group.
            y: values, (rows,) or (rows, columns); NaN where missing. Rows without any value are
                left out.
            groups: to which series each row belongs, (rows,), text or numbers, all of one kind;
                None if to one. The rows of a group need not follow each other.
            columns: names of the columns of `y`.
            fewest: rows that a series must have.

        Raises:
            ShapeError: the shapes don't fit.
            DataError: a time is not finite, not after the one before it in its group, or there
                twice; a value is infinite; a column or a group has too few values; a group is
                neither text nor a number, or some are text and others numbers.
        """
        t, y = _numbers(t, "t"), _numbers(y, "y")
        y = y[:, None] if y.ndim == 1 else y
        if t.ndim != 1 or y.ndim != 2 or len(y) != len(t):
            raise ShapeError(
                f"`t` must be (rows,) and `y` (rows,) or (rows, columns), got {t.shape}, {y.shape}"
            )
        ids, codes = np.zeros(1, dtype=np.int64), np.zeros(len(t), dtype=np.int64)
        if groups is not None:
            ids, codes = _groups(groups, len(t))
        _check_times(t, codes, ids)
        names = default_columns(y.shape[1]) if columns is None else tuple(columns)
        if np.isinf(y).any():
            row, column = np.argwhere(np.isinf(y))[0]
            raise DataError(f"`y` must not be infinite: row {row + 1}, column {names[column]!r}")
        kept = ~np.isnan(y).all(1)
        t, y, codes = t[kept], y[kept], codes[kept]
        counts = np.bincount(codes, minlength=len(ids))
        few = ids[counts < fewest]
        if len(few) or not len(t):
            named = groups is not None and len(few)
            got = f"fewer in {listed([str(name) for name in few])}" if named else str(len(t))
            raise DataError(f"a series must have at least {fewest} observation(s), got {got}")
        empty = np.isnan(y).all(0)
        if empty.any():
            raise DataError(f"column {names[int(np.argmax(empty))]!r} of `y` has no values")
        order = np.argsort(codes, kind="stable")
        starts = np.concatenate([[0], np.cumsum(counts)])
        return cls(t[order], y[order], starts, ids, names)

    def __len__(self) -> int:
        return len(self.ids)

    def parts(self) -> Iterator[slice]:
        """The rows of each series."""
        return (slice(a, b) for a, b in zip(self.starts[:-1], self.starts[1:], strict=True))

    def gaps(self) -> np.ndarray:
        """Times between neighbouring observations of all series, (rows - series,)."""
        return np.concatenate([np.diff(self.t[part]) for part in self.parts()])

    def place(self, groups: Any, rows: int) -> np.ndarray:
        """The index of the series that each of `rows` rows belongs to; None stands for the only
        one.

        Raises:
            DataError: there is no such series, or several and none is named.
        """
        if groups is None:
            if len(self) > 1:
                raise DataError(f"`groups` must say which of the {len(self)} series is meant")
            return np.zeros(rows, dtype=np.int64)
        names = _names(groups, rows)
        known = {name: i for i, name in enumerate(self.ids.tolist())}
        unknown = [name for name in dict.fromkeys(names.tolist()) if name not in known]
        if unknown:
            called = listed([repr(name) for name in known])
            one = f"the only one is called {called}, and `groups` may be left out"
            raise DataError(
                f"no series is called {unknown[0]!r}; "
                + (one if len(self) == 1 else f"they are called {called}")
            )
        return np.array([known[name] for name in names.tolist()], dtype=np.int64)


def _numbers(values: Any, name: str) -> np.ndarray:
    array = np.asarray(values)
    if array.dtype.kind not in NUMBERS:
        raise DataError(f"`{name}` must hold real numbers, got dtype {array.dtype}")
    return array.astype(np.float64)


def _groups(groups: Any, rows: int) -> tuple[np.ndarray, np.ndarray]:
    """The ids in the order of their first rows, and the index of each row's."""
    names = _names(groups, rows)
    if names.dtype.kind == "f" and np.isnan(names).any():
        raise DataError(f"`groups` must not be missing, row {int(np.isnan(names).argmax()) + 1} is")
    ids, first, codes = np.unique(names, return_index=True, return_inverse=True)
    order = np.argsort(first)
    return ids[order], np.argsort(order)[codes.ravel()]


def _names(groups: Any, rows: int) -> np.ndarray:
    """The groups as an array of text or of numbers."""
    # Of a list as it is, because NumPy makes text of numbers among text.
    names = np.asarray(groups, dtype=None if hasattr(groups, "dtype") else object)
    if names.shape != (rows,):
        raise ShapeError(f"`groups` must be ({rows},), got {names.shape}")
    if names.dtype == object and rows:
        each = names.tolist()
        kind = str if isinstance(each[0], str) else Real
        for row, name in enumerate(each):
            if not isinstance(name, kind):
                raise DataError(f"{ONE_KIND}, got {name!r} in row {row + 1}")
        names = np.array(each)
    if names.dtype.kind not in NUMBERS + "U":
        raise DataError(f"{ONE_KIND}, got dtype {names.dtype}")
    return names


def _check_times(t: np.ndarray, codes: np.ndarray, ids: np.ndarray) -> None:
    """Raise unless the times are finite and increase in each group."""
    if not np.isfinite(t).all():
        row = int(np.argmin(np.isfinite(t)))
        raise DataError(f"`t` must be finite, got {t[row]} in row {row + 1}")
    order = np.argsort(codes, kind="stable")
    later = np.diff(t[order]) > 0
    same = np.diff(codes[order]) == 0
    wrong = np.flatnonzero(same & ~later)
    if len(wrong):
        before, row = order[wrong[0]], order[wrong[0] + 1]
        where = f" of group {ids[codes[row]]!s}" if len(ids) > 1 else ""
        raise DataError(
            f"`t` must increase within a series: {t[row]:.10g} in row {row + 1}{where} comes "
            f"after {t[before]:.10g}"
            + ("; no time may occur twice" if t[row] == t[before] else "; sort the rows by time")
        )
