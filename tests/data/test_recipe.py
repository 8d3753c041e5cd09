import json
import re

import numpy as np
import pytest

from pathline.data import Recipe, Table, check_table, resolution, write_table
from pathline.data import read_table as read
from pathline.errors import ArgumentError, DataError, DataWarning


def refused(text):
    return pytest.raises(DataError, match=re.escape(text))


def table(rows=1000, **columns):
    """Two continuous columns, and those given."""
    rng = np.random.default_rng(1)
    content = {"a": rng.normal(size=rows), "b": rng.normal(size=rows), **columns}
    return Table(np.stack(list(content.values()), 1).astype(float), tuple(content))


def rng_integers(high, rows=1000, seed=2):
    return np.random.default_rng(seed).integers(0, high, rows)


def test_clean_table_is_untouched():
    t = table()
    out, recipe = check_table(t)
    assert out is t
    assert (recipe.columns, recipe.dropped, recipe.dequantized) == (("a", "b"), (), {})
    assert recipe.notes == ()
    assert recipe.apply(t) is t


def test_memory_map_is_untouched(tmp_path):
    np.save(tmp_path / "t.npy", np.random.default_rng(0).normal(size=(100_000, 3)).astype("f4"))
    t = read(tmp_path / "t.npy")
    out, recipe = check_table(t)
    assert out.values is t.values
    assert recipe.apply(t).values is t.values
    assert recipe.notes == ()


def test_missing():
    t = table()
    t.values[4, 1] = t.values[6, 0] = t.values[6, 1] = np.nan
    with refused("table has 3 missing values in 2 rows, the first in row 5, column 'b'; --missing"):
        check_table(t)
    out, recipe = check_table(t, missing="drop")
    assert recipe.notes == ("2 of 1000 rows have missing values and were dropped",)
    assert np.array_equal(out.values, np.delete(t.values, [4, 6], 0))
    with pytest.warns(DataWarning, match="2 of 1000 rows"):
        assert len(recipe.apply(t)) == 998
    t.values[:, 0] = np.nan
    with refused("no row is left"):
        check_table(t, missing="drop")
    assert check_table(t, drop=["a"], missing="drop")[1].dropped == ("a",)
    with pytest.raises(ArgumentError, match="`missing` must be"):
        check_table(t, missing="keep")


def test_infinite_values():
    t = table(70_000)
    t.values[69_000, 1] = -np.inf
    with refused("must be finite, got -inf in row 69001, column 'b'"):
        check_table(t)


def test_few_rows():
    with refused("expected at least 2 rows, got 1"):
        check_table(table(1))
    with pytest.warns(DataWarning, match=r"fewer rows \(2\) than columns \(3\)"):
        check_table(Table(np.random.default_rng(0).normal(size=(2, 3)), ("a", "b", "c")))
    with refused("no column is left"):
        check_table(table(), drop=["a", "b"])


def test_constant_columns():
    with refused(
        "constant columns have no density: c, d e; leave them out with --drop c --drop 'd"
    ):
        check_table(table(**{"c": np.ones(1000), "d e": np.zeros(1000)}))


def test_copies():
    t = table()
    a = t.values[:, 0]
    with refused("columns 'a' and 'c' are equal, so they have no joint density; leave one out"):
        check_table(table(c=a))
    with refused("columns 'a' and 'c' are affine copies"):
        check_table(table(c=1e6 - 0.3 * a))
    check_table(table(c=a + 1e-5 * np.random.default_rng(3).normal(size=1000)))


def test_copies_must_hold_in_all_rows():
    t = table(60_000)
    c = 2 * t.values[:, 0]
    with refused("affine copies"):
        check_table(table(60_000, c=c))
    seen = np.unique(np.random.default_rng(0).integers(60_000, size=20_000))
    unseen = np.setdiff1d(np.arange(60_000), seen)
    c[unseen] += np.random.default_rng(3).normal(size=len(unseen))
    check_table(table(60_000, c=c))


@pytest.mark.parametrize(
    "column",
    [
        rng_integers(2),
        rng_integers(3) / 10,
        rng_integers(20),
        np.round(np.random.default_rng(0).normal(30, 8, 1000)),  # ages
        np.maximum(np.random.default_rng(0).normal(1, 1, 1000), 0),  # 16 % zeros
    ],
)
def test_discrete_columns(column):
    with refused("discrete columns have no density: c (") as raised:
        check_table(table(c=column))
    assert "--dequantize c," in str(raised.value)
    assert f"resolution {resolution(column):.6g})" in str(raised.value)
    out, recipe = check_table(table(c=column), dequantize=["c"])
    noise = out.values[:, 2] - column
    assert (noise >= 0).all()
    assert (noise < recipe.dequantized["c"]).all()
    assert len(np.unique(noise)) > 990
    assert check_table(table(c=column), drop=["c"])[1].columns == ("a", "b")


