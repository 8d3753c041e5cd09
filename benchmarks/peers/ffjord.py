"""FFJORD on torchdiffeq: concatsquash network, dopri5, continuous adjoint, one-probe trace."""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torchdiffeq import odeint, odeint_adjoint

from .peer import Counted, Peer


class ConcatSquash(nn.Module):
    """h = (W z + b) sigmoid(w t + c) + u t."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.linear = nn.Linear(inputs, outputs)
        self.gate = nn.Linear(1, outputs)
        self.shift = nn.Linear(1, outputs, bias=False)

    def forward(self, t: Tensor, z: Tensor) -> Tensor:
        t = t.reshape(1, 1)
        return self.linear(z) * torch.sigmoid(self.gate(t)) + self.shift(t)


class Velocity(nn.Module):
    """dz/dt and the trace of its Jacobian, exact or estimated with one fixed probe."""

    def __init__(self, dim: int, widths: tuple[int, ...]) -> None:
        super().__init__()
        sizes = (dim, *widths, dim)
        self.layers = nn.ModuleList(map(ConcatSquash, sizes[:-1], sizes[1:]))
        self.probe: Tensor | None = None

    def net(self, t: Tensor, z: Tensor) -> Tensor:
        for layer in self.layers[:-1]:
            z = torch.tanh(layer(t, z))
        return self.layers[-1](t, z)

    def forward(self, t: Tensor, state: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        keep = torch.is_grad_enabled()
        with torch.enable_grad():
            z = state[0] if state[0].requires_grad else state[0].detach().requires_grad_()
            dz = self.net(t, z)
            if self.probe is not None:
                (g,) = torch.autograd.grad(dz, z, self.probe, create_graph=keep)
                return dz, (g * self.probe).sum(1)
            eye = torch.eye(z.shape[1]).to(z)[:, None, :].expand(-1, *z.shape)
            (J,) = torch.autograd.grad(dz, z, eye, create_graph=keep, is_grads_batched=True)
            return dz, J.diagonal(dim1=0, dim2=2).sum(1)


class FFJORD(Peer):
    """Free-form continuous flow (arXiv 1810.01367) on the time interval [0, 1].

    Its activation is tanh for all data: in runs of minutes softplus, which the authors took for
    some tables, was far behind.
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        widths = (64, 64, 64) if dim == 2 else (min(10 * dim, 128),) * 2
        self.velocity = Velocity(dim, widths)
        self.count = Counted()
        self.velocity.register_forward_pre_hook(self.count)
        self.few_columns = dim <= 30

    def _nll(
        self, y: Tensor, solve: Callable[..., Any], tolerance: float, probe: Tensor | None
    ) -> Tensor:
        self.count.calls = 0
        self.velocity.probe = probe
        times = torch.tensor([0.0, 1.0]).to(y)
        z, log_det = solve(
            self.velocity,
            (y, y.new_zeros(len(y))),
            times,
            rtol=tolerance,
            atol=tolerance,
            method="dopri5",
        )
        reference = 0.5 * z[-1].square().sum(1) + 0.5 * y.shape[1] * math.log(2 * math.pi)
        return reference - log_det[-1]

    def loss(self, y: Tensor) -> Tensor:
        return self._nll(y, odeint_adjoint, 1e-5, _rademacher(y)).mean()

    def validate(self, y: Tensor) -> Tensor:
        return self._nll(y, odeint, 1e-5, None if self.few_columns else _rademacher(y))

    def exact(self, y: Tensor, tolerance: float = 1e-6) -> Tensor:
        return self._nll(y, odeint, tolerance, None)


def _rademacher(y: Tensor) -> Tensor:
    return torch.randint(0, 2, y.shape).to(y) * 2 - 1
