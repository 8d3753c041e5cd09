"""Weights that are functions of time: theta(t) = sum_k phi_k(t) theta_k.

The layers of a deep network are then time steps of one module, and their number is a matter of
the solver: halving the step leaves the weights as they are, and raising the order of the basis
leaves their function as it is.

Source: Rosso, Ruthotto, Sargsyan, Weight parameterization in continuous-time deep neural
networks, 2025, arXiv 2507.22045; Haber and Ruthotto, Stable architectures for deep neural
networks, Inverse Problems 34, 2017 (regularisation in time).
"""

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from math import floor, inf
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call

from ..errors import ArgumentError, ShapeError, unknown

POLYNOMIALS = ("legendre", "monomial")
BASES = (*POLYNOMIALS, "piecewise-constant", "piecewise-linear")


@dataclass(frozen=True)
class TimeBasis:
    """Functions phi_0, ..., phi_{count-1} of time on [0, horizon].

    "legendre": P_k(2 s - 1) with s = t / horizon, whose coefficients hardly interfere; "monomial":
    s^k, whose do, the more the higher the order; "piecewise-constant": one weight for each of
    `order` equal pieces, the usual network of as many layers; "piecewise-linear": straight between
    `order` + 1 nodes. Times outside of the horizon count as its nearest end in the last two.

    Args:
        name: one of these.
        order: the degree of the polynomials, from 0; the number of pieces, from 1.
        horizon: the end of time, above 0.

    Raises:
        ArgumentError: the name is not known, or a number out of range.
    """

    name: str = "piecewise-constant"
    order: int = 1
    horizon: float = 1.0

    def __post_init__(self) -> None:
        if self.name not in BASES:
            raise ArgumentError(unknown("`basis`", str(self.name), BASES))
        least = 0 if self.polynomial else 1
        if not isinstance(self.order, int) or self.order < least:
            raise ArgumentError(
                f"`order` of basis {self.name!r} must be an integer of at least {least}, got "
                f"{self.order!r}"
            )
        if not 0 < self.horizon < inf:
            raise ArgumentError(f"`horizon` must be positive and finite, got {self.horizon!r}")

    @property
    def polynomial(self) -> bool:
        """It is smooth."""
        return self.name in POLYNOMIALS

    @property
    def count(self) -> int:
        """The number of its functions."""
        return self.order if self.name == "piecewise-constant" else self.order + 1

    def values(self, t: Tensor) -> Tensor:
        """phi_k(t), (count, *t.shape), in the dtype of `t`."""
        s = t / self.horizon
        if self.name == "monomial":
            return torch.stack([s**k for k in range(self.count)])
        if self.name == "legendre":
            x = 2 * s - 1
            found = [torch.ones_like(x), x]
            for k in range(1, self.order):
                found.append(((2 * k + 1) * x * found[k] - k * found[k - 1]) / (k + 1))
            return torch.stack(found[: self.count])
        index, share = self._place(t)
        each = torch.arange(self.count, device=t.device).view(-1, *(1,) * t.ndim)
        if self.name == "piecewise-constant":
            return each.eq(index).to(t)
        return each.eq(index) * (1 - share) + each.eq(index + 1) * share

    def at(self, t: Tensor, coefficients: Tensor) -> Tensor:
        """sum_k phi_k(t) coefficients[k] at a time, (): looks at those alone that count there."""
        return self.reader(t)(coefficients)

    def reader(self, t: Tensor) -> Callable[[Tensor], Tensor]:
        """`at` for many coefficients at one time."""
        if self.polynomial:
            phi = self.values(t)
            return lambda coefficients: torch.tensordot(phi.to(coefficients), coefficients, 1)
        index, share = self._place(t)
        first = index.view(1)

        def read(coefficients: Tensor) -> Tensor:
            found = coefficients.index_select(0, first).squeeze(0)
            if self.name == "piecewise-constant":
                return found
            after = coefficients.index_select(0, first + 1).squeeze(0)
            return torch.lerp(found, after, share.to(found.dtype))

        return read

    def piece(self, t: Tensor) -> int | None:
        """The piece that t lies in; None if weights are not constant there, or t is not at hand."""
        if self.name != "piecewise-constant" or not t.is_cpu or torch.compiler.is_compiling():
            return None
        try:
            x = float(t) * (self.order / self.horizon)
        except RuntimeError:  # torch.func hides it
            return None
        return min(max(floor(x * (1 + _rounding(t))), 0), self.order - 1)

    def _place(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """The piece that t lies in, and at which share of it."""
        x = t * (self.order / self.horizon)
        index = (x.detach() * (1 + _rounding(t))).floor().clamp(0, self.order - 1)
        return index.long(), (x - index).clamp(0, 1)

    @property
    def gram(self) -> Tensor:
        """The integrals of phi_k phi_l over the horizon, (count, count), in double precision."""
        k = torch.arange(self.count, dtype=torch.float64)
        if self.name == "legendre":
            return torch.diag(self.horizon / (2 * k + 1))
        if self.name == "monomial":
            return self.horizon / (k[:, None] + k + 1)
        h = self.horizon / self.order
        if self.name == "piecewise-constant":
            return h * torch.eye(self.count, dtype=torch.float64)
        diagonal = torch.full((self.count,), 4.0, dtype=torch.float64)
        diagonal[[0, -1]] = 2.0
        return h / 6 * _tridiagonal(diagonal, 1.0)

    @property
    def stiffness(self) -> Tensor:
        """The integrals of phi_k' phi_l' over the horizon, (count, count), in double precision.

        Piecewise constants have differences in place of derivatives: their quadratic form is the
        sum of |theta_k - theta_{k-1}|^2 / h.
        """
        k = torch.arange(self.count, dtype=torch.float64)
        if self.name == "legendre":
            least = torch.minimum(k[:, None], k)
            even = (k[:, None] + k) % 2 == 0
            return 2 / self.horizon * least * (least + 1) * even
        if self.name == "monomial":
            both = k[:, None] * k
            return both / (k[:, None] + k - 1).clamp(min=1) / self.horizon
        diagonal = torch.full((self.count,), 2.0, dtype=torch.float64)
        diagonal[0] -= 1
        diagonal[-1] -= 1
        return self.order / self.horizon * _tridiagonal(diagonal, -1.0)

    def refined(self, order: int) -> "TimeBasis":
        """The basis of another order, in which all functions of this one can be written.

        Raises:
            ArgumentError: the order is lower, or no multiple where the basis has pieces.
        """
        fits = order >= self.order and (self.polynomial or order % self.order == 0)
        if not fits:
            wanted = f"at least {self.order}" if self.polynomial else f"a multiple of {self.order}"
            raise ArgumentError(
                f"`order` of a refined basis {self.name!r} must be {wanted}, got {order!r}"
            )
        return TimeBasis(self.name, order, self.horizon)

    def prolongation(self, order: int) -> Tensor:
        """The matrix, (new count, count), that takes coefficients to those of `refined(order)`."""
        finer = self.refined(order)
        if self.polynomial:
            return torch.eye(finer.count, self.count, dtype=torch.float64)
        k = torch.arange(finer.count, dtype=torch.float64)
        middle = 0.5 if self.name == "piecewise-constant" else 0.0
        return self.values((k + middle) * (self.horizon / order)).mT

    @property
    def one(self) -> Tensor:
        """The coefficients of the function 1, (count,)."""
        if self.polynomial:
            return torch.eye(1, self.count, dtype=torch.float64)[0]
        return torch.ones(self.count, dtype=torch.float64)


def _rounding(t: Tensor) -> float:
    """The time of a node may be rounded downwards, and belongs to the piece that begins there."""
    return 8 * torch.finfo(t.dtype).eps


def _tridiagonal(diagonal: Tensor, beside: float) -> Tensor:
    off = torch.full((len(diagonal) - 1,), beside, dtype=diagonal.dtype)
    if len(diagonal) == 1:
        return torch.diag(diagonal)
    return torch.diag(diagonal) + torch.diag(off, 1) + torch.diag(off, -1)


@torch.no_grad()
def _swap(module: nn.Module, make: Callable[[Tensor], Tensor]) -> None:
    """Puts `make(p)` in the place of every parameter p; shared ones stay shared."""
    done: dict[int, nn.Parameter] = {}
    for part in module.modules():
        for name, old in part._parameters.items():
            if old is not None:
                if id(old) not in done:
                    done[id(old)] = nn.Parameter(make(old), requires_grad=old.requires_grad)
                part._parameters[name] = done[id(old)]


class Slot(NamedTuple):
    """Where a module looks for a weight."""

    parameters: dict[str, Any]
    name: str
    stack: Tensor  # (count, *shape), its parameter
    pieces: Tensor | tuple[Tensor, ...]  # each (*shape)


def _slots(module: nn.Module) -> list[Slot]:
    return [
        Slot(part._parameters, name, stack, stack)
        for part in module.modules()
        for name, stack in part._parameters.items()
        if stack is not None
    ]


class TimeWeights(nn.Module):
    """A module whose weights are functions of time; call it as `(t, *inputs)`.

    Its parameters are those of the module by the same names, each with an axis of coefficients in
    front, (count, *shape). They start constant in time, as the module's are.

    Args:
        module: any module without running statistics; it is copied.
        basis: a name in "legendre", "monomial", "piecewise-constant", "piecewise-linear", or a
            `TimeBasis`, which brings the next two.
        order, horizon: as in `TimeBasis`.

    Raises:
        ArgumentError: the basis makes no sense; or the module holds running statistics, which
            would mix all times (batch norm with `track_running_stats=False` is fine).

    Example:
        >>> layer = TimeWeights(nn.Linear(3, 3), "legendre", order=2)
        >>> layer(torch.tensor(0.5), torch.ones(5, 3)).shape
        torch.Size([5, 3])
        >>> [tuple(p.shape) for p in layer.parameters()]
        [(3, 3, 3), (3, 3)]
    """

    def __init__(
        self,
        module: nn.Module,
        basis: str | TimeBasis = "piecewise-constant",
        order: int = 1,
        horizon: float = 1.0,
    ) -> None:
        super().__init__()
        self.basis = basis if isinstance(basis, TimeBasis) else TimeBasis(basis, order, horizon)
        if any(name.split(".")[-1].startswith("running_") for name, _ in module.named_buffers()):
            raise ArgumentError(
                "`module` must not keep running statistics, which would mix all times; use a "
                "norm without them, such as nets.ChannelNorm"
            )
        self.module = copy.deepcopy(module)
        one = self.basis.one
        _swap(self.module, lambda p: one.to(p).view(-1, *(1,) * p.ndim) * p)
        self.opened: list[Slot] = []  # the slots with their pieces, inside `opened`

    def weights(self, t: Tensor) -> dict[str, Tensor]:
        """The module's parameters at time `t`, (), by name.

        Raises:
            ShapeError: the samples have times of their own.
        """
        read = self._reader(t)
        return {name: read(stack) for name, stack in self.module.named_parameters()}

    def _reader(self, t: Tensor) -> Callable[[Tensor], Tensor]:
        if t.numel() != 1:
            raise ShapeError(
                f"`t` must be one time for all samples, got {tuple(t.shape)}: weights in time are "
                "those of a layer"
            )
        like = next(self.module.parameters(), t)
        return self.basis.reader(t.reshape(()).to(like.device))

    def forward(self, t: Tensor, *inputs: Any, **options: Any) -> Any:
        """The module, with its weights at time `t`, at the inputs."""
        if torch.compiler.is_compiling():
            return functional_call(self.module, self.weights(t), inputs, options)
        # The same by hand, in a third of the time.
        slots = self.opened or _slots(self.module)
        index = self.basis.piece(t)
        if index is None:
            read = self._reader(t)
            weights = [read(slot.stack) for slot in slots]
        else:
            weights = [slot.pieces[index] for slot in slots]
        try:
            for slot, weight in zip(slots, weights, strict=True):
                slot.parameters[slot.name] = weight
            return self.module(*inputs, **options)
        finally:
            for slot in slots:
                slot.parameters[slot.name] = slot.stack

    def frozen(self, t: float | Tensor) -> nn.Module:
        """The module as it is at time `t`."""
        module, time = copy.deepcopy(self.module), torch.as_tensor(t, dtype=torch.float64)
        _swap(module, lambda stack: self.basis.at(time.to(stack.device), stack))
        return module

    def refined(self, order: int) -> "TimeWeights":
        """The same function of time in a basis of higher order, with weights of its own.

        Raises:
            ArgumentError: as in `TimeBasis.refined`.
        """
        finer = copy.deepcopy(self)
        finer.basis = self.basis.refined(order)
        matrix = self.basis.prolongation(order)
        _swap(finer.module, lambda stack: torch.tensordot(matrix.to(stack), stack, 1))
        return finer

    def smoothness(self) -> Tensor:
        """Half of the integral of |theta'(t)|^2, exactly; its pieces' differences if constant."""
        return self._form(self.basis.stiffness)

    def decay(self) -> Tensor:
        """Half of the integral of |theta(t)|^2, exactly."""
        return self._form(self.basis.gram)

    def _form(self, matrix: Tensor) -> Tensor:
        return 0.5 * torch.stack(list(self._forms(matrix))).sum()

    def _forms(self, matrix: Tensor) -> Iterator[Tensor]:
        for stack in self.module.parameters():
            flat = stack.flatten(1) if stack.ndim > 1 else stack[:, None]
            yield (flat * (matrix.to(flat) @ flat)).sum()

    def extra_repr(self) -> str:
        return f"{self.basis.name}, order={self.basis.order}, horizon={self.basis.horizon:g}"


@contextmanager
def opened(module: nn.Module, *, channels_last: bool) -> Iterator[None]:
    """Inside, the layers of the module with piecewise constant weights take these apart once.

    Then the gradient of a stack is put together once, and not added up from a stack for each of
    its pieces. For what is differentiated as it was run: the pieces belong to that graph. Where
    `channels_last`, kernels come as convolutions of such features would turn them each time.
    """
    layers = [part for part in module.modules() if isinstance(part, TimeWeights)]
    layers = [layer for layer in layers if layer.basis.name == "piecewise-constant"]
    try:
        for layer in layers:
            for slot in _slots(layer.module):
                turn = channels_last and slot.stack.ndim == 5
                pieces = (_turned(slot.stack) if turn else slot.stack).unbind(0)
                layer.opened.append(slot._replace(pieces=pieces))
        yield
    finally:
        for layer in layers:
            layer.opened = []


def _turned(kernels: Tensor) -> Tensor:
    """The same (count, outputs, inputs, height, width), with the inputs last in memory."""
    return kernels.permute(0, 1, 3, 4, 2).contiguous().permute(0, 1, 4, 2, 3)
