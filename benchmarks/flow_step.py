"""Time of one training step and of one log-density evaluation of OT-Flow.

Prints each as a ratio to the bare matrix products of the same evaluations, measured in the same
run, and to a plain implementation with per-sample Jacobians and automatic differentiation.

    python benchmarks/flow_step.py [--repeats 5] [--threads N] [--out FILE.json]
"""

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

import pathline as pl

# dim, width, rows, time steps that are timed (cost is linear in them), rows of the plain version
SHAPES = {
    "toy": (2, 32, 2048, 8, 2048),
    "POWER": (6, 128, 2000, 2, 2000),
    "MINIBOONE": (43, 256, 2000, 1, 2000),
    "BSDS300": (63, 512, 300, 1, 300),
}


def plain_loss(flow: pl.flows.OTFlow, y: Tensor, steps: int) -> Tensor:
    """The objective as one writes it down: log-cosh by its formula, (batch, width, dim) Jacobians
    and Laplacians at all four stages, derivatives of everything by automatic differentiation."""
    phi = flow.potential
    first, second = phi.layers
    K0 = first.weight[:, : phi.dim]

    def rates(t: Tensor, z: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        s = torch.cat([z, t.expand(len(z), 1)], 1)
        opening = first(s)
        u = opening.abs() + torch.log1p(torch.exp(-2 * opening.abs()))
        inner = second(u)
        z1 = phi.w + (torch.tanh(inner) * phi.w) @ second.weight
        grad = (torch.tanh(opening) * z1) @ first.weight + (s @ phi.A.mT) @ phi.A + phi.b
        J = torch.tanh(opening)[:, :, None] * K0
        P = second.weight @ J
        laplacian = (
            ((1 - torch.tanh(opening) ** 2) * z1 * K0.square().sum(1)).sum(1)
            + ((1 - torch.tanh(inner) ** 2) * phi.w * P.square().sum(2)).sum(1)
            + phi.A[:, : phi.dim].square().sum()
        )
        dz = -grad[:, : phi.dim]
        cost = 0.5 * dz.square().sum(1)
        return dz, -laplacian, cost, (grad[:, phi.dim] - cost).abs()

    h, z = 1 / steps, y
    sums = [torch.zeros(len(y)) for _ in range(3)]
    for n in range(steps):
        t = torch.tensor(n * h)
        k1 = rates(t, z)
        k2 = rates(t + h / 2, z + h / 2 * k1[0])
        k3 = rates(t + h / 2, z + h / 2 * k2[0])
        k4 = rates(t + h, z + h * k3[0])
        z = z + h / 6 * (k1[0] + 2 * k2[0] + 2 * k3[0] + k4[0])
        for i in range(3):
            sums[i] = sums[i] + h / 6 * (k1[i + 1] + 2 * k2[i + 1] + 2 * k3[i + 1] + k4[i + 1])
    log_det, cost, hjb = sums
    nll = flow.problem.terminal_cost(z) - log_det
    return (nll + flow.transport * cost + flow.hjb * hjb).mean()


def bare_products(dim: int, width: int, rows: int, steps: int) -> Callable[[], None]:
    """The matrix products of one forward evaluation of our objective, and nothing else."""
    s, u = torch.randn(rows, dim + 1), torch.randn(rows, width)
    K0, K1, B = (
        torch.randn(width, dim + 1), torch.randn(width, width), torch.randn(dim * width, width)
    )  # fmt: skip
    tile = max(512, 2**20 // len(B))
    velocities, laplacians = 5 * steps + 1, 2 * steps + 1

    def run() -> None:
        for _ in range(velocities):
            s @ K0.mT, u @ K1.mT, u @ K1, u @ K0
        for _ in range(laplacians):
            for start in range(0, rows, tile):
                u[start : start + tile] @ B.mT

    return run


def seconds(function: Callable[[], object]) -> float:
    """Wall time of one call."""
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def measure(name: str, repeats: int) -> dict[str, object]:
    """Medians [minimum, maximum] of interleaved repetitions, and their ratios."""
    dim, width, rows, steps, plain_rows = SHAPES[name]
    torch.manual_seed(0)
    flow = pl.flows.OTFlow(dim, width, train_steps=steps, steps=steps)
    y = torch.randn(rows, dim)
    objective = flow.objective()
    adam = torch.optim.Adam(flow.parameters())

    def step() -> None:
        adam.zero_grad()
        objective(y).total.backward()
        adam.step()

    def plain_step() -> None:
        adam.zero_grad()
        plain_loss(flow, y[:plain_rows], steps).backward()
        adam.step()

    @torch.no_grad()
    def log_prob() -> None:
        flow.log_prob(y)

    @torch.no_grad()
    def plain_log_prob() -> None:
        plain_loss(flow, y, steps)

    variants = {
        "products": bare_products(dim, width, rows, steps),
        "step": step,
        "plain step": plain_step,
        "log_prob": log_prob,
        "plain log_prob": plain_log_prob,
    }
    times: dict[str, list[float]] = {variant: [] for variant in variants}
    for repeat in range(repeats + 1):
        for variant, function in variants.items():
            elapsed = seconds(function)
            if repeat:  # the first is a warm-up
                times[variant].append(elapsed)
    middle = {variant: statistics.median(values) for variant, values in times.items()}
    return {
        "shape": {"dim": dim, "width": width, "rows": rows, "time steps": steps},
        "seconds": {v: [middle[v], min(values), max(values)] for v, values in times.items()},
        "step / 3 products": middle["step"] / (3 * middle["products"]),
        "log_prob / products": middle["log_prob"] / middle["products"],
        "plain step / step": middle["plain step"] / middle["step"],
        "plain log_prob / log_prob": middle["plain log_prob"] / middle["log_prob"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    print(f"torch {torch.__version__}, {platform.machine()}, {arguments.threads} threads")
    print(f"{'shape':<11}{'step ms':>9}{'/ 3 products':>14}{'plain/ours':>12}", end="")
    print(f"{'log_prob ms':>13}{'/ products':>12}{'plain/ours':>12}")
    results = {}
    for name in SHAPES:
        results[name] = r = measure(name, arguments.repeats)
        step, log_prob = r["seconds"]["step"][0], r["seconds"]["log_prob"][0]
        print(f"{name:<11}{1e3 * step:>9.1f}{r['step / 3 products']:>14.2f}", end="")
        print(f"{r['plain step / step']:>12.2f}{1e3 * log_prob:>13.1f}", end="")
        print(f"{r['log_prob / products']:>12.2f}{r['plain log_prob / log_prob']:>12.2f}")
    if arguments.out:
        arguments.out.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
