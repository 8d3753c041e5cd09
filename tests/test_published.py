"""The published tables in whole and in part, what happens without them, and their experiments."""

import io
import json
import os
import pickle
import re
import struct
import tarfile
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch

from pathline import fit, plots
from pathline.cli import main
from pathline.data import BENCHMARKS, is_published, load_mnist, load_published, published
from pathline.data.pickled import read_frame
from pathline.data.splits import Splits
from pathline.errors import DataError, ShapeError
from pathline.reproduce import mnist
from pathline.reproduce.mnist import Autoencoder
from pathline.reproduce.published import FREE, METHODS, OT_FLOW

DIMS = {"power": 6, "gas": 8, "hepmass": 21, "miniboone": 43, "bsds300": 63}
RANDOM = np.random.default_rng(0)


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """An empty cache, no folder of data, and no way to the network."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("PATHLINE_DATA", raising=False)
    pooch = pytest.importorskip("pooch")

    def no_network(self, url, output_file, pooch):
        raise OSError("no route to host")

    monkeypatch.setattr(pooch.HTTPDownloader, "__call__", no_network)
    return tmp_path / "cache" / "pathline"


@pytest.fixture
def parts(tmp_path, monkeypatch):
    """A folder with small parts, in the layout of the real ones."""
    folder = tmp_path / "parts"
    arrays = {
        "power_subset/power_dec2006": {"x": RANDOM.random((203, 8)).astype(np.float32)},
        "miniboone_partial/miniboone_first1523": {"x": 3 + RANDOM.normal(size=(207, 43))},
        "bsds300_patches/bsds300_patches": {
            key: RANDOM.integers(0, 256, (rows, 64), dtype=np.uint8)
            for key, rows in (("train", 90), ("val", 20), ("test", 30))
        },
        "mnist/mnist": {
            "x_train": RANDOM.integers(0, 256, (5400, 28, 28), dtype=np.uint8),
            "x_test": RANDOM.integers(0, 256, (60, 28, 28), dtype=np.uint8),
        },
    }
    for name, content in arrays.items():
        (folder / name).parent.mkdir(parents=True)
        np.savez(folder / f"{name}.npz", **content)
    monkeypatch.setenv("PATHLINE_DATA", str(folder))
    return arrays


def tenths(rows):
    """MAF's numbers of rows to train, to choose and to test with."""
    test = int(0.1 * rows)
    validation = int(0.1 * (rows - test))
    return rows - test - validation, validation, test


def shapes(splits):
    return tuple(part.shape for part in (splits.train, splits.validation, splits.test))


@pytest.mark.parametrize("name, rows", [("power", 203), ("miniboone", 207)])
def test_a_part_is_split_and_standardised_as_the_whole(parts, name, rows):
    splits = load_published(name)
    assert shapes(splits) == tuple((n, DIMS[name]) for n in tenths(rows))
    assert len(splits.columns) == DIMS[name]
    both = np.vstack([splits.train, splits.validation])
    np.testing.assert_allclose(both.mean(0), 0, atol=1e-12)
    np.testing.assert_allclose(both.std(0), 1, atol=1e-12)
    assert "not comparable with published numbers" in splits.source
    assert not is_published(splits)


def test_power_keeps_its_columns_and_has_noise_of_their_resolution(parts):
    raw = parts["power_subset/power_dec2006"]["x"].astype(float)
    train, validation, test = published._power(raw.copy())
    rows = np.vstack([train, validation, test])
    order = np.arange(len(raw))
    np.random.RandomState(42).shuffle(order)  # the same as of the rows
    kept = raw[order][:, [0, 2, 4, 5, 6, 7]]
    # Standardising is affine, so it is found by least squares; the rest is the noise.
    for column, width in enumerate((0.001, 0.01, 1, 1, 1, 0)):
        both = np.concatenate([train[:, column], validation[:, column]])
        assert abs(both.mean()) < 1e-12 and abs(both.std() - 1) < 1e-12
        slope, start = np.polyfit(rows[:, column], kept[:, column], 1)
        noise = np.abs(slope * rows[:, column] + start - kept[:, column]).max()
        assert noise < 1.01 * width + 1e-12


