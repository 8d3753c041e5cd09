"""Population and agent in turn, until neither moves.

As in APAC-Net (Lin et al., Alternating the population and control neural networks to solve
high-dimensional stochastic mean-field games, PNAS 2021, arXiv 2002.10113), but the population is
not a second network: at each turn new particles move by the stochastic differential equation under
the agent's present feedback. So the Fokker-Planck equation holds by construction, in any dimension,
and what is left to learn is the agent's value function.
"""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Generator, Tensor

from ..control import Rollout, ValueObjective
from ..control.rollout import Value, brownian, hjb_residual
from ..errors import ArgumentError
from ..nets import Derivatives
from ..train import Loss, fit, step_generator
from .stochastic import StochasticGame

if TYPE_CHECKING:
    from .population import Population

STARTS, JUDGES = 2**16, 1024  # particles drawn before training, and those that pick the best


def among(game: StochasticGame, z: Tensor) -> Tensor:
    """What particles at `z` (batch, dim) pay for each other, (batch,).

    Each half meets the other, so that none meets itself. An agent does not move the population:
    no gradient goes to those whom it meets.
    """
    one, other = z.tensor_split(2)
    return torch.cat([game.crowding(one, other.detach()), game.crowding(other, one.detach())])


def walk(
    game: StochasticGame,
    value: Value,
    x: Tensor,
    times: Tensor,
    increments: Tensor | None,
    *,
    integrals: bool = True,
    trajectory: bool = False,
) -> Rollout:
    """Move particles from `x` (batch, dim) by the feedback of `value`, and in noise.

    Heun's method and the trapezoidal rule: of weak order two, as the noise is additive.

    Args:
        game: its costs.
        value: phi.
        x: states at `times[0]`.
        times: (steps + 1,), in double precision.
        increments: of the Brownian motion, (steps, batch, dim); None for none.
        integrals: integrate what an agent pays, and |HJB residual|, given the other particles.
        trajectory: keep the states at all steps.
    """
    noise = None if game.noise is None else game.noise.to(x)
    derivatives = value.bind(noise=noise)
    nodes, lengths = times.to(x), times.diff().tolist()
    noisy = noise is not None and integrals

    def drift(t: Tensor, y: Tensor) -> Tensor:
        phi = derivatives(y, t, value=False, dt=False, laplacian=False)
        assert phi.grad is not None
        return game.feedback(t, y, phi.grad)

    z, zs = x, [x]
    cost, residual = x.new_zeros(len(x)), x.new_zeros(len(x))
    for n, t in enumerate(nodes):
        phi = derivatives(z, t, value=False, dt=integrals, laplacian=noisy)
        assert phi.grad is not None
        u = game.feedback(t, z, phi.grad)
        if integrals:
            weight = sum(lengths[max(n - 1, 0) : n + 1]) / 2
            rate = game.running_cost(t, z, u) + among(game, z)
            cost = cost + weight * rate
            residual = residual + weight * hjb_residual(phi, rate, u, noisy=noisy).abs()
        if n == len(lengths):
            break
        h = lengths[n]
        kick = 0.0 if increments is None or noise is None else increments[n].to(x) @ noise.mT
        u = (u + drift(nodes[n + 1], z + h * u + kick)) / 2
        z = z + h * u + kick
        if trajectory:
            zs.append(z)
    path = torch.stack(zs) if trajectory else None
    return (
        Rollout(z, cost, hjb=residual, trajectory=path)
        if integrals
        else Rollout(z, trajectory=path)
    )


class Alternation(ValueObjective):
    """A turn of the population, and one of the agent.

    New particles move under the agent's present feedback. Along its path each finds what is left to
    pay, and, by Pontryagin's principle, the slope of that,

        Y(t) = g(z(T)) + int_t^T L + f ds - M,
        p(t) = grad g(z(T)) + int_t^T grad f(z) ds - grad M,     f = preference + crowding,

    whose means given z(t) are phi and grad phi in equilibrium, and there alone. The agent's value
    function takes a step of regression onto both. M is a control variate: it has no mean, as it is
    odd in the noise, and near the equilibrium it takes nearly all of the noise away. No gradient
    goes back through time, and no Laplacian is needed: it appears only in what picks the best
    agent, the residuals of the HJB equation and of the terminal condition.

    Source: Domingo-Enrich, Drozdzal, Karrer, Chen, Adjoint matching, ICLR 2025 (arXiv 2409.08861),
    section 5, for the regression on p.
    """

    model: "Population"

    def forward(self, batch: Tensor, weights: Tensor | None = None) -> Loss:
        x = batch.to(self.model.like)
        self.draws += 1
        game, phi, times = self.model.problem, self.model.potential, self.model.times(self.steps)
        increments = brownian(game, times, len(x), step_generator(self.seed, self.draws))
        with torch.no_grad():
            zs = walk(game, phi, x, times, increments, integrals=False, trajectory=True).trajectory
        assert zs is not None
        evaluate = partial(phi.bind(), dt=False, laplacian=False)
        nodes = [evaluate(z, t) for t, z in zip(times.to(x), zs, strict=True)]
        value, slope = (torch.stack([getattr(n, k) for n in nodes]) for k in ("value", "grad"))
        Y, p = lessons(game, zs, slope.detach(), times)
        if increments is not None and game.noise is not None:
            kicks = increments.to(x) @ game.noise.to(x).mT
            steps = zip(times.to(x)[:-1], zs[:-1], kicks, strict=True)
            with torch.no_grad():
                changes = [odd(evaluate, *step) for step in steps]
            M, slope_M = (_to_come(torch.stack(part)) for part in zip(*changes, strict=True))
            Y, p = Y - M, p - slope_M
        terms = {
            "value": (value - Y).square().mean(),
            "slope": (slope - p).square().sum(2).mean(),
        }
        total = terms["value"] + terms["slope"]
        return Loss(total, {name: term.detach() for name, term in terms.items()})

    def roll(self, x: Tensor, steps: int, draws: np.random.Generator) -> Rollout:
        game, times = self.model.problem, self.model.times(steps)
        increments = brownian(game, times, len(x), draws)
        return walk(game, self.model.potential, x, times, increments)

    @torch.no_grad()
    def validate(self, batch: Tensor) -> Tensor:
        x = batch.to(self.model.like)
        terms = self.terms(x, self.roll(x, 2 * self.steps, np.random.default_rng((self.seed, 0))))
        return terms["hjb"] + terms["terminal"]

    def default_steps(self, rows: int) -> int:
        return 1500

    def default_rate(self, steps: int) -> float:
        return 0.03


