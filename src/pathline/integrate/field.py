"""The user's velocity as the solvers see it: one tensor in, one tensor out."""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from ..errors import ArgumentError, ShapeError

Velocity = Callable[[Tensor, Any], Any]


REAL = {torch.complex64: torch.float32, torch.complex128: torch.float64}


def real_dtype(z: Tensor) -> torch.dtype:
    """The dtype of times and step lengths that go with the state."""
    return REAL.get(z.dtype, z.dtype)


class Layout:
    """How a state (a tensor or a pytree of tensors) lies in the one tensor that is integrated.

    A tensor lies there as it is. The leaves of a pytree lie behind each other in a vector, images
    whose channels are last in memory with these last, or, where samples are kept apart, in the
    columns of a (batch, total) matrix.

    Raises:
        ArgumentError: the state holds no tensor, or leaves of different batch sizes, dtypes
            (unless `lenient`) or devices.
    """

    def __init__(self, state: Any, *, samples: bool = False, lenient: bool = False) -> None:
        leaves, self.spec = pytree.tree_flatten(state)
        if not leaves or not all(isinstance(leaf, Tensor) for leaf in leaves):
            got = [type(leaf).__name__ for leaf in leaves]
            raise ArgumentError(f"`y0` must be a tensor or a pytree of tensors, got {got}")
        kinds = {(leaf.dtype, leaf.device) for leaf in leaves}
        if len(kinds) > 1 and not lenient:
            raise ArgumentError(f"the tensors of `y0` must have one dtype and device, got {kinds}")
        self.plain = isinstance(state, Tensor)
        self.skeleton = pytree.tree_map(lambda leaf: None, state)
        self.samples = samples
        if samples and (
            any(leaf.ndim == 0 for leaf in leaves) or len({leaf.shape[0] for leaf in leaves}) > 1
        ):
            shapes = [tuple(leaf.shape) for leaf in leaves]
            raise ArgumentError(f"`y0` must have one batch size in front, got shapes {shapes}")
        self.shapes = [leaf.shape[1:] if samples else leaf.shape for leaf in leaves]
        self.sizes = [math.prod(shape) for shape in self.shapes]
        self.last = [not samples and channels_last(leaf) for leaf in leaves]

    def join(self, state: Any) -> Tensor:
        """The tensor in which `state` lies."""
        if self.plain:
            return state
        leaves = pytree.tree_leaves(state)
        return torch.cat([self.flat(leaf, i) for i, leaf in enumerate(leaves)], dim=-1)

    def flat(self, leaf: Tensor, i: int) -> Tensor:
        """Leaf number i as its part of the joined tensor; it may have more axes in front."""
        lead = leaf.shape[: leaf.ndim - len(self.shapes[i])]
        leaf = leaf.movedim(-3, -1) if self.last[i] else leaf
        return leaf.reshape(*lead, self.sizes[i])

    def split(self, z: Tensor) -> Any:
        """The state in `z`, which may have more axes in front (such as times)."""
        return z if self.plain else pytree.tree_unflatten(self.leaves(z), self.spec)

    def leaves(self, z: Tensor) -> list[Tensor]:
        """The leaves of the state in `z`."""
        if self.plain:
            return [z]
        return [self.leaf(part, i) for i, part in enumerate(z.split(self.sizes, -1))]

    def leaf(self, part: Tensor, i: int) -> Tensor:
        """Leaf number i from its part of the joined tensor."""
        lead, shape = part.shape[:-1], self.shapes[i]
        if self.last[i]:
            n, channels, height, width = shape
            return part.view((*lead, n, height, width, channels)).movedim(-1, -3)
        return part.view((*lead, *shape))


def channels_last(x: Tensor) -> bool:
    """It is of images whose channels are last in memory."""
    return x.ndim == 4 and x.shape[1] > 1 and x.stride(1) == 1


class Field:
    """dz = field(t, z): the velocity on the joined state, counted and checked.

    Raises:
        ShapeError: the velocity does not return the shape of the state.
        ArgumentError: it returns another dtype, device or structure than the state's.
    """

    def __init__(
        self, func: Velocity, layout: Layout, *, cast: bool = False, lenient: bool = False
    ) -> None:
        self.func = func
        self.layout = layout
        self.plain = layout.plain
        self.cast = cast  # to the dtype of the state: under autocast the velocity has less
        self.lenient = lenient  # cast what comes in another dtype
        self.evaluations = 0

    def __call__(self, t: Tensor, z: Tensor) -> Tensor:
        self.evaluations += 1
        dz = self.func(t, z) if self.plain else self._joined(self.func(t, self.layout.split(z)))
        try:
            fits = dz.shape == z.shape and dz.dtype == z.dtype and dz.device == z.device
        except AttributeError:
            raise ArgumentError(
                f"the velocity must return a tensor like the state, got {type(dz).__name__}"
            ) from None
        return dz if fits else self._mended(dz, z)

    def _mended(self, dz: Tensor, z: Tensor) -> Tensor:
        """The slope in the dtype of the state, where that loses nothing or was asked for."""
        if self.cast or self.lenient or dz.dtype == real_dtype(z):
            dz = dz.to(z.dtype)
        if dz.shape != z.shape:
            raise ShapeError(
                f"the velocity must return the shape of the state, {tuple(z.shape)}, got "
                f"{tuple(dz.shape)}. A velocity maps (t, z) of shapes () and (batch, ...) to "
                "dz/dt of shape (batch, ...)"
            )
        if dz.dtype != z.dtype or dz.device != z.device:
            raise ArgumentError(
                f"the velocity must return the dtype and device of the state, {z.dtype} on "
                f"{z.device}, got {dz.dtype} on {dz.device}"
            )
        return dz

    def _joined(self, dz: Any) -> Tensor:
        leaves = _in_order(self.layout.skeleton, dz)
        shapes = [getattr(leaf, "shape", None) for leaf in leaves]
        if self.layout.samples:
            shapes = [None if shape is None else shape[1:] for shape in shapes]
        if shapes != self.layout.shapes:
            wanted, got = (
                [None if shape is None else tuple(shape) for shape in each]
                for each in (self.layout.shapes, shapes)
            )
            raise ShapeError(
                "the velocity must return a pytree like the state, with leaves of shapes "
                f"{wanted}, got {got}"
            )
        return self.layout.join(pytree.tree_unflatten(leaves, self.layout.spec))


def _in_order(skeleton: Any, value: Any) -> list[Any]:
    """The leaves of `value` in the order of the state's; keys of dicts may come in any order."""
    if skeleton is None:
        return [value]
    if isinstance(skeleton, dict):
        if not isinstance(value, dict) or set(value) != set(skeleton):
            raise _unlike(f"a dict with the keys {list(skeleton)}", value)
        return [leaf for key in skeleton for leaf in _in_order(skeleton[key], value[key])]
    if not isinstance(value, tuple | list) or len(value) != len(skeleton):
        raise _unlike(f"{len(skeleton)} entries in a tuple or list", value)
    pairs = zip(skeleton, value, strict=True)
    return [leaf for part, entry in pairs for leaf in _in_order(part, entry)]


def _unlike(wanted: str, got: Any) -> ShapeError:
    what = list(got) if isinstance(got, dict) else type(got).__name__
    what = f"{what} of {len(got)}" if isinstance(got, tuple | list) else what
    return ShapeError(f"the velocity must return a pytree like the state, {wanted}, got {what}")
