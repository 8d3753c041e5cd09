"""The command line as its users meet it: results, exit codes, one-line errors, nothing written."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from pathline.cli import main

COLUMNS = ("height", "income", "share")


def table(rows: int = 300, seed: int = 0) -> np.ndarray:
    """Correlated rows: a normal, a positive and a (0, 1) column."""
    z = np.random.default_rng(seed).normal(size=(rows, 3))
    return np.stack(
        [z[:, 0], np.exp(z[:, 1] + 0.3 * z[:, 0]), 1 / (1 + np.exp(-z[:, 2] - z[:, 0]))], 1
    )


def write_csv(path: Path, values: np.ndarray, columns: tuple[str, ...] = COLUMNS) -> Path:
    lines = [",".join(columns)] + [",".join(map(repr, row)) for row in values.tolist()]
    path.write_text("\n".join(lines) + "\n")
    return path


@pytest.fixture(scope="module")
def fitted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A short run on a table with bounded columns and weights."""
    folder = tmp_path_factory.mktemp("fitted")
    values = np.column_stack([table(), np.random.default_rng(1).random(300)])
    write_csv(folder / "train.csv", values, (*COLUMNS, "w"))
    support = ["--support", "income=positive", "--support", "share=[0,1]"]
    arguments = ["fit", "density", str(folder / "train.csv"), "--out", str(folder / "run")]
    assert main([*arguments, *support, "--weights", "w", "--max-steps", "40"]) == 0
    return folder


def refused(capsys: pytest.CaptureFixture[str], arguments: list[str], *words: str) -> None:
    """The command ends with exit code 2 and one or two lines that say why."""
    assert main(arguments) == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    assert 1 <= len(shown.err.strip().splitlines()) <= 2
    assert "Traceback" not in shown.err
    for word in words:
        assert word in shown.err


def test_run_folder(fitted: Path) -> None:
    entries = {entry.name for entry in (fitted / "run").iterdir()}
    assert {"config.json", "model", "checkpoint", "log.jsonl", "metrics.json", "report.html"} <= (
        entries
    )
    config = json.loads((fitted / "run/config.json").read_text())
    assert config["settings"]["seed"] == 0 and len(config["data"]["sha256"]) == 64
    steps = [json.loads(line)["step"] for line in (fitted / "run/log.jsonl").open()]
    assert steps == sorted(set(steps)) and steps[-1] == 40


def test_samples_keep_columns_and_bounds(fitted: Path) -> None:
    out = fitted / "samples.csv"
    assert main(["sample", str(fitted / "run"), "-n", "500", "--out", str(out)]) == 0
    head, *lines = out.read_text().splitlines()
    values = np.array([list(map(float, line.split(","))) for line in lines])
    assert head.split(",") == list(COLUMNS) and values.shape == (500, 3)
    assert (values[:, 1] > 0).all() and ((values[:, 2] > 0) & (values[:, 2] < 1)).all()
    assert main(["sample", str(fitted / "run/model"), "-n", "500", "--out", str(out)]) == 0
    assert out.read_text().splitlines() == [head, *lines]  # same seed, and the model inside


@pytest.mark.parametrize("suffix", [".csv", ".npy", ".npz", ".parquet"])
def test_score_every_format(fitted: Path, suffix: str, capsys: pytest.CaptureFixture[str]) -> None:
    from pathline.data import read_table, write_table

    values, file = table(50, seed=2), fitted / f"test{suffix}"
    write_table(file, values, COLUMNS)
    out = fitted / f"scores{suffix}"
    assert main(["score", str(fitted / "run"), str(file), "--out", str(out), "--json"]) == 0
    answer = json.loads(capsys.readouterr().out)
    import torch

    import pathline as pl

    flow = pl.load(fitted / "run").double()
    want = flow.log_prob(torch.from_numpy(values)).detach().numpy()
    np.testing.assert_allclose(read_table(out).values[:, 0], want, rtol=1e-12)
    assert answer["mean_log_prob"] == pytest.approx(want.mean(), rel=1e-12)


