"""Adams methods and the solvers of SciPy against closed forms and published coefficients."""

import math
from dataclasses import replace
from fractions import Fraction
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from pathline.errors import ArgumentError, SolveError, SolveWarning
from pathline.integrate.checkpoint import Checkpoint
from pathline.integrate.field import Field, Layout
from pathline.integrate.fixed import FixedMarch
from pathline.integrate.grid import Grid
from pathline.integrate.multistep import (
    Adams,
    adams_weights,
    lagrange_integrals,
)
from pathline.integrate.scipy_solver import COMPLEX, SOLVERS, solve_scipy

F64, C128 = torch.float64, torch.complex128
EXPLICIT_ADAMS, IMPLICIT_ADAMS = Adams(implicit=False), Adams(implicit=True)
both = pytest.mark.parametrize("method", (EXPLICIT_ADAMS, IMPLICIT_ADAMS), ids=lambda m: m.name)


def field(velocity, z0):
    return Field(velocity, Layout(z0))


def solve(method, velocity, z0, nodes, recorder=None):
    """z at the last of `nodes`, and the number of evaluations of each step."""
    zs, counts = path(method, velocity, z0, nodes, recorder)
    return zs[-1], counts


def path(method, velocity, z0, nodes, recorder=None):
    """z at all `nodes`, and the number of evaluations of each step."""
    grid = Grid(nodes, method.offsets, z0)
    march = FixedMarch(method, field(velocity, z0), grid, [[1.0]] * len(grid))
    state, zs, counts = march.begin(z0), [z0], []
    for n in range(len(grid)):
        before = march.field.evaluations
        step = partial(march.step, n)
        state, outs = recorder.call(step, state) if recorder else step(state)
        counts.append(march.field.evaluations - before)
        assert outs[0][0] is state.z
        zs.append(state.z)
    return zs, counts


# Problems with a closed form: velocity, and the solution at `t` that passes z0 at time 0.


def driven(t, z):
    """Solved by z = 1 / (1 / z0 + sin t)."""
    return -z * z * torch.cos(t)


def driven_exact(t, z0):
    return 1 / (1 / z0 + torch.sin(t))


def cycle(t, z):
    """In the complex plane: rotation, and a radius drawn to 1."""
    return z * (1 - z.abs().square()) / 4 + 2j * z


def cycle_exact(t, z0):
    radius = (1 + (1 / z0.abs().square() - 1) * torch.exp(-t / 2)) ** -0.5
    return z0 / z0.abs() * radius * torch.exp(2j * t)


PROBLEMS = {
    "driven": (driven, driven_exact, torch.tensor([0.7, 0.4], dtype=F64)),
    "cycle": (cycle, cycle_exact, torch.tensor([0.5 + 0.1j, 0.7j], dtype=C128)),
}


def equal(n):
    return torch.linspace(0, 1, n + 1, dtype=F64)


def graded(n):
    """Each step longer than the one before, by the same factor."""
    return torch.expm1(1.2 * equal(n)) / math.expm1(1.2)


# Coefficients


TABLES = {  # Hairer, Norsett, Wanner I, section III.1, equations (1.5) and (1.9)
    (0, -1): "3/2 -1/2",
    (0, -1, -2): "23/12 -16/12 5/12",
    (0, -1, -2, -3): "55/24 -59/24 37/24 -9/24",
    (0, -1, -2, -3, -4): "1901/720 -2774/720 2616/720 -1274/720 251/720",
    (1, 0): "1/2 1/2",
    (1, 0, -1): "5/12 8/12 -1/12",
    (1, 0, -1, -2): "9/24 19/24 -5/24 1/24",
    (1, 0, -1, -2, -3): "251/720 646/720 -264/720 106/720 -19/720",
}


@pytest.mark.parametrize("nodes", TABLES, ids=str)
def test_weights_of_equal_steps(nodes):
    want = [float(Fraction(weight)) for weight in TABLES[nodes].split()]
    assert adams_weights(tuple(map(float, nodes))) == pytest.approx(want, abs=1e-14)