def test_patches_are_grey_levels_without_mean_and_last_pixel(parts):
    splits = load_published("bsds300")
    assert shapes(splits) == ((90, 63), (20, 63), (30, 63))
    whole = np.column_stack([splits.test, -splits.test.sum(1)])  # the last pixel, from the mean
    pixels = parts["bsds300_patches/bsds300_patches"]["test"]
    pixels = pixels - pixels.mean(1, keepdims=True)
    distance = np.abs(256 * whole[:, None] - pixels[None]).max(2)
    nearest = distance.argmin(1)
    assert sorted(nearest) == list(range(30))  # each patch once
    assert distance.min(1).max() < 1  # the noise less its mean


def test_the_tables_of_the_experiments_are_the_benchmarks():
    assert {name: len(table.columns) for name, table in BENCHMARKS.items()} == DIMS
    assert all(settings.keys() == DIMS.keys() for settings in (OT_FLOW, FREE))
    for method in METHODS.values():
        assert method.figures.keys() <= DIMS.keys()
    whole = {"power": 2_049_280, "gas": 1_052_065, "miniboone": 36_488}
    assert all(BENCHMARKS[name].rows == tenths(rows) for name, rows in whole.items())


@pytest.mark.parametrize("name", OT_FLOW)
def test_full_has_the_authors_settings(name):
    generator = torch.Generator().manual_seed(0)
    flow, options = METHODS["ot-flow"].full(name, DIMS[name], generator)
    # Of the authors' trained potentials; the constant of Phi is a buffer here.
    counts = {"power": 17_721, "gas": 126_791, "hepmass": 72_179, "miniboone": 78_053}
    count = sum(p.numel() for p in flow.parameters()) + 1
    assert count == counts.get(name, 297_153)
    assert flow.hjb / flow.transport == pytest.approx(OT_FLOW[name][5])
    assert options["max_steps"] == OT_FLOW[name][-1]
    for method in ("ffjord", "rnode"):
        flow, options = METHODS[method].full(name, DIMS[name], generator)
        assert flow.dim == DIMS[name] and options["batch_size"] == FREE[name][-1]


# The archive.


def hdf5(**parts):
    h5py = pytest.importorskip("h5py")
    buffer = io.BytesIO()
    with h5py.File(buffer, "w") as file:
        for key, values in parts.items():
            file[key] = values
    return buffer.getvalue()


def npy(values):
    buffer = io.BytesIO()
    np.save(buffer, values)
    return buffer.getvalue()


def csv(values, names, stray=False):
    lines = [",".join(names), *(",".join(map(repr, row)) for row in values.tolist())]
    return "\n".join([lines[0], *(line + ",1000.0" * stray for line in lines[1:])]).encode()


@pytest.fixture
def archive(tmp_path, monkeypatch):
    """A small archive in the layout of the real one, which pooch finds in place of that; gives
    the raw tables."""
    pd = pytest.importorskip("pandas")
    import hashlib

    import pooch

    gas = RANDOM.normal(size=(400, 13))
    gas[:, 5] = gas[:, 4] + 1e-3 * gas[:, 5]  # of two that agree the first is left out
    gas[:, 8] = gas[:, 6] + 1e-3 * gas[:, 8]
    names = ["Time", "Meth", "Eth", *(f"sensor {n}" for n in range(10))]
    frame = pd.DataFrame(gas, columns=pd.Index(names, dtype=object)).sample(
        frac=0.5, random_state=0
    )
    frame.to_pickle(tmp_path / "gas.pickle", protocol=2)
    hepmass = [RANDOM.normal(size=(n, 28)) for n in (300, 100)]
    for values in hepmass:
        values[:, 0] = RANDOM.integers(0, 2, len(values))
        values[:, [3, 5, 8, 11, 20, 27]] = values[:, [3, 5, 8, 11, 20, 27]].clip(-0.5)  # with ties
    heads = ["# label", *(f"f{n}" for n in range(27))]
    raw = {
        "power": RANDOM.random((150, 8)),
        "gas": frame,
        "hepmass": hepmass,
        "miniboone": RANDOM.normal(size=(120, 43)),
        "bsds300": {
            key: RANDOM.normal(size=(rows, 63)).astype(np.float32)
            for key, rows in (("train", 40), ("validation", 10), ("test", 20))
        },
    }
    files = {
        "cifar10/data.npy": b"not wanted",
        "power/._data.npy": b"not wanted",
        "power/data.npy": npy(raw["power"]),
        "gas/ethylene_CO.pickle": (tmp_path / "gas.pickle").read_bytes(),
        "hepmass/1000_train.csv": csv(hepmass[0], heads),
        "hepmass/1000_test.csv": csv(hepmass[1], [*heads, "mass"], stray=True),
        "miniboone/data.npy": npy(raw["miniboone"]),
        "BSDS300/BSDS300.hdf5": hdf5(**raw["bsds300"]),
    }
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as tar:
        for name, content in files.items():
            member = tarfile.TarInfo(f"data/{name}")
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    content = buffer.getvalue()

    def download(self, url, output_file, pooch):
        assert url == published.ARCHIVE
        with open(output_file, "wb") as file:
            file.write(content)

    monkeypatch.setattr(pooch.HTTPDownloader, "__call__", download)
    monkeypatch.setattr(published, "ARCHIVE_HASH", f"md5:{hashlib.md5(content).hexdigest()}")
    signal = int((hepmass[0][:, 0] == 1).sum())
    held = int(0.1 * signal)
    rows = {
        "power": tenths(150),
        "gas": tenths(200),
        "hepmass": (signal - held, held, int((hepmass[1][:, 0] == 1).sum())),
        "miniboone": tenths(120),
        "bsds300": (40, 10, 20),
    }
    for name, table in BENCHMARKS.items():
        monkeypatch.setitem(BENCHMARKS, name, replace(table, rows=rows[name]))
    return raw


