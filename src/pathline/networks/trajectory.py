"""Neural ODEs of time series: irregular times, ragged series, missing values, an ensemble at once.

A window of a series is an initial value problem: its first observation is the state, and the
observations after it are what the solution should pass. All windows of a batch, and all members of
the ensemble, are solved together on one grid of equal steps from their starts; each window's own
times lie between its nodes, where the solution is a cubic of the same order. Training has the exact
gradient of these steps.

Source: Chen, Rubanova, Bettencourt, Duvenaud, Neural ordinary differential equations, NeurIPS 2018,
arXiv 1806.07366; Onken and Ruthotto, Discretize-Optimize vs. Optimize-Discretize for Time-Series
Regression and Continuous Normalizing Flows, 2020, arXiv 2005.13420; Dupont, Doucet, Teh, Augmented
neural ODEs, NeurIPS 2019, arXiv 1904.01681; Lakshminarayanan, Pritzel, Blundell, Simple and
scalable predictive uncertainty estimation using deep ensembles, NeurIPS 2017, arXiv 1612.01474.
"""

from collections.abc import Sequence
from itertools import pairwise
from math import ceil, pi
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from ..data.series import Series
from ..data.tables import scales
from ..errors import ArgumentError, DataError, ShapeError
from ..integrate import odeint
from ..integrate.dense import cubic

BINS = 32  # of leads, for which errors are remembered
FEWEST = 30  # held-out values in a bin
FEWEST_WINDOWS = 2  # to train with
LONGEST_GAP = 3.0  # windows of time that the network for the first state can tell apart
CHUNK = 512  # windows solved at a time where no gradient is wanted
MOST_STEPS = 100_000  # of a solution, each of which is kept: seconds, and gigabytes of many windows


class Observations(NamedTuple):
    """Series as the network sees them: standardised, gaps filled by the value before."""

    t: Tensor  # (rows,), in the user's units, double precision
    z: Tensor  # (rows, dim)
    seen: Tensor  # (rows, dim), true where a value was observed
    first: Tensor  # (rows,), the first row of the same series


class Members(nn.Module):
    """Networks with tanh of the same shape, one for each member, as products of stacked matrices.

    Args:
        members: how many.
        sizes: inputs, hidden layers, outputs.
        last: factor of the last layer's first weights.
    """

    def __init__(self, members: int, sizes: Sequence[int], last: float) -> None:
        super().__init__()
        self.weights, self.biases = nn.ParameterList(), nn.ParameterList()
        for i, (inputs, outputs) in enumerate(pairwise(sizes)):
            bound = inputs**-0.5 * (last if i == len(sizes) - 2 else 1.0)
            self.weights.append(torch.empty(members, inputs, outputs).uniform_(-bound, bound))
            self.biases.append(torch.empty(members, 1, outputs).uniform_(-bound, bound))

    def forward(self, x: Tensor) -> Tensor:
        """(members, batch, outputs) of (members, batch, inputs)."""
        for i, (weight, bias) in enumerate(zip(self.weights, self.biases, strict=True)):
            x = torch.baddbmm(bias, x if i == 0 else torch.tanh(x), weight)
        return x


