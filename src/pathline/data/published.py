"""The tables on which densities are usually compared, and the handwritten digits of MNIST."""

import os
import shutil
import sys
import tarfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np

from ..errors import DataError, unknown
from .pickled import read_frame
from .splits import Splits
from .tables import default_columns

ARCHIVE = "https://zenodo.org/record/1161203/files/data.tar.gz"
ARCHIVE_HASH = "md5:9b9c9b0375315ad270eba4ce80c093ab"
ARCHIVE_FILE = "maf-data.tar.gz"  # in the cache
MNIST = "https://storage.googleapis.com/tensorflow/tf-keras-datasets/mnist.npz"
MNIST_HASH = "sha256:731c5ac602752760c8e48fbffcf8c3b850d9dc2a2aedcf2cc48468fc17b673d1"
MNIST_SOURCE = "LeCun, Cortes, Burges, The MNIST database of handwritten digits, 1998; CC BY-SA 3.0"
MAF = (
    "as preprocessed by Papamakarios, Pavlakou, Murray, Masked Autoregressive Flow, 2017 "
    "(arXiv 1705.07057)"
)
MAF_SEED = 42

Parts = tuple[np.ndarray, np.ndarray, np.ndarray]


@dataclass(frozen=True)
class Benchmark:
    """A published table: its files in the archive, what was published about it, and what part of
    it may be on file, in the folder that PATHLINE_DATA names."""

    files: tuple[str, ...]
    read: Callable[[Sequence[Path]], Parts]
    rows: tuple[int, int, int]  # to train, to choose and to test with
    columns: tuple[str, ...]
    source: str
    subset: str = ""
    read_subset: Callable[[Path], Parts] | None = None
    subset_is: str = ""


def load_published(name: str, *, fetch: bool = False) -> Splits:
    """A benchmark table of Papamakarios et al., in their splits and units.

    The columns, the noise, the standardisation and the order of the rows are theirs, so
    likelihoods of the whole table are comparable with published ones. What there is of a table
    offline goes through the same steps, and its `source` says that it is a part.

    Args:
        name: power (6 columns), gas (8), hepmass (21), miniboone (43) or bsds300 (63).
        fetch: get the whole table: the archive (817 MB) is fetched once, checked, and kept in the
            user's cache folder. Needs the extra `data`. Without it a part in the folder that the
            environment variable PATHLINE_DATA names is used if it is there, otherwise what was
            fetched before.

    Raises:
        DataError: the name is unknown, the table is neither on file nor to be fetched, or it is
            not the published one.
    """
    if name not in BENCHMARKS:
        raise DataError(unknown("benchmark table", name, BENCHMARKS))
    table = BENCHMARKS[name]
    folder = os.environ.get("PATHLINE_DATA")
    part = Path(folder or ".") / table.subset
    if not fetch and folder and table.read_subset and part.is_file():
        train, validation, test = read_parts(table.read_subset, part)
        source = f"{table.source}; {table.subset_is}: not comparable with published numbers"
        return Splits(name, train, validation, test, table.columns, source)
    files = _files(name, fetch)
    train, validation, test = read_parts(table.read, files)
    rows = (len(train), len(validation), len(test))
    if rows != table.rows or train.shape[1] != len(table.columns):
        raise DataError(
            f"the archive's table {name!r} has {rows} rows and {train.shape[1]} columns, expected "
            f"{table.rows} and {len(table.columns)}"
        )
    source = f"{table.source}; the whole table, {MAF}"
    return Splits(name, train, validation, test, table.columns, source)


def is_published(splits: Splits) -> bool:
    """Whether these are the rows on which the published figures were measured."""
    return len(splits.test) == BENCHMARKS[splits.name].rows[-1]


def load_mnist(*, fetch: bool = False) -> Splits:
    """MNIST: grey levels in [0, 1] of 28 x 28 pixels, row by row, in single precision.

    The last 5,000 of the 60,000 training images are for validation. `mnist/mnist.npz` in the
    folder that the environment variable PATHLINE_DATA names is used if it is there; otherwise
    `fetch` gets it once (11 MB), which needs the extra `data`.

    Raises:
        DataError: the images are neither on file nor to be fetched, or damaged.
    """
    train, validation, test = read_parts(_mnist, mnist_file(fetch))
    return Splits("mnist", train, validation, test, default_columns(train.shape[1]), MNIST_SOURCE)


def mnist_file(fetch: bool) -> Path:
    """Where MNIST lies, as in `load_mnist`."""
    folder = os.environ.get("PATHLINE_DATA")
    path = Path(folder or ".") / "mnist" / "mnist.npz"
    if not (folder and path.is_file()):
        path = _retrieve(MNIST, MNIST_HASH, "mnist.npz") if fetch else _cached("mnist.npz")
        if not path.is_file():
            raise DataError(
                "MNIST is not on file: set the environment variable PATHLINE_DATA to a folder "
                "that holds mnist/mnist.npz, or let `--size full` fetch it"
            )
    return path


