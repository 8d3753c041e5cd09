"""Discretize-optimize against optimize-discretize: gradients, data and trainings."""

import json
import math

import numpy as np
import pytest
import torch
from scipy.integrate import solve_ivp
from torch import nn

import pathline as pl
from pathline import plots, report
from pathline.errors import ArgumentError, ShapeError, TrainingError
from pathline.integrate import odeint
from pathline.reproduce import EXPERIMENTS, RunArguments, do_vs_od, gradients
from pathline.reproduce.race import DO, OD, RunFolder, Training, columns, race

F64 = torch.float64


@pytest.fixture
def tiny(monkeypatch):
    """Few rows to judge with."""
    monkeypatch.setattr(do_vs_od, "TOY_ROWS", (500, 100))
    monkeypatch.setattr(do_vs_od, "FEW", 50)
    monkeypatch.setattr(report, "GRID", 4)
    monkeypatch.setattr(plots, "to_png", lambda figure, dpi=110: b"PNG")


def test_complex_differences_are_central_differences():
    problem = gradients.Regression.random(3)
    how = {"method": "euler", "options": {"step_size": 0.5}}
    found = problem.differences(**how)
    central, h = [], 1e-5
    for i, part in enumerate(problem.theta):
        for k in range(part.numel()):
            sides = []
            for sign in (1, -1):
                theta = [other.clone() for other in problem.theta]
                theta[i].view(-1)[k] += sign * h
                sides.append(problem.loss(theta, **how))
            central.append((sides[0] - sides[1]) / (2 * h))
    torch.testing.assert_close(found, torch.stack(central), rtol=1e-7, atol=1e-9)
    # DO is the gradient of the discrete loss, however coarse; OD is that of no such loss.
    torch.testing.assert_close(problem.gradient(**how), found, rtol=1e-13, atol=1e-14)
    assert gradients.relative(problem.gradient(gradient="adjoint", **how), found) > 0.01


def test_the_error_of_od_falls_with_the_tolerance_and_do_has_none():
    tolerances = (1e-2, 1e-6)
    errors = gradients.gradient_errors(0, tolerances)
    assert max(errors["DO"]) < 1e-11
    for tolerance, od, of_do, of_od in zip(
        tolerances,
        *(errors[name] for name in ("OD", "DO, of the ODE", "OD, of the ODE")),
        strict=True,
    ):
        assert all(0.01 * tolerance < error < 10 * tolerance for error in (od, of_do, of_od))


def test_a_contraction_can_not_be_reversed():
    decay, *others = gradients.reversals()
    # One step of RK4 multiplies by its polynomial R, and back again by R(1).
    R = sum(1 / math.factorial(k) for k in range(5))
    back = sum((-1) ** k / math.factorial(k) for k in range(5)) * R
    assert decay[1] == pytest.approx(back**50 - 1, rel=1e-3)
    assert decay[2] > 0.1
    assert all(row[1] > 1 and row[2] > 1 for row in others)
    assert [row[3] for row in (decay, *others)] == [0, 0, 0]


def test_peak_memory_counts_what_is_alive():
    with gradients.PeakMemory() as watch:
        x = torch.ones(1000, dtype=F64)
        x = x + 1  # two for an instant
        x[:10].mul_(2)  # no new storage
        y = x * 2
    assert watch.peak == 2 * 8000
    del x
    assert watch.total == 8000
    del y
    assert watch.total == 0


def test_memory_of_strategies():
    few, many = gradients.memory(0, steps=25), gradients.memory(0, steps=100)
    kept, some, none = (many[name] / few[other] for name, other in zip(many, few, strict=True))
    assert kept == pytest.approx(4, rel=0.1)
    assert 1.5 < some < 2.5  # the root
    assert none == pytest.approx(1, rel=0.05)


@pytest.mark.parametrize("start", do_vs_od.STARTS.values())
def test_the_spiral_is_scipys(start):
    times = torch.linspace(0, do_vs_od.SPAN, 50, dtype=F64)
    A = np.array([[-0.1, 2.0], [-2.0, -0.1]])
    exact = solve_ivp(
        lambda t, u: A.T @ u**3, (0, 25), start, "DOP853", times.numpy(), rtol=1e-12, atol=1e-12
    )
    np.testing.assert_allclose(do_vs_od.spiral(start, times), exact.y.T, atol=1e-8)


def test_evaluations_are_counted():
    """RK4 has four a step, and Euler's adjoint one a step."""
    net = nn.Linear(1, 1)
    calls = []
    ways = {
        "rk4": {"method": "rk4", "gradient": "discrete"},
        "euler": {
            "method": "euler",
            "gradient": "adjoint",
            "adjoint_params": tuple(net.parameters()),
        },
    }

    def loss(how):
        calls.append(how)
        times = torch.linspace(0, 1, 4)
        return odeint(lambda t, u: net(u), torch.ones(2, 1), times, **how)[-1].square().sum()

    trainings = {
        name: Training(lambda how=how: loss(how), [torch.optim.SGD(net.parameters(), 0.1)], net)
        for name, how in ways.items()
    }
    race(trainings, 4)
    costs = [training.costs() for training in trainings.values()]
    assert [(cost["forward"], cost["backward"]) for cost in costs] == [(12, 12), (3, 3)]
    assert calls == 4 * list(ways.values())  # in turns


