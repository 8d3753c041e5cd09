"""Stochastic solves against exact solutions on the same Brownian path, and the path itself."""

import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import kstest

from pathline.errors import ArgumentError, ShapeError, SolveError
from pathline.integrate.sde import RECENT, SDE_METHODS, BrownianPath, sdeint

F64 = torch.float64
START, STOP = 0.5, 1.5
methods = pytest.mark.parametrize("method", SDE_METHODS.values(), ids=lambda method: method.name)


def brownian(shape, seed, start=START, stop=STOP):
    return BrownianPath(shape, start=start, stop=stop, seed=seed, dtype=F64)


def fitted(steps, errors):
    """The order: minus the slope of log error over log steps."""
    return -np.polyfit(np.log(steps), np.log(errors), 1)[0]


def rms(error):
    return error.pow(2).mean().sqrt().item()


# Problems whose solution is a function of W(t): f, g in the sense of the method, z0, and z(STOP).

MU, SIGMA = torch.tensor([0.4, -0.3], dtype=F64), torch.tensor([0.8, 0.6], dtype=F64)


def geometric(sense, w, mu=MU, sigma=SIGMA):
    """dz = mu z dt + sigma z dW."""
    shift = 0.5 * sigma**2 if sense == "ito" else 0.0
    exact = torch.exp((mu - shift) * (STOP - START) + sigma * w)
    return (lambda t, z: mu * z), (lambda t, z: sigma * z), torch.ones_like(w), exact


def arctangent(sense, w, a=0.7, b=0.5):
    """dz = b cos^2 z dt + a cos^2 z o dW, solved by arctan(tan z0 + b t + a W)."""
    ito = a**2 if sense == "ito" else 0.0

    def drift(t, z):
        return b * torch.cos(z) ** 2 - ito * torch.sin(z) * torch.cos(z) ** 3

    z0 = torch.full_like(w, 0.3)
    exact = torch.atan(torch.tan(z0) + b * (STOP - START) + a * w)
    return drift, (lambda t, z: a * torch.cos(z) ** 2), z0, exact


PROBLEMS = {"geometric": geometric, "arctangent": arctangent}


@pytest.mark.parametrize("problem", PROBLEMS.values(), ids=PROBLEMS)
@methods
def test_strong_order(method, problem):
    path = brownian((3000, 2), seed=1)
    f, g, z0, exact = problem(method.sense, path(START, STOP))
    steps = [2**n for n in range(4, 10)]
    errors = [
        rms(
            sdeint(
                *(f, g, z0, [START, STOP]),
                method=method.name,
                dt=(STOP - START) / n,
                brownian=path,
            )[-1]
            - exact
        )
        for n in steps
    ]
    assert fitted(steps, errors) == pytest.approx(method.order, abs=0.15)
    assert errors[-1] < 0.05


@methods
def test_strong_order_one_for_additive_noise(method):
    """dz = -theta z dt + sigma dW; int e^(theta s) dW by parts, on a grid that is much finer."""
    theta, sigma, fine = 1.5, 0.7, 2**12
    path = brownian((400, 1), seed=2)
    z0 = torch.ones(400, 1, dtype=F64)
    integral = torch.zeros_like(z0)
    for n in range(fine + 1):
        s = START + n / fine
        weight = (0.5 if n in (0, fine) else 1.0) / fine
        integral += weight * theta * math.exp(-theta * (STOP - s)) * path(START, s)
    exact = z0 * math.exp(-theta) + sigma * (path(START, STOP) - integral)
    steps = [2**n for n in range(3, 8)]
    errors = []
    for n in steps:
        zs = sdeint(
            *(lambda t, z: -theta * z, lambda t, z: sigma, z0, [START, STOP]),
            method=method.name,
            dt=1 / n,
            brownian=path,
        )
        errors.append(rms(zs[-1] - exact))
    assert fitted(steps, errors) == pytest.approx(1.0, abs=0.15)


