"""`ConditionalFlowDensity`: scikit-learn's own checks, and regressions with a known answer."""

import pickle

import numpy as np
import pandas as pd
import pytest
import torch
from scipy.stats import multivariate_normal, norm
from sklearn.base import clone
from sklearn.exceptions import NotFittedError
from sklearn.model_selection import cross_val_score
from sklearn.utils.estimator_checks import parametrize_with_checks

from pathline.errors import ArgumentError, DataError, ShapeError
from pathline.estimators import ConditionalFlowDensity

SLOPE = np.array([[1.0, -0.5], [0.0, 2.0]])
NOISE = np.array([[0.5, 0.2], [0.2, 0.3]])


def linear(n, seed, targets=2):
    """Features, and targets that are Gaussian given them."""
    rng = np.random.default_rng(seed)
    X = rng.normal(3, 2, size=(n, 2))
    y = X @ SLOPE.T + rng.multivariate_normal(np.zeros(2), NOISE, n)
    return X, y[:, 0] if targets == 1 else y


def small(**settings):
    return ConditionalFlowDensity(**({"width": 8, "max_steps": 6, "random_state": 0} | settings))


@pytest.fixture(scope="module")
def fitted():
    return ConditionalFlowDensity(max_steps=40, random_state=0).fit(*linear(2000, 0))


# Both call score_samples(X), where this one has score_samples(X, y): see the test after these.
NEEDS_Y = dict.fromkeys(
    ("check_methods_sample_order_invariance", "check_methods_subset_invariance"),
    "score_samples needs y",
)


@parametrize_with_checks(
    [ConditionalFlowDensity(width=4, depth=2, max_steps=2)],
    expected_failed_checks=lambda estimator: NEEDS_Y,
)
def test_scikit_learn(estimator, check):
    """Every check of scikit-learn but two."""
    check(estimator)


def test_rows_are_independent():
    X, y = linear(60, 8)
    model = small().fit(X, y)
    order = np.random.default_rng(0).permutation(60)
    for part in (order, order[:7], order[:1]):
        for found, want in (
            (model.predict(X[part]), model.predict(X)[part]),
            (model.score_samples(X[part], y[part]), model.score_samples(X, y)[part]),
        ):
            np.testing.assert_allclose(found, want, rtol=1e-9, atol=1e-9)


def test_linear_gaussian_density(fitted):
    X, y = linear(2000, 1)
    residual = y - X @ SLOPE.T
    truth = multivariate_normal(np.zeros(2), NOISE).logpdf(residual)
    assert fitted.score(X, y) == pytest.approx(truth.mean(), abs=0.05)
    assert fitted.score(X, y) == fitted.score_samples(X, y).mean()
    assert fitted.score_samples(X, y).shape == (2000,)


def test_predict_samples_and_quantiles(fitted):
    X, _ = linear(50, 2)
    mean = X @ SLOPE.T
    std = np.sqrt(np.diag(NOISE))
    np.testing.assert_allclose((fitted.predict(X) - mean) / std, 0, atol=0.25)
    draws = fitted.sample(X, 2000, random_state=0)
    assert draws.shape == (50, 2000, 2)
    np.testing.assert_allclose((draws.mean(1) - mean) / std, 0, atol=0.3)
    np.testing.assert_allclose(draws.std(1) / std, 1, atol=0.2)
    levels = [0.1, 0.5, 0.9]
    found = fitted.quantiles(X, levels)
    assert found.shape == (50, 3, 2)
    want = mean[:, None] + norm.ppf(levels)[None, :, None] * std
    np.testing.assert_allclose((found - want) / std, 0, atol=0.35)


def test_one_target_and_the_same_seed():
    X, y = linear(200, 3, targets=1)
    model, again = small().fit(X, y), small().fit(X, y)
    assert model.predict(X).shape == (200,)
    assert model.sample(X[:4], 7, random_state=1).shape == (4, 7)
    assert model.quantiles(X[:4], [0.2, 0.8]).shape == (4, 2)
    assert (np.diff(model.quantiles(X, [0.2, 0.5, 0.8])) > 0).all()
    np.testing.assert_array_equal(model.score_samples(X, y), again.score_samples(X, y))
    np.testing.assert_array_equal(
        model.sample(X, 2, random_state=5), again.sample(X, 2, random_state=5)
    )
    np.testing.assert_array_equal(model.score_samples(X, y), model.score_samples(X, y[:, None]))


def test_weights_are_repetitions():
    X, y = linear(40, 4)
    weights = np.random.default_rng(0).integers(0, 4, 40)
    repeated = small().fit(np.repeat(X, weights, 0), np.repeat(y, weights, 0))
    weighted = small().fit(X, y, sample_weight=weights)
    np.testing.assert_array_equal(repeated.predict(X), weighted.predict(X))


def test_support():
    X, y = linear(300, 5, targets=1)
    model = small(support=[(0, np.inf)]).fit(X, np.exp(y / 4))
    assert (model.sample(X, 20, random_state=0) > 0).all()
    assert np.isneginf(model.score_samples(X[:1], [-1.0]))[0]


def test_tools_of_scikit_learn():
    X, y = linear(90, 6)
    frame = pd.DataFrame(X, columns=["a", "b"])
    model = small().fit(frame, y)
    assert list(model.feature_names_in_) == ["a", "b"]
    assert np.isfinite(cross_val_score(small(), X, y, cv=3)).all()
    copy = pickle.loads(pickle.dumps(model))
    np.testing.assert_array_equal(copy.predict(frame), model.predict(frame))
    assert clone(model).get_params() == model.get_params()
    state = torch.get_rng_state()
    small().fit(X, y).sample(X, random_state=0)
    assert torch.equal(torch.get_rng_state(), state)


def test_errors(fitted):
    X, y = linear(50, 7)
    with pytest.raises(NotFittedError):
        small().predict(X)
    with pytest.raises(ShapeError, match=r"`y` must have 50 rows like `X` and the 2 targets"):
        fitted.score_samples(X, y[:, :1])
    with pytest.raises(ArgumentError, match="`levels`"):
        fitted.quantiles(X, [0.5, 1.0])
    with pytest.raises(ArgumentError, match="`n_samples`"):
        fitted.sample(X, 0)
    with pytest.raises(ArgumentError, match="unknown method 'cots'"):
        small(method="cots").fit(X, y)
    with pytest.raises(ArgumentError, match="width"):
        small(width=-1).fit(X, y)
    with pytest.raises(DataError, match="constant"):
        small().fit(X, np.column_stack([y[:, 0], np.ones(50)]))
    with pytest.raises(ValueError, match="NaN"):
        small().fit(X, np.where(y > 5, np.nan, y))
