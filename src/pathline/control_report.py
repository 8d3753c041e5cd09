"""The report of a policy: what its paths cost, and how that stands up to shocks and a baseline."""

import json
import math
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .control import Policy, Problem, Simulation, transcribe
from .control.judge import check_policy
from .control.problems import Agents, Quadcopter
from .errors import ModelError
from .models import load
from .report import Section, configuration_section, write_report
from .train.files import read_json, write_atomically, write_json

KIND = "control"
ANIMATION, OPEN_LOOP = "animation.gif", "open_loop.npz"  # in the folder of a run
STEPS = 50  # of the open-loop baseline
NOISY = 30  # paths of a problem with noise in pictures
AVERAGED = 512  # paths for the value along the way
GRID = 240  # points a side of a picture of obstacles


def finish_control(
    policy: Policy, out: Path, *, baseline: bool = True, ppo: int | None = None, seed: int = 0
) -> dict[str, Any]:
    """Judge the policy of a finished run, and add what is found to its folder.

    Adds the check and the baseline to metrics.json, and writes report.html and, for agents and the
    quadcopter, animation.gif.

    Args:
        policy: what `control.solve` returned.
        out: the folder that it wrote.
        baseline: compare with an open-loop solution from the nominal start, which takes time; there
            is none where there is noise.
        ppo: evaluations of the dynamics for a policy that PPO trains, to compare with; none if
            None.
        seed: of starts, noise, shocks and the baselines.

    Returns:
        The metrics.
    """
    problem = policy.problem
    metrics = read_json(out / "metrics.json")
    metrics |= {
        "problem": problem.name,
        "check": check_policy(policy, seed=seed).to_dict(),
        "baseline": _baseline(policy, out, seed) if baseline and problem.noise is None else None,
        "ppo": None if ppo is None else _reinforced(policy, out, ppo, seed),
        "report": {"kind": KIND, "title": f"Policy for {problem.name}", "seed": seed},
    }
    if metrics["baseline"] is None:
        (out / OPEN_LOOP).unlink(missing_ok=True)
    write_json(out / "metrics.json", metrics)
    write_control_report(out, policy)
    return metrics


def write_control_report(run: Path, policy: Policy | None = None) -> None:
    """Write report.html, and the animation, from what is in the folder of a run.

    Args:
        run: the folder.
        policy: the one in it; read from there by default.

    Raises:
        ModelError: the folder holds no finished run of a control problem.
    """
    metrics, history = read_run(run, KIND, "control problem")
    head = metrics["report"]
    policy = load(run) if policy is None else policy
    assert policy is not None
    path, opened = _nominal(policy, head["seed"]), _open_loop(run)
    sections = [
        _summary(policy, metrics),
        *_ways(policy, path, opened, run),
        *_courses(policy, path, opened),
        *_race(metrics.get("ppo")),
        _shocks(metrics["check"]),
        _value(policy, head["seed"]),
        training_section(history, metrics),
        configuration_section(read_json(run / "config.json")),
    ]
    write_report(run / "report.html", head["title"], sections)