@given(st.lists(st.floats(0.2, 3.0), min_size=0, max_size=7), st.booleans(), st.floats(0.1, 2.0))
@settings(max_examples=60, deadline=None)
def test_weights_integrate_polynomials(steps, implicit, dt):
    lags = [-sum(steps[:n]) for n in range(len(steps) + 1)]
    nodes = torch.tensor([dt, *lags] if implicit else lags, dtype=F64)
    weights = lagrange_integrals(nodes, torch.tensor(dt, dtype=F64))
    for power in range(len(nodes)):
        terms = weights * nodes**power
        want = dt ** (power + 1) / (power + 1)
        assert terms.sum().item() == pytest.approx(want, abs=1e-11 * terms.abs().sum().item())


# Order


def converged(implicit, order):
    """The method with its corrector iterated as far as double precision allows."""
    return Adams(implicit, max_order=order, max_iters=20, rtol=1e-14, atol=1e-14)


def errors(method, problem, stop, grids):
    """The root mean square over the nodes; at one of them an error may pass through zero."""
    velocity, exact, z0 = PROBLEMS[problem]
    found = []
    for grid in grids:
        zs, _ = path(method, velocity, z0, stop * grid)
        error = torch.stack(zs) - exact(stop * grid[:, None], z0)
        found.append(error.abs().square().mean().sqrt().item())
    return found


kinds = pytest.mark.parametrize("implicit", (False, True), ids=("explicit", "implicit"))


@kinds
@pytest.mark.parametrize("stop", (3.0, -2.0))
@pytest.mark.parametrize("shape", (equal, graded))
@pytest.mark.parametrize("problem, orders", (("driven", 4), ("cycle", 6)))
def test_order(problem, orders, shape, stop, implicit):
    for order in range(1, orders + 1):
        steps = 120 if order < 5 else 90
        method = converged(implicit, order)
        coarse, fine = errors(method, problem, stop, (shape(steps), shape(2 * steps)))
        assert math.log2(coarse / fine) == pytest.approx(order, abs=0.15), order
        assert method.order == order


@kinds
@pytest.mark.parametrize("order", (8, 9))
def test_high_order(order, implicit):
    grids = equal(50), equal(100)
    coarse, fine = errors(converged(implicit, order), "driven", -2.0, grids)
    assert math.log2(coarse / fine) == pytest.approx(order, abs=0.15)


def test_highest_order():
    """The start by dopri8 promises no more than order nine."""
    method = converged(True, 12)
    coarse, fine = errors(method, "driven", -2.0, (equal(40), equal(80)))
    assert method.order == 9 < math.log2(coarse / fine)


# Evaluations, the corrector, and what can't be


def test_evaluations():
    velocity, _, z0 = PROBLEMS["driven"]
    loose = replace(IMPLICIT_ADAMS, rtol=1.0)
    for order, first in ((1, 0), (2, 1), (4, 3), (5, 4)):
        starter = 4 if order <= 4 else 14
        for method, each in ((EXPLICIT_ADAMS, 1), (loose, 2)):
            _, counts = solve(replace(method, max_order=order), velocity, z0, equal(8))
            assert counts == [starter] * first + [each] * (8 - first)


def test_corrector_solves_its_equation():
    """The step is that of the trapezoidal rule, an equation that is solved by hand for -z^2."""
    method = replace(IMPLICIT_ADAMS, max_order=2, max_iters=50, rtol=0.0, atol=1e-15)
    z0 = torch.tensor([1.0, 0.5], dtype=F64)
    z, counts = solve(method, lambda t, z: -z * z, z0, torch.tensor([0.0, 0.1, 0.3], dtype=F64))
    z1 = solve(method, lambda t, z: -z * z, z0, torch.tensor([0.0, 0.1], dtype=F64))[0]
    assert_close(z, (torch.sqrt(1 + 0.4 * (z1 - 0.1 * z1**2)) - 1) / 0.2, rtol=1e-14, atol=0)
    assert 5 < counts[1] < 50


