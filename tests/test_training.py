"""Training: reproducible, resumable, interruptible, and never worse than what was saved."""

import copy
import json
import math
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

import pathline as pl
from pathline.errors import ArgumentError, DataError, ShapeError, TrainingError
from pathline.flows import FlowObjective
from pathline.train import Distrust, Loss, Objective, Rows, budget, files
from pathline.train.muon import Muon, orthogonalize
from pathline.train.trainer import Trainer
from train_script import data as script_data
from train_script import fit as script_fit

SCRIPT = Path(__file__).with_name("train_script.py")
X = script_data()


def new_flow(width=8, **kwargs):
    return pl.flows.OTFlow(2, width, generator=torch.Generator().manual_seed(0), **kwargs)


def train(flow=None, data=X, **kwargs):
    """A short quiet run; the flow and the `Run`."""
    flow = new_flow() if flow is None else flow
    defaults = {"max_steps": 40, "batch_size": 64, "patience": 1000, "progress": False}
    return flow, pl.fit(flow, data, **defaults | kwargs)


def same(a, b):
    a, b = a.state_dict(), b.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def log(folder):
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def losses(run):
    return [entry["loss"] for entry in run.history]


# Seeds


def test_same_seed_same_weights():
    first, run = train(seed=3)
    torch.manual_seed(99), torch.randn(7)  # the global generator plays no part
    second, again = train(seed=3)
    assert same(first, second)
    assert losses(run) == losses(again)
    other, _ = train(seed=4)
    assert not same(first, other)


def test_global_generator_is_left_alone():
    torch.manual_seed(5)
    before = torch.get_rng_state()
    train(max_steps=10)
    assert torch.equal(torch.get_rng_state(), before)


# What training achieves


def validated(flow, held, run):
    """Whether the flow's validation figure is the run's, on the time grid of the best moment.

    `adapt` may have changed the grid since then.
    """
    judge, values = FlowObjective(flow), []
    for judge.steps in range(1, 17):
        values.append(judge.validate(torch.from_numpy(held)).double().mean().item())
    return min(abs(value - run.validation) for value in values) < 1e-6


def test_loss_falls_and_best_weights_are_restored():
    train_rows, held = X[:500], X[500:]
    flow, run = train(data=train_rows, validation=held, max_steps=200)
    start = FlowObjective(new_flow())
    start.prepare(Rows(train_rows), torch.Generator().manual_seed(0))
    assert run.validation < start.validate(torch.from_numpy(held)).mean() - 0.1
    assert validated(flow, held, run)
    assert run.steps == 200 and run.stopped == "steps"
    assert 0 < run.best_step <= 200
    assert flow.steps == run.metrics["time_steps"]


def test_early_stopping_restores_the_best():
    """Forty rows and a wide network: validation turns up, and training ends."""
    generator = np.random.default_rng(1)
    few, held = generator.normal(size=(40, 2)), generator.normal(size=(400, 2))
    flow = new_flow(32, transport=0.0, hjb=0.01)
    _, run = train(flow, few, validation=held, max_steps=2000, patience=4, learning_rate=0.1)
    assert run.stopped == "early"
    assert run.best_step < run.steps < 2000
    assert validated(flow, held, run)


def test_training_goes_on_from_a_trained_flow():
    flow, _ = train(max_steps=30)
    scale = flow.standardize.scale.clone()
    before = copy.deepcopy(flow)
    train(flow, X + 1.0, max_steps=10, learning_rate=1e-12)
    assert torch.equal(flow.standardize.scale, scale)
    torch.testing.assert_close(flow.potential.w, before.potential.w, rtol=1e-5, atol=1e-6)


# Weights


def prepared_flow(**kwargs):
    """A double-precision flow that `fit` does not prepare again."""
    flow = new_flow(**kwargs).double()
    with torch.no_grad():
        flow.potential.random_features(torch.from_numpy(X), 0.7, torch.Generator().manual_seed(1))
        flow.prepared.fill_(True)
    return flow


def test_integer_weights_are_repeated_rows():
    counts = np.arange(80) % 4
    repeated = np.repeat(X[:80], counts, axis=0)
    kwargs = {"validation": X[80:160], "batch_size": 10_000, "max_steps": 60}
    weighted, run = train(prepared_flow(), X[:80], sample_weight=counts, **kwargs)
    plain, again = train(prepared_flow(), repeated, **kwargs)
    _, without = train(prepared_flow(), X[:80], **kwargs)
    np.testing.assert_allclose(losses(run), losses(again), rtol=1e-7)
    assert abs(run.validation - again.validation) < 1e-6
    assert abs(losses(run)[-1] - losses(without)[-1]) > 1e-3
    x = torch.from_numpy(X[:20])
    torch.testing.assert_close(weighted.log_prob(x), plain.log_prob(x), rtol=1e-5, atol=1e-5)


