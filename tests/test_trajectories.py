"""Neural ODEs of time series: linear equations with known solutions, brute force, bad input."""

import copy
import datetime
import os
from decimal import Decimal
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.linalg import expm
from sklearn.base import clone
from sklearn.model_selection import GridSearchCV, TimeSeriesSplit
from torch import nn

import pathline as pl
from pathline.data import Series
from pathline.errors import ArgumentError, DataError, ModelError, ShapeError
from pathline.estimators import TrajectoryRegressor
from pathline.networks import (
    TrajectoryFit,
    TrajectoryNet,
    check_trajectories,
    fit_trajectories,
    windows,
)
from pathline.networks.forecasts import log_densities, solutions
from pathline.reproduce.do_vs_od import spiral
from pathline.train import Rows

A = np.array([[-0.2, 1.0], [-1.0, -0.1]])


class Linear(nn.Module):
    """z A^T for the first two columns of what a velocity sees."""

    def __init__(self, unit):
        super().__init__()
        self.matrix = nn.Parameter(torch.tensor(A.T) * unit)

    def forward(self, x):
        return x[..., :2] @ self.matrix


def ragged(seed=0, count=4, rows=(5, 30)):
    """Solutions of z' = A z at irregular times: t, y, groups."""
    rng = np.random.default_rng(seed)
    t, y, groups = [], [], []
    for g in range(count):
        times = np.cumsum(rng.exponential(0.2, rng.integers(*rows))) + 10 * g
        start = rng.normal(size=2)
        t.append(times)
        y.append(np.stack([expm(A * (s - times[0])) @ start for s in times]))
        groups += [f"s{g}"] * len(times)
    return np.concatenate(t), np.concatenate(y), np.array(groups)


def linear_net(series, steps=10, members=2):
    """A network in the units of the series that has the exact velocity."""
    net = TrajectoryNet(2, members=members, steps=steps, width=4).double()
    net.standardize(series)
    net.center.zero_()
    net.scale.fill_(1.0)
    net.velocity = Linear(float(net.unit))
    return net


# The solutions


def test_order_at_times_between_nodes():
    """Fourth order at all irregular times of all windows."""
    series = Series.of(*ragged())
    start = torch.tensor(series.starts[:-1])
    lead = torch.tensor(np.random.default_rng(1).uniform(0, 3, (4, 20)))
    exact = np.stack(
        [
            [expm(A * s) @ series.y[i] for s in row]
            for i, row in zip(start.tolist(), lead.tolist(), strict=True)
        ]
    )
    errors = []
    for steps in (4, 8, 16, 32):
        net = linear_net(series, steps)
        found = net(net.observe(series), start, lead)
        assert found.shape == (4, 20, 2, 2)
        errors.append(np.abs(found.detach().numpy() - exact[:, :, None]).max())
    slope = np.polyfit(np.log([4, 8, 16, 32]), np.log(errors), 1)[0]
    assert slope == pytest.approx(-4, abs=0.2)
    assert errors[-1] < 1e-6


@pytest.mark.parametrize("history", [0, 3])
def test_ragged_is_one_by_one(history):
    t, y, groups = ragged(count=5)
    y[::4, 0] = np.nan
    net = TrajectoryNet(2, extra=1, history=history, periods=[3.0], width=8, members=3).double()
    series = Series.of(t, y, groups)
    net.standardize(series)
    ends = np.array([t[groups == g].max() for g in series.ids])
    asked = np.concatenate([ends + 0.5, ends + 1.7, ends[:1]])
    which = np.concatenate([series.ids, series.ids, series.ids[:1]])
    together = solutions(net, series, asked, which, last=True)
    for i in range(len(asked)):
        own = groups == which[i]
        alone = Series.of(t[own], y[own])
        for a, b in zip(solutions(net, alone, asked[i : i + 1], last=True), together, strict=True):
            np.testing.assert_allclose(a[0], b[i], rtol=1e-12, atol=1e-12)


