"""Gradients against closed forms, differences and each other, for every strategy."""

import gc
import math
import resource
import warnings
import weakref
from functools import cache, partial

import numpy as np
import pytest
import torch
from scipy.linalg import expm, expm_frechet
from torch import nn
from torch.autograd import gradcheck, gradgradcheck
from torch.autograd.graph import saved_tensors_hooks
from torch.testing import assert_close

from pathline.errors import ArgumentError, SolveError, SolveWarning
from pathline.integrate import METHODS, odeint
from pathline.integrate.imex import ImexRungeKutta

F64 = torch.float64
ALL = ["discrete", "checkpoint", "reversible", "adjoint"]


def tensor(*values):
    return torch.tensor(values, dtype=F64)


def special(name):
    """Methods that do not take any velocity have tests of their own."""
    return name in ("leapfrog", "verlet") or isinstance(METHODS[name], ImexRungeKutta)


def named():
    skip = pytest.mark.skip(reason="needs a special velocity")
    return [pytest.param(name, marks=skip) if special(name) else name for name in METHODS]


def adaptive(name):
    return bool(getattr(METHODS[name], "adaptive", False))


def explicit(name):
    tableau = getattr(METHODS[name], "tableau", None)
    return tableau is None or tableau.explicit


class Net(nn.Module):
    """A small smooth velocity, depending on time."""

    def __init__(self, dim=2, width=6):
        super().__init__()
        self.a = nn.Linear(dim + 1, width, dtype=F64)
        self.b = nn.Linear(width, dim, dtype=F64)

    def forward(self, t, y):
        time = t.expand(*y.shape[:-1], 1)
        return self.b(torch.tanh(self.a(torch.cat([y, time.to(y)], -1))))


START = torch.tensor([[1.0, -0.5], [0.3, 0.8], [-0.7, 0.1]], dtype=F64)
GRID = tensor(0.0, 0.3, 0.45, 0.9, 1.2)


def method_of(gradient, default="rk4"):
    return "asynchronous_leapfrog" if gradient == "reversible" else default


# Differences


CHECKED = [
    ("rk4", {}, "discrete"),
    ("rk4", {}, "checkpoint"),
    ("dopri5", {}, "discrete"),
    ("dopri5", {}, "checkpoint"),
    ("dopri8", {}, "checkpoint"),
    ("gl4", {}, "checkpoint"),
    ("explicit_adams", {}, "checkpoint"),
    ("reversible_midpoint", {}, "checkpoint"),
]


@pytest.mark.parametrize("name, options, gradient", CHECKED)
def test_gradcheck(name, options, gradient):
    """By the state, the times and a parameter, first and second derivatives.

    Step sizes don't feel the derivatives (they are frozen): the adaptive method steps at t.
    """
    options = {"step_size": 0.4} if adaptive(name) else options

    def solve(y0, t, theta):
        def v(s, y):
            return theta[0] * torch.sin(y.flip(-1) + s) - theta[1] * y**2

        return odeint(v, y0, t, method=name, gradient=gradient, options=options)

    inputs = [START[:1].clone(), tensor(0.0, 0.6, 1.1), tensor(0.8, 0.3)]
    inputs = [x.requires_grad_() for x in inputs]
    # differences of 1e-6 leave an error of 1e-9 or so; Newton's method is exact to round-off
    assert gradcheck(solve, inputs, atol=1e-7)
    assert gradgradcheck(solve, inputs, atol=1e-6)


@pytest.mark.parametrize("gradient", ["discrete", "checkpoint", "adjoint"])
def test_times_that_are_nodes(gradient):
    """An output at the end of a step moves with its time, along the chord of that step."""
    t = tensor(0.0, 0.5, 1.0).requires_grad_()
    options = {"step_size": 0.01}
    y = odeint(lambda t, y: -y, tensor(1.0), t, method="rk4", gradient=gradient, options=options)
    (got,) = torch.autograd.grad(y[1].sum(), t)
    assert_close(got, tensor(math.exp(-0.5), -math.exp(-0.5), 0.0), rtol=1e-2, atol=0)


