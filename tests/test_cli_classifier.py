"""Classifiers on the command line: fit, predict, score, check, report, and one-line errors."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

import pathline as pl
from command_line import refused
from pathline.cli import main
from pathline.data import read_labelled, read_table
from pathline.models import metadata
from pathline.train.files import read_json


def write_rings(path: Path, rows: int, seed: int) -> Path:
    """Rows inside of a circle, and left and right of it."""
    x = np.random.default_rng(seed).normal(size=(rows, 3))
    inside = (x[:, :2] ** 2).sum(1) < 1
    kinds = np.where(inside, "inside", np.where(x[:, 0] > 0, "right", "left"))
    lines = [f"{a!r},{kind},{b!r},{c!r}" for (a, b, c), kind in zip(x.tolist(), kinds, strict=True)]
    path.write_text("\n".join(["a,kind,b,c", *lines]) + "\n")
    return path


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("rings")
    file = write_rings(folder / "train.csv", 600, 0)
    write_rings(folder / "test.csv", 300, 1)
    arguments = ["fit", "classifier", str(file), "--target", "kind", "--steps", "4"]
    assert main([*arguments, "--max-steps", "150", "--out", str(folder / "run")]) == 0
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
    assert metrics["accuracy"] == pytest.approx(check["accuracy"])
    assert check["rows"] == 60
    assert check["accuracy"] > metrics["logistic_regression"]
    confusion = np.array(check["confusion"])
    assert confusion.sum() == 60
    assert np.trace(confusion) / 60 == pytest.approx(check["accuracy"])
    page = (made / "run" / "report.html").read_text()
    assert page.count("<img") == 2
    assert "taken for inside" in page


def test_predict_score_and_check_agree(folder, capsys):
    run, test, out = str(folder / "run"), str(folder / "test.csv"), folder / "p.csv"
    assert main(["predict", run, test, "--out", str(out)]) == 0
    table, best = read_labelled(out, "kind", "")
    assert table.columns == ("p(inside)", "p(left)", "p(right)")
    np.testing.assert_allclose(table.values.sum(1), 1, rtol=1e-12)
    data, labels = read_labelled(test, "kind", "")
    kept, net = metadata(run), pl.load(run).double().eval()
    with torch.no_grad():
        logits = net(torch.tensor((data.values - kept["center"]) / kept["scale"]))
    np.testing.assert_allclose(table.values, torch.softmax(logits, 1).numpy(), rtol=1e-10)
    accuracy = (best == labels).mean()
    assert accuracy > 0.9
    capsys.readouterr()
    assert main(["score", run, test, "--out", str(folder / "s.csv"), "--json"]) == 0
    scored = json.loads(capsys.readouterr().out)
    assert scored["accuracy"] == pytest.approx(accuracy)
    own = table.values[np.arange(300), np.searchsorted(kept["classes"], labels)]
    found = read_table(folder / "s.csv").values[:, 0]
    np.testing.assert_allclose(found, np.log(own), rtol=1e-8)
    assert main(["check", run, test, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["accuracy"] == pytest.approx(accuracy)
    assert main(["report", run]) == 0
    assert "test.csv" in (folder / "run" / "report.html").read_text()


def test_predict_needs_no_target(folder):
    data = read_labelled(folder / "test.csv", "kind", "")[0]
    lines = [",".join(data.columns), *(",".join(map(repr, row)) for row in data.values.tolist())]
    (folder / "bare.csv").write_text("\n".join(lines) + "\n")
    for name in ("test", "bare"):
        file, out = str(folder / f"{name}.csv"), str(folder / f"{name}-p.csv")
        assert main(["predict", str(folder / "run"), file, "--out", out]) == 0
    assert (folder / "test-p.csv").read_bytes() == (folder / "bare-p.csv").read_bytes()


def test_numbers_as_classes(tmp_path):
    x = np.random.default_rng(0).normal(size=(80, 2))
    np.savez(tmp_path / "d.npz", x=np.column_stack([x, 2 * (x[:, 0] > 0)]), columns=["a", "b", "y"])
    run = str(tmp_path / "run")
    fit = ["fit", "classifier", str(tmp_path / "d.npz"), "--target", "y", "--out", run]
    assert main([*fit, "--max-steps", "2", "--width", "4", "--steps", "1"]) == 0
    out = tmp_path / "p.npy"
    assert main(["predict", run, str(tmp_path / "d.npz"), "--out", str(out)]) == 0
    assert set(np.load(out)[:, 0]) <= {0.0, 2.0}
    out = tmp_path / "p.csv"
    assert main(["predict", run, str(tmp_path / "d.npz"), "--out", str(out)]) == 0
    head, *lines = out.read_text().splitlines()
    assert head == "y,p(0),p(2)"
    assert {line.split(",")[0] for line in lines} <= {"0", "2"}  # and no floats
    assert "and how 8 rows fare" in Path(run, "report.html").read_text()  # a tenth is held out


def test_bad_input(folder, tmp_path, capsys):
    train, out = str(folder / "train.csv"), ["--out", str(tmp_path / "no")]
    fit = ["fit", "classifier", train, *out]
    refused(capsys, [*fit, "--target", "kin"], "unknown column 'kin'", "did you mean 'kind'")
    refused(capsys, [*fit, "--target", "a"], "column 'kind': expected a number")
    refused(capsys, [*fit, "--target", "kind", "--width", "7"], "must be even")
    bad = tmp_path / "bad.csv"
    for text, word in (
        ("a,y\n1,u\n2,u\n3,u\n", "at least two classes"),
        ("a,y\n1,u\n2,v\n3,w\n", "these are no classes"),
        ("a,y\n1,u\n,v\n3,u\n4,v\n", "row 2, column 'a': a classifier needs finite values"),
        ("a,y\n1,u\n2,\n3,u\n4,v\n", "row 2: column 'y' has no value"),
    ):
        bad.write_text(text)
        refused(capsys, ["fit", "classifier", str(bad), "--target", "y", *out], "bad.csv", word)
    assert not (tmp_path / "no").exists()
    run = str(folder / "run")
    bad.write_text("a,kind,b,c\n1,outside,2,3\n")
    refused(capsys, ["check", run, str(bad)], "does not know the class outside; it knows inside")
    refused(capsys, ["sample", run, *out], "holds a classifier", "pathline predict")
    refused(capsys, ["forecast", run, *out], "holds no model of time series")
    refused(capsys, ["check", run], "check needs a FILE with rows and classes")
