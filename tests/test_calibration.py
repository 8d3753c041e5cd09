"""Checks of posteriors: a Gaussian one known in closed form passes, and spoilt ones do not."""

import json
import math
import sys
import types

import numpy as np
import pytest
import torch
from scipy import stats
from torch.distributions import Distribution, MultivariateNormal

from pathline import plots
from pathline.errors import ArgumentError, DataError, ModelError, PathlineError, ShapeError
from pathline.posterior import (
    Ranks,
    c2st,
    calibrate,
    expected_coverage,
    outlier,
    posterior_predictive,
    posterior_ranks,
    sbc,
    tarp,
    to_arviz,
)
from pathline.posterior.calibration import holm

# theta ~ N(0, I), x = theta + noise of this covariance; so theta | x ~ N(GAIN x, COVARIANCE).
NOISE = torch.tensor([[0.5, 0.3], [0.3, 0.4]], dtype=torch.float64)
COVARIANCE = torch.linalg.inv(torch.eye(2, dtype=torch.float64) + torch.linalg.inv(NOISE))
GAIN = COVARIANCE @ torch.linalg.inv(NOISE)


def pairs(rows, seed=3):
    generator = torch.Generator().manual_seed(seed)
    theta, noise = torch.randn(2, rows, 2, generator=generator, dtype=torch.float64)
    return theta, theta + noise @ torch.linalg.cholesky(NOISE).T


def posterior(scale=1.0, shift=0.0, flip=False):
    """The exact posterior, or one of another width, in another place, or of other correlation."""
    sign = torch.tensor([[1.0, -1.0], [-1.0, 1.0]]) if flip else 1.0
    covariance = COVARIANCE * scale**2 * sign
    return lambda context: MultivariateNormal(context @ GAIN.T + shift, covariance)


def uniform_ranks(rows, samples, seed, dim=1):
    rng = np.random.default_rng(seed)
    draw = rng.integers(0, samples + 1, (rows, dim + 2))
    return Ranks(
        draw[:, :dim], draw[:, dim], draw[:, dim + 1], samples, tuple(f"t{i}" for i in range(dim))
    )


class Fixed(Distribution):
    """Samples that are given, (samples, batch, dim), of a density that falls with the norm."""

    arg_constraints = {}  # noqa: RUF012

    def __init__(self, draws):
        super().__init__(draws.shape[1:2], draws.shape[2:], validate_args=False)
        self.draws = draws

    def sample(self, sample_shape=()):
        return self.draws

    def log_prob(self, value):
        return -value.square().sum(-1)


# Ranks


def test_ranks_against_brute_force():
    rng = np.random.default_rng(0)
    draws, theta = rng.normal(size=(30, 25, 3)), rng.normal(size=(25, 3))
    point = np.array([0.3, -1.0, 0.5])
    ranks = posterior_ranks(
        lambda context: Fixed(torch.from_numpy(draws)),
        torch.from_numpy(theta),
        torch.zeros(25, 1),
        samples=30,
        prior=torch.from_numpy(np.stack([point, point])),  # no spread: distances in their own unit
    )
    for row in range(25):
        for i in range(3):
            below = sum(draw[i] < theta[row, i] for draw in draws[:, row])
            assert ranks.marginal[row, i] == below
        norm = np.linalg.norm(theta[row])
        assert ranks.density[row] == sum(np.linalg.norm(d) > norm for d in draws[:, row])
        far = np.linalg.norm(theta[row] - point)
        assert ranks.distance[row] == sum(np.linalg.norm(d - point) < far for d in draws[:, row])


def test_distances_are_in_units_of_the_prior():
    theta, x = pairs(50)
    units = torch.tensor([1.0, 1e4], dtype=torch.float64)

    def stretched(context):
        factor = torch.diag(units)
        covariance = factor @ COVARIANCE @ factor
        return MultivariateNormal(context @ GAIN.T * units, covariance)

    plain = posterior_ranks(posterior(), theta, x, prior=theta, samples=20)
    other = posterior_ranks(stretched, theta * units, x, prior=theta * units, samples=20)
    assert (plain.distance == other.distance).all()


