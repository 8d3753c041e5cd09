"""Named control problems against formulas, brute force and solvers of other kinds."""

import itertools
import math

import numpy as np
import pytest
import torch
from scipy.integrate import solve_ivp
from scipy.optimize import minimize
from scipy.spatial.transform import Rotation
from scipy.stats import multivariate_normal

from hjb_grid import hill_value
from pathline.control import Problem, riccati_value, transcribe
from pathline.control.problems import (
    PROBLEMS,
    Agents,
    Corridor,
    Hill,
    LinearQuadratic,
    LogBenchmark,
    Quadcopter,
    Swap2,
    Swap12,
    Swarm50,
    make,
)
from pathline.control.problems.neuron import HEALTHY, PATHOLOGICAL, Neuron, membrane, rates
from pathline.control.transcription import shoot
from pathline.errors import ArgumentError

NOISY = [LinearQuadratic(noise=0.4), Quadcopter(noise=0.2), Neuron(), Neuron(limit=40)]


def time(value):
    return torch.tensor(value, dtype=torch.float64)


def draw(*shape, scale=1.0, seed=0):
    return scale * torch.from_numpy(np.random.default_rng(seed).standard_normal(shape))


@pytest.mark.parametrize("problem", [*map(make, PROBLEMS), *NOISY], ids=lambda p: p.name)
def test_every_problem_passes_its_own_check(problem):
    check = problem.check()
    assert check.passed, check.verdict


def hjb_residual(value, problem, t, z, step=1e-3):
    """d_t Phi + H + tr(sigma sigma^T Hessian Phi) / 2 by central differences of `value(t, z)`."""
    dt = (value(t + step, z) - value(t - step, z)) / (2 * step)
    sides = step * torch.eye(problem.dim, dtype=torch.float64)
    slope = torch.stack([(value(t, z + e) - value(t, z - e)) / (2 * step) for e in sides], 1)
    residual = dt + problem.hamiltonian(t, z, slope)
    if problem.noise is not None:
        here = value(t, z)
        for e in step * problem.noise.T:
            residual = residual + (value(t, z + e) - 2 * here + value(t, z - e)) / (2 * step**2)
    return residual, dt


# Agents ------------------------------------------------------------------------------------------


def test_agents_that_are_alone_go_straight():
    start, target = [(-2.0, 0.0), (1.0, 3.0)], [(2.0, 1.0), (0.0, -3.0)]
    problem = Agents(start, target, 0.5, terminal=7.0, repulsion=0.0)
    found = transcribe(problem, steps=4, guesses=0)
    way = np.square(np.subtract(target, start)).sum()
    assert found.cost == pytest.approx(0.5 * way * 7 / (1 + 7), rel=1e-9)
    u = (problem.target - problem.start) * 7 / (1 + 7)
    torch.testing.assert_close(found.controls, u.expand(4, -1), rtol=1e-4, atol=1e-4)


def to_box(point, low, high):
    """Distance to a box, negative by the nearest face inside it."""
    projected = np.clip(point, low, high)
    if np.any(projected != point):
        return np.linalg.norm(point - projected)
    return -min(np.min(point - low), np.min(high - point))


def to_obstacles(problem, point):
    if isinstance(problem, Swap2):
        return min(np.linalg.norm(point - disc) - 2 for disc in ([0, 4], [0, -3.5]))
    if isinstance(problem, Swarm50):
        first = to_box(point, [-2, -0.5, -np.inf], [2, 0.5, 7])
        return min(first, to_box(point, [2, -1, -np.inf], [4, 1, 4]))
    return math.inf


