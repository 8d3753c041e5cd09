"""A feedback policy from a value function."""

from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any, Self

import numpy as np
import torch
from torch import Tensor, nn

from ..errors import ArgumentError, ModelError, ShapeError
from ..integrate import graded
from ..nets import Potential
from .problem import Problem
from .riccati import QuadraticValue
from .rollout import brownian, rollout
from .value import ValueFunction

if TYPE_CHECKING:
    from ..train import Run
    from .judge import PolicyCheck


@dataclass(frozen=True)
class Simulation:
    """Paths of the closed loop, and what they cost, by the problem's `evaluation`."""

    times: Tensor  # (steps + 1,)
    states: Tensor  # (steps + 1, batch, dim)
    controls: Tensor  # (steps, batch, control_dim), at the beginning of each step
    running_cost: Tensor  # (batch,)
    terminal_cost: Tensor  # (batch,)
    clearance: Tensor  # (batch,), the least along the way

    @property
    def cost(self) -> Tensor:
        """Of each path, (batch,)."""
        return self.running_cost + self.terminal_cost


class Policy(nn.Module):
    """u(t, z) = the control that minimises L + grad Phi . f, for a learned value function Phi.

    `control.solve` trains one. All times, states, controls and costs are in the problem's units.

    Args:
        problem: the control problem.
        width, depth, rank: of the potential in Phi; see `nets.Potential`.
        steps: time steps of simulations.
        nodes: of the quadratic part of Phi; 0 for none.
        generator: source of the initial weights; torch's global one by default.

    Raises:
        ArgumentError: `steps` or `nodes` is out of range.
    """

    def __init__(
        self,
        problem: Problem,
        width: int = 32,
        depth: int = 2,
        rank: int = 10,
        *,
        steps: int = 50,
        nodes: int = 0,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        if not isinstance(steps, int) or steps < 1:
            raise ArgumentError(f"`steps` must be a positive integer, got {steps!r}")
        if not isinstance(nodes, int) or nodes < 0 or nodes == 1:
            raise ArgumentError(f"`nodes` must be 0 or an integer > 1, got {nodes!r}")
        self.problem, self.steps = problem, steps
        self.run: Run | None = None
        inner = Potential(problem.dim, width, depth, rank, generator=generator)
        base = QuadraticValue(problem.dim, nodes) if nodes else None
        self.potential = ValueFunction(problem, inner, base)

    @property
    def like(self) -> Tensor:
        """A tensor with the dtype and on the device of the weights."""
        return self.potential.unit

    def config(self) -> dict[str, Any]:
        """The arguments that build this policy again, JSON-safe.

        A named problem is kept by its name and options; one of your own is to be passed to
        `Policy.load` again.
        """
        inner, base = self.potential.potential, self.potential.base
        return {
            "problem": self.problem.made,
            "width": inner.width,
            "depth": inner.depth,
            "rank": inner.A.shape[0],
            "steps": self.steps,
            "nodes": 0 if base is None else base.nodes,
        }

    def control(self, t: Tensor | float, z: Tensor) -> Tensor:
        """The controls (batch, control_dim) at time `t`, () or a number, in states `z`,
        (batch, dim); for one state (dim,) one control (control_dim,).

        Raises:
            ShapeError: a tensor is not shaped as above.
        """
        t, states = self._at(t, z)
        phi = self.potential.bind()(states, t, value=False, dt=False, laplacian=False)
        assert phi.grad is not None
        u = self.problem.feedback(t, states, phi.grad)
        return u if z.ndim == 2 else u[0]

    def value(self, t: Tensor | float, z: Tensor) -> Tensor:
        """Phi(t, z), the expected cost from there on, (batch,); () for one state (dim,).

        Raises:
            ShapeError: a tensor is not shaped as in `control`.
        """
        t, states = self._at(t, z)
        value = self.potential(states, t)
        return value if z.ndim == 2 else value[0]

    def forward(self, t: Tensor, z: Tensor) -> Tensor:
        """`control`."""
        return self.control(t, z)

    def _at(self, t: Tensor | float, z: Tensor) -> tuple[Tensor, Tensor]:
        if z.ndim not in (1, 2) or z.shape[-1] != self.problem.dim:
            raise ShapeError(
                f"`z` must be (batch, {self.problem.dim}) or ({self.problem.dim},), got "
                f"{tuple(z.shape)}"
            )
        time = torch.as_tensor(t).to(self.like)
        if time.ndim:
            raise ShapeError(f"`t` must be a number or (), got {tuple(time.shape)}")
        return time, z.reshape(-1, self.problem.dim).to(self.like)

    @torch.no_grad()
    def simulate(
        self,
        x0: Tensor | None = None,
        *,
        steps: int | None = None,
        shocks: dict[float, Any] | None = None,
        noise_seed: int | None = None,
    ) -> Simulation:
        """Follow the policy from `x0`.

        Args:
            x0: starts, (batch, dim) or (dim,); the nominal one by default.
            steps: in time; the policy's by default.
            shocks: at each time, what is added to the state there, (dim,) or (batch, dim); the
                policy goes on from where the shock leads.
            noise_seed: of the noise, for a problem that has it; without noise if None.

        Raises:
            ShapeError: `x0` or a shock has another shape.
            ArgumentError: a shock is not within the horizon, or `noise_seed` is given for a problem
                without noise.
        """
        problem = self.problem.evaluation()
        x0 = problem.nominal() if x0 is None else torch.as_tensor(x0)
        _, z = self._at(0.0, x0)
        times = self.times(steps)
        count = len(times) - 1
        if noise_seed is not None and problem.noise is None:
            raise ArgumentError(f"`noise_seed` is for problems with noise; {problem.name} has none")
        increments = None
        if noise_seed is not None:
            increments = brownian(problem, times, len(z), np.random.default_rng(noise_seed))
        marks = self._marks(shocks or {}, times, z)
        edges = sorted({0, count, *marks})
        states, running = [], torch.zeros(len(z)).to(z)
        log_density = None
        if problem.interaction is not None:
            log_density = problem.interaction.initial_log_density(z)
        for first, last in pairwise(edges):
            z = z + marks.get(first, 0.0)
            leg = rollout(
                problem, self.potential, z, steps=times[first : last + 1], density=False,
                trajectory=True, log_density=log_density,
                increments=None if increments is None else increments[first:last],
            )  # fmt: skip
            assert leg.trajectory is not None and leg.running_cost is not None
            running, z = running + leg.running_cost, leg.z
            if log_density is not None and leg.log_det is not None:
                log_density = log_density - leg.log_det
            states.append(leg.trajectory[:-1])
        path = torch.cat([*states, z[None] + marks.get(count, 0.0)])
        controls = [self.control(t, y) for t, y in zip(times[:-1], path[:-1], strict=True)]
        clearance = torch.stack([problem.clearance(y) for y in path]).amin(0)
        terminal = problem.terminal_cost(path[-1])
        if problem.interaction is not None and log_density is not None:
            terminal = terminal + problem.interaction.terminal(path[-1], log_density)[0]
        return Simulation(times.to(z), path, torch.stack(controls), running, terminal, clearance)

    def check(self, starts: Tensor | None = None, *, seed: int = 0) -> "PolicyCheck":
        """Whether the policy can be trusted: costs on held-out starts and on a finer time grid,
        exact values where they are known, HJB residual and terminal error, forbidden states,
        shocks, and the time of a query.

        Args:
            starts: (rows, dim); new ones of the problem by default.
            seed: of all draws.

        Returns:
            A `PolicyCheck`, with its verdict in words.
        """
        from .judge import check_policy  # which simulates policies

        return check_policy(self, starts, seed)

    def times(self, steps: int | None = None) -> Tensor:
        """Of simulations with so many steps, (steps + 1,), as close at the end as in training."""
        count = self.steps if steps is None else steps
        return graded(count, 0.0, self.problem.horizon, self.problem.grading)

    def _marks(self, shocks: dict[float, Any], times: Tensor, z: Tensor) -> dict[int, Tensor]:
        """Shocks by the step before which they come."""
        marks: dict[int, Tensor] = {}
        for time, shock in shocks.items():
            if not 0 <= time <= self.problem.horizon:
                raise ArgumentError(
                    f"`shocks` must come between 0 and {self.problem.horizon:g}, got one at {time}"
                )
            kick = torch.as_tensor(shock).to(z)
            if kick.shape not in ((self.problem.dim,), z.shape):
                raise ShapeError(
                    f"a shock must be ({self.problem.dim},) or {tuple(z.shape)}, got "
                    f"{tuple(kick.shape)}"
                )
            n = int((times - time).abs().argmin())
            marks[n] = marks.get(n, 0.0) + kick
        return marks

    def inner_weights(self) -> list[Tensor]:
        """The hidden-to-hidden matrices of Phi, which Muon trains."""
        return self.potential.potential.inner_weights()

    @classmethod
    def load(cls, folder: Any, problem: Problem) -> Self:
        """A saved policy of a problem of your own.

        Raises:
            ModelError: the folder holds no policy, or one for another state.
        """
        from ..train.files import read_model

        description, state = read_model(folder)
        if description["kind"] != cls.__name__:
            raise ModelError(f"{folder} holds a {description['kind']}, not a {cls.__name__}")
        try:
            policy = cls(**description["config"] | {"problem": problem})
            policy.load_state_dict(state, assign=True)
        except (RuntimeError, TypeError) as error:
            reason = str(error).splitlines()[0]
            raise ModelError(f"{folder} is not a policy of {problem.name}: {reason}") from None
        return policy
