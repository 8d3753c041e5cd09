"""Stochastic Lotka-Volterra: predators X and prey Y as a Markov jump process, in nine summaries.

The four reactions and their rates are X -> X + 1: theta_1 X Y, X -> X - 1: theta_2 X,
Y -> Y + 1: theta_3 Y, Y -> Y - 1: theta_4 X Y. The parameters are the logarithms of theta.
"""

import numpy as np

from .priors import Uniform
from .simulator import Simulator

START = (50, 100)
TIMES = 0.2 * np.arange(150)
MAX_EVENTS = 10_000
ROWS = 2000  # simulated at a time: few enough for the cache, enough to make each operation worth it


def jump_paths(
    rates: np.ndarray,
    generator: np.random.Generator,
    *,
    start: tuple[int, int] = START,
    times: np.ndarray = TIMES,
    max_events: int = MAX_EVENTS,
) -> np.ndarray:
    """Exact paths of the process, by Gillespie's direct method, one for each row of `rates`.

    Args:
        rates: theta_1 to theta_4, not logarithms, (n, 4).
        generator: the source of randomness.
        start: numbers of predators and prey at times[0].
        times: (times,), increasing.
        max_events: a path with more events, counting the first one after the last time, is NaN.

    Returns:
        (n, times, 2): X and Y as they are at each time.

    Source: Gillespie, Exact stochastic simulation of coupled chemical reactions, J. Phys. Chem.
    81, 1977.
    """
    paths = np.full((len(rates), len(times), 2), np.nan)
    for first in range(0, len(rates), ROWS):
        rows = slice(first, first + ROWS)
        _fill(paths[rows], rates[rows], generator, start, times, max_events)
    paths[np.isnan(paths[:, -1, 0])] = np.nan
    return paths


def _fill(
    paths: np.ndarray,
    rates: np.ndarray,
    generator: np.random.Generator,
    start: tuple[int, int],
    times: np.ndarray,
    max_events: int,
) -> None:
    """Writes the paths (n, times, 2) of some rows, which all advance by one event at a time."""
    row = np.arange(len(rates))  # of the paths that have not ended
    rate = np.ascontiguousarray(rates.T)  # (4, n)
    X, Y = np.full(len(rates), float(start[0])), np.full(len(rates), float(start[1]))
    time = np.full(len(rates), times[0])
    following = np.zeros(len(rates), dtype=int)  # the index of the next time to be written
    wanted = np.append(times, np.inf)
    target = wanted[following]
    ended = 0
    for _ in range(max_events):
        XY = X * Y
        sums = rate * (XY, X, Y, XY)
        np.cumsum(sums, axis=0, out=sums)
        with np.errstate(divide="ignore"):  # where nothing can happen any more: for ever
            time += generator.standard_exponential(len(row)) / sums[3]
        passed = np.flatnonzero(time > target)
        while len(passed):
            paths[row[passed], following[passed], 0] = X[passed]
            paths[row[passed], following[passed], 1] = Y[passed]
            following[passed] += 1
            target[passed] = wanted[following[passed]]
            ended += int(np.count_nonzero(following[passed] == len(times)))
            passed = passed[time[passed] > target[passed]]
        if ended == len(row):
            return
        if 4 * ended > len(row):  # go on without them
            going = following < len(times)
            row, rate, sums = row[going], np.ascontiguousarray(rate[:, going]), sums[:, going]
            X, Y, time = X[going], Y[going], time[going]
            following, target, ended = following[going], target[going], 0
        # Nested: X grows below sums[0], falls below sums[1]; Y grows below sums[2], else it falls.
        below = generator.random(len(row)) * sums[3] < sums[:3]
        X += 2.0 * below[0] - below[1]
        Y += 2.0 * below[2] - below[1] - 1.0


def summaries(paths: np.ndarray) -> np.ndarray:
    """The means of X and Y, log(1 + variance) of both, the autocorrelations of X at lags 1 and 2
    (sums divided by times - 1), those of Y, and the correlation of X and Y.

    Args:
        paths: (n, times, 2).

    Returns:
        (n, 9), NaN for a path that is NaN or constant.
    """
    times = paths.shape[1]
    mean, deviation = paths.mean(1), paths.std(1)  # (n, 2)
    with np.errstate(divide="ignore", invalid="ignore"):
        z = (paths - mean[:, None]) / deviation[:, None]
    one = (z[:, :-1] * z[:, 1:]).sum(1) / (times - 1)
    two = (z[:, :-2] * z[:, 2:]).sum(1) / (times - 1)
    correlation = (z[:, :, 0] * z[:, :, 1]).mean(1)
    return np.column_stack(
        (mean, np.log1p(deviation**2), one[:, 0], two[:, 0], one[:, 1], two[:, 1], correlation)
    )


def simulate(theta: np.ndarray, generator: np.random.Generator) -> np.ndarray:
    return np.concatenate(
        [
            summaries(jump_paths(np.exp(theta[first : first + ROWS]), generator))
            for first in range(0, len(theta), ROWS)
        ]
        or [np.empty((0, 9))]
    )


STOCHASTIC_LOTKA_VOLTERRA = Simulator(
    name="stochastic_lotka_volterra",
    parameters=tuple(f"log_theta_{i + 1}" for i in range(4)),
    context_dim=9,
    prior=Uniform(-5.0, 2.0, 4),
    model=simulate,
    source="Wang et al., Efficient neural network approaches for conditional optimal transport, "
    "2023, arXiv 2310.16975; Papamakarios, Murray, Fast epsilon-free inference, 2016",
)
