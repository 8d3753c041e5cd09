"""The transport view of a network in the plane: features flow, and carry the classifier.

Source: Ruthotto, Differential equations for continuous-time deep learning, Notices of the AMS
2024, arXiv 2401.03965.
"""

import copy
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..control_report import write_animation
from ..data import moons
from ..nets import TimeBasis
from ..networks import Classification, ContinuousNet, dense_net, transport_view, viscous_scores
from ..report import Section
from ..train import files
from .experiment import Outcome, RunArguments
from .networks import accuracy, trained
from .race import RunFolder, columns

PAPER = "Ruthotto, Differential equations for continuous-time deep learning (arXiv 2401.03965)"
LAYERS, HORIZON, PIECES = 32, 5.0, 8
STEPS = {"small": 6, "full": 20}
POINTS = 500  # of each class
VISCOSITIES, NOISE = (0.0, 1e-3, 1e-2, 1e-1), 0.3


def run(arguments: RunArguments, size: str) -> Outcome:
    """Train z' = tanh(K z + b) in the plane on two moons, and draw its flow and its level sets."""
    from .. import network_plots

    steps = arguments.max_steps or STEPS[size]
    folder = RunFolder.open("transport-view", arguments, size, steps=steps)
    if folder.done:
        return folder.done
    source = torch.Generator().manual_seed(arguments.seed + 1000)
    train, validation = moons(POINTS, source), moons(POINTS, source)
    time = TimeBasis("piecewise-linear", PIECES, HORIZON)
    net = dense_net(
        "residual", 2, 2, width=2, steps=LAYERS, time=time, method="rk4", seed=arguments.seed
    )
    with torch.no_grad():  # the features begin as the inputs
        weight, bias = (p.requires_grad_(False) for p in net.opening.parameters())
        weight.copy_(torch.eye(2))
        bias.zero_()
    objective = Classification(net, smoothness=1e-3, decay=1e-3, head=1e-3)
    trained(folder, "net", objective, train, validation, max_steps=steps)
    files.save(net, arguments.out / "model")
    x, labels = validation
    view = transport_view(net, x[::2])
    finer = copy.deepcopy(net)
    for evolution in finer.evolutions():
        evolution.steps = 2 * LAYERS
    exact = transport_view(finer, x[::2], nodes=1).carried[0]
    error = abs(view.carried[0] - exact).max() / abs(exact).max()
    shared = (view.times, view.features, labels[::2, 0].numpy(), view.x, view.y, view.scores)
    gif = write_animation(arguments.out, partial(network_plots.advected, *shared), len(view.times))
    found = accuracy(net, validation)
    noise = NOISE * torch.randn(x.shape, generator=source, dtype=x.dtype)
    robust = {nu: [_viscous(net, z, labels, nu) for z in (x, x + noise)] for nu in VISCOSITIES}
    table = [
        ("validation accuracy", f"{found:.2%}"),
        ("training accuracy", f"{accuracy(net, train):.2%}"),
        ("change of the scores by twice the steps, relative", f"{error:.1e}"),
    ]
    told = (
        "The scores of a network that begins at a later time are the classifier that is carried "
        "along with the features: an affine one at the end, with straight level sets, and what "
        "the network computes at time zero."
    )
    sections = [
        Section("Two moons", told, table=[("", "measured"), *table]),
        *(
            Section(title, figure=network_plots.advected(*shared, upto=at))
            for title, at in (("Inputs", 0), ("Features at the end", len(view.times) - 1))
        ),
        Section(
            "With diffusion",
            "Accuracy of scores averaged over noisy paths, which solve the same equation with a "
            f"viscosity; of inputs, and of inputs with normal noise of {NOISE:g}.",
            table=[
                ("viscosity", "inputs", "noisy inputs"),
                *((f"{nu:g}", *(f"{a:.2%}" for a in pair)) for nu, pair in robust.items()),
            ],
        ),
        Section("The flow", "As in animation.gif beside this file.", animation=gif),
    ]
    details: dict[str, Any] = {"accuracy": found, "step_error": float(error)}
    details["viscous_accuracy"] = {f"{nu:g}": pair for nu, pair in robust.items()}
    text = columns(table)
    source_line = f"{PAPER}, which shows pictures"
    outcome = Outcome(1 - found, None, source_line, text, details)
    return folder.write(outcome, "The transport view of a network", sections)


def _viscous(net: ContinuousNet, x: Tensor, labels: Tensor, viscosity: float) -> float:
    """The share of labels (rows, 1) that averaged scores predict."""
    scores = viscous_scores(net, x, viscosity=viscosity, samples=16)
    return (scores.argmax(1, keepdim=True) == labels).double().mean().item()
