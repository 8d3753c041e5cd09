"""Policies: what `control.solve` trains, simulates, saves and exports."""

import math

import numpy as np
import pytest
import torch

import pathline as pl
from hjb_grid import hill_value
from pathline.control import Policy, Problem, ValueObjective, Weights, rollout, solve, transcribe
from pathline.control.problems import Corridor, Hill, LinearQuadratic, Quadcopter, make, settings
from pathline.errors import ArgumentError, ModelError, ShapeError
from pathline.flows import OTFlow
from pathline.integrate import graded

FEW = {"max_steps": 4, "progress": False}


@pytest.fixture(scope="module")
def policy():
    return solve(make("lqr", dim=2), seed=3, **FEW)


class Pendulum(Problem):
    """A problem of the user's own, without a formula for the feedback."""

    name, dim, horizon = "pendulum", 2, 1.5
    start, spread = (0.5, 0.0), 0.2
    control_bounds = (-2.0, 2.0)

    @property
    def control_dim(self):
        return 1

    def dynamics(self, t, z, u):
        return torch.stack([z[:, 1], u[:, 0] - torch.sin(z[:, 0])], 1)

    def running_cost(self, t, z, u):
        return 0.5 * u[:, 0] ** 2 + z[:, 0] ** 2

    def terminal_cost(self, z):
        return 5 * z.square().sum(1)


def test_linear_quadratic_value_and_control(policy):
    """Against Riccati's, on starts that were not trained on."""
    problem = policy.problem
    x = problem.initial(500, torch.Generator().manual_seed(77)).float()
    exact = problem.exact_value(torch.tensor(0.0), x)
    assert (policy.value(0.0, x) - exact).norm() / exact.norm() < 0.01
    control = -100 / 101 * x
    assert (policy.control(0.0, x) - control).norm() / control.norm() < 0.02


def test_a_network_alone_learns_the_feedback_of_one_dimension():
    """Without the quadratic part, which is exact here."""
    problem = LinearQuadratic(dim=1)
    problem.start, problem.terminal, problem.grading = (-1.0,), 2.0, 1.0
    found = solve(
        problem, base="none", weights=Weights(hjb=1.0, terminal=1.0), max_steps=250, batch_size=128,
        steps=6, learning_rate=0.03, progress=False,
    )  # fmt: skip
    x = torch.linspace(-2, 0, 50)[:, None]
    exact = problem.exact_value(torch.tensor(0.0), x)
    assert (found.value(0.0, x) - exact).norm() / exact.norm() < 0.03
    assert (found.control(0.0, x) + 0.8 * x).norm() / (0.8 * x).norm() < 0.05


def test_simulation_is_the_closed_loop(policy):
    x = policy.problem.initial(5, torch.Generator().manual_seed(1)).float()
    path = policy.simulate(x, steps=40)
    with torch.no_grad():
        want = rollout(policy.problem, policy.potential, x, steps=policy.times(40), density=False)
    torch.testing.assert_close(path.states[-1], want.z)
    torch.testing.assert_close(path.running_cost, want.running_cost)
    torch.testing.assert_close(path.cost, path.running_cost + 50 * want.z.square().sum(1))
    assert path.controls.shape == (40, 5, 2) and path.times.shape == (41,)
    # The control of this problem is its velocity: the left Riemann sum of |u|^2 / 2.
    lengths = path.times.diff()[:, None]
    left = (0.5 * lengths * path.controls.square().sum(2)).sum(0)
    torch.testing.assert_close(left, path.running_cost, rtol=0.05, atol=0)


def test_shocks_are_added_where_they_come(policy):
    shock = torch.tensor([0.7, -0.2])
    calm, struck = policy.simulate(steps=20), policy.simulate(steps=20, shocks={0.52: shock})
    times = policy.times(20)
    n = 6  # (1 - 6 / 20)^2 = 0.49 is what remains then
    assert times[n] == pytest.approx(0.51)
    torch.testing.assert_close(struck.states[:n], calm.states[:n])
    torch.testing.assert_close(struck.states[n], calm.states[n] + shock)
    # The feedback sees it: from there on the path is that of the shocked state.
    rest = rollout(
        policy.problem, policy.potential, struck.states[n], steps=times[n:], density=False
    )
    torch.testing.assert_close(struck.states[-1], rest.z.detach())