def test_corrector_warns():
    velocity = field(lambda t, z: -8.0 * z, torch.ones(1, dtype=F64))
    method = replace(IMPLICIT_ADAMS, max_order=1)
    ts = torch.tensor([0.0, 0.2], dtype=F64).unbind()
    with pytest.warns(SolveWarning, match="did not converge within max_iters = 4 iterations"):
        method.step(velocity, ts, 0.2, torch.ones(1, dtype=F64), ())
    assert velocity.evaluations == 5
    per_element = torch.tensor([10.0], dtype=F64)
    replace(method, atol=per_element).step(velocity, ts, 0.2, torch.ones(1, dtype=F64), ())
    assert velocity.evaluations == 7


def test_refuses():
    for order in (0, 13):
        with pytest.raises(ArgumentError, match=f"`max_order` must be 1 to 12, got {order}"):
            Adams(implicit=False, max_order=order)
    with pytest.raises(ArgumentError, match="`max_iters` must be at least 1"):
        Adams(implicit=True, max_iters=0)


@both
@pytest.mark.parametrize("dtype", (torch.float32, F64, torch.complex64))
@pytest.mark.parametrize("shape", ((), (3,), (2, 0), (2, 3)))
def test_keeps(method, dtype, shape):
    for nodes in (equal(6), equal(6).requires_grad_()):
        method = replace(method, rtol=1e-5)
        z, _ = solve(method, lambda t, z: -t * z, torch.ones(shape, dtype=dtype), nodes)
        assert (z.dtype, z.shape) == (dtype, shape)
        assert_close(z, torch.full(shape, math.exp(-0.5), dtype=dtype), rtol=1e-3, atol=0)


# Gradients and times that are tensors


def mixing(w):
    return lambda t, z: torch.tanh(z @ w) * (1 + t)


@both
@pytest.mark.parametrize("order", (1, 2, 4, 5))
def test_gradients(method, order):
    """By z0, a parameter, and the times of the steps, with a fixed and a varying iteration."""
    w = torch.randn(2, 2, dtype=F64)
    z0 = torch.randn(3, 2, dtype=F64)
    for rtol, max_iters in ((1.0, 1), (1e-13, 30)) if method.implicit else ((0.0, 1),):
        some = replace(method, max_order=order, rtol=rtol, atol=rtol, max_iters=max_iters)
        inputs = [x.requires_grad_() for x in (z0, w, graded(6))]
        assert torch.autograd.gradcheck(
            lambda z0, w, nodes, some=some: solve(some, mixing(w), z0, nodes)[0], inputs
        )


@both
def test_times_as_tensors_change_nothing(method):
    velocity, _, z0 = PROBLEMS["cycle"]
    for order in (1, 4, 6):
        some = converged(method.implicit, order)
        as_floats, _ = solve(some, velocity, z0, graded(20))
        as_tensors, _ = solve(some, velocity, z0, graded(20).requires_grad_())
        assert_close(as_floats, as_tensors.detach(), rtol=1e-13, atol=0)


@both
def test_steps_of_each_sample(method):
    w = torch.randn(2, 2, dtype=F64)
    z0 = torch.randn(3, 2, dtype=F64)
    nodes = torch.stack([graded(9), 0.5 - 2.0 * equal(9), equal(9) ** 2], dim=1)
    method = converged(method.implicit, 4)
    z, _ = solve(method, mixing(w), z0, nodes.requires_grad_())
    alone = [solve(method, mixing(w), z0[n : n + 1], nodes[:, n])[0] for n in range(3)]
    assert_close(z, torch.cat(alone), rtol=1e-12, atol=1e-13)
    grad, *_ = torch.autograd.grad(z.square().sum(), nodes)
    grad_alone, *_ = torch.autograd.grad(torch.cat(alone).square().sum(), nodes)
    assert_close(grad, grad_alone, rtol=1e-9, atol=1e-11)


@both
@pytest.mark.parametrize("learned_times", (False, True))
def test_recomputed_steps_are_the_same(method, learned_times):
    w = torch.randn(2, 2, dtype=F64, requires_grad=True)
    z0 = torch.randn(3, 2, dtype=F64, requires_grad=True)
    nodes = graded(12).requires_grad_(learned_times)
    method = replace(method, max_iters=10)
    inputs = [w, z0, nodes][: 2 + learned_times]
    want = torch.autograd.grad(solve(method, mixing(w), z0, nodes)[0].square().sum(), inputs)
    with Checkpoint(steps=12, slots=3, device=z0.device) as recorder:
        z, _ = solve(method, mixing(w), z0, nodes, recorder)
    for got, grad in zip(torch.autograd.grad(z.square().sum(), inputs), want, strict=True):
        assert torch.equal(got, grad)


