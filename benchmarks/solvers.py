"""Time and memory of solving an ODE with a network for its velocity, and of the gradient.

Three tables. "solvers": our fixed and adaptive steps beside torchdiffeq, diffrax, a bare Python
loop and the bare matrix products of the same evaluations, as ratios of one run. "gradients": time,
memory and error of each way to the gradient. "memory": what is kept for the backward pass over the
number of steps.

    python benchmarks/solvers.py [--quick] [--repeats 9] [--threads 1] [--out FILE.json] [--figure]
        [--tables solvers gradients memory] [--compile-steps 10] [--jax-python PATH]

Times are CPU seconds, medians of interleaved repetitions after a warm-up. torchdiffeq is left out
where it is not installed. diffrax runs in a process of its own, started by the interpreter given,
since torch and jax disturb each other's threads.
"""

import argparse
import json
import platform
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor, nn

import pathline as pl
from pathline.integrate.setup import Request
from pathline.integrate.solve import solve as solve_request

try:
    import torchdiffeq
except ImportError:
    torchdiffeq = None

HERE = Path(__file__).parent
FIGURE = HERE.parent / "docs" / "images" / "memory.png"
ADAPTIVE = {"method": "dopri5", "rtol": 1e-5, "atol": 1e-5}
REVERSIBLE = {"method": "asynchronous_leapfrog", "gradient": "reversible"}
MEMORY_STEPS = (16, 64, 256, 1024, 4096)
Variant = Callable[[], object]


@dataclass(frozen=True)
class Problem:
    """A velocity that is a network with tanh, and a state of `rows` samples, over [0, 1]."""

    name: str
    sizes: tuple[int, ...]
    rows: int
    steps: int  # of the fixed-step methods
    memory: int  # bytes, for checkpoints: less than the state of each step needs

    def velocity(self, dtype: torch.dtype = torch.float32) -> "Velocity":
        torch.manual_seed(0)
        return Velocity(self.sizes).to(dtype)

    def start(self, dtype: torch.dtype = torch.float32) -> Tensor:
        generator = torch.Generator().manual_seed(1)
        y0 = torch.randn(self.rows, self.sizes[0], generator=generator)
        return y0.to(dtype).requires_grad_()

    def times(self, steps: int | None = None) -> Tensor:
        return torch.linspace(0.0, 1.0, (steps or self.steps) + 1)


class Velocity(nn.Module):
    """A network of y alone; evaluations are counted."""

    def __init__(self, sizes: tuple[int, ...]) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for a, b in pairwise(sizes):
            layers += [nn.Linear(a, b), nn.Tanh()]
        self.net = nn.Sequential(*layers[:-1])
        self.evaluations = 0

    def forward(self, t: Tensor, y: Tensor) -> Tensor:
        self.evaluations += 1
        return self.net(y)


SMALL = Problem("small", (2, 64, 2), 100, 100, 130_000)
MEDIUM = Problem("medium", (64, 256, 256, 64), 1024, 20, 11_000_000)


# What is timed


def loop(velocity: Velocity, y: Tensor, steps: int) -> Tensor:
    """The classical method as one writes it down."""
    h = 1 / steps
    for n in range(steps):
        t = torch.tensor(n * h)
        k1 = velocity(t, y)
        k2 = velocity(t + h / 2, y + h / 2 * k1)
        k3 = velocity(t + h / 2, y + h / 2 * k2)
        k4 = velocity(t + h, y + h * k3)
        y = y + h / 6 * (k1 + 2 * k2 + 2 * k3 + k4)
    return y


def products(problem: Problem, evaluations: int, backward: bool) -> Variant:
    """The matrix products of so many evaluations, and those of their gradients, alone."""
    pairs = [
        (torch.randn(problem.rows, a), torch.randn(a, b), torch.randn(problem.rows, b))
        for a, b in pairwise(problem.sizes)
    ]

    def run() -> None:
        for _ in range(evaluations):
            for x, weight, dy in pairs:
                x @ weight
                if backward:
                    dy @ weight.mT, x.mT @ dy

    return run


