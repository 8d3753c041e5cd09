"""Time of one training step and of one log-density evaluation of OT-Flow.

Each variant has the same potential, rows and time steps, and is measured in the same run:

- kernel: Pathline's objective by the compiled kernel; PyTorch: the same without it.
- probe: the same with one random probe in place of the exact trace, by the kernel.
- published: the authors' algorithm in plain PyTorch (peers/published_otflow.py): per-sample
  Jacobians, four Laplacians for each time step, automatic differentiation.
- products: the bare matrix products of one evaluation of our objective, by PyTorch; a step with
  its gradient needs three times as many.

The gradients' relative differences are those of single precision, to the published algorithm with
the same quadrature, and of products in bfloat16 to single precision.

Memory is what autograd keeps for the backward pass of one step (saved tensors).

    python benchmarks/flow_step.py [--repeats 5] [--threads N] [--out FILE.json]
"""

import argparse
import copy
import json
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from peers.published_otflow import PublishedOTFlow
from torch import Tensor

import pathline as pl
import pathline.native

# dim, width, rows, time steps that are timed (cost is linear in them)
SHAPES = {
    "toy": (2, 32, 2048, 8),
    "POWER": (6, 128, 2000, 2),
    "MINIBOONE": (43, 256, 2000, 1),
    "BSDS300": (63, 512, 300, 1),
}


def published(flow: pl.flows.OTFlow, quadrature: str) -> PublishedOTFlow:
    """The authors' algorithm with the weights of `flow`."""
    phi = flow.potential
    alphas = (flow.transport, 1.0, flow.hjb)
    plain = PublishedOTFlow(phi.dim, phi.width, len(phi.A), alphas, quadrature)
    plain.potential.load_state_dict(phi.state_dict())
    return plain


def gradient_difference(flow: pl.flows.OTFlow, y: Tensor, steps: int) -> float:
    """Relative difference to the plain gradient, in single precision, with one quadrature."""
    plain = published(flow, "simpson")
    theirs = torch.autograd.grad(plain.loss(y, steps), list(plain.potential.parameters()))
    wanted = dict(zip((n for n, _ in plain.potential.named_parameters()), theirs, strict=True))
    named = dict(flow.potential.named_parameters())
    mine = torch.autograd.grad(flow.objective()(y.double()).total, list(named.values()))
    pairs = [(g, wanted[name]) for name, g in zip(named, mine, strict=True)]
    difference = sum((a - b).square().sum() for a, b in pairs).sqrt()
    return (difference / sum(b.square().sum() for _, b in pairs).sqrt()).item()


def bfloat16_difference(flow: pl.flows.OTFlow, y: Tensor) -> float:
    """Relative difference of the gradient with the Laplacian's products in bfloat16."""
    cheap = copy.deepcopy(flow)
    cheap.trace_dtype = torch.bfloat16
    gradients = [
        torch.cat([
            g.flatten()
            for g in torch.autograd.grad(f.objective()(y).total, list(f.potential.parameters()))
        ])
        for f in (flow, cheap)
    ]  # fmt: skip
    return ((gradients[1] - gradients[0]).norm() / gradients[0].norm()).item()


