"""`FlowDensity`: scikit-learn's own checks, exact densities, weights, seeds and errors."""

import math
import pickle

import numpy as np
import pandas as pd
import pytest
import torch
from scipy.stats import multivariate_normal
from sklearn.base import clone
from sklearn.exceptions import NotFittedError
from sklearn.model_selection import GridSearchCV
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.utils.estimator_checks import parametrize_with_checks

import pathline as pl
from pathline.errors import ArgumentError, DataError, PathlineError, ShapeError
from pathline.estimators import FlowDensity

MEAN = np.array([3.0, -1.0])
ROOT = np.array([[2.0, 0.0], [1.5, 0.5]])
COVARIANCE = ROOT @ ROOT.T
ROWS = np.random.default_rng(1).normal(size=(60, 2)) @ ROOT.T + MEAN


def gaussian_rows(n, seed):
    return np.random.default_rng(seed).normal(size=(n, 2)) @ ROOT.T + MEAN


def small(**settings):
    return FlowDensity(**({"width": 8, "max_steps": 8, "random_state": 0} | settings))


@pytest.fixture(scope="module")
def gaussian():
    """Fitted to 2000 rows of a correlated Gaussian."""
    return FlowDensity(max_steps=100, random_state=0).fit(gaussian_rows(2000, seed=0))


@parametrize_with_checks([FlowDensity(width=4, max_steps=3)])
def test_scikit_learn(estimator, check):
    """Every check of scikit-learn; none is expected to fail."""
    check(estimator)


# Densities and samples


def test_gaussian_density(gaussian):
    fresh = gaussian_rows(4000, seed=2)
    truth = multivariate_normal(MEAN, COVARIANCE).logpdf(fresh).mean()
    assert gaussian.score(fresh) == pytest.approx(truth, abs=0.05)


def test_sample_moments(gaussian):
    drawn = gaussian.sample(4000, random_state=3)
    assert drawn.shape == (4000, 2)
    assert drawn.dtype == np.float64
    whitened = np.linalg.solve(ROOT, (drawn - MEAN).T)
    np.testing.assert_allclose(whitened.mean(1), 0, atol=0.15)
    np.testing.assert_allclose(np.cov(whitened), np.eye(2), atol=0.15)


def test_double_precision(gaussian):
    x = gaussian_rows(50, seed=4)
    log_prob = gaussian.score_samples(x)
    assert log_prob.dtype == np.float64
    assert log_prob.shape == (50,)
    with torch.no_grad():
        expected = gaussian.flow_.log_prob(torch.tensor(x)).numpy()
    np.testing.assert_array_equal(log_prob, expected)
    # Single precision anywhere in between would drown so small a difference in its round-off.
    near, far = (
        (gaussian.score_samples(x + shift) - gaussian.score_samples(x - shift)) / shift[0]
        for shift in (np.array([1e-7, 0]), np.array([1e-4, 0]))
    )
    np.testing.assert_allclose(near, far, rtol=1e-4, atol=1e-5)


def test_score_is_the_mean(gaussian):
    x = gaussian_rows(50, seed=4)
    score = gaussian.score(x)
    assert isinstance(score, float)
    assert score == pytest.approx(gaussian.score_samples(x).mean(), rel=1e-14)


def test_mass_and_support():
    x = np.random.default_rng(0).exponential(size=(200, 1))
    model = small(support=[(0.0, math.inf)]).fit(x)
    grid = np.geomspace(1e-6, 200, 4001)
    assert np.trapezoid(np.exp(model.score_samples(grid[:, None])), grid) == pytest.approx(
        1, abs=2e-3
    )
    assert model.score_samples([[-0.1]]) == -math.inf
    assert (model.sample(500, random_state=0) > 0).all()


# Weights and seeds


def test_integer_weights_repeat_rows():
    weights = np.random.default_rng(0).integers(0, 4, len(ROWS))
    weighted = small().fit(ROWS, sample_weight=weights)
    repeated = small().fit(np.repeat(ROWS, weights, axis=0)[::-1])
    np.testing.assert_array_equal(weighted.score_samples(ROWS), repeated.score_samples(ROWS))


def test_only_proportions_of_weights_matter():
    weights = np.random.default_rng(0).integers(1, 4, len(ROWS))
    a, b = (small().fit(ROWS, sample_weight=scale * weights) for scale in (1, 0.25))
    np.testing.assert_allclose(a.score_samples(ROWS), b.score_samples(ROWS), rtol=1e-6)
    unweighted = small().fit(ROWS)
    equal = small().fit(ROWS, sample_weight=np.full(len(ROWS), 0.3))
    np.testing.assert_array_equal(unweighted.score_samples(ROWS), equal.score_samples(ROWS))


def test_weights_have_an_effect():
    x = np.concatenate([ROWS, ROWS + 40])
    left = np.r_[np.ones(len(ROWS)), np.full(len(ROWS), 1e-3)]
    preferred, even = small().fit(x, sample_weight=left), small().fit(x)
    assert preferred.score(ROWS) > even.score(ROWS) + 0.5
    assert preferred.score(ROWS + 40) < even.score(ROWS + 40) - 0.5


