"""Time series on the command line: fit, forecast, score, check, report, and one-line errors."""

import json
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.linalg import expm

import pathline as pl
from command_line import refused
from pathline.cli import main
from pathline.data import Series, read_labelled, read_table
from pathline.networks import TrajectoryNet
from pathline.networks.forecasts import log_densities, solutions
from pathline.train.files import read_json

A = np.array([[-0.05, 1.0], [-1.0, -0.05]])
TINY = ["--members", "2", "--width", "8", "--window", "5"]


def write_series(path: Path, seed: int, count: int = 3) -> Path:
    """Solutions of z' = A z with text for groups, a tenth of x missing."""
    rng = np.random.default_rng(seed)
    lines = ["t,x,device,v"]
    for k in range(count):
        start = rng.normal(size=2)
        for t in np.cumsum(rng.exponential(0.3, 40)):
            x, v = expm(A * t) @ start
            lines.append(
                f"{float(t)!r},{'' if rng.random() < 0.1 else repr(float(x))},d{k},{float(v)!r}"
            )
    path.write_text("\n".join(lines) + "\n")
    return path


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("series")
    file = write_series(folder / "series.csv", 0)
    write_series(folder / "new.csv", 1, 2)
    arguments = ["fit", "dynamics", str(file), "--time", "t", "--group", "device"]
    assert main([*arguments, *TINY, "--max-steps", "60", "--out", str(folder / "run")]) == 0
    return folder


@pytest.fixture
def folder(made, tmp_path, capsys) -> Path:
    """A copy that a test may change."""
    found = Path(shutil.copytree(made, tmp_path / "copy"))
    capsys.readouterr()
    return found


def test_the_run(made):
    metrics = read_json(made / "run" / "metrics.json")
    check = metrics["check"]
    assert set(check["columns"]) == {"x", "v"}
    assert metrics["rmse"] == pytest.approx(check["rmse"], rel=0.01)  # the same windows
    assert metrics["rmse_of_persistence"] == pytest.approx(check["persistence"], rel=0.01)
    page = (made / "run" / "report.html").read_text()
    assert page.count("<img") == 3
    for heading in ("Forecasts", "Errors by lead", "Errors by column"):
        assert heading in page
    assert isinstance(pl.load(made / "run"), TrajectoryNet)


