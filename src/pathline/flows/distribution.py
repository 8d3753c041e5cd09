"""A flow as a `torch.distributions.Distribution`."""

from typing import TYPE_CHECKING, Any

import torch
from torch import Size, Tensor
from torch.distributions import Distribution, constraints

if TYPE_CHECKING:
    from .otflow import OTFlow

Shape = Size | list[int] | tuple[int, ...]


class FlowDistribution(Distribution):
    """The density of a flow: event shape (dim,), reparametrised samples, log-densities in nats.

    Args:
        flow: the flow; its parameters receive the gradients of samples and log-densities.
        batch_shape: independent copies.
        validate_args: check that values have the event's shape and lie in the support.
    """

    arg_constraints: dict[str, constraints.Constraint] = {}  # noqa: RUF012
    has_rsample = True

    def __init__(
        self,
        flow: "OTFlow",
        batch_shape: Shape = (),
        validate_args: bool | None = None,
    ) -> None:
        self.flow = flow
        super().__init__(Size(batch_shape), Size((flow.dim,)), validate_args=validate_args)

    @property
    def support(self) -> constraints.Constraint:
        """All of space, or the box of the flow's bounded columns."""
        standardize = self.flow.standardize
        if not standardize.bounded:
            return constraints.real_vector
        return constraints.independent(_Open(standardize.lower, standardize.upper), 1)

    def expand(self, batch_shape: Shape, _instance: Any = None) -> "FlowDistribution":
        """The same density with another batch shape."""
        return FlowDistribution(self.flow, Size(batch_shape), validate_args=self._validate_args)

    def rsample(self, sample_shape: Shape = ()) -> Tensor:
        """Samples of shape sample_shape + batch_shape + (dim,), differentiable in the flow."""
        return self.rsample_and_log_prob(sample_shape, log_prob=False)[0]

    def rsample_and_log_prob(
        self, sample_shape: Shape = (), *, log_prob: bool = True
    ) -> tuple[Tensor, Tensor | None]:
        """Samples and their log-densities in one solve."""
        shape = self._extended_shape(Size(sample_shape))
        z = self.flow.reference_sample(shape.numel() // self.flow.dim)
        if not log_prob:
            return self.flow.from_reference(z).reshape(shape), None
        x, density = self.flow.from_reference_with_log_prob(z)
        return x.reshape(shape), density.reshape(shape[:-1])

    def log_prob(self, value: Tensor) -> Tensor:
        """Log-density in nats, of the shape of `value` without its last axis."""
        if self._validate_args:
            self._validate_sample(value)
        shape = torch.broadcast_shapes(value.shape, self.batch_shape + self.event_shape)
        rows = value.expand(shape).reshape(-1, self.flow.dim)
        return self.flow.log_prob(rows).reshape(shape[:-1])


class _Open(constraints.Constraint):
    """lower < x < upper in each column, for infinite bounds too."""

    def __init__(self, lower: Tensor, upper: Tensor) -> None:
        self.lower_bound, self.upper_bound = lower, upper
        super().__init__()

    def check(self, value: Tensor) -> Tensor:
        return (value > self.lower_bound) & (value < self.upper_bound)
