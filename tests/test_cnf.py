"""The family of continuous flows: formulations, traces, gradients, contexts and transforms."""

import copy
import itertools
import math
import pickle

import numpy as np
import pytest
import torch
from torch import nn
from torch.distributions import Independent, Normal, TransformedDistribution

import pathline as pl
from pathline import calculus
from pathline.errors import ArgumentError, ModelError, ShapeError
from pathline.flows import (
    CNF,
    FFJORD,
    RNODE,
    FlowMatching,
    MongeAmpere,
    OTFlow,
    PotentialFlow,
)
from pathline.flows.matching import assign
from pathline.nets import FreeVelocity, GradientVelocity, hutch_plus_plus, hutchinson, products

FAMILY = [FFJORD, RNODE, MongeAmpere, PotentialFlow, OTFlow]
ids = [make.__name__ for make in FAMILY]


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def moved(make, dim=2, **options):
    """A small flow in double precision that moves points by about their size."""
    options = {"width": 8, "depth": 2} | options
    flow = make(dim, generator=generator(), **options).double()
    draws = generator(1)
    with torch.no_grad():
        for parameter in flow.parameters():
            parameter.copy_(0.4 * torch.randn(parameter.shape, generator=draws))
    flow.steps = 32
    return flow


def rows(n=7, dim=2, seed=2):
    return torch.randn(n, dim, generator=generator(seed), dtype=torch.float64)


class Linear(nn.Module):
    """v = A z, whose flow is known."""

    def __init__(self, A):
        super().__init__()
        self.A = nn.Parameter(A)

    def forward(self, t, z):
        return z @ self.A.mT


A = torch.tensor([[0.4, -1.0], [0.8, -0.7]], dtype=torch.float64)


def linear_log_prob(x, matrix=A):
    """Of the density that dz/dt = A z carries to N(0, I)."""
    z = x @ torch.linalg.matrix_exp(matrix).mT
    return -0.5 * z.square().sum(1) - math.log(2 * math.pi) + matrix.trace()


@pytest.mark.parametrize("trace", ["exact", "probe", "hutch++"])
@pytest.mark.parametrize("make", [MongeAmpere, CNF])
def test_objective_is_the_formulation(make, trace):
    """Each term against automatic differentiation of the velocity and a fine Riemann sum."""
    hjb = 0.3 if make is CNF else 0.0
    options = {"velocity": "potential"} if make is CNF else {}
    flow = moved(make, transport=0.2, jacobian=0.1, hjb=hjb, trace=trace, **options)
    flow.steps, y, n = 32, rows(), 200
    wanted = ("log_det", "transport", "jacobian", *(("hjb",) if hjb else ()))
    if trace == "exact":
        found = flow.solve(y, wanted=wanted)
    else:  # the average over all signs is the exact trace
        every = list(itertools.product((-1.0, 1.0), repeat=2 * flow.signs))
        signs = torch.tensor(every, dtype=torch.float64).reshape(-1, flow.signs, 1, 2)
        solves = [flow.solve(y, signs=s.expand(-1, len(y), -1), wanted=wanted) for s in signs]
        means = {k: torch.stack([getattr(s, k) for s in solves]).mean(0) for k in wanted}
        found = type(solves[0])(solves[0].z, **means)
    with torch.no_grad():
        times = torch.linspace(0, 1, n + 1, dtype=torch.float64)
        path = pl.odeint(flow.velocity, y, times, rtol=1e-10, atol=1e-10)
    sums = dict.fromkeys(wanted, 0.0)
    for i, (t, z) in enumerate(zip(times, path, strict=True)):
        weight = (0.5 if i in (0, n) else 1.0) / n
        J = calculus.jacobian(lambda z, t=t: flow.velocity(t, z), z).detach()
        v = flow.velocity(t, z).detach()
        sums["log_det"] = sums["log_det"] + weight * J.diagonal(dim1=1, dim2=2).sum(1)
        sums["jacobian"] = sums["jacobian"] + weight * J.square().sum((1, 2))
        sums["transport"] = sums["transport"] + weight * 0.5 * v.square().sum(1)
        if hjb:
            phi = flow.network.potential.derivatives(z, t)
            sums["hjb"] = sums["hjb"] + weight * (phi.dt - 0.5 * v.square().sum(1)).abs().detach()
    torch.testing.assert_close(found.z, path[-1], rtol=1e-5, atol=1e-5)
    for name in wanted:
        torch.testing.assert_close(getattr(found, name), sums[name], rtol=2e-4, atol=2e-4)


