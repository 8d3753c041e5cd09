"""Pathline's conditional densities inside the package sbi.

    from sbi.inference import NPE
    inference = NPE(prior, density_estimator=pathline.posterior.sbi.cot_flow(prior=prior))

sbi then trains the flow in its own loop and samples it in its posteriors. sbi's `theta` is called
input there, and its `x` condition.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.distributions import Distribution, constraints

from ..control import rollout
from ..errors import ArgumentError, DataError
from ..flows import FlowObjective, OTFlow, TransportMap
from ..flows.standardize import Bounds
from ..train import Rows
from ..train.objective import Distrust
from .pilots import METHODS

try:
    from sbi.neural_nets.estimators.base import ConditionalDensityEstimator
except ImportError:
    raise ArgumentError("sbi is not installed; pip install 'pathline[posterior]'") from None

__all__ = ["FlowBuilder", "FlowEstimator", "cot_flow", "pcp_map", "support_of"]

KEPT = 1024  # training pairs by which the time grid is adapted


class FlowEstimator(ConditionalDensityEstimator):
    """A conditional flow as sbi's density estimator; `net` is the flow.

    One that `pathline.fit` has trained goes into sbi's posteriors at once:
    `DirectPosterior(FlowEstimator(flow), prior)`.

    Args:
        flow: with dim and context_dim; standardised, by `fit` or `prepare`.
        condition_shape: of one observation; (context_dim,) by default. Others are flattened.
        pairs: training pairs (theta (rows, dim), x (rows, context_dim)) by which the time grid is
            adapted at the start of each epoch, as `fit` does; without them it stays.
    """

    net: TransportMap

    def __init__(
        self,
        flow: TransportMap,
        condition_shape: Sequence[int] | None = None,
        pairs: tuple[Tensor, Tensor] | None = None,
    ) -> None:
        shape = (flow.context_dim,) if condition_shape is None else condition_shape
        if math.prod(shape) != flow.context_dim or not flow.context_dim:
            raise ArgumentError(
                f"`condition_shape` must have as many entries as the flow's `context_dim`, "
                f"{flow.context_dim}, and at least one, got {tuple(shape)}"
            )
        super().__init__(flow, torch.Size((flow.dim,)), torch.Size(shape))
        self._objective = (flow.objective(),)  # in a tuple: its weights are those of `net`
        self._pairs = None if pairs is None else torch.cat([part[:KEPT] for part in pairs], 1)

    def train(self, mode: bool = True) -> "FlowEstimator":
        """As of any module. sbi calls it at the start of each epoch, which adapts the time grid."""
        objective = self._objective[0]
        objective.constrain()
        if mode and self._pairs is not None:
            try:
                objective.adapt(self._pairs)
            except Distrust:
                objective.caution()
        super().train(mode)
        return self

    def loss(self, input: Tensor, condition: Tensor, **kwargs: Any) -> Tensor:
        """Negative log-likelihood of each pair in nats, (batch,), of `input` (batch, dim) and
        `condition` (batch, *condition_shape); in training with the terms that regularise a flow
        in time."""
        theta, x = inside(self.net, input), condition.reshape(len(input), -1)
        objective = self._objective[0]
        if not self.training:
            return -self.net.log_prob(theta, x)
        objective.constrain()  # sbi's optimiser has made a step since
        if isinstance(self.net, OTFlow) and isinstance(objective, FlowObjective):
            return _regularised(self.net, objective, theta, x)
        return -self.net.log_prob(theta, x)

    def log_prob(self, input: Tensor, condition: Tensor, **kwargs: Any) -> Tensor:
        """Log-densities (sample, batch) of `input` (sample, batch, dim) given `condition`
        (batch, *condition_shape)."""
        input, condition, _ = self._broadcast_and_align(input, condition)
        rows = input.reshape(-1, self.net.dim)
        x = condition.reshape(len(rows), self.net.context_dim)
        return self.net.log_prob(rows, x).reshape(input.shape[:2])

    def sample(self, sample_shape: torch.Size, condition: Tensor, **kwargs: Any) -> Tensor:
        """Samples (*sample_shape, batch, dim), strictly inside the flow's support."""
        x = condition.reshape(-1, self.net.context_dim)
        return inside(self.net, self.net(x).sample(torch.Size(sample_shape)))


def _regularised(flow: OTFlow, objective: FlowObjective, theta: Tensor, x: Tensor) -> Tensor:
    """C + w L + rho R of `FlowObjective` for each row, with C in the user's units."""
    y, features, log_slope = flow.coordinates(theta, x)
    path = rollout(flow.problem, flow.potential, y, context=features, steps=objective.steps)
    assert not (path.log_det is None or path.running_cost is None or path.hjb is None)
    nll = -(flow.reference_log_prob(path.z) + path.log_det + log_slope.to(path.z))
    return nll + flow.transport * path.running_cost + objective.hjb * path.hjb


