"""Mean-field games: time of an iteration against the published ones, over the dimension, and
optimisers.

Parts (`--parts`, default: all):

- published: loss and gradient of optimal transport with the published network (width 16, two
  layers), time steps (2), samples and precision (double), against the seconds for an iteration that
  Ruthotto et al., PNAS 2020 (arXiv 1912.01825), table 1, print for "a standard work station"; an
  iteration of their BFGS has one gradient and the values of a line search.
  Ours are seconds of processor time on one thread, which a busy machine does not change much.
- scaling: the same over the dimension at equal samples, with the slope of a log-log plot
  (`--plot FILE.png`), beside a bare matrix product of the same size in the same run.
- optimizers: optimal transport in two dimensions by Adam and by L-BFGS within equal seconds
  (`--budget`); the cost is judged on 20,000 fresh samples and 32 time steps (the optimum is 10.67).

    python benchmarks/games.py [--parts published scaling] [--threads 2] [--out FILE.json]
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from pathline.control import ValueObjective, solve
from pathline.games.problems import GAMES

PUBLISHED = {2: (2304, 2.0), 10: (6400, 8.3), 50: (16384, 81.8), 100: (36864, 301.0)}
DIMENSIONS = (2, 5, 10, 20, 50, 100)
SAMPLES = 2048


def seconds(function: Callable[[], object], repeats: int = 3) -> float:
    """Median processor time of a call, after one that is not counted."""
    times = []
    for _ in range(repeats + 1):
        start = time.process_time()
        function()
        times.append(time.process_time() - start)
    return statistics.median(times[1:])


def step(dim: int, samples: int, *, steps: int = 2, double: bool = True) -> Callable[[], None]:
    """Loss and gradient at the published setting."""
    game, weights = GAMES["transport"].make(dim=dim), GAMES["transport"].settings["weights"]
    policy = game.policy(16, 2, generator=torch.Generator().manual_seed(0))
    if double:
        policy.double()
    objective = ValueObjective(policy, steps, weights)
    x = game.initial(samples, torch.Generator().manual_seed(0))

    def run() -> None:
        policy.zero_grad()
        objective(x).total.backward()

    return run


def published() -> dict[str, Any]:
    found = {}
    for dim, (samples, theirs) in PUBLISHED.items():
        ours = seconds(step(dim, samples))
        found[str(dim)] = {
            "samples": samples, "published": theirs, "ours": ours, "ratio": theirs / ours
        }  # fmt: skip
        print(f"d = {dim:3}: published {theirs} s, ours {ours:.3f} s, ratio {theirs / ours:.1f}")
    return found


def scaling(plot: Path | None) -> dict[str, Any]:
    times, bare = [], []
    for dim in DIMENSIONS:
        times.append(seconds(step(dim, SAMPLES, double=False)))
        a, K = torch.randn(SAMPLES, dim + 1), torch.randn(dim + 1, 16)
        bare.append(seconds(lambda a=a, K=K: [a @ K for _ in range(100)]) / 100)
        print(f"d = {dim:3}: {1e3 * times[-1]:.1f} ms, {times[-1] / bare[-1]:.0f} bare products")
    slopes = {
        "all": float(np.polyfit(np.log(DIMENSIONS), np.log(times), 1)[0]),
        "from 10": float(np.polyfit(np.log(DIMENSIONS[2:]), np.log(times[2:]), 1)[0]),
    }
    print("exponents", slopes)
    if plot:
        from pathline.plots import curves

        lines = {"loss and gradient": (DIMENSIONS, times), "a bare product": (DIMENSIONS, bare)}
        figure = curves(lines, "dimension", "seconds", "A training step over the dimension")
        figure.axes[0].set(xscale="log", yscale="log")
        figure.savefig(plot)
    return {"dimensions": DIMENSIONS, "seconds": times, "product": bare, "exponents": slopes}


def optimizers(budget: float) -> dict[str, Any]:
    found = {}
    for name, options in {
        "adam": {},
        "lbfgs": {"optimizer": "lbfgs", "double": True, "batch_size": 2048},
    }.items():
        game, chosen = GAMES["transport"].make(dim=2), dict(GAMES["transport"].settings)
        chosen.pop("max_steps", None)
        policy = solve(game, **chosen | options, budget=budget, progress=False)
        x = game.initial(20_000, torch.Generator().manual_seed(1))
        found[name] = {**policy.cost(x), "steps": policy.run.steps, "seconds": policy.run.seconds}
        print(name, {key: round(value, 3) for key, value in found[name].items()})
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--parts", nargs="+", default=["published", "scaling", "optimizers"])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--budget", type=float, default=60)
    parser.add_argument("--plot", type=Path)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/games.json"))
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    found = json.loads(arguments.out.read_text()) if arguments.out.exists() else {}
    parts: dict[str, Callable[[], dict[str, Any]]] = {
        "published": published,
        "scaling": lambda: scaling(arguments.plot),
        "optimizers": lambda: optimizers(arguments.budget),
    }
    for part in arguments.parts:
        found[part] = parts[part]()
        arguments.out.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
