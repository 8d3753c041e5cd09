"""Negative log-likelihood against seconds of training, of flows with exact densities.

Pathline's OTFlow with its one default setting (ours), zuko's neural spline flow (nsf) and its
continuous flow (cnf), FFJORD on torchdiffeq (ffjord), and OT-Flow as published (published), on
the same rows and the same cores.

    python benchmarks/training_curves.py --method ours nsf --data moons electricity
    python benchmarks/training_curves.py --summary --plot docs/images/training-curves.png

Needs `pip install 'pathline[bench]'`. Runs that are on file are not repeated. How it measures:

- With `--threads 2` wall seconds, one run at a time on an otherwise idle machine; with one thread
  the CPU seconds of the process, which depend little on what else the machine does. They count
  everything after the imports (those that a first training step makes too) and the loading of the
  data: preparation, training, and choosing the best weights on validation rows.
  The clock stands still while the exact likelihood of the test rows is computed for the curve.
- ours and nsf anneal their learning rate over a budget, so each budget is a run of its own; the
  continuous peers have constant rates (published halves its own, as published), so one run gives
  a curve. ours has one setting for all data. For each peer and data set the learning rate is the
  best of three (nsf: four) on validation rows, by shorter runs that are not counted; and so are,
  for tables, its coordinates, standardised or whitened as OTFlow itself does.
- Single precision in training. Test likelihoods are exact: in double precision, on a time grid
  four times finer than the training's or with tolerance 1e-6, with the exact trace.
- Moons and the other toys are in their own units, tables in standard deviations of the training
  rows. Patches are whitened for all methods alike, with likelihoods in the units of the patches;
  they need the folder PATHLINE_DATA (bsds300_patches), and 2,000 of their test rows are used.
"""

import argparse
import copy
import json
import math
import os
import platform
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import cache
from importlib.metadata import version
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import torch
from peers.ffjord import FFJORD
from peers.peer import Diverged, Peer
from peers.published_otflow import Published, check
from peers.zuko_flows import CNF, MAF, NSF
from torch import Tensor

import pathline as pl
from pathline.data import TOYS, load_electricity, load_uci
from pathline.reproduce.toys import ROWS
from pathline.train import fit

RESULTS = Path(__file__).parent / "results" / "curves"
DATA = (
    "moons", "checkerboard", "8gaussians", "swissroll", "electricity",
    "wine_white", "wine_red", "parkinsons", "concrete", "bsds300",
)  # fmt: skip
METHODS = ("ours", "nsf", "cnf", "ffjord", "published")
BUDGETS = (2.0, 5.0, 10.0, 20.0)
PATCH_BUDGETS = (5.0, 10.0, 20.0, 30.0)
MARKS = (5.0, 10.0, 20.0, 40.0, 80.0, 120.0)
PATCH_MARKS = (20.0, 60.0, 120.0)  # exact traces in 63 dimensions take long
TRIAL = 15.0  # seconds of each learning rate; of a budgeted method its second largest budget
VALIDATIONS = 10  # within a budget
Point = dict[str, float | None]


@dataclass(frozen=True, eq=False)
class Data:
    """Rows in double precision; `offset` turns likelihoods into the units that are reported."""

    name: str
    train: Tensor
    validation: Tensor
    test: Tensor
    offset: float = 0.0

    @property
    def dim(self) -> int:
        return self.train.shape[1]

    def transformed(self, mean: Tensor, scale: Tensor) -> "Data":
        """In the coordinates (x - mean) / scale for standard deviations `scale` (dim,), or
        (x - mean) scale for a whitening matrix."""
        matrix = scale if scale.ndim == 2 else scale.reciprocal().diag()
        log_slope = torch.linalg.slogdet(matrix).logabsdet.item()
        train, validation, test = (
            (x - mean) @ matrix for x in (self.train, self.validation, self.test)
        )
        return Data(self.name, train, validation, test, self.offset - log_slope)

    def standardized(self) -> "Data":
        return self.transformed(self.train.mean(0), self.train.std(0))

    def whitened(self, principal: bool = False) -> "Data":
        """With covariance one, in the principal axes or by the symmetric matrix."""
        values, vectors = torch.linalg.eigh(self.train.mT.cov())
        matrix = vectors / values.sqrt()
        return self.transformed(self.train.mean(0), matrix if principal else matrix @ vectors.mT)


class Missing(Exception):
    """A data set is not on this machine."""


