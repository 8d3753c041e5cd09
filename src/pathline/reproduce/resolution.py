"""A network trained on coarse images, moved to fine ones in three ways, and trained on there.

Source: Haber, Ruthotto, Holtham, Learning across scales, AAAI 2018, arXiv 1703.02009.
"""

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from ..data import Images, load_images
from ..nets import Conv, TimeBasis
from ..networks import Classification, Parabolic, prolonged
from ..networks.architectures import image_layer
from ..report import Section
from ..train import Run
from .candidates import Assembled
from .experiment import Outcome, RunArguments
from .images import halved, image_accuracy, resized, standardised
from .networks import trained
from .race import RunFolder, columns

PAPER = (
    "Haber, Ruthotto, Holtham (arXiv 1703.02009): networks classify images of another resolution "
    "without training; figures are not known"
)
WIDTH, LAYERS, HORIZON, PIECES = 16, 6, 1.0, 3
DECAY, HEAD, BATCH, RATE = 0.01, 2e-4, 64, 0.01
FACTORS = (1, 2, 4, 8, 16, 32, 64)  # of the number of layers on fine images
WAYS = {"copy": "copied", "galerkin": "Galerkin", "rediscretise": "rediscretised"}
LABELS = WAYS | {"new": "new weights"}


@dataclass(frozen=True)
class Setting:
    """Images, pixels a side of the features that are classified, steps on coarse and fine ones."""

    images: str
    pool: int
    coarse: int
    fine: int


SETTINGS = {
    "small": Setting("digits", 4, 500, 34),
    "full": Setting("mnist", 7, 3000, 200),
}


def run(arguments: RunArguments, size: str) -> Outcome:
    """Train a parabolic network on coarse images, and judge and train it on fine ones.

    The measured figure is the accuracy that rediscretised kernels lose on fine images without
    training. Fine kernels have larger norms, and so need more layers over the same time to be
    stable: they get the least power of two that the bound of the equation asks for.
    """
    from ..plots import curves

    setting = SETTINGS[size]
    steps = {
        "coarse": arguments.max_steps or setting.coarse,
        "fine": min(arguments.max_steps or setting.fine, setting.fine),
    }
    images = load_images(setting.images, fetch=size == "full")
    folder = RunFolder.open(
        "multilevel-resolution", arguments, size, iterations=steps, data=images.source
    )
    if folder.done:
        return folder.done
    fine, coarse = levels(images)
    net = parabolic(images, setting.pool, arguments.seed)
    _train(folder, "coarse", net, coarse, steps["coarse"])
    first = image_accuracy(net, coarse.test, coarse.shape)
    starts = {"copy": copy.deepcopy(net)}
    starts |= {how: prolonged(net, how) for how in ("galerkin", "rediscretise")}  # type: ignore[misc]
    results: dict[str, dict[str, Any]] = {}
    lines = {}
    for how, start in starts.items():
        accuracies = [
            image_accuracy(with_layers(start, factor * LAYERS), fine.test, fine.shape)
            for factor in FACTORS
        ]
        needed = stable_factor(start, fine.shape)
        results[how] = {
            "accuracies": accuracies,
            "layers": needed * LAYERS,
            "accuracy": accuracies[FACTORS.index(needed)],
        }
        lines[WAYS[how]] = (range(len(FACTORS)), accuracies)
    lines["on coarse images"] = (range(len(FACTORS)), [first for _ in FACTORS])
    starts["new"] = parabolic(images, setting.pool, arguments.seed)
    results["new"] = {
        "layers": LAYERS,
        "accuracy": image_accuracy(starts["new"], fine.test, fine.shape),
    }
    courses = {}
    for how, start in starts.items():
        net = with_layers(start, results[how]["layers"])
        part = _train(folder, how, net, fine, steps["fine"])
        results[how] |= {
            "trained": image_accuracy(net, fine.test, fine.shape),
            "seconds": part.seconds,
        }
        courses[LABELS[how]] = (
            [entry["step"] for entry in part.history],
            [entry["data"] for entry in part.history],
        )
    table = _table(results)
    lost = {how: 100 * (first - results[how]["accuracy"]) for how in WAYS}
    summary = (
        f"{first:.2%} on coarse images; without training, on fine ones, points lost: "
        + ", ".join(f"{lost[how]:.1f} {label}" for how, label in WAYS.items())
    )
    told = (
        f"A network of {WIDTH} channels and {LAYERS} layers learns images of "
        f"{' x '.join(map(str, coarse.shape[1:]))} pixels, means of four of the fine ones, in "
        f"{steps['coarse']:,} steps. Layers: as many as kernels on fine pixels need to be stable, "
        f"over the same time. Then {steps['fine']} steps of {BATCH} fine images from each start. "
        f"Accuracies are of {len(fine.test):,} test images."
    )
    sections = [
        Section("From coarse to fine", f"{summary}. {told}\n\n{images.source}", table=table),
        Section(
            "Accuracy on fine images without training",
            f"By how often the {LAYERS} layers are doubled: as many more time steps over the same "
            "time. As with any explicit method, finer pixels need shorter steps.",
            figure=curves(lines, "doublings", "test accuracy", "Accuracy against layers"),
        ),
        Section(
            "Training on fine images",
            figure=curves(courses, "step", "cross entropy", "Loss from each start", log_y=True),
        ),
    ]
    details = {"coarse_accuracy": first, "points_lost": lost, "factors": FACTORS}
    text = f"{columns(table)}\n{summary}\nmeasured: share of accuracy lost by rediscretised kernels"
    outcome = Outcome(lost["rediscretise"] / 100, None, PAPER, text, details | {"results": results})
    return folder.write(outcome, "From coarse to fine images", sections)


