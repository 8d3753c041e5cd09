"""Pairs of parameters and data in files: simulations, and tables with some columns as targets."""

import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np

from ..errors import ArgumentError, DataError, DataWarning
from .recipe import Recipe, check_table
from .tables import NUMBERS, UNREADABLE, Table, column_index, listed, read_table

THETA, DATA = "theta", "x"  # names of the arrays in a file


@dataclass(frozen=True)
class PairRecipe:
    """What `check_pairs` did to a table of pairs, so that others get the same columns.

    Args:
        recipe: of the whole table; its columns are those of the parameters, then those of the data.
        parameters: the columns of the original table that are parameters, kept or not.
    """

    recipe: Recipe
    parameters: tuple[str, ...]

    @classmethod
    def untouched(cls, dim: int, context_dim: int) -> "PairRecipe":
        """That of pairs without names that needed nothing done to them."""
        names = _numbered(THETA, dim)
        recipe = Recipe.untouched(dim + context_dim, [*names, *_numbered(DATA, context_dim)])
        return cls(replace(recipe, named=False), names)

    def metadata(self) -> dict[str, Any]:
        """JSON-safe entries to keep with a model."""
        return {"recipe": self.recipe.to_dict(), "parameters": list(self.parameters)}

    @classmethod
    def from_metadata(cls, content: dict[str, Any]) -> "PairRecipe":
        """The inverse of `metadata`."""
        return cls(Recipe.from_dict(content["recipe"]), tuple(content["parameters"]))

    @property
    def names(self) -> tuple[str, ...]:
        """Of the parameters."""
        return tuple(name for name in self.recipe.columns if name in self.parameters)

    @property
    def data_names(self) -> tuple[str, ...]:
        """Of the columns of the data."""
        return self.recipe.columns[len(self.names) :]

    def pairs(self, path: str | Path, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
        """The pairs of another file: parameters (rows, dim) and data (rows, context_dim).

        Columns are matched by name where the file has all of them, else by position, with or
        without those that were dropped. Missing values are treated as in training.

        Raises:
            DataError: columns are missing or unknown, or values missing or infinite.
        """
        table, told = read_pairs(path)
        recipe, dim = self.recipe, len(self.names)
        if told and len(told) not in (dim, len(self.parameters)):
            raise DataError(
                f"{table.name} must have the model's {dim} parameters in {THETA!r}, got {len(told)}"
            )
        if set(recipe.columns) <= set(table.columns):
            table = replace(table.select(recipe.columns), named=recipe.named)
        elif not (recipe.named and table.named) and len(table.columns) == len(recipe.original):
            # The order of the original table; two arrays are in that of their names.
            order = recipe.original
            if told:
                order = (*self.parameters, *(n for n in order if n not in self.parameters))
            table = Table(table.values, order, recipe.named, table.name).select(recipe.columns)
        values = recipe.apply(table, seed).values
        return np.array(values[:, :dim]), np.array(values[:, dim:])

    def observations(self, path: str | Path) -> np.ndarray:
        """The observations in a file, (rows, context_dim): one in each row.

        Columns are matched by name, in any order, where the file has names of the training data,
        else by position. Columns of parameters are left out. A .npz or netCDF file holds them in
        `x`; a 1-D array is one observation.

        Raises:
            DataError: the wrong number of columns, or values missing or infinite.
        """
        data = self.data_names
        original = tuple(name for name in self.recipe.original if name not in self.parameters)
        recipe = Recipe(data, original, self.recipe.named, {}, {}, "refuse", ())
        table = _read_observations(Path(path), len(data))
        if recipe.named and table.named:
            table = table.drop(name for name in self.parameters if name in table.columns)
            if not set(table.columns) & set(original):
                warnings.warn(
                    f"{table.name}: no column has a name of the training data "
                    f"({listed(data)}), so they are taken by position",
                    DataWarning,
                    stacklevel=2,
                )
                table = replace(table, named=False)
        return recipe.apply(table).values


def read_pairs(path: str | Path) -> tuple[Table, tuple[str, ...]]:
    """Read pairs as one table, and the names of those columns that the file says are parameters.

    A .npz file holds the arrays `theta` (rows, dim) and `x` (rows, context_dim), and perhaps their
    names in `theta_columns` and `x_columns`; a netCDF file (.nc) the variables `theta` and `x`,
    named by the coordinates of their second dimension. Other files are read by `read_table`, and
    don't say which columns are parameters.

    Infinite values become NaN: a simulation that overflowed has failed.

    Raises:
        ArgumentError: xarray is not installed, and the file is netCDF.
        DataError: there is no such file, or it does not hold pairs of real numbers.
    """
    path = Path(path)
    arrays = _read_arrays(path)
    told: tuple[str, ...] = ()
    if THETA not in arrays and path.suffix.lower() != ".nc":
        table = read_table(path)
    else:
        if not {THETA, DATA} <= arrays.keys():
            raise DataError(
                f"{path} must hold {THETA!r} and {DATA!r}, got only {listed([*arrays])}"
            )
        theta, data = _table(path, arrays, THETA), _table(path, arrays, DATA)
        if len(theta) != len(data):
            raise DataError(
                f"{path}: {THETA!r} and {DATA!r} must have as many rows, got {len(theta)} and "
                f"{len(data)}"
            )
        told = theta.columns
        values = np.column_stack([theta.values, data.values])
        table = Table(values, (*told, *data.columns), data.named, str(path))
    if not len(table):
        raise DataError(f"{path} has no rows of data")
    if np.isinf(table.values).any():
        values = np.where(np.isinf(table.values), np.nan, table.values)
        table = replace(table, values=values)
    return table, told


def choose_columns(
    table: Table,
    told: Sequence[str],
    parameters: Sequence[str],
    data: Sequence[str],
    flags: tuple[str, str] = ("--parameters", "--data"),
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Which columns are parameters, and which data: as the file tells, or as the user says.

    Args:
        table, told: as `read_pairs` gives them.
        parameters: of a file that doesn't tell.
        data: all other columns if empty.
        flags: where the user gave `parameters` and `data`.

    Raises:
        ArgumentError: nobody says, both do, or a column is both.
        DataError: a column is unknown, or none is left.
    """
    if told:
        if parameters or data:
            raise ArgumentError(
                f"{table.name} says itself what its parameters and data are; {flags[0]} and "
                f"{flags[1]} are for other tables, and --drop leaves columns out"
            )
        return tuple(told), tuple(name for name in table.columns if name not in told)
    if not parameters:
        raise ArgumentError(
            f"{table.name} has no arrays {THETA!r} and {DATA!r}; say with {flags[0]} which of its "
            f"columns are parameters: {listed(table.columns)}"
        )
    for flag, names in zip(flags, (parameters, data), strict=True):
        for name in names:
            column_index(table.columns, name, flag)
    both = [name for name in data if name in parameters]
    if both:
        raise ArgumentError(f"a column can't be in {flags[0]} and in {flags[1]}: {listed(both)}")
    parameters = tuple(dict.fromkeys(parameters))
    rest = tuple(dict.fromkeys(data)) or tuple(n for n in table.columns if n not in parameters)
    if not rest:
        raise DataError(f"{table.name}: no column is left for the data, all are in {flags[0]}")
    return parameters, rest


def check_pairs(
    table: Table,
    parameters: Sequence[str],
    data: Sequence[str],
    *,
    dequantize: Iterable[str] = (),
    drop: Iterable[str] = (),
    missing: Literal["refuse", "drop"] = "refuse",
    seed: int = 0,
) -> tuple[Table, PairRecipe]:
    """Make sure that the parameters can have a density given the data.

    Args:
        table: with the columns `parameters` and `data`.
        dequantize, drop, missing, seed: as in `check_table`, which is applied to the parameters.

    Returns:
        The table with the columns of the parameters, then of the data, and the recipe that does
        the same to others.

    Raises:
        DataError: missing values where they are refused, or parameters without a density.

    Warns:
        DataWarning: rows were dropped, or columns of the data are constant.
    """
    out = {table.columns[column_index(table.columns, name, "--drop")] for name in drop}
    kept = tuple(name for name in parameters if name not in out)
    given = tuple(name for name in data if name not in out)
    if not kept or not given:
        raise DataError(f"{table.name}: no column of the parameters or data is left after --drop")
    dequantize = list(dequantize)
    for name in dequantize:
        column_index(kept, name, "--dequantize")
    recipe = Recipe((*kept, *given), table.columns, table.named, {}, {}, missing, ())
    table = recipe.apply(table.select(recipe.columns))
    theta, own = check_table(table.select(kept), dequantize=dequantize, seed=seed)
    context = table.select(given).values
    constant = [n for n, flat in zip(given, context.min(0) == context.max(0), strict=True) if flat]
    if constant:
        warnings.warn(
            f"{table.name}: constant columns of the data say nothing about the parameters: "
            f"{listed(constant)}",
            DataWarning,
            stacklevel=2,
        )
    recipe = replace(recipe, dequantized=own.dequantized, origins=own.origins, notes=own.notes)
    values = np.column_stack([theta.values, context])
    return replace(table, values=values), PairRecipe(recipe, tuple(parameters))


def _numbered(stem: str, count: int) -> tuple[str, ...]:
    return tuple(f"{stem}{i}" for i in range(count))


def _read_arrays(path: Path) -> dict[str, np.ndarray]:
    """The arrays of a .npz or netCDF file that this module knows, none of other files."""
    if path.suffix.lower() == ".nc":
        return _read_netcdf(path)
    if path.suffix.lower() != ".npz" or not path.is_file():
        return {}
    known = [f"{name}{end}" for name in (THETA, DATA) for end in ("", "_columns")]
    try:
        with path.open("rb") as file:
            archive = np.load(file, allow_pickle=False)
            if not isinstance(archive, np.lib.npyio.NpzFile):
                return {}
            return {key: archive[key] for key in known if key in archive.files}
    except UNREADABLE as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise DataError(f"{path} can't be read as .npz: {reason}") from None


def _read_netcdf(path: Path) -> dict[str, np.ndarray]:
    try:
        import xarray
    except ImportError:
        raise ArgumentError("netCDF files need xarray; pip install 'pathline[posterior]'") from None
    if not path.is_file():
        raise DataError(f"{path} does not exist")
    arrays = {}
    try:
        with xarray.open_dataset(path) as content:
            for name in (THETA, DATA):
                if name not in content.data_vars:
                    continue
                variable = content[name]
                arrays[name] = np.asarray(variable.values)
                last = variable.dims[-1] if variable.ndim == 2 else None
                if last in variable.coords and variable.coords[last].dtype.kind in "UOT":
                    names = [str(label) for label in variable.coords[last].values]
                    arrays[f"{name}_columns"] = np.array(names)
    except UNREADABLE as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise DataError(f"{path} can't be read as netCDF: {reason}") from None
    if DATA not in arrays:
        raise DataError(f"{path} must hold the variables {THETA!r} and {DATA!r}")
    return arrays


def _table(path: Path, arrays: dict[str, np.ndarray], key: str) -> Table:
    """One of the arrays as a table; a 1-D one is one column."""
    values, names = arrays[key], arrays.get(f"{key}_columns")
    if values.ndim == 1:
        values = values[:, None]
    if values.ndim != 2:
        raise DataError(
            f"{path}: {key!r} must be (rows, columns), got shape {values.shape}; flatten it with "
            f"reshape(len({key}), -1)"
        )
    if values.dtype.kind not in NUMBERS:
        raise DataError(f"{path}: {key!r} must hold real numbers, got dtype {values.dtype}")
    if names is not None and (names.ndim != 1 or names.dtype.kind != "U"):
        raise DataError(
            f"{path}: '{key}_columns' must be a 1-D array of names, got {names.dtype} {names.shape}"
        )
    columns = _numbered(key, values.shape[1]) if names is None else tuple(names.tolist())
    return Table(values.astype(np.float64), columns, names is not None, str(path))


def _read_observations(path: Path, count: int) -> Table:
    """A table of observations of `count` columns."""
    arrays = _read_arrays(path)
    if path.suffix.lower() == ".npy" and path.is_file():
        try:
            values = np.load(path, allow_pickle=False)
        except UNREADABLE:
            return read_table(path)  # says what is wrong with it
        if values.ndim == 1:
            arrays = {DATA: values}
    if DATA not in arrays:
        return read_table(path)
    values = arrays[DATA]
    if values.ndim == 1:
        arrays |= {DATA: values[None] if count > 1 else values}
    elif path.suffix.lower() == ".npz" and not {THETA, f"{DATA}_columns"} & arrays.keys():
        return read_table(path)  # which knows the names of a single table
    return _table(path, arrays, DATA)