@cache
def load(name: str) -> Data:
    """A data set by its name in `DATA`, the same rows in every process."""
    if name in TOYS:
        generator = torch.Generator().manual_seed(1000)
        train, validation, test = (TOYS[name].sample(rows, generator) for rows in ROWS.values())
        return Data(name, train, validation, test)
    if name == "bsds300":
        return _patches()
    splits = load_electricity() if name == "electricity" else load_uci(name)
    rows = map(torch.from_numpy, (splits.train, splits.validation, splits.test))
    train, validation, test = rows
    return replace(Data(name, train, validation, test).standardized(), offset=0.0)


def _patches() -> Data:
    """Natural image patches, 63 columns: with uniform noise in a grey level, without their mean
    and last pixel (Uria, Murray, Larochelle, RNADE, 2013)."""
    path = Path(os.environ.get("PATHLINE_DATA", "")) / "bsds300_patches" / "bsds300_patches.npz"
    if not path.exists():
        raise Missing(f"the folder PATHLINE_DATA has no {path.parent.name}/{path.name}")
    generator = np.random.default_rng(0)
    parts = []
    with np.load(path, allow_pickle=False) as file:
        for key in ("train", "val", "test"):
            pixels = generator.permutation(file[key])
            x = (pixels + generator.random(pixels.shape)) / 256
            parts.append(torch.from_numpy((x - x.mean(1, keepdims=True))[:, :-1]))
    train, validation, test = parts
    return Data("bsds300", train, validation, test[:2000]).whitened(principal=True)


class Clock:
    """Seconds without the pauses: of this process's CPU on one thread, else of the wall."""

    def __init__(self) -> None:
        self.now = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
        self.start = self.now()

    @property
    def seconds(self) -> float:
        return self.now() - self.start

    @contextmanager
    def paused(self) -> Iterator[None]:
        before = self.now()
        yield
        self.start += self.now() - before


def make(method: str, data: Data) -> Peer:
    """An untrained peer, with initial weights from torch's global generator."""
    if method == "nsf":
        return NSF(data.dim, 128 if data.name == "bsds300" else 64)
    if method == "published":
        return Published(data.name, data.dim)
    return {"cnf": CNF, "ffjord": FFJORD, "maf": MAF}[method](data.dim)


def evaluate(peer: Peer, data: Data) -> Point:
    """Test likelihood, exactly and on the time grid of the training."""
    fine = copy.deepcopy(peer).double()
    chunks = data.test.split(max(200, 40_000 // data.dim))
    result: Point = {}
    functions: dict[str, Callable[[Tensor], Tensor]] = {"nll": fine.exact}
    if fine.on_training_grid is not None:
        functions["nll_training_grid"] = fine.on_training_grid
    for name, function in functions.items():
        with torch.no_grad():
            try:
                nll = torch.cat([function(y) for y in chunks]).mean().item() + data.offset
            except Diverged:
                nll = math.inf
        result[name] = nll if math.isfinite(nll) else None
    return result


@dataclass(frozen=True)
class Setting:
    """What is chosen for each peer and data set."""

    rate: float
    whiten: bool = False


def train(
    method: str, data: Data, setting: Setting, seed: int, stop: float, marks: Sequence[float]
) -> tuple[list[Point], float]:
    """Train a peer for `stop` CPU seconds; points of its curve at the seconds `marks`, and the
    best validation likelihood."""
    torch.manual_seed(seed)
    clock = Clock()
    peer = make(method, data)
    if data.name not in peer.raw:
        data = data.whitened() if setting.whiten else data.standardized()
    rows = data.train.float()
    held = data.validation[: 2000 if peer.cosine else 1000 if data.dim <= 30 else 300].float()
    looks = [stop * (i + 1) / VALIDATIONS for i in range(VALIDATIONS)] if peer.cosine else marks
    looks, ahead = list(looks or [stop]), list(marks)
    optimizer = torch.optim.Adam(peer.parameters(), lr=setting.rate)
    points: list[Point] = []
    best, weights, step = math.inf, copy.deepcopy(peer.state_dict()), 0
    batch = rows[:0]
    while True:
        if looks and clock.seconds >= looks[0]:
            peer.eval()
            with torch.no_grad():
                try:
                    nll = peer.validate(held).mean().item() + data.offset
                except Diverged:
                    nll = math.inf
            peer.train()
            if nll < best:
                best, weights = nll, copy.deepcopy(peer.state_dict())
            seconds = clock.seconds
            looks = [look for look in looks if look > seconds]
            if ahead and seconds >= ahead[0]:
                with clock.paused():
                    chosen = copy.deepcopy(peer)
                    chosen.load_state_dict(weights)
                    result = evaluate(chosen.eval(), data)
                reached = max(mark for mark in ahead if mark <= seconds)
                ahead = [mark for mark in ahead if mark > seconds]
                point: Point = {
                    "budget": reached,
                    "seconds": seconds,
                    "steps": step,
                    "validation": best,
                }
                points.append(point | result)
        elapsed = clock.seconds
        if elapsed >= stop and not looks:
            return points, best
        factor = 0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * min(elapsed / stop, 1)))
        for group in optimizer.param_groups:
            group["lr"] = peer.rate(setting.rate, step) * (factor if peer.cosine else 1.0)
        if step % peer.sample_every == 0:
            batch = rows[torch.randint(len(rows), (min(peer.batch, len(rows)),))]
        optimizer.zero_grad()
        try:
            loss = peer.loss(batch)
            loss.backward()
            if not loss.isfinite():
                raise Diverged(f"the loss is {loss.item()}")
        except Diverged as reason:
            print(f"{data.name} {method} {setting} stops after {step} steps: {reason}")
            return points, best
        optimizer.step()
        step += 1


