"""Classification by transport: features that flow, and the classifier that is carried with them.

The scores u(t, z) of a network that begins at time t with the state z obey

    du/dt + v(t, z) . grad u = 0,    u(T, z) = head(z),

so the classifier that a network is, u(0, .), is its affine head carried back along the flow of the
features, and u is the same all along the path of a point.

Source: Ruthotto, Differential equations for continuous-time deep learning, Notices of the AMS
2024, arXiv 2401.03965.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ..errors import ArgumentError, ShapeError
from .net import ContinuousNet, Evolution

ROOM = 0.1  # beside the points, of their extent


@dataclass(frozen=True)
class TransportView:
    """What `transport_view` found; `pathline.network_plots.advected` draws it."""

    times: np.ndarray  # (nodes + 1,)
    features: np.ndarray  # (nodes + 1, batch, 2), of the points
    x: np.ndarray  # (grid,), coordinates of the scores
    y: np.ndarray  # (grid,)
    scores: np.ndarray  # (nodes + 1, grid, grid, outputs): u(t, z), y first
    carried: np.ndarray  # (nodes + 1, batch, outputs): u at the features


@torch.no_grad()
def transport_view(
    net: ContinuousNet, x: Tensor, *, nodes: int | None = None, grid: int = 80
) -> TransportView:
    """The flow of the features of points, and the scores as functions of the plane over time.

    Args:
        net: of one evolution of fixed steps whose state is a point of the plane, (batch, 2).
        x: inputs, (batch, ...).
        nodes: times after the first, a divisor of the number of steps; all steps if None.
        grid: points a side, around all features.

    Raises:
        ArgumentError: the network has other stages, or the nodes do not divide its steps.
        ShapeError: its state is not (batch, 2), or `x` is empty.
    """
    stages = list(net.stages)
    if len(stages) != 1 or not isinstance(stages[0], Evolution) or stages[0].steps is None:
        raise ArgumentError("`net` must be of one evolution of fixed steps")
    evolution = stages[0]
    nodes = evolution.steps if nodes is None else nodes
    assert nodes is not None and evolution.steps is not None
    if nodes < 1 or evolution.steps % nodes:
        raise ArgumentError(f"`nodes` must divide the {evolution.steps} steps, got {nodes!r}")
    dynamics = evolution.dynamics
    if not len(x):
        raise ShapeError(f"`x` must hold at least one input, got shape {tuple(x.shape)}")
    state = dynamics.lift(net.opening(x.to(next(net.parameters()))))
    if not isinstance(state, Tensor) or state.ndim != 2 or state.shape[1] != 2:
        got = tuple(state.shape) if isinstance(state, Tensor) else f"a pair, of {type(dynamics)}"
        raise ShapeError(f"the state of `net` must be points of the plane (batch, 2), got {got}")
    times, features = evolution.trajectory(state, nodes)

    def scores(z: Tensor, t: float) -> Tensor:
        last = evolution.evolve(z, t) if t < dynamics.horizon else z
        out: Tensor = net.head(dynamics.features(last))
        return out

    low, high = features.amin((0, 1)), features.amax((0, 1))
    pad = ROOM * (high - low).max()
    axes = [
        torch.linspace(float(a - pad), float(b + pad), grid).to(state)
        for a, b in zip(low, high, strict=True)
    ]
    points = torch.stack(torch.meshgrid(*axes, indexing="xy"), -1).flatten(0, 1)
    fields = [scores(points, float(t)).view(grid, grid, -1) for t in times]
    carried = [scores(z, float(t)) for t, z in zip(times, features, strict=True)]
    arrays = times, features, *axes, torch.stack(fields), torch.stack(carried)
    return TransportView(*(part.double().cpu().numpy() for part in arrays))