@pytest.mark.parametrize("gradient", ["discrete", "checkpoint"])
@pytest.mark.parametrize("name", ["dopri5", "dopri8"])
def test_gradcheck_of_adaptive_steps(name, gradient):
    """The gradient ignores how the steps were chosen, which is of the size of the tolerance."""
    net = Net()

    def solve(y0, t):
        how = {"rtol": 1e-9, "atol": 1e-9}
        return odeint(net, y0, t, method=name, gradient=gradient, **how)

    y0, t = START[:1].clone().requires_grad_(), tensor(0.0, 0.4, 1.0).requires_grad_()
    assert gradcheck(solve, (y0, t), eps=1e-4, atol=1e-5)


def test_taylor_remainder():
    """|J(theta + eps d) - J - eps g.d| falls like eps^2."""
    net = Net()
    params = list(net.parameters())
    directions = [torch.randn_like(p) for p in params]

    def loss():
        return odeint(net, START, GRID, method="rk4").sin().sum()

    value = loss()
    grads = torch.autograd.grad(value, params)
    along = sum(float((g * d).sum()) for g, d in zip(grads, directions, strict=True))
    sizes, rests = [1e-2, 1e-3, 1e-4], []
    for eps in sizes:
        with torch.no_grad():
            for p, d in zip(params, directions, strict=True):
                p.add_(d, alpha=eps)
            rests.append(abs(float(loss() - value) - eps * along))
            for p, d in zip(params, directions, strict=True):
                p.sub_(d, alpha=eps)
    assert np.polyfit(np.log(sizes), np.log(rests), 1)[0] == pytest.approx(2.0, abs=0.1)


# Closed forms


def test_euler_on_a_scalar_equation():
    """u' = theta u: the discrete gradient is (u_N - y) N h (1 + h theta)^(N - 1) u_0, exactly."""
    u0, target, steps, stop = 1.3, 0.4, 17, 0.9
    h = stop / steps
    theta = tensor(-0.8).requires_grad_()
    for gradient in ("discrete", "checkpoint"):
        t = torch.linspace(0, stop, steps + 1, dtype=F64)
        u = odeint(lambda t, u: theta * u, tensor(u0), t, method="euler", gradient=gradient)
        (got,) = torch.autograd.grad(0.5 * (u[-1] - target).square().sum(), theta)
        factor = 1 - 0.8 * h
        want = (u0 * factor**steps - target) * steps * h * factor ** (steps - 1) * u0
        assert float(got) == pytest.approx(want, rel=1e-13)


@pytest.mark.parametrize("gradient", ["discrete", "checkpoint", "adjoint"])
@pytest.mark.parametrize("name", ["dopri5", "dopri8"])
def test_linear_equation(name, gradient):
    """dJ/dA by the Frechet derivative of the exponential; dJ/du0 and dJ/dT in closed form."""
    A = torch.tensor([[-0.3, 1.2, 0.1], [-0.9, -0.2, 0.4], [0.2, -0.5, 0.1]], dtype=F64)
    A.requires_grad_()
    u0, target = tensor(1.0, -0.5, 0.7).requires_grad_(), tensor(0.2, 0.1, -0.4)
    t = tensor(0.0, 1.7).requires_grad_()
    u = odeint(lambda t, u: A @ u, u0, t, method=name, gradient=gradient, rtol=1e-10, atol=1e-11)
    got = torch.autograd.grad(0.5 * (u[-1] - target).square().sum(), (A, u0, t))
    a, start = A.detach().numpy(), u0.detach().numpy()
    flow = expm(1.7 * a)
    p = flow @ start - target.numpy()
    want = np.empty((3, 3))
    for i in range(3):
        for j in range(3):
            unit = np.zeros((3, 3))
            unit[i, j] = 1.7
            want[i, j] = p @ expm_frechet(1.7 * a, unit, compute_expm=False) @ start
    assert_close(got[0], torch.from_numpy(want), rtol=0, atol=1e-8)
    assert_close(got[1], torch.from_numpy(flow.T @ p), rtol=0, atol=1e-8)
    speed = float(p @ a @ flow @ start)
    assert_close(got[2], tensor(-speed, speed), rtol=0, atol=1e-8)