def train_ours(data: Data, seed: int, budget: float) -> Point:
    """One run of `fit` with its defaults."""
    wall, clock = time.perf_counter(), Clock()
    start = torch.Generator().manual_seed(seed)
    flow = pl.flows.OTFlow(data.dim, generator=start)
    run = fit(
        flow, data.train, validation=data.validation, budget=budget, seed=seed, progress=False
    )
    point: Point = {"budget": budget, "seconds": clock.seconds, "steps": run.steps}
    point["wall"] = time.perf_counter() - wall
    fine = copy.deepcopy(flow).double()
    grids = {"nll": 4 * flow.steps, "nll_training_grid": run.metrics["train_time_steps"]}
    for name, fine.steps in grids.items():
        with torch.no_grad():
            point[name] = -fine.log_prob(data.test).mean().item() + data.offset
    return point


@cache
def warm_up() -> None:
    """Let torch and Pathline import what they import in a first training step."""
    fit(pl.flows.OTFlow(2), torch.randn(1000, 2), max_steps=2, progress=False)


def choose(method: str, data: Data, folder: Path) -> Setting:
    """The peer's best setting on validation rows, kept on file."""
    path = folder / f"{data.name}-{method}-settings.json"
    trials: list[dict[str, Any]] = json.loads(path.read_text()) if path.exists() else []
    if not trials:
        patches, table = data.name == "bsds300", data.name not in (*TOYS, "bsds300")
        stop = (PATCH_BUDGETS if patches else BUDGETS)[-2] if method == "nsf" else TRIAL
        for rate in make(method, data).rates:
            for whiten in (False, True) if table else (False,):
                nll = train(method, data, Setting(rate, whiten), 0, stop, ())[1]
                found = nll if math.isfinite(nll) else None
                trials.append({"rate": rate, "whiten": whiten, "validation": found})
                print(data.name, method, trials[-1], flush=True)
        write(path, trials)
    best = min((t for t in trials if t["validation"] is not None), key=lambda t: t["validation"])
    return Setting(best["rate"], best["whiten"])


