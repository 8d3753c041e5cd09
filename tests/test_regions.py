"""Ranks, contours and quantiles against closed forms and statistics."""

import math

import numpy as np
import pytest
import torch
from scipy import stats

from pathline.errors import ArgumentError, ShapeError
from pathline.flows import ConditionalOTFlow, PCPMap

KINDS = [ConditionalOTFlow, PCPMap]


def exact_flow(kind, dim, context_dim, **options):
    """A flow that is exactly x = mean + scale z + slope c, with c = context / 3."""
    generator = torch.Generator().manual_seed(0)
    flow = kind(dim, context_dim, generator=generator, **options).double().requires_grad_(False)
    potential = flow.potential
    if kind is PCPMap:  # G = |x|^2 / 2
        for weight in [*potential.input_weights, *potential.gate_weights, *potential.gate_biases]:
            weight.zero_()
        potential.g[1:] = torch.tensor([0.0, math.log(math.e - 1)])
    else:
        for parameter in potential.parameters():
            parameter.zero_()
    S = flow.standardize
    S.mean.copy_(torch.arange(dim) + 1.0)
    factor = torch.randn(dim, dim, generator=generator).double() / math.sqrt(dim)
    S.scale.copy_(torch.eye(dim) + factor @ factor.mT)
    if context_dim:
        S.context_scale.fill_(3.0)
        S.slope.copy_(torch.randn(dim, context_dim, generator=generator))
    return flow


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dim", [1, 2, 6])
def test_rank_is_the_probability_of_the_ellipsoid(kind, dim):
    flow = exact_flow(kind, dim, 2)
    S, context = flow.standardize, torch.tensor([1.0, -4.0]).double()
    x = S.mean + 2 * torch.randn(1000, dim).double()
    offset = np.asarray(x - (S.mean + S.slope @ context / 3))
    covariance = np.asarray(S.scale @ S.scale.mT)
    distance = np.einsum("bi,ij,bj->b", offset, np.linalg.inv(covariance), offset)
    want = stats.chi2(dim).cdf(distance)
    np.testing.assert_allclose(flow.rank(x, context), want, atol=1e-9)


@pytest.mark.parametrize("kind", KINDS)
def test_rank_is_uniform_on_data(kind):
    flow = exact_flow(kind, 3, 1)
    context = torch.randn(4000, 1).double()
    S = flow.standardize
    rng = np.random.default_rng(1)
    z = torch.from_numpy(rng.normal(size=(4000, 3)))
    x = S.mean + context / 3 @ S.slope.mT + z @ S.scale.mT
    assert stats.kstest(flow.rank(x, context).numpy(), "uniform").pvalue > 0.01
    wide = S.mean + context / 3 @ S.slope.mT + 1.1 * z @ S.scale.mT
    assert stats.kstest(flow.rank(wide, context).numpy(), "uniform").pvalue < 1e-6


@pytest.mark.parametrize("dim", [1, 2, 4])
@pytest.mark.parametrize("level", [0.05, 0.5, 0.99])
def test_contour_has_its_rank(dim, level):
    flow = PCPMap(dim, 2, width=16, generator=torch.Generator().manual_seed(1)).double()
    context = torch.tensor([0.5, -1.0]).double()
    x = flow.contour(level, context, n=40, seed=3)
    assert x.shape == (40, dim) and not x.requires_grad
    rank = flow.rank(x, context)
    torch.testing.assert_close(rank, torch.full_like(rank, level), rtol=0, atol=1e-5)
    assert torch.equal(x, flow.contour(level, context, n=40, seed=3))
    inside = (flow.rank(flow.sample(4000, context, seed=0), context) <= level).double().mean()
    assert abs(inside - level) < 4 * math.sqrt(level * (1 - level) / 4000)


def test_contour_in_one_and_two_dimensions():
    ends = exact_flow(PCPMap, 1, 0).contour(0.9, n=2)
    S = exact_flow(PCPMap, 1, 0).standardize
    want = stats.norm(S.mean.item(), S.scale.item()).ppf([0.05, 0.95])
    np.testing.assert_allclose(ends[:, 0], want, rtol=1e-6)
    flow = exact_flow(PCPMap, 2, 0)
    z = flow.to_reference(flow.contour(0.5, n=8)).numpy()
    angles = np.unwrap(np.arctan2(z[:, 1], z[:, 0]))
    np.testing.assert_allclose(np.diff(angles), 2 * math.pi / 8, rtol=1e-6)
    np.testing.assert_allclose(np.linalg.norm(z, axis=1), math.sqrt(2 * math.log(2)), rtol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_quantiles_of_a_gaussian(kind):
    flow = exact_flow(kind, 1, 2)
    S, levels = flow.standardize, torch.tensor([0.001, 0.3, 0.5, 0.975])
    context = torch.randn(5, 2).double()
    means = (S.mean + context / 3 @ S.slope.mT).numpy()
    want = stats.norm(means, S.scale.item()).ppf(levels.numpy().astype(float)[None])
    np.testing.assert_allclose(flow.quantile(levels, context), want, rtol=1e-5)
    np.testing.assert_allclose(flow.quantile(levels, context[2]), want[2], rtol=1e-5)
    assert flow.quantile(0.3, context).shape == (5,)
    assert flow.quantile(0.3, context[0]).shape == ()


@pytest.mark.parametrize("bounds", [(None, 2.0), (0.0, None), (0.0, 1.0), (None, None)])
def test_quantiles_are_those_of_samples(bounds):
    """They increase with the level, also where the coordinate of a bounded column decreases."""
    generator = torch.Generator().manual_seed(1)
    flow = PCPMap(1, 1, width=16, support=[bounds], generator=generator).double()
    context = torch.tensor([0.7]).double()
    levels = torch.linspace(0.01, 0.99, 50).double()
    x = flow.quantile(levels, context)
    assert (x.diff() > 0).all()
    sample = flow.sample(5000, context, seed=0)
    below = (sample < x).double().mean(0)
    error = (levels * (1 - levels) / 5000).sqrt()
    assert ((below - levels).abs() < 4 * error).all()


def test_errors():
    flow = PCPMap(2, 1)
    with pytest.raises(ArgumentError, match="`level` must lie between 0 and 1, got 1"):
        flow.contour(1, torch.zeros(1))
    with pytest.raises(ShapeError, match=r"`context` must be \(1,\), got \(3, 1\)"):
        flow.contour(0.5, torch.zeros(3, 1))
    with pytest.raises(ShapeError, match=r"`context` must be .*, got None"):
        flow.contour(0.5)
    with pytest.raises(ArgumentError, match="densities of one column, got 2"):
        flow.quantile(0.5, torch.zeros(1))
    one = PCPMap(1)
    with pytest.raises(ArgumentError, match="`levels` must lie between 0 and 1"):
        one.quantile(torch.tensor([0.0, 0.5]))
    with pytest.raises(ShapeError, match="`levels` must be"):
        one.quantile(torch.full((2, 2), 0.5))
    with pytest.raises(ShapeError, match=r"`x` must be \(batch, 2\)"):
        flow.rank(torch.zeros(3), torch.zeros(1))
