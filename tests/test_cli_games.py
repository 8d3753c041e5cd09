"""Mean-field games on the command line: results, resume, check, report and one-line errors."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.distributions import Independent, Normal

import pathline as pl
from command_line import refused
from pathline import games_report
from pathline.cli import main
from pathline.control.problems import PROBLEMS
from pathline.errors import ArgumentError, ModelError
from pathline.games import Equilibrium, MeanFieldGame, population
from pathline.games import equilibrium as equilibria
from pathline.games.problems import GAMES, make, settings
from pathline.models import NAMED
from pathline.reproduce import EXPERIMENTS, stochastic_games

TINY = ["--max-steps", "3", "--width", "4", "--time-steps", "2"]
CROWD = ["solve", "crowd-motion", "--dim", "3", "--strength", "10", *TINY]


@pytest.fixture(scope="module", autouse=True)
def small():
    """Few particles and frames."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {"PARTICLES": 256, "FRAMES": 3, "GRID": 20}.items():
            patch.setattr(games_report, name, value)
        patch.setattr(equilibria, "PARTICLES", 128)
        yield


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("crowd") / "run"
    assert main([*CROWD, "--out", str(out)]) == 0
    return out


@pytest.fixture
def run(made, tmp_path) -> Path:
    """A copy that a test may change."""
    return Path(shutil.copytree(made, tmp_path / "run"))


def test_what_a_run_holds(made):
    names = {entry.name for entry in made.iterdir()}
    assert names == {
        "config.json", "model", "checkpoint", "log.jsonl", "metrics.json", "report.html",
        "animation.gif",
    }  # fmt: skip
    metrics = json.loads((made / "metrics.json").read_text())
    assert metrics["problem"] == "crowd-motion"
    assert metrics["steps"] == 3
    assert set(metrics["check"]["cost"]) == {
        "transport", "preference", "entropy", "congestion", "terminal", "total",
    }  # fmt: skip
    config = json.loads((made / "config.json").read_text())
    assert config["objective"]["time_steps"] == 2


def test_the_equilibrium_opens(made):
    found = pl.load(made)
    assert isinstance(found, Equilibrium)
    game, plain = found.problem, make("crowd-motion", dim=3)
    assert game.made == {"name": "crowd-motion", "options": {"dim": 3, "strength": 10.0}}
    z = torch.zeros(1, 3, dtype=torch.float64)
    # 500 times the Gaussian density N(0, diag(1, 1/2)) in its middle.
    assert game.preference(z).item() == pytest.approx(500 / (2 * np.pi * np.sqrt(0.5)))
    assert game.preference(z).item() == pytest.approx(10 * plain.preference(z).item())
    assert found.push(torch.zeros(4, 3)).shape == (4, 3)


def test_a_game_of_your_own(tmp_path):
    def ball(height):
        return Independent(Normal(torch.tensor([0.0, height]), torch.ones(2)), 1)

    game = MeanFieldGame(ball(1.0), ball(-1.0))
    game.check().demand()  # in double precision, whatever that of the densities
    first = game.policy(4, 2)
    pl.save(first, tmp_path / "model")
    with pytest.raises(ModelError, match=r"`Equilibrium.load\(folder, problem\)`"):
        pl.load(tmp_path / "model")
    again = Equilibrium.load(tmp_path / "model", game)
    x = torch.randn(5, 2)
    assert torch.equal(again.push(x), first.push(x))
    with pytest.raises(ModelError, match="holds a Equilibrium, not a Policy"):
        pl.control.Policy.load(tmp_path / "model", game)


def test_named_games():
    assert set(NAMED) == set(PROBLEMS) | set(GAMES)
    assert len(NAMED) == len(PROBLEMS) + len(GAMES)
    for name, named in GAMES.items():
        game = make(name)
        assert game.name == name
        assert game.dim == 2
        assert settings(game) == named.settings
        assert settings(game)["max_steps"] > 0  # which size full multiplies
    assert settings(make("crowd-motion", strength=10.0))["steps"] == 8
    with pytest.raises(ArgumentError, match="unknown problem 'corridor'"):
        make("corridor")


def test_resume_leaves_a_finished_run(run, capsys):
    weights = sorted(path.name for path in (run / "model").iterdir())
    assert main([*CROWD, "--out", str(run), "--resume"]) == 0
    assert sorted(path.name for path in (run / "model").iterdir()) == weights


def test_the_same_seed_gives_the_same(made, tmp_path, capsys):
    assert main([*CROWD, "--out", str(tmp_path / "again"), "--json"]) == 0
    metrics = json.loads(capsys.readouterr().out)
    before = json.loads((made / "metrics.json").read_text())
    for content in (metrics, before):
        content.pop("seconds")
    assert metrics == before