def write(path: Path, content: object) -> None:
    """JSON that is whole or not there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(f".{os.getpid()}.tmp")
    temporary.write_text(json.dumps(content, indent=1) + "\n")
    os.replace(temporary, path)


def measure(method: str, name: str, seed: int, budgets: Sequence[float], folder: Path) -> None:
    """All points of a method on a data set with a seed, those that are not on file."""
    data = load(name)
    path = folder / f"{name}-{method}-seed{seed}.json"
    points: list[Point] = json.loads(path.read_text())["points"] if path.exists() else []
    budgeted = method in ("ours", "nsf")
    missing = [budget for budget in budgets if budget not in {p["budget"] for p in points}]
    if not missing or (points and not budgeted):
        return
    warm_up()
    setting = None if method == "ours" else choose(method, data, folder)
    for marks in [[budget] for budget in missing] if budgeted else [missing]:
        if setting is None:
            new = [train_ours(data, seed, marks[0])]
        else:
            new = train(method, data, setting, seed, marks[-1], marks)[0]
        points = sorted([*points, *new], key=lambda point: point["budget"] or 0)
        for point in new:
            print(name, method, seed, json.dumps(point), flush=True)
        packages = ("torch", "zuko", "torchdiffeq")
        about = {
            "method": method,
            "data": name,
            "seed": seed,
            "threads": torch.get_num_threads(),
            "setting": setting and asdict(setting),
            "points": points,
            "versions": {name: version(name) for name in packages} | {"pathline": pl.__version__},
            "machine": platform.machine(),
        }
        write(path, about)


# (data, method): for each budget, the seconds taken and the likelihoods, over the seeds
Curves = dict[tuple[str, str], dict[float, tuple[list[float], list[float]]]]


def read(folder: Path) -> Curves:
    """All results on file."""
    curves: Curves = {}
    for path in sorted(folder.glob("*-seed*.json")):
        run: dict[str, Any] = json.loads(path.read_text())
        curve = curves.setdefault((run["data"], run["method"]), {})
        for point in run["points"]:
            if point["nll"] is not None:
                taken, values = curve.setdefault(point["budget"], ([], []))
                taken.append(point["seconds"])
                values.append(point["nll"])
    return curves


def verdict(mine: list[float], theirs: list[float]) -> str:
    """Ahead or behind by more than the spread of the seeds of either."""
    spread = max(max(values) - min(values) for values in (mine, theirs))
    gap = fmean(mine) - fmean(theirs)
    return "level" if abs(gap) <= spread else "ahead" if gap < 0 else "behind"


def truth(name: str) -> float | None:
    """What the true density of a toy scores on the test rows: its entropy but for their number."""
    return -TOYS[name].log_prob(load(name).test).mean().item() if name in TOYS else None


def summarize(curves: Curves) -> None:
    """Means and half ranges over seeds, each against nsf with the same budget."""
    for name in DATA:
        found = {method: curves[name, method] for method in METHODS if (name, method) in curves}
        if not found:
            continue
        best = truth(name)
        print(f"\n{name}" + ("" if best is None else f" (true density {best:.4f})"))
        for method, curve in found.items():
            for budget, (taken, values) in sorted(curve.items()):
                half = (max(values) - min(values)) / 2
                line = f"  {method:<10}{budget:>5g} s  {fmean(values):>9.4f} +- {half:.4f}"
                rival = found.get("nsf", {}).get(budget)
                if rival and method != "nsf":
                    line += f"  {verdict(values, rival[1])}"
                print(f"{line}  ({len(values)} seeds, {fmean(taken):.1f} s taken)")


def plot(curves: Curves, path: Path) -> None:
    """A panel for each data set, seconds in a logarithmic scale."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    names = [name for name in DATA if any(key[0] == name for key in curves)]
    across = min(len(names), 3)
    down = -(-len(names) // across)
    figure, axes = plt.subplots(
        down, across, figsize=(4 * across, 3.2 * down), squeeze=False, layout="constrained"
    )
    labels = ("Pathline OTFlow", "neural spline flow", "zuko CNF", "FFJORD", "published OT-Flow")
    for ax, name in zip(axes.flat, names, strict=False):
        shown: list[float] = []
        for i, method in enumerate(METHODS):
            curve = curves.get((name, method), {})
            if not curve:
                continue
            runs = [curve[budget] for budget in sorted(curve)]
            seconds = [fmean(taken) for taken, _ in runs]
            means = [fmean(values) for _, values in runs]
            ends = [[end(values) for _, values in runs] for end in (min, max)]
            style = {"color": f"C{i}", "zorder": 9 - i}
            ax.plot(seconds, means, "o-", label=labels[i], markersize=3.5, **style)
            ax.fill_between(seconds, *ends, alpha=0.2, linewidth=0, **style)
            shown += means if method in ("ours", "nsf") else [min(means)]
        best = truth(name)
        if best is not None:
            ax.axhline(best, color="black", linewidth=0.8, linestyle=":", label="true density")
            shown.append(best)
        low, high = min(shown), max(shown)
        ax.set_ylim(low - 0.08 * (high - low), high + 0.15 * (high - low))
        ax.set_xscale("log")
        ticks = [2, 5, 10, 20, 40, 80]
        ax.set_xticks(ticks, [str(tick) for tick in ticks])
        ax.minorticks_off()
        ax.set_title(name, fontsize=10)
    for ax in axes.flat[len(names) :]:
        ax.set_axis_off()
    figure.supxlabel("seconds of training")
    figure.supylabel("negative log-likelihood of test rows, nats")
    handles: dict[str, Any] = {}
    for ax in axes.flat:
        for handle, label in zip(*ax.get_legend_handles_labels(), strict=True):
            handles.setdefault(label, handle)
    figure.legend(handles.values(), handles, loc="outside upper center", ncols=3, fontsize=9)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)


