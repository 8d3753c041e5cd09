"""Multigrid in channels: full coupling of all channels at a cost linear in their number.

Source: Eliasof, Ephrath, Ruthotto, Treister, MGIC: multigrid-in-channels neural network
architectures, SIAM J. Sci. Comput. 2023, arXiv 2011.09128.
"""

from itertools import pairwise

import torch
from torch import Tensor, nn

from ..errors import ArgumentError
from ..nets import ChannelNorm, Conv, TimeBasis, TimeWeights
from .dynamics import CONSTANT, Dynamics

CORRECTION = 0.1  # the first scale of the norm of a coarse level's correction


class MultigridBlock(nn.Module):
    """A residual block with grouped kernels, and a hierarchy of fewer channels that couples them.

    Down: x_{l+1} = R_l x_l with half the channels, until `coarsest`. There a full residual block.
    Up: z_l = x_l + N(P_l (y_{l+1} - x_{l+1})), and a grouped residual block y_l of z_l, each
    relu(z + N(K2 relu(N(K1 z)))). R and P are 1x1 and grouped as well, of shuffled channels.

    Args:
        channels: of input and output, `coarsest` times a power of two.
        group: s, channels of a group on all levels, even; weights are about 37 s a channel.
        coarsest: channels of the coarsest level; with more than `channels` the block is a full one.
        tied: let P be the adjoint of R.
        generator: source of the initial weights.

    Raises:
        ArgumentError: groups or levels do not divide the channels.
    """

    def __init__(
        self,
        channels: int,
        *,
        group: int = 16,
        coarsest: int = 16,
        tied: bool = False,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        widths = [channels]
        while widths[-1] > coarsest:
            if widths[-1] % 2 or group % 2 or widths[-1] % group:
                raise ArgumentError(
                    f"`channels` must be {coarsest} times a power of two, and `group` even and a "
                    f"divisor on each level, got {channels} channels in groups of {group}"
                )
            widths.append(widths[-1] // 2)
        self.tied = tied
        fine = list(pairwise(widths))
        self.smoothers = nn.ModuleList(
            ResidualBlock(width, groups=width // group, generator=generator) for width, _ in fine
        )
        self.smoothers.append(ResidualBlock(widths[-1], groups=1, generator=generator))

        def transfer(inputs: int, outputs: int, groups: int) -> Conv:
            return Conv(inputs, outputs, size=1, groups=groups, generator=generator)

        self.down = nn.ModuleList(transfer(a, b, a // group) for a, b in fine)
        self.up = nn.ModuleList() if tied else nn.ModuleList(
            transfer(b, a, a // group) for a, b in fine
        )  # fmt: skip
        self.norms = nn.ModuleList(ChannelNorm(a, CORRECTION) for a, _ in fine)

    def forward(self, x: Tensor) -> Tensor:
        """y_0, (batch, channels, height, width), of x_0."""
        xs = [x]
        for level in range(len(self.down)):
            xs.append(self.restrict(level, xs[-1]))
        y = self.smoothers[-1](xs[-1])
        for level in reversed(range(len(self.down))):
            z = xs[level] + self.norms[level](self.prolong(level, y - xs[level + 1]))
            y = self.smoothers[level](z)
        return y

    def restrict(self, level: int, x: Tensor) -> Tensor:
        """R x."""
        down = self.down[level]
        assert isinstance(down, Conv)
        return down(shuffle(x, down.groups))

    def prolong(self, level: int, change: Tensor) -> Tensor:
        """P of a change on the level below."""
        down = self.down[level]
        assert isinstance(down, Conv)
        fine = down.adjoint(change) if self.tied else self.up[level](change)
        return shuffle(fine, fine.shape[1] // down.groups)


class ResidualBlock(nn.Module):
    """relu(z + N(K2 relu(N(K1 z)))) with 3x3 kernels in groups."""

    def __init__(
        self, channels: int, *, groups: int, generator: torch.Generator | None = None
    ) -> None:
        super().__init__()
        self.kernels = nn.ModuleList(
            Conv(channels, groups=groups, generator=generator) for _ in range(2)
        )
        self.norms = nn.ModuleList(ChannelNorm(channels) for _ in range(2))

    def forward(self, z: Tensor) -> Tensor:
        y = torch.relu(self.norms[0](self.kernels[0](z)))
        return torch.relu(z + self.norms[1](self.kernels[1](y)))


class Multigrid(Dynamics):
    """z' = y_0(z) - z for a multigrid block y_0: by Euler's method with h = 1 a step is the block.

    Args:
        block: the block.
        time: as in `Dynamics`.
    """

    def __init__(self, block: MultigridBlock, time: TimeBasis = CONSTANT) -> None:
        super().__init__(time)
        self.layer = TimeWeights(block, time)

    def forward(self, t: Tensor, z: Tensor) -> Tensor:
        return self.layer(t, z) - z


def shuffle(x: Tensor, groups: int) -> Tensor:
    """Channels (group, member) in the order (member, group); with the members' number, back."""
    return x.unflatten(1, (groups, -1)).transpose(1, 2).flatten(1, 2)
