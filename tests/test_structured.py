"""Reversible methods against the structure they keep, and the gradient that undoes their steps."""

import gc
import itertools
import math
import warnings
from functools import cache

import numpy as np
import pytest
import torch
from scipy.integrate import solve_ivp
from torch import nn

from pathline.errors import ArgumentError, ShapeError, SolveError, SolveWarning
from pathline.integrate.captured import Captured
from pathline.integrate.explicit import RungeKutta
from pathline.integrate.field import Field, Layout
from pathline.integrate.fixed import FixedMarch
from pathline.integrate.grid import Grid
from pathline.integrate.methods import METHODS
from pathline.integrate.odeint import odeint
from pathline.integrate.reversible import solve_reversible
from pathline.integrate.structured import Separable
from pathline.integrate.tableaus import RK4

PAIRS = ["leapfrog", "verlet"]
ANY = ["asynchronous_leapfrog", "reversible_midpoint"]
NAMES = [*ANY, *PAIRS]


@pytest.fixture(autouse=True)
def double():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def build(name, func, y0, nodes, inside=None, *, samples=False, **options):
    """The march, and the joined first state."""
    layout = Layout(y0, samples=samples)
    z0 = layout.join(y0)
    grid = Grid(nodes, METHODS[name].offsets, z0)
    inside = inside or [[1.0]] * len(grid)
    march = FixedMarch(METHODS[name], Field(func, layout), grid, inside, **options)
    return march, z0


def captured(march, z0, explicit=None):
    return Captured(march.field, march.grid.ends[0], z0, explicit)


def discrete(march, z0):
    return torch.stack([z for z, _ in march.run(z0)])


def reversible(march, z0, explicit=None):
    outputs = solve_reversible(march, z0, captured(march, z0, explicit))
    return torch.stack([z for z, _ in outputs])


def equal_steps(stop, steps):
    return torch.linspace(0.0, stop, steps + 1)


# A driven pendulum, dq/dt = p + a cos 2t, dp/dt = -sin q + b sin t.


def drift(t, p):
    return p + 0.3 * torch.cos(2 * t)


def kick(t, q):
    return -torch.sin(q) + 0.5 * torch.sin(t)


def pendulum(t, z):
    q, p = z.unbind(-1)
    return torch.stack([drift(t, p), kick(t, q)], -1)


START = (1.0, 0.4)


@cache
def exact(t):
    """(q, p) of the pendulum at time t, from START at time 0."""
    if t == 0.0:
        return np.array(START)

    def velocity(t, y):
        q, p = y
        return [p + 0.3 * math.cos(2 * t), -math.sin(q) + 0.5 * math.sin(t)]

    done = solve_ivp(velocity, (0.0, t), START, method="DOP853", rtol=1e-13, atol=1e-13)
    return done.y[:, -1]


def pendulum_error(name, nodes, *, staggered=True):
    """The error at the last node; verlet's second half belongs half a step before."""
    first, last = (float(h) for h in nodes.diff()[[0, -1]])
    stop = float(nodes[-1])
    start, end = np.array(START), exact(stop)
    if name == "verlet" and staggered:
        start = np.array([start[0], exact(-first / 2)[1]])
        end = np.array([end[0], exact(stop - last / 2)[1]])
    if name in PAIRS:
        y0 = tuple(torch.tensor([value]) for value in start)
        march, z0 = build(name, Separable(drift, kick), y0, nodes)
    else:
        march, z0 = build(name, pendulum, torch.tensor(start), nodes)
    return float(np.abs(discrete(march, z0)[-1].numpy() - end).max())


