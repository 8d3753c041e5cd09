"""Tables of real numbers in files: read with errors that name the place, written whole."""

import csv
import gzip
import io
import os
import zipfile
import zlib
from array import array
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import numpy as np

from ..errors import DataError, did_you_mean

BLOCK = 65_536  # rows
MISSING = {"", "na", "n/a", "nan", "null", "none"}
BOOLEANS = {"true": 1.0, "false": 0.0}
NUMBERS = "fiub"  # kinds of dtype
ARRAYS = (".npy", ".npz")  # whose columns are all of one type
UNREADABLE = (
    OSError,
    EOFError,
    ValueError,
    OverflowError,
    NotImplementedError,
    csv.Error,
    zlib.error,
    zipfile.BadZipFile,
)


@dataclass(frozen=True, eq=False)
class Table:
    """Rows of real numbers with named columns.

    Args:
        values: (rows, columns), double precision, or a memory-mapped array of single precision.
        columns: one name for each column, all different.
        named: False when the names are made up (x0, x1, ...), since the file has none.
        name: where the table comes from, for errors.
        entries: what the numbers from 0 in the column that was read as text stand for; where they
            are written, in the first column, also whole numbers.

    Raises:
        DataError: `values` is not 2-D, or `columns` are not one distinct name for each column.
    """

    values: np.ndarray
    columns: tuple[str, ...]
    named: bool = True
    name: str = "table"
    entries: tuple[str | int, ...] = ()

    def __post_init__(self) -> None:
        if self.values.ndim != 2:
            hint = "; make a single column with reshape(-1, 1)" if self.values.ndim == 1 else ""
            raise DataError(
                f"{self.name}: expected a 2-D array (rows, columns), got shape "
                f"{self.values.shape}{hint}"
            )
        if self.values.dtype.kind not in NUMBERS:
            raise DataError(f"{self.name} must hold real numbers, got dtype {self.values.dtype}")
        if self.values.shape[1] != len(self.columns):
            raise DataError(
                f"{self.name}: expected one name for each of the {self.values.shape[1]} columns, "
                f"got {len(self.columns)} names"
            )
        twice = [name for name, count in Counter(self.columns).items() if count > 1]
        if twice:
            raise DataError(f"{self.name}: column names must differ, got twice: {listed(twice)}")

    def __len__(self) -> int:
        return len(self.values)

    def select(self, names: Iterable[str], flag: str = "select") -> "Table":
        """The columns `names`, in that order. Raises a DataError for an unknown one."""
        names = tuple(names)
        if names == self.columns:
            return self
        index = [column_index(self.columns, name, flag) for name in names]
        return Table(self.values[:, index], names, self.named, self.name)

    def fitted(self, columns: Iterable[str], named: bool = True) -> "Table":
        """The `columns` of a model, by name, or by position where this table or those of the model
        (`named`) have no names of their own. Raises a DataError where they do not fit."""
        columns = tuple(columns)
        if not (self.named and named) and len(self.columns) == len(columns):
            return Table(self.values, columns, False, self.name)
        return self.select(columns, self.name)

    def drop(self, names: Iterable[str], flag: str = "--drop") -> "Table":
        """All columns but `names`. Raises a DataError for an unknown one."""
        index = {column_index(self.columns, name, flag) for name in names}
        return self.select(name for i, name in enumerate(self.columns) if i not in index)


def column_index(columns: Sequence[str], name: str, flag: str) -> int:
    """The place of `name` among `columns`; `flag` says where the user gave it.

    Raises:
        DataError: there is no such column; the text has the nearest name.
    """
    if name in columns:
        return list(columns).index(name)
    hint = did_you_mean(name, columns) or "."
    raise DataError(f"unknown column {name!r} in {flag}{hint} Columns: {listed(columns)}")


def scales(values: np.ndarray, spread: np.ndarray) -> np.ndarray:
    """The spread of each column of `values`, or 1 where it is 0 up to rounding."""
    return np.where(spread > 1e-12 * np.nanmax(np.abs(values), 0), spread, 1.0)


def default_columns(count: int) -> tuple[str, ...]:
    """Names for columns that have none: x0, x1, ..."""
    return tuple(f"x{i}" for i in range(count))


def listed(names: Sequence[str], most: int = 20) -> str:
    """Names for a message, not too many of them."""
    rest = f", ... ({len(names)} in all)" if len(names) > most else ""
    return ", ".join(names[:most]) + rest


def blocks(values: np.ndarray, size: int = BLOCK) -> Iterator[tuple[int, np.ndarray]]:
    """The first row and the values of each block of rows."""
    for start in range(0, len(values), size):
        yield start, np.asarray(values[start : start + size])