def test_noise_has_the_variance_of_the_problem():
    class Drift(LinearQuadratic):
        def feedback(self, t, z, p):
            return torch.zeros_like(z)

    policy = Policy(Drift(2, noise=0.4))
    path = policy.simulate(torch.zeros(4000, 2), steps=10, noise_seed=0)
    assert path.states[-1].var(0).sub(0.16).abs().max() < 0.012  # three standard errors
    again = policy.simulate(torch.zeros(4000, 2), steps=10, noise_seed=0)
    assert torch.equal(path.states, again.states)
    assert not torch.equal(
        path.states, policy.simulate(torch.zeros(4000, 2), steps=10, noise_seed=1).states
    )
    with pytest.raises(ArgumentError, match="none"):
        Policy(LinearQuadratic(2)).simulate(noise_seed=0)


def test_residual_of_the_exact_value_vanishes_along_noisy_paths():
    """BSDE and HJB residuals of the exact value function of a problem with noise."""
    problem = LinearQuadratic(2, noise=0.4)
    problem.terminal, problem.grading = 1.0, 1.0
    policy = solve(problem, base="path", max_steps=1, learning_rate=1e-12, progress=False).double()
    x = problem.initial(200, torch.Generator().manual_seed(0))
    sums = []
    for steps in (20, 40):
        path = ValueObjective(policy, steps).roll(x, steps, np.random.default_rng(0))
        assert path.hjb.max() < 1e-3 * policy.value(0.0, x).max()
        sums.append(path.bsde.mean().item())
    assert sums[0] / sums[1] == pytest.approx(2, rel=0.3)  # the sum of squares falls as the step


def test_same_seed_same_policy_and_resume(tmp_path):
    problem = make("lqr", dim=2)
    first = solve(problem, seed=5, out=tmp_path / "a", max_steps=6, progress=False)
    second = solve(problem, seed=5, max_steps=6, progress=False)
    for one, other in zip(first.state_dict().values(), second.state_dict().values(), strict=True):
        assert torch.equal(one, other)
    again = solve(problem, seed=5, out=tmp_path / "a", max_steps=6, resume=True, progress=False)
    torch.testing.assert_close(
        again.value(0.0, problem.nominal()), first.value(0.0, problem.nominal())
    )


def test_saved_and_loaded(tmp_path, policy):
    pl.save(policy, tmp_path / "policy")
    loaded = pl.load(tmp_path / "policy")
    z = torch.randn(7, 2, generator=torch.Generator().manual_seed(0))
    assert torch.equal(loaded.control(0.3, z), policy.control(0.3, z))
    assert loaded.problem.made == {"name": "lqr", "options": {"dim": 2}}


def test_problem_of_ones_own(tmp_path):
    """No formula for the feedback, limits of the control, a saved policy that needs the problem."""
    problem = Pendulum()
    assert problem.check().passed, problem.check().verdict
    found = solve(problem, out=tmp_path / "run", steps=8, batch_size=32, **FEW)
    local = transcribe(problem, steps=20)
    assert found.simulate(steps=50).cost.item() < 1.02 * local.cost
    assert found.control(0.0, torch.tensor([[9.0, 9.0]])).abs().max() <= 2
    with pytest.raises(ModelError, match="read it by"):
        pl.load(tmp_path / "run")
    loaded = Policy.load(tmp_path / "run", Pendulum())
    assert torch.equal(
        loaded.control(0.1, problem.nominal()), found.control(0.1, problem.nominal())
    )
    with pytest.raises(ModelError, match="not a policy of"):
        Policy.load(tmp_path / "run", Quadcopter())


