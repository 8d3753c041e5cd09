"""The report of a classifier: accuracy on held-out rows, and whether the network is stable."""

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .control_report import read_run
from .errors import SolveWarning
from .models import load, metadata
from .networks import ContinuousNet, StabilityReport, stability_report
from .report import Section, configuration_section, write_report
from .train.files import read_json, write_atomically, write_json

KIND = "classifier"
HELD = "held_out.npy"  # rows, and the number of the class in the last column
KEPT = 10_000
ATTACKED = 200  # rows whose perturbations are followed
MOST_CLASSES = 12  # in the table of confusions
AMPLIFIED = 100.0  # growth of perturbations, at worst, beyond which a network counts as unstable


@torch.no_grad()
def logits(net: ContinuousNet, kept: Mapping[str, Any], x: np.ndarray) -> Tensor:
    """(rows, classes) of rows in the units of the table."""
    scaled = (x - np.array(kept["center"])) / np.array(kept["scale"])
    return torch.cat([net(part) for part in torch.tensor(scaled).split(4096)])


def judge(
    net: ContinuousNet, kept: Mapping[str, Any], x: np.ndarray, codes: np.ndarray, *, seed: int = 0
) -> dict[str, Any]:
    """Accuracy, confusions and stability on rows with known classes.

    It passes if it is more accurate than the commonest class of these rows, and no perturbation
    grows a hundred times.
    """
    log_prob = torch.log_softmax(logits(net, kept, x), 1).numpy()
    best, count = log_prob.argmax(1), len(kept["classes"])
    accuracy = float((best == codes).mean())
    common = float(np.bincount(codes, minlength=count).max() / len(codes))
    stability = _stability(net, kept, x, codes, seed)
    growth = float(stability.worst[-1])
    passed = accuracy > common and growth < AMPLIFIED
    attacked = {
        name: [float(value) for value in values]
        for name, values in (stability.accuracy or {}).items()
    }
    return {
        "rows": len(x),
        "accuracy": accuracy,
        "log_loss": float(-log_prob[np.arange(len(x)), codes].mean()),
        "commonest_class": common,
        "confusion": np.bincount(count * codes + best, minlength=count**2)
        .reshape(count, count)
        .tolist(),
        "growth": growth,
        "accuracy_under_attack": attacked,
        "epsilons": stability.epsilons.tolist(),
        "stability": stability.table(),
        "passed": passed,
        "verdict": (
            f"{'passed' if passed else 'not to be trusted'}: accuracy {accuracy:.2%} on {len(x)} "
            f"rows (the commonest class has {common:.2%}); perturbations grow {growth:.3g} times "
            "at worst"
        ),
    }


def finish_classifier(
    run: Path,
    train: tuple[np.ndarray, np.ndarray],
    held: tuple[np.ndarray, np.ndarray],
    *,
    title: str,
    seed: int,
) -> dict[str, Any]:
    """Judge the classifier of a finished run on held-out rows, beside a logistic regression, and
    add what is found to its folder: metrics.json, held_out.npy and report.html.

    Args:
        run: the folder.
        train, held: rows in the units of the table, and the numbers of their classes.
        title: of the report.
        seed: of perturbations.

    Returns:
        The metrics.
    """
    from sklearn.linear_model import LogisticRegression

    net, kept = load(run).double().eval(), metadata(run)
    metrics = read_json(run / "metrics.json")
    scaled = [(x - np.array(kept["center"])) / np.array(kept["scale"]) for x, _ in (train, held)]
    linear = LogisticRegression(max_iter=1000).fit(scaled[0], train[1])
    metrics |= {
        "check": judge(net, kept, *held, seed=seed),
        "checked": "held-out rows",
        "logistic_regression": float(linear.score(scaled[1], held[1])),
        "report": {"kind": KIND, "title": title, "seed": seed},
    }
    write_json(run / "metrics.json", metrics)
    _keep(run, *held)
    write_classifier_report(run)
    return metrics


def record_check(
    run: Path, file: Path, check: Mapping[str, Any], x: np.ndarray, codes: np.ndarray
) -> None:
    """Put what was found on other rows into the metrics of a run, and renew its report."""
    found = read_json(run / "metrics.json") | {"check": dict(check), "checked": str(file)}
    found.pop("logistic_regression", None)  # of the rows before
    write_json(run / "metrics.json", found)
    _keep(run, x, codes)
    write_classifier_report(run)