def test_ties_are_broken_evenly():
    theta = torch.zeros(400, 1)
    ranks = posterior_ranks(
        lambda context: Fixed(torch.zeros(9, len(context), 1)), theta, theta, samples=9
    )
    for values in (ranks.marginal[:, 0], ranks.density, ranks.distance):
        assert stats.chisquare(np.bincount(values, minlength=10)).pvalue > 0.01


def test_chunks_do_not_change_shapes_and_the_seed_decides(monkeypatch):
    theta, x = pairs(60)
    state = torch.get_rng_state()
    first = posterior_ranks(posterior(), theta, x, samples=50, seed=1)
    again = posterior_ranks(posterior(), theta, x, samples=50, seed=1)
    other = posterior_ranks(posterior(), theta, x, samples=50, seed=2)
    assert (first.marginal == again.marginal).all() and (first.distance == again.distance).all()
    assert (first.marginal != other.marginal).any()
    assert torch.equal(torch.get_rng_state(), state)
    monkeypatch.setattr("pathline.posterior.ranks.CHUNK", 350)
    assert posterior_ranks(posterior(), theta, x, samples=50).marginal.shape == (60, 2)


def test_a_density_that_comes_with_the_samples_is_used():
    class Both(MultivariateNormal):
        def rsample_and_log_prob(self, shape):
            draws = self.sample(shape)
            return draws, self.log_prob(draws)

        def sample(self, shape=()):
            return super().sample(shape)

    theta, x = pairs(40)
    one = posterior_ranks(lambda c: Both(c @ GAIN.T, COVARIANCE), theta, x)
    two = posterior_ranks(posterior(), theta, x)
    assert (one.density == two.density).all()


# Verdicts


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_the_exact_posterior_passes(seed):
    theta, x = pairs(500, seed)
    result = calibrate(posterior(), theta, x, seed=seed)
    assert result.passed and "calibrated" in result.verdict
    assert min(result.sbc.p_values) > 0.01
    assert result.coverage.p_value > 0.01 and result.tarp.p_value > 0.01
    assert "uniform" in result.sbc.verdict and "as it should be" in result.coverage.verdict


def test_a_narrow_posterior_is_over_confident():
    result = calibrate(posterior(scale=0.5), *pairs(300))
    assert not (result.passed or result.sbc.passed or result.coverage.passed or result.tarp.passed)
    assert "theta1 over-confident" in result.sbc.verdict
    assert "theta2 over-confident" in result.sbc.verdict
    for part in (result.coverage, result.tarp):
        assert "over-confident" in part.verdict and "under-confident" not in part.verdict
    assert "over-confident" in result.verdict
    # The exact coverage: |theta - mean|^2 is chi-squared in units of the true covariance.
    exact = stats.chi2.cdf(0.25 * stats.chi2.ppf(result.coverage.levels, 2), 2)
    assert np.abs(result.coverage.covered - exact).max() < 4 * 0.5 / math.sqrt(300)


def test_a_wide_posterior_is_under_confident():
    result = calibrate(posterior(scale=2.0), *pairs(300))
    assert not (result.passed or result.sbc.passed or result.coverage.passed or result.tarp.passed)
    assert "theta1 under-confident" in result.sbc.verdict
    for part in (result.coverage, result.tarp):
        assert "under-confident" in part.verdict and "over-confident" not in part.verdict


@pytest.mark.parametrize("sign, word", [(1, "too high"), (-1, "too low")])
def test_a_shifted_posterior_is_biased(sign, word):
    shift = torch.tensor([0.0, sign * 0.7 * COVARIANCE[1, 1].sqrt().item()])
    result = calibrate(posterior(shift=shift), *pairs(500), names=["rate", "size"])
    assert not result.passed
    assert f"size biased (posterior {word})" in result.sbc.verdict
    assert "rate" not in result.sbc.verdict


