"""Solves under autocast: round-off, small adjoints, memory, and what the velocity may do."""

import math

import numpy as np
import pytest
import torch
from torch import nn
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode

from pathline.errors import ArgumentError, SolveError
from pathline.integrate.captured import Captured
from pathline.integrate.field import Field, Layout
from pathline.integrate.fixed import FixedMarch
from pathline.integrate.grid import Grid
from pathline.integrate.methods import METHODS
from pathline.integrate.odeint import odeint
from pathline.integrate.precision import Scaling, solve_low_precision
from pathline.integrate.quadrature import Quadrature

F16, BF16, F32, F64 = torch.float16, torch.bfloat16, torch.float32, torch.float64
EXPLICIT = ("euler", "midpoint", "heun2", "heun3", "rk4", "rk4_38")
devices = pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
lows = pytest.mark.parametrize("low", [F16, BF16], ids=["float16", "bfloat16"])


def equal_steps(steps, stop=1.0):
    return torch.linspace(0.0, stop, steps + 1, dtype=F64)


def marching(func, z0, nodes, method="rk4", *, inside=None, **options):
    """The march and its field; by default only the end is an output."""
    field = Field(func, Layout(z0), cast=True)
    grid = Grid(nodes, METHODS[method].offsets, z0)
    inside = [()] * (len(grid) - 1) + [(1.0,)] if inside is None else inside
    return FixedMarch(METHODS[method], field, grid, inside, **options)


def solve(func, z0, nodes, method="rk4", *, low, params=None, scaling=True, shift=0, **options):
    """The outputs in low precision; `low=None` is the direct loop in the precision of z0."""
    march = marching(func, z0, nodes, method, **options)
    if low is None:
        state = march.begin(z0)
        outputs = [z0]
        for n in range(len(march.grid)):
            state, outs = march.step(n, state)
            outputs += [z for z, _ in outs]
        return outputs
    with torch.autocast(z0.device.type, dtype=low):
        captured = Captured(march.field, march.grid.ends[0], z0, params)
        outputs = solve_low_precision(march, z0, captured, scaling=scaling, shift=shift)
    assert all(sums == () for _, sums in outputs)
    return [z for z, _ in outputs]


def network(device="cpu"):
    return nn.Sequential(nn.Linear(8, 32), nn.Tanh(), nn.Linear(32, 8)).to(device)


def network_gradients(net, x, *, low, weight=1.0, **options):
    """A loss on the end and on the middle of 32 steps; its gradients for z0 and parameters."""
    z0 = x.clone().requires_grad_()
    inside = [(1.0,) if n in (15, 31) else () for n in range(32)]
    zs = solve(lambda t, z: net(z), z0, equal_steps(32), low=low, inside=inside, **options)
    loss = weight * sum(((z - 1) ** 2).sum(1).mean() for z in zs[1:])
    return torch.autograd.grad(loss, [z0, *net.parameters()])


def distance(x, y):
    """Relative, in the Euclidean norm."""
    return ((x - y).norm() / y.norm()).item()


# A stiff scalar equation: its adjoint goes far below the smallest number of float16.

T, Y0 = 2.65, 65504 / 180
EXACT = {"y0": 9.015375e-11, "a": -2.035146e-7, "b": -1.151969e-7, "c": -8.694107e-8}


def decay(low, device, *, scaling=True, shape=(1,)):
    """y' = -(a t^2 + b t + c) y; y(T), and the gradients of y(T)^2 / 2."""
    a, b, c = (torch.tensor(x, device=device, requires_grad=True) for x in (8.0, -10.0, 2.0**-16))
    y0 = torch.full(shape, Y0, device=device, requires_grad=True)
    seen = set()

    def velocity(t, y):
        dy = -(a * t**2 + b * t + c) * y
        seen.add((y.dtype, dy.dtype, t.dtype))
        return dy

    y = solve(velocity, y0, equal_steps(399, T), low=low, scaling=scaling)[-1]
    # Coefficients and times without axes do not lift the product to float32. The first evaluation
    # looks for parameters at z0.
    assert seen == {(F32, F32, F32), (low, low, F32)}
    grads = torch.autograd.grad((y**2 / 2).sum(), (y0, a, b, c))
    return y.item(), {name: g.item() for name, g in zip(EXACT, grads, strict=True)}


