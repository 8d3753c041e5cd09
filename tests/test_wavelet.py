"""Haar wavelets by hand, and the network that is reversible from end to end."""

import pytest
import torch
from torch import nn
from torch.testing import assert_close

import pathline as pl
from pathline.errors import ArgumentError, ShapeError
from pathline.nets import Conv, Dense, Haar
from pathline.networks import ContinuousNet, Hamiltonian, Residual, pde_cnn, wavelet_net


def moved(net):
    for p in net.parameters():
        p.data += 0.2 * torch.randn_like(p)
    return net


def test_haar_by_hand():
    x = torch.tensor([[[[1.0, 2.0], [3.0, 5.0]], [[4.0, 4.0], [4.0, 4.0]]]])
    expected = torch.tensor([5.5, -1.5, -2.5, 0.5, 8.0, 0.0, 0.0, 0.0])
    assert_close(Haar()(x).flatten(), expected)


def test_haar_is_orthogonal():
    x = torch.randn(2, 3, 6, 4).double()
    z = Haar()(x)
    assert z.shape == (2, 12, 3, 2)
    assert_close(z.norm(), x.norm())
    assert_close(Haar().inverse(z), x)
    y = torch.randn_like(z)
    assert_close((z * y).sum(), (x * Haar().inverse(y)).sum())
    with pytest.raises(ShapeError, match="even height and width"):
        Haar()(torch.zeros(1, 1, 3, 4))
    with pytest.raises(ShapeError, match="bands"):
        Haar().inverse(torch.zeros(1, 3, 4, 4))


def test_inverse_from_end_to_end():
    net = moved(wavelet_net(width=4, levels=2, steps=5)).double()
    x = torch.randn(2, 3, 8, 8).double()
    z = net.features(x)
    assert z.shape == (2, 64, 2, 2)
    assert_close(net.inverse(z), x, atol=1e-10, rtol=0)


def test_gradient_of_the_reversible_network():
    x = torch.randn(2, 3, 8, 8).double()
    grads = []
    for gradient in ("reversible", "discrete"):
        torch.manual_seed(0)
        net = moved(wavelet_net(width=4, levels=2, gradient=gradient)).double()
        net(x).square().sum().backward()
        grads.append([p.grad for p in net.parameters()])
    for a, b in zip(*grads, strict=True):
        assert_close(a, b, atol=1e-10, rtol=1e-8)


def test_weights_and_files(tmp_path):
    net = moved(wavelet_net(channels=1, classes=3, width=2, levels=2, steps=2))
    # Two kernels of half the channels for each of two steps, a scale and a bias for each channel.
    blocks = sum(2 * 2 * (9 * half**2 + 2 * half) for half in (1, 4))
    assert sum(p.numel() for p in net.parameters()) == blocks + 3 * 32 + 3
    pl.save(net, tmp_path)
    x = torch.randn(2, 1, 4, 4)
    assert torch.equal(pl.load(tmp_path)(x), net(x))


def test_errors():
    with pytest.raises(ArgumentError, match="`width` must be even and at least the 3 channels"):
        wavelet_net(width=2)
    with pytest.raises(ArgumentError, match="`operator`"):
        wavelet_net(operator="ful")
    with pytest.raises(ShapeError, match=r"got \(1, 1, 8, 8\)"):
        wavelet_net()(torch.zeros(1, 1, 8, 8))
    net = pde_cnn("hamiltonian", channels=1, widths=(4, 4))
    with pytest.raises(ArgumentError, match="AdaptiveAvgPool2d does not keep"):
        net.inverse(torch.zeros(1, 4, 1, 1))
    doubled = ContinuousNet(None, Hamiltonian(Dense(2), augment=True), None)
    with pytest.raises(ArgumentError, match="Hamiltonian does not keep"):
        doubled.inverse(torch.zeros(1, 4))
    forgets = ContinuousNet(None, Residual(Conv(2)), nn.Flatten())
    with pytest.raises(ArgumentError, match="'euler'"):
        forgets.inverse(torch.zeros(1, 2, 4, 4))