@methods
def test_times_reach_both_terms(method):
    """z = t^2 (1 + a (t - s + W)) from t = s = START.

    Here f_z g = g_t, so no integral of W beyond its increments is missed: Heun's error is that of
    the trapezoidal rule, of order two, unless a term sees a wrong time.
    """
    a = 0.5
    path = brownian((50, 1), seed=3)
    z0 = torch.full((50, 1), START**2, dtype=F64)
    exact = STOP**2 * (1 + a * (STOP - START + path(START, STOP)))
    steps = [2**n for n in range(5, 10)]
    errors = []
    for n in steps:
        zs = sdeint(
            *(lambda t, z: 2 / t * z + a * t**2, lambda t, z: a * t**2, z0, [START, STOP]),
            method=method.name,
            dt=1 / n,
            brownian=path,
        )
        errors.append(rms(zs[-1] - exact))
    assert fitted(steps, errors) == pytest.approx(2.0 if method.name == "heun" else 1.0, abs=0.1)


@methods
def test_mean_and_variance_of_ornstein_uhlenbeck(method):
    theta, sigma, n = 1.2, 0.9, 40_000
    ts = [0.0, 0.3, 1.0, 2.0]
    zs = sdeint(
        *(lambda t, z: -theta * z, lambda t, z: sigma, torch.full((n, 1), 2.0, dtype=F64), ts),
        method=method.name,
        dt=1 / 256,
        seed=4,
    )
    for t, z in zip(ts[1:], zs[1:], strict=True):
        mean, var = 2 * math.exp(-theta * t), sigma**2 / (2 * theta) * -math.expm1(-2 * theta * t)
        assert abs(z.mean().item() - mean) < 4 * math.sqrt(var / n) + 0.003  # and the bias in dt
        assert z.var().item() == pytest.approx(var, rel=4 * math.sqrt(2 / n) + 0.003)


@methods
def test_mean_of_geometric_brownian_motion_tells_the_sense(method):
    mu, sigma, n = 0.3, 0.5, 40_000
    zs = sdeint(
        *(lambda t, z: mu * z, lambda t, z: sigma * z, torch.ones(n, 1, dtype=F64), [0.0, 1.0]),
        method=method.name,
        dt=1 / 128,
        seed=5,
    )
    rate = mu + (0.5 * sigma**2 if method.sense == "stratonovich" else 0.0)
    std = math.exp(rate) * math.sqrt(math.expm1(sigma**2))
    assert abs(zs[-1].mean().item() - math.exp(rate)) < 4 * std / math.sqrt(n) + 0.003


# Gradients


def bent(theta, phi):
    """A drift and a diagonal diffusion that bend in t, z and their parameters."""
    return (
        lambda t, z: torch.tanh(theta * z) - 0.3 * t * z**2,
        lambda t, z: 0.4 + 0.3 * torch.sin(phi * z + t),
    )


@methods
def test_gradcheck(method):
    path = brownian((3, 2), seed=6)

    def solve(z0, theta, phi):
        ts = [START, 0.8, STOP]
        return sdeint(*bent(theta, phi), z0, ts, method=method.name, dt=0.2, brownian=path)

    inputs = [torch.randn(*shape, dtype=F64, requires_grad=True) for shape in ((3, 2), (2,), (2,))]
    assert torch.autograd.gradcheck(solve, inputs)
    assert torch.autograd.gradgradcheck(solve, inputs)


@methods
def test_derivatives_of_the_path_converge(method):
    """d/dmu z = T z and d/dsigma z = (W - sigma T) z, or W z in Stratonovich's sense."""
    path = brownian((2000, 1), seed=7)
    w, span = path(START, STOP), STOP - START
    mu, sigma = (torch.full_like(w, value).requires_grad_() for value in (0.2, 0.8))
    f, g, z0, exact = geometric(method.sense, w, mu, sigma)
    shift = sigma * span if method.sense == "ito" else 0.0
    wanted = (exact * span).detach(), (exact * (w - shift)).detach()
    steps = [2**n for n in range(4, 9)]
    errors = []
    for n in steps:
        ts = [START, STOP]
        zs = sdeint(f, g, z0, ts, method=method.name, dt=span / n, brownian=path)
        got = torch.autograd.grad(zs[-1].sum(), (mu, sigma))
        errors.append([rms(a - b) for a, b in zip(got, wanted, strict=True)])
    for each in zip(*errors, strict=True):
        assert fitted(steps, each) == pytest.approx(method.order, abs=0.15)


