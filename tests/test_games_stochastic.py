"""Stochastic mean-field games: closed forms, a reference on a grid, and brute force."""

import math

import numpy as np
import pytest
import torch
from scipy.integrate import solve_bvp, solve_ivp
from torch.distributions import Independent, Normal

from mfg_grid import solve_grid
from pathline.control import riccati_value, solve, transcribe
from pathline.control.rollout import brownian
from pathline.errors import ArgumentError, DataError, ShapeError
from pathline.games.alternation import (
    Alternation,
    among,
    lessons,
    odd,
    solve_alternating,
    walk,
)
from pathline.games.problems import stochastic_crowd
from pathline.games.stochastic import StochasticGame

END, STEEP = -3.0, 3.0  # of the terminal cost


def ball(dim=2, height=3.0, variance=0.3):
    centre = torch.zeros(dim, dtype=torch.float64)
    centre[1] = height
    return Independent(Normal(centre, math.sqrt(variance)), 1)


def goal(z):
    return STEEP / 2 * (z[:, 0] ** 2 + (z[:, 1] - END) ** 2)


def hill(z):
    height = 50 / (2 * math.pi * math.sqrt(0.5))
    return height * torch.exp(-(z[:, 0] ** 2) / 2 - z[:, 1] ** 2)


def crossing(dim=2, viscosity=0.1, congestion=10.0):
    return StochasticGame(ball(dim), goal, hill, congestion, viscosity)


def free_game(viscosity=0.1):
    return StochasticGame(ball(), goal, viscosity=viscosity, transport=2.0)


@pytest.fixture(scope="module")
def free():
    """A game without preference and crowd, and its exact value function."""
    game = free_game()
    return game, riccati_value(game, transcribe(game, guesses=1))


def paths(game, value, steps, count=400):
    x = game.initial(count, torch.Generator().manual_seed(1))
    times = torch.linspace(0, 1, steps + 1, dtype=torch.float64)
    increments = brownian(game, times, count, np.random.default_rng(2))
    return x, times, increments, walk(game, value, x, times, increments, trajectory=True)


def test_the_grid_has_the_closed_form_of_a_free_game():
    solution = solve_grid(
        lambda p: np.exp(-(p[:, 0] ** 2 + (p[:, 1] - 3) ** 2) / 0.6),
        lambda p: goal(torch.from_numpy(p)).numpy(),
        lambda p: 0 * p[:, 0],
        ((-4.5, 4.5), (-6, 6)), (61, 81), 20, viscosity=0.2,
    )  # fmt: skip
    points = np.array([[0.0, 3.0], [1.0, 2.0], [-0.5, 4.0]])
    quadratic = goal(torch.from_numpy(points)).numpy() / (1 + STEEP)
    np.testing.assert_allclose(
        solution.value(0, points), quadratic + 0.4 * math.log(1 + STEEP), rtol=1e-4
    )
    mean, covariance = solution.moments(-1)
    np.testing.assert_allclose(mean, [0, -1.5], atol=1e-3)
    # z(1) = ... + int sqrt(2 nu) (1 + a (1 - 1)) / (1 + a (1 - t)) dW
    np.testing.assert_allclose(covariance, (0.3 / 16 + 0.4 / 4) * np.eye(2), atol=1e-4)


def test_the_exact_value_function_has_no_residual_and_ends_at_the_costs(free):
    game, value = free
    x, _, _, path = paths(game, value, 64)
    phi = value.bind()(x, torch.zeros((), dtype=torch.float64)).value
    assert path.hjb.max() < 1e-5 * phi.mean()


def test_particles_have_the_moments_of_the_closed_form(free):
    """Of weak order two: halving the steps quarters the error of the variance."""
    game, value = free
    rate = STEEP / 2  # of the feedback, over the horizon left: P / transport = rate / (1 + rate s)
    exact = 0.3 / (1 + rate) ** 2 + 0.2 / (1 + rate)
    errors = []
    for steps in (8, 16, 32):
        times = torch.linspace(0, 1, steps + 1, dtype=torch.float64)
        # The map is affine in start and noise: its coefficients tell the variance without chance.
        rows = torch.zeros(steps + 2, 2, dtype=torch.float64)
        rows[1, 0] = 1.0
        increments = torch.zeros(steps, steps + 2, 2, dtype=torch.float64)
        for n in range(steps):
            increments[n, n + 2, 0] = 1.0
        ends = walk(game, value, rows, times, increments, integrals=False).z[:, 0]
        start, *kicks = (ends[1:] - ends[0]).tolist()
        variance = 0.3 * start**2 + sum(k**2 for k in kicks) / steps
        errors.append(abs(variance - exact))
    slopes = np.diff(np.log2(errors))
    assert (slopes < -1.8).all() and errors[-1] < 2e-4


