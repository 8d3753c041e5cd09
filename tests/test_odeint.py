"""The public solve against known solutions: orders, outputs, options, samples with own steps."""

import math
from functools import cache

import numpy as np
import pytest
import torch
from scipy.integrate import solve_ivp
from torch import Tensor
from torch.testing import assert_close

from pathline.integrate import METHODS, Status, odeint
from pathline.integrate.imex import ImexRungeKutta

F64 = torch.float64


def reason(name):
    """Why a method can't take any velocity, or None."""
    if name in ("leapfrog", "verlet"):
        return "needs a pair (y, z): see test_structured.py"
    if isinstance(METHODS[name], ImexRungeKutta):
        return "needs a `Split`: see test_implicit.py"
    return None


def named(keep=lambda name: True):
    """Every method that `keep` accepts; those of special velocities are skipped by name."""
    return [
        pytest.param(name, marks=pytest.mark.skip(reason=why)) if (why := reason(name)) else name
        for name in METHODS
        if keep(name)
    ]


def adaptive(name):
    return bool(getattr(METHODS[name], "adaptive", False))


def reversible(name):
    return bool(getattr(METHODS[name], "reversible", False))


ADAPTIVE = named(adaptive)
LOOSE = {"fehlberg2": 3000}  # its estimate is 1/512 of the difference of Euler's rule to order two
FIXED = named(lambda name: not adaptive(name))
EXPLICIT_ADAPTIVE = [
    name
    for name in METHODS
    if adaptive(name) and reason(name) is None and METHODS[name].tableau.explicit
]


def times(*values):
    return torch.tensor(values, dtype=F64)


def tensor(*values):
    return torch.tensor(values, dtype=F64)


# Two nonlinear problems that depend on time. The first is logistic growth; the second turns
# around the origin at a rate that depends on the radius, which even methods without damping like.


def growth(t, y):
    return (1 + 2 * t) * y * (1 - y)


def growth_exact(t):
    return 1 / (1 + 4 * torch.exp(-(t + t * t)))


def turn(t, y):
    a, b = y.unbind(-1)
    rate = (a * a + b * b) * (1 + 0.5 * torch.cos(t))
    return torch.stack([-rate * b, rate * a], -1)


def turn_exact(t):
    angle = 1.21 * (t + 0.5 * torch.sin(t))
    return 1.1 * torch.stack([torch.cos(angle), torch.sin(angle)], -1)


PROBLEMS = {"growth": (growth, growth_exact, 1.5), "turn": (turn, turn_exact, 3.0)}


def slope(sizes, errors):
    """The least-squares slope of log error against log size."""
    return float(np.polyfit(np.log(sizes), np.log(errors), 1)[0])


# Steps at which the next term of the error expansion is small and round-off far away.
STEPS = {1: (256, 512), 2: (96, 128, 192), 3: (64, 96, 128), 4: (128, 192)}
STEPS |= {5: (48, 64, 96), 6: (16, 24, 32), 8: (16, 20, 24)}
FEW = STEPS | {1: (64, 96), 2: (32, 48), 3: (32, 48), 4: (24, 32), 5: (24, 32)}
STEPS_OF_TURN = STEPS | {5: (64, 96, 128), 8: (32, 40, 48)}


@pytest.mark.parametrize("name", named())
@pytest.mark.parametrize("problem", PROBLEMS)
def test_order(problem, name):
    """The error of fixed steps falls at the order of the method; a wrong weight shows here.

    It is taken at four times together, where it can't pass through zero by chance.
    """
    if problem == "growth" and reversible(name):
        pytest.skip("a step that can be undone damps nothing; solutions of this problem decay")
    tableau = getattr(METHODS[name], "tableau", None)
    implicit = tableau is not None and not tableau.explicit
    if problem == "turn" and implicit:
        pytest.skip("Newton's method takes long; one problem will do")
    v, exact, stop = PROBLEMS[problem]
    order, t = METHODS[name].order, torch.linspace(0.0, stop, 5, dtype=F64)
    errors, sizes = [], []
    for n in (STEPS_OF_TURN if problem == "turn" else FEW if implicit else STEPS)[order]:
        options = {"step_size": stop / n}
        if name in ("implicit_adams", "fixed_adams"):
            options["max_iters"] = 20
        y = odeint(v, exact(t)[0], t, method=name, options=options, rtol=1e-11, atol=1e-11)
        errors.append(float((y - exact(t)).norm()))
        sizes.append(stop / n)
    # the range of dopri8 between its first steps and round-off is short
    assert slope(sizes, errors) == pytest.approx(order, abs=0.15 if order < 8 else 0.3)


@pytest.mark.parametrize("name", ADAPTIVE)
def test_the_error_is_proportional_to_the_tolerance(name):
    """Error per step with local extrapolation: slope one, as far as steps are many."""
    low, implicit = METHODS[name].order <= 2, not METHODS[name].tableau.explicit
    tolerances = [1e-4, 1e-5, 1e-6] if low or implicit else [1e-5, 1e-6, 1e-7, 1e-8]
    t, errors = times(0.0, 3.0), []
    for tolerance in tolerances:
        y = odeint(turn, turn_exact(t[0]), t, method=name, rtol=tolerance, atol=tolerance)
        errors.append(float((y[-1] - turn_exact(t[-1])).abs().max()))
    assert slope(tolerances, errors) == pytest.approx(1.0, abs=0.35)
    assert max(e / tol for e, tol in zip(errors, tolerances, strict=True)) < LOOSE.get(name, 150)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("batch", [(), (1,), (2, 3)])
