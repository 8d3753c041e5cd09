"""`pathline fit classifier` and `predict`: networks that are differential equations, for tables."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from cyclopts import Parameter

from ..classifier_report import finish_classifier, judge, logits, record_check
from ..data import Table, read_labelled, read_table, write_labelled
from ..data.tables import scales, write_table
from ..errors import ArgumentError, DataError
from ..models import load, metadata
from ..nets import TimeBasis
from ..networks import Classification, ContinuousNet, dense_net
from ..train import fit, hold_out
from ..train.files import has_report
from .options import Columns, Flag, Positive, RunOptions, Seconds, Weight, answer, names

Kind = Literal["residual", "antisymmetric", "parabolic", "hamiltonian", "second-order"]
ORDER = 4  # of the weights in time


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class ClassifierOptions:
    """The network of `fit classifier`."""

    dynamics: Kind = "hamiltonian"
    "The equation that moves the features."
    width: Positive = 32
    "Features; even for dynamics hamiltonian."
    steps: Positive = 8
    "Time steps, which are the layers."
    horizon: Seconds = 5.0
    "The end of time."
    decay: Weight = 1e-4
    "Weight of the squares of all weights, and of those of their changes in time."


def classifier(
    file: Path,
    /,
    *,
    target: str,
    run: RunOptions,
    validation: Path | None = None,
    drop: Columns = None,
    options: ClassifierOptions | None = None,
    batch_size: Positive = 256,
    learning_rate: Seconds | None = None,
    patience: Positive = 15,
) -> None:
    """Learn to tell the classes of rows, by a deep network that is a stable differential equation.

    The report has the accuracy on rows that were held out, and whether the network is stable.

    Parameters
    ----------
    file
        The table: .csv, .csv.gz, .npy, .npz or .parquet; all columns but the target are numbers.
    target
        Column of the classes, numbers or text. If all are numbers, 007 and 7 are the same.
    run
        What every command that trains takes.
    validation
        A table of the same columns that picks the best model; a tenth of FILE by default.
    drop
        Columns to leave out.
    options
        The network.
    batch_size
        Rows of a training step.
    learning_rate
        The first of a cosine schedule; 0.01 by default.
    patience
        Stop after this many validations without improvement, of about fifty.
    """
    chosen = options or ClassifierOptions()
    table, labels = read_labelled(file, target, "--target")
    table = table.drop(names(drop, table.columns))
    x = _finite(table)
    classes, codes = np.unique(labels, return_inverse=True)
    if len(classes) < 2:
        raise DataError(f"{file}: column {target!r} must hold at least two classes, got one")
    if len(classes) > len(labels) // 2:
        raise DataError(
            f"{file}: column {target!r} holds {len(classes)} classes in {len(labels)} rows; these "
            "are no classes"
        )
    kept: dict[str, Any] = {
        "file": str(file),
        "validation": None if validation is None else str(validation),
        "target": target,
        "classes": classes.tolist(),
        "columns": list(table.columns),
        "named": table.named,
        "center": x.mean(0).tolist(),
        "scale": scales(x, x.std(0)).tolist(),
    }
    held = None if validation is None else _rows(kept, validation)
    net = dense_net(
        chosen.dynamics,
        x.shape[1],
        len(classes),
        width=chosen.width,
        steps=chosen.steps,
        time=TimeBasis("piecewise-linear", ORDER, chosen.horizon),
        seed=run.seed,
    )
    decay = chosen.decay
    fit(
        Classification(net, smoothness=decay, decay=decay, head=decay),
        _pair(kept, x, codes),
        validation=None if held is None else _pair(kept, *held),
        batch_size=batch_size,
        learning_rate=learning_rate,
        patience=patience,
        metadata=kept,
        **run.training(),
    )
    train = np.arange(len(x))
    if held is None:
        kept_rows, out = hold_out(len(x), run.seed)
        train, held = kept_rows.numpy(), (x[out.numpy()], codes[out.numpy()])
    metrics = finish_classifier(
        run.out, (x[train], codes[train]), held, title=f"Classes of {file.name}", seed=run.seed
    )
    check = metrics["check"]
    text = f"{check['verdict']}\nwrote {run.out}: model, report.html, metrics.json, log.jsonl"
    answer(metrics, run.json, text)


def predict(model: Path, file: Path, /, *, out: Path, json: Flag = False) -> None:
    """The class of each row of a table, and the probabilities of all classes.

    Parameters
    ----------
    model
        A run folder of `fit classifier`, or the model inside it.
    file
        Table with the columns of the training table; that of the target may be there or not.
    out
        File to write, with the column of the target, and for each class one of probabilities.
    json
        Print one JSON object on standard output.
    """
    net, kept = open_classifier(model)
    table = read_table(file, text=kept["target"])
    x = _finite(table.fitted(kept["columns"], kept["named"]))
    found = torch.softmax(logits(net, kept, x), 1).numpy()
    classes = np.array(kept["classes"])
    best = classes[found.argmax(1)]
    columns = [f"p({name})" for name in kept["classes"]]
    write_labelled(out, kept["target"], best, found, columns)
    counts = {str(name): int((best == name).sum()) for name in classes}
    content = {"rows": len(x), "counts": counts, "out": str(out)}
    answer(content, json, f"wrote the classes of {len(x)} rows to {out}")


def check_classifier(model: Path, file: Path | None, seed: int, as_json: bool) -> int:
    """`pathline check` of a classifier."""
    net, kept = open_classifier(model)
    if file is None:
        raise ArgumentError(f"check needs a FILE with rows and classes to judge {model} on")
    x, codes = _rows(kept, file)
    found = judge(net, kept, x, codes, seed=seed)
    if has_report(model):
        record_check(model, file, found, x, codes)
    answer(found, as_json, f"{found['stability']}\n{found['verdict']}")
    return 0 if found["passed"] else 1


def score_classifier(model: Path, file: Path, out: Path | None, as_json: bool) -> None:
    """`pathline score` of a classifier: the log-probability of the class of each row."""
    net, kept = open_classifier(model)
    x, codes = _rows(kept, file)
    log_prob = torch.log_softmax(logits(net, kept, x), 1).numpy()
    own = log_prob[np.arange(len(x)), codes]
    if out is not None:
        write_table(out, own[:, None], ("log_prob",))
    accuracy = float((log_prob.argmax(1) == codes).mean())
    content = {"rows": len(x), "mean_log_prob": float(own.mean()), "accuracy": accuracy}
    text = (
        f"mean log-probability {own.mean():.6g} nats, accuracy {accuracy:.2%}, over {len(x)} rows"
    )
    answer(content | ({"out": str(out)} if out else {}), as_json, text)


def open_classifier(model: Path) -> tuple[ContinuousNet, dict[str, Any]]:
    """The network in double precision, and what it knows of its table.

    Raises:
        ArgumentError: the model is something else.
    """
    net, kept = load(model), metadata(model)
    if not isinstance(net, ContinuousNet) or "classes" not in kept:
        raise ArgumentError(f"{model} holds no classifier, but a {type(net).__name__}")
    return net.double().eval(), kept


def _pair(kept: dict[str, Any], x: np.ndarray, codes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """What the network learns from: standardised rows, and numbers of classes."""
    return (x - kept["center"]) / kept["scale"], codes.astype(np.float64)[:, None]


def _rows(kept: dict[str, Any], file: Path) -> tuple[np.ndarray, np.ndarray]:
    """The rows of a table, and the numbers of their classes."""
    table, labels = read_labelled(file, kept["target"], str(file))
    x, classes = _finite(table.fitted(kept["columns"], kept["named"])), np.array(kept["classes"])
    known = np.isin(labels, classes)
    if not known.all():
        raise DataError(
            f"{file}: the model does not know the class {labels[~known][0]!s}; it knows "
            f"{', '.join(map(str, classes[:20]))}"
        )
    return x, np.searchsorted(classes, labels)


def _finite(table: Table) -> np.ndarray:
    x = np.array(table.values, dtype=np.float64)
    if not np.isfinite(x).all():
        row, column = np.argwhere(~np.isfinite(x))[0]
        raise DataError(
            f"{table.name}, row {row + 1}, column {table.columns[column]!r}: a classifier needs "
            f"finite values, got {x[row, column]}"
        )
    if not x.shape[1]:
        raise DataError(f"{table.name} has no columns beside the target")
    return x
