"""Optimal control problems."""

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Generator, Tensor

from .. import calculus
from ..errors import ArgumentError
from ..nets import Derivatives
from .check import ProblemCheck, check_problem
from .interaction import Interaction
from .minimise import minimise_controls

if TYPE_CHECKING:
    from .policy import Policy

Limit = float | Sequence[float] | Tensor


class Problem:
    """Minimise E[ int_0^horizon L(t, z, u) dt + G(z(horizon)) ] subject to
    dz = f(t, z, u) dt + sigma dW.

    A problem is a subclass with `dim` and the methods `dynamics` (f), `running_cost` (L) and
    `terminal_cost` (G), each on a batch, and where possible `feedback`. The value function Phi of
    the problem solves d_t Phi + H(t, z, grad Phi) + tr(sigma sigma^T Hessian Phi) / 2 = 0 with
    H(t, z, p) = min_u L(t, z, u) + p.f(t, z, u).

    Shapes: `t` is (), `z` and `p` are (batch, dim), `u` is (batch, control_dim), costs are
    (batch,). The methods must use operations of PyTorch, and treat each row alone.

    Attributes:
        dim: of the state.
        control_dim: of the control; dim by default.
        horizon: the last time.
        start: the state (dim,) that trajectories start around, the origin by default.
        spread: standard deviation of the starts, one number or (dim,).
        control_bounds: lower and upper limits of the control, numbers or (control_dim,), infinite
            where there is none; None if it is free. A `feedback` of your own must respect them.
        noise: sigma, (dim, noise_dim); None if the dynamics are deterministic.
        interaction: costs that see the density of the population; None if there are none.
        grading: of the time steps in training: 2 lets them shorten towards the end, where a steep
            terminal cost asks for it; 1 for equal steps.
        name: of the problem, in reports.
        solver: the function that solves it, for what `control.solve` can't.
        made: name and options with which `control.problems.make` builds the problem again; None
            for one of your own, which a saved policy has to be given when it is loaded.
    """

    name: str = "your problem"
    dim: int
    horizon: float = 1.0
    start: Sequence[float] | Tensor | None = None
    spread: float | Sequence[float] | Tensor = 1.0
    control_bounds: tuple[Limit, Limit] | None = None
    noise: Tensor | None = None
    interaction: Interaction | None = None
    grading: float = 1.0
    solver: str = "control.solve"
    made: dict[str, Any] | None = None
    is_transport = False  # f = u, L = |u|^2 / 2 and G = |z|^2 / 2 + constant; not inherited

    def __init_subclass__(cls, **arguments: Any) -> None:
        super().__init_subclass__(**arguments)
        cls.is_transport = cls.__dict__.get("is_transport", False)

    @property
    def control_dim(self) -> int:
        """Columns of u."""
        return self.dim

    def dynamics(self, t: Tensor, z: Tensor, u: Tensor) -> Tensor:
        """f(t, z, u), (batch, dim)."""
        raise NotImplementedError(f"{type(self).__name__} must define `dynamics(t, z, u)`")

    def running_cost(self, t: Tensor, z: Tensor, u: Tensor) -> Tensor:
        """L(t, z, u), (batch,)."""
        raise NotImplementedError(f"{type(self).__name__} must define `running_cost(t, z, u)`")

    def terminal_cost(self, z: Tensor) -> Tensor:
        """G(z), (batch,)."""
        raise NotImplementedError(f"{type(self).__name__} must define `terminal_cost(z)`")

    def feedback(self, t: Tensor, z: Tensor, p: Tensor) -> Tensor:
        """The control that minimises L(t, z, u) + p.f(t, z, u), (batch, control_dim).

        By a projected Newton method within `control_bounds`; override it where a formula is known,
        which is many times faster.
        """
        return minimise_controls(self, t, z, p)

    def hamiltonian(self, t: Tensor, z: Tensor, p: Tensor) -> Tensor:
        """H(t, z, p) = min_u L(t, z, u) + p.f(t, z, u), (batch,)."""
        u = self.feedback(t, z, p)
        return self.running_cost(t, z, u) + (p * self.dynamics(t, z, u)).sum(1)

    def initial(self, count: int, generator: Generator) -> Tensor:
        """Starts of trajectories, N(start, spread^2), (count, dim) in double precision."""
        noise = torch.randn(count, self.dim, generator=generator, dtype=torch.float64)
        return self.nominal() + noise * torch.as_tensor(self.spread, dtype=torch.float64)

    def nominal(self) -> Tensor:
        """`start` as (dim,) in double precision."""
        if self.start is None:
            return torch.zeros(self.dim, dtype=torch.float64)
        start = torch.as_tensor(self.start, dtype=torch.float64)
        if start.shape != (self.dim,):
            raise ArgumentError(f"`start` must be ({self.dim},), got {tuple(start.shape)}")
        return start

    def reference(self, t: Tensor) -> Tensor | None:
        """The state (dim,) that trajectories should be near at time `t`, in double precision, if
        there is one beforehand; None if they should approach a minimum of the terminal cost."""
        return None

    def guess(self, steps: int) -> Tensor | None:
        """Controls from the nominal start, constant on each of so many equal steps,
        (steps, control_dim), for an open-loop solution to improve; None to begin without control.
        For where a descent from there ends badly, as among obstacles."""
        return None

    def evaluation(self) -> "Problem":
        """The problem whose costs judge a policy, where it is trained with safety margins."""
        return self

    def clearance(self, z: Tensor) -> Tensor:
        """How far states are from forbidden ones, negative where they are forbidden, (batch,);
        infinite if all are allowed."""
        return z.new_full((len(z),), math.inf)

    def limits(self, like: Tensor) -> tuple[Tensor, Tensor] | None:
        """`control_bounds` as two tensors (control_dim,) in the dtype and on the device of `like`;
        None if the control is free."""
        if self.control_bounds is None:
            return None
        lower, upper = (
            torch.as_tensor(limit, dtype=torch.float64).to(like) for limit in self.control_bounds
        )
        shapes = ((), (1,), (self.control_dim,))
        if (
            lower.shape not in shapes
            or upper.shape not in shapes
            or not bool((lower < upper).all())
        ):
            raise ArgumentError(
                "`control_bounds` must be (lower, upper) with lower < upper, numbers or "
                f"({self.control_dim},), got {self.control_bounds}"
            )
        return lower.expand(self.control_dim), upper.expand(self.control_dim)

    def check(self, *, seed: int = 0) -> ProblemCheck:
        """Test the formulas of this problem at random starts: shapes, rows that stand alone,
        derivatives against differences, and whether the feedback minimises L + p.f.

        Returns:
            A `ProblemCheck`, which says in words what is wrong.
        """
        return check_problem(self, seed)

    def policy(self, width: int = 32, depth: int = 2, **arguments: Any) -> "Policy":
        """A new policy for this problem, as `control.solve` trains it; see `Policy`."""
        from .policy import Policy  # which follows a problem

        return Policy(self, width, depth, **arguments)

    def divergence(
        self, t: Tensor, z: Tensor, phi: Derivatives, velocity: Callable[[Tensor], Tensor]
    ) -> Tensor:
        """Divergence of the closed-loop `velocity(z)` at time t, (batch,).

        By automatic differentiation; override it where `phi` (with its Laplacian) gives it.
        """
        return calculus.divergence(velocity, z)
