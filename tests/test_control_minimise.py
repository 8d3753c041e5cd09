"""The control that minimises a Hamiltonian: closed forms, a grid, and differences."""

from itertools import product

import pytest
import torch

from pathline.control import Problem, minimise_controls
from pathline.control.problems import Quadcopter

T0 = torch.tensor(0.3, dtype=torch.float64)


class Quadratic(Problem):
    """f = z + B u, L = u.R u / 2 + c.u + z.S u: the minimiser is -R^-1 (B^T p + c + S^T z)."""

    dim, control_dim = 3, 2

    def __init__(self, R, bounds=None):
        generator = torch.Generator().manual_seed(5)
        self.R, self.control_bounds = torch.tensor(R, dtype=torch.float64), bounds
        self.B, self.S = torch.randn(2, 3, 2, generator=generator, dtype=torch.float64)
        self.c = torch.tensor([0.3, -0.7], dtype=torch.float64)

    def dynamics(self, t, z, u):
        return z + u @ self.B.T

    def running_cost(self, t, z, u):
        return 0.5 * ((u @ self.R) * u).sum(1) + u @ self.c + (z * (u @ self.S.T)).sum(1)

    def terminal_cost(self, z):
        return z.square().sum(1)

    def slope(self, z, p):
        return p @ self.B + self.c + z @ self.S


class Scalar(Problem):
    """f = u, and L a function of u alone."""

    dim = 1

    def __init__(self, cost, bounds=None):
        self.cost, self.control_bounds = cost, bounds

    def dynamics(self, t, z, u):
        return u

    def running_cost(self, t, z, u):
        return self.cost(u).sum(1)

    def terminal_cost(self, z):
        return z.square().sum(1)


COUPLED = [[2.0, 0.8], [0.8, 1.0]]
SEPARATE = [[2.0, 0.0], [0.0, 0.5]]


