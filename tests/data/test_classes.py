"""Labelled data by formula against their definitions, and images with labels from files."""

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.testing import assert_close

from pathline.data import (
    Moons,
    ellipses,
    load_images,
    load_mnist,
    moons,
    peaks,
    peaks_function,
    q_tips,
    spirals,
)
from pathline.data.classes import PEAKS
from pathline.errors import ArgumentError, DataError


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("make", [ellipses, moons, peaks, lambda n, g: q_tips(n, g, size=16)])
def test_the_same_seed_gives_the_same_data(make):
    for first, again in zip(make(20, generator(1)), make(20, generator(1)), strict=True):
        assert torch.equal(first, again)
    assert not torch.equal(make(20, generator(1))[0], make(20, generator(2))[0])


def test_ellipses():
    x, labels = ellipses(500, generator())
    size = x[:, 0] ** 2 + (x[:, 1] / 0.4) ** 2
    assert torch.equal(labels[:, 0], (size > 1).double())
    assert size.max() <= 4 and x.shape == (1000, 2)


def test_moons():
    """Each class lies about its own half circle, and the toy density finds both likely."""
    x, labels = moons(2000, generator())
    centre = torch.tensor([[-1.0, -0.2], [1.0, 0.8]]).double()[labels[:, 0].long()]
    assert_close((x - centre).norm(dim=1).mean(), torch.tensor(2.0).double(), atol=0.02, rtol=0)
    toy = Moons()
    other = toy.sample(4000, generator(1))
    assert_close(toy.log_prob(x).mean(), toy.log_prob(other).mean(), atol=0.05, rtol=0)


def test_spirals():
    x, labels = spirals()
    assert x.shape == (1026, 2) and labels.sum() == 513
    angle = torch.linspace(0, 4 * torch.pi, 513, dtype=torch.float64)
    inner, outer = x[labels[:, 0] == 0], x[labels[:, 0] == 1]
    assert_close(inner.norm(dim=1), angle / (4 * torch.pi))
    assert_close((outer - inner).norm(dim=1), torch.full_like(angle, 0.2))
    assert_close(outer[1:, 1].atan2(outer[1:, 0]), angle[1:].sin().atan2(angle[1:].cos()))


def test_peaks():
    x, labels = peaks(300, generator())
    assert torch.equal(labels[:, 0].long().bincount(), torch.full((5,), 300))
    edges = torch.linspace(*PEAKS, 6, dtype=torch.float64)
    assert torch.equal(torch.bucketize(peaks_function(x), edges) - 1, labels[:, 0].long())
    assert x.abs().max() <= 3


def test_extremes_of_peaks():
    axis = torch.linspace(-3, 3, 1201, dtype=torch.float64)
    values = peaks_function(torch.cartesian_prod(axis, axis))
    assert_close(
        torch.stack([values.min(), values.max()]), torch.tensor(PEAKS).double(), atol=2e-4, rtol=0
    )
    # MATLAB's peaks(0, 0).
    assert_close(
        peaks_function(torch.zeros(1, 2).double()),
        torch.tensor([0.9810]).double(),
        atol=5e-5,
        rtol=0,
    )


def test_q_tips():
    x, labels = q_tips(200, generator(), size=32)
    assert x.shape == (200, 1, 32, 32) and labels.shape == (200, 32, 32)
    kinds = labels.flatten(1).amax(1)
    assert set(kinds.tolist()) == {1.0, 2.0, 3.0}
    image = (x[:, 0] * 255).round()
    assert set(image.unique().tolist()) == {1.0, 112.0, 128.0, 255.0}
    assert torch.equal(image != 112, labels > 0)
    white, black = ((image == level).flatten(1).any(1) for level in (255, 1))
    assert torch.equal(white, kinds < 3) and torch.equal(black, kinds > 1)
    # A bar of length l and width 2 covers about 2 l pixels.
    assert ((labels > 0).flatten(1).sum(1).double() - 45).abs().max() < 25
    assert_close(
        (labels > 0).flatten(1).sum(1).double().mean(),
        torch.tensor(45.0).double(),
        atol=2.0,
        rtol=0,
    )  # the mean length is 22.5
    with pytest.raises(ArgumentError, match="`size` must be at least 16, got 8"):
        q_tips(1, size=8)


def test_images_from_a_file(tmp_path, monkeypatch):
    random = np.random.default_rng(0)
    arrays = {
        "x_train": random.integers(0, 256, (510, 32, 32, 3), dtype=np.uint8),
        "y_train": random.integers(0, 10, 510, dtype=np.uint8),
        "x_test": random.integers(0, 256, (4, 32, 32, 3), dtype=np.uint8),
        "y_test": random.integers(0, 10, 4, dtype=np.uint8),
    }
    (tmp_path / "cifar10_subset").mkdir()
    np.savez(tmp_path / "cifar10_subset" / "cifar10_subset.npz", **arrays)
    monkeypatch.setenv("PATHLINE_DATA", str(tmp_path))
    found = load_images("cifar10-subset")
    assert (len(found.train), len(found.validation), len(found.test)) == (10, 500, 4)
    pixels = found.test[:, :-1].reshape(4, *found.shape)
    assert_close(pixels[2, 1, 5, 7], np.float32(arrays["x_test"][2, 5, 7, 1] / 255))
    assert np.array_equal(found.validation[:, -1], arrays["y_train"][10:])


def test_digits_are_those_of_scikit_learn():
    from sklearn.datasets import load_digits

    found, (x, y) = load_images("digits"), load_digits(return_X_y=True)
    assert found.shape == (1, 8, 8) and found.classes == 10
    assert [len(part) for part in (found.train, found.validation, found.test)] == [1097, 200, 500]
    rows = np.concatenate([found.train, found.validation, found.test])
    plain = np.column_stack([x / 16, y]).astype(np.float32)
    assert sorted(map(bytes, rows)) == sorted(map(bytes, plain))
    assert np.array_equal(load_images("digits").test, found.test)


def test_images_that_are_not_there(tmp_path, monkeypatch):
    monkeypatch.delenv("PATHLINE_DATA", raising=False)
    with pytest.raises(DataError, match="PATHLINE_DATA"):
        load_images("cifar10-subset")
    monkeypatch.setenv("PATHLINE_DATA", str(tmp_path))
    (tmp_path / "cifar10_subset").mkdir()
    np.savez(tmp_path / "cifar10_subset" / "cifar10_subset.npz", x_train=np.zeros(3))
    with pytest.raises(DataError, match="can't be read"):
        load_images("cifar10-subset")
    with pytest.raises(ArgumentError, match="cifar10-subset"):
        load_images("cifar10")


@pytest.mark.skipif(
    not (Path(os.environ.get("PATHLINE_DATA", "/nowhere")) / "mnist/mnist.npz").is_file(),
    reason="PATHLINE_DATA names no folder with MNIST",
)
def test_mnist_has_the_pixels_of_load_mnist():
    found, plain = load_images("mnist"), load_mnist()
    assert found.shape == (1, 28, 28) and len(found.train) == 55_000
    assert np.array_equal(found.test[:, :-1], plain.test)
    assert np.bincount(found.test[:, -1].astype(int))[0] == 980  # zeros in MNIST's test images