def check_peers() -> None:
    """The published flow has Pathline's objective and gradients, and both peers with a trace of
    their own the log-determinant of the brute-force Jacobian of their map."""
    torch.manual_seed(0)
    for dim, width in ((1, 3), (2, 5), (4, 7)):
        flow = pl.flows.OTFlow(dim, width, train_steps=3, transport=0.01, hjb=0.1).double()
        for parameter in flow.potential.parameters():
            torch.nn.init.normal_(parameter, std=0.3)
        y = torch.randn(16, dim, dtype=torch.float64)
        difference = check(flow.potential, flow.objective()(y).total, y)
        assert difference < 1e-10, difference
        print(f"published objective and gradients, d={dim}: relative difference {difference:.1e}")
    y = torch.randn(3, 3, dtype=torch.float64)
    ffjord, published = FFJORD(3).double(), Published("tables", 3).double()
    torch.nn.init.normal_(published.flow.potential.w)
    published.nt = 16
    velocities: dict[Peer, Callable[[float, Tensor], Tensor]] = {
        ffjord: lambda t, z: ffjord.velocity.net(torch.tensor(t).to(z), z),
        published: published.flow.velocity,
    }
    for peer, velocity in velocities.items():

        def mapped(row: Tensor, velocity: Callable[..., Tensor] = velocity) -> Tensor:
            return plain_rk4(velocity, row[None], 64)[0]

        with torch.no_grad():
            nll = peer.exact(y)
        for row, value in zip(y, nll, strict=True):
            J = torch.autograd.functional.jacobian(mapped, row)
            z = mapped(row).detach()
            want = 0.5 * z @ z + 1.5 * math.log(2 * math.pi) - torch.linalg.slogdet(J).logabsdet
            assert (value - want).abs() < 1e-4, (type(peer).__name__, value, want)
        print(f"{type(peer).__name__}: log-determinant equals the brute-force one")


def plain_rk4(velocity: Callable[[float, Tensor], Tensor], z: Tensor, steps: int) -> Tensor:
    """Where dz/dt = velocity(t, z) moves `z` from time 0 to 1."""
    h = 1 / steps
    for n in range(steps):
        t = n * h
        k1 = velocity(t, z)
        k2 = velocity(t + h / 2, z + h / 2 * k1)
        k3 = velocity(t + h / 2, z + h / 2 * k2)
        k4 = velocity(t + h, z + h * k3)
        z = z + h / 6 * (k1 + 2 * k2 + 2 * k3 + k4)
    return z


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--method", nargs="+", choices=METHODS, default=[])
    parser.add_argument("--data", nargs="+", choices=DATA, default=list(DATA))
    parser.add_argument("--seeds", type=int, help="default 3, of a continuous peer 1 (moons 3)")
    parser.add_argument("--budgets", type=float, nargs="+", help="seconds")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the results")
    parser.add_argument("--summary", action="store_true", help="print the table of all results")
    parser.add_argument("--plot", type=Path, metavar="FILE.png")
    parser.add_argument("--check", action="store_true", help="check the peers' mathematics")
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    if arguments.check:
        check_peers()
    for method in arguments.method:
        for name in arguments.data:
            budgeted, patches = method in ("ours", "nsf"), name == "bsds300"
            seconds: Sequence[float] = PATCH_MARKS if patches else MARKS
            if budgeted:
                seconds = PATCH_BUDGETS if patches else BUDGETS
            seeds = arguments.seeds or (3 if budgeted or name == "moons" else 1)
            try:
                for seed in range(seeds):
                    measure(method, name, seed, arguments.budgets or seconds, arguments.out)
            except Missing as reason:
                print(f"{name} left out: {reason}")
    if arguments.summary:
        summarize(read(arguments.out))
    if arguments.plot:
        plot(read(arguments.out), arguments.plot)


if __name__ == "__main__":
    main()