def test_exported_policy(tmp_path, policy):
    from pathline.export_policy import export_policy

    content = export_policy(policy, tmp_path)
    assert content["functions"]["control"]["difference"] < 1e-5
    module = torch.export.load(tmp_path / "control.pt2").module()
    z = torch.randn(3, 2, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(module(torch.tensor(0.6), z), policy.control(0.6, z).detach())
    with pytest.raises(ArgumentError, match="must be a Policy"):
        export_policy(OTFlow(2), tmp_path)
    with pytest.raises(ModelError, match="pendulum is a minimisation"):
        export_policy(Policy(Pendulum()), tmp_path / "none")
    assert not (tmp_path / "none").exists()


def test_density_is_a_control_problem():
    """OT-Flow's loss is the engine's, for the problem `flow.problem` with the density's cost."""
    flow = OTFlow(dim=2, generator=torch.Generator().manual_seed(0)).double()
    x = torch.randn(30, 2, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    objective = flow.objective()
    loss = objective(x)
    path = rollout(flow.problem, flow.potential, x, steps=objective.steps)
    cost = path.running_cost * flow.transport + flow.problem.terminal_cost(path.z) - path.log_det
    total = (cost + objective.hjb * path.hjb).mean()
    torch.testing.assert_close(loss.total, total)
    # Without the density, costs and residual are the same.
    bare = rollout(flow.problem, flow.potential, x, steps=objective.steps, density=False)
    torch.testing.assert_close(bare.running_cost, path.running_cost)
    torch.testing.assert_close(bare.hjb, path.hjb)
    assert bare.log_det is None


def test_graded_steps_shorten_to_the_end():
    times = graded(10, 1.0, 3.0, 2.0)
    torch.testing.assert_close(times, 3 - 2 * (1 - torch.arange(11).double() / 10) ** 2)
    torch.testing.assert_close(graded(10, 1.0, 3.0), 1 + 0.2 * torch.arange(11).double())
    policy = Policy(LinearQuadratic(2), generator=torch.Generator().manual_seed(0)).double()
    x = policy.problem.initial(20, torch.Generator().manual_seed(0))

    def end(steps):
        path = rollout(
            policy.problem, policy.potential, x, steps=graded(steps, 0.0, 1.0, 1.5), density=False
        )
        return torch.stack([*path.z.unbind(1), path.running_cost]).detach()

    exact = end(1000)
    errors = [(end(n) - exact).abs().max().item() for n in (20, 40)]
    assert 10 < errors[0] / errors[1] < 25  # of order four on such a grid, too


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (lambda p: p.control(0.0, torch.zeros(3)), "`z` must be"),
        (lambda p: p.control(torch.zeros(2), torch.zeros(2)), "`t` must be"),
        (lambda p: p.simulate(torch.zeros(2, 5)), "`z` must be"),
        (lambda p: p.simulate(shocks={0.5: [1.0]}), "a shock must be"),
    ],
)
def test_wrong_shapes(policy, call, text):
    with pytest.raises(ShapeError, match=text):
        call(policy)


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"base": "magic"}, "`base`"),
        ({"steps": 0}, "`steps`"),
        ({"weights": Weights}, None),
        ({"max_steps": 0}, "`max_steps`"),
    ],
)
def test_bad_arguments_of_solve(arguments, text):
    if text is None:
        with pytest.raises(ArgumentError, match="`hjb`"):
            Weights(hjb=-math.inf)
        return
    with pytest.raises(ArgumentError, match=text):
        solve(LinearQuadratic(2), **{"progress": False, "max_steps": 2} | arguments)


def test_a_broken_problem_is_refused_before_any_work(tmp_path):
    class Wrong(Hill):
        def feedback(self, t, z, p):
            return p

    with pytest.raises(ArgumentError, match="does not minimise"):
        solve(Wrong(), out=tmp_path / "run", **FEW)
    assert not (tmp_path / "run").exists()


def test_shock_after_the_end(policy):
    with pytest.raises(ArgumentError, match="between 0 and 1"):
        policy.simulate(shocks={1.5: [0.0, 0.0]})


@pytest.mark.slow
def test_corridor_is_passed_without_touching():
    """From the nominal start the local optimum costs 61.33 (Onken et al., table I)."""
    found = solve(Corridor(), max_steps=300, progress=False)
    path = found.simulate(steps=100)
    assert path.cost.item() < 63.1
    assert path.clearance.item() >= 0


@pytest.mark.slow
def test_hill_against_finite_differences():
    """The value at starts of the problem, whose grid solution agrees with published ones."""
    found = solve(make("hill"), **settings(make("hill")) | {"max_steps": 600}, progress=False)
    (exact,) = hill_value([0.0], 0.1)
    x = found.problem.initial(400, torch.Generator().manual_seed(8))
    want = torch.from_numpy(exact.ev(*x.numpy().T))
    assert (found.value(0.0, x) - want).norm() / want.norm() < 0.03
