"""Networks averaged over noisy trajectories, which is diffusion of the classifier.

Source: Wang, Yuan, Shi, Osher, ResNets ensemble via the Feynman-Kac formalism to improve natural
and robust accuracies, NeurIPS 2019, arXiv 1811.10745.
"""

from math import isfinite, sqrt
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from ..errors import ArgumentError
from .net import ContinuousNet, Evolution


@torch.no_grad()
def viscous_scores(
    net: ContinuousNet, x: Tensor, *, viscosity: float, samples: int = 32, seed: int = 0
) -> Tensor:
    """The outputs of a network, averaged over paths dz = v dt + sqrt(2 viscosity) dW of its states.

    By the formula of Feynman and Kac that is the solution u(0, z) of

        du/dt + v . grad u + viscosity laplacian u = 0,    u(T, z) = head(z),

    the carried classifier of `transport_view` with diffusion, so a small change of an input changes
    it less. Noise is added after each step of the network's own method, of first order in the step,
    and comes in pairs of opposite signs.

    Args:
        net: of evolutions with fixed steps; used in evaluation mode.
        x: inputs, (batch, ...).
        viscosity: at least 0, in units of the state's squares over time.
        samples: paths of each input, an even number.
        seed: of the noise; the same one gives the same outputs.

    Returns:
        (batch, outputs...), as `net(x)` is, which it equals without viscosity where the method
        keeps nothing from step to step; others start anew after each.

    Raises:
        ArgumentError: a number is out of range, or the network takes adaptive steps.
    """
    if not (viscosity >= 0 and isfinite(viscosity)):
        raise ArgumentError(f"`viscosity` must be at least 0 and finite, got {viscosity!r}")
    if not isinstance(samples, int) or samples < 2 or samples % 2:
        raise ArgumentError(f"`samples` must be a positive even integer, got {samples!r}")
    if any(part.steps is None for part in net.evolutions()):
        raise ArgumentError("`net` must take fixed steps, got an adaptive method")
    like = next(net.parameters())
    generator = torch.Generator(like.device).manual_seed(seed)
    training = net.training
    net.eval()
    try:
        z = net.opening(x.to(like))
        z = z.repeat(samples, *(1,) * (z.ndim - 1))
        for stage in net.stages:
            if not isinstance(stage, Evolution):
                z = stage(z)
                continue
            z = _noisy(stage, z, viscosity, generator)
        out = net.head(z)
    finally:
        net.train(training)
    mean: Tensor = out.unflatten(0, (samples, len(x))).mean(0)
    return mean


def _noisy(evolution: Evolution, x: Tensor, viscosity: float, generator: torch.Generator) -> Tensor:
    state, h = evolution.dynamics.lift(x), evolution.step
    assert h is not None and evolution.steps is not None
    size = sqrt(2 * viscosity * h)

    def moved(leaf: Tensor) -> Tensor:
        half = leaf.new_empty((len(leaf) // 2, *leaf.shape[1:])).normal_(generator=generator)
        return leaf + size * torch.cat([half, -half])

    for n in range(evolution.steps):
        state = evolution.evolve(state, n * h, (n + 1) * h)
        state = pytree.tree_map(moved, state)
    features: Any = evolution.dynamics.features(state)
    return features
