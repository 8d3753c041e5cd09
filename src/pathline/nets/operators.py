"""Linear operators of features, with their adjoints: full matrices and kernels, and lean ones.

An operator K maps (batch, inputs, ...) to (batch, outputs, ...); `K(x)` is K x and `K.adjoint(y)`
is K^T y, with the same weights. A residual layer built of one works with each of them, so a lean
operator takes the place of a full one without another change.

Source: Treister et al., Low-cost parameterizations of deep convolutional neural networks, 2018,
arXiv 1805.07821; Ephrath et al., LeanConvNets, IEEE JSTSP 2020, arXiv 1910.13157.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..errors import ArgumentError, ShapeError

PADDINGS = ("zeros", "circular")
STENCILS = {
    "3x3": tuple((i, j) for i in range(3) for j in range(3)),
    "5-point": ((0, 1), (1, 0), (1, 2), (2, 1)),  # the centre is the diagonal of the 1x1 part
}
OFFSETS = ((0, 0), (0, 1), (0, -1), (1, 0), (-1, 0), (1, 1), (1, -1), (-1, 1), (-1, -1))


class Operator(nn.Module):
    """A linear map with an adjoint. A subclass has both, and `inputs` and `outputs`."""

    inputs: int
    outputs: int

    def forward(self, x: Tensor) -> Tensor:
        """K x, (batch, outputs, ...), of x (batch, inputs, ...)."""
        raise NotImplementedError

    def adjoint(self, y: Tensor) -> Tensor:
        """K^T y, (batch, inputs, ...), of y (batch, outputs, ...)."""
        raise NotImplementedError

    def minus_adjoint(self, y: Tensor) -> Tensor:
        """-K^T y; by the sign of the weights where these are fewer than the features."""
        return -self.adjoint(y)

    def bound(self) -> Tensor:
        """An upper bound of the largest singular value for every image size, (); differentiable."""
        raise NotImplementedError

    def extra_repr(self) -> str:
        return f"{self.inputs}, {self.outputs}"

    def _check(self, x: Tensor, channels: int, ndim: int) -> None:
        if x.ndim != ndim or x.shape[1] != channels:
            form = "(batch, {})" if ndim == 2 else "(batch, {}, height, width)"
            raise ShapeError(
                f"{type(self).__name__} needs features {form.format(channels)}, got "
                f"{tuple(x.shape)}"
            )


class Dense(Operator):
    """A full matrix K, (outputs, inputs).

    Args:
        inputs, outputs: numbers of features; as many outputs as inputs if None.
        generator: source of the initial weights, uniform within inputs^-1/2.
    """

    def __init__(
        self, inputs: int, outputs: int | None = None, *, generator: torch.Generator | None = None
    ) -> None:
        super().__init__()
        self.inputs, self.outputs = _sizes(inputs, outputs)
        self.weight = _uniform((self.outputs, inputs), inputs, generator)

    def forward(self, x: Tensor) -> Tensor:
        self._check(x, self.inputs, 2)
        return F.linear(x, self.weight)

    def adjoint(self, y: Tensor) -> Tensor:
        return F.linear(y, self.weight.mT)

    def bound(self) -> Tensor:
        """The norm itself."""
        return torch.linalg.matrix_norm(self.weight, 2)


class Conv(Operator):
    """A full convolution, of as many pixels as its input has.

    Args:
        inputs, outputs: numbers of channels; as many outputs as inputs if None.
        size: of the kernels, odd.
        groups: of channels that are not coupled with each other.
        padding: "zeros" or "circular", what lies beside the image.
        generator: source of the initial weights, uniform within (inputs size^2 / groups)^-1/2.

    Raises:
        ArgumentError: `size` is even, the groups do not divide the channels, or the padding is not
            known.
    """

    def __init__(
        self,
        inputs: int,
        outputs: int | None = None,
        *,
        size: int = 3,
        groups: int = 1,
        padding: str = "zeros",
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        self.inputs, self.outputs = _sizes(inputs, outputs)
        self.padding, self.groups = _padding(padding), groups
        if size < 1 or size % 2 == 0:
            raise ArgumentError(f"`size` must be odd, got {size!r}")
        if groups < 1 or self.inputs % groups or self.outputs % groups:
            raise ArgumentError(
                f"`groups` must divide {self.inputs} and {self.outputs} channels, got {groups!r}"
            )
        fan = inputs // groups
        self.weight = _uniform((self.outputs, fan, size, size), fan * size**2, generator)

    def forward(self, x: Tensor) -> Tensor:
        self._check(x, self.inputs, 4)
        return convolve(x, self.weight, self.padding, self.groups)

    def adjoint(self, y: Tensor) -> Tensor:
        return convolve_adjoint(y, self.weight, self.padding, self.groups)

    def minus_adjoint(self, y: Tensor) -> Tensor:
        return convolve_adjoint(y, -self.weight, self.padding, self.groups)

    def bound(self) -> Tensor:
        """As `kernel_bound`."""
        return kernel_bound(self.weight, self.groups)


class LeanConv(Operator):
    """A spatial part for each group of channels plus a 1x1 part for all of them, K = S + P.

    With groups of one channel it has c^2 + 9 c weights ("3x3"), or c^2 + 4 c ("5-point", the
    diffusion-reaction operator of LeanResNet), in place of 9 c^2. It is their sum, with nothing in
    between; the centre of "3x3" is there twice.

    Args:
        channels: c, of input and output.
        stencil: "3x3" or "5-point".
        group: channels of a group.
        padding: "zeros" or "circular".
        generator: source of the initial weights, as in `Conv`.

    Raises:
        ArgumentError: the stencil or padding is not known, or the groups do not divide c.

    Source: Ephrath, Ruthotto, Haber, Treister, LeanResNet, 2019, arXiv 1904.06952.
    """

    places: Tensor

    def __init__(
        self,
        channels: int,
        *,
        stencil: str = "5-point",
        group: int = 1,
        padding: str = "zeros",
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        self.inputs, self.outputs = _sizes(channels, None)
        if stencil not in STENCILS:
            raise ArgumentError(f"`stencil` must be one of {tuple(STENCILS)}, got {stencil!r}")
        if group < 1 or channels % group:
            raise ArgumentError(f"`group` must divide {channels} channels, got {group!r}")
        self.padding, self.stencil, self.groups = _padding(padding), stencil, channels // group
        taps = STENCILS[stencil]
        self.spatial = _uniform((channels, group, len(taps)), group * len(taps), generator)
        self.pointwise = _uniform((channels, channels), channels, generator)
        places = torch.tensor([3 * i + j for i, j in taps])
        self.register_buffer("places", places, persistent=False)

    def _kernel(self) -> Tensor:
        flat = self.spatial.new_zeros(*self.spatial.shape[:2], 9)
        return flat.index_copy(2, self.places, self.spatial).unflatten(2, (3, 3))

    def forward(self, x: Tensor) -> Tensor:
        self._check(x, self.inputs, 4)
        spatial = convolve(x, self._kernel(), self.padding, self.groups)
        return spatial + _mix(x, self.pointwise)

    def adjoint(self, y: Tensor) -> Tensor:
        spatial = convolve_adjoint(y, self._kernel(), self.padding, self.groups)
        return spatial + _mix(y, self.pointwise.mT)

    def bound(self) -> Tensor:
        """The sum of those of its parts."""
        pointwise = torch.linalg.matrix_norm(self.pointwise, 2)
        return kernel_bound(self._kernel(), self.groups) + pointwise


class CirculantConv(Operator):
    """A convolution whose kernel from channel j to i depends on i - j modulo c alone.

    9 c weights couple all channels; over these the product is one of Fourier coefficients.

    Args:
        channels: c, of input and output.
        padding: "zeros" or "circular", of the image.
        generator: source of the initial weights, as in `Conv`.

    Source: Treister et al., 2018, arXiv 1805.07821 (block-circulant).
    """

    def __init__(
        self,
        channels: int,
        *,
        padding: str = "zeros",
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        self.inputs, self.outputs = _sizes(channels, None)
        self.padding = _padding(padding)
        self.weight = _uniform((channels, 3, 3), 9 * channels, generator)

    def forward(self, x: Tensor) -> Tensor:
        self._check(x, self.inputs, 4)
        return self._multiply(x, self.weight)

    def adjoint(self, y: Tensor) -> Tensor:
        return self._multiply(y, self.weight.flip(0).roll(1, 0).flip(1, 2))

    def bound(self) -> Tensor:
        """The largest, over the waves of channels, of the sums of its taps' absolute values."""
        return torch.fft.rfft(self.weight, dim=0).abs().sum((1, 2)).max()

    def _multiply(self, x: Tensor, weight: Tensor) -> Tensor:
        c = self.inputs
        taps, features = torch.fft.rfft(weight, dim=0), torch.fft.rfft(x, dim=1)
        product = convolve(features, taps[:, None], self.padding, len(taps))
        return torch.fft.irfft(product, n=c, dim=1)


