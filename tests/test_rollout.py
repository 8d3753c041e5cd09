"""Particles under the feedback of a potential, where the answer is known."""

import pytest
import torch
from torch import nn

from pathline import native
from pathline.control import Adjoint, Problem, rollout
from pathline.errors import ArgumentError, ShapeError
from pathline.flows import Transport
from pathline.nets import AutodiffPotential
from plain import PlainPotential, random_potential

DIM = 3


@pytest.fixture
def potential():
    return random_potential(DIM, 8, scale=1.5)


@pytest.fixture
def x():
    return torch.randn(20, DIM, dtype=torch.float64)


def brute_log_det(potential, x, steps):
    """log |det| of the Jacobian of the very map that `rollout` computes, column by column."""

    x = x.clone().requires_grad_()
    z = rollout(Transport(DIM), potential, x, steps=steps, integrals=False).z
    rows = [torch.autograd.grad(z[:, k].sum(), x, retain_graph=True)[0] for k in range(DIM)]
    return torch.linalg.slogdet(torch.stack(rows, 1)).logabsdet


def rms(error):
    return error.square().mean().sqrt().item()


def test_log_det_converges_at_order_four(potential, x):
    with torch.no_grad():
        found = {n: rollout(Transport(DIM), potential, x, steps=n) for n in (8, 16, 32)}
    exact = brute_log_det(potential, x, 512)
    assert exact.abs().mean() > 0.3
    errors = [rms(found[n].log_det - exact) for n in (8, 16, 32)]
    same_map = [rms(found[n].log_det - brute_log_det(potential, x, n)) for n in (8, 16, 32)]
    for coarse, fine in zip(errors[:-1] + same_map[:-1], errors[1:] + same_map[1:], strict=True):
        assert 12 < coarse / fine < 24
    assert errors[-1] < 1e-4


@pytest.mark.parametrize("name", ["running_cost", "hjb", "z"])
def test_integrals_converge_at_order_four(x, name):
    # b_t keeps the residual's sign, so that its absolute value does not kink.
    potential = random_potential(DIM, 8)
    with torch.no_grad():
        potential.b[DIM] += 40
        fine = getattr(rollout(Transport(DIM), potential, x, steps=512), name)
        errors = [
            rms(getattr(rollout(Transport(DIM), potential, x, steps=n), name) - fine)
            for n in (8, 16, 32)
        ]
    assert 12 < errors[0] / errors[1] < 24
    assert 12 < errors[1] / errors[2] < 24


def test_integrals_are_the_integrands_of_their_definition(potential, x):
    """A Riemann sum over the trajectory, with derivatives from the definition of Phi."""
    steps = 400
    with torch.no_grad():
        path = rollout(Transport(DIM), potential, x[:4], steps=steps, trajectory=True)
    plain, totals = PlainPotential(potential), torch.zeros(3, 4, dtype=torch.float64)
    for n, z in enumerate(path.trajectory):
        weight = (0.5 if n in (0, steps) else 1.0) / steps
        t = torch.tensor(n / steps, dtype=torch.float64)
        _, grad, dt, laplacian = plain.derivatives(z, t)
        L = 0.5 * grad.square().sum(1)
        totals += weight * torch.stack([L, -laplacian, (dt - L).abs()]).detach()
    for got, want in zip((path.running_cost, path.log_det, path.hjb), totals, strict=True):
        torch.testing.assert_close(got, want, rtol=2e-4, atol=2e-4)


