"""Networks put together from the parts of this package: published ones, and one for tables."""

import inspect
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import partial, wraps
from itertools import pairwise
from typing import Any, ParamSpec

import torch
from torch import Tensor, nn

from ..errors import ArgumentError, ShapeError, unknown
from ..nets import CirculantConv, Conv, Dense, Haar, LeanConv, Operator, ShiftConv, TimeBasis
from .dynamics import Antisymmetric, Dynamics, Parabolic, Residual
from .net import ContinuousNet
from .pairs import Hamiltonian, SecondOrder, TwoLayerHamiltonian
from .semi_implicit import SemiImplicit

P = ParamSpec("P")
OPERATORS: dict[str, Callable[[int], Operator]] = {
    "full": Conv,
    "lean": LeanConv,
    "depthwise": partial(LeanConv, stencil="3x3"),
    "circulant": CirculantConv,
    "shift": ShiftConv,
}
KINDS = ("parabolic", "hamiltonian", "second-order", "residual")
DENSE_KINDS = (*KINDS, "antisymmetric")


def _recorded(make: Callable[P, ContinuousNet]) -> Callable[P, ContinuousNet]:
    """The network remembers how it was made, so that it can be saved and made again."""
    signature = inspect.signature(make)

    @wraps(make)
    def recorded(*args: P.args, **kwargs: P.kwargs) -> ContinuousNet:
        net = make(*args, **kwargs)
        given = signature.bind(*args, **kwargs)
        given.apply_defaults()
        options = {name: _plain(value) for name, value in given.arguments.items()}
        net.made = {"name": make.__name__, "options": options}
        return net

    return recorded


def _plain(value: Any) -> Any:
    """An argument as JSON gives it back."""
    if isinstance(value, TimeBasis):
        return asdict(value)
    return list(value) if isinstance(value, list | tuple) else value


@_recorded
def pde_cnn(
    kind: str,
    *,
    channels: int = 3,
    classes: int = 10,
    widths: Sequence[int] = (32, 64, 112, 112),
    steps: int = 3,
    h: float = 1.0,
    operator: str = "full",
    norm: bool = True,
    gradient: str = "discrete",
    seed: int = 0,
) -> ContinuousNet:
    """A classifier of images (batch, channels, height, width) by a partial differential equation.

    A 3x3 opening layer; blocks of `steps` steps with weights of their own, of widths[0],
    widths[1], ...; after each a 1x1 layer to the next width and 2x2 average pooling, of all pixels
    after the last; and an affine classifier. The published networks, counts of weights in brackets:
    (16, 32, 64, 128, 128) for STL-10 (618554; Hamiltonian 324794), the default for CIFAR-10
    (502570; 264106), (32, 64, 128, 256) with 100 classes for CIFAR-100 (652484; 362180).

    Args:
        kind: "parabolic", "hamiltonian" (first-order hyperbolic; half the weights, reversible) or
            "second-order" (hyperbolic, leapfrog; reversible). And "residual", relu(N(K z)), which
            is no such equation, for comparison.
        channels, classes: of images and labels.
        widths: of the blocks, and of the classifier; at least two.
        steps, h: of each block, and their length.
        operator: what couples the channels of a layer: "full" 3x3 kernels, or a "lean" (5-point),
            "depthwise" (3x3 for each channel, and 1x1), "circulant" or "shift" one, see
            `pathline.nets`.
        norm: have a `ChannelNorm` inside the layers, as published; with it no bound of stability
            is known.
        gradient: as in `Evolution`.
        seed: of the initial weights.

    Raises:
        ArgumentError: a name is not known, or there are no two widths.

    Source: Ruthotto and Haber, Deep neural networks motivated by partial differential equations,
    JMIV 2020, arXiv 1804.04272, section 4; and the authors' Meganet (examples of 2018).
    """
    if kind not in KINDS:
        raise ArgumentError(unknown("`kind`", str(kind), KINDS))
    if operator not in OPERATORS:
        raise ArgumentError(unknown("`operator`", str(operator), OPERATORS))
    couple = OPERATORS[operator]
    if len(widths) < 2:
        raise ArgumentError(f"`widths` must be at least two, got {tuple(widths)}")
    time = TimeBasis("piecewise-constant", steps, steps * h)

    def block(width: int) -> Dynamics:
        if kind == "parabolic":
            return Parabolic(couple(width), time, norm=norm)
        if kind == "second-order":
            return SecondOrder(couple(width), time, norm=norm)
        if kind == "residual":
            return Residual(couple(width), time, activation="relu", norm=norm)
        half = width // 2
        return TwoLayerHamiltonian(couple(half), couple(half), time, norm=norm)

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        opening = nn.Sequential(
            Inputs(channels, 2 ** (len(widths) - 2)), image_layer(channels, widths[0], size=3)
        )
        stages: list[nn.Module] = []
        for width, after in pairwise(widths):
            stages += [block(width), image_layer(width, after, size=1), nn.AvgPool2d(2)]
        stages[-1] = nn.AdaptiveAvgPool2d(1)
        head = nn.Sequential(nn.Flatten(), nn.Linear(widths[-1], classes))
        return ContinuousNet(opening, stages, head, steps=steps, gradient=gradient)