def test_a_wrong_correlation_is_seen_by_the_joint_ranks_only():
    result = calibrate(posterior(flip=True), *pairs(500))
    assert min(result.sbc.adjusted[:2]) > 0.01
    assert result.sbc.names[2] == "log density" and result.sbc.adjusted[2] < 1e-6
    assert not result.coverage.passed and not result.passed
    assert "theta" not in result.sbc.verdict


def test_the_prior_passes():
    # As the docs say: calibration alone does not show that anything was learned.
    theta, x = pairs(500)
    prior = lambda context: MultivariateNormal(  # noqa: E731
        torch.zeros(len(context), 2, dtype=torch.float64), torch.eye(2, dtype=torch.float64)
    )
    assert calibrate(prior, theta, x).passed


# The tests behind the verdicts


@pytest.mark.parametrize("rows, samples", [(40, 7), (230, 199), (1000, 100)])
def test_chi_squared_against_scipy(rows, samples):
    ranks = uniform_ranks(rows, samples, seed=1, dim=2)
    result = sbc(ranks)
    assert result.counts.sum(1).tolist() == [rows] * 3
    assert result.expected.sum() == pytest.approx(rows)
    for counts, p in zip(result.counts, result.p_values, strict=True):
        assert p == pytest.approx(stats.chisquare(counts, result.expected).pvalue)


def test_unequal_bins_have_unequal_expectations():
    # 7 ranks in 2 bins: 4 and 3 of them.
    result = sbc(uniform_ranks(42, 6, seed=1))
    assert result.expected.tolist() == [24.0, 18.0]


def test_holm():
    # By hand: .005 x 4, .01 x 3, .03 x 2, and .04 is no less than the one before.
    adjusted = holm(np.array([0.01, 0.04, 0.03, 0.005]))
    assert adjusted.tolist() == pytest.approx([0.03, 0.06, 0.06, 0.02])


@pytest.mark.parametrize("check", [sbc, expected_coverage, tarp])
def test_calibrated_posteriors_fail_as_often_as_the_level_says(check, monkeypatch):
    monkeypatch.setattr("pathline.posterior.calibration.SIMULATIONS", 999)
    failed = [not check(uniform_ranks(200, 99, seed), level=0.1).passed for seed in range(300)]
    # Holm's correction for two tests is a little conservative.
    assert stats.binomtest(sum(failed), 300, 0.1).pvalue > 0.01


@pytest.mark.parametrize("samples", [4, 99, 150])
def test_a_curve_passes_where_it_stays_in_the_band(samples):
    verdicts = set()
    for seed in range(60):
        ranks = uniform_ranks(80, samples, seed)
        result = tarp(ranks, level=0.3)
        inside = (result.covered >= result.lower) & (result.covered <= result.upper)
        assert result.passed == inside.all()
        verdicts.add(result.passed)
        direct = [(ranks.distance < level * (samples + 1) - 1e-9).mean() for level in result.levels]
        assert result.covered.tolist() == pytest.approx(direct)
    assert verdicts == {True, False}


def test_the_band_holds_whole_curves():
    result = expected_coverage(uniform_ranks(300, 199, seed=0))
    draws = np.sort(np.random.default_rng(1).random((4000, 300)), axis=1)
    curves = np.stack([(draws < level).mean(1) for level in result.levels], 1)
    inside = ((curves >= result.lower) & (curves <= result.upper)).all(1).sum()
    assert stats.binomtest(int(inside), 4000, 1 - result.level).pvalue > 0.01


def test_results_are_json():
    result = calibrate(posterior(), *pairs(50))
    back = json.loads(json.dumps(result.to_dict()))
    assert back["sbc"]["names"] == ["theta1", "theta2", "log density"]
    assert len(back["tarp"]["levels"]) == len(back["tarp"]["covered"])


