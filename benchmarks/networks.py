"""Networks of differential equations: inference and training step against a ResNet block.

For each width and size of images: steps of parabolic, Hamiltonian, second-order and semi-implicit
dynamics, and blocks of two 3x3 convolutions with batch norm and ReLU, as torchvision's BasicBlock,
as many of them as have the same multiplications in convolutions; of inputs as they usually lie in
memory, and, for the blocks, with channels last as well. All take turns, so that other work on the
machine slows them alike; the figures are medians of the ratios of a turn.

The batch norm of the blocks is as users have it: statistics of the batch in training, running ones
and not folded into the convolutions in inference. What a step frees stays with the process, as it
does where larger tensors have been freed before: else most of the time of small networks would be
that of the system handing out pages, which depends on the order of a few allocations.

    python benchmarks/networks.py [--threads 1] [--rounds 7] [--batch 16] [--out FILE.json]
"""

import argparse
import copy
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pathline.nets import Conv, TimeBasis
from pathline.networks import (
    Dynamics,
    Evolution,
    Parabolic,
    SecondOrder,
    SemiImplicit,
    TwoLayerHamiltonian,
)

SETTINGS = ((32, 32), (64, 16), (112, 8))  # width, pixels a side
STEPS = 4
KEPT = 31 * 2**20  # bytes, below the largest block that glibc learns from


class BasicBlock(nn.Module):
    """relu(x + bn(conv(relu(bn(conv(x)))))), torchvision's BasicBlock without a change of width."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn1, self.bn2 = nn.BatchNorm2d(width), nn.BatchNorm2d(width)

    def forward(self, x: Tensor) -> Tensor:
        """Features (batch, width, height, width)."""
        out = torch.relu(self.bn1(self.conv1(x)))
        return torch.relu(x + self.bn2(self.conv2(out)))


def dynamics(kind: str, width: int) -> Dynamics:
    """A dynamics of the published networks, with their norm."""
    time_basis = TimeBasis("piecewise-constant", STEPS, float(STEPS))
    if kind == "Hamiltonian":
        half = width // 2
        return TwoLayerHamiltonian(Conv(half), Conv(half), time_basis, norm=True)
    if kind == "second-order":
        return SecondOrder(Conv(width), time_basis, norm=True)
    parabolic = Parabolic(Conv(width), time_basis, norm=True)
    return SemiImplicit(parabolic, width) if kind == "semi-implicit" else parabolic


def blocks(kind: str) -> int:
    """BasicBlocks of as many multiplications. A step has K and K^T; of a Hamiltonian one there are
    two of each, but of half the channels."""
    return STEPS // 2 if kind == "Hamiltonian" else STEPS


def seconds(function: Callable[[], object]) -> float:
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def inference(net: nn.Module, x: Tensor) -> Callable[[], None]:
    net.eval()

    def run() -> None:
        with torch.no_grad():
            net(x)

    return run


def step(net: nn.Module, x: Tensor) -> Callable[[], None]:
    net.train()

    def run() -> None:
        net.zero_grad()
        net(x).square().mean().backward()

    return run


def measure(kind: str, width: int, pixels: int, batch: int, rounds: int) -> dict[str, Any]:
    torch.manual_seed(0)
    x = torch.randn(batch, width, pixels, pixels)
    turned = x.contiguous(memory_format=torch.channels_last)
    ours = Evolution(dynamics(kind, width), steps=STEPS)
    theirs = nn.Sequential(*(BasicBlock(width) for _ in range(blocks(kind))))
    last = copy.deepcopy(theirs).to(memory_format=torch.channels_last)
    found: dict[str, Any] = {"kind": kind, "width": width, "pixels": pixels}
    for name, make in (("inference", inference), ("step", step)):
        calls = make(ours, x), make(theirs, x), make(last, turned)
        times = [[seconds(call) for call in calls] for _ in range(rounds + 1)][1:]
        ratios = sorted(turn[0] / turn[1] for turn in times)
        found[name] = {
            "ours": statistics.median(turn[0] for turn in times),
            "resnet": statistics.median(turn[1] for turn in times),
            "ratio": statistics.median(ratios),
            "quartiles": [ratios[len(ratios) // 4], ratios[-1 - len(ratios) // 4]],
            "ratio_to_channels_last": statistics.median(turn[0] / turn[2] for turn in times),
        }
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.ones(KEPT // 4)  # freed at once: blocks up to this size are not given back any more
    results = []
    for kind in ("parabolic", "Hamiltonian", "second-order", "semi-implicit"):
        for width, pixels in SETTINGS:
            found = measure(kind, width, pixels, arguments.batch, arguments.rounds)
            results.append(found)
            told = [
                f"{name} {found[name]['ratio']:.2f} "
                f"({found[name]['quartiles'][0]:.2f} to {found[name]['quartiles'][1]:.2f}; "
                f"{found[name]['ratio_to_channels_last']:.2f} of channels last)"
                for name in ("inference", "step")
            ]
            print(f"{kind:<14} {width:4} x {pixels}^2  {', '.join(told)}", flush=True)
    if arguments.out:
        arguments.out.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
