"""Weights in time: the bases against quadrature and expm, refinement, regularisers, errors."""

import numpy as np
import pytest
import torch
from numpy.polynomial import legendre
from scipy.linalg import expm
from torch import nn
from torch.testing import assert_close

from pathline import odeint
from pathline.errors import ArgumentError, ShapeError
from pathline.nets import TimeBasis, TimeWeights

BASES = ("legendre", "monomial", "piecewise-constant", "piecewise-linear")
T = 2.5


@pytest.fixture(autouse=True)
def double():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def weights(name, order=4, horizon=T, seed=0):
    """A layer whose coefficients are random."""
    made = TimeWeights(nn.Linear(3, 3), name, order, horizon).double()
    generator = torch.Generator().manual_seed(seed)
    for parameter in made.parameters():
        parameter.data = torch.randn(parameter.shape, dtype=torch.float64, generator=generator)
    return made


def gauss(pieces=4, points=12):
    """Times and weights of composite Gauss quadrature on [0, T]."""
    x, w = np.polynomial.legendre.leggauss(points)
    h = T / pieces
    t = np.concatenate([(i + (x + 1) / 2) * h for i in range(pieces)])
    return torch.tensor(t), torch.tensor(np.tile(w * h / 2, pieces))


def test_legendre_are_numpys():
    t = torch.linspace(0, T, 9)
    found = TimeBasis("legendre", 6, T).values(t)
    assert_close(found, torch.tensor(legendre.legvander(2 * t.numpy() / T - 1, 6).T))


@pytest.mark.parametrize("name", BASES)
@pytest.mark.parametrize("order", [1, 4])
def test_gram_and_stiffness_by_quadrature(name, order):
    basis = TimeBasis(name, order, T)
    t, w = gauss()
    t.requires_grad_()
    phi = basis.values(t)
    assert_close((phi * w) @ phi.mT, basis.gram, rtol=1e-12, atol=1e-12)
    if name == "piecewise-constant":
        theta = torch.randn(order)
        expected = theta.diff().square().sum() * order / T
        assert_close(theta @ basis.stiffness @ theta, expected)
        return
    slopes = [torch.autograd.grad(row.sum(), t, retain_graph=True)[0] for row in phi[1:]]
    first = [torch.autograd.grad(phi[0].sum(), t)[0]] if name == "piecewise-linear" else [0 * t]
    slope = torch.stack(first + slopes)
    assert_close((slope * w) @ slope.mT, basis.stiffness, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("name", BASES)
def test_regularisers_are_integrals(name):
    layer = weights(name)
    t, w = gauss()
    values = [layer.weights(s) for s in t]
    square = sum(torch.stack([each[n].square().sum() for each in values]) for n in values[0])
    assert_close(layer.decay(), 0.5 * (w * square).sum())
    if name == "piecewise-constant":
        stacks = layer.parameters()
        expected = sum(p.diff(dim=0).square().sum() for p in stacks) * 4 / T / 2
        assert_close(layer.smoothness(), expected)
        return
    h = 1e-5
    slopes = [
        {n: (layer.weights(s + h)[n] - layer.weights(s - h)[n]) / (2 * h) for n in values[0]}
        for s in t
    ]
    square = sum(torch.stack([each[n].square().sum() for each in slopes]) for n in values[0])
    assert_close(layer.smoothness(), 0.5 * (w * square).sum(), rtol=1e-6, atol=0)


@pytest.mark.parametrize("name", BASES)
def test_it_starts_as_the_module(name):
    module = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3)).double()
    layer, x = TimeWeights(module, name, 3, T), torch.randn(5, 3)
    for t in (0.0, 0.7, T):
        assert_close(layer(torch.tensor(t), x), module(x))
    assert_close(layer.smoothness(), torch.zeros(()), rtol=0, atol=1e-12)
    assert not set(map(id, layer.parameters())) & set(map(id, module.parameters()))


@pytest.mark.parametrize("name", BASES)
def test_refinement_keeps_the_function(name):
    layer, x = weights(name), torch.randn(5, 3)
    finer = layer.refined(8)
    assert finer.basis.count == {"piecewise-constant": 8}.get(name, 9)
    for t in torch.linspace(0.01, T, 23):
        assert_close(finer(t, x), layer(t, x), rtol=1e-13, atol=1e-13)
    assert_close(finer.decay(), layer.decay())
    assert not set(map(id, layer.parameters())) & set(map(id, finer.parameters()))


