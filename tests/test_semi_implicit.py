"""Semi-implicit steps against dense matrices, growth factors and the Green's function."""

import pytest
import torch
from torch.nn import functional as F
from torch.testing import assert_close

from pathline.errors import ArgumentError, ShapeError
from pathline.nets import Conv, Dense, LeanConv, TimeBasis
from pathline.networks import Dynamics, Evolution, Parabolic, SemiImplicit
from pathline.networks.semi_implicit import MinusL

SIZES = [(8, 6), (5, 4), (3, 7), (2, 3)]


@pytest.fixture(autouse=True)
def double():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


class Still(Dynamics):
    """z' = rate z."""

    def __init__(self, rate=0.0, time=None):
        super().__init__(time or TimeBasis())
        self.rate = rate

    def forward(self, t, z):
        return self.rate * z


def diffuse(dynamics=None, channels=2, seed=0, **options):
    made = SemiImplicit(dynamics or Still(), channels, **options).double()
    made.layer.module.kernel.data = torch.randn(
        made.layer.module.kernel.shape, generator=torch.Generator().manual_seed(seed)
    )
    return made


def dense_B(kernel, boundary, height, width):
    """The depthwise convolution with one kernel as a matrix, built pixel by pixel."""
    if boundary == "reflecting":
        kernel = sum((kernel, kernel.flip(0), kernel.flip(1), kernel.flip(0, 1))) / 4
    B = torch.zeros(height, width, height, width)

    def inside(i, size):
        if boundary == "periodic":
            return i % size
        return -1 - i if i < 0 else 2 * size - 1 - i if i >= size else i

    for i in range(height):
        for j in range(width):
            for a in (-1, 0, 1):
                for b in (-1, 0, 1):
                    B[i, j, inside(i + a, height), inside(j + b, width)] += kernel[a + 1, b + 1]
    return B.view(height * width, height * width)


@pytest.mark.parametrize("boundary", ["periodic", "reflecting"])
@pytest.mark.parametrize("size", SIZES)
def test_solve_is_the_dense_solve(boundary, size):
    dynamics = diffuse(boundary=boundary)
    z, t, h = torch.randn(3, 2, *size), torch.tensor(0.3), 0.7
    minus = dynamics.at(t)
    for channel in range(2):
        kernel = dynamics.layer.module.kernel[0, channel, 0].detach()
        B = dense_B(kernel, boundary, *size)
        flat = z[:, channel].flatten(1)
        eye = torch.eye(len(B))
        expected = torch.linalg.solve(eye + h * B.mT @ B, flat.mT).mT
        assert_close(minus.solve(z, h)[:, channel].flatten(1), expected, rtol=0, atol=1e-12)
        assert_close(minus(z)[:, channel].flatten(1), -flat @ B.mT @ B, rtol=0, atol=1e-11)


@pytest.mark.parametrize("form", ["imex", "diffusion-reaction"])
def test_a_step_is_the_formula(form):
    time = TimeBasis("piecewise-constant", 3, 1.5)
    inner = Parabolic(Conv(2), time)
    dynamics = diffuse(inner, form=form)
    for parameter in inner.parameters():
        parameter.data = 0.3 * torch.randn_like(parameter)
    z = x = torch.randn(3, 2, 8, 6)
    with torch.no_grad():
        for j in range(3):
            minus, v = dynamics.at(torch.tensor(0.5 * j)), inner(torch.tensor(0.5 * j), z)
            z = minus.solve(z + 0.5 * v - (0.5 * minus(z) if form == "imex" else 0), 0.5)
        assert_close(Evolution(dynamics, steps=3)(x), z, rtol=0, atol=1e-12)


@pytest.mark.parametrize("form", ["imex", "diffusion-reaction"])
def test_a_step_filters_once(form, monkeypatch):
    calls, true = [], MinusL._filtered
    monkeypatch.setattr(MinusL, "_filtered", lambda *args: calls.append(1) or true(*args))
    dynamics = diffuse(Parabolic(Conv(2), TimeBasis(horizon=1.5)), form=form)
    Evolution(dynamics, steps=3)(torch.randn(3, 2, 8, 6))
    assert len(calls) == 3


@pytest.mark.parametrize("rate", [-0.5, -3.0, -40.0])
def test_growth_factor(rate):
    """(1 + h alpha + h lambda) / (1 + h alpha), for h over six orders of magnitude."""
    alpha, z = 2.0, torch.ones(1, 1, 4, 4)
    for h in torch.logspace(-3, 3, 13).tolist():
        dynamics = diffuse(Still(rate, TimeBasis(horizon=h)), 1)
        dynamics.layer.module.kernel.data.zero_()
        dynamics.layer.module.kernel.data[..., 1, 1] = alpha**0.5
        factor = Evolution(dynamics, steps=1)(z).detach()
        expected = (1 + h * alpha + h * rate) / (1 + h * alpha)
        assert_close(factor, expected * z)
        if alpha >= abs(rate) / 2:
            assert abs(expected) <= 1
    dynamics = diffuse(Still(rate, TimeBasis(horizon=0.3)), 1, form="diffusion-reaction")
    dynamics.layer.module.kernel.data.zero_()
    dynamics.layer.module.kernel.data[..., 1, 1] = alpha**0.5
    factor = (1 + 0.3 * rate) / (1 + 0.3 * alpha)
    assert_close(Evolution(dynamics, steps=1)(z).detach(), factor * z)


