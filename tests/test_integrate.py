"""Order, direction, quadrature and times of the fixed-step integrator."""

import math

import numpy as np
import pytest
import torch
from scipy.integrate import quad
from scipy.linalg import expm

from pathline.errors import ArgumentError
from pathline.integrate import EULER, MIDPOINT, RK4, march

M = np.array([[-0.5, 1.5, 0.2], [-2.0, 0.1, 0.6], [0.3, -0.4, -1.0]])
X0 = np.array([0.3, 0.8, 0.6])
TABLEAUS = (EULER, MIDPOINT, RK4)


def linear(t, z, weight):
    """dz/dt = M z, and a rate that bends in time and in z."""
    q = torch.sin(3 * t + 0.5) * z[:, 0] ** 2 + torch.exp(0.3 * z[:, 1]) * t
    return z @ torch.from_numpy(M).T, {"q": q} if weight is not None else {}


def linear_exact(start, stop):
    return expm(M * (stop - start)) @ X0


def linear_integral(start, stop):
    def q(t):
        z = linear_exact(start, t)
        return math.sin(3 * t + 0.5) * z[0] ** 2 + math.exp(0.3 * z[1]) * t

    return quad(q, start, stop, epsabs=1e-13, epsrel=1e-13)[0]


def bent(t, z, weight):
    """dz/dt = (1 + 2 t) z (1 - z): nonlinear and time-dependent."""
    return (1 + 2 * t) * z * (1 - z), {}


def bent_exact(start, stop):
    return 1 / (1 + (1 / X0 - 1) * math.exp(start + start**2 - stop - stop**2))


PROBLEMS = {"linear": (linear, linear_exact), "bent": (bent, bent_exact)}


def slope(steps, errors):
    return -np.polyfit(np.log(steps), np.log(errors), 1)[0]


@pytest.mark.parametrize("span", [(0.0, 1.0), (1.0, 0.0), (0.2, 0.9)], ids=str)
@pytest.mark.parametrize("problem", PROBLEMS)
@pytest.mark.parametrize(
    "method, order", [(EULER, 1), (MIDPOINT, 2), (RK4, 4)], ids=lambda m: str(getattr(m, "name", m))
)
def test_order(method, order, problem, span):
    field, exact = PROBLEMS[problem]
    steps = (64, 128, 256, 512) if order == 1 else (16, 32, 64, 128)
    errors = []
    for n in steps:
        got = march(
            field, torch.from_numpy(X0)[None], steps=n, start=span[0], stop=span[1], method=method
        )
        errors.append(np.abs(got.z[0].numpy() - exact(*span)).max())
    assert slope(steps, errors) == pytest.approx(order, abs=0.15)
    assert method.order == order


@pytest.mark.parametrize("span", [(0.0, 1.0), (1.0, 0.0), (0.3, 1.4)], ids=str)
def test_order_of_quadrature(span):
    want, steps, errors = linear_integral(*span), (16, 32, 64, 128), []
    for n in steps:
        got = march(
            linear,
            torch.from_numpy(X0)[None],
            steps=n,
            start=span[0],
            stop=span[1],
            quadrature=True,
        )
        errors.append(abs(got.integrals["q"].item() - want))
    assert slope(steps, errors) == pytest.approx(4, abs=0.15)
    assert errors[-1] < 1e-6


@pytest.mark.parametrize("method", TABLEAUS, ids=lambda m: m.name)
@pytest.mark.parametrize("steps", [1, 2, 5])
def test_quadrature_is_exact_for_cubics_in_time(steps, method):
    def field(t, z, weight):
        return torch.ones_like(z), {
            "cubic": (t**3 - 2 * t**2 + 5 * t - 1).expand(2),
            "one": torch.ones(2),
        }

    def primitive(t):
        return t**4 / 4 - 2 * t**3 / 3 + 5 * t**2 / 2 - t

    for start, stop in ((0.0, 2.0), (1.5, -0.5)):
        got = march(
            field, torch.zeros(2, 1).double(), steps=steps, start=start, stop=stop, method=method,
            quadrature=True,
        )  # fmt: skip
        want = torch.full((2,), primitive(stop) - primitive(start), dtype=torch.float64)
        torch.testing.assert_close(got.integrals["cubic"].double(), want, rtol=1e-13, atol=1e-13)
        length = torch.full((2,), stop - start)
        torch.testing.assert_close(got.integrals["one"], length)


@pytest.mark.parametrize("method", TABLEAUS, ids=lambda m: m.name)
def test_quadrature_leaves_the_path_unchanged(method):
    z0 = torch.from_numpy(X0)[None]
    plain = march(linear, z0, steps=7, method=method)
    full = march(linear, z0, steps=7, method=method, quadrature=True, trajectory=True)
    assert torch.equal(plain.z, full.z)
    assert plain.integrals == {} and plain.zs is None


