"""Experiments with lean convolutions, multigrid in channels, resolution, and DO against OD."""

import json

import numpy as np
import pytest
import torch
from torch.testing import assert_close

import pathline as pl
from pathline.cli import main
from pathline.data import Images, load_images
from pathline.nets import CirculantConv, Conv, LeanConv, ShiftConv, TimeBasis
from pathline.networks import dense_net
from pathline.reproduce import candidates, do_vs_od_classifier, lean, mgic, resolution
from pathline.reproduce.images import halved, standardised
from pathline.reproduce.race import DO, OD


def reproduce(name, tmp_path, *flags):
    out = tmp_path / "run"
    assert main(["reproduce", name, "--out", str(out), *flags]) == 0
    return json.loads((out / "metrics.json").read_text()), (out / "report.html").read_text()


@pytest.fixture(scope="module")
def few():
    """Some of the digits."""
    images = load_images("digits")
    parts = (images.train[:24], images.validation[:8], images.test[:12])
    return Images("digits", images.shape, images.classes, *parts, images.source)


# Counts


@pytest.mark.parametrize(
    ("operator", "count"),
    [
        (Conv, lambda c, n: 9 * c**2 * n),
        (LeanConv, lambda c, n: (c**2 + 4 * c) * n),
        (lambda c: LeanConv(c, stencil="3x3"), lambda c, n: (c**2 + 9 * c) * n),
        (ShiftConv, lambda c, n: c**2 * n),
        # Transforms of features there and back and of 9 taps; c/2 + 1 waves, of which two are real
        # and take two products with a complex number in place of three.
        (CirculantConv, lambda c, n: 6 * c * n + 27 * c + 9 * (3 * (c // 2 + 1) - 2) * n),
    ],
    ids=["full", "5-point", "depthwise", "shift", "circulant"],
)
def test_multiplications_of_operators(operator, count):
    """Those of the formulas of arXiv 1904.06952, for n pixels; the circulant one also transforms
    its kernels."""
    c, shape = 8, (5, 6)
    found = candidates.multiplications(operator(c), torch.randn(1, c, *shape))
    assert found == count(c, 30)
    if operator is not CirculantConv:
        twice = candidates.multiplications(operator(c), torch.randn(2, c, *shape))
        assert twice == 2 * found


def test_multiplications_of_matrices():
    layers = torch.nn.Sequential(torch.nn.Linear(3, 7), torch.nn.Linear(7, 2, bias=False))
    assert candidates.multiplications(layers, torch.randn(5, 3)) == 5 * (3 * 7 + 7 * 2)


WEIGHTS = {  # of a layer of c channels, arXiv 1904.06952 and 1805.07821
    "full": lambda c: 9 * c**2,
    "depthwise": lambda c: c**2 + 9 * c,
    "lean": lambda c: c**2 + 4 * c,
    "shift": lambda c: c**2,
    "circulant": lambda c: 9 * c,
}


def test_lean_digits(tmp_path, monkeypatch, few):
    monkeypatch.setattr(lean, "load_images", lambda name, fetch: few)
    monkeypatch.setitem(
        lean.SETTINGS, ("digits", "small"), lean.Setting(candidates.Plan(9, 2), rows=(20, 10))
    )
    metrics, page = reproduce("lean-digits", tmp_path, "--max-steps", "2", "--seed", "4")
    for kind, found in metrics["results"].items():
        assert found["kernels"] == lean.STEPS * sum(map(WEIGHTS[kind], lean.WIDTHS))
        assert len(found["accuracies"]) == 2
        assert found["accuracy"] == pytest.approx(np.mean(found["accuracies"]))
    assert metrics["times_fewer_weights"] == pytest.approx(48_384 / 5_824)
    assert metrics["measured"] == pytest.approx(1 - metrics["results"]["lean"]["accuracy"])
    logs = sorted(path.name for path in (tmp_path / "run" / "checkpoint").iterdir())
    assert len(logs) == 10 and {"full-4", "full-5"} < set(logs)
    assert page.count("<img") == 1 and "Alpaydin" in page
    again, _ = reproduce("lean-digits", tmp_path, "--max-steps", "2", "--seed", "4", "--resume")
    assert again == metrics


def test_lean_mnist_is_halved(tmp_path, monkeypatch):
    generator = np.random.default_rng(0)

    def rows(count):
        pixels = generator.random((count, 28 * 28))
        return np.column_stack([pixels, generator.integers(0, 10, count)]).astype(np.float32)

    fake = Images("mnist", (1, 28, 28), 10, rows(12), rows(6), rows(8), "random numbers")
    monkeypatch.setattr(lean, "load_images", lambda name, fetch: fake)
    monkeypatch.setattr(lean, "LABELS", {k: lean.LABELS[k] for k in ("full", "lean")})
    monkeypatch.setattr(lean, "WIDTHS", (4, 4))
    metrics, page = reproduce("lean-mnist", tmp_path, "--max-steps", "1")
    assert set(metrics["results"]) == {"full", "lean"} and "14 x 14 pixels" in page


def test_means_of_four_pixels(few):
    x = few.train[:, :-1].reshape(-1, 4, 2, 4, 2)
    found = halved(few)
    assert found.shape == (1, 4, 4) and np.array_equal(found.train[:, -1], few.train[:, -1])
    assert_close(found.train[:, :-1].reshape(-1, 4, 4), x.mean((2, 4)))
    enlarged = resolution.doubled(few)
    assert enlarged.shape == (1, 16, 16) and enlarged.test.shape == (12, 257)


def test_standardised(few):
    train, _, test = standardised(few)
    assert train[:, :-1].mean() == pytest.approx(0, abs=1e-5)
    assert train[:, :-1].std() == pytest.approx(1, abs=1e-5)
    scale = few.train[:, :-1].std()
    assert_close(np.diff(test[:, :-1]) * scale, np.diff(few.test[:, :-1]), atol=1e-5, rtol=0)
    assert np.array_equal(test[:, -1], few.test[:, -1])


# Multigrid in channels


def test_mgic_digits(tmp_path, monkeypatch, few):
    monkeypatch.setattr(mgic, "load_images", lambda name: few)
    monkeypatch.setitem(mgic.PLANS, "small", candidates.Plan(9, 1))
    monkeypatch.setattr(mgic, "SWEEP", (32, 64))
    metrics, page = reproduce("mgic-digits", tmp_path, "--max-steps", "1")
    weights = {kind: found["kernels"] for kind, found in metrics["results"].items()}
    smoothers = 2 * 9 * 8 * (64 + 32) + 2 * 9 * 16**2
    transfers = (64 + 32) * 8 // 2 + (64 + 32) * 4
    assert weights["full"] == 3 * 2 * 9 * 64**2 and weights["grouped"] == 3 * 2 * 9 * 8 * 64
    assert weights["multigrid"] == 3 * (smoothers + transfers)
    assert metrics["share_of_weights"] < 0.35
    swept = metrics["sweep"]
    assert swept["full"]["weights"] == [2 * 9 * 32**2, 2 * 9 * 64**2]
    assert swept["multigrid"]["weights"][1] == smoothers + transfers
    pixels = mgic.SWEPT[1] ** 2  # each weight is used once at each pixel
    for found in swept.values():
        assert found["multiplications"] == [pixels * count for count in found["weights"]]
    assert page.count("<img") == 2


def test_groups_learn_what_lies_in_their_blocks():
    """The least |A - M|^2 over matrices A of diagonal blocks, whatever their number in turn."""
    M = mgic.mixing(torch.Generator().manual_seed(3))
    assert_close(M @ M.mT, torch.eye(mgic.CHANNELS, dtype=torch.float64))
    mask = torch.block_diag(*(torch.ones(8, 8) for _ in range(8))).double()
    known = 1 - float((M * mask).square().sum() / mgic.CHANNELS)
    assert mgic.outside(M) == pytest.approx(known, abs=1e-14)
    for depth in (1, 2):
        error, weights = mgic.learned(M, depth, 0, 300, seed=0)
        assert error == pytest.approx(known, rel=1e-6) and weights == depth * 64 * 8
    coupled, weights = mgic.learned(M, 1, 2, 30, seed=0)
    assert coupled < 0.8 < known and weights == 8 * (64 + 32 + 16) + 4 * (64 + 32) * 2


def test_linear_blocks_are_matrices():
    block = mgic.linear_block(3, torch.Generator().manual_seed(0)).double()
    x, y = torch.randn(2, 2, 64, 3, 3, dtype=torch.float64)
    assert_close(block(2 * x - y), 2 * block(x) - block(y))


def test_mgic_mixing(tmp_path, monkeypatch):
    monkeypatch.setattr(mgic, "DEPTHS", (1, 2))
    metrics, page = reproduce("mgic-mixing", tmp_path, "--max-steps", "3")
    assert metrics["measured"] == metrics["errors"]["2"][-1]
    assert all(row[0] >= metrics["outside"] - 1e-12 for row in metrics["errors"].values())
    assert page.count("<img") == 1


# Resolution


def test_resolution(tmp_path, monkeypatch, few):
    monkeypatch.setattr(resolution, "load_images", lambda name, fetch: few)
    monkeypatch.setattr(resolution, "WIDTH", 4)
    monkeypatch.setattr(resolution, "FACTORS", (1, 2, 4))
    metrics, page = reproduce("multilevel-resolution", tmp_path, "--max-steps", "2")
    lost = metrics["coarse_accuracy"] - metrics["results"]["rediscretise"]["accuracy"]
    assert metrics["measured"] == pytest.approx(lost)
    assert set(metrics["results"]) == {"copy", "galerkin", "rediscretise", "new"}
    assert page.count("<img") == 2


@pytest.mark.parametrize(("norm", "factor"), [(3.4, 1), (4.8, 2), (6.0, 4), (13.8, 16)])
def test_layers_that_kernels_need(few, norm, factor):
    """|K|^2 h <= 2 with h = 1/6, for a K of known norm: a multiple of the unit."""
    net = resolution.parabolic(few, 4, seed=0)
    (evolution,) = net.evolutions()
    (weight,) = (p for p in evolution.dynamics.parameters() if p.ndim == 5)
    with torch.no_grad():
        weight.zero_()
        weight[:, :, :, 1, 1] = norm * torch.eye(resolution.WIDTH)
    assert resolution.stable_factor(net, (1, 16, 16)) == factor
    finer = resolution.with_layers(net, 12)
    assert next(finer.evolutions()).step == pytest.approx(1 / 12) and evolution.steps == 6


# DO against OD


def test_do_vs_od_classifier(tmp_path, monkeypatch):
    monkeypatch.setattr(do_vs_od_classifier, "POINTS", (20, 10))
    monkeypatch.setattr(do_vs_od_classifier, "MOONS", 10)
    monkeypatch.setattr(do_vs_od_classifier, "DEPTHS", (1, 2))
    metrics, page = reproduce("do-vs-od-classifier", tmp_path, "--max-steps", "1")
    assert metrics[DO]["forward"] == metrics[DO]["backward"] == 4 * do_vs_od_classifier.STEPS
    assert metrics[OD]["forward"] > metrics[DO]["forward"]
    assert metrics["sweep"]["depths"] == [1, 2]
    assert all(len(metrics["sweep"][kind]["gain"]) == 2 for kind in ("residual", "antisymmetric"))
    assert page.count("<img") == 3
    net = pl.load(tmp_path / "run")
    assert net(torch.zeros(1, 2, dtype=torch.float64)).shape == (1, 5)


def test_both_trainings_begin_alike():
    x = torch.randn(5, 2, dtype=torch.float64)
    fine = {"method": "dopri5", "steps": None, "tolerance": 1e-10}
    discrete = do_vs_od_classifier.network(3, method="rk4", steps=64)
    continuous = do_vs_od_classifier.network(3, **fine)
    assert_close(discrete(x), continuous(x), atol=1e-6, rtol=0)
    assert_close(do_vs_od_classifier.solved(discrete, **fine)(x), continuous(x), atol=0, rtol=0)


def test_gains_of_a_linear_network():
    """Euler's steps with K = diag(a): (1 + h a)^N where tanh is linear."""
    net = dense_net("residual", 2, 2, width=2, steps=4, time=TimeBasis(horizon=2.0)).double()
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.zero_()
        operator = next(p for p in net.stages[0].parameters() if p.shape[-2:] == (2, 2))
        operator.copy_(torch.diag(torch.tensor([0.3, -0.4])).expand_as(operator))
    found = do_vs_od_classifier.gains(net, torch.zeros(3, 2, dtype=torch.float64))
    assert_close(found, torch.tensor([1.15**4, 0.8**4], dtype=torch.float64))
