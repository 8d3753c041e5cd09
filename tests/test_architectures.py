"""Published networks: their exact numbers of weights, and 1202 layers in constant memory."""

import gc
import weakref

import pytest
import torch
from torch import nn
from torch.testing import assert_close

import pathline as pl
from pathline.errors import ArgumentError, ShapeError
from pathline.nets import Conv, TimeBasis
from pathline.networks import (
    Antisymmetric,
    Classification,
    ContinuousNet,
    Evolution,
    TwoLayerHamiltonian,
    dense_net,
    imexnet,
    pde_cnn,
)

KINDS = ("parabolic", "hamiltonian", "second-order")
TABLE = {  # arXiv 1804.04272, table 1
    "STL-10": ({"widths": (16, 32, 64, 128, 128)}, 618_554, 324_794),
    "CIFAR-10": ({}, 502_570, 264_106),
    "CIFAR-100": ({"widths": (32, 64, 128, 256), "classes": 100}, 652_484, 362_180),
}


def count(module):
    return sum(p.numel() for p in module.parameters())


@pytest.mark.parametrize("data", TABLE)
def test_published_counts(data):
    options, whole, half = TABLE[data]
    found = {kind: count(pde_cnn(kind, **options)) for kind in KINDS}
    assert found == {"parabolic": whole, "second-order": whole, "hamiltonian": half}


def test_published_script_of_stl_has_more_steps():
    options, *_ = TABLE["STL-10"]
    assert count(pde_cnn("parabolic", steps=5, **options)) == 1_011_194


def test_published_counts_of_imexnet():
    """Full 3x3 kernels; those of channels by themselves beside them; the paper prints 2701440."""
    explicit, implicit = imexnet(implicit=False), imexnet()

    def kernels(net):
        return sum(p.numel() for p in net.parameters() if p.ndim > 3 and p.shape[-1] == 3)

    assert kernels(explicit) == 2_691_648
    assert kernels(implicit) == 2_703_744
    assert kernels(implicit) - kernels(explicit) == 12_096
    assert count(implicit) - count(explicit) == 12_096


@pytest.mark.parametrize("kind", KINDS)
def test_images_to_logits(kind):
    net = pde_cnn(kind, channels=1, classes=7, widths=(4, 6, 8), gradient="checkpoint", seed=3)
    logits = net(torch.randn(5, 1, 12, 8))
    assert logits.shape == (5, 7)
    logits.square().sum().backward()
    # A norm with no scale left to learn: all parameters but none move the logits.
    assert all(p.grad is not None for p in net.parameters())
    again = pde_cnn(kind, channels=1, classes=7, widths=(4, 6, 8), seed=3)
    for p, q in zip(net.parameters(), again.parameters(), strict=True):
        assert_close(p, q, rtol=0, atol=0)


def test_seeds_leave_torch_alone():
    before = torch.random.get_rng_state()
    pde_cnn("parabolic", widths=(4, 6))
    assert torch.equal(before, torch.random.get_rng_state())


def test_lean_networks():
    full, lean = (
        pde_cnn("parabolic", widths=(16, 32, 64), operator=operator)
        for operator in ("full", "lean")
    )
    converted = [sum(count(e.dynamics) for e in net.evolutions()) for net in (full, lean)]
    assert converted[0] > 6 * converted[1]
    assert lean(torch.randn(2, 3, 8, 8)).shape == (2, 10)


@pytest.mark.parametrize("boundary", ["periodic", "reflecting"])
def test_labels_of_pixels(boundary):
    net = imexnet(widths=(4, 6), steps=2, boundary=boundary)
    image = torch.randn(2, 1, 9, 8, requires_grad=True)
    labels = net(image)
    assert labels.shape == (2, 4, 9, 8)
    (reach,) = torch.autograd.grad(labels[0, :, 0, 0].sum(), image)
    assert (reach[0] != 0).all()
    explicit = imexnet(widths=(4, 6), steps=1, implicit=False).eval()
    (reach,) = torch.autograd.grad(explicit(image)[0, :, 0, 0].sum(), image)
    assert not reach[0, 0, 7:].any()  # two 3x3 layers and two of K^T and K see six pixels far


MADE = {
    "dense": lambda: dense_net("antisymmetric", 3, 2, width=4, time=TimeBasis("legendre", 2, 3.0)),
    "images": lambda: pde_cnn("second-order", widths=(4, 6), operator="shift"),
    "pixels": lambda: imexnet(channels=3, widths=(4,), boundary="reflecting"),
}


@pytest.mark.parametrize("name", MADE)
def test_saves_and_loads(name, tmp_path):
    net = MADE[name]()
    for parameter in net.parameters():
        parameter.data += torch.randn_like(parameter)
    pl.save(net, tmp_path)
    again = pl.load(tmp_path)
    x = torch.randn(4, 3) if name == "dense" else torch.randn(4, 3, 6, 8)
    assert_close(again.eval()(x), net.eval()(x), rtol=0, atol=0)
    assert again.config() == pl.load(tmp_path).config()


