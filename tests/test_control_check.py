"""`problem.check` says in words what is wrong, and passes what is right."""

import numpy as np
import pytest
import torch

from pathline.control import Problem, solve
from pathline.control.problems import PROBLEMS, make
from pathline.errors import ArgumentError


class Right(Problem):
    """Two states and one bounded control, with a cost that moves in time."""

    dim, control_dim, control_bounds = 2, 1, (-1.5, 2.0)
    start, spread = (1.0, -0.5), 0.7
    noise = 0.1 * torch.ones(2, 3)

    def dynamics(self, t, z, u):
        return torch.stack([z[:, 1], -z[:, 0].sin() + u[:, 0]], 1)

    def running_cost(self, t, z, u):
        return u.square().sum(1) + (1 + t) * z.square().sum(1)

    def terminal_cost(self, z):
        return 10 * z.square().sum(1)

    def feedback(self, t, z, p):
        return (-p[:, 1:] / 2).clamp(-1.5, 2.0)


class WrongSign(Right):
    def feedback(self, t, z, p):
        return (p[:, 1:] / 2).clamp(-1.5, 2.0)


class WrongFactor(Right):
    def feedback(self, t, z, p):
        return (-p[:, 1:]).clamp(-1.5, 2.0)


class OutOfBounds(Right):
    def feedback(self, t, z, p):
        return -p[:, 1:] / 2


class WideFeedback(Right):
    def feedback(self, t, z, p):
        return -p / 2


class WideDynamics(Right):
    def dynamics(self, t, z, u):
        return torch.cat([z, u], 1)


class CostOfAColumn(Right):
    def running_cost(self, t, z, u):
        return u.square()


class MeanCost(Right):
    def terminal_cost(self, z):
        return z.square().mean()


class NumberCost(Right):
    def terminal_cost(self, z):
        return 1.0


class NaNCost(Right):
    def running_cost(self, t, z, u):
        return u.square().sum(1) + z[:, 0].sqrt()


class InfiniteDynamics(Right):
    def dynamics(self, t, z, u):
        return super().dynamics(t, z, u) / (t - t)


class Detached(Right):
    def terminal_cost(self, z):
        return 10 * z.detach().square().sum(1)


class InNumpy(Right):
    def dynamics(self, t, z, u):
        pull = torch.from_numpy(-np.sin(z[:, 0].detach().numpy()))
        return torch.stack([z[:, 1], pull + u[:, 0]], 1)


class DetachedControl(Right):
    def running_cost(self, t, z, u):
        return u.detach().square().sum(1) + z.square().sum(1)


class Crowd(Right):
    def running_cost(self, t, z, u):
        return u.square().sum(1) + (z - z.mean(0)).square().sum(1)


class CrowdedDynamics(Right):
    def dynamics(self, t, z, u):
        return super().dynamics(t, z, u) + z.mean(0)


class WrongNoise(Right):
    noise = torch.ones(3, 2)


class FlatNoise(Right):
    noise = torch.ones(2)


class NumberNoise(Right):
    noise = 0.4


class NaNNoise(Right):
    noise = torch.full((2, 2), torch.nan)


class NoDim(Right):
    dim = 0


class FloatDim(Right):
    dim = 2.0


class NoHorizon(Right):
    horizon = 0.0


class Backward(Right):
    horizon = -1.0


class Endless(Right):
    horizon = float("inf")


class TextHorizon(Right):
    horizon = "1"


class WrongStart(Right):
    start = (1.0, 2.0, 3.0)


class NaNStart(Right):
    start = (1.0, float("nan"))


class WrongInitial(Right):
    def initial(self, count, generator):
        return torch.zeros(count, 3)


class WrongNominal(Right):
    def initial(self, count, generator):
        return torch.zeros(count, 2)

    def nominal(self):
        return torch.zeros(3)


class CrossedBounds(Right):
    control_bounds = (2.0, -1.5)


class WideBounds(Right):
    control_bounds = ((0.0, 0.0), (1.0, 1.0))


class WideClearance(Right):
    def clearance(self, z):
        return z


class Unbounded(Right):
    """Linear in the control, which is free: L + p.f has no minimum."""

    control_bounds, feedback = None, Problem.feedback

    def running_cost(self, t, z, u):
        return z.square().sum(1)


class Concave(Unbounded):
    def running_cost(self, t, z, u):
        return z.square().sum(1) - u.square().sum(1)