def test_list(capsys):
    assert main(["solve", "--list"]) == 0
    shown = capsys.readouterr().out
    for name, named in NAMED.items():
        assert name in shown
        assert named.summary in shown


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["crowd-moton"], ("unknown problem", "did you mean 'crowd-motion'?")),
        (["transport", "--dim", "1"], ("`dim`", "at least 2")),
        (["transport", "--strength", "2"], ("'transport'", "no option strength")),
        (["lqr", "--strength", "2"], ("'lqr'", "no option strength")),
        (["crowd-motion", "--strength", "-1"], ("strength",)),
        (["crowd-motion", "--noise", "1"], ("'crowd-motion'", "no option noise")),
        (["shift", "--ppo", "100"], ("--ppo", "'shift' is a mean-field game")),
        (["shift", "--base", "path"], ("--base", "'shift' is a mean-field game")),
        (["shift", "--no-baseline"], ("--baseline", "'shift' is a mean-field game")),
        (["shift", "--baseline"], ("--baseline", "'shift' is a mean-field game")),
    ],
)
def test_bad_options(words, said, tmp_path, capsys):
    refused(capsys, ["solve", *words, "--out", str(tmp_path / "run")], *said)
    assert not (tmp_path / "run").exists()


def test_check_and_report(run, capsys):
    before = json.loads((run / "metrics.json").read_text())["check"]
    (run / "report.html").write_text("old")
    code = main(["check", str(run), "--json", "--seed", "3"])
    found = json.loads(capsys.readouterr().out)
    assert code == (0 if found["passed"] else 1)
    assert found != before
    assert json.loads((run / "metrics.json").read_text())["check"] == found
    assert "<h2>Densities over time</h2>" in (run / "report.html").read_text()
    (run / "report.html").unlink()
    (run / "animation.gif").unlink()
    assert main(["report", str(run)]) == 0
    assert "<h2>Densities over time</h2>" in (run / "report.html").read_text()
    assert (run / "animation.gif").exists()


def test_commands_that_are_for_densities(run, tmp_path, capsys):
    table = tmp_path / "table.csv"
    table.write_text("x,y\n1,2\n")
    refused(capsys, ["sample", str(run), "--out", str(table)], "sample is for densities")
    refused(capsys, ["check", str(run), str(table)], "without a table")


def test_export(run, capsys):
    """The velocity, without Pathline."""
    assert main(["export", str(run), "--to", "torch-export"]) == 0
    module = torch.export.load(run / "export" / "control.pt2").module()
    t, z = torch.tensor(0.3), torch.randn(7, 3)
    torch.testing.assert_close(module(t, z), pl.load(run).velocity(t, z).detach())


def test_reproduce(tmp_path, capsys):
    arguments = ["reproduce", "mfg-shift", "--max-steps", "2", "--out", str(tmp_path / "run")]
    assert main([*arguments, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["published"] == 16.98
    assert found["measured"] == found["fresh"]["total"] > 16.9
    policy = pl.load(tmp_path / "run")
    x = policy.problem.initial(2000, torch.Generator().manual_seed(3))
    assert policy.simulate(x).cost.mean().item() == pytest.approx(found["measured"], rel=0.05)


def test_ablation(tmp_path, capsys):
    out = tmp_path / "run"
    arguments = ["reproduce", "mfg-hjb-ablation", "--max-steps", "2", "--out", str(out)]
    assert main([*arguments, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["steps"] == [2, 4, 8, 16, 32]
    with_, without = found["totals"].values()
    assert found["measured"] == pytest.approx(abs(with_[0] / with_[-1] - 1))
    assert with_ != without
    assert "<h2>Refinement of time steps</h2>" in (out / "report.html").read_text()
    assert main([*arguments, "--resume"]) == 0
    assert "without" in capsys.readouterr().out


def test_experiments():
    names = {name for name in EXPERIMENTS if name.startswith("mfg-")}
    dims = ("", "-10", "-50", "-100")
    assert names == {
        "mfg-shift", "mfg-hjb-ablation", "mfg-stochastic", *(f"mfg-transport{dim}" for dim in dims),
        *(f"mfg-crowd-motion{dim}" for dim in dims),
    }  # fmt: skip


def test_stochastic_crowd(tmp_path, capsys, monkeypatch):
    """Untrained agents only diffuse: variances grow by 2 viscosity t."""
    monkeypatch.setattr(stochastic_games, "PARTICLES", 1000)
    monkeypatch.setattr(stochastic_games, "STEPS", 4)
    monkeypatch.setattr(population, "PARTICLES", 100)
    arguments = ["reproduce", "mfg-stochastic", "--max-steps", "1", "--out", str(tmp_path / "run")]
    assert main([*arguments, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert set(found) >= {"2, 0", "2, 0.1", "2, 0.4", "50, 0.1", "100, 0.1", "measured"}
    widths = [sum(found[case][1][1]) for case in ("2, 0", "2, 0.1", "2, 0.4")]
    assert widths == sorted(widths)
    report = (tmp_path / "run" / "report.html").read_text()
    assert "<h2>Noise widens the crowd</h2>" in report
