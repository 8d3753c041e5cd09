"""The Eulerian solver of mean-field games: closed forms, brute force and weak duality."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy.optimize import minimize, minimize_scalar
from scipy.special import logsumexp

from pathline.errors import ArgumentError, ShapeError, SolveWarning
from pathline.games.eulerian import EulerianGame
from pathline.games.splitting import Continuity, face_minimum, node_minimum
from pathline.games.staggered import AXES, mean, to_faces, upwind

VARIANCE = 0.3


def gaussian(x, y, variance=VARIANCE):
    def log_density(points):
        square = ((points - (x, y)) ** 2).sum(1)
        return -square / (2 * variance) - math.log(2 * math.pi * variance)

    return log_density


def eight_gaussians(points):
    angles = np.pi / 4 * np.arange(8)
    logs = [gaussian(4 * np.cos(a), 4 * np.sin(a))(points) for a in angles]
    return logsumexp(logs, axis=0) - math.log(8)


def obstacle(height):
    def preference(points):
        x, y = points.T
        return height * np.exp(-(x**2) / 2 - y**2) / (2 * math.pi * math.sqrt(0.5))

    return preference


CROWD = EulerianGame(
    initial=gaussian(0, 3),
    terminal=gaussian(0, -3),
    box=((-3, 3), (-4.5, 4.5)),
    cells=(16, 16),
    steps=8,
    preference=obstacle(50),
    entropy=0.01,
)
SHIFT = replace(
    CROWD, box=((-2.25, 2.25), (-5.4, 5.4)), cells=(8, 20), preference=None, entropy=0.0
)
SMALL = EulerianGame(
    initial=gaussian(-0.4, 0.3, 1.0),
    terminal=gaussian(0.5, 0.0, 0.8),
    box=((-2, 2), (-1, 1.5)),
    cells=(5, 4),
    steps=3,
    transport=1.5,
    preference=lambda p: 2 * np.exp(-(p**2).sum(1)),
    entropy=0.2,
)


@pytest.fixture(scope="module")
def crowd():
    return CROWD.solve()


def test_a_face_is_minimised_as_by_brute_force():
    rng = np.random.default_rng(0)
    rho, m = rng.normal(size=60), 3 * rng.normal(size=60)
    m[:10] = 0
    ratio, speed2 = 0.7, 2.5
    r, n = face_minimum(rho, m, ratio, speed2)
    for i in range(len(rho)):

        def cost(x, i=i):  # the best n for a density x is m x / (x + ratio)
            return ratio * m[i] ** 2 / (x + ratio) + speed2 * (x - rho[i]) ** 2

        best = minimize_scalar(cost, bounds=(0, 10), method="bounded", options={"xatol": 1e-12})
        assert r[i] == pytest.approx(best.x, abs=1e-6)
    np.testing.assert_allclose(n * (r + ratio), m * r, atol=1e-14)


@pytest.mark.parametrize("alpha", [1e-3, 0.5, 200.0])
def test_a_node_is_minimised_as_by_brute_force(alpha):
    rng = np.random.default_rng(1)
    rho, beta, penalty = rng.normal(size=40), rng.normal(size=40), 3.0
    found = node_minimum(rho, np.full(40, alpha), beta, penalty)
    assert (found >= 0).all()
    for r, z, b in zip(found, rho, beta, strict=True):

        def cost(s, z=z, b=b):
            x = np.exp(s)
            return alpha * x * s + b * x + penalty / 2 * (x - z) ** 2

        best = minimize_scalar(cost, bounds=(-12, 3), method="bounded", options={"xatol": 1e-10})
        if best.x > -11:
            assert r == pytest.approx(np.exp(best.x), rel=1e-5)


def test_the_projection_is_that_of_linear_algebra():
    (nx, ny), steps, spacing, speed2 = (3, 4), 3, (0.5, 0.7), 2.0
    rng = np.random.default_rng(2)
    rho_0 = rng.random((nx, ny))
    shapes = [(steps, nx + 1, ny), (steps, nx, ny + 1), (steps, nx, ny)]
    Z = [rng.normal(size=s) for s in (*shapes, *shapes[:2])]
    Z[3][:, [0, -1]] = 0  # no flux through the walls
    Z[4][:, :, [0, -1]] = 0

    def unpack(u):
        rho, x, y = np.split(u, [steps * nx * ny, steps * nx * ny + steps * (nx - 1) * ny])
        rho = rho.reshape(steps, nx, ny)
        x = np.pad(x.reshape(steps, nx - 1, ny), ((0, 0), (1, 1), (0, 0)))
        y = np.pad(y.reshape(steps, nx, ny - 1), ((0, 0), (0, 0), (1, 1)))
        return np.concatenate([rho_0[None], rho]), x, y

    half = np.ones(shapes[2])
    half[-1] = 0.5
    walls = [np.ones(s) for s in shapes[:2]]  # a copy at a wall weighs half
    walls[0][:, [0, -1]] = walls[1][:, :, [0, -1]] = 0.5
    roots = [np.sqrt(speed2 * w) for w in (*walls, half)]

    def distances(u):
        rho, x, y = unpack(u)
        middle = mean(rho, -3)
        copies = [*(to_faces(middle, a) for a in AXES), rho[1:]]
        weighted = [w * (c - z) for w, c, z in zip(roots, copies, Z, strict=False)]
        return np.concatenate([w.ravel() for w in (*weighted, x - Z[3], y - Z[4])])

    def continuity(u):
        rho, x, y = unpack(u)
        div = np.diff(x, axis=1) / spacing[0] + np.diff(y, axis=2) / spacing[1]
        return (np.diff(rho, axis=0) * steps + div).ravel()

    def affine(function):
        at_zero = function(np.zeros(size))
        return np.stack([function(e) - at_zero for e in np.eye(size)], 1), at_zero

    size = steps * (nx * ny + (nx - 1) * ny + nx * (ny - 1))
    (A, a), (C, c) = affine(distances), affine(continuity)
    kkt = np.block([[A.T @ A, C.T], [C, np.zeros((len(C), len(C)))]])
    solved = np.linalg.solve(kkt, np.concatenate([-A.T @ a, -c]))
    rho, x, y = unpack(solved[:size])
    U, phi = Continuity(rho_0, spacing, steps, speed2)(Z)
    for found, expected in zip(U[2:], (rho[1:], x, y), strict=True):
        np.testing.assert_allclose(found, expected, atol=1e-11)
    np.testing.assert_allclose(phi.ravel(), solved[size:], atol=1e-10)


def test_the_minimum_is_that_of_a_general_optimiser():
    """Densities follow from momenta, so BFGS needs no constraint: a barrier keeps them positive."""
    game, (nx, ny), steps = SMALL, SMALL.cells, SMALL.steps
    hx, hy = game.grid.spacing
    rho_0, rho_1, Q = (torch.tensor(r) for r in (game.rho_0, game.rho_1, game.Q))
    weights = torch.tensor([0.5, 1, 1, 0.5])[:, None, None]

    def densities(m):
        x = m[: steps * (nx - 1) * ny].reshape(steps, nx - 1, ny)
        y = m[steps * (nx - 1) * ny :].reshape(steps, nx, ny - 1)
        flux_x = torch.nn.functional.pad(x, (0, 0, 1, 1))
        flux_y = torch.nn.functional.pad(y, (1, 1))
        div = flux_x.diff(dim=1) / hx + flux_y.diff(dim=2) / hy
        return torch.cat([rho_0[None], rho_0 - div.cumsum(0) / steps]), x, y

    def objective(m):
        m = torch.tensor(m, requires_grad=True)
        rho, x, y = densities(m)
        if rho.min() <= 0:
            return math.inf, np.zeros(len(m))
        middle = (rho[1:] + rho[:-1]) / 2
        kinetic = (x**2 / (middle[:, 1:] + middle[:, :-1])).sum()
        kinetic = kinetic + (y**2 / (middle[:, :, 1:] + middle[:, :, :-1])).sum()
        running = (weights * (rho * Q + game.entropy * rho * rho.log())).sum()
        end = game.terminal_weight * (rho[-1] * (rho[-1] / rho_1).log()).sum()
        total = hx * hy * ((game.transport * kinetic + running) / steps + end)
        total.backward()
        return total.item(), m.grad.numpy()

    start = np.zeros(steps * ((nx - 1) * ny + nx * (ny - 1)))
    best = minimize(objective, start, jac=True, method="BFGS", options={"gtol": 1e-9})
    found = game.solve(tolerance=1e-8, max_iterations=20000)
    assert found.cost.total == pytest.approx(best.fun, rel=1e-7)
    np.testing.assert_allclose(found.rho, densities(torch.tensor(best.x))[0], atol=1e-5)
    assert found.bound <= best.fun + 1e-12


def test_every_value_function_bounds_the_cost_from_below(crowd):
    rng = np.random.default_rng(3)
    for size in (0, 0.01, 0.3, 3):
        value = crowd.value + size * rng.normal(size=crowd.value.shape)
        assert CROWD.lower_bound(value) <= crowd.cost.total * (1 + crowd.gap)
    assert crowd.bound == CROWD.lower_bound(crowd.value)
    assert crowd.gap <= 5e-4


def test_mass_is_kept_and_continuity_holds(crowd):
    (hx, hy), volume = CROWD.grid.spacing, CROWD.grid.volume
    np.testing.assert_allclose(crowd.rho.sum((1, 2)) * volume, 1, atol=1e-12)
    x, y = crowd.momentum
    div = np.diff(x, axis=1) / hx + np.diff(y, axis=2) / hy
    np.testing.assert_allclose(np.diff(crowd.rho, axis=0) / CROWD.grid.dt, -div, atol=1e-10)
    assert not np.any(x[:, [0, -1]]) and not np.any(y[:, :, [0, -1]])
    assert crowd.rho.min() > -5e-4


def test_the_same_call_gives_the_same_solution(crowd):
    assert np.array_equal(CROWD.solve().rho, crowd.rho)


def test_mirrored_games_have_mirrored_solutions():
    game = replace(
        SMALL,
        initial=lambda p: SMALL.initial(p[:, ::-1]),
        terminal=lambda p: SMALL.terminal(p[:, ::-1]),
    )
    game = replace(game, box=SMALL.box[::-1], cells=SMALL.cells[::-1])
    np.testing.assert_allclose(
        game.solve(tolerance=1e-6).rho, SMALL.solve(tolerance=1e-6).rho.swapaxes(1, 2), atol=1e-9
    )


def test_a_shifted_gaussian_costs_what_it_should():
    """Relaxed optimum: it stops delta = D a1 / (a1 + a3 / variance) short of the target."""
    short = 6 / (1 + 5 / VARIANCE)
    transport, terminal = (6 - short) ** 2 / 2, short**2 / (2 * VARIANCE)
    exact = transport + 5 * terminal
    solutions = [
        replace(SHIFT, cells=(8 * n, 20 * n), steps=8 * n).solve(tolerance=3e-4) for n in (1, 2)
    ]
    coarse, fine = (s.cost for s in solutions)
    assert (coarse.total - exact) > 3 * abs(fine.total - exact)
    for name, value in (("transport", transport), ("total", exact)):
        extrapolated = (4 * getattr(fine, name) - getattr(coarse, name)) / 3
        assert extrapolated == pytest.approx(value, rel=0.01)
    assert fine.terminal == pytest.approx(terminal, rel=0.1)
    errors = [abs(s.velocity(0.5, np.zeros((1, 2)))[0, 1] - (short - 6)) for s in solutions]
    assert errors[1] < errors[0] / 2
    game = solutions[1].game
    pushed = game.push(solutions[1].velocity)
    height = (pushed.rho[-1].sum(0) * game.grid.centres[1]).sum() * game.grid.volume
    assert height == pytest.approx(short - 3, rel=0.02)


@pytest.mark.slow
def test_eight_gaussians_to_one_cost_what_sinkhorn_found():
    """10.67 +- 0.01: semi-relaxed Sinkhorn on grids, extrapolated in the regularisation."""
    game = EulerianGame(
        initial=eight_gaussians,
        terminal=gaussian(0, 0),
        box=((-5.5, 5.5), (-5.5, 5.5)),
        transport=2.0,
    )
    coarse = replace(game, cells=(32, 32), steps=16).solve().cost
    fine = game.solve().cost
    assert (4 * fine.total - coarse.total) / 3 == pytest.approx(10.67, rel=0.01)
    transport = 2 * (4 * fine.transport - coarse.transport) / 3
    assert transport == pytest.approx(10.04, rel=0.02)


@pytest.mark.slow
def test_a_crowd_goes_round_a_high_obstacle():
    shares = []
    for height in (50, 500):
        game = replace(CROWD, cells=(32, 32), steps=16, preference=obstacle(height))
        solution = game.solve(tolerance=1e-3)
        shares.append(game.share_inside(solution.rho[8], (1, math.sqrt(0.5))))
        assert game.mean_preference(solution.rho[8]) > 0
    assert shares[1] < shares[0] / 3


def test_pushing_is_of_second_order_and_keeps_mass():
    def drift(t, points):
        return np.tile([1.0, -2.0], (len(points), 1))

    errors = []
    for n in (32, 64):
        game = replace(
            SHIFT,
            initial=gaussian(-0.5, 1),
            terminal=gaussian(0.5, -1),
            box=((-3.5, 3.5), (-4, 4)),
            cells=(n, n),
            steps=n // 2,
        )
        pushed = game.push(drift)
        errors.append(np.abs(pushed.rho[-1] - game.rho_1).sum() * game.grid.volume)
        masses = pushed.rho.sum((1, 2)) * game.grid.volume
        np.testing.assert_allclose(masses, 1, atol=1e-13)
        assert pushed.rho.min() >= 0
        assert pushed.cost.transport == pytest.approx(2.5, rel=1e-3)
    assert math.log2(errors[0] / errors[1]) > 1.7


def test_upwind_keeps_a_density_positive_in_a_sharp_corner():
    rho = np.zeros((6, 6))
    rho[2, 3] = 1.0
    rng = np.random.default_rng(4)
    normal = [rng.uniform(-1, 1, size=s) for s in ((5, 6), (6, 5))]
    for _ in range(20):
        rho = upwind(rho, normal, (1.0, 1.0), 0.25)
        assert rho.min() >= 0
        assert rho.sum() == pytest.approx(1, abs=1e-14)


def test_shares_and_preferences_of_known_densities():
    game = replace(CROWD, cells=(96, 96))
    uniform = np.full((96, 96), 1 / 54)
    assert game.share_inside(uniform, (1, 2)) == pytest.approx(2 * math.pi / 54, rel=1e-3)
    points = np.stack(np.meshgrid(*game.grid.centres, indexing="ij"), -1)
    rho = np.exp(-(points[..., 0] ** 2) / 2 - points[..., 1] ** 2) / (math.pi * math.sqrt(2))
    inside = game.share_inside(rho, (1, math.sqrt(0.5)))  # within one standard deviation
    assert inside == pytest.approx(1 - math.exp(-0.5), rel=2e-3)
    # The integral of 50 times the square of this Gaussian.
    assert game.mean_preference(rho) == pytest.approx(50 / (4 * math.pi * math.sqrt(0.5)), rel=5e-3)


def test_a_solve_that_ends_early_says_so():
    with pytest.warns(SolveWarning, match=r"gap .* after 20 iterations on \(5, 4\) cells"):
        SMALL.solve(tolerance=1e-9, max_iterations=20)


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        ({"box": ((1, 0), (0, 1))}, ArgumentError, "`box` must be"),
        ({"cells": (1, 8)}, ArgumentError, "`cells` must be two numbers of at least 2"),
        ({"steps": 1}, ArgumentError, "`steps` must be at least 2, got 1"),
        ({"transport": -1.0}, ArgumentError, "`transport` must be positive, got -1.0"),
        ({"terminal_weight": 0.0}, ArgumentError, "`terminal_weight` must be positive"),
        ({"entropy": -0.1}, ArgumentError, "`entropy` must not be negative"),
        (
            {"preference": lambda p: p},
            ShapeError,
            r"`preference` must return \(20,\), got \(20, 2\)",
        ),
        ({"initial": lambda p: p[:, 0] * np.nan}, ArgumentError, "`initial` must be finite"),
    ],
)
def test_bad_games_are_refused(change, error, text):
    with pytest.raises(error, match=text):
        replace(SMALL, **change)


def test_bad_velocities_are_refused():
    with pytest.raises(ShapeError, match=r"`velocity` must return \(16, 2\), got \(16,\)"):
        SMALL.push(lambda t, p: p[:, 0])
    with pytest.raises(ArgumentError, match="`velocity` must be finite"):
        SMALL.push(lambda t, p: p * np.inf)
