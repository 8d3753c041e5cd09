"""Solve a control problem: train a policy."""

import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..errors import ArgumentError, SolveError
from ..train import fit
from .objective import ValueObjective, Weights
from .policy import Policy
from .problem import Problem
from .riccati import QuadraticValue, riccati_value
from .sweep import closed_loop, improve
from .transcription import transcribe

STARTS = 2**16  # drawn before training
JUDGES = 1024  # starts that pick the best policy
GUESSES = 6  # of the open-loop solution
TRIED = 256  # starts on which it is judged whether the quadratic part helps
FAR = 0.1  # of the cost: how far that part may be from the terminal cost


def solve(
    problem: Problem,
    *,
    policy: Policy | None = None,
    width: int = 32,
    depth: int = 2,
    steps: int = 20,
    weights: Weights | None = None,
    base: str = "auto",
    out: str | Path | None = None,
    seed: int = 0,
    max_steps: int | None = None,
    budget: float | None = None,
    batch_size: int = 256,
    learning_rate: float | None = None,
    optimizer: str | None = None,
    double: bool = False,
    resume: bool = False,
    overwrite: bool = False,
    progress: bool = True,
    metadata: dict[str, Any] | None = None,
) -> Policy:
    """A feedback policy that is near-optimal from every start of the problem.

    An open-loop solution from the nominal start, and the value function to second order around it,
    are where learning begins; a network learns the rest along the policy's own paths, from all
    starts. Where the quadratic part does not help it is left out.

    Args:
        problem: what to solve; `problem.check()` tests your own formulas.
        policy: one to train further; a new one by default.
        width, depth: of a new policy's network.
        steps: time steps in training; costs are judged on twice as many.
        weights: of the cost and of the penalties.
        base: "auto", "path" (always with the quadratic part) or "none" (never).
        out: run folder, as of `pathline.fit`.
        seed: of everything random; the same seed on the same machine gives the same policy.
        max_steps: training steps.
        budget: seconds for the training, turned into a number of steps after a timed warm-up.
        batch_size: starts of a training step.
        learning_rate: the first of a cosine schedule.
        optimizer: as of `pathline.fit`.
        double: train and keep the policy in double precision.
        resume, overwrite, progress, metadata: as of `pathline.fit`.

    Returns:
        The policy with the lowest cost on held-out starts. `policy.run` tells how training went.

    Raises:
        ArgumentError: an argument is out of range, or the problem is not well-defined.
        TrainingError: training diverged again and again.
        KeyboardInterrupt: on Ctrl-C, after the best policy and the checkpoint are safe.

    Example:
        >>> from pathline.control.problems import LinearQuadratic
        >>> policy = solve(LinearQuadratic(dim=2), max_steps=20, progress=False)
        >>> policy.control(0.0, torch.tensor([-3.0, -3.0])).shape
        torch.Size([2])
    """
    if base not in ("auto", "path", "none"):
        raise ArgumentError(f"`base` must be 'auto', 'path' or 'none', got {base!r}")
    if not isinstance(steps, int) or steps < 1:
        raise ArgumentError(f"`steps` must be a positive integer, got {steps!r}")
    if problem.solver != "control.solve":
        raise ArgumentError(f"`problem` is a {type(problem).__name__}: use {problem.solver}")
    problem.check(seed=seed).demand()
    generator = torch.Generator().manual_seed(seed)
    starts, judges = problem.initial(STARTS, generator), problem.initial(JUDGES, generator)
    judges[0] = problem.nominal()
    if policy is None:
        if progress and base != "none" and problem.interaction is None and not resume:
            print("solving from the nominal start, to begin with", file=sys.stderr, flush=True)
        policy = _first_policy(problem, starts, judges, width, depth, steps, base, seed)
    if double:
        policy.double()
    objective = ValueObjective(policy, steps, weights)
    policy.run = fit(
        objective,
        starts,
        validation=judges,
        out=out,
        seed=seed,
        max_steps=max_steps,
        budget=budget,
        batch_size=batch_size,
        learning_rate=learning_rate,
        optimizer=optimizer,
        patience=25,
        resume=resume,
        overwrite=overwrite,
        progress=progress,
        metadata=metadata,
    )
    return policy


def _first_policy(
    problem: Problem,
    starts: Tensor,
    judges: Tensor,
    width: int,
    depth: int,
    steps: int,
    base: str,
    seed: int,
) -> Policy:
    """A policy with first weights: with the quadratic part if that is wanted, or better."""
    fine = (2 if problem.noise is None else 10) * steps  # noise stirs where the feedback is steep

    def make(known: QuadraticValue | None) -> Policy:
        generator = torch.Generator().manual_seed(seed)
        nodes = 0 if known is None else known.nodes
        policy = problem.policy(width, depth, steps=fine, nodes=nodes, generator=generator)
        if known is not None and policy.potential.base is not None:
            policy.potential.base.load_state_dict(known.state_dict())
        policy.potential.initialise(starts[:1000].to(policy.like), generator)
        return policy

    if base == "none" or problem.interaction is not None:
        return make(None)
    try:
        policy = make(_quadratic_part(problem, steps, seed))
    except SolveError:
        if base == "path":
            raise
        return make(None)
    if base == "path" or _helps(policy, make(None), judges[:TRIED], steps):
        return policy
    return make(None)


def _quadratic_part(problem: Problem, steps: int, seed: int) -> QuadraticValue:
    if problem.reference(torch.tensor(0.0, dtype=torch.float64)) is not None:
        return improve(problem, riccati_value(problem), 2 * steps)
    path = transcribe(problem, guesses=GUESSES, seed=seed)
    found = [riccati_value(problem, path, follow=follow) for follow in (False, True)]
    costs = [closed_loop(problem, value, 2 * steps).cost for value in found]
    return found[int(np.argmin(np.nan_to_num(costs, nan=np.inf)))]


@torch.no_grad()
def _helps(policy: Policy, plain: Policy, x: Tensor, steps: int) -> bool:
    """Whether paths of `policy` cost less than those of `plain`, and end where its value function
    is near the terminal cost."""
    found = []
    for candidate in (policy, plain):
        objective, states = ValueObjective(candidate, steps), x.to(candidate.like)
        path = objective.roll(states, steps, np.random.default_rng(0))
        found.append({k: v.mean() for k, v in objective.terms(states, path).items()})
    own, rival = found
    cheaper = own["cost"] < rival["cost"].nan_to_num(nan=torch.inf)
    return bool(cheaper) and bool(own["terminal"] < FAR * (1 + own["cost"].abs()))