@_recorded
def imexnet(
    *,
    channels: int = 1,
    classes: int = 4,
    widths: Sequence[int] = (64, 128, 256),
    steps: int = 3,
    h: float = 1.0,
    implicit: bool = True,
    form: str = "imex",
    boundary: str = "periodic",
    norm: bool = True,
    gradient: str = "discrete",
    seed: int = 0,
) -> ContinuousNet:
    """Labels of pixels by semi-implicit steps, whose field of view is the whole image.

    For each width a 3x3 layer that leads to it, and `steps` steps of `SemiImplicit`; then a 1x1
    classifier, of logits (batch, classes, height, width). The defaults have the 2691648 weights in
    full 3x3 kernels of the published network for Q-tips, and 12096 in the implicit ones (the paper
    counts 9792 of these).

    Args:
        channels, classes: of images and labels.
        widths: of the groups of layers.
        steps, h: of each group, and their length.
        implicit: False leaves the implicit part out, for comparison.
        form, boundary: as in `SemiImplicit`.
        norm: have a `ChannelNorm` inside the layers.
        gradient: as in `Evolution`.
        seed: of the initial weights.

    Source: Haber, Lensink, Treister, Ruthotto, IMEXnet, ICML 2019, arXiv 1903.02639. Its layers
    are K^T relu(N(K z)) with K of zero mean; these are minus that, the parabolic layer.
    """
    time = TimeBasis("piecewise-constant", steps, steps * h)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        stages: list[nn.Module] = []
        for before, width in pairwise((channels, *widths)):
            explicit = Parabolic(Conv(width), time, norm=norm)
            block = SemiImplicit(explicit, width, form=form, boundary=boundary)
            stages += [image_layer(before, width, size=3), block if implicit else explicit]
        head = nn.Conv2d(widths[-1], classes, 1)
        return ContinuousNet(Inputs(channels, 1), stages, head, steps=steps, gradient=gradient)


@_recorded
def wavelet_net(
    *,
    channels: int = 3,
    classes: int = 10,
    width: int = 16,
    levels: int = 3,
    steps: int = 3,
    h: float = 1.0,
    operator: str = "full",
    norm: bool = True,
    gradient: str = "reversible",
    seed: int = 0,
) -> ContinuousNet:
    """A classifier of images that loses nothing on the way to its head, and can be run backwards.

    Channels of zeros beside those of the image; `levels` blocks of `steps` steps of
    `TwoLayerHamiltonian`, between them and after the last Haar wavelets in place of pooling, so
    that widths are width, 4 width, 16 width, ...; and the mean over pixels to an affine classifier.
    `net.inverse(net.features(x))` is x. "reversible" gradients keep the last state of each block.

    Args:
        channels, classes: of images and labels; height and width are multiples of 2^levels.
        width: of the first block, even, and at least the number of channels.
        levels: blocks; each has sixteen times the weights of the one before, or four with a lean
            `operator`.
        steps, h, operator, norm, gradient, seed: as in `pde_cnn`.

    Raises:
        ArgumentError: the operator is not known, or the width too small or odd.

    Source: Lensink, Peters, Haber, Fully hyperbolic convolutional neural networks, 2019, arXiv
    1905.10484, whose blocks are second-order; these are of the first-order system.
    """
    if operator not in OPERATORS:
        raise ArgumentError(unknown("`operator`", str(operator), OPERATORS))
    if width % 2 or width < channels:
        raise ArgumentError(
            f"`width` must be even and at least the {channels} channels, got {width!r}"
        )
    time = TimeBasis("piecewise-constant", steps, steps * h)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        stages: list[nn.Module] = []
        for k in range(levels):
            couple = partial(OPERATORS[operator], width * 4**k // 2)
            stages += [TwoLayerHamiltonian(couple(), couple(), time, norm=norm), Haar()]
        last = nn.Linear(width * 4**levels, classes)
        head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), last)
        opening = ZeroChannels(channels, width - channels)
        return ContinuousNet(opening, stages, head, steps=steps, gradient=gradient)


