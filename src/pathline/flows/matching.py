"""Flow matching: a second objective for every flow, without solving an equation in training."""

from typing import Any

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from ..errors import ArgumentError
from ..train import Loss, Objective, Rows, step_generator
from .flow import Flow

PAIRS = ("independent", "optimal")
BLOCK = 128  # rows; the time of an assignment grows with the third power


class FlowMatching(Objective):
    """E |v(t, (1-t) y + t e) - (e - y)|^2 over data y, noise e ~ N(0, I) and times t in [0, 1].

    Its minimiser moves the data to N(0, I) as the likelihood's does, and a step costs one
    evaluation of the velocity. The best weights are chosen by the exact likelihood.

    Args:
        flow: any flow of this package.
        pairs: "independent", or "optimal": in blocks of 128 rows the noise is assigned to the
            rows with the least sum of squared distances, which makes the paths straighter.

    Source: Lipman et al., Flow matching, ICLR 2023 (arXiv 2210.02747); Tong et al., 2024
    (2302.00482) and Pooladian et al., 2023 (2304.14772) for optimal pairs.

    Example:
        >>> import pathline as pl
        >>> flow = pl.flows.CNF(2)
        >>> objective = FlowMatching(flow, pairs="optimal")
        >>> run = pl.fit(objective, torch.randn(1000, 2), max_steps=10, progress=False)
    """

    model: Flow

    def __init__(self, flow: Flow, pairs: str = "independent") -> None:
        super().__init__()
        if pairs not in PAIRS:
            raise ArgumentError(f"`pairs` must be one of {', '.join(PAIRS)}, got {pairs!r}")
        self.model, self.pairs = flow, pairs
        self.seed, self.draws = 0, 0

    def settings(self) -> dict[str, Any]:
        return {"pairs": self.pairs}

    def forward(self, batch: Tensor, weights: Tensor | None = None) -> Loss:
        flow = self.model
        y, features, _ = flow.coordinates(*flow.split(batch))
        self.draws += 1
        draws = step_generator(self.seed, self.draws)
        noise = flow.cast(torch.from_numpy(draws.standard_normal(y.shape)))
        # One time in each of as many intervals as rows: less variance than independent ones.
        times = (draws.permutation(len(y)) + draws.random(len(y))) / max(len(y), 1)
        t = flow.cast(torch.from_numpy(times))
        if self.pairs == "optimal":
            blocks = zip(y.split(BLOCK), noise.split(BLOCK), strict=True)
            noise = torch.cat([assign(*pair) for pair in blocks])
        z = y + t[:, None] * (noise - y)
        error = (flow.velocity(t, z, features) - (noise - y)).square().sum(1)
        share = flow.cast(y.new_ones(len(y)) if weights is None else weights) / max(len(y), 1)
        total = error @ share
        return Loss(total, {"matching": total.detach()})

    @torch.no_grad()
    def validate(self, batch: Tensor) -> Tensor:
        """Negative log-likelihood in the user's units, (rows,)."""
        return -self.model.log_prob(*self.model.split(batch))

    def check(self, rows: Rows) -> None:
        self.model.check_rows(rows)

    def threads(self, rows: int) -> int | None:
        widest = max(p.shape[0] for p in self.model.parameters() if p.ndim)
        return 1 if rows * widest * self.model.dim < 2**19 else None

    def prepare(self, rows: Rows, generator: torch.Generator) -> None:
        self.model.prepare(rows, generator)
        self.seed = int(torch.randint(2**62, (), generator=generator))

    def finish(self, rows: Rows) -> dict[str, Any]:
        x, _ = rows.take(slice(0, 2000))
        self.model.choose_steps(*self.model.split(x.to(self.model.standardize.mean.device)))
        return {"time_steps": self.model.steps}

    def inner_weights(self) -> list[Tensor]:
        return self.model.objective().inner_weights()

    def default_steps(self, rows: int) -> int:
        return 5000

    def state(self) -> dict[str, Any]:
        return {"seed": self.seed, "draws": self.draws}

    def restore(self, state: dict[str, Any]) -> None:
        self.seed, self.draws = state["seed"], state["draws"]


def assign(y: Tensor, noise: Tensor) -> Tensor:
    """The rows of `noise` (batch, dim) in the order that brings them closest to those of `y`."""
    distance = torch.cdist(y, noise).square().cpu().numpy()
    return noise[torch.from_numpy(linear_sum_assignment(distance)[1]).to(noise.device)]