@pytest.mark.parametrize("boundary", ["periodic", "reflecting"])
def test_one_step_reaches_the_whole_image(boundary):
    """A point with B = Laplacian: the sum is kept, and everything far away is moved."""
    dynamics = diffuse(channels=1, boundary=boundary, form="diffusion-reaction")
    stencil = torch.tensor([[-1.0, -4, -1], [-4, 20, -4], [-1, -4, -1]]) / 6
    dynamics.layer.module.kernel.data[0, 0, 0] = stencil
    image = torch.zeros(1, 1, 9, 12)
    image[..., 4, 5] = 1
    after = Evolution(dynamics, steps=1)(image).detach()
    assert_close(after.sum(), torch.tensor(1.0))
    assert after.abs().min() > 1e-8
    B = dense_B(stencil, boundary, 9, 12)
    green = torch.linalg.inv(torch.eye(108) + B.mT @ B)[4 * 12 + 5]
    assert_close(after.flatten(), green, rtol=0, atol=1e-13)


def test_limits_of_small_steps():
    """(z' - z) / h goes to v in one form and to v - L z in the other."""
    z, h = torch.randn(2, 2, 5, 6), 1e-6
    for form in ("imex", "diffusion-reaction"):
        time = TimeBasis(horizon=h)
        inner = Parabolic(LeanConv(2), time)
        dynamics = diffuse(inner, form=form)
        with torch.no_grad():
            found = (Evolution(dynamics, steps=1)(z) - z) / h
            limit = inner(torch.tensor(0.0), z)
            limit = limit if form == "imex" else limit + dynamics.at(torch.tensor(0.0))(z)
            assert_close(found, limit, rtol=0, atol=1e-3)
            assert_close(dynamics(torch.tensor(0.0), z), limit)


@pytest.mark.parametrize("method, order", [("imex_euler", 1), ("ars222", 2), ("rk4", 4)])
def test_order_with_weights_in_time(method, order):
    """An implicit part that moves keeps the order, and all methods have one limit."""
    time = TimeBasis("legendre", 2, 0.5)
    inner = Parabolic(Conv(2), time, activation="tanh")
    dynamics = diffuse(inner, form="diffusion-reaction")
    for parameter in dynamics.parameters():
        parameter.data = 0.3 * torch.randn_like(parameter)
    x = torch.randn(2, 2, 5, 6)
    with torch.no_grad():
        exact = Evolution(dynamics, steps=256, method="rk4")(x)
        e = [
            (Evolution(dynamics, steps=n, method=method)(x) - exact).norm().log2()
            for n in (8, 16, 32)
        ]
    assert float(e[0] - e[2]) / 2 == pytest.approx(order, abs=0.25)


@pytest.mark.parametrize("boundary", ["periodic", "reflecting"])
def test_gradient_of_the_kernels(boundary):
    dynamics = diffuse(boundary=boundary)

    def solved(kernel, z):
        layer = dynamics.layer.module
        symbol = torch.func.functional_call(layer, {"kernel": kernel}, z.shape[2:])
        minus = dynamics.at(torch.tensor(0.0))
        minus.known = (tuple(z.shape[2:]), symbol)
        return minus.solve(z, 0.4)

    kernel = torch.randn(2, 1, 3, 3, requires_grad=True)
    z = torch.randn(2, 2, 4, 5, requires_grad=True)
    assert torch.autograd.gradcheck(solved, (kernel, z))


def test_checkpoints_have_the_same_gradient():
    time = TimeBasis("piecewise-constant", 4, 2.0)
    dynamics = diffuse(Parabolic(Conv(2), time, norm=True))
    x, found = torch.randn(2, 2, 6, 6), []
    for gradient in ("discrete", "checkpoint"):
        loss = Evolution(dynamics, steps=4, gradient=gradient)(x).square().sum()
        found.append(torch.autograd.grad(loss, list(dynamics.parameters())))
    assert_close(found[0], found[1], rtol=0, atol=0)
    assert all(bool(grad.any()) for grad in found[0])


def test_errors():
    with pytest.raises(ArgumentError, match=r"`form` must be one of .*'implicit'"):
        SemiImplicit(Still(), 2, form="implicit")
    with pytest.raises(ArgumentError, match=r"`boundary` must be one of .*'open'"):
        SemiImplicit(Still(), 2, boundary="open")
    with pytest.raises(ShapeError, match=r"\(batch, channels, height, width\), got \(3, 2\)"):
        Evolution(SemiImplicit(Parabolic(Dense(2)), 2))(torch.randn(3, 2))
    with pytest.raises(ShapeError, match="the diffusion has 3 channels, the features 2"):
        Evolution(SemiImplicit(Still(), 3))(torch.randn(3, 2, 4, 4))


def test_reflection_is_padding_by_the_edge():
    """A symmetric B that reflects is a convolution of the image continued by its edge."""
    kernel = torch.tensor([[1.0, 2, 1], [0.5, 3, 0.5], [1, 2, 1]])
    dynamics = diffuse(channels=1, boundary="reflecting")
    dynamics.layer.module.kernel.data[0, 0, 0] = kernel
    z = torch.randn(1, 1, 5, 6)

    def convolve(z):
        return F.conv2d(F.pad(z, (1, 1, 1, 1), mode="replicate"), kernel[None, None])

    assert_close(dynamics.at(torch.tensor(0.0))(z), -convolve(convolve(z)))
