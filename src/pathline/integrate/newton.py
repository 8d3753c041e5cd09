"""The equations of implicit stages: solved by Newton's method, differentiated implicitly.

The unknowns are the slopes: k_i = v(t_i, y_i) with y_i = base + dt sum_j a_ij k_j over the stages j
of one system. One Newton step adds M^-1 (v(y) - k), where M = I - dt a_ij J_i. In exact arithmetic
this is Newton's method for the stage values y; in the slopes, it never divides by dt, and what the
last step adds has passed through M^-1, so that the slopes of a stiff velocity are as accurate as
the stage values (v(y) would be worse by the factor dt |J|). A complex state is seen as pairs of
real numbers, so the velocity need not be holomorphic.

Source: Hairer, Wanner, Solving Ordinary Differential Equations II, 1996, section IV.8.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from math import inf, isfinite, prod
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from ..errors import SolveError
from .dense import Scalar, combine
from .solution import NotConverged

LARGE = 256  # unknowns of one block; beyond, "auto" uses GMRES
SOLVERS = ("auto", "dense", "krylov")
RESTART, CYCLES = 40, 12  # of GMRES

VectorField = Callable[[Tensor, Tensor], Tensor]
Weights = Sequence[tuple[float, ...]]


@contextmanager
def _apart() -> Iterator[None]:
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
        with _apart():
            self.y = y.detach().clone().requires_grad_()
            f = rows.rows(field(t.detach().clone(), rows.state(self.y)))
        self.f = f if f.requires_grad else None  # a velocity that does not depend on z
        self.value = f.detach()
        self.pullback: tuple[Tensor, Tensor] | None = None

    def vjp(self, u: Tensor) -> Tensor:
        """J^T u."""
        if self.f is None:
            return torch.zeros_like(u)
        with _apart():
            (x,) = torch.autograd.grad(self.f, self.y, u, retain_graph=True, allow_unused=True)
        return torch.zeros_like(u) if x is None else x

    def jvp(self, x: Tensor) -> Tensor:
        """J x: J^T u is linear in u, and this is its derivative."""
        if self.f is None:
            return torch.zeros_like(x)
        with _apart():
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
            with _apart():
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
        return bool(self.jvp(probe)[1::2].any())


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
            if bool((left <= goal).all()):
                break
        y = torch.linalg.solve_triangular(r, on, upper=True)
        x = x + (basis[:, : j + 1].mT @ y).squeeze(-1)
        residual = rhs - product(x)
        beta = residual.norm(dim=1)
        if bool((beta <= goal).all()) or not bool(torch.isfinite(beta).all()):
            break
    return x, float(torch.where(size > 0, beta / size, 0.0).max())


def _divide(x: Tensor, norm: Tensor) -> Tensor:
    safe = torch.where(norm > 0, norm, 1.0)[:, None]
    return torch.where(norm[:, None] > 0, x / safe, 0.0)


@dataclass(frozen=True)
class Accuracy:
    """When the stages are solved: in shares of a step's tolerance, or to round-off.

    An error of the stages enters the estimate of the step's error, so it should be a small
    `share` of the tolerance. Without tolerances, stage values are right to ten units in their last
    place.
    """

    rtol: float | Tensor | None = None
    atol: float | Tensor | None = None
    share: float = 0.01

    @property
    def adaptive(self) -> bool:
        """A march follows that can take a smaller step."""
        return self.rtol is not None


@dataclass(frozen=True)
class Stages:
    """The equations of one or more stages, for slopes (blocks, stages, unknowns).

    Args:
        field: the velocity.
        rows: how states lie in rows.
        a: the weights of these stages on each other.
        ts: their times.
        base: what their values are without their own slopes, (blocks, unknowns) each.
        dt: a number, a tensor (), or (blocks, unknowns).
        linear: how to solve linear systems, of `SOLVERS`.
        noise: the relative error of a velocity of lower precision than the state.
    """

    field: VectorField
    rows: Rows
    a: tuple[tuple[float, ...], ...]
    ts: tuple[Tensor, ...]
    base: tuple[Tensor, ...]
    dt: Scalar
    linear: str
    noise: float = 0.0

    def tensors(self) -> tuple[Tensor, ...]:
        """All that `restored` needs, without their graphs."""
        own = (*self.ts, *self.base, *((self.dt,) if isinstance(self.dt, Tensor) else ()))
        return tuple(x.detach() for x in own)

    def restored(self, tensors: Sequence[Tensor]) -> "Stages":
        """These equations with other tensors; `Stages` without any is a recipe."""
        n = len(self.a)
        dt = tensors[2 * n] if len(tensors) > 2 * n else self.dt
        return replace(self, ts=tuple(tensors[:n]), base=tuple(tensors[n : 2 * n]), dt=dt)

    def values(self, ks: Tensor) -> list[Tensor]:
        """The stages' states, in rows."""
        slopes = ks.unbind(1)
        pairs = zip(self.base, self.a, strict=True)
        return [combine(base, row, slopes, self.dt) for base, row in pairs]

    def slopes(self, ks: Tensor) -> Tensor:
        """v at the stages."""
        rows = self.rows
        return torch.stack(
            [
                rows.rows(self.field(t, rows.state(y)))
                for t, y in zip(self.ts, self.values(ks), strict=True)
            ],
            1,
        )

    def linearized(self, ks: Tensor) -> tuple[Tensor, System]:
        """v at the stages, and the system there."""
        tangents = [
            Tangent(self.field, self.rows, t, y)
            for t, y in zip(self.ts, self.values(ks), strict=True)
        ]
        return torch.stack([tangent.value for tangent in tangents], 1), self._system(tangents)

    def _system(self, tangents: Sequence[Tangent]) -> System:
        blocks, n = self.rows.blocks, self.rows.unknowns
        if self.linear == "dense" or (self.linear == "auto" and n <= LARGE):
            jacobians = []
            for tangent in tangents:
                jacobian = tangent.jacobians()
                if jacobian is None:
                    break
                jacobians.append(jacobian)
            else:
                return DenseSystem(jacobians, self.a, self.dt)
            if self.linear == "dense" or blocks * n <= LARGE:
                whole = [tangent.jacobian() for tangent in tangents]
                return DenseSystem(whole, self.a, self.dt)
        return KrylovSystem(tangents, self.a, self.dt)

    def units(self, accuracy: Accuracy) -> Tensor:
        """How far a Newton step may still move the stages' values, (blocks, 1 or unknowns)."""
        base = torch.stack([x.detach() for x in self.base], 1)
        real = torch.finfo(base.dtype)
        floor = 10 * real.eps * base.abs().amax((1, 2))[:, None] + real.tiny
        if accuracy.rtol is None:
            return floor
        assert accuracy.atol is not None
        size = self.rows.state(base[:, -1]).abs()
        wish = accuracy.atol + accuracy.rtol * size
        return torch.maximum(self.rows.spread(accuracy.share * wish), floor)

    def moves(self, ks: Tensor) -> Tensor:
        """What slopes add to the stages' values."""
        slopes, zero = ks.unbind(1), torch.zeros_like(ks[:, 0])
        return torch.stack([combine(zero, row, slopes, self.dt) for row in self.a], 1)

    def sizes(self, change: Tensor, ks: Tensor, units: Tensor, mean: bool) -> Tensor:
        """The change of each block's stages in `units`, as mean square or maximum, (blocks,)."""
        if self.noise:
            units = units + self.noise * self.moves(ks).abs().amax((1, 2))[:, None]
        moved = self.moves(change) / units[:, None]
        return moved.square().mean((1, 2)).sqrt() if mean else moved.abs().amax((1, 2))


