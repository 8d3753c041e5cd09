"""Control problems as Gymnasium environments, and PPO on them."""

import warnings

import numpy as np
import pytest
import torch

from pathline.control import Policy, Problem, ValueObjective, transcribe
from pathline.control.problems import PROBLEMS, Hill, LinearQuadratic, Quadcopter, make
from pathline.errors import ArgumentError, ShapeError, SolveError

pytest.importorskip("gymnasium")
environment = pytest.importorskip("pathline.control.environment")
ControlEnv, make_env = environment.ControlEnv, environment.make_env


class Driven(Problem):
    """dz = (t + u) dt on the line with |u| <= 1, L = t + u^2 + z, G = z^2."""

    dim, start, spread, horizon, control_bounds = 1, (0.5,), 0.0, 2.0, (-1.0, 1.0)

    def dynamics(self, t, z, u):
        return t + u

    def running_cost(self, t, z, u):
        return t + (u**2 + z).sum(1)

    def terminal_cost(self, z):
        return z.square().sum(1)


@pytest.mark.parametrize(
    "name",
    [pytest.param(n, marks=[pytest.mark.slow] * (n in ("neuron", "swarm50"))) for n in PROBLEMS],
)
def test_named_problems_pass_the_checker_of_gymnasium(name):
    from gymnasium.utils.env_checker import check_env

    env = make_env(name)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        check_env(env)
    # States have no limits, actions have units, and there is nothing to render.
    known = ("infinity", "symmetric and normalized", "render modes")
    assert all(any(part in str(w.message) for part in known) for w in said)
    assert env.observation_space.shape == (env.problem.dim + 1,)
    assert np.isfinite(env.action_space.low).all() and np.isfinite(env.action_space.high).all()


def test_an_episode_by_hand():
    env = ControlEnv(Driven(), steps=4)
    seen, info = env.reset(seed=0)
    assert info == {} and seen.tolist() == [0.5, 0.0] and seen.dtype == np.float32
    assert env.action_space.low == -1 and env.action_space.high == 1
    # z = 0.5 + t^2 / 2 + u t while u is held, and the cost by hand of the integral.
    z, t, h = 0.5, 0.0, 0.5
    for n, u in enumerate((0.5, -0.25, 3.0, -1.0)):
        held = min(u, 1.0)  # within the bounds
        seen, reward, over, cut, _ = env.step(np.array([u], np.float32))
        a = t + h
        running = (a**2 - t**2) / 2 + held**2 * h
        drift = (a**3 - t**3) / 6 - t**2 * h / 2 + held * h**2 / 2
        running += z * h + drift
        z += (a**2 - t**2) / 2 + held * h
        t = a
        assert seen == pytest.approx([z, t], rel=1e-6)
        assert reward == pytest.approx(-running - (z**2 if n == 3 else 0), rel=1e-12)
        assert over is (n == 3) and cut is False
    with pytest.raises(ArgumentError, match="call `reset`"):
        env.step(np.zeros(1, np.float32))


def test_the_return_is_minus_the_cost_of_the_open_loop_solution():
    problem = Quadcopter()
    path = transcribe(problem, steps=10, guesses=0, max_iterations=20)
    env = ControlEnv(problem, steps=10)
    env.reset(seed=1, options={"start": problem.start})
    total = sum(env.step(u.numpy())[1] for u in path.controls)
    assert total == pytest.approx(-path.cost, rel=1e-12)


def test_the_return_approaches_the_cost_of_a_policy_that_it_follows():
    policy = Policy(LinearQuadratic(2), 8, generator=torch.Generator().manual_seed(0)).double()
    start, gaps = torch.tensor([1.0, -2.0], dtype=torch.float64), []
    exact = policy.simulate(start, steps=400).cost.item()
    for steps in (25, 50, 100):
        env = ControlEnv(policy.problem, steps)
        env.reset(options={"start": start})
        total, over, n = 0.0, False, 0
        with torch.no_grad():
            while not over:
                u = policy.control(n / steps, env.z)[0].numpy()
                _, reward, over, _, _ = env.step(u)
                total, n = total + reward, n + 1
        gaps.append(abs(total + exact))
    assert gaps[0] / gaps[1] == pytest.approx(2, abs=0.2)  # a held control is of first order
    assert gaps[1] / gaps[2] == pytest.approx(2, abs=0.2)


def test_noise_is_that_of_the_problem_and_follows_the_seed():
    problem, still = Hill(), np.zeros(2, np.float32)
    env, ends = ControlEnv(problem, steps=2), []
    env.reset(seed=3)
    for _ in range(2000):
        start = env.reset(options={"start": (0.0, 0.0)})[0]
        env.step(still)
        ends.append(env.step(still)[0][:2] - start[:2])
    found, want = np.cov(np.array(ends).T), (problem.noise @ problem.noise.T).numpy()
    assert found == pytest.approx(want, abs=4 * 0.2 * np.sqrt(2 / 2000))
    rewards = []
    for seed in (5, 5, 6):
        env.reset(seed=seed)
        rewards.append([env.step(still)[1] for _ in range(2)])
    assert rewards[0] == rewards[1] != rewards[2]


def test_starts_are_those_of_the_problem():
    env = make_env("lqr", dim=3)
    env.reset(seed=0)
    starts = np.array([env.reset()[0][:3] for _ in range(2000)])
    assert starts.mean(0) == pytest.approx([-3] * 3, abs=4 / 2000**0.5)
    assert starts.std(0) == pytest.approx([1] * 3, abs=4 / 4000**0.5)