def test_what_particles_find_is_the_value_function(free):
    """Without chance: the control variate takes away all of the noise but the time steps."""
    game, value = free
    gaps = []
    for steps in (16, 64):
        _, times, increments, path = paths(game, value, steps)
        zs, evaluate = path.trajectory, value.bind()
        nodes = [evaluate(z, t) for z, t in zip(zs, times, strict=True)]
        phi, slope = torch.stack([n.value for n in nodes]), torch.stack([n.grad for n in nodes])
        Y, p = lessons(game, zs, slope, times)
        kicks = increments @ game.noise.mT
        M = [odd(evaluate, *step) for step in zip(times, zs, kicks, strict=False)]
        left = [torch.stack([m[k] for m in M[n:]]).sum(0) for k in (0, 1) for n in (0,)]
        gaps.append((
            ((Y[0] - left[0] - phi[0]).mean() / phi[0].mean()).abs().item(),
            (p[0] - left[1] - slope[0]).square().mean().sqrt().item(),
        ))  # fmt: skip
        assert p[0].sub(left[1] + slope[0]).std() < 0.3 * (p[0] - slope[0]).std()
        torch.testing.assert_close(Y[-1], goal(zs[-1]))
    assert gaps[1][0] < 1e-3 and gaps[1][1] < 0.4 * gaps[0][1]


def test_each_half_meets_the_other():
    game = crossing()
    z = torch.randn(7, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    paid = among(game, z)
    for i in range(7):
        others = z[4:] if i < 4 else z[:4]
        brute = (1 / (1 + (others - z[i]).square().sum(1))).mean()
        assert paid[i].item() == pytest.approx(10 * brute.item())


def test_the_same_seed_gives_the_same_population():
    def trained(seed):
        return solve_alternating(
            crossing(), width=8, steps=4, max_steps=4, batch_size=16, seed=seed, progress=False
        ).sample(5, 0.5)

    first = trained(3)
    assert torch.equal(first, trained(3)) and not torch.equal(first, trained(4))


def test_a_run_resumes_bit_for_bit(tmp_path):
    def train(out, **more):
        return solve_alternating(
            crossing(), width=8, steps=4, batch_size=16, seed=1, progress=False, out=out,
            max_steps=60, **more,
        )  # fmt: skip

    whole = train(tmp_path / "a").state_dict()
    step, stop = Alternation.forward, [40]

    def interrupted(self, batch, weights=None):
        stop[0] -= 1
        if not stop[0]:
            raise RuntimeError("killed")
        return step(self, batch, weights)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Alternation, "forward", interrupted)
        with pytest.raises(RuntimeError, match="killed"):
            train(tmp_path / "b")
    again = train(tmp_path / "b", resume=True).state_dict()
    assert all(torch.equal(whole[name], again[name]) for name in whole)


@pytest.mark.parametrize(
    "change, error, text",
    [
        ({"viscosity": -0.1}, ArgumentError, "`viscosity` must be finite and >= 0, got -0.1"),
        ({"congestion": math.nan}, ArgumentError, "`congestion`"),
        ({"transport": 0.0}, ArgumentError, "`transport` must be positive"),
        ({"horizon": 0.0}, ArgumentError, "`horizon` must be positive"),
        ({"initial": Normal(0.0, 1.0)}, ArgumentError, "`initial` must be one distribution"),
        ({"preference": lambda z: z}, ShapeError, r"`preference` must return \(256,\)"),
        ({"terminal_cost": lambda z: z.sum()}, ShapeError, r"`terminal_cost` must return"),
        ({"terminal_cost": lambda z: z[:, 0].log()}, DataError, "`terminal_cost` must be finite"),
    ],
)
def test_bad_games(change, error, text):
    with pytest.raises(error, match=text):
        StochasticGame(**{"initial": ball(), "terminal_cost": goal} | change)


def test_bad_arguments():
    for change, text in (({"steps": 0}, "`steps`"), ({"batch_size": 1}, "`batch_size`")):
        with pytest.raises(ArgumentError, match=text):
            solve_alternating(crossing(), progress=False, **change)
    population = crossing().policy(8, 2)
    with pytest.raises(ArgumentError, match="`t` must lie between 0 and 1"):
        population.sample(3, 1.5)
    with pytest.raises(ShapeError, match=r"`x0` must be"):
        population.simulate(torch.zeros(1, 2))
    with pytest.raises(ShapeError, match=r"`starts` must be \(batch, 2\)"):
        population.check(torch.zeros(5, 3))


class Herd(StochasticGame):
    """Agents pay for their distance to the mean of the others: linear and quadratic."""

    pull = 4.0

    def crowding(self, z, others):
        return self.pull / 2 * (z - others.mean(0)).square().sum(1)


