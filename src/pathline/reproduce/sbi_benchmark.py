"""Tasks of the sbi benchmark: two-sample tests of learned posteriors against references.

Source: Lueckmann, Boelts, Greenberg, Goncalves, Macke, Benchmarking simulation-based inference,
2021 (arXiv 2101.04653).
"""

from collections.abc import Sequence
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from ..data.sbibm import OBSERVATIONS, load_reference
from ..errors import DataError
from ..flows import TransportMap
from ..posterior import c2st
from ..posterior.simulators import SIMULATORS
from ..report import Section
from ..train import files
from .conditional import LABELS, train_flow
from .experiment import Outcome, RunArguments
from .inference import bounds, samples_of, validated
from .race import columns, open_folder

SOURCE = (
    "Lueckmann et al., Benchmarking simulation-based inference (arXiv 2101.04653): mean C2ST of "
    "NPE over the ten observations, from its published main_paper.csv"
)
SIMULATIONS = {"small": 10_000, "full": 100_000}
DEFAULT = "cot"
# By task, the published C2ST of NPE after 1,000, 10,000 and 100,000 simulations.
NPE = {
    "two_moons": {1_000: 0.725, 10_000: 0.606, 100_000: 0.542},
    "gaussian_linear": {1_000: 0.694, 10_000: 0.552, 100_000: 0.506},
    "gaussian_mixture": {1_000: 0.731, 10_000: 0.661, 100_000: 0.555},
    "bernoulli_glm": {1_000: 0.863, 10_000: 0.678, 100_000: 0.559},
    "slcp": {1_000: 0.975, 10_000: 0.901, 100_000: 0.831},
    "sir": {1_000: 0.815, 10_000: 0.680, 100_000: 0.585},
}


def run(arguments: RunArguments, size: str) -> Outcome:
    """Learn the posteriors of the tasks that have references, by both methods with their default
    settings; the measured figure is the mean C2ST of the default method over the tasks.

    Size small has 10,000 simulations of each task, full 100,000. `resume` goes on after the last
    observation that was judged.
    """
    from ..plots import pairs

    count = SIMULATIONS[size]
    tasks, missing = available()
    folder = open_folder("sbi-benchmark", arguments, size, tasks=tasks)
    if folder.done:
        return folder.done
    found: dict[str, dict[str, list[float]]] = {}
    seconds: dict[str, dict[str, float]] = {}
    pictures = []
    for task in tasks:
        simulator = SIMULATORS[task]
        train, validation = validated(simulator.draw(count, arguments.seed))
        for method, label in LABELS.items():
            out = arguments.out / "checkpoint" / f"{task}-{method}"
            flow, trained, _ = train_flow(
                method, train, validation, out, arguments, support=bounds(simulator)
            )
            found.setdefault(task, {})[method] = judge(flow, task, out / "c2st.json")
            seconds.setdefault(task, {})[method] = trained.seconds
            if method == DEFAULT:
                reference = load_reference(task, 1)
                samples = samples_of(flow, reference.observation, 1)
                figure = pairs(
                    samples,
                    simulator.parameters,
                    truth=reference.true_parameters,
                    reference=reference.samples,
                )
                name = f"{task} given its first observation, by {label}"
                pictures.append(Section(name, figure=figure))
    table: list[Sequence[object]] = [("task", *LABELS.values(), "NPE, published", "seconds")]
    for task in tasks:
        cells = [f"{fmean(c):.3f} ({stdev(c):.3f})" for c in found[task].values()]
        spent = ", ".join(f"{s:.0f}" for s in seconds[task].values())
        table.append((task, *cells, f"{NPE[task][count]:.3f}", spent))
    told = (
        f"C2ST after {count:,} simulations, mean and standard deviation over {OBSERVATIONS} "
        "observations, of 10,000 samples each: 0.5 where a classifier can't tell the posterior "
        "from the reference, 1 at worst. Seconds are those of training."
    )
    told += "".join(f" Left out: {reason}." for reason in missing)
    measured = fmean(fmean(found[task][DEFAULT]) for task in tasks)
    published = fmean(NPE[task][count] for task in tasks)
    details: dict[str, Any] = {"c2st": found, "train_seconds": seconds, "simulations": count}
    text = f"{columns(table)}\n{told}\n{SOURCE}"
    sections = [Section("Two-sample tests", told, table=table), *pictures]
    outcome = Outcome(measured, published, SOURCE, text, details)
    return folder.write(outcome, "The sbi benchmark", sections)


def available() -> tuple[list[str], list[str]]:
    """Tasks whose references are there, and what is missing of the others, in words.

    Raises:
        DataError: there is none.
    """
    tasks, missing = [], []
    for task in NPE:
        try:
            load_reference(task, 1)
            tasks.append(task)
        except DataError:
            missing.append(f"{task}, as there is no reference posterior")
    if not tasks:
        load_reference(missing[0].partition(",")[0], 1)  # says where they are to be had
    return tasks, missing


def judge(flow: TransportMap, task: str, path: Path) -> list[float]:
    """The C2ST of a flow for each observation of a task; those in the file `path` are taken from
    there, and new ones are added."""
    known = files.read_json(path)["c2st"] if path.exists() else []
    for observation in range(len(known) + 1, OBSERVATIONS + 1):
        reference = load_reference(task, observation)
        samples = samples_of(flow, reference.observation, observation)
        known.append(c2st(reference.samples, samples))
        files.write_json(path, {"c2st": known})
    return known
