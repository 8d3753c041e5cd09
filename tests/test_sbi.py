"""Pathline's flows inside sbi, against exact posteriors."""

import pickle

import numpy as np
import pytest
import torch
from torch.distributions import Exponential, Independent, LogNormal, MultivariateNormal, Normal

import pathline as pl
from pathline.errors import ArgumentError, DataError

pytest.importorskip("sbi")
from sbi.inference import NPE
from sbi.inference.posteriors import DirectPosterior
from sbi.utils import BoxUniform, MultipleIndependent

from pathline.posterior import sbi

pytestmark = pytest.mark.filterwarnings("ignore:Maximum number of epochs:UserWarning")
NOISE = torch.tensor([[0.5, 0.2], [0.2, 0.4]])
BUILDERS = pytest.mark.parametrize("build", [sbi.cot_flow, sbi.pcp_map])


def gaussian(rows):
    """theta ~ N(0, I), x = theta + noise."""
    theta = torch.randn(rows, 2)
    return theta, theta + torch.randn(rows, 2) @ torch.linalg.cholesky(NOISE).T


def trained(prior, build, theta, x, epochs):
    inference = NPE(prior, density_estimator=build, show_progress_bars=False)
    inference.append_simulations(theta, x).train(
        max_num_epochs=epochs, learning_rate=5e-3, training_batch_size=200
    )
    return inference.build_posterior()


@BUILDERS
def test_the_conjugate_posterior(build):
    prior = MultivariateNormal(torch.zeros(2), torch.eye(2))
    posterior = trained(prior, build(prior=prior, width=16), *gaussian(2000), epochs=3)
    observation = torch.tensor([0.8, -0.5])
    samples = posterior.sample((4000,), x=observation, show_progress_bars=False)
    gain = torch.linalg.inv(torch.eye(2) + NOISE)  # of the prior's covariance I
    exact = MultivariateNormal(gain @ observation, torch.eye(2) - gain)
    torch.testing.assert_close(samples.mean(0), exact.mean, atol=0.06, rtol=0)
    torch.testing.assert_close(samples.T.cov(), exact.covariance_matrix, atol=0.04, rtol=0)
    log_prob = posterior.log_prob(samples[:200], x=observation, norm_posterior=False)
    assert (exact.log_prob(samples[:200]) - log_prob).abs().mean() < 0.1


@BUILDERS
def test_nothing_leaks(build):
    """A scale near its bounds: sbi would reject a good part of the samples of a free density."""
    prior = BoxUniform(torch.zeros(2), torch.ones(2))
    theta = prior.sample((1000,))
    theta[0, 0] = 0.0  # as rounding gives it, once in 2^24
    x = theta + 0.3 * torch.randn(1000, 2)
    posterior = trained(prior, build(prior=prior, width=16), theta, x, epochs=2)
    samples = posterior.posterior_estimator.sample((5000,), torch.tensor([[-0.6, 0.5]]))
    assert samples.shape == (5000, 1, 2)
    assert ((samples > 0) & (samples < 1)).all()
    # Given x, theta is N(x, 0.09) on [0, 1], which is far from any bulk at x = -0.6.
    grid = torch.linspace(0, 1, 2001)[1:-1]
    weights = Normal(-0.6, 0.3).log_prob(grid).softmax(0)
    assert samples[:, 0, 0].mean() == pytest.approx((weights @ grid).item(), abs=0.06)


def test_rounding_never_reaches_a_bound():
    flow = pl.flows.ConditionalOTFlow(1, 1, support=[(0, 1)])
    edge = torch.tensor([[0.0], [1.0], [0.5]])
    moved = sbi.inside(flow, edge)
    assert ((moved > 0) & (moved < 1)).all()
    torch.testing.assert_close(moved, edge, atol=1e-7, rtol=0)
    assert flow.log_prob(moved, edge).isfinite().all()


