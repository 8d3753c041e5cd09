"""`Classification` and `Regression`: losses by hand, regularisers, images, errors, training."""

import pytest
import torch
from torch import nn
from torch.testing import assert_close

import pathline as pl
from pathline.errors import ArgumentError, DataError, ShapeError
from pathline.networks import Classification, Regression, dense_net, imexnet, pde_cnn


def data(n=40, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, 2, generator=generator)
    return x, (x.square().sum(1, keepdim=True) > 1.4).float()


def test_cross_entropy_by_hand():
    net, (x, y) = dense_net("hamiltonian", 2, 2, width=6, steps=3), data()
    objective = Classification(net, smoothness=0.1, decay=0.2, head=0.3)
    for part in net.evolutions():
        for p in part.dynamics.parameters():
            p.data += 0.1 * torch.randn_like(p)
    weights = torch.rand(40)
    found = objective(torch.cat([x, y], 1).double(), weights)
    each = -torch.log_softmax(net(x), 1).gather(1, y.long())[:, 0]
    decay, smoothness = 0.0, 0.0
    for p in net.stages[0].parameters():
        decay += 0.5 * p.square().sum() * 5 / 3
        smoothness += 0.5 * p.diff(dim=0).square().sum() * 3 / 5
    head = 0.5 * sum(p.square().sum() for p in net.head.parameters())
    expected = (each * weights).mean() + 0.1 * smoothness + 0.2 * decay + 0.3 * head
    assert_close(found.total, expected)
    assert set(found.terms) == {"data", "smoothness", "decay", "head"}
    assert_close(objective.validate(torch.cat([x, y], 1).double()), each.detach())


def test_weights_of_classes():
    net, (x, y) = dense_net("hamiltonian", 2, 2, width=6, steps=3), data()
    each = -torch.log_softmax(net(x), 1).gather(1, y.long())[:, 0]
    expected = (each * torch.where(y[:, 0] == 1, 3.0, 0.5)).mean()
    objective = Classification(net, class_weights=(0.5, 3.0))
    assert_close(objective(torch.cat([x, y], 1).double()).total, expected)
    with pytest.raises(ArgumentError, match="`class_weights` must be at least 0"):
        Classification(net, class_weights=(1.0, -1.0))
    with pytest.raises(ShapeError, match="each of the network's 2 classes, got 3"):
        pl.fit(Classification(net, class_weights=(1.0, 1.0, 1.0)), (x, y), progress=False)


def test_squares_by_hand():
    net = dense_net("antisymmetric", 2, 3, width=4, steps=2)
    x, y = torch.randn(10, 2), torch.randn(10, 3)
    found = Regression(net, targets=3)(torch.cat([x, y], 1).double())
    assert_close(found.total, 0.5 * (net(x) - y).square().sum(1).mean())


def test_training_reports_accuracy():
    net, (x, y) = dense_net("hamiltonian", 2, 2, steps=4), data(400)
    run = pl.fit(Classification(net, decay=1e-4), (x, y), max_steps=150, progress=False)
    assert run.metrics["accuracy"] > 0.9
    assert run.validation < 0.3


def test_images_by_their_shape():
    """Batch norm learns its statistics in training, and judges by them."""
    y = torch.randint(3, (200, 1)).float()
    x = torch.randn(200, 1, 6, 4) + 2 * y.view(-1, 1, 1, 1)
    net = pde_cnn("hamiltonian", channels=1, classes=3, widths=(4, 6), gradient="reversible")
    objective = Classification(net, shape=(1, 6, 4))
    run = pl.fit(objective, (x.flatten(1), y), max_steps=60, batch_size=64, progress=False)
    assert run.metrics["accuracy"] > 0.8
    assert not net.training
    rows = torch.cat([x.flatten(1), y], 1).double()
    judged = objective.validate(rows)
    assert_close(judged, nn.functional.cross_entropy(net(x), y[:, 0].long(), reduction="none"))


def test_labels_of_pixels():
    net = imexnet(widths=(4,), steps=1, classes=3)
    x, y = torch.randn(5, 16), torch.randint(3, (5, 16)).float()
    objective = Classification(net, shape=(1, 4, 4))
    found = objective(torch.cat([x, y], 1).double()).total
    logits = net(x.view(5, 1, 4, 4))
    assert_close(found, nn.functional.cross_entropy(logits, y.view(5, 4, 4).long()))


@pytest.mark.parametrize("label", [2.0, -1.0, 0.5])
def test_labels_outside_of_the_classes(label):
    net, (x, y) = dense_net("residual", 2, 2, width=4, steps=2), data()
    y[7] = label
    with pytest.raises(DataError, match=f"whole numbers from 0 to 1, .* got {label:g}"):
        pl.fit(Classification(net), (x, y), progress=False)


def test_wrong_sizes():
    net = dense_net("residual", 2, 2, width=4, steps=2)
    with pytest.raises(ShapeError, match="need 1 label"):
        pl.fit(Classification(net, shape=(2,)), torch.zeros(9, 4), progress=False)
    with pytest.raises(ShapeError, match="gives 2 numbers a row, and the data hold 1"):
        pl.fit(Regression(net), torch.zeros(9, 3), progress=False)
    with pytest.raises(ShapeError, match="do not hold inputs of shape"):
        pl.fit(Regression(net, targets=3), torch.zeros(9, 3), progress=False)
    images = pde_cnn("parabolic", channels=3, widths=(4, 6))
    with pytest.raises(ShapeError, match=r"do not hold inputs of shape \(3, 8, 8\)"):
        pl.fit(Classification(images, shape=(3, 8, 8)), torch.zeros(9, 65), progress=False)


def test_arguments():
    net = dense_net("residual", 2, 2, width=4, steps=2)
    with pytest.raises(ArgumentError, match="`head` must be at least 0, got -1"):
        Classification(net, head=-1)
    with pytest.raises(ArgumentError, match="`targets` must be a positive integer, got 0"):
        Regression(net, targets=0)


def test_trained_and_loaded_networks_are_in_evaluation_mode(tmp_path):
    """Batch norm then uses its running statistics, so an image's scores depend on no other."""
    net, x = pde_cnn("parabolic", channels=1, classes=2, widths=(4, 4)), torch.randn(20, 36)
    objective = Classification(net, shape=(1, 6, 6))
    labels = (x.mean(1, keepdim=True) > 0).float()
    pl.fit(objective, (x, labels), max_steps=3, out=tmp_path, progress=False)
    images = x.view(-1, 1, 6, 6)
    for trained in (net, pl.load(tmp_path)):
        alone = torch.cat([trained(image[None]) for image in images])
        assert_close(trained(images), alone, rtol=1e-4, atol=1e-5)


def test_a_run_goes_on_with_the_same_loss_alone(tmp_path):
    def train(decay, **options):
        net = dense_net("residual", 2, 2, width=4, steps=2)
        objective = Classification(net, decay=decay, class_weights=(1.0, 2.0))
        pl.fit(objective, data(), max_steps=3, out=tmp_path, progress=False, **options)

    train(0.5)
    train(0.5, resume=True)
    with pytest.raises(ArgumentError, match=r"another decay of its objective: 0\.5, now 0\.1"):
        train(0.1, resume=True)