# Checkpoint: the same bits


def grads_of(name, gradient, *, t=None, dtype=F64, **how):
    torch.manual_seed(3)
    net = Net().to(dtype)
    y0 = START.to(dtype).clone().requires_grad_()
    t = GRID if t is None else t
    t = t.clone().requires_grad_()
    how.setdefault("rtol", 1e-5)
    how.setdefault("atol", 1e-6)
    y = odeint(net, y0, t, method=name, gradient=gradient, **how)
    values = y[0] if isinstance(y, tuple) else y
    loss = (values.sin() * (1 + values)).sum()
    if isinstance(y, tuple):
        loss = loss + y[1].cos().sum()
    return [values.detach(), *torch.autograd.grad(loss, [y0, t, *net.parameters()])]


def same_bits(first, second):
    return all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


BUDGETS = [{}, {"segments": 1}, {"segments": 2}, {"segments": 5}, {"memory": "1MB"}]
BUDGETS += [{"memory": 20_000}]


@pytest.mark.parametrize("budget", BUDGETS, ids=str)
@pytest.mark.parametrize("name", [n for n in METHODS if explicit(n) and not special(n)])
def test_checkpoint_has_the_same_bits(name, budget):
    t = torch.linspace(0.0, 1.2, 13, dtype=F64)
    assert same_bits(grads_of(name, "discrete", t=t), grads_of(name, "checkpoint", t=t, **budget))


@pytest.mark.parametrize("budget", [{}, {"segments": 2}], ids=str)
@pytest.mark.parametrize("name", [n for n in METHODS if not explicit(n) and not special(n)])
def test_checkpoint_of_implicit_methods_has_the_same_bits(name, budget):
    how = {} if not adaptive(name) else {"rtol": 1e-3, "atol": 1e-3}
    assert same_bits(
        grads_of(name, "discrete", **how), grads_of(name, "checkpoint", **how, **budget)
    )


SETTINGS = {
    "independent": {"name": "dopri5", "batch": "independent"},
    "independent, landing on outputs": {"name": "dopri8", "batch": "independent"},
    "quadrature": {"name": "dopri5", "quadrature": lambda t, y, dy: (y * dy).sum(-1)},
    "staged quadrature": {"name": "dopri8", "quadrature": lambda t, y, dy: (y * dy).sum(-1)},
    "quadrature of fixed steps": {
        "name": "rk4",
        "quadrature": lambda t, y, dy: dy.square().sum(-1),
    },
    "independent quadrature": {
        "name": "bosh3",
        "batch": "independent",
        "quadrature": lambda t, y, dy: (y * dy).sum(-1),
    },
    "cubic outputs": {"name": "rk4", "options": {"step_size": 0.11, "interp": "cubic"}},
    "linear outputs": {"name": "heun2", "options": {"step_size": 0.11}},
    "stops": {"name": "tsit5", "options": {"step_t": tensor(0.2), "jump_t": tensor(0.77)}},
    "short first step": {"name": "dopri5", "options": {"first_step": 100.0, "max_step": 5.0}},
    "single precision": {"name": "dopri5", "dtype": torch.float32},
    "backward": {"name": "dopri5", "t": GRID.flip(0)},
}


@pytest.mark.parametrize("budget", [{}, {"segments": 3}, {"memory": "100KB"}], ids=str)
@pytest.mark.parametrize("setting", SETTINGS)
def test_checkpoint_has_the_same_bits_in_every_setting(setting, budget):
    how = dict(SETTINGS[setting])
    name = how.pop("name")
    assert same_bits(
        grads_of(name, "discrete", **how), grads_of(name, "checkpoint", **how, **budget)
    )


def test_checkpoint_of_ragged_times_has_the_same_bits():
    t = torch.stack([GRID, 1 - GRID, GRID * 0.3])
    mask = torch.ones_like(t, dtype=torch.bool)
    mask[1, 3:] = False
    how = {"t": t, "mask": mask, "rtol": 1e-3, "atol": 1e-4}
    for name in ("dopri5", "bosh3", "dopri8", "rk4", "reversible_midpoint"):
        assert same_bits(grads_of(name, "discrete", **how), grads_of(name, "checkpoint", **how))


