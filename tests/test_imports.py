"""The floors of the library: a package imports from the floors below it and from nothing else."""

import ast
import json
import subprocess
import sys
from pathlib import Path

import pytest

import pathline

SOURCE = Path(pathline.__file__).parent
FLOORS = {
    0: (
        "calculus",
        "data",
        "plots",
        "control_plots",
        "games_plots",
        "network_plots",
        "dynamics_plots",
        "errors",
        "native",
    ),
    1: ("integrate", "nets", "native.rollouts"),
    2: ("control", "train", "optim", "compat"),
    3: (
        *("flows", "posterior", "games", "networks", "diffusion", "pde", "inverse", "graphs"),
        "control.problems",
    ),
    4: ("estimators", "models", "export", "export_policy", "convert"),
    5: (
        *("cli", "reproduce", "report", "posterior_report", "control_report", "games_report"),
        "dynamics_report",
        "classifier_report",
        "__main__",
    ),
}
FLOOR = {name: floor for floor, names in FLOORS.items() for name in names}
# Beyond "no upward import": what each may use of its neighbours and of the floors below.
FORBIDDEN = {
    "integrate": {"nets", "native", "native.rollouts"},
    "nets": {"integrate", "native.rollouts"},
    "native.rollouts": {"integrate"},
    "train": {"nets", "integrate", "control", "flows"},
    "control": {"train", "optim"},
    "compat": {"nets", "control", "train", "optim"},
}

# Where the engine meets the training.
ALLOWED = {("control.objective", "train"), ("control.solve", "train")}


def modules(source: Path) -> dict[str, Path]:
    """Dotted name below the package ("" is its __init__) of every module."""
    found = {}
    for path in sorted(source.rglob("*.py")):
        parts = path.relative_to(source).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imports(name: str, path: Path, known: set[str]) -> list[tuple[str, int]]:
    """Modules of the package that `path` imports when it is itself imported, with the line."""
    package = name.split(".") if name else []
    if path.name != "__init__.py":
        package = package[:-1]
    found = []

    def visit(node: ast.AST) -> None:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            return
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            for child in node.orelse:
                visit(child)
            return
        if isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.split(".")[0] == "pathline":
                    found.append((alias.name.removeprefix("pathline").lstrip("."), node.lineno))
        elif isinstance(node, ast.ImportFrom):
            module = node.module or ""
            if node.level:
                base = package[: len(package) - node.level + 1]
            elif module.split(".")[0] == "pathline":
                base, module = [], module.removeprefix("pathline").lstrip(".")
            else:
                return
            target = ".".join([*base, *filter(None, [module])])
            for alias in node.names:
                inner = f"{target}.{alias.name}".lstrip(".")
                if inner in known:
                    found.append((inner, node.lineno))
                elif target or alias.name != "__version__":
                    found.append((target, node.lineno))
        for child in ast.iter_child_nodes(node):
            visit(child)

    visit(ast.parse(path.read_text(encoding="utf-8")))
    return found


def room(module: str) -> str:
    """The name in `FLOOR` that a module belongs to."""
    parts = module.split(".")
    two = ".".join(parts[:2])
    return two if two in FLOOR else parts[0]


def misplaced(source: Path) -> list[str]:
    known = modules(source)
    wrong = []
    for name, path in known.items():
        if not name:  # pathline/__init__ gathers the floors
            continue
        if room(name) not in FLOOR:
            wrong.append(f"{name} stands on no floor: name it in tests/test_imports.py")
            continue
        for target, line in imports(name, path, set(known)):
            here, there = room(name), room(target)
            if not target or there not in FLOOR:
                wrong.append(f"{name}:{line} imports {target or 'the top of the package'}")
            elif (name, there) in ALLOWED or here == there:
                continue
            elif FLOOR[there] > FLOOR[here] or there in FORBIDDEN.get(here, ()):
                wrong.append(f"{name}:{line} imports {target}")
    return wrong


def cycle(graph: dict[str, set[str]]) -> list[str]:
    """A closed path in `graph`, or nothing."""
    done, path = set(), []

    def visit(node: str) -> list[str]:
        if node in path:
            return [*path[path.index(node) :], node]
        if node in done:
            return []
        path.append(node)
        for target in sorted(graph.get(node, ())):
            if found := visit(target):
                return found
        done.add(path.pop())
        return []

    for node in sorted(graph):
        if found := visit(node):
            return found
    return []


def import_graph(source: Path) -> dict[str, set[str]]:
    known = modules(source)
    return {
        name: {target for target, _ in imports(name, path, set(known)) if target != name}
        for name, path in known.items()
    }


def test_no_upward_or_forbidden_import():
    assert misplaced(SOURCE) == []


def test_no_cycle():
    assert cycle(import_graph(SOURCE)) == []


def test_the_walls_are_seen(tmp_path):
    """The two checks above notice what they are for."""
    files = {
        "__init__": "from .nets import a",
        "errors": "",
        "nets/__init__": "from . import a as a",
        "nets/a": "from ..errors import X\nfrom .b import y\nfrom .. import __version__",
        "nets/b": "from .a import x",
        "integrate/__init__": "from ..nets.a import x",
        "train/__init__": "import pathline.flows",
        "flows/__init__": "def f():\n    from ..cli import main\n"
        "if TYPE_CHECKING:\n    from ..cli import main",
        "cli": "from .flows import f",
        "attic": "",
    }
    for name, text in files.items():
        path = tmp_path / f"{name}.py"
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
    assert misplaced(tmp_path) == [
        "attic stands on no floor: name it in tests/test_imports.py",
        "integrate:1 imports nets.a",
        "train:1 imports flows",
    ]
    assert cycle(import_graph(tmp_path)) == ["nets.a", "nets.b", "nets.a"]


@pytest.fixture(scope="module")
def fresh():
    """What `import pathline` did to a new interpreter in which torch was imported before."""
    code = """
import json, sys, torch
def state():
    return [str(torch.get_default_dtype()), torch.get_num_threads(), torch.is_grad_enabled(),
            torch.are_deterministic_algorithms_enabled(), torch.initial_seed()]
before = state()
import pathline
print(json.dumps({"before": before, "after": state(), "modules": sorted(sys.modules)}))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return json.loads(done.stdout)


@pytest.mark.parametrize("name", ["matplotlib", "pandas", "sklearn", "pyarrow", "lightning_fabric"])
def test_import_is_light(fresh, name):
    assert name not in fresh["modules"]


def test_import_changes_no_torch_global(fresh):
    assert fresh["after"] == fresh["before"]