@pytest.mark.parametrize(
    "error, match, change",
    [
        (ArgumentError, "`samples`", {"samples": 0}),
        (ArgumentError, "`names` must be 2 names, got 1", {"names": ["a"]}),
        (ShapeError, "`prior` must be", {"prior": torch.zeros(5, 3)}),
        (DataError, "`prior` has", {"prior": torch.full((5, 2), math.nan)}),
        (ShapeError, "`theta` and `context`", {"context": torch.zeros(7, 2)}),
        (DataError, "at least 20", {"theta": torch.zeros(3, 2), "context": torch.zeros(3, 2)}),
        (DataError, "`theta` has 30 rows", {"theta": torch.full((30, 2), math.inf)}),
        (ShapeError, "must be", {"posterior": lambda c: Fixed(torch.zeros(199, len(c), 3))}),
        (
            ModelError,
            "5,970 of 5,970 samples",
            {"posterior": lambda c: Fixed(torch.full((199, len(c), 2), math.nan))},
        ),
    ],
)
def test_bad_input(error, match, change):
    theta, context = pairs(30)
    arguments = {"posterior": posterior(), "theta": theta, "context": context, **change}
    with pytest.raises(error, match=match):
        calibrate(**arguments)


# Two samples


def test_c2st_of_equal_and_of_far_samples():
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(2, 200, 2))
    assert c2st(x, y) == pytest.approx(0.5, abs=0.08)
    assert c2st(torch.from_numpy(x), y + 8) > 0.995
    assert c2st(x, y + 2) == c2st(torch.from_numpy(x), torch.from_numpy(y + 2))


def test_c2st_reaches_the_accuracy_of_bayes():
    rng = np.random.default_rng(1)
    x, y = rng.normal(size=(2, 1500, 2))
    y[:, 0] += 1.5
    best = stats.norm.cdf(0.75)
    noise = math.sqrt(best * (1 - best) / 3000)
    assert best - 4 * noise < c2st(1000 * x, 1000 * y) < best + 3 * noise


def test_c2st_refuses():
    with pytest.raises(ShapeError, match="at least 5 rows"):
        c2st(np.zeros((10, 2)), np.zeros((10, 3)))
    with pytest.raises(DataError, match="`y`"):
        c2st(np.zeros((10, 2)), np.full((10, 2), np.nan))


# Predictions


def simulate(theta, generator):
    return theta + generator.normal(size=theta.shape) @ np.linalg.cholesky(NOISE.numpy()).T


def test_predictive_check_of_the_right_and_of_wrong_data():
    x = np.array([0.4, -0.2])
    samples = posterior()(torch.from_numpy(x)).sample((4000,))
    result = posterior_predictive(simulate, samples, x, names=["a", "b"])
    assert result.passed and result.simulated == 4000 and result.lost == 0
    # The tails are those of N(GAIN x, COVARIANCE + NOISE).
    mean, std = GAIN.numpy() @ x, np.sqrt(np.diag(COVARIANCE + NOISE))
    exact = 2 * stats.norm.sf(np.abs(x - mean) / std)
    assert np.abs(np.array(result.tails) - exact).max() < 4 / math.sqrt(4000)
    far = posterior_predictive(simulate, samples, [0.4, -9.0], names=["a", "b"])
    assert not far.passed and "far out in b" in far.verdict and "below" in far.verdict
    assert json.loads(json.dumps(far.to_dict()))["passed"] is False


def test_predictive_check_sees_a_combination():
    samples = np.random.default_rng(0).normal(size=(1000, 1))

    def line(theta, generator):
        return np.hstack([theta, theta + 0.05 * generator.normal(size=theta.shape)])

    result = posterior_predictive(line, samples, [1.5, -1.5])
    assert min(result.tails) > 0.05
    assert not result.passed and "all features together" in result.verdict
    assert result.distance_p == 1 / 1001