@devices
@pytest.mark.parametrize("shape", [(1,), (1, 1)], ids=str)
def test_scaling_keeps_small_adjoints(device, shape):
    y, grads = decay(F16, device, shape=shape)
    assert y == pytest.approx(1.811297e-4, rel=0.01)
    assert grads == pytest.approx(EXACT, rel=0.01)


@devices
def test_small_adjoints_are_lost_without_scaling(device):
    y, grads = decay(F16, device, scaling=False)
    assert y == pytest.approx(1.811297e-4, rel=0.01)
    for name, exact in EXACT.items():
        assert not abs(grads[name] / exact - 1) < 0.1, name


@devices
def test_bfloat16_needs_no_scaling(device):
    _, grads = decay(BF16, device)
    assert grads == pytest.approx(EXACT, rel=0.05)
    assert decay(BF16, device, scaling=False)[1] == grads


def test_scaling_makes_the_loss_scale_irrelevant():
    net, x = network(), torch.randn(16, 8)
    plain = network_gradients(net, x, low=F16)
    tiny = network_gradients(net, x, low=F16, weight=2.0**-40)
    for g, h in zip(plain, tiny, strict=True):
        assert torch.equal(g, h * 2.0**40)
    lost = network_gradients(net, x, low=F16, weight=2.0**-40, scaling=False)
    assert all(not distance(h * 2.0**40, g) < 0.1 for g, h in zip(plain, lost, strict=True))


# Round-off and truncation.


@lows
def test_round_off_does_not_grow_with_the_steps(low):
    z0 = torch.rand(256) * 0.8 + 0.1
    exact = 1 / (1 + math.exp(-1.0) * (1 / z0.double() - 1))
    counts = 2 ** np.arange(4, 13)
    kept, lost = [], []
    for steps in counts.tolist():
        for z, errors in (
            (solve(logistic, z0, equal_steps(steps), low=low)[-1], kept),
            (solve(logistic, z0.to(low), equal_steps(steps), low=None)[-1].double(), lost),
        ):
            errors.append((z - exact).square().mean().sqrt().item())
    slope = np.polyfit(np.log(counts), np.log(kept), 1)[0]
    assert abs(slope) < 0.2
    assert max(kept) < torch.finfo(low).eps / 8
    assert lost[-1] > 0.1  # the state stands still
    rise = lost[: 4 if low == F16 else 3]  # then it stands still
    assert np.all(np.diff(rise) > 0) and rise[-1] > 2 * rise[0]
    assert lost[0] > 4 * kept[0]


def logistic(t, z):
    return z * (1 - z)


TURN = torch.tensor([[0.0, 1.0], [-1.0, 0.0]])


def turning(t, z):
    """Solved by a rotation by sin(t)."""
    return torch.cos(t) * (z @ TURN.to(z))


@pytest.mark.parametrize(
    ("method", "counts"), [("euler", (16, 32, 64)), ("midpoint", (8, 16)), ("rk4", (4, 8))]
)
def test_order_shows_at_coarse_steps(method, counts):
    z0 = torch.randn(64, 2)
    exact = z0.double() @ torch.linalg.matrix_exp(TURN.double() * math.sin(4.0))
    errors = [
        distance(solve(turning, z0, equal_steps(n, 4.0), method, low=F16)[-1].double(), exact)
        for n in counts
    ]
    slope = -np.polyfit(np.log(counts), np.log(errors), 1)[0]
    assert slope == pytest.approx(METHODS[method].order, abs=0.3)


@lows
@pytest.mark.parametrize("method", [*EXPLICIT, "bosh3", "dopri5"])
def test_each_method_is_itself_up_to_round_off(method, low):
    """States and gradients are near those of the same steps in float64, and not of others."""
    outcomes = {}
    for kind in (low, None):
        z0 = torch.tensor([[1.0, 0.5], [-0.25, 2.0]], dtype=F32 if kind else F64).requires_grad_()
        rate = torch.tensor(0.7, dtype=z0.dtype, requires_grad=True)
        zs = solve(
            lambda t, z, rate=rate: rate * turning(t, z), z0, equal_steps(8, 2.0), method, low=kind
        )
        grads = torch.autograd.grad((zs[-1] ** 3).sum(), (z0, rate))
        outcomes[kind] = [x.double() for x in (zs[-1].detach(), *grads)]
    for got, want in zip(outcomes[low], outcomes[None], strict=True):
        assert distance(got, want) < 4 * torch.finfo(low).eps


