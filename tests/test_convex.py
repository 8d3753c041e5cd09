"""The convex potential against its definition, differentiated, and its inverse against SciPy."""

import numpy as np
import pytest
import torch
from scipy.optimize import minimize
from torch import nn
from torch.func import functional_call, grad, jacrev, vmap
from torch.nn import functional as F

from pathline.errors import ArgumentError, ShapeError, SolveWarning
from pathline.nets import ConvexPotential, conjugate


def plain(potential, x, y):
    """G at one point x (dim,) and context y (context_dim,), as the class defines it."""
    dim, width, depth = potential.dim, potential.width, potential.depth

    def sp(a):
        return torch.logaddexp(a, torch.zeros_like(a))

    v, w = y, None
    for k in range(depth + 1):
        if k > 0:
            v = F.elu(potential.context_weights[k - 1] @ v + potential.context_biases[k - 1])
        gates = potential.gate_weights[k] @ v + potential.gate_biases[k]
        p = gates[:dim]
        if k > 0:
            hidden = torch.relu(gates[dim : dim + width]) * w
            hidden = potential.hidden_weights[k - 1] @ hidden / width
        if k < depth:
            a = potential.input_weights[k] @ (x * p) + gates[-width:]
            w = sp(a + hidden if k > 0 else a)
    N = hidden.sum() + (x * p).sum()
    g1, g2, g3 = potential.g
    return sp(g1) * N + (torch.relu(g2) + sp(g3)) * x.square().sum() / 2


def make(dim, context_dim=0, depth=3, width=12, sharp=1.0):
    """A potential with random weights; `sharp` scales those of its layers."""
    generator = torch.Generator().manual_seed(0)
    potential = ConvexPotential(
        dim, context_dim, width=width, depth=depth, context_width=7, generator=generator
    ).double()
    with torch.no_grad():
        for parameter in potential.parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.add_(0.3 * noise)
        for L in potential.input_weights:
            L.mul_(sharp)
        for W in potential.hidden_weights:
            W.mul_(sharp)
    potential.project()
    return potential


def points(batch, dim, context_dim):
    x, y = torch.randn(batch, dim).double(), torch.randn(batch, context_dim).double()
    return x, y, y if context_dim else None


@pytest.mark.parametrize("context_dim", [0, 3])
@pytest.mark.parametrize("depth", [1, 2, 4])
@pytest.mark.parametrize("dim", [1, 2, 9])
def test_derivatives_and_their_gradients_are_exact(dim, depth, context_dim):
    potential = make(dim, context_dim, depth, sharp=2.0)
    x, y, context = points(5, dim, context_dim)
    one = lambda x, y: plain(potential, x, y)  # noqa: E731
    want = (
        vmap(one)(x, y),
        vmap(grad(one))(x, y),
        vmap(jacrev(grad(one)))(x, y),
    )
    at = potential.derivatives(x, context)
    got = (at.value, at.grad, at.hessian)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(potential(x, context), want[0], rtol=1e-10, atol=1e-10)
    assert potential.derivatives(x, context, hessian=False).hessian is None

    weights = [torch.randn_like(part) for part in want]
    parameters = list(potential.parameters())
    for a, b in zip(
        *(
            torch.autograd.grad(
                sum((w * part).sum() for w, part in zip(weights, parts, strict=True)), parameters
            )
            for parts in (got, want)
        ),
        strict=True,
    ):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


def test_derivatives_can_be_differentiated_in_x_and_context():
    potential = make(2, 3, depth=2, width=4)
    x, y, _ = points(3, 2, 3)

    def everything(x, y):
        at = potential.derivatives(x, y)
        return at.value, at.grad, at.hessian

    assert torch.autograd.gradcheck(everything, (x.requires_grad_(), y.requires_grad_()))


def test_far_away_points_stay_exact():
    potential = make(3, 2, sharp=3.0)
    x, y, _ = points(6, 3, 2)
    x = 1e3 * x
    want = vmap(lambda x, y: plain(potential, x, y))(x, y)
    torch.testing.assert_close(potential(x, y), want, rtol=1e-10, atol=1e-10)
    assert potential.float().derivatives(x.float(), y.float()).hessian.isfinite().all()


@pytest.mark.parametrize("context_dim", [0, 4])
def test_it_starts_near_the_identity(context_dim):
    for dim in (1, 2, 10):
        generator = torch.Generator().manual_seed(dim)
        potential = ConvexPotential(dim, context_dim, generator=generator)
        assert all((W >= 0).all() for W in potential.hidden_weights)
        x, y, _ = points(500, dim, context_dim)
        at = potential.derivatives(x.float(), y.float() if context_dim else None)
        eigenvalues = torch.linalg.eigvalsh(at.hessian)
        assert eigenvalues.min() > 0.9 and eigenvalues.max() < 1.2
        assert (at.grad - x).square().mean().sqrt() < 0.2


