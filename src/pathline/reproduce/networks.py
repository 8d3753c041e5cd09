"""Stable networks on points of the plane: dynamics side by side, and what more layers do.

Source: Haber and Ruthotto, Stable architectures for deep neural networks, Inverse Problems 34,
2017, arXiv 1705.03341; settings by the authors' Meganet.
"""

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..data import ellipses, peaks, spirals
from ..errors import SolveWarning
from ..nets import TimeBasis
from ..networks import Classification, ContinuousNet, Supervised, dense_net, stability_report
from ..report import Section
from ..train import Run, files, fit
from .experiment import Outcome, RunArguments
from .race import RunFolder, columns

PAPER = "Haber and Ruthotto, Stable architectures for deep neural networks (arXiv 1705.03341)"
DEPTHS = tuple(2**k for k in range(4, 11))  # of the sweep
PROBED = 16  # points, of which perturbations are followed
LABELS = {
    "residual": "residual, Euler",
    "antisymmetric": "antisymmetric, RK4",
    "hamiltonian": "Hamiltonian, Verlet",
}
Data = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Setting:
    """Data, networks and training of an experiment.

    A training step is 50 iterations of L-BFGS on all points; `sweep` is as many of them, at each
    depth.
    """

    data: Callable[[torch.Generator], tuple[Data, Data]]
    classes: int
    horizon: float
    layers: int
    width: int
    steps: int
    sweep: int
    smoothness: float
    head: float
    main: str  # the dynamics whose error is the figure
    goal: float  # of its accuracy


def _swiss_roll(_: torch.Generator) -> tuple[Data, Data]:
    x, y = spirals()
    odd = torch.arange(len(x)) // 2 % 2 == 1  # points with even index of each are for training
    return (x[~odd], y[~odd]), (x[odd], y[odd])


SETTINGS = {
    "ellipses": Setting(
        lambda source: (ellipses(1000, source), ellipses(200, source)),
        *(2, 5.0, 8, 8, 6, 2, 1e-3, 1e-3, "hamiltonian", 0.99),
    ),
    "swiss-roll": Setting(_swiss_roll, *(2, 20.0, 64, 8, 4, 2, 5e-4, 1e-4, "hamiltonian", 0.99)),
    "peaks": Setting(
        lambda source: (peaks(1000, source), peaks(200, source)),
        *(5, 5.0, 8, 16, 8, 2, 1e-4, 1e-4, "antisymmetric", 0.97),
    ),
}


def run(name: str, arguments: RunArguments, size: str) -> Outcome:
    """Train the same data with residual, antisymmetric and Hamiltonian networks, and follow small
    perturbations through them.

    Size full adds networks of 16 to 1024 layers over the same horizon.
    """
    setting = SETTINGS[name]
    steps = arguments.max_steps or setting.steps
    folder = RunFolder.open(name, arguments, size, steps=steps, layers=setting.layers)
    if folder.done:
        return folder.done
    train, validation = setting.data(torch.Generator().manual_seed(arguments.seed + 1000))
    results: dict[str, dict[str, Any]] = {}
    nets = {}
    for kind in LABELS:
        net = _net(setting, kind, setting.layers, arguments.seed)
        part = trained(folder, kind, _objective(setting, net), train, validation, max_steps=steps)
        nets[kind] = net
        results[kind] = _figures(net, part, train, validation)
    files.save(nets[setting.main], arguments.out / "model")
    table = _table(results)
    sections = [
        Section(
            "Dynamics side by side",
            f"Networks of width {setting.width} and {setting.layers} layers over a time of "
            f"{setting.horizon:g}, each in {steps} steps of 50 iterations of L-BFGS. The gain is "
            "by how much a network amplifies the worst small perturbation of an input; h/bound "
            "is the step over the longest that is known to be stable with the learned weights.",
            table=table,
        ),
        region_maps({LABELS[kind]: net for kind, net in nets.items()}, validation),
    ]
    details: dict[str, Any] = {"results": results, "goal": setting.goal}
    text = columns(table)
    if size == "full":
        steps = arguments.max_steps or setting.sweep
        sweep = {kind: _sweep(folder, setting, kind, steps, train, validation) for kind in LABELS}
        details["sweep"] = {"depths": DEPTHS, **sweep}
        sections += _sweep_sections(sweep, steps)
    error = 1 - results[setting.main]["accuracy"]
    text += (
        f"\nmeasured: validation error of {LABELS[setting.main]}; of it is asked at most "
        f"{1 - setting.goal:.0%}"
    )
    outcome = Outcome(error, None, f"{PAPER}; its figures show nearly no error", text, details)
    return folder.write(outcome, f"Stable networks on {name}", sections)


