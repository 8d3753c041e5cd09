"""The family of continuous flows on the same rows, for the same seconds of training.

    python benchmarks/family.py --data moons 8gaussians --budget 30
    python benchmarks/family.py --summary

Needs `pip install 'pathline[bench]'`, and for bsds300 the folder PATHLINE_DATA. Each (data, model,
seed) has a file in benchmarks/results/family; what is on file is not measured again. The data are
those of `training_curves.py`: toys in their own units, tables in standard deviations.

- Pathline's presets train by `pl.fit` with its defaults. Zuko's spline (nsf) and affine (maf)
  autoregressive flows train by `training_curves.train` with the learning rate that was best on
  validation rows; they have no path in time, so only likelihood, seconds and parameters count.
- Test likelihoods are of 2,000 rows, with the exact trace, in double precision, on twice the time
  steps, or with a hundredth of the tolerance, that `choose_steps(x, tolerance=1e-3)` chose.
- With `--threads 1` seconds are those of the process's CPU, for `pl.fit` too, which then depend
  little on what else the machine does; with two threads they are of the wall.
- Path figures are of test rows from data to reference, in standardised units, which are the same
  for all presets, by Simpson's rule on 64 intervals: transport cost E int |v|^2/2 dt, and E int |v|
  dt over E |z(1) - z(0)|, which is 1 for straight paths.
- Evaluations are those of the velocity for the log-densities of 500 test rows in one solve, with
  the fewest time steps or the loosest tolerance whose mean error is at most 1e-3 nats, and how many
  of them need the trace too; counted, but for `OTFlow`, whose loop makes those of CNF.
- The inverse error is the largest of |x - f^-1(f(x))| in standard deviations, in single precision.
"""

import argparse
import copy
import json
import platform
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from functools import cache
from importlib.metadata import version
from pathlib import Path
from statistics import fmean
from typing import Any
from unittest.mock import patch

import torch
import training_curves as curves
from torch import Tensor
from training_curves import Data, Missing

import pathline as pl
from pathline.data import TOYS
from pathline.flows import CNF, Flow, OTFlow

RESULTS = Path(__file__).parent / "results" / "family"
DATA = ("moons", "8gaussians", "electricity", "bsds300")
PRESETS: dict[str, Callable[..., Flow]] = {
    "FFJORD": pl.flows.FFJORD,
    "RNODE": pl.flows.RNODE,
    "MongeAmpere": pl.flows.MongeAmpere,
    "PotentialFlow": pl.flows.PotentialFlow,
    "OTFlow": pl.flows.OTFlow,
}
MODELS = (*PRESETS, "nsf", "maf")
SEEDS = {"moons": 3}  # of the other data one
INTERVALS = 64  # of time, for the figures of paths
TEST_ROWS = 2000
ROWS = 500  # of them, for all figures but the likelihood
Figures = dict[str, float | None]


def path_figures(flow: Flow, x: Tensor) -> Figures:
    """Transport cost and straightness of the paths of the rows of `x`."""
    path = flow.trajectory(x, steps=INTERVALS)
    times = torch.linspace(0, 1, len(path)).to(path)
    speed = torch.stack([flow.velocity(t, z).norm(dim=1) for t, z in zip(times, path, strict=True)])
    simpson = torch.ones_like(times)
    simpson[1:-1:2], simpson[2:-1:2] = 4, 2
    simpson /= 3 * INTERVALS
    length, distance = simpson @ speed, (path[-1] - path[0]).norm(dim=1)
    return {
        "transport": (simpson @ (0.5 * speed.square())).mean().item(),
        "straightness": (length.mean() / distance.mean()).item(),
    }


STEPS = (1, 2, 3, 4, 5, 6, 8, 10, 12, 16, 20, 24, 32, 48, 64, 96, 128)
TOLERANCES = [10.0**-k for k in range(1, 10)]


def cheapest(flow: Flow, x: Tensor) -> Figures:
    """The evaluations that log-densities right to 1e-3 nats need, and their mean error, of a flow
    in double precision."""
    with flow.refined(4):
        truth = flow.log_prob(x)
    flow = copy.deepcopy(flow)
    adaptive = isinstance(flow, CNF) and flow.adaptive
    for fineness in TOLERANCES if adaptive else STEPS:
        if isinstance(flow, CNF) and adaptive:
            flow.rtol = flow.atol = fineness
        else:
            flow.steps = int(fineness)
        error = (flow.log_prob(x) - truth).abs().mean().item()
        if error <= 1e-3:
            break
    return evaluations(flow, x) | {"error": error}


def evaluations(flow: Flow, x: Tensor) -> Figures:
    """Of velocity and trace, for the log-densities of the rows of `x` in one solve."""
    if isinstance(flow, OTFlow):  # Runge-Kutta's four, both ends of a step and its midpoint
        return {"evaluations": 5 * flow.steps + 1, "traces": 2 * flow.steps + 1}
    assert isinstance(flow, CNF)
    calls = {"evaluations": 0, "traces": 0}
    rates = flow._rates

    def count(name: str) -> None:
        calls[name] += 1

    def counted(*arguments: Any) -> dict[str, Tensor]:
        count("traces")
        return rates(*arguments)

    hook = flow.network.register_forward_hook(lambda *_: count("evaluations"))
    flow._rates = counted  # type: ignore[method-assign, assignment]
    try:
        flow.move(flow.cast(flow.standardize(x)[0]), None)
    finally:
        hook.remove()
        del flow._rates
    return {name: float(value) for name, value in calls.items()}


