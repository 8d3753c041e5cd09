"""The published experiments on posteriors and conditional densities, with tiny settings."""

import json
import os

import numpy as np
import pytest
import torch
from scipy.stats import multivariate_normal

import pathline as pl
from pathline import plots
from pathline.data import load_uci
from pathline.data.sbibm import Reference, load_abc
from pathline.errors import ArgumentError, DataError
from pathline.posterior import pilots
from pathline.posterior.simulators.stochastic_lotka_volterra import summaries
from pathline.reproduce import (
    EXPERIMENTS,
    RunArguments,
    conditional,
    inference,
    regressions,
    sbi_benchmark,
)

needs_data = pytest.mark.skipif(
    "PATHLINE_DATA" not in os.environ, reason="PATHLINE_DATA names no folder of data"
)


@pytest.fixture
def tiny(monkeypatch):
    """Few simulations and samples, and pictures that are not drawn."""
    monkeypatch.setattr(inference, "LV_SIMULATIONS", {"small": 300, "full": 300})
    monkeypatch.setattr(inference, "SW_SIZES", {"small": inference.SWSize(170, 150, 8)})
    monkeypatch.setattr(inference, "HELD_OUT", 30)
    monkeypatch.setattr(inference, "DRAWN", 300)
    monkeypatch.setattr(inference, "PREDICTED", 200)
    monkeypatch.setattr(inference, "MOST_PREDICTED", 110)
    monkeypatch.setattr(inference, "PILOTS", 2)
    monkeypatch.setattr(conditional, "PILOTS", 2)
    monkeypatch.setattr(conditional, "SPLITS", 2)
    monkeypatch.setattr(pilots, "LEAST_STEPS", 2)
    monkeypatch.setattr(plots, "to_png", lambda figure, dpi=110: b"PNG")


def pairs_of_a_line(rows, seed):
    """x = A y + noise of covariance S, with correlated noise."""
    rng = np.random.default_rng(seed)
    A = np.array([[1.0, -2.0, 0.5], [0.3, 0.0, 1.0]])
    S = np.array([[0.5, 0.2], [0.2, 0.3]])
    y = rng.normal(size=(rows, 3))
    return (y @ A.T + rng.multivariate_normal([1.0, -1.0], S, rows), y), A, S


def test_the_linear_gaussian_is_the_one_of_the_truth():
    train, A, S = pairs_of_a_line(50_000, 0)
    (x, y), _, _ = pairs_of_a_line(2000, 1)
    model = regressions.LinearGaussian(train)
    np.testing.assert_allclose(model.weights[:3].T, A, atol=0.02)
    np.testing.assert_allclose(model.root @ model.root.T, S, atol=0.01)
    want = -multivariate_normal([0, 0], model.root @ model.root.T).logpdf(
        x - y @ model.weights[:3] - model.weights[3]
    )
    assert model.nll((x, y)) == pytest.approx(want.mean(), rel=1e-12)


def test_the_network_has_the_density_it_says():
    """Its likelihood is that of a normal with its mean and covariance, which integrates to one."""
    network = regressions.GaussianNetwork(3, 2, torch.Generator().manual_seed(0))
    x, y = torch.randn(20, 3), torch.randn(20, 2)
    output = network.model(y)
    R = torch.diag_embed(output[:, 3:6].exp())
    R[:, 1, 0], R[:, 2, 0], R[:, 2, 1] = output[:, 6:].unbind(1)
    exact = torch.distributions.MultivariateNormal(output[:, :3], precision_matrix=R.mT @ R)
    torch.testing.assert_close(network.validate(torch.cat([x, y], 1)), -exact.log_prob(x))


def test_the_network_learns_a_width_that_depends_on_the_context():
    rng = np.random.default_rng(0)

    def draw(rows):
        y = rng.uniform(-1, 1, (rows, 1))
        return np.exp(y) * rng.normal(size=(rows, 1)), y

    train, validation, test = draw(3000), draw(500), draw(2000)
    found = regressions.gaussian_network(train, validation, test, max_steps=300)
    x, y = test
    exact = (y + 0.5 * (x / np.exp(y)) ** 2 + 0.5 * np.log(2 * np.pi)).mean()
    assert exact - 0.01 < found < exact + 0.03
    assert regressions.LinearGaussian(train).nll(test) > exact + 0.1


