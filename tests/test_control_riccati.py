"""Open-loop solutions, and the value function to second order around them."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy.integrate import solve_ivp
from scipy.interpolate import CubicSpline
from scipy.linalg import solve_discrete_are

from pathline.control import Policy, Problem, riccati_value, transcribe
from pathline.control.problems import Hill, LinearQuadratic, Quadcopter
from pathline.control.transcription import shoot
from pathline.errors import ArgumentError, ShapeError, SolveError


class General(Problem):
    """dz = (A z + B u + a) dt + sigma dW, L = (z.Q z + 2 z.N u + u.R u) / 2 + q.z + r.u + 0.3,
    G = z.S z / 2 + g.z - 1, with everything at random."""

    dim, control_dim, horizon = 3, 2, 1.5

    def __init__(self, noisy=False, moving=False):
        self.moving = moving
        rng = np.random.default_rng(8)
        draw = lambda *shape: rng.standard_normal(shape)  # noqa: E731
        self.A, self.B, self.a = draw(3, 3), draw(3, 2), draw(3)
        self.N, self.q, self.r, self.g = 0.3 * draw(3, 2), draw(3), draw(2), draw(3)
        root_Q, root_R, root_S = draw(3, 3), draw(2, 2), draw(3, 3)
        self.R, self.S = np.eye(2) + root_R @ root_R.T, root_S @ root_S.T
        self.Q = root_Q @ root_Q.T + self.N @ np.linalg.solve(self.R, self.N.T)
        self.sigma = draw(3, 4) if noisy else np.zeros((3, 1))
        self.noise = torch.from_numpy(self.sigma) if noisy else None
        self.start = draw(3)

    def of(self, name):
        return torch.from_numpy(getattr(self, name))

    def dynamics(self, t, z, u):
        return z @ self.of("A").T + u @ self.of("B").T + self.of("a")

    def running_cost(self, t, z, u):
        squares = ((z @ self.of("Q")) * z + 2 * z * (u @ self.of("N").T)).sum(1)
        return (
            0.5 * (squares + ((u @ self.of("R")) * u).sum(1))
            + z @ self.of("q") + u @ self.of("r") + 0.3
        )  # fmt: skip

    def terminal_cost(self, z):
        return 0.5 * ((z @ self.of("S")) * z).sum(1) + z @ self.of("g") - 1

    def feedback(self, t, z, p):
        slope = p @ self.of("B") + z @ self.of("N") + self.of("r")
        return -torch.linalg.solve(self.of("R"), slope.T).T

    def reference(self, t):
        # Any path will do, and this one is not a solution.
        moving = torch.stack([t, torch.sin(2 * t), 0 * t])
        return moving if self.moving else moving.new_tensor([1.0, -2.0, 0.5])

    def by_augmentation(self, t):
        """W with Phi(t, z) = x.W x / 2 for x = (z, 1), by one matrix Riccati equation: an
        independent derivation, in which the constants are a state that rests."""
        A, B, Q, N = np.zeros((4, 4)), np.zeros((4, 2)), np.zeros((4, 4)), np.zeros((4, 2))
        A[:3, :3], A[:3, 3], B[:3], Q[:3, :3], N[:3] = self.A, self.a, self.B, self.Q, self.N
        Q[:3, 3] = Q[3, :3] = self.q
        Q[3, 3], N[3] = 0.6, self.r
        end = np.zeros((4, 4))
        end[:3, :3], end[3, 3] = self.S, -2
        end[:3, 3] = end[3, :3] = self.g

        def back(s, flat):
            W = flat.reshape(4, 4)
            K = W @ B + N
            heat = np.zeros((4, 4))
            heat[3, 3] = np.trace(self.sigma.T @ W[:3, :3] @ self.sigma)
            return (Q + A.T @ W + W @ A - K @ np.linalg.solve(self.R, K.T) + heat).ravel()

        if t == self.horizon:
            return end
        rest = (0, self.horizon - t)
        return solve_ivp(back, rest, end.ravel(), rtol=1e-11, atol=1e-11).y[:, -1].reshape(4, 4)


def derivatives(value, problem, t, z):
    noise = None if problem.noise is None else problem.noise
    return value.bind(noise=noise)(z, torch.as_tensor(t, dtype=torch.float64))


def value_at(value, z, t=0.0):
    return value.bind()(z, torch.as_tensor(t, dtype=torch.float64)).value


def hjb(value, problem, t, z):
    phi = derivatives(value, problem, t, z)
    residual = phi.dt + problem.hamiltonian(torch.tensor(t, dtype=torch.float64), z, phi.grad)
    return residual if problem.noise is None else residual + phi.laplacian / 2


# Around a moving reference the coefficients of the expansion are interpolated in time.
@pytest.mark.parametrize("moving, error", [(False, 1e-6), (True, 2e-4)], ids=["rest", "moving"])
@pytest.mark.parametrize("noisy", [False, True], ids=["still", "noisy"])
def test_a_linear_quadratic_problem_is_solved_exactly(noisy, moving, error):
    problem = General(noisy, moving)
    assert problem.check().passed, problem.check().verdict
    value = riccati_value(problem)
    z = problem.initial(20, torch.Generator().manual_seed(0))
    x = np.concatenate([z.numpy(), np.ones((20, 1))], 1)
    for t in (0.0, 0.4321, 1.0):
        W, phi = problem.by_augmentation(t), derivatives(value, problem, t, z)
        want = 0.5 * ((x @ W) * x).sum(1)
        assert phi.value.numpy() == pytest.approx(want, rel=error, abs=error)
        assert phi.grad.numpy() == pytest.approx((x @ W)[:, :3], rel=error, abs=error)
        curvature = problem.sigma.T @ W[:3, :3] @ problem.sigma if noisy else W[:3, :3]
        assert phi.laplacian.numpy() == pytest.approx(np.trace(curvature), rel=1e-6)


@pytest.mark.parametrize("noisy", [False, True], ids=["still", "noisy"])
def test_the_hjb_equation_holds(noisy):
    problem = General(noisy, moving=True)
    value = riccati_value(problem)
    z = problem.initial(20, torch.Generator().manual_seed(0))
    for t in (0.0, 0.3, 0.77, 1.2, 1.49):
        scale = derivatives(value, problem, t, z).dt.abs().mean()
        # Coefficients are linear between 400 nodes, which the moving reference feels.
        assert hjb(value, problem, t, z).abs().max() < 5e-4 * scale


def test_the_reference_does_not_matter_for_a_linear_quadratic_problem():
    problem = General()
    path = transcribe(problem, steps=30, guesses=0)
    z = problem.initial(10, torch.Generator().manual_seed(0))
    found, want = (riccati_value(problem, p) for p in (path, None))
    torch.testing.assert_close(value_at(found, z), value_at(want, z), rtol=1e-4, atol=1e-4)


def test_the_named_linear_quadratic_problem():
    problem = LinearQuadratic(3, noise=0.4)
    value = riccati_value(problem, transcribe(problem, steps=10, guesses=0))
    z = problem.initial(50, torch.Generator().manual_seed(0))
    for t in (0.0, 0.5, 0.9):
        torch.testing.assert_close(
            value_at(value, z, t), problem.exact_value(t, z), rtol=1e-5, atol=1e-5
        )


def test_time_derivatives_against_differences():
    problem = General(moving=True)
    value = riccati_value(problem)
    z, step = problem.initial(5, torch.Generator().manual_seed(0)), 1e-6
    for t in (0.2, 0.9, 1.3):
        ahead, behind = (value_at(value, z, t + s * step) for s in (1, -1))
        found = derivatives(value, problem, t, z).dt
        torch.testing.assert_close(found, (ahead - behind) / (2 * step), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("problem", [Hill, Quadcopter], ids=lambda p: p.name)
def test_no_reference_and_no_path_is_an_error(problem):
    with pytest.raises(SolveError, match=f"{problem.__name__} has no `reference`, and no path"):
        riccati_value(problem())


def test_a_hamiltonian_that_is_not_convex_is_an_error():
    class Concave(General):
        def running_cost(self, t, z, u):
            return super().running_cost(t, z, u) - 20 * u.square().sum(1)

    with pytest.raises(SolveError, match="not convex in the control"):
        riccati_value(Concave())


# Open-loop solutions


def test_the_linear_quadratic_problem_is_transcribed_to_round_off():
    problem = LinearQuadratic(2)
    path = transcribe(problem, steps=10, guesses=0)
    assert path.cost == pytest.approx(8.910891089, abs=1e-9)
    assert path.running_cost + path.terminal_cost == pytest.approx(path.cost, rel=1e-12)
    p = 300 / 101  # the control is constant, and the costate minus the control
    torch.testing.assert_close(path.controls, torch.full((10, 2), p).double(), rtol=1e-6, atol=0)
    torch.testing.assert_close(path.costates, torch.full((11, 2), -p).double(), rtol=1e-6, atol=0)


def test_held_controls_against_the_discrete_riccati_equation():
    # Linear dynamics under held controls are exact with a matrix exponential, and so is the cost
    # that Simpson's rule takes of it to fourth order: the recursion knows the optimum.
    class Cart(Problem):
        dim, control_dim, start, horizon = 2, 1, (1.0, 0.0), 2.0

        def dynamics(self, t, z, u):
            return torch.cat([z[:, 1:], u], 1)

        def running_cost(self, t, z, u):
            return z.square().sum(1) + u.square().sum(1)

        def terminal_cost(self, z):
            return z @ end * z @ torch.ones(2).double()

    steps, h = 8, 0.25
    F, Gm = np.array([[1, h], [0, 1]]), np.array([[h**2 / 2], [h]])
    # int over the step of |z|^2 with z = (z1 + z2 s + u s^2 / 2, z2 + u s)
    Q = np.array([[h, h**2 / 2], [h**2 / 2, h**3 / 3 + h]])
    N = np.array([[h**3 / 6], [h**4 / 8 + h**2 / 2]])
    R = np.array([[h**5 / 20 + h**3 / 3 + h]])
    P = solve_discrete_are(F, Gm, Q, R, s=N)
    end = torch.from_numpy(P)
    Cart.terminal_cost = lambda self, z: ((z @ end) * z).sum(1)
    path = transcribe(Cart(), steps=steps, guesses=0)
    # With the end cost of the stationary solution, the cost to go is z.P z at every step.
    assert path.cost == pytest.approx(P[0, 0], rel=1e-4)
    gain = np.linalg.solve(R + Gm.T @ P @ Gm, Gm.T @ P @ F + N.T)
    want = -(path.states[:-1].numpy() @ gain.T)
    assert path.controls.numpy() == pytest.approx(want, abs=2e-3 * np.abs(want).max())
    assert path.costates.numpy() == pytest.approx(2 * path.states.numpy() @ P, abs=1e-3)


def test_gradients_and_costates_against_differences():
    problem, steps, kick = Quadcopter(), 6, 1e-5
    generator = torch.Generator().manual_seed(0)
    u = torch.randn(steps, 4, generator=generator, dtype=torch.float64).requires_grad_(True)
    x = problem.nominal().requires_grad_(True)
    cost = lambda x, u: sum(shoot(problem, x, u)[1:])  # noqa: E731
    at_x, at_u = torch.autograd.grad(cost(x, u), (x, u))
    for found, point, of in (
        (at_x, x, lambda y: cost(y, u)),
        (at_u, u, lambda y: cost(x, y)),
    ):
        direction = torch.randn(point.shape, generator=generator, dtype=torch.float64)
        with torch.no_grad():
            gap = of(point + kick * direction) - of(point - kick * direction)
        assert (found * direction).sum().item() == pytest.approx(gap.item() / (2 * kick), rel=1e-6)
    path = transcribe(problem, steps=10, guesses=0, max_iterations=40)
    # The costate is the slope of the cost to go under the same controls, at every step.
    for n in (0, 4, 9):
        rest = Quadcopter()
        rest.horizon = problem.horizon * (10 - n) / 10
        for i in range(12):
            kicked = kick * torch.eye(12, dtype=torch.float64)[i]
            ahead, behind = (
                sum(shoot(rest, path.states[n] + s * kicked, path.controls[n:])[1:]).item()
                for s in (1, -1)
            )
            want = (ahead - behind) / (2 * kick)
            assert path.costates[n, i].item() == pytest.approx(want, rel=1e-5, abs=1e-3)
    assert torch.equal(
        path.costates[-1],
        5000
        * (
            path.states[-1]
            - problem.nominal() * 0
            - torch.tensor(problem.target, dtype=torch.float64)
        ),
    )


def test_controls_stay_within_their_bounds():
    class Limited(LinearQuadratic):
        control_bounds = ((-1.0, -9.0), (1.0, 9.0))

    path = transcribe(Limited(2), steps=10, guesses=1)
    # The first coordinate can go from -3 to -2 only: |u| = 1 all the time.
    assert torch.equal(path.controls[:, 0], torch.ones(10, dtype=torch.float64))
    torch.testing.assert_close(
        path.controls[:, 1], torch.full((10,), 300 / 101).double(), rtol=1e-6, atol=0
    )
    assert path.cost == pytest.approx(0.5 + 50 * 4 + 8.910891089 / 2, abs=1e-8)


def test_bounds_that_are_active_for_a_while():
    class Cheap(Problem):
        """f = u, L = u^2 / 2 + a (1 - t) u: u = clip(c - a (1 - t)) with -c the costate."""

        dim, control_bounds, start, a = 1, (-0.5, 0.5), (0.0,), 4.0

        def dynamics(self, t, z, u):
            return u

        def running_cost(self, t, z, u):
            return (0.5 * u**2 + self.a * (1 - t) * u).sum(1)

        def terminal_cost(self, z):
            return 2 * z.square().sum(1)

    steps = 40
    path = transcribe(Cheap(), steps=steps, guesses=0)
    middles = (np.arange(steps) + 0.5) / steps
    # c = -4 z(1), where z(1) = mean clip(c - a (1 - t)): one equation in c, by bisection.
    low, high = -5.0, 5.0
    for _ in range(60):
        c = (low + high) / 2
        end = np.clip(c - 4 * (1 - middles), -0.5, 0.5).mean()
        low, high = (c, high) if c < -4 * end else (low, c)
    want = np.clip(c - 4 * (1 - middles), -0.5, 0.5)
    assert (want == -0.5).any() and (want == 0.5).any() and (np.abs(want) < 0.5).any()
    # The mean of a linear function over a step is its value in the middle: no error in time.
    assert path.controls[:, 0].numpy() == pytest.approx(want, abs=1e-5)
    assert path.costates.numpy() == pytest.approx(4 * end, abs=1e-5)


def test_a_guess_and_a_seed():
    problem = LinearQuadratic(2)
    exact = torch.full((10, 2), 300 / 101, dtype=torch.float64)
    path = transcribe(problem, steps=10, guesses=0, controls=exact, max_iterations=1)
    assert path.cost == pytest.approx(8.910891089, abs=1e-9)
    first, second = (transcribe(Hill(), steps=10, guesses=2, seed=3) for _ in range(2))
    assert torch.equal(first.controls, second.controls) and first.cost == second.cost


def test_a_guess_of_the_problem_takes_the_place_of_the_search():
    class Guessed(LinearQuadratic):
        def guess(self, steps):
            return torch.full((steps, 2), 300 / 101)

    path = transcribe(Guessed(2), steps=10, max_iterations=1)
    assert path.cost == pytest.approx(8.910891089, abs=1e-9) and path.iterations <= 1


def test_bad_input_is_named():
    problem = LinearQuadratic(2)
    with pytest.raises(ArgumentError, match="`steps` must be at least 1, got 0"):
        transcribe(problem, steps=0)
    with pytest.raises(ShapeError, match=r"`x` must be \(2,\), got \(3,\)"):
        transcribe(problem, [1.0, 2.0, 3.0])
    with pytest.raises(ShapeError, match=r"`controls` must be \(50, 2\), got \(50, 3\)"):
        transcribe(problem, controls=torch.zeros(50, 3))
    problem.guess = lambda steps: torch.zeros(steps + 1, 2)
    with pytest.raises(
        ShapeError, match=r"`LinearQuadratic.guess` must be \(9, 2\), got \(10, 2\)"
    ):
        transcribe(problem, steps=9)


# Around an optimal path


class Pendulum(Problem):
    """Comes to rest by a torque; its costs are not quadratic either, and the Hamiltonian is convex
    along the way, so that no curvature is left out."""

    dim, control_dim, start, horizon = 2, 1, (1.0, 0.5), 1.0

    def dynamics(self, t, z, u):
        return torch.stack([z[:, 1], -z[:, 0].sin() + (1 + 0.1 * z[:, 0]) * u[:, 0]], 1)

    def running_cost(self, t, z, u):
        return 0.5 * u.square().sum(1) + 2 * z[:, 0].square() + z[:, 1].cosh()

    def terminal_cost(self, z):
        return 3 * z.square().sum(1)


STEPS = 80


@pytest.fixture(scope="module")
def swing():
    problem = Pendulum()
    path = transcribe(problem, steps=STEPS, guesses=0)
    return problem, path, riccati_value(problem, path)


def test_the_value_at_the_start_is_the_cost_of_the_path(swing):
    problem, path, value = swing
    assert value_at(value, problem.nominal()[None]).item() == pytest.approx(path.cost, rel=1e-3)


def test_the_gradient_along_the_path_is_the_costate(swing):
    problem, path, value = swing
    for n in (0, 20, 40, 60, 78):
        phi = derivatives(value, problem, path.times[n], path.states[n : n + 1])
        gap = (phi.grad[0] - path.costates[n]).norm()
        assert gap < 0.005 * path.costates[n].norm(), (n, gap)


def test_the_value_is_right_to_third_order_around_the_path(swing):
    problem, path, value = swing
    offset = value_at(value, problem.nominal()[None]).item() - path.cost  # by the steps in time
    parts = []
    for size in (0.8, 0.4):
        errors = []
        for sign in (1, -1):
            x = problem.nominal() + sign * size * torch.tensor([0.8, 0.6]).double()
            optimum = transcribe(problem, x, steps=STEPS, guesses=0).cost
            errors.append(value_at(value, x[None]).item() - optimum - offset)
        parts.append([errors[0] - errors[1], errors[0] + errors[1]])
    odd, even = np.log2(np.abs(np.divide(*parts)))
    assert odd == pytest.approx(3, abs=0.3) and even == pytest.approx(4, abs=0.5)


@pytest.mark.slow
def test_the_quadratic_value_of_the_quadcopter():
    problem = Quadcopter()
    path = transcribe(problem, guesses=0)
    assert path.cost == pytest.approx(2182.7, rel=2e-3)
    value = riccati_value(problem, path)
    assert value_at(value, problem.nominal()[None]).item() == pytest.approx(path.cost, rel=5e-3)
    for n in (0, 10, 25, 40):
        phi = derivatives(value, problem, path.times[n], path.states[n : n + 1])
        gap = (phi.grad[0] - path.costates[n]).norm()
        assert gap < 0.01 * path.costates[n].norm(), (n, gap)
    policy = Policy(problem, 4, nodes=value.nodes).double()
    for part in policy.potential.potential.parameters():
        part.data.zero_()
    policy.potential.base.load_state_dict(value.state_dict())
    # Gains of 2500 at the end ask for short steps.
    assert policy.simulate(steps=400).cost.item() == pytest.approx(path.cost, rel=2e-3)


@pytest.mark.parametrize("follow", [False, True])
def test_noise_counts_in_the_value_around_a_path(follow):
    problem = LinearQuadratic(2, noise=0.4)
    path = transcribe(problem, steps=40, guesses=0)
    value = value_at(riccati_value(problem, path, follow=follow), problem.nominal()[None])
    assert value.item() == pytest.approx(9.6493, rel=2e-3)


@pytest.mark.parametrize("problem", [General(), Quadcopter()])
def test_a_feedback_that_follows_takes_any_path(problem):
    """Along a path with controls that are not optimal, the feedback gives just these, and the value
    is what the path still costs."""
    found = transcribe(problem, steps=20, guesses=0)
    waves = torch.sin(torch.linspace(0, 3, 20, dtype=torch.float64))[:, None]
    u = found.controls + waves
    states, running, terminal = shoot(problem, problem.nominal(), u)
    path = replace(found, controls=u, states=torch.cat(states))
    quadratic = riccati_value(problem, path, follow=True)
    cost = (running + terminal).item()
    assert value_at(quadratic, states[0]).item() == pytest.approx(cost, rel=0.01)
    value = quadratic.bind()
    middles = (path.times[1:] + path.times[:-1]) / 2
    spline = CubicSpline(path.times.numpy(), path.states.numpy())
    for n in range(1, 18):  # between middles, where the controls have kinks
        t, wanted = (middles[n] + middles[n + 1]) / 2, (u[n] + u[n + 1]) / 2
        z = torch.from_numpy(spline(t.item()))[None]
        p = value(z, t, value=False, dt=False, laplacian=False).grad
        assert torch.allclose(problem.feedback(t, z, p)[0], wanted, rtol=1e-3, atol=0.01)
