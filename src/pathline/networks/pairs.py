"""Dynamics of two halves that move each other, whose steps can be undone.

Source: Haber and Ruthotto, Stable architectures for deep neural networks, Inverse Problems 34,
2017, arXiv 1705.03341; Chang et al., Reversible architectures for arbitrarily deep residual neural
networks, AAAI 2018, arXiv 1709.03698; Ruthotto and Haber, Deep neural networks motivated by
partial differential equations, JMIV 2020, arXiv 1804.04272.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ..errors import ShapeError
from ..integrate import Separable
from ..nets import Operator, ResidualLayer, SymmetricLayer, TimeBasis, TimeWeights
from .dynamics import CONSTANT, Dynamics, half_square, normalised, potential


class Pair(Dynamics):
    """Dynamics of two halves that move each other: dy/dt = f(t, z), dz/dt = g(t, y).

    Stepped by "verlet", z first, or "leapfrog", both of which can be undone.

    Args:
        augment: let z start at zero beside all features, which doubles them, in place of splitting
            the channels in halves.
    """

    method = "verlet"

    def __init__(self, time: TimeBasis, *, augment: bool) -> None:
        super().__init__(time)
        self.augment = augment

    def first(self, t: Tensor, z: Tensor) -> Tensor:
        """dy/dt."""
        raise NotImplementedError

    def second(self, t: Tensor, y: Tensor) -> Tensor:
        """dz/dt."""
        raise NotImplementedError

    def forward(self, t: Tensor, z: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        return self.first(t, z[1]), self.second(t, z[0])

    @property
    def field(self) -> Separable:
        """The two halves, of which the steps ask one at a time."""
        return Separable(self.first, self.second)

    @property
    def lossless(self) -> bool:
        return not self.augment

    def lift(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(y, z) of the features.

        Raises:
            ShapeError: their number is odd, and they are to be split.
        """
        if self.augment:
            return x, torch.zeros_like(x)
        if x.shape[1] % 2:
            raise ShapeError(
                f"{type(self).__name__} splits its features in halves and needs an even number of "
                f"channels, got {x.shape[1]} in {tuple(x.shape)}; or pass `augment=True`"
            )
        y, z = x.chunk(2, 1)
        return y, z

    def features(self, state: tuple[Tensor, Tensor]) -> Tensor:
        return torch.cat(state, 1)


class Hamiltonian(Pair):
    """y' = sigma(K z + b), z' = -sigma(K^T y + b): one matrix moves both halves.

    Args:
        operator: K, square, of as many features as a half has.
        time: as in `Dynamics`.
        activation: as in `pathline.nets.Layer`.
        augment: start from z = 0, as the source does; else the features are split.

    Source: arXiv 1705.03341, section 3.2.
    """

    def __init__(
        self,
        operator: Operator,
        time: TimeBasis = CONSTANT,
        *,
        activation: str = "tanh",
        augment: bool = False,
    ) -> None:
        super().__init__(time, augment=augment)
        self.layer = TimeWeights(ResidualLayer(operator, activation=activation), time)

    def first(self, t: Tensor, z: Tensor) -> Tensor:
        return self.layer(t, z)

    def second(self, t: Tensor, y: Tensor) -> Tensor:
        return -self.layer(t, y, adjoint=True)

    def step_bound(self, method: str, shape: Sequence[int]) -> float | None:
        """2 / |K| for "verlet" and "leapfrog"."""
        return 2 / self.norms(self.layer, half(shape, self.augment)) if verlet(method) else None


class TwoLayerHamiltonian(Pair):
    """y' = K1^T sigma(N(K1 z)), z' = -K2^T sigma(N(K2 y)), the first-order hyperbolic network.

    It is Hamiltonian, with the sums of Sigma(K1 z + b1) and Sigma(K2 y + b2), where there is no
    norm. Half the channels each, so half the weights of the other dynamics.

    Args:
        first, second: K1 and K2, of as many inputs as a half has features.
        time: as in `Dynamics`.
        activation, norm: as in `pathline.nets.Layer`.
        augment: start from z = 0; else the features are split.

    Source: arXiv 1709.03698, eq. 5, and arXiv 1804.04272, section 3.2; with the names of the halves
    exchanged, since "verlet" moves z first.
    """

    def __init__(
        self,
        first: Operator,
        second: Operator,
        time: TimeBasis = CONSTANT,
        *,
        activation: str = "relu",
        norm: bool = False,
        augment: bool = False,
    ) -> None:
        super().__init__(time, augment=augment)
        self.layers = nn.ModuleList(
            TimeWeights(SymmetricLayer(operator, activation=activation, norm=norm), time)
            for operator in (first, second)
        )

    def first(self, t: Tensor, z: Tensor) -> Tensor:
        return self.layers[0](t, z, ascent=True)

    def second(self, t: Tensor, y: Tensor) -> Tensor:
        return self.layers[1](t, y)

    def energy(self, t: float, state: tuple[Tensor, Tensor]) -> Tensor:
        """The Hamiltonian, kept up to O(h^2) if weights are constant; |z|^2 / 2 with norm."""
        first, second = self.weights()
        if normalised(first):
            return half_square(state)
        return potential(first, t, state[1]) + potential(second, t, state[0])

    def step_bound(self, method: str, shape: Sequence[int]) -> float | None:
        """2 / (|K1| |K2|) for "verlet" and "leapfrog", without norm."""
        first, second = self.weights()
        if normalised(first) or not verlet(method):
            return None
        shape = half(shape, self.augment)
        return 2 / (self.norms(first, shape) * self.norms(second, shape))


class SecondOrder(Pair):
    """y'' = -K^T sigma(N(K y)) as the pair y' = v, v' = -K^T sigma(N(K y)), from v = 0.

    By "verlet" this is the leapfrog network y_{j+1} = 2 y_j - y_{j-1} - h^2 K^T sigma(N(K y_j))
    with y_{-1} = y_0, the start of the sources: of first order.

    Args:
        operator: K.
        time: as in `Dynamics`.
        activation, norm: as in `pathline.nets.Layer`.

    Source: arXiv 1709.03698 (leapfrog), arXiv 1804.04272, section 3.3.
    """

    def __init__(
        self,
        operator: Operator,
        time: TimeBasis = CONSTANT,
        *,
        activation: str = "relu",
        norm: bool = False,
    ) -> None:
        super().__init__(time, augment=True)
        self.layer = TimeWeights(SymmetricLayer(operator, activation=activation, norm=norm), time)

    def first(self, t: Tensor, z: Tensor) -> Tensor:
        return z

    def second(self, t: Tensor, y: Tensor) -> Tensor:
        return self.layer(t, y)

    def features(self, state: tuple[Tensor, Tensor]) -> Tensor:
        return state[0]

    def energy(self, t: float, state: tuple[Tensor, Tensor]) -> Tensor:
        """|v|^2 / 2 and the sum of Sigma(K y + b), kept up to O(h^2) if weights are constant."""
        if normalised(self.layer):
            return half_square(state)
        return half_square(state[1]) + potential(self.layer, t, state[0])

    def step_bound(self, method: str, shape: Sequence[int]) -> float | None:
        """2 / |K| for "verlet" and "leapfrog", without norm."""
        if normalised(self.layer) or not verlet(method):
            return None
        return 2 / self.norms(self.layer, shape)


def verlet(method: str) -> bool:
    """It is one of the two methods for pairs, of one region of stability."""
    return method in ("verlet", "leapfrog")


def half(shape: Sequence[int], augment: bool) -> tuple[int, ...]:
    """The shape of one half of the features."""
    return (shape[0] if augment else shape[0] // 2, *shape[1:])
