"""From a table as the user has it to one that has a density, and the recipe to do it again."""

import math
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np

from ..errors import ArgumentError, DataError, DataWarning
from .tables import Table, blocks, column_index, listed

SAMPLE = 20_000  # rows that the looks for ties and copies take of a larger table
ROUND_OFF = 1e-12  # relative


@dataclass(frozen=True)
class Recipe:
    """What `check_table` did to a table, so that others can be brought to the same columns.

    Args:
        columns: the columns kept, in the model's order.
        original: all columns of the table, in its order.
        named: whether these names come from the file.
        dequantized: column -> width of the uniform noise added to it, its resolution.
        origins: column -> the lowest point of its grid.
        missing: "refuse" or "drop" rows with missing values.
        notes: what the user should know, one sentence each.
    """

    columns: tuple[str, ...]
    original: tuple[str, ...]
    named: bool
    dequantized: dict[str, float]
    origins: dict[str, float]
    missing: str
    notes: tuple[str, ...]

    @classmethod
    def untouched(cls, dim: int, columns: Sequence[str] | None = None) -> "Recipe":
        """That of a table of `dim` columns that needed nothing done to it."""
        names = tuple(columns or (f"x{i}" for i in range(dim)))
        return cls(names, names, columns is not None, {}, {}, "refuse", ())

    @property
    def dropped(self) -> tuple[str, ...]:
        """The columns left out."""
        return tuple(name for name in self.original if name not in self.columns)

    def to_dict(self) -> dict[str, Any]:
        """A JSON-safe copy."""
        return {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(self).items()}

    @classmethod
    def from_dict(cls, content: dict[str, Any]) -> "Recipe":
        """The inverse of `to_dict`. Raises a DataError if entries are missing or unknown."""
        fields: dict[str, Any] = {
            k: tuple(v) if isinstance(v, list) else v for k, v in content.items()
        }
        try:
            return cls(**fields)
        except TypeError as error:
            raise DataError(f"this does not describe the columns of a model: {error}") from None

    def apply(self, table: Table, seed: int = 0) -> Table:
        """Bring another table to the model's columns: to validate with it, or to score it.

        Columns are matched by name, in any order, if both tables have names; else by position,
        with or without the dropped columns. Missing values are treated as in training, and
        dequantized columns get noise of the same width from `seed`.

        Raises:
            DataError: columns are missing or unknown, or values missing or infinite.
        """
        table = self._match(table)
        table, note = _without_missing(table, self.missing)
        if note:
            warnings.warn(f"{table.name}: {note}", DataWarning, stacklevel=2)
        _column_range(table)
        return _spread(table, self.dequantized, seed)

    def restore(self, values: np.ndarray) -> np.ndarray:
        """Samples (rows, columns) with each dequantized column back on its grid."""
        values = np.array(values, dtype=np.float64)
        for name, width in self.dequantized.items():
            column, origin = values[:, self.columns.index(name)], self.origins[name]
            steps = np.floor((column - origin) / width + 1e-9)
            decimals = 6 + max(0, math.ceil(-math.log10(width)))  # 0.3, not 0.30000000000000004
            column[:] = np.round(origin + width * steps, decimals)
        return values

    def _match(self, table: Table) -> Table:
        if self.named and table.named:
            extra = [name for name in table.columns if name not in self.original]
            lost = [name for name in self.columns if name not in table.columns]
            if lost or extra:
                parts = [f"it lacks {listed(lost)}"] * bool(lost)
                parts += [f"the model does not know {listed(extra)}"] * bool(extra)
                raise DataError(
                    f"{table.name} does not fit the model's columns {listed(self.columns)}: "
                    + ", and ".join(parts)
                )
            return table.select(self.columns)
        count = len(table.columns)
        if count == len(self.columns):
            return Table(table.values, self.columns, self.named, table.name)
        if count == len(self.original):
            return Table(table.values, self.original, self.named, table.name).select(self.columns)
        dropped = f" (or {len(self.original)} with those dropped)" if self.dropped else ""
        raise DataError(
            f"{table.name} must have the model's {len(self.columns)} columns{dropped}, got {count}"
        )


