"""OT-Flow's densities, samples and objective where the answer is known."""

import copy
import math
import pickle
from contextlib import nullcontext

import numpy as np
import pytest
import torch
from scipy.optimize import minimize
from torch.distributions import MultivariateNormal

import pathline as pl
from pathline import calculus, native
from pathline.errors import ArgumentError, DataError, ShapeError
from pathline.flows import FlowObjective, OTFlow, Standardize
from pathline.train import Distrust, Rows

SUPPORT = [(0.0, None), (None, 3.0), (-1.0, 2.0), (None, None)]
INSIDE = torch.tensor(
    [[0.5, 2.0, 0.3, -4.0], [3.0, -7.0, 1.9, 0.0], [1e-3, 2.999, -0.999, 9.0]],
    dtype=torch.float64,
)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def some_flow(dim=2, width=16, *, wild=1.0, seed=0, **kwargs):
    """A flow that bends: random features with larger outer weights, in skewed coordinates."""
    flow = OTFlow(dim, width, generator=generator(seed), **kwargs).double()
    with torch.no_grad():
        rows = torch.randn(200, dim, generator=generator(seed)).double()
        flow.potential.random_features(rows, 1.0, generator(seed))
        flow.potential.w.mul_(2 * wild)
        flow.potential.A.mul_(2 * wild)
        flow.potential.b.copy_(0.3 * torch.randn(dim + 1, generator=generator(seed)))
        flow.standardize.mean.copy_(torch.randn(dim, generator=generator(seed)))
        noise = torch.randn(dim, dim, generator=generator(seed)).double()
        flow.standardize.scale.copy_(torch.eye(dim) + 0.15 * noise)
    return flow


def linear_flow(dim=3, steps=64):
    """w = 0, so that the velocity is affine, z' = -(Q z + q t + b), and its density Gaussian."""
    flow = some_flow(dim, steps=steps)
    with torch.no_grad():
        flow.potential.w.zero_()
    A, b = flow.potential.A.detach(), flow.potential.b.detach()
    Q = A.T @ A
    # (z, t, 1)' = G (z, t, 1): its flow is one matrix exponential.
    G = torch.zeros(dim + 2, dim + 2, dtype=torch.float64)
    G[:dim, : dim + 1] = -Q[:dim]
    G[:dim, dim + 1] = -b[:dim]
    G[dim, dim + 1] = 1
    E = torch.linalg.matrix_exp(G)
    S = flow.standardize
    # z(1) = E_zz scale^-1 (x - mean) + E_z1, so x = mean + M (z - E_z1)
    M = S.scale @ torch.linalg.inv(E[:dim, :dim])
    return flow, MultivariateNormal(S.mean - M @ E[:dim, dim + 1], M @ M.T), E


# Densities and samples


def test_log_prob_of_a_linear_flow_is_gaussian():
    flow, gaussian, E = linear_flow()
    x = gaussian.sample((50,))
    with torch.no_grad():
        got = flow.log_prob(x)
        z = flow.to_reference(x)
    torch.testing.assert_close(got, gaussian.log_prob(x), rtol=1e-6, atol=1e-6)
    y, _ = flow.standardize(x)
    torch.testing.assert_close(z, y @ E[:3, :3].T + E[:3, 4], rtol=1e-6, atol=1e-6)


def test_samples_of_a_linear_flow_are_gaussian():
    flow, gaussian, _ = linear_flow(steps=16)
    x = flow.sample(20_000, seed=0)
    error = (x.mean(0) - gaussian.mean) / (gaussian.variance / 20_000).sqrt()
    assert error.abs().max() < 4
    white = torch.linalg.solve(
        torch.linalg.cholesky(gaussian.covariance_matrix), (x - gaussian.mean).T
    )
    assert (torch.cov(white) - torch.eye(3)).abs().max() < 0.04


@pytest.mark.parametrize("dim", [1, 2])
def test_density_integrates_to_one(dim):
    """On a grid in the user's units; a dropped log-determinant or scale shows at once."""
    flow = some_flow(dim, wild=0.5, seed=1, steps=32)
    with torch.no_grad():
        x = flow.sample(4000, seed=0)
        low, high = x.amin(0) - 4, x.amax(0) + 4
        axes = [torch.linspace(a, b, 200).double() for a, b in zip(low, high, strict=True)]
        grid = torch.cartesian_prod(*axes).reshape(-1, dim)
        cell = math.prod((axis[1] - axis[0]).item() for axis in axes)
        density = flow.log_prob(grid).exp()
    assert density.sum().item() * cell == pytest.approx(1, abs=1e-3)
    mean = (density[:, None] * grid).sum(0) * cell
    torch.testing.assert_close(mean, x.mean(0), rtol=0, atol=0.1)  # samples follow the density