@methods
def test_gradient_modes_give_the_same_path(method):
    path = brownian((3, 2), seed=8)
    parameter = torch.tensor([0.5, 1.5], dtype=F64)

    def solve(theta, z0):
        ts = [START, STOP]
        return sdeint(*bent(theta, theta), z0, ts, method=method.name, dt=0.1, brownian=path)

    z0 = torch.ones(3, 2, dtype=F64)
    plain = solve(parameter, z0)
    assert not plain.requires_grad  # nothing to differentiate: no graph is kept
    traced = solve(parameter.clone().requires_grad_(), z0)
    assert traced.requires_grad
    assert torch.equal(traced, plain)
    with torch.no_grad():
        silent = solve(parameter.clone().requires_grad_(), z0)
    assert not silent.requires_grad
    assert torch.equal(silent, plain)
    with torch.inference_mode():
        assert torch.equal(solve(parameter, z0 * 1), plain)


def test_milstein_sees_through_a_diffusion_without_gradients():
    path = brownian((3, 2), seed=9)
    z0 = torch.ones(3, 2, dtype=F64)
    f, g = bent(1.0, 1.0)
    ends = [
        sdeint(f, term, z0, [START, STOP], method="milstein", brownian=path)[-1]
        for term in (g, torch.no_grad()(g))
    ]
    assert torch.equal(*ends)


def test_gradients_reach_all_parameters_of_networks():
    drift, noise = (torch.nn.Linear(2, 2).double() for _ in range(2))
    for method in ("euler_maruyama", "heun"):
        sdeint(
            *(lambda t, z: drift(z), lambda t, z: torch.sigmoid(noise(z))),
            *(torch.ones(4, 2, dtype=F64), [0.0, 0.5, 1.0]),
            method=method,
            seed=0,
        ).square().sum().backward()
        for parameter in (*drift.parameters(), *noise.parameters()):
            assert parameter.grad.abs().min() > 0
            parameter.grad = None


# Steps, times, sources of randomness