@lows
def test_backward_in_time(low):
    z0 = torch.rand(16) * 0.8 + 0.1
    there = solve(logistic, z0, equal_steps(32), low=low)[-1]
    back = solve(logistic, there, equal_steps(32).flip(0), low=low)[-1]
    assert distance(back, z0) < torch.finfo(low).eps


# The gradient.


@devices
@pytest.mark.parametrize(
    ("low", "scaling", "rtol"), [(F16, True, 0.01), (F16, False, 0.01), (BF16, True, 0.03)]
)
def test_gradients_of_a_network(low, scaling, rtol, device):
    net, x = network(device), torch.randn(256, 8, device=device)
    for got, want in zip(
        network_gradients(net, x, low=low, scaling=scaling),
        network_gradients(net, x, low=None),
        strict=True,
    ):
        assert got.dtype == F32
        assert distance(got, want) < rtol


@devices
def test_powers_of_two_change_nothing(device):
    values = [[-0.5, 1.0], [-1.0, -0.25]]
    matrix = torch.tensor(values, device=device, requires_grad=True)
    z0 = torch.tensor([[1.0, 0.5], [0.25, -1.0]], device=device, requires_grad=True)

    def grads(shift):
        z = solve(lambda t, z: z @ matrix, z0, equal_steps(16), low=F16, shift=shift)[-1]
        return torch.autograd.grad((z**2).sum(), (z0, matrix))

    for shift in (-8, -3, 1, 5):
        assert all(map(torch.equal, grads(shift), grads(0)))


def test_scales_follow_the_adjoint():
    scaling = Scaling(F16, torch.ones(3, 4))
    for peak in (3e-12, 0.7, 5e6):
        scale = scaling.scale(peak)
        assert math.log2(scale).is_integer()
        assert 0.7 < scale * peak / (1024 / 2) < 1.42  # 1 / eps over the root of 4 entries
        assert Scaling(F16, torch.ones(3, 4), shift=3).scale(peak) == 8 * scale
    first = scaling.scale(1.0)
    scaling.overflowed()
    scaling.overflowed()
    for steps, share in ((0, 0.25), (15, 0.25), (1, 0.5), (16, 1.0), (32, 1.0)):
        for _ in range(steps):
            scaling.accepted()
        assert scaling.scale(1.0) == share * first


def test_scale_is_lowered_where_gradients_overflow():
    """The gradient of the rate sums over 2^16 entries, and overflows in float16 at first."""
    rate = torch.tensor(1.0, requires_grad=True)
    z0 = torch.ones(2**16, requires_grad=True)
    counted = []
    overflowed = Scaling.overflowed
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Scaling, "overflowed", lambda self: (counted.append(1), overflowed(self)))
        z = solve(lambda t, z: -rate * z, z0, equal_steps(40), low=F16)[-1]
        grads = torch.autograd.grad(z.sum(), (z0, rate))
    assert 0 < len(counted) < 20  # lowered at once, and larger scales tried now and then
    assert distance(grads[0], torch.full_like(z0, math.exp(-1))) < 0.002
    assert grads[1].item() == pytest.approx(-(2**16) * math.exp(-1), rel=0.002)


def test_overflow_without_scaling_is_infinite():
    net, x = network(), torch.randn(16, 8)
    huge = network_gradients(net, x, low=F16, weight=2.0**30, scaling=False)
    assert all(bool((g == math.inf).all()) for g in huge)
    kept = network_gradients(net, x, low=F16, weight=2.0**30)
    plain = network_gradients(net, x, low=F16)
    assert all(torch.equal(g, h * 2.0**30) for g, h in zip(kept, plain, strict=True))


@pytest.mark.parametrize("scaling", [True, False])
def test_a_loss_that_is_not_finite_gives_infinite_gradients(scaling):
    net, x = network(), torch.randn(4, 8)
    grads = network_gradients(net, x, low=F16, weight=math.nan, scaling=scaling)
    assert all(bool((g == math.inf).all()) for g in grads)


@lows
def test_gradient_of_the_times(low):
    outcomes = {}
    for kind in (low, None):
        z0 = torch.randn(5, 2, dtype=F64, generator=torch.Generator().manual_seed(1))
        z0 = z0.to(F32 if kind else F64).requires_grad_()
        nodes = (equal_steps(8) ** 1.5).requires_grad_()
        x = torch.tensor(0.3, dtype=F64, requires_grad=True)
        inside = [(1.0,) if n % 3 else (x, 0.5) for n in range(8)]
        zs = solve(turning, z0, nodes, low=kind, inside=inside)
        assert len(zs) == 1 + 5 + 6
        loss = sum((k + 1) * z.to(F64)[:, 0].sum() for k, z in enumerate(zs))
        outcomes[kind] = [g.double() for g in torch.autograd.grad(loss, (nodes, x, z0))]
    for got, want in zip(outcomes[low], outcomes[None], strict=True):
        assert distance(got, want) < 4 * torch.finfo(low).eps


