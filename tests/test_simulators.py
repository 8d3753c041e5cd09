"""The simulators against likelihoods, moments, brute force and the benchmark's references."""

import os
from pathlib import Path

import numpy as np
import pytest
from scipy import stats
from scipy.integrate import solve_ivp

from pathline.data.sbibm import TASKS, load_abc, load_reference
from pathline.errors import ArgumentError, DataError, ShapeError
from pathline.posterior.simulators import (
    SIMULATORS,
    LogNormal,
    Normal,
    PrincipalComponents,
    Simulator,
    Uniform,
    bernoulli_glm,
    lotka_volterra,
    shallow_water,
    sir,
    slcp,
    two_moons,
)
from pathline.posterior.simulators import stochastic_lotka_volterra as stochastic

DATA = Path(os.environ.get("PATHLINE_DATA", "no such folder"))
REFERENCES = DATA / "sbibm_reference"
needs_references = pytest.mark.skipif(
    not REFERENCES.is_dir(), reason="sbibm_reference is not in the folder PATHLINE_DATA"
)
needs_abc = pytest.mark.skipif(
    not (DATA / "stochastic_lv_abc").is_dir(),
    reason="stochastic_lv_abc is not in the folder PATHLINE_DATA",
)
every = pytest.mark.parametrize("name", SIMULATORS)
ten = pytest.mark.parametrize("observation", range(1, 11))


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def scores(values: np.ndarray, mean) -> np.ndarray:
    """By how many standard errors the means of independent rows are off."""
    return (values.mean(0) - mean) / (values.std(0, ddof=1) / np.sqrt(len(values)))


def same_distribution(a: np.ndarray, b: np.ndarray) -> list[float]:
    """p-values of Kolmogorov and Smirnov's test for both coordinates, their sum and difference."""
    turn = np.array([[1.0, 0.0, 1.0, 1.0], [0.0, 1.0, 1.0, -1.0]])
    columns = zip((a @ turn).T, (b @ turn).T, strict=True)
    return [
        float(stats.ks_2samp(first, second, method="asymp").pvalue) for first, second in columns
    ]


def differences(f, theta: np.ndarray, step: float = 1e-4) -> np.ndarray:
    """The gradient (n, dim) of a function (n, dim) -> (n,), by central differences."""
    shifts = step * np.eye(theta.shape[1])[:, None]
    values = f(np.concatenate((theta + shifts, theta - shifts)).reshape(-1, theta.shape[1]))
    above, below = values.reshape(2, theta.shape[1], -1)
    return (above - below).T / (2 * step)


# What all have in common


@every
def test_shapes_dtype_and_seed(name):
    simulator = SIMULATORS[name]
    theta, x = simulator.draw(5, seed=3)
    assert theta.shape == (5, simulator.dim) and x.shape == (5, simulator.context_dim)
    assert theta.dtype == x.dtype == np.float64
    assert np.isfinite(theta).all() and np.isfinite(x).all()
    assert simulator.name == name and len(simulator.parameters) == simulator.dim
    assert len(set(simulator.parameters)) == len(simulator.support) == simulator.dim
    again = simulator.draw(5, seed=3)
    np.testing.assert_array_equal(theta, again[0])
    np.testing.assert_array_equal(x, again[1])
    assert not np.array_equal(theta, simulator.draw(5, seed=4)[0])


@every
def test_prior_is_in_its_support_and_nowhere_else(name):
    simulator = SIMULATORS[name]
    theta = simulator.sample_prior(100, rng())
    assert np.isfinite(simulator.prior_log_prob(theta)).all()
    for j, bounds in enumerate(simulator.support):
        if bounds is not None:
            assert (theta[:, j] >= bounds[0]).all() and (theta[:, j] <= bounds[1]).all()
            outside = theta.copy()
            outside[:, j] = bounds[0] - 0.1
            assert (simulator.prior_log_prob(outside) == -np.inf).all()


@every
def test_no_rows(name):
    simulator = SIMULATORS[name]
    assert simulator.simulate(np.empty((0, simulator.dim)), rng()).shape == (
        0,
        simulator.context_dim,
    )


def test_bad_input():
    simulator = SIMULATORS["two_moons"]
    with pytest.raises(ShapeError, match=r"`theta` must be \(n, 2\).*theta_1, theta_2.*\(3, 4\)"):
        simulator.simulate(np.zeros((3, 4)), rng())
    with pytest.raises(ShapeError, match=r"`x` must be \(2,\), got \(1, 2\)"):
        simulator.log_likelihood(np.zeros((3, 2)), np.zeros((1, 2)))
    with pytest.raises(ArgumentError, match="positive number of simulations, got 0"):
        simulator.draw(0, seed=0)
    with pytest.raises(ArgumentError, match="'shallow_water' is not known"):
        SIMULATORS["shallow_water"].log_likelihood(np.zeros((1, 100)), np.zeros(20_000))