def test_log_det_of_the_whole_map():
    """log p(x) = log N(z(x)) + log |det dz/dx|, with the Jacobian by differentiation."""
    flow = some_flow(3, steps=64)
    x = flow.sample(6, seed=0)
    J = calculus.jacobian(flow.to_reference, x).detach()
    z = flow.to_reference(x).detach()
    normal = -0.5 * z.square().sum(1) - 1.5 * math.log(2 * math.pi)
    want = normal + torch.linalg.slogdet(J).logabsdet
    torch.testing.assert_close(flow.log_prob(x).detach(), want, rtol=0, atol=1e-5)


def test_round_trip():
    flow = some_flow(3)
    errors = []
    with torch.no_grad():
        z = torch.randn(40, 3).double()
        for flow.steps in (16, 32):
            x = flow.from_reference(z)
            errors.append((flow.to_reference(x) - z).abs().max())
    assert errors[1] < 1e-4
    assert errors[0] / errors[1] > 14


@pytest.mark.parametrize("support", [None, SUPPORT], ids=["free", "bounded"])
def test_sample_with_log_prob(support):
    flow = some_flow(4, steps=64, support=support)
    x, log_prob = flow.sample_with_log_prob(30, seed=3)
    assert torch.equal(x, flow.sample(30, seed=3))
    with torch.no_grad():
        torch.testing.assert_close(log_prob, flow.log_prob(x), rtol=0, atol=1e-4)


def test_seeds():
    flow = some_flow()
    first = flow.sample(6, seed=1)
    state = torch.get_rng_state()
    assert torch.equal(first, flow.sample(6, seed=1))
    assert torch.equal(state, torch.get_rng_state())
    assert not torch.equal(first, flow.sample(6, seed=2))
    torch.manual_seed(4)
    global_one = flow.sample(6)
    assert not torch.equal(global_one, flow.sample(6))
    torch.manual_seed(4)
    assert torch.equal(global_one, flow.sample(6))


def test_trajectory():
    flow = some_flow()
    x = flow.sample(5, seed=0)
    with torch.no_grad():
        path = flow.trajectory(x, steps=7)
        assert path.shape == (8, 5, 2)
        assert torch.equal(path[0], flow.standardize(x)[0])
        torch.testing.assert_close(
            flow.trajectory(x)[-1], flow.to_reference(x), rtol=1e-13, atol=1e-13
        )
        assert len(flow.trajectory(x)) == flow.steps + 1


def test_costs_are_in_standardised_units():
    flow, _, _ = linear_flow()
    with torch.no_grad():
        flow.potential.A.zero_()
    b = flow.potential.b.detach()
    costs = flow.costs(torch.randn(5, 3))
    assert costs["transport"] == pytest.approx((0.5 * b[:3] @ b[:3]).item())
    assert costs["hjb"] == pytest.approx((b[3] - 0.5 * b[:3] @ b[:3]).abs().item())