def test_weights_matter_by_their_ratio_only():
    weights = np.random.default_rng(0).uniform(0.1, 2, len(X))
    first, _ = train(sample_weight=weights)
    second, _ = train(sample_weight=4 * weights)
    assert same(first, second)
    third, _ = train()
    assert not same(first, third)


@pytest.mark.parametrize("prepared", [True, False])
def test_rows_of_zero_weight_have_no_influence(prepared):
    """Two training sets that differ in their weightless rows only give the same flow."""
    weights = np.ones(120)
    weights[100:] = 0
    wild = X[:120].copy()
    wild[100:] = 25.0
    flows = []
    for rows in (X[:120], wild):
        flow = prepared_flow() if prepared else new_flow().double()
        kwargs = {"validation": X[200:300], "batch_size": 1000, "max_steps": 60}
        flows.append(train(flow, rows, sample_weight=weights, **kwargs)[0])
    x = torch.from_numpy(X[:20])
    torch.testing.assert_close(flows[0].log_prob(x), flows[1].log_prob(x), rtol=1e-6, atol=1e-6)
    assert flows[0].hjb == flows[1].hjb


def test_weighted_standardisation():
    counts = np.arange(200) % 3
    flow, _ = train(data=X[:200], validation=X[200:], sample_weight=counts, max_steps=1)
    repeated = np.repeat(X[:200], counts, axis=0)
    np.testing.assert_allclose(flow.standardize.mean, repeated.mean(0), rtol=1e-10)
    scale = flow.standardize.scale.numpy()
    np.testing.assert_allclose(scale @ scale.T, np.cov(repeated.T, bias=True), rtol=1e-9)


def test_held_out_rows_keep_their_weights():
    """All the weight on one kind of row: the flow never learns the other."""
    rows = np.concatenate([X[:300] - 40, X[:300] + 40])
    weights = np.repeat([0.0, 1.0], 300)
    flow, run = train(data=rows, sample_weight=weights, max_steps=60)
    assert flow.sample(50, seed=0)[:, 0].min() > 20
    assert run.validation < 4


@pytest.mark.parametrize(
    "weights, error, text",
    [
        (np.ones(5), ShapeError, r"`sample_weight` must be \(601,\), got \(5,\)"),
        (np.ones((601, 1)), ShapeError, r"`sample_weight` must be \(601,\), got \(601, 1\)"),
        (-np.ones(601), DataError, "`sample_weight` must be finite and not negative"),
        (np.full(601, np.nan), DataError, "`sample_weight` must be finite and not negative"),
        (np.full(601, np.inf), DataError, "`sample_weight` must be finite and not negative"),
        (np.zeros(601), DataError, "`sample_weight` must have a positive sum, got only zeros"),
    ],
)
def test_weights_errors(tmp_path, weights, error, text):
    with pytest.raises(error, match=text):
        train(sample_weight=weights, out=tmp_path / "run")
    assert not (tmp_path / "run").exists()


# Data


def with_value(value):
    rows = X.copy()
    rows[17, 1] = value
    return rows


@pytest.mark.parametrize(
    "rows, error, text",
    [
        (with_value(np.nan), DataError, "`data` must be finite, got nan in row 17, column 1"),
        (with_value(-np.inf), DataError, "`data` must be finite, got -inf in row 17, column 1"),
        (X[:, 0], ShapeError, r"`data` must be \(rows, columns\), got \(601,\)"),
        (X[:0], DataError, r"`data` is empty: \(0, 2\)"),
        (X[:, :1], ShapeError, "`data` must have 2 columns like the flow, got 1"),
        (X[:1], ArgumentError, "`data` must have at least two rows, got 1"),
        (X.astype(str), DataError, "`data` must hold real numbers"),
        (X.astype(complex), DataError, "`data` must hold real numbers"),
        (np.c_[X[:, :1], 2 * X[:, :1]], DataError, r"linearly dependent columns.*\[0, 1\]"),
        (np.c_[X[:, :1], 0 * X[:, :1] + 0.1], DataError, r"constant columns.*\[1\]"),
    ],
    ids=lambda value: value.__name__ if isinstance(value, type) else None,
)
def test_data_errors(tmp_path, rows, error, text):
    with pytest.raises(error, match=text):
        train(data=rows, out=tmp_path / "run", max_steps=1)


def test_nan_deep_in_the_data():
    """Also beyond the first block of rows that is read at once."""
    rows = np.zeros((70_000, 1))
    rows[66_123] = np.nan
    with pytest.raises(DataError, match="in row 66123, column 0"):
        Rows(rows)


@pytest.mark.parametrize(
    "validation, error, text",
    [
        (X[:, :1], ShapeError, "`validation` must have 2 columns like `data`, got 1"),
        (with_value(np.nan), DataError, "`validation` must be finite, got nan in row 17, column 1"),
    ],
)
def test_validation_errors(validation, error, text):
    with pytest.raises(error, match=text):
        train(validation=validation)


