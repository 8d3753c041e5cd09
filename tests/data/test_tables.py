import gzip
import re

import numpy as np
import pytest

from pathline.data import Table, column_index, read_table, write_table
from pathline.errors import DataError

SUFFIXES = [".csv", ".csv.gz", ".npy", ".npz", ".parquet"]


def refused(text):
    return pytest.raises(DataError, match=re.escape(text))


@pytest.fixture
def csv(tmp_path):
    def write(text, name="t.csv", encoding="utf-8"):
        path = tmp_path / name
        path.write_bytes(text.encode(encoding))
        return path

    return write


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_round_trip(tmp_path, suffix):
    values = np.random.default_rng(0).normal(size=(70_000, 2)) * [1e-300, 1e300]
    values[3, 1], values[4, 0], values[5] = np.nan, np.inf, [0.1 + 0.2, -0.0]
    path = tmp_path / f"t{suffix}"
    write_table(path, Table(values, ("a, b", 'é "q"')))
    table = read_table(path)
    assert np.array_equal(table.values.view(np.int64) | 0, values.view(np.int64), equal_nan=True)
    assert table.named == (suffix != ".npy")
    assert table.columns == (("x0", "x1") if suffix == ".npy" else ("a, b", 'é "q"'))
    assert [p.name for p in tmp_path.iterdir()] == [path.name]  # no temporary file stays


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_write_replaces_and_names_arrays(tmp_path, suffix):
    path = tmp_path / f"t{suffix}"
    write_table(path, np.zeros((5, 3)))
    write_table(path, np.ones((2, 2), dtype=np.float32), ["u", "v"])
    table = read_table(str(path))
    assert len(table) == 2
    assert np.array_equal(table.values, np.ones((2, 2)))


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_write_refuses(tmp_path, suffix):
    with refused("there is no folder"):
        write_table(tmp_path / "none" / f"t{suffix}", np.ones((2, 2)))
    (tmp_path / f"d{suffix}").mkdir()
    with refused("can't be written"):
        write_table(tmp_path / f"d{suffix}", np.ones((2, 2)))
    with refused("expected one name for each of the 2 columns, got 1"):
        write_table(tmp_path / f"t{suffix}", np.ones((2, 2)), ["a"])
    assert [p.name for p in tmp_path.iterdir()] == [f"d{suffix}"]


def test_csv_dialects(csv):
    want = [[1.0, 2.5], [-3e-2, 4.0]]
    texts = [
        "a,b\n1,2.5\n-3e-2,4\n",
        '"a", "b"\r\n1, 2.5\r\n-0.03 ,"4"\r\n',
        "\ufeffa,b\n\n1,2.5\n\n-3e-2,4",
        " a , b \n1,2.5\n-3e-2,4\n",
    ]
    for text in texts:
        table = read_table(csv(text))
        assert (table.columns, table.named) == (("a", "b"), True)
        assert np.array_equal(table.values, want)
    table = read_table(csv("1,2.5\n-3e-2,4\n"))
    assert (table.columns, table.named) == (("x0", "x1"), False)
    assert np.array_equal(table.values, want)


def test_csv_missing_and_booleans(csv):
    table = read_table(csv("a,b,c\n1,,NA\nnan,True,inf\nNaN,false,-Infinity\n"))
    want = [[1, np.nan, np.nan], [np.nan, 1, np.inf], [np.nan, 0, -np.inf]]
    assert np.array_equal(table.values, want, equal_nan=True)
    table = read_table(csv("1,,3\n4,5,6\n"))
    assert not table.named
    assert np.array_equal(table.values, [[1, np.nan, 3], [4, 5, 6]], equal_nan=True)


@pytest.mark.parametrize(
    "text, message",
    [
        ("a,b\n1,2\n3,x7\n", "row 2 (line 3), column 'b': expected a number, got 'x7'"),
        ("1,2\n\n3,x7\n", "row 2 (line 3), column 'x1': expected a number, got 'x7'"),
        ("a,b\n1,2\n3\n", "row 2 (line 3): expected 2 fields, got 1"),
        ("a,b\n1,2,3\n", "row 1 (line 2): expected 2 fields, got 3"),
        ("a,b\n1,NA,3\n", "row 1 (line 2): expected 2 fields, got 3"),
        ("a;b\n1;2\n", "the separator must be a comma"),
        ("a\tb\n1\t2\n", "the separator must be a comma"),
        ("a\n1,5;2,5\n", "expected 1 fields, got 3"),
        ("1,5;2,5\n1,5;2,5\n", "got '5;2'; the separator must be a comma"),
        ("a,b\n", "has no rows of data, only columns: a, b"),
        ("", "is empty"),
        ("\n\n", "is empty"),
        ("a,a\n1,2\n", "column names must differ, got twice: a"),
        (",a\n0,2\n", "column 1 has no name in the header"),
        ('a,b\n1,"2\n', "can't be read as .csv: unexpected end of data"),
        ("a\n" + "z" * 99 + "\n", "got '" + "z" * 40 + "...'"),
    ],
)
def test_csv_refuses(csv, text, message):
    with refused(message) as raised:
        read_table(csv(text))
    assert "t.csv" in str(raised.value)
    assert len(str(raised.value).splitlines()) <= 2


def test_csv_refuses_bytes(csv, tmp_path):
    with refused("can't be read as .csv: 'utf-8' codec"):
        read_table(csv("ä,b\n1,2\n", encoding="latin-1"))
    whole = gzip.compress(b"a,b\n" + b"1,2\n" * 999)
    for content in (b"a,b\n1,2\n", whole[:-9], whole[:20] + b"??" + whole[22:]):
        path = tmp_path / "t.csv.gz"
        path.write_bytes(content)
        with refused("can't be read as .csv.gz"):
            read_table(path)