def test_periods_are_those_of_the_clock():
    """z' = cos(2 pi t / P) from any start, though the network sees only times after it."""
    period = 2.5

    class Wave(nn.Module):
        def __init__(self):
            super().__init__()
            self.unit = nn.Parameter(net.unit.clone())

        def forward(self, x):
            return x[..., 1:2] * self.unit

    t = np.array([0.7, 1.0, 1.4, 1.9, 2.0])
    y = np.sin(2 * np.pi * t / period) * period / (2 * np.pi)
    series = Series.of(t, y)
    net = TrajectoryNet(1, periods=[period], steps=80, members=1).double()
    net.standardize(series)
    net.center.zero_(), net.scale.fill_(1.0)
    net.velocity = Wave()
    asked = np.linspace(2.0, 6.0, 9)
    found = solutions(net, series, asked, last=True)[0][:, 0]
    exact = np.sin(2 * np.pi * asked / period) * period / (2 * np.pi)
    np.testing.assert_allclose(found, exact, atol=1e-6)


def test_an_exact_velocity_has_no_loss():
    """Of what was observed, however much is missing."""
    t, y, groups = ragged()
    series = Series.of(t, y, groups)
    net = linear_net(series, steps=60)
    train, _ = windows(series)
    assert TrajectoryFit(net, series)(torch.tensor(train)).total < 1e-12
    gaps = y.copy()
    starts = series.starts[:-1]
    gaps[np.setdiff1d(np.arange(len(y)), starts)[::3], 1] = np.nan
    holes = Series.of(t, gaps, groups)
    first = torch.tensor([[s, e - 1] for s, e in zip(starts, series.starts[1:], strict=True)])
    assert TrajectoryFit(net, holes)(first.double()).total < 1e-12


def test_loss_by_brute_force():
    """Window by window, member by member, with an accurate solver."""
    t, y, groups = ragged(count=3, rows=(6, 15))
    y[2, 0] = np.nan
    series = Series.of(t, y, groups)
    net = TrajectoryNet(2, window=4, width=6, members=2, steps=40).double()
    net.standardize(series)
    train, _ = windows(series)
    found = TrajectoryFit(net, series).validate(torch.tensor(train))
    observed = net.observe(series)
    expected = []
    for start, last in train.astype(int):
        total = 0.0
        for m in range(2):

            def velocity(_, z, m=m):
                return net.velocity(z.expand(2, 1, 2))[m, 0]

            for row in range(start + 1, min(start + 4, last) + 1):
                lead = (series.t[row] - series.t[start]) / float(net.unit)
                if lead > 2:
                    continue
                times = torch.tensor([0.0, lead], dtype=torch.float64)
                z = pl.odeint(velocity, observed.z[start], times, rtol=1e-10, atol=1e-10)[-1]
                error = (z - observed.z[row]).square()
                total += error[observed.seen[row]].sum().item()
        expected.append(total / (2 * 4 * 2))
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-5)


def test_gradient():
    series = Series.of(*ragged(count=2))
    net = TrajectoryNet(2, extra=1, history=2, width=3, members=2, steps=3).double()
    net.standardize(series)
    objective, batch = TrajectoryFit(net, series), torch.tensor(windows(series)[0][:6])
    names, values = zip(*objective.named_parameters(), strict=True)

    def loss(*parameters):
        given = dict(zip(names, parameters, strict=True))
        return torch.func.functional_call(objective, given, (batch,)).total

    assert torch.autograd.gradcheck(loss, tuple(p.detach().requires_grad_() for p in values))


# What is held out, and the intervals


@pytest.mark.parametrize("count", [3, 12])
def test_training_does_not_see_what_is_held_out(count):
    series = Series.of(*ragged(count=count, rows=(12, 40)))
    train, held = windows(series, seed=3)
    seen = {row for a, b in train.astype(int) for row in range(a, b + 1)}
    wanted = {row for a, b in held.astype(int) for row in range(a + 1, b + 1)}
    assert not seen & wanted
    assert seen | wanted | {int(held[0, 0])} == set(range(len(series.t)))
    for first, last in np.concatenate([train, held]).astype(int):
        assert np.searchsorted(series.starts, first, "right") == np.searchsorted(
            series.starts, last, "right"
        )