def saved_bytes(loss: Callable[[], Tensor]) -> int:
    """Bytes of the tensors that autograd saves, each storage once."""
    seen: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        seen[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        kept = loss()
    del kept
    return sum(seen.values())


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


def seconds(function: Callable[[], object], least: float = 0.3) -> float:
    """Wall time of one call, the mean of those that follow each other for `least` seconds, as
    steps of a training do, after one that is not counted."""
    function()
    calls, start = 0, time.perf_counter()
    while calls == 0 or time.perf_counter() - start < least:
        function()
        calls += 1
    return (time.perf_counter() - start) / calls


def measure(name: str, repeats: int) -> dict[str, object]:
    """Medians [minimum, maximum] of interleaved blocks of calls, and their ratios."""
    dim, width, rows, steps = SHAPES[name]
    generator = torch.Generator().manual_seed(0)
    y = torch.randn(rows, dim, generator=generator)

    def some_flow(trace: str) -> pl.flows.OTFlow:
        start = torch.Generator().manual_seed(0)
        flow = pl.flows.OTFlow(
            dim, width, 2, trace=trace, hjb=0.1, train_steps=steps, steps=steps, generator=start
        )
        flow.potential.random_features(y, 0.5, start)
        return flow

    flow, probes = some_flow("exact"), some_flow("probe")
    plain = published(flow, "rk4")
    objectives = {"exact": flow.objective(), "probe": probes.objective()}

    def train(loss: Callable[[], Tensor], module: torch.nn.Module) -> Callable[[], None]:
        adam = torch.optim.Adam(module.parameters(), fused=True)

        def step() -> None:
            adam.zero_grad()
            loss().backward()
            adam.step()

        return step

    kernel = train(lambda: objectives["exact"](y).total, flow)

    def by_pytorch() -> None:
        with pl.native.using(None):
            kernel()

    @torch.no_grad()
    def log_prob() -> None:
        flow.log_prob(y)

    def log_prob_by_pytorch() -> None:
        with pl.native.using(None):
            log_prob()

    @torch.no_grad()
    def published_log_prob() -> None:
        plain.terms(y, steps)

    variants = {
        "products": bare_products(dim, width, rows, steps),
        "kernel": kernel,
        "PyTorch": by_pytorch,
        "probe": train(lambda: objectives["probe"](y).total, probes),
        "published": train(lambda: plain.loss(y, steps), plain),
        "log_prob": log_prob,
        "log_prob PyTorch": log_prob_by_pytorch,
        "log_prob published": published_log_prob,
    }
    difference = gradient_difference(flow, y[:200], steps)
    rounding = bfloat16_difference(flow, y[:200])
    kernels = ("kernel", "probe", "log_prob")  # torch on one thread beside them, as in `fit`
    times: dict[str, list[float]] = {variant: [] for variant in variants}
    threads = torch.get_num_threads()
    for _ in range(repeats):
        for variant, function in variants.items():
            with pl.native.threads(threads):
                torch.set_num_threads(1 if variant in kernels else threads)
                times[variant].append(seconds(function))
            torch.set_num_threads(threads)
    middle = {variant: statistics.median(values) for variant, values in times.items()}
    with pl.native.using(None):
        kept = {"PyTorch": saved_bytes(lambda: objectives["exact"](y).total)}
    kept["kernel"] = saved_bytes(lambda: objectives["exact"](y).total)
    kept["published"] = saved_bytes(lambda: plain.loss(y, steps))
    return {
        "shape": {"dim": dim, "width": width, "rows": rows, "time steps": steps},
        "seconds": {v: [middle[v], min(values), max(values)] for v, values in times.items()},
        "published / kernel": middle["published"] / middle["kernel"],
        "published / PyTorch": middle["published"] / middle["PyTorch"],
        "kernel / 3 products": middle["kernel"] / (3 * middle["products"]),
        "PyTorch / 3 products": middle["PyTorch"] / (3 * middle["products"]),
        "kernel / probe": middle["kernel"] / middle["probe"],
        "published / log_prob": middle["log_prob published"] / middle["log_prob"],
        "gradient difference": difference,
        "bfloat16 difference": rounding,
        "saved MB": {k: v / 1e6 for k, v in kept.items()},
    }


COLUMNS = (
    *("published / kernel", "published / PyTorch", "kernel / 3 products"),
    *("PyTorch / 3 products", "kernel / probe", "published / log_prob", "gradient difference"),
    "bfloat16 difference",
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    engines = ", ".join(pl.native.instruction_sets()) or "no kernel"
    print(
        f"torch {torch.__version__}, {platform.machine()}, {arguments.threads} threads, {engines}"
    )
    results = {}
    for name in SHAPES:
        results[name] = r = measure(name, arguments.repeats)
        step = r["seconds"]["kernel"][0]
        print(f"{name}: kernel step {1e3 * step:.1f} ms")
        for column in COLUMNS:
            print(f"    {column:<24}{r[column]:>10.3g}")
        kept = ", ".join(f"{k} {v:.2f}" for k, v in r["saved MB"].items())
        print(f"    saved for backward, MB  {kept}", flush=True)
        if arguments.out:
            arguments.out.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