def solve_stages(
    stages: Stages, guess: Tensor, system: System | None, accuracy: Accuracy
) -> tuple[Tensor, System | None]:
    """The slopes of the stages, without a graph, and the system for equations like these.

    Newton's method is the simplified one, with the system at hand, as long as it converges fast;
    else the system is made anew at the last iterate. Where nobody could take a smaller step, a
    failure is followed by full Newton steps from rest. Where samples choose their own steps, the
    slopes of those that fail are NaN, so that the others need not wait for them.

    Raises:
        NotConverged: the iterates diverge, or are not finite.
    """
    with torch.no_grad():
        units = stages.units(accuracy)
        try:
            return _newton(stages, guess, system, accuracy, units, 10 if accuracy.adaptive else 25)
        except NotConverged:
            if accuracy.adaptive:
                raise
        return _newton(stages, torch.zeros_like(guess), None, accuracy, units, 60, full=True)


def _newton(
    stages: Stages,
    ks: Tensor,
    system: System | None,
    accuracy: Accuracy,
    units: Tensor,
    limit: int,
    full: bool = False,
) -> tuple[Tensor, System | None]:
    alone = accuracy.adaptive and isinstance(stages.dt, Tensor) and stages.dt.ndim > 0
    slack = 0.1 * torch.finfo(units.dtype).eps ** -0.25
    last = torch.full_like(units[:, 0], torch.nan)  # sizes of the changes, one for each block
    lost = torch.zeros_like(last, dtype=torch.bool)
    for n in range(limit):
        fresh = system is None
        if system is None:
            slopes, system = stages.linearized(ks)
        else:
            slopes = stages.slopes(ks)
        change = system.solve(slopes - ks)
        sizes = stages.sizes(change, ks + change, units, accuracy.adaptive)
        rates = sizes / last
        lost = lost | ~torch.isfinite(sizes)
        done = (sizes <= 1) | ((rates < 1) & (sizes * rates <= 1 - rates))
        if fresh and accuracy.adaptive:
            lost = lost | ((rates >= 1) & ~done)
        elif fresh:
            done = done | ((rates > 0.5) & (sizes <= slack))  # round-off of the velocity
        if bool(lost.any()):
            if not alone or bool(lost.all()):
                break
            change = torch.where(lost[:, None, None], 0.0, change)
        ks = ks + change
        if bool((done | lost).all()):
            return _without(ks, lost), None if system.exact else system
        steps = torch.where(rates < 1, sizes.log() / -rates.log(), inf)  # needed at this rate
        slow = n > 0 and bool((steps > 3)[~(done | lost)].any())
        if full or system.exact or slow:
            system = None
        last = sizes
    lost = lost | ~done
    if alone and not bool(lost.all()):
        return _without(ks, lost), None
    raise NotConverged("Newton's method did not find the stages of an implicit step")