def test_intervals_hold_a_random_walk():
    """A velocity of zero: the variance is that of the walk, which grows with the lead."""
    rng = np.random.default_rng(0)
    y = rng.normal(size=(40, 200)).cumsum(1).ravel()
    t, groups = np.tile(np.arange(200.0), 40), np.repeat(np.arange(40), 200)
    series = Series.of(t, y, groups)
    net = TrajectoryNet(1, members=2).double()
    net.standardize(series)
    with torch.no_grad():
        for part in (net.velocity.weights[-1], net.velocity.biases[-1]):
            part.zero_()
    TrajectoryFit(net, series).finish(Rows(windows(series)[1]))
    lead = np.array([1.0, 10.0, 40.0, 75.0])
    sd = solutions(net, series, 199 + lead, np.zeros(4), last=True)[1][:, 0]
    np.testing.assert_allclose(sd[1:], np.sqrt(lead[1:]), rtol=0.25)
    assert sd[0] < 2.5  # leads of one share a bin with those of up to five


# The estimator


@pytest.fixture(scope="module")
def fitted():
    t, y, groups = ragged(count=12, rows=(25, 40))
    model = TrajectoryRegressor(
        members=2, width=16, steps=5, max_steps=250, learning_rate=0.02, random_state=0
    )
    return model.fit(t, y, groups)


def test_a_linear_equation_is_learned(fitted):
    t, y, groups = ragged(seed=5, count=6)
    first = [np.flatnonzero(groups == g)[0] for g in np.unique(groups)]
    found = fitted.forecast(t, groups, observed=(t[first], y[first], groups[first]))
    error = np.sqrt(np.mean((found.mean - y) ** 2))
    assert error < 0.1 * np.sqrt(np.mean(y**2))


def test_predict_begins_at_the_first_observations(fitted):
    series = fitted.series_
    first = series.starts[:-1]
    found = fitted.predict(series.t[first], series.ids)
    np.testing.assert_allclose(found, series.y[first], rtol=1e-12)


def test_saved_and_loaded(fitted, tmp_path):
    fitted.save(tmp_path / "model")
    again = TrajectoryRegressor.load(tmp_path / "model")
    t, which = np.array([100.0, 101.0]), fitted.series_.ids[:2]
    for a, b in zip(fitted.forecast(t, which), again.forecast(t, which), strict=True):
        np.testing.assert_array_equal(a, b)
    assert again.get_params()["width"] == 16
    net = pl.load(tmp_path / "model")
    assert isinstance(net, TrajectoryNet)
    (tmp_path / "model" / "series.safetensors").unlink()
    with pytest.raises(ModelError, match=r"series\.safetensors does not exist"):
        TrajectoryRegressor.load(tmp_path / "model")


def test_series_beside_a_model(tmp_path):
    """Whatever the groups are; NumPy's numbers are parameters, too."""
    t, y = np.tile(np.arange(6.0), 2), np.arange(12.0) % 5
    for i, groups in enumerate((["b", "a"], [7, 3], [0.5, 0.25], [True, False])):
        model = TrajectoryRegressor(
            members=np.int64(1), width=2, periods=np.array([3, 4]), max_steps=1, random_state=0
        ).fit(t, y, np.repeat(groups, 6))
        model.save(tmp_path / str(i))
        again = TrajectoryRegressor.load(tmp_path / str(i))
        assert again.series_.ids.tolist() == groups
        asked = ([7.0, 8.0], [groups[1], groups[0]])
        np.testing.assert_array_equal(model.forecast(*asked).mean, again.forecast(*asked).mean)


def test_score(fitted):
    """The mean density of rows given those before them, by which a search can choose."""
    t, y, groups = ragged(seed=5, count=6)
    each = log_densities(fitted.net_, Series.of(t, y, groups))
    assert np.isnan(each).sum() == 6
    assert fitted.score(t, y, groups) == pytest.approx(np.nanmean(each), rel=1e-12)
    assert fitted.score(t, y + 1, groups) < fitted.score(t, y, groups)
    t = np.arange(60.0)
    model = TrajectoryRegressor(members=1, width=4, max_steps=4, random_state=0)
    search = GridSearchCV(model, {"window": [2, 5]}, cv=TimeSeriesSplit(2)).fit(t, np.sin(t))
    assert np.isfinite(search.cv_results_["mean_test_score"]).all()
    assert search.best_estimator_.forecast([61.0]).mean.shape == (1,)