@pytest.mark.parametrize("rows", [1, 3, 1000])
def test_chunks_change_nothing(monkeypatch, rows):
    flow = some_flow()
    x, z = flow.sample(10, seed=0), torch.randn(10, 2).double()
    weight = torch.randn(10).double()

    def results():
        x_, z_ = x.clone().requires_grad_(), z.clone().requires_grad_()
        values = [flow.log_prob(x_), flow.to_reference(x_)[:, 0]]
        values += [flow.from_reference(z_)[:, 1], flow.from_reference_with_log_prob(z_)[1]]
        loss = sum((weight * value).sum() for value in values)
        return [*values, *torch.autograd.grad(loss, [x_, z_, *flow.parameters()])]

    whole = results()
    monkeypatch.setattr(OTFlow, "chunk_rows", lambda self: rows)
    for a, b in zip(results(), whole, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


def test_log_prob_gradient():
    flow = some_flow(2, 4, steps=3)
    x = flow.sample(3, seed=0).requires_grad_()
    assert torch.autograd.gradcheck(flow.log_prob, x)
    assert torch.autograd.gradcheck(lambda z: flow.from_reference_with_log_prob(z), x)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("model", [torch.float32, torch.float64])
def test_input_precision_is_kept(dtype, model):
    flow = some_flow()
    flow.potential.to(model)
    x = flow.sample(4, seed=0).to(dtype)
    assert flow.log_prob(x).dtype == flow.to_reference(x).dtype == dtype
    assert flow.from_reference(x).dtype == dtype
    assert flow.sample(2).dtype == model
    torch.testing.assert_close(
        flow.log_prob(x).double(), some_flow().log_prob(x.double()), rtol=1e-4, atol=1e-4
    )


@pytest.mark.parametrize("rows", [0, 1])
def test_few_rows(rows):
    flow = some_flow()
    x = torch.zeros(rows, 2)
    assert flow.log_prob(x).shape == (rows,)
    assert flow.to_reference(x).shape == flow.from_reference(x).shape == (rows, 2)
    assert flow.sample(rows).shape == (rows, 2)
    assert flow.log_prob(torch.zeros(rows, 2, dtype=torch.int64)).dtype == torch.float32


def test_shape_and_argument_errors():
    flow = some_flow()
    for method in (flow.log_prob, flow.to_reference, flow.trajectory, flow.check, flow.costs):
        with pytest.raises(ShapeError, match=r"`x` must be \(batch, 2\), got \(5, 3\)"):
            method(torch.zeros(5, 3))
    with pytest.raises(ShapeError, match=r"`z` must be \(batch, 2\), got \(2,\)"):
        flow.from_reference(torch.zeros(2))
    with pytest.raises(ArgumentError, match="`n` must be an integer >= 0, got -1"):
        flow.sample(-1)
    for name, value in (("transport", -1), ("hjb", math.nan), ("steps", 0), ("train_steps", 1.5)):
        with pytest.raises(ArgumentError, match=f"`{name}` must be"):
            OTFlow(2, **{name: value})
    for support in ([(0, 1)], [(0, 1), (2, 2)], [(0, 1), (3, 2)], [(0, 1), (math.nan, 1)]):
        with pytest.raises(ArgumentError, match="`support` must hold 2 pairs"):
            OTFlow(2, support=support)


@pytest.mark.parametrize("copier", [copy.deepcopy, lambda f: pickle.loads(pickle.dumps(f))])
def test_copies(copier):
    flow = some_flow(4, support=SUPPORT)
    again = copier(flow)
    assert torch.equal(again.log_prob(INSIDE), flow.log_prob(INSIDE))
    with torch.no_grad():
        again.potential.w.add_(1)
    assert not torch.equal(again.log_prob(INSIDE), flow.log_prob(INSIDE))
    assert again.config() == flow.config()


# Coordinates


def fitted(dim, x, support=None):
    standardize = Standardize(dim, support)
    standardize.fit(Rows(x))
    return standardize


def test_standardised_rows_are_white():
    x = torch.randn(5000, 3).double() @ torch.randn(3, 3).double() * 7 + 100
    y, _ = fitted(3, x)(x)
    torch.testing.assert_close(y.mean(0), torch.zeros(3).double(), rtol=0, atol=1e-10)
    torch.testing.assert_close(
        torch.cov(y.T, correction=0), torch.eye(3).double(), rtol=0, atol=1e-8
    )


def test_change_of_units():
    """In units M x + a of the data, the same flow's density is divided by |det M|."""
    x = torch.randn(500, 2).double() + 0.3 * torch.randn(500, 1).double() ** 2
    M = torch.tensor([[2.0, 0.0], [0.0, -0.01]], dtype=torch.float64)
    base, scaled = some_flow(), some_flow()
    base.standardize.fit(Rows(x))
    scaled.standardize.fit(Rows(x @ M.T + 5))
    y, y_scaled = base.standardize(x)[0], scaled.standardize(x @ M.T + 5)[0]
    torch.testing.assert_close(y_scaled, y * torch.tensor([1.0, -1.0]), rtol=1e-8, atol=1e-8)
    mirror = torch.diag(torch.tensor([1.0, -1.0]).double())
    with torch.no_grad():  # mirror the coordinates back, then only the determinant is left
        scaled.standardize.scale.copy_(scaled.standardize.scale @ mirror)
        got, want = scaled.log_prob(x @ M.T + 5), base.log_prob(x)
    torch.testing.assert_close(got, want - math.log(0.02), rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("x", [INSIDE], ids=["inside"])
def test_bounded_columns_round_trip(x):
    standardize = Standardize(4, SUPPORT)
    standardize.mean.copy_(torch.tensor([0.3, -1.0, 0.5, 2.0]))
    standardize.scale.add_(0.3 * torch.randn(4, 4).double())
    y, _ = standardize(x)
    torch.testing.assert_close(standardize.inverse(y), x, rtol=1e-10, atol=1e-10)
    far = standardize.inverse(20 * torch.randn(1000, 4).double())
    lower, upper = standardize.lower, standardize.upper
    assert ((far >= lower) & (far <= upper)).all()


def test_log_slope_is_the_log_determinant():
    standardize = Standardize(4, SUPPORT)
    standardize.scale.add_(0.3 * torch.randn(4, 4).double())
    J = calculus.jacobian(lambda x: standardize(x)[0], INSIDE).detach()
    want = torch.linalg.slogdet(J).logabsdet
    torch.testing.assert_close(standardize(INSIDE)[1], want, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(
    "column, value", [(0, 0.0), (0, -1.0), (1, 3.0), (1, 5.0), (2, -1.0), (2, 9)]
)
def test_off_the_support(column, value):
    flow = some_flow(4, support=SUPPORT)
    x = INSIDE.clone()
    x[1, column] = value
    got = flow.log_prob(x)
    assert got[1] == -math.inf
    assert got[[0, 2]].isfinite().all()
    torch.testing.assert_close(got[[0, 2]], flow.log_prob(x[[0, 2]]))


def test_off_the_support_gradients_stay_finite():
    """A row without density must not spoil what the others teach."""
    flow = some_flow(4, support=SUPPORT)
    x = INSIDE.clone()
    x[1, 0] = -1.0
    log_prob = flow.log_prob(x)
    log_prob[log_prob.isfinite()].sum().backward()
    assert all(p.grad.isfinite().all() for _, p in flow.potential.named_parameters())


@pytest.mark.parametrize(
    "bounds, low, high",
    [((0.0, None), 0, 60), ((None, 2.0), -60, 2), ((-1.0, 4.0), -1, 4), ((None, None), -15, 15)],
    ids=str,
)
def test_bounded_density_integrates_to_one(bounds, low, high):
    flow = some_flow(1, support=[bounds], steps=32)
    flow.standardize.scale.fill_(0.6), flow.standardize.mean.fill_(0.2)
    edges = torch.linspace(low, high, 4_001).double()
    middle = 0.5 * (edges[1:] + edges[:-1])
    with torch.no_grad():
        mass = flow.log_prob(middle[:, None]).exp().sum() * (edges[1] - edges[0])
    assert mass.item() == pytest.approx(1, abs=1e-3)


def test_lognormal_data_are_gaussian_in_their_coordinates():
    x = torch.exp(0.5 * torch.randn(4000, 1).double() + 1)
    standardize = fitted(1, x, [(0, None)])
    assert standardize.mean.item() == pytest.approx(x.log().mean().item())
    assert standardize.scale.item() == pytest.approx(x.log().std(correction=0).item())


def test_data_outside_the_bounds_are_named():
    x = torch.rand(20, 2) + 0.1
    x[7, 1] = -3
    with pytest.raises(DataError, match=r"column 1.*-3\.0 is not in \(0\.0, inf\)"):
        pl.fit(OTFlow(2, support=[(0, None)] * 2), x, max_steps=1, progress=False)


# The objective


@pytest.mark.parametrize("depth", [1, 2, 3])
def test_every_parameter_gets_a_gradient(depth):
    flow = OTFlow(3, 8, depth, generator=generator()).double()
    objective = FlowObjective(flow)
    objective.prepare(Rows(torch.randn(100, 3)), generator())
    objective(torch.randn(50, 3).double()).total.backward()
    names = [name for name, p in flow.named_parameters() if p.grad is None or not p.grad.any()]
    assert names == []
    assert "potential.c" not in dict(flow.named_parameters())
    assert "potential.c" in dict(flow.named_buffers())


def test_objective_is_the_weighted_sum_of_its_terms():
    flow = some_flow(3, transport=0.3, hjb=0.7, steps=4)
    objective = FlowObjective(flow)
    x = flow.sample(60, seed=0)
    loss = objective(x)
    nll = -(flow.log_prob(x) - flow.standardize(x)[1]).mean()  # in standardised units
    torch.testing.assert_close(loss.terms["nll"], nll.detach())
    costs = flow.costs(x)
    assert loss.terms["transport"].item() == pytest.approx(costs["transport"])
    assert loss.terms["hjb"].item() == pytest.approx(costs["hjb"])
    want = nll + 0.3 * costs["transport"] + 0.7 * costs["hjb"]
    torch.testing.assert_close(loss.total, want)
    counts = torch.arange(60) % 3
    weighted = objective(x, counts / counts.double().mean()).total
    torch.testing.assert_close(weighted, objective(x.repeat_interleave(counts, 0)).total)


@pytest.mark.parametrize("depth", [1, 2, 3])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("kernel", [False, True])
def test_gradient_of_the_objective(depth, weighted, kernel):
    """As of the same objective through the exact density and costs, without what training knows."""
    flow = some_flow(3, depth=depth, transport=0.3, hjb=0.7, steps=4)
    x = flow.sample(40, seed=0)
    weights = torch.rand(40) if weighted else None
    row = torch.ones(40) if weights is None else weights.double()
    y, log_slope = flow.standardize(x)
    path = pl.control.rollout(flow.problem, flow.potential, y, steps=4)
    J = log_slope - flow.log_prob(x) + 0.3 * path.running_cost + 0.7 * path.hjb
    parameters = list(flow.parameters())
    want = torch.autograd.grad((row * J).mean(), parameters)
    with nullcontext() if kernel else native.using(None):
        got = torch.autograd.grad(3 * flow.objective()(x, weights).total, parameters)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, 3 * b, rtol=1e-11, atol=1e-11)


# Probes


def test_which_trace_training_uses():
    assert OTFlow(2).train_trace == OTFlow(10).train_trace == OTFlow(8, 350).train_trace == "exact"
    assert OTFlow(63, 512).train_trace == OTFlow(784, 256).train_trace == "probe"
    assert OTFlow(63, 512, depth=1).train_trace == "exact"  # no inner layer
    assert OTFlow(400, 4).train_trace == "exact"  # few neurons span few columns
    flow = OTFlow(2, trace="probe")
    assert (flow.train_trace, flow.hjb, flow.train_steps) == ("probe", 0.3, 6)
    flow = OTFlow(2, trace="probe", hjb=0.2, train_steps=3)
    assert (flow.hjb, flow.train_steps) == (0.2, 3)
    flow = OTFlow(2, trace="exact")
    assert (flow.hjb, flow.train_steps) == (0.1, 4)
    for name, value in (("trace", "none"), ("trace_dtype", "float16")):
        with pytest.raises(ArgumentError, match=f"`{name}` must be .*, got '{value}'"):
            OTFlow(2, **{name: value})


def test_settings_of_the_trace_are_kept():
    """The numbers that `auto` stands for, so that a later rule changes no saved model."""
    for flow in (OTFlow(63, 512), OTFlow(2, trace="probe", trace_dtype="bfloat16")):
        again = OTFlow(**flow.config())
        assert again.config() == flow.config()
        assert flow.config()["trace"] == flow.train_trace == again.train_trace
        assert again.trace_dtype == flow.trace_dtype
        assert (again.hjb, again.train_steps) == (flow.hjb, flow.train_steps)


def probing(**kwargs):
    flow = some_flow(3, trace="probe", **kwargs)
    flow.prepared.fill_(True)  # so that `prepare` leaves its weights
    objective = flow.objective()
    objective.prepare(Rows(torch.randn(100, 3)), generator(5))
    return flow, objective, flow.sample(400, seed=0)


def test_probes_train_on_an_unbiased_loss():
    flow, objective, x = probing(train_steps=2)
    assert objective.probe_seed > 0
    exact = some_flow(3, trace="exact", train_steps=2, hjb=flow.hjb).objective()
    parameters = list(flow.parameters())
    draws = []
    for _ in range(100):
        grads = torch.autograd.grad(objective(x).total, parameters)
        draws.append(torch.cat([g.flatten() for g in grads]))
    grads = torch.autograd.grad(exact(x).total, list(exact.parameters()))
    want, flat = torch.cat([g.flatten() for g in grads]), torch.stack(draws)
    assert (flat.std(0) > 0).any()
    error = (flat.mean(0) - want).norm() / (flat.var(0).sum() / 100).sqrt()
    assert error < 2  # standard errors of the whole vector, about 1
    assert (flat[0] - want).norm() > 3 * (flat.mean(0) - want).norm()


def test_judges_do_not_use_probes():
    """Validation, densities and a loss without gradients are exact, and draw nothing."""
    flow, objective, x = probing()
    exact = some_flow(3, trace="exact", train_steps=6, hjb=0.3)
    before = objective.state()
    assert torch.equal(objective.validate(x), exact.objective().validate(x))
    assert torch.equal(flow.log_prob(x), exact.log_prob(x))
    with torch.no_grad():
        assert torch.equal(objective(x).total, exact.objective()(x).total)
    assert objective.state() == before
    assert objective(x).total != exact.objective()(x).total


def test_probes_are_repeated_after_a_restart():
    """From the state, bit for bit; each step and each seed has others."""
    _, objective, x = probing()
    objective(x)
    state = objective.state()
    losses = [objective(x).total.item() for _ in range(3)]
    assert len(set(losses)) == 3
    _, again, _ = probing()
    again.restore(state)
    assert [again(x).total.item() for _ in range(3)] == losses
    assert again.state() == objective.state()
    again.restore({**state, "probe_seed": state["probe_seed"] + 1})
    assert again(x).total.item() not in losses


def test_each_process_has_its_own_probes(monkeypatch):
    _, objective, x = probing()
    state, losses = objective.state(), []
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    for rank in range(3):
        monkeypatch.setattr(torch.distributed, "get_rank", lambda rank=rank: rank)
        objective.restore(state)
        losses.append(objective(x).total.item())
    assert len(set(losses)) == 3


@pytest.mark.parametrize("trace", ["exact", "probe"])
def test_low_precision_traces_train_only(trace):
    low, full = (
        some_flow(6, 32, trace=trace, hjb=0.3, train_steps=3, trace_dtype=dtype)
        for dtype in ("bfloat16", None)
    )
    x = full.sample(300, seed=0)
    assert torch.equal(low.log_prob(x), full.log_prob(x))
    objectives = [flow.float().objective() for flow in (low, full)]
    assert torch.equal(*(o.validate(x) for o in objectives))
    losses = [o(x).total for o in objectives]
    got, want = (
        torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(o.parameters()))])
        for loss, o in zip(losses, objectives, strict=True)
    )
    assert 0 < (got - want).norm() < 3e-3 * want.norm()