@pytest.mark.parametrize(
    "arguments, text",
    [
        ({"max_steps": 0}, "`max_steps` must be a positive integer, got 0"),
        ({"batch_size": 2.5}, "`batch_size` must be a positive integer, got 2.5"),
        ({"patience": -1}, "`patience` must be a positive integer, got -1"),
        ({"budget": 0.0}, "`budget` must be positive and finite, got 0.0"),
        ({"budget": math.inf}, "`budget` must be positive and finite, got inf"),
        ({"learning_rate": -0.1}, "`learning_rate` must be positive and finite, got -0.1"),
        ({"seed": -1}, "`seed` must be an integer >= 0, got -1"),
        ({"resume": True}, "`resume` needs `out`"),
    ],
)
def test_argument_errors(arguments, text):
    with pytest.raises(ArgumentError, match=text):
        train(**arguments)


def test_a_module_without_objective_is_refused():
    with pytest.raises(ArgumentError, match=r"`objective\(\)` that returns one, got Linear"):
        pl.fit(torch.nn.Linear(2, 2), X)


@pytest.mark.parametrize("kind", ["memory map", "tensor", "single", "fortran", "reversed"])
def test_every_kind_of_array_trains_the_same(tmp_path, kind):
    np.save(tmp_path / "x.npy", X)
    data, base = {
        "memory map": (np.load(tmp_path / "x.npy", mmap_mode="r"), X),
        "tensor": (torch.from_numpy(X), X),
        "single": (X.astype(np.float32), X.astype(np.float32).astype(np.float64)),
        "fortran": (np.asfortranarray(X), X),
        "reversed": (X[::-1], X[::-1].copy()),
    }[kind]
    assert same(train(data=data)[0], train(data=base)[0])


def test_data_are_not_changed():
    rows = X.copy()
    train(data=rows, validation=rows)
    assert np.array_equal(rows, X)


# The run folder


def test_run_folder(tmp_path):
    flow, run = train(out=tmp_path / "run", seed=5, metadata={"columns": ["a", "b"]})
    folder = run.out
    assert folder == tmp_path / "run"
    entries = log(folder)
    assert entries == run.history
    assert [entry["step"] for entry in entries] == list(range(1, 41))
    for entry in entries:
        assert entry.keys() >= {"step", "seconds", "loss", "nll", "transport", "hjb"}
        whole = entry["nll"] + flow.transport * entry["transport"]
        assert entry["loss"] >= whole - 1e-6
    first = entries[0]
    assert first["loss"] == pytest.approx(
        first["nll"] + flow.transport * first["transport"] + flow.hjb * first["hjb"], rel=1e-5
    )
    config = json.loads((folder / "config.json").read_text())
    assert config["settings"]["seed"] == 5
    assert (config["max_steps"], config["pause_every"]) == (40, 10)
    assert config["watched_rows"] == config["final_rows"] == 60
    assert config["versions"]["torch"] == torch.__version__
    assert config["versions"]["pathline"] == pl.__version__
    assert config["versions"].keys() >= {"python", "numpy"}
    assert len(config["data"]["sha256"]) == 64
    assert config["data"]["rows"] == 541 and config["data"]["validation_rows"] == 60
    assert config["model"]["kind"] == "OTFlow" and config["model"]["width"] == 8
    metrics = json.loads((folder / "metrics.json").read_text())
    assert metrics["validation_loss"] == run.validation
    assert metrics["steps"] == 40 and metrics["best_step"] == run.best_step
    assert same(pl.load(folder), flow)
    assert pl.load(folder).steps == flow.steps
    assert pl.models.metadata(folder) == {"columns": ["a", "b"]}
    assert list((folder / "checkpoint").glob("*.safetensors"))


def test_data_hash_sees_one_changed_value(tmp_path):
    train(out=tmp_path / "a", max_steps=1)
    rows = X.copy()
    rows[300, 1] += 1e-12
    train(data=rows, out=tmp_path / "b", max_steps=1)
    hashes = [json.loads((tmp_path / n / "config.json").read_text())["data"] for n in "ab"]
    assert hashes[0] != hashes[1]


def test_folder_in_use_is_refused(tmp_path):
    (tmp_path / "mine.txt").write_text("precious")
    with pytest.raises(ArgumentError, match=r"is not empty; --resume goes on.*--overwrite"):
        train(out=tmp_path)
    assert [entry.name for entry in tmp_path.iterdir()] == ["mine.txt"]


def test_output_is_a_file(tmp_path):
    (tmp_path / "file").write_text("precious")
    with pytest.raises(ArgumentError, match="is a file"):
        train(out=tmp_path / "file", overwrite=True)
    assert (tmp_path / "file").read_text() == "precious"


def test_overwrite_replaces_the_run_and_nothing_else(tmp_path):
    train(out=tmp_path, max_steps=20)
    (tmp_path / "mine.txt").write_text("precious")
    (tmp_path / "figures").mkdir()
    (tmp_path / "report.html").write_text("old")
    flow, _ = train(out=tmp_path, max_steps=10, overwrite=True, seed=9)
    assert (tmp_path / "mine.txt").read_text() == "precious"
    assert (tmp_path / "figures").is_dir()
    assert not (tmp_path / "report.html").exists()
    assert len(log(tmp_path)) == 10
    assert same(pl.load(tmp_path), flow)


