"""A flow as a `torch.distributions.Distribution`, and its map as a `Transform`."""

from typing import TYPE_CHECKING, Any

import torch
from torch import Size, Tensor
from torch.distributions import Distribution, Independent, Normal, Transform, constraints

from ..errors import ShapeError

if TYPE_CHECKING:
    from .map import TransportMap

Shape = Size | list[int] | tuple[int, ...]


class FlowDistribution(Distribution):
    """The density of a flow: event shape (dim,), reparametrised samples, log-densities in nats.

    It is what its `transform`, from data to reference, makes of its `base` N(0, I).

    Args:
        flow: the flow; its parameters receive the gradients of samples and log-densities.
        context: of a conditional flow, (..., context_dim); what stands in front of the last axis
            is the batch shape.
        batch_shape: independent copies; by default none, or one for each context.
        validate_args: check that values have the event's shape and lie in the support.

    Raises:
        ShapeError: the flow has a context and none is given, or the other way round.
    """

    arg_constraints: dict[str, constraints.Constraint] = {}  # noqa: RUF012
    has_rsample = True

    def __init__(
        self,
        flow: "TransportMap",
        context: Tensor | None = None,
        batch_shape: Shape | None = None,
        validate_args: bool | None = None,
    ) -> None:
        got = None if context is None else context.shape[-1] if context.ndim else 0
        if got != (flow.context_dim or None):
            want = f"(..., {flow.context_dim})" if flow.context_dim else "None"
            shape = None if context is None else tuple(context.shape)
            raise ShapeError(f"`context` must be {want}, got {shape}")
        self.flow, self.context = flow, context
        own = Size(()) if context is None else context.shape[:-1]
        shape = own if batch_shape is None else Size(batch_shape)
        super().__init__(shape, Size((flow.dim,)), validate_args=validate_args)

    @property
    def support(self) -> constraints.Constraint:
        """All of space, or the box of the flow's bounded columns."""
        standardize = self.flow.standardize
        if not standardize.bounded:
            return constraints.real_vector
        return constraints.independent(_Open(standardize.lower, standardize.upper), 1)

    @property
    def transform(self) -> "FlowTransform":
        """The map from data to reference."""
        return FlowTransform(self.flow, self.context)

    @property
    def base(self) -> Distribution:
        """N(0, I), in the precision of the flow."""
        zeros = self.flow.cast(torch.zeros(*self.batch_shape, self.flow.dim))
        return Independent(Normal(zeros, torch.ones_like(zeros)), 1)

    def expand(self, batch_shape: Shape, _instance: Any = None) -> "FlowDistribution":
        """The same density with another batch shape."""
        return FlowDistribution(
            self.flow, self.context, batch_shape, validate_args=self._validate_args
        )

    def rsample(self, sample_shape: Shape = ()) -> Tensor:
        """Samples of shape sample_shape + batch_shape + (dim,), differentiable in the flow."""
        return self.rsample_and_log_prob(sample_shape, log_prob=False)[0]

    def rsample_and_log_prob(
        self, sample_shape: Shape = (), *, log_prob: bool = True
    ) -> tuple[Tensor, Tensor | None]:
        """Samples and their log-densities in one solve."""
        shape = self._extended_shape(Size(sample_shape))
        z = self.flow.reference_sample(shape.numel() // self.flow.dim)
        context = rows_of(self.context, shape[:-1])
        if not log_prob:
            return self.flow.from_reference(z, context).reshape(shape), None
        x, density = self.flow.from_reference_with_log_prob(z, context)
        return x.reshape(shape), density.reshape(shape[:-1])

    def log_prob(self, value: Tensor) -> Tensor:
        """Log-density in nats, of the shape of `value` without its last axis."""
        if self._validate_args:
            self._validate_sample(value)
        shape = torch.broadcast_shapes(value.shape, self.batch_shape + self.event_shape)
        rows = value.expand(shape).reshape(-1, self.flow.dim)
        context = rows_of(self.context, shape[:-1])
        return self.flow.log_prob(rows, context).reshape(shape[:-1])


class FlowTransform(Transform):
    """The map x -> z of a flow from data to reference, (..., dim); `inv` is the way back."""

    domain = constraints.real_vector
    codomain = constraints.real_vector
    bijective = True

    def __init__(self, flow: "TransportMap", context: Tensor | None = None) -> None:
        super().__init__()
        self.flow, self.context = flow, context

    def _rows(self, x: Tensor) -> tuple[Size, Tensor, Tensor | None]:
        own = () if self.context is None else self.context.shape[:-1]
        batch = torch.broadcast_shapes(x.shape[:-1], own)
        rows = x.expand(*batch, x.shape[-1]).reshape(-1, x.shape[-1])
        return batch, rows, rows_of(self.context, batch)

    def _call(self, x: Tensor) -> Tensor:
        batch, rows, context = self._rows(x)
        return self.flow.to_reference(rows, context).reshape(*batch, -1)

    def _inverse(self, y: Tensor) -> Tensor:
        batch, rows, context = self._rows(y)
        return self.flow.from_reference(rows, context).reshape(*batch, -1)

    def log_abs_det_jacobian(self, x: Tensor, y: Tensor) -> Tensor:
        """log |det dz/dx| at x, of the shape of x without its last axis; y is not used."""
        return self.call_and_ladj(x)[1]

    def call_and_ladj(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """z and log |det dz/dx| in one solve, as zuko names it."""
        batch, rows, context = self._rows(x)
        z, log_det = self.flow.to_reference_with_log_det(rows, context)
        return z.reshape(*batch, -1), log_det.reshape(batch)


def rows_of(context: Tensor | None, batch: Shape) -> Tensor | None:
    """A context for each entry of a batch shape, (rows, context_dim)."""
    if context is None:
        return None
    return context.expand(*batch, context.shape[-1]).reshape(-1, context.shape[-1])


class _Open(constraints.Constraint):
    """lower < x < upper in each column, for infinite bounds too."""

    def __init__(self, lower: Tensor, upper: Tensor) -> None:
        self.lower_bound, self.upper_bound = lower, upper
        super().__init__()

    def check(self, value: Tensor) -> Tensor:
        return (value > self.lower_bound) & (value < self.upper_bound)
