"""`ContinuousClassifier` and `ContinuousRegressor`: scikit-learn's checks, accuracy, weights."""

import json
import shutil

import numpy as np
import pandas as pd
import pytest
import torch
from sklearn.base import clone
from sklearn.utils.estimator_checks import parametrize_with_checks

import pathline as pl
from pathline.errors import ArgumentError, ModelError
from pathline.estimators import ContinuousClassifier, ContinuousRegressor, TrajectoryRegressor
from pathline.networks import ContinuousNet


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
    log_prob = classifier.predict_log_proba(x)
    np.testing.assert_allclose(np.exp(log_prob), found, rtol=1e-13)
    far = classifier.predict_log_proba(1e6 * x)  # whose probabilities are 0 and 1
    assert np.isfinite(far).all()


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
        ({"dynamics": "hamiltonean"}, "unknown `dynamics` .*did you mean 'hamiltonian'"),
        ({"dynamics": None}, "unknown `dynamics` 'None'"),
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


# Saved and loaded


LABELS = {
    "text": ["no", "yes", "may be"],
    "objects": np.array(["no", "yes", "may be"], dtype=object),
    "integers": np.array([3, -1, 2], dtype=np.int32),
    "numbers": [2.0, 7.0, 1.0],
    "truth": [False, True, True],
}


def small(**options):
    """Arguments of a network that trains in no time; NumPy's numbers, as grids have them."""
    found = {"width": np.int64(4), "steps": 1, "max_steps": 3, "decay": np.float32(1e-3)}
    return found | {"random_state": 0} | options


@pytest.mark.parametrize("labels", LABELS.values(), ids=LABELS)
def test_a_classifier_is_kept(tmp_path, labels):
    x, _ = rings(60, 0)
    y = np.array(labels)[np.arange(60) % 3]
    frame = pd.DataFrame(100 * x + 3, columns=["a", "b"])
    model = ContinuousClassifier(**small()).fit(frame, y)
    model.save(tmp_path)
    found = ContinuousClassifier.load(tmp_path)
    np.testing.assert_array_equal(found.predict_log_proba(frame), model.predict_log_proba(frame))
    np.testing.assert_array_equal(found.predict(frame), model.predict(frame))
    assert found.classes_.dtype == model.classes_.dtype
    assert found.get_params() == model.get_params() | {"random_state": None}
    assert (found.n_features_in_, found.n_iter_) == (2, 3)
    with pytest.raises(ValueError, match="feature names"):
        found.predict(frame.rename(columns={"a": "c"}))
    assert not list(tmp_path.glob("**/*.pkl"))
    assert isinstance(pl.load(tmp_path), ContinuousNet)


@pytest.mark.parametrize("targets", [None, 1, 3])
def test_a_regressor_is_kept(tmp_path, targets):
    x, _ = rings(60, 0)
    y = 50 + x[:, 0] if targets is None else 50 + np.outer(x[:, 0], np.arange(1, targets + 1))
    model = ContinuousRegressor(**small()).fit(x, y)
    model.save(tmp_path)
    found = ContinuousRegressor.load(tmp_path)
    np.testing.assert_array_equal(found.predict(x), model.predict(x))
    assert found.predict(x).shape == y.shape
    assert not hasattr(found, "feature_names_in_")
    assert clone(found).fit(x, y).predict(x).shape == y.shape


def test_what_can_not_be_kept(tmp_path):
    x, _ = rings(60, 0)
    with pytest.raises(ValueError, match="not fitted yet"):
        ContinuousClassifier().save(tmp_path)
    days = np.array(["2024-02-28", "2024-02-29"], "datetime64[D]")
    model = ContinuousClassifier(**small()).fit(x, days[np.arange(60) % 2])
    with pytest.raises(ArgumentError, match=r"`classes_` must be text, .* got datetime.date\(2024"):
        model.save(tmp_path)
    assert not list(tmp_path.iterdir())


def test_folders_of_something_else(tmp_path):
    x, y = rings(60, 0)
    model = ContinuousClassifier(**small()).fit(x, y)
    model.save(tmp_path / "whole")
    t = np.arange(8.0)
    series = TrajectoryRegressor(members=1, width=2, max_steps=1).fit(t, np.sin(t))
    series.save(tmp_path / "series")
    pl.save(model.net_, tmp_path / "net")
    for name, kind, held in (
        ("whole", ContinuousRegressor, "ContinuousClassifier"),
        ("whole", TrajectoryRegressor, "ContinuousClassifier"),
        ("series", ContinuousClassifier, "TrajectoryRegressor"),
        ("net", ContinuousClassifier, "ContinuousNet"),
    ):
        with pytest.raises(ModelError, match=f"{name} holds no {kind.__name__}, but a {held}"):
            kind.load(tmp_path / name)
    with pytest.raises(ModelError, match="there is no such folder"):
        ContinuousClassifier.load(tmp_path / "none")

    for change in (
        lambda kept: kept.pop("parameters"),
        lambda kept: kept["parameters"].update(depth=3),
        lambda kept: kept.pop("n_iter"),
        lambda kept: kept.update(fitted=None),
        lambda kept: kept["fitted"].pop("center"),
        lambda kept: kept["fitted"].update(spread=[1.0]),
        lambda kept: kept["fitted"].update(center=["a", "b"]),
        lambda kept: kept["fitted"].update(classes=["in", "out", "on"]),
        lambda kept: kept["fitted"].update(dtype="text"),
    ):
        shutil.rmtree(tmp_path / "damaged", ignore_errors=True)
        file = shutil.copytree(tmp_path / "whole", tmp_path / "damaged") / "model.json"
        description = json.loads(file.read_text())
        change(description["metadata"])
        file.write_text(json.dumps(description))
        with pytest.raises(ModelError, match="damaged is damaged"):
            ContinuousClassifier.load(file.parent)
    (weights,) = (tmp_path / "whole").glob("*.safetensors")
    weights.write_bytes(weights.read_bytes()[:100])
    with pytest.raises(ModelError, match="damaged or not a safetensors file"):
        ContinuousClassifier.load(tmp_path / "whole")
