"""Short pilot runs that choose the hyperparameters of a conditional flow."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..errors import ArgumentError, TrainingError, unknown
from ..flows import ConditionalOTFlow, PCPMap, TransportMap
from ..flows.standardize import Bounds
from ..train import fit, hold_out

SHARE = 0.05  # of the steps or seconds of the whole training, that one pilot run takes
MOST = 0.5  # that all of them take
LEAST_STEPS = 20
JUDGED = 2000  # validation rows

Draw = Callable[[np.random.Generator], Any]


def _one_of(*values: int) -> Draw:
    return lambda rng: int(rng.choice(values))


def _between(low: float, high: float) -> Draw:
    """Log-uniform, to three digits."""
    return lambda rng: float(f"{math.exp(rng.uniform(math.log(low), math.log(high))):.3g}")


@dataclass(frozen=True)
class Method:
    """A kind of conditional density: how to build one, and what pilot runs try.

    `make(dim, context_dim, **options)` builds it; `space` draws its options, and `training` draws
    the arguments of `fit`.
    """

    make: Callable[..., TransportMap]
    options: frozenset[str]  # that the command line and the estimator may pass
    space: Mapping[str, Draw]
    training: Mapping[str, Draw]


SIZES: dict[str, Draw] = {"width": _one_of(32, 64, 128), "depth": _one_of(2, 3, 4)}
TRAINING: dict[str, Draw] = {
    "learning_rate": _between(0.003, 0.03),
    "batch_size": _one_of(128, 256, 512),
}
METHODS: dict[str, Method] = {
    "cot": Method(
        ConditionalOTFlow,
        frozenset({"width", "depth", "embedding", "transport", "hjb"}),
        {**SIZES, "transport": _between(1e-4, 1e-1)},
        TRAINING,
    ),
    "pcp": Method(PCPMap, frozenset({"width", "depth", "embedding"}), SIZES, TRAINING),
}


@dataclass(frozen=True)
class Pilot:
    """One pilot run: what it tried, and its negative log-likelihood on validation rows, in nats
    and the user's units (infinite where training diverged)."""

    options: dict[str, Any]
    training: dict[str, Any]
    nll: float

    def to_dict(self) -> dict[str, Any]:
        """The fields, JSON-safe."""
        return {**self.options, **self.training, "nll": self.nll}


def build(
    method: str,
    dim: int,
    context_dim: int,
    options: Mapping[str, Any],
    *,
    support: Sequence[Bounds] | None = None,
    seed: int = 0,
) -> TransportMap:
    """A new flow of a method in `METHODS`.

    Args:
        options: of the flow; None stands for its default.
        support: of the parameters.
        seed: of the initial weights.

    Raises:
        ArgumentError: the method is unknown, or has no such option.
    """
    if method not in METHODS:
        raise ArgumentError(unknown("method", method, METHODS))
    given = {name: value for name, value in options.items() if value is not None}
    foreign = sorted(given.keys() - METHODS[method].options)
    if foreign:
        raise ArgumentError(f"the method {method!r} has no option {', '.join(foreign)}")
    generator = torch.Generator().manual_seed(seed)
    return METHODS[method].make(dim, context_dim, support=support, generator=generator, **given)


def run_pilots(
    count: int,
    method: str,
    theta: Tensor,
    context: Tensor,
    *,
    options: Mapping[str, Any] | None = None,
    training: Mapping[str, Any] | None = None,
    support: Sequence[Bounds] | None = None,
    validation: tuple[Tensor, Tensor] | None = None,
    max_steps: int | None = None,
    budget: float | None = None,
    seed: int = 0,
    tell: Callable[[str], object] = lambda text: None,
) -> list[Pilot]:
    """Try settings drawn at random in short runs, the best first.

    The first run has the default settings, so the choice is never worse than these as far as the
    short runs can tell. The same seed gives the same choice, unless a `budget` decides how long
    the runs are.

    Args:
        count: of the runs.
        method: a name in `METHODS`.
        theta, context: training pairs, (rows, dim) and (rows, context_dim).
        options, training: what is not to be searched, of the flow and of `fit`; None is searched.
        support: of the parameters.
        validation: pairs that judge the runs; by default those that `fit` holds out.
        max_steps, budget: of the whole training; each run takes a few percent of it.
        seed: of the draws, and of each run.
        tell: is called with a line on each run.

    Raises:
        TrainingError: all runs diverged.

    Source: Wang et al., arXiv 2310.16975, section 5, whose random search this is.
    """
    fixed = {k: v for k, v in (options or {}).items() if v is not None}
    how = {k: v for k, v in (training or {}).items() if v is not None}
    held = validation
    if held is None:
        index = hold_out(len(theta), seed)[1]
        held = theta[index], context[index]
    judged = tuple(part[:JUDGED] for part in held)
    share = min(SHARE, MOST / count)
    if budget is None:
        flow = build(method, theta.shape[1], context.shape[1], fixed, support=support, seed=seed)
        steps = max_steps or flow.objective().default_steps(len(theta))
        length: dict[str, Any] = {"max_steps": max(LEAST_STEPS, int(share * steps))}
    else:
        length = {"budget": share * budget}
    rng = np.random.default_rng(seed)
    found = []
    for i in range(count):
        own, its = dict(fixed), dict(how)
        if i:
            space = METHODS[method]
            own |= {k: draw(rng) for k, draw in space.space.items() if k not in fixed}
            its |= {k: draw(rng) for k, draw in space.training.items() if k not in how}
        flow = build(method, theta.shape[1], context.shape[1], own, support=support, seed=seed)
        try:
            fit(
                flow, (theta, context), validation=validation, seed=seed, progress=False,
                **length, **its,
            )  # fmt: skip
            with torch.no_grad():
                nll = -flow.log_prob(*judged).mean().item()
        except TrainingError:
            nll = math.inf
        found.append(Pilot(own, its, nll if math.isfinite(nll) else math.inf))
        tried = ", ".join(f"{k.replace('_', ' ')} {v}" for k, v in {**own, **its}.items())
        tell(f"pilot run {i + 1} of {count}: {nll:.4f} nats with {tried or 'default settings'}")
    found.sort(key=lambda pilot: pilot.nll)
    if not math.isfinite(found[0].nll):
        raise TrainingError(f"all {count} pilot runs diverged")
    return found


def remaining_budget(budget: float | None, count: int) -> float | None:
    """Seconds that `count` pilot runs leave for the training."""
    if budget is None or not count:
        return budget
    return budget * (1 - count * min(SHARE, MOST / count))
