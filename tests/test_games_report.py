"""Figures and report of mean-field games."""

import json
import shutil
from io import BytesIO

import numpy as np
import pytest
import torch
from PIL import Image

import pathline as pl
from pathline import games_plots, games_report
from pathline.control import solve
from pathline.errors import ModelError, ShapeError
from pathline.games import equilibrium as equilibria
from pathline.games.problems import make
from pathline.games_report import STEPS, finish_game, refine, write_games_report
from pathline.plots import to_png

X, Y = np.linspace(-2, 2, 30), np.linspace(-3, 3, 40)
FIELD = (X, Y, np.exp(-(X**2) - Y[:, None] ** 2))


@pytest.fixture(scope="module", autouse=True)
def small():
    """Few particles and frames."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {"PARTICLES": 512, "FRAMES": 4, "GRID": 30}.items():
            patch.setattr(games_report, name, value)
        patch.setattr(equilibria, "PARTICLES", 1024)
        yield


def exact_shift():
    """The equilibrium of the game `shift`, whose value function is a quadratic.

    A Gaussian of variance s moves by D less delta = D a1 / (a1 + a3 / s), all particles alike, so
    Phi(t, z) = -a1 v z_2 + rate t + constant with v = -(D - delta), which a `Potential` holds.
    """
    game = make("shift")
    speed = -6 * (1 - 1 / (1 + 5 / 0.3))
    equilibrium = game.policy(4, 2, steps=4).double()
    inner, value = equilibrium.potential.potential, equilibrium.potential
    with torch.no_grad():
        for weight in equilibrium.parameters():
            weight.zero_()
        # Phi = A^T A z z / 2 + b . (z, t) + c, in the units of the problem.
        value.centre.zero_()
        value.scale.fill_(1)
        value.unit.fill_(1)
        inner.b.copy_(torch.tensor([0.0, -speed, 0.5 * speed**2]))
        # Phi(1) = 5 (1 + log rho - log rho_1), rho and rho_1 with means 3 + speed and -3.
        inner.c.copy_(torch.tensor(5.0 + 5 / 0.6 * (9 - (3 + speed) ** 2) - 0.5 * speed**2))
    return equilibrium


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A training of two steps, and then the exact weights."""
    out = tmp_path_factory.mktemp("shift") / "run"
    solve(make("shift"), out=out, max_steps=2, width=4, steps=2, progress=False)
    equilibrium = exact_shift()
    pl.save(equilibrium, out / "model")
    finish_game(equilibrium, out)
    return out


def test_metrics_are_exact(run):
    metrics = json.loads((run / "metrics.json").read_text())
    found, cost = metrics["check"], metrics["check"]["cost"]
    assert found["passed"], found["verdict"]
    assert cost["transport"] == pytest.approx(0.5 * 6**2 * (1 - 3 / 53) ** 2)
    divergence = 5 / 0.6 * (6 * 3 / 53) ** 2
    assert abs(cost["terminal"] - divergence) < 4 * found["total_error"] < 0.5
    assert found["hjb"] < 1e-6
    assert found["terminal_error"] < 1e-6
    # Every particle has the same velocity at all times, so steps of time change nothing.
    found = metrics["refinement"]
    assert found["steps"] == list(STEPS) == [2, 4, 8, 16, 32]
    assert np.ptp(found["total"]) < 1e-9 * found["total"][0]
    parts = [found[name] for name in cost if name != "total"]
    assert np.sum(parts, 0) == pytest.approx(found["total"])


def test_report(run):
    page = (run / "report.html").read_text()
    for heading in (
        "Summary", "Costs by term", "Densities over time", "Trajectories", "Value function",
        "Refinement of time steps", "Training", "Configuration",
    ):  # fmt: skip
        assert f"<h2>{heading}</h2>" in page
    assert page.count("<img") == 6
    assert "preference" not in page.partition("<h2>Densities")[0]  # there is none
    with Image.open(run / "animation.gif") as image:
        assert image.n_frames == 4


def test_report_from_the_folder(run, tmp_path):
    copy = shutil.copytree(run, tmp_path / "run")
    (copy / "report.html").unlink()
    write_games_report(copy)
    assert (copy / "report.html").read_text() == (run / "report.html").read_text()
    (copy / "metrics.json").write_text("{}")
    with pytest.raises(ModelError, match="no finished run of a mean-field game"):
        write_games_report(copy)


def test_report_in_three_dimensions(tmp_path):
    """Densities are those of particles, and obstacles are drawn."""
    out = tmp_path / "run"
    game = make("crowd-motion", dim=3)
    solve(game, out=out, max_steps=2, width=4, steps=2, progress=False)
    finish_game(pl.load(out), out, seed=1)
    page = (out / "report.html").read_text()
    assert "of the first two of 3 coordinates" in page
    assert "Lines are the obstacle" in page
    assert "<td>entropy</td>" in page


def test_refine_has_particles_of_its_own():
    equilibrium = exact_shift()
    first, again, other = (refine(equilibrium, seed) for seed in (0, 0, 1))
    assert first == again != other


def test_densities():
    panels = np.random.default_rng(0).random((6, 40, 30))
    figure = games_plots.densities(X, Y, panels, list("abcdef"), field=FIELD)
    assert to_png(figure)[:4] == b"\x89PNG"
    shown = [ax.get_title() for ax in figure.axes if ax.get_title()]
    assert shown == list("abcdef")
    # One scale for all.
    limits = {ax.collections[0].get_clim() for ax in figure.axes[:6]}
    assert limits == {(0, panels.max())}
    with pytest.raises(ShapeError, match="`panels`"):
        games_plots.densities(X, Y, panels.swapaxes(1, 2), list("abcdef"))


def test_values():
    phi = np.stack([X + Y[:, None], X * Y[:, None]])
    at = np.zeros((5, 2))
    figure = games_plots.values(X, Y, phi, ["a", "b"], velocities=(at, np.ones((2, 5, 2))))
    assert to_png(figure)[:4] == b"\x89PNG"
    assert "a, b" in figure.get_label()
    with pytest.raises(ShapeError, match="`panels`"):
        games_plots.values(X, Y, phi, ["a"])


def test_crowd():
    t, z = np.linspace(0, 1, 9), np.random.default_rng(0).normal(size=(9, 20, 2)).cumsum(0)
    figure = games_plots.crowd(t, z, field=FIELD, upto=4)
    ax = figure.axes[0]
    assert np.asarray(ax.collections[1].get_offsets()) == pytest.approx(z[4])
    assert "0.50" in ax.get_title(loc="left")
    sizes = {Image.open(BytesIO(to_png(games_plots.crowd(t, z, upto=n)))).size for n in (1, 8)}
    assert len(sizes) == 1
    with pytest.raises(ShapeError, match="`positions`"):
        games_plots.crowd(t, z[1:])


def test_refinement():
    figure = games_plots.refinement([2, 4, 8], {"with": [3, 2, 2], "without": [1, 5, 9]})
    assert [tick.get_text() for tick in figure.axes[0].get_xticklabels()] == ["2", "4", "8"]
    assert len(figure.axes[0].lines) == 2
    with pytest.raises(ShapeError, match="costs"):
        games_plots.refinement([2, 4], {"with": [1]})
