"""Posteriors on the command line: results, observations, calibration, one-line errors."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import pathline as pl
from pathline.cli import main
from pathline.data import read_table
from pathline.data.pairs import PairRecipe, check_pairs, choose_columns, read_pairs
from pathline.posterior.outliers import find_outliers, keep_contexts

PARAMETERS, DATA = ("growth", "size"), ("mean", "peak", "end")
MIX = np.array([[1.0, 0.5], [0.0, 1.0], [0.3, -0.4]])
NOISE = np.array([0.5, 0.7, 0.6])
SMALL = ["--max-steps", "4", "--width", "8", "--depth", "2"]


def simulate(rows: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """theta ~ N(0, I), and data that are linear in it with Gaussian noise."""
    rng = np.random.default_rng(seed)
    theta = rng.normal(size=(rows, 2))
    return theta, theta @ MIX.T + NOISE * rng.normal(size=(rows, 3))


def exact(observation: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean and covariance of the posterior."""
    precision = np.eye(2) + MIX.T @ (MIX / NOISE[:, None] ** 2)
    covariance = np.linalg.inv(precision)
    return covariance @ MIX.T @ (observation / NOISE**2), covariance


def write_csv(path: Path, values: np.ndarray, columns: tuple[str, ...]) -> Path:
    lines = [",".join(columns)] * bool(columns) + [
        ",".join(map(repr, row)) for row in np.atleast_2d(values).tolist()
    ]
    path.write_text("\n".join(lines) + "\n")
    return path


def save(path: Path, theta: np.ndarray, x: np.ndarray, **more: np.ndarray) -> Path:
    np.savez(path, theta=theta, x=x, **more)
    return path


def refused(capsys: pytest.CaptureFixture[str], arguments: list[str], *words: str) -> None:
    """The command ends with exit code 2 and one line that says why."""
    capsys.readouterr()
    assert main(arguments) == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    lines = [line for line in shown.err.strip().splitlines() if "warning" not in line]
    assert len(lines) == 1 and "Traceback" not in shown.err
    for word in words:
        assert word in lines[0]


def samples(folder: Path, run: str, observe: Path, *more: str) -> np.ndarray:
    out = folder / "drawn.csv"
    arguments = ["sample", str(folder / run), "--observe", str(observe), "--out", str(out)]
    assert main([*arguments, *(more if "-n" in more else ("-n", "50", *more))]) == 0
    return read_table(out).values


@pytest.fixture(scope="module")
def fitted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A short run on a table with names, parameters last."""
    folder = tmp_path_factory.mktemp("fitted")
    theta, x = simulate(2000, 0)
    file = write_csv(folder / "sims.csv", np.column_stack([x, theta]), (*DATA, *PARAMETERS))
    fit = ["fit", "posterior", str(file), "--parameters", "growth,size", "--width", "16"]
    assert main([*fit, "--out", str(folder / "run"), "--max-steps", "10"]) == 0
    return folder


@pytest.fixture(scope="module")
def unnamed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A shorter one on arrays without names."""
    folder = tmp_path_factory.mktemp("unnamed")
    file = save(folder / "sims.npz", *simulate(300, 1))
    assert main(["fit", "posterior", str(file), "--out", str(folder / "run"), *SMALL]) == 0
    return folder