@pytest.mark.parametrize("name", DIMS)
def test_the_whole_table_is_fetched_once(archive, cache, name, monkeypatch):
    splits = load_published(name, fetch=True)
    assert shapes(splits) == tuple((n, DIMS[name]) for n in BENCHMARKS[name].rows)
    assert splits.train.dtype == np.float64
    assert "not comparable" not in splits.source and "1705.07057" in splits.source
    assert is_published(splits)
    monkeypatch.setattr(published, "ARCHIVE", "nothing is fetched again")
    again = load_published(name)
    np.testing.assert_array_equal(again.train, splits.train)
    assert not [path for path in cache.rglob("*") if path.name.endswith(".tmp")]


def test_gas_as_the_authors_prepare_it(archive):
    data = archive["gas"].drop(columns=["Time", "Meth", "Eth"])
    count = (data.corr() > 0.98).to_numpy().sum(1)
    while (count > 1).any():
        data = data.drop(columns=data.columns[np.where(count > 1)[0][0]])
        count = (data.corr() > 0.98).to_numpy().sum(1)
    assert list(data.columns) == [f"sensor {n}" for n in (0, 2, 4, 5, 6, 7, 8, 9)]
    want = ((data - data.mean()) / data.std()).to_numpy()
    splits = load_published("gas", fetch=True)
    got = np.vstack([splits.train, splits.validation, splits.test])
    np.testing.assert_allclose(got, want, atol=1e-12)


def test_hepmass_as_the_authors_prepare_it(archive):
    train, test = (rows[rows[:, 0] == 1, 1:] for rows in archive["hepmass"])
    mean, std = train.mean(0), train.std(0, ddof=1)
    kept = [column for column in range(27) if sorted(Counter(train[:, column]).items())[0][1] <= 5]
    assert len(kept) == 21
    splits = load_published("hepmass", fetch=True)
    got = np.vstack([splits.train, splits.validation])
    np.testing.assert_allclose(got, ((train - mean) / std)[:, kept], atol=1e-12)
    np.testing.assert_allclose(splits.test, ((test - mean) / std)[:, kept], atol=1e-12)


def test_a_table_of_other_rows_is_refused(archive, monkeypatch):
    monkeypatch.setitem(BENCHMARKS, "power", replace(BENCHMARKS["power"], rows=(1, 2, 3)))
    with pytest.raises(DataError, match="expected \\(1, 2, 3\\)"):
        load_published("power", fetch=True)


def test_a_wrong_checksum_leaves_nothing(archive, cache, monkeypatch):
    monkeypatch.setattr(published, "ARCHIVE_HASH", "md5:" + 32 * "0")
    with pytest.raises(DataError, match=r"can't be fetched.*hash") as error:
        load_published("power", fetch=True)
    assert "\n" not in str(error.value)
    assert [path for path in cache.rglob("*") if path.is_file()] == []