@pytest.mark.parametrize("order", [1, 3, 5, 7])
def test_legendre_and_monomials_span_the_same(order):
    """Exact change of basis: the same function to round-off."""
    layer, other = weights("legendre", order), weights("monomial", order)
    change = np.zeros((order + 1, order + 1))
    for k in range(order + 1):
        poly = np.polynomial.legendre.Legendre.basis(k, domain=[0, 1])
        row = poly.convert(kind=np.polynomial.Polynomial).coef
        change[: len(row), k] = row
    for p, q in zip(layer.parameters(), other.parameters(), strict=True):
        q.data = torch.tensordot(torch.tensor(change), p.data, 1)
    x = torch.randn(5, 3)
    for t in torch.linspace(0, T, 7):
        assert_close(other(t, x), layer(t, x), rtol=0, atol=1e-11)


@pytest.mark.parametrize(
    "degree, monomial, orthonormal", [(3, 128, 1.03), (5, 4.3e3, 1.18), (7, 1.7e5, 1.68)]
)
def test_condition_of_the_design(degree, monomial, orthonormal):
    """At 16 midpoints: arXiv 2507.22045's bases, numbers computed by NumPy."""
    t = (torch.arange(16) + 0.5) / 16
    found = torch.linalg.cond(TimeBasis("monomial", degree).values(t).mT)
    assert float(found) == pytest.approx(monomial, rel=0.03)
    scale = (2 * torch.arange(degree + 1) + 1.0).sqrt()
    found = torch.linalg.cond((TimeBasis("legendre", degree).values(t) * scale[:, None]).mT)
    assert float(found) == pytest.approx(orthonormal, rel=0.01)


def test_the_number_of_weights():
    """Cubic against one layer each: 1088 and 8976 (arXiv 2507.22045's setting, r = 16)."""
    layer = nn.Linear(16, 16)
    count = {
        order: sum(p.numel() for p in TimeWeights(layer, name, order).parameters())
        for name, order in (("legendre", 3), ("piecewise-constant", 33))
    }
    assert count == {3: 1088, 33: 8976}


def test_polynomials_reach_any_weights_of_layers():
    """Degree N - 1 interpolates N layers."""
    t = (torch.arange(6) + 0.5) / 6
    wanted = torch.randn(6, 4)
    found = torch.linalg.solve(TimeBasis("legendre", 5).values(t).mT, wanted)
    values = torch.stack([TimeBasis("legendre", 5).at(s, found) for s in t])
    assert_close(values, wanted)