@pytest.mark.slow
def test_the_neuron_lives_through_random_currents():
    env = make_env("neuron", steps=1200, limit=100)
    env.action_space.seed(0)
    seen, over = env.reset(seed=0)[0], False
    while not over:
        seen, reward, over, _, _ = env.step(env.action_space.sample())
        assert np.isfinite(seen).all() and np.isfinite(reward)


def test_a_free_control_gets_a_box_with_room_for_the_optimal_one():
    # The optimal control of LQR is constant: 100 / 101 of the way.
    box = make_env("lqr").action_space
    assert (box.high >= 2 * 300 / 101 - 1e-4).all() and (box.high < 20).all()
    assert (box.low == -box.high).all()
    half = LinearQuadratic(2)
    half.control_bounds = (-1.0, float("inf"))
    box = ControlEnv(half).action_space
    assert box.low.tolist() == [-1, -1] and (box.high >= 2 * 300 / 101 - 1e-4).all()


def test_bad_input_is_named():
    with pytest.raises(ArgumentError, match="`steps` must be a positive integer, got 0"):
        ControlEnv(Driven(), steps=0)
    with pytest.raises(ArgumentError, match="unknown problem 'lqx'"):
        make_env("lqx")
    env = ControlEnv(Driven(), steps=4)
    with pytest.raises(ArgumentError, match="call `reset`"):
        env.step(np.zeros(1, np.float32))
    with pytest.raises(ShapeError, match=r"`start` must be \(1,\), got \(2,\)"):
        env.reset(options={"start": [1.0, 2.0]})
    env.reset()
    with pytest.raises(ShapeError, match=r"`action` must be \(1,\), got \(2,\)"):
        env.step(np.zeros(2, np.float32))
    with pytest.raises(ArgumentError, match="`action` must be finite"):
        env.step(np.array([np.nan], np.float32))


def test_a_state_that_is_not_finite_is_an_error_with_its_time():
    class Explosive(Driven):
        def dynamics(self, t, z, u):
            return z**3 + u

    env = ControlEnv(Explosive(), steps=4)
    env.reset(options={"start": [1e60]})
    with pytest.raises(SolveError, match=r"not finite at t = 0.5; before the step it was \[1e\+60"):
        for _ in range(4):
            env.step(np.ones(1, np.float32))


@pytest.fixture(scope="module")
def ppo():
    pytest.importorskip("stable_baselines3")
    return pytest.importorskip("pathline.control.ppo")


@pytest.mark.parametrize("options", [{}, {"noise": 0.4}])
def test_ppo_lowers_the_cost_and_follows_its_seed(ppo, options):
    problem = make("lqr", **options)
    per_round = 64 * 5 * (1 if options else 5)
    torch.manual_seed(11)
    state = torch.random.get_rng_state()
    run = ppo.train_ppo(problem, evaluations=5 * per_round, steps=5, seed=3)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert run.evaluations.tolist() == [n * per_round for n in range(6)]
    assert run.costs.shape == (6,) and bool(run.costs.isfinite().all())
    assert run.cost < run.costs[0]
    z = problem.initial(7, torch.Generator().manual_seed(0))
    u = run.control(0.5, z)
    assert u.shape == (7, 2) and u.dtype == z.dtype
    again = ppo.train_ppo(problem, evaluations=5 * per_round, steps=5, seed=3)
    assert torch.equal(again.costs, run.costs) and torch.equal(again.control(0.5, z), u)
    other = ppo.train_ppo(problem, evaluations=per_round, steps=5, seed=4)
    assert not torch.equal(other.costs[:1], run.costs[:1])


def test_the_best_control_costs_what_was_reported(ppo):
    problem = make("lqr")
    run = ppo.train_ppo(problem, evaluations=64 * 5 * 5 * 3, steps=5, seed=0)
    seed = int(np.random.default_rng(0).integers(2**62))
    starts = problem.initial(256, torch.Generator().manual_seed(seed))
    env, costs = ControlEnv(problem, 5), []
    for start in starts:
        env.reset(options={"start": start})
        rewards = [env.step(run.control(n / 5, env.z)[0].numpy())[1] for n in range(5)]
        costs.append(-sum(rewards))
    assert np.mean(costs) == pytest.approx(run.cost, rel=1e-6)


@pytest.mark.parametrize("options", [{}, {"noise": 0.4}])
def test_evaluations_are_counted_as_they_happen(ppo, options, monkeypatch):
    problem, rows = make("lqr", **options), []
    dynamics = problem.dynamics
    monkeypatch.setattr(
        problem, "dynamics", lambda t, z, u: rows.append(len(z)) or dynamics(t, z, u)
    )
    objective = ValueObjective(Policy(problem, 8), 7)
    for _ in range(3):
        objective(problem.initial(10, torch.Generator().manual_seed(0)))
    assert sum(rows) == ppo.solve_evaluations(problem, max_steps=3, steps=7, batch_size=10)
    env = ControlEnv(problem, 6)
    env.reset()
    rows.clear()
    env.step(np.zeros(2, np.float32))
    assert sum(rows) == ppo.evaluations_per_step(problem)


def test_too_few_evaluations_are_an_error(ppo):
    with pytest.raises(ArgumentError, match="`evaluations` must be at least 6400"):
        ppo.train_ppo(make("lqr"), evaluations=100)
