"""Haar's wavelets: half the resolution and four times the channels, with nothing lost.

Source: Lensink, Peters, Haber, Fully hyperbolic convolutional neural networks, 2019, arXiv
1905.10484.
"""

import torch
from torch import Tensor, nn

from ..errors import ShapeError

# Mean, and differences to the right, downwards and across; symmetric and orthogonal.
_BANDS = 0.5 * torch.tensor([[1, 1, 1, 1], [1, -1, 1, -1], [1, 1, -1, -1], [1, -1, -1, 1]])


class Haar(nn.Module):
    """(batch, c, h, w) to (batch, 4 c, h / 2, w / 2): means and differences of 2x2 pixels.

    The bands of a channel follow each other. It is orthogonal, so it keeps norms.
    """

    def forward(self, x: Tensor) -> Tensor:
        """Bands (batch, 4 c, h / 2, w / 2).

        Raises:
            ShapeError: the features are no images of even height and width.
        """
        if x.ndim != 4 or x.shape[2] % 2 or x.shape[3] % 2:
            raise ShapeError(
                "Haar needs features (batch, channels, height, width) of even height and width, "
                f"got {tuple(x.shape)}"
            )
        return _mixed(nn.functional.pixel_unshuffle(x, 2))

    def inverse(self, z: Tensor) -> Tensor:
        """Features (batch, c, h, w) of their bands.

        Raises:
            ShapeError: the number of channels is no multiple of four.
        """
        if z.ndim != 4 or z.shape[1] % 4:
            raise ShapeError(
                f"the inverse of Haar needs bands (batch, 4 c, height, width), got {tuple(z.shape)}"
            )
        return nn.functional.pixel_shuffle(_mixed(z), 2)


def _mixed(z: Tensor) -> Tensor:
    """The bands of the four pixels of each channel, or the pixels of the bands."""
    found = torch.einsum("ij,bcjhw->bcihw", _BANDS.to(z), z.unflatten(1, (-1, 4)))
    return found.flatten(1, 2)
