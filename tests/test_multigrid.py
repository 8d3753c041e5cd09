"""Multigrid in channels: published counts, connectivity, consistency; and invertible blocks."""

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from pathline.errors import ArgumentError, SolveError
from pathline.nets import CirculantConv, Conv, Dense, LeanConv, ShiftConv, TimeBasis, operator_norm
from pathline.networks import Evolution, InvertibleBlock, Multigrid, MultigridBlock


@pytest.fixture(autouse=True)
def double():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def kernels(module):
    return sum(p.numel() for p in module.parameters() if p.ndim == 4)


COUNTS = {64: 33_792, 128: 72_704, 256: 150_528, 512: 306_176, 1024: 617_472}


@pytest.mark.parametrize("channels", COUNTS)
def test_weights_are_linear_in_the_width(channels):
    """The table that follows from arXiv 2011.09128 with groups of 16."""
    block = MultigridBlock(channels, group=16, coarsest=16)
    assert kernels(block) == COUNTS[channels]
    full = 2 * 9 * channels**2
    assert kernels(MultigridBlock(channels, coarsest=channels)) == full
    assert COUNTS[channels] < 640 * channels < full


def test_all_channels_are_coupled():
    """By one block; a grouped one alone couples none of its groups."""
    block = MultigridBlock(32, group=4, coarsest=4)
    for parameter in block.parameters():
        parameter.data = torch.rand_like(parameter)
    for tied, wanted in ((False, 32 * 32), (True, 32 * 32)):
        if tied:
            block = MultigridBlock(32, group=4, coarsest=4, tied=True)
            for parameter in block.parameters():
                parameter.data = torch.rand_like(parameter)
        x = torch.rand(1, 32, 1, 1)
        J = torch.autograd.functional.jacobian(lambda x, b=block: b(x).flatten(), x).view(32, 32)
        assert int((J != 0).sum()) == wanted
    smoother = MultigridBlock(32, group=4, coarsest=4).smoothers[0]
    kernel = smoother.kernels[0]
    J = torch.autograd.functional.jacobian(lambda x: kernel(x).flatten(), x).view(32, 32)
    blocks = torch.kron(torch.eye(8), torch.ones(4, 4)).bool()
    assert not J[~blocks].any()
    assert (J[blocks] != 0).all()


def test_what_the_coarse_level_leaves_is_left():
    """The change is prolonged and not the state: identities below make an identity."""
    block = MultigridBlock(16, group=4, coarsest=4)
    block.smoothers = nn.ModuleList(nn.Identity() for _ in block.smoothers)
    x = torch.randn(2, 16, 3, 3)
    assert_close(block(x), x, rtol=0, atol=0)


def test_tied_prolongation_is_the_adjoint():
    block = MultigridBlock(16, group=4, coarsest=4, tied=True)
    assert kernels(MultigridBlock(16, group=4, coarsest=4)) - kernels(block) == 16 * 2 + 8 * 2
    x, y = torch.randn(2, 16, 3, 3), torch.randn(2, 8, 3, 3)
    assert_close((block.restrict(0, x) * y).sum(), (x * block.prolong(0, y)).sum())


def test_an_euler_step_of_one_is_the_block():
    block = MultigridBlock(8, group=4, coarsest=4)
    evolution = Evolution(Multigrid(block, TimeBasis(order=2, horizon=2.0)), steps=2)
    x = torch.randn(2, 8, 4, 3)
    assert_close(evolution(x), block(block(x)))
    evolution(x).square().sum().backward()
    assert all(bool(p.grad.any()) for p in evolution.parameters())


@pytest.mark.parametrize("options", [{"channels": 24, "coarsest": 4}, {"channels": 16, "group": 3}])
def test_errors(options):
    with pytest.raises(ArgumentError, match="times a power of two, and `group` even"):
        MultigridBlock(**{"group": 4, "coarsest": 4} | options)


# Invertible residual blocks

OPERATORS = {
    "dense": (lambda: (Dense(3, 5), Dense(5, 3)), (3,)),
    "image": (lambda: (Conv(3, 6), Conv(6, 3, padding="circular", groups=3)), (3, 6, 5)),
    "lean": (lambda: (LeanConv(4, group=2), CirculantConv(4)), (4, 6, 5)),
    "shift": (lambda: (ShiftConv(4), LeanConv(4, stencil="3x3")), (4, 6, 5)),
}


@pytest.mark.parametrize("name", OPERATORS)
def test_norms_are_below_their_bounds(name):
    make, shape = OPERATORS[name]
    for seed in range(3):
        torch.manual_seed(seed)
        first, second = make()
        y = first(torch.randn(1, *shape))
        for operator, each in ((first, shape), (second, y.shape[1:])):
            norm, bound = operator_norm(operator, each, iterations=500), float(operator.bound())
            assert norm <= bound * (1 + 1e-9)
            assert bound <= 4 * norm


@pytest.mark.parametrize("name", OPERATORS)
def test_inverse_by_fixed_point(name):
    make, shape = OPERATORS[name]
    block = InvertibleBlock(*make(), bound=0.9)
    for parameter in block.parameters():
        parameter.data = 3 * torch.randn_like(parameter)
    x = torch.randn(20, *shape)
    y = block(x).detach()
    assert float((y - x).norm()) > 0.1
    assert_close(block.inverse(y), x, rtol=0, atol=1e-12)
    assert float(block.scale()) < 1


def test_blocks_are_lipschitz():
    block = InvertibleBlock(Dense(4, 9), Dense(9, 4), bound=0.7, activation="identity")
    for parameter in block.parameters():
        parameter.data = 3 * torch.randn_like(parameter)
    J = torch.autograd.functional.jacobian(lambda x: block(x[None])[0], torch.randn(4))
    assert float(torch.linalg.matrix_norm(J - torch.eye(4), 2)) <= 0.7 * (1 + 1e-12)


def test_gradients_reach_the_bound():
    block = InvertibleBlock(Dense(3), Dense(3))
    for parameter in block.parameters():
        parameter.data = 2 * torch.randn_like(parameter)
    block(torch.randn(4, 3)).square().sum().backward()
    assert all(bool(p.grad.any()) for p in block.parameters())


def test_errors_of_invertible_blocks():
    with pytest.raises(ArgumentError, match="`bound` must be above 0 and below 1, got 1"):
        InvertibleBlock(Dense(2), Dense(2), bound=1)
    with pytest.raises(ArgumentError, match="got 2 -> 3 and 2 -> 2"):
        InvertibleBlock(Dense(2, 3), Dense(2))
    block = InvertibleBlock(Dense(2), Dense(2))
    block.bias.data.fill_(torch.nan)
    with pytest.raises(SolveError, match="did not converge"):
        block.inverse(torch.ones(1, 2))
