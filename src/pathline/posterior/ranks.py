"""Ranks of true parameters among samples of their posteriors.

For pairs (theta, context) of the prior and the simulator, and samples of the exact posterior given
the context, theta and the samples are exchangeable. So the rank of any function of theta among the
function's values at L samples is uniform on 0, ..., L.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.distributions import Distribution

from ..errors import ArgumentError, DataError, ModelError, ShapeError

Posterior = Callable[[Tensor], Distribution]

CHUNK = 100_000  # samples at a time
LEAST_ROWS = 20


@dataclass(frozen=True)
class Ranks:
    """How many of the `samples` posterior samples lie below the true parameters, for each test row.

    `marginal` (rows, dim) counts those with a smaller value of each parameter, `density` (rows,)
    those with a smaller log-density, and `distance` (rows,) those nearer to a random reference
    point. Ties are broken at random.
    """

    marginal: np.ndarray
    density: np.ndarray
    distance: np.ndarray
    samples: int
    names: tuple[str, ...]


@torch.no_grad()
def posterior_ranks(
    posterior: Posterior,
    theta: Tensor,
    context: Tensor,
    *,
    samples: int = 199,
    prior: Tensor | None = None,
    names: Sequence[str] | None = None,
    seed: int = 0,
) -> Ranks:
    """Rank true parameters among samples of their posteriors.

    Args:
        posterior: maps contexts (batch, context_dim) to a distribution of batch shape (batch,) and
            event shape (dim,), as a conditional flow does.
        theta, context: test pairs, (rows, dim) and (rows, context_dim): parameters of the prior and
            what was simulated from them, not seen in training. At least 20; 500 mostly show widths
            that are a tenth off.
        samples: posterior samples for each row. With 199 the 200 possible ranks fill equal bins.
        prior: (any, dim) draws of the prior, such as the training parameters, for the reference
            points of `tarp`, each in units of its column's standard deviation. By default the
            parameters of other test rows.
        names: of the parameters.
        seed: of the samples, reference points and ties.

    Raises:
        ArgumentError: `samples` is not positive, or `names` has another length.
        DataError: too few rows, or values that are not finite.
        ModelError: samples that are not finite, or log-densities that are not a number.
        ShapeError: the arrays do not fit together, or the samples do not fit them.

    Source: Talts et al., Validating Bayesian inference algorithms with simulation-based
    calibration, arXiv 1804.06788, algorithm 1; Lemos et al., Sampling-based accuracy testing of
    posterior estimators for general inference, arXiv 2302.03026, algorithm 2.
    """
    theta, context = torch.as_tensor(theta), torch.as_tensor(context)
    _check_pairs(theta, context, samples)
    rows, dim = theta.shape
    names = [f"theta{i + 1}" for i in range(dim)] if names is None else list(names)
    if len(names) != dim:
        raise ArgumentError(f"`names` must be {dim} names, got {len(names)}")
    rng = np.random.default_rng(seed)
    references, scale = _references(theta, prior, rng)
    below, equal = [], []
    with torch.random.fork_rng(devices=[context.device] if context.is_cuda else []):
        torch.manual_seed(seed)
        for part in torch.arange(rows).split(max(1, CHUNK // samples)):
            draws, densities, density = _draw(posterior, theta[part], context[part], samples)
            truth = theta[part].to(draws)
            points, unit = references[part].to(draws), scale.to(draws)
            pairs = [
                (draws, truth),
                (densities[..., None], density[..., None]),
                (
                    ((draws - points) / unit).norm(dim=-1, keepdim=True),
                    ((truth - points) / unit).norm(dim=-1, keepdim=True),
                ),
            ]
            below.append(torch.cat([(a < b).sum(0) for a, b in pairs], 1).cpu().numpy())
            equal.append(torch.cat([(a == b).sum(0) for a, b in pairs], 1).cpu().numpy())
    ranks = np.concatenate(below) + rng.integers(0, np.concatenate(equal) + 1)
    return Ranks(ranks[:, :dim], ranks[:, dim], ranks[:, dim + 1], samples, tuple(map(str, names)))


def _draw(
    posterior: Posterior, theta: Tensor, context: Tensor, samples: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Samples (samples, batch, dim), their log-densities, and those of theta, (batch,)."""
    distribution = posterior(context)
    if hasattr(distribution, "rsample_and_log_prob"):  # both in one solve
        draws, densities = distribution.rsample_and_log_prob((samples,))
    else:
        draws = distribution.sample((samples,))
        densities = distribution.log_prob(draws)
    want = (samples, *theta.shape)
    if tuple(draws.shape) != want:
        raise ShapeError(
            f"`posterior(context).sample(({samples},))` must be {want}, got {tuple(draws.shape)}"
        )
    lost = int((~draws.isfinite()).any(-1).sum())
    if lost:
        raise ModelError(f"{lost:,} of {draws.shape[0] * draws.shape[1]:,} samples are not finite")
    density = distribution.log_prob(theta.to(draws))
    if densities.isnan().any() or density.isnan().any():
        raise ModelError("log-densities of the posterior are not a number")
    return draws, densities, density


def _references(
    theta: Tensor, prior: Tensor | None, rng: np.random.Generator
) -> tuple[Tensor, Tensor]:
    """A reference point for each row, independent of its parameters, and the scale of columns."""
    rows, dim = theta.shape
    if prior is None:
        pool, index = theta, (np.arange(rows) + rng.integers(1, rows)) % rows
    else:
        pool = torch.as_tensor(prior)
        if pool.ndim != 2 or pool.shape[1] != dim or len(pool) < 2:
            raise ShapeError(f"`prior` must be (rows, {dim}), got {tuple(pool.shape)}")
        if not pool.isfinite().all():
            raise DataError("`prior` has values that are not finite")
        index = rng.integers(0, len(pool), rows)
    scale = pool.double().std(0)
    return pool[torch.as_tensor(index, device=pool.device)], scale.where(scale > 0, 1.0)


def _check_pairs(theta: Tensor, context: Tensor, samples: int) -> None:
    if not isinstance(samples, int) or samples < 1:
        raise ArgumentError(f"`samples` must be a positive integer, got {samples!r}")
    if theta.ndim != 2 or context.ndim != 2 or len(theta) != len(context):
        raise ShapeError(
            "`theta` and `context` must be (rows, dim) and (rows, context_dim), got "
            f"{tuple(theta.shape)} and {tuple(context.shape)}"
        )
    if len(theta) < LEAST_ROWS:
        raise DataError(f"calibration needs at least {LEAST_ROWS} test pairs, got {len(theta)}")
    for name, values in (("theta", theta), ("context", context)):
        lost = int((~values.isfinite()).any(1).sum())
        if lost:
            raise DataError(f"`{name}` has {lost:,} rows with values that are not finite")
