"""Forecasts of a `TrajectoryNet`, and the series kept beside it, to forecast from their ends."""

import json
from pathlib import Path
from statistics import NormalDist
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file

from ..data.series import Series
from ..errors import ArgumentError, DataError, ModelError, ShapeError
from ..train.files import read_tensors, write_atomically
from ..train.trainer import CHECKPOINT
from .trajectory import TrajectoryNet

FILE = "series.safetensors"  # in the folder of a model


def quantile(level: float) -> float:
    """Standard deviations to either side that hold a share `level` of a normal distribution.

    Raises:
        ArgumentError: it does not lie between 0 and 1.
    """
    if not 0 < level < 1:
        raise ArgumentError(f"`level` must lie between 0 and 1, got {level!r}")
    return NormalDist().inv_cdf((1 + level) / 2)


def solutions(
    net: TrajectoryNet, series: Series, t: Any, groups: Any = None, *, last: bool
) -> tuple[np.ndarray, np.ndarray]:
    """Mean and standard deviation, each (rows, columns), at times after the first or the last
    observation of series.

    Args:
        net: the model.
        series: what was observed.
        t, groups: times and their series, (rows,).
        last: start from the last observation.

    Raises:
        ShapeError: `t` is not (rows,).
        DataError: there is no such series, or a time lies before its start.
    """
    times = np.asarray(t, dtype=np.float64)
    if times.ndim != 1 or not len(times):
        raise ShapeError(f"`t` must be (rows,) with at least one row, got {times.shape}")
    if not np.isfinite(times).all():
        raise DataError(f"`t` must be finite, got {times[~np.isfinite(times)][0]}")
    place = series.place(groups, len(times))
    used, inverse = np.unique(place, return_inverse=True)
    start = series.starts[1:][used] - 1 if last else series.starts[:-1][used]
    lead = times - series.t[start][inverse]
    if (lead < 0).any():
        row = int(np.argmin(lead))
        raise DataError(
            f"`t` must not lie before the {'last' if last else 'first'} observation of its series, "
            f"{series.t[start][inverse[row]]:.10g}, got {times[row]:.10g}"
        )
    # As many columns as the series with the most times has.
    order = np.argsort(inverse, kind="stable")
    counts = np.bincount(inverse)
    column = np.empty(len(times), dtype=np.int64)
    column[order] = np.concatenate([np.arange(count) for count in counts])
    leads = np.zeros((len(used), counts.max()))
    leads[inverse, column] = lead
    mean, sd = net.forecast(net.observe(series), torch.tensor(start), torch.tensor(leads))
    return mean.numpy()[inverse, column], sd.numpy()[inverse, column]


def log_densities(net: TrajectoryNet, series: Series) -> np.ndarray:
    """Log-density of each observation given those before it, (rows,), in nats and the series'
    units; NaN of the first of a series, and the sum over what was observed of a row."""
    ends = np.zeros(len(series.t), dtype=bool)
    ends[series.starts[1:] - 1] = True
    start = np.flatnonzero(~ends)
    lead = torch.tensor(series.t[start + 1] - series.t[start])[:, None]
    parts = net.forecast(net.observe(series), torch.tensor(start), lead)
    mean, sd = (x[:, 0].numpy() for x in parts)
    error = (series.y[start + 1] - mean) / sd
    found = np.full(len(series.t), np.nan)
    found[start + 1] = np.nansum(-0.5 * (error**2 + np.log(2 * np.pi * sd**2)), 1)
    return found


def keep_series(folder: Path, series: Series) -> None:
    """Write the series into the folder of a model, or of the checkpoint of a run that has none yet,
    to forecast from their ends."""
    ids = series.ids.tolist()
    names = {"ids": json.dumps(ids), "columns": json.dumps(series.columns)}
    arrays = {"t": series.t, "y": series.y, "starts": series.starts}
    tensors = {name: torch.from_numpy(np.ascontiguousarray(x)) for name, x in arrays.items()}
    write_atomically(folder / FILE, lambda path: save_file(tensors, path, metadata=names))


def kept_series(model: str | Path) -> Series:
    """The series beside a model; `model` may be the run around it, or the model inside.

    Raises:
        ModelError: there are none, or damaged ones.
    """
    folder = Path(model)
    folder = folder / "model" if (folder / "model" / "model.json").exists() else folder
    begun = (folder.parent / CHECKPOINT).with_name(FILE)  # of a run that was killed
    file = begun if begun.exists() and not (folder / FILE).exists() else folder / FILE
    if not file.exists():
        raise ModelError(
            f"{file} does not exist: the model was saved without series; forecast others, by "
            "`--observe FILE` on the command line"
        )
    tensors, names = read_tensors(file)
    try:
        t, y, starts = (tensors[name].numpy() for name in ("t", "y", "starts"))
        ids = np.array(json.loads(names["ids"]))
        return Series(t, y, starts, ids, tuple(json.loads(names["columns"])))
    except (KeyError, ValueError):
        raise ModelError(f"{file} is damaged") from None
