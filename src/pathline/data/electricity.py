"""Household electricity: 6 columns with sharp edges and several modes."""

import numpy as np

from .splits import Splits, shipped


def load_electricity() -> Splits:
    """Two weeks of minutes of one household: active power (kW), voltage (V), three sub-meterings
    (Wh), and the minute of the day, in 15,556 / 1,944 / 1,944 rows.

    The columns and the noise on the first five, which have few digits, are those of POWER in
    Papamakarios, Pavlakou, Murray, Masked Autoregressive Flow, 2017; but these are two weeks
    instead of four years, so likelihoods are not comparable with published ones. It comes with
    the package; `tools/make_electricity.py` made it.
    """
    with shipped("electricity.npz").open("rb") as file, np.load(file, allow_pickle=False) as data:
        train, validation, test = (
            data[part].astype(np.float64, order="C") for part in ("train", "validation", "test")
        )
        columns, source = tuple(data["columns"].tolist()), str(data["source"])
    return Splits("electricity", train, validation, test, columns, source)