@pytest.mark.parametrize("shape", [(1, 1), (5, 3), (4,), (2, 3, 4), (0, 3)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@methods
def test_keeps_shape_and_dtype(method, dtype, shape):
    z0 = torch.ones(shape, dtype=dtype)
    f, g = bent(0.5, 0.7)
    zs = sdeint(f, g, z0, torch.tensor([0.0, 0.5, 1.0]), method=method.name, dt=0.3, seed=0)
    assert (zs.shape, zs.dtype) == ((3, *shape), dtype)
    assert torch.equal(zs[0], z0)


@pytest.mark.parametrize("noise", [0.3, (), (3,), (1, 3), (5, 1), (5, 3)], ids=str)
@methods
def test_diffusion_broadcasts(method, noise):
    z0 = torch.ones(5, 3, dtype=F64)
    noise = noise if isinstance(noise, float) else torch.full(noise, 0.3, dtype=F64)
    path = brownian((5, 3), seed=0)
    got, want = (
        sdeint(lambda t, z: -z, g, z0, [START, STOP], method=method.name, dt=0.2, brownian=path)
        for g in (lambda t, z: noise, lambda t, z: torch.full_like(z, 0.3))
    )
    assert torch.equal(got, want)


@pytest.mark.parametrize(
    "ts, dt, want",
    [
        ([0.0, 1.0], None, [0.0]),
        ([0.0, 1.0], 0.25, [0.0, 0.25, 0.5, 0.75]),
        ([0.0, 1.0], 0.3, [0.0, 0.25, 0.5, 0.75]),
        ([0.0, 1.0], 7.0, [0.0]),
        ([0.0, 0.5, 2.0], 1.0, [0.0, 0.5, 1.25]),
        ([0, 1, 2], 1, [0.0, 1.0]),
        ([1.0, 1.1, 1.2], 0.1, [1.0, 1.1]),  # 1.1 - 1.0 is above 0.1 by round-off
        (torch.linspace(0, 1, 11), 0.1, [n * 0.1 for n in range(10)]),
        (np.linspace(-1, 0, 11, dtype=np.float32), 0.1, [n * 0.1 - 1 for n in range(10)]),
        ([3.0], None, []),
    ],
    ids=str,
)
def test_steps(ts, dt, want):
    seen = []

    def drift(t, z):
        assert t.shape == ()
        seen.append(t.item())
        return -z

    zs = sdeint(drift, lambda t, z: 1.0, torch.ones(2, 1, dtype=F64), ts, dt=dt, seed=0)
    assert seen == pytest.approx(want, abs=1e-7)
    assert len(zs) == len(ts)


def test_times_are_exact_after_many_steps():
    seen = []

    def drift(t, z):
        seen.append(t.item())
        return z

    sdeint(drift, lambda t, z: 1.0, torch.ones(1, 1, dtype=F64), [0.0, 1.0], dt=0.001, seed=0)
    assert seen == [n * 0.001 for n in range(1000)]


@methods
def test_saved_times_do_not_change_the_path(method):
    path = brownian((3, 2), seed=10)
    z0 = torch.ones(3, 2, dtype=F64)
    all_times = sdeint(
        *bent(0.5, 0.7), z0, [0.5, 0.75, 1.0, 1.25, 1.5], method=method.name, brownian=path
    )
    ends = sdeint(*bent(0.5, 0.7), z0, [0.5, 1.5], method=method.name, dt=0.25, brownian=path)
    assert torch.equal(all_times[[0, -1]], ends)


def test_seed_and_generator():
    def solve(**source):
        return sdeint(
            lambda t, z: -z, lambda t, z: 0.5, torch.ones(4, 2), [0.0, 1.0], dt=0.1, **source
        )

    state = torch.get_rng_state()
    assert torch.equal(solve(seed=3), solve(seed=3))
    assert not torch.equal(solve(seed=3), solve(seed=4))
    generator = torch.Generator().manual_seed(3)
    first, second = solve(generator=generator), solve(generator=generator)
    assert torch.equal(first, solve(seed=3))
    assert not torch.equal(first, second)
    assert torch.equal(torch.get_rng_state(), state)


def test_any_callable_gives_increments():
    asked = []

    def increments(s, t):
        asked.append((s, t))
        return torch.full((2, 1), t - s, dtype=F64)

    zs = sdeint(
        *(lambda t, z: 0 * z, lambda t, z: 2.0, torch.zeros(2, 1, dtype=F64), [0.0, 1.0, 3.0]),
        brownian=increments,
    )
    assert asked == [(0.0, 1.0), (1.0, 3.0)]
    assert zs[:, 0, 0].tolist() == [0.0, 2.0, 6.0]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@methods
def test_on_the_gpu(method):
    z0 = torch.ones(5, 3, device="cuda")
    path = BrownianPath((5, 3), start=0.0, stop=1.0, seed=0, device="cuda")
    f, g = bent(0.5, 0.7)
    for source in ({"seed": 0}, {"brownian": path}):
        zs = sdeint(f, g, z0, [0.0, 1.0], method=method.name, dt=0.1, **source)
        assert zs.device == z0.device
    cpu = BrownianPath((5, 3), start=0.0, stop=1.0, seed=0)
    want = sdeint(f, g, z0.cpu(), [0.0, 1.0], method=method.name, dt=0.1, brownian=cpu)
    torch.testing.assert_close(zs.cpu(), want, rtol=1e-4, atol=1e-5)


# The Brownian path

MANY = 20_000


def test_covariance_of_the_path_is_the_earlier_time():
    path = brownian((MANY,), seed=11, start=1.0, stop=3.0)
    ts = [1.0001, 1.1, 1.1 + 2**-20, 5 / 3, 2.0, 2.75, 2.9, 3.0]
    w = torch.stack([path(1.0, t) for t in ts])
    got = w @ w.T / MANY
    since = torch.tensor(ts, dtype=F64) - 1
    want = torch.minimum(since[:, None], since)
    error = ((since[:, None] * since + want**2) / MANY).sqrt()
    assert ((got - want).abs() < 4.5 * error).all()
    assert (w.mean(1).abs() < 4.5 * (since / MANY).sqrt()).all()
    for values, t in zip(w, since, strict=True):
        assert kstest(values.numpy() / math.sqrt(t), "norm").pvalue > 1e-3


@pytest.mark.parametrize(
    "ts",
    [
        np.linspace(0, 1, 65),
        np.linspace(0, 1, 48),
        [0.0, 0.001, 0.1, 0.11, 1 / 3, 0.5 - 1e-6, 0.5, 0.5 + 1e-6, 0.9, 1.0],
        0.3 + 2.0**-28 * np.arange(20),
        0.25 + 2.0**-30 * np.array([0, 0.5, 1, 1.5, 2, 2.25, 3]),
    ],
    ids=["dyadic", "even", "uneven", "tiny", "leaves"],
)
def test_increments_are_independent(ts):
    path = brownian((MANY,), seed=12, start=0.0, stop=1.0)
    steps = torch.stack([path(a, b) / math.sqrt(b - a) for a, b in pairwise(ts)])
    got = steps @ steps.T / MANY
    want = torch.eye(len(steps), dtype=F64)
    assert ((got - want).abs() < 5 * ((1 + want) / MANY).sqrt()).all()


def test_components_and_seeds_are_independent():
    paths = torch.stack(
        [brownian((MANY, 3), seed=seed)(START, 1.1) for seed in (0, 1, 2, 2**64 - 1)]
    )
    each = paths.movedim(1, 2).reshape(12, MANY) / math.sqrt(0.6)
    want = torch.eye(12, dtype=F64)
    assert ((each @ each.T / MANY - want).abs() < 5 * ((1 + want) / MANY).sqrt()).all()


TIMES = st.floats(-2.0, 5.0)


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 2**64 - 1), pairs=st.lists(st.tuples(TIMES, TIMES), min_size=1, max_size=6)
)
def test_queries_do_not_depend_on_what_was_asked(seed, pairs):
    path = brownian((2,), seed, -2.0, 5.0)
    forward = [path(*pair) for pair in pairs]
    again = [path(*pair) for pair in reversed(pairs)][::-1]
    fresh = [brownian((2,), seed, -2.0, 5.0)(*pair) for pair in pairs]
    for (s, t), a, b, c in zip(pairs, forward, again, fresh, strict=True):
        assert torch.equal(a, b)
        assert torch.equal(a, c)
        assert torch.equal(path(t, s), -a)
        torch.testing.assert_close(path(s, 1.3) + path(1.3, t), a, rtol=1e-13, atol=1e-14)