@lows
@pytest.mark.parametrize("timed", [False, True])
def test_times_of_each_sample(low, timed):
    outcomes = {}
    stops = torch.tensor([1.0, 0.25, 2.0])
    for kind in (low, None):
        z0 = torch.tensor([[1.0, 0.5], [0.5, -1.0], [2.0, 1.0]], dtype=F32 if kind else F64)
        z0.requires_grad_()
        rate = torch.tensor(0.7, dtype=z0.dtype, requires_grad=True)
        nodes = (equal_steps(16)[:, None] * stops).requires_grad_(timed)
        seen = []

        def velocity(t, z, rate=rate, seen=seen):
            seen.append(z.dtype)
            return rate * turning(t, z)

        z = solve(velocity, z0, nodes, low=kind)[-1]
        assert kind is None or set(seen[1:]) == {low}  # the first one looks for parameters
        asked = (z0, rate, nodes) if timed else (z0, rate)
        grads = torch.autograd.grad((z**3).sum(), asked)
        outcomes[kind] = [x.double() for x in (z.detach(), *grads)]
    for got, want in zip(outcomes[low], outcomes[None], strict=True):
        assert distance(got, want) < 8 * torch.finfo(low).eps


# Contracts.


@lows
@pytest.mark.parametrize("dtype", [F32, F64], ids=["float32", "float64"])
def test_outputs_and_gradients_keep_their_dtype(low, dtype):
    """An axis of the parameter lifts the velocity to its dtype, not the stages."""
    rate = torch.tensor([0.5, 0.25], dtype=dtype, requires_grad=True)
    z0 = torch.ones(3, 2, dtype=dtype, requires_grad=True)
    seen = []

    def velocity(t, z):
        seen.append((z.dtype, t.dtype))
        return -rate * z

    zs = solve(velocity, z0, equal_steps(4), low=low, inside=[(0.5, 1.0)] * 4)
    assert len(zs) == 9 and zs[0] is z0
    grads = torch.autograd.grad(sum(z.sum() for z in zs), (z0, rate))
    assert {x.dtype for x in (*zs, *grads)} == {dtype}
    assert set(seen[1:]) == {(low, dtype)}
    exact = torch.exp(-rate.detach().double())
    assert_close(zs[-1].double(), exact.expand(3, 2), rtol=2 * torch.finfo(low).eps, atol=0.0)


def test_a_field_that_does_not_cast():
    z0 = torch.ones(3, requires_grad=True)
    grid = Grid(equal_steps(4), METHODS["rk4"].offsets, z0)
    seen = []

    def field(t, z):
        seen.append(z.dtype)
        return -z.float()

    march = FixedMarch(METHODS["rk4"], field, grid, [()] * 3 + [(1.0,)])
    with torch.autocast("cpu", dtype=BF16):
        captured = Captured(Field(field, Layout(z0)), grid.ends[0], z0, ())
        z = solve_low_precision(march, z0, captured)[-1][0]
    (grad,) = torch.autograd.grad(z.sum(), z0)
    assert set(seen) == {BF16}
    assert_close(grad, torch.full((3,), math.exp(-1)), rtol=0.01, atol=0.0)


def test_outputs_are_those_of_the_direct_loop():
    z0 = torch.randn(3, 2)
    inside = [(), (0.25, 1.0), (0.5,), (1.0,), ()]
    low, direct = (
        solve(turning, z0, equal_steps(5), low=kind, inside=inside) for kind in (F16, None)
    )
    assert len(low) == len(direct) == 5
    for got, want in zip(low, direct, strict=True):
        assert_close(got, want, rtol=2e-3, atol=2e-3)
    assert solve(turning, z0, equal_steps(0), low=F16, inside=[])[0] is z0