def test_bad_input_leaves_an_old_run_alone(tmp_path):
    flow, _ = train(out=tmp_path, max_steps=10)
    for rows, error in ((with_value(np.nan), DataError), (X[:, :1], ShapeError)):
        with pytest.raises(error):
            train(data=rows, out=tmp_path, overwrite=True)
    assert same(pl.load(tmp_path), flow)


def taken(plan, costs):
    """Seconds that a run by this plan takes, counted part by part."""
    pauses = sum(
        step % plan.pause_every == 0 or step == plan.max_steps
        for step in range(1, plan.max_steps + 1)
    )
    validation = costs.validation * plan.watched_rows
    return (
        plan.max_steps * costs.step
        + validation
        + pauses * (validation + costs.adapt + costs.save)
        + budget.FINER * costs.finish * plan.final_rows
        + costs.save
    )


@pytest.mark.parametrize("seconds", [2.0, 5.0, 60.0, 3600.0])
@pytest.mark.parametrize("step", [2e-4, 1e-3, 2e-2])
@pytest.mark.parametrize("finish", [1e-6, 1e-3])
def test_plan_takes_its_budget(seconds, step, finish):
    costs = budget.Costs(step, 2e-3 * step, step, 3e-3, finish)
    plan = budget.within(seconds, costs, 10_000)
    pause = costs.validation * plan.watched_rows + costs.adapt + costs.save
    assert 0.95 * seconds - pause < taken(plan, costs) < 1.02 * seconds + step
    assert plan.max_steps // plan.pause_every * pause <= 0.16 * seconds
    assert 1_000 <= plan.watched_rows <= 5_000
    assert plan.max_work == plan.max_steps


def test_plan_of_plenty_is_the_plan_without_a_budget():
    costs = budget.Costs(1e-3, 1e-6, 1e-3, 1e-3, 1e-5)
    plenty = budget.within(1e6, costs, 10_000, most=3000)
    assert replace(plenty, max_work=math.inf) == budget.course(3000, 10_000)
    assert budget.course(3000, 10_000) == budget.Plan(3000, math.inf, 60, 5_000, 2_000)


def test_plan_without_time_still_trains():
    costs = budget.Costs(1.0, 1e-2, 1.0, 1.0, 1.0)
    plan = budget.within(-1.0, costs, 70)
    assert (plan.max_steps, plan.watched_rows, plan.final_rows) == (1, 70, 70)


class Clocked(FlowObjective):
    """On a clock that only its own work advances: a row takes a known time."""

    effort_now = 1.0
    now = 0.0

    def forward(self, batch, weights=None):
        Clocked.now += 1e-3 * len(batch) * self.effort_now
        return super().forward(batch, weights)

    def validate(self, batch):
        Clocked.now += 1e-4 * len(batch) * self.effort_now
        return super().validate(batch)

    def adapt(self, batch):
        Clocked.now += 1e-4 * len(batch) * self.effort_now

    def finish(self, rows):
        Clocked.now += 1e-3 * len(rows)
        return {}

    def effort(self):
        return self.effort_now


class Doubling(Clocked):
    """Its work takes twice as long from the first adaption on, as a finer time grid would."""

    def adapt(self, batch):
        super().adapt(batch)
        self.effort_now = 2.0
        return "twice the work"

    def state(self):
        return super().state() | {"effort_now": self.effort_now}

    def restore(self, state):
        super().restore(state)
        self.effort_now = state["effort_now"]


@pytest.fixture
def clock(monkeypatch):
    monkeypatch.setattr(Clocked, "now", 0.0)
    monkeypatch.setattr("pathline.train.trainer.time.perf_counter", lambda: Clocked.now)


@pytest.mark.parametrize("kind", [Clocked, Doubling])
@pytest.mark.parametrize("seconds", [10.0, 30.0])
def test_budget_is_the_time_of_the_whole_call(tmp_path, clock, kind, seconds):
    _, run = train(kind(new_flow()), out=tmp_path, max_steps=None, budget=seconds)
    assert 0.85 * seconds < Clocked.now < 1.1 * seconds
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["settings"]["budget"] == seconds
    assert config["max_work"] == config["max_steps"]
    assert config["watched_rows"] == config["final_rows"] == 60
    if kind is Clocked:
        assert run.steps == config["max_steps"]
    else:
        first = config["pause_every"]
        assert run.steps == first + math.ceil((config["max_work"] - first) / 2)
    steps = [entry["step"] for entry in run.history]
    assert steps[-1] == run.steps