def levels(images: Images) -> tuple[Images, Images]:
    """Standardised fine images and their means of four pixels; small images are enlarged first."""
    if images.shape[1] < 16:
        images = doubled(images)
    train, validation, test = standardised(images)
    fine = replace(images, train=train, validation=validation, test=test)
    return fine, halved(fine)


def doubled(images: Images) -> Images:
    """Images of twice the height and width, by linear interpolation."""
    channels, height, width = images.shape

    def enlarge(rows: np.ndarray) -> np.ndarray:
        x = torch.from_numpy(rows[:, :-1]).view(-1, channels, height, width)
        finer = F.interpolate(x, scale_factor=2, mode="bilinear")
        return np.concatenate([finer.flatten(1).numpy(), rows[:, -1:]], 1)

    return resized(images, enlarge, (channels, 2 * height, 2 * width))


def parabolic(images: Images, pool: int, seed: int) -> Assembled:
    """z' = -K^T relu(K z + b) from a 1x1 layer to an affine classifier of `pool` x `pool` means.

    Opening layer and means are the same on each resolution, so that the kernels K alone change.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        opening = image_layer(images.shape[0], WIDTH, size=1)
        dynamics = Parabolic(Conv(WIDTH), TimeBasis("piecewise-constant", PIECES, HORIZON))
        head = nn.Sequential(nn.Flatten(), nn.Linear(WIDTH * pool**2, images.classes))
        return Assembled(opening, [dynamics, nn.AdaptiveAvgPool2d(pool)], head, steps=LAYERS)


def with_layers(net: Assembled, layers: int) -> Assembled:
    """A copy that takes as many steps over the same time, with the same weights in time."""
    other = copy.deepcopy(net)
    for evolution in other.evolutions():
        evolution.steps = layers
    return other


def stable_factor(net: Assembled, shape: Sequence[int]) -> int:
    """The first of `FACTORS` by which there must be more layers to keep to the stable step."""
    (evolution,) = net.evolutions()
    bound = evolution.dynamics.step_bound("euler", (WIDTH, *shape[1:]))
    assert bound is not None and evolution.step is not None
    ratio = evolution.step / bound
    return next((factor for factor in FACTORS if factor >= ratio), FACTORS[-1])


def _train(folder: RunFolder, label: str, net: Assembled, images: Images, steps: int) -> Run:
    objective = Classification(net, shape=images.shape, decay=DECAY, head=HEAD)
    return trained(
        *(folder, label, objective, images.train, images.validation),
        max_steps=steps, batch_size=BATCH, learning_rate=RATE,
    )  # fmt: skip


def _table(results: Mapping[str, Mapping[str, Any]]) -> list[tuple[object, ...]]:
    head = ("kernels", "layers", "without training", "trained", "seconds")
    return [
        head,
        *(
            (
                LABELS[how],
                found["layers"],
                f"{found['accuracy']:.2%}",
                f"{found['trained']:.2%}",
                f"{found['seconds']:.0f}",
            )
            for how, found in results.items()
        ),
    ]
