"""Can a trained flow be trusted?"""

import math
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from .map import TransportMap

INVERSE_TOLERANCE = 1e-3  # standard deviations
TIME_TOLERANCE = 1e-2  # nats
MASS_TOLERANCE = 2e-2


@dataclass(frozen=True)
class Check:
    """What `flow.check` found, with its verdict in words.

    `inverse_error` is the largest |x - f^-1(f(x))| in standard deviations; `nll` and `nll_fine`
    are the negative log-likelihoods (nats, user's units) with the flow's own time steps and on a
    finer grid; `mass` is the integral of the density by importance sampling, with its standard
    error and effective sample size (fraction); `mass_grid` is the integral over a grid
    (dim <= 2).
    """

    rows: int
    steps: int
    inverse_error: float
    nll: float
    nll_fine: float
    mass: float
    mass_error: float
    mass_samples: float
    mass_grid: float | None
    passed: bool
    verdict: str

    def to_dict(self) -> dict[str, Any]:
        """The fields, JSON-safe."""
        return asdict(self)


@torch.no_grad()
def check(
    flow: "TransportMap",
    x: Tensor,
    context: Tensor | None = None,
    *,
    seed: int = 0,
    samples: int = 4000,
) -> Check:
    """See `Flow.check`."""
    x = x[:10_000].to(flow.standardize.mean)
    context = None if context is None else context[: len(x)]
    y, _ = flow.standardize(x, context)
    inverse_error = flow.inverse_error(x, context)
    nll = -flow.log_prob(x, context).mean().item()
    with flow.refined(4) as finer:
        nll_fine = -flow.log_prob(x, context).mean().item()
    first = None if context is None else context[0]
    mass, error, effective = _importance_mass(flow, y, first, seed, samples)
    grid = _grid_mass(flow, y, first) if flow.dim <= 2 else None

    findings = []
    invertible = inverse_error <= INVERSE_TOLERANCE
    findings.append(
        f"{'invertible' if invertible else 'NOT invertible'} "
        f"(largest error {inverse_error:.1e} standard deviations)"
    )
    resolved = abs(nll_fine - nll) <= TIME_TOLERANCE
    if flow.steps:
        findings.append(
            f"{'resolved' if resolved else 'NOT resolved'} in time "
            f"(negative log-likelihood changes by {abs(nll_fine - nll):.1e} nats at "
            f"{finer})"
        )
    else:
        findings.append("in closed form")
    conclusive = effective * samples >= 100
    normalised = abs(mass - 1) <= MASS_TOLERANCE + 3 * error or not conclusive
    if grid is not None:
        normalised = normalised and abs(grid - 1) <= MASS_TOLERANCE
        findings.append(
            f"{'normalised' if normalised else 'NOT normalised'} "
            f"(integral {grid:.4f} on a grid, {mass:.3f} +- {error:.3f} by importance sampling)"
        )
    elif conclusive:
        findings.append(
            f"{'normalised' if normalised else 'NOT normalised'} (integral {mass:.3f} +- "
            f"{error:.3f} by importance sampling)"
        )
    else:
        findings.append(
            f"its integral is undecided ({mass:.2g} +- {error:.2g}: importance sampling has only "
            f"{effective * samples:.0f} effective samples in {flow.dim} dimensions)"
        )
    passed = invertible and resolved and normalised
    verdict = f"The flow is {findings[0]}, {findings[1]} and {findings[2]}."
    return Check(
        len(x), flow.steps, inverse_error, nll, nll_fine, mass, error, effective, grid, passed,
        verdict,
    )  # fmt: skip


def _importance_mass(
    flow: "TransportMap", y: Tensor, context: Tensor | None, seed: int, samples: int
) -> tuple[float, float, float]:
    """Integral of the density over standardised space, its standard error, and the effective
    fraction of the samples.

    The proposal is a kernel density of up to 1000 rows of data and 1000 samples of the flow; every
    tenth of its draws is wide.
    """
    generator = torch.Generator().manual_seed(seed)
    dim = flow.dim
    rows = y[torch.randperm(len(y), generator=generator)[:1000].to(y.device)]
    samples_of_flow = flow.sample(1000, context, seed=seed).to(flow.standardize.mean)
    own, _ = flow.standardize(samples_of_flow, context)
    centres = torch.cat([rows, own])
    narrow = 1.5 * len(centres) ** (-1 / (dim + 4)) * centres.std(0)
    widths, shares = torch.stack([narrow, 3 * narrow + 0.5]), (0.9, 0.1)
    pick = torch.randint(len(centres), (samples,), generator=generator).to(y.device)
    wide = (torch.rand(samples, generator=generator) < shares[1]).long().to(y.device)
    noise = torch.randn(samples, dim, generator=generator, dtype=torch.float64).to(y)
    draws = centres[pick] + widths[wide] * noise
    log_kernels = []
    for width, share in zip(widths, shares, strict=True):
        distance = torch.cdist(draws / width, centres / width).square()
        log_kernels.append(
            torch.logsumexp(-0.5 * distance, 1)
            - width.log().sum()
            + math.log(share / len(centres))
            - 0.5 * dim * math.log(2 * math.pi)
        )
    log_weights = _log_density(flow, draws, context) - torch.logsumexp(torch.stack(log_kernels), 0)
    weights = log_weights.exp()
    mean = weights.mean()
    effective = weights.sum().square() / weights.square().sum() / samples
    return mean.item(), (weights.std() / math.sqrt(samples)).item(), effective.item()


def _grid_mass(flow: "TransportMap", y: Tensor, context: Tensor | None, points: int = 300) -> float:
    """Integral of the density over the box of the data and three units around it."""
    low, high = y.amin(0) - 3, y.amax(0) + 3
    axes = [
        torch.linspace(a, b, points).to(y) for a, b in zip(low.tolist(), high.tolist(), strict=True)
    ]
    grid = torch.cartesian_prod(*axes).reshape(-1, flow.dim)
    cell = math.prod((axis[1] - axis[0]).item() for axis in axes)
    return _log_density(flow, grid, context).exp().sum().item() * cell


def _log_density(flow: "TransportMap", y: Tensor, context: Tensor | None) -> Tensor:
    """Log-density of standardised points in standardised units."""
    x = flow.standardize.inverse(y, context)
    return flow.log_prob(x, context) - flow.standardize(x, context)[1]
