"""OT-Flow as published: per-sample Jacobians, automatic differentiation, RK4 on all components.

Written from the paper (Onken, Wu Fung, Li, Ruthotto, AAAI 2021, arXiv 2006.00104) and the
settings of the authors' training scripts, with their choices of operations, so that it costs what
their code costs. The parameters have the names of `pathline.nets.Potential`.
"""

import math
from typing import cast

import torch
from torch import Tensor, nn

from pathline.nets import Potential
from pathline.reproduce.toys import PAPER

from .peer import Peer

# Time steps, width, batch, learning rate, alpha_C, alpha_R: the published rows of POWER, MINIBOONE
# and BSDS300, but batches of 10000 and 2000 cut to 512, and widths of 256 and 512 to Pathline's:
# as published, two minutes of one core make fewer than ten steps.
TABLES = {
    "electricity": (10, 128, 512, 0.03, 500.0, 5.0),
    "tables": (6, 64, 512, 0.02, 100.0, 15.0),
    "bsds300": (14, 128, 300, 0.001, 2000.0, 800.0),
}


def log_cosh(x: Tensor) -> Tensor:
    """log(e^x + e^-x) by the stable formula."""
    return x.abs() + torch.log(1 + torch.exp(-2 * x.abs()))


def tanh_slope(x: Tensor) -> Tensor:
    """tanh'(x)."""
    return 1 - torch.tanh(x) ** 2


class PublishedPotential(nn.Module):
    """Phi(s) = w.N(s) + 1/2 |A s|^2 + b.s + c with a two-layer ResNet N, and the published
    initial weights."""

    def __init__(self, dim: int, width: int, rank: int = 10) -> None:
        super().__init__()
        self.dim, self.width = dim, width
        self.w = nn.Parameter(torch.ones(width))
        self.A = nn.Parameter(torch.empty(min(rank, dim + 1), dim + 1))
        nn.init.xavier_uniform_(self.A)
        self.b = nn.Parameter(torch.zeros(dim + 1))
        self.register_buffer("c", torch.zeros(()))
        self.layers = nn.ModuleList([nn.Linear(dim + 1, width), nn.Linear(width, width)])

    def gradient(self, s: Tensor, trace: bool = True) -> tuple[Tensor, Tensor | None]:
        """The gradient in s = (x, t), (batch, dim + 1), and the Laplacian in x, (batch,)."""
        first, second = (cast(nn.Linear, layer) for layer in self.layers)
        rows, w = len(s), self.w[:, None]
        quadratic = self.A.mT @ self.A
        opening = first(s)
        u = log_cosh(opening)
        tanh_opening = torch.tanh(opening)
        z1 = w + second.weight.mT @ (torch.tanh(second(u)).mT * w)  # (width, batch)
        z0 = first.weight.mT @ (tanh_opening.mT * z1)
        grad = (z0 + quadratic @ s.mT + self.b[:, None]).mT
        if not trace:
            return grad, None
        K0 = first.weight[:, : self.dim]
        slope = tanh_slope(opening.mT) * z1
        laplacian = (slope.reshape(self.width, -1, rows) * K0[:, :, None] ** 2).sum((0, 1))
        J = K0[:, :, None] * tanh_opening.mT[:, None, :]  # (width, dim, batch)
        KJ = (second.weight @ J.reshape(self.width, -1)).reshape(self.width, -1, rows)
        slope = tanh_slope(second(u).mT) * w
        laplacian = laplacian + (slope.reshape(self.width, -1, rows) * KJ**2).sum((0, 1))
        return grad, laplacian + quadratic[: self.dim, : self.dim].trace()


