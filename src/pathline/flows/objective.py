"""The OT-Flow objective, and the controller that keeps its time grid honest."""

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..control import rollout
from ..train import Loss, Objective, Rows

if TYPE_CHECKING:
    from .otflow import OTFlow

MAX_STEPS = 16
TOLERANCE = 0.005  # nats between the two grids


class FlowObjective(Objective):
    """J = E[C + w L + rho R]: likelihood, transport cost and HJB residual, in standardised units.

    With few fixed steps an optimiser can drive the discretised likelihood below the truth, by
    folds that the time grid does not see. So a finer grid judges: `validate` uses 2 nt + 1
    steps where training uses nt, and `adapt` raises nt and rho while the two disagree.

    Source: Onken et al., OT-Flow (arXiv 2006.00104), equation (8), divided by their alpha_C.
    """

    model: "OTFlow"

    def __init__(self, flow: "OTFlow") -> None:
        super().__init__()
        self.model = flow
        self.steps, self.least_steps = flow.train_steps, flow.train_steps
        self.hjb, self.least_hjb = flow.hjb, flow.hjb

    def forward(self, batch: Tensor, weights: Tensor | None = None) -> Loss:
        y, _ = self.model.standardize(batch)
        C, L, R = self._terms(y, self.steps)
        J = C + self.model.transport * L + self.hjb * R
        means = [v.mean() if weights is None else (v * weights.to(v)).mean() for v in (J, C, L, R)]
        terms = dict(zip(("nll", "transport", "hjb"), (m.detach() for m in means[1:]), strict=True))
        return Loss(means[0], terms)

    def _terms(self, y: Tensor, steps: int) -> tuple[Tensor, Tensor, Tensor]:
        """C, L and R of each row of standardised data."""
        flow = self.model
        path = rollout(flow.problem, flow.potential, flow.cast(y), steps=steps)
        assert not (path.log_det is None or path.running_cost is None or path.hjb is None)
        C = flow.problem.terminal_cost(path.z) - path.log_det
        return C, path.running_cost, path.hjb

    @torch.no_grad()
    def judge(self, batch: Tensor, steps: int) -> Tensor:
        """C + w L of each row, on `steps` time steps; R only keeps the solution well-behaved."""
        y, _ = self.model.standardize(batch)
        terms = [self._terms(chunk, steps) for chunk in y.split(self.model.chunk_rows())]
        return torch.cat([C + self.model.transport * L for C, L, _ in terms])

    def validate(self, batch: Tensor) -> Tensor:
        return self.judge(batch, 2 * self.steps + 1)

    def check(self, rows: Rows) -> None:
        self.model.check_rows(rows)

    def threads(self, rows: int) -> int | None:
        small = rows * self.model.potential.width * self.model.dim < 2**19
        return 1 if small else None  # the hand-over between threads would take longer

    def prepare(self, rows: Rows, generator: torch.Generator) -> None:
        self.model.prepare(rows, generator)

    def adapt(self, batch: Tensor) -> str | None:
        gap = (self.validate(batch) - self.judge(batch, self.steps)).mean().abs()
        if not gap <= TOLERANCE:
            self._refine()
        elif gap < TOLERANCE / 5 and self.steps > self.least_steps:
            self.steps -= 1
            self.hjb = max(self.hjb / 1.25, self.least_hjb)
        else:
            return None
        return f"grids differ by {gap:.4f} nats: {self.steps} time steps, HJB {self.hjb:.3g}"

    def _refine(self) -> None:
        self.steps = min(self.steps + 1, MAX_STEPS)
        self.hjb = min(1.5 * self.hjb, 1000 * self.least_hjb)

    def caution(self) -> None:
        self._refine()

    def finish(self, rows: Rows) -> dict[str, Any]:
        x, _ = rows.take(slice(0, 2000))
        self.model.choose_steps(x.to(self.model.standardize.mean.device))
        return {
            "train_time_steps": self.steps,
            "hjb_weight": self.hjb,
            "time_steps": self.model.steps,
        }

    def inner_weights(self) -> list[Tensor]:
        return self.model.potential.inner_weights()

    def default_steps(self, rows: int) -> int:
        return int(min(max(20 * rows**0.5, 200), 3000))

    def state(self) -> dict[str, Any]:
        return {"steps": self.steps, "hjb": self.hjb}

    def restore(self, state: dict[str, Any]) -> None:
        self.steps, self.hjb = state["steps"], state["hjb"]