def write_classifier_report(run: Path) -> None:
    """Write report.html from what is in the folder of a run.

    Raises:
        ModelError: the folder holds no finished run of `fit classifier`.
    """
    from . import plots

    metrics, history = read_run(run, KIND, "classifier")
    net, kept = load(run).double().eval(), metadata(run)
    rows = np.load(run / HELD)
    check, head = metrics["check"], metrics["report"]
    stability = _stability(net, kept, rows[:, :-1], rows[:, -1].astype(int), head["seed"])
    steps = [entry["step"] for entry in history]
    lines = {
        name: (steps, [entry.get(name) or np.nan for entry in history])
        for name in ("loss", "validation")
    }
    sections = [
        _summary(metrics, kept),
        _confusions(check, kept),
        Section(
            "Stability",
            "How far perturbations of standardised rows grow along the layers, where the spectrum "
            f"of the velocity lies, what becomes of the energy, and how {min(ATTACKED, len(rows))} "
            "rows fare under attacks.",
            figure=stability.figure(),
            code=stability.table(),
        ),
        Section(
            "Training",
            f"Training made {metrics.get('steps', 0):,} steps; the best model is that of step "
            f"{metrics.get('best_step', 0):,}. The validation is the cross entropy in nats; the "
            "loss has the regularisers, too.",
            figure=plots.curves(lines, "training step", "nats", "Course of training", log_y=True)
            if history
            else None,
        ),
        configuration_section(read_json(run / "config.json")),
    ]
    write_report(run / "report.html", head["title"], sections)


def _stability(
    net: ContinuousNet, kept: Mapping[str, Any], x: np.ndarray, codes: np.ndarray, seed: int
) -> StabilityReport:
    scaled = (x[:ATTACKED] - np.array(kept["center"])) / np.array(kept["scale"])
    labels = torch.tensor(codes[:ATTACKED])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", SolveWarning)  # the table names step and bound
        return stability_report(net, torch.tensor(scaled), labels, seed=seed)


def _keep(run: Path, x: np.ndarray, codes: np.ndarray) -> None:
    rows = np.column_stack([x, codes])[:KEPT]

    def write(path: Path) -> None:
        with path.open("wb") as file:
            np.save(file, rows, allow_pickle=False)

    write_atomically(run / HELD, write)


def _summary(metrics: Mapping[str, Any], kept: Mapping[str, Any]) -> Section:
    check, seconds = metrics["check"], metrics.get("seconds")
    linear = metrics.get("logistic_regression")
    rows: list[tuple[str, object]] = [
        ("Checked on", f"{metrics['checked']} ({check['rows']:,})"),
        ("Accuracy", f"{check['accuracy']:.2%}"),
        ("Of a logistic regression", None if linear is None else f"{linear:.2%}"),
        ("Of the commonest class", f"{check['commonest_class']:.2%}"),
        ("Cross entropy, nats", check["log_loss"]),
        ("Growth of perturbations at worst", check["growth"]),
        ("Classes, columns", f"{len(kept['classes'])}, {len(kept['columns'])}"),
        ("Training steps", metrics.get("steps")),
        ("Training time", None if seconds is None else f"{seconds:,.1f} s"),
    ]
    verdict = check["verdict"]
    table = [("Quantity", "Value"), *(row for row in rows if row[1] is not None)]
    return Section("Summary", f"{verdict[:1].upper()}{verdict[1:]}.", table=table)


def _confusions(check: Mapping[str, Any], kept: Mapping[str, Any]) -> Section:
    names = [str(name) for name in kept["classes"]][:MOST_CLASSES]
    table: list[tuple[object, ...]] = [("Class", *(f"taken for {name}" for name in names))]
    counts = zip(names, check["confusion"], strict=False)
    table += [(name, *row[:MOST_CLASSES]) for name, row in counts]
    more = len(kept["classes"]) - len(names)
    told = f" The first {MOST_CLASSES} classes are shown." if more > 0 else ""
    return Section("Confusions", f"Rows of each class, by what they were taken for.{told}", table)
