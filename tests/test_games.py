"""Mean-field games against exact solutions, brute force and quadratures."""

import math

import numpy as np
import pytest
import torch
from scipy.linalg import sqrtm
from scipy.optimize import linear_sum_assignment, minimize
from torch.distributions import Independent, MultivariateNormal, Normal, Uniform

import pathline as pl
from pathline.control import Weights, rollout, solve
from pathline.control.interaction import size
from pathline.errors import ArgumentError, DataError, PathlineError, ShapeError
from pathline.flows import OTFlow
from pathline.games import Density, Equilibrium, MeanFieldGame
from pathline.games.game import congestion
from pathline.games.problems import crowd_motion, shift, transport

VARIANCE, DISTANCE, TERMINAL = 0.3, 6.0, 5.0
# The shift stops short where another step costs more than it gains.
SHORT = DISTANCE / (1 + TERMINAL / VARIANCE)


def normal(mean, scale=1.0):
    mean = torch.as_tensor(mean, dtype=torch.float64)
    return Independent(Normal(mean, torch.full_like(mean, scale)), 1)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def exact_shift() -> Equilibrium:
    """Phi = DISTANCE' (y + ...): linear in state and time, so the network is zero."""
    found = shift().policy(4, 2, generator=seeded()).double()
    inner, speed = found.potential.potential, SHORT - DISTANCE
    with torch.no_grad():
        inner.w.zero_(), inner.A.zero_(), inner.b.zero_(), inner.c.zero_()
        # u = -grad Phi, d_t Phi = |u|^2 / 2 and Phi(1) = 5 (1 + log rho - log rho_1).
        inner.b[1], inner.b[2] = -speed, speed**2 / 2
        end, goal = 3 + speed, -3.0
        inner.c.copy_(TERMINAL * (1 + (goal**2 - end**2) / (2 * VARIANCE)) - speed**2 / 2)
    return found


def random_equilibrium(game, seed=0, width=6) -> Equilibrium:
    found = game.policy(width, 2, generator=seeded(seed)).double()
    found.potential.initialise(game.initial(200, seeded(seed)), seeded(seed))
    return found


def test_exact_shift_leaves_no_residuals():
    found = exact_shift()
    check = found.check()
    assert check.hjb < 1e-10 and check.terminal_error < 1e-10
    assert found.cost(steps=4)["transport"] == pytest.approx((DISTANCE - SHORT) ** 2 / 2)
    assert check.cost["transport"] == pytest.approx(16.02, abs=0.005)
    x = found.problem.initial(200_000, seeded(1))
    # The divergence is linear in the state: its mean has the spread of one coordinate.
    spread = TERMINAL * SHORT / VARIANCE**0.5 / len(x) ** 0.5
    exact = TERMINAL * SHORT**2 / (2 * VARIANCE)
    assert exact == pytest.approx(0.961, abs=0.001)
    assert found.cost(x, steps=2)["terminal"] == pytest.approx(exact, abs=4 * spread)


def test_costs_of_the_density_follow_the_augmented_equation():
    """Against an adaptive solve of states, log-determinants and costs together."""
    game = MeanFieldGame(
        normal([0.0, 1.0]), normal([1.0, -1.0]), preference=lambda z: z[:, 0].square(),
        entropy=0.7, transport=1.5, congestion=0.4,
    )  # fmt: skip
    found = random_equilibrium(game)
    x = game.initial(7, seeded(3))
    source = game.source.log_prob(x)

    def velocity(t, state):
        z, log_det, *_ = state
        phi = found.potential.bind()(z, t)
        u = -phi.grad / game.transport
        log_rho = source - log_det
        kernel = 1 / (1 + (z[:, None, :2] - z[None, :, :2]).square().sum(2))
        near = (kernel.sum(1) - 1) / (len(z) - 1)
        F = z[:, 0].square() + 0.7 * log_rho + 0.2 * near
        dF = z[:, 0].square() + 0.7 * (log_rho + 1) + 0.4 * near
        residual = phi.dt - phi.grad.square().sum(1) / (2 * game.transport) + dF
        L = 0.5 * game.transport * u.square().sum(1) + F
        return u, -phi.laplacian / game.transport, L, size(residual)

    zero = torch.zeros(7, dtype=torch.float64)
    with torch.no_grad():
        times = torch.tensor([0.0, 1.0], dtype=torch.float64)
        z, log_det, cost, hjb = pl.odeint(
            velocity, (x, zero, zero, zero), times, rtol=1e-9, atol=1e-10
        )
        path = rollout(game, found.potential, x, steps=64)
    assert torch.allclose(path.z, z[-1], atol=1e-6)
    assert torch.allclose(path.log_det, log_det[-1], atol=1e-6)
    assert torch.allclose(path.running_cost, cost[-1], atol=1e-5)
    assert torch.allclose(path.hjb, hjb[-1], atol=1e-4)