@pytest.mark.parametrize("kind", [Clocked, Doubling])
def test_resume_never_times_again(tmp_path, clock, monkeypatch, kind):
    options = {"max_steps": None, "budget": 10.0}
    whole, run = train(kind(new_flow()), out=tmp_path / "whole", **options)
    config = (tmp_path / "whole" / "config.json").read_text()

    class Stopping(kind):
        def effort(self):
            if len(self.seen) == run.steps // 2:
                signal.raise_signal(signal.SIGINT)
            self.seen.append(0)
            return super().effort()

    Clocked.now = 0.0
    stopping = Stopping(new_flow())
    stopping.seen = []
    with pytest.raises(KeyboardInterrupt):
        train(stopping, out=tmp_path / "parts", **options)
    monkeypatch.setattr(Trainer, "_timed", None)
    parts, again = train(kind(new_flow()), out=tmp_path / "parts", resume=True, **options)
    assert same(whole, parts)
    assert losses(run) == losses(again)
    assert (tmp_path / "parts" / "config.json").read_text() == config


def test_budget_with_a_limit_of_steps():
    _, capped = train(budget=1e9, max_steps=7)
    assert capped.steps == 7


def test_timing_leaves_no_trace():
    """The warm-up of a budget changes neither weights nor batches."""
    plain, _ = train(max_steps=30)
    timed, run = train(max_steps=30, budget=1e9)
    assert run.steps == 30
    assert same(plain, timed)


# Interruption and resumption


class Interrupting(FlowObjective):
    """Sends this process a signal in the middle of step `at`."""

    def __init__(self, flow, at, number=signal.SIGINT):
        super().__init__(flow)
        self.calls, self.at, self.number = 0, at, number

    def forward(self, batch, weights=None):
        self.calls += 1
        if self.calls == self.at:
            signal.raise_signal(self.number)
        return super().forward(batch, weights)


@pytest.mark.parametrize("at", [3, 10, 27, 40])
def test_resumed_run_is_the_uninterrupted_one(tmp_path, at):
    whole, run = train(out=tmp_path / "whole")
    handlers = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    with pytest.raises(KeyboardInterrupt):
        train(Interrupting(new_flow(), at), out=tmp_path / "parts")
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == handlers
    assert not (tmp_path / "parts" / "metrics.json").exists()
    assert [entry["step"] for entry in log(tmp_path / "parts")] == list(range(1, at + 1))
    pl.load(tmp_path / "parts").log_prob(torch.from_numpy(X[:3]))
    parts, again = train(out=tmp_path / "parts", resume=True)
    assert same(whole, parts)
    assert losses(run) == losses(again)
    assert (run.validation, run.best_step) == (again.validation, again.best_step)
    assert [entry["step"] for entry in log(tmp_path / "parts")] == list(range(1, 41))
    assert log(tmp_path / "parts") == again.history
    assert same(pl.load(tmp_path / "parts"), whole)


def test_resumed_twice(tmp_path):
    whole, _ = train()
    for at, resume in ((13, False), (9, True)):
        with pytest.raises(KeyboardInterrupt):
            train(Interrupting(new_flow(), at), out=tmp_path, resume=resume)
    assert same(train(out=tmp_path, resume=True)[0], whole)


