"""A potential G(x, y) that is strongly convex in x, with its exact gradient and Hessian.

Source: Wang, Baptista, Marzouk, Ruthotto, Verma, Efficient Neural Network Approaches for
Conditional Optimal Transport with Applications in Bayesian Inference, SIAM J. Sci. Comput. 2025
(arXiv 2310.16975), section 3; the network is from Amos, Xu, Kolter, Input Convex Neural Networks,
ICML 2017 (arXiv 1609.07152).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..errors import ArgumentError, ShapeError


@dataclass(frozen=True)
class ConvexDerivatives:
    """A convex potential with its derivatives in x at a batch of points."""

    value: Tensor  # (batch,)
    grad: Tensor  # (batch, dim)
    hessian: Tensor | None = None  # (batch, dim, dim), symmetric; None where not asked for


class Gates(NamedTuple):
    """What one layer of a `ConvexPotential` takes from the context."""

    input: Tensor  # p_k = B_k v_k + d_k, (batch, dim)
    hidden: Tensor  # q_k = relu(A_k v_k + a_k), (batch, width); no columns in the first layer
    shift: Tensor  # r_k = C_k v_k + b_k, (batch, width); no columns in the last layer


class ConvexPotential(nn.Module):
    """G(x, y) = sp(g_1) N(x, y) + (relu(g_2) + sp(g_3)) |x|^2 / 2 with sp(a) = log(1 + e^a).

    N is a partially input-convex network of `depth` layers of `width` neurons. The context y
    enters through v_0 = y, v_k = ELU(V_k v_{k-1} + c_k), and as gates and shifts of the layers:

        w_1     = sp(L_0 [x p_0] + r_0),                          p_k = B_k v_k + d_k,
        w_{k+1} = sp(W_k [w_k q_k] / width + L_k [x p_k] + r_k),  q_k = relu(A_k v_k + a_k),
        N       = W_K [w_K q_K] / width + x . p_K,                r_k = C_k v_k + b_k, K = depth.

    N is convex in x if W_k >= 0, and nothing else is constrained; call `project` after each step
    of an optimizer. Two terms of the paper are left out: the one of N that depends on y alone,
    which its gradient in x never sees, and the relu of p_0, which convexity does not need.

    Args:
        dim: number of columns of x.
        context_dim: number of columns of y; with none this is an input-convex network.
        width: neurons of each layer.
        depth: layers before the linear one, at least one.
        context_width: neurons of each layer of the context; `width` by default.
        generator: source of the initial weights; torch's global one by default.
    """

    def __init__(
        self,
        dim: int,
        context_dim: int = 0,
        *,
        width: int = 64,
        depth: int = 3,
        context_width: int | None = None,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        context_width = width if context_width is None else context_width
        sizes = {"dim": dim, "width": width, "depth": depth, "context_width": context_width}
        for name, size in sizes.items():
            if not isinstance(size, int) or size < 1:
                raise ArgumentError(f"`{name}` must be a positive integer, got {size!r}")
        if not isinstance(context_dim, int) or context_dim < 0:
            raise ArgumentError(f"`context_dim` must be an integer >= 0, got {context_dim!r}")
        self.dim, self.context_dim, self.width, self.depth = dim, context_dim, width, depth
        self.context_width = context_width if context_dim else 0  # no context: gates are constant
        columns = [context_dim] + [self.context_width] * depth  # of v_0 .. v_K

        def empty(*shapes: tuple[int, ...]) -> nn.ParameterList:
            return nn.ParameterList(torch.empty(shape) for shape in shapes)

        gates = [sum(self._split(k)) for k in range(depth + 1)]
        self.g = nn.Parameter(torch.empty(3))
        self.input_weights = empty(*[(width, dim)] * depth)  # L_k
        self.hidden_weights = empty(*[(width, width)] * (depth - 1), (1, width))  # W_k, k > 0
        self.context_weights = empty(*zip(columns[1:], columns, strict=False))  # V_k, k > 0
        self.context_biases = empty(*((rows,) for rows in columns[1:]))  # c_k
        self.gate_weights = empty(*zip(gates, columns, strict=True))  # (B_k, A_k, C_k)
        self.gate_biases = empty(*((rows,) for rows in gates))  # (d_k, a_k, b_k)
        self.reset_parameters(generator)

    def _split(self, k: int) -> tuple[int, int, int]:
        """Columns of p_k, q_k and r_k in the gates of layer k."""
        return self.dim, self.width if k > 0 else 0, self.width if k < self.depth else 0

    @torch.no_grad()
    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Initial weights W_k >= 0 for which x -> grad_x G is near the identity."""
        self.g.copy_(torch.tensor([0.0, 0.2, 0.2]))
        for L in self.input_weights:
            L.normal_(0, 1 / math.sqrt(self.dim), generator=generator)
        for W in self.hidden_weights:
            W.uniform_(-1, 1, generator=generator).clamp_(min=0)
        linears = [
            *zip(self.context_weights, self.context_biases, strict=True),
            *zip(self.gate_weights, self.gate_biases, strict=True),
        ]
        for weight, bias in linears:  # as in `nn.Linear`
            bound = 1 / math.sqrt(max(weight.shape[1], 1))
            weight.uniform_(-bound, bound, generator=generator)
            bias.uniform_(-bound, bound, generator=generator)
        for k, bias in enumerate(self.gate_biases):
            inputs, hidden, _ = bias.split(self._split(k))
            inputs.fill_(1.0 if k < self.depth else 0.0)
            hidden.fill_(1.0)

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        """G at the rows of `x` (batch, dim) and `context` (batch, context_dim): (batch,)."""
        return self.derivatives(x, context, hessian=False).value

    def derivatives(
        self, x: Tensor, context: Tensor | None = None, *, hessian: bool = True
    ) -> ConvexDerivatives:
        """Value, gradient and Hessian with respect to x in one pass, exactly.

        Args:
            x: points, (batch, dim).
            context: (batch, context_dim), or None if the potential has none.
            hessian: whether to compute the Hessian, which costs O(depth batch dim width^2).

        Returns:
            `ConvexDerivatives`; each can be differentiated with respect to x, context and every
            parameter.

        Raises:
            ShapeError: an argument is not shaped as above.
        """
        if x.ndim != 2 or x.shape[1] != self.dim:
            raise ShapeError(f"`x` must be (batch, {self.dim}), got {tuple(x.shape)}")
        return self.evaluate(x, self.condition(context, len(x)), hessian=hessian)

    def condition(self, context: Tensor | None, batch: int) -> list[Gates]:
        """What `evaluate` needs of the `context` (batch, context_dim), whatever the points."""
        got = None if context is None else tuple(context.shape)
        want = (batch, self.context_dim) if self.context_dim else None
        if got != want:
            raise ShapeError(f"`context` must be {want}, got {got}")
        v = self.g.new_empty(batch, 0) if context is None else context
        result = []
        for k, (weight, bias) in enumerate(zip(self.gate_weights, self.gate_biases, strict=True)):
            if k > 0:
                V, c = self.context_weights[k - 1], self.context_biases[k - 1]
                v = F.elu(F.linear(v, V, c))
            p, q, r = F.linear(v, weight, bias).split(self._split(k), dim=1)
            result.append(Gates(p, q.relu(), r))
        return result

    def evaluate(
        self, x: Tensor, gates: Sequence[Gates], *, hessian: bool = True
    ) -> ConvexDerivatives:
        """As `derivatives`, with what `condition` has made of the context."""
        L, W = list(self.input_weights), [weight / self.width for weight in self.hidden_weights]
        u, slopes = x, []  # q_k w_k, and sp'(a_k) where a_k is the argument of the softplus
        for k, (p, _, r) in enumerate(gates[:-1]):
            a = torch.addmm(r, x * p, L[k].mT)
            if k > 0:
                a = torch.addmm(a, u, W[k - 1].mT)
            # beyond 40, sp(a) = a in double precision; torch's own limit of 20 leaves 2e-9
            u = F.softplus(a, threshold=40) * gates[k + 1].hidden
            slopes.append(torch.sigmoid(a))

        value = (u @ W[-1].mT).squeeze(1) + (x * gates[-1].input).sum(1)
        grad, bends = gates[-1].input, []  # bends: dN/dw_k sp''(a_k), from the last layer down
        z = gates[-1].hidden * W[-1]  # dN/dw_k
        for k in reversed(range(self.depth)):
            slope = z * slopes[k]
            bends.append(torch.addcmul(slope, slope, slopes[k], value=-1))
            grad = torch.addcmul(grad, slope @ L[k], gates[k].input)
            if k > 0:
                z = (slope @ W[k - 1]) * gates[k].hidden
        scale, strength = F.softplus(self.g[0]), self.g[1].relu() + F.softplus(self.g[2])
        value = scale * value + strength / 2 * x.square().sum(1)
        grad = scale * grad + strength * x
        if not hessian:
            return ConvexDerivatives(value, grad)
        H = self._hessian(gates, W, slopes, bends[::-1])
        eye = torch.eye(self.dim, dtype=x.dtype, device=x.device)
        return ConvexDerivatives(value, grad, scale * H + strength * eye)

    def _hessian(
        self, gates: Sequence[Gates], W: list[Tensor], slopes: list[Tensor], bends: list[Tensor]
    ) -> Tensor:
        """The Hessian of N, the sum over layers of J_k^T diag(bend_k) J_k with J_k = da_k/dx.

        J_0 = L_0 diag(p_0): but for p_0 it is the same for all rows, so the products with L_0
        are made once, and the batch meets them in one large matrix product each.
        """
        L, p = list(self.input_weights), gates[0].input
        squares = (L[0][:, :, None] * L[0][:, None]).flatten(1)  # (width, dim dim)
        H = (bends[0] @ squares).unflatten(1, (self.dim, self.dim))
        H = H * p[:, :, None] * p[:, None]
        if self.depth == 1:
            return H
        jacobians: list[Tensor] = []  # J_k^T, (batch, dim, width)
        for k in range(1, self.depth):
            inner = slopes[k - 1] * gates[k].hidden
            if k == 1:
                table = (L[0].mT[:, None] * W[0]).flatten(0, 1)  # (dim width, width)
                J = p[:, :, None] * (inner @ table.mT).unflatten(1, (self.dim, self.width))
            else:
                J = (jacobians[-1] * inner[:, None]) @ W[k - 1].mT
            jacobians.append(torch.addcmul(J, gates[k].input[:, :, None], L[k].mT))
        return H + _Congruence.apply(torch.cat(jacobians, dim=2), torch.cat(bends[1:], dim=1))

    def smallest_curvature(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        """The smallest eigenvalue of the Hessian at each row of `x`, (batch,): G is convex there
        if it is positive."""
        H = self.derivatives(x, context).hessian
        assert H is not None
        return torch.linalg.eigvalsh(H)[:, 0]

    @torch.no_grad()
    def project(self) -> None:
        """Move the weights to the nearest for which the potential is convex: W_k >= 0."""
        for W in self.hidden_weights:
            W.clamp_(min=0)


class _Congruence(torch.autograd.Function):
    """J diag(c) J^T of the rows of J (batch, dim, width) and c (batch, width).

    Autograd would make two products backward, one for each J, where by symmetry one is enough.
    """

    @staticmethod
    def forward(ctx: Any, J: Tensor, c: Tensor) -> Tensor:
        ctx.save_for_backward(J, c)
        return (J * c[:, None]) @ J.mT

    @staticmethod
    def backward(ctx: Any, adjoint: Tensor) -> tuple[Tensor, Tensor]:
        J, c = ctx.saved_tensors
        SJ = (adjoint + adjoint.mT) @ J
        return SJ * c[:, None], (SJ * J).sum(1) / 2