def test_check_and_report(fitted: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", str(fitted / "run"), str(fitted / "train.csv"), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["passed"] and found["inverse_error"] < 1e-3
    (fitted / "run/report.html").unlink()
    assert main(["report", str(fitted / "run")]) == 0
    assert "<html" in (fitted / "run/report.html").read_text()


def test_json_is_one_object(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    np.save(tmp_path / "x.npy", table(100))
    arguments = ["fit", "density", str(tmp_path / "x.npy"), "--out", str(tmp_path / "run")]
    assert main([*arguments, "--max-steps", "5", "--json"]) == 0
    metrics = json.loads(capsys.readouterr().out)
    assert metrics == json.loads((tmp_path / "run/metrics.json").read_text())


def test_dequantized_samples_are_on_the_grid(tmp_path: Path) -> None:
    values = np.column_stack([table(200)[:, 0], np.random.default_rng(3).integers(0, 4, 200)])
    file, run = write_csv(tmp_path / "x.csv", values, ("a", "count")), str(tmp_path / "run")
    fit = ["fit", "density", str(file), "--out", run, "--max-steps", "10"]
    assert main([*fit, "--dequantize", "count"]) == 0
    assert main(["sample", run, "-n", "50", "--out", str(tmp_path / "s.npy")]) == 0
    counts = np.load(tmp_path / "s.npy")[:, 1]
    np.testing.assert_array_equal(counts, np.round(counts))


def bad_files(folder: Path) -> dict[str, tuple[Path, tuple[str, ...]]]:
    """Files that can't be fitted, and words of the error."""
    x = table(50)
    nan, inf, constant = x.copy(), x.copy(), x.copy()
    nan[3, 1], inf[3, 1], constant[:, 1] = np.nan, np.inf, 3.0
    texts = {
        "empty": ("", ("empty",)),
        "header": ("a,b\n", ("no rows",)),
        "text": ("a,b\n1,2\n3,x\n", ("row 2", "'b'", "'x'")),
        "ragged": ("a,b\n1,2\n3\n", ("row 2", "2 fields", "got 1")),
    }
    arrays = {
        "three": (np.zeros((2, 2, 2)), ("2-D", "(2, 2, 2)")),
        "nan": (nan, ("missing", "row 4")),
        "inf": (inf, ("inf", "row 4")),
        "one": (x[:1], ("2 rows",)),
        "constant": (constant, ("constant", "--drop")),
        "object": (np.array([[{}]]), ("object",)),
    }
    files: dict[str, tuple[Path, tuple[str, ...]]] = {
        "missing": (folder / "nowhere.csv", ("does not exist",))
    }
    for name, (text, words) in texts.items():
        (folder / f"{name}.csv").write_text(text)
        files[name] = (folder / f"{name}.csv", words)
    for name, (array, words) in arrays.items():
        np.save(folder / f"{name}.npy", array, allow_pickle=True)
        files[name] = (folder / f"{name}.npy", words)
    for name, content in (("corrupt.npy", b"xxx"), ("corrupt.parquet", b"PAR1")):
        (folder / name).write_bytes(content)
        files[name] = (folder / name, (name,))
    return files


BAD = (
    "missing", "empty", "header", "text", "ragged", "three", "object", "corrupt.npy",
    "corrupt.parquet", "nan", "inf", "one", "constant",
)  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_table(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file, words = bad_files(tmp_path)[name]
    refused(capsys, ["fit", "density", str(file), "--out", str(tmp_path / "run")], *words)
    assert not (tmp_path / "run").exists()


def test_bad_validation(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train = write_csv(tmp_path / "train.csv", table())
    other = write_csv(tmp_path / "other.csv", table(), ("height", "income", "weight"))
    fit = ["fit", "density", str(train), "--out", str(tmp_path / "run")]
    refused(capsys, [*fit, "--validation", str(other)], "share", "weight")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "flags, words",
    [
        (["--drop", "incme"], ("--drop", "'income'")),
        (["--dequantize", "shar"], ("--dequantize", "'share'")),
        (["--support", "heigth=positive"], ("'height'",)),
        (["--support", "income=[3,1]"], ("income",)),
        (["--support", "height=positive"], ("height", "row")),
        (["--weights", "hight"], ("'height'",)),
        (["--max-steps", "-3"], ("--max-steps", "-3")),
        (["--width", "0"], ("--width", "0")),
        (["--budget", "0"], ("--budget", "0")),
        (["--seed", "one"], ("--seed", "one")),
        (["--sed", "1"], ("--sed", "--seed")),
    ],
)
def test_bad_flags(
    flags: list[str], words: tuple[str, ...], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = write_csv(tmp_path / "x.csv", table())
    run = tmp_path / "run"
    refused(capsys, ["fit", "density", str(file), "--out", str(run), *flags], *words)
    assert not run.exists()


def test_output_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    np.save(tmp_path / "x.npy", table(60))
    fit = ["fit", "density", str(tmp_path / "x.npy"), "--max-steps", "3", "--out"]
    full = tmp_path / "full"
    full.mkdir()
    (full / "mine.txt").write_text("keep")
    refused(capsys, [*fit, str(full)], "not empty", "--overwrite")
    assert main([*fit, str(full), "--overwrite"]) == 0
    assert (full / "mine.txt").read_text() == "keep"
    capsys.readouterr()
    refused(capsys, [*fit, str(tmp_path / "x.npy")], "is a file")
    refused(capsys, [*fit, "/proc/nowhere"], "can't be written")


def test_bad_models(fitted: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import shutil

    out = ["-n", "3", "--out", str(tmp_path / "s.csv")]
    refused(capsys, ["sample", str(tmp_path / "none"), *out], "not a model")
    refused(capsys, ["sample", str(tmp_path), *out], "not a model")
    refused(capsys, ["sample", str(fitted / "run"), "-n", "-2", *out[2:]], "-n")

    truncated = shutil.copytree(fitted / "run/model", tmp_path / "truncated")
    (weights,) = truncated.glob("*.safetensors")
    weights.write_bytes(weights.read_bytes()[:-100])
    refused(capsys, ["sample", str(truncated), *out], "damaged")

    newer = shutil.copytree(fitted / "run/model", tmp_path / "newer")
    description = json.loads((newer / "model.json").read_text())
    (newer / "model.json").write_text(json.dumps(description | {"format": 99}))
    refused(capsys, ["sample", str(newer), *out], "format 99", "upgrade")
    assert not (tmp_path / "s.csv").exists()


def test_few_rows_is_a_warning(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    np.save(tmp_path / "wide.npy", np.random.default_rng(0).normal(size=(5, 8)))
    fit = ["fit", "density", str(tmp_path / "wide.npy"), "--out", str(tmp_path / "run")]
    assert main([*fit, "--max-steps", "20"]) == 0
    assert "fewer rows (5) than columns (8)" in capsys.readouterr().err


def test_reproduce(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["reproduce", "--list"]) == 0
    assert "ot-flow-moons" in capsys.readouterr().out
    refused(capsys, ["reproduce", "ot-flow-mons"], "ot-flow-moons")
    refused(capsys, ["reproduce"], "--list")
    run = ["reproduce", "ot-flow-swissroll", "--out", str(tmp_path / "run"), "--max-steps", "10"]
    assert main([*run, "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    metrics = json.loads((tmp_path / "run/metrics.json").read_text())
    assert result["published"] == 2.6885 and result["size"] == "small"
    assert metrics["measured"] == result["measured"] > result["entropy"]


def test_version_and_help(capsys: pytest.CaptureFixture[str]) -> None:
    import pathline

    assert main(["--version"]) == 0
    assert pathline.__version__ in capsys.readouterr().out
    assert main(["fit", "density", "--help"]) == 0
    assert "--dequantize" in capsys.readouterr().out


def start(arguments: list[str]) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "pathline", *arguments]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def weights(run: Path) -> bytes:
    (file,) = (run / "model").glob("*.safetensors")
    return file.read_bytes()


def logged(run: Path) -> list[dict[str, float]]:
    entries = [json.loads(line) for line in (run / "log.jsonl").open()]
    return [{k: v for k, v in entry.items() if k != "seconds"} for entry in entries]


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGKILL])
def test_stopped_run_resumes_bit_for_bit(tmp_path: Path, how: signal.Signals) -> None:
    np.save(tmp_path / "x.npy", table(200))
    fit = ["fit", "density", str(tmp_path / "x.npy"), "--max-steps", "120", "--out"]
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    assert main([*fit, str(whole)]) == 0
    process = start([*fit, str(cut)])
    checkpoint = cut / "checkpoint/state.safetensors"
    while not checkpoint.exists():
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)
    process.send_signal(how)
    _, errors = process.communicate()
    if how is signal.SIGINT:
        assert process.returncode == 130 and b"--resume" in errors
        assert main(["sample", str(cut), "-n", "2", "--out", str(tmp_path / "s.csv")]) == 0
    assert not (cut / "metrics.json").exists()  # it was stopped before its end
    assert main([*fit, str(cut), "--resume"]) == 0
    assert weights(cut) == weights(whole)
    assert logged(cut) == logged(whole)
    assert main([*fit, str(cut), "--resume"]) == 0  # finished: left as it is
    assert weights(cut) == weights(whole)
