"""What `fit` asks of the thing it trains."""

from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed
from torch import Tensor, nn

from .rows import Rows


class Loss(NamedTuple):
    """A scalar to minimise and its named terms for the log."""

    total: Tensor
    terms: dict[str, Tensor]


class Distrust(Exception):
    """Raised by `Objective.adapt` where the model has left what the objective can judge."""


def step_generator(seed: int, step: int) -> np.random.Generator:
    """Of the randomness of a training step, another in each process."""
    started = torch.distributed.is_available() and torch.distributed.is_initialized()
    rank = torch.distributed.get_rank() if started else 0
    return np.random.default_rng((seed, step, rank))


class Objective(nn.Module):
    """A module whose `forward(batch, weights) -> Loss` is trained by `fit`.

    Only `forward` and `validate` must be defined. `model` is what a run saves. The batch is
    (rows, columns) in double precision, the weights are (rows,) with mean one over the data, or
    None; losses are averages over rows, so that processes can share a batch.
    """

    model: nn.Module

    def forward(self, batch: Tensor, weights: Tensor | None = None) -> Loss:
        """The loss of a batch."""
        raise NotImplementedError

    def validate(self, batch: Tensor) -> Tensor:
        """The figure that picks the best model, for each row: (rows,), smaller is better."""
        raise NotImplementedError

    def check(self, rows: Rows) -> None:
        """Raise a `ShapeError` or a `DataError` where these rows can't be used."""

    def threads(self, rows: int) -> int | None:
        """CPU threads that a step with so many rows can use; None for all."""
        return None

    def settings(self) -> dict[str, Any]:
        """What decides the result beside model and data, such as weights of penalties: JSON-safe.

        It is kept in config.json, and a run goes on with the same alone.
        """
        return {}

    def choices(self) -> dict[str, Any]:
        """What was chosen automatically, in words, for config.json."""
        return {}

    def prepare(self, rows: Rows, generator: torch.Generator) -> None:
        """Called once with the training rows before the first step."""

    def constrain(self) -> None:
        """Called after each optimiser step: moves weights back to where they must lie."""

    def adapt(self, batch: Tensor) -> str | None:
        """Called every few dozen steps with training rows; returns what it changed, in words.

        Raises:
            Distrust: training should go back to where it was called last.
        """
        return None

    def effort(self) -> float:
        """Cost of a step as things stand, over that of the first; a budget in seconds counts it.

        Larger than one where `adapt` has made steps, validations and `finish` more expensive.
        """
        return 1.0

    def caution(self) -> None:
        """Called after a divergence or `Distrust`, when training goes on from the last good
        state."""

    def finish(self, rows: Rows) -> dict[str, Any]:
        """Called with validation rows and the best model; returns metrics.

        A budget in seconds also calls it before training, with few rows, on a copy.
        """
        return {}

    def inner_weights(self) -> list[Tensor]:
        """Square hidden matrices, trained by Muon."""
        return []

    def default_steps(self, rows: int) -> int:
        """Number of training steps when the caller names none."""
        return 1000

    def default_rate(self, steps: int) -> float:
        """First learning rate of so many steps when the caller names none."""
        return 0.03

    def state(self) -> dict[str, Any]:
        """What `adapt` may change, JSON-safe, for the checkpoint."""
        return {}

    def restore(self, state: dict[str, Any]) -> None:
        """Set what `state` gave."""