def test_runs_that_do_not_end_are_replaced_and_counted():
    def model(theta, generator):
        return np.where(theta < 0.75, theta, np.nan)

    simulator = Simulator("quarter", ("p",), 1, Uniform(0.0, 1.0, 1), model, "")
    theta, x, discarded = simulator.draw_counted(3000, seed=0)
    assert theta.shape == x.shape == (3000, 1) and (theta < 0.75).all()
    # The runs up to the last one that is needed are binomial; a round may add a few more.
    assert abs(discarded - 1000) < 5 * np.sqrt(3000 * 0.25) / 0.75


def test_a_simulator_that_never_ends_is_an_error():
    simulator = Simulator(
        "never", ("p",), 1, Uniform(0.0, 1.0, 1), lambda theta, _: np.nan * theta, ""
    )
    with pytest.raises(DataError, match=r"only 0 of .* runs of the simulator 'never' ended"):
        simulator.draw(5, seed=0)


# Priors


def test_priors_against_scipy():
    theta = rng().normal(1.0, 1.0, (50, 3))
    covariance = np.array([[2.0, 0.5, 0.0], [0.5, 1.0, -0.3], [0.0, -0.3, 0.5]])
    normal = Normal(np.array([1.0, -2.0, 0.5]), covariance)
    expected = stats.multivariate_normal(normal.mean, covariance).logpdf(theta)
    np.testing.assert_allclose(normal.log_prob(theta), expected, rtol=1e-12)
    log_normal = LogNormal((0.3, -1.0, 0.0), (0.5, 0.2, 2.0))
    with np.errstate(divide="ignore"):
        expected = sum(
            stats.lognorm(s, scale=np.exp(loc)).logpdf(theta[:, j])
            for j, (loc, s) in enumerate(zip(log_normal.loc, log_normal.scale, strict=True))
        )
    np.testing.assert_allclose(log_normal.log_prob(theta), expected, rtol=1e-12)
    uniform = Uniform(-1.0, 2.0, 3)
    expected = stats.uniform(-1.0, 3.0).logpdf(theta).sum(1)
    np.testing.assert_allclose(uniform.log_prob(theta), expected, rtol=1e-12)
    samples = normal.sample(40_000, rng())
    assert np.abs(scores(samples, normal.mean)).max() < 4.5
    np.testing.assert_allclose(np.cov(samples.T), covariance, atol=0.05)


@pytest.mark.parametrize(
    "name, exact",
    {
        "two_moons": stats.uniform([-1.0] * 2, 2.0),
        "gaussian_linear": stats.norm([0.0] * 10, np.sqrt(0.1)),
        "gaussian_linear_uniform": stats.uniform([-1.0] * 10, 2.0),
        "gaussian_mixture": stats.uniform([-10.0] * 2, 20.0),
        "slcp": stats.uniform([-3.0] * 5, 6.0),
        "sir": stats.lognorm([0.5, 0.2], scale=[0.4, 0.125]),
        "lotka_volterra": stats.lognorm(0.5, scale=np.exp([-0.125, -3.0, -0.125, -3.0])),
        "stochastic_lotka_volterra": stats.uniform([-5.0] * 4, 7.0),
    }.items(),
)
def test_priors_of_the_tasks(name, exact):
    theta = SIMULATORS[name].sample_prior(10_000, rng())
    expected = exact.logpdf(theta).sum(1)
    np.testing.assert_allclose(SIMULATORS[name].prior_log_prob(theta), expected, rtol=1e-10)
    for j, column in enumerate(exact.cdf(theta).T):
        assert stats.kstest(column, "uniform", method="asymp").pvalue > 1e-4, j


def test_prior_of_the_glm_is_smooth_in_the_filter():
    """The precision, written out for second differences f_i - 2 f_(i-1) + f_(i-2)."""
    F = np.zeros((9, 9))
    for i in range(9):
        F[i, i] = 1.0 + np.sqrt(i / 9)
        if i >= 1:
            F[i, i - 1] = -2.0
        if i >= 2:
            F[i, i - 2] = 1.0
    covariance = SIMULATORS["bernoulli_glm"].prior.covariance
    np.testing.assert_allclose(covariance[1:, 1:] @ (F.T @ F), np.eye(9), atol=1e-9)
    assert covariance[0, 0] == 2.0 and not covariance[0, 1:].any()


# Moments and likelihoods


@pytest.mark.parametrize("name", ["gaussian_linear", "gaussian_linear_uniform"])
def test_gaussian_linear_moments(name):
    simulator = SIMULATORS[name]
    theta = np.tile(np.linspace(-0.9, 0.9, 10), (40_000, 1))
    x = simulator.simulate(theta, rng())
    assert np.abs(scores(x, theta[0])).max() < 4.5
    assert np.abs(scores((x - theta) ** 2, 0.1)).max() < 4.5
    exact = stats.multivariate_normal(theta[0], 0.1 * np.eye(10)).logpdf(x[0])
    assert simulator.log_likelihood(theta[:1], x[0]) == pytest.approx(exact, rel=1e-12)