@cache
def warm_up() -> None:
    """Let torch and Pathline import what they import in a first training."""
    curves.warm_up()
    pl.fit(CNF(2), torch.randn(1000, 2), max_steps=2, progress=False)


def clock_of_fit() -> AbstractContextManager[object]:
    """Within, `time.perf_counter` is the one of `training_curves.Clock`."""
    one = torch.get_num_threads() == 1
    return patch("time.perf_counter", time.process_time) if one else nullcontext()


@torch.no_grad()
def measure_flow(make: Callable[..., Flow], data: Data, seed: int, budget: float) -> Figures:
    """Train a preset, and everything that is measured of it."""
    start = torch.Generator().manual_seed(seed)
    flow = make(data.dim, generator=start)
    with torch.enable_grad(), clock_of_fit():
        begin = time.perf_counter()
        run = pl.fit(
            flow, data.train, validation=data.validation, budget=budget, seed=seed, progress=False
        )
        seconds = time.perf_counter() - begin
    figures: Figures = {
        "seconds": seconds,
        "steps": run.steps,
        "parameters": sum(p.numel() for p in flow.parameters()),
    }
    figures["estimated_error"] = flow.choose_steps(data.validation[:ROWS], tolerance=1e-3)
    x = data.test[:ROWS]
    figures["inverse_error"] = flow.inverse_error(x)
    fine = copy.deepcopy(flow).double()
    figures |= cheapest(fine, x) | path_figures(fine, x)
    with fine.refined(2):
        figures["nll"] = -fine.log_prob(data.test).mean().item() + data.offset
    return figures


def measure_peer(method: str, data: Data, seed: int, budget: float, folder: Path) -> Figures:
    """Train a flow without time at the best of its learning rates."""
    setting = curves.choose(method, data, curves.RESULTS if method == "nsf" else folder)
    (point,), _ = curves.train(method, data, setting, seed, budget, [budget])
    parameters = sum(p.numel() for p in curves.make(method, data).parameters())
    return {
        "seconds": point["seconds"],
        "steps": point["steps"],
        "parameters": parameters,
        "nll": point["nll"],
    }


def measure(model: str, name: str, seed: int, budget: float, folder: Path) -> None:
    """Measure and write, unless it is on file."""
    path = folder / f"{name}-{model}-seed{seed}.json"
    if path.exists():
        print(f"{path.name} is on file, with {json.loads(path.read_text())['budget']:g} s")
        return
    data = curves.load(name)
    data = replace(data, test=data.test[:TEST_ROWS])
    warm_up()
    if model in PRESETS:
        figures = measure_flow(PRESETS[model], data, seed, budget)
    else:
        figures = measure_peer(model, data, seed, budget, folder)
    about = {
        "model": model,
        "data": name,
        "seed": seed,
        "budget": budget,
        "threads": torch.get_num_threads(),
        **figures,
        "versions": {key: version(key) for key in ("torch", "zuko")} | {"pathline": pl.__version__},
        "machine": platform.machine(),
    }
    print(json.dumps(about), flush=True)
    curves.write(path, about)


COLUMNS = {
    "nll": ("test NLL", ".3f"),
    "transport": ("transport cost", ".3f"),
    "straightness": ("length / distance", ".3f"),
    "evaluations": ("evaluations", ".0f"),
    "traces": ("of them traces", ".0f"),
    "inverse_error": ("inverse error", ".0e"),
    "seconds": ("seconds", ".0f"),
    "steps": ("steps", ".0f"),
    "parameters": ("parameters", ".0f"),
}


def summarize(folder: Path) -> None:
    """Means over the seeds on file, as a table in Markdown."""
    titles = ["data", "model", *(title for title, _ in COLUMNS.values()), "seeds"]
    print(f"| {' | '.join(titles)} |\n|{' --- |' * len(titles)}")
    for name in DATA:
        if name in TOYS and any(folder.glob(f"{name}-*-seed*.json")):
            test = curves.load(name).test[:TEST_ROWS]
            nll = format(-TOYS[name].log_prob(test).mean().item(), ".3f")
            print(f"| {name} | true density | {nll} |{'  |' * len(titles[3:])}")
        for model in MODELS:
            paths = sorted(folder.glob(f"{name}-{model}-seed*.json"))
            runs: list[dict[str, Any]] = [json.loads(path.read_text()) for path in paths]
            if not runs:
                continue
            cells = [name, model]
            for key, (_, form) in COLUMNS.items():
                values = [run[key] for run in runs if run.get(key) is not None]
                cells.append(format(fmean(values), form) if len(values) == len(runs) else "")
            print(f"| {' | '.join([*cells, str(len(runs))])} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--data", nargs="+", choices=DATA, default=[])
    parser.add_argument("--seeds", type=int, help="default 3 for moons, else 1")
    parser.add_argument("--budget", type=float, default=60.0, help="seconds of each training")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the results")
    parser.add_argument("--summary", action="store_true", help="print the table of all results")
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    for name in arguments.data:
        for seed in range(arguments.seeds or SEEDS.get(name, 1)):
            for model in arguments.models:
                try:
                    measure(model, name, seed, arguments.budget, arguments.out)
                except Missing as reason:
                    print(f"{name} left out: {reason}")
    if arguments.summary:
        summarize(arguments.out)


if __name__ == "__main__":
    main()