def test_run_folders(tmp_path):
    """A run keeps the best model, with the statistics of batch norm, and knows itself again."""
    x, y = torch.randn(60, 3 * 16), torch.randint(2, (60, 1)).float()

    def train(**options):
        net = pde_cnn("hamiltonian", classes=2, widths=(4, 6))
        objective = Classification(net, shape=(3, 4, 4))
        pl.fit(
            objective, (x, y), max_steps=12, batch_size=16, progress=False, out=tmp_path, **options
        )
        return list(net.state_dict().values())

    trained = train()
    assert_close(list(pl.load(tmp_path).state_dict().values()), trained, rtol=0, atol=0)
    assert_close(train(resume=True), trained, rtol=0, atol=0)


@pytest.mark.parametrize("change", ["head", "steps", "basis"])
def test_networks_changed_by_hand_are_not_saved(change, tmp_path):
    net = dense_net("hamiltonian", 2, 7, steps=4)
    if change == "head":
        net.head = nn.Linear(16, 2)
    elif change == "steps":
        net.stages[0].steps = 16
    else:
        net.stages[0].dynamics = net.stages[0].dynamics.refined(8)
    with pytest.raises(ArgumentError, match="is not as `dense_net` made it; keep the"):
        pl.save(net, tmp_path)
    assert not list(tmp_path.iterdir())


def test_networks_made_by_hand_are_not_saved(tmp_path):
    net = ContinuousNet(nn.Linear(2, 4), Antisymmetric(Conv(4)), None)
    with pytest.raises(ArgumentError, match="only networks made by `dense_net`"):
        pl.save(net, tmp_path)


@pytest.mark.parametrize(
    "net, shape, words",
    [
        (lambda: pde_cnn("parabolic", widths=(4, 6, 8, 8)), (2, 3, 8, 3), "of at least 4 pixels"),
        (lambda: pde_cnn("parabolic", widths=(4, 6)), (2, 1, 8, 8), r"\(batch, 3, height, width\)"),
        (lambda: pde_cnn("parabolic", widths=(4, 6)), (2, 192), r"got \(2, 192\)"),
        (lambda: imexnet(widths=(4,)), (2, 8, 8), r"\(batch, 1, height, width\)"),
        (lambda: dense_net("residual", 3, 2), (5, 4), r"rows \(batch, 3\), got \(5, 4\)"),
    ],
)
def test_wrong_inputs(net, shape, words):
    with pytest.raises(ShapeError, match=words):
        net()(torch.zeros(shape))


def test_the_smallest_image():
    assert pde_cnn("parabolic", widths=(4, 6, 8, 8)).eval()(torch.zeros(1, 3, 4, 4)).shape == (
        1,
        10,
    )


def test_errors():
    with pytest.raises(ArgumentError, match="did you mean 'lean'"):
        pde_cnn("parabolic", operator="leen")
    with pytest.raises(ArgumentError, match="did you mean 'parabolic'"):
        pde_cnn("parabollic")
    with pytest.raises(ArgumentError, match=r"`widths` must be at least two, got \(4,\)"):
        pde_cnn("parabolic", widths=(4,))
    with pytest.raises(ShapeError, match="even number of channels, got 5"):
        pde_cnn("hamiltonian", widths=(5, 6))(torch.randn(2, 3, 8, 8))


# Reversible training


class Saved:
    """A tensor that autograd keeps."""

    def __init__(self, tensor):
        self.tensor = tensor


def held_bytes(evolution, x):
    """The output, and the bytes that autograd then keeps beside the parameters."""
    alive = weakref.WeakSet()
    parameters = {p.untyped_storage().data_ptr() for p in evolution.parameters()}

    def pack(tensor):
        saved = Saved(tensor.detach())  # with its graph, a saved output would hold itself
        alive.add(saved)
        return saved

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda saved: saved.tensor):
        y = evolution(x)
    gc.collect()
    storages = [saved.tensor.untyped_storage() for saved in alive]
    sizes = {storage.data_ptr(): storage.nbytes() for storage in storages}
    return y, sum(size for place, size in sizes.items() if place not in parameters)


def deep(layers, gradient):
    """A Hamiltonian network of so many layers, four a step, on images of 8 channels."""
    steps = layers // 4
    generator = torch.Generator().manual_seed(0)
    time = TimeBasis("piecewise-constant", steps, 0.1 * steps)
    operators = [Conv(4, generator=generator) for _ in range(2)]
    dynamics = TwoLayerHamiltonian(*operators, time, norm=True)
    for parameter in dynamics.parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        parameter.data = parameter.data + 0.05 * noise
    return Evolution(dynamics.double(), steps=steps, gradient=gradient)


def test_1202_layers_in_constant_memory():
    """4 * 300 layers between the opening one and the classifier, as arXiv 1709.03698 counts."""
    x = torch.randn(2, 8, 8, 8, dtype=torch.float64, requires_grad=True)
    found, held = {}, {}
    for layers, gradient in ((120, "reversible"), (1200, "reversible"), (1200, "discrete")):
        evolution = deep(layers, gradient)
        y, held[layers, gradient] = held_bytes(evolution, x)
        if layers == 1200:
            found[gradient] = torch.autograd.grad(y.square().sum(), [x, *evolution.parameters()])
    assert held[1200, "reversible"] == held[120, "reversible"]
    assert held[1200, "reversible"] <= 6 * x.numel() * 8
    assert held[1200, "discrete"] > 500 * held[1200, "reversible"]
    for one, other in zip(found["reversible"], found["discrete"], strict=True):
        assert float((one - other).abs().max() / other.abs().max()) < 1e-10
