"""Equations whose time steps are the layers of a network.

A dynamics is a velocity dz/dt = v(t, z) on [0, horizon] whose weights are functions of time, and
says how features become its first state and its last state features. What couples the features, a
matrix, a convolution or something leaner, is an operator of `pathline.nets`.

Source: Haber and Ruthotto, Stable architectures for deep neural networks, Inverse Problems 34,
2017, arXiv 1705.03341; Chang et al., Reversible architectures for arbitrarily deep residual neural
networks, AAAI 2018, arXiv 1709.03698; Ruthotto and Haber, Deep neural networks motivated by
partial differential equations, JMIV 2020, arXiv 1804.04272.
"""

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import ArgumentError
from ..nets import (
    AntisymmetricLayer,
    Layer,
    Operator,
    ResidualLayer,
    SymmetricLayer,
    TimeBasis,
    TimeWeights,
    operator_norm,
)

CONSTANT = TimeBasis()
# Bounds of h omega on oscillations; Verlet's and leapfrog's are of the pair.
IMAGINARY = {"rk4": 8**0.5, "reversible_midpoint": 1.0, "asynchronous_leapfrog": 1.0}


class Dynamics(nn.Module):
    """What all dynamics share. A subclass has at least `forward`.

    Args:
        time: the basis of the weights in time, and the horizon; constant weights on [0, 1] by
            default. `TimeBasis(order=8)` gives each of eight equal steps weights of its own.

    Raises:
        ArgumentError: `time` is no `TimeBasis`.
    """

    method = "euler"  # where the user names none

    def __init__(self, time: TimeBasis = CONSTANT) -> None:
        super().__init__()
        if not isinstance(time, TimeBasis):
            raise ArgumentError(f"`time` must be a nets.TimeBasis, got {time!r}")
        self.time = time

    @property
    def horizon(self) -> float:
        """The end of time."""
        return self.time.horizon

    def forward(self, t: Tensor, z: Any) -> Any:
        """dz/dt, like the state z, at time t, ()."""
        raise NotImplementedError

    @property
    def field(self) -> Any:
        """What `odeint` integrates."""
        return self

    @property
    def lossless(self) -> bool:
        """`lift` and `features` undo each other, so that `ContinuousNet.inverse` can."""
        return True

    def lift(self, x: Tensor) -> Any:
        """The first state of features (batch, channels, ...)."""
        return x

    def features(self, state: Any) -> Tensor:
        """What the next part of a network sees of a state, (batch, channels, ...)."""
        return state

    def energy(self, t: float, state: Any) -> Tensor:
        """(batch,): what the equation keeps or diminishes where it is known, else |z|^2 / 2."""
        return half_square(state)

    def step_bound(self, method: str, shape: Sequence[int]) -> float | None:
        """The longest stable step with the weights as they are, None where none is known.

        Args:
            method: of integration.
            shape: of the features of a sample, without the batch.
        """
        return None

    def weights(self) -> list[TimeWeights]:
        """Its layers with weights in time."""
        return [part for part in self.modules() if isinstance(part, TimeWeights)]

    def smoothness(self) -> Tensor:
        """Half of the integral of |theta'(t)|^2 over all weights."""
        return torch.stack([layer.smoothness() for layer in self.weights()]).sum()

    def decay(self) -> Tensor:
        """Half of the integral of |theta(t)|^2 over all weights."""
        return torch.stack([layer.decay() for layer in self.weights()]).sum()

    def refined(self, order: int) -> "Dynamics":
        """The same equation with the weights in a basis of higher order, to go on training.

        Raises:
            ArgumentError: the order is lower, or no multiple where the basis has pieces.
        """
        finer = copy.deepcopy(self)
        for part in list(finer.modules()):
            if isinstance(part, Dynamics):
                part.time = part.time.refined(order)
            for name, child in list(part.named_children()):
                if isinstance(child, TimeWeights):
                    setattr(part, name, child.refined(order))
        return finer

    def norms(self, layer: TimeWeights, shape: Sequence[int]) -> float:
        """The largest norm of the operator of a layer at times all over the horizon."""
        count = max(8, layer.basis.order)
        times = (torch.arange(count) + 0.5) * (self.horizon / count)
        parts: list[Any] = [layer.frozen(t) for t in times]
        return max(operator_norm(part.operator, shape) for part in parts)

    def extra_repr(self) -> str:
        return f"{self.time.name}, order={self.time.order}, horizon={self.horizon:g}"


class Residual(Dynamics):
    """z' = sigma(K(t) z + b(t)): the plain residual network by Euler's method, stable by luck.

    Args:
        operator: K, square.
        time: as in `Dynamics`.
        activation, norm: as in `pathline.nets.Layer`.
    """

    def __init__(
        self,
        operator: Operator,
        time: TimeBasis = CONSTANT,
        *,
        activation: str = "tanh",
        norm: bool = False,
    ) -> None:
        super().__init__(time)
        self.layer = TimeWeights(ResidualLayer(operator, activation=activation, norm=norm), time)

    def forward(self, t: Tensor, z: Tensor) -> Tensor:
        return self.layer(t, z)