def test_reproducible_beyond_what_is_kept():
    path = brownian((2,), seed=13)
    ts = [*np.random.default_rng(0).uniform(START, STOP, 200), *np.linspace(START, STOP, 129)]
    first = [path(START, t) for t in ts]
    assert len(path._recent) <= RECENT
    assert all(torch.equal(path(START, t), w) for t, w in zip(ts[::-1], first[::-1], strict=True))
    path = brownian((2,), seed=13)
    assert all(torch.equal(path(START, t), w) for t, w in zip(ts, first, strict=True))


@pytest.mark.parametrize("span", [(0.0, 1.0), (0.1, 0.7), (-3.0, 4.0)], ids=str)
@pytest.mark.parametrize("coarse", [8, 10, 37])
def test_refinement_keeps_the_coarse_values(coarse, span):
    start, stop = span

    def values(steps):
        path = brownian((3,), 14, start, stop)
        h = (stop - start) / steps
        ts = [start + n * h for n in range(steps)] + [stop]
        return torch.stack([path(start, t) for t in ts]), torch.stack(
            [path(a, b) for a, b in pairwise(ts)]
        )

    w, _ = values(coarse)
    for factor in (2, 4, 16):
        finer, steps = values(coarse * factor)
        assert torch.equal(finer[::factor], w)
        torch.testing.assert_close(steps.cumsum(0), finer[1:], rtol=1e-12, atol=1e-12)


def test_times_that_differ_by_round_off_meet():
    path = brownian((4,), seed=15, start=0.0, stop=1.0)
    assert 3 * 0.1 != 0.3
    assert torch.equal(path(0.0, 3 * 0.1), path(0.0, 0.3))
    assert torch.equal(path(0.0, 1.0 + 1e-15), path(0.0, 1.0))
    for t in (0.25, 0.3, 0.5, 0.75, 0.9):
        for near in (math.nextafter(t, 0), math.nextafter(t, 1)):
            assert torch.equal(path(0.0, near), path(0.0, t))
    assert path(0.4, 0.4).tolist() == [0.0] * 4


def test_single_precision_is_rounded_once():
    single = BrownianPath((5,), start=START, stop=STOP, seed=16)
    double = brownian((5,), seed=16)
    assert single(0.6, 0.6 + 1e-5).dtype == torch.float32
    assert torch.equal(single(0.6, 0.6 + 1e-5), double(0.6, 0.6 + 1e-5).float())
    assert brownian((), seed=16)(0.6, 0.7).shape == ()


# Bad input

