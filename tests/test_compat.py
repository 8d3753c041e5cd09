"""The stand-in for torchdiffeq against closed forms, and against torchdiffeq where it is there."""

import copy
import math
import warnings
from functools import partial
from itertools import pairwise

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

import pathline.compat.torchdiffeq as ours
from pathline.errors import SolveError, SolveWarning

F32, F64, C64 = torch.float32, torch.float64, torch.complex64
ONE_STEP = ("euler", "midpoint", "heun2", "heun3", "rk4")
ADAMS = ("explicit_adams", "implicit_adams", "fixed_adams")
IMPLICIT = (
    *("implicit_euler", "implicit_midpoint", "trapezoid", "radauIIA3", "radauIIA5"),
    *("gl4", "gl6", "sdirk2", "trbdf2"),
)
FIXED = (*ONE_STEP, *ADAMS, *IMPLICIT)
ADAPTIVE = ("adaptive_heun", "fehlberg2", "bosh3", "tsit5", "dopri5", "dopri8")
SCIPY = "scipy_solver"
METHODS = (*FIXED, *ADAPTIVE, SCIPY)
COMMON_ADAPTIVE = ("adaptive_heun", "fehlberg2", "bosh3", "dopri5", "dopri8")
LOW = {"euler": 0.05, "implicit_euler": 0.05, "explicit_adams": 2e-3, "fehlberg2": 2e-3}

by_method = pytest.mark.parametrize("method", METHODS)
by_way = pytest.mark.parametrize("backward", (False, True), ids=("forth", "back"))
by_interface = pytest.mark.parametrize("interface", ("odeint", "odeint_adjoint"))


@pytest.fixture(scope="module")
def peer():
    """The real one."""
    return pytest.importorskip("torchdiffeq", minversion="0.2.5")


class Driven(nn.Module):
    """dy/dt = -a y^2 cos t, solved by 1 / (1 / y0 + a (sin t - sin t0)); calls are counted."""

    def __init__(self, dtype=F64):
        super().__init__()
        self.a = nn.Parameter(torch.tensor(0.4, dtype=dtype))
        self.calls = 0

    def forward(self, t, y):
        self.calls += 1
        return -self.a * torch.cos(t) * y * y

    def exact(self, t, y0):
        shift = torch.sin(t) - torch.sin(t[0])
        return 1 / (1 / y0 + self.a * shift.view(-1, *(1,) * y0.ndim).to(y0.dtype))


class Turning(nn.Module):
    """A rotation whose speed changes, with a weak cubic term: no closed form, and none needed."""

    def __init__(self):
        super().__init__()
        self.A = nn.Parameter(torch.tensor([[-0.1, 2.0], [-2.0, -0.1]], dtype=F64))
        self.calls = 0

    def forward(self, t, y):
        self.calls += 1
        A = self.A.to(y.dtype)
        return y @ A * torch.cos(t) + 0.1 * torch.sin(3 * t) * y**3


class Pair(nn.Module):
    """A state of two tensors of unlike shapes that drive each other."""

    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.tensor(0.4, dtype=F64))

    def forward(self, t, state):
        x, y = state
        w = self.w.to(x.dtype)
        return w * torch.sin(t) * x - y.sum() * x, torch.cos(2 * t) * y - w * x.mean() * y


class Net(nn.Module):
    """A small network, which may oscillate in time."""

    def __init__(self, width=10, oscillate=False):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(2, width), nn.Tanh(), nn.Linear(width, 2), nn.Tanh())
        self.oscillate = oscillate
        self.calls = 0

    def forward(self, t, y):
        self.calls += 1
        out = self.net(y)
        return out * torch.sin(20 * t) if self.oscillate else out


def start(dtype=F64):
    return torch.tensor([0.9, 0.5, -0.4], dtype=F64).to(dtype)


def times(backward=False, count=26, dtype=F64):
    t = torch.linspace(0.2, 1.4, count, dtype=dtype)
    return t.flip(0) if backward else t


