import math
import re

import numpy as np
import pytest

from pathline.data import Table, check_support, parse_support
from pathline.errors import ArgumentError, DataError

COLUMNS = ("height", "share", "a=b")


def test_parse():
    inf = math.inf
    assert parse_support([], COLUMNS) == [(-inf, inf)] * 3
    specs = ["share=[0, 1]", "height=positive", "a=b=(-inf,2e1)"]
    assert parse_support(specs, COLUMNS) == [(0, inf), (0, 1), (-inf, 20)]


@pytest.mark.parametrize("spec", ["share", "share=", "share=0,1", "share=[0;1]", "=[0,1]"])
def test_syntax(spec):
    with pytest.raises(ArgumentError, match="must look like column=positive, column="):
        parse_support([spec], COLUMNS)


@pytest.mark.parametrize("interval", ["[1,1]", "[2,-inf]", "[nan,1]"])
def test_order(interval):
    with pytest.raises(ArgumentError, match="lower bound below the upper"):
        parse_support(["share=" + interval], COLUMNS)


def test_columns():
    with pytest.raises(DataError, match="'shar' in --support; did you mean 'share'"):
        parse_support(["shar=[0,1]"], COLUMNS)
    with pytest.raises(ArgumentError, match="'share' twice"):
        parse_support(["share=[0,1]", "share=positive"], COLUMNS)


@pytest.mark.parametrize(
    "value, advice",
    [(0.0, "widen the support, or --dequantize"), (-0.5, "or correct"), (math.nan, "or correct")],
)
def test_check(value, advice):
    values = np.random.default_rng(0).uniform(0.1, 0.9, size=(70_000, 3))
    table = Table(values, COLUMNS, name="t.csv")
    bounds = parse_support(["share=[0,1]", "height=positive"], COLUMNS)
    check_support(table, bounds)
    values[66_000, 1] = value
    message = f"t.csv, row 66001, column 'share': {value!r} is not inside the support (0, 1); "
    with pytest.raises(DataError, match=re.escape(message)) as raised:
        check_support(table, bounds)
    assert advice in str(raised.value)