def test_data_that_fit_pass():
    rng = np.random.default_rng(0)
    p = [
        posterior_predictive(
            lambda theta, generator: generator.standard_cauchy((len(theta), 3)),
            np.zeros((199, 1)),
            rng.standard_cauchy(3),
            seed=seed,
        ).distance_p
        for seed in range(300)
    ]
    assert stats.kstest(p, "uniform").pvalue > 0.01


def test_failed_simulations_are_counted():
    def half(theta, generator):
        return np.where(np.arange(len(theta))[:, None] % 2, np.nan, generator.normal(size=(1, 2)))

    result = posterior_predictive(half, np.zeros((400, 1)), np.zeros(2))
    assert (result.simulated, result.lost) == (200, 200)
    assert "200 of 400 simulations" in result.verdict
    with pytest.raises(DataError, match="at least 100"):
        posterior_predictive(half, np.zeros((50, 1)), np.zeros(2))
    with pytest.raises(ShapeError, match="columns of `observation`"):
        posterior_predictive(half, np.zeros((400, 1)), np.zeros(3))
    with pytest.raises(DataError, match="`observation`"):
        posterior_predictive(half, np.zeros((400, 1)), [0.0, math.nan])


# Observations unlike the simulations


def test_outlier_names_the_columns():
    contexts = np.random.default_rng(0).normal(size=(5000, 4)) * [1, 10, 100, 1000]
    names = ["mean", "std", "lag", "top"]
    assert outlier(np.zeros(4), contexts, names) is None
    assert outlier(torch.tensor([[2.0, -20.0, 100.0, 0.0]]), contexts, names) is None
    text = outlier([0, 80, 0, -90_000], contexts, names)
    assert "5,000 simulations" in text and "mean" not in text
    assert text.index("top is -9e+04") < text.index("std is 80")
    quartiles = np.quantile(contexts[:, 1], [0.25, 0.5, 0.75])
    away = (80 - quartiles[1]) / (quartiles[2] - quartiles[0]) * 2 * stats.norm.ppf(0.75)
    assert f"({away:.3g} robust standard deviations" in text


def test_outlier_in_combination():
    z = np.random.default_rng(0).normal(size=(3000, 1))
    contexts = np.exp(np.hstack([z, z + 0.05 * np.random.default_rng(1).normal(size=(3000, 1))]))
    assert outlier(np.exp([1.0, 1.0]), contexts) is None
    assert "combination" in outlier(np.exp([1.0, -1.0]), contexts)


def test_outlier_in_a_constant_column():
    contexts = np.random.default_rng(0).normal(size=(200, 2))
    contexts[:, 1] = 3
    assert outlier([0, 3], contexts) is None
    assert "x2 is 4, always 3" in outlier([0, 4], contexts)


@pytest.mark.parametrize("draw", [np.random.Generator.standard_normal, np.random.Generator.random])
def test_observations_like_the_simulations_are_inside(draw):
    rng = np.random.default_rng(0)
    contexts = draw(rng, (2000, 5))
    assert sum(outlier(draw(rng, 5), contexts) is not None for _ in range(200)) <= 3


def test_outlier_of_heavy_tails():
    rng = np.random.default_rng(0)
    contexts = rng.standard_cauchy((2000, 3))
    assert sum(outlier(rng.standard_cauchy(3), contexts) is not None for _ in range(200)) <= 4


def test_outlier_refuses():
    with pytest.raises(ShapeError, match="columns of `contexts`"):
        outlier(np.zeros(2), np.zeros((10, 3)))
    with pytest.raises(DataError, match="not finite"):
        outlier([0, math.nan], np.zeros((10, 2)))
    with pytest.raises(DataError, match="at least 2 finite rows"):
        outlier([0, 0], np.full((10, 2), math.nan))
    with pytest.raises(ArgumentError, match="3 names, got 1"):
        outlier(np.zeros(3), np.zeros((10, 3)), ["a"])


# Figures


def test_figures():
    result = calibrate(posterior(scale=0.5), *pairs(100))
    drawn = result.figures()
    assert len(drawn["ranks"].axes) == 3 and len(drawn["coverage"].axes) == 2
    assert all(plots.to_png(figure, dpi=40)[:4] == b"\x89PNG" for figure in drawn.values())


