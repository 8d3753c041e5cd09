"""The stability report against exact growth factors, spectra and attacks; its table and picture."""

import math

import numpy as np
import pytest
import torch
from torch import nn
from torch.testing import assert_close

from pathline.errors import ArgumentError, DataError, ShapeError, SolveWarning
from pathline.nets import Conv, Dense, TimeBasis
from pathline.networks import (
    Antisymmetric,
    ContinuousNet,
    Hamiltonian,
    Parabolic,
    Residual,
    SecondOrder,
    dense_net,
    fgsm,
    imexnet,
    pde_cnn,
    pgd,
    stability_report,
)


def linear(matrix, kind=Residual, steps=10, horizon=2.0, head=None, **options):
    """A network without opening layer, of a linear dynamics."""
    matrix = torch.tensor(matrix)
    operator = Dense(matrix.shape[1], matrix.shape[0])
    operator.weight.data = matrix
    method = options.pop("method", None)
    dynamics = kind(operator, TimeBasis(horizon=horizon), activation="identity", **options)
    return ContinuousNet(None, dynamics, head, steps=steps, method=method)


def test_growth_of_a_diagonal():
    """Euler on rates 0.5 and -1: the worst direction grows by (1 + h / 2)^n."""
    report = stability_report(linear([[0.5, 0.0], [0.0, -1.0]]), torch.randn(6, 2), probes=3)
    expected = 1.1 ** np.arange(11)
    np.testing.assert_allclose(report.worst, expected, rtol=1e-6)
    assert (report.gain <= expected * (1 + 1e-6)).all()
    np.testing.assert_allclose(np.sort(report.evolutions[0].spectrum.real), [-1, 0.5], atol=1e-12)
    np.testing.assert_array_equal(report.depth, np.arange(11))


def test_a_rotation_keeps_all():
    report = stability_report(
        linear([[0.0, 1.0], [-1.0, 0.0]], Antisymmetric, method="rk4"), torch.randn(6, 2)
    )
    z = 0.4j  # h omega i, and its factor by rk4
    factor = abs(1 + z + z**2 / 2 + z**3 / 6 + z**4 / 24) ** np.arange(11)
    np.testing.assert_allclose(report.worst, factor, rtol=1e-6)
    np.testing.assert_allclose(report.gain, factor, rtol=1e-6)
    part = report.evolutions[0]
    np.testing.assert_allclose(np.sort(part.spectrum.imag), [-2, 2], atol=1e-12)
    np.testing.assert_allclose(part.energy, part.energy[0] * factor**2, rtol=1e-10)
    assert part.inverse_error is None
    assert part.bound == pytest.approx(math.sqrt(8) / 2)


def test_an_oscillator():
    report = stability_report(
        linear([[1.0]], SecondOrder, steps=40, horizon=20.0), torch.ones(1, 1)
    )
    part = report.evolutions[0]
    np.testing.assert_allclose(np.sort(part.spectrum.imag), [-1, 1], atol=1e-12)
    np.testing.assert_allclose(part.spectrum.real, 0, atol=1e-12)
    assert part.inverse_error < 1e-13
    assert part.times[-1] == 20.0


@pytest.mark.parametrize(
    "net, words",
    [
        (
            linear([[2.0]], Parabolic, steps=3, horizon=2.0),
            "0.667, and is stable up to 0.5; take 4",
        ),
        (linear([[2.0]], SecondOrder, steps=3, horizon=3.6), "1.2, and is stable up to 1; take 4"),
        (
            linear([[0.0, 1.0], [-1.0, 0.0]], Antisymmetric, method="euler"),
            "Antisymmetric by 'euler' is stable for no step",
        ),
    ],
)
def test_a_step_beyond_its_bound(net, words):
    x = torch.ones(2, net.stages[0].dynamics.layer.module.operator.inputs)
    with pytest.warns(SolveWarning, match=words):
        stability_report(net, x)


def test_a_network_of_images():
    net = pde_cnn("hamiltonian", channels=1, classes=3, widths=(4, 6, 8), gradient="reversible")
    net.train()
    x, labels = torch.randn(6, 1, 8, 8), torch.randint(3, (6,))
    before = {name: value.clone() for name, value in net.state_dict().items()}
    report = stability_report(net, x, labels, epsilons=(0.1, 0.2), probes=2)
    assert [part.name for part in report.evolutions] == ["TwoLayerHamiltonian"] * 2
    assert all(part.inverse_error < 1e-13 for part in report.evolutions)
    assert report.gain.shape == report.worst.shape == (8,)
    assert report.worst[-1] >= report.gain[-1] * (1 - 1e-6)
    assert {name: len(v) for name, v in report.accuracy.items()} == {
        "clean": 1,
        "FGSM": 2,
        "PGD": 2,
    }
    assert net.training
    for name, value in net.state_dict().items():
        assert_close(value, before[name], rtol=0, atol=0)