def test_run_folder_and_report(fitted: Path) -> None:
    run = fitted / "run"
    metrics = json.loads((run / "metrics.json").read_text())
    assert metrics["calibration"]["passed"] and metrics["check"]["passed"]
    assert metrics["calibration"]["sbc"]["names"] == [*PARAMETERS, "log density"]
    baseline = metrics["classical"]["linear-Gaussian regression"]
    assert metrics["nll"] == pytest.approx(baseline, abs=0.05)  # which is the truth here
    for name in ("ranks", "coverage", "posterior"):
        assert (run / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    page = (run / "report.html").read_text()
    for heading in ("Calibration on held-out pairs", "Coverage", "An example", "Training"):
        assert heading in page
    assert page.count("<img") == 5
    before = metrics["calibration"]
    (run / "report.html").unlink()
    assert main(["report", str(run)]) == 0
    assert (run / "report.html").read_text() == page
    assert json.loads((run / "metrics.json").read_text())["calibration"] == before


def test_conjugate_posterior(fitted: Path) -> None:
    observation = np.array([1.0, -0.5, 0.8])
    observe = write_csv(fitted / "one.csv", observation, DATA)
    drawn = samples(fitted, "run", observe, "-n", "20000", "--seed", "3")
    mean, covariance = exact(observation)
    std = np.sqrt(np.diag(covariance))
    assert drawn.shape == (20_000, 2)
    np.testing.assert_allclose((drawn.mean(0) - mean) / std, 0, atol=0.15)
    np.testing.assert_allclose(drawn.std(0) / std, 1, atol=0.08)
    assert np.corrcoef(drawn.T)[0, 1] == pytest.approx(covariance[0, 1] / std.prod(), abs=0.08)


def test_observations_by_name_and_by_position(
    fitted: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    values = np.array([0.3, -0.2, 0.5])
    want = samples(fitted, "run", write_csv(fitted / "o.csv", values, DATA))
    assert read_table(fitted / "drawn.csv").columns == PARAMETERS
    same = {
        "turned": write_csv(fitted / "turned.csv", values[::-1], DATA[::-1]),
        "bare": write_csv(fitted / "bare.csv", values, ()),
        "more": write_csv(fitted / "more.csv", np.append(values, [9.0, 9.0]), (*DATA, *PARAMETERS)),
    }
    np.save(fitted / "flat.npy", values)
    np.savez(fitted / "flat.npz", x=values)
    same |= {"npy": fitted / "flat.npy", "npz": fitted / "flat.npz"}
    capsys.readouterr()
    for observe in same.values():
        np.testing.assert_array_equal(samples(fitted, "run", observe), want)
    assert "warning" not in capsys.readouterr().err
    foreign = write_csv(fitted / "foreign.csv", values, ("a", "b", "c"))
    np.testing.assert_array_equal(samples(fitted, "run", foreign), want)
    assert "by position" in capsys.readouterr().err
    assert (samples(fitted, "run", foreign, "--seed", "1") != want).all()


def test_training_data_without_names(unnamed: Path) -> None:
    values = np.array([0.3, -0.2, 0.5])
    want = samples(unnamed, "run", write_csv(unnamed / "bare.csv", values, ()))
    assert read_table(unnamed / "drawn.csv").columns == ("theta0", "theta1")
    named = write_csv(unnamed / "named.csv", values, DATA)
    np.testing.assert_array_equal(samples(unnamed, "run", named), want)
    pair = save(unnamed / "pair.npz", np.zeros((1, 2)), values[None])
    np.testing.assert_array_equal(samples(unnamed, "run/model", pair), want)


def test_several_observations(fitted: Path, capsys: pytest.CaptureFixture[str]) -> None:
    values = np.array([[0.3, -0.2, 0.5], [1.0, 1.0, 0.0]])
    drawn = samples(fitted, "run", write_csv(fitted / "two.csv", values, DATA))
    assert read_table(fitted / "drawn.csv").columns == ("observation", *PARAMETERS)
    np.testing.assert_array_equal(drawn[:, 0], np.repeat([1, 2], 50))
    one = samples(fitted, "run", write_csv(fitted / "one.csv", values[0], DATA))
    np.testing.assert_array_equal(drawn[:50, 1:], one)
    assert (np.abs(drawn[50:, 1:].mean(0) - exact(values[1])[0]) < 0.3).all()


def test_observation_far_outside(fitted: Path, capsys: pytest.CaptureFixture[str]) -> None:
    contexts = load_file(fitted / "run/model/contexts.safetensors")["contexts"]
    assert contexts.shape == (2000, 3)
    observe = write_csv(fitted / "far.csv", np.array([0.0, 60.0, 0.0]), DATA)
    samples(fitted, "run", observe)
    warned = capsys.readouterr().err
    assert "warning" in warned and "peak is 60" in warned and "robust standard deviations" in warned


def test_kept_contexts_have_the_range_of_all(tmp_path: Path) -> None:
    rows = np.random.default_rng(0).standard_t(2, size=(10_000, 4))
    assert find_outliers(tmp_path, rows[:2], tuple("abcd")) == {}  # a model that keeps none
    keep_contexts(tmp_path, rows)
    contexts = load_file(tmp_path / "contexts.safetensors")["contexts"].numpy()
    assert contexts.shape == (2000, 4)
    np.testing.assert_array_equal(contexts.min(0), rows.min(0))
    np.testing.assert_array_equal(contexts.max(0), rows.max(0))
    far = np.vstack([rows[0], 2 * rows.max(0)])
    assert list(find_outliers(tmp_path, far, tuple("abcd"))) == [1]


def test_bad_observations(fitted: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def observe(name: str, values: list[float], columns: tuple[str, ...] = ()) -> list[str]:
        file = write_csv(tmp_path / f"{name}.csv", np.array(values), columns)
        out = str(tmp_path / "out.csv")
        return ["sample", str(fitted / "run"), "--observe", str(file), "--out", out]

    refused(capsys, observe("short", [1.0, 2.0]), "3 columns", "got 2")
    refused(capsys, observe("lack", [1.0, 2.0], DATA[:2]), "lacks end")
    refused(capsys, observe("nan", [1.0, np.nan, 1.0], DATA), "missing")
    refused(capsys, observe("inf", [1.0, np.inf, 1.0], DATA), "finite")
    refused(capsys, ["sample", str(fitted / "run"), "--out", "p.csv"], "conditional", "--observe")
    missing = ["sample", str(fitted / "run"), "--observe", str(tmp_path / "no.csv")]
    refused(capsys, [*missing, "--out", "p.csv"], "does not exist")
    assert not (tmp_path / "out.csv").exists()
    np.save(tmp_path / "x.npy", simulate(100, 0)[0])
    plain = ["fit", "density", str(tmp_path / "x.npy"), "--out", str(tmp_path / "plain")]
    assert main([*plain, "--max-steps", "2"]) == 0
    short = str(tmp_path / "short.csv")
    given = ["sample", str(tmp_path / "plain"), "--observe", short, "--out", "p.csv"]
    refused(capsys, given, "--observe", "no context")


def test_score(fitted: Path, unnamed: Path, capsys: pytest.CaptureFixture[str]) -> None:
    theta, x = simulate(60, 5)
    flow = pl.load(fitted / "run").double()
    want = flow.log_prob(torch.from_numpy(theta), torch.from_numpy(x)).detach().numpy()
    both = np.column_stack([theta, x])
    files = (
        write_csv(fitted / "t.csv", both, (*PARAMETERS, *DATA)),  # by name, in another order
        write_csv(fitted / "u.csv", np.column_stack([x, theta]), ()),  # as the training table
        save(fitted / "t.npz", theta, x),
    )
    out = fitted / "scores.csv"
    for file in files:
        capsys.readouterr()
        assert main(["score", str(fitted / "run"), str(file), "--out", str(out), "--json"]) == 0
        np.testing.assert_allclose(read_table(out).values[:, 0], want, rtol=1e-9)
        mean = json.loads(capsys.readouterr().out)["mean_log_prob"]
        assert mean == pytest.approx(want.mean(), rel=1e-9)
    wrong = save(fitted / "w.npz", both[:, :3], both[:, 3:])
    refused(capsys, ["score", str(fitted / "run"), str(wrong)], "2 parameters", "got 3")
    few = save(fitted / "f.npz", theta, x[:, :2])
    refused(capsys, ["score", str(fitted / "run"), str(few)], "5 columns", "got 4")


def test_check(fitted: Path, capsys: pytest.CaptureFixture[str]) -> None:
    theta, x = simulate(250, 6)
    run, good = str(fitted / "run"), save(fitted / "good.npz", theta, x)
    pictures = (fitted / "run/ranks.png").read_bytes()
    assert main(["check", run, str(good), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["passed"] and found["calibration"]["sbc"]["rows"] == 250
    assert (fitted / "run/ranks.png").read_bytes() != pictures
    assert "Calibration on good.npz" in (fitted / "run/report.html").read_text()
    # Noise that the simulator does not have: the posterior is over-confident.
    wide = save(fitted / "wide.npz", theta, theta @ MIX.T + 2 * (x - theta @ MIX.T))
    assert main(["check", run, str(wide)]) == 1
    assert "over-confident" in capsys.readouterr().out
    assert "NOT passed" in (fitted / "run/report.html").read_text()
    few = save(fitted / "few.npz", theta[:5], x[:5])
    refused(capsys, ["check", run, str(few)], "at least 20")


def bad_pairs(folder: Path) -> dict[str, tuple[list[str], tuple[str, ...]]]:
    """Arguments that are refused, and words of the error."""
    theta, x = simulate(60, 7)
    nan, flat = x.copy(), theta.copy()
    nan[[3, 8], 1], flat[:, 1] = np.nan, 2.0
    table = write_csv(folder / "t.csv", np.column_stack([theta, x]), (*PARAMETERS, *DATA))
    sims = str(save(folder / "sims.npz", theta, x))
    np.savez(folder / "lone.npz", theta=theta)
    return {
        "missing": ([str(folder / "nowhere.npz")], ("does not exist",)),
        "nan": ([str(save(folder / "nan.npz", theta, nan))], ("2 missing values in 2 rows",)),
        "rows": ([str(save(folder / "rows.npz", theta, x[:50]))], ("60 and 50",)),
        "three": ([str(save(folder / "three.npz", theta, x[:, :, None]))], ("(60, 3, 1)",)),
        "flat": ([str(save(folder / "flat.npz", flat, x))], ("constant", "theta1")),
        "object": (
            [str(save(folder / "object.npz", theta, np.array([{}] * 60, dtype=object)))],
            ("object.npz",),
        ),
        "lone": ([str(folder / "lone.npz")], ("'theta' and 'x'",)),
        "bounds": ([sims, "--support", "theta1=[-1,1]"], ("column 'theta1'", "(-1, 1)")),
        "support": ([sims, "--support", "x1=positive"], ("unknown column 'x1'", "theta0")),
        "told": ([sims, "--parameters", "theta0"], ("--parameters", "--drop")),
        "nobody": ([str(table)], ("--parameters", "growth")),
        "unknown": ([str(table), "--parameters", "grwth"], ("did you mean 'growth'",)),
        "both": ([str(table), "--parameters", "growth", "--data", "growth"], ("can't be in",)),
        "all": ([str(table), "--parameters", ",".join((*PARAMETERS, *DATA))], ("no column",)),
        "pilots": ([sims, "--pilots", "-1"], ("--pilots",)),
        "method": ([sims, "--method", "cots"], ("--method",)),
        "corrupt": ([str(folder / "corrupt.npz")], ("corrupt.npz",)),
    }


BAD = (
    "missing", "nan", "rows", "three", "flat", "object", "lone", "bounds", "support", "told",
    "nobody", "unknown", "both", "all", "pilots", "method", "corrupt",
)  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_pairs(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "corrupt.npz").write_bytes(b"PK\x03\x04xxxx")
    arguments, words = bad_pairs(tmp_path)[name]
    out = tmp_path / "run"
    refused(capsys, ["fit", "posterior", *arguments, "--out", str(out)], *words)
    assert not out.exists()


def test_failed_simulations_and_constants(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    theta, x = simulate(200, 8)
    x[[3, 8], 1], x[20, 0], x[:, 2] = np.nan, np.inf, 4.0
    file, run = save(tmp_path / "sims.npz", theta, x), tmp_path / "run"
    fit = ["fit", "posterior", str(file), "--out", str(run), "--missing", "drop", *SMALL]
    assert main([*fit, "--support", "theta0=[-9,9]"]) == 0
    told = capsys.readouterr().err
    assert "3 of 200 rows" in told and "constant columns of the data" in told and "x2" in told
    config = json.loads((run / "config.json").read_text())
    assert config["data"]["rows"] + config["data"]["validation_rows"] == 197
    assert config["model"]["support"] == [[-9.0, 9.0], [None, None]]
    metrics = json.loads((run / "metrics.json").read_text())
    assert metrics["calibration"] is None and "at least 20" in metrics["calibration_skipped"]


def test_conditional_of_a_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    theta, x = simulate(300, 9)
    counts = np.random.default_rng(0).integers(0, 4, 300)
    values = np.column_stack([x, theta, counts])
    file = write_csv(tmp_path / "t.csv", values, (*DATA, *PARAMETERS, "count"))
    fit = ["fit", "conditional", str(file), "--out", str(tmp_path / "run"), *SMALL, "--json"]
    target = ["--target", "count", "--target", "growth", "--dequantize", "count", "--drop", "size"]
    refused(capsys, [*fit, "--target", "count"], "discrete", "--dequantize count")
    assert main([*fit, *target, "--validation", str(file)]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert shown["nll_rows"] == 300
    observe = write_csv(tmp_path / "o.csv", x[0], DATA)
    drawn = samples(tmp_path, "run", observe)
    assert read_table(tmp_path / "drawn.csv").columns == ("count", "growth")
    np.testing.assert_array_equal(drawn[:, 0], np.round(drawn[:, 0]))
    refused(capsys, [*fit[:5]], "--target")


def test_netcdf(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    xarray = pytest.importorskip("xarray")
    theta, x = simulate(100, 10)
    content = xarray.Dataset(
        {"theta": (("row", "parameter"), theta), "x": (("row", "feature"), x)},
        {"parameter": list(PARAMETERS), "feature": list(DATA)},
    )
    content.to_netcdf(tmp_path / "sims.nc")
    fit = ["fit", "posterior", str(tmp_path / "sims.nc"), "--out", str(tmp_path / "run")]
    assert main([*fit, *SMALL]) == 0
    content[["x"]].isel(row=[4]).to_netcdf(tmp_path / "obs.nc")
    drawn = samples(tmp_path, "run", tmp_path / "obs.nc")
    assert read_table(tmp_path / "drawn.csv").columns == PARAMETERS
    turned = write_csv(tmp_path / "o.csv", x[4, ::-1], DATA[::-1])
    np.testing.assert_array_equal(samples(tmp_path, "run", turned), drawn)
    content[["theta"]].to_netcdf(tmp_path / "lone.nc")
    refused(capsys, ["score", str(tmp_path / "run"), str(tmp_path / "lone.nc")], "'x'")


def test_dropped_columns(tmp_path: Path) -> None:
    """Marginal posteriors: other files have the same columns, with or without the dropped ones."""
    theta, x = simulate(50, 14)
    table, told = read_pairs(save(tmp_path / "sims.npz", theta, x))
    names = choose_columns(table, told, (), ())
    table, recipe = check_pairs(table, *names, drop=["theta0", "x1"])
    assert recipe.names == ("theta1",) and recipe.data_names == ("x0", "x2")
    np.testing.assert_array_equal(table.values, np.column_stack([theta[:, 1], x[:, [0, 2]]]))
    recipe = PairRecipe.from_metadata(json.loads(json.dumps(recipe.metadata())))
    files = (
        save(tmp_path / "all.npz", theta, x),
        save(tmp_path / "kept.npz", theta[:, 1], x[:, [0, 2]]),
        write_csv(tmp_path / "all.csv", np.column_stack([theta, x]), ()),
        write_csv(
            tmp_path / "turned.csv",
            np.column_stack([x[:, 2], theta[:, 1], x[:, 0]]),
            ("x2", "theta1", "x0"),
        ),
    )
    for file in files:
        got = recipe.pairs(file)
        np.testing.assert_array_equal(got[0], theta[:, 1:])
        np.testing.assert_array_equal(got[1], x[:, [0, 2]])
    for name, values in (("three", x[:4]), ("two", x[:4, [0, 2]])):
        observed = recipe.observations(write_csv(tmp_path / f"{name}.csv", values, ()))
        np.testing.assert_array_equal(observed, x[:4, [0, 2]])


def test_pcp(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    theta, x = simulate(300, 13)
    file = save(tmp_path / "sims.npz", theta, x)
    fit = ["fit", "posterior", str(file), "--method", "pcp", "--out", str(tmp_path / "run")]
    refused(capsys, [*fit, "--transport", "1"], "'pcp' has no option transport")
    assert main([*fit, *SMALL]) == 0
    drawn = samples(tmp_path, "run", write_csv(tmp_path / "o.csv", x[0], ()))
    assert np.isfinite(drawn).all() and drawn.shape == (50, 2)
    assert "PCP-Map" in (tmp_path / "run/report.html").read_text()


def weights(run: Path) -> bytes:
    (file,) = (run / "model").glob("weights-*.safetensors")
    return file.read_bytes()


def test_pilots(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = save(tmp_path / "sims.npz", *simulate(150, 11))
    fit = ["fit", "posterior", str(file), "--max-steps", "8", "--width", "8", "--pilots"]
    for name in ("one", "two"):
        assert main([*fit, "3", "--out", str(tmp_path / name)]) == 0
        assert "pilot run 3 of 3" in capsys.readouterr().err
    config = json.loads((tmp_path / "one/config.json").read_text())
    pilots = config["metadata"]["pilots"]
    assert pilots == json.loads((tmp_path / "two/config.json").read_text())["metadata"]["pilots"]
    assert weights(tmp_path / "one") == weights(tmp_path / "two")
    assert [p["nll"] for p in pilots] == sorted(p["nll"] for p in pilots)
    assert {p["width"] for p in pilots} == {8}  # given, so not searched
    assert sum("depth" in p for p in pilots) == 2  # the first run has the defaults
    assert config["model"]["depth"] == pilots[0].get("depth", 3)
    assert "Pilot runs" in (tmp_path / "one/report.html").read_text()
    resume = [*fit, "3", "--out", str(tmp_path / "one"), "--resume"]
    assert main(resume) == 0
    assert "pilot run" not in capsys.readouterr().err
    refused(capsys, [*fit, "2", "--out", str(tmp_path / "one"), "--resume"], "--pilots 3, now 2")
    refused(capsys, [*fit, "2", "--out", str(tmp_path / "one")], "not empty")


def test_stopped_run_resumes_bit_for_bit(tmp_path: Path) -> None:
    file = save(tmp_path / "sims.npz", *simulate(150, 12))
    fit = ["fit", "posterior", str(file), *SMALL[2:], "--max-steps", "60", "--out"]
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    assert main([*fit, str(whole)]) == 0
    process = subprocess.Popen(
        [sys.executable, "-m", "pathline", *fit, str(cut)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    while not (cut / "checkpoint/state.safetensors").exists():
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    process.communicate()
    assert process.returncode == 130
    assert not (cut / "metrics.json").exists()
    observe = write_csv(tmp_path / "far.csv", np.array([0.0, 60.0, 0.0]), ())
    assert samples(tmp_path, "cut", observe).shape == (50, 2)  # a stopped run has a model
    assert main([*fit, str(cut), "--resume"]) == 0
    assert weights(cut) == weights(whole)
    np.testing.assert_array_equal(
        samples(tmp_path, "cut", observe), samples(tmp_path, "whole", observe)
    )
