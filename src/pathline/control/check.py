"""Is a control problem what its author meant?"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..calculus import gradient
from ..errors import ArgumentError

if TYPE_CHECKING:
    from .problem import Problem

ROWS = 64
STEP = 1e-6  # of the central differences
SLOPES = 1e-4  # relative difference of derivatives, in the median over rows
TRIALS = 20  # perturbations of a control
SLACK = 1e-6  # of the Hamiltonian, relative


@dataclass(frozen=True)
class ProblemCheck:
    """What `problem.check` found: one line for each thing that is wrong."""

    problem: str
    findings: list[str]

    @property
    def passed(self) -> bool:
        """Whether nothing was found."""
        return not self.findings

    @property
    def verdict(self) -> str:
        """The findings in words."""
        if self.passed:
            return f"{self.problem}: shapes fit, derivatives agree, and the feedback minimises"
        return f"{self.problem}: " + "; ".join(self.findings)

    def demand(self) -> None:
        """Raise an `ArgumentError` with the verdict unless the check passed."""
        if not self.passed:
            raise ArgumentError(self.verdict)


def check_problem(problem: "Problem", seed: int = 0) -> ProblemCheck:
    """See `Problem.check`."""
    generator = torch.Generator().manual_seed(seed)
    findings = _attributes(problem) or _starts(problem, generator)
    if not findings:
        z = problem.initial(ROWS, generator).double()
        t = 0.37 * torch.tensor(problem.horizon, dtype=torch.float64)
        u, p = _draw(problem, generator)
        findings = _shapes(problem, t, z, u, p)
        if not findings:
            findings = [
                *_slopes(problem, t, z, u, generator),
                *_minimum(problem, t, z, p, generator),
            ]
    return ProblemCheck(type(problem).__name__, findings)


def _attributes(problem: "Problem") -> list[str]:
    found = []
    for name in ("dim", "control_dim"):
        value = getattr(problem, name, None)
        if not isinstance(value, int) or value < 1:
            found.append(f"`{name}` must be a positive integer, got {value!r}")
    if not (isinstance(problem.horizon, float | int) and 0 < problem.horizon < float("inf")):
        found.append(f"`horizon` must be positive and finite, got {problem.horizon!r}")
    if not found and problem.noise is not None:
        noise = problem.noise
        if not isinstance(noise, Tensor) or noise.ndim != 2 or len(noise) != problem.dim:
            shape = tuple(noise.shape) if isinstance(noise, Tensor) else type(noise).__name__
            found.append(f"`noise` must be a tensor ({problem.dim}, noise_dim), got {shape}")
        elif not bool(torch.isfinite(noise).all()):
            found.append("`noise` must be finite")
    return found


def _starts(problem: "Problem", generator: torch.Generator) -> list[str]:
    try:
        z = problem.initial(ROWS, generator)
        problem.limits(z)
    except ArgumentError as error:
        return [str(error)]
    if not isinstance(z, Tensor) or tuple(z.shape) != (ROWS, problem.dim):
        shape = tuple(z.shape) if isinstance(z, Tensor) else type(z).__name__
        return [f"`initial({ROWS}, generator)` must be ({ROWS}, {problem.dim}), got {shape}"]
    if not bool(torch.isfinite(z).all()):
        return ["`initial` draws states that are not finite"]
    if tuple(problem.nominal().shape) != (problem.dim,):
        return [f"`nominal()` must be ({problem.dim},), got {tuple(problem.nominal().shape)}"]
    return []


def _draw(problem: "Problem", generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Controls within the limits, and costates."""
    u = torch.randn(ROWS, problem.control_dim, generator=generator, dtype=torch.float64)
    p = 3 * torch.randn(ROWS, problem.dim, generator=generator, dtype=torch.float64)
    limits = problem.limits(u)
    return (u if limits is None else u.clamp(*limits)), p


