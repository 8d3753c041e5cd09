"""A quadcopter that flies to a point and stops there."""

import torch
from torch import Tensor

from ..problem import Problem

GRAVITY = 9.81


class Quadcopter(Problem):
    """Twelve dimensions: position, angles (psi, theta, phi), velocity, angular velocity.

    The controls are thrust and three torques, L = 2 + |u|^2, G = 2500 |z - target|^2. From the
    nominal start the local optimum costs 2182.7.

    Args:
        noise: standard deviation of the Brownian motion in all coordinates; none if zero.

    Source: Onken et al. (arXiv 2104.03270), section IV-E; Li, Verma, Ruthotto (arXiv 2209.13104)
    with noise 0.2.
    """

    name = "quadcopter"
    dim = 12
    start = (-1.5, -1.5, -1.5, *[0.0] * 9)
    target = (2.0, 2.0, 2.0, *[0.0] * 9)
    terminal, mass, grading = 5000.0, 1.0, 1.5

    def __init__(self, noise: float = 0.0) -> None:
        self.noise = noise * torch.eye(12, dtype=torch.float64) if noise else None
        self.spread = (0.1,) * 3 + (0.0,) * 9

    @property
    def control_dim(self) -> int:
        return 4

    def dynamics(self, t: Tensor, z: Tensor, u: Tensor) -> Tensor:
        lift = u[:, :1] / self.mass * _axis(z)
        fall = lift.new_tensor([0.0, 0.0, GRAVITY])
        return torch.cat([z[:, 6:], lift - fall, u[:, 1:]], 1)

    def running_cost(self, t: Tensor, z: Tensor, u: Tensor) -> Tensor:
        return 2 + u.square().sum(1)

    def terminal_cost(self, z: Tensor) -> Tensor:
        return 0.5 * self.terminal * (z - z.new_tensor(self.target)).square().sum(1)

    def feedback(self, t: Tensor, z: Tensor, p: Tensor) -> Tensor:
        thrust = -(_axis(z) * p[:, 6:9]).sum(1, keepdim=True) / (2 * self.mass)
        return torch.cat([thrust, -0.5 * p[:, 9:]], 1)


def _axis(z: Tensor) -> Tensor:
    """Direction of the thrust, (batch, 3)."""
    (s, sin_theta, sin_phi), (c, cos_theta, cos_phi) = z[:, 3:6].sin().T, z[:, 3:6].cos().T
    return torch.stack(
        [
            s * sin_phi + c * sin_theta * cos_phi,
            -c * sin_phi + s * sin_theta * cos_phi,
            cos_theta * cos_phi,
        ],
        1,
    )
