"""PCP-Map and the block-triangular form, where the answer is known."""

import copy
import math
import pickle

import numpy as np
import pytest
import torch
from torch import nn
from torch.distributions import MultivariateNormal
from torch.func import jacrev, vmap

import pathline as pl
from pathline.errors import ArgumentError, DataError, ModelError, ShapeError
from pathline.export import export_flow
from pathline.flows import ConditionalOTFlow, JointMap, OTFlow, PCPMap
from pathline.flows.pcp import log_determinant
from pathline.train import Rows

SUPPORT = [(0.0, None), (-1.0, 2.0), (None, 3.0)]


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def some_map(dim=2, context_dim=0, *, seed=0, **options):
    """A map that bends, in skewed coordinates."""
    options = {"width": 12, "depth": 3} | options
    flow = PCPMap(dim, context_dim, generator=generator(seed), **options).double()
    with torch.no_grad():
        for parameter in flow.potential.parameters():
            noise = torch.randn(parameter.shape, generator=generator(seed)).double()
            parameter.add_(0.3 * noise)
        for weight in [*flow.potential.input_weights, *flow.potential.hidden_weights]:
            weight.mul_(2)
        flow.potential.project()
        flow.standardize.mean.copy_(torch.randn(dim, generator=generator(seed)))
        noise = torch.randn(dim, dim, generator=generator(seed)).double()
        flow.standardize.scale.copy_(torch.eye(dim) + 0.15 * noise)
        if context_dim:
            flow.standardize.slope.copy_(torch.randn(dim, context_dim, generator=generator(seed)))
            flow.standardize.context_scale.fill_(2.0)
    return flow.requires_grad_(False)


def points(flow, rows):
    """Points inside the support, and contexts."""
    context = torch.randn(rows, flow.context_dim).double() if flow.context_dim else None
    return flow.from_reference(torch.randn(rows, flow.dim).double(), context), context


def gaussian(dim, context_dim, rows, seed=0):
    """Pairs of a joint Gaussian, the conditional Brenier map, and its density.

    x | y ~ N(mu + B y, S) where S has a unit diagonal, as the flow works in units of standard
    deviations: then T = S^(-1/2) (x - mu - B y).
    """
    rng = np.random.default_rng(seed)
    B, mu = rng.normal(size=(dim, context_dim)), rng.normal(size=dim)
    L = np.eye(dim) + 0.5 * rng.normal(size=(dim, dim)) / math.sqrt(dim)
    S = L @ L.T
    S /= np.sqrt(np.outer(np.diag(S), np.diag(S)))
    values, vectors = np.linalg.eigh(S)
    y = rng.normal(size=(rows, context_dim)) * 3 + 1
    x = mu + y @ B.T + rng.normal(size=(rows, dim)) @ np.linalg.cholesky(S).T
    T = (vectors / np.sqrt(values)) @ vectors.T
    floor = 0.5 * np.linalg.slogdet(2 * math.pi * math.e * S)[1]
    return x, y, lambda x, y: (x - mu - y @ B.T) @ T, floor


def check_gaussian(kind, dim, context_dim, rows, steps, batch_size):
    x, y, brenier, floor = gaussian(dim, context_dim, rows + 2000)
    flow = kind(dim, context_dim, width=32 if dim > 2 else 16, depth=2, generator=generator())
    data = x[:rows], y[:rows]
    pl.fit(flow, data, max_steps=steps, batch_size=batch_size, learning_rate=0.01, progress=False)
    x, y = x[rows:], y[rows:]
    with torch.no_grad():
        z = flow.to_reference(torch.from_numpy(x), torch.from_numpy(y)).numpy()
        log_prob = flow.log_prob(torch.from_numpy(x), torch.from_numpy(y)).numpy()
    want = brenier(x, y)
    assert np.sqrt(np.square(z - want).mean() / np.square(want).mean()) < 0.02
    # the entropy is the mean over all rows: against that of these rows, |z|^2 has no noise
    noise = (np.square(want).sum(1).mean() - dim) / 2
    assert abs(-log_prob.mean() - noise - floor) < 0.01 * dim
    return flow, torch.from_numpy(x), torch.from_numpy(y)