def forward_and_both(solve: Callable[[Tensor], Tensor], problem: Problem) -> tuple[Variant, ...]:
    """A solve without, and one with, the gradient of the mean square at its end."""
    y0 = problem.start()

    @torch.no_grad()
    def forward() -> None:
        solve(y0)

    def both() -> None:
        solve(y0).square().mean().backward()

    return forward, both


def ours(velocity: Any, problem: Problem, **call: Any) -> Callable[[Tensor], Tensor]:
    fixed = call.get("method") != "dopri5"
    t = problem.times() if fixed else problem.times(1)
    return lambda y0: pl.odeint(velocity, y0, t, **call)[-1]


def compiled_pieces(velocity: Velocity, problem: Problem, steps: int) -> Callable[[Tensor], Tensor]:
    """Fixed steps compiled `steps` at a time into one graph, which is called again and again."""
    piece = torch.compile(
        lambda y, t: pl.odeint(lambda t, y: velocity.net(y), y, t, method="rk4")[-1], fullgraph=True
    )
    t = problem.times()
    parts = [t[n : n + steps + 1].clone() for n in range(0, problem.steps, steps)]

    def solve(y: Tensor) -> Tensor:
        for part in parts:
            y = piece(y, part)
        return y

    return solve


def solver_variants(problem: Problem, compile_steps: int) -> dict[str, tuple[Variant, ...]]:
    """Everything that is compared on a problem, as (forward, forward and backward)."""
    v = problem.velocity()
    t, ends = problem.times(), problem.times(1)
    solves: dict[str, Callable[[Tensor], Tensor]] = {
        "rk4, bare loop": lambda y0: loop(v, y0, problem.steps),
        "rk4, discrete": ours(v, problem, method="rk4"),
        "rk4, checkpoint": ours(v, problem, method="rk4", gradient="checkpoint"),
        "rk4, adjoint": ours(v, problem, method="rk4", gradient="adjoint"),
        "leapfrog, discrete": ours(v, problem, method="asynchronous_leapfrog"),
        "leapfrog, reversible": ours(v, problem, **REVERSIBLE),
        "dopri5, discrete": ours(v, problem, **ADAPTIVE),
        "dopri5, checkpoint": ours(v, problem, **ADAPTIVE, gradient="checkpoint"),
        "dopri5, adjoint": ours(v, problem, **ADAPTIVE, gradient="adjoint"),
    }
    if torchdiffeq is not None:
        direct, adjoint = torchdiffeq.odeint, torchdiffeq.odeint_adjoint
        solves |= {
            "rk4, torchdiffeq": lambda y0: direct(v, y0, t, method="rk4")[-1],
            "rk4, torchdiffeq adjoint": lambda y0: adjoint(v, y0, t, method="rk4")[-1],
            "dopri5, torchdiffeq": lambda y0: direct(v, y0, ends, **ADAPTIVE)[-1],
            "dopri5, torchdiffeq adjoint": lambda y0: adjoint(v, y0, ends, **ADAPTIVE)[-1],
        }
    if problem.name == SMALL.name and compile_steps:
        torch._inductor.config.compile_threads = 1
        net = torch.compile(v.net)
        name = f"rk4, compiled {compile_steps} steps at a time"
        solves[name] = compiled_pieces(v, problem, compile_steps)
        solves["dopri5, compiled velocity"] = ours(lambda t, y: net(y), problem, **ADAPTIVE)
    v.evaluations = 0
    solves["dopri5, discrete"](problem.start())
    counts = {"rk4": 4 * problem.steps, "dopri5": v.evaluations}
    variants = {name: forward_and_both(solve, problem) for name, solve in solves.items()}
    for method, count in counts.items():
        pair = products(problem, count, False), products(problem, count, True)
        variants[f"{method}, bare products"] = pair
    return variants


