"""Small tables of the UCI machine learning repository."""

import os
from importlib.resources import as_file
from pathlib import Path

import numpy as np

from ..errors import DataError
from .recipe import resolution
from .splits import Splits, shipped, shuffle_split
from .tables import Table, listed, read_table

WINE = (
    "Cortez, Cerdeira, Almeida, Matos, Reis, Modeling wine preferences by data mining from "
    "physicochemical properties, 2009; UCI Wine Quality, CC BY 4.0"
)
SOURCES = {
    "concrete": "Yeh, Modeling of strength of high-performance concrete using artificial neural "
    "networks, 1998; UCI Concrete Compressive Strength, CC BY 4.0",
    "energy": "Tsanas, Xifara, Accurate quantitative estimation of energy performance of "
    "residential buildings, 2012; UCI Energy Efficiency, CC BY 4.0",
    "parkinsons": "Tsanas, Little, McSharry, Ramig, Accurate telemonitoring of Parkinson's "
    "disease progression by noninvasive speech tests, 2010; UCI Parkinsons Telemonitoring, "
    "CC BY 4.0",
    "wine_red": WINE,
    "wine_white": WINE,
    "yacht": "Gerritsma, Onnink, Versluis, Geometry, resistance and stability of the Delft "
    "systematic yacht hull series, 1981; UCI Yacht Hydrodynamics, CC BY 4.0",
}
SHIPPED = ("concrete", "parkinsons", "wine_red", "wine_white")


def load_uci(name: str) -> Splits:
    """A UCI table, made fit for densities, in shuffled parts of 80, 10 and 10 %.

    First, rows that repeat an earlier one are left out, so that none is in two parts. Then each
    column with ties gets uniform noise in [0, resolution) from one fixed seed: without it a flow
    could gain any likelihood on the ties. The noise is part of the data, the same for all models.

    Args:
        name: concrete, parkinsons, wine_red or wine_white, which come with the package, or energy
            or yacht. A file `uci_cotflow/<name>.csv.gz` in the folder that the environment
            variable PATHLINE_DATA names has precedence.

    Raises:
        DataError: the name is unknown, or the table is not there.
    """
    if name not in SOURCES:
        raise DataError(f"unknown UCI table {name!r}, expected one of {listed(sorted(SOURCES))}")
    table = _read(name)
    train, validation, test = shuffle_split(_untie(_distinct_rows(table.values)))
    return Splits(name, train, validation, test, table.columns, SOURCES[name])


def _read(name: str) -> Table:
    folder = os.environ.get("PATHLINE_DATA")
    path = Path(folder or ".") / "uci_cotflow" / f"{name}.csv.gz"
    if folder and path.exists():
        return read_table(path)
    if name in SHIPPED:
        with as_file(shipped(f"{name}.csv.gz")) as path:
            return read_table(path)
    found = f"there is no {path}" if folder else "PATHLINE_DATA is not set"
    raise DataError(
        f"the UCI table {name!r} does not come with Pathline, and {found}; set the environment "
        f"variable PATHLINE_DATA to a folder that holds uci_cotflow/{name}.csv.gz, the table of "
        "the UCI repository with one line of column names"
    )


def _distinct_rows(values: np.ndarray) -> np.ndarray:
    _, first = np.unique(values, axis=0, return_index=True)
    return values[np.sort(first)]


def _untie(values: np.ndarray, seed: int = 0) -> np.ndarray:
    """`values` (rows, columns) with noise on the columns that repeat values."""
    generator = np.random.default_rng(seed)
    spread = values.copy()
    for column in spread.T:
        if len(np.unique(column)) < len(column):
            column += resolution(column) * generator.random(len(column))
    return spread