def test_gaussian_mixture_shares_the_width_within_a_run():
    theta = np.tile([2.0, -3.0], (40_000, 1))
    z = SIMULATORS["gaussian_mixture"].simulate(theta, rng()) - theta
    # E z^2 = (1 + 0.01) / 2, E z_1^2 z_2^2 = (1 + 0.0001) / 2
    assert np.abs(scores(z**2, 0.505)).max() < 4.5
    assert abs(scores(z[:, :1] ** 2 * z[:, 1:] ** 2, 0.50005)[0]) < 4.5


def test_slcp_moments_and_likelihood():
    simulator = SIMULATORS["slcp"]
    theta = np.array([0.5, -1.0, 1.2, -0.8, 0.7])
    deviations = theta[2:4] ** 2
    covariance = np.outer(deviations, deviations)
    covariance[[0, 1], [1, 0]] *= np.tanh(theta[4])
    covariance += slcp.JITTER * np.eye(2)
    x = simulator.simulate(np.tile(theta, (20_000, 1)), rng())
    points = x.reshape(-1, 2)
    assert np.abs(scores(points, theta[:2])).max() < 4.5
    z = points - theta[:2]
    products = np.stack((z[:, 0] ** 2, z[:, 0] * z[:, 1], z[:, 1] ** 2), 1)
    assert np.abs(scores(products, covariance[[0, 0, 1], [0, 1, 1]])).max() < 4.5
    exact = stats.multivariate_normal(theta[:2], covariance).logpdf(x[0].reshape(4, 2)).sum()
    assert simulator.log_likelihood(theta[None], x[0]) == pytest.approx(exact, rel=1e-10)


def test_two_moons_likelihood_is_a_density_and_that_of_the_simulator():
    simulator = SIMULATORS["two_moons"]
    theta = np.array([[0.3, 0.2]])
    x = simulator.simulate(np.repeat(theta, 100_000, 0), rng())
    # The density integrates to 1, and the means of x_1 and x_2^2 under it are the simulator's.
    centre = two_moons.place(theta)[0] + (0.25, 0.0)
    width = 0.3 / 600
    grid = (np.arange(600) + 0.5) * width
    first, second = np.meshgrid(centre[0] + grid - 0.15, centre[1] + grid - 0.15, indexing="ij")
    # log_likelihood takes one x and many theta; a shift of x is one of the place of the moon.
    shifts = np.stack((first.ravel() - x[0, 0], second.ravel() - x[0, 1]), 1)
    moved = theta + shifts @ np.array([[1.0, 1.0], [1.0, -1.0]]) / np.sqrt(2)
    assert (moved.sum(1) > 0).all()  # the same side of the fold
    density = np.exp(simulator.log_likelihood(moved, x[0])) * width**2
    assert density.sum() == pytest.approx(1.0, abs=1e-3)
    weight = np.array([(density * first.ravel()).sum(), (density * second.ravel() ** 2).sum()])
    assert np.abs(scores(np.stack((x[:, 0], x[:, 1] ** 2), 1), weight)).max() < 4.5


def test_glm_summaries_of_spikes():
    theta = SIMULATORS["bernoulli_glm"].sample_prior(50, rng())
    z = bernoulli_glm.spikes(theta, rng(1))
    x = SIMULATORS["bernoulli_glm"].simulate(theta, rng(1))
    signal = bernoulli_glm.stimulus()
    assert set(np.unique(z)) == {0.0, 1.0}
    np.testing.assert_allclose(x[:, 0], z.sum(1))
    for lag in range(9):  # the stimulus before the spikes
        triggered = [row[lag:] @ signal[: 100 - lag] for row in z]
        np.testing.assert_allclose(x[:, 1 + lag], triggered, atol=1e-12)


def test_glm_spikes_and_likelihood():
    simulator = SIMULATORS["bernoulli_glm"]
    theta = simulator.sample_prior(1, rng(5))
    chance = 1 / (1 + np.exp(-bernoulli_glm.DESIGN @ theta[0]))
    z = bernoulli_glm.spikes(np.repeat(theta, 20_000, 0), rng())
    moving = (chance > 1e-3) & (chance < 1 - 1e-3)
    assert moving.sum() > 20
    assert np.abs(scores(z[:, moving], chance[moving])).max() < 4.5
    exact = stats.bernoulli(chance).logpmf(z[0].astype(int)).sum()
    x = z[0] @ bernoulli_glm.DESIGN
    assert simulator.log_likelihood(theta, x) == pytest.approx(exact, rel=1e-10)


# Ordinary differential equations, against SciPy


