"""Rows of an array in memory, on a GPU or memory-mapped from a file, with their weights."""

from collections.abc import Iterator
from contextlib import suppress

import numpy as np
import torch
from torch import Tensor

from ..errors import DataError, ShapeError

BLOCK = 65_536


class Rows:
    """Training data: `values` (rows, columns), finite, and `weights` (rows,) with mean one.

    A NumPy array is read in place, so a memory-mapped one is never loaded whole.

    Raises:
        ShapeError: the array is not 2-D, or the weights are not one for each row.
        DataError: no rows, values that are not real numbers, not finite, or bad weights.
    """

    def __init__(
        self,
        values: np.ndarray | Tensor,
        weights: np.ndarray | Tensor | None = None,
        name: str = "data",
    ) -> None:
        if not isinstance(values, Tensor):
            values = np.asanyarray(values)
            if values.dtype.kind not in "fiub":
                raise DataError(f"`{name}` must hold real numbers, got dtype {values.dtype}")
        if values.ndim != 2:
            raise ShapeError(f"`{name}` must be (rows, columns), got {tuple(values.shape)}")
        if 0 in values.shape:
            raise DataError(f"`{name}` is empty: {tuple(values.shape)}")
        if isinstance(values, np.ndarray) and values.flags.writeable:
            with suppress(TypeError, ValueError):  # such as a reversed array
                values = torch.from_numpy(values)  # the same memory, and faster to index
        self.values, self.name = values, name
        self.weights = self._normalise(weights)
        for start, (x, _) in zip(range(0, len(self), BLOCK), self.blocks(), strict=True):
            bad = ~torch.isfinite(x)
            if bad.any():
                row, column = torch.nonzero(bad)[0].tolist()
                raise DataError(
                    f"`{name}` must be finite, got {x[row, column].item()} in row {start + row}, "
                    f"column {column} ({int(bad.sum())} such values in its block of rows)"
                )

    def _normalise(self, weights: np.ndarray | Tensor | None) -> Tensor | None:
        if weights is None:
            return None
        weights = torch.as_tensor(weights, dtype=torch.float64)
        if weights.shape != (len(self),):
            raise ShapeError(f"`sample_weight` must be ({len(self)},), got {tuple(weights.shape)}")
        if not bool(torch.isfinite(weights).all()) or bool((weights < 0).any()):
            raise DataError("`sample_weight` must be finite and not negative")
        if not weights.sum() > 0:
            raise DataError("`sample_weight` must have a positive sum, got only zeros")
        return weights / weights.mean()

    def __len__(self) -> int:
        return self.values.shape[0]

    @property
    def columns(self) -> int:
        return self.values.shape[1]

    def take(self, index: Tensor | slice) -> tuple[Tensor, Tensor | None]:
        """The rows at `index` and their weights, in double precision."""
        values = self.values
        if isinstance(values, Tensor):
            x = values[index.to(values.device) if isinstance(index, Tensor) else index]
        else:
            x = torch.from_numpy(
                np.array(values[index.numpy() if isinstance(index, Tensor) else index])
            )
        w = None if self.weights is None else self.weights[index]
        return x.detach().to(torch.float64), w

    def blocks(self, size: int = BLOCK) -> Iterator[tuple[Tensor, Tensor | None]]:
        """All rows, block by block."""
        for start in range(0, len(self), size):
            yield self.take(slice(start, start + size))

    def subset(self, index: Tensor) -> "Rows":
        """The rows at `index`, which are read (not copied) again by `take`."""
        return _Subset(self, index)


class _Subset(Rows):
    def __init__(self, parent: Rows, index: Tensor) -> None:
        self.parent, self.index, self.name = parent, index, parent.name
        weights = None if parent.weights is None else parent.weights[index]
        self.weights = None if weights is None else weights / weights.mean().clamp_min(1e-300)

    def __len__(self) -> int:
        return len(self.index)

    @property
    def columns(self) -> int:
        return self.parent.columns

    def take(self, index: Tensor | slice) -> tuple[Tensor, Tensor | None]:
        x, _ = self.parent.take(self.index[index])
        return x, None if self.weights is None else self.weights[index]
