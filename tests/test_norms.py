"""The compiled norm of channels against the formula of PyTorch."""

import pytest
import torch

from pathline import native
from pathline.native import norms
from pathline.nets import ChannelNorm, Conv, Dense, SymmetricLayer

pytestmark = pytest.mark.skipif(
    not native.instruction_sets(), reason="the kernel was not compiled: no C++ compiler"
)
TOLERANCE = {torch.float64: 1e-13, torch.float32: 2e-6}
# Sizes that leave remainders of vectors, of blocks of 16 rows and of tiles of 256.
SHAPES = [(5, 1), (37, 3), (300, 16), (1, 56), (2, 23, 5, 7), (3, 64, 16, 16), (4, 112, 3, 1)]
instruction_sets = pytest.mark.parametrize("instruction_set", native.instruction_sets())
relu_or_not = pytest.mark.parametrize("relu", [False, True])


def case(shape, dtype=torch.float64, seed=0):
    """z of a shape with channels last, and a norm with a scale and a bias."""
    generator = torch.Generator().manual_seed(seed)
    norm = ChannelNorm(shape[1]).double()
    with torch.no_grad():
        norm.scale.copy_(torch.randn(shape[1], generator=generator, dtype=torch.float64))
        norm.bias.copy_(torch.randn(shape[1], generator=generator, dtype=torch.float64) / 5)
    z = torch.randn(shape, generator=generator, dtype=torch.float64)
    if len(shape) == 4:
        z = z.contiguous(memory_format=torch.channels_last)
    return norm.to(dtype), z.to(dtype).requires_grad_()


def results(norm, z, relu, d_y):
    y = norm(z, relu=relu)
    return y.detach(), *torch.autograd.grad(y, (z, norm.scale, norm.bias), d_y)


@instruction_sets
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@relu_or_not
def test_equals_the_formula(shape, dtype, relu, instruction_set):
    norm, z = case(shape, dtype)
    d_y = torch.randn_like(z)
    with native.using(instruction_set):
        assert norms.can_serve(z, norm.scale, norm.bias)
        mine = results(norm, z, relu, d_y)
    with native.using(None):
        exact = results(*case(shape), relu, d_y.double())
    for a, b in zip(mine, exact, strict=True):
        assert (a.shape, a.dtype) == (b.shape, dtype)
        assert a.stride() == b.stride()
        error = (a.double() - b).abs().max()
        assert error < TOLERANCE[dtype] * max(1.0, b.abs().max().item())


@relu_or_not
def test_derivatives(relu):
    """Finite differences, of the gradient as well."""
    norm, z = case((4, 3, 2, 2), seed=1)

    def value(z, scale, bias):
        parameters = {"scale": scale, "bias": bias}
        return torch.func.functional_call(norm, parameters, (z,), {"relu": relu})

    inputs = (z, norm.scale, norm.bias)
    assert torch.autograd.gradcheck(value, inputs)
    assert torch.autograd.gradgradcheck(value, inputs)


def test_a_gradient_for_many_adjoints_at_once():
    norm, z = case((6, 5))
    d_y = torch.randn(3, *z.shape, dtype=z.dtype)
    inputs = (z, norm.scale, norm.bias)
    y = norm(z, relu=True)
    many = torch.autograd.grad(y, inputs, d_y, is_grads_batched=True, retain_graph=True)
    one = [torch.autograd.grad(y, inputs, each, retain_graph=True) for each in d_y]
    for a, b in zip(many, map(torch.stack, zip(*one, strict=True)), strict=True):
        torch.testing.assert_close(a, b)


def test_gradients_that_are_not_wanted_and_layouts_that_are_not_at_hand():
    norm, z = case((2, 6, 4, 3))
    norm.requires_grad_(False)
    for y in (norm(z), norm(z.detach().contiguous().requires_grad_())):
        assert y.requires_grad
    (mine,) = torch.autograd.grad(norm(z).sum(), z)  # by an adjoint that is one number, expanded
    with native.using(None):
        (theirs,) = torch.autograd.grad(norm(z).sum(), z)
    torch.testing.assert_close(mine, theirs)
    assert not norm(z.detach()).requires_grad


@instruction_sets
@relu_or_not
def test_what_is_not_finite_is_as_by_pytorch(relu, instruction_set):
    for bad in (float("nan"), float("inf"), -float("inf"), 1e300):
        norm, z = case((40, 5))
        z = z.detach().clone()
        z[17, 2] = bad
        z.requires_grad_()
        d_y = torch.randn_like(z)
        with native.using(instruction_set):
            mine = results(norm, z, relu, d_y)
        with native.using(None):
            theirs = results(norm, z, relu, d_y)
        for a, b in zip(mine, theirs, strict=True):
            torch.testing.assert_close(a, b, equal_nan=True)


@pytest.mark.parametrize("shape", [(0, 4), (3, 0), (0, 4, 5, 5), (2, 4, 0, 5)])
def test_nothing_to_do(shape):
    norm, z = case(shape)
    found = results(norm, z, True, torch.ones_like(z))
    assert [a.shape for a in found] == [z.shape, z.shape, norm.scale.shape, norm.bias.shape]
    assert not any(a.any() for a in found)


def test_the_bits_do_not_depend_on_the_threads():
    norm, z = case((8, 24, 64, 64), torch.float32)
    d_y, runs = torch.randn_like(z), []
    for threads in (1, 1, 2, 3):
        with native.threads(threads):
            runs.append(results(norm, z, True, d_y))
    for run in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(run, runs[0], strict=True))


def test_serves_only_what_it_knows():
    norm, z = case((2, 6, 4, 3), torch.float32)

    def serves(z):
        return norms.can_serve(z, norm.scale, norm.bias)

    assert serves(z) and serves(z[:, :, :1, :1].contiguous())
    assert not serves(z.contiguous()) and not serves(z.double()) and not serves(z[:, :5])
    assert not serves(z[:, :, 1:]) and not serves(z[0]) and not serves(torch.zeros(6))
    with torch.autocast("cpu", torch.bfloat16):
        assert not serves(z)
    with native.using(None):
        assert not serves(z)
    assert not torch.func.vmap(lambda z: z.new_ones(()) * serves(z))(z.detach()[None]).any()
    with torch.autograd.forward_ad.dual_level():
        assert not serves(z)
    assert serves(z)


def test_function_transforms_and_forward_mode_go_by_pytorch():
    norm, z = case((4, 3))
    jacobian = torch.func.jacrev(norm)(z.detach())
    torch.testing.assert_close(torch.func.jacfwd(norm)(z.detach()), jacobian)
    torch.testing.assert_close(torch.autograd.functional.jacobian(norm, z), jacobian)


@pytest.mark.parametrize("operator", [Conv(6), Dense(6)], ids=["conv", "dense"])
def test_layers_with_norm_and_relu_use_it(operator, monkeypatch):
    layer = SymmetricLayer(operator, activation="relu", norm=True)
    z = torch.randn((5, 6, 4, 4) if isinstance(operator, Conv) else (5, 6))
    if z.ndim == 4:
        z = z.contiguous(memory_format=torch.channels_last)
    mine = layer(z)
    with native.using(None):
        torch.testing.assert_close(mine, layer(z))
    with native.using(None), torch.no_grad():
        plain = torch.relu(layer.norm(operator(z)))
        torch.testing.assert_close(mine, operator.minus_adjoint(plain))
    seen = []
    monkeypatch.setattr(norms, "_value", lambda *given: seen.append(given[-1]) or given[0])
    layer(z)
    assert seen == [True]