def trained(
    folder: RunFolder,
    label: str,
    objective: Supervised,
    data: Any,
    validation: Any,
    **options: Any,
) -> Run:
    """Train one of several networks of an experiment; an interrupted one goes on.

    Smooth losses on all rows by default: L-BFGS in double precision.
    """
    if "learning_rate" not in options:
        objective.double()
        rows = len(data[0]) if isinstance(data, tuple) else len(data)
        options = {"optimizer": "lbfgs", "batch_size": rows} | options
    return fit(
        objective,
        data,
        validation=validation,
        out=folder.arguments.out / "checkpoint" / label,
        resume=True,
        **{"seed": folder.arguments.seed} | options,
    )


def _net(setting: Setting, kind: str, layers: int, seed: int) -> ContinuousNet:
    time = TimeBasis("piecewise-constant", layers, setting.horizon)
    return dense_net(
        kind, 2, setting.classes, width=setting.width, steps=layers, time=time, seed=seed
    )


def _objective(setting: Setting, net: ContinuousNet) -> Classification:
    return Classification(net, smoothness=setting.smoothness, head=setting.head)


@torch.no_grad()
def accuracy(net: ContinuousNet, data: Data) -> float:
    """The share of labels (rows, 1) that a network in evaluation mode predicts."""
    x, labels = data
    found = net(x.to(next(net.parameters()))).argmax(1, keepdim=True)
    return (found == labels).double().mean().item()


def _figures(net: ContinuousNet, run: Run, train: Data, validation: Data) -> dict[str, Any]:
    net.eval()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", SolveWarning)  # the table says which steps are too long
        report = stability_report(net, validation[0][:: max(1, len(validation[0]) // PROBED)])
    evolution = report.evolutions[0]
    ratio = evolution.h / evolution.bound if evolution.h and evolution.bound else None
    return {
        "accuracy": accuracy(net, validation),
        "train_accuracy": accuracy(net, train),
        "loss": run.history[-1]["loss"],
        "validation_loss": run.validation,
        "gain": float(report.worst[-1]),
        "step_over_bound": ratio,
        "weights": sum(p.numel() for p in net.parameters()),
        "seconds": run.seconds,
    }


def _table(results: Mapping[str, Mapping[str, Any]]) -> list[tuple[object, ...]]:
    head = ("", "validation", "training", "loss", "worst gain", "h/bound", "weights", "seconds")
    return [
        head,
        *(
            (
                LABELS[kind],
                f"{found['accuracy']:.2%}",
                f"{found['train_accuracy']:.2%}",
                f"{found['loss']:.2e}",
                f"{found['gain']:.3g}",
                "-" if found["step_over_bound"] is None else f"{found['step_over_bound']:.2f}",
                found["weights"],
                f"{found['seconds']:.0f}",
            )
            for kind, found in results.items()
        ),
    ]


def region_maps(nets: Mapping[str, ContinuousNet], data: Data) -> Section:
    """Which class networks see where in the plane, by their names."""
    from ..network_plots import regions

    x, labels = data
    pad = 0.05 * (x.amax(0) - x.amin(0)).max()
    low, high = x.amin(0) - pad, x.amax(0) + pad
    axes = [torch.linspace(float(a), float(b), 120) for a, b in zip(low, high, strict=True)]
    points = torch.cartesian_prod(*axes).double()
    maps = {}
    for name, net in nets.items():
        with torch.no_grad():
            found = net(points.to(next(net.parameters()))).argmax(1)
        maps[name] = found.view(len(axes[0]), -1).mT.numpy()
    figure = regions(axes[0].numpy(), axes[1].numpy(), maps, x.numpy(), labels[:, 0].numpy())
    return Section(
        "What they learned", "Classes in the plane, and validation points.", figure=figure
    )


def _sweep(
    folder: RunFolder, setting: Setting, kind: str, steps: int, train: Data, validation: Data
) -> dict[str, list[float]]:
    """The figures at each depth."""
    found = []
    for layers in DEPTHS:
        net = _net(setting, kind, layers, folder.arguments.seed)
        label = f"{kind}-{layers}"
        part = trained(folder, label, _objective(setting, net), train, validation, max_steps=steps)
        found.append(_figures(net, part, train, validation))
    return {key: [figures[key] for figures in found] for key in found[0]}


def _sweep_sections(
    sweep: Mapping[str, Mapping[str, Sequence[float]]], steps: int
) -> list[Section]:
    from ..plots import curves

    def lines(key: str) -> dict[str, Any]:
        return {LABELS[kind]: (DEPTHS, values[key]) for kind, values in sweep.items()}

    return [
        Section(
            title,
            f"After {steps} steps of 50 iterations of L-BFGS at each depth, at the same horizon.",
            figure=curves(lines(key), "layers", label, f"{title}, by dynamics", log=True),
        )
        for title, key, label in (
            ("Training loss against depth", "loss", "training loss"),
            ("Gain of perturbations against depth", "gain", "worst gain"),
        )
    ]