def _files(name: str, fetch: bool) -> list[Path]:
    """The raw files of a table, out of the archive."""
    table = BENCHMARKS[name]
    paths = [_cached("maf") / file for file in table.files]
    if all(path.is_file() for path in paths):
        return paths
    if not fetch:
        part = (
            f"set the environment variable PATHLINE_DATA to a folder that holds {table.subset}, a "
            "part of it, or "
            if table.subset
            else "no part of it can be had offline; "
        )
        raise DataError(
            f"the table {name!r} is not on file: {part}fetch the whole archive once (817 MB) by "
            f"`pathline reproduce ot-flow-{name} --size full` or "
            f"`pathline.data.load_published({name!r}, fetch=True)`"
        )
    archive = _retrieve(ARCHIVE, ARCHIVE_HASH, ARCHIVE_FILE)
    try:
        with tarfile.open(archive, "r:gz") as tar:
            for member in tar:
                for path, file in zip(paths, table.files, strict=True):
                    if member.isfile() and f"/{member.name}".endswith(f"/{file}"):
                        _extract(tar, member, path)
    except (OSError, EOFError, tarfile.TarError) as error:
        raise DataError(f"{archive} can't be unpacked: {error}") from None
    for path, file in zip(paths, table.files, strict=True):
        if not path.is_file():
            raise DataError(f"{archive} holds no {file}")
    return paths


def _extract(tar: tarfile.TarFile, member: tarfile.TarInfo, path: Path) -> None:
    """Write one file of an archive, whole or not at all."""
    content = tar.extractfile(member)
    assert content is not None
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            shutil.copyfileobj(content, file, 2**20)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _retrieve(url: str, known_hash: str, name: str) -> Path:
    """A file in the cache, fetched if it is not there; pooch moves it there once it is checked."""
    try:
        import pooch
    except ImportError:
        raise DataError("pooch is not installed; pip install 'pathline[data]'") from None
    target = _cached(name)
    bar = sys.stderr.isatty()
    try:
        pooch.retrieve(
            url,
            known_hash,
            fname=name,
            path=target.parent,
            downloader=pooch.HTTPDownloader(progressbar=bar, timeout=60),
        )
    except (OSError, ValueError) as error:  # no network; a wrong checksum
        reason = " ".join(str(error).split())[:200]
        raise DataError(
            f"{url} can't be fetched ({reason}); a copy with {known_hash.replace(':', ' ')} at "
            f"{target} would be used"
        ) from None
    return target


def _cached(name: str) -> Path:
    """Where a fetched file lies."""
    cache = os.environ.get("XDG_CACHE_HOME")
    return (Path(cache) if cache else Path.home() / ".cache") / "pathline" / name


def read_parts(read: Callable[[Any], Parts], source: Path | list[Path]) -> Parts:
    """What `read` makes of files, or a `DataError` that says which are damaged."""
    try:
        return read(source)
    except ImportError as error:
        raise DataError(f"{error.name} is not installed; pip install 'pathline[data]'") from None
    except (OSError, KeyError, ValueError, EOFError, BadZipFile) as error:
        if isinstance(error, DataError):
            raise
        paths = [source] if isinstance(source, Path) else source
        raise DataError(f"{' and '.join(map(str, paths))} can't be read: {error}") from None


def load_array(path: Path, key: str) -> np.ndarray:
    """An array of an .npz file."""
    with np.load(path, allow_pickle=False) as file:
        values: np.ndarray = file[key]
    return values


def _ordered(values: np.ndarray) -> Parts:
    """The last tenth to test with, and of the rest the last tenth to choose with."""
    rest, test = np.split(values, [len(values) - int(0.1 * len(values))])
    train, validation = np.split(rest, [len(rest) - int(0.1 * len(rest))])
    return train, validation, test


def _standardised(parts: Parts) -> Parts:
    """In standard deviations of the rows that are not for testing."""
    rows = np.vstack(parts[:2])
    mean, std = rows.mean(0), rows.std(0)
    train, validation, test = ((part - mean) / std for part in parts)
    return train, validation, test


def _power(values: np.ndarray) -> Parts:
    """Without reactive power and intensity; noise of the meters' resolution on the rest, but not
    on the minute of the day."""
    random = np.random.RandomState(MAF_SEED)
    values = values.astype(np.float64)
    random.shuffle(values)
    values = np.delete(values, [1, 3], axis=1)
    voltage = 0.01 * random.rand(len(values), 1)  # drawn in their order
    power = 0.001 * random.rand(len(values), 1)
    meters = random.rand(len(values), 3)
    values[:, :5] += np.hstack([power, voltage, meters])
    return _standardised(_ordered(values))


