"""The scalar potential Phi(x, t) with its exact derivatives in closed form.

Source: Onken, Wu Fung, Li, Ruthotto, OT-Flow, AAAI 2021 (arXiv 2006.00104), section 3.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from ..errors import ArgumentError, ShapeError
from .trace import InnerTraces, log_cosh


@dataclass(frozen=True)
class Derivatives:
    """A potential and its derivatives at a batch of points; None for what was not asked for."""

    value: Tensor | None = None  # (batch,)
    grad: Tensor | None = None  # (batch, dim), with respect to x
    dt: Tensor | None = None  # (batch,), the partial derivative in time
    laplacian: Tensor | None = None  # (batch,), over x


class Potential(nn.Module):
    """Phi(s) = w.N(s) + 1/2 |A s|^2 + b.s + c with s = (x, t, context) and a residual network N.

    N has `depth` layers of `width` neurons, u_0 = sig(K_0 s + b_0) and
    u_i = u_{i-1} + h sig(K_i u_{i-1} + b_i) with h = 1/(depth - 1) and sig(x) = log(2 cosh x).
    Depth 2 is the published network. Parameters: `w` (width,), `A` (rank, dim+1+context_dim),
    `b` (dim+1+context_dim,), `c` (), and the linear `layers`.

    Args:
        dim: number of columns of x.
        width: neurons of each layer.
        depth: layers, at least one.
        rank: rows of A; at most dim + 1 + context_dim are used.
        context_dim: number of columns of the context, which is appended after t.
        generator: source of the initial weights; torch's global one by default.
    """

    def __init__(
        self,
        dim: int,
        width: int,
        depth: int = 2,
        rank: int = 10,
        context_dim: int = 0,
        *,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        sizes = {"dim": dim, "width": width, "depth": depth, "rank": rank}
        for name, size in sizes.items():
            if not isinstance(size, int) or size < 1:
                raise ArgumentError(f"`{name}` must be a positive integer, got {size!r}")
        if not isinstance(context_dim, int) or context_dim < 0:
            raise ArgumentError(f"`context_dim` must be an integer >= 0, got {context_dim!r}")
        self.dim, self.width, self.depth, self.context_dim = dim, width, depth, context_dim
        inputs = dim + 1 + context_dim
        self.h = 1 / max(depth - 1, 1)
        self.w = nn.Parameter(torch.empty(width))
        self.A = nn.Parameter(torch.empty(min(rank, inputs), inputs))
        self.b = nn.Parameter(torch.empty(inputs))
        self.c = nn.Parameter(torch.empty(()))
        self.layers = nn.ModuleList(  # without nn.Linear's draws from torch's global generator
            nn.utils.skip_init(nn.Linear, inputs if i == 0 else width, width) for i in range(depth)
        )
        self.reset_parameters(generator)

    @torch.no_grad()
    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """The published initial weights: w = 1, b = 0, c = 0, A Xavier-uniform, and the layers
        as in `nn.Linear` with K_1 = ... = K_M."""
        self.w.fill_(1.0)
        self.b.zero_()
        self.c.zero_()
        nn.init.xavier_uniform_(self.A, generator=generator)
        for i, layer in enumerate(self._linears()):
            if i > 1:
                layer.load_state_dict(self.layers[1].state_dict())
                continue
            bound = 1 / math.sqrt(layer.in_features)
            layer.weight.uniform_(-bound, bound, generator=generator)
            layer.bias.uniform_(-bound, bound, generator=generator)

    def forward(self, x: Tensor, t: Tensor, context: Tensor | None = None) -> Tensor:
        """Phi at the rows of `x`, (batch,); see `derivatives` for the arguments."""
        value = self.derivatives(x, t, context, grad=False, dt=False, laplacian=False).value
        assert value is not None
        return value

    def derivatives(
        self,
        x: Tensor,
        t: Tensor,
        context: Tensor | None = None,
        *,
        value: bool = True,
        grad: bool = True,
        dt: bool = True,
        laplacian: bool = True,
        laplacian_adjoint: Tensor | None = None,
        probe: Tensor | None = None,
    ) -> Derivatives:
        """Value, gradient, time derivative and Laplacian in one pass, exactly.

        Args:
            x: points, (batch, dim).
            t: time, () or (batch,).
            context: (batch, context_dim), or None if the potential has none.
            value, grad, dt, laplacian: which of them to compute.
            laplacian_adjoint: the gradient that the loss will have with respect to the
                Laplacian, (batch,), where it is known up to a factor: then a backward pass costs
                no more products. It may be differentiated once.
            probe: (batch, dim) of independent random signs, for an unbiased estimate of the
                Laplacian. Only the inner layers are estimated, at the price of one column.

        Returns:
            `Derivatives`; each can be differentiated with respect to x, t, context and every
            parameter. The Laplacian costs O(depth batch min(dim, width) width^2) operations.

        Raises:
            ShapeError: an argument is not shaped as above.
            ArgumentError: in the backward pass, the gradient is not `laplacian_adjoint`.
        """
        evaluate = self.bind(probe)
        wanted = {"value": value, "grad": grad, "dt": dt, "laplacian": laplacian}
        return evaluate(x, t, context, **wanted, laplacian_adjoint=laplacian_adjoint)

    def bind(
        self,
        probe: Tensor | None = None,
        trace_dtype: torch.dtype | None = None,
        noise: Tensor | None = None,
    ) -> Callable[..., Derivatives]:
        """`derivatives` for many evaluations with the same parameters and the same `probe`.

        What depends on these alone is computed once. Where the `laplacian_adjoint` of one is
        given, all with one must be part of the loss, and with the same factor.

        Args:
            probe: as in `derivatives`.
            trace_dtype: precision of the products of the inner layers' traces, such as
                torch.bfloat16; sums are kept in the potential's.
            noise: sigma, (dim, columns). The Laplacian is then tr(sigma sigma^T Hessian), and a
                probe is (batch, columns).
        """
        first, A = self._linears()[0].weight[:, : self.dim], self.A[:, : self.dim]
        if noise is not None:
            first, A = first @ noise, A @ noise
        traces = InnerTraces(self.inner_weights(), first, self.h, probe, trace_dtype)
        return partial(self._derivatives, traces, first, A)

    def _derivatives(
        self,
        traces: InnerTraces,
        columns: Tensor,
        A_columns: Tensor,
        x: Tensor,
        t: Tensor,
        context: Tensor | None = None,
        *,
        value: bool = True,
        grad: bool = True,
        dt: bool = True,
        laplacian: bool = True,
        laplacian_adjoint: Tensor | None = None,
    ) -> Derivatives:
        s = self._stack(x, t, context)
        for name, given, want in (
            ("probe", traces.probe, (x.shape[0], columns.shape[1])),
            ("laplacian_adjoint", laplacian_adjoint, x.shape[:1]),
        ):
            if given is not None and given.shape != want:
                raise ShapeError(f"`{name}` must be {tuple(want)}, got {tuple(given.shape)}")
        first, *inner = self._linears()
        u, T = log_cosh(first(s))
        tanhs = [T]  # tanh(K_i u_{i-1} + b_i), i = 0..M
        for i, layer in enumerate(inner, start=1):
            if value or i < len(inner):
                activation, T = log_cosh(layer(u))
                u = torch.add(u, activation, alpha=self.h)
            else:  # u_M enters the value only
                T = torch.tanh(layer(u))
            tanhs.append(T)

        z: Tensor = self.w  # z_{M+1}
        slopes = []  # tanh'(.) z_{i+1}, from i = M down
        for T, layer in zip(reversed(tanhs[1:]), reversed(inner), strict=True):
            g = T * z
            if laplacian:
                slopes.append(torch.addcmul(z, T, g, value=-1))
            z = torch.addmm(z, g, layer.weight, alpha=self.h)  # z_i
        g = tanhs[0] * z
        As = s @ self.A.mT
        result: dict[str, Tensor] = {}
        if grad or dt:
            grad_s = torch.addmm(torch.addmm(self.b, g, first.weight), As, self.A)
            result["grad"], result["dt"] = grad_s[:, : self.dim], grad_s[:, self.dim]
        if value:
            result["value"] = u @ self.w + 0.5 * As.square().sum(1) + s @ self.b + self.c
        if laplacian:
            slopes.append(torch.addcmul(z, tanhs[0], g, value=-1))
            outer, *rest = slopes[::-1]
            result["laplacian"] = (
                outer @ columns.square().sum(1)
                + A_columns.square().sum()
                + traces(tanhs, rest, laplacian_adjoint)
            )
        wanted = {"value": value, "grad": grad, "dt": dt, "laplacian": laplacian}
        return Derivatives(**{name: result[name] for name, on in wanted.items() if on})

    def _stack(self, x: Tensor, t: Tensor, context: Tensor | None) -> Tensor:
        """s = (x, t, context), (batch, dim + 1 + context_dim)."""
        if x.ndim != 2 or x.shape[1] != self.dim:
            raise ShapeError(f"`x` must be (batch, {self.dim}), got {tuple(x.shape)}")
        batch = x.shape[0]
        if t.ndim > 1 or (t.ndim == 1 and t.shape[0] != batch):
            raise ShapeError(f"`t` must be () or ({batch},), got {tuple(t.shape)}")
        columns = [x, t[:, None] if t.ndim else t.expand(batch, 1)]
        if context is not None:
            columns.append(context)
        got = None if context is None else tuple(context.shape)
        want = (batch, self.context_dim) if self.context_dim else None
        if got != want:
            raise ShapeError(f"`context` must be {want}, got {got}")
        return torch.cat(columns, dim=1)

    def _linears(self) -> list[nn.Linear]:
        return list(self.layers)  # type: ignore[arg-type]

    def hold_constant(self) -> None:
        """Make `c` a buffer: an objective that never sees the value gives it no gradient."""
        c = self.c.detach()
        del self.c
        self.register_buffer("c", c)

    def inner_weights(self) -> list[Tensor]:
        """The hidden-to-hidden matrices K_1 ... K_M."""
        return [layer.weight for layer in self._linears()[1:]]

    @torch.no_grad()
    def random_features(
        self, inputs: Tensor, scale: float, generator: torch.Generator | None = None
    ) -> None:
        """Start from random features of the data instead of the published weights.

        K_0 ~ N(0, scale^2) with every hyperplane through a random row of `inputs` at a random
        time in [0, 1]; K_i ~ N(0, 1/width); w, A ~ N(0, 0.1^2); b = 0. A flow starts close to
        the identity and needs a fraction of the steps.

        Args:
            inputs: rows (x, context) of the training data, (batch, dim + context_dim).
            scale: standard deviation of K_0, in units of 1/inputs.
        """
        device, dtype = self.w.device, self.w.dtype

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator, dtype=torch.float64).to(device, dtype)

        first, *inner = self._linears()
        self.w.copy_(0.1 * normal(self.width))
        self.A.copy_(0.1 * normal(*self.A.shape))
        self.b.zero_()
        self.c.zero_()
        K0 = scale * normal(*first.weight.shape)
        rows = torch.randint(len(inputs), (self.width,), generator=generator)
        times = torch.rand(self.width, 1, generator=generator, dtype=torch.float64)
        points = inputs[rows.to(inputs.device)].to(device, dtype)
        points = torch.cat(
            [points[:, : self.dim], times.to(device, dtype), points[:, self.dim :]], dim=1
        )
        first.weight.copy_(K0)
        first.bias.copy_(-(K0 * points).sum(1))
        for layer in inner:
            layer.weight.copy_(normal(self.width, self.width) / math.sqrt(self.width))
            layer.bias.zero_()
