"""What a flow of the family minimises."""

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..train import Loss, Rows
from .objective import FlowObjective

if TYPE_CHECKING:
    from .cnf import CNF


class CNFObjective(FlowObjective):
    """J = E[C + a_L L + a_R R + a_K K], in standardised units, with the trace of the flow.

    With fixed steps a finer grid judges, as in `FlowObjective`; adaptive methods keep their
    tolerance. Whatever judges has the exact trace.
    """

    model: "CNF"  # type: ignore[assignment]

    def forward(self, batch: Tensor, weights: Tensor | None = None) -> Loss:
        flow = self.model
        y, features, _ = flow.coordinates(*flow.split(batch))
        share = flow.cast(y.new_ones(len(y)) if weights is None else weights) / max(len(y), 1)
        signs = self._signs(flow.signs, *y.shape) if flow.signs else None
        charged = {"transport": flow.transport, "hjb": self.hjb, "jacobian": flow.jacobian}
        charged = {name: weight for name, weight in charged.items() if weight}
        found = flow.solve(y, features, steps=self.steps, signs=signs, wanted=("log_det", *charged))
        assert found.log_det is not None
        nll = ((-flow.reference_log_prob(found.z) - found.log_det) * share).sum()
        terms = {name: (getattr(found, name) * share).sum() for name in charged}
        total = nll + sum(weight * terms[name] for name, weight in charged.items())
        return Loss(total, {"nll": nll.detach()} | {k: v.detach() for k, v in terms.items()})

    def _terms(
        self, y: Tensor, features: Tensor | None, steps: int, **training: Any
    ) -> tuple[Tensor, Tensor, Tensor]:
        """C and L of each row of standardised data; R is not judged."""
        flow = self.model
        found = flow.solve(y, features, steps=steps)
        assert found.log_det is not None and found.transport is not None
        C = -flow.reference_log_prob(found.z) - found.log_det
        return C, found.transport, torch.zeros_like(C)

    def adapt(self, batch: Tensor) -> str | None:
        return None if self.model.adaptive else super().adapt(batch)

    def threads(self, rows: int) -> int | None:
        widest = max(p.shape[0] for p in self.model.parameters())
        return 1 if rows * widest * self.model.dim < 2**19 else None

    def choices(self) -> dict[str, Any]:
        return {"trace": self.model.trace, "engine": "PyTorch"}

    def prepare(self, rows: Rows, generator: torch.Generator) -> None:
        self.model.prepare(rows, generator)
        if self.model.signs:
            self.probe_seed = int(torch.randint(2**62, (), generator=generator))

    def finish(self, rows: Rows) -> dict[str, Any]:
        found = super().finish(rows)
        return {"tolerance": self.model.rtol} if self.model.adaptive else found

    def inner_weights(self) -> list[Tensor]:
        find = getattr(self.model.network, "inner_weights", list)
        return find()

    def default_rate(self, steps: int) -> float:
        return 0.03 * min(1.0, (2000 / steps) ** 0.5)
