"""Classifiers of images side by side: accuracy, weights, multiplications and time."""

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import log2
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from ..data import Images
from ..networks import Classification, ContinuousNet, Dynamics
from ..networks.architectures import image_layer
from .images import image_accuracy, standardised
from .networks import trained
from .race import RunFolder

BATCH, RATE, DECAY = 64, 0.01, 2e-4
TIMED = 20  # forward passes
ATEN = torch.ops.aten


@dataclass(frozen=True)
class Plan:
    """How long to train, and how often; the first seed is that of the command line."""

    iterations: int
    seeds: int


class Assembled(ContinuousNet):
    """A network of an experiment: what a run keeps of it can be resumed, but not loaded alone."""

    def config(self) -> dict[str, Any]:
        return {"stages": [repr(stage) for stage in self.stages]}


def image_net(
    dynamics: Callable[[int], Dynamics],
    images: Images,
    *,
    widths: Sequence[int],
    steps: int,
    seed: int,
) -> Assembled:
    """A 3x3 opening layer, a dynamics of each width, and an affine classifier of means of pixels.

    Between the dynamics are 2x2 average pooling and, where the width changes, a 1x1 layer.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        opening = image_layer(images.shape[0], widths[0], size=3)
        stages: list[nn.Module] = [dynamics(widths[0])]
        for before, width in pairwise(widths):
            if width != before:
                stages.append(image_layer(before, width, size=1))
            stages += [nn.AvgPool2d(2), dynamics(width)]
        stages.append(nn.AdaptiveAvgPool2d(1))
        head = nn.Sequential(nn.Flatten(), nn.Linear(widths[-1], images.classes))
        return Assembled(opening, stages, head, steps=steps)


def compare(
    folder: RunFolder, images: Images, makes: Mapping[str, Callable[[int], Assembled]], plan: Plan
) -> dict[str, dict[str, Any]]:
    """Train each network by several seeds, on the same batches.

    Args:
        folder: of the experiment.
        images: rows of pixels and labels.
        makes: networks of a seed, by name.
        plan: of training.

    Returns:
        By name: test accuracies of the seeds and their mean, weights, `kernels`, multiplications
        for an image, milliseconds for a batch forward, seconds of training.
    """
    train, validation, test = standardised(images)
    few = torch.from_numpy(test[:BATCH, :-1]).view(-1, *images.shape)
    results: dict[str, dict[str, Any]] = {}
    nets = []
    for name, make in makes.items():
        accuracies, seconds = [], 0.0
        for seed in range(folder.arguments.seed, folder.arguments.seed + plan.seeds):
            net = make(seed)
            objective = Classification(net, shape=images.shape, decay=DECAY, head=DECAY)
            part = trained(
                *(folder, f"{name}-{seed}", objective, train, validation),
                max_steps=plan.iterations, batch_size=BATCH, learning_rate=RATE, seed=seed,
            )  # fmt: skip
            accuracies.append(image_accuracy(net, test, images.shape))
            seconds += part.seconds
        results[name] = {
            "accuracy": statistics.mean(accuracies),
            "accuracies": accuracies,
            "weights": sum(p.numel() for p in net.parameters()),
            "kernels": kernels(net),
            "multiplications": multiplications(net, few[:1]),
            "seconds": seconds,
        }
        nets.append(net)
    times = milliseconds([(net, few) for net in nets])
    for found, passed in zip(results.values(), times, strict=True):
        found["milliseconds"] = passed
    return results


def table(
    results: Mapping[str, Mapping[str, Any]], labels: Mapping[str, str]
) -> list[tuple[object, ...]]:
    """What `compare` found."""
    head = (
        *("", "test accuracy", "of the seeds", "weights", "in kernels"),
        *("multiplications", "ms forward", "seconds"),
    )
    return [
        head,
        *(
            (
                labels[name],
                f"{found['accuracy']:.2%}",
                ", ".join(f"{100 * value:.1f}" for value in found["accuracies"]),
                *(f"{found[key]:,}" for key in ("weights", "kernels", "multiplications")),
                f"{found['milliseconds']:.1f}",
                f"{found['seconds']:.0f}",
            )
            for name, found in results.items()
        ),
    ]


def kernels(net: ContinuousNet) -> int:
    """Weights in the kernels and matrices of its dynamics, without norms and other layers."""
    parts = (p for evolution in net.evolutions() for p in evolution.dynamics.parameters())
    return sum(p.numel() for p in parts if p.ndim > 2)  # a norm has (pieces of time, channels)


class Multiplications(TorchDispatchMode):
    """Counts multiplications in convolutions and matrix products, by weights that are not zero.

    A kernel's zeros stand for what a sparse stencil leaves out. A complex convolution arrives as
    three real ones, and a Fourier transform of n real numbers counts n log2 n. What is done entry
    by entry, as in activations and norms, does not count.
    """

    def __init__(self) -> None:
        super().__init__()
        self.total = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func is ATEN.convolution.default:
            places = result.numel() // result.shape[1]
            self.total += places * int(torch.count_nonzero(args[1]))
        elif func in (ATEN.mm.default, ATEN.addmm.default):
            rows, matrix = args[-2:]
            self.total += len(rows) * int(torch.count_nonzero(matrix))
        elif func is ATEN._fft_r2c.default or func is ATEN._fft_c2r.default:
            real = args[0] if func is ATEN._fft_r2c.default else result
            n = real.shape[args[1][-1]]
            self.total += round(real.numel() * log2(n))
        return result


@torch.no_grad()
def multiplications(net: nn.Module, x: Tensor) -> int:
    """Of a forward pass of `x`, as `Multiplications` counts them."""
    net.eval()
    with Multiplications() as counted:
        net(x)
    return counted.total


@torch.no_grad()
def milliseconds(passes: Sequence[tuple[nn.Module, Tensor]]) -> list[float]:
    """The median time of a forward pass of each network with its inputs.

    They take turns, so that other work on the machine slows all of them alike.
    """
    times: list[list[float]] = [[] for _ in passes]
    for _ in range(TIMED):
        for (net, x), found in zip(passes, times, strict=True):
            net.eval()
            began = time.perf_counter()
            net(x)
            found.append(1000 * (time.perf_counter() - began))
    return [statistics.median(found) for found in times]