def test_saved_for_the_backward_pass():
    """Of one training step, tensors of (batch, dim) and smaller; none of (batch, dim, width)."""
    flow = some_flow(40, 32, trace="exact", train_steps=2)
    objective, x = flow.objective(), torch.randn(300, 40).double()
    sizes = []

    def pack(tensor):
        sizes.append(tensor.untyped_storage().nbytes())
        return tensor

    with native.using(None), torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        objective(x)
    assert max(sizes) <= 8 * 300 * (40 + 1)


def test_a_finer_grid_judges():
    flow = some_flow(3, transport=0.2)
    objective, x = FlowObjective(flow), flow.sample(20, seed=0)
    got = objective.validate(x)
    flow.steps = 2 * objective.steps + 1
    y, log_slope = flow.standardize(x)
    path = pl.control.rollout(flow.problem, flow.potential, y, steps=flow.steps)
    want = log_slope - flow.log_prob(x) + 0.2 * path.running_cost
    torch.testing.assert_close(got, want.detach())
    assert not got.requires_grad


def test_adapt_raises_and_lowers():
    flow = some_flow(2, wild=3.0, hjb=0.1)
    objective, x = FlowObjective(flow), flow.sample(200, seed=0)
    steps, message = objective.steps, objective.adapt(x)
    assert objective.steps == steps + 1
    assert objective.hjb == pytest.approx(0.15)
    assert message.startswith("grids differ by") and "5 time steps, HJB 0.15" in message
    state = objective.state()
    with torch.no_grad():
        flow.potential.w.zero_(), flow.potential.A.mul_(0.01)
    assert "4 time steps" in objective.adapt(x)
    assert objective.steps == steps
    assert 0.1 <= objective.hjb < 0.15
    assert objective.adapt(x) is None  # never below where it began
    assert (objective.steps, flow.train_steps) == (steps, steps)
    objective.restore(state)
    assert (objective.steps, objective.hjb) == (steps + 1, pytest.approx(0.15))
    objective.caution()
    assert (objective.steps, objective.hjb) == (steps + 2, pytest.approx(0.225))