def test_forecast(folder, capsys):
    out = folder / "f.csv"
    assert main(["forecast", str(folder / "run"), "-n", "4", "--out", str(out), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["rows"] == 12
    table, ids = read_labelled(out, "device", "")
    assert table.columns == ("t", "x", "x_lower", "x_upper", "v", "v_lower", "v_upper")
    assert list(dict.fromkeys(ids)) == ["d0", "d1", "d2"]
    data, groups = read_labelled(folder / "series.csv", "device", "")
    series = Series.of(data.values[:, 0], data.values[:, 1:], groups)
    net = pl.load(folder / "run").double()
    mean, sd = solutions(net, series, table.values[:, 0], ids, last=True)
    np.testing.assert_allclose(table.values[:, [1, 4]], mean, rtol=1e-10)
    np.testing.assert_allclose(table.values[:, [3, 6]], mean + 1.6448536269514722 * sd, rtol=1e-10)


def test_forecast_of_other_series_at_given_times(folder):
    run, out = str(folder / "run"), str(folder / "f.parquet")
    at = folder / "at.csv"
    at.write_text("device,t\nd1,100\nd0,101.5\n")
    more = ["--at", str(at), "--observe", str(folder / "new.csv")]
    assert main(["forecast", run, *more, "--level", "0.5", "--out", out]) == 0
    table, ids = read_labelled(out, "device", "")
    assert list(ids) == ["d1", "d0"]
    assert table.values[:, 0].tolist() == [100.0, 101.5]


def test_score(folder):
    run, out = str(folder / "run"), folder / "s.csv"
    assert main(["score", run, str(folder / "new.csv"), "--out", str(out)]) == 0
    found = read_labelled(out, "device", "")[0].values[:, 1]
    data, groups = read_labelled(folder / "new.csv", "device", "")
    series = Series.of(data.values[:, 0], data.values[:, 1:], groups)
    net = pl.load(folder / "run").double()
    np.testing.assert_allclose(found, log_densities(net, series), rtol=1e-10)
    assert np.isnan(found[series.starts[:-1]]).all()
    row = 7
    mean, sd = solutions(
        net, Series.of(series.t[:row], series.y[:row]), series.t[row : row + 1], last=True
    )
    each = -0.5 * ((series.y[row] - mean[0]) / sd[0]) ** 2 - np.log(sd[0]) - 0.5 * np.log(2 * np.pi)
    assert found[row] == pytest.approx(np.nansum(each), rel=1e-10)


def test_check_and_report(folder, capsys):
    run = folder / "run"
    code = main(["check", str(run), str(folder / "new.csv"), "--json"])
    found = json.loads(capsys.readouterr().out)
    assert code == (0 if found["passed"] else 1)
    assert read_json(run / "metrics.json")["checked"] == str(folder / "new.csv")
    (run / "report.html").unlink()
    assert main(["report", str(run)]) == 0
    assert "new.csv" in (run / "report.html").read_text()


def test_a_single_series_of_numbers(tmp_path):
    t = np.arange(40.0)
    np.save(tmp_path / "s.npy", np.column_stack([t, np.sin(t)]))
    run = str(tmp_path / "run")
    fit = ["fit", "dynamics", str(tmp_path / "s.npy"), "--time", "x0", *TINY, "--period", "6.28"]
    assert main([*fit, "--max-steps", "2", "--history", "2", "--extra", "1", "--out", run]) == 0
    assert main(["forecast", run, "-n", "3", "--out", str(tmp_path / "f.npy")]) == 0
    assert read_table(tmp_path / "f.npy").values[:, 0].tolist() == [40.0, 41.0, 42.0]


def test_numbers_as_groups(tmp_path):
    """They come back as they were; so do times, without the rounding errors of sums."""
    lines = [f"{k / 10!r},{g},{float(np.sin(k))!r}" for g in (7, 12) for k in range(12)]
    (tmp_path / "s.csv").write_text("\n".join(["t,g,x", *lines]) + "\n")
    run, out = str(tmp_path / "run"), tmp_path / "f.csv"
    fit = ["fit", "dynamics", str(tmp_path / "s.csv"), "--time", "t", "--group", "g", *TINY]
    assert main([*fit, "--max-steps", "2", "--out", run]) == 0
    assert main(["forecast", run, "-n", "5", "--out", str(out)]) == 0
    found = [line.split(",")[:2] for line in out.read_text().splitlines()[1:]]
    times = ["1.2", "1.3", "1.4", "1.5", "1.6"]
    assert found == [[g, t] for g in ("7", "12") for t in times]
    assert main(["score", run, str(tmp_path / "s.csv"), "--out", str(out)]) == 0
    assert {line.split(",")[0] for line in out.read_text().splitlines()[1:]} == {"7", "12"}


KILLED = """
import os, signal, sys
from pathline.cli import main
from pathline.train import trainer

saved = trainer.Trainer._checkpoint

def checkpoint(self, *args):
    saved(self, *args)
    if self.at.step >= 20:
        os.kill(os.getpid(), signal.SIGKILL)

trainer.Trainer._checkpoint = checkpoint
main(sys.argv[1:])
"""


def test_a_killed_run(folder, capsys):
    """It forecasts from its series, and goes on to the same weights."""
    fit = ["fit", "dynamics", str(folder / "series.csv"), "--time", "t", "--group", "device"]
    run, out = folder / "killed", ["--out", str(folder / "f.csv")]
    fit += [*TINY, "--max-steps", "60", "--out", str(run)]
    assert subprocess.run([sys.executable, "-c", KILLED, *fit]).returncode == -signal.SIGKILL
    assert not (run / "metrics.json").exists()
    for model in (run, run / "model"):
        assert main(["forecast", str(model), *out]) == 0
        assert len(read_labelled(folder / "f.csv", "device", "")[1]) == 60
    assert main([*fit, "--resume"]) == 0
    whole, resumed = (pl.load(folder / name).state_dict() for name in ("run", "killed"))
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    for part in ("model", "checkpoint"):
        (run / part / "series.safetensors").unlink()
    refused(capsys, ["forecast", str(run), *out], "saved without series", "--observe FILE")


def test_resume_wants_the_same_series(folder, capsys):
    fit = ["fit", "dynamics", str(folder / "series.csv"), "--time", "t", "--group", "device"]
    again = [*TINY, "--max-steps", "60", "--out", str(folder / "run"), "--resume"]
    before = read_json(folder / "run" / "metrics.json")["steps"]
    assert main([*fit, *again]) == 0
    assert read_json(folder / "run" / "metrics.json")["steps"] == before
    text = (folder / "series.csv").read_text()
    (folder / "series.csv").write_text(text.replace("d2,0.", "d2,1."))
    refused(capsys, [*fit, *again], "was started with other series", "--overwrite")


def test_bad_input(folder, tmp_path, capsys):
    file, out = str(folder / "series.csv"), ["--out", str(tmp_path / "no")]
    fit = ["fit", "dynamics", file]
    named = ["--group", "device", *out]
    refused(capsys, [*fit, "--time", "tt", *named], "'tt' in --time", "did you mean 't'")
    refused(capsys, [*fit, "--time", "t", "--group", "devise", *out], "did you mean 'device'")
    refused(capsys, [*fit, "--time", "t", *out], "column 'device': expected a number")
    bad = tmp_path / "bad.csv"
    for rows, word in (
        ("0,1\n2,2\n1,3\n", "comes after 2; sort the rows by time"),
        ("0,1\n1,2\n1,3\n", "no time may occur twice"),
        ("0,1\n,2\n1,3\n", "`t` must be finite, got nan in row 2"),
        ("0,1\n", "at least 2 observation(s), got 1"),
    ):
        bad.write_text("t,x\n" + rows)
        refused(capsys, ["fit", "dynamics", str(bad), "--time", "t", *out], "bad.csv", word)
    bad.write_text("t,g,x\n0,a,1\n1,a,2\n0,b,3\n")
    command = ["fit", "dynamics", str(bad), "--time", "t", "--group", "g", *out]
    refused(capsys, command, "at least 2 observation(s), got fewer in b")
    assert not (tmp_path / "no").exists()
    run = str(folder / "run")
    refused(capsys, ["sample", run, *out], "holds a model of time series", "pathline forecast")
    refused(capsys, ["check", run], "check needs a FILE with series")
    bad.write_text("t,device\n-5,d0\n")
    at = ["--at", str(bad), "--out", str(tmp_path / "f.csv")]
    refused(capsys, ["forecast", run, *at], "must not lie before the last observation")
    bad.write_text("t,device\n1e9,d0\n")
    refused(capsys, ["forecast", run, *at], "`t` must not lie more than 100,000 steps", "usual")
    bad.write_text("t,x,v\n1,2,3\n2,3,4\n")
    nameless = f"unknown column 'device' in {bad}. Columns: t, x, v"
    refused(capsys, ["forecast", run, *at], nameless)
    refused(capsys, ["forecast", run, "--observe", str(bad), *at[2:]], nameless)
    refused(capsys, ["check", run, str(bad)], nameless)
    refused(capsys, ["score", run, str(bad)], nameless)
    bad.write_text("time,device\n1,d0\n")
    refused(capsys, ["forecast", run, *at], f"unknown column 't' in {bad}")
    refused(capsys, ["forecast", run, "--out", str(tmp_path / "f.npy")], "text needs a .csv")
