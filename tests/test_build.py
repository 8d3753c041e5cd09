"""The build: the compiled kernel stands alone, and a failed build leaves a whole Python package."""

import importlib.machinery
import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

import pathline

ROOT = Path(__file__).parents[1]
NATIVE = Path(pathline.__file__).parent / "native"
CXX = shutil.which(os.environ.get("CXX", "c++"))
HEADERS = Path(sysconfig.get_path("include"), "Python.h").exists()


def output(*command: str | Path, **env: str) -> str:
    run = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **env})
    assert run.returncode == 0, run.stdout + run.stderr
    return run.stdout


def tool(name: str) -> str:
    """The path of a program that reads ELF files."""
    if not sys.platform.startswith("linux") or shutil.which(name) is None:
        pytest.skip(f"needs {name} on Linux")
    return name


@pytest.fixture
def kernel() -> Path:
    for suffix in importlib.machinery.EXTENSION_SUFFIXES:
        if (NATIVE / f"_kernel{suffix}").exists():
            return NATIVE / f"_kernel{suffix}"
    if CXX and HEADERS:
        pytest.fail("there is a compiler, but no kernel: `pip install -v -e .` says why")
    pytest.skip("Pathline was installed without a compiler")


def test_version():
    assert importlib.metadata.version("pathline") == pathline.__version__


def test_kernel_links_the_system_only(kernel):
    """Neither PyTorch, whose versions differ in their binaries, nor an OpenMP beside PyTorch's."""
    names = re.findall(r"^\s+(?:\S*/)?([\w+-]+)\.so", output(tool("ldd"), kernel), re.MULTILINE)
    assert "libc" in names
    loader = {name for name in names if name.startswith("ld-linux")}
    system = {"linux-vdso", "linux-gate", "libc", "libm", "libpthread", "libstdc++", "libgcc_s"}
    assert set(names) - loader <= system


def test_kernel_exports_its_entry_only(kernel):
    lines = output(tool("nm"), "-D", "--defined-only", kernel).splitlines()
    strong = {line.split()[-1] for line in lines if line.split()[-2] in "TDBR"}
    assert strong == {"PyInit__kernel"}


def wheel(place: Path, *options: str, **env: str) -> tuple[str, set[str]]:
    """The name and the files of a wheel that pip builds of the checkout."""
    pip = (sys.executable, "-m", "pip", "wheel", "--no-deps", "-w", place, *options)
    output(*pip, ROOT, **env)
    (path,) = place.glob("*.whl")
    with zipfile.ZipFile(path) as files:
        return path.name, {name for name in files.namelist() if name.startswith("pathline/")}


def sources() -> set[str]:
    """The files of the package, without those of the kernel and of the interpreter."""
    source = ROOT / "src"
    found = {path.relative_to(source) for path in source.rglob("*") if path.is_file()}
    return {p.as_posix() for p in found if p.suffix not in {".cpp", ".hpp", ".so", ".pyd", ".pyc"}}


@pytest.mark.slow
def test_failed_build_gives_a_pure_wheel(tmp_path):
    name, files = wheel(tmp_path, CXX="false")
    assert name == f"pathline-{pathline.__version__}-py3-none-any.whl"
    assert files == sources()


@pytest.mark.slow
def test_wheel_runs_on_every_processor(tmp_path):
    """Of an inline function that several objects hold the linker keeps the first, and the baseline
    comes first. So one that only the code for AVX holds must have a name of its own: under a name
    of the standard library, nothing keeps an older processor from running it."""
    if not (CXX and HEADERS):
        pytest.skip("needs a compiler and the headers of Python")
    build = tmp_path / "build"
    _, files = wheel(tmp_path, "-C", f"build-dir={build}")
    suffix = sysconfig.get_config_var("EXT_SUFFIX")
    assert files == sources() | {f"pathline/native/_kernel{suffix}"}

    def inline(library: Path) -> set[str]:
        lines = output(tool("nm"), "-C", "--defined-only", library).splitlines()
        return {line[19:] for line in lines if re.match(r"\w+ [WVu] ", line)}

    for library in build.glob("libkernel_avx*.a"):
        isa = library.stem.removeprefix("libkernel_")
        common = inline(library) - inline(build / "libkernel_baseline.a")
        assert {name for name in common if f"::{isa}::" not in name} == set()
