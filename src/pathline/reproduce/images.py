"""Networks motivated by partial differential equations, on images.

Source: Ruthotto and Haber, Deep neural networks motivated by partial differential equations, JMIV
2020, arXiv 1804.04272; Haber, Lensink, Treister, Ruthotto, IMEXnet, ICML 2019, arXiv 1903.02639.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..data import Images, load_images, q_tips
from ..data.classes import GREY
from ..networks import Classification, ContinuousNet, imexnet, pde_cnn, stability_report
from ..report import Section
from ..train import files
from .experiment import Outcome, RunArguments
from .networks import trained
from .race import RunFolder, columns, open_folder

PDE_PAPER = "Ruthotto and Haber, arXiv 1804.04272"
LABELS = {
    "parabolic": "parabolic",
    "hamiltonian": "Hamiltonian",
    "second-order": "second-order",
    "residual": "plain residual",
}
PROBED = 8  # images whose perturbations are followed
WATCHED = 2000  # images to choose the best weights by
CHUNK = 256  # images judged at a time
NEVER = 1000  # validations without improvement before a training stops; there are about fifty


@dataclass(frozen=True)
class Setting:
    """Of networks and training; the best of the networks of equations is what is measured."""

    widths: tuple[int, ...]
    iterations: int
    batch: int
    rate: float


SETTINGS = {
    ("mnist", "small"): Setting((8, 16, 32, 32), 8000, 64, 0.01),
    ("mnist", "full"): Setting((16, 32, 64, 64), 16_000, 64, 0.01),
    ("cifar10-subset", "small"): Setting((16, 32, 64, 64), 1500, 64, 0.01),
    ("cifar10-subset", "full"): Setting((32, 64, 112, 112), 12_000, 64, 0.01),
}


def run_pde_cnn(name: str, arguments: RunArguments, size: str) -> Outcome:
    """Train parabolic, Hamiltonian and second-order networks, and a plain residual one of as many
    layers, in equally many steps, or equally long where there is a budget, without augmentation."""
    from ..plots import curves

    setting = SETTINGS[name, size]
    images = load_images(name, fetch=size == "full")
    limit: dict[str, Any] = {"max_steps": arguments.max_steps or setting.iterations}
    if arguments.budget is not None:
        limit = {"budget": arguments.budget / len(LABELS)}
    experiment = f"pde-cnn-{name.replace('10', '')}"
    folder = open_folder(experiment, arguments, size, data=images.source)
    if folder.done:
        return folder.done
    train, validation, test = standardised(images)
    validation = validation[:WATCHED]
    results: dict[str, dict[str, Any]] = {}
    gains = {}
    for kind in LABELS:
        net = pde_cnn(
            kind,
            channels=images.shape[0],
            classes=images.classes,
            widths=setting.widths,
            seed=arguments.seed,
        )
        objective = Classification(net, shape=images.shape, decay=2e-4, head=2e-4)
        part = trained(
            *(folder, kind, objective, train, validation),
            batch_size=setting.batch, learning_rate=setting.rate, patience=NEVER, **limit,
        )  # fmt: skip
        few = torch.from_numpy(test[:PROBED, :-1]).view(-1, *images.shape)
        stability = stability_report(net, few)
        gains[LABELS[kind]] = (stability.depth, stability.worst)
        results[kind] = {
            "accuracy": image_accuracy(net, test, images.shape),
            "validation_accuracy": part.metrics["accuracy"],
            "gain": float(stability.worst[-1]),
            "weights": sum(p.numel() for p in net.parameters()),
            "steps": part.steps,
            "seconds": part.seconds,
        }
        if kind == "hamiltonian":
            files.save(net, arguments.out / "model")
    table = [
        ("", "test", "validation", "worst gain", "weights", "steps", "seconds"),
        *(
            (
                LABELS[kind],
                f"{found['accuracy']:.2%}",
                f"{found['validation_accuracy']:.2%}",
                f"{found['gain']:.3g}",
                f"{found['weights']:,}",
                f"{found['steps']:,}",
                f"{found['seconds']:.0f}",
            )
            for kind, found in results.items()
        ),
    ]
    told = (
        f"Accuracy on {len(test):,} images, of networks of widths {setting.widths}, trained "
        f"with {setting.batch} images a step. The gain is by how much a network "
        "amplifies the worst small perturbation of an image, up to its features."
    )
    best = max(found["accuracy"] for kind, found in results.items() if kind != "residual")
    source = f"{PDE_PAPER}; its figures are of larger data and networks"
    text = f"{columns(table)}\nmeasured: the least test error of the three equations"
    outcome = Outcome(1 - best, None, source, text, {"results": results})
    figure = curves(gains, "steps in depth", "worst gain", "Gain along the depth", log_y=True)
    sections = [
        Section("Equations side by side", f"{told}\n\n{images.source}", table=table),
        Section("Gain along the depth", figure=figure),
    ]
    return folder.write(outcome, f"Networks of differential equations on {name}", sections)


def standardised(images: Images) -> list[np.ndarray]:
    """Rows to train, to choose and to test with; each channel has mean 0 and deviation 1 in the
    first."""
    parts = (images.train, images.validation, images.test)
    pixels = [rows[:, :-1].reshape(len(rows), images.shape[0], -1) for rows in parts]
    mean, std = (m[:, None] for m in (pixels[0].mean((0, 2)), pixels[0].std((0, 2))))
    return [
        np.concatenate([((x - mean) / std).reshape(len(x), -1), rows[:, -1:]], 1, dtype=np.float32)
        for x, rows in zip(pixels, parts, strict=True)
    ]


def halved(images: Images) -> Images:
    """Images of half the height and width, in which pixels are means of four."""
    channels, height, width = images.shape

    def mean(rows: np.ndarray) -> np.ndarray:
        fours = rows[:, :-1].reshape(len(rows), channels, height // 2, 2, width // 2, 2)
        return np.concatenate([fours.mean((3, 5)).reshape(len(rows), -1), rows[:, -1:]], 1)

    return resized(images, mean, (channels, height // 2, width // 2))


def resized(
    images: Images, change: Callable[[np.ndarray], np.ndarray], shape: tuple[int, int, int]
) -> Images:
    """Images whose rows of pixels and label `change` has given another shape."""
    train, validation, test = map(change, (images.train, images.validation, images.test))
    return replace(images, shape=shape, train=train, validation=validation, test=test)


@torch.no_grad()
def _predictions(net: ContinuousNet, x: Tensor) -> Tensor:
    """Classes of images (batch, channels, height, width)."""
    net.eval()
    return torch.cat([net(part.float()).argmax(1) for part in x.split(CHUNK)])


def image_accuracy(net: ContinuousNet, rows: np.ndarray, shape: Sequence[int]) -> float:
    """The share of labels, the last column of flat rows, that a network predicts."""
    x = torch.from_numpy(rows)
    found = _predictions(net, x[:, :-1].view(-1, *shape))
    return (found == x[:, -1].long()).double().mean().item()


IMEX_PAPER = (
    "Haber et al., IMEXnet (arXiv 1903.02639): the semi-implicit network is clearly better than "
    "the explicit one; figures are not known"
)
KINDS = {"semi-implicit": (True, 1), "explicit": (False, 1), "explicit, deeper": (False, 3)}
SHOWN = 12  # images
CONTRAST = 4.0  # of grey levels, which differ by 0.06 between bar and background


@dataclass(frozen=True)
class QTips:
    """Images and networks for them."""

    pixels: int
    widths: tuple[int, ...]
    steps: int  # of each width
    rows: tuple[int, int]
    iterations: int


Q_TIPS = {
    "small": QTips(32, (16, 16, 16), 1, (4096, 256), 1600),
    "full": QTips(64, (64, 128, 256), 3, (1024, 64), 12_800),
}


def run_q_tips(arguments: RunArguments, size: str) -> Outcome:
    """Label pixels of bars by the colours of their far ends: with semi-implicit steps, with the
    same kernels in explicit ones, whose field of view is shorter than long bars, and with three
    times as many of these, which see whole bars.

    Losses of bars and background count equally.
    """
    from ..plots import images

    setting = Q_TIPS[size]
    iterations = arguments.max_steps or setting.iterations
    folder = RunFolder.open("imexnet-qtips", arguments, size, iterations=iterations)
    if folder.done:
        return folder.done
    source = torch.Generator().manual_seed(arguments.seed + 1000)
    train, validation = (q_tips(rows, source, size=setting.pixels) for rows in setting.rows)
    share = (train[1] > 0).double().mean().item()
    factors = (0.5 / (1 - share), *3 * (0.5 / share,))
    results: dict[str, dict[str, Any]] = {}
    shown = [1 - validation[0][:SHOWN, 0], validation[1][:SHOWN] / 3]
    shape = (1, setting.pixels, setting.pixels)
    for label, (implicit, times) in KINDS.items():
        steps = times * setting.steps
        net = imexnet(widths=setting.widths, steps=steps, implicit=implicit, seed=arguments.seed)
        objective = Classification(net, shape=shape, class_weights=factors)
        part = trained(
            *(folder, label.replace(", ", "-"), objective, _pixels(train), _pixels(validation)),
            max_steps=iterations, batch_size=8 if size == "full" else 16, learning_rate=0.01,
            patience=NEVER,
        )  # fmt: skip
        found = _predictions(net, CONTRAST * (validation[0] - GREY))
        shown.append(found[:SHOWN] / 3)
        results[label] = bar_figures(found, validation[1].long()) | {
            "view": 1 + 2 * len(setting.widths) * (1 + 2 * steps),
            "weights": sum(p.numel() for p in net.parameters()),
            "seconds": part.seconds,
        }
        if implicit:
            files.save(net, arguments.out / "model")
    table = [
        ("", "right of bars", "right of all pixels", "IoU", "view", "weights", "seconds"),
        *(
            (
                label,
                *(f"{found[key]:.2%}" for key in ("bars", "pixels")),
                f"{found['iou']:.3f}",
                "all" if label == "semi-implicit" else f"{found['view']}",
                f"{found['weights']:,}",
                f"{found['seconds']:.0f}",
            )
            for label, found in results.items()
        ),
    ]
    told = (
        f"Shares of right labels of {setting.rows[1]} images of {setting.pixels} x "
        f"{setting.pixels} pixels after {iterations:,} steps; IoU is the mean over the four "
        "classes of intersection over union, and the view how many pixels a side a pixel can see."
    )
    text = f"{columns(table)}\nmeasured: share of wrong labels on bars, semi-implicit"
    error = 1 - results["semi-implicit"]["bars"]
    outcome = Outcome(error, None, IMEX_PAPER, text, {"results": results})
    drawn = (
        "Rows: new images, the labels of their pixels (the darker, the higher the class), and what "
        f"the networks find: {'; '.join(KINDS)}."
    )
    figure = images(torch.stack(shown).numpy(), "Images, labels and what the networks find")
    sections = [
        Section("Semi-implicit and explicit steps", told, table=table),
        Section("Labels of pixels", drawn, figure=figure),
    ]
    return folder.write(outcome, "Q-tips by semi-implicit steps", sections)


def _pixels(data: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Flat rows for training."""
    x, labels = data
    return CONTRAST * (x - GREY).flatten(1), labels.flatten(1)


def bar_figures(found: Tensor, labels: Tensor, classes: int = 4) -> dict[str, float]:
    """Shares of right labels on bars and everywhere, and the mean intersection over union.

    Args:
        found, labels: classes of pixels, whole numbers, of equal shape; 0 is background.
        classes: how many; those that are in neither of them do not count.
    """
    right, bar = found == labels, labels > 0
    overlaps = []
    for k in range(classes):
        union = ((found == k) | (labels == k)).sum().item()
        if union:
            overlaps.append(((found == k) & (labels == k)).sum().item() / union)
    return {
        "bars": right[bar].double().mean().item(),
        "pixels": right.double().mean().item(),
        "iou": sum(overlaps) / len(overlaps),
    }
