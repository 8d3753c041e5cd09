"""The loss that trains a value function."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..calculus import gradient
from ..errors import require_nonnegative
from ..integrate import graded
from ..train import Loss, Objective, Rows, step_generator
from .interaction import size
from .policy import Policy
from .problem import Problem
from .rollout import Rollout, brownian, rollout


@dataclass(frozen=True)
class Weights:
    """Of the penalties beside the cost J = E[int L dt + G], whose own weight is `cost`.

    Each penalty vanishes at the value function, so none moves the solution:

    - hjb: E[int |d_t Phi + H + tr(sigma sigma^T Hessian Phi) / 2| dt], which is b_1 of NeuralOC and
      b_3 of NeuralSOC.
    - terminal: E|Phi(T, z_T) - G(z_T)|.
    - terminal_gradient: E|grad Phi(T, z_T) - grad G(z_T)|, summed over coordinates.
    - bsde: with noise, E[sum |dPhi + L dt - grad Phi . sigma dW|^2] over the steps.
    - value: E|Phi(0, x) - J(x)|, J(x) the cost of the path from x.

    Raises:
        ArgumentError: a weight is negative or not finite.
    """

    cost: float = 1.0
    hjb: float = 0.1
    terminal: float = 0.1
    terminal_gradient: float = 0.1
    bsde: float = 0.0
    value: float = 0.0

    def __post_init__(self) -> None:
        require_nonnegative(**asdict(self))


class ValueObjective(Objective):
    """Cost of the closed loop, and how far Phi is from the value function along its own paths.

    Trajectories follow the feedback of Phi itself, so states are sampled where the policy goes, as
    Pontryagin's principle has them. `validate` is the cost on twice the time steps, with noise
    drawn once; with noise the penalties are added.

    Args:
        policy: what is trained.
        steps: time steps in training.
        weights: of the penalties.
        seed: of the noise.

    Source: Onken et al., A neural network approach for high-dimensional optimal control, IEEE
    TCST 2022 (arXiv 2104.03270), equation (12); Li, Verma, Ruthotto, SIAM J. Sci. Comput. 2024
    (arXiv 2209.13104), section 4.
    """

    model: Policy

    def __init__(
        self, policy: Policy, steps: int, weights: Weights | None = None, seed: int = 0
    ) -> None:
        super().__init__()
        self.model, self.steps = policy, steps
        self.weights = Weights() if weights is None else weights
        self.seed, self.draws = seed, 0

    @property
    def problem(self) -> Problem:
        return self.model.problem

    def forward(self, batch: Tensor, weights: Tensor | None = None) -> Loss:
        x = batch.to(self.model.like)
        self.draws += 1
        path = self.roll(x, self.steps, step_generator(self.seed, self.draws))
        terms = {name: term.mean() for name, term in self.terms(x, path).items()}
        total = sum(weight * terms[name] for name, weight in self._used(terms).items())
        assert isinstance(total, Tensor)
        return Loss(total, {name: term.detach() for name, term in terms.items()})

    def _used(self, terms: Mapping[str, Tensor]) -> dict[str, float]:
        return {name: weight for name, weight in asdict(self.weights).items() if name in terms}

    def roll(self, x: Tensor, steps: int, draws: np.random.Generator) -> Rollout:
        """Paths of the closed loop from `x`, (batch, dim), with new noise if there is any."""
        problem = self.problem
        times = graded(steps, 0.0, problem.horizon, problem.grading)
        increments = brownian(problem, times, len(x), draws)
        return rollout(
            problem, self.model.potential, x, steps=times, density=False,
            residual=self.weights.hjb > 0, increments=increments,
        )  # fmt: skip

    def terms(self, x: Tensor, path: Rollout) -> dict[str, Tensor]:
        """The cost and all penalties of each row, (batch,)."""
        problem, potential = self.problem, self.model.potential
        assert path.running_cost is not None
        end = torch.as_tensor(problem.horizon, dtype=torch.float64).to(x)
        phi = potential.bind()(path.z, end, dt=False, laplacian=False)
        assert phi.value is not None and phi.grad is not None
        if problem.interaction is None:
            with torch.enable_grad():
                z = path.z if path.z.requires_grad else path.z.detach().requires_grad_(True)
                G = problem.terminal_cost(z)
                slope = gradient(G, z)
            cost = path.running_cost + G
            terms = {
                "cost": cost,
                "terminal": (phi.value - G).abs(),
                "terminal_gradient": (phi.grad - slope).abs().sum(1),
            }
        else:  # whose terminal gradient would be that of the density, too
            assert path.log_det is not None
            G = problem.terminal_cost(path.z)
            log_density = problem.interaction.initial_log_density(x) - path.log_det
            share, variation = problem.interaction.terminal(path.z, log_density)
            cost = path.running_cost + G + share
            terms = {"cost": cost, "terminal": size(phi.value - G - variation)}
        if path.hjb is not None:
            terms["hjb"] = path.hjb
        if path.bsde is not None:
            terms["bsde"] = path.bsde
        if self.weights.value:
            terms["value"] = (potential(x, torch.zeros_like(end)) - cost).abs()
        return terms

    @torch.no_grad()
    def validate(self, batch: Tensor) -> Tensor:
        x = batch.to(self.model.like)
        path = self.roll(x, 2 * self.steps, np.random.default_rng((self.seed, 0)))
        terms = self.terms(x, path)
        if self.problem.noise is None:
            return terms["cost"]
        # The cost hardly changes near the optimum, and its noise hides what does.
        used = self._used(terms)
        return torch.stack([weight * terms[name] for name, weight in used.items()]).sum(0)

    def prepare(self, rows: Rows, generator: torch.Generator) -> None:
        self.seed = int(torch.randint(2**62, (), generator=generator))

    def settings(self) -> dict[str, Any]:
        return {"time_steps": self.steps, "weights": asdict(self.weights)}

    def choices(self) -> dict[str, Any]:
        return {"quadratic_part": self.model.potential.base is not None}

    def inner_weights(self) -> list[Tensor]:
        return self.model.inner_weights()

    def default_rate(self, steps: int) -> float:
        return 0.01

    def state(self) -> dict[str, Any]:
        return {"seed": self.seed, "draws": self.draws}

    def restore(self, state: dict[str, Any]) -> None:
        self.seed, self.draws = state["seed"], state["draws"]
