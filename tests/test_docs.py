"""The documentation names what exists, and everything that exists is documented."""

import contextlib
import importlib
import inspect
import io
import re
import shlex
from pathlib import Path

import numpy as np
import pytest

from pathline.cli import main
from pathline.flows import FlowObjective

ROOT = Path(__file__).parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")])
PACKAGES = (
    *("pathline", "pathline.flows", "pathline.control", "pathline.integrate", "pathline.nets"),
    *("pathline.native", "pathline.export", "pathline.convert"),
    *("pathline.train", "pathline.models", "pathline.estimators", "pathline.data"),
    *("pathline.reproduce", "pathline.cli", "pathline.calculus", "pathline.errors"),
    *("pathline.report", "pathline.compat.torchdiffeq", "pathline.posterior"),
    *("pathline.control.problems", "pathline.export_policy", "pathline.games"),
    "pathline.networks",
)
COMMANDS = (
    *("fit density", "fit posterior", "fit conditional", "sample", "score", "check", "report"),
    *("reproduce", "export", "convert", "solve", "fit dynamics", "fit classifier"),
    *("forecast", "predict"),
)
# Flags of other programs that the pages name.
FOREIGN = {
    *("--nproc-per-node", "--tables", "--figure", "--jax-python"),
    *("--method", "--data", "--summary", "--plot", "--check", "--parts", "--threads"),
    "--samples",
}
pages = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)


def public(package):
    """The public names of a package and what they stand for."""
    module = importlib.import_module(package)
    names = getattr(module, "__all__", None)
    if names is None:
        names = [
            name
            for name, value in vars(module).items()
            if not name.startswith("_") and getattr(value, "__module__", "") == package
        ]
    return {name: getattr(module, name) for name in names}


def blocks(page, language):
    """The fenced blocks of a page in one language."""
    text = page.read_text(encoding="utf-8")
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.DOTALL | re.MULTILINE)


def command_lines(page):
    """The `pathline` commands in the console blocks of a page, as lists of words."""
    for line in "".join(blocks(page, "console")).splitlines():
        words = shlex.split(line, comments=True)
        if "pathline" in words and "pip" not in words:
            words = words[words.index("pathline") + 1 :]
            yield words[: words.index(">")] if ">" in words else words


@pytest.fixture(scope="module")
def flags():
    """The flags of each command, as its `--help` prints them."""
    found = {}
    for command in COMMANDS:
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed), pytest.MonkeyPatch.context() as patch:
            patch.setenv("COLUMNS", "200")
            assert main([*command.split(), "--help"]) == 0
        found[command] = set(re.findall(r"(?<![\w-])--?[a-z][a-z-]*", printed.getvalue()))
    return found


@pytest.mark.parametrize("package", PACKAGES)
def test_public_names_are_documented(package):
    text = (ROOT / "docs" / "api.md").read_text(encoding="utf-8")
    documented = set(re.findall(r"pathline(?:\.\w+)+", text))
    names = public(package)
    assert names
    assert [name for name in names if f"{package}.{name}" not in documented] == []


@pytest.mark.parametrize("package", PACKAGES)
def test_public_names_have_docstrings(package):
    bare = []
    for name, value in public(package).items():
        if not (inspect.isclass(value) or inspect.isfunction(value) or inspect.ismodule(value)):
            continue  # constants are described in api.md
        if not inspect.getdoc(value):
            bare.append(name)
        if inspect.isclass(value):
            bare += [
                f"{name}.{method}"
                for method, function in vars(value).items()
                if inspect.isfunction(function)
                and not method.startswith("_")
                and not inspect.getdoc(getattr(value, method))
            ]
    assert bare == []


def test_the_api_names_what_exists():
    text = (ROOT / "docs" / "api.md").read_text(encoding="utf-8")
    for name in re.findall(r"(?:auto\w+|py:data):: (pathline[\w.]+)", text):
        module, _, attribute = name.rpartition(".")
        assert hasattr(importlib.import_module(module), attribute), name


@pages
def test_links_lead_to_files(page):
    text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.S | re.M)
    targets = re.findall(r"\]\(([^)\s]+)\)", text)
    local = [t.partition("#")[0] for t in targets if not re.match(r"https?://|#", t)]
    assert [target for target in local if not (page.parent / target).exists()] == []


@pages
def test_commands_exist(page, flags):
    for words in command_lines(page):
        command = " ".join(words[: 2 if words[0] == "fit" else 1])
        assert command in flags, words
        used = {word.partition("=")[0] for word in words if re.match(r"--?[a-z]", word)}
        assert used <= flags[command], words


@pages
def test_flags_exist(page, flags):
    text = page.read_text(encoding="utf-8")
    if page.name == "CONTRIBUTING.md":
        text = re.sub(r"^```.*?^```", "", text, flags=re.S | re.M)
    named = set(re.findall(r"(?<![\w-])--[a-z][a-z-]*", text))
    assert named <= set().union(*flags.values(), FOREIGN, {"--help", "--version"})


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder with the tables that the pages speak of, and few training steps."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(FlowObjective, "default_steps", lambda self, rows: 20)
    for name in ("train", "test"):
        rows = np.random.default_rng(len(name)).normal(size=(200, 3)) @ np.tri(3)
        lines = [",".join(map(repr, map(float, row))) for row in rows]
        (tmp_path / f"{name}.csv").write_text("\n".join(["a,b,c", *lines]) + "\n")
    theta = np.random.default_rng(0).normal(size=(300, 2))
    np.savez(tmp_path / "sims.npz", theta=theta, x=theta**2)
    (tmp_path / "obs.csv").write_text("x0,x1\n0.5,1.0\n")
    return tmp_path


RUNNING = (
    *("start", "add", "solvers", "gradients", "torchdiffeq", "speed", "family", "posterior"),
    *("calibration", "control", "games", "networks", "dynamics"),
)
PAGES_RUNNING = ["README.md", *(f"docs/{name}.md" for name in RUNNING)]
EXPORTING = pytest.param("docs/deployment.md", marks=pytest.mark.slow)


@pytest.mark.parametrize("name", [*PAGES_RUNNING, EXPORTING])
def test_python_of_a_page_runs(name, folder, capsys):
    exec(compile("\n".join(blocks(ROOT / name, "python")), name, "exec"), {"__name__": name})


def test_commands_of_the_readme_run(folder, capsys):
    done = []
    for words in command_lines(ROOT / "README.md"):
        if {"run-two/", "run-corridor/", "run-crowd/"} & set(words):  # two processes; minutes
            continue
        assert main(words) == 0, words
        done.append(words[0])
    assert done == ["fit", "sample", "score", "check", "fit", "sample", "export"]
    written = {path.name for path in folder.iterdir()}
    assert {"run", "samples.csv", "logp.csv"} <= written
    table = re.findall(r"^\| `([\w./]+)` \|", (ROOT / "README.md").read_text(), re.MULTILINE)
    for entry in table:
        assert (folder / "run" / entry).exists(), entry