MISTAKES = [
    (WrongSign, "`feedback` does not minimise L . p.f: .*is the sign of p right"),
    (WrongFactor, "`feedback` does not minimise L . p.f"),
    (OutOfBounds, "`feedback` leaves `control_bounds`"),
    (WideFeedback, r"`feedback` must return \(64, 1\) for 64 rows, got \(64, 2\)"),
    (WideDynamics, r"`dynamics` must return \(64, 2\) for 64 rows, got \(64, 3\)"),
    (CostOfAColumn, r"`running_cost` must return \(64,\) for 64 rows, got \(64, 1\)"),
    (MeanCost, r"`terminal_cost` must return \(64,\) for 64 rows, got \(\)"),
    (NumberCost, r"`terminal_cost` must return \(64,\) for 64 rows, got float"),
    (NaNCost, "`running_cost` is not finite"),
    (InfiniteDynamics, "`dynamics` is not finite"),
    (Detached, "derivative of `terminal_cost` with respect to z differs .* without detach"),
    (InNumpy, "derivative of `dynamics` with respect to z differs .* NumPy"),
    (DetachedControl, "derivative of `running_cost` with respect to u differs"),
    (Crowd, "`running_cost` of a row depends on the other rows"),
    (CrowdedDynamics, "`dynamics` of a row depends on the other rows"),
    (WrongNoise, r"`noise` must be a tensor \(2, noise_dim\), got \(3, 2\)"),
    (FlatNoise, r"`noise` must be a tensor \(2, noise_dim\), got \(2,\)"),
    (NumberNoise, r"`noise` must be a tensor \(2, noise_dim\), got float"),
    (NaNNoise, "`noise` must be finite"),
    (NoDim, "`dim` must be a positive integer, got 0"),
    (FloatDim, "`dim` must be a positive integer, got 2.0"),
    (NoHorizon, "`horizon` must be positive and finite, got 0.0"),
    (Backward, "`horizon` must be positive and finite, got -1.0"),
    (Endless, "`horizon` must be positive and finite, got inf"),
    (TextHorizon, "`horizon` must be positive and finite, got '1'"),
    (WrongStart, r"`start` must be \(2,\), got \(3,\)"),
    (NaNStart, "`initial` draws states that are not finite"),
    (WrongInitial, r"`initial\(64, generator\)` must be \(64, 2\), got \(64, 3\)"),
    (WrongNominal, r"`nominal\(\)` must be \(2,\), got \(3,\)"),
    (CrossedBounds, r"`control_bounds` must be \(lower, upper\) with lower < upper"),
    (WideBounds, r"`control_bounds` must be .* numbers or \(1,\)"),
    (WideClearance, r"`clearance` must return \(64,\) for 64 rows, got \(64, 2\)"),
    (Unbounded, "`feedback` does not minimise L . p.f: .*is there a minimum"),
    (Concave, "`feedback` does not minimise L . p.f: .*is there a minimum"),
]


@pytest.mark.parametrize("mistake, words", MISTAKES, ids=lambda m: getattr(m, "__name__", ""))
def test_a_mistake_is_said_in_words(mistake, words):
    found = mistake().check()
    assert not found.passed and found.problem == mistake.__name__
    with pytest.raises(ArgumentError, match=words):
        found.demand()
    assert "\n" not in found.verdict and found.verdict.startswith(mistake.__name__)


def test_each_mistake_is_named_alone():
    # A second finding would be a false alarm, as each problem has one mistake.
    for mistake, _ in MISTAKES:
        assert len(mistake().check().findings) == 1, mistake.__name__


def test_solve_stops_before_it_trains():
    with pytest.raises(ArgumentError, match="WrongSign: `feedback` does not minimise"):
        solve(WrongSign(), max_steps=1, progress=False)


@pytest.mark.parametrize("seed", range(3))
def test_right_formulas_pass(seed):
    found = Right().check(seed=seed)
    assert found.passed, found.verdict
    assert found.verdict == "Right: shapes fit, derivatives agree, and the feedback minimises"
    found.demand()


def test_a_problem_without_a_formula_passes():
    class Plain(Right):
        feedback = Problem.feedback

    for bounds in (Right.control_bounds, None):
        plain = Plain()
        plain.control_bounds = bounds
        assert plain.check().passed, plain.check().verdict


def test_a_bang_bang_problem_passes():
    class BangBang(Right):
        feedback = Problem.feedback

        def running_cost(self, t, z, u):
            return z.square().sum(1)

    assert BangBang().check().passed, BangBang().check().verdict


@pytest.mark.parametrize("name", PROBLEMS)
def test_named_problems_pass(name):
    found = make(name).check()
    assert found.passed, found.verdict


def test_the_same_seed_finds_the_same():
    assert WrongSign().check(seed=4).findings == WrongSign().check(seed=4).findings
