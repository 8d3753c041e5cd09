"""Tables with one column that may hold text: names of groups, or of classes."""

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import numpy as np

from ..errors import DataError
from .tables import ARRAYS, Table, column_index, read_table, write_table


def read_labelled(path: str | Path, name: str, flag: str) -> tuple[Table, np.ndarray]:
    """A table without one of its columns, and that column.

    Args:
        path: as in `read_table`; text must be in a .csv or .parquet file.
        name: of the column.
        flag: where the user named it.

    Returns:
        The table, and (rows,) of the column: whole numbers or numbers if all entries are, so that
        007 and 7 are the same, else text.

    Raises:
        DataError: the file can't be read, or the column is unknown or has missing entries.
    """
    table = read_table(path, text=name)
    values = table.values[:, column_index(table.columns, name, flag)]
    if np.isnan(values).any():
        row = int(np.isnan(values).argmax())
        raise DataError(f"{path}, row {row + 1}: column {name!r} has no value")
    rest = replace(table.drop([name], flag), entries=())
    if not table.entries:
        return rest, _whole(np.asarray(values, dtype=np.float64))
    entries = np.array(table.entries)
    with suppress(ValueError):
        entries = _whole(entries.astype(np.float64))
    return rest, entries[values.astype(np.int64)]


def _whole(values: np.ndarray) -> np.ndarray:
    """As integers, if they are, and so small that doubles tell them apart."""
    if (np.abs(values) < 2**53).all() and (values == values.round()).all():
        return values.astype(np.int64)
    return values


def write_labelled(
    path: str | Path, name: str, labels: np.ndarray, values: np.ndarray, columns: Sequence[str]
) -> None:
    """Write a table whose first column may hold text, or whole numbers that are written as such.

    Args:
        path: as in `write_table`; text needs a .csv or .parquet file. In .npy and .npz files
            whole numbers are floats like the rest.
        name: of the first column.
        labels: (rows,), numbers or text.
        values: (rows, columns).
        columns: their names.

    Raises:
        DataError: as in `write_table`, or text does not fit the format.
    """
    kind = labels.dtype.kind
    if kind == "f" or (kind in "iu" and Path(path).suffix.lower() in ARRAYS):
        numbers = np.column_stack([labels.astype(np.float64), values])
        return write_table(path, numbers, (name, *columns))
    entries, codes = np.unique(labels, return_inverse=True)
    table = Table(np.column_stack([codes.ravel(), values]), (name, *columns))
    write_table(path, replace(table, entries=tuple(entries.tolist())))
