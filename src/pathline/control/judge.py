"""Can a policy be trusted?"""

import statistics
import time
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from ..calculus import gradient
from ..errors import ShapeError
from .rollout import Rollout, brownian, rollout

if TYPE_CHECKING:
    from .policy import Policy
    from .problem import Problem

STARTS = 256
SHOCKED = 64  # paths for each size
SIZES = (0.0, 0.01, 0.03, 0.1, 0.2, 0.3)  # of a shock, over the scale of the states
QUERIES = 200
QUADRATURES = 4  # rows where an exact value is a quadrature that takes a second
TIME_TOLERANCE = 0.01  # change of the cost on twice the time steps, relative
VALUE_TOLERANCE, CONTROL_TOLERANCE = 0.02, 0.05  # against exact ones, relative
RESIDUAL_TOLERANCE = 0.5  # HJB residual and terminal error, over the cost
COLLISIONS = 0.01  # share of paths
ROOM = 1 / 6  # of the nominal clearance: from closer to a forbidden state no way may lead out
ERRORS = 3.0  # standard errors that are taken as chance


@dataclass(frozen=True)
class PolicyCheck:
    """What `policy.check` found, with its verdict in words.

    Costs are those of the problem's `evaluation`, with noise where it has some: means over starts
    that training did not see, and from the nominal start, each also on twice the time steps. The
    HJB residual and the terminal error |Phi(T, z_T) - G(z_T)| are means along the same paths, over
    the mean size of the cost; Phi is the cost of its own paths where they vanish, and the optimal
    one where the residual does everywhere.
    """

    problem: str
    starts: int
    steps: int
    cost: float
    cost_error: float  # standard error of the mean
    cost_fine: float  # on twice the time steps
    nominal_cost: float
    nominal_error: float  # standard error; 0 without noise
    nominal_fine: float
    nominal_value: float  # Phi(0, nominal start)
    value_error: float | None  # relative to the exact value; None if that is not known
    control_error: float | None
    hjb: float
    terminal_error: float
    collisions: float | None  # share of the paths that begin with a sixth of the nominal clearance
    clearance: float | None  # the least of those; None if all states are allowed
    nominal_clearance: float | None
    shock_sizes: list[float]  # over the scale of the states
    shock_costs: list[float]  # mean from the nominal start with a shock at a third of the time
    shock_worst: list[float]
    milliseconds: float  # of one control, on one thread
    passed: bool
    verdict: str

    def to_dict(self) -> dict[str, Any]:
        """The fields, JSON-safe."""
        return asdict(self)


@dataclass(frozen=True)
class _Paths:
    """By the problem that judges, (batch,) each."""

    cost: Tensor
    clearance: Tensor
    states: Tensor  # (steps + 1, batch, dim)


