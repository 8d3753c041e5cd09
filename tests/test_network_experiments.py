"""The experiments with networks: tiny runs by the command, and their figures recomputed."""

import json

import numpy as np
import pytest
import torch

import pathline as pl
from pathline.cli import main
from pathline.data import Images, ellipses
from pathline.errors import ShapeError
from pathline.network_plots import regions
from pathline.reproduce import images, multilevel, networks, transport, weights


def reproduce(name, tmp_path, *flags):
    out = tmp_path / "run"
    assert main(["reproduce", name, "--out", str(out), *flags]) == 0
    return json.loads((out / "metrics.json").read_text()), (out / "report.html").read_text()


@pytest.fixture
def tiny(monkeypatch):
    """Fewer points and layers."""
    setting = networks.Setting(
        lambda source: (ellipses(30, source), ellipses(20, source)),
        *(2, 1.0, 2, 4, 1, 1, 1e-3, 1e-3, "antisymmetric", 0.97),
    )
    monkeypatch.setitem(networks.SETTINGS, "ellipses", setting)
    monkeypatch.setattr(networks, "DEPTHS", (2, 4))
    return setting


def test_dynamics_side_by_side(tiny, tmp_path):
    flags = ("--max-steps", "1", "--seed", "3")
    metrics, page = reproduce("ellipses", tmp_path, *flags)
    net = pl.load(tmp_path / "run")
    x, labels = tiny.data(torch.Generator().manual_seed(1003))[1]
    wrong = (net.double()(x).argmax(1) != labels[:, 0]).double().mean().item()
    assert metrics["measured"] == pytest.approx(wrong) and wrong < 0.5
    assert metrics["published"] is None
    assert page.count("<img") == 1
    assert {"residual", "antisymmetric", "hamiltonian"} == set(metrics["results"])
    again, _ = reproduce("ellipses", tmp_path, *flags, "--resume")
    assert again["results"] == metrics["results"]


def test_a_sweep_of_depths(tiny, tmp_path):
    metrics, page = reproduce("ellipses", tmp_path, "--size", "full")
    assert metrics["sweep"]["depths"] == [2, 4]
    for kind in networks.LABELS:
        assert len(metrics["sweep"][kind]["loss"]) == 2
        assert metrics["sweep"][kind]["loss"][0] == pytest.approx(metrics["results"][kind]["loss"])
    assert page.count("<img") == 3


def test_regions_name_what_is_wrong():
    x, points, labels = np.arange(3), np.zeros((2, 2)), np.zeros(2)
    with pytest.raises(ShapeError, match=r"`maps\['a'\]` must be \(3, 3\), got \(2, 3\)"):
        regions(x, x, {"a": np.zeros((2, 3))}, points, labels)
    with pytest.raises(ShapeError, match="`points`"):
        regions(x, x, {}, points, np.zeros(3))


def test_transport_view(tmp_path, monkeypatch):
    monkeypatch.setattr(transport, "POINTS", 20)
    monkeypatch.setattr(transport, "LAYERS", 8)
    metrics, page = reproduce("transport-view", tmp_path, "--max-steps", "1")
    assert metrics["step_error"] < 1e-2
    assert (tmp_path / "run" / "animation.gif").read_bytes().startswith(b"GIF8")
    assert page.count("<img") == 3