def _without(ks: Tensor, lost: Tensor) -> Tensor:
    return torch.where(lost[:, None, None], torch.nan, ks)


def attach(stages: Stages, ks: Tensor, derivatives: int) -> Tensor:
    """The slopes `ks` as a differentiable function of all that the stages depend on.

    With M the exact system at the solution, held constant, a Newton step k + M^-1 (v(y) - k)
    changes no value, and has the derivatives of the solution: those up to the n-th after n steps.
    For if k follows the solution up to an error e of order n in a perturbation, the step leaves
    (I - M^-1 M') e with the perturbed M', of one order more. A backward pass that is not itself
    differentiated goes through the first step alone. M is formed in the backward pass.
    """
    tensors = stages.tensors()
    recipe = _Recipe(replace(stages, ts=(), base=()))
    known, first = ks, None
    for _ in range(derivatives):
        residual = stages.slopes(known) - known
        if not residual.requires_grad:
            return ks
        known = _NewtonStep.apply(known, residual, recipe, ks, *tensors)
        first = known if first is None else first
    return known if derivatives == 1 else _Either.apply(first, known)


class _Recipe:
    """How to make the exact system in a backward pass; kept for the next one only there, where
    a graph of the backward pass needs it in each of its nodes."""

    def __init__(self, stages: Stages) -> None:
        self.stages = stages
        self.kept: System | None = None

    def system(self, ks: Tensor, tensors: Sequence[Tensor]) -> System:
        system = self.kept
        if system is None:
            _, system = self.stages.restored(tensors).linearized(ks)
        self.kept = system if torch.is_grad_enabled() else None
        return system


class _NewtonStep(torch.autograd.Function):
    """k + M^-1 residual, which has the value k."""

    @staticmethod
    def forward(known: Tensor, residual: Tensor, recipe: _Recipe, *tensors: Tensor) -> Tensor:
        return tensors[0].clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.recipe = inputs[2]
        ctx.save_for_backward(*inputs[3:])

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        ks, *tensors = ctx.saved_tensors
        system = ctx.recipe.system(ks, tensors)
        back = _Solved.apply(gradient, system, True)
        return (gradient, back, None, *(None for _ in ctx.saved_tensors))


class _Solved(torch.autograd.Function):
    """M^-1 rhs, or M^-T rhs, with a constant M."""

    @staticmethod
    def forward(rhs: Tensor, system: System, transposed: bool) -> Tensor:
        return system.solve(rhs, transposed=transposed, last=True)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        _, ctx.system, ctx.transposed = inputs

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        return _Solved.apply(gradient, ctx.system, not ctx.transposed), None, None


class _Either(torch.autograd.Function):
    """Two tensors of equal values: the gradient goes to the first, its graph to the last."""

    @staticmethod
    def forward(first: Tensor, last: Tensor) -> Tensor:
        return last.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        return (None, gradient) if torch.is_grad_enabled() else (gradient, None)