@pytest.mark.parametrize(
    ("make", "row"),
    [
        (FFJORD, ("free", "probe", 0, 0, 0, "dopri5", "adjoint")),
        (RNODE, ("free", "probe", 1, 0, 1, "rk4", "discrete")),
        (MongeAmpere, ("static", "exact", 0, 0, 0, "rk4", "discrete")),
    ],
)
def test_presets_are_rows_of_the_table(make, row):
    flow = make(2)
    weights = (bool(flow.transport), bool(flow.hjb), bool(flow.jacobian))
    assert (flow.kind, flow.trace, *weights, flow.method, flow.gradient) == row
    terms = set(flow.objective()(rows()).terms)
    names = ("transport", "hjb", "jacobian")
    assert terms == {"nll"} | {n for n, on in zip(names, weights, strict=True) if on}


@pytest.mark.parametrize("make", [PotentialFlow, OTFlow])
def test_closed_form_presets(make):
    flow = make(2)
    assert isinstance(flow, OTFlow) and flow.hjb > 0
    assert (flow.transport > 0) == (make is OTFlow)


def test_potential_by_the_solver_is_otflow():
    fast = moved(OTFlow, 3, transport=0.1, hjb=0.2)
    slow = CNF(3, velocity="potential", width=8, depth=2, transport=0.1, hjb=0.2).double()
    slow.network.potential.load_state_dict(fast.potential.state_dict())
    y = rows(dim=3)
    losses = [flow.objective()(y).total for flow in (fast, slow)]
    torch.testing.assert_close(*losses, rtol=1e-12, atol=1e-12)
    gradients = [
        torch.autograd.grad(loss, list(flow.parameters()))
        for loss, flow in zip(losses, (fast, slow), strict=True)
    ]
    for mine, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("context_dim", [0, 2])
def test_free_velocity_products(context_dim):
    net = FreeVelocity(3, 8, 2, context_dim).double()
    z, context = rows(5, 3), rows(5, context_dim, 3) if context_dim else None
    t = torch.rand(5, dtype=torch.float64)
    J = calculus.jacobian(lambda z: net(t, z, context), z)
    columns = products(net, t, z, None, context)
    torch.testing.assert_close(columns, J.permute(2, 0, 1))
    vectors = rows(4 * 5, 3, 4).reshape(4, 5, 3)
    torch.testing.assert_close(
        products(net, t, z, vectors, context), torch.einsum("bij,kbj->kbi", J, vectors)
    )


def test_products_of_any_module():
    net = Linear(A)
    e = rows(6, 2).reshape(2, 3, 2)
    torch.testing.assert_close(products(net, torch.tensor(0.0), rows(3), e), e @ A)


def test_hutchinson_variance():
    """2 (|S|_F^2 - sum S_ii^2) for random signs, S the symmetric part."""
    J = rows(4, 4)
    signs = torch.tensor(list(itertools.product((-1.0, 1.0), repeat=4)), dtype=torch.float64)
    found = torch.stack([hutchinson((e @ J.mT)[None, None], e[None, None])[0] for e in signs])
    S = (J + J.mT) / 2
    torch.testing.assert_close(found.mean(), J.trace())
    want = 2 * (S.square().sum() - S.diagonal().square().sum())
    torch.testing.assert_close(found.var(unbiased=False), want)