@pytest.mark.parametrize(
    ("name", "dim", "context_dim"),
    [
        ("concrete", 1, 8),
        pytest.param("energy", 1, 9, marks=needs_data),
        pytest.param("yacht", 1, 6, marks=needs_data),
        ("wine-red", 6, 5),
        ("wine-white", 6, 5),
        ("parkinsons", 8, 7),
    ],
)
def test_columns_and_splits_are_those_of_the_paper(name, dim, context_dim):
    splits, recipe, _ = conditional.load_splits(name, 5)
    assert len(splits) == 5
    assert (len(recipe.names), len(recipe.data_names)) == (dim, context_dim)
    rows = [[np.column_stack(part) for part in split] for split in splits]
    count = sum(map(len, rows[0]))
    for parts in rows:
        assert [len(part) for part in parts[1:]] == [count // 10, count // 10]
        together = np.concatenate(parts)
        assert len(np.unique(together, axis=0)) == count  # no row is in two parts
    assert not np.array_equal(rows[0][2], rows[1][2])
    if dim > 1:  # no two columns say nearly the same
        correlation = np.corrcoef(together.T) - np.eye(dim + context_dim)
        assert np.abs(correlation).max() < 0.98
    assert set(recipe.recipe.columns) <= set(load_uci(name.replace("-", "_")).columns)


def test_statistics_are_those_of_the_training_rows():
    rng = np.random.default_rng(0)
    train, test = [(rng.normal(3, 2, (50, 2)), rng.normal(size=(50, 1))) for _ in range(2)]
    (x, _), (moved, _) = conditional.standardised([train, test])
    np.testing.assert_allclose([x.mean(), x.std(0)[0]], [0, 1], atol=1e-12)
    np.testing.assert_allclose(moved, (test[0] - train[0].mean(0)) / train[0].std(0))


@pytest.mark.parametrize(("method", "size"), [("cot", "small"), ("pcp", "full")])
def test_a_table(method, size, tmp_path, tiny):
    experiment = EXPERIMENTS[f"{method}-uci-concrete"]
    arguments = RunArguments(tmp_path / "run", max_steps=10)
    outcome = experiment.run(arguments, size)
    figures = outcome.details["figures"]
    label = conditional.LABELS[method]
    assert set(figures) == {label, conditional.LINEAR, conditional.NETWORK}
    assert all(len(values) == 2 for values in figures.values())
    assert outcome.measured == pytest.approx(np.mean(figures[label]))
    assert (tmp_path / "run" / "report.html").stat().st_size > 1000
    # The first split's model is the run's, and its figure that of the held-out rows.
    flow = pl.load(tmp_path / "run").double()
    splits, _, _ = conditional.load_splits("concrete", 1)
    train, _, (x, context) = splits[0]
    with torch.no_grad():
        nll = -flow.log_prob(torch.from_numpy(x), torch.from_numpy(context)).mean().item()
    assert figures[label][0] == pytest.approx(nll - np.log(train[0].std()), abs=1e-9)
    again = experiment.run(RunArguments(tmp_path / "run", max_steps=10, resume=True), size)
    assert again == outcome
    with pytest.raises(ArgumentError, match="another max_steps"):
        experiment.run(RunArguments(tmp_path / "run", max_steps=11, resume=True), size)


def test_an_interrupted_table_goes_on(tmp_path, tiny, monkeypatch):
    experiment = EXPERIMENTS["cot-uci-concrete"]
    whole = experiment.run(RunArguments(tmp_path / "whole", max_steps=10), "small")
    calls = []

    def network(*_, **__):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return 0.0

    monkeypatch.setattr(conditional, "gaussian_network", network)
    with pytest.raises(KeyboardInterrupt):
        experiment.run(RunArguments(tmp_path / "run", max_steps=10), "small")
    assert not (tmp_path / "run" / "metrics.json").exists()
    outcome = experiment.run(RunArguments(tmp_path / "run", max_steps=10, resume=True), "small")
    assert outcome.measured == whole.measured


@needs_data
def test_the_known_references_are_those_of_the_files():
    for i, known in enumerate(inference.LV_KNOWN, 1):
        abc = load_abc(i)
        np.testing.assert_allclose(abc.true_parameters, known.truth)
        np.testing.assert_allclose(abc.observation, known.observation, rtol=2e-4, atol=6e-6)
        np.testing.assert_allclose(abc.samples.mean(0), known.mean, atol=6e-4)
        np.testing.assert_allclose(abc.samples.std(0), known.std, atol=6e-4)


def test_references_without_the_files(monkeypatch):
    monkeypatch.delenv("PATHLINE_DATA", raising=False)
    assert inference.lv_references() == list(inference.LV_KNOWN)


def test_features_are_finite_and_tell_all_paths_apart():
    """Also where a path is nearly a line, so that its autocorrelation exceeds one."""
    line = np.linspace(1, 100, 150)
    x = summaries(np.stack([line, line**2], 1)[None])
    assert x[0, 4] > 0.98
    worst = np.concatenate([x[0, :4], np.full(5, 150 / 149)])
    assert np.isfinite(inference.lv_features(np.stack([x[0], worst]))).all()
    features = inference.lv_features(x)
    back = np.tanh(features[..., 4:]) / 0.9999 * 150 / 149
    np.testing.assert_allclose(back, x[..., 4:], rtol=1e-12)
    np.testing.assert_allclose(np.expm1(features[..., :2]), x[..., :2])


def test_lotka_volterra(tmp_path, tiny, monkeypatch):
    monkeypatch.delenv("PATHLINE_DATA", raising=False)
    experiment, out = EXPERIMENTS["cot-lotka-volterra"], tmp_path / "run"
    outcome = experiment.run(RunArguments(out, max_steps=10), "small")
    rows = outcome.details["table"][1:]
    assert len(rows) == 8
    distances = [abs(float(r[5]) - float(r[3])) / float(r[4]) for r in rows if "(not" not in r[1]]
    assert len(distances) == 7
    assert outcome.measured == pytest.approx(max(distances), rel=0.02)
    metrics = json.loads((out / "metrics.json").read_text())
    assert metrics["simulations"] == 300 and metrics["lost_simulations"] > 0
    flow = pl.load(out)
    samples = flow.sample(
        50, torch.from_numpy(inference.lv_features(inference.LV_KNOWN[0].observation)), seed=0
    )
    assert ((samples > -5) & (samples < 2)).all()
    with pytest.raises(ArgumentError, match="not empty"):
        experiment.run(RunArguments(out), "small")


def test_shallow_water(tmp_path, tiny):
    out = tmp_path / "run"
    outcome = EXPERIMENTS["cot-shallow-water"].run(RunArguments(out, max_steps=10), "small")
    assert outcome.measured == outcome.details["figures"]["COT-Flow"]
    errors = outcome.details["depth_error"]
    assert errors["posterior"] < 10 and 2 < errors["prior"] < 6  # the prior's is sqrt(15) = 3.9
    assert 0 <= outcome.details["coverage_90"] <= 1
    assert (out / "report.html").exists() and pl.load(out).context_dim == 8


def test_components_of_shallow_water(monkeypatch):
    monkeypatch.setattr(inference, "CHUNK", 20)
    made = inference.shallow_water_pairs(inference.SWSize(90, 60, 5), 15, seed=0)
    assert [part.shape for part in (*made.pairs, *made.held)] == [
        *((90, 14), (90, 5)),
        *((15, 14), (15, 5)),
    ]
    # What the components lose of a depth is the share of the variance that they lack.
    missed = np.square(made.depth.restore(made.held[0]) - made.held_depth).mean() ** 0.5
    assert missed < 0.1
    assert len(np.unique(np.concatenate([made.pairs[0], made.held[0]]), axis=0)) == 105


@pytest.fixture
def references(monkeypatch):
    """Made-up references of two tasks, and a quick test of two samples."""

    def load(task, observation):
        if task not in ("two_moons", "gaussian_mixture"):
            raise DataError(f"there is no reference of {task}")
        rng = np.random.default_rng(observation)
        return Reference(rng.normal(size=2), rng.normal(size=2), rng.normal(size=(300, 2)))

    calls = []

    def c2st(x, y):
        assert x.shape == y.shape == (300, 2)
        calls.append(1)
        return 0.5 + 0.01 * len(calls)

    monkeypatch.setattr(sbi_benchmark, "load_reference", load)
    monkeypatch.setattr(sbi_benchmark, "c2st", c2st)
    monkeypatch.setattr(sbi_benchmark, "OBSERVATIONS", 2)
    monkeypatch.setattr(sbi_benchmark, "SIMULATIONS", {"small": 10_000, "full": 100_000})
    return calls


def test_the_sbi_benchmark(tmp_path, tiny, references):
    experiment = EXPERIMENTS["sbi-benchmark"]
    outcome = experiment.run(RunArguments(tmp_path / "run", max_steps=5), "small")
    found = outcome.details["c2st"]
    assert set(found) == {"two_moons", "gaussian_mixture"}
    assert found["two_moons"] == {"cot": [0.51, 0.52], "pcp": [0.53, 0.54]}
    assert outcome.measured == pytest.approx((0.515 + 0.555) / 2)
    assert outcome.published == pytest.approx((0.606 + 0.661) / 2)
    assert "bernoulli_glm, as there is no reference" in outcome.text
    (tmp_path / "run" / "metrics.json").unlink()  # as if interrupted before
    again = experiment.run(RunArguments(tmp_path / "run", max_steps=5, resume=True), "small")
    assert again.details["c2st"] == found and len(references) == 8  # nothing is judged twice


def test_the_sbi_benchmark_without_references(tmp_path, monkeypatch):
    monkeypatch.delenv("PATHLINE_DATA", raising=False)
    with pytest.raises(DataError, match="PATHLINE_DATA is not set"):
        EXPERIMENTS["sbi-benchmark"].run(RunArguments(tmp_path / "run"), "small")
    assert not (tmp_path / "run").exists()
