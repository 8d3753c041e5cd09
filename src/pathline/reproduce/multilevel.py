"""Training with more and more layers, against training with all of them.

Source: Haber, Ruthotto, Holtham, Learning across scales, AAAI 2018, arXiv 1703.02009; Chang et al.,
Multi-level residual networks from dynamical systems view, ICLR 2018, arXiv 1710.10348.
"""

from typing import Any

import torch

from ..data import peaks
from ..nets import TimeBasis
from ..networks import Classification, Supervised, deepened, dense_net
from ..report import Section
from ..train import Level, Objective, multilevel
from .experiment import Outcome, RunArguments
from .networks import accuracy
from .race import RunFolder, columns

PAPER = (
    "Chang et al. (arXiv 1710.10348): more than 40 % less time at equal or better accuracy, "
    "on images"
)
DEPTHS = (8, 16, 32, 64)
KIND, WIDTH, HORIZON = "hamiltonian", 16, 5.0
POINTS = {"small": (400, 200), "full": (1000, 200)}  # of each class
# Steps of 50 iterations of L-BFGS at each depth; work units are steps at the last.
PLANS = {
    "small": {"levels": (8, 4, 1, 1), "single": (7,)},
    "full": {"levels": (40, 20, 10, 5), "single": (40,)},
}
NAMES = {"levels": "8, 16, 32, 64 layers in turn", "single": "64 layers from the start"}


def run(arguments: RunArguments, size: str) -> Outcome:
    """Train a Hamiltonian network on the peaks in both ways; the measured figure is the work of the
    first over that of the second; the table has the accuracies that come of it."""
    from ..plots import curves

    plans = PLANS[size]
    if arguments.max_steps:
        plans = {name: tuple(arguments.max_steps for _ in plan) for name, plan in plans.items()}
    folder = RunFolder.open("multilevel-depth", arguments, size, plans=_listed(plans))
    if folder.done:
        return folder.done
    source = torch.Generator().manual_seed(arguments.seed + 1000)
    train, validation = (peaks(count, source) for count in POINTS[size])
    results: dict[str, dict[str, Any]] = {}
    lines = {}
    for name, plan in plans.items():
        depths = DEPTHS[-len(plan) :]
        time = TimeBasis("piecewise-constant", depths[0], HORIZON)
        net = dense_net(KIND, 2, 5, width=WIDTH, steps=depths[0], time=time, seed=arguments.seed)
        objective = Classification(net.double(), smoothness=1e-4, head=1e-4)
        found = multilevel(
            objective,
            [Level(steps, depth / DEPTHS[-1]) for steps, depth in zip(plan, depths, strict=True)],
            deeper,
            train,
            validation=validation,
            out=arguments.out / "checkpoint" / name,
            resume=True,
            seed=arguments.seed,
            optimizer="lbfgs",
            batch_size=len(train[0]),
        )
        last = found.objective.model
        assert isinstance(last, type(net))
        results[name] = {
            "accuracy": accuracy(last, validation),
            "loss": found.history[-1]["loss"],
            "validation_loss": found.runs[-1].validation,
            "work": found.total_work,
            "work_by_level": found.work,
            "seconds": sum(part.seconds for part in found.runs),
        }
        lines[NAMES[name]] = (
            [entry["work"] for entry in found.history],
            [entry["loss"] for entry in found.history],
        )
    share = results["levels"]["work"] / results["single"]["work"]
    table = [
        ("", "accuracy", "loss", "validation loss", "work units", "seconds"),
        *(
            (
                NAMES[name],
                f"{figures['accuracy']:.2%}",
                f"{figures['loss']:.2e}",
                f"{figures['validation_loss']:.4f}",
                f"{figures['work']:g}",
                f"{figures['seconds']:.0f}",
            )
            for name, figures in results.items()
        ),
    ]
    told = (
        "A work unit is a step of 50 iterations of L-BFGS with 64 layers. More layers begin with "
        "the weights of fewer, as the same functions of time. Accuracy is of the validation points."
    )
    sections = [
        Section("On levels and at once", told, table=table),
        Section(
            "Training loss against work",
            figure=curves(
                lines, "work units", "training loss", "Training loss against work", log_y=True
            ),
        ),
    ]
    text = f"{columns(table)}\nmeasured: work on levels over work at once, {share:.2f}"
    outcome = Outcome(share, None, PAPER, text, {"results": results})
    return folder.write(outcome, "Multilevel training in depth", sections)


def deeper(objective: Objective) -> Objective:
    """The same with twice the layers."""
    assert isinstance(objective, Supervised)
    return objective.of(deepened(objective.model))


def _listed(plans: dict[str, tuple[int, ...]]) -> dict[str, list[int]]:
    """As JSON gives it back."""
    return {name: list(plan) for name, plan in plans.items()}