def test_table_and_picture():
    net = dense_net("hamiltonian", 2, 2, width=4, steps=4)
    report = stability_report(net, torch.randn(20, 2), torch.randint(2, (20,)), probes=2)
    lines = report.table().splitlines()
    assert lines[1].split()[:3] == ["Hamiltonian", "verlet", "4"]
    assert lines[2].startswith("growth of perturbations: ")
    assert [line.split(":")[0] for line in lines[3:]] == [
        "accuracy, clean",
        "accuracy, FGSM",
        "accuracy, PGD",
    ]
    figure = report.figure()
    assert len(figure.axes) == 4
    assert len(stability_report(net, torch.randn(5, 2), probes=1).figure().axes) == 3


def test_the_same_seed_gives_the_same():
    net = dense_net("antisymmetric", 2, 2, width=4, steps=4)
    x = torch.randn(5, 2)
    a, b, c = (stability_report(net, x, probes=1, seed=s).gain for s in (0, 0, 1))
    np.testing.assert_array_equal(a, b)
    assert not np.array_equal(a, c)


# Attacks


def margin(w):
    """Two classes apart by the plane w x = 0."""
    net = nn.Linear(2, 2, bias=False).double()
    net.weight.data = torch.stack([-torch.tensor(w), torch.tensor(w)]).double() / 2
    return net


def test_attacks_on_a_plane():
    """The nearest point of the other class lies at |w x| / |w|_1 in the largest entry."""
    net = margin([2.0, -1.0])
    x = torch.randn(200, 2, dtype=torch.float64)
    labels = net(x).argmax(1)
    epsilon = 0.2
    distance = (x @ torch.tensor([2.0, -1.0], dtype=torch.float64)).abs() / 3
    for attack in (fgsm, pgd):
        moved = attack(net, x, labels, epsilon)
        assert float((moved - x).abs().max()) <= epsilon * (1 + 1e-12)
        fooled = net(moved).argmax(1) != labels
        assert torch.equal(fooled, distance < epsilon)


def test_larger_attacks_are_worse():
    net = dense_net("hamiltonian", 2, 2, width=8, steps=3).eval()
    x = torch.randn(50, 2)
    labels = net(x).argmax(1)
    report = stability_report(net, x, labels, epsilons=(0.01, 0.1, 1.0), probes=1)
    assert report.accuracy["clean"][0] == 1
    assert (np.diff(report.accuracy["PGD"]) <= 0).all()
    assert (report.accuracy["PGD"] <= report.accuracy["FGSM"] + 0.05).all()


def test_errors():
    net = dense_net("residual", 2, 2, width=4, steps=2)
    x = torch.randn(4, 2)
    with pytest.raises(ArgumentError, match="`probes` must be a positive integer, got 0"):
        stability_report(net, x, probes=0)
    with pytest.raises(ShapeError, match=r"`labels` must be \(4,\), got \(4, 1\)"):
        stability_report(net, x, torch.zeros(4, 1, dtype=torch.long))
    with pytest.raises(DataError, match="whole numbers from 0 to 1, got 0 to 2"):
        stability_report(net, x, torch.tensor([0, 1, 2, 0]))
    with pytest.raises(DataError, match=r"of dtype torch\.int64, got torch\.bool"):
        stability_report(net, x, torch.tensor([False, True, True, False]))
    with pytest.raises(ShapeError, match="`x` must hold at least one sample"):
        stability_report(net, x[:0])
    with pytest.raises(ShapeError, match=r"logits \(batch, classes\), got \(1, 4, 8, 8\)"):
        stability_report(imexnet(widths=(2,), steps=1), torch.randn(1, 1, 8, 8), torch.zeros(1))
    with pytest.raises(ArgumentError, match="`steps` must be a positive integer, got -1"):
        pgd(net, x, torch.zeros(4, dtype=torch.long), 0.1, steps=-1)
    with pytest.raises(ShapeError, match=r"`labels` must be \(4,\), got \(4, 1\)"):
        fgsm(net, x, torch.zeros(4, 1, dtype=torch.long), 0.1)
    with pytest.raises(ArgumentError, match="`epsilon` must be at least 0"):
        fgsm(net, x, torch.zeros(4, dtype=torch.long), -1.0)


def test_bound_of_images():
    net = ContinuousNet(None, Parabolic(Conv(2), TimeBasis(horizon=40.0)), None, steps=2)
    with pytest.warns(SolveWarning, match="Parabolic by 'euler' takes steps of 20"):
        report = stability_report(net, torch.randn(2, 2, 6, 5), probes=1)
    part = report.evolutions[0]
    assert 0.1 < part.bound < 20
    assert Hamiltonian(Dense(2), augment=True).step_bound("rk4", (2,)) is None