def draw(rows, dim=3, scale=2.0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(1)
    z, p = scale * torch.randn(2, rows, dim, generator=generator, dtype=torch.float64)
    return z.to(dtype), p.to(dtype)


def test_a_quadratic_cost_is_minimised_exactly():
    problem = Quadratic(COUPLED)
    z, p = draw(200)
    want = -torch.linalg.solve(problem.R, problem.slope(z, p).T).T
    torch.testing.assert_close(minimise_controls(problem, T0, z, p), want, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(problem.feedback(T0, z, p), want, rtol=1e-12, atol=1e-12)


def test_bounds_clip_where_the_cost_is_separate():
    lower, upper = torch.tensor([-0.5, -2.0]), torch.tensor([1.0, 0.25])
    problem = Quadratic(SEPARATE, (lower, upper))
    z, p = draw(300)
    free = -problem.slope(z, p) / problem.R.diagonal()
    want = torch.minimum(torch.maximum(free, lower), upper)
    found = minimise_controls(problem, T0, z, p)
    torch.testing.assert_close(found, want, rtol=1e-12, atol=1e-12)
    assert bool((found == lower).any()) and bool((found == upper).any())  # exactly on them


def corners_and_edges(R, slope, low, high):
    """The minimum of u.R u / 2 + slope.u in a box, from each set of coordinates at a bound."""
    best, value = None, torch.inf
    for sides in product((None, low, high), repeat=2):
        u = torch.tensor([0.0 if s is None else s for s in sides], dtype=torch.float64)
        free = [i for i, s in enumerate(sides) if s is None]
        if free:
            rest = slope + R @ u
            u[free] = -torch.linalg.solve(R[free][:, free], rest[free])
        if bool(((u >= low - 1e-12) & (u <= high + 1e-12)).all()):
            cost = (0.5 * u @ R @ u + slope @ u).item()
            if cost < value:
                best, value = u, cost
    return best


def test_bounds_of_a_coupled_cost_against_all_active_sets():
    problem = Quadratic(COUPLED, (-1.0, 0.8))
    z, p = draw(200)
    found = minimise_controls(problem, T0, z, p)
    slopes = problem.slope(z, p)
    want = torch.stack([corners_and_edges(problem.R, s, -1.0, 0.8) for s in slopes])
    torch.testing.assert_close(found, want, rtol=1e-10, atol=1e-10)
    # Clipping the free solution would be another answer.
    clipped = -torch.linalg.solve(problem.R, slopes.T).T.clamp(-1.0, 0.8)
    assert (found - clipped).abs().max() > 0.1


def test_a_cost_that_is_not_quadratic_against_a_grid():
    class Wavy(Quadratic):
        def running_cost(self, t, z, u):
            quartic = (u**4).sum(1) / 4 + (u[:, 0] * u[:, 1]).cosh() - 1
            return super().running_cost(t, z, u) + quartic

    problem = Wavy(COUPLED, (-1.5, 1.5))
    z, p = draw(12)
    found = minimise_controls(problem, T0, z, p)
    axis = torch.linspace(-1.5, 1.5, 301, dtype=torch.float64)
    grid = torch.cartesian_prod(axis, axis)
    for row in range(len(z)):
        zs, ps = z[row].expand(len(grid), -1), p[row].expand(len(grid), -1)
        costs = problem.running_cost(T0, zs, grid) + (ps * problem.dynamics(T0, zs, grid)).sum(1)
        assert (found[row] - grid[costs.argmin()]).abs().max() <= 0.0075  # 3 / 4 of a cell


def test_a_quartic_cost_without_curvature_at_the_first_guess():
    problem = Scalar(lambda u: u**4 / 4)  # u^3 = -p
    p = torch.tensor([[-8.0], [27.0], [1e-3], [1e6], [0.0]], dtype=torch.float64)
    found = minimise_controls(problem, T0, torch.zeros_like(p), p)
    want = -p.sign() * p.abs() ** (1 / 3)
    torch.testing.assert_close(found, want, rtol=1e-6, atol=1e-6)


def test_a_cost_with_two_minima_ends_in_one_of_them():
    problem = Scalar(lambda u: (u**2 - 1) ** 2)  # the tilt p chooses the lower one
    p = torch.tensor([[-0.5], [0.5], [-2.0], [2.0]], dtype=torch.float64)
    found = minimise_controls(problem, T0, torch.zeros_like(p), p)
    slope = 4 * found * (found**2 - 1) + p
    assert slope.abs().max() < 1e-9
    assert torch.equal(found.sign(), -p.sign())


def test_a_linear_cost_rests_at_its_bounds():
    problem = Scalar(lambda u: 0 * u, (-2.0, 3.0))
    p = torch.tensor([[1.0], [-1.0], [1e-3], [-50.0]], dtype=torch.float64)
    found = minimise_controls(problem, T0, torch.zeros_like(p), p)
    assert found[:, 0].tolist() == [-2.0, 3.0, -2.0, 3.0]


def test_rows_are_minimised_alone():
    problem = Quadratic(COUPLED, (-1.0, 0.8))
    z, p = draw(40)
    whole = minimise_controls(problem, T0, z, p)
    alone = torch.cat(
        [minimise_controls(problem, T0, *row) for row in zip(z.split(1), p.split(1), strict=True)]
    )
    torch.testing.assert_close(whole, alone, rtol=1e-10, atol=1e-12)


def test_precision_is_that_of_the_states():
    problem = Quadratic(COUPLED)
    for name in ("R", "B", "S", "c"):
        setattr(problem, name, getattr(problem, name).float())
    z, p = draw(50, dtype=torch.float32)
    found = minimise_controls(problem, T0.float(), z, p)
    want = -torch.linalg.solve(problem.R, problem.slope(z, p).T).T
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, want, rtol=1e-4, atol=1e-4)


def differences(problem, z, p, step=1e-5):
    """Central differences of the minimiser with respect to z and p, (2, rows, k, dim)."""
    found = []
    for which in (0, 1):
        columns = []
        for i in range(z.shape[1]):
            kick = torch.zeros_like(z)
            kick[:, i] = step
            ahead, behind = (
                (z + s * kick, p) if which == 0 else (z, p + s * kick) for s in (1, -1)
            )
            with torch.no_grad():
                gap = minimise_controls(problem, T0, *ahead) - minimise_controls(
                    problem, T0, *behind
                )
            columns.append(gap / (2 * step))
        found.append(torch.stack(columns, 2))
    return torch.stack(found)


def derivatives(problem, z, p):
    z, p = (v.clone().requires_grad_(True) for v in (z, p))
    u = minimise_controls(problem, T0, z, p)
    rows = [
        torch.autograd.grad(u[:, k].sum(), (z, p), retain_graph=True) for k in range(u.shape[1])
    ]
    return torch.stack([torch.stack([row[which] for row in rows], 1) for which in (0, 1)])


@pytest.mark.parametrize("bounds", [None, (-0.5, 0.4)], ids=["free", "bounds"])
def test_derivatives_against_differences(bounds):
    class Quartic(Quadratic):
        def running_cost(self, t, z, u):
            return super().running_cost(t, z, u) + (1 + z[:, 0] ** 2) * (u**4).sum(1)

    problem = Quartic(COUPLED, bounds)
    z, p = draw(60)
    with torch.no_grad():
        u = minimise_controls(problem, T0, z, p)
    if bounds is not None:
        resting = ((u == bounds[0]) | (u == bounds[1])).sum(1)
        assert {0, 1, 2} <= set(resting.tolist())
    torch.testing.assert_close(
        derivatives(problem, z, p), differences(problem, z, p), rtol=1e-5, atol=1e-6
    )


class Learned(Scalar):
    def __init__(self):
        super().__init__(None)
        self.weight = torch.tensor(3.0, dtype=torch.float64, requires_grad=True)

    def running_cost(self, t, z, u):
        return 0.5 * self.weight * u.square().sum(1)


def test_the_derivative_reaches_parameters_of_the_problem():
    problem = Learned()
    p = torch.tensor([[2.0], [-1.0]], dtype=torch.float64, requires_grad=True)
    u = minimise_controls(problem, T0, torch.zeros_like(p), p)  # -p / weight
    u.square().sum().backward()
    assert problem.weight.grad.item() == pytest.approx(-2 * 5 / 27, rel=1e-12)
    assert p.grad[:, 0].tolist() == pytest.approx([2 * 2 / 9, 2 * -1 / 9], rel=1e-12)


def test_parameters_get_their_derivative_where_states_need_none():
    problem = Learned()
    p = torch.tensor([[2.0]], dtype=torch.float64)
    u = minimise_controls(problem, T0, torch.zeros_like(p), p)
    assert u.requires_grad
    u.sum().backward()
    assert problem.weight.grad.item() == pytest.approx(2 / 9, rel=1e-12)


def test_the_quadcopter_without_its_formula():
    class Plain(Quadcopter):
        feedback = Problem.feedback

    generator = torch.Generator().manual_seed(0)
    z, p = 2 * torch.randn(2, 64, 12, generator=generator, dtype=torch.float64)
    known, plain = Quadcopter(), Plain()
    torch.testing.assert_close(
        plain.feedback(T0, z, p), known.feedback(T0, z, p), rtol=1e-10, atol=1e-10
    )
    torch.testing.assert_close(plain.hamiltonian(T0, z, p), known.hamiltonian(T0, z, p))
    slopes = []
    for problem in (plain, known):
        states, costates = (v.clone().requires_grad_(True) for v in (z, p))
        problem.hamiltonian(T0, states, costates).sum().backward()
        slopes.append((states.grad, costates.grad))
    torch.testing.assert_close(slopes[0], slopes[1], rtol=1e-9, atol=1e-9)