def lessons(
    game: StochasticGame, zs: Tensor, slopes: Tensor, times: Tensor
) -> tuple[Tensor, Tensor]:
    """Y (steps + 1, batch) and p, of the shape of `zs`, of `Alternation` along paths `zs` by the
    feedback of `slopes` of phi, without the control variate."""
    rates = []
    with torch.enable_grad():
        states = zs.detach().requires_grad_(True)
        for t, z, p in zip(times.to(zs), states, slopes, strict=True):
            rates.append(game.running_cost(t, z, game.feedback(t, z, p)) + among(game, z))
        L, G = torch.stack(rates), game.terminal_cost(states[-1])
        force, push = _slope(L, states), _slope(G, states)[-1]
    h = times.diff().to(zs)
    Y = G.detach() + _to_come(h[:, None] * (L[1:] + L[:-1]).detach() / 2)
    return Y, push + _to_come(h[:, None, None] * (force[1:] + force[:-1]) / 2)


def odd(
    evaluate: Callable[[Tensor, Tensor], Derivatives], t: Tensor, z: Tensor, kick: Tensor
) -> tuple[Tensor, Tensor]:
    """What of a `kick` (batch, dim) changes phi (batch,) and its gradient, oddly in the kick."""
    there, back = evaluate(z + kick, t), evaluate(z - kick, t)
    assert there.value is not None and back.value is not None
    assert there.grad is not None and back.grad is not None
    return (there.value - back.value) / 2, (there.grad - back.grad) / 2


def _slope(costs: Tensor, states: Tensor) -> Tensor:
    if not costs.requires_grad:
        return torch.zeros_like(states)
    (slope,) = torch.autograd.grad(
        costs.sum(), states, retain_graph=True, allow_unused=True, materialize_grads=True
    )
    return slope


def _to_come(steps: Tensor) -> Tensor:
    """Sums from each time to the last of the parts of each step, (steps + 1, ...)."""
    sums = steps.flip(0).cumsum(0).flip(0)
    return torch.cat([sums, torch.zeros_like(sums[:1])])


def solve_alternating(
    game: StochasticGame,
    *,
    width: int = 64,
    depth: int = 2,
    steps: int = 16,
    out: str | Path | None = None,
    seed: int = 0,
    max_steps: int | None = None,
    budget: float | None = None,
    batch_size: int = 256,
    learning_rate: float | None = None,
    resume: bool = False,
    overwrite: bool = False,
    progress: bool = True,
    metadata: dict[str, Any] | None = None,
) -> "Population":
    """The equilibrium of a stochastic game: population and agent in turn, until neither moves.

    Args:
        game: what to solve.
        width, depth: of the value function's network.
        steps: time steps in training; it is judged, and particles move later, on twice as many.
        out: run folder, as of `pathline.fit`.
        seed: of everything random; the same seed on the same machine gives the same population.
        max_steps: turns of each, 1,500 by default; in two dimensions half of that does.
        budget: seconds for the training, turned into a number of steps after a timed warm-up.
        batch_size: particles of a turn.
        learning_rate: the first of a cosine schedule.
        resume, overwrite, progress, metadata: as of `pathline.fit`.

    Returns:
        The population with the smallest residuals on held-out particles. `population.run` tells
        how training went.

    Raises:
        ArgumentError: an argument is out of range, or the game is not well-defined.
        TrainingError: training diverged again and again.
        KeyboardInterrupt: on Ctrl-C, after the best population and the checkpoint are safe.

    Example:
        >>> from torch.distributions import Independent, Normal
        >>> start = Independent(Normal(torch.zeros(2), 1.0), 1)
        >>> game = StochasticGame(start, lambda z: (z - 1).square().sum(1), viscosity=0.1)
        >>> solve_alternating(game, steps=4, max_steps=5, progress=False).sample(3).shape
        torch.Size([3, 2])
    """
    if not isinstance(steps, int) or steps < 1:
        raise ArgumentError(f"`steps` must be a positive integer, got {steps!r}")
    if not isinstance(batch_size, int) or batch_size < 2:
        raise ArgumentError(f"`batch_size` must be at least 2, so that agents meet: {batch_size!r}")
    game.check(seed=seed).demand()
    generator = Generator().manual_seed(seed)
    starts, judges = game.initial(STARTS, generator), game.initial(JUDGES, generator)
    population = game.policy(width, depth, steps=2 * steps, generator=generator)
    population.potential.initialise(starts[:1000].to(population.like), generator)
    population.run = fit(
        Alternation(population, steps),
        starts,
        validation=judges,
        out=out,
        seed=seed,
        max_steps=max_steps,
        budget=budget,
        batch_size=batch_size,
        learning_rate=learning_rate,
        patience=25,
        resume=resume,
        overwrite=overwrite,
        progress=progress,
        metadata=metadata,
    )
    return population