def test_evaluations():
    """Rates are asked for 2 steps + 1 times, at the ends and middles of the steps."""
    nodes, others = [], []

    def field(t, z, weight):
        (nodes if weight is not None else others).append(t.item())
        return -z, {"q": z[:, 0]} if weight is not None else {}

    march(field, torch.ones(1, 1).double(), steps=4, quadrature=True)
    assert sorted(nodes) == [i / 8 for i in range(9)]
    assert len(others) == 4 * 3
    nodes.clear(), others.clear()
    march(field, torch.ones(1, 1).double(), steps=4)
    assert nodes == [] and len(others) == 4 * 4


@pytest.mark.parametrize("method", TABLEAUS, ids=lambda m: m.name)
@pytest.mark.parametrize("span", [(0.0, 1.0), (1.0, -0.5)], ids=str)
@pytest.mark.parametrize("steps", [1, 2, 5])
def test_weights_are_the_derivatives_of_the_integral(steps, span, method):
    """The field learns the factor with which its rates enter, at the time of each evaluation."""
    rates, weights = [], []

    def field(t, z, weight):
        if weight is None:
            return -z, {}
        rates.append(torch.randn(2, dtype=torch.float64, requires_grad=True))
        weights.append(weight)
        return -z, {"q": rates[-1]}

    got = march(
        field, torch.ones(2, 1).double(), steps=steps, start=span[0], stop=span[1],
        method=method, quadrature=True,
    )  # fmt: skip
    for grad, weight in zip(
        torch.autograd.grad(got.integrals["q"].sum(), rates), weights, strict=True
    ):
        torch.testing.assert_close(grad, torch.full_like(grad, weight), rtol=1e-14, atol=0)
    assert sum(weights) == pytest.approx(span[1] - span[0])


@pytest.mark.parametrize("steps", [3, 7, 49, 10_000])
@pytest.mark.parametrize("span", [(0.0, 1.0), (1.0, 0.0), (0.1, 0.7)], ids=str)
def test_single_precision_time_does_not_drift(steps, span):
    times = []

    def field(t, z, weight):
        assert t.dtype == torch.float32 and t.ndim == 0
        times.append(t)
        return torch.zeros_like(z), {}

    march(
        field,
        torch.zeros(1, 1),
        steps=steps,
        start=span[0],
        stop=span[1],
        method=EULER,
        quadrature=True,
    )
    times = torch.stack(times)
    assert times[0] == torch.tensor(span[0])
    assert times[-2] == torch.tensor(span[1])  # the last one is the middle of the last step
    grid = np.linspace(*span, steps + 1).astype(np.float32)
    np.testing.assert_allclose(times[1::2].numpy(), grid[1:], rtol=0, atol=6e-8)


def test_trajectory():
    z0 = torch.from_numpy(np.stack([X0, 2 * X0]))
    got = march(linear, z0, steps=6, trajectory=True)
    assert got.zs.shape == (7, 2, 3)
    assert torch.equal(got.zs[0], z0)
    assert torch.equal(got.zs[-1], got.z)
    half = march(linear, z0, steps=3, stop=0.5)
    torch.testing.assert_close(got.zs[3], half.z, rtol=1e-14, atol=1e-14)
    torch.testing.assert_close(got.z[1], 2 * got.z[0])  # linear in z0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_dtype_and_input_are_kept(dtype):
    z0 = torch.ones(2, 3, dtype=dtype)
    got = march(lambda t, z, weight: (-z * t, {"q": z[:, 0]}), z0, steps=3, quadrature=True)
    assert got.z.dtype == got.integrals["q"].dtype == dtype
    assert torch.equal(z0, torch.ones(2, 3, dtype=dtype))


def test_gradients():
    def function(z0, scale):
        def field(t, z, weight):
            dz = torch.sin(scale * z.flip(1)) * (1 + t)
            return dz, {"q": (z * dz).sum(1)}

        got = march(field, z0, steps=3, quadrature=True, trajectory=True)
        return got.z, got.zs, got.integrals["q"]

    inputs = (
        torch.randn(2, 2).double().requires_grad_(),
        torch.tensor(0.7).double().requires_grad_(),
    )
    assert torch.autograd.gradcheck(function, inputs)


@pytest.mark.parametrize("steps", [0, -3])
def test_steps_error(steps):
    with pytest.raises(ArgumentError, match=f"`steps` must be at least 1, got {steps}"):
        march(linear, torch.zeros(1, 3).double(), steps=steps)