@pytest.mark.parametrize("k", [1, 2, 4])
def test_hutch_plus_plus(k):
    """Unbiased; exact for a matrix of rank k and for k = dim."""
    U = rows(4, k)
    low = U @ rows(k, 4, 5)
    full = rows(4, 4, 6)
    draws = generator(7)
    signs = 2.0 * torch.randint(0, 2, (2, k, 20_000, 4), generator=draws).double() - 1
    found = hutch_plus_plus(lambda e: e @ low.mT, signs[0, :, :50], signs[1, :, :50])
    regular = found[torch.isfinite(found)]
    close = (regular - low.trace()).abs() < 1e-9
    assert close.float().mean() > 0.8  # but for sketches of a lower rank
    found = hutch_plus_plus(lambda e: e @ full.mT, *signs)
    assert (found.mean() - full.trace()).abs() < 4 * found.std() / len(found) ** 0.5 + 1e-9
    plain = hutchinson(signs[1] @ full.mT, signs[1])
    if k == 4:
        assert found.median() == pytest.approx(full.trace().item())
        assert (found - full.trace()).abs().median() < 1e-9
    assert found.var() < 2 * plain.var()


@pytest.mark.parametrize("method", ["euler", "midpoint", "rk4", "dopri5"])
def test_linear_flow_is_gaussian(method):
    flow = CNF(2, velocity=Linear(A), method=method, steps=2000 if method == "euler" else 64)
    tolerance = {"euler": 2e-3, "midpoint": 1e-3}.get(method, 1e-4)
    torch.testing.assert_close(
        flow.log_prob(rows()), linear_log_prob(rows()), rtol=0, atol=tolerance
    )


@pytest.mark.parametrize("method", ["midpoint", "rk4", "dopri5"])
def test_error_estimate(method):
    flow = CNF(2, velocity=Linear(A), method=method, steps=4, rtol=1e-3, atol=1e-3)
    log_prob, error = flow.log_prob(rows(200), return_error=True)
    true = (log_prob - linear_log_prob(rows(200))).abs()
    assert true.max() > 1e-6
    if method == "dopri5":
        assert (true <= 2 * error + 1e-6).all()
    else:
        torch.testing.assert_close(error.mean(), true.mean(), rtol=0.3, atol=0)
        assert (true <= 4 * error + 1e-3 * true.max()).float().mean() > 0.95


@pytest.mark.parametrize("tolerance", [1e-2, 1e-4, 1e-6])
@pytest.mark.parametrize("method", ["rk4", "dopri5"])
def test_choose_steps_meets_the_tolerance(tolerance, method):
    flow = CNF(2, velocity=Linear(A), method=method, train_steps=1, rtol=0.1, atol=0.1)
    estimate = flow.choose_steps(rows(200), tolerance=tolerance)
    assert estimate <= tolerance
    true = (flow.log_prob(rows(200)) - linear_log_prob(rows(200))).abs().mean()
    assert true <= 1.5 * tolerance


def test_adjoint_converges_to_the_discrete_gradient():
    y, errors = rows(20), []
    for tolerance in (1e-3, 1e-6, 1e-9):
        flow = moved(CNF, transport=0.1, method="dopri5", rtol=1e-12, atol=1e-12)
        exact = torch.autograd.grad(flow.objective()(y).total, list(flow.parameters()))
        flow.gradient, flow.rtol, flow.atol = "adjoint", tolerance, tolerance
        found = torch.autograd.grad(flow.objective()(y).total, list(flow.parameters()))
        errors.append(
            sum((a - b).square().sum() for a, b in zip(found, exact, strict=True)).sqrt().item()
        )
    assert errors[0] > errors[1] > errors[2]
    assert errors[2] < 1e-6 * max(1, errors[0])


def test_checkpoint_is_the_same_gradient():
    y = rows(20)
    gradients = []
    for gradient in ("discrete", "checkpoint"):
        flow = moved(CNF, transport=0.1, gradient=gradient)
        gradients.append(torch.autograd.grad(flow.objective()(y).total, list(flow.parameters())))
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


@pytest.mark.parametrize("make", FAMILY, ids=ids)
def test_density_of_each(make):
    """The log-determinant of the brute-force Jacobian of the map, and the way back."""
    flow = moved(make)
    if isinstance(flow, CNF):
        flow.rtol = flow.atol = 1e-9
        flow.gradient = "discrete"  # the adjoint can't be differentiated again
    x = rows()
    z, log_det = flow.to_reference_with_log_det(x)
    J = calculus.jacobian(flow.to_reference, x)
    torch.testing.assert_close(log_det, torch.linalg.slogdet(J).logabsdet, rtol=0, atol=2e-4)
    torch.testing.assert_close(flow.from_reference(z), x, rtol=0, atol=1e-4)
    want = Independent(Normal(torch.zeros_like(z), 1.0), 1).log_prob(z) + log_det
    torch.testing.assert_close(flow.log_prob(x), want)