class Antisymmetric(Dynamics):
    """z' = sigma((K - K^T - gamma I) z + b), which turns features and neither loses nor adds any.

    The spectrum is imaginary, but for the diffusion gamma: rk4 and the two-step midpoint rule
    (method="reversible_midpoint", with gradient="reversible") are stable, Euler's method needs
    gamma > 0 and h <= 2 gamma / (gamma^2 + |K - K^T|^2).

    Args:
        operator: K, square.
        time: as in `Dynamics`.
        gamma: diffusion, at least 0.
        activation, norm: as in `pathline.nets.Layer`.

    Source: arXiv 1705.03341, section 3.1; arXiv 1709.03698 (midpoint).
    """

    method = "rk4"

    def __init__(
        self,
        operator: Operator,
        time: TimeBasis = CONSTANT,
        *,
        gamma: float = 0.0,
        activation: str = "tanh",
        norm: bool = False,
    ) -> None:
        super().__init__(time)
        self.gamma = gamma
        layer = AntisymmetricLayer(operator, gamma, activation=activation, norm=norm)
        self.layer = TimeWeights(layer, time)

    def forward(self, t: Tensor, z: Tensor) -> Tensor:
        return self.layer(t, z)

    def step_bound(self, method: str, shape: Sequence[int]) -> float | None:
        """Of a linear activation, for the eigenvalues -gamma + i omega, omega <= 2 |K|."""
        omega = 2 * self.norms(self.layer, shape)
        if method == "euler":
            return 2 * self.gamma / (self.gamma**2 + omega**2)
        limit = IMAGINARY.get(method)
        return None if limit is None or self.gamma else limit / omega


class Parabolic(Dynamics):
    """z' = -K^T sigma(N(K z)), like a heat equation: it smooths, and forgets.

    Without `norm` no two solutions part, whatever the weights do in time, and Euler's steps keep
    that up to h = 2 / |K|^2.

    Args:
        operator: K; the one kind that need not be square.
        time: as in `Dynamics`.
        activation, norm: as in `pathline.nets.Layer`.

    Source: arXiv 1804.04272, section 3.1.
    """

    def __init__(
        self,
        operator: Operator,
        time: TimeBasis = CONSTANT,
        *,
        activation: str = "relu",
        norm: bool = False,
    ) -> None:
        super().__init__(time)
        self.layer = TimeWeights(SymmetricLayer(operator, activation=activation, norm=norm), time)

    def forward(self, t: Tensor, z: Tensor) -> Tensor:
        return self.layer(t, z)

    def energy(self, t: float, state: Tensor) -> Tensor:
        """The sum of Sigma(K z + b), which decays if weights are constant; |z|^2 / 2 with norm."""
        return potential(self.layer, t, state)

    def step_bound(self, method: str, shape: Sequence[int]) -> float | None:
        """2 / |K|^2 for Euler's method, without norm."""
        if method != "euler" or normalised(self.layer):
            return None
        return 2 / self.norms(self.layer, shape) ** 2


class Augmented(Dynamics):
    """Any dynamics on features with channels of zeros appended, in which paths need not cross.

    Args:
        dynamics: of channels + `extra` channels.
        extra: how many to append, at least one.

    Source: Dupont, Doucet, Teh, Augmented neural ODEs, NeurIPS 2019, arXiv 1904.01681.
    """

    def __init__(self, dynamics: Dynamics, extra: int) -> None:
        super().__init__(dynamics.time)
        if not isinstance(extra, int) or extra < 1:
            raise ArgumentError(f"`extra` must be a positive integer, got {extra!r}")
        self.dynamics, self.extra = dynamics, extra
        self.method = dynamics.method

    def forward(self, t: Tensor, z: Any) -> Any:
        return self.dynamics(t, z)

    @property
    def field(self) -> Any:
        return self.dynamics.field

    @property
    def lossless(self) -> bool:
        return False

    def lift(self, x: Tensor) -> Any:
        zeros = x.new_zeros(x.shape[0], self.extra, *x.shape[2:])
        return self.dynamics.lift(torch.cat([x, zeros], 1))

    def features(self, state: Any) -> Tensor:
        return self.dynamics.features(state)

    def energy(self, t: float, state: Any) -> Tensor:
        return self.dynamics.energy(t, state)

    def step_bound(self, method: str, shape: Sequence[int]) -> float | None:
        return self.dynamics.step_bound(method, (shape[0] + self.extra, *shape[1:]))


def half_square(state: Tensor | tuple[Tensor, ...]) -> Tensor:
    """|z|^2 / 2 of each sample, (batch,)."""
    parts = (state,) if isinstance(state, Tensor) else state
    return torch.stack([z.flatten(1).square().sum(1) for z in parts]).sum(0) / 2


def potential(layer: TimeWeights, t: float, z: Tensor) -> Tensor:
    """The sum of Sigma(K(t) z + b(t)) of a symmetric layer, (batch,); |z|^2 / 2 with norm."""
    if normalised(layer):
        return half_square(z)
    symmetric = layer.frozen(t)
    assert isinstance(symmetric, SymmetricLayer)
    return symmetric.potential(z)


def normalised(layer: TimeWeights) -> bool:
    """It has a norm, with which no potential and no bound are known."""
    assert isinstance(layer.module, Layer)
    return layer.module.norm is not None
