"""Posteriors and conditional densities: accuracy and seconds of training, beside sbi and zuko.

    python benchmarks/posteriors.py --tasks two_moons --simulations 1000 10000
    python benchmarks/posteriors.py --tables concrete energy --budget 10
    python benchmarks/posteriors.py --summary --plot posteriors.png

Needs `pip install 'pathline[bench,posterior]'`, and the folder PATHLINE_DATA for the references of
the sbi benchmark. Each (task, method, simulations) and each (table, method) has a file in
benchmarks/results/posteriors; what is on file is not measured again.

- Posteriors: COT-Flow (cot), PCP-Map (pcp), and the neural posterior estimation of the package sbi
  with its neural spline flow (npe), each with its one default setting, from the same simulations
  with one seed. C2ST is over the ten observations, with 10,000 samples each; 0.5 is exact. The
  published figures of NPE are those of the sbi benchmark. The prior's bounds are known to all.
- Tables: the splits of `pathline reproduce cot-uci-*`, the same seconds of training for all
  methods. Zuko's conditional neural spline flow (nsf) has standardised data, a cosine schedule, the
  best of its weights on validation rows, and the best of three learning rates on those of the
  first split, by runs that are not counted. Nats, in standard deviations of the training rows.
- Seconds are those of the process's CPU with `--threads 1`, and of the wall otherwise.
"""

import argparse
import copy
import json
import math
import platform
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import numpy as np
import torch
import zuko
from family import clock_of_fit, warm_up
from matplotlib.figure import Figure
from torch import Tensor
from training_curves import Clock, write

import pathline as pl
from pathline import plots
from pathline.data.sbibm import OBSERVATIONS, load_reference
from pathline.posterior import c2st
from pathline.posterior.pilots import METHODS, build
from pathline.posterior.simulators import SIMULATORS, Simulator, Uniform
from pathline.reproduce.conditional import LABELS, TABLES, load_splits, nll_of, standardised
from pathline.reproduce.inference import bounds, validated
from pathline.reproduce.regressions import Pairs
from pathline.reproduce.sbi_benchmark import NPE

RESULTS = Path(__file__).parent / "results" / "posteriors"
SIMULATIONS = (1_000, 10_000, 100_000)
SPLITS = 5
RATES = (1e-3, 3e-3, 1e-2)  # of zuko's flow
LOOKS = 50  # at the validation rows
BATCH = 128
NAMES = LABELS | {"npe": "sbi NPE (nsf)", "nsf": "zuko NSF"}
Sampler = Callable[[np.ndarray, int, int], np.ndarray]  # observation, seed and number -> samples


def train_ours(
    method: str, simulator: Simulator, pairs: Pairs, seed: int, most: int | None
) -> tuple[Sampler, dict[str, Any]]:
    """A flow with its defaults."""
    train, validation = validated(pairs)
    flow = build(
        method, simulator.dim, simulator.context_dim, {}, support=bounds(simulator), seed=seed
    )
    with clock_of_fit():
        clock = Clock()
        run = pl.fit(flow, train, validation=validation, seed=seed, max_steps=most, progress=False)
        seconds = clock.seconds

    def sample(observation: np.ndarray, seed: int, n: int) -> np.ndarray:
        return flow.sample(n, torch.from_numpy(observation), seed=seed).double().numpy()

    return sample, {"seconds": seconds, "steps": run.steps}


def train_npe(
    simulator: Simulator, pairs: Pairs, seed: int, most: int | None
) -> tuple[Sampler, dict[str, Any]]:
    """sbi's own, with the defaults of `train`."""
    from sbi.inference import NPE as Inference
    from sbi.utils import BoxUniform

    prior = simulator.prior
    distribution: Any
    if isinstance(prior, Uniform):
        ends = (torch.full((prior.dim,), end) for end in (prior.lower, prior.upper))
        distribution = BoxUniform(*ends)
    else:
        mean, covariance = (torch.from_numpy(a).float() for a in (prior.mean, prior.covariance))
        distribution = torch.distributions.MultivariateNormal(mean, covariance)
    theta, x = (torch.from_numpy(part).float() for part in pairs)
    torch.manual_seed(seed)
    clock = Clock()
    inference = Inference(distribution, density_estimator="nsf", show_progress_bars=False)
    inference.append_simulations(theta, x)
    inference.train(**({} if most is None else {"max_num_epochs": most}))
    seconds = clock.seconds
    posterior = inference.build_posterior()

    def sample(observation: np.ndarray, seed: int, n: int) -> np.ndarray:
        torch.manual_seed(seed)
        at = torch.from_numpy(observation).float()
        return posterior.sample((n,), x=at, show_progress_bars=False).double().numpy()

    return sample, {"seconds": seconds, "epochs": inference.summary["epochs_trained"][-1]}