def test_surrogate_data_against_fourier():
    """Without reaction each wave is carried and damped by itself."""
    p, seen = weights.surrogate_data(3, torch.Generator().manual_seed(0))
    again, _ = weights.surrogate_data(3, torch.Generator().manual_seed(0))
    assert torch.equal(p, again) and p.abs().max() <= 1 and seen.shape == (3, 30)
    x = torch.arange(64, dtype=torch.float64) / 64
    # Mean values obey the logistic equation where u does not depend on x.
    still = p.clone()
    still[:, 4:] = 0
    flat = torch.sigmoid(still[:, 3:4])
    times = torch.tensor(weights.TIMES).double()
    growth = torch.exp(2 * (1 + still[:, 2:3]) * times)
    exact = flat * growth / (1 - flat + flat * growth)
    found = weights.observations(still)
    torch.testing.assert_close(found.view(3, 3, 10), exact[:, :, None].expand(3, 3, 10))
    # A wave of small amplitude about u = 0.5 without reaction: carried at speed a, damped by nu.
    wave = torch.zeros(1, 8).double()
    wave[0, :3] = torch.tensor([0.8, 0.5, -1.0])
    wave[0, 4] = 1e-4
    k, nu, a = 2 * torch.pi, 0.005 * 1.7, 0.8
    symbol, frequency = nu * 64**2 * (2 - 2 * np.cos(k / 64)), a * 64 * np.sin(k / 64)
    at = x[torch.arange(10) * 64 // 10]
    exact = 0.5 + 0.25e-4 * torch.stack(
        [np.exp(-symbol * t) * torch.cos(k * at - frequency * t) for t in weights.TIMES]
    )
    torch.testing.assert_close(weights.observations(wave).view(3, 10), exact, atol=1e-9, rtol=0)


def test_summary_of_errors():
    errors = [[(0.5, 0.6), (0.4, 0.5)], [(0.2, 0.3), (0.3, 0.2)], [(9.0, 9.0), (0.1, 0.4)]]
    found = weights.summary(errors)
    assert found["test_error"] == pytest.approx(0.35) and found["spread"] == pytest.approx(0.1)
    assert found["largest_stable_rate"] == weights.RATES[1]


def test_legendre_surrogate(tmp_path, monkeypatch):
    monkeypatch.setattr(weights, "RATES", (0.01, 0.02))
    monkeypatch.setattr(weights, "ROWS", (20, 5, 5))
    metrics, page = reproduce("legendre-surrogate", tmp_path, "--max-steps", "2")
    assert metrics["results"]["Legendre"]["weights"] == 6 * (16**2 + 16)
    assert metrics["measured"] == metrics["results"]["Legendre"]["test_error"]
    assert page.count("<img") == 1


def test_figures_of_bars():
    labels = torch.tensor([[0, 1, 1, 2], [0, 0, 2, 2]])
    found = torch.tensor([[0, 1, 0, 2], [0, 1, 2, 1]])
    figures = images.bar_figures(found, labels)
    assert figures["bars"] == pytest.approx(3 / 5) and figures["pixels"] == pytest.approx(5 / 8)
    assert figures["iou"] == pytest.approx((2 / 4 + 1 / 4 + 2 / 3) / 3)


def test_imexnet_on_q_tips(tmp_path, monkeypatch):
    monkeypatch.setitem(images.Q_TIPS, "small", images.QTips(16, (4, 4), 3, (20, 10), 2))
    metrics, page = reproduce("imexnet-qtips", tmp_path)
    found = metrics["results"]
    assert page.count("<img") == 1
    assert found["semi-implicit"]["weights"] - found["explicit"]["weights"] == 2 * 3 * 4 * 9
    assert metrics["measured"] == pytest.approx(1 - found["semi-implicit"]["bars"])
    net = pl.load(tmp_path / "run")
    assert net(torch.zeros(1, 1, 16, 16)).shape == (1, 4, 16, 16)


@pytest.mark.parametrize("name", ["mnist", "cifar-subset"])
def test_pde_cnn(name, tmp_path, monkeypatch):
    """On random images in place of the real ones, which are not everywhere."""
    shape = (1, 28, 28) if name == "mnist" else (3, 32, 32)
    generator = np.random.default_rng(0)

    def rows(count):
        pixels = generator.random((count, int(np.prod(shape))))
        labels = generator.integers(0, 10, (count, 1))
        return np.concatenate([pixels, labels], 1, dtype=np.float32)

    fake = Images(name, shape, 10, rows(20), rows(4), rows(6), "random numbers")
    monkeypatch.setattr(images, "load_images", lambda name, fetch: fake)
    for key in images.SETTINGS:
        monkeypatch.setitem(images.SETTINGS, key, images.Setting((4, 4, 4), 2, 5, 0.01))
    limit = ("--budget", "2") if name == "mnist" else ()
    metrics, page = reproduce(f"pde-cnn-{name}", tmp_path, *limit)
    assert set(metrics["results"]) == set(images.LABELS) and "random numbers" in page
    steps = {found["steps"] for found in metrics["results"].values()}
    assert min(steps) > 2 if limit else steps == {2}
    weights = {kind: found["weights"] for kind, found in metrics["results"].items()}
    assert weights["hamiltonian"] < weights["parabolic"] == weights["second-order"]
    assert weights["residual"] == weights["parabolic"]
    assert 0 <= metrics["measured"] <= 1


def test_pde_cnn_without_data(tmp_path, monkeypatch, capsys):
    monkeypatch.delenv("PATHLINE_DATA", raising=False)
    assert main(["reproduce", "pde-cnn-cifar-subset", "--out", str(tmp_path / "run")]) == 2
    assert "PATHLINE_DATA" in capsys.readouterr().err and not (tmp_path / "run").exists()


def test_multilevel_depth(tmp_path, monkeypatch):
    monkeypatch.setitem(multilevel.POINTS, "small", (10, 5))
    monkeypatch.setattr(multilevel, "DEPTHS", (1, 2, 4, 8))
    metrics, page = reproduce("multilevel-depth", tmp_path, "--max-steps", "1")
    assert metrics["measured"] == pytest.approx(1 + 1 / 2 + 1 / 4 + 1 / 8)
    assert metrics["results"]["single"]["work"] == 1.0 and page.count("<img") == 1