class PublishedOTFlow(nn.Module):
    """The objective alpha_L L + alpha_C C + alpha_R R of a potential, on fixed time steps.

    Args:
        dim, width, rank: of the potential.
        alphas: (alpha_L, alpha_C, alpha_R).
        quadrature: "rk4" integrates all components by the method's stages, as published;
            "simpson" by Simpson's rule on both ends and the Hermite midpoint of a step, as
            Pathline does, which gives the same discrete objective.
    """

    def __init__(
        self,
        dim: int,
        width: int,
        rank: int = 10,
        alphas: tuple[float, float, float] = (1.0, 100.0, 15.0),
        quadrature: str = "rk4",
    ) -> None:
        super().__init__()
        if quadrature not in ("rk4", "simpson"):
            raise ValueError(f"`quadrature` must be 'rk4' or 'simpson', got {quadrature!r}")
        self.potential = PublishedPotential(dim, width, rank)
        self.alphas, self.quadrature = alphas, quadrature

    def rates(self, t: float, z: Tensor) -> tuple[Tensor, Tensor]:
        """dz/dt (batch, dim), and the rates of the log-determinant, of L and of R, (3, batch)."""
        s = nn.functional.pad(z, (0, 1), value=t)
        grad, laplacian = self.potential.gradient(s)
        assert laplacian is not None
        dz = -grad[:, :-1]
        cost = 0.5 * (dz**2).sum(1)
        return dz, torch.stack((-laplacian, cost, (-grad[:, -1] + cost).abs()))

    def velocity(self, t: float, z: Tensor) -> Tensor:
        """dz/dt alone, (batch, dim)."""
        s = nn.functional.pad(z, (0, 1), value=t)
        return -self.potential.gradient(s, trace=False)[0][:, :-1]

    def terms(self, y: Tensor, nt: int) -> tuple[Tensor, Tensor, Tensor]:
        """C, L and R of each row of `y` (batch, dim), on `nt` time steps."""
        step = self._rk4_step if self.quadrature == "rk4" else self._simpson_step
        z, sums = y, torch.zeros(3, len(y)).to(y)
        for n in range(nt):
            z, sums = step(n / nt, 1 / nt, z, sums)
        log_det, L, R = sums
        C = 0.5 * (z**2).sum(1) + 0.5 * y.shape[1] * math.log(2 * math.pi) - log_det
        return C, L, R

    def loss(self, y: Tensor, nt: int) -> Tensor:
        """The objective of a batch `y` (batch, dim) in the units of the flow, ()."""
        C, L, R = self.terms(y, nt)
        alpha_L, alpha_C, alpha_R = self.alphas
        return alpha_L * L.mean() + alpha_C * C.mean() + alpha_R * R.mean()

    def _rk4_step(self, t: float, h: float, z: Tensor, sums: Tensor) -> tuple[Tensor, Tensor]:
        k1, q1 = self.rates(t, z)
        k2, q2 = self.rates(t + h / 2, z + h / 2 * k1)
        k3, q3 = self.rates(t + h / 2, z + h / 2 * k2)
        k4, q4 = self.rates(t + h, z + h * k3)
        z = z + h / 6 * (k1 + 2 * k2 + 2 * k3 + k4)
        return z, sums + h / 6 * (q1 + 2 * q2 + 2 * q3 + q4)

    def _simpson_step(self, t: float, h: float, z: Tensor, sums: Tensor) -> tuple[Tensor, Tensor]:
        k1, q1 = self.rates(t, z)
        k2 = self.velocity(t + h / 2, z + h / 2 * k1)
        k3 = self.velocity(t + h / 2, z + h / 2 * k2)
        k4 = self.velocity(t + h, z + h * k3)
        end = z + h / 6 * (k1 + 2 * k2 + 2 * k3 + k4)
        last, q3 = self.rates(t + h, end)
        middle = (z + end) / 2 + h / 8 * (k1 - last)
        _, q2 = self.rates(t + h / 2, middle)
        return end, sums + h / 6 * (q1 + 4 * q2 + q3)


class Published(Peer):
    """The published algorithm with the published settings of a data set."""

    raw = tuple(PAPER)

    def __init__(self, name: str, dim: int) -> None:
        super().__init__()
        if name in PAPER:
            self.nt, self.batch, rate, alpha_C, alpha_R, *_ = PAPER[name]
            width, self.sample_every = 32, 25
            self.halve_every: int | None = 1000 if name == "checkerboard" else 500
        else:
            row = TABLES.get(name, TABLES["tables"])
            self.nt, width, self.batch, rate, alpha_C, alpha_R = row
            self.halve_every = None  # their patience is longer than these runs
        self.rates = (rate / 3, rate, 3 * rate)
        self.flow = PublishedOTFlow(dim, width, alphas=(1.0, alpha_C, alpha_R))

    def loss(self, y: Tensor) -> Tensor:
        return self.flow.loss(y, self.nt)

    def rate(self, first: float, step: int) -> float:
        return first * 0.5 ** (step // self.halve_every) if self.halve_every else first

    def validate(self, y: Tensor) -> Tensor:
        return self.flow.terms(y, 2 * self.nt)[0]

    def exact(self, y: Tensor) -> Tensor:
        return self.flow.terms(y, 4 * self.nt)[0]

    def on_training_grid(self, y: Tensor) -> Tensor:
        return self.flow.terms(y, self.nt)[0]


def check(potential: Potential, ours: Tensor, y: Tensor) -> float:
    """Largest relative difference of loss and gradients between Pathline's objective `ours` (of
    the batch `y`, on 3 time steps, weights 0.01 and 0.1) and the plain one with its quadrature."""
    plain = PublishedOTFlow(
        potential.dim, potential.width, alphas=(0.01, 1.0, 0.1), quadrature="simpson"
    ).to(y)
    plain.potential.load_state_dict(potential.state_dict())
    theirs = plain.loss(y, 3)
    wanted = dict(plain.potential.named_parameters())
    mine = dict(potential.named_parameters())
    wanted_grads = torch.autograd.grad(theirs, [wanted[name] for name in mine])
    grads = torch.autograd.grad(ours, list(mine.values()))
    return max(
        ((a - b).norm() / b.norm()).item()
        for a, b in zip((ours, *grads), (theirs, *wanted_grads), strict=True)
    )