def test_adapt_notices_a_loss_that_is_not_finite():
    flow = some_flow(2)
    objective = FlowObjective(flow)
    with torch.no_grad():
        flow.potential.w.fill_(math.nan)
    assert objective.adapt(torch.randn(10, 2).double())
    assert objective.steps == 5


def test_adapt_stays_bounded():
    flow = some_flow(2, wild=30.0)
    objective = FlowObjective(flow)
    for _ in range(40):
        with pytest.raises(Distrust, match="grids differ by"):
            objective.adapt(torch.randn(20, 2).double())
        objective.caution()
    assert objective.steps == 16
    assert objective.hjb <= 1000 * objective.least_hjb * (1 + 1e-12)


def test_choose_steps_resolves_the_flow():
    flow = some_flow(2, wild=2.0, steps=4)
    x = flow.sample(300, seed=0)
    flow.choose_steps(x)
    assert flow.steps > 8
    with torch.no_grad():
        coarse = flow.log_prob(x).mean()
        flow.steps *= 4
        assert (flow.log_prob(x).mean() - coarse).abs() < 1e-3


# torch.distributions


def test_distribution_shapes_and_values():
    flow = some_flow(3)
    distribution = flow()
    assert isinstance(distribution, torch.distributions.Distribution)
    assert distribution.event_shape == (3,) and distribution.batch_shape == ()
    assert distribution.sample().shape == (3,)
    x = distribution.sample((4, 5))
    assert x.shape == (4, 5, 3)
    got = distribution.log_prob(x)
    assert got.shape == (4, 5)
    torch.testing.assert_close(got, flow.log_prob(x.reshape(-1, 3)).reshape(4, 5))
    assert distribution.log_prob(x[0, 0]).shape == ()
    copies = distribution.expand((2, 5))
    assert copies.batch_shape == (2, 5) and copies.event_shape == (3,)
    assert copies.sample((4,)).shape == (4, 2, 5, 3)
    broadcast = copies.log_prob(x[0, 0])
    assert broadcast.shape == (2, 5)
    torch.testing.assert_close(broadcast, got[0, 0].expand(2, 5))
    torch.testing.assert_close(copies.log_prob(x[0]), got[0].expand(2, 5))
    independent = torch.distributions.Independent(copies, 1)
    assert independent.log_prob(x[0].expand(2, 5, 3)).shape == (2,)