def test_sir_against_scipy():
    simulator = SIMULATORS["sir"]
    theta = np.concatenate((simulator.sample_prior(6, rng()), [[2.0, 0.06], [0.05, 0.3]]))
    population = 1e6

    def velocity(t, y, beta, gamma):
        S, I, _ = y  # noqa: E741
        return [-beta * S * I / population, beta * S * I / population - gamma * I, gamma * I]

    for rates, share in zip(theta, sir.infected(theta), strict=True):
        exact = solve_ivp(
            velocity,
            (0.0, 160.0),
            [population - 1, 1.0, 0.0],
            args=tuple(rates),
            method="DOP853",
            rtol=1e-12,
            atol=1e-9,
            t_eval=np.arange(161.0),
        ).y[1, ::17]
        # SciPy's error is absolute: a millionth of a person.
        np.testing.assert_allclose(share, exact / population, rtol=1e-5, atol=1e-12)


def test_sir_noise_and_likelihood():
    simulator = SIMULATORS["sir"]
    theta = np.array([[0.35, 0.12]])
    share = sir.infected(theta)[0]
    x = simulator.simulate(np.repeat(theta, 4000, 0), rng())
    day = share > 1e-3
    assert day.sum() >= 5
    assert np.abs(scores(x[:, day], 1000 * share[day])).max() < 4.5
    spread = (x - 1000 * share) ** 2
    assert np.abs(scores(spread[:, day], (1000 * share * (1 - share))[day])).max() < 4.5
    # Up to the binomial coefficients, which do not depend on the parameters.
    both = np.array([[0.35, 0.12], [0.4, 0.15]])
    exact = stats.binom(1000, sir.infected(both)).logpmf(x[0]).sum(1)
    ours = simulator.log_likelihood(both, x[0])
    assert ours[1] - ours[0] == pytest.approx(exact[1] - exact[0], rel=1e-9)


def test_lotka_volterra_against_scipy():
    simulator = SIMULATORS["lotka_volterra"]
    theta = simulator.sample_prior(8, rng())

    def velocity(t, y, alpha, beta, gamma, delta):
        X, Y = y
        return [alpha * X - beta * X * Y, -gamma * Y + delta * X * Y]

    for rates, ours in zip(theta, lotka_volterra.log_populations(theta), strict=True):
        exact = solve_ivp(
            velocity,
            (0.0, 20.0),
            [30.0, 1.0],
            args=tuple(rates),
            method="DOP853",
            rtol=1e-13,
            atol=1e-18,
            t_eval=np.arange(201) * 0.1,
        ).y[:, ::21]
        expected = np.log(exact.clip(1e-10, 1e4)).ravel()
        np.testing.assert_allclose(ours, expected, atol=2e-5)


def test_lotka_volterra_noise_is_log_normal():
    theta = np.repeat([[0.7, 0.05, 0.8, 0.06]], 4000, 0)
    x = SIMULATORS["lotka_volterra"].simulate(theta, rng())
    z = np.log(x) - lotka_volterra.log_populations(theta[:1])
    assert np.abs(scores(z, 0.0)).max() < 4.5
    assert np.abs(scores(z**2, 0.01)).max() < 4.5


def test_an_ode_that_blows_up_is_nan_in_its_row_only():
    theta = np.array([[0.7, 0.05, 0.8, 0.06], [0.7, -5.0, 0.8, 5.0]])
    x = SIMULATORS["lotka_volterra"].simulate(theta, rng())
    assert np.isfinite(x[0]).all() and np.isnan(x[1]).any()


# Against the references of the benchmark


@needs_references
def test_glm_design_is_the_benchmarks():
    with np.load(REFERENCES / "bernoulli_glm" / "design.npz") as files:
        np.testing.assert_array_equal(bernoulli_glm.DESIGN, files["design_matrix"])


@needs_references
@ten
def test_glm_observations_are_summaries_of_their_spikes(observation):
    folder = REFERENCES / "bernoulli_glm" / f"num_observation_{observation}"
    raw = np.loadtxt(folder / "observation_raw.csv", delimiter=",", skiprows=1)
    known = load_reference("bernoulli_glm", observation)
    np.testing.assert_allclose(raw @ bernoulli_glm.DESIGN, known.observation, atol=2e-5)


@needs_references
@ten
def test_gaussian_linear_reference_is_conjugate(observation):
    known = load_reference("gaussian_linear", observation)
    # Precisions 10 and 10 add up: mean x / 2, covariance 0.05.
    assert np.abs(scores(known.samples, known.observation / 2)).max() < 4.5
    z = known.samples - known.observation / 2
    products = (z[:, :, None] * z[:, None, :]).reshape(len(z), -1)
    assert np.abs(scores(products, 0.05 * np.eye(10).ravel())).max() < 4.8


@needs_references
@pytest.mark.parametrize("task", ["gaussian_linear_uniform", "gaussian_mixture"])
def test_truncated_references(task):
    """The posterior is the likelihood, which is symmetric in x and theta, within the prior."""
    simulator = SIMULATORS[task]
    p_values = []
    for observation in range(1, 11):
        known = load_reference(task, observation)
        copies = np.repeat(known.observation[None], 50_000, 0)
        proposals = simulator.simulate(copies, rng(observation))
        exact = proposals[np.isfinite(simulator.prior_log_prob(proposals))]
        for j in range(simulator.dim):
            test = stats.ks_2samp(known.samples[:, j], exact[:, j], method="asymp")
            p_values.append(test.pvalue)
    assert min(p_values) > 1e-3 / len(p_values)


