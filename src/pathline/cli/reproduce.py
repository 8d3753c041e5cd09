"""`pathline reproduce`."""

from pathlib import Path
from typing import Annotated, Literal

from cyclopts import Parameter

from ..errors import ArgumentError, unknown
from ..reproduce import EXPERIMENTS, RunArguments
from ..train.files import read_json, write_json
from .options import Flag, Positive, Seconds, Seed, answer


def reproduce(
    name: str | None = None,
    /,
    *,
    list_: Annotated[Flag, Parameter(name="--list")] = False,
    out: Path | None = None,
    size: Literal["small", "full"] = "small",
    seed: Seed = 0,
    max_steps: Positive | None = None,
    budget: Seconds | None = None,
    resume: Flag = False,
    overwrite: Flag = False,
    json: Flag = False,
) -> None:
    """Run an experiment and print its figure beside the published one, if there is one.

    Parameters
    ----------
    name
        Name of the experiment.
    list_
        List the experiments.
    out
        Folder of the run; runs/NAME by default.
    size
        small takes minutes on two CPU cores, full is the authors' own setting where there is one.
    seed
        Seed of everything random.
    max_steps
        Training steps.
    budget
        Seconds of training, turned into a number of steps after a timed warm-up.
    resume
        Go on from the last checkpoint in the folder.
    overwrite
        Replace the run in the folder.
    json
        Print one JSON object on standard output.
    """
    if list_ or name is None:
        if name is None and not list_:
            raise ArgumentError("reproduce needs the NAME of an experiment; --list shows them")
        summaries = {key: experiment.summary for key, experiment in EXPERIMENTS.items()}
        width = max(map(len, summaries))
        lines = [f"{key:<{width}}  {summary}" for key, summary in summaries.items()]
        return answer(summaries, json, "\n".join(lines))
    if name not in EXPERIMENTS:
        raise ArgumentError(unknown("experiment", name, EXPERIMENTS))
    folder = Path("runs") / name if out is None else out
    arguments = RunArguments(folder, seed, max_steps, budget, resume, overwrite)
    outcome = EXPERIMENTS[name].run(arguments, size)
    result = {
        "experiment": name,
        "measured": outcome.measured,
        "published": outcome.published,
        "source": outcome.source,
        "size": size,
        "seed": seed,
        **outcome.details,
    }
    write_json(folder / "metrics.json", read_json(folder / "metrics.json") | result)
    made = [name for name in ("model", "report.html", "metrics.json") if (folder / name).exists()]
    answer(result, json, f"{outcome.text}\nwrote {folder}: {', '.join(made)}")