def test_units_and_seed():
    """The same forecast in any units, and from the same seed."""
    t, y, groups = ragged(count=3)
    model = TrajectoryRegressor(members=2, width=4, max_steps=5, random_state=1)
    asked, which = np.full(3, 40.0), np.array(["s0", "s1", "s2"])
    one = clone(model).fit(t, y, groups).forecast(asked, which)
    two = clone(model).fit(t, y, groups).forecast(asked, which)
    other = clone(model).fit(60 * t + 7, 3 * y - 2, groups).forecast(60 * asked + 7, which)
    np.testing.assert_array_equal(one.mean, two.mean)
    np.testing.assert_allclose(3 * one.mean - 2, other.mean, rtol=1e-4)
    np.testing.assert_allclose(3 * one.sd, other.sd, rtol=1e-3)


def test_a_vector_stays_a_vector():
    t = np.arange(20.0)
    model = TrajectoryRegressor(members=1, width=4, max_steps=2, random_state=0).fit(t, np.sin(t))
    assert model.predict(t).shape == (20,)
    wide, narrow = model.forecast([20.0, 25.0], level=0.99), model.forecast([20.0, 25.0], level=0.5)
    assert wide.mean.shape == (2,)
    assert (wide.upper - wide.lower > narrow.upper - narrow.lower).all()


def test_a_check_by_hand(fitted):
    """Errors, the last value and intervals, window by window."""
    t, y, groups = ragged(seed=7, count=2, rows=(8, 12))
    y[3, 0] = np.nan
    series, net = Series.of(t, y, groups), fitted.net_
    check, observed = check_trajectories(net, series), net.observe(series)
    errors, lazy, inside = [], [], []
    for part in series.parts():
        for i in range(part.start, part.stop - 1):
            later = slice(i + 1, part.stop)
            lead = torch.tensor(series.t[later] - series.t[i])[None]
            mean, sd = (x[0].numpy() for x in net.forecast(observed, torch.tensor([i]), lead))
            before = y[part.start : i + 1]
            last = [column[~np.isnan(column)][-1] for column in before.T]
            errors.append((mean - y[later]) / net.scale.numpy())
            lazy.append((last - y[later]) / net.scale.numpy())
            kept = ~np.isnan(errors[-1])
            inside += (np.abs(mean - y[later]) <= 1.6448536 * sd)[kept].tolist()
    assert check.coverage == pytest.approx(np.mean(inside))
    for name, found in (("rmse", errors), ("persistence", lazy)):
        by_hand = np.sqrt(np.nanmean(np.concatenate(found) ** 2))
        assert getattr(check, name) == pytest.approx(by_hand, rel=1e-9)


# Known and real series


@pytest.mark.slow
def test_the_spiral():
    """Windows of ten of a path that was not seen, from one path at irregular times."""
    rng = np.random.default_rng(0)
    paths = []
    for start in ((2.0, 0.0), (0.0, 1.5)):
        t = np.sort(rng.uniform(0, 25, 1000))
        exact = spiral(start, torch.tensor(np.concatenate([[0.0], t])))[1:]
        paths.append((t, exact.numpy()))
    model = TrajectoryRegressor(members=2, steps=5, max_steps=600, random_state=0).fit(*paths[0])
    t, exact = paths[1]
    start = np.arange(990)
    later = start[:, None] + np.arange(1, 11)
    series = Series.of(t, exact)
    lead = torch.tensor(t[later] - t[start][:, None])
    net = model.net_
    mean, _ = net.forecast(net.observe(series), torch.tensor(start), lead)
    mse = np.mean(np.sum((mean.numpy() - exact[later]) ** 2, 2))
    still = np.mean(np.sum((exact[start][:, None] - exact[later]) ** 2, 2))
    assert mse < 1e-3
    assert mse < still / 40


