import hashlib
import re
import subprocess
import sys
from importlib.resources import files

import numpy as np
import pytest

from pathline.data import Table, load_electricity, load_uci, read_table, resolution, write_table
from pathline.errors import DataError

UCI = {
    "concrete": (805, 100, 9),
    "parkinsons": (4701, 587, 22),
    "wine_red": (1089, 135, 12),
    "wine_white": (3169, 396, 12),
}


def whole(splits):
    return np.concatenate([splits.train, splits.validation, splits.test])


def check_parts(splits, train, rest, columns):
    shapes = [part.shape for part in (splits.train, splits.validation, splits.test)]
    assert shapes == [(train, columns), (rest, columns), (rest, columns)]
    values = whole(splits)
    assert values.dtype == np.float64
    assert np.isfinite(values).all()
    assert len(np.unique(values, axis=0)) == len(values)
    assert len(splits.columns) == columns
    assert "CC BY 4.0" in splits.source


def test_electricity():
    splits = load_electricity()
    check_parts(splits, 15_556, 1_944, 6)
    names = ("global_active_power", "voltage", *(f"sub_metering_{i}" for i in (1, 2, 3)))
    assert splits.columns == (*names, "minute_of_day")
    values = whole(splits)
    assert (values.min(0) > [0.05, 220, 0, 0, 0, -1]).all()
    assert (values.max(0) < [12, 260, 90, 90, 30, 1440]).all()
    for column in range(5):  # the noise survives single precision
        assert len(np.unique(values[:, column])) > 0.98 * len(values)
    power = values[:, 0] / 0.002 % 1  # a grid of 0.002, and noise of 0.001
    assert 0.24 < power.mean() < 0.26


@pytest.mark.parametrize("name", UCI)
def test_uci(name, monkeypatch):
    monkeypatch.delenv("PATHLINE_DATA", raising=False)
    splits = load_uci(name)
    check_parts(splits, *UCI[name])
    raw = read_table(files("pathline.data") / "files" / f"{name}.csv.gz")
    assert raw.columns == splits.columns
    values, grid = whole(splits), np.unique(raw.values, axis=0)
    assert len(values) == len(grid)
    for column, clean in zip(values.T, grid.T, strict=True):
        assert len(np.unique(column)) == len(column)
        difference = np.sort(column) - np.sort(clean)
        assert difference.min() >= -1e-12 * abs(clean).max()
        assert difference.max() <= resolution(clean) * (1 + 1e-9)
    assert np.array_equal(splits.test, load_uci(name).test)


def test_uci_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("PATHLINE_DATA", str(tmp_path))
    with pytest.raises(DataError, match=r"there is no .*yacht.csv.gz; set the environment"):
        load_uci("yacht")
    assert load_uci("concrete").train.shape == (805, 9)  # the shipped one
    (tmp_path / "uci_cotflow").mkdir()
    values = np.repeat(np.random.default_rng(0).normal(size=(40, 3)), 2, axis=0)
    for name in ("yacht", "concrete"):
        write_table(tmp_path / "uci_cotflow" / f"{name}.csv.gz", Table(values, ("a", "b", "c")))
        splits = load_uci(name)
        assert (splits.train.shape, splits.test.shape) == ((32, 3), (4, 3))
        assert np.array_equal(np.unique(whole(splits), axis=0), np.unique(values, axis=0))
    monkeypatch.delenv("PATHLINE_DATA")
    with pytest.raises(DataError, match="PATHLINE_DATA is not set; set the environment variable"):
        load_uci("energy")
    with pytest.raises(DataError, match="unknown UCI table 'wine', expected one of concrete"):
        load_uci("wine")


def test_checksums():
    folder = files("pathline.data") / "files"
    sums = re.findall(r"- `(.*)`: ([0-9a-f]{64})", (folder / "README.md").read_text())
    assert {name for name, _ in sums} == {p.name for p in folder.iterdir()} - {"README.md"}
    for name, want in sums:
        assert hashlib.sha256((folder / name).read_bytes()).hexdigest() == want


def test_import_is_light():
    heavy = ("matplotlib", "pandas", "pyarrow", "sklearn")
    code = f"import sys, pathline.data; print([m for m in {heavy} if m in sys.modules])"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.stdout.strip() == "[]", result.stderr