# Checkpoint: work and memory


class Counting:
    def __init__(self, func):
        self.func, self.count = func, 0

    def __call__(self, t, y):
        self.count += 1
        return self.func(t, y)


@cache
def brute_force(length, slots):
    """Advances that reverse `length` steps with `slots` states, the first of them stored.

    By the recursion itself: advance m steps, store, reverse the rest, then the first m (Griewank
    and Walther, ACM TOMS 26, 2000).
    """
    if length <= 1:
        return 0
    if slots == 1:
        return length * (length - 1) // 2
    return min(
        m + brute_force(length - m, slots - 1) + brute_force(m, slots) for m in range(1, length)
    )


@pytest.mark.parametrize("slots", [1, 2, 3, 5, 8])
@pytest.mark.parametrize("steps", [2, 9, 20, 35])
def test_recomputations_are_as_few_as_can_be(steps, slots):
    """Beside one recomputation of each step with a graph, the advances of the optimal schedule.

    A budget that fits `slots` states and one step, but not all states.
    """
    theta = tensor(0.3).requires_grad_()
    v = Counting(lambda t, y: torch.sin(theta * y))
    t = torch.linspace(0, 1, steps + 1, dtype=F64)

    def solve(**how):
        y0 = torch.ones(500, dtype=F64).requires_grad_()
        return odeint(v, y0, t, method="euler", gradient="checkpoint", solution=True, **how)

    plan = solve(memory="1GB").plan
    memory = plan.step_bytes + slots * plan.state_bytes + 8
    v.count = 0
    solution = solve(memory=memory)
    forward, plan = v.count, solution.plan
    solution.values[-1].sum().backward()
    if plan.width > 1:
        pytest.skip("the plan runs several steps again at a time")
    # `steps` recorded ones: the start counts as one of them
    count = plan.steps
    assert plan.slots >= min(slots, count)
    best = brute_force(count, min(plan.slots, count))
    extra = v.count - forward
    assert extra <= count + best
    assert extra >= count - 1


@pytest.mark.parametrize("steps", [16, 128, 300])
@pytest.mark.parametrize("memory", [300_000, "1MB"])
def test_the_budget_is_kept(memory, steps):
    """By the plan, and by a count of the states and saved tensors that are alive."""
    from pathline.integrate.checkpoint import Checkpoint, read_bytes

    torch.manual_seed(0)
    net = Net()
    most = 0
    original = Checkpoint._recompute

    def watched(self, n):
        nonlocal most
        original(self, n)
        stored = {
            x.untyped_storage().data_ptr(): x.untyped_storage().nbytes()
            for state in self.states.values()
            for x in leaves(state)
        }
        saved = {
            x.untyped_storage().data_ptr(): x.untyped_storage().nbytes()
            for step in self.again.values()
            for x in step.values()
            if not isinstance(x, nn.Parameter)
        }
        parameters = {p.untyped_storage().data_ptr() for p in net.parameters()}
        most = max(
            most, sum(size for key, size in (stored | saved).items() if key not in parameters)
        )

    def leaves(tree):
        return [tree] if isinstance(tree, torch.Tensor) else [x for p in tree for x in leaves(p)]

    y0 = torch.randn(300, 2, dtype=F64, requires_grad=True)
    t = torch.linspace(0, 1, steps + 1, dtype=F64)
    patch = pytest.MonkeyPatch()
    patch.setattr(Checkpoint, "_recompute", watched)
    try:
        how = {"method": "rk4", "gradient": "checkpoint", "memory": memory, "solution": False}
        odeint(net, y0, t, **how).sum().backward()
        plan = odeint(net, y0, t, **{**how, "solution": True}).plan
    finally:
        patch.undo()
    assert plan.bytes <= read_bytes(memory)
    assert 0 < most <= 1.1 * read_bytes(memory)


def saved_bytes(func):
    """The bytes of the tensors that autograd saves during func(), each storage once."""
    boxes = []

    class Box:
        def __init__(self, x):
            self.x = x.detach()  # or an output that is saved would keep its own node alive

    def pack(x):
        box = Box(x)
        boxes.append(weakref.ref(box))
        return box

    with saved_tensors_hooks(pack, lambda box: box.x):
        result = func()
    alive = [box.x.untyped_storage() for ref in boxes if (box := ref()) is not None]
    del result
    return sum({storage.data_ptr(): storage.nbytes() for storage in alive}.values())