def read_table(path: str | Path, *, text: str | None = None) -> Table:
    """Read a .csv, .csv.gz, .npy, .npz or .parquet file of numbers.

    Missing values become NaN; infinite ones stay. In a csv file, `true` and `false` are 1 and 0,
    blank lines are skipped, and a first row of numbers means that there is no header. A .npy file
    is memory-mapped and keeps single precision, so a large one needs no memory. A .npz file holds
    one 2-D array, or one called `x` and perhaps its `columns`.

    Args:
        path: the file.
        text: a column of a .csv or .parquet file that may hold text; see `read_labelled`.

    Raises:
        DataError: there is no such file, or it is not a table of real numbers. Rows are counted
            from 1, without the header.
    """
    path = Path(path)
    suffix = _suffix(path)
    if path.is_dir():
        raise DataError(f"{path} is a folder, expected a file")
    if not path.exists():
        raise DataError(f"{path} does not exist")
    try:
        if path.stat().st_size == 0:
            raise DataError(f"{path} is empty, expected a table of numbers")
        table = READERS[suffix](path, text)
    except DataError:
        raise
    except UNREADABLE as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise DataError(f"{path} can't be read as {suffix}: {reason}") from None
    if not table.columns:
        raise DataError(f"{path} has no columns")
    if len(table) == 0:
        raise DataError(f"{path} has no rows of data, only columns: {listed(table.columns)}")
    return table


def write_table(
    path: str | Path, table: Table | np.ndarray, columns: Sequence[str] | None = None
) -> None:
    """Write a table in the format that the suffix of `path` names; what is there is replaced.

    The file is whole or not there: it is written beside `path` and then renamed. A csv file reads
    back to the same doubles. A .npy file keeps no names.

    Args:
        table: a Table, or values (rows, columns).
        columns: names for an array, x0, x1, ... if not given.

    Raises:
        DataError: the folder is missing or can't be written, or the suffix is unknown.
    """
    path = Path(path)
    suffix = _suffix(path)
    if isinstance(table, Table) and table.entries and suffix in ARRAYS:
        raise DataError(f"{path}: text needs a .csv or .parquet file")
    if not isinstance(table, Table):
        values = np.asarray(table)
        names = default_columns(values.shape[-1]) if columns is None else tuple(columns)
        table = Table(values, names)
    if not path.parent.is_dir():
        raise DataError(f"{path} can't be written: there is no folder {path.parent}")
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            WRITERS[suffix](file, table)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        raise DataError(f"{path} can't be written: {error.strerror or error}") from None
    finally:
        temporary.unlink(missing_ok=True)


def _suffix(path: Path) -> str:
    for suffix in READERS:
        if path.name.lower().endswith(suffix):
            return suffix
    raise DataError(
        f"{path} has the unknown suffix {path.suffix!r}, expected one of {', '.join(READERS)}"
    )


def _read_csv(path: Path, text: str | None = None) -> Table:
    open_text = gzip.open if path.name.lower().endswith(".gz") else open
    with open_text(path, "rt", encoding="utf-8-sig", newline="") as file:
        reader = csv.reader(file, strict=True, skipinitialspace=True)
        rows = (row for row in reader if row)
        first = next(rows, None)
        if first is None:
            raise DataError(f"{path} is empty, expected a table of numbers")
        if len(first) == 1 and (";" in first[0] or "\t" in first[0]):
            raise DataError(
                f"{path}: the separator must be a comma, got the line {_shown(first[0])}"
            )
        numbers = [_number(cell) for cell in first]
        named = None in numbers or all(np.isnan([n for n in numbers if n is not None]))
        names = _header(path, first) if named else default_columns(len(first))
        values = array("d") if named else array("d", [n for n in numbers if n is not None])
        column = names.index(text) if named and text in names else None
        entries: dict[str, int] = {}
        for row in rows:
            if column is not None and len(row) == len(names):
                row[column] = str(_code(row[column], entries))
            end = len(values)
            try:
                values.extend(map(float, row))
            except ValueError:  # the slow way: missing values, booleans, text
                del values[end:]
                try:
                    values.extend(_cells(row, names, _place(path, end, names, reader.line_num)))
                except DataError:
                    if named and text is not None:
                        column_index(names, text, str(path))  # the likelier mistake
                    raise
            if len(values) - end != len(names):
                raise DataError(
                    f"{_place(path, end, names, reader.line_num)}: expected {len(names)} fields, "
                    f"got {len(row)}"
                )
    cells = np.frombuffer(values).reshape(-1, len(names))
    return Table(cells, names, named, str(path), tuple(entries))


def _code(cell: str | None, entries: dict[str, int]) -> float:
    """The number of an entry, a new one if it is new; NaN where missing."""
    entry = "" if cell is None else cell.strip()
    return np.nan if entry.lower() in MISSING else entries.setdefault(entry, len(entries))


def _place(path: Path, end: int, names: Sequence[str], line: int) -> str:
    return f"{path}, row {end // len(names) + 1} (line {line})"


def _header(path: Path, cells: list[str]) -> tuple[str, ...]:
    names = tuple(cell.strip() for cell in cells)
    if "" in names:
        raise DataError(
            f"{path}: column {names.index('') + 1} has no name in the header; "
            "is it an index that pandas wrote? Leave it out with to_csv(..., index=False)"
        )
    return names


def _cells(row: list[str], names: Sequence[str], place: str) -> Iterator[float]:
    if len(row) != len(names):
        raise DataError(f"{place}: expected {len(names)} fields, got {len(row)}")
    for name, cell in zip(names, row, strict=True):
        value = _number(cell)
        if value is None:
            hint = "; the separator must be a comma" if ";" in cell or "\t" in cell else ""
            raise DataError(
                f"{place}, column {name!r}: expected a number, got {_shown(cell)}{hint}"
            )
        yield value


