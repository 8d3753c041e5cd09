"""Can the forecasts of a `TrajectoryNet` be trusted? Errors and intervals against observations."""

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch

from ..data.series import Series
from .forecasts import quantile
from .trajectory import CHUNK, TrajectoryNet
from .trajectory_fit import FAR, TrajectoryFit

LEVEL = 0.9
COVERED = 0.8  # of the intervals of that level, at least
MOST = 2_000  # windows
BINS = 12  # of leads


@dataclass(frozen=True)
class TrajectoryCheck:
    """Forecasts from many starts against what was observed after them."""

    windows: int
    observations: int
    longest_lead: float
    columns: dict[str, dict[str, float]]  # rmse, persistence (both in its units), coverage
    rmse: float  # of all columns, in their standard deviations
    persistence: float  # the same of the last value
    coverage: float  # share of observations in intervals of 90 %
    log_prob: float  # mean log-density of a value, nats, in the user's units
    leads: list[float]  # middles of bins
    rmse_by_lead: list[float]
    persistence_by_lead: list[float]
    coverage_by_lead: list[float]
    passed: bool
    verdict: str

    def to_dict(self) -> dict[str, Any]:
        """A JSON-safe copy."""
        return asdict(self)


@torch.no_grad()
def check_trajectories(
    net: TrajectoryNet, series: Series, rows: np.ndarray | None = None
) -> TrajectoryCheck:
    """Forecast from observations of series to those after them, as far as errors are remembered.

    Args:
        net: the model.
        series: what was observed.
        rows: windows (first row, last row); all of the series by default. At most 2000 are used.

    Returns:
        What was found. It passes if the error is below that of the last value, and at least 80 %
        of the observations lie in the intervals of 90 %.
    """
    if rows is None:
        pairs = [(i, part.stop - 1) for part in series.parts() for i in range(*_inner(part))]
        rows = np.array(pairs, dtype=np.float64)
    if len(rows) > MOST:
        rows = rows[np.linspace(0, len(rows) - 1, MOST).astype(int)]
    net = net.double()
    objective = TrajectoryFit(net, series)
    y = torch.tensor(series.y)
    last = objective.observed.z.double() * net.scale + net.center  # gaps filled
    found = []
    for batch in torch.tensor(rows).split(CHUNK):
        start, lead, wanted, there = objective.targets(batch, int(FAR * net.window), FAR)
        mean, sd = net.forecast(objective.observed, start, lead)
        still = last[start][:, None].expand_as(mean)
        some = there.any(2)
        parts = (lead[..., None].expand_as(mean), y[wanted], mean, sd, still, there)
        found.append([x[some] for x in parts])
    leads, truth, means, sds, stills, mask = (
        torch.cat(x).numpy() for x in zip(*found, strict=True)
    )
    ahead, scale = leads[:, 0], net.scale.numpy()
    truth = np.where(mask, truth, 0.0)
    error = np.where(mask, means - truth, np.nan)
    lazy = np.where(mask, stills - truth, np.nan)
    inside = np.where(mask, np.abs(error) <= quantile(LEVEL) * sds, np.nan)
    density = -0.5 * ((error / sds) ** 2 + np.log(2 * np.pi * sds**2))
    columns = {
        name: {
            "rmse": _rms(error[:, i]),
            "persistence": _rms(lazy[:, i]),
            "coverage": float(np.nanmean(inside[:, i])) if mask[:, i].any() else np.nan,
        }
        for i, name in enumerate(series.columns)
    }
    edges = np.unique(np.quantile(ahead, np.linspace(0, 1, BINS + 1)))
    bins = np.searchsorted(edges[1:-1], ahead)
    used = [bins == i for i in np.unique(bins)]
    rmse, persistence = _rms(error / scale), _rms(lazy / scale)
    coverage = float(np.nanmean(inside))
    passed = rmse < persistence and coverage >= COVERED
    return TrajectoryCheck(
        windows=len(rows),
        observations=len(ahead),
        longest_lead=float(ahead.max()),
        columns=columns,
        rmse=rmse,
        persistence=persistence,
        coverage=coverage,
        log_prob=float(np.nanmean(density)),
        leads=[float(ahead[part].mean()) for part in used],
        rmse_by_lead=[_rms(error[part] / scale) for part in used],
        persistence_by_lead=[_rms(lazy[part] / scale) for part in used],
        coverage_by_lead=[float(np.nanmean(inside[part])) for part in used],
        passed=passed,
        verdict=_verdict(rmse, persistence, coverage, passed),
    )


def _inner(part: slice) -> tuple[int, int]:
    return part.start, part.stop - 1


def _rms(values: np.ndarray) -> float:
    return float(np.sqrt(np.nanmean(values**2))) if np.isfinite(values).any() else np.nan


def _verdict(rmse: float, persistence: float, coverage: float, passed: bool) -> str:
    ratio = rmse / persistence if persistence else np.inf
    told = (
        f"forecasts are off by {rmse:.3g} standard deviations, {ratio:.2f} times as far as the "
        f"last value; {coverage:.0%} of the observations lie in the intervals of {LEVEL:.0%}"
    )
    return f"{'passed' if passed else 'not to be trusted'}: {told}"