def test_the_band_of_the_bars_holds_99_percent_of_them():
    figure = plots.rank_histograms(np.full((1, 20), 50), np.full(20, 50.0), ["a"])
    band = figure.axes[0].patches[0].get_data()
    low, high = band.baseline[0], band.values[0]
    inside = stats.binom.cdf(high, 1000, 0.05) - stats.binom.cdf(low - 1, 1000, 0.05)
    assert 0.99 <= inside < 0.995


def test_many_panels():
    figure = plots.rank_histograms(
        np.full((30, 4), 5), np.full(4, 5.0), [f"t{i}" for i in range(30)]
    )
    assert sum(ax.axison for ax in figure.axes) == 24
    with pytest.raises(ShapeError, match="`counts`"):
        plots.rank_histograms(np.zeros((2, 4)), np.zeros(3), ["a", "b"])
    with pytest.raises(ShapeError, match="four arrays"):
        plots.coverage({"a": ([0, 1], [0, 1], [0, 1], [0])})


@pytest.mark.parametrize("dim, panels", [(1, 1), (3, 6), (10, 36)])
def test_pairs(dim, panels):
    samples = np.random.default_rng(0).normal(size=(400, dim))
    names = [f"theta {i}" for i in range(dim)]
    truth = np.full(dim, 9.0)
    figure = plots.pairs(samples, names, truth=truth, reference=samples + 1)
    assert len(figure.axes) == panels
    assert figure.axes[0].get_xlim()[1] > 9
    assert plots.to_png(figure, dpi=30)[:4] == b"\x89PNG"
    assert plots.to_png(plots.pairs(samples[:50], names), dpi=30)[:4] == b"\x89PNG"
    with pytest.raises(ShapeError, match="`truth`"):
        plots.pairs(samples, names, truth=np.zeros(dim + 1))


# ArviZ


def test_to_arviz():
    pytest.importorskip("arviz")
    samples = np.random.default_rng(0).normal(size=(2, 100, 3))
    data = to_arviz(
        torch.from_numpy(samples), ["a", "b", "c"], samples[..., 0], {"x": np.arange(4.0)}
    )
    assert data["posterior"]["b"].dims == ("chain", "draw")
    assert (data["posterior"]["b"].values == samples[:, :, 1]).all()
    assert (data["sample_stats"]["lp"].values == samples[:, :, 0]).all()
    assert data["observed_data"]["x"].values.tolist() == [0, 1, 2, 3]
    one = to_arviz(samples[0], ["a", "b", "c"], observed=np.zeros(4))
    assert one["posterior"]["c"].shape == (1, 100)
    assert one["observed_data"]["observation"].shape == (4,)


def test_to_arviz_of_version_one(monkeypatch):
    # There `from_dict` takes the groups as one mapping, and InferenceData is no more.
    monkeypatch.setitem(
        sys.modules, "arviz", types.SimpleNamespace(from_dict=lambda groups: groups)
    )
    groups = to_arviz(np.zeros((5, 1)), ["a"], np.zeros(5))
    assert groups["posterior"]["a"].shape == groups["sample_stats"]["lp"].shape == (1, 5)


def test_to_arviz_refuses(monkeypatch):
    pytest.importorskip("arviz")
    with pytest.raises(ShapeError, match="2 names"):
        to_arviz(np.zeros((5, 3)), ["a", "b"])
    with pytest.raises(ArgumentError, match="differ"):
        to_arviz(np.zeros((5, 2)), ["a", "a"])
    with pytest.raises(ShapeError, match="`log_prob`"):
        to_arviz(np.zeros((5, 1)), ["a"], np.zeros(4))
    monkeypatch.setitem(sys.modules, "arviz", None)
    with pytest.raises(PathlineError, match=r"pip install 'pathline\[posterior\]'"):
        to_arviz(np.zeros((5, 1)), ["a"])
