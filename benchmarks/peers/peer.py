"""What `training_curves.py` needs of a flow to train and to evaluate it."""

from collections.abc import Callable

from torch import Tensor, nn

MOST_EVALUATIONS = 5000  # of the velocity in one solve; a diverging flow would need any number


class Diverged(Exception):
    """The flow can't be trained or evaluated any further."""


class Peer(nn.Module):
    """A density model in standardised units (in the data's own units where `raw` has its name)."""

    batch = 512  # rows of a step
    sample_every = 1  # steps with the same batch
    cosine = False  # anneal to 1 % over the budget, or keep the learning rate
    raw: tuple[str, ...] = ()
    rates: tuple[float, ...] = (1e-3, 3e-3, 1e-2)  # the learning rates to choose from
    on_training_grid: Callable[[Tensor], Tensor] | None = (
        None  # `exact`, where there is a fixed one
    )

    def loss(self, y: Tensor) -> Tensor:
        """The scalar to minimise, of a batch (batch, dim)."""
        raise NotImplementedError

    def validate(self, y: Tensor) -> Tensor:
        """Negative log-likelihood (batch,) by which the best weights are chosen."""
        raise NotImplementedError

    def exact(self, y: Tensor) -> Tensor:
        """Negative log-likelihood (batch,) for the curve, called on a copy in double precision."""
        raise NotImplementedError

    def rate(self, first: float, step: int) -> float:
        """The learning rate of a step, before the cosine."""
        return first


class Counted:
    """Counts calls of a network, and stops a solve that needs too many."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, *_: object) -> None:
        self.calls += 1
        if self.calls > MOST_EVALUATIONS:
            raise Diverged(f"a solve needs more than {MOST_EVALUATIONS} evaluations")