@pytest.mark.parametrize("name", ["rk4", "dopri5", "dopri8", "kencarp4", "reversible_midpoint"])
def test_dtype_and_shape_are_kept(name, batch, dtype):
    y0 = torch.ones(*batch, 2, dtype=dtype)
    y = odeint(lambda t, y: -y, y0, torch.tensor([0.0, 0.5, 1.0]), method=name, rtol=1e-4)
    assert (y.shape, y.dtype) == ((3, *batch, 2), dtype)
    assert torch.equal(y[0], y0)


def test_times_that_the_velocity_sees_are_exact():
    """Double precision all the way, whatever the default dtype: no time is rounded to float32."""
    for name in ("fehlberg2", "dopri8", "kencarp4", "rk4"):
        seen = []

        def v(t, y, seen=seen):
            seen.append(float(t))
            return torch.cos(t) * torch.ones_like(y)

        y = odeint(v, tensor(0.0), times(0.0, 3.0), method=name, rtol=1e-8, atol=1e-8)
        single = sum(float(np.float32(t)) == t for t in seen)
        assert single <= 5, (name, single, len(seen))  # those at 0 and at 3
        if name == "dopri8":
            assert_close(y[-1], torch.sin(tensor(3.0)), rtol=0, atol=2e-8)


# Times


@pytest.mark.parametrize("name", named())
def test_decreasing_times(name):
    """Backward and forward are the same problem after t -> -t."""
    t = times(1.5, 1.1, 0.4, -0.2)
    options = {} if adaptive(name) else {"step_size": 0.02}
    tolerances = {"rtol": 1e-5, "atol": 1e-5}
    back = odeint(turn, turn_exact(t[0]), t, method=name, options=options, **tolerances)
    mirror = odeint(
        lambda s, y: -turn(-s, y), turn_exact(t[0]), -t, method=name, options=options, **tolerances
    )
    assert_close(back, mirror, rtol=0, atol=1e-12)
    atol = 0.2 if METHODS[name].order == 1 else 3e-2 if name in LOOSE else 5e-3
    assert_close(back, turn_exact(t), rtol=0, atol=atol)


@pytest.mark.parametrize("gradient", ["discrete", "checkpoint", "reversible", "adjoint"])
@pytest.mark.parametrize("name", ["dopri5", "dopri8", "rk4", "asynchronous_leapfrog"])
def test_one_time_is_the_start(name, gradient):
    if gradient == "reversible" and not reversible(name):
        pytest.skip("not a reversible method")
    y0 = tensor(1.0, 2.0).requires_grad_()
    y = odeint(turn, y0, times(0.7), method=name, gradient=gradient)
    assert torch.equal(y, y0[None])
    (grad,) = torch.autograd.grad(y.sum(), y0)
    assert torch.equal(grad, torch.ones_like(y0))


def test_one_time_with_the_whole_solution():
    for name in ("dopri5", "rk4"):
        solution = odeint(turn, tensor(1.0, 2.0), times(0.7), method=name, solution=True)
        assert solution.success
        assert solution.statistics.accepted == 0
        assert torch.equal(solution.values, tensor(1.0, 2.0)[None])


def test_times_may_be_a_list_of_numbers():
    y0 = turn_exact(tensor(0.0))[0]
    assert torch.equal(odeint(turn, y0, [0, 1, 3]), odeint(turn, y0, times(0.0, 1.0, 3.0)))


# States


def split_turn(t, a, b):
    return turn(t, torch.stack([a, b], -1)).unbind(-1)


@pytest.mark.parametrize("batch", ["shared", "independent"])
@pytest.mark.parametrize("name", ["dopri5", "rk4", "dopri8"])
def test_pytrees(name, batch):
    """A tuple, a dict and a nest of tensors give what one tensor does, to the tolerance."""
    start = turn_exact(tensor(0.0)).expand(3, 2) * tensor(1.0, 0.8, 0.6)[:, None]
    t = times(0.0, 0.5, 2.0)
    options = None if adaptive(name) else {"step_size": 0.02}
    how = {"method": name, "options": options, "batch": batch, "rtol": 1e-8, "atol": 1e-8}

    def plain(t, y):
        return turn(t.reshape(-1) if t.ndim else t, y)  # times of own steps are (batch, 1)

    def pair(t, y):
        return split_turn(t.reshape(-1) if t.ndim else t, *y)

    def velocity(t, y):
        da, db = pair(t, (y["a"], y["b"][0]))
        return {"a": da, "b": [db, torch.zeros_like(y["b"][1])]}

    want = odeint(plain, start, t, **how)
    a0, b0 = start.unbind(-1)
    a, b = odeint(pair, (a0, b0), t, **how)
    assert_close(torch.stack([a, b], -1), want, rtol=0, atol=1e-6)
    extra = torch.ones(3, 2, 2, dtype=F64)
    tree = odeint(velocity, {"a": a0, "b": [b0, extra]}, t, **how)
    assert set(tree) == {"a", "b"}
    assert tree["b"][1].shape == (3, 3, 2, 2)
    assert_close(torch.stack([tree["a"], tree["b"][0]], -1), want, rtol=0, atol=1e-6)
    assert_close(tree["b"][1], extra.expand(3, 3, 2, 2))


