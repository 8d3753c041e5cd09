"""How the time of potential flows grows with columns, width, threads and processes.

Tables of `--parts` (default: all), each with ratios to what it is compared with in the same run:

- evaluation: gradient and exact Laplacian in closed form, alone by PyTorch and within a log-density
  (per Laplacian, with the 2.5 gradients that come with it), against the gradient with one
  Hutchinson probe, and with the exact trace, by automatic differentiation of the same potential.
- exponents: time of a training step over columns and over width, exact and with a probe, with
  the slopes fitted to the upper half of a log-log plot (`--plot FILE.png`).
- log-density: of 500 rows with 43 columns, against the exact traces of FFJORD on torchdiffeq and
  of zuko's continuous flow with the same hidden width, each trained for half a minute on the first
  1,523 rows of MINIBOONE (the folder PATHLINE_DATA has them).
- threads, processes: time of a training step.

    python benchmarks/scaling.py [--parts evaluation exponents] [--plot FILE.png] [--out FILE.json]

Needs `pip install 'pathline[bench]'`.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import zuko
from peers.ffjord import FFJORD, Velocity
from peers.zuko_flows import CNF
from torch import Tensor

import pathline as pl
from pathline.control import rollout
from pathline.flows import Transport
from pathline.nets import Potential

ROWS = 512
COLUMNS = (2, 4, 8, 16, 32, 64, 128, 256, 400)
WIDTHS = (16, 32, 64, 128, 256)


def milliseconds(function: Callable[[], object], repeats: int = 7) -> float:
    """Median wall time of a call, after one that is not counted."""
    times = []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        function()
        times.append(1e3 * (time.perf_counter() - start))
    return statistics.median(times[1:])


def evaluation(width: int = 64) -> dict[int, dict[str, float]]:
    """ms of one evaluation, by columns."""
    found = {}
    for dim in COLUMNS:
        phi = Potential(dim, width, generator=torch.Generator().manual_seed(0))
        x, t = torch.randn(ROWS, dim), torch.tensor(0.5)
        signs = torch.randint(0, 2, x.shape) * 2.0 - 1

        def exact(phi: Potential = phi, x: Tensor = x, t: Tensor = t) -> None:
            with torch.no_grad():
                phi.derivatives(x, t, value=False)

        def density(steps: int, phi: Potential = phi, x: Tensor = x) -> None:
            with torch.no_grad(), pl.native.threads(torch.get_num_threads()):
                rollout(Transport(phi.dim), phi, x, steps=steps)

        def gradient(phi: Potential = phi, x: Tensor = x, t: Tensor = t) -> tuple[Tensor, Tensor]:
            z = x.clone().requires_grad_()
            (g,) = torch.autograd.grad(phi(z, t).sum(), z, create_graph=True)
            return g, z

        def probe(gradient: Callable = gradient, signs: Tensor = signs) -> None:
            g, z = gradient()
            torch.autograd.grad(g, z, signs)

        def automatic(gradient: Callable = gradient, dim: int = dim) -> None:
            g, z = gradient()
            for k in range(dim):
                torch.autograd.grad(g[:, k].sum(), z, retain_graph=True)

        found[dim] = {
            "exact": milliseconds(exact, 15),
            "exact, in a log-density": (
                milliseconds(lambda density=density: density(8), 15)
                - milliseconds(lambda density=density: density(4), 15)
            )
            / 8,
            "probe by AD": milliseconds(probe, 15),
            "exact by AD": milliseconds(automatic, 3) if dim <= 128 else float("nan"),
        }
    return found


def training_step(dim: int, width: int, trace: str) -> float:
    """ms of loss and gradient of a batch on four time steps."""
    flow = pl.flows.OTFlow(dim, width, 2, trace=trace, train_steps=4)
    objective, x = flow.objective(), torch.randn(ROWS, dim).double()

    def step() -> None:
        objective.zero_grad()
        objective(x).total.backward()

    return milliseconds(step, 3)


def exponents() -> dict[str, dict[str, Any]]:
    """Times over columns at width 64 and over width at 16 columns, and their slopes."""
    found: dict[str, dict[str, Any]] = {}
    for name, values in (("columns", COLUMNS), ("width", WIDTHS)):
        for trace in ("exact", "probe"):
            times = [
                training_step(*((v, 64) if name == "columns" else (16, v)), trace) for v in values
            ]
            found[f"{trace} over {name}"] = {"x": values, "ms": times}
    below = [d for d in COLUMNS if 8 <= d <= 64]
    exact = found["exact over columns"]
    found["exact over columns"]["slope up to the width"] = slope(below, exact["ms"][2:6])
    for record in found.values():
        half = len(record["x"]) // 2
        record["slope"] = slope(record["x"][half:], record["ms"][half:])
    return found


def slope(x: Any, y: Any) -> float:
    """Of the line through the logarithms."""
    return float(np.polyfit(np.log(x), np.log(y), 1)[0])


def log_density(width: int = 128, rows: int = 500, budget: float = 30.0) -> dict[str, float]:
    """ms of all rows, without gradients."""
    path = Path(os.environ.get("PATHLINE_DATA", ""), "miniboone_partial/miniboone_first1523.npz")
    if not path.exists():
        print(f"log-density left out: the folder PATHLINE_DATA has no {path.name}")
        return {}
    with np.load(path, allow_pickle=False) as file:
        table = torch.from_numpy(file["x"])
    table = ((table - table.mean(0)) / table.std(0)).float()
    x, dim = table[:rows], table.shape[1]
    torch.manual_seed(0)
    flow = pl.flows.OTFlow(dim, width, 2)
    pl.fit(flow, table, budget=budget, progress=False)
    ffjord, cnf = FFJORD(dim), CNF(dim)
    ffjord.velocity = Velocity(dim, (width, width))
    cnf.flow = zuko.flows.CNF(dim, hidden_features=(width, width), exact=False)
    for peer in (ffjord, cnf):
        adam, start = torch.optim.Adam(peer.parameters(), 3e-3), time.perf_counter()
        while time.perf_counter() - start < budget:
            adam.zero_grad()
            peer.loss(table[torch.randint(len(table), (512,))]).backward()
            adam.step()
    with torch.no_grad():
        return {
            f"OTFlow, {flow.steps} time steps": milliseconds(lambda: flow.log_prob(x)),
            "FFJORD, dopri5 at 1e-5": milliseconds(lambda: ffjord.exact(x, 1e-5), 1),
            "zuko CNF, at 1e-5": milliseconds(lambda: cnf.exact(x, 1e-5), 1),
        }


def threads() -> dict[str, list[float]]:
    """ms of a training step on 1, 2, ... threads."""
    before, found = torch.get_num_threads(), {}
    for dim, width in ((2, 32), (6, 64), (43, 128)):
        found[f"{dim} columns, width {width}"] = times = []
        for count in range(1, before + 1):
            with pl.native.threads(count):
                torch.set_num_threads(1)
                times.append(training_step(dim, width, "exact"))
        torch.set_num_threads(before)
    return found


def processes() -> dict[str, float]:
    """Seconds of 300 steps with 4,096 rows of 6 columns, in processes of one thread."""
    found = {}
    x = np.random.default_rng(0).normal(size=(20_000, 6))
    for count in (1, 2):
        with tempfile.TemporaryDirectory() as folder:
            np.save(f"{folder}/x.npy", x)
            command = (
                f"fit density {folder}/x.npy --out {folder}/run --max-steps 300 --batch-size 4096 "
                f"--devices {count} --strategy {'ddp' if count > 1 else 'auto'}"
            )
            run_command(command)
            metrics = json.loads(Path(folder, "run", "metrics.json").read_text())
            found[f"{count} processes"] = metrics["seconds"]
    return found


def run_command(command: str) -> None:
    """`pathline COMMAND` in a process with one thread."""
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    subprocess.run(
        [sys.executable, "-m", "pathline", *command.split()],
        check=True,
        capture_output=True,
        env=environment,
    )


def plot(step: dict[str, dict[str, Any]], single: dict[int, dict[str, float]], path: Path) -> None:
    """Times over columns and over width on logarithmic axes."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4), layout="constrained")
    left, middle, right = figure.subplots(1, 3)
    for name in next(iter(single.values())):
        left.loglog(list(single), [row[name] for row in single.values()], "o-", label=name)
    left.set(title="one evaluation, width 64", xlabel="columns", ylabel="ms")
    for axes, name, ticks in ((middle, "columns", COLUMNS), (right, "width", WIDTHS)):
        for trace in ("exact", "probe"):
            record = step[f"{trace} over {name}"]
            label = f"{trace}, slope {record['slope']:.2f}"
            axes.loglog(record["x"], record["ms"], "o-", label=label)
        axes.set(title="training step", xlabel=name)
        axes.set_xticks(ticks[:: len(ticks) // 4], map(str, ticks[:: len(ticks) // 4]))
    left.set_xticks(COLUMNS[::2], map(str, COLUMNS[::2]))
    for axes in (left, middle, right):
        low, high = axes.get_ylim()
        axes.set_ylim(low, 5 * high)  # room for the legend
        axes.minorticks_off()
        axes.legend(frameon=False, loc="upper left", fontsize=9)
    figure.savefig(path, dpi=150)


def main() -> None:
    parts = {
        "evaluation": evaluation,
        "exponents": exponents,
        "log-density": log_density,
        "threads": threads,
        "processes": processes,
    }
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--parts", nargs="+", choices=parts, default=list(parts))
    parser.add_argument("--plot", type=Path, metavar="FILE.png")
    parser.add_argument("--out", type=Path, metavar="FILE.json")
    arguments = parser.parse_args()
    results: dict[str, Any] = {}
    for name in arguments.parts:
        results[name] = parts[name]()
        print(name)
        for key, value in results[name].items():
            print(f"    {key}: {json.dumps(value)}", flush=True)
        if arguments.out:
            arguments.out.write_text(json.dumps(results, indent=1) + "\n")
    if arguments.plot:
        plot(results["exponents"], results["evaluation"], arguments.plot)


if __name__ == "__main__":
    main()