@needs_references
def test_two_moons_references_are_its_moons_turned_back():
    """x - moon = place(theta) has two solutions theta; the posterior takes either, in the prior."""
    simulator, p_values = SIMULATORS["two_moons"], []
    for observation in range(1, 11):
        known = load_reference("two_moons", observation)
        likelihood = simulator.log_likelihood(known.samples, known.observation)
        assert np.isfinite(likelihood).all()
        moon = simulator.simulate(np.zeros((20_000, 2)), rng(observation))
        back, up = (known.observation - moon).T
        side = rng(observation + 20).choice((-1.0, 1.0), len(moon))
        exact = np.stack((side * -back - up, side * -back + up), 1) / np.sqrt(2)
        exact = exact[np.isfinite(simulator.prior_log_prob(exact)) & (back <= 0)]
        p_values += same_distribution(known.samples, exact)
        radii = [
            np.hypot(*(known.observation - two_moons.place(theta) - (0.25, 0.0)).T)
            for theta in (known.samples, exact)
        ]
        p_values.append(stats.ks_2samp(*radii, method="asymp").pvalue)
    assert min(p_values) > 1e-3 / len(p_values)


@needs_references
@pytest.mark.parametrize("task, tolerance", [("two_moons", 0.02), ("gaussian_mixture", 0.15)])
def test_rejection_finds_the_reference(task, tolerance):
    """Parameters whose data fall near the observation, without any likelihood."""
    theta, x = SIMULATORS[task].draw(1_000_000, seed=0)
    p_values = []
    for observation in (1, 2, 3):
        known = load_reference(task, observation)
        near = theta[np.linalg.norm(x - known.observation, axis=1) < tolerance]
        assert len(near) > 50
        p_values += same_distribution(near, known.samples)
    assert min(p_values) > 1e-3 / len(p_values)


def posterior_scores(task: str, observation: int, rows: int, logarithms: bool) -> np.ndarray:
    """The scores of E s = 0 and E s (theta - m) = -1, which hold by integration by parts for the
    gradient s of the log-posterior, over a reference that has samples of it."""
    simulator, known = SIMULATORS[task], load_reference(task, observation)

    def log_prob(theta):
        inner, jacobian = (np.exp(theta), theta.sum(1)) if logarithms else (theta, 0.0)
        likelihood = simulator.log_likelihood(inner, known.observation)
        return likelihood + simulator.prior_log_prob(inner) + jacobian

    samples = np.log(known.samples) if logarithms else known.samples
    s = differences(log_prob, samples[:rows], step=1e-3)
    centre = samples[rows:].mean(0)  # of other samples, so that the products are independent
    return np.concatenate((scores(s, 0.0), scores(s * (samples[:rows] - centre), -1.0)))


@needs_references
@ten
def test_glm_posterior_is_that_of_the_reference(observation):
    assert np.abs(posterior_scores("bernoulli_glm", observation, 2000, False)).max() < 4.8


@needs_references
@pytest.mark.parametrize("observation", [1, 2, 3])
def test_lotka_volterra_posterior_is_that_of_the_reference(observation):
    """In logarithms, where the posterior is positive everywhere."""
    assert np.abs(posterior_scores("lotka_volterra", observation, 200, True)).max() < 4.5


@needs_references
def test_lotka_volterra_observations_scatter_about_the_solution():
    known = [load_reference("lotka_volterra", observation) for observation in range(1, 11)]
    mean = lotka_volterra.log_populations(np.stack([one.true_parameters for one in known]))
    z = (np.log(np.stack([one.observation for one in known])) - mean) / 0.1
    chi_squared = stats.chi2(z.size)
    assert 1e-4 < chi_squared.cdf(np.square(z).sum()) < 1 - 1e-4
    assert abs(z.mean()) * np.sqrt(z.size) < 4


def test_references_that_are_not_there(monkeypatch, tmp_path):
    with pytest.raises(DataError, match=r"unknown task.*'two_mons'; did you mean 'two_moons'"):
        load_reference("two_mons", 1)
    with pytest.raises(DataError, match="`observation` must be from 1 to 10, got 11"):
        load_reference("two_moons", 11)
    with pytest.raises(DataError, match="`observation` must be 1 or 2, got 3"):
        load_abc(3)
    monkeypatch.delenv("PATHLINE_DATA", raising=False)
    with pytest.raises(DataError, match=r"PATHLINE_DATA is not set.*sbibm/tasks/slcp/files"):
        load_reference("slcp", 1)
    with pytest.raises(DataError, match="EmoryMLIP/COT-Flow"):
        load_abc(1)
    monkeypatch.setenv("PATHLINE_DATA", str(tmp_path))
    with pytest.raises(DataError, match=r"there is no .*num_observation_2"):
        load_reference("two_moons", 2)
    folder = tmp_path / "sbibm_reference" / "two_moons" / "num_observation_2"
    folder.mkdir(parents=True)
    with pytest.raises(DataError, match=r"observation\.csv can't be read"):
        load_reference("two_moons", 2)
    (folder / "observation.csv").write_text("data_1,data_2\n0.5,nan\n")
    with pytest.raises(DataError, match="rows of 2 finite numbers"):
        load_reference("two_moons", 2)
    (tmp_path / "stochastic_lv_abc").mkdir()
    (tmp_path / "stochastic_lv_abc" / "stochastic_lv_abc.npz").write_text("not an archive")
    with pytest.raises(DataError, match="can't be read"):
        load_abc(1)