@BUILDERS
def test_the_loss_is_what_fit_minimises(build):
    """The mean of the rows' losses is the objective, in the user's units."""
    theta, x = gaussian(64)
    estimator = build(width=8)(theta, x)
    with torch.no_grad():
        for parameter in estimator.net.potential.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    objective = estimator.net.objective()
    objective.constrain()
    rows = torch.cat([theta, x], 1).double()
    want = objective(rows).total - estimator.net.coordinates(theta, x)[2].mean()
    estimator._pairs = None  # keeps the time grid as it is
    loss = estimator.train().loss(theta, x).mean()
    torch.testing.assert_close(loss.double(), want.double(), rtol=1e-5, atol=1e-6)
    found, exact = (
        torch.autograd.grad(value, list(estimator.net.parameters()), allow_unused=True)
        for value in (loss, want)
    )
    for a, b in zip(found, exact, strict=True):
        if a is not None:
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(estimator.eval().loss(theta, x), -estimator.net.log_prob(theta, x))


def test_shapes_of_several_observations():
    theta = torch.randn(50, 2)
    x = torch.randn(50, 3, 4)
    estimator = sbi.cot_flow(width=8)(theta, x)
    assert estimator.condition_shape == (3, 4)
    assert estimator.sample((6,), x[:5]).shape == (6, 5, 2)
    log_prob = estimator.log_prob(theta[:10].reshape(2, 5, 2), x[:5])
    assert log_prob.shape == (2, 5)
    alone = estimator.net.log_prob(theta[5:6], x[0].flatten())
    torch.testing.assert_close(log_prob[1, 0], alone[0])
    samples, density = estimator.sample_and_log_prob((3,), x[:5])
    torch.testing.assert_close(density, estimator.log_prob(samples, x[:5]))


def test_a_posterior_can_be_pickled():
    prior = BoxUniform(-torch.ones(2), torch.ones(2))
    theta = prior.sample((300,))
    posterior = trained(
        prior, sbi.cot_flow(prior=prior, width=8), theta, theta + torch.randn(300, 2), 1
    )
    again = pickle.loads(pickle.dumps(posterior))
    x = torch.zeros(2)
    points = prior.sample((20,))
    torch.testing.assert_close(
        again.log_prob(points, x=x, norm_posterior=False),
        posterior.log_prob(points, x=x, norm_posterior=False),
    )


def test_a_flow_trained_by_fit_in_an_sbi_posterior():
    theta, x = gaussian(500)
    flow = pl.flows.ConditionalOTFlow(2, 2, width=8)
    pl.fit(flow, (theta, x), max_steps=20, progress=False)
    prior = MultivariateNormal(torch.zeros(2), torch.eye(2))
    posterior = DirectPosterior(sbi.FlowEstimator(flow), prior)
    samples = posterior.sample((100,), x=x[0], show_progress_bars=False)
    assert samples.shape == (100, 2)


@pytest.mark.parametrize(
    ("prior", "bounds"),
    [
        (BoxUniform(torch.tensor([0.0, -1.0]), torch.tensor([1.0, 2.0])), [(0, 1), (-1, 2)]),
        (MultivariateNormal(torch.zeros(2), torch.eye(2)), None),
        (Independent(LogNormal(torch.zeros(2), 1), 1), [(0, None), (0, None)]),
        (
            MultipleIndependent(
                [Exponential(torch.ones(1)), MultivariateNormal(torch.zeros(2), torch.eye(2))]
            ),
            [(0, None), (None, None), (None, None)],
        ),
    ],
    ids=["box", "free", "positive", "mixed"],
)
def test_the_bounds_of_a_prior(prior, bounds):
    assert sbi.support_of(prior) == bounds


def test_bad_input():
    prior = BoxUniform(torch.zeros(1), torch.ones(1))
    with pytest.raises(ArgumentError, match="give one of them"):
        sbi.cot_flow(prior=prior, support=[(0, 1)])
    with pytest.raises(ArgumentError, match="support is no box but Simplex"):
        sbi.cot_flow(prior=torch.distributions.Dirichlet(torch.ones(3)))
    theta = torch.tensor(np.linspace(0.1, 1.2, 20))[:, None]
    with pytest.raises(DataError, match=r"4 of 20 rows of theta lie outside .* row 16"):
        sbi.cot_flow(prior=prior)(theta, theta)
    with pytest.raises(ArgumentError, match="as many entries as the flow's `context_dim`, 3"):
        sbi.FlowEstimator(pl.flows.ConditionalOTFlow(2, 3), (2,))