@torch.no_grad()
def check_policy(policy: "Policy", starts: Tensor | None = None, seed: int = 0) -> PolicyCheck:
    """See `Policy.check`.

    Args:
        policy: what to judge.
        starts: (batch, dim); 256 drawn by the problem, other than in training, by default.
        seed: of starts, noise and shocks.

    Raises:
        ShapeError: `starts` has another shape.
    """
    problem, rng = policy.problem, np.random.default_rng((seed, 2))  # others than in training
    if starts is None:
        generator = torch.Generator().manual_seed(int(rng.integers(2**62)))
        starts = problem.initial(STARTS, generator)
    if starts.ndim != 2 or starts.shape[1] != problem.dim or not len(starts):
        raise ShapeError(f"`starts` must be (batch, {problem.dim}), got {tuple(starts.shape)}")
    x = starts.to(policy.like)
    nominal = problem.nominal().to(x)[None]
    copies = nominal if problem.noise is None else nominal.expand(len(x), -1)
    coarse, fine = _both(policy, x, rng)
    one, one_fine = _both(policy, copies, rng)
    exact = _against_exact(policy, coarse.states)
    hjb, terminal_error = _residuals(policy, x, rng)
    shocks = _shocks(policy, nominal[0], rng)
    clear = problem.clearance(x) >= ROOM * problem.clearance(nominal)
    bounded = bool(torch.isfinite(one_fine.clearance).all())
    found: dict[str, Any] = {
        "problem": problem.name,
        "starts": len(x),
        "steps": policy.steps,
        "cost": coarse.cost.mean().item(),
        "cost_error": _error(coarse.cost),
        "cost_fine": fine.cost.mean().item(),
        "nominal_cost": one.cost.mean().item(),
        "nominal_error": _error(one.cost),
        "nominal_fine": one_fine.cost.mean().item(),
        "nominal_value": policy.value(0.0, nominal[0]).item(),
        "value_error": exact[0],
        "control_error": exact[1],
        "hjb": hjb,
        "terminal_error": terminal_error,
        "collisions": None,
        "clearance": None,
        "nominal_clearance": one_fine.clearance.min().item() if bounded else None,
        "shock_sizes": list(SIZES),
        "shock_costs": shocks.mean(1).tolist(),
        "shock_worst": shocks.amax(1).tolist(),
        "milliseconds": _milliseconds(policy, nominal[0]),
    }
    if bounded and bool(clear.any()):
        found["collisions"] = (fine.clearance[clear] < 0).double().mean().item()
        found["clearance"] = fine.clearance[clear].min().item()
    chance = [ERRORS * _error(b.cost - a.cost) for a, b in ((coarse, fine), (one, one_fine))]
    if problem.noise is None:
        chance = [0.0, 0.0]
    findings = _findings(found, chance)
    passed = all(good for good, _ in findings)
    return PolicyCheck(
        **found,
        passed=passed,
        verdict=f"{problem.name}: {'passed' if passed else 'NOT passed'}: "
        + "; ".join(text for _, text in findings),
    )


def _findings(found: dict[str, Any], chance: list[float]) -> list[tuple[bool, str]]:
    """Each with whether it is good."""
    costs = [found[key] for key in ("cost", "cost_fine", "nominal_cost", "nominal_fine")]
    if not np.isfinite(costs).all():
        return [(False, "the closed loop is NOT stable: a cost is not finite")]
    findings = []
    changes = np.abs([costs[1] - costs[0], costs[3] - costs[2]])
    allowed = np.maximum(chance, TIME_TOLERANCE * np.abs([costs[1], costs[3]]))
    resolved = bool((changes <= allowed).all())
    most = 100 * np.max(changes / np.maximum(np.abs([costs[1], costs[3]]), 1e-12))
    findings.append((
        resolved,
        f"{'resolved' if resolved else 'NOT resolved'} in time (twice as many steps change the "
        f"cost by {most:.3g} %)",
    ))  # fmt: skip
    for what, limit in (("value", VALUE_TOLERANCE), ("control", CONTROL_TOLERANCE)):
        error = found[f"{what}_error"]
        if error is not None:
            good = error <= limit
            off = "is" if good else "is NOT exact: it is"
            findings.append((good, f"the {what} {off} {100 * error:.3g} % off the exact one"))
    for key, what in (("hjb", "HJB residual"), ("terminal_error", "terminal error of Phi")):
        good = found[key] <= RESIDUAL_TOLERANCE
        size = "" if good else "TOO LARGE, "
        findings.append((good, f"{what} {size}{100 * found[key]:.3g} % of the cost"))
    if found["collisions"] is not None:
        good = found["collisions"] <= COLLISIONS
        findings.append((
            good,
            f"{100 * found['collisions']:.3g} % of the paths enter forbidden states"
            + ("" if good else f", which is MORE than {100 * COLLISIONS:g} %"),
        ))  # fmt: skip
    if found["nominal_clearance"] is not None and found["nominal_clearance"] < 0:
        findings.append((False, "so does a path from the nominal start"))
    stable = bool(np.isfinite(found["shock_worst"]).all())
    findings.append((
        stable,
        f"a shock of {SIZES[-1]:g} of the states' scale raises the cost from "
        f"{found['shock_costs'][0]:.5g} to {found['shock_costs'][-1]:.5g} on average"
        if stable
        else "a shock makes the closed loop UNSTABLE",
    ))  # fmt: skip
    return findings


def _error(x: Tensor) -> float:
    """Standard error of the mean; 0 for one row."""
    return (x.std() / len(x) ** 0.5).item() if len(x) > 1 else 0.0