@pytest.mark.parametrize("make", FAMILY, ids=ids)
def test_contract_of_flows(make):
    """What users of zuko's flows rely on."""
    flow = moved(make, context_dim=3)
    context, x = rows(7, 3, 3), rows()
    density = flow(context)
    assert density.batch_shape == (7,) and density.event_shape == (2,)
    loss = -density.log_prob(x).mean()
    gradients = torch.autograd.grad(loss, list(flow.parameters()), allow_unused=True)
    assert all(g is not None and g.isfinite().all() for g in gradients)
    alone = torch.cat([flow(c).log_prob(row[None]) for c, row in zip(context, x, strict=True)])
    torch.testing.assert_close(density.log_prob(x), alone, rtol=1e-3, atol=1e-3)
    assert density.rsample((5,)).shape == (5, 7, 2)
    sample, log_prob = density.rsample_and_log_prob((5,))
    torch.testing.assert_close(density.log_prob(sample), log_prob, rtol=1e-3, atol=1e-3)
    assert density.log_prob(x[:, None, :]).shape == (7, 7)

    transform = density.transform
    z = transform(x)
    torch.testing.assert_close(transform.inv(z), x, rtol=0, atol=1e-4)
    both, ladj = transform.call_and_ladj(x)
    torch.testing.assert_close(both, z)
    torch.testing.assert_close(transform.log_abs_det_jacobian(x, z), ladj)
    composed = TransformedDistribution(density.base, transform.inv)
    torch.testing.assert_close(composed.log_prob(x), density.log_prob(x), rtol=1e-3, atol=1e-3)
    assert composed.sample((4,)).shape == (4, 7, 2)

    for twin in (copy.deepcopy(flow), pickle.loads(pickle.dumps(flow))):
        torch.testing.assert_close(twin(context).log_prob(x), density.log_prob(x))


@pytest.mark.parametrize("make", FAMILY, ids=ids)
def test_conditional_density_is_normalised(make):
    flow = moved(make, context_dim=1)
    side = torch.linspace(-8, 8, 40, dtype=torch.float64)
    grid = torch.cartesian_prod(side, side)
    with torch.no_grad():
        density = flow.log_prob(grid, torch.tensor([0.7])).exp()
    mass = density.sum() * (side[1] - side[0]) ** 2
    assert mass == pytest.approx(1, abs=0.01)
    found = flow.check(flow.sample(200, torch.tensor([0.7]), seed=0), torch.tensor([0.7]))
    assert abs(found.nll_fine - found.nll) < 1e-2


@pytest.mark.parametrize("make", FAMILY, ids=ids)
def test_saved_and_loaded(make, tmp_path):
    flow = moved(make, support=[(0.0, math.inf), (-math.inf, math.inf)])
    x = rows().abs() + 0.1
    want = flow.log_prob(x)
    pl.save(flow, tmp_path / "model")
    loaded = pl.load(tmp_path / "model")
    assert type(loaded) is type(flow) and loaded.config() == flow.config()
    assert torch.equal(loaded.log_prob(x), want)


@pytest.mark.parametrize("make", [FFJORD, RNODE, MongeAmpere])
def test_trains_on_a_gaussian(make):
    """To within 0.1 of the entropy; the same seed gives the same bits."""
    x = rows(2000) @ torch.tensor([[1.0, 0.0], [0.8, 0.5]]).double()
    runs = []
    for _ in range(2):
        flow = make(2, generator=generator(), width=16, depth=2)
        pl.fit(flow, x, max_steps=40, learning_rate=0.03, seed=0, progress=False)
        runs.append(flow.log_prob(x[:200]))
    assert torch.equal(*runs)
    entropy = 1 + math.log(2 * math.pi) + math.log(0.5)
    assert -flow.double().log_prob(x).mean().item() == pytest.approx(entropy, abs=0.1)


