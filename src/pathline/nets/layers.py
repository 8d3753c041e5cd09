"""Layers of stable networks: velocities z -> v(z) made of a linear operator and its adjoint.

Features are (batch, channels, ...), whatever the operator takes. With a monotone activation of
slopes in [0, 1], their Jacobians have the spectra that their docstrings name.

Source: Haber and Ruthotto, Stable architectures for deep neural networks, Inverse Problems 34,
2017; Ruthotto and Haber, Deep neural networks motivated by partial differential equations, JMIV
2020, arXiv 1804.04272.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..errors import ArgumentError, unknown
from ..native import norms
from .operators import Operator

SMALL = 1e-4  # beside the squares of the features at a pixel


@dataclass(frozen=True)
class Activation:
    """A monotone function of slopes in [0, 1], and its primitive."""

    value: Callable[[Tensor], Tensor]
    inplace: Callable[[Tensor], Tensor]  # the same, in place of a tensor that nobody else has
    primitive: Callable[[Tensor], Tensor]


def _log_cosh(x: Tensor) -> Tensor:
    return x.abs() + F.softplus(-2 * x.abs()) - 0.6931471805599453  # log 2


ACTIVATIONS = {
    "tanh": Activation(torch.tanh, torch.tanh_, _log_cosh),
    "relu": Activation(torch.relu, torch.relu_, lambda x: torch.relu(x).square() / 2),
    "identity": Activation(lambda x: x, lambda x: x, lambda x: x.square() / 2),
}


class ChannelNorm(nn.Module):
    """scale z / sqrt(sum over channels of z^2 + 1e-4) + bias, at each pixel by itself.

    A symmetric layer around it is like the flow that diminishes total variation. It keeps no
    statistics, so a sample's result depends on no other, and layers can be computed twice.

    Args:
        channels: entries of axis 1 of z.
        scale: its initial scale.

    Source: arXiv 1804.04272, section 4, and the authors' Meganet (tvNormLayer).
    """

    def __init__(self, channels: int, scale: float = 1.0) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.full((channels,), float(scale)))
        self.bias = nn.Parameter(torch.zeros(channels))

    def forward(self, z: Tensor, *, relu: bool = False) -> Tensor:
        """Like z, (batch, channels, ...); where `relu`, its maximum with 0."""
        scale, bias = self.scale, self.bias
        if norms.can_serve(z, scale, bias):
            return norms.channel_norm(z, scale, bias, small=SMALL, relu=relu)
        inverse = (z.square().sum(1, keepdim=True) + SMALL).rsqrt()
        y = (z * inverse * per_channel(scale, z)).add_(per_channel(bias, z))
        return y.relu_() if relu else y


class Layer(nn.Module):
    """What the layers below share: an operator, an activation, a bias or a norm inside it.

    Args:
        operator: K.
        activation: a name in "tanh", "relu", "identity".
        norm: have a `ChannelNorm` of K z in place of the bias.

    Raises:
        ArgumentError: K is no `Operator`, or not square where it must be, or the activation is
            not known.
    """

    square = True

    def __init__(self, operator: Operator, *, activation: str = "tanh", norm: bool = False) -> None:
        super().__init__()
        if not isinstance(operator, Operator):
            raise ArgumentError(
                f"`operator` must be a nets.Operator, such as Dense or Conv, got {operator!r}"
            )
        if activation not in ACTIVATIONS:
            raise ArgumentError(unknown("`activation`", str(activation), ACTIVATIONS))
        if self.square and operator.inputs != operator.outputs:
            raise ArgumentError(
                f"{type(self).__name__} needs an `operator` with as many outputs as inputs, got "
                f"{operator.inputs} and {operator.outputs}"
            )
        self.operator, self.activation = operator, activation
        self.sigma = ACTIVATIONS[activation]
        self.norm = ChannelNorm(operator.outputs) if norm else None
        self.bias = None if norm else nn.Parameter(torch.zeros(operator.outputs))

    def shifted(self, y: Tensor) -> Tensor:
        """y = K z with the bias added, or normalised."""
        if self.norm is not None:
            return self.norm(y)
        assert self.bias is not None
        return y + per_channel(self.bias, y)

    def activated(self, y: Tensor) -> Tensor:
        """sigma of y = K z with the bias added, or normalised."""
        if self.norm is not None and self.activation == "relu":
            return self.norm(y, relu=True)
        return self.sigma.inplace(self.shifted(y))

    def extra_repr(self) -> str:
        return self.activation


class ResidualLayer(Layer):
    """v(z) = sigma(K z + b), of the plain residual network; its spectrum is anywhere."""

    def forward(self, z: Tensor, *, adjoint: bool = False) -> Tensor:
        """sigma(K z + b), or sigma(K^T z + b) where `adjoint`."""
        y = self.operator.adjoint(z) if adjoint else self.operator(z)
        return self.activated(y)


class AntisymmetricLayer(Layer):
    """v(z) = sigma((K - K^T - gamma I) z + b), of imaginary spectrum, but for the diffusion gamma.

    Args:
        gamma: at least 0.
    """

    def __init__(
        self,
        operator: Operator,
        gamma: float = 0.0,
        *,
        activation: str = "tanh",
        norm: bool = False,
    ) -> None:
        super().__init__(operator, activation=activation, norm=norm)
        if not gamma >= 0:
            raise ArgumentError(f"`gamma` must be at least 0, got {gamma!r}")
        self.gamma = gamma

    def forward(self, z: Tensor) -> Tensor:
        y = self.operator(z) - self.operator.adjoint(z)
        return self.activated(y - self.gamma * z if self.gamma else y)


class SymmetricLayer(Layer):
    """v(z) = -K^T sigma(K z + b), minus the gradient of the sum of Sigma(K z + b), Sigma' = sigma.

    Its Jacobian is symmetric without positive eigenvalues, so z' = v(z) never drives two solutions
    apart, for weights that change in time as well, and Euler's steps do not up to 2 / |K|^2. With
    `norm` it is no gradient, and none of this is known.
    """

    square = False

    def forward(self, z: Tensor, *, ascent: bool = False) -> Tensor:
        """v(z), or -v(z) where `ascent`."""
        y = self.activated(self.operator(z))
        return self.operator.adjoint(y) if ascent else self.operator.minus_adjoint(y)

    def potential(self, z: Tensor) -> Tensor:
        """The sum of Sigma(K z + b), (batch,)."""
        return self.sigma.primitive(self.shifted(self.operator(z))).flatten(1).sum(1)


def per_channel(parameter: Tensor, like: Tensor) -> Tensor:
    """(channels,) in the shape that broadcasts against (batch, channels, ...)."""
    return parameter.view(-1, *(1,) * (like.ndim - 2))