class ShiftConv(Operator):
    """Groups of channels shifted by a pixel each, which costs nothing, and a 1x1 mix: K = P S.

    S is a permutation, of pixels that wrap around.

    Args:
        channels: c, of input and output; c^2 weights.
        shifts: 9 offsets of the 3x3 neighbours, or 5 without its corners.
        generator: source of the initial weights, as in `Dense`.

    Raises:
        ArgumentError: `shifts` is neither.
    """

    def __init__(
        self, channels: int, *, shifts: int = 9, generator: torch.Generator | None = None
    ) -> None:
        super().__init__()
        self.inputs, self.outputs = _sizes(channels, None)
        if shifts not in (5, 9):
            raise ArgumentError(f"`shifts` must be 5 or 9, got {shifts!r}")
        self.offsets = OFFSETS[:shifts]
        self.weight = _uniform((channels, channels), channels, generator)

    def forward(self, x: Tensor) -> Tensor:
        self._check(x, self.inputs, 4)
        return _mix(self.shift(x), self.weight)

    def adjoint(self, y: Tensor) -> Tensor:
        return self.shift(_mix(y, self.weight.mT), -1)

    def bound(self) -> Tensor:
        """The norm itself."""
        return torch.linalg.matrix_norm(self.weight, 2)

    def shift(self, x: Tensor, way: int = 1) -> Tensor:
        """S x, or S^T x where `way` is -1; (batch, channels, height, width) both."""
        parts = x.tensor_split(len(self.offsets), dim=1)
        rolled = [
            part.roll((way * i, way * j), (2, 3))
            for part, (i, j) in zip(parts, self.offsets, strict=True)
        ]
        return torch.cat(rolled, 1)