def test_memory_for_the_backward_pass():
    net, x = network(), torch.randn(256, 8)
    own = {p.untyped_storage().data_ptr() for p in net.parameters()}

    def saved_bytes(low):
        sizes = {}

        def pack(y):
            sizes[y.untyped_storage().data_ptr()] = y.untyped_storage().nbytes()
            kept.append(y)  # so that no storage is used twice
            return y

        kept = []
        z0 = x.clone().requires_grad_()
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda y: y):
            solve(lambda t, z: net(z), z0, equal_steps(32), low=low, params=net.parameters())
        return sum(size for pointer, size in sizes.items() if pointer not in own)

    assert saved_bytes(F16) == 32 * x.numel() * 2
    assert saved_bytes(F16) <= saved_bytes(None) / 2


class Largest(TorchDispatchMode):
    """Knows the most entries that a tensor made meanwhile has."""

    entries = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = func(*args, **(kwargs or {}))
        if isinstance(made, torch.Tensor):
            self.entries = max(self.entries, made.numel())
        return made


def test_without_a_gradient_no_state_is_stored():
    for asked, states in ((False, 1), (True, 4)):
        z0 = torch.ones(8, 5, requires_grad=asked)
        with Largest() as largest:
            z = solve(lambda t, z: -z, z0, equal_steps(4), low=BF16)[-1]
        assert z.requires_grad == asked
        assert largest.entries == states * z0.numel()


def test_each_stage_is_evaluated_once_each_way():
    net = network()
    march = marching(lambda t, z: net(z), torch.randn(4, 8), equal_steps(6), "bosh3")
    with torch.autocast("cpu", dtype=BF16):
        captured = Captured(march.field, march.grid.ends[0], torch.randn(4, 8), None)
        march.field.evaluations = 0
        z = solve_low_precision(march, torch.randn(4, 8), captured)[-1][0]
    assert march.field.evaluations == 6 * 3  # the fourth serves the error alone
    z.sum().backward()
    assert march.field.evaluations == 2 * 6 * 3


@lows
def test_a_velocity_that_is_a_gradient(low):
    net = nn.Sequential(nn.Linear(2, 16), nn.Tanh(), nn.Linear(16, 1))

    def velocity(t, z):
        with torch.enable_grad():
            z = z if z.requires_grad else z.detach().requires_grad_()
            return -torch.autograd.grad(net(z).sum(), z, create_graph=True)[0]

    outcomes = []
    for kind in (low, None):
        z0 = torch.linspace(-1, 1, 8).view(4, 2).requires_grad_()
        z = solve(velocity, z0, equal_steps(8), low=kind)[-1]
        loss = (z**2).sum()
        asked = [z0, *(p for p in net.parameters())][:-1]  # the last bias has no effect
        outcomes.append(torch.autograd.grad(loss, asked))
    for got, want in zip(*outcomes, strict=True):
        assert distance(got, want) < 4 * torch.finfo(low).eps


def test_casts_of_weights_are_not_left_behind():
    """Autocast remembers the weights it cast; graphs before, in and after the solve all count."""
    net, x = network(), torch.randn(4, 8)

    def velocity(t, z):
        return net(z)

    march = marching(velocity, x, equal_steps(4))
    with torch.autocast("cpu", dtype=BF16):
        captured = Captured(march.field, march.grid.ends[0], x, None)
        before = net(x).float().square().mean()
        z = solve_low_precision(march, x, captured)[-1][0]
        after = net(x).float().square().mean()
        got = torch.autograd.grad(before + z.square().mean() + after, list(net.parameters()))
    z = solve(velocity, x, equal_steps(4), low=None)[-1]
    loss = 2 * net(x).square().mean() + z.square().mean()
    want = torch.autograd.grad(loss, list(net.parameters()))
    assert all(distance(g, h) < 0.03 for g, h in zip(got, want, strict=True))


def test_parameters_of_a_closure():
    inner = torch.tensor([1.0, -0.5], requires_grad=True)
    other = torch.tensor(2.0, requires_grad=True)

    def sometimes(t, z):
        return inner * z * (other if t > 0.5 else 1.0)

    z0 = torch.ones(3, 2, requires_grad=True)
    z = solve(lambda t, z: inner * z, z0, equal_steps(8), low=F16)[-1]
    assert distance(torch.autograd.grad(z.sum(), inner)[0], 3 * inner.exp().detach()) < 2e-3
    z = solve(sometimes, z0, equal_steps(8), low=F16)[-1]
    with pytest.raises(ArgumentError, match="name all such tensors in `adjoint_params`"):
        z.sum().backward()
    z = solve(sometimes, z0, equal_steps(8), low=F16, params=(inner, other))[-1]
    assert torch.autograd.grad(z.sum(), other)[0].abs() > 0.1


