"""The check of a policy: the exact one passes, spoiled ones are caught, figures are right."""

import json
import math
from functools import cache

import pytest
import torch

from pathline.control import Policy, riccati_value
from pathline.control.judge import SIZES, check_policy
from pathline.control.problems import LinearQuadratic
from pathline.errors import ShapeError


@cache
def known_value(noise: float):
    return riccati_value(Resting(dim=2, noise=noise))


def exact_policy(problem, steps: int = 40) -> Policy:
    """The linear-quadratic problem's own value function, from Riccati's equation."""
    known = known_value(problem.variance**0.5)
    policy = Policy(
        problem, width=8, steps=steps, nodes=known.nodes, generator=torch.Generator().manual_seed(0)
    )
    assert policy.potential.base is not None
    policy.potential.base.load_state_dict(known.state_dict())
    policy.potential.initialise(
        problem.initial(500, torch.Generator().manual_seed(1)).to(policy.like),
        torch.Generator().manual_seed(2),
    )
    with torch.no_grad():  # the network has nothing to add
        for weight in policy.potential.potential.parameters():
            weight.zero_()
    return policy


class Resting(LinearQuadratic):
    """Whose paths should end near zero, where they are expanded around."""

    def reference(self, t):
        return torch.zeros(self.dim, dtype=torch.float64)


class Ball(Resting):
    """The way from (-3, -3) to zero leads through a forbidden ball."""

    def clearance(self, z):
        return (z + 1.5).norm(dim=1) - 0.5


@pytest.fixture(scope="module")
def found():
    return check_policy(exact_policy(Resting(dim=2), steps=100))


def test_the_exact_policy_passes(found):
    assert found.passed, found.verdict
    assert found.value_error < 1e-3
    assert found.control_error < 1e-2
    assert found.hjb < 1e-3
    # In the last 0.002 of the time this value function rests at 50 / 1.2 |z|^2, where it was exact.
    end = 1.2 / 101 * math.exp(-100 / 1.2 * 0.002)
    assert found.terminal_error == pytest.approx((50 - 50 / 1.2) * end**2 / (50 / 101), rel=0.01)
    assert found.collisions is None
    assert found.clearance is None


def test_costs_are_those_of_riccati(found):
    """Phi(0, z) = 50 / 101 |z|^2, from (-3, -3) and over N((-3, -3), I)."""
    assert found.nominal_value == pytest.approx(50 / 101 * 18, rel=1e-3)
    assert found.nominal_fine == pytest.approx(50 / 101 * 18, rel=1e-3)
    expected = 50 / 101 * 20
    assert abs(found.cost_fine - expected) < 4 * found.cost_error


def test_shocks_cost_what_they_must(found):
    """A kick k of mean zero at time 1/3 adds 50 / (1 + 200/3) E|k|^2 to the value there."""
    assert found.shock_sizes == list(SIZES)
    assert found.shock_costs[0] == pytest.approx(found.nominal_cost, rel=1e-6)
    scale = exact_policy(Resting(dim=2)).potential.scale.square().sum().item()
    more = 50 / (1 + 100 * 2 / 3) * SIZES[-1] ** 2 * scale
    # Besides it grad Phi . k, which has mean zero over directions.
    slope = found.shock_worst[-1] - found.shock_costs[-1]
    assert abs(found.shock_costs[-1] - found.nominal_cost - more) < 4 * slope / 64**0.5
    assert all(a <= b for a, b in zip(found.shock_costs, found.shock_worst, strict=True))


def test_the_result_is_json_and_repeats(found):
    again = check_policy(exact_policy(Resting(dim=2), steps=100))
    text = json.dumps(found.to_dict(), allow_nan=False)
    kept = json.loads(text)
    other = again.to_dict()
    for timing in (kept, other):
        timing.pop("milliseconds")
    assert kept == other
    assert check_policy(exact_policy(Resting(dim=2)), seed=1).cost != found.cost


def test_a_wrong_gain_is_caught():
    policy = exact_policy(Resting(dim=2))
    assert policy.potential.base is not None
    policy.potential.base.values[:, :4] *= 1.2
    policy.potential.base.slopes[:, :4] *= 1.2
    found = check_policy(policy)
    assert not found.passed
    assert "the value is NOT exact" in found.verdict
    assert found.value_error == pytest.approx(0.2, rel=0.05)
    assert found.control_error == pytest.approx(0.2, rel=0.05)


def test_too_few_steps_are_caught():
    found = check_policy(exact_policy(Resting(dim=2), steps=1))
    assert not found.passed
    assert "NOT resolved in time" in found.verdict


def test_nonsense_is_caught():
    policy = exact_policy(Resting(dim=2))
    assert policy.potential.base is not None
    policy.potential.base.values.mul_(-20)  # away from the target, ever faster
    found = check_policy(policy)
    assert not found.passed
    policy.potential.base.values.fill_(math.nan)
    assert "NOT stable" in check_policy(policy).verdict


def test_forbidden_states_are_caught():
    found = check_policy(exact_policy(Ball(dim=2)))
    assert not found.passed
    assert found.nominal_clearance == pytest.approx(-0.5, abs=0.05)
    assert found.clearance is not None
    assert found.collisions > 0.2
    assert "enter forbidden states" in found.verdict


def test_noise_has_its_expected_cost():
    """Phi(0, (-3, -3)) = 9.6493 with noise 0.4."""
    problem = Resting(dim=2, noise=0.4)
    policy = exact_policy(problem, steps=200)
    found = check_policy(policy, seed=0)
    assert found.nominal_error > 0
    assert abs(found.nominal_fine - 9.6493) < 4 * found.nominal_error
    assert found.nominal_value == pytest.approx(9.6493, rel=1e-3)
    assert found.value_error < 1e-3
    assert found.passed, found.verdict


def test_own_starts():
    policy = exact_policy(Resting(dim=2))
    found = check_policy(policy, torch.tensor([[1.0, 2.0], [0.5, 0.0]]))
    assert found.starts == 2
    assert found.cost == pytest.approx(50 / 101 * (5 + 0.25) / 2, rel=1e-3)
    with pytest.raises(ShapeError, match=r"`starts` must be \(batch, 2\)"):
        check_policy(policy, torch.zeros(3, 5))
