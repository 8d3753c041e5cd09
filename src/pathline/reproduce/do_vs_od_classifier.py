"""A classifier trained by discretize-optimize (DO) and by optimize-discretize (OD), and what more
layers do to the gain of plain and of antisymmetric networks.

Source: Onken, Ruthotto, Discretize-Optimize vs. Optimize-Discretize, 2020 (arXiv 2005.13420);
Haber, Ruthotto, Stable architectures for deep neural networks, 2017 (arXiv 1705.03341).
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..data import moons, peaks
from ..nets import TimeBasis
from ..networks import Classification, ContinuousNet, Evolution, dense_net
from ..report import Section
from ..train import files
from .experiment import Outcome, RunArguments
from .networks import LABELS, Data, accuracy, region_maps, trained
from .race import DO, OD, RunFolder, Training, race

KIND, WIDTH, HORIZON = "antisymmetric", 16, 5.0
TIME = TimeBasis("legendre", 3, HORIZON)  # smooth, as adaptive steps need it
STEPS, TOLERANCE, FINE = 8, 1e-5, 1e-9
POINTS, BATCH, RATE = (400, 200), 256, 0.02  # points of each class to train and to validate with
ITERATIONS = {"small": 500, "full": 3000}

# The sweep over depths
DEPTHS, STEP, NARROW = (10, 20, 50, 100), 0.2, 8
SWEPT = ("residual", "antisymmetric")
MOONS, PROBED = 250, 16  # points of each class; those at which the gain is measured
SWEEP_STEPS = {"small": 1, "full": 4}


def run(arguments: RunArguments, size: str) -> Outcome:
    """Train the same network by RK4 with few steps and its exact gradient, and by dopri5 with the
    continuous adjoint, on the same batches; then plain and antisymmetric ones of 10 to 100 layers.
    """
    iterations = arguments.max_steps or ITERATIONS[size]
    sweep_steps = min(arguments.max_steps or SWEEP_STEPS[size], SWEEP_STEPS[size])
    folder = RunFolder.open("do-vs-od-classifier", arguments, size, iterations=iterations)
    if folder.done:
        return folder.done
    source = torch.Generator().manual_seed(arguments.seed + 1000)
    train, validation = (peaks(count, source) for count in POINTS)
    rows = torch.cat(train, 1)
    ways: dict[str, dict[str, Any]] = {
        DO: {"method": "rk4", "steps": STEPS, "gradient": "discrete"},
        OD: {"method": "dopri5", "steps": None, "gradient": "adjoint", "tolerance": TOLERANCE},
    }
    trainings, nets = {}, {}
    for way, how in ways.items():
        nets[way] = net = network(arguments.seed, **how)
        objective = Classification(net, decay=1e-4, head=1e-4)
        batches = torch.Generator().manual_seed(arguments.seed + 2000)

        def loss(objective: Classification = objective, batches: Any = batches) -> Tensor:
            chosen = torch.randint(len(rows), (BATCH,), generator=batches)
            return objective(rows[chosen]).total

        optimiser = torch.optim.Adam(net.parameters(), lr=RATE)
        (evolution,) = net.evolutions()
        trainings[way] = Training(loss, [optimiser], evolution.dynamics, RATE)
    race(trainings, iterations)
    figures = {way: _figures(net, validation) for way, net in nets.items()}
    files.save(nets[DO], arguments.out / "model")
    labels = {
        "accuracy": "validation accuracy",
        "fine_accuracy": "of the equation itself",
        "moved": "scores moved by fine steps, relative",
    }
    told = (
        f"Peaks in five classes, {len(rows):,} points in batches of {BATCH}; an {KIND} network of "
        f"width {WIDTH} over a time of {HORIZON:g}. DO takes {STEPS} steps of RK4, OD dopri5 with "
        f"a tolerance of {TOLERANCE:g}. Accuracies are by the steps of training, and of the "
        f"equation, solved with a tolerance of {FINE:g}."
    )
    sweep = _sweep(folder, sweep_steps)
    pictures = [region_maps(nets, validation), *_sweep_sections(sweep)]
    title = "A classifier, trained by DO and by OD"
    details = {"sweep": {"depths": DEPTHS, **sweep}}
    return folder.compare(title, trainings, figures, labels, told, pictures, details=details)


def network(seed: int, **how: Any) -> ContinuousNet:
    """The network of both trainings with the same weights; `how` is for `Evolution`."""
    return dense_net(KIND, 2, 5, width=WIDTH, time=TIME, seed=seed, **how).double()


def solved(net: ContinuousNet, **how: Any) -> ContinuousNet:
    """The same weights, shared, with another way to solve the equation."""
    stages = [
        Evolution(stage.dynamics, **how) if isinstance(stage, Evolution) else stage
        for stage in net.stages
    ]
    return ContinuousNet(net.opening, stages, net.head)


@torch.no_grad()
def _figures(net: ContinuousNet, validation: Data) -> dict[str, float]:
    fine = solved(net, method="dopri5", steps=None, tolerance=FINE)
    x, _ = validation
    scores = fine(x)
    return {
        "accuracy": accuracy(net, validation),
        "fine_accuracy": accuracy(fine, validation),
        "moved": ((net(x) - scores).norm() / scores.norm()).item(),
    }


def gains(net: ContinuousNet, x: Tensor) -> Tensor:
    """Largest and least singular value of du_N/du_0, features after and before all layers.

    Args:
        net: of one evolution.
        x: inputs, (points, dim).

    Returns:
        (2,): the largest and the least over the points.
    """
    (evolution,) = net.evolutions()
    with torch.no_grad():
        first = net.opening(x)

    def last(u: Tensor) -> Tensor:
        return evolution(u[None])[0]

    jacobians = torch.stack([torch.autograd.functional.jacobian(last, u) for u in first])
    values = torch.linalg.svdvals(jacobians)
    return torch.stack([values[:, 0].max(), values[:, -1].min()])


def _sweep(folder: RunFolder, steps: int) -> dict[str, dict[str, list[float]]]:
    """Accuracy and gains at each depth, by kind."""
    seed = folder.arguments.seed
    source = torch.Generator().manual_seed(seed + 3000)
    train, validation = moons(MOONS, source), moons(MOONS, source)
    probes = validation[0][:: max(1, 2 * MOONS // PROBED)]
    found: dict[str, dict[str, list[float]]] = {}
    for kind in SWEPT:
        figures: dict[str, list[float]] = {
            key: [] for key in ("accuracy", "gain_before", "gain", "least", "seconds")
        }
        for depth in DEPTHS:
            time = TimeBasis("piecewise-constant", depth, depth * STEP)
            net = dense_net(kind, 2, 2, width=NARROW, steps=depth, time=time, seed=seed).double()
            figures["gain_before"].append(float(gains(net, probes)[0]))
            objective = Classification(net, smoothness=1e-3, decay=1e-4, head=1e-4)
            part = trained(folder, f"{kind}-{depth}", objective, train, validation, max_steps=steps)
            largest, least = gains(net, probes).tolist()
            figures["gain"].append(largest)
            figures["least"].append(least)
            figures["accuracy"].append(accuracy(net, validation))
            figures["seconds"].append(part.seconds)
        found[kind] = figures
    return found


def _sweep_sections(sweep: Mapping[str, Mapping[str, list[float]]]) -> list[Section]:
    from ..plots import curves

    head = (
        *("", "layers", "validation accuracy"),
        *("largest, at first", "largest", "least", "seconds"),
    )
    table: list[tuple[object, ...]] = [head]
    for kind, found in sweep.items():
        for k, depth in enumerate(DEPTHS):
            row = [f"{found[key][k]:.3g}" for key in ("gain_before", "gain", "least")]
            table.append(
                (LABELS[kind], depth, f"{found['accuracy'][k]:.2%}", *row,
                 f"{found['seconds'][k]:.0f}")
            )  # fmt: skip
    lines = {
        f"{kind}{when}": (DEPTHS, found[key])
        for key, when in (("gain", ""), ("gain_before", ", at first"))
        for kind, found in sweep.items()
    }
    told = (
        f"Two moons, networks of width {NARROW} with steps of {STEP:g}, so that more layers are a "
        "longer time. The table has the largest singular values of du_N/du_0 with the first "
        "weights and with those that were learned, and the least: where it is small, some "
        "directions are forgotten."
    )
    figure = curves(
        lines,
        *("layers", "largest singular value", "Gain of all layers, by their number"),
        log=True,
    )
    return [Section("Depth and stability", told, table=table, figure=figure)]
