"""Training a `TrajectoryNet`: squared errors over windows."""

from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..data.series import Series
from ..errors import DataError
from ..train import Loss, Objective, Rows, Run, fit
from ..train.trainer import CHECKPOINT
from .forecasts import keep_series
from .trajectory import CHUNK, Observations, TrajectoryNet, windows

LONGEST = 2.0  # leads in training, over the time of a usual window
FAR = 8.0  # leads of which errors are remembered
SMALL = 2**24  # windows times weights: a step below has no use for more than one thread


class Targets(NamedTuple):
    """What windows should pass."""

    start: Tensor  # (windows,), rows
    lead: Tensor  # (windows, count), times after the first
    rows: Tensor  # (windows, count)
    there: Tensor  # (windows, count, dim), which values count


class TrajectoryFit(Objective):
    """The squared error of the observations in windows, standardised: `fit(TrajectoryFit(net,
    series), train, validation=held)` with the windows of `networks.windows(series)`.

    A window has up to `net.window` observations after its first, and none later than twice the
    time that so many usually take. The errors on held-out windows, up to eight times as long, give
    the network the width of its intervals in the end.

    Args:
        net: what is trained; it must have the scale of the series, see `standardize`.
        series: the observations.
        out: the run folder that `fit` is given, if any; it has the series from the first step on,
            so that even a run that is killed can forecast.
    """

    model: TrajectoryNet

    def __init__(
        self, net: TrajectoryNet, series: Series, *, out: str | Path | None = None
    ) -> None:
        super().__init__()
        self.model, self.series, self.out = net, series, out
        self.observed = net.observe(series)

    def forward(self, batch: Tensor, weights: Tensor | None = None) -> Loss:
        each = self._losses(batch)
        total = (each if weights is None else each * weights.to(each)).mean()
        return Loss(total, {})

    @torch.no_grad()
    def validate(self, batch: Tensor) -> Tensor:
        return torch.cat([self._losses(part) for part in batch.split(CHUNK)])

    def check(self, rows: Rows) -> None:
        windows = rows.take(slice(None))[0]
        if not bool(self.targets(windows, self.model.window, LONGEST).there.any()):
            raise DataError(
                "no observation follows another within "
                f"{LONGEST * float(self.model.unit):.3g}, twice the time of a usual window; take a "
                "larger `window`"
            )

    def prepare(self, rows: Rows, generator: torch.Generator) -> None:
        if self.out is not None:
            keep_series(Path(self.out, CHECKPOINT).parent, self.series)

    def finish(self, rows: Rows) -> dict[str, Any]:
        """Remembers the errors of held-out windows; their root mean square, standardised."""
        parts: list[tuple[Tensor, ...]] = []
        most = int(FAR * self.model.window)
        for batch in rows.take(slice(None))[0].split(CHUNK):
            start, lead, wanted, there = self.targets(batch, most, FAR)
            with torch.no_grad():
                found = self.model(self.observed, start, lead).double()
            z = self.observed.z.double()
            some = there.any(2)
            error = (found.mean(2) - z[wanted]).square()
            still = (z[start][:, None] - z[wanted]).square()
            excess = error - found.var(2, correction=0)
            parts.append(tuple(x[some] for x in (lead, error, still, excess, there)))
        lead, error, still, excess, there = map(torch.cat, zip(*parts, strict=True))
        if not len(lead):
            return {}
        self.model.remember_errors(lead / self.model.unit.double(), excess, there)
        return {
            "rmse": error[there].mean().sqrt().item(),
            "rmse_of_persistence": still[there].mean().sqrt().item(),
            "longest_lead": float(lead.max()),
        }

    def threads(self, rows: int) -> int | None:
        count = sum(p.numel() for p in self.model.parameters())
        return 1 if rows * count < SMALL else None

    def default_steps(self, rows: int) -> int:
        return 1000

    def default_rate(self, steps: int) -> float:
        return 0.01

    def _losses(self, batch: Tensor) -> Tensor:
        """(windows,): the mean over members of squared errors, over all that a window may have."""
        start, lead, rows, there = self.targets(batch, self.model.window, LONGEST)
        found = self.model(self.observed, start, lead)
        errors = (found - self.observed.z[rows][:, :, None]).square().mean(2)
        return torch.where(there, errors, 0.0).sum((1, 2)) / (self.model.window * self.model.dim)

    def targets(self, batch: Tensor, count: int, longest: float) -> Targets:
        """Up to `count` observations after the first, as many as are not later than `longest`."""
        if self.observed.t.device != batch.device:
            self.observed = Observations(*(x.to(batch.device) for x in self.observed))
        t, seen = self.observed.t, self.observed.seen
        start, last = batch.long().unbind(1)
        wanted = start[:, None] + torch.arange(1, count + 1, device=batch.device)
        rows = wanted.minimum(last[:, None])
        lead, limit = t[rows] - t[start][:, None], longest * float(self.model.unit)
        inside = (wanted <= last[:, None]) & (lead <= limit * (1 + 1e-9))
        return Targets(start, lead.clamp(max=limit), rows, seen[rows] & inside[:, :, None])


def fit_trajectories(net: TrajectoryNet, series: Series, *, seed: int = 0, **training: Any) -> Run:
    """Give the network the scale of the series, and train it on their windows.

    Args:
        net: changed in place; in the end it has the best weights.
        series: the observations.
        seed: of what is held out, and of the batches.
        training: further arguments of `pathline.fit`.

    Raises:
        DataError: there are too few observations.
        TrainingError: training diverged again and again.
    """
    train, held = windows(series, seed)
    net.standardize(series)
    objective = TrajectoryFit(net, series, out=training.get("out"))
    return fit(objective, train, validation=held, seed=seed, **training)
