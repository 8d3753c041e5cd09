"""The compiled filter of images against the Fourier transforms of PyTorch."""

import pytest
import torch

from pathline import native
from pathline.native import filters
from pathline.nets import Conv
from pathline.networks import Parabolic, SemiImplicit
from pathline.networks.semi_implicit import MinusL

pytestmark = pytest.mark.skipif(
    not native.instruction_sets(), reason="the kernel was not compiled: no C++ compiler"
)
TOLERANCE = {torch.float64: 1e-13, torch.float32: 3e-6}
# Even and odd sides, sides without a pair of waves, and channels that leave remainders of vectors
SHAPES = [(2, 1, 1, 1), (3, 5, 2, 3), (1, 17, 8, 8), (2, 31, 7, 10), (1, 3, 1, 6), (2, 33, 32, 31)]
instruction_sets = pytest.mark.parametrize("instruction_set", native.instruction_sets())


def case(shape, dtype=torch.float64):
    """Images and the factors of a symmetric filter."""
    generator = torch.Generator().manual_seed(0)
    z = torch.randn(shape, generator=generator, dtype=torch.float64)
    kernel = torch.randn(shape[1:], generator=generator, dtype=torch.float64)
    factors = torch.fft.rfft2(kernel / kernel.abs().sum((1, 2), keepdim=True)).abs().square()
    z = z.contiguous(memory_format=torch.channels_last)
    return z.to(dtype).requires_grad_(), factors.to(dtype).requires_grad_()


def formula(z, factors):
    return torch.fft.irfft2(torch.fft.rfft2(z) * factors, s=z.shape[2:])


@instruction_sets
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_equals_the_fourier_transforms(shape, dtype, instruction_set):
    z, factors = case(shape, dtype)
    d_y = torch.randn_like(z)
    with native.using(instruction_set):
        assert filters.can_serve(z, factors)
        y = filters.filtered(z, factors)
        mine = y, *torch.autograd.grad(y, (z, factors), d_y)
    wide = [t.detach().double().requires_grad_() for t in (z, factors)]
    y = formula(*wide)
    exact = y, *torch.autograd.grad(y, wide, d_y.double())
    for a, b in zip(mine, exact, strict=True):
        assert (a.shape, a.dtype) == (b.shape, dtype)
        error = (a.double() - b).abs().max()
        assert error < TOLERANCE[dtype] * max(1.0, b.abs().max().item())
    assert mine[0].stride() == mine[1].stride() == z.stride()


def test_derivatives():
    """Finite differences, of the gradient as well, by kernels of which the factors are made: a
    factor by itself would not be that of a symmetric filter."""
    z, _ = case((2, 3, 4, 5))
    kernel = torch.rand(3, 4, 5, dtype=torch.float64, requires_grad=True)

    def value(z, kernel):
        z = z.contiguous(memory_format=torch.channels_last)
        waves = torch.fft.rfft2(kernel)
        factors = waves.real.square() + waves.imag.square()
        assert filters.can_serve(z, factors)
        return filters.filtered(z, factors)

    assert torch.autograd.gradcheck(value, (z, kernel))
    assert torch.autograd.gradgradcheck(value, (z, kernel))


def test_a_gradient_for_many_adjoints_at_once():
    z, factors = case((2, 3, 4, 6))
    d_y = torch.randn(3, *z.shape, dtype=z.dtype)
    y = filters.filtered(z, factors)
    inputs = (z, factors)
    many = torch.autograd.grad(y, inputs, d_y, is_grads_batched=True, retain_graph=True)
    one = [torch.autograd.grad(y, inputs, each, retain_graph=True) for each in d_y]
    for a, b in zip(many, map(torch.stack, zip(*one, strict=True)), strict=True):
        torch.testing.assert_close(a, b)


def test_the_bits_do_not_depend_on_the_threads():
    z, factors = case((8, 70, 32, 32), torch.float32)
    d_y, runs = torch.randn_like(z), []
    for threads in (1, 1, 2, 3):
        with native.threads(threads):
            y = filters.filtered(z, factors)
            runs.append((y, *torch.autograd.grad(y, (z, factors), d_y)))
    for run in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(run, runs[0], strict=True))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite_stays_in_its_channel_and_image(bad):
    z, factors = case((2, 5, 6, 6))
    z = z.detach().clone()
    good = filters.filtered(z, factors)
    z[1, 2, 3, 3] = bad
    y = filters.filtered(z, factors)
    there = torch.zeros(2, 5, dtype=torch.bool)
    there[1, 2] = True
    assert not y[there].isfinite().any()
    assert torch.equal(y[~there], good[~there])


def test_serves_only_what_it_knows():
    z, factors = case((2, 6, 4, 6))
    assert filters.can_serve(z, factors)
    assert not filters.can_serve(z.contiguous(), factors)
    assert not filters.can_serve(z.float(), factors)
    assert not filters.can_serve(z, factors[:, :, :1])
    assert not filters.can_serve(z[:0], factors)
    assert not filters.can_serve(*case((1, 1, 2, 2 * filters.LARGEST)))
    with native.using(None):
        assert not filters.can_serve(z, factors)
    with torch.autograd.forward_ad.dual_level():
        assert not filters.can_serve(z, factors)


def test_semi_implicit_steps_use_it(monkeypatch):
    dynamics = SemiImplicit(Parabolic(Conv(6)), 6)
    z = torch.randn(2, 6, 8, 8).contiguous(memory_format=torch.channels_last)
    part = dynamics.at(torch.tensor(0.0))
    mine = part.solve(z, 0.5)
    torch.testing.assert_close(mine - 0.5 * part(mine), z)
    with native.using(None):
        torch.testing.assert_close(mine, part.solve(z, 0.5))
    seen = []
    monkeypatch.setattr(filters, "filtered", lambda z, factors: seen.append(1) or z)
    assert isinstance(part, MinusL) and torch.equal(part.solve(z, 0.5), z) and seen == [1]