def test_a_dict_is_read_by_its_keys():
    """The velocity may list its keys in another order than `y0` does."""
    y0 = {"x": tensor(1.0), "v": tensor(0.0)}
    y = odeint(lambda t, y: {"v": -y["x"], "x": y["v"]}, y0, times(0.0, 1.0))
    assert_close(y["x"][-1], torch.cos(tensor(1.0)), rtol=0, atol=1e-6)
    assert_close(y["v"][-1], -torch.sin(tensor(1.0)), rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", ["dopri5", "dopri8", "rk4", "explicit_adams"])
def test_complex_states(name):
    """dz/dt = (i - 0.2) z; real slopes are welcome too."""
    options = None if adaptive(name) else {"step_size": 0.005}
    factor = torch.tensor(1j - 0.2, dtype=torch.complex128)
    z0 = torch.tensor([1.0 + 1.0j, 0.3j], dtype=torch.complex128)
    t = times(0.0, 0.7, 2.0)
    z = odeint(lambda t, z: factor * z, z0, t, method=name, options=options, rtol=1e-9)
    assert_close(z, torch.exp(factor * t)[:, None] * z0, rtol=0, atol=1e-7)
    z = odeint(lambda t, z: z.real, z0, t, method=name, options=options, rtol=1e-9)
    want = torch.complex(torch.exp(t)[:, None] * z0.real, z0.imag.expand(3, 2))
    assert_close(z, want, rtol=0, atol=1e-7)


def test_an_empty_batch():
    for how in ({"method": "rk4"}, {"method": "dopri5"}, {"batch": "independent"}):
        y = odeint(lambda t, y: -y, torch.zeros(0, 3, dtype=F64), times(0.0, 1.0), **how)
        assert y.shape == (2, 0, 3)


# Outputs inside steps


@pytest.mark.parametrize("interp, order", [("linear", 2), ("cubic", 4)])
def test_interpolation_of_fixed_steps(interp, order):
    """Outputs at odd places: their error falls at the order of the interpolant, at most 4."""
    t = torch.cat([times(0.0), torch.linspace(0.111, 2.9, 7, dtype=F64), times(3.0)])
    errors, sizes = [], []
    for n in (24, 48, 96):
        options = {"step_size": 3.0 / n, "interp": interp}
        y = odeint(turn, turn_exact(t[0]), t, method="rk4", options=options)
        errors.append(float((y - turn_exact(t)).abs().max()))
        sizes.append(3.0 / n)
    assert slope(sizes, errors) == pytest.approx(order, abs=0.35)  # places in steps vary


@pytest.mark.parametrize("name", EXPLICIT_ADAPTIVE)
def test_outputs_inside_adaptive_steps_are_as_good_as_the_steps(name):
    """200 outputs: their error is of the size of the tolerance, and no steps are added."""
    tolerance = 1e-5 if METHODS[name].order <= 2 else 1e-7
    t = torch.linspace(0.0, 3.0, 200, dtype=F64)
    how = {"method": name, "rtol": tolerance, "atol": tolerance}
    y = odeint(turn, turn_exact(t[0]), t, **how)
    assert float((y - turn_exact(t)).abs().max()) < LOOSE.get(name, 150) * tolerance


@pytest.mark.parametrize(
    "name, order", [("bosh3", 4), ("tsit5", 5), ("dopri5", 5), ("kencarp4", 4)]
)
def test_order_of_dense_output(name, order):
    """The interpolant of one step from an exact start: its error falls like h^order at least."""
    errors, sizes = [], []
    for h in (0.4, 0.2, 0.1, 0.05):
        start = times(0.3, 0.3 + h)
        options = {"first_step": 10.0}
        solution = odeint(
            turn,
            turn_exact(start[0]),
            start,
            method=name,
            rtol=1e3,
            atol=1e3,
            options=options,
            solution=True,
        )
        assert solution.statistics.accepted == 1
        inside = [0.3 + x * h for x in (0.25, 0.6, 0.9)]
        gaps = [solution.dense(t) - turn_exact(tensor(t))[0] for t in inside]
        errors.append(float(torch.stack(gaps).abs().max()))
        sizes.append(h)
    assert slope(sizes, errors) > order - 0.3


@pytest.mark.parametrize("name", ["dopri5", "dopri8", "bosh3", "kencarp4", "rk4", "gl4"])
def test_dense_matches_values(name):
    t = times(2.0, 1.3, 0.9, 0.0)
    options = {"step_size": 0.05, "interp": "cubic"} if not adaptive(name) else None
    solution = odeint(
        turn, turn_exact(t[0]), t, method=name, options=options, solution=True, rtol=1e-8
    )
    for time, value in zip(t, solution.values, strict=True):
        assert_close(solution.dense(time), value, rtol=0, atol=1e-11)
    for time in (1.7, 0.31):
        assert_close(solution.dense(time), turn_exact(tensor(time))[0], rtol=0, atol=1e-5)


def test_dense_knows_its_span():
    solution = odeint(turn, tensor(1.0, 0.0), times(0.0, 1.0), solution=True)
    with pytest.raises(RuntimeError, match=r"`t` = 1.5 lies outside.*\[0(.0)?, 1(.0)?\]"):
        solution.dense(1.5)


# Options of fixed steps


def test_step_size():
    """Equal steps and a shorter last one; as if the grid was given."""
    y0, counted = turn_exact(tensor(0.0))[0], []

    def v(t, y):
        counted.append(float(t))
        return turn(t, y)

    y = odeint(v, y0, times(0.0, 1.0), method="euler", options={"step_size": 0.3})
    assert counted == pytest.approx([0.0, 0.3, 0.6, 0.9], abs=1e-15)
    want = odeint(turn, y0, times(0.0, 0.3, 0.6, 0.9, 1.0), method="euler")[-1]
    assert_close(y[-1], want, rtol=0, atol=1e-15)


def test_grid_constructor():
    y0, asked = turn_exact(tensor(0.0))[0], []
    t = times(0.0, 0.5, 1.0)
    nodes = times(0.0, 0.1, 0.3, 0.5, 0.7, 1.0)

    def grid(func, y, ts):
        asked.append((func, y, ts))
        return nodes

    for name in ("rk4", "dopri5"):
        y = odeint(turn, y0, t, method=name, options={"grid_constructor": grid})
        want = odeint(turn, y0, nodes, method="rk4") if name == "rk4" else None
        if want is not None:
            assert torch.equal(y, want[[0, 3, 5]])
    assert asked[0][0] is turn and asked[0][1] is y0 and asked[0][2] is t


def test_perturb_looks_just_inside_of_the_steps():
    """The velocity jumps at 1: each step sees its own side, so the solution is exact."""

    def jumping(t, y):
        return torch.where(t < 1.0, 1.0, -3.0).to(y) * torch.ones_like(y)

    t = times(0.0, 0.5, 1.0, 1.5, 2.0)
    for name in ("rk4", "heun2"):
        y = odeint(jumping, tensor(0.0), t, method=name, options={"perturb": True})
        assert_close(y[:, 0], tensor(0.0, 0.5, 1.0, -0.5, -2.0), rtol=0, atol=1e-14)
        y = odeint(jumping, tensor(0.0), t, method=name)
        assert float((y[-1] + 2.0).abs()) > 0.1


# Options of adaptive steps


def told(**options):
    """The lengths of the accepted steps, and the solution at the end."""

    class Told:
        def __init__(self):
            self.starts, self.lengths, self.rejected = [], [], 0

        def __call__(self, t, y):
            return turn(t, y)

        def callback_accept_step(self, t, y, dt):
            self.starts.append(float(t))
            self.lengths.append(abs(float(dt)))

        def callback_reject_step(self, t, y, dt):
            self.rejected += 1

    v = Told()
    t = times(0.0, 3.0)
    y = odeint(v, turn_exact(t[0]), t, rtol=1e-6, atol=1e-6, options=options)
    return v, y[-1]


def test_step_limits_and_the_first_step():
    free, _ = told()
    assert max(free.lengths) > 0.2
    short, y = told(max_step=0.1)
    assert max(short.lengths) <= 0.1 * (1 + 1e-12)
    assert_close(y, turn_exact(times(3.0))[0], rtol=0, atol=1e-6)
    long, _ = told(min_step=0.5)
    assert min(long.lengths[:-1]) >= 0.5 and len(long.lengths) == 6
    first, _ = told(first_step=0.0123)
    assert first.lengths[0] == pytest.approx(0.0123, rel=1e-14)


def test_step_t_is_hit():
    v, y = told(step_t=tensor(0.777, 2.1, 5.0, -1.0))
    ends = [*v.starts[1:], 3.0]
    assert 0.777 in ends and 2.1 in ends
    assert_close(y, turn_exact(times(3.0))[0], rtol=0, atol=2e-5)


@pytest.mark.parametrize("name", ["dopri5", "bosh3", "fehlberg2", "dopri8", "kencarp4"])
def test_jump_t(name):
    """At 1 the slope jumps from 1 to -3: exact, no step rejected, the first slope recomputed."""
    seen = []

    def jumping(t, y):
        seen.append(float(t))
        return torch.where(t < 1.0, 1.0, -3.0).to(y) * torch.ones_like(y)

    for t in (times(0.0, 1.3, 2.0), times(2.0, 0.7, 0.0)):
        y0 = tensor(0.0) if t[0] == 0 else tensor(-2.0)
        options = {"jump_t": tensor(1.0)}
        solution = odeint(jumping, y0, t, method=name, options=options, solution=True)
        assert_close(solution.values[-1], tensor(-2.0) - y0, rtol=0, atol=1e-12)
        middle = tensor(0.1) if t[0] == 0 else tensor(0.7)
        assert_close(solution.values[1], middle, rtol=0, atol=1e-12)
        assert solution.statistics.rejected == 0
    assert 1.0 not in seen


def test_norm_of_the_user():
    """A norm that looks at the first entry only lets the second go wrong."""

    def v(t, y):
        return torch.stack([-y[0], 30 * torch.cos(30 * t)])

    def error(norm, y0):
        y = odeint(v, y0, times(0.0, 2.0), rtol=1e-7, atol=1e-7, options={"norm": norm})
        return abs(float(y[-1][1]) - math.sin(60))

    y0 = tensor(1.0, 0.0)
    everything = error(lambda z: z.abs().max(), y0)
    assert everything < 1e-5 < error(lambda z: z[0].abs(), y0)

    def pair(t, y):
        return v(t, torch.cat(y)).split(1)

    seen = []

    def norm(y):
        seen.append(type(y))
        return torch.cat(y).abs().max()

    t = times(0.0, 2.0)
    got = odeint(pair, y0.split(1), t, rtol=1e-7, atol=1e-7, options={"norm": norm})
    assert set(seen) == {tuple}
    assert abs(float(got[1][-1]) - math.sin(60)) < 1e-5


def test_tolerances_of_each_entry():
    """Tolerances as a tensor, and one for each leaf of a tuple."""

    def error(**tolerances):
        y = odeint(turn, turn_exact(times(0.0))[0], times(0.0, 3.0), **tolerances)
        return float((y[-1] - turn_exact(times(3.0))[0]).abs().max())

    tight = error(rtol=tensor(1e-9, 1e-9), atol=tensor(1e-9, 1e-9))
    assert tight == pytest.approx(error(rtol=1e-9, atol=1e-9), rel=1e-6)
    one = error(rtol=0.0, atol=tensor(1e3, 1e3))
    assert 1e3 * tight < one
    y0 = turn_exact(times(0.0))[0].unbind()

    def pair(t, y):
        return split_turn(t, *y)

    a, _ = odeint(pair, y0, times(0.0, 3.0), rtol=(1e-9, 1e-9), atol=(1e-9, tensor(1e-9)[0]))
    assert_close(a[-1], turn_exact(times(3.0))[0, 0], rtol=0, atol=1e-7)


# The problems of DETEST: Hull, Enright, Fellen, Sedgwick, Comparing numerical methods for ordinary
# differential equations, SIAM J. Numer. Anal. 9, 1972.


def chain(rates_in, rates_out):
    def v(t, y):
        return torch.cat([y.new_zeros(1), rates_in * y[:-1]]) - rates_out * y

    return v


def orbit(t, y):
    x, v = y[:2], y[2:]
    return torch.cat([v, -x / x.square().sum() ** 1.5])


def kepler(e):
    return orbit, [1 - e, 0.0, 0.0, math.sqrt((1 + e) / (1 - e))]


def torus(t, y):
    a, b, c = y.unbind()
    r = torch.sqrt(a * a + b * b)
    return torch.stack([-b - a * c / r, a - b * c / r, a / r])


def bessel(t, y):
    s = t + 1
    return torch.stack([y[1], -(y[1] / s + (1 - 0.25 / s**2) * y[0])])


ONES = torch.ones(9, dtype=F64)
COUNT = torch.arange(1, 10, dtype=F64)
HEAT = torch.diag(torch.full((10,), -2.0, dtype=F64)) + sum(
    torch.diag(torch.ones(9, dtype=F64), k) for k in (-1, 1)
)
FIRST = [1.0, *[0.0] * 9]
DETEST = {
    "A1": (lambda t, y: -y, [1.0]),
    "A2": (lambda t, y: -(y**3) / 2, [1.0]),
    "A3": (lambda t, y: y * torch.cos(t), [1.0]),
    "A4": (lambda t, y: y / 4 * (1 - y / 20), [1.0]),
    "A5": (lambda t, y: (y - t) / (y + t), [4.0]),
    "B1": (
        lambda t, y: torch.stack([2 * (y[0] - y[0] * y[1]), y[0] * y[1] - y[1]]),
        [1.0, 3.0],
    ),
    "B2": (
        lambda t, y: torch.stack([y[1] - y[0], y[0] - 2 * y[1] + y[2], y[1] - y[2]]),
        [2.0, 0.0, 1.0],
    ),
    "B3": (lambda t, y: torch.stack([-y[0], y[0] - y[1] ** 2, y[1] ** 2]), [1.0, 0.0, 0.0]),
    "B4": (torus, [3.0, 0.0, 0.0]),
    "B5": (
        lambda t, y: torch.stack([y[1] * y[2], -y[0] * y[2], -0.51 * y[0] * y[1]]),
        [0.0, 1.0, 1.0],
    ),
    "C1": (chain(ONES, torch.cat([ONES, tensor(0.0)])), FIRST),
    "C2": (chain(COUNT, torch.cat([COUNT, tensor(0.0)])), FIRST),
    "C3": (lambda t, y: HEAT @ y, FIRST),
    "D1": kepler(0.1),
    "D2": kepler(0.3),
    "E1": (bessel, [0.6713967071418030, 0.09540051444747446]),
    "E2": (lambda t, y: torch.stack([y[1], (1 - y[0] ** 2) * y[1] - y[0]]), [2.0, 0.0]),
    "E3": (
        lambda t, y: torch.stack([y[1], y[0] ** 3 / 6 - y[0] + 2 * torch.sin(2.78535 * t)]),
        [0.0, 0.0],
    ),
    "E4": (lambda t, y: torch.stack([y[1], 0.032 - 0.4 * y[1] ** 2]), [30.0, 0.0]),
    "E5": (lambda t, y: torch.stack([y[1], torch.sqrt(1 + y[1] ** 2) / (25 - t)]), [0.0, 0.0]),
}


@cache
def reference(problem, stop):
    v, y0 = DETEST[problem]

    def f(t, y):
        return v(torch.tensor(t, dtype=F64), torch.from_numpy(y)).numpy()

    result = solve_ivp(f, (0.0, stop), y0, method="DOP853", rtol=1e-12, atol=1e-12)
    return torch.from_numpy(result.y[:, -1].copy())


@pytest.mark.parametrize("problem", DETEST)
def test_detest(problem):
    """The error at the end is below 50 times the tolerance: it grows along 10 units of time."""
    v, y0 = DETEST[problem]
    want = reference(problem, 10.0)
    for name in ("dopri5", "tsit5", "dopri8"):
        for tolerance in (1e-6, 1e-9):
            how = {"method": name, "rtol": tolerance, "atol": tolerance}
            y = odeint(v, torch.tensor(y0, dtype=F64), times(0.0, 10.0), **how)[-1]
            error = float(((y - want).abs() / (1 + want.abs())).max())
            # orbits: errors grow along them; SciPy's RK45 has 163 and 112 times the tolerance 1e-6
            factor = 250 if problem in ("D1", "D2") else 50
            assert error < factor * tolerance, (name, tolerance, error / tolerance)


# Quadratures


def rate(t, y, dy):
    return {"work": (y * dy).sum(-1), "wave": torch.sin(3 * t).reshape(()) * y[:, 0] ** 2}


@cache
def quadrature_reference(stop):
    def f(t, s):
        y = torch.from_numpy(s[:2])[None]
        tt = torch.tensor(t, dtype=F64)
        dy = drifting(tt, y)
        rates = rate(tt, y, dy)
        return np.array([*dy[0], rates["work"][0], rates["wave"][0]])

    s = solve_ivp(f, (0, stop), [0.4, -0.3, 0.0, 0.0], method="DOP853", rtol=3e-14, atol=1e-15)
    return tensor(*s.y[2:, -1])


def drifting(t, y):
    a, b = y.unbind(-1)
    return torch.stack([torch.sin(b + t) + 0.3 * a, -torch.cos(a) + b * torch.sin(2 * t)], -1)


QUADRATURES = {"euler": 1, "midpoint": 2, "rk4": 4, "bosh3": 3, "dopri5": 5, "tsit5": 5}
QUADRATURES |= {"dopri8": 8, "gl4": 4, "gl6": 6, "radauIIA5": 5, "explicit_adams": 4}


@pytest.mark.parametrize("name", QUADRATURES)
def test_quadratures_have_the_order_of_the_method(name):
    """On fixed steps. A better rate than the method's would be welcome, and euler's has one."""
    order, errors, sizes = METHODS[name].order, [], []
    steps = {8: (10, 14, 20, 28), 6: (12, 16, 24, 32), 5: (24, 48, 96)}.get(order, (48, 96, 192))
    for n in steps:
        _, sums = odeint(
            drifting,
            tensor(0.4, -0.3)[None],
            times(0.0, 3.0),
            method=name,
            quadrature=rate,
            options={"step_size": 3.0 / n},
        )
        got = torch.stack([sums["work"][-1, 0], sums["wave"][-1, 0]])
        errors.append(float((got - quadrature_reference(3.0)).abs().max()))
        sizes.append(3.0 / n)
    assert slope(sizes, errors) == pytest.approx(order, abs=0.35 if order < 8 else 1.0)


@pytest.mark.parametrize("name", ADAPTIVE)
@pytest.mark.parametrize("batch", ["shared", "independent"])
def test_quadratures_of_adaptive_steps(batch, name):
    """The integrals are as accurate as the state, also at outputs inside the steps."""
    tolerance = 1e-5 if METHODS[name].order <= 2 else 1e-7
    y0 = tensor(0.4, -0.3).expand(2, 2)
    t = times(0.0, 1.1, 3.0)

    def rates(t, y, dy):
        t = t.flatten() if t.ndim else t
        return {"work": (y * dy).sum(-1), "wave": torch.sin(3 * t) * y[:, 0] ** 2}

    def v(t, y):
        t = t.flatten() if t.ndim else t
        return drifting(t, y)

    how = {"method": name, "rtol": tolerance, "atol": tolerance, "batch": batch}
    y, sums = odeint(v, y0, t, quadrature=rates, **how)
    got = torch.stack([sums["work"], sums["wave"]], -1)
    assert got.shape == (3, 2, 2)
    assert torch.equal(got[0], torch.zeros(2, 2, dtype=F64))
    for i, stop in ((1, 1.1), (2, 3.0)):
        want = quadrature_reference(stop).expand(2, 2)
        assert_close(got[i], want, rtol=0, atol=LOOSE.get(name, 500) * tolerance)
    half = 0.5 * (y.square().sum(-1) - y0.square().sum(-1))
    assert_close(sums["work"], half, rtol=0, atol=LOOSE.get(name, 500) * tolerance)


def test_quadratures_do_not_change_the_state():
    y0, t = tensor(0.4, -0.3)[None], times(0.0, 1.0, 3.0)
    for name in ("dopri5", "rk4", "kencarp4"):
        options = None if adaptive(name) else {"step_size": 0.1}
        y, _ = odeint(drifting, y0, t, method=name, options=options, quadrature=rate)
        assert torch.equal(y, odeint(drifting, y0, t, method=name, options=options))


def test_evaluations_of_the_rates():
    """Lobatto's rule: both ends of each step are shared, so n steps of rk4 take 2 n + 1."""
    calls = []

    def q(t, y, dy):
        calls.append(float(t))
        return y[:, 0]

    n = 10
    t = torch.linspace(0, 1, n + 1, dtype=F64)
    solution = odeint(
        drifting, tensor(0.4, -0.3)[None], t, method="rk4", quadrature=q, solution=True
    )
    assert len(calls) == 2 * n + 1
    assert sorted(calls) == pytest.approx(torch.linspace(0, 1, 2 * n + 1).tolist(), abs=1e-7)
    # four stages, of which the first is shared with the rate, and one at each middle and the end
    assert solution.statistics.evaluations == 5 * n + 1


def test_a_high_order_without_a_tableau_still_integrates_rates():
    t = torch.linspace(0, 3, 61, dtype=F64)
    _, sums = odeint(
        drifting,
        tensor(0.4, -0.3)[None],
        t,
        method="explicit_adams",
        quadrature=rate,
        options={"max_order": 8},
    )
    assert_close(sums["wave"][-1], quadrature_reference(3.0)[1:], rtol=0, atol=1e-5)


# The whole solution


def test_statistics():
    counted = []

    def v(t, y):
        counted.append(1)
        return turn(t, y)

    t = times(0.0, 1.0, 3.0)
    solution = odeint(v, turn_exact(t[0]), t, rtol=1e-6, atol=1e-6, solution=True)
    stats = solution.statistics
    assert stats.evaluations == len(counted)
    # six for each attempt (first same as last), and two to begin with
    assert stats.evaluations == 6 * (stats.accepted + stats.rejected) + 2
    assert len(solution.pieces) == stats.accepted
    assert 0 < stats.last_step <= 3.0
    assert int(solution.status) == Status.SUCCESS
    assert solution.success and solution.reason == "reached the end"
    assert torch.equal(solution.ts, t)
    time, state = solution.last
    assert float(time) == 3.0 and torch.equal(state, solution.values[-1])
    fixed = odeint(turn, turn_exact(t[0]), t, method="rk4", options={"step_size": 0.1})
    solution = odeint(
        turn, turn_exact(t[0]), t, method="rk4", options={"step_size": 0.1}, solution=True
    )
    assert solution.statistics.accepted == 30 and torch.equal(solution.values, fixed)


def test_evaluations_of_fixed_steps():
    """As many as the method has stages, and none more."""
    for name, per_step, extra in (("euler", 1, 0), ("midpoint", 2, 0), ("rk4", 4, 0)):
        counted = []

        def v(t, y, counted=counted):
            counted.append(1)
            return turn(t, y)

        t = torch.linspace(0, 1, 11, dtype=F64)
        odeint(v, turn_exact(t[0]), t, method=name)
        assert len(counted) == 10 * per_step + extra


# Samples of their own


def stiff_or_slow(t, y):
    """Samples of very different speeds: their rate is the last entry, which stays."""
    a, b, w = y.unbind(-1)
    t = t.reshape(-1) if t.ndim else t
    bend = w * (1 + 0.3 * torch.sin(t) * a)
    return torch.stack([-bend * b, bend * a, torch.zeros_like(w)], -1)


def starts(*speeds):
    return torch.tensor([[1.0, 0.1 * i, w] for i, w in enumerate(speeds)], dtype=F64)


@pytest.mark.parametrize("name", ADAPTIVE)
def test_each_sample_is_its_own_solve(name):
    """As alone, to round-off: fast mates cost accuracy and steps of nobody else."""
    y0 = starts(0.5, 20.0, 3.0, 1.0)
    explicit = METHODS[name].tableau.explicit
    tolerance = 1e-6 if METHODS[name].order > 3 and explicit else 1e-4
    t = times(0.0, 0.4, 1.0)
    how = {"method": name, "rtol": tolerance, "atol": tolerance, "solution": True}
    together = odeint(stiff_or_slow, y0, t, batch="independent", **how)
    pair = odeint(stiff_or_slow, y0[[2, 0]], t, batch="independent", **how)
    atol = apart(name, tolerance)
    assert_close(pair.values, together.values[:, [2, 0]], rtol=0, atol=atol)
    if METHODS[name].tableau.explicit:
        assert torch.equal(pair.statistics.accepted, together.statistics.accepted[[2, 0]])
    for i in range(len(y0)):
        alone = odeint(stiff_or_slow, y0[i : i + 1], t, **how)
        assert_close(together.values[:, i], alone.values[:, 0], rtol=0, atol=atol)
        if METHODS[name].tableau.explicit:
            assert int(together.statistics.accepted[i]) == alone.statistics.accepted
            assert int(together.statistics.rejected[i]) == alone.statistics.rejected
    assert int(together.statistics.accepted[0]) * 4 < int(together.statistics.accepted[1])


def test_independent_ones_of_a_vector_state():
    """A state of shape (batch,)."""
    y0 = tensor(1.0, 2.0, -1.0)
    y = odeint(lambda t, y: -y * y0.abs(), y0, times(0.0, 1.0), batch="independent")
    assert_close(y[-1], y0 * torch.exp(-y0.abs()), rtol=0, atol=1e-6)


ROWS = times(0.0, 0.3, 1.0), times(1.0, 0.2, -0.5), times(-0.4, 0.1, 0.8), times(1.5, 1.0, 0.5)


def apart(name, tolerance):
    """How far a sample may be from its own solve: round-off, unless Newton's method or a
    corrector, which stop for all samples together, solve to a share of the tolerance."""
    tableau = getattr(METHODS[name], "tableau", None)
    return 1e-10 if tableau is not None and tableau.explicit else 30 * tolerance


@pytest.mark.parametrize("name", named())
def test_times_of_each_sample(name):
    """(batch, times), both directions in one batch, against separate solves."""
    t, y0 = torch.stack(ROWS), turn_exact(torch.stack(ROWS)[:, 0])

    def v(t, y):
        return turn(t.reshape(-1) if t.ndim else t, y)

    options = None if adaptive(name) else {"step_size": 0.02}
    tolerance = 1e-4 if METHODS[name].order <= 3 else 1e-6
    how = {"method": name, "rtol": tolerance, "atol": tolerance, "options": options}
    y = odeint(v, y0, t, **how)
    assert y.shape == (3, 4, 2)
    atol = {1: 0.2, 2: 3e-3}.get(METHODS[name].order, 1e-4)
    atol = LOOSE.get(name, 300) * tolerance if adaptive(name) else atol
    assert_close(y, turn_exact(t).transpose(0, 1), rtol=0, atol=atol)
    if adaptive(name):
        for i in range(4):
            alone = odeint(v, y0[i : i + 1], t[i], **how)
            assert_close(y[:, i], alone[:, 0], rtol=0, atol=apart(name, tolerance))


@pytest.mark.parametrize("name", FIXED)
def test_fixed_steps_at_the_times_of_each_sample(name):
    """Without a step size, each sample steps between its own times: as alone, to round-off."""
    t = torch.stack([torch.linspace(float(r[0]), float(r[-1]), 9, dtype=F64) for r in ROWS])
    y0 = turn_exact(t[:, 0])

    def v(t, y):
        return turn(t.reshape(-1) if t.ndim else t, y)

    options = {"max_iters": 30} if name in ("implicit_adams", "fixed_adams") else None
    y = odeint(v, y0, t, method=name, options=options)
    for i in range(4):
        alone = odeint(v, y0[i : i + 1], t[i], method=name, options=options)
        assert_close(y[:, i], alone[:, 0], rtol=0, atol=apart(name, 1e-7))


@pytest.mark.parametrize("name", ["dopri5", "dopri8", "kencarp4", "rk4"])
def test_ragged_times(name):
    """After its last time that counts a sample rests, with a gradient as of its own solve."""
    t = torch.stack(ROWS)
    mask = torch.tensor([[True, True, True], [True, False, False], [True, True, False], [True] * 3])
    junk = torch.where(mask, t, torch.nan)
    options = None if adaptive(name) else {"step_size": 0.01}
    tolerance = 1e-5 if name == "kencarp4" else 1e-7
    how = {"method": name, "options": options, "rtol": tolerance, "atol": tolerance}
    y0 = turn_exact(t[:, 0]).requires_grad_()

    def v(t, y):
        return turn(t.reshape(-1) if t.ndim else t, y)

    y = odeint(v, y0, junk, mask=mask, **how)
    (grad,) = torch.autograd.grad(y.square().sin().sum(), y0)
    for i in range(4):
        count = int(mask[i].sum())
        start = y0[i : i + 1].detach().requires_grad_()
        alone = odeint(v, start, t[i, :count], **how)
        full = torch.cat([alone, alone[-1:].expand(3 - count, -1, -1)])
        atol = apart(name, tolerance) if adaptive(name) else 1e-7  # steps are shared out anew
        assert_close(y[:, i], full[:, 0], rtol=0, atol=atol)
        (want,) = torch.autograd.grad(full.square().sin().sum(), start)
        assert_close(grad[i : i + 1], want, rtol=0, atol=100 * atol)


@pytest.mark.parametrize("gradient", ["discrete", "checkpoint"])
@pytest.mark.parametrize("name", ["dopri5", "dopri8", "kencarp4", "rk4"])
def test_gradients_of_samples_of_their_own(name, gradient):
    """By y0, the times and a shared parameter: those of separate solves, summed."""
    t = torch.stack(ROWS).requires_grad_()
    y0 = turn_exact(t.detach()[:, 0]).requires_grad_()
    theta = tensor(0.7).requires_grad_()

    def v(t, y):
        return turn(t.reshape(-1) if t.ndim else t, y) * theta

    tolerance = 1e-3 if name == "kencarp4" else 1e-7
    how = {"method": name, "gradient": gradient, "rtol": tolerance, "atol": tolerance}
    y = odeint(v, y0, t, **how)
    got = torch.autograd.grad((y * y.detach().cos()).sum(), (y0, t, theta))
    want_theta = torch.zeros_like(theta)
    for i in range(4):
        start, row = y0[i : i + 1].detach().requires_grad_(), t[i].detach().requires_grad_()
        alone = odeint(v, start, row, **how)
        assert_close(y[:, i], alone[:, 0], rtol=0, atol=apart(name, tolerance))
        want = torch.autograd.grad((alone * alone.detach().cos()).sum(), (start, row, theta))
        atol = 100 * apart(name, tolerance)
        assert_close(got[0][i : i + 1], want[0], rtol=0, atol=atol)
        assert_close(got[1][i], want[1], rtol=0, atol=atol)
        want_theta += want[2]
    assert_close(got[2], want_theta, rtol=0, atol=atol)


def test_an_odd_sample_does_not_spoil_the_others():
    """One sample blows up; the others reach their end, with their values and gradients."""
    y0 = tensor(-1.0, 2.0, 0.2)[:, None].requires_grad_()
    how = {"batch": "independent", "rtol": 1e-8, "atol": 1e-8, "solution": True}
    solution = odeint(lambda t, y: y * y, y0, times(0.0, 1.0), **how)
    assert solution.status.tolist()[0] == solution.status.tolist()[2] == Status.SUCCESS
    assert solution.status[1] != Status.SUCCESS
    assert "sample 1" in solution.reason and "t = 0.5" in solution.reason
    end = solution.values[-1]
    exact = y0.detach() / (1 - y0.detach())
    assert_close(end[[0, 2]].detach(), exact[[0, 2]], rtol=1e-6, atol=0)
    assert torch.isnan(end[1]).all()
    (grad,) = torch.autograd.grad(end[[0, 2]].sum(), y0)
    assert_close(grad[[0, 2]], (1 - y0.detach())[[0, 2]] ** -2.0, rtol=1e-5, atol=0)
    assert torch.equal(grad[1], torch.zeros_like(grad[1]))


def test_the_state_may_be_a_parameter_of_autograd_or_not():
    y0: Tensor = tensor(1.0, 2.0)
    assert not odeint(turn, y0, times(0.0, 1.0)).requires_grad
    with torch.no_grad():
        assert not odeint(turn, y0.requires_grad_(), times(0.0, 1.0)).requires_grad