def _both(policy: "Policy", x: Tensor, rng: np.random.Generator) -> tuple[_Paths, _Paths]:
    """Paths on the policy's time steps and on twice as many, driven by the same noise."""
    problem, times = policy.problem.evaluation(), policy.times(2 * policy.steps)
    fine = brownian(problem, times, len(x), rng)
    coarse = None if fine is None else fine[::2] + fine[1::2]
    return (
        _follow(policy, problem, x, times[::2], coarse),
        _follow(policy, problem, x, times, fine),
    )


def _follow(
    policy: "Policy", problem: "Problem", x: Tensor, times: Tensor, increments: Tensor | None
) -> _Paths:
    path = _roll(policy, problem, x, times, increments)
    assert path.running_cost is not None and path.trajectory is not None
    clearance = torch.stack([problem.clearance(z) for z in path.trajectory]).amin(0)
    return _Paths(path.running_cost + problem.terminal_cost(path.z), clearance, path.trajectory)


def _roll(
    policy: "Policy", problem: "Problem", x: Tensor, times: Tensor, increments: Tensor | None
) -> Rollout:
    return rollout(
        problem, policy.potential, x, steps=times, density=False, trajectory=True,
        increments=increments,
    )  # fmt: skip


def _residuals(policy: "Policy", x: Tensor, rng: np.random.Generator) -> tuple[float, float]:
    """HJB residual and terminal error over the cost, of the problem that Phi was trained on, which
    may have margins."""
    problem, times = policy.problem, policy.times(2 * policy.steps)
    path = _roll(policy, problem, x, times, brownian(problem, times, len(x), rng))
    assert path.running_cost is not None and path.hjb is not None
    G = problem.terminal_cost(path.z)
    cost = (path.running_cost + G).abs().mean().clamp_min(1e-12)
    gap = (policy.value(problem.horizon, path.z) - G).abs()
    return (path.hjb.mean() / cost).item(), (gap.mean() / cost).item()


def _against_exact(policy: "Policy", states: Tensor) -> tuple[float | None, float | None]:
    """Relative errors of value and control along paths (steps + 1, batch, dim), in the root mean
    square; of the control only if the exact value can be differentiated."""
    exact_value = getattr(policy.problem, "exact_value", None)
    if exact_value is None:
        return None, None
    sums = np.zeros(4)
    for share in (0.0, 0.25, 0.5, 0.75):
        n = round(share * policy.steps)
        t = policy.times()[n]
        with torch.enable_grad():
            z = states[n].double().requires_grad_(True)
            value = exact_value(t, z[:QUADRATURES])
            smooth = value.requires_grad
            if smooth:
                value = exact_value(t, z)
                u = policy.problem.feedback(t, z, gradient(value, z)).detach()
        ours = policy.value(t, states[n][: len(value)]).double()
        sums[:2] += (ours - value).square().mean().item(), value.square().mean().item()
        if smooth:
            own = policy.control(t, states[n]).double()
            sums[2:] += (own - u).square().mean().item(), u.square().mean().item()
    value_error, control_error = np.sqrt(sums[::2] / np.maximum(sums[1::2], 1e-300)).tolist()
    return value_error, control_error if sums[3] else None


def _shocks(policy: "Policy", nominal: Tensor, rng: np.random.Generator) -> Tensor:
    """Costs (sizes, paths) from the nominal start with a shock at a third of the time, in the same
    random directions for all sizes; without noise."""
    draws = torch.from_numpy(rng.standard_normal((SHOCKED, len(nominal)))).to(nominal)
    directions = draws / draws.square().mean(1, keepdim=True).sqrt() * policy.potential.scale
    x, third = nominal.expand(SHOCKED, -1), policy.problem.horizon / 3
    return torch.stack([
        policy.simulate(x, shocks={third: size * directions}).cost for size in SIZES
    ])  # fmt: skip


def _milliseconds(policy: "Policy", z: Tensor) -> float:
    """Of a control for one state, the median of 200 on one thread."""
    threads, took = torch.get_num_threads(), []
    torch.set_num_threads(1)
    try:
        for _ in range(QUERIES):
            begin = time.perf_counter()
            policy.control(0.0, z)
            took.append(time.perf_counter() - begin)
    finally:
        torch.set_num_threads(threads)
    return 1000 * statistics.median(took)