def test_it_is_convex_and_stays_so_in_training():
    potential = make(2, 3)
    optimizer = torch.optim.Adam(potential.parameters(), lr=0.1)
    x, y, _ = points(64, 2, 3)
    for _ in range(20):
        at = potential.derivatives(x, y)
        loss = at.grad.square().sum(1) / 2 - torch.linalg.slogdet(at.hessian).logabsdet
        optimizer.zero_grad()
        loss.mean().backward()
        optimizer.step()
        potential.project()
        assert all((W >= 0).all() for W in potential.hidden_weights)
    a, b, c = 3 * torch.randn(3, 1000, 2).double()
    y = torch.randn(1000, 3).double()
    with torch.no_grad():
        share = torch.rand(1000).double()
        between = share[:, None] * a + (1 - share)[:, None] * b
        assert (
            potential(between, y) < share * potential(a, y) + (1 - share) * potential(b, y)
        ).all()
        strength = potential.g[1].relu() + F.softplus(potential.g[2])
        assert (potential.smallest_curvature(c, y) > strength).all()  # |x|^2/2 alone has as much
        slope = [potential.derivatives(x, y, hessian=False).grad for x in (a, b)]
        assert (((slope[0] - slope[1]) * (a - b)).sum(1) > 0).all()


def test_projection_moves_to_the_nearest_convex_weights():
    potential = make(2, 3)
    with torch.no_grad():
        for W in potential.hidden_weights:
            W.copy_(torch.randn_like(W))
        before = {name: p.clone() for name, p in potential.named_parameters()}
        potential.hidden_weights[-1].mul_(100)  # of both signs
        x, y, _ = points(500, 2, 3)
        assert potential.smallest_curvature(x, y).min() < 0
        potential.hidden_weights[-1].div_(100)
    potential.project()
    for name, p in potential.named_parameters():
        want = before[name].clamp(min=0) if "hidden_weights" in name else before[name]
        torch.testing.assert_close(p.detach(), want)


def test_the_seed_decides_the_weights():
    state = torch.get_rng_state()
    a, b = (
        ConvexPotential(2, 3, generator=torch.Generator().manual_seed(5)).state_dict()
        for _ in range(2)
    )
    assert torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_every_parameter_gets_a_gradient():
    for context_dim in (0, 2):
        potential = make(3, context_dim)
        x, _, context = points(20, 3, context_dim)
        at = potential.derivatives(x, context)
        loss = at.grad.square().sum() - torch.linalg.slogdet(at.hessian).logabsdet.sum()
        loss.backward()
        for name, parameter in potential.named_parameters():
            assert parameter.grad is not None, name
            assert parameter.grad.isfinite().all(), name
            assert parameter.grad.any() or not parameter.numel(), name