def test_growth_of_memory_with_the_steps():
    """Discrete: linear. Checkpoint: below its budget. Reversible and adjoint: flat."""
    torch.manual_seed(0)
    net, sizes = Net(), [16, 128, 1024]
    y0 = torch.randn(100, 2, dtype=F64, requires_grad=True)

    def run(gradient, steps, **how):
        options = {"step_size": 1.0 / steps}
        name = method_of(gradient)
        return odeint(
            net, y0, tensor(0.0, 1.0), method=name, gradient=gradient, options=options, **how
        )

    discrete = [saved_bytes(partial(run, "discrete", n)) for n in sizes]
    slope = np.polyfit(np.log(sizes), np.log(discrete), 1)[0]
    assert slope == pytest.approx(1.0, abs=0.05)
    for gradient in ("reversible", "adjoint"):
        flat = [saved_bytes(partial(run, gradient, n)) for n in sizes]
        # the table of times grows, by a few numbers for a step
        assert flat[-1] <= flat[0] + 64 * sizes[-1], (gradient, flat)
        assert flat[-1] < discrete[0]
    for n in sizes:
        plan = run("checkpoint", n, memory="200KB", solution=True).plan
        assert plan.bytes <= 200_000
        assert "in place of" in str(plan)


# Strategies against each other


@pytest.mark.parametrize("name, order", [("euler", 1), ("midpoint", 2), ("rk4", 4)])
def test_the_adjoint_converges_to_the_discrete_gradient(name, order):
    """At the order of the scheme: optimize-discretize meets discretize-optimize as h -> 0."""
    torch.manual_seed(0)
    net, gaps, sizes = Net(), [], [8, 16, 32]

    def grads(gradient, n):
        y0 = START.clone().requires_grad_()
        t = torch.linspace(0, 2, n + 1, dtype=F64)
        y = odeint(
            net, y0, t[[0, -1]], method=name, gradient=gradient, options={"step_size": 2 / n}
        )
        return torch.autograd.grad(y[-1].sin().sum(), (y0, *net.parameters()))

    for n in sizes:
        pairs = zip(grads("adjoint", n), grads("discrete", n), strict=True)
        gaps.append(math.sqrt(sum(float((a - b).square().sum()) for a, b in pairs)))
    assert -np.polyfit(np.log(sizes), np.log(gaps), 1)[0] == pytest.approx(order, abs=0.3)