def measure_task(
    task: str, method: str, count: int, seed: int, arguments: argparse.Namespace
) -> None:
    """Train and judge one method on one task, unless it is on file."""
    path = arguments.out / f"{task}-{method}-{count}.json"
    if path.exists():
        print(f"{path.name} is on file")
        return
    simulator = SIMULATORS[task]
    pairs = simulator.draw(count, seed)
    warm_up()
    if method == "npe":
        sample, about = train_npe(simulator, pairs, seed, arguments.max_epochs)
    else:
        sample, about = train_ours(method, simulator, pairs, seed, arguments.max_steps)
    clock, found, drawing = Clock(), [], 0.0
    for observation in range(1, arguments.observations + 1):
        reference = load_reference(task, observation)
        before = clock.seconds
        samples = sample(reference.observation, observation, arguments.samples)
        drawing += clock.seconds - before
        found.append(c2st(reference.samples[: arguments.samples], samples))
        print(task, method, count, observation, f"{found[-1]:.3f}", flush=True)
    rate = arguments.samples * len(found) / drawing
    about |= {"task": task, "method": method, "simulations": count, "c2st": found}
    about |= {"samples": arguments.samples, "samples_per_second": rate, "seed": seed}
    finish(path, about)


def train_nsf(
    parts: Sequence[Pairs], rate: float, seed: int, budget: float
) -> tuple[float, float, dict[str, Any]]:
    """Validation and test likelihoods of zuko's flow after `budget` seconds."""
    rows = [[torch.from_numpy(a).float() for a in part] for part in standardised(parts)]
    (x, context), held, test = rows
    torch.manual_seed(seed)
    clock = Clock()
    flow = zuko.flows.NSF(x.shape[1], context.shape[1], hidden_features=(64, 64))
    optimizer = torch.optim.Adam(flow.parameters(), lr=rate)

    def nll(pair: Sequence[Tensor]) -> Tensor:
        return -flow(pair[1]).log_prob(pair[0]).mean()

    best, weights, step, looks = math.inf, copy.deepcopy(flow.state_dict()), 0, 0
    while (share := clock.seconds / budget) < 1:
        if share * LOOKS >= looks:
            looks += 1
            with torch.no_grad():
                value = nll(held).item()
            if value < best:
                best, weights = value, copy.deepcopy(flow.state_dict())
        for group in optimizer.param_groups:
            group["lr"] = rate * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * share)))
        chosen = torch.randint(len(x), (BATCH,))
        optimizer.zero_grad()
        nll((x[chosen], context[chosen])).backward()
        optimizer.step()
        step += 1
    seconds = clock.seconds
    flow.load_state_dict(weights)
    with torch.no_grad():
        return best, nll(test).item(), {"seconds": seconds, "steps": step}


def measure_table(name: str, method: str, seed: int, arguments: argparse.Namespace) -> None:
    """Train one method on the splits of one table, unless it is on file."""
    path = arguments.out / f"uci-{name}-{method}.json"
    if path.exists():
        print(f"{path.name} is on file")
        return
    splits, _, _ = load_splits(name, SPLITS)
    warm_up()
    budget, about = arguments.budget, {}
    if method == "nsf":
        trials = {rate: train_nsf(splits[0], rate, seed, budget)[0] for rate in RATES}
        about["trials"] = trials
        rate = min(trials, key=lambda rate: trials[rate])
    found, costs = [], []
    for parts in splits:
        if method == "nsf":
            _, nll, cost = train_nsf(parts, rate, seed, budget)
        else:
            (x, context), validation, test = parts
            flow = build(method, x.shape[1], context.shape[1], {}, seed=seed)
            with clock_of_fit():
                clock = Clock()
                run = pl.fit(
                    flow, (x, context), validation=validation, budget=budget, seed=seed,
                    progress=False,
                )  # fmt: skip
                cost = {"seconds": clock.seconds, "steps": run.steps}
            nll = nll_of(flow, test) - float(np.log(x.std(0)).sum())
        found.append(nll)
        costs.append(cost)
        print(name, method, f"{nll:.4f}", cost, flush=True)
    about |= {"table": name, "method": method, "nll": found, "costs": costs, "budget": budget}
    finish(path, about | {"seed": seed})


def finish(path: Path, about: dict[str, Any]) -> None:
    """Write a result with what it was measured with."""
    versions = {name: version(name) for name in ("torch", "zuko", "sbi")}
    machine = {"threads": torch.get_num_threads(), "machine": platform.machine()}
    write(path, about | {"versions": versions | {"pathline": pl.__version__}} | machine)


def read(folder: Path, pattern: str) -> list[dict[str, Any]]:
    return [json.loads(path.read_text()) for path in sorted(folder.glob(pattern))]


def spread(values: Sequence[float]) -> str:
    deviation = f" ± {stdev(values):.3f}" if len(values) > 1 else ""
    return f"{fmean(values):.3f}{deviation}".replace("-", "\N{MINUS SIGN}")