@dataclass(frozen=True)
class FlowBuilder:
    """What sbi calls with its training batch: builds a flow, and standardises it by the batch.

    Args:
        method: a name in `pathline.posterior.pilots.METHODS`.
        support: (lower, upper) of each parameter; None if all are free.
        seed: of the initial weights.
        options: of the flow.
    """

    method: str
    support: Sequence[Bounds] | None = None
    seed: int = 0
    options: dict[str, Any] = field(default_factory=dict)

    def __call__(self, batch_theta: Tensor, batch_x: Tensor) -> FlowEstimator:
        """A new estimator for theta (rows, dim) given x (rows, *condition_shape).

        Raises:
            DataError: a value lies outside the support, or there is no density at these rows.
        """
        x = batch_x.reshape(len(batch_x), -1)
        generator = torch.Generator().manual_seed(self.seed)
        flow: TransportMap = METHODS[self.method].make(
            batch_theta.shape[1], x.shape[1], support=self.support, generator=generator,
            **self.options,
        )  # fmt: skip
        lower, upper = flow.standardize.lower, flow.standardize.upper
        outside = ((batch_theta < lower) | (batch_theta > upper)).any(1)
        if outside.any():
            row = int(outside.nonzero()[0])
            raise DataError(
                f"{int(outside.sum())} of {len(batch_theta)} rows of theta lie outside the prior's "
                f"bounds, the first one is row {row}: {batch_theta[row].tolist()}"
            )
        theta = inside(flow, batch_theta)
        flow.prepare(Rows(torch.cat([theta, x], 1).double(), name="theta and x"), generator)
        return FlowEstimator(flow, batch_x.shape[1:], (theta, x))


def cot_flow(
    *,
    prior: Distribution | None = None,
    support: Sequence[Bounds] | None = None,
    seed: int = 0,
    **options: Any,
) -> FlowBuilder:
    """A `ConditionalOTFlow` for sbi: `NPE(prior, density_estimator=cot_flow(prior=prior))`.

    A flow learns faster than sbi's usual networks: `inference.train(learning_rate=5e-3)` suits it.

    Args:
        prior: that of sbi; the flow's samples never leave its bounds, so nothing leaks and nothing
            is rejected.
        support: (lower, upper) of each parameter instead, None where free.
        seed: of the initial weights.
        options: of the flow, such as `width`, `depth` and `embedding`.

    Raises:
        ArgumentError: both `prior` and `support` are given, or the prior's bounds are no box.
    """
    return _builder("cot", prior, support, seed, options)


def pcp_map(
    *,
    prior: Distribution | None = None,
    support: Sequence[Bounds] | None = None,
    seed: int = 0,
    **options: Any,
) -> FlowBuilder:
    """A `PCPMap` for sbi; arguments as of `cot_flow`."""
    return _builder("pcp", prior, support, seed, options)


def _builder(
    method: str,
    prior: Distribution | None,
    support: Sequence[Bounds] | None,
    seed: int,
    options: dict[str, Any],
) -> FlowBuilder:
    if prior is not None and support is not None:
        raise ArgumentError("`prior` and `support` both set the bounds; give one of them")
    return FlowBuilder(method, support if prior is None else support_of(prior), seed, options)


def support_of(prior: Distribution) -> list[Bounds] | None:
    """The bounds of a prior over vectors (dim,), such as sbi's BoxUniform; None if it has none.

    Raises:
        ArgumentError: its support is not a box.
    """
    dim = prior.sample().numel()
    ends = _ends(prior.support, dim)  # type: ignore[arg-type]
    bounds: list[Bounds] = [
        (low if math.isfinite(low) else None, high if math.isfinite(high) else None)
        for low, high in ends.tolist()
    ]
    return bounds if any(pair != (None, None) for pair in bounds) else None


def _ends(constraint: constraints.Constraint, dim: int) -> Tensor:
    """(lower, upper) of each column of what satisfies a constraint, (dim, 2)."""
    while isinstance(constraint, constraints.independent):
        constraint = constraint.base_constraint
    if isinstance(constraint, constraints.cat):
        parts = zip(constraint.cseq, constraint.lengths, strict=True)
        return torch.cat([_ends(part, length) for part, length in parts])
    free = (type(constraints.real), type(constraints.real_vector))
    bounded = hasattr(constraint, "lower_bound") or hasattr(constraint, "upper_bound")
    if not (bounded or isinstance(constraint, free)) or constraint.is_discrete:
        raise ArgumentError(
            f"the prior's support is no box but {constraint}; give `support`, (lower, upper) of "
            "each parameter"
        )
    ends = [getattr(constraint, "lower_bound", -math.inf)]
    ends += [getattr(constraint, "upper_bound", math.inf)]
    return torch.stack([torch.as_tensor(e, dtype=torch.float64).expand(dim) for e in ends], 1)


def inside(flow: TransportMap, theta: Tensor) -> Tensor:
    """`theta` (..., dim) with what rounding put on a bound moved to the nearest number inside."""
    if not flow.standardize.bounded:
        return theta
    lower, upper = (end.to(theta) for end in (flow.standardize.lower, flow.standardize.upper))
    return theta.clamp(
        torch.nextafter(lower, torch.full_like(lower, math.inf)),
        torch.nextafter(upper, torch.full_like(upper, -math.inf)),
    )
