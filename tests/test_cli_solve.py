"""Control problems on the command line: results, resume, check and report, one-line errors."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

import pathline as pl
from command_line import refused
from pathline import control_plots
from pathline.cli import main
from pathline.control.problems import PROBLEMS
from pathline.errors import ShapeError
from pathline.plots import to_png

LQR = ["solve", "lqr", "--max-steps", "5", "--width", "8", "--time-steps", "20"]


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("lqr") / "run"
    assert main([*LQR, "--out", str(out)]) == 0
    return out


@pytest.fixture
def run(made, tmp_path) -> Path:
    """A copy that a test may change."""
    return Path(shutil.copytree(made, tmp_path / "run"))


def test_what_a_run_holds(made):
    names = {entry.name for entry in made.iterdir()}
    assert names == {
        "config.json", "model", "checkpoint", "log.jsonl", "metrics.json", "report.html",
        "open_loop.npz",
    }  # fmt: skip
    metrics = json.loads((made / "metrics.json").read_text())
    assert metrics["check"]["passed"], metrics["check"]["verdict"]
    assert metrics["steps"] == 5
    # The open-loop optimum of this problem is the value function, 50 / 101 |z|^2.
    assert metrics["baseline"]["cost"] == pytest.approx(50 / 101 * 18, rel=1e-6)
    assert 0 <= metrics["baseline"]["suboptimality_percent"] < 1
    page = (made / "report.html").read_text()
    for heading in (
        "Summary", "States over time", "Controls over time", "Shocks", "Value along the path",
        "Training", "Configuration",
    ):  # fmt: skip
        assert f"<h2>{heading}</h2>" in page
    assert page.count("<img") == 5


def test_the_policy_opens(made):
    policy = pl.load(made)
    u = policy.control(0.0, torch.tensor([-3.0, -3.0])).detach()
    assert u.numpy() == pytest.approx(np.full(2, 300 / 101), rel=0.02)


def test_resume_leaves_a_finished_run(run, capsys):
    weights = sorted(path.name for path in (run / "model").iterdir())
    assert main([*LQR, "--out", str(run), "--resume", "--no-baseline"]) == 0
    assert "NOT" not in capsys.readouterr().out
    assert sorted(path.name for path in (run / "model").iterdir()) == weights
    assert json.loads((run / "metrics.json").read_text())["baseline"] is None
    assert not (run / "open_loop.npz").exists()


def test_resume_knows_its_steps(run, capsys):
    arguments = [word for word in LQR if word not in ("--max-steps", "5")]
    assert main([*arguments, "--out", str(run), "--resume", "--no-baseline", "--json"]) == 0
    metrics = json.loads(capsys.readouterr().out)
    assert metrics["steps"] == 5
    refused(capsys, [*arguments, "--dim", "3", "--out", str(run), "--resume"], "of its model")


def test_a_folder_in_use(run, tmp_path, capsys):
    refused(capsys, [*LQR, "--out", str(run)], "not empty", "--resume", "--overwrite")
    (run / "animation.gif").write_bytes(b"of the run before")
    (run / "mine.txt").write_text("kept")
    assert main([*LQR, "--out", str(run), "--overwrite", "--no-baseline"]) == 0
    assert not (run / "animation.gif").exists()
    assert (run / "mine.txt").read_text() == "kept"


def test_the_same_seed_gives_the_same(made, tmp_path, capsys):
    out = tmp_path / "again"
    assert main([*LQR, "--out", str(out), "--json"]) == 0
    metrics = json.loads(capsys.readouterr().out)
    before = json.loads((made / "metrics.json").read_text())
    for content in (metrics, before):
        content.pop("seconds")
        content["check"].pop("milliseconds")
    assert metrics == before


def test_noise_and_dim(tmp_path, capsys):
    arguments = ["solve", "lqr", "--dim", "1", "--noise", "0.4", "--max-steps", "2"]
    arguments += ["--time-steps", "50", "--base", "path"]
    assert main([*arguments, "--out", str(tmp_path / "run"), "--json"]) == 0
    metrics = json.loads(capsys.readouterr().out)
    assert metrics["baseline"] is None
    # 50 / 101 9 + 0.4^2 / 2 log 101
    check = metrics["check"]
    expected = 50 / 101 * 9 + 0.08 * np.log(101)
    assert abs(check["nominal_fine"] - expected) < 4 * check["nominal_error"]


def test_list(capsys):
    assert main(["solve", "--list"]) == 0
    shown = capsys.readouterr().out
    for name, named in PROBLEMS.items():
        assert name in shown
        assert named.summary in shown


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["coridor"], ("unknown problem 'coridor'", "did you mean 'corridor'?")),
        ([], ("NAME", "--list")),
        (["corridor", "--dim", "3"], ("'corridor'", "no option dim")),
        (["lqr", "--dim", "0"], ("dim",)),
        (["lqr", "--noise", "-1"], ("noise",)),
        (["lqr", "--base", "quadratic"], ("base",)),
        (["lqr", "--time-steps", "0"], ("time-steps",)),
        (["lqr", "--colour", "blue"], ("colour",)),
    ],
)
def test_bad_options(words, said, tmp_path, capsys):
    refused(capsys, ["solve", *words, "--out", str(tmp_path / "run")], *said)
    assert not (tmp_path / "run").exists()


def test_out_is_needed(capsys):
    refused(capsys, ["solve", "lqr"], "--out")
    refused(capsys, ["solve", "lqr", "--seed", "1"], "out")


def test_check_and_report(run, capsys):
    (run / "report.html").write_text("old")
    assert main(["check", str(run), "--json", "--seed", "3"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["passed"]
    assert json.loads((run / "metrics.json").read_text())["check"] == found
    assert "<h2>Shocks</h2>" in (run / "report.html").read_text()
    (run / "report.html").unlink()
    assert main(["report", str(run)]) == 0
    assert "<h2>Shocks</h2>" in (run / "report.html").read_text()
    capsys.readouterr()
    assert main(["check", str(run / "model")]) == 0  # of which there is no report
    assert "passed" in capsys.readouterr().out


def test_a_spoiled_policy_ends_with_1(run, capsys):
    policy = pl.load(run)
    with torch.no_grad():
        policy.potential.base.values.mul_(0.5)
    pl.save(policy, run / "model")
    assert main(["check", str(run)]) == 1
    assert "NOT exact" in capsys.readouterr().out


def test_commands_that_are_for_densities(run, tmp_path, capsys):
    table = tmp_path / "table.csv"
    table.write_text("x,y\n1,2\n")
    out = str(tmp_path / "out.csv")
    refused(capsys, ["sample", str(run), "--out", out], "sample is for densities", "policy")
    refused(capsys, ["score", str(run), str(table)], "score is for densities", "policy")
    refused(capsys, ["check", str(run), str(table)], "without a table")


def test_check_of_a_density_needs_a_table(tmp_path, capsys):
    pl.save(pl.flows.OTFlow(2, width=8, depth=2), tmp_path / "model")
    refused(capsys, ["check", str(tmp_path / "model")], "needs a FILE")


# Figures


def way(agents: int, space: int) -> np.ndarray:
    t = np.linspace(0, 1, 11)[:, None, None]
    ends = np.random.default_rng(0).normal(size=(2, agents, space))
    return (1 - t) * ends[0] + t * ends[1]


@pytest.mark.parametrize(("agents", "space"), [(2, 2), (50, 3), (1, 3)])
def test_paths(agents, space):
    z, t = way(agents, space), np.linspace(0, 1, 11)
    boxes = [((-1, -1, -np.inf), (0, 0, 1))] if space == 3 else None
    figure = control_plots.paths(t, z, z[-1], radius=0.1, others=z, boxes=boxes)
    assert to_png(figure)[:4] == b"\x89PNG"
    # Each agent has a piece for each step.
    assert len(figure.axes[0].collections[0].get_array()) == 10 * agents
    with pytest.raises(ShapeError, match="`positions`"):
        control_plots.paths(t[1:], z, z[-1])


def test_courses():
    t = np.linspace(0, 1, 11)
    figure = control_plots.courses(
        t, np.zeros((11, 3, 20)), [f"z{i}" for i in range(20)], title="S"
    )
    assert len(figure.axes) == control_plots.PANELS
    assert "first 12 of 20" in figure.get_label()
    with pytest.raises(ShapeError, match="`values`"):
        control_plots.courses(t, np.zeros((10, 2)), ["a", "b"], title="States")


def test_animation():
    from io import BytesIO

    from PIL import Image

    z, t = way(2, 2), np.linspace(0, 1, 11)
    gif = control_plots.animation(control_plots.paths(t, z, z[-1], upto=n) for n in range(1, 11, 3))
    with Image.open(BytesIO(gif)) as image:
        assert image.n_frames == 4
        assert image.info["loop"] == 0


def test_ppo_is_run_beside(tmp_path, capsys):
    pytest.importorskip("stable_baselines3")
    out = tmp_path / "run"
    assert main([*LQR, "--out", str(out), "--no-baseline", "--ppo", "20000", "--json"]) == 0
    race = json.loads(capsys.readouterr().out)["ppo"]
    # 5 steps of 256 starts, with 20 time steps of four stages and a midpoint, and an end each.
    assert race["own_evaluations"][-1] == 5 * 256 * (20 * 5 + 1)
    assert race["best"] == min(race["costs"]) > race["own_costs"][-1]
    assert "Reinforcement learning" in (out / "report.html").read_text()


def test_export(run, capsys):
    assert main(["export", str(run), "--to", "torch-export"]) == 0
    assert "control.pt2" in capsys.readouterr().out
    module = torch.export.load(run / "export" / "control.pt2").module()
    z = torch.tensor([[-3.0, -3.0]])
    torch.testing.assert_close(module(torch.tensor(0.0), z), pl.load(run).control(0.0, z).detach())
    refused(capsys, ["export", str(run), "--to", "onnx"], "--to", "torch-export")


def test_reproduce(tmp_path, capsys):
    arguments = ["reproduce", "lqr", "--max-steps", "3", "--out", str(tmp_path / "run"), "--json"]
    assert main(arguments) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["measured"] == found["check"]["value_error"] < 0.01