@pytest.mark.parametrize("name", ["dopri5", "dopri8", "rk4"])
def test_the_adjoint_of_many_outputs(name):
    """The adjoint jumps at every output; times and parameters have their gradients."""
    t = GRID if adaptive(name) else torch.linspace(0.0, 1.2, 61, dtype=F64)

    def run(gradient):
        return grads_of(name, gradient, t=t, rtol=1e-9, atol=1e-10)

    for a, b in zip(run("discrete"), run("adjoint"), strict=True):
        assert_close(a, b, rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", ["asynchronous_leapfrog", "reversible_midpoint"])
def test_reversible_is_discrete_to_round_off(name):
    for a, b in zip(grads_of(name, "discrete"), grads_of(name, "reversible"), strict=True):
        assert_close(a, b, rtol=0, atol=1e-12)


@pytest.mark.parametrize("gradient", ALL)
def test_velocities_that_differentiate_inside(gradient):
    """v = -grad Phi, by autograd in the velocity; also where gradients are switched off."""
    torch.manual_seed(0)
    phi = nn.Sequential(nn.Linear(2, 8, dtype=F64), nn.Tanh(), nn.Linear(8, 1, dtype=F64))

    def v(t, y):
        with torch.enable_grad():
            y = y if y.requires_grad else y.detach().requires_grad_()
            return -torch.autograd.grad(phi(y).sum(), y, create_graph=True)[0]

    def explicit_v(t, y):
        first, _, last = phi
        slope = 1 - torch.tanh(first(y)).square()
        return -(slope * last.weight) @ first.weight

    def run(func, gradient):
        y0 = START.clone().requires_grad_()
        how = {"method": method_of(gradient), "options": {"step_size": 0.02}, "gradient": gradient}
        y = odeint(func, y0, tensor(0.0, 0.5, 1.0), **how)
        grads = torch.autograd.grad(y.sin().sum(), (y0, phi[0].weight, phi[2].weight))
        return [y.detach(), *grads]

    want = run(explicit_v, "reversible" if gradient == "reversible" else "discrete")
    for a, b in zip(run(v, gradient), want, strict=True):
        assert_close(a, b, rtol=0, atol=1e-6 if gradient == "adjoint" else 1e-11)


@pytest.mark.parametrize("gradient", ALL)
def test_parameters_that_a_closure_holds(gradient):
    net, scale = Net(), tensor(0.7).requires_grad_()

    def run(gradient):
        y0 = START.clone().requires_grad_()
        how = {"method": method_of(gradient), "options": {"step_size": 0.02}, "gradient": gradient}
        y = odeint(lambda t, y: scale * net(t, y), y0, tensor(0.0, 1.0), **how)
        return torch.autograd.grad(y[-1].sum(), (scale, *net.parameters()))

    for a, b in zip(run(gradient), run("discrete"), strict=True):
        assert_close(a, b, rtol=0, atol=1e-3 if gradient == "reversible" else 1e-6)
        assert float(a.abs().max()) > 0


@pytest.mark.parametrize("gradient", ["adjoint", "reversible"])
def test_tensors_computed_before_the_solve_are_not_dropped(gradient):
    scale = tensor(0.7).requires_grad_()
    double = 2 * scale
    how = {"method": method_of(gradient), "gradient": gradient, "options": {"step_size": 0.1}}
    words = 'computed before the solve.*`adjoint_params`.*"discrete" or "checkpoint"'
    with pytest.raises(ArgumentError, match=words):
        odeint(lambda t, y: double * y, tensor(1.0), tensor(0.0, 1.0), **how)
    y = odeint(
        lambda t, y: double * y, tensor(1.0), tensor(0.0, 1.0), adjoint_params=(double,), **how
    )
    (got,) = torch.autograd.grad(y[-1].sum(), scale)
    assert float(got) == pytest.approx(2 * math.exp(1.4), rel=2e-2)


# torch.func, and what can be differentiated once


@pytest.mark.parametrize("gradient", ["discrete", "checkpoint"])
@pytest.mark.parametrize("name", ["rk4", "dopri5", "explicit_adams", "asynchronous_leapfrog"])
def test_torch_func(name, gradient):
    """grad, jacrev, jacfwd, hessian and vmap, against autograd."""
    A = torch.tensor([[0.1, 1.0], [-1.0, -0.2]], dtype=F64)
    t = tensor(0.0, 0.3, 0.6, 1.0)

    def end(y0, theta, gradient=gradient):
        return odeint(
            lambda s, y: theta * torch.tanh(y @ A) + s, y0, t, method=name, gradient=gradient
        )[-1]

    def direct(y0, theta):
        return end(y0, theta, "discrete")

    def loss(y0, theta):
        return end(y0, theta).square().sum()

    def direct_loss(y0, theta):
        return direct(y0, theta).square().sum()

    y0, theta = START[0].clone(), tensor(0.8)[0]
    jacobian = torch.autograd.functional.jacobian(lambda y: direct(y, theta), y0)
    want = torch.autograd.functional.hessian(lambda y: direct_loss(y, theta), y0)
    leaf = theta.clone().requires_grad_()
    (slope,) = torch.autograd.grad(direct_loss(y0, leaf), leaf)

    def quiet(func, *args):
        if gradient == "discrete":
            return func(*args)
        with pytest.warns(SolveWarning, match="can't recompute"):
            return func(*args)

    assert_close(quiet(torch.func.grad(loss, 1), y0, theta), slope, rtol=0, atol=1e-12)
    assert_close(quiet(torch.func.jacrev(end), y0, theta), jacobian, rtol=0, atol=1e-12)
    assert_close(quiet(torch.func.jacfwd(end), y0, theta), jacobian, rtol=0, atol=1e-12)
    assert_close(quiet(torch.func.hessian(loss), y0, theta), want, rtol=0, atol=1e-11)
    if name != "dopri5":
        batched = quiet(torch.func.vmap(end, (0, None)), START, theta)
        each = torch.stack([direct(y, theta) for y in START])
        assert_close(batched, each, rtol=0, atol=1e-12)


def test_adaptive_steps_under_vmap_say_what_to_do():
    with pytest.raises(ArgumentError, match=r'batch="independent".*or take fixed steps'):
        torch.func.vmap(lambda y: odeint(lambda t, y: -y, y, tensor(0.0, 1.0)))(START)


@pytest.mark.parametrize("gradient", ["adjoint", "reversible"])
def test_once_only(gradient):
    how = {"method": method_of(gradient), "gradient": gradient, "options": {"step_size": 0.25}}
    words = f'gradient="{gradient}" can be differentiated once.*"discrete" or "checkpoint"'

    def loss(y0):
        return odeint(lambda t, y: torch.sin(y), y0, tensor(0.0, 1.0), **how)[-1].sum()

    y0 = START.clone().requires_grad_()
    with pytest.raises(SolveError, match=words):
        torch.autograd.grad(loss(y0), y0, create_graph=True)
    for transform in (torch.func.grad, torch.func.jacrev, torch.func.jacfwd):
        with pytest.raises(SolveError, match=words):
            transform(loss)(START)
    with pytest.raises(SolveError, match=words):
        torch.func.vmap(loss)(START)


def test_dropout_under_checkpoint():
    net = nn.Sequential(nn.Linear(2, 2, dtype=F64), nn.Dropout(0.5))
    y0 = START.clone().requires_grad_()

    def solve(gradient):
        return odeint(lambda t, y: net(y), y0, GRID, method="rk4", gradient=gradient)

    with pytest.raises(ArgumentError, match="draws random numbers"):
        solve("checkpoint")
    solve("discrete")
    net.eval()
    assert torch.equal(solve("checkpoint"), solve("discrete"))


def test_backward_twice():
    """A retained graph gives the same gradient again."""
    for gradient in ALL:
        y0 = START.clone().requires_grad_()
        how = {"method": method_of(gradient), "gradient": gradient}
        loss = odeint(Net(), y0, GRID, **how).square().sum()
        (first,) = torch.autograd.grad(loss, y0, retain_graph=True)
        (second,) = torch.autograd.grad(loss, y0)
        assert torch.equal(first, second), gradient


def test_no_gradient_is_asked_for():
    """Without grad mode, and with nothing to differentiate, every strategy gives the values."""
    for gradient in ALL:
        how = {"method": method_of(gradient), "gradient": gradient}
        with torch.no_grad():
            y = odeint(Net(), START, GRID, **how)
        assert not y.requires_grad
        y = odeint(lambda t, y: -y, START, GRID, **how)
        assert not y.requires_grad


# Leaks


def resident():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * resource.getpagesize()


def collected():
    """The objects that survive; nodes of autograd take more than one pass."""
    for _ in range(3):
        gc.collect()
    return len(gc.get_objects())


LEAKS = {gradient: {"gradient": gradient, "method": method_of(gradient)} for gradient in ALL}
LEAKS |= {
    "adaptive": {"gradient": "checkpoint", "method": "bosh3"},
    "adaptive, whole": {"gradient": "checkpoint", "method": "bosh3", "solution": True},
    "adaptive adjoint": {"gradient": "adjoint", "method": "bosh3"},
    "fixed, whole": {"gradient": "checkpoint", "method": "rk4", "solution": True},
    "independent": {"gradient": "checkpoint", "method": "bosh3", "batch": "independent"},
    "implicit": {"gradient": "checkpoint", "method": "implicit_midpoint"},
    "not differentiated": {"gradient": "checkpoint", "method": "bosh3"},
}


@pytest.mark.parametrize("kind", LEAKS)
def test_nothing_is_left_behind(kind):
    """Many solves with their backward passes leave no objects, and no memory to speak of."""
    torch.manual_seed(0)
    net = Net(width=64)
    y0 = torch.randn(150, 2, dtype=F64, requires_grad=True)
    how = {**LEAKS[kind], "rtol": 1.0, "atol": 1.0}

    def once():
        result = odeint(net, y0, tensor(0.0, 0.5, 1.0), **how)
        values = result.values if "whole" in kind else result
        if kind != "not differentiated":
            values.sum().backward()

    rounds = 10 if kind == "implicit" else 60
    for _ in range(5):
        once()
    objects, memory = collected(), resident()
    for _ in range(rounds):
        once()
    assert collected() - objects < rounds
    # what one solve saves, 200 kB or more, would be 12 MB
    assert resident() - memory < 6e6


# Events


@pytest.mark.parametrize("gradient", ["discrete", "adjoint"])
@pytest.mark.parametrize("name", ["dopri5", "dopri8", "kencarp4", "rk4"])
def test_time_of_an_event(name, gradient):
    """A ball falls from h: t* = t0 + sqrt(2 h / g), at the speed sqrt(2 g h)."""
    h, g = tensor(10.0)[0].requires_grad_(), tensor(9.81)[0].requires_grad_()
    t = tensor(0.5, 1.0).requires_grad_()
    y0 = torch.stack([h, torch.zeros_like(h)])
    how = {"method": name, "gradient": gradient, "rtol": 1e-9, "atol": 1e-10}
    if name == "rk4":
        how["options"] = {"step_size": 0.05, "interp": "cubic"}
    if gradient != "adjoint":
        time, y = odeint(
            lambda t, y: torch.stack([y[1], -g]), y0, t, event_fn=lambda t, y: y[0], **how
        )
    else:
        time, y = odeint(
            lambda t, y: torch.stack([y[1], -g + 0 * y[1]]),
            y0,
            t,
            event_fn=lambda t, y: y[0],
            **how,
        )
    height, gravity = 10.0, 9.81
    fall = math.sqrt(2 * height / gravity)
    assert time.item() == pytest.approx(0.5 + fall, abs=1e-8)
    assert_close(y[-1].detach(), tensor(0.0, -gravity * fall), rtol=0, atol=1e-7)
    got = torch.autograd.grad(time, (h, g, t), retain_graph=True)
    assert float(got[0]) == pytest.approx(1 / (gravity * fall), rel=1e-7)
    assert float(got[1]) == pytest.approx(-fall / (2 * gravity), rel=1e-7)
    assert_close(got[2], tensor(1.0, 0.0), rtol=0, atol=1e-7)
    speed = torch.autograd.grad(y[-1, 1], (h, g, t), retain_graph=True)
    assert float(speed[0]) == pytest.approx(-1 / fall, rel=1e-7)
    assert float(speed[1]) == pytest.approx(-fall / 2, rel=1e-7)
    assert_close(speed[2], tensor(0.0, 0.0), rtol=0, atol=1e-7)
    place = torch.autograd.grad(y[-1, 0], (h, g, t))
    for grad in place:  # the event stays where it is
        assert_close(grad, torch.zeros_like(grad), rtol=0, atol=1e-7)


def test_time_of_an_event_backward_and_of_several():
    """The first of several entries to change its sign; also when time runs backward."""
    rate = tensor(0.5)[0].requires_grad_()
    for sign in (1.0, -1.0):
        t = tensor(0.0, sign)
        time, _ = odeint(
            lambda t, y, sign=sign: sign * rate * torch.ones_like(y),
            tensor(0.0, 0.0),
            t,
            event_fn=lambda t, y: y - tensor(3.0, 2.0),
        )
        (grad,) = torch.autograd.grad(time, rate)
        assert time.item() == pytest.approx(sign * 4.0, abs=1e-7)
        assert float(grad) == pytest.approx(-sign * 8.0, rel=1e-6)


def test_the_compared_warnings_are_none():
    """No strategy warns on a plain problem."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for gradient in ALL:
            y0 = START.clone().requires_grad_()
            how = {"method": method_of(gradient), "gradient": gradient}
            odeint(Net(), y0, GRID, **how).sum().backward()
