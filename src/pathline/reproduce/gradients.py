"""Gradients by discretize-optimize (DO) and optimize-discretize (OD): errors and memory.

Source: Onken, Ruthotto, Discretize-Optimize vs. Optimize-Discretize, 2020 (arXiv 2005.13420);
Gholami, Keutzer, Biros, ANODE, 2019 (arXiv 1902.10298) on reconstructing the state.
"""

import math
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from ..integrate import odeint
from ..report import Section
from ..train.progress import Reporter
from .experiment import Outcome, RunArguments
from .race import SOURCE, RunFolder, columns

DIM, WIDTH, POINTS, END = 4, 16, 5, 2.0
TOLERANCES = tuple(10.0**-k for k in range(1, 11))
MEMORY_STEPS = 1000


@dataclass(frozen=True)
class Regression:
    """J = mean |u(T) - y|^2 / 2 for u' = W tanh(K u + b) + c, with T = `END`, from random data."""

    theta: tuple[Tensor, ...]  # K (width, dim), b (width,), W (dim, width), c (dim,)
    start: Tensor  # (points, dim)
    target: Tensor  # (points, dim)

    @classmethod
    def random(cls, seed: int, points: int = POINTS) -> "Regression":
        """Of order one, in double precision."""
        generator = torch.Generator().manual_seed(seed)

        def draw(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator, dtype=torch.float64)

        theta = (
            draw(WIDTH, DIM) / DIM**0.5,
            draw(WIDTH),
            draw(DIM, WIDTH) / WIDTH**0.5,
            0.3 * draw(DIM),
        )
        return cls(theta, draw(points, DIM), draw(points, DIM))

    def loss(self, theta: Sequence[Tensor], **how: Any) -> Tensor:
        """J for parameters in place of `theta`, real or complex; `how` is for `odeint`."""
        K, b, W, c = theta

        def velocity(t: Tensor, u: Tensor) -> Tensor:
            return torch.tanh(u @ K.mT + b) @ W.mT + c

        if how.get("gradient") == "adjoint":
            how["adjoint_params"] = theta
        times = torch.tensor([0.0, END], dtype=torch.float64)
        u = odeint(velocity, self.start.to(K.dtype), times, **how)[-1]
        return 0.5 * (u - self.target).square().sum(1).mean()

    def gradient(self, **how: Any) -> Tensor:
        """dJ/dtheta in one row, by the gradient of `odeint`."""
        theta = [part.clone().requires_grad_() for part in self.theta]
        grads = torch.autograd.grad(self.loss(theta, **how), theta)
        return torch.cat([grad.flatten() for grad in grads])

    def differences(self, **how: Any) -> Tensor:
        """dJ/dtheta in one row, by differences in the imaginary direction.

        J is analytic, so Im J(theta + i h e) / h has an error of h^2 and no cancellation: with
        h = 1e-30 it is exact to round-off. The perturbation is too small to change a step size.

        Source: Squire, Trapp, Using complex variables to estimate derivatives, SIAM Review, 1998.
        """
        h = 1e-30
        found = []
        for i, part in enumerate(self.theta):
            for k in range(part.numel()):
                theta = [other.to(torch.complex128) for other in self.theta]
                theta[i].view(-1)[k] += 1j * h
                found.append(self.loss(theta, **how).imag / h)
        return torch.stack(found)


def relative(found: Tensor, exact: Tensor) -> float:
    """|found - exact| / |exact|."""
    return ((found - exact).norm() / exact.norm()).item()


def gradient_errors(seed: int, tolerances: Sequence[float]) -> dict[str, list[float]]:
    """Relative errors of gradients for each tolerance of dopri5.

    "DO" and "OD" are the errors against differences of the loss as it was computed, with its time
    steps; "DO, of the ODE" and "OD, of the ODE" those against the gradient of the equation itself.
    """
    problem = Regression.random(seed)
    limit = problem.gradient(rtol=1e-13, atol=1e-13)
    errors: dict[str, list[float]] = {
        "DO": [],
        "OD": [],
        "DO, of the ODE": [],
        "OD, of the ODE": [],
    }
    with Reporter(len(tolerances), shown=True) as reporter:
        for step, tolerance in enumerate(tolerances, 1):
            how = {"method": "dopri5", "rtol": tolerance, "atol": tolerance}
            exact = problem.differences(**how)
            for name, gradient in (("DO", "discrete"), ("OD", "adjoint")):
                found = problem.gradient(gradient=gradient, **how)
                errors[name].append(relative(found, exact))
                errors[f"{name}, of the ODE"].append(relative(found, limit))
            reporter.update(step, {"tolerance": tolerance, "error of OD": errors["OD"][-1]})
    return errors


