"""The report of a conditional density: is it better than a regression, and is it calibrated?"""

import json
import math
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from .data.pairs import PairRecipe
from .errors import ModelError
from .flows import Check, TransportMap
from .models import load, metadata
from .posterior import Calibration, Coverage, RankTest, calibrate
from .posterior.ranks import LEAST_ROWS
from .report import (
    Section,
    check_section,
    comparison_section,
    configuration_section,
    training_section,
    write_report,
)
from .train.files import read_json, write_atomically, write_json

if TYPE_CHECKING:
    from matplotlib.figure import Figure

CALIBRATED = 1000  # pairs
RANKED = 99  # posterior samples for each
SHOWN = 5000  # held-out pairs kept, and samples of the example
BASELINE = "linear-Gaussian regression"
METHODS = {"ConditionalOTFlow": "COT-Flow", "PCPMap": "PCP-Map"}


def finish_posterior(
    run: Path,
    theta: np.ndarray,
    context: np.ndarray,
    recipe: PairRecipe,
    *,
    title: str,
    seed: int = 0,
) -> dict[str, Any]:
    """Judge the conditional flow of a finished run on pairs that it was not trained on.

    Adds the figures to metrics.json, among them the calibration of up to 1000 pairs, and writes
    its pictures and report.html.

    Args:
        run: the folder that `fit` wrote.
        theta, context: held-out pairs in the user's units, (rows, dim) and (rows, context_dim).
        recipe: names of their columns.
        title: head of the report.
        seed: of the posterior samples.

    Returns:
        The metrics.
    """
    pairs = torch.from_numpy(theta), torch.from_numpy(context)
    flow = load(run).double()
    check = flow.check(*pairs, seed=seed)
    with torch.no_grad():
        nll = -flow.log_prob(*pairs).mean().item()
    calibration, skipped = None, ""
    if len(theta) < LEAST_ROWS:
        skipped = (
            f"Calibration was not tested: it needs at least {LEAST_ROWS} held-out pairs, and there "
            f"are {len(theta)}; try `pathline check` on new ones."
        )
    else:
        calibration = calibrate_flow(load(run), *pairs, recipe.names, seed=seed).to_dict()
    metrics = read_json(run / "metrics.json")
    metrics |= {
        "nll": nll,
        "nll_rows": len(theta),
        "classical": {BASELINE: regression_nll(flow, *pairs)},
        "check": check.to_dict(),
        "calibration": calibration,
        "calibration_skipped": skipped,
        "report": {"kind": "posterior", "title": title, "seed": seed},
    }
    write_json(run / "metrics.json", metrics)
    kept = np.column_stack([theta[:SHOWN], context[:SHOWN]])
    write_atomically(run / "held_out.npy", lambda path: _save(path, kept))
    write_posterior_report(run)
    return metrics


def calibrate_flow(
    flow: TransportMap, theta: Tensor, context: Tensor, names: Sequence[str], *, seed: int = 0
) -> Calibration:
    """`posterior.calibrate` of a flow on up to 1000 pairs, in the flow's own precision."""
    return calibrate(
        flow,
        theta[:CALIBRATED],
        context[:CALIBRATED],
        samples=RANKED,
        names=names,
        seed=seed,
    )


def regression_nll(flow: TransportMap, theta: Tensor, context: Tensor) -> float:
    """Negative log-likelihood in nats of the linear-Gaussian regression in which the flow starts.

    It is the flow's standardisation: a ridge regression on the data with Gaussian residuals of
    any covariance, in the coordinates that send bounded parameters to the line.
    """
    y, log_slope = flow.standardize(theta, context)
    return -(flow.reference_log_prob(y) + log_slope).mean().item()


def write_posterior_report(run: Path) -> None:
    """Write report.html, and the pictures in it, from what is in the folder of a run.

    Raises:
        ModelError: the folder holds no finished run of a conditional density.
    """
    metrics = read_json(run / "metrics.json")
    head = metrics.get("report", {})
    if head.get("kind") != "posterior" or not (run / "held_out.npy").exists():
        raise ModelError(f"{run} holds no finished run of a conditional density")
    flow, recipe = load(run), PairRecipe.from_metadata(metadata(run))
    held = torch.from_numpy(np.load(run / "held_out.npy", allow_pickle=False))
    lines = (run / "log.jsonl").read_text(encoding="utf-8").splitlines()
    config = read_json(run / "config.json")
    example = _example(flow, recipe, held, head["seed"])
    write_pictures(run, {"posterior": example.figure})
    name = METHODS.get(type(flow).__name__, type(flow).__name__)
    sections = [
        _summary(flow, metrics, name),
        comparison_section([(name, metrics["nll"]), *metrics["classical"].items()]),
        *_calibration_sections(run, metrics),
        example,
        training_section([json.loads(line) for line in lines], metrics),
        *_pilots(config),
        check_section(Check(**metrics["check"])),
        configuration_section(config),
    ]
    write_report(run / "report.html", head["title"], sections)


def record_check(run: Path, file: Path, check: Check, calibration: Calibration) -> None:
    """Keep what `pathline check` found in a run folder: in metrics, pictures and report."""
    metrics = read_json(run / "metrics.json")
    metrics["checked"] = {
        "file": str(file),
        "check": check.to_dict(),
        "calibration": calibration.to_dict(),
    }
    write_json(run / "metrics.json", metrics)
    write_posterior_report(run)