def quiet(function, *args, **kwargs):
    """The result without the warnings of either module."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return function(*args, **kwargs)


def grads(result, velocity, *inputs):
    """Gradients of a bent function of the result for inputs and parameters."""
    parts = result if isinstance(result, tuple) else (result,)
    loss = sum((part**2).sum() + torch.sin(3 * part).sum() for part in parts)
    return torch.autograd.grad(loss, [*inputs, *velocity.parameters()])


# Closed forms


@by_way
@pytest.mark.parametrize("dtype", (F32, F64, C64), ids=str)
@by_method
def test_every_method_solves(method, dtype, backward):
    if method == SCIPY and dtype is C64:
        pytest.skip("LSODA takes real states only")
    velocity = Driven(dtype if dtype is not C64 else F32)
    y0, t = start(dtype), times(backward)  # times in double precision, whatever the state is in
    with torch.no_grad():
        want = velocity.exact(t, y0)
        got = ours.odeint(velocity, y0, t, method=method, rtol=1e-6, atol=1e-6)
    assert got.dtype == dtype and got.shape == (len(t), 3)
    assert torch.equal(got[0], y0)
    tolerance = LOW.get(method, 2e-3 if method in FIXED else 1e-4)
    assert float((got - want).abs().max()) < tolerance


@by_method
def test_one_time_is_the_start(method):
    y0 = start()
    assert torch.equal(
        ours.odeint(Driven().requires_grad_(False), y0, times()[:1], method=method), y0[None]
    )


@by_method
def test_tuples(method):
    """Each tensor of a tuple is solved as it would be alone."""
    velocity = Driven().requires_grad_(False)
    one, two = start(), 0.5 * start()[:, None]

    def both(t, state):
        assert isinstance(state, tuple)
        return tuple(velocity(t, part) for part in state)

    tight = (
        {"rtol": 1e-7, "atol": 1e-8} if method == "adaptive_heun" else {"rtol": 1e-8, "atol": 1e-10}
    )
    got = ours.odeint(both, (one, two), times(), method=method, **tight)
    assert isinstance(got, tuple) and got[1].shape == (26, 3, 1)
    for part, y0 in zip(got, (one, two), strict=True):
        alone = ours.odeint(velocity, y0, times(), method=method, **tight)
        assert_close(part, alone, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("method", [m for m in METHODS if m != SCIPY])
def test_gradcheck(method):
    velocity = Driven()
    y0 = start()[:2].requires_grad_()
    t = times(count=4).requires_grad_()

    call = {"method": method}
    if method in ("adaptive_heun", "bosh3"):  # for speed
        call |= {"rtol": 1e-5, "atol": 1e-6}

    def plain(y0, t, a):
        return ours.odeint(lambda t, y: -a * torch.cos(t) * y * y, y0, t, **call)

    def pair(y0, t):
        def both(t, y):
            return velocity(t, y[0]), y[1] * y[0][0]

        return ours.odeint(both, (y0, y0[:1] ** 2), t, **call)

    # Adaptive steps depend on the inputs too, which finite differences see and the gradient not.
    check = partial(torch.autograd.gradcheck, atol=1e-5, rtol=1e-3 if method in FIXED else 1e-2)
    assert check(plain, (y0, t, velocity.a))
    assert check(pair, (y0, t))


@by_way
@pytest.mark.parametrize("method", ADAPTIVE)
def test_adjoint_against_the_exact_gradient(method, backward):
    velocity = Driven()
    y0 = start().requires_grad_()
    t = times(backward, count=5).requires_grad_()
    tight = {"rtol": 1e-8, "atol": 1e-10}
    if method in ("adaptive_heun", "fehlberg2", "bosh3"):
        tight = {"rtol": 1e-6, "atol": 1e-7}
    got = grads(ours.odeint_adjoint(velocity, y0, t, method=method, **tight), velocity, y0, t)
    want = grads(velocity.exact(t, y0), velocity, y0, t)
    loose = 2e-2 if method == "fehlberg2" else 1e-3  # its estimate of the error is a poor one
    assert_close(got, want, rtol=loose, atol=loose)


def test_unused_parameters_get_zeros_from_the_adjoint():
    class Half(Driven):
        def __init__(self):
            super().__init__()
            self.unused = nn.Linear(2, 5)

    velocity = Half()
    ours.odeint_adjoint(velocity, start(), times()).sum().backward()
    assert not velocity.unused.weight.grad.any() and velocity.a.grad.abs() > 0


@by_interface
@pytest.mark.parametrize("perturb", (True, False))
@pytest.mark.parametrize("method", FIXED)
def test_perturbed_times_stay_inside_of_their_step(method, perturb, interface):
    solve = getattr(ours, interface)
    solve = partial(solve, adjoint_params=()) if interface == "odeint_adjoint" else solve
    y0, seen = torch.tensor([1.0, 2.0], requires_grad=True), []

    def velocity(t, y):
        seen.append(t.item())
        return -y

    options = {"step_size": 0.5, "perturb": perturb}
    ys = solve(velocity, y0, torch.tensor([0.0, 1.0]), method=method, options=options)
    assert bool({0.0, 0.5, 1.0} & set(seen)) == (not perturb)
    if interface == "odeint_adjoint":
        seen.clear()
        ys.sum().backward()
        assert bool({0.0, 0.5, 1.0} & set(seen)) == (not perturb)


@by_interface
@pytest.mark.parametrize("method", ADAPTIVE)
def test_named_jumps_save_evaluations(method, interface):
    solve = getattr(ours, interface)
    counts = []
    for options in (None, {"jump_t": torch.tensor([0.5])}):
        calls = []

        def velocity(t, y, calls=calls):
            calls.append(1)
            return -0.5 * y if t < 0.5 else y**2

        y0 = torch.tensor([1.0, 0.6], dtype=F64, requires_grad=True)
        ys = solve(
            velocity,
            y0,
            torch.tensor([0.0, 1.0]),
            method=method,
            rtol=1e-6,
            atol=1e-6,
            options=options,
        )
        forward = len(calls)
        ys[1].sum().backward()
        counts.append((forward, len(calls) - forward))
        middle = y0.detach() * math.exp(-0.25)
        assert_close(ys[1].detach(), middle / (1 - 0.5 * middle), rtol=2e-3, atol=2e-3)
        slope = math.exp(-0.25) / (1 - 0.5 * middle) ** 2
        assert_close(y0.grad, slope, rtol=1e-2, atol=1e-2)
    assert counts[1][0] < counts[0][0]
    if interface == "odeint_adjoint":
        assert counts[1][1] < counts[0][1]


@by_interface
def test_grid_constructor(interface):
    """It is asked for the grid of the solve, and by the adjoint for one in the other direction."""
    asked = []

    def grid(func, y0, t):
        asked.append(t.tolist())
        return torch.linspace(float(t[0]), float(t[1]), 11)

    y0 = torch.tensor(1.0, requires_grad=True)
    ys = getattr(ours, interface)(
        lambda t, y: y,
        y0,
        torch.tensor([0.0, 1.0]),
        method="euler",
        options={"grid_constructor": grid},
    )
    assert_close(ys[1], torch.tensor(1.1**10))
    ys[1].backward()
    assert_close(y0.grad, torch.tensor(1.1**10))
    assert asked == ([[0.0, 1.0]] if interface == "odeint" else [[0.0, 1.0], [1.0, 0.0]])


@pytest.mark.parametrize("interp", ("linear", "cubic"))
def test_times_on_inner_nodes_keep_their_gradient(interp):
    """A time that happens to be a node of the grid moves its output as any other does."""
    y0, t = start(), torch.linspace(0.0, 1.0, 5, dtype=F64).requires_grad_()
    options = {"step_size": 0.01, "interp": interp}
    ys = ours.odeint(lambda t, y: -y, y0, t, method="rk4", options=options)
    (got,) = torch.autograd.grad(ys.sum(), t)
    want = -ys.detach().sum(1)
    want[0] = -want[1:].sum()
    assert_close(got, want, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("min_step", (0.3, 0.29, 1 / 3, 0.1))
def test_least_step(min_step):
    """Steps no shorter than asked, but the one that lands, are accepted whatever their error."""
    velocity = Turning().requires_grad_(False)
    t = torch.linspace(0.0, 3.0, 4, dtype=F64)
    options = {"min_step": min_step, "max_num_steps": 1000}
    ours.odeint(velocity, start()[:2], t, options=options)
    assert velocity.calls <= 2 + 6 * (math.ceil(3 / min_step) + 4)
    many, velocity.calls = velocity.calls, 0
    ours.odeint(velocity, start()[:2], t)
    assert velocity.calls > many


def test_longest_step():
    velocity = Turning().requires_grad_(False)
    taken = []
    velocity.callback_step = lambda t, y, dt: taken.append(float(dt))
    ours.odeint(velocity, start()[:2], times(), rtol=1e-3, options={"max_step": 0.05})
    assert max(taken) <= 0.05 + 1e-7 and len(taken) >= 24


# Callbacks


@by_interface
@pytest.mark.parametrize("method", (*FIXED, *ADAPTIVE))
def test_callbacks_count_the_steps(method, interface):
    velocity, counts = Net(), {}

    def counter(name):
        def callback(t, y, dt):
            assert isinstance(t, Tensor) and isinstance(dt, Tensor) and y.shape == (2,)
            assert dt > 0
            counts[name] = counts.get(name, 0) + 1

        return callback

    step, accept, reject = "callback_step", "callback_accept_step", "callback_reject_step"
    for name in (step,) if method in FIXED else (step, accept, reject):
        setattr(velocity, name, counter(name))
        back = counter(f"{name}_adjoint")
        if interface == "odeint_adjoint":
            setattr(velocity, f"{name}_adjoint", lambda t, y, dt, f=back: f(t, y[1], dt))
    options = {"step_size": 0.1} if method in FIXED else None
    y0 = torch.tensor([1.0, 2.0], requires_grad=True)
    ys = getattr(ours, interface)(
        velocity, y0, torch.tensor([0.0, 1.0]), method=method, options=options, rtol=1e-4, atol=1e-5
    )
    ys.sum().backward()
    for end in ("",) if interface == "odeint" else ("", "_adjoint"):
        if method in FIXED:
            assert counts[step + end] == 10
        else:
            assert counts[step + end] == counts[accept + end] + counts.get(reject + end, 0) > 0


@pytest.mark.parametrize("name", ("callback_accept_step", "callback_reject_step"))
@pytest.mark.parametrize("method", (*FIXED, SCIPY))
def test_callbacks_that_are_never_called_warn(method, name):
    velocity = Net().requires_grad_(False)
    setattr(velocity, name, lambda t, y, dt: None)
    with pytest.warns(SolveWarning, match=name):
        ours.odeint(velocity, torch.ones(2), torch.tensor([0.0, 1.0]), method=method)


# Norms


def rms(part):
    return part.abs().square().mean().sqrt()


@pytest.mark.parametrize("options", (None, {}, {"norm": "seminorm"}), ids=str)
@pytest.mark.parametrize("shape", ((), (1,), (2, 2)), ids=str)
def test_norm_of_the_adjoint(shape, options):
    """The norm sits where programs look for it, and sees (time, y, p, parameters)."""
    params = (torch.rand(7, requires_grad=True), torch.rand((), requires_grad=True))
    ys = ours.odeint_adjoint(
        lambda t, y: y,
        torch.ones(shape),
        torch.tensor([0.0, 1.0]),
        adjoint_params=params,
        adjoint_options=options,
    )
    place, seen = ys.grad_fn.adjoint_options, []
    norm = place["norm"]

    def spy(parts):
        assert [part.shape for part in parts] == [(), shape, shape, (7,), ()]
        counted = parts[:3] if options else parts
        got = norm(parts)
        assert_close(got, max(rms(part) for part in counted))
        seen.append(got)
        return got

    place["norm"] = spy
    ys.sum().backward()
    assert seen


@pytest.mark.parametrize("options", (None, {}, {"norm": "seminorm"}), ids=str)
def test_norm_of_the_adjoint_of_a_tuple(options):
    params = (torch.rand(7, requires_grad=True), torch.rand((), requires_grad=True))
    y0 = torch.tensor(1.0), torch.tensor([[0.5, 0.5], [0.1, 0.1]])
    solve = partial(ours.odeint_adjoint, lambda t, y: y, y0, torch.tensor([0.0, 1.0]))
    ys = solve(adjoint_params=params, adjoint_options=options)
    node = ys[0].grad_fn
    while not hasattr(node, "adjoint_options"):
        node = node.next_functions[0][0]
    norm, seen = node.adjoint_options["norm"], []

    def spy(parts):
        t, y, p, first, second = parts
        assert y.shape == p.shape == (5,)
        leaves = [t, y[0], y[1:], p[0], p[1:], *(() if options else (first, second))]
        got = norm(parts)
        assert_close(got, max(rms(leaf) for leaf in leaves))
        seen.append(got)
        return got

    node.adjoint_options["norm"] = spy
    ys[0].sum().backward()
    assert seen

    def own(parts):
        shapes = [tuple(part.shape) for part in parts]
        assert shapes == [(), (), (2, 2), (), (2, 2), (7,), ()]
        seen.append(None)
        return parts[1].abs()

    solve(adjoint_params=params, adjoint_options={"norm": own})[0].sum().backward()
    assert seen[-1] is None


@pytest.mark.parametrize("method", ADAPTIVE)
def test_norms_steer_the_steps(method):
    """A norm ten times as large takes more steps; the seminorm takes no more than the full one."""
    t, y0 = torch.tensor([0.0, 1.0], dtype=F64), torch.tensor([1.0, 2.0], dtype=F64)
    velocity = Net(32, oscillate=True).double()
    calls = []
    for scale in (1.0, 10.0):
        velocity.calls = 0
        norm = lambda z, scale=scale: scale * z.abs().max()  # noqa: E731
        ours.odeint(velocity, y0, t, method=method, rtol=1e-5, atol=1e-5, options={"norm": norm})
        calls.append(velocity.calls)
    assert calls[0] < calls[1]
    backward = []
    for options in ({}, {"norm": "seminorm"}):
        ys = ours.odeint_adjoint(
            velocity, y0, t, method=method, rtol=1e-5, atol=1e-5, adjoint_options=options
        )
        velocity.calls = 0
        ys.sum().backward()
        backward.append(velocity.calls)
    assert backward[1] <= backward[0]


# Events


@by_way
@pytest.mark.parametrize("dtype", (F32, F64), ids=str)
@pytest.mark.parametrize("method", [m for m in METHODS if m != SCIPY])
def test_every_method_finds_an_event(method, dtype, backward):
    velocity = Driven(dtype).requires_grad_(False)
    y0 = start(dtype)
    sign = -1.0 if backward else 1.0
    ends = torch.tensor([0.2, 0.2 + sign], dtype=F64)
    happens = torch.tensor([0.2, 0.2 + 0.55 * sign], dtype=F64)
    want = velocity.exact(happens, y0)[1]
    options = {"step_size": 0.01, "interp": "cubic"} if method in FIXED else None

    t, ys = ours.odeint(
        velocity, y0, ends, method=method, options=options, rtol=1e-6, atol=1e-6,
        event_fn=lambda t, y: (y - want).sum(),
    )  # fmt: skip
    loose = 1e-2 if method in ("euler", "implicit_euler") else 3e-4
    assert ys.shape == (2, 3) and torch.equal(ys[0], y0)
    assert float(abs(t - happens[1])) < loose
    assert float((ys[1] - want).abs().max()) < loose


class Ball(nn.Module):
    """Falls, and is thrown back with 9/10 of its speed where it meets the ground."""

    def __init__(self):
        super().__init__()
        self.g = nn.Parameter(torch.tensor(9.8, dtype=F64))
        self.height = nn.Parameter(torch.tensor(10.0, dtype=F64))
        self.t0 = nn.Parameter(torch.tensor(0.3, dtype=F64))

    def forward(self, t, state):
        _, v = state
        return v, -self.g * torch.ones_like(v)

    def bounces(self, module, interface, count, **options):
        """The times of the bounces and the speeds after them."""
        t, out = self.t0, []
        state = self.height.reshape(1), torch.full((1,), -1.0, dtype=F64)
        for _ in range(count):
            t, path = module.odeint_event(
                self, state, t, event_fn=lambda t, y: y[0], atol=1e-10, rtol=1e-8,
                odeint_interface=getattr(module, interface), **options,
            )  # fmt: skip
            x, v = (part[-1] for part in path)
            state = x + 1e-7, -0.9 * v
            out += [t, state[1][0]]
        return torch.stack(out)

    def exact(self, count):
        t, x, v, out = self.t0, self.height, torch.tensor(-1.0, dtype=F64), []
        for _ in range(count):
            t = t + (v + torch.sqrt(v * v + 2 * self.g * x)) / self.g
            v = 0.9 * torch.sqrt(v * v + 2 * self.g * x)
            x = torch.tensor(1e-7, dtype=F64)
            out += [t, v]
        return torch.stack(out)


@by_interface
@pytest.mark.parametrize(
    "options",
    ({}, {"method": "rk4", "options": {"step_size": 0.1, "interp": "cubic"}}),
    ids=("dopri5", "rk4"),
)
def test_gradient_of_a_bouncing_ball(interface, options):
    ball = Ball()
    got, want = ball.bounces(ours, interface, 3, **options), ball.exact(3)
    assert_close(got, want, rtol=1e-7, atol=1e-7)
    weights = torch.linspace(0.5, -1.0, 6, dtype=F64)
    parameters = list(ball.parameters())
    have = torch.autograd.grad(got @ weights, parameters)
    assert_close(have, torch.autograd.grad(want @ weights, parameters), rtol=1e-5, atol=1e-5)


@by_interface
def test_event_in_the_past(interface):
    """y = y0 exp(-a (t - t0)) reaches 2 y0 before t0, by log 2 / a."""
    a = torch.tensor(0.7, dtype=F64, requires_grad=True)
    t0 = torch.tensor(0.4, dtype=F64, requires_grad=True)
    t, ys = ours.odeint_event(
        lambda t, y: -a * y, torch.ones(1, dtype=F64), t0, event_fn=lambda t, y: y[0] - 2.0,
        reverse_time=True, odeint_interface=getattr(ours, interface), atol=1e-10, rtol=1e-8,
    )  # fmt: skip
    want = t0 - math.log(2.0) / a
    assert_close(t, want, rtol=1e-8, atol=1e-8)
    assert_close(ys[1], torch.full((1,), 2.0, dtype=F64), rtol=1e-8, atol=1e-8)
    have = torch.autograd.grad(t, (a, t0), retain_graph=True)
    assert_close(have, torch.autograd.grad(want, (a, t0)), rtol=1e-6, atol=1e-6)
    # The state at the event is where the event is, whatever the parameters are.
    assert_close(
        torch.autograd.grad(ys[1].sum(), a)[0], torch.zeros((), dtype=F64), rtol=0, atol=1e-6
    )


def test_the_first_of_several_events():
    t, ys = ours.odeint(
        lambda t, y: torch.ones_like(y),
        torch.zeros(2, dtype=F64),
        torch.tensor([0.0, 1.0], dtype=F64),
        event_fn=lambda t, y: torch.stack([y[0] - 2.0, 1.5 - y[1], t - 9.0]),
    )
    assert_close(t, torch.tensor(1.5, dtype=F64))
    assert_close(ys[1], torch.full((2,), 1.5, dtype=F64))


# What goes wrong


def test_failures_are_assertions():
    def blows_up(t, y):
        return y**2

    for catch in (AssertionError, SolveError):
        with pytest.raises(catch):
            ours.odeint(blows_up, torch.ones(1, dtype=F64), torch.tensor([0.0, 2.0], dtype=F64))
    with pytest.raises(AssertionError, match="max_num_steps"):
        ours.odeint(Driven(), start(), times()[:2] * 5, options={"max_num_steps": 1})
    with pytest.raises(ValueError, match="dopri5"):
        ours.odeint(Driven(), start(), times(), method="dopri6")
    with pytest.raises(ValueError, match="strictly"):
        ours.odeint(Driven(), start(), torch.tensor([0.0, 1.0, 0.5]))
    with pytest.raises(ValueError, match="grid_constructor"):
        options = {"step_size": 0.1, "grid_constructor": lambda f, y, t: t}
        ours.odeint(Driven(), start(), times(), method="rk4", options=options)
    with pytest.raises(ValueError, match="adjoint_options"):
        ours.odeint_adjoint(
            Driven(),
            start(),
            times(),
            method="dopri5",
            options={"safety": 0.8},
            adjoint_method="bosh3",
        )


@pytest.mark.parametrize(
    "name, method", (("step_size", "dopri5"), ("first_step", "rk4"), ("typo", "bosh3"))
)
def test_options_of_other_methods_warn_and_do_nothing(name, method):
    velocity = Driven().requires_grad_(False)
    want = ours.odeint(velocity, start(), times(), method=method)
    with pytest.warns(SolveWarning, match=name):
        got = ours.odeint(velocity, start(), times(), method=method, options={name: 0.1})
    assert torch.equal(got, want)


def test_fixed_steps_may_end_in_what_is_not_finite():
    ys = ours.odeint(
        lambda t, y: y * math.nan if t > 0.3 else y, torch.ones(1), times(), method="euler"
    )
    assert ys[0].isfinite().all() and ys[-1].isnan().all()


# The two side by side


OPTIONS = {
    "none": {},
    "step_size": {"step_size": 0.073},
    "cubic": {"step_size": 0.073, "interp": "cubic"},
    "grid": {
        "grid_constructor": lambda f, y, t: torch.cat([t[:1], 0.5 * (t[1:] + t[:-1]), t[-1:]])
    },
    "perturb": {"step_size": 0.073, "perturb": True},
}


@by_way
@pytest.mark.parametrize("dtype", (F32, F64), ids=str)
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("method", ONE_STEP)
def test_fixed_steps_are_the_same_to_round_off(peer, method, options, dtype, backward):
    results, calls = [], []
    for module in (ours, peer):
        velocity = Turning()
        y0 = start(dtype)[:2].requires_grad_()
        t = times(backward, count=9, dtype=dtype).requires_grad_()
        ys = module.odeint(velocity, y0, t, method=method, options=dict(options))
        calls.append(velocity.calls)
        results.append((ys, *grads(ys, velocity, y0, t)))
    # Times in single precision differ in the last bit, and gradients of t divide by differences.
    tight = 1e-11 if dtype is F64 else 1e-4
    assert_close(*results, rtol=tight, atol=tight)
    assert calls[0] <= calls[1]


@by_way
@pytest.mark.parametrize("dtype", (F32, F64), ids=str)
@pytest.mark.parametrize("method", COMMON_ADAPTIVE)
def test_adaptive_methods_agree(peer, method, dtype, backward):
    """Both to the tolerance, for as many evaluations; our gradients are the closer ones."""

    def solve(module, method, **tolerances):
        velocity = Turning()
        y0 = start(dtype)[:2].requires_grad_()
        t = times(backward, count=6).requires_grad_()
        ys = module.odeint(velocity, y0, t, method=method, **tolerances)
        calls = velocity.calls
        return ys.detach(), grads(ys, velocity, y0, t), calls

    ys, got, calls = solve(ours, method, rtol=1e-5, atol=1e-6)
    their_ys, theirs, their_calls = solve(peer, method, rtol=1e-5, atol=1e-6)
    want_ys, want, _ = solve(ours, "dopri8", rtol=1e-7, atol=1e-8)
    loose = 5e-3 if method == "fehlberg2" else 5e-4
    assert_close(ys, their_ys, rtol=loose, atol=loose)
    assert_close(ys, want_ys, rtol=loose, atol=loose)
    for one, other, exact in zip(got, theirs, want, strict=True):
        error, their_error = (float((g - exact).abs().max()) for g in (one, other))
        assert error < 1.5 * their_error + 4 * loose
    if method == "dopri8":  # we end its steps where output is wanted; they interpolate
        assert calls <= 2.5 * their_calls
    elif method in ("dopri5", "bosh3"):  # the others take slopes from before the end of a step
        assert calls <= 1.1 * their_calls


@by_way
@pytest.mark.parametrize("method", ADAMS)
def test_adams_methods_agree(peer, method, backward):
    """Not to round-off: upstream weighs slopes as if there was one more of them."""
    velocity = Turning().requires_grad_(False)
    t, options = times(backward, count=121), {"max_order": 4}
    want = quiet(ours.odeint, velocity, start()[:2], t, method="dopri8", rtol=1e-12, atol=1e-13)
    got = ours.odeint(velocity, start()[:2], t, method=method, options=options)
    theirs = quiet(peer.odeint, velocity, start()[:2], t, method=method, options=options)
    assert_close(got, theirs, rtol=1e-4, atol=1e-5)
    assert (got - want).abs().max() <= 1.1 * (theirs - want).abs().max()


@by_way
def test_scipy_agrees(peer, backward):
    velocity, t = Turning().requires_grad_(False), times(backward)
    for solver in ("LSODA", "RK45", "DOP853"):
        call = dict(method=SCIPY, options={"solver": solver}, rtol=1e-7, atol=1e-9)
        got, want = (quiet(m.odeint, velocity, start()[:2], t, **call) for m in (ours, peer))
        assert_close(got, want, rtol=1e-5, atol=1e-6)


@by_way
@pytest.mark.parametrize("dtype", (F32, F64), ids=str)
@pytest.mark.parametrize("method", ("rk4", "dopri5"))
@by_interface
def test_tuples_agree(peer, interface, method, dtype, backward):
    results = []
    for module in (ours, peer):
        velocity = Pair()
        y0 = (
            torch.tensor([[0.8, -0.3]], dtype=dtype, requires_grad=True),
            torch.tensor([0.5, 0.2, 0.1], dtype=dtype, requires_grad=True),
        )
        t = times(backward, count=5).requires_grad_()
        call = dict(method=method, rtol=(1e-6, 1e-5), atol=(1e-7, torch.full((3,), 1e-6)))
        if interface == "odeint_adjoint":
            call |= dict(adjoint_rtol=1e-6, adjoint_atol=1e-7)
        ys = getattr(module, interface)(velocity, y0, t, **call)
        assert [part.shape for part in ys] == [(5, 1, 2), (5, 3)]
        results.append((*ys, *grads(ys, velocity, *y0, t)))
    tight = 1e-3 if method == "dopri5" else 1e-4 if dtype is F32 else 1e-6
    assert_close(*results, rtol=tight, atol=tight)


CONTROLS = {
    "first_step": {"first_step": 0.2},
    "min_step": {"min_step": 0.11},
    "max_step": {"max_step": 0.05},
    "factors": {"safety": 0.6, "ifactor": 2.0, "dfactor": 0.5},
    "step_t": {"step_t": torch.tensor([0.5, 1.1], dtype=F64)},
    "jump_t": {"jump_t": torch.tensor([0.5, 1.1], dtype=F64)},
    "norm": {"norm": lambda z: z.abs().max()},
    "max_num_steps": {"max_num_steps": 60},
    "dtype": {"dtype": F64},
}


@by_way
@by_interface
@pytest.mark.parametrize("options", CONTROLS.values(), ids=CONTROLS)
def test_controls_agree(peer, options, interface, backward):
    results, calls = [], []
    for module in (ours, peer):
        velocity = Turning()
        y0 = start()[:2].requires_grad_()
        t = times(backward, count=4)
        ys = getattr(module, interface)(
            velocity, y0, t, method="dopri5", rtol=1e-6, atol=1e-7, options=dict(options)
        )
        calls.append(velocity.calls)
        results.append((ys, *grads(ys, velocity, y0)))
    loose = 1e-2 if "min_step" in options else 1e-4
    assert_close(*results, rtol=loose, atol=loose)
    assert calls[0] == pytest.approx(calls[1], rel=0.2, abs=12)


def test_step_limit_counts_between_outputs(peer):
    """A limit for each interval of times, and not for all of them together."""
    velocity = Turning().requires_grad_(False)
    t = torch.linspace(0.0, 10.0, 21, dtype=F64)
    for limit, enough in ((25, True), (2, False)):
        for module in (ours, peer):
            solve = partial(
                module.odeint,
                velocity,
                start()[:2],
                t,
                options={"max_num_steps": limit},
                method="dopri5",
            )
            if enough:
                assert solve().isfinite().all()
            else:
                with pytest.raises(AssertionError):
                    solve()


@by_way
@by_interface
@pytest.mark.parametrize(
    "call",
    (
        {},
        {"method": "rk4", "options": {"step_size": 0.01}},
        {"method": "rk4", "options": {"step_size": 0.01, "interp": "cubic"}},
    ),
    ids=("dopri5", "linear", "cubic"),
)
def test_events_agree(peer, call, interface, backward):
    results = []
    for module in (ours, peer):
        velocity = Turning()
        y0 = start()[:2].requires_grad_()
        t0 = torch.tensor(0.3, dtype=F64, requires_grad=True)
        t, ys = module.odeint_event(
            velocity,
            y0,
            t0,
            event_fn=lambda t, y: y[0] ** 2 - y[1] - 0.1 * t - 0.2,
            reverse_time=backward,
            odeint_interface=getattr(module, interface),
            rtol=1e-8,
            atol=1e-10,
            **copy.deepcopy(call),
        )
        loss = t**2 + torch.sin(ys).sum()
        found = torch.autograd.grad(loss, (y0, t0, *velocity.parameters()))
        results.append((t, ys, *found))
    # The velocity at the event is not quite the slope of the interpolant.
    loose = 1e-5 if not call or call["options"].get("interp") else 1e-2
    assert_close(*results, rtol=loose, atol=loose)


def test_bouncing_balls_agree(peer):
    for interface in ("odeint", "odeint_adjoint"):
        results = []
        for module in (ours, peer):
            ball = Ball()
            path = ball.bounces(module, interface, 3)
            results.append(
                (path, *torch.autograd.grad(path.square().sum(), list(ball.parameters())))
            )
        assert_close(*results, rtol=1e-6, atol=1e-6)


@by_way
def test_dense_outputs_agree(peer, backward):
    velocity = Turning().requires_grad_(False)
    t = times(backward)
    ends = t[0], t[-1]
    paths = [
        module.odeint_dense(velocity, start()[:2], *ends, rtol=1e-8, atol=1e-10, method="dopri5")
        for module in ((ours,) if backward else (ours, peer))  # upstream goes forward only
    ]
    direct = ours.odeint(velocity, start()[:2], t, rtol=1e-8, atol=1e-10)
    for path in paths:
        assert_close(torch.stack([path(x) for x in t[:-1]]), direct[:-1], rtol=1e-6, atol=1e-6)


ADJOINTS = {
    "same": {},
    "method": {"adjoint_method": "bosh3", "adjoint_options": {}},
    "tolerances": {"adjoint_rtol": 1e-5, "adjoint_atol": 1e-6},
    "options": {"adjoint_options": {"max_step": 0.1}},
    "seminorm": {"adjoint_options": {"norm": "seminorm"}},
    "norm": {"adjoint_options": {"norm": lambda parts: max(part.abs().max() for part in parts)}},
}


@by_way
@pytest.mark.parametrize("call", ADJOINTS.values(), ids=ADJOINTS)
@pytest.mark.parametrize("method", ("dopri5", "rk4"))
def test_adjoints_agree(peer, method, call, backward):
    if method == "rk4" and "max_step" in call.get("adjoint_options", {}):
        pytest.skip("an option of adaptive methods")
    results, calls = [], []
    for module in (ours, peer):
        velocity = Turning()
        y0 = start()[:2].requires_grad_()
        t = times(backward, count=5).requires_grad_()
        ys = module.odeint_adjoint(
            velocity, y0, t, method=method, rtol=1e-6, atol=1e-7, **copy.deepcopy(call)
        )
        velocity.calls = 0
        results.append((ys, *grads(ys, velocity, y0, t)))
        calls.append(velocity.calls)
    # The same equation by the same method: to round-off where steps are fixed.
    loose = 1e-3 if method == "dopri5" or "adjoint_method" in call else 1e-10
    assert_close(*results, rtol=loose, atol=loose)
    assert calls[0] <= 1.25 * calls[1]


def test_adjoint_params_agree(peer):
    """Only what is named gets a gradient."""
    for module in (ours, peer):
        a, b = (torch.tensor(v, dtype=F64, requires_grad=True) for v in (0.7, 0.2))
        y0 = start().requires_grad_()
        ys = module.odeint_adjoint(lambda t, y: -a * y + b, y0, times(), adjoint_params=(a,))  # noqa: B023
        ys.sum().backward()
        assert a.grad is not None and b.grad is None and y0.grad is not None


@by_way
@pytest.mark.parametrize("method", ("rk4", "dopri5"))
def test_callbacks_agree(peer, method, backward):
    logs = []
    for module in (ours, peer):
        velocity, log = Turning().requires_grad_(False), []
        velocity.callback_step = lambda t, y, dt, log=log: log.append(
            (t.item(), dt.item(), *y.tolist())
        )
        options = {"step_size": 0.1} if method == "rk4" else {"first_step": 0.05}
        module.odeint(
            velocity, start()[:2], times(backward, count=3), method=method, options=options,
            rtol=1e-5, atol=1e-6,
        )  # fmt: skip
        logs.append(torch.tensor(log, dtype=F64))
    if method == "rk4":
        assert_close(*logs, rtol=1e-10, atol=1e-10)
    else:  # our last step ends at the last time, theirs goes beyond it
        assert_close(logs[0][:-1], logs[1][: len(logs[0]) - 1], rtol=1e-3, atol=1e-3)


def test_warnings_agree(peer):
    velocity = Driven().requires_grad_(False)
    for method, options in (
        ("rk4", {"first_step": 0.1}),
        ("dopri5", {"step_size": 0.1}),
        ("dopri5", {"typo": 1}),
    ):
        for module in (ours, peer):
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                module.odeint(velocity, start(), times(), method=method, options=options)
            assert len(caught) == 1, (module, method, options)


def train(module, interface, method, iterations=8):
    """A program as one writes it for torchdiffeq: fit a spiral from short pieces of its path."""
    torch.manual_seed(0)
    A = torch.tensor([[-0.1, 2.0], [-2.0, -0.1]])
    t = torch.linspace(0.0, 25.0, 250)
    with torch.no_grad():
        path = module.odeint(
            lambda t, y: (y**3) @ A, torch.tensor([[2.0, 0.0]]), t, method="dopri5"
        )
    net = nn.Sequential(nn.Linear(2, 50), nn.Tanh(), nn.Linear(50, 2))
    for layer in (net[0], net[2]):
        nn.init.normal_(layer.weight, std=0.1)
        nn.init.zeros_(layer.bias)

    class ODEFunc(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = net

        def forward(self, t, y):
            return self.net(y**3)

    func, losses = ODEFunc(), []
    optimizer = torch.optim.RMSprop(func.parameters(), lr=1e-3)
    for _ in range(iterations):
        first = torch.randint(0, 240, (20,))
        want = torch.stack([path[first + i] for i in range(10)])
        optimizer.zero_grad()
        got = getattr(module, interface)(func, path[first], t[:10], method=method)
        loss = (got - want).abs().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


@by_interface
@pytest.mark.parametrize("method", ("rk4", "dopri5"))
def test_an_unchanged_program_trains_alike(peer, method, interface):
    got, want = (train(module, interface, method) for module in (ours, peer))
    assert got == pytest.approx(want, rel=1e-3)
    assert all(b != a for a, b in pairwise(got))


def test_the_same_names(peer):
    for name in peer.__dict__:
        if name.startswith("odeint"):
            assert callable(getattr(ours, name))
    assert ours.__version__ == peer.__version__