def convolve(x: Tensor, weight: Tensor, padding: str, groups: int = 1) -> Tensor:
    """The convolution of x (batch, channels, height, width) that keeps height and width."""
    around = weight.shape[-1] // 2
    if padding == "circular" and around:
        return F.conv2d(F.pad(x, (around,) * 4, mode="circular"), weight, groups=groups)
    return F.conv2d(x, weight, padding=around, groups=groups)


def convolve_adjoint(y: Tensor, weight: Tensor, padding: str, groups: int = 1) -> Tensor:
    """The adjoint of `convolve` by the same weight, of odd size, and padding."""
    around = weight.shape[-1] // 2
    if padding == "circular" and around:
        y = F.pad(y, (around,) * 4, mode="circular")
        return F.conv_transpose2d(y, weight, padding=2 * around, groups=groups)
    return F.conv_transpose2d(y, weight, padding=around, groups=groups)


def kernel_bound(weight: Tensor, groups: int = 1) -> Tensor:
    """A bound, (), of the norm of `convolve` by kernels (outputs, inputs / groups, k, k).

    k times the least norm of four matrices in which the kernels can be written.

    Source: Singla and Feizi, Fantastic four, ICLR 2021, arXiv 1911.10258, theorem 1.
    """
    split = weight.unflatten(0, (groups, -1))  # (groups, out, in, k, k)
    orders = ((1, 2, 3, 4), (1, 3, 2, 4), (1, 4, 2, 3), (1, 3, 4, 2))
    ends = (1, 2, 2, 3)  # axes of the rows
    norms = [
        torch.linalg.matrix_norm(split.permute(0, *order).flatten(1 + end).flatten(1, end), 2).max()
        for order, end in zip(orders, ends, strict=True)
    ]
    return weight.shape[-1] * torch.stack(norms).min()


def operator_norm(
    operator: Operator,
    shape: Sequence[int],
    *,
    iterations: int = 50,
    generator: torch.Generator | None = None,
) -> float:
    """The largest singular value on features of `shape`, by power iteration, from below.

    Args:
        operator: K.
        shape: of one sample's input without the batch, (inputs,) or (inputs, height, width).
        iterations: products with K^T K.
        generator: of the first vector; a fixed seed by default.
    """
    if generator is None:
        generator = torch.Generator().manual_seed(0)
    like = next(operator.parameters())
    with torch.no_grad():
        x = torch.randn(1, *shape, dtype=like.dtype, generator=generator).to(like.device)
        for _ in range(iterations):
            x = operator.adjoint(operator(x / x.norm()))
        return float(x.norm().sqrt())


def _mix(x: Tensor, matrix: Tensor) -> Tensor:
    return F.conv2d(x, matrix[:, :, None, None])


def _padding(padding: str) -> str:
    if padding not in PADDINGS:
        raise ArgumentError(f"`padding` must be one of {PADDINGS}, got {padding!r}")
    return padding


def _sizes(inputs: int, outputs: int | None) -> tuple[int, int]:
    outputs = inputs if outputs is None else outputs
    for size in (inputs, outputs):
        if not isinstance(size, int) or size < 1:
            raise ArgumentError(f"an operator needs a positive number of features, got {size!r}")
    return inputs, outputs


def _uniform(shape: Sequence[int], fan: int, generator: torch.Generator | None) -> nn.Parameter:
    bound = fan**-0.5
    return nn.Parameter(torch.empty(tuple(shape)).uniform_(-bound, bound, generator=generator))
