"""Control problems: costs and values beside published and exact ones."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..control import Policy, solve
from ..control.problems import make, settings
from ..control_report import finish_control
from ..models import NAMED
from ..report import Section
from ..train import files
from .experiment import Outcome, RunArguments
from .race import RunFolder, columns

NEURAL_OC = (
    "Onken et al., A neural network approach for high-dimensional optimal control (arXiv "
    "2104.03270): its released policy, by RK4 with 50 steps"
)
NEURAL_SOC = (
    "Li, Verma, Ruthotto, A neural network approach for stochastic optimal control (arXiv "
    "2209.13104)"
)
NEURONS = (
    "Madondo et al., Learning control policies of Hodgkin-Huxley neuronal dynamics (arXiv "
    "2311.07563): its released policy, by 1500 Euler steps"
)
# The value of the hill at starts, by finite differences with errors below 0.011.
HILL = {(-1.5, -1.5): 14.60, (-2.0, -1.0): 13.50, (-1.0, -2.0): 13.50, (-2.5, -2.5): 20.75}
FULL = 5  # times the training steps of size small
NOISE, FLIGHTS = 0.2, 500  # of the quadcopter
SHOCKS = (0.0, 0.25, 0.5, 1.0)  # of each velocity, in m/s, against the flight, at a third of it


@dataclass(frozen=True)
class Figure:
    """What of a policy is compared with what; smaller is better."""

    label: str
    measure: Callable[[Policy, Mapping[str, Any]], float]
    published: float | None
    source: str


def _nominal_cost(policy: Policy, metrics: Mapping[str, Any]) -> float:
    return float(metrics["check"]["nominal_fine"])


def _energy(policy: Policy, metrics: Mapping[str, Any]) -> float:
    """int |u|^2 / 2 dt from the nominal start."""
    path = policy.simulate(steps=200)
    lengths = path.times.diff()[:, None]
    return float((0.5 * lengths * path.controls.square().sum(2)).sum())


def _value_error(policy: Policy, metrics: Mapping[str, Any]) -> float:
    return float(metrics["check"]["value_error"])


def _start_error(policy: Policy, metrics: Mapping[str, Any]) -> float:
    """Of Phi(0, nominal start), relative to the exact value."""
    x = policy.problem.nominal()[None]
    exact: Tensor = policy.problem.exact_value(torch.zeros(()), x)  # type: ignore[attr-defined]
    return float(((policy.value(0.0, x).double() - exact) / exact).abs())


def _hill_error(policy: Policy, metrics: Mapping[str, Any]) -> float:
    x, exact = torch.tensor(list(HILL)), torch.tensor(list(HILL.values()))
    return float((policy.value(0.0, x) - exact).norm() / exact.norm())


FIGURES = {
    "lqr": Figure("relative error of the value", _value_error, None, "the Riccati equation"),
    "corridor": Figure("cost from the nominal start", _nominal_cost, 62.19, NEURAL_OC),
    "swap2": Figure("energy from the nominal start", _energy, 470.9, NEURAL_OC),
    "swap12": Figure("energy from the nominal start", _energy, 1116.0, NEURAL_OC),
    "swarm50": Figure("energy from the nominal start", _energy, 1594.6, NEURAL_OC),
    "quadcopter": Figure("cost from the nominal start", _nominal_cost, 2184.9, NEURAL_OC),
    "neuron": Figure("cost from zero", _nominal_cost, 47_180.0, NEURONS),
    "hill": Figure(
        "relative error of the value at four starts", _hill_error, 0.02,
        f"{NEURAL_SOC}, against finite elements",
    ),
    "benchmark": Figure("relative error of Phi(0, 0)", _start_error, None, NEURAL_SOC),
    "modified-benchmark": Figure("relative error of Phi(0, 0)", _start_error, None, NEURAL_SOC),
}  # fmt: skip


def run(name: str, arguments: RunArguments, size: str) -> Outcome:
    """Solve the problem `name` and compare its figure; size full trains five times as long."""
    figure = FIGURES[name]
    policy, metrics = solve_named(name, arguments, size)
    measured = figure.measure(policy, metrics)
    text = f"{figure.label}: {measured:.6g}\n{metrics['check']['verdict']}"
    if metrics["baseline"] is not None:
        text += f"\nopen loop from the nominal start: {metrics['baseline']['cost']:.6g}"
    return Outcome(measured, figure.published, figure.source, text, dict(metrics))


def solve_named(
    name: str,
    arguments: RunArguments,
    size: str,
    options: Mapping[str, Any] | None = None,
    *,
    changed: Mapping[str, Any] | None = None,
    finish: Callable[..., dict[str, Any]] = finish_control,
) -> tuple[Any, dict[str, Any]]:
    """The policy of a problem or a game, with its settings but for those `changed`, and what
    `finish` found."""
    problem = make(name, NAMED, **options or {})
    chosen = settings(problem, NAMED) | dict(changed or {})
    if size == "full":
        chosen["max_steps"] *= FULL
    if arguments.budget is not None:
        chosen.pop("max_steps")
    given = {
        "out": arguments.out, "seed": arguments.seed, "max_steps": arguments.max_steps,
        "budget": arguments.budget, "resume": arguments.resume, "overwrite": arguments.overwrite,
    }  # fmt: skip
    files.open_run(arguments.out, resume=arguments.resume, overwrite=arguments.overwrite)
    given = {key: value for key, value in given.items() if value is not None}
    policy = solve(problem, **chosen | given)
    return policy, finish(policy, arguments.out, seed=arguments.seed)


def run_robustness(arguments: RunArguments, size: str) -> Outcome:
    """Two quadcopter policies, one trained with noise and one without, fly in the same noise and
    under the same shocks; the measured figure is the ratio of their mean costs in the noise."""
    from ..plots import curves

    folder = RunFolder.open("quadcopter-robustness", arguments, size)
    if folder.done:
        return folder.done
    policies = {}
    for label, options in (("without noise", {}), ("with noise", {"noise": NOISE})):
        policies[label], _ = solve_named("quadcopter", arguments.part(label), size, options)
    noisy = policies["with noise"].problem
    x = noisy.nominal().expand(FLIGHTS, -1)
    shocks = [f"shock {shock:g}" for shock in SHOCKS[1:]]
    table: list[list[str]] = [["trained", "mean cost in noise", "sd of the mean", "worst", *shocks]]
    means, lines = {}, {}
    for label, policy in policies.items():
        policy.problem = policy.potential.problem = noisy
        cost = policy.simulate(x, steps=400, noise_seed=arguments.seed).cost
        means[label] = cost.mean().item()
        error = cost.std().item() / FLIGHTS**0.5
        shocked = []
        for shock in SHOCKS:
            kick = torch.zeros(12)
            kick[6:9] = -shock
            path = policy.simulate(x, steps=400, noise_seed=arguments.seed, shocks={1 / 3: kick})
            shocked.append(path.cost.mean().item())
        lines[label] = (SHOCKS, shocked)
        worst, more = f"{cost.max().item():.0f}", [f"{value:.1f}" for value in shocked[1:]]
        table.append([label, f"{means[label]:.1f}", f"{error:.1f}", worst, *more])
    told = (
        f"Costs of {FLIGHTS} flights in the same noise of standard deviation {NOISE}, 400 Euler "
        "steps. Shocks are taken from each velocity, in m/s, at a third of the time."
    )
    figure = curves(lines, "shock, m/s", "cost", "Mean cost in noise, under a shock")
    sections = [
        Section("In noise", told, table=table),
        Section("Under shocks", figure=figure),
    ]
    ratio = means["with noise"] / means["without noise"]
    text = f"{columns(table)}\n{told}\nratio of the mean costs: {ratio:.4f}"
    details = {"means": means, "shocks": {k: list(v[1]) for k, v in lines.items()}}
    outcome = Outcome(ratio, 1.0, NEURAL_SOC, text, details)
    return folder.write(outcome, "The quadcopter in noise and under shocks", sections)