class TrajectoryNet(nn.Module):
    """An ensemble of neural ODEs z' = v(z), whose first `dim` components are what is observed.

    v is a network with tanh, so it is bounded and no forecast runs away in finite time. It does not
    see the time itself, but cosine and sine of known periods. The first state is the observation
    that a window begins with. With `history`, a second network corrects it, and chooses the `extra`
    components, by what was observed before; otherwise those begin at zero.

    Args:
        dim: columns that are observed.
        extra: components of the state that are not.
        history: observations before the first that choose the first state.
        periods: known periods of the velocity, such as a day, in the units of time.
        width, depth: neurons and hidden layers of both networks.
        members: of the ensemble.
        window: observations after its first that a window of training has.
        steps: of the classical Runge-Kutta method over a usual window; as many as it has
            observations if None, fewer where these are denser than the motion needs.
        seed: of the first weights.

    Raises:
        ArgumentError: a number is out of range.
    """

    center: Tensor
    scale: Tensor
    unit: Tensor
    leads: Tensor
    errors: Tensor

    def __init__(
        self,
        dim: int,
        *,
        extra: int = 0,
        history: int = 0,
        periods: Sequence[float] = (),
        width: int = 64,
        depth: int = 2,
        members: int = 5,
        window: int = 10,
        steps: int | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__()
        least = {"dim": 1, "extra": 0, "history": 0, "width": 1, "depth": 1, "members": 1}
        given = {"dim": dim, "extra": extra, "history": history, "width": width, "depth": depth}
        steps = window if steps is None else steps
        given |= {"members": members, "window": window, "steps": steps, "seed": seed}
        for name, value in given.items():
            low = least.get(name, 0 if name == "seed" else 1)
            if not isinstance(value, int) or value < low:
                raise ArgumentError(f"`{name}` must be an integer of at least {low}, got {value!r}")
        self.periods = _positive(periods)
        self.given, self.dim, self.extra, self.history = given, dim, extra, history
        self.members, self.window, self.steps = members, window, steps
        state, hidden = dim + extra, [width] * depth
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.velocity = Members(members, [state + 2 * len(self.periods), *hidden, state], 0.1)
            inputs = 2 * dim + history * (2 * dim + 1)
            self.opening = Members(members, [inputs, *hidden, state], 0.01) if history else None
        double = torch.float64
        self.register_buffer("center", torch.zeros(dim, dtype=double))
        self.register_buffer("scale", torch.ones(dim, dtype=double))
        self.register_buffer("unit", torch.ones((), dtype=double))  # time of a usual window
        self.register_buffer("leads", torch.linspace(0, 1, BINS, dtype=double))  # in units
        self.register_buffer("errors", torch.zeros(BINS, dim, dtype=double))  # variances

    def config(self) -> dict[str, Any]:
        """What makes this network again, as `pathline.save` and a run keep it."""
        return self.given | {"periods": list(self.periods)}

    def standardize(self, series: Series) -> None:
        """Take mean and spread of each column, and the time of a usual window, from `series`."""
        self._check_columns(series)
        center, spread = np.nanmean(series.y, 0), np.nanstd(series.y, 0)
        self.center.copy_(torch.from_numpy(center))
        self.scale.copy_(torch.from_numpy(scales(series.y, spread)))
        self.unit.fill_(self.window * float(np.median(series.gaps())))

    def observe(self, series: Series) -> Observations:
        """The series in the network's units, and what it knows at each observation."""
        self._check_columns(series)
        seen = ~np.isnan(series.y)
        z = (series.y - self.center.cpu().numpy()) / self.scale.cpu().numpy()
        first = np.zeros(len(z), dtype=np.int64)
        rows = np.arange(len(z))[:, None]
        last = np.where(seen, rows, -1)  # the row where each column was observed last
        for part in series.parts():
            first[part] = part.start
            last[part] = np.maximum.accumulate(last[part], 0)
        filled = np.where(last >= 0, np.take_along_axis(z, np.maximum(last, 0), 0), 0.0)
        like = next(self.parameters())
        return Observations(
            torch.tensor(series.t, device=like.device),
            torch.tensor(filled).to(like),
            torch.tensor(seen, device=like.device),
            torch.tensor(first, device=like.device),
        )

    def forward(self, observed: Observations, start: Tensor, lead: Tensor) -> Tensor:
        """Solutions from observations on.

        Args:
            observed: the series.
            start: rows of `observed` to begin at, (batch,).
            lead: times after these, not negative, (batch, times), in the user's units.

        Returns:
            (batch, times, members, dim), standardised.

        Raises:
            DataError: a time is more than 100,000 steps after the observation.
        """
        z, angle = self._first_state(observed, start)
        tau = (lead.double() / self.unit.double()).to(z)
        return self._solve(z, angle, tau)[..., : self.dim]

    @torch.no_grad()
    def forecast(
        self, observed: Observations, start: Tensor, lead: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of what is observed, each (batch, times, dim), in the user's
        units and double precision.

        The variance is that among the members, and what held-out windows had beyond that at the
        same lead; arguments and errors are those of `forward`.
        """
        if not len(start):
            return (lead.new_zeros(*lead.shape, self.dim),) * 2
        pairs = zip(start.split(CHUNK), lead.split(CHUNK), strict=True)
        found = torch.cat([self(observed, a, b) for a, b in pairs]).double()
        noise = self._noise(lead.double() / self.unit.double())
        variance = found.var(2, correction=0) + noise
        scale = self.scale.double()
        return self.center.double() + scale * found.mean(2), scale * variance.sqrt()

    def remember_errors(self, leads: Tensor, excess: Tensor, seen: Tensor) -> None:
        """Keep what held-out forecasts lack at each lead, for `forecast`.

        It does not fall with the lead, and stays beyond the longest one as it was there.

        Args:
            leads: (n,), in units of a window.
            excess: squared errors less the variance among the members, (n, dim), standardised.
            seen: (n, dim), where there was an observation.
        """
        at, beyond, there = (x.cpu().numpy() for x in (leads, excess, seen))
        count = min(BINS, max(1, len(at) // FEWEST))
        shares = np.linspace(0, 1, count + 1) ** 2  # finest at first
        edges = np.unique(np.quantile(at, shares))
        bins = np.searchsorted(edges[1:-1], at)
        middle: list[float] = []
        found: list[np.ndarray] = []
        for i in np.unique(bins):
            inside = bins == i
            counts = np.maximum(there[inside].sum(0), 1)
            middle.append(at[inside].mean())
            found.append(np.where(there[inside], beyond[inside], 0.0).sum(0) / counts)
        rest = BINS - len(middle)
        middle, found = middle + middle[-1:] * rest, found + found[-1:] * rest
        self.leads.copy_(torch.tensor(np.array(middle)))
        self.errors.copy_(torch.tensor(np.maximum.accumulate(np.maximum(found, 0.0), 0)))

    def _noise(self, tau: Tensor) -> Tensor:
        """(..., dim): the remembered variance at leads `tau`, in units."""
        at, leads, errors = (x.cpu().double().numpy() for x in (tau, self.leads, self.errors))
        columns = [np.interp(at, leads, errors[:, i]) for i in range(self.dim)]
        return torch.from_numpy(np.stack(columns, -1)).to(tau.device)

    def _first_state(self, observed: Observations, start: Tensor) -> tuple[Tensor, Tensor]:
        """(members, batch, state), and the angles of the periods there, (batch, periods)."""
        now = observed.z[start]
        state = torch.cat([now, now.new_zeros(len(now), self.extra)], 1)
        if self.opening is not None:
            back = torch.arange(1, self.history + 1, device=start.device)
            past = start[:, None] - back
            there = past >= observed.first[start][:, None]
            past = torch.where(there, past, start[:, None])
            gap = (observed.t[start][:, None] - observed.t[past]) / self.unit.double()
            parts = [
                now,
                observed.seen[start],
                (observed.z[past] - now[:, None]).flatten(1),
                (observed.seen[past] & there[..., None]).flatten(1),
                gap.clamp(max=LONGEST_GAP),
            ]
            known = torch.cat([part.to(now) for part in parts], 1)
            state = state + self.opening(known.expand(self.members, *known.shape))
        else:
            state = state.expand(self.members, *state.shape)
        periods = observed.t.new_tensor(self.periods)
        turns = torch.remainder(observed.t[start][:, None] / periods, 1.0)
        return state, (2 * pi * turns).to(now)

    def _solve(self, z: Tensor, angle: Tensor, tau: Tensor) -> Tensor:
        """(batch, times, members, state) at times `tau` (batch, times) after states (members,
        batch, state)."""
        h = 1.0 / self.steps
        far = float(tau.max()) / h
        if far > MOST_STEPS:
            step = h * float(self.unit)
            raise DataError(
                f"`t` must not lie more than {MOST_STEPS:,} steps of {step:.6g} after the "
                f"observation that is solved from, got a lead of {far * step:.6g}, where a usual "
                f"window takes {self.unit:.6g}; is it in the unit of the series?"
            )
        steps = max(1, ceil(far * (1 - 1e-6)))
        ts = torch.arange(steps + 1, dtype=z.dtype, device=z.device) * h
        zs = odeint(lambda t, z: self._rate(t, z, angle), z, ts, method="rk4")
        fs = torch.stack([self._rate(t, z, angle) for t, z in zip(ts, zs, strict=True)])
        n = (tau / h).floor().clamp(0, steps - 1)
        x = (tau / h - n)[..., None, None]
        zs, fs = zs.permute(2, 0, 1, 3), fs.permute(2, 0, 1, 3)  # (batch, nodes, members, state)
        rows = torch.arange(len(tau), device=z.device)[:, None]
        a = n.long()
        return cubic(x, zs[rows, a], zs[rows, a + 1], fs[rows, a], fs[rows, a + 1], h)

    def _rate(self, t: Tensor, z: Tensor, angle: Tensor) -> Tensor:
        if not self.periods:
            return self.velocity(z)
        turned = angle + t * (2 * pi * self.unit.to(z) / z.new_tensor(self.periods))
        waves = torch.cat([turned.cos(), turned.sin()], 1).expand(self.members, -1, -1)
        return self.velocity(torch.cat([z, waves], 2))

    def _check_columns(self, series: Series) -> None:
        if series.y.shape[1] != self.dim:
            raise ShapeError(f"the network observes {self.dim} columns, got {series.y.shape[1]}")


def _positive(periods: Sequence[float]) -> tuple[float, ...]:
    wrong = f"`periods` must be a list of positive, finite numbers like [24.0], got {periods!r}"
    try:
        found = tuple(float(period) for period in periods)
    except (TypeError, ValueError):
        raise ArgumentError(wrong) from None
    if isinstance(periods, str) or not all(0 < period < float("inf") for period in found):
        raise ArgumentError(wrong)
    return found


def windows(series: Series, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Windows to train with and windows to validate with, each rows (first row, last row).

    Of ten series or more a random tenth is held out; of fewer the last tenth of each. No window to
    train with sees what is held out.

    Raises:
        DataError: there are too few observations.
    """
    count = len(series)
    held = np.zeros(count, dtype=bool)
    if count >= 10:
        held[np.random.default_rng(seed).permutation(count)[: count // 10]] = True
    found: tuple[list[Any], list[Any]] = ([], [])
    for part, out in zip(series.parts(), held, strict=True):
        a, b = part.start, part.stop
        cut = a if out else b if count >= 10 else b - max(1, (b - a) // 10)
        found[0].extend((i, cut - 1) for i in range(a, cut - 1))
        found[1].extend((i, b - 1) for i in range(max(a, cut - 1), b - 1))
    if len(found[0]) < FEWEST_WINDOWS or not found[1]:
        raise DataError(
            f"there are too few observations to train with: {len(series.t)} in {count} series; "
            "at least four of one series are needed, or three of two"
        )
    train, validation = (np.array(part, dtype=np.float64) for part in found)
    return train, validation