# SciPy

solvers = pytest.mark.parametrize("solver", SOLVERS)


@solvers
@pytest.mark.parametrize("times", ([0.0, 0.4, 3.0], [0.0, -0.7, -2.0], [0.0, 1.0]))
def test_scipy(solver, times):
    velocity, exact, z0 = PROBLEMS["driven"]
    z0 = z0.view(2, 1)
    ts = torch.tensor(times, dtype=F64)
    zs = solve_scipy(field(velocity, z0), z0, ts, rtol=1e-8, atol=1e-10, solver=solver)
    assert torch.equal(zs[0], z0)
    assert_close(zs, exact(ts.view(-1, 1, 1), z0), rtol=3e-6, atol=0)


@pytest.mark.parametrize("solver", COMPLEX)
@pytest.mark.parametrize("stop", (2.0, -1.0))
def test_scipy_complex(solver, stop):
    velocity, exact, z0 = PROBLEMS["cycle"]
    ts = torch.tensor([0.0, stop], dtype=F64)
    zs = solve_scipy(field(velocity, z0), z0, ts, rtol=1e-8, atol=1e-10, solver=solver)
    assert_close(zs[-1], exact(ts[-1], z0), rtol=1e-5, atol=0)
    low = solve_scipy(
        *(field(velocity, z0.to(torch.complex64)), z0.to(torch.complex64), ts),
        **dict(rtol=1e-4, atol=1e-6, solver=solver),
    )
    assert low.dtype == torch.complex64
    assert_close(low[-1], exact(ts[-1], z0).to(low.dtype), rtol=1e-2, atol=0)


@solvers
def test_scipy_evaluates_in_the_dtype_of_the_state(solver):
    velocity, exact, z0 = PROBLEMS["driven"]
    seen = set()

    def watched(t, z):
        seen.add((t.dtype, t.shape, z.dtype, z.shape))
        return velocity(t, z)

    z0 = z0.float()
    ts = torch.tensor([0.0, 1.0])
    zs = solve_scipy(field(watched, z0), z0, ts, rtol=1e-4, atol=1e-6, solver=solver)
    assert seen == {(torch.float32, (), torch.float32, (2,))}
    assert_close(zs, exact(ts[:, None], z0), rtol=3e-3, atol=0)


@pytest.mark.parametrize("solver", ("Radau", "BDF", "LSODA"))
def test_scipy_stiff(solver):
    """Prothero and Robinson's problem: the solution cos t, and a transient of rate 10^5."""
    z0 = torch.ones(1, dtype=F64)
    velocity = field(lambda t, z: -1e5 * (z - torch.cos(t)) - torch.sin(t), z0)
    ts = torch.tensor([0.0, 3.0], dtype=F64)
    zs = solve_scipy(velocity, z0, ts, rtol=1e-6, atol=1e-8, solver=solver)
    assert_close(zs[-1], torch.cos(ts[-1:]), rtol=1e-5, atol=0)
    assert velocity.evaluations < 2000


@solvers
def test_scipy_tolerances_of_each_element(solver):
    """Tight where the state turns, loose where it does not."""
    z0 = torch.tensor([[1.0, 0.0, 5.0]], dtype=F64)

    def velocity(t, z):
        return torch.stack([-z[:, 1], z[:, 0], 0.0 * z[:, 2]], 1)

    ts = torch.tensor([0.0, 2.0], dtype=F64)
    rtol = torch.tensor([1e-8, 1e-8, 1e-1], dtype=F64)
    atol = torch.tensor([[1e-10, 1e-10, 1e3]], dtype=F64)
    zs = solve_scipy(field(velocity, z0), z0, ts, rtol=rtol, atol=atol, solver=solver)
    want = torch.tensor([[math.cos(2.0), math.sin(2.0), 5.0]], dtype=F64)
    assert_close(zs[-1], want, rtol=1e-6, atol=0)
    one = torch.tensor(1e-8, dtype=F64)
    again = solve_scipy(field(velocity, z0), z0, ts, rtol=one, atol=one, solver=solver)
    assert_close(again[-1], want, rtol=1e-5, atol=0)