def test_distribution_sampling():
    flow = some_flow(2, steps=32)
    torch.manual_seed(1)
    x = flow().sample((6,))
    torch.manual_seed(1)
    assert torch.equal(x, flow.sample(6))
    assert not x.requires_grad
    copies = flow().expand((1000,)).sample()
    assert len(copies.unique(dim=0)) == 1000
    x, log_prob = flow().rsample_and_log_prob((3,))
    torch.testing.assert_close(log_prob, flow().log_prob(x), rtol=0, atol=1e-3)


def test_rsample_gradients():
    """d/d mean of the mean sample is the identity, and every parameter is reached."""
    flow = some_flow(2)
    x = flow().rsample((50,))
    assert x.requires_grad
    x.square().mean().backward()
    assert all(p.grad is not None and p.grad.any() for p in flow.potential.parameters())
    linear, _, _ = linear_flow(2)
    torch.manual_seed(0)
    before = linear().rsample((4,)).sum()
    (slope,) = torch.autograd.grad(before, linear.potential.b)
    with torch.no_grad():
        linear.potential.b[0] += 1e-6
    torch.manual_seed(0)
    after = linear().rsample((4,)).sum()
    assert ((after - before) / 1e-6).item() == pytest.approx(slope[0].item(), rel=1e-5)