def write_pictures(run: Path, figures: "Mapping[str, Figure | None]") -> None:
    """Each figure as NAME.png in the folder of a run."""
    from . import plots

    for name, figure in figures.items():
        if figure is not None:
            write_atomically(run / f"{name}.png", partial(_save_bytes, plots.to_png(figure)))


def _save_bytes(content: bytes, path: Path) -> None:
    path.write_bytes(content)


def _save(path: Path, values: np.ndarray) -> None:
    with path.open("wb") as file:  # a name without .npy would get it appended
        np.save(file, values)


def _summary(flow: TransportMap, metrics: Mapping[str, Any], name: str) -> Section:
    check, calibration = metrics["check"], metrics["calibration"]
    told = metrics["calibration_skipped"] if calibration is None else calibration["verdict"]
    gain = metrics["classical"][BASELINE] - metrics["nll"]
    against = "more" if gain >= 0 else "LESS"
    seconds = metrics.get("seconds")
    table = [
        ("Quantity", "Value"),
        ("Negative log-likelihood of the parameters given the data, nats", metrics["nll"]),
        (f"The same of a {BASELINE}", metrics["classical"][BASELINE]),
        ("Held-out pairs they were measured on", metrics["nll_rows"]),
        ("Parameters", flow.dim),
        ("Columns of the data", flow.context_dim),
        ("Numerical grid of densities and samples", flow.grid),
        ("Training steps", metrics.get("steps")),
        ("Training time", None if seconds is None else f"{seconds:,.1f} s"),
        ("Weights of the network", sum(p.numel() for p in flow.parameters())),
    ]
    return Section(
        "Summary",
        f"{told}\n\n{check['verdict']}\n\nOn average over held-out pairs, the {name} gives the "
        f"true parameters {math.exp(min(abs(gain), 700)):.3g} times {against} density than a "
        f"{BASELINE} does. All figures are in the parameters' own units; pairs that were held out "
        "chose the best weights, and were not trained on.",
        table=[row for row in table if row[1] is not None],
    )


def _calibration_sections(run: Path, metrics: Mapping[str, Any]) -> list[Section]:
    """Those of the held-out pairs, and of the last `pathline check`."""
    found = []
    if metrics["calibration"] is not None:
        found.append(("Calibration on held-out pairs", metrics["calibration"]))
    checked = metrics.get("checked")
    if checked:
        found.append((f"Calibration on {Path(checked['file']).name}", checked["calibration"]))
    sections = []
    for i, (title, content) in enumerate(found):
        calibration = _restored(content)
        figures = calibration.figures()
        if i == len(found) - 1:  # the pictures in the folder are those of the newest
            write_pictures(run, figures)
        verdicts = [
            ("Test", "Verdict"),
            ("Ranks", calibration.sbc.verdict),
            ("Expected coverage", calibration.coverage.verdict),
            ("TARP", calibration.tarp.verdict),
        ]
        sections += [
            Section(
                title,
                f"{'Passed.' if calibration.passed else 'NOT passed.'} {calibration.verdict}\n\n"
                "Ranks of the true parameters among samples of their posteriors should be uniform, "
                "within the bands: high ends mean a posterior that is too narrow, a high middle "
                "one that is too wide, a slope a bias.",
                table=verdicts,
                figure=figures["ranks"],
            ),
            Section(
                f"Coverage, {title[0].lower()}{title[1:]}",
                "How often regions of the posterior hold the true parameters; the diagonal is "
                "right. Highest-density regions below it mean over-confidence.",
                figure=figures["coverage"],
            ),
        ]
    if not found:
        sections.append(Section("Calibration", metrics["calibration_skipped"]))
    return sections


def _restored(content: Mapping[str, Any]) -> Calibration:
    """The inverse of `Calibration.to_dict`."""

    def part(kind: type, name: str) -> Any:
        fields = {
            key: tuple(value)
            if key in ("names", "p_values", "adjusted")
            else np.array(value)
            if isinstance(value, list)
            else value
            for key, value in content[name].items()
        }
        return kind(**fields)

    return Calibration(
        part(RankTest, "sbc"), part(Coverage, "coverage"), part(Coverage, "tarp"),
        content["passed"], content["verdict"],
    )  # fmt: skip


def _example(flow: TransportMap, recipe: PairRecipe, held: Tensor, seed: int) -> Section:
    from . import plots

    truth, observation = held[0, : flow.dim], held[0, flow.dim :]
    samples = flow.sample(SHOWN, observation, seed=seed).double().numpy()
    shown = ", ".join(
        f"{name} = {value:.4g}"
        for name, value in list(zip(recipe.data_names, observation.tolist(), strict=True))[:8]
    )
    more = f" and {flow.context_dim - 8} more columns" if flow.context_dim > 8 else ""
    return Section(
        "An example",
        f"The posterior given the first held-out observation, {shown}{more}. The green lines are "
        "the parameters that it was made with.",
        figure=plots.pairs(samples, recipe.names, truth=truth.numpy()),
    )


def _pilots(config: Mapping[str, Any]) -> list[Section]:
    pilots = config.get("metadata", {}).get("pilots", [])
    if not pilots:
        return []
    columns = list(dict.fromkeys(name for pilot in pilots for name in pilot if name != "nll"))
    rows = [[pilot.get(name, "default") for name in columns] + [pilot["nll"]] for pilot in pilots]
    head = [*(name.replace("_", " ") for name in columns), "validation NLL, nats"]
    return [
        Section(
            "Pilot runs",
            f"{len(pilots)} short runs tried settings drawn at random; those of the first row "
            "were taken.",
            table=[head, *rows],
        )
    ]