def test_rounded_columns_are_noted():
    voltage = np.round(np.random.default_rng(0).normal(240, 3, 20_000), 2)
    out, recipe = check_table(table(20_000, voltage=voltage))
    assert recipe.notes == (
        "voltage has repeated values at a resolution of 0.01; "
        "--dequantize voltage would spread them",
    )
    assert np.array_equal(out.values[:, 2], voltage)


def test_small_tables():
    with refused("discrete columns"):
        check_table(table(30, c=rng_integers(5, 30)))
    with refused("discrete columns"):
        check_table(table(30, c=np.where(np.arange(30) < 20, 0, np.arange(30))))
    assert check_table(table(30, c=rng_integers(25, 30)))[1].notes
    check_table(table(4))


def test_large_tables_with_a_period():
    minute = np.arange(200_000) % 1440
    assert check_table(table(200_000, minute=minute))[1].notes


def test_seed():
    t = table(c=rng_integers(3))
    one, two, three = (check_table(t, dequantize=["c"], seed=s)[0].values for s in (0, 0, 1))
    assert np.array_equal(one, two)
    assert not np.array_equal(one, three)
    assert np.array_equal(check_table(t, dequantize=["c"])[1].apply(t).values, one)


@pytest.mark.parametrize("width", [1.0, 0.01, 0.5, 6.89476e-4, 12.25, 1e-8])
def test_restore_inverts_the_noise(width):
    grid = np.round(-7.3 * width + width * rng_integers(30), 14)
    t = table(c=grid)
    out, recipe = check_table(t, dequantize=["c"])
    assert recipe.dequantized["c"] == pytest.approx(width, rel=1e-6)
    restored = recipe.restore(out.values)
    assert np.array_equal(restored[:, :2], t.values[:, :2])
    assert np.allclose(restored[:, 2], grid, rtol=1e-9, atol=1e-6 * width)
    assert np.array_equal(recipe.restore(restored), restored)


def test_restore_gives_short_decimals():
    grid = rng_integers(10) / 10
    out, recipe = check_table(table(c=grid), dequantize=["c"])
    assert np.array_equal(recipe.restore(out.values)[:, 2], grid)


def test_unknown_columns():
    with refused("unknown column 'aa' in --drop; did you mean 'a'?"):
        check_table(table(), drop=["aa"])
    with refused("unknown column 'zz' in --dequantize. Columns: a, b"):
        check_table(table(), dequantize=["zz"])


def test_dict():
    t = table(c=rng_integers(3), d=rng_integers(5))
    recipe = check_table(t, dequantize=["c"], drop=["d"])[1]
    assert Recipe.from_dict(json.loads(json.dumps(recipe.to_dict()))) == recipe
    with refused("does not describe the columns"):
        Recipe.from_dict({"columns": []})


def test_apply_by_name():
    t = table(c=rng_integers(3), d=rng_integers(5))
    out, recipe = check_table(t, dequantize=["c"], drop=["d"])
    for names in ("dcba", "bca"):
        other = recipe.apply(t.select(names))
        assert other.columns == ("a", "b", "c")
        assert np.array_equal(other.values, out.values)
    with refused("does not fit the model's columns a, b, c: it lacks b"):
        recipe.apply(t.select("ac"))
    with refused("it lacks c, and the model does not know z"):
        recipe.apply(Table(t.values, ("a", "b", "z", "d")))
    t.values[2, 0] = np.nan
    with refused("1 missing values in 1 rows, the first in row 3, column 'a'"):
        recipe.apply(t)
    t.values[2, 0] = np.inf
    with refused("must be finite"):
        recipe.apply(t)


def test_apply_by_position():
    t = table(c=rng_integers(3), d=rng_integers(5))
    out, recipe = check_table(t, dequantize=["c"], drop=["d"])
    for width in (3, 4):
        unnamed = Table(t.values[:, :width], ("x0", "x1", "x2", "x3")[:width], named=False)
        assert np.array_equal(recipe.apply(unnamed).values, out.values)
    with refused("must have the model's 3 columns (or 4 with those dropped), got 2"):
        recipe.apply(Table(t.values[:, :2], ("x0", "x1"), named=False))
    unnamed = check_table(Table(t.values[:, :2], ("x0", "x1"), named=False))[1]
    assert unnamed.apply(t.select("ab")).columns == ("x0", "x1")


def test_errors_name_the_file(tmp_path):
    write_table(tmp_path / "bad.csv", table(c=rng_integers(2)))
    with refused("bad.csv: discrete columns"):
        check_table(read(tmp_path / "bad.csv"))


@pytest.mark.parametrize(
    "values, want",
    [
        ([1, 2, 5], 1),
        ([0.1 + 0.2, 0.3, 0.4], 0.1),
        ([234.84, 234.83, 250.0], 0.01),
        (np.float32([234.84, 234.83, 250.0]), 0.01),
        ([0.00784, 0.00847], 0.00063),
        ([-1e300, 1e-300, 1e300], 1e300),
        ([3, 3], 0),
        ([3, 3 + 1e-15], pytest.approx(1e-15, rel=0.2)),
    ],
)
def test_resolution(values, want):
    assert resolution(np.asarray(values)) == want