@pytest.mark.parametrize("kind", [ConditionalOTFlow, PCPMap])
def test_joint_gaussian_is_the_conditional_brenier_map(kind):
    check_gaussian(kind, 2, 3, rows=100_000, steps=200, batch_size=2048)


@pytest.mark.slow
@pytest.mark.parametrize("dim", [2, 10])
@pytest.mark.parametrize("kind", [ConditionalOTFlow, PCPMap])
def test_joint_gaussian_after_long_training(kind, dim):
    flow, x, y = check_gaussian(kind, dim, dim, rows=200_000, steps=600, batch_size=4096)
    assert flow.inverse_error(x, y) < 1e-4
    if kind is PCPMap:
        assert flow.smallest_curvature(x, y).min() > 0


@pytest.mark.parametrize(("dim", "context_dim", "depth"), [(1, 0, 1), (2, 3, 3), (4, 2, 2)])
def test_monotone_everywhere(dim, context_dim, depth):
    flow = some_map(dim, context_dim, depth=depth)
    x = 10 * torch.randn(500, dim).double()
    context = 5 * torch.randn(500, context_dim).double() if context_dim else None
    assert flow.smallest_curvature(x, context).min() > 0
    # (T(a) - T(b)) . (a - b) > 0 in the coordinates in which T is a gradient
    z = flow.to_reference(x, context)
    if context is not None:
        context = context[:1].expand(500, -1)
        z = flow.to_reference(x, context)
    y, _ = flow.standardize(x, context)
    assert ((z[1:] - z[:-1]) * (y[1:] - y[:-1])).sum(1).min() > 0


@pytest.mark.parametrize("model", [torch.float32, torch.float64])
@pytest.mark.parametrize(("dim", "context_dim"), [(1, 1), (2, 0), (5, 3)])
def test_inverse(dim, context_dim, model):
    """T(g(z; y); y) = z, to the tolerance of the solve and the rounding of g."""
    flow = some_map(dim, context_dim).to(model)
    z = 2 * torch.randn(300, dim).double()
    context = torch.randn(300, context_dim).double() if context_dim else None
    x = flow.from_reference(z, context)
    assert x.dtype == torch.float64
    assert (flow.to_reference(x, context) - z).abs().max() < 1e-4
    assert flow.inverse_error(x, context) < 1e-4
    drawn, log_prob = flow.sample_with_log_prob(300, context, seed=0)
    torch.testing.assert_close(log_prob, flow.log_prob(drawn, context), rtol=1e-4, atol=1e-3)
    torch.testing.assert_close(drawn, flow.sample(300, context, seed=0), rtol=0, atol=0)


