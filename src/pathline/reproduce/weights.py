"""Weights in time by polynomials: Legendre's against monomials, as surrogates of a solver.

Source: Rosso, Ruthotto, Sargsyan, Weight parameterization in continuous-time deep neural networks
for surrogate modeling, 2025, arXiv 2507.22045. Their three simulators are not at hand, and a small
one of the same kind takes their place.
"""

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..integrate import odeint
from ..nets import TimeBasis
from ..networks import ContinuousNet, dense_net
from ..report import Section
from ..train.recipe import cosine
from .experiment import Outcome, RunArguments
from .race import RunFolder, columns

PAPER = (
    "Rosso, Ruthotto, Sargsyan (arXiv 2507.22045): Legendre's polynomials train more stably, and "
    "to errors that are equal or smaller; figures of other simulators"
)
GRID, TIMES, SENSORS = 64, (0.1, 0.3, 0.5), 10
PARAMETERS = 8
ROWS = (400, 100, 100)  # to train, to choose the rate, and to test with
WIDTH, LAYERS, ORDER = 16, 8, 5
BASES = {
    "Legendre": TimeBasis("legendre", ORDER),
    "monomials": TimeBasis("monomial", ORDER),
    "a weight for each layer": TimeBasis("piecewise-constant", LAYERS),
}
RATES = tuple(0.003 * 2**k for k in range(9))
STABLE = 1.25  # times the least error of a basis, up to which a rate counts as stable
STEPS, SEEDS = {"small": 300, "full": 2000}, {"small": 3, "full": 5}