def test_steps_of_the_costs_converge_at_fourth_order():
    game = crowd_motion()
    found, x = random_equilibrium(game), game.initial(20, seeded(1))
    with torch.no_grad():
        exact = rollout(game, found.potential, x, steps=128).running_cost
        errors = [
            (rollout(game, found.potential, x, steps=n).running_cost - exact).abs().max()
            for n in (8, 16)
        ]
    assert math.log2(errors[0] / errors[1]) > 3.5


def test_congestion_is_the_mean_over_pairs_and_its_variation_the_derivative():
    z = torch.randn(6, 3, generator=seeded(), dtype=torch.float64, requires_grad=True)
    brute = [
        np.mean([1 / (1 + (z[i, :2] - z[j, :2]).square().sum().item()) for j in range(6) if j != i])
        for i in range(6)
    ]
    assert congestion(z).tolist() == pytest.approx(brute)
    game = MeanFieldGame(normal([0.0] * 3), normal([0.0] * 3), congestion=2.0, entropy=0.3)
    share, _ = game.interaction.running(z, torch.zeros(6, dtype=torch.float64))
    (slope,) = torch.autograd.grad(share.sum(), z)
    alone = z[0].detach().clone().requires_grad_(True)  # the others stay
    _, variation = game.interaction.running(
        torch.cat([alone[None], z[1:].detach()]), torch.zeros(6, dtype=torch.float64)
    )
    (own,) = torch.autograd.grad(variation[0], alone)
    assert torch.allclose(slope[0], own)


def test_density_is_that_of_the_pushed_particles_and_integrates_to_one():
    found = random_equilibrium(crowd_motion(), width=8)
    found.potential.unit.mul_(3)
    x = found.problem.initial(50, seeded(2))
    crowd = found.crowd(x, steps=40)
    for t in (0.5, 1.0):
        n = round(t * 40)
        assert torch.allclose(found.push(x, t, steps=40), crowd.states[n], atol=1e-6)
        back = found.log_density(crowd.states[n], t, steps=40)
        assert torch.allclose(back, crowd.log_density[n], atol=1e-5)
    axis = torch.linspace(-9, 9, 151, dtype=torch.float64)
    grid = torch.cartesian_prod(axis, axis)
    mass = found.density(grid).sum() * (axis[1] - axis[0]) ** 2
    assert mass.item() == pytest.approx(1, abs=1e-3)


def test_terms_add_up_to_what_the_engine_integrates():
    game = crowd_motion()
    game.congestion = 0.5
    found, x = random_equilibrium(game), game.initial(64, seeded())
    cost = found.cost(x, steps=64)
    path = found.simulate(x, steps=64)
    assert cost["total"] == pytest.approx(path.cost.mean().item(), rel=1e-5)
    assert cost["total"] == pytest.approx(sum(v for k, v in cost.items() if k != "total"))
    # Of Gaussians N(0, s I) in two dimensions, with rho = rho_0 all along.
    still = random_equilibrium(shift())
    still.potential.unit.zero_()
    still.problem.entropy = 1.0
    x = still.problem.initial(100_000, seeded())
    exact = -math.log(2 * math.pi * math.e * VARIANCE)
    assert still.cost(x, steps=2)["entropy"] == pytest.approx(exact, abs=0.02)


def test_a_policy_is_saved_with_its_precision(tmp_path):
    found = random_equilibrium(crowd_motion())
    pl.save(found, tmp_path / "model")
    again = Equilibrium.load(tmp_path / "model", crowd_motion())
    x = found.problem.initial(3, seeded())
    assert torch.equal(found.velocity(0.3, x), again.velocity(0.3, x))


@pytest.mark.parametrize("optimizer", ["adam", "lbfgs"])
def test_training_finds_the_shift(optimizer):
    """J = 16.98, from the exact solution."""
    few = {
        "adam": {"max_steps": 300, "learning_rate": 0.1},
        "lbfgs": {"max_steps": 6, "double": True},
    }[optimizer]
    weights = Weights(hjb=3, terminal=3, terminal_gradient=0)
    found = solve(
        shift(), width=8, steps=2, batch_size=512, weights=weights, optimizer=optimizer,
        progress=False, **few,
    )  # fmt: skip
    cost = found.cost(found.problem.initial(50_000, seeded(9)))
    exact = (DISTANCE - SHORT) ** 2 / 2 + TERMINAL * SHORT**2 / (2 * VARIANCE)
    assert cost["total"] == pytest.approx(exact, rel=0.01)


def test_samples_and_flows_are_densities():
    x = torch.randn(4000, 2, generator=seeded(), dtype=torch.float64)
    kernel = Density(x, "initial")
    at = torch.zeros(1, 2, dtype=torch.float64)
    assert kernel.log_prob(at).item() == pytest.approx(-math.log(2 * math.pi), abs=0.1)
    flow = Density(OTFlow(2, 8, generator=seeded()), "initial")
    assert flow.log_prob(at).shape == (1,)
    drawn = [flow.sample(3, seeded(4)) for _ in range(2)]
    assert torch.equal(*drawn)
    game = MeanFieldGame(x, OTFlow(2, 8, generator=seeded()))
    assert random_equilibrium(game).cost(steps=2)["total"] > 0