Z0 = torch.ones(3, 2)
GOOD = {
    "drift": lambda t, z: -z,
    "diffusion": lambda t, z: 0.5,
    "z0": Z0,
    "t": [0.0, 1.0],
    "seed": 0,
}
RANDOM = "exactly one of `brownian`, `seed` and `generator`, got "


def path32(shape=(3, 2), start=0.0, stop=1.0, dtype=torch.float32):
    return BrownianPath(shape, start=start, stop=stop, seed=0, dtype=dtype)


@pytest.mark.parametrize(
    "change, error, message",
    [
        (
            {"method": "milstien"},
            ArgumentError,
            "unknown method 'milstien'; did you mean 'milstein'",
        ),
        ({"method": "euler"}, ArgumentError, "unknown method 'euler'.*known: euler_maruyama, heun"),
        ({"seed": None}, ArgumentError, RANDOM + "none"),
        ({"brownian": path32()}, ArgumentError, RANDOM + "`brownian` and `seed`"),
        ({"generator": torch.Generator()}, ArgumentError, RANDOM + "`seed` and `generator`"),
        ({"seed": 1.5}, ArgumentError, "`seed` must be an integer, got float"),
        ({"seed": True}, ArgumentError, "`seed` must be an integer, got bool"),
        ({"seed": -1}, ArgumentError, "`seed` must lie between 0 and .*, got -1"),
        ({"t": []}, ArgumentError, "`t` must hold at least one time"),
        ({"t": [0.0, 1.0, 1.0]}, ArgumentError, "`t` must be increasing"),
        ({"t": [1.0, 0.0]}, ArgumentError, "`t` must be increasing"),
        ({"t": [0.0, math.nan]}, ArgumentError, "`t` must be finite"),
        ({"t": [0.0, math.inf]}, ArgumentError, "`t` must be finite"),
        ({"t": torch.zeros(2, 2)}, ShapeError, r"`t` must be a vector of times, got \(2, 2\)"),
        ({"t": 1.0}, ShapeError, r"`t` must be a vector of times, got \(\)"),
        ({"dt": 0.0}, ArgumentError, "`dt` must be a positive number, got 0.0"),
        ({"dt": -0.1}, ArgumentError, "`dt` must be a positive number, got -0.1"),
        ({"dt": math.nan}, ArgumentError, "`dt` must be a positive number, got nan"),
        ({"dt": math.inf}, ArgumentError, "`dt` must be a positive number, got inf"),
        ({"dt": "0.1"}, ArgumentError, "`dt` must be a positive number, got '0.1'"),
        (
            {"dt": 1e-300},
            ArgumentError,
            "`dt` must be above the round-off of the times, got 1e-300",
        ),
        ({"z0": torch.tensor([[math.nan]])}, ArgumentError, "`z0` must be finite"),
        ({"z0": torch.tensor(1.0)}, ShapeError, r"`z0` must be \(batch, dim\), got \(\)"),
        ({"z0": torch.ones(2, 1).long()}, ArgumentError, "`z0` must be .*, got torch.int64"),
        ({"z0": [[1.0]]}, ArgumentError, "`z0` must be a tensor .*, got list"),
        ({"drift": Z0}, ArgumentError, r"`drift` must be a callable \(t, z\), got torch.float32"),
        ({"diffusion": 0.5}, ArgumentError, r"`diffusion` must be a callable \(t, z\), got float"),
        (
            {"drift": lambda t, z: z[:, :1]},
            ShapeError,
            r"`drift\(t, z\)` must return the shape of z, \(3, 2\), got \(3, 1\)",
        ),
        ({"drift": lambda t, z: 0.0}, ShapeError, r"`drift\(t, z\)` must .*, got \(\)"),
        ({"drift": lambda t, z: None}, ArgumentError, r"`drift\(t, z\)` .* tensor, got NoneType"),
        (
            {"drift": lambda t, z: z.double()},
            ArgumentError,
            r"`drift\(t, z\)` must return the dtype of z, torch.float32, got torch.float64",
        ),
        (
            {"diffusion": lambda t, z: torch.ones(3)},
            ShapeError,
            r"`diffusion\(t, z\)` must return the shape of z or broadcast to it, .*, got \(3,\)",
        ),
        ({"diffusion": lambda t, z: torch.ones(1, 3, 2)}, ShapeError, r"got \(1, 3, 2\)"),
        ({"diffusion": lambda t, z: z.double()}, ArgumentError, r"`diffusion\(t, z\)` .* dtype"),
        ({"diffusion": lambda t, z: "1"}, ArgumentError, r"`diffusion\(t, z\)` .*, got str"),
        ({"seed": None, "brownian": 3}, ArgumentError, "`brownian` must be a callable .*, got int"),
        (
            {"seed": None, "brownian": path32((3, 1))},
            ShapeError,
            r"`brownian` must have the shape of `z0`, \(3, 2\), got \(3, 1\)",
        ),
        (
            {"seed": None, "brownian": lambda s, t: torch.zeros(2)},
            ShapeError,
            r"`brownian` must have the shape of `z0`, \(3, 2\), got \(2,\)",
        ),
        (
            {"seed": None, "brownian": path32(dtype=torch.float64)},
            ArgumentError,
            "`brownian` must have the dtype of `z0`, torch.float32, got torch.float64",
        ),
        (
            {"seed": None, "brownian": path32(stop=0.9)},
            ArgumentError,
            "`t` must lie within the span of `brownian`, 0.0 to 0.9, got 0.0 to 1.0",
        ),
    ],
)
def test_bad_arguments(change, error, message):
    steps = []

    def drift(t, z):
        steps.append(z)
        return GOOD["drift"](t, z)

    with pytest.raises(error, match=message):
        sdeint(**{**GOOD, "drift": drift, **change})
    assert len(steps) <= ("diffusion" in change)  # found before the first step is taken