def test_a_quadratic_potential_inverts_exactly():
    potential = make(3, 2)
    z, y, _ = points(50, 3, 2)
    with torch.no_grad():
        for W in potential.hidden_weights:
            W.zero_()
        shift = F.softplus(potential.g[0]) * potential.condition(y, 50)[-1].input
        strength = potential.g[1].relu() + F.softplus(potential.g[2])
        got = conjugate(potential, z, y)
    torch.testing.assert_close(got, (z - shift) / strength, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("context_dim", [0, 3])
def test_the_inverse_is_the_minimum_that_scipy_finds(context_dim):
    potential = make(3, context_dim, sharp=4.0).requires_grad_(False)
    z, _, context = points(6, 3, context_dim)
    got = conjugate(potential, z, context, tolerance=1e-10)
    slope = potential.derivatives(got, context, hessian=False).grad
    assert (slope - z).abs().max() <= 1e-10
    for i in range(6):
        y = None if context is None else context[i : i + 1]

        def both(v, i=i, y=y):
            at = potential.derivatives(torch.from_numpy(v)[None], y, hessian=False)
            return at.value.item() - v @ z[i].numpy(), (at.grad[0] - z[i]).numpy()

        want = minimize(both, np.zeros(3), jac=True, method="BFGS", options={"gtol": 1e-9}).x
        np.testing.assert_allclose(got[i].numpy(), want, rtol=0, atol=1e-8)


def test_no_row_depends_on_the_others():
    potential = make(2, 3, sharp=8.0).requires_grad_(False)
    z, y, _ = points(40, 2, 3)
    alone = torch.cat([conjugate(potential, z[i : i + 1], y[i : i + 1]) for i in range(40)])
    z[7], y[7] = 1e4, 30.0  # far away, and many steps
    together = conjugate(potential, z, y)
    others = torch.arange(40) != 7
    torch.testing.assert_close(together[others], alone[others], rtol=0, atol=1e-12)
    assert (potential.derivatives(together, y).grad - z).abs().max() <= 1e-6


def test_kinks_do_not_defeat_the_line_search():
    """Slopes of 0.1 to 1e3 in one dimension, where a full Newton step goes back and forth."""
    potential = make(1, 0, depth=1, sharp=1.0).requires_grad_(False)
    potential.g.copy_(torch.tensor([1e3, -1.0, -2.25]))
    potential.input_weights[0].copy_(100 * torch.randn(12, 1))
    z = torch.linspace(-50, 50, 101).double()[:, None]
    v = conjugate(potential, z)
    assert (potential.derivatives(v).grad - z).abs().max() <= 1e-6
    assert (v.diff(dim=0) > 0).all()


class Inverse(nn.Module):
    def __init__(self, potential):
        super().__init__()
        self.potential = potential

    def forward(self, z, context):
        return conjugate(self.potential, z, context, tolerance=1e-12)


@pytest.mark.parametrize("context_dim", [0, 2])
def test_gradients_of_the_inverse(context_dim):
    inverse = Inverse(make(2, context_dim, depth=2, width=3, sharp=2.0))
    z, y, _ = points(3, 2, context_dim)
    names = [name for name, p in inverse.named_parameters() if p.numel()]
    parameters = [p.detach().clone().requires_grad_() for p in inverse.parameters() if p.numel()]

    def inverted(z, y, *parameters):
        given = dict(zip(names, parameters, strict=True))
        return functional_call(inverse, given, (z, y if context_dim else None))

    y.requires_grad_(context_dim > 0)
    assert torch.autograd.gradcheck(inverted, (z.requires_grad_(), y, *parameters), fast_mode=True)


def test_single_precision_is_solved_in_double():
    potential = make(3, 2, sharp=4.0).float()
    z, y, _ = points(200, 3, 2)
    v = conjugate(potential, z, y.float(), tolerance=1e-9)
    assert v.dtype == torch.float64 and v.requires_grad
    v.sum().backward()
    assert all(p.dtype == torch.float32 and p.grad.any() for p in potential.input_weights)
    exact = potential.double().derivatives(v.detach(), y.float().double(), hessian=False).grad
    assert (exact - z).abs().max() <= 1e-9
    single = conjugate(potential.float(), z.float(), y.float())
    assert single.dtype == torch.float32
    torch.testing.assert_close(single, v.float(), rtol=1e-5, atol=1e-5)
    assert conjugate(potential, z[:0].float(), y[:0].float()).shape == (0, 3)


def test_rows_that_cannot_be_solved_are_counted():
    potential = make(2, 3, sharp=3.0).requires_grad_(False)
    z, y, _ = points(10, 2, 3)
    good = conjugate(potential, z, y)
    bad_z, bad_y = z.clone(), y.clone()
    bad_z[2, 0], bad_y[5, 1] = torch.nan, torch.inf
    with pytest.warns(SolveWarning, match="2 of 10 rows were not inverted"):
        got = conjugate(potential, bad_z, bad_y)
    fine = torch.tensor([i not in (2, 5) for i in range(10)])
    torch.testing.assert_close(got[fine], good[fine], rtol=0, atol=1e-12)
    assert got[~fine].isnan().all()
    with pytest.warns(SolveWarning, match="within 2 steps"):
        best = conjugate(potential, z, y, max_iter=2)
    assert best.isfinite().all()


def test_a_potential_that_is_not_convex_is_reported():
    potential = make(2, 0).requires_grad_(False)
    for W in potential.hidden_weights:
        W.copy_(-100 * W.abs())
    with pytest.warns(SolveWarning, match="`project`"):
        conjugate(potential, torch.randn(20, 2).double())


def test_bad_arguments():
    potential = make(2, 3)
    x, y, _ = points(4, 2, 3)
    for call in (potential.derivatives, lambda x, y: conjugate(potential, x, y)):
        with pytest.raises(ShapeError, match=r"must be \(batch, 2\), got \(4, 3\)"):
            call(y, y)
        with pytest.raises(ShapeError, match=r"`context` must be \(4, 3\), got \(4, 2\)"):
            call(x, x)
        with pytest.raises(ShapeError, match=r"`context` must be \(4, 3\), got None"):
            call(x, None)
    with pytest.raises(ShapeError, match="`context` must be None"):
        make(2)(x, y)
    with pytest.raises(ArgumentError, match="`depth` must be a positive integer, got 0"):
        ConvexPotential(2, depth=0)
    with pytest.raises(ArgumentError, match="`context_dim` must be an integer >= 0, got -1"):
        ConvexPotential(2, -1)
    with pytest.raises(ArgumentError, match="`tolerance` and `max_iter` must be positive"):
        conjugate(potential, x, y, tolerance=0.0)