def fitted_order(name, pattern, **options):
    errors = []
    counts = [24, 48, 96, 192]
    for count in counts:
        lengths = torch.tensor(pattern).repeat(count // len(pattern))
        nodes = torch.cat([torch.zeros(1), lengths.cumsum(0)]) * 3.0 / lengths.sum()
        errors.append(pendulum_error(name, nodes, **options))
    return -np.polyfit(np.log(counts), np.log(errors), 1)[0]


@pytest.mark.parametrize("name", NAMES)
def test_order(name):
    assert METHODS[name].order == 2
    assert fitted_order(name, [1.0]) == pytest.approx(2, abs=0.15)


@pytest.mark.parametrize("name", [*ANY, "leapfrog"])
@pytest.mark.parametrize("pattern", [[1.0, 2.0], [1.0, 0.3, 2.0]], ids=["two", "three"])
def test_order_on_unequal_steps(name, pattern):
    assert fitted_order(name, pattern) == pytest.approx(2, abs=0.15)


def test_verlet_is_of_order_one_beside_its_grid():
    """As its docstring says: with z given at t0, or where the steps change."""
    assert fitted_order("verlet", [1.0], staggered=False) == pytest.approx(1, abs=0.15)
    assert fitted_order("verlet", [1.0, 2.0]) == pytest.approx(1, abs=0.15)


def test_midpoint_is_the_two_step_rule():
    """Equal steps: Chang et al. 2018; unequal ones: the form in the docstring."""
    nodes = torch.tensor([0.0, 0.1, 0.2, 0.3, 0.35, 0.6])
    march, z0 = build("reversible_midpoint", pendulum, torch.tensor(START), nodes)
    zs, hs = discrete(march, z0), nodes.diff()
    for n in range(1, len(hs)):
        r = hs[n] / hs[n - 1]
        v = pendulum(nodes[n], zs[n])
        expected = (1 - r**2) * zs[n] + r**2 * zs[n - 1] + (1 + r) * hs[n] * v
        torch.testing.assert_close(zs[n + 1], expected, rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(zs[2], zs[0] + 0.2 * pendulum(nodes[1], zs[1]))
    half = z0 + 0.05 * pendulum(nodes[0], z0)
    torch.testing.assert_close(zs[1], z0 + 0.1 * pendulum(nodes[0] + 0.05, half))


# The harmonic oscillator, q' = w p, p' = -w q.


def oscillate(name, h, steps, y0=(1.0, 0.0)):
    """q and p at all nodes, for w = 1."""
    nodes = h * torch.arange(steps + 1)
    if name in PAIRS:
        state = tuple(torch.tensor([value]) for value in y0)
        march, z0 = build(name, Separable(lambda t, p: p, lambda t, q: -q), state, nodes)
    else:
        march, z0 = build(name, lambda t, z: torch.stack([z[1], -z[0]]), torch.tensor(y0), nodes)
    return discrete(march, z0).unbind(-1)


def test_verlet_conserves_its_quadratic():
    for h in (0.125, 1.0, 1.875):  # times without rounding
        y, z = oscillate("verlet", h, 1000, (0.8, -0.3))
        invariant = y**2 + z**2 - h * y * z
        torch.testing.assert_close(
            invariant, invariant[:1].expand_as(invariant), rtol=1e-12, atol=0
        )


def test_leapfrog_conserves_its_quadratic_and_disperses_as_it_should():
    for h in (0.125, 1.0, 1.875):  # times without rounding
        q, p = oscillate("leapfrog", h, 1000)
        invariant = (1 - h**2 / 4) * q**2 + p**2
        torch.testing.assert_close(
            invariant, invariant[:1].expand_as(invariant), rtol=1e-11, atol=0
        )
        frequency = math.acos(1 - h**2 / 2)
        torch.testing.assert_close(q, torch.cos(frequency * torch.arange(1001)), rtol=0, atol=1e-10)


@pytest.mark.parametrize("name, limit", [*((n, 2.0) for n in PAIRS), *((n, 1.0) for n in ANY)])
def test_stability_limit(name, limit):
    """Bounded just below the limit of dt omega, not above it."""
    assert max(x.abs().max() for x in oscillate(name, limit - 0.01, 2000)) < 30
    assert max(x.abs().max() for x in oscillate(name, limit + 0.01, 2000)) > 1e6


# Networks of the two kinds of "Stable architectures".


class Antisymmetric(nn.Module):
    """tanh((K - K^T) z + b cos t)."""

    def __init__(self, dim):
        super().__init__()
        self.K = nn.Parameter(torch.randn(dim, dim))
        self.b = nn.Parameter(torch.randn(dim))

    def forward(self, t, z):
        return torch.tanh(z @ (self.K - self.K.T).T + self.b * torch.cos(t))


class Half(nn.Module):
    """sign K^T tanh(K z + b cos t), a half of a Hamiltonian network."""

    def __init__(self, dim, sign):
        super().__init__()
        self.K = nn.Parameter(torch.randn(dim, dim) / dim**0.5)
        self.b = nn.Parameter(torch.randn(dim))
        self.sign = sign

    def forward(self, t, z):
        return self.sign * torch.tanh(z @ self.K.T + self.b * torch.cos(t)) @ self.K


def network(name, dim=3, batch=4):
    """A velocity that suits the method, and a state."""
    if name in PAIRS:
        pair = (torch.randn(batch, dim), torch.randn(batch, dim))
        return Separable(Half(dim, 1.0), Half(dim, -1.0)), pair
    return Antisymmetric(dim), torch.randn(batch, dim)


@pytest.mark.parametrize("name", NAMES)
def test_inverse(name):
    """Back to the start over 1000 steps of 0.05, equal and unequal, within 1e-12."""
    func, y0 = network(name)
    for lengths in (torch.full((1000,), 0.05), 0.04 + 0.02 * torch.rand(1000)):
        nodes = torch.cat([torch.zeros(1), lengths.cumsum(0)])
        march, z0 = build(name, func, y0, nodes)
        with torch.no_grad():
            state = march.begin(z0)
            for n in range(1000):
                state, _ = march.step(n, state)
            z, carry = state.z, state.carry
            assert (z - z0).abs().max() > 0.1
            for n in reversed(range(1000)):
                ts = march.grid.stages[n].unbind(0)
                z, carry = METHODS[name].invert(march.field, ts, march.grid.lengths[n], z, carry)
        assert (z - z0).abs().max() < 1e-12
        if name != "reversible_midpoint":  # whose first step makes half of its carry
            for found, first in zip(carry, march.begin(z0).carry, strict=True):
                assert (found - first).abs().max() < 1e-11


@pytest.mark.parametrize("name", [*PAIRS, "asynchronous_leapfrog"])
def test_volume(name):
    """Jacobian of a step of determinant 1; of (z, w) up to its sign for the asynchronous one."""
    func, y0 = network(name, dim=3, batch=1)
    march, z0 = build(name, func, y0, equal_steps(0.4, 1))
    if name in PAIRS:
        jacobian = torch.autograd.functional.jacobian(lambda z: discrete(march, z)[-1], z0)
        assert torch.linalg.det(jacobian) == pytest.approx(1.0, abs=1e-13)
        unit = torch.eye(3)
        form = torch.cat([torch.cat([0 * unit, unit], 1), torch.cat([-unit, 0 * unit], 1)])
        torch.testing.assert_close(jacobian.T @ form @ jacobian, form, rtol=0, atol=1e-13)
        return

    def step(z, w):
        after, _ = march.step(0, march.begin(z)._replace(z=z, carry=(w,)))
        return after.z, after.carry[0]

    blocks = torch.autograd.functional.jacobian(step, (z0, torch.randn(1, 3)))
    jacobian = torch.cat([torch.cat([x.reshape(3, 3) for x in row], 1) for row in blocks])
    assert abs(torch.linalg.det(jacobian)) == pytest.approx(1.0, abs=1e-13)


def test_halves_are_evaluated_one_at_a_time():
    calls = []
    func = Separable(
        lambda t, p: calls.append(("f", float(t))) or p,
        lambda t, q: calls.append(("g", float(t))) or -q,
    )
    y0 = (torch.ones(2), torch.zeros(2))
    march, z0 = build("leapfrog", func, y0, torch.tensor([0.0, 1.0, 3.0]))
    discrete(march, z0)
    assert calls == [("g", 0.0), ("f", 0.5), ("g", 1.0), ("f", 2.0), ("g", 3.0)]
    assert march.field.evaluations == 5
    calls.clear()
    march, z0 = build("verlet", func, y0, torch.tensor([0.0, 1.0, 2.0]))
    discrete(march, z0)
    assert calls == [("g", 0.0), ("f", 0.5), ("g", 1.0), ("f", 1.5)]
    assert march.field.evaluations == 4


@pytest.mark.parametrize("name, per_step, before", [(ANY[0], 1, 1), (ANY[1], 1, 2)])
def test_evaluations(name, per_step, before):
    march, z0 = build(name, pendulum, torch.tensor(START), equal_steps(1.0, 10))
    discrete(march, z0)
    assert march.field.evaluations == 10 * per_step + before


@pytest.mark.parametrize("name", PAIRS)
@pytest.mark.parametrize("samples", [False, True], ids=["joined", "samples"])
def test_pairs_of_any_callable_and_shape(name, samples):
    """A callable on pairs gives what Separable gives; halves may differ in shape."""
    matrix = torch.randn(6, 2)
    f, g = (
        (lambda t, z: torch.tanh(z @ matrix.T).view(4, 3, 2)),
        (lambda t, y: -torch.tanh(y.reshape(4, 6)) @ matrix),
    )
    y0 = (torch.randn(4, 3, 2), torch.randn(4, 2))
    whole = lambda t, pair: (f(t, pair[1]), g(t, pair[0]))  # noqa: E731
    nodes = equal_steps(1.0, 7)
    march, z0 = build(name, Separable(f, g), y0, nodes, samples=samples)
    other, _ = build(name, whole, list(y0), nodes, samples=samples)
    zs = discrete(march, z0)
    torch.testing.assert_close(zs, discrete(other, z0), rtol=0, atol=0)
    y, z = march.field.layout.split(zs)
    assert y.shape == (8, 4, 3, 2) and z.shape == (8, 4, 2)


@pytest.mark.parametrize("name", PAIRS)
def test_wrong_pairs(name):
    nodes = equal_steps(1.0, 2)
    one = torch.ones(2)
    for y0 in (one, (one,), (one, one, one), {"q": one, "p": one}, (one, (one,))):
        march, z0 = build(name, lambda t, y: y, y0, nodes)
        with pytest.raises(ArgumentError, match=f'method="{name}" needs a pair.*Separable'):
            discrete(march, z0)
    march, z0 = build(name, Separable(lambda t, p: p, lambda t, q: q[:1]), (one, one), nodes)
    with pytest.raises(ShapeError, match=r"`g` of Separable.*\(2,\), got \(1,\)"):
        discrete(march, z0)
    march, z0 = build(name, Separable(lambda t, p: p.float(), kick), (one, one), nodes)
    with pytest.raises(ArgumentError, match=r"`f` of Separable.*float64.*float32"):
        discrete(march, z0)


@pytest.mark.parametrize("name", NAMES)
def test_lengths_of_all_kinds(name):
    """A number, a tensor, and one for each sample take the same steps; a sample may rest."""
    func, y0 = network(name)
    march, z0 = build(name, func, y0, equal_steps(1.0, 8), samples=name in PAIRS)
    zs = discrete(march, z0)
    nodes = equal_steps(1.0, 8).requires_grad_()
    timed, _ = build(name, func, y0, nodes, samples=name in PAIRS)
    torch.testing.assert_close(zs, discrete(timed, z0), rtol=1e-14, atol=1e-14)
    rows = equal_steps(1.0, 8)[:, None].repeat(1, 4)
    rows[5:, 2] = rows[4, 2]
    each, _ = build(name, func, y0, rows, samples=name in PAIRS)
    found = discrete(each, z0)
    zs[5:, 2] = zs[4, 2]
    torch.testing.assert_close(zs, found, rtol=1e-14, atol=1e-14)


# The gradient that undoes the steps.


def gradients(solve, name, func, y0, nodes, *, inside=None, samples=False, weights=None, **options):
    """Gradients of a loss of all outputs for the state, the parameters and the times."""
    leaves = [x.clone().requires_grad_() for x in (y0 if isinstance(y0, tuple) else (y0,))]
    state = tuple(leaves) if isinstance(y0, tuple) else leaves[0]
    nodes = nodes.clone().requires_grad_(nodes.requires_grad)
    shares = inside(nodes) if callable(inside) else inside
    march, z0 = build(name, func, state, nodes, shares, samples=samples, **options)
    zs = solve(march, z0)
    torch.manual_seed(1)
    loss = (zs.sin() * torch.randn_like(zs)).sum()
    times = [nodes] if nodes.requires_grad else []
    return zs, torch.autograd.grad(loss, [*leaves, *func.parameters(), *times])


def assert_same(ours, theirs, bound):
    torch.testing.assert_close(ours[0], theirs[0], rtol=1e-14, atol=1e-14)
    for found, expected in zip(ours[1], theirs[1], strict=True):
        assert (found - expected).abs().max() <= bound * expected.abs().max()


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("timed", [False, True], ids=["fixed", "timed"])
def test_gradient(name, timed):
    """That of the discrete solution to 1e-10 over 1000 steps: state, parameters and times."""
    func, y0 = network(name)
    nodes = equal_steps(20.0, 1000).requires_grad_(timed)
    inside = [[1.0] if n % 100 == 99 else [] for n in range(1000)]
    ours = gradients(reversible, name, func, y0, nodes, inside=inside)
    theirs = gradients(discrete, name, func, y0, nodes, inside=inside)
    assert len(ours[1]) == len(theirs[1]) > 2
    assert_same(ours, theirs, 1e-10)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("interpolation", ["linear", "cubic"])
def test_gradient_of_outputs_inside(name, interpolation):
    """Outputs inside of steps, whose shares are numbers or depend on the times."""
    func, y0 = network(name)
    nodes = torch.tensor([0.0, 0.1, 0.3, 0.35]).requires_grad_()

    def inside(nodes):
        return [[0.25], [(0.2 - nodes[1]) / (nodes[2] - nodes[1]), 1.0], []]

    ours, theirs = (
        gradients(solve, name, func, y0, nodes, inside=inside, interpolation=interpolation)
        for solve in (reversible, discrete)
    )
    assert len(ours[0]) == 4
    assert_same(ours, theirs, 1e-13)


@pytest.mark.parametrize("name", NAMES)
def test_gradient_of_times_of_each_sample(name):
    func, y0 = network(name)
    nodes = torch.cat([torch.zeros(1, 4), torch.rand(12, 4).cumsum(0) / 6])
    nodes[9:, 1] = nodes[8, 1]  # a sample that rests
    nodes.requires_grad_()
    ours, theirs = (
        gradients(solve, name, func, y0, nodes, samples=name in PAIRS)
        for solve in (reversible, discrete)
    )
    assert ours[1][-1].shape == (13, 4) and ours[1][-1].abs().min() < ours[1][-1].abs().max()
    assert_same(ours, theirs, 1e-12)


@pytest.mark.parametrize("name", NAMES)
def test_gradcheck(name):
    func, y0 = network(name, dim=2, batch=2)
    nodes = torch.tensor([0.0, 0.2, 0.5, 0.6]).requires_grad_()
    leaves = [x.requires_grad_() for x in (y0 if isinstance(y0, tuple) else (y0,))]

    def solve(nodes, *state):
        march, z0 = build(name, func, state if len(state) > 1 else state[0], nodes)
        return reversible(march, z0)

    assert torch.autograd.gradcheck(solve, (nodes, *leaves))


@pytest.mark.parametrize("name", NAMES)
def test_gradient_in_low_precision_and_decreasing_times(name):
    func, y0 = network(name)
    func = func.float()
    y0 = tuple(y.float() for y in y0) if isinstance(y0, tuple) else y0.float()
    nodes = equal_steps(-3.0, 60)
    ours, theirs = (gradients(s, name, func, y0, nodes) for s in (reversible, discrete))
    assert ours[0].dtype == torch.float32
    for found, expected in zip(ours[1], theirs[1], strict=True):
        assert (found - expected).abs().max() <= 1e-4 * expected.abs().max()


def test_only_what_is_asked_for():
    """No gradient for what needs none; a tail without a loss is undone but not differentiated."""
    func, y0 = network("leapfrog")
    func.g.K.requires_grad_(False)
    march, z0 = build("leapfrog", func, y0, equal_steps(1.0, 10))
    zs = [z for z, _ in solve_reversible(march, z0, captured(march, z0))]
    zs[3].sum().backward()
    found = [parameter.grad for parameter in func.parameters()]
    assert func.g.K.grad is None
    func.zero_grad()
    march.run(z0)[3][0].sum().backward()
    for one, parameter in zip(found, func.parameters(), strict=True):
        assert (one is None) == (parameter.grad is None)
        if one is not None:
            torch.testing.assert_close(one, parameter.grad)
    with torch.no_grad():
        outputs = solve_reversible(march, z0, captured(march, z0))
    assert not any(z.requires_grad for z, _ in outputs)
    frozen = func.requires_grad_(False)
    march, z0 = build("leapfrog", frozen, y0, equal_steps(1.0, 10))
    assert not solve_reversible(march, z0, captured(march, z0))[-1][0].requires_grad
    march, z0 = build("leapfrog", frozen, y0, torch.zeros(1))
    assert [z is z0 for z, _ in solve_reversible(march, z0, captured(march, z0))] == [True]


class Kept:
    """A saved tensor whose life is watched; without its graph, which would hold it in turn."""

    alive = 0

    def __init__(self, x):
        self.x = x.detach()
        Kept.alive += x.nbytes

    def __del__(self):
        Kept.alive -= self.x.nbytes


def kept_bytes(solve, name, steps):
    func, y0 = network(name)
    inside = [[]] * (steps - 1) + [[1.0]]
    march, z0 = build(name, func, y0, equal_steps(1.0, steps), inside)
    z0.requires_grad_()
    hooks = torch.autograd.graph.saved_tensors_hooks(Kept, lambda kept: kept.x)
    gc.collect()
    before = Kept.alive
    with hooks:
        zs = solve(march, z0)
    kept = Kept.alive - before
    zs[-1].sum().backward()
    return kept


@pytest.mark.parametrize("name", NAMES)
def test_memory_does_not_grow_with_the_steps(name):
    def outputs(march, z0):
        return [z for z, _ in solve_reversible(march, z0, captured(march, z0))]

    def run(march, z0):
        return [z for z, _ in march.run(z0)]

    sizes = [kept_bytes(outputs, name, steps) for steps in (16, 1024)]
    assert sizes[0] == sizes[1] > 0
    few, many = (kept_bytes(run, name, steps) for steps in (16, 128))
    assert many > 6 * few > sizes[0]


@pytest.mark.parametrize("name", ANY)
def test_warns_where_undoing_is_unstable(name):
    rate = torch.tensor(30.0, requires_grad=True)
    march, z0 = build(name, lambda t, z: -rate * z, torch.ones(3), equal_steps(1.0, 40))
    zs = reversible(march, z0)
    with pytest.warns(SolveWarning, match=r"relative error of .*times the round-off.*checkpoint"):
        zs[-1].sum().backward()


@pytest.mark.parametrize("name", NAMES)
def test_no_warning_where_it_is_stable(name):
    func, y0 = network(name)
    march, z0 = build(name, func, y0, equal_steps(10.0, 200))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        reversible(march, z0)[-1].sum().backward()


@pytest.mark.parametrize("name", NAMES)
def test_tensors_of_closures_are_found(name):
    scale, shift = (torch.tensor(value, requires_grad=True) for value in (0.7, 0.2))

    def turn(t, z):
        return torch.tanh(scale * z.flip(-1) * torch.tensor([1.0, -1.0])) + shift

    func, y0 = turn, torch.randn(3, 2)
    if name in PAIRS:
        func = Separable(lambda t, p: scale * torch.tanh(p), lambda t, q: shift - torch.sin(q))
        y0 = (y0, torch.randn(3, 2))
    march, z0 = build(name, func, y0, equal_steps(1.0, 20))
    found, expected = (
        torch.autograd.grad(solve(march, z0).sin().sum(), (scale, shift))
        for solve in (reversible, discrete)
    )
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


def test_late_and_computed_tensors_are_refused():
    early, late = (torch.tensor(0.5, requires_grad=True) for _ in range(2))

    def jumps(t, z):
        return (early if t < 0.5 else late) * z.flip(0)

    for name in ANY:
        march, z0 = build(name, jumps, torch.ones(2), equal_steps(1.0, 8))
        zs = reversible(march, z0)
        with pytest.raises(ArgumentError, match=r"at some times only.*adjoint_params"):
            zs[-1].sum().backward()
        found, expected = (
            torch.autograd.grad(zs[-1].sum(), (early, late))
            for zs in (reversible(march, z0, (early, late)), discrete(march, z0))
        )
        torch.testing.assert_close(found, expected)
    doubled = 2 * early
    march, z0 = build(ANY[0], lambda t, z: doubled * z, torch.ones(2), equal_steps(1.0, 8))
    with pytest.raises(ArgumentError, match="computed before the solve"):
        reversible(march, z0)
    found, expected = (
        torch.autograd.grad(zs[-1].sum(), early, retain_graph=True)
        for zs in (reversible(march, z0, (doubled,)), discrete(march, z0))
    )
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("inner", ["create_graph", "own leaf"])
def test_velocities_that_call_autograd(inner):
    """dq/dt = dH/dp, dp/dt = -dH/dq of a Hamiltonian, by autograd inside of the velocity."""
    weight = nn.Parameter(torch.randn(4, 2))

    def gradient(z):
        with torch.enable_grad():
            if inner == "own leaf" and not z.requires_grad:
                z = z.detach().requires_grad_()
            energy = torch.log(torch.cosh(z @ weight.T)).sum()
            return torch.autograd.grad(energy, z, create_graph=True)[0]

    func = Separable(lambda t, p: gradient(p), lambda t, q: -gradient(q))
    y0 = (torch.randn(3, 2), torch.randn(3, 2))
    for name, velocity, state in (
        ("leapfrog", func, y0),
        (
            "asynchronous_leapfrog",
            lambda t, z: gradient(z) @ torch.tensor([[0.0, 1], [-1, 0]]),
            y0[0],
        ),
    ):
        march, z0 = build(name, velocity, state, equal_steps(1.0, 10))
        z0.requires_grad_()
        found, expected = (
            torch.autograd.grad(solve(march, z0)[1:].sin().sum(), (z0, weight))
            for solve in (reversible, discrete)
        )
        torch.testing.assert_close(found, expected, rtol=1e-11, atol=1e-12)


def test_second_derivatives_and_transforms_are_refused():
    march, z0 = build(ANY[0], pendulum, torch.tensor(START), equal_steps(1.0, 4))
    z0.requires_grad_()
    text = 'gradient="reversible" can be differentiated once.*"discrete" or "checkpoint"'
    with pytest.raises(SolveError, match=text):
        torch.autograd.grad(reversible(march, z0)[-1].sum(), z0, create_graph=True)
    known = captured(march, z0)

    def end(z):
        return solve_reversible(march, z, known)[-1][0].sum()

    vector = z0.detach()
    with pytest.raises(SolveError, match=text):
        torch.func.grad(end)(vector)
    with pytest.raises(SolveError, match=text):
        torch.func.vmap(end)(vector.expand(3, 2))
    with torch.autograd.forward_ad.dual_level(), pytest.raises(SolveError, match=text):
        end(torch.autograd.forward_ad.make_dual(vector, torch.ones(2)))


def test_what_does_not_go_together_is_refused():
    layout = Layout(torch.ones(2))
    nodes, z0 = equal_steps(1.0, 4), torch.ones(2)
    field = Field(lambda t, z: -z, layout)
    known = Captured(field, nodes[0], z0, ())
    march = FixedMarch(RungeKutta(RK4), field, Grid(nodes, RK4.c, z0), [[1.0]] * 4)
    with pytest.raises(ArgumentError, match=r"can be undone.*got .rk4..*checkpoint"):
        solve_reversible(march, z0, known)
    method = METHODS[ANY[0]]
    grid = Grid(nodes, method.offsets, z0)
    march = FixedMarch(method, field, grid, [[1.0]] * 4)
    march.quadrature = object()
    with pytest.raises(ArgumentError, match=r'`quadrature`.*"discrete" or "checkpoint"'):
        solve_reversible(march, z0, known)
    grid = Grid(nodes, method.offsets, z0, perturb=True)
    march = FixedMarch(method, field, grid, [[1.0]] * 4)
    with pytest.raises(ArgumentError, match=r'"perturb".*"discrete" or "checkpoint"'):
        solve_reversible(march, z0, known)


def test_changed_parameters_are_noticed():
    func, y0 = network(ANY[0])
    march, z0 = build(ANY[0], func, y0, equal_steps(1.0, 4))
    loss = reversible(march, z0)[-1].sum()
    with torch.no_grad():
        func.b += 1
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_casting_is_the_same_backwards():
    """Under autocast the steps are undone with the casts they were taken with."""
    func, y0 = network("leapfrog", dim=8)
    func, y0 = func.float(), tuple(y.float() for y in y0)
    march, z0 = build("leapfrog", func, y0, equal_steps(1.0, 10))
    march.field.cast = True
    dtypes = set()
    func.f.register_forward_hook(lambda module, inputs, output: dtypes.add(output.dtype))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        zs = reversible(march, z0)
    zs[-1].sum().backward()  # warns if the states are not recovered
    assert dtypes == {torch.bfloat16} and zs.dtype == torch.float32


def test_casts_kept_by_autocast_are_not_taken_for_captured_tensors():
    """Also where the backward pass runs under autocast, which keeps casts of the forward one."""
    weight = torch.tensor([[0.0, 1.0], [-1.0, 0.0]], dtype=torch.float32, requires_grad=True)
    z0 = torch.ones(3, 2, dtype=torch.float32)
    grads = []
    for solve in (reversible, discrete):
        march, _ = build(ANY[0], lambda t, z: z @ weight, z0, equal_steps(0.5, 4))
        march.field.cast = True
        with torch.autocast("cpu", dtype=torch.bfloat16):
            grads.append(torch.autograd.grad(solve(march, z0)[-1].sum(), weight)[0])
    torch.testing.assert_close(*grads, rtol=0.02, atol=0.02)


def test_dense_pieces_have_no_graph():
    func, y0 = network("leapfrog")
    march, z0 = build("leapfrog", func, y0, equal_steps(1.0, 5), dense=True, interpolation="cubic")
    zs = reversible(march, z0)
    assert len(march.pieces) == 5
    middle = march.pieces[2].at(0.5)
    assert not middle.requires_grad
    assert (middle - (zs[2] + zs[3]) / 2).abs().max() < 0.1


@pytest.mark.parametrize("name", NAMES)
def test_odeint(name):
    """Through the door: pytrees, output times between steps, gradients for the times."""
    func, y0 = network(name)
    pair = isinstance(y0, tuple)
    leaves = [y.requires_grad_() for y in (y0 if pair else (y0,))]
    for options in ({}, {"step_size": 0.05}, {"step_size": 0.07, "interp": "cubic"}):
        results = []
        for gradient in ("discrete", "reversible"):
            t = torch.tensor([0.0, 0.31, 0.5, 1.2], requires_grad=True)
            ys = odeint(func, y0, t, method=name, options=options, gradient=gradient)
            flat = torch.cat([y.flatten(1) for y in ys], 1) if pair else ys
            loss = (flat * torch.linspace(-1, 1, flat.numel()).view_as(flat)).sum()
            grads = torch.autograd.grad(loss, [*leaves, *func.parameters(), t])
            results.append((flat.detach(), *grads))
        for found, expected in itertools.zip_longest(*results):
            torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-11)


def test_images_with_channels_last_are_joined_as_they_lie():
    """The same solution and gradient as of images in the usual order, for tolerances of each."""
    y, x = torch.randn(2, 3, 4, 5, 2).unbind(0)
    force = torch.randn(4, 4)
    pull = Separable(
        lambda t, z: z, lambda t, q: torch.einsum("ij,njhw->nihw", -force.mT @ force, q)
    )
    rtol = (torch.rand(4, 1, 1) * 1e-4 + 1e-8, 1e-6)
    for how in ({"method": "leapfrog"}, {"method": "dopri5", "rtol": rtol}):
        found = []
        for form in (torch.contiguous_format, torch.channels_last):
            state = tuple(z.clone(memory_format=form).requires_grad_() for z in (y, x))
            ends = [zs[-1] for zs in odeint(pull, state, torch.linspace(0, 1, 5), **how)]
            loss = sum((z * w).sum() for z, w in zip(ends, (x, y), strict=True))
            found.append([*ends, *torch.autograd.grad(loss, state)])
        torch.testing.assert_close(found[0], found[1], rtol=1e-11, atol=1e-11)
