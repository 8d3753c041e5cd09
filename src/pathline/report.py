"""One self-contained HTML page about a run: text, tables and pictures in a single file."""

import base64
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from . import __version__
from .errors import ModelError, ShapeError
from .flows import Check
from .models import load
from .train.files import read_json, write_atomically, write_json

if TYPE_CHECKING:  # plots brings matplotlib, so it is imported where it is needed
    from .flows import Flow
    from .plots import Figure

POINTS = 5_000  # of the data, and of the samples, in the pictures
PATHS = 200
GRID = 160  # points a side, of the density of a flow in the plane
EVENTS = 12  # listed
PICTURES = "pictures.npz"  # in the folder of a run
MINUS = "\N{MINUS SIGN}"


@dataclass(frozen=True)
class Section:
    """A part of a report: a heading, then text, table, figure and code, each where given.

    `text` is plain, with an empty line between paragraphs; the first row of `table` is its
    header; `code` is shown as it is, in a fixed-width font; `animation` is a GIF.
    """

    title: str
    text: str = ""
    table: Sequence[Sequence[object]] | None = None
    figure: "Figure | None" = None
    code: str = ""
    animation: bytes = b""


def write_report(
    path: str | Path, title: str, sections: Sequence[Section], *, subtitle: str = ""
) -> None:
    """Write `sections` as one HTML file that needs neither network nor scripts.

    Args:
        path: the file; one that is there is replaced in one instant.
        title, subtitle: head of the page.
        sections: in their order on the page.
    """
    body = "\n".join(_section(section) for section in sections)
    under = f'<p class="subtitle">{escape(subtitle)}</p>' if subtitle else ""
    page = f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy"
  content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{escape(title)}</title>
