"""Rollouts of potentials under optimal transport by a compiled kernel, with exact gradients.

`control.rollout` decides when it serves; its results are those of the PyTorch path to round-off.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeGuard

import torch
from torch import Tensor, nn

from .. import native
from ..errors import ArgumentError, ShapeError
from ..nets import Potential, row_space

Results = tuple[Tensor, ...]  # z and, with the integrals, cost, log_det and hjb


@dataclass(frozen=True)
class Adjoint:
    """The derivatives of a loss in the results of each row, known before the rollout.

    Each is (batch,), and they need to be known up to one common factor only.
    """

    terminal_cost: Tensor
    running_cost: Tensor
    log_det: Tensor
    hjb: Tensor


@dataclass(frozen=True)
class Path:
    """What is rolled out, besides the tensors that have gradients."""

    potential: Potential
    steps: int
    start: float
    stop: float
    integrals: bool
    probe: Tensor | None = None  # (batch, dim)
    adjoint: Adjoint | None = None


def can_serve(potential: object, x: Tensor, context: Tensor | None) -> TypeGuard[Potential]:
    """Whether the kernel knows this potential and can work on these tensors."""
    tensors = [x] if context is None else [x, context]
    return (
        type(potential) is Potential
        and _plainly_parametrised(potential)
        and native.knows(potential.w, *tensors)
        and native.ready()
    )


def _plainly_parametrised(potential: Potential) -> bool:
    """Whether no layer was replaced or reparametrised, and no hook wants to be called."""
    return all(
        type(layer) is nn.Linear
        and layer.weight is layer._parameters.get("weight")
        and not (layer._forward_hooks or layer._forward_pre_hooks or layer._backward_hooks)
        for layer in potential.layers
    )


def rollout(path: Path, x: Tensor, context: Tensor | None, plain: Callable[..., Any]) -> Results:
    """The terminal states and, if wanted, the integrals of cost, log-determinant and residual.

    Args:
        path: what is rolled out; with `path.adjoint` the gradient is computed at once, and the
            backward pass raises an `ArgumentError` if the adjoint turns out to be another one.
        x: (batch, dim).
        context: (batch, context_dim) or None.
        plain: the same by PyTorch, `plain(potential, x, context)`, whose result has the fields
            z, running_cost, log_det and hjb: for derivatives of the gradient.
    """
    _check(path, x, context)
    theta = torch.cat([p.reshape(-1) for p in _parameters(path.potential).values()])
    inputs = (theta, x, context)
    if torch.is_grad_enabled() and any(i is not None and i.requires_grad for i in inputs):
        return _Rollout.apply(path, plain, *inputs)
    return _call(path, *inputs)[0]


def _check(path: Path, x: Tensor, context: Tensor | None) -> None:
    if path.steps < 1:
        raise ArgumentError(f"`steps` must be at least 1, got {path.steps}")
    potential = path.potential
    per_row = potential.context_dim
    wanted: dict[str, tuple[Tensor | None, tuple[int, ...] | None]] = {
        "x": (x, (len(x), potential.dim)),
        "context": (context, (len(x), per_row) if per_row else None),
    }
    if path.probe is not None:
        wanted["probe"] = path.probe, tuple(x.shape)
    if path.adjoint is not None:
        wanted |= {f"adjoint.{k}": (v, (len(x),)) for k, v in vars(path.adjoint).items()}
    for name, (tensor, shape) in wanted.items():
        got = None if tensor is None else tuple(tensor.shape)
        if got != shape:
            raise ShapeError(f"`{name}` must be {shape}, got {got}")


def _parameters(potential: Potential) -> dict[str, Tensor]:
    """In the order in which the kernel has them."""
    found = dict(potential.named_parameters())
    layers = [f"layers.{i}.{part}" for i in range(potential.depth) for part in ("weight", "bias")]
    return {name: found[name] for name in ["w", "A", "b", *layers]}


class _Rollout(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        path: Path,
        plain: Callable[..., Any],
        theta: Tensor,
        x: Tensor,
        context: Tensor | None,
    ) -> Results:
        ctx.set_materialize_grads(False)
        ctx.path, ctx.plain = path, plain
        if path.adjoint is None:
            ctx.save_for_backward(theta, x, context)
            return _call(path, theta, x, context)[0]
        a = path.adjoint
        known: dict[str, Tensor | None] = {
            "a_terminal": a.terminal_cost,
            "d_cost": a.running_cost,
            "d_log_det": a.log_det,
            "d_hjb": a.hjb,
        }
        results, gradient = _call(path, theta, x, context, known)
        ctx.save_for_backward(results[0], *gradient)
        return results

    @staticmethod
    def backward(ctx: Any, *adjoints: Tensor | None) -> tuple[Tensor | None, ...]:
        if ctx.path.adjoint is None:
            theta, x, context = ctx.saved_tensors
            if torch.is_grad_enabled():
                return None, None, *_differentiable(ctx, theta, x, context, adjoints)
            names = ("d_z", "d_cost", "d_log_det", "d_hjb")
            given = dict(zip(names, adjoints, strict=False))
            return None, None, *_call(ctx.path, theta, x, context, given)[1]
        if torch.is_grad_enabled():
            raise ArgumentError(
                "with `adjoint` a gradient can't be differentiated again, so `create_graph` must "
                "be False; leave it out"
            )
        z, *gradient = ctx.saved_tensors
        factor = _common_factor(ctx.path.adjoint, z, adjoints)
        return None, None, *(None if g is None else factor * g for g in gradient)


def _common_factor(known: Adjoint, z: Tensor, adjoints: tuple[Tensor | None, ...]) -> Tensor:
    """What the known adjoint must be multiplied with to be the one that came."""
    terminal = known.terminal_cost[:, None] * z
    expected = (terminal, known.running_cost, known.log_det, known.hjb)
    came = [
        torch.zeros_like(e) if a is None else a for e, a in zip(expected, adjoints, strict=True)
    ]
    e, c = (torch.cat([part.flatten() for part in parts]) for parts in (expected, came))
    factor = (c @ e) / (e @ e).clamp_min(torch.finfo(e.dtype).tiny)
    if (c - factor * e).norm() > 1e3 * torch.finfo(e.dtype).eps * c.norm():
        raise ArgumentError(
            "`adjoint` must be proportional to the derivatives of the loss in the results of the "
            "rollout; the backward pass got others"
        )
    return factor


class _Plain(nn.Module):
    """`plain` as a module, whose parameters can be replaced by others for one call."""

    def __init__(self, plain: Callable[..., Any], potential: Potential) -> None:
        super().__init__()
        self.plain, self.potential = plain, potential

    def forward(self, x: Tensor, context: Tensor | None) -> tuple[Tensor | None, ...]:
        path = self.plain(self.potential, x, context)
        return path.z, path.running_cost, path.log_det, path.hjb


def _differentiable(
    ctx: Any, theta: Tensor, x: Tensor, context: Tensor | None, adjoints: tuple[Tensor | None, ...]
) -> list[Tensor | None]:
    """The gradient as a graph, by PyTorch, for those who differentiate it again."""
    potential = ctx.path.potential
    own = _parameters(potential)
    parts = theta.split([p.numel() for p in own.values()])
    parameters = {
        f"potential.{name}": part.view_as(p)
        for (name, p), part in zip(own.items(), parts, strict=True)
    }
    module = _Plain(ctx.plain, potential)
    results = torch.func.functional_call(module, parameters, (x, context))
    pairs = [(r, a) for r, a in zip(results, adjoints, strict=False) if a is not None]
    inputs = (theta, x, context)
    wanted = [i for i in inputs if i is not None and i.requires_grad]
    found = iter(
        torch.autograd.grad(
            [r for r, _ in pairs],
            wanted,
            [a for _, a in pairs],
            create_graph=True,
            allow_unused=True,
        )
    )
    return [next(found) if i is not None and i.requires_grad else None for i in inputs]


def _call(
    path: Path,
    theta: Tensor,
    x: Tensor,
    context: Tensor | None,
    adjoints: dict[str, Tensor | None] | None = None,
) -> tuple[Results, list[Tensor | None]]:
    """Results and, if `adjoints` are given, gradients in theta, x and context."""
    phi, rows = path.potential, len(x)
    theta, x = theta.detach(), x.detach().contiguous()
    context = None if context is None else context.detach().contiguous()
    names = ("z", "cost", "log_det", "hjb") if path.integrals else ("z",)
    shapes = [x.shape] + (len(names) - 1) * [(rows,)]
    results = {name: x.new_empty(s) for name, s in zip(names, shapes, strict=True)}
    arrays: dict[str, Tensor | None] = {"theta": theta, "x": x, "context": context, **results}
    if path.integrals and path.probe is not None:
        arrays["probe"] = path.probe.to(x).contiguous()
    elif path.integrals and phi.dim > phi.width:
        K0 = _parameters(phi)["layers.0.weight"].detach()[:, : phi.dim]
        arrays["frame"] = row_space(K0).contiguous()
    gradient: dict[str, Tensor | None] = {}
    if adjoints is not None:
        gradient = {"d_theta": torch.empty_like(theta), "d_x": torch.empty_like(x)}
        gradient["d_context"] = None if context is None else torch.empty_like(context)
        given = {
            k: None if a is None else a.detach().to(x).contiguous() for k, a in adjoints.items()
        }
        arrays |= given | gradient
    native._kernel.rollout(
        dim=phi.dim,
        context_dim=phi.context_dim,
        width=phi.width,
        depth=phi.depth,
        rank=phi.A.shape[0],
        steps=path.steps,
        start=path.start,
        stop=path.stop,
        integrals=path.integrals,
        threads=native.thread_count(),
        **arrays,
    )
    return tuple(results.values()), list(gradient.values())