@pytest.mark.parametrize("pairs", ["independent", "optimal"])
@pytest.mark.parametrize("make", [CNF, OTFlow])
def test_flow_matching(make, pairs):
    """A velocity of zero costs E|e - y|^2 = 2 dim; training reaches the entropy."""
    x = rows(4000) @ torch.tensor([[1.0, 0.0], [0.8, 0.5]]).double()
    flow = make(2, generator=generator(), width=32, depth=2)
    objective = FlowMatching(flow, pairs)
    still = FlowMatching(CNF(2, velocity=Linear(0 * A)), "independent")
    still.seed = 1
    assert still(rows(4000)).total.item() == pytest.approx(4, abs=0.2)
    pl.fit(objective, x, max_steps=300, seed=0, progress=False)
    entropy = 1 + math.log(2 * math.pi) + math.log(0.5)
    assert -flow.double().log_prob(x).mean().item() == pytest.approx(entropy, abs=0.1)


def test_assignment_is_the_best_permutation():
    y, noise = rows(6), rows(6, 2, 9)
    best = min(
        (y - noise[list(order)]).square().sum() for order in itertools.permutations(range(6))
    )
    torch.testing.assert_close((y - assign(y, noise)).square().sum(), best)


def test_optimal_pairs_shorten_the_way():
    x = rows(4000) + torch.tensor([4.0, 0.0]) * (rows(4000, 1, 8) > 0)
    costs = {}
    for pairs in ("independent", "optimal"):
        flow = CNF(2, generator=generator(), width=32, depth=2)
        pl.fit(FlowMatching(flow, pairs), x, max_steps=400, seed=0, progress=False)
        costs[pairs] = flow.costs(x)["transport"]
    assert costs["optimal"] < 0.7 * costs["independent"]


def test_random_signs_differ_from_step_to_step():
    objective = moved(RNODE).objective()
    first, second = (objective(rows(50)).terms["nll"] for _ in range(2))
    assert first != second
    objective.restore(objective.state() | {"probes": 0})
    assert objective(rows(50)).terms["nll"] == first


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({"velocity": "fast"}, "velocity"),
        ({"trace": "approximate"}, "trace"),
        ({"method": "rk45"}, "method"),
        ({"gradient": "reverse"}, "gradient"),
        ({"hjb": 0.1}, "hjb"),
        ({"transport": -1.0}, "transport"),
        ({"jacobian": math.nan}, "jacobian"),
        ({"rtol": 0.0}, "rtol"),
        ({"probes": 0}, "probes"),
        ({"trace": "hutch++", "probes": 3}, "probes"),
        ({"steps": 0}, "steps"),
        ({"context_dim": -1}, "context_dim"),
        ({"width": -3}, "width"),
    ],
)
def test_bad_arguments(options, name):
    with pytest.raises(ArgumentError, match=f"`{name}`"):
        CNF(2, **options)


def test_bad_contexts():
    plain, conditional = CNF(2), CNF(2, context_dim=3)
    with pytest.raises(ShapeError, match=r"`context` must be None"):
        plain.log_prob(rows(), rows(7, 3))
    for context in (None, rows(7, 2), rows(6, 3)):
        with pytest.raises(ShapeError, match=r"`context` must be \(3,\) or \(7, 3\)"):
            conditional.log_prob(rows(), context)
    with pytest.raises(ShapeError, match=r"`context` must be \(\.\.\., 3\)"):
        conditional()
    with pytest.raises(ShapeError, match=r"pair \(x, context\) with 2 and 3 columns, got 2"):
        pl.fit(conditional, np.random.default_rng(0).normal(size=(100, 2)), progress=False)
    with pytest.raises(ArgumentError, match="`pairs`"):
        FlowMatching(plain, "random")
    with pytest.raises(ArgumentError, match="`tolerance`"):
        plain.choose_steps(rows(), tolerance=0.0)


def test_own_velocity_is_not_saved(tmp_path):
    with pytest.raises(ModelError, match="velocity"):
        pl.save(CNF(2, velocity=Linear(A)), tmp_path / "model")
    assert not (tmp_path / "model").exists()


def test_static_potential_knows_no_time():
    velocity = moved(MongeAmpere).network
    assert isinstance(velocity, GradientVelocity)
    v = [velocity(torch.tensor(t).double(), rows()) for t in (0.0, 0.7)]
    assert torch.equal(*v)