@needs_references
def test_references_have_the_shapes_of_the_simulators():
    for task, (dim, context_dim) in TASKS.items():
        simulator = SIMULATORS[task]
        assert (simulator.dim, simulator.context_dim) == (dim, context_dim)
        if (REFERENCES / task).is_dir():
            known = load_reference(task, 10)
            assert known.observation.shape == (context_dim,)
            assert known.true_parameters.shape == (dim,)
            assert known.samples.shape == (10_000, dim)
            assert np.isfinite(simulator.prior_log_prob(known.samples)).all()


# The stochastic process


def test_gillespie_pure_death_and_pure_birth():
    """Without encounters X dies out and Y grows, each independently: X(t) is binomial, Y(t) - 100
    negative binomial."""
    death, birth, times = 0.4, 0.15, np.array([0.0, 1.0, 2.5, 4.0])
    rates = np.tile([0.0, death, birth, 0.0], (4000, 1))
    paths = stochastic.jump_paths(rates, rng(), times=times)
    assert (paths[:, 0] == stochastic.START).all()
    for j, t in enumerate(times[1:], start=1):
        X, Y = paths[:, j].T
        left, growth = np.exp(-death * t), np.exp(birth * t)
        moments = np.stack((X, (X - 50 * left) ** 2, Y, (Y - 100 * growth) ** 2), 1)
        exact = [50 * left, 50 * left * (1 - left), 100 * growth, 100 * growth * (growth - 1)]
        assert np.abs(scores(moments, exact)).max() < 4.5


def test_gillespie_birth_and_death():
    """With a number of partners that cannot change, X is a linear birth-death process."""
    partners, up, down, t = 7, 0.05, 0.2, 2.0
    rates = np.tile([up, down, 0.0, 0.0], (4000, 1))
    paths = stochastic.jump_paths(rates, rng(), start=(30, partners), times=np.array([0.0, t]))
    assert (paths[:, :, 1] == partners).all()
    birth = up * partners
    growth = np.exp((birth - down) * t)
    variance = 30 * (birth + down) / (birth - down) * growth * (growth - 1)
    X = paths[:, 1, 0]
    exact = [30 * growth, variance]
    assert np.abs(scores(np.stack((X, (X - 30 * growth) ** 2), 1), exact)).max() < 4.5


def test_gillespie_against_a_loop():
    """All four reactions, against one path at a time with the reactions one by one."""
    theta = np.array([0.01, 0.5, 1.0, 0.01])
    times = np.arange(4) * 0.5
    generator = rng(1)
    expected = []
    for _ in range(150):
        state, time, path = np.array([50, 100]), 0.0, []
        while len(path) < len(times):
            X, Y = state
            chances = theta * (X * Y, X, Y, X * Y)
            time += generator.exponential(1 / chances.sum())
            while len(path) < len(times) and times[len(path)] < time:
                path.append(state.copy())
            move = ((1, 0), (-1, 0), (0, 1), (0, -1))
            state = state + move[generator.choice(4, p=chances / chances.sum())]
        expected.append(path)
    expected = np.array(expected)[:, 1:].reshape(150, -1)
    ours = stochastic.jump_paths(np.tile(theta, (3000, 1)), rng(2), times=times)
    ours = ours[:, 1:].reshape(3000, -1)
    for a, b in zip(ours.T, expected.T, strict=True):
        assert stats.ttest_ind(a, b, equal_var=False).pvalue > 1e-4
        assert stats.ks_2samp(a, b).pvalue > 1e-4


def test_gillespie_limit_of_events():
    """A path of as many events as allowed, the one after the last time among them, is kept."""
    rates = np.tile([0.0, 0.5, 0.0, 0.0], (500, 1))  # X only dies: each event shows in X
    times = np.array([0.0, 1.0])
    paths = stochastic.jump_paths(rates, rng(), start=(50, 0), times=times, max_events=25)
    ended = np.isfinite(paths).all((1, 2))
    assert 0 < ended.sum() < 500 and np.isnan(paths[~ended]).all()
    events = 50 - paths[ended, 1, 0]
    assert events.max() == 24
    # X(1) = 50 - events is binomial, and the limit does nothing but cut its distribution.
    kept = stats.binom(50, 1 - np.exp(-0.5)).cdf(24)
    assert stats.binomtest(int(ended.sum()), 500, kept).pvalue > 1e-4


