"""Operators and layers: adjoints, embeddings in full kernels, counts, spectra."""

import pytest
import torch
from torch.nn import functional as F
from torch.testing import assert_close

from pathline.errors import ArgumentError, ShapeError
from pathline.nets import (
    ACTIVATIONS,
    AntisymmetricLayer,
    ChannelNorm,
    CirculantConv,
    Conv,
    Dense,
    LeanConv,
    ResidualLayer,
    ShiftConv,
    SymmetricLayer,
    operator_norm,
)

C = 6
OPERATORS = {
    "dense": lambda: (Dense(C, 4), (C,)),
    "full": lambda: (Conv(C, 4), (C, 5, 4)),
    "full, around": lambda: (Conv(C, 4, size=5, padding="circular"), (C, 5, 6)),
    "grouped": lambda: (Conv(C, 4, groups=2), (C, 5, 4)),
    "depthwise": lambda: (LeanConv(C, stencil="3x3"), (C, 5, 4)),
    "lean in groups": lambda: (LeanConv(C, group=3, padding="circular"), (C, 5, 4)),
    "5-point": lambda: (LeanConv(C), (C, 5, 4)),
    "circulant": lambda: (CirculantConv(C), (C, 5, 4)),
    "circulant, around": lambda: (CirculantConv(5, padding="circular"), (5, 4, 4)),
    "shift": lambda: (ShiftConv(C), (C, 5, 4)),
    "shift 5": lambda: (ShiftConv(11, shifts=5), (11, 5, 4)),
}


@pytest.fixture(autouse=True)
def double():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.fixture(params=OPERATORS)
def pair(request):
    operator, shape = OPERATORS[request.param]()
    return operator.double(), shape


def matrix(operator, shape):
    """K of one sample, as a matrix."""
    eye = torch.eye(torch.Size(shape).numel()).view(-1, *shape)
    return operator(eye).flatten(1).mT


def test_adjoint(pair):
    operator, shape = pair
    x = torch.randn(3, *shape)
    y = torch.randn_like(operator(x))
    assert_close((operator(x) * y).sum(), (x * operator.adjoint(y)).sum())
    assert operator.adjoint(y).shape == x.shape
    assert y.shape[1] == operator.outputs


def test_norm_is_the_largest_singular_value(pair):
    operator, shape = pair
    exact = float(torch.linalg.matrix_norm(matrix(operator, shape), 2))
    assert operator_norm(operator, shape, iterations=500) == pytest.approx(exact, rel=1e-3)
    assert operator_norm(operator, shape, iterations=20) <= exact * (1 + 1e-12)


def test_lean_is_a_full_kernel_with_zeros():
    x = torch.randn(2, C, 5, 4)
    for stencil in ("3x3", "5-point"):
        lean = LeanConv(C, stencil=stencil).double()
        kernel = torch.diag_embed(lean._kernel()[:, 0].permute(1, 2, 0)).permute(2, 3, 0, 1).clone()
        kernel[:, :, 1, 1] += lean.pointwise
        assert_close(lean(x), F.conv2d(x, kernel, padding=1), rtol=0, atol=1e-12)