def test_drawing_leaves_the_global_generator_alone():
    torch.manual_seed(3)
    want = torch.rand(2)
    torch.manual_seed(3)
    crowd_motion().initial(10, seeded())
    assert torch.equal(torch.rand(2), want)


@pytest.mark.parametrize(
    ("arguments", "error", "said"),
    [
        (dict(terminal=normal([0.0] * 3)), ArgumentError, "same dimension, got 2 and 3"),
        (dict(terminal=Normal(0.0, 1.0)), ArgumentError, "distribution of vectors"),
        (dict(entropy=-1.0), ArgumentError, "`entropy` must be finite and >= 0, got -1.0"),
        (dict(terminal_weight=math.nan), ArgumentError, "`terminal_weight`"),
        (dict(transport=0.0), ArgumentError, "`transport` must be positive"),
        (dict(preference=lambda z: z), ShapeError, r"`preference` must return \(256,\)"),
        (dict(preference=lambda z: z[:, 0] / 0), DataError, "`preference` must be finite"),
        (
            dict(terminal=Independent(Uniform(torch.zeros(2), torch.ones(2), False), 1)),
            DataError,
            "log-density of `terminal`",
        ),
        (dict(initial=torch.zeros(50, 2)), DataError, "column 0 of `initial` is constant"),
        (dict(initial=torch.zeros(5, 2)), ShapeError, "at least 10 samples"),
        (dict(initial=torch.full((20, 2), math.nan)), DataError, "`initial` must be finite"),
    ],
)
def test_bad_games(arguments, error, said):
    with pytest.raises(error, match=said):
        MeanFieldGame(**dict(initial=normal([0.0, 0.0]), terminal=normal([1.0, 1.0])) | arguments)


def test_bad_questions():
    found = random_equilibrium(shift())
    for call in (
        lambda: found.push(torch.zeros(3, 3)),
        lambda: found.log_density(torch.zeros(3, 2), 1.5),
        lambda: found.cost(steps=3),
        lambda: found.check(torch.zeros(4, 5)),
        lambda: transport(1),
    ):
        with pytest.raises(PathlineError):
            call()


def bures(A, S):
    """The optimal map from N(0, A) to N(0, S), a matrix."""
    root = np.real(sqrtm(A))
    inverse = np.linalg.inv(root)
    return inverse @ np.real(sqrtm(root @ S @ root)) @ inverse


def relaxed(A, B, b, weight):
    """Mean and covariance S of the best end, and its cost: W_2^2 / 2 + weight KL over Gaussians."""

    def parts(v):
        root = np.array([[v[2], 0], [v[3], v[4]]])
        return v[:2], root @ root.T

    def cost(v):
        (m, S), inverse = parts(v), np.linalg.inv(B)
        transport = m @ m / 2 + np.trace(A + S - 2 * bures(A, S) @ A) / 2
        logs = np.log(np.linalg.det(B) / np.linalg.det(S))
        return transport + weight / 2 * (
            np.trace(inverse @ S) + (m - b) @ inverse @ (m - b) - 2 + logs
        )

    found = minimize(cost, [*b, 0.7, 0, 1.0], method="BFGS")
    return *parts(found.x), found.fun


@pytest.mark.slow
def test_gaussians_of_other_covariance_by_the_bures_map():
    A, B = np.array([[1.0, 0.3], [0.3, 0.5]]), np.array([[0.6, -0.2], [-0.2, 1.2]])
    b = np.array([2.0, 1.0])
    game = MeanFieldGame(
        MultivariateNormal(torch.zeros(2).double(), torch.from_numpy(A)),
        MultivariateNormal(torch.from_numpy(b), torch.from_numpy(B)),
        terminal_weight=20.0,
    )
    found = solve(
        game, width=16, steps=4, batch_size=1024, max_steps=16, optimizer="lbfgs", double=True,
        weights=Weights(hjb=1, terminal=0.1, terminal_gradient=0), progress=False,
    )  # fmt: skip
    m, S, least = relaxed(A, B, b, 20.0)
    x = game.initial(2000, seeded(5))
    want = x @ torch.from_numpy(bures(A, S)).mT + torch.from_numpy(m)
    error = (found.push(x) - want).norm() / (want - want.mean(0)).norm()
    assert error < 0.02
    cost = found.cost(game.initial(30_000, seeded(6)))
    assert cost["total"] == pytest.approx(least, rel=0.01)
    # Exact discrete optimal transport of samples.
    end = MultivariateNormal(torch.from_numpy(m), torch.from_numpy(S))
    distances = torch.cdist(x, Density(end, "end").sample(2000, seeded(6))).square().numpy()
    rows, columns = linear_sum_assignment(distances)
    assert cost["transport"] == pytest.approx(0.5 * distances[rows, columns].mean(), rel=0.03)
