"""Dynamics against closed forms: growth, conservation, special cases, bounds, inverses."""

import math

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from pathline.errors import ArgumentError, ShapeError
from pathline.integrate import undo
from pathline.nets import Conv, Dense, LeanConv, ShiftConv, TimeBasis, operator_norm
from pathline.networks import (
    Antisymmetric,
    Augmented,
    ContinuousNet,
    Evolution,
    Hamiltonian,
    Pair,
    Parabolic,
    Residual,
    SecondOrder,
    TwoLayerHamiltonian,
)


@pytest.fixture(autouse=True)
def double():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def dense(matrix):
    """The operator of a matrix."""
    matrix = torch.as_tensor(matrix, dtype=torch.float64)
    operator = Dense(matrix.shape[1], matrix.shape[0])
    operator.weight.data = matrix
    return operator


def scatter(module, scale=1.0, seed=0):
    """Random parameters in all places, so that weights change in time and biases count."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in module.parameters():
        size = scale / math.prod(parameter.shape[2:]) ** 0.5
        parameter.data = size * torch.randn(parameter.shape, generator=generator)
    return module


def jacobian(net, x):
    return torch.autograd.functional.jacobian(lambda each: net(each[None])[0], x)


def layers(n, horizon):
    return TimeBasis("piecewise-constant", n, horizon)


# Every dynamics

MAKE = {
    "residual": lambda time: (Residual(Dense(4), time), (4,)),
    "antisymmetric": lambda time: (Antisymmetric(Dense(4), time, gamma=0.1), (4,)),
    "parabolic": lambda time: (Parabolic(Dense(4, 7), time), (4,)),
    "parabolic image": lambda time: (Parabolic(LeanConv(4), time, norm=True), (4, 5, 3)),
    "antisymmetric image": lambda time: (Antisymmetric(Conv(4), time), (4, 5, 3)),
    "hamiltonian": lambda time: (Hamiltonian(Dense(2), time), (4,)),
    "hamiltonian from zero": lambda time: (Hamiltonian(Dense(4), time, augment=True), (4,)),
    "two layers": lambda time: (TwoLayerHamiltonian(Conv(2, 3), Conv(2), time), (4, 5, 3)),
    "second order": lambda time: (SecondOrder(ShiftConv(4), time, norm=True), (4, 5, 3)),
    "augmented": lambda time: (Augmented(Antisymmetric(Dense(6), time), 2), (4,)),
}


@pytest.fixture(params=MAKE)
def made(request):
    dynamics, shape = MAKE[request.param](layers(3, 1.5))
    return scatter(dynamics, 0.3), torch.randn(5, *shape)


def test_shapes_types_and_gradients(made):
    dynamics, x = made
    evolution = Evolution(dynamics, steps=3)
    y = evolution(x)
    channels = {"Augmented": 6}.get(type(dynamics).__name__, 4)
    channels = 8 if getattr(dynamics, "augment", False) and y.shape[1] == 8 else channels
    assert y.shape == (5, channels, *x.shape[2:])
    y.square().sum().backward()
    assert all(p.grad is not None and bool(p.grad.any()) for p in evolution.parameters())
    assert evolution.float()(x.float()).dtype == torch.float32


def test_gradient_strategies_agree(made):
    dynamics, x = made
    found = {}
    strategies = ["discrete", "checkpoint"]
    if dynamics.method == "verlet":
        strategies.append("reversible")
    for gradient in strategies:
        evolution = Evolution(dynamics, steps=6, gradient=gradient)
        inputs = x.clone().requires_grad_()
        loss = evolution(inputs).square().sum()
        found[gradient] = torch.autograd.grad(loss, [inputs, *dynamics.parameters()])
    for gradient in strategies[1:]:
        assert_close(found[gradient], found["discrete"], rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("name", ["parabolic image", "two layers", "second order"])
def test_channels_last_in_memory(name):
    """Nothing but the order in memory changes, for every strategy."""
    dynamics, shape = MAKE[name](layers(3, 1.5))
    scatter(dynamics, 0.3)
    x = torch.randn(5, *shape)
    for gradient in ("discrete", "checkpoint", *(["reversible"] * isinstance(dynamics, Pair))):
        evolution = Evolution(dynamics, steps=3, gradient=gradient)
        found = []
        for form in (torch.contiguous_format, torch.channels_last):
            inputs = x.clone(memory_format=form).requires_grad_()
            out = evolution(inputs)
            assert out.is_contiguous(memory_format=form)
            loss = out.square().sum()
            found.append([out, *torch.autograd.grad(loss, [inputs, *dynamics.parameters()])])
        assert_close(found[0], found[1], rtol=1e-11, atol=1e-11)
        state = dynamics.lift(x.contiguous(memory_format=torch.channels_last))
        _, states = evolution.trajectory(state)
        ends = [dynamics.features(part) for part in _nodes(states)]
        assert_close(ends[-1], found[0][0], rtol=1e-11, atol=1e-11)


def _nodes(states):
    """The states of a trajectory one by one."""
    return zip(*states, strict=True) if isinstance(states, tuple) else states


def test_single_precision_turns_and_returns():
    """Images in single precision have channels last on the way alone."""
    dynamics = scatter(TwoLayerHamiltonian(Conv(2), Conv(2), layers(3, 1.5), norm=True), 0.3)
    x = torch.randn(5, 4, 6, 5)
    exact = Evolution(dynamics, steps=3)(x)
    found = Evolution(dynamics.float(), steps=3)(x.float())
    assert found.is_contiguous()
    assert_close(found.double(), exact, rtol=0, atol=2e-5)


def test_the_adjoint_strategy_converges_to_the_discrete_gradient():
    dynamics, shape = MAKE["antisymmetric"](TimeBasis("legendre", 1, 1.0))
    scatter(dynamics, 0.3)
    x = torch.randn(5, *shape)
    grads = [
        torch.autograd.grad(
            Evolution(dynamics, steps=40, gradient=gradient)(x).square().sum(),
            list(dynamics.parameters()),
        )
        for gradient in ("discrete", "adjoint")
    ]
    assert_close(grads[1], grads[0], rtol=1e-6, atol=1e-7)


def test_the_weights_are_in_their_place_after_a_failure():
    dynamics = scatter(Parabolic(Conv(2), layers(3, 1.5)))
    before = dict(dynamics.named_parameters())
    with pytest.raises(ShapeError):
        Evolution(dynamics, steps=3)(torch.randn(2, 3, 4, 4))
    after = dict(dynamics.named_parameters())
    assert all(after[name] is p for name, p in before.items())
    assert all(not layer.opened for layer in dynamics.weights())


@pytest.mark.parametrize("name", MAKE)
def test_halving_the_step_keeps_the_equation(name):
    """Weights are functions of time: smaller steps go to one limit, that of other methods."""
    dynamics, shape = MAKE[name](TimeBasis("legendre", 2, 1.5))
    x, pair = torch.randn(5, *shape), isinstance(scatter(dynamics, 0.3), Pair)
    with torch.no_grad():
        exact = Evolution(dynamics, steps=160, method="leapfrog" if pair else "rk4")(x)
        errors = [float((Evolution(dynamics, steps=n)(x) - exact).norm()) for n in (10, 40)]
    assert errors[1] < 0.3 * errors[0]


def test_refined_weights_keep_the_function(made):
    dynamics, x = made
    finer = dynamics.refined(6)
    assert_close(Evolution(finer, steps=12)(x), Evolution(dynamics, steps=12)(x))
    assert finer.time.order == 6
    assert_close(finer.decay(), dynamics.decay())
    count = [sum(p.numel() for p in each.parameters()) for each in (dynamics, finer)]
    assert count[1] == 2 * count[0]


def test_regularisers_are_sums(made):
    dynamics, _ = made
    square = sum(p.square().sum() for p in dynamics.parameters()) * 0.5
    assert_close(dynamics.decay(), 0.5 * square)
    steps = sum(p.diff(dim=0).square().sum() for p in dynamics.parameters()) / 0.5
    assert_close(dynamics.smoothness(), 0.5 * steps)


def test_taylor(made):
    """J(theta + e d) - J - e g d falls with the square of e; with J(theta + e d) - J, with e."""
    dynamics, x = made
    evolution = Evolution(dynamics, steps=3)
    parameters = list(dynamics.parameters())
    directions = [torch.randn_like(p) for p in parameters]
    first = evolution(x).tanh().sum()
    slopes = torch.autograd.grad(first, parameters)
    slope = sum((g * d).sum() for g, d in zip(slopes, directions, strict=True))
    rests = []
    for size in (1e-5, 1e-6):  # so small that no relu changes its side for most
        with torch.no_grad():
            for p, d in zip(parameters, directions, strict=True):
                p += size * d
            change = evolution(x).tanh().sum() - first
            for p, d in zip(parameters, directions, strict=True):
                p -= size * d
        rests.append((float(change.detach()), float((change - size * slope).detach())))
    assert rests[0][0] / rests[1][0] == pytest.approx(10, rel=1e-3)
    assert abs(rests[0][1]) / abs(rests[1][1]) == pytest.approx(100, rel=0.2)


# Schemes


def test_euler_is_the_residual_network():
    dynamics = scatter(Residual(Dense(3), layers(5, 2.0)))
    z = x = torch.randn(4, 3)
    K, b = dynamics.layer.module.operator.weight, dynamics.layer.module.bias
    for j in range(5):
        z = z + 0.4 * torch.tanh(z @ K[j].mT + b[j])
    assert_close(Evolution(dynamics, steps=5)(x), z)


def test_verlet_is_the_hamiltonian_network():
    """arXiv 1705.03341: z first, from 0, then y."""
    dynamics = scatter(Hamiltonian(Dense(3), layers(5, 2.0), augment=True))
    y = x = torch.randn(4, 3)
    z = torch.zeros_like(y)
    K, b = dynamics.layer.module.operator.weight, dynamics.layer.module.bias
    for j in range(5):
        z = z - 0.4 * torch.tanh(y @ K[j] + b[j])
        y = y + 0.4 * torch.tanh(z @ K[j].mT + b[j])
    assert_close(Evolution(dynamics, steps=5)(x), torch.cat([y, z], 1))


def test_verlet_is_the_two_layer_network():
    """arXiv 1709.03698, with the names of the halves exchanged."""
    dynamics = scatter(TwoLayerHamiltonian(Dense(2, 3), Dense(2), layers(4, 2.0)))
    x = torch.randn(4, 4)
    y, z = x.chunk(2, 1)
    (K1, b1), (K2, b2) = (
        (part.module.operator.weight, part.module.bias) for part in dynamics.weights()
    )
    for j in range(4):
        z = z - 0.5 * torch.relu(y @ K2[j].mT + b2[j]) @ K2[j]
        y = y + 0.5 * torch.relu(z @ K1[j].mT + b1[j]) @ K1[j]
    assert_close(Evolution(dynamics, steps=4)(x), torch.cat([y, z], 1))


def test_verlet_is_the_leapfrog_network():
    """y_{j+1} = 2 y_j - y_{j-1} - h^2 K^T sigma(K y_j + b), y_{-1} = y_0."""
    dynamics = scatter(SecondOrder(Conv(2), layers(4, 2.0), activation="tanh"))
    before = y = x = torch.randn(3, 2, 4, 5)
    for j in range(4):
        layer = dynamics.layer.frozen(0.5 * j + 0.01)
        before, y = y, 2 * y - before + 0.25 * layer(y)
    assert_close(Evolution(dynamics, steps=4)(x), y)


def test_the_midpoint_network():
    """z_{j+1} = z_{j-1} + 2 h sigma((K - K^T) z_j + b) (arXiv 1709.03698, method 3)."""
    dynamics = scatter(Antisymmetric(Dense(3), TimeBasis("legendre", 2, 2.0)))
    evolution = Evolution(dynamics, steps=8, method="reversible_midpoint")
    t, zs = evolution.trajectory(torch.randn(4, 3))
    for j in range(1, 8):
        assert_close(zs[j + 1], zs[j - 1] + 0.5 * dynamics(t[j], zs[j]))


# Growth and conservation


@pytest.mark.parametrize("steps, factor", [(100, 1.64463), (1000, 1.05127)])
def test_growth_of_euler_on_a_rotation(steps, factor):
    """(1 + h^2 w^2)^(N / 2) with T = 10, w = 1."""
    dynamics = Antisymmetric(
        dense([[0, 0.5], [-0.5, 0]]), TimeBasis(horizon=10.0), activation="identity"
    )
    x = torch.tensor([[0.6, 0.8]])
    grown = float(Evolution(dynamics, steps=steps, method="euler")(x).detach().norm())
    assert grown == pytest.approx((1 + (10 / steps) ** 2) ** (steps / 2), rel=1e-12)
    assert grown == pytest.approx(factor, abs=5e-6)
    h = 10j / steps
    R = abs(1 + h + h**2 / 2 + h**3 / 6 + h**4 / 24) ** steps
    found = Evolution(dynamics, steps=steps, method="rk4")(x).detach().norm()
    assert float(found) == pytest.approx(R, rel=1e-12)


def oscillator(h, steps, method="verlet"):
    """y and z along y' = z, z' = -y."""
    dynamics = Hamiltonian(dense([[1.0]]), TimeBasis(horizon=h * steps), activation="identity")
    evolution = Evolution(dynamics, steps=steps, method=method)
    _, (y, z) = evolution.trajectory((torch.tensor([[0.3]]), torch.tensor([[0.8]])))
    return y.detach().flatten(), z.detach().flatten()


def test_verlet_conserves_its_quadratic_form():
    y, z = oscillator(0.7, 200)
    form = y**2 + z**2 - 0.7 * y * z
    assert_close(form, form[:1].expand(201), rtol=1e-11, atol=0)


def test_verlet_is_stable_up_to_two():
    assert oscillator(1.99, 2000)[0].abs().max() < 20
    assert oscillator(2.01, 2000)[0].abs().max() > 1e6


def test_dispersion_of_leapfrog():
    """cos(h w_d) = 1 - h^2 w^2 / 2."""
    dynamics = SecondOrder(dense([[1.3]]), TimeBasis(horizon=20.0), activation="identity")
    y = Evolution(dynamics, steps=40).trajectory(dynamics.lift(torch.ones(1, 1)))[1][0].flatten()
    cosine = 1 - 0.25 * 1.3**2 / 2
    assert_close(y[2:] + y[:-2], 2 * cosine * y[1:-1])


def test_a_symplectic_block():
    """J^T Omega J = Omega, and determinant 1, for one step and for many."""
    dynamics = scatter(
        TwoLayerHamiltonian(Dense(3, 5), Dense(3, 4), layers(4, 2.0), activation="tanh")
    )
    omega = torch.kron(torch.tensor([[0.0, 1.0], [-1.0, 0.0]]), torch.eye(3))
    for method in ("verlet", "leapfrog"):
        evolution = Evolution(dynamics, steps=4, method=method)
        J = jacobian(evolution, torch.randn(6))
        assert_close(J.mT @ omega @ J, omega, rtol=0, atol=1e-12)
        assert_close(torch.linalg.det(J), torch.tensor(1.0))
    dynamics = scatter(Hamiltonian(Dense(3), layers(1, 0.5)))
    evolution = Evolution(dynamics, steps=1)
    J = jacobian(evolution, torch.randn(6))
    assert_close(torch.linalg.det(J), torch.tensor(1.0))


@pytest.mark.parametrize("kind", [SecondOrder, TwoLayerHamiltonian])
def test_energy_drifts_by_the_square_of_the_step(kind):
    operators = [Dense(4, 6) for _ in range(1 if kind is SecondOrder else 2)]
    dynamics = scatter(kind(*operators, TimeBasis(horizon=40.0), activation="tanh"), 0.4)
    x = torch.randn(3, 4 if kind is SecondOrder else 8)
    drifts = []
    for steps in (400, 800):
        evolution = Evolution(dynamics, steps=steps, method="leapfrog")
        _, states = evolution.trajectory(dynamics.lift(x))
        with torch.no_grad():
            energies = torch.stack(
                [dynamics.energy(0.0, state) for state in zip(*states, strict=True)]
            )
        drift = (energies - energies[0]).abs().amax(1)
        assert drift[steps // 2 :].max() < 3 * drift[: steps // 2].max()  # no secular growth
        drifts.append(float(drift.max()))
    assert drifts[0] / drifts[1] == pytest.approx(4, rel=0.25)


def test_energy_of_a_heat_equation_decays():
    dynamics = scatter(Parabolic(Conv(2, 3), TimeBasis(horizon=2.0)), 0.3)
    evolution = Evolution(dynamics, steps=40)
    _, zs = evolution.trajectory(torch.randn(3, 2, 4, 4))
    energies = torch.stack([dynamics.energy(0.0, z) for z in zs])
    assert (energies.diff(dim=0) <= 1e-12).all()


# Partial differential equations


def gradient_operator(padding="circular"):
    """The forward differences in x and y."""
    operator = Conv(1, 2, padding=padding)
    operator.weight.data.zero_()
    operator.weight.data[:, 0, 1, 1] = -1
    operator.weight.data[0, 0, 1, 2] = 1
    operator.weight.data[1, 0, 2, 1] = 1
    return operator


def plane_wave(i, j, size=8):
    """A mode of the torus, and |khat|^2 of the differences at it."""
    a, b = 2 * math.pi * i / size, 2 * math.pi * j / size
    n = torch.arange(size)
    wave = torch.cos(a * n)[:, None] * torch.cos(b * n)
    return wave[None, None], 4 - 2 * math.cos(a) - 2 * math.cos(b)


@pytest.mark.parametrize("mode", [(0, 1), (2, 1), (4, 4)])
def test_the_heat_equation_is_a_special_case(mode):
    dynamics = Parabolic(gradient_operator(), TimeBasis(horizon=2.0), activation="identity")
    wave, symbol = plane_wave(*mode)
    assert_close(Evolution(dynamics, steps=10)(wave), (1 - 0.2 * symbol) ** 10 * wave)


@pytest.mark.parametrize("mode", [(0, 1), (2, 1), (4, 4)])
def test_the_wave_equation_is_a_special_case(mode):
    """cos(omega h) = 1 - h^2 |khat|^2 / 2, from y_{-1} = y_0."""
    dynamics = SecondOrder(gradient_operator(), TimeBasis(horizon=3.0), activation="identity")
    wave, symbol = plane_wave(*mode)
    h, n = 0.3, 10
    angle = math.acos(1 - h**2 * symbol / 2)
    amplitude = math.cos((n + 0.5) * angle) / math.cos(0.5 * angle)
    assert_close(Evolution(dynamics, steps=n)(wave), amplitude * wave)


def test_no_two_solutions_part_within_the_bound():
    """100 pairs with h = 1.9 / |K|^2 of weights that change in time, for relu and tanh."""
    for activation in ("relu", "tanh"):
        dynamics = Parabolic(Conv(3), layers(6, 1.0), activation=activation)
        scatter(dynamics)
        bound = dynamics.step_bound("euler", (3, 6, 5))
        norm = max(
            operator_norm(dynamics.layer.frozen((j + 0.5) / 6).operator, (3, 6, 5), iterations=300)
            for j in range(6)
        )
        assert bound == pytest.approx(2 / norm**2, rel=0.02)
        dynamics = Parabolic(Conv(3), layers(6, 6 * 1.9 / norm**2), activation=activation)
        scatter(dynamics)
        x, y = torch.randn(2, 100, 3, 6, 5)
        evolution = Evolution(dynamics, steps=6)
        with torch.no_grad():
            ratio = (evolution(x) - evolution(y)).flatten(1).norm(dim=1)
        assert (ratio / (x - y).flatten(1).norm(dim=1)).max() <= 1 + 1e-12


def test_some_solutions_part_beyond_the_bound():
    operator = Conv(3)
    norm = operator_norm(operator, (3, 6, 5), iterations=2000)
    time = TimeBasis(horizon=20 * 2.2 / norm**2)
    evolution = Evolution(Parabolic(operator, time, activation="identity"), steps=20)
    x, y = torch.randn(2, 100, 3, 6, 5)
    with torch.no_grad():
        ratio = (evolution(x) - evolution(y)).flatten(1).norm(dim=1)
    assert (ratio / (x - y).flatten(1).norm(dim=1)).max() > 1


def test_total_variation_decays():
    """The differences of an image with the norm inside: the flow that denoises."""
    dynamics = Parabolic(
        gradient_operator(), TimeBasis(horizon=1.0), activation="identity", norm=True
    )
    image = torch.zeros(1, 1, 12, 12)
    image[..., 3:9, 3:9] = 1
    _, zs = Evolution(dynamics, steps=400).trajectory(image + 0.1 * torch.randn_like(image))
    with torch.no_grad():
        edges = dynamics.layer.frozen(0.0).operator(zs.flatten(0, 1))
        variation = (edges.square().sum(1) + 1e-4).sqrt().sum((1, 2))
    assert (variation.diff() < 0).all()
    assert variation[-1] < 0.75 * variation[0]


@pytest.mark.parametrize(
    "dynamics, method, bound",
    [
        (lambda K, t: Antisymmetric(K, t, gamma=0.3), "euler", 0.6 / (0.09 + 16)),
        (lambda K, t: Antisymmetric(K, t), "euler", 0.0),
        (lambda K, t: Antisymmetric(K, t), "rk4", 8**0.5 / 4),
        (lambda K, t: Parabolic(K, t), "euler", 0.5),
        (lambda K, t: Parabolic(K, t, norm=True), "euler", None),
        (lambda K, t: SecondOrder(K, t), "verlet", 1.0),
        (lambda K, t: Hamiltonian(K, t, augment=True), "leapfrog", 1.0),
        (lambda K, t: TwoLayerHamiltonian(K, K, t, augment=True), "verlet", 0.5),
        (lambda K, t: Residual(K, t), "euler", None),
    ],
)
def test_step_bounds(dynamics, method, bound):
    K = dense([[0.0, 2.0], [-2.0, 0.0]])
    found = dynamics(K, TimeBasis()).step_bound(method, (2,))
    assert found == (None if bound is None else pytest.approx(bound, rel=1e-10))


# Inverses


@pytest.mark.parametrize("method", ["verlet", "leapfrog"])
def test_inverse_of_a_thousand_steps(method):
    dynamics = scatter(Hamiltonian(Dense(4), layers(1000, 50.0), augment=True))
    evolution = Evolution(dynamics, steps=1000, method=method)
    state = dynamics.lift(torch.randn(6, 4))
    with torch.no_grad():
        assert_close(evolution.inverse(evolution.evolve(state)), state, rtol=0, atol=1e-10)


@pytest.mark.parametrize("kind", ["two layers", "second order"])
def test_inverse_of_images(kind):
    dynamics, shape = MAKE[kind](layers(30, 15.0))
    evolution = Evolution(scatter(dynamics, 0.3), steps=30)
    state = dynamics.lift(torch.randn(4, *shape))
    with torch.no_grad():
        after = evolution.evolve(state)
        assert float((after[0] - state[0]).norm()) > 1
        assert_close(evolution.inverse(after), state, rtol=0, atol=1e-10)


def test_undo_has_gradients():
    dynamics = scatter(Hamiltonian(Dense(2), layers(3, 1.0)), 0.5)
    state = tuple(torch.randn(2, 2, 2, requires_grad=True).unbind(0))
    found = undo(dynamics.field, state, [0.0, 1.0], step_size=1 / 3)
    J = torch.autograd.functional.jacobian(
        lambda y, z: torch.cat(undo(dynamics.field, (y, z), [0.0, 1.0], step_size=1 / 3)), state
    )
    there = torch.autograd.functional.jacobian(
        lambda y, z: torch.cat(Evolution(dynamics, steps=3).evolve((y, z))), found
    )
    J, there = (torch.cat([part.reshape(8, 4) for part in each], 1) for each in (J, there))
    assert_close(J @ there, torch.eye(8), rtol=0, atol=1e-12)


def test_undo_refuses_what_has_a_memory():
    dynamics = Antisymmetric(Dense(2))
    with pytest.raises(ArgumentError, match=r"\(leapfrog, verlet\), got 'reversible_midpoint'"):
        Evolution(dynamics, method="reversible_midpoint").inverse(torch.randn(2, 2))


# Networks


def test_a_network_of_blocks():
    """Widths and resolutions change between blocks, each with its own method."""
    first = Evolution(Parabolic(Conv(4), layers(2, 1.0)), steps=2, method="rk4")
    net = ContinuousNet(
        nn.Conv2d(1, 4, 3, padding=1),
        [first, nn.Conv2d(4, 6, 1), nn.AvgPool2d(2), SecondOrder(LeanConv(6), layers(3, 1.5))],
        nn.Sequential(nn.Flatten(), nn.Linear(6 * 4 * 3, 10)),
        steps=3,
        gradient="checkpoint",
    )
    assert net(torch.randn(2, 1, 8, 6)).shape == (2, 10)
    assert [(e.method, e.steps, e.gradient) for e in net.evolutions()] == [
        ("rk4", 2, "discrete"),
        ("verlet", 3, "checkpoint"),
    ]
    parts = [e.dynamics for e in net.evolutions()]
    assert_close(net.decay(), parts[0].decay() + parts[1].decay())


def test_adaptive_steps():
    dynamics = scatter(Antisymmetric(Dense(3), TimeBasis("legendre", 2, 2.0)))
    x = torch.randn(4, 3)
    found = Evolution(dynamics, steps=None, method="dopri5", tolerance=1e-9)(x)
    assert_close(found, Evolution(dynamics, steps=200)(x), rtol=1e-7, atol=1e-7)


def test_saves_and_loads():
    a, b = (
        ContinuousNet(nn.Linear(2, 4), scatter(Hamiltonian(Dense(2)), seed=s), nn.Linear(4, 3))
        for s in (0, 1)
    )
    b.load_state_dict(a.state_dict())
    x = torch.randn(5, 2)
    assert_close(b(x), a(x), rtol=0, atol=0)


@pytest.mark.parametrize(
    "make, words",
    [
        (lambda: Evolution(Residual(Dense(2)), method="verlt"), "did you mean 'verlet'"),
        (lambda: Evolution(Residual(Dense(2)), gradient="exact"), "unknown `gradient` 'exact'"),
        (lambda: Evolution(Residual(Dense(2)), steps=0), "`steps` must be a positive integer or"),
        (lambda: Evolution(Residual(Dense(2)), steps=None), "'euler' takes fixed steps"),
        (lambda: ContinuousNet(None, [nn.Linear(2, 2)], None), "at least one Dynamics"),
        (lambda: ContinuousNet(None, nn.Linear(2, 2), None), "at least one Dynamics"),
        (lambda: Residual(nn.Linear(2, 2)), "`operator` must be a nets.Operator, such as Dense"),
        (lambda: Residual(Dense(2), "legendre"), "`time` must be a nets.TimeBasis, got 'legendre'"),
        (lambda: Evolution(Residual(Dense(2)), method="verlet"), "halves in turn, which Residual"),
        (lambda: Evolution(Residual(Dense(2)), method="imex_euler"), "is for SemiImplicit"),
        (lambda: Evolution(Hamiltonian(Dense(2)), gradient="adjoint"), "method 'verlet' can't"),
        (
            lambda: ContinuousNet(None, Residual(Dense(2)), None)(torch.ones(1, 2).float()),
            "`x` must be torch.float64 on cpu, as the network is, got torch.float32 on cpu",
        ),
        (
            lambda: ContinuousNet(None, Residual(Dense(2)), None)([1.0, 2.0]),
            "`x` must be a tensor, got list",
        ),
        (lambda: Augmented(Residual(Dense(2)), 0), "`extra` must be a positive integer, got 0"),
        (
            lambda: Evolution(Residual(Dense(2)), gradient="reversible")(torch.ones(1, 2)),
            "needs a reversible method",
        ),
    ],
)
def test_errors(make, words):
    with pytest.raises(ArgumentError, match=words):
        make()


def test_odd_channels():
    net = ContinuousNet(None, Hamiltonian(Dense(2)), None)
    with pytest.raises(ShapeError, match=r"even number of channels, got 5 in \(3, 5\)"):
        net(torch.randn(3, 5))