def check_table(
    table: Table,
    *,
    dequantize: Iterable[str] = (),
    drop: Iterable[str] = (),
    missing: Literal["refuse", "drop"] = "refuse",
    seed: int = 0,
) -> tuple[Table, Recipe]:
    """Make sure that the rows of a table can have a density; nothing is dropped silently.

    Refused are missing and infinite values, constant columns, copies of columns (equal, or with a
    correlation of one up to 1e-12), and discrete columns: with 100 rows or more, those whose
    commonest value holds over 10 % of the rows, or over 1 % while there are at most 20 distinct
    values or 5 % of the rows; with fewer rows, those with ties and at most 5 distinct values, or
    with one value in over half of the rows. On them a density grows without bound. Other columns
    with ties in over 5 % of the rows, such as measurements with few digits, are noted. In tables
    of over 20,000 rows, ties are counted in that many rows drawn at random.

    Args:
        table: (rows, columns). A memory-mapped one is read in blocks, and returned untouched
            when it needs no change.
        dequantize: columns to which uniform noise in [0, resolution) is added, which turns the
            counts of a discrete column into a density (Uria, Murray, Larochelle, RNADE, 2013).
        drop: columns to leave out.
        missing: whether rows with missing values are refused or dropped.
        seed: of the noise.

    Returns:
        The table, and the recipe that does the same to others.

    Raises:
        DataError: the table is refused, or a column unknown; the text names row and column,
            counted from 1, and what to do.

    Warns:
        DataWarning: there are fewer rows than columns.
    """
    if missing not in ("refuse", "drop"):
        raise ArgumentError(f"`missing` must be 'refuse' or 'drop', got {missing!r}")
    original, table = table, table.drop(drop)
    if not table.columns:
        raise DataError(f"{table.name}: no column is left after --drop")
    spread = [table.columns[column_index(table.columns, n, "--dequantize")] for n in dequantize]
    table, note = _without_missing(table, missing)
    if len(table) < 2:
        raise DataError(f"{table.name}: expected at least 2 rows, got {len(table)}")
    low, high = _column_range(table)
    constant = [name for name, flat in zip(table.columns, low == high, strict=True) if flat]
    if constant:
        raise DataError(
            f"{table.name}: constant columns have no density: {listed(constant)}; "
            f"leave them out with {_flags('--drop', constant)}"
        )
    sample = _sample(table.values)
    _refuse_copies(table, sample)
    ties = _refuse_discrete(table, sample, spread)
    if len(table) < len(table.columns):
        warnings.warn(
            f"{table.name} has fewer rows ({len(table)}) than columns ({len(table.columns)}); "
            "a density will hardly generalise",
            DataWarning,
            stacklevel=2,
        )
    index = {name: table.columns.index(name) for name in table.columns if name in spread}
    recipe = Recipe(
        columns=table.columns,
        original=original.columns,
        named=original.named,
        dequantized={name: resolution(table.values[:, i]) for name, i in index.items()},
        origins={name: float(low[i]) for name, i in index.items()},
        missing=missing,
        notes=(*([note] if note else []), *ties),
    )
    return _spread(table, recipe.dequantized, seed), recipe


def resolution(values: np.ndarray) -> float:
    """The smallest positive difference between distinct values (rows,), 0 if there is none.

    Differences within the round-off of the values don't count, and the result is the shortest
    decimal within it: 0.01, not 0.009999999999990905.
    """
    values = np.unique(values)
    round_off = 4 * float(np.finfo(np.float32).eps) if values.dtype == np.float32 else ROUND_OFF
    values = values.astype(np.float64)
    size = round_off * np.maximum(abs(values[:-1]), abs(values[1:]))
    gaps = np.diff(values)
    real = gaps > size
    if not real.any():
        return float(gaps.min()) if len(gaps) else 0.0
    smallest = int(np.argmin(np.where(real, gaps, np.inf)))
    gap, within = float(gaps[smallest]), float(size[smallest])
    decimals = (float(f"{gap:.{digits}g}") for digits in range(1, 18))
    return next(decimal for decimal in decimals if abs(decimal - gap) <= within)


def _without_missing(table: Table, missing: str) -> tuple[Table, str]:
    """The rows without missing values, and a note if there were others."""
    whole, count = np.ones(len(table), dtype=bool), 0
    for start, block in blocks(table.values):
        lost = np.isnan(block)
        count += int(lost.sum())
        whole[start : start + len(block)] = ~lost.any(1)
    if count == 0:
        return table, ""
    rows = len(whole) - int(whole.sum())
    if missing == "refuse":
        row = int(np.argmin(whole))
        name = table.columns[int(np.argmax(np.isnan(table.values[row])))]
        raise DataError(
            f"{table.name} has {count} missing values in {rows} rows, the first in row {row + 1}, "
            f"column {name!r}; --missing drop leaves such rows out"
        )
    if rows == len(whole):
        raise DataError(f"{table.name}: no row is left, since all have missing values")
    note = f"{rows} of {len(whole)} rows have missing values and were dropped"
    return Table(table.values[whole], table.columns, table.named, table.name), note


