"""The value function of a control problem: what is known of it, and a potential for the rest."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from ..calculus import jacobian
from ..nets import Derivatives, Potential
from .problem import Problem
from .riccati import QuadraticValue, resting_point

LEAST_VARIANCE = 0.25  # of a coordinate, over the mean of all
LEAST_ON_PATH = 1e-4  # where a path tells how far each goes
FIRST_GAIN = 2.5


class ValueFunction(nn.Module):
    """Phi(t, z) = base(t, z) + unit phi((z - centre) / scale, t / horizon), phi a `Potential`.

    Costs and states of a control problem have units; a network learns fastest where its inputs
    and values are about one. Like `Potential` it takes (x, t), in this order.

    Args:
        problem: the control problem.
        potential: phi.
        base: a function that is near Phi, such as `QuadraticValue`, or None.
    """

    centre: Tensor
    scale: Tensor
    unit: Tensor

    def __init__(
        self, problem: Problem, potential: Potential, base: QuadraticValue | None = None
    ) -> None:
        super().__init__()
        self.problem, self.potential, self.base = problem, potential, base
        self.dim = problem.dim
        like = potential.w.detach()
        self.register_buffer("centre", like.new_zeros(self.dim))
        self.register_buffer("scale", like.new_ones(self.dim))
        self.register_buffer("unit", like.new_ones(()))

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        """Phi at the rows of `x` (batch, dim) and time `t`, () or (batch,); (batch,)."""
        value = self.bind()(x, t, grad=False, dt=False, laplacian=False).value
        assert value is not None
        return value

    def bind(
        self,
        probe: Tensor | None = None,
        trace_dtype: torch.dtype | None = None,
        noise: Tensor | None = None,
    ) -> Callable[..., Derivatives]:
        """Value and derivatives with respect to x and t, as those of `Potential.bind`."""
        directions = torch.eye(self.dim).to(self.scale) if noise is None else noise
        inner = self.potential.bind(probe, trace_dtype, directions / self.scale[:, None])
        known = None if self.base is None else self.base.bind(noise=noise)
        back, horizon = self.unit / self.scale, self.problem.horizon

        def evaluate(
            x: Tensor, t: Tensor, context: Tensor | None = None, **wanted: bool | Tensor | None
        ) -> Derivatives:
            phi = inner((x - self.centre) / self.scale, t / horizon, context, **wanted)
            parts = {
                "value": None if phi.value is None else self.unit * phi.value,
                "grad": None if phi.grad is None else phi.grad * back,
                "dt": None if phi.dt is None else self.unit / horizon * phi.dt,
                "laplacian": None if phi.laplacian is None else self.unit * phi.laplacian,
            }
            if known is not None:
                base = vars(known(x, t, context, **wanted))
                parts = {k: v if v is None else v + base[k] for k, v in parts.items()}
            return Derivatives(**parts)

        return evaluate

    @torch.no_grad()
    def initialise(self, x: Tensor, generator: torch.Generator) -> None:
        """Set the units from starts `x`, (batch, dim), and the weights of phi.

        States are expected near the path of the base, or, without one, between the starts and a
        minimum of the terminal cost. The unit of the values is one at which a change of the weights
        by about one changes the velocity by about as much: with larger ones the closed loop is
        unstable as training begins. With a base, phi starts at zero.
        """
        problem, inner = self.problem, self.potential
        if self.base is None:
            path, least = x - x.mean(0) + resting_point(problem).to(x), LEAST_VARIANCE
        else:
            path, least = self.base.path().to(x), LEAST_ON_PATH
        middle = (x.mean(0) + path.mean(0)) / 2  # however many points each has
        variance = torch.stack([(part - middle).square().mean(0) for part in (x, path)]).mean(0)
        if problem.noise is not None:
            variance = variance + problem.noise.to(x).square().sum(1) * problem.horizon
        scale = variance.clamp_min(least * variance.mean().clamp_min(1e-12)).sqrt()
        gain = torch.linalg.matrix_norm(self._response(x[:16]) / scale / scale[:, None], 2).mean()
        unit = FIRST_GAIN / (gain * problem.horizon) if gain > 1e-12 else torch.ones_like(gain)
        self.centre.copy_(middle)
        self.scale.copy_(scale)
        self.unit.copy_(unit)
        inputs = (torch.cat([x, path]) - self.centre) / self.scale
        inner.random_features(inputs, 0.7 * (3 / (inner.dim + 1)) ** 0.5, generator)
        if self.base is not None:
            inner.w.zero_()
            inner.A.mul_(0.1)

    def _response(self, z: Tensor) -> Tensor:
        """Derivative of the closed-loop velocity with respect to p = 0, (batch, dim, dim)."""
        t = torch.zeros((), dtype=z.dtype, device=z.device)

        def velocity(p: Tensor) -> Tensor:
            return self.problem.dynamics(t, z, self.problem.feedback(t, z, p))

        return jacobian(velocity, torch.zeros_like(z)).detach()