def test_sigterm_stops_like_ctrl_c(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        train(Interrupting(new_flow(), 12, signal.SIGTERM), out=tmp_path)
    assert same(train(out=tmp_path, resume=True)[0], train()[0])


def test_resume_of_a_finished_run_changes_nothing(tmp_path):
    flow, run = train(out=tmp_path)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    again, rerun = train(out=tmp_path, resume=True)
    assert same(flow, again)
    assert rerun.history == run.history
    assert (rerun.steps, rerun.stopped) == (run.steps, run.stopped)
    after = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    assert {str(path) for path in before if before[path] != after.get(path)} == set()


def test_resume_where_there_is_no_run(tmp_path):
    assert same(train(out=tmp_path / "new", resume=True)[0], train()[0])


@pytest.mark.parametrize(
    "changes, text",
    [
        ({"data": X + 1}, "another sha256 of its data"),
        ({"data": X[:-1]}, "another rows of its data"),
        ({"validation": X[:50]}, "another .* of its data"),
        ({"seed": 1}, "another"),
        ({"max_steps": 50}, "another max_steps of its settings: 40, now 50"),
        ({"batch_size": 32}, "another batch_size of its settings"),
        ({"flow": new_flow(9)}, "another width of its model: 8, now 9"),
        ({"sample_weight": np.arange(601) + 1.0}, "another .* of its data"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, dict) else None,
)
def test_resume_with_something_else_is_refused(tmp_path, changes, text):
    with pytest.raises(KeyboardInterrupt):
        train(Interrupting(new_flow(), 12), out=tmp_path)
    before = pl.load(tmp_path)
    with pytest.raises(ArgumentError, match=f"{text}.*--overwrite starts again"):
        train(out=tmp_path, resume=True, **changes)
    assert same(pl.load(tmp_path), before)


def test_half_a_line_in_the_log_is_dropped(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        train(Interrupting(new_flow(), 12), out=tmp_path)
    with (tmp_path / "log.jsonl").open("a") as file:
        file.write('{"step": 13, "lo')
    train(out=tmp_path, resume=True)
    assert [entry["step"] for entry in log(tmp_path)] == list(range(1, 41))


def script(folder, *options):
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, SCRIPT, folder, *options],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def wait_for_log(process, folder, lines):
    """Until the run has logged that much; fails if it ends before."""
    path = folder / "log.jsonl"
    while process.poll() is None:
        if path.exists() and path.read_text().count("\n") >= lines:
            return
        time.sleep(0.002)
    pytest.fail(f"the run ended too early: {process.communicate()}")


def test_killed_run_resumes_bit_for_bit(tmp_path):
    killed = script(tmp_path / "killed")
    wait_for_log(killed, tmp_path / "killed", 47)
    killed.kill()
    killed.communicate()
    steps = [entry["step"] for entry in log(tmp_path / "killed")]
    assert len(steps) < 150 and not (tmp_path / "killed" / "metrics.json").exists()
    whole, run = script_fit(tmp_path / "whole")
    resumed, again = script_fit(tmp_path / "killed", resume=True)
    assert same(whole, resumed)
    assert same(pl.load(tmp_path / "killed"), whole)
    assert losses(run) == losses(again)
    assert [e["step"] for e in log(tmp_path / "killed")] == [e["step"] for e in run.history]


def test_ctrl_c_on_a_process(tmp_path):
    process = script(tmp_path, "--steps", "5000")
    wait_for_log(process, tmp_path, 3)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert "KeyboardInterrupt" in err and process.returncode != 0
    assert (tmp_path / "checkpoint").is_dir()
    flow = pl.load(tmp_path)
    assert flow.log_prob(torch.from_numpy(X[:5])).isfinite().all()
    assert files.read_checkpoint(tmp_path / "checkpoint" / "state.safetensors")


# Failures


class Failing(FlowObjective):
    """Its loss is `value` at the calls in `at`."""

    def __init__(self, flow, at, value=math.nan):
        super().__init__(flow)
        self.calls, self.at, self.value = 0, at, value

    def forward(self, batch, weights=None):
        self.calls += 1
        loss = super().forward(batch, weights)
        if self.calls in self.at:
            return Loss(loss.total * self.value, loss.terms)
        return loss


class Distrusting(FlowObjective):
    """Distrusts the model at the calls in `at` of `adapt`."""

    def __init__(self, flow, at):
        super().__init__(flow)
        self.asked, self.at = 0, at

    def adapt(self, batch):
        self.asked += 1
        if self.asked in self.at:
            raise Distrust("another grid says otherwise")
        return super().adapt(batch)


def test_distrust_goes_back_to_the_last_pause():
    flow = new_flow()
    objective = Distrusting(flow, {3})
    _, run = train(objective)
    assert run.steps == 40
    (event,) = [event for event in run.events if "back to step" in event]
    assert event == "step 30: another grid says otherwise; back to step 20, rate x 0.8"
    assert objective.asked == 5  # at steps 10, 20, 30, 30 again and 40


def test_lasting_distrust_ends_training_with_the_best_model_kept():
    flow = new_flow()
    with pytest.raises(TrainingError, match="8 times in a row at step 20"):
        train(Distrusting(flow, set(range(2, 100))))
    assert all(p.isfinite().all() for p in flow.parameters())


def test_first_rate_is_the_callers_or_the_objectives(tmp_path):
    for given, first in ((None, FlowObjective(new_flow()).default_rate(40)), (0.007, 0.007)):
        train(learning_rate=given, out=tmp_path / str(given))
        config = json.loads((tmp_path / str(given) / "config.json").read_text())
        assert config["learning_rate"] == first


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_one_bad_loss_goes_back_with_a_smaller_rate(tmp_path, value):
    flow = new_flow()
    _, run = train(Failing(flow, {25}, value), out=tmp_path)
    assert run.steps == 40
    assert all(p.isfinite().all() for p in flow.parameters())
    (event,) = [event for event in run.events if "back to step" in event]
    assert event.startswith("step 25: the loss is not finite; back to step 20")
    assert event.endswith("rate x 0.5")
    assert json.loads((tmp_path / "metrics.json").read_text())["events"] == run.events
    rates = {entry["step"]: entry["learning_rate"] for entry in run.history}
    _, plain = train()
    for entry in plain.history:
        factor = 0.5 if entry["step"] > 20 else 1.0
        assert rates[entry["step"]] == pytest.approx(factor * entry["learning_rate"])
    steps = [entry["step"] for entry in log(tmp_path)]
    assert steps == list(range(1, 41))  # what was undone is not logged twice
    assert same(pl.load(tmp_path), flow)


def test_bad_loss_then_interruption_resumes(tmp_path):
    with pytest.raises(KeyboardInterrupt):

        class Both(Failing):
            def forward(self, batch, weights=None):
                if self.calls == 32:
                    signal.raise_signal(signal.SIGINT)
                return super().forward(batch, weights)

        train(Both(new_flow(), {25}), out=tmp_path)
    _, run = train(out=tmp_path, resume=True)
    assert run.steps == 40
    assert [e for e in run.events if "back to step" in e]
    assert [entry["step"] for entry in log(tmp_path)] == list(range(1, 41))


def test_loss_that_explodes_goes_back():
    class Exploding(FlowObjective):
        """A burst of ascent with a large step: weights stay finite, the loss does not stay low."""

        calls = 0

        def forward(self, batch, weights=None):
            self.calls += 1
            if 21 <= self.calls <= 23:
                with torch.no_grad():
                    self.model.potential.b.add_(30.0)
            return super().forward(batch, weights)

    flow = new_flow()
    _, run = train(Exploding(flow))
    assert [event for event in run.events if "the loss rose to" in event]
    assert run.validation < 3.5


def test_lasting_failure_keeps_the_best(tmp_path):
    flow = new_flow()
    with pytest.raises(TrainingError, match=r"diverged 8 times in a row.*the best model is kept"):
        train(Failing(flow, range(23, 10_000)), out=tmp_path)
    assert all(p.isfinite().all() for p in flow.parameters())
    assert same(pl.load(tmp_path), flow)
    held = torch.from_numpy(X[:50])
    assert flow.log_prob(held).mean() > -6


def test_bad_start_is_said():
    flow = prepared_flow()
    with torch.no_grad():
        flow.potential.w.fill_(math.nan)
    with pytest.raises(TrainingError, match="not finite before training begins"):
        train(flow)


def test_full_disk_keeps_the_previous_checkpoint(tmp_path, monkeypatch):
    real, kept = files.save_file, {}

    def save_file(tensors, path, **kwargs):
        steps = [tensors[name] for name in tensors if name.endswith(".step")]
        if steps and 25 <= steps[0] <= 35:
            if not kept:
                kept["checkpoint"] = (tmp_path / "checkpoint" / "state.safetensors").read_bytes()
            Path(path).write_bytes(b"\0" * 100)
            raise OSError(28, "No space left on device")
        if kept and "during" not in kept:
            kept["during"] = (tmp_path / "checkpoint" / "state.safetensors").read_bytes()
        real(tensors, path, **kwargs)

    monkeypatch.setattr(files, "save_file", save_file)
    flow, run = train(out=tmp_path)
    assert kept["during"] == kept["checkpoint"]
    (event,) = [event for event in run.events if "checkpoint" in event]
    assert event.startswith("step 30: the checkpoint can't be written")
    assert "No space left on device" in event and event.endswith("the previous one is kept")
    assert run.steps == 40
    assert same(pl.load(tmp_path), flow)
    assert not [path for path in tmp_path.rglob("*") if path.name.endswith(".tmp")]


def test_full_disk_for_the_model_keeps_the_previous(tmp_path, monkeypatch):
    real, calls = files.save, []

    def save(model, folder, **kwargs):
        calls.append(0)
        if len(calls) in (2, 3):
            raise OSError(28, "No space left on device")
        real(model, folder, **kwargs)

    monkeypatch.setattr(files, "save", save)
    flow, run = train(out=tmp_path)
    assert [event for event in run.events if "No space left" in event]
    assert same(pl.load(tmp_path), flow)


def test_full_disk_for_the_log_does_not_end_training(tmp_path, monkeypatch):
    """A log that can't be written is an event, not the end of hours of work."""
    real = Path.open

    def broken(self, mode="r", *args, **kwargs):
        if self.name == "log.jsonl" and "a" in mode:
            raise OSError(28, "No space left on device")
        return real(self, mode, *args, **kwargs)

    monkeypatch.setattr(Path, "open", broken)
    _, run = train(out=tmp_path)
    assert run.steps == 40
    assert len(run.history) == 40


# Optimisers


@pytest.mark.parametrize("shape", [(32, 32), (5, 9), (9, 5)])
def test_orthogonalize_acts_on_singular_values_alone(shape):
    """U p(S) V^T with the polynomial applied to numbers: an oracle by the SVD."""
    generator = torch.Generator().manual_seed(0)
    matrices = torch.randn(3, *shape, dtype=torch.float64, generator=generator)
    u, s, vh = torch.linalg.svd(matrices, full_matrices=False)
    s = s / s.norm(dim=1, keepdim=True)
    for _ in range(5):
        s = 3.4445 * s - 4.7750 * s**3 + 2.0315 * s**5
    want = u * s[:, None] @ vh
    torch.testing.assert_close(orthogonalize(matrices), want, rtol=1e-10, atol=1e-12)
    assert (s[:, : min(shape) - 2] - 1).abs().max() < 0.35  # but for the smallest


def test_muon_is_the_one_of_torch():
    """But for the precision: torch iterates in bfloat16, with 8 bits."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(16, 16), (6, 10), (16, 16)]
    starts = [torch.randn(shape, generator=generator) for shape in shapes]
    ours, theirs = ([torch.nn.Parameter(w.clone()) for w in starts] for _ in range(2))
    muon = Muon(ours)
    muon.param_groups[0]["lr"] = 0.1
    reference = torch.optim.Muon(
        theirs, lr=0.1, momentum=0.95, weight_decay=0.0, adjust_lr_fn="match_rms_adamw"
    )
    for _ in range(3):
        for a, b in zip(ours, theirs, strict=True):
            a.grad = torch.randn(a.shape, generator=generator)
            b.grad = a.grad.clone()
        muon.step()
        reference.step()
    for start, a, b in zip(starts, ours, theirs, strict=True):
        momentum = [o.state[p]["momentum_buffer"] for o, p in ((muon, a), (reference, b))]
        torch.testing.assert_close(*momentum)
        assert (a - b).norm() < 0.03 * (a - start).norm()


def test_muon_takes_equal_shapes_together_and_skips_what_has_no_gradient():
    weights = [torch.nn.Parameter(torch.ones(4, 4).double()) for _ in range(3)]
    muon = Muon(weights)
    muon.param_groups[0]["lr"] = 0.5
    for weight, scale in zip(weights[:2], (1.0, 2.0), strict=True):
        weight.grad = scale * torch.eye(4).double()
    muon.step()
    value = orthogonalize(torch.eye(4).double()[None])[0, 0, 0]
    want = 1 - 0.5 * 0.2 * 2 * value * torch.eye(4).double()  # whatever the size of the gradient
    for weight in weights[:2]:
        torch.testing.assert_close(weight.detach(), want)
    assert torch.equal(weights[2], torch.ones(4, 4).double())


def test_muon_refuses_vectors():
    with pytest.raises(ArgumentError, match=r"`matrices` must be \(rows, columns\), got \(3,\)"):
        Muon([torch.nn.Parameter(torch.ones(3))])


# Objectives of one's own


class Line(Objective):
    """Least squares for the second column from the first: exact answer by normal equations."""

    def __init__(self):
        super().__init__()
        self.model = torch.nn.Linear(1, 1).double()

    def errors(self, batch):
        return (self.model(batch[:, :1])[:, 0] - batch[:, 1]).square()

    def forward(self, batch, weights=None):
        errors = self.errors(batch)
        loss = errors.mean() if weights is None else (weights * errors).mean()
        return Loss(loss, {"squares": loss.detach()})

    def validate(self, batch):
        return self.errors(batch)


@pytest.mark.parametrize("weighted", [False, True])
def test_any_objective(weighted):
    weights = np.random.default_rng(0).uniform(0, 2, len(X)) if weighted else np.ones(len(X))
    objective = Line()
    _, run = train(
        objective, X, validation=X, sample_weight=weights if weighted else None,
        max_steps=1500, batch_size=1000,
    )  # fmt: skip
    design = np.c_[X[:, :1], np.ones(len(X))] * np.sqrt(weights)[:, None]
    want = np.linalg.lstsq(design, X[:, 1] * np.sqrt(weights), rcond=None)[0]
    if not weighted:  # the validation rows, which pick the model, have no weights
        got = [objective.model.weight.item(), objective.model.bias.item()]
        np.testing.assert_allclose(got, want, atol=1e-3)
    last = run.history[-1]["loss"]
    residual = (weights * (design @ want / np.sqrt(weights) - X[:, 1]) ** 2).sum() / weights.sum()
    assert last == pytest.approx(residual, rel=1e-5)


def test_lbfgs_minimises_least_squares_exactly():
    """A linear fit reaches the normal equations' solution."""
    rng = np.random.default_rng(0)
    A, b = rng.standard_normal((50, 3)), rng.standard_normal(50)
    rows = np.column_stack([A, b])

    class LeastSquares(Objective):
        def __init__(self):
            super().__init__()
            self.model = torch.nn.Linear(3, 1, bias=False).double()

        def validate(self, batch):
            return (self.model(batch[:, :3])[:, 0] - batch[:, 3]).square()

        def forward(self, batch, weights=None):
            return Loss(self.validate(batch).mean(), {})

    objective = LeastSquares()
    pl.fit(objective, rows, validation=rows, optimizer="lbfgs", max_steps=2, progress=False)
    exact = np.linalg.lstsq(A, b, rcond=None)[0]
    assert objective.model.weight.detach().numpy()[0] == pytest.approx(exact, abs=1e-8)


def test_lbfgs_resumes_bit_for_bit(tmp_path):
    options = {"optimizer": "lbfgs", "max_steps": 3, "batch_size": 200}
    whole, _ = train(**options)
    with pytest.raises(KeyboardInterrupt):
        train(Interrupting(new_flow(), 60), out=tmp_path, **options)
    resumed, run = train(out=tmp_path, resume=True, **options)
    assert run.steps == 3 and same(resumed, whole)


def test_unknown_optimizer_is_refused():
    with pytest.raises(ArgumentError, match="optimizer"):
        train(optimizer="sgd")
