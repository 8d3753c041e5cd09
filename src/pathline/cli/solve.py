"""`pathline solve`."""

from importlib import import_module
from pathlib import Path
from typing import Annotated, Any, Literal

from cyclopts import Parameter

from ..control import solve as solve_problem
from ..control.problems import make, settings
from ..control_report import finish_control
from ..errors import ArgumentError
from ..games import Equilibrium, MeanFieldGame
from ..games_report import finish_game
from ..models import NAMED
from ..train.files import open_run
from .options import Flag, Positive, RunOptions, Seconds, Weight, answer, say


def solve(
    name: str | None = None,
    /,
    *,
    list_: Annotated[Flag, Parameter(name="--list")] = False,
    run: RunOptions | None = None,
    dim: Positive | None = None,
    noise: Weight | None = None,
    limit: Seconds | None = None,
    strength: Weight | None = None,
    width: Positive | None = None,
    depth: Positive | None = None,
    time_steps: Positive | None = None,
    base: Literal["auto", "path", "none"] | None = None,
    baseline: bool | None = None,
    ppo: Positive | None = None,
) -> None:
    """Learn a feedback policy for a control problem, or the equilibrium of a mean-field game.

    Parameters
    ----------
    name
        Name of the problem or game.
    list_
        List the problems and games.
    run
        What every command that trains takes.
    dim
        Dimension of the state, of problems that have it as an option.
    noise
        Standard deviation of the noise, of problems that have it as an option.
    limit
        Largest size of the control, of problems that have it as an option.
    strength
        How many times as strong the obstacle is, of games that have one.
    width
        Neurons of each layer of the network.
    depth
        Layers of the network.
    time_steps
        Time steps in training; costs are judged on twice as many.
    base
        Begin with the value function to second order around an open-loop solution: where that
        helps (auto), always (path) or never (none). Not of games.
    baseline
        Compare with an open-loop solution from the nominal start, as by default. Not of games.
    ppo
        Compare with a policy that PPO trains, with so many evaluations of the dynamics. Not of
        games.
    """
    if list_:
        summaries = {key: named.summary for key, named in NAMED.items()}
        wide = max(map(len, summaries))
        lines = [f"{key:<{wide}}  {summary}" for key, summary in summaries.items()]
        return answer(summaries, bool(run and run.json), "\n".join(lines))
    if name is None:
        raise ArgumentError("solve needs the NAME of a problem; --list shows them")
    problem = make(name, NAMED, dim=dim, noise=noise, limit=limit, strength=strength)
    if isinstance(problem, MeanFieldGame):
        _refuse(name, base=base, baseline=baseline, ppo=ppo)
    if run is None:
        raise ArgumentError(f"solve needs a folder for the run: --out runs/{name}")
    given = {"width": width, "depth": depth, "steps": time_steps, "base": base}
    chosen = settings(problem, NAMED) | _set(given)
    # Before the work of a first policy is lost.
    open_run(run.out, resume=run.resume, overwrite=run.overwrite)
    if run.budget is not None or _begun(run):
        chosen.pop("max_steps", None)  # the budget or the checkpoint knows
    if ppo is not None:
        import_module("pathline.control.ppo")  # says what is missing before any work
    policy = solve_problem(problem, **chosen | _set(run.training()))
    if isinstance(policy, Equilibrium):
        metrics = finish_game(policy, run.out, seed=run.seed)
        return answer(metrics, run.json, _game_summary(run.out, metrics))
    baseline = baseline is not False
    if baseline and problem.noise is None:
        say("solving from the nominal start, for comparison; --no-baseline leaves it out")
    metrics = finish_control(policy, run.out, baseline=baseline, ppo=ppo, seed=run.seed)
    answer(metrics, run.json, _summary(run.out, metrics))


def _refuse(name: str, **given: Any) -> None:
    """Raise if an option is given that is not for games."""
    for key, value in given.items():
        if value is not None:
            raise ArgumentError(f"--{key} is for control problems; {name!r} is a mean-field game")


def _set(options: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in options.items() if value is not None}


def _begun(run: RunOptions) -> bool:
    return run.resume and (run.out / "config.json").exists() and any(run.out.glob("checkpoint/*"))


def _summary(folder: Path, metrics: dict[str, Any]) -> str:
    check, baseline = metrics["check"], metrics["baseline"]
    error = f" +- {check['nominal_error']:.2g}" if check["nominal_error"] else ""
    lines = [
        f"cost {check['nominal_fine']:.6g}{error} from the nominal start, "
        f"{check['cost_fine']:.6g} on average over {check['starts']} held-out starts"
    ]
    if baseline is not None:
        lines.append(
            f"open loop {baseline['cost']:.6g} from the nominal start; the policy is "
            f"{baseline['suboptimality_percent']:+.2f} % against it"
        )
    if metrics["ppo"] is not None:
        lines.append(f"PPO {metrics['ppo']['best']:.6g} on average over held-out starts")
    return "\n".join([*lines, check["verdict"], _written(folder)])


def _game_summary(folder: Path, metrics: dict[str, Any]) -> str:
    check, cost = metrics["check"], metrics["check"]["cost"]
    terms = ", ".join(f"{key} {cost[key]:.5g}" for key in cost if key != "total" and cost[key])
    line = (
        f"cost {cost['total']:.6g} +- {check['total_error']:.2g} over {check['particles']} new "
        f"particles: {terms}"
    )
    return "\n".join([line, check["verdict"], _written(folder)])


def _written(folder: Path) -> str:
    made = ["model", "report.html", "metrics.json", "log.jsonl", "animation.gif"]
    shown = ", ".join(name for name in made if (folder / name).exists())
    return f"wrote {folder}: {shown}"