def read_run(run: Path, kind: str, what: str) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Metrics and log of a finished run of that kind.

    Raises:
        ModelError: the folder holds none.
    """
    metrics = read_json(run / "metrics.json")
    if metrics.get("report", {}).get("kind") != kind:
        raise ModelError(f"{run} holds no finished run of a {what}")
    return metrics, read_log(run)


def read_log(run: Path) -> list[dict[str, Any]]:
    """The entries of log.jsonl."""
    lines = (run / "log.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def _nominal(policy: Policy, seed: int) -> Simulation:
    """From the nominal start; several paths where there is noise."""
    return policy.simulate() if policy.problem.noise is None else _noisy(policy, NOISY, seed)


def _noisy(policy: Policy, count: int, seed: int) -> Simulation:
    x = policy.problem.nominal().expand(count, -1)
    return policy.simulate(x, noise_seed=seed)


def _baseline(policy: Policy, out: Path, seed: int) -> dict[str, Any] | None:
    """An open-loop solution from the nominal start, kept in the folder; None if none is found."""
    problem, path = policy.problem, policy.simulate()
    middles = (torch.arange(STEPS) + 0.5) * (problem.horizon / STEPS)
    own = path.controls[torch.searchsorted(path.times, middles.to(path.times)) - 1, 0].double()
    found = transcribe(problem, steps=STEPS, controls=own, seed=seed)
    if problem.evaluation() is not problem:  # whose costs may jump: from the optimum with margins
        problem = problem.evaluation()
        found = transcribe(problem, steps=STEPS, controls=found.controls, guesses=0, seed=seed)
    best = found.running_cost + found.terminal_cost
    if not math.isfinite(best):
        return None
    cost = policy.simulate(steps=2 * policy.steps).cost.item()
    arrays = {
        "times": found.times.numpy(),
        "states": found.states.numpy(),
        "controls": found.controls.numpy(),
    }
    write_atomically(out / OPEN_LOOP, partial(_save, arrays))
    return {
        "cost": best,
        "running_cost": found.running_cost,
        "terminal_cost": found.terminal_cost,
        "policy_cost": cost,
        "suboptimality_percent": 100 * (cost - best) / max(abs(best), 1e-12),
        "steps": STEPS,
        "message": found.message,
    }


def _reinforced(policy: Policy, out: Path, evaluations: int, seed: int) -> dict[str, Any]:
    """Mean costs on held-out starts against evaluations of the dynamics: of PPO, and of the run."""
    from .control.ppo import solve_evaluations, train_ppo

    problem, config = policy.problem, read_json(out / "config.json")
    steps, batch = config["objective"]["time_steps"], config["settings"]["batch_size"]
    found = train_ppo(problem, evaluations=evaluations, seed=seed)
    history = read_log(out)
    own = [
        solve_evaluations(problem, max_steps=entry["step"], steps=steps, batch_size=batch)
        for entry in history
    ]
    return {
        "evaluations": found.evaluations.tolist(),
        "costs": found.costs.tolist(),
        "best": found.cost,
        "own_evaluations": own,
        "own_costs": [entry["validation"] for entry in history],
    }


def _race(ppo: Mapping[str, Any] | None) -> list[Section]:
    from .plots import curves

    if ppo is None:
        return []
    lines = {
        "PPO": (ppo["evaluations"], ppo["costs"]),
        "this policy": (ppo["own_evaluations"], ppo["own_costs"]),
    }
    told = (
        f"Mean cost over held-out starts against evaluations of the dynamics in training. PPO, "
        f"which knows the problem only by its rewards, reaches {ppo['best']:.5g}. Evaluations for "
        "the open-loop solution that this policy began with are not counted."
    )
    figure = curves(lines, "evaluations of the dynamics", "mean cost", "Against PPO")
    figure.axes[0].set(xscale="log", yscale="log" if min(ppo["costs"]) > 0 else "linear")
    return [Section("Reinforcement learning", told, figure=figure)]


def _save(arrays: Mapping[str, np.ndarray], path: Path) -> None:
    with path.open("wb") as file:  # a name without .npz would get it appended
        np.savez(file, **arrays)  # type: ignore[arg-type]


def _open_loop(run: Path) -> dict[str, np.ndarray] | None:
    if not (run / OPEN_LOOP).exists():
        return None
    with np.load(run / OPEN_LOOP, allow_pickle=False) as arrays:
        return dict(arrays)


def _summary(policy: Policy, metrics: Mapping[str, Any]) -> Section:
    check, baseline = metrics["check"], metrics["baseline"]
    noise = policy.problem.noise is not None
    told = [check["verdict"][:1].upper() + check["verdict"][1:] + "."]
    if baseline is not None:
        told.append(
            f"From the nominal start the policy costs {baseline['policy_cost']:.5g}, "
            f"{baseline['suboptimality_percent']:+.2f} % against the {baseline['cost']:.5g} of an "
            f"open-loop solution, a local optimum over {baseline['steps']} constant controls that "
            "knows only this start."
        )
    elif noise:
        told.append("Costs are means over the noise.")
    else:
        told.append(
            "There is no open-loop solution to compare with: none was asked for, or none found."
        )
    seconds = metrics.get("seconds")
    shares = {
        "value_error": "Error of the value, against the exact one",
        "control_error": "Error of the control, against the exact one",
        "hjb": "HJB residual, over the cost",
        "terminal_error": "Terminal error of the value, over the cost",
        "collisions": "Paths that enter forbidden states",
    }
    rows: list[tuple[str, object]] = [
        ("Mean cost over held-out starts", check["cost"]),
        ("The same on twice the time steps", check["cost_fine"]),
        ("Held-out starts", check["starts"]),
        ("Standard error of the mean", check["cost_error"]),
        ("Cost from the nominal start", check["nominal_cost"]),
        ("Its standard error", check["nominal_error"] if noise else None),
        ("The same on twice the time steps", check["nominal_fine"]),
        ("Value of the nominal start", check["nominal_value"]),
        ("Open-loop cost from the nominal start", None if baseline is None else baseline["cost"]),
        *((label, percent(check[key])) for key, label in shares.items()),
        ("Least clearance, held-out starts", check["clearance"]),
        ("Least clearance, nominal start", check["nominal_clearance"]),
        ("One control on one thread", f"{check['milliseconds']:.2g} ms"),
        ("States", policy.problem.dim),
        ("Controls", policy.problem.control_dim),
        ("Training steps", metrics.get("steps")),
        ("Training time", None if seconds is None else f"{seconds:,.1f} s"),
        ("Weights of the network", sum(p.numel() for p in policy.parameters())),
    ]
    table = [("Quantity", "Value"), *(row for row in rows if row[1] is not None)]
    return Section("Summary", "\n\n".join(told), table=table)


def percent(share: float | None) -> str | None:
    """In words."""
    return None if share is None else f"{100 * share:.3g} %"


def _ways(
    policy: Policy, path: Simulation, opened: Mapping[str, np.ndarray] | None, run: Path
) -> list[Section]:
    """Trajectories and animation of what moves in the plane or in space."""
    problem = policy.problem.evaluation()
    draw = _drawer(problem, path, opened)
    if draw is None:
        (run / ANIMATION).unlink(missing_ok=True)
        return []
    gif = write_animation(run, draw, len(path.times))
    obstacles = " Shades or boxes are obstacles." if isinstance(problem, Agents) else ""
    return [
        Section(
            "Trajectories",
            f"From the nominal start; colours are times.{obstacles} {ANIMATION} beside this file "
            "is the same in motion.",
            figure=draw(),
            animation=gif,
        )
    ]


def write_animation(run: Path, draw: Any, count: int) -> bytes:
    """Write the animation of `draw(upto=n)`, n up to `count - 1`, to the folder; also its bytes."""
    from . import control_plots

    shown = np.unique(np.linspace(1, count - 1, control_plots.FRAMES).round().astype(int))
    gif = control_plots.animation(draw(upto=int(n)) for n in shown)
    write_atomically(run / ANIMATION, lambda temporary: temporary.write_bytes(gif))
    return gif


def _drawer(problem: Problem, path: Simulation, opened: Mapping[str, np.ndarray] | None) -> Any:
    """A picture of the first path up to any time, or None where there is none."""
    from . import control_plots

    times, states = array(path.times), array(path.states[:, 0])
    if isinstance(problem, Agents):
        shape = (-1, problem.count, problem.space)
        boxes = getattr(problem, "blocks", None)
        options: dict[str, Any] = {"radius": problem.radius, "boxes": boxes}
        if problem.space == 2:
            options["field"] = _obstacles(problem, states.reshape(-1, 2))
        target = array(problem.target).reshape(shape[1:])
    elif isinstance(problem, Quadcopter):
        shape, options = (-1, 1, 3), {}
        target = np.array(problem.target[:3])[None]
        states = states[:, :3]
    else:
        return None
    if opened is not None and problem.dim <= 12:  # more lines hide what is below
        options["others"] = opened["states"][:, : states.shape[1]].reshape(shape)
    return partial(control_plots.paths, times, states.reshape(shape), target, **options)


@torch.no_grad()
def _obstacles(problem: Agents, points: np.ndarray) -> Any:
    """x, y and the shade of obstacles on a grid around `points`, or None where there are none."""
    low, high = points.min(0), points.max(0)
    middle, half = (low + high) / 2, 0.7 * (high - low).max()
    x, y = (np.linspace(middle[i] - half, middle[i] + half, GRID) for i in (0, 1))
    grid = torch.from_numpy(np.stack(np.meshgrid(x, y), -1).reshape(-1, 1, 2))
    cost = array(problem.obstacle_cost(grid)).reshape(GRID, GRID)
    shade = np.sqrt(cost)  # or a steep hill is a point
    forbidden = array(problem.obstacle_clearance(grid)[:, 0]).reshape(GRID, GRID) < 0
    shade[forbidden] = shade.max()
    return (x, y, shade) if cost.max() > 0 else None


def _courses(
    policy: Policy, path: Simulation, opened: Mapping[str, np.ndarray] | None
) -> list[Section]:
    """States and controls over time."""
    from . import control_plots

    problem = policy.problem
    noise = "" if problem.noise is None else f" {path.states.shape[1]} paths under noise; one bold."
    found = []
    for title, values, count, letter in (
        ("States", path.states, problem.dim, "z"),
        ("Controls", path.controls, problem.control_dim, "u"),
    ):
        names = [f"{letter}{i + 1}" for i in range(count)]
        others = None
        if opened is not None:
            times = opened["times"]
            middles = (times[1:] + times[:-1]) / 2
            others = (times if letter == "z" else middles, opened[title.lower()])
        more = (
            f" The first {control_plots.PANELS} of {count}." if count > control_plots.PANELS else ""
        )
        figure = control_plots.courses(
            array(path.times)[: len(values)], array(values), names, others=others, title=title
        )
        text = f"From the nominal start.{noise}{more}"
        found.append(Section(f"{title} over time", text, figure=figure))
    return found


def _shocks(check: Mapping[str, Any]) -> Section:
    from . import control_plots

    sizes, mean, worst = (check[f"shock_{key}"] for key in ("sizes", "costs", "worst"))
    rows = [("Size", "Mean cost", "Worst cost"), *zip(sizes, mean, worst, strict=True)]
    return Section(
        "Shocks",
        "At a third of the time the state is thrown into a random direction, without noise; the "
        "size is over the scale of the states. A policy answers at once, where an open-loop "
        "solution would have to be computed again.",
        table=rows,
        figure=control_plots.shocks(sizes, mean, worst),
    )


@torch.no_grad()
def _value(policy: Policy, seed: int) -> Section:
    """Phi along the path from the nominal start against what the rest of the path costs."""
    from . import plots

    problem = policy.problem  # with the margins of training: Phi is its value function
    noise = problem.noise is not None
    path = _noisy(policy, AVERAGED, seed) if noise else policy.simulate()
    states = path.states
    rates = torch.stack([
        problem.running_cost(t, z, policy.control(t, z))
        for t, z in zip(path.times, states, strict=True)
    ]).double()  # fmt: skip
    h = path.times.diff().double()[:, None]
    # Without noise by the trapezoidal rule; with it from the left ends, as the paths were made.
    each = h * (rates[:-1] if noise else (rates[1:] + rates[:-1]) / 2)
    rest = each.flip(0).cumsum(0).flip(0) + problem.terminal_cost(states[-1])
    to_go = torch.cat([rest, problem.terminal_cost(states[-1])[None].double()]).mean(1)
    value = torch.stack([
        policy.value(t, z).mean() for t, z in zip(path.times, states, strict=True)
    ])  # fmt: skip
    times = array(path.times)
    means = f", in the mean of {AVERAGED} paths" if noise else ""
    return Section(
        "Value along the path",
        f"What the policy expects to pay from each time on, and what it pays{means}. Where they "
        "differ the value function is not resolved.",
        figure=plots.curves(
            {"value": (times, array(value)), "cost to go": (times, array(to_go))},
            "time",
            "cost",
            "Value function along the path, and cost to go",
        ),
    )


def training_section(history: list[dict[str, float]], metrics: Mapping[str, Any]) -> Section:
    """The course of training, by log.jsonl and metrics.json."""
    from . import control_plots

    early = metrics.get("stopped") == "early"
    told = (
        f"Training made {metrics.get('steps', 0):,} steps and "
        + ("stopped when validation no longer improved" if early else "used them all")
        + f"; the best policy is that of step {metrics.get('best_step', 0):,}."
    )
    events = list(metrics.get("events", ()))
    return Section(
        "Training",
        told,
        table=[("Adjustments during training",), *((event,) for event in events)]
        if events
        else None,
        figure=control_plots.training(history) if history else None,
    )


def array(x: Tensor) -> np.ndarray:
    """In double precision."""
    return x.detach().double().cpu().numpy()
