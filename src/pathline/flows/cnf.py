"""The family of continuous normalizing flows, as options of one model."""

import copy
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import ArgumentError, ModelError, require_nonnegative
from ..integrate import odeint
from ..nets import (
    FreeVelocity,
    GradientVelocity,
    Potential,
    hutch_plus_plus,
    hutchinson,
    products,
)
from .cnf_objective import CNFObjective
from .flow import INVERSE_TOLERANCE, Flow
from .otflow import OTFlow, feature_scale
from .standardize import Bounds

VELOCITIES = ("free", "potential", "static")
TRACES = ("exact", "probe", "hutch++")
FIXED = ("euler", "midpoint", "heun2", "heun3", "rk4", "rk4_38")
ADAPTIVE = ("dopri5", "tsit5", "bosh3", "dopri8")
GRADIENTS = ("discrete", "checkpoint", "adjoint")
ORDERS = {"euler": 1, "midpoint": 2, "heun2": 2, "heun3": 3}  # of the others: four


@dataclass(frozen=True)
class Solve:
    """Terminal states and what they accumulated, each (batch,); None for what was left out."""

    z: Tensor  # (batch, dim)
    log_det: Tensor | None = None  # log |det dz(stop)/dz(start)|
    transport: Tensor | None = None  # int |v|^2 / 2 dt
    hjb: Tensor | None = None  # int |d_t Phi - |grad Phi|^2 / 2| dt
    jacobian: Tensor | None = None  # int |dv/dz|_F^2 dt