def _shapes(problem: "Problem", t: Tensor, z: Tensor, u: Tensor, p: Tensor) -> list[str]:
    found = []
    calls: list[tuple[str, Callable[[slice], Tensor], tuple[int, ...]]] = [
        ("dynamics", lambda rows: problem.dynamics(t, z[rows], u[rows]), (problem.dim,)),
        ("running_cost", lambda rows: problem.running_cost(t, z[rows], u[rows]), ()),
        ("terminal_cost", lambda rows: problem.terminal_cost(z[rows]), ()),
        ("feedback", lambda rows: problem.feedback(t, z[rows], p[rows]), (problem.control_dim,)),
        ("clearance", lambda rows: problem.clearance(z[rows]), ()),
    ]
    for name, call, shape in calls:
        with torch.no_grad():
            whole = call(slice(None))
            if not isinstance(whole, Tensor) or tuple(whole.shape) != (ROWS, *shape):
                got = tuple(whole.shape) if isinstance(whole, Tensor) else type(whole).__name__
                found.append(f"`{name}` must return {(ROWS, *shape)} for {ROWS} rows, got {got}")
                continue
            if bool(torch.isnan(whole).any()) or (
                name != "clearance" and bool(whole.isinf().any())
            ):
                found.append(f"`{name}` is not finite at a start of the problem")
                continue
            part = call(slice(3, 8))
            if not torch.allclose(part, whole[3:8], rtol=1e-6, atol=1e-9):
                found.append(f"`{name}` of a row depends on the other rows of the batch")
    return found


def _slopes(
    problem: "Problem", t: Tensor, z: Tensor, u: Tensor, generator: torch.Generator
) -> list[str]:
    """Automatic derivatives against central differences, along random directions."""
    weights = torch.randn(problem.dim, generator=generator, dtype=torch.float64)
    functions: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
        "dynamics": lambda z, u: problem.dynamics(t, z, u) @ weights,
        "running_cost": lambda z, u: problem.running_cost(t, z, u),
        "terminal_cost": lambda z, u: problem.terminal_cost(z),
    }
    found = []
    for name, function in functions.items():
        for what, at in (("z", z), ("u", u)):
            if name == "terminal_cost" and what == "u":
                continue

            def along(y: Tensor, what: str = what, function: Callable = function) -> Tensor:
                value: Tensor = function(y, u) if what == "z" else function(z, y)
                return value

            direction = torch.randn(at.shape, generator=generator, dtype=torch.float64)
            point = at.clone().requires_grad_(True)
            automatic = (gradient(along(point), point) * direction).sum(1)
            with torch.no_grad():
                ahead, behind = along(at + STEP * direction), along(at - STEP * direction)
                differences = (ahead - behind) / (2 * STEP)
            scale = differences.abs().median().clamp_min(1e-3)
            error = ((automatic - differences).abs() / scale).median().item()
            if error > SLOPES:
                found.append(
                    f"the automatic derivative of `{name}` with respect to {what} differs from "
                    f"central differences by {100 * error:.2g} %: it must be written in "
                    "differentiable operations of PyTorch, without detach(), item() or NumPy"
                )
    return found


@torch.no_grad()
def _minimum(
    problem: "Problem", t: Tensor, z: Tensor, p: Tensor, generator: torch.Generator
) -> list[str]:
    """Whether any control nearby does better than the feedback."""
    u = problem.feedback(t, z, p)
    limits = problem.limits(u)
    found = []
    if limits is not None and bool(((u < limits[0] - 1e-9) | (u > limits[1] + 1e-9)).any()):
        found.append("`feedback` leaves `control_bounds`")

    def cost(u: Tensor) -> Tensor:
        return problem.running_cost(t, z, u) + (p * problem.dynamics(t, z, u)).sum(1)

    least, worst = cost(u), torch.zeros(())
    for i in range(TRIALS):
        size = 10.0 ** (-3 + 4 * i / (TRIALS - 1))
        noise = torch.randn(u.shape, generator=generator, dtype=torch.float64)
        other = u + size * (1 + u.abs()) * noise
        other = (
            other if limits is None else torch.minimum(torch.maximum(other, limits[0]), limits[1])
        )
        gain = (least - cost(other)) / (1 + least.abs())
        worst = torch.maximum(worst, gain.max())
    if worst > SLACK:
        found.append(
            f"`feedback` does not minimise L + p.f: another control is better by {worst:.2g} of it "
            "(is the sign of p right? u minimises L + p.f with p = grad Phi; is there a minimum?)"
        )
    return found
