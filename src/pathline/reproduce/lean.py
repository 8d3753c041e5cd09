"""Lean convolutions in place of full ones: accuracy, weights, multiplications and time.

Source: Treister et al., Low-cost parameterizations of deep convolutional neural networks, 2018,
arXiv 1805.07821; Ephrath et al., LeanConvNets, IEEE JSTSP 2020, arXiv 1910.13157.
"""

from dataclasses import dataclass, replace
from functools import partial

import torch

from ..data import load_images
from ..nets import TimeBasis
from ..networks import Dynamics, Residual
from ..networks.architectures import OPERATORS
from ..report import Section
from .candidates import BATCH, Assembled, Plan, compare, image_net, table
from .experiment import Outcome, RunArguments
from .images import halved
from .race import RunFolder, columns

PAPER = (
    "Ephrath et al., LeanConvNets (arXiv 1910.13157): 3 to 10 times fewer weights at comparable "
    "accuracy, on larger images; figures of each network are not known"
)
LABELS = {
    "full": "full 3x3",
    "depthwise": "depthwise 3x3 + 1x1",
    "lean": "5-point + 1x1",
    "shift": "shift + 1x1",
    "circulant": "circulant",
}
WIDTHS, STEPS = (16, 32, 64), 2


@dataclass(frozen=True)
class Setting:
    """Training, and the images; `rows` of them to train and to test with, all if None."""

    plan: Plan
    half: bool = False  # of the resolution
    rows: tuple[int, int] | None = None


SETTINGS = {
    ("digits", "small"): Setting(Plan(600, 3)),
    ("digits", "full"): Setting(Plan(3000, 10)),
    ("mnist", "small"): Setting(Plan(600, 1), half=True, rows=(5000, 2000)),
    ("mnist", "full"): Setting(Plan(8000, 3)),
}


def run(name: str, arguments: RunArguments, size: str) -> Outcome:
    """Train residual networks of three resolutions, alike but for the operators in their layers."""
    from ..plots import curves

    setting = SETTINGS[name, size]
    plan = replace(setting.plan, iterations=arguments.max_steps or setting.plan.iterations)
    images = load_images(name, fetch=size == "full")
    folder = RunFolder.open(
        f"lean-{name}", arguments, size,
        iterations=plan.iterations, seeds=plan.seeds, data=images.source,
    )  # fmt: skip
    if folder.done:
        return folder.done
    if setting.rows:
        train, test = setting.rows
        images = replace(images, train=images.train[:train], test=images.test[:test])
    if setting.half:
        images = halved(images)

    def make(kind: str, seed: int) -> Assembled:
        def block(width: int) -> Dynamics:
            time = TimeBasis("piecewise-constant", STEPS, float(STEPS))
            return Residual(OPERATORS[kind](width), time, activation="relu", norm=True)

        return image_net(block, images, widths=WIDTHS, steps=STEPS, seed=seed)

    results = compare(folder, images, {kind: partial(make, kind) for kind in LABELS}, plan)
    full, lean = results["full"], results["lean"]
    lost = 100 * (full["accuracy"] - lean["accuracy"])
    fewer = full["kernels"] / lean["kernels"]
    summary = (
        f"5-point + 1x1: {lost:.1f} points of accuracy below full kernels, with {fewer:.1f} times "
        "fewer weights in its kernels"
    )
    told = (
        f"Residual networks of widths {WIDTHS}, {STEPS} layers each, on {images.shape[1]} x "
        f"{images.shape[2]} pixels and half and a quarter of them; mean test accuracy on "
        f"{len(images.test):,} images after {plan.iterations:,} steps of {BATCH} images, of "
        f"{plan.seeds} seeds. Multiplications are for one image, by weights that are not zero, and "
        f"the time is of {BATCH} images on {torch.get_num_threads()} thread(s): the zeros of a "
        "stencil are multiplied as well there, and memory counts for more than arithmetic."
    )
    rows = table(results, LABELS)
    figure = curves(
        {
            LABELS[kind]: (plan.seeds * [found["kernels"]], [1 - a for a in found["accuracies"]])
            for kind, found in results.items()
        },
        *("weights in kernels", "test error", "Test error of each seed against weights"),
        log=True,
    )
    sections = [
        Section("Operators side by side", f"{summary}. {told}\n\n{images.source}", table=rows),
        Section("Error against weights", "One point for each seed.", figure=figure),
    ]
    text = f"{columns(rows)}\n{summary}\nmeasured: test error of 5-point + 1x1, mean of the seeds"
    details = {"results": results, "points_below_full": lost, "times_fewer_weights": fewer}
    outcome = Outcome(1 - lean["accuracy"], None, PAPER, text, details)
    return folder.write(outcome, f"Lean convolutions on {name}", sections)
