"""The experiments with networks: tiny runs by the command, and their figures recomputed."""

import json

import numpy as np
import pytest
import torch

import pathline as pl
from pathline.cli import main
from pathline.data import ellipses
from pathline.errors import ShapeError
from pathline.network_plots import regions
from pathline.reproduce import networks, transport


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
    assert metrics["drift"] < 1e-9
    assert (tmp_path / "run" / "animation.gif").read_bytes().startswith(b"GIF8")
    assert page.count("<img") == 3
