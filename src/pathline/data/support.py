"""Bounds of columns, such as amounts that are positive, as the user writes them."""

import math
import re
from collections.abc import Iterable, Sequence

import numpy as np

from ..errors import ArgumentError, DataError
from .tables import Table, blocks, column_index

Bounds = tuple[float, float]
FREE: Bounds = (-math.inf, math.inf)
NAMED: dict[str, Bounds] = {"positive": (0.0, math.inf)}
INTERVAL = re.compile(r"[\[(]\s*([^,\s]+)\s*,\s*([^,\s]+)\s*[\])]")


def parse_support(specs: Iterable[str], columns: Sequence[str]) -> list[Bounds]:
    """Bounds (lower, upper) of each of `columns`, infinite where free.

    Args:
        specs: "column=positive", or "column=[lower,upper]" with `inf` or `-inf` for a free end.
            Square and round brackets mean the same, since no value may lie on a bound.

    Raises:
        DataError: a column is unknown.
        ArgumentError: a text can't be read, a column comes twice, or lower >= upper.

    Example:
        >>> parse_support(["b=[0,1]"], ["a", "b"])
        [(-inf, inf), (0.0, 1.0)]
    """
    bounds: dict[int, Bounds] = {}
    for spec in specs:
        name, _, interval = (part.strip() for part in spec.rpartition("="))
        if not name:
            raise _syntax(spec)
        column = column_index(columns, name, "--support")
        if column in bounds:
            raise ArgumentError(f"--support gives the column {name!r} twice")
        lower, upper = NAMED.get(interval) or _interval(spec, interval)
        if not lower < upper:
            raise ArgumentError(
                f"--support {spec!r} must have a lower bound below the upper one, "
                f"got {lower:g} and {upper:g}"
            )
        bounds[column] = (lower, upper)
    return [bounds.get(column, FREE) for column in range(len(columns))]


def _interval(spec: str, text: str) -> Bounds:
    match = INTERVAL.fullmatch(text)
    if match is None:
        raise _syntax(spec)
    try:
        return float(match[1]), float(match[2])
    except ValueError:
        raise _syntax(spec) from None


def _syntax(spec: str) -> ArgumentError:
    return ArgumentError(
        f"--support must look like column=positive, column=[0,1] or column=[2,inf), got {spec!r}"
    )


def check_support(table: Table, bounds: Sequence[Bounds]) -> None:
    """Make sure that all values lie strictly within the bounds of their columns.

    Args:
        table: (rows, columns).
        bounds: (lower, upper) of each column.

    Raises:
        DataError: a value lies on or outside its bounds; rows are counted from 1.
    """
    lower, upper = np.array(bounds, dtype=np.float64).reshape(-1, 2).T
    for start, block in blocks(table.values):
        outside = ~((block > lower) & (block < upper))
        if not outside.any():
            continue
        row, column = np.argwhere(outside)[0].tolist()
        value, ends = float(block[row, column]), bounds[column]
        advice = (
            "a value on the bound lies infinitely far out: widen the support, or --dequantize "
            "the column if its values are rounded"
            if value in ends
            else "widen the support or correct the value"
        )
        raise DataError(
            f"{table.name}, row {start + row + 1}, column {table.columns[column]!r}: {value!r} is "
            f"not inside the support ({ends[0]:g}, {ends[1]:g}); {advice}"
        )