def test_solution_of_a_linear_equation():
    """W(t) = t A has u(1) = expm(A / 2) u(0); rk4 gets there with order 4, Euler with order 1."""
    A = torch.randn(3, 3, generator=torch.Generator().manual_seed(1))
    layer = TimeWeights(nn.Linear(3, 3, bias=False), "monomial", 1).double()
    layer.module.weight.data = torch.stack([torch.zeros(3, 3), A])
    u = torch.randn(4, 3)
    exact = u @ torch.tensor(expm(A.numpy() / 2)).mT
    slopes = []
    for method in ("euler", "rk4"):
        errors = [
            (odeint(layer, u, torch.linspace(0, 1, n + 1), method=method)[-1] - exact).norm()
            for n in (8, 16, 32)
        ]
        slopes.append(float((errors[0] / errors[2]).detach().log2()) / 2)
    assert slopes == [pytest.approx(1, abs=0.15), pytest.approx(4, abs=0.15)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("pieces", [3, 7, 1202])
def test_a_step_uses_its_own_piece(dtype, pieces):
    """The time of a node may be rounded downwards, and still belongs to the piece after it."""
    basis = TimeBasis("piecewise-constant", pieces, 20.0)
    t = (20.0 / pieces * torch.arange(pieces, dtype=torch.float64)).to(dtype)
    found = basis.at(t[0], torch.arange(pieces))
    assert [int(basis.at(s, torch.arange(pieces))) for s in t] == list(range(pieces))
    assert found == 0
    assert basis.at(torch.tensor(20.0, dtype=dtype), torch.arange(pieces)) == pieces - 1


def test_gradients_reach_weights_and_times():
    layer = weights("piecewise-linear")
    t = torch.tensor(0.8, requires_grad=True)
    inputs = torch.randn(2, 3, requires_grad=True)
    assert torch.autograd.gradcheck(lambda t, x, *_: layer(t, x), (t, inputs, *layer.parameters()))


def test_shared_parameters_stay_shared():
    module = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    module[1].weight = module[0].weight
    layer = TimeWeights(module, "legendre", 2)
    assert len(list(layer.parameters())) == 3
    assert len(list(layer.refined(3).parameters())) == 3
    layer.frozen(0.3)


def test_frozen_is_the_module_at_a_time():
    layer, x = weights("legendre"), torch.randn(5, 3)
    assert_close(layer.frozen(0.9)(x), layer(torch.tensor(0.9), x))


def test_saves_and_loads():
    layer, other = weights("legendre"), weights("legendre", seed=1)
    other.load_state_dict(layer.state_dict())
    x = torch.randn(5, 3)
    assert_close(other(torch.tensor(0.4), x), layer(torch.tensor(0.4), x), rtol=0, atol=0)


@pytest.mark.parametrize(
    "make, words",
    [
        (lambda: TimeBasis("legendr", 1), "did you mean 'legendre'"),
        (lambda: TimeBasis("legendre", -1), "`order` of basis 'legendre' must be an integer of at"),
        (lambda: TimeBasis("piecewise-linear", 0), "at least 1, got 0"),
        (lambda: TimeBasis(horizon=0.0), "`horizon` must be positive and finite, got 0.0"),
        (lambda: TimeBasis("piecewise-constant", 4).refined(6), "must be a multiple of 4, got 6"),
        (lambda: TimeBasis("legendre", 4).refined(3), "must be at least 4, got 3"),
        (lambda: TimeWeights(nn.BatchNorm1d(3)), "must not keep running statistics"),
    ],
)
def test_errors(make, words):
    with pytest.raises(ArgumentError, match=words):
        make()


def test_times_of_samples_are_refused():
    with pytest.raises(ShapeError, match="one time for all samples"):
        weights("legendre")(torch.zeros(5, 1), torch.randn(5, 3))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_piece_of_a_time(dtype):
    """By numbers as by tensors, at nodes too, where times may be rounded downwards."""
    for order, horizon in ((1, 1.0), (3, 0.7), (7, 2.3)):
        basis = TimeBasis("piecewise-constant", order, horizon)
        nodes = torch.arange(order + 1, dtype=torch.float64) * (horizon / order)
        times = torch.cat([nodes, torch.linspace(-0.5, horizon + 0.5, 101, dtype=torch.float64)])
        for t in times.to(dtype):
            assert basis.values(t).argmax() == basis.piece(t)
        assert [basis.piece(t) for t in nodes.to(dtype)] == [*range(order), order - 1]
    assert TimeBasis("legendre", 2).piece(torch.tensor(0.5)) is None


@pytest.mark.parametrize("name", BASES)
def test_times_under_vmap(name):
    """Times that torch.func hides take the way of tensors."""
    layer, t, x = weights(name), torch.linspace(0, T, 6), torch.randn(6, 3)
    found = torch.func.vmap(layer)(t, x)
    assert_close(found, torch.stack([layer(*pair) for pair in zip(t, x, strict=True)]))


def test_shared_weights_stay_shared():
    """Two places of one parameter read the same piece, and its gradient is that of both."""
    module = nn.Sequential(nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 3))
    module[2].weight = module[0].weight
    layer = TimeWeights(module, "piecewise-constant", 2, 1.0)
    assert len(list(layer.parameters())) == 3
    x, t = torch.randn(4, 3), torch.tensor(0.7)
    loss = layer(t, x).square().sum()
    (found,) = torch.autograd.grad(loss, layer.module[0].weight)
    frozen = layer.frozen(t)
    assert frozen[0].weight is frozen[2].weight
    (expected,) = torch.autograd.grad(frozen(x).square().sum(), frozen[0].weight)
    assert_close(found, torch.stack([torch.zeros_like(expected), expected]))