def test_quadratic_potential(x):
    """Phi = 1/2 sum lambda_k x_k^2: z_k(1) = exp(-lambda_k) x_k, log det = -sum lambda_k."""
    potential = random_potential(DIM, 4)
    rates = torch.tensor([0.2, 1.0, 0.6], dtype=torch.float64)
    with torch.no_grad():
        for parameter in (potential.w, potential.A, potential.b):
            parameter.zero_()
        potential.A[:DIM, :DIM] = torch.diag(rates.sqrt())
        got = rollout(Transport(DIM), potential, x, steps=64)
    torch.testing.assert_close(got.z, torch.exp(-rates) * x, rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(got.log_det, -rates.sum().expand(20), rtol=1e-13, atol=0)
    cost = (0.25 * rates * (1 - torch.exp(-2 * rates)) * x**2).sum(1)  # int lambda^2 z^2 / 2
    torch.testing.assert_close(got.running_cost, cost, rtol=1e-7, atol=1e-8)
    torch.testing.assert_close(got.hjb, cost, rtol=1e-7, atol=1e-8)  # d_t Phi = 0


def test_linear_potential(x):
    """Phi = b.s + c: straight lines at -b, cost |b|^2 / 2, residual |b_t - |b|^2 / 2|."""
    potential = random_potential(DIM, 4)
    with torch.no_grad():
        potential.w.zero_(), potential.A.zero_()
        potential.b.copy_(torch.tensor([1.0, -2.0, 0.5, 0.7]))
        got = rollout(Transport(DIM), potential, x, steps=3, trajectory=True)
    b = potential.b[:DIM].detach()
    torch.testing.assert_close(got.z, x - b, rtol=1e-14, atol=1e-14)
    torch.testing.assert_close(got.trajectory[1], x - b / 3, rtol=1e-14, atol=1e-14)
    torch.testing.assert_close(got.running_cost, (0.5 * b @ b).expand(20))
    torch.testing.assert_close(got.log_det, torch.zeros(20, dtype=torch.float64))
    torch.testing.assert_close(got.hjb, (0.7 - 0.5 * b @ b).abs().expand(20))


class Focus(nn.Module):
    """Phi = sign |x|^2 / (2 (c - t)); with sign +1 it solves the HJB equation exactly."""

    def __init__(self, c, sign):
        super().__init__()
        self.c, self.sign = c, sign

    def forward(self, x, t, context=None):
        return self.sign * x.square().sum(1) / (2 * (self.c - t))


def test_exact_solution_of_the_hjb_equation(x):
    c = 3.0
    got = rollout(Transport(DIM), AutodiffPotential(Focus(c, 1), DIM), x, steps=32)
    assert got.hjb.max() < 1e-12
    torch.testing.assert_close(got.z, x * (c - 1) / c, rtol=1e-7, atol=1e-7)
    log_det = DIM * torch.tensor((c - 1) / c, dtype=torch.float64).log()
    torch.testing.assert_close(got.log_det, log_det.expand(20), rtol=1e-7, atol=0)
    cost = x.square().sum(1) / (2 * c**2)  # the speed of each particle is constant
    torch.testing.assert_close(got.running_cost, cost, rtol=1e-7, atol=0)


def test_wrong_sign_of_the_hjb_equation(x):
    """The negative leaves |z|^2 / (c - t)^2, with z = x c / (c - t) along the way."""
    c = 3.0
    got = rollout(Transport(DIM), AutodiffPotential(Focus(c, -1), DIM), x, steps=64)
    residual = x.square().sum(1) * c**2 / 3 * ((c - 1) ** -3 - c**-3)
    torch.testing.assert_close(got.hjb, residual, rtol=1e-6, atol=0)
    torch.testing.assert_close(got.z, x * c / (c - 1), rtol=1e-7, atol=0)


def test_round_trip(potential, x):
    """RK4 there and back: its leading error is even in the step and cancels, so order five."""
    errors = []
    for n in (8, 16, 32):
        with torch.no_grad():
            there = rollout(Transport(DIM), potential, x, steps=n)
            back = rollout(Transport(DIM), potential, there.z, steps=n, start=1.0, stop=0.0)
        errors.append(rms(back.z - x))
    assert errors[0] / errors[1] > 14
    assert errors[1] / errors[2] > 14
    assert errors[2] < 1e-5


def test_backward_integrals_are_the_negative(x):
    potential = random_potential(DIM, 8)
    with torch.no_grad():
        there = rollout(Transport(DIM), potential, x, steps=64)
        back = rollout(Transport(DIM), potential, there.z, steps=64, start=1.0, stop=0.0)
    for name in ("log_det", "running_cost"):
        assert getattr(there, name).abs().mean() > 0.05
        torch.testing.assert_close(getattr(back, name), -getattr(there, name), rtol=1e-5, atol=1e-6)


class PlainTransport(Transport):
    divergence = Problem.divergence


def test_divergence_by_differentiation_agrees(x):
    potential = random_potential(DIM, 8, depth=3)
    for grad in (True, False):
        with torch.set_grad_enabled(grad):
            got, want = (
                rollout(problem, potential, x, steps=4)
                for problem in (PlainTransport(DIM), Transport(DIM))
            )
        torch.testing.assert_close(got.log_det, want.log_det, rtol=1e-11, atol=1e-11)


def test_gradient_of_divergence_by_differentiation(x):
    """What a user's problem, which has no closed form, trains with."""
    potential = random_potential(DIM, 8)
    gradients = [
        torch.autograd.grad(
            rollout(problem, potential, x, steps=2).log_det.sum(), potential.layers[0].weight
        )[0]
        for problem in (PlainTransport(DIM), Transport(DIM))
    ]
    torch.testing.assert_close(*gradients, rtol=1e-9, atol=1e-9)


def test_hamiltonian():
    t, z, p = torch.zeros(()), torch.randn(5, DIM), torch.randn(5, DIM)
    torch.testing.assert_close(Transport(DIM).hamiltonian(t, z, p), -0.5 * p.square().sum(1))


def test_gradients_with_context():
    potential = random_potential(2, 4, context_dim=2)
    x, context = torch.randn(3, 2).double(), torch.randn(3, 2).double()

    def function(x, context):
        got = rollout(Transport(2), potential, x, steps=2, context=context)
        return got.z, got.log_det, got.running_cost, got.hjb

    assert torch.autograd.gradcheck(function, (x.requires_grad_(), context.requires_grad_()))


def test_without_integrals(potential, x):
    full = rollout(Transport(DIM), potential, x, steps=4, trajectory=True)
    quick = rollout(Transport(DIM), potential, x, steps=4, integrals=False)
    torch.testing.assert_close(quick.z, full.z, rtol=1e-14, atol=1e-14)
    assert quick.log_det is quick.hjb is quick.running_cost is quick.trajectory is None
    assert full.trajectory.shape == (5, 20, DIM)
    assert torch.equal(full.trajectory[-1], full.z)


def test_horizon(x):
    class Longer(Transport):
        horizon = 2.5

    potential = random_potential(DIM, 4)
    with torch.no_grad():
        potential.w.zero_(), potential.A.zero_()
    got = rollout(Longer(DIM), potential, x, steps=2)
    torch.testing.assert_close(got.z, x - 2.5 * potential.b[:DIM])


@pytest.mark.parametrize("name", ["dynamics", "running_cost", "terminal_cost"])
def test_unfinished_problem_says_what_is_missing(name):
    arguments = [torch.zeros(2, 1)] if name == "terminal_cost" else [torch.zeros(2, 1)] * 3
    with pytest.raises(NotImplementedError, match=f"Problem must define `{name}"):
        getattr(Problem(), name)(*arguments)


def mean_gradients(potential, x, *, known, steps=3, factor=1.0, weights=None, **kwargs):
    """Gradients of the loss with which a flow trains, through PyTorch."""
    problem, weights = Transport(DIM), torch.ones(len(x)).double() if weights is None else weights
    share = weights / len(x)
    adjoint = Adjoint(share, 0.3 * share, -share, 0.2 * share) if known else None
    with native.using(None):
        path = rollout(problem, potential, x, steps=steps, adjoint=adjoint, **kwargs)
        costs = problem.terminal_cost(path.z) - path.log_det
        costs = costs + 0.3 * path.running_cost + 0.2 * path.hjb
        wanted = [p for name, p in potential.named_parameters() if name != "c"]
        return torch.autograd.grad(factor * (weights * costs).mean(), [x, *wanted])


@pytest.mark.parametrize("kwargs", [{}, {"factor": 3.0}, {"start": 1.0, "stop": 0.2}], ids=str)
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("width", [2, 8])  # fewer neurons than columns, and more
@pytest.mark.parametrize("depth", [1, 2, 3])
def test_known_adjoint_of_the_log_determinant(x, depth, width, weighted, kwargs):
    potential = random_potential(DIM, width, depth)
    weights = torch.rand(len(x)).double() if weighted else None
    x.requires_grad_()
    got, want = (
        mean_gradients(potential, x, known=known, weights=weights, **kwargs)
        for known in (True, False)
    )
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def test_wrong_adjoint_of_the_log_determinant_raises(potential, x):
    wrong = torch.linspace(1, 2, len(x), dtype=torch.float64)
    with native.using(None):
        path = rollout(Transport(DIM), potential, x, steps=2, adjoint=Adjoint(*[wrong] * 4))
        with pytest.raises(ArgumentError, match=r"`adjoint` of a rollout\) must be the gradient"):
            path.log_det.mean().backward()
        with pytest.raises(ShapeError, match=r"`laplacian_adjoint` must be \(20,\), got \(1,\)"):
            rollout(Transport(DIM), potential, x, steps=2, adjoint=Adjoint(*[wrong[:1]] * 4))


def test_log_determinant_that_is_not_used(potential, x):
    """The rest of the loss has its own gradient, whatever was said of the log-determinant."""
    known = Adjoint(*[torch.ones(len(x), dtype=torch.float64)] * 4)
    parameters = list(potential.layers.parameters())
    with native.using(None):
        got, want = (
            torch.autograd.grad(
                rollout(Transport(DIM), potential, x, steps=2, adjoint=adjoint).hjb.sum(),
                parameters,
            )
            for adjoint in (known, None)
        )
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def test_probe_of_a_solve_is_the_same_at_all_times(x):
    """The mean over all sign vectors is the exact log-determinant, and so are the gradients."""
    potential = random_potential(DIM, 8)
    signs = torch.cartesian_prod(*[torch.tensor([-1.0, 1.0], dtype=torch.float64)] * DIM)
    exact = rollout(Transport(DIM), potential, x, steps=3)
    paths = [rollout(Transport(DIM), potential, x, steps=3, probe=e.expand_as(x)) for e in signs]
    assert all(torch.equal(path.z, exact.z) for path in paths)
    mean = torch.stack([path.log_det for path in paths]).mean(0)
    torch.testing.assert_close(mean, exact.log_det, rtol=1e-12, atol=1e-12)
    assert (paths[0].log_det - exact.log_det).abs().max() > 1e-3
    parameters = list(potential.layers.parameters())
    grads = [torch.autograd.grad(q.square().sum(), parameters) for q in (mean, exact.log_det)]
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-11)
    with native.using(None), pytest.raises(ShapeError, match=r"`probe` must be \(20, 3\), got"):
        rollout(Transport(DIM), potential, x, steps=3, probe=signs[0])