<style>{STYLE}</style>
</head>
<body>
<main>
<header><h1>{escape(title)}</h1>{under}</header>
{body}
<footer>Written by Pathline {escape(__version__)}</footer>
</main>
</body>
</html>
"""
    # A file name or a header row may hold what is no valid text; the page is still written.
    content = page.encode("utf-8", "replace")
    write_atomically(Path(path), lambda temporary: temporary.write_bytes(content))


def finish_density(
    run: Path,
    held_out: np.ndarray,
    columns: Sequence[str],
    *,
    title: str,
    method: str = "OT-Flow",
    classical: Mapping[str, float] | None = None,
    subtitle: str = "",
    pictures: Sequence[tuple[str, str, np.ndarray]] = (),
) -> dict[str, Any]:
    """Judge the flow of a finished run on rows that it was not trained on.

    Evaluates in double precision, adds the figures to metrics.json, and writes report.html.

    Args:
        run: the folder that `fit` wrote.
        held_out: (rows, dim) in the user's units.
        columns: dim names.
        title, subtitle: head of the report.
        method: what the flow is called beside others.
        classical: negative log-likelihoods of other densities on the same rows.
        pictures: (heading, text, images) of sections of their own, with grey levels in [0, 1],
            (rows, columns, height, width).

    Returns:
        The metrics.
    """
    flow = load(run).double()
    x = torch.from_numpy(np.array(held_out, dtype=np.float64))
    check = flow.check(x)
    with torch.no_grad():
        nll = -flow.log_prob(x)
    metrics = read_json(run / "metrics.json")
    metrics |= {"nll": nll.mean().item(), "nll_rows": len(x), "check": check.to_dict()}
    if classical:
        metrics["classical"] = dict(classical)
    metrics["report"] = {
        "title": title,
        "subtitle": subtitle,
        "method": method,
        "columns": list(columns),
        "pictures": [[heading, text] for heading, text, _ in pictures],
    }
    if pictures:
        arrays = [images.astype(np.float32) for _, _, images in pictures]
        write_atomically(run / PICTURES, lambda path: _save_arrays(path, arrays))
    write_json(run / "metrics.json", metrics)
    np.save(run / "held_out.npy", _some_rows(held_out, seed=0))
    write_density_report(run)
    return metrics


def write_density_report(run: Path) -> None:
    """Write report.html from what `fit` and `finish_density` left in the folder of a run.

    Raises:
        ModelError: the folder holds no finished run.
    """
    metrics = read_json(run / "metrics.json")
    head = metrics.get("report")
    if head is None or not (run / "held_out.npy").exists():
        raise ModelError(f"{run} holds no finished run of a command")
    lines = (run / "log.jsonl").read_text(encoding="utf-8").splitlines()
    comparison = None
    if "classical" in metrics:
        method = head.get("method", "OT-Flow")
        comparison = [(method, metrics["nll"]), *metrics["classical"].items()]
    sections = density_sections(
        load(run).double(),
        data=np.load(run / "held_out.npy", allow_pickle=False),
        columns=head["columns"],
        history=[json.loads(line) for line in lines],
        check=Check(**metrics["check"]),
        config=read_json(run / "config.json"),
        metrics=metrics,
        comparison=comparison,
    )
    sections[1:1] = _pictures(run, head.get("pictures", []))
    write_report(run / "report.html", head["title"], sections, subtitle=head["subtitle"])


def _save_arrays(path: Path, arrays: Sequence[np.ndarray]) -> None:
    with path.open("wb") as file:  # a name without .npz would get it appended
        np.savez(file, *arrays)


def _pictures(run: Path, told: Sequence[Sequence[str]]) -> list[Section]:
    """The sections of images that `finish_density` was given, each told by heading and text."""
    from . import plots

    if not told:
        return []
    with np.load(run / PICTURES, allow_pickle=False) as arrays:
        return [
            Section(heading, text, figure=plots.images(arrays[key], heading))
            for (heading, text), key in zip(told, arrays.files, strict=True)
        ]


def density_sections(
    flow: "Flow",
    *,
    data: np.ndarray,
    columns: Sequence[str],
    history: Sequence[Mapping[str, float]],
    check: Check,
    config: Mapping[str, Any],
    metrics: Mapping[str, Any],
    comparison: Sequence[tuple[str, float]] | None = None,
    seed: int = 0,
) -> list[Section]:
    """The report of a density fit: result, comparison, pictures, training, check, configuration.

    Args:
        flow: the trained flow.
        data: (rows, dim) in the user's units; may be memory-mapped, at most 5,000 rows are read.
        columns: dim names.
        history: logged steps, as in `Run.history` or log.jsonl.
        check: what `flow.check` found.
        config: everything that decided the run, as in config.json.
        metrics: as in `Run.metrics` or metrics.json; what is missing is left out.
        comparison: (name, held-out negative log-likelihood in nats) of this flow and others.
        seed: of the rows and the samples in the pictures.
    """
    from . import plots

    if data.ndim != 2 or data.shape[1] != flow.dim or len(columns) != flow.dim:
        raise ShapeError(
            f"`data` must be (rows, {flow.dim}) with {flow.dim} names in `columns`, got "
            f"{tuple(data.shape)} and {len(columns)}"
        )
    rows = _some_rows(data, seed)
    samples = flow.sample(POINTS, seed=seed).double().cpu().numpy()
    sections = [_summary(flow, check, metrics)]
    if comparison:
        sections.append(comparison_section(comparison))
    sections.append(
        Section(
            "Data and samples",
            "Where the model is good, the lines of its samples follow the shades of the data. "
            "The axes leave out the outermost half percent of the data at either end.",
            figure=plots.corner(rows, samples, columns),
        )
    )
    if flow.dim == 2:
        sections.append(plane(flow, rows, samples, columns))
    sections += [
        _paths(flow, rows, columns),
        training_section(history, metrics),
        check_section(check),
    ]
    return [*sections, configuration_section(config)]


def _some_rows(data: np.ndarray, seed: int) -> np.ndarray:
    """Up to `POINTS` random rows, as doubles."""
    if len(data) > POINTS:
        index = np.random.default_rng(seed).choice(len(data), POINTS, replace=False)
        data = data[np.sort(index)]  # in order, for memory-mapped files
    return np.asarray(data, dtype=np.float64)


def _summary(flow: "Flow", check: Check, metrics: Mapping[str, Any]) -> Section:
    told = ["This flow passed its check." if check.passed else "This flow did NOT pass its check."]
    told.append(check.verdict)
    steps, weight = metrics.get("train_time_steps"), metrics.get("hjb_weight")
    seconds = metrics.get("seconds")
    raised = []
    if steps is not None and steps > flow.train_steps:
        raised.append(f"the number of time steps from {flow.train_steps} to {steps}")
    if weight is not None and weight > flow.hjb * (1 + 1e-9):
        raised.append(f"the weight of the HJB residual from {flow.hjb:.3g} to {weight:.3g}")
    changes = len(metrics.get("events", ()))
    if raised:
        told.append(f"To keep the likelihood honest, training raised {' and '.join(raised)}.")
    elif changes:
        told.append(
            f"Training adjusted itself {_times(changes)} and ended with the time steps and the "
            "HJB weight it was given."
        )
    elif "events" in metrics:
        told.append("Training kept the time steps and the HJB weight it was given.")
    table: list[tuple[str, object]] = [
        ("Quantity", "Value"),
        ("Negative log-likelihood, nats per row", check.nll),
        ("The same on a finer time grid", check.nll_fine),
        ("Rows it was measured on", check.rows),
        ("Columns", flow.dim),
        ("Time grid of densities and samples", flow.grid),
        ("Time steps at the end of training", steps),
        ("HJB weight at the end of training", None if weight is None else f"{weight:.3g}"),
        ("Training steps", metrics.get("steps")),
        ("Training step of the best model", metrics.get("best_step")),
        ("Training time", None if seconds is None else f"{seconds:,.1f} s"),
        ("Parameters", sum(p.numel() for p in flow.parameters())),
    ]
    return Section(
        "Summary",
        "\n\n".join([" ".join(told[:2]), *told[2:]]),
        table=[row for row in table if row[1] is not None],
    )


def comparison_section(comparison: Sequence[tuple[str, float]]) -> Section:
    """Held-out negative log-likelihoods in nats, (name, value) each, best first."""
    from . import plots

    ranked = sorted(comparison, key=lambda pair: math.inf if math.isnan(pair[1]) else pair[1])
    best = ranked[0][1]
    table: list[tuple[object, ...]] = [("Method", "Held-out NLL, nats", "Above the best")]
    table += [(name, float(nll), float(nll) - best) for name, nll in ranked]
    names, values = zip(*comparison, strict=True)
    return Section(
        "Comparison",
        "Held-out negative log-likelihood per row; lower is better. A difference of 0.01 nats "
        "means that the other model gives each row, on average, 1 % more density.",
        table=table,
        figure=plots.bars(names, values, "Held-out negative log-likelihood"),
    )


@torch.no_grad()
def plane(flow: "Flow", rows: np.ndarray, samples: np.ndarray, columns: Sequence[str]) -> Section:
    """Data, density and samples of a flow of two columns, side by side."""
    from . import plots

    x, y = (np.linspace(*plots.limits(rows[:, i], samples[:, i]), GRID) for i in (0, 1))
    points = np.stack(np.meshgrid(x, y), -1).reshape(-1, 2)
    grid = flow.log_prob(torch.from_numpy(points).to(flow.standardize.mean.device))
    log_density = grid.double().cpu().numpy().reshape(GRID, GRID)
    return Section(
        "Density in the plane",
        "Equal colours are equal densities.",
        figure=plots.density2d(x, y, log_density, rows, samples, columns),
    )


@torch.no_grad()
def _paths(flow: "Flow", rows: np.ndarray, columns: Sequence[str]) -> Section:
    from . import plots

    start = torch.from_numpy(rows[np.isfinite(rows).all(1)][:PATHS])
    paths = flow.trajectory(start.to(flow.standardize.mean.device)).double().cpu().numpy()
    plane = ", seen in the two coordinates that move most" if flow.dim > 2 else ""
    straight = (
        " Optimal transport makes them nearly straight and keeps them from crossing in space and "
        "time."
        if flow.transport
        else " Nothing in the training of this flow makes them straight."
    )
    return Section(
        "Trajectories",
        f"The ways of {paths.shape[1]} rows from the data to the normal reference, in the "
        f"standardised coordinates in which the flow works{plane}.{straight}",
        figure=plots.trajectories(paths, columns),
    )


def training_section(history: Sequence[Mapping[str, float]], metrics: Mapping[str, Any]) -> Section:
    """The course of training, by log.jsonl and metrics.json."""
    from . import plots

    told = []
    if "steps" in metrics:
        early = metrics.get("stopped") == "early"
        told.append(
            f"Training made {metrics['steps']:,} steps and "
            + ("stopped when validation no longer improved" if early else "used them all")
            + (f"; the best model is that of step {metrics['best_step']:,}."
               if "best_step" in metrics else ".")
        )  # fmt: skip
    if not history:
        told.append("No step was logged.")
    events = list(metrics.get("events", ()))
    if len(events) > EVENTS:
        told.append(f"The first {EVENTS} of {len(events)} adjustments are listed.")
    return Section(
        "Training",
        " ".join(told),
        table=[("Adjustments during training",), *((e,) for e in events[:EVENTS])]
        if events
        else None,
        figure=plots.losses(history) if history else None,
    )


def configuration_section(config: Mapping[str, Any]) -> Section:
    """The content of config.json."""
    text = json.dumps(config, indent=2, ensure_ascii=False, default=str)
    return Section("Configuration", "All that decided this result.", code=text)


def check_section(check: Check) -> Section:
    """What `flow.check` found."""
    grid = [] if check.mass_grid is None else [("Integral over a grid", check.mass_grid, "1")]
    return Section(
        "Check",
        check.verdict,
        table=[
            ("Question", "Answer", "Ideal"),
            ("Rows checked", check.rows, ""),
            ("Time steps", check.steps, ""),
            ("Largest error of the inverse, standard deviations", check.inverse_error, "0"),
            ("Negative log-likelihood, nats", check.nll, ""),
            ("The same on a finer time grid", check.nll_fine, "the same"),
            ("Integral of the density, by importance sampling", check.mass, "1"),
            ("Its standard error", check.mass_error, ""),
            ("Effective share of the importance samples", check.mass_samples, "large"),
            *grid,
            ("Passed", check.passed, "yes"),
        ],
    )


def _section(section: Section) -> str:
    parts = [f"<h2>{escape(section.title)}</h2>"]
    parts += [f"<p>{escape(text)}</p>" for text in section.text.split("\n\n") if text.strip()]
    if section.table is not None:
        parts.append(_table(section.table))
    if section.figure is not None:
        parts.append(_picture(section.figure, section.title))
    if section.animation:
        data = base64.b64encode(section.animation).decode()
        alt = escape(f"{section.title}, in motion")
        parts.append(f'<figure><img src="data:image/gif;base64,{data}" alt="{alt}"></figure>')
    if section.code:
        parts.append(f"<pre>{escape(section.code)}</pre>")
    return "<section>\n" + "\n".join(parts) + "\n</section>"


def _table(table: Sequence[Sequence[object]]) -> str:
    head, *rows = table
    lines = ["<tr>" + "".join(f'<th scope="col">{escape(str(h))}</th>' for h in head) + "</tr>"]
    for row in rows:
        cells = []
        for value in row:
            number = isinstance(value, int | float | np.number) and not isinstance(value, bool)
            cells.append(f"<td{' class=number' if number else ''}>{escape(_text(value))}</td>")
        lines.append("<tr>" + "".join(cells) + "</tr>")
    return (
        f'<div class="table"><table><thead>{lines[0]}</thead>\n<tbody>'
        + "\n".join(lines[1:])
        + "</tbody></table></div>"
    )


def _text(value: object) -> str:
    """A cell: numbers with as many digits as one reads, anything else as it is."""
    if value is None:
        return ""
    if isinstance(value, bool | np.bool_):
        return "yes" if value else "no"
    if isinstance(value, int | np.integer):
        return f"{value:,}".replace("-", MINUS)
    if isinstance(value, float | np.floating):
        size = abs(float(value))
        small = size != 0 and not 1e-3 <= size < 1e6
        return (f"{value:.3g}" if small else f"{value:.4f}").replace("-", MINUS)
    return str(value)


def _picture(figure: "Figure", title: str) -> str:
    from . import plots

    data = base64.b64encode(plots.to_png(figure, dpi=DPI)).decode("ascii")
    width = round(96 * figure.get_size_inches()[0])  # in CSS pixels, 96 to the inch
    alt = escape(str(figure.get_label()) or title)
    return (
        f'<figure><img src="data:image/png;base64,{data}" alt="{alt}" '
        f'style="width:{width}px"></figure>'
    )


def _times(count: int) -> str:
    return {1: "once", 2: "twice"}.get(count, f"{count} times")


DPI = 160  # sharp on paper and on small screens

STYLE = """
:root { color-scheme: light; }
* { box-sizing: border-box; }
body { margin: 0; background: #fff; color: #222; overflow-wrap: break-word;
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, Arial, sans-serif; }
main { max-width: 54rem; margin: 0 auto; padding: 2rem 1.25rem 3rem; }
header { border-bottom: 2px solid #0072b2; margin-bottom: 1.5rem; }
h1 { font-size: 1.7rem; line-height: 1.2; margin: 0 0 .4rem; }
h2 { font-size: 1.2rem; margin: 2.2rem 0 .6rem; }
p { margin: 0 0 .8rem; max-width: 46rem; }
.subtitle { color: #595959; }
.table { overflow-x: auto; margin: 0 0 1rem; }
table { border-collapse: collapse; font-size: .92rem; }
th, td { text-align: left; padding: .3rem 1.4rem .3rem 0; vertical-align: top;
  border-bottom: 1px solid #e3e3e3; }
th { font-weight: 600; border-bottom-color: #888; }
td.number { font-variant-numeric: tabular-nums; white-space: nowrap; }
figure { margin: 1rem 0; }
img { display: block; max-width: 100%; height: auto; }
pre { background: #f6f7f8; border: 1px solid #e3e3e3; border-radius: 4px; padding: .8rem 1rem;
  overflow-x: auto; font: .82rem/1.45 ui-monospace, "SF Mono", Menlo, Consolas, monospace; }
footer { margin-top: 3rem; padding-top: .6rem; border-top: 1px solid #e3e3e3; color: #595959;
  font-size: .85rem; }
@media print {
  @page { margin: 16mm; }
  body { font-size: 10.5pt; }
  main { max-width: none; padding: 0; }
  h2 { break-after: avoid; }
  figure, tr { break-inside: avoid; }
  pre { white-space: pre-wrap; font-size: 8pt; }
}
"""
