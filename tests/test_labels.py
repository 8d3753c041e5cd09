"""Tables with a column of text: read, written, and what can't be."""

import numpy as np
import pyarrow.parquet as pq
import pytest

from pathline.data import read_labelled, read_table, write_labelled
from pathline.errors import DataError

VALUES = np.array([[1.0, 0.5], [2.0, np.nan], [3.0, -1.0]])


@pytest.mark.parametrize("suffix", [".csv", ".csv.gz", ".parquet"])
@pytest.mark.parametrize(
    "labels", [np.array(["b", "a, c", "b"]), np.array([2, 1, 2]), np.array([0.5, 1.0, 2.5])]
)
def test_round_trip(tmp_path, suffix, labels):
    file = tmp_path / f"table{suffix}"
    write_labelled(file, "name", labels, VALUES, ("u", "v"))
    table, found = read_labelled(file, "name", "--group")
    np.testing.assert_array_equal(found, labels)
    assert found.dtype.kind == labels.dtype.kind
    np.testing.assert_array_equal(table.values, VALUES)
    assert table.columns == ("u", "v")
    assert table.entries == ()


@pytest.mark.parametrize("kind", [np.int64, np.uint8])
def test_whole_numbers_are_written_as_such(tmp_path, kind):
    """They are told apart from the other columns, whose numbers are written as floats."""
    labels = np.array([7, 0, 7], dtype=kind)
    for suffix in (".csv", ".parquet"):
        write_labelled(tmp_path / f"t{suffix}", "name", labels, VALUES, ("u", "v"))
    lines = (tmp_path / "t.csv").read_text().splitlines()
    assert [line.split(",")[:2] for line in lines[1:]] == [["7", "1.0"], ["0", "2.0"], ["7", "3.0"]]
    columns = pq.read_table(tmp_path / "t.parquet").to_pydict()
    assert [repr(number) for number in columns["name"]] == ["7", "0", "7"]
    for suffix in (".npy", ".npz"):
        write_labelled(tmp_path / f"t{suffix}", "name", labels, VALUES, ("u", "v"))
        assert read_table(tmp_path / f"t{suffix}").values[:, 0].tolist() == [7.0, 0.0, 7.0]


def test_numbers_too_large_for_integers(tmp_path):
    file = tmp_path / "t.csv"
    file.write_text("u,name\n1,1e19\n2,-3e20\n")
    assert read_labelled(file, "name", "--group")[1].tolist() == [1e19, -3e20]


def test_numbers_need_no_text(tmp_path):
    file = tmp_path / "table.npy"
    write_labelled(file, "name", np.array([2, 1, 2]), VALUES, ("u", "v"))
    table, found = read_labelled(file, "x0", "--group")
    np.testing.assert_array_equal(found, [2, 1, 2])
    np.testing.assert_array_equal(table.values, VALUES)


def test_the_column_may_be_anywhere(tmp_path):
    file = tmp_path / "table.csv"
    file.write_text("u,name,v\n1, x ,2\n3,y,4\n\n5,x,6\n")
    table, found = read_labelled(file, "name", "--group")
    assert found.tolist() == ["x", "y", "x"]
    assert table.values.tolist() == [[1, 2], [3, 4], [5, 6]]


def test_errors(tmp_path):
    file = tmp_path / "table.csv"
    file.write_text("u,name\n1,x\n2,\n")
    with pytest.raises(DataError, match="row 2: column 'name' has no value"):
        read_labelled(file, "name", "--group")
    with pytest.raises(DataError, match=r"unknown column 'nam'.*did you mean 'name'"):
        read_labelled(file, "nam", "--group")
    with pytest.raises(DataError, match="column 'name': expected a number, got 'x'"):
        read_table(file)
    file.write_text("u,name\n1,x\n2\n")
    with pytest.raises(DataError, match="expected 2 fields, got 1"):
        read_labelled(file, "name", "--group")
    with pytest.raises(DataError, match=r"text needs a \.csv or \.parquet"):
        write_labelled(tmp_path / "t.npz", "name", np.array(["x"]), VALUES[:1], ("u", "v"))