class CNF(Flow):
    """A continuous normalizing flow dz/dt = v(t, z) from data to N(0, I).

    Training minimises, with C the negative log-likelihood::

        E[C + int a_L |v|^2/2 + a_R |d_t Phi - |grad Phi|^2/2| + a_K |dv/dz|_F^2 dt]

    The rows of the family::

        model          velocity   trace   costs      method, gradient
        FFJORD         free       probe              dopri5, adjoint
        RNODE          free       probe   a_L, a_K   rk4, discrete
        MongeAmpere    static     exact              rk4, discrete
        PotentialFlow  potential  exact   a_R        rk4, discrete
        OTFlow         potential  exact   a_L, a_R   rk4, discrete

    The last two are an `OTFlow`, which has the closed form and the compiled kernel. Densities are
    exact in all of them, whatever the trace in training.

    Args:
        dim: number of columns.
        velocity: "free", a network with values (batch, dim); "potential", -grad Phi(z, t);
            "static", -grad Phi(z); or a module `(t, z) -> (batch, dim)`, `(t, z, context)` if
            the flow has a context.
        width, depth: of the network; chosen from `dim` by default.
        context_dim: number of columns of the context of a conditional density; 0 for none.
        trace: of dv/dz in training: "exact", "probe" (Hutchinson's estimate) or "hutch++". Random
            signs are drawn once for each row and solve.
        probes: their number; "hutch++" takes as many products three times.
        transport: weight a_L of the transport cost.
        hjb: weight a_R of the HJB residual, for a velocity "potential".
        jacobian: weight a_K of |dv/dz|_F^2, by the products of the trace.
        method: of `odeint`; with fixed steps one of euler, midpoint, heun2, heun3, rk4, rk4_38,
            or adaptive: dopri5, tsit5, bosh3, dopri8.
        steps: fixed time steps for densities and samples; `fit` chooses it.
        train_steps: fixed time steps in training; training may raise it.
        rtol, atol: tolerances of an adaptive method.
        gradient: "discrete" (discretize, then optimize), "checkpoint" (the same in less memory)
            or "adjoint" (optimize, then discretize).
        standardize: let `fit` set the affine coordinates in which the flow works.
        support: (lower, upper) of each column, None where free; None if all are free.
        generator: source of the initial weights; torch's global one by default.

    Raises:
        ArgumentError: an argument is out of range, or two do not fit.

    Source: Grathwohl et al., FFJORD (arXiv 1810.01367); Finlay et al., RNODE (2002.02798); Zhang,
    E, Wang, Monge-Ampere flow (1809.10188); Yang, Karniadakis, Potential flow generator
    (1908.11462); Onken et al., OT-Flow (2006.00104).

    Example:
        >>> flow = CNF(dim=2, trace="probe", jacobian=0.01)
        >>> flow.log_prob(flow.sample(5, seed=0)).shape
        torch.Size([5])
    """

    def __init__(
        self,
        dim: int,
        *,
        velocity: str | nn.Module = "free",
        width: int | None = None,
        depth: int | None = None,
        context_dim: int = 0,
        trace: str = "exact",
        probes: int = 1,
        transport: float = 0.0,
        hjb: float = 0.0,
        jacobian: float = 0.0,
        method: str = "rk4",
        steps: int = 16,
        train_steps: int = 4,
        rtol: float = 1e-5,
        atol: float = 1e-5,
        gradient: str = "discrete",
        standardize: bool = True,
        support: Sequence[Bounds] | None = None,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__(
            dim,
            context_dim,
            steps=steps,
            train_steps=train_steps,
            standardize=standardize,
            support=support,
        )
        for name, got, known in (
            ("trace", trace, TRACES),
            ("method", method, FIXED + ADAPTIVE),
            ("gradient", gradient, GRADIENTS),
            ("velocity", velocity, VELOCITIES),
        ):
            if got not in known and not isinstance(got, nn.Module):
                raise ArgumentError(f"`{name}` must be one of {', '.join(known)}, got {got!r}")
        require_nonnegative(transport=transport, hjb=hjb, jacobian=jacobian)
        for name, bound in (("rtol", rtol), ("atol", atol)):
            if not (math.isfinite(bound) and bound > 0):
                raise ArgumentError(f"`{name}` must be finite and > 0, got {bound!r}")
        if hjb and velocity != "potential":
            raise ArgumentError(
                f"`hjb` is the residual of a potential in time; it needs velocity='potential', "
                f"got {velocity!r}"
            )
        most = dim if trace == "hutch++" else 10_000
        if not isinstance(probes, int) or not 1 <= probes <= most:
            raise ArgumentError(f"`probes` must be an integer from 1 to {most}, got {probes!r}")
        self.kind = velocity if isinstance(velocity, str) else "own"
        self.network = self._network(velocity, width, depth, generator)
        self.trace, self.probes = trace, probes
        self.transport, self.hjb, self.jacobian = float(transport), float(hjb), float(jacobian)
        self.method, self.gradient = method, gradient
        self.rtol, self.atol = float(rtol), float(atol)

    def _network(
        self,
        velocity: str | nn.Module,
        width: int | None,
        depth: int | None,
        generator: torch.Generator | None,
    ) -> nn.Module:
        if isinstance(velocity, nn.Module):
            return velocity
        few = self.dim <= 3
        if velocity == "free":
            width, depth = width or (64 if self.dim <= 12 else 128), depth or (3 if few else 2)
            return FreeVelocity(self.dim, width, depth, self.context_dim, generator=generator)
        width, depth = width or (32 if few else 64), depth or (3 if few else 2)
        potential = Potential(
            self.dim, width, depth, context_dim=self.context_dim, generator=generator
        )
        potential.hold_constant()
        return GradientVelocity(potential, static=velocity == "static")

    @property
    def adaptive(self) -> bool:
        """Whether the method chooses its own time steps."""
        return self.method in ADAPTIVE

    def config(self) -> dict[str, Any]:
        """The arguments that build this flow again, JSON-safe.

        Raises:
            ModelError: the velocity is a module of the user's own.
        """
        if not isinstance(self.network, FreeVelocity | GradientVelocity):
            raise ModelError(
                "a CNF with a `velocity` of your own can't be described in a file; save its "
                "`state_dict()` and build it again"
            )
        net = self.network if isinstance(self.network, FreeVelocity) else self.network.potential
        names = (
            *("trace", "probes", "transport", "hjb", "jacobian", "method", "rtol", "atol"),
            "gradient",
        )
        return (
            super().config()
            | {"velocity": self.kind, "width": net.width, "depth": net.depth}
            | {name: getattr(self, name) for name in names}
        )

    def objective(self) -> CNFObjective:
        """What `fit` minimises: likelihood and the weighted costs."""
        return CNFObjective(self)

    def velocity(self, t: Tensor, z: Tensor, features: Tensor | None = None) -> Tensor:
        """dz/dt at time `t`, () or (batch,), and standardised points `z` (batch, dim)."""
        return self.network(t, z) if features is None else self.network(t, z, features)

    def move(
        self,
        z: Tensor,
        features: Tensor | None,
        *,
        start: float = 0.0,
        stop: float = 1.0,
        log_det: bool = True,
    ) -> tuple[Tensor, Tensor | None]:
        found = self.solve(z, features, start=start, stop=stop, wanted=("log_det",) * log_det)
        return found.z, found.log_det

    @property
    def signs(self) -> int:
        """How many vectors of random signs the trace of a solve takes for each row."""
        return {"exact": 0, "probe": 1, "hutch++": 2}[self.trace] * self.probes

    def solve(
        self,
        z: Tensor,
        features: Tensor | None = None,
        *,
        start: float = 0.0,
        stop: float = 1.0,
        steps: int | None = None,
        signs: Tensor | None = None,
        wanted: Sequence[str] = ("log_det", "transport"),
    ) -> Solve:
        """Move standardised points `z` (batch, dim) and integrate what is `wanted` of "log_det",
        "transport", "hjb" and "jacobian", with exact traces or with random `signs`,
        (signs, batch, dim)."""
        times = self._times(z, start, stop, self.steps if steps is None else steps)

        def velocity(t: Tensor, z: Tensor) -> Tensor:
            return self.velocity(t, z, features)

        def rates(t: Tensor, z: Tensor, dz: Tensor) -> dict[str, Tensor]:
            return self._rates(t, z, dz, features, signs, wanted)

        options = self._options()
        if not wanted:
            return Solve(odeint(velocity, z, times, **options)[-1])
        if self.gradient == "adjoint" and torch.is_grad_enabled():

            def augmented(t: Tensor, state: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
                dz = velocity(t, state[0])
                return dz, *rates(t, state[0], dz).values()

            sums = (z.new_zeros(len(z)) for _ in wanted)
            path, *totals = odeint(augmented, (z, *sums), times, **options)
            integrals = dict(zip(wanted, totals, strict=True))
        else:
            path, integrals = odeint(velocity, z, times, quadrature=rates, **options)
        return Solve(path[-1], **{name: values[-1] for name, values in integrals.items()})

    def _options(self) -> dict[str, Any]:
        """Of `odeint`."""
        gradient = self.gradient if torch.is_grad_enabled() else "discrete"
        tolerances = {"rtol": self.rtol, "atol": self.atol} if self.adaptive else {}
        return {"method": self.method, "gradient": gradient} | tolerances

    def _times(self, z: Tensor, start: float, stop: float, steps: int) -> Tensor:
        count = 1 if self.adaptive else steps
        return torch.linspace(start, stop, count + 1, dtype=z.dtype, device=z.device)

    def _rates(
        self,
        t: Tensor,
        z: Tensor,
        dz: Tensor,
        features: Tensor | None,
        signs: Tensor | None,
        wanted: Sequence[str],
    ) -> dict[str, Tensor]:
        found: dict[str, Tensor] = {}
        if "transport" in wanted:
            found["transport"] = 0.5 * dz.square().sum(1)
        network = self.network
        closed = signs is None or (self.trace == "probe" and self.probes == 1)
        if isinstance(network, GradientVelocity) and (closed or "hjb" in wanted):
            phi = network.potential.derivatives(
                *(z, network.clock(t), features),
                value=False,
                laplacian=closed,
                probe=signs[0] if closed and signs is not None else None,
            )
            assert phi.grad is not None and phi.dt is not None
            if "hjb" in wanted:
                found["hjb"] = (phi.dt - 0.5 * phi.grad.square().sum(1)).abs()
            if phi.laplacian is not None:
                found["log_det"] = -phi.laplacian
        if "jacobian" not in wanted and "log_det" in found:
            return {name: found[name] for name in wanted}

        def apply(vectors: Tensor | None) -> Tensor:
            return products(network, t, z, vectors, features)

        if signs is None:
            columns = apply(None)
            log_det = columns.diagonal(dim1=0, dim2=2).sum(1)
            norm = columns.square().sum((0, 2))
        elif self.trace == "probe":
            columns = apply(signs)
            log_det, norm = hutchinson(columns, signs), columns.square().sum(2).mean(0)
        else:
            sketch, probes = signs.chunk(2)
            log_det = hutch_plus_plus(apply, sketch, probes)
            norm = apply(probes).square().sum(2).mean(0) if "jacobian" in wanted else log_det
        found.setdefault("log_det", log_det)
        found["jacobian"] = norm
        return {name: found[name] for name in wanted}

    def trajectory(
        self, x: Tensor, steps: int | None = None, context: Tensor | None = None
    ) -> Tensor:
        z, features, _ = self.coordinates(self._input(x), self._context(context, len(x)))
        steps = self.steps if steps is None else steps
        times = torch.linspace(0.0, 1.0, steps + 1, dtype=z.dtype, device=z.device)
        return odeint(lambda t, z: self.velocity(t, z, features), z, times, **self._options())

    def costs(self, x: Tensor, context: Tensor | None = None) -> dict[str, float]:
        """Means over the rows of `x` of the transport cost, the squared Frobenius norm of dv/dz
        and, of a potential, the HJB residual, each integrated in time, in standardised units."""
        wanted = ("transport", "jacobian", *(("hjb",) if self.kind == "potential" else ()))
        with torch.no_grad():
            y, features, _ = self.coordinates(self._input(x), self._context(context, len(x)))
            found = self.solve(y, features, wanted=wanted)
        return {name: getattr(found, name).mean().item() for name in wanted}

    def initialise(self, inputs: Tensor, generator: torch.Generator) -> None:
        """Start a potential from random features of the data."""
        if isinstance(self.network, GradientVelocity):
            self.network.potential.random_features(
                inputs, feature_scale(inputs.shape[1]), generator
            )

    @property
    def richardson(self) -> float:  # type: ignore[override]
        """The error, over the change of a result with twice the steps."""
        order = ORDERS.get(self.method, 4)
        return 1.0 if self.adaptive else 2**order / (2**order - 1)

    @property
    def grid(self) -> str:
        """The time grid of densities and samples, in words."""
        return f"{self.method}, tolerance {self.rtol:.0e}" if self.adaptive else super().grid

    @contextmanager
    def refined(self, factor: int) -> Iterator[str]:
        """Within, the flow has `factor` times its time steps, or a tolerance of a hundredth; gives
        what changed, in words."""
        if not self.adaptive:
            with super().refined(factor) as words:
                yield words
            return
        before = self.rtol, self.atol
        self.rtol, self.atol = self.rtol / 100, self.atol / 100
        try:
            yield f"a tolerance of {self.rtol:.0e} instead of {before[0]:.0e}"
        finally:
            self.rtol, self.atol = before

    @torch.no_grad()
    def choose_steps(
        self,
        x: Tensor,
        context: Tensor | None = None,
        *,
        tolerance: float = 1e-3,
        most: int = 128,
    ) -> float:
        """As `Flow.choose_steps`; an adaptive method gets tolerances, each a tenth of the one
        before, until log-densities and inverse are as right."""
        if not self.adaptive:
            return super().choose_steps(x, context, tolerance=tolerance, most=most)
        exact = copy.deepcopy(self).double()
        while True:
            error = exact.log_prob(x, context, return_error=True)[1].mean().item()
            right = error <= tolerance and exact.inverse_error(x, context) < INVERSE_TOLERANCE
            if right or min(exact.rtol, exact.atol) < 1e-9:
                break
            exact.rtol, exact.atol = exact.rtol / 10, exact.atol / 10
        self.rtol, self.atol = exact.rtol, exact.atol
        return error

    def chunk_rows(self) -> int:
        widest = max(p.shape[0] for p in self.parameters())
        return min(max(2**19 // (widest * self.dim), 64), 8192)


def FFJORD(dim: int, **options: Any) -> CNF:
    """Free-form flow with one probe, adaptive steps and the continuous adjoint (1810.01367)."""
    return _preset(
        dim, options, velocity="free", trace="probe", method="dopri5", gradient="adjoint"
    )


def RNODE(dim: int, **options: Any) -> CNF:
    """Free flow with transport and Jacobian costs on fixed time steps (2002.02798)."""
    return _preset(dim, options, velocity="free", trace="probe", transport=0.01, jacobian=0.01)


def MongeAmpere(dim: int, **options: Any) -> CNF:
    """Gradient flow of a potential that does not depend on time (1809.10188)."""
    return _preset(dim, options, velocity="static")


def PotentialFlow(dim: int, **options: Any) -> OTFlow:
    """Gradient flow of a potential with the HJB residual as its only cost (1908.11462)."""
    return OTFlow(dim, **{"transport": 0.0} | options)


def _preset(dim: int, options: dict[str, Any], **defaults: Any) -> CNF:
    return CNF(dim, **defaults | options)


FAMILY: dict[str, Callable[..., Flow]] = {
    "ot-flow": OTFlow,
    "potential-flow": PotentialFlow,
    "monge-ampere": MongeAmpere,
    "rnode": RNODE,
    "ffjord": FFJORD,
}