@pytest.mark.parametrize(
    "problem", [Corridor(), Swap2(), Swap12(), Swarm50()], ids=lambda p: p.name
)
def test_clearance_and_costs_of_agents_by_brute_force(problem):
    z = draw(30, problem.dim, scale=3.0)
    if isinstance(problem, Swarm50):
        # Some positions within the blocks, and agents far apart enough to look past each other.
        z[:10] = draw(10, problem.dim, scale=1.5, seed=1) + z.new_tensor([1.0, 0.0, 5.0]).repeat(50)
        z[10:] += problem.start
    r, strength = problem.radius, problem.repulsion
    clearance, cost = [], []
    for row in z.numpy().reshape(30, problem.count, problem.space):
        distances = [np.linalg.norm(a - b) for a, b in itertools.combinations(row, 2)]
        gaps = [to_obstacles(problem, a) for a in row]
        clearance.append(min(min(distances) - 2 * r, *gaps))
        W = sum(math.exp(-(d**2) / (2 * r**2)) for d in distances if d < 2 * r)
        if isinstance(problem, Corridor):
            hills = ([2.5, 0], [-2.5, 0], [1.5, 0], [-1.5, 0])
            Q = 1e4 * sum(multivariate_normal.pdf(row, c, 0.2 * np.eye(2)).sum() for c in hills)
        elif isinstance(problem, Swap2):
            inside = [(a, c) for a in row for c in ([0, 4], [0, -3.5]) if math.dist(a, c) < 2]
            Q = 1e6 * sum(multivariate_normal.pdf(a, c, np.eye(2)) for a, c in inside)
        else:
            Q = 1e4 * sum(max(-gap, 0) for gap in gaps)
        cost.append(Q + strength * W)
    u = draw(30, problem.dim, seed=2)
    expected = 0.5 * u.square().sum(1) + u.new_tensor(cost)
    found = problem.evaluation().running_cost(time(0.0), z, u)
    torch.testing.assert_close(problem.clearance(z), z.new_tensor(clearance), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)
    assert max(cost) > 1 and (problem.count == 2 or min(clearance) < 0)


def test_agents_start_apart():
    """Of swap12's normal starts 17 % touch, by a count; the others are as many as before."""
    problem = make("swap12")
    z = problem.initial(2000, torch.Generator().manual_seed(0))
    assert z.shape == (2000, 24)
    a = z.view(2000, 12, 2)
    apart = torch.cdist(a, a) + 9 * torch.eye(12, dtype=z.dtype)
    assert apart.min() > 2 * problem.radius
    assert torch.equal(z, problem.initial(2000, torch.Generator().manual_seed(0)))


def test_evaluation_has_no_margin():
    problem = Swap2()
    apart = torch.tensor([[-5.0, 0.0, -5.0, 2.1]], dtype=torch.float64)  # 2.1 r between them
    beside = torch.tensor([[0.0, 1.5, 5.0, 5.0]], dtype=torch.float64)  # 2.5 from the disc's centre
    none = torch.zeros(1, 4, dtype=torch.float64)
    for z in (apart, beside):
        assert problem.running_cost(time(0.0), z, none) > 0
        assert problem.evaluation().running_cost(time(0.0), z, none) == 0
        assert problem.running_cost(time(0.0), z, none) > 0  # unchanged


def test_swap12_changes_places_in_pairs():
    problem = Swap12()
    start, target = problem.start.view(12, 2), problem.target.view(12, 2)
    partner = [next(j for j in range(12) if torch.equal(target[i], start[j])) for i in range(12)]
    assert sorted(partner) == list(range(12))
    assert all(partner[partner[i]] == i != partner[i] for i in range(12))
    # A lower bound of the energy, (start - target)^2 / 2, as published.
    assert 0.5 * (start - target).square().sum().item() == pytest.approx(837, abs=0.5)


def test_swarm50_starts_and_ends_clear_of_the_blocks():
    problem = Swarm50()
    ends = torch.stack([problem.start, problem.target])
    assert problem.dim == 150 and (problem.clearance(ends) > 0).all()
    assert 0.5 * (ends[0] - ends[1]).square().sum().item() == pytest.approx(1156.5, abs=0.5)


