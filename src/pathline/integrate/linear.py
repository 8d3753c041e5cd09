"""The linear algebra of implicit stages: a velocity's derivative, and systems with it.

States are seen as real rows: one for each sample, or one for all where they depend on each other.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from math import isfinite, prod
from typing import Protocol

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from ..errors import SolveError
from .dense import Scalar, combine

LARGE = 256  # unknowns of one block; beyond, "auto" uses GMRES
RESTART, CYCLES = 40, 12  # of GMRES

VectorField = Callable[[Tensor, Tensor], Tensor]
Weights = Sequence[tuple[float, ...]]


@contextmanager
def apart() -> Iterator[None]:
    """Gradients for the solver's own use, wherever it runs.

    What they save is no part of the caller's graph: the hooks of a checkpointed solve see the
    same tensors whatever the number of Newton steps, and keep none of these.
    """
    with ExitStack() as stack:
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        stack.enter_context(saved_tensors_hooks(lambda x: x.detach(), lambda x: x))
        yield


class Rows:
    """A state as real rows (blocks, unknowns): a row for each sample, or one for them all."""

    def __init__(self, z: Tensor) -> None:
        self.shape, self.complex = z.shape, z.is_complex()
        self.blocks = z.shape[0] if z.ndim > 1 else 1
        self.unknowns = prod(z.shape[1:] if z.ndim > 1 else z.shape) * (2 if self.complex else 1)

    def rows(self, z: Tensor) -> Tensor:
        if self.complex:
            z = torch.view_as_real(z.resolve_conj())
        return z.reshape(self.blocks, self.unknowns)

    def state(self, rows: Tensor) -> Tensor:
        if self.complex:
            return torch.view_as_complex(rows.reshape(*self.shape, 2))
        return rows.reshape(self.shape)

    def spread(self, x: Tensor) -> Tensor:
        """A real tensor that broadcasts against the state, as rows."""
        x = x.expand(self.shape)
        if self.complex:
            x = torch.stack([x, x], -1)
        return x.reshape(self.blocks, self.unknowns)


class Tangent:
    """The velocity at one point and its derivative there, all in rows."""

    def __init__(self, field: VectorField, rows: Rows, t: Tensor, y: Tensor) -> None:
        with apart():
            self.y = y.detach().clone().requires_grad_()
            f = rows.rows(field(t.detach().clone(), rows.state(self.y)))
        self.f = f if f.requires_grad else None  # a velocity that does not depend on z
        self.value = f.detach()
        self.pullback: tuple[Tensor, Tensor] | None = None

    def vjp(self, u: Tensor) -> Tensor:
        """J^T u."""
        if self.f is None:
            return torch.zeros_like(u)
        with apart():
            (x,) = torch.autograd.grad(self.f, self.y, u, retain_graph=True, allow_unused=True)
        return torch.zeros_like(u) if x is None else x

    def jvp(self, x: Tensor) -> Tensor:
        """J x: J^T u is linear in u, and this is its derivative."""
        if self.f is None:
            return torch.zeros_like(x)
        with apart():
            if self.pullback is None:
                u = torch.zeros_like(self.y).requires_grad_()
                (g,) = torch.autograd.grad(self.f, self.y, u, create_graph=True, allow_unused=True)
                self.pullback = u, torch.zeros_like(u) if g is None else g
            u, g = self.pullback
            if not g.requires_grad:
                return torch.zeros_like(x)
            (out,) = torch.autograd.grad(g, u, x, retain_graph=True, allow_unused=True)
        return torch.zeros_like(x) if out is None else out

    def vjps(self, us: Tensor, chunk: int = 64) -> Tensor:
        """J^T u for every u of `us` (number, blocks, unknowns)."""
        if self.f is None:
            return torch.zeros_like(us)
        if len(us) <= 2:
            return torch.stack([self.vjp(u) for u in us])
        try:
            with apart():
                parts = [
                    torch.autograd.grad(
                        self.f,
                        self.y,
                        part,
                        retain_graph=True,
                        allow_unused=True,
                        is_grads_batched=True,
                    )[0]
                    for part in us.split(chunk)
                ]
        except RuntimeError:  # an operation without a rule for batches
            return torch.stack([self.vjp(u) for u in us])
        if parts[0] is None:
            return torch.zeros_like(us)
        return torch.cat(parts)

    def jacobians(self) -> Tensor | None:
        """(blocks, unknowns, unknowns); None where blocks depend on each other.

        One row of all blocks takes one product. A further product, with a cotangent that differs
        from block to block, shows whether blocks are coupled.
        """
        blocks, n = self.y.shape
        us = torch.eye(n, dtype=self.y.dtype, device=self.y.device)[:, None].expand(n, blocks, n)
        if blocks == 1:
            return self.vjps(us).movedim(0, 1)
        # Neither random, which would disturb the caller's random numbers, nor regular.
        probe = torch.arange(1, blocks * n + 1, dtype=self.y.dtype, device=self.y.device)
        probe = torch.cos(probe * probe * 0.7).view(blocks, n)
        products = self.vjps(torch.cat([us, probe[None]]))
        jacobians = products[:-1].movedim(0, 1)
        expected = torch.einsum("bi,bij->bj", probe, jacobians)
        scale = torch.maximum(jacobians.abs().sum(1).amax(), products[-1].abs().amax())
        close = (products[-1] - expected).abs().amax() <= 1e3 * torch.finfo(scale.dtype).eps * scale
        # Where something is not finite, Newton's method will say so.
        return jacobians if bool(close) or not isfinite(float(scale)) else None

    def jacobian(self) -> Tensor:
        """(1, all, all), of all blocks at once."""
        blocks, n = self.y.shape
        us = torch.eye(blocks * n, dtype=self.y.dtype, device=self.y.device)
        return self.vjps(us.view(-1, blocks, n)).reshape(1, blocks * n, blocks * n)

    def coupled(self) -> bool:
        """Whether a change of every other block is felt by the rest."""
        if len(self.y) == 1:
            return True
        probe = torch.arange(1, self.y.numel() + 1, dtype=self.y.dtype, device=self.y.device)
        probe = torch.cos(probe * probe * 0.7).view_as(self.y)
        probe[1::2] = 0.0
        return bool((self.jvp(probe)[1::2].abs() > 0).any())


class System(Protocol):
    """M = I - dt a_ij J_i over the stages; slopes are (blocks, stages, unknowns)."""

    exact: bool  # always at the point where it is used, so that Newton's method is the full one

    def solve(self, rhs: Tensor, *, transposed: bool = False, last: bool = False) -> Tensor:
        """M^-1 rhs, or M^-T rhs; to round-off where it is the `last` word."""
        ...


class DenseSystem:
    """The system by its LU factors, block by block or as one block."""

    exact = False

    def __init__(self, jacobians: Sequence[Tensor], a: Weights, dt: Scalar) -> None:
        if isinstance(dt, Tensor) and dt.ndim:
            dt = dt.reshape(len(jacobians[0]), 1, -1)
        scaled = [jacobian * dt for jacobian in jacobians]
        rows = [
            torch.cat([weight * jacobian for weight in row], -1)
            for row, jacobian in zip(a, scaled, strict=True)
        ]
        m = torch.cat(rows, -2).neg_()
        m.diagonal(dim1=-2, dim2=-1).add_(1.0)
        self.lu, self.pivots, _ = torch.linalg.lu_factor_ex(m)

    def solve(self, rhs: Tensor, *, transposed: bool = False, last: bool = False) -> Tensor:
        blocks, stages, _ = rhs.shape
        one = len(self.lu) == 1 < blocks
        flat = (rhs.movedim(1, 0) if one else rhs).reshape(len(self.lu), -1, 1)
        out = torch.linalg.lu_solve(self.lu, self.pivots, flat, adjoint=transposed)
        if one:
            return out.view(stages, blocks, -1).movedim(0, 1)
        return out.view_as(rhs)


class KrylovSystem:
    """The system by its products with vectors, for GMRES.

    Raises:
        SolveError: a gradient needs a system that GMRES does not solve.
    """

    exact = True

    def __init__(self, tangents: Sequence[Tangent], a: Weights, dt: Scalar) -> None:
        self.tangents, self.a, self.dt = tangents, a, dt
        self.one = any(tangent.coupled() for tangent in tangents)

    def product(self, x: Tensor, transposed: bool) -> Tensor:
        ks, zero = x.unbind(1), torch.zeros_like(x[:, 0])
        if not transposed:
            moved = [combine(zero, row, ks, self.dt) for row in self.a]
            images = [tangent.jvp(y) for tangent, y in zip(self.tangents, moved, strict=True)]
        else:
            pulled = [tangent.vjp(k) for tangent, k in zip(self.tangents, ks, strict=True)]
            columns = zip(*self.a, strict=True)
            images = [combine(zero, column, pulled, self.dt) for column in columns]
        return x - torch.stack(images, 1)

    def solve(self, rhs: Tensor, *, transposed: bool = False, last: bool = False) -> Tensor:
        shape = rhs.shape

        def product(x: Tensor) -> Tensor:
            return self.product(x.view(shape), transposed).reshape(x.shape)

        eps = torch.finfo(rhs.dtype).eps
        flat = rhs.reshape(1 if self.one else len(rhs), -1)
        x, left = gmres(product, flat, 50 * eps if last else max(1e-4, 50 * eps))
        if last and not left <= eps**0.5:
            raise SolveError(
                f"GMRES left {left:.1e} of the gradient of an implicit step unsolved; take "
                'smaller steps, or options={"linear": "dense"}'
            )
        return x.view(shape)


def gmres(
    product: Callable[[Tensor], Tensor], rhs: Tensor, tolerance: float
) -> tuple[Tensor, float]:
    """Solves `product(x) = rhs` for every row by itself; also the largest relative residual.

    Args:
        product: linear, (rows, n) -> (rows, n), without a coupling of rows.
        rhs: (rows, n).
        tolerance: of the residual's norm, relative to that of `rhs`.

    Source: Saad, Schultz, GMRES, SIAM Journal on Scientific and Statistical Computing 7, 1986.
    """
    eps = torch.finfo(rhs.dtype).eps
    length = min(RESTART, rhs.shape[1])
    size = rhs.norm(dim=1)
    goal = tolerance * size
    x, residual = torch.zeros_like(rhs), rhs
    for _ in range(CYCLES):
        beta = residual.norm(dim=1)
        basis = rhs.new_zeros(len(rhs), length + 1, rhs.shape[1])
        basis[:, 0] = _divide(residual, beta)
        h = rhs.new_zeros(len(rhs), length + 1, length)
        target = rhs.new_zeros(len(rhs), length + 1, 1)
        target[:, 0, 0] = beta
        for j in range(length):
            w = product(basis[:, j])
            before, known = w.norm(dim=1), basis[:, : j + 1]
            for _ in range(2):  # once more for orthogonality to round-off
                part = torch.einsum("bjn,bn->bj", known, w)
                w = w - torch.einsum("bj,bjn->bn", part, known)
                h[:, : j + 1, j] += part
            norm = w.norm(dim=1)
            norm = torch.where(norm <= 10 * eps * before, 0.0, norm)  # the row is solved
            h[:, j + 1, j] = norm
            basis[:, j + 1] = _divide(w, norm)
            h[:, j, j] += (h[:, : j + 2, j] == 0).all(1)  # an empty column of a solved row
            q, r = torch.linalg.qr(h[:, : j + 2, : j + 1])
            on = q.mT @ target[:, : j + 2]
            left = (target[:, : j + 2] - q @ on).flatten(1).norm(dim=1)
            if not bool((left > goal).any()):  # rows that are not finite are none to wait for
                break
        y = torch.linalg.solve_triangular(r, on, upper=True)
        x = x + (basis[:, : j + 1].mT @ y).squeeze(-1)
        residual = rhs - product(x)
        beta = residual.norm(dim=1)
        if not bool((beta > goal).any()):
            break
    return x, float(torch.where(size > 0, beta / size, 0.0).max())


def _divide(x: Tensor, norm: Tensor) -> Tensor:
    safe = torch.where(norm > 0, norm, 1.0)[:, None]
    return torch.where(norm[:, None] > 0, x / safe, 0.0)
