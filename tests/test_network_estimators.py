"""`ContinuousClassifier` and `ContinuousRegressor`: scikit-learn's checks, accuracy, weights."""

import numpy as np
import pytest
import torch
from sklearn.base import clone
from sklearn.utils.estimator_checks import parametrize_with_checks

from pathline.errors import ArgumentError
from pathline.estimators import ContinuousClassifier, ContinuousRegressor


@parametrize_with_checks(
    [
        ContinuousClassifier(width=8, steps=1, max_steps=20, learning_rate=0.05),
        ContinuousRegressor(steps=1, max_steps=25, learning_rate=0.05),
    ]
)
def test_scikit_learn(estimator, check):
    """Every check of scikit-learn; none is expected to fail."""
    check(estimator)


def rings(n, seed):
    """An ellipse inside of another: radii in (0, 1) and (1, 2), the second axis shrunk."""
    rng = np.random.default_rng(seed)
    inside = rng.random(n) < 0.5
    radius = rng.random(n) + np.where(inside, 0, 1)
    angle = 2 * np.pi * rng.random(n)
    x = np.column_stack([radius * np.cos(angle), 0.4 * radius * np.sin(angle)])
    return x, np.where(inside, "in", "out")


@pytest.fixture(scope="module")
def classifier():
    x, y = rings(1000, 0)
    return ContinuousClassifier(steps=4, max_steps=250, random_state=0).fit(x, y)


def test_ellipses(classifier):
    x, y = rings(1000, 1)
    assert classifier.score(x, y) > 0.97
    assert list(classifier.classes_) == ["in", "out"]


def test_probabilities(classifier):
    x, _ = rings(50, 1)
    found = classifier.predict_proba(x)
    np.testing.assert_allclose(found.sum(1), 1, rtol=1e-14)
    logits = classifier.decision_function(x)
    np.testing.assert_allclose(found[:, 1], 1 / (1 + np.exp(-logits)), rtol=1e-12)
    np.testing.assert_array_equal(classifier.predict(x) == "out", logits > 0)
    assert found.dtype == np.float64


def test_units_of_the_columns_do_not_matter():
    x, y = rings(100, 0)
    a, b = (
        ContinuousClassifier(steps=2, max_steps=5, random_state=0).fit(scale * x + 3, y)
        for scale in (1, 1000)
    )
    np.testing.assert_allclose(a.predict_proba(x + 3), b.predict_proba(1000 * x + 3), rtol=1e-5)


@pytest.mark.parametrize("kind", ["residual", "antisymmetric", "parabolic", "second-order"])
def test_other_dynamics(kind):
    x, y = rings(100, 0)
    model = ContinuousClassifier(dynamics=kind, steps=2, max_steps=5, random_state=0)
    assert clone(model).fit(x, y).predict(x).shape == (100,)


def test_regression():
    rng = np.random.default_rng(0)
    x = rng.uniform(-2, 2, (600, 2))
    y = np.column_stack([100 + np.sin(2 * x[:, 0]) * x[:, 1], x[:, 0]])
    model = ContinuousRegressor(steps=3, max_steps=200, random_state=0).fit(x[:500], y[:500])
    assert model.score(x[500:], y[500:]) > 0.9
    assert model.predict(x[:3]).shape == (3, 2)
    assert model.set_params(max_steps=2).fit(x, y[:, 0]).predict(x[:3]).shape == (3,)


def test_integer_weights_repeat_rows():
    x, y = rings(60, 0)
    weights = np.random.default_rng(0).integers(0, 4, 60)
    model = ContinuousClassifier(steps=2, max_steps=8, random_state=0)
    a = clone(model).fit(x, y, sample_weight=weights).predict_proba(x)
    b = clone(model).fit(np.repeat(x, weights, axis=0)[::-1], np.repeat(y, weights)[::-1])
    np.testing.assert_array_equal(a, b.predict_proba(x))
    assert not np.array_equal(a, clone(model).fit(x, y).predict_proba(x))


def test_seeds_decide():
    x, y = rings(60, 0)
    a, b, c = (
        ContinuousClassifier(steps=2, max_steps=4, random_state=s).fit(x, y).predict_proba(x)
        for s in (0, 0, 1)
    )
    np.testing.assert_array_equal(a, b)
    assert not np.array_equal(a, c)
    state = torch.random.get_rng_state()
    ContinuousClassifier(steps=2, max_steps=4).fit(x, y)
    assert torch.equal(state, torch.random.get_rng_state())


@pytest.mark.parametrize(
    "options, words",
    [
        ({"dynamics": "hamiltonean"}, "did you mean 'hamiltonian'"),
        ({"width": 7}, "`width` must be even"),
        ({"basis": "spline"}, "unknown `basis` 'spline'"),
        ({"smoothness": -1.0}, "`smoothness` must be at least 0"),
        ({"method": "rk5"}, "unknown `method` 'rk5'"),
    ],
)
def test_bad_arguments(options, words):
    x, y = rings(60, 0)
    with pytest.raises((ArgumentError, ValueError), match=words):
        ContinuousClassifier(**options).fit(x, y)
