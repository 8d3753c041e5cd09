"""Densities that a user gives as distributions, as flows, or by samples."""

import copy
from typing import TypeAlias

import torch
from torch import Generator, Tensor
from torch.distributions import (
    Categorical,
    Distribution,
    Independent,
    MixtureSameFamily,
    Normal,
)

from ..errors import ArgumentError, DataError, ShapeError
from ..flows import Flow

Given: TypeAlias = Distribution | Flow | Tensor

LEAST_SAMPLES = 10


class Density:
    """A density with exact log-densities and samples from a generator.

    Args:
        given: a `torch.distributions` distribution of vectors, a trained flow without context, or
            samples (rows, dim), which become a Gaussian kernel density.
        name: of the argument, in errors.

    Raises:
        ArgumentError: `given` is none of these.
        ShapeError, DataError: the samples are too few, not finite or constant.
    """

    def __init__(self, given: Given, name: str) -> None:
        if isinstance(given, Tensor):
            given = _kernel_density(given, name)
        if isinstance(given, Flow):
            if given.context_dim:
                raise ArgumentError(f"`{name}` must be a flow without context")
            given = copy.deepcopy(given).double()()
        if not isinstance(given, Distribution) or len(given.event_shape) != 1 or given.batch_shape:
            what = type(given).__name__
            if isinstance(given, Distribution):
                what += f" of {tuple(given.batch_shape)} events {tuple(given.event_shape)}"
            raise ArgumentError(
                f"`{name}` must be one distribution of vectors, a flow, or samples (rows, dim), "
                f"got {what}"
            )
        self.distribution, self.dim = _doubled(given), given.event_shape[0]
        self.dtype = self.sample(1, torch.Generator().manual_seed(0)).dtype

    def log_prob(self, x: Tensor) -> Tensor:
        """Of the rows of `x` (batch, dim), in its precision, (batch,)."""
        return self.distribution.log_prob(x.to(self.dtype)).to(x)

    def sample(self, count: int, generator: Generator) -> Tensor:
        """(count, dim). Distributions draw from the global generator, which is left as it was."""
        seed = int(torch.randint(2**62, (), generator=generator))
        with torch.random.fork_rng(devices=()), torch.no_grad():
            torch.manual_seed(seed)
            return self.distribution.sample((count,))


def _doubled(given: Distribution) -> Distribution:
    """A copy in double precision, in which derivatives are tested by differences."""
    found = copy.copy(given)
    for name, value in vars(given).items():
        if isinstance(value, Tensor) and value.is_floating_point():
            vars(found)[name] = value.double()
        elif isinstance(value, Distribution):
            vars(found)[name] = _doubled(value)
    return found


def _kernel_density(samples: Tensor, name: str) -> Distribution:
    """Gaussians of Scott's width around the samples."""
    if samples.ndim != 2 or len(samples) < LEAST_SAMPLES:
        raise ShapeError(
            f"`{name}` must have at least {LEAST_SAMPLES} samples (rows, dim), got "
            f"{tuple(samples.shape)}"
        )
    x = samples.double()
    if not bool(torch.isfinite(x).all()):
        raise DataError(f"the samples of `{name}` must be finite")
    scale = x.std(0) * len(x) ** (-1 / (x.shape[1] + 4))
    if not bool((scale > 0).all()):
        raise DataError(f"column {int((scale == 0).nonzero()[0])} of `{name}` is constant")
    parts = Independent(Normal(x, scale.expand_as(x)), 1)
    return MixtureSameFamily(Categorical(logits=torch.zeros(len(x), dtype=x.dtype)), parts)
