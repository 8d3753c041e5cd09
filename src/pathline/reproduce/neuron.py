"""The neuron under deep brain stimulation: feedback beside none, and beside its own replay."""

from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
from scipy.integrate import solve_ivp

from ..control import Policy, Problem
from ..control.problems.neuron import DURATION, healthy
from ..errors import SolveError
from ..plots import curves
from ..report import Section
from .control import NEURONS, solve_named
from .experiment import Outcome, RunArguments
from .race import RunFolder, columns

STARTS = (-40.0, -20.0, 0.0, 20.0, 40.0)  # mV; training sees a standard deviation of 10
SHOCK, SHOCKED_AT = (20.0, -0.1, -0.1, 0.1), 2.0  # added to (V, m, n, h), ms; as published
STEPS = 3000  # of the policy
LONGEST = 0.05  # step of the replay, ms
# From xi = 0; costs of the released policy from -20 and 20 mV are 62 742 and 51 746.
PUBLISHED = {-20.0: 62_742.0, 0.0: 47_180.0, 20.0: 51_746.0}


@dataclass(frozen=True)
class Flight:
    """What currents that are functions of time alone lead to."""

    cost: float
    times: np.ndarray
    potential: np.ndarray  # mV


def replay(problem: Problem, xi: float, controls: np.ndarray, *, shock: bool = False) -> Flight:
    """Integrate from (xi, 0, 0, 0) under currents (steps,), each of the beginning of an equal step
    and linear in between, by the stiff method LSODA: an explicit one overflows far from the
    healthy path."""
    healthy()  # itself by LSODA, which can't be nested
    known_at = np.linspace(0, problem.horizon, len(controls), endpoint=False)

    def velocity(t: float, state: np.ndarray) -> np.ndarray:
        at, z = torch.tensor(t, dtype=torch.float64), torch.from_numpy(state[None, :4])
        current = torch.tensor([[np.interp(t, known_at, controls)]], dtype=torch.float64)
        rate = problem.dynamics(at, z, current)[0]
        return np.append(rate.numpy(), problem.running_cost(at, z, current).item())

    state = np.array([xi, 0.0, 0.0, 0.0, 0.0])
    edges = (0.0, SHOCKED_AT, problem.horizon) if shock else (0.0, problem.horizon)
    times, potential = [], []
    for begin, end in pairwise(edges):
        if begin > 0:
            state[:4] += SHOCK
        found = solve_ivp(
            velocity, (begin, end), state, "LSODA", rtol=1e-7, atol=1e-7, max_step=LONGEST
        )
        if not found.success:
            raise SolveError(f"the replay from {xi:g} mV failed at {found.t[-1]:g} ms")
        times.append(found.t)
        potential.append(found.y[0])
        state = found.y[:, -1].copy()
    terminal = problem.terminal_cost(torch.from_numpy(state[None, :4])).item()
    return Flight(state[4] + terminal, np.concatenate(times), np.concatenate(potential))


def run(arguments: RunArguments, size: str) -> Outcome:
    """Costs of the policy, of no stimulation, and of the policy's currents from zero replayed
    without feedback: from several potentials, and after a shock. The measured figure is the cost of
    the policy over that of no stimulation, from zero."""
    folder = RunFolder.open("neuron-feedback", arguments, size)
    if folder.done:
        return folder.done
    policy, _ = solve_named("neuron", arguments.part("policy"), size)
    assert isinstance(policy, Policy)
    problem, kick = policy.problem, {SHOCKED_AT: torch.tensor(SHOCK)}
    recorded = policy.simulate(steps=STEPS).controls[:, 0, 0].double().numpy()
    none = np.zeros_like(recorded)
    rows, costs = [["start", "policy", "published policy", "no stimulation", "replay"]], {}
    for xi in STARTS:
        mine = policy.simulate(torch.tensor([xi, 0.0, 0.0, 0.0]), steps=STEPS).cost.item()
        blind = [replay(problem, xi, u).cost for u in (none, recorded)]
        costs[f"{xi:g}"] = dict(zip(("policy", "none", "replay"), (mine, *blind), strict=True))
        published = f"{PUBLISHED[xi]:,.0f}" if xi in PUBLISHED else ""
        rows.append([f"{xi:g} mV", f"{mine:,.0f}", published, *(f"{cost:,.0f}" for cost in blind)])
    shocked = policy.simulate(steps=STEPS, shocks=kick)
    rest, open_loop = (replay(problem, 0.0, u, shock=True) for u in (none, recorded))
    found = shocked.cost.item(), rest.cost, open_loop.cost
    costs["shock"] = dict(zip(("policy", "none", "replay"), found, strict=True))
    rows.append(["0 mV, shock", f"{found[0]:,.0f}", "", f"{found[1]:,.0f}", f"{found[2]:,.0f}"])
    told = (
        "Costs from (xi, 0, 0, 0). The replay repeats the currents of the policy from 0 mV "
        f"without looking. The shock adds {SHOCK} to (V, m, n, h) after {SHOCKED_AT:g} ms."
    )
    values, _ = healthy()
    lines = {
        "policy": (shocked.times.numpy(), shocked.states[:, 0, 0].numpy()),
        "replay": (open_loop.times, open_loop.potential),
        "healthy neuron": (np.linspace(0, DURATION, len(values)), values[:, 0].numpy()),
        "no stimulation": (rest.times, rest.potential),
    }
    figure = curves(lines, "time, ms", "potential, mV", "Potentials after a shock at 2 ms")
    sections = [Section("With and without feedback", told, table=rows), Section("", figure=figure)]
    ratio = costs["0"]["policy"] / costs["0"]["none"]
    text = f"{columns(rows)}\n{told}\npolicy over no stimulation, from 0 mV: {ratio:.4f}"
    outcome = Outcome(ratio, PUBLISHED[0.0] / 3.399e6, NEURONS, text, {"costs": costs})
    return folder.write(outcome, "A neuron with and without feedback", sections)