def test_gillespie_ends_where_nothing_can_happen():
    rates = np.tile([0.0, 5.0, 0.0, 0.0], (3, 1))
    paths = stochastic.jump_paths(rates, rng(), start=(3, 0), times=np.array([0.0, 50.0, 99.0]))
    assert (paths[:, 1:, 0] == 0).all()


def test_stochastic_summaries_by_brute_force():
    paths = rng().integers(0, 50, (5, 150, 2)).cumsum(1).astype(float)
    for path, ours in zip(paths, stochastic.summaries(paths), strict=True):
        expected = [path[:, 0].mean(), path[:, 1].mean()]
        expected += [np.log(path[:, 0].var() + 1), np.log(path[:, 1].var() + 1)]
        for column in path.T:
            z = (column - column.mean()) / column.std()
            expected += [sum(z[i] * z[i + lag] for i in range(150 - lag)) / 149 for lag in (1, 2)]
        expected.append(np.corrcoef(path[:, 0], path[:, 1])[0, 1])
        np.testing.assert_allclose(ours, expected, rtol=1e-12)


@needs_abc
@pytest.mark.parametrize(
    "observation, simulations, tolerance, mean, deviation",
    [
        (1, 17_982_486, 0.0898, (-4.561, -0.734, 0.323, -4.355), (0.114, 0.151, 0.180, 0.150)),
        (2, 5_868_583, 0.146, (-3.949, -4.159, -3.442, -3.872), (0.108, 0.134, 1.788, 0.149)),
    ],
)
def test_abc_references(observation, simulations, tolerance, mean, deviation):
    known = load_abc(observation)
    assert known.samples.shape == (2000, 4) and known.observation.shape == (9,)
    assert known.simulations == simulations
    assert known.tolerance == pytest.approx(tolerance, rel=5e-3)
    np.testing.assert_allclose(known.samples.mean(0), mean, atol=6e-4)
    np.testing.assert_allclose(known.samples.std(0), deviation, atol=6e-4)
    # What was observed is like what the simulator gives for the parameters it was observed with.
    rates = np.exp(np.tile(known.true_parameters, (1000, 1)))
    x = stochastic.summaries(stochastic.jump_paths(rates, rng()))
    x = x[np.isfinite(x).all(1)]
    below = (x < known.observation).mean(0)
    assert ((below > 1e-3) & (below < 1 - 1e-3)).all()


# Shallow water


def profiles(n: int) -> np.ndarray:
    return SIMULATORS["shallow_water"].sample_prior(n, rng()).clip(0.5)


def test_water_at_rest_stays_at_rest():
    assert not shallow_water.surfaces(profiles(3), np.zeros((3, 100)), times=5).any()


def test_water_is_conserved():
    """Between the shores, and on both sides of an island."""
    depth = profiles(4)
    depth[2:, 40:44] = -1.0
    start = 0.1 * rng().standard_normal((4, 100))
    zeta = shallow_water.surfaces(depth, start, times=30)
    for cells in (slice(1, 40), slice(44, 99)):
        total = zeta[2:, 1:, cells].sum(2)
        np.testing.assert_allclose(total, np.repeat(total[:, :1], 29, 1), atol=1e-12)
        np.testing.assert_allclose(total[:, 0], start[2:, cells].sum(1), atol=1e-12)
    total = zeta[:2, :, 1:99].sum(2)
    np.testing.assert_allclose(total, np.repeat(total[:, :1], 30, 1), atol=1e-12)
    assert not zeta[2:, 1:, 40:44].any() and not zeta[:, 1:, [0, 99]].any()


def test_water_is_symmetric_and_rows_are_independent():
    depth, start = profiles(3), 0.1 * rng(1).standard_normal((3, 100))
    zeta = shallow_water.surfaces(depth, start, times=20)
    mirrored = shallow_water.surfaces(depth[:, ::-1], start[:, ::-1], times=20)
    np.testing.assert_allclose(mirrored[:, :, ::-1], zeta, atol=1e-13)
    alone = shallow_water.surfaces(depth[1:2], start[1:2], times=20)
    np.testing.assert_array_equal(alone[0], zeta[1])


def test_small_waves_are_standing_waves():
    """Over flat ground between two walls zeta = a cos(k x) cos(sqrt(g H) k t), at second order."""
    H, length, end, amplitude = 10.0, 1e6, 24 * 3600.0, 1e-6
    errors = []
    for cells, steps in ((50, 96), (100, 192), (200, 384)):
        dx = length / cells
        x = dx * (np.arange(cells + 2) - 0.5)
        k = 2 * np.pi / length
        start = (amplitude * np.cos(k * x))[None]
        start[:, [0, -1]] = 0.0
        depth = np.full((1, cells + 2), H)
        zeta = shallow_water.surfaces(depth, start, dx=dx, dt=end / steps, steps=steps, times=2)
        exact = start[0] * np.cos(np.sqrt(9.81 * H) * k * end)
        errors.append(np.abs(zeta[0, -1] - exact).max() / amplitude)
    orders = -np.diff(np.log2(errors))
    assert errors[-1] < 1e-3
    np.testing.assert_allclose(orders, 2.0, atol=0.1)