def test_distribution_validates():
    distribution = some_flow(4, support=SUPPORT)()
    for x in (torch.ones(5, 3), torch.ones(3)):
        with pytest.raises(ValueError, match=r"event_shape|size of tensor"):
            distribution.log_prob(x)
    off = INSIDE.clone()
    off[1, 0] = -1
    with pytest.raises(ValueError, match="support"):
        distribution.log_prob(off)
    with pytest.raises(ValueError, match="support"):
        some_flow(2)().log_prob(torch.full((2,), math.nan))
    assert distribution.support.check(INSIDE).all()
    assert distribution.support.check(off).tolist() == [True, False, True]
    quiet = pl.flows.FlowDistribution(some_flow(4, support=SUPPORT), validate_args=False)
    assert quiet.log_prob(off)[1] == -math.inf
    assert quiet.expand((2, 1)).log_prob(off).shape == (2, 3)


# The verdict


def test_check_passes_a_resolved_flow():
    flow = some_flow(2, wild=0.5, seed=1, steps=16)
    check = flow.check(flow.sample(2000, seed=0))
    assert check.passed and "NOT" not in check.verdict
    assert check.inverse_error < 1e-5
    assert check.mass_grid == pytest.approx(1, abs=1e-3)
    assert abs(check.mass - 1) < 4 * check.mass_error + 1e-3
    assert check.mass_error < 0.05 and check.rows == 2000
    assert check.to_dict()["verdict"] == check.verdict
    nll = -flow.log_prob(flow.sample(2000, seed=0)).mean().item()
    assert check.nll == pytest.approx(nll)


def test_check_fails_an_unresolved_flow():
    flow = some_flow(2, wild=4.0, steps=64)
    x = flow.sample(1000, seed=0)
    flow.steps = 2
    check = flow.check(x)
    assert not check.passed
    assert "NOT invertible" in check.verdict and "NOT resolved in time" in check.verdict
    assert flow.steps == 2


def test_check_finds_missing_mass(monkeypatch):
    """A density that is 10 % too high everywhere is invertible and resolved, and still wrong."""
    flow = some_flow(2, wild=0.5, seed=1, steps=16)
    x, right = flow.sample(2000, seed=0), OTFlow.log_prob
    monkeypatch.setattr(OTFlow, "log_prob", lambda self, *x: right(self, *x) + 0.1)
    check = flow.check(x)
    assert not check.passed
    assert "NOT normalised" in check.verdict and "NOT invertible" not in check.verdict
    assert check.mass_grid == pytest.approx(math.exp(0.1), abs=2e-3)


