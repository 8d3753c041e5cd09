"""Every example runs, shortened, and gives a figure that is right by other means."""

import math
import os
import runpy
from pathlib import Path

import pytest
from torch.distributions import MultivariateNormal

EXAMPLES = Path(__file__).parents[1] / "examples"


def run(name, monkeypatch):
    """The names that an example defines; plots are under `__main__` and not drawn."""
    monkeypatch.setenv("SMOKE", "1")
    return runpy.run_path(str(EXAMPLES / name))


def test_density(monkeypatch):
    found = run("plot_density.py", monkeypatch)
    # A Gaussian of mean and covariance of the moons is 0.90 nats from them.
    gaussian = gaussian_of(found["points"])
    gap = (found["moons"].log_prob(found["fresh"]) - gaussian.log_prob(found["fresh"])).mean()
    assert gap == pytest.approx(0.90, abs=0.03)
    assert 0 < found["divergence"] < 0.6 * gap
    assert found["check"].passed


def test_custom_table(monkeypatch):
    found = run("plot_custom_table.py", monkeypatch)
    gaussian = gaussian_of(found["train"])
    assert found["gaussian_nll"] == pytest.approx(-gaussian.log_prob(found["test"]).mean().item())
    assert found["nll"] < found["gaussian_nll"] - 3
    minute = found["samples"][:, found["table"].columns.index("minute_of_day")]
    assert -0.5 < minute.min() < 100
    assert 1340 < minute.max() < 1439.5


def test_gradient(monkeypatch):
    found = run("plot_gradient.py", monkeypatch)
    # Against central differences in double precision, and analytic derivatives of the integral.
    assert all(errors["discrete"] < 1e-6 for errors in found["checks"].values())
    for name in ("decay", "decay, dopri5", "relu"):
        assert found["checks"][name]["adjoint"] > 0.1
    start, slope = 0.02, 0.0004
    fine = next(row for row in found["rows"] if row[:2] == ("u' = -50 u", 400))
    assert fine[3:5] == (pytest.approx(start, rel=1e-5), pytest.approx(slope, rel=1e-5))
    assert found["exact"](-50.0) == (pytest.approx(start), pytest.approx(slope))


def test_crowd(monkeypatch):
    found = run("plot_crowd.py", monkeypatch)
    # 60 exp(-|z - (1/2, 0)|^2) averaged over N((0, h), 1/4 I), and over h from 3 to -3.
    pillar = 40 / 6 * math.exp(-1 / 6) * math.sqrt(1.5 * math.pi) * math.erf(3 / math.sqrt(1.5))
    assert found["straight_cost"] == pytest.approx(18 + pillar, rel=0.01)
    assert found["cost"]["total"] < found["straight_cost"] - 3
    # Jensen's inequality: no way of moving the mean costs less.
    x, crowd = found["x"], found["crowd"]
    shift = (crowd.push(x) - x).mean(0)
    assert found["cost"]["transport"] > 0.5 * shift.square().sum() > 15


def test_every_example_is_tested():
    tested = {"plot_density.py", "plot_custom_table.py", "plot_gradient.py", "plot_crowd.py"}
    assert {name for name in os.listdir(EXAMPLES) if name.endswith(".py")} == tested


def gaussian_of(rows):
    return MultivariateNormal(rows.mean(0), rows.mT.cov())