def test_scipy_without_steps():
    velocity, _, z0 = PROBLEMS["driven"]
    for start in (z0, z0[:0], torch.tensor(0.5, dtype=F64)):
        for times in ([0.3], [0.3, 0.5]):
            ts = torch.tensor(times, dtype=F64)
            zs = solve_scipy(field(velocity, start), start, ts, rtol=1e-6, atol=1e-6)
            assert zs.shape == (len(times), *start.shape)
            assert torch.equal(zs[0], start)
            assert zs.data_ptr() != start.data_ptr() or not start.numel()


def test_scipy_limits_of_steps():
    velocity, _, z0 = PROBLEMS["driven"]
    ts = torch.tensor([0.0, 1.0], dtype=F64)
    few, many = field(velocity, z0), field(velocity, z0)
    solve_scipy(few, z0, ts, rtol=1e-3, atol=1e-3, min_step=1e-3)
    solve_scipy(many, z0, ts, rtol=1e-3, atol=1e-3, max_step=0.01)
    assert few.evaluations < 50 < 100 <= many.evaluations


def test_scipy_refuses():
    velocity, _, z0 = PROBLEMS["driven"]
    ts = torch.tensor([0.0, 1.0], dtype=F64)
    solve_some = partial(solve_scipy, field(velocity, z0), t=ts, rtol=1e-6, atol=1e-6)
    with pytest.raises(ArgumentError, match="unknown solver 'RK54'; did you mean 'RK45'"):
        solve_some(z0, solver="RK54")
    for solver in ("LSODA", "Radau"):
        with pytest.raises(ArgumentError, match=f"'{solver}' can't .* RK45, RK23, DOP853, BDF"):
            solve_some(z0.to(C128), solver=solver)
    with pytest.raises(ArgumentError, match="`min_step` is an option of 'LSODA' only"):
        solve_some(z0, solver="BDF", min_step=0.1)


@solvers
def test_scipy_says_how_far_it_came(solver):
    """z = 1 / (1 - t) ends at t = 1."""
    z0 = torch.ones(2, dtype=F64)
    ts = torch.tensor([0.0, 0.5, 2.0], dtype=F64)
    with pytest.raises(SolveError, match=rf"{solver} failed at t = (1|0\.9999\d*|1\.0000\d*): "):
        solve_scipy(field(lambda t, z: z * z, z0), z0, ts, rtol=1e-6, atol=1e-6, solver=solver)


@solvers
@pytest.mark.parametrize("jump", (-1.0, 0.5))
def test_scipy_notices_what_is_not_finite(solver, jump):
    z0 = torch.ones(2, dtype=F64)
    ts = torch.tensor([0.0, 2.0], dtype=F64)
    velocity = field(lambda t, z: torch.where(t > jump, torch.nan, -z), z0)
    with pytest.raises(SolveError, match=f"{solver} failed at t = "):
        solve_scipy(velocity, z0, ts, rtol=1e-6, atol=1e-6, solver=solver)


@solvers
def test_scipy_passes_errors_on(solver):
    z0 = torch.ones(2, dtype=F64)
    ts = torch.tensor([0.0, 2.0], dtype=F64)

    def velocity(t, z):
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        solve_scipy(field(velocity, z0), z0, ts, rtol=1e-6, atol=1e-6, solver=solver)


def test_scipy_gives_no_gradient():
    velocity, _, z0 = PROBLEMS["driven"]
    z0 = z0.clone().requires_grad_()
    ts = torch.tensor([0.0, 1.0], dtype=F64)
    with pytest.warns(SolveWarning, match="SciPy give no gradient"):
        zs = solve_scipy(field(velocity, z0), z0, ts, rtol=1e-6, atol=1e-6)
    assert not zs.requires_grad
    with torch.no_grad():
        assert torch.equal(solve_scipy(field(velocity, z0), z0, ts, rtol=1e-6, atol=1e-6), zs)
