"""Averages over noisy paths against closed forms of the heat and the transport equation."""

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from pathline.errors import ArgumentError
from pathline.nets import Dense, TimeBasis
from pathline.networks import ContinuousNet, Residual, dense_net, pde_cnn, viscous_scores

A = torch.tensor([[-0.5, 1.0], [-2.0, 0.1]]).double()


class Square(nn.Module):
    """|z|^2."""

    def forward(self, z):
        return z.square().sum(1, keepdim=True)


def linear(matrix, head, horizon=0.8, steps=40):
    dynamics = Residual(Dense(2), TimeBasis(horizon=horizon), activation="identity").double()
    with torch.no_grad():
        dynamics.layer.module.operator.weight.copy_(matrix)
        dynamics.layer.module.bias.zero_()
    return ContinuousNet(None, dynamics, head, method="rk4", steps=steps)


@pytest.mark.parametrize(
    "net",
    [
        dense_net("hamiltonian", 2, 3, width=6, steps=4),
        dense_net("antisymmetric", 2, 3, width=4, steps=4),
        dense_net("second-order", 2, 3, width=4, steps=4),
    ],
)
def test_without_viscosity(net):
    x = torch.randn(5, 2)
    assert_close(viscous_scores(net, x, viscosity=0.0, samples=2), net(x).detach())


def test_an_affine_head_of_a_linear_velocity_stays():
    """Opposite noise cancels, so W expm(T A) x + mu is exact."""
    head = nn.Linear(2, 3).double()
    x = torch.randn(4, 2).double()
    found = viscous_scores(linear(A, head), x, viscosity=0.7, samples=4)
    assert_close(found, head(x @ torch.linalg.matrix_exp(0.8 * A).mT).detach(), atol=1e-7, rtol=0)


def test_the_heat_equation_of_a_square():
    """At rest u(0, z) = |z|^2 + 2 dim viscosity T, within five standard errors."""
    x, samples = torch.randn(3, 2).double(), 20_000
    net = linear(0 * A, Square(), steps=5)
    found = viscous_scores(net, x, viscosity=0.1, samples=samples)
    variance = 2 * 0.1 * 0.8
    # |z + n|^2 - |z|^2 averaged over n and -n is |n|^2, of variance 4 variance^2 in two dimensions.
    error = 5 * 2 * variance / (samples / 2) ** 0.5
    expected = x.square().sum(1, keepdim=True) + 2 * 2 * 0.1 * 0.8
    assert_close(found, expected, atol=error, rtol=0)


def test_a_square_of_a_linear_velocity():
    """E |z(T)|^2 of an Ornstein-Uhlenbeck process by its Lyapunov equation."""
    x, samples, nu, steps = torch.randn(3, 2).double(), 20_000, 0.1, 40
    found = viscous_scores(linear(A, Square()), x, viscosity=nu, samples=samples)
    step = torch.linalg.matrix_exp(0.8 / steps * A)
    cov = torch.zeros(2, 2).double()
    for _ in range(steps):  # the covariance of the splitting
        cov = step @ cov @ step.mT + 2 * nu * 0.8 / steps * torch.eye(2)
    mean = x @ torch.linalg.matrix_exp(0.8 * A).mT
    error = 5 * (2 * (cov @ cov).trace()).sqrt().item() / (samples / 2) ** 0.5
    expected = mean.square().sum(1, keepdim=True) + cov.trace()
    assert_close(found, expected, atol=error, rtol=0)


def test_noise_by_its_seed():
    net = pde_cnn("hamiltonian", channels=1, widths=(4, 4), steps=2)
    x = torch.randn(2, 1, 6, 6)
    first = viscous_scores(net, x, viscosity=0.1, samples=4, seed=1)
    assert torch.equal(first, viscous_scores(net, x, viscosity=0.1, samples=4, seed=1))
    assert not torch.equal(first, viscous_scores(net, x, viscosity=0.1, samples=4, seed=2))
    assert first.shape == (2, 10) and net.training


def test_errors():
    net, x = dense_net("residual", 2, 2), torch.zeros(1, 2)
    with pytest.raises(ArgumentError, match="`viscosity` must be at least 0"):
        viscous_scores(net, x, viscosity=-1.0)
    with pytest.raises(ArgumentError, match="`samples` must be a positive even integer, got 3"):
        viscous_scores(net, x, viscosity=1.0, samples=3)
    next(net.evolutions()).steps = None
    with pytest.raises(ArgumentError, match="adaptive"):
        viscous_scores(net, x, viscosity=1.0)