def test_an_error_in_the_velocity_leaves_everything_as_it_was():
    net, x = network(), torch.randn(4, 8)
    before = {name: p.detach().clone() for name, p in net.named_parameters()}
    broken = [False]

    def velocity(t, z):
        if broken[0] and t < 0.5:
            raise ValueError("from inside")
        return net(z)

    z = solve(velocity, x, equal_steps(8), low=F16)[-1]
    broken[0] = True
    with pytest.raises(ValueError, match="from inside"):
        z.sum().backward()
    assert not torch.is_autocast_enabled("cpu")
    for name, p in net.named_parameters():
        assert p.dtype == F32 and torch.equal(p, before[name]) and p.grad is None


def test_parameters_must_not_change_before_the_backward_pass():
    net, x = network(), torch.randn(4, 8)
    z = solve(lambda t, z: net(z), x, equal_steps(4), low=BF16)[-1]
    with torch.no_grad():
        net[0].weight.mul_(2.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        z.sum().backward()


def test_the_graph_can_be_kept():
    net, x = network(), torch.randn(4, 8)
    z = solve(lambda t, z: net(z), x, equal_steps(4), low=F16)[-1]
    first = torch.autograd.grad(z.sum(), list(net.parameters()), retain_graph=True)
    again = torch.autograd.grad(z.sum(), list(net.parameters()))
    assert all(map(torch.equal, first, again))


@devices
def test_through_the_door(device):
    """`odeint` comes here under autocast, also for a pytree, and does not elsewhere."""
    net = nn.Sequential(nn.Linear(2, 16), nn.Tanh(), nn.Linear(16, 2)).to(device)
    x = torch.linspace(-1, 1, 12, device=device).view(6, 2)
    options = {"method": "rk4", "options": {"step_size": 0.1}}

    def velocity(t, state):
        z, _ = state
        dz = net(z) * (1 + t)
        return dz, (dz**2).sum(1)

    outcomes = []
    for enabled in (True, False):
        z0 = x.clone().requires_grad_()
        with torch.autocast(device, dtype=F16, enabled=enabled):
            z, length = odeint(velocity, (z0, z0.new_zeros(6)), [0.0, 0.35, 1.0], **options)
        assert (z.shape, z.dtype, length.dtype) == ((3, 6, 2), F32, F32)
        loss = 2.0**-30 * ((z**2).sum() + length.sum())
        outcomes.append((z.detach(), *torch.autograd.grad(loss, (z0, *net.parameters()))))
    for got, want in zip(*outcomes, strict=True):
        assert 1e-6 < distance(got, want) < 4e-3


# What is refused.


def test_second_derivatives_are_refused():
    z0 = torch.ones(2, 2, requires_grad=True)
    z = solve(turning, z0, equal_steps(4), low=F16)[-1]
    with pytest.raises(SolveError, match='gradient="checkpoint"'):
        torch.autograd.grad(z.sum(), z0, create_graph=True)
    with pytest.raises(SolveError, match='gradient="checkpoint"'):
        torch.func.grad(lambda z: solve(turning, z, equal_steps(4), low=F16, params=())[-1].sum())(
            z0.detach()
        )


@pytest.mark.parametrize("case", ["quadrature", "cubic", "dense", "complex", "low state"])
def test_what_the_low_precision_does_not_handle(case):
    z0 = torch.ones(2, 2)
    options = {}
    if case == "quadrature":
        options = {"quadrature": Quadrature(lambda t, z, dz: (dz, ()), METHODS["rk4"].tableau, 4)}
    elif case == "cubic":
        options = {"interpolation": "cubic", "inside": [(0.5,)] * 4}
    elif case == "dense":
        options = {"dense": True}
    elif case == "complex":
        z0 = z0.to(torch.complex64)
    else:
        z0 = z0.half()
    with pytest.raises(ArgumentError, match='gradient="checkpoint"'):
        solve(lambda t, z: -z, z0, equal_steps(4), low=BF16, params=(), **options)


def test_random_velocities_are_refused():
    z0 = torch.ones(2, 2, requires_grad=True)
    with pytest.raises(ArgumentError, match="random"):
        solve(lambda t, z: torch.rand_like(z) * z, z0, equal_steps(4), low=BF16)
    solve(lambda t, z: torch.rand_like(z) * z, z0.detach(), equal_steps(4), low=BF16)
