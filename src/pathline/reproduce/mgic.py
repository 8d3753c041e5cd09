"""Multigrid in channels: coupling of all channels by few weights.

Source: Eliasof, Ephrath, Ruthotto, Treister, MGIC: multigrid-in-channels neural network
architectures, SIAM J. Sci. Comput. 2023, arXiv 2011.09128.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..data import load_images
from ..nets import Conv
from ..networks import Dynamics, Multigrid, MultigridBlock
from ..networks.multigrid import ResidualBlock
from ..report import Section
from ..train.progress import Reporter
from .candidates import (
    BATCH,
    Assembled,
    Plan,
    compare,
    image_net,
    milliseconds,
    multiplications,
    table,
)
from .experiment import Outcome, RunArguments
from .race import RunFolder, columns

PAPER = (
    "Eliasof et al., MGIC (arXiv 2011.09128): fewer weights at similar or better accuracy, on "
    "larger images; rows of its tables are not known"
)
WIDTH, BLOCKS, GROUP, COARSEST = 64, 3, 8, 16
PLANS = {"small": Plan(400, 3), "full": Plan(2000, 10)}
SWEEP = tuple(2**k for k in range(5, 10))  # widths
SWEPT = (16, 8)  # images and their pixels a side
KINDS: dict[str, Callable[[int], Any]] = {
    "full": partial(ResidualBlock, groups=1),
    "grouped": lambda width: ResidualBlock(width, groups=width // GROUP),
    "multigrid": partial(MultigridBlock, group=GROUP, coarsest=COARSEST),
}
LABELS = {"full": "full", "grouped": "in groups", "multigrid": "multigrid in channels"}


def run_digits(arguments: RunArguments, size: str) -> Outcome:
    """Train networks of residual blocks: full ones, in groups of channels, and multigrid ones; and
    count weights and time of a block against its width."""
    plan = PLANS[size]
    plan = replace(plan, iterations=arguments.max_steps or plan.iterations)
    images = load_images("digits")
    folder = RunFolder.open(
        "mgic-digits", arguments, size,
        iterations=plan.iterations, seeds=plan.seeds, data=images.source,
    )  # fmt: skip
    if folder.done:
        return folder.done

    def make(kind: str, seed: int) -> Assembled:
        def block(width: int) -> Dynamics:
            return Multigrid(KINDS[kind](width))

        return image_net(block, images, widths=BLOCKS * (WIDTH,), steps=1, seed=seed)

    results = compare(folder, images, {kind: partial(make, kind) for kind in KINDS}, plan)
    full, grouped, multigrid = results.values()
    lost = 100 * (full["accuracy"] - multigrid["accuracy"])
    above = 100 * (multigrid["accuracy"] - grouped["accuracy"])
    share = multigrid["weights"] / full["weights"]
    summary = (
        f"multigrid: {lost:.1f} points of accuracy below full blocks, {above:.1f} above groups, "
        f"with {share:.2f} of the weights of the full network"
    )
    told = (
        f"Networks of {BLOCKS} blocks of width {WIDTH} with groups of {GROUP} channels, down to "
        f"{COARSEST}; mean test accuracy on {len(images.test):,} images after "
        f"{plan.iterations:,} steps of {BATCH} images, of {plan.seeds} seeds. Multiplications are "
        f"for one image; the time is of {BATCH} images on {torch.get_num_threads()} thread(s)."
    )
    rows = table(results, LABELS)
    swept = sweep()
    sections = [
        Section("Blocks side by side", f"{summary}. {told}\n\n{images.source}", table=rows),
        *_sweep_sections(swept),
    ]
    details = {"results": results, "points_below_full": lost, "points_above_grouped": above}
    details |= {"share_of_weights": share, "widths": SWEEP, "sweep": swept}
    text = f"{columns(rows)}\n{summary}\nmeasured: test error of multigrid, mean of the seeds"
    outcome = Outcome(1 - multigrid["accuracy"], None, PAPER, text, details)
    return folder.write(outcome, "Multigrid in channels on digits", sections)


def sweep() -> dict[str, Any]:
    """Kernel weights, multiplications and milliseconds of each kind of block, by width."""
    count, pixels = SWEPT
    inputs = [torch.zeros(count, width, pixels, pixels) for width in SWEEP]
    blocks = {kind: [make(width) for width in SWEEP] for kind, make in KINDS.items()}
    passes = [(block, x) for row in blocks.values() for block, x in zip(row, inputs, strict=True)]
    times = iter(milliseconds(passes))
    return {
        kind: {
            "weights": [_kernels(block) for block in row],
            "multiplications": [
                multiplications(block, x[:1]) for block, x in zip(row, inputs, strict=True)
            ],
            "milliseconds": [next(times) for _ in row],
        }
        for kind, row in blocks.items()
    }


def _kernels(block: nn.Module) -> int:
    """Weights without those of norms."""
    return sum(p.numel() for p in block.parameters() if p.ndim > 1)


def _sweep_sections(swept: Mapping[str, Any]) -> list[Section]:
    from ..plots import curves

    count, pixels = SWEPT
    said = {
        "weights": "In kernels: they grow with the square of the width, and linearly in groups and "
        "with multigrid.",
        "milliseconds": f"Of {count} images of {pixels} x {pixels} pixels, without gradients.",
    }
    titles = {"weights": "Weights against width", "milliseconds": "Time forward against width"}
    return [
        Section(
            titles[key],
            text,
            figure=curves(
                {LABELS[kind]: (SWEEP, swept[kind][key]) for kind in KINDS},
                *("channels", key, f"{titles[key]}, of one block"),
                log=True,
            ),
        )
        for key, text in said.items()
    ]


CHANNELS, LEVELS, DEPTHS = 64, (0, 1, 2, 3), (1, 2, 4)
ITERATIONS = {"small": 1000, "full": 10_000}
FIRST = 0.1  # scale of what a smoother adds at first, relative to that of its operator


class LinearSmoother(nn.Module):
    """z + K z with 1x1 kernels in groups."""

    def __init__(self, channels: int, group: int, generator: torch.Generator) -> None:
        super().__init__()
        self.kernel = Conv(channels, size=1, groups=channels // group, generator=generator)
        with torch.no_grad():
            self.kernel.weight.mul_(FIRST)

    def forward(self, z: Tensor) -> Tensor:
        return z + self.kernel(z)


def linear_block(levels: int, generator: torch.Generator) -> MultigridBlock:
    """A multigrid block that is a matrix: 1x1 kernels in groups on all levels, and nothing else."""
    coarsest = CHANNELS >> levels
    block = MultigridBlock(CHANNELS, group=GROUP, coarsest=coarsest, generator=generator)
    block.smoothers = nn.ModuleList(
        LinearSmoother(CHANNELS >> level, GROUP, generator) for level in range(levels + 1)
    )
    block.norms = nn.ModuleList(nn.Identity() for _ in range(levels))
    return block


def mixing(generator: torch.Generator) -> Tensor:
    """A random orthogonal matrix, (channels, channels), in double precision."""
    normal = torch.randn(CHANNELS, CHANNELS, generator=generator, dtype=torch.float64)
    Q, R = torch.linalg.qr(normal)
    return Q * R.diagonal().sign()


def outside(M: Tensor) -> float:
    """The share of |M|^2 outside its blocks of `GROUP` channels: what no groups can learn."""
    blocks = torch.stack([M[k : k + GROUP, k : k + GROUP] for k in range(0, len(M), GROUP)])
    return 1 - (blocks.square().sum() / M.square().sum()).item()


def learned(M: Tensor, depth: int, levels: int, iterations: int, seed: int) -> tuple[float, int]:
    """|A - M|^2 / |M|^2 of the matrix A of `depth` blocks, by L-BFGS; and their weights."""
    generator = torch.Generator().manual_seed(seed)
    net = nn.Sequential(*(linear_block(levels, generator) for _ in range(depth))).double()
    unit = torch.eye(CHANNELS, dtype=M.dtype)[:, :, None, None]  # of each channel, an image
    optimiser = torch.optim.LBFGS(
        net.parameters(), max_iter=iterations, history_size=20, tolerance_change=0,
        tolerance_grad=1e-9, line_search_fn="strong_wolfe",
    )  # fmt: skip

    def error() -> Tensor:
        return (net(unit)[:, :, 0, 0].mT - M).square().sum() / M.square().sum()

    def closure() -> Tensor:
        optimiser.zero_grad()
        loss = error()
        loss.backward()
        return loss

    optimiser.step(closure)
    return error().item(), sum(p.numel() for p in net.parameters())


def run_mixing(arguments: RunArguments, size: str) -> Outcome:
    """Learn y = M x, for a random orthogonal M of all channels, by blocks of 0 to 3 coarse levels.

    All levels are in groups, so that 0 coarse levels are blocks without coupling, whose error is
    known. The measured figure is that of the largest network.
    """
    from ..plots import curves

    iterations = arguments.max_steps or ITERATIONS[size]
    folder = RunFolder.open("mgic-mixing", arguments, size, iterations=iterations)
    if folder.done:
        return folder.done
    M = mixing(torch.Generator().manual_seed(arguments.seed + 1000))
    errors: dict[int, list[float]] = {}
    weights: dict[int, list[int]] = {}
    with Reporter(len(DEPTHS) * len(LEVELS), shown=True) as reporter:
        for depth in DEPTHS:
            found = []
            for levels in LEVELS:
                found.append(learned(M, depth, levels, iterations, arguments.seed))
                reporter.update(len(errors) * len(LEVELS) + len(found), {"error": found[-1][0]})
            errors[depth], weights[depth] = map(list, zip(*found, strict=True))
    known = outside(M)
    gap = max(abs(row[0] - known) for row in errors.values())
    rows = _mixing_table(errors, weights)
    summary = f"without coarse levels: {known:.6f} at best, found up to {gap:.0e}"
    told = (
        f"The share of |M|^2 that is missed, for a random orthogonal M of {CHANNELS} channels "
        f"({CHANNELS**2:,} weights) and blocks of 1x1 kernels in groups of {GROUP} after "
        f"{iterations:,} iterations of L-BFGS. Groups alone, however many in turn, miss what lies "
        f"outside of the blocks of M, {known:.4f} of it; each coarse level couples more of them. "
        "No block with weights linear in the number of channels can be all of M."
    )
    lines = {f"{depth} block(s)": (LEVELS, row) for depth, row in errors.items()}
    lines["outside of the groups"] = (LEVELS, [known for _ in LEVELS])
    figure = curves(lines, "coarse levels", "missed share of |M|^2", "Error against levels")
    sections = [
        Section("Levels and blocks", f"{summary}. {told}", table=rows),
        Section("Error against levels", figure=figure),
    ]
    details = {"levels": LEVELS, "outside": known, "gap": gap, "errors": errors}
    details |= {"weights": weights, "channels": CHANNELS}
    text = f"{columns(rows)}\n{summary}\nmeasured: missed share of the largest network"
    outcome = Outcome(errors[DEPTHS[-1]][-1], None, PAPER, text, details)
    return folder.finish(outcome, "Mixing of channels by multigrid", sections)


def _mixing_table(
    errors: Mapping[int, Sequence[float]], weights: Mapping[int, Sequence[int]]
) -> list[tuple[object, ...]]:
    head = ("coarse levels", *(f"{depth} block(s)" for depth in errors), "weights of a block")
    return [
        head,
        *(
            (levels, *(f"{row[k]:.4f}" for row in errors.values()), f"{weights[DEPTHS[0]][k]:,}")
            for k, levels in enumerate(LEVELS)
        ),
    ]