def test_without_network(cache, tmp_path, capsys):
    out = tmp_path / "run"
    for name, size in (
        ("ot-flow-power", "full"),
        ("ffjord-gas", "full"),
        ("ot-flow-mnist", "full"),
    ):
        assert main(["reproduce", name, "--size", size, "--out", str(out)]) == 2
        told = capsys.readouterr().err.strip().splitlines()
        assert len(told) == 1 and "can't be fetched (no route to host)" in told[0]
    assert not out.exists()
    assert [path for path in cache.rglob("*") if path.is_file()] == []


@pytest.mark.parametrize("name", ["power", "gas", "hepmass", "mnist"])
def test_without_data_the_line_says_what_to_do(name, tmp_path, capsys):
    out = tmp_path / "run"
    assert main(["reproduce", f"ot-flow-{name}", "--out", str(out)]) == 2
    told = capsys.readouterr().err.strip().splitlines()
    assert len(told) == 1 and "--size full" in told[0] and "not on file" in told[0]
    assert ("PATHLINE_DATA" in told[0]) == (name in ("power", "mnist"))
    assert not out.exists()


def test_without_the_extra(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "pooch", None)
    with pytest.raises(DataError, match=re.escape("pip install 'pathline[data]'")):
        load_published("gas", fetch=True)


def test_a_damaged_part(parts, tmp_path):
    path = tmp_path / "parts" / "power_subset" / "power_dec2006.npz"
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(DataError, match=r"power_dec2006.npz can't be read"):
        load_published("power")
    with pytest.raises(DataError, match="did you mean 'power'"):
        load_published("pwer")


# Pickles.