class ZeroChannels(nn.Module):
    """Channels of zeros behind those of an image.

    Args:
        channels: of the image.
        extra: of zeros.
    """

    def __init__(self, channels: int, extra: int) -> None:
        super().__init__()
        self.channels, self.extra = channels, extra

    def forward(self, x: Tensor) -> Tensor:
        """(batch, channels + extra, height, width).

        Raises:
            ShapeError: `x` is no image of as many channels.
        """
        x = Inputs(self.channels, 1)(x)
        return nn.functional.pad(x, (0, 0, 0, 0, 0, self.extra))

    def inverse(self, z: Tensor) -> Tensor:
        """The image, (batch, channels, height, width)."""
        return z[:, : self.channels]


class Inputs(nn.Module):
    """Passes on what has the right shape.

    Args:
        channels: of images, or columns of rows.
        pixels: the least height and width; None for rows.
    """

    def __init__(self, channels: int, pixels: int | None = None) -> None:
        super().__init__()
        self.channels, self.pixels = channels, pixels

    def forward(self, x: Tensor) -> Tensor:
        """`x` itself.

        Raises:
            ArgumentError: it holds no floating-point numbers.
            ShapeError: it has another shape.
        """
        if not x.is_floating_point():
            raise ArgumentError(f"the network needs floating-point numbers, got {x.dtype}")
        if self.pixels is None:
            wanted, fits = f"rows (batch, {self.channels})", x.ndim == 2
        else:
            wanted = (
                f"images (batch, {self.channels}, height, width) of at least {self.pixels} pixels "
                "in height and width"
            )
            fits = x.ndim == 4 and min(x.shape[2:]) >= self.pixels
        if not fits or x.shape[1] != self.channels:
            raise ShapeError(f"the network needs {wanted}, got {tuple(x.shape)}")
        return x


def image_layer(inputs: int, outputs: int, *, size: int) -> nn.Sequential:
    """relu(batch norm(convolution)), which changes the width between blocks."""
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, size, padding=size // 2, bias=False),
        nn.BatchNorm2d(outputs),
        nn.ReLU(),
    )


@_recorded
def dense_net(
    kind: str,
    inputs: int,
    outputs: int,
    *,
    width: int = 16,
    steps: int | None = 8,
    time: TimeBasis | None = None,
    gamma: float = 0.0,
    method: str | None = None,
    gradient: str = "discrete",
    tolerance: float = 1e-5,
    seed: int = 0,
) -> ContinuousNet:
    """A network for rows of a table: an affine opening layer, a dense dynamics, an affine head.

    Args:
        kind: "residual", "antisymmetric", "hamiltonian", "parabolic" or "second-order".
        inputs, outputs: columns of each.
        width: features; even for "hamiltonian", which splits them.
        steps: time steps; None lets an adaptive method choose them.
        time: basis and horizon of the weights; each step its own, and 5, by default.
        gamma: diffusion of "antisymmetric".
        method, gradient, tolerance: as in `Evolution`.
        seed: of the initial weights.

    Raises:
        ArgumentError: the kind is not known, or `steps` is no positive integer; there must be a
            `time` where it is None.
        ShapeError: an odd width is to be split.

    Source: Haber and Ruthotto, Inverse Problems 34, 2017, arXiv 1705.03341.
    """
    if kind not in DENSE_KINDS:
        raise ArgumentError(unknown("`kind`", str(kind), DENSE_KINDS))
    if kind == "hamiltonian" and width % 2:
        raise ShapeError(f"`width` must be even for kind 'hamiltonian', got {width}")
    if time is None:
        if not isinstance(steps, int) or steps < 1:
            raise ArgumentError(f"`steps` must be a positive integer, got {steps!r}")
        time = TimeBasis("piecewise-constant", steps, 5.0)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        dynamics: Dynamics
        if kind == "residual":
            dynamics = Residual(Dense(width), time)
        elif kind == "antisymmetric":
            dynamics = Antisymmetric(Dense(width), time, gamma=gamma)
        elif kind == "hamiltonian":
            dynamics = Hamiltonian(Dense(width // 2), time)
        elif kind == "parabolic":
            dynamics = Parabolic(Dense(width), time, activation="tanh")
        else:
            dynamics = SecondOrder(Dense(width), time, activation="tanh")
        opening = nn.Sequential(Inputs(inputs), nn.Linear(inputs, width))
        head = nn.Linear(width, outputs)
        return ContinuousNet(
            opening, dynamics, head, method=method, steps=steps, gradient=gradient,
            tolerance=tolerance,
        )  # fmt: skip


ARCHITECTURES = {
    "dense_net": dense_net,
    "imexnet": imexnet,
    "pde_cnn": pde_cnn,
    "wavelet_net": wavelet_net,
}


def made_again(name: str, options: dict[str, Any]) -> ContinuousNet:
    """A network by what `ContinuousNet.config` says of it, with its first weights."""
    if isinstance(options.get("time"), dict):
        options = options | {"time": TimeBasis(**options["time"])}
    return ARCHITECTURES[name](**options)  # type: ignore[operator]