def test_laplacian_is_a_lean_operator():
    """Taps of -1 and 4 times the identity: eigenvalues 4 - 2 cos a - 2 cos b."""
    lean = LeanConv(1, padding="circular").double()
    lean.spatial.data.fill_(-1)
    lean.pointwise.data.fill_(4)
    a = 2 * torch.pi * torch.arange(5) / 5
    b = 2 * torch.pi * torch.arange(4) / 4
    expected = (4 - 2 * a.cos()[:, None] - 2 * b.cos()).flatten().sort().values
    found = torch.linalg.eigvalsh(matrix(lean, (1, 5, 4)))
    assert_close(found, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("padding", ["zeros", "circular"])
@pytest.mark.parametrize("channels", [5, 6])
def test_circulant_is_the_dense_block_circulant(padding, channels):
    lean = CirculantConv(channels, padding=padding).double()
    index = (torch.arange(channels)[:, None] - torch.arange(channels)) % channels
    full = Conv(channels, padding=padding).double()
    full.weight.data = lean.weight.data[index]
    x = torch.randn(2, channels, 5, 4)
    assert_close(lean(x), full(x), rtol=0, atol=1e-12)


def test_shift_is_a_permutation():
    operator = ShiftConv(20).double()
    x = torch.randn(2, 20, 5, 4)
    assert_close(operator.shift(x).norm(), x.norm())
    assert_close(operator.shift(operator.shift(x), -1), x, rtol=0, atol=0)
    assert_close(operator.shift(x)[:, :3], x[:, :3], rtol=0, atol=0)
    assert_close(operator.shift(x)[:, 3:6], x[:, 3:6].roll(1, 3), rtol=0, atol=0)


@pytest.mark.parametrize("c", [64, 128, 256])
def test_counts(c):
    """Weights of a layer as arXiv 1910.13157 compares them."""

    def count(operator):
        return sum(p.numel() for p in operator.parameters())

    assert count(Conv(c)) == {64: 36_864, 128: 147_456, 256: 589_824}[c]
    assert count(LeanConv(c, stencil="3x3")) == {64: 4_672, 128: 17_536, 256: 67_840}[c]
    assert count(LeanConv(c)) == {64: 4_352, 128: 16_896, 256: 66_560}[c]
    assert count(LeanConv(c, stencil="3x3", group=4)) == c**2 + 36 * c
    assert count(CirculantConv(c)) == 9 * c
    assert count(ShiftConv(c)) == c**2


def test_seeds():
    made = [Conv(2, generator=torch.Generator().manual_seed(s)).weight for s in (0, 0, 1)]
    assert_close(made[0], made[1], rtol=0, atol=0)
    assert not torch.equal(made[0], made[2])


# Layers


def of(layer, z):
    """The Jacobian of a layer at each row of z, (batch, dim, dim)."""
    return torch.func.vmap(torch.func.jacrev(lambda one: layer(one[None])[0]))(z)


@pytest.mark.parametrize("activation", ["tanh", "relu"])
def test_antisymmetric_spectrum(activation):
    z = torch.randn(4, 5)
    layer = AntisymmetricLayer(Dense(5), activation=activation).double()
    assert torch.linalg.eigvals(of(layer, z)).real.abs().max() < 1e-12
    damped = AntisymmetricLayer(Dense(5), 0.3, activation=activation).double()
    assert torch.linalg.eigvals(of(damped, z)).real.max() < 1e-12


def test_symmetric_jacobian():
    layer = SymmetricLayer(Conv(2), activation="tanh").double()
    J = of(lambda z: layer(z.view(-1, 2, 3, 3)).flatten(1), torch.randn(2, 18))
    assert_close(J, J.mT)
    assert torch.linalg.eigvalsh(J).max() < 1e-12


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_symmetric_layer_is_minus_a_gradient(activation):
    layer = SymmetricLayer(Conv(2, 3), activation=activation).double()
    layer.bias.data.normal_()
    z = torch.randn(2, 2, 4, 3, requires_grad=True)
    (slope,) = torch.autograd.grad(layer.potential(z).sum(), z)
    assert_close(layer(z), -slope)


def test_residual_layer_with_the_adjoint():
    layer = ResidualLayer(Dense(3)).double()
    layer.bias.data.normal_()
    z = torch.randn(4, 3)
    K, b = layer.operator.weight, layer.bias
    assert_close(layer(z), torch.tanh(z @ K.mT + b))
    assert_close(layer(z, adjoint=True), torch.tanh(z @ K + b))


def test_channel_norm():
    norm = ChannelNorm(3).double()
    norm.scale.data, norm.bias.data = torch.randn(3), torch.randn(3)
    z = torch.randn(2, 3, 4, 5)
    length = torch.linalg.vector_norm(z, dim=1, keepdim=True)
    expected = norm.scale.view(3, 1, 1) * z / torch.sqrt(length**2 + 1e-4)
    assert_close(norm(z), expected + norm.bias.view(3, 1, 1))
    assert_close(norm(z[:, :, 1, 2]), norm(z)[:, :, 1, 2])


@pytest.mark.parametrize(
    "make, words",
    [
        (lambda: Conv(3, size=2), "`size` must be odd, got 2"),
        (lambda: Conv(3, groups=2), "`groups` must divide 3 and 3 channels, got 2"),
        (lambda: Conv(3, padding="mirror"), "`padding` must be one of .*'mirror'"),
        (lambda: LeanConv(3, stencil="7x7"), "`stencil` must be one of .*'7x7'"),
        (lambda: LeanConv(3, group=2), "`group` must divide 3 channels, got 2"),
        (lambda: ShiftConv(3, shifts=4), "`shifts` must be 5 or 9, got 4"),
        (lambda: Dense(0), "positive number of features, got 0"),
        (lambda: ResidualLayer(Dense(3), activation="tan"), "did you mean 'tanh'"),
        (lambda: ResidualLayer(Dense(3, 4)), "as many outputs as inputs, got 3 and 4"),
        (lambda: AntisymmetricLayer(Dense(3), -1.0), "`gamma` must be at least 0, got -1.0"),
    ],
)
def test_errors(make, words):
    with pytest.raises(ArgumentError, match=words):
        make()


def test_wrong_images():
    with pytest.raises(ShapeError, match=r"Conv needs features \(batch, 3, height, width\)"):
        Conv(3)(torch.randn(2, 4, 5, 5))
    with pytest.raises(ShapeError, match=r"Dense needs features \(batch, 3\), got \(2, 4\)"):
        Dense(3)(torch.randn(2, 4))