def _gas(paths: Sequence[Path]) -> Parts:
    """The sensors alone; of columns that correlate by more than 0.98 the first is left out, until
    there are none."""
    names, values = read_frame(paths[0])
    values = values[:, [name not in ("Meth", "Eth", "Time") for name in names]]
    while True:
        close = (np.corrcoef(values.T) > 0.98).sum(1) > 1
        if not close.any():
            break
        values = np.delete(values, np.flatnonzero(close)[0], axis=1)
    return _ordered((values - values.mean(0)) / values.std(0, ddof=1))


def _hepmass(paths: Sequence[Path]) -> Parts:
    """The signal of a mass of 1000, without the columns whose least value is there more than five
    times."""
    with paths[0].open(encoding="utf-8") as file:
        count = len(file.readline().split(","))
    parts = []
    for path in paths:  # the lines of the second have a stray column at their end
        rows = np.loadtxt(path, delimiter=",", skiprows=1, usecols=range(count))
        parts.append(rows[rows[:, 0] == 1, 1:])
    train, test = parts
    kept = (train == train.min(0)).sum(0) <= 5
    mean, std = train.mean(0), train.std(0, ddof=1)
    train, test = (((part - mean) / std)[:, kept] for part in parts)
    train, validation = np.split(train, [len(train) - int(0.1 * len(train))])
    return train, validation, test


def _bsds300(paths: Sequence[Path]) -> Parts:
    import h5py

    with h5py.File(paths[0], "r") as file:
        train, validation, test = (
            np.asarray(file[part], dtype=np.float64) for part in ("train", "validation", "test")
        )
    return train, validation, test


def _patches(path: Path) -> Parts:
    """With uniform noise in a grey level, without their mean and last pixel (Uria, Murray,
    Larochelle, RNADE, 2013)."""
    random = np.random.default_rng(0)
    parts = []
    for key in ("train", "val", "test"):
        pixels = random.permutation(load_array(path, key))
        x = (pixels + random.random(pixels.shape)) / 256
        parts.append((x - x.mean(1, keepdims=True))[:, :-1])
    train, validation, test = parts
    return train, validation, test


def _mnist(path: Path) -> Parts:
    train, test = (
        (load_array(path, key).reshape(-1, 28 * 28) / np.float32(255)).astype(np.float32)
        for key in ("x_train", "x_test")
    )
    return train[:-5000], train[-5000:], test


BENCHMARKS = {
    "power": Benchmark(
        ("power/data.npy",),
        lambda paths: _power(np.load(paths[0], allow_pickle=False)),
        (1_659_917, 184_435, 204_928),
        (
            *("global_active_power", "voltage", "sub_metering_1", "sub_metering_2"),
            *("sub_metering_3", "minute_of_day"),
        ),
        "Hebrail, Berard, Individual household electric power consumption, 2012; UCI, CC BY 4.0",
        "power_subset/power_dec2006.npz",
        lambda path: _power(load_array(path, "x")),
        "two weeks of one winter instead of four years",
    ),
    "gas": Benchmark(
        ("gas/ethylene_CO.pickle",),
        _gas,
        (852_174, 94_685, 105_206),
        default_columns(8),
        "Fonollosa, Sheik, Huerta, Marco, Reservoir computing compensates slow response of "
        "chemosensor arrays exposed to fast varying gas concentrations in continuous monitoring, "
        "2015; UCI Gas sensor array under dynamic gas mixtures, CC BY 4.0",
    ),
    "hepmass": Benchmark(
        ("hepmass/1000_train.csv", "hepmass/1000_test.csv"),
        _hepmass,
        (315_123, 35_013, 174_987),
        default_columns(21),
        "Baldi, Cranmer, Faucett, Sadowski, Whiteson, Parameterized neural networks for "
        "high-energy physics, 2016; UCI HEPMASS, CC BY 4.0",
    ),
    "miniboone": Benchmark(
        ("miniboone/data.npy",),
        lambda paths: _standardised(_ordered(np.load(paths[0], allow_pickle=False))),
        (29_556, 3_284, 3_648),
        default_columns(43),
        "Roe, Yang, Zhu, Liu, Stancu, McGregor, Boosted decision trees as an alternative to "
        "artificial neural networks for particle identification, 2005; UCI MiniBooNE particle "
        "identification, CC BY 4.0",
        "miniboone_partial/miniboone_first1523.npz",
        lambda path: _standardised(_ordered(load_array(path, "x"))),
        "the first 1,523 of 36,488 rows",
    ),
    "bsds300": Benchmark(
        ("BSDS300/BSDS300.hdf5",),
        _bsds300,
        (1_000_000, 50_000, 250_000),
        tuple(f"pixel_{n // 8}_{n % 8}" for n in range(63)),
        "Martin, Fowlkes, Tal, Malik, A database of human segmented natural images, 2001; for "
        "research and education",
        "bsds300_patches/bsds300_patches.npz",
        _patches,
        "81,000 other patches of the same images instead of 1,300,000",
    ),
}