@pytest.mark.parametrize(
    ("dim", "context_dim", "support"), [(1, 2, None), (3, 0, SUPPORT), (3, 2, SUPPORT)]
)
def test_log_prob_is_that_of_the_jacobian(dim, context_dim, support):
    flow = some_map(dim, context_dim, support=support)
    x, context = points(flow, 20)

    def carry(x, context):
        given = None if context is None else context[None]
        return flow.carry(*flow.coordinates(x[None], given)[:2], log_det=False)[0][0]

    # autograd of the map as it is, with the standardisation in it
    arguments = (x, context)
    J = vmap(jacrev(carry), in_dims=(0, None if context is None else 0))(*arguments)
    z = flow.to_reference(x, context)
    want = MultivariateNormal(torch.zeros(dim).double(), torch.eye(dim).double()).log_prob(z)
    want = want + torch.linalg.slogdet(J).logabsdet
    torch.testing.assert_close(flow.log_prob(x, context), want, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("context_dim", [0, 2])
def test_density_integrates_to_one(context_dim):
    flow = some_map(2, context_dim)
    context = torch.ones(2).double() if context_dim else None
    x = flow.sample(500, context, seed=0)
    axes = [torch.linspace(a - 6, b + 6, 300).double() for a, b in zip(*x.aminmax(dim=0))]  # noqa: B905
    density = flow.log_prob(torch.cartesian_prod(*axes), context).exp()
    cell = math.prod((axis[1] - axis[0]).item() for axis in axes)
    assert density.sum().item() * cell == pytest.approx(1, abs=1e-3)


def test_bounded_density_stays_within_its_bounds():
    flow = some_map(2, 1, support=[(-1.0, 2.0), (0.0, 1.0)])
    context = torch.zeros(1).double()
    x = flow.sample(5000, context, seed=0)
    assert ((x > torch.tensor([-1.0, 0.0])) & (x < torch.tensor([2.0, 1.0]))).all()
    outside = torch.tensor([[-1.0, 0.5], [0.0, 1.5], [3.0, -1.0]]).double()
    assert flow.log_prob(outside, context).isneginf().all()
    assert (flow.rank(outside, context) == 1).all()
    cells = 600
    centres = (torch.arange(cells).double() + 0.5) / cells
    grid = torch.cartesian_prod(3 * centres - 1, centres)
    mass = flow.log_prob(grid, context).exp().sum().item() * 3 / cells**2
    assert mass == pytest.approx(1, abs=2e-3)


def test_check():
    flow = some_map(2, 2).float()
    x, context = points(flow, 500)
    check = flow.check(x, context)
    assert check.passed, check.verdict
    assert check.inverse_error < 1e-4 and check.nll == check.nll_fine
    assert ", in closed form and " in check.verdict and flow.grid.startswith("none")


def test_samples_can_be_differentiated():
    """By the implicit function theorem: the gradients of a sample are finite differences."""
    flow = some_map(2, 1)
    z, context = torch.randn(3, 2).double(), torch.randn(3, 1).double().requires_grad_()

    def draw(z, context):
        return flow.from_reference(z, context)

    assert torch.autograd.gradcheck(draw, (z.requires_grad_(), context), atol=1e-4)


def test_objective_is_the_negative_log_likelihood():
    flow = some_map(2, 2).requires_grad_(True)
    x, context = points(flow, 50)
    x = x.detach()
    objective, batch = flow.objective(), torch.cat([x, context], 1)
    slope = flow.standardize(x, context)[1]
    want = slope - flow.log_prob(x, context)  # in standardised units
    torch.testing.assert_close(objective.validate(batch), want.detach())
    torch.testing.assert_close(objective(batch).total, want.mean())
    weights = torch.rand(50).double()
    torch.testing.assert_close(objective(batch, weights).total, (weights * want).mean())
    objective(batch).total.backward()
    assert all(p.grad.isfinite().all() for p in flow.potential.parameters())


def test_log_determinant_refuses_what_is_not_positive():
    matrices = torch.stack([torch.eye(2), torch.tensor([[1.0, 2.0], [2.0, 1.0]])])
    first, second = log_determinant(matrices)
    assert first == 0 and second.isnan()


def moons(rows=2000, seed=0):
    rng = np.random.default_rng(seed)
    y = rng.uniform(-1, 1, size=(rows, 2))
    angle = rng.uniform(0, math.pi, size=rows)
    x = np.stack([np.cos(angle), np.sin(angle)], 1) * (1 + y[:, :1] / 2)
    return x + 0.1 * rng.normal(size=(rows, 2)), y


def test_training_keeps_the_map_monotone():
    """Each step projects; a linear flow starts with a loss that the map then undercuts."""
    flow = PCPMap(2, 2, width=16, depth=2, generator=generator())
    run = pl.fit(flow, moons(), max_steps=100, learning_rate=0.05, progress=False)
    assert all((W >= 0).all() for W in flow.potential.hidden_weights)
    assert any((W == 0).any() for W in flow.potential.hidden_weights)
    assert run.validation < 2.0 < run.history[0]["loss"]
    x, y = map(torch.from_numpy, moons(seed=1))
    assert flow.smallest_curvature(x, y).min() > 0


def test_weights_are_repetitions():
    x, y = moons(64)
    weights = np.arange(64) % 3
    held = moons(64, seed=1)
    repeated = np.repeat(np.arange(64), weights)
    flows = [PCPMap(2, 2, width=6, depth=2, generator=generator()).double() for _ in range(2)]
    options = {"validation": held, "max_steps": 3, "progress": False}
    pl.fit(flows[0], (x, y), sample_weight=weights, **options)
    pl.fit(flows[1], (x[repeated], y[repeated]), **options)
    # the whole data are the batch, and what is drawn for the start is not used
    for a, b in zip(flows[0].parameters(), flows[1].parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-8)


def test_resumed_run_is_the_uninterrupted_one(tmp_path):
    def run(out, steps, **options):
        flow = PCPMap(2, 2, width=8, depth=2, generator=generator())
        objective = flow.objective()
        if steps:
            count = iter(range(steps))

            def stop(self=objective):
                flow.potential.project()
                if next(count, None) is None:
                    raise KeyboardInterrupt

            objective.constrain = stop
        pl.fit(objective, moons(300), max_steps=40, out=out, progress=False, **options)
        return flow

    whole = run(tmp_path / "a", 0)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "b", 23)
    resumed = run(tmp_path / "b", 0, resume=True)
    for a, b in zip(whole.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("kind", ["features", "module"])
def test_embedding(kind, tmp_path):
    own = nn.Linear(4, 3)
    flow = some_map(2, 4, embedding=5 if kind == "features" else own)
    assert flow.potential.context_dim == (5 if kind == "features" else 3)
    x, context = points(flow, 10)
    plain = some_map(2, flow.potential.context_dim)
    plain.potential.load_state_dict(flow.potential.state_dict())
    features = flow.embedding((context - flow.standardize.context_mean) / 2.0)
    y = flow.standardize(x, context)[0]
    torch.testing.assert_close(flow.to_reference(x, context), plain.carry(y, features)[0])
    if kind == "features":
        pl.save(flow, tmp_path / "model")
        loaded = pl.load(tmp_path / "model")
        assert torch.equal(loaded.log_prob(x, context), flow.log_prob(x, context))
        flow = PCPMap(2, 4, embedding=5, generator=generator())
        batch = torch.randn(30, 6).double()
        flow.objective()(batch).total.backward()
        assert all(p.grad.abs().sum() > 0 for p in flow.embedding.parameters())
    else:
        with pytest.raises(ModelError, match="`embedding` of your own"):
            pl.save(flow, tmp_path / "model")
    with pytest.raises(ArgumentError, match="`embedding` needs a context"):
        PCPMap(2, embedding=3)


def copies(flow, tmp_path):
    pl.save(flow, tmp_path / "model")
    return copy.deepcopy(flow), pickle.loads(pickle.dumps(flow)), pl.load(tmp_path / "model")


def test_copies_of_the_map(tmp_path):
    flow = some_map(3, 2, support=SUPPORT).float()
    x, context = points(flow, 20)
    for other in copies(flow, tmp_path):
        assert type(other) is PCPMap and other.config() == flow.config()
        assert torch.equal(other.log_prob(x, context), flow.log_prob(x, context))
        assert torch.equal(other.sample(5, context[0], seed=1), flow.sample(5, context[0], seed=1))


@pytest.mark.parametrize("rows", [0, 1, 7])
def test_chunks_change_nothing(monkeypatch, rows):
    flow = some_map(2, 2)
    x, context = points(flow, rows)
    want = flow.log_prob(x, context), flow.to_reference(x, context)
    monkeypatch.setattr(PCPMap, "chunk_rows", lambda self: 3)
    torch.testing.assert_close((flow.log_prob(x, context), flow.to_reference(x, context)), want)
    assert flow.sample(rows, torch.zeros(2), seed=0).shape == (rows, 2)


def test_errors():
    flow = PCPMap(2, 3)
    with pytest.raises(ShapeError, match=r"`x` must be \(batch, 2\), got \(4, 3\)"):
        flow.log_prob(torch.zeros(4, 3), torch.zeros(3))
    with pytest.raises(ShapeError, match=r"`context` must be \(3,\) or \(4, 3\), got \(5, 3\)"):
        flow.log_prob(torch.zeros(4, 2), torch.zeros(5, 3))
    with pytest.raises(ShapeError, match=r"`context` must be .*, got None"):
        flow.sample(4)
    with pytest.raises(ShapeError, match="`context` must be None"):
        PCPMap(2).log_prob(torch.zeros(4, 2), torch.zeros(4, 1))
    with pytest.raises(ShapeError, match=r"`data` must be a pair \(x, context\) with 2 and 3"):
        pl.fit(flow, np.zeros((10, 4)), progress=False)
    with pytest.raises(DataError, match="bounds of column 1"):
        bounded = PCPMap(2, support=[(None, None), (0.0, 1.0)])
        bounded.check_rows(Rows(np.full((3, 2), 2.0)))
    for options, text in [
        ({"width": 0}, "`width` must be a positive integer"),
        ({"depth": 0}, "`depth` must be a positive integer"),
        ({"support": [(0.0, 1.0)]}, "`support` must hold 2 pairs"),
    ]:
        with pytest.raises(ArgumentError, match=text):
            PCPMap(2, **options)
    with pytest.raises(ArgumentError, match="`dim` must be a positive integer, got 0"):
        PCPMap(0)


def test_export_is_refused(tmp_path):
    """The inverse is an iteration whose length depends on the row."""
    with pytest.raises(ArgumentError, match="got PCPMap"):
        export_flow(PCPMap(2, 2), tmp_path / "out", to="torch-export")
    assert not (tmp_path / "out").exists()


# The block-triangular form


def some_joint():
    marginal = OTFlow(1, 8, generator=generator()).double().requires_grad_(False)
    marginal.standardize.mean.fill_(2.0)
    return JointMap(marginal, some_map(1, 1))


def test_joint_density():
    joint = some_joint()
    x, context = joint.sample(4000, seed=0)
    axes = [torch.linspace(a.min() - 4, a.max() + 4, 250).double() for a in (x, context)]
    grid = torch.cartesian_prod(*axes)
    density = joint.log_prob(grid[:, :1], grid[:, 1:]).exp()
    cell = math.prod((axis[1] - axis[0]).item() for axis in axes)
    assert density.sum().item() * cell == pytest.approx(1, abs=1e-3)
    # samples are of that density: their first two moments, within four standard errors
    drawn = torch.cat([x, context], 1)
    mean = (density[:, None] * grid).sum(0) * cell
    covariance = ((density[:, None] * (grid - mean)).mT @ (grid - mean)) * cell
    error = covariance.diagonal().sqrt() / math.sqrt(len(drawn))
    assert ((drawn.mean(0) - mean).abs() < 4 * error).all()
    scale = torch.outer(error, error).sqrt() * covariance.diagonal().mean().sqrt() * 2
    assert ((drawn.mT.cov() - covariance).abs() < 4 * scale).all()


def test_joint_map_is_block_triangular():
    joint = some_joint()
    x, context = joint.sample(50, seed=3)
    again = joint.sample(50, seed=3)
    assert torch.equal(x, again[0]) and torch.equal(context, again[1])
    z, z_context = joint.to_reference(x, context)
    back = joint.from_reference(z, z_context)
    torch.testing.assert_close(back, (x, context), rtol=1e-5, atol=1e-5)
    assert abs(np.corrcoef(z[:, 0], z_context[:, 0])[0, 1]) < 0.5
    moved = joint.to_reference(x + 1, context)
    assert torch.equal(moved[1], z_context)


def test_joint_copies_and_errors(tmp_path):
    joint = some_joint()
    x, context = joint.sample(20, seed=0)
    for other in copies(joint, tmp_path):
        assert torch.equal(other.log_prob(x, context), joint.log_prob(x, context))
    with pytest.raises(ArgumentError, match="`marginal` must be a density of the context"):
        JointMap(OTFlow(2), PCPMap(1, 3))
    with pytest.raises(ArgumentError, match="`context_dim` 3"):
        JointMap(PCPMap(3, 3), PCPMap(1, 3))
