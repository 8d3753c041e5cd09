import dataclasses
import math

import pytest
import torch

from pathline.data import TOYS, Moons
from pathline.errors import ShapeError

each = pytest.mark.parametrize("name", TOYS)
N = 20_000  # points
# -E log p in nats, by Monte Carlo of earlier implementations, with their round-off
KNOWN = {"8gaussians": 2.833, "swissroll": 2.679, "circles": 3.276, "moons": 2.397}


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def grid(step, half=6.0):
    """Midpoints of cells of a square, (n, 2)."""
    line = torch.arange(-half + step / 2, half, step, dtype=torch.float64)
    return torch.cartesian_prod(line, line)


@each
def test_integrates_to_one_and_entropy(name):
    step = 0.1
    toy, x = TOYS[name], grid(step)
    log_p = toy.log_prob(x)
    p = log_p.exp()
    assert float(p.sum()) * step**2 == pytest.approx(1, abs=1e-5)
    entropy = -float((p * log_p)[p > 0].sum()) * step**2
    assert toy.entropy == pytest.approx(entropy, abs=1e-4)
    assert toy.entropy == pytest.approx(KNOWN.get(name, toy.entropy), abs=0.012)


@each
def test_samples_have_the_density(name):
    """A chi-square test on cells of side 0.5, and the mean of log p."""
    toy, step = TOYS[name], 0.5
    x = toy.sample(N, seeded())
    log_p = toy.log_prob(x)
    assert log_p.isfinite().all()
    standard_error = float(log_p.std()) / math.sqrt(N)
    assert float(-log_p.mean()) == pytest.approx(toy.entropy, abs=4 * standard_error + 1e-12)

    fine = step / 5
    points = grid(fine)
    cells = int(12 / step)

    def cell(x):
        i, j = ((x + 6) / step).floor().long().unbind(1)
        return i * cells + j

    mass = toy.log_prob(points).exp() * fine**2
    expected = N * torch.zeros(cells**2).double().index_add(0, cell(points), mass)
    observed = torch.bincount(cell(x), minlength=cells**2)
    often = expected > 10
    rest = N - expected[often].sum(), N - observed[often].sum()
    chi2 = float(((observed - expected) ** 2 / expected)[often].sum())
    degrees = int(often.sum())
    assert abs(chi2 - degrees) < 4.5 * math.sqrt(2 * degrees)
    assert abs(float(rest[0] - rest[1])) <= 5 * math.sqrt(max(float(rest[0]), 1))


@each
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_seed_and_dtype(name, dtype):
    toy = TOYS[name]
    one, two, other = (toy.sample(50, seeded(seed), dtype) for seed in (3, 3, 4))
    assert (one.shape, one.dtype) == ((50, 2), dtype)
    assert torch.equal(one, two)
    assert not torch.equal(one, other)
    assert toy.log_prob(one).dtype == torch.float64
    assert toy.log_prob(one).shape == (50,)
    assert toy.log_prob(one[:0]).shape == toy.sample(0)[:, 0].shape == (0,)


@each
def test_far_points_are_finite(name):
    log_p = TOYS[name].log_prob(torch.tensor([[50.0, -50.0], [0.0, 0.0]]))
    assert not log_p.isnan().any()
    assert log_p.isfinite().all() or name == "checkerboard"


@each
def test_score_is_the_gradient(name):
    """log_prob is differentiable, where the density is smooth."""
    if name in ("checkerboard", "pinwheel"):
        pytest.skip("piecewise constant; roots by bisection")
    x = TOYS[name].sample(3, seeded()).requires_grad_()
    assert torch.autograd.gradcheck(TOYS[name].log_prob, (x,))


@each
def test_parameters_are_fields(name):
    toy = TOYS[name]
    assert toy == type(toy)()
    for field in dataclasses.fields(toy):
        if field.name in ("noise", "std", "radial_std"):
            changed = dataclasses.replace(toy, **{field.name: 2 * getattr(toy, field.name)})
            assert changed.entropy is None
            assert not torch.equal(changed.sample(9, seeded()), toy.sample(9, seeded()))
    with pytest.raises(dataclasses.FrozenInstanceError):
        toy.noise = 1.0


def test_changed_parameters_integrate_to_one():
    p = Moons(noise=0.2, scale=1.5).log_prob(grid(0.1)).exp()
    assert float(p.sum()) * 0.01 == pytest.approx(1, abs=1e-8)


def test_shape():
    with pytest.raises(ShapeError, match=r"\(n, 2\), got \(3,\)"):
        TOYS["moons"].log_prob(torch.zeros(3))