def test_a_step_of_the_water_by_loops():
    """Three steps of the published scheme, cell by cell, its linear system as a dense one."""
    depth = profiles(1)[0]
    depth[30] = 0.05  # an island
    zeta = 0.5 * rng(1).standard_normal(100)
    expected = zeta.copy()
    d = depth.copy()
    d[0] = d[99] = -10.0
    wet = d > 0.1
    expected[~wet] = 0.0
    u, g, drag, dt, dx = np.zeros(100), 9.81, 1e-3, 300.0, 10e3
    for _ in range(3):
        h = d + expected
        between, flux = np.zeros(100), np.zeros(100)
        matrix, right = np.eye(100), expected.copy()
        for i in range(99):
            if wet[i] and wet[i + 1]:
                hm = (h[i] + h[i + 1]) / 2
                between[i] = u[i] - dt * drag / hm * u[i] * abs(u[i])
                between[i] -= dt / 2 * g * (expected[i + 1] - expected[i]) / dx
                flux[i] = hm * (u[i] + between[i]) / 2
                c = dt**2 / 4 * g * hm / dx**2
                matrix[i, i] += c
                matrix[i + 1, i + 1] += c
                matrix[i, i + 1] -= c
                matrix[i + 1, i] -= c
        for i in range(1, 100):
            right[i] -= dt * (flux[i] - flux[i - 1]) / dx
        expected = np.linalg.solve(matrix, right)
        for i in range(99):
            if wet[i] and wet[i + 1]:
                u[i] = between[i] - dt / 2 * g * (expected[i + 1] - expected[i]) / dx
    ours = shallow_water.surfaces(depth[None], zeta[None], steps=3, times=2)
    np.testing.assert_allclose(ours[0, 1], expected, atol=1e-13)


def test_shallow_water_features_and_noise():
    simulator = SIMULATORS["shallow_water"]
    theta = profiles(2)
    surface = shallow_water.surfaces(theta, shallow_water.first_surface(2))
    assert surface.shape == (2, 101, 100) and (surface[:, 0, 1] == 0.1).all()
    clean = shallow_water.features(surface)
    assert clean.shape == (2, 20_000)
    # One coefficient of the transform as a sum: time frequency 3, space frequency 5.
    phase = np.exp(-2j * np.pi * (3 * np.arange(101)[:, None] / 101 + 5 * np.arange(100) / 100))
    coefficient = (surface[1] * phase).sum()
    real, imaginary = clean[1].reshape(2, 100, 100)[:, 2, 5]
    assert complex(real, imaginary) == pytest.approx(coefficient, abs=1e-12)
    noise = simulator.simulate(theta, rng()) - clean
    flat = noise.reshape(-1, 1)
    assert abs(scores(flat, 0.0)[0]) < 4.5 and abs(scores(flat**2, 0.0625)[0]) < 4.5


def test_prior_of_the_depth():
    prior = SIMULATORS["shallow_water"].prior
    theta = prior.sample(20_000, rng())
    assert np.abs(scores(theta, 10.0)).max() < 4.5
    product = (theta[:, [30]] - 10) * (theta[:, [40, 50]] - 10)
    assert np.abs(scores(product, 15 * np.exp([-0.5, -2.0]))).max() < 4.5


# Principal components


@pytest.mark.parametrize("rows, dim", [(200, 12), (12, 200)])
def test_principal_components_against_the_singular_values(rows, dim):
    data = rng().standard_normal((rows, dim)) * np.linspace(0.1, 3.0, dim) + 5.0
    components = PrincipalComponents.of(data, 5)
    _, singular, axes = np.linalg.svd(data - data.mean(0), full_matrices=False)
    np.testing.assert_allclose(components.variances, singular[:5] ** 2 / (rows - 1), rtol=1e-10)
    np.testing.assert_allclose(np.abs(components.axes.T @ axes[:5].T), np.eye(5), atol=1e-8)
    share = (singular[:5] ** 2).sum() / (singular**2).sum()
    assert components.share == pytest.approx(share, rel=1e-10)
    coordinates = components.project(data)
    assert coordinates.shape == (rows, 5)
    np.testing.assert_allclose(
        components.project(components.restore(coordinates)), coordinates, atol=1e-10
    )


def test_principal_components_bad_input():
    with pytest.raises(ArgumentError, match=r"from 1 to 3, .* 4 rows with 7 entries; got 4"):
        PrincipalComponents.of(np.zeros((4, 7)), 4)
    with pytest.raises(ShapeError, match=r"`rows` must be \(n, dim\), got \(4,\)"):
        PrincipalComponents.of(np.zeros(4), 1)