def _column_range(table: Table) -> tuple[np.ndarray, np.ndarray]:
    """The least and greatest values of the columns (columns,); infinite ones are refused."""
    low, high = np.full((2, len(table.columns)), np.inf)
    high = -high
    for start, block in blocks(table.values):
        low, high = np.minimum(low, block.min(0)), np.maximum(high, block.max(0))
        if not (np.isfinite(low).all() and np.isfinite(high).all()):
            row, column = np.argwhere(~np.isfinite(block))[0]
            raise DataError(
                f"{table.name} must be finite, got {block[row, column]} in row "
                f"{start + row + 1}, column {table.columns[column]!r}"
            )
    return low, high


def _sample(values: np.ndarray) -> np.ndarray:
    """At most SAMPLE distinct rows, in double precision."""
    if len(values) > SAMPLE:  # at random: a regular stride could fall in with a period
        drawn = np.random.default_rng(0).integers(len(values), size=SAMPLE)
        values = values[np.unique(drawn)]
    return np.asarray(values, dtype=np.float64)


def _refuse_copies(table: Table, sample: np.ndarray) -> None:
    centre = sample.mean(0)
    scaled = sample - centre
    norm = np.sqrt((scaled**2).sum(0))
    scaled /= np.where(norm > 0, norm, 1.0)
    candidates = np.argwhere(np.triu(np.abs(scaled.T @ scaled) > 1 - ROUND_OFF, 1))
    for first, second in candidates.tolist():
        pair = [first, second]
        kind = _relation(table.values, pair, centre[pair])
        if kind:
            one, two = table.columns[first], table.columns[second]
            raise DataError(
                f"{table.name}: columns {one!r} and {two!r} are {kind}, so they have no joint "
                f"density; leave one out with --drop {_quoted(two)}"
            )


def _relation(values: np.ndarray, pair: list[int], centre: np.ndarray) -> str:
    """How two columns that are copies in a sample are related in all rows; "" if they aren't.

    Two rows lie on a line, which says nothing.
    """
    equal, mean, square = True, np.zeros(2), np.zeros((2, 2))
    for _, block in blocks(values):
        x = block[:, pair].astype(np.float64)
        equal = equal and bool((x[:, 0] == x[:, 1]).all())
        x -= centre
        mean += x.sum(0) / len(values)
        square += x.T @ x / len(values)
    covariance = square - np.outer(mean, mean)
    bound = (1 - ROUND_OFF) ** 2 * covariance[0, 0] * covariance[1, 1]
    affine = len(values) > 2 and covariance[0, 1] ** 2 > bound
    return "equal" if equal else "affine copies" if affine else ""


def _refuse_discrete(table: Table, sample: np.ndarray, spread: Sequence[str]) -> list[str]:
    """Notes on ties in columns that will not be dequantized."""
    rows, discrete, notes = len(sample), [], []
    for i, name in enumerate(table.columns):
        if name in spread:
            continue
        distinct, counts = np.unique(sample[:, i], return_counts=True)
        count, share = len(distinct), counts.max() / rows
        width = resolution(distinct.astype(table.values.dtype))
        if _is_discrete(rows, count, share):
            discrete.append((name, f"{name} ({count} distinct values, resolution {width:.6g})"))
        elif count < 0.95 * rows:
            notes.append(
                f"{name} has repeated values at a resolution of {width:.6g}; "
                f"--dequantize {_quoted(name)} would spread them"
            )
    if discrete:
        names = [name for name, _ in discrete]
        raise DataError(
            f"{table.name}: discrete columns have no density: "
            f"{listed([text for _, text in discrete])}; spread them by noise with "
            f"{_flags('--dequantize', names)}, or leave them out with --drop"
        )
    return notes


def _is_discrete(rows: int, distinct: int, share: float) -> bool:
    if rows < 100:
        return distinct < rows and (distinct <= 5 or share > 0.5)
    return share > 0.1 or (share > 0.01 and distinct <= max(20, rows / 20))


def _spread(table: Table, widths: dict[str, float], seed: int) -> Table:
    if not widths:
        return table
    generator = np.random.default_rng(seed)
    values = np.array(table.values, dtype=np.float64)
    for name, width in widths.items():
        values[:, table.columns.index(name)] += width * generator.random(len(values))
    return Table(values, table.columns, table.named, table.name)


def _flags(flag: str, names: Sequence[str]) -> str:
    return listed([f"{flag} {_quoted(name)}" for name in names]).replace(", --", " --")


def _quoted(name: str) -> str:
    return name if name.isidentifier() else repr(name)