def reversals() -> list[tuple[str, float, float, float]]:
    """What integrating backward makes of a contraction, in single precision, RK4, 50 steps.

    Returns:
        (equation, relative error of the u(0) found by going back from u(1), relative errors of
        the gradient of the sum of u(1) by OD and by DO with checkpoints), against DO that keeps
        all.
    """
    generator = torch.Generator().manual_seed(0)
    turn = torch.tensor([[0.6, -0.8], [0.8, 0.6]])
    mixed = turn @ torch.diag(torch.tensor([-1.0, -50.0])) @ turn.mT
    K = 3 * torch.randn(4, 2, generator=generator)
    cases: list[tuple[str, Callable[[Tensor, Tensor], Tensor], Tensor]] = [
        ("u' = -theta u, theta = 50", lambda theta, u: -theta * u, torch.tensor(50.0)),
        ("u' = A u, eigenvalues -1 and -50", lambda A, u: u @ A.mT, mixed),
        ("u' = -K^T tanh(K u), K of order 3", lambda K, u: -torch.tanh(u @ K.mT) @ K, K),
    ]
    times = torch.tensor([0.0, 1.0])
    start = torch.tensor([[1.0, 0.5]])
    rk4: dict[str, Any] = {"method": "rk4", "options": {"step_size": 0.02}}
    rows = []
    for name, f, parameter in cases:
        theta = parameter.clone().requires_grad_()
        velocity = partial(_autonomous, f, theta)
        grads = {}
        for gradient in ("discrete", "checkpoint", "adjoint"):
            own: dict[str, Any] = {"adjoint_params": (theta,)} if gradient == "adjoint" else {}
            end = odeint(velocity, start, times, gradient=gradient, **rk4, **own)[-1]
            (grads[gradient],) = torch.autograd.grad(end.sum(), theta)
        with torch.no_grad():
            back = odeint(velocity, end, times.flip(0), **rk4)[-1]
        exact = grads["discrete"]
        errors = [relative(grads[name], exact) for name in ("adjoint", "checkpoint")]
        rows.append((name, relative(back, start), errors[0], errors[1]))
    return rows


def _autonomous(f: Callable[[Tensor, Tensor], Tensor], theta: Tensor, t: Tensor, u: Tensor) -> Any:
    return f(theta, u)


class PeakMemory(TorchDispatchMode):
    """The largest number of bytes in tensors that were made within and were alive together."""

    def __init__(self) -> None:
        super().__init__()
        self.alive: dict[int, int] = {}  # by storage
        self.total = self.peak = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:  # every operation passes here, those of the backward pass too
        result = func(*args, **(kwargs or {}))
        for x in pytree.tree_leaves(result):
            if isinstance(x, Tensor):
                self._see(x.untyped_storage())
        return result

    def _see(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key in self.alive:
            return
        self.alive[key] = storage.nbytes()
        self.total += storage.nbytes()
        self.peak = max(self.peak, self.total)
        weakref.finalize(storage, self._drop, key)

    def _drop(self, key: int) -> None:
        self.total -= self.alive.pop(key)


def memory(seed: int, steps: int) -> dict[str, int]:
    """Peak bytes of J and its gradient for RK4 with `steps` steps, for each strategy."""
    problem = Regression.random(seed, points=64)
    root = max(2, math.isqrt(steps))
    strategies: dict[str, dict[str, Any]] = {
        "DO, all kept": {"gradient": "discrete"},
        f"DO, {root} checkpoints": {"gradient": "checkpoint", "segments": root},
        "OD": {"gradient": "adjoint"},
    }
    peaks = {}
    for name, how in strategies.items():
        with PeakMemory() as watch:
            problem.gradient(method="rk4", options={"step_size": END / steps}, **how)
        peaks[name] = watch.peak
    return peaks


def run(arguments: RunArguments, size: str) -> Outcome:
    """Errors of gradients over tolerances, reconstruction of contractions, and memory.

    Nothing is trained, and both sizes are the same.
    """
    folder = RunFolder.open("do-vs-od-gradient", arguments, size, iterations=0)
    if folder.done:
        return folder.done
    from ..plots import curves

    errors = gradient_errors(arguments.seed, TOLERANCES)
    contractions, peaks = reversals(), memory(arguments.seed, MEMORY_STEPS)
    details = {
        "tolerances": TOLERANCES,
        "errors": errors,
        "reversals": [
            dict(zip(("equation", "state", "OD", "DO, checkpointed"), row, strict=True))
            for row in contractions
        ],
        "memory": peaks,
    }
    table: list[tuple[str, ...]] = [("tolerance", *errors)]
    table += [
        (f"{tolerance:.0e}", *(f"{error:.1e}" for error in row))
        for tolerance, row in zip(TOLERANCES, zip(*errors.values(), strict=True), strict=True)
    ]
    back: list[tuple[str, ...]] = [
        ("equation, single precision", "state", "gradient by OD", "gradient by DO")
    ]
    back += [(name, *(f"{error:.1e}" for error in row)) for name, *row in contractions]
    kept = [("strategy", "peak, kB")]
    kept += [(name, f"{peak / 1000:,.0f}") for name, peak in peaks.items()]
    figure = curves(
        {name: (TOLERANCES, row) for name, row in errors.items()},
        "tolerance of dopri5",
        "relative error of the gradient",
        "Errors of gradients by DO and OD against the tolerance",
        log=True,
    )
    sections = [
        Section(
            "Errors of gradients",
            "DO and OD: against differences of the loss as it was computed, with its time steps. "
            "DO is exact at every tolerance; OD is the gradient of no loss that was computed, and "
            "is off by about the tolerance. Of the ODE: against the gradient of the equation "
            "itself, from which both are off by about the tolerance.",
            table=table,
            figure=figure,
        ),
        Section(
            "Integrating backward",
            "A contraction forgets where it came from. Relative errors, in single precision with "
            "50 steps of RK4, of the u(0) found by going back from u(1), and of gradients of the "
            "sum of u(1) with respect to theta, A or K. DO has checkpoints here; both are "
            "compared with DO that keeps all.",
            table=back,
        ),
        Section(
            "Memory",
            f"Peak of loss and gradient, {MEMORY_STEPS} steps of RK4, 64 points.",
            table=kept,
        ),
    ]
    worst = max(errors["DO"])
    text = "\n\n".join(columns(part) for part in (table, back, kept))
    text = f"relative errors of gradients\n{text}\nlargest error of DO: {worst:.1e}"
    return folder.finish(
        Outcome(worst, None, SOURCE, text, details), "Gradients by DO and by OD", sections
    )