def test_a_pickle_of_python_2_is_read(tmp_path):
    """As numpy wrote it there: text for bytes, an array in Fortran order."""
    values = np.arange(6.0).reshape(2, 3)

    def array(shape, kind, order, fortran, state):
        return (
            b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n(K\x00tU\x01btR(K\x01(%btcnumpy\n"
            b"dtype\n(U\x02%bK\x00K\x01tR(K\x03U\x01%bNNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb%b%btb"
            % (shape, kind, order, b"\x88" if fortran else b"\x89", state)
        )

    raw = values.tobytes(order="F")
    block = array(b"K\x02K\x03", b"f8", b"<", True, b"T" + struct.pack("<i", len(raw)) + raw)
    names = array(b"K\x02", b"O8", b"|", False, b"](U\x03oneU\x03twoe")
    path = tmp_path / "old.pickle"
    path.write_bytes(b"\x80\x02cpandas.core.frame\nDataFrame\n)R](" + names + block + b"eb.")
    columns, got = read_frame(path)
    assert columns == ("one", "two")
    np.testing.assert_array_equal(got, values.T)


class Evil:
    def __init__(self, folder):
        self.folder = folder

    def __reduce__(self):
        return os.mkdir, (self.folder,)


@pytest.mark.parametrize("protocol", range(6))
def test_nothing_in_a_pickle_is_called(tmp_path, protocol):
    path = tmp_path / "evil.pickle"
    path.write_bytes(pickle.dumps(Evil(str(tmp_path / "made")), protocol))
    with pytest.raises(DataError, match=r"evil\.pickle"):
        read_frame(path)
    assert not (tmp_path / "made").exists()


@pytest.mark.parametrize("content", [b"", b"\x80\x02", b"junk", b"\x80\x02)."])
def test_a_pickle_that_is_none(tmp_path, content):
    path = tmp_path / "bad.pickle"
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"bad\.pickle"):
        read_frame(path)


# The experiments.


def reproduce(name, tmp_path, *flags):
    out = tmp_path / "run"
    assert main(["reproduce", name, "--out", str(out), "--max-steps", "2", *flags]) == 0
    return json.loads((out / "metrics.json").read_text()), (out / "report.html").read_text()


@pytest.mark.parametrize("name", ["ot-flow-power", "ffjord-power", "rnode-power"])
def test_a_part_has_no_published_figure(parts, tmp_path, capsys, name):
    metrics, page = reproduce(name, tmp_path)
    printed = capsys.readouterr().out
    assert metrics["published"] is None and np.isfinite(metrics["measured"])
    assert "no published figure" in printed and "not comparable" in printed
    assert "not comparable with published numbers" in page
    label = METHODS[name.rpartition("-")[0]].label
    assert f"{label} on " in page and f"  {label}  " in printed


def test_the_whole_stands_beside_the_published_figures(archive, tmp_path, capsys):
    metrics, page = reproduce("rnode-power", tmp_path, "--size", "full")
    assert metrics["published"] == -0.39 and metrics["size"] == "full"
    printed = capsys.readouterr().out
    for figure in ("-0.3000", "-0.4600", "-0.3900"):
        assert figure in printed
    assert "OT-Flow, published" in page and "single flow" in printed


@pytest.fixture
def few_digits(monkeypatch):
    x = RANDOM.random((700, 784)).astype(np.float32)
    few = Splits("mnist", x[:500], x[500:600], x[600:], tuple(f"x{n}" for n in range(784)), "few")
    monkeypatch.setattr(mnist, "load_mnist", lambda fetch: few)


@pytest.mark.slow
def test_mnist_has_pictures_that_a_report_keeps(few_digits, tmp_path, capsys):
    metrics, page = reproduce("ot-flow-mnist", tmp_path)
    headings = ["Generated digits", "Interpolated digits", "Digits and their codes"]
    assert [title for title in headings if f"<h2>{title}</h2>" in page] == headings
    assert metrics["published"] is None and metrics["code_dim"] == 64
    assert 0 < metrics["decoding_error"] < 1
    with np.load(tmp_path / "run" / "pictures.npz") as arrays:
        shapes = [arrays[key].shape for key in arrays.files]
        assert shapes == [(8, 16, 28, 28), (8, 12, 28, 28), (4, 16, 28, 28)]
    (tmp_path / "run" / "report.html").unlink()
    assert main(["report", str(tmp_path / "run")]) == 0
    assert (tmp_path / "run" / "report.html").read_text() == page
    again, _ = reproduce("ot-flow-mnist", tmp_path, "--resume")
    assert again["measured"] == metrics["measured"]
    capsys.readouterr()
    words = ["reproduce", "ot-flow-mnist", "--out", str(tmp_path / "run"), "--max-steps", "2"]
    assert main(words) == 2
    assert "not empty" in capsys.readouterr().err


@torch.no_grad()
def test_interpolations_end_at_the_codes_of_the_test_images(few_digits):
    autoencoder = Autoencoder(4)
    flow = mnist.OTFlow(4, width=8, steps=32).double()
    images = torch.from_numpy(mnist.load_mnist(fetch=False).test)
    _, _, sheet = mnist._interpolated(autoencoder, flow, images)
    decoded = autoencoder.decode(autoencoder.encode(images[:16])).reshape(16, 28, 28).numpy()
    np.testing.assert_array_equal(sheet[:, 0], images[:8].reshape(8, 28, 28).numpy())
    np.testing.assert_allclose(sheet[:, 1], decoded[:8], atol=1e-5)
    np.testing.assert_allclose(sheet[:, -2], decoded[8:], atol=1e-5)


def test_an_autoencoder_keeps_as_much_as_principal_components():
    """Faint images in a plane with some noise; the sigmoid, which bends the plane, costs some."""
    generator = torch.Generator().manual_seed(0)
    plane = torch.randn(500, 2, generator=generator) @ torch.randn(2, 784, generator=generator)
    x = 0.5 + 0.05 * plane + 0.01 * torch.randn(500, 784, generator=generator)
    best = torch.linalg.svdvals(x - x.mean(0))[2:].square().sum() / x.numel()
    autoencoder = Autoencoder(2, generator=generator)
    fit(autoencoder, x, max_steps=600, learning_rate=0.02, progress=False)
    error = autoencoder.objective()(x).total
    assert best * 0.99 < error < 1.2 * best


def test_mnist_is_scaled_and_split(parts):
    splits = load_mnist()
    assert shapes(splits) == ((400, 784), (5000, 784), (60, 784))
    assert splits.train.dtype == np.float32
    pixels = parts["mnist/mnist"]["x_train"]
    np.testing.assert_allclose(splits.validation[-1], pixels[-1].ravel() / 255, rtol=1e-6)


def test_images_are_drawn_where_they_belong():
    pictures = np.zeros((2, 3, 4, 5))
    pictures[1, 2] = 1
    sheet = plots.images(pictures, "some").axes[0].images[0].get_array()
    assert sheet.shape == (12, 21)
    inked = np.argwhere(sheet == 1)
    assert len(inked) == 20
    assert inked.min(0).tolist() == [7, 15] and inked.max(0).tolist() == [10, 19]
    with pytest.raises(ShapeError, match=r"\(rows, columns, height, width\)"):
        plots.images(pictures[0], "some")