def test_read_refuses_paths(tmp_path):
    with refused("none.csv does not exist"):
        read_table(tmp_path / "none.csv")
    (tmp_path / "d.csv").mkdir()
    with refused("is a folder"):
        read_table(tmp_path / "d.csv")
    with refused("unknown suffix '.xlsx', expected one of .csv, .csv.gz, .npy, .npz, .parquet"):
        read_table(tmp_path / "t.xlsx")


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_read_refuses_damage(tmp_path, suffix):
    path = tmp_path / f"t{suffix}"
    path.write_bytes(b"")
    with refused("is empty"):
        read_table(path)
    path.write_bytes(b"\x93NUMPY\x01\x00garbage\xff\x00")
    with refused(f"can't be read as {suffix}"):
        read_table(path)
    if suffix != ".csv":
        write_table(path, np.random.default_rng(0).normal(size=(500, 3)))
        path.write_bytes(path.read_bytes()[:-3000])
        with refused(f"can't be read as {suffix}"):
            read_table(path)


def test_npy_is_mapped(tmp_path):
    for dtype in (np.float32, np.float64):
        np.save(tmp_path / "t.npy", np.ones((3, 2), dtype))
        values = read_table(tmp_path / "t.npy").values
        assert isinstance(values, np.memmap)
        assert values.dtype == dtype
    for dtype in (np.int16, bool, np.float16, ">f8"):
        np.save(tmp_path / "t.npy", np.ones((3, 2)).astype(dtype))
        values = read_table(tmp_path / "t.npy").values
        assert values.dtype == np.dtype("=f8")
        assert np.array_equal(values, np.ones((3, 2)))


@pytest.mark.parametrize("suffix", [".npy", ".npz"])
@pytest.mark.parametrize(
    "values, message",
    [
        (np.ones(3), "expected a 2-D array (rows, columns), got shape (3,); make a single column"),
        (np.ones((2, 2, 2)), "got shape (2, 2, 2)"),
        (np.array(1.0), "got shape ()"),
        (np.ones((2, 2), complex), "must hold real numbers, got dtype complex128"),
        (np.array([["a", "b"]]), "must hold real numbers, got dtype <U1"),
        (np.array([[None, 1]]), "can't be read as .np"),
        (np.ones((0, 2)), "has no rows"),
        (np.ones((2, 0)), "has no columns"),
    ],
)
def test_arrays_refused(tmp_path, suffix, values, message):
    path = tmp_path / f"t{suffix}"
    (np.save if suffix == ".npy" else np.savez)(path, values)
    with refused(message):
        read_table(path)


def test_npz_keys(tmp_path):
    path, x = tmp_path / "t.npz", np.ones((3, 2))
    np.savez(path, data=x)
    assert read_table(path).columns == ("x0", "x1")
    np.savez(path, x=x, other=np.zeros(3), columns=np.array(["a", "b"]))
    assert read_table(path).columns == ("a", "b")
    np.savez(path, a=x, b=x)
    with refused("must hold one array, or one called 'x', got a, b"):
        read_table(path)
    np.savez(path, x=x, columns=np.array(["a"]))
    with refused("one name for each of the 2 columns, got 1"):
        read_table(path)
    np.savez(path, x=x, columns=np.array([1, 2]))
    with refused("'columns' must be a 1-D array of names"):
        read_table(path)
    np.save(tmp_path / "u.npy", x)
    (tmp_path / "u.npy").rename(tmp_path / "u.npz")
    with refused("it is a single array; call it .npy"):
        read_table(tmp_path / "u.npz")


def test_parquet_types(tmp_path):
    import decimal

    import pyarrow as pa
    import pyarrow.parquet as pq

    path = tmp_path / "t.parquet"
    content = {
        "i": pa.array([1, None, 3]),
        "b": pa.array([True, False, None]),
        "f": pa.array([0.5, float("inf"), None], pa.float32()),
        "d": pa.array([decimal.Decimal("1.5"), None, decimal.Decimal("2.5")]),
        "n": pa.nulls(3),
    }
    pq.write_table(pa.table(content), path)
    nan = np.nan
    want = [[1, 1, 0.5, 1.5, nan], [nan, 0, np.inf, nan, nan], [3, nan, nan, 2.5, nan]]
    table = read_table(path)
    assert table.columns == tuple("ibfdn")
    assert np.array_equal(table.values, want, equal_nan=True)
    pq.write_table(pa.table({**content, "s": ["a", "b", "c"]}), path)
    with refused("columns must hold numbers, got s (string)"):
        read_table(path)
    pq.write_table(pa.Table.from_arrays([content["i"]] * 2, ["a", "a"]), path)
    with refused("column names must differ, got twice: a"):
        read_table(path)
    pq.write_table(pa.table({"a": pa.array([], pa.float64())}), path)
    with refused("has no rows of data"):
        read_table(path)


def test_select_and_drop():
    table = Table(np.arange(6.0).reshape(2, 3), ("current", "voltage", "time"))
    assert np.array_equal(table.select(["time", "current"]).values, [[2, 0], [5, 3]])
    assert table.drop(["voltage"]).columns == ("current", "time")
    assert table.drop([]) is table
    with refused(
        "unknown column 'voltge' in --drop; did you mean 'voltage'? Columns: current, voltage, time"
    ):
        table.drop(["voltge"])
    assert column_index(table.columns, "time", "--drop") == 2
    with refused("unknown column 'qqq' in --x. Columns: c0, c1") as raised:
        column_index([f"c{i}" for i in range(1000)], "qqq", "--x")
    assert str(raised.value).endswith("c19, ... (1000 in all)")
