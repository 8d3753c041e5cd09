"""OT-Flow on two-dimensional densities whose truth is known."""

import math
from dataclasses import asdict
from typing import Any

import torch

from .. import models
from ..data import TOYS
from ..flows import OTFlow
from ..report import finish_density
from ..train import fit
from .experiment import Outcome, RunArguments

ROWS = {"train": 100_000, "validation": 10_000, "test": 20_000}
SOURCE = "Onken et al., OT-Flow (arXiv 2006.00104) and the authors' training scripts"

# The authors' settings: time steps, batch, learning rate, alpha_C, alpha_R, iterations; and the
# negative log-likelihood of their released flow on fresh samples, where there is one.
PAPER: dict[str, tuple[int, int, float, float, float, int, float | None]] = {
    "8gaussians": (8, 5000, 0.1, 30, 1, 5000, None),
    "checkerboard": (12, 10000, 0.05, 15, 2, 20000, None),
    "swissroll": (8, 5000, 0.05, 30, 15, 5000, 2.6885),
    "circles": (8, 5000, 0.05, 5, 1, 5000, None),
    "moons": (8, 5000, 0.05, 8, 1, 5000, None),
    "pinwheel": (8, 5000, 0.05, 30, 15, 5000, None),
    "2spirals": (8, 5000, 0.05, 10, 1, 5000, None),
}


def run(name: str, arguments: RunArguments, size: str) -> Outcome:
    """Fit the toy `name`, and compare with its true log-density on the same test points.

    Size small has the default settings, full those of the authors.
    """
    toy = TOYS[name]
    generator = torch.Generator().manual_seed(arguments.seed + 1000)
    train, validation, test = (toy.sample(rows, generator) for rows in ROWS.values())
    steps, batch, rate, alpha_c, alpha_r, iterations, published = PAPER[name]
    start = torch.Generator().manual_seed(arguments.seed)
    options: dict[str, Any] = asdict(arguments)
    if size == "full":
        flow = OTFlow(
            2,
            32,
            2,
            transport=1 / alpha_c,
            hjb=alpha_r / alpha_c,
            train_steps=steps,
            generator=start,
        )
        options |= {"batch_size": batch, "learning_rate": rate}
        options["max_steps"] = options["max_steps"] or iterations
    else:
        flow = OTFlow(2, generator=start)
    columns = ("x0", "x1")
    fit(flow, train, validation=validation, metadata={"experiment": f"ot-flow-{name}"}, **options)
    metrics = finish_density(arguments.out, test.numpy(), columns, title=f"OT-Flow on {name}")

    fine = models.load(arguments.out).double()
    fine.steps *= 4
    with torch.no_grad():
        nll = -fine.log_prob(test)
    details: dict[str, Any] = {
        "nll": nll.mean().item(),
        "inverse_error": metrics["check"]["inverse_error"],
        "train_seconds": metrics["seconds"],
        "verdict": metrics["check"]["verdict"],
    }
    lines = [f"negative log-likelihood  {details['nll']:.4f}  ({fine.steps} time steps)"]
    if toy.entropy is not None:
        gap = nll + toy.log_prob(test)
        details |= {
            "entropy": toy.entropy,
            "gap": gap.mean().item(),
            "gap_standard_error": gap.std().item() / math.sqrt(len(gap)),
        }
        lines += [
            f"entropy of the truth     {toy.entropy:.4f}",
            f"gap on the same points   {details['gap']:.4f} +- {details['gap_standard_error']:.4f}",
        ]
    if published is not None:
        lines.append(f"published                {published:.4f}")
    lines += [
        f"inverse error            {details['inverse_error']:.1e}",
        f"training                 {details['train_seconds']:.0f} s",
        details["verdict"],
    ]
    return Outcome(details["nll"], published, SOURCE, "\n".join(lines), details)
