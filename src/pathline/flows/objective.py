"""The OT-Flow objective, and the controller that keeps its time grid honest."""

from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from .. import native
from ..control import Adjoint
from ..control.rollout import kernel_serves, rollout
from ..train import Distrust, Loss, Objective, Rows, step_generator

if TYPE_CHECKING:
    from .cnf import CNF
    from .otflow import OTFlow

MAX_STEPS = 16
TOLERANCE = 0.01  # nats between the two grids
DISTRUST = 0.1  # nats: the grid was left so fast that finer ones would not bring the model back


class FlowObjective(Objective):
    """J = E[C + w L + rho R]: likelihood, transport cost and HJB residual, in standardised units.

    With few fixed steps an optimiser can drive the discretised likelihood below the truth, by
    folds that the time grid does not see. So a finer grid judges: `validate` uses 2 nt + 1
    steps where training uses nt, and `adapt` raises nt and rho while the two disagree; where they
    disagree much, training goes back, since a fold does not unfold again.

    Where the flow trains with probes, each step draws its own; whatever judges is exact.

    Source: Onken et al., OT-Flow (arXiv 2006.00104), equation (8), divided by their alpha_C.
    """

    model: "OTFlow"

    def __init__(self, flow: "OTFlow | CNF") -> None:
        super().__init__()
        self.model = flow  # type: ignore[assignment]
        self.steps, self.least_steps = flow.train_steps, flow.train_steps
        self.hjb, self.least_hjb = flow.hjb, flow.hjb
        self.kernel_threads: int | None = None
        self.probe_seed, self.probes = 0, 0  # of all probes, and how many were drawn

    def forward(self, batch: Tensor, weights: Tensor | None = None) -> Loss:
        flow = self.model
        y, features, _ = flow.coordinates(*flow.split(batch))
        share = flow.cast(y.new_ones(len(y)) if weights is None else weights) / max(len(y), 1)
        nll, transport, hjb = (
            torch.stack(self._terms(y, features, self.steps, **self._training(share))) @ share
        )
        terms = {"nll": nll.detach(), "transport": transport.detach(), "hjb": hjb.detach()}
        return Loss(nll + flow.transport * transport + self.hjb * hjb, terms)

    def _training(self, share: Tensor) -> dict[str, Any]:
        """What a rollout may do differently because its gradient is wanted, and is known."""
        flow = self.model
        if not torch.is_grad_enabled():
            return {}
        return {
            "adjoint": Adjoint(share, flow.transport * share, -share, self.hjb * share),
            "probe": self._signs(len(share), flow.dim) if flow.train_trace == "probe" else None,
            "trace_dtype": flow.trace_dtype,
        }

    def _signs(self, *shape: int) -> Tensor:
        """The random signs of the next step, others in each process."""
        draws = step_generator(self.probe_seed, self.probes)
        self.probes += 1
        signs = 2 * draws.integers(0, 2, shape, dtype=np.int8) - 1
        return self.model.cast(torch.from_numpy(signs))

    def _terms(
        self, y: Tensor, features: Tensor | None, steps: int, **training: Any
    ) -> tuple[Tensor, Tensor, Tensor]:
        """C, L and R of each row of standardised data."""
        flow = self.model
        with native.threads(self.kernel_threads):
            path = rollout(
                flow.problem, flow.potential, y, context=features, steps=steps, **training
            )
        assert not (path.log_det is None or path.running_cost is None or path.hjb is None)
        C = flow.problem.terminal_cost(path.z) - path.log_det
        return C, path.running_cost, path.hjb

    @torch.no_grad()
    def judge(self, batch: Tensor, steps: int) -> Tensor:
        """C + w L of each row, on `steps` time steps; R only keeps the solution well-behaved."""
        flow = self.model
        chunks = [flow.coordinates(*flow.split(part)) for part in batch.split(flow.chunk_rows())]
        terms = [self._terms(y, features, steps) for y, features, _ in chunks]
        return torch.cat([C + flow.transport * L for C, L, _ in terms])

    def validate(self, batch: Tensor) -> Tensor:
        return self.judge(batch, 2 * self.steps + 1)

    def check(self, rows: Rows) -> None:
        self.model.check_rows(rows)

    def effort(self) -> float:
        return self.steps / self.least_steps

    def threads(self, rows: int) -> int | None:
        if self._kernel_serves():
            # The kernel has threads of its own; those of torch would wait busily in between.
            self.kernel_threads = torch.get_num_threads()
            return 1
        small = rows * self.model.potential.width * self.model.dim < 2**19
        return 1 if small else None  # the hand-over between threads would take longer

    def _kernel_serves(self) -> bool:
        phi = self.model.potential
        return kernel_serves(phi, self.model.problem, phi.w, None, self.model.trace_dtype)

    def choices(self) -> dict[str, Any]:
        engine = native.instruction_set() if self._kernel_serves() else "PyTorch"
        return {"trace": self.model.train_trace, "engine": engine}

    def prepare(self, rows: Rows, generator: torch.Generator) -> None:
        self.model.prepare(rows, generator)
        if self.model.train_trace == "probe":
            self.probe_seed = int(torch.randint(2**62, (), generator=generator))

    def adapt(self, batch: Tensor) -> str | None:
        gap = (self.validate(batch) - self.judge(batch, self.steps)).mean().abs()
        if gap > DISTRUST:
            raise Distrust(f"grids differ by {gap:.4f} nats")
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
        self.model.choose_steps(*self.model.split(x.to(self.model.standardize.mean.device)))
        return {
            "train_time_steps": self.steps,
            "hjb_weight": self.hjb,
            "time_steps": self.model.steps,
        }

    def inner_weights(self) -> list[Tensor]:
        return self.model.potential.inner_weights()

    def default_steps(self, rows: int) -> int:
        return int(min(max(20 * rows**0.5, 200), 3000))

    def default_rate(self, steps: int) -> float:
        # Long runs at a high rate leave the grid; deep potentials do so sooner.
        first = 0.02 if self.model.potential.depth > 2 else 0.03
        return first * min(1.0, (2000 / steps) ** 0.5)

    def state(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in ("steps", "hjb", "probe_seed", "probes")}

    def restore(self, state: dict[str, Any]) -> None:
        for name in self.state().keys() & state.keys():
            setattr(self, name, state[name])