def test_check_in_user_units_does_not_depend_on_them():
    flow = some_flow(2, wild=0.5, seed=1, steps=4)
    x = flow.sample(500, seed=0)
    before = flow.check(x)
    with torch.no_grad():
        flow.standardize.scale.mul_(1000), flow.standardize.mean.mul_(1000)
    after = flow.check(1000 * x)
    assert after.inverse_error == pytest.approx(before.inverse_error, rel=0.1)
    assert after.mass_grid == pytest.approx(before.mass_grid, rel=1e-9)
    assert after.nll == pytest.approx(before.nll + 2 * math.log(1000))


# Training against an exact optimum


def moments(dim):
    """Mean (dim,) and covariance (dim, dim) with rotated standard deviations 0.6 to 1.8."""
    rotation = torch.linalg.qr(torch.randn(dim, dim, generator=generator()).double()).Q
    deviations = torch.linspace(0.6, 1.8, dim, dtype=torch.float64)
    return torch.linspace(-1, 1, dim, dtype=torch.float64), (rotation * deviations**2) @ rotation.T


def relaxed_map(x, w, mu, S):
    """The optimum of E[C + w L] for data N(mu, S).

    In the eigenbasis of S a standard deviation s goes to s_T with w (s_T - s) + s_T - 1/s_T = 0,
    and the mean mu to w mu / (1 + w).
    """
    values, vectors = torch.linalg.eigh(S)
    s = values.sqrt()
    s_T = (w * s + (w**2 * s**2 + 4 * (1 + w)).sqrt()) / (2 * (1 + w))
    stretch = (vectors * (s_T / s)) @ vectors.T
    return (x - mu) @ stretch + w / (1 + w) * mu


def gaussian_rows(count, mu, S, seed):
    """Quasi-random rows of N(mu, S) with exactly its mean and covariance."""
    sobol = torch.quasirandom.SobolEngine(len(mu), scramble=True, seed=seed)
    uniform = sobol.draw(count, dtype=torch.float64).clamp(1e-9, 1 - 1e-9)
    draws = torch.special.ndtri(uniform)
    draws = draws - draws.mean(0)
    root = torch.linalg.cholesky(torch.cov(draws.T, correction=0))
    return draws @ torch.linalg.inv(root).T @ torch.linalg.cholesky(S).T + mu


@pytest.mark.parametrize(
    "dim, w, steps",
    [(2, 0.1, 600), (2, 1.0, 600), pytest.param(10, 0.1, 2000, marks=pytest.mark.slow)],
)
def test_gaussian_data_reach_the_relaxed_optimum(dim, w, steps):
    mu, S = moments(dim)
    rows, x = gaussian_rows(2**16, mu, S, seed=1), gaussian_rows(4096, mu, S, seed=2)
    flow = OTFlow(dim, 32, 2, transport=w, standardize=False, generator=generator())
    pl.fit(flow, rows, validation=x, max_steps=steps, patience=1000, progress=False)
    with torch.no_grad():
        z = flow.to_reference(x)
    exact = relaxed_map(x, w, mu, S)
    map_error = (z - exact).square().mean().sqrt() / exact.square().mean().sqrt()
    cost = 0.5 * (exact - x).square().sum(1).mean().item()
    cost_error = flow.costs(x)["transport"] / cost - 1
    print(f"dim {dim}, w {w}: map error {map_error:.4f}, cost error {cost_error:.4f}")
    assert map_error < 0.01
    assert abs(cost_error) < 0.01


def test_relaxed_optimum_is_one():
    """The formula against a numerical minimum of the objective over affine maps."""
    w, (mean, S) = 0.4, moments(2)
    root = torch.linalg.cholesky(S).numpy()
    mu = mean.numpy()

    def J(p):
        B, c = p[:4].reshape(2, 2), p[4:]
        m, K, D = B @ mu + c, B @ root, (B - np.eye(2)) @ root
        L = 0.5 * ((D**2).sum() + ((m - mu) ** 2).sum())
        return 0.5 * ((K**2).sum() + m @ m) - np.log(abs(np.linalg.det(B))) + w * L

    p = minimize(J, np.r_[1, 0, 0, 1, 0, 0], tol=1e-12).x
    x = torch.randn(5, 2).double()
    want = x.numpy() @ p[:4].reshape(2, 2).T + p[4:]
    np.testing.assert_allclose(relaxed_map(x, w, mean, S).numpy(), want, atol=1e-4)
