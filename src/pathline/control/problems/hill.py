"""A noisy particle that passes a hill."""

import math

import torch
from torch import Tensor

from .particle import Particle


class Hill(Particle):
    """f = u, L = |u|^2 / 2 + 50 N(z; 0, 0.4 I), G = 50 |z - (1.5, 1.5)|^2 in the plane, with noise
    sigma = [[0.2, -0.4], [-0.4, 0.2]] and starts N((-1.5, -1.5), I).

    Source: Li, Verma, Ruthotto (arXiv 2209.13104), section 5.1.
    """

    name = "hill"
    dim = 2
    start = (-1.5, -1.5)
    target = (1.5, 1.5)
    height, variance, terminal, grading = 50.0, 0.4, 50.0, 2.0

    def __init__(self) -> None:
        self.noise = torch.tensor([[0.2, -0.4], [-0.4, 0.2]], dtype=torch.float64)

    def running_cost(self, t: Tensor, z: Tensor, u: Tensor) -> Tensor:
        peak = self.height / (2 * math.pi * self.variance)
        hill = peak * torch.exp(-z.square().sum(1) / (2 * self.variance))
        return 0.5 * u.square().sum(1) + hill

    def terminal_cost(self, z: Tensor) -> Tensor:
        return self.terminal * (z - z.new_tensor(self.target)).square().sum(1)