@pytest.mark.parametrize(
    "diffusion",
    [
        lambda t, z: z.flip(1),
        lambda t, z: z.square().sum(1, keepdim=True),
        lambda t, z: z - z.mean(0),
        lambda t, z: torch.sin(z + 0.1 * z.sum(1, keepdim=True)),
    ],
    ids=["crossed", "norm", "centred", "mixed"],
)
def test_milstein_refuses_noise_that_is_not_diagonal(diffusion):
    with pytest.raises(ArgumentError, match="must depend on the same component of z only"):
        sdeint(**{**GOOD, "z0": torch.randn(3, 2), "diffusion": diffusion}, method="milstein")


def test_a_state_that_blows_up_is_named():
    z0 = torch.tensor([[0.0, 0.1], [30.0, 0.2], [0.1, 0.0]])
    message = r"not finite at t=2 in 1 of 3 samples \(all were at t=1\)"
    with pytest.raises(SolveError, match=message):
        sdeint(
            *(lambda t, z: z**3 * (t >= 1), lambda t, z: 0.0, z0, [0.0, 1.0, 2.0, 3.0]),
            dt=0.1,
            seed=0,
        )


def test_errors_of_the_callables_pass_through():
    def drift(t, z):
        raise ZeroDivisionError("mine")

    with pytest.raises(ZeroDivisionError, match="mine"):
        sdeint(**{**GOOD, "drift": drift})


@pytest.mark.parametrize(
    "change, error, message",
    [
        ({"stop": 0.0}, ArgumentError, "`start` must lie before `stop`, got 0.0 and 0.0"),
        ({"stop": -1.0}, ArgumentError, "`start` must lie before `stop`, got 0.0 and -1.0"),
        ({"stop": math.nan}, ArgumentError, "`start` must lie before `stop`"),
        ({"stop": math.inf}, ArgumentError, "`start` must lie before `stop`"),
        ({"seed": -1}, ArgumentError, "`seed` must lie between 0 and .*, got -1"),
        ({"seed": 2**64}, ArgumentError, "`seed` must lie between 0 and"),
        ({"seed": "a"}, ArgumentError, "`seed` must be an integer, got str"),
        ({"dtype": torch.int64}, ArgumentError, "`dtype` must be a floating-point type"),
        ({"shape": (2, -1)}, ShapeError, r"`shape` must hold no negative size, got \(2, -1\)"),
    ],
)
def test_bad_paths(change, error, message):
    with pytest.raises(error, match=message):
        BrownianPath(**{"shape": (2,), "start": 0.0, "stop": 1.0, "seed": 0, **change})


@pytest.mark.parametrize("time", [-0.1, 1.001, math.nan, math.inf])
def test_times_outside_the_path(time):
    with pytest.raises(ArgumentError, match=r"`t` must lie between 0.0 and 1.0, the span of this"):
        path32()(0.5, time)
    with pytest.raises(ArgumentError, match="`s` must lie between"):
        path32()(time, 0.5)