def _number(cell: str) -> float | None:
    """NaN where missing, None for text."""
    text = cell.strip().lower()
    if text in MISSING:
        return float("nan")
    try:
        return BOOLEANS[text] if text in BOOLEANS else float(text)
    except ValueError:
        return None


def _shown(text: str) -> str:
    return repr(text if len(text) <= 40 else text[:40] + "...")


def _read_npy(path: Path, text: str | None = None) -> Table:
    return _from_array(path, np.lib.format.open_memmap(path, mode="r"))


def _read_npz(path: Path, text: str | None = None) -> Table:
    archive = np.load(path, allow_pickle=False)
    if not isinstance(archive, np.lib.npyio.NpzFile):
        raise DataError(f"{path} can't be read as .npz: it is a single array; call it .npy")
    with archive:
        keys = [key for key in archive.files if key != "columns"]
        key = "x" if "x" in keys else keys[0] if len(keys) == 1 else None
        if key is None:
            raise DataError(
                f"{path} must hold one array, or one called 'x', got {listed(keys) or 'none'}"
            )
        names = archive["columns"] if "columns" in archive.files else None
        values = archive[key]
    if names is None:
        return _from_array(path, values)
    if names.ndim != 1 or names.dtype.kind != "U":
        raise DataError(
            f"{path}: 'columns' must be a 1-D array of names, got {names.dtype} {names.shape}"
        )
    return _from_array(path, values, tuple(names.tolist()))


def _from_array(path: Path, values: np.ndarray, names: tuple[str, ...] | None = None) -> Table:
    native = values.dtype in (np.dtype(np.float32), np.dtype(np.float64))
    if values.dtype.kind in NUMBERS and not native:  # integers, or the other byte order
        values = values.astype(np.float64)
    width = values.shape[1] if values.ndim == 2 else 0
    return Table(values, names or default_columns(width), names is not None, str(path))


def _read_parquet(path: Path, text: str | None = None) -> Table:
    import pyarrow as pa
    import pyarrow.parquet as pq

    file = pq.ParquetFile(path)
    fields = list(file.schema_arrow)
    names = tuple(field.name for field in fields)
    Table(np.empty((0, len(names))), names, name=str(path))  # refuses duplicates
    kinds = ("integer", "floating", "boolean", "decimal", "null")
    is_number = [getattr(pa.types, f"is_{kind}") for kind in kinds]
    other = [f for f in fields if not any(test(f.type) for test in is_number)]
    wrong = [f"{f.name} ({f.type})" for f in other if f.name != text]
    if wrong:
        raise DataError(f"{path}: columns must hold numbers, got {listed(wrong)}")
    content = file.read()
    values = np.empty((content.num_rows, len(names)))
    entries: dict[str, int] = {}
    for i, (field, column) in enumerate(zip(fields, content.columns, strict=True)):
        if field in other:
            cells = column.cast(pa.string()).to_pylist()
            values[:, i] = [_code(cell, entries) for cell in cells]
        else:
            values[:, i] = column.cast(pa.float64(), safe=False).to_numpy()  # null becomes NaN
    return Table(values, names, True, str(path), tuple(entries))


def _write_csv(file: IO[bytes], table: Table) -> None:
    text = io.TextIOWrapper(file, encoding="utf-8", newline="")
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(table.columns)
    for _, block in blocks(table.values):
        rows = block.tolist()
        if table.entries:
            rows = [[table.entries[int(first)], *rest] for first, *rest in rows]
        writer.writerows(rows)
    text.detach()  # flushes, and leaves the file open


def _write_csv_gz(file: IO[bytes], table: Table) -> None:
    with gzip.GzipFile(fileobj=file, mode="wb", filename="", mtime=0) as packed:
        _write_csv(packed, table)  # type: ignore[arg-type]


def _write_npy(file: IO[bytes], table: Table) -> None:
    np.save(file, table.values, allow_pickle=False)


def _write_npz(file: IO[bytes], table: Table) -> None:
    np.savez_compressed(file, x=table.values, columns=np.array(table.columns, dtype=str))


def _write_parquet(file: IO[bytes], table: Table) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    arrays = [pa.array(np.ascontiguousarray(column)) for column in table.values.T]
    if table.entries:
        arrays[0] = pa.array([table.entries[int(code)] for code in table.values[:, 0]])
    pq.write_table(pa.table(arrays, names=list(table.columns)), file)


READERS: dict[str, Callable[[Path, str | None], Table]] = {
    ".csv": _read_csv,
    ".csv.gz": _read_csv,
    ".npy": _read_npy,
    ".npz": _read_npz,
    ".parquet": _read_parquet,
}
WRITERS: dict[str, Callable[[IO[bytes], Table], None]] = {
    ".csv": _write_csv,
    ".csv.gz": _write_csv_gz,
    ".npy": _write_npy,
    ".npz": _write_npz,
    ".parquet": _write_parquet,
}