@pytest.mark.slow
def test_household_power():
    """The next weeks of a household's power: better than three simple forecasts."""
    file = Path(os.environ.get("PATHLINE_DATA", "")) / "timeseries" / "household_power_hourly.npz"
    if not file.exists():
        pytest.skip("PATHLINE_DATA has no timeseries/household_power_hourly.npz")
    with np.load(file) as data:
        hours = (data["unix_hour"] - data["unix_hour"][0]).astype(float)
        power = data["values"][:, 0].astype(float) / 60  # kW
    count, new = 180 * 24, 28 * 24
    t, y = hours[-count - new :], power[-count - new :]
    kept = np.sort(np.random.default_rng(0).permutation(count)[: int(0.8 * count)])
    model = TrajectoryRegressor(
        members=2, window=24, steps=12, history=24, extra=4, periods=[24.0, 168.0], width=48,
        max_steps=400, random_state=0,
    )  # fmt: skip
    model.fit(t[kept], y[kept])
    series = Series.of(t[count - 24 :], y[count - 24 :])
    last = len(series.t) - 1
    rows = np.array([(i, min(i + 24, last)) for i in range(24, last)], dtype=float)
    check = check_trajectories(model.net_, series, rows)
    mean = np.array([y[:count][t[:count] % 24 == hour].mean() for hour in range(24)])
    pairs = np.concatenate([np.arange(i + 1, min(i + 24, last) + 1) for i in range(24, last)])
    by_hour = mean[(series.t[pairs] % 24).astype(int)]
    a_day_before = series.y[pairs - 24, 0]
    error = check.columns["x0"]["rmse"]
    assert error < check.columns["x0"]["persistence"]
    for simple in (by_hour, a_day_before):
        assert error < np.sqrt(np.mean((simple - series.y[pairs, 0]) ** 2))
    assert 0.8 < check.coverage < 0.97


# Bad input


DAY = datetime.date(2024, 2, 29)
GOOD = (np.array([0.0, 1.0, 2.0, 0.0, 1.0]), np.arange(5.0), np.array(["a", "a", "a", "b", "b"]))


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        ({"t": [0, np.nan, 2, 0, 1]}, DataError, "`t` must be finite, got nan in row 2"),
        ({"t": [0, 2, 1, 0, 1]}, DataError, "1 in row 3 of group a comes after 2; sort the rows"),
        ({"t": [0, 1, 1, 0, 1]}, DataError, "no time may occur twice"),
        ({"t": [0, 1]}, ShapeError, r"`t` must be \(rows,\)"),
        ({"t": ["0", "1", "2", "3", "4"]}, DataError, "`t` must hold real numbers"),
        ({"y": [0, np.inf, 2, 0, 1]}, DataError, "`y` must not be infinite: row 2"),
        ({"y": [np.nan] * 5}, DataError, "at least 2"),
        ({"y": [0, 1, 2, 3, np.nan]}, DataError, "at least 2 observation.*fewer in b"),
        ({"groups": ["a", "a", "a", "a", "b"]}, DataError, "must increase"),
        ({"groups": ["a", "a", "a"]}, ShapeError, r"`groups` must be \(5,\)"),
        ({"groups": ["a", "a", "a", None, "b"]}, DataError, "one kind, got None in row 4"),
        ({"groups": ["a", "a", 1, "b", "b"]}, DataError, "one kind, got 1 in row 3"),
        ({"groups": [1, 1, 1, "b", "b"]}, DataError, "one kind, got 'b' in row 4"),
        ({"groups": [1, 1, np.nan, 2, 2]}, DataError, "must not be missing, row 3 is"),
        ({"groups": [DAY] * 5}, DataError, r"text or numbers, .* got datetime.date\(.* in row 1"),
        ({"groups": np.array([DAY] * 5, "datetime64[D]")}, DataError, "got dtype datetime64"),
        ({"groups": [Decimal(1)] * 5}, DataError, "text or numbers, all of one kind, got Decimal"),
        ({"groups": [10**30] * 5}, DataError, "text or numbers, all of one kind, got dtype object"),
    ],
)
def test_bad_series(change, error, text):
    given = dict(zip(("t", "y", "groups"), GOOD, strict=True)) | change
    with pytest.raises(error, match=text):
        TrajectoryRegressor().fit(**given)