def test_random_state_decides_everything():
    torch.manual_seed(5)
    first = small().fit(ROWS)
    torch.manual_seed(6)
    again = small().fit(ROWS)
    np.testing.assert_array_equal(first.score_samples(ROWS), again.score_samples(ROWS))
    np.testing.assert_array_equal(first.sample(3, random_state=1), again.sample(3, random_state=1))
    assert not np.array_equal(first.sample(3, random_state=1), first.sample(3, random_state=2))
    source = np.random.RandomState(0)
    same = small(random_state=source).fit(ROWS)
    np.testing.assert_array_equal(first.score_samples(ROWS), same.score_samples(ROWS))
    for other in (1, source):  # `source` has moved on
        model = small(random_state=other).fit(ROWS)
        assert not np.array_equal(first.score_samples(ROWS), model.score_samples(ROWS))


# Among scikit-learn's tools


def test_grid_search_over_width():
    grid = {"width": np.array([4, 8])}
    search = GridSearchCV(small(), grid, cv=2).fit(ROWS)
    assert search.best_params_["width"] in (4, 8)
    assert np.isfinite(search.cv_results_["mean_test_score"]).all()
    assert search.best_estimator_.flow_.potential.width == search.best_params_["width"]


def test_pipeline_changes_units_only():
    """The flow standardises by itself, so scaling first changes the log-density by a constant."""
    scaled = make_pipeline(StandardScaler(), small()).fit(ROWS)
    log_slope = -np.log(scaled[0].scale_).sum()
    direct = small().fit(ROWS)
    np.testing.assert_allclose(
        scaled.score_samples(ROWS) + log_slope, direct.score_samples(ROWS), atol=1e-3
    )


def test_pickle_and_clone():
    model = small().fit(ROWS)
    copy = pickle.loads(pickle.dumps(model))
    np.testing.assert_array_equal(copy.score_samples(ROWS), model.score_samples(ROWS))
    fresh = clone(model)
    assert fresh.get_params() == model.get_params()
    with pytest.raises(NotFittedError):
        fresh.score(ROWS)


def test_flow_can_be_saved(tmp_path):
    model = small().fit(ROWS)
    pl.save(model.flow_, tmp_path / "model")
    with torch.no_grad():
        log_prob = pl.load(tmp_path / "model").log_prob(torch.tensor(ROWS)).numpy()
    np.testing.assert_allclose(log_prob, model.score_samples(ROWS), rtol=1e-12)


def test_data_frames():
    frame = pd.DataFrame(ROWS, columns=["height", "weight"])
    model = small().fit(frame)
    assert model.feature_names_in_.tolist() == ["height", "weight"]
    assert model.n_features_in_ == 2
    assert model.n_iter_ == 8
    np.testing.assert_array_equal(model.score_samples(frame), small().fit(ROWS).score_samples(ROWS))
    with pytest.raises(ValueError, match="feature names"):
        model.score_samples(frame[["weight", "height"]])


def test_verbose_writes_to_standard_error(capsys):
    small().fit(ROWS)
    assert capsys.readouterr() == ("", "")
    small(verbose=True).fit(ROWS)
    out, err = capsys.readouterr()
    assert out == ""
    assert "nll" in err


# Errors


@pytest.mark.parametrize("method", ["score_samples", "score", "sample"])
def test_not_fitted(method):
    with pytest.raises(NotFittedError, match="not fitted yet"):
        getattr(FlowDensity(), method)(*([] if method == "sample" else [ROWS]))


@pytest.mark.parametrize(
    ("settings", "x", "weights", "error", "text"),
    [
        ({}, ROWS[:1], None, ValueError, "1 sample"),
        ({}, ROWS[[0, 1] * 9], None, DataError, "3 different rows .* got 2 in n_samples=18"),
        ({}, ROWS, np.r_[1, 1, np.zeros(58)], DataError, "3 different rows .* got 2"),
        ({}, ROWS * [0, 1], None, DataError, r"constant columns.*\[0\]"),
        (
            {},
            gaussian_rows(200, 0) @ [[1, 2], [1, 2]],
            None,
            DataError,
            "linearly dependent columns",
        ),
        ({}, ROWS * [1, np.nan], None, ValueError, "Input X contains NaN"),
        ({}, ROWS, -np.ones(60), DataError, "`sample_weight` must not be negative"),
        ({}, ROWS, np.zeros(60), DataError, "`sample_weight` .* not be all zero"),
        ({}, ROWS, np.ones(59), ShapeError, r"`sample_weight` must be \(60,\), got \(59,\)"),
        ({}, ROWS, np.full(60, np.inf), ValueError, "sample_weight contains infinity"),
        ({"width": 0}, ROWS, None, ArgumentError, "`width` must be a positive integer, got 0"),
        ({"hjb": -1.0}, ROWS, None, ArgumentError, "`hjb` must be finite and >= 0"),
        ({"max_steps": 2.5}, ROWS, None, ArgumentError, "`max_steps` must be a positive integer"),
        ({"support": [(0, 1)]}, ROWS, None, ArgumentError, "`support` must hold 2 pairs"),
        ({"support": [(90, 99)] * 2}, ROWS, None, DataError, "outside the bounds of column 0"),
    ],
)
def test_bad_input(settings, x, weights, error, text):
    with pytest.raises(error, match=text) as caught:
        small(**settings).fit(x, sample_weight=weights)
    assert isinstance(caught.value, ValueError)


@pytest.mark.parametrize("n_samples", [0, -1, 2.5])
def test_sample_needs_a_count(gaussian, n_samples):
    with pytest.raises(PathlineError, match="`n_samples` must be a positive integer"):
        gaussian.sample(n_samples)