class Diffrax:
    """The solves of diffrax, run and timed by another interpreter."""

    def __init__(self, python: str) -> None:
        command = [python, str(HERE / "solvers_diffrax.py")]
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self.versions = json.loads(self._line())

    def _line(self) -> str:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError("the interpreter given by --jax-python can't run diffrax")
        return line

    def seconds(self, request: dict[str, Any]) -> float:
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        return float(self._line())

    def variants(self, problem: Problem) -> dict[str, tuple[Callable[[], float], ...]]:
        """Functions that return the CPU seconds of one call."""
        adjoints = {"recursive": "RecursiveCheckpointAdjoint", "backsolve": "BacksolveAdjoint"}
        found = {}
        for method in ("rk4", "dopri5"):
            for word, adjoint in adjoints.items():
                request = {
                    "sizes": problem.sizes,
                    "rows": problem.rows,
                    "steps": problem.steps,
                    "method": method,
                    "adjoint": adjoint,
                }
                found[f"{method}, diffrax {word}"] = tuple(
                    lambda request=request, what=what: self.seconds({**request, "what": what})
                    for what in ("forward", "both")
                )
        return found

    def close(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()


# Measuring


def cpu_seconds(function: Callable[[], object]) -> float:
    """CPU time of one call."""
    start = time.process_time()
    function()
    return time.process_time() - start


def interleaved(
    functions: dict[Any, Callable[[], float]], repeats: int
) -> dict[Any, tuple[float, float, float]]:
    """Medians, minima and maxima of what the functions measure, round by round."""
    times: dict[Any, list[float]] = {name: [] for name in functions}
    for repeat in range(-2 if repeats > 2 else -1, repeats):
        for name, function in functions.items():
            elapsed = function()
            if repeat >= 0:  # before that, compilation and warm-up
                times[name].append(elapsed)
    return {name: (statistics.median(x), min(x), max(x)) for name, x in times.items()}


class Held:
    """A tensor that autograd keeps; without its graph, which would hold it in a cycle."""

    def __init__(self, tensor: Tensor) -> None:
        origin = tensor if tensor._base is None else tensor._base
        self.parameter = origin.is_leaf and origin.requires_grad
        self.tensor = tensor.detach()

    def get(self) -> Tensor:
        return self.tensor


def kept_bytes(velocity: Velocity, y0: Tensor, t: Tensor, **call: Any) -> int:
    """What one solve keeps for its backward pass: distinct storages, without parameters.

    What a checkpointed solve keeps is in its plan.
    """
    if call.get("gradient") == "checkpoint":
        return solve_request(Request(velocity, y0, t, **call)).plan.bytes
    alive: WeakSet[Held] = WeakSet()  # graphs made and dropped on the way don't count

    def pack(x: Tensor) -> Held:
        held = Held(x)
        alive.add(held)
        return held

    with torch.autograd.graph.saved_tensors_hooks(pack, Held.get):
        result = pl.odeint(velocity, y0, t, **call)[-1]
    storages = [held.tensor.untyped_storage() for held in alive if not held.parameter]
    del result
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


# The tables


def table_of_solvers(problem: Problem, options: argparse.Namespace) -> dict[str, Any]:
    variants = solver_variants(problem, 0 if options.quick else options.compile_steps)
    functions: dict[Any, Callable[[], float]] = {}
    for name, pair in variants.items():
        for what, function in zip(("forward", "both"), pair, strict=True):
            functions[name, what] = lambda function=function: cpu_seconds(function)
    if options.diffrax is not None:
        for name, pair in options.diffrax.variants(problem).items():
            functions |= dict(zip(((name, "forward"), (name, "both")), pair, strict=True))
    times = interleaved(functions, options.repeats)
    rows: dict[str, Any] = {}
    for name in dict.fromkeys(name for name, _ in functions):
        method = name.split(",")[0].replace("leapfrog", "rk4")
        rows[name] = {}
        for what in ("forward", "both"):
            here = times[name, what][0]
            rows[name][what] = {
                "seconds": times[name, what],
                "times products": here / times[f"{method}, bare products", what][0],
            }
            peer = times.get((f"{method}, torchdiffeq", what))
            if peer is not None:
                rows[name][what]["torchdiffeq / this"] = peer[0] / here
    print(f"\n### {problem.name}: {problem.sizes}, {problem.rows} rows, {problem.steps} steps\n")
    print("| solve | forward ms | x products | torchdiffeq / this | with gradient ms ", end="")
    print("| x products | torchdiffeq / this |\n|---|---|---|---|---|---|---|")
    for name in sorted(rows):
        print(f"| {name} ", end="")
        for what in ("forward", "both"):
            row = rows[name][what]
            print(f"| {1e3 * row['seconds'][0]:.2f} | {row['times products']:.2f} ", end="")
            print(f"| {row.get('torchdiffeq / this', float('nan')):.2f} ", end="")
        print("|")
    return rows


def strategies(problem: Problem) -> dict[str, dict[str, Any]]:
    """The ways to the gradient: the call of each."""
    checkpoint = {"method": "rk4", "gradient": "checkpoint"}
    return {
        "discrete": {"method": "rk4"},
        "checkpoint": checkpoint,
        f"checkpoint in {megabytes(problem.memory)}": {**checkpoint, "memory": problem.memory},
        "adjoint": {"method": "rk4", "gradient": "adjoint"},
        "leapfrog, discrete": {"method": "asynchronous_leapfrog"},
        "leapfrog, reversible": REVERSIBLE,
    }


def gradient_of(problem: Problem, dtype: torch.dtype, call: dict[str, Any]) -> Tensor:
    """The gradient of the mean square at the end for the start and all parameters, as a vector."""
    velocity, y0 = problem.velocity(dtype), problem.start(dtype)
    if "memory" in call:
        call = {**call, "memory": call["memory"] * dtype.itemsize // 4}
    ours(velocity, problem, **call)(y0).square().mean().backward()
    parts = [y0.grad, *(p.grad for p in velocity.parameters())]
    return torch.cat([part.flatten() for part in parts if part is not None]).double()


def table_of_gradients(problem: Problem, options: argparse.Namespace) -> dict[str, Any]:
    calls = strategies(problem)
    velocity = problem.velocity()
    functions = {}
    for name, call in calls.items():
        _, both = forward_and_both(ours(velocity, problem, **call), problem)
        functions[name] = lambda both=both: cpu_seconds(both)
    times = interleaved(functions, options.repeats)
    rows = {}
    for name, call in calls.items():
        want = gradient_of(problem, torch.float64, {"method": call["method"]})
        errors = [
            float((gradient_of(problem, dtype, call) - want).norm() / want.norm())
            for dtype in (torch.float32, torch.float64)
        ]
        rows[name] = {
            "seconds": times[name],
            "time / discrete": times[name][0] / times["discrete"][0],
            "bytes": kept_bytes(velocity, problem.start(), problem.times(), **call),
            "resident bytes": 0 if options.quick else resident_bytes(problem, name),
            "error, float32": errors[0],
            "error, float64": errors[1],
        }
    print(f"\n### Gradients, {problem.name}, {problem.steps} steps\n")
    print("Errors are relative to the discrete gradient of the same method in float64.\n")
    print("| gradient | time / discrete | kept | resident | error, float32 | error, float64 |")
    print("|---|---|---|---|---|---|")
    for name, row in rows.items():
        print(f"| {name} | {row['time / discrete']:.2f} | {megabytes(row['bytes'])} ", end="")
        print(f"| {megabytes(row['resident bytes'])} ", end="")
        print(f"| {row['error, float32']:.1e} | {row['error, float64']:.1e} |")
    return rows


def megabytes(size: float) -> str:
    return f"{size / 1e6:.3g} MB"


def resident_bytes(problem: Problem, strategy: str) -> int:
    """By how much one gradient raises the high-water mark of memory, in a fresh process."""
    command = [sys.executable, __file__, "--resident", problem.name, strategy]
    return int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def print_resident(name: str, strategy: str) -> None:
    problem = {p.name: p for p in (SMALL, MEDIUM)}[name]
    call, velocity, y0 = strategies(problem)[strategy], problem.velocity(), problem.start()
    first = {key: value for key, value in call.items() if key != "memory"}
    pl.odeint(velocity, y0, problem.times(1), **first)[-1].square().mean().backward()
    before = high_water()
    pl.odeint(velocity, y0, problem.times(), **call)[-1].square().mean().backward()
    print(high_water() - before)


def high_water() -> int:
    """The most bytes that were resident so far."""
    status = Path("/proc/self/status")
    if status.exists():  # the other one may begin with the mark of the parent process
        line = next(x for x in status.read_text().splitlines() if x.startswith("VmHWM"))
        return 1024 * int(line.split()[1])
    unit = 1 if sys.platform == "darwin" else 1024
    return unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def table_of_memory(problem: Problem, options: argparse.Namespace) -> dict[str, Any]:
    """Bytes kept for the backward pass, over the number of steps."""
    calls = {
        "discrete": {"method": "rk4"},
        'checkpoint, memory="1MB"': {"method": "rk4", "gradient": "checkpoint", "memory": "1MB"},
        "reversible": REVERSIBLE,
    }
    counts = MEMORY_STEPS[:3] if options.quick else MEMORY_STEPS
    velocity, y0 = problem.velocity(), problem.start()
    rows: dict[str, Any] = {
        name: [kept_bytes(velocity, y0, problem.times(n), **call) for n in counts]
        for name, call in calls.items()
    }
    print(f"\n### Kept for the backward pass, {problem.name}\n")
    print("| steps | " + " | ".join(map(str, counts)) + " |")
    print("|---" * (len(counts) + 1) + "|")
    for name, sizes in rows.items():
        print(f"| {name} | " + " | ".join(map(megabytes, sizes)) + " |")
    if options.figure:
        draw(counts, rows)
    return {"steps": counts, "bytes": rows}


def draw(counts: tuple[int, ...], rows: dict[str, list[int]]) -> None:
    """The figure of the documentation."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(5.0, 3.2), layout="constrained")
    for (name, sizes), marker in zip(rows.items(), "os^", strict=True):
        axes.loglog(counts, [size / 1e6 for size in sizes], marker=marker, label=name)
    axes.set_xlabel("steps")
    axes.set_ylabel("kept for the backward pass, MB")
    axes.set_xticks(counts, [str(n) for n in counts])
    axes.minorticks_off()
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    figure.savefig(FIGURE, dpi=150)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    tables = ("solvers", "gradients", "memory")
    parser.add_argument("--tables", nargs="+", choices=tables, default=tables)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--quick", action="store_true", help="seconds: few repeats, no compilation")
    parser.add_argument("--compile-steps", type=int, default=10, help="0: none; 100 takes minutes")
    parser.add_argument("--jax-python", help="an interpreter that has diffrax")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--figure", action="store_true", help=f"draw {FIGURE.name} for the docs")
    parser.add_argument("--resident", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.resident:
        print_resident(*options.resident)
        return
    problems = SMALL, MEDIUM
    if options.quick:
        options.repeats = 1
        problems = replace(SMALL, steps=10), replace(MEDIUM, rows=64, steps=5, memory=1_000_000)
    print(f"torch {torch.__version__}, {platform.machine()}, {options.threads} threads, ", end="")
    print(f"CPU seconds, medians of {options.repeats}")
    results: dict[str, Any] = {
        "torch": torch.__version__,
        "machine": platform.machine(),
        "threads": options.threads,
        "repeats": options.repeats,
    }
    options.diffrax = None
    if "solvers" in options.tables:
        if options.jax_python:
            options.diffrax = Diffrax(options.jax_python)
            results |= options.diffrax.versions
            print("jax {jax}, diffrax {diffrax}".format(**options.diffrax.versions))
        else:
            print("diffrax is left out: give an interpreter that has it by --jax-python")
        if torchdiffeq is None:
            print("torchdiffeq is left out: it is not installed")
        results["solvers"] = {p.name: table_of_solvers(p, options) for p in problems}
        if options.diffrax is not None:
            options.diffrax.close()
    if "gradients" in options.tables:
        results["gradients"] = {p.name: table_of_gradients(p, options) for p in problems}
    if "memory" in options.tables:
        results["memory"] = table_of_memory(SMALL, options)
    if options.out:
        options.out.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