@pytest.mark.parametrize("steps", [10, 41])
def test_swarm50_is_guessed_through_gates_that_are_clear(steps):
    problem = Swarm50()
    states, _, _ = shoot(problem, problem.nominal(), problem.guess(steps))
    torch.testing.assert_close(states[-1][0], problem.target)
    if steps % 2 == 0:
        middle = states[steps // 2]
        assert problem.positions(middle)[..., 1].abs().max() < 1e-12  # where the blocks are deepest
        assert problem.clearance(middle) > 0.2


@pytest.mark.slow
def test_swarm50_open_loop_is_cheaper_than_published_and_touches_nothing():
    problem = Swarm50()
    path = transcribe(problem, steps=20, max_iterations=200)
    assert problem.clearance(path.states).min() > 0.1
    assert 0.5 * path.controls.square().sum(1).mean() < 1594.6


# Quadcopter --------------------------------------------------------------------------------------


def test_quadcopter_falls_freely():
    problem = Quadcopter()
    z = torch.zeros(12, dtype=torch.float64)
    z[6:9] = torch.tensor([1.0, -2.0, 3.0])
    states, running, _ = shoot(problem, z, torch.zeros(10, 4, dtype=torch.float64))
    expected = z[:3] + z[6:9] - torch.tensor([0, 0, 9.81 / 2])
    torch.testing.assert_close(states[-1][0, :3], expected)
    energy = [0.5 * s[0, 6:9].square().sum() + 9.81 * s[0, 2] for s in states]
    torch.testing.assert_close(torch.stack(energy), energy[0].expand(11))
    assert running.item() == pytest.approx(2)


def test_quadcopter_thrust_turns_with_the_angles():
    problem, z, u = Quadcopter(), draw(20, 12), draw(20, 4, seed=1)
    dz = problem.dynamics(time(0.0), z, u)
    upwards = Rotation.from_euler("ZYX", z[:, 3:6].numpy()).apply([0.0, 0.0, 1.0])
    fall = torch.tensor([0, 0, 9.81], dtype=torch.float64)
    torch.testing.assert_close(dz[:, 6:9], u[:, :1] * torch.from_numpy(upwards) - fall)
    torch.testing.assert_close(dz[:, :6], z[:, 6:])
    torch.testing.assert_close(dz[:, 9:], u[:, 1:])


def test_quadcopter_hovers():
    problem = Quadcopter()
    z, u = problem.nominal()[None], torch.tensor([[9.81, 0, 0, 0]], dtype=torch.float64)
    assert problem.dynamics(time(0.0), z, u).abs().max() == 0


@pytest.mark.parametrize(
    "problem", [Quadcopter(), Neuron(), Neuron(limit=1.5)], ids=["quadcopter", "neuron", "limited"]
)
def test_feedback_minimises_the_hamiltonian(problem):
    z, p, t = draw(5, problem.dim), draw(5, problem.dim, scale=3.0, seed=1), time(0.4)
    u = problem.feedback(t, z, p)
    torch.testing.assert_close(u, Problem.feedback(problem, t, z, p), rtol=1e-6, atol=1e-6)
    limits = problem.limits(z)
    bounds = None if limits is None else [(limits[0].item(), limits[1].item())]
    for row in range(5):

        def H(v, row=row):
            v = torch.from_numpy(v)[None]
            f = problem.dynamics(t, z[row : row + 1], v)[0]
            return (problem.running_cost(t, z[row : row + 1], v)[0] + f @ p[row]).item()

        first = np.zeros(problem.control_dim)
        found = minimize(H, first, bounds=bounds, method="L-BFGS-B", options={"ftol": 1e-15})
        np.testing.assert_allclose(u[row].numpy(), found.x, rtol=1e-3, atol=1e-3)
        assert H(u[row].numpy()) <= found.fun + 1e-9


# Problems with known value -----------------------------------------------------------------------


def test_linear_quadratic_value_is_the_published_one():
    z = torch.full((1, 2), -3.0, dtype=torch.float64)
    value = LinearQuadratic(noise=0.4).exact_value(time(0.0), z)
    assert value.item() == pytest.approx(9.6493, abs=5e-5)
    assert LinearQuadratic().exact_value(time(0.0), z).item() == pytest.approx(8.9109, abs=5e-5)


@pytest.mark.parametrize("noise", [0.0, 0.4])
@pytest.mark.parametrize("dim", [2, 10])
def test_linear_quadratic_value_solves_the_hjb_equation(dim, noise):
    problem, z = LinearQuadratic(dim, noise), draw(10, dim)
    residual, dt = hjb_residual(problem.exact_value, problem, time(0.3), z)
    assert residual.abs().max() < 1e-4 * dt.abs().max()
    end = problem.exact_value(time(1.0), z)
    torch.testing.assert_close(end, problem.terminal_cost(z))


@pytest.mark.parametrize(
    ("dim", "modified", "value", "digits"),
    [
        (100, False, 4.590162, 1e-6),
        (10, False, 2.157022, 1e-6),
        (20, False, 2.921015, 1e-6),
        (50, False, 3.882007, 1e-6),
        (100, True, -401.882, 1e-3),
    ],
)
def test_benchmark_value_is_the_published_one(dim, modified, value, digits):
    problem = LogBenchmark(dim, modified)
    found = problem.exact_value(time(0.0), problem.nominal()[None])
    assert found.item() == pytest.approx(value, abs=0.6 * digits)


@pytest.mark.parametrize(("dim", "t"), [(2, 0.0), (3, 0.25), (5, 0.5), (100, 0.0)])
def test_benchmark_value_by_monte_carlo(dim, t):
    """Cole-Hopf: Phi = -log E exp(-G(z + sqrt(2 (1 - t)) N)) for sigma = sqrt(2)."""
    z = np.linspace(-1, 1, dim)
    noise = np.random.default_rng(0).standard_normal((1_000_000 // dim, dim))
    samples = 2 / (1 + np.square(z + math.sqrt(2 * (1 - t)) * noise).sum(1))
    mean, error = samples.mean(), samples.std() / math.sqrt(len(samples))
    found = LogBenchmark(dim).exact_value(time(t), torch.from_numpy(z)[None])
    assert found.item() == pytest.approx(-math.log(mean), abs=4 * error / mean)
    assert error / mean < 2e-3


def test_benchmark_value_solves_the_hjb_equation():
    problem, z = LogBenchmark(3), draw(1, 3)
    residual, dt = hjb_residual(problem.exact_value, problem, time(0.3), z, step=0.02)
    assert residual.abs().max() < 3e-3 * dt.abs().max()


# Hill --------------------------------------------------------------------------------------------

PUBLISHED = {  # by another finite-difference solver, to 0.011
    (-1.5, -1.5): 14.60, (-2, -1): 13.50, (-1, -2): 13.50, (0, 0): 7.73, (-2.5, -2.5): 20.75,
    (-1.5, 0): 9.211, (1.5, 1.5): 0.990,
}  # fmt: skip


def test_hill_on_a_grid():
    coarse, fine = (hill_value([0.0], spacing)[0] for spacing in (0.2, 0.1))
    for point, value in PUBLISHED.items():
        assert fine(*point).item() == pytest.approx(value, abs=0.011)
        assert coarse(*point).item() == pytest.approx(fine(*point).item(), abs=0.011)


def test_hill_is_the_problem_on_the_grid():
    """Phi of the grid, with the costs, feedback and noise of the problem, solves its equation."""
    problem, step, z = Hill(), 0.01, draw(50, 2)
    splines = dict(zip((0.41, 0.4, 0.39), hill_value([0.41, 0.4, 0.39], 0.1), strict=True))

    def value(t, z):
        spline = splines[round(t.item(), 2)]
        return torch.from_numpy(spline.ev(*z.numpy().T))

    residual, dt = hjb_residual(value, problem, time(0.4), z, step)
    assert residual.abs().max() < 1e-2 * dt.abs().max()
    # Near the end Phi is G, but for what is done in the last 1e-4 of the time.
    last = torch.from_numpy(hill_value([1 - 1e-6], 0.1)[0].ev(*z.numpy().T))
    torch.testing.assert_close(last, problem.terminal_cost(z), rtol=2e-4, atol=2e-4)


# Neuron ------------------------------------------------------------------------------------------


def ratio(x):
    """x / (exp(x) - 1)."""
    near = np.abs(x) < 1e-9
    return np.where(near, 1.0, x / np.where(near, 1.0, np.expm1(x)))


def hodgkin_huxley(z, u, sodium):
    """dz/dt for rows (batch, 4)."""
    V, m, n, h = z.T
    ionic = sodium * m**3 * h * (V - 115) + 36 * n**4 * (V + 12) + 0.3 * (V - 10.613)
    dm = ratio((25 - V) / 10) * (1 - m) - 4 * np.exp(-V / 18) * m
    dn = 0.1 * ratio((10 - V) / 10) * (1 - n) - 0.125 * np.exp(-V / 80) * n
    dh = 0.07 * np.exp(-V / 20) * (1 - h) - h / (np.exp((30 - V) / 10) + 1)
    return np.stack([u - ionic, dm, dn, dh], 1)


@pytest.fixture(scope="module")
def healthy_euler():
    """The healthy cell as published: 3000 steps of forward Euler, every second one, (1501, 4)."""
    z, path = np.zeros((1, 4)), [np.zeros((1, 4))]
    for _ in range(3000):
        z = z + 0.01 * hodgkin_huxley(z, 0.0, 120)
        path.append(z)
    return np.concatenate(path[::2])


def euler(xi, feedback, healthy):
    """Controls (steps, batch), states (steps + 1, batch, 4) and cost (batch,) of a pathological
    cell by forward Euler with 1500 steps; `feedback(n, z) -> (batch,)`."""
    z = np.zeros((len(xi), 4))
    z[:, 0] = xi
    us, zs, cost, h = [], [z], 0.0, 0.02
    for n in range(1500):
        u = feedback(n, z)
        cost = cost + h * (0.5 * u**2 + 100 * np.square(z - healthy[n]).sum(1))
        z = z + h * hodgkin_huxley(z, u, 380)
        us.append(u)
        zs.append(z)
    return np.array(us), np.array(zs), cost + 0.5 * np.square(z - healthy[-1]).sum(1)


def test_neuron_rates_at_rest():
    opening, closing = rates(torch.zeros(1, 1, dtype=torch.float64))
    known = torch.tensor([[0.2236, 0.0582, 0.07]], dtype=torch.float64)
    torch.testing.assert_close(opening, known, rtol=0, atol=5e-5)
    known = torch.tensor([[4.0, 0.125, 0.0474]], dtype=torch.float64)
    torch.testing.assert_close(closing, known, rtol=0, atol=5e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("V", "gate", "value", "slope"), [(25, 0, 1, 0.05), (10, 1, 0.1, 0.005)])
def test_neuron_rates_have_no_singularity(V, gate, value, slope, dtype):
    """x / expm1(x) = 1 - x / 2 + x^2 / 12 + ..., also beside zero and at the end of the series."""
    V = V + torch.tensor([0, 1e-6, -1e-6, 0.199, 0.201, -0.199, -0.201], dtype=dtype)[:, None]
    V.requires_grad_(True)
    opening = rates(V)[0][:, gate]
    (first,) = torch.autograd.grad(opening.sum(), V)
    x = (opening.new_tensor([25, 10])[gate] - V.detach()[:, 0]) / 10
    exact = value * (1 - x / 2 + x**2 / 12)
    rtol = {torch.float32: 1e-6, torch.float64: 1e-9}[dtype]
    torch.testing.assert_close(opening.detach(), exact, rtol=rtol, atol=0)
    known = slope * (1 - x / 3)
    torch.testing.assert_close(first[:, 0], known, rtol=2e-5, atol=0)


@pytest.mark.parametrize("sodium", [HEALTHY, PATHOLOGICAL])
def test_neuron_dynamics(sodium):
    V = np.linspace(-40, 120, 60)
    z = np.column_stack([V, np.random.default_rng(0).random((60, 3))])
    u = draw(60, 1, scale=100.0)
    expected = hodgkin_huxley(z, u[:, 0].numpy(), sodium)
    found = membrane(torch.from_numpy(z), u, sodium)
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-9, atol=1e-9)


def test_healthy_neuron_fires_once_and_rests(healthy_euler):
    problem = Neuron()
    path = torch.stack([problem.reference(time(t)) for t in np.linspace(0, 30, 1501)]).numpy()
    fine = solve_ivp(
        lambda t, z: hodgkin_huxley(z[None], 0.0, 120)[0], (0, 30), np.zeros(4), "DOP853",
        np.linspace(0, 30, 1501), rtol=1e-11, atol=1e-12,
    )  # fmt: skip
    np.testing.assert_allclose(path, fine.y.T, rtol=0, atol=1e-6)
    off = problem.reference(time(2.34567)).numpy()
    fine = solve_ivp(
        lambda t, z: hodgkin_huxley(z[None], 0.0, 120)[0], (0, 2.34567), np.zeros(4), "DOP853",
        rtol=1e-11, atol=1e-12,
    )  # fmt: skip
    np.testing.assert_allclose(off, fine.y[:, -1], rtol=0, atol=1e-6)
    published = [-0.065, 0.0526, 0.3184, 0.5866]
    np.testing.assert_allclose(healthy_euler[-1], published, atol=3e-4)
    np.testing.assert_allclose(path[-1], published, atol=2e-3)
    gates, spikes = path[:, 1:], np.diff((path[:, 0] > 50).astype(int)).clip(0).sum()
    assert spikes == 1 and gates.min() >= 0 and gates.max() <= 1


def test_neuron_costs_as_published(healthy_euler):
    _, zs, cost = euler(np.zeros(1), lambda n, z: np.zeros(1), healthy_euler)
    terminal = 0.5 * np.square(zs[-1] - healthy_euler[-1]).sum()
    assert terminal == pytest.approx(15.4, abs=0.05)
    assert cost[0] - terminal == pytest.approx(3.399e6, abs=5e2)
    spikes = np.diff((zs[:, 0, 0] > 50).astype(int)).clip(0).sum()
    assert spikes == 2 and zs[:, 0, 1:].min() >= 0 and zs[:, 0, 1:].max() <= 1

    def cancel(n, z):
        return (380 - 120) * z[:, 1] ** 3 * z[:, 3] * (z[:, 0] - 115)

    assert euler(np.zeros(1), cancel, healthy_euler)[2][0] == pytest.approx(299_699, abs=0.6)


def test_neuron_costs_without_control():
    """Running cost by `shoot` against SciPy's integrator for states and cost together."""
    problem = Neuron()
    problem.horizon = 8.0
    with torch.no_grad():
        none = torch.zeros(400, 1, dtype=torch.float64)
        states, running, terminal = shoot(problem, problem.nominal(), none)

    def both(t, y):
        healthy, ill = hodgkin_huxley(y[:4][None], 0.0, 120), hodgkin_huxley(y[4:8][None], 0.0, 380)
        return np.concatenate([healthy[0], ill[0], [100 * np.square(y[4:8] - y[:4]).sum()]])

    fine = solve_ivp(both, (0, 8), np.zeros(9), "DOP853", rtol=1e-10, atol=1e-10).y[:, -1]
    np.testing.assert_allclose(states[-1][0].numpy(), fine[4:8], rtol=1e-4, atol=1e-4)
    assert running.item() == pytest.approx(fine[8], rel=1e-4)
    away = 0.5 * np.square(fine[4:8] - fine[:4]).sum()
    assert terminal.item() == pytest.approx(away, rel=1e-4)


def test_neuron_gradient_by_the_costate_equation():
    """dJ/du = 2 alpha u + p_1 per unit time, with -p' = f_z^T p + Q (z - z*), and differences."""
    problem, current = Neuron(), 7.0
    problem.horizon = 1.0
    u = torch.full((50, 1), current, dtype=torch.float64, requires_grad=True)
    _, running, terminal = shoot(problem, problem.nominal(), u)
    (slope,) = torch.autograd.grad(running + terminal, u)

    def forward(t, y):
        ill = hodgkin_huxley(y[4:][None], current, 380)
        return np.concatenate([hodgkin_huxley(y[:4][None], 0.0, 120)[0], ill[0]])

    path = solve_ivp(
        forward, (0, 1), np.zeros(8), "DOP853", dense_output=True, rtol=1e-10, atol=1e-12
    ).sol

    def backward(t, p):
        healthy, z = np.split(path(t), 2)
        sides = z + 1e-30j * np.eye(4)
        jacobian = hodgkin_huxley(sides, current, 380).imag / 1e-30  # transposed
        return -(jacobian @ p + 200 * (z - healthy))

    last = path(1.0)[4:] - path(1.0)[:4]
    costate = solve_ivp(backward, (1, 0), last, "DOP853", dense_output=True, rtol=1e-9).sol
    edges, h = np.linspace(0, 1, 51), 0.02
    p = (costate(edges[:-1]) + 4 * costate(edges[:-1] + h / 2) + costate(edges[1:]))[0] / 6
    np.testing.assert_allclose(slope[:, 0].numpy() / h, current + p, rtol=1e-4)
    for n in (0, 40):
        with torch.no_grad():
            around = []
            for sign in (1, -1):
                other = u.detach().clone()
                other[n] += sign * 1e-3
                around.append(sum(shoot(problem, problem.nominal(), other)[1:]).item())
        assert slope[n].item() == pytest.approx((around[0] - around[1]) / 2e-3, rel=1e-5)


def test_neuron_limits_its_current():
    problem = Neuron(limit=40)
    p = torch.tensor([[-100.0, 0, 0, 0], [100, 0, 0, 0], [3, 0, 0, 0]], dtype=torch.float64)
    u = problem.feedback(time(0.0), torch.zeros_like(p), p)
    assert u[:, 0].tolist() == [40, -40, -3]
    for wrong in (0, -1.0, math.inf, math.nan):
        with pytest.raises(ArgumentError, match="`limit` must be positive and finite, got"):
            Neuron(limit=wrong)


def iterated_lqr(xi, healthy, sweeps=12):
    """A local optimum of the cost by forward Euler from (xi, 0, 0, 0), and the largest |dJ/du|.

    Gauss-Newton with a stabilising feedback (Li and Todorov, 2004): single shooting fails, because
    the neuron leaves the reference where nothing holds it.
    """
    h, B = 0.02, np.array([0.02, 0, 0, 0])
    gains, shifts = np.tile([-14.1, 0, 0, 0], (1500, 1)), np.zeros(1500)
    zs, us = healthy, np.zeros(1500)
    for _ in range(sweeps):

        def feedback(n, z, now=(us, shifts, zs, gains)):
            u, shift, path, gain = (part[n] for part in now)
            return u + shift + (z - path) @ gain

        us, zs, cost = euler(np.array([xi]), feedback, healthy)
        us, zs = us[:, 0], zs[:, 0]
        columns = [
            hodgkin_huxley(zs[:-1] + 1e-30j * side, 0.0, 380).imag / 1e-30 for side in np.eye(4)
        ]
        F = np.eye(4) + h * np.stack(columns, 2)
        P, p, gains, shifts, steepest = np.eye(4), zs[-1] - healthy[-1], gains * 0, shifts * 0, 0.0
        for n in reversed(range(1500)):
            slope, curvature, cross = h * us[n] + B @ p, h + B @ P @ B, B @ P @ F[n]
            gains[n], shifts[n] = -cross / curvature, -slope / curvature
            steepest = max(steepest, abs(slope) / h)
            p = 200 * h * (zs[n] - healthy[n]) + F[n].T @ p + cross * shifts[n]
            P = 200 * h * np.eye(4) + F[n].T @ P @ F[n] - np.outer(cross, cross) / curvature
    return cost[0], steepest


@pytest.mark.slow
@pytest.mark.parametrize(("xi", "optimum"), [(0.0, 44_728), (-20.0, 50_535), (20.0, 46_188)])
def test_neuron_local_optimum_is_the_one_in_the_docstring(xi, optimum, healthy_euler):
    cost, steepest = iterated_lqr(xi, healthy_euler)
    assert cost == pytest.approx(optimum, abs=0.6)
    assert steepest < 0.1


@pytest.mark.slow
def test_neuron_tracks_the_healthy_one(healthy_euler):
    """The quadratic value along the reference holds the neuron from all starts: costs are fifty
    times below those without control, and at most 15 percent above the published network's."""
    phi = riccati_value(Neuron()).double().bind()

    def feedback(n, z):
        z, t = torch.from_numpy(z), time(0.02 * n)
        return -phi(z, t, value=False, dt=False, laplacian=False).grad[:, 0].numpy()

    xi = np.array([0.0, -20.0, 20.0, *np.linspace(-40, 40, 21)])
    cost = euler(xi, feedback, healthy_euler)[2]
    assert (cost[:3] < 1.15 * np.array([47_180, 62_742, 51_746])).all()
    assert cost.max() < 1e5
