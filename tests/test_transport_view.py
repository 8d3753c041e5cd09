"""The carried classifier against closed forms, and that it is constant along paths."""

import math

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from pathline.errors import ArgumentError, ShapeError
from pathline.nets import Dense, TimeBasis
from pathline.network_plots import advected
from pathline.networks import ContinuousNet, Hamiltonian, Residual, dense_net, transport_view


def affine(A, b, horizon=1.5, steps=60):
    """z' = A z + b with an affine head, by rk4."""
    dynamics = Residual(Dense(2), TimeBasis(horizon=horizon), activation="identity")
    module = dynamics.layer.module
    with torch.no_grad():
        module.operator.weight.copy_(A)
        module.bias.copy_(b)
    net = ContinuousNet(None, dynamics, nn.Linear(2, 3), method="rk4", steps=steps)
    return net.double()


def test_an_affine_velocity():
    """u(t, z) = W (expm((T - t) A) z) + mu, and a constant velocity shifts."""
    A = torch.tensor([[-0.3, 2.0], [-1.0, 0.2]]).double()
    for matrix, shift in ((A, torch.zeros(2)), (torch.zeros(2, 2), torch.tensor([0.4, -0.7]))):
        net = affine(matrix, shift)
        x = torch.randn(7, 2).double()
        view = transport_view(net, x, nodes=6, grid=5)
        points = torch.cartesian_prod(*map(torch.from_numpy, (view.y, view.x))).flip(1)
        for t, field, z in zip(view.times, view.scores, view.features, strict=True):
            left = 1.5 - t
            carry = torch.linalg.matrix_exp(left * matrix.double()).mT
            expected = net.head(points @ carry + left * shift)
            assert_close(torch.from_numpy(field).view(-1, 3), expected, atol=1e-6, rtol=1e-6)
            carry = torch.linalg.matrix_exp(t * matrix.double()).mT
            assert_close(torch.from_numpy(z), x @ carry + t * shift, atol=1e-6, rtol=1e-6)


def test_a_whole_turn_brings_the_classifier_back():
    J = torch.tensor([[0.0, -1.0], [1.0, 0.0]])
    view = transport_view(affine(J, torch.zeros(2), 2 * math.pi, 400), torch.randn(3, 2), nodes=4)
    assert_close(view.scores[0], view.scores[-1], atol=1e-6, rtol=1e-6)


def test_scores_are_constant_along_paths():
    net = dense_net("residual", 2, 2, width=2, steps=10, method="rk4").double()
    x = torch.randn(20, 2).double()
    view = transport_view(net, x, grid=8)
    assert_close(view.carried[0], net(x).detach().numpy())
    for carried in view.carried:
        assert_close(carried, view.carried[0], atol=1e-12, rtol=1e-12)
    labels = torch.zeros(20)
    figure = advected(view.times, view.features, labels, view.x, view.y, view.scores, upto=3)
    assert len(figure.axes) == 1
    with pytest.raises(ShapeError, match="`scores` must be"):
        advected(view.times, view.features, labels, view.x, view.y, view.scores[1:])
    with pytest.raises(ShapeError, match="`features` must be"):
        advected(view.times, view.features, labels[1:], view.x, view.y, view.scores)


def test_errors():
    net = dense_net("residual", 2, 2, width=2, steps=10)
    with pytest.raises(ArgumentError, match="`nodes` must divide the 10 steps, got 3"):
        transport_view(net, torch.randn(3, 2), nodes=3)
    with pytest.raises(ShapeError, match=r"\(batch, 2\), got \(3, 4\)"):
        transport_view(dense_net("residual", 2, 2, width=4), torch.randn(3, 2))
    pair = ContinuousNet(None, Hamiltonian(Dense(1)), None)
    with pytest.raises(ShapeError, match="a pair"):
        transport_view(pair, torch.randn(3, 2))
    two = ContinuousNet(None, [Residual(Dense(2)), nn.Identity()], None)
    with pytest.raises(ArgumentError, match="one evolution"):
        transport_view(two, torch.randn(3, 2))