def test_bad_questions(fitted):
    with pytest.raises(DataError, match="no series is called 'x'; they are called 's0', 's1'"):
        fitted.forecast([50.0], ["x"])
    with pytest.raises(DataError, match="all of one kind, got 1 in row 2"):
        fitted.forecast([50.0, 50.0], ["s0", 1])
    with pytest.raises(DataError, match="`groups` must say which of the 12 series"):
        fitted.forecast([50.0])
    with pytest.raises(DataError, match="must not lie before the last observation"):
        fitted.forecast([0.0], ["s3"])
    with pytest.raises(ArgumentError, match="`level` must lie between 0 and 1, got 90"):
        fitted.forecast([50.0], ["s0"], level=90)
    with pytest.raises(ShapeError, match="the network observes 2 columns, got 1"):
        fitted.forecast([3.0], observed=([1.0, 2.0], [0.0, 0.0]))
    one = ([1.0, 2.0], np.zeros((2, 2)))
    with pytest.raises(DataError, match="'a'; the only one is called 0, and `groups` may be left"):
        fitted.forecast([3.0], ["a"], observed=one)
    with pytest.raises(ArgumentError, match="`members` must be an integer of at least 1, got 0"):
        TrajectoryRegressor(members=0).fit(*GOOD)


@pytest.mark.parametrize("periods", [24.0, "24", [24.0, 0.0], ["day"], [np.inf]])
def test_bad_periods(periods):
    with pytest.raises(ArgumentError, match=r"`periods` must be a list .* like \[24.0\], got"):
        TrajectoryRegressor(periods=periods).fit(*GOOD)


@pytest.mark.parametrize(
    "groups", [["b", "b", "a", "a"], [2, 2, 1, 1], [2, 2, 0.5, 0.5], [True, True, False, False]]
)
def test_groups_are_text_or_numbers(groups):
    """As a list, as an array, and as an array of objects."""
    t, y = [0.0, 1.0, 0.0, 1.0], np.arange(4.0)
    for given in (groups, np.array(groups), np.array(groups, dtype=object)):
        series = Series.of(t, y, given)
        assert series.ids.tolist() == [groups[0], groups[2]]
        assert series.ids.dtype.kind == np.array(groups).dtype.kind
        assert series.place(given, 4).tolist() == [0, 0, 1, 1]


def test_fewest_observations():
    """What the error asks for is enough."""
    model = TrajectoryRegressor(members=1, width=2, max_steps=1, random_state=0)
    told = "at least four of one series are needed, or three of two"
    for t in ([0.0, 1.0], [0.0, 1.0, 2.0]):
        with pytest.raises(DataError, match=f"too few observations to train with.*{told}"):
            model.fit(t, t)
    model.fit([0.0, 1.0, 2.0, 3.0], [0.0, 1.0, 0.0, 1.0])
    model.fit([0.0, 1.0, 2.0] * 2, np.arange(6.0), ["a", "a", "a", "b", "b", "b"])


def test_too_far(fitted):
    """Times in another unit; the work of a forecast grows with them."""
    unit = float(fitted.net_.unit)
    told = rf"`t` must not lie more than 100,000 steps of {unit / 5:.6g} .* got a lead of "
    end = float(fitted.series_.t[fitted.series_.starts[1] - 1])
    for lead in (1e6, 1e300):
        with pytest.raises(DataError, match=f"{told}.*a usual window takes {unit:.6g}"):
            fitted.forecast([end + lead], ["s0"])
        with pytest.raises(DataError, match=told):
            fitted.predict([end + lead], ["s0"])
    assert np.isfinite(fitted.forecast([end + 100 * unit], ["s0"]).mean).all()


def test_rows_of_groups_may_alternate():
    t, y, groups = ragged(count=2, rows=(6, 7))
    order = np.argsort(t - 10 * (groups == "s1"), kind="stable")
    mixed, sorted_ = Series.of(t[order], y[order], groups[order]), Series.of(t, y, groups)
    for name, part in zip(mixed.ids, mixed.parts(), strict=True):
        own = groups == name
        np.testing.assert_array_equal(mixed.t[part], t[own])
        np.testing.assert_array_equal(mixed.y[part], y[own])
    assert sorted(mixed.ids) == sorted(sorted_.ids)


def test_training_goes_on_after_a_stop(tmp_path):
    series = Series.of(*ragged(count=3))
    nets = [TrajectoryNet(2, members=2, width=4) for _ in range(2)]
    more = {"max_steps": 6, "progress": False, "batch_size": 8}
    fit_trajectories(nets[0], series, out=tmp_path / "a", **more)
    again = copy.deepcopy(nets[0])
    fit_trajectories(nets[0], series, out=tmp_path / "a", resume=True, **more)
    for a, b in zip(again.state_dict().values(), nets[0].state_dict().values(), strict=True):
        torch.testing.assert_close(a, b)