def herd_solution(game, start, end):
    """P, mean, variance and value at 0 of one coordinate: Riccati equations forward and back."""
    q, nu = game.pull, game.viscosity
    riccati = solve_ivp(
        lambda t, P: P**2 - q, (1, 0), [STEEP], dense_output=True, rtol=1e-9, atol=1e-9
    )
    P = lambda t: riccati.sol(t)[0]  # noqa: E731
    grid = np.linspace(0, 1, 101)
    pair = solve_bvp(
        lambda t, y: np.stack([-(P(t) * y[0] + y[1]), P(t) * y[1] + q * y[0]]),
        lambda a, b: np.array([a[0] - start, b[1] + STEEP * end]),
        grid, np.zeros((2, 101)), tol=1e-8,
    )  # fmt: skip
    variance = solve_ivp(
        lambda t, V: -2 * P(t) * V + 2 * nu, (0, 1), [0.3], dense_output=True, rtol=1e-9
    )

    def rate(t, r):
        m, s = pair.sol(t)
        return -nu * P(t) + s**2 / 2 - q * m**2 / 2

    r = solve_ivp(rate, (1, 0), [STEEP * end**2 / 2], rtol=1e-9, atol=1e-9).y[0, -1]
    return P, lambda t: pair.sol(t)[0], lambda t: variance.sol(t)[0], r, pair.sol(0)[1]


@pytest.mark.slow
def test_a_herd_is_that_of_the_closed_form():
    game = Herd(ball(), goal, viscosity=0.2)
    population = solve_alternating(game, width=32, max_steps=400, progress=False)
    solutions = [herd_solution(game, *ends) for ends in ((0.0, 0.0), (3.0, END))]
    for t in (0.25, 0.5, 0.75, 1.0):
        z = population.sample(20_000, t, seed=1).double()
        for k, (_, mean, variance, _, _) in enumerate(solutions):
            assert z[:, k].mean().item() == pytest.approx(mean(t), abs=0.03)
            assert z[:, k].var().item() == pytest.approx(variance(t), rel=0.04)
    x = game.initial(500, torch.Generator().manual_seed(2))
    exact = sum(
        P(0) * x[:, k] ** 2 / 2 + s * x[:, k] + r for k, (P, _, _, r, s) in enumerate(solutions)
    )
    off = population.value(0.0, x).detach().double() - exact
    assert off.square().mean().sqrt() < 0.01 * exact.mean()
    check = population.check()
    assert check.passed, check.verdict


def grid_of(game):
    def by_torch(function):
        return lambda p: function(torch.from_numpy(p)).numpy()

    return solve_grid(
        lambda p: np.exp(-(p[:, 0] ** 2 + (p[:, 1] - 3) ** 2) / 0.6),
        by_torch(goal), by_torch(hill),
        ((-4.5, 4.5), (-6, 6)), (121, 161), 48,
        congestion=game.congestion, viscosity=game.viscosity,
    )  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("dim, viscosity", [(2, 0.1), (2, 0.4), (50, 0.1), (100, 0.1)])
def test_a_crowd_passes_the_hill_as_on_the_grid(dim, viscosity):
    """Value, means and variances in the first two coordinates, alike in every dimension."""
    game = crossing(dim, viscosity)
    steps = 700 if dim == 2 else 1500
    population = solve_alternating(game, max_steps=steps, progress=False)
    grid = grid_of(game)
    for n in (12, 24, 36, 48):
        z = population.sample(20_000, n / 48, steps=48, seed=1)[:, :2].double().numpy()
        mean, covariance = grid.moments(n)
        np.testing.assert_allclose(z.mean(0), mean, atol=0.04)
        np.testing.assert_allclose(z.var(0), covariance.diagonal(), rtol=0.04)
    for n in (0, 24):
        z = population.sample(1000, n / 48, seed=2)
        exact = grid.value(n, z[:, :2].double().numpy())
        off = population.value(n / 48, z).detach().double().numpy() - exact
        assert np.sqrt((off**2).mean()) < 0.01 * exact.mean()


@pytest.mark.slow
def test_more_viscosity_spreads_the_crowd():
    spreads = []
    for viscosity in (0.0, 0.1, 0.4):
        population = solve_alternating(
            crossing(viscosity=viscosity), width=32, max_steps=300, progress=False
        )
        spreads.append([population.sample(8192, t).var(0).sum().item() for t in (0.5, 1.0)])
    assert (np.diff(spreads, axis=0) > 0).all()


def test_control_solve_refuses_what_it_would_solve_without_the_crowd():
    with pytest.raises(ArgumentError, match=r"use games\.solve_alternating"):
        solve(stochastic_crowd(), max_steps=1)