def summarize(folder: Path) -> None:
    """Tables in Markdown of what is on file: means and standard deviations over observations, or
    over splits."""
    runs = {(r["task"], r["simulations"], r["method"]): r for r in read(folder, "[!u]*-*-*.json")}
    methods = [*METHODS, "npe"]
    titles = [title for m in methods for title in (f"{NAMES[m]}: C2ST", "seconds", "samples/s")]
    print(f"| task | simulations | {' | '.join(titles)} | NPE, published |")
    print(f"|{' --- |' * (3 + len(titles))}")
    for task, published in NPE.items():
        for count in SIMULATIONS:
            cells = []
            for method in methods:
                run = runs.get((task, count, method))
                cells += (
                    ["", "", ""]
                    if run is None
                    else [
                        spread(run["c2st"]),
                        f"{run['seconds']:.0f}",
                        f"{run['samples_per_second']:.0f}",
                    ]
                )
            if any(cells):
                print(f"| {task} | {count:,} | {' | '.join(cells)} | {published[count]:.3f} |")
    tables = {(r["table"], r["method"]): r for r in read(folder, "uci-*.json")}
    methods = [*METHODS, "nsf"]
    print(f"\n| table | {' | '.join(NAMES[m] for m in methods)} | seconds |\n|{' --- |' * 5}")
    for name in TABLES:
        found = [tables.get((name, method)) for method in methods]
        if any(found):
            cells = ["" if run is None else spread(run["nll"]) for run in found]
            budgets = {f"{run['budget']:g}" for run in found if run is not None}
            print(f"| {name} | {' | '.join(cells)} | {', '.join(sorted(budgets))} |")


def plot(folder: Path, path: Path) -> None:
    """C2ST against simulations, and against seconds of training."""
    runs = read(folder, "[!u]*-*-*.json")
    tasks = [task for task in NPE if any(run["task"] == task for run in runs)]
    figure = Figure(figsize=(2.4 * max(2, len(tasks)), 4.6), layout="constrained")
    axes = figure.subplots(2, len(tasks), sharey=True, squeeze=False)
    colours = dict(zip(NAMES, (plots.DATA, plots.REFERENCE, plots.SAMPLES), strict=False))
    for column, task in enumerate(tasks):
        for row, key in enumerate(("simulations", "seconds")):
            ax = axes[row, column]
            for method, colour in colours.items():
                own = [r for r in runs if (r["task"], r["method"]) == (task, method)]
                own.sort(key=lambda run: run["simulations"])
                means = [fmean(run["c2st"]) for run in own]
                ax.plot([run[key] for run in own], means, "o-", color=colour, label=NAMES[method])
            if key == "simulations":
                published = NPE[task]
                ax.plot([*published], [*published.values()], ":", color=plots.GREY, label="NPE, "
                        "published")  # fmt: skip
                ax.set_title(task.replace("_", " "), fontsize=9)
            ax.set_xscale("log")
            ax.set_ylim(0.48, 1)
            ax.grid(color=plots.FAINT, lw=0.5)
            ax.tick_params(labelsize=8)
            ax.set_xlabel({"seconds": "seconds of training"}.get(key, key), fontsize=8)
        axes[0, 0].set_ylabel("C2ST", fontsize=8)
        axes[1, 0].set_ylabel("C2ST", fontsize=8)
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside upper center", ncols=4,
                  fontsize=8, frameon=False)  # fmt: skip
    path.write_bytes(plots.to_png(figure, dpi=160))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tasks", nargs="+", choices=NPE, default=[])
    parser.add_argument("--tables", nargs="+", choices=TABLES, default=[])
    parser.add_argument("--methods", nargs="+", choices=NAMES, default=list(NAMES))
    parser.add_argument("--simulations", nargs="+", type=int, default=list(SIMULATIONS))
    parser.add_argument("--observations", type=int, default=OBSERVATIONS)
    parser.add_argument("--samples", type=int, default=10_000, help="of each posterior")
    parser.add_argument("--budget", type=float, default=10.0, help="seconds on each split")
    parser.add_argument("--max-steps", type=int, help="of cot and pcp, for a trial")
    parser.add_argument("--max-epochs", type=int, help="of npe, for a trial")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the results")
    parser.add_argument("--summary", action="store_true", help="print tables of all results")
    parser.add_argument("--plot", type=Path, metavar="FILE.png")
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    for task in arguments.tasks:
        for count in arguments.simulations:
            for method in arguments.methods:
                if method != "nsf":
                    measure_task(task, method, count, arguments.seed, arguments)
    for name in arguments.tables:
        for method in arguments.methods:
            if method != "npe":
                measure_table(name, method, arguments.seed, arguments)
    if arguments.summary:
        summarize(arguments.out)
    if arguments.plot:
        plot(arguments.out, arguments.plot)


if __name__ == "__main__":
    main()
