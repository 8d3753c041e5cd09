"""The figures have what they promise, and a report is one file that opens anywhere."""

import base64
import io
import json
import re
import subprocess
import sys
from html.parser import HTMLParser
from itertools import pairwise

import numpy as np
import pytest
import torch

import pathline as pl
from pathline import plots, report
from pathline.errors import ShapeError

PNG = b"\x89PNG\r\n\x1a\n"
HISTORY = [
    {"step": i, "loss": 3 - i / 20, "nll": 2.9 - i / 20, "transport": 0.1 * i, "hjb": 0.5 / i,
     "learning_rate": 0.01}
    for i in range(1, 40)
]  # fmt: skip


class Page(HTMLParser):
    """Tags in order, headings, cells, pictures, and whether every tag is closed."""

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.headings, self.cells, self.images = [], [], [], [], []
        self.paragraphs = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        if tag == "img":
            self.images.append(dict(attrs))
        if tag not in ("meta", "img", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        {"h2": self.headings, "th": self.cells, "td": self.cells, "p": self.paragraphs}.get(
            self.open[-1] if self.open else "", []
        ).append(data)


def pixels(png):
    """A decoded PNG, (height, width, channels)."""
    from matplotlib.image import imread

    assert png.startswith(PNG)
    return imread(io.BytesIO(png), format="png")


def blobs(n, dim, seed=0):
    rng = np.random.default_rng(seed)
    return rng.normal(size=(n, dim)) @ rng.normal(size=(dim, dim)) + 3 * rng.integers(0, 2, (n, 1))


def names(dim):
    return [f"column {i} with a rather long name, in $ per m^2" for i in range(dim)]


def fitted(dim, x):
    flow = pl.flows.OTFlow(dim, width=8, steps=4, generator=torch.Generator().manual_seed(0))
    flow.standardize.mean.copy_(torch.from_numpy(x.mean(0)))
    flow.standardize.scale.copy_(torch.diag(torch.from_numpy(x.std(0)).clamp_min(1e-3)))
    return flow


@pytest.mark.parametrize("dim, axes", [(1, 1), (2, 3), (6, 21), (43, 36)])
def test_corner_has_a_panel_for_each_pair(dim, axes):
    figure = plots.corner(blobs(500, dim), blobs(400, dim, 1), names(dim))
    assert len(figure.axes) == axes
    title = figure.get_suptitle()
    assert ("first 8 of 43" in title) == (dim > 8)
    assert pixels(plots.to_png(figure, dpi=30)).std() > 0


@pytest.mark.parametrize("rows", [0, 1, 5])
def test_corner_draws_few_rows(rows):
    assert plots.to_png(plots.corner(blobs(rows, 3), blobs(rows, 3), names(3)), dpi=30)


@pytest.mark.parametrize("value", [0.0, -7.0, 1.7e9, 1e-12])
@pytest.mark.parametrize("spread", [0.0, 1e-9])
def test_corner_draws_a_constant_column(value, spread):
    x, y = blobs(500, 3), blobs(500, 3, 1)
    x[:, 1], y[:, 1] = value, value + spread * y[:, 1]
    plots.to_png(plots.corner(x, y, names(3)), dpi=30)


def test_corner_leaves_out_rows_that_are_not_finite_and_far_ones():
    x, y = blobs(500, 2), blobs(500, 2)
    x[3, 0], y[4, 1], x[5, 0], y[6, 0] = np.nan, -np.inf, 1e6, -1e300
    low, high = plots.corner(x, y, ["a", "b"]).axes[0].get_xlim()
    assert -50 < low < high < 50


def test_labels_of_ticks_do_not_overlap():
    x = blobs(500, 6) * [1, 10, 1e3, 1e-4, 1, 1e6] + [0, 50, 0, 0, 1.7e9, 0]
    figure = plots.corner(x, x, names(6))
    plots.to_png(figure)
    boxes = [
        label.get_window_extent()
        for ax in figure.axes[-6:]
        for label in ax.get_xticklabels()
        if label.get_text() and label.get_visible()
    ]
    assert len(boxes) >= 6
    boxes.sort(key=lambda box: box.x0)
    assert all(a.x1 < b.x0 for a, b in pairwise(boxes))


def test_shortened_names_stay_distinct():
    figure = plots.corner(
        blobs(50, 8), blobs(50, 8), [f"a long name, {i}, of a column" * 2 for i in range(8)]
    )
    labels = [ax.get_xlabel() for ax in figure.axes if ax.get_xlabel()]
    assert len(set(labels)) == 8


def test_corner_checks_columns():
    with pytest.raises(ShapeError, match="same number of columns"):
        plots.corner(blobs(10, 3), blobs(10, 2), names(3))


def test_density2d_panels():
    x, y = np.linspace(-2, 5, 30), np.linspace(-3, 4, 40)
    log_density = -0.5 * (x[None] ** 2 + y[:, None] ** 2)
    log_density[0] = -np.inf
    figure = plots.density2d(x, y, log_density, blobs(400, 2), blobs(400, 2))
    assert len(figure.axes) == 3 + 1  # with the scale
    assert {ax.get_xlim() for ax in figure.axes[:3]} == {(-2.0, 5.0)}
    assert {ax.get_ylim() for ax in figure.axes[:3]} == {(-3.0, 4.0)}
    assert len(plots.density2d(x, y, log_density, blobs(400, 2)).axes) == 2 + 1
    plots.to_png(figure, dpi=30)
    with pytest.raises(ShapeError, match=r"\(40, 30\)"):
        plots.density2d(x, y, log_density.T, blobs(400, 2))


@pytest.mark.parametrize("dim", [1, 2, 6, 43])
def test_trajectories(dim):
    paths = np.random.default_rng(0).normal(size=(9, 20, dim)).cumsum(0)
    figure = plots.trajectories(paths, names(dim))
    assert len(figure.axes) == 1
    lines = figure.axes[0].collections[0].get_segments()
    assert len(lines) == 20 and lines[0].shape == (9, 2)
    plots.to_png(figure, dpi=30)


def test_trajectories_show_the_columns_that_move():
    paths = np.zeros((5, 10, 6))
    paths[:, :, [1, 4]] = np.linspace(0, 1, 5)[:, None, None]
    ax = plots.trajectories(paths, list("abcdef")).axes[0]
    assert (ax.get_xlabel()[0], ax.get_ylabel()[0]) == ("b", "e")


def test_losses():
    figure = plots.losses(HISTORY)
    assert len(figure.axes) == 2
    assert figure.axes[1].get_yscale() == "log"
    assert len(plots.losses([{"step": 1, "loss": 2.0}]).axes) == 1
    zeros = [entry | {"transport": 0.0, "hjb": 0.0} for entry in HISTORY]
    assert plots.losses(zeros).axes[1].get_yscale() == "linear"
    for history in (HISTORY, HISTORY[:1], zeros, []):
        plots.to_png(plots.losses(history), dpi=30)


def test_bars_are_ordered_and_labelled():
    figure = plots.bars(["b", "none", "a"], [-1.25, float("inf"), -3.5], "NLL in $")
    (ax,) = figure.axes
    assert [label.get_text() for label in ax.get_yticklabels()] == ["a", "b", "none"]
    assert [text.get_text() for text in ax.texts] == ["\u22123.50", "\u22121.25", "inf"]
    plots.to_png(figure, dpi=30)
    for values in ([], [2.0], [1.0, 1.0], [float("nan"), float("inf")]):
        plots.to_png(plots.bars(["a", "b"][: len(values)], values, ""), dpi=30)


@pytest.mark.parametrize(
    "ticks, texts",
    [
        ([-0.5, 0.0, 0.5], ["\u22120.5", "0.0", "0.5"]),
        ([0, 20, 40], ["0", "20", "40"]),
        ([-2e6, 0, 2e6], ["\u22122e6", "0", "2e6"]),
        ([1.7e9, 1.7e9 + 5], ["1.700000000e9", "1.700000005e9"]),
        ([0.0, 2e-5], ["0", "2e\u22125"]),
        ([0.0], ["0"]),
    ],
)
def test_labels_of_ticks(ticks, texts):
    assert plots.Plain().format_ticks(ticks) == texts


def test_figures_leave_matplotlib_alone():
    code = """
import sys, numpy as np, matplotlib
state = lambda: repr(sorted(dict.items(matplotlib.rcParams)))  # asks for no backend
before = state()
from pathline import plots, report
x = np.random.default_rng(0).normal(size=(400, 3))
plots.to_png(plots.corner(x, x, "abc"))
assert "matplotlib.pyplot" not in sys.modules
assert state() == before
"""
    subprocess.run([sys.executable, "-c", code], check=True)
    code = "import sys, pathline.report; assert 'matplotlib' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def page_of(sections, folder, **options):
    path = folder / "new" / "report.html"
    report.write_report(path, "A <title>", sections, **options)
    assert [entry.name for entry in path.parent.iterdir()] == ["report.html"]
    text = path.read_text(encoding="utf-8")
    page = Page(text)
    assert not page.open
    assert not {"script", "link", "iframe", "object"} & set(page.tags)
    assert not re.search(r"https?://|@import|url\(", text)
    assert all(
        source.startswith("data:image/png;base64,") for source in re.findall(r'src="([^"]*)', text)
    )
    for image in page.images:
        assert image["alt"]
        assert pixels(base64.b64decode(image["src"].partition(",")[2])).ndim == 3
    return page, text


@pytest.mark.parametrize("dim", [1, 2, 6, 43])
def test_density_report(dim, tmp_path):
    x = blobs(600, dim)
    flow = fitted(dim, x)
    columns = ["<script>alert('x')</script>", *names(dim)][:dim]
    check = flow.check(torch.from_numpy(x[:200]))
    metrics = {
        "steps": 40, "best_step": 30, "stopped": "early", "train_time_steps": 6,
        "hjb_weight": 0.225, "events": ["step 20: <b> & more"] * 14,
    }  # fmt: skip
    sections = report.density_sections(
        flow,
        data=x,
        columns=columns,
        history=HISTORY,
        check=check,
        config={"model": flow.config(), "columns": columns, "unknown": object},
        metrics=metrics,
        comparison=[("OT-Flow", -1.5), ("<script>", 2.0)],
    )
    page, text = page_of(sections, tmp_path, subtitle="600 rows <i>")
    assert page.headings == [section.title for section in sections]
    assert ("Density in the plane" in page.headings) == (dim == 2)
    assert len(page.images) == sum(section.figure is not None for section in sections)
    assert "<script" not in text and "&lt;script&gt;" in text
    assert "time steps from 4 to 6" in text and "from 0.1 to 0.225" in text
    assert "step 20: <b> & more" in page.cells
    assert any("first 12 of 14" in text for text in page.paragraphs)
    assert any(check.verdict in text for text in page.paragraphs)


def test_report_of_a_bare_run(tmp_path):
    """No history, no metrics, no comparison; a constant column and half precision data."""
    x = blobs(100, 2).astype(np.float32)
    x[:, 1] = 5
    flow = fitted(2, x.astype(float))
    check = flow.check(torch.from_numpy(x))
    before = flow.standardize.mean.clone()
    sections = report.density_sections(
        flow, data=x, columns=["a", "b"], history=[], check=check, config={}, metrics={}
    )
    page, _ = page_of(sections, tmp_path)
    assert "Comparison" not in page.headings
    assert torch.equal(flow.standardize.mean, before)
    with pytest.raises(ShapeError, match="columns"):
        report.density_sections(
            flow, data=x, columns=["a"], history=[], check=check, config={}, metrics={}
        )


def test_sections_are_plain_text(tmp_path):
    table = [("Name", "Value"), ("a & b", -1234567), ("tiny", -2.5e-7), ("on", True), ("no", None)]
    code = json.dumps({"<script>": [1, 2]}, indent=2)
    section = report.Section("T < U", "One.\n\nTwo <i>.", table=table, code=code)
    page, text = page_of([section], tmp_path)
    assert page.headings == ["T < U"]
    assert page.paragraphs[:2] == ["One.", "Two <i>."]
    assert "a & b" in page.cells
    assert "\u22121,234,567" in page.cells and "\u22122.5e\u221207" in page.cells
    assert "yes" in page.cells
    assert "<script>" not in text


def test_a_failed_write_keeps_the_old_report(tmp_path):
    path = tmp_path / "report.html"
    report.write_report(path, "old \udcff", [])  # no valid text, and yet a page
    before = path.read_bytes()

    class Broken:
        def savefig(self, *args, **options):
            raise OSError

    with pytest.raises(OSError):
        report.write_report(path, "new", [report.Section("x", figure=Broken())])
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]