def test_a_loss_that_is_not_finite_ends_the_race():
    net = nn.Linear(1, 1)
    training = Training(lambda: net(torch.ones(1, 1)).sum() * math.nan, [], net)
    with pytest.raises(TrainingError, match="mine: the loss is nan before step 1"):
        race({"mine": training}, 3)


def test_time_series(tmp_path, tiny):
    arguments = RunArguments(tmp_path / "run", max_steps=4)
    outcome = EXPERIMENTS["do-vs-od-time-series"].run(arguments, "small")
    do, od = outcome.details[DO], outcome.details[OD]
    assert do["forward"] == do["backward"] == 4 * (do_vs_od.WINDOW - 1)
    assert od["backward"] > do["backward"]
    assert do["test_mse"] == pytest.approx(od["test_mse"], rel=1e-3)  # the same batches
    assert outcome.measured == pytest.approx(do["seconds"] / od["seconds"])
    assert json.loads((tmp_path / "run" / "metrics.json").read_text())["source"] == outcome.source
    log = (tmp_path / "run" / "log.jsonl").read_text().splitlines()
    assert {json.loads(line)["training"] for line in log} == {DO, OD}
    page = (tmp_path / "run" / "report.html").read_text()
    assert "Comparison" in page and "The spiral" in page and page.count("<img") == 2


def test_cnf(tmp_path, tiny):
    arguments = RunArguments(tmp_path / "run", max_steps=2)
    outcome = EXPERIMENTS["do-vs-od-cnf-moons"].run(arguments, "small")
    do, od = outcome.details[DO], outcome.details[OD]
    assert do["test_nll"] == pytest.approx(od["test_nll"], abs=1e-3)
    assert do["inverse_error"] < 1e-6
    assert min(do["forward"], od["forward"], od["backward"]) > 0
    flow = pl.load(tmp_path / "run")
    assert flow.method == "rk4" and flow.sample(3, seed=0).shape == (3, 2)
    again = EXPERIMENTS["do-vs-od-cnf-moons"].run(
        RunArguments(tmp_path / "run", max_steps=2, resume=True), "small"
    )
    assert again.text == outcome.text and again.measured == outcome.measured
    with pytest.raises(ArgumentError, match="another seed: 0, now 1"):
        EXPERIMENTS["do-vs-od-cnf-moons"].run(
            RunArguments(tmp_path / "run", seed=1, max_steps=2, resume=True), "small"
        )


def test_gradient_experiment(tmp_path, tiny, monkeypatch):
    monkeypatch.setattr(gradients, "TOLERANCES", (1e-2, 1e-4))
    monkeypatch.setattr(gradients, "MEMORY_STEPS", 9)
    outcome = gradients.run(RunArguments(tmp_path / "run"), "small")
    assert outcome.measured < 1e-11
    assert "DO, 3 checkpoints" in outcome.text
    page = (tmp_path / "run" / "report.html").read_text()
    assert page.count("<img") == 1 and "Integrating backward" in page


def test_refusals(tmp_path):
    run = EXPERIMENTS["do-vs-od-cnf-electricity"].run
    with pytest.raises(ArgumentError, match="no --budget"):
        run(RunArguments(tmp_path / "run", budget=3.0), "small")
    with pytest.raises(ArgumentError, match="no published setting"):
        run(RunArguments(tmp_path / "run"), "full")
    (tmp_path / "file").touch()
    with pytest.raises(ArgumentError, match="not empty"):
        RunFolder.open("do-vs-od-x", RunArguments(tmp_path), "small")
    assert not (tmp_path / "run").exists()


def test_curves():
    lines = {"a $": ([1, 2], [3, 4]), "b": (np.array([1e-3, 1e-2]), np.array([1e-8, 1e-2]))}
    for options in ({}, {"log": True}, {"log_y": True}, {"equal": True}):
        figure = plots.curves(lines, "x", "y", "What it shows", **options)
        (ax,) = figure.axes
        assert [line.get_xydata().tolist() for line in ax.lines] == [
            np.stack(line, 1).tolist() for line in lines.values()
        ]
        assert (ax.get_xscale(), ax.get_yscale()) == (
            "log" if options.get("log") else "linear",
            "log" if options.get("log") or options.get("log_y") else "linear",
        )
        assert plots.to_png(figure, dpi=20).startswith(b"\x89PNG")
    with pytest.raises(ShapeError, match="'a' must be two arrays"):
        plots.curves({"a": ([1, 2], [3])}, "x", "y", "t")


def test_columns():
    assert columns([("", "a"), ("name", "10.5")]) == "         a\nname  10.5"