def surrogate_data(count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Parameters (count, 8), uniform in [-1, 1], and their `observations`."""
    p = 2 * torch.rand(count, PARAMETERS, generator=generator, dtype=torch.float64) - 1
    return p, observations(p)


def observations(p: Tensor) -> Tensor:
    """What a transport equation makes of parameters (count, 8).

    u_t + a u_x = nu u_xx + r u (1 - u) on a circle, from u(0, x) of five random Fourier
    coefficients; seen at ten points at times 0.1, 0.3 and 0.5, (count, 30). The first three
    parameters are a, nu and r. Finite differences on 64 points, Runge-Kutta's method in time.
    """
    speed, nu, rate = p[:, :1], 0.005 * (1.2 + p[:, 1:2]), 2 * (1 + p[:, 2:3])
    x = torch.arange(GRID, dtype=torch.float64) / GRID
    angle = 2 * math.pi * x
    waves = torch.stack(
        [torch.ones_like(x), angle.cos(), angle.sin(), (2 * angle).cos(), (2 * angle).sin()]
    )
    u0 = torch.sigmoid(p[:, 3:] @ waves)

    def velocity(t: Tensor, u: Tensor) -> Tensor:
        before, after = u.roll(1, 1), u.roll(-1, 1)
        transport = -speed * (after - before) * (GRID / 2)
        diffusion = nu * (after - 2 * u + before) * GRID**2
        return transport + diffusion + rate * u * (1 - u)

    seen = odeint(velocity, u0, (0.0, *TIMES), method="rk4", options={"step_size": 0.005})
    at = torch.arange(SENSORS) * GRID // SENSORS
    return seen[1:, :, at].movedim(0, 1).flatten(1)


def run(arguments: RunArguments, size: str) -> Outcome:
    """Train a surrogate with each basis, several seeds and a range of learning rates.

    The error of a basis is that of the rate with the least validation error of a seed; a rate is
    stable where the worst seed stays within a quarter above the best rate's median.
    """
    from ..plots import curves

    steps = arguments.max_steps or STEPS[size]
    folder = RunFolder.open("legendre-surrogate", arguments, size, steps=steps, rates=RATES)
    if folder.done:
        return folder.done
    source = torch.Generator().manual_seed(arguments.seed + 1000)
    parts = _standardised([surrogate_data(count, source) for count in ROWS])
    seeds = range(arguments.seed, arguments.seed + SEEDS[size])
    errors = {  # (rates, seeds, validation and test)
        name: [[_errors(basis, parts, rate, steps, seed) for seed in seeds] for rate in RATES]
        for name, basis in BASES.items()
    }
    results = {name: summary(found) for name, found in errors.items()}
    for name, basis in BASES.items():
        results[name]["weights"] = _weights(_net(basis, 0))
    table = _table(results)
    lines = {
        name: (RATES, [statistics.median(pair[0] for pair in seeds) for seeds in found])
        for name, found in errors.items()
    }
    told = (
        f"Networks of width {WIDTH} with {LAYERS} layers and polynomials of degree {ORDER} learn "
        f"{ROWS[0]} solutions of a transport equation in {steps} steps of Adam on all of them. All "
        "start from the same weights, constant in time. Errors are relative: the root mean square "
        "over that of predicting the mean. The largest stable rate is the largest at which, and "
        f"below which, no seed's error is above {STABLE:g} times the least median."
    )
    sections = [
        Section("Bases side by side", told, table=table),
        Section(
            "Error against learning rate",
            "Validation error, median of the seeds.",
            figure=curves(
                lines, "learning rate", "relative error", "Error against learning rate", log=True
            ),
        ),
    ]
    details = {"results": results, "rates": RATES, "errors": errors}
    text = f"{columns(table)}\nmeasured: median test error of Legendre's polynomials"
    outcome = Outcome(results["Legendre"]["test_error"], None, PAPER, text, details)
    return folder.finish(outcome, "Weights in time by polynomials", sections)


def summary(errors: Sequence[Sequence[tuple[float, float]]]) -> dict[str, Any]:
    """Error, spread and largest stable rate of errors (rates, seeds, validation and test)."""
    best = [min(seeds, key=lambda pair: pair[0]) for seeds in zip(*errors, strict=True)]
    test = [pair[1] for pair in best]
    least = min(statistics.median(pair[0] for pair in seeds) for seeds in errors)
    stable = 0.0
    for rate, seeds in zip(RATES, errors, strict=False):
        worst = max(pair[0] for pair in seeds)
        if worst <= STABLE * least:
            stable = rate
        elif stable:
            break
    return {
        "test_error": statistics.median(test),
        "spread": max(test) - min(test),
        "largest_stable_rate": stable,
    }


def _standardised(parts: Sequence[tuple[Tensor, Tensor]]) -> list[tuple[Tensor, Tensor]]:
    """By the means and scales of the first part."""
    (x, y), *_ = parts
    return [((a - x.mean(0)) / x.std(0), (b - y.mean(0)) / y.std(0)) for a, b in parts]


def _net(basis: TimeBasis, seed: int) -> ContinuousNet:
    outputs = SENSORS * len(TIMES)
    net = dense_net(
        "residual", PARAMETERS, outputs, width=WIDTH, steps=LAYERS, time=basis, seed=seed
    )
    return net.double()


def _weights(net: ContinuousNet) -> int:
    return sum(p.numel() for part in net.evolutions() for p in part.parameters())


def _errors(
    basis: TimeBasis, parts: Sequence[tuple[Tensor, Tensor]], rate: float, steps: int, seed: int
) -> tuple[float, float]:
    """Validation and test error, infinite where training diverged."""
    net = _net(basis, seed)
    (x, y), *held_out = parts
    optimiser = torch.optim.Adam(net.parameters(), lr=rate)
    for step in range(steps):
        optimiser.param_groups[0]["lr"] = rate * cosine(step / steps)
        optimiser.zero_grad()
        (net(x) - y).square().mean().backward()
        optimiser.step()
    with torch.no_grad():
        found = [(net(a) - b).square().mean().sqrt().item() for a, b in held_out]
    validation, test = (error if math.isfinite(error) else math.inf for error in found)
    return validation, test


def _table(results: Mapping[str, Mapping[str, Any]]) -> list[tuple[object, ...]]:
    head = ("", "test error", "spread", "largest stable rate", "weights in time")
    return [
        head,
        *(
            (
                name,
                f"{found['test_error']:.4f}",
                f"{found['spread']:.4f}",
                f"{found['largest_stable_rate']:.3g}",
                found["weights"],
            )
            for name, found in results.items()
        ),
    ]
